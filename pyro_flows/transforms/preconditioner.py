"""The affine end of a guide: location, width and directions of the posterior."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flows.core.modes import exact_products
from pyro_flows.core.transform import FlowTransform

__all__ = ["Preconditioner"]


class Preconditioner(FlowTransform):
    r"""A fixed affine map after a learned one, :math:`y = \mu + S (A x + b)`.

    :math:`\mu` (``loc``) and :math:`S` (``scale``) are buffers; :math:`b` and the triangular (or diagonal) :math:`A`
    are learned and start at 0 and the identity, so steps are measured in the scale of the posterior.  Base to data
    costs one product, data to base one triangular solve.

    Args:
        loc: shape ``(input_dim,)``.
        scale: shape ``(input_dim, input_dim)``, lower triangular with a positive diagonal, or ``(input_dim,)``,
            positive.

    Raises:
        ValueError: if shapes do not fit, or a diagonal is not positive.

    Example:
        >>> layer = pf.transforms.Preconditioner(torch.tensor([1.0, 2.0]), torch.eye(2))
        >>> layer(torch.zeros(2)).tolist()
        [1.0, 2.0]

    References:
        Automatic Differentiation Variational Inference (Kucukelbir et al., 2017), arXiv:1603.00788; Pathfinder (Zhang
        et al., 2022), arXiv:2108.03782.
    """

    sampling_cost = "1 product"
    affine = True
    half_precision = False  # torch solves triangular systems in float32 and float64 only
    density_cost = "1 solve"
    loc: Tensor
    scale: Tensor
    lower: Tensor | None

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(loc.shape[-1:])
        size = self.event_shape[0]
        if loc.dim() != 1 or scale.shape not in ((size,), (size, size)):
            raise ValueError(
                "Preconditioner: expected loc of shape (D,) and scale of shape (D,) or (D, D), got "
                f"{tuple(loc.shape)} and {tuple(scale.shape)}"
            )
        full = scale.dim() == 2
        diagonal = scale.diagonal() if full else scale
        if not (loc.isfinite().all() and scale.isfinite().all() and (diagonal > 0).all()):
            raise ValueError("Preconditioner: expected a finite loc and a finite scale with a positive diagonal")
        self.register_buffer("loc", loc.detach().clone())
        self.register_buffer("scale", (scale.tril() if full else scale).detach().clone())
        self.shift = nn.Parameter(torch.zeros_like(loc))
        self.log_diagonal = nn.Parameter(torch.zeros_like(loc))
        # Read below the diagonal only.
        self.register_parameter("lower", nn.Parameter(torch.zeros_like(scale)) if full else None)

    def arguments(self) -> tuple[tuple[object, ...], dict[str, object]]:
        """The constructor's arguments."""
        return (self.loc, self.scale), {}

    @property
    def full(self) -> bool:
        """Whether the scale is a matrix."""
        return self.scale.dim() == 2

    def _learned(self) -> tuple[Tensor, Tensor, Tensor]:
        """Matrix (or diagonal), location, and log-determinant of the whole."""
        if self.lower is not None:
            inner = self.lower.tril(-1) + torch.diag_embed(self.log_diagonal.exp())
            matrix, log_fixed = self.scale @ inner, self.scale.diagonal().log()
            moved = self.scale @ self.shift
        else:
            matrix, log_fixed = self.scale * self.log_diagonal.exp(), self.scale.log()
            moved = self.scale * self.shift
        return matrix, self.loc + moved, (log_fixed + self.log_diagonal).sum()

    @exact_products
    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        fixed, stretch = self.scale, self.log_diagonal.exp()
        ladj = ((fixed.diagonal() if self.full else fixed).log() + self.log_diagonal).sum().expand(x.shape[:-1])
        if self.lower is None:
            return torch.addcmul(self.loc, torch.addcmul(self.shift, x, stretch), fixed), ladj
        # Two products of vectors, for few rows cheaper than one of matrices.
        inner = torch.addcmul(F.linear(x, self.lower.tril(-1), self.shift), x, stretch)
        return F.linear(inner, fixed, self.loc), ladj

    @exact_products
    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        matrix, loc, ladj = self._learned()
        if not self.full:
            return (y - loc) / matrix, -ladj.expand(y.shape[:-1])
        rows = (y - loc).reshape(-1, y.shape[-1])
        x = torch.linalg.solve_triangular(matrix.mT, rows, upper=True, left=False)
        return x.reshape(y.shape), -ladj.expand(y.shape[:-1])

    @torch.no_grad()
    def fold(self) -> None:
        """Moves the learned part into ``loc`` and ``scale``; the map stays the same."""
        matrix, loc, _ = self._learned()
        self.place(loc, matrix)

    @torch.no_grad()
    def place(self, loc: Tensor, scale: Tensor) -> None:
        """Sets the fixed part and resets the learned one."""
        self.loc.copy_(loc)
        self.scale.copy_(scale if scale.dim() == self.scale.dim() else torch.diag_embed(scale))
        for parameter in self.parameters():
            parameter.zero_()
        self.clear_cache()
