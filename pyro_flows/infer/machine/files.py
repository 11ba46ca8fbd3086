"""Files of plain data: written whole or not at all, verified, and read without running any content.

A file is a line with the format, a JSON description, the bytes of the tensors, and a SHA-256 digest of all that.  It
names no class or module, so it outlives changes of them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

__all__ = ["check_path", "read_state", "refuse_others", "remove_leftovers", "write_state"]

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module has no better type

_MAGIC = b"pyro_flows state 1\n"
_LENGTH = struct.Struct("<Q")  # of the description
_DIGEST = hashlib.sha256().digest_size
_ALIGNMENT = 64
_STEM = 50  # letters of a name, so that more can be appended
# Torch, and too deep a nesting, raise RuntimeError.
_UNEXPECTED = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, struct.error)

_SCALARS = (type(None), bool, int, float, str)


def write_state(path: str | os.PathLike[str], state: Any, *, kind: str, version: int = 1) -> None:
    """Writes plain data to a file, which holds the old or the new data at any time.

    The data go to a hidden file beside it, ``.NAME.********.part``, which then takes its place.  Leftovers of killed
    runs are removed; a living process locks its own.

    Args:
        path: the path to write to; a link is followed.
        state: nested dictionaries (with scalar keys), lists, tuples, strings, numbers, Booleans, ``None`` and tensors;
            subclasses become the plain kind.
        kind: the kind of file, e.g. ``"checkpoint of fit_density"``; others are refused on reading.
        version: the version of the contents; others are refused, too.

    Raises:
        ValueError: if the folder does not exist, or the path is no file.
        TypeError: if ``state`` holds anything else; says where.
        OSError: if writing fails, e.g. because the disk is full; the old file is unchanged.
    """
    path = check_path(path)
    tensors: list[Tensor] = []
    encoded = _encode(state, tensors, "state")
    places, end = [], 0
    for tensor in tensors:
        places.append([str(tensor.dtype).removeprefix("torch."), list(tensor.shape), end])
        end += tensor.nbytes + -tensor.nbytes % _ALIGNMENT
    described = {"kind": kind, "version": version, "byteorder": sys.byteorder, "tensors": places, "state": encoded}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(len(_MAGIC) + _LENGTH.size + len(text)) % _ALIGNMENT)
    parts: list[Any] = [_MAGIC + _LENGTH.pack(len(text)) + text]
    for tensor in tensors:
        parts += [tensor.reshape(-1).view(torch.uint8).numpy().data, bytes(-tensor.nbytes % _ALIGNMENT)]
    remove_leftovers(path)
    digest = hashlib.sha256()
    try:
        if path.exists() and not os.access(path, os.W_OK):  # a replaceable file may still be protected
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with _replacing(path) as file:
            for part in parts:
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
    except OSError as error:
        known = "the file that was there is unchanged" if path.exists() else "no file was written"
        raise type(error)(
            error.errno,
            f"the {kind} could not be written ({error.strerror or error}); {known}; make room, or give a path in a "
            "folder that can be written to",
            str(path),
        ) from error


def read_state(
    path: str | os.PathLike[str], *, kind: str, version: int = 1, remedy: str, parts: Mapping[str, Any] | None = None
) -> Any:
    """Reads a file of :func:`write_state`, tensors on the CPU, without running any content.

    ``parts`` maps entries to types or, for dictionaries, parts; other entries are allowed.  ``remedy`` is advice for
    messages.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if the file is damaged, of another kind or version, or not from this package.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"expected the path of a {kind}, got {str(path)!r}, which is no file")
    refusal = partial(_refusal, path, kind, remedy=remedy)
    with open(path, "rb") as file:
        data = bytearray(file.read(len(_MAGIC)))
        if data != _MAGIC:
            why = "it is no such file, is damaged, or comes from another release" if data else "it is empty"
            raise refusal(why)
        data += file.read()
    body = memoryview(data)[:-_DIGEST]
    if hashlib.sha256(body).digest() != data[-_DIGEST:]:
        raise refusal("it is damaged or not whole (its check sum is wrong)")
    with refuse_others(path, kind=kind, remedy=remedy):
        (length,) = _LENGTH.unpack_from(body, len(_MAGIC))
        begin = len(_MAGIC) + _LENGTH.size
        described = json.loads(bytes(body[begin : begin + length]))
        found = described["kind"], described["version"], described["byteorder"]
        if found[0] == kind and found[1:] == (version, sys.byteorder):
            tensors = [_tensor(body[begin + length :], *place) for place in described["tensors"]]
            state = _decode(described["state"], tensors)
            if parts is not None:
                _check_parts(state, parts, "it")
            return state
    if found[0] != kind:
        raise refusal(f"it is a {found[0]}")
    if found[1] != version:
        raise refusal(f"it is of version {found[1]}, and this release reads version {version}")
    raise refusal(f"its numbers are {found[2]}-endian, and this machine is not")


