"""A model's joint density as a function of its packed unconstrained latents, many at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_flows.infer.broadcasting import explain, warn_once
from pyro_flows.infer.latents import Latents, sum_beyond
from pyro_flows.infer.pace import Footprint, Pace

__all__ = ["JointDensity"]

# How many plates may be hidden from the guide, by poutine.block, left of those that it knows.
HIDDEN_PLATES = 2
# How often to run a model that draws random numbers to see whether they matter.
RUNS = 6
# What a model may raise at a point where its density is not defined.
FAILURES = (ValueError, RuntimeError, ArithmeticError)


class JointDensity:
    r"""The unnormalised log-density of a model's latents in unconstrained space.

    :math:`\log p(z) = \log p(\text{data}, \theta(z)) + \log|\partial \theta / \partial z|`, in nats, differentiable;
    ``(S, dim)`` gives ``(S,)``.  The model runs once for all ``S``, in a dimension left of its plates, if it
    broadcasts: that is tried against one run at a time, and where the two disagree the density falls back on the latter
    and says so.  Scales, masks and subsampling count as in an ELBO.

    Args:
        model: any Pyro model with the latents given.
        latents: their layout.
        args, kwargs: the model's arguments.
        vectorize: whether to run it once for all; ``None`` to find out.
    """

    def __init__(
        self,
        model: object,
        latents: Latents,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
        vectorize: bool | None = None,
    ) -> None:
        self.model, self.latents, self.args, self.kwargs = model, latents, args, dict(kwargs or {})
        self.evaluations = 0
        self.vectorized = True if vectorize is None else vectorize
        self.why_not: str | None = None
        self.pace = Pace()
        self._tested = vectorize is not None

    def __call__(self, z: Tensor) -> Tensor:
        """``z``: shape ``(S, dim)``; returns ``(S,)``."""
        if z.dim() != 2 or z.shape[1] != self.latents.dim:
            raise ValueError(f"expected unconstrained latents of shape (S, {self.latents.dim}), got {tuple(z.shape)}")
        if not len(z):
            return z.new_zeros(0)
        if not self._tested:
            self._test(z)
        self.evaluations += z.shape[0]
        if self.vectorized:
            try:
                return self._together(z)
            except ValueError:  # a distribution's, of parameters that break its constraints
                value = self._where_defined(z)
                if value is None:
                    raise
                return value
        return torch.stack([self._alone(row) for row in z])

    @torch.no_grad()
    def random_at(self, row: Tensor) -> bool:
        """Whether runs at one point, shape ``(dim,)``, or near it, differ: the model draws more than its latents."""
        # Near it too: where all components of a mixture are the same, their hidden labels make no difference.
        for point in (row, row + 0.1 * torch.arange(1, len(row) + 1).to(row).cos()):
            try:
                before = _random_state(row)
                first = self._alone(point)
                if torch.equal(before, _random_state(row)):
                    return False  # no random number was drawn
                for _ in range(RUNS):
                    if (self._alone(point) - first).abs() > 1e-6 + 1e-6 * first.abs():
                        return True
            except FAILURES:
                continue
        return False

    def still(self) -> Callable[[Tensor], Tensor]:
        """The density at one fixed draw of whatever the model draws beside its latents, such as a minibatch."""
        return lambda z: self._seeded(self, z)

    def sites(self, row: Tensor) -> dict[str, Tensor]:
        """The log-density of each site at one point, shape ``(dim,)``: where a NaN comes from.

        NaN as well for values outside of their support, whatever the distribution says of them.
        """
        values, _ = self.latents.unpack(row)
        with pyro.validation_enabled(False):  # it would stop at the first one
            scored = _scored(self._trace(values))
            found = {name: _site_log_prob(site).sum() for name, site in scored}
        for name, site in scored:
            if not site["fn"].support.check(site["value"]).all():
                found[name] = found[name] * math.nan
        return found

    def _trace(self, values: dict[str, Tensor]) -> object:
        with poutine.block():
            return poutine.trace(poutine.condition(self.model, data=values)).get_trace(*self.args, **self.kwargs)

    def _alone(self, row: Tensor) -> Tensor:
        values, total = self.latents.unpack(row)
        for _, site in _scored(self._trace(values)):
            total = total + _site_log_prob(site).sum()
        return total

    def _together(self, z: Tensor) -> Tensor:
        count, nesting = z.shape[0], self.latents.max_plate_nesting
        values, total = self.latents.unpack(z, nesting)
        # No plate around the model: one of a caller, such as an ELBO's for its particles, may have this dimension.
        trace = self._trace(values)
        for name, site in _scored(trace):
            each = _site_log_prob(site)
            if each.dim() > nesting:
                if each.dim() != nesting + 1 or each.shape[0] not in (1, count):
                    raise ValueError(
                        f"site {name!r} has log-densities of shape {tuple(each.shape)} for {count} draws and "
                        f"{nesting} plate dimensions"
                    )
                total = total + sum_beyond(each, 1)
            else:  # the same for all draws
                total = total + each.sum()
        return total

    def _where_defined(self, z: Tensor) -> Tensor | None:
        """With NaN at the rows that made it raise; ``None`` if there are none that can be told from the others."""
        try:
            with pyro.validation_enabled(False), torch.no_grad():
                fine = self._together(z).isfinite()
        except FAILURES:
            return None
        if fine.all() or not fine.any():
            return None
        rows = fine.nonzero().squeeze(-1)
        # What validation refused may be finite without it: these rows are held against it once more.
        return z.new_full((len(z),), math.nan).index_put((rows,), self._together(z[rows]).to(z.dtype))

    @torch.no_grad()
    def _test(self, z: Tensor) -> None:
        """Holds the vectorised density against one run at a time, at two points that differ."""
        rows = torch.stack((z[0], z[-1] + 0.1))
        try:
            with Footprint() as alone_footprint:
                alone = torch.stack([self._timed(1, self._alone, row) for row in rows])
        except FAILURES:
            return  # there is nothing to compare with here: the next call tries again
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
            except Exception as error:  # whatever a model says when its tensors get a dimension more
                errors.append(error)
        self.latents.max_plate_nesting = declared
        self.vectorized, self.pace.bytes_per_draw = False, alone_footprint.bytes / len(rows)
        self.why_not = (
            "this model does not broadcast over a plate of draws, so they go one at a time, which is slower: "
            + explain(self.model, self.latents, self.args, self.kwargs, rows, errors[0])
            + "\n  Values must broadcast over dimensions left of the plates "
            "(https://pyro.ai/examples/tensor_shapes.html)"
        )
        warn_once(self.model, self.why_not, stacklevel=3)

    def _timed(self, rows: int, fn: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        with self.pace.call(rows):
            return self._seeded(fn, z)

    @staticmethod
    def _seeded(fn: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """With the same random numbers each time, so that minibatches of the model are the same."""
        with torch.random.fork_rng(devices=[z.device] if z.is_cuda else []):
            torch.manual_seed(0)
            return fn(z)


def _random_state(like: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(like.device) if like.is_cuda else torch.get_rng_state()


def _scored(trace: object) -> list[tuple[str, dict[str, object]]]:
    return [(n, s) for n, s in trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)]


def _site_log_prob(site: dict[str, object]) -> Tensor:
    value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(value, site["scale"], site["mask"])
