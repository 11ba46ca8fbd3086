r"""A map of images that is increasing in each coordinate, its value and its slopes, as one node of the autograd graph.

.. math:: f(x) = t x + W_3 * \big(g\, h(W_2 * h(W_1 * x + b_1) + b_2)\big) + b_3

by convolutions whose centre taps from a channel to itself have products :math:`\ge 0` along every path.  Hidden
channels are ``c * K + k``: ``K`` of them belong to each channel ``c``.  The slope of each coordinate after itself is

.. math:: d_c = t_c + \sum_k a_{3,ck}\, g_{ck}\, h'(u_{2,ck}) \sum_j A_{c,kj}\, h'(u_{1,cj})

with the centre taps :math:`a_3` and :math:`A_{kj} = a_{2,kj} a_{1,j}`: one small matrix product per channel and place.
For the gradient the input, the two hidden maps and the inner sums are kept.  Convolutions leave out what their masks
make zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flows.core.modes import autocasting, batched, plain_eager
from pyro_flows.transforms.mint.orders import Tile, tiles

__all__ = ["MONOTONE", "Layout", "Monotone", "Weights", "convolved", "layout", "monotone", "value_and_slope"]


class Monotone(NamedTuple):
    """An increasing function of a number, with a slope in [0, 1] that can be had from the function's value."""

    name: str
    value: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]  # from the value; a new tensor
    curl: Callable[[Tensor], Tensor] | None  # from the value: the slope's slope over the slope; None where that is 0
    steepest: float

    def __reduce__(self) -> tuple[object, ...]:
        return monotone, ("", self.name)


_LEAK = 0.01


def _softplus(u: Tensor) -> Tensor:
    # Beyond the usual threshold of 20 its slope would jump by more than the rounding of float64.
    return F.softplus(u, threshold=40)


MONOTONE = {
    each.name: each
    for each in (
        Monotone(
            "elu",
            F.elu,
            lambda u: F.elu(u, inplace=True),
            lambda h: h.clamp_max(0).add_(1),
            lambda h: torch.lt(h, 0, out=torch.empty_like(h)),
            1.0,
        ),
        Monotone(
            "softplus",
            _softplus,
            _softplus,
            lambda h: -torch.expm1(-h),
            lambda h: torch.exp(-h),
            1.0,
        ),
        Monotone("tanh", torch.tanh, torch.tanh_, lambda h: 1 - h * h, lambda h: -2 * h, 1.0),
        Monotone("sigmoid", torch.sigmoid, torch.sigmoid_, lambda h: h * (1 - h), lambda h: 1 - 2 * h, 0.25),
        Monotone(
            "leaky_relu",
            lambda u: F.leaky_relu(u, _LEAK),
            lambda u: F.leaky_relu(u, _LEAK, inplace=True),
            lambda h: (h > 0).to(h.dtype) * (1 - _LEAK) + _LEAK,
            None,
            1.0,
        ),
    )
}


def monotone(name: str, activation: str) -> Monotone:
    """The activation of this name.

    Args:
        name: of who asks, for the message.
        activation: one of ``"elu"``, ``"softplus"``, ``"tanh"``, ``"sigmoid"`` and ``"leaky_relu"``.

    Raises:
        ValueError: for any other, since a map with one that falls somewhere need not be invertible.
    """
    if not isinstance(activation, str) or activation not in MONOTONE:
        raise ValueError(
            f"{name}: expected activation to be one of {sorted(MONOTONE)}, got {activation!r}; it must never fall, and "
            "its slope must be known and at most 1, or the map could not be inverted (silu, gelu and mish fall, relu "
            "is flat; dropout and batch normalisation are no functions of one number)"
        )
    return MONOTONE[activation]


Convolve = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]

_WIDE = 64  # hidden channels at least, for a tile of its own


