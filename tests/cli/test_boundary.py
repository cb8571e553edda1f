"""Whatever is broken, input, stream, number or memory, a command ends with one line that names it, and no traceback."""

import argparse
import errno
import io
import json
import os
import random
import re
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esm_fast import cli
from esm_fast.cli import common, main
from esm_fast.console import boundary
from esm_fast.console.streams import LINES, Screen, printable
from esm_fast.files.checksums import digest_of
from esm_fast.train.store import StoreError, open_store

ESCAPE = "\x1b]0;pwned\x07\x1b[31m"


# ---- what is printed


@given(st.text(), st.sampled_from(["utf-8", "ascii", "cp1252", "latin-1", "UTF8"]), st.sampled_from(["", LINES, "\r"]))
def test_only_what_prints_is_printed(text, encoding, keep):
    shown = printable(text, encoding, keep)
    shown.encode(encoding)
    assert all(c.isprintable() or c in keep for c in shown)
    plain = "".join(c for c in text if c.isascii() and (c.isprintable() or c in keep))
    assert printable(plain, encoding, keep) == plain


def test_a_screen_escapes_and_says_which_stream_failed():
    written = io.StringIO()
    screen = Screen(written, "standard output")
    print(f"a\t{ESCAPE}b\r\x9bc\u202e\udc80", file=screen)
    assert written.getvalue() == "a\t\\x1b]0;pwned\\x07\\x1b[31mb\\r\\x9bc\\u202e\\udc80\n"
    screen.bars.write("\rbar")
    assert written.getvalue().endswith("\rbar") and screen.bars == screen
    with open("/dev/full", "w") as full:
        with pytest.raises(OSError) as caught:
            print("text", file=Screen(full, "standard output"), flush=True)
        assert caught.value.filename == "standard output"
        print("text", file=Screen(full, "standard error", lossy=True), flush=True)


# ---- kinds of errors


def raised(error, *, by_us):
    """The error as it comes out of a line of esm_fast, or of a library."""
    code = compile("def fail(error):\n    raise error", str(Path(cli.__file__) if by_us else "/lib/other.py"), "exec")
    scope = {}
    exec(code, scope)
    try:
        scope["fail"](error)
    except BaseException as caught:
        return caught


KINDS = [
    (OSError(errno.ENOSPC, "No space left on device", "o.h5"), "o.h5: No space left on device; free some space"),
    (OSError(errno.EIO, "Input/output error"), "in.fa: Input/output error; the disk or the file"),
    (OSError(errno.EMFILE, "Too many open files", "x"), "ulimit -n"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", b"\xff"), "\udcff: No such file"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe", "fifo"), "fifo: Broken pipe"),
    (MemoryError("std::bad_alloc"), "not enough memory; ask for smaller batches (--batch-tokens N)"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
    (RuntimeError("can't start new thread"), "not enough memory"),
    (ImportError("x.so: failed to map segment from shared object"), "not enough memory"),
    (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), "the GPU's memory is full"),
    (ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow"), "the package pyarrow, which is not installed"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "in.fa cannot be read, it is not UTF-8"),
    (json.JSONDecodeError("Expecting value", "", 0), "in.fa cannot be read, it is not JSON"),
    (EOFError("ended early"), "in.fa cannot be read, it is not whole"),
]


