"""``ForwardKL``: fits a guide to given draws of the posterior."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_flows.core.checks import integer
from pyro_flows.infer.density.data import to_tensor
from pyro_flows.infer.models.sites import Model, sample_messages
from pyro_flows.infer.objectives.packing import guide_values
from pyro_flows.infer.objectives.particles import Objective, refuse_messenger, sum_particles

__all__ = ["ForwardKL"]


class ForwardKL(Objective):
    r"""Maximizes the guide's density at given draws of the posterior, from MCMC or a simulator.

    .. math:: L = -\mathbb{E}_{p(z \mid x)} \log q_\phi(z) \approx -\frac{1}{B} \sum_b \log q_\phi(z_b)

    in nats, with the density in constrained space. The loss is :math:`\mathrm{KL}(p \,\|\, q_\phi)` plus the
    posterior's entropy, so the guide learns every mode that the draws visit. The model does not run, and its parameters
    get no gradient.

    Each step takes the next ``batch_size`` rows of a shuffled order, and reshuffles when too few are left. :meth:`loss`
    scores all rows.

    The guide may be an ``AutoContinuous`` (flow guides, ``AutoMultivariateNormal``, ...), an ``AutoNormal``, an
    ``AutoGuideList`` of these, or one that samples only the model's latents.

    Cost: the guide's density at the rows; for a flow, one pass in the density direction, and no draw.

    Args:
        draws: the constrained values of each latent site, tensors or arrays of shape ``(n, *site.shape)``. Floating
            values take the guide's dtype and device.
        batch_size: the number of rows per step, at most ``n``.
        seed: the seed for the order of rows, independent of torch's global generators.
        max_plate_nesting: the guide's plate nesting; by default found by a run.
        vectorize_particles: whether to score a step's rows at once, in an outermost plate, or one by one.
        retain_graph: as in ``pyro.infer.ELBO``.

    Attributes:
        num_samples: ``n``.
        num_dropped: the number of rows left out so far because their density was not finite.
        num_scored: the number of all rows so far.

    Raises:
        ValueError: if sites, shapes or supports of draws and guide do not fit; names the site.

    Example:
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> elbo = pf.infer.ForwardKL({"z": 3 + torch.randn(500)})
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
        >>> losses = [svi.step() for _ in range(50)]
        >>> losses[-1] < losses[0]
        True
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
        self.num_samples = min(sizes.values())
        if len(set(sizes.values())) > 1 or not self.num_samples:
            raise ValueError(f"ForwardKL: expected as many rows of draws for each site, at least one, got {sizes}")
        for name, value in self.draws.items():
            if not value.isfinite().all():
                raise ValueError(f"ForwardKL: draws of {name!r} are not all finite")
        self.batch_size = min(integer("ForwardKL", "batch_size", batch_size), self.num_samples)
        super().__init__(num_particles=self.batch_size, retain_graph=retain_graph)
        self.vectorize_particles = vectorize_particles
        self.max_plate_nesting = max_plate_nesting
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.long, device="cpu")
        self._values: WeakKeyDictionary[Model, tuple[dict[str, Tensor], int]] = WeakKeyDictionary()

    def _get_trace(self, model: Model, guide: Model, args: tuple, kwargs: dict[str, Any]) -> tuple[Trace, Trace]:
        raise NotImplementedError("ForwardKL scores given draws and has no traces of the model")

    def _fitted(self, guide: Model, args: tuple, kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
        """Returns the cached values of the guide's sites, and its plate depth."""
        if guide not in self._values:
            refuse_messenger("ForwardKL", guide)
            with poutine.block(), torch.no_grad():
                trace = poutine.trace(guide).get_trace(*args, **kwargs)
                values = guide_values(guide, trace, self.draws)
            sites = sample_messages(trace)
            frames = [frame for site in sites.values() for frame in site["cond_indep_stack"]]
            nesting = max([-frame.dim for frame in frames if frame.vectorized], default=0)
            if self.max_plate_nesting != math.inf:
                nesting = int(self.max_plate_nesting)
            for name, value in values.items() if self.vectorize_particles else ():
                plates = value.dim() - 1 - sites[name]["fn"].event_dim
                values[name] = value.reshape(len(value), *(1,) * (nesting - plates), *value.shape[1:])
            self._values[guide] = values, nesting
        return self._values[guide]

    def _log_q(self, guide: Model, args: tuple, kwargs: dict[str, Any], rows: Tensor) -> Tensor:
        """Returns log-densities at the rows, shape ``(rows,)``."""
        values, nesting = self._fitted(guide, args, kwargs)

        def score(at: Tensor) -> Tensor:
            many = pyro.plate("forward_kl_rows", len(at), dim=-nesting - 1) if at.dim() else nullcontext()
            held = poutine.condition(guide, data={name: value[at] for name, value in values.items()})
            with many:
                trace = prune_subsample_sites(poutine.trace(held).get_trace(*args, **kwargs))
            trace.compute_log_prob()
            return torch.as_tensor(sum_particles(trace, nesting + 1 if self.vectorize_particles else None))

        return score(rows) if self.vectorize_particles else torch.stack([score(row) for row in rows])

    def loss(self, model: Model, guide: Model, *args: Any, **kwargs: Any) -> float:
        """Returns minus the mean log-density of all draws, computed ``batch_size`` at a time."""
        pieces = torch.arange(self.num_samples, device="cpu").split(self.batch_size)
        with torch.no_grad():
            return -sum(self._log_q(guide, args, kwargs, rows).sum().item() for rows in pieces) / self.num_samples

    def _losses(self, model: Model, guide: Model, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        if len(self._order) < self.batch_size:
            self._order = torch.randperm(self.num_samples, generator=self._generator, device="cpu")
        rows, self._order = self._order[: self.batch_size], self._order[self.batch_size :]
        log_q = self._log_q(guide, args, kwargs, rows)
        fine = log_q.detach().isfinite().cpu()
        dropped = len(rows) - int(fine.sum())
        self._count(dropped, len(rows), "rows have no finite density under the guide")
        if 0 < dropped < len(rows):
            # Score again, because 0 times a derivative that is not finite is not 0.
            log_q = self._log_q(guide, args, kwargs, rows[fine])
        loss = -log_q.mean()
        return loss.detach(), loss if loss.requires_grad and dropped < len(rows) else None
