"""Headers to ids, and ids to names: safe as file names or HDF5 keys, and each given only once."""

import hashlib
from collections.abc import Callable

# '|' stays, though Windows refuses it: every UniProt header has it, and fair-esm's users look for such files.
_UNSAFE_IN_FILES = frozenset('/\\:*?"<>%')
_UNSAFE_IN_HDF5 = frozenset("/%")
LONGEST = 240  # bytes in UTF-8; Linux takes 255, and '.pt' or '_2' may follow


def identifier(header: str) -> str:
    """The first word of a header."""
    return (header.split(None, 1) or [header])[0]


def accession(header: str) -> str:
    """The accession of a UniProt header: P12345 of "sp|P12345|NAME_HUMAN ..." or "tr|..."; else the identifier."""
    word = identifier(header)
    parts = word.split("|")
    return parts[1] if len(parts) >= 3 and parts[0] in ("sp", "tr") and parts[1] else word


def file_name(text: str) -> str:
    """`text` as a file name, without an ending. Unsafe characters and a leading dot become %XX, as in a URL.

    Distinct texts get distinct names, and urllib.parse.unquote gives the text back, unless it is over LONGEST bytes
    long: then the name is its beginning and a hash of all of it.
    """
    return _safe(text, _UNSAFE_IN_FILES, hidden=text[:1] == ".")


def hdf5_key(text: str) -> str:
    """As `file_name`, for one level of an HDF5 file: only '/', control characters and the names '.' and '..' change."""
    return _safe(text, _UNSAFE_IN_HDF5, hidden=text in (".", ".."))


def _safe(text: str, unsafe: frozenset[str], hidden: bool) -> str:
    name = "".join(f"%{ord(c):02X}" if c in unsafe or c < " " or c == "\x7f" else c for c in text)
    if hidden:
        name = "%2E" + name[1:]
    data = name.encode("utf-8", "replace")
    if len(data) <= LONGEST:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
    return data[: LONGEST - 17].decode("utf-8", "ignore") + "~" + digest


class Names:
    """Gives each record a name of its own: the second P12345 is P12345_2, or what comes after it if that is taken."""

    def __init__(self, safe: Callable[[str], str]):
        self._safe = safe
        self._given: dict[str, int] = {}  # name -> the last number put behind it

    def is_new(self, text: str) -> bool:
        return self._safe(text) not in self._given

    def give(self, text: str) -> str:
        name = wanted = self._safe(text)
        while name in self._given:
            self._given[wanted] += 1
            name = f"{wanted}_{self._given[wanted]}"
        self._given[name] = 1
        return name
