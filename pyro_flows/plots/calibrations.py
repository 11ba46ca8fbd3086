"""The calibration of a model's intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_flows.core.checks import integer
from pyro_flows.infer.diagnostics.uniformity import band
from pyro_flows.plots.canvas import DATA, FRAME, NAMED, Axes, beside, canvas, labels, line_style
from pyro_flows.plots.inputs import distribution_of, draw, numbers, rows_of, single

__all__ = ["calibration", "pit"]

CHUNK = 1 << 20  # numbers drawn at a time
STEPS = 100  # of nominal coverage


def pit(model: Any, data: Any, context: Any = None, num_samples: int = 1000) -> Tensor:
    r"""Probability integral transform: the place of each observation among draws given its own context.

    For each dimension :math:`u = (r + v (t + 1)) / (n + 1)`, where :math:`r` of :math:`n` draws lie below the
    observation, :math:`t` equal it and :math:`v \sim U(0, 1)`.  If the model's marginals are right, each column is
    exactly uniform.  The cost is ``num_samples`` draws a row.

    Args:
        model: a model.
        data: shape ``(rows, *event)``.
        context: one for each row, shape ``(rows, context_dim)``, or one for all, if the model takes one.
        num_samples: draws for each row.

    Returns:
        Values between 0 and 1, float64, on the CPU, shape ``(rows, event size)``.

    Raises:
        ValueError: if shapes do not fit, or a draw is NaN.

    Example:
        >>> u = pf.plots.pit(pf.Flow(pf.realnvp(2)), torch.randn(100, 2), num_samples=200)
        >>> u.shape, bool(((u > 0) & (u < 1)).all())
        (torch.Size([100, 2]), True)

    References:
        Simulation-Based Calibration (Talts et al., 2018), arXiv:1804.06788.
    """
    n = integer("pit", "num_samples", num_samples)
    if context is not None and not isinstance(context, Tensor):
        context = numbers(context, "pit", "context")
    if context is not None and context.ndim not in (1, 2):
        raise ValueError(f"pit: expected a context of shape (rows, context_dim), got shape {tuple(context.shape)}")
    each = context is not None and context.ndim == 2 and len(context) > 1
    made = single(distribution_of(model, context[0] if each else context, "pit"), "pit")
    rows = torch.from_numpy(rows_of(data, made.event_shape, "pit", "data"))
    if each and len(context) != len(rows):
        raise ValueError(f"pit: expected one context for each of {len(rows)} rows of data, got {len(context)}")
    found = []
    for part in torch.arange(len(rows), device="cpu").split(max(1, CHUNK // (n * rows.shape[1]))):
        if each:
            drawn = draw(distribution_of(model, context[part[0] : part[-1] + 1], "pit"), (n,))
        else:
            drawn = draw(made, (n, len(part)))
        drawn = drawn.cpu().double().reshape(n, len(part), -1)
        if drawn.isnan().any():
            raise ValueError("pit: a draw of the model is NaN; pyro_flows.testing.locate_nonfinite finds the layer")
        below, equal = (drawn < rows[part]).sum(0), (drawn == rows[part]).sum(0)
        found.append((below + torch.rand_like(below, dtype=drawn.dtype) * (equal + 1)) / (n + 1))
    return torch.cat(found)


def calibration(
    model: Any,
    data: Any,
    context: Any = None,
    ax: Axes | None = None,
    num_samples: int = 1000,
    *,
    names: Sequence[str] | None = None,
    level: float = 0.95,
) -> Axes:
    """Draws the coverage of the model's central intervals against the nominal one, by dimension.

    Intervals are too wide where a curve is above the diagonal, too narrow where below.  With probability ``level``, all
    curves of a calibrated model stay inside the simulated band over their whole length.  Dependence between dimensions
    does not show.  The cost is that of :func:`pit`.

    Args:
        model: a model.
        data: held-out rows, shape ``(rows, *event)``.
        context: see :func:`pit`.
        ax: the axes to draw into.
        num_samples: draws for each row.
        names: one for each dimension.
        level: probability of the band.

    Raises:
        ValueError: if shapes do not fit.

    Example:
        >>> flow = pf.Flow(pf.realnvp(2))
        >>> axes = pf.plots.calibration(flow, torch.randn(100, 2), names=["x", "y"])
        >>> len(axes.lines) >= 2
        True

    References:
        Graphical Test for Discrete Uniformity (Säilynoja et al., 2021), arXiv:2103.10522.
    """
    if not 0 < level < 1:
        raise ValueError(f"calibration: expected level between 0 and 1, got {level}")
    places = pit(model, data, context, num_samples).numpy()
    rows, dims = places.shape
    text = labels(names, range(dims), "calibration")
    nominal = np.linspace(0, 1, STEPS + 1)
    # A calibrated model's curve is a cumulative count of equal cells, as that of uniform ranks.
    low, high = (np.array([0.0, *limit, 1.0]) for limit in band(rows, STEPS - 1, (1 - level) / dims)[1:])
    ax = canvas(ax, (4.4, 4.4))
    ax.fill_between(nominal, low, high, color=DATA, alpha=0.13, linewidth=0)
    ax.plot((0, 1), (0, 1), color=FRAME, linewidth=0.9, linestyle="--")
    for k in range(dims):
        inside = np.sort(np.abs(2 * places[:, k] - 1))
        covered = np.searchsorted(inside, nominal, "right") / rows
        ax.plot(nominal, covered, label=text[k], **line_style(k, dims))
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="nominal coverage of intervals", ylabel="share of observations inside")
    ax.set_aspect("equal")
    ax.text(0.04, 0.96, "intervals too wide", color=FRAME, fontsize=8, ha="left", va="top")
    ax.text(0.96, 0.04, "intervals too narrow", color=FRAME, fontsize=8, ha="right", va="bottom")
    if 1 < dims <= NAMED or names is not None:
        beside(ax)
    return ax
