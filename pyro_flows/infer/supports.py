"""Bijections from the line for supports that have none in torch and Pyro: triangular matrices, mixtures and others."""

from __future__ import annotations

import math

import torch
from pyro.distributions.transforms import CholeskyTransform
from torch import Size, Tensor
from torch.distributions import ComposeTransform, Transform, biject_to, constraints

__all__ = ["LowerTriangular"]


class LowerTriangular(Transform):
    """Vectors of ``n (n + 1) / 2`` numbers to lower triangular ``n x n`` matrices with a positive diagonal.

    Entries are taken row by row; those of the diagonal are logarithms.
    """

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LowerTriangular)

    __hash__ = None

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
        """The sum of the diagonal's logarithms."""
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


def _triangular(_: object) -> Transform:
    return LowerTriangular()


def _positive_definite(_: object) -> Transform:
    return ComposeTransform([LowerTriangular(), CholeskyTransform().inv])


def _of_components(support: constraints.MixtureSameFamilyConstraint) -> Transform:
    return biject_to(support.base_constraint)


for _support, _make in (
    (constraints.lower_cholesky, _triangular),
    (constraints.positive_definite, _positive_definite),
    (constraints.MixtureSameFamilyConstraint(constraints.real), _of_components),
):
    try:
        biject_to(_support)
    except NotImplementedError:  # else somebody has chosen one already
        biject_to.register(_support, _make)
