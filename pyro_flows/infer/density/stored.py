"""Converts a fit to data to plain data, and back."""

from __future__ import annotations

import copy
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyro_flows.core.modes import evaluating, on_cpu
from pyro_flows.core.recipes import made_from, recipe
from pyro_flows.distributions import Ensemble
from pyro_flows.infer.density.data import Rows
from pyro_flows.infer.density.judging import Kept
from pyro_flows.infer.density.objective import log_prob_of
from pyro_flows.infer.diagnostics.densities import LABELS, DensityVerdict
from pyro_flows.infer.machine.records import read
from pyro_flows.transforms import Bounds

__all__ = ["FitRecord", "ModulesRecord", "fit_of", "modules_of", "plain_fit"]

_Fit = TypeVar("_Fit")

POINTS = 8
_APART = ("flow", "distribution", "members", "kept", "_verdict")  # entries of a fit that are no plain data


@dataclass
class ModulesRecord:
    """Modules, some of which share parts: their recipe and state, and points to check the one numbered ``checked`` by.

    If a flow cannot be described, ``unnamed`` says why, and its modules are those of so many ``copies`` of a flow that
    is given.  ``constants`` are buffers outside of the state that a new module has otherwise.
    """

    plan: list
    unnamed: str | None
    copies: int
    state: dict[str, Any]
    constants: dict[str, Tensor]
    frozen: list[str]
    training: bool
    device: str
    dtype: str
    points: dict[str, Tensor | None]
    checked: int


@dataclass
class FitRecord:
    """A fit without its modules, which ``flow``, ``distribution`` and ``kept`` number; rows and numbers as they are."""

    flow: int
    distribution: int
    entries: dict[str, Any]
    members: list
    kept: list
    verdict: dict | None


# To plain data.


def plain_fit(fit: Any) -> tuple[ModulesRecord, FitRecord]:
    """Describes a ``DensityFit``.

    Raises:
        ValueError: if a module cannot be made again, even with the flow.
    """
    fits = [fit, *fit.members]
    flows = [each.flow for each in fit.members or fits]
    roots: list[Any] = []
    for each in fits:
        roots += [each.flow, each.distribution, *(part.density for part in each.kept)]
    unique = list({id(root): root for root in roots}.values())
    numbers = {id(root): k for k, root in enumerate(unique)}
    members: Any = fit.distribution.members if isinstance(fit.distribution, Ensemble) else ()
    known = {id(each) for one in fits for each in (one.flow, one.distribution)}
    starts = [each for each in (*members, *unique) if id(each) not in known]  # copies, as the Gaussian
    given = _places(flows, fits[-1].distribution, starts)
    points = _points(fit.distribution, fit.kept[0]) if fit.kept else {}
    return _plain_modules(unique, flows, given, points, numbers[id(fit.distribution)]), _plain(fit, numbers)


def _plain(fit: Any, numbers: dict[int, int]) -> FitRecord:
    return FitRecord(
        numbers[id(fit.flow)],
        numbers[id(fit.distribution)],
        {each.name: getattr(fit, each.name) for each in fields(fit) if each.name not in _APART},
        [vars(_plain(each, numbers)) for each in fit.members],
        [
            {"density": numbers[id(part.density)], "fresh": _rows(part.fresh), "trained": _rows(part.trained)}
            for part in fit.kept
        ],
        None if fit._verdict is None else asdict(fit._verdict),
    )


def _rows(rows: Rows | None) -> dict[str, Any] | None:
    return None if rows is None else dict(vars(rows))


