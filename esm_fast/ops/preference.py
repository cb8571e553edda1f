"""Which backend runs an op where several could: one order for all ops and machines, and why.

What a backend cannot run it declines itself, with its reasons (`Kernel.why_not`); what it is not proven to be better at
it leaves to the next unless it is named (`Kernel.yields`). So one order gives a choice for every architecture, which
`esm-fast info` prints, and `esm-fast info --arch 7.0` for a GPU that is elsewhere:

CPU: the C++ kernels, which were measured faster than torch; where they were not, they yield to the reference.

sm_70, sm_75 (V100, T4): attention by cutlass, all else by the reference, that is by torch's GEMMs. Triton has no tensor
    cores there and declines, and neither FlashAttention-2 nor xformers runs. So the CUDA kernels stand first: they use
    the tensor cores, and fuse norms, GELU, embedding, loss and contacts, which nothing else does on these GPUs. They
    have run on no GPU and yield, to cutlass, which torch's own users have run for years. The reference's attention is
    one launch a sequence, and waits for the GPU in every layer to learn where the sequences begin; cutlass is one
    launch, and waits for nothing.

sm_80 to sm_90 (A100, RTX 30 and 40, H100): the same. torch's attention may choose FlashAttention-2 for one sequence,
    which alone is faster than cutlass; but ESM-1b's proteins are short (300 tokens), their launches many, and attention
    is 2 to 12 % of the model. The Triton kernels fuse all ops and stand first: they are compiled for each
    architecture's own tensor-core instructions, where the CUDA kernels have WMMA's for all. Both run by name only until
    a report from a GPU (`make gpu-report`) shows them right and fast, as flash does, torch's FlashAttention-2 over
    packed sequences. xformers runs by name only, too: it may choose
    FlashAttention-3, but waits in every layer for the sequences' lengths.

sm_100 and newer (B200, RTX 50): torch's cutlass kernels are not in all its releases there, so the reference, until
    Triton's turn comes.
"""

REFERENCE = "reference"
ORDER = ("triton", "cuda", "flash", "cutlass", "xformers", "cpu")


def priority_of(backend: str) -> int:
    """Higher is tried first. The reference is last, just after backends that nobody placed."""
    if backend == REFERENCE:
        return -1
    return len(ORDER) - ORDER.index(backend) if backend in ORDER else 0
