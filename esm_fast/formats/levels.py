"""Which of the CPU kernels' levels is in use, in their order: a new level needs no other list than the kernels' own."""

from .. import _C


def at_least(level: str) -> bool:
    """Whether the level in use is this one or a better one; False where the kernels were built without it."""
    known = [*_C.isas(), *_C.missing_isas()]  # best last
    return level in known and known.index(_C.isa()) >= known.index(level)
