r"""A map of images that increases in each coordinate: its value and its slopes.

.. math:: f(x) = t x + W_3 * \big(g\, h(W_2 * h(W_1 * x + b_1) + b_2)\big) + b_3

by convolutions whose center taps from a channel to itself have products :math:`\ge 0` along every path.  Hidden
channels are ``c * K + k``, ``K`` for each channel ``c``.  The slope, the derivative of each coordinate with respect to
itself, is

.. math:: d_c = t_c + \sum_k a_{3,ck}\, g_{ck}\, h'(u_{2,ck}) \sum_j A_{c,kj}\, h'(u_{1,cj})

with center taps :math:`a_3` and :math:`A_{kj} = a_{2,kj} a_{1,j}`: one small matrix product per channel and place.  The
gradient needs the input, the two hidden maps and the inner sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flows.core.modes import GradientByHand, full_precision, plain_eager
from pyro_flows.nets.activations import KNOWN, KnownActivation
from pyro_flows.transforms.mint.orders import Tile, tiles

__all__ = ["MONOTONE", "Convolutions", "Weights", "convolutions", "convolved", "monotone", "value_and_slope"]

#: The activations of a Mint layer: never falling, with a known slope of at most 1.
MONOTONE = {name: known for name, known in KNOWN.items() if known.steepest is not None}


def monotone(name: str, activation: str) -> KnownActivation:
    """The entry of ``MONOTONE``; ``name`` is the class that the caller sees."""
    if not isinstance(activation, str) or activation not in MONOTONE:
        raise ValueError(
            f"{name}: expected activation to be one of {sorted(MONOTONE)}, got {activation!r}; it must never fall, and "
            "its slope must be known and at most 1, or the map could not be inverted (silu, gelu and mish fall, relu "
            "is flat; dropout and batch normalization are no functions of one number)"
        )
    return MONOTONE[activation]


Convolve = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]

_WIDE = 64  # fewest hidden channels of a tile


class Weights(NamedTuple):
    """The tensors of :func:`value_and_slope` beside ``x``; ``M = C * K``.

    Attributes:
        first, second, third: the convolutions' weights, shapes ``(M, C, ...)``, ``(M, M, ...)``, ``(C, M, ...)``.
        inner: :math:`A`, shape ``(C, K, K)``.
        outer: :math:`a_3`, shape ``(C, K)``.
        first_bias, second_bias: shape ``(M,)``, or ``(n, M)`` where rows have their own.
        scale: :math:`t > 0`, shape ``(C, H, W)`` or ``(C, 1, 1)``, or that with a leading ``n``.
        third_bias: as ``scale``.
        gate: :math:`g > 0`, shape ``(n, M)``, or ``None`` for 1.
    """

    first: Tensor
    second: Tensor
    third: Tensor
    inner: Tensor
    outer: Tensor
    first_bias: Tensor
    second_bias: Tensor
    third_bias: Tensor
    scale: Tensor
    gate: Tensor | None = None


class Convolutions(NamedTuple):
    """Three masked convolutions without weights: the activation after the first two, and each one's tiles."""

    activation: KnownActivation
    tiles: tuple[tuple[Tile, ...], ...]


