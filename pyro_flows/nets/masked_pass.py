"""One pass through a masked network and its univariate, as one autograd node without most of the masked work.

Second derivatives, tracing and transforms take plain differentiable operations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flows.core.modes import GradientByHand, by_hand, full_precision
from pyro_flows.nets.activations import in_place, pull
from pyro_flows.nets.structure import Cut
from pyro_flows.univariate.base import Univariate

__all__ = ["MaskedLayers", "masked_network", "plain_network", "split_parameters"]


Function = Callable[[Tensor], Tensor]

ROWS = 2048  # rows of a batch at a time without gradients


class MaskedLayers(NamedTuple):
    """The static description of a network."""

    activations: tuple[Function, ...]
    joins: frozenset[int]  # layers to which the pre-activation two layers below is added
    cuts: tuple[Cut, ...]


@full_precision  # for the ladj
def masked_network(
    net: MaskedLayers,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    masks: Sequence[Tensor],
    univariate: Univariate | None = None,
) -> tuple[Tensor, ...]:
    """Returns ``(output,)``, or with a univariate the moved ``x`` and the ladj summed over dimensions.

    ``x`` has shape ``(*batch, inputs)``; ``first_bias`` has shape ``(width,)`` or broadcasts to ``(*batch, width)``;
    ``biases`` are those of later layers.  A mask has integers of the weight's element size, all bits set where the
    weight counts; other places are never used.
    """
    if first_bias.dtype != x.dtype:
        first_bias = first_bias.to(x.dtype)
    if not by_hand() or masks[0].element_size() != weights[0].element_size():
        return _plain(net, univariate, masks, x, first_bias, *weights, *biases)
    batch = x.shape[:-1]
    if first_bias.dim() > 1:
        first_bias = first_bias.expand(*batch, -1).reshape(-1, first_bias.shape[-1])
    flat = x if len(batch) == 1 else x.reshape(batch.numel(), x.shape[-1])
    if torch.is_grad_enabled():
        out = _Pass.record(net, univariate, masks, flat, first_bias, *weights, *biases)
    elif flat.shape[0] > 2 * ROWS and flat.device.type == "cpu":
        # These pieces fit in the processor's cache.
        own = first_bias.dim() > 1
        pieces = zip(flat.split(ROWS), first_bias.split(ROWS) if own else itertools.repeat(first_bias), strict=False)
        done = [_run(net, univariate, masks, rows, bias, *weights, *biases)[0] for rows, bias in pieces]
        out = tuple(torch.cat(part) for part in zip(*done, strict=True))
    else:
        out = _run(net, univariate, masks, flat, first_bias, *weights, *biases)[0]
    if len(batch) == 1:
        return out
    return tuple(part.view(batch + part.shape[1:]) for part in out)


def plain_network(
    activations: Sequence[Function],
    joins: frozenset[int],
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> Tensor:
    """The outputs by plain operations, from masked weights."""
    stream = pre = F.linear(x, weights[0]) + first_bias
    for k in range(1, len(weights)):
        pre = F.linear(activations[k - 1](pre), weights[k], biases[k - 1])
        if k in joins:
            stream = pre = pre + stream
    return pre


def split_parameters(masks: Sequence[Tensor], matrices: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Splits weights and later biases; the weights get zeros in masked places."""
    weights = [torch.where(mask != 0, weight, 0.0) for mask, weight in zip(masks, matrices, strict=False)]
    return weights, matrices[len(masks) :]


def _plain(
    net: MaskedLayers,
    univariate: Univariate | None,
    masks: Sequence[Tensor],
    x: Tensor,
    first_bias: Tensor,
    *matrices: Tensor,
) -> tuple[Tensor, ...]:
    out = plain_network(net.activations, net.joins, x, first_bias, *split_parameters(masks, matrices))
    if univariate is None:
        return (out,)
    moved, ladj = univariate.plain(
        False, x, torch.unflatten(out, -1, (univariate.num_params, x.shape[-1])).movedim(-2, 0)
    )
    return moved, ladj.sum(-1)


