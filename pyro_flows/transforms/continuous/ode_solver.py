"""One solve by torchdiffeq: settings, counts, its first step, and what to say where it fails."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ADAPTIVE",
    "FIXED",
    "Call",
    "Dynamics",
    "OdeReport",
    "OdeSettings",
    "TooLongError",
    "Watch",
    "floored",
    "increasing",
    "pair_of",
    "rms",
    "row_norm",
    "whole",
]

#: Adaptive solvers with their order, and those of fixed steps with their evaluations a step.
ADAPTIVE = {"dopri5": 5, "dopri8": 8, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 2}


FIXED = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}

_FLOOR = 10  # tolerances are no finer than so many rounding errors


_ROWS_NAMED = 8

Rhs = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class OdeSettings(NamedTuple):
    """How to integrate: ``steps`` for solvers of fixed steps, the tolerances for the others."""

    solver: str
    rtol: float
    atol: float
    steps: int
    max_steps: int
    per_row: bool
    gradient: str


@dataclass
class OdeReport:
    """What a solve took.

    Attributes:
        solver: its name.
        direction: ``"sampling"`` or ``"density"``.
        evaluations: calls of the field.
        steps: accepted steps.
        rejected: steps that were tried and refused.
        local_error: sum over steps of the solver's estimate of what each adds to the error, in units of the tolerance;
            ``None`` for fixed steps, which have no estimate.
        backward_evaluations: calls of the field in the adjoint solve, once gradients were asked for.
        gradient: the way that gradients take, ``"adjoint"`` or ``"backprop"``; ``None`` where nothing needs one.
    """

    solver: str
    direction: str
    evaluations: int = 0
    steps: int = 0
    rejected: int = 0
    local_error: float | None = None
    backward_evaluations: int = 0
    gradient: str | None = None


class Dynamics(ABC):
    """What is integrated: a field of rows, and columns that depend on rows but not on each other.

    It holds no tensor that needs a gradient: these come as ``shared`` (the same for all rows) and ``rowwise`` (leading
    dimension ``n``).
    """

    name: str
    num_columns: int

    @abstractmethod
    def bind(self, shared: Sequence[Tensor], rowwise: Sequence[Tensor]) -> Rhs:
        """``(t, x) -> (velocity, columns)`` for ``x`` of shape ``(n, D)`` and columns of shape ``(n, num_columns)``."""


class Call(NamedTuple):
    """The constants of a solve."""

    dynamics: Dynamics
    settings: OdeSettings
    report: OdeReport
    span: tuple[float, float]

    def unfit(self, gradient: Tensor) -> RuntimeError:
        """What to say of a gradient after the solution that is not finite."""
        return RuntimeError(
            f"{self.dynamics.name}: expected a finite gradient after where rows end and their log-determinants, got "
            f"others in {_rows(~gradient.isfinite().all(1))}; what the loss makes of these is not finite there, or has "
            "no finite slope"
        )


def pair_of(name: str, value: float | Sequence[float]) -> tuple[float, float]:
    """Checked tolerances for sampling and density, from one for both or from two."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    good = all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < 1 for v in pair)
    if len(pair) != 2 or not good:
        raise ValueError(
            f"Continuous: expected {name} between 0 and 1, or a pair of these for sampling and density, got {value!r}"
        )
    return float(pair[0]), float(pair[1])


def whole(name: str, value: int) -> int:
    """A checked number of steps."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Continuous: expected {name} to be an integer >= 1, got {value!r}")
    return value


def increasing(times: Sequence[float] | Tensor) -> list[float]:
    """Checked times of a path."""
    try:
        found = [float(t) for t in times]
    except (TypeError, ValueError, RuntimeError):  # no sequence, or one of other things than numbers
        found = []
    # NaN is in no sequence, though a sorted one may hold it.
    if not found or not all(0 <= t <= 1 for t in found) or found != sorted(set(found)):
        raise ValueError(f"Continuous: expected increasing times between 0 and 1, got {times!r}")
    return found


def floored(settings: OdeSettings, dtype: torch.dtype) -> tuple[float, float]:
    """``(rtol, atol)``, no finer than a dtype can tell."""
    floor = _FLOOR * torch.finfo(dtype).eps
    return max(settings.rtol, floor), max(settings.atol, floor)


def rms(ratio: Tensor) -> Tensor:
    """Root mean square over all rows, torchdiffeq's own norm."""
    return ratio.square().mean().sqrt()


def row_norm(ratio: Tensor) -> Tensor:
    """The largest root mean square of any row."""
    return ratio.square().mean(1).amax().sqrt()


class TooLongError(Exception):
    """A solve took more evaluations than it was allowed."""


