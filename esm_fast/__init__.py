"""esm_fast: ESM-1b without padding, as a drop-in for fair-esm and Hugging Face."""

import importlib

__version__ = "0.1.0"

# name -> the module it comes from. Imported when first asked for: torch takes seconds, and transformers is an extra.
_FROM = {
    "Alphabet": ".alphabet",
    "BatchConverter": ".alphabet",
    "FastaBatchedDataset": ".compat.fair_esm",
    "ProteinBertModel": ".compat.fair_esm",
    "accelerate": ".compat.accelerate",
    "unaccelerate": ".compat.accelerate",
    "embed": ".engine",
    "load": ".engine",
    "read_fasta": ".data",
    "EsmForMaskedLM": ".compat.hf",
    "EsmModel": ".compat.hf",
    "EsmTokenizer": ".compat.hf",
    "ESMForMaskedLM": ".compat.hf",
    "ESMTokenizer": ".compat.hf",
}


def __getattr__(name: str):
    if name == "pretrained":
        return importlib.import_module(".pretrained", __name__)
    if name not in _FROM:
        raise AttributeError(f"module 'esm_fast' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_FROM[name], __name__), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})


__all__ = ["pretrained", *_FROM]
