"""What torch can do to a function, on the drop-ins: the original's numbers, or a refusal that says what to do."""

import copy

import pytest
import torch
from fakes import fair_esm_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import esm_fast
from esm_fast.ops import OPS

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
SIZES = dict(vocab_size=33, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
             pad_token_id=1, mask_token_id=32, max_position_embeddings=64, position_embedding_type="absolute",
             token_dropout=True, emb_layer_norm_before=True, attn_implementation="eager")  # fmt: skip
TOKENS = torch.tensor([[0, 20, 15, 32, 11, 7, 2], [0, 5, 5, 5, 6, 4, 2]])


def hugging_face():
    torch.manual_seed(0)
    model = transformers.EsmForMaskedLM(transformers.EsmConfig(**SIZES)).eval()
    return model, esm_fast.accelerate(copy.deepcopy(model)), lambda m: lambda t: m(input_ids=t).logits


def fair_esm():
    original = fair_esm_model(layers=2)
    return original, esm_fast.accelerate(copy.deepcopy(original)), lambda m: lambda t: m(t)["logits"]


@pytest.fixture(params=[hugging_face, fair_esm], scope="module")
def pair(request):
    """(the original, the drop-in, model -> function of tokens that gives logits)."""
    return request.param()


def close(ours, original):
    torch.testing.assert_close(ours, original, rtol=1e-4, atol=1e-4)


def loss_of(model, call):
    def loss(parameters, tokens):
        holder = _Call(model, call)
        return (
            functional_call(holder, {f"model.{name}": p for name, p in parameters.items()}, (tokens,)).square().mean()
        )

    return loss


class _Call(nn.Module):
    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, tokens):
        return self.call(self.model)(tokens)


def parameters_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def test_torch_func(pair):
    """Gradients, their products with a direction, and a batch of gradients, by the original's and by ours."""
    original, ours, call = pair
    for transform in (
        lambda loss, ps: grad(loss)(ps, TOKENS),
        lambda loss, ps: jvp(lambda p: loss(p, TOKENS), (ps,), ({n: torch.ones_like(p) for n, p in ps.items()},)),
        lambda loss, ps: loss(ps, TOKENS),
    ):
        found = [transform(loss_of(model, call), parameters_of(model)) for model in (ours, original)]
        close(*found)


def test_vmap_is_right_or_refused(pair):
    original, ours, call = pair
    batch = TOKENS[:, None]
    try:
        found = vmap(call(ours))(batch)
    except (RuntimeError, ValueError) as error:
        assert "vmap" in str(error)
    else:
        close(found, torch.stack([call(original)(tokens) for tokens in batch]))


def test_double_backward_is_right_or_refused(pair):
    original, ours, call = pair

    def penalty(model):
        p = next(p for n, p in model.named_parameters() if n.endswith(("fc1.weight", "intermediate.dense.weight")))
        (first,) = torch.autograd.grad(call(model)(TOKENS).square().mean(), p, create_graph=True)
        return torch.autograd.grad(first.square().sum(), p)[0]

    try:
        found = penalty(ours)
    except RuntimeError as error:
        assert "kernels have no second derivatives" in str(error)
    else:
        close(found, penalty(original))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace_is_refused(pair):
    _, ours, call = pair
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace.*use torch\.compile"):
        torch.jit.trace(_Call(ours, call), TOKENS, check_trace=False)


@pytest.mark.parametrize("how", ["export", "strict export", "make_fx", "make_fx, fake", "fake", "script", "symbolic"])
def test_recording_without_values_is_refused(pair, how):
    """Tokens decide what is computed: a graph of one batch would be wrong for every other. torch.compile is tested with
    the ops."""
    _, ours, call = pair
    record = {
        "export": lambda: torch.export.export(_Call(ours, call), (TOKENS,), strict=False),
        "strict export": lambda: torch.export.export(_Call(ours, call), (TOKENS,), strict=True),
        "make_fx": lambda: make_fx(call(ours))(TOKENS),
        "make_fx, fake": lambda: make_fx(call(ours), tracing_mode="fake")(TOKENS),
        "fake": lambda: _fake(call(ours)),
        "script": lambda: torch.jit.script(ours),
        "symbolic": lambda: torch.fx.symbolic_trace(_Call(ours, call)),
    }
    # What strict export raises has the reason in it; it is an error of torch's own.
    with pytest.raises(Exception if how == "strict export" else RuntimeError, match=r"use torch\.compile"):
        record[how]()


def _fake(call):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return call(mode.from_tensor(TOKENS))


def test_compiled_models_give_the_numbers_of_the_original(pair):
    original, ours, call = pair
    close(torch.compile(call(ours), backend="eager")(TOKENS), call(original)(TOKENS))


def test_tensors_without_values_are_refused_or_have_the_shape(pair):
    original, ours, call = pair
    try:
        found = call(copy.deepcopy(ours).to("meta"))(TOKENS.to("meta"))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        assert "meta" in str(error) or "no values" in str(error)
    else:
        assert found.is_meta and found.shape == call(original)(TOKENS).shape


@pytest.mark.parametrize("name", sorted(OPS))
def test_ops_under_torch_func(name):
    """jvp and grad of every op are those of its reference."""
    op = OPS[name]
    case = op.cases()[0]
    arguments = op.bind((), case.build(torch.float32, "cpu", 0))
    plain = {n: v for n, v in arguments.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    others = {n: v for n, v in arguments.items() if n not in plain}
    if not plain:
        return

    def total(run):
        return lambda values: sum(
            out.double().sum() for out in _tuple(run(**values, **others)) if out is not None and out.is_floating_point()
        )

    directions = {n: torch.ones_like(v) for n, v in plain.items()}
    for transform in (lambda f: grad(f)(plain), lambda f: jvp(f, (plain,), (directions,))):
        close(transform(total(op)), transform(total(op.reference)))


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)
