"""Which columns depend on which, found by sparse regression: an ``adjacency`` for autoregressive flows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from pyro_flows.core.checks import permutation_of
from pyro_flows.core.modes import on_cpu
from pyro_flows.infer.density.data import name_rows, to_tensor

__all__ = ["sparse_adjacency"]

ROUNDS, STEPS = 10, 1000  # of noise levels, and of steps for each
SETTLED = 1e-4  # the largest change of a coefficient at the end, and of a noise level


@on_cpu
def sparse_adjacency(data: Any, order: str | Sequence[int] | Tensor = "identity", level: float = 0.05) -> Tensor:
    r"""Finds which columns a column depends on, among those before it, by sparse linear regression.

    Column :math:`i`, standardized, is regressed on the columns before it by the lasso,

    .. math:: \hat b = \arg\min_b \frac{1}{2n} \lVert x_i - \sum_j b_j x_j \rVert^2
        + \lambda \sigma_i \lVert b \rVert_1,

    where :math:`\sigma_i` is the standard deviation of what is left (the scaled lasso), and
    :math:`\lambda = \Phi^{-1}(1 - \alpha / d(d-1)) / \sqrt n`, so that among :math:`d` independent columns any edge at
    all has about the probability :math:`\alpha`.  Dependent columns may get more edges than they need; these cost a
    little, and do no harm.

    Only linear dependence is seen.  A dependence without correlation, such as that of :math:`x` and :math:`x^2`, is
    missed, and a flow with this adjacency cannot learn it: compare its held-out score with that of a flow without.

    The result is for ``adjacency=`` of :func:`~pyro_flows.flows.maf`, :func:`~pyro_flows.flows.iaf` and
    :func:`~pyro_flows.flows.nsf`; sampling takes as many steps as the graph is deep.

    Costs a product of two :math:`d \times d` matrices for each of some tens to hundreds of steps, and as much memory.

    Args:
        data: rows of shape ``(n, d)``: a tensor, NumPy array or data frame.
        order: ``"identity"``, as the columns are; ``"shallow"``, by nested dissection of the graph of all columns
            regressed on all others, in which a chain of :math:`d` columns is about :math:`\log_2 d` deep; or a
            permutation, first to last.
        level: the probability :math:`\alpha` of any edge among independent columns, between 0 and 1.

    Returns:
        Boolean, shape ``(d, d)``, true at ``[i, j]`` where column ``i`` depends on column ``j``; without cycles.

    Raises:
        ValueError: for data of another shape, fewer than three rows, missing or constant columns, or an ``order`` that
            is no permutation.
        TypeError: for data that are no numbers.

    Example:
        >>> data = torch.randn(500, 5).cumsum(1)  # each column depends on the last
        >>> found = pf.infer.sparse_adjacency(data)
        >>> found.diagonal(-1).tolist()
        [True, True, True, True]
        >>> flow = pf.maf(5, adjacency=found)

    References:
        High-dimensional graphs and variable selection with the Lasso (Meinshausen & Bühlmann, 2006),
        arXiv:math/0608017.  Scaled Sparse Linear Regression (Sun & Zhang, 2012), arXiv:1104.4595.
        Nested Dissection of a Regular Finite Element Mesh (George, 1973), doi:10.1137/0710032.
    """
    if not 0 < level < 1:
        raise ValueError(f"sparse_adjacency: expected level between 0 and 1, got {level}")
    correlation, count = _correlation(data)
    size = len(correlation)
    penalty = -NormalDist().inv_cdf(level / max(size * (size - 1), 1)) / math.sqrt(count)
    if isinstance(order, str) and order == "shallow":
        others = ~torch.eye(size, dtype=torch.bool)
        graph = _selected(correlation, others, penalty)
        first_to_last = torch.tensor(_dissected(graph | graph.T))
    else:
        order = order.cpu() if isinstance(order, Tensor) else order
        first_to_last = permutation_of("sparse_adjacency", size, order, ("identity", "reverse", "shallow"))
    place = torch.argsort(first_to_last)
    return _selected(correlation, place < place.unsqueeze(1), penalty)


def _correlation(data: Any) -> tuple[Tensor, int]:
    """The correlations of the columns in float64, and the number of rows."""
    rows = to_tensor(data, "sparse_adjacency", "data").to("cpu", torch.float64)
    if rows.dim() != 2 or len(rows) < 3 or not rows.shape[1]:
        raise ValueError(f"sparse_adjacency: expected data of shape (n, d) with n at least 3, got {tuple(rows.shape)}")
    bad = ~rows.isfinite().all(1)
    if bad.any():
        raise ValueError(
            f"sparse_adjacency: data are missing or infinite in {int(bad.sum())} of {len(rows)} rows "
            f"({name_rows(bad.nonzero()[:, 0])}); leave these rows out"
        )
    centered = rows - rows.mean(0)
    centered = centered / centered.abs().amax(0).clamp(min=torch.finfo(rows.dtype).tiny)  # squares must not overflow
    width = centered.square().mean(0).sqrt()
    constant = (width == 0).nonzero()[:, 0].tolist()
    if constant:
        raise ValueError(
            f"sparse_adjacency: columns {constant} are constant, so nothing depends on them; leave them out"
        )
    centered = centered / width
    return centered.T @ centered / len(rows), len(rows)


def _selected(correlation: Tensor, allowed: Tensor, penalty: float) -> Tensor:
    """Where a column, by row, has a coefficient that is not zero, among the allowed ones."""
    size = len(correlation)
    noise, slopes = torch.ones(size, 1, dtype=correlation.dtype), torch.zeros_like(correlation)
    step = 1 / torch.linalg.eigvalsh(correlation)[-1]
    for _ in range(ROUNDS):
        slopes = _lasso(correlation, allowed, slopes, penalty * noise, step)
        left = 1 - ((2 * correlation - slopes @ correlation) * slopes).sum(1, keepdim=True)
        before, noise = noise, left.clamp(min=0).sqrt()
        if (noise - before).abs().max() <= SETTLED:
            break
    return slopes != 0


def _lasso(correlation: Tensor, allowed: Tensor, start: Tensor, penalty: Tensor, step: Tensor) -> Tensor:
    """Solves all regressions at once by accelerated proximal gradient steps (doi:10.1137/080716542)."""
    slopes, ahead, momentum = start, start, 1.0
    for _ in range(STEPS):
        moved = ahead + step * (correlation - ahead @ correlation)
        new = torch.where(allowed, moved - moved.clamp(-step * penalty, step * penalty), 0.0)
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        change = new - slopes
        if ((ahead - new) * change).sum() > 0:  # overshot: start anew from here
            following, change = 1.0, torch.zeros_like(change)
        ahead, done = new + (momentum - 1) / following * change, (new - slopes).abs().max() <= SETTLED
        slopes, momentum = new, following
        if done:
            break
    return slopes


def _dissected(graph: Tensor) -> list[int]:
    """Orders the nodes so that those that part a component come before its parts."""
    neighbors = [row.nonzero()[:, 0].tolist() for row in graph]
    order: list[int] = []
    waiting = [set(range(len(graph)))]
    while waiting:
        nodes = waiting.pop()
        levels = _levels(_levels([next(iter(nodes))], nodes, neighbors)[-1][:1], nodes, neighbors)
        reached = set().union(*levels)
        if reached != nodes:  # apart
            waiting += [reached, nodes - reached]
            continue
        passed, middle = 0, 0
        while 2 * (passed + len(levels[middle])) < len(nodes):
            passed += len(levels[middle])
            middle += 1
        order += levels[middle]
        rest = nodes - set(levels[middle])
        waiting += [rest] if rest else []
    return order


def _levels(start: list[int], nodes: set[int], neighbors: list[list[int]]) -> list[list[int]]:
    """The nodes by their distance from the start, as far as reached."""
    levels, seen = [start], set(start)
    while levels[-1]:
        found = dict.fromkeys(k for node in levels[-1] for k in neighbors[node] if k in nodes and k not in seen)
        seen |= found.keys()
        levels.append(list(found))
    return levels[:-1]
