"""Whether the bytes of a file are those that were written: checksums, read once per file and remembered.

A torch archive holds a CRC of each of its records, which torch does not compare; a Hugging Face cache names its blobs
by their SHA-256; our own files hold the SHA-256 of their tensors. A file that was found right is known by path, inode,
size and times (mtime and ctime), in this process and in a small file of the user's cache, so that later starts read
nothing twice. A cache that others can write to, or that is damaged, is ignored.
"""

import hashlib
import json
import os
import re
import stat
import struct
import time
import warnings
import zipfile
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from ..console import progress
from ..files.atomic import atomic
from ..files.caches import own_cache
from .checkpoint import CheckpointError

_CHUNK = 1 << 20
_REMEMBERED = 256  # files, the latest ones
_SETTLED = 2.0  # seconds; a file changed later than that before it was read could change again within one tick
_LONGEST_PICKLE = 64 << 20  # of an archive: a model's names and shapes take a few hundred kB


class Identity(NamedTuple):
    """What tells a file, and a change of it, without reading it."""

    path: str
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


def identity(path: Path) -> Identity:
    real = os.path.realpath(path)
    state = os.stat(real)
    return Identity(real, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@dataclass(frozen=True)
class Facts:
    """What is known of a file with one identity.

    sha256: of all its bytes. archive: each record fits its CRC. tensors: SHA-256 over what `line_of` says of each
    tensor and its bytes, in the order of their names; of plain files that lie in that order, as ours do.
    """

    sha256: str | None = None
    archive: bool = False
    tensors: str | None = None


def line_of(name: str, dtype: str, shape: tuple) -> bytes:
    """What stands before a tensor's bytes in the checksum of our own files; dtype: as torch writes it."""
    return f"{name} {dtype} {shape}\n".encode()


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, from an earlier reading if the file has not changed since."""
    known = _facts(identity(path))
    return known.sha256 or _read(path, known, hashed=True).sha256


def require_intact_archive(path: Path) -> None:
    """Raises CheckpointError for a torch archive of which a record does not fit its CRC."""
    known = _facts(identity(path))
    if not known.archive:
        _read(path, known, hashed=False)


def tensors_checksum(path: Path) -> str | None:
    """The checksum of a plain file of ours; None where its tensors do not lie in the order of their names."""
    known = _facts(identity(path))
    return known.tensors or _read(path, known, hashed=False).tensors


def require_as_named(path: Path) -> None:
    """Raises CheckpointError for a blob of a Hugging Face cache whose bytes are not those it is named after."""
    blob = Path(os.path.realpath(path))
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name) and sha256(blob) != blob.name:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not {blob.name}; remove {blob} and download it again")


def _read(path: Path, known: Facts, *, hashed: bool) -> Facts:
    """Reads the whole file once for all that is not known yet."""
    before = identity(path)
    digest = hashlib.sha256() if hashed else None
    with open(before.path, "rb", buffering=0) as file:
        archived = file.read(4) == b"PK\x03\x04"
        records = _records(path, file) if archived else _tensors(file)
        of_tensors = None if archived or not records else hashlib.sha256()
        size = before.size if hashed else sum(record.size for record in records)
        with progress(size, "B", delay=2, leave=False, desc=f"checking {path.name}") as bar:
            _compare(path, file, records, digest, of_tensors, bar.update)
    if identity(path) != before:
        raise CheckpointError(f"{path} changed while it was read; start again")
    facts = Facts(
        digest.hexdigest() if digest else known.sha256,
        (archived and bool(records)) or known.archive,
        of_tensors.hexdigest() if of_tensors else known.tensors,
    )
    _remember(before, facts)
    return facts


# --- our own files --------------------------------------------------------------------------------------------------

_LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it
_DTYPES = {"F64": "torch.float64", "F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}


def _tensors(file) -> list["_Record"]:
    """The tensors of a plain file of ours, by name; [] of any other, or where they do not lie in that order."""
    file.seek(0)
    start = 8 + int.from_bytes(file.read(8), "little")
    if start > 8 + _LONGEST_HEADER:
        return []
    try:
        header = json.loads(file.read(start - 8))
        said = header.pop("__metadata__")
        if said["format"] != "esm_fast" or "packed" in said:
            return []
        found = []
        for name, entry in sorted(header.items()):
            begin, end = entry["data_offsets"]
            line = line_of(name, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
            found.append(_Record(start + begin, end - begin, -1, name, line))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):  # safetensors says what is wrong
        return []
    ends = [start, *(record.start + record.size for record in found)]
    return found if [record.start for record in found] == ends[:-1] else []


# --- archives -------------------------------------------------------------------------------------------------------


class _Record(NamedTuple):
    start: int
    size: int
    crc: int
    name: str
    line: bytes = b""  # of a tensor, see `line_of`


def _records(path: Path, file) -> list[_Record]:
    """Where the records of a torch archive lie, in this order, each checked to be stored as torch stores it."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        records = sorted(_Record(_start(file, entry), entry.file_size, entry.CRC, entry.filename) for entry in entries)
    except Exception as error:  # zipfile raises many types for damaged archives
        raise CheckpointError(f"{path} is damaged or incomplete ({error}); download or write it again") from None
    end = 0
    for record in records:
        if record.start < end:
            raise CheckpointError(f"{path} is damaged: two records share bytes; download or write it again")
        if record.name.endswith("/data.pkl") and record.size > _LONGEST_PICKLE:
            raise CheckpointError(f"{path} is no checkpoint: {record.size:,} bytes describe its tensors")
        end = record.start + record.size
    if len({record.name for record in records}) < len(records):
        raise CheckpointError(f"{path} is damaged: two records have one name; download or write it again")
    if records and not any(record.crc for record in records):
        warnings.warn(f"{path} was written without checksums: damage to it would not be seen", stacklevel=2)
        return [record._replace(crc=-1) for record in records]
    return records


def _start(file, entry: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin: where torch looks, which is after the names that stand before the record itself."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise ValueError(f"its record {entry.filename!r} is compressed, which torch's are not")
    file.seek(entry.header_offset)
    head = file.read(30)
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise ValueError(f"there is no record at {entry.header_offset}")
    name, extra = struct.unpack("<HH", head[26:30])
    if file.read(name).decode("utf-8" if entry.flag_bits & 0x800 else "cp437") != entry.orig_filename:
        raise ValueError(f"the record of {entry.filename!r} has another name")
    return entry.header_offset + 30 + name + extra


def _compare(path: Path, file, records: list[_Record], digest, of_tensors, on_bytes) -> None:
    """Reads a file from its beginning to its end, once, into the digests of all its bytes and of its tensors."""
    buffer, at = memoryview(bytearray(_CHUNK)), 0

    def take(size: int | None, *digests) -> None:
        nonlocal at
        while size is None or size > 0:
            got = file.readinto(buffer[: size and min(size, _CHUNK)])
            if not got:
                break
            piece, at = buffer[:got], at + got
            on_bytes(got)
            for each in digests:
                each.update(piece)
            size = size and size - got

    whole = [digest] if digest else []
    file.seek(0)
    for record in records:
        if digest:
            take(record.start - at, *whole)
        else:
            at = file.seek(record.start)
        if of_tensors:
            of_tensors.update(record.line)
            take(record.size, of_tensors, *whole)
        elif record.crc != -1:
            take(record.size, crc := _Crc(), *whole)
            if crc.value != record.crc:
                raise CheckpointError(
                    f"{path} is damaged: its record {record.name!r} does not match its checksum; "
                    "download or write it again"
                )
    if digest:
        take(None, *whole)


class _Crc:
    value = 0

    def update(self, piece) -> None:
        self.value = zlib.crc32(piece, self.value)


# --- what is remembered ---------------------------------------------------------------------------------------------

_known: dict[Identity, Facts] = {}


def _facts(of: Identity) -> Facts:
    if of not in _known and (stored := _stored().get(_key(of))) is not None:
        _known[of] = stored
    return _known.get(of, Facts())


def _remember(of: Identity, facts: Facts) -> None:
    _known[of] = facts
    latest = max(of.mtime_ns, of.ctime_ns) / 1e9
    if 0 <= latest < time.time() - _SETTLED:
        _store(_stored() | {_key(of): facts})


def _key(of: Identity) -> str:
    return hashlib.sha256(repr(tuple(of)).encode()).hexdigest()


def _file() -> Path | None:
    """Where the facts stand, in a folder that nobody else may write to."""
    folder = own_cache()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except (OSError, AttributeError):
        return None
    mine = state.st_uid == os.geteuid() and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder / "checked.json" if mine else None


def _stored() -> dict[str, Facts]:
    try:
        handle = os.open(_file(), os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            content = json.loads(file.read(_REMEMBERED * 512))
        return {key: _checked(Facts(**facts)) for key, facts in content.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _checked(facts: Facts) -> Facts:
    sums = [text for text in (facts.sha256, facts.tensors) if text is not None]
    if type(facts.archive) is not bool or not all(re.fullmatch("[0-9a-f]{64}", text) for text in sums):
        raise ValueError("damaged")
    return facts


def _store(facts: dict[str, Facts]) -> None:
    """Best effort: two processes at once may lose one's facts, which are then found again."""
    latest = dict(list(facts.items())[-_REMEMBERED:])
    file = _file()
    if file is None:
        return
    content = json.dumps({key: asdict(value) for key, value in latest.items()})
    with suppress(OSError):
        if file.is_symlink() or file.exists() and not file.is_file():
            file.unlink()  # nothing of ours: `atomic` would write to what a link or a pipe leads to
        with atomic(file, durable=False) as temporary:
            temporary.write_text(content)
