"""The abstract autoregressive model and its distribution."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pyro.ops.provenance import track_provenance
from torch import Size, Tensor, nn
from torch.distributions.constraints import Constraint

from pyro_flows.core.checks import check_context, check_tensor, joint_shape, refuse_as_site, sample_size, wrong_event
from pyro_flows.core.modes import plain_eager
from pyro_flows.core.steps import length_mask
from pyro_flows.distributions.made.head import Head
from pyro_flows.distributions.made.network import Member
from pyro_flows.distributions.made.pieces import OrderPiece
from pyro_flows.distributions.queries.answers import Weighted
from pyro_flows.distributions.shared import SharedDistribution, by_row

__all__ = ["AutoregressiveDistribution", "AutoregressiveModel"]


def _joint(model: AutoregressiveModel, batch: Iterable[int], lengths: Iterable[int]) -> Size:
    try:
        return joint_shape(batch, lengths)
    except ValueError:
        raise ValueError(
            f"{type(model).__name__}: expected lengths that broadcast to the batch {tuple(batch)}, one for each "
            f"series, got shape {tuple(lengths)}"
        ) from None


class AutoregressiveDistribution(SharedDistribution):
    r"""A product of univariate conditionals, :math:`p(x) = \prod_i p(x_i \mid x_{<i}, c)`, for ``pyro.sample``.

    Calling a model returns this distribution, which shares the parameters.  A density costs one pass for each member, a
    draw one sweep.

    Args:
        model: the owner of the parameters.
        context: shape ``(*batch, context_dim)``, or ``None``.
        members: orders with masks; several stand for the mean of their densities.
        lengths: steps of each series of a model of series, integers from 1 to ``T``.  Later steps are padding, which
            counts in no density, may hold anything in a value, and is zero in draws.
        batch_shape: by default that of context and lengths.

    Example:
        >>> made = pf.MADE(8)
        >>> with pyro.plate("rows", 5):
        ...     x = pyro.sample("x", made())
        >>> made().log_prob(x).shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        context: Tensor | None = None,
        members: tuple[Any, ...] = (None,),
        *,
        lengths: Tensor | Iterable[int] | None = None,
        batch_shape: Size | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.inside = None
        if lengths is not None:
            self.inside = length_mask(type(model).__name__, lengths, None, model.event_shape[-1], model.device)
            batch = () if context is None else context.shape[:-1]
            batch_shape = _joint(model, batch, self.inside.shape[:-1]) if batch_shape is None else batch_shape
        super().__init__(model, context, members, batch_shape=batch_shape, validate_args=validate_args)

    def expand(
        self, batch_shape: Size | Iterable[int], _instance: SharedDistribution | None = None
    ) -> AutoregressiveDistribution:
        made: Any = super().expand(batch_shape, _instance)
        if self.inside is not None:
            made.inside = self.inside.expand(*made.batch_shape, -1)
        return made

    def _admit(self, value: Tensor) -> Tensor:
        check_tensor(type(self.model).__name__, "a tensor", value)
        cut = value.dim() - len(self.event_shape)
        if cut < 0 or value.shape[cut:] != self.event_shape:
            raise ValueError(wrong_event(self.model, value.shape, self.event_shape))
        if self.inside is not None:
            _joint(self.model, value.shape[:cut], self.batch_shape)
            value = torch.where(self.inside.unsqueeze(-2), value, value[..., :1])  # numbers that have a density
            cut = value.dim() - len(self.event_shape)
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
        if self.inside is not None:
            raise NotImplementedError(
                f"{type(self.model).__name__}: marginals, conditionals and modes of series of several lengths are not "
                "known at once; ask a model of one length, by at_length(times)"
            )
        own = self._beginning_with(dims).members if dims else self.members
        return [(-math.log(len(own)), OrderPiece(self.model, self.context, each, self.batch_shape)) for each in own]

    def _scores(self, value: Tensor) -> list[Tensor]:
        if self.inside is not None:
            return [self._by_step(value).sum(-1)]
        return [self.model.score(value, self.context, member) for member in self.members]

    def step_log_prob(self, value: Tensor) -> Tensor:
        """Log-density of each step of series given those before it, in nats, shape ``(*batch, T)``; one pass."""
        value = self._admit(value)
        batch = joint_shape(value.shape[: value.dim() - len(self.event_shape)], self.batch_shape)
        return self._by_step(value.expand(batch + self.event_shape))

    def _by_step(self, value: Tensor) -> Tensor:
        scores = self.model.step_scores(value, self.context)
        return scores if self.inside is None else torch.where(self.inside, scores, 0.0)

    def _draw(self, sample_shape: Size) -> Tensor:
        """Draws, each from a random member."""
        shape = sample_shape + self.batch_shape
        if len(self.members) == 1:
            return self._cut(self.model.draw(shape, self.context, self.members[0]))
        which = torch.randint(len(self.members), (shape.numel(),), device=self.model.device)
        context = by_row(self.context, shape)
        out = torch.empty(shape.numel(), *self.event_shape, dtype=self.model.dtype, device=self.model.device)
        for k, member in enumerate(self.members):
            chosen = (which == k).nonzero().squeeze(-1)
            out[chosen] = self.model.draw(chosen.shape, None if context is None else context[chosen], member)
        return out.view(shape + self.event_shape)

    def rsample(self, sample_shape: int | Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Differentiable draws, if the head has them."""
        if not self.has_rsample:
            raise NotImplementedError(
                f"{type(self.model).__name__}: there are no reparameterized draws of {self.model.head}"
                + (", nor of an ensemble of orders" if len(self.members) > 1 else "")
                + "; use .sample() with a score-function estimator, or .relaxed(temperature) where the head has one"
            )
        drawn = self._cut(self.model.rdraw(sample_size(sample_shape) + self.batch_shape, self.context, self.members[0]))
        return track_provenance(drawn, self._marks)

    def _cut(self, drawn: Tensor) -> Tensor:
        return drawn if self.inside is None else torch.where(self.inside.unsqueeze(-2), drawn, 0.0)


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

    def step_scores(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density of each place of events ``(C, *places)`` given those before it, shape ``(*batch, *places)``."""
        raise TypeError(f"{type(self).__name__} has no places one after another: see ConvMADE")

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
    def fit_marginals(self, rows: Tensor, *, as_normals: bool = False) -> AutoregressiveModel:
        """Sets the output biases to the marginals of data, and returns the model.

        A fresh model then has independent dimensions with these marginals.

        Args:
            rows: shape ``(rows, *event_shape)``.
            as_normals: whether mixtures begin as normals with the data's means and variances, not at their quantiles.

        Example:
            >>> rows = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
            >>> made = pf.MADE(2).fit_marginals(rows)
            >>> made.sample((1000,)).mean(0)[0] > 0.8  # 0.9, and noise
            tensor(True)
        """
        check_tensor(type(self).__name__, "a tensor of rows", rows)
        flat = self.cast(rows.to(self.device)).reshape(len(rows), self.input_dim)
        self.set_bias(self.head.bias(flat, as_normals=as_normals))
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
        refuse_as_site(self)
        return self.at_members(self.members(), context)

    condition = forward

    def log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats; value and context broadcast.

        Example:
            >>> made = pf.MADE(8)
            >>> made.log_prob(torch.randint(2, (5, 8)).float()).shape
            torch.Size([5])
        """
        return self(context).log_prob(value)

    def sample(
        self, sample_shape: int | Size | list[int] | tuple[int, ...] = (), context: Tensor | None = None
    ) -> Tensor:
        """Draws without gradient, shape ``(*sample_shape, *context_batch, *event_shape)``.

        Example:
            >>> made = pf.MADE(8, context_dim=3)
            >>> made.sample((4,), torch.randn(5, 3)).shape
            torch.Size([4, 5, 8])
        """
        return self(context).sample(sample_size(sample_shape))

    def rsample(
        self, sample_shape: int | Size | list[int] | tuple[int, ...] = (), context: Tensor | None = None
    ) -> Tensor:
        """Differentiable draws, if the head has them."""
        return self(context).rsample(sample_size(sample_shape))
