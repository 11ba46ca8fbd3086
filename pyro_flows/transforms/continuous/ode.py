"""Integration of rows along a vector field by torchdiffeq, with gradients by the adjoint or through the solver.

:func:`integrate` is the entry point.  The state is what rows have moved by, with columns that are integrated along, in
one tensor.  It starts at zero, so rounding is relative to the way and not to the place, and a field that is zero moves
nothing at all.  Tolerances are those of the place: ``atol + rtol * |x|``.

The adjoint is a second solve backwards (arXiv:1806.07366, appendix B), of ``x``, the gradient after it, and those
after parameters, whose error does not steer the steps (arXiv:2009.09457).  Its tolerance is relative to the incoming
gradient, so the scale of a loss does not matter.  Memory does not grow with the number of evaluations.

Through the solver's steps the gradient is that of what was computed; it takes a half to two thirds of the time, and
memory by evaluation.  ``"auto"`` decides by what the first evaluation keeps, and begins again with the adjoint where a
solve turns out to be so long that it would keep too much.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows.core.modes import autocasting, forward_mode, plain_eager
from pyro_flows.inverse.newton_adjoint import vmapped
from pyro_flows.transforms.continuous.ode_solver import (
    ADAPTIVE,
    Call,
    Dynamics,
    OdeReport,
    OdeSettings,
    TooLongError,
    Watch,
    floored,
    rms,
    row_norm,
)

__all__ = ["KEPT", "KEPT_IN_ALL", "integrate"]

#: Bytes that one evaluation, and all of a solve, may keep for the gradient where ``"auto"`` goes through the steps.
KEPT, KEPT_IN_ALL = 4 * 2**20, 2**30

_SAVED: dict[type, list[str]] = {}  # attributes that hold what a kind of node keeps

_LOST = 0.1  # so far from where a row began, relative to 1 + |x|, the way back is another one


@torch.compiler.disable
def integrate(
    dynamics: Dynamics,
    settings: OdeSettings,
    report: OdeReport,
    x: Tensor,
    shared: Sequence[Tensor] = (),
    rowwise: Sequence[Tensor] = (),
    span: tuple[float, float] = (0.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """Integrates rows along the field.

    Args:
        dynamics: what to integrate.
        settings: how.
        report: filled in.
        x: shape ``(n, D)``, float32 or float64.
        shared: tensors that all rows share; gradients reach them.
        rowwise: tensors with a leading dimension ``n``; gradients reach them.
        span: the times from which and to which, in either sequence.

    Returns:
        Where rows end, shape ``(n, D)``, and the integrals of the columns, shape ``(n, num_columns)``.

    Raises:
        ValueError: if ``x`` is not finite.
        RuntimeError: if the field is not, or the solver makes no headway; time and rows are named.
        NotImplementedError: for derivatives in forward mode.
    """
    call = Call(dynamics, settings, report, span)
    tensors = (*shared, *rowwise)
    taped = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors))
    if forward_mode():  # neither torchdiffeq nor the adjoint has a rule for it
        raise NotImplementedError(
            f"{dynamics.name}: no derivatives in forward mode (jvp, jacfwd, torch.func.hessian); use "
            'torch.func.jacrev, or torch.autograd.functional.hessian of a flow with gradient="backprop"'
        )
    moved, gradient = None, "backprop"
    if plain_eager() and (not taped or settings.gradient != "adjoint"):
        moved = _solve(call, x, shared, rowwise, bounded=taped and settings.gradient == "auto")
    if moved is None:
        moved, gradient = _Solve.apply(call, None, len(shared), x, *tensors), "adjoint"
    report.gradient = gradient if taped else None
    return x + moved[:, : x.shape[1]], moved[:, x.shape[1] :]


def _kept(value: Tensor, there: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps for the gradient of a value, besides tensors that are there anyway."""
    seen = {t.untyped_storage().data_ptr() for t in there}
    nodes, met = [value.grad_fn], {t.grad_fn for t in there} | {None}
    total = 0
    while nodes:
        node = nodes.pop()
        if node in met:
            continue
        met.add(node)
        kind = type(node)
        if kind not in _SAVED:
            _SAVED[kind] = [name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
        for name in _SAVED[kind]:
            held = getattr(node, name)
            for tensor in held if isinstance(held, (tuple, list)) else (held,):
                storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
                if storage is not None and storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    total += storage.nbytes()
        nodes += [after for after, _ in node.next_functions]
    return total


def _solve(
    call: Call, x: Tensor, shared: Sequence[Tensor], rowwise: Sequence[Tensor], bounded: bool = False
) -> Tensor | None:
    """How far rows move, and the columns, shape ``(n, D + num_columns)``.

    ``None`` if it is ``bounded`` and would keep more bytes for the gradient than it may.
    """
    settings, size = call.settings, x.shape[1]
    rhs = call.dynamics.bind(shared, rowwise)
    rtol, atol = floored(settings, x.dtype)

    def packed(t: Tensor, state: Tensor) -> Tensor:
        return torch.cat(rhs(t, x + state[:, :size]), 1)

    with torch.no_grad():
        scale = torch.cat((x.abs() * rtol + atol, x.new_full((len(x), call.dynamics.num_columns), atol)), 1)
    norm = row_norm if settings.per_row else rms
    start = x.new_zeros(len(x), size + call.dynamics.num_columns)
    watch = Watch(call, packed, norm, len(x), x)
    if not bool(scale.isfinite().all()):  # a field that saturates would not tell
        raise watch.trouble("")
    if bounded:
        watch.first = watch(x.new_tensor(call.span[0]), start)
        kept = _kept(watch.first, (x, *shared, *rowwise))
        if kept > KEPT:
            return None
        watch.allowed = KEPT_IN_ALL // max(kept, 1)
    try:
        out = watch.run(start, rtol, scale, call.span)
    except TooLongError:
        return None
    report = call.report
    report.evaluations, report.steps, report.rejected = watch.evaluations, watch.steps, watch.rejected
    report.local_error = watch.local_error if settings.solver in ADAPTIVE else None
    return out


class _Solve(torch.autograd.Function):
    """The solution with the gradient by the adjoint; its arguments are laid out as ``vmapped`` wants them."""

    @staticmethod
    def forward(call: Call, none: None, split: int, x: Tensor, *tensors: Tensor) -> Tensor:
        return _solve(call, x, tensors[:split], tensors[split:])

    @staticmethod
    def setup_context(ctx: object, inputs: tuple, output: Tensor) -> None:
        ctx.call, _, ctx.split, x, *tensors = inputs
        ctx.save_for_backward(x, output, *tensors)

    @staticmethod
    def backward(ctx: object, g: Tensor) -> tuple[Tensor | None, ...]:
        x, moved, *tensors = ctx.saved_tensors
        if autocasting(x.device):  # with rounding that no tolerance could be kept with
            with torch.autocast(x.device.type, enabled=False):
                return _Solve.backward(ctx, g)
        needed = ctx.needs_input_grad[4:]
        end = x + moved[:, : x.shape[1]]
        constants = (ctx.call, needed, ctx.split)
        if plain_eager() and not torch.is_grad_enabled():
            gx, *grads = _adjoint(*constants, end, g, *tensors, began=x)
        else:
            gx, *grads = _Adjoint.apply(*constants, end, g, *tensors)
        grads = iter(grads)
        return None, None, None, gx, *(next(grads) if need else None for need in needed)

    @staticmethod
    def vmap(info: object, in_dims: tuple, *args: object) -> tuple[Tensor, int]:
        return vmapped(_Solve.apply, 1, info.batch_size, in_dims, args), 0


def _adjoint(
    call: Call,
    needed: Sequence[bool],
    split: int,
    end: Tensor,
    g: Tensor,
    *tensors: Tensor,
    began: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients after where rows start, less those after where they end, and after those tensors that need one.

    ``g`` is given, after where rows end and after the columns.  Rows that do not come back to where they ``began``, as
    a strong contraction cannot be gone back, are warned of.
    """
    rows, size = end.shape
    settings, n = call.settings, end.numel()
    rtol, atol = floored(settings, end.dtype)
    end, g = end.detach(), g.detach()
    after_end, after_columns = g[:, :size], g[:, size:]
    moving = [_moving(t, need) for t, need in zip(tensors, needed, strict=True)]
    wanted = [t for t, need in zip(moving, needed, strict=True) if need]
    rhs = call.dynamics.bind(moving[:split], moving[split:])

    def augmented(t: Tensor, state: Tensor) -> Tensor:
        with torch.enable_grad():
            x = torch.add(end, state[:n].view(rows, size)).requires_grad_()
            outputs = rhs(t, x)
            pairs = [
                (out, weight)
                for out, weight in zip(
                    outputs, (after_end + state[n : 2 * n].view(rows, size), after_columns), strict=True
                )
                if out.requires_grad
            ]
            grads: Sequence[Tensor | None] = [None] * (1 + len(wanted))
            if pairs:
                outs, weights = zip(*pairs, strict=True)
                grads = torch.autograd.grad(outs, (x, *wanted), weights, allow_unused=True)
        flat = [
            like.new_zeros(like.numel()) if grad is None else grad.reshape(-1)
            for grad, like in zip(grads, (x, *wanted), strict=True)
        ]
        # Gradients grow against the time in which they are integrated.
        return torch.cat([outputs[0].detach().reshape(-1), torch.cat(flat).neg_()])

    rest = sum(t.numel() for t in wanted)
    tiny = torch.finfo(end.dtype).tiny
    largest = float(g.abs().amax())
    if not math.isfinite(largest):
        raise call.unfit(g)
    # By the largest, for squares of large or small gradients leave the range of float32.
    level = largest * float((g / max(largest, tiny)).square().mean().sqrt()) + 100 * tiny
    scale = [end.abs() * rtol + atol, after_end.abs() * rtol + level * atol]
    scale = torch.cat([*(t.reshape(-1) for t in scale), end.new_ones(rest)])
    start = end.new_zeros(2 * n + rest)

    def norm(ratio: Tensor) -> Tensor:
        parts = ratio[: 2 * n].view(2, rows, size).square()
        return (parts.mean(2) if settings.per_row else parts.mean((1, 2))).amax().sqrt()

    watch = Watch(call, augmented, norm, rows, end, backward=True)
    with torch.no_grad():
        out = watch.run(start, rtol, scale, call.span[::-1])
    call.report.backward_evaluations += watch.evaluations
    if began is not None:
        _warn_of_lost(call, end + out[:n].view(rows, size), began)
    grads, cut = [out[n : 2 * n].view(rows, size)], 2 * n
    for like in wanted:
        grads.append(out[cut : cut + like.numel()].view(like.shape))
        cut += like.numel()
    return tuple(grads)


def _warn_of_lost(call: Call, found: Tensor, began: Tensor) -> None:
    off = (found - began).abs() / (1 + began.abs())
    if off.numel() and float(off.amax()) > _LOST:
        warnings.warn(  # in the same words each time, so that a training loop shows it once
            f"{call.dynamics.name}: the adjoint solve did not find back to where some rows began, so their gradients "
            "are wrong: the field contracts more than the tolerance can tell; tighten rtol and atol, or go through the "
            'solver\'s steps (gradient="backprop")',
            RuntimeWarning,
            stacklevel=2,
        )


def _moving(t: Tensor, need: bool) -> Tensor:
    """A leaf to differentiate after; where it is one already, a module need not be called with others in its place."""
    if plain_eager() and t.is_leaf and t.requires_grad == need:
        return t
    return t.detach().requires_grad_(need)


class _Adjoint(torch.autograd.Function):
    """The adjoint solve where someone looks on: a batch of them by ``vmap``, and a refusal of second derivatives."""

    @staticmethod
    def forward(
        call: Call, needed: Sequence[bool], split: int, end: Tensor, g: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        return _adjoint(call, needed, split, end, g, *tensors)

    @staticmethod
    def setup_context(ctx: object, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.name = inputs[0].dynamics.name

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            f'{ctx.name}: the adjoint gives first derivatives only; build the flow with gradient="backprop" for more'
        )

    @staticmethod
    def vmap(info: object, in_dims: tuple, *args: object) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        call, needed, split, *tensors = args
        dims = in_dims[3:]
        size = info.batch_size
        shared = range(2, 2 + split)
        alone = any(dims[k] is not None for k in shared) or any(needed[:split])
        if alone:  # gradients of what rows share are apart for each
            parts = [
                _Adjoint.apply(
                    call,
                    needed,
                    split,
                    *(t if d is None else t.select(d, k) for t, d in zip(tensors, dims, strict=True)),
                )
                for k in range(size)
            ]
            stacked = tuple(torch.stack(each) for each in zip(*parts, strict=True))
            return stacked, (0,) * len(stacked)
        flat = []
        for k, (t, d) in enumerate(zip(tensors, dims, strict=True)):
            if k not in shared:
                t = t.expand(size, *t.shape) if d is None else t.movedim(d, 0)
                t = t.flatten(0, 1)
            flat.append(t)
        made = _Adjoint.apply(call, needed, split, *flat)
        return tuple(t.unflatten(0, (size, -1)) for t in made), (0,) * len(made)
