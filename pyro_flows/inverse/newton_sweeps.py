r"""Newton-Jacobi sweeps that solve a triangular system :math:`f(x) = z`, safeguarded so that they end.

A sweep evaluates :math:`f` and the diagonal :math:`d` of its Jacobian and moves every coordinate by :math:`(z - f)/d`.
The coordinates fall into waves.  Once the waves below are solved, a wave consists of increasing scalar problems with
slopes :math:`m \le d \le M`: for a residual :math:`r` the root is between :math:`x + r/M` and :math:`x + r/m`.  Plain
sweeps continue while the front, the first unsolved wave, advances in each row.  Then the waves below it are fixed, and
its coordinates keep a bracket, halved where Newton's method would leave it or gains too little.
"""

from __future__ import annotations

import math
import uuid
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_flows.core.checks import choice, integer

__all__ = ["TOLERANCE", "SolveReport", "SolverSettings", "TriangularMap", "named_map", "sweep"]

_maps: weakref.WeakValueDictionary[str, TriangularMap] = weakref.WeakValueDictionary()


class TriangularMap(ABC):
    """A map of events whose Jacobian is triangular, with a positive diagonal, in some order of the coordinates.

    Parameters come as ``shared`` and ``rowwise`` (leading dimension ``n``, e.g. from a context); the map itself holds
    no tensor that needs a gradient.  Messages contain ``name``.  ``wave``, an integer tensor of the event's shape, is
    the length of the longest chain of dependencies that ends at a coordinate, from 0.
    """

    name: str
    wave: Tensor
    handle: str

    def __new__(cls, *args: Any, **kwargs: Any) -> TriangularMap:
        self = super().__new__(cls)
        self.handle = uuid.uuid4().hex  # for custom operators
        _maps[self.handle] = self
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("handle", "_waves")}

    @abstractmethod
    def value_and_slope(self, x: Tensor, shared: Sequence[Tensor], rowwise: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``f(x)`` and the diagonal of its Jacobian, both with the shape ``(n, *event_shape)`` of ``x``."""

    @abstractmethod
    def slope_bounds(self, shared: Sequence[Tensor], rowwise: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Bounds ``0 < m <= M`` of the diagonal for all ``x``, broadcasting to ``(n, *event_shape)``."""

    def waves(self, device: torch.device) -> tuple[Tensor, int]:
        """``wave`` as a row on a device, and the number of waves."""
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
    """How exactly to solve, and what to do on failure.

    Args:
        tolerance: the largest error of a coordinate relative to ``1 + |x|``, given those that it depends on; ``None``:
            1e-6 in float32, 1e-13 in float64.
        max_sweeps: the largest number of sweeps; ``None``: as many as the method can need.
        on_fail: ``"raise"`` a ``RuntimeError`` or ``"warn"`` with a ``RuntimeWarning``.
    """

    tolerance: float | None = None
    max_sweeps: int | None = None
    on_fail: str = "raise"

    def check(self, name: str = "") -> SolverSettings:
        """Refuses invalid settings; ``name`` is the class that the caller sees."""
        given = self.tolerance
        if given is not None and not (isinstance(given, (int, float)) and 0 < given < 1):
            prefix = f"{name}: " if name else ""
            raise ValueError(f"{prefix}expected tolerance between 0 and 1, or None, got {given!r}")
        if self.max_sweeps is not None:
            integer(name, "max_sweeps", self.max_sweeps)
        choice(name, "on_fail", self.on_fail, ("raise", "warn"))
        return self


def _number(index: int, kind: Callable[[Tensor], Any]) -> Any:
    return property(lambda report: kind(report.stats[index]))


@dataclass(frozen=True, eq=False)
class SolveReport:
    """Costs and error of a solve, read on demand from ``stats`` on the host.

    Attributes:
        sweeps: sweeps of the slowest rows.
        evaluations: calls of ``value_and_slope``.
        residual: largest ``|f(x) - z| / (m (1 + |x|))`` before the last Newton step.
        bisections: bisections of coordinates.
        converged: whether every row was solved.
        waves: waves of the map, as many sweeps as a linear system takes.
    """

    stats: Tensor
    sweeps = _number(0, int)
    evaluations = _number(1, int)
    residual = _number(2, float)
    bisections = _number(3, int)
    converged = _number(4, bool)
    waves = _number(5, int)

    def __repr__(self) -> str:
        return (
            f"SolveReport(sweeps={self.sweeps}, evaluations={self.evaluations}, residual={self.residual:.3g}, "
            f"bisections={self.bisections}, converged={self.converged}, waves={self.waves})"
        )


TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}


