"""Masked convolutions in raster order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flows.core.steps import Past

__all__ = ["ConvLayer", "Groups", "StackSteps", "Stacks"]


class Groups(NamedTuple):
    """The event's channel of each input and output at one location.

    Outputs ``own[c]:own[c + 1]`` belong to channel ``c`` and see the first ``seen[c]`` inputs there, and all inputs at
    earlier locations.
    """

    own: tuple[int, ...]
    seen: tuple[int, ...]

    def mask(self) -> Tensor | None:
        """The boolean mask at the location itself, ``(outputs, seen inputs)``, if there is one."""
        if len(self.seen) == 1:
            return None
        pairs = zip(self.seen, itertools.pairwise(self.own), strict=True)
        limits = [seen for seen, (start, stop) in pairs for _ in range(start, stop)]
        return torch.arange(self.seen[-1]) < torch.tensor(limits)[:, None]


def _uniform(*shape: int, fan_in: int) -> nn.Parameter:
    return nn.Parameter((2 * torch.rand(shape) - 1) / math.sqrt(max(fan_in, 1)))


def _mapped(context: Tensor | None, weight: Tensor | None, bias: Tensor) -> Tensor:
    return bias if context is None or weight is None else F.linear(context, weight, bias)


def _spread(bias: Tensor) -> Tensor:
    """Spreads a bias ``(channels,)`` or ``(n, channels)`` over all locations."""
    return bias[..., None, None]


class ConvLayer(nn.Module):
    r"""One layer of both stacks.

    The first stack, ``above``, sees only the rows above, as wide as its kernel.  The second, ``left``, sees earlier
    columns of the same row, the location itself as far as ``groups`` allow, and the first stack's output (``link``).
    So every earlier location is in sight.  Only ``here``, the weight for the location itself, has a mask.

    Args:
        inputs, outputs: numbers of channels.
        taps: number of earlier columns that the second stack sees, and of rows above and columns to either side that
            the first stack sees.
        dilation: distance of neighbors.
        groups: the inputs that an output sees at the location itself.
        above: whether there is a first stack, i.e. more than one row.
        first: whether the inputs are the event itself.
    """

    mask: Tensor | None
    kernel: tuple[int, int]
    above_weight: Tensor
    above_bias: Tensor
    link_weight: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        taps: int,
        dilation: int,
        groups: Groups,
        context_dim: int,
        *,
        above: bool,
        first: bool,
    ) -> None:
        super().__init__()
        self.inputs, self.taps, self.dilation, self.first, self.groups = inputs, taps, dilation, first, groups
        # The first layer must not see its own row; inputs of later layers know only rows above.
        self.kernel = (taps if first else taps + 1, 2 * taps + 1)
        here = groups.seen[-1]
        fan_in = inputs * taps + here
        self.left_weight = _uniform(outputs, inputs, taps, fan_in=fan_in) if taps else None
        self.here_weight = _uniform(outputs, here, fan_in=fan_in) if here else None
        self.left_bias = _uniform(outputs, fan_in=fan_in)
        self.register_buffer("mask", groups.mask(), persistent=False)
        self.left_context = _uniform(outputs, context_dim, fan_in=context_dim) if context_dim else None
        self.above_context = None
        if above:
            fan_in = inputs * self.kernel[0] * self.kernel[1]
            self.above_weight = _uniform(outputs, inputs, *self.kernel, fan_in=fan_in)
            self.above_bias = _uniform(outputs, fan_in=fan_in)
            self.above_context = _uniform(outputs, context_dim, fan_in=context_dim) if context_dim else None
            self.link_weight = _uniform(outputs, outputs, fan_in=outputs)

    def above_offset(self, context: Tensor | None) -> Tensor:
        """The first stack's bias."""
        return _mapped(context, self.above_context, self.above_bias)

    def left_offset(self, context: Tensor | None) -> Tensor:
        """The second stack's bias."""
        return _mapped(context, self.left_context, self.left_bias)

    def above(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The first stack, ``(n, inputs, H, W)`` to ``(n, channels, H, W)``."""
        rows, columns = self.kernel
        d = self.dilation
        side, down = columns // 2 * d, int(self.first)
        padded = F.pad(x, (side, side, (rows - 1) * d + down, -down))
        return F.conv2d(padded, self.above_weight, dilation=d) + _spread(self.above_offset(context))

    def left(self, x: Tensor, context: Tensor | None, past: Past | None = None) -> Tensor:
        """The second stack without its link; a series may continue from a past."""
        total = _spread(self.left_offset(context))
        if self.left_weight is not None:
            if past is None:
                padded = F.pad(x, (self.taps * self.dilation, 0))
            else:
                padded = past.join(x.squeeze(-2)).unsqueeze(-2)
            seen = padded[..., : -self.dilation]  # without the location itself
            total = F.conv2d(seen, self.left_weight[:, :, None], dilation=self.dilation) + total
        if self.here_weight is not None:
            weight = self.here_weight if self.mask is None else torch.where(self.mask, self.here_weight, 0.0)
            total = F.conv2d(x[:, : self.groups.seen[-1]], weight[..., None, None]) + total
        return total

    def above_row(self, rows: Sequence[Tensor], offset: Tensor) -> Tensor | None:
        """The first stack at the row after the last one given, or at it; ``None`` without rows ``(n, inputs, W)``."""
        have = len(rows)
        if not have:
            return None
        total, columns = self.kernel
        d = self.dilation
        used = [rows[have - 1 - back * d] for back in reversed(range(total)) if back * d < have]
        weight = self.above_weight[:, :, total - len(used) :]
        side = columns // 2 * d
        made = F.conv2d(torch.stack(used, 2), weight, padding=(0, side), dilation=(1, d)).squeeze(2)
        return made + offset[..., None]

    def extra_repr(self) -> str:
        kernel = f", kernel={self.kernel}" if "above_weight" in self._parameters else ""
        return f"{self.inputs}, {len(self.left_bias)}{kernel}, taps={self.taps}, dilation={self.dilation}"


class Stacks(nn.Module):
    r"""The whole network, :math:`(n, C F, H, W) \to (n, C P, H, W)`.

    Layers have residual connections, :math:`v_l = v_{l-1} + V_l * a(v_{l-1})` and
    :math:`h_l = h_{l-1} + K_l * a(h_{l-1}) + U_l a(v_l)`.  The last layer, :math:`1 \times 1`, starts at zero.

    Args:
        shape: shape of the event, ``(C, H, W)``.
        features: number of inputs that code one channel of the event.
        num_params: number of outputs per channel.
        hidden: number of hidden channels, divided among the event's channels.
        sides: each layer's number of neighbors to one side.
        dilations: dilation of each layer.
        positions: whether the first layer's bias depends on row and column.
    """

    layers: Sequence[ConvLayer]
    mask: Tensor | None
    row_bias: Tensor | None
    column_bias: Tensor | None

    def __init__(
        self,
        shape: tuple[int, int, int],
        features: int,
        num_params: int,
        hidden: int,
        sides: Sequence[int],
        dilations: Sequence[int],
        context_dim: int,
        positions: bool,
        activations: Sequence[Callable[[Tensor], Tensor]],
    ) -> None:
        super().__init__()
        channels, height, width = self.shape = shape
        self.features, self.num_params, self.hidden, self.activations = features, num_params, hidden, activations
        self.two = height > 1
        own = tuple(hidden * c // channels for c in range(channels + 1))
        groups = [Groups(own, tuple(c * features for c in range(channels)))] + [Groups(own, own[1:])] * len(sides)
        layers = (
            ConvLayer(
                hidden if k else channels * features,
                hidden,
                side,
                distance,
                groups[k],
                context_dim,
                above=self.two,
                first=k == 0,
            )
            for k, (side, distance) in enumerate(zip(sides, dilations, strict=True))
        )
        self.add_module("layers", nn.ModuleList(layers))
        stacks = 2 if self.two else 1
        sizes = {"row_bias": height, "column_bias": width}
        for name, size in sizes.items():
            made = nn.Parameter(torch.zeros(stacks, hidden, size)) if positions and size > 1 else None
            self.register_parameter(name, made)
        self.out_weight = nn.Parameter(torch.zeros(channels, num_params, hidden))
        self.out_context = nn.Parameter(torch.zeros(channels, num_params, context_dim)) if context_dim else None
        mask = None if channels == 1 else torch.arange(hidden) < torch.tensor(own[1:])[:, None, None]
        self.register_buffer("mask", mask, persistent=False)

    def positions(self, stack: int) -> Tensor | None:
        """The first layer's bias by place, ``(channels, H or 1, W or 1)``; stack 0 is ``above``, -1 ``left``."""
        rows = None if self.row_bias is None else self.row_bias[stack][:, :, None]
        columns = None if self.column_bias is None else self.column_bias[stack][:, None]
        if rows is None or columns is None:
            return columns if rows is None else rows
        return rows + columns

    @property
    def numbers_per_draw(self) -> int:
        """About how many numbers a sweep holds per draw."""
        channels, height, width = self.shape
        rows = sum(1 + layer.taps * layer.dilation for layer in self.layers) if self.two else 0
        past = sum(2 * width + (1 + layer.taps) * layer.dilation for layer in self.layers)
        return self.hidden * (width * rows + past) + channels * width * (height + self.num_params + self.features)

    def forward(self, x: Tensor, context: Tensor | None, past: Sequence[Past] | None = None) -> Tensor:
        """``context``: ``None`` or ``(n, context_dim)``; ``past``: each layer's past that series continue."""
        v = h = above = left = x  # h, v: residual streams; left, above: the next layer's inputs
        for k, (layer, activation) in enumerate(zip(self.layers, self.activations, strict=True)):
            made = layer.left(left, context, None if past is None else past[k])
            # Outputs that see nothing are the same at all locations.
            h = made.expand(x.shape[0], -1, *x.shape[-2:]) if k == 0 else h + made
            if k == 0 and (own := self.positions(-1)) is not None:
                h = h + own
            if self.two:
                made = layer.above(above, context)
                v = made if k == 0 else v + made
                if k == 0 and (own := self.positions(0)) is not None:
                    v = v + own
                above = activation(v)
                h = h + F.conv2d(above, layer.link_weight[..., None, None])
            left = activation(h)
        out_weight = self.out_weight if self.mask is None else torch.where(self.mask, self.out_weight, 0.0)
        out = F.conv2d(left, out_weight.flatten(0, 1)[..., None, None])
        if context is None or self.out_context is None:
            return out
        return out + _spread(F.linear(context, self.out_context.flatten(0, 1)))

    def steps(self, rows: int, context: Tensor | None) -> StackSteps:
        """The stack of series step by step, for a number of rows."""
        return StackSteps(self, rows, context)

    def extra_repr(self) -> str:
        return f"{self.shape}, features={self.features}, num_params={self.num_params}, channels={self.hidden}"


class StackSteps:
    """The stack of series ``(C, T)``, step by step: each hidden value is computed once.

    ``net`` has no positions; ``rows`` is the number of series; ``context`` is ``None`` or ``(rows, context_dim)``.
    """

    def __init__(self, net: Stacks, rows: int, context: Tensor | None) -> None:
        self.net, self.context = net, context
        self.past = [Past(rows, layer.inputs, layer.taps, layer.dilation, net.out_weight) for layer in net.layers]

    def known(self, x: Tensor) -> Tensor:
        """Outputs at the next steps from their values, ``(rows, C, n)`` to ``(rows, C, num_params, n)``."""
        out = self.net(x.unsqueeze(-2), self.context, self.past).squeeze(-2)
        return torch.unflatten(out, 1, (self.net.shape[0], self.net.num_params))

    def next(self, find: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The next step, ``(rows, C)``, channel by channel.

        Args:
            find: maps a channel's number and outputs ``(rows, num_params)`` to its values ``(rows, 1)``.
        """
        net, base = self.net, []
        for layer, past in zip(net.layers, self.past, strict=True):
            total = layer.left_offset(self.context).expand(len(past.last), -1)
            weight = layer.left_weight
            base.append(total if weight is None else total + F.conv1d(past.seen(), weight).squeeze(-1))
        own = net.layers[0].groups.own
        # Known values at this step: of the series and each layer.
        made: list[list[Tensor]] = [[] for _ in range(len(base) + 1)]
        for c in range(net.shape[0]):
            group, stream = slice(*own[c : c + 2]), None
            for k, (layer, activation) in enumerate(zip(net.layers, net.activations, strict=True)):
                total = base[k][:, group]
                if made[k] and layer.here_weight is not None:
                    seen = torch.cat(made[k], 1)
                    total = total + F.linear(seen, layer.here_weight[group, : seen.shape[1]])
                stream = total if stream is None else stream + total
                made[k + 1].append(activation(stream))
            seen = torch.cat(made[-1], 1)
            out = F.linear(seen, net.out_weight[c, :, : seen.shape[1]])
            if self.context is not None and net.out_context is not None:
                out = out + F.linear(self.context, net.out_context[c])
            made[0].append(find(c, out))
        inputs = [torch.cat(parts, 1) for parts in made[:-1]]
        for past, each in zip(self.past, inputs, strict=True):
            past.join(each.unsqueeze(-1))
        return inputs[0]

    def repeated(self, times: int) -> StackSteps:
        """An independent copy with all rows repeated."""
        made = StackSteps(self.net, 0, None if self.context is None else self.context.repeat(times, 1))
        made.past = [past.repeated(times) for past in self.past]
        return made
