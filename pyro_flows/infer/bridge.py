"""Draws in ArviZ's form; no other module touches ArviZ."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_flows.core.checks import integer
from pyro_flows.infer.diagnostics.weights import importance

__all__ = ["to_arviz"]

KIND = "independent draws of a guide, not MCMC: one chain, for which r_hat is meaningless"
CHAINS = "draws of Markov chains"


def to_arviz(
    posterior: Mapping[str, Any],
    *,
    log_weights: Any = None,
    log_p: Any = None,
    log_q: Any = None,
    posterior_predictive: Mapping[str, Any] | None = None,
    log_likelihood: Mapping[str, Any] | None = None,
    observed_data: Mapping[str, Any] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    attrs: Mapping[str, Any] | None = None,
    num_chains: int | None = None,
) -> Any:
    """Makes ArviZ's ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x) of a guide's draws.

    The draws form one chain, for functions such as ``az.summary``, ``az.plot_pair`` and ``az.loo``.  ArviZ weights all
    draws equally, and its effective sample size measures autocorrelation, which these draws lack.  If importance
    weights matter, export draws resampled by them, without the weights.

    With log weights, the attributes of the result and its posterior hold ``khat`` and ``ess`` (a fraction) from
    :func:`~pyro_flows.infer.diagnostics.weights.importance`.

    A slash in a site's name becomes a dot, as ArviZ 1.x and NetCDF refuse slashes.

    Args:
        posterior: draws of each site, shape ``(n, *shape)``, tensors or arrays.
        log_weights: log importance weights, shape ``(n,)``, in nats; by default ``log_p - log_q``.
        log_p: log joint density, shape ``(n,)``, stored as the sample statistic ``lp``.
        log_q: the guide's log density, shape ``(n,)``, stored as ``log_q``.
        posterior_predictive: simulated data of each site, shape ``(n, *shape)``.
        log_likelihood: log-likelihood of each observation, shape ``(n, *shape)`` a data site, for ``az.loo``.
        observed_data: the data, by site.
        constant_data: other inputs of the model.
        dims: names of a site's dimensions, without chain and draw.
        coords: labels along named dimensions.
        attrs: further attributes, numbers or text.
        num_chains: for draws of Markov chains, their number; chains follow each other in the first dimension.

    Raises:
        ValueError: if numbers of draws differ, nothing is given, a site has the name of a dimension, or ``dims`` and
            ``coords`` do not fit the shapes.

    Example:
        >>> draws = {"slope": torch.randn(500), "effects": torch.randn(500, 8)}
        >>> data = pf.infer.to_arviz(draws, dims={"effects": ["school"]})
        >>> data.posterior["effects"].sizes["school"]
        8
    """
    draws = _groups("posterior", posterior, None)
    if not draws:
        raise ValueError("to_arviz: expected draws of at least one site, got none")
    n = next(iter(draws.values())).shape[1]
    if num_chains is not None and (integer("to_arviz", "num_chains", num_chains) > n or n % num_chains):
        raise ValueError(f"to_arviz: expected as many draws of each of {num_chains} chains, got {n} of all")
    if log_weights is None and log_p is not None and log_q is not None:
        log_weights = _array(log_p) - _array(log_q)
    stats = {"lp": log_p, "log_q": log_q, "log_weight": log_weights}
    groups = {
        "posterior": draws,
        "sample_stats": _groups("sample_stats", {k: v for k, v in stats.items() if v is not None}, n, ()),
        "posterior_predictive": _groups("posterior_predictive", posterior_predictive, n),
        "log_likelihood": _groups("log_likelihood", log_likelihood, n),
        "observed_data": _arrays("observed_data", observed_data),
        "constant_data": _arrays("constant_data", constant_data),
    }
    groups = {name: group for name, group in groups.items() if group}
    facts: dict[str, Any] = {"inference_library": "pyro_flows", "draws": KIND if num_chains is None else CHAINS}
    if num_chains is not None:
        shape = num_chains, n // num_chains
        for name in [name for name in groups if not name.endswith("_data")]:
            groups[name] = {k: v.reshape(*shape, *v.shape[2:]) for k, v in groups[name].items()}
    if log_weights is not None:
        found = importance(torch.from_numpy(_array(log_weights).astype(np.float64)))
        facts |= {"khat": found.khat, "ess": found.ess}
    for name, value in (attrs or {}).items():  # files take numbers and text, no Booleans
        number = int(value) if isinstance(value, bool) else value
        facts[name] = number if isinstance(number, (int, float)) else str(number)
    names = {_name(name): [of] if isinstance(of, str) else list(of) for name, of in (dims or {}).items()}
    labels = None if coords is None else {name: list(values) for name, values in coords.items()}
    for group, arrays in groups.items():
        for name, array in arrays.items():
            given = [dim for dim in names.get(name, ()) if dim not in ("chain", "draw")]
            own = array.shape if group.endswith("_data") else array.shape[2:]
            if len(given) > len(own) and group != "log_likelihood":  # which lacks event dimensions
                raise ValueError(
                    f"to_arviz: expected dims of {name} to name at most {len(own)} dimensions, those of its shape "
                    f"{own} in {group}, got {given}"
                )
    with warnings.catch_warnings():
        # 0.23 announces 1.x at import; this module works with both.
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
        import arviz
    from_dict: Any = arviz.from_dict
    known = None if dims is None else names
    if "posterior" in inspect.signature(from_dict).parameters:  # 0.x: a keyword argument for each group
        made = from_dict(**groups, dims=known, coords=labels, attrs=dict(facts), posterior_attrs=dict(facts))
    else:  # 1.x: groups in one dictionary, attributes by group
        made = from_dict(groups, dims=known, coords=labels, attrs={"/": dict(facts), "posterior": dict(facts)})
    # ArviZ silently drops a variable named like a dimension, and pads the shorter of two with NaN.
    for group, arrays in groups.items():
        kept = made[group].data_vars if group in made else {}
        for name, array in arrays.items():
            if name not in kept:
                raise ValueError(
                    f"to_arviz: {name} in {group} has the name of a dimension, so ArviZ would drop it: rename the "
                    "site, or the dimension in dims"
                )
            if kept[name].size != array.size:  # 0.x makes vectors of scalars
                raise ValueError(
                    f"to_arviz: {name} in {group} has shape {array.shape}, but another variable is longer along the "
                    f"dimensions {kept[name].dims} that they share: give their dimensions different names in dims"
                )
    return made


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # NumPy has no bfloat16.
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.ma.filled(value.astype(float), np.nan) if isinstance(value, np.ma.MaskedArray) else np.asarray(value)


def _name(name: str) -> str:
    return name.replace("/", ".")


def _arrays(group: str, values: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
    arrays = {_name(name): _array(value) for name, value in (values or {}).items()}
    if len(arrays) < len(values or {}):
        raise ValueError(
            f"to_arviz: two of the names {list(values or {})} in {group} are the same once a slash is written as a "
            "dot: rename one"
        )
    return arrays


def _groups(
    group: str, values: Mapping[str, Any] | None, n: int | None, shape: tuple[int, ...] | None = None
) -> dict[str, np.ndarray]:
    """A group's draws, equally many of each site, with a leading chain axis."""
    arrays = _arrays(group, values)
    first = next(iter(arrays.values()), np.zeros(0))
    expected = n if n is not None else first.shape[0] if first.ndim else 1
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != expected or (shape is not None and array.shape[1:] != shape):
            rest = "..." if shape is None else ""
            raise ValueError(
                f"to_arviz: expected {name} in {group} of shape ({expected}, {rest}), one row for each draw, got "
                f"{array.shape}"
            )
    return {name: array[None] for name, array in arrays.items()}
