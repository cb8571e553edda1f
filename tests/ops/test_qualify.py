"""Qualification: toys that are right, wrong, crash and hang; files that are damaged or foreign; the CPU for real."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy_kernels

import esm_fast
from esm_fast import ops
from esm_fast.cli import main
from esm_fast.inference import qualify as qualification
from esm_fast.inference.qualify import Asked, qualify
from esm_fast.ops import registry, verdicts

OP = toy_kernels.OP
KEY = f"{OP}/float32/0/forward"


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """toys(names) -> the entry of the op after qualifying on a machine that has these."""
    monkeypatch.setenv("ESM_FAST_VERDICTS", str(tmp_path / "verdicts"))
    here = str(Path(toy_kernels.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    registry.backends()
    kernels = dict(registry._KERNELS)
    monkeypatch.setattr(registry, "_KERNELS", kernels)
    verdicts.forget()

    def run(*names, limit=120.0, key=KEY, **more):
        kernels[OP] = [kernel for kernel in kernels[OP] if kernel.backend not in toy_kernels.TOYS]
        toy_kernels.register(kernels, names)
        return qualify(Asked("cpu", ("float32",), ops=(OP,), limit=limit, modules=("toy_kernels",), **more))[key]

    yield run
    verdicts.forget()


def request(dtype=torch.float32):
    return registry.request_of(torch.device("cpu"), dtype=dtype)


def test_what_is_wrong_is_rejected_and_what_is_fastest_chosen(toys):
    entry = toys(*(name for name in toy_kernels.TOYS if name != "toy_hang"))
    outcomes = {name: outcome for name, (outcome, _) in entry["backends"].items()}
    assert outcomes.pop("toy_crash") == "crashed" and outcomes.pop("toy_irreproducible") == "irreproducible"
    assert outcomes.pop("toy_batch") == "batch-dependent" == outcomes.pop("toy_neighbour")
    rejected = {name for name, outcome in outcomes.items() if outcome == "wrong"}
    assert rejected == {"toy_wrong", "toy_nan", "toy_last_row", "toy_raises"}
    assert entry["winner"] == "toy_fast" and ops.select(OP, request()).backend == "toy_fast"
    said = dict(ops.explain(OP, request()))
    assert said["toy_fast"] == [] and said["toy_slow"] == ["measured 3.00 x the time of toy_fast here"]
    assert said["toy_crash"] == ["crashed here: signal 11"] and "wrong here" in said["toy_nan"][0]
    assert ops.select(OP, request(), "reference").backend == "reference"  # by name it runs
    assert ops.select(OP, request(torch.bfloat16)).backend != "toy_fast"  # of which there is no verdict


def test_training_is_qualified_by_itself(toys):
    """A backward that is wrong rules a kernel out of training alone."""
    names = ("toy_wrong_grad", "toy_fast")
    entry = toys(*names, grads=(False, True), key=f"{OP}/float32/0/grad")
    assert entry["backends"]["toy_wrong_grad"][0] == "wrong" and "gradient of" in entry["backends"]["toy_wrong_grad"][1]
    assert entry["winner"] == "toy_fast" and ops.select(OP, request()._replace(grad=True)).backend == "toy_fast"
    forward = verdicts.read(verdicts.identity("cpu"))[KEY]
    assert forward["backends"]["toy_wrong_grad"][0] == "proven" and forward["winner"] == "toy_fast"


def test_less_than_the_margin_changes_nothing(toys):
    entry = toys("toy_near")
    assert entry["winner"] == entry["default"] == ops.select(OP, request()).backend


def test_two_writers_keep_each_others_verdicts(tmp_path):
    entry = {"winner": "reference", "default": "reference", "seconds": 1.0, "backends": {}}
    code = (
        "import sys; from esm_fast.ops import verdicts; machine = verdicts.identity('cpu')\n"
        f"for n in range(40): verdicts.update(machine, {{f'pool/float32/{{n}}/{{sys.argv[1]}}': {entry}}})"
    )
    environment = os.environ | {"ESM_FAST_VERDICTS": str(tmp_path)}
    writers = [subprocess.Popen([sys.executable, "-c", code, way], env=environment) for way in ("grad", "forward")]
    assert [writer.wait() for writer in writers] == [0, 0]
    (path,) = tmp_path.glob("*.json")
    assert len(verdicts.read_json(path)["verdicts"]) == 80


def test_a_hang_is_a_verdict_and_is_not_tried_again_unasked(toys):
    assert toys("toy_hang", "toy_fast", limit=8.0)["backends"]["toy_hang"] == ("hung", "no answer within 8 s")
    entry = toys("toy_hang", "toy_fast", limit=0.001)  # would not do for any that is tried
    assert entry["backends"]["toy_hang"][0] == "hung" and entry["backends"]["toy_hang"][1] == "no answer within 8 s"


def test_what_a_kill_left_is_not_believed(toys, monkeypatch):
    """Killed while a kernel was tried: what was tried is known by name, and everything runs as before."""

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(qualification._Child, "answer", killed)
    with pytest.raises(KeyboardInterrupt):
        toys("toy_fast")
    tried = [
        b for b, (outcome, _) in verdicts.read(verdicts.identity("cpu"))[KEY]["backends"].items() if outcome == "trying"
    ]
    assert len(tried) == 1 and ops.select(OP, request()).backend not in toy_kernels.TOYS


@pytest.mark.parametrize("change", ["damaged", "no object", "foreign", "stale", "off", "read-only"])
def test_only_whole_verdicts_of_this_machine_count(toys, monkeypatch, capsys, change):
    toys("toy_fast")
    path = verdicts.path_of(verdicts.identity("cpu"))
    if change == "damaged":
        path.write_bytes(path.read_bytes().replace(b"toy_fast", b"toy_slow", 1))
    elif change == "no object":
        path.write_text("[]")
    elif change == "foreign":
        content = verdicts.read_json(path)
        verdicts.write_json(path, content | {"machine": content["machine"] | {"name": "another"}})
    elif change == "stale":
        monkeypatch.setattr(verdicts, "sources", lambda: "others")
    elif change == "off":
        monkeypatch.setenv("ESM_FAST_VERDICTS", "off")
    else:
        monkeypatch.setenv("ESM_FAST_VERDICTS", "/proc/none")
        assert main(["qualify", "--device", "cpu"]) == 1
    verdicts.forget()
    assert ops.select(OP, request()).backend not in toy_kernels.TOYS
    assert ("are ignored" in capsys.readouterr().err) == (change in ("damaged", "no object", "foreign"))


def test_a_data_set_keeps_the_kernels_it_began_with(toys, tmp_path, monkeypatch):
    (tmp_path / "p.fasta").write_text("".join(f">p{n}\nMKTVRQERLKSIVRIL{'ACDEFGHIK'[:n]}\n" for n in range(9)))
    toys("toy_fast")  # and transformer_stack would run instead of the op on a CPU
    asked = dict(model="esm1b_t6_demo", dtype="float32", device="cpu", unit_residues=60, layers=(0, 6))
    plans = {}
    for name, winner in {"a": "", "b": f"{KEY}=toy_fast transformer_stack/float32/64/forward=reference"}.items():
        monkeypatch.setattr(verdicts, "current", lambda request, winner=winner: winner)
        data = esm_fast.build_dataset(tmp_path / "p.fasta", tmp_path / name, **asked)
        plans[name] = data.plan.settings.kernels
    assert plans == {"a": "", "b": f"{KEY}=toy_fast transformer_stack/float32/64/forward=reference"}
    wanted = {p.name: p.read_bytes() for p in (tmp_path / "a/pooled").iterdir()}
    (tmp_path / "a/run.json").unlink()
    sorted((tmp_path / "a/pooled").glob("part-*"))[0].unlink()
    esm_fast.build_dataset(tmp_path / "p.fasta", tmp_path / "a", **asked)  # with other verdicts than it began with
    assert {p.name: p.read_bytes() for p in (tmp_path / "a/pooled").iterdir()} == wanted
    assert '"kernels"' not in (tmp_path / "a/plan.json").read_text()  # as older versions wrote it


def test_a_data_set_is_not_resumed_by_other_kernels(toys, tmp_path, monkeypatch, capsys):
    """Begun on a machine whose kernels this one lacks; a query says that others compute it."""
    toys("toy_fast")
    fasta = tmp_path / "p.fasta"
    fasta.write_text("".join(f">p{n}\nMKTVRQERLKSIVRIL{'ACDEFGHIK'[:n]}\n" for n in range(9)))
    begun = f"{KEY}=toy_fast transformer_stack/float32/64/forward=reference"
    monkeypatch.setattr(verdicts, "current", lambda request: begun)
    asked = dict(model="esm1b_t6_demo", dtype="float32", device="cpu", unit_residues=60)
    esm_fast.build_dataset(fasta, tmp_path / "a", **asked)
    monkeypatch.undo()  # this machine has no toys, and no verdicts
    verdicts.forget()
    assert main(["search", str(tmp_path / "a"), str(fasta), "-k", "1"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 10 and "the query is computed by other kernels than the data set" in err
    (tmp_path / "a/run.json").unlink()
    sorted((tmp_path / "a/pooled").glob("part-*"))[0].unlink()
    with pytest.raises(ops.BackendError, match="begun on backend 'toy_fast', which cannot run here"):
        esm_fast.build_dataset(fasta, tmp_path / "a", **asked)
    command = ["embed", str(fasta), "-o", f"{tmp_path}/a/", "--model", "esm1b_t6_demo", "--dtype", "float32"]
    assert main([*command, "--device", "cpu", "--unit-residues", "60"]) == 1
    assert "begun on backend 'toy_fast'" in capsys.readouterr().err


def test_a_query_is_computed_as_its_data_set_was(toys, tmp_path, monkeypatch, capsys):
    used = []
    toys("toy_fast")
    fasta = tmp_path / "p.fasta"
    fasta.write_text(">a\nMKTVRQERLKSIVRIL\n>b\nMKTVWWERLKSI\n")
    monkeypatch.setattr(verdicts, "current", lambda request: "transformer_stack/float32/64/forward=reference")
    esm_fast.build_dataset(fasta, tmp_path / "a", model="esm1b_t6_demo", dtype="float32", device="cpu")
    stack = ops.OPS["transformer_stack"]
    monkeypatch.setattr(stack.__class__, "run", _noting(used, stack.__class__.run))
    assert main(["search", str(tmp_path / "a"), str(fasta), "-k", "1"]) == 0
    assert used and set(used) == {"reference"}


def _noting(used, run):
    def noted(self, *args, **kwargs):
        used.append(ops.select("transformer_stack", request()._replace(head_dim=64)).backend)
        return run(self, *args, **kwargs)

    return noted


def test_auto_is_the_type_that_was_measured_fastest(tmp_path, monkeypatch):
    """Of the one that the machine multiplies natively, and float32; where nobody measured, the former."""
    from esm_fast.inference.dtype import as_measured

    monkeypatch.setenv("ESM_FAST_VERDICTS", str(tmp_path))
    verdicts.forget()
    assert as_measured("bfloat16", "native", "cpu") == ("bfloat16", "native")
    machine = verdicts.identity("cpu")
    for seconds, expected in ((0.5, "bfloat16"), (0.99, "float32")):
        for dtype, taken in (("bfloat16", seconds), ("float32", 1.0)):
            entry = {"winner": "cpu", "default": "cpu", "seconds": taken, "backends": {}}
            verdicts.update(machine, {f"gelu_ffn/{dtype}/0/forward": entry})
        chosen, why = as_measured("bfloat16", "native", "cpu")
        assert chosen == expected and f"measured at {seconds:.2f} x" in why
    verdicts.forget()


def test_what_was_begun_elsewhere_runs_or_says_why_not():
    with verdicts.held("gelu_ffn/float32/0/forward=cutlass"):
        with pytest.raises(ops.BackendError, match="begun on backend 'cutlass', which cannot run here"):
            ops.select(OP, request())
        assert ops.select("pool", request()).backend
    with pytest.raises(ValueError, match="no choice of kernels"), verdicts.held("nonsense"):
        pass


@pytest.mark.parametrize("level", ["amx", "avx2"])
def test_this_cpu_for_real(tmp_path, level):
    from esm_fast import _C

    if level not in _C.isas():
        pytest.skip(f"no {level} here")
    code = (
        "import sys; from esm_fast.inference.qualify import Asked, qualify\n"
        "asked = Asked('cpu', ('bfloat16',), ops=('pool', 'contact_map', 'attention_varlen'), head_dims=(64, 24))\n"
        "found = qualify(asked, print)\n"
        "assert [o[0] for e in found.values() for o in e['backends'].values()] == ['proven'] * 10, found"
    )
    environment = os.environ | {"ESM_FAST_ISA": level, "ESM_FAST_VERDICTS": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_user_without_a_home_has_no_verdicts(monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    for name in ("ESM_FAST_VERDICTS", "ESM_FAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    verdicts.forget()
    assert verdicts.folder() is None and ops.select(OP, request()).backend  # where it raised, no op ran
    verdicts.forget()
