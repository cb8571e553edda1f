"""Gives Triton's interpreter the number formats of a GPU: bfloat16, tf32 products, the smallest tiles of `tl.dot`.

The interpreter keeps bfloat16 as the 16 raw bits in a uint16 array and calculates with those, so that most results are
silently wrong; ml_dtypes' NumPy type rounds as the hardware does. It also multiplies fp32 exactly where a GPU would
take tf32, which hides a `tl.dot` that forgot input_precision="ieee", and leaves the order of sums to NumPy's BLAS,
which may take another for some rows of a tile.
"""

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.backends.nvidia.compiler import min_dot_size
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_numpy_dtype = interpreter._get_np_dtype
_known: dict[str, np.dtype] = {}


def install() -> None:
    """Replaces the interpreter's methods for this process."""
    interpreter._get_np_dtype = numpy_dtype
    interpreter.interpreter_builder.codegen_fns["min_dot_size"] = min_dot_size(None)
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_fp_to_fp = lambda self, source, to, rounding: _cast(self, source, to)
    InterpreterBuilder.create_dot = _dot_as_on_a_gpu
    InterpreterBuilder.create_splat = _splat


def numpy_dtype(triton_dtype) -> np.dtype:
    """The NumPy dtype that holds a Triton dtype."""
    element = triton_dtype.element_ty if isinstance(triton_dtype, tl.block_type) else triton_dtype
    if element.name not in _known:
        _known[element.name] = BFLOAT16 if element == tl.bfloat16 else _numpy_dtype(element)
    return _known[element.name]


def to_tf32(x: np.ndarray) -> np.ndarray:
    """fp32 rounded to tf32's 10 bits of mantissa, to nearest even."""
    return interpreter._round_f32_to_tf32(x)


def _cast(self, source: TensorHandle, to) -> TensorHandle:
    with np.errstate(over="ignore"):  # infinity is the right answer
        return TensorHandle(source.data.astype(numpy_dtype(to)), to.scalar)


def _splat(self, block_type, scalar: TensorHandle) -> TensorHandle:
    """As the data is: the interpreter's comparison of two floats gives booleans that claim to be floats."""
    return TensorHandle(np.full(block_type.shape, scalar.data, scalar.data.dtype), scalar.dtype.scalar)


def _dot_as_on_a_gpu(self, a, b, total, precision, max_imprecise):
    """Row by row, so that all rows are summed alike."""
    left, right = a.data, b.data
    if left.dtype == np.float32 and precision.name == "TF32":
        left, right = to_tf32(left), to_tf32(right)
    product = np.matmul(left[..., None, :], right[..., None, :, :], dtype=total.data.dtype)[..., 0, :]
    return TensorHandle(product + total.data, total.dtype.scalar)
