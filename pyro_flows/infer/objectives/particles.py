"""Particles whose log weight is differentiable through the guide's draws alone, and through the model's parameters.

The draws ``z`` of a guide are cut from it twice.  The model sees ``z'``, a view whose gradient is multiplied by a
factor of each particle on its way back into the guide; the factor may be set after the model has run, when the weights
are known.  The guide's own density is differentiated with respect to a copy of ``z`` that has no history, in a second
run of the guide with the draws replayed.  Whatever else that run reads, parameters of any kind, is held fixed by that,
so nothing needs to be frozen, and nothing can be forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_if_enumerated, check_model_guide_match, check_site_shape
from torch import Tensor

__all__ = ["Particles", "refuse_messenger", "site_shape", "sum_particles"]


def sum_particles(trace: Trace, axis: int | None) -> Tensor | float:
    """Log-densities of a scored trace, summed over sites: a scalar, or one for each entry of the ``axis``-th last
    batch dimension.
    """
    total: Tensor | float = 0.0
    for site in trace.nodes.values():
        if site["type"] != "sample":
            continue
        log_prob = torch.as_tensor(site["log_prob"])
        if axis is None or log_prob.dim() < axis:  # one number for all particles
            total = total + log_prob.sum()
        elif log_prob.dim() > axis:
            raise ValueError(
                f"expected log-densities of site {site['name']!r} with at most {axis} batch dimensions, particles "
                f"leftmost, got shape {tuple(log_prob.shape)}: write the site so that it broadcasts over particles, "
                "raise max_plate_nesting, or set vectorize_particles=False"
            )
        else:
            total = total + _sum_last(log_prob, axis - 1)
    return total


def _sum_last(x: Tensor, dims: int) -> Tensor:
    return x.flatten(x.dim() - dims).sum(-1) if dims else x


def site_shape(site: dict[str, Any]) -> torch.Size:
    """The shape that a site's value broadcasts to."""
    fn = site["fn"]
    return torch.broadcast_shapes(site["value"].shape, fn.batch_shape + fn.event_shape)


def refuse_messenger(owner: str, guide: Callable) -> None:
    """Refuses a guide that runs the model itself, which cannot be run again on its own."""
    if isinstance(poutine.unwrap(guide), Messenger):
        raise NotImplementedError(
            f"{owner}: a guide that is an effect handler ({type(poutine.unwrap(guide)).__name__}) cannot be run apart "
            "from its model: use a guide that is a function or a module, such as AutoNormal, or Trace_ELBO"
        )


def _latents(trace: Trace) -> list[dict[str, Any]]:
    return [site for _, site in trace.iter_stochastic_nodes() if not site_is_subsample(site)]


def _is_rejection_sampler(fn: Any) -> bool:
    while fn is not None:
        if isinstance(fn, dist.Rejector):
            return True
        fn = getattr(fn, "base_dist", None)
    return False


def _is_discrete(fn: Any) -> bool:
    try:
        return fn.support.is_discrete
    except NotImplementedError:  # a distribution that does not say
        return False


def _refuse_score_functions(owner: str, trace: Trace) -> None:
    factors = [s for s in trace.nodes.values() if s["type"] == "sample" and isinstance(s["fn"], dist.Unit)]
    for site in (*_latents(trace), *factors):
        fn = site["fn"]
        if fn.has_rsample and not _is_rejection_sampler(fn):
            continue
        kind = type(fn).__name__
        if isinstance(fn, dist.Unit):
            hint = "say pyro.factor(..., has_rsample=True) if it belongs to a reparameterised draw"
        elif _is_discrete(fn):
            hint = "use Trace_ELBO, or sum the site out in the model with config_enumerate and TraceEnum_ELBO"
        else:
            hint = "use Trace_ELBO, or a distribution with has_rsample"
        raise ValueError(
            f"{owner}: expected reparameterised sites in the guide, got {kind} at {site['name']!r}, which has no path "
            f"gradient: {hint}"
        )


def _score(trace: Trace, max_plate_nesting: float) -> Trace:
    trace = prune_subsample_sites(trace)
    trace.compute_log_prob()
    if is_validation_enabled():
        for site in trace.nodes.values():
            if site["type"] == "sample":
                check_site_shape(site, max_plate_nesting)
    return trace


class _WayBack:
    """What happens to gradients between the draws and the guide.

    Apart from the particles, because hooks that held the draws would make a cycle that keeps every step's graph.
    """

    def __init__(self, vectorized: bool) -> None:
        self.vectorized = vectorized
        self.factor: Tensor | None = None
        self.dropped: Tensor | None = None

    def weigh(self, gradient: Tensor) -> Tensor:
        if self.factor is None:
            return gradient
        return gradient * (_along(self.factor, gradient) if self.vectorized else self.factor)

    def stop_dropped(self, gradient: Tensor) -> Tensor:
        # What comes back from a later draw that overflowed is NaN, although that draw has no weight.
        return gradient if self.dropped is None else gradient.masked_fill(_along(self.dropped, gradient), 0.0)


