"""Packs the latent variables of a model into one unconstrained vector."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from pyro.poutine import Trace
from torch import Size, Tensor
from torch.distributions import Transform, biject_to, constraints

import pyro_flows.infer.models.supports  # noqa: F401  (bijections that torch lacks)
from pyro_flows.infer.models.sites import latent_messages, nesting_of, sample_messages, sum_beyond

__all__ = ["Latent", "Latents", "same_support"]


@dataclass(frozen=True)
class Latent:
    """One latent site: its place in the packed vector, its shapes and its support.

    Example:
        >>> def model():
        ...     pyro.sample("mix", dist.Dirichlet(torch.ones(3)))
        >>> trace = pyro.poutine.trace(model).get_trace()
        >>> (site,) = pf.infer.models.latents.Latents.of(trace)
        >>> site.shape, site.size  # a simplex has one free number less
        (torch.Size([3]), 2)
    """

    name: str
    support: constraints.Constraint
    batch_shape: Size
    event_shape: Size
    free_shape: Size  # of the unconstrained event
    dtype: torch.dtype
    start: int

    @property
    def transform(self) -> Transform:
        """The map from unconstrained numbers to the support."""
        return biject_to(self.support)

    @property
    def increasing(self) -> bool:
        """Whether values increase with the unconstrained numbers; false below an upper bound alone."""
        try:
            return bool(torch.as_tensor(self.transform.sign).ge(0).all())
        except (NotImplementedError, AttributeError):  # entries depend on each other
            return True

    @property
    def shape(self) -> Size:
        """The shape of the site's value."""
        return self.batch_shape + self.event_shape

    @property
    def size(self) -> int:
        """The number of unconstrained numbers."""
        return (self.batch_shape + self.free_shape).numel()


class Latents:
    """A model's latent sites, in trace order, as one vector of ``dim`` unconstrained numbers.

    Holds no model and no data, and can be pickled. ``max_plate_nesting`` counts the plate and batch dimensions of all
    sites.

    Example:
        >>> def model():
        ...     pyro.sample("scale", dist.HalfNormal(1.0))
        ...     pyro.sample("mix", dist.Dirichlet(torch.ones(3)))
        >>> trace = pyro.poutine.trace(model).get_trace()
        >>> latents = pf.infer.models.latents.Latents.of(trace)
        >>> latents.names()
        ['scale', 'mix[0]', 'mix[1]']
    """

    def __init__(self, sites: Iterable[Latent], max_plate_nesting: int) -> None:
        self.sites, self.max_plate_nesting = tuple(sites), max_plate_nesting
        self.dim = sum(site.size for site in self.sites)

    def __repr__(self) -> str:
        sites = ", ".join(f"{site.name} {tuple(site.shape)}" for site in self.sites)
        return f"Latents({self.dim} dimensions: {sites})"

    @classmethod
    def of(cls, trace: Trace) -> Latents:
        """Collects the unobserved sites of a trace, except subsamples."""
        sites: list[Latent] = []
        start = 0
        for name, message in latent_messages(trace).items():
            value, fn = message["value"], message["fn"]
            free = biject_to(fn.support).inv(value)  # a simplex has one more entry than degrees of freedom
            cut = value.dim() - fn.event_dim
            sites.append(
                Latent(name, fn.support, value.shape[:cut], value.shape[cut:], free.shape[cut:], value.dtype, start)
            )
            start += sites[-1].size
        return cls(sites, max(map(nesting_of, sample_messages(trace).values()), default=0))

    def __iter__(self) -> Iterator[Latent]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Packs values of shapes ``(*sample, *site.shape)`` into unconstrained vectors ``(*sample, dim)``."""
        parts = []
        for site in self.sites:
            value = values[site.name]
            lead = value.shape[: value.dim() - len(site.shape)]
            parts.append(site.transform.inv(value).reshape(*lead, site.size))
        return torch.cat(parts, -1)

    def unpack(self, z: Tensor, nesting: int = 0) -> tuple[dict[str, Tensor], Tensor]:
        """Returns values and ``log|d values / d z|``, shape ``(*sample,)``, at ``z`` of shape ``(*sample, dim)``.

        Keeps ``nesting`` plate dimensions right of the sample's; sites with fewer get 1s.
        """
        lead = z.shape[:-1]
        if 0 in lead:  # torch cannot sum over no events
            values, total = self.unpack(z.new_zeros((1,) * len(lead) + (self.dim,)), nesting)
            return {n: v.new_empty(lead + v.shape[len(lead) :]) for n, v in values.items()}, total.new_empty(lead)
        values = {}
        total = z.new_zeros(lead)
        for site in self.sites:
            pad = (1,) * (nesting - len(site.batch_shape))
            free = z[..., site.start : site.start + site.size]
            free = free.reshape(lead + pad + site.batch_shape + site.free_shape).to(site.dtype)
            transform = site.transform
            value = transform(free)
            ladj = transform.log_abs_det_jacobian(free, value)
            total = total + sum_beyond(ladj, len(lead)).to(z.dtype)
            values[site.name] = value
        return values, total

    def draws(self, z: Tensor) -> dict[str, Tensor]:
        """Returns constrained values by site, shape ``(*sample, *site.shape)``."""
        return self.unpack(z)[0]

    def names(self) -> list[str]:
        """Labels each unconstrained number, such as ``theta[3]``."""
        labels = []
        for site in self.sites:
            shape = site.batch_shape + site.free_shape
            for k in range(site.size):
                place = [str(i.item()) for i in torch.unravel_index(torch.tensor(k), shape)] if shape else []
                labels.append(site.name + (f"[{','.join(place)}]" if place else ""))
        return labels


def same_support(one: object, other: object) -> bool:
    """Whether two constraints are the same, bounds included."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_support, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one.cpu(), other.cpu())
    if isinstance(one, bool | int | float | str) and isinstance(other, bool | int | float | str):
        return one == other
    if type(one) is not type(other):
        return False
    if not isinstance(one, constraints.Constraint):
        return True  # nothing else bounds a support
    first, second = vars(one), vars(other)
    return first.keys() == second.keys() and all(same_support(first[key], second[key]) for key in first)
