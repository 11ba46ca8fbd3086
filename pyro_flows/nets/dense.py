"""Dense conditioners.

Every network maps ``(x, context)`` to ``num_params`` numbers per output dimension, shape ``(*batch, output_dim,
num_params)``, and starts at zero unless asked otherwise, so that a fresh flow is the identity.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flows.nets.activations import Activation, activation_functions

__all__ = ["MLP"]


def _widths(hidden_dims: Sequence[int], residual: bool) -> tuple[int, ...]:
    widths = tuple(hidden_dims)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in widths):
        raise ValueError(f"expected hidden_dims to be positive integers, got {hidden_dims!r}")
    if not residual:
        return widths
    if not widths or len(set(widths)) > 1:
        raise ValueError(f"a residual network needs one or more hidden_dims, all equal, got {hidden_dims!r}")
    return (widths[0], *(w for width in widths for w in (width, width)))


def _positive(name: str, value: int, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"expected {name} to be an integer >= {least}, got {value!r}")
    return value


def _first_gain(inputs: float) -> float:
    """Of the first layer's weights over the bound 1 / sqrt(inputs), where units see so many inputs on average.

    Activations should bend where the data are.  With few inputs that takes larger weights than usual; with many, the
    detail that these bring is noise, and what a flow would learn first.
    """
    return min(max(4.5 / math.sqrt(max(inputs, 1.0)), 1.0), 3.0)


def _run(layers: nn.ModuleList, pre: Tensor, acts: Sequence[Callable[[Tensor], Tensor]], residual: bool) -> Tensor:
    """From the first layer's pre-activation to the last layer's output."""
    last = len(layers) - 1
    stream = pre
    for k in range(1, last + 1):
        pre = layers[k](acts[k - 1](pre))
        if residual and k % 2 == 0 and k < last:  # the second layer of a block
            stream = pre = pre + stream
    return pre


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


class MLP(nn.Module):
    """A dense conditioner: ``num_params`` numbers per output dimension from ``x`` and a context.

    Args:
        input_dim: size of ``x``; 0 where the output depends on the context alone, or is a learnt constant.
        output_dim: number of output dimensions.
        num_params: parameters per output dimension.
        hidden_dims: widths of the hidden layers; with ``residual`` one two-layer block for each entry, all equal.
        context_dim: size of the context, 0 for none.
        residual: whether to use residual blocks.
        activation: a name or an elementwise function without parameters, or one for each hidden layer, of which the
            last stands for all that follow.
        zero_init: whether the last layer starts at zero.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        *,
        num_params: int = 1,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        residual: bool = False,
        activation: Activation = "silu",
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        self.input_dim = _positive("input_dim", input_dim, least=0)
        self.output_dim = _positive("output_dim", output_dim)
        self.num_params = _positive("num_params", num_params)
        self.context_dim = _positive("context_dim", context_dim, least=0)
        self.residual = residual
        widths = _widths(hidden_dims, residual)
        self.activations = activation_functions(activation, len(widths))
        self.joins = frozenset(range(2, len(widths), 2) if residual else ())
        outputs = output_dim * num_params
        fan_in = input_dim + context_dim
        if fan_in == 0:  # nothing to look at: a learnt constant
            self.constant = nn.Parameter(torch.zeros(outputs))
            return
        sizes = (fan_in, *widths, outputs)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
        if len(self.layers) > 1:
            with torch.no_grad():
                self.layers[0].weight.mul_(_first_gain(fan_in))
        if zero_init:
            nn.init.zeros_(self.layers[-1].weight)
            nn.init.zeros_(self.layers[-1].bias)

    def tensors(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """Weights and biases of the layers, if they are all that :meth:`forward` depends on, and it has an input.

        ``None`` if there are hooks, or a layer was reparameterised or replaced: these have a say in a call only.
        """
        if self.input_dim == 0 or _hooked(self):
            return None
        weights, biases = [], []
        for layer in self._modules["layers"]._modules.values():
            if type(layer) is not nn.Linear or _hooked(layer):
                return None
            weights.append(layer._parameters["weight"])
            biases.append(layer._parameters["bias"])
        return weights, biases

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``x``: shape ``(*batch, input_dim)``; ``context``: broadcasts to ``(*batch, context_dim)``.

        Returns shape ``(*batch, output_dim, num_params)``.
        """
        if self.input_dim + self.context_dim == 0:
            flat = self.constant.expand(*x.shape[:-1], -1)
        else:
            first = self.layers[0]
            if context is None:
                pre = first(x)
            elif self.input_dim == 0:
                pre = first(context).expand(*x.shape[:-1], -1)
            else:
                # The context's share is computed once per context, not once per sample.
                weight = first.weight
                pre = F.linear(x, weight[:, : self.input_dim], first.bias) + F.linear(
                    context, weight[:, self.input_dim :]
                )
            flat = _run(self.layers, pre, self.activations, self.residual)
        # Parameter by parameter in memory: each is contiguous for the elementwise map that follows.
        return flat.unflatten(-1, (self.num_params, self.output_dim)).transpose(-1, -2)
