"""Converts a guide's fit to plain data, and back."""

from __future__ import annotations

import typing
from dataclasses import is_dataclass
from typing import Any, TypeVar

import torch
from torch import Size, Tensor
from torch.distributions import biject_to

from pyro_flows.core.chain import Chain
from pyro_flows.core.recipes import made_from, recipe
from pyro_flows.distributions import Flow
from pyro_flows.infer.diagnostics.verdict import LABELS
from pyro_flows.infer.guides.assessment import Assessment
from pyro_flows.infer.guides.auto import Builder, as_flow_of
from pyro_flows.infer.guides.loop import History
from pyro_flows.infer.models.latents import Latent, Latents, same_support
from pyro_flows.infer.models.supports import plain_support, support_of

__all__ = ["flow_of", "plain_flow", "plain_latents", "read_assessment", "read_latents"]

POINTS = 8

_T = TypeVar("_T")


# Flows.


@torch.no_grad()
def plain_flow(flow: Flow) -> dict[str, Any]:
    """Describes a flow by its recipe, its state, and a few points by which :func:`flow_of` checks it.

    If the chain's first part, the builder's, holds objects from outside this package, it is left out, and ``"unnamed"``
    names them.

    Raises:
        ValueError: if another part cannot be described.
    """
    state = {name: value.detach() for name, value in flow.state_dict().items()}
    plain: dict[str, Any] = {
        "unnamed": None,
        "state": state,
        "frozen": [name for name, p in flow.named_parameters() if not p.requires_grad],
        "training": flow.training,
        "device": str(next(flow.parameters()).device),
        "dim": flow.event_shape[0],
    }
    training = flow.training
    flow.eval()  # these points must not change the state
    try:
        with torch.random.fork_rng():
            x = flow.base().sample((POINTS,))
        plain["points"] = {"x": x, "y": flow.chain.forward_and_ladj(x)[0], "log_base": flow.base().log_prob(x)}
    finally:
        flow.train(training)
    try:
        plain["base"] = recipe(flow.base)
    except TypeError as error:
        raise ValueError(
            f"GuideFit.save: a file of plain data cannot hold this flow's base: {error}; take one of this package, or "
            "save the flow's state_dict"
        ) from error
    try:
        plain["chain"] = recipe(flow.chain)
        flow_of(moved(plain, torch.device("cpu")))
        return plain
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        why = str(error)
    try:
        parts = list(flow.chain)[1:] if isinstance(flow.chain, Chain) else []
        if not parts:
            raise TypeError(why)
        return {**plain, "chain": [recipe(part) for part in parts], "unnamed": why}
    except TypeError as error:
        raise ValueError(
            f"GuideFit.save: a file of plain data cannot hold this flow: {error}; save its state_dict, which a flow "
            "made in the same way can load"
        ) from error


def flow_of(plain: dict[str, Any], builder: Builder | None = None) -> Flow:
    """Rebuilds the flow of :func:`plain_flow` on the CPU, with the builder if its part was left out.

    Raises:
        ValueError: if the flow differs from the saved one.
    """
    unnamed = plain["unnamed"]
    if unnamed is not None and builder is None:
        raise ValueError(
            f"the builder of its flow used something that a file of plain data cannot hold: {unnamed}; give the "
            "guide's builder, load_guide(path, builder=...)"
        )
    with torch.random.fork_rng(devices=[]):  # building draws initial parameters
        if unnamed is None or builder is None:
            chain = made_from(plain["chain"])
        else:
            chain = Chain([as_flow_of(builder, plain["dim"]), *made_from(plain["chain"])])
        flow = Flow(chain, made_from(plain["base"]))
    dtypes = {name: value.dtype for name, value in plain["state"].items()}
    flow.to(next(dtype for dtype in dtypes.values() if dtype.is_floating_point))
    flow.load_state_dict(plain["state"])
    if {name: value.dtype for name, value in flow.state_dict().items()} != dtypes:
        raise ValueError("its flow has several dtypes")
    for name, parameter in flow.named_parameters():
        parameter.requires_grad_(name not in plain["frozen"])
    flow.eval()
    points = plain["points"]
    with torch.no_grad():
        found = flow.chain.forward_and_ladj(points["x"])[0], flow.base().log_prob(points["x"])
    for now, then in zip(found, (points["y"], points["log_base"]), strict=True):
        tolerance = torch.finfo(then.dtype).eps ** (1 / 3)  # machines differ in summation order
        if now.shape != then.shape or not torch.allclose(now, then, tolerance, tolerance, equal_nan=True):
            raise ValueError(
                "its flow, made again, is another one: another builder, another release, or parts that were changed "
                "after they were made; give the guide's builder, load_guide(path, builder=...)"
            )
    return flow.train(plain["training"])


# Latents.


