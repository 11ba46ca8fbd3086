"""Transforms in sequence, and the one walk of a flow: its leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyro.distributions.constraints as pyro_constraints
from torch import Size, Tensor, nn
from torch.distributions import Transform, constraints

from pyro_flows.core.checks import first_floating, joint_shape
from pyro_flows.core.transform import WHOLE, Conditioned, FlowTransform, Inverse
from pyro_flows.core.wrap import Wrap

__all__ = ["Chain", "leaves", "total_cost"]

_DEEPEST = 8  # levels of nested chains: copies and files recurse


class Chain(FlowTransform):
    r"""Transforms in sequence, first to last from base to data: :math:`f = f_n \circ \dots \circ f_1`.

    Parts may be flows with or without a context, chains, inverses, conditioned views, and torch or Pyro transforms,
    which are wrapped.  Each direction costs the sum of its parts.  A chain within a chain is one part, whose place
    names its entries in the ``state_dict``; chains nested deeper than eight are flattened.

    Args:
        parts: the transforms, whose event shapes follow on from each other.

    Raises:
        ValueError: for an empty list, event shapes that do not fit, contexts of different sizes, or parts of which only
            some stay on the sphere.

    Example:
        >>> chain = pf.Chain([*pf.realnvp(3, num_layers=2), pf.LULinear(3)])
        >>> len(chain)
        3
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(chain.inv(chain(x)), x, atol=1e-4)
        True
    """

    def __init__(self, parts: Iterable[Transform]) -> None:
        if isinstance(parts, Transform) or not isinstance(parts, Iterable):
            kind = getattr(parts, "__name__", type(parts).__name__)
            raise TypeError(
                f"expected a flow transform, such as pf.maf(3), or transforms in a list, got {kind}; call a builder, "
                "and put a transform of torch's or Pyro's own in a list with a flow's layers"
            )
        parts = list(parts)
        if any(_depth(part) >= _DEEPEST for part in parts):
            parts = [leaf for part in parts for leaf in leaves(part)]
        flows = [part for part in parts if isinstance(part, FlowTransform)]
        if not flows:
            raise ValueError("Chain: expected at least one flow transform, got none")
        sizes = sorted({part.context_dim for part in flows} - {0})
        if len(sizes) > 1:
            raise ValueError(f"Chain: all parts that take a context must agree on context_dim, got {sizes}")
        start = flows[0].event_shape
        for part in reversed(parts[: parts.index(flows[0])]):
            start = Size(part.inverse_shape(start))
        super().__init__(start, sizes[0] if sizes else 0)
        shape = self.event_shape
        self.parts = nn.ModuleList()
        kin = next((tensor for tensor in map(first_floating, flows) if tensor is not None), None)
        for k, part in enumerate(parts):
            if not isinstance(part, FlowTransform):
                copied = not isinstance(part, nn.Module)
                part = Wrap(part, shape)
                if copied and kin is not None and not kin.is_meta:
                    part.to(kin.device, kin.dtype)  # as the flows
            if part.event_shape != shape:
                raise ValueError(
                    f"Chain: part {k} ({type(part).__name__}) expects event shape {tuple(part.event_shape)}, but what "
                    f"comes before it gives {tuple(shape)}"
                )
            self.parts.append(part)
            shape = part.data_shape
        kinds = {part.discrete for part in self} - {None}
        if len(kinds) > 1:
            raise ValueError(
                "Chain: expected parts that all map whole numbers, or all real ones, got both: "
                f"{', '.join(type(part).__name__ for part in self)}"
            )
        self.discrete = kinds == {True} if kinds else None
        self.sampling_cost = total_cost(part.sampling_cost for part in self)
        self.density_cost = total_cost(part.density_cost for part in self)
        kinds = {side is pyro_constraints.sphere for part in self for side in (part.domain, part.codomain)}
        if len(kinds) > 1:
            raise ValueError(
                "Chain: some parts move unit vectors and others leave the sphere, so the result would be no density; "
                "use parts of pf.sphere for all, or fit their coordinates without one"
            )
        angles = self.periodic
        if angles is not None:
            self.turned(angles)  # refuses parts that do not take them as angles

    def arguments(self) -> tuple[tuple[object, ...], dict[str, object]]:
        """The constructor's arguments."""
        return (self._parts(),), {}

    @property
    def reach(self) -> int | None:
        each: list[Any] = [part.reach for part in self._parts()]
        return None if None in each else sum(each)

    @property
    def shared_over_time(self) -> bool:
        return all(part.shared_over_time for part in self)

    @property
    def periodic(self) -> Tensor | None:
        parts = self._parts()
        for first, part in enumerate(parts):
            angles = part.periodic
            if angles is not None:
                for before in reversed(parts[:first]):
                    angles = before.turned(angles, inverse=True)
                return angles
        return None

    def turned(self, angles: Tensor, inverse: bool = False) -> Tensor:
        for part in reversed(self._parts()) if inverse else self:
            angles = part.turned(angles, inverse)
        return angles

    @property
    def data_shape(self) -> Size:
        return self._parts()[-1].data_shape

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:
        return WHOLE[len(self.event_shape)] if self.discrete else self._parts()[0].domain

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        parts = self._parts()
        if self.discrete:
            return WHOLE[len(self.data_shape)]
        last = len(parts) - 1
        while last and isinstance(parts[last], Wrap):
            last -= 1
        reached = parts[last].codomain
        for part in parts[last + 1 :]:
            if isinstance(part, Wrap):
                reached = part.reached(reached)
        return reached

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _through("_forward_and_ladj", self._parts(), x, context)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _through("_inverse_and_ladj", self._parts()[::-1], y, context)

    @property
    def batch_shape(self) -> Size:
        return joint_shape(*(part.batch_shape for part in self))

    def _parts(self) -> list[FlowTransform]:
        # A ModuleList is slow to index.
        held: Any = self._modules["parts"]
        return list(held._modules.values())

    def __len__(self) -> int:
        return len(self._parts())

    def __iter__(self) -> Iterator[FlowTransform]:
        return iter(self._parts())

    def __getitem__(self, index: int | slice) -> FlowTransform:
        part = self._parts()[index]
        return Chain(part) if isinstance(part, list) else part


