"""Exact densities, draws and forecasts of series, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from pyro_flows.core.checks import admit, check_context, integer, joint_shape, refuse_other_kind
from pyro_flows.core.steps import Move, Stepper, at_any_time
from pyro_flows.distributions import Flow
from pyro_flows.distributions.queries.layers import leaves_of
from pyro_flows.infer.density.units import is_plain_flow
from pyro_flows.infer.uses.surprise import single_base, surprise

__all__ = ["Stream", "step_log_prob"]


def _check(flow: Flow, who: str) -> None:
    if not is_plain_flow(flow):
        raise TypeError(
            f"{who}: expected a Flow, e.g. pf.Flow(pf.mintnet((C, T), causal=True)), got {type(flow).__name__}"
        )
    if len(flow.chain.event_shape) != 2 or len(flow.event_shape) != 2:
        raise ValueError(f"{who}: expected a flow of series (C, T), got event shape {tuple(flow.event_shape)}")


class Stream:
    r"""Runs a causal flow over series step by step without end: :math:`p(y_t \mid y_{<t}, c)`.

    The stream keeps the past that the flow needs: each convolution's last inputs, and the keys and values in the window
    of attention.  So every step costs the same, except under attention without a window: in the density direction one
    pass of one step; in the other, a solve of ``C`` numbers for each ``Mint`` layer, and an evaluation a channel for
    each ``CausalAutoregressive`` layer.  Densities equal those of whole series up to rounding, and beyond the flow's
    ``T`` those of a longer flow with the same parameters.  The stream copies the flow, records no gradient, and can be
    pickled.

    Args:
        flow: a :class:`~pyro_flows.distributions.flow.Flow` of series ``(C, T)``.  Its parts are causal in time
            (``mintnet(..., causal=True)``, ``causal_maf``), or elementwise with the same parameters at all times
            (``ActNorm``, ``Rescaling``, ``Standardization``, transforms of torch); its base has independent dimensions
            and is the same at all times.
        batch_shape: the batch shape of the series.
        context: shape ``(*batch, context_dim)``, if the flow takes one; the same at all times.

    Attributes:
        steps: the number of steps taken.

    Raises:
        ValueError: for parts or a base of another kind, named in the message, or a context that does not fit.
        TypeError: for anything but a flow.

    References:
        MintNet (Song et al., 2019), arXiv:1907.07945.
        WaveNet (van den Oord et al., 2016), arXiv:1609.03499.
    """

    @torch.no_grad()
    def __init__(self, flow: Flow, batch_shape: Iterable[int] = (), context: Tensor | None = None) -> None:
        _check(flow, "Stream")
        self.batch_shape = _batch(batch_shape)
        check_context(flow, context)
        self.flow = flow = copy.deepcopy(flow).eval().requires_grad_(False)
        if context is not None:
            context = refuse_other_kind("Stream", "context", context, flow)
            self._widen("a context", context)
        context = flow.inner_context(context)
        leaves = leaves_of(flow.chain, context)
        for part, own, _ in leaves:
            if own is not None and own is not context:
                self._widen(f"a {type(part).__name__} that is bound to a context", own)
        rows = self.batch_shape.numel()
        self._parts: list[tuple[Stepper, bool]] = []  # from base to data, and whether each is inverted
        for k, (part, own, inverse) in enumerate(leaves):
            if own is not None:
                own = own.expand(*self.batch_shape, -1).reshape(rows, own.shape[-1])
            try:
                stepper = getattr(part, "stepper", None)
                if stepper is None:
                    raise ValueError(
                        "it is not known to be causal in time with the same parameters at all times; build the flow of "
                        "causal_maf, mintnet(..., causal=True) and elementwise parts"
                    )
                self._parts.append((stepper(rows, own), inverse))
            except ValueError as error:
                name = f"{type(part).__name__} (part {k} of {len(leaves)})"
                raise ValueError(f"Stream: {name} does not go step by step: {error}") from None
        self._base = _one_step(flow)
        self.steps, self._torn = 0, False

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
        """
        value, several = self._admit(y, "y")
        codomain = self.flow.chain.codomain
        known = value.numel() and not constraints.is_dependent(codomain)
        if not value.isfinite().all() or (known and not codomain.check(value).all()):
            raise ValueError(
                f"Stream: expected finite values in the support, {codomain}, got others; in the place of a missing "
                "step, .sample() draws one"
            )
        moves = [partial(_one_by_one, part) if inverse else part.inverse for part, inverse in reversed(self._parts)]
        _, total = self._moved(value, moves, from_data=True)
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
        moves = [part.inverse if inverse else part.forward for part, inverse in self._parts]
        y, total = self._moved(value, moves, from_data=False)
        return y.view(*self.batch_shape, y.shape[1]), total.view(self.batch_shape)

    def sample(self) -> Tensor:
        """Draws the next step, shape ``(*batch, C)``, and takes it."""
        x = self._base.sample((self.batch_shape.numel(),)).squeeze(-1)
        return self.step(x.view(*self.batch_shape, x.shape[1]))[0]

    def forecast(self, steps: int, num_samples: int) -> Tensor:
        """Draws the next steps, shape ``(num_samples, *batch, C, steps)``, without moving this stream.

        The cost is ``steps`` draws of one step, with ``num_samples`` times the rows.

        Raises:
            ValueError: unless both numbers are positive integers.
        """
        integer("Stream", "steps", steps)
        ahead = self._repeated(integer("Stream", "num_samples", num_samples))
        ahead.batch_shape = Size((num_samples, *self.batch_shape))
        return torch.stack([ahead.sample() for _ in range(steps)], -1)

    def copy(self) -> Stream:
        """An independent stream at the same point in time."""
        return self._repeated(1)

    def _repeated(self, times: int) -> Stream:
        made = copy.copy(self)
        made._parts = [(part.repeated(times), inverse) for part, inverse in self._parts]
        return made

    def _widen(self, what: str, context: Tensor) -> None:
        try:
            self.batch_shape = joint_shape(self.batch_shape, context.shape[:-1])
        except ValueError:
            raise ValueError(
                f"Stream: expected {what} of shape (*batch, context_dim), the same at all times, whose batch "
                f"broadcasts with batch_shape {tuple(self.batch_shape)}, got shape {tuple(context.shape)}"
            ) from None

    def _moved(self, value: Tensor, moves: Iterable[Move], from_data: bool) -> tuple[Tensor, Tensor]:
        """Takes steps in full precision, and marks a stream as torn whose parts took different ones.

        Returns the values on the other side, and the log-densities of the steps.
        """
        self._torn = True
        start, total = value, value.new_zeros(len(value), value.shape[-1])
        with torch.autocast(value.device.type, enabled=False):
            for move in moves if value.shape[-1] else ():
                value, ladj = move(value)
                total = total + ladj
        base = self._base.log_prob(value if from_data else start).sum(-2)
        self._torn, self.steps = False, self.steps + value.shape[-1]
        return value, base + total if from_data else base - total

    def _admit(self, value: Tensor, what: str) -> tuple[Tensor, bool]:
        """Rows of shape ``(rows, C, n)``, and whether the value had a time axis."""
        if self._torn:
            raise RuntimeError(
                "Stream: an error stopped an earlier step halfway, so that parts stand at different times; go on with "
                "a .copy() made before it, or observe all in a new one"
            )
        value = refuse_other_kind("Stream", what, value, self.flow)
        one = (*self.batch_shape, self.flow.chain.event_shape[0])
        if value.shape == one:
            return value.reshape(self.batch_shape.numel(), one[-1], 1), False
        if value.shape[:-1] != one:
            raise ValueError(
                f"Stream: expected {what} to be one step of shape {one}, (*batch, C), or n steps, {(*one, 'n')}, got "
                f"shape {tuple(value.shape)}"
            )
        return value.reshape(self.batch_shape.numel(), one[-1], value.shape[-1]), True

    def __repr__(self) -> str:
        reach = self.flow.chain.reach
        sees = "" if reach is None else f", reach={reach}"
        return f"Stream(batch_shape={tuple(self.batch_shape)}, C={self.flow.event_shape[0]}, steps={self.steps}{sees})"


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


