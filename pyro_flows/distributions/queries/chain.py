"""Marginals and conditionals of a flow, layer by layer."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, Independent

from pyro_flows.core.checks import joint_shape
from pyro_flows.core.transform import FlowTransform
from pyro_flows.distributions.queries.layers import Leaf, Links, is_elementwise, leaves_of, links_of, matrix_of
from pyro_flows.distributions.queries.mixtures import Mixture, as_mixture, fit_mixture
from pyro_flows.distributions.queries.piece import Piece, kept, places_of, put
from pyro_flows.transforms import ActNorm

__all__ = ["ChainPiece"]

ROWS, COMPONENTS, DF = 8192, 24, 5  # of the mixture that proposes


class ChainPiece(Piece):
    """A flow: layers over a core whose marginals are known.

    The core is the base, if its dimensions are independent, or a mixture of normals: a base of normals with the affine
    layers next to it.  A set of dimensions is closed if every layer maps it from as many on its base side.  Then its
    density is that of these on the core and the slopes, which the other dimensions do not enter.
    """

    def __init__(self, base: Distribution, chain: FlowTransform) -> None:
        self.base, self.event = base, chain.data_shape
        found = leaves_of(chain, None)
        self.size = self.event.numel()
        sizes = {side.numel() for each in found for side in (each.part.data_shape, each.part.event_shape)}
        if sizes != {self.size}:
            raise NotImplementedError(
                f"marginal and conditional: this flow has events of {self.size} numbers made of another number of "
                "dimensions, so that its numbers have no joint density; ask the flow without that end, which is "
                "flow.chain[-1] if it is the last part"
            )
        if any(isinstance(each.part, ActNorm) and each.part.training and not each.part.initialized for each in found):
            raise ValueError(
                "marginal and conditional: an ActNorm of this flow is not set yet, and what is asked of the flow would "
                "set it; score data first, or call flow.eval()"
            )
        self.batch_shape = joint_shape(base.batch_shape, chain.batch_shape)
        self.normal = as_mixture(base) is not None
        affine = 0
        while self.normal and affine < len(found) and found[affine].part.affine:
            affine += 1
        self.core, self.layers = found[:affine], found[affine:]
        self.front = len(self.layers)  # layers behind it act number by number
        while self.front and is_elementwise(self.layers[self.front - 1].part):
            self.front -= 1
        with torch.no_grad():
            x = base.expand(self.batch_shape).sample()
            for leaf in self.core:
                x = leaf.to_data(x)
            levels = [x]
            for leaf in self.layers:
                levels.append(leaf.to_data(levels[-1]))
        self.levels = [self._flat(x, k) for k, x in enumerate(levels)]
        self.reference = self.levels[self.front]
        angles = chain.periodic
        self.angles = None if angles is None else chain.turned(angles).flatten()

    # Layers see events, sets are flat.

    def _shape(self, level: int) -> Size:
        """The event's shape on the base side of a layer."""
        if level < len(self.layers):
            return self._base_side(self.layers[level])
        return self.event

    @staticmethod
    def _base_side(leaf: Leaf) -> Size:
        return leaf.part.data_shape if leaf.inverse else leaf.part.event_shape

    def _flat(self, x: Tensor, level: int) -> Tensor:
        return x.flatten(-len(self._shape(level)))

    def _event(self, x: Tensor, level: int) -> Tensor:
        return x.reshape(x.shape[:-1] + self._shape(level))

    @functools.cached_property
    def links(self) -> list[Links | None]:
        """The links of the layers."""
        return [links_of(leaf) for leaf in self.layers]

    @functools.cached_property
    def single(self) -> Distribution | None:
        """The distributions of a base's single dimensions, if they are independent."""
        inner: Any = self.base
        while isinstance(inner, Independent) or type(inner).__name__ == "ExpandedDistribution":
            inner = inner.base_dist
        return None if inner.event_shape else inner

    def sets(self, some: Tensor) -> list[Tensor]:
        """The smallest closed set, at each level from the core to the data."""
        everything = torch.ones_like(some)
        top = some
        while True:
            found = [top]
            for links in reversed(self.links):
                if links is None:
                    found.append(everything)
                    continue
                below = torch.zeros_like(some)
                below[links.source[links.closed(found[-1])]] = True
                found.append(below)
            if not self.normal and self.single is None:
                found[-1] = everything
            # What a lower level needs, upper levels need, too.
            back = found[-1]
            for links in self.links:
                back = back if links is None else back[links.source]
            if torch.equal(back, top):
                return found[::-1]
            top = back

    def closed(self, some: Tensor) -> Tensor:
        return self.sets(some)[-1]

    def _down(self, y: Tensor, sets: list[Tensor], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Moves a closed set from level ``start`` to ``stop``, with the log-determinant of its map."""
        total = y.new_zeros(())
        for level in range(start, stop, -1):
            y, ladj = self._step(y, sets[level], sets[level - 1], level - 1)
            total = total + ladj
        return y, total

    def _step(self, y: Tensor, above: Tensor, below: Tensor, level: int) -> tuple[Tensor, Tensor]:
        leaf = self.layers[level]
        value = self._event(y, level + 1)
        if above.all():
            x, ladj = leaf.to_base_and_ladj(value)
            return self._flat(x, level), ladj
        if leaf.part.affine and not is_elementwise(leaf.part):
            x = leaf.to_base(value)
            block = matrix_of(leaf)
            block = block.index_select(-2, places_of(above, y)).index_select(-1, places_of(below, y))
            ladj = -torch.linalg.slogdet(block)[1]
        else:
            x, slopes = leaf.to_base_and_slopes(value)
            ladj = slopes.flatten(-len(self._base_side(leaf))).index_select(-1, places_of(above, y)).sum(-1)
        # Numbers outside of the set stay those of a draw, however far the set itself is.
        return kept(below, self._flat(x, level), self.levels[level]), ladj

    def to_inner(self, y: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
        return self._down(y, [some] * (len(self.layers) + 1), len(self.layers), self.front)

    def to_outer(self, z: Tensor) -> Tensor:
        return self._up(z, self.front)

    def _up(self, x: Tensor, level: int, stop: int | None = None) -> Tensor:
        value = self._event(x, level)
        stop = len(self.layers) if stop is None else stop
        for leaf in self.layers[level:stop]:
            value = leaf.to_data(value)
        return self._flat(value, stop)

    def normals(self) -> Mixture | None:
        """The core as a mixture of normals at the current parameters, differentiable, in float64."""
        made = as_mixture(self.base)
        if made is None:
            return None
        base_shape = self._base_side(self.core[0]) if self.core else self._shape(0)
        matrix = torch.eye(self.size).to(made.loc)
        for leaf in self.core:
            matrix = matrix_of(leaf).double() @ matrix
        shift = made.loc.new_zeros(self.size).to(self.reference.dtype)
        value = shift.expand(self.batch_shape + shift.shape).reshape(self.batch_shape + base_shape)
        for leaf in self.core:
            value = leaf.to_data(value)
        shift = self._flat(value, 0).double()
        matrix = matrix.unsqueeze(-3)
        loc = (matrix @ made.loc.unsqueeze(-1)).squeeze(-1) + shift.unsqueeze(-2)
        cov = matrix @ made.cov @ matrix.mT
        return Mixture(made.log_weights.expand(loc.shape[:-1]), loc, (cov + cov.mT) / 2)

    def score(self, z: Tensor, closed: Tensor) -> Tensor:
        sets = self.sets(closed)
        x, ladj = self._down(z, sets, self.front, 0)
        return self._core_log_prob(x, sets[0]) + ladj

    def _core_log_prob(self, x: Tensor, some: Tensor) -> Tensor:
        if some.all():  # exactly as the flow itself
            value, total = self._event(x, 0), x.new_zeros(())
            for leaf in reversed(self.core):
                value, ladj = leaf.to_base_and_ladj(value)
                total = total + ladj
            return self.base.log_prob(value) + total
        places = places_of(some, x)
        normals = self.normals()
        if normals is not None:
            return normals.at(places).log_prob(x.index_select(-1, places).double()).to(x.dtype)
        single: Any = self.single
        each = single.log_prob(self._event(x, 0)).flatten(-len(self._shape(0)))
        return each.index_select(-1, places).sum(-1)

    def complete(self, z: Tensor, closed: Tensor) -> Tensor:
        if closed.all():
            return z
        sets = self.sets(closed)
        x = self._down(z, sets, self.front, 0)[0]
        known, rest = places_of(sets[0], x), places_of(~sets[0], x)
        batch = x.shape[:-1]
        normals = self.normals()
        if normals is not None:
            seen = x.index_select(-1, known).double()
            drawn = normals.given(known, seen, rest)
            short = len(batch) - len(joint_shape(drawn.log_weights.shape[:-1]))
            x = put(x, ~sets[0], drawn.sample(batch[:short]))
        else:
            own = self.base.expand(self.batch_shape).sample(batch[: len(batch) - len(self.batch_shape)])
            x = kept(sets[0], x, own.flatten(-len(self._shape(0))))
        return kept(closed, z, self._up(x, 0, self.front))

    @functools.cached_property
    def surrogate(self) -> Mixture:
        """A mixture of t fitted to draws, in inner coordinates."""
        elements = max(1, self.batch_shape.numel())
        count = max(256, min(ROWS, 2**22 // (elements * self.size)))
        with torch.no_grad():
            x = self.base.expand(self.batch_shape).sample(Size((count,)))
            for leaf in [*self.core, *self.layers[: self.front]]:
                x = leaf.to_data(x)
        rows = self._turned(self._flat(x, self.front)).movedim(0, -2)
        return fit_mixture(rows, max(1, min(COMPONENTS, count // (8 * (self.size + 1)))), DF)

    def _turned(self, z: Tensor) -> Tensor:
        """Moves angles by whole turns, to one around 0."""
        if self.angles is None:
            return z
        turn = 2 * math.pi
        return torch.where(self.angles.to(z.device), z - turn * (z / turn).round(), z)

    def prepare(self) -> None:
        _ = self.surrogate

    @torch.no_grad()
    def propose(self, z: Tensor, some: Tensor, closed: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
        known, rest = places_of(some, z), places_of(closed & ~some, z)
        given = self.surrogate.given(known, self._turned(z).index_select(-1, known).double(), rest)
        drawn = given.sample(Size((num_samples,)))
        score = given.log_prob(drawn)
        if self.angles is not None:  # the density counts over one turn
            far = self.angles.to(z.device)[rest] & (drawn.abs() > math.pi)
            score = score.masked_fill(far.any(-1), math.inf)
        return put(z, closed & ~some, drawn), score.to(z.dtype)
