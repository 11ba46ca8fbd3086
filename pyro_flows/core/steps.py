"""One time step after another: what a causal map of series keeps of the past.

A transform of events ``(C, T)`` that is causal, with parameters that all times share, has a method ``stepper(rows,
context=None)``, which gives a :class:`Stepper` at the beginning of time.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

__all__ = ["Elementwise", "Past", "Stepper", "affine", "at_any_time"]

Move = Callable[[Tensor], tuple[Tensor, Tensor]]


class Stepper(ABC):
    """Where a causal map of series stands in time, for a number of rows.

    Values are those of the next steps, shape ``(rows, C, n)``; a call takes it these steps further.  What comes back
    is what the map makes of them given all before, and the logarithms of the Jacobian's determinant step by step, shape
    ``(rows, n)``, which is positive where volume grows.  Weights are those of the moment at which it was made.
    """

    @abstractmethod
    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Data to base."""

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Base to data, one step, ``n = 1``."""

    @abstractmethod
    def repeated(self, times: int) -> Stepper:
        """A copy that goes its own way, with all rows ``times`` times over, ``(times, rows)`` flattened."""


class Past:
    """The last inputs of a causal convolution, and zeros before the first, as beyond the edge of a whole series.

    Args:
        rows: of the inputs.
        inputs: channels.
        taps: how many steps before the present one the convolution sees.
        dilation: their distance.
        like: of the dtype and on the device of the inputs.
    """

    def __init__(self, rows: int, inputs: int, taps: int, dilation: int, like: Tensor) -> None:
        self.taps, self.dilation = taps, dilation
        self.last = like.new_zeros(rows, inputs, taps * dilation)

    def join(self, x: Tensor) -> Tensor:
        """The past before ``x``, shape ``(rows, inputs, n)``, which is a part of it from now on."""
        joined = torch.cat((self.last, x), -1)
        self.last = joined[..., joined.shape[-1] - self.last.shape[-1] :].contiguous()
        return joined

    def seen(self) -> Tensor:
        """What the convolution sees of the past at the next step, shape ``(rows, inputs, taps)``."""
        return self.last[..., :: self.dilation]

    def repeated(self, times: int) -> Past:
        """A copy with all rows so many times over."""
        made = copy.copy(self)
        made.last = self.last.repeat(times, 1, 1)
        return made


class Elementwise(Stepper):
    """A map of single numbers, the same at all times, that keeps nothing.

    Args:
        forward: from base to data and the logarithms of the slopes, coordinate by coordinate.
        inverse: the other way, with those of its own slopes.
    """

    def __init__(self, forward: Move, inverse: Move) -> None:
        self._moves = forward, inverse

    def _move(self, which: int, value: Tensor) -> tuple[Tensor, Tensor]:
        moved, slopes = self._moves[which](value)
        return moved, slopes.expand(moved.shape).sum(-2)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._move(1, y)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._move(0, x)

    def repeated(self, times: int) -> Elementwise:
        return self


def affine(loc: Tensor | float, log_scale: Tensor) -> Elementwise:
    """The steps of ``y = loc + exp(log_scale) x``, for numbers of shape ``(C, 1)``."""
    return Elementwise(partial(_scaled, loc, log_scale), partial(_unscaled, loc, log_scale))


def _scaled(loc: Tensor | float, log_scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return loc + log_scale.exp() * x, log_scale


def _unscaled(loc: Tensor | float, log_scale: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (y - loc) * torch.exp(-log_scale), -log_scale


def at_any_time(name: str, what: str, value: Tensor) -> Tensor:
    """``(C, 1)`` of numbers ``(C, T)``.

    Raises:
        ValueError: if they differ between times.
    """
    if value.dim() != 2:
        raise ValueError(f"{name}: expected a series (C, T) to go through step by step, got {tuple(value.shape)}")
    first = value[:, :1]
    if not torch.equal(first.expand_as(value), value):
        raise ValueError(
            f"{name}: its {what} differs between times, so that nothing is known of the time after the last; use a "
            "part whose parameters all times share, such as ActNorm"
        )
    return first