def step_log_prob(flow: Flow, value: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
    r"""The log-density of each step of whole series given all before, :math:`\log p(y_t \mid y_{<t}, c)`.

    This is minus :func:`~pyro_flows.infer.pixel_scores`, summed over channels, and differentiable.  Over time it adds
    up to ``flow.log_prob(value, context)``.  Padding counts neither in the likelihood nor in the log-determinant.  The
    cost is one pass in the density direction.

    Args:
        flow: a :class:`~pyro_flows.distributions.flow.Flow` of series ``(C, T)`` with causal or elementwise parts; the
            latter may differ between times.
        value: shape ``(*batch, C, T)``; the padding may hold anything, NaN included.
        context: shape ``(*batch, context_dim)``, if the flow takes one.
        lengths: steps of each series, integers from 1 to ``T`` that broadcast to ``batch``; by default ``T``.  A
            series' first value replaces its padding, which a fresh ``ActNorm`` may see in training.

    Returns:
        Shape ``(*batch, T)``, in nats, 0 in the padding.

    Raises:
        ValueError: for a flow that is not causal, values outside the support, or invalid lengths.
        TypeError: for anything but a flow and a tensor of its dtype.
    """
    _check(flow, "step_log_prob")
    inside: Tensor | None = None
    if lengths is not None:
        value = admit(flow.chain, value, context, data_side=True)
        inside = _inside(lengths, value)
        value = torch.where(inside.unsqueeze(-2), value, value[..., :1])  # numbers that have a density
    scores = -surprise(flow, value, flow.inner_context(context), "step_log_prob", by_time=True).sum(-2)
    return scores if inside is None else torch.where(inside, scores, 0.0)


def _inside(lengths: Tensor | Iterable[int], value: Tensor) -> Tensor:
    """Whether each step is within its series' length."""
    lengths, times, batch = torch.as_tensor(lengths, device=value.device), value.shape[-1], value.shape[:-2]
    whole = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
    if not whole or (lengths.numel() and not ((lengths > 0) & (lengths <= times)).all()):
        raise ValueError(f"step_log_prob: expected lengths to be integers from 1 to {times}, got {lengths}")
    try:
        lengths = lengths.expand(batch)
    except RuntimeError:
        raise ValueError(
            f"step_log_prob: expected lengths that broadcast to the batch {tuple(batch)}, one for each series, got "
            f"shape {tuple(lengths.shape)}"
        ) from None
    return torch.arange(times, device=value.device) < lengths.unsqueeze(-1)
