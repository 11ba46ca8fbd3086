"""Classifies the sample sites of a model run by role, with scales and masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent

__all__ = ["Message", "Model", "Site", "latent_messages", "run", "sample_messages", "sites_of"]

LATENT, DATA, FACTOR, COMPUTED, DRAWN = "latent", "data", "factor", "computed", "drawn"

Model = Callable[..., object]
Message = dict[str, Any]  # Pyro's record of a site; Pyro types its distribution as a mere callable


def run(
    model: Model, args: tuple[object, ...], kwargs: Mapping[str, object], values: Mapping[str, Tensor] | None = None
) -> Trace:
    """Traces a model at given values of some sites, hidden from all outer handlers."""
    with poutine.block():
        return poutine.trace(poutine.condition(model, data=dict(values or {}))).get_trace(*args, **kwargs)


def sample_messages(trace: Trace) -> dict[str, Message]:
    """Returns Pyro's records of sample sites by name, without subsample indices."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {name: node for name, node in nodes.items() if node["type"] == "sample" and not site_is_subsample(node)}


def latent_messages(trace: Trace) -> dict[str, Message]:
    """Returns the unobserved sample sites."""
    return {name: message for name, message in sample_messages(trace).items() if not message["is_observed"]}


def nesting_of(message: Message) -> int:
    """Counts the dimensions of a site's plates and batch, declared or not."""
    dims = [-frame.dim for frame in message["cond_indep_stack"] if frame.vectorized]
    return max(len(message["fn"].batch_shape), *dims, 0)


@dataclass(frozen=True)
class Site:
    """One sample site of a run.

    Attributes:
        name: the site's name.
        kind: ``"latent"`` (in the guide), ``"data"``, ``"factor"``, ``"computed"`` (by ``pyro.deterministic`` or a
            reparametrization), or ``"drawn"`` (any other).
        message: Pyro's record.
        own: the entries of a latent, in its batch shape, that keep their density under a mask.

    Example:
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> trace = pyro.poutine.trace(model).get_trace(torch.tensor(2.0))
        >>> site = pf.infer.models.sites.sites_of(trace, frozenset({"z"}))["y"]
        >>> site.kind
        'data'
    """

    name: str
    kind: str
    message: Message
    own: Tensor | None = None

    @property
    def fn(self) -> Any:
        """The distribution."""
        return self.message["fn"]

    @property
    def value(self) -> Tensor:
        """The value."""
        return self.message["value"]

    @property
    def scale(self) -> float | Tensor:
        """The factor of the log-density due to ``poutine.scale`` and subsampling."""
        return self.message["scale"]

    @property
    def mask(self) -> bool | Tensor | None:
        """The entries that ``poutine.mask`` and the distribution keep; ``None`` means all."""
        masks = _masks(self.message["mask"], self.fn)
        if any(mask is False for mask in masks):
            return False
        return masks[0] & masks[-1] if masks else None

    def log_prob(self, scaled: bool = True) -> Tensor:
        """Each entry's contribution to the model's log-density, in nats; ``scaled`` includes the scale."""
        message, scale = self.message, self.scale if scaled else 1.0
        value = self.fn.log_prob(self.value, *message["args"], **message["kwargs"])
        value = scale_and_mask(value, scale, message["mask"])
        if self.own is None:
            return value
        whole = unmasked(self.fn).log_prob(self.value, *message["args"], **message["kwargs"])
        return torch.where(self.own, scale_and_mask(whole, scale), value)


def _masks(*given: Any) -> list[bool | Tensor]:
    masks = [each._mask if isinstance(each, MaskedDistribution) else each for each in given]
    return [mask for mask in masks if mask is False or isinstance(mask, Tensor)]


def sites_of(trace: Trace, latents: frozenset[str], own: Mapping[str, Tensor] | None = None) -> dict[str, Site]:
    """Returns a trace's sample sites by name, given the guide's latents and :attr:`Site.own` by name."""
    return {
        name: Site(name, LATENT if name in latents else _kind(message), message, (own or {}).get(name))
        for name, message in sample_messages(trace).items()
    }


def _kind(message: Message) -> str:
    if message["infer"].get("_deterministic", False):
        return COMPUTED
    fn = message["fn"]
    while isinstance(getattr(fn, "base_dist", None), torch.distributions.Distribution):
        fn = fn.base_dist
    if type(fn).__name__ == "Unit":
        return FACTOR
    if not message["is_observed"]:
        return DRAWN
    return COMPUTED if type(fn).__name__ == "Delta" else DATA  # a reparametrized latent


def sum_beyond(values: Tensor, keep: int) -> Tensor:
    """Sums over all dimensions except the first ``keep``, even without values."""
    return values.sum(tuple(range(keep, values.dim()))) if values.dim() > keep else values


def per_draw(name: str, each: Tensor, count: int, nesting: int) -> Tensor:
    """Sums a site's log-densities over all dimensions but the draws, left of ``nesting`` plate dimensions.

    The result has shape ``(count,)``, or is a number if all draws share it.

    Raises:
        ValueError: if the dimension of the draws has another size.
    """
    if each.dim() <= nesting:
        return each.sum()
    if each.dim() != nesting + 1 or each.shape[0] not in (1, count):
        raise ValueError(
            f"site {name!r} has log-densities of shape {tuple(each.shape)} for {count} draws and {nesting} plate "
            "dimensions"
        )
    return sum_beyond(each, 1)


def unmasked(fn: Any) -> Any:
    """Removes a distribution's own masks."""
    if isinstance(fn, MaskedDistribution):
        return unmasked(fn.base_dist)
    if isinstance(fn, Independent):
        return unmasked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    return fn


def is_masked(site: Site) -> bool:
    """Whether a mask leaves out some entry's log-density."""
    fn = site.fn
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return not all(torch.as_tensor(mask).all() for mask in _masks(site.message["mask"], fn))


def counts(site: Site) -> bool:
    """Whether a mask keeps any entry of a site."""
    return site.mask is None or bool(torch.as_tensor(site.mask).any())


def is_part(trace: Trace) -> bool:
    """Whether a run sees only part of some plate."""
    nodes: list[Any] = [node for node in trace.nodes.values() if node["type"] == "sample"]
    frames = [frame for node in nodes for frame in node["cond_indep_stack"]]
    if any(frame.full_size is not None and frame.full_size != frame.size for frame in frames):
        return True
    indices = [node["fn"] for node in nodes if site_is_subsample(node)]
    return any(fn.subsample_size is not None and fn.subsample_size < fn.size for fn in indices)
