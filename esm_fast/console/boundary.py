"""The one place where what a command raises becomes what its user reads: a line with what was wrong, and what to do.

An error is expected where a line of ours raised it on purpose, for the user; where the system says it of a file; where
memory is full; or where a library says of a file that it cannot be read. Anything else is an error of ours: it stays a
traceback, with a line that asks for a report.
"""

import errno
import os
import platform
import re
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from dis import opmap
from pathlib import Path

from .streams import OUTPUT, screens

FAILED, BUG, INTERRUPTED, CLOSED = 1, 70, 128 + signal.SIGINT, 128 + signal.SIGPIPE  # exit codes
_PACKAGE = Path(__file__).resolve().parents[1]

# What to do where the system's own words do not tell it.
_CURES = {
    errno.EACCES: "give yourself the right to it (chmod, chown), or choose another",
    errno.EPERM: "it does not belong to you, or its file system does not allow it; choose another",
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some of your quota, or choose another disk",
    errno.EROFS: "choose another disk",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or choose another disk",
    errno.EMFILE: "raise the limit of open files: ulimit -n 4096",
    errno.ENFILE: "the machine has too many open files; try again later",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "its links lead in a circle; give the file itself",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EIO: "the disk or the file cannot be read or written; try a copy of it on another disk",
    errno.ESTALE: "the network file system lost it; try again",
}
_MEMORY_WORDS = (
    *("allocate memory", "not enough memory", "bad_alloc", "out of memory", "failed to map segment"),
    *("start new thread", "Storage size calculation overflowed", "unable to allocate"),
)
# What the extension says of environment variables.
_OF_ENVIRONMENT = re.compile(r"\bESM_FAST_[A-Z]|^there is no instruction set ")
# Of libraries that read files: what they raise for one that is damaged, or not theirs.
_UNREADABLE = {
    ("safetensors", "SafetensorError"): "safetensors",
    ("zipfile", "BadZipFile"): "zip",
    ("zlib", "error"): "zlib",
    ("lzma", "LZMAError"): "xz",
    ("gzip", "BadGzipFile"): "gzip",
    ("_csv", "Error"): "CSV",
    ("csv", "Error"): "CSV",
    ("json.decoder", "JSONDecodeError"): "JSON",
    ("pyarrow.lib", "ArrowInvalid"): "Parquet",
    ("pyarrow.lib", "ArrowException"): "Parquet",
    ("pickle", "UnpicklingError"): "torch's format",
    ("yaml.error", "YAMLError"): "YAML",
    ("yaml.error", "MarkedYAMLError"): "YAML",
    ("builtins", "UnicodeDecodeError"): "UTF-8",
    ("builtins", "EOFError"): "whole",
}


def run(
    name: str, command: Callable[[Namespace], int | None], args: Namespace, words: Callable[[str], str] = str
) -> int:
    """Runs a command and returns its exit code, whatever it raises but SystemExit.

    name: as messages begin. words: puts a message into the command's words.
    """
    with screens():
        try:
            code = command(args)
            sys.stdout.flush()
            return code or 0
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            return _tell(name, error, args, words)


def _tell(name: str, error: Exception, args: Namespace, words: Callable[[str], str]) -> int:
    if isinstance(error, BrokenPipeError) and error.filename == OUTPUT:
        return CLOSED  # whoever read our output has seen enough
    message = expected(error, args)
    if message is not None:
        error.__traceback__ = error.__context__ = None  # and with it what fills the memory
        print(f"{name}: error: {' '.join(words(message).split())}", file=sys.stderr)
        return FAILED
    traceback.print_exception(error)
    print(
        f"{name}: this is an error of esm_fast itself, not of what you gave it; please report it with the lines above, "
        f"the command, and what `esm-fast info` prints ({platform.system()}, Python {platform.python_version()})",
        file=sys.stderr,
    )
    return BUG


def expected(error: BaseException, args: Namespace = Namespace()) -> str | None:  # noqa: B008, never changed
    """The message for an error of a kind that users cause or can mend; None for an error of ours."""
    for tell in (_memory, _system, _name, _on_purpose, _missing_package, _unreadable):
        if (message := tell(error, args)) is not None:
            return message
    return None


