"""Latents and data drawn together from a Pyro model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["Simulation", "argument_names", "simulate"]


class Simulation(NamedTuple):
    """Latents and data by site, and the argument for each data site."""

    latents: dict[str, Tensor]
    data: dict[str, Tensor]
    arguments: dict[str, str]


class _Proper(Messenger):
    """Refuses a site that cannot be drawn, by name."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        inner = msg["fn"]
        while not isinstance(inner, (dist.ImproperUniform, dist.Unit)) and hasattr(inner, "base_dist"):
            inner = inner.base_dist
        name = msg["name"]
        fn = msg["fn"].base_dist if isinstance(msg["fn"], torch.distributions.Independent) else msg["fn"]
        flat = isinstance(fn, MaskedDistribution) and not torch.as_tensor(fn._mask).any()
        flat = (flat or msg["mask"] is False) and not msg["infer"].get("was_observed")
        if isinstance(inner, dist.ImproperUniform) or flat:
            raise ValueError(
                f"simulate: the prior of {name!r} is improper and cannot be drawn from; give it a proper one, such "
                "as a wide normal"
            )
        if isinstance(inner, dist.Unit):
            raise ValueError(
                f"simulate: the model has a factor {name!r}, so that its prior and data cannot be drawn; write it as a "
                "sample statement with a distribution"
            )


def simulate(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    observed: Mapping[str, str] | None = None,
) -> Simulation:
    """Runs the model without its data, of which only the shapes may matter.

    ``observed`` names each data site's argument, by default the site's name.

    Raises:
        ValueError: for a model without data or latents, with an improper prior, a factor, or a scaled or subsampled
            site.
    """
    with torch.no_grad(), _Proper():
        trace = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    named = dict(observed or {})
    latents: dict[str, Tensor] = {}
    data: dict[str, Tensor] = {}
    nodes: dict[str, Any] = trace.nodes
    for name, site in nodes.items():
        if site["type"] != "sample":
            continue
        if site_is_subsample(site):
            size, part = site["fn"].size, site["value"].numel()
            if part < size:
                raise ValueError(
                    f"simulate: the plate {name!r} takes {part} of {size}, but data can only be drawn for all; call "
                    "the model without subsampling"
                )
            continue
        if site["infer"].get("_deterministic"):
            continue
        if isinstance(site["scale"], Tensor) or site["scale"] != 1.0:
            raise ValueError(
                f"simulate: the density of {name!r} is scaled (by poutine.scale or a subsampling plate), so that draws "
                "do not follow it; simulate from the model without the scale"
            )
        kind = data if name in named or site["infer"].get("was_observed") else latents
        kind[name] = site["value"].detach()
    unknown = [name for name in named if name not in data]
    if unknown:
        raise ValueError(
            f"simulate: observed names {unknown}, which the model does not have; its sites are {[*latents, *data]}"
        )
    if not data:
        raise ValueError(
            f"simulate: the model observes nothing; pass its data, or name its data sites in observed, e.g. "
            f"observed={{'y': 'y'}}; its sites are {list(latents)}"
        )
    if not latents:
        raise ValueError(f"simulate: the model has no latents; its data sites are {list(data)}")
    return Simulation(latents, data, {site: named.get(site, site) for site in data})


def argument_names(model: Callable[..., Any]) -> list[str] | None:
    """Returns the names of a model's arguments; ``None`` if it takes any, or does not say."""
    try:
        called = model.forward if isinstance(model, torch.nn.Module) else model
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):  # some callables have no signature
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else [p.name for p in parameters]
