r"""A map of images that is increasing in each coordinate, its value and its slopes, as one node of the autograd graph.

.. math:: f(x) = t x + W_3 * \big(g\, h(W_2 * h(W_1 * x + b_1) + b_2)\big) + b_3

by convolutions whose centre taps from a channel to itself have products :math:`\ge 0` along every path.  Hidden
channels are ``c * K + k``: ``K`` of them belong to each channel ``c``.  The slope of each coordinate after itself is

.. math:: d_c = t_c + \sum_k a_{3,ck}\, g_{ck}\, h'(u_{2,ck}) \sum_j A_{c,kj}\, h'(u_{1,cj})

with the centre taps :math:`a_3` and :math:`A_{kj} = a_{2,kj} a_{1,j}`: one small matrix product per channel and place.
For the gradient the input, the two hidden maps and the inner sums are kept; slopes are had from values once more.
Convolutions leave out what their masks make zero.  Second derivatives, and everything that traces or transforms the
call, take plain differentiable operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flows.core.modes import autocasting, batched, plain_eager
from pyro_flows.nets.activations import KNOWN, KnownActivation
from pyro_flows.transforms.mint.orders import Tile, tiles

__all__ = ["MONOTONE", "Layout", "Weights", "layout", "monotone", "plain_pass", "value_and_slope"]


MONOTONE = {name: known for name, known in KNOWN.items() if known.steepest is not None}


def monotone(name: str, activation: str) -> KnownActivation:
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

    activation: KnownActivation
    tiles: tuple[tuple[Tile, ...], ...]
    dilation: int = 1


def layout(activation: KnownActivation, taps: Tensor, groups: int, dilation: int = 1) -> Layout:
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
    return Layout(activation, tuple(tiles(taps, *each, dilation) for each in sides), dilation)


def value_and_slope(layout: Layout, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """``f(x)`` and the slope of each coordinate after itself, both of the shape of ``x``, ``(n, C, H, W)``.

    Costs three convolutions and about ``1 / (number of taps * C)`` of the second one for the slope.
    """
    if autocasting(x.device):  # the slope is worth full precision
        with torch.autocast(x.device.type, enabled=False):
            return value_and_slope(layout, x.to(weights.first.dtype), weights)
    if not plain_eager():
        return _plain(layout, x, *weights)
    if torch.is_grad_enabled():
        return _apply(layout, x, *weights)
    return _run(layout, x, weights, keep=False)[:2]


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Convolution that keeps the size; the bias is shared, or one for each row."""
    padding = [side // 2 * dilation for side in weight.shape[-2:]]
    own = bias if bias is None or bias.dim() == 1 else None
    out = F.conv2d(x, weight, own, padding=padding, dilation=dilation)
    return out if bias is own else out + bias[..., None, None]


def _tiled_conv(tiles: Sequence[Tile], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As :func:`_conv`; the result need not be contiguous."""
    shared = bias if bias is not None and bias.dim() == 1 else None
    parts = {}
    for tile in tiles:
        own = None if shared is None else shared[tile.out]
        part = F.conv2d(x[:, tile.into], tile.weight(weight), own, padding=tile.padding, dilation=tile.dilation)
        rows, columns = (slice(s, s + n) for s, n in zip(tile.skip, x.shape[2:], strict=True))
        parts[tile.out.start] = part[:, :, rows, columns]
    out = torch.cat([parts[k] for k in sorted(parts)], 1) if len(parts) > 1 else part[:, :, rows, columns]
    return out if bias is None or shared is not None else out + bias[..., None, None]


def _activate(act: KnownActivation, pre: Tensor) -> Tensor:
    pre = pre.contiguous()  # what it was a part of is free from here on
    return (act.in_place or act.value)(pre)


def _grouped(hidden: Tensor, channels: int) -> Tensor:
    """Hidden maps as ``(n, C, K, H * W)``."""
    return hidden.reshape(hidden.shape[0], channels, hidden.shape[1] // channels, hidden.shape[2] * hidden.shape[3])


def _plain(layout: Layout, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    return plain_pass(layout.activation, x, Weights(*tensors), [partial(_conv, dilation=layout.dilation)] * 3)


def plain_pass(act: KnownActivation, x: Tensor, w: Weights, convolve: Sequence[Convolve]) -> tuple[Tensor, Tensor]:
    """:func:`value_and_slope` in plain operations, by the three convolutions that are given.

    Args:
        act: the activation.
        x: shape ``(n, C, H, W)``.
        w: the weights.
        convolve: from input, weight and bias (``None`` for none) to the output, at the places of ``x``.
    """
    hidden = act.value(convolve[0](x, w.first, w.first_bias))
    slopes = w.inner @ _grouped(act.slope(hidden), x.shape[1])
    hidden = act.value(convolve[1](hidden, w.second, w.second_bias))
    slopes = slopes * _grouped(act.slope(hidden), x.shape[1])
    outer = w.outer
    if w.gate is not None:
        hidden = hidden * w.gate[..., None, None]
        outer = outer * w.gate.unflatten(-1, outer.shape)
    value = convolve[2](hidden, w.third, None) + w.third_bias + w.scale * x
    return value, (outer.unsqueeze(-2) @ slopes).reshape(x.shape) + w.scale


def _run(layout: Layout, x: Tensor, w: Weights, keep: bool) -> tuple[Tensor | None, ...]:
    """Value and slope, and what is kept, if anything is: the two hidden maps and the inner sums."""
    act, channels = layout.activation, x.shape[1]
    first = _activate(act, _tiled_conv(layout.tiles[0], x, w.first, w.first_bias))
    inner = torch.matmul(w.inner, _grouped(act.slope(first), channels))
    second = _activate(act, _tiled_conv(layout.tiles[1], first, w.second, w.second_bias))
    first = first if keep else None
    slopes = _grouped(act.slope(second), channels).mul_(inner)
    inner = inner if keep else None
    outer, gated = w.outer, second
    if w.gate is not None:
        gated = second * w.gate[..., None, None]
        outer = outer * w.gate.unflatten(-1, outer.shape)
    slope = torch.matmul(outer.unsqueeze(-2), slopes).view(x.shape).add_(w.scale)
    del slopes
    value = torch.addcmul(_tiled_conv(layout.tiles[2], gated, w.third, None), w.scale, x).add_(w.third_bias)
    return value, slope, first, second, inner


def _to_shape(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Sums over what a tensor of this shape was broadcast along."""
    return value if value.shape == shape else value.sum_to_size(shape)


def _pull_conv(
    tiles: Sequence[Tile], grad: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    if not (wants_x or wants_weight):
        return None, None
    by_x: Tensor | None = None
    by_weight = torch.zeros_like(weight) if wants_weight else None
    for tile in tiles:
        part = tile.weight(weight).contiguous()
        own = grad[:, tile.out]
        # As many rows and columns as the convolution made, of which some were left out.
        edges: list[int] = []
        for axis in (1, 0):
            made = x.shape[2 + axis] + 2 * tile.padding[axis] - (part.shape[2 + axis] - 1) * tile.dilation
            edges += [tile.skip[axis], made - x.shape[2 + axis] - tile.skip[axis]]
        own = F.pad(own, edges) if any(edges) else own.contiguous()
        seen, mask = x[:, tile.into].contiguous(), [wants_x, wants_weight, False]
        here, of_part, _ = torch.ops.aten.convolution_backward.default(
            own, seen, part, None, (1, 1), tile.padding, (tile.dilation,) * 2, False, (0, 0), 1, mask
        )
        if wants_weight:
            tile.weight(by_weight).copy_(of_part)
        if wants_x:
            if by_x is None:
                by_x = here
            else:
                by_x[:, tile.into].add_(here)
    return by_x, by_weight


class _Pass(torch.autograd.Function):
    """:func:`value_and_slope` with its gradient, which makes the slopes once more in place of keeping them."""

    @staticmethod
    def forward(ctx: object, layout: Layout, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        value, slope, *kept = _run(layout, x, Weights(*tensors), keep=True)
        ctx.layout = layout
        ctx.save_for_backward(x, *kept, *tensors)
        ctx.set_materialize_grads(False)
        return value, slope

    @staticmethod
    def backward(ctx: object, grad: Tensor | None, by_slope: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [g for g in (grad, by_slope) if g is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        if autocasting(given[0].device):
            with torch.autocast(given[0].device.type, enabled=False):
                return _Pass.backward(ctx, grad, by_slope)
        x, first, second, inner, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled() or any(batched(g) for g in given):
            return None, *_pull_plainly(ctx.layout, (x, *tensors), grad, by_slope)
        wanted, weights = ctx.needs_input_grad[1:], Weights(*tensors)
        return None, *_pull(ctx.layout, x, first, second, inner, weights, grad, by_slope, wanted)


def _pull_plainly(
    layout: Layout, inputs: Sequence[Tensor | None], grad: Tensor | None, by_slope: Tensor | None
) -> list[Tensor | None]:
    """The gradient in operations that can be differentiated further."""
    present = [each for each in inputs if each is not None]

    def run(*given: Tensor) -> tuple[Tensor, Tensor]:
        rest = iter(given)
        return _plain(layout, *(None if each is None else next(rest) for each in inputs))

    (value, slope), pull = torch.func.vjp(run, *present)
    grads = iter(
        pull(
            (
                torch.zeros_like(value) if grad is None else grad,
                torch.zeros_like(slope) if by_slope is None else by_slope,
            )
        )
    )
    return [None if each is None else next(grads) for each in inputs]


def _pull(
    layout: Layout,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    inner: Tensor,
    w: Weights,
    grad: Tensor | None,
    by_slope: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients after ``x`` and all weights, given those after value and slope."""
    act = layout.activation
    wants_x, *rest = wanted
    want = Weights(*rest)
    channels, shape = x.shape[1], second.shape
    by = dict.fromkeys(Weights._fields)
    wants_inner_map = any((wants_x, want.first, want.second, want.inner, want.first_bias, want.second_bias))
    gate = None if w.gate is None else w.gate[..., None, None]
    by_x: Tensor | None = None
    along: Tensor | None = None  # the gradient after the second pre-activation
    slope2 = _grouped(act.slope(second), channels) if wants_inner_map or by_slope is not None else None
    through: Tensor | None = None  # the gradient after the first slopes
    if by_slope is not None:
        slope1 = _grouped(act.slope(first), channels)
        outer = w.outer if gate is None else w.outer * w.gate.unflatten(-1, w.outer.shape)
        weighted = slope2 * _grouped(by_slope, channels)
        inner = inner * weighted
        if want.outer or want.gate:
            total = inner.sum(-1)  # (n, C, K)
            if gate is None:
                by["outer"] = total.sum(0)
            else:
                by["outer"] = (total * w.gate.view(total.shape)).sum(0)
                by["gate"] = (total * w.outer).flatten(1)
        weighted.mul_(outer.unsqueeze(-1))
        if want.inner:
            by["inner"] = torch.matmul(weighted, slope1.transpose(-1, -2)).sum(0)
        if wants_inner_map:
            through = torch.matmul(w.inner.transpose(-1, -2), weighted).view(shape)
            if act.curvature is not None:
                along = inner.mul_(outer.unsqueeze(-1)).view(shape).mul_(act.curvature(second))
    if grad is not None:
        gated = second if gate is None or not want.third else second * gate
        by_gated, by["third"] = _pull_conv(
            layout.tiles[2], grad, gated, w.third, wants_inner_map or want.gate, want.third
        )
        if want.gate:
            by_gate = (by_gated * second).sum((-1, -2))
            by["gate"] = by_gate if by["gate"] is None else by["gate"].add_(by_gate)
        if wants_inner_map:
            by_second = by_gated if gate is None else by_gated.mul_(gate)
            by_second = by_second.mul_(slope2.view(shape))
            along = by_second if along is None else along.add_(by_second)
    if along is not None:
        if want.second_bias:
            by["second_bias"] = along.sum((-1, -2) if w.second_bias.dim() == 2 else (0, -1, -2))
        wants_first_map = wants_x or want.first or want.first_bias
        along, by["second"] = _pull_conv(layout.tiles[1], along, first, w.second, wants_first_map, want.second)
    if through is not None and act.curvature is not None:
        through.mul_(act.curvature(first))
        along = through if along is None else along.add_(through)
    if along is not None and (wants_x or want.first or want.first_bias):
        along.mul_(act.slope(first))
        if want.first_bias:
            by["first_bias"] = along.sum((-1, -2) if w.first_bias.dim() == 2 else (0, -1, -2))
        by_x, by["first"] = _pull_conv(layout.tiles[0], along, x, w.first, wants_x, want.first)
    if grad is not None:
        if wants_x:
            by_x = w.scale * grad if by_x is None else by_x.addcmul_(w.scale, grad)
        if want.third_bias:
            by["third_bias"] = _to_shape(grad, w.third_bias.shape)
        if want.scale:
            by["scale"] = _to_shape(grad * x if by_slope is None else torch.addcmul(by_slope, grad, x), w.scale.shape)
    elif want.scale:
        by["scale"] = _to_shape(by_slope, w.scale.shape)
    return by_x, *by.values()


# Without the detour by which apply() looks for transforms of torch.func: there are none where it is called.
_apply = super(torch.autograd.Function, _Pass).apply