@pytest.mark.parametrize(("error", "message"), KINDS, ids=lambda value: str(value)[:30])
def test_what_users_can_mend_is_one_line(error, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("in.fa").write_text("")
    args = Namespace(fasta=["in.fa"], output="o.h5", batch_tokens=None, model="nowhere")
    assert message in boundary.expected(raised(error, by_us=False), args)


def damaged_by_libraries():
    import struct
    import zipfile
    import zlib

    import yaml
    from safetensors import deserialize

    yield lambda: zipfile.ZipFile(io.BytesIO(b"no"))
    yield lambda: zlib.decompress(b"no")
    yield lambda: yaml.safe_load("a: [")
    yield lambda: yaml.safe_load("\0")
    yield lambda: deserialize(struct.pack("<Q", 1 << 60))
    yield lambda: json.loads("{")


@pytest.mark.parametrize("number", range(6))
def test_what_libraries_say_of_damaged_files_is_one_line(number):
    with pytest.raises(Exception) as caught:  # noqa: PT011, B017
        list(damaged_by_libraries())[number]()
    assert "cannot be read" in boundary.expected(caught.value)


def test_a_librarys_error_is_ours_to_mend_and_our_own_is_for_the_user(capsys):
    for kind in (ValueError, LookupError, KeyError, OverflowError, ZeroDivisionError):
        assert boundary.expected(raised(kind("why"), by_us=True)) == "why"
        assert boundary.expected(raised(kind("why"), by_us=False)) is None
    for kind in (RuntimeError, TypeError, AttributeError, AssertionError, NotImplementedError, RecursionError):
        assert boundary.expected(raised(kind("why"), by_us=True)) is None
    with pytest.raises(TypeError) as caught:  # no raise of ours, though it is in our code
        cli.as_flags(3)
    assert boundary.expected(caught.value) is None


@pytest.mark.parametrize(
    ("command", "name", "what"),
    [
        ("embed good.fa -o {}/", "b\udcffd", "not UTF-8"),
        ("convert esm1b_t6_demo {}/m.safetensors", "b\udcffd", "not UTF-8"),
        ("embed good.fa -o {}/", "b\0d", "NUL"),
        ("report good.fa -o {}.html", "b\0d", "NUL"),
    ],
)
def test_names_that_a_library_cannot_be_told_are_one_line(command, name, what, folder, capsys):
    if command.startswith("convert"):
        Path(name).mkdir()
    code, line = said(capsys, command.replace("{}", name).split(" "))
    assert code == 1 and what in line and "damaged" not in line, line
    assert not [path for path in folder.rglob("*") if path.suffix in (".parquet", ".safetensors", ".partial")]


def test_an_error_of_ours_asks_for_a_report(monkeypatch, capsys):
    module = next(command.module() for command in cli.commands() if command.name == "info")

    def run(args):
        raise TypeError(f"never thought of {ESCAPE}")

    monkeypatch.setattr(module, "run", run)
    assert main(["info"]) == boundary.BUG
    err = capsys.readouterr().err
    assert "Traceback" in err and "please report it" in err.splitlines()[-1] and "\x1b" not in err


# ---- commands and broken inputs

FASTA = ">a\nMKTVRQERLK\n>b\nKALTARQQEVF\n"
COMMANDS = {  # the input in question is {}
    "embed": "embed {} -o o.h5",
    "embed --model": "embed good.fa -o o.h5 --model {}",
    "embed, a data set": "embed {} -o o/",
    "embed, its model": "embed good.fa -o o/ --model {}",
    "embed --dtype auto": "embed good.fa -o o.h5 --dtype auto --model {}",
    "extract": "extract esm1b_t6_demo {} o --include mean",
    "extract MODEL": "extract {} good.fa o --include mean",
    "contacts": "contacts good.fa -o o.npz --model {}",
    "fill-mask": "fill-mask M<mask> --model {}",
    "variants": "variants {} -o o.csv",
    "variants --variants": "variants good.fa -o o.csv --variants {}",
    "variants --model": "variants good.fa -o o.csv --model {}",
    "variants --lookup": "variants {} --lookup a",
    "convert": "convert {} o.safetensors",
    "info": "info {}",
    "verify": "verify {}",
    "finish": "finish {}",
    "export": "export {} --to npy -o o.npy",
    "search": "search {} a",
    "map": "map {} -o o.html",
    "prepare": "prepare {} -o o",
    "prepare --clusters": "prepare good.fa -o o --clusters {}",
    "finetune": "finetune {} -o o --task regression",
    "finetune --model": "finetune good.csv -o o --task regression --model {}",
    "predict": "predict {} good.fa -o o.csv",
    "pretrain": "pretrain {} -o o",
    "pretrain --store": "pretrain good.yaml -o o --store {}",
    "warmup": "warmup --model {}",
    "bench": "bench {} --seconds 0.01",
    "bench --model": "bench good.fa --seconds 0.01 --model {}",
    "report": "report {} -o o.html",
    "report --data-set": "report good.fa -o o.html --scan wt --data-set {}",
    "report --regression": "report good.fa -o o.html --regression {}",
    "fit-contacts": "fit-contacts {} nowhere.pdb -o o.safetensors",
    "fit-contacts STRUCTURE": "fit-contacts esm1b_t6_demo {} -o o.pt",
    "contacts --structure": "contacts good.fa -o o.npz --structure {}",
    "finetune --labels": "finetune good.fa -o o --task regression --labels {}",
    "finetune --clusters": "finetune good.csv -o o --task regression --clusters {}",
    "prepare --valid": "prepare good.fa -o o --valid {}",
}
BROKEN = {
    "missing": None,
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "bytes": lambda path: path.write_bytes(bytes(range(255, -1, -1)) * 9),
    "page": lambda path: path.write_text("<!DOCTYPE html><html><body>log in</body></html>"),
    "pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
    "json": lambda path: path.write_text('{"weight_map": null}'),
    "deep": lambda path: path.write_text("[" * 200_000),
    "zip": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(60)),
    "gz": lambda path: path.write_bytes(b"\x1f\x8b\x08\x00" + bytes(30)),
    "nul": lambda path: path.write_text("a,b\n\0,\0\n"),
    "latin1": lambda path: path.write_bytes(b"s\xe9quence,label\n\xe9,1\n"),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "circle": lambda path: path.symlink_to(path.name),
    "unreadable": lambda path: path.symlink_to("/proc/self/mem"),
}
NAMES = ("bad", f"b{ESCAPE}d", "b\udcffd")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("good.fa").write_text(FASTA)
    rows = "".join(f"{'MKTVRQERLK'[i:] + 'MKV'},{i}.5\n" for i in range(9))
    Path("good.csv").write_text(f"sequence,label\n{rows}")
    Path("good.yaml").write_text(
        "model: {layers: 1, embed_dim: 16, ffn_embed_dim: 32, attention_heads: 2}\n"
        "store: s\noutput: o\nsteps: 1\nplot: false\n"
    )
    return tmp_path


