"""What all autoregressive models share: a head, a context, and the distribution that they hand out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.ops.provenance import extract_provenance, track_provenance
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_flows.core.checks import check_context, check_tensor, wrong_event
from pyro_flows.core.modes import plain_eager
from pyro_flows.distributions.made.head import Head

__all__ = ["AutoregressiveDistribution", "AutoregressiveModel"]


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


class AutoregressiveModel(nn.Module):
    r"""Abstract base: :math:`p(x \mid c) = \prod_i p(x_i \mid x_{<i}, c)`, all conditionals by one network.

    A subclass defines ``score``, ``draw`` and ``rdraw``; the rest is derived.  Calling a model gives a Pyro
    distribution that shares the parameters: ``pyro.sample("x", made())``, or ``made(context)`` if it takes one.

    Args:
        event_shape: shape of one event.
        head: what the network's outputs mean, bound to as many dimensions.
        context_dim: size of the context, 0 for none.
    """

    def __init__(self, event_shape: Size, head: Head, context_dim: int) -> None:
        super().__init__()
        self.event_shape, self.head, self.context_dim = event_shape, head, context_dim

    # What a subclass defines; ``member`` is one of its orders and masks, ``None`` for the one in use.

    def score(self, value: Tensor, context: Tensor | None, member: object = None) -> Tensor:
        """Log-density, shape ``(*batch,)``, of ``value`` of shape ``(*batch, *event)``; the context broadcasts."""
        raise TypeError(f"{type(self).__name__} must define score(value, context, member)")

    def draw(self, batch: Size, context: Tensor | None, member: object = None) -> Tensor:
        """Draws of shape ``(*batch, *event)``, without gradient."""
        raise TypeError(f"{type(self).__name__} must define draw(batch, context, member)")

    def rdraw(self, batch: Size, context: Tensor | None, member: object = None) -> Tensor:
        """Differentiable draws of shape ``(*batch, *event)``."""
        raise TypeError(f"{type(self).__name__} must define rdraw(batch, context, member)")

    def set_bias(self, bias: Tensor) -> None:
        """Sets the biases of the outputs, shape ``(input_dim, num_params)``."""
        raise TypeError(f"{type(self).__name__} must define set_bias(bias)")

    # What follows from that.

    @torch.no_grad()
    def fit_marginals(self, rows: Tensor) -> AutoregressiveModel:
        """Sets the biases of the outputs to the marginals of data, and returns the model.

        A fresh model, whose last layer is zero, is then that of independent dimensions, from which training starts.

        Args:
            rows: shape ``(rows, *event_shape)``.
        """
        check_tensor(type(self).__name__, "a tensor of rows", rows)
        self.set_bias(self.head.bias(self.cast(rows.to(self.device)).reshape(len(rows), self.input_dim)))
        return self

    @property
    def input_dim(self) -> int:
        """Number of dimensions of one event."""
        return self.event_shape.numel()

    @property
    def has_rsample(self) -> bool:
        """Whether draws can be differentiable after the parameters."""
        return self.head.has_rsample

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, and of draws."""
        return next(self.parameters()).dtype

    @property
    def support(self) -> Constraint:
        """Of one event."""
        return self.head.support(self.event_shape)

    def cast(self, value: Tensor) -> Tensor:
        """Values in the dtype of the parameters; only whole numbers may have another one."""
        if value.dtype == self.dtype:
            return value
        if value.is_floating_point() and not self.head.discrete:
            raise TypeError(
                f"{type(self).__name__}: the value is {value.dtype} but the parameters are {self.dtype}; convert one "
                f"of them, e.g. value.to({self.dtype})"
            )
        return value.to(self.dtype)

    def _admit(self, context: Tensor | None) -> Tensor | None:
        check_context(self, context)
        return context

    def members(self) -> tuple[object, ...]:
        """Those whose mean density the model stands for now."""
        return (None,)

    def forward(self, context: Tensor | None = None) -> AutoregressiveDistribution:
        """The distribution, at a context of shape ``(*batch, context_dim)`` if the model takes one."""
        return AutoregressiveDistribution(self, self._admit(context), self.members())

    condition = forward

    def log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats, of the shape that value and context broadcast to."""
        return self(context).log_prob(value)

    def sample(self, sample_shape: Size | tuple[int, ...] = (), context: Tensor | None = None) -> Tensor:
        """Draws without gradient, shape ``(*sample_shape, *context_batch, *event_shape)``."""
        return self(context).sample(Size(sample_shape))

    def rsample(self, sample_shape: Size | tuple[int, ...] = (), context: Tensor | None = None) -> Tensor:
        """Differentiable draws, where the head has them."""
        return self(context).rsample(Size(sample_shape))


def one_by_one(passes: Callable[[Tensor], Tensor], head: Head, start: Tensor, order: Tensor) -> Tensor:
    """Differentiable draws, by one pass of the network for each dimension.

    Args:
        passes: from values, shape ``(*batch, D)``, to parameters ``(*batch, D, num_params)``.
        head: of the model.
        start: shape ``(*batch, D)``: whatever stands in it is not looked at.
        order: the dimensions in the sequence in which they come.
    """
    columns = list(start.unbind(-1))
    for dim in order:
        index = dim.reshape(1)
        params = passes(torch.stack(columns, -1)).index_select(-2, index)
        columns[int(dim)] = head.rsample(params, index).squeeze(-1)
    return torch.stack(columns, -1)
