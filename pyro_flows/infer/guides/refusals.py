"""Refuses arguments and models for ``fit_guide``, and fits for chains."""

from __future__ import annotations

import inspect

from torch import Tensor

from pyro_flows.infer.diagnostics.prior import argument_names
from pyro_flows.infer.guides.auto import AutoFlow
from pyro_flows.infer.models.joint import JointDensity
from pyro_flows.infer.models.sites import Model

__all__ = ["guide_of", "refuse_random", "refuse_unobserved", "walkable"]

RESERVED = ("seconds", "steps", "progress", "checkpoint", "checkpoint_every", "resume", "fit_prior", "compile")


def guide_of(model_or_guide: Model | AutoFlow, kwargs: dict[str, object]) -> AutoFlow:
    """Returns or makes the guide; refuses arguments that the model and ``fit_guide`` could confuse."""
    guide = model_or_guide if isinstance(model_or_guide, AutoFlow) else AutoFlow(model_or_guide)
    model = guide.plain_model
    bound = getattr(model, "keywords", None) or {}  # by a partial
    names = [name for name in argument_names(model) or () if name not in bound]
    taken = sorted(set(RESERVED) & set(names))
    if taken:
        raise ValueError(
            f"fit_guide: the model has an argument named {taken[0]!r}, as fit_guide itself has: bind it beforehand, "
            f"functools.partial(model, {taken[0]}=...), or rename it"
        )
    known = argument_names(model)
    options = set(inspect.signature(AutoFlow.__init__).parameters) - {"self", "model"}
    for name in () if known is None else set(kwargs) - set(known):
        if name in options:
            told = f"it is an option of the guide: fit_guide(AutoFlow(model, {name}=...), ...)"
        else:
            told = (
                f"the model takes {', '.join(known or ()) or 'none'}. Options of the flow belong to its builder: "
                "fit_guide(AutoFlow(model, partial(pf.realnvp, num_layers=4)), ...)"
            )
        raise TypeError(f"fit_guide: {name!r} is no argument of the model; {told}")
    return guide


def refuse_unobserved(guide: AutoFlow) -> None:
    """Refuses a model without data, or with data if its prior is to be fitted."""
    if guide.of_prior and not guide.unobserved:
        raise ValueError(
            "fit_guide: fit_prior=True is for a model in which nothing is observed, and this one has data: leave them "
            "out, or hide them, poutine.block(model, expose=[...])"
        )
    if not guide.unobserved or guide.of_prior:
        return
    if guide.hidden_data:
        raise ValueError(
            "fit_guide: nothing is observed in this model, so its posterior is its prior: poutine.block hides the "
            f"observations {sorted(guide.hidden_data)} along with other sites. Name the sites to hide, "
            "poutine.block(model, hide=[...]), in place of expose=[...]; or fit the prior on purpose, "
            "fit_guide(..., fit_prior=True)"
        )
    raise ValueError(
        "fit_guide: nothing is observed in this model, so its posterior is its prior: no site with obs=... or given by "
        "pyro.condition depends on a latent, and there is no pyro.factor. Pass the data; or, if poutine.block hides "
        "them within the model, name the sites to hide by hide=[...] in place of expose=[...]; or fit the prior on "
        "purpose, fit_guide(..., fit_prior=True)"
    )


def refuse_random(guide: AutoFlow, density: JointDensity, initial: Tensor) -> None:
    """Refuses a model with hidden draws that no density sums out."""
    if guide.why_not_summed:
        raise ValueError(f"fit_guide: Pyro cannot sum out this model's discrete latents: {guide.why_not_summed}")
    if not guide.subsampled and density.random_at(initial):
        raise ValueError(
            "fit_guide: at fixed values of its latents this model gives another density at each run, so it draws "
            "something that the guide does not know. A minibatch belongs in pyro.plate(..., subsample_size=...); "
            "discrete sites hidden by poutine.block around the model are summed out, those hidden within it are not: "
            "leave them to fit_guide"
        )


def walkable(name: str, guide: AutoFlow | None, density: JointDensity | None) -> tuple[AutoFlow, JointDensity]:
    """Returns a fit's guide and density; refuses one without its model, or that sees part of its data in each run."""
    if guide is None or density is None:
        raise ValueError(
            f"{name}: this fit was loaded without its model, so chains have no density; fit the guide again, or "
            "save the result of this method in its place"
        )
    if guide.subsampled:
        raise ValueError(
            f"{name}: the model sees a part of its data in each run, and chains need the density of all; build the "
            "model without subsampling (subsample_size=None) and fit it"
        )
    return guide, density
