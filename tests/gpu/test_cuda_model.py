"""A whole model on the CUDA backend, on the emulator: logits, contacts and gradients under the tolerance rule."""

import copy

import pytest
import torch
import torch.nn.functional as F
from esm_fast.kernels.cuda.launch import SCALARS
from fakes import trained_like

import esm_fast
from esm_fast.models.esm1 import Config
from esm_fast.ops import verify

pytestmark = pytest.mark.usefixtures("emulated")
LENGTHS = (5, 17, 34)


def results(model, tokens, targets) -> dict[str, torch.Tensor]:
    """Logits of the residues, contacts, and the gradient of every parameter that the loss depends on."""
    with torch.no_grad():
        contacts = model.predict_contacts(tokens)
    logits = model(tokens)["logits"]
    rows = logits[targets >= 0]
    F.cross_entropy(rows.to(torch.promote_types(rows.dtype, torch.float32)), targets[targets >= 0]).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": rows.detach(), "contacts": contacts} | grads


@pytest.mark.parametrize("dtype", list(SCALARS), ids=SCALARS.get)
def test_logits_and_gradients(dtype, emulated):
    model = trained_like(esm_fast.ProteinBertModel(Config(2, 32, 64, 2)), 0).to(dtype)
    launched = watched(emulated)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((len(LENGTHS), max(LENGTHS)), model.alphabet.padding_idx)
    for row, length in zip(tokens, LENGTHS, strict=True):
        row[:length] = torch.randint(4, 24, (length,), generator=generator)
    targets = torch.where(tokens == model.alphabet.padding_idx, -100, tokens)

    models = {backend: copy.deepcopy(model) for backend in ("cuda", "reference", "truth")}
    models["truth"].double()
    found = {}
    for name, one in models.items():
        one.backend = "cuda" if name == "cuda" else "reference"
        found[name] = results(one, tokens, targets)
    names = list(found["truth"])
    assert list(found["cuda"]) == names
    assert {"attention_forward_64", "attention_backward_q_64", "attention_backward_kv_64"} <= launched
    assert {"contact_map_lse_64", "contact_map_sums_64", "contact_map_tiles_64"} <= launched
    assert {"embedding_forward", "bias_gelu_backward", "layer_norm_backward"} <= launched
    lists = [[found[name][key] for key in names] for name in ("cuda", "reference", "truth")]
    largest = max(float(t.abs().max()) for t in lists[2])
    for check in verify.compare(names, *lists, dtype, 3.0, largest):
        assert check.ok, check


def watched(executor) -> set[str]:
    """The names of the kernels that an executor launches from here on."""
    names, launch = set(), executor.launch

    def noting(description):
        names.add(description.kernel)
        launch(description)

    executor.launch = noting
    return names
