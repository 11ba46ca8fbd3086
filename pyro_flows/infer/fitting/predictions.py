"""Runs of a model at given draws of its latents: predictions, and log-likelihoods of the data."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pyro
import torch
from pyro import poutine
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_flows.infer.joint import JointDensity

__all__ = ["computed", "log_likelihoods", "observed", "predictions"]

PLATE = "_draws_at_once"
AT_ONCE = 1000
Site = dict[str, object]
Model = Callable[..., object]
Pick = Callable[[Site], Tensor]
Wanted = Callable[[str, Site, set[str]], bool]


def predictions(density: JointDensity, z: Tensor) -> dict[str, Tensor]:
    """Draws of the model's other sites, shape ``(n, *site.shape)``, at unconstrained latents ``z`` of shape (n, dim).

    Sites with data are drawn anew; ``pyro.deterministic`` ones are computed.
    """
    return _collect(_Redrawn()(density.model), density, z, _value, _is_predicted)


def computed(density: JointDensity, z: Tensor) -> dict[str, Tensor]:
    """What the model computes of its latents by ``pyro.deterministic``, shape ``(n, *site.shape)``."""
    return _collect(density.model, density, z, _value, _is_computed)


def log_likelihoods(density: JointDensity, z: Tensor) -> dict[str, Tensor]:
    """Log-density of each datum of each observed site, shape ``(n, *site.batch_shape)``, in nats, not scaled."""
    return _collect(density.model, density, z, _log_prob, _is_data)


def observed(density: JointDensity, z: Tensor) -> dict[str, Tensor]:
    """The data of each observed site, ``z`` of shape ``(n, dim)`` with ``n > 0``."""
    with torch.no_grad(), poutine.block():
        trace = _trace(density.model, density, density.latents.draws(z[0]))
    return {name: site["value"] for name, site in _found(trace, density, _is_data).items()}


class _Redrawn(UnconditionMessenger):
    """Draws data anew; what ``pyro.deterministic`` computes is no data."""

    def _pyro_sample(self, msg: Site) -> None:
        if not msg["infer"].get("_deterministic", False):
            super()._pyro_sample(msg)


def _value(site: Site) -> Tensor:
    return site["value"]


def _log_prob(site: Site) -> Tensor:
    return site["fn"].log_prob(site["value"])


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


def _collect(model: Model, density: JointDensity, z: Tensor, pick: Pick, wanted: Wanted) -> dict[str, Tensor]:
    if not len(z):
        one = _collect(model, density, z.new_zeros(1, z.shape[1]), pick, wanted)
        return {name: value[:0] for name, value in one.items()}
    vectorized = density.vectorized
    parts: list[dict[str, Tensor]] = []
    with torch.no_grad(), poutine.block():
        if vectorized:
            try:
                parts = [_together(model, density, chunk, pick, wanted) for chunk in z.split(AT_ONCE)]
            except Exception as error:  # whatever the model says when its tensors get a dimension more
                warnings.warn(
                    "this model does not run for many draws at once, so they go one at a time: "
                    f"{type(error).__name__}: {error}",
                    stacklevel=4,
                )
                vectorized = False
        if not vectorized:
            for row in z:
                found = _found(_trace(model, density, density.latents.draws(row)), density, wanted)
                parts.append({name: pick(site)[None] for name, site in found.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _together(model: Model, density: JointDensity, z: Tensor, pick: Pick, wanted: Wanted) -> dict[str, Tensor]:
    count, latents = len(z), density.latents
    nesting = latents.max_plate_nesting
    values, _ = latents.unpack(z, nesting)
    with pyro.plate(PLATE, count, dim=-1 - nesting):
        many = _found(_trace(model, density, values), density, wanted)
    alone = _trace(model, density, latents.draws(z[0])).nodes
    found = {}
    for name, site in many.items():
        value, shape = pick(site), pick(alone[name]).shape
        if value.shape == shape and count > 1:  # it depends on no latent
            found[name] = value.expand(count, *shape)
        else:
            found[name] = value.reshape(count, *shape)
    return found


def _found(trace: object, density: JointDensity, wanted: Wanted) -> dict[str, Site]:
    latents = {site.name for site in density.latents}
    return {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and wanted(n, s, latents)}


def _trace(model: Model, density: JointDensity, values: dict[str, Tensor]) -> object:
    return poutine.trace(poutine.condition(model, data=values)).get_trace(*density.args, **density.kwargs)
