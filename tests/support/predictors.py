"""What the tests of fine-tuning share: proteins, and the sizes of a model."""

import numpy as np

from esm_fast.models.esm1 import Config

CONFIG = Config(2, 32, 64, 2, max_positions=64)
LETTERS = "LAGVSERTIDPKQNFYMHWC"


def proteins(count, seed=0):
    generator = np.random.default_rng(seed)
    return ["".join(generator.choice(list(LETTERS), generator.integers(4, 40))) for _ in range(count)]
