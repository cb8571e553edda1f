"""What this machine's own kernels proved here: the verdicts of `esm-fast qualify`, and the choices that follow.

A verdict is of one op, type, head size and direction on one backend, never of a batch size: a protein's bits must not
depend on its batch. A file holds those of one machine: the device, its driver, the versions and the kernels' sources
are its key, so nothing stale or foreign is believed. It is read when a choice is first made, never written then.

A data set and a training run keep the choices they began with (`current`), and are resumed with them (`held`), or
their bits would change with the next verdict.
"""

import functools
import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import filelock
import torch

from .. import _C, __version__
from ..files.caches import own_cache
from ..files.checked_json import DamagedError, read_json, write_json
from ..files.checksums import digest_of
from ..files.cpuinfo import first_processor

OFF = "off"  # ESM_FAST_VERDICTS=off ignores all verdicts; another value is the folder they lie in
PROVEN, TRYING = "proven", "trying"  # the other outcomes: wrong, irreproducible, batch-dependent, crashed, hung
MARGIN = 0.95  # of the time of the order's choice, in every case, is what another one may take at most to be preferred
_FORMAT = "esm_fast verdicts 1"
_PATIENCE = 60  # seconds to wait for another writer, which holds the file for milliseconds
_LAYER = ("pre_ln_attention", "gelu_ffn")  # the halves of a layer, by which types are compared


class Key(NamedTuple):
    """What a verdict is of. dtype: of the weights, as "bfloat16"; head_dim: 0 for ops without attention."""

    op: str
    dtype: str
    head_dim: int
    grad: bool

    def __str__(self) -> str:
        return f"{self.op}/{self.dtype}/{self.head_dim}/{'grad' if self.grad else 'forward'}"

    @staticmethod
    def parse(text: str) -> "Key":
        op, dtype, head_dim, grad = text.split("/")
        return Key(op, dtype, int(head_dim), {"grad": True, "forward": False}[grad])


def _key_of(op_name: str, request) -> str:
    """A request's key, as files hold it."""
    return _key_text(op_name, request.dtype, request.head_dim, request.grad)


@functools.cache  # every call of an op asks for it
def _key_text(op_name: str, dtype: torch.dtype, head_dim: int | None, grad: bool) -> str:
    return str(Key(op_name, str(dtype).removeprefix("torch."), head_dim or 0, grad))


def folder() -> Path | None:
    """Where verdicts lie; None where they are switched off, and for a user without a home."""
    named = os.environ.get("ESM_FAST_VERDICTS")
    if named == OFF:
        return None
    if named:
        return Path(named)
    own = own_cache()
    return None if own is None else own / "verdicts"


