"""``Ensemble``: several densities as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_flows.core.checks import check_context, check_tensor, refuse_as_site, sample_size, without_leading_ones
from pyro_flows.core.recipes import remembered
from pyro_flows.distributions.flow import Flow
from pyro_flows.distributions.queries.answers import Answering, Weighted
from pyro_flows.distributions.queries.line import Line
from pyro_flows.distributions.shared import SharedDistribution, by_row

__all__ = ["Ensemble", "EnsembleDistribution"]


class EnsembleDistribution(SharedDistribution):
    """The mean density of the members of an :class:`Ensemble`, whose parameters it shares.

    Example:
        >>> model = pf.distributions.Ensemble([pf.Flow(pf.maf(3)), pf.Flow(pf.nsf(3))])
        >>> with pyro.plate("rows", 5):
        ...     x = pyro.sample("x", model())
        >>> x.shape
        torch.Size([5, 3])
    """

    model: Ensemble

    def _admit(self, value: Tensor) -> Tensor:
        check_tensor("Ensemble", "a tensor", value)
        if self._validate_args:
            self._validate_sample(value)
        return value

    def _pieces(self, dims: Sequence[int]) -> Weighted:
        given = () if self.context is None else (self.context,)
        found: Weighted = []
        for k, member in enumerate(self.model.members):
            try:
                each: Any = member(*given)
            except NotImplementedError:  # a module without a call
                each = None
            if not isinstance(each, Answering):
                raise NotImplementedError(
                    f"Ensemble: expected members whose calls give distributions with marginals, but member {k} is a "
                    f"{type(member).__name__}; make the ensemble of flows and MADEs"
                )
            made: Any = each
            made = made if made.batch_shape == self.batch_shape else made.expand(self.batch_shape)
            found += [(log_weight - math.log(len(self.model)), piece) for log_weight, piece in made._pieces(dims)]
        return found

    def _lines(self) -> list[Line]:
        given = () if self.context is None else (self.context,)
        members: Iterable[Any] = self.model.members
        found: list[list[Line]] = []
        for member in members:
            each = member(*given) if isinstance(member, Flow) else None
            if each is None:
                return super()._lines()
            found.append(each._lines())
        return [line for lines in found for line in lines]

    def _scores(self, value: Tensor) -> Sequence[Tensor]:
        return self.model.scores(value, self.context)

    def _draw(self, sample_shape: Size) -> Tensor:
        shape = sample_shape + self.batch_shape
        return self.model.rows(shape.numel(), by_row(self.context, shape)).reshape(shape + self.event_shape)


@remembered
class Ensemble(nn.Module):
    r"""The mean density of several, :math:`p(x \mid c) = \frac1K \sum_k p_k(x \mid c)`.

    Averaging the densities of several fits is never worse than their mean score, by Jensen's inequality, and where rows
    are few it is worth several nats a row.  A score costs one of each member; a draw comes from one of them, chosen at
    random, and has no gradient.  The members' parameters are the ensemble's.

    Args:
        members: modules with ``log_prob`` and ``sample``, of one event shape and context: flows, MADEs, ensembles; or
            results of :func:`~pyro_flows.infer.fit_density`, whose distributions are taken.

    Attributes:
        members: the modules.
        event_shape: the shape of one draw.
        context_dim: the size of the context, 0 for none.
        support: the first member's.

    Raises:
        ValueError: if there are no members, or they differ in event or context.
        TypeError: if one is no module with ``log_prob`` and ``sample``.

    Example:
        >>> data = torch.randn(64, 2)
        >>> fits = [pf.fit_density(pf.nsf(2), data, seed=k, steps=2) for k in range(3)]
        >>> density = pf.distributions.Ensemble(fits)
        >>> density.log_prob(density.sample((5,))).shape
        torch.Size([5])

    References:
        Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles (Lakshminarayanan et al., 2017),
        arXiv:1612.01474.
    """

    def __init__(self, members: Iterable[Any]) -> None:
        super().__init__()
        found = [getattr(each, "distribution", each) for each in members]
        for each in found:
            if not (isinstance(each, nn.Module) and hasattr(each, "log_prob") and hasattr(each, "sample")):
                raise TypeError(
                    f"Ensemble: expected modules with log_prob and sample, or results of fit_density, got a "
                    f"{type(each).__name__}"
                )
        if not found:
            raise ValueError("Ensemble: expected at least one member, got none")
        for each in found:
            if getattr(each, "event_shape", None) is None:
                raise TypeError(
                    f"Ensemble: expected modules with an event_shape, got a {type(each).__name__} without one; set "
                    "it in its constructor, e.g. self.event_shape = torch.Size([3])"
                )
        kinds = {(Size(each.event_shape), int(getattr(each, "context_dim", 0) or 0)) for each in found}
        if len(kinds) > 1:
            told = ", ".join(f"{tuple(event)} and {dim}" for event, dim in sorted(kinds))
            raise ValueError(f"Ensemble: expected members of one event shape and context_dim, got {told}")
        self.members = nn.ModuleList(found)
        ((self.event_shape, self.context_dim),) = kinds

    def arguments(self) -> tuple[tuple[object, ...], dict[str, object]]:
        """The constructor's arguments."""
        return (list(self.members),), {}

    def __len__(self) -> int:
        """The number of members."""
        return len(self.members)

    @property
    def support(self) -> Constraint:
        """The support of one event."""
        first: Any = self.members[0]
        known = first.chain.codomain if isinstance(first, Flow) else getattr(first, "support", None)
        return constraints.independent(constraints.real, len(self.event_shape)) if known is None else known

    def forward(self, context: Tensor | None = None) -> EnsembleDistribution:
        """The distribution, at a context of shape ``(*batch, context_dim)`` if members take one."""
        refuse_as_site(self)
        check_context(self, context)
        return EnsembleDistribution(self, context, tuple(range(len(self))))

    condition = forward

    def log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats, of the shape to which value and context broadcast."""
        check_context(self, context)
        return torch.logsumexp(torch.stack([*self.scores(value, context)]), 0) - math.log(len(self))

    def scores(self, value: Tensor, context: Tensor | None = None) -> list[Tensor]:
        """The log-density of each member."""
        given = () if context is None else (context,)
        members: Iterable[Any] = self.members
        return [each.log_prob(value, *given) for each in members]

    def sample(self, sample_shape: int | Size | tuple[int, ...] = (), context: Tensor | None = None) -> Tensor:
        """Draws without gradient, shape ``(*sample_shape, *context_batch, *event_shape)``."""
        check_context(self, context)
        return self(None if context is None else without_leading_ones(context)).sample(sample_size(sample_shape))

    def rows(self, count: int, context: Tensor | None) -> Tensor:
        """Draws ``count`` times, each from a member chosen at random, at a context ``(count, context_dim)`` if any."""
        chosen = torch.randint(len(self), (count,), device="cpu")
        order, drawn = [], []
        for k, member in enumerate(self.members):
            sample: Callable[..., Tensor] = member.sample  # type: ignore[assignment]  # a module's attribute
            places = (chosen == k).nonzero()[:, 0]
            order.append(places)
            found = sample((len(places),)) if context is None else sample((), context[places])
            drawn.append(found.reshape(len(places), *self.event_shape))  # flows drop leading dimensions of size 1
        return torch.cat(drawn)[torch.cat(order).argsort()]
