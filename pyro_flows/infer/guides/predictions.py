"""Predictions and log-likelihoods at given draws of a model's latents."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.inspect import get_model_relations
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor

from pyro_flows.infer.machine.pace import in_pieces
from pyro_flows.infer.models.enumeration import pointwise
from pyro_flows.infer.models.joint import JointDensity
from pyro_flows.infer.models.sites import COMPUTED, DATA, DRAWN, FACTOR, LATENT, Model, Site

__all__ = ["computed", "groups", "log_likelihoods", "observed", "redrawn", "seen", "to_redraw"]

PLATE = "_draws_at_once"
AT_ONCE = 1000
TRIED = 20  # sites redrawn to see whether others change

Values = dict[str, Tensor]


def redrawn(density: JointDensity, z: Tensor, redraw: Collection[str]) -> Values:
    """Draws the model's other sites, shape ``(n, *site.shape)``, at unconstrained latents ``z``, shape ``(n, dim)``.

    Includes computed sites; data that ``redraw`` does not name keep their values.
    """
    try:
        return _values(_Redrawn(redraw)(density.model), density, z, lambda site: site.kind not in (LATENT, FACTOR))
    except NotImplementedError as error:
        raise NotImplementedError(
            f"predictive: the distribution of one of the sites {sorted(redraw)} cannot be drawn from, as Pyro's "
            "VonMises3D; name others by redraw=[...], or leave predictions out, to_arviz(posterior_predictive=False)"
        ) from error


def computed(density: JointDensity, z: Tensor) -> Values:
    """Returns computed sites, e.g. of ``pyro.deterministic``, shape ``(n, *site.shape)``."""
    return _values(density.model, density, z, lambda site: site.kind == COMPUTED)


def log_likelihoods(density: JointDensity, z: Tensor) -> Values:
    """Returns the log-density of each datum at each draw, scaled as in the model's, in nats.

    The shape is ``(n, *site.batch_shape)``, or ``(n, entries that count)`` for a masked site. Data that depend on no
    latent are left out. Discrete latents are summed out; data that share them are left out with a warning.
    """
    alone = _alone(density, z)
    data = {name: site for name, site in alone.items() if site.kind == DATA}
    refused: dict[str, str] = {}
    with torch.no_grad():
        most = AT_ONCE if density.vectorized else 1
        parts = in_pieces(density.pace, z, lambda chunk: _log_likelihoods(density, chunk, data, refused), most)
    for name, why in refused.items():
        warnings.warn(f"to_arviz: no log-likelihood of {name!r}, which {why}", stacklevel=3)
    above = _above(density, z) or {}
    fixed = {name for name, site in alone.items() if site.kind in (DATA, FACTOR)}
    found = {}
    for name, value in _joined(parts).items():
        if not above.get(name, {name}) - fixed and (value == value[:1]).all():
            continue  # depends on no latent
        found[name] = seen(value, data[name], 0)
    return {name: value for name, value in found.items() if value[:1].numel()}


def observed(density: JointDensity, z: Tensor) -> dict[str, Site]:
    """Returns the observed sites, at the first draw."""
    return {name: site for name, site in _alone(density, z).items() if site.kind == DATA}


def seen(value: Tensor, site: Site, event_dim: int | None = None) -> Tensor:
    """Returns the entries of a site's data, draws or densities that its mask keeps, in one batch dimension."""
    if site.mask is None:
        return value
    entries = torch.as_tensor(site.mask, device=value.device).expand(site.log_prob(scaled=False).shape)
    cut = value.dim() - (site.fn.event_dim if event_dim is None else event_dim)
    lead, event = value.shape[: max(cut - entries.dim(), 0)], value.shape[cut:]
    flat = value.expand(lead + entries.shape + event).reshape(*lead, -1, *event)
    return flat.index_select(len(lead), entries.flatten().nonzero().squeeze(-1))


def to_redraw(density: JointDensity, z: Tensor, redraw: str | Sequence[str] | None) -> list[str]:
    """Returns names of the data to redraw: those given, ``"all"``, or by default data on which nothing depends.

    The default keeps conditioned data and covariates.

    Raises:
        ValueError: for names without data.
    """
    sites = _alone(density, z)
    data = [name for name, site in sites.items() if site.kind == DATA]
    if redraw == "all":
        return data
    if redraw is not None:
        names = [redraw] if isinstance(redraw, str) else list(redraw)
        unknown = [name for name in names if name not in data]
        if unknown:
            raise ValueError(f"predictive: expected redraw to name sites with data, {data}, or 'all', got {unknown}")
        return names
    above = _above(density, z)
    if above is None:
        return data
    below = {name: {n for n in above if name in above[n] and sites[n].kind != COMPUTED} for name in data}
    ends = [name for name in data if not below[name] - {name}]
    # In-place operations and NumPy leave no trace.
    return ends if len(ends) > TRIED else [name for name in ends if not _moves_others(density, z, sites, name)]


