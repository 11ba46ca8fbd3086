"""Checks of the training rows: constant or dependent columns, repeated values, rows outside the support.

A survey sees rows in the flow's dtype, shuffled.  :class:`~pyro_flows.infer.density.columns.Precision` sees the numbers
as given, in their order.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_flows.core.wrap import Wrap
from pyro_flows.distributions import Flow
from pyro_flows.distributions.made import Head, MixedHead
from pyro_flows.infer.density.columns import at_bounds, few_values, is_free, spikes
from pyro_flows.infer.density.data import name_rows
from pyro_flows.infer.density.units import pull_back, split_chain

__all__ = ["Survey", "reals_of", "refuse_outside"]

_SAMPLE = 4096  # rows to find discrete and dependent columns in
_FEWEST = 100  # rows that can tell a discrete column
_FAR = 10.0  # location or scale, in units of the base, far from the start of training
_TWO_PARTS = (
    "where a bound is a value that rows really share (no rain, a sensor's limit), fit the rows within and give the "
    "share of that value beside them (a two-part model)"
)


def reals_of(flow: Flow, value: Tensor, what: str) -> Tensor:
    """Pulls data back to the trained part of the chain; refuses rows at or beyond a bound of the support."""
    codomain = flow.chain.codomain
    # Some of torch's transforms do not know their codomain.
    inside = torch.tensor(True) if constraints.is_dependent(codomain) else codomain.check(value)
    inside = inside.to(value.device).reshape(*inside.shape[:1], -1).all(-1)
    back = split_chain(flow.chain)[1]
    real, edge = pull_back(back, value)
    if back and edge.shape == value.shape and is_free(back[0].domain, back[0].event_shape).all():
        edge = edge | at_bounds(codomain, value)
    bad = ~inside | edge.reshape(len(value), -1).any(1) | ~real.isfinite().flatten(1).all(1)
    if bad.any():
        columns: list[int] = []
        if edge.shape == value.shape and all(isinstance(part, Wrap) for part in back):
            edge = edge | ~real.isfinite() if real.shape == edge.shape else edge
            columns = edge.flatten(1).any(0).nonzero()[:, 0].tolist()
        remedy = (
            f"move them inside by less than the data are rounded, or end the chain in another transform; {_TWO_PARTS}"
        )
        _refuse(bad, what, f"the flow's support, {codomain}", columns, remedy, value.dtype)
    return real


def refuse_outside(head: Head, value: Tensor, what: str) -> None:
    """Refuses rows outside the support of an autoregressive model."""
    rows = value.detach().flatten(1)
    outside = ~head.inside(rows) | _without_density(head, head.floating(rows))
    if outside.any():
        columns = outside.any(0).nonzero()[:, 0].tolist()
        support = f"the model's support ({type(head).__name__}: expected {head.allowed(columns[0])})"
        counts = head.discrete_dims()[columns[0]]
        remedy = "number categories and levels from 0, or take another head"
        if not counts:
            remedy = f"move them inside by less than the data are rounded, or take another head; {_TWO_PARTS}"
        _refuse(outside.any(1), what, support, columns, remedy, value.dtype)


@torch.no_grad()
def _without_density(head: Head, rows: Tensor) -> Tensor:
    """Marks numbers at a bound where the density is 0 or infinite: of a Gamma, not of an Exponential."""
    if isinstance(head, MixedHead):
        found = torch.zeros_like(rows, dtype=torch.bool)
        for part, dims in zip(head.heads, head.places, strict=True):
            if isinstance(part, Head):
                found[:, dims] = _without_density(part, rows[:, dims])
        return found
    if head.discrete or head.constraint is None:
        return torch.zeros_like(rows, dtype=torch.bool)
    edge = at_bounds(head.constraint, rows)
    if edge.any():
        params = rows.new_full((1, rows.shape[1], head.num_params), 0.3)
        edge &= ~(head.log_prob(rows, params).isfinite() & head.log_prob(rows, -params).isfinite())
    return edge


def _refuse(bad: Tensor, what: str, support: str, columns: list[int], remedy: str, dtype: torch.dtype) -> None:
    rows = bad.nonzero()[:, 0]
    where = f" in {_columns(columns).rsplit(' ', 1)[0]}" if columns else ""
    raise ValueError(
        f"fit_density: {len(rows)} of {len(bad)} rows of {what} ({name_rows(rows)}) lie outside of {support}, or on "
        f"its edge{where}, as {dtype} has them; leave them out, {remedy}"
    )


class Survey:
    """Location and scale of rows that come in pieces, and a sample of the first rows."""

    def __init__(self) -> None:
        self.rows = self._kept = 0
        self._sample: list[tuple[Tensor, Tensor]] = []

    def add(self, value: Tensor, given: Tensor | None = None) -> None:
        """Adds a piece, shape ``(rows, *event_shape)``; ``given`` is in the units of the data."""
        if not len(value):
            return
        given = value if given is None else given
        piece = value.cpu()
        if self._kept < _SAMPLE:
            rows = _SAMPLE - self._kept
            self._sample.append((piece[:rows].clone(), given[:rows].cpu().clone()))
            self._kept += len(self._sample[-1][0])
        lowest, highest = piece.amin(0), piece.amax(0)
        piece = piece.double()
        mean = piece.mean(0)
        squares = (piece - mean).square().sum(0)
        if not self.rows:
            self.mean, self.squares, self.lowest, self.highest = mean, squares, lowest, highest
        else:
            # Chan's update, which does not cancel where the mean is large.
            share = len(piece) / (self.rows + len(piece))
            gap = mean - self.mean
            self.squares = self.squares + squares + gap.square() * self.rows * share
            self.mean = self.mean + gap * share
            self.lowest, self.highest = torch.minimum(self.lowest, lowest), torch.maximum(self.highest, highest)
        self.rows += len(piece)

    def loc_and_scale(self, ends: Tensor | None = None, over_time: bool = False) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation in float64; a constant column has scale 1.

        A column with only one fixed point, in ``ends``, gets the root mean square distance from it as its scale, and a
        location that keeps it in place.  There NaN means any point; infinity leaves a column as it is (0 and 1).  With
        ``over_time``, units are shared over the last dimension, shape ``(C, 1)``.
        """
        loc, std = self.mean, (self.squares / max(self.rows - 1, 1)).sqrt()
        varies = self.highest > self.lowest
        if over_time:
            loc = self.mean.mean(-1, keepdim=True)
            squares = (self.squares + self.rows * (self.mean - loc).square()).sum(-1, keepdim=True)
            std = (squares / (self.rows * self.mean.shape[-1] - 1)).sqrt()
            varies = varies.any(-1, keepdim=True)
        scale = torch.where(varies, std, 1.0)
        if ends is not None:
            ends = ends.amax(-1, keepdim=True) if over_time else ends  # alike within a channel
            about = torch.where(varies, (std.square() + (loc - ends).square()).sqrt(), 1.0)
            free, none = ends.isnan(), ends.isinf()
            loc = torch.where(free, loc, torch.where(none, 0.0, ends * (1 - about)))
            scale = torch.where(free, scale, torch.where(none, 1.0, about))
        return loc, scale

    def warn_of_units(self, left: Tensor, start: tuple[Tensor, Tensor], what: str, remedy: str, level: int) -> None:
        """Warns of columns ``left`` unstandardized and far from ``start``, the first location and scale."""
        loc, scale = self.loc_and_scale()
        ratio = scale / start[1]
        far = left & (((loc - start[0]).abs() > _FAR * start[1]) | (ratio > _FAR) | (ratio < 1 / _FAR))
        columns = far.flatten().nonzero()[:, 0].tolist()
        if columns:
            sizes = ", ".join(f"{loc.flatten()[k]:.3g} ± {scale.flatten()[k]:.3g}" for k in columns[:4])
            warnings.warn(
                f"fit_density: {what}: {_columns(columns)} not standardized, and far from the location and scale that "
                f"training starts with ({sizes}{', …' if len(columns) > 4 else ''}), so that it may take long or fail; "
                f"{remedy}",
                UserWarning,
                stacklevel=level + 1,
            )

    def refuse_degenerate(self, whole: Tensor | None, merged: str) -> None:
        """Raises for constant and dependent columns; all rows, if at hand, confirm what the sample suggests."""
        dtype = self.lowest.dtype
        constant = (self.highest <= self.lowest).flatten().nonzero()[:, 0].tolist()
        if constant:
            if self.rows < 2:
                raise ValueError("fit_density: expected at least 2 rows to fit to, got 1")
            raise ValueError(
                f"fit_density: {_columns(constant)} constant (in {dtype}), so the density there would be infinite; "
                + (merged or "leave out what does not vary")
            )
        sample = torch.cat([real for real, _ in self._sample]).flatten(1)
        whole = sample if whole is None else whole.flatten(1)
        for i, j in _suspects(sample.double()):
            if _dependent(whole[:, i], whole[:, j]):
                raise ValueError(
                    f"fit_density: columns {i} and {j} determine each other exactly (one is a multiple of the other, "
                    "up to a constant), so the density would be infinite on a line; leave one of them out"
                )

    def warn_of_repeats(self, whole: Tensor | None, columns: Tensor, level: int) -> None:
        """Warns of values that many rows share, and of few distinct values, in the marked columns."""
        sample = torch.cat([given for _, given in self._sample]).flatten(1)
        places = columns.flatten().nonzero()[:, 0].tolist()
        grid = few_values(sample, places)
        found = spikes(sample if whole is None else whole.flatten(1), [k for k in places if k not in grid])
        if found:
            told = [
                f"{values[0]:.6g} in {count} of {rows} rows of column {column}"
                + (f" (and {len(values) - 1} more values there)" if len(values) > 1 else "")
                for column, (values, count, rows) in list(found.items())[:4]
            ]
            warnings.warn(
                f"fit_density: values that many rows share, far more than the values next to them: {', '.join(told)}"
                f"{', …' if len(found) > 4 else ''}; a density grows a spike without bound there, so that scores mean "
                "nothing. Model such a value apart (a two-part or hurdle model): fit the flow to the other rows and "
                "give the share of the value beside it, or say in a column of 0 and 1 which rows have it and take MADE "
                "with a MixedHead. Noise does not help",
                UserWarning,
                stacklevel=level + 1,
            )
        if grid and len(sample) >= _FEWEST:
            widths = ", ".join(f"{width:.3g}" for width in list(grid.values())[:8])
            warnings.warn(
                f"fit_density: {_columns(list(grid))} discrete: few distinct values, where a density can grow spikes "
                f"without bound; add uniform noise of the grid's width (dequantize; the smallest steps are {widths}), "
                "or model it as discrete",
                UserWarning,
                stacklevel=level + 1,
            )