@functools.cache
def sources() -> str:
    """SHA-256 of everything the kernels are made of, as it is installed."""
    roots = find_spec("esm_fast.kernels").submodule_search_locations  # found by name, as the registry finds backends
    files = [path for root in roots for path in Path(root).rglob("*") if path.suffix in (".py", ".zip")]
    digest = hashlib.sha256(Path(_C.__file__).read_bytes())
    for path in sorted([*files, *Path(__file__).parent.glob("*.py")], key=lambda path: (path.parent.name, path.name)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def identity(device: str, level: str = "") -> dict:
    """All that verdicts on a device depend on. device: "cpu", "cuda" or "cuda:1"."""
    found = {"format": _FORMAT, "esm_fast": __version__, "torch": torch.__version__, "triton": _installed("triton")}
    found |= {"sources": sources(), "device": device.partition(":")[0]}
    if found["device"] == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return found | {
            "name": gpu.name,
            "arch": f"{gpu.major}.{gpu.minor}",
            "processors": gpu.multi_processor_count,
            "driver": str(torch._C._cuda_getDriverVersion()),
            "cuda": torch.version.cuda,
        }
    return found | {"name": _cpu_name(), "level": level or _C.isa(), "python": platform.machine()}


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    return first_processor().get("model name") or platform.processor() or platform.machine()


def path_of(machine: dict) -> Path | None:
    where = folder()
    return None if where is None else where / f"{digest_of(machine)[:32]}.json"


def read(machine: dict) -> dict[str, dict]:
    """Key -> {"winner", "default", "seconds", "backends": {backend: [outcome, detail]}}. Empty where there is none to
    believe: one that is damaged or of another machine is ignored with a word on standard error.

    seconds: that the winner took for all bench cases of the op; 0 where nothing was timed.
    """
    path = path_of(machine)
    if path is None or not path.exists():
        return {}
    try:
        content = read_json(path)
        if content["machine"] != machine:
            raise DamagedError(f"{path} is of another machine")
        return {str(Key.parse(key)): _entry(entry) for key, entry in content["verdicts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"warning: the verdicts of {path} are ignored ({error}); esm-fast qualify renews them", file=sys.stderr)
        return {}


def _entry(entry: dict) -> dict:
    backends = {str(name): (str(outcome), str(detail)) for name, (outcome, detail) in entry["backends"].items()}
    seconds = float(entry.get("seconds", 0.0))
    return {"winner": entry["winner"], "default": entry["default"], "seconds": seconds, "backends": backends}


def update(machine: dict, entries: dict[str, dict]) -> Path:
    """Puts entries among those that are kept; others stay, also what another process writes at the same time.

    Raises OSError. The file is whole or as it was; of two writers of one entry the last one's is there.
    """
    path = path_of(machine)
    if path is None:
        raise OSError("verdicts are switched off by ESM_FAST_VERDICTS=off")
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock", timeout=_PATIENCE):
        write_json(path, {"machine": machine, "verdicts": read(machine) | entries})
    forget()
    return path


# ---- choices

_held: dict[str, str] | None = None


@functools.lru_cache(maxsize=64)
def _table(device: str, level: str, name: str | None) -> dict[str, dict]:
    where = folder()
    if where is None or not where.is_dir():  # the sources need not be read
        return {}
    return read(identity(device, level))


def forget() -> None:
    """Reads the file again at the next choice."""
    _table.cache_clear()


def table(request) -> dict[str, dict]:
    return _table(request.device, request.level, request.name)


def preferred(op_name: str, request) -> str | None:
    """The backend that is to run a request: of the choices that are held, or the winner here; None for the order."""
    key = _key_of(op_name, request)
    if _held is not None:
        return _held.get(key)
    entry = table(request).get(key)
    return entry["winner"] if entry and entry["winner"] != entry["default"] else None


def layer_seconds(request, dtype: str, other: str) -> tuple[float, float] | None:
    """What the halves of a layer take in two types where both were timed here; None where one was not."""
    found = table(request)
    keys = [Key.parse(text) for text in found]
    halves = {(key.op, key.head_dim) for key in keys if key.op in _LAYER and not key.grad}
    keys = [[str(Key(op, of, dim, False)) for of in (dtype, other)] for op, dim in halves]
    pairs = [[found[key]["seconds"] for key in pair] for pair in keys if found.keys() >= set(pair)]
    pairs = [pair for pair in pairs if all(pair)]
    return tuple(map(sum, zip(*pairs, strict=True))) if pairs else None


def said(op_name: str, request, backend: str) -> str | None:
    """What the verdict on a backend says, for `explain`; None where there is none."""
    entry = table(request).get(_key_of(op_name, request))
    if entry is None or backend not in entry["backends"]:
        return None
    outcome, detail = entry["backends"][backend]
    if outcome == TRYING:
        return "did not return when it was last tried here"
    return f"{outcome} here: {detail}" if outcome != PROVEN else detail


def current(request) -> str:
    """The choices on a device that differ from the order's, as plans and checkpoints keep them; "" for none."""
    if _held is not None:
        return _text(_held)
    return changed(table(request))


def changed(entries: dict[str, dict], *, but: str = "") -> str:
    """The choices of entries that differ from the order's, without those of one op."""
    others = {key: entry for key, entry in entries.items() if Key.parse(key).op != but}
    return _text({key: entry["winner"] for key, entry in others.items() if entry["winner"] != entry["default"]})


def _text(choices: dict[str, str]) -> str:
    return " ".join(f"{key}={backend}" for key, backend in sorted(choices.items()))


def _parsed(text: str) -> dict[str, str]:
    """Raises ValueError."""
    pairs = [part.partition("=")[::2] for part in text.split()]
    try:
        return {str(Key.parse(key)): backend for key, backend in pairs}
    except (ValueError, KeyError):
        raise ValueError(f"{text[:80]!r} is no choice of kernels") from None


def keys_of(choices: str) -> list[Key]:
    """What choices are of. Raises ValueError."""
    return [Key.parse(key) for key in _parsed(choices)]


def holds() -> bool:
    return _held is not None


@contextmanager
def held(choices: str) -> Iterator[None]:
    """Within, in every thread (autograd has its own), ops run by these choices and no verdict is asked."""
    global _held
    before, _held = _held, _parsed(choices)
    try:
        yield
    finally:
        _held = before
