"""Elementwise functions between layers: by name, in place where their slope can be had from their value, and slopes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["IN_PLACE", "Activation", "activation_function", "known_activations", "pull", "slope"]

Activation = str | Callable[[Tensor], Tensor]

_BY_NAME: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}

IN_PLACE: dict[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] = {
    torch.relu: torch.relu_,
    torch.tanh: torch.tanh_,
    torch.sigmoid: torch.sigmoid_,
    F.elu: partial(F.elu, inplace=True),
}

_SLOPES: dict[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]] = {
    torch.relu: lambda pre, post: torch.sign(post),
    torch.tanh: lambda pre, post: 1 - post * post,
    torch.sigmoid: lambda pre, post: post * (1 - post),
    F.elu: lambda pre, post: torch.where(post > 0, 1.0, post + 1),
    F.silu: lambda pre, post: torch.sigmoid(pre) * (1 + pre - post),
}


_PULLS: dict[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    torch.relu: lambda grad, pre, post: torch.ops.aten.threshold_backward.default(grad, post, 0),
    torch.tanh: lambda grad, pre, post: torch.ops.aten.tanh_backward.default(grad, post),
    torch.sigmoid: lambda grad, pre, post: torch.ops.aten.sigmoid_backward.default(grad, post),
    F.silu: lambda grad, pre, post: torch.ops.aten.silu_backward.default(grad, pre),
}


def activation_function(activation: Activation) -> Callable[[Tensor], Tensor]:
    """The elementwise function of this name, or the given function itself."""
    if isinstance(activation, str):
        if activation not in _BY_NAME:
            raise ValueError(f"expected activation to be one of {sorted(_BY_NAME)} or a function, got {activation!r}")
        return _BY_NAME[activation]
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        raise ValueError("expected an activation without parameters: the networks here treat it as a fixed function")
    if not callable(activation):
        raise TypeError(f"expected activation to be a name or a function, got {type(activation).__name__}")
    return activation


def known_activations() -> frozenset[Callable[[Tensor], Tensor]]:
    """The functions that have a name here."""
    return frozenset(_BY_NAME.values())


def slope(activation: Callable[[Tensor], Tensor], pre: Tensor, post: Tensor) -> Tensor:
    """The derivative at ``pre``, where the value is ``post``; for what is in ``IN_PLACE``, ``pre`` is not looked at."""
    known = _SLOPES.get(activation)
    if known is not None:
        return known(pre, post)
    return torch.func.vjp(activation, pre)[1](torch.ones_like(pre))[0]


def pull(activation: Callable[[Tensor], Tensor], grad: Tensor, pre: Tensor, post: Tensor) -> Tensor:
    """The gradient after ``pre``, given that after ``post``; ``grad`` may be overwritten."""
    known = _PULLS.get(activation)
    return grad.mul_(slope(activation, pre, post)) if known is None else known(grad, pre, post)
