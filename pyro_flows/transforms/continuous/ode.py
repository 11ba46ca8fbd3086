"""Integration of rows along a vector field by torchdiffeq, with gradients by the adjoint or through the solver.

The state holds displacements and columns.  It starts at zero, so rounding is relative to the displacement, and a zero
field moves nothing.  Tolerances are relative to the position.

The adjoint solves backwards (arXiv:1806.07366, appendix B) for ``x`` and the gradients with respect to ``x`` and
parameters; the latter's error does not steer the steps (arXiv:2009.09457).  Its tolerance is relative to the incoming
gradient, so the scale of a loss does not matter.  Backpropagation takes a half to two thirds of the time.  ``"auto"``
decides by the bytes that the first evaluation keeps, and starts again with the adjoint where a solve turns out too
long.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_flows.core.modes import forward_mode, full_precision, plain_eager, uncompiled
from pyro_flows.inverse.newton_adjoint import vmapped
from pyro_flows.transforms.continuous.divergence import FieldDynamics
from pyro_flows.transforms.continuous.ode_solver import (
    ADAPTIVE,
    Call,
    OdeReport,
    OdeSettings,
    Solve,
    TooLongError,
    floored,
    rms,
    row_norm,
)

__all__ = ["KEPT", "KEPT_IN_ALL", "integrate"]

#: Bytes that one evaluation, and a whole solve, may keep where ``"auto"`` backpropagates.
KEPT, KEPT_IN_ALL = 4 * 2**20, 2**30

_SAVED: dict[type, list[str]] = {}  # the attributes in which a kind of node keeps tensors

_LOST = 0.1  # relative to 1 + |x|: rows that end farther from where they began took another way back


@uncompiled
def integrate(
    dynamics: FieldDynamics,
    settings: OdeSettings,
    report: OdeReport,
    x: Tensor,
    shared: Sequence[Tensor] = (),
    rowwise: Sequence[Tensor] = (),
    span: tuple[float, float] = (0.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """Integrates rows along the field, and fills in the report.

    ``x`` has shape ``(n, D)``, float32 or float64; ``rowwise`` tensors have a leading dimension ``n``, ``shared`` ones
    serve all rows, and gradients reach both.  ``span`` ascends or descends.

    Returns:
        The rows' ends, shape ``(n, D)``, and the integrals of the columns, shape ``(n, num_columns)``.

    Raises:
        ValueError, RuntimeError, NotImplementedError: as in ``Continuous``.
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
    """Bytes that autograd keeps for the gradient of a value, besides the tensors ``there``."""
    seen = {t.untyped_storage().data_ptr() for t in there}
    nodes, met = [value.grad_fn], {t.grad_fn for t in there} | {None}
    total = 0
    while nodes:
        node = nodes.pop()
        if node is None or node in met:
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
        nodes += [below for below, _ in node.next_functions]
    return total


def _solve(
    call: Call, x: Tensor, shared: Sequence[Tensor], rowwise: Sequence[Tensor], bounded: bool = False
) -> Tensor | None:
    """Displacements and columns, shape ``(n, D + num_columns)``.

    ``None`` if ``bounded`` and the gradient would keep too many bytes.
    """
    settings, size = call.settings, x.shape[1]
    rhs = call.dynamics.bind(shared, rowwise)
    rtol, atol = floored(settings, x.dtype)

    def packed(t: Tensor, state: Tensor) -> Tensor:
        return torch.cat(rhs(t, x + state[:, :size]), 1)

    with torch.no_grad():
        scale = torch.cat((x.abs() * rtol + atol, x.new_full((len(x), call.dynamics.num_columns), atol)), 1)
    start = x.new_zeros(len(x), size + call.dynamics.num_columns)
    solve = Solve(call, packed, row_norm if settings.per_row else rms, x)
    if not bool(scale.isfinite().all()):  # a field that saturates would hide it
        raise solve.trouble("")
    if bounded:
        solve.first = solve(x.new_tensor(call.span[0]), start)
        kept = _kept(solve.first, (x, *shared, *rowwise))
        if kept > KEPT:
            return None
        solve.allowed = KEPT_IN_ALL // max(kept, 1)
    try:
        out = solve.run(start, rtol, scale, call.span)
    except TooLongError:
        return None
    report = call.report
    report.evaluations, report.steps, report.rejected = solve.evaluations, solve.steps, solve.rejected
    report.local_error = solve.local_error if settings.solver in ADAPTIVE else None
    return out


