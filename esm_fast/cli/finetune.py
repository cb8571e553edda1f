"""esm-fast finetune: a model and a head for a property of proteins, from a table of examples."""

import argparse
import sys
from pathlib import Path

from ..console import progress
from ..train import environment
from .common import DEMO, InputError, is_random, require_device, set_threads, warn_random
from .numbers import above_0, positive, whole

NAME = "finetune"
ORDER = 42
HELP = "a predictor of a property, from a table of labelled proteins"
DESCRIPTION = """\
Trains a linear head on the last layer: for a number or a class of each protein, or of each residue.
The model under it stays as it is (frozen), is trained too (full), or gets low-rank adapters (lora,
which needs peft). It stops when the held-out loss has not fallen for a while, and keeps the best.
TABLE is comma- or tab-separated with the columns sequence and label, and perhaps id and split
(train, valid, test). Labels of residues: a letter each, ? for none; or numbers between spaces."""
EXAMPLES = """\
  esm-fast finetune stability.csv -o stability/ --task regression --model esm1b_t33_650M_UR50S
  esm-fast finetune ss3.tsv -o ss3/ --task classification --level residue --trained lora --model M

The model it writes is read by esm-fast embed and esm_fast.load, the whole predictor by
esm_fast.train.finetune.load_predictor.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("table", metavar="TABLE", help="the examples")
    add("-o", "--output", required=True, metavar="FOLDER", help="where the predictor goes")
    add("--task", required=True, choices=("regression", "classification"))
    add("--level", default="sequence", choices=("sequence", "residue"), help="what has a label (default: %(default)s)")
    add("--trained", default="frozen", choices=("frozen", "full", "lora"), help="beside the head (default: frozen)")
    add("--model", default=DEMO, metavar="NAME|PATH", help="as for embed (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda ... (default: %(default)s)")
    add("--epochs", type=positive, default=30, metavar="N", help="at most (default: %(default)s)")
    add("--patience", type=positive, default=3, metavar="N", help="epochs without progress (default: %(default)s)")
    add("--learning-rate", type=above_0, metavar="X", help="default: 1e-2 frozen, 2e-5 full, 5e-4 lora")
    add("--rank", type=positive, default=8, metavar="N", help="of the adapters (default: %(default)s)")
    add("--batch-tokens", type=positive, default=4096, metavar="N", help="in an update (default: %(default)s)")
    add("--seed", type=whole(0, 2**63 - 1), default=0, metavar="N", help="of the order of batches, and of adapters")
    add("--threads", type=positive, metavar="N", help="default: torch's")
    add("--force", action="store_true", help="replace a predictor that is there")


def run(args: argparse.Namespace) -> None:
    environment.prepare()
    import torch
    from tqdm import tqdm

    from ..inference.load import load
    from ..train.examples import ExamplesError, read_examples
    from ..train.finetune import Settings, finetune, written

    names = ("task", "level", "trained", "epochs", "patience", "learning_rate", "rank", "batch_tokens", "seed")
    settings = Settings(**{name: getattr(args, name) for name in names})
    examples = read_examples(args.table)
    if (there := written(args.output)) and not args.force:
        raise InputError(f"{there[0]} exists; choose another folder, or replace it with --force")
    set_threads(args.threads)
    require_device(args.device)
    if is_random(args.model):
        warn_random(args.model)
    torch.manual_seed(args.seed)
    esm, _ = load(args.model, device=args.device, dtype="float32", packed=False)
    with progress(settings.epochs, "epochs", unit_scale=False, disable=not sys.stderr.isatty()) as bar:

        def show(entry: dict) -> None:
            tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in entry.items()))
            bar.update()

        try:
            predictor, report = finetune(esm, examples, settings, show)
        except ExamplesError as error:
            raise InputError(f"{args.table}: {error}") from None
        except (FloatingPointError, ImportError) as error:
            raise InputError(str(error)) from None
    predictor.save(args.output, report | {"base": args.model})
    for split in ("valid", "test"):
        if split in report:
            print(f"{split:<9} {', '.join(f'{name} {value:.4g}' for name, value in report[split].items())}")
    print(f"best      epoch {report['best_epoch']} of {report['epochs']}")
    print(f"output    {Path(args.output)}")
