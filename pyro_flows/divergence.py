r"""The divergence of a vector field, :math:`\mathrm{tr}\, J`: exact, or estimated by probes that stay fixed in a solve.

Every estimate is :math:`\sum_k w_k\, p_k^\top J p_k` with probes :math:`p_k` drawn for each row before a solve, so that
the solver sees a smooth function.  Hutchinson's have identity covariance and equal weights; its variance is
:math:`2 \|J_s\|_F^2` for Gaussian probes and that without the diagonal for Rademacher ones, :math:`J_s` the symmetric
part.  Hutch++ takes an orthonormal basis :math:`Q` of what :math:`J` makes of some probes, with weight 1, and others
projected off it: :math:`\mathrm{tr}\, J = \mathrm{tr}\, Q^\top J Q + \mathrm{tr}\, (1 - QQ^\top) J (1 - QQ^\top)` for
any :math:`Q`, so it is unbiased, and only the part that :math:`Q` misses has variance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.fields import Field, unit_probes

__all__ = ["EXACT_UP_TO", "Estimator", "columns", "draw", "estimator", "probes_of"]

#: Dimensions up to which "auto" is exact where the field has no closed form that is cheap at any number of them.
EXACT_UP_TO = 32

_KINDS = ("auto", "exact", "hutchinson", "hutch++")
_NOISES = ("rademacher", "gaussian")


class Estimator(NamedTuple):
    """How the divergence is had.

    Attributes:
        kind: ``"auto"``, ``"exact"``, ``"hutchinson"`` or ``"hutch++"``.
        noise: ``"rademacher"`` or ``"gaussian"``.
        count: probes, and so products with the Jacobian in each evaluation.
    """

    kind: str = "auto"
    noise: str = "rademacher"
    count: int = 1

    def resolved(self, field: Field) -> Estimator:
        """With ``"auto"`` settled: exact where that is cheap, else Hutchinson."""
        if self.kind != "auto":
            return self
        cheap = field.cheap_divergence or field.event_shape.numel() <= EXACT_UP_TO
        return self._replace(kind="exact" if cheap else "hutchinson")

    @property
    def basis(self) -> int:
        """Probes that go into the basis of Hutch++."""
        return self.count // 2 if self.kind == "hutch++" else 0

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the probes, in sequence."""
        rest = self.count - self.basis
        return (1.0,) * self.basis + (1.0 / rest,) * rest


def estimator(kind: str, noise: str, count: int | None, size: int) -> Estimator:
    """Checked settings, for events of so many numbers."""
    if kind not in _KINDS:
        raise ValueError(f"expected divergence to be one of {list(_KINDS)}, got {kind!r}")
    if noise not in _NOISES:
        raise ValueError(f"expected noise to be one of {list(_NOISES)}, got {noise!r}")
    least = 2 if kind == "hutch++" else 1
    count = (4 if kind == "hutch++" else 1) if count is None else count
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise ValueError(f"expected num_probes to be an integer >= {least} for divergence={kind!r}, got {count!r}")
    return Estimator(kind, noise, min(count, 2 * size) if kind == "hutch++" else count)


def draw(noise: str, like: Tensor, *shape: int) -> Tensor:
    """Noise of identity covariance, in the dtype and on the device of ``like``."""
    if noise == "gaussian":
        return torch.randn(*shape, dtype=like.dtype, device=like.device)
    return torch.randint(0, 2, shape, dtype=like.dtype, device=like.device).mul_(2).sub_(1)


@torch.no_grad()
def probes_of(settings: Estimator, field: Field, t: Tensor, x: Tensor, context: Tensor | None, noise: Tensor) -> Tensor:
    """The probes of one solve, shape ``(rows, count, D)``, from noise of that shape and where the solve starts."""
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
    r"""The velocity, and numbers for each row that are integrated along.

    Args:
        settings: with ``"auto"`` resolved.
        field: the field.
        t: the time.
        x: shape ``(rows, *event_shape)``.
        context: shape ``(rows or 1, context_dim)``, or ``None``.
        probes: shape ``(count, rows, *event_shape)`` unless exact.
        penalties: whether to add :math:`|v|^2`, and :math:`\|J\|_F^2` (by the same probes if there are some).

    Returns:
        ``v`` with the shape of ``x``, and the divergence and what else was asked for, each of shape ``(rows,)``.
    """
    kinetic, jacobian = penalties
    exact = settings.kind == "exact"
    if exact and not jacobian:
        v, divergence = field.with_divergence(t, x, context)
        made = [divergence]
    else:
        p = unit_probes(x) if exact else probes
        v, pushed = field.products(t, x, p, context)
        weights = (1.0,) if exact else settings.weights
        p, pushed = p.flatten(2), pushed.flatten(2)
        made = [_weighted(weights, (p * pushed).sum(-1))]
        if jacobian:
            # For a basis and the rest: |J Q|^2 + E|J (1 - QQ') g|^2, in the same way as the trace.
            made.append(_weighted(weights, pushed.square().sum(-1)))
    if kinetic:
        made.insert(1, v.flatten(1).square().sum(-1))
    return v, made


def _weighted(weights: tuple[float, ...], forms: Tensor) -> Tensor:
    """Weighted sum over probes, shape ``(count, rows)`` to ``(rows,)``."""
    if len(weights) == 1 or len(set(weights)) == 1:
        total = forms.sum(0) if len(forms) > 1 else forms[0]
        return total if weights[0] == 1.0 else total * weights[0]
    return forms.new_tensor(weights) @ forms
