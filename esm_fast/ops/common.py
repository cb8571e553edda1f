"""What the contracts share: the layer norm, shape checks, and the makers of test cases."""

import itertools

import torch
import torch.nn.functional as F

# Lengths in tokens that break kernels: one token, tile edges, primes, the longest sequence ESM-1b takes.
AWKWARD_LENGTHS = {
    "one_token": [1],
    "empty_between": [3, 0, 5],
    "tiny": [1, 2, 3],
    "tile_edges": [31, 32, 33, 63, 64, 65],
    "primes": [7, 127, 2, 61],
}


ALIGNMENT = 16  # bytes that kernels on GPUs load at once


def aligned(values) -> list:
    """The same, tensors copied that do not begin at a multiple of 16 bytes, as a view into a flat buffer may not."""
    return [v.clone() if isinstance(v, torch.Tensor) and v.data_ptr() % ALIGNMENT else v for v in values]


def ready(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Each contiguous, and beginning where a kernel can load it."""
    return aligned([tensor.contiguous() for tensor in tensors])


def joined(parts) -> torch.Tensor:
    """What the launches of `parts_of` gave."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; everything else accumulates (statistics, softmax, residual stream) in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def layer_norm(x, weight, bias, eps):
    """Layer norm (Ba et al. 2016) over the last axis with fp32 statistics. Returns the accumulate dtype."""
    wide = accumulate_dtype(weight.dtype)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)


def linear(x, weight, bias):
    """x W' + b. Weights of 8 bits bring their own definition (esm_fast/formats/int8.py)."""
    if hasattr(weight, "linear"):
        return weight.linear(x, bias)
    return F.linear(x, weight, bias if bias.dtype == weight.dtype else bias.to(weight.dtype))


def gelu(x):
    """The exact GELU, by erf (Hendrycks & Gimpel 2016), as ESM-1b was trained; not the tanh approximation."""
    return F.gelu(x)


def spans(cu_seqlens) -> list[tuple[int, int]]:
    """[(first row, one past the last row)] of each packed sequence."""
    return list(itertools.pairwise(cu_seqlens.tolist()))


def parts_of(cu_seqlens, rows: int, most: int) -> list[tuple[slice, torch.Tensor]]:
    """[(rows, where their sequences end among them)], of at most so many sequences, for a launch that takes no more."""
    ends, sequences = cu_seqlens.contiguous(), len(cu_seqlens) - 1
    if sequences <= most:
        return [(slice(0, rows), ends)]
    firsts = [*range(0, sequences, most), sequences]
    bounds = ends[firsts].tolist()  # waits for the GPU, which so many sequences keep busy
    cut = zip(itertools.pairwise(firsts), itertools.pairwise(bounds), strict=True)
    return [(slice(a, b), ends[i : j + 1] - a) for (i, j), (a, b) in cut if b > a]


class Maker:
    """Makes seeded tensors for test cases: drawn in fp64, then cast, so that every dtype sees the same numbers."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape, scale=1.0, mean=0.0, dtype=None):
        drawn = torch.randn(*shape, generator=self.generator, dtype=torch.float64, device="cpu") * scale + mean
        return drawn.to(self.device, dtype or self.dtype)

    def residual(self, *shape, scale=1.0):
        """A residual stream: it stays in the accumulate dtype whatever the weights are."""
        return self.normal(*shape, scale=scale, dtype=accumulate_dtype(self.dtype))

    def weight(self, out_features: int, in_features: int):
        return self.normal(out_features, in_features, scale=in_features**-0.5)

    def gain(self, width: int):
        """Layer-norm gains spread log-normally, as trained ones are."""
        return self.normal(width, scale=0.5, dtype=torch.float64).exp().to(self.dtype)

    def integers(self, low: int, high: int, *shape):
        drawn = torch.randint(low, high, shape, generator=self.generator, dtype=torch.int32, device="cpu")
        return drawn.to(self.device)

    def cu_seqlens(self, lengths: list[int]):
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=self.device)
