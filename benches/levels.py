"""Everyone held to one instruction-set level, so that a newer CPU stands in for an older one.

The libraries read these variables when they are loaded, so `hold` starts the command again with them set.
"""

import os
import sys

from machine import LEVEL_VARIABLES

LEVELS = {  # the values of LEVEL_VARIABLES
    "avx2": ("AVX2", "avx2", "AVX2", "avx2"),
    "avx512": ("AVX512_CORE", "avx512", "AVX512", "avx512"),
    "avx512bf16": ("AVX512_CORE_BF16", "avx512", "AVX512", "avx512bf16"),
}


def hold(level: str) -> None:
    """Returns if this process is held to the level; else replaces it by one that is."""
    wanted = dict(zip(LEVEL_VARIABLES, LEVELS[level], strict=True))
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, os.environ | wanted)
