"""The products into the residual stream as persistent, warp-specialised Triton kernels with TMA loads.

A program keeps an SM and walks over tiles; one warp has the next tiles copied by TMA descriptors while the others
multiply, so that a tile's first loads do not wait for the last one's epilogue. All else is the kernels of `triton`, the
products with GELU too, of which two blocks fit on an SM; and a row's sum over k runs in their order.

Compiled without spills for sm_90 and sm_100 with Triton 3.9, run in Triton's interpreter, which knows no warps, and on
no GPU; docs/kernels/triton.md tells what else was tried. So it runs by name, or where `esm-fast qualify` found it right
and faster on the GPU at hand.
"""

import contextvars

import torch
import triton
import triton.language as tl

from esm_fast.ops import registry
from esm_fast.ops.common import aligned
from esm_fast.ops.registry import Request

from .triton import common, linear, pre_ln_attention
from .triton.attention_varlen import attend
from .triton.common import precision, spec
from .triton.configs import Config
from .triton.layer_norm import layer_norm
from .triton.rotary import rotate

BACKEND = "tma"
_TILES = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64)
_CONFIGS = {
    (9, 0): Config(_TILES, 4, 3),
    (10, 0): Config(_TILES, 8, 3),
}  # with others Triton specialises none, or spills
_INTERPRETED = 3  # programs in the interpreter
_ROW = 16  # bytes that rows are a multiple of, for TMA


def why_not(request: Request) -> list[str]:
    """What keeps the kernels from running a request; see `registry.Request`."""
    reasons = common.why_not(request)
    if request.arch is not None and request.arch not in _CONFIGS:
        known = " and ".join("{}.{}".format(*arch) for arch in _CONFIGS)
        reasons.append("is compiled for compute capability {}, this GPU has {}.{}".format(known, *request.arch))
    if request.dtype == torch.float32:
        reasons.append("has float16 and bfloat16, not float32")
    return reasons + ["has no gradients of its own"] * request.grad


def yields(request: Request) -> list[str]:
    return [*common.yields(request), "esm-fast qualify tries it on a GPU"]


@triton.jit(do_not_specialize=["m"])
def linear_tma(
    A, W, BIAS, RESIDUAL, OUT, m, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The residual stream plus A W^T + bias. What descriptors load beyond the ends is 0."""
    rows_of_a = tl.make_tensor_descriptor(A, [m, K], [K, 1], [BLOCK_M, BLOCK_K])
    rows_of_w = tl.make_tensor_descriptor(W, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    count = tl.cdiv(m, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), count, tl.num_programs(0), warp_specialize=True):
        row, column = linear.tile_of(tile, m, N, BLOCK_M, BLOCK_N)
        out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            a = rows_of_a.load([row, k])
            w = rows_of_w.load([column, k])
            out = tl.dot(a, w.T, out, input_precision=PRECISION)
        out = linear.add_bias(out, BIAS, column, N, BLOCK_N)
        at, exist = linear.place(row, column, m, N, BLOCK_M, BLOCK_N)
        out += tl.load(RESIDUAL + at, mask=exist, other=0.0).to(tl.float32)
        tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=exist)


def _residual(a, weight, bias, residual):
    """As `linear.linear_residual`; all contiguous."""
    (m, k), n = a.shape, len(weight)
    if k * a.element_size() % _ROW or not m:  # which descriptors do not take
        return linear.linear_residual(a, weight, bias, residual)
    arch, programs, out = next(iter(_CONFIGS)), _INTERPRETED, torch.empty_like(residual)
    if a.is_cuda:
        arch = torch.cuda.get_device_capability(a.device)
        programs = torch.cuda.get_device_properties(a.device).multi_processor_count  # a block has one to itself
    config = _CONFIGS[arch]
    grid = (min(linear.tiles(config, m, n), programs),)
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=a.device))
    linear_tma[grid](a, weight, bias, residual, out, m, n, k, precision(), **config.launch)
    return out


def _on_its_device(function):
    """As `triton.common.implements`; and what Triton allocates descriptors by is as it was afterwards."""

    def run(*arguments):
        with torch.cuda.device_of(arguments[0]), common.first_launches_told():
            return contextvars.copy_context().run(function, *aligned(arguments))

    return run


@registry.implements("gelu_ffn", backend=BACKEND, why_not=why_not, yields=yields)
@_on_its_device
def ffn(x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps):
    """See `esm_fast.ops.gelu_ffn`."""
    common.require_one_dtype(fc1_weight, fc2_weight)
    x = x.contiguous()
    normed = layer_norm(x, ln_weight.contiguous(), ln_bias.contiguous(), eps, fc1_weight.dtype)
    hidden = linear.linear_gelu(normed, fc1_weight.contiguous(), fc1_bias.contiguous())
    return _residual(hidden, fc2_weight.contiguous(), fc2_bias.contiguous(), x)


@registry.implements("pre_ln_attention", backend=BACKEND, why_not=why_not, yields=yields)
@_on_its_device
def attention(*values):
    """See `esm_fast.ops.pre_ln_attention`."""
    given = pre_ln_attention._given(values)
    q, k, v = pre_ln_attention._qkv(given, pre_ln_attention._normed(given))
    if given.rotary is not None:
        rotate(q, k, given.rotary)
    mixed, _ = attend(q, k, v, *pre_ln_attention._sequences(given, q.shape[-1]))
    out = _residual(mixed.view(given.x.shape), given.out_weight, given.out_bias, given.x)
    return (out, q, k) if given.return_qk else out


def compile_specs(capability: int) -> list:
    """fc2 and the output projection of ESM-1b."""
    return [
        spec(
            linear_tma,
            "*{0} *{0} *{0} *fp32 *fp32 i32".format(common.NAMES[dtype]),
            dict(N=1280, K=k, PRECISION="ieee"),
            _CONFIGS[divmod(capability, 10)],
            direction="fwd",
            dtype=dtype,
        )
        for dtype in (torch.float16, torch.bfloat16)
        for k in (5120, 1280)
    ]
