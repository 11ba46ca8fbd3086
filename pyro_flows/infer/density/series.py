"""Exact densities, draws and forecasts of series, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint

from pyro_flows.core.checks import admit, check_context, first_floating, integer, joint_shape, refuse_other_kind
from pyro_flows.core.steps import Move, Stepper, affine, at_any_time, length_mask
from pyro_flows.distributions import ConvMADE, Flow
from pyro_flows.distributions.made.steps import ModelSteps
from pyro_flows.distributions.queries.layers import leaves_of
from pyro_flows.distributions.shared import by_row
from pyro_flows.infer.density.surprise import single_base, surprise
from pyro_flows.infer.density.units import StandardizedDensity, is_plain_flow

__all__ = ["Stream", "step_log_prob"]


Series = Flow | ConvMADE | StandardizedDensity


def _made(model: Series) -> ConvMADE | None:
    """The autoregressive model that is a density itself, or in the units of data."""
    inner = model.module if isinstance(model, StandardizedDensity) else model
    return inner if isinstance(inner, ConvMADE) else None


def _check(model: Series, who: str) -> None:
    if not is_plain_flow(model) and _made(model) is None:
        raise TypeError(
            f"{who}: expected a Flow, e.g. pf.Flow(pf.mintnet((C, T), causal=True)), or a ConvMADE, got "
            f"{type(model).__name__}"
        )
    if len(model.event_shape) != 2 or (is_plain_flow(model) and len(model.chain.event_shape) != 2):
        raise ValueError(f"{who}: expected a model of series (C, T), got event shape {tuple(model.event_shape)}")


class _Independent:
    """A base of independent dimensions, the same at all times; ``single`` has batch shape ``(C, 1)``."""

    def __init__(self, single: Distribution, rows: int) -> None:
        self.single, self.rows = single, rows

    def score(self, x: Tensor) -> Tensor:
        return self.single.log_prob(x).sum(-2)

    def draw(self) -> Tensor:
        return self.single.sample((self.rows,)).squeeze(-1)

    def repeated(self, times: int) -> _Independent:
        return _Independent(self.single, times * self.rows)


class Stream:
    r"""Runs a causal flow or a ``ConvMADE`` over series step by step without end: :math:`p(y_t \mid y_{<t}, c)`.

    The stream keeps the past that the model needs: each convolution's last inputs, the states of a GRU, and the keys
    and values in the window of attention.  So every step costs the same, except under attention without a window: in
    the density direction one pass of one step; in the other, a solve of ``C`` numbers for each ``Mint`` layer, and an
    evaluation a channel for each ``CausalAutoregressive`` layer and for a ``ConvMADE``.  Densities equal those of whole
    series up to rounding, and beyond the ``T`` of the model those of a longer one with the same parameters.  The stream
    copies the model, records no gradient, and can be pickled.

    Args:
        flow: a :class:`~pyro_flows.distributions.flow.Flow` of series ``(C, T)``.  Its parts are causal in time
            (``mintnet(..., causal=True)``, ``causal_maf``), or elementwise with the same parameters at all times
            (``ActNorm``, ``Rescaling``, ``Standardization``, transforms of torch); its base has independent dimensions
            and is the same at all times, or is a ``ConvMADE``.  Or such a
            :class:`~pyro_flows.distributions.made.convolutional.ConvMADE` itself, with ``positions=False``, also in the
            units of data by ``fit_density(..., standardize=True)``; its base values are the values themselves.
        batch_shape: the batch shape of the series.
        context: shape ``(*batch, context_dim)``, if the flow takes one; the same at all times.

    Attributes:
        steps: the number of steps taken.

    Raises:
        ValueError: for parts or a base of another kind, named in the message, or a context that does not fit.
        TypeError: for anything but a flow or a ``ConvMADE``.

    Example:
        >>> flow = pf.Flow(pf.causal_maf((1, 20))).eval()
        >>> stream = pf.infer.Stream(flow)
        >>> stream.observe(torch.randn(1, 50)).shape  # log-density of each step
        torch.Size([50])
        >>> stream.forecast(10, num_samples=100).shape
        torch.Size([100, 1, 10])

    References:
        MintNet (Song et al., 2019), arXiv:1907.07945.
        WaveNet (van den Oord et al., 2016), arXiv:1609.03499.
    """

    @torch.no_grad()
    def __init__(self, flow: Series, batch_shape: Iterable[int] = (), context: Tensor | None = None) -> None:
        _check(flow, "Stream")
        self.batch_shape = _batch(batch_shape)
        check_context(flow, context)
        self.flow = flow = copy.deepcopy(flow).eval().requires_grad_(False)
        if context is not None:
            context = refuse_other_kind("Stream", "context", context, flow)
            self._widen("a context", context)
        self._parts: list[tuple[Stepper, bool]] = []  # from base to data, and whether each is inverted
        self._base: _Independent | ModelSteps
        self._codomain: Constraint | None = None
        self._channels = flow.event_shape[0]
        made = _made(flow)
        if made is not None:
            if isinstance(flow, StandardizedDensity):
                own = (each.expand(flow.event_shape) for each in (flow.loc, flow.scale.log()))
                self._parts.append((affine(*(at_any_time("Stream", "standardization", each) for each in own)), False))
                context = None if context is None else (context - flow.context_loc) / flow.context_scale
            self._reach = made.reach
            self._base = made.stepper(self.batch_shape.numel(), by_row(context, self.batch_shape))
        elif is_plain_flow(flow):
            self._codomain, self._reach = flow.chain.codomain, flow.chain.reach
            self._take_apart(flow, flow.inner_context(context))
            base, rows = flow.base, self.batch_shape.numel()
            if isinstance(base, ConvMADE):
                self._reach = None if self._reach is None or base.reach is None else self._reach + base.reach
                self._base = base.stepper(rows)
            else:
                self._base = _Independent(_one_step(flow), rows)
        kin = first_floating(flow)
        self._device = "cpu" if kin is None else kin.device.type
        self.steps, self._torn = 0, False

    def _take_apart(self, flow: Flow, context: Tensor | None) -> None:
        """Finds the steps of a flow's parts."""
        leaves = leaves_of(flow.chain, context)
        for part, own, _ in leaves:
            if own is not None and own is not context:
                self._widen(f"a {type(part).__name__} that is bound to a context", own)
        rows = self.batch_shape.numel()
        for k, (part, own, inverse) in enumerate(leaves):
            try:
                stepper = getattr(part, "stepper", None)
                if stepper is None:
                    raise ValueError(
                        "it is not known to be causal in time with the same parameters at all times; build the flow of "
                        "causal_maf, mintnet(..., causal=True) and elementwise parts"
                    )
                self._parts.append((stepper(rows, by_row(own, self.batch_shape)), inverse))
            except ValueError as error:
                name = f"{type(part).__name__} (part {k} of {len(leaves)})"
                raise ValueError(f"Stream: {name} does not go step by step: {error}") from None

    @torch.no_grad()
    def observe(self, y: Tensor) -> Tensor:
        """Takes the next steps and scores them.

        Args:
            y: one step, shape ``(*batch, C)``, or several, ``(*batch, C, n)``.

        Returns:
            The log-density of each step given all before, in nats, shape ``(*batch,)`` or ``(*batch, n)``.

        Raises:
            ValueError: for another shape, or values outside the support or not finite; the stream does not move.
            TypeError: for anything but a tensor of the flow's dtype.
            RuntimeError: if a solver gives up (``max_sweeps``); the stream is then unusable.

        Example:
            >>> stream = pf.infer.Stream(pf.Flow(pf.causal_maf((2, 20))).eval())
            >>> stream.observe(torch.randn(2)).shape, stream.observe(torch.randn(2, 50)).shape
            (torch.Size([]), torch.Size([50]))
            >>> stream.steps
            51
        """
        value, several = self._admit(y, "y")
        codomain = self._codomain
        known = codomain is not None and value.numel() and not constraints.is_dependent(codomain)
        if not value.isfinite().all() or (codomain is not None and known and not codomain.check(value).all()):
            told = "" if codomain is None else f", {codomain}"
            raise ValueError(
                f"Stream: expected finite values in the support{told}, got others; in the place of a missing step, "
                ".sample() draws one"
            )
        if codomain is None and isinstance(self._base, ModelSteps):
            moved = value
            for part, _ in self._parts:
                moved = part.inverse(moved)[0]
            self._base.check(moved)
        moves = [partial(_one_by_one, part) if inverse else part.inverse for part, inverse in reversed(self._parts)]
        with self._taking(value.shape[-1]):
            x, total = _through(value, moves)
            total = self._base.score(x) + total
        return total.view(*self.batch_shape, total.shape[1]) if several else total.view(self.batch_shape)

    @torch.no_grad()
    def step(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the next step, given its base value.

        Args:
            x: shape ``(*batch, C)``.

        Returns:
            The data value, shape ``(*batch, C)``, and its log-density given all before, shape ``(*batch,)``.

        Raises:
            ValueError, TypeError, RuntimeError: as :meth:`observe`.
        """
        value, several = self._admit(x, "x")
        if several:
            raise ValueError(f"Stream: expected one step of shape {(*self.batch_shape, value.shape[1])}, got several")
        if not value.isfinite().all():
            raise ValueError("Stream: expected finite base values, got some that are not; .sample() draws them")
        with self._taking(1):
            y, total = _through(value, self._forward())
            total = self._base.score(value) - total
        return y.view(*self.batch_shape, self._channels), total.view(self.batch_shape)

    @torch.no_grad()
    def sample(self) -> Tensor:
        """Draws the next step, shape ``(*batch, C)``, and takes it.

        Example:
            >>> flow = pf.Flow(pf.causal_maf((2, 20))).eval()
            >>> stream = pf.infer.Stream(flow, batch_shape=(5,))
            >>> stream.sample().shape
            torch.Size([5, 2])
        """
        self._refuse_torn()
        with self._taking(1):
            y, _ = _through(self._base.draw().unsqueeze(-1), self._forward())
        return y.view(*self.batch_shape, self._channels)

    def forecast(self, steps: int, num_samples: int) -> Tensor:
        """Draws the next steps, shape ``(num_samples, *batch, C, steps)``, without moving this stream.

        The cost is ``steps`` draws of one step, with ``num_samples`` times the rows.

        Raises:
            ValueError: unless both numbers are positive integers.

        Example:
            >>> stream = pf.infer.Stream(pf.Flow(pf.causal_maf((2, 20))).eval())
            >>> past = stream.observe(torch.randn(2, 50))
            >>> draws = stream.forecast(10, num_samples=100)
            >>> draws.quantile(torch.tensor([0.05, 0.5, 0.95]), dim=0).shape
            torch.Size([3, 2, 10])
        """
        integer("Stream", "steps", steps)
        ahead = self._repeated(integer("Stream", "num_samples", num_samples))
        ahead.batch_shape = Size((num_samples, *self.batch_shape))
        return torch.stack([ahead.sample() for _ in range(steps)], -1)

    def copy(self) -> Stream:
        """An independent stream at the same point in time.

        Example:
            >>> stream = pf.infer.Stream(pf.Flow(pf.causal_maf((2, 20))).eval())
            >>> other = stream.copy()
            >>> _ = other.sample()
            >>> stream.steps, other.steps
            (0, 1)
        """
        return self._repeated(1)

    def _repeated(self, times: int) -> Stream:
        made = copy.copy(self)
        made._parts = [(part.repeated(times), inverse) for part, inverse in self._parts]
        made._base = self._base.repeated(times)
        return made

    def _widen(self, what: str, context: Tensor) -> None:
        try:
            self.batch_shape = joint_shape(self.batch_shape, context.shape[:-1])
        except ValueError:
            raise ValueError(
                f"Stream: expected {what} of shape (*batch, context_dim), the same at all times, whose batch "
                f"broadcasts with batch_shape {tuple(self.batch_shape)}, got shape {tuple(context.shape)}"
            ) from None

    def _forward(self) -> list[Move]:
        return [part.inverse if inverse else part.forward for part, inverse in self._parts]

    @contextmanager
    def _taking(self, count: int) -> Iterator[None]:
        """Takes steps in full precision, and marks a stream as torn whose parts took different ones."""
        self._torn = True
        with torch.autocast(self._device, enabled=False):
            yield
        self._torn, self.steps = False, self.steps + count

    def _refuse_torn(self) -> None:
        if self._torn:
            raise RuntimeError(
                "Stream: an error stopped an earlier step halfway, so that parts stand at different times; go on with "
                "a .copy() made before it, or observe all in a new one"
            )

    def _admit(self, value: Tensor, what: str) -> tuple[Tensor, bool]:
        """Rows of shape ``(rows, C, n)``, and whether the value had a time axis."""
        self._refuse_torn()
        if isinstance(self.flow, ConvMADE) and isinstance(value, Tensor) and not value.is_floating_point():
            value = self.flow.cast(value)
        value = refuse_other_kind("Stream", what, value, self.flow)
        one = (*self.batch_shape, self._channels)
        if value.shape == one:
            return value.reshape(self.batch_shape.numel(), one[-1], 1), False
        if value.shape[:-1] != one:
            raise ValueError(
                f"Stream: expected {what} to be one step of shape {one}, (*batch, C), or n steps, {(*one, 'n')}, got "
                f"shape {tuple(value.shape)}"
            )
        return value.reshape(self.batch_shape.numel(), one[-1], value.shape[-1]), True

    def __repr__(self) -> str:
        sees = "" if self._reach is None else f", reach={self._reach}"
        return f"Stream(batch_shape={tuple(self.batch_shape)}, C={self._channels}, steps={self.steps}{sees})"


def _through(value: Tensor, moves: Iterable[Move]) -> tuple[Tensor, Tensor]:
    """The steps moved, with their log-determinants."""
    total = value.new_zeros(len(value), value.shape[-1])
    for move in moves if value.shape[-1] else ():
        value, ladj = move(value)
        total = total + ladj
    return value, total


def _one_by_one(part: Stepper, value: Tensor) -> tuple[Tensor, Tensor]:
    moved, ladjs = zip(*(part.forward(step) for step in value.split(1, -1)), strict=True)
    return torch.cat(moved, -1), torch.cat(ladjs, -1)


def _batch(given: Iterable[int]) -> Size:
    shape = tuple(given) if isinstance(given, Iterable) else (-1,)
    if all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
        return Size(shape)
    raise ValueError(f"Stream: expected batch_shape to be a shape such as () or (5,), got {given!r}")


def _one_step(flow: Flow) -> Distribution:
    """The base at any one time, batch shape ``(C, 1)``."""
    single = single_base(flow.base(), flow, "Stream")
    name = f"Stream: the base, {type(single).__name__}"
    numbers = {
        what: at_any_time(name, what, getattr(single, what).expand(flow.chain.event_shape))
        for what in single.arg_constraints
    }
    build: Callable[..., Distribution] = type(single)
    try:
        return build(**numbers, validate_args=False)
    except TypeError:
        raise ValueError(
            f"{name}, is not known at a single step; take one with parameters of its own, such as Normal or StudentT"
        ) from None


def step_log_prob(
    flow: Series, value: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
) -> Tensor:
    r"""The log-density of each step of whole series given all before, :math:`\log p(y_t \mid y_{<t}, c)`.

    This is minus :func:`~pyro_flows.infer.pixel_scores`, summed over channels, and differentiable.  Over time it adds
    up to ``flow.log_prob(value, context)``.  Padding counts neither in the likelihood nor in the log-determinant.  The
    cost is one pass in the density direction.

    Args:
        flow: a :class:`~pyro_flows.distributions.flow.Flow` of series ``(C, T)`` with causal or elementwise parts; the
            latter may differ between times.  Or a ``ConvMADE`` of series, also in the units of data.
        value: shape ``(*batch, C, T)``; the padding may hold anything, NaN included.
        context: shape ``(*batch, context_dim)``, if the flow takes one.
        lengths: steps of each series, integers from 1 to ``T`` that broadcast to ``batch``; by default ``T``.  A
            series' first value replaces its padding, which a fresh ``ActNorm`` may see in training.

    Returns:
        Shape ``(*batch, T)``, in nats, 0 in the padding.

    Raises:
        ValueError: for a flow that is not causal, values outside the support, or invalid lengths.
        TypeError: for anything but a flow and a tensor of its dtype.

    Example:
        >>> flow = pf.Flow(pf.causal_maf((1, 20)))
        >>> y = torch.randn(5, 1, 20)
        >>> steps = pf.infer.step_log_prob(flow, y)
        >>> torch.allclose(steps.sum(-1), flow.log_prob(y), atol=1e-4)
        True
    """
    _check(flow, "step_log_prob")
    made = _made(flow)
    if made is not None:
        stretched = value.new_zeros(())
        if isinstance(flow, StandardizedDensity):
            stretched = flow.scale.log().expand(flow.event_shape).sum(0)
            value = (value - flow.loc) / flow.scale
            context = None if context is None else (context - flow.context_loc) / flow.context_scale
        law = made(context, lengths=lengths)
        scores = law.step_log_prob(value) - stretched
        return scores if law.inside is None else torch.where(law.inside, scores, 0.0)
    flow, inside = cast(Flow, flow), None
    if lengths is not None:
        value = admit(flow.chain, value, context, data_side=True)
        inside = length_mask("step_log_prob", lengths, value.shape[:-2], value.shape[-1], value.device)
        value = torch.where(inside.unsqueeze(-2), value, value[..., :1])  # numbers that have a density
    scores = -surprise(flow, value, flow.inner_context(context), "step_log_prob", by_time=True).sum(-2)
    return scores if inside is None else torch.where(inside, scores, 0.0)
