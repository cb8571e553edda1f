"""gelu_ffn: x + fc2(gelu(fc1(LN(x)))), the second half of a transformer layer, row by row."""

from .common import Maker, gelu, layer_norm, linear
from .contract import Contract, floats, real, weights
from .registry import Case, Cost, op

CONTRACT = Contract(
    x=floats("n", "width"),
    ln_weight=floats("width"),
    ln_bias=floats("width"),
    fc1_weight=weights("hidden", "width"),
    fc1_bias=floats("hidden"),
    fc2_weight=weights("width", "hidden"),
    fc2_bias=floats("width"),
    eps=real(),
)


def _case(name, n, width, hidden) -> Case:
    def build(dtype, device, seed):
        make = Maker(dtype, device, seed)
        return dict(
            x=make.residual(n, width),
            ln_weight=make.gain(width),
            ln_bias=make.normal(width, scale=0.1),
            fc1_weight=make.weight(hidden, width),
            fc1_bias=make.normal(hidden, scale=0.1),
            fc2_weight=make.weight(width, hidden),
            fc2_bias=make.normal(width, scale=0.1),
        )

    return Case(name, build)


def cases() -> list[Case]:
    return [
        _case("one_row", 1, 64, 256),
        _case("rows_33", 33, 64, 256),
        _case("odd_hidden", 7, 32, 37),
        _case("prime_rows", 127, 40, 160),
        _case("no_rows", 0, 32, 64),
    ]


def bench_cases() -> list[Case]:
    return [_case("1_row" if n == 1 else f"{n}_rows", n, 1280, 5120) for n in (1024, 64, 1, 300, 4000)]


def cost(x, fc1_weight, **_) -> Cost:
    (n, width), hidden = x.shape, len(fc1_weight)
    weights, stream = 2 * fc1_weight.numel(), x.numel() * x.element_size()
    # The normed rows and the hidden activation, written and read; and the stream again, at the end.
    between = 2 * n * (width + hidden) * fc1_weight.element_size() + stream
    return Cost(2 * n * weights, 2 * stream + weights * fc1_weight.element_size(), between)


@op(contract=CONTRACT, cases=cases, bench_cases=bench_cases, cost=cost, dtype_of="fc1_weight")
def gelu_ffn(x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps: float = 1e-5):
    """Feed-forward block of a pre-LN transformer, with the exact GELU.

    Args:
        x: (n, width), the residual stream, fp32 (fp64) even when the weights are half.
        ln_weight, ln_bias: (width,); fc1: (hidden, width) and (hidden,); fc2: (width, hidden) and (width,).

    Returns:
        (n, width) in x's dtype.
    """
    normed = layer_norm(x, ln_weight, ln_bias, eps).to(fc1_weight.dtype)
    return (x + linear(gelu(linear(normed, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)).to(x.dtype)
