r"""The exact inverse of an autoregressive map, in which each weight of its network is used once, and its gradient.

For a masked network whose outputs for dimension :math:`i` depend on :math:`x_{<i}`, the engine solves :math:`x_i =
g(z_i, \mathrm{params}_i(x_{<i}))` for all :math:`i`.  Sorting units by the step at which they become computable makes
the weights block lower triangular: one sweep computes each unit as soon as it can, and the gradient goes backwards.
Blocks of steps share one matrix product per layer for all that comes from earlier blocks.

The two kernels are ``torch.library`` custom operators: they compile, batch under ``torch.func`` and differentiate.
Second derivatives, forward mode, ``is_grads_batched`` and ``torch.func`` inside a compiler take one full pass per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from pyro_flows.core.modes import beyond_rules, by_hand, full_precision, plain_eager
from pyro_flows.inverse.buffers import ForwardSweep, ReverseSweep, Solver, columns_at_once, named
from pyro_flows.inverse.newton_adjoint import vmapped
from pyro_flows.nets.activations import slope
from pyro_flows.nets.masked_pass import plain_network, split_parameters
from pyro_flows.nets.structure import keep as masked
from pyro_flows.univariate.base import Univariate

__all__ = ["BY_BLOCKS", "KERNELS", "solve"]

BLOCK = 16  # moments that a compiled reverse sweep solves at once


@full_precision  # half precision would give no inverse
def solve(
    solver: Solver[Univariate],
    z: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    masks: Sequence[Tensor],
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Solves for ``x``, everything by rank; exact, and differentiable in all tensors.

    Costs about one dense pass of the network, in as many sequential steps as the structure has; memory does not grow
    with their number.  The gradient costs about one backward pass.

    Args:
        solver: the static description.
        z: shape ``(*batch, input_dim)``.
        first_bias: the first layer's bias with the context, broadcasting to ``(*batch, width)``.
        weights: one matrix per layer; values in masked places are not used.
        biases: of the layers after the first.
        masks: one per weight, an integer of its element's size with all bits set where the weight counts.
        known: the solution, if it is known: then only its gradient takes a sweep.

    Returns:
        ``x`` with the shape of ``z``, and the log-determinant of ``z -> x``, shape ``(*batch,)``.
    """
    first_bias = first_bias.to(z.dtype)
    batch = z.shape[:-1]
    flat = z if len(batch) == 1 else z.reshape(-1, z.shape[-1])
    if first_bias.shape[:-1].numel() == 1:
        bias = first_bias.reshape(1, -1)
    else:
        bias = first_bias.expand(*batch, -1).reshape(-1, first_bias.shape[-1])
    tensors = [*weights, *biases, *masks]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (flat, bias, *tensors))
    if by_hand() and keep and known is not None and known.shape == flat.shape:
        x, ladj, _ = _At.apply(flat, bias, solver.handle, known, *tensors)
    elif by_hand() and keep:
        x, ladj, _ = _apply_plainly(flat, bias, solver.handle, *tensors)
    elif plain_eager():
        with torch._C._AutoDispatchBelowAutograd():  # nothing to record: spares each small call a look
            x, ladj, _ = _solve(flat, bias, tensors, solver.handle, False)
    elif beyond_rules():
        x, ladj = _by_passes(solver, masks, flat, bias, *weights, *biases)
    elif torch._C._are_functorch_transforms_active():  # a gradient may be wanted though no tensor says so
        x, ladj, _ = _Solve.apply(flat, bias, solver.handle, *tensors)
    else:
        x, ladj, _ = torch.ops.pyro_flows.solve(flat, bias, tensors, solver.handle, keep)
    return (x, ladj) if len(batch) == 1 else (x.reshape(z.shape), ladj.reshape(batch))


