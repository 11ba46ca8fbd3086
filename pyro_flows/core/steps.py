"""Causal maps of series, one time step after another."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Size, Tensor, device

__all__ = ["Elementwise", "Past", "Stepper", "affine", "at_any_time", "length_mask"]

Move = Callable[[Tensor], tuple[Tensor, Tensor]]


class Stepper(ABC):
    """State of a causal map of series ``(C, T)``, for a number of rows.

    A transform's ``stepper`` returns it at the first time.  Each call takes the next n time steps, shape ``(rows, C,
    n)``, and advances the state by n.  It returns their images given all earlier steps, and their log-determinants,
    shape ``(rows, n)``.  Weights are those at construction.

    Example:
        >>> stepper = pf.transforms.CausalAutoregressive((1, 20)).stepper(rows=5)
        >>> x, ladj = stepper.inverse(torch.randn(5, 1, 3))  # the first three steps
        >>> x.shape, ladj.shape
        (torch.Size([5, 1, 3]), torch.Size([5, 3]))
    """

    @abstractmethod
    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Data to base."""

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Base to data, for ``n = 1``."""

    @abstractmethod
    def repeated(self, times: int) -> Stepper:
        """An independent copy with all rows repeated, ``(times, rows)`` flattened."""


class Past:
    """The last ``taps`` inputs, ``dilation`` apart, of a causal convolution, zero before the first."""

    def __init__(self, rows: int, inputs: int, taps: int, dilation: int, like: Tensor) -> None:
        self.taps, self.dilation = taps, dilation
        self.last = like.new_zeros(rows, inputs, taps * dilation)

    def join(self, x: Tensor) -> Tensor:
        """Appends ``x``, shape ``(rows, inputs, n)``, and returns past and ``x`` joined."""
        joined = torch.cat((self.last, x), -1)
        self.last = joined[..., joined.shape[-1] - self.last.shape[-1] :].contiguous()
        return joined

    def seen(self) -> Tensor:
        """The convolution's past at the next step, shape ``(rows, inputs, taps)``."""
        return self.last[..., :: self.dilation]

    def repeated(self, times: int) -> Past:
        """A copy with all rows repeated."""
        made = copy.copy(self)
        made.last = self.last.repeat(times, 1, 1)
        return made


class Elementwise(Stepper):
    """A map of single numbers, the same at all times; each direction gives the logarithms of its slopes."""

    def __init__(self, forward: Move, inverse: Move) -> None:
        self._forward, self._inverse = forward, inverse

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return _summed(*self._inverse(y))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _summed(*self._forward(x))

    def repeated(self, times: int) -> Elementwise:
        return self


def _summed(moved: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    return moved, slopes.expand(moved.shape).sum(-2)


def affine(loc: Tensor | float, log_scale: Tensor) -> Elementwise:
    """The steps of ``y = loc + exp(log_scale) x``, for numbers of shape ``(C, 1)``."""
    return Elementwise(partial(_scaled, loc, log_scale), partial(_unscaled, loc, log_scale))


def _scaled(loc: Tensor | float, log_scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return loc + log_scale.exp() * x, log_scale


def _unscaled(loc: Tensor | float, log_scale: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (y - loc) * torch.exp(-log_scale), -log_scale


def at_any_time(name: str, what: str, value: Tensor) -> Tensor:
    """Reduces numbers ``(C, T)`` to ``(C, 1)``, or raises ValueError if they differ between times."""
    if value.dim() != 2:
        raise ValueError(f"{name}: expected a series (C, T) to go through step by step, got {tuple(value.shape)}")
    first = value[:, :1]
    if not torch.equal(first.expand_as(value), value):
        raise ValueError(
            f"{name}: its {what} differs between times, so that nothing is known of the time after the last; use a "
            "part whose parameters all times share, such as ActNorm"
        )
    return first


def length_mask(name: str, lengths: Tensor | Iterable[int], batch: Size | None, times: int, device: device) -> Tensor:
    """Whether each step is within its series' length, shape ``(*batch, times)``.

    Args:
        name: the caller, for messages.
        lengths: integers from 1 to ``times`` that broadcast to ``batch``.
        batch: the batch of series; ``None`` for the lengths' own shape.
        times: the number of steps.
        device: where the mask is.

    Raises:
        ValueError: for other lengths.
    """
    lengths = torch.as_tensor(lengths, device=device)
    whole = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
    if not whole or (lengths.numel() and not ((lengths > 0) & (lengths <= times)).all()):
        raise ValueError(f"{name}: expected lengths to be integers from 1 to {times}, got {lengths}")
    try:
        lengths = lengths if batch is None else lengths.expand(batch)
    except RuntimeError:
        raise ValueError(
            f"{name}: expected lengths that broadcast to the batch {tuple(batch or ())}, one for each series, got "
            f"shape {tuple(lengths.shape)}"
        ) from None
    return torch.arange(times, device=device) < lengths.unsqueeze(-1)
