"""Figures, axes and colours, set on the objects themselves: matplotlib's settings stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["bars", "canvas", "figure", "framed", "labels", "reach", "thinned"]

DATA, MODEL, MARK, FRAME = "#3d405b", "#1f7a8c", "#e07a5f", "#8d99ae"
SHADES = ["#ffffff", "#bfe3e6", "#5fb3bf", "#1f7a8c", "#0d3f4d"]
CYCLE = [MODEL, MARK, DATA, "#81b29a", "#f2a541", "#9c6b9e"]


def figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of axes."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat:
        framed(ax)
    return fig, axes


def framed(ax: Axes) -> Axes:
    """The axes with two quiet spines and small labels."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FRAME)
    ax.tick_params(color=FRAME, labelsize=8)
    ax.xaxis.label.set_size(9)
    ax.yaxis.label.set_size(9)
    return ax


def canvas(ax: Axes | None, size: tuple[float, float] = (4.8, 3.6)) -> Axes:
    """The axes given, as they are, or those of a new figure."""
    return figure(1, 1, size)[1][0, 0] if ax is None else ax


def reach(rows: np.ndarray) -> list[tuple[float, float]]:
    """For each column the interval to show: nearly all of the rows and a margin of a tenth."""
    low, high = np.quantile(rows, [0.002, 0.998], axis=0)
    width = high - low
    # A column of one value has no width of its own.
    margin = np.where(width > 1e-9 * np.abs(low), 0.1 * width, np.maximum(0.5, 1e-3 * np.abs(low)))
    return [(float(a), float(b)) for a, b in zip(low - margin, high + margin, strict=True)]


def thinned(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many rows, evenly spaced."""
    return rows[np.linspace(0, len(rows) - 1, most).astype(int)] if len(rows) > most else rows


def bars(column: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """A histogram, as heights and edges, that is a density of the whole column, also if some of it lies outside."""
    # The Rice rule, within what can be told apart.
    edges = np.linspace(low, high, int(np.clip(2 * len(column) ** (1 / 3), 10, 60)) + 1)
    return np.histogram(column, edges)[0] / (len(column) * np.diff(edges)), edges


def labels(names: Sequence[str] | None, chosen: Sequence[int], name: str) -> list[str]:
    """A label for each chosen dimension."""
    if names is None:
        return [f"x[{k}]" for k in chosen]
    if isinstance(names, str) or len(names) != len(chosen):
        raise ValueError(f"{name}: expected {len(chosen)} names, one a dimension drawn, got {names!r}")
    return [str(part) for part in names]
