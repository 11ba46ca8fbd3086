"""The continuous transform."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import NamedTuple

import torch
from torch import Size, Tensor, nn

from pyro_flows.core.checks import admit, choice, integer
from pyro_flows.core.modes import full_precision, plain_eager
from pyro_flows.core.transform import FlowTransform
from pyro_flows.transforms.continuous.divergence import Estimator, FieldDynamics, draw, estimator, probes_of
from pyro_flows.transforms.continuous.fields import Field, GivenField
from pyro_flows.transforms.continuous.ode import integrate
from pyro_flows.transforms.continuous.ode_solver import ADAPTIVE, FIXED, OdeReport, OdeSettings, floored

__all__ = ["Continuous", "Penalties", "SolveCheck", "collect_penalties"]

FIXED_STEPS, MOST_STEPS = 20, 2000  # defaults of the solvers


class SolveCheck(NamedTuple):
    """Differences between a solve and a finer one.

    Attributes:
        value: largest difference of rows; NaN where the dtype allows no finer tolerance.
        ladj: largest difference of log-determinants, or NaN.
        report: the report on the solve.
        finer: the report on the finer solve.

    Example:
        >>> layer = pf.cnf(2)[0]
        >>> check = layer.check_solve(torch.randn(5, 2))
        >>> check.value < 1e-3
        True
    """

    value: float
    ladj: float
    report: OdeReport
    finer: OdeReport


@dataclass(eq=False)
class Penalties:
    """The penalties of passes within :func:`collect_penalties`.

    Attributes:
        parts: each pass's weighted integrals, of the batch shape.

    Example:
        >>> flow = pf.Flow(pf.cnf(2, kinetic=0.01))
        >>> with pf.transforms.continuous.layer.collect_penalties() as penalties:
        ...     scores = flow.log_prob(torch.randn(5, 2))
        >>> penalties.parts[0].shape
        torch.Size([5])
    """

    parts: list[Tensor] = dataclass_field(default_factory=list)

    def total(self) -> Tensor | float:
        """The sum over passes of the mean over rows, for a mean loss; 0 without passes."""
        return sum((part.mean() for part in self.parts if part.numel()), 0.0)


# Per thread, so that concurrent fits do not collect each other's penalties.
_collectors: ContextVar[tuple[Penalties, ...]] = ContextVar("collectors", default=())


@contextlib.contextmanager
def collect_penalties() -> Iterator[Penalties]:
    """Collects the penalties of continuous transforms with ``kinetic`` or ``jacobian`` weights.

    Only passes within the block, in the same thread, compute penalties.

    Example:
        >>> from pyro_flows.transforms.continuous.layer import collect_penalties
        >>> flow = pf.Flow(pf.cnf(2, kinetic=0.01))
        >>> with collect_penalties() as penalties:
        ...     loss = -flow.log_prob(torch.randn(5, 2)).mean()
        >>> (loss + penalties.total()).backward()
        >>> penalties.total().shape
        torch.Size([])
    """
    penalties = Penalties()
    token = _collectors.set((*_collectors.get(), penalties))
    try:
        yield penalties
    finally:
        _collectors.reset(token)


def _weight(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"Continuous: expected {name} to be a number >= 0, got {value!r}")
    return float(value)


def _tolerances(name: str, value: float | Sequence[float]) -> tuple[float, float]:
    """Splits one or two tolerances into those of sampling and density."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    good = all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < 1 for v in pair)
    if len(pair) != 2 or not good:
        raise ValueError(
            f"Continuous: expected {name} between 0 and 1, or a pair of these for sampling and density, got {value!r}"
        )
    return float(pair[0]), float(pair[1])


def _increasing(times: Sequence[float] | Tensor) -> list[float]:
    try:
        found = [float(t) for t in times]
    except (TypeError, ValueError, RuntimeError):  # not a sequence of numbers
        found = []
    # The range excludes NaN, which a sorted sequence may hold.
    if not found or not all(0 <= t <= 1 for t in found) or found != sorted(set(found)):
        raise ValueError(f"Continuous: expected increasing times between 0 and 1, got {times!r}")
    return found


