"""esm-fast predict of pairs: each protein goes through the model once, then the head over the pairs."""

import argparse
import time
from pathlib import Path

from .common import InputError, as_flags, progress, tell_result

_WITHOUT = {"empty": "error", "duplicates": "keep", "max_record": 10_000_000}  # what a table of pairs has no use for


def predict_pairs(args: argparse.Namespace, predictor, policy, out: Path, dtype: str) -> None:
    from ..files.atomic import atomic
    from ..inference.embed import token_budget
    from ..sequences.ingest import Counts
    from ..train.examples import ExamplesError
    from ..train.pairs import proteins_of

    counts, start = Counts(), time.perf_counter()
    try:
        examples = _read(args)
        kept, tokens, index = proteins_of(examples, policy, counts.report)
    except ExamplesError as error:
        raise InputError(as_flags(str(error))) from None
    counts.count(tokens.lengths)
    with atomic(out) as temporary, progress(counts.residues) as bar:
        more = {"window": policy.window, "batch_tokens": token_budget(predictor.esm, args.batch_tokens)}
        outputs = predictor.outputs_of_pairs([tokens], index, on_batch=bar.update, **more)
        _write(predictor.targets, kept, outputs, temporary, out.name)
    args.summary.say(f"pairs     {len(kept):,} of {len(examples):,}", pairs=len(kept), pairs_read=len(examples))
    tell_result(args, counts, time.perf_counter() - start, args.predictor, dtype)
    args.summary.output(out)


def _read(args: argparse.Namespace) -> list:
    from ..train.examples import Columns, read_examples

    for name, usual in _WITHOUT.items():
        if getattr(args, name) != usual:
            raise InputError(f"--{name.replace('_', '-')} is not for pairs; leave it out")
    if len(args.fasta) > 1 or args.fasta == ["-"]:
        raise InputError("a predictor of pairs takes one table, or one FASTA file with --pairs")
    columns = [tuple(names) if names else None for names in (args.id_column, args.sequence_column)]
    return read_examples(args.fasta[0], Columns(*columns), labels=args.pairs, pairs=True, unlabelled=True)


def _write(targets, examples, outputs, path: Path, name: str) -> None:
    from .predictions import ID_COLUMNS, table

    with table(path, name, targets, ids=ID_COLUMNS[1]) as add:
        for example, output in zip(examples, outputs, strict=True):
            add(example.names, None, output, ())
