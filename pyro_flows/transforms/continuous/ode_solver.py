"""One solve by torchdiffeq."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_flows.transforms.continuous.divergence import FieldDynamics

__all__ = [
    "ADAPTIVE",
    "FIXED",
    "Call",
    "OdeReport",
    "OdeSettings",
    "Solve",
    "TooLongError",
    "floored",
    "rms",
    "row_norm",
]

#: Adaptive solvers with their order, and fixed-step solvers with their evaluations per step.
ADAPTIVE = {"dopri5": 5, "dopri8": 8, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 2}
FIXED = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}

_FLOOR = 10  # rounding errors, the finest tolerance
_ROWS_NAMED = 8


class OdeSettings(NamedTuple):
    """How to integrate; ``solver_steps`` is the number of fixed steps, or an adaptive solver's most."""

    solver: str
    rtol: float
    atol: float
    solver_steps: int
    per_row: bool
    gradient: str


@dataclass
class OdeReport:
    """The cost of a solve.

    Attributes:
        solver: the solver's name.
        direction: ``"sampling"`` or ``"density"``.
        evaluations: calls of the field.
        steps: accepted steps.
        rejected: rejected steps.
        local_error: sum over steps of the solver's own error estimate, in tolerances; ``None`` for fixed steps.
        backward_evaluations: calls of the field in the adjoint solve, once gradients were computed.
        gradient: ``"adjoint"`` or ``"backprop"``; ``None`` where nothing needs a gradient.

    Example:
        >>> layer = pf.cnf(2, solver="rk4", solver_steps=10)[0]
        >>> y = layer(torch.randn(5, 2))
        >>> layer.last_solve.steps, layer.last_solve.evaluations
        (10, 40)
    """

    solver: str
    direction: str
    evaluations: int = 0
    steps: int = 0
    rejected: int = 0
    local_error: float | None = None
    backward_evaluations: int = 0
    gradient: str | None = None


class Call(NamedTuple):
    """The constants of a solve."""

    dynamics: FieldDynamics
    settings: OdeSettings
    report: OdeReport
    span: tuple[float, float]

    def unfit(self, gradient: Tensor) -> RuntimeError:
        """The error for a non-finite incoming gradient."""
        return RuntimeError(
            f"{self.dynamics.name}: expected a finite gradient with respect to the final rows and their "
            f"log-determinants, got others in {_rows(~gradient.isfinite().all(1))}; what the loss makes of these is "
            "not finite there, or has no finite slope"
        )


def floored(settings: OdeSettings, dtype: torch.dtype) -> tuple[float, float]:
    """``(rtol, atol)``, no finer than the dtype resolves."""
    floor = _FLOOR * torch.finfo(dtype).eps
    return max(settings.rtol, floor), max(settings.atol, floor)


def rms(ratio: Tensor) -> Tensor:
    """Root mean square over all rows, torchdiffeq's norm."""
    return ratio.square().mean().sqrt()


def row_norm(ratio: Tensor) -> Tensor:
    """The largest root mean square of any row."""
    return ratio.square().mean(1).amax().sqrt()


class TooLongError(Exception):
    """A solve took too many evaluations."""


