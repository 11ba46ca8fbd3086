"""The numbers behind a density's verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyro_flows.infer.diagnostics.calibration import Calibration
from pyro_flows.infer.diagnostics.densities import DensityVerdict
from pyro_flows.plots.canvas import DATA, FRAME, MARK, MODEL, Axes, Figure, figure, labels
from pyro_flows.plots.ranks import ranks

__all__ = ["verdict"]

LOWEST = 5e-3  # part of the scores that the second panel moves to its edge
NAMED = 8  # rows with a number


def verdict(fit: Any, *, names: Sequence[str] | None = None) -> Figure:
    """Draws the numbers behind the verdict on a density, in three panels.

    The first has the ranks of each column, and of the log-density, among draws, as :func:`ranks` draws them: all curves
    of a right density stay within the band with probability 95 %.  The second has each judged row's log-density
    against that by the Gaussian: rows above the diagonal are better described by the density.  The third has the
    distribution functions of log-densities, of judged rows, training rows and draws, on a logarithmic scale; rows that
    score too little for draws are marked, with their numbers.

    Args:
        fit: the result of :func:`~pyro_flows.infer.density.fit.fit_density`, or a
            :class:`~pyro_flows.infer.diagnostics.densities.DensityVerdict`.
        names: one for each column.

    Raises:
        TypeError: for anything else.
        ValueError: if there were no draws to compare with, or names do not fit.

    Example:
        >>> fit = pf.fit_density(pf.realnvp(2), torch.randn(200, 2), max_epochs=2)
        >>> figure = pf.plots.verdict(fit)
        >>> len(figure.axes)
        3
    """
    found = getattr(fit, "verdict", fit)
    if not isinstance(found, DensityVerdict):
        raise TypeError(f"verdict: expected the result of fit_density or a DensityVerdict, got {type(fit).__name__}")
    checks = found.checks
    if checks.ranks is None:
        raise ValueError(f"verdict: there are no draws to compare rows with; {'; '.join(checks.notes)}")
    text = labels(names, range(len(checks.names)), "verdict") if names is not None else checks.names
    fig, axes = figure(1, 3, (10.2, 3.4))
    left, middle, right = axes[0]
    places = {name: checks.ranks[:, k] for k, name in enumerate([*text, "log-density"])}
    ranks(Calibration(places, checks.copies), ax=left)
    left.set_title("ranks among draws", fontsize=10)
    _against_rival(middle, checks)
    _tails(right, found)
    return fig


def _against_rival(ax: Axes, checks: Any) -> None:
    own = checks.scores.numpy()
    if checks.rival_scores is None:
        ax.set_title("no Gaussian to compare with", fontsize=10)
        ax.set_axis_off()
        return
    other = checks.rival_scores.numpy()
    shown = np.isfinite(own) & np.isfinite(other)
    low, high = (np.quantile(np.concatenate([own[shown], other[shown]]), q) for q in (LOWEST, 1.0))
    ax.plot((low, high), (low, high), color=FRAME, linewidth=0.9, linestyle="--")
    ax.scatter(other.clip(low), own.clip(low), s=6, color=MODEL, alpha=0.5, linewidth=0)
    gain = (own - other)[shown].mean()
    ax.set_title(f"{gain:+.2f} nats a row on average", fontsize=10)
    ax.set(xlabel=f"log-density by {checks.rival}", ylabel="log-density")


def _tails(ax: Axes, found: DensityVerdict) -> None:
    checks = found.checks
    curves = [
        *([] if checks.draws is None else [("draws", checks.draws.flatten(), MODEL)]),
        ("training rows", checks.training, FRAME),
        ("judged rows", checks.scores, DATA),
    ]
    for name, scores, color in curves:
        ordered = np.sort(scores[scores.isfinite()].numpy())
        if len(ordered):
            ax.plot(ordered, np.arange(1, len(ordered) + 1) / len(ordered), label=name, color=color, linewidth=1.5)
    missed = checks.unexplained(checks.scores) & checks.scores.isfinite()
    places = checks.scores[missed].numpy()
    ax.scatter(places, np.full(len(places), 1 / len(checks.scores)), s=18, color=MARK, zorder=3, label="unexplained")
    for score, row in list(zip(places, checks.index[missed].tolist(), strict=True))[:NAMED]:
        ax.annotate(str(row), (score, 1 / len(checks.scores)), fontsize=8, xytext=(0, 4), textcoords="offset points")
    ax.set_yscale("log")
    ax.set(xlabel="log-density", ylabel="share of rows that score less")
    ax.set_title(found.label, fontsize=10)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
