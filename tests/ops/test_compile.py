"""torch.compile over the model: one graph for batches of every shape, the same numbers and gradients. And a forward
pass that never waits for its device.
"""

import pytest
import torch
from cutlass_standin import admitted, installed
from fakes import trained_like
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend

from esm_fast.compat.fair_esm import ProteinBertModel
from esm_fast.formats.weight import PrepackedWeight
from esm_fast.models.esm1 import ESM1, Config
from esm_fast.ops import OPS, verify
from esm_fast.sequences.batching import pack_padded

BATCHES = [
    pack_padded(torch.tensor([[0, 20, 15, 32, 11, 7, 2], [0, 5, 5, 5, 2, 1, 1]]))[0],
    pack_padded(torch.tensor([[0, 7, 8, 9, 2, 1], [0, 20, 15, 32, 8, 2], [0, 5, 6, 5, 2, 1]]))[0],
    pack_padded(torch.tensor([[0, 4, 5, 6, 7, 8, 9, 10, 11, 2]]))[0],
]
IN_GRAPHS = [op for op in OPS.values() if op.shapes is not None]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def model(backend=None, layers=2):
    torch.manual_seed(0)
    return trained_like(ESM1(Config(layers, 32, 64, 4, max_positions=64), backend=backend))


def outputs_of(made):
    """What a function of a batch returns: the residual stream at several depths, and the logits."""

    def run(batch):
        depth = made.config.layers
        out = made.forward_packed(batch, layers=(0, 1, depth), logits=True)
        return *(out.representations[number] for number in (0, 1, depth)), out.logits

    return run


def gradients(run, batch, parameters):
    loss = sum(out.square().mean() for out in run(batch))
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, found, strict=True)]


# --- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", IN_GRAPHS, ids=lambda op: op.name)
def test_the_operator_keeps_torchs_rules(op):
    """Its schema, the shapes it announces, its gradients, alone and inside AOT autograd: torch's own checks."""
    for case in op.cases()[-1:]:
        arguments = verify.bound(op, case.build(torch.float32, "cpu", 0))
        values = [v.requires_grad_() if verify.differentiable(v) else v for v in arguments.values()]
        library.opcheck(getattr(torch.ops.esm_fast, op.name).default, values)


def test_every_op_is_in_graphs_or_its_size_follows_from_values():
    assert {name for name, op in OPS.items() if op.shapes is None} == {"transformer_stack"}


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "reference"])
def test_inference_is_the_same_in_one_graph_for_all_shapes(backend):
    run = outputs_of(model(backend))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    with torch.inference_mode():
        for batch in BATCHES:
            for ours, plain in zip(compiled(batch), run(batch), strict=True):
                torch.testing.assert_close(ours, plain)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["reference", "cutlass"])
def test_training_is_the_same_in_one_graph_for_all_shapes(backend):
    made = model(backend, layers=1)
    run, parameters = outputs_of(made), list(made.parameters())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    with installed([]), admitted("cutlass"):
        for batch in BATCHES[:2]:
            ours, plain = gradients(compiled, batch, parameters), gradients(run, batch, parameters)
            for grad, expected in zip(ours, plain, strict=True):
                torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)
            graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1]


def test_contacts_have_a_place_in_a_graph():
    """fullgraph lets the compiler take sizes from values."""
    made = model()

    def run(batch):
        return made.forward_packed(batch, contacts=True).contacts

    parameters = [*made.parameters()]
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in BATCHES[:2]:
        for ours, plain in zip(compiled(batch), run(batch), strict=True):
            torch.testing.assert_close(ours, plain)
        grads = gradients(compiled, batch, parameters), gradients(run, batch, parameters)
        for ours, plain in zip(*grads, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
    with torch.inference_mode():
        made.contact_head.regression.weight.zero_()
        with pytest.raises(RuntimeError, match="no contact regression"):
            compiled(BATCHES[0])


def test_inductor_computes_the_same():
    made = model(layers=1)

    def run(batch):
        out = made.forward_packed(batch, layers=(1,), contacts=True)
        return out.representations[1], *out.contacts

    with torch.inference_mode():
        for ours, plain in zip(torch.compile(run, fullgraph=True)(BATCHES[0]), run(BATCHES[0]), strict=True):
            torch.testing.assert_close(ours, plain)


def test_what_has_no_place_in_a_graph_runs_between_graphs():
    made = model()

    def run(batch):
        out = made.forward_packed(batch, contacts=True, attentions=True)
        return out.contacts + out.attentions

    with torch.inference_mode():
        for ours, plain in zip(torch.compile(run, backend="eager")(BATCHES[0]), run(BATCHES[0]), strict=True):
            torch.testing.assert_close(ours, plain)


def test_the_padded_face_is_the_same():
    torch.manual_seed(0)
    api = trained_like(ProteinBertModel(Config(1, 32, 64, 4, max_positions=64)))
    tokens = torch.tensor([[0, 20, 15, 32, 2], [0, 5, 5, 2, 1]])
    with torch.inference_mode():
        ours, plain = torch.compile(api, backend="eager")(tokens, repr_layers=[1]), api(tokens, repr_layers=[1])
    torch.testing.assert_close(ours["logits"], plain["logits"])
    torch.testing.assert_close(ours["representations"][1], plain["representations"][1])


def test_weights_are_packed_once(monkeypatch):
    made, packs = model("cpu"), []
    pack = PrepackedWeight.pack
    monkeypatch.setattr(PrepackedWeight, "pack", lambda matrix: packs.append(matrix) or pack(matrix))
    compiled = torch.compile(outputs_of(made), backend="aot_eager", dynamic=True)
    with torch.inference_mode():
        compiled(BATCHES[0])
        first = len(packs)
        compiled(BATCHES[1])
    assert 0 < first == len(packs)


def test_a_backend_by_name_is_asked_for_in_the_graph_too():
    run = outputs_of(model("cutlass"))
    with torch.inference_mode(), pytest.raises(Exception, match="cannot run on backend 'cutlass' here: .*CUDA"):
        torch.compile(run, fullgraph=True, backend="eager")(BATCHES[0])


# --- nothing waits ---------------------------------------------------------------------------------------------------


@pytest.fixture
def meta():
    """Tensors without values, as the host sees a GPU's: reading one raises. torch's meta function of attention's
    gradient takes other arguments than the operator, so it has one here."""

    def gradient(grad, q, k, v, *_, **__):
        return *(torch.empty_like(tensor) for tensor in (q, k, v)), grad.new_empty(())

    with admitted("cutlass", devices=("meta",)), library._scoped_library("aten", "IMPL") as aten:
        # Some releases of torch have one.
        aten.impl("_efficient_attention_backward", gradient, "Meta", allow_override=True)
        yield torch.device("meta")


def test_the_forward_and_the_backward_never_wait(meta):
    made = model().to(meta)
    batch = BATCHES[0].to(meta)
    out = made.forward_packed(batch, layers=(0, 1, 2), logits=True)
    (out.logits.sum() + out.representations[1].sum()).backward()
    assert made.layers[0].fc1.weight.grad.shape == made.layers[0].fc1.weight.shape
    rows, targets = torch.zeros(3, dtype=torch.long, device=meta), torch.zeros(3, dtype=torch.long, device=meta)
    _, loss = made.logits_of(out.representations[2], rows, targets)
    assert loss.shape == ()


def test_the_reference_reads_the_offsets(meta):
    with pytest.raises(NotImplementedError, match="meta"):
        model("reference").to(meta).forward_packed(BATCHES[0].to(meta), logits=True)
