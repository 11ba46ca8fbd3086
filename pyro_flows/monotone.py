"""Increasing functions of a number, with slopes in [0, 1] that can be had from their values."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MONOTONE", "Monotone", "monotone"]


class Monotone(NamedTuple):
    """An increasing function of a number, with a slope in [0, 1] that can be had from the function's value."""

    name: str
    value: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]  # from the value; a new tensor
    curl: Callable[[Tensor], Tensor] | None  # from the value: the slope's slope over the slope; None where that is 0
    steepest: float

    def __reduce__(self) -> tuple[object, ...]:
        return monotone, ("", self.name)


_LEAK = 0.01


def _softplus(u: Tensor) -> Tensor:
    # Beyond the usual threshold of 20 its slope would jump by more than the rounding of float64.
    return F.softplus(u, threshold=40)


MONOTONE = {
    each.name: each
    for each in (
        Monotone(
            "elu",
            F.elu,
            lambda u: F.elu(u, inplace=True),
            lambda h: h.clamp_max(0).add_(1),
            lambda h: torch.lt(h, 0, out=torch.empty_like(h)),
            1.0,
        ),
        Monotone(
            "softplus",
            _softplus,
            _softplus,
            lambda h: -torch.expm1(-h),
            lambda h: torch.exp(-h),
            1.0,
        ),
        Monotone("tanh", torch.tanh, torch.tanh_, lambda h: 1 - h * h, lambda h: -2 * h, 1.0),
        Monotone("sigmoid", torch.sigmoid, torch.sigmoid_, lambda h: h * (1 - h), lambda h: 1 - 2 * h, 0.25),
        Monotone(
            "leaky_relu",
            lambda u: F.leaky_relu(u, _LEAK),
            lambda u: F.leaky_relu(u, _LEAK, inplace=True),
            lambda h: (h > 0).to(h.dtype) * (1 - _LEAK) + _LEAK,
            None,
            1.0,
        ),
    )
}


def monotone(name: str, activation: str) -> Monotone:
    """The activation of this name.

    Args:
        name: of who asks, for the message.
        activation: one of ``"elu"``, ``"softplus"``, ``"tanh"``, ``"sigmoid"`` and ``"leaky_relu"``.

    Raises:
        ValueError: for any other, since a map with one that falls somewhere need not be invertible.
    """
    if not isinstance(activation, str) or activation not in MONOTONE:
        raise ValueError(
            f"{name}: expected activation to be one of {sorted(MONOTONE)}, got {activation!r}; it must never fall, and "
            "its slope must be known and at most 1, or the map could not be inverted (silu, gelu and mish fall, relu "
            "is flat; dropout and batch normalisation are no functions of one number)"
        )
    return MONOTONE[activation]
