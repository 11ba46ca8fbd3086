"""Orders of the coordinates of images and sequences, and what stacked masked convolutions make of them.

An event ``(C, H, W)`` has its coordinates ``(c, y, x)`` in one of two total orders: ``"channel"``, lexicographic in
``(c, y, x)``, one channel after another; or ``"position"``, lexicographic in ``(y, x, c)``, one pixel after another.
An event ``(C, T)`` counts as ``(C, 1, T)``, with kernels of one row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.nets.convolutional import image_shape

__all__ = ["ORDERS", "Tile", "as_image", "earlier_taps", "kernel_of", "ranks", "tiles", "waves"]

ORDERS = ("channel", "position")


def as_image(name: str, event_shape: Sequence[int]) -> tuple[int, int, int]:
    """``(C, H, W)`` of an event ``(C, H, W)`` or ``(C, T)``.

    Args:
        name: of who asks, for the message.
        event_shape: the shape of one event.

    Raises:
        ValueError: for an event of another number of dimensions.
    """
    shape = image_shape(name, event_shape)
    return (shape[0], 1, shape[1]) if len(shape) == 2 else tuple(shape)


def kernel_of(name: str, event_shape: Sequence[int], kernel_size: int) -> tuple[int, int]:
    """Rows and columns of the kernel for an event; the size must be odd, so that it has a centre.

    Raises:
        ValueError: for a size that is no odd positive integer.
    """
    if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"{name}: expected kernel_size to be an odd integer >= 1, got {kernel_size!r}")
    return (1 if len(event_shape) == 2 else kernel_size), kernel_size


def _check(order: str) -> None:
    if order not in ORDERS:
        raise ValueError(f"expected order to be one of {ORDERS}, got {order!r}")


def ranks(shape: tuple[int, int, int], order: str, lower: bool = True) -> Tensor:
    """The place of each coordinate in the order, from 0 on; shape ``(C, H, W)``, integers.

    Args:
        shape: ``(C, H, W)``.
        order: ``"channel"`` or ``"position"``.
        lower: whether to count from the first coordinate, or from the last.
    """
    _check(order)
    channels, height, width = shape
    places = torch.arange(channels * height * width)
    if order == "channel":
        found = places.view(channels, height, width)
    else:
        found = places.view(height, width, channels).permute(2, 0, 1).contiguous()
    return found if lower else found.flip(0, 1, 2)


def earlier_taps(channels: int, kernel: tuple[int, int], order: str, lower: bool = True) -> Tensor:
    """Which taps of a masked convolution read what comes strictly before the output in the order.

    The remaining tap that a triangular Jacobian allows is the centre, from the same channel at the same place; it makes
    the diagonal.

    Args:
        channels: number of channels.
        kernel: rows and columns, both odd.
        order: ``"channel"`` or ``"position"``.
        lower: whether to read what comes before, or what comes after.

    Returns:
        Boolean, shape ``(channels, channels, *kernel)``, indexed by output channel, input channel, row and column as in
        a convolution's weight.
    """
    # On a board that a kernel just covers, the order between any place and the middle one is that of the offsets.
    place = ranks((channels, *kernel), order, lower)
    centre = place[:, kernel[0] // 2, kernel[1] // 2]
    return place < centre[:, None, None, None]


def waves(
    shape: tuple[int, int, int], kernel: tuple[int, int], order: str, lower: bool = True, dilation: int = 1
) -> Tensor:
    r"""The length of the longest chain of dependencies that ends at each coordinate; shape ``(C, H, W)``, integers.

    For maps made of stacked masked convolutions with taps as :func:`earlier_taps` and the centre, however many (at
    least one): coordinates of the same wave do not depend on each other.  In closed form: with radii :math:`r_x, r_y`
    of the kernel, cut to :math:`W - 1` and :math:`H - 1`, :math:`x + (r_x + 1)(y + (r_y + 1) c)` in the order by
    channel, and :math:`c + C (x + (r_x + 1) y)` in that by position.  A larger kernel thus makes longer chains.  Taps
    that lie apart make shorter ones: every ``dilation``-th row and column is an image of its own.

    Args:
        shape: ``(C, H, W)``.
        kernel: rows and columns, both odd.
        order: ``"channel"`` or ``"position"``.
        lower: whether coordinates depend on what comes before, or on what comes after.
        dilation: distance of neighbouring taps.
    """
    _check(order)
    if dilation > 1:
        apart = torch.zeros(shape, dtype=torch.long)
        for y, x in itertools.product(*(range(min(dilation, n)) for n in shape[1:])):
            part = apart[:, y::dilation, x::dilation]
            part.copy_(waves(tuple(part.shape), kernel, order, lower))
        return apart
    channels, height, width = shape
    down, right = (min(size // 2, length - 1) for size, length in zip(kernel, (height, width), strict=True))
    c, y, x = (torch.arange(n).view(view) for n, view in zip(shape, ((-1, 1, 1), (-1, 1), (-1,)), strict=True))
    # Along an axis that the kernel does not reach there is no chain.
    y, x = y * (down > 0), x * (right > 0)
    steps = x + (right + 1) * (y + (down + 1) * c) if order == "channel" else c + channels * (x + (right + 1) * y)
    steps = steps.expand(shape).contiguous()
    return steps if lower else steps.flip(0, 1, 2)


class Tile(NamedTuple):
    """A part of a masked convolution: channels into channels, by the part of the kernel that is not all zeros there."""

    out: slice
    into: slice
    rows: slice
    columns: slice
    padding: tuple[int, int]
    skip: tuple[int, int]  # rows and columns to leave out at the beginning of what comes out
    dilation: int = 1

    def weight(self, weight: Tensor) -> Tensor:
        """The part of a convolution's weight."""
        return weight[self.out, self.into, self.rows, self.columns]


def tiles(taps: Tensor, out: int, into: int, count: int, dilation: int = 1) -> tuple[Tile, ...]:
    """Cuts a masked convolution by its output channels, and leaves out what is all zeros; the widest tile comes first.

    Args:
        taps: boolean, shape ``(C, C, rows, columns)``: which taps there are, between channels.
        out: how many output channels belong to each channel.
        into: how many input channels belong to each channel.
        count: number of tiles, at most :math:`C`.
        dilation: distance of neighbouring taps.
    """
    channels, centre = taps.shape[0], [n // 2 for n in taps.shape[2:]]
    ends = [channels * k // count for k in range(count + 1)]
    found = []
    for first, last in itertools.pairwise(ends):
        here = taps[first:last]
        spans = []
        for axes in ((0, 2, 3), (0, 1, 3), (0, 1, 2)):  # input channels, rows, columns
            used = here.sum(axes).nonzero().squeeze(-1).tolist()
            spans.append((used[0], used[-1] + 1))
        (low, high), *kernel = spans
        before = [(c - start) * dilation for c, (start, _) in zip(centre, kernel, strict=True)]
        after = [(stop - 1 - c) * dilation for c, (_, stop) in zip(centre, kernel, strict=True)]
        padding = [max(pair) for pair in zip(before, after, strict=True)]
        skip = tuple(p - b for p, b in zip(padding, before, strict=True))
        slices = (slice(first * out, last * out), slice(low * into, high * into), *(slice(*k) for k in kernel))
        found.append(Tile(*slices, tuple(padding), skip, dilation))
    return tuple(sorted(found, key=lambda tile: tile.into.start - tile.into.stop))
