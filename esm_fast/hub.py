"""Names of models -> files: in this package, in torch-hub's and Hugging Face's caches, or by a resumable download."""

import os
import stat
import warnings
from pathlib import Path

import torch

from .download import fetch
from .files.caches import user_cache
from .models import family
from .models.family import canonical_name

__all__ = ["cached", "canonical_name", "fetch", "is_published", "published_names", "resolve"]


def published_names() -> list[str]:
    """fair-esm's, and the small one in this package."""
    return list(family.published())


def is_published(name: str | Path) -> bool:
    """Whether a name, in any of its forms, is one `resolve` finds in the caches or downloads."""
    return canonical_name(str(name)) in published_names()


def resolve(name_or_path: str | Path) -> Path:
    """The file or folder of a checkpoint: a cached model, one downloaded now, or a path that exists.

    A published name means the published model, whatever the working directory holds; ./NAME is the path.

    Raises:
        FileNotFoundError: for a path or name that leads nowhere, saying which file to put where.
        UntrustedError: a cache where somebody else could have put the file.
    """
    path, name = Path(name_or_path).expanduser(), canonical_name(str(name_or_path))
    if path.exists() and (name not in published_names() or isinstance(name_or_path, Path)):
        return path
    if name not in published_names():
        raise FileNotFoundError(
            f"{name_or_path} is neither a file nor a model esm_fast knows; names are {', '.join(published_names())}, "
            f"their 'facebook/' forms, and random:NAME[:seed]"
        )
    if path.is_file() or (path / "config.json").exists():
        warnings.warn(f"{name_or_path} is the published model; to load what lies here, write ./{path}", stacklevel=2)
    return cached(name) or _download(name)


def cached(name: str) -> Path | None:
    """Where a published model lies: in this package, in torch-hub's cache (fair-esm's files), or in Hugging Face's."""
    if (own := Path(__file__).parent / "models" / f"{name}.safetensors").exists():
        return own
    file = torch_hub_folder() / f"{name}.pt"
    if file.exists():
        side = name + family.REGRESSION
        for found in (file, file.with_name(side), file.with_name(side.removesuffix(".pt") + ".safetensors")):
            _require_trusted(found)
        return file
    for repository in _repositories(name):
        if (snapshot := _snapshot(repository)) is not None and (files := _model_files(snapshot)):
            for found in files:
                _require_trusted(found)
            return snapshot
    return None


# --- Hugging Face's cache -------------------------------------------------------------------------------------------


def _repositories(name: str) -> list[str]:
    return [f"facebook/{name}", *(alias for alias, of in family.aliases().items() if of == name and "/" in alias)]


def _snapshot(repository: str) -> Path | None:
    """The revision that refs/main names, as transformers takes it; None where that is not there."""
    folder = hf_cache_folder() / f"models--{repository.replace('/', '--')}"
    if not folder.is_dir():
        return None
    if not any((folder / "refs").glob("**/*")):  # copied without them: what is alone there is not another revision
        snapshots = list(folder.glob("snapshots/*"))
        return snapshots[0] if len(snapshots) == 1 else None
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:  # it comes with transformers; the layout is documented
        return _plain_snapshot(folder)
    config = try_to_load_from_cache(repository, "config.json", cache_dir=folder.parent)
    return Path(config).parent if isinstance(config, str) else None


def _plain_snapshot(folder: Path) -> Path | None:
    main = folder / "refs" / "main"
    revision = main.read_text().strip() if main.is_file() else ""
    snapshot = folder / "snapshots" / revision
    return snapshot if revision == Path(revision).name != "" and (snapshot / "config.json").exists() else None


def _model_files(snapshot: Path) -> list[Path]:
    """What is read of a model's folder; [] where a part of it has not been downloaded."""
    from .weights.huggingface import files_of

    try:
        files = files_of(snapshot)
    except (OSError, ValueError):
        return []
    return files if all(file.exists() for file in files) else []


# --- trust ----------------------------------------------------------------------------------------------------------


class UntrustedError(PermissionError):
    """A cached file that somebody else could have put there."""


def _require_trusted(file: Path) -> None:
    """Where everybody may write, a file counts only if it, and the link that leads to it, are one's own or root's."""
    if not file.exists():
        return
    places = {part for start in (file.absolute(), file.resolve()) for part in start.parents}
    exposed = [place for place in places if place.stat().st_mode & stat.S_IWOTH]
    owners = {file.lstat().st_uid, file.stat().st_uid}
    if exposed and not owners <= {os.geteuid(), 0}:
        raise UntrustedError(
            f"{file} belongs to somebody else, in {max(exposed)}, where everybody may write: it could be any model. "
            f"Give its path in the place of its name if you trust it, or take the right from others: chmod o-w"
        )


# --- downloads ------------------------------------------------------------------------------------------------------


def _download(name: str) -> Path:
    target = torch_hub_folder() / f"{name}.pt"
    files = [(url, target.with_name(file)) for url, file in family.of_name(name).downloads(name)]
    try:
        for url, file in files:
            fetch(url, file, _require_checkpoint)
    except (OSError, ValueError) as error:  # urllib's and the socket's errors are OSErrors
        wanted = " and ".join(str(file) for _, file in files)
        raise FileNotFoundError(
            f"{name} is in no cache and could not be downloaded ({error}). On a machine with a network get "
            f"{' and '.join(url for url, _ in files)}, and put them here as {wanted}; or give a path, "
            "of a file or folder, in the place of the name"
        ) from None
    return target


def _require_checkpoint(file: Path) -> None:
    """Raises CheckpointError for a download that is no file of tensors, or was damaged on its way."""
    from .weights.safe import read_torch

    read_torch(file)


def torch_hub_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def hf_cache_folder() -> Path:
    """As huggingface_hub finds it; it reads the environment once, when it is imported, and this each time."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    home = os.environ.get("HF_HOME") or user_cache() / "huggingface"
    return Path(given or Path(home) / "hub").expanduser()
