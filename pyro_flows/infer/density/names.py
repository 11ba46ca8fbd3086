"""Names of columns: those of data frames, by which later rows are put in order and messages speak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyro_flows.core.checks import first_few

__all__ = ["Names", "by_name", "column_names", "refuse_other_order", "tell_column", "tell_columns"]

Names = Sequence[str] | None


def column_names(given: Any) -> tuple[str, ...] | None:
    """Returns the names of a data frame's columns, or of a series; ``None`` for arrays, and for 0, 1 and so on."""
    if isinstance(given, Tensor) or not hasattr(given, "to_numpy"):
        return None
    labels = getattr(given, "columns", None)
    if labels is None:
        name = getattr(given, "name", None)
        return None if name is None else (str(name),)
    labels = list(labels)
    return None if labels == list(range(len(labels))) else tuple(map(str, labels))


def by_name(given: Any, names: Names, who: str, what: str) -> Any:
    """Selects the columns with these names, in this order, from a data frame, or from a row of one.

    Anything without names is returned as it is.

    Raises:
        ValueError: if a name is missing, or two columns have it.
    """
    own = column_names(given)
    if names is None or own is None or own == tuple(names):
        return given
    frame = hasattr(given, "columns")
    labels = list(given.columns if frame else getattr(given, "index", ()))
    known = [str(label) for label in labels]
    if not frame and not set(names) <= set(known):
        return given  # a column by itself, rather than a row
    wrong = [f"{name!r}" for name in names if known.count(name) != 1]
    if wrong:
        raise ValueError(
            f"{who}: expected {what} with each of the columns {', '.join(map(repr, names))} once, as in the fit; got "
            f"{first_few(map(repr, known), 20)}, where {', '.join(wrong)} "
            f"{'is' if len(wrong) == 1 else 'are'} missing or repeated; rename the columns, or give an array without "
            "names, in the order of the fit"
        )
    return given[[labels[known.index(name)] for name in names]]


def refuse_other_order(given: Any, others: Any, who: str, what: str, what_others: str) -> None:
    """Refuses rows with the labels of others in another order, because rows are paired by position.

    Raises:
        ValueError: for such a pandas index; other labels, and rows without them, pass.
    """
    own, known = (
        each.index if hasattr(each, "to_numpy") and hasattr(each, "index") else None for each in (given, others)
    )
    if own is None or known is None or len(own) != len(known) or own.equals(known) or set(own) != set(known):
        return
    raise ValueError(
        f"{who}: expected {what} in the order of the rows of {what_others}, as they are paired by position; got the "
        f"same labels (index) in another order; give {what}.loc[{what_others}.index], or {what}.to_numpy() if the "
        "order is right as it is"
    )


def tell_column(column: int, names: Names) -> str:
    """The name of a column in quotes, or its number."""
    return str(column) if names is None else repr(names[column])


def tell_columns(columns: Sequence[int], names: Names = None, *, verb: bool = False) -> str:
    """Lists columns by name, or by number; with a ``verb``, as the beginning of a sentence: "column 3 is"."""
    told = first_few((tell_column(k, names) for k in columns), 8)
    return f"column {told}{' is' * verb}" if len(columns) == 1 else f"columns {told}{' are' * verb}"
