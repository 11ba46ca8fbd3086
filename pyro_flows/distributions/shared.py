"""The base of distributions that share the parameters of a module."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.ops.provenance import extract_provenance, track_provenance
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_flows.core.checks import joint_shape, sample_size
from pyro_flows.distributions.queries.answers import Answering

__all__ = ["SharedDistribution", "by_row"]


def by_row(context: Tensor | None, batch: Size) -> Tensor | None:
    """Expands a context to one row for each batch element."""
    return None if context is None else context.expand(*batch, -1).reshape(batch.numel(), context.shape[-1])


class SharedDistribution(Answering, TorchDistribution):
    """Abstract base: a distribution that a module makes at a context and that shares its parameters.

    A subclass defines ``_admit``, ``_scores`` and ``_draw``.

    Args:
        model: the module, with an ``event_shape`` and a ``support``.
        context: shape ``(*batch, context_dim)``, or ``None``.
        members: what the model tells apart at the same context, such as orders; several are mixed in equal parts.
        batch_shape: by default the context's.
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}

    def __init__(
        self,
        model: Any,
        context: Tensor | None = None,
        members: tuple[Any, ...] = (None,),
        *,
        batch_shape: Size | None = None,
        validate_args: bool | None = None,
    ) -> None:
        found: Any
        found, self._marks = extract_provenance(context)  # hand-made gradients need plain tensors
        self.model, self.context, self.members = model, found, members
        self.has_rsample = len(members) == 1 and getattr(model, "has_rsample", False)
        own = Size() if found is None else found.shape[:-1]
        super().__init__(own if batch_shape is None else batch_shape, model.event_shape, validate_args=validate_args)

    def __repr__(self) -> str:
        several = f"{len(self.members)} members, " if len(self.members) > 1 else ""
        return (
            f"{type(self).__name__}({type(self.model).__name__}, {several}batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)})"
        )

    @constraints.dependent_property
    def support(self) -> Constraint:
        """The support of one event."""
        return self.model.support

    def expand(
        self, batch_shape: Size | Iterable[int], _instance: SharedDistribution | None = None
    ) -> SharedDistribution:
        made = copy.copy(self)
        made._batch_shape = Size(batch_shape)
        made.context = None if self.context is None else self.context.expand(*made._batch_shape, -1)
        return made

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density or log-mass in nats, or a bound, shape ``(*sample, *batch)``."""
        given: Any
        given, marks = extract_provenance(value)
        given = self._admit(given)
        batch = joint_shape(given.shape[: given.dim() - len(self.event_shape)], self.batch_shape)
        scores = self._scores(given.expand(batch + self.event_shape))
        score = scores[0] if len(scores) == 1 else torch.logsumexp(torch.stack([*scores]), 0) - math.log(len(scores))
        return track_provenance(score, marks | self._marks)

    @torch.no_grad()
    def sample(self, sample_shape: int | Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws, shape ``(*sample, *batch, *event)``."""
        return track_provenance(self._draw(sample_size(sample_shape)), self._marks)

    def _admit(self, value: Tensor) -> Tensor:
        """Checks a value."""
        raise NotImplementedError

    def _scores(self, value: Tensor) -> Sequence[Tensor] | Tensor:
        """Log-densities of a value of the whole batch shape; their mean density counts."""
        raise NotImplementedError

    def _draw(self, sample_shape: Size) -> Tensor:
        """``sample`` without marks."""
        raise NotImplementedError
