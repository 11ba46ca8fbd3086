"""Activation normalization: an affine map per dimension or channel, set by its first batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_flows.core.modes import plain_eager
from pyro_flows.core.steps import Stepper, affine
from pyro_flows.core.transform import FlowTransform

__all__ = ["ActNorm"]


class ActNorm(FlowTransform):
    r"""A learned location and scale per dimension, :math:`y = t + e^{s} x`, set by the first batch.

    Each channel of an event ``(channels, *space)``, or each dimension of a vector, has one :math:`t` and :math:`s`.
    :math:`\log|\det|` is the sum of :math:`s` times the number of places.  Each direction is elementwise.

    The first batch in training mode gives the *output* mean 0 and variance 1 over batch and space, in either direction:
    data when scoring (:math:`t` and :math:`e^s` become their mean and standard deviation), or draws when sampling, as a
    guide does.  So do not sample in training mode before fitting to data.  Later :math:`t` and :math:`s` are ordinary
    parameters.  ``initialized``, part of the ``state_dict``, says whether they are set;
    ``flow.initialized.fill_(False)`` lets the next batch set them again.

    No batch sets the layer in evaluation mode, with fewer than two events, or under ``torch.compile``, ``torch.func``
    and tracers: call the layer once before compiling it.  A dimension that is constant in the first batch keeps the
    scale 1.

    Under ``DistributedDataParallel`` the first batch joins those of all processes, of any sizes, which must call the
    layer in the same forward pass.  Outside of it a first batch sets its own process alone, with a warning: broadcast
    the ``state_dict``, or call the layer once before wrapping it.

    Args:
        event_shape: an ``input_dim``, or ``(channels, *space)`` such as ``(C, T)`` and ``(C, H, W)``.

    Raises:
        ValueError: if the first batch is not finite, in any of the processes.

    Example:
        >>> data = 10 + 3 * torch.randn(100, 2)
        >>> flow = pf.Flow(pf.Chain([*pf.realnvp(2), pf.ActNorm(2)]))
        >>> scores = flow.log_prob(data)  # the first batch sets the layer
        >>> flow.eval().sample((5,)).shape
        torch.Size([5, 2])

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018), section 3.1, arXiv:1807.03039.
    """

    sampling_cost = density_cost = "1 product"
    affine = True
    initialized: Tensor
    _read: tuple[Tensor, int, bool] | None = None

    def __init__(self, event_shape: int | Iterable[int]) -> None:
        super().__init__(event_shape)
        shape = (self.event_shape[0], *(1 for _ in self.event_shape[1:]))
        self.loc = nn.Parameter(torch.zeros(shape))
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.register_buffer("initialized", torch.tensor(False))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training and (found := self._first(x)) is not None:
            mean, log_std = found
            self._set(-mean * torch.exp(-log_std), -log_std)
        return self.loc + torch.exp(self.log_scale) * x, self._ladj(x)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training and (found := self._first(y)) is not None:
            self._set(*found)
        return (y - self.loc) * torch.exp(-self.log_scale), -self._ladj(y)

    @property
    def shared_over_time(self) -> bool:
        return len(self.event_shape) == 2

    @property
    def reach(self) -> int | None:
        return 0 if self.shared_over_time else None

    def stepper(self, rows: int, context: Tensor | None = None) -> Stepper:
        """Goes through a series step by step; see :mod:`pyro_flows.core.steps`."""
        return affine(self.loc, self.log_scale)

    def log_slopes(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-slopes from data to base, of the shape of ``y``."""
        return -self.log_scale.expand(y.shape)

    def _ladj(self, value: Tensor) -> Tensor:
        places = math.prod(self.event_shape[1:])
        return (self.log_scale.sum() * places).expand(self._batch_of(value))

    def _first(self, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and log standard deviation of a batch that sets the layer, else ``None``."""
        if not plain_eager() or value.is_meta or self._is_set():
            return None
        group = _group_of(self)
        several = value.numel() > self.event_shape.numel()
        if group is None:
            if not several:
                return None
            _warn_alone()
        # All processes must take part, with any batch.
        events = value.detach().reshape(-1, *self.event_shape).to(self.loc.dtype)
        count, mean, variance, largest = _moments(events, group)
        if count < 2:
            return None
        bad = int((~(mean.isfinite() & variance.isfinite())).sum())
        if bad:
            raise ValueError(
                f"ActNorm: expected a finite first batch to start from, got one whose mean or variance is not finite "
                f"in {bad} of {mean.numel()} dimensions or channels; clean it, or call .eval() to keep the layer as it "
                "is"
            )
        # A constant's variance is rounding.
        std, least = variance.sqrt(), 4 * torch.finfo(events.dtype).eps * largest
        return mean.view_as(self.loc), torch.where(std > least, std, 1).log().view_as(self.loc)

    def _is_set(self) -> bool:
        flag = self.initialized
        if flag.is_inference():  # inference tensors count no versions
            return bool(flag)
        # Reading the flag waits for its device, so only after writes.
        read = self._read
        if read is None or read[0] is not flag or read[1] != flag._version:
            self._read = read = (flag, flag._version, bool(flag))
        return read[2]

    def _set(self, loc: Tensor, log_scale: Tensor) -> None:
        with torch.no_grad():
            self.loc.copy_(loc)
            self.log_scale.copy_(log_scale)
            self.initialized.fill_(True)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_read", None)  # a copy starts its versions anew
        return state


def _moments(events: Tensor, group: distributed.ProcessGroup | None) -> tuple[int, Tensor, Tensor, Tensor]:
    """The number of events in all processes; mean, variance and largest size of each dimension or channel."""
    count, channels = events.shape[:2]
    flat = events.movedim(1, 0).reshape(channels, -1)
    if count:
        variance, mean = torch.var_mean(flat, 1, correction=0)
        own = torch.stack([mean, variance, flat.abs().amax(1)])
    else:
        own = flat.new_zeros(3, channels)
    if group is None:
        return count, own[0], own[1], own[2]
    sent = torch.cat([own.flatten(), own.new_tensor([count])])
    sent = sent.to(torch.promote_types(sent.dtype, torch.float))  # half precision cannot count far
    received = [torch.empty_like(sent) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(received, sent, group=group)
    found = torch.stack(received)  # the same in each process
    counts, (means, variances, largest) = found[:, -1:], torch.unflatten(found[:, :-1], 1, (3, channels)).unbind(1)
    weights = counts / counts.sum().clamp(min=1)
    mean = (weights * means).sum(0)
    variance = (weights * (variances + (means - mean) ** 2)).sum(0)
    mean, variance, highest = (each.to(own.dtype) for each in (mean, variance, largest.amax(0)))
    return int(counts.sum()), mean, variance, highest


def _group_of(module: nn.Module) -> distributed.ProcessGroup | None:
    """The processes in the same forward pass of ``DistributedDataParallel``; ``None`` outside of one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    active = DistributedDataParallel._get_active_ddp_module()
    if active is None or distributed.get_world_size(active.process_group) < 2:
        return None
    return active.process_group if any(each is module for each in active.module.modules()) else None


def _warn_alone() -> None:
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        warnings.warn(
            "ActNorm: the first batch came outside of DistributedDataParallel's forward pass, so it sets the layer of "
            "this process alone; if the processes train one flow together, call it inside of that (wrap a module whose "
            "forward gives the loss), or broadcast the state_dict from one of them now",
            stacklevel=2,
        )