class _Solve(torch.autograd.Function):
    """The solution with the adjoint as gradient; arguments in the layout of ``vmapped``."""

    @staticmethod
    def forward(call: Call, none: None, split: int, x: Tensor, *tensors: Tensor) -> Tensor | None:
        return _solve(call, x, tensors[:split], tensors[split:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call, _, ctx.split, x, *tensors = inputs
        ctx.save_for_backward(x, output, *tensors)

    @staticmethod
    @full_precision
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, moved, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        by_x, *grads = _Adjoint.apply(ctx.call, needed, ctx.split, x, x + moved[:, : x.shape[1]], g, *tensors)
        found = iter(grads)
        return None, None, None, by_x, *(next(found) if need else None for need in needed)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[object, int]:
        return vmapped(_Solve.apply, 1, info.batch_size, in_dims, args), 0


def _adjoint(
    call: Call, needed: Sequence[bool], split: int, began: Tensor, end: Tensor, g: Tensor, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Gradients with respect to the first rows, less those with respect to the last, and to the needed tensors.

    ``g`` is the gradient with respect to the last rows and the columns.  Warns of rows that do not come back to where
    they ``began``.
    """
    rows, size = end.shape
    settings, n = call.settings, end.numel()
    rtol, atol = floored(settings, end.dtype)
    end, g = end.detach(), g.detach()
    by_end, by_columns = g[:, :size], g[:, size:]
    moving = [_moving(t, need) for t, need in zip(tensors, needed, strict=True)]
    wanted = [t for t, need in zip(moving, needed, strict=True) if need]
    rhs = call.dynamics.bind(moving[:split], moving[split:])

    def augmented(t: Tensor, state: Tensor) -> Tensor:
        with torch.enable_grad():
            x = torch.add(end, state[:n].view(rows, size)).requires_grad_()
            outputs = rhs(t, x)
            weights = (by_end + state[n : 2 * n].view(rows, size), by_columns)
            pairs = [(out, weight) for out, weight in zip(outputs, weights, strict=True) if out.requires_grad]
            grads: Sequence[Tensor | None] = [None] * (1 + len(wanted))
            if pairs:
                outs, given = zip(*pairs, strict=True)
                grads = torch.autograd.grad(outs, (x, *wanted), given, allow_unused=True)
        flat = [
            like.new_zeros(like.numel()) if grad is None else grad.reshape(-1)
            for grad, like in zip(grads, (x, *wanted), strict=True)
        ]
        # Gradients grow against the direction of time.
        return torch.cat([outputs[0].detach().reshape(-1), torch.cat(flat).neg_()])

    rest = sum(t.numel() for t in wanted)
    tiny = torch.finfo(end.dtype).tiny
    largest = float(g.abs().amax())
    if not math.isfinite(largest):
        raise call.unfit(g)
    # Divided by the largest, because squares may leave the range of float32.
    level = largest * float((g / max(largest, tiny)).square().mean().sqrt()) + 100 * tiny
    scales = (end.abs() * rtol + atol, by_end.abs() * rtol + level * atol, end.new_ones(rest))
    start = end.new_zeros(2 * n + rest)

    def norm(ratio: Tensor) -> Tensor:
        parts = ratio[: 2 * n].view(2, rows, size).square()
        return (parts.mean(2) if settings.per_row else parts.mean((1, 2))).amax().sqrt()

    solve = Solve(call, augmented, norm, end, backward=True)
    with torch.no_grad():
        out = solve.run(start, rtol, torch.cat([t.reshape(-1) for t in scales]), call.span[::-1])
    call.report.backward_evaluations += solve.evaluations
    _warn_of_lost(call, end + out[:n].view(rows, size), began)
    _, by_x, *grads = out.split([n, n, *(t.numel() for t in wanted)])
    return by_x.view(rows, size), *(grad.view(like.shape) for grad, like in zip(grads, wanted, strict=True))


def _warn_of_lost(call: Call, found: Tensor, began: Tensor) -> None:
    off = (found - began).abs() / (1 + began.abs())
    if off.numel() and float(off.amax()) > _LOST:
        warnings.warn(  # the same words each time, so that a training loop shows it once
            f"{call.dynamics.name}: the adjoint solve did not find back to where some rows began, so their gradients "
            "are wrong: the field contracts more than the tolerance can tell; tighten rtol and atol, or go through the "
            'solver\'s steps (gradient="backprop")',
            RuntimeWarning,
            stacklevel=2,
        )


def _moving(t: Tensor, need: bool) -> Tensor:
    """A leaf that requires a gradient as needed; the tensor itself if possible."""
    if plain_eager() and t.is_leaf and t.requires_grad == need:
        return t
    return t.detach().requires_grad_(need)


class _Adjoint(torch.autograd.Function):
    """The adjoint solve: batched by ``vmap``, without second derivatives."""

    forward = staticmethod(_adjoint)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name = inputs[0].dynamics.name

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            f'{ctx.name}: the adjoint gives first derivatives only; build the flow with gradient="backprop" for more'
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        needed, split = args[1:3]
        made = vmapped(
            _Adjoint.apply, 3, info.batch_size, in_dims, args, results=1 + sum(needed), apart=any(needed[:split])
        )
        return made, (0,) * len(made)
