"""Degrees and masks of an autoregressive network, and the steps of its inverse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows.core.checks import choice
from pyro_flows.nets.structure import Cut, staircase

__all__ = ["Degrees", "as_order", "even_degrees", "least_degree", "visible"]


def as_order(input_dim: int, order: str | Sequence[int] | Tensor) -> Tensor:
    """The dimensions in autoregressive order, from a name or a permutation."""
    natural = torch.arange(input_dim)
    if isinstance(order, str):
        choice("", "order", order, ("identity", "reverse", "random"), "a permutation")
        if order == "random":
            return torch.randperm(input_dim)
        return natural if order == "identity" else natural.flip(0)
    given = torch.as_tensor(order).to(natural.device)
    if given.dim() != 1 or given.is_floating_point() or not torch.equal(given.sort().values, natural):
        shown = given.tolist() if given.numel() <= 20 else f"a tensor of shape {tuple(given.shape)}"
        raise ValueError(f"expected order to be a permutation of 0..{input_dim - 1}, got {shown}")
    return given.long().clone()


def _levels(adjacency: Tensor) -> Tensor:
    """The length of the longest path to each node of a directed acyclic graph."""
    level = torch.full((len(adjacency),), -1)
    for depth in range(len(adjacency)):
        waiting = level < 0
        if not waiting.any():
            break
        level[waiting & ~(adjacency & waiting).any(1)] = depth
    stuck = (level < 0).nonzero().flatten().tolist()
    if stuck:
        raise ValueError(f"expected an adjacency without cycles, but there is one among dimensions {stuck}")
    return level


def least_degree(input_dim: int, context: bool) -> int:
    """The least degree of a hidden unit: degree d sees inputs of rank < d, degree 0 the context alone."""
    return 0 if context or input_dim == 1 else 1


def even_degrees(input_dim: int, width: int, context: bool) -> Tensor:
    """Evenly spread, ascending degrees of a hidden layer."""
    least = least_degree(input_dim, context)
    return least + torch.arange(width) * (input_dim - least) // width


def visible(inputs: Tensor, hidden: Sequence[Tensor], outputs: Tensor) -> list[Tensor]:
    """A boolean mask for each layer: all below of at most the row's own degree."""
    pairs = zip([*hidden, outputs], [inputs, *hidden], strict=True)
    return [above[:, None] >= below for above, below in pairs]


class Degrees:
    """The structure of a MADE: inputs and outputs by rank in the order, units sorted by degree.

    Args:
        input_dim, widths, order, adjacency: as in :class:`~pyro_flows.nets.MaskedMLP`.
        context: whether there is a context.
        units: ascending degrees of each hidden layer, by default evenly spread.
        direct: whether outputs also see earlier inputs directly.

    Attributes:
        order: ``order[k]`` is the input that comes ``k``-th.
        steps: the step of the inverse that solves each rank; inputs of one step are conditionally independent given
            earlier steps.
        times: for each hidden layer, how many steps must precede each unit; sorted.
        dense: whether ``steps`` and ``times`` alone imply the masks.
        adjacency: what each output may see, by rank; ``None`` for all inputs of lower rank.
    """

    def __init__(
        self,
        input_dim: int,
        widths: Sequence[int],
        context: bool,
        order: str | Sequence[int] | Tensor,
        adjacency: Tensor | None,
        units: Sequence[Tensor] | None = None,
        direct: bool = False,
    ) -> None:
        self.input_dim, self.widths = input_dim, tuple(widths)
        if adjacency is None:
            self.order = as_order(input_dim, order)
            even = (even_degrees(input_dim, width, context) for width in self.widths)
            self._unit = list(even if units is None else units)
            self._by_rank(direct)
        else:
            if not (isinstance(order, str) and order == "identity"):
                raise ValueError("give either an order or an adjacency, not both: the adjacency implies an order")
            self._by_set(context, torch.as_tensor(adjacency).to(torch.get_default_device()))
        # Units of different degrees may share a time.
        free = visible(self.steps + 1, self.times, self.steps)
        self.dense = all(map(torch.equal, self.masks(), free))

    def _by_rank(self, direct: bool) -> None:
        ranks = torch.arange(self.input_dim)
        # The prefix that a unit really reaches: the widest that any unit visible to it reaches.
        below, seen = ranks + 1, ranks + 1  # an input of rank r has degree r + 1
        reach = []
        for unit in [*self._unit, ranks]:
            index = torch.searchsorted(below, unit, right=True) - 1
            below, seen = unit, torch.where(index < 0, 0, seen[index.clamp(min=0)])
            reach.append(seen)
        seen = ranks if direct else seen
        self.steps = torch.unique(seen, return_inverse=True)[1]
        self.times = [torch.where(r == 0, 0, self.steps[(r - 1).clamp(min=0)] + 1) for r in reach[:-1]]
        self.adjacency: Tensor | None = None

    def _by_set(self, context: bool, adjacency: Tensor) -> None:
        shape = (self.input_dim, self.input_dim)
        if adjacency.shape != shape:
            raise ValueError(f"expected an adjacency of shape {shape}, got {tuple(adjacency.shape)}")
        adjacency = adjacency.bool()
        if adjacency.diagonal().any():
            raise ValueError("expected an adjacency with a false diagonal: a dimension cannot be its own condition")
        level = _levels(adjacency)
        self.order = torch.argsort(level, stable=True)
        self.adjacency = adjacency[self.order][:, self.order]  # by rank
        self.steps = level[self.order]
        sets = torch.unique(self.adjacency, dim=0)
        if not context and sets.any():
            sets = sets[sets.any(1)]
        last = torch.where(sets, self.steps + 1, 0).amax(1)  # when a set is complete
        by_time = torch.argsort(last, stable=True)
        sets, last = sets[by_time], last[by_time]
        picks = [torch.arange(width) * len(sets) // width for width in self.widths]
        self._unit = [sets[pick] for pick in picks]
        self.times = [last[pick] for pick in picks]

    def masks(self) -> list[Tensor]:
        """A boolean mask for each layer; rows are the layer's outputs."""
        if self.adjacency is None:
            ranks = torch.arange(self.input_dim)
            return visible(ranks + 1, self._unit, ranks)
        below = [torch.eye(self.input_dim, dtype=torch.bool), *self._unit]
        above = [*self._unit, self.adjacency]
        # A set may use its subsets.
        return [(~a).float() @ b.float().T == 0 for a, b in zip(above, below, strict=True)]

    def cuts(self, repeats: int) -> tuple[Cut, ...]:
        """The cut of each layer; the outputs come ``repeats`` times."""
        above, counts = [*self.times, self.steps], [1] * len(self.times) + [repeats]
        below = [self.steps + 1, *self.times]
        return tuple(staircase(a, b, n) for a, b, n in zip(above, below, counts, strict=True))
