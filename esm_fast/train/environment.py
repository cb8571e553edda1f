"""What torch's libraries read from the environment when they are loaded, as training on CPUs wants it."""

import os

SETTINGS = {
    # Torch's threads, done with their share, would look out for more for some milliseconds, on the cores that our own
    # kernels have got meanwhile: these and torch's take turns many times a step.
    "GOMP_SPINCOUNT": "10000",  # about a tenth of a millisecond
    # Every packed batch has shapes of its own, and oneDNN keeps what it prepares for each: 1,024 by default.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}


def prepare() -> None:
    """To be called before torch is imported; what the user has set stays."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
