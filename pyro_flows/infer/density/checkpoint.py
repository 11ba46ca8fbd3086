"""Checkpoints of a fit: written in one piece or not at all, and refused where they belong to another fit."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flows.infer.machine.files import read_if_there, refuse_others, write_state

__all__ = [
    "COLUMNS",
    "KIND",
    "REMEDY",
    "Keeper",
    "architecture_of",
    "checksum",
    "layout_of",
    "own_randomness",
    "random_state",
    "read",
    "refuse_other",
    "set_random",
]

COLUMNS = ("epoch", "step", "train", "validation", "lr", "seconds")  # of a history

KIND, VERSION = "checkpoint of fit_density", 2
REMEDY = "delete it, or give another path as checkpoint"
PARTS = {
    **dict.fromkeys(("architecture", "data"), dict),
    "settings": {"seed": int},
    "units": {name: (Tensor, type(None)) for name in ("loc", "scale", "context_loc", "context_scale")},
    "training": {
        **dict.fromkeys(("flow", "best_state", "optimizer", "schedule"), dict),
        "history": dict.fromkeys(COLUMNS, list),
        "averages": list,
        **dict.fromkeys(("spent", "best"), float),
        **dict.fromkeys(("epoch", "step", "best_epoch"), int),
        "stopped": (str, type(None)),
    },
    "random": {"cpu": Tensor, "shuffle": Tensor},
}


class Keeper:
    """Keeps a copy of all that a resumed fit needs, as it was when an epoch ended, and writes that.

    Args:
        path: of the file; ``None`` to do nothing.
        content: makes the copy.
    """

    def __init__(self, path: str | os.PathLike[str] | None, content: Callable[[], Mapping[str, Any]]) -> None:
        self.path, self.content = path, content
        self._kept: Mapping[str, Any] | None = None

    def keep(self) -> None:
        """Takes a copy."""
        if self.path is not None:
            self._kept = self.content()

    def write(self) -> None:
        """Writes the last copy if that was not done before.

        Raises:
            OSError: if that is impossible; the file that was there is unchanged.
        """
        if self._kept is None:
            return
        try:
            write_state(self.path, self._kept, kind=KIND, version=VERSION)
        except OSError:
            self._kept = None  # it is in vain to try that again on the way out
            raise
        self._kept = None

    def leave(self) -> None:
        """Writes on the way out, where an error must not take the place of what is under way."""
        try:
            self.write()
        except (OSError, ValueError, TypeError) as error:
            warnings.warn(f"fit_density: {error}", RuntimeWarning, stacklevel=2)


def read(path: str | os.PathLike[str] | None) -> dict[str, Any] | None:
    """The content of a checkpoint, on the CPU; ``None`` if there is no file yet.

    Raises:
        ValueError: if the file cannot be read as one, or could not be written.
    """
    content = read_if_there(path, kind=KIND, version=VERSION, remedy=REMEDY, parts=PARTS)
    if content is None:
        return None
    with refuse_others(path, kind=KIND, remedy=REMEDY):
        lengths = {len(content["training"]["history"][name]) for name in COLUMNS}
        if lengths != {content["training"]["epoch"]}:
            raise ValueError(f"a history of {sorted(lengths)} epochs in place of {content['training']['epoch']}")
    return content


def refuse_other(
    path: str | os.PathLike[str], then: Mapping[str, Any], now: Mapping[str, Any], name: str = "fit_density"
) -> None:
    """Raises a ``ValueError`` that says in what the checkpoint's fit and this one differ.

    Args:
        path: of the checkpoint, for the message.
        then: what :func:`architecture_of` and the like gave when it was written, each a mapping by topic.
        now: the same for this fit.
        name: of the function, for the message.
    """
    for topic, expected in now.items():
        known = then.get(topic, {})
        for part in [*expected, *(part for part in known if part not in expected)]:
            if known.get(part) != expected.get(part):
                raise ValueError(
                    f"{name}: the checkpoint {str(path)!r} belongs to a fit of another {topic}: {part} is "
                    f"{_word(known, part)} there and {_word(expected, part)} here; make them agree to go on, or delete "
                    "the file or give another path to start anew"
                )


def _word(mapping: Mapping[str, Any], name: str) -> str:
    return str(mapping[name]) if name in mapping else "absent"


def architecture_of(module: nn.Module) -> dict[str, str]:
    """Names, shapes and dtypes of what a module saves."""
    return layout_of({name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)})


def layout_of(values: Mapping[str, Tensor | None]) -> dict[str, str]:
    """Names, shapes and dtypes."""
    return {name: "none" if value is None else f"{tuple(value.shape)} {value.dtype}" for name, value in values.items()}


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
