"""The dense conditioner."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from pyro_flows.core.checks import integer, layer_widths
from pyro_flows.nets.activations import Activation, activation_functions

__all__ = ["MLP"]


def _widths(hidden_dims: Sequence[int], residual: bool) -> tuple[int, ...]:
    widths = layer_widths("", "hidden_dims", hidden_dims)
    if not residual:
        return widths
    if not widths or len(set(widths)) > 1:
        raise ValueError(f"a residual network needs one or more hidden_dims, all equal, got {hidden_dims!r}")
    return (widths[0], *(w for width in widths for w in (width, width)))


def _first_gain(inputs: float) -> float:
    """Factor on the usual bound 1 / sqrt(inputs) of the first layer's weights.

    With few inputs, larger weights make activations bend where the data are.  With many, a flow would first learn noise
    in the detail that such weights add.
    """
    return min(max(4.5 / math.sqrt(max(inputs, 1.0)), 1.0), 3.0)


def _outputs(layer: nn.Module, columns: Tensor) -> Tensor:
    """Applies a layer to samples that are columns."""
    if type(layer) is nn.Linear and not (
        layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks
    ):
        held: Mapping[str, Any] = layer._parameters
        return torch.addmm(held["bias"].unsqueeze(1), held["weight"], columns)
    return layer(columns.t()).t()  # reparameterized, replaced, or with hooks


class MLP(nn.Module):
    """A dense conditioner: ``num_params`` numbers per output dimension from ``x`` and a context.

    Args:
        input_dim: size of ``x``; 0 if the output depends on the context alone or is a learned constant.
        output_dim: number of output dimensions.
        num_params: parameters per output dimension.
        hidden_dims: widths of the hidden layers; with ``residual``, equal widths of the two-layer blocks.
        context_dim: size of the context, 0 for none.
        residual: whether to use residual blocks.
        activation: a name or an elementwise function without parameters, or one per hidden layer; the last one serves
            all later layers.
        zero_init: whether the last layer starts at zero, so that a fresh flow is the identity.

    Example:
        >>> net = pf.nets.MLP(3, 4, num_params=2, context_dim=1)
        >>> net(torch.randn(5, 3), torch.randn(5, 1)).shape
        torch.Size([5, 4, 2])
    """

    layers: Sequence[nn.Linear]

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
        self.input_dim = integer("", "input_dim", input_dim, least=0)
        self.output_dim = integer("", "output_dim", output_dim)
        self.num_params = integer("", "num_params", num_params)
        self.context_dim = integer("", "context_dim", context_dim, least=0)
        self.residual = residual
        widths = _widths(hidden_dims, residual)
        self.activations = activation_functions(activation, len(widths))
        self.joins = frozenset(range(2, len(widths), 2) if residual else ())
        outputs = output_dim * num_params
        fan_in = input_dim + context_dim
        if fan_in == 0:
            self.constant = nn.Parameter(torch.zeros(outputs))
            return
        sizes = (fan_in, *widths, outputs)
        self.add_module("layers", nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes)))
        if len(self.layers) > 1:
            with torch.no_grad():
                self.layers[0].weight.mul_(_first_gain(fan_in))
        if zero_init:
            nn.init.zeros_(self.layers[-1].weight)
            nn.init.zeros_(self.layers[-1].bias)

    def output_parameters(self) -> list[Tensor]:
        """The weight and the bias of the last layer."""
        if self.input_dim + self.context_dim == 0:
            return [self.constant]
        last = list(self.layers)[-1]
        return [last.weight, last.bias]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``x``: shape ``(*batch, input_dim)``; ``context``: broadcasts to ``(*batch, context_dim)``.

        Returns shape ``(*batch, output_dim, num_params)``.
        """
        batch = x.shape[:-1]
        if self.input_dim + self.context_dim == 0:
            flat = self.constant.unsqueeze(1).expand(-1, batch.numel())
        else:
            # With samples as columns, small products are faster and each parameter is contiguous for the univariate.
            columns = (x if len(batch) == 1 else x.reshape(batch.numel(), self.input_dim)).t()
            first, *layers = self.layers
            flat = stream = _outputs(first, columns) if context is None else self._first(columns, context, batch)
            for k, layer in enumerate(layers, 1):
                flat = _outputs(layer, self.activations[k - 1](flat))
                if k in self.joins:
                    stream = flat = flat + stream
        out = flat.view(self.num_params, self.output_dim, flat.shape[1]).permute(2, 1, 0)
        return out if len(batch) == 1 else torch.unflatten(out, 0, batch) if batch else out[0]

    def _first(self, columns: Tensor, context: Tensor, batch: Size) -> Tensor:
        """Applies the first layer; the context's share is computed once per context."""
        first = self.layers[0]
        weight, bias = first.weight, first.bias
        share = F.linear(context, weight[:, self.input_dim :], bias)
        if share.shape[:-1].numel() == 1:
            share = share.view(1, len(bias))
        elif share.shape[:-1] != batch or len(batch) > 1:
            share = share.expand(*batch, len(bias)).reshape(batch.numel(), len(bias))
        return torch.addmm(share.t(), weight[:, : self.input_dim], columns)