def _places(flows: Sequence[nn.Module], fitted: nn.Module, others: Sequence[nn.Module]) -> dict[int, list[Any]]:
    """Finds each module in the flows: the number of the flow and the name in it.

    The others are copies of a flow or another model in the units of a fitted one, where parts have the same names.
    """
    found: dict[int, list[Any]] = {}
    for k, flow in enumerate(flows):
        for name, module in flow.named_modules():
            if not any(isinstance(part, Bounds) for part in module.modules()):  # which the fit may have added
                found.setdefault(id(module), [k, name])
    twins = dict(fitted.named_modules())
    for k, other in enumerate(others, len(flows)):
        for name, module in other.named_modules():
            twin = found.get(id(twins.get(name)))
            if twin is not None:
                found.setdefault(id(module), [k, twin[1]])
    return found


@torch.no_grad()
def _points(density: Any, part: Kept) -> dict[str, Tensor | None]:
    rows = part.trained if part.trained is not None else part.fresh
    if rows is None:
        return {}
    rows = rows.take(torch.arange(min(POINTS, len(rows)), device="cpu"))
    return {"value": rows.value, "context": rows.context, "log_prob": _scores(density, rows.value, rows.context)}


def _scores(density: Any, value: Tensor, context: Tensor | None) -> Tensor:
    kin = next(density.parameters())

    def placed(rows: Tensor) -> Tensor:
        return rows.to(kin.device, kin.dtype if rows.is_floating_point() else None)

    with evaluating(density):
        return log_prob_of(density)(placed(value), None if context is None else placed(context)).cpu()


def _plain_modules(
    roots: Sequence[nn.Module],
    flows: Sequence[nn.Module],
    given: dict[int, list[Any]],
    points: dict[str, Tensor | None],
    checked: int,
) -> ModulesRecord:
    modules = nn.ModuleList(roots)
    state = _own_state(modules)
    floating = [value for value in state.values() if isinstance(value, Tensor) and value.is_floating_point()]
    record = ModulesRecord(
        [],
        None,
        1 + max((place[0] for place in given.values()), default=0),
        {name: value.detach().cpu() if isinstance(value, Tensor) else value for name, value in state.items()},
        {},
        [name for name, p in modules.named_parameters() if not p.requires_grad],
        roots[0].training,
        str(floating[0].device),
        str(floating[0].dtype).removeprefix("torch."),
        points,
        checked,
    )
    try:
        record.plan = recipe(list(roots))
        _settle(record, modules)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        record.unnamed = str(error)
        record.plan = recipe(list(roots), given)
        _settle(record, modules, flows[0])
    return record


def _settle(record: ModulesRecord, modules: nn.Module, flow: nn.Module | None = None) -> None:
    """Finds constants that a new module has otherwise, and makes the modules again as a check."""
    made = dict(nn.ModuleList(modules_of(record, flow, check=False)).named_buffers())
    for name, value in modules.named_buffers():
        fresh = made.get(name)
        if name not in record.state and (
            fresh is None or fresh.dtype != value.dtype or not torch.equal(fresh, value.cpu())
        ):
            record.constants[name] = value.cpu()
    modules_of(record, flow)


def _own_state(modules: nn.Module) -> dict[str, Any]:
    """Names each tensor of the state once."""
    seen: set[int] = set()
    found = {}
    for name, value in modules.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or id(value) not in seen:
            found[name] = value
        seen.add(id(value))
    return found


# From plain data.


