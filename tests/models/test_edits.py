"""Whoever writes into a plain model's weights sees it in the next call, however it was done; others pay nothing."""

import copy

import numpy as np
import pytest
import torch
from esm_fast.kernels.cpu import weights as prepacking

import esm_fast
from esm_fast import _C, edits, weights
from esm_fast.formats.weight import PrepackedWeight
from esm_fast.models.esm1 import Config

PROTEIN = [("a", "MKTVRQERLKSIVRILERSKEPVSG")]


def small():
    from esm_fast.models.padded import api_class

    torch.manual_seed(0)
    config = Config(layers=2, embed_dim=48, ffn_embed_dim=96, attention_heads=4)
    return api_class(config)(config).eval()


def embedded(model):
    return dict(esm_fast.embed(model, PROTEIN))["a"][-1]


def train(weight, kind, **options):
    weight.grad = torch.ones_like(weight)
    kind([weight], lr=0.1, **options).step()


EDITS = {
    "data": lambda w: w.data.__setitem__(3, 0),
    "detach": lambda w: w.detach()[3].zero_(),
    "numpy": lambda w: w.detach().numpy().__setitem__(3, 0),
    "array": lambda w: np.asarray(w.data).__setitem__(3, 0),
    "dlpack": lambda w: np.from_dlpack(w.detach()).__setitem__(3, 0),
    "torch dlpack": lambda w: torch.from_dlpack(w.detach())[3].zero_(),
    "storage": lambda w: w.untyped_storage().fill_(0),
    "buffer": lambda w: np.frombuffer(memoryview(w.detach().numpy()), np.float32).__setitem__(3, 9),
    "another tensor": lambda w: setattr(w, "data", torch.zeros_like(w)),
    "out": lambda w: torch.add(w.detach(), 1, out=w.data),
    "no_grad": lambda w: torch.no_grad()(w.mul_)(2),
    "sgd": lambda w: train(w, torch.optim.SGD),
    "adam": lambda w: train(w, torch.optim.AdamW),
    "fused": lambda w: train(w, torch.optim.AdamW, fused=True),
    "foreach": lambda w: torch._foreach_mul_([w.data], 2.0),
    "one element": lambda w: w.data.view(-1)[-1:].add_(1),
}


def require_seen(model, edit):
    """The model computes what a new one with its weights does, and something else than before."""
    before = embedded(model)
    edit(model.layers[1].fc1.weight)
    fresh = small()
    fresh.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
    after = embedded(model)
    assert np.array_equal(after, embedded(fresh)) and not np.array_equal(after, before)


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_every_edit_is_seen_at_once_and_again(edit):
    model = small()
    embedded(model)
    require_seen(model, edit)
    require_seen(model, lambda w: w.data.add_(0.5))
    require_seen(model, lambda w: w.detach().numpy().__setitem__(5, 0))


@pytest.mark.parametrize("share", [torch.Tensor.numpy, np.asarray, np.from_dlpack, torch.from_dlpack, lambda w: w[2:]])
@pytest.mark.parametrize("early", [True, False])
def test_memory_shared_with_others_is_read_in_every_call(share, early):
    """The writer took its view before the first call, or between two, and writes between later ones."""
    model = small()
    if not early:
        embedded(model)
    view = share(model.layers[1].fc1.weight.detach())
    for row in range(3):
        embedded(model)
        require_seen(model, lambda w, row=row: view.__setitem__(row, row + 1.0))


@pytest.mark.parametrize("share", [torch.Tensor.numpy, torch.from_dlpack, lambda w: w, lambda w: w[2:]])
@pytest.mark.parametrize("frozen", [False, True])
def test_mapped_memory_that_somebody_holds_stays(share, frozen, tmp_path):
    weights.save(small(), tmp_path / "m.safetensors")
    model, _ = esm_fast.load(tmp_path / "m.safetensors")
    weight = model.requires_grad_(not frozen).layers[1].fc1.weight
    view = share(weight if frozen else weight.detach())
    for row in range(5):
        embedded(model)
        require_seen(model, lambda w, row=row: view.__setitem__(row, row + 1.0))


def test_memory_of_others_is_read_in_every_call(tmp_path):
    """NumPy's, and what another process could write."""
    model, array = small(), np.random.default_rng(0).normal(size=(96, 48)).astype(np.float32)
    model.layers[1].fc1.weight.data = torch.from_numpy(array)
    embedded(model)
    require_seen(model, lambda w: array.__setitem__(3, 0))
    shared = model.share_memory()
    embedded(shared)
    require_seen(shared, lambda w: w.data.__setitem__(7, 1))


