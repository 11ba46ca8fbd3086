"""Draws of a model beside data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyro_flows.infer.density.names import by_name
from pyro_flows.plots.canvas import DATA, MODEL, Axes, Figure, bars, canvas, figure, labels, reach, thinned
from pyro_flows.plots.inputs import columns_of, draws_of, rows_of

__all__ = ["corner", "samples"]

MOST = 12  # dimensions of a readable corner plot
BINS = 48  # counts behind contours, along each dimension
SPREAD = 1.5  # of the kernel that smooths counts, in bins


def samples(
    model: Any,
    data: Any = None,
    num_samples: int = 2000,
    *,
    context: Any = None,
    ax: Axes | None = None,
    **style: Any,
) -> Axes:
    """Scatters draws of a model of two dimensions, or given samples, over equally many rows of data.

    Args:
        model: a model, or samples of shape ``(rows, 2)``.
        data: rows to compare with; the picture covers nearly all of them, or else of the draws.
        num_samples: number of draws; given samples and data are thinned evenly to this number.
        context: one context, or a batch over which to spread the draws.
        ax: the axes to draw into.
        **style: options of ``Axes.scatter`` for the draws.

    Raises:
        ValueError: for samples of another number of dimensions, or invalid arguments.

    Example:
        >>> axes = pf.plots.samples(pf.Flow(pf.realnvp(2)), torch.randn(200, 2))
        >>> len(axes.collections)  # data and draws
        2
    """
    draws, event = draws_of(model, num_samples, context, "samples")
    if draws.shape[1] != 2:
        raise ValueError(f"samples: expected two dimensions, got {draws.shape[1]}; plots.corner draws other numbers")
    names = columns_of(model, data)
    rows = None if data is None else rows_of(by_name(data, names, "samples", "data"), event, "samples", "data")
    ax = canvas(ax)
    if rows is not None:
        first, second = thinned(rows, num_samples).T
        ax.scatter(first, second, s=6, color=DATA, alpha=0.4, linewidths=0, label="data")
    look: dict[str, Any] = {"s": 6, "alpha": 0.5, "linewidths": 0, "label": "samples"}
    look |= {} if "color" in style or "c" in style else {"color": MODEL}
    first, second = thinned(draws, num_samples).T
    ax.scatter(first, second, **look | style)
    xlim, ylim = reach(draws if rows is None else rows)
    ax.set(xlim=xlim, ylim=ylim)
    if names is not None:
        ax.set(xlabel=names[0], ylabel=names[1])
    if rows is not None:
        ax.legend(frameon=False, markerscale=2.5, fontsize=8)
    return ax


def corner(
    model: Any,
    data: Any = None,
    names: Sequence[str] | None = None,
    num_samples: int = 10_000,
    *,
    context: Any = None,
    dims: Sequence[int] | None = None,
) -> Figure:
    """Draws all pairs of dimensions: data as points, the model as contours around 50 and 90 % of its draws.

    The diagonal holds histograms of both.  Without data the points are the draws.

    Args:
        model: a model, or samples of shape ``(rows, *event)``.
        data: rows to compare with; the picture covers nearly all of them, or else of the draws.
        names: one for each dimension drawn, by default the names of a data frame's columns.
        num_samples: number of draws.
        context: one context, or a batch over which to spread the draws.
        dims: dimensions of the flattened event to draw, at most 12; by default all.

    Raises:
        ValueError: for more than 12 dimensions, or invalid arguments.

    Example:
        >>> flow, data = pf.Flow(pf.realnvp(3)), torch.randn(200, 3)
        >>> figure = pf.plots.corner(flow, data, names=["x", "y", "z"], num_samples=1000)
        >>> len(figure.axes)  # three histograms and three pairs
        6
    """
    draws, event = draws_of(model, num_samples, context, "corner")
    total = draws.shape[1]
    chosen = list(range(total)) if dims is None else list(dims)
    if not 0 < len(chosen) <= MOST:
        raise ValueError(
            f"corner: expected 1 to {MOST} dimensions, got {len(chosen)}; choose some of them, e.g. dims=[0, 1, 2]"
        )
    if any(isinstance(k, bool) or not isinstance(k, int) or not 0 <= k < total for k in chosen):
        raise ValueError(f"corner: expected dims to be integers from 0 to {total - 1}, got {chosen}")
    known = columns_of(model, data)
    rows = None
    if data is not None:
        rows = rows_of(by_name(data, known, "corner", "data"), event, "corner", "data")[:, chosen]
    if names is None and known is not None:
        names = [known[k] for k in chosen]
    text = labels(names, chosen, "corner")
    draws = draws[:, chosen]
    shown, color = (draws, MODEL) if rows is None else (rows, DATA)
    limits = reach(shown)
    edges = [np.linspace(low, high, BINS + 1) for low, high in limits]
    size = len(chosen)
    side = max(3.2, 1.6 * size + 0.4)
    fig, axes = figure(size, size, (side, side))
    for i, j in np.ndindex(size, size):
        ax = axes[i, j]
        if i < j:
            ax.remove()
            continue
        ax.set(xlim=limits[j], xlabel=text[j] if i == size - 1 else "", ylabel=text[i] if j == 0 < i else "")
        ax.locator_params(nbins=4)
        if i == j:
            if rows is not None:
                ax.stairs(*bars(rows[:, i], *limits[i]), fill=True, color=DATA, alpha=0.25, label="data")
            ax.stairs(*bars(draws[:, i], *limits[i]), color=MODEL, linewidth=1.4, label="samples")
            ax.set_yticks([])
            ax.spines["left"].set_visible(False)
        else:
            ax.set_ylim(limits[i])
            across, up = thinned(shown[:, [j, i]], 1500).T
            ax.scatter(across, up, s=3, color=color, alpha=0.3, linewidths=0, rasterized=True)
            _contours(ax, draws[:, [j, i]], (edges[j], edges[i]))
        ax.tick_params(labelbottom=i == size - 1, labelleft=j == 0)
    fig.align_labels()
    if rows is not None:
        handles, called = axes[0, 0].get_legend_handles_labels()
        # Two dimensions and more leave the upper right corner free.
        fig.legend(
            handles, called, loc="upper right" if size > 1 else "outside upper right", frameon=False, fontsize=11
        )
    return fig


def _contours(ax: Axes, pairs: np.ndarray, edges: tuple[np.ndarray, np.ndarray]) -> None:
    """Lines around the densest 50 and 90 % of the pairs inside the edges."""
    from scipy.ndimage import gaussian_filter

    count = np.histogram2d(pairs[:, 0], pairs[:, 1], bins=list(edges))[0]
    if not count.any():
        return
    count = gaussian_filter(count, SPREAD, mode="constant")
    ranked = np.sort(count, axis=None)[::-1]
    mass = ranked.cumsum() / ranked.sum()
    levels = [ranked[np.searchsorted(mass, inside)] for inside in (0.9, 0.5)]
    if ranked[-1] < levels[0] < levels[1] < ranked[0]:
        middles = [(part[1:] + part[:-1]) / 2 for part in edges]
        ax.contour(*middles, count.T, levels=levels, colors=MODEL, linewidths=(1.0, 1.5))
