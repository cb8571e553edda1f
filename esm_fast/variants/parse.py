"""Variants as people write them: A1P, A1P:D2N, and HGVS p. in one or three letters, to `Variant`.

The HGVS part is that of the recommendations for proteins (den Dunnen et al. 2016) which a protein's sequence alone can
answer: substitution, del, ins, delins, dup, = and Ter. Frame shifts and extensions need a transcript.
"""

import re
from typing import NamedTuple

STANDARD = "ACDEFGHIKLMNPQRSTVWY"
STOP = "*"
_CODES = re.findall("...", "AlaCysAspGluPheGlyHisIleLysLeuMetAsnProGlnArgSerThrValTrpTyrSecPylAsxGlxXaaTer")
_THREE = dict(zip(_CODES, STANDARD + "UOBZX" + STOP, strict=True))
_ONE = {letter: letter for letter in _THREE.values()}
THREE_LETTERS = {letter: code for code, letter in _THREE.items()}
KNOWN_MUTANTS = frozenset(STANDARD + "UO")  # what a variant may put in; X, B and Z are no single residue
_WILD_TYPE = frozenset(("=", "(=)", "wt", "WT", "_wt", "_sy", "p.=", "p.(=)"))


class VariantError(ValueError):
    """A variant that cannot be scored; `reason` is one of a few words to count by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Edit(NamedTuple):
    """Residues `start` to `end`, numbered as the text numbers them, become `new`.

    An insertion has end = start - 1: it stands before residue `start`, and its flanks are in `stated`.
    """

    start: int
    end: int
    new: str | None  # None: what stands there, twice (dup) or as it is (=); "*" a stop
    kind: str  # sub, del, ins, delins, dup, equal, stop
    stated: tuple[tuple[int, str], ...]  # (position, residue) that the text says the protein has


class Variant(NamedTuple):
    """Edits in the order of their positions; none for the wild type. protein: the text's accession, or ''."""

    edits: tuple[Edit, ...]
    protein: str = ""


def _item(codes: dict[str, str]) -> re.Pattern:
    """One event, in one- or three-letter codes."""
    residue = "(?:" + "|".join(map(re.escape, codes)) + r"|\*)"
    return re.compile(
        rf"(?P<first>{residue})(?P<start>\d{{1,9}})(?:_(?P<last>{residue})(?P<end>\d{{1,9}}))?"
        rf"(?:(?P<word>=|del|dup)|(?P<ins>delins|ins)(?P<seq>{residue}+)|(?P<new>{residue}))",
        re.ASCII,
    )


_ITEMS = tuple((_item(codes), re.compile("|".join(map(re.escape, (*codes, STOP)))), codes) for codes in (_THREE, _ONE))
_ACCESSION = re.compile(r"(?P<protein>[^\s:;,()\[\]]+):\s*(?=p\.)")
_SEPARATOR = re.compile(r"\s*[:;,]\s*")
# What HGVS can say and a protein's sequence cannot answer.
_UNSUPPORTED = (
    (re.compile(r"fs"), "a frame shift cannot be told from the protein alone; give its result as delins"),
    (re.compile(r"ext"), "an extension cannot be told from the protein alone; give its result as ins"),
    (re.compile(r"^\(?(?:0\??|\?)\)?$|\d\?\)?$"), "the protein it makes is not known"),
    (re.compile(r"ins\(?\d|ins\w+\[\d|\(\d+_\d+\)"), "what is inserted has to be written out"),
)


def parse(text: str) -> Variant:
    """The variant of a text. Raises VariantError.

    Several changes are separated by ':', ',' or ';', also as p.[...;...]; an accession may stand before 'p.'.
    """
    text, whole = text.strip(), shown(text.strip())
    if not text:
        raise VariantError("empty", "there is no variant")
    protein = ""
    if (found := _ACCESSION.match(text)) is not None and not _is_item(found["protein"].removeprefix("p.")):
        protein, text = found["protein"], text[found.end() :]
    if text in _WILD_TYPE:
        return Variant((), protein)
    inner = _without_brackets(text.removeprefix("p."))
    edits = [_edit(_without_brackets(part.removeprefix("p.")), whole) for part in _SEPARATOR.split(inner)]
    edits.sort(key=lambda edit: (edit.start, edit.end))
    for before, after in zip(edits, edits[1:], strict=False):
        if after.start <= before.end or (after.start, after.end) == (before.start, before.end):
            raise VariantError("overlap", f"{whole}: two changes of position {after.start}")
    return Variant(tuple(edits), protein)


