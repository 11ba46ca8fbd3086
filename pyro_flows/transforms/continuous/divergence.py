"""The divergence of a field, and the right-hand side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_flows.core.checks import choice, integer
from pyro_flows.transforms.continuous.fields import Field, unit_probes

__all__ = ["EXACT_UP_TO", "Estimator", "FieldDynamics", "Rhs", "columns", "draw", "estimator", "probes_of"]

Rhs = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

#: Dimensions up to which "auto" is exact for fields without a cheap closed form.
EXACT_UP_TO = 32


class Estimator(NamedTuple):
    """How to compute the divergence; each of ``num_probes`` probes costs a product with the Jacobian in each
    evaluation.

    Example:
        >>> layer = pf.cnf(2, divergence="hutchinson", num_probes=4)[0]
        >>> layer.estimator
        Estimator(kind='hutchinson', noise='rademacher', num_probes=4)
    """

    kind: str = "auto"
    noise: str = "rademacher"
    num_probes: int = 1

    def resolved(self, field: Field) -> Estimator:
        """Resolves ``"auto"``: exact where that is cheap, else Hutchinson."""
        if self.kind != "auto":
            return self
        cheap = field.cheap_divergence or field.event_shape.numel() <= EXACT_UP_TO
        return self._replace(kind="exact" if cheap else "hutchinson")

    @property
    def basis(self) -> int:
        """Number of probes in the basis of Hutch++."""
        return self.num_probes // 2 if self.kind == "hutch++" else 0

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each probe."""
        rest = self.num_probes - self.basis
        return (1.0,) * self.basis + (1.0 / rest,) * rest


def estimator(kind: str, noise: str, count: int | None, size: int) -> Estimator:
    """Checks the settings for events of ``size`` numbers."""
    choice("", "divergence", kind, ("auto", "exact", "hutchinson", "hutch++"))
    choice("", "noise", noise, ("rademacher", "gaussian"))
    basis = kind == "hutch++"
    count = integer(f"divergence={kind!r}", "num_probes", (4 if basis else 1) if count is None else count, 1 + basis)
    return Estimator(kind, noise, min(count, 2 * size) if basis else count)


def draw(noise: str, like: Tensor, *shape: int) -> Tensor:
    """Draws noise with identity covariance, like ``like``."""
    if noise == "gaussian":
        return torch.randn(*shape, dtype=like.dtype, device=like.device)
    return torch.randint(0, 2, shape, dtype=like.dtype, device=like.device).mul_(2).sub_(1)


@torch.no_grad()
def probes_of(settings: Estimator, field: Field, t: Tensor, x: Tensor, context: Tensor | None, noise: Tensor) -> Tensor:
    """Makes a solve's probes, shape ``(rows, count, D)``, from noise of that shape and the start ``t``, ``x``."""
    basis = settings.basis
    if basis == 0:
        return noise
    sketch, rest = noise[:, :basis], noise[:, basis:]
    made = field.products(t, x, sketch.transpose(0, 1).reshape(basis, *x.shape), context)[1]
    q = torch.linalg.qr(made.flatten(2).movedim(0, -1))[0].mT  # (rows, basis, D)
    return torch.cat((q, rest - (rest @ q.mT) @ q), 1)


def columns(
    settings: Estimator,
    field: Field,
    t: Tensor,
    x: Tensor,
    context: Tensor | None,
    probes: Tensor | None,
    penalties: tuple[bool, bool] = (False, False),
) -> tuple[Tensor, list[Tensor]]:
    r"""The velocity, and the columns to integrate: the divergence and the penalties, each of shape ``(rows,)``.

    ``t`` is a scalar, ``x`` has shape ``(rows, *event_shape)``, ``context`` ``(rows or 1, context_dim)`` and
    ``probes``, unless exact, ``(count, rows, *event_shape)``.  In ``settings``, ``"auto"`` is resolved.  ``penalties``
    says whether to add :math:`|v|^2`, and :math:`\|J\|_F^2` (by the same probes if there are some).
    """
    kinetic, jacobian = penalties
    exact = settings.kind == "exact"
    if exact and not jacobian:
        v, divergence = field.with_divergence(t, x, context)
        made = [divergence]
    else:
        p = unit_probes(x) if probes is None else probes
        v, pushed = field.products(t, x, p, context)
        weights = (1.0,) if exact else settings.weights
        p, pushed = p.flatten(2), pushed.flatten(2)
        made = [_weighted(weights, (p * pushed).sum(-1))]
        if jacobian:
            # With a basis Q: |J Q|^2 + E|J (1 - QQ') g|^2, as for the trace.
            made.append(_weighted(weights, pushed.square().sum(-1)))
    if kinetic:
        made.insert(1, v.flatten(1).square().sum(-1))
    return v, made


def _weighted(weights: tuple[float, ...], forms: Tensor) -> Tensor:
    """The weighted sum over probes, shape ``(count, rows)`` to ``(rows,)``."""
    return forms.sum(0) * weights[0] if len(set(weights)) == 1 else forms.new_tensor(weights) @ forms


class FieldDynamics(nn.Module):
    """The right-hand side: a field with its divergence and penalties on flat rows; arguments as in :func:`columns`.

    ``has_context`` says whether a context follows the field's parameters.
    """

    def __init__(
        self, name: str, inner: Field, settings: Estimator, has_context: bool, penalties: tuple[bool, bool]
    ) -> None:
        super().__init__()
        self.name, self.inner, self.settings = name, inner, settings
        self.has_context, self.penalties = has_context, penalties
        self.num_columns = 1 + sum(penalties)

    def bind(self, shared: Sequence[Tensor], rowwise: Sequence[Tensor]) -> Rhs:
        """Returns ``(t, x) -> (velocity, columns)`` for ``x`` ``(n, D)`` and columns ``(n, num_columns)``.

        Tensors that need a gradient are ``shared`` by all rows or ``rowwise`` (leading dimension ``n``).
        """
        own = dict(self.named_parameters())
        given, rest = shared[: len(own)], [*shared[len(own) :], *rowwise]
        context = rest.pop(0) if self.has_context else None
        probes = rest[0].transpose(0, 1).contiguous() if rest else None
        if all(a is b for a, b in zip(given, own.values(), strict=True)):
            return lambda t, x: self(t, x, context, probes)
        tensors = dict(zip(own, given, strict=True))
        return lambda t, x: torch.func.functional_call(self, tensors, (t, x, context, probes))

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        event = self.inner.event_shape
        x = x if len(event) == 1 else torch.unflatten(x, 1, event)
        probes = None if probes is None else probes.view(*probes.shape[:2], *event)
        v, made = columns(self.settings, self.inner, t, x, context, probes, self.penalties)
        return v.flatten(1), torch.stack(made, 1)
