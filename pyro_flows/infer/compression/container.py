"""The file format; numbers are little-endian."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from pyro_flows.infer.compression.decisions import Piece

__all__ = ["DTYPES", "MOST_ROWS", "Header", "corrupt", "pack", "unpack"]

MAGIC, VERSION = b"PFZ", 1
DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_START = struct.Struct("<3sBB8sI")  # magic, version, dtype, model, data
MOST_ROWS = 512  # in a piece
_LARGEST = 2**40  # of numbers in a file, and of their sums and products


class Header(NamedTuple):
    """The part of a file before the pieces.

    ``model`` is the model's digest, ``data`` and ``context`` are check sums, ``dtype`` is one of ``DTYPES``; each piece
    but the last has ``rows`` rows.
    """

    dtype: torch.dtype
    model: bytes
    data: int
    context: int | None
    batch: tuple[int, ...]
    rows: int


def _number(value: int) -> bytes:
    """An integer in seven bits a byte, the lowest first; the eighth bit marks all but the last."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


class _Bytes:
    """The bytes left to read."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise corrupt("it ends too early")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if value > _LARGEST:
                raise corrupt("a number in it is too large")
            if byte < 128:
                return value
            shift += 7


def corrupt(why: str) -> ValueError:
    """The error for a file that no codec wrote."""
    return ValueError(f"Codec: the data are corrupt or truncated: {why}; nothing was decoded")


def pack(header: Header, pieces: Sequence[tuple[Piece, bool]]) -> bytes:
    """Makes a file of pieces, each with whether it was written without the model."""
    out = [_START.pack(MAGIC, VERSION, DTYPES.index(header.dtype), header.model, header.data)]
    out.append(b"\0" if header.context is None else b"\1" + struct.pack("<I", header.context))
    out += [_number(value) for value in (len(header.batch), *header.batch, header.rows)]
    for piece, plain in pieces:
        noted = (2 * np.diff(piece.places, prepend=0) + piece.odd).tolist()
        numbers = (2 * len(piece.words) + plain, len(noted), *noted)
        out += [*map(_number, numbers), piece.words.astype("<u4").tobytes()]
    whole = b"".join(out)
    return whole + struct.pack("<I", zlib.crc32(whole))


def unpack(data: bytes) -> tuple[Header, list[tuple[Piece, bool]]]:
    """Reads the header and pieces from a file.

    Raises:
        ValueError: for other data, another version, or corrupt or truncated data.
    """
    if data[:3] != MAGIC[: len(data)] or not data:
        raise ValueError("Codec: expected data that a Codec has encoded, which begin with PFZ, got something else")
    if len(data) > 3 and data[3] != VERSION:
        raise ValueError(
            f"Codec: expected data of version {VERSION}, got version {data[3]}; they were written by another release, "
            "or are corrupt"
        )
    if len(data) < _START.size + 4 or struct.unpack("<I", data[-4:])[0] != zlib.crc32(data[:-4]):
        raise corrupt("their check sum is wrong")
    rest = _Bytes(data[:-4])
    _, _, code, model, sum_ = _START.unpack(rest.take(_START.size))
    if code >= len(DTYPES):
        raise corrupt("they are of no known dtype")
    flag = rest.take(1)[0]
    if flag > 1:
        raise corrupt("they say neither that there is a context nor that there is none")
    context = struct.unpack("<I", rest.take(4))[0] if flag else None
    dims = rest.number()
    if dims > 64:
        raise corrupt("they have too many dimensions")
    batch = tuple(rest.number() for _ in range(dims))
    if math.prod(max(size, 1) for size in batch) > _LARGEST:
        raise corrupt("their shape is too large")
    header = Header(DTYPES[code], model, sum_, context, batch, rest.number())
    pieces = []
    while rest.at < len(rest.data):
        size, plain = divmod(rest.number(), 2)
        noted = rest.number()
        places, odd, last = [], [], 0
        for _ in range(noted):  # each takes a byte at least
            gap, parity = divmod(rest.number(), 2)
            last += gap
            if last > _LARGEST:
                raise corrupt("a number in it is too large")
            places.append(last)
            odd.append(parity == 1)
        words = np.frombuffer(rest.take(4 * size), dtype="<u4")
        pieces.append((Piece(words, np.array(places, np.int64), np.array(odd, bool)), bool(plain)))
    # Each piece takes some bytes, so the file's length bounds the memory.
    if not 1 <= header.rows <= MOST_ROWS or len(pieces) != -(-math.prod(batch) // header.rows):
        raise corrupt("they have another number of pieces than their shape asks for")
    return header, pieces