def _through(
    direction: str, parts: Sequence[FlowTransform], value: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    total: Any = None
    for part in parts:
        value, ladj = getattr(part, direction)(value, context if part.context_dim else None)
        total = ladj if total is None else total + ladj
    return value, total


def leaves(transform: Any) -> list[FlowTransform]:
    """The layers of a flow from base to data, also those inside inverses and conditioned views."""
    if isinstance(transform, Chain):
        return [leaf for part in transform for leaf in leaves(part)]
    if not isinstance(transform, (Inverse, Conditioned)):
        return [transform]
    inner = leaves(transform.transform)
    if inner == [transform.transform]:
        return [transform]
    if isinstance(transform, Inverse):
        return [leaf.inv for leaf in reversed(inner)]
    return [Conditioned(leaf, transform.context) if leaf.context_dim else leaf for leaf in inner]


def _depth(transform: Transform) -> int:
    if isinstance(transform, (Inverse, Conditioned)):
        return 1 + _depth(transform.transform)
    return 1 + max(map(_depth, transform), default=0) if isinstance(transform, Chain) else 1


def total_cost(costs: Iterable[str]) -> str:
    """Adds up costs by their units."""
    counted: Counter[tuple[str, ...]] = Counter()
    for term in " + ".join(costs).split(" + "):
        count, head, *rest = term.split(" ")
        unit = ("pass" if head.startswith("pass") else head.removesuffix("s"), *rest)
        counted[unit] += int(count)
    return " + ".join(
        " ".join((str(n), head if n == 1 else head + ("es" if head == "pass" else "s"), *rest))
        for (head, *rest), n in counted.items()
    )
