"""Numbers of every kind as tensors: the one place where rows from outside come in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["missing", "name_rows", "to_tensor"]

_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # with few operations in torch
_HINTS = {
    "M": "dates are no numbers: give e.g. the days since the first one",
    "m": "durations are no numbers: divide them by a unit, e.g. numpy.timedelta64(1, 's')",
    "c": "give real and imaginary parts as columns of their own",
    "V": "give the fields of a structured array as columns of a plain one",
}
_WORDS = "code categories as integers, and convert numbers that came as text or objects by .astype(float)"


def to_tensor(given: Any, name: str, what: str, kinds: str = "to be real numbers") -> Tensor:
    """A tensor of real numbers, detached, in a dtype that torch computes with.

    Takes tensors, NumPy arrays, data frames and series, and lists of numbers.  Missing numbers of a data frame (``NA``)
    become NaN.

    Args:
        given: the numbers.
        name: who asks, for messages.
        what: its argument, for messages.
        kinds: what that argument may be, for messages.

    Raises:
        ValueError: for a masked array in which something is masked.
        TypeError: for anything that is not real numbers; the message names the columns of a data frame.
    """
    expected = f"{name}: expected {what} {kinds}"
    refused = missing(given)
    if refused is not None:
        raise ValueError(
            f"{name}: {what} is masked in {refused}; a mask means missing: leave these rows out or fill in"
        )
    if isinstance(given, Tensor):
        return _plain(given, name, what)
    array = None
    if hasattr(given, "__array__") or isinstance(given, (list, tuple)):
        array = _array(given, expected)
    if array is None or array.dtype.kind not in "fiub":
        kind = type(given).__name__ if array is None else f"{type(given).__name__} of dtype {array.dtype}"
        hint = "; a Dataset goes in a DataLoader" if isinstance(given, torch.utils.data.Dataset) else ""
        if array is not None:
            hint = f"; {_HINTS.get(array.dtype.kind, _WORDS)}"
        raise TypeError(f"{expected}, got {kind}{hint}")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    # Byte orders and strides that torch does not know are gone after a copy.
    return _plain(torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C")), name, what)


def missing(given: Any) -> str | None:
    """The masked rows of a masked array, or of a list of such, in words; ``None`` if nothing is masked."""
    if isinstance(given, (list, tuple)) and any(isinstance(part, np.ma.MaskedArray) for part in given):
        given = np.ma.asarray(given)
    mask = None
    if isinstance(given, np.ma.MaskedArray):
        mask = torch.from_numpy(np.ma.getmaskarray(given).copy())
    elif isinstance(given, Tensor) and hasattr(given, "get_mask"):  # torch's masked tensors; true is present
        mask = ~given.get_mask()
    if mask is None or not mask.any():
        return None
    rows = mask.reshape(len(mask), -1).any(-1) if mask.dim() else mask.reshape(1)
    return f"{int(rows.sum())} of {len(rows)} rows ({name_rows(rows.nonzero()[:, 0])})"


def name_rows(rows: Tensor) -> str:
    """The first few of these row numbers, in words."""
    first = ", ".join(str(int(row)) for row in rows[:5])
    return f"row{'s' if len(rows) > 1 else ''} {first}{', …' if len(rows) > 5 else ''}"


def _plain(given: Tensor, name: str, what: str) -> Tensor:
    if given.is_complex():
        raise TypeError(f"{name}: expected {what} to be real numbers, got {given.dtype}; {_HINTS['c']}")
    if hasattr(given, "get_mask"):
        given = given.get_data()
    given = given.detach()
    given = (given if given.layout is torch.strided else given.to_dense()).as_subclass(Tensor)
    if given.dtype in _UNSIGNED:
        # NumPy knows whether the largest fits; in float64 the others are as near as they can be.
        small = given.dtype != torch.uint64 or not given.numel() or int(given.cpu().numpy().max()) < 2**63
        given = given.to(torch.int64 if small else torch.float64)
    return given


def _array(given: Any, expected: str) -> np.ndarray | None:
    """As NumPy reads it; data frames by their columns, whose types need not be NumPy's."""
    if isinstance(given, (list, tuple)):
        given = _listed(given)
    columns = getattr(given, "dtypes", None)
    kinds = {} if columns is None else _kinds(given, columns)
    wrong = [f"{label!r} ({kind})" for label, (kind, code) in kinds.items() if code not in "fiub"]
    if wrong:
        code = next(code for _, code in kinds.values() if code not in "fiub")
        more = ", …" if len(wrong) > 5 else ""
        raise TypeError(
            f"{expected}, got a {type(given).__name__} with {', '.join(wrong[:5])}{more}; {_HINTS.get(code, _WORDS)}"
        )
    try:
        array = np.asarray(given)
        if array.dtype == object and kinds:
            array = given.to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError, RuntimeError):  # rows of unequal lengths, among others
        return None
    return array


def _listed(part: Any) -> Any:
    """A tensor in a list, or in one of its lists, as an array."""
    if isinstance(part, (list, tuple)):
        return [_listed(inner) for inner in part]
    if not isinstance(part, Tensor):
        return part
    part = part.detach().cpu()
    return part.double().numpy() if part.dtype == torch.bfloat16 else part.numpy()


def _kinds(frame: Any, columns: Any) -> dict[Any, tuple[Any, str]]:
    """Type and NumPy's letter of each column of a data frame, or of the one of a series."""
    pairs = columns.items() if hasattr(columns, "items") else [(getattr(frame, "name", None), columns)]
    return {label: (kind, kind.kind) for label, kind in pairs if isinstance(getattr(kind, "kind", None), str)}