def shown(text: str) -> str:
    """As it may stand in a message: short, and without control characters."""
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return text if len(text) <= 60 else text[:59] + "…"


def _without_brackets(text: str) -> str:
    return text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text


def _is_item(text: str) -> bool:
    return any(pattern.fullmatch(_without_brackets(text)) for pattern, *_ in _ITEMS)


def _is_several(item: str) -> bool:
    parts = re.split(r"[\s/|+&_-]+", item)
    return len(parts) > 1 and all(map(_is_item, parts))


def _edit(item: str, text: str) -> Edit:
    for pattern, residue, codes in _ITEMS:
        if (found := pattern.fullmatch(item)) is not None:
            return _edit_of(found, [codes.get(code, STOP) for code in residue.findall(found["seq"] or "")], codes, text)
    for pattern, why in _UNSUPPORTED:
        if pattern.search(item):
            raise VariantError("not supported", f"{text}: {why}")
    raise VariantError("not understood", f"{text}: {_hint(item)}")


def _hint(item: str) -> str:
    if _is_item(item.upper()):
        return "write residues in upper case, as in A1P"
    if _is_several(item):
        return "write ':', ',' or ';' between changes, as in A1P:D2N"
    if re.fullmatch(r"[A-Za-z]\d{1,9}[A-Za-z]", item, re.ASCII):
        return f"{item[0] if item[0].upper() not in _ONE else item[-1]} is no residue"
    return "expected A1P, A1P:D2N, or HGVS such as p.Ala1Pro, p.A3_S5del, p.Gly4dup, p.H4_Q5insA, p.Arg97Ter or p.="


def _edit_of(found: re.Match, inserted: list[str], codes: dict[str, str], text: str) -> Edit:
    start, first = int(found["start"]), codes.get(found["first"], STOP)
    end, last = (int(found["end"]), codes.get(found["last"], STOP)) if found["end"] else (start, first)
    is_range = found["end"] is not None
    if STOP in (first, last):
        raise VariantError("not supported", f"{text}: the stop is no residue that a protein model has seen")
    if is_range and end <= start:
        raise VariantError("not understood", f"{text}: the range ends before it begins")
    stated = ((start, first), (end, last)) if is_range else ((start, first),)
    if found["ins"]:
        return _insertion(found["ins"], start, end, "".join(inserted), stated, is_range, text)
    if found["word"]:
        kind = {"=": "equal", "del": "del", "dup": "dup"}[found["word"]]
        return Edit(start, end, "" if kind == "del" else None, kind, stated)
    if is_range:
        raise VariantError("not understood", f"{text}: a range needs del, dup, ins or delins")
    new = codes.get(found["new"], STOP)
    if new == STOP:
        return Edit(start, end, STOP, "stop", stated)
    return Edit(start, end, _known(new, text), "sub", stated)


def _insertion(word: str, start: int, end: int, new: str, stated: tuple, is_range: bool, text: str) -> Edit:
    if STOP in new:
        raise VariantError("not supported", f"{text}: a stop among inserted residues; give the stop alone")
    for residue in new:
        _known(residue, text)
    if word == "delins":
        return Edit(start, end, new, "delins", stated)
    if not is_range or end != start + 1:
        raise VariantError("not understood", f"{text}: an insertion stands between two neighbours, as in p.H4_Q5insA")
    return Edit(end, start, new, "ins", stated)


def _known(residue: str, text: str) -> str:
    if residue not in KNOWN_MUTANTS:
        raise VariantError("unknown residue", f"{text}: {residue} stands for no single residue")
    return residue
