"""Checkpoints of fits: written whole or not at all, and refused by other fits."""

from __future__ import annotations

import os
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyro_flows.infer.machine.files import check_path, read_state, refuse_others, remove_leftovers, write_state
from pyro_flows.infer.machine.processes import rank

__all__ = ["CheckpointFormat", "Keeper", "architecture_of", "checksum", "checksums", "layout_of"]

_REMEDY = "delete it, or give another path as checkpoint"


@dataclass(frozen=True)
class CheckpointFormat:
    """The format of a function's checkpoints; other versions are refused.

    ``parts`` are for :func:`~pyro_flows.infer.machine.files.read_state`, and contain ``training.history``, with as many
    rows as the entry ``counter`` of ``training`` says.
    """

    function: str
    version: int
    parts: Mapping[str, Any]
    counter: str

    @property
    def kind(self) -> str:
        """The kind named in the files."""
        return f"checkpoint of {self.function}"

    def refusing(self, path: str | os.PathLike[str] | None) -> AbstractContextManager[None]:
        """Turns errors inside, from unusable contents, into that of :meth:`read`."""
        return refuse_others(path, kind=self.kind, remedy=_REMEDY)

    def read(self, path: str | os.PathLike[str] | None) -> dict[str, Any] | None:
        """Reads a checkpoint to the CPU; ``None`` if there is no file yet.

        Raises:
            ValueError: if the file is not such a checkpoint, or could not be written.
        """
        if path is None or not check_path(path).exists():
            return None
        remove_leftovers(path)
        content = read_state(path, kind=self.kind, version=self.version, remedy=_REMEDY, parts=self.parts)
        with self.refusing(path):
            lengths = {len(column) for column in content["training"]["history"].values()}
            rows = content["training"][self.counter]
            if lengths != {rows}:
                raise ValueError(f"a history of {sorted(lengths)} rows in place of {rows}")
        return content

    def refuse_other(
        self, path: str | os.PathLike[str] | None, then: Mapping[str, Any], now: Mapping[str, Any]
    ) -> None:
        """Refuses a checkpoint with contents ``then`` in place of ``now``, mappings by topic.

        Raises:
            ValueError: for a difference, which the message names.
        """
        for topic, expected in now.items():
            known = then.get(topic, {})
            for part in [*expected, *(part for part in known if part not in expected)]:
                if known.get(part) != expected.get(part):
                    there, here = (str(each[part]) if part in each else "absent" for each in (known, expected))
                    raise ValueError(
                        f"{self.function}: the checkpoint {str(path)!r} belongs to a fit of another {topic}: {part} is "
                        f"{there} there and {here} here; make them agree to go on, or delete the file or give another "
                        "path to start anew"
                    )


class Keeper:
    """Keeps a copy of a fit's state, and writes it every few rows of the history or seconds.

    ``content`` makes the copy.  Newer rows of a growing history are left out.  Of several processes, the first writes.
    """

    def __init__(
        self,
        format: CheckpointFormat,
        path: str | os.PathLike[str] | None,
        content: Callable[[], dict[str, Any]],
        every: int,
        seconds: float = float("inf"),
    ) -> None:
        self.format, self.path, self.content, self.every, self.seconds = format, path, content, every, seconds
        self._kept: tuple[dict[str, Any], int] | None = None
        self._written = time.monotonic()

    def keep(self, rows: int, *, write: bool = False) -> None:
        """Copies the state at this many rows of the history; ``write`` writes it in any case."""
        if self.path is None:
            return
        self._kept = self.content(), rows
        if write or (rows and rows % self.every == 0) or time.monotonic() - self._written >= self.seconds:
            self.write()

    def write(self) -> None:
        """Writes the last copy, if not yet written.

        Raises:
            OSError: if writing fails; the old file is unchanged.
        """
        if self.path is None or self._kept is None or rank():
            return
        content, rows = self._kept
        training = content["training"]
        history = {name: column[:rows] for name, column in training["history"].items()}
        whole = {**content, "training": {**training, "history": history}}
        try:
            write_state(self.path, whole, kind=self.format.kind, version=self.format.version)
        except Exception:
            self._kept = None  # not tried again on the way out
            raise
        self._kept, self._written = None, time.monotonic()

    def leave(self) -> None:
        """Writes on the way out, and must not replace the error being raised."""
        try:
            self.write()
        except (OSError, ValueError, TypeError) as error:
            warnings.warn(f"{self.format.function}: {error}", RuntimeWarning, stacklevel=2)


def architecture_of(module: nn.Module) -> dict[str, str]:
    """Describes the tensors that a module saves: names, shapes and dtypes."""
    return layout_of({name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)})


def layout_of(values: Mapping[str, Tensor | None]) -> dict[str, str]:
    """Describes names, shapes and dtypes."""
    return {name: "none" if value is None else f"{tuple(value.shape)} {value.dtype}" for name, value in values.items()}


def checksum(value: Tensor | None) -> str:
    """Describes shape, dtype and a checksum of all bytes."""
    if value is None:
        return "none"
    total = 0
    for piece in value.split(65536):
        total = zlib.crc32(piece.cpu().contiguous().view(torch.uint8).numpy(), total)
    return f"{tuple(value.shape)} {value.dtype}, checksum {total:08x}"


def checksums(args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, str]:
    """Describes a model's arguments: checksums of tensors and arrays, other values."""
    named = {f"argument {k}": value for k, value in enumerate(args)} | dict(kwargs)
    return {name: ", ".join(map(_described, tree_leaves(value))) or "nothing" for name, value in named.items()}


def _described(leaf: object) -> str:
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
        leaf = torch.as_tensor(leaf)
    if isinstance(leaf, Tensor):
        return checksum(leaf.detach().reshape(-1)) + f", shape {tuple(leaf.shape)}"
    if isinstance(leaf, nn.Module):
        return " ".join(f"{name}: {checksum(each.detach().reshape(-1))}" for name, each in leaf.state_dict().items())
    return repr(leaf) if isinstance(leaf, bool | int | float | str | type(None)) else type(leaf).__name__