class Solve:
    """A right-hand side for torchdiffeq that counts calls and keeps its last value for error messages.

    ``rhs`` gives the state's derivative by time and state, ``norm`` the size of errors in units of the tolerance.
    ``x`` holds the rows at the start, shape ``(n, D)``; ``backward`` marks the adjoint solve.
    """

    def __init__(
        self,
        call: Call,
        rhs: Callable[[Tensor, Tensor], Tensor],
        norm: Callable[[Tensor], Tensor],
        x: Tensor,
        backward: bool = False,
    ) -> None:
        self.call, self.rhs, self.x, self.backward, self._norm = call, rhs, x, backward, norm
        self.evaluations = self.steps = self.rejected = 0
        self.local_error, self.ratio = 0.0, 0.0
        self.allowed: float = math.inf
        self.first: Tensor | None = None  # the value at the start, once known
        self.time, self.last = x.new_tensor(call.span[0]), x
        self.errors: Tensor | None = None
        self.strict = False

    def __call__(self, t: Tensor, state: Tensor) -> Tensor:
        if self.first is not None:
            value, self.first = self.first, None
            return value
        if self.evaluations >= self.allowed:
            raise TooLongError
        self.evaluations += 1
        value = self.rhs(t, state)
        self.time, self.last = t, value
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
        """Integrates a state over the span."""
        from torchdiffeq import odeint  # heavy

        settings = self.call.settings
        kind = torch.float32 if start.device.type == "mps" else torch.float64
        ends = torch.tensor(span, dtype=kind, device=start.device)
        if settings.solver in FIXED:
            self.steps = math.ceil(settings.solver_steps * abs(span[1] - span[0]) - 1e-9)
            # Even steps; torchdiffeq's step_size may take one more.
            parts = torch.arange(self.steps + 1, dtype=kind, device=start.device) / self.steps
            options: dict[str, Any] = {"grid_constructor": lambda *_: ends[0] + parts * (ends[1] - ends[0])}

            def plain(t: Tensor, state: Tensor) -> Tensor:  # fixed steps take no callbacks
                return self(t, state)

            out = odeint(plain, start, ends, method=settings.solver, options=options)[1]
            if not bool(out.detach().isfinite().all()):
                self.strict = True
                with torch.no_grad():
                    odeint(plain, start, ends, method=settings.solver, options=options)
                raise self.trouble("the result is not finite")
            return out
        if self.first is None:
            self.first = self(ends[0].to(start.dtype), start)
        options = {
            "first_step": self._first_step(self.first.detach(), scale),
            "max_num_steps": settings.solver_steps,
            "norm": self.norm,
            "step_t": ends[1:],  # end on the end, where torchdiffeq would interpolate
            "dtype": kind,
        }
        try:
            return odeint(self, start, ends, rtol=rtol, atol=scale, method=settings.solver, options=options)[1]
        except AssertionError as error:  # torchdiffeq's sign of too many or too small steps
            raise self.trouble(str(error)) from None

    def _first_step(self, value: Tensor, scale: Tensor) -> float:
        """A step whose error should be about the tolerance, for a field of slopes of order one.

        torchdiffeq's own choice took 1.4 to 2 times the evaluations.
        """
        ratio = float(self._norm(value / scale))
        if not math.isfinite(ratio):
            raise self.trouble("")
        order = ADAPTIVE[self.call.settings.solver]
        return min(1.0, 0.5 * (1.0 / max(ratio, 1e-300)) ** (1.0 / order))

    def trouble(self, reason: str) -> Exception:
        """The error that names rows, time and remedies."""
        name, settings = self.call.dynamics.name, self.call.settings
        bad = ~self.x.detach().isfinite().all(1)
        if bool(bad.any()) and not self.backward:
            return ValueError(f"{name}: expected finite values to integrate, got others in {_rows(bad)}")
        by_row = self._by_row(self.last.detach())
        where = "in the adjoint solve " if self.backward else ""
        around = ', or go through the solver\'s steps (gradient="backprop")' if self.backward else ""
        at = f"{where}at t={float(self.time):.4g}"
        bad = ~by_row.isfinite().all(1)
        if bool(bad.any()):
            return RuntimeError(
                f"{name}: the field or its divergence is not finite {at} in {_rows(bad)}. It diverges, or its "
                "parameters are not finite: lower the learning rate, standardize the data, use a bounded activation "
                f'("tanh"), or penalize with kinetic= and jacobian={around}'
            )
        speed = by_row[:, : self.x.shape[1]].abs().amax(1)
        errors = speed if self.errors is None else self._by_row(self.errors).abs().amax(1).nan_to_num(math.inf)
        worst, rows = errors.topk(min(_ROWS_NAMED, len(errors)))
        rows = rows[worst >= 0.1 * worst[0]].sort().values
        return RuntimeError(
            f"{name}: {settings.solver} makes no headway {at} ({self.steps} steps, {self.evaluations} evaluations; "
            f"{reason.split(':')[0].rstrip('.')}); the hardest rows are {rows.tolist()}, with |v| up to "
            f"{float(speed[rows].max()):.3g}. The field is stiff or diverges: loosen the tolerances "
            f"(rtol={settings.rtol:g}, atol={settings.atol:g}), penalize with kinetic= and jacobian= in training, "
            f'take fixed steps (solver="rk4"), or raise solver_steps ({settings.solver_steps}){around}'
        )

    def _by_row(self, state: Tensor) -> Tensor:
        """The rows' part of a state, shape ``(n, ...)``."""
        if not self.backward:
            return state
        return state[: 2 * self.x.numel()].view(2, *self.x.shape).movedim(0, 1).flatten(1)


def _rows(bad: Tensor) -> str:
    found = bad.nonzero().flatten().tolist()
    named = ", ".join(map(str, found[:_ROWS_NAMED])) + (", .." if len(found) > _ROWS_NAMED else "")
    return f"rows [{named}] ({len(found)} of {len(bad)})"
