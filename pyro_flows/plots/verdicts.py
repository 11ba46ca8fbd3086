"""The numbers behind the verdict on a density or a guide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyro_flows.infer.diagnostics.calibration import Calibration
from pyro_flows.infer.diagnostics.densities import DensityVerdict
from pyro_flows.infer.diagnostics.verdict import Verdict
from pyro_flows.plots.canvas import DATA, FRAME, MARK, MODEL, Axes, Figure, figure, labels, thinned
from pyro_flows.plots.ranks import ranks

__all__ = ["verdict"]

LOWEST = 5e-3  # part of the scores that a panel moves to its edge
NAMED = 8  # rows with a number, and modes with bars
SHOWN = 4000  # draws of a guide


def verdict(fit: Any, *, names: Sequence[str] | None = None) -> Figure:
    """Draws the numbers behind the verdict on a density or on a guide, in three panels.

    Of a density, the first has the ranks of each column, and of the log-density, among draws, as :func:`ranks` draws
    them: all curves of a right density stay within the band with probability 95 %.  The second has each judged row's
    log-density against that by the Gaussian: rows above the diagonal are better described by the density.  The third
    has the distribution functions of log-densities, of judged rows, training rows and draws, on a logarithmic scale;
    rows that score too little for draws are marked, with their numbers.

    Of a guide, the first has the log-density of the posterior against the guide's at the guide's draws, both in
    nats: an exact guide's draws lie on the diagonal.  The second has the share of draws whose weight is larger than
    any given weight, on logarithmic scales, with the weight 1 of an exact guide's draws: a long straight tail is what
    k-hat measures.  The third has the mass of the posterior's modes and the guide's mass there.

    Args:
        fit: the result of :func:`~pyro_flows.infer.density.fit.fit_density` or
            :func:`~pyro_flows.infer.guides.fit.fit_guide`, or a
            :class:`~pyro_flows.infer.diagnostics.densities.DensityVerdict`.
        names: one for each column of a density.

    Raises:
        TypeError: for anything else, or for names with a guide.
        ValueError: if there were no draws to compare with, or names do not fit.

    Example:
        >>> fit = pf.fit_density(pf.realnvp(2), torch.randn(200, 2), max_epochs=2)
        >>> figure = pf.plots.verdict(fit)
        >>> len(figure.axes)
        3
    """
    assessment = getattr(fit, "assessment", None)
    if isinstance(getattr(assessment, "verdict", None), Verdict):
        if names is not None:
            raise TypeError("verdict: names belong to the columns of a density; leave them out for a guide")
        return _of_guide(assessment)
    found = getattr(fit, "verdict", fit)
    if not isinstance(found, DensityVerdict):
        raise TypeError(
            f"verdict: expected the result of fit_density or fit_guide, or a DensityVerdict, got {type(fit).__name__}"
        )
    checks = found.checks
    if checks.ranks is None:
        raise ValueError(f"verdict: there are no draws to compare rows with; {'; '.join(checks.notes)}")
    text = labels(names, range(len(checks.names)), "verdict") if names is not None else checks.names
    fig, axes = figure(1, 3, (10.2, 3.4))
    left, middle, right = axes[0]
    places = {name: checks.ranks[:, k] for k, name in enumerate([*text, "log-density"])}
    ranks(Calibration(places, checks.copies), ax=left)
    left.set_title("ranks among draws", fontsize=11)
    _against_rival(middle, checks)
    _tails(right, found)
    return fig


def _of_guide(found: Any) -> Figure:
    fig, axes = figure(1, 3, (10.2, 3.4))
    left, middle, right = axes[0]
    weights = found.log_weights.detach().double().cpu().numpy()
    at = found.log_q.detach().double().cpu().numpy()
    finite = np.isfinite(weights) & np.isfinite(at)
    if not finite.any():
        raise ValueError("verdict: no draw of the guide has a finite weight; pyro_flows.infer.diagnostics says why")
    weights, at = weights[finite] - found.importance.log_evidence, at[finite]
    across, up = thinned(np.stack([at, at + weights], 1), SHOWN).T
    low, high = (np.quantile(np.concatenate([across, up]), q) for q in (LOWEST, 1.0))
    left.plot((low, high), (low, high), color=FRAME, linewidth=0.9, linestyle="--")
    left.scatter(across.clip(low), up.clip(low), s=5, color=MODEL, alpha=0.4, linewidth=0)
    left.set(xlabel="log-density of the guide", ylabel="log-density of the posterior")
    left.set_title(f"draws: ESS {found.importance.ess:.2f}", fontsize=11)
    ordered = np.sort(np.exp(weights))
    middle.plot(ordered, np.arange(len(ordered), 0, -1) / len(ordered), color=MODEL, linewidth=1.5)
    middle.axvline(1, color=FRAME, linewidth=0.9, linestyle="--")
    middle.set(xscale="log", yscale="log", xlabel="weight of a draw", ylabel="share of draws that weigh more")
    middle.set_xlim(max(ordered[0], 1e-3), 1.2 * max(ordered[-1], 1.0))
    middle.set_title(f"weights: k-hat {found.importance.khat:.2f}", fontsize=11)
    _modes(right, found.probe)
    right.set_title(found.verdict.label, fontsize=11)
    return fig


def _modes(ax: Axes, probe: Any) -> None:
    if probe is None or not len(probe.share):
        ax.text(0.5, 0.5, "modes were not searched", ha="center", va="center", transform=ax.transAxes, fontsize=10)
        ax.set_axis_off()
        return
    masses = [("posterior", probe.share, DATA, -0.2), ("guide", probe.guide_share, MODEL, 0.2)]
    for name, share, color, shift in masses:
        height = share[:NAMED].double().cpu().numpy()
        ax.bar(np.arange(1, len(height) + 1) + shift, height, 0.4, color=color, label=name)
    for k in probe.missed[:NAMED].cpu().nonzero().flatten().tolist():
        ax.text(k + 1.2, 0.02, "missed", color=MARK, rotation=90, ha="center", va="bottom", fontsize=9)
    ax.set(ylim=(0, 1.25), xlabel="modes found", ylabel="share of the mass")
    ax.set_xticks(range(1, len(probe.share[:NAMED]) + 1))
    ax.legend(frameon=False, fontsize=9, loc="upper right", ncols=2)


def _against_rival(ax: Axes, checks: Any) -> None:
    own = checks.scores.numpy()
    if checks.rival_scores is None:
        ax.set_title("nothing to compare with", fontsize=11)
        ax.set_axis_off()
        return
    other = checks.rival_scores.numpy()
    shown = np.isfinite(own) & np.isfinite(other)
    low, high = (np.quantile(np.concatenate([own[shown], other[shown]]), q) for q in (LOWEST, 1.0))
    ax.plot((low, high), (low, high), color=FRAME, linewidth=0.9, linestyle="--")
    ax.scatter(other.clip(low), own.clip(low), s=6, color=MODEL, alpha=0.5, linewidth=0)
    gain = (own - other)[shown].mean()
    ax.set_title(f"{gain:+.2f} nats a row on average", fontsize=11)
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
        ax.annotate(str(row), (score, 1 / len(checks.scores)), fontsize=9, xytext=(0, 4), textcoords="offset points")
    ax.set_yscale("log")
    ax.set(xlabel="log-density", ylabel="share of rows that score less")
    ax.set_title(found.label, fontsize=11)
    ax.legend(frameon=False, fontsize=9, loc="lower right")
