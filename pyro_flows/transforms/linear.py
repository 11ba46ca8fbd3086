"""Linear transforms: LU-decomposed matrices of events and channels, Householder reflections, and a fixed coloring."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flows.core.checks import choice, event_size, integer, permutation_of
from pyro_flows.core.modes import exact_products
from pyro_flows.core.transform import FlowTransform

__all__ = ["Coloring", "Conv1x1", "Householder", "LULinear"]


def _rows(transform: FlowTransform, value: Tensor) -> Tensor:
    """The events as rows of a matrix."""
    return value.reshape(-1, transform.event_shape.numel())


# A matrix in LU form, packed as LAPACK does; rows are events.


def _lu_product(rows: Tensor, factors: Tensor) -> Tensor:
    rows = rows * factors.diagonal().exp() + F.linear(rows, factors.triu(1))
    return rows + F.linear(rows, factors.tril(-1))


def _lu_solve(rows: Tensor, factors: Tensor) -> Tensor:
    """The inverse of ``L U`` applied to each row."""
    upper = factors.triu(1) + torch.diag_embed(factors.diagonal().exp())
    rows = torch.linalg.solve_triangular(factors.tril(-1).mT, rows, upper=True, left=False, unitriangular=True)
    return torch.linalg.solve_triangular(upper.mT, rows, upper=False, left=False)


class LULinear(FlowTransform):
    r"""An invertible matrix by its LU decomposition, :math:`y = P L U x + b`.

    :math:`L` is lower triangular with a unit diagonal, :math:`U` upper triangular with a positive one, and :math:`P` a
    fixed permutation, :math:`(P z)_i = z_{\pi(i)}`; :math:`\log|\det| = \sum_i \log U_{ii}`.  Without a permutation it
    starts as the identity.  Base to data costs two products, data to base two triangular solves; both are exact and
    quadratic in the size of an event.

    ``factors`` holds :math:`L` below the diagonal, :math:`U` above it, and :math:`\log U_{ii}` on it.

    Args:
        event_shape: an ``input_dim`` or the shape of one event, flattened in row-major order.
        permutation: :math:`\pi`: ``"identity"``, ``"reverse"``, ``"random"`` (saved in the ``state_dict``) or indices.
        bias: whether there is a :math:`b`.

    Raises:
        ValueError: if the indices are no permutation.

    Example:
        >>> layer = pf.LULinear(3, permutation="random")
        >>> y, ladj = layer.forward_and_ladj(torch.randn(5, 3))
        >>> y.shape, ladj.shape
        (torch.Size([5, 3]), torch.Size([5]))

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018), section 3.2, arXiv:1807.03039.
        Neural Spline Flows (Durkan et al., 2019), arXiv:1906.04032.
    """

    sampling_cost = "1 product"
    affine = True
    half_precision = False  # torch solves triangular systems in float32 and float64 only
    density_cost = "1 solve"
    bias: Tensor | None
    permutation: Tensor | None

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
        fixed = not (isinstance(permutation, str) and permutation == "identity")
        indices = permutation_of("LULinear", size, permutation, ("identity", "reverse", "random")) if fixed else None
        self.register_buffer("permutation", indices, persistent=drawn)

    @property
    def log_diagonal(self) -> Tensor:
        """Logarithm of the diagonal of :math:`U`; its sum is the log-determinant."""
        return self.factors.diagonal()

    @exact_products
    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = _lu_product(_rows(self, x), self.factors)
        if self.permutation is not None:
            rows = rows.index_select(-1, self.permutation)
        if self.bias is not None:
            rows = rows + self.bias
        return rows.reshape(x.shape), self.log_diagonal.sum().expand(self._batch_of(x))

    @exact_products
    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # Under autocast solves take the factors' dtype.
        rows = _rows(self, y).to(self.factors.dtype)
        if self.bias is not None:
            rows = rows - self.bias
        if self.permutation is not None:
            rows = rows.index_select(-1, torch.argsort(self.permutation))
        rows = _lu_solve(rows, self.factors)
        return rows.reshape(y.shape), -self.log_diagonal.sum().expand(self._batch_of(y))


def _start(size: int, start: str) -> tuple[Tensor, Tensor, Tensor]:
    """Packed factors, permutation and signs of the first matrix of a 1x1 convolution."""
    if start == "rotation":
        matrix = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
        matrix[0] *= torch.linalg.det(matrix).sign()
    else:
        matrix = torch.eye(size, dtype=torch.float64)[torch.randperm(size) if start == "permutation" else slice(None)]
    pivots, lower, upper = torch.linalg.lu(matrix)
    signs = upper.diagonal().sign()
    # L U = S (S L S) (S U): the last factor's diagonal is positive.
    factors = (signs[:, None] * lower * signs).tril(-1) + (signs[:, None] * upper).triu(1)
    factors = factors + torch.diag_embed(upper.diagonal().abs().log())
    permutation = pivots.argmax(1)
    return factors.to(torch.get_default_dtype()), permutation, signs[permutation].to(torch.get_default_dtype())


def _spread(bias: Tensor, transform: FlowTransform) -> Tensor:
    return bias.reshape(-1, *(1 for _ in transform.event_shape[1:]))


class Conv1x1(FlowTransform):
    r"""An invertible 1x1 convolution: the same matrix for the channels of every place, :math:`y = S P L U x + b`.

    :math:`P L U` is as in :class:`LULinear`; without the diagonal :math:`S` of fixed signs, some rotations are out of
    reach.  :math:`\log|\det|` is :math:`\sum_i \log U_{ii}` times the number of places.  Each call makes the matrix, or
    its inverse by two triangular solves, once; then each direction costs one small product per place.

    Args:
        event_shape: ``(C, H, W)``, ``(C, T)``, or any other with channels first.
        start: the first matrix: a random ``"rotation"`` (paper), a random ``"permutation"``, or the ``"identity"``.
            Permutation and signs stay fixed and are saved.
        bias: whether there is a :math:`b`, one number per channel.

    Raises:
        ValueError: for an unknown ``start``.

    Example:
        >>> layer = pf.transforms.Conv1x1((3, 8, 8))
        >>> layer(torch.randn(5, 3, 8, 8)).shape
        torch.Size([5, 3, 8, 8])

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018), section 3.2, arXiv:1807.03039.
    """

    sampling_cost = density_cost = "1 product"
    affine = True
    half_precision = False  # torch solves triangular systems in float32 and float64 only
    bias: Tensor | None
    permutation: Tensor
    signs: Tensor

    def __init__(self, event_shape: Iterable[int], *, start: str = "rotation", bias: bool = False) -> None:
        super().__init__(event_size(event_shape))
        choice("Conv1x1", "start", start, ("rotation", "permutation", "identity"))
        channels = self.event_shape[0]
        factors, permutation, signs = _start(channels, start)
        self.factors = nn.Parameter(factors)
        self.register_parameter("bias", nn.Parameter(torch.zeros(channels)) if bias else None)
        drawn = start != "identity"
        self.register_buffer("permutation", permutation, persistent=drawn)
        self.register_buffer("signs", signs, persistent=drawn)

    @property
    def _places(self) -> int:
        return self.event_shape[1:].numel()

    @property
    def matrix(self) -> Tensor:
        """The matrix that multiplies each place, shape ``(C, C)``."""
        columns = _lu_product(self._eye(), self.factors)
        return columns.index_select(1, self.permutation).mT * self.signs.unsqueeze(1)

    @property
    def inverse_matrix(self) -> Tensor:
        """The inverse of ``matrix``."""
        columns = self._eye().index_select(1, torch.argsort(self.permutation)) * self.signs.unsqueeze(1)
        return _lu_solve(columns, self.factors).mT

    def _eye(self) -> Tensor:
        return torch.eye(self.event_shape[0], dtype=self.factors.dtype, device=self.factors.device)

    def _ladj(self, value: Tensor) -> Tensor:
        return (self.factors.diagonal().sum() * self._places).expand(self._batch_of(value))

    def _at_each_place(self, matrix: Tensor, value: Tensor) -> Tensor:
        columns = value.reshape(*self._batch_of(value), self.event_shape[0], self._places)
        return torch.matmul(matrix, columns).to(value.dtype).reshape(value.shape)

    @exact_products
    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self._at_each_place(self.matrix, x)
        return y if self.bias is None else y + _spread(self.bias, self), self._ladj(x)

    @exact_products
    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        value = y if self.bias is None else y - _spread(self.bias, self)
        return self._at_each_place(self.inverse_matrix, value), -self._ladj(y)


# Its square is still a normal number in float32.
_SHORTEST = 1e-18


class Householder(FlowTransform):
    r"""An orthogonal matrix by Householder reflections, :math:`y = H_1 \cdots H_k x`, with zero log-determinant.

    :math:`H_i = I - 2 u_i u_i^\top` with :math:`u_i = v_i / |v_i|`.  The product is :math:`I - V^\top T V` with rows
    :math:`u_i` of :math:`V` and a triangular :math:`T`: each direction costs two products with :math:`V` and one
    triangular solve of size :math:`k`.  The matrix :math:`Q` is orthogonal to rounding: the largest entry of
    :math:`Q^\top Q - I` was below ten machine epsilons for up to 512 random vectors in as many dimensions, and below
    :math:`2k` of them for nearly equal vectors.

    Each random vector is drawn twice, so the map starts as the identity, to rounding; the two have opposite gradients
    and come apart.  A vector shorter than ``1e-18`` counts as the first unit vector and has no gradient.

    Args:
        event_shape: an ``input_dim`` or the shape of one event, flattened in row-major order.
        num_reflections: :math:`k`; by default the largest even number up to the size of an event (at least 2), which
            reaches every rotation.  An odd one adds a reflection.

    Raises:
        ValueError: if ``num_reflections`` is no positive integer.

    Example:
        >>> layer = pf.transforms.Householder(3)
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(layer(x).norm(dim=-1), x.norm(dim=-1))
        True

    References:
        Improving Variational Auto-Encoders using Householder Flow (Tomczak & Welling, 2016), arXiv:1611.09630.
    """

    sampling_cost = density_cost = "1 product"
    affine = True
    half_precision = False  # torch solves triangular systems in float32 and float64 only

    def __init__(self, event_shape: int | Iterable[int], num_reflections: int | None = None) -> None:
        super().__init__(event_shape)
        size = self.event_shape.numel()
        count = max(size - size % 2, 2) if num_reflections is None else num_reflections
        integer("Householder", "num_reflections", count)
        vectors = torch.randn((count + 1) // 2, size)
        self.vectors = nn.Parameter(vectors.repeat_interleave(2, 0)[:count].contiguous())

    def _unit(self) -> tuple[Tensor, Tensor]:
        """The unit vectors, and the strict upper triangle of :math:`2 T^{-1}`."""
        norm = torch.linalg.vector_norm(self.vectors.detach(), dim=-1, keepdim=True)
        first = torch.zeros_like(self.vectors.detach())
        first[..., 0] = 1
        vectors = torch.where(norm < _SHORTEST, first, self.vectors)
        unit = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        # Under autocast the product has a dtype that solves refuse.
        return unit, 2 * (unit @ unit.mT).triu(1).to(unit.dtype)

    @exact_products
    def _turn(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        unit, above = self._unit()
        rows = _rows(self, value).to(unit.dtype)
        seen = (rows @ unit.mT).to(unit.dtype)
        matrix = above if inverse else above.mT
        seen = torch.linalg.solve_triangular(matrix, seen, upper=inverse, left=False, unitriangular=True)
        rows = rows - 2 * seen @ unit
        return rows.reshape(value.shape), rows.new_zeros(()).expand(self._batch_of(value))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._turn(x, inverse=False)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._turn(y, inverse=True)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_reflections={len(self.vectors)}"


class Coloring(FlowTransform):
    r"""A fixed affine map that gives a standard normal a mean and a covariance, :math:`y = t + B c + L x`.

    :math:`L` is lower triangular with a positive diagonal, so a standard normal base becomes :math:`N(t + B c, L
    L^\top)`; with a context :math:`c` its mean is a linear regression.  :math:`\log|\det| = \sum_i \log L_{ii}`.  All
    numbers are buffers, and nothing is learned.  Base to data costs one product, data to base one triangular solve,
    both quadratic in the size of an event.

    Args:
        loc: :math:`t`, shape ``event_shape``; events are flattened in row-major order.
        factor: :math:`L`, shape ``(D, D)`` for events of :math:`D` numbers; what is above its diagonal is left out.
        slope: :math:`B`, shape ``(D, context_dim)``; ``None`` for no context.

    Raises:
        ValueError: if shapes do not fit, numbers are not finite, or the diagonal is not positive.

    Example:
        >>> covariance = torch.tensor([[4.0, 2.0], [2.0, 3.0]])
        >>> factor = torch.linalg.cholesky(covariance)
        >>> flow = pf.Flow(pf.transforms.Coloring(torch.zeros(2), factor))
        >>> normal = dist.MultivariateNormal(torch.zeros(2), covariance)
        >>> torch.allclose(flow.log_prob(torch.ones(2)), normal.log_prob(torch.ones(2)))
        True

    References:
        Optimal Whitening and Decorrelation (Kessy, Lewin & Strimmer, 2018), whose Cholesky whitening is the inverse,
        arXiv:1512.00809.
    """

    sampling_cost = "1 product"
    half_precision = False  # torch solves triangular systems in float32 and float64 only
    density_cost = "1 solve"
    affine = True
    order, lower = "channel", True  # triangular in row-major order
    loc: Tensor
    factor: Tensor
    slope: Tensor | None

    def __init__(self, loc: Tensor, factor: Tensor, slope: Tensor | None = None) -> None:
        super().__init__(loc.shape, 0 if slope is None else slope.shape[-1])
        size = self.event_shape.numel()
        fits = factor.shape == (size, size) and (slope is None or slope.shape == (size, self.context_dim))
        if not fits:
            raise ValueError(
                f"Coloring: expected factor of shape {(size, size)} and slope of shape ({size}, context_dim) for "
                f"events of {size} numbers, got {tuple(factor.shape)} and "
                f"{None if slope is None else tuple(slope.shape)}"
            )
        given = {"loc": loc, "factor": factor.tril(), "slope": slope}
        for name, value in given.items():
            self.register_buffer(name, None if value is None else value.detach().clone())
        if self.loc.is_meta:
            return
        finite = all(value.isfinite().all() for value in given.values() if value is not None)
        if not (finite and (self.factor.diagonal() > 0).all()):
            raise ValueError("Coloring: expected finite numbers, and a factor with a positive diagonal")

    @torch.no_grad()
    def place(self, loc: Tensor, factor: Tensor, slope: Tensor | None = None) -> None:
        """Sets the numbers; shapes must be those that are there."""
        given = {"loc": loc, "factor": factor} | ({} if slope is None else {"slope": slope})
        held = dict(self.named_buffers())
        shapes = [{name: value.shape for name, value in each.items()} for each in (held, given)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"Coloring: expected shapes {shapes[0]}, got {shapes[1]}")
        for name, buffer in held.items():
            buffer.copy_(given[name])
        self.clear_cache()

    def _mean(self, context: Tensor | None) -> Tensor:
        """The mean of flat events."""
        mean = self.loc.flatten()
        return mean if context is None or self.slope is None else F.linear(context, self.slope, mean)

    def _ladj(self, value: Tensor) -> Tensor:
        return self.factor.diagonal().log().sum().expand(self._batch_of(value))

    @exact_products
    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        flat = x.flatten(-len(self.event_shape))
        return (F.linear(flat, self.factor) + self._mean(context)).reshape(x.shape), self._ladj(x)

    @exact_products
    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        flat = y.flatten(-len(self.event_shape)) - self._mean(context)
        # Under autocast solves take the factor's dtype.
        rows = flat.reshape(-1, flat.shape[-1]).to(self.factor.dtype)
        solved = torch.linalg.solve_triangular(self.factor.mT, rows, upper=True, left=False)
        return solved.reshape(y.shape), -self._ladj(y)

    def log_slopes(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-slopes from data to base, of the shape of ``y``."""
        return -self.factor.diagonal().log().reshape(self.event_shape).expand(y.shape)
