"""A network in fixed point, whose outputs no batch, thread or machine can change."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from pyro_flows.core.checks import integer, layer_widths

__all__ = ["FixedPointNet", "rounded"]

_BITS, _RANGE = 12, 8  # of values: multiples of 2 ** -12 up to 2 ** 8
_MOST = 2.0 ** (_RANGE + _BITS)  # in multiples
_FINEST, _LEAST = 16, 3  # of weights: multiples of 2 ** -16 where they may still reach 2 ** 3
_EXACT = 52  # bits of a sum, one less than float64 holds
_AT_ONCE = 8192  # rows and places without gradients


def rounded(value: Tensor, bits: int = 0, least: float = -math.inf, most: float = math.inf) -> Tensor:
    """Clips to ``least`` and ``most`` and rounds to multiples of ``2 ** -bits``, in float64.

    The gradient is that of the clip alone, so it is biased: the slope of rounding is zero almost everywhere.
    """
    value = value.double().clamp(least, most)
    near = (value * 2.0**bits).round_().mul_(2.0**-bits) if bits else value.round()
    # The difference is exact, and so is the sum.
    return value + (near - value).detach() if torch.is_grad_enabled() else near


class _Sums(nn.Module):
    """One linear layer at every place: exact sums of products in fixed point.

    Values are whole numbers of ``2 ** -_BITS``, shape ``(inputs, height, width, rows)``: one product of matrices serves
    all places and rows, and rows move together.
    """

    weight: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, kernel: Size, zero: bool = False) -> None:
        super().__init__()
        self.kernel = kernel
        terms = inputs * kernel.numel()
        total = _EXACT - _BITS - _RANGE - math.ceil(math.log2(terms + 1))
        self.bits = min(_FINEST, total - _LEAST)
        self.bound = 2.0 ** (total - self.bits)
        size = 0.0 if zero else terms**-0.5
        # Pyro and copies want no empty parameter.  Places of the kernel come first.
        shape = kernel.numel(), outputs, inputs
        self.register_parameter("weight", nn.Parameter((2 * torch.rand(shape) - 1) * size) if inputs else None)
        self.bias = nn.Parameter((2 * torch.rand(outputs) - 1) * size)

    def on(self, places: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """The layer on images of this size, with its parameters rounded once."""
        bias = rounded(self.bias, self.bits, -self.bound, self.bound)[:, None] * 2.0**_BITS
        if self.weight is None:
            return lambda h: bias[..., None, None].expand(-1, *h.shape[1:])
        weight = rounded(self.weight, self.bits, -self.bound, self.bound)
        # Neighbors beyond the image are zeros.
        down, right = (min(side // 2, place - 1) for side, place in zip(self.kernel, places, strict=True))
        y, x = self.kernel[0] // 2, self.kernel[1] // 2
        weight = weight.unflatten(0, self.kernel)[y - down : y + down + 1, x - right : x + right + 1]
        kernel, (outputs, inputs) = weight.shape[:2], weight.shape[2:]
        shifts = list(itertools.product(*map(range, kernel)))
        border = (0, 0, right, right, down, down)
        height, width = places
        if len(shifts) == 1 or inputs <= outputs:
            matrix = weight.movedim(2, 0).reshape(outputs, -1)

            def of_windows(h: Tensor) -> Tensor:
                seen = h
                if len(shifts) > 1:
                    padded = F.pad(h, border)
                    seen = torch.cat([padded[:, y : y + height, x : x + width] for y, x in shifts])
                return torch.addmm(bias, matrix, seen.reshape(len(seen), -1)).view(outputs, *h.shape[1:])

            return of_windows
        # To shift the fewer outputs is cheaper.
        matrix = weight.reshape(-1, inputs)

        def of_products(h: Tensor) -> Tensor:
            parts = (matrix @ h.reshape(inputs, -1)).view(len(shifts), outputs, *h.shape[1:]).unbind()
            middle = len(shifts) // 2
            sums = F.pad(parts[middle] + bias[..., None, None], border)
            for k, (y, x) in enumerate(shifts):
                if k != middle:
                    y, x = 2 * down - y, 2 * right - x
                    sums[:, y : y + height, x : x + width] += parts[k]
            return sums[:, down : down + height, right : right + width]

        return of_products


class FixedPointNet(nn.Module):
    r"""A network of vectors, series or images of whole numbers, equal to the last bit wherever it is evaluated.

    Inputs are :math:`(x - (L - 1) / 2) / s` with the greatest power of two :math:`s \le L - 1`.  Weights and values are
    rounded to multiples of powers of two and clipped, so that each sum of products is a multiple of a power of two, and
    less than :math:`2^{52}` times that: float64 adds such numbers without error in any order.  Everything else is ReLU,
    rounding, clipping and scaling by powers of two.  So outputs depend on the inputs and the parameters alone: on no
    batch, number of threads, library or device, as long as it computes in float64.

    Hidden values are multiples of :math:`2^{-12}` up to :math:`2^8`, weights multiples of :math:`2^{-16}` up to 8 and
    more (coarser from 8,000 inputs on).  Gradients pass roundings unchanged.

    Args:
        in_channels: channels of the input, 0 for a learned constant; a vector is an event of channels.
        out_channels: channels of the output.
        num_params: parameters per output channel and place.
        space_dims: 0 for vectors, 1 for series, 2 for images.
        levels: the number :math:`L` of values that the inputs mostly have, from 0.
        hidden_dims: widths of the layers; with places, the first has kernels of ``kernel_size`` and the others of 1.
        kernel_size: odd size of the first and the last layer's kernels.
        context_dim: size of a context, which joins the inputs as further channels.

    Example:
        >>> net = pf.nets.FixedPointNet(3, 2, levels=10)
        >>> pixels = torch.randint(10, (5, 3)).double()
        >>> torch.equal(net(pixels)[0], net(pixels[:1])[0])  # to the last bit
        True

    References:
        Integer networks against the differences of platforms: Integer Networks for Data Compression with
        Latent-Variable Models (Ballé, Johnston & Minnen, ICLR 2019).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_params: int = 1,
        space_dims: int = 0,
        levels: int = 256,
        hidden_dims: Sequence[int] = (64, 64),
        kernel_size: int = 3,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        self.in_channels = integer("", "in_channels", in_channels, 0)
        self.context_dim = integer("", "context_dim", context_dim, 0)
        self.out_channels, self.num_params, self.space_dims = out_channels, num_params, space_dims
        self.hidden_dims = layer_widths("", "hidden_dims", hidden_dims)
        self.center, self.exponent = 0.5 * (levels - 1), (levels - 1).bit_length() - 1
        self.kernel_size = integer("", "kernel_size", kernel_size, odd=True)
        sides = 1 if space_dims < 2 else kernel_size, 1 if space_dims < 1 else kernel_size
        inputs = in_channels + context_dim
        wide, narrow = Size(sides), Size((1, 1))
        if not inputs:  # hidden layers would be constants, too
            self.hidden_dims, wide = (), narrow
        sizes = list(itertools.pairwise((inputs, *self.hidden_dims, out_channels * num_params)))
        self.layers = nn.ModuleList(
            _Sums(i, o, wide if k in (0, len(sizes) - 1) else narrow, zero=k == len(sizes) - 1)
            for k, (i, o) in enumerate(sizes)
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``x``: whole numbers, ``(*batch, in_channels, *space)``; ``context`` broadcasts to ``(*batch, context_dim)``.

        Returns float64, shape ``(*batch, out_channels, *space, num_params)``.
        """
        cut = x.dim() - 1 - self.space_dims
        batch, space = x.shape[:cut], x.shape[cut + 1 :]
        places = (1,) * (2 - self.space_dims) + tuple(space)
        rows = batch.numel()
        h = x.reshape(rows, self.in_channels, *places).movedim(0, -1)
        h = rounded((h.double() - self.center) * 2.0 ** (_BITS - self.exponent), 0, -_MOST, _MOST)
        if context is not None:
            seen = rounded(context.expand(*batch, self.context_dim).double() * 2.0**_BITS, 0, -_MOST, _MOST)
            seen = seen.reshape(rows, self.context_dim).t()[:, None, None]
            h = torch.cat((h, seen.expand(-1, *places, -1)))
        layers = [cast(_Sums, layer).on(places) for layer in self.layers]
        if not torch.is_grad_enabled() and h.device.type == "cpu":
            # These pieces fit in the processor's cache.
            size = max(1, _AT_ONCE // (places[0] * places[1]))
            h = torch.cat([_through(layers, piece) for piece in h.split(size, -1)], -1)
        else:
            h = _through(layers, h)
        out = h.reshape(self.out_channels, self.num_params, *space, rows).movedim(-1, 0).movedim(2, -1)
        return out.reshape(*batch, self.out_channels, *space, self.num_params)


def _through(layers: list[Callable[[Tensor], Tensor]], h: Tensor) -> Tensor:
    first, *others = layers
    h = first(h)
    for layer in others:
        h = layer(rounded(h, 0, 0.0, _MOST) if torch.is_grad_enabled() else h.clamp_(0.0, _MOST).round_())
    return h * 2.0**-_BITS
