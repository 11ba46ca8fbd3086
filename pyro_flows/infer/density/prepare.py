"""The start of a fit: checked rows, held-out rows, and the units of the data."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_flows.distributions import Flow
from pyro_flows.infer.density.data import Expected, Loader, Rows, Source, admit_rows, expected_by
from pyro_flows.infer.density.settings import HELD_OUT_AT_MOST, Settings
from pyro_flows.infer.density.survey import Survey, reals_of, refuse_outside
from pyro_flows.infer.density.units import (
    Density,
    Units,
    ends_of,
    head_of,
    is_plain_flow,
    over_time,
    pull_back,
    split_chain,
)
from pyro_flows.infer.machine.checkpoint import checksum

__all__ = ["Prepared", "prepare"]


@dataclass
class Prepared:
    """The data of a fit; ``identity`` holds checksums or sizes that identify them."""

    train: Source
    validation: Source | None
    units: Units
    identity: dict[str, str]

    @property
    def generators(self) -> dict[str, torch.Generator | None]:
        """The generators of data loaders."""
        sources = {"data_loader": self.train, "validation_loader": self.validation}
        return {name: source.loader.generator for name, source in sources.items() if isinstance(source, Loader)}

    def known_units(self, known: Units, path: str | os.PathLike[str] | None) -> Units:
        """Returns the units of a checkpoint, and refuses those of other data.

        Units may differ a little: shuffled rows round differently, and a loader may add noise.
        """
        for name, then in known.items():
            now, spread = self.units[name], known[name.replace("loc", "scale")]
            if then is None or now is None or spread is None:
                differ = then is not now
            else:
                differ = bool(((now - then).abs() > 0.2 * spread).any())
            if differ:
                raise ValueError(
                    f"fit_density: the checkpoint {str(path)!r} belongs to a fit of other data: their {name} differ; "
                    "give the same data to go on, or delete the file or give another path to start anew"
                )
        return known


def prepare(
    flow: Flow | Density,
    given: tuple[Any, Any, Any, Any],
    settings: Settings,
    generator: torch.Generator,
    stacklevel: int,
) -> Prepared:
    """Admits ``given`` (data, contexts, and those of validation), holds rows out, and surveys the rest."""
    data, context, validation, validation_context = given
    expected = expected_by(flow)
    if expected.dtype.itemsize < 4:
        raise ValueError(
            f"fit_density: the flow's parameters are {expected.dtype}, which loses small steps; call flow.float() "
            f"first, and flow.to({expected.dtype}) when it is trained"
        )
    train = _admit(flow, data, context, expected, "data", "context")
    precision = train.precision
    held_out: Source | None = None
    if validation is not None:
        held_out = _admit(flow, validation, validation_context, expected, "validation", "validation_context")
        if expected.event_shape is None and isinstance(train, Rows) and isinstance(held_out, Rows):
            _same_columns(train, held_out)
    elif validation_context is not None:
        raise ValueError("fit_density: validation_context was given without validation; give both or neither")
    identity = {**_identity(train, "data"), **_identity(held_out, "validation")}
    if held_out is None and isinstance(train, Rows) and settings.validation_fraction:
        train, held_out = train.split(settings.validation_fraction, HELD_OUT_AT_MOST, generator)
    values, contexts = Survey(), Survey()
    ends = ends_of(flow)
    front, back = split_chain(flow.chain) if is_plain_flow(flow) else ([], [])
    real = train.value if isinstance(train, Rows) else None
    if isinstance(train, Loader):
        _first_pass(flow, train, values, contexts)
        identity["data"] = f"{len(train)} rows in {train.count} batches"
    elif expected.continuous or ends is not None or settings.standardize:
        real = pull_back(back, train.value)[0]
        values.add(real, train.value)
        if train.context is not None:
            contexts.add(train.context)
    coarse = [
        each.told(what) if each.merged() else "" for each, what in zip(precision, ("data", "context"), strict=True)
    ]
    if expected.continuous:
        values.refuse_degenerate(real, coarse[0])
    for told in filter(None, coarse):
        warnings.warn(f"fit_density: {told}", UserWarning, stacklevel=stacklevel + 1)
    if expected.continuous or ends is not None:
        looked_at = ~_discrete(flow)
        for column in precision[0].merged():
            looked_at.view(-1)[column] = False  # already reported
        values.warn_of_repeats(train.value if isinstance(train, Rows) else None, looked_at, stacklevel + 1)
    units: Units = dict.fromkeys(("loc", "scale", "context_loc", "context_scale"))
    if values.rows and settings.standardize is not False:
        units["loc"], units["scale"] = values.loc_and_scale(ends, over_time(front))
        if contexts.rows:
            units["context_loc"], units["context_scale"] = contexts.loc_and_scale()
        if ends is not None:
            _warn_of_units(flow, ends, values, contexts, bool(settings.standardize), stacklevel + 1)
    return Prepared(train, held_out, units, identity)


def _discrete(flow: Flow | Density) -> Tensor:
    head = head_of(flow)
    if head is None:
        return torch.zeros(flow.event_shape, dtype=torch.bool)
    return torch.tensor(head.discrete_dims()).reshape(flow.event_shape)


def _warn_of_units(
    flow: Flow | Density, ends: Tensor, values: Survey, contexts: Survey, wanted: bool, level: int
) -> None:
    """Warns of columns not standardized and far from the units that training starts with."""
    if is_plain_flow(flow):
        if not ends.isinf().any():
            return
        with torch.no_grad():
            drawn = flow.base().sample((256,)).cpu().double().reshape(256, -1)
        # Parts may permute dimensions, so each is compared with the whole base.
        scale = drawn.std(0)
        loc, scale = drawn.mean(), (scale.amin() * scale.amax()).sqrt()
        remedy = "give them in units in which they are of the order of 1, angles in radians; or say standardize=False"
        values.warn_of_units(ends.isinf(), (loc, scale), "data", remedy, level + 1)
        return
    start = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    remedy = "give them in units in which they are of the order of 1, angles in radians"
    values.warn_of_units(ends.isinf() & ~_discrete(flow), start, "data", remedy, level + 1)
    if not wanted:
        remedy = "say standardize=True, after which fit.distribution scores and draws in the units of the data"
        values.warn_of_units(~ends.isinf(), start, "data", remedy, level + 1)
        if contexts.rows:
            every = torch.ones(contexts.mean.shape, dtype=torch.bool)
            contexts.warn_of_units(every, start, "context", remedy, level + 1)


def _admit(flow: Flow | Density, given: Any, context: Any, expected: Expected, what: str, what_context: str) -> Source:
    if not isinstance(given, DataLoader):
        rows = admit_rows(given, context, expected, what, what_context)
        _reals(flow, rows.value, what)
        return rows
    if context is not None:
        raise ValueError(
            f"fit_density: {what_context} was given besides a DataLoader; let the loader yield pairs (x, context)"
        )
    loader = Loader(given, expected, what)
    if what != "data":
        _first_pass(flow, loader, Survey(), Survey())
    return loader


def _reals(flow: Flow | Density, value: Tensor, what: str) -> Tensor:
    """Pulls data back to the trained part of the chain, and refuses rows outside the support."""
    if is_plain_flow(flow):
        return reals_of(flow, value, what)
    head = head_of(flow)
    if head is not None:
        refuse_outside(head, value, what)
    return value


def _first_pass(flow: Flow | Density, loader: Loader, values: Survey, contexts: Survey) -> None:
    for value, context in loader.survey():
        values.add(_reals(flow, value, f"a batch of {loader.what}"), value)
        if context is not None:
            contexts.add(context)


def _identity(source: Source | None, what: str) -> dict[str, str]:
    if isinstance(source, Rows):
        return {what: checksum(source.value), f"contexts of {what}": checksum(source.context)}
    return {what: "none" if source is None else f"{len(source)} rows in {source.count} batches"}


def _same_columns(train: Rows, held_out: Rows) -> None:
    pairs = {"columns": (train.value, held_out.value), "contexts": (train.context, held_out.context)}
    for name, pair in pairs.items():
        shapes = [None if value is None else tuple(value.shape[1:]) for value in pair]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"fit_density: expected validation with {name} as in data, of shape {shapes[0]} a row, got {shapes[1]}"
            )
