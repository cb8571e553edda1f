"""fair-esm's `esm.pretrained`: one function a published model, each returning (model, alphabet)."""

from .inference.load import load
from .models.family import aliases, published


def load_model_and_alphabet(model_name):
    """Loads by name or by path, as fair-esm's function of this name."""
    return load(model_name)


load_model_and_alphabet_hub = load_model_and_alphabet_local = load_model_and_alphabet


def __getattr__(name: str):
    if name not in published() and name not in aliases():
        raise AttributeError(f"esm_fast.pretrained has no {name!r}; it has {', '.join(__all__)}")

    def function():
        return load(name)

    function.__name__ = name
    function.__doc__ = f"Loads {name} and returns (model, alphabet)."
    return function


def __dir__():
    return __all__


__all__ = ["load_model_and_alphabet", *published(), *(alias for alias in aliases() if "/" not in alias)]
