"""One order of the dimensions and the degrees of the hidden units: who may see whom in a MADE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from pyro_flows.degrees import Degrees, Structure, even_degrees, least_degree

__all__ = ["CONNECTIVITIES", "Member", "draw_units"]

CONNECTIVITIES = ("even", "random")


def draw_units(
    input_dim: int, widths: Sequence[int], context: bool, connectivity: str, generator: Generator
) -> list[Tensor]:
    """Degrees of each hidden layer's units.

    Evenly spread, or drawn: uniform between the least degree of the layer below and ``input_dim - 1``.
    """
    least = least_degree(input_dim, context)
    units = []
    for width in widths:
        if connectivity == "even":
            units.append(even_degrees(input_dim, width, context))
        else:
            units.append(torch.randint(least, input_dim, (width,), generator=generator))
            least = int(units[-1].min())
    return units


class Member:
    """One of the autoregressive models that share a network's weights.

    Weights stay where they are, by dimension and number of the unit; a member says which of them count.

    Args:
        order: ``order[k]`` is the dimension that comes ``k``-th.
        units: degrees of each hidden layer's units; a unit of degree d sees the ``d`` first dimensions.
        direct: whether outputs also see the dimensions before them without detour.
        num_params, features: numbers per dimension that come out, and that go in.
    """

    def __init__(self, order: Tensor, units: Sequence[Tensor], *, direct: bool, num_params: int, features: int) -> None:
        self.order, self.rank = order, torch.argsort(order)
        self.units, self.direct = list(units), direct
        self.num_params, self.features = num_params, features
        # Where each layer's rows and columns go when units are sorted by degree and dimensions by rank.
        self.sorting = [torch.argsort(unit, stable=True) for unit in self.units]

    def masks(self) -> list[Tensor]:
        """One boolean mask for each weight, rows by unit or output, the direct one last."""
        inputs = (self.rank + 1).repeat_interleave(self.features)  # an input of rank r counts as a unit of degree r + 1
        outputs = self.rank.repeat(self.num_params)
        below, above = [inputs, *self.units], [*self.units, outputs]
        masks = [a[:, None] >= b[None, :] for a, b in zip(above, below, strict=True)]
        return [*masks, outputs[:, None] >= inputs[None, :]] if self.direct else masks

    def structure(self) -> Structure:
        """Of the network with its units sorted."""
        dims, widths = len(self.order), [len(unit) for unit in self.units]
        units = [unit[by] for unit, by in zip(self.units, self.sorting, strict=True)]
        degrees = Degrees(dims, widths, False, "identity", None, units, self.direct)
        # Dense, since masked weights are zeros by the time they get there.
        cuts = tuple([None] * (len(widths) + 1))
        return Structure(
            degrees.steps, degrees.times, self.num_params, (), True, cuts, features=self.features, direct=self.direct
        )

    def permutations(self) -> list[tuple[Tensor, Tensor]]:
        """Rows and columns of each weight in sorted order, the direct one last."""
        dims = len(self.order)
        inputs = (self.order[:, None] * self.features + torch.arange(self.features)).flatten()
        outputs = (torch.arange(self.num_params)[:, None] * dims + self.order).flatten()
        below, above = [inputs, *self.sorting], [*self.sorting, outputs]
        pairs = list(zip(above, below, strict=True))
        return [*pairs, (outputs, inputs)] if self.direct else pairs
