"""Variants as people write them: what each means, what is refused and why; HGVS against mavehgvs."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esm_fast.variants.bind import (
    MismatchError,
    best_offset,
    bind,
    check,
    explain,
    offset_for,
    readable,
    require_protein,
)
from esm_fast.variants.parse import STANDARD, THREE_LETTERS, VariantError, parse

PROTEIN = "MKTAYIAKQRQISFVKSHFSRQ"


def made(text, protein=PROTEIN, offset=0):
    return bind(parse(text), protein, offset, text).sequence(protein)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("M1P", "PKTAYIAKQRQISFVKSHFSRQ"),
        ("  K2A  ", "MATAYIAKQRQISFVKSHFSRQ"),
        ("Q22A:M1P", "PKTAYIAKQRQISFVKSHFSRA"),
        ("M1P,K2A", "PATAYIAKQRQISFVKSHFSRQ"),
        ("M1P; K2A", "PATAYIAKQRQISFVKSHFSRQ"),
        ("p.Met1Pro", "PKTAYIAKQRQISFVKSHFSRQ"),
        ("p.(Met1Pro)", "PKTAYIAKQRQISFVKSHFSRQ"),
        ("Met1Pro", "PKTAYIAKQRQISFVKSHFSRQ"),
        ("p.M1P", "PKTAYIAKQRQISFVKSHFSRQ"),
        ("p.[Met1Pro;Lys2Ala]", "PATAYIAKQRQISFVKSHFSRQ"),
        ("p.[(Met1Pro);(Lys2Ala)]", "PATAYIAKQRQISFVKSHFSRQ"),
        ("p.Met1Pro:p.Lys2Ala", "PATAYIAKQRQISFVKSHFSRQ"),
        ("M1P:p.K2A", "PATAYIAKQRQISFVKSHFSRQ"),
        ("NP_000537.3:p.Met1Pro", "PKTAYIAKQRQISFVKSHFSRQ"),
        ("sp|P04637|P53_HUMAN:p.[M1P;K2A]", "PATAYIAKQRQISFVKSHFSRQ"),
        ("p.A4_I6del", "MKTAKQRQISFVKSHFSRQ"),
        ("p.Ala4del", "MKTYIAKQRQISFVKSHFSRQ"),
        ("p.Ala4_Ile6dup", "MKTAYIAYIAKQRQISFVKSHFSRQ"),
        ("p.A4dup", "MKTAAYIAKQRQISFVKSHFSRQ"),
        ("p.Lys2_Thr3insGlnSer", "MKQSTAYIAKQRQISFVKSHFSRQ"),
        ("K2_T3insW", "MKWTAYIAKQRQISFVKSHFSRQ"),
        ("p.A4_I6delinsWW", "MKTWWAKQRQISFVKSHFSRQ"),
        ("p.Ala4delinsTrpVal", "MKTWVYIAKQRQISFVKSHFSRQ"),
        ("p.A4_I6delinsAWI", "MKTAWIAKQRQISFVKSHFSRQ"),
        ("A4del:Q22W", "MKTYIAKQRQISFVKSHFSRW"),
        ("p.=", PROTEIN),
        ("p.(=)", PROTEIN),
        ("_wt", PROTEIN),
        ("p.Ala4=", PROTEIN),
        ("p.Ala4_Ile6=", PROTEIN),
        ("A4A", PROTEIN),
        ("M1U", "UKTAYIAKQRQISFVKSHFSRQ"),
        ("p.Ala4Ter", "MKT"),
        ("A4*", "MKT"),
    ],
)
def test_what_a_variant_makes_of_its_protein(text, expected):
    assert made(text) == expected


@pytest.mark.parametrize(
    "text, reason, words",
    [
        ("", "empty", "no variant"),
        ("m1p", "not understood", "upper case"),
        ("M1J", "not understood", "J is no residue"),
        ("J1M", "not understood", "J is no residue"),
        ("M1", "not understood", "expected A1P"),
        ("1P", "not understood", "expected A1P"),
        ("M1P K2A", "not understood", "between changes, as in A1P:D2N"),
        ("M1P/K2A", "not understood", "between changes"),
        ("M１P", "not understood", "expected A1P"),
        ("#NAME?", "not understood", "expected A1P"),
        ("M1P:", "not understood", "expected A1P"),
        ("p.Met1P", "not understood", "expected A1P"),
        ("M" + "1" * 5000 + "P", "not understood", "expected A1P"),
        ("p.Met1_Thr3Val", "not understood", "del, dup, ins or delins"),
        ("p.Thr3_Met1del", "not understood", "ends before it begins"),
        ("p.Met1insAla", "not understood", "between two neighbours"),
        ("p.Met1_Thr3insAla", "not understood", "between two neighbours"),
        ("M1X", "unknown residue", "no single residue"),
        ("p.Met1Xaa", "unknown residue", "no single residue"),
        ("p.Met1_Lys2insAlaXaa", "unknown residue", "no single residue"),
        ("M1P:M1A", "overlap", "position 1"),
        ("p.[Met1_Ala4del;Thr3Gly]", "overlap", "position 3"),
        ("K2_T3insA:K2_T3insG", "overlap", "position 3"),
        ("p.Arg97fs", "not supported", "frame shift"),
        ("p.Arg97ProfsTer23", "not supported", "frame shift"),
        ("p.Met1ext-5", "not supported", "extension"),
        ("p.Ter110GlnextTer17", "not supported", "extension"),
        ("p.0", "not supported", "not known"),
        ("p.?", "not supported", "not known"),
        ("p.Met1?", "not supported", "not known"),
        ("p.Lys2_Thr3ins34", "not supported", "written out"),
        ("p.Lys2_Thr3delinsTer", "not supported", "a stop among"),
        ("p.Ter4Ala", "not supported", "no residue that a protein model"),
        ("M1P:A4*", "not supported", "together with other changes"),
        ("p.Met1_Gln22del", "not supported", "nothing of the protein is left"),
        ("M0P", "out of range", "not among 1 to 22"),
        ("M23P", "out of range", "not among 1 to 22"),
        ("p.Arg21_Gln23del", "out of range", "not among 1 to 22"),
        ("A1P", "other wild type", "position 1 is stated as A, and the protein has M"),
        ("p.Ala4_Gly6del", "other wild type", "position 6 is stated as G, and the protein has I"),
        ("p.Lys2_Gly3insTrp", "other wild type", "position 3"),
        ("p.Gly4=", "other wild type", "position 4"),
    ],
)
def test_what_is_refused_and_why(text, reason, words):
    with pytest.raises(VariantError) as caught:
        made(text)
    assert caught.value.reason == reason and words in str(caught.value)


def test_an_offset_moves_all_positions():
    assert made("M24P", offset=23) == made("M1P")
    assert made("p.Ala27_Ile29dup", offset=23) == made("p.Ala4_Ile6dup")
    with pytest.raises(VariantError, match="not among 24 to 45"):
        made("M1P", offset=23)


# ---- against mavehgvs

RESIDUE = st.sampled_from(STANDARD)


@st.composite
def events(draw):
    """(one-letter, three-letter) text of an event that fits PROTEIN, and what it makes of it."""
    start = draw(st.integers(1, len(PROTEIN) - 2))
    end = draw(st.integers(start, min(start + 4, len(PROTEIN) - 1)))
    kind = draw(st.sampled_from(["sub", "stop", "del", "dup", "ins", "delins", "equal"]))
    inserted = draw(st.text(RESIDUE, min_size=1, max_size=3))
    left, right = PROTEIN[: start - 1], PROTEIN[end:]

    def at(position, three):
        letter = PROTEIN[position - 1]
        return (THREE_LETTERS[letter] if three else letter) + str(position)

    def spelt(residues, three):
        return "".join(THREE_LETTERS[r] for r in residues) if three else residues

    def text(three):
        where = at(start, three) if start == end else f"{at(start, three)}_{at(end, three)}"
        return {
            "sub": at(start, three) + spelt(inserted[0], three),
            "stop": at(start, three) + ("Ter" if three else "*"),
            "del": where + "del",
            "dup": where + "dup",
            "ins": f"{at(start, three)}_{at(start + 1, three)}ins{spelt(inserted, three)}",
            "delins": f"{where}delins{spelt(inserted, three)}",
            "equal": where + "=",
        }[kind]

    result = {
        "sub": left + inserted[0] + PROTEIN[start:],
        "stop": left,
        "del": left + right,
        "dup": PROTEIN[:end] + PROTEIN[start - 1 :],
        "ins": PROTEIN[:start] + inserted + PROTEIN[start:],
        "delins": left + inserted + right,
        "equal": PROTEIN,
    }[kind]
    return text(False), text(True), kind, result


@given(events())
@settings(max_examples=300, deadline=None)
def test_both_spellings_mean_the_same_and_mavehgvs_agrees(event):
    mavehgvs = pytest.importorskip("mavehgvs", reason="mavehgvs is not installed")
    one, three, kind, result = event
    assert made(one) == made("p." + one) == made(three) == made("p." + three) == made(f"p.({three})") == result
    read = mavehgvs.Variant("p." + three, targetseq=PROTEIN)
    assert applied(read) == result and read.variant_type == ("sub" if kind == "stop" else kind)
    wrong = f"p.{'Trp' if three[:3] != 'Trp' else 'Ala'}{three[3:]}"
    with pytest.raises(mavehgvs.exceptions.MaveHgvsParseError):
        mavehgvs.Variant(wrong, targetseq=PROTEIN)
    with pytest.raises(MismatchError):
        made(wrong)


def applied(read):
    """What mavehgvs' reading makes of PROTEIN."""
    letters = {code: letter for letter, code in THREE_LETTERS.items()}
    ends = read.positions if isinstance(read.positions, tuple) else (read.positions, read.positions)
    start, end = (position.position for position in ends)
    new = "".join(letters[code] for code in re.findall("[A-Z][a-z]{2}", str(read.sequence))) if read.sequence else ""
    match read.variant_type:
        case "equal":
            return PROTEIN
        case "sub":
            new = letters[read.sequence[1]]
            return PROTEIN[: start - 1] + ("" if new == "*" else new + PROTEIN[start:])
        case "dup":
            return PROTEIN[:end] + PROTEIN[start - 1 :]
        case "ins":
            return PROTEIN[:start] + new + PROTEIN[start:]
    return PROTEIN[: start - 1] + new + PROTEIN[end:]


