"""Every buffer of kernels and ops names its dtype and its device: one that follows torch.set_default_dtype, or a device
context of the caller's, would be handed to a kernel that reads and writes it as something else."""

import ast
from pathlib import Path

import pytest
import torch

import esm_fast

ROOT = Path(__file__).resolve().parents[2]
MAKERS = {"arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones",
          "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros"}  # fmt: skip
FOLDERS = ("kernels", "esm_fast/ops", "esm_fast/formats")


def unnamed(text: str) -> list[tuple[int, str]]:
    """(line, call) of torch's makers of tensors that leave dtype or device to the process."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        if of_torch and node.func.attr in MAKERS and not {"dtype", "device"} <= {k.arg for k in node.keywords}:
            found.append((node.lineno, ast.unparse(node)))
    return found


def test_every_buffer_names_its_dtype_and_device():
    wrong = [(str(path.relative_to(ROOT)), *call) for folder in FOLDERS
             for path in sorted((ROOT / folder).rglob("*.py")) for call in unnamed(path.read_text())]  # fmt: skip
    assert not wrong


def test_the_lint_bites():
    assert unnamed("out = torch.empty(3, dtype=torch.float32)") and unnamed("torch.zeros(3, device='cpu')")
    assert not unnamed("torch.arange(3, dtype=torch.int64, device=x.device); x.new_empty(3); np.empty(3)")


@pytest.fixture
def restored():
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_process_default_dtype_changes_no_number(dtype, restored):
    model, alphabet = esm_fast.load("esm1b_t6_demo")
    proteins = [("a", "MKTVRQERLKSIVRILERSK"), ("b", "KALTARQQEVF")]
    tokens = alphabet.get_batch_converter()(proteins)[2]

    def everything():
        arrays = dict(esm_fast.embed(model, proteins))
        out = model(tokens, repr_layers=[0, 6])
        model.zero_grad()
        model(tokens)["logits"].square().mean().backward()
        gradient = model.layers[0].fc1.weight.grad.clone()
        kept = [out["logits"], out["representations"][0], gradient]
        return [torch.from_numpy(arrays[name][-1]) for name in "ab"] + [tensor.detach() for tensor in kept]

    before = everything()
    torch.set_default_dtype(dtype)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, everything(), strict=True))
