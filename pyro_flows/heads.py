"""What stands at the end of a masked network: the univariate map whose parameters the network computes.

With few parameters a dimension, outputs come as the network's last layer makes them, one row a sample.  A wide family
wants them the other way round, one row a parameter with all samples in columns; and since its outputs outnumber
everything else in the network, they are made slab by slab: a range of dimensions at a time, from the hidden units that
the last of them sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.bands import keep

__all__ = ["Head", "Slab", "Slabs"]


class Slab(NamedTuple):
    """Dimensions ``[start, stop)`` by rank, none of which sees the hidden units from ``high`` on."""

    start: int
    stop: int
    high: int


class Slabs:
    """The ways to cut the outputs, one for each number of slabs.

    Args:
        steps: the step of each dimension, by rank.
        times: the times of the last hidden layer's units.
        num_params: parameters per dimension.
    """

    def __init__(self, steps: Tensor, times: Tensor, num_params: int) -> None:
        dims = len(steps)
        self.work = 2 * num_params * dims * len(times)  # of one sample, if nothing is left out
        self.ways = []
        for count in (1, 2, 4, 8):
            if count > dims:
                break
            cuts = [dims * k // count for k in range(count + 1)]
            highs = [int((times <= steps[c - 1]).sum()) for c in cuts[1:]]
            self.ways.append(tuple(map(Slab, cuts, cuts[1:], highs)))

    def at(self, n: int, device: torch.device) -> tuple[Slab, ...]:
        """The best way for ``n`` samples: a slab costs as much time as some 2^23 operations on a processor's core."""
        if device.type != "cpu":
            return self.ways[0]
        return min(self.ways, key=lambda way: self.work * n * (len(way) + 1) / (2 * len(way)) + 2**23 * len(way))


class Head(NamedTuple):
    """What to do with a network's outputs: move each input by the univariate."""

    univariate: object

    def move(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """``(moved, ladj)``, elementwise; outputs come parameter by parameter."""
        params = out.unflatten(-1, (self.univariate.num_params, x.shape[-1])).transpose(-1, -2)
        return self.univariate.forward(x, params)

    def run(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """As :meth:`move`, by hand, with what the gradient needs; ``out`` may be overwritten."""
        return self.univariate.run(False, x, out.view(*x.shape[:-1], self.univariate.num_params, x.shape[-1]))

    def pull(
        self, x: Tensor, moved: Tensor, ladj: Tensor, kept: Sequence[Tensor], grad: Tensor, grad_ladj: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients after ``x`` and the outputs."""
        grads = (grad, grad_ladj.unsqueeze(-1))
        by_x, by_params = self.univariate.pull(False, x, moved, ladj, kept, *grads)
        return by_x, by_params.flatten(-2)

    def run_slabs(
        self, slabs: Sequence[Slab], x: Tensor, hidden: Tensor, weight: Tensor, bits: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor], list[tuple[Tensor, ...]]]:
        """The last layer and the map: ``(moved, ladj)``, the masked weights and what the gradient needs, by slab."""
        weight, bits, bias = self._by_dimension(x, weight, bits, bias)
        moved = x.new_empty(x.shape[1], x.shape[0])
        parts, every, total = [], [], None
        for start, stop, high in slabs:
            part = keep(weight[:, start:stop, :high], bits[:, start:stop, :high]).flatten(0, 1)
            out = torch.addmm(bias[:, start:stop].reshape(-1, 1), part, hidden[:, :high].T)
            z = x[:, start:stop].T.reshape(-1)
            y, ladj, kept = self.univariate.columns(False, z, out.view(weight.shape[0], z.shape[0]))
            moved[start:stop] = y.view(stop - start, x.shape[0])
            ladj = ladj.view(stop - start, x.shape[0]).sum(0)
            total = ladj if total is None else total.add_(ladj)
            parts.append(part)
            every.append(kept)
        return moved.T.contiguous(), total, parts, every

    def pull_slabs(
        self,
        slabs: Sequence[Slab],
        hidden: Tensor,
        bits: Tensor,
        parts: Sequence[Tensor],
        every: Sequence[Sequence[Tensor]],
        grad: Tensor,
        grad_ladj: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients after ``x``, the hidden units, the weight and the bias."""
        n, dims = grad.shape
        count = self.univariate.num_params
        bits = bits.view(count, dims, bits.shape[1])
        by_x, by_hidden = grad.new_empty(dims, n), torch.zeros_like(hidden)
        by_weight, by_bias = grad.new_empty(bits.shape), grad.new_empty(count, dims)
        for (start, stop, high), part, kept in zip(slabs, parts, every, strict=True):
            upper = grad[:, start:stop].T.reshape(-1)
            by_z, by_out = self.univariate.pull_columns(
                False, kept, upper, grad_ladj.expand(stop - start, n).reshape(-1)
            )
            by_x[start:stop] = by_z.view(stop - start, n)
            flat = by_out.view(count * (stop - start), n)
            by_bias[:, start:stop] = flat.sum(1).view(count, stop - start)
            by_hidden[:, :high].addmm_(flat.T, part)
            product = (flat @ hidden[:, :high]).view(count, stop - start, high)
            mask = bits[:, start:stop, :high]
            torch.bitwise_and(product.view(bits.dtype), mask, out=by_weight.view(bits.dtype)[:, start:stop, :high])
            by_weight[:, start:stop, high:].zero_()
        return by_x.T, by_hidden, by_weight.view(count * dims, hidden.shape[1]), by_bias.view(-1)

    def _by_dimension(self, x: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(each.view(self.univariate.num_params, x.shape[1], *each.shape[1:]) for each in rows)
