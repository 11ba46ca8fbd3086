"""Converts a guide's fit to plain data, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import biject_to

from pyro_flows.core.chain import Chain
from pyro_flows.core.modes import on_cpu
from pyro_flows.core.recipes import made_from, recipe
from pyro_flows.distributions import Flow
from pyro_flows.infer.diagnostics.settling import ChainDraws
from pyro_flows.infer.diagnostics.verdict import LABELS
from pyro_flows.infer.guides.assessment import Assessment
from pyro_flows.infer.guides.builders import Builder, as_flow_of
from pyro_flows.infer.guides.loop import History
from pyro_flows.infer.models.latents import Latent, Latents, same_support
from pyro_flows.infer.models.supports import plain_support, support_of
from pyro_flows.transforms import Plated

__all__ = ["FlowRecord", "Numbers", "flow_of", "plain_flow", "plain_latents", "read_latents"]

POINTS = 8


# Flows.


@dataclass
class FlowRecord:
    """A flow by its recipe, its state, and a few points by which :func:`flow_of` checks it, on the CPU.

    If the chain's first part, the builder's, holds objects from outside this package, ``chain`` lacks it, and
    ``unnamed`` names them.
    """

    base: Any
    chain: Any
    unnamed: str | None
    state: dict[str, Tensor]
    frozen: list[str]
    training: bool
    device: str
    dim: int
    points: dict[str, Tensor]


@torch.no_grad()
def plain_flow(flow: Flow) -> FlowRecord:
    """Describes a flow.

    Raises:
        ValueError: if a part other than the builder's cannot be described.
    """
    training = flow.training
    flow.eval()  # these points must not change the state
    try:
        with torch.random.fork_rng():
            x = flow.base().sample((POINTS,))
        points = {"x": x, "y": flow.chain.forward_and_ladj(x)[0], "log_base": flow.base().log_prob(x)}
    finally:
        flow.train(training)
    try:
        base = recipe(flow.base)
    except TypeError as error:
        raise ValueError(
            f"GuideFit.save: a file of plain data cannot hold this flow's base: {error}; take one of this package, or "
            "save the flow's state_dict"
        ) from error
    record = FlowRecord(
        base,
        None,
        None,
        {name: value.detach().cpu() for name, value in flow.state_dict().items()},
        [name for name, p in flow.named_parameters() if not p.requires_grad],
        training,
        str(next(flow.parameters()).device),
        flow.event_shape[0],
        {name: value.cpu() for name, value in points.items()},
    )
    try:
        record.chain = recipe(flow.chain)
        flow_of(record)
        return record
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        record.unnamed = str(error)
    try:
        first, *parts = list(flow.chain) if isinstance(flow.chain, Chain) else [flow.chain]
        if not parts:
            raise TypeError(record.unnamed)
        record.chain = [recipe(part) for part in parts]
        if isinstance(first, Plated):
            record.chain.insert(0, _without_builder(first))
        return record
    except TypeError as error:
        raise ValueError(
            f"GuideFit.save: a file of plain data cannot hold this flow: {error}; save its state_dict, which a flow "
            "made in the same way can load"
        ) from error


@on_cpu
def flow_of(plain: FlowRecord, builder: Builder | None = None) -> Flow:
    """Rebuilds the flow of :func:`plain_flow` on the CPU, with the builder if its part was left out.

    Raises:
        ValueError: if the flow differs from the saved one.
    """
    with torch.random.fork_rng(devices=[]):  # building draws initial parameters
        chain: Any = made_from(plain.chain)
        if plain.unnamed is not None:
            if builder is None:
                raise ValueError(
                    f"the builder of its flow used something that a file of plain data cannot hold: {plain.unnamed}; "
                    "give the guide's builder, load_guide(path, builder=...)"
                )
            first = (
                _with_builder(chain.pop(0), builder) if isinstance(chain[0], list) else as_flow_of(builder, plain.dim)
            )
            chain = Chain([first, *chain])
        flow = Flow(chain, made_from(plain.base))
    dtypes = {name: value.dtype for name, value in plain.state.items()}
    flow.to(next(dtype for dtype in dtypes.values() if dtype.is_floating_point))
    flow.load_state_dict(plain.state)
    if {name: value.dtype for name, value in flow.state_dict().items()} != dtypes:
        raise ValueError("its flow has several dtypes")
    for name, parameter in flow.named_parameters():
        parameter.requires_grad_(name not in plain.frozen)
    flow.eval()
    points = plain.points
    with torch.no_grad():
        found = flow.chain.forward_and_ladj(points["x"])[0], flow.base().log_prob(points["x"])
    for now, then in zip(found, (points["y"], points["log_base"]), strict=True):
        tolerance = torch.finfo(then.dtype).eps ** (1 / 3)  # machines differ in summation order
        if now.shape != then.shape or not torch.allclose(now, then, tolerance, tolerance, equal_nan=True):
            raise ValueError(
                "its flow, made again, is another one: another builder, another release, or parts that were changed "
                "after they were made; give the guide's builder, load_guide(path, builder=...)"
            )
    return flow.train(plain.training)


def _without_builder(plated: Plated) -> list[Any]:
    """Describes a flow with the model's structure, whose globals' flow begins with what the builder made."""
    (dim, globals_, *places), _ = plated.__dict__["_arguments"]
    return recipe([dim, list(globals_)[1:], *places])


def _with_builder(plain: list[Any], builder: Builder) -> Plated:
    dim, rest, *places = plain
    return Plated(dim, Chain([as_flow_of(builder, *rest[0].event_shape), *rest]), *places)


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


@dataclass
class Numbers:
    """A fit without its flow and latents."""

    history: History
    assessment: Assessment
    failures: int
    evaluations: int
    notes: tuple
    chains: ChainDraws | None

    def check(self, dim: int) -> None:
        """Refuses shapes and words that no fit of ``dim`` dimensions has."""
        found, probe = self.assessment, self.assessment.probe
        _check_shapes(vars(found), len(found.draws), draws=(dim,))
        if probe is not None:
            _check_shapes(vars(probe), len(probe.locations), locations=(dim,), scale=(dim, dim))
        if found.walk is not None:
            _check_shapes(vars(found.walk), len(found.walk.log_weights))
        if self.chains is not None:
            places = self.chains.draws.shape
            if (
                len(places) != 3
                or places[2] != dim
                or {self.chains.log_p.shape, self.chains.log_q.shape} != {places[:2]}
            ):
                raise ValueError(f"chains of shape {tuple(places)}")
        if found.verdict.label not in LABELS:
            raise ValueError(f"a verdict {found.verdict.label!r}")
        if len({len(column) for column in vars(self.history).values()}) > 1:
            raise ValueError("the lists of its history have different lengths")


def _check_shapes(values: dict[str, Any], count: int, **events: tuple[int, ...]) -> None:
    for name, value in values.items():
        expected = (count, *events.get(name, ()))
        if isinstance(value, Tensor) and value.shape != expected:
            raise ValueError(f"{name!r} has the shape {tuple(value.shape)}, expected {expected}")
