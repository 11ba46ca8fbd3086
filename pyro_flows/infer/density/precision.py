"""What the conversion of data to a flow's dtype loses: distinct numbers that become one."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Precision"]

_ROWS = 1024  # looked at; more would call rounding by which no density suffers a loss
_LEFT = 0.75  # the share of distinct numbers that must stay so


class Precision:
    """Counts the distinct numbers of each column before and after a conversion, in rows that come in pieces.

    Offsets such as times since 1980 in seconds or Julian dates need more digits than float32 has: there, thousands of
    numbers in float64 can become a few, or one.
    """

    def __init__(self) -> None:
        self._rows = 0
        self._pieces: list[tuple[Tensor, Tensor]] = []
        self.dtypes: tuple[torch.dtype, torch.dtype] | None = None

    def add(self, given: Tensor, converted: Tensor) -> None:
        """Takes another piece, before and after the conversion, shape ``(rows, *event_shape)``."""
        wider = given.is_floating_point() and torch.promote_types(given.dtype, converted.dtype) == converted.dtype
        if wider or given.dtype in (torch.bool, converted.dtype):
            return
        if not given.dim() or not len(given) or self._rows >= _ROWS:
            return
        # Rows far apart, for those that stand together may be alike.
        step = max(len(given) // (_ROWS - self._rows), 1)
        chosen = [piece[::step][: _ROWS - self._rows].cpu() for piece in (given, converted)]
        self._pieces.append((chosen[0], chosen[1]))
        self._rows += len(chosen[0])
        self.dtypes = (given.dtype, converted.dtype)

    def merged(self) -> dict[int, tuple[int, int]]:
        """Columns that lose a good part of their distinct numbers: how many there were, and how many are left."""
        if not self._pieces:
            return {}
        before, after = (
            _distinct(torch.cat(pieces).reshape(self._rows, -1)) for pieces in zip(*self._pieces, strict=True)
        )
        lost = (after < _LEFT * before).nonzero()[:, 0].tolist()
        return {column: (int(before[column]), int(after[column])) for column in lost}

    def told(self, what: str) -> str:
        """What to say of the columns that :meth:`merged` finds, and what to do."""
        merged, (given, used) = self.merged(), self.dtypes
        columns = ", ".join(map(str, list(merged)[:8])) + (", …" if len(merged) > 8 else "")
        before, after = next(iter(merged.values()))
        remedy = "flow.float()" if used.itemsize < 4 and given.itemsize == 4 else "flow.double()"
        return (
            f"the flow computes in {used}, which cannot tell apart the numbers in column{'s' * (len(merged) > 1)} "
            f"{columns} of {what}: {before} distinct values in {given} become {after} (in {self._rows} rows); take "
            f"{remedy} and score in that dtype, or shift and scale such a column first, in {given}"
        )


def _distinct(rows: Tensor) -> Tensor:
    """The number of distinct values in each column."""
    ordered = rows.sort(0).values
    return (ordered[1:] != ordered[:-1]).sum(0) + 1