TEXTS = st.from_regex(
    r"p\.\[?(Ala|Gly|Ter|Arg)[0-9]{1,2}(_(Ala|Gly)[0-9]{1,2})?(del|dup|ins|delins|=|fs|Ala|Ter)"
    r"(Ala|Gly|Ter){0,2}(;Gly[0-9]{2}(Ala|del|fs|=))?\]?",
    fullmatch=True,
)


@given(TEXTS)
@settings(max_examples=500, deadline=None)
def test_nothing_that_mavehgvs_takes_is_taken_for_something_else(text):
    """What it reads, we read, or say what we do not support; and never another number of events."""
    mavehgvs = pytest.importorskip("mavehgvs", reason="mavehgvs is not installed")
    try:
        read = mavehgvs.Variant(text)
    except mavehgvs.exceptions.MaveHgvsParseError:
        return
    try:
        variant = parse(text)
    except VariantError as error:
        assert error.reason == "not supported"
        return
    assert len(variant.edits) == (0 if read.positions is None else read.variant_count)


@given(st.text(max_size=30) | st.text("AMKp.()[];:_0123456789delinsdupTer*=,-", max_size=25))
@settings(max_examples=1000, deadline=None)
def test_no_text_is_more_than_refused(text):
    try:
        made(text)
    except VariantError as error:
        assert error.reason and str(error)


