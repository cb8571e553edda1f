"""Downloads from a server that misbehaves in a random way each time it is asked: the right file in the end, or none."""

import io
import random as random_module
from collections import Counter
from contextlib import redirect_stderr, suppress
from pathlib import Path
from random import Random

from web import serving

from esm_fast import download
from esm_fast.download import fetch

from .outcome import RIGHT, WRONG

_PAGE = b"<!doctype html><html>please log in</html>"


def _whole(handler, body, rng):
    handler.answer(200, body, 0, len(body))


def _part(handler, body, rng):
    """A range as it was asked for, or from another place."""
    asked = handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-")
    start = min(int(asked or 0), len(body)) if rng.random() < 0.7 else rng.randrange(len(body))
    handler.answer(206, body[start:], start, len(body))


def _cut(handler, body, rng):
    handler.answer(200, body[: rng.randrange(len(body))], 0, len(body))


def _other(handler, body, rng):
    """Another file, under another validator."""
    other = bytes(reversed(body))
    handler.answer(200, other[: rng.randrange(1, len(other))], 0, len(other), ETag=f'"{rng.random()}"')


def _page(handler, body, rng):
    handler.answer(200, _PAGE, 0, len(_PAGE), Content_Type="text/html")


def _wrong_length(handler, body, rng):
    said = rng.choice(["-5", "abc", "", "0", str(len(body) + 9), str(1 << 60), "1e3"])
    handler.answer(200, body, 0, len(body), Content_Length=said)


def _no_length(handler, body, rng):
    handler.answer(200, body[: rng.randrange(len(body))], 0, 0, Content_Length=None)


def _away(handler, body, rng):
    handler.send_response(302)
    handler.send_header(
        "Location", rng.choice(["file:///etc/passwd", "ftp://127.0.0.1:1/x", "data:,x", "/f", "http://[::2]/"])
    )
    handler.end_headers()


def _refused(handler, body, rng):
    handler.send_error(rng.choice([401, 403, 404, 416, 429, 500, 503]))


def _noise(handler, body, rng):
    handler.wfile.write(bytes(rng.choices(range(256), k=rng.randrange(400))))


def _encoded(handler, body, rng):
    handler.answer(200, body, 0, len(body), Content_Encoding=rng.choice(["gzip", "br", "x"]))


_WAYS = (_whole, _part, _cut, _other, _page, _wrong_length, _no_length, _away, _refused, _noise, _encoded)


def downloads(count: int, rng: Random, folder: Path) -> Counter:
    """Each begins on what the one before left."""
    outcomes, body = Counter(), random_module.Random(1).randbytes(300_000)
    download.STALL_SECONDS = 2
    with serving() as (server, address), redirect_stderr(io.StringIO()):
        server.files = {"/f": body}
        for number in range(count):
            target = folder / f"{number // 8}" / "f.pt"
            way = rng.choice(_WAYS)
            server.misbehaviour = lambda handler, body, way=way: _quietly(way, handler, body, rng)
            try:
                fetch(f"{address}/f", target)
                outcomes["the right file" if target.read_bytes() == body and RIGHT else WRONG] += 1
            except OSError:
                outcomes[WRONG if target.exists() else "an error, and no file"] += 1
            target.unlink(missing_ok=True)
    return outcomes


def _quietly(way, handler, body, rng) -> None:
    with suppress(OSError):
        way(handler, body, rng)


ATTACKS = {"downloads from a server that misbehaves at random": (1_000, downloads)}
