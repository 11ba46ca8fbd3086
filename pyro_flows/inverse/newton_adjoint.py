r"""Linear systems in the Jacobian of a triangular map, :math:`J^\top v = g` and :math:`J u = w`, differentiable.

Derivatives of an implicit solution solve such systems.  :math:`I - D^{-1} J` is nilpotent, so the sweeps :math:`v
\leftarrow v + D^{-1}(g - J^\top v)` end after one per wave; mostly the residual is rounding sooner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.utils._pytree import tree_map

from pyro_flows.inverse.newton_sweeps import TriangularMap

__all__ = ["Linear", "first_order", "push", "vmapped"]

FLOOR = 8


def _solve(product: Callable[[Tensor], Tensor], d: Tensor, g: Tensor, level: Tensor, count: int) -> Tensor:
    """``v`` with ``product(v) = g``, for a triangular product with diagonal ``d``; ``level`` is a coordinate's wave."""
    eps, tiny = torch.finfo(g.dtype).eps, torch.finfo(g.dtype).tiny
    v = g / d
    if count == 1 or v.numel() == 0:
        return v
    last = math.inf
    # With is_grads_batched no number can be read.
    for k in range(0 if is_legacy_batchedtensor(g) else 2 * count + 2):
        jv = product(v)
        r = g - jv
        scale = jv.abs().add_(g.abs()).addcmul_(d, v.abs()).add_(tiny)
        v = v + r / d
        worst = float((r.abs() / scale).amax())
        # Stop at rounding, or a residual that shrinks no more.  Sweeps beyond `count` restore digits lost in the sum.
        enough, gain = (2**10 * FLOOR * eps, 0.5) if k < count else (eps**0.5, 0.9)
        if worst <= FLOOR * eps or gain * last < worst < enough:
            return v
        if not math.isfinite(worst):
            break
        last = worst
    # Wave by wave, only the solution itself can overflow.
    v = torch.zeros_like(v)
    for turn in range(count):
        v = torch.where(level == turn, (g - product(v)) / d, v)
    return v


def _level(solved: TriangularMap, like: Tensor, transpose: bool) -> tuple[Tensor, int]:
    wave, count = solved.waves(like.device)
    wave = wave.view(like.shape[1:])
    return (count - 1 - wave if transpose else wave), count


def _linear(
    solved: TriangularMap, transpose: bool, split: int, rhs: Tensor, x: Tensor, tensors: Sequence[Tensor]
) -> Tensor:
    """``J(x)^{-1} rhs``, or ``J(x)^{-T} rhs`` with ``transpose``; not differentiable."""
    # A graph of x alone spares gradients of parameters.
    with torch.enable_grad():
        x, fixed = x.detach().requires_grad_(), [t.detach() for t in tensors]
        f, d = solved.value_and_slope(x, fixed[:split], fixed[split:])
        if not transpose:  # J u is the derivative of J^T v with respect to v, at any v
            probe = torch.zeros_like(f, requires_grad=True)
            f, x = torch.autograd.grad(f, x, probe, create_graph=True)[0], probe
    level, count = _level(solved, rhs, transpose)
    with torch.no_grad():
        return _solve(partial(_pull, f, x), d.detach(), rhs, level, count)


def _pull(f: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """``J^T v``; the graph stays."""
    return torch.autograd.grad(f, x, v, retain_graph=True)[0]


def _recording() -> AbstractContextManager:
    """Lets autograd record inside a custom operator, whose kernel runs below it."""
    hidden = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        hidden = hidden - torch._C.DispatchKeySet(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), hidden)


