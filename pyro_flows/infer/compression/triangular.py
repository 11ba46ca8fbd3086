"""The discrete model of a flow of one orientation: :math:`P(n_i | n_{<i}) = F(f_i(n_i + 1)) - F(f_i(n_i))`.

The map :math:`f_i` increases in coordinate :math:`i` and depends on earlier ones, at their pixel centers
:math:`n_j + 1/2`.  Two streams go through the layers: all centers by whole convolutions, and one coordinate at a border
between levels, which sees the first stream and moves through the center taps alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal

from pyro_flows.core.wrap import Wrap
from pyro_flows.distributions import Dequantized, Flow
from pyro_flows.distributions.queries.layers import Leaf, is_elementwise, leaves_of
from pyro_flows.infer.compression.conditionals import Conditionals, Edges, Read, snapshot
from pyro_flows.infer.density.surprise import pixel_flow, single_base
from pyro_flows.transforms import ActNorm, LogitPixels, Mint
from pyro_flows.transforms.mint.orders import as_image, ranks

__all__ = ["FlowConditionals"]


#: Moves numbers, shape ``(n, m)``, at these ``m`` dimensions alone, with earlier ones at their pixel centers.
Border = Callable[[Tensor, Tensor], Tensor]


def _centers(layer: Mint, x: Tensor, context: Tensor | None) -> tuple[Tensor, Border]:
    """A layer's value at pixel centers, and its map of borders.

    Of each coordinate, ``D = C * H * W`` of them, the pre-activations ``seen_first`` and ``seen_second``, shape ``(n,
    D, K)``, and the value ``seen_third``, shape ``(n, D)``, lack the coordinate's own share.  The center taps ``into``,
    ``square`` and ``out`` have shapes ``(C, K)``, ``(C, K, K)`` and ``(n or 1, C, K)``, ``scale`` has ``(n or 1, D)``.
    """
    image = x.unsqueeze(-2) if x.dim() == 3 else x
    n, channels, height, width = image.shape
    w, attending = layer.map.split(*layer._weights(context, x.shape[:1]))
    act = layer.convolutions.activation
    groups, (down, right) = layer.num_groups, (k // 2 for k in w.first.shape[2:])
    padding = (down * layer.dilation, right * layer.dilation)
    convolve = functools.partial(F.conv2d, padding=padding, dilation=layer.dilation)
    into = w.first[:, :, down, right].view(channels, groups, channels).diagonal(dim1=0, dim2=2).T
    square = w.second[:, :, down, right].view(channels, groups, channels, groups)
    square = square.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    out = w.outer[None] if w.gate is None else w.outer * w.gate.unflatten(-1, w.outer.shape)

    def row(maps: Tensor, own: Tensor) -> Tensor:
        """Hidden maps ``(n, C, K, H * W)`` without the own share, as ``(n, D, K)``."""
        rest = maps.reshape(n, channels, groups, height * width) - own
        return rest.transpose(-1, -2).flatten(1, 2)

    flat = image.reshape(n, channels, 1, height * width)
    first = convolve(image, w.first) + w.first_bias[..., None, None]
    hidden = act.value(first)
    seen_first = row(first, into[:, :, None] * flat)
    own = square @ hidden.view(n, channels, groups, -1)
    second = convolve(hidden, w.second) + w.second_bias[..., None, None]
    seen_second = row(second, own)
    hidden = act.value(second)
    own = (out[..., None] * hidden.view(n, channels, groups, -1)).sum(2).flatten(1)
    gated = hidden if w.gate is None else hidden * w.gate[..., None, None]
    third = convolve(gated, w.third) + w.third_bias
    if layer.attention is not None and attending is not None:  # without an own share
        third = third + layer.attention.rule(image, attending)
    value = w.scale * image + third
    scale = w.scale.expand(w.scale.shape[0] if w.scale.dim() == 4 else 1, channels, height, width).flatten(1)
    seen_third = third.flatten(1) - own

    def border(edge: Tensor, dims: Tensor) -> Tensor:
        channel = dims // (height * width)
        hidden = act.value(seen_first[:, dims] + into[channel] * edge[..., None])
        hidden = act.value(seen_second[:, dims] + torch.einsum("mkj,nmj->nmk", square[channel], hidden))
        return scale[:, dims] * edge + seen_third[:, dims] + (out[:, channel] * hidden).sum(-1)

    return value.view(x.shape), border


class FlowConditionals(Conditionals):
    """The conditionals of ``Mint`` layers of one orientation on ``LogitPixels``, over independent normals."""

    def __init__(self, model: Flow | Dequantized) -> None:
        self.model = self.flow = snapshot(pixel_flow(model, "Codec"))
        self.event_shape, self.context_dim = self.flow.event_shape, self.flow.context_dim
        pixels, layers = self._check()
        dims = self.event_shape.numel()
        self.levels = torch.full((dims,), pixels.levels)
        self.others = {"margin": torch.tensor(pixels.margin, dtype=torch.float64)}
        base = single_base(self.flow.base(), self.flow, "Codec")
        if not isinstance(base, Normal):
            raise ValueError(f"Codec: expected a base of independent normals, got {type(base).__name__}")
        self.loc, self.scale = (each.detach().expand(self.event_shape).flatten() for each in (base.loc, base.scale))
        wave = layers[0].waves
        if any(not torch.equal(layer.waves, wave) for layer in layers):  # layers share only the order
            wave = ranks(as_image("Codec", self.event_shape), layers[0].order, layers[0].lower)
        wave = wave.flatten()
        self.steps = [(wave == k).nonzero()[:, 0] for k in range(int(wave.max()) + 1)]
        self.numbers = dims * (6 * pixels.levels.bit_length() + sum(4 + 3 * layer.num_groups for layer in layers))

    def _check(self) -> tuple[LogitPixels, list[Mint]]:
        leaves = leaves_of(self.flow.chain, None)
        last = leaves[-1][0]
        if not isinstance(last, LogitPixels) or leaves[-1][2]:
            raise ValueError(
                "Codec: expected a flow that ends in LogitPixels(event_shape, levels), from which the levels are known,"
                f" got one that ends in {type(last).__name__}"
            )
        layers = []
        for k, (part, _, inverse) in enumerate(leaves[:-1]):
            if isinstance(part, Mint) and not inverse:
                layers.append(part)
            elif not (isinstance(part, (ActNorm, Wrap)) and is_elementwise(part)):
                raise ValueError(
                    f"Codec: expected Mint layers and elementwise parts, got {type(part).__name__}"
                    f"{' the other way round' if inverse else ''} (part {k} of {len(leaves)}), of which no conditionals"
                    " are known"
                )
        kinds = {(layer.order, layer.lower, layer.kernel) for layer in layers}
        if len(kinds) != 1:
            raise ValueError(
                "Codec: expected Mint layers of one orientation, order and kernel, so that the flow is triangular, got "
                f"{len(kinds)} kinds; build it by mintnet(event_shape, one_sided=True)"
            )
        return last, layers

    @torch.no_grad()
    def _base(self, x: Tensor, context: Tensor | None, dims: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """Maps edges of ``dims``, by default all, to base values in standard deviations; shape ``(n, len(dims))``."""
        value = (x.double() + 0.5).unflatten(1, self.event_shape)
        places = torch.arange(len(self.levels)) if dims is None else dims
        borders: list[Border] = []
        for leaf in leaves_of(self.flow.chain, self.flow.inner_context(context))[::-1]:
            border: Border = functools.partial(self._elementwise, leaf)
            if isinstance(leaf.part, Mint):
                value, border = _centers(leaf.part, value, leaf.context)
            else:
                value = leaf.to_base(value)
            borders.append(border)

        @torch.no_grad()
        def base(edge: Tensor) -> Tensor:
            moved = edge.double()
            for border in borders:
                moved = border(moved, places)
            return (moved - self.loc[places]) / self.scale[places]

        return base

    def _elementwise(self, leaf: Leaf, edge: Tensor, dims: Tensor) -> Tensor:
        whole = edge.new_ones(len(edge), len(self.levels)).index_copy(1, dims, edge)
        return leaf.to_base(whole.unflatten(1, self.event_shape)).flatten(1)[:, dims]

    def edges(self, x: Tensor, context: Tensor | None, dims: Tensor | None = None) -> Edges:
        base = self._base(x, context, dims)
        return lambda middle: torch.special.ndtr(base(middle))

    def find(self, rows: int, context: Tensor | None, read: Read) -> Tensor:
        x = torch.zeros(rows, len(self.levels), dtype=torch.long)
        for dims in self.steps:
            x[:, dims] = read(dims, self.edges(x, context, dims))
        return x

    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        base = self._base(x, context)
        low = base(x).masked_fill(x == 0, -torch.inf)
        high = base(x + 1).masked_fill(x == self.levels - 1, torch.inf)
        # A difference in the nearer tail keeps its digits.
        low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)
        mass = torch.special.ndtr(high) - torch.special.ndtr(low)
        return mass.clamp(min=torch.finfo(mass.dtype).tiny).log().sum(-1)
