"""An autoregressive model of places, one place after another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pyro_flows.distributions.made.head import Head

__all__ = ["ModelSteps", "NetSteps"]


class NetSteps(Protocol):
    """A network place by place, see :class:`pyro_flows.nets.masked_convolutional.StackSteps`."""

    def known(self, x: Tensor) -> Tensor:
        """Outputs at the next places from their codes."""

    def next(self, find: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The codes of the next place, found channel by channel."""

    def repeated(self, times: int) -> NetSteps:
        """An independent copy with all rows repeated."""


class ModelSteps:
    """A model of events ``(C, *places)`` for a number of rows, place by place.  Each call advances the state.

    Args:
        net: the network's steps.
        head: a head of the ``C`` channels, or of all dimensions.
        bias: the outputs' biases, shape ``(C or D, num_params)``.
        channels: the number ``C``.
    """

    def __init__(self, net: NetSteps, head: Head, bias: Tensor, channels: int) -> None:
        self.net, self.head, self.channels = net, head, channels
        self.bias = bias.view(channels, -1, bias.shape[-1])
        self.stride, self.taken = head.input_dim // channels, 0

    def check(self, value: Tensor) -> None:
        """Refuses values ``(rows, C, n)`` outside the support of a head of channels."""
        self.head.check(value.mT)

    def score(self, value: Tensor) -> Tensor:
        """Log-densities of the next places in nats, ``(rows, C, n)`` to ``(rows, n)``, by a head of channels."""
        if not value.shape[-1]:
            return value.sum(1)
        turned = value.mT
        out = self.net.known(self.head.features(turned).flatten(-2).mT)  # (rows, C, num_params, n)
        params = out.permute(0, 3, 1, 2) + self.bias[:, 0]
        self.taken += value.shape[-1]
        return self.head.log_prob(turned, params).sum(-1)

    def draw(self, pick: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Draws the next place, shape ``(rows, C)``.

        Args:
            pick: maps parameters ``(rows, 1, num_params)`` and the dimension to values ``(rows, 1)``; by default
                draws of the head without gradient.
        """
        pick, values = self.head.sample if pick is None else pick, []
        at = self.taken % self.stride
        bias = self.bias[:, at % self.bias.shape[1]]

        def find(channel: int, out: Tensor) -> Tensor:
            dims = torch.tensor([channel * self.stride + at], device=out.device)
            value = pick((out + bias[channel]).unsqueeze(-2), dims)
            values.append(value)
            return self.head.features(value, dims).flatten(-2)

        self.net.next(find)
        self.taken += 1
        return torch.cat(values, -1)

    def repeated(self, times: int) -> ModelSteps:
        """An independent copy with all rows repeated, ``(times, rows)`` flattened."""
        made = copy.copy(self)
        made.net = self.net.repeated(times)
        return made
