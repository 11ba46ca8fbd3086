"""The network that all members of a MADE share."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flows.core.modes import lasting, on_cpu
from pyro_flows.distributions.made.head import Calls, Head
from pyro_flows.inverse.buffers import ForwardSweep, Solver, columns_at_once
from pyro_flows.nets.activations import Activation, activation_functions
from pyro_flows.nets.degrees import Degrees, visible
from pyro_flows.nets.masked_pass import MaskedLayers, masked_network
from pyro_flows.nets.structure import Cut, Structure, keep

__all__ = ["Member", "Recent", "SharedNetwork"]

WHOLE = Cut()
KEPT = 2**24  # numbers of cached masks


class Recent(OrderedDict[object, Any]):
    """Results by key, the latest last; a copy is empty."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __reduce__(self) -> tuple[object, ...]:
        return Recent, (self.limit,)

    def keep(self, key: object, value: Any) -> Any:
        """Holds a value, and returns it."""
        self[key] = value
        while len(self) > self.limit:
            self.popitem(last=False)
        return value

    def find(self, key: object, make: Callable[[], Any]) -> Any:
        """The value of a key, made if it is not here."""
        held = self.pop(key, None)
        if held is None:
            with lasting(), torch.device("cpu"):  # the same members everywhere
                held = make()
        return self.keep(key, held)


class Member:
    """One autoregressive model that uses some of a shared network's weights.

    ``order[k]`` is the ``k``-th dimension.  ``units`` are the degrees of each hidden layer's units; a unit of degree d
    sees the first ``d`` dimensions.  With ``direct``, outputs also see earlier dimensions through a linear layer.

    Example:
        >>> pf.MADE(4, order="reverse").member(0).order.tolist()
        [3, 2, 1, 0]
    """

    def __init__(self, order: Tensor, units: Sequence[Tensor], direct: bool, head: Head) -> None:
        self.order, self.rank = order, torch.argsort(order)
        self.units, self.direct = list(units), direct
        self.num_params, self.features = head.num_params, head.num_features
        self.sorting = [torch.argsort(unit, stable=True) for unit in self.units]

    def masks(self) -> list[Tensor]:
        """Boolean masks of the weights, rows by unit or output, the direct one last."""
        inputs = (self.rank + 1).repeat_interleave(self.features)  # an input of rank r counts as a unit of degree r + 1
        outputs = self.rank.repeat(self.num_params)
        masks = visible(inputs, self.units, outputs)
        return masks + visible(inputs, [], outputs) if self.direct else masks

    @on_cpu
    def structure(self) -> Structure:
        """The structure of the network with sorted units."""
        dims, widths = len(self.order), [len(unit) for unit in self.units]
        units = [unit[by] for unit, by in zip(self.units, self.sorting, strict=True)]
        degrees = Degrees(dims, widths, False, "identity", None, units, self.direct)
        # Dense: masked weights are zeros by then.
        cuts = (WHOLE,) * (len(widths) + 1)
        return Structure(
            degrees.steps, degrees.times, self.num_params, (), True, cuts, features=self.features, direct=self.direct
        )

    @on_cpu
    def permutations(self) -> list[tuple[Tensor, Tensor]]:
        """Rows and columns of each weight in sorted order, the direct one last."""
        dims = len(self.order)
        inputs = (self.order[:, None] * self.features + torch.arange(self.features)).flatten()
        outputs = (torch.arange(self.num_params)[:, None] * dims + self.order).flatten()
        below, above = [inputs, *self.sorting], [*self.sorting, outputs]
        pairs = list(zip(above, below, strict=True))
        return [*pairs, (outputs, inputs)] if self.direct else pairs


class _Draws:
    """Makes a dimension's value: given for the ``known`` first ranks, else drawn."""

    def __init__(self, head: Head, order: Tensor, known: int) -> None:
        self.head, self.order, self.known = head, order, known
        # Inputs that are the values need no memory of their own.
        self.shared = head.num_features == 1 and type(head).code is Head.code

    def draws(self, start: int, stop: int, z: Tensor, params: Tensor, x: Tensor, coded: Tensor) -> Calls:
        """Calls that fill ``x`` and its features at ranks ``[start, stop)``; feature-major."""
        given = min(max(self.known - start, 0), stop - start)
        dims, cut = self.order[start:stop].to(z.device), given * self.head.num_features
        calls = self.head.fills(lambda: z[:given].T, dims[:given], x[:given], coded[:cut]) if given else []
        if given < stop - start:
            calls += self.head.draws(dims[given:], z[given:], params[given:], x[given:], coded[cut:])
        return calls


