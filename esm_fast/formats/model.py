"""A model whose layers' matrices are prepacked, each original dropped."""

from torch import nn

from ..ops.registry import BackendError, explain, request_of, select
from . import of_dtype
from .format import Format
from .weight import MATRICES


def why_not(model) -> str | None:
    """What keeps an ESM1's layers from the CPU kernels, which alone read prepacked weights; None if nothing does."""
    config = model.config
    head_dim = config.embed_dim // config.attention_heads
    request = request_of(model.device, dtype=model.dtype, head_dim=head_dim)
    for op_name in ("pre_ln_attention", "gelu_ffn"):
        try:
            chosen = select(op_name, request, model.backend).backend
        except BackendError as error:
            return str(error)
        if chosen != "cpu":
            reasons = dict(explain(op_name, request))["cpu"] or [f"the model was loaded with backend={model.backend!r}"]
            return f"the CPU kernels would not run it: {'; '.join(reasons)}"
    return None


def prepack_model(model, form: Format | None = None, forget=lambda tensor: None) -> None:
    """Makes an ESM1 one for inference on the CPU kernels: its layers' matrices are prepacked, one by one, each original
    dropped, and no parameter takes gradients.

    Args:
        form: the format; None for the model's own dtype.
        forget: is given each original when it is prepacked.

    Raises:
        ValueError: saying why the model would not run on prepacked weights here; nothing was changed. A format that is
            given is not asked again: see `Format.require`.
    """
    if form is None:
        if (reason := why_not(model)) is not None:
            raise ValueError(f"the weights cannot be prepacked: {reason}")
        form = of_dtype(model.dtype)
    model.requires_grad_(False)
    for layer in model.layers:
        factors = form.factors(layer)
        for name in MATRICES:
            linear = layer.get_submodule(name)
            original = linear.weight
            if not isinstance(original, form.weight):
                matrix = original * factors[name] if name in factors else original
                linear.weight = nn.Parameter(form.weight.pack(matrix), requires_grad=False)
                forget(original)
