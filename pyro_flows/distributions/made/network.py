"""The weights that all members of a MADE share: one pass under a member's masks, and draws by one sweep."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flows.activations import Activation, activation_functions
from pyro_flows.bands import Cut
from pyro_flows.distributions.made.contract import Head
from pyro_flows.distributions.made.members import Member
from pyro_flows.distributions.made.sampling import Sampler
from pyro_flows.masked import Layout, masked_network
from pyro_flows.tracing import lasting

__all__ = ["SharedNetwork"]

WHOLE = Cut((), math.inf)
KEPT_BYTES = 2**26  # of masks that are kept for the next time


def _seen(weight: Tensor, bits: Tensor) -> Tensor:
    """Sums over the inputs that each row sees."""
    return torch.where(bits != 0, weight, 0.0).sum(1)


class SharedNetwork(nn.Module):
    """Weights by dimension and number of the unit, of which each member of a MADE uses its own share.

    Args:
        head: the head, bound to the dimensions.
        hidden_dims: widths of the hidden layers.
        context_dim: size of the context, 0 for none; every unit and output may see it.
        direct: whether outputs also see the inputs before them without detour.
        activation: a name or an elementwise function, or one for each hidden layer.
        mask_inputs: whether units and outputs that see inputs are also told which ones, by weights of inputs that are
            constantly 1.
    """

    def __init__(
        self,
        head: Head,
        hidden_dims: Sequence[int],
        context_dim: int,
        direct: bool,
        activation: Activation,
        mask_inputs: bool,
    ) -> None:
        super().__init__()
        self.head = head
        self.hidden_dims, self.is_direct = tuple(hidden_dims), direct and bool(hidden_dims)
        inputs, outputs = head.input_dim * head.num_features, head.input_dim * head.num_params
        sizes = (inputs, *self.hidden_dims, outputs)
        self.layout = Layout(
            activation_functions(activation, len(self.hidden_dims)), frozenset(), (WHOLE,) * (len(sizes) - 1), None
        )
        for k, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            last = k == len(sizes) - 2
            # Measured: of discrete values smaller weights to start from generalise better, of real ones larger ones.
            bound = 0.0 if last else math.sqrt((1.0 if head.discrete else 6.0) / max(fan_in, 1))
            self.register_parameter(f"weight_{k}", nn.Parameter((2 * torch.rand(fan_out, fan_in) - 1) * bound))
            bias = head.bias().T.reshape(-1) if last else torch.zeros(fan_out)
            self.register_parameter(f"bias_{k}", nn.Parameter(bias.to(torch.get_default_dtype()).clone()))
        self.register_parameter("direct", nn.Parameter(torch.zeros(outputs, inputs)) if self.is_direct else None)
        self.register_parameter("mask_weight", nn.Parameter(torch.zeros(sizes[1], inputs)) if mask_inputs else None)
        told = mask_inputs and self.is_direct
        self.register_parameter("mask_direct", nn.Parameter(torch.zeros(outputs, inputs)) if told else None)
        if context_dim:
            weight = (2 * torch.rand(sizes[1], context_dim) - 1) / math.sqrt(context_dim)
            self.context_weight = nn.Parameter(weight if self.hidden_dims else torch.zeros_like(weight))
        self._bits: OrderedDict[object, tuple[Member, list[Tensor]]] = OrderedDict()
        self._idle: list[Sampler] = []

    def _weights(self) -> tuple[list[Tensor], list[Tensor]]:
        layers = range(len(self.hidden_dims) + 1)
        return [getattr(self, f"weight_{k}") for k in layers], [getattr(self, f"bias_{k}") for k in layers]

    def output_bias(self) -> Tensor:
        """Shape ``(num_params * D,)``, parameter by parameter."""
        return getattr(self, f"bias_{len(self.hidden_dims)}")

    def _first_bias(self, context: Tensor | None, bits: Sequence[Tensor]) -> Tensor:
        bias = self.bias_0 if self.mask_weight is None else self.bias_0 + _seen(self.mask_weight, bits[0])
        return bias if context is None else F.linear(context, self.context_weight, bias)

    def bits(self, member: Member) -> list[Tensor]:
        """The member's masks as integers of the weights' size, all bits set where a weight counts."""
        weight = self.weight_0
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
        key = (id(member), kind, weight.device)
        held = self._bits.pop(key, None)
        if held is None or held[0] is not member:
            with lasting():
                made = [-mask.to(kind) for mask in (mask.to(weight.device) for mask in member.masks())]
            held = (member, made)
        self._bits[key] = held  # the latest last
        size = sum(b.nbytes for b in held[1])
        while len(self._bits) > 1 and len(self._bits) * size > KEPT_BYTES:
            self._bits.popitem(last=False)
        return held[1]

    def forward(self, features: Tensor, context: Tensor | None, member: Member) -> Tensor:
        """Parameters of all conditionals, shape ``(*batch, D, num_params)``; one pass.

        Args:
            features: shape ``(*batch, D, num_features)``.
            context: shape ``(*context_batch, context_dim)`` that broadcasts to the batch, or ``None``.
            member: whose masks to use.
        """
        weights, biases = self._weights()
        bits = self.bits(member)
        x = features.flatten(-2)
        out = masked_network(self.layout, x, self._first_bias(context, bits), weights, biases[1:], bits[: len(weights)])
        if self.is_direct:
            plain = Layout((), frozenset(), (WHOLE,), None)
            none = self.direct.new_zeros(self.direct.shape[0])
            bias = none if self.mask_direct is None else _seen(self.mask_direct, bits[-1])
            out = out + masked_network(plain, x, bias, [self.direct], [], bits[-1:])
        return out.unflatten(-1, (self.head.num_params, self.head.input_dim)).transpose(-1, -2)

    @torch.no_grad()
    def draw(
        self, head: Head, rows: int, context: Tensor | None, member: Member, given: Tensor | None = None, known: int = 0
    ) -> Tensor:
        """Draws by one sweep through the dimensions, in which each weight is used once; shape ``(rows, D)``.

        Args:
            head: says what the outputs mean; that of a relaxed model is another one than the network was made for.
            rows: how many.
            context: shape ``(rows, context_dim)`` or ``(1, context_dim)``, or ``None``.
            member: whose order and masks to use.
            given: shape ``(rows, D)``, of which the ``known`` first dimensions in the order are taken as they are.
            known: how many are given.
        """
        weights, biases = self._weights()
        if self.is_direct:
            weights.append(self.direct)
        # Taken out while it is used, so that no two threads share its buffers.
        try:
            sampler = self._idle.pop()
        except IndexError:
            sampler = None
        if sampler is None or not sampler.fits(head, member, known, self.weight_0):
            sampler = Sampler(head, self.layout.activations, member, known, weights, biases)
        bits = self.bits(member)
        if self.mask_direct is not None:
            biases[-1] = biases[-1] + _seen(self.mask_direct, bits[-1])
        sampler.load(weights, biases, bits)
        drawn = sampler.run(rows, self._first_bias(context, bits), given)
        self._idle = [sampler]
        return drawn

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bits": OrderedDict(), "_idle": []}