def said(capsys, arguments):
    """The exit code and the last line of what a command says, if all of it is fit for a terminal."""
    with suppress(SystemExit):
        code = main(arguments)
        printed = capsys.readouterr()
        assert all(c.isprintable() or c in "\n\r\t" for c in printed.out + printed.err), printed.err
        assert "Traceback" not in printed.err, (arguments, printed.err[-1500:])
        return code, (printed.err.splitlines() or [""])[-1]
    pytest.fail("it was refused as an argument")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_broken_input_is_one_line_that_names_it(command, folder, capsys):
    for number, (kind, make) in enumerate(BROKEN.items()):
        path = Path(f"{NAMES[number % len(NAMES)]}.{kind}")
        if make:
            make(path)
        code, line = said(capsys, COMMANDS[command].replace("{}", str(path)).split(" "))
        name = command.split(" ")[0].rstrip(",")
        assert code == 1 and line.startswith(f"esm-fast {name}: error: "), (command, kind, code, line)
        assert printable(str(path)) in line or repr(str(path))[1:-1] in line, (command, kind, line)
        left = [file for file in folder.rglob("o*") if file.is_file()]
        assert not left, (command, kind, left)


# ---- JSON that somebody else wrote, with the right checksum

VALUES = [0, -1, 2, 10**9, 2**62, 10**30, True, None, "2", "", ESCAPE, [], [2], {}, 0.5, float("inf"), float("nan")]
READERS = ["verify {}", "finish {}", "export {} --to npy -o o.npy --force", "search {} a", "search {} good.fa"]
READERS += ["map {} -o o.html --force", "embed good.fa -o {}", "variants {} --lookup a"]