class Sampler:
    """A member's sorted weights and sweep; the first ``known`` dimensions are given."""

    def __init__(
        self, net: SharedNetwork, head: Head, member: Member, known: int, weights: list[Tensor], biases: list[Tensor]
    ) -> None:
        self.known, device = known, weights[0].device
        self.solver = Solver(member.structure(), net.layout.activations, _Draws(head, member.order, known))
        self.order, self.rank = member.order.to(device), member.rank.to(device)
        self._places = [(rows.to(device), columns.to(device)) for rows, columns in member.permutations()]
        self._weights = [torch.empty_like(weight) for weight in weights]
        self._biases = [torch.empty_like(bias) for bias in biases[1:]]

    def load(self, weights: Sequence[Tensor], biases: Sequence[Tensor], bits: Sequence[Tensor]) -> None:
        """Copies the current weights, sorted, with zeros where masked."""
        for room, weight, mask, (rows, columns) in zip(self._weights, weights, bits, self._places, strict=True):
            room.copy_(keep(weight, mask).index_select(0, rows).index_select(1, columns))
        for room, bias, (rows, _) in zip(self._biases, biases[1:], self._places[1:], strict=False):
            torch.index_select(bias, 0, rows, out=room)

    def run(self, rows: int, first_bias: Tensor, given: Tensor | None) -> Tensor:
        """Draws of shape ``(rows, D)``; ``first_bias``: ``(width,)``, ``(1, width)`` or ``(rows, width)``."""
        first = first_bias.reshape(-1, first_bias.shape[-1]).index_select(1, self._places[0][0])
        own = first.shape[0] > 1
        x = torch.rand(rows, len(self.order), dtype=first.dtype, device=first.device)  # noise that becomes values
        if given is not None:
            x[:, : self.known] = given.index_select(1, self.order[: self.known]).to(x.dtype)
        chunk = columns_at_once(rows, self.solver.structure.adjoint_rows, x.device)
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            sweep: Any = self.solver.borrow(ForwardSweep, x, len(x[part]), self._weights, self._biases, own)
            sweep.run(x[part], first[part] if own else first, self._weights, [])
            x[part] = sweep.x.T
            self.solver.give_back(sweep)
        return x.index_select(1, self.rank)


def _seen(weight: Tensor, bits: Tensor) -> Tensor:
    """Sums the weights that each row sees."""
    return torch.where(bits != 0, weight, 0.0).sum(1)


class SharedNetwork(nn.Module):
    """Weights of which each member uses some; arguments as in ``MADE``."""

    weight_0: Tensor
    bias_0: Tensor
    direct: Tensor
    mask_weight: Tensor | None
    mask_direct: Tensor | None

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
        self.layout = MaskedLayers(
            activation_functions(activation, len(self.hidden_dims)), frozenset(), (WHOLE,) * (len(sizes) - 1)
        )
        for k, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            last = k == len(sizes) - 2
            # Measured: discrete values generalize better from smaller initial weights, real ones from larger.
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
        self._bits = Recent(max(1, KEPT // sum(a * c for a, c in itertools.pairwise(sizes))))
        self._idle = Recent(1)

    def _weights(self) -> tuple[list[Tensor], list[Tensor]]:
        layers = range(len(self.hidden_dims) + 1)
        return [getattr(self, f"weight_{k}") for k in layers], [getattr(self, f"bias_{k}") for k in layers]

    def _first_bias(self, context: Tensor | None, bits: Sequence[Tensor]) -> Tensor:
        bias = self.bias_0 if self.mask_weight is None else self.bias_0 + _seen(self.mask_weight, bits[0])
        return bias if context is None else F.linear(context, self.context_weight, bias)

    def bits(self, member: Member) -> list[Tensor]:
        """The member's masks as integers of the weights' size, all bits set where a weight counts."""
        weight = self.weight_0
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
        key = (member, kind, weight.device)
        return self._bits.find(key, lambda: [-mask.to(weight.device).to(kind) for mask in member.masks()])

    def forward(self, features: Tensor, context: Tensor | None, member: Member) -> Tensor:
        """Parameters, shape ``(*batch, D, num_params)``, for features ``(*batch, D, num_features)``; one pass."""
        weights, biases = self._weights()
        bits = self.bits(member)
        x = features.flatten(-2)
        (out,) = masked_network(
            self.layout, x, self._first_bias(context, bits), weights, biases[1:], bits[: len(weights)]
        )
        if self.is_direct:
            plain = MaskedLayers((), frozenset(), (WHOLE,))
            none = self.direct.new_zeros(self.direct.shape[0])
            bias = none if self.mask_direct is None else _seen(self.mask_direct, bits[-1])
            out = out + masked_network(plain, x, bias, [self.direct], [], bits[-1:])[0]
        return torch.unflatten(out, -1, (self.head.num_params, self.head.input_dim)).transpose(-1, -2)

    @torch.no_grad()
    def draw(
        self, head: Head, rows: int, context: Tensor | None, member: Member, given: Tensor | None = None, known: int = 0
    ) -> Tensor:
        """Draws in one sweep that uses each weight once, shape ``(rows, D)``.

        ``context`` has shape ``(rows or 1, context_dim)``.  ``given``, shape ``(rows, D)``, holds values of the first
        ``known`` dimensions in the order.  ``head`` may be the relaxed form of the network's own.
        """
        weights, biases = self._weights()
        if self.is_direct:
            weights.append(self.direct)
        key = (head, member, known, self.weight_0.dtype, self.weight_0.device)
        sampler = self._idle.pop(key, None)  # no other thread uses it meanwhile
        if sampler is None:
            sampler = Sampler(self, head, member, known, weights, biases)
        bits = self.bits(member)
        if self.mask_direct is not None:
            biases[-1] = biases[-1] + _seen(self.mask_direct, bits[-1])
        sampler.load(weights, biases, bits)
        drawn = sampler.run(rows, self._first_bias(context, bits), given)
        self._idle.keep(key, sampler)
        return drawn
