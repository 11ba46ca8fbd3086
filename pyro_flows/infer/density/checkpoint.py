"""Checkpoints of a fit: written in one piece or not at all, and refused where they belong to another fit."""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "architecture_of",
    "checksum",
    "own_randomness",
    "random_state",
    "read",
    "refuse_other",
    "set_random",
    "write",
]

_FORMAT = 1


def write(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Saves a checkpoint: the file is the old one or the new one at any time, whatever happens meanwhile."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"format": _FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str] | None) -> dict[str, Any] | None:
    """The content of a checkpoint, on the CPU; ``None`` if there is no file yet.

    Raises:
        ValueError: if the file cannot be read as one, or could not be written.
    """
    if path is None:
        return None
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"fit_density: expected checkpoint to be a file in a folder that exists, got {str(path)!r}")
    if not path.exists():
        return None
    remedy = "delete it, or give another path as checkpoint"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file does to an unpickler
        raise ValueError(
            f"fit_density: the checkpoint {str(path)!r} cannot be read ({type(error).__name__}); {remedy}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"fit_density: {str(path)!r} is no checkpoint of this function; {remedy}")
    return content


def refuse_other(path: str | os.PathLike[str], then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises a ``ValueError`` that says in what the checkpoint's fit and this one differ.

    Args:
        path: of the checkpoint, for the message.
        then: what :func:`architecture_of` and the like gave when it was written, each a mapping by topic.
        now: the same for this fit.
    """
    for topic, expected in now.items():
        known = then.get(topic, {})
        for name in [*expected, *(name for name in known if name not in expected)]:
            if known.get(name) != expected.get(name):
                raise ValueError(
                    f"fit_density: the checkpoint {str(path)!r} belongs to a fit of another {topic}: {name} is "
                    f"{_word(known, name)} there and {_word(expected, name)} here; make them agree to go on, or delete "
                    "the file or give another path to start anew"
                )


def _word(mapping: Mapping[str, Any], name: str) -> str:
    return str(mapping[name]) if name in mapping else "absent"


def architecture_of(module: nn.Module) -> dict[str, str]:
    """Names, shapes and dtypes of what a module saves."""
    return {
        name: f"{tuple(value.shape)} {value.dtype}"
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor)
    }


def checksum(value: Tensor | None) -> str:
    """Shape, dtype and a checksum of all bytes."""
    if value is None:
        return "none"
    sum_ = 0
    for piece in value.split(65536):
        sum_ = zlib.crc32(piece.cpu().contiguous().view(torch.uint8).numpy(), sum_)
    return f"{tuple(value.shape)} {value.dtype}, checksum {sum_:08x}"


@contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's global generators, of the CPU and of this device, start from a seed inside and are put back after."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def random_state(device: torch.device, **generators: torch.Generator | None) -> dict[str, Tensor]:
    """States of torch's global generators and of those given."""
    states = {name: generator.get_state() for name, generator in generators.items() if generator is not None}
    states["cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random(states: Mapping[str, Tensor], device: torch.device, **generators: torch.Generator | None) -> None:
    """Puts back what :func:`random_state` gave."""
    for name, generator in generators.items():
        if generator is not None and name in states:
            generator.set_state(states[name])
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
