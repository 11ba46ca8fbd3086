"""Adds bijections for supports that have none in torch and Pyro, such as triangular matrices, spheres and mixtures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions.constraints as pyro_constraints
import torch
from pyro.distributions.transforms import CholeskyTransform
from torch import Size, Tensor
from torch.distributions import ComposeTransform, Transform, biject_to, constraints, transform_to

from pyro_flows.infer.models.lifted import Angles, LiftedAngles, LiftedSphere, circle

__all__ = ["LowerTriangular", "plain_support", "support_of"]


class LowerTriangular(Transform):
    """Maps vectors of ``n (n + 1) / 2`` numbers to lower triangular ``n x n`` matrices with a positive diagonal.

    Fills entries row by row; those of the diagonal are logarithms.
    """

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LowerTriangular)

    def __hash__(self) -> int:
        return hash(LowerTriangular)

    def _call(self, x: Tensor) -> Tensor:
        size = _size(x.shape[-1])
        rows, columns = torch.tril_indices(size, size, device=x.device)
        matrix = x.new_zeros((*x.shape[:-1], size, size))
        matrix[..., rows, columns] = x
        return matrix.tril(-1) + torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1).exp())

    def _inverse(self, y: Tensor) -> Tensor:
        rows, columns = torch.tril_indices(y.shape[-1], y.shape[-1], device=y.device)
        free = y.tril(-1) + torch.diag_embed(y.diagonal(dim1=-2, dim2=-1).log())
        return free[..., rows, columns]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the sum of the diagonal's logarithms."""
        return y.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def forward_shape(self, shape: Size) -> Size:
        size = _size(shape[-1])
        return Size((*shape[:-1], size, size))

    def inverse_shape(self, shape: Size) -> Size:
        return Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


def _size(length: int) -> int:
    size = (math.isqrt(8 * length + 1) - 1) // 2
    if size * (size + 1) // 2 != length:
        raise ValueError(f"LowerTriangular: expected n (n + 1) / 2 entries for some n, got {length}")
    return size


def plain_support(support: object) -> dict[str, Any]:
    """Describes a support as plain data: a constraint's public name in torch or Pyro, and its bounds.

    Raises:
        TypeError: for any other constraint.
    """
    for name, known in _public().items():
        if known is type(support):
            return {"constraint": name, "bounds": {key: _plain(value) for key, value in vars(support).items()}}
    fixed = not any(isinstance(bound, Tensor) for bound in vars(support).values())
    for name, known in _public().items():
        if type(known) is type(support) and fixed and vars(known) == vars(support):
            return {"constraint": name, "bounds": {}}
    raise TypeError(f"{support!r} is not a constraint of torch or Pyro")


def support_of(plain: dict[str, Any]) -> constraints.Constraint:
    """Restores the support that :func:`plain_support` described.

    Raises:
        ValueError: for an unknown name.
    """
    known = _public().get(plain["constraint"])
    if known is None:
        raise ValueError(f"there is no constraint {plain['constraint']!r}")
    if isinstance(known, constraints.Constraint):
        return known
    return known(**{key: _restored(value) for key, value in plain["bounds"].items()})


def _public() -> dict[str, Any]:
    found = {name: getattr(place, name) for place in (pyro_constraints, constraints) for name in place.__all__}
    kind = constraints.Constraint
    classes = {name: each for name, each in found.items() if isinstance(each, type) and issubclass(each, kind)}
    del classes["Constraint"]
    return {name: each for name, each in found.items() if isinstance(each, kind)} | classes | {"Angles": Angles}


def _plain(bound: Any) -> Any:
    if isinstance(bound, constraints.Constraint):
        return plain_support(bound)
    if isinstance(bound, (list, tuple)):
        return [_plain(each) for each in bound]
    if isinstance(bound, (Tensor, bool, int, float, type(None))):
        return bound
    raise TypeError(f"a bound is a {type(bound).__name__}")


def _restored(plain: Any) -> Any:
    if isinstance(plain, dict):
        return support_of(plain)
    return [_restored(each) for each in plain] if isinstance(plain, list) else plain


_MADE: tuple[tuple[constraints.Constraint, Callable[[Any], Transform]], ...] = (
    (constraints.lower_cholesky, lambda _: LowerTriangular()),
    (constraints.positive_definite, lambda _: ComposeTransform([LowerTriangular(), CholeskyTransform().inv])),
    (pyro_constraints.sphere, lambda _: LiftedSphere()),
    (circle, lambda support: LiftedAngles(support.mask)),
    (constraints.MixtureSameFamilyConstraint(constraints.real), lambda support: biject_to(support.base_constraint)),
)

for _support, _make in _MADE:
    try:
        biject_to(_support)
    except NotImplementedError:  # the user's registrations come first
        biject_to.register(_support, _make)
transform_to.register(circle, lambda support: LiftedAngles(support.mask))  # for Pyro's initial values
