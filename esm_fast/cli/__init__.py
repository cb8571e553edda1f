"""The command `esm-fast`: one file a command, which imports what is slow only when it runs."""

import argparse
import functools
import importlib
import os
import pkgutil
import signal
import sys
from contextlib import contextmanager
from types import ModuleType

from .. import __version__
from .common import InputError, as_flags

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
    argv = sys.argv[1:] if argv is None else argv
    args = parser(argv[0] if argv else None).parse_args(argv)
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
    except (MemoryError, RuntimeError, ImportError) as error:
        if (what := _memory(error)) is None:
            raise
        print(f"esm-fast {args.command}: error: {what}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def commands(name: str | None = None) -> list[ModuleType]:
    """The modules here that are a command, by their ORDER; or only the one of this name, if there is one.

    A command is a file: NAME, ORDER (its place in the list), HELP (a line), DESCRIPTION, EXAMPLES,
    add_arguments(parser) and run(args), whose result is the exit code.
    """
    files = {found.name.replace("_", "-"): found.name for found in pkgutil.iter_modules(__path__)}
    chosen = [files[name]] if name in files else [file for file in files.values() if file != "__main__"]
    modules = [importlib.import_module(f".{file}", __name__) for file in chosen]
    found = [module for module in modules if hasattr(module, "NAME")]
    return sorted(found, key=lambda module: getattr(module, "ORDER", 99)) or commands()


def parser(name: str | None = None) -> argparse.ArgumentParser:
    """Of all commands, or of one, which starts faster."""
    top = argparse.ArgumentParser(
        prog="esm-fast",
        description="ESM-1b and ESM-1v protein embeddings without padding.",
        epilog=_EXAMPLES,
        formatter_class=_Formatter,
    )
    top.add_argument("--version", action="version", version=f"esm-fast {__version__}")
    listed = top.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for module in commands(name):
        command = listed.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=f"examples:\n{module.EXAMPLES}",
            formatter_class=_Formatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return top


def _memory(error: Exception) -> str | None:
    """What to do where memory is full, of which libraries say so in many ways; None for another error."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's; importing it here would slow every start
        return "the GPU's memory is full; ask for smaller batches: --batch-tokens N"
    words = ("allocate memory", "not enough memory", "bad_alloc", "start new thread", "failed to map segment")
    if isinstance(error, MemoryError) or any(word in str(error) for word in words):
        return (
            "there is not enough memory; ask for smaller batches (--batch-tokens N), fewer layers or threads, or raise "
            "the limit (ulimit -v, the memory of the job)"
        )
    return None


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(as_flags(str(error)).split()) or type(error).__name__


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
