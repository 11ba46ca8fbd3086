r"""The inverse of a map with a triangular Jacobian, by safeguarded Newton-Jacobi sweeps, with implicit gradients.

For a gradient :math:`g` of the solution of :math:`f(x) = z`, the system :math:`J^\top v = g` gives the gradient
:math:`v` with respect to :math:`z` and :math:`-(\partial f/\partial\theta)^\top v` with respect to the parameters;
memory does not grow with the sweeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_flows.core.modes import beyond_rules, forward_mode, full_precision, plain_eager
from pyro_flows.inverse.newton_adjoint import Linear, first_order, push, vmapped
from pyro_flows.inverse.newton_sweeps import TOLERANCE, SolveReport, SolverSettings, TriangularMap, named_map, sweep

__all__ = ["solve_triangular"]


@full_precision  # half precision would give no inverse
def solve_triangular(
    map: TriangularMap,
    z: Tensor,
    shared: Sequence[Tensor] = (),
    rowwise: Sequence[Tensor] = (),
    settings: SolverSettings | None = None,
) -> tuple[Tensor, SolveReport]:
    """Solves ``f(x) = z`` row by row, to rounding or to a tolerance, with implicit gradients.

    Args:
        map: the map to invert.
        z: shape ``(n, *event_shape)``, float32 or float64.
        shared: tensors that all rows share.
        rowwise: tensors with a leading dimension ``n``.
        settings: tolerance, limit and what to do on failure.

    Returns:
        ``x`` with the shape of ``z``, differentiable in ``z``, ``shared`` and ``rowwise``, and a report.

    Raises:
        ValueError: if values, parameters or bounds are not finite.
        RuntimeError: if rows stay unsolved (a warning with ``on_fail="warn"``).
        NotImplementedError: for ``functionalize``, or any transform of ``torch.func`` inside a compiler.
    """
    settings = (SolverSettings() if settings is None else settings).check()
    if z.dtype not in TOLERANCE:
        raise ValueError(f"{map.name}: expected float32 or float64 values to invert, got {z.dtype}")
    if z.is_meta:
        return torch.empty_like(z), SolveReport(_no_stats())
    tensors = [t.to(z.dtype) if t.is_floating_point() else t for t in (*shared, *rowwise)]
    split = len(shared)
    if plain_eager() and not (torch.is_grad_enabled() and any(t.requires_grad for t in (z, *tensors))):
        x, stats = sweep(map, z, tensors[:split], tensors[split:], settings)
    elif plain_eager() or forward_mode() or not (_traced() or beyond_rules()):
        x, stats = _Solve.apply(map, settings, split, z, *tensors)
        while torch._C._functorch.is_functorch_wrapped_tensor(stats):
            stats = torch._C._functorch.get_unwrapped(stats)
    elif torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{map.name}: this iterative solve cannot go under functionalize, nor under any transform of torch.func "
            "inside torch.compile or make_fx; leave these out, or compile the flow alone and call backward() on the "
            "result"
        )
    else:
        x, stats = torch.ops.pyro_flows.solve_triangular(z, tensors[:split], tensors[split:], map.handle, *settings)
    return x, SolveReport(stats.detach())


def _traced() -> bool:
    """Whether a compiler traces, or tensors hold no values; ``torch.func`` alone is neither."""
    return bool(torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._is_tracing())


class _Solve(torch.autograd.Function):
    """The solution with its implicit gradient."""

    @staticmethod
    def forward(
        solved: TriangularMap, settings: SolverSettings, split: int, z: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        return sweep(solved, z, tensors[:split], tensors[split:], settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.solved, _, ctx.split, _, *tensors = inputs
        ctx.save_for_backward(output[0], *tensors)
        ctx.save_for_forward(output[0], *tensors)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @full_precision
    def backward(ctx: Any, g: Tensor, none: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        if not torch.is_grad_enabled():  # no further derivatives
            v, grads = first_order(ctx.solved, ctx.split, g, x, tensors, ctx.needs_input_grad[4:])
            return None, None, None, v, *grads
        v = Linear.apply(ctx.solved, True, ctx.split, g, x, *tensors)
        pulled = torch.func.vjp(partial(_value, ctx.solved, ctx.split, x), *tensors)[1](-v) if tensors else ()
        return None, None, None, v, *pulled

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:
        x, *tensors = ctx.saved_tensors
        rhs = torch.zeros_like(x) if tangents[3] is None else tangents[3]
        if any(t is not None for t in tangents[4:]):
            rhs = rhs - push(partial(_value, ctx.solved, ctx.split, x), tensors, tangents[4:])
        return Linear.apply(ctx.solved, False, ctx.split, rhs, x, *tensors), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, None]]:
        return _vmapped(_Solve.apply, info.batch_size, in_dims, args)


def _value(solved: TriangularMap, split: int, x: Tensor, *tensors: Tensor) -> Tensor:
    return solved.value_and_slope(x, tensors[:split], tensors[split:])[0]


def _vmapped(
    call: Callable[..., Any], size: int, in_dims: Sequence[Any], args: Sequence[Any]
) -> tuple[tuple[Tensor, Tensor], tuple[int, None]]:
    """Solutions of a batch of problems with one report: the slowest, all evaluations, the worst."""
    x, stats = vmapped(call, 1, size, in_dims, args)
    if stats.dim() > 1:
        most, total = stats.amax(0), stats.sum(0)
        stats = torch.stack([most[0], total[1], most[2], total[3], stats[:, 4].amin(), most[5]])
    return (x, stats), (0, None)


# For compilers: operators that name the map by its handle.


def _no_stats() -> Tensor:
    return torch.zeros(6, dtype=torch.float64, device="cpu")


@torch.library.custom_op("pyro_flows::solve_triangular", mutates_args=())
def _solve_op(
    z: Tensor,
    shared: list[Tensor],
    rowwise: list[Tensor],
    handle: str,
    tolerance: float | None,
    max_sweeps: int | None,
    on_fail: str,
) -> tuple[Tensor, Tensor]:
    return sweep(named_map(handle), z, shared, rowwise, SolverSettings(tolerance, max_sweeps, on_fail))


@_solve_op.register_fake
def _(z: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z, memory_format=torch.contiguous_format), _no_stats()


@torch.library.custom_op("pyro_flows::solve_triangular_gradient", mutates_args=())
def _gradient_op(
    g: Tensor, x: Tensor, shared: list[Tensor], rowwise: list[Tensor], handle: str
) -> tuple[Tensor, list[Tensor]]:
    tensors = [*shared, *rowwise]
    v, grads = first_order(named_map(handle), len(shared), g, x, tensors, [t.is_floating_point() for t in tensors])
    # Compilers expect results with memory of their own.
    found = [torch.zeros_like(t) if grad is None else grad for t, grad in zip(tensors, grads, strict=True)]
    v, *found = (t.clone(memory_format=torch.contiguous_format) for t in (v, *found))
    return v, found


@_gradient_op.register_fake
def _(g: Tensor, x: Tensor, shared: list[Tensor], rowwise: list[Tensor], handle: str) -> tuple[Tensor, list[Tensor]]:
    v, *grads = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, *shared, *rowwise))
    return v, grads


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, shared, rowwise, ctx.handle, *_ = inputs
    ctx.split = len(shared)
    ctx.solved = named_map(ctx.handle)  # lives as long as the graph
    ctx.save_for_backward(output[0], *shared, *rowwise)


def _backward(ctx: Any, g: Tensor, none: Tensor | None) -> tuple[Any, ...]:
    x, *tensors = ctx.saved_tensors
    shared, rowwise = tensors[: ctx.split], tensors[ctx.split :]
    v, grads = torch.ops.pyro_flows.solve_triangular_gradient(g, x, shared, rowwise, ctx.handle)
    return v, grads[: ctx.split], grads[ctx.split :], None, None, None, None


_solve_op.register_autograd(_backward, setup_context=_setup)


@_solve_op.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, None]]:
    z, shared, rowwise, *constants = args
    split = len(shared)

    def call(*given: Any) -> tuple[Tensor, Tensor]:
        z, *tensors = given[3:]
        return torch.ops.pyro_flows.solve_triangular(z, tensors[:split], tensors[split:], *constants)

    dims = (None, None, None, in_dims[0], *in_dims[1], *in_dims[2])
    return _vmapped(call, info.batch_size, dims, (None, None, split, z, *shared, *rowwise))
