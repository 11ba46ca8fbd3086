"""Bounds of columns: a flow behind a map onto them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pyro_flows.core.chain import Chain, leaves
from pyro_flows.core.checks import first_few, first_floating
from pyro_flows.distributions import Flow
from pyro_flows.infer.density.columns import is_free
from pyro_flows.infer.density.names import Names, tell_column
from pyro_flows.infer.density.units import Density, is_plain_flow, movable
from pyro_flows.transforms import Bounds

__all__ = ["bounded", "bounds_in", "bounds_of", "tell_bounds"]

_FORMS = "a dictionary from columns to pairs (low, high), or a pair or None for each column, with None for an open side"


def bounded(flow: Flow | Density, given: Any, names: Names) -> Flow | Density:
    """Puts :class:`~pyro_flows.transforms.bounds.Bounds` at the data end of a flow, which shares its other parts.

    Raises:
        ValueError: for bounds that do not fit, or a density to which they mean nothing.
    """
    if not is_plain_flow(flow):
        raise ValueError(
            "fit_density: bounds= needs a flow, whose numbers it maps onto the bounds; got a "
            f"{type(flow).__name__}, whose density is its own: give it a support, e.g. MADE's "
            "head=DistributionHead(dist.Beta), or take a flow"
        )
    event = flow.event_shape
    if len(event) != 1 or not movable(flow).all() or not is_free(flow.chain.codomain, event).all():
        raise ValueError(
            "fit_density: bounds= needs a flow of vectors over the real numbers, got one of events of shape "
            f"{tuple(event)} and support {flow.chain.codomain}; leave bounds out, and end the chain in a "
            "transform onto the support"
        )
    pairs = bounds_of(given, event[0], names)
    if not any(map(math.isfinite, (end for pair in pairs for end in pair))):
        return flow
    kin = first_floating(flow)
    kin = torch.zeros(()) if kin is None else kin
    low, high = (torch.tensor(ends, dtype=torch.float64, device="cpu") for ends in zip(*pairs, strict=True))
    made = copy.copy(flow)
    made._modules = dict(flow._modules)
    made.chain = Chain([*leaves(flow.chain), Bounds(low, high).to(kin)]).train(flow.training)
    return made


def bounds_of(given: Any, size: int, names: Names) -> list[tuple[float, float]]:
    """Reads a pair for each column; an open side is infinite."""
    found = [(-math.inf, math.inf)] * size
    if isinstance(given, Mapping):
        for key, pair in given.items():
            found[_column(key, size, names)] = _pair(pair, key)
        return found
    listed = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else None
    if size == 1 and listed is not None and len(listed) == 2 and all(map(_is_end, listed)):
        listed = [listed]
    if listed is None or len(listed) != size:
        got = f"{len(listed)} of them" if listed is not None else f"a {type(given).__name__}"
        raise ValueError(f"fit_density: expected bounds to be {_FORMS}, {size} here; got {got}")
    return [_pair(pair, tell_column(k, names)) for k, pair in enumerate(listed)]


def _column(key: Any, size: int, names: Names) -> int:
    if names is not None and str(key) in names:
        if names.count(str(key)) == 1:
            return names.index(str(key))
        raise ValueError(f"fit_density: expected bounds of one column, but two are named {key!r}; rename one")
    if isinstance(key, str) or not hasattr(key, "__index__") or not 0 <= int(key) < size:
        known = f"0 to {size - 1}" if names is None else ", ".join(map(repr, names))
        raise ValueError(f"fit_density: expected bounds of columns {known}, got bounds of {key!r}")
    return int(key)


def _is_end(end: Any) -> bool:
    number = hasattr(end, "__float__") and getattr(end, "ndim", 0) == 0
    return end is None or (number and not isinstance(end, bool))


def _pair(pair: Any, column: Any) -> tuple[float, float]:
    if pair is None:
        return -math.inf, math.inf
    try:
        low, high = pair
    except (TypeError, ValueError):
        low = high = ""
    if not (_is_end(low) and _is_end(high)):
        raise ValueError(f"fit_density: expected bounds to be {_FORMS}; got {pair!r} for column {column}")
    ends = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    if not ends[0] < ends[1]:
        raise ValueError(
            f"fit_density: expected low < high in the bounds of column {column}, got {ends[0]} and {ends[1]}"
        )
    return ends


def bounds_in(flow: Flow | Density) -> dict[str, str]:
    """Describes the bounds in which a flow ends, for a checkpoint; empty for none."""
    part = leaves(flow.chain)[-1] if is_plain_flow(flow) else None
    pairs = zip(part.low.tolist(), part.high.tolist(), strict=True) if isinstance(part, Bounds) else ()
    return {"bounds": ", ".join(map(str, pairs))} if isinstance(part, Bounds) else {}


def tell_bounds(flow: Flow, columns: list[int], names: Names) -> str:
    """Describes the bounds of some columns; empty if the flow does not end in bounds."""
    part = leaves(flow.chain)[-1]
    if not isinstance(part, Bounds) or not columns:
        return ""
    told = [f"{tell_column(k, names)} ({float(part.low[k]):g} to {float(part.high[k]):g})" for k in columns]
    return f"the bounds of column{'s' if len(columns) > 1 else ''} {first_few(told, 8)}"
