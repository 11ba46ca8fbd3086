"""Checkpoints of ``fit_guide``: what a fit needs to go on, and in what another fit differs."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyro_flows.infer.density.checkpoint import checksum
from pyro_flows.infer.machine.files import read_if_there, refuse_others, write_state
from pyro_flows.infer.models.latents import Latents

__all__ = ["Keeper", "data_of", "latents_of", "read", "refuse"]

KIND, VERSION = "checkpoint of fit_guide", 1


REMEDY = "delete it, or give another path as checkpoint"


PARTS = {
    **dict.fromkeys(("architecture", "latents", "data", "parameters", "settings", "start"), dict),
    "training": {
        "phase": str,
        **dict.fromkeys(("first", "spent", "trained"), float),
        **dict.fromkeys(("flow", "history"), dict),
        "moments": list,
        "best": (dict, type(None)),
        **dict.fromkeys(("exact", "window", "failed_steps", "dropped", "done"), int),
    },
    "random": {"cpu": Tensor, "search": Tensor},
}


EVERY = 30.0  # seconds between checkpoints at most


class Progress(Protocol):
    """How far a fit is.

    Attributes:
        done: steps.
        elapsed: seconds.
    """

    done: int
    elapsed: float


class Keeper:
    """Keeps what a fit needs to go on, as it was after the last step, and writes it now and then.

    Args:
        path: of the file.
        every: steps between two checkpoints at most; 30 seconds are another bound.
        content: makes the rest of the checkpoint, such as random states, at the same time.
    """

    def __init__(self, path: str | os.PathLike[str], every: int, content: Callable[[], Mapping[str, Any]]) -> None:
        self.path, self.every, self.content = path, every, content
        self._kept: dict[str, Any] | None = None
        self._length = 0
        self._written: tuple[int, float] | None = None

    def keep(self, state: dict[str, Any], progress: Progress) -> None:
        """Takes the state after a step, and writes it if it is time."""
        self._kept, self._length = {**self.content(), "training": state}, len(state["history"])
        now = (progress.done, progress.elapsed)
        if self._written is None or now[0] - self._written[0] >= self.every or now[1] - self._written[1] >= EVERY:
            self.write()
            self._written = now

    def write(self) -> None:
        """Writes the state that was kept last, if that was not done before.

        Raises:
            OSError: if that is impossible; the file that was there is unchanged.
        """
        kept, self._kept = self._kept, None
        if kept is None:
            return
        # The history goes on growing; all of it that is newer than the state is left out.
        columns = dataclasses.asdict(kept["training"]["history"])
        history = {name: values[: self._length] for name, values in columns.items()}
        try:
            state = {**kept, "training": {**kept["training"], "history": history}}
            write_state(self.path, state, kind=KIND, version=VERSION)
        except KeyboardInterrupt:
            self._kept = kept  # for the way out
            raise

    def leave(self) -> None:
        """Writes on the way out, where an error must not take the place of what is under way."""
        try:
            self.write()
        except (OSError, ValueError, TypeError) as error:
            warnings.warn(f"fit_guide: {error}", RuntimeWarning, stacklevel=2)


def read(path: str | os.PathLike[str] | None) -> dict[str, Any] | None:
    """The content of a checkpoint, on the CPU; ``None`` if there is no file yet.

    Raises:
        ValueError: if the file cannot be read as one, or could not be written.
    """
    content = read_if_there(path, kind=KIND, version=VERSION, remedy=REMEDY, parts=PARTS)
    if content is None:
        return None
    with refuse(path):
        lengths = {len(column) for column in content["training"]["history"].values()}
        if lengths != {content["training"]["done"]}:
            raise ValueError(f"a history of {sorted(lengths)} steps in place of {content['training']['done']}")
    return content


def refuse(path: str | os.PathLike[str]) -> Any:
    """A context in which contents that cannot be used raise the error of :func:`read`."""
    return refuse_others(path, kind=KIND, remedy=REMEDY)


def latents_of(latents: Latents) -> dict[str, str]:
    """Shapes, dtypes and supports of latents by name."""
    return {site.name: f"{tuple(site.shape)} {site.dtype} on {site.support!r}" for site in latents}


def data_of(args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, str]:
    """Checksums of the tensors and arrays among a model's arguments; the rest by its value."""
    found = {f"argument {k}": _described(value) for k, value in enumerate(args)}
    return found | {name: _described(value) for name, value in kwargs.items()}


def _described(value: object) -> str:
    leaves = tree_leaves(value)
    return ", ".join(map(_leaf, leaves)) if leaves else "nothing"


def _leaf(leaf: object) -> str:
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
        leaf = torch.as_tensor(leaf)
    if isinstance(leaf, Tensor):
        return checksum(leaf.detach().reshape(-1)) + f", shape {tuple(leaf.shape)}"
    if isinstance(leaf, nn.Module):
        return " ".join(f"{name}: {checksum(each.detach().reshape(-1))}" for name, each in leaf.state_dict().items())
    plain = isinstance(leaf, bool | int | float | str | type(None))
    return repr(leaf) if plain else type(leaf).__name__