@pytest.mark.parametrize("name", ["set/plan.json", "set/run.json", "store/store.json"])
def test_json_that_lies_is_one_line(folder, capsys, name):
    pytest.importorskip("pyarrow")
    main(["embed", "good.fa", "-o", "set"] if name.startswith("set") else ["prepare", "good.fa", "-o", "store"])
    capsys.readouterr()
    rng, text = random.Random(name), Path(name).read_text()
    for _ in range(25):
        content = json.loads(text)
        signed = content.pop("sha256", None) is not None
        place = rng.choice(list(places(content)))
        at = content
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = rng.choice(VALUES)
        Path(name).write_text(json.dumps(content | ({"sha256": digest_of(content)} if signed else {}), indent=1) + "\n")
        if name.startswith("store"):
            with suppress(StoreError):
                assert open_store("store").info["counts"]["train"] >= 0
        else:
            code, line = said(capsys, rng.choice(READERS).replace("{}", "set").split(" "))
            assert code in (None, 0, 1, 3), (code, line, place)


def places(content, before=()):
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*before, key)
        yield from places(value, (*before, key))


# ---- streams

GREEK = ">\u03b2-lactamase\nMKTVRQ\n>\U0001f600\n\n"
STREAMS = [  # command, its streams, exit code, what it says, and whether the output is there
    ("embed g.fa -o o.h5 --empty skip", {"stderr": "closed"}, 0, "proteins  1 of 2", True),
    ("embed g.fa -o o.h5 --empty skip", {"stdout": "closed"}, 0, "", True),
    ("embed g.fa -o o.h5 --empty skip", {"stdout": "closed", "stderr": "closed", "stdin": "closed"}, 0, "", True),
    ("embed g.fa -o o.h5 --empty skip", {"stderr": "full"}, 0, "proteins  1 of 2", True),
    ("embed g.fa -o o.h5 --empty skip", {"stderr": "unheard"}, 0, "proteins  1 of 2", True),
    ("embed g.fa -o o.h5 --empty skip", {"stdout": "unheard"}, 141, "", True),
    ("embed g.fa -o o.h5 --empty skip", {"stdout": "full"}, 1, "standard output: No space left on device", True),
    ("embed g.fa -o o.h5 --empty skip", {"stdout": "ascii"}, 0, "'\\U0001f600': empty", True),
    ("embed g.fa -o o/ --empty skip", {"stdout": "cp1252", "stderr": "cp1252"}, 0, "proteins  1 of 2", True),
    ("embed - -o o.h5", {"stdin": "closed"}, 1, "standard input is closed; give a file", False),
    ("embed - -o o/", {"stdin": "closed"}, 1, "standard input is closed; give a file", False),
    ("prepare - -o o", {"stdin": "closed"}, 1, "standard input is closed; give a file", False),
    ("variants - -o o.csv", {"stdin": "closed"}, 1, "standard input is closed; give a file", False),
    ("search ds -", {"stdin": "closed"}, 1, "standard input is closed; give a file", False),
    ("search ds g", {"stdout": "ascii"}, 0, "g\\u03b2\\x1b", False),
    ("export ds --to npy -o o.npy", {"stdout": "ascii"}, 0, "proteins  3 of 3", True),
    ("variants good.fa -o o.csv", {"stdout": "closed", "stderr": "closed"}, 0, "", True),
    ("contacts good.fa -o o.npz --model tiny.pt", {"stdout": "closed", "stderr": "full"}, 0, "", True),
    ("info", {"stdout": "closed"}, 0, "", False),
    ("info nowhere", {"stderr": "closed"}, 1, "", False),
    ("info --help", {"stdout": "full"}, 0, "", False),
    ("info a b", {"stderr": "closed"}, 2, "", False),
]


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    (folder / "d.fa").write_text(">g\nMKTVRQ\n>g\u03b2\x1b\nMKTVRE\n>h\nKAL\n", encoding="utf-8")
    assert main(["embed", str(folder / "d.fa"), "-o", str(folder / "ds")]) == 0
    return folder / "ds"


