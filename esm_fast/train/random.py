"""Random numbers as a pure function of where they are used: (seed, purpose, epoch, record, position).

Nothing is drawn in sequence, so nothing depends on what was drawn before: a resumed run, another number of processes or
another packing sees the same crops, masks and order. Each record of an epoch has a SplitMix64 stream (Steele, Lea &
Flood 2014) of its own, of which position p is number p; its starting point is hashed by the same function. Unlike
NumPy's generators this is vectorised over streams, and no release of a library can change it.
"""

import numpy as np

ORDER, CROP, COUNT, SELECT, ACTION, REPLACEMENT, MEMBER, SOURCE = range(8)  # purposes: independent streams
STEP = np.uint64(0x9E3779B97F4A7C15)


def streams(seed: int, purpose: int, epoch: int, records) -> np.ndarray:
    """The stream of each record, uint64."""
    state = _words([seed])
    for words in ([purpose], [epoch], records):
        state = mix(state + STEP * (_words(words) + np.uint64(1)))
    return state


def uniform(stream: np.ndarray, positions) -> np.ndarray:
    """Number `position` of each stream, float64 in [0, 1) with 53 random bits."""
    return (mix(stream + STEP * (_words(positions) + np.uint64(1))) >> np.uint64(11)) * 2.0**-53


def _words(values) -> np.ndarray:
    return np.atleast_1d(np.asarray(values, dtype=np.int64)).astype(np.uint64)


def mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
