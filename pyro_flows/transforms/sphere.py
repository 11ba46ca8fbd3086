"""A recursive flow on the sphere: heights by splines on an interval, and the circle below them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pyro.distributions.constraints as pyro_constraints
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_flows.core.checks import event_size, integer
from pyro_flows.core.transform import FlowTransform
from pyro_flows.nets.activations import Activation
from pyro_flows.nets.dense import MLP
from pyro_flows.univariate.spline import Spline

__all__ = ["RecursiveSphere"]


class RecursiveSphere(FlowTransform):
    r"""Moves points of the unit sphere :math:`S^{n-1} \subset R^n`: their heights one after another, then the circle.

    With :math:`\rho_k = |x_{1:k}|`, the height :math:`h_k = x_k / \rho_k \in [-1, 1]` of level :math:`k = n, \dots, 3`
    and the angle :math:`\varphi` of :math:`(x_1, x_2)` are coordinates of the sphere, whose surface measure is
    :math:`d\varphi \prod_k (1 - h_k^2)^{(k-3)/2} dh_k`.  A rational-quadratic spline of :math:`[-1, 1]` onto itself
    moves each height, and a circular one the angle:

    .. math::
        h_k' = g_k(h_k; \theta_k(h'_{>k}, c)), \qquad \varphi' = g_2(\varphi; \theta_2(h'_{>2}, c)), \qquad
        \log|\det| = \log g_2' + \sum_{k \ge 3} \log g_k' + \frac{k - 3}{2} \log \frac{1 - h_k'^2}{1 - h_k^2},

    with respect to the surface measure on both sides.  Both directions are exact and cost one pass of ``n - 1`` small
    networks.

    Each level's parameters are multiplied by the radius :math:`\rho'_k` of what is left, so its map fades to the
    identity at the poles of the levels above.  There the map has a derivative and the density is continuous, with
    slopes in every direction; those slopes need not fit together, so the log-density may have the tip of a cone at a
    pole.  The log-density has kinks at the knots, as those of all such splines.

    Off the sphere, :math:`f(x) = |x| f(x / |x|)`, a map of :math:`R^n` without the origin whose determinant is the one
    above.  The origin gives NaN.

    Args:
        input_dim: the number :math:`n \ge 2` of coordinates.
        axis: the coordinate that is the first height, from ``-input_dim`` to ``input_dim - 1``; the others follow it
            cyclically.
        bins: number of bins of each spline.
        context_dim: size of the context, 0 for none.
        hidden_dims, residual, activation: options of the networks, :class:`~pyro_flows.nets.MLP`.

    Raises:
        ValueError: for fewer than two coordinates or an axis that is not among them.

    Example:
        >>> layer = pf.transforms.RecursiveSphere(3)
        >>> x = torch.nn.functional.normalize(torch.randn(5, 3), dim=-1)
        >>> torch.allclose(layer(x).norm(dim=-1), torch.ones(5))
        True

    References:
        Normalizing Flows on Tori and Spheres (Rezende et al., 2020), arXiv:2002.02428, section 2.3.
    """

    half_precision = False
    flip: Tensor  # the places of the parameters of the same spline seen from its other end

    def __init__(
        self,
        input_dim: int,
        *,
        axis: int = -1,
        bins: int = 16,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64, 64),
        residual: bool = False,
        activation: Activation = "silu",
    ) -> None:
        count = integer("RecursiveSphere", "input_dim", input_dim, 2)
        super().__init__(event_size(count), context_dim)
        if isinstance(axis, bool) or not isinstance(axis, int) or not -count <= axis < count:
            raise ValueError(f"RecursiveSphere: expected axis from {-count} to {count - 1}, got {axis!r}")
        self.turn = count - 1 - axis % count
        self.circle, self.interval = Spline(bins, boundary="circular"), Spline(bins, boundary="interval")
        steps = torch.arange(bins).flip(0)
        flip = torch.cat((steps, steps + bins, torch.arange(2 * bins, 3 * bins + 1).flip(0)))
        self.register_buffer("flip", flip, persistent=False)
        # By level, the circle first.
        self.nets = nn.ModuleList(
            MLP(
                count - level,
                1,
                num_params=(self.circle if level == 2 else self.interval).num_params,
                hidden_dims=hidden_dims,
                context_dim=context_dim,
                residual=residual,
                activation=activation,
            )
            for level in range(2, count + 1)
        )
        cost = f"{count - 1} pass" + "es" * (count > 2)
        self.sampling_cost = self.density_cost = cost

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def domain(self) -> constraints.Constraint:
        """The sphere."""
        return pyro_constraints.sphere

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def codomain(self) -> constraints.Constraint:
        """The sphere."""
        return pyro_constraints.sphere

    def _params(self, level: int, heights: list[Tensor], fade: Tensor, context: Tensor | None) -> Tensor:
        """Parameters of a level's spline, shape ``(*batch, num_params)``."""
        seen = torch.stack(heights, -1) if heights else fade.new_empty((*fade.shape, 0))
        params = cast(Tensor, self.nets[level - 2](seen, context)).squeeze(-2)
        return params * fade.unsqueeze(-1) if heights else params

    def _move(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        value = value.roll(self.turn, -1)
        squares = (value * value).cumsum(-1)
        tiny, most = torch.finfo(value.dtype).tiny, 1 - torch.finfo(value.dtype).eps
        size = value.shape[-1]
        radius = squares[..., -1].sqrt()
        # What is left at a pole of the levels above has no direction: any other will do.
        inner = squares > tiny
        safe = torch.where(inner, squares, 1.0)
        fade, scale = torch.ones_like(radius), torch.ones_like(radius)
        ladj = torch.zeros_like(radius)
        heights: list[Tensor] = []
        moved: list[Tensor] = []
        for level in range(size, 2, -1):
            left, whole = inner[..., level - 1], safe[..., level - 1].sqrt()
            if level == size:  # the origin gives NaN
                left, whole = torch.ones_like(left), radius
            here = torch.where(left, value[..., level - 1], whole)
            upper = here > 0
            below = torch.where(left, squares[..., level - 2], 0.0)
            # The share of the height's interval that lies beyond, on the nearer end: exact near a pole.
            share = below / (2 * whole * (whole + here.abs()))
            params = self._params(level, heights, fade, context)
            params = torch.where(upper.unsqueeze(-1), params.index_select(-1, self.flip), params)
            other, slope = (self.interval.inverse if inverse else self.interval.forward)(share, params)
            other = other.clamp(max=most)
            off = share > tiny
            grown = torch.where(off, other / torch.where(off, share, 1.0), slope.exp())
            ratio = grown * (1 - other) / (1 - share)  # of 1 - h^2
            height = torch.where(upper, 1 - 2 * other, 2 * other - 1)
            ladj = ladj + slope
            if level > 3:
                ladj = ladj + 0.5 * (level - 3) * ratio.log()
            moved.append(scale * torch.where(left, whole * height, value[..., level - 1]))
            heights.append(torch.where(upper, 1 - 2 * share, 2 * share - 1) if inverse else height)
            scale = scale * ratio.sqrt()
            known = share if inverse else other
            off = known > tiny
            fade = fade * torch.where(off, 2 * (torch.where(off, known, 0.5) * (1 - known)).sqrt(), 0.0)
        off = inner[..., 1]
        first, second = value[..., 0], value[..., 1]
        angle = torch.atan2(torch.where(off, second, 0.0), torch.where(off, first, 1.0))
        params = self._params(2, heights, fade, context)
        other, slope = (self.circle.inverse if inverse else self.circle.forward)(angle, params)
        # The rotation of the point itself has a derivative at the pole, unlike its angle.
        cos, sin = torch.cos(other - angle) * scale, torch.sin(other - angle) * scale
        moved += [cos * second + sin * first, cos * first - sin * second]
        result = torch.stack(moved[::-1], -1)
        # Rounding must not lead off the sphere.
        result = result * (radius / torch.linalg.vector_norm(result, dim=-1)).unsqueeze(-1)
        return result.roll(-self.turn, -1), ladj + slope

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._move(x, context, False)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._move(y, context, True)
