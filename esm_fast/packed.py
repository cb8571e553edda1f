"""Weights packed for the CPU kernels once and for all, without the row-major original: for inference only.

A `PackedWeight` stands where the matrix stood. The CPU kernels read its panels as they are; any other torch operation
unpacks it into a plain tensor of its own first, so everything works, if slowly.
"""

import torch
from torch import nn
from torch.utils._pytree import tree_any, tree_map

from . import _C
from .ops import contract
from .ops.registry import BackendError, Request, explain, select

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_DTYPES = {name: dtype for dtype, name in NAMES.items()}
_FIXED = "this weight is packed for inference, so it cannot be changed or trained; load the model with packed=False"
# The matrices of a transformer layer that the CPU kernels read packed.
MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")


class PackedWeight(torch.Tensor):
    """A matrix whose only copy is the packed one, `weights`; its shape and dtype are the matrix's."""

    weights: _C.Weights
    # Attributes such as shape are read at every call of an op, and Python in between would cost more than they do.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, weights: _C.Weights):
        shape, dtype = (weights.out, weights.in_), _DTYPES[weights.dtype]
        packed = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="cpu")
        packed.weights = weights
        return packed

    @classmethod
    def pack(cls, matrix: torch.Tensor) -> "PackedWeight":
        """A packed copy of a float32 or bfloat16 matrix on the CPU."""
        if matrix.dtype not in NAMES or matrix.device.type != "cpu":
            kind = f"{str(matrix.dtype).removeprefix('torch.')} on {matrix.device}"
            raise ValueError(f"packed weights are float32 or bfloat16 on the CPU, not {kind}; use packed=False")
        rows = matrix.detach().contiguous()
        return cls(_C.pack_weights(rows.data_ptr(), *rows.shape, NAMES[rows.dtype]))

    def unpack(self) -> torch.Tensor:
        """The matrix as a new plain tensor."""
        matrix = torch.empty(self.shape, dtype=self.dtype)
        self.weights.unpack(matrix.data_ptr())
        return matrix

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].weights)
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[number] if number < len(args) else kwargs.get(argument.name)
                if tree_any(_is_packed, written):
                    raise RuntimeError(_FIXED)
        return func(*tree_map(plain, args), **tree_map(plain, kwargs))

    # What follows does not come by way of __torch_dispatch__, or would reach for memory that is not there.

    def requires_grad_(self, requires_grad: bool = True):
        if requires_grad:
            raise RuntimeError(_FIXED)
        return self

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        """What model.to(dtype) does: the new values are packed too."""
        value = value if _is_packed(value) else PackedWeight.pack(value)
        torch.Tensor.data.__set__(self, value)
        self.weights = value.weights

    def __setitem__(self, index, value):
        raise RuntimeError(_FIXED)

    def data_ptr(self) -> int:
        raise RuntimeError("a packed weight has no row-major memory; take that of its unpack()")

    def untyped_storage(self):
        self.data_ptr()

    def numpy(self, **options):
        return self.unpack().numpy(**options)

    def __array__(self, *args, **options):
        return self.unpack().__array__(*args, **options)

    def __dlpack__(self, **options):
        return self.unpack().__dlpack__(**options)

    def tolist(self) -> list:
        return self.unpack().tolist()

    def __repr__(self, **options) -> str:
        return f"PackedWeight({self.shape[0]} x {self.shape[1]}, {self.weights.dtype})"

    def __deepcopy__(self, memo):
        """Shares the packed bytes, which nobody can change."""
        copied = memo[id(self)] = self._as_parameter(self.detach())
        return copied

    def __reduce_ex__(self, protocol):
        """Is saved as the plain matrix."""
        return self._as_parameter(self.unpack()).__reduce_ex__(protocol)

    def _as_parameter(self, tensor: torch.Tensor) -> torch.Tensor:
        return nn.Parameter(tensor, requires_grad=False) if isinstance(self, nn.Parameter) else tensor


contract.PLAIN.add(PackedWeight)


def plain(value):
    """A PackedWeight's matrix; anything else as it is."""
    return value.unpack() if _is_packed(value) else value


def _is_packed(value) -> bool:
    return isinstance(value, PackedWeight)


def why_not(model) -> str | None:
    """What keeps an ESM1's layers from the CPU kernels, which alone can read packed weights; None if nothing does."""
    config = model.config
    request = Request(model.device.type, None, model.dtype, config.embed_dim // config.attention_heads, False)
    for op_name in ("pre_ln_attention", "gelu_ffn"):
        try:
            chosen = select(op_name, request, model.backend).backend
        except BackendError as error:
            return str(error)
        if chosen != "cpu":
            reasons = dict(explain(op_name, request))["cpu"] or [f"the model was loaded with backend={model.backend!r}"]
            return f"the CPU kernels would not run it: {'; '.join(reasons)}"
    return None


def pack_model(model, forget=lambda tensor: None) -> None:
    """Makes an ESM1 one for inference on the CPU kernels: its layers' matrices are packed, one by one, each original
    dropped, and no parameter takes gradients.

    Args:
        forget: is given each original when it is packed.

    Raises:
        ValueError: saying why the model would not run on packed weights here; nothing was changed.
    """
    if (reason := why_not(model)) is not None:
        raise ValueError(f"the weights cannot be packed: {reason}")
    model.requires_grad_(False)
    for layer in model.layers:
        for name in MATRICES:
            linear = layer.get_submodule(name)
            original = linear.weight
            if not _is_packed(original):
                linear.weight = nn.Parameter(PackedWeight.pack(original), requires_grad=False)
                forget(original)
