"""What commands tell: the same facts in words and, with --json, as one object; completion made of the parsers."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import tqdm

from esm_fast import cli
from esm_fast.cli import main
from esm_fast.console.summary import Summary

SEQUENCES = [
    "MKTAYIAKQRQISFVKSHFSRQ",
    "MVLSPADKTNVKAAWGKVGAHAGEYGAEALERMFLSFPTTKTYFPHF",
    "MKWVTFISLLLLFSSAYS",
    "GSHMKK",
]


# Commands that may take long, and show how long; and those that do not, or whose lines come as they work.
LONG = """embed contacts extract variants convert warmup verify finish search export map prepare finetune predict report
fit-contacts bench pretrain qualify""".split()  # noqa: SIM905
SHORT = "fill-mask info kernels completion submit".split()  # noqa: SIM905


class Bar(tqdm.tqdm):
    made = []

    def __init__(self, *args, **options):
        self.made.append(self)
        super().__init__(*args, **options)


def told(capsys, *arguments, code=0) -> dict:
    """What the command prints on standard output, which is one object and nothing else. A long one has bars that know
    their end and come to it, and tells its time."""
    times = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tqdm, "tqdm", Bar)
        patch.setattr(Bar, "made", [])
        patch.setattr(Summary, "time", lambda *_: times.append(1))
        assert main([*map(str, arguments), "--json"]) == code
        shown = Bar.made
        for bar in shown:
            assert bar.total is not None and (code or bar.n == bar.total), (arguments, bar.desc, bar.n, bar.total)
    if arguments[0] in LONG and not code:
        assert arguments[0] == "warmup" or (shown and times), arguments  # which tells its own
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["command"] == arguments[0] and found["exit_code"] == code and found["seconds"] >= 0
    return found


def test_every_command_takes_json(capsys):
    for command in cli.commands():
        with pytest.raises(SystemExit):
            main([command.name, "--help"])
        assert "--json" in capsys.readouterr().out, command.name


def test_every_command_is_long_or_short():
    """Each that may take long has a bar in its own file or in one of the command line's that it is made of."""
    assert sorted(LONG + SHORT) == sorted(command.name for command in cli.commands())
    folder = Path(cli.__file__).parent
    for name in LONG:
        files, seen = [name.replace("-", "_")], set()
        while files:
            text = (folder / f"{(file := files.pop())}.py").read_text()
            seen |= {file}
            files += [f for f in re.findall(r"from \.(\w+) import", text) if f not in seen | {"common"}]
            if re.search(r"\b(progress|Stages|Watch)\(", text):
                break
        else:
            pytest.fail(f"{name} shows no progress")


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "in.fasta"
    path.write_text("".join(f">p{i}\n{sequence}\n" for i, sequence in enumerate(SEQUENCES)))
    return path


def test_commands_of_proteins(capsys, fair_checkpoint, fasta, tmp_path):
    model = ("--model", fair_checkpoint, "--device", "cpu")
    residues = sum(map(len, SEQUENCES))
    embedded = told(capsys, "embed", fasta, "-o", tmp_path / "o.h5", *model)
    assert (embedded["proteins"], embedded["residues"], embedded["layers"]) == (4, residues, [3])
    assert embedded["bytes"] == (tmp_path / "o.h5").stat().st_size and embedded["dtype"] in ("float32", "bfloat16")
    assert embedded["skipped"] == {"unknown residue": 0, "empty": 0, "duplicate": 0, "already done": 0}
    contacts = told(capsys, "contacts", fasta, "-o", tmp_path / "maps.npz", *model)
    assert contacts["proteins"] == 4 and contacts["dtype"] == "float32" and contacts["worth"] == {}
    extracted = told(capsys, "extract", fair_checkpoint, fasta, tmp_path / "pt", "--include", "mean", "--nogpu")
    assert extracted["residues"] == residues and len(list((tmp_path / "pt").iterdir())) == 4
    variants = told(capsys, "variants", fasta, "-o", tmp_path / "v.csv", *model)
    assert variants["rows"] == 19 * residues and variants["strategy"] == ["wt"]
    again = told(capsys, "info", fair_checkpoint)
    assert again["config"]["layers"] == 3 and again["contacts"] is True
    assert told(capsys, "convert", fair_checkpoint, tmp_path / "m.safetensors")["output"].endswith("m.safetensors")
    assert {"machine", "backends", "models", "why_not"} <= set(told(capsys, "info"))
    assert told(capsys, "kernels", "--matrix")["rows"][0]["op"]
    assert told(capsys, "warmup", "--model", "random:esm1b_t6_demo", "--device", "cpu")["compiled"] == {}