def _run(
    net: MaskedLayers,
    univariate: Univariate | None,
    masks: Sequence[Tensor],
    x: Tensor,
    first_bias: Tensor,
    *matrices: Tensor,
) -> tuple[tuple[Tensor, ...], list[Tensor | None], list[Tensor], list[list[Tensor]], tuple[Tensor, ...]]:
    """Returns the results and what their gradient needs.

    That is each activation's arguments, unless overwritten, and values, each weight's masked parts, and tensors of the
    univariate.
    """
    layers, joins = len(masks), net.joins
    pre, kept = net.cuts[0].product(matrices[0], masks[0], first_bias, x)
    stream, inputs, parts = pre, [], [kept]
    into: list[Tensor | None] = []
    for k in range(1, layers):
        activation = net.activations[k - 1]
        overwrite = None if joins else in_place(activation)
        into.append(pre if overwrite is None else None)
        pre = (overwrite or activation)(pre)
        inputs.append(pre)
        pre, kept = net.cuts[k].product(matrices[k], masks[k], matrices[layers + k - 1], pre)
        parts.append(kept)
        if k in joins:
            stream = pre.add_(stream)
    if univariate is None:
        return (pre,), into, inputs, parts, ()
    params = pre.view(x.shape[0], univariate.num_params, x.shape[1]).transpose(0, 1)
    moved, slope, more = univariate.run(False, x, params)
    return (moved, slope.sum(-1)), into, inputs, parts, (moved, slope, *more)


class _Pass(GradientByHand):
    """:func:`masked_network` as one autograd node."""

    @staticmethod
    def forward(
        ctx: Any, net: MaskedLayers, univariate: Univariate | None, masks: Sequence[Tensor], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        out, into, inputs, parts, more = _run(net, univariate, masks, *tensors)
        ctx.net, ctx.univariate, ctx.masks = net, univariate, masks
        if not ctx.needs_input_grad[3]:
            parts[0] = []  # which only x would need
        ctx.counts = list(map(len, parts))
        ctx.save_for_backward(*tensors, *into, *inputs, *itertools.chain(*parts), *more)
        return out

    @staticmethod
    def plain(ctx: Any) -> tuple[Callable[..., tuple[Tensor, ...]], Sequence[Tensor]]:
        tensors = ctx.saved_tensors[: 1 + 2 * len(ctx.masks)]
        return partial(_plain, ctx.net, ctx.univariate, ctx.masks), tensors

    @staticmethod
    def pull(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, grad_ladj = grads[0], grads[-1]  # the same one without a univariate
        net, layers = ctx.net, len(ctx.masks)
        tensors = ctx.saved_tensors
        x, first_bias = tensors[:2]
        into = tensors[2 * layers + 1 : 3 * layers]
        inputs = x, *tensors[3 * layers : 4 * layers - 1]
        end = 4 * layers - 1 + sum(ctx.counts)  # of the weights' parts
        wants_x, _, *wanted = ctx.needs_input_grad[3:]
        by_x: Tensor | None = None
        by_weight: list[Tensor | None] = [None] * layers
        by_bias: list[Tensor | None] = [None] * layers
        if ctx.univariate is not None:
            moved, slope, *more = tensors[end:]
            by_x, grad = ctx.univariate.pull(False, x, moved, slope, more, grad, grad_ladj.unsqueeze(-1))
            grad = grad.transpose(0, 1).flatten(1)
        after: dict[int, Tensor] = {}
        for k in range(layers - 1, -1, -1):
            start = end - ctx.counts[k]
            if wanted[k]:
                by_weight[k] = net.cuts[k].weight_gradient(ctx.masks[k], grad, inputs[k])
            if k == 0:
                by_bias[0] = grad if first_bias.dim() > 1 else grad.sum(0)
            elif wanted[layers + k - 1]:
                by_bias[k] = grad.sum(0)
            if net.joins:
                after[k] = grad
            if k or wants_x:
                grad = net.cuts[k].input_gradient(tensors[start:end], grad, inputs[k].shape[1])
            end = start
            if k:
                grad = pull(net.activations[k - 1], grad, into[k - 1], inputs[k])
                if k + 1 in net.joins:  # the skip connection
                    grad.add_(after[k + 1])
        if wants_x:
            by_x = grad if by_x is None else by_x.add_(grad)
        return None, None, None, by_x if wants_x else None, by_bias[0], *by_weight, *by_bias[1:]
