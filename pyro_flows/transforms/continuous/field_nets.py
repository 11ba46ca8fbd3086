"""Vector fields of images and series, by convolutions gated by time and context."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flows.core.recipes import remembered
from pyro_flows.nets.convolutional import image_shape
from pyro_flows.transforms.continuous.fields import Field, Modulation, smooth, widths

__all__ = ["ChainField", "ConvField"]

Activation = str | Callable[[Tensor], Tensor]


def _trace(weights: Sequence[Tensor], slopes: Sequence[Tensor], x: Tensor) -> Tensor:
    """Of the product of weights and diagonals of slopes, shape ``(rows,)``."""
    first, last = weights[0], weights[-1]
    if not slopes:
        return first.diagonal().sum().expand(len(x))
    if len(slopes) == 1:
        return slopes[0] @ (first * last.T).sum(1)
    if len(slopes) == 2:
        return (F.linear(slopes[0], weights[1] * (first @ last).T) * slopes[1]).sum(-1)
    tangents = slopes[0] * first.T.unsqueeze(1)
    for weight, slope in zip(weights[1:-2], slopes[1:-1], strict=True):
        tangents = F.linear(tangents, weight) * slope
    tangents = F.linear(tangents, weights[-2])
    return ((tangents * last.unsqueeze(1)).sum(0) * slopes[-1]).sum(-1)


@remembered
class ChainField(Field):
    r"""A plain chain of layers, whose first sees time and context, or all of which are gated by them (FFJORD).

    With ``squash`` each layer is :math:`(W h + b) \odot \sigma(g(t, c)) + u(t, c)` with linear :math:`g` and :math:`u`;
    the last layer's gate sees time alone.  Without, the first layer is :math:`W x + b + u(t, c)` and others are linear.

    Args:
        event_shape: shape of one ``x``; events are flattened.
        hidden_dims: widths of the hidden layers, any number.
        context_dim: size of the context, 0 for none.
        time_dependent: whether the field depends on ``t``.
        activation: ``"tanh"``, ``"softplus"``, ``"silu"`` or a smooth elementwise function.
        squash: whether time and context gate all layers.

    References:
        FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models (Grathwohl et al., 2019),
        arXiv:1810.01367.
    """

    rowwise_times = True

    def __init__(
        self,
        event_shape: int | Iterable[int],
        *,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        time_dependent: bool = True,
        activation: Activation = "tanh",
        squash: bool = True,
    ) -> None:
        super().__init__(event_shape, context_dim, time_dependent)
        size = self.event_shape.numel()
        hidden = widths("hidden_dims", hidden_dims)
        self.activation = smooth(activation)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise((size, *hidden, size)))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)
        self.cheap_divergence = len(hidden) <= 2
        modulated = bool(context_dim or time_dependent)
        self.squash = bool(squash) and modulated
        given = (context_dim, time_dependent)
        outputs = [*hidden, size]
        self.shifts = self.gates = self.last_gate = None
        if modulated:
            shifted = outputs if squash else outputs[:1]
            self.shifts = Modulation(shifted, *given, zero_last=len(shifted) == len(outputs))
        if self.squash and hidden:
            self.gates = Modulation(hidden, *given, bias=True)
        if self.squash and time_dependent:
            self.last_gate = Modulation([size], bias=True)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self._run(t, x.flatten(1), context)[0].view(x.shape)

    def with_divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if t.dim():  # the closed forms have one last gate for all rows
            return super().with_divergence(t, x, context)
        v, trace = self._run(t, x.flatten(1), context, trace=True)
        return v.view(x.shape), trace

    def products(self, t: Tensor, x: Tensor, probes: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        v, pushed = self._run(t, x.flatten(1), context, probes.flatten(2))
        return v.view(x.shape), pushed.view(probes.shape)

    def _run(
        self, t: Tensor, x: Tensor, context: Tensor | None, probes: Tensor | None = None, trace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The velocity of flat rows, and the divergence or the products with ``probes`` if asked for."""
        layers = list(self.layers)
        count = len(layers)
        shifts: list[Tensor | None] = [None] * count
        if self.shifts is not None:
            blocks = self.shifts(t, context)
            shifts[: len(self.shifts.sizes)] = blocks.split(self.shifts.sizes, -1)
        gates: list[Tensor | None] = [None] * count
        if self.gates is not None:
            gates[:-1] = torch.sigmoid(self.gates(t, context)).split(self.gates.sizes, -1)
        if self.last_gate is not None:
            gates[-1] = torch.sigmoid(self.last_gate(t, None))
        h, tangents = x, probes
        weights: list[Tensor] = []
        slopes: list[Tensor] = []
        slopy = trace or probes is not None
        for k, layer in enumerate(layers):
            gate, shift = gates[k], shifts[k]
            weight, bias, apart = layer.weight, layer.bias, None
            if gate is not None and gate.dim() == 1:  # the same for all rows: the layer's own weights take it in
                weight, bias = weight * gate.unsqueeze(-1), bias * gate
                gate = None
            if shift is not None and gate is None:
                if shift.dim() == 1 or bias is None:
                    bias = bias + shift
                else:
                    apart = bias + shift
            if gate is not None:
                pre = F.linear(h, weight, bias) * gate
                pre = pre if shift is None else pre + shift
            else:
                pre = F.linear(h, weight, bias) if apart is None else F.linear(h, weight) + apart
            if k == count - 1:
                break
            if not slopy:
                h = self.activation(pre)
                continue
            h, slope = self.activation.with_slope(pre)
            slope = slope if gate is None else slope * gate
            if trace:
                weights.append(weight)
                slopes.append(slope)
            else:
                tangents = F.linear(tangents, weight) * slope
        if trace:
            return pre, _trace([*weights, weight], slopes, x)
        if probes is None:
            return pre, None
        tangents = F.linear(tangents, weight)
        return pre, tangents if gate is None else tangents * gate


