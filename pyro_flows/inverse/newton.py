r"""The inverse of a map with a triangular Jacobian, by safeguarded Newton-Jacobi sweeps, with implicit gradients.

:func:`solve_triangular` is the entry point.  With :math:`f(x) = z` and an upstream gradient :math:`g` of :math:`x`, one
more triangular system, :math:`J^\top v = g`, gives :math:`v` as the gradient of :math:`z` and
:math:`-(\partial f/\partial\theta)^\top v` as that of the parameters, so that memory does not grow with the sweeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pyro_flows.core.modes import autocasting, beyond_rules, forward_mode, plain_eager
from pyro_flows.inverse.newton_adjoint import Linear, first_order, push, vmapped
from pyro_flows.inverse.newton_sweeps import TOLERANCE, SolveReport, SolverSettings, TriangularMap, named_map, sweep

__all__ = ["solve_triangular"]


def solve_triangular(
    map: TriangularMap,
    z: Tensor,
    shared: Sequence[Tensor] = (),
    rowwise: Sequence[Tensor] = (),
    settings: SolverSettings | None = None,
) -> tuple[Tensor, SolveReport]:
    r"""Solves ``f(x) = z`` row by row, to rounding or to a tolerance, with implicit gradients.

    Args:
        map: what to invert.
        z: shape ``(n, *event_shape)``, float32 or float64.
        shared: tensors that all rows share; gradients reach them.
        rowwise: tensors with a leading dimension ``n``; gradients reach them.
        settings: tolerance, limit and what to do on failure.

    Returns:
        ``x`` with the shape of ``z``, differentiable in ``z``, ``shared`` and ``rowwise``, and a report.

    Raises:
        ValueError: if values, parameters or bounds are not finite.
        RuntimeError: if rows stay unsolved (a warning with ``on_fail="warn"``).
        NotImplementedError: for ``functionalize``, or any transform of ``torch.func`` inside a compiler.
    """
    settings = SolverSettings() if settings is None else settings
    _check(settings)
    if autocasting(z.device):  # half precision would be no inverse
        with torch.autocast(z.device.type, enabled=False):
            shared, rowwise = ([_as(z, t) for t in group] for group in (shared, rowwise))
            return solve_triangular(map, z, shared, rowwise, settings)
    if z.dtype not in TOLERANCE:
        raise ValueError(f"{map.name}: expected float32 or float64 values to invert, got {z.dtype}")
    if z.is_meta:
        return torch.empty_like(z), SolveReport(_fake_stats())
    tensors = (*shared, *rowwise)
    if plain_eager() and not (torch.is_grad_enabled() and any(t.requires_grad for t in (z, *tensors))):
        x, stats = sweep(map, z, shared, rowwise, settings)
    elif plain_eager() or forward_mode() or not (_traced() or beyond_rules()):
        x, stats = _Solve.apply(map, settings, len(shared), z, *tensors)
        while torch._C._functorch.is_functorch_wrapped_tensor(stats):
            stats = torch._C._functorch.get_unwrapped(stats)
    elif torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{map.name}: this iterative solve cannot go under functionalize, nor under any transform of torch.func "
            "inside torch.compile or make_fx; leave these out, or compile the flow alone and call backward() on the "
            "result"
        )
    else:
        x, stats = torch.ops.pyro_flows.solve_triangular(z, list(shared), list(rowwise), map.handle, *settings)
    return x, SolveReport(stats.detach())


def _as(z: Tensor, t: Tensor) -> Tensor:
    return t.to(z.dtype) if t.is_floating_point() else t


def _traced() -> bool:
    """Whether a compiler looks on, or a mode in which tensors hold no values; ``torch.func`` alone is neither."""
    return bool(torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._is_tracing())


def _check(settings: SolverSettings) -> None:
    tolerance, limit, on_fail = settings
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"expected tolerance between 0 and 1, or None, got {tolerance!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"expected max_sweeps >= 1, or None, got {limit!r}")
    if on_fail not in ("raise", "warn"):
        raise ValueError(f"expected on_fail to be 'raise' or 'warn', got {on_fail!r}")


class _Solve(torch.autograd.Function):
    """The solution with its implicit gradient."""

    @staticmethod
    def forward(
        solved: TriangularMap, settings: SolverSettings, split: int, z: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        return sweep(solved, z, tensors[:split], tensors[split:], settings)

    @staticmethod
    def setup_context(ctx: object, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.solved, _, ctx.split, _, *tensors = inputs
        ctx.save_for_backward(output[0], *tensors)
        ctx.save_for_forward(output[0], *tensors)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: object, g: Tensor, none: Tensor | None) -> tuple[Tensor | None, ...]:
        if autocasting(g.device):
            with torch.autocast(g.device.type, enabled=False):
                return _Solve.backward(ctx, g, none)
        x, *tensors = ctx.saved_tensors
        if not torch.is_grad_enabled():  # nobody differentiates the gradient further
            v, grads = first_order(ctx.solved, ctx.split, g, x, tensors, ctx.needs_input_grad[4:])
            return None, None, None, v, *grads
        v = Linear.apply(ctx.solved, True, ctx.split, g, x, *tensors)
        grads = torch.func.vjp(partial(_value, ctx.solved, ctx.split, x), *tensors)[1](-v) if tensors else ()
        return None, None, None, v, *grads

    @staticmethod
    def jvp(ctx: object, *tangents: Tensor | None) -> tuple[Tensor, None]:
        x, *tensors = ctx.saved_tensors
        rhs = torch.zeros_like(x) if tangents[3] is None else tangents[3]
        if any(t is not None for t in tangents[4:]):
            rhs = rhs - push(partial(_value, ctx.solved, ctx.split, x), tensors, tangents[4:])
        return Linear.apply(ctx.solved, False, ctx.split, rhs, x, *tensors), None

    @staticmethod
    def vmap(info: object, in_dims: tuple, *args: object) -> tuple[tuple[Tensor, Tensor], tuple[int, None]]:
        x, stats = vmapped(_Solve.apply, 1, info.batch_size, in_dims, args)
        return (x, _worst(stats)), (0, None)


def _value(solved: TriangularMap, split: int, x: Tensor, *tensors: Tensor) -> Tensor:
    return solved.value_and_slope(x, tensors[:split], tensors[split:])[0]


def _worst(stats: Tensor) -> Tensor:
    """One report for solves that were made one after the other."""
    if stats.dim() == 1:
        return stats
    most, total = stats.amax(0), stats.sum(0)
    return torch.stack([most[0], total[1], most[2], total[3], stats[:, 4].amin(), most[5]])


# The same for compilers, as operators that name the map by its handle.


def _fake_stats() -> Tensor:
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
def _(z: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z, memory_format=torch.contiguous_format), _fake_stats()


@torch.library.custom_op("pyro_flows::solve_triangular_gradient", mutates_args=())
def _gradient_op(
    g: Tensor, x: Tensor, shared: list[Tensor], rowwise: list[Tensor], handle: str
) -> tuple[Tensor, list[Tensor]]:
    tensors = [*shared, *rowwise]
    needed = [t.is_floating_point() for t in tensors]
    v, grads = first_order(named_map(handle), len(shared), g, x, tensors, needed)
    return _packed(v), [
        torch.zeros_like(t, memory_format=torch.contiguous_format) if grad is None else _packed(grad)
        for t, grad in zip(tensors, grads, strict=True)
    ]


@_gradient_op.register_fake
def _(g: Tensor, x: Tensor, shared: list[Tensor], rowwise: list[Tensor], handle: str) -> tuple[Tensor, list[Tensor]]:
    v, *grads = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, *shared, *rowwise))
    return v, grads


def _packed(t: Tensor) -> Tensor:
    """A tensor of its own memory, as a compiler may expect of an operator's results."""
    return t.clone(memory_format=torch.contiguous_format)