def _groups(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, biases (without the first) and masks."""
    layers = (len(tensors) + 1) // 3
    return list(tensors[:layers]), list(tensors[layers : 2 * layers - 1]), list(tensors[2 * layers - 1 :])


def _solve(
    z: Tensor, first_bias: Tensor, tensors: Sequence[Tensor], handle: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    solver, (weights, biases, masks) = named(handle), _groups(tensors)
    n = z.shape[0]
    shared = first_bias.shape[0] == 1
    chunk = columns_at_once(n, solver.structure.adjoint_rows, z.device)
    x, ladj, tape = _empty(z, first_bias, tensors, handle, keep)
    for start in range(0, n, chunk):
        part = slice(start, min(n, start + chunk))
        sweep = solver.borrow(ForwardSweep, z, part.stop - part.start, weights, biases, not shared)
        sweep.run(z[part], first_bias if shared else first_bias[part], weights, masks)
        torch.sum(sweep.ladj, 0, out=ladj[part])
        x[part].copy_(sweep.x.T)
        if keep:
            tape[part].copy_(sweep.tape.T)
        solver.give_back(sweep)
    return x, ladj, tape


def _empty(
    z: Tensor, first_bias: Tensor, tensors: Sequence[Tensor], handle: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = named(handle).structure.tape_rows if keep else 0
    return z.new_empty(z.shape), z.new_empty(z.shape[0]), z.new_empty(rows, z.shape[0]).T


_solve_op = torch.library.custom_op("pyro_flows::solve", _solve, mutates_args=())
_solve_op.register_fake(_empty)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, first_bias, tensors, handle, _ = inputs
    ctx.solver = named(handle)  # lives as long as the graph
    ctx.save_for_backward(z, first_bias, output[0], output[2], *tensors)


@full_precision
def _gradient(
    ctx: Any, grad_x: Tensor | None, grad_ladj: Tensor | None, none: Tensor | None
) -> tuple[Tensor | None, ...]:
    solver: Solver[Univariate] = ctx.solver
    # torch.utils.checkpoint gives saved tensors once.
    z, first_bias, x, tape, *tensors = ctx.saved_tensors
    if tape.shape[1] == 0:  # the operator was called without keep
        tape = torch.ops.pyro_flows.solve(z, first_bias, tensors, solver.handle, True)[2]
    grad_x = torch.zeros_like(x) if grad_x is None else grad_x
    grad_ladj = x.new_zeros(x.shape[0]) if grad_ladj is None else grad_ladj
    if is_legacy_batchedtensor(grad_x) or is_legacy_batchedtensor(grad_ladj):
        # Stands for many gradients (is_grads_batched); kernels have no rule for it.
        weights, biases, masks = _groups(tensors)
        pull = torch.func.vjp(partial(_by_passes, solver, masks), z, first_bias, *weights, *biases)[1]
        return *pull((grad_x, grad_ladj)), *[None] * len(masks)
    inputs = (solver.handle, grad_x, grad_ladj, x, tape, z, first_bias, *tensors)
    if torch.is_grad_enabled():  # the gradient may be differentiated further
        return _Gradient.apply(*inputs)
    return _first_order(*inputs, by_weights=not by_hand() or any(t.requires_grad for t in tensors))


def _gradient_op(ctx: Any, *cotangents: Tensor | None) -> tuple:
    dz, dbias, *rest = _gradient(ctx, *cotangents)
    return dz, dbias, rest, None, None


_solve_op.register_autograd(_gradient_op, setup_context=_setup)


class _Solve(torch.autograd.Function):
    """The operator with its gradient, for plain eager mode and ``torch.func``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, first_bias: Tensor, handle: str, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not plain_eager():
            return torch.ops.pyro_flows.solve(z, first_bias, tensors, handle, True)
        with torch._C._AutoDispatchBelowAutograd():
            return _solve(z, first_bias, tensors, handle, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        z, first_bias, handle, *tensors = inputs
        _setup(ctx, (z, first_bias, tensors, handle, True), output)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        dz, dbias, *rest = _gradient(ctx, *cotangents)
        return dz, dbias, None, *rest


# apply() without its search for transforms of torch.func, for plain eager calls.
_apply_plainly = super(torch.autograd.Function, _Solve).apply


class _At(_Solve):
    """As :class:`_Solve`, at a known solution: all units at once."""

    @staticmethod
    def forward(  # type: ignore[override]
        z: Tensor, first_bias: Tensor, handle: str, x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        solver, (weights, biases, masks) = named(handle), _groups(tensors)
        s, value, pre = solver.structure, x.T, []
        for k, (weight, mask) in enumerate(zip(weights, masks, strict=True)):
            bias = biases[k - 1].unsqueeze(-1) if k else first_bias.T
            pre.append(torch.addmm(bias, masked(weight, mask), value))
            if k < len(s.widths):
                if k in s.joins:
                    pre[k] = pre[k] + pre[k - 2]
                value = solver.activations[k](pre[k])
                if s.in_place(solver.activations[k]):
                    pre[k] = value
        params = pre.pop().unflatten(0, (s.num_params, s.input_dim))
        ladj = solver.univariate.run(True, z.T, params)[1]
        tape = torch.cat([params.transpose(0, 1).flatten(0, 1), ladj, *pre])
        return x.view_as(x), ladj.sum(0), tape.T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        z, first_bias, handle, _, *tensors = inputs
        _Solve.setup_context(ctx, (z, first_bias, handle, *tensors), output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        dz, dbias, none, *rest = _Solve.backward(ctx, *cotangents)
        return dz, dbias, none, None, *rest


def _first_order(
    handle: str,
    grad_x: Tensor,
    grad_ladj: Tensor,
    x: Tensor,
    tape: Tensor,
    z: Tensor,
    first_bias: Tensor,
    *tensors: Tensor,
    by_weights: bool = True,
) -> tuple[Tensor | None, ...]:
    """Gradients with respect to ``z``, the first bias, weights and biases."""
    solver = named(handle)
    _, _, masks = _groups(tensors)
    eager = by_hand()
    pre, post, params, ladj = solver.structure.unpack(tape.T, solver.activations)
    zt, xt = z.T, x.T
    by_z, by_params, ladj_by_z, ladj_by_params = solver.univariate.partials(True, zt, params, xt, ladj, grad_ladj)
    slopes = [slope(act, a, h) for act, a, h in zip(solver.activations, pre, post, strict=True)]
    elementwise = by_params.movedim(-1, 0), ladj_by_params.movedim(-1, 0), [s.T for s in slopes]
    arguments = (grad_x, *elementwise, tensors, handle)
    if plain_eager():
        with torch._C._AutoDispatchBelowAutograd():
            adjoint = _sweep_back(*arguments)
    else:
        adjoint = torch.ops.pyro_flows.sweep_back(*arguments)
    grad_xt, dparams, dpre = solver.structure.unpack_adjoint(adjoint.T)
    dz = torch.addcmul(ladj_by_z, grad_xt, by_z).T
    above = [*dpre, dparams]
    each = above[0].T
    dbias = each if first_bias.shape[0] == z.shape[0] else each.sum(0, keepdim=True)
    if not by_weights:
        return dz, dbias, *[None] * len(tensors)
    dweights = [
        cut.weight_gradient(mask, upper.T, lower.T) if eager else torch.where(mask != 0, upper @ lower.T, 0.0)
        for cut, mask, upper, lower in zip(solver.structure.cuts, masks, above, [xt, *post], strict=True)
    ]
    return dz, dbias, *dweights, *(upper.sum(1) for upper in above[1:]), *[None] * len(masks)


class _Gradient(torch.autograd.Function):
    """First derivatives by one reverse sweep; their derivatives by full passes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        return _first_order(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor | None, ...]) -> None:
        handle, grad_x, grad_ladj, _, _, *tensors = inputs
        ctx.solver = named(handle)
        ctx.save_for_backward(grad_x, grad_ladj, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_ladj, z, first_bias, *tensors = ctx.saved_tensors
        weights, biases, masks = _groups(tensors)
        by_passes = partial(_by_passes, ctx.solver, masks)

        def gradient(grad_x: Tensor, grad_ladj: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(by_passes, *inputs)[1]((grad_x, grad_ladj))

        inputs = (grad_x, grad_ladj, z, first_bias, *weights, *biases)
        grad_x, grad_ladj, *rest = torch.func.vjp(gradient, *inputs)[1](cotangents[: len(inputs) - 2])
        return None, grad_x, grad_ladj, None, None, *rest, *[None] * len(masks)


def _by_passes(
    solver: Solver[Univariate], masks: Sequence[Tensor], z: Tensor, first_bias: Tensor, *matrices: Tensor
) -> tuple[Tensor, Tensor]:
    """The solution by one full pass per step: slow, but differentiable any number of times."""
    structure, parameters = solver.structure, split_parameters(masks, matrices)
    x = torch.zeros_like(z)
    for _ in range(structure.num_steps):
        pre = plain_network(solver.activations, structure.joins, x, first_bias, *parameters)
        params = torch.unflatten(pre, -1, (structure.num_params, structure.input_dim)).movedim(-2, 0)
        x, ladj = solver.univariate.plain(True, z, params)
    return x, ladj.sum(-1)


def _sweep_back(
    grad_x: Tensor,
    by_params: Tensor,
    ladj_by_params: Tensor,
    slopes: Sequence[Tensor],
    tensors: Sequence[Tensor],
    handle: str,
) -> Tensor:
    solver, (weights, _, masks) = named(handle), _groups(tensors)
    n = grad_x.shape[0]
    adjoint = _empty_adjoint(grad_x, by_params, ladj_by_params, slopes, tensors, handle)
    chunk = columns_at_once(n, solver.structure.adjoint_rows, grad_x.device)
    for start in range(0, n, chunk):
        part = slice(start, min(n, start + chunk))
        sweep = solver.borrow(ReverseSweep, grad_x, part.stop - part.start, weights)
        elementwise = by_params[part].movedim(0, -1), ladj_by_params[part].movedim(0, -1), [s[part].T for s in slopes]
        sweep.run(grad_x[part], *elementwise, weights, masks)
        adjoint[part].copy_(sweep.adjoint.T)
        solver.give_back(sweep)
    return adjoint


def _empty_adjoint(grad_x: Tensor, *others: Any) -> Tensor:
    return grad_x.new_empty(named(others[-1]).structure.adjoint_rows, grad_x.shape[0]).T


_sweep_back_op = torch.library.custom_op("pyro_flows::sweep_back", _sweep_back, mutates_args=())
_sweep_back_op.register_fake(_empty_adjoint)


def _sweep_back_by_blocks(
    grad_x: Tensor,
    by_params: Tensor,
    ladj_by_params: Tensor,
    slopes: Sequence[Tensor],
    tensors: Sequence[Tensor],
    handle: str,
) -> Tensor:
    """As :func:`_sweep_back`, by few plain operations: a compiler's time grows with their number.

    In a block of moments the gradient of ``x`` solves a triangular system per row, made by as many pulls as it has
    dimensions, through the units of this block alone.
    """
    solver, (weights, _, masks) = named(handle), _groups(tensors)
    s, top = solver.structure, len(solver.structure.widths)
    weights = [masked(weight, mask) for weight, mask in zip(weights, masks, strict=True)]
    head = weights[-1].unflatten(0, (s.num_params, -1)).transpose(0, 1)  # by dimension
    by, made = (each.movedim(0, -1).transpose(0, 1) for each in (by_params, ladj_by_params))
    edges = [[0, *before] for before in s.before]
    known = [grad_x.T, *(torch.zeros_like(slope.T) for slope in slopes)]  # what later blocks add to rows still open
    found: list[list[Tensor]] = [[] for _ in range(top + 2)]
    end = len(edges[0]) - 1
    while end:
        begin = max(0, end - BLOCK)
        x, *units = (slice(edge[begin], edge[end]) for edge in edges)
        rows = [x, *units]
        # Adjoints of a layer's units in terms of those of x, (units, dims, n), and what else they are.
        pulls = (head[x, :, rows[top]].unsqueeze(-1) * by[x].unsqueeze(2)).sum(1).transpose(0, 1)
        rest = known[top][rows[top]] + head[x, :, rows[top]].flatten(0, 1).T @ made[x].flatten(0, 1)
        layers: list[tuple[Tensor, Tensor]] = []  # from the last
        for k in reversed(range(1, top + 1)):
            slope = slopes[k - 1].T[rows[k]]
            pulls, rest = pulls * slope.unsqueeze(1), rest * slope
            if k + 1 in s.joins:
                pulls, rest = pulls + layers[-2][0], rest + layers[-2][1]
            layers.append((pulls, rest))
            weight = weights[k - 1][rows[k], rows[k - 1]].T
            pulls = (weight @ pulls.flatten(1)).unflatten(1, pulls.shape[1:])
            rest = known[k - 1][rows[k - 1]] + weight @ rest
        eye = torch.eye(len(pulls), dtype=pulls.dtype, device=pulls.device)
        system = eye - pulls.permute(2, 0, 1)
        solution = torch.linalg.solve_triangular(system, rest.T.unsqueeze(-1), upper=True, unitriangular=True)
        own = solution.squeeze(-1).T
        outputs = (made[x] + by[x] * own.unsqueeze(1)).flatten(0, 1)
        values = [own, *((pulls * own).sum(1) + rest for pulls, rest in reversed(layers)), outputs]
        for pieces, value in zip(found, values, strict=True):
            pieces.insert(0, value)
        for k in range(top + 1) if begin else ():
            open_rows = slice(0, edges[k][begin])
            weight = head[x, :, open_rows].flatten(0, 1) if k == top else weights[k][rows[k + 1], open_rows]
            known[k] = known[k][open_rows] + weight.T @ values[k + 1]
        end = begin
    x_adjoint, *hidden, outputs = map(torch.cat, found)
    return torch.cat([x_adjoint, outputs, *hidden]).T


# What the operators do, for callers that need none of torch's machinery around them, which loads its compiler.
KERNELS = {torch.ops.pyro_flows.solve.default: _solve, torch.ops.pyro_flows.sweep_back.default: _sweep_back}
BY_BLOCKS = {torch.ops.pyro_flows.sweep_back.default: _sweep_back_by_blocks}  # of plain operations


@_solve_op.register_vmap
def _(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, tuple[int, int, int]]:
    z, first_bias, tensors, *constants = args
    by_z, by_bias, by_tensors, *_ = in_dims
    shared = by_bias is None and first_bias.shape[0] == 1
    if not shared:  # as many rows as z
        n = z.shape[1 if by_z == 0 else 0]
        first_bias = first_bias[None] if by_bias is None else first_bias.movedim(by_bias, 0)
        first_bias, by_bias = first_bias.expand(info.batch_size, n, -1), 0

    def call(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        z, first_bias, *tensors = given[3:]
        return torch.ops.pyro_flows.solve(z, first_bias, tensors, *constants)

    dims = (None, None, None, by_z, by_bias, *by_tensors)
    given = (None, None, len(tensors) + shared, z, first_bias, *tensors)
    return vmapped(call, 2 - shared, info.batch_size, dims, given, results=3), (0, 0, 0)


@_sweep_back_op.register_vmap
def _(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
    *samples, slopes, tensors, handle = args
    rows = len(samples) + len(slopes)

    def call(*given: Any) -> Tensor:
        grad_x, by_params, ladj_by_params, *rest = given[3:]
        back = torch.ops.pyro_flows.sweep_back
        return back(grad_x, by_params, ladj_by_params, rest[: len(slopes)], rest[len(slopes) :], handle)

    dims = (None, None, None, *in_dims[:3], *in_dims[3], *in_dims[4])
    given = (None, None, len(tensors), *samples, *slopes, *tensors)
    return vmapped(call, rows, info.batch_size, dims, given), 0
