"""esm-fast completion: what a shell needs to complete commands, options, choices and files; read from the parsers."""

import argparse
from importlib.util import find_spec

from .common import InputError

NAME = "completion"
ORDER = 55
HELP = "completion of commands and options, for bash, zsh or tcsh"
DESCRIPTION = """\
Prints what makes a shell complete esm-fast's commands, their options, choices and files. It is made of
the commands themselves (by shtab), so after an update print it again."""
EXAMPLES = """\
  esm-fast completion bash > ~/.local/share/bash-completion/completions/esm-fast
  esm-fast completion zsh > ~/.zsh/_esm-fast      # a folder of $fpath
  eval "$(esm-fast completion bash)"              # in this shell only
"""
_SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=_SHELLS, help="whose completion")


def run(args: argparse.Namespace) -> None:
    if find_spec("shtab") is None:
        raise InputError("completion needs shtab: pip install 'esm_fast[completion]'")
    import shtab

    from . import parser

    script = shtab.complete(_with_files(parser(), shtab.FILE), shell=args.shell)
    args.summary.say(script, shell=args.shell, script=script)


def _with_files(parser: argparse.ArgumentParser, file: dict) -> argparse.ArgumentParser:
    """Whatever is text of no fixed choice may be a file: all that is neither a number nor a flag."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                command.fill()
                _with_files(command, file)
        elif action.type is None and action.choices is None and action.nargs != 0:
            action.complete = file
    return parser