@contextmanager
def refuse_others(path: str | os.PathLike[str] | None, *, kind: str, remedy: str) -> Iterator[None]:
    """Raises the ``ValueError`` of :func:`read_state` for errors inside, from unusable contents."""
    try:
        yield
    except _UNEXPECTED as error:
        raise _refusal(
            path, kind, f"its contents are not as expected ({type(error).__name__}: {error})", remedy
        ) from error


def _refusal(path: str | os.PathLike[str] | None, kind: str, why: str, remedy: str) -> ValueError:
    return ValueError(f"the {kind} {str(path)!r} cannot be read: {why}; {remedy}")


def _check_parts(state: Any, parts: Mapping[str, Any], where: str) -> None:
    if not isinstance(state, dict):
        raise TypeError(f"{where} is a {type(state).__name__}, expected a dict")
    for name, kinds in parts.items():
        if name not in state:
            raise ValueError(f"{where} lacks {name!r}")
        if isinstance(kinds, dict):
            _check_parts(state[name], kinds, f"{name!r}")
        elif not isinstance(state[name], kinds):
            raise TypeError(f"{name!r} is a {type(state[name]).__name__}")


def check_path(path: str | os.PathLike[str]) -> Path:
    """Follows links; requires an existing folder, and a path that is a file or free.

    Raises:
        ValueError: otherwise.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise ValueError(
            f"expected the path of a file in a folder that exists, got {str(path)!r}; make the folder first"
        )
    if path.exists() and not path.is_file():
        raise ValueError(f"expected the path of a file, got {str(path)!r}, which is something else; give another path")
    return path


# Replacing a file.


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file, which replaces the old one at the end, or vanishes after an error."""
    while True:
        name = path.with_name(f".{path.name[:_STEM]}.{secrets.token_hex(4)}.part")
        try:
            with open(name, "xb") as file:
                if fcntl is not None:
                    with suppress(OSError):  # where a file system has no locks, leftovers stay
                        fcntl.flock(file, fcntl.LOCK_EX)
                # Another process may have removed this file as a leftover before the lock.
                if not os.fstat(file.fileno()).st_nlink:
                    continue
                with suppress(OSError):
                    os.chmod(name, stat.S_IMODE(path.stat().st_mode))
                yield file
                file.flush()
                os.fsync(file.fileno())
                if fcntl is not None:
                    os.replace(name, path)  # under the lock, so that nobody removes it
            if fcntl is None:
                os.replace(name, path)  # Windows moves no open file
            break
        except BaseException:
            name.unlink(missing_ok=True)
            raise
    with suppress(OSError):  # the new name outlives a loss of power, on most systems
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Removes unfinished files of killed processes; living ones lock theirs."""
    path = Path(os.path.realpath(path))
    if fcntl is None:
        return
    pattern = re.compile(rf"\.{re.escape(path.name[:_STEM])}\.[0-9a-f]{{8}}\.part")
    with suppress(OSError):  # a folder that cannot be listed
        for name in os.listdir(path.parent):
            if not pattern.fullmatch(name):
                continue
            # Gone, locked, or not ours.
            with suppress(OSError), open(path.parent / name, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path.parent / name)


# As JSON, scalars stand for themselves, all else is a list that begins with its kind.


def _encode(value: Any, tensors: list[Tensor], where: str) -> Any:
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise TypeError(f"expected dense tensors, got one of another layout at {where}")
        tensors.append(value.detach().resolve_conj().resolve_neg().cpu().contiguous())
        return ["tensor", len(tensors) - 1]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, _SCALARS):
                raise TypeError(f"expected keys that are strings or numbers, got {type(key).__name__} at {where}")
        return ["dict", *([key, _encode(each, tensors, f"{where}[{key!r}]")] for key, each in value.items())]
    if isinstance(value, (list, tuple)):
        name = "list" if isinstance(value, list) else "tuple"
        return [name, *(_encode(each, tensors, f"{where}[{k}]") for k, each in enumerate(value))]
    raise TypeError(
        "expected dictionaries, lists, tuples, strings, numbers, Booleans, None and tensors, got "
        f"{type(value).__name__} at {where}"
    )


def _decode(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, _SCALARS):
        return value
    name, *rest = value
    if name == "tensor":
        return tensors[rest[0]]
    if name == "dict":
        return {key: _decode(each, tensors) for key, each in rest}
    found = [_decode(each, tensors) for each in rest]
    return {"list": found, "tuple": tuple(found)}[name]


def _tensor(data: memoryview, name: str, shape: list[int], offset: int) -> Tensor:
    """Reads a tensor from its description, if it lies within the data."""
    dtype, count = getattr(torch, name), math.prod(shape)
    fits = isinstance(dtype, torch.dtype) and min(offset, *shape, 0) >= 0
    if not fits or offset + count * dtype.itemsize > len(data):
        raise ValueError(f"a tensor of dtype {name} and shape {shape} at {offset} of {len(data)} bytes")
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=offset).clone().reshape(shape)
