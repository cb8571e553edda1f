"""What a run tells: a JSON line a log entry, a picture of the curves, TensorBoard where it is wanted."""

import json
import math
from pathlib import Path


class Log:
    """log.jsonl: {"step": ..., ...} a line. Continued after `step`: what a run that was cut off wrote later goes."""

    def __init__(self, folder: Path, step: int, tensorboard: bool = False):
        self.path = folder / "log.jsonl"
        self.file = self.path.open("a")
        self.file.truncate(_end_of(self.path, step))  # in place: a kill at this moment loses no entry either
        self.board = _board(folder, step) if tensorboard else None

    def add(self, **entry) -> None:
        # A loss that overflowed is none: JSON knows no NaN.
        entry = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in entry.items()}
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in entry.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(name, value, entry["step"])

    def last(self) -> dict:
        return next(reversed(read_log(self.path)), {})

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def read_log(path: Path) -> list[dict]:
    """The entries; a last line that was cut off is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _end_of(path: Path, step: int) -> int:
    """Where the entries up to a step end, in bytes."""
    end = 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        end += len(line)
    return end


def _board(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(f"tensorboard: true needs TensorBoard: pip install tensorboard ({error})") from None
    return SummaryWriter(folder / "tensorboard", purge_step=step + 1)


def plot(log: Path, picture: Path) -> None:
    """Draws loss, held-out perplexity, throughput and MFU over the steps. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure  # without pyplot: no display is asked for

    entries = read_log(log)
    panels = {"loss": "training loss, nats", "valid_perplexity": "held-out perplexity"}
    panels |= {"tokens_per_second": "tokens per second", "mfu": "model FLOPs utilisation"}
    series = {name: [(e["step"], e[name]) for e in entries if e.get(name) is not None] for name in panels}
    shown = [name for name in panels if series[name]]
    if not shown:
        return
    figure = Figure(figsize=(8, 2.4 * len(shown)), layout="constrained")
    for axes, name in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
        axes.plot(*zip(*series[name], strict=True))
        axes.set_ylabel(panels[name])
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    figure.savefig(picture)


def plot_epochs(entries: list[dict], picture: Path) -> None:
    """Draws the losses of a fine-tuning, and the score that progress is told by. Raises ImportError."""
    from matplotlib.figure import Figure

    scores = [name for name in entries[0] if name not in ("epoch", "train_loss", "valid_loss")]
    figure = Figure(figsize=(6, 2.4 * (1 + bool(scores))), layout="constrained")
    panels = [("train_loss", "valid_loss"), scores] if scores else [("train_loss", "valid_loss")]
    for axes, names in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for name in names:
            axes.plot([e["epoch"] for e in entries], [e[name] for e in entries], marker=".", label=name)
        axes.legend()
        axes.grid(alpha=0.3)
    axes.set_xlabel("epoch")
    figure.savefig(picture)
