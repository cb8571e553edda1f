"""The CPU kernels under test: their levels, how each is compiled, and what the tests of several files ask of them."""

import torch
from hypothesis import HealthCheck, settings

from esm_fast import _C
from esm_fast.ops import OPS, registry, verify

AVX512 = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl"
BF16 = AVX512 + " -mavx512vnni -mavx512bf16"
FLAGS = {
    "base": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512vnni": AVX512 + " -mavx512vnni",
    "avx512bf16": BF16,
    "amx": BF16 + " -mamx-tile -mamx-bf16 -mamx-int8",
}
HALF_AND_FULL = [torch.float32, torch.bfloat16]

# avx512vnni is avx512 and one instruction, of 8-bit weights alone: test_int8.py runs there, these where it is best.
LEVELS = [level for level in _C.isas() if level != "avx512vnni" or level == _C.isas()[-1]]

# The same draws in every run: where an output has one or two elements, the plain reference is at times right by luck,
# and twice its error is then next to nothing (docs/cpu.md). Such a draw must not come and go with the day.
relaxed = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def kernel(op_name):
    return next(k for k in registry.kernels(op_name) if k.backend == "cpu")


def run(op_name, **arguments):
    return verify.outputs_of(kernel(op_name).forward(*verify.bound(OPS[op_name], arguments).values()))


def changed(case, **arguments):
    """The case with some arguments replaced: by values, or by functions of the arguments it built."""

    def build(*where):
        built = case.build(*where)
        return built | {n: v(built) if callable(v) else v for n, v in arguments.items()}

    return case._replace(build=build)
