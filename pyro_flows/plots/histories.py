"""The history of a fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from pyro_flows.plots.canvas import DATA, FRAME, MARK, MODEL, Axes, canvas

__all__ = ["history"]


def history(fit: Any, ax: Axes | None = None) -> Axes:
    """Draws the scores of training and validation data after each epoch; higher is better.

    Scores are log-likelihoods in nats per row, or negative losses of flow matching.  A mark shows the best epoch, by
    the fit or by validation; epoch 0 is the state before training.  A learning rate that changes has a second axis.
    First epochs far below the rest are cut off.

    Args:
        fit: the result of a fit; its history, a dictionary of equally long lists with ``train`` and optionally
            ``epoch``, ``validation`` and ``lr``; or plain numbers, such as an ELBO at each step.
        ax: the axes to draw into.

    Raises:
        ValueError: for a history that is empty, without ``train``, or with lists of several lengths.

    Example:
        >>> fit = pf.fit_density(pf.realnvp(2), torch.randn(200, 2), max_epochs=3)
        >>> pf.plots.history(fit).get_xlabel()
        'epoch'
    """
    record = getattr(fit, "history", fit)
    if not isinstance(record, Mapping):
        return _sequence(record, canvas(ax))
    columns = {name: _column(record[name], name) for name in ("epoch", "train", "validation", "lr") if name in record}
    train = columns.get("train")
    if train is None or not len(train):
        raise ValueError(f"history: expected a history with values of 'train', got one with {list(record)}")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"history: expected lists of equal length, got {lengths}")
    epoch = columns.get("epoch", np.arange(1.0, len(train) + 1))
    validation = columns.get("validation")
    ax = canvas(ax)
    ax.plot(epoch, train, color=DATA, linewidth=1.2, label="train")
    drawn = [train]
    if validation is not None and not np.isnan(validation).all():
        ax.plot(epoch, validation, color=MODEL, linewidth=1.6, label="validation")
        drawn.append(validation)
        _mark(ax, fit, epoch, validation)
    matched = getattr(fit, "objective", None) == "flow_matching"
    ax.set(xlabel="epoch", ylabel="negative matching loss" if matched else "log-likelihood (nats per row)")
    _zoom(ax, np.concatenate(drawn))
    ax.legend(frameon=False, fontsize=8, loc="best")
    rate = columns.get("lr")
    if rate is not None and len(np.unique(rate[np.isfinite(rate)])) > 1:
        _rate(ax, epoch, rate)
    return ax


def _column(values: Any, name: str) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    # Unmeasured values may be None.
    try:
        return np.array([np.nan if value is None else float(value) for value in values])
    except (TypeError, ValueError):
        raise TypeError(f"history: expected {name} to be a list of numbers, got {type(values).__name__}") from None


def _mark(ax: Axes, fit: Any, epoch: np.ndarray, validation: np.ndarray) -> None:
    best = getattr(fit, "best_epoch", None)
    if best is None:
        best = epoch[np.nanargmax(validation)]
    (places,) = np.nonzero(epoch == float(best))
    if not len(places) and best == 0:  # the state before the first epoch, of which a history has no score
        ax.axvline(0.0, color=MARK, linewidth=0.9, linestyle=":", label="best: the start, at epoch 0")
        return
    if not len(places):
        raise ValueError(f"history: the best epoch, {best}, is not among the epochs of the history")
    place = places[0]
    value = validation[place]
    ax.axvline(epoch[place], color=MARK, linewidth=0.9, linestyle=":")
    ax.plot(epoch[place], value, "o", color=MARK, markersize=5, label=f"best: {value:.3f} at epoch {epoch[place]:.0f}")


def _zoom(ax: Axes, values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    if not len(values):
        return
    top, quarter = values.max(), np.quantile(values, 0.25)
    bottom = max(values.min(), top - 4 * (top - quarter))
    margin = 0.05 * (top - bottom) or 0.5
    ax.set_ylim(bottom - margin, top + margin)


def _rate(ax: Axes, epoch: np.ndarray, rate: np.ndarray) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    twin = ax.twinx()
    twin.plot(epoch, rate, color=FRAME, linewidth=0.9, linestyle="--", drawstyle="steps-post")
    twin.set_yscale("log")
    twin.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    twin.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    twin.yaxis.set_minor_formatter(NullFormatter())
    twin.set_ylabel("learning rate", color=FRAME, fontsize=9)
    twin.tick_params(which="both", colors=FRAME, labelsize=8)
    twin.spines[["top", "left"]].set_visible(False)
    twin.spines[["right", "bottom"]].set_color(FRAME)
    # The curves stay in front of the rate.
    ax.set_zorder(twin.get_zorder() + 1)
    ax.patch.set_visible(False)


def _sequence(values: Any, ax: Axes) -> Axes:
    column = _column(values, "the history")
    if not len(column):
        raise ValueError("history: expected at least one value, got none")
    step = np.arange(1, len(column) + 1)
    window = len(column) // 50
    if window < 4:
        ax.plot(step, column, color=MODEL, linewidth=1.4)
    else:
        # Single steps are noisy, so draw a moving mean on top.
        ax.plot(step, column, color=MODEL, linewidth=0.6, alpha=0.3)
        middles = step[window - 1 :] - (window - 1) / 2
        ax.plot(middles, np.convolve(column, np.full(window, 1 / window), "valid"), color=MODEL, linewidth=1.5)
    ax.set(xlabel="step", ylabel="objective")
    _zoom(ax, column)
    return ax
