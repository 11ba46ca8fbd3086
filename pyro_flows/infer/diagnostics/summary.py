"""Quantiles and a table of draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["EQUAL_TAILS", "equal_tails", "levels_of", "quantiles_of", "tabulate"]

EQUAL_TAILS = (0.05, 0.5, 0.95)  # the quantiles of a table


def levels_of(who: str, q: Any) -> Tensor:
    """Checks levels from 0 to 1: a number, a list or a tensor, of any shape; in float64, on the CPU."""
    try:
        levels = torch.as_tensor(q, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{who}: expected q to be numbers from 0 to 1, got a {type(q).__name__}") from error
    if not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(f"{who}: expected q from 0 to 1, got {q!r}; give 5 % as 0.05")
    return levels


def equal_tails(who: str, level: float) -> Tensor:
    """Returns the levels of both ends of an interval, with half of the rest outside of each."""
    if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 < level < 1:
        raise ValueError(f"{who}: expected 0 < level < 1, got {level!r}; give 90 % as 0.9")
    return levels_of(who, [(1 - level) / 2, (1 + level) / 2])


def quantiles_of(draws: Tensor, levels: Tensor) -> Tensor:
    """Returns quantiles along the first dimension, shape ``(*levels.shape, *draws.shape[1:])``.

    Each is a draw: the smallest that at least this share of all draws does not exceed.
    """
    count = len(draws)
    place = (levels * count - 1e-9).ceil().clamp(1, count).long() - 1
    return draws.sort(0).values[place.to(draws.device)]


def tabulate(names: Sequence[str], draws: Tensor) -> DataFrame:
    """Describes each column of draws, shape ``(n, D)``, in a row: mean, standard deviation and quantiles."""
    import pandas as pd

    draws = draws.detach().cpu().double()
    numbers = [draws.mean(0), draws.std(0), *quantiles_of(draws, levels_of("tabulate", EQUAL_TAILS))]
    heads = ["mean", "sd", *(f"{level:.0%}" for level in EQUAL_TAILS)]
    return pd.DataFrame(torch.stack(numbers, 1).numpy(), index=list(names), columns=heads)