# ---- many rows


def test_every_row_leads_somewhere_and_is_counted():
    rows = ["M1P", "M1P", "K2K", "p.=", "A1P", None, float("nan"), "M99P", "nonsense", "A1P"]
    checked = check(rows, PROTEIN)
    assert checked.of_row.tolist() == [0, 0, 1, 2, -1, -1, -1, -1, -1, -1]
    assert [problem.row for problem in checked.problems] == [4, 5, 6, 7, 8, 9]
    assert checked.counts == {
        "rows": 10,
        "duplicate": 3,
        "synonymous": 1,
        "wild type": 1,
        "other wild type": 2,
        "empty": 2,
        "out of range": 1,
        "not understood": 1,
    }
    with pytest.raises(TypeError, match="variant 0 is 7"):
        check([7], PROTEIN)


@given(
    st.text(RESIDUE, min_size=1, max_size=30),
    st.integers(-20, 40),
    st.lists(st.tuples(st.integers(0, 10**6), RESIDUE), min_size=1, max_size=12),
    st.lists(st.sampled_from(["W7A", "M999999999P", "p.Ala3_Gly5del", "junk"]), max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_the_offset_that_is_found_fits_most_rows(protein, offset, picks, others):
    places = [(number % len(protein), new) for number, new in picks]
    rows = [f"{protein[i]}{i + 1 + offset}{new}" for i, new in places if i + 1 + offset >= 0] + others
    variants, found = readable(rows), best_offset(readable(rows), protein)

    def fits(number):
        stated = [[(p - number - 1, r) for edit in v.edits for p, r in edit.stated] for v in variants]
        return sum(all(0 <= at < len(protein) and protein[at] == r for at, r in group) for group in stated)

    tried = {number: fits(number) for number in [*range(-60, 100), found.offset if found else 0]}
    if found is None:
        assert not any(tried.values())
        return
    assert tried[found.offset] == found.fits == max(tried.values()) and found.of == len(variants)
    assert abs(found.offset) == min(abs(number) for number, count in tried.items() if count == found.fits)


def test_the_message_names_rows_positions_residues_and_the_offset_that_would_fit():
    rows = ["M24P", "K25A", "T26G", "A24C", "M1P"]
    checked = check(rows, PROTEIN)
    said = explain(checked.problems, rows, PROTEIN, 0)
    assert said.startswith("row 1: M24P: position 24 is not among 1 to 22; row 2:")
    assert "and 1 more rows" in said and said.endswith("offset=23 would fit 3 of 5 rows")
    lost = ["W1A", "W2A"]
    alone = explain(check(["K1A"], PROTEIN).problems, ["K1A"], PROTEIN, 0)
    assert alone.endswith("offset=-1 would fit 1 of 1 rows (the nearest of 3 that would: more rows would tell)")
    assert "no offset fits any" in explain(check(lost, PROTEIN).problems, lost, PROTEIN, 0)
    best = ["M1P", "K2A", "W3A"]
    assert "no other offset fits more than 0, which fits 2 of 3" in explain(
        check(best, PROTEIN).problems, best, PROTEIN, 0
    )


def test_the_offset_can_be_found():
    assert offset_for("auto", ["M24P", "K25A", "T26G"], PROTEIN) == 23
    assert offset_for("auto", ["K2A"], PROTEIN) == 0  # others fit too, and this is no news
    assert offset_for(7, ["K2A"], PROTEIN) == 7
    with pytest.raises(ValueError, match="3 offsets fit 1 of 1 variants, such as 24: give one"):
        offset_for("auto", ["K40A"], PROTEIN)
    with pytest.raises(ValueError, match="no offset fits any"):
        offset_for("auto", ["W1A", "junk"], PROTEIN)
    with pytest.raises(ValueError, match="offset is '3'"):
        offset_for("3", ["K2A"], PROTEIN)


def test_a_mismatch_knows_its_numbers():
    with pytest.raises(MismatchError) as caught:
        made("A24P", offset=23)
    assert (caught.value.position, caught.value.expected, caught.value.found) == (24, "A", "M")


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no residues"),
        ("*", "no residues"),
        ("MKT-A", "column 4: '-' .* gaps of an alignment"),
        ("MKJ", "column 3: 'J'"),
        ("MK<mask>", "column 3: '<'"),
        ("MK*T", "column 3: '\\*'"),
    ],
)
def test_proteins_that_cannot_be_scored(text, words):
    with pytest.raises(ValueError, match=words):
        require_protein(text)
    assert require_protein(" mk tBxZUO*\n") == "MKTBXZUO"
