"""The sites of a run of a model, by what they are to inference.

The density, the log-likelihood of each datum and the predictions all take scales, masks and observations from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent

from pyro_flows.infer.models.latents import sum_beyond

__all__ = [
    "COMPUTED",
    "DATA",
    "DRAWN",
    "FACTOR",
    "LATENT",
    "Site",
    "counts",
    "is_masked",
    "is_part",
    "per_draw",
    "run",
    "sites_of",
    "unmasked",
]

LATENT, DATA, FACTOR, COMPUTED, DRAWN = "latent", "data", "factor", "computed", "drawn"


Model = Callable[..., object]


@dataclass(frozen=True)
class Site:
    """One sample site of a run.

    Attributes:
        name: of the site.
        kind: ``"latent"``, of the guide; ``"data"``, observed; ``"factor"``, a term of the log-density alone;
            ``"computed"``, by ``pyro.deterministic`` or a reparametrization; ``"drawn"``, anything else that the run
            drew or enumerated.
        message: Pyro's account of it.
        own: entries of a latent that keep their own density under a mask, of the shape of its batch; ``None`` for
            none.
    """

    name: str
    kind: str
    message: dict[str, Any]
    own: Tensor | None = None

    @property
    def fn(self) -> torch.distributions.Distribution:
        """The distribution."""
        return self.message["fn"]

    @property
    def value(self) -> Tensor:
        """The value."""
        return self.message["value"]

    @property
    def scale(self) -> float | Tensor:
        """What ``poutine.scale`` and subsampling multiply the log-density by."""
        return self.message["scale"]

    @property
    def nesting(self) -> int:
        """How many dimensions its plates and its batch take."""
        dims = [-frame.dim for frame in self.message["cond_indep_stack"] if frame.vectorized]
        return max(len(self.fn.batch_shape), *dims, 0)

    @property
    def mask(self) -> bool | Tensor | None:
        """The entries that count, by ``poutine.mask`` and the distribution's own mask; ``None`` if all do."""
        masks = [self.message["mask"]]
        if isinstance(self.fn, MaskedDistribution):
            masks.append(self.fn._mask)
        masks = [mask for mask in masks if mask is not None and mask is not True]
        if not masks or any(mask is False for mask in masks):
            return False if masks else None
        return masks[0] if len(masks) == 1 else masks[0] & masks[1]

    def log_prob(self, scaled: bool = True) -> Tensor:
        """The log-density of each entry as it counts in the model's, in nats.

        Args:
            scaled: whether to multiply by the scale.
        """
        message, scale = self.message, self.scale if scaled else 1.0
        value = self.fn.log_prob(self.value, *message["args"], **message["kwargs"])
        value = scale_and_mask(value, scale, message["mask"])
        if self.own is None:
            return value
        whole = unmasked(self.fn).log_prob(self.value, *message["args"], **message["kwargs"])
        return torch.where(self.own, scale_and_mask(whole, scale), value)


def run(model: Model, args: tuple[object, ...], kwargs: Mapping[str, object], values: Mapping[str, Tensor]) -> Any:
    """Runs the model at given values of some sites, unseen by any handler around; returns Pyro's trace."""
    with poutine.block():
        return poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs)


def sites_of(trace: Any, latents: frozenset[str], own: Mapping[str, Tensor] | None = None) -> dict[str, Site]:
    """The sample sites of a trace by name, without the indices of subsamples.

    Args:
        trace: of the model.
        latents: names of the latents of the guide.
        own: :attr:`Site.own` by site.
    """
    found = {}
    for name, message in trace.nodes.items():
        if message["type"] == "sample" and not site_is_subsample(message):
            kind = LATENT if name in latents else _kind(message)
            found[name] = Site(name, kind, message, None if own is None else own.get(name))
    return found


def _kind(message: dict[str, Any]) -> str:
    if message["infer"].get("_deterministic", False):
        return COMPUTED
    fn = message["fn"]
    while isinstance(getattr(fn, "base_dist", None), torch.distributions.Distribution):
        fn = fn.base_dist
    if type(fn).__name__ == "Unit":
        return FACTOR
    if not message["is_observed"]:
        return DRAWN
    return COMPUTED if type(fn).__name__ == "Delta" else DATA  # such as what a reparametrization makes of a latent


def per_draw(name: str, each: Tensor, count: int, nesting: int) -> Tensor:
    """Sums a site's log-densities for each draw, shape ``(count,)``; a number where they are the same for all.

    Args:
        name: of the site.
        each: with draws in the dimension left of the plates, or without draws.
        count: of draws.
        nesting: how many plate dimensions there are.

    Raises:
        ValueError: if that dimension has another size.
    """
    if each.dim() <= nesting:
        return each.sum()
    if each.dim() != nesting + 1 or each.shape[0] not in (1, count):
        raise ValueError(
            f"site {name!r} has log-densities of shape {tuple(each.shape)} for {count} draws and {nesting} plate "
            "dimensions"
        )
    return sum_beyond(each, 1)


def unmasked(fn: TorchDistribution) -> TorchDistribution:
    """The same distribution without masks of its own."""
    if isinstance(fn, MaskedDistribution):
        return unmasked(fn.base_dist)
    if isinstance(fn, Independent):
        return unmasked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    return fn


def is_masked(site: Site) -> bool:
    """Whether the log-density of some entry is left out."""
    fn = site.fn
    while isinstance(fn, Independent):
        fn = fn.base_dist
    masks = (site.message["mask"], fn._mask if isinstance(fn, MaskedDistribution) else None)
    return any(mask is not None and mask is not True and not bool(torch.as_tensor(mask).all()) for mask in masks)


def counts(site: Site) -> bool:
    """Whether a mask leaves any entry of a site."""
    return site.mask is None or bool(torch.as_tensor(site.mask).any())


def is_part(trace: Any) -> bool:
    """Whether a run sees only a part of some plate."""
    frames = [
        frame
        for message in trace.nodes.values()
        if message["type"] == "sample"
        for frame in message["cond_indep_stack"]
    ]
    if any(frame.full_size is not None and frame.full_size != frame.size for frame in frames):
        return True
    drawn = [message["fn"] for message in trace.nodes.values() if site_is_subsample(message)]
    return any(fn.subsample_size is not None and fn.subsample_size < fn.size for fn in drawn)
