"""JSON files that know their own checksum."""

import json
from pathlib import Path

from .atomic import committed
from .checksums import digest_of


class DamagedError(ValueError):
    """A file that is not as it was written; the message names it."""


def write_json(path: Path, content: dict, *, replace: bool = True) -> None:
    """replace: without it, raises FileExistsError where another process was first."""
    text = json.dumps(content | {"sha256": digest_of(content)}, indent=1) + "\n"
    with committed(path, replace=replace) as output:
        output.write(text.encode())


def read_json(path: Path) -> dict:
    """Raises DamagedError where a byte of it has changed."""
    data = path.read_bytes()
    try:
        content = json.loads(data)
        digest = content.pop("sha256")
        intact = json.dumps(content | {"sha256": digest}, indent=1).encode() + b"\n" == data
        intact = intact and digest == digest_of(content)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise DamagedError(f"{path} is damaged: it does not match its own checksum")
    return content
