"""The command `esm-fast`: one file a command, which imports what is slow only when it runs."""

import argparse
import functools
import os
import signal
import sys
from contextlib import contextmanager

from .. import __version__
from . import (
    contacts,
    convert,
    embed,
    export,
    extract,
    fill_mask,
    finetune,
    finish,
    info,
    kernels,
    map,
    prepare,
    pretrain,
    search,
    submit,
    variants,
    verify,
    warmup,
)
from .common import InputError

_COMMANDS = (
    embed,
    submit,
    finish,
    verify,
    export,
    search,
    map,
    extract,
    fill_mask,
    variants,
    contacts,
    convert,
    prepare,
    pretrain,
    finetune,
    info,
    kernels,
    warmup,
)
_EXAMPLES = """examples:
  esm-fast embed proteins.fasta.gz -o proteins.h5 --model esm1b_t33_650M_UR50S
  esm-fast fill-mask 'QERLKSIVRILE<mask>SLGYNIVAT' --model esm1b_t33_650M_UR50S
  esm-fast info

Each command has examples of its own: esm-fast embed --help.
Exit codes: 0 done, 1 an input or a model cannot be used, 2 wrong arguments, 3 some proteins have no
embedding (a data set names them), 75 stopped on a signal (the same command goes on).
"""

_Formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)


def main(argv: list[str] | None = None) -> int:
    """Runs a command line (default: sys.argv) and returns its exit code; argparse exits by itself with 2."""
    args = parser().parse_args(argv)
    try:
        with _termination_as_exit():
            code = args.run(args)
            sys.stdout.flush()
        return code or 0
    except (InputError, OSError, ValueError) as error:
        if isinstance(error, BrokenPipeError):  # whoever read our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        print(f"esm-fast {args.command}: error: {_one_line(error)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; importing it here would slow every start
            raise
        print(f"esm-fast {args.command}: error: the GPU's memory is full; ask for smaller batches", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="esm-fast",
        description="ESM-1b and ESM-1v protein embeddings without padding.",
        epilog=_EXAMPLES,
        formatter_class=_Formatter,
    )
    top.add_argument("--version", action="version", version=f"esm-fast {__version__}")
    commands = top.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for module in _COMMANDS:
        command = commands.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=f"examples:\n{module.EXAMPLES}",
            formatter_class=_Formatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return top


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _termination_as_exit():
    """SIGTERM, as a scheduler sends it, and SIGHUP, as a terminal that closes, unwind: temporary files go.

    A signal that is ignored (nohup) stays so.
    """

    def leave(number, _frame):
        raise SystemExit(128 + number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number])