_CONVOLUTIONS = {1: (nn.Conv1d, F.conv1d), 2: (nn.Conv2d, F.conv2d)}


@remembered
class ConvField(Field):
    r"""Convolutions :math:`(W * h + b) \odot \sigma(g(t, c)) + u(t, c)`, gates and shifts by channel (FFJORD).

    Maps keep the size of the image, with zeros beyond the edges.  Products with the Jacobian are convolutions of the
    probes; the exact divergence takes one for each number of the event, so it is for small events.

    Args:
        event_shape: ``(C, H, W)`` or ``(C, T)``.
        hidden_dims: channels of the hidden layers, any number.
        kernel_size: of all convolutions, odd.
        context_dim: size of the context, 0 for none.
        time_dependent: whether the field depends on ``t``.
        activation: ``"tanh"``, ``"softplus"``, ``"silu"`` or a smooth elementwise function.

    References:
        FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models (Grathwohl et al., 2019),
        arXiv:1810.01367.
    """

    rowwise_times = True

    def __init__(
        self,
        event_shape: Iterable[int],
        *,
        hidden_dims: Sequence[int] = (32, 32),
        kernel_size: int = 3,
        context_dim: int = 0,
        time_dependent: bool = True,
        activation: str | Callable[[Tensor], Tensor] = "softplus",
    ) -> None:
        super().__init__(image_shape("conv field", event_shape), context_dim, time_dependent)
        if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"expected kernel_size to be an odd integer >= 1, got {kernel_size!r}")
        channels, self.space_dims = self.event_shape[0], len(self.event_shape) - 1
        make = _CONVOLUTIONS[self.space_dims][0]
        sizes = (channels, *widths("hidden_dims", hidden_dims), channels)
        self.padding = kernel_size // 2
        self.activation = smooth(activation)
        self.layers = nn.ModuleList(make(i, o, kernel_size, padding=self.padding) for i, o in itertools.pairwise(sizes))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)
        outputs = sizes[1:]
        self.shifts = self.gates = None
        if context_dim or time_dependent:
            self.shifts = Modulation(outputs, context_dim, time_dependent, zero_last=True)
            self.gates = Modulation(outputs, context_dim, time_dependent, bias=True)

    def _blocks(self, made: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Per layer ``(rows or 1, channels, 1, ..)``."""
        made = made.unsqueeze(0) if made.dim() == 1 else made
        return [block.reshape(*block.shape, *(1,) * self.space_dims) for block in made.split(sizes, -1)]

    def products(self, t: Tensor, x: Tensor, probes: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(t, x, context, probes)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self._run(t, x, context, None)[0]

    def _run(
        self, t: Tensor, x: Tensor, context: Tensor | None, tangents: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        convolve = _CONVOLUTIONS[self.space_dims][1]
        gates = shifts = [None] * len(self.layers)
        if self.shifts is not None:
            gates = self._blocks(torch.sigmoid(self.gates(t, context)), self.gates.sizes)
            shifts = self._blocks(self.shifts(t, context), self.shifts.sizes)
        h = x
        for k, layer in enumerate(self.layers):
            pre = layer(h)
            if gates[k] is not None:
                pre = torch.addcmul(shifts[k], pre, gates[k])
            if tangents is not None:
                moved = convolve(tangents.flatten(0, 1), layer.weight, padding=self.padding)
                tangents = moved.unflatten(0, tangents.shape[:2])
                tangents = tangents if gates[k] is None else tangents * gates[k]
            if k == len(self.layers) - 1:
                return pre, tangents
            if tangents is None:
                h = self.activation(pre)
            else:
                h, slope = self.activation.with_slope(pre)
                tangents = tangents * slope
        return h, tangents
