"""Particles whose log weight is differentiable only through the guide's draws and the model's parameters.

The draws ``z`` are cut from the guide twice. The model sees a view, whose gradient is multiplied by a factor per
particle on its way into the guide; the factor may be set after the model's run. A second run of the guide gives its
density at a detached copy of ``z``, which holds parameters of any kind fixed.
"""

from __future__ import annotations

import warnings
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_if_enumerated, check_model_guide_match, check_site_shape
from torch import Tensor

from pyro_flows.core.checks import joint_shape
from pyro_flows.infer.models.sites import Model, latent_messages, sum_beyond

__all__ = ["Objective", "Particles", "refuse_messenger", "sum_particles"]


class Objective(ELBO):
    """An ELBO that counts particles or rows, and leaves out those without a finite density."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.num_dropped = 0
        self.num_scored = 0

    def __repr__(self) -> str:
        names = ("num_particles", "alpha", "batch_size", "num_samples", "num_dropped")
        told = (f"{name}={getattr(self, name)}" for name in names if hasattr(self, name))
        return f"{type(self).__name__}({', '.join(told)})"

    def _losses(self, model: Model, guide: Model, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Returns the scalar loss and any surrogate for its gradient."""
        raise NotImplementedError

    def _count(self, dropped: int, scored: int, why: str) -> None:
        """Updates the counts, and warns at the first drop."""
        if dropped and not self.num_dropped:
            warnings.warn(
                f"{type(self).__name__}: {dropped} of {scored} {why} and were left out; num_dropped counts them from "
                "here on, without further warnings",
                RuntimeWarning,
                stacklevel=4,
            )
        self.num_dropped += dropped
        self.num_scored += scored

    def loss_and_grads(self, model: Model, guide: Model, *args: Any, **kwargs: Any) -> float:
        """Returns the loss, and adds its gradient to the parameters' ``grad``."""
        loss, surrogate = self._losses(model, guide, args, kwargs)
        if surrogate is not None:
            surrogate.backward(retain_graph=self.retain_graph)
        return loss.item()

    def differentiable_loss(self, model: Model, guide: Model, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss; only its first gradient is valid."""
        loss, surrogate = self._losses(model, guide, args, kwargs)
        return loss if surrogate is None else loss + (surrogate - surrogate.detach())


def sum_particles(trace: Trace, axis: int | None) -> Tensor | float:
    """Sums a trace's log-densities over sites, to a scalar or per entry of batch dimension ``-axis``."""
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
            total = total + sum_beyond(log_prob, 1)
    return total


def refuse_messenger(owner: str, guide: Model) -> None:
    """Refuses a guide that runs the model itself."""
    if isinstance(poutine.unwrap(guide), Messenger):
        raise NotImplementedError(
            f"{owner}: a guide that is an effect handler ({type(poutine.unwrap(guide)).__name__}) cannot be run apart "
            "from its model: use a guide that is a function or a module, such as AutoNormal, or Trace_ELBO"
        )


def _rejects(fn: Any) -> bool:
    """Whether a distribution draws by rejection, whose gradient is no path gradient."""
    return isinstance(fn, dist.Rejector) or (hasattr(fn, "base_dist") and _rejects(fn.base_dist))


def _refuse_score_functions(owner: str, trace: Trace) -> None:
    nodes: list[Any] = [node for node in trace.nodes.values() if node["type"] == "sample"]
    factors = [node for node in nodes if isinstance(node["fn"], dist.Unit)]
    for site in (*latent_messages(trace).values(), *factors):
        fn = site["fn"]
        if fn.has_rsample and not _rejects(fn):
            continue
        kind = type(fn).__name__
        if isinstance(fn, dist.Unit):
            hint = "say pyro.factor(..., has_rsample=True) if it belongs to a reparameterized draw"
        elif fn.has_enumerate_support:
            hint = "use Trace_ELBO, or sum the site out in the model with config_enumerate and TraceEnum_ELBO"
        else:
            hint = "use Trace_ELBO, or a distribution with has_rsample"
        raise ValueError(
            f"{owner}: expected reparameterized sites in the guide, got {kind} at {site['name']!r}, which has no path "
            f"gradient: {hint}"
        )


def _score(trace: Trace, max_plate_nesting: Any) -> Trace:
    trace = prune_subsample_sites(trace)
    trace.compute_log_prob()
    if is_validation_enabled():
        for site in trace.nodes.values():
            if site["type"] == "sample":
                check_site_shape(site, max_plate_nesting)
    return trace


class _WayBack:
    """Gradient hooks between the draws and the guide.

    Hooks that held the draws would make a cycle that keeps every step's graph.
    """

    factor: Tensor | None = None
    dropped: Tensor | None = None

    def weigh(self, gradient: Tensor) -> Tensor:
        return gradient if self.factor is None else gradient * _along(self.factor, gradient)

    def stop_dropped(self, gradient: Tensor) -> Tensor:
        # A later draw that overflowed has a NaN gradient, although it has no weight.
        return gradient if self.dropped is None else gradient.masked_fill(_along(self.dropped, gradient), 0.0)


def _along(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(x.shape + (1,) * (like.dim() - x.dim()))


class Particles:
    """One run of the guide and of the model on its draws: one particle, or ``K`` along batch dimension ``-axis``.

    Attributes:
        log_p: the model's log-density, differentiable in its parameters and in the draws; a scalar or ``(K,)``.
        log_q: the guide's log-density at its draws, without gradient.
        through_draws: the surrogate for ``log_q``: only its gradient with respect to the draws is used.
        way_back: the hooks, whose ``factor``, ``(K,)`` or a scalar, multiplies gradients from draws into the guide.

    Cost: the guide's draws, their uncached density (for a flow, one pass in the density direction) with its gradient,
    and the model.
    """

    def __init__(
        self,
        owner: str,
        model: Model,
        guide: Model,
        args: tuple,
        kwargs: dict[str, Any],
        axis: int | None,
        max_plate_nesting: float,
    ) -> None:
        self.way_back = _WayBack()
        self._axis, self._nesting = axis, max_plate_nesting
        self._model, self._args, self._kwargs = model, args, kwargs

        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        if torch.is_grad_enabled():
            _refuse_score_functions(owner, drawn)
        if is_validation_enabled():
            check_if_enumerated(drawn)
        self._draws = {}
        for name, site in latent_messages(drawn).items():
            shape = joint_shape(site["value"].shape, site["fn"].batch_shape + site["fn"].event_shape)
            self._draws[name] = value = site["value"].expand(shape)
            if axis is not None and value.shape == site["value"].shape and site["value"].grad_fn is not None:
                site["value"].register_hook(self.way_back.stop_dropped)
        # New tensors bypass caches, which go by identity and hold the guide's history.
        self._seen = {name: value.view_as(value) for name, value in self._draws.items()}
        for seen in self._seen.values():
            if seen.requires_grad:
                seen.register_hook(self.way_back.weigh)
        self._run_model(_with_values(drawn, self._seen), drawn)
        self._run_guide(owner, guide, drawn)

    def _run_model(self, values: Trace, drawn: Trace | None) -> None:
        trace = poutine.trace(poutine.replay(self._model, trace=values)).get_trace(*self._args, **self._kwargs)
        if drawn is not None and is_validation_enabled():
            check_model_guide_match(trace, drawn, self._nesting)
        self._model_trace = trace
        self.log_p = sum_particles(_score(trace, self._nesting), self._axis)

    def _run_guide(self, owner: str, guide: Model, drawn: Trace) -> None:
        bare = {name: value.detach() for name, value in self._draws.items()}
        wanted = {name: bare[name].requires_grad_() for name, value in self._draws.items() if value.requires_grad}
        if wanted:
            guide = poutine.replay(guide, trace=_with_values(drawn, bare))
            drawn = poutine.trace(guide).get_trace(*self._args, **self._kwargs)
        try:
            log_q = torch.as_tensor(sum_particles(_score(drawn, self._nesting), self._axis))
        except (KeyError, NotImplementedError) as error:
            raise NotImplementedError(
                f"{owner}: the guide cannot score a draw anew, as a path gradient requires ({error}): use a guide "
                "whose transforms have an inverse, or Trace_ELBO"
            ) from error
        self.log_q, self._slopes = log_q.detach(), {}
        if wanted and log_q.requires_grad:
            slopes = torch.autograd.grad(log_q.sum(), list(wanted.values()), allow_unused=True)
            self._slopes = {name: slope for name, slope in zip(wanted, slopes, strict=True) if slope is not None}

    @property
    def through_draws(self) -> Tensor | float:
        """The surrogate for ``log_q``, ``(K,)`` or a scalar."""
        products = [slope * self._seen[name] for name, slope in self._slopes.items()]
        return sum(sum_beyond(product, 0 if self._axis is None else 1) for product in products)

    def replace(self, keep: Tensor) -> None:
        """Replaces dropped particles' draws by the first kept one's, and reruns the model.

        Their derivatives may be NaN, which a weight of 0 does not cancel. Inside the guide, their gradients are stopped
        at each site.
        """
        self.way_back.dropped = ~keep
        index = torch.where(keep, torch.arange(len(keep), device=keep.device), keep.int().argmax())
        values = {}
        for name, site in latent_messages(self._model_trace).items():
            leftmost = site["value"].dim() == self._axis + site["fn"].event_dim
            values[name] = site["value"].index_select(0, index) if leftmost else site["value"]
        self._seen = {name: value.index_select(0, index) for name, value in self._seen.items()}
        self._slopes = {name: slope.index_select(0, index) for name, slope in self._slopes.items()}
        self._run_model(_with_values(self._model_trace, values), None)


def _with_values(trace: Trace, values: dict[str, Tensor]) -> Trace:
    changed = trace.copy()
    for name, value in values.items():
        changed.nodes[name] = changed.nodes[name] | {"value": value}
    return changed
