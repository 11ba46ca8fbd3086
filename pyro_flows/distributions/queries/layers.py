"""What is known of the layers of a flow: single dimensions, orders, matrices."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_flows.core.chain import leaves
from pyro_flows.core.transform import Conditioned, FlowTransform, Inverse
from pyro_flows.core.wrap import Wrap
from pyro_flows.transforms import ActNorm, Autoregressive, Bounds, LogitPixels, Permutation, Rescaling, Standardization

__all__ = ["Leaf", "Links", "is_elementwise", "leaves_of", "links_of", "matrix_of", "order_of"]


class Leaf(NamedTuple):
    """A layer of a flow, its context, and whether the flow uses its inverse."""

    part: FlowTransform
    context: Tensor | None
    inverse: bool

    def to_base(self, value: Tensor) -> Tensor:
        """Moves a value through the layer, towards the base."""
        return self.to_base_and_ladj(value)[0]

    def to_base_and_ladj(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Moves a value towards the base, with the log-determinant."""
        move = self.part._forward_and_ladj if self.inverse else self.part._inverse_and_ladj
        return move(value, self.context)

    def to_data(self, value: Tensor) -> Tensor:
        """Moves a value through the layer, towards the data."""
        move = self.part._inverse_and_ladj if self.inverse else self.part._forward_and_ladj
        return move(value, self.context)[0]

    def to_base_and_slopes(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Moves a value towards the base, with the log-slope of each dimension, of an elementwise or ordered layer."""
        part: Any = self.part
        if hasattr(part, "inverse_and_log_slopes") and not self.inverse:
            return part.inverse_and_log_slopes(value, self.context)
        moved = self.to_base(value)
        if self.inverse:
            return moved, -part.log_slopes(moved, self.context)
        return moved, part.log_slopes(value, self.context)


def leaves_of(chain: FlowTransform, context: Tensor | None) -> list[Leaf]:
    """The layers from base to data, without inverses and conditioned views."""
    found = []
    for part in leaves(chain):
        own, inverse = context, False
        while isinstance(part, (Inverse, Conditioned)):
            own, inverse = (own, not inverse) if isinstance(part, Inverse) else (part.context, inverse)
            part = part.transform
        found.append(Leaf(part, own if part.context_dim else None, inverse))
    return found


def is_elementwise(part: FlowTransform) -> bool:
    """Whether a layer maps each dimension by itself."""
    if isinstance(part, Wrap):
        return part.elementwise
    return isinstance(part, (ActNorm, Bounds, LogitPixels, Rescaling, Standardization))


def order_of(part: FlowTransform) -> list[int] | None:
    """The dimensions in a triangular layer's order; ``None`` for a layer without a known order."""
    if isinstance(part, Autoregressive):
        return part.net.order.tolist()
    known: Any = part
    if not all(hasattr(part, each) for each in ("log_slopes", "order", "lower")):
        return None
    places = torch.arange(part.event_shape.numel(), device="cpu").view(part.event_shape)
    places = (places if known.order == "channel" else places.movedim(0, -1)).flatten()
    return (places if known.lower else places.flip(0)).tolist()


def matrix_of(leaf: Leaf) -> Tensor:
    """The matrix of an affine layer from base to data, shape ``(*context_batch, n, n)``, of its images of a basis."""
    kin = next((t for t in (*leaf.part.parameters(), *leaf.part.buffers()) if t.is_floating_point()), torch.zeros(()))
    n = leaf.part.event_shape.numel()
    batch = () if leaf.context is None else leaf.context.shape[:-1]
    points = torch.cat((torch.eye(n).to(kin), kin.new_zeros(1, n)))
    points = points.view(n + 1, *(1 for _ in batch), n).expand(n + 1, *batch, n)
    images = leaf.to_data(points.reshape(n + 1, *batch, *leaf.part.event_shape)).flatten(-len(leaf.part.event_shape))
    return (images[:-1] - images[-1]).movedim(0, -1)


class Links(NamedTuple):
    """How numbers on the data side of a layer hang together.

    ``source[i]`` is the number on the base side that belongs to number ``i``, and ``sees[i, j]`` whether ``i`` depends
    on the source of ``j``; ``sees`` is ``None`` where each depends on its own source only.
    """

    source: Tensor
    sees: Tensor | None

    def closed(self, some: Tensor) -> Tensor:
        """The smallest set that holds ``some`` numbers and all that they depend on; both boolean."""
        while self.sees is not None:
            more = some | self.sees[some].any(0)
            if torch.equal(more, some):
                break
            some = more
        return some


def links_of(leaf: Leaf) -> Links | None:
    """The links of a layer, on the CPU; ``None`` where each number may depend on every other."""
    part, n = leaf.part, leaf.part.event_shape.numel()
    natural = torch.arange(n, device="cpu")
    if is_elementwise(part):
        return Links(natural, None)
    if isinstance(part, Permutation):
        return Links((part.undo if leaf.inverse else part.permutation).cpu(), None)
    if part.affine:
        with torch.no_grad():
            linked = matrix_of(leaf).cpu() != 0
        linked = linked.flatten(0, -3).any(0) if linked.dim() > 2 else linked
        if linked.diagonal().all():
            return Links(natural, linked)
        return None
    order = order_of(part)
    if order is None:
        return None
    places = torch.tensor(order, device="cpu")
    adjacency = part.net.degrees.adjacency if isinstance(part, Autoregressive) else None
    below = torch.ones(n, n, dtype=torch.bool, device="cpu").tril(-1) if adjacency is None else adjacency.cpu()
    sees = torch.zeros_like(below)
    sees[places[:, None], places] = below
    return Links(natural, sees)
