"""Networks that make the parameters of a flow: MADE's masked network and dense conditioners.

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

from pyro_flows.activations import Activation, activation_functions
from pyro_flows.degrees import Degrees, Structure
from pyro_flows.heads import Head, Slabs
from pyro_flows.masked import Layout, masked_network

__all__ = ["MLP", "MaskedMLP"]


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


_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
        activation: a name or an elementwise function without parameters, or one for each hidden layer, of which the
            last stands for all that follow.
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
        degrees = Degrees(input_dim, _widths(hidden_dims, residual), context_dim > 0, order, adjacency)
        self.activations = activation_functions(activation, len(degrees.times))
        self.degrees = degrees
        # order[k]: which input comes k-th.  A drawn order defines the map, so it is saved; a given one is not.
        self.register_buffer("order", degrees.order, persistent=isinstance(order, str) and order == "random")
        self.register_buffer("rank", torch.argsort(degrees.order), persistent=False)
        joins = range(2, len(degrees.times), 2) if residual else ()
        cuts = degrees.cuts(num_params)
        self.structure = Structure(degrees.steps, degrees.times, num_params, joins, degrees.dense, cuts)
        slabs = Slabs(degrees.steps, degrees.times[-1], num_params) if degrees.times else None
        self.layout = Layout(self.activations, self.structure.joins, cuts, slabs)
        masks = degrees.masks()
        masks[-1] = masks[-1].repeat(num_params, 1)  # parameter by parameter, as in MLP
        for k, mask in enumerate(masks):
            self._add_layer(k, mask, zero=zero_init and k == len(masks) - 1, first=k == 0 and len(masks) > 1)
        self._names = tuple([f"{what}_{k}" for k in range(len(masks))] for what in ("weight", "bias", "bits"))
        if context_dim:
            weight = (2 * torch.rand(masks[0].shape[0], context_dim) - 1) / math.sqrt(context_dim)
            weight = weight * _first_gain(context_dim) if len(masks) > 1 else weight
            self.context_weight = nn.Parameter(torch.zeros_like(weight) if zero_init and len(masks) == 1 else weight)

    def _add_layer(self, k: int, mask: Tensor, zero: bool, first: bool) -> None:
        # Bounds go by the number of inputs that each unit really sees.
        bound = mask.sum(1, keepdim=True).clamp(min=1).rsqrt()
        weight = (2 * torch.rand(mask.shape) - 1) * bound * mask
        bias = (2 * torch.rand(mask.shape[0]) - 1) * bound[:, 0]
        if first:
            weight = weight * _first_gain(mask.sum(1).double().mean().item())
        self.register_parameter(f"weight_{k}", nn.Parameter(torch.zeros_like(weight) if zero else weight))
        self.register_parameter(f"bias_{k}", nn.Parameter(torch.zeros_like(bias) if zero else bias))
        # The mask as integers of the weight's size, all bits set where the weight counts.
        self.register_buffer(f"bits_{k}", -mask.to(_INTEGER[weight.element_size()]), persistent=False)

    def tensors(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Weights, biases and masks of the layers; masks are integers, with all bits set where the weight counts."""
        parameters, buffers = self._parameters, self._buffers
        weights, biases, masks = self._names
        try:
            return [parameters[n] for n in weights], [parameters[n] for n in biases], [buffers[n] for n in masks]
        except KeyError:  # some weight is reparameterised, and computed by its attribute
            return [getattr(self, n) for n in weights], [getattr(self, n) for n in biases], [buffers[n] for n in masks]

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
        return self.bias_0 if context is None else F.linear(context, self.context_weight, self.bias_0)

    def ranked(
        self, x: Tensor, context: Tensor | None = None, head: Head | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As :meth:`forward`, with inputs and outputs by rank; with a head, what that makes of them, and its ladj."""
        weights, (bias, *biases), masks = self.tensors()
        if context is not None:
            bias = F.linear(context, self.context_weight, bias)
        out = masked_network(self.layout, x, bias, weights, biases, masks, head)
        if head is not None:
            return out
        return out.unflatten(-1, (self.num_params, self.input_dim)).transpose(-1, -2)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``x``: shape ``(*batch, input_dim)``; ``context``: broadcasts to ``(*batch, context_dim)``.

        Returns shape ``(*batch, input_dim, num_params)``; one pass.
        """
        params = self.ranked(self.to_ranks(x), context)
        if self.degrees.kind == "identity":
            return params
        return params.flip(-2) if self.degrees.kind == "reverse" else params.index_select(-2, self.rank)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedMLP:
        super()._apply(fn, recurse)
        for k, weight in enumerate(self.tensors()[0]):
            name = f"bits_{k}"
            self._buffers[name] = self._buffers[name].to(_INTEGER[weight.element_size()])
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        with torch.no_grad():
            self.rank.copy_(torch.argsort(self.order))

    def extra_repr(self) -> str:
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"{self.input_dim}, num_params={self.num_params}{context}, order={self.degrees.kind}"
