"""ESTIMATES of what was decided without a GPU: determinism of a gradient, graphs, warp-specialised products.

Each is arithmetic on a data sheet's peaks and on the assumptions that stand here; nothing in it was timed but
HOST, on a CPU (benches/host_time.py).
"""

from collections.abc import Iterator

WIDTH, HIDDEN, LAYERS, PARAMETERS = 1280, 5120, 33, 650e6
HOST = 1.33e-3  # seconds for the launches of a forward, measured with launches stubbed out
LAUNCH = 2e-6  # seconds of a driver for a launch: an assumption
FILL = 1e-6  # seconds until the first tiles of a pipeline are there: an assumption
SMS = {90: 132, 100: 148}  # of GPUs with TMA
TILE = 128


def lines(gpu) -> Iterator[str]:
    """gpu: a `roofline.GPU`."""
    for length in (300, 1022):
        seven, five = (step_flops(length, products) for products in (7, 5))
        yield (
            f"attention's gradient in 7 products, the same bits in every run, not 5 with atomics: proteins of {length} "
            f"train {seven / five - 1:.1%} slower at most"
        )
    launched, computed = short_protein(gpu)
    yield (
        f"a protein of 300 at the peaks, and so at best as a graph: {1e3 * computed:.2f} ms; launched one by one "
        f"{1e3 * launched:.2f} ms"
    )
    if gpu.arch in SMS:
        for name, k in (("output projection", WIDTH), ("fc2", HIDDEN)):
            yield f"warp-specialised {name}: a tile {specialised(gpu, k) - 1:.1%} faster at most"


def step_flops(length: int, products: int) -> float:
    """Of a token and layer of a training step: matrices three times, attention's two products, and its gradient's."""
    matrices = 2 * (4 * WIDTH**2 + 2 * WIDTH * HIDDEN)
    return 3 * matrices + (2 + products) * 2 * length * WIDTH


def short_protein(gpu, length: int = 300) -> tuple[float, float]:
    """(launched one by one, at the peaks) in seconds."""
    computed = max(2 * length * PARAMETERS / gpu.half, 2 * PARAMETERS / gpu.bandwidth)
    launches = 7 * LAYERS * LAUNCH
    return max(HOST + launches, computed), computed


def specialised(gpu, k: int) -> float:
    """How many times as fast a tile is if its first loads do not wait for the last one's epilogue, which reads and
    writes the fp32 stream. One block has the SM: nothing else fills it meanwhile."""
    products = 2 * TILE * TILE * k / (gpu.half / SMS[gpu.arch])
    epilogue = 8 * TILE * TILE / (gpu.bandwidth / SMS[gpu.arch])
    return (products + epilogue + FILL) / (products + epilogue)