def first_order(
    solved: TriangularMap, split: int, g: Tensor, x: Tensor, tensors: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """``v = J^-T g``, the gradient with respect to ``z``, and ``-(df/dt)^T v`` for each tensor that needs it."""
    with _recording():
        v = _linear(solved, True, split, g, x, tensors)
        if not any(needed):
            return v, [None] * len(tensors)
        with torch.enable_grad():
            moving = [t.detach().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
            f = solved.value_and_slope(x.detach(), moving[:split], moving[split:])[0]
        grads = iter(torch.autograd.grad(f, [t for t in moving if t.requires_grad], -v, allow_unused=True))
    return v, [next(grads) if need else None for need in needed]


class Linear(torch.autograd.Function):
    """``J(x)^{-1} rhs``, or ``J(x)^{-T} rhs`` with ``transpose``; differentiable any number of times."""

    @staticmethod
    def forward(solved: TriangularMap, transpose: bool, split: int, rhs: Tensor, x: Tensor, *tensors: Tensor) -> Tensor:
        return _linear(solved, transpose, split, rhs, x, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.solved, ctx.transpose, ctx.split, _, *tensors = inputs
        ctx.save_for_backward(output, *tensors)
        ctx.save_for_forward(output, *tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        # For u = J^-1 w with cotangent c, p = J^-T c is the gradient with respect to w; the arguments of J get the
        # gradient of -p^T J u with p and u fixed.  With J^T in place of J, p and u trade places.
        solution, x, *tensors = ctx.saved_tensors
        other = Linear.apply(ctx.solved, not ctx.transpose, ctx.split, cotangent, x, *tensors)
        left, right = (solution, other) if ctx.transpose else (other, solution)
        product = partial(_product, ctx.solved, True, ctx.split, left)
        return None, None, None, other, *torch.func.vjp(product, x, *tensors)[1](-right)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        solution, *inputs = ctx.saved_tensors
        product = partial(_product, ctx.solved, ctx.transpose, ctx.split, solution)
        rhs = -push(product, inputs, tangents[4:])
        if tangents[3] is not None:
            rhs = rhs + tangents[3]
        return Linear.apply(ctx.solved, ctx.transpose, ctx.split, rhs, *inputs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return vmapped(Linear.apply, 2, info.batch_size, in_dims, args), 0


def _product(solved: TriangularMap, transpose: bool, split: int, v: Tensor, x: Tensor, *tensors: Tensor) -> Tensor:
    """``J v``, or ``J^T v`` with ``transpose``, as a function of the arguments of ``J``."""

    def value(x: Tensor) -> Tensor:
        return solved.value_and_slope(x, tensors[:split], tensors[split:])[0]

    return torch.func.vjp(value, x)[1](v)[0] if transpose else push(value, [x], [v])


def push(function: Callable[..., Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor:
    """The directional derivative by two reverse passes, which every operation supports."""
    value, pull = torch.func.vjp(function, *inputs)[:2]
    tangents = tuple(torch.zeros_like(t) if d is None else d for t, d in zip(inputs, tangents, strict=True))
    return torch.func.vjp(pull, torch.zeros_like(value))[1](tangents)[0]


def vmapped(
    call: Callable[..., Any],
    rows: int,
    size: int,
    in_dims: Sequence[Any],
    args: Sequence[Any],
    *,
    results: int = 1,
    apart: bool = False,
) -> Any:
    """Solves a batch of problems: as more rows if all share the shared tensors, else (or if ``apart``) one by one.

    ``call`` takes three constants, the last the number of shared tensors; then ``rows`` tensors of samples, the shared
    ones, and other tensors of samples.  Its first ``results`` results have a dimension of samples.
    """
    constants, tensors, dims = args[:3], args[3:], in_dims[3:]
    shared = range(rows, rows + constants[2])
    if apart or any(dims[k] is not None for k in shared):
        parts = [
            call(*constants, *(t if d is None else t.select(d, k) for t, d in zip(tensors, dims, strict=True)))
            for k in range(size)
        ]
        return tree_map(lambda *each: torch.stack(each), *parts)
    flat, n = [], 0
    for k, t in enumerate(tensors):
        if k not in shared:
            d = dims[k]
            t = t.expand(size, *t.shape) if d is None else t.movedim(d, 0)
            n = t.shape[1]
            t = t.flatten(0, 1)
        flat.append(t)
    result = call(*constants, *flat)
    if isinstance(result, Tensor):
        return torch.unflatten(result, 0, (size, n))
    return *(torch.unflatten(each, 0, (size, n)) for each in result[:results]), *result[results:]
