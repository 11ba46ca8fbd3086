"""The shape of members' densities along lines through their modes, which Laplace's approximation takes for normal."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PLACES", "Shapes", "shapes_along"]

REACH = 4.8  # standard deviations on each side
NODES = 10  # with gradients, beside the mode
MESH = 97  # so that the quantiles are on it
SCORES = 13  # quantiles to which maps are fitted
WIDEST = 2.4  # of them, in standard deviations
ROUNDS = 4
MOST = 1.0  # largest logarithm of a mass, and largest shift, that is taken for known
EDGE = 0.02  # density at the ends, in parts of the mode's, that is as large as it may be


class Shapes(NamedTuple):
    r"""Lines' densities, each that of :math:`m + s \sinh(e^\tau \operatorname{asinh} x + \epsilon)`."""

    log_mass: Tensor
    """Logarithm of the integral, in parts of that of the normal density with the mode's curvature."""
    mean: Tensor
    """:math:`m`, in standard deviations of this normal."""
    scale: Tensor
    """:math:`s`, in the same."""
    shift: Tensor
    r""":math:`\epsilon`."""
    tail: Tensor
    r""":math:`\tau`."""


def _places() -> Tensor:
    """Extremes of Chebyshev's polynomial, the mode among them."""
    return REACH * torch.linspace(-math.pi, 0.0, NODES + 1, dtype=torch.float64, device="cpu").cos()


_ALL = _places()
PLACES = _ALL[_ALL.abs() > 1e-9]
"""Places on a line, in standard deviations from the mode, at which its derivative must be known."""
_GRID = torch.linspace(-REACH, REACH, MESH, dtype=torch.float64, device="cpu")
_X = torch.linspace(-WIDEST, WIDEST, SCORES, dtype=torch.float64, device="cpu")


def _integral() -> Tensor:
    """Returns the matrix from derivatives at all places to values on the grid that are 0 at the mode."""
    power = torch.arange(NODES + 1, dtype=torch.float64, device="cpu")
    polynomial = torch.linalg.inv((_ALL[:, None] / REACH) ** power)
    return REACH * ((_GRID[:, None] / REACH) ** (power + 1) / (power + 1)) @ polynomial


def _fitting() -> Tensor:
    """Returns the least squares from quantiles to the mean, scale, shift and tail of a nearly normal line."""
    root = (1 + _X**2).sqrt()
    basis = torch.stack([torch.ones_like(_X), _X, root, root * _X.asinh()], -1)
    weight = (-0.25 * _X**2).exp()[:, None]
    return torch.linalg.pinv(weight * basis) * weight.mT


_INTEGRAL, _FITTING = _integral(), _fitting()


def _scores(density: Tensor) -> Tensor:
    """Returns the normal scores of cumulative sums along the grid."""
    below = torch.cat([density[..., :1] * 0, 0.5 * (density[..., 1:] + density[..., :-1]).cumsum(-1)], -1)
    return torch.special.ndtri((below[..., 1:-1] / below[..., -1:]).clamp(1e-12, 1 - 1e-12))


def shapes_along(slopes: Tensor) -> Shapes:
    r"""Finds the shapes of log-densities from their derivatives at :data:`PLACES`, shape ``(..., 10)``.

    The derivative is a polynomial through these and its zero at the mode. Its integral gives the density on a grid, and
    its quantiles the map from a normal variable, by least squares. A line with another maximum or a heavy tail within
    reach keeps the normal shape.
    """
    slopes = torch.cat([slopes[..., : NODES // 2], 0 * slopes[..., :1], slopes[..., NODES // 2 :]], -1)
    depth = slopes @ _INTEGRAL.mT
    normal = (-0.5 * _GRID**2).exp()
    density = depth.clamp(max=10.0).exp()
    log_mass = (density.sum(-1) / normal.sum()).log()
    at_ends = density[..., [0, -1]].amax(-1)
    known = (depth.amax(-1) < 0.1) & (at_ends < EDGE) & (log_mass.abs() < MOST)
    # Scores at the grid's places, without the grid's own error, are nearly the places.
    gap = _scores(density) - _scores(normal)
    at = ((_X + REACH) / (2 * REACH) * (MESH - 1)).round().long() - 1
    bend = (gap[..., at + 1] - gap[..., at - 1]) / (2 * (_GRID[1] - _GRID[0]))
    here = gap[..., at]
    quantiles = _X - here + here * bend
    found = quantiles @ _FITTING.mT
    mean, scale = found[..., 0], found[..., 1].clamp(min=0.1)
    shift, tail = found[..., 2] / scale, found[..., 3] / scale
    for _ in range(ROUNDS):
        shift, tail = shift.clamp(-MOST, MOST), tail.clamp(-0.5, 0.5)
        made = (tail.exp()[..., None] * _X.asinh() + shift[..., None]).sinh()
        left = (quantiles - mean[..., None] - scale[..., None] * made) @ _FITTING.mT
        mean, scale = mean + left[..., 0], (scale + left[..., 1]).clamp(min=0.1)
        shift, tail = shift + left[..., 2] / scale, tail + left[..., 3] / scale
    known = known & (shift.abs() < MOST) & (tail.abs() < 0.5) & mean.isfinite() & scale.isfinite()
    one, none = torch.ones_like(mean), torch.zeros_like(mean)
    plain = Shapes(none, none, one, none, none)
    parts = (log_mass, mean, scale, shift, tail)
    return Shapes(*(torch.where(known, part, usual) for part, usual in zip(parts, plain, strict=True)))
