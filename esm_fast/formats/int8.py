"""8-bit weights for inference on CPUs, made without anybody's data (smoothing.py).

`ops.quantize` defines their arithmetic. Everything else of the model (embedding, layer norms, softmax and the attention
products, residual stream, language-model head) stays in bf16 and fp32.
"""

import torch

from .. import _C
from ..ops import contract
from ..ops.quantize import Quantized, int8_linear, quantize
from .format import Format
from .original import Original
from .smoothing import Smoothing
from .weight import PrepackedWeight


class Int8Weight(PrepackedWeight):
    """A prepacked matrix of 8 bits. Its dtype is that of the arithmetic around it: to() changes nothing else."""

    @staticmethod
    def __new__(cls, weights: _C.Weights, dtype: torch.dtype = torch.bfloat16):
        made = torch.Tensor._make_wrapper_subclass(cls, (weights.out, weights.in_), dtype=dtype, device="cpu")
        made.weights = weights
        return made

    @classmethod
    def pack(cls, matrix: torch.Tensor) -> "Int8Weight":
        """A floating-point matrix on the CPU, quantised in fp32."""
        return cls.pack_original(Original(matrix, matrix.dtype))

    @classmethod
    def pack_original(cls, original: Original, factor: torch.Tensor | None = None) -> "Int8Weight":
        def rows(first: int, last: int) -> Quantized:
            part = original.rows(first, last)
            return quantize((part if factor is None else part * factor).float())

        return cls(_C.prepack_rows(rows, "int8", *original.matrix.shape))

    @property
    def beside(self) -> torch.dtype:
        return torch.bfloat16

    def quantized(self) -> Quantized:
        out, inputs = self.shape
        numbers = torch.empty(out, inputs, dtype=torch.int8, device="cpu")
        scales = torch.empty(out, -(-inputs // _C.GROUP), dtype=torch.float32, device="cpu")
        self.weights.unpack([numbers, scales])
        return Quantized(numbers, scales)

    def unpack(self) -> torch.Tensor:
        """The matrix it stands for, as a new plain tensor."""
        return self.quantized().values().to(self.dtype)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The definition that the kernels are held to."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("8-bit weights have no gradients; load the model with another dtype")
        return int8_linear(x, self.quantized(), bias)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].weights, args[0].dtype)
        dtype = (kwargs or {}).get("dtype")
        if func is torch.ops.aten._to_copy.default and dtype is not None and dtype.is_floating_point:
            return cls(args[0].weights, dtype)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def __repr__(self, **options) -> str:
        return f"Int8Weight({self.shape[0]} x {self.shape[1]}, around it {self.dtype})"


contract.PLAIN.add(Int8Weight)

_NATIVE = "avx512vnni"  # the level from which 8 bits are multiplied faster than 16


def _require(device: str, backend: str | None, packed) -> None:
    """Raises ValueError where a model with 8-bit weights would not run, or not fast unless the backend is named."""
    if device != "auto" and torch.device(device).type != "cpu":
        raise ValueError(f"dtype 'int8' runs on CPUs only, not on {device}; choose bfloat16 there")
    if packed is False:
        raise ValueError("8-bit weights are always prepacked; leave out packed=False, or choose another dtype")
    if not _C.at_least(_NATIVE) and backend is None:
        raise ValueError(
            f"the CPU kernels' level here, {_C.isa()}, has no instructions for 8 bits and would be slower than with "
            "other types; choose float32 or bfloat16, or insist with backend='cpu'"
        )


FORMATS = [Format("int8", torch.int8, around=torch.bfloat16, weight=Int8Weight, require=_require, smoothing=Smoothing)]
