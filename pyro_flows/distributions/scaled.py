"""A distribution in other units, which answers what the one inside answers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Size, Tensor

from pyro_flows.core.checks import check_tensor
from pyro_flows.distributions.queries.answers import Answering, Weighted
from pyro_flows.distributions.queries.piece import Piece, places_of
from pyro_flows.distributions.shared import SharedDistribution

__all__ = ["ScaledDistribution"]


class _ScaledPiece(Piece):
    """A piece whose events are stretched and moved, number by number; inner coordinates stay."""

    def __init__(self, inner: Piece, loc: Tensor, scale: Tensor) -> None:
        self.inner, self.loc, self.scale = inner, loc, scale
        self.size, self.batch_shape, self.reference = inner.size, inner.batch_shape, inner.reference
        self.discrete, self.on_line = inner.discrete, inner.on_line

    def closed(self, some: Tensor) -> Tensor:
        return self.inner.closed(some)

    def score(self, z: Tensor, closed: Tensor) -> Tensor:
        return self.inner.score(z, closed)

    def propose(self, z: Tensor, some: Tensor, closed: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
        return self.inner.propose(z, some, closed, num_samples)

    def prepare(self) -> None:
        self.inner.prepare()

    def complete(self, z: Tensor, closed: Tensor) -> Tensor:
        return self.inner.complete(z, closed)

    def states(self, some: Tensor) -> Tensor | None:
        return self.inner.states(some)

    def to_inner(self, y: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
        z, slopes = self.inner.to_inner((y - self.loc) / self.scale, some)
        return z, slopes - self.scale.index_select(0, places_of(some, y)).log().sum()

    def to_outer(self, z: Tensor) -> Tensor:
        return self.inner.to_outer(z) * self.scale + self.loc


class ScaledDistribution(SharedDistribution):
    r"""What a module's distribution becomes in other units, :math:`y = t + \sigma x`; it shares the parameters.

    Args:
        model: the module in these units, with ``loc``, ``scale`` and the log of all stretching; ``within(context)``
            makes the distribution inside, or returns ``None`` for a module that only scores and draws.
        context: shape ``(*batch, context_dim)``, or ``None``.

    Example:
        >>> made = pf.MADE(2, "normal")
        >>> fit = pf.fit_density(made, 100 + torch.randn(200, 2), standardize=True, steps=2)
        >>> fit.distribution().marginal(0).exact
        True
    """

    def __init__(self, model: Any, context: Tensor | None = None) -> None:
        super().__init__(model, context)
        self.inner: Any = model.within(self.context)
        self._known = isinstance(self.inner, Answering)

    def expand(
        self, batch_shape: Size | Iterable[int], _instance: SharedDistribution | None = None
    ) -> ScaledDistribution:
        made: Any = super().expand(batch_shape, _instance)
        made.inner = self.inner.expand(made.batch_shape) if self._known else None
        return made

    def _admit(self, value: Tensor) -> Tensor:
        check_tensor(type(self.model).__name__, "a tensor", value)
        if self._validate_args and value.numel():
            self._validate_sample(value)
        return value

    def _scores(self, value: Tensor) -> Sequence[Tensor]:
        if not self._known:
            return [self.model.log_prob(value, *(() if self.context is None else (self.context,)))]
        return [self.inner.log_prob((value - self.model.loc) / self.model.scale) - self.model.stretched()]

    def _draw(self, sample_shape: Size) -> Tensor:
        if self._known:
            return self.inner.sample(sample_shape) * self.model.scale + self.model.loc
        if self.context is None:
            return self.model.sample(sample_shape + self.batch_shape)
        return self.model.sample(sample_shape, self.context).reshape(sample_shape + self.batch_shape + self.event_shape)

    def _beginning_with(self, dims: Sequence[int]) -> ScaledDistribution:
        if not self._known:
            return self
        made = copy.copy(self)
        made.inner = self.inner._beginning_with(dims)
        return made

    def _pieces(self, dims: Sequence[int]) -> Weighted:
        if not self._known:
            raise NotImplementedError(
                f"{type(self.model).__name__}: a {type(self.model.module).__name__} only scores and draws, so it has "
                "no marginals, conditionals and modes; take a flow or a MADE, or count among draws"
            )
        loc, scale = (each.expand(self.event_shape).flatten() for each in (self.model.loc, self.model.scale))
        return [(weight, _ScaledPiece(piece, loc, scale)) for weight, piece in self.inner._pieces(dims)]