def _memory(error: BaseException, args: Namespace) -> str | None:
    """Libraries say in many ways that memory is full."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's; importing it here would slow every start
        return f"the GPU's memory is full; {_smaller(args)}"
    if type(error).__name__ == "NotEnoughMemory":  # ours, which says what does not fit
        return f"{error}; {_smaller(args)}, or take a machine with more"
    said = str(error).lower()
    by_words = isinstance(error, (RuntimeError, ImportError, OSError)) and any(w.lower() in said for w in _MEMORY_WORDS)
    by_number = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or by_number or by_words:
        return f"there is not enough memory; {_smaller(args)}, or raise the limit (ulimit -v, the memory of the job)"
    return None


def _smaller(args: Namespace) -> str:
    """What of a command's arguments makes it take less memory."""
    asked = {
        "batch_tokens": "smaller batches (--batch-tokens N)",
        "toks_per_batch": "smaller batches (--toks_per_batch N)",
        "layers": "fewer layers",
        "k": "fewer neighbours (-k N)",
        "max_record": "a lower --max-record",
        "threads": "fewer threads (--threads N)",
    }
    found = [words for name, words in asked.items() if hasattr(args, name)]
    return f"ask for {' or '.join(found)}" if found else "close other programs, or take a machine with more"


def _system(error: BaseException, args: Namespace) -> str | None:
    if not isinstance(error, OSError):
        return None
    if error.errno is None or not error.strerror:
        return str(error) if type(error).__module__.startswith("esm_fast") or _is_raised_by_us(error) else None
    of_reading = error.errno in (errno.EIO, errno.ESTALE)  # of what is written, the writer tells the name
    name = error.filename if error.filename is not None or not of_reading else _inputs(args)
    where = f"{os.fsdecode(name)}: " if isinstance(name, (str, bytes, os.PathLike)) and name else ""
    cure = _CURES.get(error.errno)
    return where + error.strerror + (f"; {cure}" if cure else "")


def _name(error: BaseException, args: Namespace) -> str | None:
    """What Python and libraries say of names that no file has, or that they cannot be told."""
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return "the name of a file holds a NUL character, which no name has; look at the names that were given"
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        for text in _texts(args):
            if any("\udc80" <= character <= "\udcff" for character in text):
                return f"{text}: the name is not UTF-8, as a library that writes or reads it needs; choose another"
    return None


def _on_purpose(error: BaseException, args: Namespace) -> str | None:
    """The message of an error that a line of ours raised. A library's ValueError is none: it is not for users."""
    if isinstance(error, (ValueError, RuntimeError)) and _OF_ENVIRONMENT.search(str(error)):
        return str(error)
    if isinstance(error, (AssertionError, NotImplementedError, RecursionError)) or not _is_raised_by_us(error):
        return None
    kinds = (ValueError, LookupError, ArithmeticError, ImportError)
    if not isinstance(error, kinds) and type(error).__module__.partition(".")[0] != "esm_fast":
        return None
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error) or type(error).__name__


def _is_raised_by_us(error: BaseException) -> bool:
    """Whether it began at a `raise` in this package, and not in a call to a library."""
    last = error.__traceback__
    if last is None:
        return False
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    place = Path(code.co_filename)
    ours = place.is_relative_to(_PACKAGE) or place.is_relative_to(_PACKAGE.parent / "kernels")
    return ours and code.co_code[last.tb_lasti] == opmap["RAISE_VARARGS"]


def _missing_package(error: BaseException, args: Namespace) -> str | None:
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("esm_fast"):
        return (
            f"this needs the package {error.name}, which is not installed: pip install {error.name.partition('.')[0]}"
        )
    return None


def _unreadable(error: BaseException, args: Namespace) -> str | None:
    kinds = [_UNREADABLE.get((_module(kind), kind.__name__)) for kind in type(error).__mro__]
    if (form := next(filter(None, kinds), None)) is None:
        return None
    where = _inputs(args) or "a file"
    return f"{where} cannot be read, it is not {form} ({error}); look at it, and download or write it again"


def _module(kind: type) -> str:
    """Without its private parts, which move from version to version."""
    return kind.__module__.partition("._")[0]


def _inputs(args: Namespace) -> str:
    """The files and folders among the arguments but the output: those that an error without a name can be about."""
    given = Namespace(**{name: value for name, value in vars(args).items() if name != "output"})
    return ", ".join(dict.fromkeys(text for text in _texts(given) if text and Path(text).exists()))


def _texts(args: Namespace) -> Iterator[str]:
    """Each text among the arguments."""
    for value in vars(args).values():
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, (str, os.PathLike)):
                yield os.fsdecode(text)
