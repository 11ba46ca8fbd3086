"""Figures, axes and colors; matplotlib's settings stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # only annotations need them, and matplotlib loads slowly
    Axes = Figure = Any

__all__ = ["bars", "beside", "canvas", "figure", "labels", "line_style", "reach", "thinned"]

DATA, MODEL, MARK, FRAME = "#3d405b", "#1f7a8c", "#e07a5f", "#8d99ae"
SHADES = ["#ffffff", "#bfe3e6", "#5fb3bf", "#1f7a8c", "#0d3f4d"]
CYCLE = [MODEL, MARK, DATA, "#81b29a", "#f2a541", "#9c6b9e"]
NAMED = 12  # curves that a legend can tell apart


def figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of axes, each with two quiet spines and small labels."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(FRAME)
        ax.tick_params(color=FRAME, labelsize=9)
        ax.xaxis.label.set_fontsize(10)
        ax.yaxis.label.set_fontsize(10)
    return fig, axes


def canvas(ax: Axes | None, size: tuple[float, float] = (4.8, 3.6)) -> Axes:
    """The given axes, unchanged, or those of a new figure."""
    return figure(1, 1, size)[1][0, 0] if ax is None else ax


def beside(ax: Axes) -> None:
    """A legend at the right of the axes, where it covers no curve."""
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.2)


def line_style(k: int, count: int) -> dict[str, Any]:
    """The style of curve ``k`` of ``count``."""
    if count > NAMED:
        return {"color": MODEL, "linewidth": 0.8, "alpha": 0.5}
    return {"color": CYCLE[k % len(CYCLE)], "linestyle": ("-", "--")[k // len(CYCLE) % 2], "linewidth": 1.5}


def reach(rows: np.ndarray) -> list[tuple[float, float]]:
    """The interval of each column to show: nearly all rows, with a tenth as margin."""
    low, high = np.quantile(rows, [0.002, 0.998], axis=0)
    width = high - low
    # A constant column has no width of its own.
    margin = np.where(width > 1e-9 * np.abs(low), 0.1 * width, np.maximum(0.5, 1e-3 * np.abs(low)))
    return [(float(a), float(b)) for a, b in zip(low - margin, high + margin, strict=True)]


def thinned(rows: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` of the rows, evenly spaced."""
    return rows[np.linspace(0, len(rows) - 1, most).astype(int)] if len(rows) > most else rows


def bars(column: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Heights and edges of a histogram, normalized by all values, those outside included."""
    # The Rice rule, within limits.
    edges = np.linspace(low, high, int(np.clip(2 * len(column) ** (1 / 3), 10, 60)) + 1)
    return np.histogram(column, edges)[0] / (len(column) * np.diff(edges)), edges


def labels(names: Sequence[str] | None, chosen: Sequence[int], name: str) -> list[str]:
    """Labels of the chosen dimensions."""
    if names is None:
        return [f"x[{k}]" for k in chosen]
    if isinstance(names, str) or len(names) != len(chosen):
        raise ValueError(f"{name}: expected {len(chosen)} names, one a dimension drawn, got {names!r}")
    return [str(part) for part in names]
