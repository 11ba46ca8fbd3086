"""Sums discrete latents out of a model's log-density."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_one, scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree, contract_to_tensor
from pyro.poutine import Trace
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _ENUM_ALLOCATOR
from torch import Tensor

from pyro_flows.infer.models.sites import DATA, DRAWN, Model, Site, per_draw, run, sites_of

__all__ = ["can_be_summed", "enumerating", "hidden_sites", "marginal_log_prob", "pointwise", "unblocked"]

DRAWS = "_pyro_flows_draws"


def unblocked(model: Model, names: Collection[str] | None = None) -> Model:
    """Lets some sites of a model, by default all, through the ``poutine.block`` handlers around it."""
    inner: Any = model.func if isinstance(model, functools.partial) and not model.args and not model.keywords else model
    if not (isinstance(inner, functools.partial) and len(inner.args) == 2 and isinstance(inner.args[0], Messenger)):
        return model
    handler, function = inner.args
    below = unblocked(function, names)
    if not isinstance(handler, BlockMessenger):
        return model if below is function else handler(below)
    if names is None:
        return below
    return poutine.block(below, hide_fn=lambda site: handler.hide_fn(site) and site["name"] not in names)


def hidden_sites(
    model: Model, values: dict[str, Tensor], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> dict[str, Site]:
    """Finds the sites that ``poutine.block`` hides, by name, at values of the latents."""
    whole = unblocked(model)
    if whole is model:
        return {}
    latents = frozenset(values)
    seen = sites_of(run(model, args, kwargs, values), latents)
    return {n: s for n, s in sites_of(run(whole, args, kwargs, values), latents).items() if n not in seen}


def can_be_summed(site: Site) -> bool:
    """Whether Pyro can enumerate a site."""
    return bool(site.fn.has_enumerate_support)


def enumerating(model: Model, names: Collection[str], first_available_dim: int) -> Model:
    """Enumerates some discrete sites of a model, in dimensions from the given one leftwards."""
    marked: Any = poutine.infer_config(model, lambda site: {"enumerate": "parallel"} if site["name"] in names else {})
    whole = poutine.enum(marked, first_available_dim=first_available_dim)

    def enumerated(*args: object, **kwargs: object) -> object:
        before = copy.copy(vars(_ENUM_ALLOCATOR))  # an outer ELBO may enumerate too
        try:
            return whole(*args, **kwargs)
        finally:
            vars(_ENUM_ALLOCATOR).clear()
            vars(_ENUM_ALLOCATOR).update(before)

    return enumerated


def marginal_log_prob(trace: Trace, sites: dict[str, Site], count: int | None, nesting: int) -> Tensor:
    """Sums the enumerated sites of a trace out of its log-density.

    With ``count`` draws, in the dimension left of ``nesting`` plate dimensions, the result has shape ``(count,)``.

    Raises:
        NotImplementedError: if sites summed out together differ in scale, or Pyro cannot sum over a plate.
    """
    plain, components = _split(trace, sites, count, nesting)
    total = sum(plain, torch.zeros(()))
    for component in components:
        draws = {trace.plate_to_symbol[DRAWS]} if count is not None else set()
        keep = frozenset(draws & {symbol for term in component.terms for symbol in _symbols(term)})
        term = contract_to_tensor(component.tree(), set(component.sums), target_ordinal=keep)
        total = total + term * component.scale
    return total if count is None else total.expand(count)


def pointwise(
    trace: Trace, sites: dict[str, Site], count: int | None, nesting: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns scaled log-likelihoods, in batch shape, of data below enumerated sites, and reasons for omissions.

    A datum has a log-likelihood if all its discrete sites are its own, in the same plates.
    """
    found: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    for component in _split(trace, sites, count, nesting)[1]:
        data = [name for name in component.names if sites[name].kind == DATA]
        left = contract_tensor_tree(component.tree(), set(component.sums))
        for name in data:
            ordinal = component.ordinals[component.names.index(name)]
            if len(data) > 1:
                refused[name] = f"depends on the same discrete sites as {sorted(set(data) - {name})}"
            elif list(left) != [ordinal]:
                refused[name] = "depends on discrete sites outside of its plates"
            else:
                (term,) = left[ordinal]
                found[name] = packed.unpack(term, trace.symbol_to_dim) * component.scale
    return found, refused


@dataclass
class _Component:
    """Sites that share enumerated sites."""

    names: list[str]
    ordinals: list[frozenset[str]]
    terms: list[Tensor]
    sums: frozenset[str]
    scale: float | Tensor

    def tree(self) -> OrderedDict[frozenset[str], list[Tensor]]:
        """Groups the terms by plates for Pyro's contractions."""
        tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for ordinal, term in zip(self.ordinals, self.terms, strict=True):
            tree.setdefault(ordinal, []).append(term)
        return tree


def _split(
    trace: Trace, sites: dict[str, Site], count: int | None, nesting: int
) -> tuple[list[Tensor], list[_Component]]:
    """Splits off terms without enumerated sites."""
    frames = () if count is None else (CondIndepStackFrame(DRAWS, -1 - nesting, count, 0),)
    for site in sites.values():
        site.message["cond_indep_stack"] = (*frames, *site.message["cond_indep_stack"])
    trace.symbolize_dims()
    plates = trace.plate_to_symbol
    enumerated_symbols = set(trace.symbol_to_dim) - set(plates.values())
    plain = []
    groups: list[tuple[set[str], list[tuple[str, frozenset[str], Tensor]]]] = []
    for name, site in sites.items():
        value = _unscaled(site)
        term = packed.pack(value, site.message["infer"]["_dim_to_symbol"])
        sums = set(_symbols(term)) & enumerated_symbols
        if not sums:
            value = scale_and_mask(value, site.scale)
            plain.append(value.sum() if count is None else per_draw(name, value, count, nesting))
            continue
        ordinal = frozenset(plates[frame.name] for frame in site.message["cond_indep_stack"] if frame.vectorized)
        members = [(name, ordinal, term)]
        for group in [group for group in groups if group[0] & sums]:
            groups.remove(group)
            sums, members = sums | group[0], group[1] + members
        groups.append((sums, members))
    components = []
    for sums, members in groups:
        names, ordinals, terms = (list(each) for each in zip(*members, strict=True))
        components.append(_Component(names, ordinals, terms, frozenset(sums), _common_scale(sites, names)))
    return plain, components


def _symbols(term: Any) -> str:
    return term._pyro_dims


def _unscaled(site: Site) -> Tensor:
    # Under a handler's mask each of K states would have weight 1, which adds log K.
    return site.fn.log_prob(site.value) if site.kind == DRAWN else site.log_prob(scaled=False)


def _common_scale(sites: dict[str, Site], names: list[str]) -> float | Tensor:
    scales = [sites[name].scale for name in names]
    if all(is_identically_one(scale) for scale in scales):
        return 1.0
    first = torch.as_tensor(scales[0])
    if first.numel() != 1 or any(bool((first != scale).any()) for scale in map(torch.as_tensor, scales)):
        raise NotImplementedError(
            f"the discrete sites and the data {names} are summed out together, so they need one scale (poutine.scale, "
            "a subsampled plate) for all; got several: put them into the same plate"
        )
    return first
