"""Values that many rows share: discrete columns, and single values in columns of other numbers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["few_values", "spikes"]

_NUMBERS = 2**24  # looked at in all, in rows far apart where there are more
_CHANCE = 1e-3  # of an alarm in any column, where there is no spike
_UNEVEN = 3.0  # how much more often than its neighbors a value on a grid may come, for a density is no constant
_NEAR = (50, 25)  # neighbors: rows to have among them, and values on either side at most


def few_values(sample: Tensor, columns: list[int]) -> dict[int, float]:
    """Columns with few distinct values in many rows, apart from the most common one; with the smallest step."""
    found = {}
    for column in columns:
        values, counts = sample[:, column].double().unique(return_counts=True)
        if len(values) > 1 and len(values) - 1 <= (len(sample) - int(counts.max())) / 20:
            found[column] = float(values.diff().min())
    return found


def spikes(rows: Tensor, columns: list[int]) -> dict[int, tuple[list[float], int, int]]:
    r"""Values that far more rows have than values next to them, the most common first; its rows, and rows looked at.

    Under a density, rounded to a grid or not, values next to each other come about equally often: the number of rows at
    each is Poisson with a mean :math:`\lambda` that changes slowly.  A value in :math:`c` rows, among :math:`k`
    neighbors that :math:`m` rows have, is a spike if for all :math:`\lambda` the chance

    .. math:: P(\mathrm{Poisson}(3 \lambda) \ge c) \; P(X_1 + \dots + X_k \le m), \quad
        X_i \sim \mathrm{Poisson}(\lambda) \text{ above } 0

    is so small that, in any of all values of all columns, it comes once in 1000 times at most.  The factor 3 is for
    densities that change; the second probability is bounded as by Chernoff.  All neighbors being distinct bounds
    :math:`\lambda`, so a few repeats are telling among distinct numbers, and common ones are not on a grid.

    Args:
        rows: shape ``(rows, columns)``.
        columns: those to look at.
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


def _candidates(counts: Tensor) -> Tensor:
    """Places of values that come more often than their neighbors by the factor that is allowed, the most common first.

    Compared with the mean over any of the neighborhoods that :func:`_is_spike` may choose, without a loop over places.
    """
    sums = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    at = torch.arange(len(counts))
    stands_out = torch.zeros_like(counts, dtype=torch.bool)
    for reach in (3, 6, 12, _NEAR[1]):
        first, last = (at - reach).clamp(min=0), (at + reach + 1).clamp(max=len(counts))
        mean = (sums[last] - sums[first] - counts).double() / (last - first - 1)
        stands_out |= counts > _UNEVEN * mean
    places = (stands_out & (counts >= 4)).nonzero()[:, 0]
    return places[counts[places].argsort(descending=True)][:64]


def _is_spike(counts: Tensor, place: int, chance: float) -> bool:
    least, most = _NEAR
    own = int(counts[place])
    for reach in range(3, most + 1):
        near = torch.cat((counts[max(place - reach, 0) : place], counts[place + 1 : place + 1 + reach]))
        near = near.double().clamp(max=own)  # a larger spike nearby counts as one of this size
        if near.sum() >= least:
            break
    mean = near.mean()
    rate = torch.logspace(-3, 0, 64, dtype=torch.float64) * own
    fitted = _rate_of(mean)
    rate = rate if fitted is None else rate.clamp(min=fitted)
    log_tail = torch.special.gammainc(torch.tensor(float(own), dtype=torch.float64), _UNEVEN * rate).log()
    # Of a Poisson number above 0, P(x) is proportional to rate^x / x!, with the normalizer e^rate - 1.
    gap = _cost(rate, mean) - (0 if fitted is None else _cost(fitted, mean))
    return bool((log_tail - len(near) * gap.clamp(min=0)).max().exp() < chance)


def _cost(rate: Tensor, mean: Tensor) -> Tensor:
    return rate + torch.log(-torch.expm1(-rate)) - mean * rate.log()


def _rate_of(mean: Tensor) -> Tensor | None:
    """The rate at which a Poisson number above 0 has this mean; ``None`` if that is 0."""
    if mean <= 1 + 1e-9:
        return None
    rate = torch.minimum(mean, 2 * (mean - 1))
    for _ in range(60):
        rate = mean * -torch.expm1(-rate)
    return rate
