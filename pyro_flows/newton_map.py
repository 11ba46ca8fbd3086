"""What the triangular solver takes and tells: a map, how exactly to solve, and what it took."""

from __future__ import annotations

import uuid
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["SolveReport", "SolverSettings", "TriangularMap", "named_map"]

_maps: weakref.WeakValueDictionary[str, TriangularMap] = weakref.WeakValueDictionary()


class TriangularMap(ABC):
    r"""A map of events whose Jacobian is triangular, with a positive diagonal, in some order of the coordinates.

    It holds no tensor that needs a gradient: parameters come as ``shared`` (the same for all rows) and ``rowwise``
    (leading dimension ``n``, for what a context gives).  ``name`` stands in messages.  ``wave`` is an integer tensor of
    the event's shape: the length of the longest chain of dependencies that ends at a coordinate, 0 for a coordinate
    that depends on itself alone.
    """

    name: str
    wave: Tensor
    handle: str

    def __new__(cls, *args: Any, **kwargs: Any) -> TriangularMap:
        self = super().__new__(cls)
        self.handle = uuid.uuid4().hex  # a name that custom operators can carry
        _maps[self.handle] = self
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("handle", "_waves")}

    @abstractmethod
    def value_and_slope(self, x: Tensor, shared: Sequence[Tensor], rowwise: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``f(x)`` and the diagonal of its Jacobian, both with the shape ``(n, *event_shape)`` of ``x``."""

    @abstractmethod
    def slope_bounds(self, shared: Sequence[Tensor], rowwise: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``0 < m <= M`` between which the diagonal stays for every ``x``, broadcasting to ``(n, *event_shape)``."""

    def waves(self, device: torch.device) -> tuple[Tensor, int]:
        """``wave`` as a row on a device, and how many waves there are."""
        known = self.__dict__.setdefault("_waves", {})
        if device not in known:
            wave = self.wave.detach().reshape(1, -1)
            count = int(wave.max()) + 1 if wave.numel() else 1
            known[device] = wave.to(device, torch.int32), count
        return known[device]


def named_map(handle: str) -> TriangularMap:
    """The living map of this handle."""
    return _maps[handle]


class SolverSettings(NamedTuple):
    """How exactly to solve, and what to do where that fails.

    Args:
        tolerance: largest error of a coordinate relative to ``1 + |x|``, given the coordinates that it depends on;
            ``None``: near the rounding of the dtype (1e-6 in float32, 1e-13 in float64).
        max_sweeps: how many sweeps are allowed; ``None``: as many as the method can need.
        on_fail: ``"raise"`` a ``RuntimeError`` or ``"warn"`` with a ``RuntimeWarning``.
    """

    tolerance: float | None = None
    max_sweeps: int | None = None
    on_fail: str = "raise"


@dataclass(frozen=True, eq=False)
class SolveReport:
    """What a solve took; the numbers are in ``stats``, a tensor on the host, and are read when asked for."""

    stats: Tensor

    @property
    def sweeps(self) -> int:
        """Sweeps of the slowest rows."""
        return int(self.stats[0])

    @property
    def evaluations(self) -> int:
        """Calls of ``value_and_slope`` in the solve."""
        return int(self.stats[1])

    @property
    def residual(self) -> float:
        """Largest ``|f(x) - z| / (m (1 + |x|))`` where it was last evaluated, before the last Newton step."""
        return float(self.stats[2])

    @property
    def bisections(self) -> int:
        """How many times a coordinate was bisected."""
        return int(self.stats[3])

    @property
    def converged(self) -> bool:
        """Whether every row was solved to the tolerance or to rounding."""
        return bool(self.stats[4])

    @property
    def waves(self) -> int:
        """Waves of the map, the sweeps in which a triangular system is solved if it is linear."""
        return int(self.stats[5])

    def __repr__(self) -> str:
        return (
            f"SolveReport(sweeps={self.sweeps}, evaluations={self.evaluations}, residual={self.residual:.3g}, "
            f"bisections={self.bisections}, converged={self.converged}, waves={self.waves})"
        )
