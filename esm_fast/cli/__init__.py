"""The command `esm-fast`: one file a command, which imports what is slow only when it runs."""

import argparse
import functools
import importlib
import os
import pkgutil
import re
import signal
import sys
import threading
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from .. import __version__
from ..console import boundary
from ..console.streams import screens
from ..console.summary import Summary
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
    with screens():
        args = parser().parse_args(argv)
        args.summary = Summary(args.command, args.json, version=__version__)
        with _termination_as_exit():
            return boundary.run(f"esm-fast {args.command}", _told, args, as_flags)


def _told(args: argparse.Namespace) -> int:
    """Runs the command; what it said becomes one object with --json."""
    with args.summary.speaking():
        code = args.run(args) or 0
    args.summary.end(code)
    return code


class Command(NamedTuple):
    """A file here that is a command: NAME, ORDER (its place in the list) and HELP (a line) stand in it as literals.

    Beside these it has DESCRIPTION, EXAMPLES, add_arguments(parser) and run(args), whose result is the exit code. What
    it tells goes through args.summary (console/summary.py): --json, and the time and the size of what was written, are
    the same for all and stand in no command.
    """

    name: str
    order: int
    help: str
    file: str

    def module(self) -> ModuleType:
        return importlib.import_module(f".{self.file}", __name__)


def commands() -> list[Command]:
    """All commands, by their order; none is imported, for a list of them has to be quick."""
    found = (_command(info.module_finder.find_spec(info.name), info.name) for info in pkgutil.iter_modules(__path__))
    return sorted(filter(None, found), key=lambda command: command.order)


_LITERAL = re.compile(r'^(NAME|ORDER|HELP) = (?:"(.*)"|(\d+))$', re.MULTILINE)


def _command(spec: ModuleSpec, file: str) -> Command | None:
    if spec.origin.endswith(".py"):
        text = Path(spec.origin).read_text("utf-8")
        said = {name: text or int(number) for name, text, number in _LITERAL.findall(text)}
    else:  # where only bytecode was installed
        said = vars(importlib.import_module(f".{file}", __name__))
    return Command(said["NAME"], said["ORDER"], said["HELP"], file) if "NAME" in said else None


class _Parser(argparse.ArgumentParser):
    """Of a command, which is imported when its arguments are parsed."""

    def __init__(self, *, command: Command, **options):
        super().__init__(**options)
        self._command = command

    def fill(self) -> None:
        """Adds the command's arguments; importing it takes a while."""
        module = self._command.module()
        self.description, self.epilog = module.DESCRIPTION, f"examples:\n{module.EXAMPLES}"
        module.add_arguments(self)
        self.add_argument("--json", action="store_true", help="print one JSON object in place of the summary")
        self.set_defaults(run=module.run)

    def parse_known_args(self, args=None, namespace=None):
        self.fill()
        return super().parse_known_args(args, namespace)


def parser() -> argparse.ArgumentParser:
    """Of a command line: for one parse, in which only the command that is asked for is imported."""
    top = argparse.ArgumentParser(
        prog="esm-fast",
        description="The protein language models ESM-1b, ESM-1v and ESM-2 without padding.",
        epilog=_EXAMPLES,
        formatter_class=_Formatter,
    )
    top.add_argument("--version", action="version", version=f"esm-fast {__version__}")
    options = {"title": "commands", "dest": "command", "required": True, "metavar": "COMMAND"}
    listed = top.add_subparsers(**options, parser_class=_Parser)
    for command in commands():
        listed.add_parser(command.name, help=command.help, formatter_class=_Formatter, command=command)
    return top


@contextmanager
def _termination_as_exit():
    """SIGTERM, as a scheduler sends it, and SIGHUP, as a terminal that closes, unwind: temporary files go.

    A signal that is ignored (nohup) stays so. Where Python cannot pass on what a handler raises (a destructor, a
    callback) it prints it and carries on as if nothing had been asked: that signal, SIGINT too, is sent once more.
    """

    def leave(number, _frame):
        raise SystemExit(128 + number)

    def resend(lost):
        value = lost.exc_value
        number = signal.SIGINT if isinstance(value, KeyboardInterrupt) else codes.get(getattr(value, "code", None))
        if number is None:
            return hook(lost)
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()  # when the destructor is over

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    codes = {128 + number: number for number in numbers}
    before = {number: signal.signal(number, leave) for number in numbers}
    hook, sys.unraisablehook = sys.unraisablehook, resend
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number in numbers:
            signal.signal(number, before[number])
