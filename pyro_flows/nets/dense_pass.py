"""One coupling, forwards and backwards, as a single node of the autograd graph.

A small coupling is some thirty operations of a few microseconds each, and recording them one by one costs as much again
as doing them.  So the gathering of dimensions, the dense network, the univariate map and the sum of its ladj are one
node with its gradient by hand; second derivatives take plain differentiable operations.  Inside, samples stand in
columns: small matrix products are faster that way round, and each parameter of the map lies in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from pyro_flows.core.modes import autocasting, batched, plain_eager
from pyro_flows.nets.activations import in_place, pull
from pyro_flows.univariate.base import Univariate

__all__ = ["Parting", "Plan", "dense_pass", "known_slopes", "takes_dense_pass"]

Function = Callable[[Tensor], Tensor]

_ROWS = 2048  # of a batch at a time, where no gradient is wanted


class Parting(NamedTuple):
    """Which dimensions a coupling keeps, and how its network sees them: angles by cosine and sine."""

    layout: str  # where the kept dimensions are: "first", "last" or "scattered"
    kept_at: Tensor  # indices of the kept dimensions,
    moved_at: Tensor  # and of the others
    undo: Tensor  # where each dimension stands among the kept ones followed by the others
    angular: Tensor | None  # which of the kept dimensions are angles, if any is
    all_angles: bool

    def split(self, x: Tensor, axis: int = -1) -> tuple[Tensor, Tensor]:
        """The kept and the other dimensions, which lie along ``axis``."""
        kept, moved = self.kept_at.shape[0], self.moved_at.shape[0]
        if self.layout == "first":
            return x.narrow(axis, 0, kept), x.narrow(axis, kept, moved)
        if self.layout == "last":
            return x.narrow(axis, moved, kept), x.narrow(axis, 0, moved)
        return x.index_select(axis, self.kept_at), x.index_select(axis, self.moved_at)

    def join(self, kept: Tensor, moved: Tensor) -> Tensor:
        """Undoes :meth:`split`, along the last axis."""
        if self.layout == "last":
            return torch.cat((moved, kept), -1)
        flat = torch.cat((kept, moved), -1)
        return flat.index_select(-1, self.undo) if self.layout == "scattered" else flat

    def features(self, kept: Tensor, axis: int = -1) -> Tensor:
        """What the network sees of the kept dimensions."""
        if self.angular is None:
            return kept
        if self.all_angles:
            return torch.cat((kept.cos(), kept.sin()), axis)
        angles = kept.index_select(axis, self.angular)
        return torch.cat((kept.index_copy(axis, self.angular, angles.cos()), angles.sin()), axis)

    def pull_features(self, features: Tensor, grad: Tensor) -> Tensor:
        """The gradient after the kept dimensions, given that after their features; these lie along the first axis."""
        if self.angular is None:
            return grad
        count = self.kept_at.shape[0]
        sine, by_sine = features[count:], grad[count:]
        if self.all_angles:
            return torch.addcmul(by_sine * features[:count], grad[:count], sine, value=-1)
        cosine, by_cosine = (each.index_select(0, self.angular) for each in (features, grad))
        by_angle = torch.addcmul(by_sine * cosine, by_cosine, sine, value=-1)
        return grad[:count].index_copy(0, self.angular, by_angle)


class Plan(NamedTuple):
    """What a pass needs to know beside the weights."""

    parting: Parting
    univariate: Univariate
    inverse: bool
    activations: tuple[Function, ...]  # after each hidden layer
    joins: frozenset[int]  # layers to which the pre-activation of two layers below is added
    batch: Size  # of what comes flattened to two dimensions


def known_slopes(activations: Sequence[Function], univariate: Univariate) -> bool:
    """Whether all has a gradient in closed form; of anything else autograd's own graph is cheaper than one by hand."""
    known = all(in_place(activation) or activation is F.silu for activation in activations)
    return known and type(univariate).pull is not Univariate.pull


def takes_dense_pass(x: Tensor, known: bool) -> bool:
    """Whether a coupling with or without known slopes may take this way now: in plain eager mode only."""
    return (known or not torch.is_grad_enabled()) and plain_eager() and not autocasting(x.device)


