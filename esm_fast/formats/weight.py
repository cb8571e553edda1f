"""The tensor that stands where a matrix stood whose only copy is the prepacked one: for inference only.

The CPU kernels read its panels as they are; any other torch operation unpacks it into a plain tensor of its own first,
so everything works, if slowly.
"""

import torch
from torch import nn
from torch.utils._pytree import tree_any, tree_map

from .. import _C
from ..ops import contract
from .original import Original

# Those of torch's dtypes that the CPU kernels have.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FIXED = "this weight is prepacked for inference, so it cannot be changed or trained; load the model with packed=False"
# The matrices of a transformer layer that the CPU kernels read prepacked.
MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")


def matrices_of(layer) -> list[torch.Tensor]:
    return [layer.get_submodule(name).weight for name in MATRICES]


class PrepackedWeight(torch.Tensor):
    """A matrix whose only copy is the prepacked one, `weights`; its shape and dtype are the matrix's."""

    weights: _C.Weights
    # Attributes such as shape are read at every call of an op, and Python in between would cost more than they do.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, weights: _C.Weights):
        shape, dtype = (weights.out, weights.in_), DTYPES[weights.dtype]
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="cpu")
        made.weights = weights
        return made

    @classmethod
    def pack(cls, matrix: torch.Tensor) -> "PrepackedWeight":
        """A prepacked copy of a float32 or bfloat16 matrix on the CPU."""
        cls._check(matrix.dtype, matrix.device)
        rows = matrix.detach().contiguous()
        return cls(_C.prepack([rows], NAMES[rows.dtype]))

    @classmethod
    def pack_original(cls, original: Original, factor: torch.Tensor | None = None) -> "PrepackedWeight":
        """The same of a matrix as it was read, some rows at a time. factor: one an input, to multiply it by."""
        cls._check(original.dtype, original.matrix.device)

        def rows(first: int, last: int) -> list[torch.Tensor]:
            part = original.rows(first, last)
            return [(part if factor is None else part * factor).contiguous()]

        return cls(_C.prepack_rows(rows, NAMES[original.dtype], *original.matrix.shape))

    @staticmethod
    def _check(dtype: torch.dtype, device: torch.device) -> None:
        if dtype not in NAMES or device.type != "cpu":
            kind = f"{str(dtype).removeprefix('torch.')} on {device}"
            raise ValueError(f"prepacked weights are float32 or bfloat16 on the CPU, not {kind}; use packed=False")

    @property
    def beside(self) -> torch.dtype:
        """What the kernels take the vectors beside it in, and give results of its type in."""
        return self.dtype

    def unpack(self) -> torch.Tensor:
        """The matrix as a new plain tensor."""
        matrix = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        self.weights.unpack([matrix])
        return matrix

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].weights)
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[number] if number < len(args) else kwargs.get(argument.name)
                if tree_any(is_prepacked, written):
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
        """What model.to(dtype) does: the new values are prepacked too."""
        value = value if is_prepacked(value) else PrepackedWeight.pack(value)
        torch.Tensor.data.__set__(self, value)
        self.weights = value.weights

    def __setitem__(self, index, value):
        raise RuntimeError(_FIXED)

    def data_ptr(self) -> int:
        raise RuntimeError("a prepacked weight has no row-major memory; take that of its unpack()")

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
        return f"PrepackedWeight({self.shape[0]} x {self.shape[1]}, {self.weights.dtype})"

    def __deepcopy__(self, memo):
        """Shares the prepacked bytes, which nobody can change."""
        copied = memo[id(self)] = self._as_parameter(self.detach())
        return copied

    def __reduce_ex__(self, protocol):
        """Is saved as the plain matrix."""
        return self._as_parameter(self.unpack()).__reduce_ex__(protocol)

    def _as_parameter(self, tensor: torch.Tensor) -> torch.Tensor:
        return nn.Parameter(tensor, requires_grad=False) if isinstance(self, nn.Parameter) else tensor


contract.PLAIN.add(PrepackedWeight)


def plain(value):
    """A PrepackedWeight's matrix; anything else as it is."""
    return value.unpack() if is_prepacked(value) else value


def is_prepacked(value) -> bool:
    return isinstance(value, PrepackedWeight)