@pytest.mark.parametrize(("line", "streams", "code", "says", "made"), STREAMS)
def test_broken_streams(forks, folder, data_set, fair_checkpoint, line, streams, code, says, made):
    (folder / "g.fa").write_text(GREEK, encoding="utf-8")
    (folder / "ds").symlink_to(data_set)
    for file in fair_checkpoint.parent.iterdir():
        (folder / file.name).symlink_to(file)
    files = {"ds", "d.fa", "g.fa", "good.fa", "tiny.pt"}
    arguments = [str(folder / a) if a in files or a.startswith("o") else a for a in line.split(" ")]
    assert forks.run(arguments, streams=streams, log=folder / "log") == code
    log = (folder / "log").read_bytes().decode("ascii", "replace")
    assert says in log and "Traceback" not in log and "codec" not in log, log
    files = [file for file in folder.rglob("*") if file.is_file() and file.relative_to(folder).parts[0].startswith("o")]
    assert bool(files) == made
    assert made or not (folder / "o").exists()
    assert not any(b"error:" in file.read_bytes() for file in files)  # nothing that is printed ends in a file


# ---- numbers and devices

HARD = [
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1e400",
    "9" * 25,
    "-" + "9" * 25,
    "9" * 5000,
    "",
    " ",
    "x",
    "1.5",
    "0x10",
    "1_0",
]


def numeric():
    for command in cli.commands():
        parser = argparse.ArgumentParser()
        command.module().add_arguments(parser)
        for action in parser._actions:
            if getattr(action.type, "__module__", "").startswith("esm_fast.cli") or action.type in (int, float):
                yield pytest.param(action, id=f"{command.name} {action.option_strings[-1]}")


@pytest.mark.parametrize("action", list(numeric()))
def test_a_number_is_finite_and_within_bounds_or_refused_in_a_line(action):
    assert action.type not in (int, float), "give it bounds: see cli/numbers.py"
    for text in HARD:
        with suppress(argparse.ArgumentTypeError):
            value = action.type(text)
            assert not isinstance(value, (int, float)) or abs(value) < 1e31, text


