"""Dense and convolutional vector fields."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flows.core.checks import choice, integer, layer_widths
from pyro_flows.core.recipes import remembered
from pyro_flows.nets.activations import activation_function, value_and_slope
from pyro_flows.nets.convolutional import image_shape
from pyro_flows.transforms.continuous.fields import Field

__all__ = ["ChainField", "ConvField"]

Function = Callable[[Tensor], Tensor]


def _smooth(activation: str | Function) -> Function:
    if isinstance(activation, str):
        choice("", "activation", activation, ("silu", "softplus", "tanh"), "a smooth function")
    return activation_function(activation)


class Modulation(nn.Module):
    """Shifts or gates of all units: linear in time and context, one block per layer.

    ``sizes`` are the units of each layer; ``zero_last`` starts the last block at zero, and ``bias`` adds a constant.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        context_dim: int = 0,
        time_dependent: bool = True,
        zero_last: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.sizes, total = list(sizes), sum(sizes)
        inputs = context_dim + int(time_dependent)
        bound = 1 / math.sqrt(max(inputs, 1))

        def draw(*shape: int) -> nn.Parameter:
            values = bound * (2 * torch.rand(*shape) - 1)
            if zero_last:
                values[total - self.sizes[-1] :] = 0
            return nn.Parameter(values)

        self.time = draw(total) if time_dependent else None
        self.context = draw(total, context_dim) if context_dim else None
        self.bias = draw(total) if bias else None

    def forward(self, t: Tensor, context: Tensor | None) -> Tensor | None:
        """All blocks, shape ``(total,)``, or ``(rows or 1, total)`` if contexts or times have rows."""
        t = t.unsqueeze(-1) if t.dim() else t
        moved: Tensor | None = self.bias
        if self.time is not None:
            moved = self.time * t if moved is None else self.time * t + moved
        if self.context is None or context is None:
            return moved
        if t.dim() and moved is not None:
            return F.linear(context, self.context) + moved
        return F.linear(context, self.context, moved)


def _trace(weights: Sequence[Tensor], slopes: Sequence[Tensor], x: Tensor) -> Tensor:
    """The trace of the product of weights and diagonal slopes, shape ``(rows,)``."""
    first, last = weights[0], weights[-1]
    if not slopes:
        return first.diagonal().sum().expand(len(x))
    if len(slopes) == 1:
        return slopes[0] @ (first * last.T).sum(1)
    if len(slopes) == 2:
        return (F.linear(slopes[0], weights[1] * (first @ last).T) * slopes[1]).sum(-1)
    tangents = slopes[0] * first.T.unsqueeze(1)
    for weight, each in zip(weights[1:-2], slopes[1:-1], strict=True):
        tangents = F.linear(tangents, weight) * each
    tangents = F.linear(tangents, weights[-2])
    return ((tangents * last.unsqueeze(1)).sum(0) * slopes[-1]).sum(-1)