class Continuous(FlowTransform):
    r"""A continuous flow: :math:`y = x + \int_0^1 v(t, z_t, c)\, dt` along :math:`\dot z = v` from :math:`z_0 = x`.

    The log-determinant is :math:`\int_0^1 \nabla \cdot v\, dt`.  Each direction is one solve, with as many evaluations
    of the field as the tolerance takes; ``last_solve`` reports on the latest.

    **Divergence.**  ``"exact"`` costs about one more evaluation for plain fields of up to two hidden layers, else about
    :math:`D`, the number of dimensions.  ``"hutchinson"`` and ``"hutch++"`` are unbiased estimates by products with the
    Jacobian.  Their noise is fixed during a solve: new for each row and solve in training; in ``eval()``, where the
    density is a function, by ``scoring``.  ``"hutch++"`` finds its basis from the Jacobian at a solve's start, in
    ``eval()`` at zero and half time.  ``"auto"`` is exact where that is cheap or :math:`D \le 32`, else
    ``"hutchinson"``.

    **Gradients.**  ``"adjoint"`` solves backwards, in memory independent of the evaluations: first derivatives, exact
    up to the tolerance.  ``"backprop"`` differentiates the solver's steps: faster, exact for the computed result, any
    derivatives, with memory for each evaluation.  ``"auto"`` is ``"backprop"`` where the first evaluation keeps at most
    4 MiB and all of them 1 GiB, else (and under ``torch.func``) the adjoint.

    **Rows.**  All rows of a batch share adaptive steps, chosen by their root mean square error: a row's result depends
    on its batch mates, and a hard row's error may exceed the tolerance.  With ``per_row`` the hardest row decides.
    Fixed steps do not depend on mates.  Errors add up over steps.  At a tolerance of 1e-5 the log-density of 500 points
    by a flow of two moons was off by 16 tolerances (root mean square) and 143 (worst); with ``per_row`` by 1.6 and 13,
    for 1.6 times the evaluations; a single row by 15 and 52 in both cases, and by about as much from itself among
    others (``examples/continuous.py``).

    Args:
        event_shape: an ``input_dim`` or the shape of one event.
        field: a :class:`~pyro_flows.transforms.continuous.Field`, or a module called as ``field(t, x)``, or
            ``field(t, x, context)`` with a context, that keeps the shape of ``x`` and treats rows independently.
        context_dim: size of the context, 0 for none.
        divergence: ``"auto"``, ``"exact"``, ``"hutchinson"`` or ``"hutch++"``.
        noise: noise of the estimates, ``"rademacher"`` or ``"gaussian"``.
        num_probes: probes of the estimates; 1 by default, 4 for ``"hutch++"``, half of which find its basis.
        scoring: the divergence in ``eval()`` where training estimates: ``"exact"``; ``"frozen"``, by noise drawn once,
            saved, and equal for all rows; ``"auto"``, exact where ``divergence="auto"`` is, else frozen.
        solver: adaptive (``"dopri5"``, ``"dopri8"``, ``"bosh3"``, ``"fehlberg2"``, ``"adaptive_heun"``) or with fixed
            steps (``"euler"``, ``"midpoint"``, ``"heun2"``, ``"heun3"``, ``"rk4"``).
        rtol, atol: tolerances of each step, or pairs for sampling and density; no finer than ten rounding errors of the
            dtype.
        solver_steps: number of fixed steps (20), or most steps of an adaptive solver (2000).
        gradient: ``"auto"``, ``"adjoint"`` or ``"backprop"``.
        per_row: whether the tolerance holds for every row, not on average.
        kinetic: weight of :math:`\int |v|^2 dt` in :func:`collect_penalties`, and so in the loss of
            :func:`~pyro_flows.infer.density.fit.fit_density`.
        jacobian: weight of :math:`\int \|\partial v / \partial z\|_F^2 dt` there, by the divergence's probes; if exact,
            by :math:`D` products with the Jacobian in each evaluation.

    Raises:
        ValueError: for options out of range, or a field that changes the shape, mixes rows, or hides its gradient.
        TypeError: for a field that is not a module or has a wrong signature; in a pass, for half precision.
        RuntimeError: in a pass, if the field is not finite or too stiff for ``solver_steps``; names time and rows.
        NotImplementedError: for derivatives in forward mode.

    Example:
        >>> class Field(torch.nn.Linear):
        ...     def forward(self, t, x):
        ...         return super().forward(x)
        >>> flow = pf.Flow(pf.Continuous(2, Field(2, 2)))
        >>> flow.log_prob(flow.sample((5,))).shape
        torch.Size([5])

    References:
        Those of :func:`~pyro_flows.flows.cnf`, and
        Hutch++: Optimal Stochastic Trace Estimation (Meyer et al., 2021), arXiv:2010.09649.
    """

    sampling_cost = density_cost = "1 solve"
    last_solve: OdeReport | None = None
    frozen: Tensor | None

    def __init__(
        self,
        event_shape: int | Iterable[int],
        field: Field | nn.Module,
        *,
        context_dim: int = 0,
        divergence: str = "auto",
        noise: str = "rademacher",
        num_probes: int | None = None,
        scoring: str = "auto",
        solver: str = "dopri5",
        rtol: float | Sequence[float] = 1e-5,
        atol: float | Sequence[float] = 1e-5,
        solver_steps: int | None = None,
        gradient: str = "auto",
        per_row: bool = False,
        kinetic: float = 0.0,
        jacobian: float = 0.0,
    ) -> None:
        super().__init__(event_shape, context_dim)
        self.field = field if isinstance(field, Field) else GivenField(field, self.event_shape, context_dim)
        if (self.field.event_shape, self.field.context_dim) != (self.event_shape, context_dim):
            raise ValueError(
                f"Continuous: expected a field of event shape {tuple(self.event_shape)} and context_dim={context_dim}, "
                f"got one of {tuple(self.field.event_shape)} and {self.field.context_dim}"
            )
        self.solver = choice("Continuous", "solver", solver, (*ADAPTIVE, *FIXED))
        self.gradient = choice("Continuous", "gradient", gradient, ("auto", "adjoint", "backprop"))
        self.scoring = choice("Continuous", "scoring", scoring, ("auto", "exact", "frozen"))
        self.per_row = bool(per_row)
        self.rtol, self.atol = _tolerances("rtol", rtol), _tolerances("atol", atol)
        self.solver_steps = None if solver_steps is None else integer("Continuous", "solver_steps", solver_steps)
        self.kinetic, self.jacobian = _weight("kinetic", kinetic), _weight("jacobian", jacobian)
        size = self.event_shape.numel()
        self.estimator = estimator(divergence, noise, num_probes, size).resolved(self.field)
        frozen = None
        if self.estimator.kind != "exact" and self._scorer().kind != "exact":
            frozen = draw(noise, torch.empty(0), self.estimator.num_probes, size)
        self.register_buffer("frozen", frozen)

    def _scorer(self) -> Estimator:
        """The divergence in ``eval()``."""
        if self.scoring == "frozen" or self.estimator.kind == "exact":
            return self.estimator
        kind = Estimator("auto").resolved(self.field).kind if self.scoring == "auto" else "exact"
        return self.estimator._replace(kind="exact") if kind == "exact" else self.estimator

    def _settings(self, density: bool, finer: float = 1.0) -> OdeSettings:
        steps = self.solver_steps or (FIXED_STEPS if self.solver in FIXED else MOST_STEPS)
        return OdeSettings(
            solver=self.solver,
            rtol=self.rtol[density] / finer,
            atol=self.atol[density] / finer,
            solver_steps=steps if finer == 1.0 else 2 * steps,
            per_row=self.per_row,
            gradient=self.gradient,
        )

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(x, context, False)[:2]

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(y, context, True)[:2]

    @full_precision  # half precision has no inverse
    def _solve(
        self,
        x: Tensor,
        context: Tensor | None,
        density: bool,
        finer: float = 1.0,
        noise: Tensor | None = None,
        span: tuple[float, float] | None = None,
    ) -> tuple[Tensor, Tensor, OdeReport]:
        report = OdeReport(self.solver, "density" if density else "sampling")
        span = ((1.0, 0.0) if density else (0.0, 1.0)) if span is None else span
        batch = self._batch_of(x)
        if x.is_meta:
            return torch.empty_like(x), x.new_empty(batch), report
        like = next((p for p in self.parameters() if p.is_floating_point()), x)
        x, context = x.to(like.dtype), None if context is None else context.to(like.dtype)
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"Continuous: expected float32 or float64 values to integrate, got {x.dtype}")
        if torch.jit.is_tracing():
            raise RuntimeError(
                f"{self._name}: torch.jit.trace would keep the steps of this one solve for all others; use the plain "
                "function, and Trace_ELBO in place of JitTrace_ELBO"
            )
        self.last_solve = report
        if batch.numel() == 0:
            given = [*self.field.parameters(), *([] if context is None else [context])]
            none = sum((t.flatten()[:0].sum() for t in given), x.new_zeros(()))  # for the graph
            return x + none, x.flatten(len(batch)).sum(-1) + none, report
        rows = x.reshape(batch.numel(), self.event_shape.numel())
        shared: list[Tensor] = [*self.field.parameters()]
        rowwise: list[Tensor] = []
        if context is not None:
            one = context.numel() == self.context_dim and plain_eager()
            context = context.reshape(1, -1) if one else context.expand(*batch, -1).reshape(len(rows), -1)
            (shared if one else rowwise).append(context)
        settings = self.estimator if self.training else self._scorer()
        penalized = bool(_collectors.get()) and (self.kinetic > 0 or self.jacobian > 0)
        wanted = (penalized and self.kinetic > 0, penalized and self.jacobian > 0)
        if settings.kind != "exact":
            rowwise.append(self._probes(settings, rows, context, span[0], noise))
        dynamics = FieldDynamics(self._name, self.field, settings, context is not None, wanted)
        moved, along = integrate(dynamics, self._settings(density, finer), report, rows, shared, rowwise, span)
        if penalized:
            self._collect(along, wanted, density, batch)
        return moved.view(x.shape), along[:, 0].view(batch), report

    @property
    def _name(self) -> str:
        return f"Continuous {tuple(self.event_shape)}"

    def _probes(
        self, settings: Estimator, rows: Tensor, context: Tensor | None, time: float, noise: Tensor | None
    ) -> Tensor:
        x, count = rows.view(-1, *self.event_shape), len(rows)
        if self.frozen is not None and not self.training:
            # Both directions need the same basis, independent of x and the context.
            x, time, noise = x.new_zeros(1, *self.event_shape), 0.5, self.frozen.to(rows.dtype).unsqueeze(0)
            context = None if context is None else context.new_zeros(1, self.context_dim)
        elif noise is None:
            noise = draw(settings.noise, rows, count, settings.num_probes, rows.shape[1])
        return probes_of(settings, self.field, rows.new_full((), time), x, context, noise).expand(count, -1, -1)

    def _collect(self, along: Tensor, wanted: tuple[bool, bool], density: bool, batch: Size) -> None:
        weights = [w for w, want in zip((self.kinetic, self.jacobian), wanted, strict=True) if want]
        sign = -1.0 if density else 1.0  # an integral from 1 to 0
        penalty = sum((sign * w * along[:, 1 + k] for k, w in enumerate(weights)), along.new_zeros(()))
        for collector in _collectors.get():
            collector.parts.append(penalty.view(batch))

    @torch.no_grad()
    def check_solve(self, value: Tensor, context: Tensor | None = None, density: bool = False) -> SolveCheck:
        """Measures the error of a solve by another one, with a hundredth of the tolerance or twice the fixed steps.

        Args:
            value: base-side, or data-side with ``density``.
            context: the context, if the transform takes one.
            density: the direction.

        Returns:
            The largest differences of values and of log-determinants (nats), without the error of an estimated
            divergence, as both solves share its noise.  In float32, rough near a tolerance of 1.2e-6, and NaN at it.

        Example:
            >>> layer = pf.cnf(2)[0]
            >>> layer.check_solve(torch.randn(5, 2), density=True).ladj < 1e-3
            True
        """
        value = admit(self, value, context, density)
        settings = self.estimator if self.training else self._scorer()
        noise = None
        if settings.kind != "exact" and self.training:  # the same in both solves
            size = self.event_shape.numel()
            noise = draw(settings.noise, value, value.numel() // size, settings.num_probes, size)
        end, ladj, report = self._solve(value, context, density, noise=noise)
        better, finer_ladj, finer = self._solve(value, context, density, 100.0, noise)
        self.last_solve = report
        coarse, fine = (floored(self._settings(density, by), value.dtype) for by in (1.0, 100.0))
        if self.solver in ADAPTIVE and coarse == fine:
            return SolveCheck(math.nan, math.nan, report, finer)
        return SolveCheck(_largest(end - better), _largest(ladj - finer_ladj), report, finer)

    @torch.no_grad()
    def path(
        self, value: Tensor, times: Sequence[float] | Tensor, context: Tensor | None = None, density: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Returns the rows at given times on their way, for pictures; no gradients.

        Args:
            value: base-side at ``t = 0``, or data-side at ``t = 1`` with ``density``.
            times: between 0 and 1, increasing.
            context: the context, if the transform takes one.
            density: whether to start from the data.

        Returns:
            Values, shape ``(len(times), *batch, *event_shape)``, and ``log|det|`` from the start, shape
            ``(len(times), *batch)``, in the order of ``times``.

        Raises:
            ValueError: for times that do not increase or leave the interval from 0 to 1.

        Example:
            >>> layer = pf.cnf(2)[0]
            >>> values, ladj = layer.path(torch.randn(5, 2), times=[0.0, 0.5, 1.0])
            >>> values.shape, ladj.shape
            (torch.Size([3, 5, 2]), torch.Size([3, 5]))
        """
        value = admit(self, value, context, density)
        times = _increasing(times)
        states, ladjs, at = [], [], 1.0 if density else 0.0
        ladj = value.new_zeros(self._batch_of(value))
        for t in reversed(times) if density else times:
            if t != at:
                value, more, _ = self._solve(value, context, density, span=(at, t))
                ladj = ladj + more
            at = t
            states.append(value)
            ladjs.append(ladj)
        turn = -1 if density else 1
        return torch.stack(states[::turn]), torch.stack(ladjs[::turn])

    def extra_repr(self) -> str:
        fixed = self.solver in FIXED
        how = f"solver_steps={self.solver_steps or FIXED_STEPS}" if fixed else f"rtol={self.rtol}, atol={self.atol}"
        return f"{super().extra_repr()}, {self.solver}, {how}, divergence: {self.estimator.kind}"


def _largest(difference: Tensor) -> float:
    return float(difference.abs().amax()) if difference.numel() else 0.0
