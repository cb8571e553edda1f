"""Compressed streams, told apart by their first bytes, to plain bytes."""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import BinaryIO


class DamagedStreamError(Exception):
    """A compressed stream that is cut or corrupt."""


def _zst_decoder():
    import zstandard  # here, so that nothing else waits for it

    # Frames made with `zstd --long=31` need a window this large; the default refuses them.
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


# The first bytes (for zst also those of a skippable frame, with which pzstd begins), and what makes a decoder.
_FORMATS: dict[str, tuple[tuple[bytes, ...], Callable]] = {
    "gz": ((b"\x1f\x8b",), lambda: zlib.decompressobj(wbits=31)),
    "bz2": ((b"BZh",), bz2.BZ2Decompressor),
    "xz": ((b"\xfd7zXZ\0",), lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)),
    "zst": ((b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i]) + b"\x2a\x4d\x18" for i in range(16))), _zst_decoder),
}
_MAGIC_BYTES = 6  # the longest
# zstandard cannot limit what it returns, so it gets little at a time; the others copy what is left when a member ends.
_SLICE_BYTES = {"gz": 1 << 16, "bz2": 1 << 16, "xz": 1 << 16, "zst": 1 << 12}


def decompress(stream: BinaryIO, chunk_bytes: int) -> Iterator[bytes]:
    """The plain bytes of a stream, in pieces."""
    pieces = _pieces(stream, chunk_bytes)
    head = b""
    while len(head) < _MAGIC_BYTES and (piece := next(pieces, b"")):
        head += piece
    pieces = chain([head], pieces)
    for kind, (magic, decoder) in _FORMATS.items():
        if head.startswith(magic):
            return _members(pieces, kind, decoder, chunk_bytes)
    return pieces


def _pieces(stream: BinaryIO, size: int) -> Iterator[bytes]:
    while piece := stream.read(size):
        if isinstance(piece, str):
            raise TypeError("the FASTA file object is open as text: open it in binary mode, 'rb'")
        yield bytes(piece)


def _members(pieces: Iterator[bytes], kind: str, new_decoder: Callable, limit: int) -> Iterator[bytes]:
    """The plain bytes of all members (gz), streams (bz2, xz) or frames (zst), each checked to its end."""
    step, decoder = _SLICE_BYTES[kind], None
    for data in (piece[at : at + step] for piece in pieces for at in range(0, len(piece), step)):
        more = False  # output held back by the limit
        while data or more:
            if decoder is None:
                data = data.lstrip(b"\0")  # members may be padded with zeros, as gzip allows
                if not data:
                    break
                decoder = new_decoder()
            try:
                plain = decoder.decompress(data) if kind == "zst" else decoder.decompress(data, limit)
            except Exception as error:  # each library has an exception of its own
                raise DamagedStreamError(f"the {kind} stream is corrupt ({error})") from error
            if plain:
                yield plain
            if decoder.eof:
                data, decoder, more = decoder.unused_data, None, False
            else:
                data, more = getattr(decoder, "unconsumed_tail", b""), len(plain) == limit
    if decoder is not None:
        raise DamagedStreamError(f"the {kind} stream is cut short")


@contextmanager
def named(name: str) -> Iterator[None]:
    """What the system says of a stream while it is read tells which it was, and is not taken for the output's."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = name
        raise


class Decompressed(io.RawIOBase):
    """The plain bytes of a stream as a file to read."""

    def __init__(self, stream: BinaryIO):
        self._pieces, self._left = decompress(stream, 1 << 20), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count