def _along(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(-1, *(1,) * (like.dim() - 1))


class Particles:
    """One run of the guide and of the model on its draws: one particle, or as many as there are along ``axis``.

    Attributes:
        log_p: the model's log-density, differentiable in its parameters and in the draws; a scalar or ``(K,)``.
        log_q: the guide's log-density at its draws, a number.
        through_draws: has the value that nobody reads, and the gradient of ``log_q`` in the draws.

    Cost: the guide's draws, its density at them without a memo (for a flow, one pass in the density direction) with
    the gradient in the draws, and the model.
    """

    def __init__(
        self,
        owner: str,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        axis: int | None,
        max_plate_nesting: float,
    ) -> None:
        self._way_back = _WayBack(axis is not None)
        self._axis, self._nesting = axis, max_plate_nesting
        self._model, self._args, self._kwargs = model, args, kwargs

        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        _refuse_score_functions(owner, drawn)
        if is_validation_enabled():
            check_if_enumerated(drawn)
        self._draws = {}
        for site in _latents(drawn):
            self._draws[site["name"]] = value = site["value"].expand(site_shape(site))
            if axis is not None and value.shape == site["value"].shape and site["value"].grad_fn is not None:
                site["value"].register_hook(self._way_back.stop_dropped)
        # New tensors also keep caches out, which are keyed by identity and hold the guide's history.
        self._seen = {name: value.view_as(value) for name, value in self._draws.items()}
        for seen in self._seen.values():
            if seen.requires_grad:
                seen.register_hook(self._way_back.weigh)
        self._run_model(_with_values(drawn, self._seen), drawn)
        self._run_guide(owner, guide, drawn)

    def _run_model(self, values: Trace, drawn: Trace | None) -> None:
        trace = poutine.trace(poutine.replay(self._model, trace=values)).get_trace(*self._args, **self._kwargs)
        if drawn is not None and is_validation_enabled():
            check_model_guide_match(trace, drawn, self._nesting)
        self._model_trace = trace
        self.log_p = sum_particles(_score(trace, self._nesting), self._axis)

    def _run_guide(self, owner: str, guide: Callable, drawn: Trace) -> None:
        bare = {name: value.detach() for name, value in self._draws.items()}
        wanted = [name for name, value in self._draws.items() if value.requires_grad]
        for name in wanted:
            bare[name] = bare[name].requires_grad_()
        again = poutine.trace(poutine.replay(guide, trace=_with_values(drawn, bare))).get_trace(
            *self._args, **self._kwargs
        )
        try:
            log_q = sum_particles(_score(again, self._nesting), self._axis)
        except (KeyError, NotImplementedError) as error:
            raise NotImplementedError(
                f"{owner}: the guide cannot score a draw anew, which a path gradient asks for ({error}): use a guide "
                "whose transforms have an inverse, or Trace_ELBO"
            ) from error
        self.log_q = torch.as_tensor(log_q).detach()
        self._slopes: dict[str, Tensor] = {}
        if wanted and isinstance(log_q, Tensor) and log_q.requires_grad:
            slopes = torch.autograd.grad(log_q.sum(), [bare[name] for name in wanted], allow_unused=True)
            self._slopes = {name: slope for name, slope in zip(wanted, slopes, strict=True) if slope is not None}

    def weigh(self, factor: Tensor) -> None:
        """Says what gradients are multiplied by on their way from the draws into the guide, ``(K,)`` or a scalar."""
        self._way_back.factor = factor

    @property
    def through_draws(self) -> Tensor | float:
        """``(K,)`` or a scalar; see the class."""
        total: Tensor | float = 0.0
        for name, slope in self._slopes.items():
            product = slope * self._seen[name]
            total = total + (product.sum() if self._axis is None else _sum_last(product, product.dim() - 1))
        return total

    def replace(self, keep: Tensor) -> None:
        """Puts the draws of the first kept particle in the place of those that are not kept and runs the model again.

        A particle without a finite density has no finite derivatives either, and 0 times those is not 0.  In the guide
        the gradient of such a particle is stopped at each of its sites.
        """
        self._way_back.dropped = ~keep
        index = torch.where(keep, torch.arange(len(keep), device=keep.device), keep.int().argmax())
        values = self._model_trace.copy()
        for site in _latents(values):
            name = site["name"]
            leftmost = site["value"].dim() == self._axis + site["fn"].event_dim
            value = site["value"].index_select(0, index) if leftmost else site["value"]
            values.nodes[name] = {**site, "value": value}
        self._seen = {name: value.index_select(0, index) for name, value in self._seen.items()}
        self._slopes = {name: slope.index_select(0, index) for name, slope in self._slopes.items()}
        self._run_model(values, None)


def _with_values(trace: Trace, values: dict[str, Tensor]) -> Trace:
    changed = trace.copy()
    for name, value in values.items():
        changed.nodes[name] = {**changed.nodes[name], "value": value}
    return changed
