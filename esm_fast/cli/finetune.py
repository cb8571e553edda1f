"""esm-fast finetune: a model and a head for a property of proteins, from a table of examples."""

import argparse
import sys
from pathlib import Path

from ..console import Stages
from ..train import environment
from .common import DEMO, InputError, is_random, require_device, set_threads, warn_random
from .numbers import above_0, layer_number, positive, real, whole

NAME = "finetune"
ORDER = 42
HELP = "a predictor of a property, from a table of labelled proteins"
DESCRIPTION = """\
Makes a predictor of a number or a class of each protein, or of each residue: a linear head on a layer
of a model. The model stays as it is (frozen: the head is solved in closed form), is trained too
(full), or gets low-rank adapters (lora, which needs peft); these begin with the solved head, stop
when the held-out loss has not fallen for a while, and keep the best.
TABLE is CSV, TSV, ;-separated or JSON lines (compressed too), Parquet, or FASTA with label=... in its
headers or with --labels. Columns are known by their usual names (sequence or seq; label, target or y; id; split)
or named by options. Splits are train, valid and test; without them a tenth is for validation, which
chooses, and a tenth for testing. Labels of residues: a letter each, ? for none; or numbers between
spaces."""
EXAMPLES = """\
  esm-fast finetune stability.csv -o stability/ --task regression --model esm1b_t33_650M_UR50S
  esm-fast finetune ss3.tsv -o ss3/ --task classification --level residue --trained lora --model M
  esm-fast finetune p.fasta --labels pairs.csv --id-column a b --pairs symmetric -o ppi/ --task classification
  esm-fast finetune p.fasta --labels p.csv --label-column Tm pI -o two/ --task regression --missing skip
  torchrun --nproc-per-node 8 -m esm_fast.cli finetune p.csv -o lora/ --task regression --trained lora
  esm-fast predict stability/ proteins.fasta -o table.csv

What is trained by steps is saved after each epoch and every ten minutes: the same command resumes it, bit
for bit, and on SIGTERM or SIGUSR1 it saves and ends with exit code 75.
The folder holds the model (esm-fast embed and esm_fast.load read it), the head, finetune.json with all
metrics, and predictions.csv of the held-out proteins. esm_fast.train.predictor.load_predictor reads
the whole.
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
    add("--threads", type=positive, metavar="N", help="default: torch's")
    add("--force", action="store_true", help="replace a predictor that is there, or what was begun")
    add("--alone", action="store_true", help="save head and adapters without the model, which stays where it is")
    _add_data(parser.add_argument_group("data"))
    _add_training(parser.add_argument_group("training"))


def _add_data(group) -> None:
    add = group.add_argument
    add("--labels", metavar="FILE", help="of a FASTA file: a table with ids, or FASTA of a letter a residue")
    add(
        "--pairs",
        default="",
        choices=("ordered", "symmetric"),
        help="a label is of two proteins: two columns of sequences, or of ids with --labels",
    )
    add("--id-column", nargs="+", metavar="NAME", help="of pairs two")
    add("--sequence-column", nargs="+", metavar="NAME", help="of pairs two")
    add("--label-column", nargs="+", metavar="NAME", help="several make a predictor of them all")
    add("--split-column", metavar="NAME")
    add(
        "--multi-label",
        nargs="?",
        const=";",
        default="",
        metavar="SEP",
        help="a protein has any number of classes, with SEP between them (default: ;)",
    )
    add("--clusters", metavar="TSV", help="where splits are drawn, whole clusters; as for prepare")
    add("--folds", type=whole(0), default=0, metavar="N", help="cross-validate too, a frozen model's head")
    add("--missing", default="error", choices=("error", "skip"), help="rows without a label (default: %(default)s)")
    add("--unknown", default="error", choices=("error", "x", "skip"), help="residues the model does not know")
    add("--overlength", default="error", choices=("error", "truncate", "window"), help="window: frozen models only")


def _add_training(group) -> None:
    add = group.add_argument
    add(
        "--head",
        default="solved",
        choices=("solved", "descent", "mlp", "attention"),
        help="linear, solved or descended to; or trained from the solved one: mlp, with a hidden layer beside; "
        "attention, each output with weights of its own over the residues (default: %(default)s)",
    )
    add("--hidden", type=positive, default=128, metavar="N", help="width of mlp's layer (default: %(default)s)")
    add(
        "--no-refit",
        dest="refit",
        action="store_false",
        help="keep the head solved on train alone, instead of on train and valid with the penalty that valid chose",
    )
    add("--layer", type=_layer, default=-1, metavar="N|best", help="the head's (default: -1, the last)")
    add("--class-weights", default="none", choices=("none", "balanced"), help="balanced: classes weigh alike")
    add("--epochs", type=positive, default=10, metavar="N", help="at most (default: %(default)s)")
    add("--patience", type=positive, default=3, metavar="N", help="epochs without progress (default: %(default)s)")
    add("--learning-rate", type=above_0, metavar="X", help="default: 2e-5 x 1280 / width full, 5e-4 lora")
    add("--head-learning-rate", type=above_0, metavar="X", help="default: 1e-3")
    add("--weight-decay", type=real(0), default=0.01, metavar="X", help="of matrices (default: %(default)s)")
    add("--rank", type=positive, default=8, metavar="N", help="of the adapters (default: %(default)s)")
    add("--batch-tokens", type=positive, default=4096, metavar="N", help="in an update (default: %(default)s)")
    add("--precision", default="float32", choices=("float32", "bfloat16"), help="of the model (default: %(default)s)")
    add("--recompute", action="store_true", help="compute layers again in the backward pass, to save memory")
    add(
        "--seed",
        type=whole(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="of splits, of the order of batches, and of adapters",
    )


def _layer(text: str) -> int | str:
    return text if text == "best" else layer_number(text)


def one_or_two(names: list[str] | None) -> str | tuple[str, ...] | None:
    """A column, or those of a pair, as `Columns` takes them."""
    return tuple(names) if names and len(names) > 1 else names and names[0]


_FACTS = ("counts", "warnings", "valid", "test", "folds", "layer", "best_epoch", "epochs", "refit")


def run(args: argparse.Namespace) -> int:
    environment.prepare()
    import torch

    from ..train.begun import BegunError
    from ..train.examples import Columns, ExamplesError, read_examples
    from ..train.finetune import Settings
    from ..train.prepare import read_clusters
    from ..train.processes import joined
    from ..train.running import STOPPED, BusyError, Stopped

    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    if args.alone and args.trained == "full":
        raise InputError("--alone leaves the model out, and --trained full trains all of it")
    label = tuple(args.label_column) if args.label_column else None
    columns = Columns(one_or_two(args.id_column), one_or_two(args.sequence_column), label, args.split_column)
    set_threads(args.threads)
    if is_random(args.model):
        warn_random(args.model)
    require_device(args.device)
    torch.manual_seed(args.seed)
    try:
        examples = read_examples(args.table, columns, labels=args.labels, pairs=bool(args.pairs))
        clusters = read_clusters(args.clusters) if args.clusters else None
        with joined() as processes:
            args.summary.heard = processes.first
            _finetune(args, settings, examples, clusters, processes)
    except Stopped as stopped:
        args.summary.say(str(stopped), stopped=str(stopped))
        return STOPPED
    except ExamplesError as error:
        text = str(error)
        raise InputError(text if args.table in text or str(args.labels) in text else f"{args.table}: {text}") from None
    except (FloatingPointError, ImportError, BegunError, BusyError) as error:
        raise InputError(str(error)) from None
    return 0


def _finetune(args: argparse.Namespace, settings, examples, clusters, processes) -> None:
    """Trains, with the output folder to itself, and writes what there is to keep."""
    from ..inference.load import load
    from ..train.predictor import base_of, written
    from ..train.running import asked_to_stop, only_run

    there = written(args.output)
    if there and not args.force:
        raise InputError(f"{there[0]} exists; choose another folder, or replace it with --force")
    device = str(processes.device) if processes.world > 1 and args.device == "auto" else args.device
    with only_run(Path(args.output), processes), asked_to_stop() as asked:
        esm, _ = load(args.model, device=device, dtype="float32", packed=False)
        begun = _begun(args, settings, examples, esm, processes, asked) if settings.descends else None
        found = _train(esm, examples, settings, clusters, begun, processes)
        if not processes.first:
            return
        report = found.report | {"base": args.model}
        base = base_of(args.model) if args.alone else None
        found.predictor.save(args.output, report, base=base)
        _write_predictions(found, Path(args.output) / "predictions.csv")
        if begun is not None:
            begun.remove()
            _draw(report, Path(args.output) / "curves.png")
    args.summary.say(*_lines(found.report), f"dtype     {args.precision}", dtype=args.precision, model=args.model)
    args.summary.output(args.output, **{name: found.report[name] for name in _FACTS if name in found.report})


def _begun(args: argparse.Namespace, settings, examples, esm, processes, asked):
    """Where the training is kept; what another training left goes with --force."""
    from dataclasses import asdict

    from .. import weights
    from ..files.checksums import digest_of
    from ..train.begun import NAME as FILE
    from ..train.begun import Begun, BegunError

    rows = [[e.name, e.sequence, dict(e.labels), e.split] + [e.partner] * bool(e.partner) for e in examples]
    tensors = {name: tensor.cpu() for name, tensor in esm.state_dict().items()}
    said = {name: value for name, value in asdict(settings).items() if name != "pairs" or value}  # as it once was
    identity = {"settings": said, "examples": digest_of(rows), "model": weights.checksum(tensors)}
    begun = Begun(Path(args.output) / FILE, identity, asked, processes.first)
    if args.force:
        try:
            begun.load()
        except BegunError:
            processes.wait()
            begun.remove()
        processes.wait()
    return begun


def _train(esm, examples, settings, clusters, begun, processes):
    from tqdm import tqdm

    from ..train.finetune import finetune

    with Stages(disable=not processes.first) as bar:

        def show(entry: dict) -> None:
            if processes.first:
                tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in entry.items()))

        more = dict(on_batch=bar.update, on_stage=bar.begin, clusters=clusters, begun=begun, processes=processes)
        return finetune(esm, examples, settings, show, **more)


def _draw(report: dict, picture: Path) -> None:
    """The losses of the epochs; without matplotlib they are in finetune.json alone."""
    from ..train.report import plot_epochs

    if len(report.get("curve", ())) > 1:
        try:
            plot_epochs(report["curve"], picture)
        except ImportError as error:
            print(f"warning: no curves.png: {error}", file=sys.stderr)


def _lines(report: dict) -> list[str]:
    counts = report["counts"]
    said = [f"{count:,} {name}" for name, count in counts.items() if count or name in ("train", "valid", "test")]
    lines = [f"warning: {text}" for text in report["warnings"]] + [f"examples  {', '.join(said)}"]
    for split in ("valid", "test", "folds"):
        if split in report:
            lines.append(f"{split:<9} {', '.join(_shown(report[split]))}")
    if "penalties" in report:
        parts = "train and valid" if report["refit"] else "train"
        lines.append(f"head      solved on layer {report['layer']}, of {parts}")
    if report["epochs"]:
        lines.append(f"best      epoch {report['best_epoch']} of {report['epochs']}")
    return lines


def _shown(scores: dict) -> list[str]:
    """name value (low to high), without lists of counts."""
    found = []
    for name, value in scores.items():
        if isinstance(value, list):
            continue
        interval = scores.get(f"{name}_interval")
        found.append(f"{name} {value:.4g}" + (f" ({interval[0]:.3g} to {interval[1]:.3g})" if interval else ""))
    return found


def _write_predictions(found, path: Path) -> None:
    """The held-out proteins: what is predicted, beside split, fold and the labels that were given."""
    from ..files.atomic import atomic
    from .predictions import ID_COLUMNS, table

    targets = found.predictor.targets
    several = len(targets.columns) > 1 and not targets.separator
    names = [f"label_{column.name}" for column in targets.columns] if several else ["given"]
    with (
        atomic(path, durable=False) as temporary,
        table(
            temporary, path.name, targets, [*names, "split", "fold"], ids=ID_COLUMNS[bool(found.predictor.pairs)]
        ) as add,
    ):
        for one in found.held_out:
            split = "" if one.fold else one.example.split
            given = [[*_given(targets, row), split, one.fold] for row in one.wanted]
            add(one.example.names, one.ids if targets.level == "residue" else None, one.outputs, given)


def _given(targets, row) -> list[str]:
    from ..train.sets import label_of

    if targets.separator:
        there = [c.name for c, value in zip(targets.columns, row.tolist(), strict=True) if value]
        return [label_of(there, targets.separator)]
    cells = []
    for column, value in zip(targets.columns, row.tolist(), strict=True):
        if value != value:
            cells.append("")
        else:
            cells.append(column.classes[int(value)] if column.classes else f"{value * column.spread + column.mean:.9g}")
    return cells