FLOOR = 32  # residuals up to 32 units in the last place of f's terms are rounding


WINDOW = 3  # sweeps between looks at the front


TRUST = 10  # largest move beyond the front, relative to 1 + |x|


def _bound(value: Tensor, z: Tensor) -> Tensor:
    """A bound as a matrix of one row, or of a row for each of z."""
    rows = value.shape[0] if value.dim() == z.dim() else 1
    return value.detach().to(z.dtype).expand(rows, *z.shape[1:]).reshape(rows, -1)


class _Sweeps:
    """The unsolved rows."""

    def __init__(
        self,
        solved: TriangularMap,
        z: Tensor,
        shared: Sequence[Tensor],
        rowwise: Sequence[Tensor],
        settings: SolverSettings,
        start: Tensor | None,
    ) -> None:
        self.map, self.shared, self.rowwise, self.settings = solved, tuple(shared), list(rowwise), settings
        self.event = z.shape[1:]
        self.total = z.shape[0]
        self.z = z.reshape(self.total, -1).contiguous()
        self.wave, self.count = solved.waves(z.device)
        self.eps = torch.finfo(z.dtype).eps
        self.far = torch.finfo(z.dtype).max ** 0.4
        self.m, self.M = (_bound(b, z) for b in solved.slope_bounds(self.shared, self.rowwise))
        tolerance = TOLERANCE[z.dtype] if settings.tolerance is None else settings.tolerance
        # Invalid bounds let nothing pass.
        sound = ((self.m > 0) & (self.m <= self.M) & (self.M < math.inf)).all()
        self.slack = torch.where(sound, self.m * tolerance, math.nan)
        self.allowed = torch.add(self.slack, self.z.abs(), alpha=FLOOR * self.eps)
        self.x = self.z / (self.m.sqrt() * self.M.sqrt()) if start is None else start.reshape(self.z.shape)
        self.out = torch.empty_like(self.z)
        self.index = torch.arange(self.total, device=z.device)
        self.live = torch.ones_like(self.index, dtype=torch.bool)  # rows not solved yet
        self.seen: tuple[Tensor, Tensor] | None = None
        self.step: Tensor | None = None
        self.guarded = False
        self.known_front: Tensor | None = None
        self.worst = self.z.new_full((self.total,), math.inf)
        self.evaluations = 0
        self.bisections = self.z.new_zeros((), dtype=torch.long)
        self.residual = self.z.new_zeros(())
        self.broken = self.z.new_zeros((), dtype=torch.long)

    def evaluate(self) -> None:
        f, d = self.map.value_and_slope(self.x.view(-1, *self.event), self.shared, self.rowwise)
        self.evaluations += 1
        f, self.d = f.reshape(self.x.shape), d.reshape(self.x.shape)
        self.r = self.z - f
        self.size, self.abs_x = self.r.abs(), self.x.abs()
        # Below 1 the residual is within the tolerance or rounding.
        self.ratio = self.size / torch.addcmul(
            self.allowed, torch.add(self.slack, self.d, alpha=FLOOR * self.eps), self.abs_x
        )
        self.known_front = None

    def plain(self) -> tuple[Tensor, int]:
        """One Newton-Jacobi step; returns which rows are solved, and their number."""
        worst = self.ratio.amax(1)
        solved = (worst < 1) | ~self.live
        count = int(solved.sum())
        step = self.calm(self.r / self.d)
        if count:
            # At rounding, a step would disturb coordinates that depend on it, after their check.
            last = (worst < 0.1 * self.worst) & self.live
            rounding = self.eps * torch.addcmul(self.z.abs(), self.d, self.abs_x)
            still = (solved & ~last)[:, None] | ((self.size < 4 * rounding) & solved[:, None])
            step.masked_fill_(still, 0.0)
        self.worst = worst
        x = self.x + step
        self.x = torch.where(solved[:, None], x, x.clamp(-self.far, self.far)) if self.looking else x
        return solved, count

    def front(self) -> Tensor:
        """The first unsolved wave of each row."""
        known = self.known_front
        if known is None:
            self.known_front = known = torch.where(self.ratio < 1, self.count, self.wave).amin(1, keepdim=True)
        return known

    def stuck(self) -> bool:
        """Whether in some row neither the front advanced nor its residual shrank."""
        first = self.front()
        worst = self.ratio.masked_fill(self.wave != first, 0.0).amax(1, keepdim=True)
        before, self.seen = self.seen, (first, worst)
        if before is None or before[0].shape != first.shape:  # rows left
            return False
        gained = (first > before[0]) | (worst < 0.25 * before[1]) | (first == self.count)
        return not bool((gained | ~self.live[:, None]).all())

    def calm(self, step: Tensor) -> Tensor:
        """Now and then halves steps that only oscillate, beyond the front."""
        if self.looking and self.step is not None and self.step.shape == step.shape:
            back = -step / self.step
            oscillates = (back > 0.8) & (back < 1.25) & (self.wave > self.front() + 1)
            step = torch.where(oscillates, 0.5 * step, step)
        self.step = step
        return step

    def guard(self) -> None:
        """Prepares guarded steps; refuses invalid inputs."""
        self.check()
        self.guarded = True
        self.first = self.front().masked_fill(~self.live[:, None], self.count)
        self.done = self.wave < self.first
        self.cold = torch.zeros_like(self.first, dtype=torch.bool)
        self.lost = torch.zeros_like(self.cold)
        self.lo, self.hi = torch.full_like(self.x, -math.inf), torch.full_like(self.x, math.inf)
        self.width, self.last = self.hi, self.hi
        self.one_m, self.one_M = 1 / self.m, 1 / self.M

    def careful(self) -> tuple[Tensor, int]:
        """One step with a safeguarded front; returns as :meth:`plain`, with lost rows."""
        x, r, wave = self.x, self.r, self.wave
        finite = torch.isfinite(self.size.amax(1, keepdim=True))
        ok = (self.ratio < 1) | self.done
        first = torch.where(ok, self.count, wave).amin(1, keepdim=True)
        first = torch.where(finite, first, self.first)
        moved = (first != self.first) | ~finite
        below = (wave < first) & finite
        # Nothing accepted depends on a wave accepted alone.
        alone = below & ~self.done & (first == self.first + 1)
        self.done = self.done | below
        # Brackets begin a sweep after the waves below moved.
        by_least, by_most = r * self.one_m, r * self.one_M
        lo = torch.maximum(self.lo, x + torch.minimum(by_least, by_most)).masked_fill_(moved, -math.inf)
        hi = torch.minimum(self.hi, x + torch.maximum(by_least, by_most)).masked_fill_(moved, math.inf)
        width = hi - lo
        active = (wave == first) & ~ok & ~moved
        closed = active & (width < 4 * self.eps * torch.maximum(lo.abs(), hi.abs()).clamp_(min=1.0))
        step = r / self.d
        newton = x + step
        step = self.calm(step)
        slow = (width > 0.5 * self.width) & (self.size > 0.5 * self.last)
        halve = active & (slow | ~((newton >= lo) & (newton <= hi)))
        limit = TRUST * (1 + self.abs_x)
        warm = (x + torch.clamp(step, -limit, limit)).clamp_(-self.far, self.far)
        warm = torch.where(torch.isfinite(warm), warm, x)
        new = torch.where(active | alone, newton, warm)
        new = torch.where(halve | closed, 0.5 * lo + 0.5 * hi, new)
        held = (self.done & ~alone) | (self.cold & (wave != first))
        new = torch.where(held, x, new)
        # An overflow beyond the front can reach it as 0 * inf: the row restarts, wave by wave.
        new = torch.where(~finite & ~self.done, 0.0, new)
        self.lost = self.lost | (~finite & self.cold)
        self.cold = self.cold | ~finite
        self.done = self.done | closed
        self.bisections += (halve & ~closed).sum()
        self.x, self.first, self.lo, self.hi = new, first, lo, hi
        self.width = width
        self.last = torch.where(moved, math.inf, self.size)
        solved = ((first == self.count) | self.lost)[:, 0]
        return solved, int(solved.sum())

    def leave(self, rows: Tensor | slice, solved: bool = True) -> None:
        """Takes rows out."""

        def pick(t: Tensor) -> Tensor:
            return t[rows] if t.shape[0] == self.x.shape[0] else t

        size, abs_x = pick(self.size), pick(self.abs_x)
        relative = size / (pick(self.m) * (1 + abs_x))
        self.residual = torch.maximum(self.residual, relative.nan_to_num_(math.inf).amax())
        if solved and self.guarded:
            # A closed bracket means rounding, unless slope or bounds are wrong.
            row = (pick(self.d).amax(1) * (1 + abs_x.amax(1)))[:, None]
            fair = (pick(self.ratio) < 1) | (size < self.eps**0.5 * (pick(self.z).abs() + row))
            self.broken += (~fair.all(1) | pick(self.lost)[:, 0]).sum()
        self.out[pick(self.index)] = pick(self.x)

    def compact(self, solved: Tensor) -> None:
        """Continues with the unsolved rows."""
        n = self.x.shape[0]
        self.leave(solved.nonzero()[:, 0])
        rest = (~solved).nonzero()[:, 0]
        if self.seen is not None:
            self.seen = self.seen[0][rest], self.seen[1][rest]
        self.rowwise = [t[rest] for t in self.rowwise]
        names = ["x", "z", "allowed", "slack", "m", "M", "index", "live", "worst"]
        if self.guarded:
            names += ["done", "first", "cold", "lost", "lo", "hi", "width", "last", "one_m", "one_M"]
        for name in names:
            value = getattr(self, name)
            if value.shape[0] == n:
                setattr(self, name, value[rest])

    def run(self) -> tuple[Tensor, Tensor]:
        limit = self.settings.max_sweeps
        cap = 1024 + 256 * self.count if limit is None else limit
        left = self.x.shape[0]
        while self.evaluations < cap:
            self.evaluate()
            self.looking = self.evaluations % WINDOW == 0
            if self.looking and not self.guarded and self.stuck():
                self.guard()
            solved, count = self.careful() if self.guarded else self.plain()
            n = self.x.shape[0]
            left = n - count
            if left == 0:
                self.leave(slice(None))
                break
            if left <= 0.7 * n:
                self.compact(solved)
            elif left < n and not self.guarded:
                self.live = ~solved
        else:
            self.check()
            self.leave(slice(None), solved=False)
        broken = left + int(self.broken)
        residual = float(self.residual)
        stats = [self.evaluations, self.evaluations, residual, int(self.bisections), broken == 0, self.count]
        if broken:
            self.fail(broken, residual)
        return self.out.view(-1, *self.event), torch.tensor(stats, dtype=torch.float64, device="cpu")

    def check(self) -> None:
        """Raises ValueError if the input is at fault."""
        name = self.map.name
        bad = int((~torch.isfinite(self.z)).any(1).sum())
        if bad:
            raise ValueError(f"{name}: expected finite values to invert, got {bad} of {self.total} rows that are not")
        kinds = (("parameters", self.shared, ""), ("context's values", self.rowwise, "the context is not finite, or "))
        for kind, tensors, reason in kinds:
            bad = sum(int((~torch.isfinite(t)).sum()) for t in tensors)
            if bad:
                raise ValueError(
                    f"{name}: expected finite {kind}, got {bad} numbers that are not; {reason}the training that made "
                    "them has diverged, or a bad state was loaded"
                )
        if bool(torch.isnan(self.slack).any()):
            raise ValueError(
                f"{name}: expected bounds 0 < m <= M of the slope, got m down to {float(self.m.min()):.3g} and M up to "
                f"{float(self.M.max()):.3g}"
            )

    def fail(self, broken: int, residual: float) -> None:
        message = (
            f"{self.map.name}: {broken} of {self.total} rows were not inverted, with a relative residual up to "
            f"{residual:.3g} after {self.evaluations} sweeps ({self.count} waves); "
        )
        if self.settings.max_sweeps is not None and self.evaluations >= self.settings.max_sweeps:
            message += (
                f"allow more than max_sweeps={self.settings.max_sweeps} (None sets no limit), or a larger tolerance"
            )
        else:
            message += (
                "the map overflows or loses all digits there: use float64, keep the weights smaller or the values "
                "nearer to what the flow was trained on"
            )
        if self.settings.on_fail == "warn":
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        else:
            raise RuntimeError(message)


@torch.no_grad()
def sweep(
    solved: TriangularMap,
    z: Tensor,
    shared: Sequence[Tensor],
    rowwise: Sequence[Tensor],
    settings: SolverSettings,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``x`` with ``f(x) = z``, without gradient, and the numbers of its :class:`SolveReport`."""
    if z.numel() == 0:
        stats = [0, 0, 0, 0, 1, solved.waves(z.device)[1]]
        return z.clone(memory_format=torch.contiguous_format), torch.tensor(stats, dtype=torch.float64, device="cpu")
    return _Sweeps(solved, z, shared, rowwise, settings, start).run()
