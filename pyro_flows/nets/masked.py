"""MADE's masked network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flows.core.checks import integer
from pyro_flows.nets.activations import Activation, activation_functions
from pyro_flows.nets.degrees import Degrees
from pyro_flows.nets.dense import _first_gain, _widths
from pyro_flows.nets.masked_pass import MaskedLayers, masked_network
from pyro_flows.nets.structure import Structure
from pyro_flows.univariate.base import Univariate

__all__ = ["MaskedMLP"]


_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class MaskedMLP(nn.Module):
    r"""MADE's network: output :math:`i` depends only on the inputs that come before :math:`i`.

    Hidden unit :math:`k` of degree :math:`d_k` sees inputs of rank below :math:`d_k`.  Connections exist where degrees
    do not decrease, and to output :math:`i` from units of degree at most its rank.  Sorting units by degree, and inputs
    and outputs by rank, makes every weight matrix block lower triangular.  Units of degree 0 see a context alone.  With
    an ``adjacency`` in place of an order, each unit has a set of inputs in place of a degree.

    Args:
        input_dim: number of inputs and of output dimensions.
        num_params: parameters per output dimension.
        hidden_dims: any widths of the hidden layers, also below ``input_dim``; with ``residual``, equal widths of the
            two-layer blocks.
        context_dim: size of the context, 0 for none; every output may see all of it.
        order: ``"identity"``, ``"reverse"``, ``"random"`` (drawn once, saved in the ``state_dict``), or the inputs in
            their order.
        adjacency: boolean, shape ``(input_dim, input_dim)``; true at ``[i, j]`` where output ``i`` may see input ``j``.
        residual: whether to use residual blocks.
        activation: a name or an elementwise function without parameters, or one per hidden layer; the last one serves
            all later layers.
        zero_init: whether the last layer starts at zero.

    Raises:
        ValueError: for an ``order`` that is no permutation, an ``adjacency`` with a cycle, or sizes out of range.

    Example:
        >>> net = pf.nets.MaskedMLP(3, num_params=2, zero_init=False)
        >>> net(torch.randn(5, 3)).shape
        torch.Size([5, 3, 2])
        >>> one, other = net(torch.zeros(3)), net(torch.tensor([0.0, 1.0, 0.0]))
        >>> (one == other).all(-1).tolist()  # only output 2 sees input 1
        [True, True, False]

    References:
        MADE: Masked Autoencoder for Distribution Estimation (Germain et al., 2015), arXiv:1502.03509.
    """

    order: Tensor
    rank: Tensor
    bias_0: Tensor
    context_weight: Tensor

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
        self.input_dim = integer("", "input_dim", input_dim)
        self.num_params = integer("", "num_params", num_params)
        self.context_dim = integer("", "context_dim", context_dim, least=0)
        self.residual = residual
        degrees = Degrees(input_dim, _widths(hidden_dims, residual), context_dim > 0, order, adjacency)
        self.activations = activation_functions(activation, len(degrees.times))
        self.degrees = degrees
        # A drawn order defines the map and is saved, so that another may be loaded; a given one is not.
        drawn, natural = isinstance(order, str) and order == "random", torch.arange(input_dim)
        names = {"identity": natural, "reverse": natural.flip(0)}
        fits = (name for name, each in names.items() if not drawn and torch.equal(degrees.order, each))
        self.order_name = next(fits, "given")
        self.register_buffer("order", degrees.order, persistent=drawn)
        self.register_buffer("rank", torch.argsort(degrees.order), persistent=False)
        joins = range(2, len(degrees.times), 2) if residual else ()
        cuts = degrees.cuts(num_params)
        self.structure = Structure(degrees.steps, degrees.times, num_params, joins, degrees.dense, cuts)
        self.layers = MaskedLayers(self.activations, self.structure.joins, cuts)
        masks = degrees.masks()
        masks[-1] = masks[-1].repeat(num_params, 1)  # parameter by parameter, as in MLP
        for k, mask in enumerate(masks):
            # Bounds depend on the number of inputs that a unit sees.
            bound = mask.sum(1, keepdim=True).clamp(min=1).rsqrt()
            weight = (2 * torch.rand(mask.shape) - 1) * bound * mask
            bias = (2 * torch.rand(mask.shape[0]) - 1) * bound[:, 0]
            if k == 0 and len(masks) > 1:
                weight = weight * _first_gain(mask.sum(1).double().mean().item())
            if zero_init and k == len(masks) - 1:
                weight, bias = torch.zeros_like(weight), torch.zeros_like(bias)
            self.register_parameter(f"weight_{k}", nn.Parameter(weight))
            self.register_parameter(f"bias_{k}", nn.Parameter(bias))
            self.register_buffer(f"bits_{k}", -mask.to(_INTEGER[weight.element_size()]), persistent=False)
        self._names = tuple([f"{what}_{k}" for k in range(len(masks))] for what in ("weight", "bias", "bits"))
        if context_dim:
            weight = (2 * torch.rand(masks[0].shape[0], context_dim) - 1) / math.sqrt(context_dim)
            weight = weight * _first_gain(context_dim) if len(masks) > 1 else weight
            self.context_weight = nn.Parameter(torch.zeros_like(weight) if zero_init and len(masks) == 1 else weight)

    def tensors(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Weights, biases and masks; a mask has integers of the weight's size, all bits set where it counts."""
        parameters: Mapping[str, Any] = self._parameters
        buffers: Mapping[str, Any] = self._buffers
        weights, biases, masks = self._names
        try:
            found = [list(map(parameters.__getitem__, names)) for names in (weights, biases)]
        except KeyError:  # reparameterized
            found = [[getattr(self, name) for name in names] for names in (weights, biases)]
        return found[0], found[1], list(map(buffers.__getitem__, masks))

    def output_parameters(self) -> list[Tensor]:
        """The weight and the bias of the last layer."""
        weights, biases, _ = self.tensors()
        return [weights[-1], biases[-1]]

    def to_ranks(self, x: Tensor) -> Tensor:
        """Puts the last axis in autoregressive order."""
        return x if self.order_name == "identity" else self._permuted(x, "order")

    def from_ranks(self, x: Tensor) -> Tensor:
        """Undoes :meth:`to_ranks`."""
        return x if self.order_name == "identity" else self._permuted(x, "rank")

    def _permuted(self, x: Tensor, index: str, dim: int = -1) -> Tensor:
        return x.flip(dim) if self.order_name == "reverse" else x.index_select(dim, self.get_buffer(index))

    def first_bias(self, context: Tensor | None) -> Tensor:
        """The first layer's bias at a context: shape ``(*context_batch, width)`` or ``(width,)``."""
        return self.bias_0 if context is None else F.linear(context, self.context_weight, self.bias_0)

    def ranked(self, x: Tensor, context: Tensor | None, univariate: Univariate | None) -> tuple[Tensor, ...]:
        """Returns flat ``(params,)`` by rank, or with a univariate the moved ``x`` and the ladj."""
        weights, (bias, *biases), masks = self.tensors()
        first = bias if context is None else self.first_bias(context)
        return masked_network(self.layers, x, first, weights, biases, masks, univariate)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``x``: shape ``(*batch, input_dim)``; ``context``: broadcasts to ``(*batch, context_dim)``.

        Returns shape ``(*batch, input_dim, num_params)``; one pass.
        """
        (flat,) = self.ranked(self.to_ranks(x), context, None)
        params = torch.unflatten(flat, -1, (self.num_params, self.input_dim)).transpose(-1, -2)
        return params if self.order_name == "identity" else self._permuted(params, "rank", -2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedMLP:
        super()._apply(fn, recurse)
        for k, weight in enumerate(self.tensors()[0]):
            name = f"bits_{k}"
            self._buffers[name] = self.get_buffer(name).to(_INTEGER[weight.element_size()])
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        with torch.no_grad():
            self.rank.copy_(torch.argsort(self.order))

    def extra_repr(self) -> str:
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"{self.input_dim}, num_params={self.num_params}{context}, order={self.order_name}"
