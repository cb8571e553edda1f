"""What training sees: the token store, the crops and masks, and which records each step and process gets."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esm_fast.alphabet import CLS, EOS, MASK, encode_definition
from esm_fast.cli import main
from esm_fast.sequences.fasta import FastaError
from esm_fast.sequences.tokenize import Policy
from esm_fast.train import prepare as preparing
from esm_fast.train.batches import Steps, share
from esm_fast.train.masking import REPLACEMENTS, Masker, Masking
from esm_fast.train.order import Permutation, Permuted
from esm_fast.train.prepare import prepare, read_clusters
from esm_fast.train.random import ORDER, SELECT, streams, uniform
from esm_fast.train.store import StoreError, open_store

WHOLE = Policy(unknown="x", empty="skip", overlength="window")
LETTERS = np.array(list("LAGVSERTIDPKQNFYMHWCXBUZO"))


def made(folder, records, name="store", **options):
    fasta = folder / f"{name}.fasta"
    fasta.write_text("".join(f">{label} about it\n{sequence}\n" for label, sequence in records))
    summary = prepare([fasta], folder / name, policy=options.pop("policy", WHOLE), **options)
    return open_store(folder / name, verify=True), summary


def sequences(store):
    return [store.tokens[a:b].tolist() for a, b in zip(store.offsets, store.offsets[1:], strict=False)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    generator = np.random.default_rng(0)
    lengths = np.append(generator.integers(1, 400, 1500), [1, 1, 2, 1021, 1022, 1023, 3000])
    records = ((f"p{i}", "".join(generator.choice(LETTERS, n))) for i, n in enumerate(lengths))
    return made(tmp_path_factory.mktemp("store"), records)[0]


# ---- the store


def test_a_store_holds_every_record_once(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "_COPY_TOKENS", 5)  # several blocks, some of them one long record
    records = [
        ("a", "MKT"),
        ("b", "ACDEFGHIKL"),
        ("c", "MKT"),
        ("d", ""),
        ("e", "MK<mask>"),
        ("f", "MJ"),
        ("g", "MKT*"),
    ]
    store, summary = made(tmp_path, records, valid_share=0)
    assert store.names() == ["a", "b", "f"]
    assert sequences(store) == [encode_definition(s) for s in ("MKT", "ACDEFGHIKL", "MX")]
    assert store.lengths.tolist() == [3, 10, 2] and len(store) == 3
    report = summary.report
    assert (summary.duplicates, report.specials, report.empty, report.unknown, report.stops_stripped) == (2, 1, 1, 1, 1)
    assert (summary.train, summary.valid, summary.train_residues) == (3, 0, 15)
    assert store.info["counts"]["duplicates"] == 2 and store.info["counts"]["records"] == 7
    assert [reason for _, _, reason in report.skipped] == ["empty", "special token"]


def test_equal_hashes_are_compared(tmp_path, monkeypatch):
    """With a hash that is the same for all, only equal sequences are duplicates."""
    monkeypatch.setattr(preparing, "_hash", lambda data: 7)
    store, summary = made(tmp_path, [("a", "MKT"), ("b", "MKV"), ("c", "MKT"), ("d", "MKV"), ("e", "M")], valid_share=0)
    assert store.names() == ["a", "b", "e"] and summary.duplicates == 2


def test_the_split_does_not_depend_on_the_order(tmp_path):
    generator = np.random.default_rng(0)
    records = [(f"p{i}", "".join(generator.choice(LETTERS, 20))) for i in range(2000)]
    one, _ = made(tmp_path, records, "one", valid_share=0.1)
    two, _ = made(tmp_path, records[::-1], "two", valid_share=0.1)
    held_out = [{store.names()[i] for i in store.records(valid=True)} for store in (one, two)]
    assert held_out[0] == held_out[1] and 150 < len(held_out[0]) < 250
    assert sorted([*one.records(valid=True), *one.records(valid=False)]) == list(range(2000))


def test_clusters_are_never_divided(tmp_path):
    records = [(f"sp|P{i}|NAME", LETTERS[i % 20] + "".join(LETTERS[np.array([i // 20, i % 20])])) for i in range(300)]
    (tmp_path / "clusters.tsv").write_text("".join(f"C{i // 3}\tP{i}\n" for i in range(300)))
    clusters = read_clusters(tmp_path / "clusters.tsv")
    store, _ = made(tmp_path, records, valid_share=0.3, clusters=clusters)
    sides = {}
    for name, valid in zip(store.names(), store.valid.tolist(), strict=True):
        sides.setdefault(clusters[name.split("|")[1]], set()).add(valid)
    assert all(len(side) == 1 for side in sides.values()) and {0, 1} == {v for side in sides.values() for v in side}
    with pytest.raises(ValueError, match="'x' is in no cluster"):
        made(tmp_path, [("x", "MK")], "other", clusters=clusters)
    (tmp_path / "clusters.tsv").write_text("C0 P0\n")
    with pytest.raises(ValueError, match="line 1 has no tab"):
        read_clusters(tmp_path / "clusters.tsv")


def test_stores_that_cannot_be_used(tmp_path):
    with pytest.raises(FileNotFoundError, match="esm-fast prepare"):
        open_store(tmp_path)
    store, _ = made(tmp_path, [("a", "MKT"), ("b", "MKV")], valid_share=0)
    with pytest.raises(FileExistsError, match="exists"):
        made(tmp_path, [("a", "MKT")])
    path = store.path / "tokens"
    path.write_bytes(path.read_bytes()[:-1] + b"\x05")
    open_store(store.path)
    with pytest.raises(StoreError, match="tokens is damaged"):
        open_store(store.path, verify=True)
    path.write_bytes(b"\x05")
    with pytest.raises(StoreError, match="cut short"):
        open_store(store.path)
    (store.path / "store.json").write_text(json.dumps(store.info | {"version": 9}))
    with pytest.raises(StoreError, match="version 9"):
        open_store(store.path)


def test_nothing_stays_of_a_store_that_failed(tmp_path):
    for records, policy in (([("a", "MJ")], Policy(overlength="window")), ([("a", "")], WHOLE)):
        with pytest.raises(FastaError):
            made(tmp_path, records, policy=policy)
    assert [path.name for path in tmp_path.iterdir()] == ["store.fasta"]


def test_prepare_command(tmp_path, capsys):
    (tmp_path / "in.fasta").write_text(">a\nMKT\n>b\nMKT\n>c\nMJV\n")
    command = ["prepare", str(tmp_path / "in.fasta"), "-o", str(tmp_path / "store")]
    assert main(command) == 1
    assert "--unknown x" in capsys.readouterr().err
    assert main([*command, "--unknown", "x", "--valid-share", "0"]) == 0
    assert "1 duplicate" in (out := capsys.readouterr().out) and "2 proteins, 6 residues" in out
    assert main([*command, "--unknown", "x"]) == 1
    assert "exists" in capsys.readouterr().err


# ---- masks


def chi_square(observed, expected):
    """How many standard deviations the chi-square of counts lies above its mean (Wilson & Hilferty 1931)."""
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    freedom = len(observed) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


def shown_and_true(masker, records, epoch):
    """Per record: the tokens shown, the true ones, and which were selected."""
    masked = masker.batch(records, epoch)
    tokens = masked.batch.tokens.numpy()
    true, selected = tokens.copy(), np.zeros(len(tokens), bool)
    true[masked.rows], selected[masked.rows] = masked.targets, True
    ends = masked.batch.cu_seqlens.numpy()[1:-1]
    return list(zip(*(np.split(array, ends) for array in (tokens, true, selected)), strict=True))


@pytest.mark.parametrize("specials", ["never", "selected"])
@pytest.mark.parametrize("replacements", list(REPLACEMENTS))
def test_masking_statistics(store, specials, replacements):
    masker = Masker(store, Masking(specials=specials, replacements=replacements), 5, 1022)
    rows = [row for epoch in range(3) for row in shown_and_true(masker, np.arange(len(store)), epoch)]
    shown, true, selected = (np.concatenate(column) for column in zip(*rows, strict=True))
    assert shown[~selected].tolist() == true[~selected].tolist()
    special = (true == CLS) | (true == EOS)
    eligible = np.ones(len(true), bool) if specials == "selected" else ~special
    assert not selected[~eligible].any()
    assert selected[eligible].mean() == pytest.approx(0.15, abs=0.002)
    # Every record: floor(0.15 n) or one more.
    for (_, true_row, selected_row), _ in zip(rows, range(2000), strict=False):
        n = len(true_row) - (0 if specials == "selected" else 2)
        assert selected_row.sum() in (int(0.15 * n), int(0.15 * n) + 1)
    # 80/10/10. What is shown differs from the truth wherever a letter was replaced.
    targets, seen = true[selected], shown[selected]
    m, replaced = len(targets), (seen != targets) & (seen != MASK)
    kept = seen == targets
    assert chi_square([(seen == MASK).sum(), replaced.sum(), kept.sum()], [0.8 * m, 0.1 * m, 0.1 * m]) < 3
    # Uniform over the other letters, for the most frequent target and for one outside the 20.
    letters = REPLACEMENTS[replacements]
    assert set(seen[replaced].tolist()) == set(letters.tolist())
    for target in (4, 5, 24):
        counts = Counter(seen[replaced & (targets == target)].tolist())
        others = [letter for letter in letters.tolist() if letter != target]
        assert set(counts) <= set(others)
        total = sum(counts.values())
        assert total > 200
        assert chi_square([counts[letter] for letter in others], [total / len(others)] * len(others)) < 3
    # No place in a sequence is preferred.
    long = [s[1:201] for _, t, s in rows if len(t) > 202]
    per_place = np.sum(long, axis=0)
    assert chi_square(per_place, np.full(200, per_place.mean())) < 3


def test_masks_depend_on_nothing_but_the_record_and_the_epoch(store):
    masker, generator = Masker(store, Masking(), 5, 1022), np.random.default_rng(1)
    records = generator.permutation(len(store))[:60]
    together = shown_and_true(masker, records, 4)
    for i in (0, 17, 59):
        (alone,) = shown_and_true(masker, records[i : i + 1], 4)
        assert all(np.array_equal(a, b) for a, b in zip(alone, together[i], strict=True))
    assert masker.batch(records, 4).batch.order.tolist() == records.tolist()
    assert masker.selected(records, 4).tolist() == [int(s.sum()) for _, _, s in together]
    others = [shown_and_true(Masker(store, Masking(), seed, 1022), records, e) for seed, e in ((5, 3), (6, 4))]
    for other in others:
        same = np.mean([np.array_equal(a[2], b[2]) for a, b in zip(together, other, strict=True)])
        assert same < 0.2  # short sequences may select the same by chance


def test_long_proteins_are_cropped_anew_each_epoch(store):
    masker = Masker(store, Masking(), 5, 1022)
    record = np.array([int(store.lengths.argmax())])
    whole, starts = sequences(store)[record[0]], []
    for epoch in range(300):
        ((_, true, _),) = shown_and_true(masker, record, epoch)
        assert len(true) == 1024 and true[0] == CLS and true[-1] == EOS
        crop = true[1:-1].tolist()
        starts.append(next(i for i in range(len(whole) - 1021) if whole[i : i + 1022] == crop))
    thirds = np.histogram(starts, bins=3, range=(0, 3000 - 1022))[0]
    assert chi_square(thirds, [100] * 3) < 3 and max(starts) > 1900 and min(starts) < 80
    short = np.flatnonzero(store.lengths == 1022)[:1]
    assert all(shown_and_true(masker, short, e)[0][1][1:-1].tolist() == sequences(store)[short[0]] for e in range(3))


def test_validation_shows_every_selected_token_as_a_mask(store):
    masking = Masking(specials="selected").for_validation()
    rows = shown_and_true(Masker(store, masking, 5, 1022), np.arange(200), -1)
    assert all((shown[selected] == MASK).all() for shown, _, selected in rows)


def test_random_numbers_are_uniform_and_independent():
    stream = streams(0, SELECT, 0, np.arange(400))
    numbers = uniform(stream[:, None], np.arange(500))
    assert chi_square(np.histogram(numbers, 50, (0, 1))[0], [4000] * 50) < 3
    for a, b in ((numbers[:, :-1], numbers[:, 1:]), (numbers[:-1], numbers[1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01
    other = [
        uniform(streams(*key, np.arange(400))[:, None], np.arange(500)) for key in ((1, SELECT, 0), (0, SELECT, 1))
    ]
    other.append(uniform(streams(0, ORDER, 0, np.arange(400))[:, None], np.arange(500)))
    assert all(abs(np.corrcoef(numbers.ravel(), o.ravel())[0, 1]) < 0.01 for o in other)
    # The function is part of the format of a run: a change of it would silently make every resumed run another.
    assert streams(1, 2, 3, [4, 5]).tolist() == [8223237870565399804, 8887043502526235998]
    assert uniform(streams(1, 2, 3, [4]), [0, 1]).tolist() == [0.4734541585353438, 0.7335735441469046]


@pytest.mark.parametrize("wrong", [dict(share=0), dict(masked=0.95), dict(specials="all"), dict(replacements="any")])
def test_masking_mistakes(wrong):
    with pytest.raises(ValueError, match="masking"):
        Masking(**wrong)


# ---- steps and processes

lengths_of_records = st.lists(st.integers(3, 60), min_size=1, max_size=60).map(np.array)


@given(lengths_of_records, st.integers(1, 400), st.integers(0, 3))
def test_an_epoch_holds_every_record_once(lengths, step_tokens, epoch):
    steps = Steps(np.arange(len(lengths)) + 7, lengths, 3, step_tokens)
    parts = [steps[epoch * steps.per_epoch + i] for i in range(steps.per_epoch)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    mean = lengths.sum() / steps.per_epoch
    assert mean <= step_tokens
    for part in parts:
        assert abs(lengths[part].sum() - mean) < lengths.max()
    # A step is the same whatever was asked before: a resumed run sees what the other would have seen.
    fresh = Steps(np.arange(len(lengths)) + 7, lengths, 3, step_tokens)
    last = epoch * steps.per_epoch + steps.per_epoch - 1
    assert fresh[last].tolist() == parts[-1].tolist()
    assert fresh.epoch_of(last) == epoch


def test_epochs_have_orders_of_their_own():
    steps = Steps(np.arange(500), np.full(500, 10), 3, 1000)
    orders = [np.concatenate([steps[e * 5 + i] for i in range(5)]).tolist() for e in range(3)]
    assert orders[0] != orders[1] != orders[2] and all(sorted(o) == list(range(500)) for o in orders)


@settings(max_examples=200)
@given(lengths_of_records, st.integers(1, 5), st.integers(20, 200))
def test_processes_share_a_step(lengths, ranks, batch_tokens):
    shares = share(lengths, ranks, batch_tokens)
    flat = [int(i) for rank in shares for batch in rank for i in batch]
    assert sorted(flat) == list(range(len(lengths)))
    counts = {len(rank) for rank in shares}
    assert (min(counts) > 0 or len(lengths) < ranks) and max(counts) - min(counts) <= 1  # all meet at the last
    limit = max(batch_tokens, lengths.max())
    assert all(0 < lengths[batch].sum() <= limit for rank in shares for batch in rank)


def test_shares_are_balanced():
    lengths = np.random.default_rng(0).integers(50, 1024, 300)
    sums = [[int(lengths[batch].sum()) for batch in rank] for rank in share(lengths, 4, 8192)]
    assert np.max(sums) < 1.02 * np.mean(sums)


def test_given_records_are_held_out_and_no_others(tmp_path):
    own, held = {"a": "MKTAYIAK", "b": "GGSLK", "c": "WWKK"}, {"x": "GGSLK", "y": "MALW", "z": "MALW"}
    for name, records in (("own", own), ("held", held)):
        (tmp_path / f"{name}.fasta").write_text("".join(f">{k}\n{v}\n" for k, v in records.items()))
    (tmp_path / "none.fasta").write_text(">q\nMKTAYIAK\n")
    policy = Policy(overlength="window")
    summary = prepare([tmp_path / "own.fasta"], tmp_path / "s", policy=policy, valid=[tmp_path / "held.fasta"])
    store = open_store(tmp_path / "s", verify=True)
    names = store.names()
    assert {names[i] for i in store.records(valid=True)} == {"x", "y"}
    assert {names[i] for i in store.records(valid=False)} == {"a", "c"}  # what is held out is not trained on
    assert (summary.duplicates, summary.valid, summary.train) == (2, 2, 2)
    arguments = ["prepare", str(tmp_path / "own.fasta"), "--valid", str(tmp_path / "held.fasta"), "-o"]
    assert main([*arguments, str(tmp_path / "t")]) == 0 == main(["prepare", *arguments[1:2], "-o", str(tmp_path / "u")])
    assert open_store(tmp_path / "t").identity == store.identity
    (tmp_path / "clusters.tsv").write_text("a\ta\n")
    assert main([*arguments, str(tmp_path / "v"), "--clusters", str(tmp_path / "clusters.tsv")]) == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**63))
def test_a_permutation_that_is_computed(count, stream):
    found = Permutation(count, np.uint64(stream))(np.arange(count))
    assert np.array_equal(np.sort(found), np.arange(count))


def test_a_computed_order_is_random():
    """Where each record stands, and what stands beside it, over many epochs."""
    count, epochs = 37, 4000
    orders = [Permutation(count, streams(5, ORDER, e, [0])[0])(np.arange(count)) for e in range(epochs)]
    orders = np.array(orders)
    for seen in (orders[:, 0], orders[:, -1], (orders[:, 1] - orders[:, 0]) % count):
        counts = np.bincount(seen, minlength=count)
        counts = counts[counts > 0]  # two are never the same
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < count + 5 * (2 * count) ** 0.5


def test_computed_epochs_are_those_of_sorted_ones_in_another_order(store):
    """Every training record once, in shares of the same size, whichever step is asked for first."""
    limit = 46
    lengths = np.minimum(store.lengths, limit) + 2
    records = store.records(valid=False)
    plain = Steps(records, lengths[records], 3, 700)
    steps = Permuted(store, 3, 700, limit)
    assert steps.per_epoch == plain.per_epoch > 5
    parts = [steps.of(step) for step in range(2 * steps.per_epoch)]
    for epoch in range(2):
        own = parts[epoch * steps.per_epoch : (epoch + 1) * steps.per_epoch]
        assert np.array_equal(np.sort(np.concatenate(own)), records)
        assert max(abs(lengths[part].sum() - lengths[records].sum() / steps.per_epoch) for part in own) <= limit + 2
    assert not np.array_equal(parts[0], parts[steps.per_epoch])
    again = Permuted(store, 3, 700, limit)
    for step in (7, 2, 3, 4, 2 * steps.per_epoch - 1, 0):
        assert np.array_equal(again.of(step), parts[step])


def test_an_epoch_of_clusters_has_one_of_each(tmp_path):
    generator = np.random.default_rng(0)
    letters, cluster_of = np.array(list("LAGVSERTIDPKQNFYMHWC")), {}
    rows = ["".join(generator.choice(letters, generator.integers(5, 30))) for _ in range(90)]
    for i in range(90):
        cluster_of[f"p{i}"] = f"c{int(i**0.5)}"  # of 1, 3, 5 ... members
    (tmp_path / "in.fasta").write_text("".join(f">p{i}\n{row}\n" for i, row in enumerate(rows)))
    policy = Policy(overlength="window")
    prepare([tmp_path / "in.fasta"], tmp_path / "s", policy=policy, valid_share=0.3, clusters=cluster_of)
    store = open_store(tmp_path / "s", verify=True)
    names, train = store.names(), store.records(valid=False)
    wanted = {cluster_of[names[r]] for r in train}
    steps, counts = Permuted(store, 1, 60, 1022, by_cluster=True), np.zeros(len(store))
    for epoch in range(400):
        own = np.concatenate([steps.of(epoch * steps.per_epoch + k) for k in range(steps.per_epoch)])
        assert sorted(cluster_of[names[r]] for r in own) == sorted(wanted) and not store.valid[own].any()
        counts[own] += 1
    size = {name: sum(cluster_of[names[r]] == name for r in train) for name in wanted}
    for record in train:
        share = 1 / size[cluster_of[names[record]]]
        assert abs(counts[record] - 400 * share) < 5 * (400 * share * (1 - share)) ** 0.5 + 1e-9
    (tmp_path / "s" / "members").write_bytes(b"")
    with pytest.raises(StoreError, match="members is missing or cut short"):
        open_store(tmp_path / "s")
