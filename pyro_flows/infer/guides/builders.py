"""Makes the flow of a guide: a dense one, or one with the dependencies of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from pyro.distributions import TransformModule
from pyro.poutine import Trace
from torch import Tensor

from pyro_flows.core.chain import Chain
from pyro_flows.core.transform import FlowTransform
from pyro_flows.core.wrap import Wrap
from pyro_flows.flows import iaf, nsf, realnvp
from pyro_flows.infer.machine.processes import led
from pyro_flows.infer.models.latents import Latents
from pyro_flows.infer.models.structure import Structure, SummedDensity, structure_of, summed_up
from pyro_flows.infer.search.climb import LogDensity
from pyro_flows.infer.search.inner_start import InnerStart, find_inner_start
from pyro_flows.transforms import FixedSpline, Plated, Preconditioner
from pyro_flows.univariate.base import Affine

__all__ = ["Builder", "as_flow_of", "default_builder", "find_structure", "structured"]

Builder = Callable[[int], TransformModule]
GAIN = 0.1  # keeps the default flow stable at the step size 0.03 of Pyro's tutorials
SMALL = 64  # dimensions up to which one dense autoregressive flow does as well as one with the model's structure
MANY_GLOBALS = 32  # global latents up to which a structure pays by itself
POINTS = 3  # values of the globals for each feature of the members' maps


def default_builder(input_dim: int) -> FlowTransform:
    """The default flow of a guide with ``input_dim`` dimensions.

    Up to 64 dimensions: three small autoregressive layers that sample in one pass, in alternating order. Beyond: affine
    couplings between random halves, which cost less there. In one dimension: a spline.

    Example:
        >>> chain = pf.infer.guides.default_builder(3)
        >>> chain(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """
    if input_dim == 1:
        return nsf(1, num_layers=1)
    if input_dim <= 64:
        # A far bound, because log-scales in a funnel follow another latent however far it goes.
        return iaf(input_dim, num_layers=3, hidden_dims=(max(32, input_dim),) * 2, univariate=Affine(10.0, GAIN))
    return realnvp(input_dim, num_layers=8, hidden_dims=(64, 64), mask="random", univariate=Affine(2.0, GAIN))


def as_flow_of(builder: Builder, dim: int) -> FlowTransform:
    """Makes one flow with a builder.

    Raises:
        ValueError: if the builder gives no flow of ``dim`` dimensions.
    """
    made = builder(dim)
    if not isinstance(made, FlowTransform):
        parts = list(made) if isinstance(made, Iterable) else [made]
        if parts and all(isinstance(part, torch.distributions.Transform) for part in parts):
            made = Chain([p if isinstance(p, FlowTransform) else Wrap(p, (dim,)) for p in parts])
    if not isinstance(made, FlowTransform) or made.event_shape != (dim,) or made.context_dim:
        raise ValueError(
            f"AutoFlow: expected builder({dim}) to give a flow of {dim} dimensions without context, got {made!r}"
        )
    return made


def find_structure(
    trace: Trace,
    latents: Latents,
    density: LogDensity,
    initial: Tensor,
    dependencies: str | None = None,
    builder: Builder | None = None,
) -> Structure | None:
    """Returns the structure of a model's latents if ``dependencies`` demands it or it pays.

    Raises:
        ValueError: if it is demanded, and there are no independent members.
    """
    asked = dependencies == "model"
    if dependencies == "dense" or (not asked and (len(initial) <= SMALL or builder is not None)):
        return None
    found = led(density, initial, lambda density: structure_of(trace, latents, density, initial))
    if found is not None and found.groups and (asked or len(found.globals) <= MANY_GLOBALS):
        return found
    if asked:
        why = "its density is not finite near the initial point" if found is None else "; ".join(found.coupled)
        raise ValueError(
            'AutoFlow: expected members of plates that are independent given other latents, for dependencies="model", '
            f"got {why or 'no latents in plates'}. Write latents of members in a pyro.plate, or leave dependencies "
            "out, for a flow in which any latent may depend on any other"
        )
    return None


def structured(
    structure: Structure,
    builder: Builder,
    initial: Tensor,
    density: LogDensity,
    seconds: float | None,
    otherwise: Callable[[], tuple[Tensor, Tensor, list[FixedSpline]]] | None,
) -> Chain | None:
    """Makes a flow with a structure, at an informed start found within ``seconds``, or at another Gaussian.

    ``None`` if there is neither. Like other guides' flows, it ends in an affine map of all latents, here without
    correlations.
    """
    count, dim = len(structure.globals), len(initial)
    affine = Preconditioner(initial[:count] * 0, torch.eye(count).to(initial)) if count else None
    flow = None if affine is None else Chain([as_flow_of(builder, count), affine])
    groups = structure.groups
    places, lengths, summed = zip(*((each.places, each.length, each.summed) for each in groups), strict=True)
    plated = Plated(dim, flow, places, structure.ancestors, lengths, summed).to(initial)
    points = POINTS * plated.num_features

    def search(density: LogDensity) -> InnerStart | None:
        if any(summed):
            density = SummedDensity(density, groups)
        start = summed_up(initial, groups)
        return find_inner_start(density, structure, start, num_points=points, seconds=seconds)

    begun = None if seconds == 0 else led(density, initial, search)
    if begun is None:
        if otherwise is None:
            return None
        loc, scale, splines = otherwise()
        return Chain([plated, Preconditioner(loc, scale.norm(dim=-1) if scale.dim() == 2 else scale), *splines])
    loc, scale, at = begun.loc, begun.scale, structure.globals
    for group in groups:
        if group.summed:  # differences of steps need one unit for all
            scale[group.places] = scale[group.places].mean(0)
    if affine is not None:
        affine.place(affine.loc, (begun.factor / scale[at][:, None]).to(initial))
    g = ((begun.globals - loc[at]) / scale[at]).to(initial)
    for k, (group, above, found) in enumerate(zip(structure.groups, structure.ancestors, begun.members, strict=True)):
        # All in units of the affine map.
        own, center = scale[group.places], loc[group.places]
        means = found.means - center + (found.slopes @ loc[above][..., None])[..., 0]
        chains = (-1, group.length)
        before, after = own.unflatten(0, chains)[:, :-1], own.unflatten(0, chains)[:, 1:]
        carried = (found.carries @ center.unflatten(0, chains)[:, :-1, :, None])[..., 0]
        means = (means.unflatten(1, chains) + F.pad(carried, (0, 0, 1, 0))).flatten(1, 2)
        parts = (
            means / own,
            found.factors / own[..., None],
            found.slopes * scale[above][:, None] / own[..., None],
            found.carries * before[..., None, :] / after[..., None],
            found.shift,
            found.tail,
        )
        plated.fit(k, g, *(part.to(initial) for part in parts))
    loc = summed_up(loc, groups, -1)
    return Chain([plated, Preconditioner(loc.to(initial), scale.to(initial))])
