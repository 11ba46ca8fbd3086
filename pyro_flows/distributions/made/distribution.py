"""The Pyro distribution that an autoregressive model hands out: a view that shares its parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.ops.provenance import extract_provenance, track_provenance
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_flows.boundary import check_tensor, wrong_event
from pyro_flows.tracing import plain_eager

__all__ = ["AutoregressiveDistribution"]


class AutoregressiveDistribution(TorchDistribution):
    r"""A product of univariate conditionals, :math:`p(x) = \prod_i p(x_i \mid x_{<i}, c)`, for ``pyro.sample``.

    Made by a model's call; shares its parameters.  A density costs one pass of the network for each member, a draw one
    sweep through the dimensions.

    Args:
        model: what owns the parameters, an ``AutoregressiveModel``.
        context: shape ``(*batch, context_dim)``, whose batch shape is then the distribution's, or ``None``.
        members: which of the model's orders and masks; several stand for the mean of their densities.
        batch_shape: by default that of the context.
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}

    def __init__(
        self,
        model: nn.Module,
        context: Tensor | None = None,
        members: tuple[object, ...] = (None,),
        *,
        batch_shape: Size | None = None,
        validate_args: bool | None = None,
    ) -> None:
        # Pyro's marks of where a value comes from (TraceGraph_ELBO) go on results: hand-made gradients want plain
        # tensors, and would be lost.
        self.context, self._marks = extract_provenance(context)
        self.model, self.members = model, members
        own = Size() if context is None else self.context.shape[:-1]
        super().__init__(own if batch_shape is None else batch_shape, model.event_shape, validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> Constraint:
        """Of one event."""
        return self.model.support

    @property
    def has_rsample(self) -> bool:
        """Whether draws are differentiable after the parameters, which those of an ensemble never are."""
        return len(self.members) == 1 and self.model.has_rsample

    def expand(
        self, batch_shape: Size | Iterable[int], _instance: AutoregressiveDistribution | None = None
    ) -> AutoregressiveDistribution:
        shape = Size(batch_shape)
        context = None if self.context is None else track_provenance(self.context.expand(*shape, -1), self._marks)
        return AutoregressiveDistribution(
            self.model, context, self.members, batch_shape=shape, validate_args=self._validate_args
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density or log-mass in nats, shape ``(*sample, *batch)``."""
        value, marks = extract_provenance(value)
        check_tensor(type(self.model).__name__, "a tensor", value)
        cut = value.dim() - len(self.event_shape)
        if cut < 0 or value.shape[cut:] != self.event_shape:
            raise ValueError(wrong_event(self.model, value.shape, self.event_shape))
        if self._validate_args and value.numel() and plain_eager():
            self.model.head.check(value.reshape(*value.shape[:cut], self.model.input_dim))
        batch = torch.broadcast_shapes(value.shape[:cut], self.batch_shape)
        value = value.expand(batch + self.event_shape)
        scores = [self.model.score(value, self.context, member) for member in self.members]
        score = scores[0]
        if len(scores) > 1:
            score = torch.logsumexp(torch.stack(scores), 0) - math.log(len(scores))
        return track_provenance(score, marks | self._marks)

    def sample(self, sample_shape: Size | tuple[int, ...] = ()) -> Tensor:
        """Draws, shape ``(*sample, *batch, *event)``; of an ensemble each comes from a member chosen at random."""
        shape = Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            one = len(self.members) == 1
            drawn = self.model.draw(shape, self.context, self.members[0]) if one else self._from_ensemble(shape)
        return track_provenance(drawn, self._marks)

    def _from_ensemble(self, shape: Size) -> Tensor:
        rows = shape.numel()
        device = self.model.device
        which = torch.randint(len(self.members), (rows,), device=device)
        context = self.context
        if context is not None:
            context = context.expand(*shape, -1).reshape(rows, context.shape[-1])
        drawn: Tensor | None = None
        for k, member in enumerate(self.members):
            chosen = (which == k).nonzero().squeeze(-1)
            own = None if context is None else context[chosen]
            part = self.model.draw(Size((len(chosen),)), own, member)
            drawn = part.new_empty((rows, *self.event_shape)) if drawn is None else drawn
            drawn[chosen] = part
        return drawn.view(shape + self.event_shape)

    def rsample(self, sample_shape: Size | tuple[int, ...] = ()) -> Tensor:
        """Differentiable draws, where the head has them."""
        if not self.has_rsample:
            raise NotImplementedError(
                f"{type(self.model).__name__}: there are no reparameterised draws of {self.model.head}"
                + (", nor of an ensemble of orders" if len(self.members) > 1 else "")
                + "; use .sample() with a score-function estimator, or .relaxed(temperature) where the head has one"
            )
        drawn = self.model.rdraw(Size(sample_shape) + self.batch_shape, self.context, self.members[0])
        return track_provenance(drawn, self._marks)
