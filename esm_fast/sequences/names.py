"""Headers to ids, and ids to names: safe as file names or HDF5 keys, and each given only once."""

import hashlib

import numpy as np

from .seen import Seen, keys_of_texts

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


class Ids:
    """Gives each record an id of its own: the second P12345 is P12345_2, or what comes after it if that is taken."""

    def __init__(self):
        self._seen = Seen()
        self._given: dict[str, int] = {}  # of ids seen twice, the last number put behind one

    def give(self, wanted: list[str], *, rename: bool) -> list[str | None]:
        """The ids of the next records; without `rename`, None for those whose id was there before."""
        keys = keys_of_texts(wanted)
        again = self._again(wanted, keys)
        free = self._free([text for text, is_old in zip(wanted, again, strict=True) if is_old]) if rename else set()
        fresh: dict[str, None] = {}
        given: list[str | None] = []
        for text, is_old in zip(wanted, again, strict=True):
            name: str | None = text
            if is_old or text in fresh:
                name = self._next(text, fresh, free) if rename else None
            if name is not None:
                fresh[name] = None
            given.append(name)
        own = [name == text for name, text in zip(given, wanted, strict=True)]
        renamed = [name for name, is_own in zip(given, own, strict=True) if name is not None and not is_own]
        keys = np.concatenate([keys[own], keys_of_texts(renamed)])
        self._seen.add(keys, np.zeros(len(keys), dtype=np.int64))
        return given

    def _again(self, wanted: list[str], keys: np.ndarray) -> list[bool]:
        """Which of them were there before, or are further up in the list."""
        first = {text: i for i, text in reversed(list(enumerate(wanted)))}
        before = self._seen.find(keys) >= 0
        return [is_old or first[text] < i for i, (text, is_old) in enumerate(zip(wanted, before.tolist(), strict=True))]

    def _free(self, texts: list[str]) -> set[str]:
        """Names that nobody had before, among those likely to be given to them: looked up together, which is quick."""
        last = {text: self._given.get(text, 1) for text in texts}
        names = []
        for text in texts:
            last[text] += 1
            names.append(f"{text}_{last[text]}")
        found = self._seen.find(keys_of_texts(names))
        return {name for name, number in zip(names, found.tolist(), strict=True) if number < 0}

    def _next(self, text: str, fresh: dict[str, None], free: set[str]) -> str:
        while True:
            self._given[text] = self._given.get(text, 1) + 1
            name = f"{text}_{self._given[text]}"
            if name not in fresh and (name in free or self._seen.find(keys_of_texts([name]))[0] < 0):
                return name
