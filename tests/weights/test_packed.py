"""Packed weights: the same numbers as the matrix they came from, whatever asks for them, and never changed."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

import esm_fast
from esm_fast import _C
from esm_fast.formats.model import prepack_model
from esm_fast.formats.weight import MATRICES, PrepackedWeight
from esm_fast.sequences.batching import pack_padded

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(70, 37), (32, 64), (1, 1), (33, 130)]
TOKENS = torch.tensor([[0, 20, 15, 32, 11, 7, 2], [0, 5, 5, 5, 2, 1, 1]])


def matrix(shape=(70, 37), dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def packed_linear(dtype=torch.bfloat16):
    """A linear layer with a prepacked weight, and the plain weight."""
    linear = nn.Linear(37, 70, dtype=dtype).requires_grad_(False)
    plain = linear.weight.clone()
    linear.weight = nn.Parameter(PrepackedWeight.pack(plain), requires_grad=False)
    return linear, plain


# --- the bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_goes_round(shape, dtype):
    plain = matrix(shape, dtype)
    packed = PrepackedWeight.pack(plain)
    name = str(dtype).removeprefix("torch.")
    assert (packed.weights.out, packed.weights.in_, packed.weights.dtype) == (*shape, name)
    assert packed.weights.nbytes == _C.prepacked_size(name, *shape) >= plain.nbytes
    assert packed.shape == plain.shape and packed.dtype == dtype and torch.equal(packed.unpack(), plain)
    assert torch.equal(PrepackedWeight.pack(plain.t().contiguous().t()).unpack(), plain)


def aligned(data: bytes, shift=0) -> memoryview:
    room = np.zeros(len(data) + 64 + shift, dtype=np.uint8)
    start = -room.ctypes.data % 64 + shift
    room[start : start + len(data)] = np.frombuffer(data, dtype=np.uint8)
    return memoryview(room)[start : start + len(data)]


def test_packed_bytes_can_be_viewed_where_they_lie():
    plain = matrix()
    weights = PrepackedWeight.pack(plain).weights
    data = bytes(weights)
    assert len(data) == weights.nbytes and memoryview(weights).readonly
    room = aligned(data)
    view = PrepackedWeight(_C.view_weights(room, "bfloat16", 70, 37))
    address = np.frombuffer(room, dtype=np.uint8).ctypes.data
    assert np.frombuffer(view.weights, dtype=np.uint8).ctypes.data == address
    del room  # the view keeps it
    assert torch.equal(view.unpack(), plain)


def test_bytes_that_cannot_be_the_matrix_are_refused():
    data = bytes(PrepackedWeight.pack(matrix()).weights)
    for wrong, message in [
        (aligned(data[:-1]), "70 x 37 takes .* contiguous bytes, these are"),
        (aligned(data + b"\0"), "70 x 37 takes .* contiguous bytes, these are"),
        (aligned(data, shift=8), "aligned to 64 bytes"),
        (aligned(data * 2)[::2], "contiguous"),
        (np.frombuffer(aligned(data), dtype=np.uint8).reshape(2, -1), "contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            _C.view_weights(wrong, "bfloat16", 70, 37)
    with pytest.raises(ValueError, match="out must be from 0 to"):
        _C.view_weights(aligned(data), "bfloat16", -70, 37)
    with pytest.raises(ValueError, match="not float16"):
        _C.view_weights(aligned(data), "float16", 70, 37)


# --- as a tensor -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_computes_with_it(dtype):
    linear, plain = packed_linear(dtype)
    x = matrix((5, 37), dtype)
    wanted = nn.functional.linear(x, plain, linear.bias)
    assert torch.equal(linear(x), wanted)
    with torch.inference_mode():
        assert torch.equal(linear(x), wanted)
    weight = linear.weight
    assert torch.equal(weight.float(), plain.float()) and torch.equal(weight.t(), plain.t())
    assert torch.equal(weight[3:5, 7], plain[3:5, 7]) and weight[2, 3].item() == plain[2, 3].item()
    assert weight.tolist() == plain.tolist() and torch.equal(torch.cat([weight, weight]), torch.cat([plain, plain]))
    assert torch.equal(torch.zeros_like(plain).copy_(weight), plain)
    assert isinstance(weight.detach(), PrepackedWeight) and isinstance(weight.data, PrepackedWeight)
    assert np.array_equal(PrepackedWeight.pack(plain.float()).numpy(), plain.float().numpy())
    assert np.array_equal(np.asarray(PrepackedWeight.pack(plain.float())), plain.float().numpy())
    assert torch.equal(torch.from_dlpack(PrepackedWeight.pack(plain)), plain)
    assert "70 x 37" in repr(weight)


def test_gradients_flow_through_it_to_the_input():
    linear, plain = packed_linear(torch.float32)
    x = matrix((5, 37), torch.float32).requires_grad_()
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, plain.sum(0).expand(5, -1))
    assert linear.weight.grad is None


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: linear.weight.mul_(2),
        lambda linear: nn.init.normal_(linear.weight),
        lambda linear: linear.weight.__setitem__(0, 1.0),
        lambda linear: torch.add(linear.weight.unpack(), 1, out=linear.weight),
        lambda linear: torch._foreach_mul_([linear.weight], 2),
        lambda linear: linear.load_state_dict({"weight": torch.ones(70, 37), "bias": torch.ones(70)}),
        lambda linear: linear.requires_grad_(True),
        lambda linear: setattr(linear.weight, "requires_grad", True),
        lambda linear: nn.Parameter(linear.weight),
    ],
)
def test_nothing_changes_or_trains_it(change):
    linear, plain = packed_linear()
    with pytest.raises(RuntimeError, match="packed for inference.*load the model with packed=False"):
        change(linear)
    assert torch.equal(linear.weight.unpack(), plain) and not linear.weight.requires_grad


def test_it_shows_no_memory_it_does_not_have():
    for reach in (torch.Tensor.data_ptr, torch.Tensor.untyped_storage, torch.Tensor.share_memory_):
        with pytest.raises(RuntimeError, match="take that of its unpack"):
            getattr(packed_linear()[0].weight, reach.__name__)()


def test_copies_share_it_and_files_hold_the_matrix():
    linear, plain = packed_linear()
    copied = copy.deepcopy(linear)
    assert copied.weight.weights is linear.weight.weights and isinstance(copied.weight, nn.Parameter)
    for content in (linear, linear.state_dict()):
        file = io.BytesIO()
        torch.save(content, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        weight = again.weight if content is linear else again["weight"]
        assert torch.equal(weight, plain) and not isinstance(weight, PrepackedWeight)
    other = nn.Linear(37, 70, dtype=torch.bfloat16)
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other.weight, plain)
    other.requires_grad_(False).load_state_dict(linear.state_dict(), assign=True)
    assert other.weight.weights is linear.weight.weights


def test_a_module_converts_it():
    linear, plain = packed_linear()
    linear.to(torch.float32)
    assert isinstance(linear.weight, PrepackedWeight) and linear.weight.dtype == torch.float32
    x = matrix((5, 37), torch.float32)
    assert torch.equal(linear(x), nn.functional.linear(x, plain.float(), linear.bias))
    with pytest.raises(ValueError, match="float32 or bfloat16 on the CPU, not float64"):
        linear.to(torch.float64)


# --- in a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_packed_model_computes_the_same_bits(dtype):
    """On the CPU kernels, which read the panels, and on the reference, which unpacks them."""
    batch, _ = pack_padded(TOKENS)
    for backend in ("cpu", "reference"):
        model, _ = esm_fast.load("random:esm1b_t6_demo", dtype=dtype, backend="cpu")
        packed = copy.deepcopy(model)
        prepack_model(packed)
        assert all(
            isinstance(layer.get_submodule(m).weight, PrepackedWeight) for layer in packed.layers for m in MATRICES
        )
        model.backend = packed.backend = backend
        with torch.inference_mode():
            wanted, got = (
                m.forward_packed(batch, layers=(3, 6), logits=True, attentions=True) for m in (model, packed)
            )
        assert torch.equal(got.logits, wanted.logits)
        assert all(torch.equal(got.representations[k], wanted.representations[k]) for k in (3, 6))
        assert all(torch.equal(a, b) for a, b in zip(got.attentions, wanted.attentions, strict=True))
        assert sum(p.nbytes for p in packed.parameters()) == sum(p.nbytes for p in model.parameters())


def test_a_model_that_would_not_run_packed_is_left_alone():
    for changes, reason in [
        (dict(dtype="float16"), "has float32 and bfloat16, not float16"),
        (dict(backend="reference"), "the model was loaded with backend='reference'"),
        (dict(device="meta"), "needs tensors on the CPU"),
    ]:
        model, _ = esm_fast.load("random:esm1b_t6_demo", **changes)
        with pytest.raises(ValueError, match=f"cannot be prepacked: .*{reason}"):
            prepack_model(model)
        assert not any(isinstance(p, PrepackedWeight) for p in model.parameters())
