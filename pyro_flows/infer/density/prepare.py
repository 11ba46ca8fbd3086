"""The start of a fit: checked rows, held-out rows, and the units of the data.

Training rows are surveyed for constant or dependent columns, repeated values and rows outside the support.  A survey
sees rows in the flow's dtype, shuffled.  :class:`~pyro_flows.infer.density.columns.Precision` sees the numbers as
given, before their conversion.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_flows.core.checks import first_few
from pyro_flows.distributions import Flow
from pyro_flows.distributions.made import Head, MixedHead
from pyro_flows.infer.density.bounded import tell_bounds
from pyro_flows.infer.density.columns import at_bounds, copied, few_values, spikes
from pyro_flows.infer.density.data import Expected, Loader, Rows, Source, admit_rows, expected_by, name_rows
from pyro_flows.infer.density.gaussian import sample_size
from pyro_flows.infer.density.names import Names, by_name, refuse_other_order, tell_column, tell_columns
from pyro_flows.infer.density.settings import HELD_OUT_AT_MOST, Settings, Sizes
from pyro_flows.infer.density.units import Density, Units, ends_of, head_of, is_plain_flow, over_time, pulled_back
from pyro_flows.infer.machine.checkpoint import checksum
from pyro_flows.infer.machine.processes import count, everyone
from pyro_flows.transforms.integers import levels_of

__all__ = ["Prepared", "Survey", "Thinned", "prepare", "reals_of", "refuse_support"]

_SAMPLE = 4096  # rows to find discrete and dependent columns in
_FEWEST = 100  # rows that can tell a discrete column
_COPIES = 0.1  # the share of held-out rows that are training rows, from which on the fit warns
_FAR = 10.0  # location or scale, in units of the base, far from the start of training
_INSIDE = (
    "move them inside by less than the data are rounded, or {}; where a bound is a value that rows really share (no "
    "rain, a sensor's limit), fit the rows within and give the share of that value beside them (a two-part model)"
)

_REPEATED = (
    "all processes read the same rows, so that each step counts them several times; give each process rows of its own, "
    "e.g. DataLoader(dataset, sampler=torch.utils.data.DistributedSampler(dataset))"
)


@dataclass
class Prepared:
    """The data of a fit and its settings.

    ``identity`` holds checksums or sizes that identify the data; ``shuffle`` orders their rows.  ``sample`` holds
    training rows, all if they are not too many, and ``held_out_sample`` held-out ones.
    """

    train: Source
    sample: Rows
    held_out_sample: Rows | None
    validation: Source | None
    units: Units
    identity: dict[str, str]
    shuffle: torch.Generator
    settings: Settings
    sizes: Sizes

    @property
    def generators(self) -> dict[str, torch.Generator | None]:
        """The generators of rows and of data loaders."""
        sources = {"data_loader": self.train, "validation_loader": self.validation}
        loaders = {name: source.loader.generator for name, source in sources.items() if isinstance(source, Loader)}
        return {"shuffle": self.shuffle, **loaders}

    def known_units(self, known: dict[str, Any], path: str | os.PathLike[str] | None) -> Units:
        """Returns the units of a checkpoint, and refuses those of other data.

        Units may differ a little: shuffled rows round differently, and a loader may add noise.
        """
        for name, then in known.items():
            now: Any = self.units[name]  # of the same shape, or both None
            if then is not None and ((now - then).abs() > 0.2 * known[name.replace("loc", "scale")]).any():
                raise ValueError(
                    f"fit_density: the checkpoint {str(path)!r} belongs to a fit of other data: their {name} differ; "
                    "give the same data to go on, or delete the file or give another path to start anew"
                )
        return known


def prepare(
    flow: Flow | Density,
    given: tuple[Any, Any, Any, Any],
    settings: Settings,
    stacklevel: int | None = 3,
    weights: Any = None,
) -> Prepared:
    """Admits ``given`` (data, contexts, and those of validation), holds rows out, and surveys the rest.

    Warnings about the data have the ``stacklevel`` of the fit's caller; ``None`` for no warnings.
    """
    data, context, validation, validation_context = given
    expected = expected_by(flow)
    if expected.dtype.itemsize < 4:
        raise ValueError(
            f"fit_density: the flow's parameters are {expected.dtype}, which loses small steps; call flow.float() "
            f"first, and flow.to({expected.dtype}) when it is trained"
        )
    shuffle = torch.Generator().manual_seed(settings.seed)
    values, contexts = surveys = Survey(), Survey()
    thinned, thinned_out = Thinned(), Thinned()
    train = _admit(flow, data, context, expected, "data", surveys, thinned)
    if isinstance(train, Rows):
        refuse_other_order(weights, data, "fit_density", "weights", "data")
        train = train.weighted(weights, expected)
    elif weights is not None:
        raise ValueError(
            "fit_density: weights= needs rows in memory, got a DataLoader; let it draw rows as often as their weights "
            "say: DataLoader(dataset, sampler=torch.utils.data.WeightedRandomSampler(weights, len(weights)))"
        )
    names = (train.columns, train.context_columns) if isinstance(train, Rows) else (None, None)
    values.names, contexts.names = names
    if isinstance(train, Loader):
        values, contexts = values.of_all(), contexts.of_all()
    held_out: Source | None = None
    if validation is not None:
        own = Survey(), Survey()
        validation = by_name(validation, names[0], "fit_density", "validation")
        validation_context = by_name(validation_context, names[1], "fit_density", "validation_context")
        held_out = _admit(flow, validation, validation_context, expected_by(flow), "validation", own, thinned_out)
        if expected.event_shape is None and isinstance(train, Rows) and isinstance(held_out, Rows):
            _same_columns(train, held_out)
    elif validation_context is not None:
        raise ValueError("fit_density: validation_context was given without validation; give both or neither")
    identity = {**_identity(train, "data"), **_identity(held_out, "validation")}
    if held_out is None and isinstance(train, Rows) and settings.validation_fraction:
        train, held_out = train.split(settings.validation_fraction, HELD_OUT_AT_MOST, shuffle)
    ends = ends_of(flow)
    real = whole = None
    if isinstance(train, Rows):
        whole = train.value
        if expected.continuous or ends is not None or settings.standardize:
            real = _survey(flow, whole, train.context, "data", surveys, train.weight)
    found = expected.told(*names)
    if isinstance(train, Rows) and weights is not None:
        found.append(train.told())
    if values.repeated:
        found.append(_REPEATED)
    if expected.continuous:
        values.refuse_degenerate(real, found[0])
    if expected.continuous or ends is not None:
        looked_at = ~_discrete(flow)
        looked_at.view(-1)[list(expected.precision[0].merged())] = False  # already reported
        found += values.repeats(whole, looked_at)
        if isinstance(train, Rows) and isinstance(held_out, Rows):
            found.append(_copies(train, held_out))
    units: Units = dict.fromkeys(("loc", "scale", "context_loc", "context_scale"))
    if values.rows and settings.standardize is not False:
        units["loc"], units["scale"] = values.loc_and_scale(ends, over_time(flow))
        if contexts.rows:
            units["context_loc"], units["context_scale"] = contexts.loc_and_scale()
        if ends is not None:
            found += _far_units(flow, ends, values, contexts, bool(settings.standardize))
    for told in filter(None, found):
        if stacklevel is not None:
            warnings.warn(f"fit_density: {told}", stacklevel=stacklevel)
    size = settings.batch_size_for(len(train)) if isinstance(train, Rows) else 0
    sizes = settings.sizes(size, train.steps(size), len(train))
    sample = _sample(train, thinned, expected)
    some = _sample(held_out, thinned_out, expected) if isinstance(held_out, Loader) else held_out
    return Prepared(train, sample, some, held_out, units, identity, shuffle, settings, sizes)


def _copies(train: Rows, held_out: Rows) -> str:
    """Tells of held-out rows that are training rows, too."""
    share = copied(train.tables, held_out.tables)
    if share < _COPIES:
        return ""
    return (
        f"{share:.0%} of the held-out rows are copies of training rows, so that what the flow learns by heart raises "
        "the held-out score, and neither that score nor the verdict tells how well it fits others; leave copies out "
        "(data.drop_duplicates() of a data frame, torch.unique(data, dim=0)) and say in weights= how often a row "
        "counts, or give validation= other rows"
    )


def _discrete(flow: Flow | Density) -> Tensor:
    head, whole = head_of(flow), is_plain_flow(flow) and bool(flow.chain.discrete)
    dims = [whole] * flow.event_shape.numel() if head is None else head.discrete_dims()
    return torch.tensor(dims, device="cpu").reshape(flow.event_shape)


def _far_units(flow: Flow | Density, ends: Tensor, values: Survey, contexts: Survey, wanted: bool) -> Iterator[str]:
    """Tells of columns not standardized and far from the units that training starts with."""
    fixed = ends.isinf()
    remedy = "give them in units in which they are of the order of 1, angles in radians"
    if is_plain_flow(flow):
        if flow.chain.discrete:
            half = 0.5 * levels_of(flow.chain)
            remedy = "subtract whole numbers so that columns begin near 0, and build the flow with as many levels"
            yield values.far_from((half, half), fixed, "data", remedy, narrow=False)
        elif fixed.any():
            with torch.no_grad():
                drawn = flow.base().sample((256,)).cpu().double().reshape(256, -1)
            # Parts may permute dimensions, so each is compared with the whole base.
            scale = drawn.std(0)
            start = float(drawn.mean()), float((scale.amin() * scale.amax()).sqrt())
            yield values.far_from(start, fixed, "data", f"{remedy}; or say standardize=False")
        return
    yield values.far_from((0.0, 1.0), fixed & ~_discrete(flow), "data", remedy)
    if not wanted:
        remedy = "say standardize=True, after which fit.distribution scores and draws in the units of the data"
        yield values.far_from((0.0, 1.0), ~fixed, "data", remedy)
        if contexts.rows:
            yield contexts.far_from((0.0, 1.0), torch.tensor(True, device="cpu"), "context", remedy)


def _admit(
    flow: Flow | Density,
    given: Any,
    context: Any,
    expected: Expected,
    what: str,
    surveys: Surveys,
    thinned: Thinned | None = None,
) -> Source:
    """Checks rows, or surveys a loader in a first pass."""
    what_context = "context" if what == "data" else f"{what}_context"
    if not isinstance(given, DataLoader):
        rows = given if isinstance(given, Rows) else admit_rows(given, context, expected, what, what_context)
        refuse_support(flow, rows.value, what, rows.columns)
        return rows
    if context is not None:
        raise ValueError(
            f"fit_density: {what_context} was given besides a DataLoader; let the loader yield pairs (x, context)"
        )
    loader = Loader(given, expected, what)
    for piece in loader.survey():
        _survey(flow, *piece, f"a batch of {what}", surveys)
        if thinned is not None:
            thinned.add(*(each for each in piece if each is not None))
    return loader


def _survey(
    flow: Flow | Density,
    value: Tensor,
    context: Tensor | None,
    what: str,
    surveys: Surveys,
    weight: Tensor | None = None,
) -> Tensor:
    real = refuse_support(flow, value, what, surveys[0].names)
    surveys[0].add(real, value, weight)
    if context is not None:
        surveys[1].add(context, None, weight)
    return real


class Thinned:
    """Evenly spaced rows of a stream: every ``stride``-th, where the stride doubles as rows become too many."""

    def __init__(self) -> None:
        self.stride, self.seen = 1, 0
        self.rows: tuple[Tensor, ...] = ()

    def add(self, *tensors: Tensor) -> None:
        """Adds a piece."""
        first = -self.seen % self.stride
        self.seen += len(tensors[0])
        chosen = tuple(each[first :: self.stride].cpu().clone() for each in tensors)
        self.rows = tuple(map(torch.cat, zip(self.rows, chosen, strict=True))) if self.rows else chosen
        while len(self.rows[0]) > sample_size(self.rows[0][:1]):
            self.rows, self.stride = tuple(each[::2].clone() for each in self.rows), 2 * self.stride

    def of_all(self) -> tuple[Tensor, ...]:
        """Joins the rows of all processes."""
        found = [each for each in everyone(self.rows) if each]
        return tuple(map(torch.cat, zip(*found, strict=True)))


def _sample(train: Source, thinned: Thinned, expected: Expected) -> Rows:
    if isinstance(train, Rows):
        return train.take(torch.arange(min(len(train), sample_size(train.value[:1])), device="cpu"))
    value, *context = (each.to(expected.device) for each in thinned.of_all())
    return Rows(value, context[0] if context else None, torch.arange(len(value), device=value.device))


def refuse_support(flow: Flow | Density, value: Tensor, what: str = "data", names: Names = None) -> Tensor:
    """Pulls data back to the trained part of the chain, and refuses rows outside the support."""
    if is_plain_flow(flow):
        return reals_of(flow, value, what, names)
    head = head_of(flow)
    if head is not None:
        refuse_outside(head, value, what, names)
    return value


def _identity(source: Source | None, what: str) -> dict[str, str]:
    if isinstance(source, Rows):
        own = {what: checksum(source.value), f"contexts of {what}": checksum(source.context)}
        return own if source.weight is None else {**own, f"weights of {what}": checksum(source.weight)}
    return {what: "none" if source is None else f"{len(source)} rows in {source.count} batches"}


def _same_columns(train: Rows, held_out: Rows) -> None:
    for name, *pair in ("columns", train.value, held_out.value), ("contexts", train.context, held_out.context):
        shapes = [None if value is None else tuple(value.shape[1:]) for value in pair]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"fit_density: expected validation with {name} as in data, of shape {shapes[0]} a row, got {shapes[1]}"
            )


def reals_of(flow: Flow, value: Tensor, what: str, names: Names = None) -> Tensor:
    """Pulls data back to the trained part of the chain; refuses rows at or beyond a bound of the support."""
    real, bad, columns = pulled_back(flow, value)
    if bad.any():
        told = tell_bounds(flow, columns, names)
        remedy = _INSIDE.format("give wider bounds" if told else "end the chain in another transform")
        support = told or f"the flow's support, {flow.chain.codomain}"
        _refuse(bad, what, support, [] if told else columns, remedy, value.dtype, names)
    return real


def refuse_outside(head: Head, value: Tensor, what: str, names: Names = None) -> None:
    """Refuses rows outside the support of an autoregressive model."""
    rows = value.detach().flatten(1)
    outside = ~head.inside(rows) | _without_density(head, head.floating(rows))
    if outside.any():
        columns = outside.any(0).nonzero()[:, 0].tolist()
        support = f"the model's support ({type(head).__name__}: expected {head.allowed(columns[0])})"
        counts = head.discrete_dims()[columns[0]]
        remedy = "number categories and levels from 0, or {}" if counts else _INSIDE
        _refuse(outside.any(1), what, support, columns, remedy.format("take another head"), value.dtype, names)


@torch.no_grad()
def _without_density(head: Head, rows: Tensor) -> Tensor:
    """Marks numbers at a bound where the density is 0 or infinite: of a Gamma, not of an Exponential."""
    if isinstance(head, MixedHead):
        return head._each(None, lambda part, at, own: _without_density(part, rows[:, at]))
    if head.discrete or head.constraint is None:
        return torch.zeros_like(rows, dtype=torch.bool)
    edge = at_bounds(head.constraint, rows)
    if edge.any():
        params = rows.new_full((1, rows.shape[1], head.num_params), 0.3)
        edge &= ~(head.log_prob(rows, params).isfinite() & head.log_prob(rows, -params).isfinite())
    return edge


def _refuse(
    bad: Tensor, what: str, support: str, columns: list[int], remedy: str, dtype: torch.dtype, names: Names
) -> None:
    rows = bad.nonzero()[:, 0]
    where = f" in {tell_columns(columns, names)}" if columns else ""
    raise ValueError(
        f"fit_density: {len(rows)} of {len(bad)} rows of {what} ({name_rows(rows)}) lie outside of {support}, or on "
        f"its edge{where}, as {dtype} has them; leave them out, {remedy}"
    )


class Survey:
    """Location and scale of rows that come in pieces, and a sample of the first rows.

    ``repeated`` tells whether several processes saw the same rows.
    """

    def __init__(self, names: Names = None) -> None:
        self.names = names
        self.repeated = False
        self.rows = 0
        self._sample: list[tuple[Tensor, Tensor]] = []

    def add(self, value: Tensor, given: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Adds a piece, shape ``(rows, *event_shape)``; ``given`` is in the units of the data, weights have mean 1."""
        if not len(value):
            return
        given = value if given is None else given
        piece = value.cpu()
        if self.rows < _SAMPLE:
            rows = _SAMPLE - self.rows
            self._sample.append((piece[:rows].clone(), given[:rows].cpu().clone()))
        lowest, highest = piece.amin(0), piece.amax(0)
        piece = piece.double()
        own = torch.ones(len(piece), device="cpu") if weight is None else weight.cpu()
        own = own.double().view(-1, *(1,) * (piece.dim() - 1))
        mean = (own * piece).mean(0)
        self._join(len(piece), mean, (own * (piece - mean).square()).sum(0), lowest, highest)

    def _join(self, rows: int, mean: Tensor, squares: Tensor, lowest: Tensor, highest: Tensor) -> None:
        if not self.rows:
            self.mean, self.squares, self.lowest, self.highest = mean, torch.zeros_like(mean), lowest, highest
        # Chan's update, which does not cancel where the mean is large.
        share = rows / (self.rows + rows)
        gap = mean - self.mean
        self.squares = self.squares + squares + gap.square() * self.rows * share
        self.mean = self.mean + gap * share
        self.lowest, self.highest = torch.minimum(self.lowest, lowest), torch.maximum(self.highest, highest)
        self.rows += rows

    def of_all(self) -> Survey:
        """Joins the surveys of all processes."""
        surveys = [each for each in everyone(self) if each.rows]
        if count() == 1 or not surveys:
            return self
        joined = Survey(self.names)
        for each in surveys:
            joined._join(each.rows, each.mean, each.squares, each.lowest, each.highest)
            joined._sample += [(x[: _SAMPLE // len(surveys)], y[: _SAMPLE // len(surveys)]) for x, y in each._sample]
        near = 1e-9 * joined.squares.sqrt()
        joined.repeated = len(surveys) == count() and all(
            each.rows == self.rows and bool(((each.mean - joined.mean).abs() <= near).all()) for each in surveys
        )
        return joined

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

    def far_from(self, start: tuple[float, float], left: Tensor, what: str, remedy: str, *, narrow: bool = True) -> str:
        """Tells of columns ``left`` unstandardized and far from ``start``, the first location and scale.

        With ``narrow``, a much smaller scale counts, too.
        """
        loc, scale = self.loc_and_scale()
        ratio = scale / start[1]
        far = left & (((loc - start[0]).abs() > _FAR * start[1]) | (ratio > _FAR) | ((ratio < 1 / _FAR) & narrow))
        columns = far.flatten().nonzero()[:, 0].tolist()
        if not columns:
            return ""
        sizes = first_few((f"{loc.flatten()[k]:.3g} ± {scale.flatten()[k]:.3g}" for k in columns), 4)
        told = tell_columns(columns, self.names, verb=True)
        return (
            f"{what}: {told} not standardized, and far from the location and scale that training starts "
            f"with ({sizes}), so that it may take long or fail; {remedy}"
        )

    def refuse_degenerate(self, whole: Tensor | None, merged: str) -> None:
        """Raises for constant and dependent columns; all rows, if at hand, confirm what the sample suggests."""
        dtype = self.lowest.dtype
        constant = (self.highest <= self.lowest).flatten().nonzero()[:, 0].tolist()
        if constant:
            if self.rows < 2:
                raise ValueError("fit_density: expected at least 2 rows to fit to, got 1")
            told = tell_columns(constant, self.names, verb=True)
            raise ValueError(
                f"fit_density: {told} constant (in {dtype}), so the density there would be infinite; "
                + (merged or "leave out what does not vary")
            )
        sample = torch.cat([real for real, _ in self._sample]).flatten(1)
        whole = sample if whole is None else whole.flatten(1)
        for i, j in _suspects(sample.double()):
            if _dependent(whole[:, i], whole[:, j]):
                pair = " and ".join(tell_column(k, self.names) for k in (i, j))
                raise ValueError(
                    f"fit_density: columns {pair} determine each other exactly (one is a multiple of the other, "
                    "up to a constant), so the density would be infinite on a line; leave one of them out"
                )

    def repeats(self, whole: Tensor | None, columns: Tensor) -> Iterator[str]:
        """Tells of values that many rows share, and of few distinct values, in the marked columns."""
        sample = torch.cat([given for _, given in self._sample]).flatten(1)
        places = columns.flatten().nonzero()[:, 0].tolist()
        grid = few_values(sample, places)
        found = spikes(sample if whole is None else whole.flatten(1), [k for k in places if k not in grid])
        if found:
            told = [
                f"{values[0]:.6g} in {count} of {rows} rows of {tell_columns([column], self.names)}"
                + (f" (and {len(values) - 1} more values there)" if len(values) > 1 else "")
                for column, (values, count, rows) in found.items()
            ]
            yield (
                f"values that many rows share, far more than the values next to them: {first_few(told, 4)}"
                f"; a density grows a spike without bound there, so that scores mean "
                "nothing. Model such a value apart (a two-part or hurdle model): fit the flow to the other rows and "
                "give the share of the value beside it, or say in a column of 0 and 1 which rows have it and take MADE "
                "with a MixedHead. Noise does not help"
            )
        if grid and len(sample) >= _FEWEST:
            widths = ", ".join(f"{width:.3g}" for width in list(grid.values())[:8])
            which = tell_columns(list(grid), self.names, verb=True)
            yield (
                f"{which} discrete: few distinct values, where a density can grow spikes without bound; "
                f"add uniform noise of the grid's width (dequantize; the smallest steps are {widths}), or model it as "
                "discrete"
            )


Surveys = tuple[Survey, Survey]  # of values and of contexts


def _dependent(first: Tensor, second: Tensor) -> bool:
    """Tells whether two columns are affine functions of each other, up to rounding."""
    a, b = first.cpu().double(), second.cpu().double()
    x, y = a - a.mean(), b - b.mean()
    slope = (x * y).mean() / x.square().mean()
    size = b.abs().max() + slope.abs() * a.abs().max()
    return bool((y - slope * x).abs().max() <= 16 * torch.finfo(first.dtype).eps * size)


def _suspects(sample: Tensor) -> list[tuple[int, int]]:
    """Pairs columns that seem to depend on earlier ones with these."""
    if len(sample) < 5 or not 2 <= sample.shape[1] <= 4096:
        return []
    close = torch.triu(sample[:512].T.corrcoef().abs() > 1 - 1e-6, diagonal=1)
    return [(int(close[:, j].nonzero()[0, 0]), int(j)) for j in close.any(0).nonzero()[:, 0]]
