"""One pass through a masked network, forwards and backwards, without the work that the masks make useless.

The network and the univariate map that it serves are one node of the autograd graph; second derivatives, and everything
that traces or transforms the call, take plain differentiable operations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flows.activations import IN_PLACE, pull
from pyro_flows.bands import Band, Cut, band_product, input_gradient, weight_gradient
from pyro_flows.heads import Head, Slab, Slabs
from pyro_flows.tracing import autocasting, batched, plain_eager

__all__ = ["Layout", "masked_network"]

Function = Callable[[Tensor], Tensor]

ROWS = 2048  # of a batch at a time, where no gradient is wanted


class Layout(NamedTuple):
    """What a pass needs to know of a network beside its weights."""

    activations: tuple[Function, ...]  # after each hidden layer
    joins: frozenset[int]  # layers to which the pre-activation of two layers below is added
    cuts: tuple[Cut, ...]  # of each layer
    slabs: Slabs | None  # of the outputs, if there is a hidden layer

    def slabs_at(self, head: Head | None, x: Tensor) -> tuple[Slab, ...] | None:
        """How to make the outputs slab by slab, if that is what the head wants."""
        if head is None or self.slabs is None or not head.univariate.wide:
            return None
        return self.slabs.at(x.shape[0], x.device)


def masked_network(
    layout: Layout,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    masks: Sequence[Tensor],
    head: Head | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The last layer's output; with a head, ``x`` moved by it and the ladj of that, summed over dimensions.

    Args:
        layout: the static description.
        x: shape ``(*batch, inputs)``.
        first_bias: shape ``(width,)`` or broadcasting to ``(*batch, width)``.
        weights: one matrix per layer; what stands in masked places is never used.
        biases: those of the layers after the first.
        masks: one for each weight, an integer of its element's size with all bits set where the weight counts.
        head: what to do with the outputs, if not to return them.
    """
    if autocasting(x.device):  # the ladj is worth full precision
        with torch.autocast(x.device.type, enabled=False):
            return masked_network(layout, x, first_bias.to(x.dtype), weights, biases, masks, head)
    if not plain_eager() or masks[0].element_size() != weights[0].element_size():
        return _plain(layout, head, masks, x, first_bias, *weights, *biases)
    batch = x.shape[:-1]
    if first_bias.dim() > 1:
        first_bias = first_bias.expand(*batch, -1).reshape(-1, first_bias.shape[-1])
    flat = x if len(batch) == 1 else x.reshape(batch.numel(), x.shape[-1])
    if torch.is_grad_enabled():
        out = _apply(layout, head, masks, flat, first_bias, *weights, *biases)
    elif flat.shape[0] > 2 * ROWS and flat.device.type == "cpu":
        # In pieces that stay in the processor's cache, since nothing of them is kept.
        own = first_bias.dim() > 1
        pieces = zip(flat.split(ROWS), first_bias.split(ROWS) if own else itertools.repeat(first_bias), strict=False)
        done = [_result(layout, rows, bias, weights, biases, masks, head) for rows, bias in pieces]
        out = torch.cat(done) if head is None else tuple(torch.cat(part) for part in zip(*done, strict=True))
    else:
        out = _result(layout, flat, first_bias, weights, biases, masks, head)
    if len(batch) == 1:
        return out
    if head is None:
        return out.view(*batch, out.shape[-1])
    return out[0].view(x.shape), out[1].view(batch)


def _result(
    layout: Layout,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    masks: Sequence[Tensor],
    head: Head | None,
) -> Tensor | tuple[Tensor, Tensor]:
    slabs = layout.slabs_at(head, x)
    if slabs is not None:
        hidden = _run(layout, x, first_bias, weights[:-1], biases, masks, last=False)[0]
        return head.run_slabs(slabs, x, hidden, weights[-1], masks[-1], biases[-1])[:2]
    out = _run(layout, x, first_bias, weights, biases, masks)[0]
    if head is None:
        return out
    moved, ladj, _ = head.run(x, out)
    return moved, ladj.sum(-1)


