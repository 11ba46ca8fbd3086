"""Draws in raster order, where each layer's values at a location are computed once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pyro_flows.nets.masked_convolutional import ConvLayer, Stacks

__all__ = ["RasterSweep", "rows_at_once"]

ROOM, MORE_ROOM = 2**26, 2**28  # numbers that a sweep may hold, on a processor and elsewhere


class Sized(Protocol):
    """A network that tells about how many numbers a sweep holds per draw."""

    @property
    def numbers_per_draw(self) -> int:
        """The number."""


def rows_at_once(net: Sized, device: torch.device) -> int:
    """The number of draws that one sweep takes."""
    return max(16, (ROOM if device.type == "cpu" else MORE_ROOM) // net.numbers_per_draw)


class Drawing(Protocol):
    """Makes values from parameters: a head of MADE, or a scalar map that is solved."""

    num_features: int

    def draws(
        self, index: Tensor, noise: Tensor, params: Tensor, x: Tensor, coded: Tensor
    ) -> list[Callable[[], object]]:
        """Calls that fill ``x`` and ``coded``, see ``Head.draws`` of MADE."""


class _Past:
    """One layer's inputs in a row, phase by phase of the dilation: a location sees one block of memory."""

    def __init__(self, layer: ConvLayer, width: int, n: int, like: Tensor) -> None:
        self.inputs, self.taps, self.dilation, self.groups = layer.inputs, layer.taps, layer.dilation, layer.groups
        slots = -(-width // self.dilation) + self.taps
        self.memory = like.new_zeros(self.dilation, slots * self.inputs, n)

    def seen(self, column: int, group: int) -> Tensor:
        """A view of shape ``(taps * inputs + seen inputs, n)``."""
        slot, phase = divmod(column, self.dilation)
        return self.memory[phase, slot * self.inputs :][: self.taps * self.inputs + self.groups.seen[group]]

    def here(self, column: int) -> Tensor:
        """All inputs at a column, shape ``(inputs, n)``, a view."""
        slot, phase = divmod(column, self.dilation)
        return self.memory[phase, (slot + self.taps) * self.inputs :][: self.inputs]


def _blocks(layer: ConvLayer) -> list[Tensor]:
    """The second stack's weight for each group, ``(channels of the group, taps * inputs + seen inputs)``."""
    parts = [layer.left_bias.new_empty(len(layer.left_bias), 0)]
    if layer.left_weight is not None:
        parts.append(layer.left_weight.transpose(1, 2).flatten(1))
    if layer.here_weight is not None:
        parts.append(layer.here_weight)
    whole = torch.cat(parts, 1)
    own, seen = layer.groups
    past = layer.taps * layer.inputs
    return [whole[own[c] : own[c + 1], : past + seen[c]].contiguous() for c in range(len(seen))]


def _columns(offset: Tensor) -> Tensor:
    """A bias ``(channels,)`` or ``(n, channels)`` as ``(channels, 1, n or 1)``."""
    return offset.T.unsqueeze(1) if offset.dim() == 2 else offset[:, None, None]


class RasterSweep:
    """Draws ``n`` events at a time, feature-major, so that the inputs of a location are one block of memory.

    The first stack goes row by row, the second location by location and channel by channel; each weight is used once
    per location.  ``bias``, of the outputs, has shape ``(C * H * W, num_params)``, a context ``(n, context_dim)``.
    """

    def __init__(self, net: Stacks, head: Drawing, bias: Tensor, n: int, context: Tensor | None) -> None:
        self.net, self.head, self.n = net, head, n
        channels, height, width = net.shape
        layers = net.layers
        self.out_base = bias.view(channels, height, width, -1, 1).permute(1, 2, 0, 3, 4)  # (H, W, C, num_params, 1)
        if context is not None and net.out_context is not None:
            self.out_base = self.out_base + net.out_context @ context.T
        self.params = bias.new_empty(width, channels, net.num_params, n)
        self.x = bias.new_empty(height, width, channels, n)
        self.index = torch.arange(bias.shape[0], device=bias.device).view(channels, height, width).permute(1, 2, 0)
        self.past = [_Past(layer, width, n, bias) for layer in layers]
        self.base = [bias.new_empty(net.hidden, width, n) for _ in layers]
        self.last = bias.new_zeros(net.hidden, n)
        self.left_offsets = [_columns(layer.left_offset(context)) for layer in layers]
        self.left_positions = net.positions(-1)
        if net.two:
            self.above_offsets = [layer.above_offset(context) for layer in layers]
            self.above_positions = net.positions(0)
            # The rows that a layer looks back; the first layer's own row is not among them.
            spans = [1 + (layer.kernel[0] - 1) * layer.dilation for layer in layers]
            self.rows = [deque[Tensor](maxlen=span) for span in spans]
        self.steps = self._steps()

    def _steps(self) -> list[list[Callable[[], None]]]:
        blocks = [_blocks(layer) for layer in self.net.layers]
        channels, _, width = self.net.shape
        own = self.net.layers[0].groups.own
        out = [self.net.out_weight[c, :, : own[c + 1]].contiguous() for c in range(channels)]
        return [
            [self._step(column, c, [block[c] for block in blocks], out[c]) for c in range(channels)]
            for column in range(width)
        ]

    def _step(self, column: int, group: int, weights: list[Tensor], out_weight: Tensor) -> Callable[[], None]:
        """Adds the network's outputs to the parameters of one channel of a column."""
        start, stop = self.net.layers[0].groups.own[group : group + 2]
        jobs = []
        for k, activation in enumerate(self.net.activations):
            later = self.past[k + 1].here(column) if k + 1 < len(self.past) else self.last
            seen = self.past[k].seen(column, group)
            jobs.append((self.base[k][start:stop, column], weights[k], seen, activation, later[start:stop]))
        (base0, weight0, seen0, activation0, later0), *rest = jobs
        place, known = self.params[column, group], self.last[:stop]

        def run() -> None:
            stream = torch.addmm(base0, weight0, seen0)
            later0.copy_(activation0(stream))
            for base, weight, seen, activation, later in rest:
                stream += torch.addmm(base, weight, seen)
                later.copy_(activation(stream))
            place.addmm_(out_weight, known)

        return run

    def _above(self, row: int) -> None:
        """Computes the first stack at this row, and its links to the second."""
        stream: Tensor | None = None
        for k, layer in enumerate(self.net.layers):
            offset = self.above_offsets[k]
            made = layer.above_row(self.rows[k], offset)
            if made is None:
                made = offset[..., None].expand(self.n, -1, self.net.shape[2])
            if k == 0 and self.above_positions is not None:
                rows = self.above_positions
                made = made + rows[:, min(row, rows.shape[1] - 1)]
            stream = made if stream is None else stream + made
            post = self.net.activations[k](stream)
            if k + 1 < len(self.rows):
                self.rows[k + 1].append(post)
            self.base[k].flatten(1).addmm_(layer.link_weight, post.permute(1, 2, 0).flatten(1))

    def run(self, given: Tensor | None = None) -> Tensor:
        """Draws, shape ``(n, C, H, W)``, from uniform noise or from ``given``, of the same shape."""
        if given is not None:  # solves may write into it
            given = given.permute(2, 3, 1, 0).clone(memory_format=torch.contiguous_format)
        _, height, width = self.net.shape
        features = self.head.num_features
        for row in range(height):
            for base, offset in zip(self.base, self.left_offsets, strict=True):
                base.copy_(offset)
            if (places := self.left_positions) is not None:
                self.base[0] += places[:, min(row, places.shape[1] - 1), :, None]
            if self.net.two:
                self._above(row)
            self.params.copy_(self.out_base[row])
            noise = torch.rand_like(self.x[row]) if given is None else given[row]
            for column, steps in enumerate(self.steps):
                here = self.past[0].here(column)
                for c, step in enumerate(steps):
                    step()
                    one = (slice(c, c + 1),)
                    for call in self.head.draws(
                        self.index[row, column][one],
                        noise[column][one],
                        self.params[column][one],
                        self.x[row, column][one],
                        here[c * features : (c + 1) * features],
                    ):
                        call()
            if self.net.two and row + 1 < height:
                whole = torch.stack([self.past[0].here(column) for column in range(width)])
                self.rows[0].append(whole.permute(2, 1, 0))
        return self.x.permute(3, 2, 0, 1)
