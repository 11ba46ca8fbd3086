"""Elementwise functions between layers: by name, in place where their slope can be had from their value, and slopes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flows.univariate.base import number

__all__ = ["IN_PLACE", "Activation", "activation_functions", "isru", "known_activations", "pull", "slope"]

Function = Callable[[Tensor], Tensor]


Activation = str | Function | Sequence[str | Function]

_ALPHA = 0.2


def isru(x: Tensor) -> Tensor:
    r"""Inverse square root unit :math:`x / \sqrt{1 + \alpha x^2}` with :math:`\alpha = 1/5`.

    The identity near zero, and bounded: a network whose first layer has it gives bounded parameters, however far out
    its inputs are.

    References:
        Improving Deep Learning by Inverse Square Root Linear Units (Carlile et al., 2017), arXiv:1710.09967.
    """
    return x * torch.rsqrt(1.0 + _ALPHA * (x * x))


def _isru_(x: Tensor) -> Tensor:
    one = number(1.0, x.dtype) if x.device.type == "cpu" else x.new_ones(())
    return x.mul_(torch.addcmul(one, x, x, value=_ALPHA).rsqrt_())


def _isru_slope(pre: Tensor, post: Tensor) -> Tensor:
    rest = torch.addcmul(post.new_ones(()), post, post, value=-_ALPHA).clamp_(min=0)  # below 0 only by rounding
    return rest.sqrt().mul_(rest)


_BY_NAME: dict[str, Function] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "isru": isru,
    "leaky_relu": F.leaky_relu,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}

IN_PLACE: dict[Function, Function] = {
    torch.relu: torch.relu_,
    torch.tanh: torch.tanh_,
    torch.sigmoid: torch.sigmoid_,
    F.elu: partial(F.elu, inplace=True),
    isru: _isru_,
}

_SLOPES: dict[Function, Callable[[Tensor, Tensor], Tensor]] = {
    torch.relu: lambda pre, post: torch.sign(post),
    torch.tanh: lambda pre, post: 1 - post * post,
    torch.sigmoid: lambda pre, post: post * (1 - post),
    F.elu: lambda pre, post: torch.where(post > 0, 1.0, post + 1),
    F.silu: lambda pre, post: torch.sigmoid(pre) * (1 + pre - post),
    isru: _isru_slope,
}

_PULLS: dict[Function, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    torch.relu: lambda grad, pre, post: torch.ops.aten.threshold_backward.default(grad, post, 0),
    torch.tanh: lambda grad, pre, post: torch.ops.aten.tanh_backward.default(grad, post),
    torch.sigmoid: lambda grad, pre, post: torch.ops.aten.sigmoid_backward.default(grad, post),
    F.silu: lambda grad, pre, post: torch.ops.aten.silu_backward.default(grad, pre),
}


def activation_functions(activation: Activation, layers: int) -> tuple[Function, ...]:
    """The elementwise functions after so many hidden layers; the last one given stands for all that follow."""
    given = list(activation) if isinstance(activation, list | tuple) else [activation]
    if not given:
        raise ValueError("expected at least one activation, got an empty sequence")
    found = [_function(each) for each in given]
    return tuple((found + found[-1:] * layers)[:layers])


def _function(activation: str | Function) -> Function:
    if isinstance(activation, str):
        if activation not in _BY_NAME:
            raise ValueError(f"expected activation to be one of {sorted(_BY_NAME)} or a function, got {activation!r}")
        return _BY_NAME[activation]
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        raise ValueError("expected an activation without parameters: the networks here treat it as a fixed function")
    if not callable(activation):
        raise TypeError(f"expected activation to be a name or a function, got {type(activation).__name__}")
    return activation


def known_activations() -> frozenset[Function]:
    """The functions that have a name here."""
    return frozenset(_BY_NAME.values())


def slope(activation: Function, pre: Tensor, post: Tensor) -> Tensor:
    """The derivative at ``pre``, where the value is ``post``; for what is in ``IN_PLACE``, ``pre`` is not looked at."""
    known = _SLOPES.get(activation)
    if known is not None:
        return known(pre, post)
    return torch.func.vjp(activation, pre)[1](torch.ones_like(pre))[0]


def pull(activation: Function, grad: Tensor, pre: Tensor, post: Tensor) -> Tensor:
    """The gradient after ``pre``, given that after ``post``; ``grad`` may be overwritten."""
    known = _PULLS.get(activation)
    return grad.mul_(slope(activation, pre, post)) if known is None else known(grad, pre, post)
