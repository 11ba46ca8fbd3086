"""One pass through a masked network, forwards and backwards, without the work that the masks make useless.

The network and the univariate map that it serves are one node of the autograd graph; second derivatives, and everything
that traces or transforms the call, take plain differentiable operations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flows.core.modes import GradientByHand, full_precision, plain_eager
from pyro_flows.nets.activations import in_place, pull
from pyro_flows.nets.structure import Band, Cut, band_product, input_gradient, keep, weight_gradient
from pyro_flows.univariate.base import Univariate

__all__ = ["MaskedLayers", "Slab", "Slabs", "masked_network"]


class Slab(NamedTuple):
    """Dimensions ``[start, stop)`` by rank, none of which sees the hidden units from ``high`` on."""

    start: int
    stop: int
    high: int


class Slabs:
    """The ways to cut the outputs, one for each number of slabs.

    Args:
        steps: the step of each dimension, by rank.
        times: the times of the last hidden layer's units.
        num_params: parameters per dimension.
    """

    def __init__(self, steps: Tensor, times: Tensor, num_params: int) -> None:
        dims = len(steps)
        self.work = 2 * num_params * dims * len(times)  # of one sample, if nothing is left out
        self.ways = []
        for count in (1, 2, 4, 8):
            if count > dims:
                break
            cuts = [dims * k // count for k in range(count + 1)]
            highs = [int((times <= steps[c - 1]).sum()) for c in cuts[1:]]
            self.ways.append(tuple(map(Slab, cuts, cuts[1:], highs)))

    def at(self, n: int, device: torch.device) -> tuple[Slab, ...]:
        """The best way for ``n`` samples: a slab costs as much time as some 2^23 operations on a processor's core."""
        if device.type != "cpu":
            return self.ways[0]
        return min(self.ways, key=lambda way: self.work * n * (len(way) + 1) / (2 * len(way)) + 2**23 * len(way))


def _move_slabs(
    univariate: Univariate,
    slabs: Sequence[Slab],
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bits: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor], list[tuple[Tensor, ...]]]:
    """The last layer and the map: ``(moved, ladj)``, the masked weights and what the gradient needs, by slab."""
    n, dims = x.shape
    weight, bits, bias = (each.view(univariate.num_params, dims, *each.shape[1:]) for each in (weight, bits, bias))
    moved, z = x.new_empty(dims, n), x.T.contiguous()
    parts, every, ladjs = [], [], []
    for start, stop, high in slabs:
        part = keep(weight[:, start:stop, :high], bits[:, start:stop, :high]).flatten(0, 1)
        out = torch.addmm(bias[:, start:stop].reshape(-1, 1), part, hidden[:, :high].T)
        y, slope, kept = univariate.run(False, z[start:stop], out.view(len(weight), stop - start, n))
        moved[start:stop] = y
        ladjs.append(slope.sum(0))
        parts.append(part)
        every.append((z[start:stop], y, slope, *kept))
    return moved.T.contiguous(), sum(ladjs[1:], ladjs[0]), parts, every