@remembered
class ChainField(Field):
    r"""Dense layers; time and context enter the first, or gate all (FFJORD, arXiv:1810.01367).

    With ``squash`` each layer is :math:`(W h + b) \odot \sigma(g(t, c)) + u(t, c)` with linear :math:`g` and :math:`u`,
    and in the last layer :math:`g(t)`; else the first is :math:`W x + b + u(t, c)`, and others are linear.

    Args:
        event_shape: shape of one ``x``; events are flattened.
        hidden_dims: widths of the hidden layers, any number.
        context_dim: size of the context, 0 for none.
        time_dependent: whether the field depends on ``t``.
        activation: ``"tanh"``, ``"softplus"``, ``"silu"`` or a smooth elementwise function.
        squash: whether time and context gate all layers.

    Example:
        >>> field = pf.transforms.continuous.field_nets.ChainField(2, hidden_dims=(16,))
        >>> flow = pf.Flow(pf.Continuous(2, field))
        >>> flow.sample((5,)).shape
        torch.Size([5, 2])
    """

    rowwise_times = True
    layers: Any  # an nn.ModuleList of nn.Linear

    def __init__(
        self,
        event_shape: int | Iterable[int],
        *,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        time_dependent: bool = True,
        activation: str | Function = "tanh",
        squash: bool = True,
    ) -> None:
        super().__init__(event_shape, context_dim, time_dependent)
        size, hidden = self.event_shape.numel(), layer_widths("", "hidden_dims", hidden_dims)
        self.activation = _smooth(activation)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise((size, *hidden, size)))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)
        self.cheap_divergence = len(hidden) <= 2
        modulated = bool(context_dim or time_dependent)
        self.squash = bool(squash) and modulated
        given = (context_dim, time_dependent)
        self.shifts: Modulation | None = None
        self.gates: Modulation | None = None
        self.last_gate: Modulation | None = None
        if modulated:
            outputs = [*hidden, size] if squash else [*hidden, size][:1]
            self.shifts = Modulation(outputs, *given, zero_last=squash or not hidden)
        if self.squash and hidden:
            self.gates = Modulation(hidden, *given, bias=True)
        if self.squash and time_dependent:
            self.last_gate = Modulation([size], bias=True)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self._run(t, x.flatten(1), context)[0].view(x.shape)

    def with_divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if t.dim():  # the closed forms need one last gate for all rows
            return super().with_divergence(t, x, context)
        v, _, weights, slopes = self._run(t, x.flatten(1), context, trace=True)
        return v.view(x.shape), _trace(weights, slopes, x)

    def products(self, t: Tensor, x: Tensor, probes: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        v, pushed, _, _ = self._run(t, x.flatten(1), context, probes.flatten(2))
        return v.view(x.shape), pushed.view(probes.shape)

    def _run(
        self, t: Tensor, x: Tensor, context: Tensor | None, tangents: Tensor | None = None, trace: bool = False
    ) -> tuple[Tensor, Any, list[Tensor], list[Tensor]]:
        """The velocity and products of flat rows; for a trace also weights and slopes."""
        count = len(self.layers)
        shifts: list[Tensor | None] = [None] * count
        if self.shifts is not None:
            shifts[: len(self.shifts.sizes)] = self.shifts(t, context).split(self.shifts.sizes, -1)
        gates: list[Tensor | None] = [None] * count
        if self.gates is not None:
            gates[:-1] = torch.sigmoid(self.gates(t, context)).split(self.gates.sizes, -1)
        if self.last_gate is not None:
            gates[-1] = torch.sigmoid(self.last_gate(t, None))
        h = x
        weights: list[Tensor] = []
        slopes: list[Tensor] = []
        for k, layer in enumerate(self.layers):
            gate, shift = gates[k], shifts[k]
            weight, bias = layer.weight, layer.bias
            if gate is not None and gate.dim() == 1:  # equal for all rows: the weights absorb it
                weight, bias, gate = weight * gate.unsqueeze(-1), bias * gate, None
            if gate is not None:
                pre = F.linear(h, weight, bias) * gate
                pre = pre if shift is None else pre + shift
            elif shift is not None and shift.dim() > 1:
                pre = F.linear(h, weight) + (bias + shift)
            else:
                pre = F.linear(h, weight, bias if shift is None else bias + shift)
            if trace:
                weights.append(weight)
            if tangents is not None:
                tangents = F.linear(tangents, weight)
                tangents = tangents if gate is None else tangents * gate
            if k == count - 1:
                break
            if tangents is None and not trace:
                h = self.activation(pre)
                continue
            h, each = value_and_slope(self.activation, pre)
            if tangents is None:
                slopes.append(each if gate is None else each * gate)
            else:
                tangents = tangents * each
        return pre, tangents, weights, slopes


_CONVOLUTIONS = {1: (nn.Conv1d, F.conv1d), 2: (nn.Conv2d, F.conv2d)}


@remembered
class ConvField(Field):
    r"""Convolutions :math:`(W * h + b) \odot \sigma(g(t, c)) + u(t, c)`, with gates and shifts by channel (FFJORD).

    Layers keep the image's size, with zero padding.  The exact divergence convolves one probe for each number of the
    event: for small events only.

    Args:
        event_shape: ``(C, H, W)`` or ``(C, T)``.
        hidden_channels: channels of the hidden layers, any number.
        kernel_size: odd size of all kernels.
        context_dim: size of the context, 0 for none.
        time_dependent: whether the field depends on ``t``.
        activation: as in :class:`ChainField`.

    Example:
        >>> field = pf.transforms.continuous.field_nets.ConvField((1, 4, 4))
        >>> field(torch.tensor(0.0), torch.randn(5, 1, 4, 4)).shape
        torch.Size([5, 1, 4, 4])
    """

    rowwise_times = True
    layers: Any  # an nn.ModuleList of convolutions

    def __init__(
        self,
        event_shape: Iterable[int],
        *,
        hidden_channels: Sequence[int] = (32, 32),
        kernel_size: int = 3,
        context_dim: int = 0,
        time_dependent: bool = True,
        activation: str | Function = "softplus",
    ) -> None:
        super().__init__(image_shape("conv field", event_shape), context_dim, time_dependent)
        self.padding = integer("", "kernel_size", kernel_size, odd=True) // 2
        channels, self.space_dims = self.event_shape[0], len(self.event_shape) - 1
        make = _CONVOLUTIONS[self.space_dims][0]
        sizes = (channels, *layer_widths("", "hidden_channels", hidden_channels), channels)
        self.activation = _smooth(activation)
        self.layers = nn.ModuleList(make(i, o, kernel_size, padding=self.padding) for i, o in itertools.pairwise(sizes))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)
        self.shifts: Modulation | None = None
        self.gates: Modulation | None = None
        if context_dim or time_dependent:
            self.shifts = Modulation(sizes[1:], context_dim, time_dependent, zero_last=True)
            self.gates = Modulation(sizes[1:], context_dim, time_dependent, bias=True)

    def _blocks(self, made: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Blocks of shape ``(rows or 1, channels, 1, ..)``."""
        made = made.unsqueeze(0) if made.dim() == 1 else made
        return [block.reshape(*block.shape, *(1,) * self.space_dims) for block in made.split(sizes, -1)]

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self._run(t, x, context, None)[0]

    def products(self, t: Tensor, x: Tensor, probes: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(t, x, context, probes)

    def _run(self, t: Tensor, x: Tensor, context: Tensor | None, tangents: Tensor | None) -> tuple[Tensor, Any]:
        convolve = _CONVOLUTIONS[self.space_dims][1]
        gates: list[Any] = [None] * len(self.layers)
        shifts: list[Any] = gates
        if self.shifts is not None and self.gates is not None:
            gates = self._blocks(torch.sigmoid(self.gates(t, context)), self.gates.sizes)
            shifts = self._blocks(self.shifts(t, context), self.shifts.sizes)
        h = x
        for k, (layer, gate, shift) in enumerate(zip(self.layers, gates, shifts, strict=True)):
            pre = layer(h)
            pre = pre if gate is None else torch.addcmul(shift, pre, gate)
            if tangents is not None:
                moved = convolve(tangents.flatten(0, 1), layer.weight, padding=self.padding)
                tangents = torch.unflatten(moved, 0, tangents.shape[:2])
                tangents = tangents if gate is None else tangents * gate
            if k == len(self.layers) - 1:
                return pre, tangents
            if tangents is None:
                h = self.activation(pre)
            else:
                h, each = value_and_slope(self.activation, pre)
                tangents = tangents * each
        return h, tangents
