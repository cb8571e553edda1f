"""esm-fast fill-mask: the most probable residues at each <mask>."""

import argparse

from .common import InputError, add_model, dtype_of, load_model
from .numbers import positive

NAME = "fill-mask"
ORDER = 21
HELP = "the most probable residues at <mask>"
DESCRIPTION = """\
Predicts the residues at each <mask> of a sequence, as the model card's example does. With --json
the output has the form of a Hugging Face fill-mask pipeline: a list of predictions, or for several
masks a list of such lists."""
EXAMPLES = """\
  esm-fast fill-mask 'QERLKSIVRILE<mask>SLGYNIVAT' --model esm1b_t33_650M_UR50S
  esm-fast fill-mask 'MK<mask>AY<mask>AKQR' --top 3 --json

Quote the sequence: the shell reads < and > itself.
"""
_MASK = "<mask>"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sequence", metavar="SEQUENCE", help="residues with one <mask> or several, in quotes")
    parser.add_argument("--top", type=positive, default=5, metavar="N", help="predictions a mask (default: 5)")
    add_model(parser)


def run(args: argparse.Namespace) -> None:
    tokens = _encode(args.sequence)
    dtype = dtype_of(args)
    model = load_model(args.model, device=args.device, dtype=dtype, backend=args.backend, threads=args.threads)
    if model.lm_head is None:
        raise InputError(f"{args.model} has no language-model head, so it cannot fill masks")
    if len(tokens.ids) > model.config.limit("error"):
        raise InputError(f"the sequence has {len(tokens.ids)} residues; this model takes {model.config.max_residues}")
    masks = _predict(model, tokens, args.top)
    args.summary.replace([found for _, found in masks] if len(masks) > 1 else masks[0][1])
    for position, found in masks:
        lines = [f"  {each['score']:.4f}  {each['token']:2}  {each['token_str']}" for each in found]
        args.summary.say(f"residue {position}", *lines)


def _encode(sequence: str):
    from ..alphabet import MASK
    from ..sequences.fasta import FastaError, records_from
    from ..sequences.tokenize import Policy, Report, tokenize

    records = next(records_from([("SEQUENCE", sequence)]))
    try:
        tokens = tokenize(records, Policy(max_residues=len(sequence) + 1), Report())
    except FastaError as error:
        raise InputError(str(error).split("; use ")[0]) from None
    if not (tokens.ids == MASK).any():
        raise InputError(f"the sequence has no {_MASK}; put one in, in quotes: 'QERLKSIVRILE{_MASK}SLGYNIVAT'")
    return tokens


def _predict(model, tokens, top: int) -> list[tuple[int, list[dict]]]:
    """Per mask its residue number, and predictions with the keys of Hugging Face's pipeline."""
    import torch

    from ..alphabet import TOKENS
    from ..inference.outputs.logits import Logits, masks_of
    from ..inference.stream import run as run_model

    ((_, (logits,)),) = run_model(model, [tokens], [Logits(only=masks_of)], len(tokens.ids))
    names = [TOKENS[i] for i in tokens.ids]
    masks = []
    for place, row in zip((i for i, name in enumerate(names) if name == _MASK), torch.from_numpy(logits), strict=True):
        best = row.softmax(-1).topk(min(top, len(TOKENS)))
        found = []
        for score, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            filled = " ".join([*names[:place], TOKENS[token], *names[place + 1 :]])
            found.append({"score": score, "token": token, "token_str": TOKENS[token], "sequence": filled})
        masks.append((place + 1, found))
    return masks