def _pull_slabs(
    univariate: Univariate,
    slabs: Sequence[Slab],
    hidden: Tensor,
    bits: Tensor,
    parts: Sequence[Tensor],
    every: Sequence[Sequence[Tensor]],
    grad: Tensor,
    grad_ladj: Tensor,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients with respect to ``x``, the hidden units, the weight and the bias."""
    n, dims = grad.shape
    count, columns = univariate.num_params, grad.T.contiguous()
    bits = bits.view(count, dims, bits.shape[1])
    by_x, by_hidden = grad.new_empty(dims, n), torch.zeros_like(hidden)
    by_weight, by_bias = grad.new_empty(bits.shape), grad.new_empty(count, dims)
    for (start, stop, high), part, (z, y, slope, *kept) in zip(slabs, parts, every, strict=True):
        by_z, by_out = univariate.pull(False, z, y, slope, kept, columns[start:stop], grad_ladj)
        by_x[start:stop] = by_z
        by_bias[:, start:stop] = by_out.sum(2)
        flat = by_out.flatten(0, 1)
        by_hidden[:, :high].addmm_(flat.T, part)
        if not wants_weight:
            continue
        product = (flat @ hidden[:, :high]).view(count, stop - start, high)
        mask = bits[:, start:stop, :high]
        torch.bitwise_and(product.view(bits.dtype), mask, out=by_weight.view(bits.dtype)[:, start:stop, :high])
        by_weight[:, start:stop, high:].zero_()
    return by_x.T, by_hidden, by_weight.view(count * dims, -1) if wants_weight else None, by_bias.view(-1)


Function = Callable[[Tensor], Tensor]

ROWS = 2048  # of a batch at a time, where no gradient is wanted


_WIDE = 5  # parameters of a univariate from which on slabs pay


class MaskedLayers(NamedTuple):
    """What a pass needs to know of a network beside its weights."""

    activations: tuple[Function, ...]  # after each hidden layer
    joins: frozenset[int]  # layers to which the pre-activation of two layers below is added
    cuts: tuple[Cut, ...]  # of each layer
    slabs: Slabs | None  # of the outputs, if there is a hidden layer

    def slabs_at(self, univariate: Univariate | None, x: Tensor) -> tuple[Slab, ...] | None:
        """How to make the outputs slab by slab, if the univariate has so many parameters that it pays."""
        if univariate is None or self.slabs is None or univariate.num_params < _WIDE:
            return None
        return self.slabs.at(x.shape[0], x.device)


@full_precision  # the ladj is worth it
def masked_network(
    net: MaskedLayers,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    masks: Sequence[Tensor],
    univariate: Univariate | None = None,
) -> tuple[Tensor, ...]:
    """The last layer's output alone; with a univariate, ``x`` moved by it and the ladj, summed over dimensions.

    Args:
        net: the static description.
        x: shape ``(*batch, inputs)``.
        first_bias: shape ``(width,)`` or broadcasting to ``(*batch, width)``.
        weights: one matrix per layer; what stands in masked places is never used.
        biases: those of the layers after the first.
        masks: one for each weight, an integer of its element's size with all bits set where the weight counts.
        univariate: the map whose parameters the outputs are; ``None`` to return them.
    """
    first_bias = first_bias.to(x.dtype)
    if not plain_eager() or masks[0].element_size() != weights[0].element_size():
        return _plain(net, univariate, masks, x, first_bias, *weights, *biases)
    batch = x.shape[:-1]
    if first_bias.dim() > 1:
        first_bias = first_bias.expand(*batch, -1).reshape(-1, first_bias.shape[-1])
    flat = x if len(batch) == 1 else x.reshape(batch.numel(), x.shape[-1])
    if torch.is_grad_enabled():
        out = _Pass.record(net, univariate, masks, flat, first_bias, *weights, *biases)
    elif flat.shape[0] > 2 * ROWS and flat.device.type == "cpu":
        # In pieces that stay in the processor's cache, since nothing of them is kept.
        own = first_bias.dim() > 1
        pieces = zip(flat.split(ROWS), first_bias.split(ROWS) if own else itertools.repeat(first_bias), strict=False)
        done = [_result(net, rows, bias, weights, biases, masks, univariate) for rows, bias in pieces]
        out = tuple(torch.cat(part) for part in zip(*done, strict=True))
    else:
        out = _result(net, flat, first_bias, weights, biases, masks, univariate)
    if len(batch) == 1:
        return out
    return tuple(part.view(batch + part.shape[1:]) for part in out)


def _result(
    net: MaskedLayers,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    masks: Sequence[Tensor],
    univariate: Univariate | None,
) -> tuple[Tensor, ...]:
    slabs = net.slabs_at(univariate, x)
    if univariate is None or slabs is None:
        out = _run(net, x, first_bias, weights, biases, masks)[0]
        if univariate is None:
            return (out,)
        moved, ladj, _ = univariate.run(False, x, out.view(len(x), univariate.num_params, x.shape[1]).transpose(0, 1))
        return moved, ladj.sum(-1)
    hidden = _run(net, x, first_bias, weights[:-1], biases, masks, last=False)[0]
    return _move_slabs(univariate, slabs, x, hidden, weights[-1], masks[-1], biases[-1])[:2]


def _plain(
    net: MaskedLayers,
    univariate: Univariate | None,
    masks: Sequence[Tensor],
    x: Tensor,
    first_bias: Tensor,
    *matrices: Tensor,
) -> tuple[Tensor, ...]:
    weights = [torch.where(mask != 0, weight, 0.0) for mask, weight in zip(masks, matrices, strict=False)]
    biases = matrices[len(weights) :]
    stream = pre = F.linear(x, weights[0]) + first_bias
    for k in range(1, len(weights)):
        pre = F.linear(net.activations[k - 1](pre), weights[k], biases[k - 1])
        if k in net.joins:
            stream = pre = pre + stream
    if univariate is None:
        return (pre,)
    moved, ladj = univariate.plain(False, x, pre.unflatten(-1, (univariate.num_params, x.shape[-1])).movedim(-2, 0))
    return moved, ladj.sum(-1)


def _run(
    net: MaskedLayers,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    masks: Sequence[Tensor],
    last: bool = True,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[list[Tensor]], Sequence[Sequence[Band] | None]]:
    """The output, what goes into and out of each activation, the masked parts of each weight, and how it was cut.

    Without the ``last`` layer, whose weight is then left out of ``weights``, the output is what goes into that.
    """
    n = x.shape[0]
    bands = [cut.at(n) for cut in net.cuts]
    pre, kept = band_product(bands[0], weights[0], masks[0], first_bias, x)
    into, outof, parts = [], [], [kept]
    stream = pre
    for k in range(1, len(weights) + (not last)):
        activation = net.activations[k - 1]
        overwrite = None if net.joins else in_place(activation)
        post = (overwrite or activation)(pre)
        into.append(pre)
        outof.append(post)
        if k == len(weights):
            return post, into, outof, parts, bands
        pre, kept = band_product(bands[k], weights[k], masks[k], biases[k - 1], post)
        parts.append(kept)
        if k in net.joins:
            stream = pre = pre.add_(stream)
    return pre, into, outof, parts, bands


class _Pass(GradientByHand):
    """The network, and with a univariate the map of ``x`` by the network's outputs and the sum of its ladj."""

    @staticmethod
    def forward(
        ctx: Any,
        net: MaskedLayers,
        univariate: Univariate | None,
        masks: Sequence[Tensor],
        x: Tensor,
        first_bias: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        layers = len(masks)
        weights, biases = tensors[:layers], tensors[layers:]
        slabs = net.slabs_at(univariate, x)
        used = weights if slabs is None else weights[:-1]
        out, into, outof, parts, ctx.bands = _run(net, x, first_bias, used, biases, masks, last=slabs is None)
        ctx.net, ctx.univariate, ctx.masks, ctx.slabs = net, univariate, masks, slabs
        kept: tuple[Tensor, ...] = ()
        if univariate is not None and slabs is not None:
            moved, ladj, last, every = _move_slabs(univariate, slabs, x, out, weights[-1], masks[-1], biases[-1])
            parts.append(last)
            kept = tuple(tensor for each in every for tensor in each)
            ctx.kept_counts = [len(each) for each in every]
        elif univariate is not None:
            moved, slope, kept = univariate.run(
                False, x, out.view(len(x), univariate.num_params, x.shape[1]).transpose(0, 1)
            )
            kept, ladj = (moved, slope, *kept), slope.sum(-1)
        ctx.counts = [len(each) for each in parts]
        flat = [masked for each in parts for masked in each]
        ctx.save_for_backward(x, first_bias, *tensors, *into, *outof, *flat, *kept)
        return (out,) if univariate is None else (moved, ladj)

    @staticmethod
    def plain(ctx: Any) -> tuple[Callable[..., tuple[Tensor, ...]], Sequence[Tensor]]:
        tensors = ctx.saved_tensors[: 1 + 2 * len(ctx.masks)]
        return partial(_plain, ctx.net, ctx.univariate, ctx.masks), tensors

    @staticmethod
    def pull(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, grad_ladj = grads[0], grads[-1]  # without a univariate there is one
        net, masks, bands = ctx.net, ctx.masks, ctx.bands
        layers = len(masks)
        x, first_bias, *saved = ctx.saved_tensors
        weights = saved[:layers]
        rest = iter(saved[2 * layers - 1 :])
        into = [next(rest) for _ in range(layers - 1)]
        outof = [next(rest) for _ in range(layers - 1)]
        parts = [[next(rest) for _ in range(count)] for count in ctx.counts]
        _, _, _, wants_x, _, *wanted = ctx.needs_input_grad
        by_x: Tensor | None = None
        by_weight: list[Tensor | None] = [None] * layers
        by_bias: list[Tensor | None] = [None] * layers
        after: dict[int, Tensor] = {}
        top = layers - 1
        if ctx.slabs is not None:
            every = [[next(rest) for _ in range(count)] for count in ctx.kept_counts]
            by_x, grad, by_weight[top], by_bias[top] = _pull_slabs(
                ctx.univariate, ctx.slabs, outof[-1], masks[-1], parts[-1], every, grad, grad_ladj, wanted[top]
            )
            grad = pull(net.activations[-1], grad, into[-1], outof[-1])
            top -= 1
        elif ctx.univariate is not None:
            by_x, grad = ctx.univariate.pull(
                False, x, next(rest), next(rest), tuple(rest), grad, grad_ladj.unsqueeze(-1)
            )
            grad = grad.movedim(0, -2).flatten(-2)
        for k in range(top, 0, -1):
            if wanted[k]:
                by_weight[k] = weight_gradient(bands[k], masks[k], grad, outof[k - 1])
            if wanted[layers + k - 1]:
                by_bias[k] = grad.sum(0)
            after[k] = grad
            grad = input_gradient(bands[k], weights[k], parts[k], grad)
            grad = pull(net.activations[k - 1], grad, into[k - 1], outof[k - 1])
            if k + 1 in net.joins:  # this pre-activation also goes around the block above it
                grad.add_(after[k + 1])
        if wanted[0]:
            by_weight[0] = weight_gradient(bands[0], masks[0], grad, x)
        by_first = grad if first_bias.dim() > 1 else grad.sum(0)
        if wants_x:
            through = input_gradient(bands[0], weights[0], parts[0], grad)
            by_x = through if by_x is None else by_x.add_(through)
        return None, None, None, by_x if wants_x else None, by_first, *by_weight, *by_bias[1:]
