"""The abstract autoregressive model and its distribution."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from pyro.ops.provenance import track_provenance
from torch import Size, Tensor, nn
from torch.distributions.constraints import Constraint

from pyro_flows.core.checks import check_context, check_tensor, wrong_event
from pyro_flows.core.modes import plain_eager
from pyro_flows.distributions.made.head import Head
from pyro_flows.distributions.made.network import Member
from pyro_flows.distributions.made.pieces import OrderPiece
from pyro_flows.distributions.queries.answers import Weighted
from pyro_flows.distributions.shared import SharedDistribution

__all__ = ["AutoregressiveDistribution", "AutoregressiveModel", "by_row"]


def by_row(context: Tensor | None, batch: Size) -> Tensor | None:
    """Expands a context to one row for each batch element."""
    return None if context is None else context.expand(*batch, -1).reshape(batch.numel(), context.shape[-1])


class AutoregressiveDistribution(SharedDistribution):
    r"""A product of univariate conditionals, :math:`p(x) = \prod_i p(x_i \mid x_{<i}, c)`, for ``pyro.sample``.

    Calling a model returns this distribution, which shares the parameters.  A density costs one pass for each member, a
    draw one sweep.

    Args:
        model: the owner of the parameters.
        context: shape ``(*batch, context_dim)``, or ``None``.
        members: orders with masks; several stand for the mean of their densities.
        batch_shape: by default the context's.
    """

    def _admit(self, value: Tensor) -> Tensor:
        check_tensor(type(self.model).__name__, "a tensor", value)
        cut = value.dim() - len(self.event_shape)
        if cut < 0 or value.shape[cut:] != self.event_shape:
            raise ValueError(wrong_event(self.model, value.shape, self.event_shape))
        if self._validate_args and value.numel() and plain_eager():
            self.model.head.check(value.reshape(*value.shape[:cut], self.model.input_dim))
        return value

    def _beginning_with(self, dims: Sequence[int]) -> AutoregressiveDistribution:
        if not getattr(self.model, "any_order", False):
            return self
        observed = torch.zeros(self.model.input_dim, dtype=torch.bool, device="cpu")
        observed[list(dims)] = True
        made = copy.copy(self)
        made.members = tuple(self.model.member_for(observed, number) for number in range(len(self.members)))
        return made

    def _pieces(self, dims: Sequence[int]) -> Weighted:
        own = self._beginning_with(dims).members if dims else self.members
        return [(-math.log(len(own)), OrderPiece(self.model, self.context, each, self.batch_shape)) for each in own]

    def _scores(self, value: Tensor) -> list[Tensor]:
        return [self.model.score(value, self.context, member) for member in self.members]

    def _draw(self, sample_shape: Size) -> Tensor:
        """Draws, each from a random member."""
        shape = sample_shape + self.batch_shape
        if len(self.members) == 1:
            return self.model.draw(shape, self.context, self.members[0])
        which = torch.randint(len(self.members), (shape.numel(),), device=self.model.device)
        context = by_row(self.context, shape)
        out = torch.empty(shape.numel(), *self.event_shape, dtype=self.model.dtype, device=self.model.device)
        for k, member in enumerate(self.members):
            chosen = (which == k).nonzero().squeeze(-1)
            out[chosen] = self.model.draw(chosen.shape, None if context is None else context[chosen], member)
        return out.view(shape + self.event_shape)

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Differentiable draws, if the head has them."""
        if not self.has_rsample:
            raise NotImplementedError(
                f"{type(self.model).__name__}: there are no reparameterized draws of {self.model.head}"
                + (", nor of an ensemble of orders" if len(self.members) > 1 else "")
                + "; use .sample() with a score-function estimator, or .relaxed(temperature) where the head has one"
            )
        drawn = self.model.rdraw(Size(sample_shape) + self.batch_shape, self.context, self.members[0])
        return track_provenance(drawn, self._marks)


