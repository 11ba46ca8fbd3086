"""Transforms in sequence, and torch's or Pyro's own transforms as parts of one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Size, Tensor, nn
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Distribution,
    IndependentTransform,
    Transform,
    constraints,
)

from pyro_flows.core import FlowTransform
from pyro_flows.steps import Elementwise, Stepper

__all__ = ["Chain", "Wrap", "map_tensors", "total_cost"]

_ENDS = ("lower_bound", "upper_bound")


class Wrap(FlowTransform):
    """A torch or Pyro transform as a part of a chain, e.g. ``biject_to(constraint)`` or ``ExpTransform()``.

    Args:
        transform: any bijective ``torch.distributions.Transform``.  A module is registered; of any other a copy is
            kept, whose tensors move with this module but are no part of its ``state_dict``.
        event_shape: shape of one event on the base side; elementwise transforms are summed over all of it.
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
        self.transform = transform if isinstance(transform, nn.Module) else copy.deepcopy(transform)
        self._sum_dims = len(self.event_shape) - transform.domain.event_dim

    def arguments(self) -> tuple[tuple[object, ...], dict[str, object]]:
        """What it is made of; see ``pyro_flows.recipes``."""
        return (self.transform, self.event_shape), {}

    @property
    def data_shape(self) -> Size:
        return Size(self.transform.forward_shape(self.event_shape))

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:
        return constraints.independent(self.transform.domain, self._sum_dims)

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        return constraints.independent(image(self.transform, self.transform.domain), self._sum_dims)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Wrap:
        if not isinstance(self.transform, nn.Module):
            map_tensors(self.transform, fn)
        return super()._apply(fn, recurse)

    def _ladj(self, x: Tensor, y: Tensor) -> Tensor:
        ladj = self.transform.log_abs_det_jacobian(x, y)
        # Constant Jacobians may come without the event's size (e.g. a scalar scale), so give them it before summing.
        inner = len(self.event_shape) - self._sum_dims
        whole = x.shape[: x.dim() - inner]
        ladj = ladj.expand(whole)
        return ladj.sum(tuple(range(-self._sum_dims, 0))) if self._sum_dims else ladj

    @property
    def shared_over_time(self) -> bool:
        if len(self.event_shape) != 2 or self.transform.domain.event_dim or self.transform.codomain.event_dim:
            return False
        one = Size((self.event_shape[0], 1))
        return self.transform.forward_shape(one) == one

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
        return Elementwise(self._moved, self._moved_back)

    def _moved(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.transform(x)
        return y, self.transform.log_abs_det_jacobian(x, y)

    def _moved_back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = self.transform.inv(y)
        return x, -self.transform.log_abs_det_jacobian(x, y)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.transform(x)
        return y, self._ladj(x, y)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.transform.inv(y)
        return x, -self._ladj(x, y)


class Chain(FlowTransform):
    r"""Transforms in sequence, first to last from base to data: :math:`f = f_n \circ \dots \circ f_1`.

    Parts may be flows with or without a context (all contexts have the same size: the chain's ``context_dim``), other
    chains, inverses, conditioned views, and torch or Pyro transforms, which are wrapped.  Each direction costs the sum
    of its parts.

    Args:
        parts: the transforms; event shapes must follow on from each other.

    Raises:
        ValueError: for an empty list, event shapes that do not fit, or contexts of different sizes.
    """

    def __init__(self, parts: Iterable[Transform]) -> None:
        parts = list(parts)
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
        for k, part in enumerate(parts):
            part = part if isinstance(part, FlowTransform) else Wrap(part, shape)
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
            reached = image(part.transform, reached)
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


def image(transform: Transform, start: constraints.Constraint) -> constraints.Constraint:
    """Where a transform takes a constrained set; torch's affine transforms say that they reach all real numbers."""
    if isinstance(transform, ComposeTransform):
        for part in transform.parts:
            start = image(part, start)
        return start
    if isinstance(transform, IndependentTransform):
        return constraints.independent(image(transform.base_transform, start), transform.reinterpreted_batch_ndims)
    dims, inner = 0, start
    while isinstance(inner, constraints.independent):
        dims, inner = dims + inner.reinterpreted_batch_ndims, inner.base_constraint
    bounded = isinstance(inner, (constraints.interval, constraints.greater_than, constraints.less_than))
    told = constraints.independent(transform.codomain, max(0, start.event_dim - transform.codomain.event_dim))
    if not (bounded and isinstance(transform, AffineTransform)):
        return told
    ends = [transform.loc + transform.scale * getattr(inner, name) for name in _ENDS if hasattr(inner, name)]
    upwards, downwards = (bool((torch.as_tensor(sign * transform.scale) > 0).all()) for sign in (1, -1))
    if not (upwards or downwards):
        return told
    if isinstance(inner, constraints.interval):
        made = constraints.interval(*(ends if upwards else reversed(ends)))
    elif isinstance(inner, constraints.greater_than) == upwards:
        made = constraints.greater_than(*ends)
    else:
        made = constraints.less_than(*ends)
    return constraints.independent(made, dims)


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
