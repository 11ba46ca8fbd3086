"""``ForwardKL``: fits a guide to draws of the posterior that are already there."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_flows.infer.density.data import to_tensor
from pyro_flows.infer.objectives.packing import guide_values
from pyro_flows.infer.objectives.particles import refuse_messenger, sum_particles

__all__ = ["ForwardKL"]


class _SetValues(Messenger):
    """Gives sample sites their values, without calling them observed."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class ForwardKL(ELBO):
    r"""Maximises the guide's density at given draws of the posterior, from MCMC or a simulator.

    .. math:: L = -\mathbb{E}_{p(z \mid x)} \log q_\phi(z) \approx -\frac{1}{B} \sum_b \log q_\phi(z_b)

    in nats, with the density in constrained space.  That is the divergence :math:`\mathrm{KL}(p \,\|\, q_\phi)` up to
    the posterior's entropy; its minimum covers all of the posterior.  A guide that is fitted to it visits every mode
    that the draws visit.  The model is not run, and its parameters get no gradient.

    Each step takes the next ``batch_size`` rows of a shuffled order, and shuffles anew when too few are left.
    :meth:`loss` scores all rows.

    Which guides: ``AutoContinuous`` (flow guides, ``AutoMultivariateNormal``, ...), ``AutoNormal``, an
    ``AutoGuideList`` of these, or a guide that samples the model's latents themselves and nothing auxiliary.

    Cost: one run of the guide with its density at the rows; for a flow, one pass in the density direction, and no draw.

    Args:
        draws: for each latent site a tensor or array of constrained values, shape ``(n, *shape)``, where ``shape`` is
            that of the site's value.  Floating values take the guide's dtype and device.
        batch_size: rows for each step, at most ``n``.
        seed: of the order of rows, which does not depend on torch's global generators.
        max_plate_nesting: how many plates are nested in the guide at most; found by a run of it if left out.
        vectorize_particles: whether the rows of a step are scored at once, in a plate outside of all others; else one
            by one, for guides that do not broadcast.
        retain_graph: as in ``pyro.infer.ELBO``.

    Attributes:
        num_dropped: rows so far that were left out of a step because their density was not finite.
        num_scored: all rows so far.

    Raises:
        ValueError: if sites, shapes or supports of draws and guide do not fit; names the site.
    """

    def __init__(
        self,
        draws: Mapping[str, Any],
        batch_size: int = 256,
        *,
        seed: int = 0,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = True,
        retain_graph: bool | None = None,
    ) -> None:
        self.draws = {name: to_tensor(value, "ForwardKL", f"draws of {name!r}") for name, value in draws.items()}
        if not self.draws:
            raise ValueError("ForwardKL: expected draws of at least one site, got none")
        sizes = {name: len(value) if value.dim() else 0 for name, value in self.draws.items()}
        self.num_draws = min(sizes.values())
        if len(set(sizes.values())) > 1 or not self.num_draws:
            raise ValueError(f"ForwardKL: expected as many rows of draws for each site, at least one, got {sizes}")
        for name, value in self.draws.items():
            if not value.isfinite().all():
                raise ValueError(f"ForwardKL: draws of {name!r} are not all finite")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"ForwardKL: expected batch_size to be a positive int, got {batch_size}")
        self.batch_size = min(batch_size, self.num_draws)
        super().__init__(num_particles=self.batch_size, retain_graph=retain_graph)
        self.vectorize_particles = vectorize_particles
        self.max_plate_nesting = max_plate_nesting
        self.num_dropped = 0
        self.num_scored = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.long)
        self._values: WeakKeyDictionary = WeakKeyDictionary()

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[Trace, Trace]:
        raise NotImplementedError("ForwardKL scores given draws and has no traces of the model")

    def _rows(self) -> Tensor:
        if len(self._order) < self.batch_size:
            self._order = torch.randperm(self.num_draws, generator=self._generator)
        rows, self._order = self._order[: self.batch_size], self._order[self.batch_size :]
        return rows

    def _fitted(self, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], float]:
        """Values of the guide's sites, worked out at its first call, and the depth of its plates."""
        if guide not in self._values:
            refuse_messenger("ForwardKL", guide)
            with poutine.block(), torch.no_grad():
                trace = poutine.trace(guide).get_trace(*args, **kwargs)
            frames = [f for s in trace.nodes.values() if s["type"] == "sample" for f in s["cond_indep_stack"]]
            nesting = max([-f.dim for f in frames if f.vectorized], default=0)
            if self.max_plate_nesting != math.inf:
                nesting = self.max_plate_nesting
            with torch.no_grad():
                values = guide_values(guide, trace, self.draws)
            event_dims = {name: trace.nodes[name]["fn"].event_dim for name in values}
            for name, value in values.items() if self.vectorize_particles else ():
                plates = value.dim() - 1 - event_dims[name]
                values[name] = value.reshape(len(value), *(1,) * (nesting - plates), *value.shape[1:])
            self._values[guide] = values, nesting
        return self._values[guide]

    def _log_q(self, guide: Callable, args: tuple, kwargs: dict[str, Any], rows: Tensor) -> Tensor:
        """Log-densities at the rows, shape ``(rows,)``."""
        values, nesting = self._fitted(guide, args, kwargs)

        def score(at: Tensor | int) -> Tensor:
            plate = nullcontext()
            if self.vectorize_particles:
                plate = pyro.plate("forward_kl_rows", len(at), dim=-nesting - 1)
            with _SetValues({name: value[at] for name, value in values.items()}), plate:
                trace = prune_subsample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
            trace.compute_log_prob()
            return torch.as_tensor(sum_particles(trace, nesting + 1 if self.vectorize_particles else None))

        return score(rows) if self.vectorize_particles else torch.stack([score(row) for row in rows.tolist()])

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Minus the mean log-density of all draws, ``batch_size`` at a time."""
        pieces = torch.arange(self.num_draws).split(self.batch_size)
        with torch.no_grad():
            return -sum(self._log_q(guide, args, kwargs, rows).sum().item() for rows in pieces) / self.num_draws

    def _step(self, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        rows = self._rows()
        log_q = self._log_q(guide, args, kwargs, rows)
        fine = log_q.detach().isfinite().cpu()
        dropped = len(rows) - int(fine.sum())
        if dropped and not self.num_dropped:
            warnings.warn(
                f"ForwardKL: {dropped} of {len(rows)} rows have no finite density under the guide and were left out; "
                "num_dropped counts them from here on, without further warnings",
                RuntimeWarning,
                stacklevel=3,
            )
        self.num_dropped += dropped
        self.num_scored += len(rows)
        if 0 < dropped < len(rows):
            # Scored anew, because 0 times a derivative that is not finite is not 0.
            log_q = self._log_q(guide, args, kwargs, rows[fine])
        loss = -log_q.mean()
        return loss if dropped < len(rows) else loss.detach()

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Minus the mean log-density of the next rows, and its gradient added to the parameters' ``grad``."""
        loss = self._step(guide, args, kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the mean log-density of the next rows."""
        return self._step(guide, args, kwargs)
