"""Linear recurrences along a chain."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["recurrence", "times"]


def recurrence(weights: Tensor, values: Tensor) -> Tensor:
    r"""Returns :math:`y_1 = b_1,\; y_t = W_t\, y_{t-1} + b_t`.

    Pairs of steps, then pairs of pairs are composed, so that it takes :math:`\log_2 T` operations on whole chains.

    Args:
        weights: :math:`W_2, \dots, W_T`, shape ``(..., T - 1, d, d)``.
        values: :math:`b`, shape ``(..., T, d)``.
    """
    found, reach, steps = values, 1, values.shape[-2]
    while reach < steps:
        carried = times(weights, found[..., :-reach, :].unsqueeze(-1)).squeeze(-1)
        found = torch.cat([found[..., :reach, :], found[..., reach:, :] + carried], -2)
        weights = times(weights[..., reach:, :, :], weights[..., :-reach, :, :])
        reach *= 2
    return found


def times(a: Tensor, b: Tensor) -> Tensor:
    """Multiplies matrices, of one number each without the overhead of a product."""
    return a * b if a.shape[-2:] == (1, 1) and b.shape[-2:] == (1, 1) else a @ b
