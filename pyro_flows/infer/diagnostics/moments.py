"""Means and standard deviations with and without importance weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.infer.diagnostics.weights import pareto_smoothed, tail_index

__all__ = ["Moments", "compare_moments", "scalar_names"]

EXAMINED = 32  # dimensions with fitted tails, by largest weight


@dataclass(frozen=True)
class Moments:
    """Weighted against unweighted moments of a guide's draws, each of shape ``(D,)``.

    Attributes:
        names: names of the dimensions.
        mean: weighted minus unweighted mean, in unweighted standard deviations.
        mean_error: its standard error.
        scale: log ratio of weighted to unweighted standard deviation.
        scale_error: its standard error, to first order.
        heavy: tail index of the weighted squares about the mean; minus infinity if no draw weighs much.  From 0.7 on
            the standard deviation depends on a few draws; below 4000 draws the index is noise.

    Example:
        >>> draws, log_weights = torch.randn(1000, 2), torch.zeros(1000)
        >>> moments = pf.infer.diagnostics.compare_moments(draws, log_weights)
        >>> moments.mean.abs().max().item() < 1e-6  # equal weights move nothing
        True
    """

    names: tuple[str, ...]
    mean: Tensor
    mean_error: Tensor
    scale: Tensor
    scale_error: Tensor
    heavy: Tensor


def scalar_names(site: str, shape: Sequence[int]) -> list[str]:
    """Names scalars ``site`` or ``site[0, 1]`` and so on."""
    if not shape:
        return [site]
    return [
        f"{site}[{', '.join(map(str, place))}]" for place in torch.ones(tuple(shape), device="cpu").nonzero().tolist()
    ]


def compare_moments(draws: Tensor | Mapping[str, Tensor], log_weights: Tensor) -> Moments:
    r"""Compares means and standard deviations with and without smoothed importance weights.

    An ESS of :math:`e` only bounds the error of a mean by :math:`\sqrt{1 / e - 1}` standard deviations, a third at 0.9.
    Tails may be light in constrained and heavy in unconstrained space, or vice versa.

    Args:
        draws: shape ``(n, D)``, or a dictionary of shapes ``(n, *shape)``.
        log_weights: shape ``(n,)``, in nats.

    Raises:
        ValueError: if shapes do not fit, or no weight is positive.

    Example:
        >>> draws = {"slope": torch.randn(1000), "effects": torch.randn(1000, 3)}
        >>> moments = pf.infer.diagnostics.compare_moments(draws, 0.1 * torch.randn(1000))
        >>> moments.names
        ('slope', 'effects[0]', 'effects[1]', 'effects[2]')
    """
    parts = draws if isinstance(draws, Mapping) else {"z": draws}
    names: list[str] = []
    for site, value in parts.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            raise ValueError(f"compare_moments: expected draws of {site} as a tensor of shape (draws, ...)")
        names += scalar_names(site, value.shape[1:])
    lengths = {site: len(value) for site, value in parts.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"compare_moments: expected as many draws of every site, got {lengths}")
    rows = torch.cat([value.detach().double().reshape(len(value), -1) for value in parts.values()], 1)
    if log_weights.shape != (len(rows),):
        raise ValueError(
            f"compare_moments: expected one log weight for each of {len(rows)} draws, got {tuple(log_weights.shape)}"
        )
    n = len(rows)
    weights = pareto_smoothed(log_weights).log_weights.to(rows.device).exp() * n
    # Where the density failed, the draw may be NaN, too.
    rows = torch.where((weights == 0)[:, None] & ~rows.isfinite(), 0.0, rows)
    center, spread = rows.mean(0), rows.std(0, correction=0)
    unit = (rows - center) / torch.where(spread > 0, spread, 1.0)
    change = (weights - 1)[:, None] * unit
    mean = change.mean(0)
    shifted = unit - mean
    squares = weights[:, None] * shifted.square()
    variance = squares.mean(0)
    influence = (weights - 1)[:, None] * (unit.square() - 1) / 2
    heavy = torch.full_like(mean, -math.inf)
    single = squares.amax(0) / squares.sum(0).clamp(min=torch.finfo(squares.dtype).tiny)
    for k in single.topk(min(EXAMINED, len(single))).indices.tolist():
        if spread[k] > 0:
            heavy[k] = tail_index(squares[:, k].log())
    return Moments(
        names=tuple(names),
        mean=mean,
        mean_error=change.std(0) / math.sqrt(n),
        scale=torch.where(spread > 0, variance.log() / 2, 0.0),
        scale_error=influence.std(0) / math.sqrt(n),
        heavy=heavy,
    )