def _setup(ctx: object, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, shared, rowwise, handle, *_ = inputs
    ctx.split, ctx.handle, ctx.solved = len(shared), handle, named_map(handle)
    ctx.save_for_backward(output[0], *shared, *rowwise)


def _backward(ctx: object, g: Tensor, none: Tensor | None) -> tuple[object, ...]:
    x, *tensors = ctx.saved_tensors
    shared, rowwise = tensors[: ctx.split], tensors[ctx.split :]
    v, grads = torch.ops.pyro_flows.solve_triangular_gradient(g, x, shared, rowwise, ctx.handle)
    return v, grads[: ctx.split], grads[ctx.split :], None, None, None, None


_solve_op.register_autograd(_backward, setup_context=_setup)


@_solve_op.register_vmap
def _(info: object, in_dims: tuple, *args: object) -> tuple[tuple[Tensor, Tensor], tuple[int, None]]:
    z, shared, rowwise, *constants = args
    split = len(shared)

    def call(_: None, __: None, split: int, z: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.pyro_flows.solve_triangular(z, list(tensors[:split]), list(tensors[split:]), *constants)

    dims = (None, None, None, in_dims[0], *in_dims[1], *in_dims[2])
    x, stats = vmapped(call, 1, info.batch_size, dims, (None, None, split, z, *shared, *rowwise))
    return (x, _worst(stats)), (0, None)