@on_cpu
def modules_of(record: ModulesRecord, flow: nn.Module | None = None, *, check: bool = True) -> list[Any]:
    """Rebuilds the modules on the CPU, with copies of the flow if it was left out.

    Raises:
        ValueError: if they differ from the saved ones.
    """
    give = None
    if record.unnamed is not None:
        if flow is None:
            raise ValueError(
                f"its flow was left out, which a file of plain data cannot hold ({record.unnamed}); give the flow as "
                "it was given to fit_density, load_density(path, flow=...)"
            )
        copies = [copy.deepcopy(flow).cpu() for _ in range(record.copies)]

        def give(place: Any) -> nn.Module:
            return copies[place[0]].get_submodule(place[1])

    with torch.random.fork_rng(devices=[]), _default_dtype(getattr(torch, record.dtype)):
        roots = made_from(record.plan, give)
    modules = nn.ModuleList(roots)
    own = _own_state(modules)
    if own.keys() != record.state.keys():
        odd = sorted(own.keys() ^ record.state.keys())
        raise ValueError(f"its modules, made again, hold other tensors, such as {odd[0]!r}: {_OTHER}")
    for name, value in own.items():
        if isinstance(value, Tensor) and value.dtype != record.state[name].dtype:
            value.data = value.data.to(record.state[name].dtype)
    modules.load_state_dict(record.state, strict=False)  # tensors with several names have one in the file
    for name, parameter in modules.named_parameters():
        parameter.requires_grad_(name not in record.frozen)
    for name, value in record.constants.items():
        place, _, last = name.rpartition(".")
        modules.get_submodule(place)._buffers[last] = value.clone()
    modules.train(record.training)
    if check and record.points:
        _check_points(roots[record.checked], record.points)
    return roots


_OTHER = (
    "another flow, another release, or parts that were changed after they were made; give the flow as it was for the "
    "fit, load_density(path, flow=...)"
)


@torch.no_grad()
def _check_points(density: Any, points: dict[str, Any]) -> None:
    then = points["log_prob"]
    now = _scores(density, points["value"], points["context"])
    tolerance = torch.finfo(then.dtype).eps ** (1 / 3)  # machines differ in summation order
    if now.dtype != then.dtype or now.shape != then.shape or not torch.allclose(now, then, tolerance, tolerance, True):
        raise ValueError(f"its density, made again, is another one: {_OTHER}")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def fit_of(kind: type[_Fit], record: FitRecord, modules: Sequence[Any]) -> _Fit:
    """Makes a fit of ``kind``, ``DensityFit``, from its record and modules.

    Raises:
        ValueError: for contents that no fit has.
    """
    hints = typing.get_type_hints(kind)
    expected = {each.name for each in fields(kind) if each.name not in _APART}  # type: ignore[arg-type]  # a dataclass
    if expected != record.entries.keys():
        raise ValueError(f"its entries are {sorted(record.entries)}, expected {sorted(expected)}")
    entries = {name: read(hints[name], value, name) for name, value in record.entries.items()}
    history = entries["history"]
    lengths = {len(history[name]) for name in ("epoch", "step", "train", "seconds")} | set(map(len, history.values()))
    if len(lengths) > 1 or not 0 <= entries["best_epoch"] <= max(lengths) or 0 in lengths:
        raise ValueError(f"a history of {sorted(lengths)} rows, of which {entries['best_epoch']} is the best")
    made: Any = kind
    fit = made(
        modules[record.flow],
        modules[record.distribution],
        **entries,
        members=tuple(fit_of(kind, read(FitRecord, each), modules) for each in record.members),
        kept=tuple(
            Kept(modules[part["density"]], _read_rows(part["fresh"]), _read_rows(part["trained"]))
            for part in record.kept
        ),
    )
    fit._verdict = None if record.verdict is None else read(DensityVerdict, record.verdict, "verdict")
    if fit._verdict is not None and fit._verdict.label not in LABELS:
        raise ValueError(f"a verdict {fit._verdict.label!r}")
    for part in fit.kept:
        _check_rows(part)
    return fit


def _read_rows(plain: Any) -> Rows | None:
    return None if plain is None else read(Rows, plain, "rows")


def _check_rows(part: Kept) -> None:
    event = getattr(part.density, "event_shape", None)
    for rows in (part.fresh, part.trained):
        if rows is None:
            continue
        lengths = {len(each) for each in vars(rows).values() if isinstance(each, Tensor)}
        if len(lengths) > 1 or (event is not None and rows.value.shape[1:] != tuple(event)):
            raise ValueError(f"kept rows of shape {tuple(rows.value.shape)} and lengths {sorted(lengths)}")
