"""The command `esm-fast`: one file a command, which imports what is slow only when it runs."""

import argparse
import functools
import importlib
import pkgutil
import signal
import sys
from contextlib import contextmanager
from types import ModuleType

from .. import __version__
from ..console import boundary
from ..console.streams import screens
from .common import as_flags

_EXAMPLES = """examples:
  esm-fast embed proteins.fasta.gz -o proteins.h5 --model esm1b_t33_650M_UR50S
  esm-fast fill-mask 'QERLKSIVRILE<mask>SLGYNIVAT' --model esm1b_t33_650M_UR50S
  esm-fast info

Each command has examples of its own: esm-fast embed --help.
Exit codes: 0 done, 1 an input or a model cannot be used, 2 wrong arguments, 3 some proteins have no
embedding (a data set names them), 70 an error of esm_fast itself, to be reported, 75 stopped on a
signal (the same command resumes).
"""

_Formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)


def main(argv: list[str] | None = None) -> int:
    """Runs a command line (default: sys.argv) and returns its exit code; argparse exits by itself with 2."""
    argv = sys.argv[1:] if argv is None else argv
    with screens():
        args = parser(argv[0] if argv else None).parse_args(argv)
        with _termination_as_exit():
            return boundary.run(f"esm-fast {args.command}", args.run, args, as_flags)


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
        description="The protein language models ESM-1b, ESM-1v and ESM-2 without padding.",
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