class Watch:
    """A right-hand side as torchdiffeq calls it: counted, and with its last value kept for what to say on failure."""

    def __init__(
        self,
        call: Call,
        rhs: Callable[[Tensor, Tensor], Tensor],
        norm: Callable[[Tensor], Tensor],
        rows: int,
        x: Tensor,
        backward: bool = False,
    ) -> None:
        self.call, self.rhs, self.rows, self.x, self.backward = call, rhs, rows, x, backward
        self._norm = norm
        self.evaluations = self.steps = self.rejected = 0
        self.local_error, self.ratio = 0.0, 0.0
        self.allowed: float = math.inf
        self.first: Tensor | None = None
        self.last: tuple[Tensor, Tensor] | None = None
        self.errors: Tensor | None = None
        self.strict = False

    def __call__(self, t: Tensor, state: Tensor) -> Tensor:
        if self.first is not None:  # known from the choice of the first step
            value, self.first = self.first, None
            return value
        if self.evaluations >= self.allowed:
            raise TooLongError
        self.evaluations += 1
        value = self.rhs(t, state)
        self.last = t, value
        if self.strict and not bool(value.isfinite().all()):
            raise self.trouble("")
        return value

    def norm(self, ratio: Tensor) -> Tensor:
        self.errors = ratio.detach()
        value = self._norm(self.errors)
        self.ratio = float(value)
        return value

    def callback_accept_step(self, t: Tensor, state: Tensor, step: Tensor) -> None:
        self.steps += 1
        self.local_error += self.ratio

    def callback_reject_step(self, t: Tensor, state: Tensor, step: Tensor) -> None:
        self.rejected += 1

    def run(self, start: Tensor, rtol: float, scale: Tensor, span: tuple[float, float]) -> Tensor:
        """Where a state ends, from one end of the span to the other."""
        from torchdiffeq import odeint  # heavy, and needed here only

        settings = self.call.settings
        kind = torch.float32 if start.device.type == "mps" else torch.float64
        ends = torch.tensor(span, dtype=kind, device=start.device)
        if settings.solver in FIXED:
            self.steps = math.ceil(settings.steps * abs(span[1] - span[0]) - 1e-9)
            options = {"grid_constructor": _Grid(self.steps)}
            out = odeint(self._plain, start, ends, method=settings.solver, options=options)[1]
            if not bool(out.detach().isfinite().all()):
                self.strict = True
                with torch.no_grad():
                    odeint(self._plain, start, ends, method=settings.solver, options=options)
                raise self.trouble("the result is not finite")
            return out
        if self.first is None:
            self.first = self(ends[0].to(start.dtype), start)
        options = {
            "first_step": self._first_step(self.first.detach(), scale),
            "max_num_steps": settings.max_steps,
            "norm": self.norm,
            "step_t": ends[1:],  # end on the end, where torchdiffeq would interpolate
            "dtype": kind,
        }
        try:
            return odeint(self, start, ends, rtol=rtol, atol=scale, method=settings.solver, options=options)[1]
        except AssertionError as error:  # torchdiffeq's word for steps that are too many or too small
            raise self.trouble(str(error)) from None

    def _plain(self, t: Tensor, state: Tensor) -> Tensor:
        return self(t, state)  # fixed steps have no callbacks for what becomes of steps

    def _first_step(self, value: Tensor, scale: Tensor) -> float:
        """A step whose error should be about the tolerance, for a field of slopes of order one."""
        ratio = float(self._norm(value / scale))
        if not math.isfinite(ratio):
            raise self.trouble("")
        order = ADAPTIVE[self.call.settings.solver]
        return min(1.0, 0.5 * (1.0 / max(ratio, 1e-300)) ** (1.0 / order))

    def trouble(self, reason: str) -> Exception:
        """What to say: which rows, when, and what to do."""
        name, settings = self.call.dynamics.name, self.call.settings
        bad = ~self.x.detach().isfinite().all(1)
        if bool(bad.any()) and not self.backward:
            return ValueError(f"{name}: expected finite values to integrate, got others in {_rows(bad)}")
        t, value = self.last
        by_row = self._by_row(value.detach())
        where = "in the adjoint solve " if self.backward else ""
        around = ', or go through the solver\'s steps (gradient="backprop")' if self.backward else ""
        at = f"{where}at t={float(t):.4g}"
        bad = ~by_row.isfinite().all(1)
        if bool(bad.any()):
            return RuntimeError(
                f"{name}: the field or its divergence is not finite {at} in {_rows(bad)}. It diverges, or its "
                "parameters are not finite: lower the learning rate, standardise the data, use a bounded activation "
                f'("tanh"), or penalise with kinetic= and jacobian={around}'
            )
        speed = by_row[:, : self.x.shape[1]].abs().amax(1)
        errors = speed if self.errors is None else self._by_row(self.errors).abs().amax(1).nan_to_num(math.inf)
        worst, rows = errors.topk(min(_ROWS_NAMED, len(errors)))
        rows = rows[worst >= 0.1 * worst[0]].sort().values
        return RuntimeError(
            f"{name}: {settings.solver} makes no headway {at} ({self.steps} steps, {self.evaluations} evaluations; "
            f"{reason.split(':')[0].rstrip('.')}); the hardest rows are {rows.tolist()}, with |v| up to "
            f"{float(speed[rows].max()):.3g}. The field is stiff or diverges: loosen the tolerances "
            f"(rtol={settings.rtol:g}, atol={settings.atol:g}), penalise with kinetic= and jacobian= in training, "
            f"take a solver of fixed steps, or raise max_steps ({settings.max_steps}){around}"
        )

    def _by_row(self, state: Tensor) -> Tensor:
        """A row of the state for each row, without what rows share."""
        if not self.backward:
            return state
        return state[: 2 * self.x.numel()].view(2, *self.x.shape).movedim(0, 1).flatten(1)


class _Grid:
    """Even steps; torchdiffeq would take a single one, or one more than asked."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, rhs: object, start: Tensor, ends: Tensor) -> Tensor:
        parts = torch.arange(self.steps + 1, dtype=ends.dtype, device=ends.device) / self.steps
        return ends[0] + parts * (ends[1] - ends[0])


def _rows(bad: Tensor) -> str:
    found = bad.nonzero().flatten().tolist()
    named = ", ".join(map(str, found[:_ROWS_NAMED])) + (", .." if len(found) > _ROWS_NAMED else "")
    return f"rows [{named}] ({len(found)} of {len(bad)})"