def plain_latents(latents: Latents) -> dict[str, Any]:
    """Describes latents by names, shapes, dtypes and supports.

    Raises:
        ValueError: for a support from outside torch and Pyro.
    """
    sites = []
    for site in latents:
        try:
            support = plain_support(site.support)
            if not same_support(support_of(support), site.support):
                raise TypeError(f"{site.support!r} has been changed")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"GuideFit.save: a file of plain data cannot hold the support of the latent {site.name!r}: {error}; "
                "supports of torch and Pyro can be held"
            ) from error
        sites.append(
            {
                "name": site.name,
                "support": support,
                **{name: tuple(getattr(site, name)) for name in ("batch_shape", "event_shape", "free_shape")},
                "dtype": str(site.dtype).removeprefix("torch."),
            }
        )
    plain = {"sites": sites, "max_plate_nesting": latents.max_plate_nesting}
    read_latents(plain)  # refuses to write what it cannot read
    return plain


def read_latents(plain: dict[str, Any]) -> Latents:
    """Rebuilds the latents of :func:`plain_latents`.

    Raises:
        ValueError: for inconsistent shapes.
    """
    sites, start = [], 0
    for each in plain["sites"]:
        batch, event, free = (Size(each[name]) for name in ("batch_shape", "event_shape", "free_shape"))
        dtype = getattr(torch, each["dtype"])
        site = Latent(each["name"], support_of(each["support"]), batch, event, free, dtype, start)
        if not isinstance(site.name, str) or biject_to(site.support).forward_shape(batch + free) != site.shape:
            raise ValueError(f"the latent {site.name!r} has other shapes than its support")
        sites.append(site)
        start += site.size
    return Latents(sites, int(plain["max_plate_nesting"]))


# Numbers.


def record(cls: type[_T], plain: dict[str, Any]) -> _T:
    """Makes a dataclass, with nested ones, from its entries.

    Raises:
        ValueError: if entries are missing, unknown or of another type.
    """
    kinds = typing.get_type_hints(cls)
    if kinds.keys() != plain.keys():
        raise ValueError(f"{cls.__name__} has {sorted(plain)}, expected {sorted(kinds)}")
    made = {}
    for name, value in plain.items():
        kind, parts = typing.get_origin(kinds[name]), typing.get_args(kinds[name])
        for part in (kinds[name], *parts):
            if isinstance(part, type) and is_dataclass(part) and isinstance(value, dict):
                value = record(part, value)
        pairs = [(value, kind if kind in (list, dict) else kinds[name])]
        if kind in (list, dict):
            pairs += [(each, parts[-1]) for each in (value.values() if isinstance(value, dict) else value)]
        for each, expected in pairs:
            if not isinstance(each, (int, float) if expected is float else expected):
                raise ValueError(f"{name!r} of {cls.__name__} holds a {type(each).__name__}")
        made[name] = value
    return cls(**made)


def read_assessment(plain: dict[str, Any], dim: int) -> Assessment:
    """Makes the assessment of a guide with ``dim`` dimensions."""
    found = record(Assessment, plain)
    _check_shapes(vars(found), len(found.draws), draws=(dim,))
    if found.probe is not None:
        _check_shapes(vars(found.probe), len(found.probe.locations), locations=(dim,), scale=(dim, dim))
    if found.verdict.label not in LABELS:
        raise ValueError(f"a verdict {found.verdict.label!r}")
    return found


def _check_shapes(values: dict[str, Any], count: int, **events: tuple[int, ...]) -> None:
    for name, value in values.items():
        expected = (count, *events.get(name, ()))
        if isinstance(value, Tensor) and value.shape != expected:
            raise ValueError(f"{name!r} has the shape {tuple(value.shape)}, expected {expected}")


def read_history(plain: dict[str, Any]) -> History:
    """Makes a history from its columns."""
    found = record(History, plain)
    if len({len(column) for column in vars(found).values()}) > 1:
        raise ValueError("the lists of its history have different lengths")
    return found


# Devices.


def device_of(map_location: Any, saved: str) -> torch.device:
    """Returns the device for a ``map_location`` of ``torch.load``.

    Raises:
        ValueError: for an unavailable device.
    """
    place: str | int | torch.device = saved
    if isinstance(map_location, (str, torch.device, int)):
        place = map_location
    elif isinstance(map_location, dict):
        place = map_location.get(saved, saved)
    elif map_location is not None:
        storage = map_location(torch.empty(0).untyped_storage(), saved)
        place = saved if storage is None else storage.device
    try:
        return torch.empty(0, device=place).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"load_guide: the device {str(place)!r} is not there ({error}); give another one, e.g. map_location='cpu'"
        ) from error


def moved(value: Any, device: torch.device) -> Any:
    """Moves all tensors of plain data to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(each, device) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(moved(each, device) for each in value)
    return value
