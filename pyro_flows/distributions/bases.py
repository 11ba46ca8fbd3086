"""Base distributions as modules: each call hands out a Pyro distribution on the module's device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_flows.boundary import event_size
from pyro_flows.chain import map_tensors

__all__ = ["DiagonalNormal", "FixedBase"]


class DiagonalNormal(nn.Module):
    r"""Independent normals, :math:`x_i \sim N(\mu_i, e^{2 r_i})`; standard normal at first.

    Args:
        event_shape: an ``input_dim`` or the shape of one event.
        learnable: whether locations and log-scales are parameters (else buffers, fixed at the standard normal).
    """

    def __init__(self, event_shape: int | Iterable[int], learnable: bool = False) -> None:
        super().__init__()
        self.event_shape = event_size(event_shape)
        for name in ("loc", "log_scale"):
            value = torch.zeros(self.event_shape)
            if learnable:
                setattr(self, name, nn.Parameter(value))
            else:
                self.register_buffer(name, value, persistent=False)

    def forward(self) -> dist.Distribution:
        """The distribution, event shape ``event_shape``."""
        normal = dist.Normal(self.loc, self.log_scale.exp(), validate_args=False)
        return normal.to_event(len(self.event_shape))


class FixedBase(nn.Module):
    """A given distribution without parameters to learn, moved along with the module.

    Args:
        distribution: any distribution; its tensors follow ``.to()`` and its relatives.

    Raises:
        ValueError: if one of its tensors asks for a gradient: that one would never be found by an optimiser.
    """

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        map_tensors(distribution, _refuse_gradient)
        self.distribution = copy.deepcopy(distribution)  # moving the module must not move the caller's object

    def forward(self) -> Distribution:
        """The distribution."""
        return self.distribution

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedBase:
        map_tensors(self.distribution, fn)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return repr(self.distribution)


def _refuse_gradient(tensor: Tensor) -> Tensor:
    if tensor.requires_grad:
        raise ValueError(
            "a base distribution whose tensors learn must be a module: give Flow an nn.Module that owns them as "
            "parameters and returns the distribution when called, e.g. DiagonalNormal(input_dim, learnable=True)"
        )
    return tensor
