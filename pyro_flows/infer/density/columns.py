"""What each number of an event is: any real one, one within bounds, or at a bound of its support."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import constraints as pyro_constraints
from torch import Size, Tensor
from torch.distributions import constraints

__all__ = ["at_bounds", "is_free"]


def is_free(constraint: constraints.Constraint, shape: Size) -> Tensor:
    """Which numbers of an event may be any real ones: boolean, of shape ``shape``, on the CPU.

    Looks into ``independent``, ``cat`` and ``stack``.
    """
    free = torch.zeros((1, *shape), dtype=torch.bool, device="cpu")  # of one row
    for part, own in _pieces(constraint, free):
        own[...] = part is constraints.real or isinstance(part, type(constraints.real))
    return free[0]


def at_bounds(constraint: constraints.Constraint, value: Tensor) -> Tensor:
    """Which numbers are at or beyond a bound of their support, of the shape of ``value``.

    A closed interval takes its own ends for inside, but a bijection from the line never reaches them.  For vectors,
    these are zeros of a simplex, entries of an ordered vector that do not exceed the one before them, and diagonals of
    Cholesky factors that are not positive.

    Args:
        constraint: of one event.
        value: shape ``(rows, *event_shape)``.
    """
    found = torch.zeros_like(value, dtype=torch.bool)
    for part, x, bad in _pieces(constraint, value, found):
        lower, upper = (_bound(part, name, x) for name in ("lower_bound", "upper_bound"))
        # The last step before the end of an interval is where a sigmoid clamps, and where ends themselves are rounded.
        last = 0 if lower is None or upper is None else torch.finfo(x.dtype).eps
        if lower is not None:
            bad |= (x <= lower) | (x - lower < last * lower.abs())
        if upper is not None:
            size = upper.abs() if lower is None else torch.maximum(upper.abs(), upper - lower)
            bad |= (x >= upper) | (upper - x < last * size)
        if isinstance(part, type(constraints.simplex)):
            bad |= x <= 0
        elif isinstance(part, (type(pyro_constraints.ordered_vector), type(pyro_constraints.positive_ordered_vector))):
            bad[..., 1:] |= x.diff(dim=-1) <= 0
            if isinstance(part, type(pyro_constraints.positive_ordered_vector)):
                bad[..., 0] |= x[..., 0] <= 0
        elif isinstance(part, (type(constraints.lower_cholesky), type(constraints.corr_cholesky))):
            bad.diagonal(dim1=-2, dim2=-1).logical_or_(x.diagonal(dim1=-2, dim2=-1) <= 0)
    return found


def _bound(constraint: constraints.Constraint, name: str, like: Tensor) -> Tensor | None:
    bound = getattr(constraint, name, None)
    return None if bound is None else torch.as_tensor(bound, dtype=like.dtype, device=like.device)


def _inner(constraint: constraints.Constraint) -> constraints.Constraint:
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    return constraint


def _pieces(constraint: constraints.Constraint, *views: Tensor) -> list[tuple[Any, ...]]:
    """The constraints within ``cat`` and ``stack``, each with its part of every view, shape ``(rows, *event)``."""
    constraint = _inner(constraint)
    if not isinstance(constraint, (constraints.cat, constraints.stack)):
        return [(constraint, *views)]
    axis = constraint.dim if constraint.dim < 0 else constraint.dim - views[0].dim()
    stacked = isinstance(constraint, constraints.stack)
    lengths = [1] * len(constraint.cseq) if stacked else constraint.lengths
    if axis <= -views[0].dim() or views[0].shape[axis] != sum(lengths):
        return [(constraint, *views)]  # over the rows, or of other events than these
    found, start = [], 0
    for part, length in zip(constraint.cseq, lengths, strict=True):
        own = [v.select(axis, start) if stacked else v.narrow(axis, start, length) for v in views]
        found += _pieces(part, *own)
        start += length
    return found
