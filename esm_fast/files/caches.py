"""Where things are kept between runs."""

import os
from pathlib import Path


def user_cache() -> Path:
    """As the XDG Base Directory Specification has it; "~" is not expanded."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")


def own_cache() -> Path | None:
    """$ESM_FAST_CACHE, or esm_fast in the user's cache; None for a user without a home."""
    try:
        return Path(os.environ.get("ESM_FAST_CACHE") or user_cache() / "esm_fast").expanduser().absolute()
    except RuntimeError:  # no home
        return None