class Weights(NamedTuple):
    """All that :func:`value_and_slope` needs beside the activation and ``x``; ``M = C * K``.

    Attributes:
        first, second, third: weights of the convolutions, shapes ``(M, C, ...)``, ``(M, M, ...)``, ``(C, M, ...)``.
        inner: :math:`A`, shape ``(C, K, K)``.
        outer: :math:`a_3`, shape ``(C, K)``.
        first_bias, second_bias: shape ``(M,)``, or ``(n, M)`` where rows have their own.
        scale: :math:`t > 0`, shape ``(C, H, W)`` or ``(C, 1, 1)``, or that with a leading ``n``.
        third_bias: as ``scale``.
        gate: positive, shape ``(n, M)``, or ``None`` for 1.
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


class Layout(NamedTuple):
    """What a pass needs to know beside its tensors: the activation, and the tiles of each convolution."""

    activation: Monotone
    tiles: tuple[tuple[Tile, ...], ...]


def layout(activation: Monotone, taps: Tensor, groups: int, dilation: int = 1) -> Layout:
    """How to go through three convolutions with these taps.

    Args:
        activation: after the first two.
        taps: boolean, shape ``(C, C, rows, columns)``: which taps there are, between channels.
        groups: number of hidden channels for each channel.
        dilation: distance of neighbouring taps.
    """
    channels = taps.shape[0]
    # Several tiles pay where each is wide, and where half of the pairs of channels have no taps.
    count = min(channels, channels * groups // _WIDE) if not taps.flatten(2).any(-1).all() else 1
    sides = ((groups, 1, 1), (groups, groups, max(count, 1)), (1, groups, 1))
    return Layout(activation, tuple(tiles(taps, *each, dilation) for each in sides))


def value_and_slope(layout: Layout, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """``f(x)`` and the slope of each coordinate after itself, both of the shape of ``x``, ``(n, C, H, W)``.

    Costs three convolutions and about ``1 / (number of taps * C)`` of the second one for the slope.
    """
    if autocasting(x.device):  # the slope is worth full precision
        with torch.autocast(x.device.type, enabled=False):
            return value_and_slope(layout, x.to(weights.first.dtype), weights)
    return convolved(layout.activation, x, weights, [partial(_convolve, each) for each in layout.tiles])


def convolved(act: Monotone, x: Tensor, w: Weights, convolve: Sequence[Convolve]) -> tuple[Tensor, Tensor]:
    """:func:`value_and_slope` by the three convolutions that are given.

    Args:
        act: the activation.
        x: shape ``(n, C, H, W)``.
        w: the weights.
        convolve: from input, weight and bias (``None`` for none) to a new tensor, the output at the places of ``x``.
    """
    eager = plain_eager()
    activate = act.in_place if eager else act.value
    outer = w.outer if w.gate is None else w.outer * w.gate.unflatten(-1, w.outer.shape)
    first = activate(convolve[0](x, w.first, w.first_bias))
    if eager and torch.is_grad_enabled():
        second = activate(convolve[1](first, w.second, w.second_bias))
        slope = _Slope.apply(act, first, second, w.inner, outer)
    else:
        sums = w.inner @ _grouped(act.slope(first), x.shape[1])
        second = activate(convolve[1](first, w.second, w.second_bias))
        del first
        slope = outer.unsqueeze(-2) @ (_grouped(act.slope(second), x.shape[1]) * sums)
        del sums
    gated = second if w.gate is None else second * w.gate[..., None, None]
    value = torch.addcmul(convolve[2](gated, w.third, None) + w.third_bias, w.scale, x)
    return value, slope.view(x.shape) + w.scale


def _convolve(tiles: Sequence[Tile], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution that keeps the size; the bias is shared, or one for each row."""
    shared = bias if bias is not None and bias.dim() == 1 else None
    parts = {}
    for tile in tiles:
        own = None if shared is None else shared[tile.out]
        part = F.conv2d(x[:, tile.into], tile.weight(weight), own, padding=tile.padding, dilation=tile.dilation)
        rows, columns = (slice(s, s + n) for s, n in zip(tile.skip, x.shape[2:], strict=True))
        parts[tile.out.start] = part[:, :, rows, columns]
    out = torch.cat([parts[k] for k in sorted(parts)], 1) if len(parts) > 1 else part[:, :, rows, columns]
    # Contiguous, so that what it was a part of is free from here on.
    return out.contiguous() if bias is shared else out + bias[..., None, None]


def _grouped(hidden: Tensor, channels: int) -> Tensor:
    """Hidden maps as ``(n, C, K, H * W)``."""
    return hidden.reshape(hidden.shape[0], channels, hidden.shape[1] // channels, hidden.shape[2] * hidden.shape[3])


def _slope(act: Monotone, first: Tensor, second: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """The slope without :math:`t`, shape ``(n, C, 1, H * W)``, in plain operations."""
    sums = inner @ _grouped(act.slope(first), len(inner))
    return outer.unsqueeze(-2) @ (_grouped(act.slope(second), len(inner)) * sums)


class _Slope(torch.autograd.Function):
    """:func:`_slope`, which keeps the inner sums alone: autograd would keep five hidden maps more."""

    @staticmethod
    def forward(ctx: Any, act: Monotone, first: Tensor, second: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        sums = inner @ _grouped(act.slope(first), len(inner))
        ctx.act = act
        ctx.save_for_backward(first, second, inner, outer, sums)
        return outer.unsqueeze(-2) @ _grouped(act.slope(second), len(inner)).mul_(sums)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if autocasting(grad.device):
            with torch.autocast(grad.device.type, enabled=False):
                return _Slope.backward(ctx, grad)
        *inputs, sums = ctx.saved_tensors
        act, (first, second, inner, outer) = ctx.act, inputs
        if torch.is_grad_enabled() or batched(grad):
            return None, *torch.func.vjp(partial(_slope, act), *inputs)[1](grad)
        _, wants_first, wants_second, wants_inner, wants_outer = ctx.needs_input_grad
        by_first = by_second = by_inner = by_outer = None
        by_terms = _grouped(act.slope(second), len(inner)).mul_(grad)  # of the terms of the outer sum
        if wants_outer:
            by_outer = (by_terms * sums).sum(-1).sum_to_size(outer.shape)
        if wants_second and act.curl is not None:
            # The slope's derivative after the value is `curl`.
            by_second = (sums * grad).mul_(outer.unsqueeze(-1)).view(second.shape).mul_(act.curl(second))
        by_sums = by_terms.mul_(outer.unsqueeze(-1))
        if wants_inner:
            by_inner = (by_sums @ _grouped(act.slope(first), len(inner)).mT).sum(0)
        if wants_first and act.curl is not None:
            by_first = (inner.mT @ by_sums).view(first.shape).mul_(act.curl(first))
        return None, by_first, by_second, by_inner, by_outer
