"""What a continuous flow integrates: a field with its divergence, and the penalties of its way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_flows.divergence import Estimator, columns
from pyro_flows.fields import Field
from pyro_flows.ode_solver import Dynamics

__all__ = ["FieldDynamics"]


class _Methods(nn.Module):
    """A field whose methods can be called with other tensors in place of its parameters."""

    def __init__(self, inner: Field) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, call: Callable[[Field], tuple[Tensor, list[Tensor]]]) -> tuple[Tensor, list[Tensor]]:
        return call(self.inner)


class FieldDynamics(Dynamics):
    r"""A field with its divergence, and penalties if asked for, on flat rows.

    Args:
        name: of the flow, in messages.
        inner: the field.
        settings: of the divergence, with ``"auto"`` resolved.
        has_context: whether a context comes after the field's parameters.
        penalties: whether to integrate :math:`|v|^2` and :math:`\|J\|_F^2` as well.
    """

    def __init__(
        self, name: str, inner: Field, settings: Estimator, has_context: bool, penalties: tuple[bool, bool]
    ) -> None:
        self.name, self.inner, self.settings = name, inner, settings
        self.has_context, self.penalties = has_context, penalties
        self.num_columns = 1 + sum(penalties)

    def bind(
        self, shared: Sequence[Tensor], rowwise: Sequence[Tensor]
    ) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        inner, event = self.inner, self.inner.event_shape
        names, own = zip(*inner.named_parameters(), strict=True) if any(True for _ in inner.parameters()) else ((), ())
        given, rest = shared[: len(own)], [*shared[len(own) :], *rowwise]
        context = rest.pop(0) if self.has_context else None
        probes = None
        if rest:
            probes = rest[0].transpose(0, 1).contiguous()
            probes = probes.view(*probes.shape[:2], *event)

        def both(inner: Field, t: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            return columns(self.settings, inner, t, x, context, probes, self.penalties)

        if all(a is b for a, b in zip(given, own, strict=True)):
            evaluate = lambda t, x: both(inner, t, x)  # noqa: E731
        else:
            methods = _Methods(inner)
            tensors = {f"inner.{name}": tensor for name, tensor in zip(names, given, strict=True)}

            def evaluate(t: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor]]:
                return torch.func.functional_call(methods, tensors, (lambda inner: both(inner, t, x),))

        def rhs(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            v, made = evaluate(t, x if len(event) == 1 else x.unflatten(1, event))
            along = made[0].unsqueeze(1) if len(made) == 1 else torch.stack(made, 1)
            return v.flatten(1), along

        return rhs
