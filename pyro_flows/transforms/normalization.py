"""Activation normalisation: an affine map per dimension or channel whose first batch sets it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flows.core import FlowTransform
from pyro_flows.steps import Stepper, affine
from pyro_flows.tracing import plain_eager

__all__ = ["ActNorm"]


class ActNorm(FlowTransform):
    r"""A learnt location and scale per dimension, :math:`y = t + e^{s} x`, set by the first batch.

    Of an event ``(channels, *space)`` each channel has one :math:`t` and one :math:`s`, shared over space; of a vector,
    each dimension.  :math:`\log|\det|` is the sum of :math:`s` times the number of places.  Each direction is
    elementwise.

    The first batch that comes in training mode sets them so that what goes *out* has mean 0 and variance 1 (over the
    batch and over space), whichever way it goes: data on the way to the base (scoring, where :math:`t` and :math:`e^s`
    become the data's mean and standard deviation) or draws on the way to the data (sampling, as a guide does).  So
    before fitting to data do not sample in training mode: draws of the base would count as the first batch.  From then
    on they are parameters like others.  ``initialized`` says whether it has happened; it is part of the ``state_dict``,
    and ``flow.initialized.fill_(False)`` asks for another time.

    It does not happen in evaluation mode, with fewer than two events, or under ``torch.compile``, ``torch.func`` and
    tracers; there the present values count, which are those of the identity at first.  So call it once before it is
    compiled.  A dimension that is constant in the first batch keeps the scale 1.

    Args:
        event_shape: an ``input_dim``, or ``(channels, *space)`` such as ``(C, T)`` and ``(C, H, W)``.

    Raises:
        ValueError: if the first batch is not finite.

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018), section 3.1, arXiv:1807.03039.
    """

    sampling_cost = density_cost = "1 product"
    _read: tuple[Tensor, int, bool] | None = None

    def __init__(self, event_shape: int | Iterable[int]) -> None:
        super().__init__(event_shape)
        shape = (self.event_shape[0], *(1 for _ in self.event_shape[1:]))
        self.loc = nn.Parameter(torch.zeros(shape))
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.register_buffer("initialized", torch.tensor(False))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training and self._is_first(x):
            mean, log_std = self._moments(x)
            self._set(-mean * torch.exp(-log_std), -log_std)
        return self.loc + torch.exp(self.log_scale) * x, self._ladj(x)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training and self._is_first(y):
            self._set(*self._moments(y))
        return (y - self.loc) * torch.exp(-self.log_scale), -self._ladj(y)

    @property
    def shared_over_time(self) -> bool:
        return len(self.event_shape) == 2

    @property
    def reach(self) -> int | None:
        return 0 if self.shared_over_time else None

    def stepper(self, rows: int, context: Tensor | None = None) -> Stepper:
        """One step of a series after another; see :mod:`pyro_flows.steps`."""
        return affine(self.loc, self.log_scale)

    def _ladj(self, value: Tensor) -> Tensor:
        places = math.prod(self.event_shape[1:])
        return (self.log_scale.sum() * places).expand(value.shape[: value.dim() - len(self.event_shape)])

    def _is_first(self, value: Tensor) -> bool:
        """Whether this is a batch to start from."""
        if not plain_eager() or value.numel() <= self.event_shape.numel() or value.is_meta:
            return False
        flag = self.initialized
        if flag.is_inference():  # it counts no versions
            return not bool(flag)
        # To read the flag is to wait for its device, so that is done only after it was written or replaced.
        read = self._read
        if read is None or read[0] is not flag or read[1] != flag._version:
            self._read = read = (flag, flag._version, bool(flag))
        return not read[2]

    def _moments(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation over the batch and space."""
        events = value.detach().reshape(-1, *self.event_shape).to(self.loc.dtype)
        over = (0, *range(2, events.dim()))
        variance, mean = (m.squeeze(0) for m in torch.var_mean(events, over, correction=0, keepdim=True))
        bad = int((~(mean.isfinite() & variance.isfinite())).sum())
        if bad:
            raise ValueError(
                f"ActNorm: expected a finite first batch to start from, got one whose mean or variance is not finite "
                f"in {bad} of {mean.numel()} dimensions or channels; clean it, or call .eval() to leave this layer as "
                "it is"
            )
        # What rounding leaves of the variance of a constant is no scale.
        least = 4 * torch.finfo(events.dtype).eps * events.abs().amax(over, keepdim=True).squeeze(0)
        std = variance.sqrt()
        return mean, torch.where(std > least, std, 1).log()

    def _set(self, loc: Tensor, log_scale: Tensor) -> None:
        with torch.no_grad():
            self.loc.copy_(loc)
            self.log_scale.copy_(log_scale)
            self.initialized.fill_(True)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_read", None)  # a copy counts its versions anew
        return state
