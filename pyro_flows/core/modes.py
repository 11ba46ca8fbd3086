"""Modes of execution, and the base of hand-made gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

__all__ = [
    "GradientByHand",
    "autocasting",
    "batched",
    "beyond_rules",
    "by_hand",
    "evaluating",
    "exact_products",
    "forward_mode",
    "full_precision",
    "lasting",
    "on_cpu",
    "plain_eager",
    "recording",
    "uncompiled",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_Outputs = Tensor | tuple[Tensor, ...]


_recorders = 0


@contextmanager
def recording(count: int = 1) -> Iterator[None]:
    """Says that so many more of the dispatch modes write down what they see, so that :func:`by_hand` holds."""
    global _recorders
    _recorders += count
    try:
        yield
    finally:
        _recorders -= count


def by_hand() -> bool:
    """Whether hand-made gradients may be used: in plain eager mode, also while it is recorded."""
    # Asked often, so without torch's wrappers.  Whatever else compiles has a dispatch mode.
    return not (
        torch.compiler.is_dynamo_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() != _recorders
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
    )


def plain_eager() -> bool:
    """False under ``torch.compile``, ``torch.jit.trace``, ``torch.func``, ``make_fx`` and other dispatch modes.

    Only plain eager mode allows looks at values, and cached results.
    """
    return not _recorders and by_hand()


def autocasting(device: torch.device) -> bool:
    """Whether autocast is on for this device."""
    if not torch._C._is_any_autocast_enabled():
        return False
    kind = device.type
    return kind != "meta" and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def uncompiled(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: ``torch.compile`` runs the function as it is; no compiler is loaded."""
    skip = eval_frame._FrameAction.SKIP  # the function and its callees
    eval_frame.set_code_exec_strategy(call.__code__, eval_frame._FrameExecStrategy(skip, skip))
    call.__dict__["_torchdynamo_disable"] = True  # ends a compiled caller's graph
    return call


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, enabled=False) if autocasting(device) else nullcontext()


@contextmanager
def _all_digits() -> Iterator[None]:
    """Within it, float32 products and convolutions on a GPU keep all their digits: TF32 has three."""
    before = {kind: torch._C._get_fp32_precision_getter("cuda", kind) for kind in ("matmul", "conv")}
    try:
        for kind in before:
            torch._C._set_fp32_precision_setter("cuda", kind, "ieee")
        yield
    finally:
        for kind, value in before.items():
            torch._C._set_fp32_precision_setter("cuda", kind, value)


def _without_tf32(device: torch.device) -> AbstractContextManager[Any]:
    # A compiler cannot follow changes of torch's settings.
    return _all_digits() if device.type == "cuda" and not torch.compiler.is_compiling() else nullcontext()


def _within(
    *settings: Callable[[torch.device], AbstractContextManager[Any]],
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorator: runs a function within these settings for the device of its first tensor."""

    def decorate(call: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(call)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if not (torch._C._is_any_autocast_enabled() or torch.cuda._initialized):
                return call(*args, **kwargs)
            device = next((each.device for each in args if isinstance(each, Tensor)), torch.device("cpu"))
            with ExitStack() as stack:
                for setting in settings:
                    stack.enter_context(setting(device))
                return call(*args, **kwargs)

        return run

    return decorate


def exact_products(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: runs a function without TF32, so that one direction of a linear map undoes the other."""
    return _within(_without_tf32)(call)


def full_precision(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: runs a function, which converts its arguments, without TF32 and autocast."""
    return _within(_without_autocast, _without_tf32)(call)


@full_precision
def _call_precisely(call: Callable[..., _R], *args: Any) -> _R:
    return call(*args)


def on_cpu(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: within the function, new tensors belong to the CPU, whatever the default device is."""

    @functools.wraps(call)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # The context slows down all calls of torch within it.
        if torch.empty(0).device.type == "cpu":
            return call(*args, **kwargs)
        with torch.device("cpu"):
            return call(*args, **kwargs)

    return run


def forward_mode() -> bool:
    """Whether forward-mode differentiation is on."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def beyond_rules() -> bool:
    """Whether a call needs more than a hand-made gradient's reverse mode and ``vmap``.

    Forward mode, ``functionalize`` and ``torch.func`` inside ``torch.compile`` do.
    """
    if torch.compiler.is_compiling():
        return torch._C._are_functorch_transforms_active()
    levels = torch._C._functorch.get_interpreter_stack() or ()
    kinds = torch._C._functorch.TransformType
    return forward_mode() or any(level.key() not in (kinds.Grad, kinds.Vmap) for level in levels)


def batched(grad: Tensor) -> bool:
    """Whether a gradient stands for many, as in a ``vmap`` over gradients."""
    return torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(grad)


@contextmanager
def lasting() -> Iterator[None]:
    """Within it, new tensors belong to no transform of ``torch.func`` nor inference mode."""
    with torch.inference_mode(False), temporarily_clear_interpreter_stack():
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model in evaluation mode, and restores all modes afterwards."""
    modes = {module: module.training for module in model.modules()}
    if not any(modes.values()):
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
        for module, mode in modes.items():
            module.training = mode


class GradientByHand(torch.autograd.Function):
    """Abstract base of autograd functions with a hand-made gradient.

    A subclass writes ``forward``, :meth:`pull` and :meth:`plain`, which serves gradients that are differentiated or
    stand for many.  The backward pass runs without TF32 and autocast.
    """

    @staticmethod
    def pull(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """The gradients with respect to all arguments of ``forward``, given those of its results."""
        raise NotImplementedError

    @staticmethod
    def plain(ctx: Any) -> tuple[Callable[..., _Outputs], Sequence[Tensor | None]]:
        """A differentiable ``forward``, and its arguments: the last ones of ``forward``."""
        raise NotImplementedError

    @classmethod
    def pull_plainly(cls, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """As :meth:`pull`, by differentiable operations."""
        function, inputs = cls.plain(ctx)

        def run(*given: Tensor) -> _Outputs:
            rest = iter(given)
            return function(*(None if each is None else next(rest) for each in inputs))

        traced: Any = torch.func.vjp(run, *(each for each in inputs if each is not None))
        outputs, pull = traced
        if isinstance(outputs, Tensor):
            found = iter(pull(grads[0]))
        else:
            pairs = zip(grads, outputs, strict=True)
            found = iter(pull(tuple(torch.zeros_like(out) if grad is None else grad for grad, out in pairs)))
        constants = len(ctx.needs_input_grad) - len(inputs)
        return (*[None] * constants, *(None if each is None else next(found) for each in inputs))

    @classmethod
    def backward(cls, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        further = torch.is_grad_enabled() or any(map(batched, given))
        return _call_precisely(cls.pull_plainly if further else cls.pull, ctx, *grads)

    record: Callable[..., Any]  # as apply in plain eager mode, but faster

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        plain: Any = super(torch.autograd.Function, cls)
        cls.record = plain.apply
