"""The memory and time of a model's draws."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Footprint", "Pace", "in_pieces", "pace_of", "rows_at_once"]

Result = TypeVar("Result")
BYTES = 2**28  # for the tensors of one call
FIRST = 2  # rows of the first timed call
CALL = 0.1  # longest call whose time grows with its rows, in seconds
FLAT = 1.5  # times the shortest call: below, rows hardly take time
LEVEL = 1.2  # the same, for more growth


class Footprint(TorchDispatchMode):
    """Adds up the bytes of all tensors made inside, in ``bytes``.

    The sum bounds the peak: without gradients most tensors are freed early; with gradients most are kept, and the
    backward pass makes about as many again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        compiler = sys.modules.get("torch._dynamo")
        if compiler is not None and not hasattr(Footprint.__torch_dispatch__, "_torchdynamo_disable"):
            Footprint.__torch_dispatch__ = compiler.disable(Footprint.__torch_dispatch__)  # type: ignore[method-assign]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's way imports its compiler at the first call, a second of a short fit

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        made = func(*args, **(kwargs or {}))
        parts = made if isinstance(made, tuple | list) else (made,)
        for part, returned in zip(parts, func._schema.returns, strict=False):
            # Views and tensors changed in place take no memory.
            if isinstance(part, Tensor) and returned.alias_info is None:
                self.bytes += part.numel() * part.element_size()
        return made


class Pace:
    """Chooses the rows of each call of a density, so that calls stay small, and short where time is limited.

    Timed calls begin with two rows, and grow while they take less than a tenth of a second, or little longer than with
    few rows.

    Attributes:
        bytes_per_draw: the bytes of all tensors made in a run, or ``None``.
        rows: the number that fits into the time of one call.
        shortest: the seconds of the fastest call.
    """

    def __init__(self) -> None:
        self.bytes_per_draw: float | None = None
        self.rows = FIRST
        self.shortest = math.inf
        self._each: float | None = None

    def at_once(self, most: int, *, timed: bool) -> int:
        """Returns the rows of the next call, ``most`` at most; ``timed`` if time is limited."""
        if self.bytes_per_draw:
            most = max(1, min(most, int(BYTES // self.bytes_per_draw)))
        return min(most, self.rows) if timed else most

    @property
    def seconds_per_draw(self) -> float:
        """Time of a draw in the fastest calls so far; 0 before any call."""
        return self._each or 0.0

    @contextmanager
    def call(self, rows: int) -> Iterator[None]:
        """Times a call of this many rows, made inside."""
        begin = time.monotonic()
        yield
        seconds = time.monotonic() - begin
        level = seconds <= LEVEL * self.shortest
        self.shortest = min(self.shortest, seconds)
        self._each = seconds / rows if self._each is None else min(self._each, seconds / rows)
        longest = max(CALL, FLAT * self.shortest)
        if seconds > longest:
            self.rows = max(1, min(self.rows, int(rows * longest / seconds)))
        elif rows >= self.rows:
            self.rows = (4 if level else 2) * rows


def pace_of(density: object) -> Pace | None:
    """Returns the pace of a ``JointDensity``; ``None`` of other densities."""
    found = getattr(density, "pace", None)
    return found if isinstance(found, Pace) else None


def rows_at_once(density: object, most: int) -> int:
    """Returns the draws of a ``JointDensity``, from 1 to ``most``, with tensors of 256 MiB; else ``most``."""
    pace = pace_of(density)
    return most if pace is None else pace.at_once(most, timed=False)


def in_pieces(pace: Pace, z: Tensor, run: Callable[[Tensor], Result], most: int) -> list[Result]:
    """Runs a model for ``most`` draws ``z``, shape ``(n, dim)``, at a time, or for as many as take 256 MiB.

    If the memory of a draw is unknown, the first two draws measure it.
    """
    found = []
    if pace.bytes_per_draw is None and min(most, len(z)) > FIRST:
        with Footprint() as footprint:
            found.append(run(z[:FIRST]))
        pace.bytes_per_draw, z = footprint.bytes / FIRST, z[FIRST:]
    return found + [run(part) for part in z.split(pace.at_once(most, timed=False))]