def _plain(
    layout: Layout, head: Head | None, masks: Sequence[Tensor], x: Tensor, first_bias: Tensor, *matrices: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    weights = [torch.where(mask != 0, weight, 0.0) for mask, weight in zip(masks, matrices, strict=False)]
    biases = matrices[len(weights) :]
    stream = pre = F.linear(x, weights[0]) + first_bias
    for k in range(1, len(weights)):
        pre = F.linear(layout.activations[k - 1](pre), weights[k], biases[k - 1])
        if k in layout.joins:
            stream = pre = pre + stream
    if head is None:
        return pre
    moved, ladj = head.move(x, pre)
    return moved, ladj.sum(-1)


def _run(
    layout: Layout,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    masks: Sequence[Tensor],
    last: bool = True,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[list[Tensor]], list[Sequence[Band] | None]]:
    """The output, what goes into and out of each activation, the masked parts of each weight, and how it was cut.

    Without the ``last`` layer, whose weight is then left out of ``weights``, the output is what goes into that.
    """
    n = x.shape[0]
    bands = [cut.at(n) for cut in layout.cuts]
    pre, kept = band_product(bands[0], weights[0], masks[0], first_bias, x)
    into, outof, parts = [], [], [kept]
    stream = pre
    for k in range(1, len(weights) + (not last)):
        activation = layout.activations[k - 1]
        in_place = None if layout.joins else IN_PLACE.get(activation)
        post = in_place(pre) if in_place else activation(pre)
        into.append(pre)
        outof.append(post)
        if k == len(weights):
            return post, into, outof, parts, bands
        pre, kept = band_product(bands[k], weights[k], masks[k], biases[k - 1], post)
        parts.append(kept)
        if k in layout.joins:
            stream = pre = pre.add_(stream)
    return pre, into, outof, parts, bands


class _Pass(torch.autograd.Function):
    """The network, and with a head the univariate map of ``x`` by the network's outputs and the sum of its ladj."""

    @staticmethod
    def forward(
        ctx: object,
        layout: Layout,
        head: Head | None,
        masks: Sequence[Tensor],
        x: Tensor,
        first_bias: Tensor,
        *tensors: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        layers = len(masks)
        weights, biases = tensors[:layers], tensors[layers:]
        slabs = layout.slabs_at(head, x)
        plain = slabs is None
        used = weights if plain else weights[:-1]
        out, into, outof, parts, ctx.bands = _run(layout, x, first_bias, used, biases, masks, last=plain)
        ctx.layout, ctx.head, ctx.masks, ctx.slabs = layout, head, masks, slabs
        kept: tuple[Tensor, ...] = ()
        if not plain:
            moved, ladj, last, every = head.run_slabs(slabs, x, out, weights[-1], masks[-1], biases[-1])
            parts.append(last)
            kept = tuple(tensor for each in every for tensor in each)
            ctx.kept_counts = [len(each) for each in every]
        elif head is not None:
            moved, ladj, kept = head.run(x, out)
            kept = (moved, ladj, *kept)
            ladj = ladj.sum(-1)
        ctx.counts = [len(each) for each in parts]
        flat = [masked for each in parts for masked in each]
        ctx.save_for_backward(x, first_bias, *tensors, *into, *outof, *flat, *kept)
        return out if head is None else (moved, ladj)

    @staticmethod
    def backward(ctx: object, grad: Tensor, grad_ladj: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if autocasting(grad.device):
            with torch.autocast(grad.device.type, enabled=False):
                return _Pass.backward(ctx, grad, grad_ladj)
        layout, head, masks, bands = ctx.layout, ctx.head, ctx.masks, ctx.bands
        layers = len(masks)
        x, first_bias, *saved = ctx.saved_tensors
        weights, biases = saved[:layers], saved[layers : 2 * layers - 1]
        if torch.is_grad_enabled() or batched(grad) or (grad_ladj is not None and batched(grad_ladj)):
            inputs = (x, first_bias, *weights, *biases)
            backwards = torch.func.vjp(lambda *args: _plain(layout, head, masks, *args), *inputs)[1]
            return None, None, None, *backwards(grad if head is None else (grad, grad_ladj))
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
            by_x, grad, by_weight[top], by_bias[top] = head.pull_slabs(
                ctx.slabs, outof[-1], masks[-1], parts[-1], every, grad, grad_ladj
            )
            grad = pull(layout.activations[-1], grad, into[-1], outof[-1])
            top -= 1
        elif head is not None:
            by_x, grad = head.pull(x, next(rest), next(rest), tuple(rest), grad, grad_ladj)
        for k in range(top, 0, -1):
            if wanted[k]:
                by_weight[k] = weight_gradient(bands[k], masks[k], grad, outof[k - 1])
            if wanted[layers + k - 1]:
                by_bias[k] = grad.sum(0)
            after[k] = grad
            grad = input_gradient(bands[k], weights[k], parts[k], grad)
            grad = pull(layout.activations[k - 1], grad, into[k - 1], outof[k - 1])
            if k + 1 in layout.joins:  # this pre-activation also goes around the block above it
                grad.add_(after[k + 1])
        if wanted[0]:
            by_weight[0] = weight_gradient(bands[0], masks[0], grad, x)
        by_first = grad if first_bias.dim() > 1 else grad.sum(0)
        if wants_x:
            through = input_gradient(bands[0], weights[0], parts[0], grad)
            by_x = through if by_x is None else by_x.add_(through)
        return None, None, None, by_x if wants_x else None, by_first, *by_weight, *by_bias[1:]


# Without the detour by which apply() looks for transforms of torch.func: there are none where it is called.
_apply = super(torch.autograd.Function, _Pass).apply
