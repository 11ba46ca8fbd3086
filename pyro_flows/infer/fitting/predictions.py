"""Runs of a model at given draws of its latents: predictions, and log-likelihoods of the data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import pyro
import torch
from pyro import poutine
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_flows.infer.latents import Latents

__all__ = ["computed", "log_likelihoods", "observed", "predictions"]

PLATE = "_draws_at_once"
AT_ONCE = 1000
Site = dict[str, object]


def predictions(
    model: Callable[..., object],
    latents: Latents,
    z: Tensor,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    vectorized: bool = True,
) -> dict[str, Tensor]:
    """Draws of the model's other sites, shape ``(n, *site.shape)``, at unconstrained latents ``z`` of shape (n, dim).

    Sites with data are drawn anew; ``pyro.deterministic`` ones are computed.
    """

    def pick(site: Site) -> Tensor | None:
        return site["value"]

    return _collect(_redrawn(model), latents, z, args, kwargs, vectorized, pick, _is_predicted)


def computed(
    model: Callable[..., object],
    latents: Latents,
    z: Tensor,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    vectorized: bool = True,
) -> dict[str, Tensor]:
    """What the model computes of its latents by ``pyro.deterministic``, shape ``(n, *site.shape)``."""

    def pick(site: Site) -> Tensor:
        return site["value"]

    return _collect(model, latents, z, args, kwargs, vectorized, pick, _is_computed)


def log_likelihoods(
    model: Callable[..., object],
    latents: Latents,
    z: Tensor,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    vectorized: bool = True,
) -> dict[str, Tensor]:
    """Log-density of each datum of each observed site, shape ``(n, *site.batch_shape)``, in nats, not scaled."""

    def pick(site: Site) -> Tensor:
        return site["fn"].log_prob(site["value"])

    return _collect(model, latents, z, args, kwargs, vectorized, pick, _is_data)


def observed(
    model: Callable[..., object], latents: Latents, z: Tensor, args: tuple, kwargs: Mapping
) -> dict[str, Tensor]:
    """The data of each observed site."""
    with torch.no_grad(), poutine.block():
        trace = poutine.trace(poutine.condition(model, data=latents.draws(z[0]))).get_trace(*args, **kwargs)
    known = {site.name for site in latents}
    return {n: s["value"] for n, s in trace.nodes.items() if _is_data(n, s, known)}


class _Redrawn(UnconditionMessenger):
    """Draws data anew; what ``pyro.deterministic`` computes is no data."""

    def _pyro_sample(self, msg: Site) -> None:
        if not msg["infer"].get("_deterministic", False):
            super()._pyro_sample(msg)


def _redrawn(model: Callable[..., object]) -> Callable[..., object]:
    return _Redrawn()(model)


def _is_sample(site: Site) -> bool:
    return site["type"] == "sample" and not site_is_subsample(site)


def _is_computed(name: str, site: Site, latents: set[str]) -> bool:
    return _is_sample(site) and site["infer"].get("_deterministic", False)


def _is_data(name: str, site: Site, latents: set[str]) -> bool:
    return (
        _is_sample(site)
        and site["is_observed"]
        and name not in latents
        and not site["infer"].get("_deterministic", False)
        and type(site["fn"]).__name__ not in ("Unit", "Delta")
    )


def _is_predicted(name: str, site: Site, latents: set[str]) -> bool:
    return _is_sample(site) and name not in latents and type(site["fn"]).__name__ != "Unit"


def _collect(
    model: Callable[..., object],
    latents: Latents,
    z: Tensor,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    vectorized: bool,
    pick: Callable[[Site], Tensor],
    wanted: Callable[[str, Site, set[str]], bool],
) -> dict[str, Tensor]:
    if not len(z):
        one = _collect(model, latents, z.new_zeros(1, latents.dim), args, kwargs, vectorized, pick, wanted)
        return {name: value[:0] for name, value in one.items()}
    names = {site.name for site in latents}
    parts: list[dict[str, Tensor]] = []
    with torch.no_grad(), poutine.block():
        if vectorized:
            try:
                for chunk in z.split(AT_ONCE):
                    parts.append(_together(model, latents, chunk, args, kwargs, pick, wanted, names))
            except Exception as error:  # whatever the model says when its tensors get a dimension more
                warnings.warn(
                    "this model does not run for many draws at once, so they go one at a time: "
                    f"{type(error).__name__}: {error}",
                    stacklevel=4,
                )
                parts, vectorized = [], False
        if not vectorized:
            for row in z:
                trace = _trace(model, latents.draws(row), args, kwargs)
                found = {n: pick(s) for n, s in trace.nodes.items() if s["type"] == "sample" and wanted(n, s, names)}
                parts.append({n: v[None] for n, v in found.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _together(
    model: Callable[..., object],
    latents: Latents,
    z: Tensor,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    pick: Callable[[Site], Tensor],
    wanted: Callable[[str, Site, set[str]], bool],
    names: set[str],
) -> dict[str, Tensor]:
    count, nesting = len(z), latents.max_plate_nesting
    values, _ = latents.unpack(z, nesting)
    with pyro.plate(PLATE, count, dim=-1 - nesting):
        trace = _trace(model, values, args, kwargs)
    alone = _trace(model, latents.draws(z[0]), args, kwargs).nodes
    found = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not wanted(name, site, names):
            continue
        value, shape = pick(site), pick(alone[name]).shape
        if value.shape == shape and count > 1:  # it depends on no latent
            found[name] = value.expand(count, *shape)
        else:
            found[name] = value.reshape(count, *shape)
    return found


def _trace(model: Callable[..., object], values: dict[str, Tensor], args: tuple, kwargs: Mapping) -> object:
    return poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs)
