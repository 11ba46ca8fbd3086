"""Networks that make the parameters of a flow: MADE's masked network and dense conditioners.

Every network maps ``(x, context)`` to ``num_params`` numbers per output dimension, shape ``(*batch, output_dim,
num_params)``, and starts at zero unless asked otherwise, so that a fresh flow is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flows.degrees import Degrees

__all__ = ["MLP", "MaskedLinear", "MaskedMLP", "activation_function"]

Activation = str | Callable[[Tensor], Tensor]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}


def activation_function(activation: Activation) -> Callable[[Tensor], Tensor]:
    """The elementwise function of this name, or the given function itself."""
    if isinstance(activation, str):
        if activation not in _ACTIVATIONS:
            raise ValueError(f"expected activation to be one of {sorted(_ACTIVATIONS)} or a function, got {activation!r}")
        return _ACTIVATIONS[activation]
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        raise ValueError("expected an activation without parameters: the networks here treat it as a fixed function")
    if not callable(activation):
        raise TypeError(f"expected activation to be a name or a function, got {type(activation).__name__}")
    return activation


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


class MaskedLinear(nn.Module):
    """A linear layer whose weight counts only where ``mask`` is true: what is written elsewhere changes nothing.

    Args:
        mask: boolean, shape ``(out_features, in_features)``; a row per output.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)
        # The bound of nn.Linear, with the number of inputs that each unit really sees.
        bound = mask.sum(1, keepdim=True).clamp(min=1).rsqrt()
        weight = (2 * torch.rand(mask.shape) - 1) * bound
        self.weight = nn.Parameter(weight * mask)
        self.bias = nn.Parameter((2 * torch.rand(mask.shape[0]) - 1) * bound[:, 0])

    def masked_weight(self) -> Tensor:
        """The weight with zeros in all masked places, whatever is stored there."""
        return torch.where(self.mask, self.weight, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.masked_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, free={int(self.mask.sum())}"


def _run(layers: nn.ModuleList, pre: Tensor, act: Callable[[Tensor], Tensor], residual: bool) -> Tensor:
    """From the first layer's pre-activation to the last layer's output."""
    last = len(layers) - 1
    stream = pre
    for k in range(1, last + 1):
        pre = layers[k](act(pre))
        if residual and k % 2 == 0 and k < last:  # the second layer of a block
            stream = pre = pre + stream
    return pre


class MLP(nn.Module):
    """A dense conditioner: ``num_params`` numbers per output dimension from ``x`` and a context.

    Args:
        input_dim: size of ``x``; 0 where the output depends on the context alone, or is a learnt constant.
        output_dim: number of output dimensions.
        num_params: parameters per output dimension.
        hidden_dims: widths of the hidden layers; with ``residual`` one two-layer block for each entry, all equal.
        context_dim: size of the context, 0 for none.
        residual: whether to use residual blocks.
        activation: a name or an elementwise function without parameters.
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
        self.activation = activation_function(activation)
        outputs = output_dim * num_params
        fan_in = input_dim + context_dim
        if fan_in == 0:  # nothing to look at: a learnt constant
            self.constant = nn.Parameter(torch.zeros(outputs))
            return
        sizes = (fan_in, *_widths(hidden_dims, residual), outputs)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes, sizes[1:], strict=False))
        if zero_init:
            nn.init.zeros_(self.layers[-1].weight)
            nn.init.zeros_(self.layers[-1].bias)

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
                pre = F.linear(x, weight[:, : self.input_dim], first.bias) + F.linear(context, weight[:, self.input_dim :])
            flat = _run(self.layers, pre, self.activation, self.residual)
        # Parameter by parameter in memory: each is contiguous for the elementwise map that follows.
        return flat.unflatten(-1, (self.num_params, self.output_dim)).transpose(-1, -2)


class MaskedMLP(nn.Module):
    r"""MADE's network: output :math:`i` depends only on the inputs that come before :math:`i`.

    Hidden unit :math:`k` of degree :math:`d_k` sees the inputs of rank below :math:`d_k`; a connection exists where
    degrees do not decrease, and to output :math:`i` from units of degree at most its rank.  Units are stored sorted by
    degree, inputs and outputs by rank, so every weight matrix is block lower triangular.  With a context there are
    also units of degree 0, which see the context alone.  In place of an order, ``adjacency`` says for each output
    which inputs it may see; a unit then has a set of inputs in place of a degree.

    Args:
        input_dim: number of inputs, and of output dimensions.
        num_params: parameters per output dimension.
        hidden_dims: widths of the hidden layers, any number of any widths, also below ``input_dim``; with ``residual``
            one two-layer block for each entry, all equal.
        context_dim: size of the context, 0 for none; every output may see all of it.
        order: ``"identity"``, ``"reverse"``, ``"random"`` (drawn once, saved in the ``state_dict``), or the inputs in
            the sequence in which they come.
        adjacency: boolean, shape ``(input_dim, input_dim)``; true at ``[i, j]`` where output ``i`` may see input ``j``.
        residual: whether to use residual blocks.
        activation: a name or an elementwise function without parameters.
        zero_init: whether the last layer starts at zero.

    Raises:
        ValueError: for an ``order`` that is no permutation, an ``adjacency`` with a cycle, or sizes out of range.

    References:
        MADE: Masked Autoencoder for Distribution Estimation (Germain et al., 2015), arXiv:1502.03509.
    """

    def __init__(
        self,
        input_dim: int,
        *,
        num_params: int = 1,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        order: str | Sequence[int] | Tensor = "identity",
        adjacency: Tensor | None = None,
        residual: bool = False,
        activation: Activation = "silu",
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        self.input_dim = _positive("input_dim", input_dim)
        self.num_params = _positive("num_params", num_params)
        self.context_dim = _positive("context_dim", context_dim, least=0)
        self.residual = residual
        self.activation = activation_function(activation)
        degrees = Degrees(input_dim, _widths(hidden_dims, residual), context_dim > 0, order, adjacency)
        self.degrees = degrees
        # order[k]: which input comes k-th.  A drawn order defines the map, so it is saved; a given one is not.
        self.register_buffer("order", degrees.order, persistent=isinstance(order, str) and order == "random")
        self.register_buffer("rank", torch.argsort(degrees.order), persistent=False)
        masks = degrees.masks()
        masks[-1] = masks[-1].repeat(num_params, 1)  # parameter by parameter, as in MLP
        self.layers = nn.ModuleList(MaskedLinear(mask) for mask in masks)
        if context_dim:
            width = masks[0].shape[0]
            self.context_weight = nn.Parameter((2 * torch.rand(width, context_dim) - 1) / math.sqrt(context_dim))
        if zero_init:
            nn.init.zeros_(self.layers[-1].weight)
            nn.init.zeros_(self.layers[-1].bias)
            if context_dim and len(masks) == 1:
                nn.init.zeros_(self.context_weight)

    def to_ranks(self, x: Tensor) -> Tensor:
        """The last axis of ``x`` in autoregressive order: rank 0 first."""
        if self.degrees.kind == "identity":
            return x
        return x.flip(-1) if self.degrees.kind == "reverse" else x.index_select(-1, self.order)

    def from_ranks(self, x: Tensor) -> Tensor:
        """Undoes :meth:`to_ranks`."""
        if self.degrees.kind == "identity":
            return x
        return x.flip(-1) if self.degrees.kind == "reverse" else x.index_select(-1, self.rank)

    def first_bias(self, context: Tensor | None) -> Tensor:
        """What the first layer adds to its weighted inputs: shape ``(*context_batch, width)``, or ``(width,)``."""
        bias = self.layers[0].bias
        return bias if context is None else F.linear(context, self.context_weight, bias)

    def ranked(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """As :meth:`forward`, with inputs and outputs by rank."""
        first = self.layers[0]
        if context is None:
            pre = first(x)
        else:
            pre = F.linear(x, first.masked_weight()) + self.first_bias(context)
        flat = _run(self.layers, pre, self.activation, self.residual)
        return flat.unflatten(-1, (self.num_params, self.input_dim)).transpose(-1, -2)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``x``: shape ``(*batch, input_dim)``; ``context``: broadcasts to ``(*batch, context_dim)``.

        Returns shape ``(*batch, input_dim, num_params)``; one pass.
        """
        params = self.ranked(self.to_ranks(x), context)
        if self.degrees.kind == "identity":
            return params
        return params.flip(-2) if self.degrees.kind == "reverse" else params.index_select(-2, self.rank)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        with torch.no_grad():
            self.rank.copy_(torch.argsort(self.order))

    def extra_repr(self) -> str:
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"{self.input_dim}, num_params={self.num_params}{context}, order={self.degrees.kind}"
