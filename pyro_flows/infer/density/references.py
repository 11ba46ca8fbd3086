"""Simple densities beside which a fitted one is judged: Gaussians, autoregressions, frequencies, directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import constraints as pyro_constraints
from torch import Tensor
from torch.distributions import Normal

from pyro_flows.core.chain import Chain
from pyro_flows.distributions import Dequantized, Flow, VonMisesFisher
from pyro_flows.infer.density.columns import few_values
from pyro_flows.infer.density.data import Rows
from pyro_flows.infer.density.gaussian import fit_gaussian
from pyro_flows.infer.density.units import head_of, is_plain_flow, movable, split_chain

__all__ = ["reference_scores"]

_WIDEST = 256  # numbers of an event with a Gaussian of full covariance
_LAGS, _PAST = 8, 64  # steps, and numbers, that an autoregression sees at most
_KAPPAS = torch.logspace(-2, 5, 400, dtype=torch.float64, device="cpu")

Pair = tuple[Tensor, Tensor]
"""Training rows and rows to be scored, in float64 on the CPU."""


def reference_scores(model: Any, trained: Rows, rows: Rows) -> tuple[str, Tensor | None]:
    """Scores rows by a simple density of training rows; returns its name, or why there is none, and log-densities.

    Real columns have a Gaussian, behind the parts of a flow that map onto its support and linear in the context.  Above
    256 numbers, series have a Gaussian autoregression in its place, and other events independent normals.  Discrete
    columns have frequencies, angles von Mises distributions, and points on spheres a von Mises-Fisher distribution.
    """
    pair = _double(trained.value), _double(rows.value)
    contexts = None if rows.context is None else (_double(trained.context), _double(rows.context))
    if is_plain_flow(model) and not model.chain.discrete:
        return _of_flow(model, pair, contexts)
    flat = pair[0].flatten(1), pair[1].flatten(1)
    discrete, counts = _discrete(model, flat[0].shape[1])
    if not any(discrete) and head_of(model) is None and few_values(flat[0], list(range(flat[0].shape[1]))):
        return "as values repeat, and it is not known whether this module gives densities", None
    if not any(discrete):
        return _gaussian(pair, contexts)
    total = _frequencies(flat, discrete, counts)
    if all(discrete):
        return "independent columns", total
    free = ~torch.tensor(discrete, device="cpu")
    scores = _gaussian((flat[0][:, free], flat[1][:, free]), contexts)[1]
    return "a Gaussian beside independent discrete columns", total + scores


def _double(values: Any) -> Tensor:
    return values.detach().cpu().double()


def _of_flow(flow: Flow, pair: Pair, contexts: Pair | None) -> tuple[str, Tensor | None]:
    """Scores behind the parts of a flow that map onto its support."""
    codomain = flow.chain.codomain
    if codomain is pyro_constraints.sphere or isinstance(codomain, type(pyro_constraints.sphere)):
        return "a von Mises-Fisher distribution", _direction(pair)
    back = split_chain(flow.chain)[1]
    kin = next(flow.parameters(), pair[0])
    pulled, ladj = [], pair[1].new_zeros(len(pair[1]))
    for each in pair:
        x = each
        if back:
            x, ladj = (_double(part) for part in Chain(back).inverse_and_ladj(each.to(kin)))
        pulled.append(x)
    known, own = pulled
    front = split_chain(flow.chain)[0]
    periodic = Chain(front).periodic if front else None
    if periodic is None or not periodic.any():
        name, scores = _gaussian((known, own), contexts)
        return name, scores + ladj
    free = movable(flow).flatten()
    known, own = known.flatten(1), own.flatten(1)
    for k in (~free).nonzero()[:, 0].tolist():
        circle = [torch.stack((x[:, k].cos(), x[:, k].sin()), -1) for x in (known, own)]
        ladj = ladj + _direction((circle[0], circle[1]))
    if not free.any():
        return "independent von Mises distributions", ladj
    return "a Gaussian beside von Mises distributions", ladj + _gaussian((known[:, free], own[:, free]), contexts)[1]


def _gaussian(pair: Pair, contexts: Pair | None) -> tuple[str, Tensor]:
    known, own = pair
    shape = known.shape[1:]
    given = (None, None) if contexts is None else contexts
    if shape.numel() <= _WIDEST:
        return "the Gaussian", fit_gaussian(known, given[0]).log_prob(own, given[1])
    if len(shape) == 2 and 2 * shape[0] <= _WIDEST:
        return "a Gaussian autoregression", _autoregression(pair, contexts)
    scale = known.std(0)
    normal = Normal(known.mean(0), torch.where(scale > 0, scale, 1.0), validate_args=False)
    return "independent normals", normal.log_prob(own).flatten(1).sum(1)


def _autoregression(pair: Pair, contexts: Pair | None) -> Tensor:
    """Scores series ``(C, T)`` by a Gaussian of their first steps, and of each later one, linear in those before."""
    channels, times = pair[0].shape[1:]
    lags = min(_LAGS, max(_PAST // channels, 1), times - 1)
    begin, past, now = [], [], []
    for k, x in enumerate(pair):
        context = x.new_zeros(len(x), 0) if contexts is None else contexts[k]
        windows = x.unfold(-1, lags + 1, 1).permute(0, 2, 3, 1)  # (rows, times, lags + 1, channels)
        spread = context.unsqueeze(1).expand(-1, windows.shape[1], -1)
        past.append(torch.cat((windows[:, :, :-1].flatten(2), spread), -1).flatten(0, 1))
        now.append(windows[:, :, -1].flatten(0, 1))
        begin.append(x[..., :lags].flatten(1))
    given = (None, None) if contexts is None else contexts
    first = fit_gaussian(begin[0], given[0]).log_prob(begin[1], given[1])
    later = fit_gaussian(now[0], past[0]).log_prob(now[1], past[1])
    return first + later.unflatten(0, (len(pair[1]), -1)).sum(1)


def _direction(pair: Pair) -> Tensor:
    """Scores points on a sphere, shape ``(rows, n)``, by the von Mises-Fisher distribution of the highest score."""
    mean = pair[0].mean(0)
    length = mean.norm()
    loc = mean / length if length > 0 else torch.eye(len(mean), dtype=mean.dtype, device="cpu")[0]
    every = VonMisesFisher(loc, _KAPPAS, validate_args=False)
    best = every.log_prob(pair[0].unsqueeze(1)).mean(0).argmax()
    return VonMisesFisher(loc, _KAPPAS[best], validate_args=False).log_prob(pair[1])


def _discrete(model: Any, size: int) -> tuple[Sequence[bool], Sequence[int | None]]:
    """Tells which columns of a model are discrete, and how many values each has, if that is known."""
    head = head_of(model)
    if head is not None:
        return head.discrete_dims(), head.num_values()
    if isinstance(model, Dequantized):
        return [True] * size, [model.levels] * size
    return [is_plain_flow(model)] * size, [None] * size  # a flow of whole numbers


def _frequencies(pair: Pair, discrete: Sequence[bool], counts: Sequence[int | None]) -> Tensor:
    """Scores discrete columns by their frequencies, with half a row more of each value."""
    known, own = pair
    total = own.new_zeros(len(own))
    for k in [k for k, each in enumerate(discrete) if each]:
        values, seen = known[:, k].unique(return_counts=True)
        place = torch.searchsorted(values, own[:, k].contiguous()).clamp(max=len(values) - 1)
        hits = torch.where(values[place] == own[:, k], seen[place], 0)
        # Without limits, whole numbers between the ends, and one beyond.
        number = counts[k] or max(len(values), float(values[-1] - values[0]) + 1) + 1
        total += ((hits + 0.5) / (len(known) + 0.5 * number)).log()
    return total
