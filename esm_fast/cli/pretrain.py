"""esm-fast pretrain: trains a model by masked language modelling, as a recipe says."""

import argparse
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

from ..console import progress
from ..train import environment
from .common import InputError, set_threads
from .numbers import positive

NAME = "pretrain"
ORDER = 41
HELP = "pretrain a model from a recipe"
DESCRIPTION = """\
Pretrains a model by masked language modelling on a store of esm-fast prepare, as the recipe, a YAML
file, says. The same command again resumes from the newest whole checkpoint, bit for bit; on SIGTERM
or SIGUSR1 it saves and ends with exit code 75. The output folder holds log.jsonl, curves.png,
checkpoints, best.safetensors (the lowest held-out loss so far) and, at the end, model.safetensors;
esm-fast embed --model takes both."""
EXAMPLES = """\
  esm-fast pretrain examples/esm1b_t6_demo.yaml
  esm-fast pretrain recipe.yaml --fast-dev-run
  esm-fast pretrain cooler.yaml --fork run -o run_cooler
  torchrun --nproc-per-node 8 -m esm_fast.cli pretrain examples/esm1b_650M_h100.yaml

Recipes that ship: examples/*.yaml; every entry is explained in docs/pretraining.md.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="what to train, on what, and how")
    parser.add_argument("--store", metavar="STORE", help="in place of the recipe's")
    parser.add_argument("-o", "--output", metavar="DIR", help="in place of the recipe's")
    parser.add_argument(
        "--fork",
        metavar="RUN",
        help="begin where the newest checkpoint of that run's output stands, with this recipe's rate, precision, data",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument(
        "--fast-dev-run", action="store_true", help="three small steps, a validation and a save, in DIR/fast_dev_run"
    )


def run(args: argparse.Namespace) -> int:
    environment.prepare()
    from ..train.loop import Trainer
    from ..train.processes import joined
    from ..train.recipe import read_recipe
    from ..train.running import STOPPED, Stopped
    from ..train.sources import require_filled, sources_of
    from ..train.store import open_stores

    try:
        recipe = read_recipe(args.recipe)
    except ImportError as error:
        raise InputError(str(error)) from None
    recipe = replace(recipe, store=args.store or recipe.store, output=args.output or recipe.output)
    set_threads(args.threads)
    with joined() as processes:
        args.summary.heard = processes.first
        if args.fast_dev_run:
            if args.fork:
                raise InputError(
                    "--fast-dev-run makes its first steps, and a fork starts from others; try it without --fork"
                )
            require_filled(recipe, sources_of(recipe, open_stores(recipe.store)))  # which the trial's steps do not show
            recipe = _small(recipe, processes.world)
            if processes.first:
                _remove_earlier(Path(recipe.output))
            processes.wait()
        if recipe.plot:
            _require_matplotlib()
        trainer = Trainer(recipe, open_stores(recipe.store), processes, fork=args.fork)
        try:
            _train(trainer)
        except FloatingPointError as error:
            raise InputError(str(error)) from None
        except Stopped as stopped:
            args.summary.say(str(stopped), output=str(recipe.output), stopped=str(stopped))
            return STOPPED
        if processes.first:
            best = _perplexity(trainer.best)
            args.summary.say(f"held out  perplexity {best} at best", steps=recipe.steps, valid_loss=trainer.best)
            args.summary.say(f"dtype     {recipe.precision}", dtype=recipe.precision)
            args.summary.output(recipe.output)
    return 0


def _remove_earlier(output: Path) -> None:
    """The trial run before this one. What is no run of ours stays."""
    if not os.path.lexists(output):
        return
    if output.is_symlink() or not (output / "recipe.json").is_file():
        raise InputError(f"{output} is in the way of the trial run, and is none; move it, or choose another output")
    shutil.rmtree(output)


def _small(recipe, world: int):
    """The same recipe in a minute: what could break, breaks early."""
    batch = min(recipe.batch_tokens, 4096)
    return replace(
        recipe,
        output=str(Path(recipe.output) / "fast_dev_run"),
        steps=3,
        cooldown=0,
        step_tokens=2 * batch * world,
        batch_tokens=batch,
        valid_tokens=batch,
        log_every=1,
        valid_every=3,
        save_every=2,
    )


def _train(trainer) -> None:
    first, recipe = trainer.processes.first, trainer.recipe
    with progress(recipe.steps, "steps", unit_scale=False, disable=not first) as bar:

        def show(step: int, entry: dict) -> None:
            if step != bar.n + 1:  # resumed, or rolled back: the steps before took no time
                bar.initial = bar.n = step - 1
            if entry:
                bar.set_postfix(loss=f"{entry['loss']:.4f}", perplexity=_perplexity(trainer.best), refresh=False)
            bar.update()

        trainer.train(show)


def _perplexity(loss: float | None) -> str:
    return "unknown" if loss is None else f"{math.exp(loss):.3f}"


def _require_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise InputError("plot: true needs matplotlib: pip install 'esm_fast[train]', or set plot: false")
