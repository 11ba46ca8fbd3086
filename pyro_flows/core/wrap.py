"""Torch's and Pyro's own transforms as parts of a flow.

Torch composes transforms by their declared event dimensions, which are wrong for ``StackTransform``, ``CatTransform``
of vectors and ``AffineTransform`` with a scalar scale.  So each inner transform gets its part of the event here.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from pyro.distributions.transforms import LowerCholeskyAffine
from torch import Size, Tensor, nn
from torch.distributions import (
    AffineTransform,
    CatTransform,
    ComposeTransform,
    Distribution,
    IndependentTransform,
    StackTransform,
    Transform,
    constraints,
)

from pyro_flows.core.steps import Elementwise, Stepper
from pyro_flows.core.transform import REAL, FlowTransform

__all__ = ["Wrap", "held_inside", "image", "map_tensors", "moved", "own_copy"]


class Wrap(FlowTransform):
    """A torch or Pyro transform as a part of a chain, e.g. ``biject_to(constraint)`` or ``ExpTransform()``.

    Args:
        transform: any bijective ``torch.distributions.Transform``, also composed (``CatTransform`` and
            ``StackTransform`` with a negative ``dim``).  A module is registered; others are copied, and the copy's
            tensors move with this module but are not in its ``state_dict``.
        event_shape: shape of one event on the base side; elementwise transforms are summed over it.

    Raises:
        ValueError: if the transform is not bijective, cannot take this event, or holds parameters or modules, which a
            copy would not train.

    Example:
        >>> positive = pf.Wrap(torch.distributions.ExpTransform(), event_shape=2)
        >>> flow = pf.Flow(pf.Chain([*pf.realnvp(2), positive]))
        >>> bool((flow.sample((5,)) > 0).all())
        True
    """

    sampling_cost = density_cost = "1 product"
    transform: Transform
    data_shape = Size()

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
            self.data_shape = Size(transform.forward_shape(self.event_shape))
        else:
            self.transform = own_copy(transform)
            self.data_shape = self._tried(self.event_shape)

    def _tried(self, shape: Size) -> Size:
        """The shape of an event's image, tried in both directions."""
        held = [each for each in held_inside(self.transform) if isinstance(each, Tensor)]
        place = held[0].device if held else torch.device("cpu")
        kin = next((tensor for tensor in held if tensor.is_floating_point()), torch.zeros((), device=place))
        # Inside all of torch's sets: a half, and identity matrices.
        one = kin.new_full(shape, 0.5)
        if self.transform.domain.event_dim > 1:
            one = torch.eye(*shape[-2:], device=kin.device, dtype=kin.dtype)
        batch = max(shape) + 1  # no size of the event, to find dimensions counted from the front
        x = one.expand(batch, *shape)
        name = f"Wrap: {type(self.transform).__name__} cannot take events of shape {tuple(shape)}"
        try:
            with torch.no_grad():
                y, ladj = moved(self.transform, x, len(shape))
                back = moved(self.transform.inv, y, y.dim() - 1)[0]
        except NotImplementedError:  # one direction may do
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
        """The constructor's arguments."""
        return (self.transform, self.event_shape), {}

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:
        return self.reached(REAL[len(self.data_shape)], back=True)

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        return self.reached(REAL[len(self.event_shape)])

    def reached(self, start: constraints.Constraint, back: bool = False) -> constraints.Constraint:
        """The image of a set under the transform or its inverse; the last one is cached."""
        known = self._images.get(back)
        if known is None or known[0] is not start:
            known = start, image(self.transform.inv if back else self.transform, start)
            if not isinstance(self.transform, nn.Module):  # a module may learn its bounds
                self._images[back] = known
        return known[1]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_images": {}}

    def extra_repr(self) -> str:
        held = "" if isinstance(self.transform, nn.Module) else f"{_told(self.transform)}, "  # modules are listed below
        return held + super().extra_repr()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Wrap:
        self._images.clear()
        if not isinstance(self.transform, nn.Module):
            map_tensors(self.transform, fn)
        super()._apply(fn, recurse)
        return self

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
        """A stepper through a series; see :mod:`pyro_flows.core.steps`."""
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

    @property
    def elementwise(self) -> bool:
        """Whether the transform maps single numbers."""
        return self.transform.domain.event_dim == self.transform.codomain.event_dim == 0

    @property
    def affine(self) -> bool:  # type: ignore[override]  # of other classes, a constant
        return _one_of(_bare(self.transform), AffineTransform, LowerCholeskyAffine)[0] is not None

    def log_slopes(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """The logarithm of each slope from data to base, of the shape of ``y``."""
        return moved(self.transform.inv, y, 0)[1].expand(y.shape)


def map_tensors(holder: Distribution | Transform, fn: Callable[[Tensor], Tensor]) -> None:
    """Replaces every tensor inside a distribution or transform."""
    holders = [each for each in held_inside(holder) if not isinstance(each, (Tensor, nn.Module))]
    for each in (holder, *holders):
        vars(each).update({name: fn(value) for name, value in vars(each).items() if isinstance(value, Tensor)})


_ENDS = (("lower_bound", -math.inf), ("upper_bound", math.inf))


def moved(transform: Transform, x: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """``y`` and the log-determinant, summed over the last ``dims`` dimensions of ``x``, one event."""
    transform = _bare(transform)
    if isinstance(transform, ComposeTransform):
        total = x.new_zeros(x.shape[: x.dim() - dims])
        for part in transform.parts:
            y, ladj = moved(part, x, dims)
            total = total + ladj
            x, dims = y, dims + y.dim() - x.dim()
        return x, total
    joined = _joined(transform)
    if joined is not None:
        parts, dim, lengths = joined
        stacked, summed = lengths is None, dim >= -dims
        pieces = x.unbind(dim) if stacked else x.split(lengths, dim)
        each = [moved(*pair, dims - (stacked and summed)) for pair in zip(parts, pieces, strict=True)]
        for (y, _), part, piece in zip(each, parts, pieces, strict=True):
            if not stacked and y.shape != piece.shape:
                raise ValueError(
                    f"inside a CatTransform {type(part).__name__} makes {tuple(y.shape)} of {tuple(piece.shape)}, but "
                    "a CatTransform does not know the sizes of both sides"
                )
        join = torch.stack if stacked else torch.cat
        ladjs = [ladj for _, ladj in each]
        ladj = functools.reduce(torch.add, ladjs) if summed else join(ladjs, dim + dims)
        return join([y for y, _ in each], dim), ladj
    inner = transform.domain.event_dim
    if inner > dims:
        raise ValueError(f"{type(transform).__name__} acts on {inner} dimensions at once, of which there are {dims}")
    y = transform(x)
    affine, back = _one_of(transform, AffineTransform)
    if affine is None:
        ladj = transform.log_abs_det_jacobian(x, y)
    else:  # torch counts a scalar scale once
        inner, scale = 0, affine.scale
        log_scale = scale.abs().log() if isinstance(scale, Tensor) else x.new_full((), math.log(abs(scale)))
        ladj = -log_scale if back else log_scale
    # Constant Jacobians may lack the event's size.
    ladj = ladj.expand(x.shape[: x.dim() - inner])
    return y, ladj.sum(tuple(range(inner - dims, 0))) if dims > inner else ladj


def image(transform: Transform, start: constraints.Constraint) -> constraints.Constraint:
    """The image of a constrained set."""
    dims, transform = start.event_dim, _bare(transform)
    if isinstance(transform, ComposeTransform):
        for part in transform.parts:
            start = image(part, start)
        return start
    inner, joined = _peeled(start), _joined(transform)
    if joined is None:
        told, from_all = transform.codomain, _peeled(transform.domain)
        told = _spread(told, dims - transform.domain.event_dim + told.event_dim)
        if isinstance(inner, type(constraints.real)) or str(inner) == str(from_all) or isinstance(transform, nn.Module):
            return told
        return _between(transform, inner, told) or _Image(transform, start, told)
    parts, dim, lengths = joined
    pieces = [image(part, _spread(constraints.real, dims - (lengths is None))) for part in parts]
    if all(isinstance(_peeled(piece), type(constraints.real)) for piece in pieces):
        told = _spread(constraints.real, dims)
    else:
        told = _Stack(pieces, dim) if lengths is None else _Cat(pieces, dim, lengths)
    return told if isinstance(inner, type(constraints.real)) else _Image(transform, start, told)


def own_copy(transform: Transform) -> Transform:
    """A copy without torch's caches, which go stale."""
    for each in (transform, *held_inside(transform)):
        if isinstance(each, nn.Module) or (isinstance(each, Tensor) and each.requires_grad):
            raise ValueError(
                f"Wrap: {type(transform).__name__} holds parameters, of which a copy would be kept that never trains; "
                "give the parts to Chain one by one, so that modules among them are registered, or detach() the tensors"
            )
        if getattr(each, "_cache_size", 0):
            each._cached_x_y = None, None
    made = copy.deepcopy(transform)
    for each in (made, *held_inside(made)):
        if getattr(each, "_cache_size", 0):
            each._cache_size = 0
    return made


def held_inside(holder: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """Tensors, modules, transforms and distributions inside a transform."""
    seen = set() if seen is None else seen
    seen.add(id(holder))
    for name, value in vars(holder).items():
        if name == "_cached_x_y":
            continue
        for inner in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(inner, (Tensor, nn.Module, Transform, Distribution)) and id(inner) not in seen:
                yield inner
                if not isinstance(inner, (Tensor, nn.Module)):
                    yield from held_inside(inner, seen)


def _told(transform: Transform) -> str:
    """A transform by its class, with its parts; torch's own leave these out, or print whole tensors."""
    if isinstance(transform, ComposeTransform):
        return f"Compose({', '.join(map(_told, transform.parts))})"
    if type(transform).__name__ == "_InverseTransform":
        return f"{_told(transform.inv)}.inv"
    return type(transform).__name__


def _bare(transform: Transform) -> Transform:
    """Removes ``IndependentTransform`` around the transform or its inverse."""
    while not isinstance(transform, ComposeTransform):
        whole, back = _one_of(transform, IndependentTransform)
        if whole is None:
            break
        transform = whole.base_transform.inv if back else whole.base_transform
    return transform


def _one_of(transform: Transform, *kinds: type[Transform]) -> tuple[Any, bool]:
    """The transform, or its inverse, if of these kinds, and whether it is the inverse."""
    if isinstance(transform, nn.Module):
        return None, False
    back = isinstance(transform.inv, kinds)
    whole = transform.inv if back else transform
    return (whole if isinstance(whole, kinds) else None), back


def _joined(transform: Transform) -> tuple[list[Transform], int, list[int] | None] | None:
    """The transforms of slices, their dimension, and the sizes concatenated (``None`` for a stack)."""
    whole, back = _one_of(transform, CatTransform, StackTransform)
    if whole is None:
        return None
    if whole.dim >= 0:
        raise ValueError(
            f"{type(whole).__name__} counts dim={whole.dim} from the front, where the batch is; count it from the end, "
            "as dim=-1"
        )
    parts = [part.inv for part in whole.transforms] if back else list(whole.transforms)
    return parts, whole.dim, whole.lengths if isinstance(whole, CatTransform) else None


def _spread(constraint: constraints.Constraint, dims: int) -> constraints.Constraint:
    """The constraint over ``dims`` event dimensions."""
    more = dims - constraint.event_dim
    return constraints.independent(constraint, more) if more > 0 else constraint


def _peeled(constraint: constraints.Constraint) -> constraints.Constraint:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def _between(
    transform: Transform, inner: constraints.Constraint, told: constraints.Constraint
) -> constraints.Constraint | None:
    """The image of an interval or half line under a monotone map, ``None`` if unknown."""
    affine = _one_of(transform, AffineTransform)[0] is not None
    single = affine or not (transform.domain.event_dim or transform.codomain.event_dim)
    if not single or not any(hasattr(inner, name) for name, _ in _ENDS):
        return None
    try:
        up = torch.as_tensor(transform.sign) > 0
    except NotImplementedError:
        return None
    # Torch's affine transforms claim the whole line.
    low, high = (torch.as_tensor(getattr(_peeled(told), name, end)) for name, end in _ENDS)
    with torch.no_grad():
        first = transform(torch.as_tensor(inner.lower_bound)) if hasattr(inner, "lower_bound") else low.where(up, high)
        last = transform(torch.as_tensor(inner.upper_bound)) if hasattr(inner, "upper_bound") else high.where(up, low)
    ends = first.where(up, last), last.where(up, first)
    if any(end.is_meta or end.isnan().any() for end in ends):
        return None
    least, most = (end.item() if end.dim() == 0 else end for end in ends)
    bounded = [not bool(end.isinf().all()) for end in ends]
    made: constraints.Constraint = constraints.real
    if all(bounded):
        made = constraints.interval(least, most)
    elif any(bounded):
        made = constraints.greater_than(least) if bounded[0] else constraints.less_than(most)
    return _spread(made, told.event_dim)


class _Cat(constraints.cat):
    """Slices of an event in sets of their own, of vectors too."""

    def __repr__(self) -> str:
        return f"{type(self).__name__[1:]}({', '.join(map(repr, self.cseq))})"

    def _pieces(self, value: Tensor) -> tuple[Tensor, ...]:
        return value.split(self.lengths, self.dim)

    def check(self, value: Tensor) -> Tensor:
        checks = [each.check(piece) for each, piece in zip(self.cseq, self._pieces(value), strict=True)]
        return torch.stack(checks).all(0)


class _Stack(_Cat):
    def __init__(self, cseq: Sequence[constraints.Constraint], dim: int) -> None:
        super().__init__(cseq, dim, [1] * len(cseq))

    @property
    def event_dim(self) -> int:  # type: ignore[override]  # as torch's own, whose base declares an attribute
        return super().event_dim + 1

    def _pieces(self, value: Tensor) -> tuple[Tensor, ...]:
        return value.unbind(self.dim)


class _Image(constraints.Constraint):
    """The image of a set, checked by tracing a value back."""

    def __init__(self, transform: Transform, start: constraints.Constraint, told: constraints.Constraint) -> None:
        self.transform, self.start, self.told = transform, start, told
        self.event_dim = told.event_dim

    def check(self, value: Tensor) -> Tensor:
        x: Any = moved(self.transform.inv, value, self.told.event_dim)[0]
        return self.told.check(value) & self.start.check(x)

    def __repr__(self) -> str:
        return f"{type(self.transform).__name__} of {self.start}"
