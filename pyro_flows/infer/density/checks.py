"""What makes a density degenerate: constant and dependent columns, repeated values, rows outside of the support."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_flows.distributions import Flow
from pyro_flows.infer.density.data import name_rows
from pyro_flows.infer.density.units import pull_back, split_chain

__all__ = ["Survey", "reals_of"]

_SAMPLE = 4096  # rows that are looked at for repeated values and dependent columns


def reals_of(flow: Flow, value: Tensor, what: str) -> Tensor:
    """Data as the part of the chain that learns sees them; an error names rows outside of the flow's support."""
    codomain = flow.chain.codomain
    # Some of torch's transforms do not know their own codomain.
    inside = torch.tensor(True) if constraints.is_dependent(codomain) else codomain.check(value)
    back = split_chain(flow.chain)[1]
    real = pull_back(back, value) if back else value
    # The edge of a support may pass its check and still be infinitely far away.
    bad = ~(inside.to(real.device) & real.isfinite().reshape(len(real), -1).all(-1))
    if bad.any():
        rows = bad.nonzero()[:, 0]
        raise ValueError(
            f"fit_density: {len(rows)} of {len(value)} rows of {what} ({name_rows(rows)}) lie outside of the flow's "
            f"support, {codomain}, or on its edge; leave them out, move them inside, or end the chain "
            "in another transform"
        )
    return real


class Survey:
    """Location and scale of rows that come in pieces, and a sample of the first of them."""

    def __init__(self) -> None:
        self.rows = self._kept = 0
        self._sample: list[Tensor] = []

    def add(self, value: Tensor) -> None:
        """Takes another piece, shape ``(rows, *event_shape)``."""
        if not len(value):
            return
        piece = value.cpu()
        if self._kept < _SAMPLE:
            self._sample.append(piece[: _SAMPLE - self._kept].clone())
            self._kept += len(self._sample[-1])
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

    def loc_and_scale(self, leave: Tensor | None = None, over_time: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation in float64; 0 and 1 for columns to be left as they are, 1 for constant ones.

        Args:
            leave: boolean, columns to be left.
            over_time: whether the last dimension is time and has one of each for all of it, shape ``(C, 1)``.
        """
        if over_time:
            loc = self.mean.mean(-1, keepdim=True)
            squares = (self.squares + self.rows * (self.mean - loc).square()).sum(-1, keepdim=True)
            return loc, (squares / (self.rows * self.mean.shape[-1] - 1)).sqrt()
        std = (self.squares / max(self.rows - 1, 1)).sqrt()
        loc, scale = self.mean, torch.where(self.highest > self.lowest, std, 1.0)
        if leave is not None:
            loc, scale = torch.where(leave, 0.0, loc), torch.where(leave, 1.0, scale)
        return loc, scale

    def refuse_degenerate(self, whole: Tensor | None, stacklevel: int) -> None:
        """Raises for constant and dependent columns, warns of repeated values.

        Args:
            whole: all rows, where they are at hand, to bear out what the sample suggests of two columns.
            stacklevel: of the warning, seen from here.
        """
        dtype = self.lowest.dtype
        constant = (self.highest <= self.lowest).flatten().nonzero()[:, 0].tolist()
        if constant:
            if self.rows < 2:
                raise ValueError("fit_density: expected at least 2 rows to fit to, got 1")
            raise ValueError(
                f"fit_density: {_columns(constant)} constant (in {dtype}), so the density there would be infinite; "
                "leave out what does not vary"
            )
        sample = torch.cat(self._sample).flatten(1)
        whole = sample if whole is None else whole.flatten(1)
        for i, j in _suspects(sample.double()):
            if _dependent(whole[:, i], whole[:, j]):
                raise ValueError(
                    f"fit_density: columns {i} and {j} determine each other exactly (one is a multiple of the other, "
                    "up to a constant), so the density would be infinite on a line; leave one of them out"
                )
        grid = _repeated(sample.double())
        if grid:
            widths = ", ".join(f"{width:.3g}" for _, width in grid[:8])
            warnings.warn(
                f"fit_density: {_columns([column for column, _ in grid])} discrete: few distinct values or one very "
                "common value, where a density can grow a spike without bound; add uniform noise of the grid's width "
                f"(dequantise; the smallest steps are {widths}) or model it as discrete",
                UserWarning,
                stacklevel=stacklevel + 1,
            )


def _dependent(first: Tensor, second: Tensor) -> bool:
    """Whether two columns are an affine function of each other, up to the rounding of their dtype."""
    eps = torch.finfo(first.dtype).eps
    a, b = first.cpu().double(), second.cpu().double()
    a_mean, b_mean = a.mean(), b.mean()
    slope = ((a - a_mean) * (b - b_mean)).mean() / (a - a_mean).square().mean()
    rest = (b - b_mean) - slope * (a - a_mean)
    return bool(rest.abs().max() <= 16 * eps * (b.abs().max() + slope.abs() * a.abs().max()))


def _suspects(sample: Tensor) -> list[tuple[int, int]]:
    """Pairs of columns that look dependent: one for each column that depends on an earlier one."""
    if len(sample) < 5 or not 2 <= sample.shape[1] <= 4096:
        return []
    sample = sample[:512]
    z = sample - sample.mean(0)
    z = z / z.square().mean(0).sqrt().clamp(min=torch.finfo(z.dtype).tiny)
    correlation = (z.T @ z / len(z)).abs()
    close = torch.triu(correlation > 1 - 1e-6, diagonal=1)
    return [(int(close[:, j].nonzero()[0, 0]), int(j)) for j in close.any(0).nonzero()[:, 0]]


def _repeated(sample: Tensor) -> list[tuple[int, float]]:
    """Columns with few distinct values in many rows, or with one in a tenth of them; with the smallest step."""
    rows = len(sample)
    if rows < 100:
        return []
    ordered = sample.sort(0).values
    steps = ordered.diff(dim=0)
    few = (steps > 0).sum(0) + 1 <= rows / 20
    common = (ordered[rows // 10 :] == ordered[: rows - rows // 10]).any(0)
    smallest = torch.where(steps > 0, steps, torch.inf).amin(0)
    return [(int(column), float(smallest[column])) for column in (few | common).nonzero()[:, 0]]


def _columns(columns: list[int]) -> str:
    named = ", ".join(map(str, columns[:8])) + (", …" if len(columns) > 8 else "")
    return f"column {named} is" if len(columns) == 1 else f"columns {named} are"