def _dependent(first: Tensor, second: Tensor) -> bool:
    """Tells whether two columns are affine functions of each other, up to rounding."""
    eps = torch.finfo(first.dtype).eps
    a, b = first.cpu().double(), second.cpu().double()
    a_mean, b_mean = a.mean(), b.mean()
    slope = ((a - a_mean) * (b - b_mean)).mean() / (a - a_mean).square().mean()
    rest = (b - b_mean) - slope * (a - a_mean)
    return bool(rest.abs().max() <= 16 * eps * (b.abs().max() + slope.abs() * a.abs().max()))


def _suspects(sample: Tensor) -> list[tuple[int, int]]:
    """Pairs columns that seem to depend on earlier ones with these."""
    if len(sample) < 5 or not 2 <= sample.shape[1] <= 4096:
        return []
    sample = sample[:512]
    z = sample - sample.mean(0)
    z = z / z.square().mean(0).sqrt().clamp(min=torch.finfo(z.dtype).tiny)
    correlation = (z.T @ z / len(z)).abs()
    close = torch.triu(correlation > 1 - 1e-6, diagonal=1)
    return [(int(close[:, j].nonzero()[0, 0]), int(j)) for j in close.any(0).nonzero()[:, 0]]


def _columns(columns: list[int]) -> str:
    named = ", ".join(map(str, columns[:8])) + (", …" if len(columns) > 8 else "")
    return f"column {named} is" if len(columns) == 1 else f"columns {named} are"