def test_qualify_shows_how_far_it_is(capsys, tmp_path, monkeypatch):
    """As its children answer; what they do is tested beside the ops."""

    def answered(tasks, asked, trying):
        yield from ((task, ["proven", "without running"]) for task in tasks)

    monkeypatch.setenv("ESM_FAST_VERDICTS", str(tmp_path))
    monkeypatch.setattr("esm_fast.inference.qualify.run", answered)
    found = told(capsys, "qualify", "--device", "cpu", "--dtype", "float32")
    assert found["qualified"] > 5 and found["failed"] == [] and Path(found["output"]).parent == tmp_path


def test_commands_of_data_sets(capsys, fair_checkpoint, fasta, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    folder = tmp_path / "set"
    made = told(capsys, "embed", fasta, "-o", f"{folder}/", "--model", fair_checkpoint, "--device", "cpu")
    assert made["proteins"] == made["sequences"] == 4 and made["failed"] == {} and made["shares"] == 1
    for name in ("verify", "finish"):
        found = told(capsys, name, folder)
        assert found["problems"] == [] and found["finished"] is True and found["status"] == {"ok": 4}
    hits = told(capsys, "search", folder, "p2", "-k", 2)["hits"]
    assert hits[0]["id"] == "p2" and hits[0]["cosine"] == pytest.approx(1) and [hit["rank"] for hit in hits] == [1, 2]
    assert told(capsys, "export", folder, "--to", "npy", "-o", tmp_path / "a.npy")["proteins"] == 4
    assert told(capsys, "map", folder, "-o", tmp_path / "a.html")["proteins"] == 4
    next(folder.rglob("*.parquet")).unlink()
    assert len(told(capsys, "verify", folder, code=1)["problems"]) == 1


def test_commands_of_models(capsys, fair_checkpoint, fasta, tmp_path):
    assert told(capsys, "prepare", fasta, "-o", tmp_path / "store")["train"]["proteins"] == 4
    rows = [f"{sequence[at:]},{len(sequence) - at}" for sequence in SEQUENCES for at in range(5)]
    (tmp_path / "t.csv").write_text("\n".join(["sequence,label", *rows]) + "\n")
    asked = ("finetune", tmp_path / "t.csv", "-o", tmp_path / "p", "--task", "regression", "--model", fair_checkpoint)
    fitted = told(capsys, *asked, "--device", "cpu")
    assert fitted["counts"]["train"] == 16 and "test" in fitted and fitted["bytes"] > 0
    predicted = told(capsys, "predict", tmp_path / "p", fasta, "-o", tmp_path / "p.csv", "--device", "cpu")
    assert predicted["proteins"] == 4 and predicted["dtype"] == "float32"
    again = (
        "predict",
        tmp_path / "p",
        fasta,
        "-o",
        tmp_path / "p.csv",
        "--device",
        "cpu",
        "--dtype",
        "auto",
        "--force",
    )
    assert told(capsys, *again)["dtype"] in ("float32", "bfloat16")


def test_an_error_prints_no_object(capsys, tmp_path):
    assert main(["embed", str(tmp_path / "none.fasta"), "-o", str(tmp_path / "o.h5"), "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "error:" in err


def test_what_a_library_prints_is_not_in_the_object(capsys):
    summary = Summary("x", as_json=True)
    with summary.speaking():
        print("noise")
        summary.say("one line", count=3, share=math.nan)
    summary.end(0)
    out, err = capsys.readouterr()
    assert json.loads(out) | {"seconds": 0} == {"command": "x", "count": 3, "share": None, "seconds": 0, "exit_code": 0}
    assert err == "noise\n"
    summary = Summary("x")
    summary.say("one line", count=3)
    summary.end(0)
    assert capsys.readouterr().out == "one line\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_of_several_processes_one_tells(capsys, as_json):
    summary = Summary("x", as_json=as_json)
    summary.heard = False
    summary.say("one line", count=3)
    summary.end(75)
    assert capsys.readouterr().out == ""


def test_shells_complete_every_command(capsys, tmp_path):
    pytest.importorskip("shtab", reason="shtab is not installed")
    for shell in ("bash", "zsh", "tcsh"):
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert all(command.name in script for command in cli.commands())
        (tmp_path / shell).write_text(script)
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    ask = """source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_esm_fast "$1" "${@: -1}" "${@: -2:1}"
    printf '%s ' "${COMPREPLY[@]}\""""
    cases = {("fit",): "fit-contacts", ("embed", "--overl"): "--overlength", ("embed", "--dtype", "bf"): "bfloat16"}
    cases[("contacts", str(tmp_path / "ba"))] = str(tmp_path / "bash")
    for words, wanted in cases.items():
        command = ["bash", "-c", ask, "ask", str(tmp_path / "bash"), "esm-fast", *words]
        found = subprocess.run(command, capture_output=True, text=True)
        assert wanted in found.stdout.split(), (words, found)
