"""Linear transforms of whole events: an LU-decomposed matrix, and a product of Householder reflections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flows.core import FlowTransform

__all__ = ["Householder", "LULinear"]


def _rows(transform: FlowTransform, value: Tensor) -> Tensor:
    """The events as the rows of one matrix, which is what triangular solves take."""
    return value.reshape(-1, transform.event_shape.numel())


def _permutation(size: int, permutation: str | Sequence[int] | Tensor) -> Tensor | None:
    if isinstance(permutation, str):
        if permutation == "identity":
            return None
        if permutation == "reverse":
            return torch.arange(size).flip(0)
        if permutation == "random":
            return torch.randperm(size)
        raise ValueError(
            f"LULinear: expected permutation to be 'identity', 'reverse', 'random' or indices, got {permutation!r}"
        )
    indices = torch.as_tensor(permutation).cpu().flatten()
    if indices.is_floating_point() or not torch.equal(indices.sort().values, torch.arange(size)):
        raise ValueError(f"LULinear: expected a permutation of 0..{size - 1}, got {indices.tolist()}")
    return indices.long().clone()


class LULinear(FlowTransform):
    r"""An invertible matrix by its LU decomposition, :math:`y = P L U x + b`.

    :math:`L` is lower triangular with a unit diagonal, :math:`U` upper triangular with a positive diagonal, :math:`P` a
    fixed permutation, :math:`(P z)_i = z_{\pi(i)}`; :math:`\log|\det| = \sum_i \log U_{ii}`.  With no permutation it is
    the identity at first.  Base to data costs the products with the two factors, data to base two triangular solves;
    both are exact and quadratic in the size of an event.

    All of ``factors`` is free, as LAPACK packs it: what is strictly below the diagonal is :math:`L`, strictly above it
    is :math:`U`, and on it is :math:`\log U_{ii}`.

    Args:
        event_shape: an ``input_dim`` or the shape of one event, flattened in row-major order.
        permutation: :math:`\pi`: ``"identity"``, ``"reverse"``, ``"random"`` (drawn once, saved in the
            ``state_dict``) or the indices.
        bias: whether there is a :math:`b`.

    Raises:
        ValueError: if the indices are no permutation.

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018), section 3.2, arXiv:1807.03039.
        Neural Spline Flows (Durkan et al., 2019), arXiv:1906.04032.
    """

    sampling_cost = "1 product"
    density_cost = "1 solve"

    def __init__(
        self,
        event_shape: int | Iterable[int],
        *,
        permutation: str | Sequence[int] | Tensor = "identity",
        bias: bool = True,
    ) -> None:
        super().__init__(event_shape)
        size = self.event_shape.numel()
        self.factors = nn.Parameter(torch.zeros(size, size))
        self.register_parameter("bias", nn.Parameter(torch.zeros(size)) if bias else None)
        drawn = isinstance(permutation, str) and permutation == "random"
        self.register_buffer("permutation", _permutation(size, permutation), persistent=drawn)

    @property
    def log_diagonal(self) -> Tensor:
        """Logarithm of the diagonal of :math:`U`, shape ``(event size,)``; the log-determinant is its sum."""
        return self.factors.diagonal()

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows, log_diagonal = _rows(self, x), self.log_diagonal
        rows = rows * log_diagonal.exp() + F.linear(rows, self.factors.triu(1))
        rows = rows + F.linear(rows, self.factors.tril(-1))
        if self.permutation is not None:
            rows = rows.index_select(-1, self.permutation)
        if self.bias is not None:
            rows = rows + self.bias
        return rows.reshape(x.shape), log_diagonal.sum().expand(x.shape[: x.dim() - len(self.event_shape)])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # Solves have no low precision, so under autocast they are done in that of the factors.
        rows, log_diagonal = _rows(self, y).to(self.factors.dtype), self.log_diagonal
        if self.bias is not None:
            rows = rows - self.bias
        if self.permutation is not None:
            rows = rows.index_select(-1, torch.argsort(self.permutation))
        upper = self.factors.triu(1) + torch.diag_embed(log_diagonal.exp())
        rows = torch.linalg.solve_triangular(self.factors.tril(-1).mT, rows, upper=True, left=False, unitriangular=True)
        rows = torch.linalg.solve_triangular(upper.mT, rows, upper=False, left=False)
        return rows.reshape(y.shape), -log_diagonal.sum().expand(y.shape[: y.dim() - len(self.event_shape)])


# Vectors shorter than this count as the first unit vector; its square is still a normal number in float32.
_SHORTEST = 1e-18


class Householder(FlowTransform):
    r"""An orthogonal matrix by Householder reflections, :math:`y = H_1 \cdots H_k x`, with zero log-determinant.

    :math:`H_i = I - 2 u_i u_i^\top` with :math:`u_i = v_i / |v_i|`.  The product is taken in its compact form
    :math:`I - V^\top T V`, where the rows of :math:`V` are the :math:`u_i` and :math:`T` is triangular, so that each
    direction costs two products with :math:`V` and one triangular solve of size :math:`k`.  The inverse is the
    transpose.  The matrix :math:`Q` is orthogonal to rounding whatever the vectors are: the largest entry of
    :math:`Q^\top Q - I` was below ten machine epsilons for up to 512 random vectors in as many dimensions, and below
    :math:`2k` of them also for vectors that nearly coincide.

    The vectors are drawn at random, each twice, so that the product of each pair is the identity, to rounding; the two
    of a pair then have opposite gradients and come apart.  A vector shorter than ``1e-18`` counts as the first unit
    vector and has no gradient.

    Args:
        event_shape: an ``input_dim`` or the shape of one event, flattened in row-major order.
        num_reflections: :math:`k`; by default the largest even number up to the size of an event (at least 2), with
            which every rotation can be reached.  An even number gives rotations; an odd one a rotation and a
            reflection, and then the last one is there from the start.

    Raises:
        ValueError: if ``num_reflections`` is no positive integer.

    References:
        Improving Variational Auto-Encoders using Householder Flow (Tomczak & Welling, 2016), arXiv:1611.09630.
    """

    sampling_cost = density_cost = "1 product"

    def __init__(self, event_shape: int | Iterable[int], num_reflections: int | None = None) -> None:
        super().__init__(event_shape)
        size = self.event_shape.numel()
        count = max(size - size % 2, 2) if num_reflections is None else num_reflections
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"Householder: expected num_reflections to be an integer >= 1, got {num_reflections!r}")
        vectors = torch.randn((count + 1) // 2, size)
        self.vectors = nn.Parameter(vectors.repeat_interleave(2, 0)[:count].contiguous())

    def _unit(self) -> tuple[Tensor, Tensor]:
        """The unit vectors, and the strict upper triangle of what :math:`T` is twice the inverse of."""
        norm = torch.linalg.vector_norm(self.vectors.detach(), dim=-1, keepdim=True)
        first = torch.zeros_like(self.vectors.detach())
        first[..., 0] = 1
        vectors = torch.where(norm < _SHORTEST, first, self.vectors)
        unit = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        # Under autocast the product comes in a low precision, which solves do not have.
        return unit, 2 * (unit @ unit.mT).triu(1).to(unit.dtype)

    def _turn(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        unit, above = self._unit()
        rows = _rows(self, value).to(unit.dtype)
        seen = (rows @ unit.mT).to(unit.dtype)
        matrix = above if inverse else above.mT
        seen = torch.linalg.solve_triangular(matrix, seen, upper=inverse, left=False, unitriangular=True)
        rows = rows - 2 * seen @ unit
        return rows.reshape(value.shape), rows.new_zeros(()).expand(value.shape[: value.dim() - len(self.event_shape)])

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._turn(x, inverse=False)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._turn(y, inverse=True)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_reflections={len(self.vectors)}"
