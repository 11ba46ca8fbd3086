"""Turns draws of a model's latents into values of a guide's own sites.

- An ``AutoContinuous`` samples one vector, ``_{name}_latent``: latents mapped to unconstrained space by ``biject_to``
  and flattened, in the order of the ``prototype_trace``. The guide adds the Jacobians.
- An ``AutoNormal`` samples ``{site}_unconstrained`` for each latent, in the same space.
- An ``AutoGuideList`` consists of these.
- Any other guide samples only the latents, from distributions with a density.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous, AutoGuideList, AutoNormal
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import biject_to

from pyro_flows.core.checks import first_few
from pyro_flows.infer.models.sites import Message, Model, latent_messages

__all__ = ["guide_values"]


def guide_values(guide: Model, trace: Trace, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns values ``(n, *shape)`` for every site that the guide, which has run, samples from a density.

    Raises:
        ValueError: if the sites, a shape or a support do not fit, or the guide has no density of the latents.
    """
    sites = latent_messages(trace)
    latents = {name: site for name, site in sites.items() if not site["infer"].get("is_auxiliary")}
    missing, unknown = sorted(set(latents) - set(draws)), sorted(set(draws) - set(latents))
    if missing or unknown:
        raise ValueError(
            f"ForwardKL: expected draws of the guide's sites {sorted(latents)}, got {sorted(draws)}"
            + (f"; add {missing}" if missing else "")
            + (f"; leave {unknown} out" if unknown else "")
        )
    draws = {name: _fitted(latents[name], value) for name, value in draws.items()}

    values: dict[str, Tensor] = {}
    parts = list(guide) if isinstance(guide, AutoGuideList) else [guide]
    for part in parts:
        if isinstance(part, AutoContinuous):
            rows = [free.reshape(len(free), -1) for free in _unconstrained(part, draws).values()]
            values[f"_{part._pyro_name}_latent"] = torch.cat(rows, -1)
        elif isinstance(part, AutoNormal):
            values |= {f"{n}_unconstrained": free for n, free in _unconstrained(part, draws).items()}
        elif part is guide:
            for name, site in latents.items():
                _check_support(site, draws[name])
            values |= draws

    for name, site in sites.items():
        if name not in values and not isinstance(site["fn"], dist.Delta):
            raise ValueError(
                f"ForwardKL: the guide samples {name!r}, for which draws of {sorted(draws)} give no value: use an "
                "AutoContinuous (a flow guide, AutoMultivariateNormal, ...), an AutoNormal, or a guide that samples "
                "the model's latents themselves, without auxiliary sites"
            )
        if name in values and isinstance(site["fn"], dist.Delta):
            raise ValueError(f"ForwardKL: the guide has no density at {name!r}, where it is a Delta")
    return values


def _fitted(site: Message, value: Tensor) -> Tensor:
    like = site["value"]
    value = value.to(like.device, like.dtype if like.is_floating_point() else value.dtype)
    if value.shape[1:] != like.shape:
        raise ValueError(
            f"ForwardKL: expected draws of {site['name']!r} with shape (n, *{tuple(like.shape)}), got "
            f"{tuple(value.shape)}; latents in a subsampled plate are not supported"
        )
    return value


def _check_support(site: Message, value: Tensor) -> None:
    fine = site["fn"].support.check(value)
    _refuse_rows(site["name"], fine.reshape(len(value), -1).all(-1), f"outside of the support {site['fn'].support}")


def _refuse_rows(name: str, fine: Tensor, why: str) -> None:
    if not fine.all():
        rows = (~fine).nonzero().flatten().tolist()
        raise ValueError(
            f"ForwardKL: {len(rows)} of {len(fine)} draws of {name!r} are {why}, rows {first_few(rows, 5)}"
        )


def _unconstrained(guide: AutoContinuous | AutoNormal, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Maps draws to unconstrained space, in trace order."""
    found = {}
    for name, site in latent_messages(guide.prototype_trace).items():
        _check_support(site, draws[name])
        free = found[name] = biject_to(site["fn"].support).inv(draws[name])
        edge = "on the edge of the support, where unconstrained values are not finite: move them inside or drop them"
        _refuse_rows(name, free.isfinite().reshape(len(free), -1).all(-1), edge)
    return found
