"""Evaluates a model's joint density at many packed unconstrained latents."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_flows.infer.machine.pace import Footprint, Pace
from pyro_flows.infer.models.broadcasting import explain, warn_once
from pyro_flows.infer.models.enumeration import enumerating, marginal_log_prob
from pyro_flows.infer.models.latents import Latents
from pyro_flows.infer.models.recorded import FAILURES, Recorded, seeded_alike, value_and_slope
from pyro_flows.infer.models.sites import (
    COMPUTED,
    DATA,
    FACTOR,
    Model,
    Site,
    counts,
    is_masked,
    per_draw,
    run,
    sites_of,
)

__all__ = ["FAILURES", "JointDensity"]

HIDDEN_PLATES = 2  # plates that poutine.block may hide, left of those that the guide knows
RUNS = 6  # of a model that draws random numbers
MOVES = 3  # points at which to look for effects of masked entries


class JointDensity:
    r"""The unnormalized log-density of a model's latents in unconstrained space.

    :math:`\log p(z) = \log p(\text{data}, \theta(z)) + \log|\partial \theta / \partial z|`, in nats, differentiable;
    ``(S, dim)`` gives ``(S,)``. One run of the model is recorded and replayed for all ``S`` points, after comparisons
    with plain runs. Otherwise, as where Python's numbers or branches depend on latents, a model that broadcasts, as a
    comparison shows, runs once for all ``S``, in a dimension left of its plates; the rest runs one point at a time,
    with a warning. Points that share a run share the random numbers that the model draws, e.g. a minibatch. Scales,
    masks and subsampling count as in an ELBO, except that masked entries of a latent that nothing depends on, such as
    a series' padding, keep their own density. Otherwise there would be no posterior.

    Args:
        model: a Pyro model with the given latents.
        latents: the layout of the latents.
        args, kwargs: the model's arguments.
        vectorize: whether the model broadcasts; ``None`` finds out.
        discrete: the names of latents to sum out.
        ignored: the names of sites to leave out.
        quiet: whether to report in ``why_not`` only, without a warning.

    Example:
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(2.0))
        >>> trace = pyro.poutine.trace(model).get_trace()
        >>> latents = pf.infer.models.latents.Latents.of(trace)
        >>> pf.infer.models.joint.JointDensity(model, latents)(torch.zeros(5, 1)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: Model,
        latents: Latents,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
        vectorize: bool | None = None,
        discrete: Collection[str] = (),
        ignored: Collection[str] = (),
        quiet: bool = False,
    ) -> None:
        self.model, self.latents, self.args, self.kwargs = model, latents, args, dict(kwargs or {})
        self.discrete, self.ignored = frozenset(discrete), frozenset(ignored)
        self._names = frozenset(site.name for site in latents)
        self._own: dict[str, Tensor] | None = None
        self.quiet = quiet
        self.evaluations = 0
        self.vectorized = True if vectorize is None else vectorize
        self.recorded = Recorded(self._alone)
        self.why_not: str | None = None
        self.pace = Pace()
        self._tested = vectorize is not None

    def __call__(self, z: Tensor) -> Tensor:
        """Returns log-densities ``(S,)`` of points ``(S, dim)``."""
        self._prepare(z)
        if not len(z):
            return z.new_zeros(0)
        if z.requires_grad and torch.is_grad_enabled():
            found = None if self.vectorized else self.recorded(z)
            return self._plain(z) if found is None else _Known.apply(z, *found, self._plain)
        found = self.recorded(z, slope=False) if len(z) > 1 else None
        return self._plain(z) if found is None else found[0]

    def value_and_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log-densities ``(S,)`` and gradients ``(S, dim)`` at points ``(S, dim)``, without autograd's graph.

        Where the model's validation or decompositions of matrices refuse a point, its value may be NaN.
        """
        self._prepare(z)
        found = self.recorded(z) if len(z) else None
        return value_and_slope(self._plain, z) if found is None else found

    def _prepare(self, z: Tensor) -> None:
        if z.dim() != 2 or z.shape[1] != self.latents.dim:
            raise ValueError(f"expected unconstrained latents of shape (S, {self.latents.dim}), got {tuple(z.shape)}")
        if len(z) and not self._tested:
            self._test(z)
        self.evaluations += len(z)

    def _plain(self, z: Tensor) -> Tensor:
        """Runs the model, once for all points or point by point."""
        if not self.vectorized:
            return torch.stack([self._alone(row) for row in z])
        try:
            return self._together(z)
        except ValueError:  # parameters break constraints
            value = self._where_defined(z)
            if value is None:
                raise
            return value

    @property
    def many_at_once(self) -> bool:
        """Whether one run serves many points, as far as known."""
        return self.vectorized or (self.recorded.why_not is None and self.recorded.batches is not False)

    @torch.no_grad()
    def random_at(self, row: Tensor) -> bool:
        """Whether the density at or near a point, shape ``(dim,)``, changes between runs."""
        # Where a mixture's components are equal, hidden labels make no difference.
        for point in (row, row + 0.1 * torch.arange(1, len(row) + 1).to(row).cos()):
            try:
                before = _random_state(row)
                first = self._alone(point)
                # A second run reveals a generator of the model's own.
                drawn = before != _random_state(row)
                for _ in range(RUNS if drawn else 1):
                    if (self._alone(point) - first).abs() > 1e-6 + 1e-6 * first.abs():
                        return True
                if not drawn:
                    return False
            except FAILURES:
                continue
        return False

    @torch.enable_grad()
    def is_observed(self, row: Tensor, by_way: bool) -> bool:
        """Whether there is a factor, or a datum at ``row`` that depends on a latent, perhaps through a discrete one.

        With ``by_way`` any datum counts, because the model draws an intermediate site that is not summed out.
        """
        nesting, before = self.latents.max_plate_nesting, None
        for move in range(MOVES):
            values, _ = self.latents.unpack(_moved(row, move).requires_grad_())
            try:
                sites = self.enumerated_at(values, nesting)[1] if self.discrete else self.sites_at(values)
                if any(site.kind == FACTOR for site in sites.values()):
                    return True
                data = [site.log_prob() for site in sites.values() if site.kind == DATA and counts(site)]
                found = data + [site.log_prob() for site in sites.values() if site.kind == COMPUTED]
            except FAILURES:  # the density is undefined here
                return True
            if any(by_way or value.dim() > nesting for value in data) or any(value.requires_grad for value in found):
                return True
            # A value that lost its gradient, as by item(), still differs at another point.
            if before is not None and not all(map(torch.equal, found, before)):
                return True
            before = found
        return False

    def still(self) -> Callable[[Tensor], Tensor]:
        """Returns the density at one fixed draw of, for example, a minibatch."""
        return StillDensity(self)

    def sites(self, row: Tensor) -> dict[str, Tensor]:
        """Returns each site's log-density at a point, shape ``(dim,)``; NaN for values outside the support."""
        values, _ = self.latents.unpack(row)
        with pyro.validation_enabled(False):  # validation would stop at the first site
            sites = self.sites_at(values)
            found = {name: site.log_prob().sum() for name, site in sites.items()}
        for name, site in sites.items():
            if not site.fn.support.check(site.value).all():
                found[name] = found[name] * math.nan
        return found

    def sites_at(self, values: Mapping[str, Tensor], model: Model | None = None) -> dict[str, Site]:
        """Runs the model, or another form of it, at given latents, and returns the sites."""
        return self._sites_of(run(model or self.model, self.args, self.kwargs, values))

    def enumerated_at(self, values: Mapping[str, Tensor], nesting: int) -> tuple[Trace, dict[str, Site]]:
        """Runs the model with all values of its discrete latents, left of ``nesting`` dimensions."""
        trace = run(enumerating(self.model, self.discrete, -1 - nesting), self.args, self.kwargs, values)
        return trace, self._sites_of(trace)

    def _sites_of(self, trace: Trace) -> dict[str, Site]:
        found = sites_of(trace, self._names, self._own)
        return {name: site for name, site in found.items() if name not in self.ignored}

    def _alone(self, row: Tensor) -> Tensor:
        if self._own is None:
            self._own = seeded_alike(self._unneeded, row)
        values, total = self.latents.unpack(row)
        return (total + self._conditional(values)).to(row.dtype)

    def _conditional(self, values: Mapping[str, Tensor]) -> Tensor:
        nesting = self.latents.max_plate_nesting
        if self.discrete:
            return marginal_log_prob(*self.enumerated_at(values, nesting), None, nesting)
        return sum((site.log_prob().sum() for site in self.sites_at(values).values()), torch.zeros(()))

    def _together(self, z: Tensor) -> Tensor:
        if self._own is None:
            self._own = seeded_alike(self._unneeded, z[0])
        count, nesting = z.shape[0], self.latents.max_plate_nesting
        # No plate here, because a caller's plate may use this dimension.
        values, total = self.latents.unpack(z, nesting)
        if self.discrete:
            return total + marginal_log_prob(*self.enumerated_at(values, nesting + 1), count, nesting)
        for name, site in self.sites_at(values).items():
            total = total + per_draw(name, site.log_prob(), count, nesting)
        return total

    @torch.enable_grad()
    def _unneeded(self, row: Tensor) -> dict[str, Tensor]:
        """Finds masked entries of latents that nothing depends on, in batch shape."""
        self._own = {}  # for the runs below
        sites = self.sites_at(self.latents.unpack(row.detach())[0])
        masked = [latent for latent in self.latents if is_masked(sites[latent.name])]
        found: dict[str, Tensor] = {}
        for move in range(MOVES if masked else 0):
            point = _moved(row, move)
            values = {name: value.requires_grad_() for name, value in self.latents.unpack(point)[0].items()}
            asked = [values[latent.name] for latent in masked]
            try:
                total = self._conditional(values) + sum((0.0 * value.sum() for value in asked), torch.zeros(()))
                slopes = torch.autograd.grad(total, asked)
            except FAILURES:
                continue
            for latent, slope in zip(masked, slopes, strict=True):
                still = (slope == 0).reshape(*latent.batch_shape, -1).all(-1)
                found[latent.name] = found.get(latent.name, still) & still
        return {name: still for name, still in found.items() if still.any()}

    def _where_defined(self, z: Tensor) -> Tensor | None:
        """Puts NaN at rows where the model raises; ``None`` if they cannot be told apart."""
        try:
            with pyro.validation_enabled(False), torch.no_grad():
                fine = self._together(z).isfinite()
        except FAILURES:
            return None
        if fine.all() or not fine.any():
            return None
        rows = fine.nonzero().squeeze(-1)
        # Validation may refuse rows that are finite without it.
        return z.new_full((len(z),), math.nan).index_put((rows,), self._together(z[rows]).to(z.dtype))

    @torch.no_grad()
    def _test(self, z: Tensor) -> None:
        """Compares the vectorized density with single runs at two points."""
        rows = torch.stack((z[0], z[-1] + 0.1))
        try:
            with Footprint() as alone_footprint:
                alone = torch.stack([self._timed(1, self._alone, row) for row in rows])
        except FAILURES:
            return  # nothing to compare: the next call retries
        if not alone.isfinite().all():
            return
        self._tested = True
        declared = self.latents.max_plate_nesting
        errors: list[Exception | None] = []
        for extra in range(HIDDEN_PLATES + 1):
            self.latents.max_plate_nesting = declared + extra
            try:
                with Footprint() as footprint:
                    together = self._timed(len(rows), self._together, rows)
                self.pace.bytes_per_draw = footprint.bytes / len(rows)
                if ((together - alone).abs() <= 1e-3 + 1e-4 * alone.abs()).all():
                    return
                errors.append(None)
            except Exception as error:  # models raise anything at an extra dimension
                errors.append(error)
        self.latents.max_plate_nesting = declared
        self.vectorized = False
        self.pace.bytes_per_draw = alone_footprint.bytes / len(rows)
        self.recorded(rows)
        how = "torch.vmap runs them" if self.many_at_once else "they go one at a time, which is slower"
        self.why_not = (
            f"this model does not broadcast over a plate of draws, so {how}: "
            + explain(self.model, self.latents, self.args, self.kwargs, rows, errors[0], self.discrete)
            + "\n  Values must broadcast over dimensions left of the plates "
            "(https://pyro.ai/examples/tensor_shapes.html)"
        )
        if not self.quiet:
            warn_once(self.model, self.why_not, stacklevel=3)

    def _timed(self, rows: int, fn: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        with self.pace.call(rows):
            return seeded_alike(fn, z)


class _Known(torch.autograd.Function):
    """Gives values their known gradients; second derivatives run the model."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, value: Tensor, slope: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(z, slope)
        ctx.plain = plain
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, slope = ctx.saved_tensors
        if torch.is_grad_enabled():
            (slope,) = torch.autograd.grad(ctx.plain(z).sum(), z, create_graph=True)
        return grad.unsqueeze(-1) * slope, None, None, None


class StillDensity:
    """A density with the model's other draws fixed."""

    def __init__(self, density: JointDensity) -> None:
        self.density, self.pace = density, density.pace

    def __call__(self, z: Tensor) -> Tensor:
        """Returns log-densities ``(S,)`` of points ``(S, dim)``."""
        return seeded_alike(self.density, z)

    def value_and_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log-densities ``(S,)`` and gradients ``(S, dim)``."""
        return seeded_alike(self.density.value_and_slope, z)


def _moved(row: Tensor, move: int) -> Tensor:
    return row.detach() + 0.5 * move * torch.arange(1, len(row) + 1).to(row).cos()


def _random_state(like: Tensor) -> tuple[object, ...]:
    own = torch.cuda.get_rng_state(like.device) if like.is_cuda else torch.get_rng_state()
    legacy: Any = np.random.get_state()
    kind, keys, *rest = legacy
    return own.tolist(), kind, keys.tolist(), rest, random.getstate()
