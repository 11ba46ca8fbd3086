"""Maximizes a log-density from many points at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.infer.machine.pace import pace_of
from pyro_flows.infer.models.recorded import value_and_slope

__all__ = ["LogDensity", "Paths", "SafeDensity", "bfgs", "climb", "curved", "diagonal_bfgs", "identity"]

LogDensity = Callable[[Tensor], Tensor]
"""Maps points ``(S, D)`` to log-densities ``(S,)`` in nats, differentiable, not normalized."""

_REFUSALS = (ValueError, RuntimeError, ArithmeticError)


_SUFFICIENT, _CURVATURE = 1e-4, 0.9


_TRIALS, _MANY, _TROUBLES = 20, 8, 3


class SafeDensity:
    """A log-density that never raises, counts its evaluations, and returns ``-inf`` at refused points.

    Points and results are float64 on the CPU; the density sees the dtype and device of ``like``, and never a point that
    is not finite. A call that raises is split in halves until the refused points stand alone. The density's
    :class:`~pyro_flows.infer.machine.pace.Pace` and ``rows`` (four times as many without gradients) limit the points of
    a call. After ``seconds``, remaining points are ``-inf``.
    """

    def __init__(self, density: LogDensity, like: Tensor, *, seconds: float | None = None, rows: int = 256) -> None:
        self.density, self.dtype, self.device, self.rows = density, like.dtype, like.device, rows
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.eps = torch.finfo(like.dtype).eps
        self.pace = pace_of(density)
        self.evaluations = 0
        self.found = 0
        """Points where the log-density was finite."""
        self.error: Exception | None = None

    @property
    def expired(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.monotonic() > self.deadline

    @contextmanager
    def share(self, part: float) -> Iterator[None]:
        """Limits the calls inside to this part of the time left."""
        whole = self.deadline
        if whole is not None:
            self.deadline = time.monotonic() + part * (whole - time.monotonic())
        yield
        self.deadline = whole

    def round(self, z: Tensor) -> Tensor:
        """Rounds points as the density sees them."""
        return z.to(self.dtype).double()

    def values(self, z: Tensor) -> Tensor:
        """Returns log-densities ``(S,)``, ``-inf`` where not finite."""
        return self._all(z, False, 4 * self.rows)[0]

    def gradients(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log-densities ``(S,)`` and gradients ``(S, D)``, ``-inf`` and 0 where either is not finite."""
        return self._all(z, True, self.rows)

    def _all(self, z: Tensor, gradient: bool, rows: int) -> tuple[Tensor, Tensor]:
        fine = z.isfinite().all(-1).cpu()
        if not fine.all():
            value, slope = self._late(z.double().cpu())
            value[fine], slope[fine] = self._all(z[fine], gradient, rows)
            return value, slope
        # A density need not accept a call without rows.
        parts = [(z.new_zeros(0), z[:0])]
        first = 0
        while first < len(z):
            timed = self.deadline is not None
            part = z[first : first + (rows if self.pace is None else self.pace.at_once(rows, timed=timed))]
            parts.append(self._late(z[first:]) if self._is_late(first) else self._call(part, gradient))
            first += len(parts[-1][0])
        value, slope = (torch.cat(kind) for kind in zip(*parts, strict=True))
        fine = value.isfinite() & slope.isfinite().all(-1)
        self.found += int(fine.sum())
        return value.masked_fill(~fine, -torch.inf), slope.masked_fill(~fine[:, None], 0.0)

    def _is_late(self, first: int) -> bool:
        """Whether the time is up; never before the first call."""
        return self.expired and (first > 0 if self.pace is None else self.evaluations > 0)

    @staticmethod
    def _late(z: Tensor) -> tuple[Tensor, Tensor]:
        return z.new_full(z.shape[:1], -torch.inf), torch.zeros_like(z)

    def _call(self, z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        self.evaluations += len(z)
        try:
            with torch.no_grad(), nullcontext() if self.pace is None else self.pace.call(len(z)):
                point = z.detach().to(self.device, self.dtype)
                value, slope = value_and_slope(self.density, point) if gradient else (self.density(point), None)
                if value.shape != z.shape[:1]:
                    raise TypeError(
                        f"log-density: expected shape {tuple(z.shape[:1])} for points of shape {tuple(z.shape)}, got "
                        f"{tuple(value.shape)}; return one number for each row"
                    )
            slope = torch.zeros_like(point) if slope is None else slope
            return value.double().cpu(), slope.double().cpu()
        except _REFUSALS as error:
            self.error = error
        if len(z) == 1:
            return self._late(z)
        halves = [
            self._late(part) if self.pace is not None and self.expired else self._call(part, gradient)
            for part in z.split((len(z) + 1) // 2)
        ]
        return torch.cat([half[0] for half in halves]), torch.cat([half[1] for half in halves])


class Paths(NamedTuple):
    """The paths of :func:`climb`, float64 on the CPU; start ``i`` took ``len(positions[i]) - 1`` steps."""

    positions: list[Tensor]
    """For each start the accepted points, ``(n_i, D)``, the start among them."""
    gradients: list[Tensor]
    """Gradients at these points, ``(n_i, D)``."""
    values: list[Tensor]
    """Log-densities there in nats, ``(n_i,)``; ``-inf`` alone if the start was refused."""
    converged: Tensor
    """Whether the path ended where the next step promises less than the tolerance, ``(S,)``."""
    evaluations: int
    """Points at which the density was evaluated."""

    def ends(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the last points ``(S, D)``, their log-densities ``(S,)`` and gradients ``(S, D)``."""
        points, values, gradients = (
            torch.stack([row[-1] for row in kind]) for kind in (self.positions, self.values, self.gradients)
        )
        return points, values, gradients


def climb(
    density: LogDensity | SafeDensity,
    starts: Tensor,
    *,
    steps: int = 200,
    memory: int | None = 10,
    tolerance: float = 1e-7,
    metric: Tensor | None = None,
    exact: bool = True,
    frame: Tensor | None = None,
    promise: float = math.inf,
    seconds: float | None = None,
    enough: tuple[float, int] | None = None,
) -> Paths:
    r"""Climbs from all starts at once by quasi-Newton steps :math:`z \leftarrow z + t H \nabla\log p(z)`.

    Each start has its own line search, for a sufficient gain and a smaller slope; one density call serves all. A start
    has converged when its last gain and the quadratic model's promised gain, :math:`g^\top H g / 2`, are both below the
    tolerance in nats, whatever the coordinate units.

    With ``memory`` pairs of differences the climb is L-BFGS, with Gilbert and Lemaréchal's diagonal update; ``None``
    keeps :math:`H` as a matrix (BFGS): fewer steps at :math:`O(D^2)` each, several times the cost of one product.
    ``metric`` is the first :math:`H`, ``(S, D, D)`` for BFGS and its diagonal, ``(S, D)``, for L-BFGS; unless it is
    ``exact``, BFGS scales it to fit the first difference. Without one the first step has length at most 1. L-BFGS works
    in the coordinates of a ``frame`` :math:`F`, lower triangular, ``(D, D)``: :math:`H = F H' F^\top`, and the metric
    is the diagonal of :math:`H'`. A metric is shrunk so far that the first step promises at most ``promise`` nats
    (:math:`g^\top H g / 2`), since a longer one would leave a narrow mode, as its slopes are steep.

    ``steps`` limits each start, ``seconds`` the wall-clock time between calls. ``enough``, a part and a number, ends
    all climbs once that part of them has ended or taken so many steps, and a quarter has ended.

    Raises:
        ValueError: for starts of another shape than ``(S, D)``.

    References:
        Nocedal, Wright: Numerical Optimization, 2006, chapters 3, 6 and 7.
        Zhang, Carpenter, Gelman, Vehtari: Pathfinder: Parallel quasi-Newton variational inference, arXiv:2108.03782.
    """
    if starts.dim() != 2 or not len(starts):
        raise ValueError(f"climb: expected starts of shape (S, D) with S >= 1, got {tuple(starts.shape)}")
    safe = density if isinstance(density, SafeDensity) else SafeDensity(density, starts, seconds=seconds)
    before = safe.evaluations
    point = starts.detach().double().cpu()
    value, slope = safe.gradients(point)
    curvature = _Dense(point, slope, metric, exact) if memory is None else _Limited(point, slope, metric, memory, frame)
    curvature.shrink(slope, promise)
    search = _Search(safe, point, value, slope, curvature, tolerance)
    path = [[(point[i], value[i], slope[i])] for i in range(len(point))]
    going = int(search.active.sum())
    while going and not safe.expired:
        for i in search.advance():
            path[i].append((search.point[i].clone(), search.value[i].clone(), search.slope[i].clone()))
            if len(path[i]) > steps:
                search.active[i] = False
        going = int(search.active.sum())
        if enough is not None:
            active = search.active.tolist()
            short = sum(on and len(row) <= enough[1] for on, row in zip(active, path, strict=True))
            going *= short > (1 - enough[0]) * len(path) or sum(active) > 0.75 * len(path)
    columns = [[torch.stack(kind) for kind in zip(*row, strict=True)] for row in path]
    positions, values, gradients = ([row[k] for row in columns] for k in range(3))
    return Paths(positions, gradients, values, search.converged, safe.evaluations - before)


class _Dense:
    """Inverse Hessians as matrices, ``(S, D, D)``, by BFGS."""

    def __init__(self, point: Tensor, slope: Tensor, metric: Tensor | None, exact: bool) -> None:
        self.exact = exact and metric is not None
        if metric is None:
            metric = identity(point) / slope.norm(dim=-1).clamp(min=1.0)[:, None, None]
        self.first = metric
        self.inverse = metric.clone()
        self.fresh = torch.ones_like(point[:, 0], dtype=torch.bool)

    def shrink(self, slope: Tensor, promise: float) -> None:
        """Makes the first steps promise no more."""
        gain = 0.5 * (slope * (self.first @ slope[..., None])[..., 0]).sum(-1)
        self.first = self.first * (promise / gain.clamp(min=1e-300)).clamp(max=1.0)[:, None, None]
        self.inverse = self.first.clone()

    def directions(self, rows: Tensor, slope: Tensor) -> Tensor:
        return (self.inverse[rows] @ slope[..., None])[..., 0]

    def update(self, rows: Tensor, step: Tensor, change: Tensor) -> None:
        keep = curved(step, change)
        rows, step, change = rows[keep], step[keep], change[keep]
        inner = (step * change).sum(-1)
        inverse = self.inverse[rows]
        if not self.exact:
            ratio = inner / (change * (inverse @ change[..., None])[..., 0]).sum(-1)
            inverse = torch.where(self.fresh[rows, None, None], ratio[:, None, None] * inverse, inverse)
        self.inverse[rows] = bfgs(inverse, step, change)
        self.fresh[rows] = False

    def reset(self, rows: Tensor, slope: Tensor) -> None:
        """Returns to the first metric or, if in use, to steepest ascent with steps of length 1."""
        again = self.fresh[rows]
        length = slope.norm(dim=-1).clamp(min=1e-300)[:, None, None]
        plain = identity(slope) / length
        self.inverse[rows] = torch.where(again[:, None, None], plain, self.first[rows])
        self.fresh[rows] = True


class _Limited:
    """Inverse Hessians by L-BFGS; a step costs ``O(S D memory)``, and in a frame two products with it.

    All but the arguments and results of the methods is in the coordinates of the frame.
    """

    def __init__(
        self, point: Tensor, slope: Tensor, metric: Tensor | None, memory: int, frame: Tensor | None = None
    ) -> None:
        self.scaled, self.frame = metric is not None, frame
        if metric is None:
            metric = (1 / self._pulled(slope).norm(dim=-1, keepdim=True).clamp(min=1.0)).expand_as(point)
        self.first = metric
        self.diagonal = metric.clone()
        self.steps = point.new_zeros(memory, *point.shape)
        self.changes = torch.zeros_like(self.steps)
        self.fresh = torch.ones_like(point[:, 0], dtype=torch.bool)

    def shrink(self, slope: Tensor, promise: float) -> None:
        """Makes the first steps promise no more."""
        gain = 0.5 * (self.first * self._pulled(slope).square()).sum(-1)
        self.first = self.first * (promise / gain.clamp(min=1e-300)).clamp(max=1.0)[:, None]
        self.diagonal = self.first.clone()

    def _pulled(self, slope: Tensor) -> Tensor:
        """Returns gradients in the coordinates of the frame."""
        return slope if self.frame is None else slope @ self.frame

    def directions(self, rows: Tensor, slope: Tensor) -> Tensor:
        slope, steps, changes = self._pulled(slope), self.steps[:, rows], self.changes[:, rows]
        inner = (steps * changes).sum(-1, keepdim=True)
        weight = torch.where(inner > 0, 1 / inner, torch.zeros_like(inner))
        taken = []
        for k in range(len(steps) - 1, -1, -1):
            part = weight[k] * (steps[k] * slope).sum(-1, keepdim=True)
            slope = slope - part * changes[k]
            taken.append(part)
        slope = self.diagonal[rows] * slope
        for k in range(len(steps)):
            slope = slope + (taken[-1 - k] - weight[k] * (changes[k] * slope).sum(-1, keepdim=True)) * steps[k]
        return slope if self.frame is None else slope @ self.frame.mT

    def update(self, rows: Tensor, step: Tensor, change: Tensor) -> None:
        keep = curved(step, change)
        rows, step, change = rows[keep], step[keep], change[keep]
        if self.frame is not None:
            step = torch.linalg.solve_triangular(self.frame, step.mT, upper=False).mT
            change = self._pulled(change)
        self.steps[:, rows] = torch.cat([self.steps[1:, rows], step[None]])
        self.changes[:, rows] = torch.cat([self.changes[1:, rows], change[None]])
        diagonal = self.diagonal[rows]
        if not self.scaled:
            ratio = ((step * change).sum(-1) / (change * change).sum(-1))[:, None]
            diagonal = torch.where(self.fresh[rows, None], ratio.expand_as(diagonal), diagonal)
        self.diagonal[rows] = diagonal_bfgs(diagonal, step, change)
        self.fresh[rows] = False

    def reset(self, rows: Tensor, slope: Tensor) -> None:
        again = self.fresh[rows]
        plain = (1 / self._pulled(slope).norm(dim=-1, keepdim=True).clamp(min=1e-300)).expand_as(slope)
        self.diagonal[rows] = torch.where(again[:, None], plain, self.first[rows])
        self.steps[:, rows] = 0.0
        self.changes[:, rows] = 0.0
        self.fresh[rows] = True


def identity(like: Tensor) -> Tensor:
    """Returns the identity matrix for rows like these."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def curved(step: Tensor, change: Tensor) -> Tensor:
    """Marks pairs with enough curvature for a positive definite update."""
    return (step * change).sum(-1) > 1e-12 * step.norm(dim=-1) * change.norm(dim=-1)


def bfgs(inverse: Tensor, step: Tensor, change: Tensor) -> Tensor:
    r""":math:`(I - s y^\top / s^\top y)\, H\, (I - y s^\top / s^\top y) + s s^\top / s^\top y` for rows of pairs."""
    inner = (step * change).sum(-1)[:, None, None]
    moved = inverse @ change[..., None]
    cross = moved @ step[:, None, :]
    spread = 1 + change[:, None, :] @ moved / inner
    return inverse - (cross + cross.mT) / inner + spread * step[..., None] * step[:, None, :] / inner


def diagonal_bfgs(diagonal: Tensor, step: Tensor, change: Tensor) -> Tensor:
    r"""The diagonal :math:`\alpha` that follows the curvature of rows of pairs, Gilbert and Lemaréchal's update."""
    inner = (step * change).sum(-1, keepdim=True)
    outer = (change * change * diagonal).sum(-1, keepdim=True)
    length = (step * step / diagonal).sum(-1, keepdim=True)
    new = outer / (inner * diagonal) + change * change / inner - outer * (step / diagonal) ** 2 / (inner * length)
    return torch.where(new > 0, 1 / new.clamp(min=1e-300), diagonal)


class _Search:
    """The bracketed line searches of all starts."""

    def __init__(
        self, safe: SafeDensity, point: Tensor, value: Tensor, slope: Tensor, curvature: _Dense | _Limited, tol: float
    ) -> None:
        self.safe, self.curvature, self.tolerance = safe, curvature, tol
        self.point, self.value, self.slope = point.clone(), value.clone(), slope.clone()
        self.active = value > -torch.inf
        self.converged = torch.zeros_like(self.active)
        self.calm = torch.zeros_like(value, dtype=torch.long)
        self.trouble = torch.zeros_like(value, dtype=torch.long)
        self.way = torch.zeros_like(point)
        zero = torch.zeros_like(value)
        self.gain = torch.full_like(value, torch.inf)
        self.rise, self.size, self.low, self.high, self.trials = (zero.clone() for _ in range(5))
        self.low_value, self.low_rise = zero.clone(), zero.clone()
        self.low_point, self.low_slope = point.clone(), slope.clone()
        self._aim(self.active.nonzero()[:, 0])

    def _noise(self, rows: Tensor) -> Tensor:
        return 4 * self.safe.eps * self.value[rows].abs()

    def _aim(self, rows: Tensor) -> None:
        way = self.curvature.directions(rows, self.slope[rows])
        rise = (way * self.slope[rows]).sum(-1)
        flat = (self.slope[rows] == 0).all(-1)
        small = self.tolerance + self._noise(rows)
        calm = (0.5 * rise.abs() < small) & (self.gain[rows].abs() < small)
        self.calm[rows] = torch.where(calm, self.calm[rows] + 1, torch.zeros_like(self.calm[rows]))
        done = flat | (self.calm[rows] >= 2)
        self.converged[rows] |= done
        self.active[rows[done]] = False
        for _ in range(2):
            wrong = ~done & ~((rise > 0) & way.isfinite().all(-1) & rise.isfinite())
            if wrong.any():
                self.curvature.reset(rows[wrong], self.slope[rows[wrong]])
                way[wrong] = self.curvature.directions(rows[wrong], self.slope[rows[wrong]])
                rise = (way * self.slope[rows]).sum(-1)
        self.way[rows], self.rise[rows], self.size[rows] = way, rise, 1.0
        self.low[rows], self.high[rows], self.trials[rows] = 0.0, torch.inf, 0.0
        self.low_value[rows], self.low_rise[rows] = self.value[rows], rise
        self.low_point[rows], self.low_slope[rows] = self.point[rows], self.slope[rows]

    def advance(self) -> list[int]:
        """Makes one density call; returns the rows that took a step."""
        rows = self.active.nonzero()[:, 0]
        size, way, start, rise = self.size[rows], self.way[rows], self.value[rows], self.rise[rows]
        trial = self.safe.round(self.point[rows] + size[:, None] * way)
        value, slope = self.safe.gradients(trial)
        along = (slope * way).sum(-1)
        gained = value >= start + _SUFFICIENT * size * rise
        # Where rounding hides the gain, the slope decides.
        gained |= (value >= start - self._noise(rows)) & (along >= -0.8 * rise)
        steady = along <= _CURVATURE * rise
        self.trials[rows] += 1
        last = self.trials[rows] >= _TRIALS
        accept = gained & (steady | last)
        far, near = ~gained, gained & ~accept
        rescue = last & far & (self.low[rows] > 0)
        stuck = last & far & ~rescue
        ended = accept | last
        # Repeated long searches mean rounding, or a density that is not smooth.
        hard = (self.trials[rows] > _MANY) & self.high[rows].isfinite()
        self.trouble[rows] = torch.where(ended, (self.trouble[rows] + 1) * hard, self.trouble[rows])
        self._bracket(rows, value, along, far, near)
        self.low_point[rows[near]], self.low_slope[rows[near]] = trial[near], slope[near]
        trial = torch.where(rescue[:, None], self.low_point[rows], trial)
        slope = torch.where(rescue[:, None], self.low_slope[rows], slope)
        value = torch.where(rescue, self.low_value[rows], value)
        self._move(rows[accept | rescue], *(part[accept | rescue] for part in (trial, value, slope)))
        self._unstick(rows[stuck])
        self.active &= self.trouble < _TROUBLES
        return rows[accept | rescue].tolist()

    def _bracket(self, rows: Tensor, value: Tensor, along: Tensor, far: Tensor, near: Tensor) -> None:
        """Narrows each bracket and picks the next trial by a quadratic."""
        size, low, base, rise = self.size[rows], self.low[rows], self.low_value[rows], self.low_rise[rows]
        gap = size - low
        bend = base + rise * gap - value
        back = (0.5 * rise * gap / bend).nan_to_num(nan=0.5, posinf=0.5, neginf=0.5).clamp(0.02, 0.6)
        back = torch.where(value.isfinite(), back, torch.full_like(back, 0.1))
        shorter = low + back * gap
        fall = rise - along
        on = torch.where(fall > 0, along / fall, torch.full_like(fall, torch.inf)).clamp(1.0, 9.0)
        longer = torch.where(self.high[rows].isfinite(), 0.5 * (size + self.high[rows]), size + on * gap)
        self.high[rows] = torch.where(far, size, self.high[rows])
        self.low[rows] = torch.where(near, size, low)
        self.low_value[rows] = torch.where(near, value, base)
        self.low_rise[rows] = torch.where(near, along, rise)
        self.size[rows] = torch.where(far, shorter, torch.where(near, longer, size))

    def _move(self, rows: Tensor, point: Tensor, value: Tensor, slope: Tensor) -> None:
        if len(rows):
            self.curvature.update(rows, point - self.point[rows], self.slope[rows] - slope)
            self.gain[rows] = value - self.value[rows]
            self.point[rows], self.value[rows], self.slope[rows] = point, value, slope
            self._aim(rows)

    def _unstick(self, rows: Tensor) -> None:
        """Stops rows whose model promised next to nothing, and restarts the others."""
        if len(rows):
            tiny = 0.5 * self.rise[rows] < self.tolerance + 16 * self._noise(rows)
            hopeless = ~tiny & self.curvature.fresh[rows] & (self.gain[rows] == 0)
            self.converged[rows[tiny]] = True
            self.active[rows[tiny | hopeless]] = False
            again = rows[~tiny & ~hopeless]
            self.curvature.reset(again, self.slope[again])
            self.gain[again] = 0.0
            self._aim(again)
