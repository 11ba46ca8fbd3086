"""The latent variables of a model, packed into one unconstrained vector."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch.distributions import Transform, biject_to, constraints

import pyro_flows.infer.models.supports  # noqa: F401  (bijections that torch lacks)

__all__ = ["Latent", "Latents", "same_support", "sum_beyond", "support_tensors"]


@dataclass(frozen=True)
class Latent:
    """One latent site: its place in the packed vector, its shapes and its support."""

    name: str
    support: constraints.Constraint
    batch_shape: Size
    event_shape: Size
    free_shape: Size  # of the unconstrained event
    dtype: torch.dtype
    start: int

    @property
    def transform(self) -> Transform:
        """From the line to the support."""
        return biject_to(self.support)

    @property
    def increasing(self) -> bool:
        """Whether larger numbers give larger values; not so below an upper bound alone."""
        try:
            return bool(torch.as_tensor(self.transform.sign).ge(0).all())
        except (NotImplementedError, AttributeError):  # entries depend on each other
            return True

    @property
    def shape(self) -> Size:
        """Of the site's value."""
        return self.batch_shape + self.event_shape

    @property
    def size(self) -> int:
        """How many unconstrained numbers it takes."""
        return (self.batch_shape + self.free_shape).numel()


class Latents:
    """A model's latent sites in the order of their names in the trace, as one vector of ``dim`` unconstrained numbers.

    Holds no model and no data, so that draws can be named and constrained without either; it can be pickled.

    Args:
        trace: of the model, unconditioned: latent sites are the sampled ones that are neither observed nor subsamples.
    """

    def __init__(self, trace: object) -> None:
        sites: list[Latent] = []
        nesting = 0
        start = 0
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or site_is_subsample(site):
                continue
            # Batch dimensions that no plate declares count as well.
            nesting = max(nesting, len(site["fn"].batch_shape))
            for frame in site["cond_indep_stack"]:
                if frame.vectorized:
                    nesting = max(nesting, -frame.dim)
            if site["is_observed"]:
                continue
            value, support = site["value"], site["fn"].support
            event_dim = site["fn"].event_dim
            free = biject_to(support).inv(value)
            # The event of a simplex has one number more than it has degrees of freedom.
            cut = value.dim() - event_dim
            sites.append(
                Latent(name, support, value.shape[:cut], value.shape[cut:], free.shape[cut:], value.dtype, start)
            )
            start += sites[-1].size
        self.sites = tuple(sites)
        self.dim = start
        self.max_plate_nesting = nesting

    @classmethod
    def of(cls, sites: Iterable[Latent], max_plate_nesting: int) -> Latents:
        """Of sites that are known already."""
        made = cls.__new__(cls)
        made.sites, made.max_plate_nesting = tuple(sites), max_plate_nesting
        made.dim = sum(site.size for site in made.sites)
        return made

    def __iter__(self) -> Iterator[Latent]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def to(self, device: torch.device) -> Latents:
        """The same, with the bounds of supports on a device."""
        for site in self.sites:
            for holder, key, tensor in support_tensors(site.support):
                holder[key] = tensor.to(device)
        return self

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Unconstrained vectors ``(*sample, dim)`` of values whose shapes are ``(*sample, *site.shape)``."""
        parts = []
        for site in self.sites:
            value = values[site.name]
            lead = value.shape[: value.dim() - len(site.shape)]
            parts.append(site.transform.inv(value).reshape(*lead, site.size))
        return torch.cat(parts, -1)

    def unpack(self, z: Tensor, nesting: int = 0) -> tuple[dict[str, Tensor], Tensor]:
        """Values by site and ``log|d values / d z|``, shape ``(*sample,)``.

        Args:
            z: shape ``(*sample, dim)``.
            nesting: how many dimensions to keep for plates, right of those of ``z``; sites with fewer get 1s there.
        """
        lead = z.shape[:-1]
        if 0 in lead:  # torch cannot sum over the dimensions of no events
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
        """Constrained values by site, shape ``(*sample, *site.shape)``."""
        return self.unpack(z)[0]

    def names(self) -> list[str]:
        """A label for each unconstrained number, such as ``theta[3]``."""
        labels = []
        for site in self.sites:
            shape = site.batch_shape + site.free_shape
            for k in range(site.size):
                place = [str(i.item()) for i in torch.unravel_index(torch.tensor(k), shape)] if shape else []
                labels.append(site.name + (f"[{','.join(place)}]" if place else ""))
        return labels


def sum_beyond(values: Tensor, keep: int) -> Tensor:
    """Sums over all dimensions after the first ``keep``; also where there are no values."""
    return values.sum(tuple(range(keep, values.dim()))) if values.dim() > keep else values


def support_tensors(support: object) -> Iterator[tuple[dict[str, object], str, Tensor]]:
    """Every tensor that a constraint holds, with the dictionary and the key that hold it."""
    for key, value in list(vars(support).items()):
        if isinstance(value, Tensor):
            yield vars(support), key, value
        elif isinstance(value, constraints.Constraint):
            yield from support_tensors(value)
        elif isinstance(value, list | tuple):
            for each in value:
                if isinstance(each, constraints.Constraint):
                    yield from support_tensors(each)


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