def dense_pass(
    plan: Plan, x: Tensor, context: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """``x`` with some dimensions moved, and the ladj of that, shape ``(batch,)``.

    Args:
        plan: the static description.
        x: shape ``(batch, dims)``.
        context: ``None``, or of a shape that broadcasts to ``(*plan.batch, context_dim)``.
        weights: one matrix per layer; that of the first has columns for the features, then for the context.
        biases: one per layer.
    """
    if torch.is_grad_enabled():
        if x.requires_grad or weights[-1].requires_grad or _any_wants(context, *weights, *biases):
            if x.grad_fn is not None and type(x.grad_fn) is not _Pass._backward_cls:
                # The graph keeps a copy of what the caller made: whoever holds on to the ladj, as the memo does, must
                # not thereby hold the caller's tensor.
                x = x.clone()
            return _apply(plan, x, context, *weights, *biases)
        with torch.no_grad():
            return dense_pass(plan, x, context, weights, biases)
    if x.shape[0] > 2 * _ROWS and context is None and x.device.type == "cpu":
        # In pieces that stay in the processor's cache, since nothing of them is kept.
        pieces = [_run(plan, rows, None, weights, biases)[0] for rows in x.split(_ROWS)]
        moved, ladj = zip(*pieces, strict=True)
        return torch.cat(moved), torch.cat(ladj)
    return _run(plan, x, context, weights, biases)[0]


def _any_wants(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _plain(plan: Plan, x: Tensor, context: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """The same by differentiable operations."""
    parting, univariate, inverse, activations, joins, batch = plan
    count = len(tensors) // 2
    weights, biases = tensors[:count], tensors[count:]
    kept, z = parting.split(x)
    stream = pre = _first(batch, parting.features(kept).t(), context, weights[0], biases[0]).t()
    for k in range(1, count):
        pre = F.linear(activations[k - 1](pre), weights[k], biases[k])
        if k in joins:
            stream = pre = pre + stream
    params = pre.unflatten(-1, (univariate.num_params, z.shape[-1])).transpose(-1, -2)
    moved, slope = (univariate.inverse if inverse else univariate.forward)(z, params)
    return parting.join(kept, moved), slope.sum(-1)


def _first(batch: Size, features: Tensor, context: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """The first layer, samples in columns; the context's share is computed once per context, not once per sample."""
    if context is None:
        return torch.addmm(bias.unsqueeze(1), weight, features)
    seen, width = features.shape[0], weight.shape[0]
    share = F.linear(context, weight[:, seen:], bias)
    if share.shape[:-1].numel() == 1:
        share = share.view(1, width)
    elif share.shape[:-1] != batch or len(batch) > 1:
        share = share.expand(*batch, width).reshape(features.shape[1], width)
    return torch.addmm(share.t(), weight[:, :seen], features)


class _Kept(NamedTuple):
    """What the gradient needs of a pass."""

    features: Tensor
    z: Tensor  # what is moved
    into: list[Tensor]  # and out of each activation
    outof: list[Tensor]
    held: tuple[Tensor, ...]  # of the univariate map


def _run(
    plan: Plan, x: Tensor, context: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[tuple[Tensor, Tensor], _Kept]:
    parting, univariate, inverse, activations, joins, batch = plan
    kept, z = parting.split(x.t(), 0)
    features = parting.features(kept, 0)
    into, outof = [], []
    stream = pre = _first(batch, features, context, weights[0], biases[0])
    for k in range(1, len(weights)):
        activation = activations[k - 1]
        overwrite = None if joins else in_place(activation)
        post = (overwrite or activation)(pre)
        into.append(pre)
        outof.append(post)
        pre = torch.addmm(biases[k].unsqueeze(1), weights[k], post)
        if k in joins:
            stream = pre = pre.add_(stream)
    dims, n = z.shape
    moved, slope, held = univariate.run(inverse, z, pre.view(univariate.num_params, dims, n).transpose(0, 1))
    if parting.layout == "scattered":
        y = x.contiguous().index_copy(1, parting.moved_at, moved.t())
    else:
        y = parting.join(kept.t(), moved.t())
    return (y, slope.sum(0)), _Kept(features, z, into, outof, (moved, slope, *held))


def _by_autograd(
    plan: Plan, wants: Sequence[bool], inputs: Sequence[Tensor | None], grads: tuple[Tensor, Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients after those inputs that want one, differentiable themselves."""

    def run(*wanted: Tensor) -> tuple[Tensor, Tensor]:
        rest = iter(wanted)
        return _plain(plan, *(next(rest) if want else each for want, each in zip(wants, inputs, strict=True)))

    backwards = torch.func.vjp(run, *(each for want, each in zip(wants, inputs, strict=True) if want))[1]
    found = iter(backwards(grads))
    return tuple(next(found) if want else None for want in wants)


def _wants(ctx: object) -> tuple[bool, ...]:
    """Which inputs want a gradient; of the weights and biases none if this very call asks for none of them."""
    wants = ctx.needs_input_grad[1:]
    if wants[0] and True in wants[2:]:
        nodes = ctx.next_functions[-2 * ctx.layers :]
        if not any(_executes(node) for node, _ in nodes if node is not None):
            return (*wants[:2], *(False for _ in wants[2:]))
    return wants


def _executes(node: object) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except (AttributeError, RuntimeError):  # a leaf whose gradient is asked for, or there is no engine to ask
        return True


class _Pass(torch.autograd.Function):
    """The whole coupling."""

    @staticmethod
    def forward(ctx: object, plan: Plan, x: Tensor, context: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.plan, ctx.layers = plan, len(tensors) // 2
        out, (features, z, into, outof, held) = _run(plan, x, context, tensors[: ctx.layers], tensors[ctx.layers :])
        # For second derivatives; a detached one does not keep the caller's tensor, only its memory.
        x = x if ctx.needs_input_grad[1] else x.detach()
        # What comes out of an activation is for the gradient after the next weight, and for functions that were
        # applied in place.
        wanted = ctx.needs_input_grad[4 : 3 + ctx.layers]
        outof = [
            post if want or in_place(activation) else None
            for post, want, activation in zip(outof, wanted, plan.activations, strict=True)
        ]
        ctx.save_for_backward(x, context, *tensors, features, z, *into, *outof, *held)
        return out

    @staticmethod
    def backward(ctx: object, grad: Tensor, grad_ladj: Tensor) -> tuple[Tensor | None, ...]:
        if autocasting(grad.device):
            with torch.autocast(grad.device.type, enabled=False):
                return _Pass.backward(ctx, grad, grad_ladj)
        plan, layers, wants, saved = ctx.plan, ctx.layers, _wants(ctx), ctx.saved_tensors
        if torch.is_grad_enabled() or batched(grad) or batched(grad_ladj):
            return None, *_by_autograd(plan, wants, saved[: 2 + 2 * layers], (grad, grad_ladj))
        parting, univariate, inverse, activations, joins, _ = plan
        weights, start = saved[2 : 2 + layers], 2 + 2 * layers
        features, z = saved[start : start + 2]
        into, outof = saved[start + 2 : start + 1 + layers], saved[start + 1 + layers : start + 2 * layers]
        moved, slope, *held = saved[start + 2 * layers :]
        wanted = wants[2:]
        by_weight: list[Tensor | None] = [None] * layers
        by_bias: list[Tensor | None] = [None] * layers
        scattered = parting.layout == "scattered"
        if scattered:
            columns = grad.t().index_select(0, parting.moved_at)
        else:
            by_kept, columns = parting.split(grad.t(), 0)
        by_z, by_params = univariate.pull(inverse, z, moved, slope, held, columns, grad_ladj.unsqueeze(0))
        columns = by_params.transpose(0, 1).flatten(0, 1)
        after: dict[int, Tensor] = {}
        for k in range(layers - 1, 0, -1):
            if wanted[k]:
                by_weight[k] = torch.mm(columns, outof[k - 1].t())
            if wanted[layers + k]:
                by_bias[k] = columns.sum(1)
            if joins:
                after[k] = columns
            columns = pull(activations[k - 1], torch.mm(weights[k].t(), columns), into[k - 1], outof[k - 1])
            if k + 1 in joins:  # this pre-activation also goes around the block above it
                columns.add_(after[k + 1])
        by_context, by_weight[0], by_bias[0] = _pull_first(plan, wants, features, saved[1], weights[0], columns)
        by_x: Tensor | None = None
        if wants[0]:
            weight = weights[0] if saved[1] is None else weights[0][:, : features.shape[0]]
            through = parting.pull_features(features, torch.mm(weight.t(), columns))
            if scattered:
                by_x = grad.index_copy(1, parting.moved_at, by_z.t()).index_add_(1, parting.kept_at, through.t())
            else:
                by_x = parting.join((through + by_kept).t(), by_z.t())
        return None, by_x, by_context, *by_weight, *by_bias


def _pull_first(
    plan: Plan, wants: Sequence[bool], features: Tensor, context: Tensor | None, weight: Tensor, columns: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients after the context and the first layer's weight and bias."""
    _, wants_context, wants_weight, *others = wants
    wants_bias = others[len(others) // 2]
    by_context = by_weight = None
    if wants_weight:
        by_weight = torch.mm(columns, features.t())
    if context is None:
        return None, by_weight, columns.sum(1) if wants_bias else None
    share, width = columns.t(), columns.shape[0]
    if context.shape[:-1] != plan.batch:
        share = share.reshape(*plan.batch, width).sum_to_size(*context.shape[:-1], width)
        share = share.reshape(-1, width)
    if wants_context:
        by_context = (share @ weight[:, features.shape[0] :]).view(context.shape)
    if wants_weight:
        by_weight = torch.cat((by_weight, share.t() @ context.reshape(-1, context.shape[-1])), 1)
    return by_context, by_weight, share.sum(0) if wants_bias else None


# Without the detour by which apply() looks for transforms of torch.func: there are none where it is called.
_apply = super(torch.autograd.Function, _Pass).apply
