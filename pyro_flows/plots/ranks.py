"""Ranks of simulation-based calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyro_flows.core.checks import choice
from pyro_flows.infer.diagnostics.calibration import Calibration
from pyro_flows.plots.canvas import DATA, FRAME, NAMED, Axes, beside, canvas, line_style

__all__ = ["ranks"]

EXPECTED = 5  # ranks in a bar, at least


def ranks(calibration: Any, ax: Axes | None = None, *, sites: Sequence[str] | None = None, kind: str = "ecdf") -> Axes:
    """Draws the ranks of a calibration against uniform ones, one curve or histogram a scalar.

    ``"ecdf"`` draws the empirical distribution function less that of uniform ranks.  With the calibration's probability
    (95 %), all curves of a right inference stay within the band over their whole length.  First above and then below
    the band means too narrow draws, first below and then above too wide ones, a hill too high, a valley too low.

    ``"histogram"`` draws the ranks: high at both ends for narrow draws, high in the middle for wide ones.  Its band
    holds for single bars.

    Args:
        calibration: from :func:`~pyro_flows.infer.diagnostics.calibration.simulation_based_calibration`.
        ax: the axes to draw into.
        sites: the sites to draw, by default all; the band is always that of all.
        kind: ``"ecdf"`` or ``"histogram"``.

    Raises:
        ValueError: for an unknown site or kind.

    Example:
        >>> ranks = {"loc": torch.arange(100)}
        >>> found = pf.infer.diagnostics.Calibration(ranks, num_samples=99)
        >>> pf.plots.ranks(found).get_xlabel()
        'rank, as a fraction'

    References:
        Graphical Test for Discrete Uniformity (Säilynoja et al., 2021), arXiv:2103.10522.
    """
    if not isinstance(calibration, Calibration):
        raise TypeError(f"ranks: expected what simulation_based_calibration returns, got {type(calibration).__name__}")
    choice("ranks", "kind", kind, ("ecdf", "histogram"))
    chosen = list(calibration.ranks) if sites is None else [sites] if isinstance(sites, str) else list(sites)
    unknown = [site for site in chosen if site not in calibration.ranks]
    if unknown or not chosen:
        raise ValueError(f"ranks: expected sites among {list(calibration.ranks)}, got {chosen}")
    part = Calibration({site: calibration.ranks[site] for site in chosen}, calibration.num_samples, calibration.level)
    ax = canvas(ax)
    (_ecdf if kind == "ecdf" else _histogram)(ax, calibration, part.flat().numpy(), part.names)
    if len(part.names) == 1:
        ax.set_xlabel(f"rank of {part.names[0]}, as a fraction")
    elif len(part.names) <= NAMED:
        beside(ax)
    return ax


def _ecdf(ax: Axes, calibration: Calibration, columns: np.ndarray, names: list[str]) -> None:
    place, low, high = (part.numpy() for part in calibration.bands())
    ax.fill_between(place, low - place, high - place, color=DATA, alpha=0.13, linewidth=0)
    ax.axhline(0, color=FRAME, linewidth=0.9, linestyle="--")
    # Limits include their position; halves avoid rounding errors in the comparison.
    edges = place * (calibration.num_samples + 1) - 0.5
    for k, name in enumerate(names):
        share = np.searchsorted(np.sort(columns[:, k]), edges) / len(columns)
        ax.plot(place, share - place, label=name, **line_style(k, len(names)))
    ax.set(xlim=(0, 1), xlabel="rank, as a fraction", ylabel="distribution function less uniform")


def _histogram(ax: Axes, calibration: Calibration, columns: np.ndarray, names: list[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    n, total = len(columns), calibration.num_samples + 1
    bars = max(2, min(20, n // EXPECTED, total))
    edges = np.ceil(np.arange(bars + 1) * total / bars)
    width = np.diff(edges)
    share = width / total
    spread = 1.96 * np.sqrt(n * share * (1 - share))
    for sign in (-1, 1):
        ax.stairs(n * share + sign * spread, edges / total, color=FRAME, linewidth=0.9, linestyle=":")
    ax.stairs(n * share + spread, edges / total, baseline=n * share - spread, fill=True, color=DATA, alpha=0.13)
    for k, name in enumerate(names):
        counts = np.histogram(columns[:, k], edges - 0.5)[0]
        ax.stairs(counts, edges / total, label=name, **line_style(k, len(names)))
    ax.set(xlim=(0, 1), xlabel="rank, as a fraction", ylabel="simulations")
    ax.set_ylim(0, max(ax.get_ylim()[1], math.ceil((n * share + spread).max()) + 1))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
