"""Transforms in sequence, and torch's or Pyro's own transforms as parts of one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Transform, constraints

from pyro_flows.core import REAL, Conditioned, FlowTransform, Inverse
from pyro_flows.steps import Elementwise, Stepper
from pyro_flows.wrapped import held_inside, image, moved, own_copy

__all__ = ["Chain", "Wrap", "leaves", "map_tensors", "total_cost"]

_DEEPEST = 8  # levels of chains within chains; copies and files go down by recursion, so deeper ones are flattened


class Wrap(FlowTransform):
    """A torch or Pyro transform as a part of a chain, e.g. ``biject_to(constraint)`` or ``ExpTransform()``.

    Args:
        transform: any bijective ``torch.distributions.Transform``, of single numbers or of events, among them
            compositions, ``IndependentTransform``, ``CatTransform`` and ``StackTransform`` (with a negative ``dim``, so
            that it counts from the event's end) and their inverses.  A module is registered; of any other a copy is
            kept, whose tensors move with this module but are no part of its ``state_dict``.
        event_shape: shape of one event on the base side; elementwise transforms are summed over all of it.

    Raises:
        ValueError: if the transform is not bijective, cannot take this event, or holds parameters or modules that a
            copy would never train.
    """

    sampling_cost = density_cost = "1 product"

    def __init__(self, transform: Transform, event_shape: int | Iterable[int]) -> None:
        super().__init__(event_shape)
        if isinstance(transform, FlowTransform) or not isinstance(transform, Transform):
            raise TypeError(f"Wrap: expected a torch or Pyro transform that is no flow, got {type(transform).__name__}")
        if not transform.bijective:
            raise ValueError(f"Wrap: {type(transform).__name__} is not bijective, so it has no density")
        if transform.domain.event_dim > len(self.event_shape):
            raise ValueError(
                f"Wrap: {type(transform).__name__} acts on {transform.domain.event_dim} event dimensions, "
                f"got event shape {tuple(self.event_shape)}"
            )
        self._images: dict[bool, tuple[constraints.Constraint, constraints.Constraint]] = {}
        if isinstance(transform, nn.Module):
            self.transform = transform
            self._data_shape = Size(transform.forward_shape(self.event_shape))
            return
        self.transform = own_copy(transform)
        self._data_shape = self._tried(self.event_shape)

    def _tried(self, shape: Size) -> Size:
        """What becomes of an event of this shape, both ways and in a batch."""
        held = (each for each in held_inside(self.transform) if isinstance(each, Tensor))
        kin = next((tensor for tensor in held if tensor.is_floating_point()), torch.zeros((), device="cpu"))
        # Inside of all sets that torch knows: a half, and matrices that are the identity.
        one = kin.new_full(shape, 0.5)
        if self.transform.domain.event_dim > 1:
            one = torch.eye(*shape[-2:], device=kin.device, dtype=kin.dtype)
        batch = max(shape) + 1  # no size of the event, so that what counts dimensions from the front is found out
        x = one.expand(batch, *shape)
        name = f"Wrap: {type(self.transform).__name__} cannot take events of shape {tuple(shape)}"
        try:
            with torch.no_grad():
                y, ladj = moved(self.transform, x, len(shape))
                back = moved(self.transform.inv, y, y.dim() - 1)[0]
        except NotImplementedError:  # of the inverse, say: it may be wanted one way only
            return Size(self.transform.forward_shape(shape))
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:
            raise ValueError(f"{name}: {error}; bounds and lengths in it must fit an event of that shape") from error
        if y.shape[:1] != x.shape[:1] or back.shape != x.shape or ladj.shape != x.shape[:1]:
            raise ValueError(
                f"{name}: a batch of shape {tuple(x.shape)} becomes {tuple(y.shape)}, and that {tuple(back.shape)}; "
                "bounds in it must have the event's shape or broadcast to it"
            )
        return y.shape[1:]

    def arguments(self) -> tuple[tuple[object, ...], dict[str, object]]:
        """What it is made of; see ``pyro_flows.recipes``."""
        return (self.transform, self.event_shape), {}

    @property
    def data_shape(self) -> Size:
        return self._data_shape

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:
        return self.reached(REAL[len(self.data_shape)], back=True)

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        return self.reached(REAL[len(self.event_shape)])

    def reached(self, start: constraints.Constraint, back: bool = False) -> constraints.Constraint:
        """Where the transform takes a set, or its inverse does.  Each distribution asks, so the last answer is kept."""
        known = self._images.get(back)
        if known is None or known[0] is not start:
            known = start, image(self.transform.inv if back else self.transform, start)
            if not isinstance(self.transform, nn.Module):  # a module may learn its bounds
                self._images[back] = known
        return known[1]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_images": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Wrap:
        self._images.clear()
        if not isinstance(self.transform, nn.Module):
            map_tensors(self.transform, fn)
        return super()._apply(fn, recurse)

    @functools.cached_property
    def shared_over_time(self) -> bool:
        if len(self.event_shape) != 2 or self.transform.domain.event_dim or self.transform.codomain.event_dim:
            return False
        one = Size((self.event_shape[0], 1))
        if isinstance(self.transform, nn.Module):
            return self.transform.forward_shape(one) == one
        try:
            return self._tried(one) == one
        except ValueError:
            return False

    @property
    def reach(self) -> int | None:
        return 0 if self.shared_over_time else None

    def stepper(self, rows: int, context: Tensor | None = None) -> Stepper:
        """One step of a series after another; see :mod:`pyro_flows.steps`."""
        if not self.shared_over_time:
            raise ValueError(
                f"Wrap: {type(self.transform).__name__} is no map of single numbers that is the same at all times of a "
                "series (C, T)"
            )
        return Elementwise(*(functools.partial(moved, each, dims=0) for each in (self.transform, self.transform.inv)))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return moved(self.transform, x, len(self.event_shape))

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return moved(self.transform.inv, y, len(self.data_shape))


class Chain(FlowTransform):
    r"""Transforms in sequence, first to last from base to data: :math:`f = f_n \circ \dots \circ f_1`.

    Parts may be flows with or without a context (all contexts have the same size: the chain's ``context_dim``), other
    chains, inverses, conditioned views, and torch or Pyro transforms, which are wrapped.  Each direction costs the sum
    of its parts.  A chain within a chain stays one part, whose names in the ``state_dict`` follow its place; where
    chains lie more than eight deep in each other, the layers of the inner ones become parts of this one.

    Args:
        parts: the transforms; event shapes must follow on from each other.

    Raises:
        ValueError: for an empty list, event shapes that do not fit, or contexts of different sizes.
    """

    def __init__(self, parts: Iterable[Transform]) -> None:
        parts = list(parts)
        flows = [part for part in parts if isinstance(part, FlowTransform)]
        if any(_depth(part) >= _DEEPEST for part in flows):
            parts = [leaf for part in parts for leaf in (leaves(part) if part in flows else [part])]
            flows = [part for part in parts if isinstance(part, FlowTransform)]
        if not flows:
            raise ValueError("Chain: expected at least one flow transform, got none")
        sizes = sorted({part.context_dim for part in flows} - {0})
        if len(sizes) > 1:
            raise ValueError(f"Chain: all parts that take a context must agree on context_dim, got {sizes}")
        known = next(part for part in parts if isinstance(part, FlowTransform))
        start = known.event_shape
        for part in reversed(parts[: parts.index(known)]):
            start = Size(part.inverse_shape(start))
        super().__init__(start, sizes[0] if sizes else 0)
        shape = self.event_shape
        self.parts = nn.ModuleList()
        kin = next((t for part in flows for t in (*part.parameters(), *part.buffers()) if t.is_floating_point()), None)
        for k, part in enumerate(parts):
            if not isinstance(part, FlowTransform):
                known = isinstance(part, nn.Module) or kin is None or kin.is_meta
                # Bounds come in the default dtype, on the CPU; the copy of a plain transform follows the flows.
                part = Wrap(part, shape) if known else Wrap(part, shape).to(kin.device, kin.dtype)
            if part.event_shape != shape:
                raise ValueError(
                    f"Chain: part {k} ({type(part).__name__}) expects event shape {tuple(part.event_shape)}, but what "
                    f"comes before it gives {tuple(shape)}"
                )
            self.parts.append(part)
            shape = part.data_shape
        angles = self.periodic
        if angles is not None:
            self.turned(angles)  # every part must treat them as angles

    def arguments(self) -> tuple[tuple[object, ...], dict[str, object]]:
        """What it is made of; see ``pyro_flows.recipes``."""
        return (self._parts(),), {}

    @property
    def sampling_cost(self) -> str:
        return total_cost(part.sampling_cost for part in self.parts)

    @property
    def density_cost(self) -> str:
        return total_cost(part.density_cost for part in self.parts)

    @property
    def reach(self) -> int | None:
        each = [part.reach for part in self._parts()]
        return None if None in each else sum(each)

    @property
    def shared_over_time(self) -> bool:
        return all(part.shared_over_time for part in self._parts())

    @property
    def periodic(self) -> Tensor | None:
        parts = self._parts()
        first = next((k for k, part in enumerate(parts) if part.periodic is not None), None)
        if first is None:
            return None
        angles = parts[first].periodic
        for part in reversed(parts[:first]):
            angles = part.turned(angles, inverse=True)
        return angles

    def turned(self, angles: Tensor, inverse: bool = False) -> Tensor:
        for part in reversed(self._parts()) if inverse else self._parts():
            angles = part.turned(angles, inverse)
        return angles

    @property
    def data_shape(self) -> Size:
        return self._parts()[-1].data_shape

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:
        return self._parts()[0].domain

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        parts = self._parts()
        last = next((k for k in range(len(parts) - 1, 0, -1) if not isinstance(parts[k], Wrap)), 0)
        reached = parts[last].codomain
        for part in parts[last + 1 :]:
            reached = part.reached(reached)
        return reached

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total: Tensor | None = None
        for part in self._parts():
            x, ladj = part._forward_and_ladj(x, context if part.context_dim else None)
            total = ladj if total is None else total + ladj
        return x, total

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total: Tensor | None = None
        for part in reversed(self._parts()):
            y, ladj = part._inverse_and_ladj(y, context if part.context_dim else None)
            total = ladj if total is None else total + ladj
        return y, total

    def _map_shape(self, shape: Size, source: Size, target: Size) -> Size:
        shape = super()._map_shape(shape, source, target)
        cut = len(shape) - len(target)
        # Conditioned parts bring the batch shapes of their contexts.
        batch = (part.forward_shape(part.event_shape) for part in self.parts)
        extra = [b[: len(b) - len(part.data_shape)] for b, part in zip(batch, self.parts, strict=True)]
        return torch.broadcast_shapes(shape[:cut], *extra) + target if any(extra) else shape

    def _parts(self) -> list[FlowTransform]:
        # A ModuleList is slow to index, and this is asked for several times in each call.
        return list(self._modules["parts"]._modules.values())

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[FlowTransform]:
        return iter(self.parts)

    def __getitem__(self, index: int | slice) -> FlowTransform:
        return Chain(self._parts()[index]) if isinstance(index, slice) else self.parts[index]


def leaves(transform: FlowTransform) -> list[FlowTransform]:
    """The layers of a flow from base to data: chains are taken apart, also inside inverses and conditioned views."""
    if type(transform) is Chain:
        return [leaf for part in transform._parts() for leaf in leaves(part)]
    if type(transform) not in (Inverse, Conditioned):
        return [transform]
    inner = leaves(transform.transform)
    if inner == [transform.transform]:
        return [transform]
    if type(transform) is Inverse:
        return [leaf.inv for leaf in reversed(inner)]
    return [Conditioned(leaf, transform.context) if leaf.context_dim else leaf for leaf in inner]


def _depth(transform: FlowTransform) -> int:
    held = isinstance(transform, (Inverse, Conditioned))
    inner = [transform.transform] if held else transform._parts() if isinstance(transform, Chain) else []
    return 1 + max(map(_depth, inner), default=0)


def total_cost(costs: Iterable[str]) -> str:
    """The costs of parts in sequence, added up by their units."""
    counted: dict[str, int] = {}
    for cost in costs:
        for term in cost.split(" + "):
            count, unit = term.split(" ", 1)
            head, _, rest = unit.partition(" ")
            head = "pass" if head == "passes" else head.removesuffix("s") if head != "pass" else head
            unit = " ".join(filter(None, [head, rest]))
            counted[unit] = counted.get(unit, 0) + int(count)
    plural = {"pass": "passes"} | {unit: unit + "s" for unit in ("sweep", "product", "solve", "gather")}

    def term(unit: str, n: int) -> str:
        head, _, rest = unit.partition(" ")
        return " ".join(filter(None, [str(n), head if n == 1 else plural.get(head, head), rest]))

    return " + ".join(term(unit, n) for unit, n in counted.items())


def map_tensors(holder: Distribution | Transform, fn: Callable[[Tensor], Tensor], seen: set[int] | None = None) -> None:
    """Replaces every tensor that a distribution or transform holds, also inside those that it wraps."""
    seen = set() if seen is None else seen
    seen.add(id(holder))  # torch's transforms point at their inverses, and these back
    for name, value in vars(holder).items():
        if isinstance(value, Tensor):
            vars(holder)[name] = fn(value)
        for inner in value if isinstance(value, (list, tuple)) else [value]:
            known = isinstance(inner, nn.Module) or id(inner) in seen
            if isinstance(inner, (Distribution, Transform)) and not known:
                map_tensors(inner, fn, seen)
