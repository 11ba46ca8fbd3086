"""The convolutional conditioner of flows of images and series."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from pyro_flows.core.checks import event_size, integer
from pyro_flows.core.modes import plain_eager
from pyro_flows.nets.activations import Activation, activation_functions

__all__ = ["ConvNet", "image_shape"]


def image_shape(name: str, event_shape: int | Iterable[int]) -> Size:
    """Checks that an event has shape ``(C, H, W)`` or ``(C, T)``; ``name`` is for the message."""
    shape = event_size(event_shape)
    if len(shape) not in (2, 3):
        raise ValueError(
            f"{name}: expected an event of shape (C, H, W) or (C, T), got {tuple(shape)}; a single channel has a "
            "dimension of its own too, e.g. (1, 28, 28)"
        )
    if len(shape) == 2 and shape[0] == shape[1] > 4:
        warnings.warn(
            f"{name}: an event of shape {tuple(shape)} is a series of {shape[0]} channels and {shape[1]} steps; an "
            f"image of one channel is (1, {shape[0]}, {shape[1]})",
            stacklevel=3,
        )
    return shape


class ConvNet(nn.Module):
    r"""A residual convolutional conditioner: ``num_params`` maps per output channel.

    A convolution, ``num_blocks`` blocks :math:`h + W_2 * a(W_1 * a(h) + b + V c)`, and a last convolution of
    :math:`a(h)`, all padded with zeros, so maps have the image's size.  A context :math:`c` adds a bias per channel to
    the first convolution and each block.  Without batch normalization, an event's parameters depend on that event
    alone.

    Args:
        in_channels: channels of the image.
        out_channels: channels that get parameters.
        num_params: parameters per output channel and place.
        space_dims: 2 for images, 1 for series.
        hidden_channels: channels of the hidden layers.
        num_blocks: number of residual blocks; 0 leaves two convolutions.
        kernel_size: odd size of all kernels; or three, of the first convolution, those of the blocks, and the last.
        context_dim: size of the context, 0 for none.
        activation: a name or an elementwise function without parameters.
        zero_init: whether the last convolution starts at zero.

    Example:
        >>> net = pf.nets.ConvNet(3, 6, num_params=2)
        >>> net(torch.randn(5, 3, 8, 8)).shape
        torch.Size([5, 6, 8, 8, 2])

    References:
        Density estimation using Real NVP (Dinh et al., 2016), section 3.7, arXiv:1605.08803.
        Identity Mappings in Deep Residual Networks (He et al., 2016), arXiv:1603.05027.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_params: int = 1,
        space_dims: int = 2,
        hidden_channels: int = 32,
        num_blocks: int = 2,
        kernel_size: int | Sequence[int] = 3,
        context_dim: int = 0,
        activation: Activation = "relu",
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        if space_dims not in (1, 2):
            raise ValueError(f"expected space_dims to be 1 or 2, got {space_dims!r}")
        sizes = tuple(kernel_size) if isinstance(kernel_size, Sequence) else (kernel_size,) * 3
        sizes = tuple(integer("", "kernel_size", size, odd=True) for size in sizes)
        if len(sizes) != 3:
            raise ValueError(f"expected one kernel_size, or three, got {kernel_size!r}")
        self.in_channels = integer("", "in_channels", in_channels)
        self.out_channels = integer("", "out_channels", out_channels)
        self.num_params = integer("", "num_params", num_params)
        self.hidden_channels = integer("", "hidden_channels", hidden_channels)
        self.num_blocks = integer("", "num_blocks", num_blocks, 0)
        self.context_dim = integer("", "context_dim", context_dim, 0)
        self.space_dims = space_dims
        self.activations = activation_functions(activation, 2 * num_blocks + 1)

        def convolution(inputs: int, outputs: int, size: int) -> nn.Conv1d | nn.Conv2d:
            make = nn.Conv1d if space_dims == 1 else nn.Conv2d
            return make(inputs, outputs, size, padding=size // 2)

        hidden = hidden_channels
        self.first = convolution(in_channels, hidden, sizes[0])
        self.blocks = nn.ModuleList(convolution(hidden, hidden, sizes[1]) for _ in range(2 * num_blocks))
        self.last = convolution(hidden, num_params * out_channels, sizes[2])
        if context_dim:
            self.context = nn.Linear(context_dim, (1 + num_blocks) * hidden_channels, bias=False)
        if zero_init:
            for parameter in self.last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``x``: shape ``(*batch, in_channels, *space)``; ``context``: broadcasts to ``(*batch, context_dim)``.

        Returns shape ``(*batch, out_channels, *space, num_params)``; each parameter is contiguous.
        """
        dims = self.space_dims
        batch, space = x.shape[: -1 - dims], x.shape[-dims:]
        h = x.reshape(batch.numel(), self.in_channels, *space)
        if dims == 2 and h.dtype == torch.float32 and h.device.type == "cpu" and plain_eager():
            h = h.contiguous(memory_format=torch.channels_last)  # a fifth faster; float64 is slower
        biases = self._biases(batch, context)
        acts = iter(self.activations)
        h = self._add(self.first(h), biases, 0)
        for k in range(self.num_blocks):
            inner = self._add(self.blocks[2 * k](next(acts)(h)), biases, k + 1)
            h = h + self.blocks[2 * k + 1](next(acts)(inner))
        out = self.last(next(acts)(h)).contiguous()
        return out.view(*batch, self.num_params, self.out_channels, *space).movedim(-2 - dims, -1)

    def _biases(self, batch: Size, context: Tensor | None) -> Tensor | None:
        """The context's biases, shape ``(rows or 1, layers, channels, 1, ..)``."""
        if context is None:
            return None
        flat = F.linear(context, self.context.weight)
        rows = flat.shape[:-1].numel()
        if rows != 1:
            rows, flat = batch.numel(), flat.expand(*batch, flat.shape[-1])
        return flat.reshape(rows, 1 + self.num_blocks, self.hidden_channels, *(1,) * self.space_dims)

    def _add(self, maps: Tensor, biases: Tensor | None, layer: int) -> Tensor:
        return maps if biases is None else maps + biases[:, layer]
