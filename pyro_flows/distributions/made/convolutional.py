"""Convolutional MADE for images and sequences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Size, Tensor, nn

from pyro_flows.core.checks import event_size, integer, joint_shape, positive_integers
from pyro_flows.distributions.made.autoregressive import AutoregressiveModel, by_row
from pyro_flows.distributions.made.composed import as_head
from pyro_flows.distributions.made.head import Head
from pyro_flows.distributions.made.network import Member
from pyro_flows.inverse.raster import RasterSweep, rows_at_once
from pyro_flows.nets.activations import Activation, activation_functions
from pyro_flows.nets.masked_convolutional import Stacks

__all__ = ["ConvMADE"]

IMAGE_LAYERS, LEAST_LAYERS, MOST_LAYERS = 7, 4, 12


def _sides(image: bool, kernel_size: int | Sequence[int], layers: int) -> list[int]:
    """How many neighbors on one side each kernel sees."""
    given = positive_integers("ConvMADE", "kernel_size", kernel_size)
    if image and any(size % 2 == 0 for size in given):
        raise ValueError(f"ConvMADE: expected odd kernel sizes for images, got {kernel_size!r}")
    least = 3 if image else 2
    if given[0] < least:
        raise ValueError(
            f"ConvMADE: expected a kernel_size of at least {least} in the first layer, which does not see the place "
            f"itself, got {kernel_size!r}"
        )
    sizes = itertools.chain(given, itertools.repeat(given[-1]))
    return [size // 2 if image else size - 1 for size in itertools.islice(sizes, layers)]


def _distances(given: int | Sequence[int] | None, image: bool, length: int, sides: Sequence[int]) -> list[int]:
    """The dilation of each layer."""
    if given is not None or image:
        later = itertools.cycle(positive_integers("ConvMADE", "dilations", (1, 2) if given is None else given))
        return [1, *itertools.islice(later, len(sides) - 1)]
    found, reach, step = [1], sides[0], 1
    for side in sides[1:]:
        if reach >= length - 1:  # everything is seen: start over
            reach, step = sides[0], 1
        found.append(step)
        reach, step = reach + side * step, step * 2
    return found


class ConvMADE(AutoregressiveModel):
    r"""Convolutional MADE: :math:`p(x \mid c) = \prod_i p(x_i \mid x_{<i}, c)`, with weights shared by all places.

    Images ``(C, H, W)`` are in raster order, sequences ``(C, T)`` in time, with the channels of a place in turn.  The
    event's channels share out the hidden channels.  Images have two stacks of convolutions: one over the rows above,
    one over the past of the same row, which reads the first at every layer, so there is no blind spot to the upper
    right.  Sequences have only the second, dilated.  The first layer's bias depends on the place, the output bias on
    the dimension; outputs start at the head's biases.

    Kernels and dilations bound how far back a conditional looks, see ``reach``; beyond, it knows positions only.  A
    density costs one pass.  A draw costs about the arithmetic of one pass, in ``H * W * C`` small steps a layer.
    Differentiable draws (``rsample``) take one pass for each dimension: for small events.

    Args:
        event_shape: ``(C, H, W)`` or ``(C, T)``.
        head: ``"bernoulli"``, ``"normal"``, ``"mixture"``, ``"logistic"``, or a head such as ``CategoricalHead(256)``.
        hidden_channels: hidden channels of each stack, at least ``C``.
        num_layers: number of convolutions; by default 7 for images, and for sequences enough to see the whole past,
            from 4 to 12.
        kernel_size: odd for images; for sequences the steps seen, including the present.  One for all layers or one for
            each, the last repeated; at least 3 (images) or 2 (sequences) in the first layer.
        dilations: distances within later kernels, repeated as necessary; by default 1, 2 for images, and for sequences
            1, 2, 4, ... until all is seen.
        context_dim: size of the context, 0 for none; it enters every layer's bias.
        positions: whether the first layer's bias depends on the place.
        activation: a name or an elementwise function, or one for each layer.

    Raises:
        ValueError: for other events, even kernels for images, too few hidden channels, sizes out of range, or an
            unknown head.

    References:
        Pixel Recurrent Neural Networks (van den Oord et al., 2016), arXiv:1601.06759.
        Two stacks: PixelCNN Decoders (van den Oord et al., 2016), arXiv:1606.05328.
        Dilation: WaveNet (van den Oord et al., 2016), arXiv:1609.03499.
    """

    order: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        head: str | Head = "bernoulli",
        *,
        hidden_channels: int = 64,
        num_layers: int | None = None,
        kernel_size: int | Sequence[int] = (7, 3),
        dilations: int | Sequence[int] | None = None,
        context_dim: int = 0,
        positions: bool = True,
        activation: Activation = "elu",
    ) -> None:
        event = event_size(event_shape)
        if len(event) not in (2, 3):
            raise ValueError(
                f"ConvMADE: expected event_shape to be (C, H, W) or (C, T), got {tuple(event)}; for vectors see MADE"
            )
        super().__init__(event, as_head(head, event.numel()), integer("ConvMADE", "context_dim", context_dim, 0))
        self.hidden_channels = integer("ConvMADE", "hidden_channels", hidden_channels)
        if hidden_channels < event[0]:
            raise ValueError(
                f"ConvMADE: expected hidden_channels to be at least the number of channels {event[0]}, since each "
                f"needs one of its own, got {hidden_channels}"
            )
        image = len(event) == 3
        height, width = (event[1], event[2]) if image else (1, event[1])
        if num_layers is None:
            tried = [IMAGE_LAYERS] if image else list(range(LEAST_LAYERS, MOST_LAYERS + 1))
        else:
            tried = [integer("ConvMADE", "num_layers", num_layers)]
        for layers in tried:
            sides = _sides(image, kernel_size, layers)
            distances = _distances(dilations, image, width, sides)
            self.reach = sum(side * distance for side, distance in zip(sides, distances, strict=True))
            if self.reach >= width - 1:
                break
        self.net = Stacks(
            (event[0], height, width),
            self.head.num_features,
            self.head.num_params,
            hidden_channels,
            sides,
            distances,
            context_dim,
            positions,
            activation_functions(activation, layers),
        )
        start = self.head.bias().to(self.net.out_weight)
        self.bias = nn.Parameter(start.clone(memory_format=torch.contiguous_format))
        order = torch.arange(self.input_dim).view(event[0], -1).T.reshape(-1)
        self.register_buffer("order", order, persistent=False)

    def params(self, value: Tensor, context: Tensor | None = None, member: Member | None = None) -> Tensor:
        value = self.cast(value)
        batch = value.shape[: value.dim() - len(self.event_shape)]
        if context is not None:
            batch = joint_shape(batch, context.shape[:-1])
        net, rows = self.net, batch.numel()
        flat = value.expand(*batch, *self.event_shape).reshape(rows, self.input_dim)
        coded = self.head.features(flat).unflatten(1, net.shape).movedim(-1, 2).flatten(1, 2)
        made = net(coded, by_row(context, batch)).unflatten(1, (net.shape[0], -1)).movedim(2, -1).flatten(1, 3)
        return (made + self.bias).view(*batch, *self.bias.shape)

    def set_bias(self, bias: Tensor) -> None:
        self.bias.copy_(bias)

    def order_of(self, member: Member | None) -> Tensor:
        return self.order

    @torch.no_grad()
    def draw(self, batch: Size, context: Tensor | None, member: Member | None = None) -> Tensor:
        rows, context = batch.numel(), by_row(context, batch)
        out = self.bias.new_empty(rows, *self.net.shape)
        chunk = rows_at_once(self.net, self.device)
        for part in (slice(start, start + chunk) for start in range(0, rows, chunk)):
            own = None if context is None else context[part]
            out[part] = RasterSweep(self.net, self.head, self.bias, len(out[part]), own).run()
        return out.view(*batch, *self.event_shape)

    def extra_repr(self) -> str:
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"{tuple(self.event_shape)}, hidden_channels={self.hidden_channels}, reach={self.reach}{context}"