def test_weights_that_change_places_are_seen():
    model = small()
    embedded(model)
    first, second = model.layers[0].fc1.weight, model.layers[1].fc1.weight
    require_seen(model, lambda w: (setattr(second, "data", first.data), embedded(small())))


@pytest.mark.parametrize("kind", ["made", "copied", "safetensors"])
def test_nobody_reads_weights_that_nobody_could_have_written(kind, tmp_path, monkeypatch):
    model = small()
    if kind == "copied":
        embedded(model)
        model = copy.deepcopy(model)
    elif kind == "safetensors":
        weights.save(model, tmp_path / "m.safetensors")
        model, _ = esm_fast.load(tmp_path / "m.safetensors")
        embedded(model)
        embedded(model)  # the third call brings them into memory
    embedded(model)
    read = []
    monkeypatch.setattr(prepacking, "_C", _Reads(read))
    for _ in range(3):
        embedded(model)
    assert read == []
    esm_fast.repack(model)
    embedded(model)
    assert len(read) > 10
    read.clear()
    embedded(model)
    assert read == []


class _Reads:
    def __init__(self, read):
        self.read = read

    def checksums(self, rows):
        self.read += rows
        return _C.checksums(rows)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("calls", [0, 1, 4])
def test_parameters_may_be_swapped(loaded, calls, tmp_path):
    """As `module.to` and `load_state_dict` do where torch is told to: a weak reference to one would forbid it."""
    model = small()
    if loaded:
        weights.save(model, tmp_path / "m.safetensors")
        model, _ = esm_fast.load(tmp_path / "m.safetensors")
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for _ in range(calls):
            embedded(model)
        first = model.layers[1].fc1.weight
        for dtype in (torch.float64, torch.float32):
            model.to(dtype)
            assert model.layers[1].fc1.weight is first  # it was swapped, not replaced
        require_seen(model, lambda w: w.data.add_(0.5))
        other = {name: value * 1.5 for name, value in model.state_dict().items()}
        require_seen(model, lambda w: model.load_state_dict(other))
        require_seen(model, lambda w: torch.utils.swap_tensors(w, torch.nn.Parameter(w.detach() * 2)))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    for _ in range(2):
        other = {name: value / 2 for name, value in other.items()}
        require_seen(model, lambda w: model.load_state_dict(other, assign=True))  # noqa: B023
        require_seen(model, lambda w: other["layers.1.fc1.weight"].mul_(2))  # noqa: B023, which is the parameter's memory


def test_matrices_of_one_memory_are_prepacked_each():
    square = torch.randn(64, 64)
    views = (square, square.T, square[:32], square[32:], square[16:48])
    for found, wanted in zip(prepacking.prepacked(*views), views, strict=True):
        assert torch.equal(PrepackedWeight(found).unpack(), wanted)


def test_parameters_that_are_parts_of_one_buffer():
    """As training divides them (`train.sharded`), and others' flat parameters: each has its own values."""
    model, parts = small(), copy.deepcopy(small())
    flat = torch.cat([p.detach().flatten() for p in parts.parameters()])
    pieces = flat.split([p.numel() for p in parts.parameters()])
    for parameter, piece in zip(parts.parameters(), pieces, strict=True):
        parameter.data = piece.view_as(parameter)
    for _ in range(4):
        parts.load_state_dict(model.state_dict())
        np.testing.assert_array_equal(embedded(parts), embedded(model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)


def test_a_parameter_that_is_set_to_another_part_of_its_memory():
    model = small()
    weight = model.layers[1].fc1.weight
    weight.data = torch.cat([weight.detach(), weight.detach() * 2])[: len(weight)]
    require_seen(model, lambda w: setattr(w, "data", w.data.as_strided(w.shape, w.stride(), w.numel())))


def test_what_cannot_be_watched():
    for tensor in (torch.from_numpy(np.zeros((2, 2))), torch.zeros(0), torch.zeros(2, device="meta")):
        assert edits.watch(tensor) is None
    tensor = torch.zeros(4, 4)
    tensor.numpy()
    assert edits.watch(tensor) is None and edits.watch(torch.zeros(4, 4)[1:]) is None  # another tensor has it, too
    assert edits.watch(torch.zeros(4, 4)) is not None
