"""Orders of the coordinates of images and series, and dependencies under stacked masked convolutions.

The coordinates ``(c, y, x)`` of an event ``(C, H, W)`` have one of two total orders: ``"channel"``, lexicographic in
``(c, y, x)``, or ``"position"``, lexicographic in ``(y, x, c)``.  Series ``(C, T)`` count as ``(C, 1, T)``, with
kernels of one row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.core.checks import choice, integer
from pyro_flows.nets.convolutional import image_shape

__all__ = ["ORDERS", "Tile", "as_image", "earlier_taps", "kernel_of", "ranks", "tiles", "waves"]

ORDERS = ("channel", "position")


def as_image(name: str, event_shape: Sequence[int]) -> tuple[int, int, int]:
    """``(C, H, W)`` of an image or series; ``name`` is the class that the caller sees."""
    channels, *sides = image_shape(name, event_shape)
    return channels, 1 if len(sides) == 1 else sides[0], sides[-1]


def kernel_of(name: str, event_shape: Sequence[int], kernel_size: int) -> tuple[int, int]:
    """Rows and columns of an event's kernel; its size must be odd."""
    integer(name, "kernel_size", kernel_size, odd=True)
    return (1 if len(event_shape) == 2 else kernel_size), kernel_size


def ranks(shape: tuple[int, int, int], order: str, lower: bool = True) -> Tensor:
    """The rank of each coordinate in the order, from 0, or reversed; shape ``(C, H, W)``, integers."""
    choice("", "order", order, ORDERS)
    channels, height, width = shape
    places = torch.arange(channels * height * width)
    if order == "channel":
        found = places.view(channels, height, width)
    else:
        found = places.view(height, width, channels).permute(2, 0, 1).contiguous()
    return found if lower else found.flip(0, 1, 2)


def earlier_taps(channels: int, kernel: tuple[int, int], order: str, lower: bool = True) -> Tensor:
    """The taps of a masked convolution that read coordinates strictly before (or after) the output in the order.

    The center tap from the same channel is not among them.  Boolean, shape ``(channels, channels, *kernel)``, as a
    convolution's weight; both sides of the kernel are odd.
    """
    # Offsets are ordered as places of an image of the kernel's size.
    place = ranks((channels, *kernel), order, lower)
    middle = place[:, kernel[0] // 2, kernel[1] // 2]
    return place < middle[:, None, None, None]


def waves(
    shape: tuple[int, int, int], kernel: tuple[int, int], order: str, lower: bool = True, dilation: int = 1
) -> Tensor:
    """The length of the longest chain of dependencies that ends at each coordinate; shape ``(C, H, W)``, integers.

    For stacked masked convolutions with radii :math:`r_x, r_y` of the kernel, at most :math:`W - 1` and :math:`H - 1`:
    :math:`x + (r_x + 1)(y + (r_y + 1) c)` in the order by channel, and :math:`c + C (x + (r_x + 1) y)` in the order by
    position.  With dilated taps, every ``dilation``-th row and column is an image of its own.
    """
    choice("", "order", order, ORDERS)
    if dilation > 1:
        apart = torch.zeros(shape, dtype=torch.long)
        for row, column in itertools.product(*(range(min(dilation, n)) for n in shape[1:])):
            part = apart[:, row::dilation, column::dilation]
            part.copy_(waves((shape[0], part.shape[1], part.shape[2]), kernel, order, lower))
        return apart
    channels, height, width = shape
    down, right = (min(size // 2, length - 1) for size, length in zip(kernel, (height, width), strict=True))
    c, y, x = (torch.arange(n).view(view) for n, view in zip(shape, ((-1, 1, 1), (-1, 1), (-1,)), strict=True))
    # No chain along an axis that the kernel does not span.
    y, x = y * (down > 0), x * (right > 0)
    steps = x + (right + 1) * (y + (down + 1) * c) if order == "channel" else c + channels * (x + (right + 1) * y)
    steps = steps.expand(shape).contiguous()
    return steps if lower else steps.flip(0, 1, 2)


class Tile(NamedTuple):
    """A part of a masked convolution: channels, and the part of the kernel that is not all zeros."""

    out: slice
    into: slice
    rows: slice
    columns: slice
    padding: tuple[int, int]
    skip: tuple[int, int]  # first rows and columns of the output to leave out
    dilation: int


def tiles(taps: Tensor, out: int, into: int, count: int, dilation: int = 1) -> tuple[Tile, ...]:
    """Cuts a masked convolution by output channels into ``count`` tiles without zeros.

    ``taps`` is boolean, shape ``(C, C, rows, columns)``, true where there is a tap between two channels; each has
    ``into`` input and ``out`` output channels.
    """
    channels, (down, right) = taps.shape[0], (n // 2 for n in taps.shape[2:])
    found = []
    for first, last in itertools.pairwise(channels * k // count for k in range(count + 1)):
        here = taps[first:last]
        low, high = _span(here.sum((0, 2, 3)))
        (top, bottom), (left, stop) = _span(here.sum((0, 1, 3))), _span(here.sum((0, 1, 2)))
        before = (down - top) * dilation, (right - left) * dilation
        padding = max(before[0], (bottom - 1 - down) * dilation), max(before[1], (stop - 1 - right) * dilation)
        skip = padding[0] - before[0], padding[1] - before[1]
        ends = slice(first * out, last * out), slice(low * into, high * into)
        found.append(Tile(*ends, slice(top, bottom), slice(left, stop), padding, skip, dilation))
    return tuple(found)


def _span(counts: Tensor) -> tuple[int, int]:
    """The first index with a number other than 0, and the one after the last."""
    used = counts.nonzero().squeeze(-1).tolist()
    return used[0], used[-1] + 1
