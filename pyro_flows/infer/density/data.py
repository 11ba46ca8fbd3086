"""The data of a fit: checked once, converted, split, and handed out in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, DistributedSampler

from pyro_flows.core.checks import first_few, first_floating
from pyro_flows.distributions import Ensemble, Flow
from pyro_flows.infer.density.columns import Precision
from pyro_flows.infer.density.names import Names, column_names, refuse_other_order, tell_column
from pyro_flows.infer.density.settings import FEW_ROWS
from pyro_flows.infer.machine.processes import count, everyone, part

__all__ = ["Expected", "Loader", "Rows", "Source", "admit_rows", "expected_by", "name_rows", "to_tensor"]

_CHUNK = 2**18  # numbers in a chunk of rows
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # with few operations in torch


_HINTS = {
    "M": "dates are no numbers: give e.g. the days since the first one",
    "m": "durations are no numbers: divide them by a unit, e.g. numpy.timedelta64(1, 's')",
    "c": "give real and imaginary parts as columns of their own",
    "V": "give the fields of a structured array as columns of a plain one",
}


_WORDS = "code categories as integers, and convert numbers that came as text or objects by .astype(float)"


def to_tensor(given: Any, name: str, what: str, kinds: str = "to be real numbers") -> Tensor:
    """Converts data to a detached tensor of real numbers, in a dtype with which torch computes.

    ``given`` is a tensor, NumPy array, data frame or series, or a list of numbers; ``NA`` becomes NaN.

    Raises:
        ValueError: for a masked entry.
        TypeError: for anything but real numbers; names the columns of a data frame.
    """
    expected = f"{name}: expected {what} {kinds}"
    _refuse_masked(given, name, what)
    if isinstance(given, Tensor):
        return _plain(given, name, what)
    array = _array(given, expected) if hasattr(given, "__array__") or isinstance(given, (list, tuple)) else None
    if array is None or array.dtype.kind not in "fiub":
        if array is not None and column_names(given) is not None and hasattr(given, "columns"):
            _refuse_columns(given, [(label, np.asarray(given[label]).dtype) for label in given.columns], expected)
        kind = type(given).__name__ if array is None else f"{type(given).__name__} of dtype {array.dtype}"
        hint = "; a Dataset goes in a DataLoader" if isinstance(given, torch.utils.data.Dataset) else ""
        if array is not None:
            hint = f"; {_HINTS.get(array.dtype.kind, _WORDS)}"
        raise TypeError(f"{expected}, got {kind}{hint}")
    # A copy drops byte orders, strides and long floats that torch does not know.
    long = array.dtype.kind == "f" and array.dtype.itemsize > 8
    dtype = np.float64 if long else array.dtype.newbyteorder("=")
    return _plain(torch.from_numpy(np.array(array, dtype=dtype, order="C")), name, what)


def _refuse_masked(given: Any, name: str, what: str) -> None:
    if isinstance(given, (list, tuple)) and any(isinstance(part, np.ma.MaskedArray) for part in given):
        given = np.ma.asarray(given)
    mask = None
    if isinstance(given, np.ma.MaskedArray):
        mask = torch.from_numpy(np.ma.getmaskarray(given).copy())
    elif isinstance(given, Tensor) and hasattr(given, "get_mask"):  # torch's masked tensors; true is present
        mask = ~given.get_mask()
    if mask is not None and mask.any():
        rows = mask.reshape(len(mask), -1).any(-1) if mask.dim() else mask.reshape(1)
        raise ValueError(
            f"{name}: {what} is masked in {int(rows.sum())} of {len(rows)} rows ({name_rows(rows.nonzero()[:, 0])}); a "
            "mask means missing: leave these rows out or fill in"
        )


def name_rows(rows: Tensor) -> str:
    """Names the first few rows."""
    return f"row{'s' if len(rows) > 1 else ''} {first_few(rows.tolist(), 5)}"


def _plain(given: Tensor, name: str, what: str) -> Tensor:
    if given.is_complex():
        raise TypeError(f"{name}: expected {what} to be real numbers, got {given.dtype}; {_HINTS['c']}")
    if hasattr(given, "get_mask"):
        given = given.get_data()  # type: ignore[attr-defined]  # a masked tensor
    given = given.detach()
    given = (given if given.layout is torch.strided else given.to_dense()).as_subclass(Tensor)
    if given.dtype in _UNSIGNED:
        # NumPy can compare them; float64 is nearest where the largest does not fit.
        small = given.dtype != torch.uint64 or not given.numel() or int(given.cpu().numpy().max()) < 2**63
        given = given.to(torch.int64 if small else torch.float64)
    return given


def _array(given: Any, expected: str) -> np.ndarray | None:
    """Makes an array; the types of a data frame's columns need not be NumPy's."""
    if isinstance(given, (list, tuple)):
        given = tree_map_only(Tensor, _numbers, given)
    columns: Any = getattr(given, "dtypes", None)
    pairs: Any = columns.items() if hasattr(columns, "items") else [(getattr(given, "name", None), columns)]
    # Types that are not NumPy's may lack its letter.
    kinds = [(label, kind) for label, kind in pairs if isinstance(getattr(kind, "kind", None), str)]
    _refuse_columns(given, kinds, expected)
    try:
        array = np.asarray(given)
        if array.dtype == object and kinds:
            array = given.to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError, RuntimeError):  # e.g. rows of unequal lengths
        return None
    return array


def _refuse_columns(given: Any, kinds: list[tuple[Any, Any]], expected: str) -> None:
    """Names the columns of a data frame that are no numbers."""
    wrong = [(label, kind) for label, kind in kinds if kind.kind not in "fiub"]
    if wrong:
        told = first_few((f"{label!r} ({kind})" for label, kind in wrong), 5)
        hint = _HINTS.get(wrong[0][1].kind, _WORDS)
        raise TypeError(f"{expected}, got a {type(given).__name__} with {told}; {hint}")


def _numbers(part: Tensor) -> np.ndarray:
    part = part.detach().cpu()
    return (part.double() if part.dtype == torch.bfloat16 else part).numpy()


Batch = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


"""Values, contexts, the numbers of the rows in the data given (``None`` from a loader), and weights, if any."""


@dataclass(frozen=True)
class Expected:
    """The rows that a flow takes, as far as known; unless ``continuous``, integers stay unconverted.

    Messages name the function ``who`` and the ``forms`` in which it takes rows.  ``precision``, of values and of
    contexts, sees each conversion.
    """

    who: str
    forms: str
    event_shape: Size | None
    context_dim: int | None
    dtype: torch.dtype
    device: torch.device
    continuous: bool
    precision: tuple[Precision, Precision] = field(default_factory=lambda: (Precision(), Precision()))

    def told(self, columns: Names, context_columns: Names) -> list[str]:
        """Says which columns lost digits, of values and of contexts; empty for none."""
        values, contexts = self.precision
        return [values.told("data", columns), contexts.told("context", context_columns)]


def expected_by(
    module: nn.Module, who: str = "fit_density", forms: str = "a tensor, a NumPy array of numbers or a DataLoader"
) -> Expected:
    """Reads from a density which rows it takes."""
    kin = first_floating(module)
    kin = torch.zeros((), device="cpu") if kin is None else kin
    event, context = getattr(module, "event_shape", None), getattr(module, "context_dim", None)
    event = Size(event) if isinstance(event, (tuple, list)) else None
    context = context if isinstance(context, int) else None
    members = module.members if isinstance(module, Ensemble) else [module]
    continuous = all(isinstance(each, Flow) and not each.chain.discrete for each in members)
    return Expected(who, forms, event, context, kin.dtype, kin.device, continuous)


@dataclass
class Rows:
    """Rows held whole, on the flow's device.

    ``index`` numbers them in the given data, whose columns have the names ``columns`` and ``context_columns``, if any.
    Each row counts as much as its ``weight`` says, which is 1 on average, and 1 for all without weights.
    """

    value: Tensor
    context: Tensor | None
    index: Tensor
    columns: tuple[str, ...] | None = None
    context_columns: tuple[str, ...] | None = None
    weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.value)

    def steps(self, batch_size: int) -> int:
        """The number of batches in an epoch."""
        return -(-len(self) // batch_size)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yields the rows once, in the :meth:`order` of an epoch."""
        for piece in self.order(batch_size, generator):
            yield self.batch(piece)

    @property
    def tables(self) -> list[Tensor]:
        """Values, and contexts if there are any."""
        return [each for each in (self.value, self.context) if each is not None]

    def batch(self, rows: Tensor) -> Batch:
        """Selects a batch, or the part of this process."""
        found = self.take(part(rows))
        return found.value, found.context, found.index, found.weight

    def order(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Shuffles the rows into batches of equal size, up to one row; the larger ones come first."""
        order = torch.randperm(len(self), generator=generator, device="cpu")
        # One copy an epoch, because each makes the host wait.
        return order.to(self.value.device).tensor_split(self.steps(batch_size))

    def listed(self, pieces: Sequence[Tensor], batch_size: int, steps: int) -> list[Tensor]:
        """Returns the row numbers of up to ``steps`` batches, and each row's share; what is added does not count."""
        shape = min(steps, self.steps(batch_size)), -(-len(self) // self.steps(batch_size))
        rows, shares = (torch.zeros(shape, dtype=kind, device="cpu") for kind in (torch.int64, self.value.dtype))
        for k, piece in enumerate(pieces[: shape[0]]):
            own = torch.ones(len(piece), device="cpu") if self.weight is None else self.weight[piece]
            rows[k, : len(piece)], shares[k, : len(piece)] = piece, own / len(piece)
        return [rows, shares]

    def chunks(self, least: int) -> Iterator[Batch]:
        """Yields all rows once, in order, at least so many at a time; of several processes, each gets a part."""
        size = max(least, _CHUNK // max(self.value[:1].numel(), 1), 1)
        values = part(self.value).split(size) if len(part(self.index)) else ()
        contexts, weights = (
            [None] * len(values) if each is None else part(each).split(size) for each in (self.context, self.weight)
        )
        yield from zip(values, contexts, part(self.index).split(size), weights, strict=False)

    def take(self, rows: Tensor) -> Rows:
        """Selects some rows."""
        rows = rows.to(self.value.device)
        context, weight = (None if each is None else each[rows] for each in (self.context, self.weight))
        return replace(self, value=self.value[rows], context=context, index=self.index[rows], weight=weight)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Rows:
        """Moves the rows; ``dtype`` is that of real numbers, and integers stay."""

        def moved(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None)

        context, weight = (None if each is None else moved(each) for each in (self.context, self.weight))
        return replace(self, value=moved(self.value), context=context, index=self.index.to(device), weight=weight)

    def joined(self, other: Rows) -> Rows:
        """These rows and others."""
        contexts = [each.context for each in (self, other) if each.context is not None]
        context = torch.cat(contexts) if contexts else None
        value, index = torch.cat([self.value, other.value]), torch.cat([self.index, other.index])
        weight = None
        if self.weight is not None or other.weight is not None:
            ones = [torch.ones(len(each), device=value.device) for each in (self, other)]
            given = zip((self.weight, other.weight), ones, strict=True)
            weight = torch.cat([one if own is None else own for own, one in given])
        return replace(self, value=value, context=context, index=index, weight=weight)

    def weighted(self, given: Any, expected: Expected) -> Rows:
        """Gives rows weights, scaled to a mean of 1, and leaves out those of weight 0.

        Raises:
            ValueError: for weights that are not finite, negative, all 0, or not one for each row.
        """
        if given is None:
            return self
        weight = to_tensor(given, expected.who, "weights").to(self.value.device)
        if weight.shape not in ((len(self),), (len(self), 1)):
            raise ValueError(
                f"{expected.who}: expected a weight for each of the {len(self)} rows, got weights of shape "
                f"{tuple(weight.shape)}"
            )
        weight = weight.reshape(-1).double()
        bad = ~(weight.isfinite() & (weight >= 0))
        if bad.any() or not weight.any():
            where = f"{int(bad.sum())} that are not ({name_rows(bad.nonzero()[:, 0])})" if bad.any() else "only zeros"
            raise ValueError(
                f"{expected.who}: expected weights to be finite numbers of at least 0, and some above it; got {where}"
            )
        counted = weight > 0
        own = replace(self, weight=(weight / weight.max()).to(expected.dtype))
        return (own if counted.all() else own.take(counted.nonzero()[:, 0])).scaled()

    @property
    def counts(self) -> Tensor:
        """How much each row counts, in float64 on the CPU."""
        one = torch.ones(len(self), dtype=torch.float64, device="cpu")
        return one if self.weight is None else self.weight.to(one)

    def scaled(self) -> Rows:
        """The same rows with weights of mean 1."""
        return self if self.weight is None else replace(self, weight=self.weight / self.weight.mean())

    @property
    def effective(self) -> float:
        """The number of rows of equal weight whose mean would be as uncertain."""
        return float(self.counts.sum().square() / self.counts.square().sum())

    def told(self) -> str:
        """Says how few the effective rows are, if they are."""
        if self.effective >= min(0.5 * len(self), FEW_ROWS):
            return ""
        return (
            f"weights: the {len(self)} rows count like {self.effective:.0f} of equal weight, so that scores and the "
            "fit are as uncertain as those of so few; if single rows weigh that much by mistake, bound the weights"
        )

    def split(self, fraction: float, most: int, generator: torch.Generator) -> tuple[Rows, Rows]:
        """Splits at random; the second part has ``fraction`` of the rows, from one row to ``most``."""
        held_out = min(max(1, round(fraction * len(self))), most)
        if len(self) < 10 or len(self) - held_out < 2:
            raise ValueError(
                f"fit_density: {len(self)} rows are too few to hold out {fraction:.0%} of them; give validation=, or "
                "validation_fraction=0 to fit without"
            )
        order = torch.randperm(len(self), generator=generator, device="cpu")
        return self.take(order[held_out:]).scaled(), self.take(order[:held_out]).scaled()


class Loader:
    """A ``DataLoader`` of ``x``, ``(x,)`` or ``(x, context)``; one pass is one epoch.

    Each of several processes has its own.  The numbers of rows are those of all, the number of batches is the largest.
    """

    def __init__(self, loader: DataLoader, expected: Expected, what: str) -> None:
        self.loader, self.expected, self.what = loader, expected, what
        self.rows = self.count = 0

    def __len__(self) -> int:
        return self.rows

    def steps(self, batch_size: int) -> int:
        """The number of batches, counted in the first pass."""
        return self.count

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yields one pass; of several processes, one that is done has empty batches until all are."""
        for sampler in (self.loader.sampler, getattr(self.loader.batch_sampler, "sampler", None)):
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(int(torch.randint(2**31, (), generator=generator)))
        yield from self.chunks(batch_size)
        while count() > 1:
            yield torch.empty(0), None, None, None

    def chunks(self, least: int) -> Iterator[Batch]:
        """Yields one pass."""
        for batch in self.loader:
            yield *_admit(*self._unpack(batch), self.expected, self.what, self.what), None, None

    def survey(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Counts in a first pass, and refuses NaN."""
        self.rows = self.count = 0
        for value, context, *_ in self.chunks(0):
            place = f"batch {self.count} of the DataLoader given as {self.what}"
            _refuse_nonfinite(
                self.expected, {f"{place}, values,": (value, None), f"{place}, contexts,": (context, None)}
            )
            self.rows, self.count = self.rows + len(value), self.count + 1
            if len(value):
                yield value, context
        rows, counts = zip(*everyone((self.rows, self.count)), strict=True)
        self.rows, self.count = sum(rows), max(counts)
        if not self.rows:
            raise ValueError(f"fit_density: the DataLoader given as {self.what} is empty")

    def _unpack(self, batch: Any) -> tuple[Any, Any]:
        if isinstance(batch, (Tensor, np.ndarray)):
            return batch, None
        several = isinstance(batch, (tuple, list))
        if several and len(batch) in (1, 2):
            return batch[0], batch[1] if len(batch) == 2 else None
        size = f" of {len(batch)}" if several else ""
        raise TypeError(
            f"fit_density: expected the DataLoader given as {self.what} to yield x, (x,) or (x, context), "
            f"got a {type(batch).__name__}{size}"
        )


Source = Rows | Loader


def admit_rows(
    given: Any, given_context: Any, expected: Expected, what: str, what_context: str, least: int = 1
) -> Rows:
    """Checks values and contexts, at least so many, and converts them to the flow's dtype and device."""
    value, context = _admit(given, given_context, expected, what, what_context)
    if len(value) < least:
        raise ValueError(f"{expected.who}: {what} is empty, shape {tuple(value.shape)}; expected at least one row")
    columns, context_columns = _names_of(given, value), None if context is None else _names_of(given_context, context)
    _refuse_nonfinite(expected, {what: (value, columns), what_context: (context, context_columns)})
    return Rows(value, context, torch.arange(len(value), device=value.device), columns, context_columns)


def _names_of(given: Any, rows: Tensor) -> tuple[str, ...] | None:
    """Returns the names of columns, if there is one for each number of a row."""
    names = column_names(given)
    return names if names is not None and len(names) == rows[:1].numel() else None


def _tensor(given: Any, what: str, expected: Expected, precision: Precision) -> Tensor:
    made = to_tensor(given, expected.who, what, f"to be {expected.forms}")
    whole = not made.is_floating_point() and not expected.continuous
    converted = made.to(device=expected.device, dtype=made.dtype if whole else expected.dtype)
    precision.add(made, converted)
    return converted


def _admit(
    given: Any, given_context: Any, expected: Expected, what: str, what_context: str
) -> tuple[Tensor, Tensor | None]:
    """Checks the shapes of values and contexts, and converts them."""
    event, size = expected.event_shape, expected.context_dim
    value = _tensor(given, what, expected, expected.precision[0])
    if event is not None and value.dim() == 1 and event == (1,):
        value = value.unsqueeze(-1)
    if value.dim() == 0 or (event is not None and value.shape[1:] != event):
        shape = "(rows, ...)" if event is None else f"(rows, {', '.join(map(str, event))})"
        hint = " (input_dim columns)" if event is not None and len(event) == 1 else ""
        raise ValueError(f"{expected.who}: expected {what} of shape {shape}{hint}, got shape {tuple(value.shape)}")
    if given_context is None:
        if size:
            raise ValueError(
                f"{expected.who}: this flow was built with context_dim={size}: give a context for each row of {what} "
                "(context=, validation_context=, or a DataLoader that yields pairs)"
            )
        return value, None
    if size == 0:
        raise ValueError(
            f"{expected.who}: this flow was built with context_dim=0, but contexts came with {what}: leave them out, "
            "or build the flow with context_dim"
        )
    refuse_other_order(given_context, given, expected.who, what_context, what)
    context = _tensor(given_context, what_context, expected, expected.precision[1])
    if context.dim() == 1 and size == 1:
        context = context.unsqueeze(-1)
    if context.dim() == 0 or len(context) != len(value):
        raise ValueError(
            f"{expected.who}: expected a context for each of the {len(value)} rows of {what}, "
            f"got {what_context} of shape {tuple(context.shape)}"
        )
    if size is not None and context.shape[1:] != (size,):
        raise ValueError(
            f"{expected.who}: expected {what_context} of shape (rows, {size}) (context_dim columns), "
            f"got shape {tuple(context.shape)}"
        )
    return value, context


def _refuse_nonfinite(expected: Expected, named: dict[str, tuple[Tensor | None, Names]]) -> None:
    """Refuses missing values and other numbers that are not finite, by column."""
    for what, (value, names) in named.items():
        if value is None or value.isfinite().all():
            continue
        flat = value.unsqueeze(-1).flatten(1)
        bad, missing = ~flat.isfinite(), flat.isnan()
        rows = bad.any(1).nonzero()[:, 0]
        counts = bad.sum(0)
        columns = counts.nonzero()[:, 0].tolist()
        where = first_few((f"{tell_column(k, names)} ({int(counts[k])})" for k in columns), 8)
        where = f"column{'s' if len(columns) > 1 else ''} {where}"
        told = "NaN (missing values)" if bad.eq(missing).all() else "NaN, infinity or numbers too large for "
        told += "" if bad.eq(missing).all() else str(value.dtype)
        raise ValueError(
            f"{expected.who}: {what} has {told} in {len(rows)} of {len(value)} rows ({name_rows(rows)}), in {where}; "
            "leave these rows out (dropna() of a data frame) or fill in the numbers. To predict what is missing, fit "
            'MADE(..., order="any") to whole rows, whose impute() draws any numbers of a row from the others'
        )
