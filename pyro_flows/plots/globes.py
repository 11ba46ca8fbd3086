"""Densities on the sphere, as a map."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyro_flows.core.checks import integer
from pyro_flows.plots.canvas import FRAME, Axes, canvas, thinned
from pyro_flows.plots.densities import picture
from pyro_flows.plots.inputs import distribution_of, rows_of, score, single

__all__ = ["globe"]


def globe(
    model: Any,
    *,
    points: int = 200,
    context: Any = None,
    data: Any = None,
    ax: Axes | None = None,
    **style: Any,
) -> Axes:
    r"""Draws a density on the sphere :math:`S^2` as a map in Mollweide's projection, in which areas are true.

    The last coordinate is the height: its poles are at the top and the bottom, and the first coordinate points at the
    center.  Colors are as in :func:`~pyro_flows.plots.density`.  The cost is one evaluation a grid point.

    Args:
        model: a model of three coordinates of a unit vector, without a batch shape.
        points: grid points along the axis of the poles; twice as many along the equator.
        context: one context, shape ``(context_dim,)``.
        data: unit vectors to show, at most 1000 of them.
        ax: the axes to draw into.
        **style: options of ``Axes.pcolormesh``, e.g. ``cmap`` or ``norm``.

    Raises:
        ValueError: for other event shapes, a batch shape, a density of NaN or a support that is not the sphere.

    Example:
        >>> cap = pf.distributions.VonMisesFisher(torch.tensor([0.0, 0.0, 1.0]), 10.0)
        >>> axes = pf.plots.globe(cap, points=50)
        >>> axes.figure.savefig("globe.png")
    """
    made = single(distribution_of(model, context, "globe"), "globe", (3,))
    rows = None if data is None else rows_of(data, made.event_shape, "globe", "data")
    count = integer("globe", "points", points, 2)
    side = (np.arange(2 * count) + 0.5) / count - 1
    grids = [2 * side, side[1::2] - 0.5 / count]  # in units of the ellipse's half height
    x, y = np.meshgrid(*grids, indexing="ij")
    height = np.full(x.shape, np.nan)
    inside = 0.25 * x * x + y * y < 1
    height[inside] = np.exp(score(made, _directions(x[inside], y[inside]), "globe"))
    if not height[inside].any():
        raise ValueError(
            f"globe: the density is 0 all over the sphere; expected one of unit vectors, got the support {made.support}"
        )
    ax = canvas(ax, (6.4, 3.2))
    picture(ax, grids, height, None if rows is None else thinned(rows, 1000), style, _place)
    for line in _lines():
        ax.plot(*_place(line).T, color=FRAME, linewidth=0.4, alpha=0.6)
    turn = np.linspace(0, 2 * np.pi, 361)
    ax.plot(2 * np.cos(turn), np.sin(turn), color=FRAME, linewidth=1.0)
    ax.set(xlim=(-2.02, 2.02), ylim=(-1.02, 1.02), aspect="equal")
    ax.set_axis_off()
    return ax


def _directions(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Unit vectors at places of the map."""
    arc = np.arcsin(y)
    z = (2 * arc + np.sin(2 * arc)) / np.pi
    longitude = 0.5 * np.pi * x / np.cos(arc)
    radius = np.sqrt((1 - z) * (1 + z))
    return np.stack((radius * np.cos(longitude), radius * np.sin(longitude), z), -1)


def _place(rows: np.ndarray) -> np.ndarray:
    """Places on the map of vectors, by bisection for the arc."""
    z = rows[:, 2] / np.linalg.norm(rows, axis=-1)
    low, high = np.full_like(z, -np.pi / 2), np.full_like(z, np.pi / 2)
    for _ in range(50):
        arc = 0.5 * (low + high)
        below = 2 * arc + np.sin(2 * arc) < np.pi * z
        low, high = np.where(below, arc, low), np.where(below, high, arc)
    return np.stack((2 / np.pi * np.arctan2(rows[:, 1], rows[:, 0]) * np.cos(arc), np.sin(arc)), -1)


def _lines() -> list[np.ndarray]:
    """Every 30 degrees of latitude, and every 60 of longitude."""
    reach = np.linspace(-np.pi, np.pi, 181)[1:-1]
    lines = []
    for latitude in np.radians((-60, -30, 0, 30, 60)):
        flat = np.cos(latitude)
        lines.append(np.stack((flat * np.cos(reach), flat * np.sin(reach), np.full_like(reach, np.sin(latitude))), -1))
    for longitude in np.radians((-120, -60, 0, 60, 120)):
        flat = np.cos(reach / 2)
        lines.append(np.stack((flat * np.cos(longitude), flat * np.sin(longitude), np.sin(reach / 2)), -1))
    return lines
