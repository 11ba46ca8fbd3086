"""Densities in one or two dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch.distributions import Distribution

from pyro_flows.core.checks import integer
from pyro_flows.infer.density.names import by_name
from pyro_flows.plots.canvas import DATA, MODEL, SHADES, Axes, bars, canvas, reach, thinned
from pyro_flows.plots.inputs import columns_of, distribution_of, drawn_rows, numbers, rows_of, score, single

__all__ = ["density", "picture"]


def density(
    model: Any,
    *,
    bounds: Any = None,
    points: int | None = None,
    context: Any = None,
    data: Any = None,
    ax: Axes | None = None,
    **style: Any,
) -> Axes:
    """Draws the density of a model: a line for one dimension, a picture for two.

    Colors grow with the square root of the density, so that thin bridges and tails show, up to full color where only a
    hundredth of the mass is denser.  The cost is one evaluation a grid point.

    Args:
        model: a model of one or two dimensions, without a batch shape.
        bounds: ``(low, high)``, or a pair of these for two dimensions; by default the range of the data or draws.
        points: grid points along each dimension; by default 500 for one dimension, 200 for two.
        context: one context, shape ``(context_dim,)``.
        data: rows to show: a histogram in one dimension, at most 1000 points in two.
        ax: the axes to draw into.
        **style: options of ``Axes.plot`` in one dimension, ``Axes.pcolormesh`` in two, e.g. ``cmap`` or ``norm``.

    Raises:
        ValueError: for more dimensions, a batch shape, a density of NaN, or invalid arguments.

    Example:
        >>> axes = pf.plots.density(pf.Flow(pf.realnvp(2)), points=50)
        >>> axes.figure.savefig("density.png")
    """
    made = single(distribution_of(model, context, "density"), "density", (1, 2))
    names = columns_of(model, data)
    rows = (
        None if data is None else rows_of(by_name(data, names, "density", "data"), made.event_shape, "density", "data")
    )
    limits = _limits(bounds, made, rows)
    dims = len(limits)
    count = (500, 200)[dims - 1] if points is None else integer("density", "points", points, 2)
    grids = [np.linspace(low, high, count) for low, high in limits]
    mesh = np.stack(np.meshgrid(*grids, indexing="ij"), -1).reshape(-1, dims)
    height = np.exp(score(made, mesh, "density")).reshape((count,) * dims)
    ax = canvas(ax)
    if dims == 2:
        picture(ax, grids, height, None if rows is None else thinned(rows, 1000), style)
        if names is not None:
            ax.set(xlabel=names[0], ylabel=names[1])
        return ax
    (grid,) = grids
    if rows is not None:
        ax.stairs(*bars(rows[:, 0], grid[0], grid[-1]), fill=True, color=DATA, alpha=0.25, label="data")
    look: dict[str, Any] = {} if "color" in style or "c" in style else {"color": MODEL}
    ax.plot(grid, height, **look, **style)
    ax.set(xlim=(grid[0], grid[-1]), ylabel="density", xlabel="" if names is None else names[0])
    ax.set_ylim(bottom=0)
    return ax


def _limits(bounds: Any, made: Distribution, rows: np.ndarray | None) -> list[tuple[float, float]]:
    dims = made.event_shape.numel()
    if bounds is not None:
        given = numbers(bounds, "density", "bounds")
        if given.shape == (2,):
            given = given[None]
        if given.shape != (dims, 2) or not (given[:, 0] < given[:, 1]).all():
            raise ValueError(
                f"density: expected bounds with low < high for {dims} dimension{'s'[: dims - 1]}, e.g. "
                f"{('(-3, 3)', '((-3, 3), (-3, 3))')[dims - 1]}, got {bounds!r}"
            )
        return [(float(low), float(high)) for low, high in given]
    if rows is None:
        rows = drawn_rows(made, 4000, "density")
    return reach(rows)


def picture(
    ax: Axes,
    grids: list[np.ndarray],
    height: np.ndarray,
    rows: np.ndarray | None,
    style: dict[str, Any],
    place: Callable[[np.ndarray], np.ndarray] | None = None,
) -> None:
    """Draws heights on a grid as colors, where they are not NaN, and rows as points, at their place in the picture."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    look: dict[str, Any] = {"cmap": LinearSegmentedColormap.from_list("flow", SHADES), "shading": "nearest"}
    look |= {"rasterized": True} | style
    if "norm" not in style:
        # A hundredth of the mass is denser than the top: a spike must not leave the picture pale.
        ranked = np.sort(height[~np.isnan(height)])[::-1]
        mass = ranked.cumsum()
        top = float(ranked[np.searchsorted(mass, 0.01 * mass[-1])]) if 0 < mass[-1] < np.inf else 1.0
        look["norm"] = PowerNorm(0.5, look.pop("vmin", 0.0), look.pop("vmax", None) or top)
    ax.pcolormesh(*grids, height.T, **look)
    if rows is not None:
        first, second = (rows if place is None else place(rows)).T
        ax.scatter(first, second, s=4, color=DATA, alpha=0.5, linewidths=0)
    ax.set(xlim=(grids[0][0], grids[0][-1]), ylim=(grids[1][0], grids[1][-1]))