class AutoregressiveModel(nn.Module):
    r"""Abstract base: :math:`p(x \mid c) = \prod_i p(x_i \mid x_{<i}, c)`, all conditionals by one network.

    Calling a model gives a Pyro distribution that shares the parameters: ``pyro.sample("x", made())``, or
    ``made(context)``.  A subclass defines ``params``, ``draw``, ``set_bias`` and ``order_of``.  Their ``member`` is one
    order with its masks, by default the current one.

    Args:
        event_shape: shape of one event.
        head: a head bound to ``event_shape.numel()`` dimensions.
        context_dim: size of the context, 0 for none.
    """

    def __init__(self, event_shape: Size, head: Head, context_dim: int) -> None:
        super().__init__()
        self.event_shape, self.head, self.context_dim = event_shape, head, context_dim
        self.input_dim = event_shape.numel()

    # For subclasses.

    def params(self, value: Tensor, context: Tensor | None = None, member: Member | None = None) -> Tensor:
        """Parameters of all conditionals, shape ``(*batch, input_dim, num_params)``; one pass.

        Args:
            value: shape ``(*batch, *event_shape)``.
            context: broadcasts to ``(*batch, context_dim)``.
            member: the order and masks.
        """
        raise TypeError(f"{type(self).__name__} must define params(value, context, member)")

    def draw(self, batch: Size, context: Tensor | None, member: Member | None = None) -> Tensor:
        """Draws without gradient, shape ``(*batch, *event)``."""
        raise TypeError(f"{type(self).__name__} must define draw(batch, context, member)")

    def set_bias(self, bias: Tensor) -> None:
        """Sets the output biases, shape ``(input_dim, num_params)``."""
        raise TypeError(f"{type(self).__name__} must define set_bias(bias)")

    def order_of(self, member: Member | None) -> Tensor:
        """The dimensions in the member's order."""
        raise TypeError(f"{type(self).__name__} must define order_of(member)")

    # Derived.

    def score(self, value: Tensor, context: Tensor | None, member: Member | None = None) -> Tensor:
        """Log-density, shape ``(*batch,)``; the context broadcasts."""
        flat = self.cast(value).flatten(-len(self.event_shape))
        return self.head.log_prob(flat, self.params(value, context, member)).sum(-1)

    def rdraw(self, batch: Size, context: Tensor | None, member: Member | None = None) -> Tensor:
        """Differentiable draws, shape ``(*batch, *event)``; one pass a dimension."""
        start = torch.zeros(*batch, self.input_dim, dtype=self.dtype, device=self.device)
        columns = list(start.unbind(-1))  # masks hide the dimensions still missing
        for index in self.order_of(member).to(self.device).split(1):
            value = torch.stack(columns, -1).view(*batch, *self.event_shape)
            params = self.params(value, context, member).index_select(-2, index)
            columns[int(index)] = self.head.rsample(params, index).squeeze(-1)
        return torch.stack(columns, -1).view(*batch, *self.event_shape)

    @torch.no_grad()
    def fit_marginals(self, rows: Tensor) -> AutoregressiveModel:
        """Sets the output biases to the marginals of data, and returns the model.

        A fresh model then has independent dimensions with these marginals.

        Args:
            rows: shape ``(rows, *event_shape)``.
        """
        check_tensor(type(self).__name__, "a tensor of rows", rows)
        self.set_bias(self.head.bias(self.cast(rows.to(self.device)).reshape(len(rows), self.input_dim)))
        return self

    @property
    def has_rsample(self) -> bool:
        """Whether differentiable draws exist."""
        return self.head.has_rsample

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters and draws."""
        return next(self.parameters()).dtype

    @property
    def support(self) -> Constraint:
        """The support of one event."""
        return self.head.support(self.event_shape)

    def cast(self, value: Tensor) -> Tensor:
        """Casts whole numbers to the parameters' dtype; refuses other values of a different dtype."""
        if value.dtype == self.dtype:
            return value
        if value.is_floating_point() and not self.head.discrete:
            raise TypeError(
                f"{type(self).__name__}: the value is {value.dtype} but the parameters are {self.dtype}; convert one "
                f"of them, e.g. value.to({self.dtype})"
            )
        return value.to(self.dtype)

    def members(self) -> tuple[Member | None, ...]:
        """The members whose mean density the model is."""
        return (None,)

    def at_members(self, members: tuple[Member | None, ...], context: Tensor | None) -> AutoregressiveDistribution:
        """The mean density of these members; checks the context."""
        check_context(self, context)
        return AutoregressiveDistribution(self, context, members)

    def forward(self, context: Tensor | None = None) -> AutoregressiveDistribution:
        """The distribution at a context of shape ``(*batch, context_dim)``."""
        return self.at_members(self.members(), context)

    condition = forward

    def log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats; value and context broadcast."""
        return self(context).log_prob(value)

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = (), context: Tensor | None = None) -> Tensor:
        """Draws without gradient, shape ``(*sample_shape, *context_batch, *event_shape)``."""
        return self(context).sample(Size(sample_shape))

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = (), context: Tensor | None = None) -> Tensor:
        """Differentiable draws, if the head has them."""
        return self(context).rsample(Size(sample_shape))
