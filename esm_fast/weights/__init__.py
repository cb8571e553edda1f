"""Checkpoints: fair-esm's .pt, Hugging Face folders and our own safetensors, told apart by content, read safely.

Nothing is unpickled but tensors, plain containers and argparse.Namespace (which fair-esm stores its arguments in).
Tensors stay memory-mapped where they need no conversion, so loading costs little more than the weights.
"""

from .builder import NoRegressionWarning, build
from .checkpoint import CONTACT_KEYS, Checkpoint, CheckpointError
from .huggingface import config_from_hf
from .integrity import sha256
from .native import FORMAT, checksum, save
from .reader import files_of, prepacked_dtype, read
from .regression import attach, beside, worth_of
from .regression import save as save_regression

__all__ = [
    "CONTACT_KEYS",
    "Checkpoint",
    "CheckpointError",
    "FORMAT",
    "NoRegressionWarning",
    "attach",
    "beside",
    "build",
    "checksum",
    "config_from_hf",
    "files_of",
    "prepacked_dtype",
    "read",
    "save",
    "save_regression",
    "sha256",
    "worth_of",
]