def convolutions(activation: KnownActivation, taps: Tensor, groups: int, dilation: int = 1) -> Convolutions:
    """Cuts three convolutions with these taps, and ``groups`` hidden channels per channel, into tiles."""
    channels = taps.shape[0]
    # Tiles pay where each is wide, and half of the pairs of channels have no taps.
    count = min(channels, channels * groups // _WIDE) if not taps.flatten(2).any(-1).all() else 1
    sides = ((groups, 1, 1), (groups, groups, max(count, 1)), (1, groups, 1))
    return Convolutions(activation, tuple(tiles(taps, *each, dilation) for each in sides))


@full_precision
def value_and_slope(by: Convolutions, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """``f(x)`` and the slope of each coordinate, both of the shape of ``x``, ``(n, C, H, W)``.

    Costs three convolutions and about ``1 / (number of taps * C)`` of the second one for the slope.
    """
    x = x.to(weights.first.dtype)
    return convolved(by.activation, x, weights, [partial(_convolve, each) for each in by.tiles])


def convolved(act: KnownActivation, x: Tensor, w: Weights, convolve: Sequence[Convolve]) -> tuple[Tensor, Tensor]:
    """:func:`value_and_slope` by the given convolutions.

    These map an input, a weight and a bias (or ``None``) to a new tensor, the output at the places of ``x``.
    """
    eager = plain_eager()
    activate = (act.in_place if eager else None) or act.value
    outer = w.outer if w.gate is None else w.outer * torch.unflatten(w.gate, -1, w.outer.shape)
    first = activate(convolve[0](x, w.first, w.first_bias))
    if eager and torch.is_grad_enabled():
        second = activate(convolve[1](first, w.second, w.second_bias))
        slope = _Slope.record(act, first, second, w.inner, outer)
    else:  # one hidden map at a time
        sums = w.inner @ _slopes(act, first, x.shape[1])
        second = activate(convolve[1](first, w.second, w.second_bias))
        del first
        slope = outer.unsqueeze(-2) @ (_slopes(act, second, x.shape[1]) * sums)
    gated = second if w.gate is None else second * w.gate[..., None, None]
    value = torch.addcmul(convolve[2](gated, w.third, None) + w.third_bias, w.scale, x)
    return value, slope.view(x.shape) + w.scale


def _convolve(tiles: Sequence[Tile], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution that keeps the size; the bias is shared, or one for each row."""
    shared = bias if bias is not None and bias.dim() == 1 else None
    parts = []
    for tile in tiles:
        own, (top, left), (height, width) = None if shared is None else shared[tile.out], tile.skip, x.shape[2:]
        own_weight = weight[tile.out, tile.into, tile.rows, tile.columns]
        part = F.conv2d(x[:, tile.into], own_weight, own, padding=tile.padding, dilation=tile.dilation)
        parts.append(part[:, :, top : top + height, left : left + width])
    out = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    # Contiguous: frees a larger tensor around it.
    return out.contiguous() if bias is None or shared is not None else out + bias[..., None, None]


def _slopes(act: KnownActivation, hidden: Tensor, channels: int) -> Tensor:
    """The activation's slopes at the values ``hidden``, as ``(n, C, K, H * W)``; a new tensor."""
    slopes = act.slope(hidden)  # type: ignore[misc]  # known for every entry of MONOTONE
    rows, width, height, columns = hidden.shape
    return slopes.reshape(rows, channels, width // channels, height * columns)


def _slope(act: KnownActivation, first: Tensor, second: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """The slope without :math:`t`, shape ``(n, C, 1, H * W)``, from both hidden maps."""
    sums = inner @ _slopes(act, first, len(inner))
    return outer.unsqueeze(-2) @ (_slopes(act, second, len(inner)) * sums)


class _Slope(GradientByHand):
    """:func:`_slope`, which keeps the inner sums alone; autograd would keep five hidden maps more."""

    @staticmethod
    def forward(ctx: Any, act: KnownActivation, *inputs: Tensor) -> Tensor:
        first, second, inner, outer = inputs
        sums = inner @ _slopes(act, first, len(inner))
        ctx.act = act
        ctx.save_for_backward(*inputs, sums)
        return outer.unsqueeze(-2) @ _slopes(act, second, len(inner)).mul_(sums)

    @staticmethod
    def plain(ctx: Any) -> tuple[Callable[..., Tensor], Sequence[Tensor]]:
        return partial(_slope, ctx.act), ctx.saved_tensors[:-1]

    @staticmethod
    def pull(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        act, (first, second, inner, outer, sums) = ctx.act, ctx.saved_tensors
        _, wants_first, wants_second, wants_inner, wants_outer = ctx.needs_input_grad
        by_first = by_second = by_inner = by_outer = None
        weighted = _slopes(act, second, len(inner)).mul_(grad)
        if wants_outer:
            by_outer = (weighted * sums).sum(-1).sum_to_size(outer.shape)
        # Curvature: derivative of the slope with respect to the activation's value.
        if wants_second and act.curvature is not None:
            by_second = (sums * grad).mul_(outer.unsqueeze(-1)).view(second.shape).mul_(act.curvature(second))
        by_sums = weighted.mul_(outer.unsqueeze(-1))
        if wants_inner:
            by_inner = (by_sums @ _slopes(act, first, len(inner)).mT).sum(0)
        if wants_first and act.curvature is not None:
            by_first = (inner.mT @ by_sums).view(first.shape).mul_(act.curvature(first))
        return None, by_first, by_second, by_inner, by_outer
