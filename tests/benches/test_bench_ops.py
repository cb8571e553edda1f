"""The bench of the ops: every op's cases come from its contract; a kernel that computes something else is not timed."""

import dataclasses
import json

import pytest

from esm_fast.ops import OPS, registry


@pytest.fixture
def bench():
    import bench_ops

    return bench_ops


def test_cases_and_backends_are_the_contracts(bench, tmp_path):
    asked = ["--tiny", "--rounds", "1", "--dtype", "float32", "--ops", "pool", "masked_softmax", "--json"]
    assert bench.main([*asked, str(tmp_path / "ops.json")]) == 0
    rows = json.loads((tmp_path / "ops.json").read_text())["rows"]
    for name in ("pool", "masked_softmax"):
        told = {(row["case"], row["backend"]) for row in rows if row["op"] == name}
        backends = [kernel.backend for kernel in registry.kernels(name)]
        assert told == {(case.name, backend) for case in OPS[name].cases() for backend in backends}
    assert all(("reasons" in row) != (row.get("ms", 0) > 0) for row in rows)


def test_8_bits_beside_bf16(bench, capsys):
    assert bench.main(["--tiny", "--rounds", "1", "--dtype", "int8", "--ops", "gelu_ffn"]) == 0
    assert "int8" in capsys.readouterr().out


def test_a_kernel_that_computes_something_else_is_not_timed(bench, monkeypatch):
    wrong = [
        dataclasses.replace(kernel, forward=lambda *given, right=kernel.forward: right(*given) * 1.01)
        if kernel.backend == "cpu"
        else kernel
        for kernel in registry.kernels("pool")
    ]
    monkeypatch.setitem(registry._KERNELS, "pool", wrong)
    with pytest.raises(AssertionError, match="pool on cpu, case .*, not timed"):
        bench.main(["--tiny", "--rounds", "1", "--ops", "pool"])
