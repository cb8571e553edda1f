"""fair-esm's .pt files."""

from argparse import Namespace
from pathlib import Path

from ..models.family import families, titles
from .checkpoint import Checkpoint, CheckpointError
from .safe import require_tensors


def is_content(content) -> bool:
    """Whether a .pt file holds a model of fair-esm's, of whatever family."""
    if not isinstance(content, dict) or "model" not in content:
        return False
    return isinstance(content.get("args"), Namespace) or "cfg" in content


def read_content(path: Path, content: dict) -> Checkpoint:
    args = content.get("args")
    if not all(isinstance(name, str) for name in (vars(args) if isinstance(args, Namespace) else ())):
        raise CheckpointError(f"{path} is no checkpoint: its arguments have names that are no text")
    require_tensors(path, content["model"])
    try:
        found = [read for family in families().values() if (read := family.from_fair_esm(content)) is not None]
    except ValueError as error:  # LayoutErrors, and sizes that cannot be
        raise CheckpointError(f"{path}: {error}") from None
    except (TypeError, LookupError, AttributeError) as error:  # what stands where sizes should
        raise CheckpointError(f"{path}: its sizes cannot be read ({type(error).__name__})") from None
    if not found:
        arch = getattr(args, "arch", None)
        raise CheckpointError(f"{path} holds the architecture {arch!r}; esm_fast reads {titles()}")
    config, tensors = found[0]
    return Checkpoint(path, "fair-esm", config, tensors)