EXTREME = [
    "embed good.fa -o o.h5 --batch-tokens 2147483647 --max-record 2147483647",
    "embed good.fa -o o/ --unit-residues 2147483647 --batch-tokens 1",
    "embed good.fa -o o.h5 --layers 10000",
    "embed good.fa -o o.h5 --layers -10000",
    "embed good.fa -o o.h5 --threads 1025",
    "embed good.fa -o o.h5 --threads 2147483647",
    "embed good.fa -o o/ --shard 1/0",
    "embed good.fa -o o/ --shard 99999999999999999999/99999999999999999999999",
    "embed good.fa -o o/ --shard 0/99999999999999999999999",
    "extract esm1b_t6_demo good.fa o --include mean --truncation_seq_length 2147483647 --toks_per_batch 2147483647",
    "fill-mask M<mask> --top 2147483647",
    "variants good.fa -o o.csv --variants v.csv --offset 2147483647",
    "variants good.fa -o o.csv --variants v.csv --offset -2147483647",
    "prepare good.fa -o o --valid-share 1",
    "prepare good.fa -o o --valid-share 0 --max-record 1",
    "finetune good.csv -o o --task regression --learning-rate 1e30 --epochs 1",
    "finetune good.csv -o o --task regression --seed 9223372036854775807 --epochs 1",
    "finetune good.csv -o o --task regression --threads 2000",
    "pretrain good.yaml --threads 2000",
    *(f"{command} --device {device}" for command in ("embed good.fa -o o.h5", "embed good.fa -o o/ --dtype auto",
      "finetune good.csv -o o --task regression", "variants good.fa -o o.csv", "variants good.fa -o o/",
      "fill-mask M<mask>", "warmup")
      for device in ("meta", "hpu", "mps", "cuda:99", "CUDA", "gpu", "0", "cuda:-1", "xla:0")),
    "embed good.fa -o o.h5 --device ",
    "info random:esm1b_t6_demo",
    "embed good.fa -o o.h5 --model random:esm1b_t6_demo:99999999999999999999999999",
    "embed good.fa -o o.h5 --model random:esm1b_t6_demo:x",
    "embed good.fa -o o.h5 --model random:",
    "convert random:esm1b_t6_demo o.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("line", EXTREME)
def test_extreme_numbers_and_devices_work_or_are_one_line(line, folder, capsys, one_thread):
    Path("v.csv").write_text("mutant\nM1A\n")
    code, last = said(capsys, line.split(" "))
    assert code in (0, None) or last.startswith(f"esm-fast {line.split(' ')[0]}: error: "), (code, last)
    if "--device" in line:
        assert code == 1 and "cannot be used" in last


def test_memory_that_is_full_is_one_line(forks, folder):
    """Under a limit like a cluster job's, at many levels of it."""
    Path("long.fa").write_text(">t\n" + "MKTVRQERLKSIVRIL" * 3000 + "\n")
    arguments = f"embed {folder}/long.fa -o {folder}/o.h5 --pool per-residue --overlength window --layers 0 1 2 3 4 5 6"
    said = {}
    for room in (8, 60, 150, 400, 8000):
        code = forks.run(arguments.split(" "), room=room, log=folder / f"{room}.log")
        said[room] = (folder / f"{room}.log").read_text()
        assert "Traceback" not in said[room] and code == ("not enough memory" in said[room]), said[room][-600:]
        Path("o.h5").unlink(missing_ok=True)
    assert "not enough memory" in said[60] and "proteins  1 of 1" in said[8000]


WRITTEN = (
    "embed good.fa -o o.h5",
    "embed good.fa -o o/",
    "extract esm1b_t6_demo good.fa o --include mean",
    "contacts good.fa -o o.npz",
    "contacts good.fa -o o.h5",
    "variants one.fa --variants v.csv -o o.csv",
    "variants one.fa --variants v.csv -o o.csv.gz",
    "variants one.fa --variants v.csv -o o.parquet",
    "variants one.fa -o o.html",
    "report one.fa -o o.html",
    "convert esm1b_t6_demo o.safetensors",
    "export ds --to npy -o o.npy",
    "export ds --to pt -o o",
    "export ds --to uniprot-h5 -o o.h5",
    "map ds -o o.html",
)


@pytest.mark.parametrize("line", WRITTEN)
def test_an_output_that_cannot_be_written_is_named(forks, folder, data_set, line):
    """Whoever writes it, in Python, C++ or Rust: no file may have more than ten bytes."""
    (folder / "ds").symlink_to(data_set)
    Path("one.fa").write_text(">P1\nMKTVRQERLKSIVRILERSK\n")
    Path("v.csv").write_text("mutant\nM1A\nK2A\n")
    files = {"ds", "good.fa", "one.fa", "v.csv"}
    arguments = [str(folder / a) if a in files or a[:2] in ("o", "o.", "o/") else a for a in line.split(" ")]
    os.mkfifo(folder / "log")
    log = os.open(folder / "log", os.O_RDWR | os.O_NONBLOCK)
    try:
        code = forks.run(arguments, largest=10, log=folder / "log")
        said = os.read(log, 1 << 16).decode().splitlines()
    finally:
        os.close(log)
    (line,) = [text for text in said if ": error: " in text] or [said]
    assert (code, "File too large; raise the limit" in line) == (1, True), line
    assert re.search(rf"error: {folder}/o[./\w]*: ", line), line
    assert not [path for path in folder.rglob("*") if path.name.endswith(".partial")]


def test_a_pipe_or_a_device_is_written_to_without_force(folder):
    """Nothing of it is lost; a file would be."""
    os.mkfifo("o.h5")
    assert common.output_path("o.h5", force=False) == Path("o.h5") and common.output_path("/dev/null", force=False)
    with pytest.raises(common.InputError, match="good.fa exists; give --force"):
        common.output_path("good.fa", force=False)
