"""Whether a call is plain eager execution, in which hand-made kernels and remembered results are allowed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

__all__ = ["autocasting", "batched", "beyond_rules", "forward_mode", "lasting", "plain_eager"]


def plain_eager() -> bool:
    """False under ``torch.compile``, ``torch.jit.trace``, ``torch.func``, ``make_fx`` and any other dispatch mode."""
    # Asked several times in each call, so without the wrappers around these flags.
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
    )


def autocasting(device: torch.device) -> bool:
    """Whether autocast is on for this device, if it knows of it at all."""
    if not torch._C._is_any_autocast_enabled():
        return False
    kind = device.type
    return kind != "meta" and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def forward_mode() -> bool:
    """Whether someone differentiates forwards, for which hand-made kernels have no rule."""
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Jvp for level in levels)


def beyond_rules() -> bool:
    """Whether a call takes more than what a hand-made gradient has rules for, which is reverse mode and ``vmap``.

    So do forward mode, ``functionalize``, and every transform of ``torch.func`` inside ``torch.compile``.
    """
    if torch.compiler.is_compiling():
        return torch._C._are_functorch_transforms_active()
    levels = torch._C._functorch.get_interpreter_stack() or ()
    kinds = torch._C._functorch.TransformType
    return forward_mode() or any(level.key() not in (kinds.Grad, kinds.Vmap) for level in levels)


def batched(grad: Tensor) -> bool:
    """Whether a gradient stands for many, as with ``is_grads_batched`` or in a ``vmap`` over gradients."""
    return torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(grad)


@contextmanager
def lasting() -> Iterator[None]:
    """Within it, new tensors belong to no transform of ``torch.func`` nor to inference mode, and can be kept."""
    with torch.inference_mode(False), temporarily_clear_interpreter_stack():
        yield
