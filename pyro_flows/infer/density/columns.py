"""Columns of data that are free, at a bound, repeated, or merged by a conversion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import constraints as pyro_constraints
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_flows.core.modes import on_cpu
from pyro_flows.infer.density.names import Names, tell_columns

__all__ = ["Precision", "at_bounds", "copied", "few_values", "is_free", "spikes"]


def is_free(constraint: constraints.Constraint, shape: Size) -> Tensor:
    """Marks the numbers of an event that may be any real number: boolean, shape ``shape``, on the CPU."""
    free = torch.zeros((1, *shape), dtype=torch.bool, device="cpu")  # one row
    for part, own in _pieces(constraint, free):
        own[...] = part is constraints.real or isinstance(part, type(constraints.real))
    return free[0]


def at_bounds(constraint: constraints.Constraint, value: Tensor) -> Tensor:
    """Marks numbers of ``value``, shape ``(rows, *event_shape)``, at or beyond a bound of their support.

    A bijection from the line never reaches the ends of a closed interval.  Other bounds are zeros of a simplex, entries
    of an ordered vector that do not exceed the previous one, and Cholesky diagonals that are not positive.
    """
    found = torch.zeros_like(value, dtype=torch.bool)
    for part, x, bad in _pieces(constraint, value, found):
        lower, upper = (_bound(part, name, x) for name in ("lower_bound", "upper_bound"))
        # A sigmoid clamps one step before the end of an interval, and the ends are rounded.
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


def _pieces(constraint: constraints.Constraint, *views: Tensor) -> list[tuple[Any, ...]]:
    """Splits ``cat`` and ``stack`` into constraints with their part of every view, shape ``(rows, *event)``."""
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    if not isinstance(constraint, (constraints.cat, constraints.stack)):
        return [(constraint, *views)]
    axis = constraint.dim if constraint.dim < 0 else constraint.dim - views[0].dim()
    stacked = isinstance(constraint, constraints.stack)
    lengths = [1] * len(constraint.cseq) if isinstance(constraint, constraints.stack) else constraint.lengths
    if axis <= -views[0].dim() or views[0].shape[axis] != sum(lengths):
        return [(constraint, *views)]  # over the rows, or for other events
    found, start = [], 0
    for part, length in zip(constraint.cseq, lengths, strict=True):
        own = [v.select(axis, start) if stacked else v.narrow(axis, start, length) for v in views]
        found += _pieces(part, *own)
        start += length
    return found


_NUMBERS = 2**24  # numbers examined; of more, rows far apart
_CHANCE = 1e-3  # of a false alarm in any column
_UNEVEN = 3.0  # allowed excess over the neighbors, because a density varies
_NEAR = (50, 25)  # neighbors: enough rows; most values on either side


def few_values(sample: Tensor, columns: list[int]) -> dict[int, float]:
    """Finds columns with few distinct values besides the most common, and their smallest steps."""
    found = {}
    for column in columns:
        values, counts = sample[:, column].double().unique(return_counts=True)
        if len(values) > 1 and len(values) - 1 <= (len(sample) - int(counts.max())) / 20:
            found[column] = float(values.diff().min())
    return found


def spikes(rows: Tensor, columns: list[int]) -> dict[int, tuple[list[float], int, int]]:
    r"""Finds values in far more rows than their neighbors, with the rows of the most common and the rows examined.

    Under a density, rounded or not, the number of rows at each value is Poisson with a mean :math:`\lambda` that
    changes slowly.  A value in :math:`c` rows, among :math:`k` neighbors in :math:`m` rows, is a spike if for all
    :math:`\lambda` the chance

    .. math:: P(\mathrm{Poisson}(3 \lambda) \ge c) \; P(X_1 + \dots + X_k \le m), \quad
        X_i \sim \mathrm{Poisson}(\lambda) \text{ above } 0

    makes a false alarm in any column rarer than 1 in 1000.  The factor 3 allows for varying densities; Chernoff's bound
    gives the second probability.
    """
    step = max(-(-rows.shape[0] * max(len(columns), 1) // _NUMBERS), 1)
    found = {}
    for column in columns:
        values, counts = rows[::step, column].cpu().unique(return_counts=True)
        if len(values) == 1 or counts.max() < 4:
            continue
        chance = _CHANCE / len(values) / len(columns)
        peaks = [k for k in _candidates(counts).tolist() if _is_spike(counts, k, chance)]
        if peaks:
            found[column] = ([float(values[k]) for k in peaks], int(counts[peaks[0]]), len(rows[::step]))
    return found


@on_cpu
def _candidates(counts: Tensor) -> Tensor:
    """Lists places that exceed the mean of a neighborhood by the allowed factor, the most common first."""
    sums = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    at = torch.arange(len(counts))
    stands_out = torch.zeros_like(counts, dtype=torch.bool)
    for reach in (3, 6, 12, _NEAR[1]):
        first, last = (at - reach).clamp(min=0), (at + reach + 1).clamp(max=len(counts))
        mean = (sums[last] - sums[first] - counts).double() / (last - first - 1)
        stands_out |= counts > _UNEVEN * mean
    places = (stands_out & (counts >= 4)).nonzero()[:, 0]
    return places[counts[places].argsort(descending=True)][:64]


@on_cpu
def _is_spike(counts: Tensor, place: int, chance: float) -> bool:
    least, most = _NEAR
    own = int(counts[place])
    for reach in range(3, most + 1):
        near = torch.cat((counts[max(place - reach, 0) : place], counts[place + 1 : place + 1 + reach]))
        near = near.double().clamp(max=own)  # a larger spike nearby counts as one of this size
        if near.sum() >= least:
            break
    mean = near.mean()
    fitted = _rate_of(mean)
    rate = (torch.logspace(-3, 0, 64, dtype=torch.float64) * own).clamp(min=fitted)
    log_tail = torch.special.gammainc(torch.tensor(float(own), dtype=torch.float64), _UNEVEN * rate).log()
    # For a Poisson number above 0, P(x) is rate^x / x! / (e^rate - 1).
    gap = _cost(rate, mean) - _cost(fitted, mean)
    return bool((log_tail - len(near) * gap.clamp(min=0)).max().exp() < chance)


def _cost(rate: Tensor, mean: Tensor) -> Tensor:
    return rate + torch.log(-torch.expm1(-rate)) - mean * rate.log()


def _rate_of(mean: Tensor) -> Tensor:
    """Solves for the rate, above 0, at which a Poisson number above 0 has this mean."""
    rate = torch.minimum(mean, 2 * (mean - 1)).clamp(min=1e-9)
    for _ in range(60):
        rate = mean * -torch.expm1(-rate)
    return rate


_ROWS = 1024  # rows examined; with more, harmless rounding would count
_LEFT = 0.75  # share of numbers that must stay distinct


class Precision:
    """Counts the distinct numbers of each column before and after a conversion, piece by piece.

    Seconds since 1980 or Julian dates need more digits than float32 has: thousands of values can become a few.
    """

    def __init__(self) -> None:
        self._rows = 0
        self._pieces: list[tuple[Tensor, Tensor]] = []

    def add(self, given: Tensor, converted: Tensor) -> None:
        """Adds a piece before and after the conversion, shape ``(rows, *event_shape)``."""
        wider = given.is_floating_point() and torch.promote_types(given.dtype, converted.dtype) == converted.dtype
        alike = wider or given.dtype in (torch.bool, converted.dtype)
        if alike or not given.dim() or not len(given) or self._rows >= _ROWS:
            return
        # Rows far apart, because neighbors may be alike.
        step = max(len(given) // (_ROWS - self._rows), 1)
        chosen = [piece[::step][: _ROWS - self._rows].cpu() for piece in (given, converted)]
        self._pieces.append((chosen[0], chosen[1]))
        self._rows += len(chosen[0])

    def merged(self) -> dict[int, tuple[int, int]]:
        """Maps columns that lose many distinct numbers to their counts before and after."""
        if not self._pieces:
            return {}
        before, after = (
            _distinct(torch.cat(pieces).reshape(self._rows, -1)) for pieces in zip(*self._pieces, strict=True)
        )
        lost = (after < _LEFT * before).nonzero()[:, 0].tolist()
        return {column: (int(before[column]), int(after[column])) for column in lost}

    def told(self, what: str, names: Names = None) -> str:
        """Describes the columns of :meth:`merged`, if any, with a remedy."""
        merged = self.merged()
        if not merged:
            return ""
        given, used = (piece.dtype for piece in self._pieces[0])
        before, after = next(iter(merged.values()))
        remedy = "flow.float()" if used.itemsize < 4 and given.itemsize == 4 else "flow.double()"
        return (
            f"the flow computes in {used}, which cannot tell apart the numbers in "
            f"{tell_columns(list(merged), names)} of {what}: {before} distinct values in {given} become {after} (in "
            f"{self._rows} rows); take {remedy} and score in that dtype, or shift and scale such a column first, in "
            f"{given}"
        )


def _distinct(rows: Tensor) -> Tensor:
    """Counts the distinct values of each column."""
    ordered = rows.sort(0).values
    return (ordered[1:] != ordered[:-1]).sum(0) + 1


_FRESH, _LOOKED_AT = 1000, 64  # rows, and columns among which one is chosen, to find copies by
_TELLING = 0.8  # of the numbers that fresh rows share with rows seen, unless rows agree by chance


def copied(seen: Sequence[Tensor], fresh: Sequence[Tensor]) -> float:
    """The share of fresh rows that are copies of rows seen; 0 where rounding alone may explain this.

    Rows come as values and contexts, if any.  A number of the column with most values tells of copies if all rows that
    share it are the same.  In rounded or discrete data, few do.  Rows of one number cannot tell.
    """
    own = torch.cat([each[:_FRESH].flatten(1) for each in fresh], 1)
    if own.shape[1] < 2 or not own.is_floating_point():
        return 0.0
    places = torch.linspace(0, own.shape[1] - 1, min(own.shape[1], _LOOKED_AT)).long().tolist()
    place = max(places, key=lambda k: len(own[:, k].unique()))
    size = seen[0][:1].numel()
    column = seen[0].flatten(1)[:, place] if place < size else seen[1].flatten(1)[:, place - size]
    alike = torch.isin(column.to(own.dtype), own[:, place]).nonzero()[:, 0][: 10 * _FRESH]
    known = torch.cat([each[alike].flatten(1) for each in seen], 1)
    with_number: dict[float, set[bytes]] = {number: set() for number in known[:, place].tolist()}
    mine = list(zip(own[:, place].tolist(), _as_bytes(own), strict=True))
    for number, row in (*mine, *zip(known[:, place].tolist(), _as_bytes(known), strict=True)):
        if number in with_number:
            with_number[number].add(row)
    telling = {number for number, rows in with_number.items() if len(rows) == 1}
    if len(telling) < _TELLING * len(with_number):
        return 0.0
    return sum(number in telling for number, _ in mine) / len(mine)


def _as_bytes(rows: Tensor) -> list[bytes]:
    return [row.tobytes() for row in (rows + 0.0).cpu().numpy()]  # the sum has no -0.0
