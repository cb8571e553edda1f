"""A model whose layers' matrices are prepacked, each original dropped."""

import torch
from torch import nn

from ..memory import hand_back
from ..ops.registry import BackendError, explain, request_of, select
from . import of_dtype
from .format import Format
from .original import Original, keep
from .weight import MATRICES, matrices_of


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


class Prepacking:
    """Prepacks the layers of a model one by one, each original dropped: for inference on the CPU kernels alone.

    `weights.build` takes one and calls it with each layer as it is read, `prepack_model` with those of a whole model.
    The layer's matrices may be of another type than the model: that of their file, as it is mapped (see `takes`).

    Args:
        form: the format, which is not asked again whether it runs here (see `Format.require`); None for the model's
            own dtype.
        insist: whether a model that would not run prepacked here is an error, or keeps its ordinary tensors.
        forget: is given rows of an original that were used.
    """

    def __init__(self, form: Format | None = None, *, insist: bool = True, forget=keep):
        self.form, self.insist, self.forget = form, insist, forget
        self.decided, self.smoothing = False, None

    def takes(self, model) -> bool:
        """Whether the matrices of the model's layers are going to be prepacked. Raises as calling it does."""
        if not self.decided:
            self._decide(model)
        return self.form is not None

    def __call__(self, model, layer) -> None:
        """Raises ValueError, at a model's first layer and before anything is changed, saying why it would not run."""
        if self.takes(model) and not all(isinstance(matrix, self.form.weight) for matrix in matrices_of(layer)):

            def original(linear: nn.Linear) -> Original:
                return Original(linear.weight, model.dtype, self.forget)

            self.smoothing = self.smoothing or self.form.smoothing(model, original)
            prepack_layer(layer, self.form, self.smoothing(layer), original)
            hand_back()  # or the originals of small layers would stay in the heap between what is kept

    def _decide(self, model) -> None:
        self.decided = True
        if self.form is None and (reason := why_not(model)) is None:
            self.form = of_dtype(model.dtype)
        elif self.form is None and self.insist:
            raise ValueError(f"the weights cannot be prepacked: {reason}")
        if self.form is not None:
            model.requires_grad_(False)


def prepack_layer(layer, form: Format, factors: dict[str, torch.Tensor], original) -> None:
    """original: of a linear layer."""
    for name in MATRICES:
        linear = layer.get_submodule(name)
        if not isinstance(linear.weight, form.weight):
            packed = form.weight.pack_original(original(linear), factors.get(name))
            linear.weight = nn.Parameter(packed, requires_grad=False)


def prepack_model(model, form: Format | None = None, forget=keep) -> None:
    """`Prepacking` of all layers of a model that has its tensors. Raises ValueError; nothing was changed then."""
    prepack = Prepacking(form, forget=forget)
    for layer in model.layers:
        prepack(model, layer)
