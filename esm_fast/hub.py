"""Names of models -> files: in this package, in torch-hub's and Hugging Face's caches, or by a resumable download."""

import os
import urllib.error
import urllib.request
from pathlib import Path

import torch
from tqdm import tqdm

from .models import family
from .models.family import canonical_name

__all__ = ["cached", "canonical_name", "fetch", "is_published", "published_names", "resolve"]
_CHUNK = 1 << 20


def published_names() -> list[str]:
    """fair-esm's, and the small one in this package."""
    return list(family.published())


def is_published(name: str | Path) -> bool:
    """Whether a name, in any of its forms, is one `resolve` finds in the caches or downloads."""
    return canonical_name(str(name)) in published_names()


def resolve(name_or_path: str | Path) -> Path:
    """The file or folder of a checkpoint: a path that exists, a cached model, or one downloaded now.

    Raises:
        FileNotFoundError: for a path or name that leads nowhere, saying which file to put where.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    name = canonical_name(str(name_or_path))
    if name not in published_names():
        raise FileNotFoundError(
            f"{name_or_path} is neither a file nor a model esm_fast knows; names are {', '.join(published_names())}, "
            f"their 'facebook/' forms, and random:NAME[:seed]"
        )
    return cached(name) or _download(name)


def cached(name: str) -> Path | None:
    """Where a published model lies: in this package, in torch-hub's cache (fair-esm's files), or in Hugging Face's."""
    if (own := Path(__file__).parent / "models" / f"{name}.safetensors").exists():
        return own
    file = torch_hub_folder() / f"{name}.pt"
    if file.exists():
        return file
    for repository in (
        f"facebook/{name}",
        *(alias for alias, of in family.aliases().items() if of == name and "/" in alias),
    ):
        for snapshot in sorted(hf_cache_folder().glob(f"models--{repository.replace('/', '--')}/snapshots/*")):
            if (snapshot / "config.json").exists() and any(snapshot.glob("*model*")):
                return snapshot
    return None


def fetch(url: str, target: Path) -> None:
    """Downloads into target.part and renames it; an interrupted download continues where it stopped."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with _open(request) as reply:
        if reply is not None:  # None: the server has no byte beyond what is already here
            resumed = reply.status == 206
            total = int(reply.headers.get("Content-Length", 0)) + (have if resumed else 0)
            _copy(reply, part, "ab" if resumed else "wb", target.name, have if resumed else 0, total)
    part.replace(target)


class _open:
    """urlopen, with 416 (range not satisfiable: the part is complete) turned into None."""

    def __init__(self, request):
        self.request, self.reply = request, None

    def __enter__(self):
        try:
            self.reply = urllib.request.urlopen(self.request, timeout=30)
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
        return self.reply

    def __exit__(self, *_):
        if self.reply is not None:
            self.reply.close()


def _copy(reply, part: Path, mode: str, name: str, start: int, total: int) -> None:
    with part.open(mode) as out, tqdm(total=total or None, initial=start, unit="B", unit_scale=True, desc=name) as bar:
        while chunk := reply.read(_CHUNK):
            out.write(chunk)
            bar.update(len(chunk))
        out.flush()
        os.fsync(out.fileno())
    if total and part.stat().st_size < total:
        raise ConnectionError(f"the connection closed after {part.stat().st_size} of {total} bytes")


def _download(name: str) -> Path:
    target = torch_hub_folder() / f"{name}.pt"
    files = [(url, target.with_name(file)) for url, file in family.of_name(name).downloads(name)]
    try:
        for url, file in files:
            if not file.exists():
                fetch(url, file)
    except OSError as error:  # urllib's and the socket's errors are OSErrors
        wanted = " and ".join(str(file) for _, file in files)
        raise FileNotFoundError(
            f"{name} is in no cache and could not be downloaded ({error}). On a machine with a network get "
            f"{' and '.join(url for url, _ in files)}, and put them here as {wanted}; or give a path to "
            f"esm_fast.load"
        ) from None
    return target


def torch_hub_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def hf_cache_folder() -> Path:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
