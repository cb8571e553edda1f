"""esm-fast fit-contacts: a contact regression for any model, from structures."""

import argparse
import sys
import time
from pathlib import Path

from .common import InputError, load_model, output_path, progress
from .numbers import above_0, positive

NAME = "fit-contacts"
ORDER = 33
HELP = "a contact regression for any model, from structures"
DESCRIPTION = """\
Fits the regression that contacts are predicted with (Rao et al. 2020: L1 logistic, on symmetrised
attention maps less their average product, residues 6 or more apart; a contact is C-beta atoms within
8 Angstrom). About 20 structures are enough. What it is worth is measured on structures that it was
not fitted to: those of --test, or without it every fourth chain, which is fitted to afterwards: the
share of true contacts among the L, L/2 and L/5 most probable pairs.

Chains of the same sequence count once; files without a protein are named and left out. A regression
called NAME-contact-regression.safetensors beside a model's NAME.pt or NAME.safetensors, or
contact-regression.safetensors in a Hugging Face folder, is found with the model, here and in the
drop-in; ending in .pt it is one that fair-esm reads too."""
EXAMPLES = """\
  esm-fast fit-contacts my.safetensors structures/ -o my-contact-regression.safetensors
  esm-fast fit-contacts esm1v_t33_650M_UR90S_1 1abc.cif 2def.pdb.gz ... -o v.safetensors --test held_out/
  esm-fast contacts proteins.fasta -o maps --model esm1v_t33_650M_UR90S_1 --regression v.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model's name, file or folder, see esm-fast embed --help")
    parser.add_argument("structures", nargs="+", metavar="STRUCTURE", help="PDB or mmCIF files, or folders of them")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="OUT.safetensors, or OUT.pt for fair-esm")
    parser.add_argument("--test", nargs="+", default=[], metavar="STRUCTURE", help="structures to evaluate on")
    parser.add_argument("--c", type=above_0, default=0.15, help="inverse of the L1 penalty (default: %(default)s)")
    parser.add_argument(
        "--pairs", type=positive, default=200_000, metavar="N", help="most pairs to fit to (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: %(default)s: a GPU)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: one per core)")


def run(args: argparse.Namespace) -> None:
    out = output_path(args.output, args.force)
    if out.suffix not in (".safetensors", ".pt"):
        raise InputError(f"{out} ends in neither .safetensors nor .pt")
    require_extra()
    from .. import weights
    from ..contacts import fit
    from ..contacts.precision import mean

    start = time.perf_counter()
    model = load_model(args.model, device=args.device, dtype="float32", threads=args.threads, contacts=False)
    chains = chains_of(args.structures, model)
    test = chains_of(args.test, model) if args.test else chains[3::4]
    fitted_to = chains if args.test else [chain for i, chain in enumerate(chains) if i % 4 != 3]
    known = {chain.sequence for chain in fitted_to}
    if both := [chain.name for chain in test if chain.sequence in known]:
        raise InputError(f"{', '.join(both[:5])} of --test is fitted to as well; leave it out of one")
    if not test:
        raise InputError(f"there are {len(chains)} chains: give 4 or more, so that some can be held out, or --test")
    with progress(len(fitted_to) + len(test) + (0 if args.test else len(chains)), unit="chains") as bar:
        regression = fit(model, fitted_to, args.c, args.pairs)
        bar.update(len(fitted_to))
        found = [_precisions(model, regression, chain, bar) for chain in test]
        if not args.test:
            regression = fit(model, chains, args.c, args.pairs)
            bar.update(len(chains))
    worth = {"chains": len(chains), "held_out": len(test), "precision": mean(found)}
    weights.save_regression(model, regression.weight, regression.bias, out, worth)
    _summary(args, out, regression, worth, time.perf_counter() - start)


def require_extra() -> None:
    from importlib.util import find_spec

    if find_spec("gemmi") is None or find_spec("sklearn") is None:
        raise InputError("structures need gemmi and scikit-learn: pip install 'esm_fast[contacts]'")


def chains_of(paths: list[str], model) -> list:
    """The chains of files and folders, each sequence once, and those that the model takes; what is left out is named.

    Raises InputError for a file that cannot be read, and where no chain is left."""
    from ..contacts import NoProteinError, StructureError, files_of, read_structures

    limit, found, long, without = model.config.limit("error"), {}, [], []
    try:
        for file in (file for path in paths for file in files_of(path)):
            try:
                chains = read_structures(file)
            except NoProteinError:
                without.append(file.name)
                continue
            for chain in chains:
                if limit is not None and len(chain.sequence) > limit:
                    long.append(chain.name)
                else:
                    found.setdefault(chain.sequence, chain)
    except (StructureError, FileNotFoundError) as error:
        raise InputError(str(error)) from None
    left_out = [(f"longer than the model's {limit or 0:,} residues", long), ("no protein of 20 residues", without)]
    for why, names in left_out:
        if names:
            more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
            print(f"warning: {len(names):,} left out, {why}: {', '.join(names[:10])}{more}", file=sys.stderr)
    if not found:
        raise InputError("no chain is left: " + "; ".join(f"{len(names):,} {why}" for why, names in left_out if names))
    return list(found.values())


def _precisions(model, regression, chain, bar) -> dict:
    from ..contacts import features, precisions

    logits = features(model, chain.sequence) @ regression.weight + regression.bias
    bar.update(1)
    return precisions(logits, chain)


def table(precision: dict) -> list[str]:
    """What of the most probable pairs are contacts, beside what of all pairs of that range are."""
    columns = list(next(iter(precision.values())))
    lines = ["range     " + "".join(f"{'P@' + c if c != 'any' else 'any pair':>10}" for c in columns)]
    return lines + [f"{name:10}" + "".join(f"{row[c]:10.3f}" for c in columns) for name, row in precision.items()]


def _summary(args: argparse.Namespace, out: Path, regression, worth: dict, seconds: float) -> None:
    used = int((regression.weight != 0).sum())
    args.summary.say(
        f"chains    {worth['chains']:,}, {worth['held_out']:,} for the table",
        f"pairs     {regression.pairs:,}, of which {regression.contacts:,} touch, in {seconds:.1f} s",
        f"maps      {used:,} of {len(regression.weight):,} have a coefficient",
        *table(worth["precision"]),
        f"model     {args.model} (float32)",
        **worth,
        pairs=regression.pairs,
        contacts=regression.contacts,
        maps=len(regression.weight),
        used=used,
        model=args.model,
        dtype="float32",
    )
    args.summary.output(out)