def groups(
    density: JointDensity,
    z: Tensor,
    extra: set[str],
    redraw: str | Sequence[str] | None,
    *,
    predictive: bool,
    likelihood: bool,
) -> dict[str, Values]:
    """Makes ArviZ's groups beside the posterior, which has the sites of ``extra``."""
    data = observed(density, z)
    found = {"observed_data": {name: seen(site.value, site) for name, site in data.items()}}
    if predictive:
        names = to_redraw(density, z, redraw)
        found["posterior_predictive"] = {
            name: seen(value, data[name]) if name in data else value
            for name, value in redrawn(density, z, names).items()
            if name not in (extra | data.keys()) - set(names)
        }
    if likelihood:
        found["log_likelihood"] = log_likelihoods(density, z)
    return found


def _moves_others(density: JointDensity, z: Tensor, sites: dict[str, Site], name: str) -> bool:
    """Whether redrawing one site changes the log-density of other data."""
    values = _first(density, z) | {n: site.value for n, site in sites.items() if site.kind == DRAWN}
    try:
        with torch.no_grad(), torch.random.fork_rng():
            anew = density.sites_at(values, _Redrawn([name])(density.model))
            scores = [
                (site.log_prob(), anew[n].log_prob()) for n, site in sites.items() if site.kind == DATA and n != name
            ]
    except Exception:  # e.g. a site that cannot be drawn
        return False
    return not all(torch.equal(then, now) for then, now in scores)


class _Redrawn(UnconditionMessenger):
    """Redraws some data."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            super()._pyro_sample(msg)


def _first(density: JointDensity, z: Tensor) -> Values:
    """Returns the first draw's latents, or mid-support values without draws."""
    return density.latents.draws(z[0] if len(z) else z.new_zeros(z.shape[1]))


def _alone(density: JointDensity, z: Tensor) -> dict[str, Site]:
    with torch.no_grad():
        return density.sites_at(_first(density, z))


def _above(density: JointDensity, z: Tensor) -> dict[str, set[str]] | None:
    """Returns each site's direct dependencies; ``None``, with a warning, if Pyro cannot tell."""
    values = _first(density, z)
    try:
        with poutine.block():
            found = get_model_relations(poutine.condition(density.model, data=values), density.args, density.kwargs)
    except Exception as error:  # Pyro's tracking does not follow every model
        warnings.warn(
            "Pyro cannot tell which sites of this model depend on which, so all data count as outcomes and are drawn "
            f"anew; name those to draw by redraw=[...]: {type(error).__name__}: {error}",
            stacklevel=4,
        )
        return None
    return {name: set(upstream) for name, upstream in found["sample_sample"].items()}


def _log_likelihoods(density: JointDensity, z: Tensor, data: dict[str, Site], refused: dict[str, str]) -> Values:
    nesting = density.latents.max_plate_nesting
    count = len(z) if density.vectorized else None
    values = density.latents.unpack(z, nesting)[0] if density.vectorized else density.latents.draws(z[0])
    if density.discrete:
        trace, sites = density.enumerated_at(values, nesting + (count is not None))
        found, why = pointwise(trace, sites, count, nesting)
        refused |= why
        data = {name: site for name, site in data.items() if name not in refused}
    else:
        sites, found = density.sites_at(values), {}
    each = {name: found[name] if name in found else sites[name].log_prob() for name in data}
    shapes = {name: site.log_prob(scaled=False).shape for name, site in data.items()}
    return {name: _by_draw(value, len(z), shapes[name]) for name, value in each.items()}


def _by_draw(value: Tensor, count: int, shape: torch.Size) -> Tensor:
    if value.numel() == shape.numel() and count > 1:  # depends on no latent
        return value.reshape(shape).expand(count, *shape)
    return value.reshape(count, *shape)


def _values(model: Model, density: JointDensity, z: Tensor, wanted: Callable[[Site], bool]) -> Values:
    if not len(z):
        one = _values(model, density, z.new_zeros(1, z.shape[1]), wanted)
        return {name: value[:0] for name, value in one.items()}
    with torch.no_grad():
        if density.vectorized:
            try:
                together = partial(_together, model, density, wanted)
                return _joined(in_pieces(density.pace, z, together, AT_ONCE))
            except Exception as error:  # models raise anything at an extra dimension
                warnings.warn(
                    "this model does not run for many draws at once, so they go one at a time: "
                    f"{type(error).__name__}: {error}",
                    stacklevel=4,
                )
        runs = (density.sites_at(density.latents.draws(row), model) for row in z)
        return _joined([{name: site.value[None] for name, site in sites.items() if wanted(site)} for sites in runs])


def _joined(parts: list[Values]) -> Values:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _together(model: Model, density: JointDensity, wanted: Callable[[Site], bool], z: Tensor) -> Values:
    nesting = density.latents.max_plate_nesting
    values, _ = density.latents.unpack(z, nesting)

    def many_at_once(*args: object, **kwargs: object) -> object:
        with pyro.plate(PLATE, len(z), dim=-1 - nesting):  # draws latent-independent sites for each row
            return model(*args, **kwargs)

    many = density.sites_at(values, many_at_once)
    alone = density.sites_at(density.latents.draws(z[0]), model)
    return {name: _by_draw(site.value, len(z), alone[name].value.shape) for name, site in many.items() if wanted(site)}
