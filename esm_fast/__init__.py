"""esm_fast: ESM-1b, ESM-1v and ESM-2 without padding, as a drop-in for fair-esm and Hugging Face."""

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
    "best_layer": ".sklearn",
    "build_dataset": ".dataset.build",
    "open": ".dataset.reader",
    "embed": ".inference.embed",
    "load": ".inference.load",
    "repack": ".edits",
    "read_fasta": ".sequences.fasta",
    "EsmForMaskedLM": ".compat.hf",
    "EsmModel": ".compat.hf",
    "EsmTokenizer": ".compat.hf",
    "ESMForMaskedLM": ".compat.hf",
    "ESMTokenizer": ".compat.hf",
}
_MODULES = ("pretrained", "sklearn", "variants")


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _FROM:
        raise AttributeError(f"module 'esm_fast' has no attribute {name!r}")
    try:
        module = importlib.import_module(_FROM[name], __name__)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(f"esm_fast.{name} needs transformers: pip install 'esm_fast[hf]'") from None
    value = globals()[name] = getattr(module, name)
    return value


def __dir__():
    return sorted({*globals(), *_FROM, *__all__})


__all__ = [*_MODULES, *(name for name in _FROM if name != "open")]  # a star import must not hide open()
