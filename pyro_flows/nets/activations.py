"""The table of activations: values, slopes and curvatures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flows.core.checks import choice
from pyro_flows.univariate.base import one_plus_square

__all__ = [
    "KNOWN",
    "Activation",
    "KnownActivation",
    "activation_function",
    "activation_functions",
    "in_place",
    "isru",
    "known_activations",
    "pull",
    "slope",
    "softplus",
    "value_and_slope",
]

Function = Callable[[Tensor], Tensor]


Activation = str | Function | Sequence[str | Function]

_ALPHA = 0.2


def isru(x: Tensor) -> Tensor:
    r"""Inverse square root unit :math:`x / \sqrt{1 + \alpha x^2}` with :math:`\alpha = 1/5`.

    The function is bounded: after the first layer, it keeps a network's outputs bounded for any input.

    References:
        Improving Deep Learning by Inverse Square Root Linear Units (Carlile et al., 2017), arXiv:1710.09967.
    """
    return x * torch.rsqrt(1.0 + _ALPHA * (x * x))


def _isru_(x: Tensor) -> Tensor:
    return x.mul_(one_plus_square(_ALPHA, x).rsqrt_())


def _isru_slope(post: Tensor) -> Tensor:
    rest = one_plus_square(-_ALPHA, post).relu_()  # rounding may give less than 0
    return rest.sqrt().mul_(rest)


def _isru_pull(grad: Tensor, pre: Tensor, post: Tensor) -> Tensor:
    rest = one_plus_square(-_ALPHA, post).relu_()
    return grad.mul_(rest).mul_(rest.sqrt_())


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``, without the jump of the slope that torch's threshold of 20 makes in float64."""
    return F.softplus(x, threshold=40)


def _silu_and_slope(pre: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(pre)
    post = pre * gate
    return post, gate * (1 + pre - post)


class KnownActivation(NamedTuple):
    """An activation, its derivatives and faster forms.

    Attributes:
        name: the key in ``KNOWN``.
        value: the function.
        slope: the derivative from the value alone; a new tensor.
        in_place: the function, overwriting its argument; requires ``slope``.
        both: value and derivative from the argument, where that is cheaper.
        pull: the argument's gradient, in place of the value's; from that, argument and value, in one kernel.
        curvature: the slope's derivative over the slope, from the value; ``None`` if zero or unknown.
        steepest: the largest slope, if the function suits a monotone map.
    """

    name: str
    value: Function
    slope: Function | None = None
    in_place: Function | None = None
    both: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    pull: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    curvature: Function | None = None
    steepest: float | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return _known, (self.name,)


def _known(name: str) -> KnownActivation:
    return KNOWN[name]


_LEAK = 0.01
_aten = torch.ops.aten

KNOWN = {
    each.name: each
    for each in (
        KnownActivation(
            "elu",
            F.elu,
            lambda post: post.clamp_max(0).add_(1),
            partial(F.elu, inplace=True),
            curvature=lambda post: torch.lt(post, 0, out=torch.empty_like(post)),
            steepest=1.0,
        ),
        KnownActivation("gelu", F.gelu),
        KnownActivation("isru", isru, _isru_slope, _isru_, pull=_isru_pull),
        KnownActivation(
            "leaky_relu",
            F.leaky_relu,
            lambda post: (post > 0).to(post.dtype) * (1 - _LEAK) + _LEAK,
            partial(F.leaky_relu, inplace=True),
            steepest=1.0,
        ),
        KnownActivation(
            "relu",
            torch.relu,
            torch.sign,
            torch.relu_,
            pull=lambda grad, pre, post: _aten.threshold_backward.grad_input(grad, post, 0, grad_input=grad),
        ),
        KnownActivation(
            "sigmoid",
            torch.sigmoid,
            lambda post: post * (1 - post),
            torch.sigmoid_,
            pull=lambda grad, pre, post: _aten.sigmoid_backward.grad_input(grad, post, grad_input=grad),
            curvature=lambda post: 1 - 2 * post,
            steepest=0.25,
        ),
        KnownActivation(
            "silu",
            F.silu,
            both=_silu_and_slope,
            pull=lambda grad, pre, post: _aten.silu_backward.grad_input(grad, pre, grad_input=grad),
        ),
        KnownActivation(
            "softplus",
            softplus,
            lambda post: -torch.expm1(-post),
            both=lambda pre: (softplus(pre), torch.sigmoid(pre)),
            curvature=lambda post: torch.exp(-post),
            steepest=1.0,
        ),
        KnownActivation(
            "tanh",
            torch.tanh,
            lambda post: 1 - post * post,
            torch.tanh_,
            pull=lambda grad, pre, post: _aten.tanh_backward.grad_input(grad, post, grad_input=grad),
            curvature=lambda post: -2 * post,
            steepest=1.0,
        ),
    )
}

_BY_FUNCTION = {known.value: known for known in KNOWN.values()}


def in_place(activation: Function) -> Function | None:
    """The function that overwrites its argument, if the value alone gives its slope; else ``None``."""
    return _BY_FUNCTION[activation].in_place if activation in _BY_FUNCTION else None


def activation_functions(activation: Activation, layers: int) -> tuple[Function, ...]:
    """The activation of each hidden layer; the last one given serves all later layers."""
    if isinstance(activation, str) or not isinstance(activation, Sequence):
        activation = [activation]
    if not activation:
        raise ValueError("expected at least one activation, got an empty sequence")
    found = [activation_function(each) for each in activation]
    return tuple((found + found[-1:] * layers)[:layers])


def activation_function(activation: str | Function) -> Function:
    """The function with this name, or the function itself."""
    if isinstance(activation, str):
        return KNOWN[choice("", "activation", activation, KNOWN, "a function")].value
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        raise ValueError("expected an activation without parameters: the networks here treat it as a fixed function")
    if isinstance(activation, type) or not callable(activation):
        got = f"the class {activation.__name__}" if isinstance(activation, type) else type(activation).__name__
        raise TypeError(f"expected activation to be a name or a function, e.g. torch.sin, got {got}")
    return activation


def known_activations() -> frozenset[Function]:
    """All functions in the table."""
    return frozenset(_BY_FUNCTION)


def slope(activation: Function, pre: Tensor, post: Tensor) -> Tensor:
    """The derivative at ``pre``, with value ``post``; ``pre`` is not read if :func:`in_place` is known."""
    known = _BY_FUNCTION.get(activation)
    if known is not None and known.slope is not None:
        return known.slope(post)
    if known is not None and known.both is not None:
        return known.both(pre)[1]
    return torch.func.vjp(activation, pre)[1](torch.ones_like(pre))[0]


def value_and_slope(activation: Function, pre: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative at ``pre``."""
    known = _BY_FUNCTION.get(activation)
    if known is not None and known.both is not None:
        return known.both(pre)
    post = activation(pre)
    return post, slope(activation, pre, post)


def pull(activation: Function, grad: Tensor, pre: Tensor, post: Tensor) -> Tensor:
    """The gradient for ``pre`` from ``grad``, the gradient for ``post``, which may be overwritten.

    ``pre`` is not read if :func:`in_place` is known.
    """
    known = _BY_FUNCTION.get(activation)
    if known is not None and known.pull is not None:
        return known.pull(grad, pre, post)
    return grad.mul_(slope(activation, pre, post))
