r"""Bounds on the evidence with gradients through the draws alone.

The formulas are those of :class:`AlphaDivergence`, with the gradient :math:`\sum_k v_k \, \partial \log p_k` with
respect to the model's parameters. In the guide's total derivative, the score term
:math:`v_k \, \partial_\phi \log q(z_k)` has the same expectation over :math:`z_k` as
:math:`(1 - \alpha)(v_k - v_k^2) \, \partial_z \ell_k \, d z_k / d \phi`, where :math:`\ell_k = \log w_k`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_flows.core.checks import integer
from pyro_flows.infer.models.sites import Model
from pyro_flows.infer.objectives.particles import Objective, Particles, refuse_messenger

__all__ = ["AlphaDivergence", "DReGELBO", "PathELBO"]


def _bound(log_w: Tensor, keep: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the bound, the normalized weights ``v`` and ``alpha + (1 - alpha) v``, from ``(K,)`` log weights."""
    count = keep.sum()
    log_w = log_w.masked_fill(~keep, 0.0)
    if alpha == 1:
        v = keep.to(log_w) / count
        return (v * log_w).sum(), v, torch.ones_like(log_w)
    # Centering keeps precision for alpha near 1.
    center = log_w.sum() / count
    tilted = ((1 - alpha) * (log_w - center)).masked_fill(~keep, -math.inf)
    # Without a weight, a particle counts as 0 in a mean of positive powers, and is left out of others.
    log_count = math.log(len(log_w)) if alpha < 1 else count.to(log_w).log()
    v = tilted.softmax(0)
    highest = tilted.max()
    small = (tilted.expm1().sum() + len(log_w) - count) / count  # mean of those kept, minus 1
    log_mean = torch.where(
        highest < 0.5, torch.log1p(small) + count.to(log_w).log() - log_count, tilted.logsumexp(0) - log_count
    )
    return center + log_mean / (1 - alpha), v, alpha + (1 - alpha) * v


class _PathObjective(Objective):
    """The base of these bounds, with ``alpha``."""

    alpha: float

    def __init__(
        self,
        num_particles: int = 8,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        strict_enumeration_warning: bool = True,
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(
            num_particles=integer(type(self).__name__, "num_particles", num_particles),
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles and num_particles > 1,
            strict_enumeration_warning=strict_enumeration_warning,
            retain_graph=retain_graph,
        )

    def _get_trace(self, model: Model, guide: Model, args: tuple, kwargs: dict[str, Any]) -> Particles:
        axis = self.max_plate_nesting if self.vectorize_particles else None
        return Particles(type(self).__name__, model, guide, args, kwargs, axis, self.max_plate_nesting)

    def _gather(self, parts: list[Tensor | float]) -> Tensor:
        return torch.stack([torch.as_tensor(part) for part in parts]).reshape(-1).expand(self.num_particles)

    def _losses(self, model: Model, guide: Model, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Returns the scalar loss and any surrogate for its gradient."""
        if torch.is_grad_enabled():
            refuse_messenger(type(self).__name__, guide)
        runs: list[Particles] = list(self._get_traces(model, guide, args, kwargs))
        log_p = self._gather([run.log_p for run in runs])
        log_w = log_p.detach() - self._gather([run.log_q for run in runs])
        keep = log_w.isfinite()
        kept = int(keep.sum())
        self._count(self.num_particles - kept, self.num_particles, "particles have no finite weight")
        if not kept:
            return -log_w.mean(), None
        bound, v, factor = _bound(log_w, keep, self.alpha)
        if not torch.is_grad_enabled():
            return -bound, None
        if self.vectorize_particles:
            v, factor = v.unsqueeze(0), factor.unsqueeze(0)
            if kept < self.num_particles:
                runs[0].replace(keep)
        surrogate = torch.zeros_like(bound)
        for run, share, weight in zip(runs, v, factor, strict=True):
            if self.alpha != 1:
                run.way_back.factor = weight
            if share.any():
                surrogate = surrogate + (share * (run.log_p - run.through_draws)).sum()
        return -bound, -surrogate if surrogate.requires_grad else None

    def loss(self, model: Model, guide: Model, *args: Any, **kwargs: Any) -> float:
        """Estimates minus the bound from new draws, without gradient."""
        with torch.no_grad():
            return self._losses(model, guide, args, kwargs)[0].item()


class PathELBO(_PathObjective):
    r"""The evidence lower bound with the path gradient ("sticking the landing").

    .. math:: L = \mathbb{E}_{q_\phi}\bigl[\log p(x, z) - \log q_\phi(z)\bigr], \qquad
        \nabla_\phi L = \mathbb{E}\Bigl[\frac{\partial}{\partial z} \bigl(\log p(x, z) - \log q_\phi(z)\bigr)
        \frac{d z}{d \phi}\Bigr].

    The gradient of ``Trace_ELBO`` also has the term :math:`-\partial_\phi \log q_\phi(z)`, which is 0 on average.
    Without it every draw's gradient is 0 once the guide is the posterior. The gradient is unbiased for parameters of
    the guide, of the model, and of both.

    Particles whose weight is not finite are left out of the mean; ``pyro.enable_validation(False)`` keeps distributions
    from raising there.

    Any reparameterized guide works: autoguides, ``PyroModule``s, functions with ``pyro.param`` or ``pyro.module``. The
    guide reruns on its draws, so its modules must neither draw noise (dropout) nor count calls.

    Cost: that of ``Trace_ELBO``, plus the guide's density at the draws and its gradient with respect to them; for a
    flow, one more pass in the density direction. All particles stay in memory.

    Args:
        num_particles: the number of draws per step.
        max_plate_nesting: as in ``pyro.infer.ELBO``; by default found by a run.
        vectorize_particles: whether to make all draws at once, in an outermost plate.
        strict_enumeration_warning: as in ``pyro.infer.ELBO``.
        retain_graph: as in ``pyro.infer.ELBO``.

    Attributes:
        num_dropped: the number of particles left out so far.
        num_scored: the number of all particles so far.

    Raises:
        ValueError: if a site of the guide is not reparameterized; names it.
        NotImplementedError: if the guide cannot score a given draw, or runs its model itself.

    Example:
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.tensor(3.0), 1.0))
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> svi = pyro.infer.SVI(
        ...     model, guide, pyro.optim.Adam({"lr": 0.01}), pf.infer.PathELBO())
        >>> losses = [svi.step() for _ in range(10)]
        >>> len(losses)
        10

    References:
        Roeder, Wu, Duvenaud. Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational
        Inference. arXiv:1703.09194.
    """

    alpha = 1.0

    def __init__(
        self,
        num_particles: int = 1,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        strict_enumeration_warning: bool = True,
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(
            num_particles, max_plate_nesting, vectorize_particles, strict_enumeration_warning, retain_graph
        )


class DReGELBO(_PathObjective):
    r"""The importance-weighted bound with the doubly reparameterized gradient.

    .. math:: L_K = \mathbb{E} \log \frac{1}{K} \sum_k w_k, \qquad w_k = \frac{p(x, z_k)}{q_\phi(z_k)}, \qquad
        \nabla_\phi L_K = \mathbb{E} \sum_k \tilde w_k^2 \frac{\partial \log w_k}{\partial z_k} \frac{d z_k}{d \phi},

    with :math:`\tilde w_k = w_k / \sum_j w_j`; the model's parameters get
    :math:`\sum_k \tilde w_k \, \partial \log p(x, z_k)`. Both are unbiased for :math:`L_K`, which grows with ``K`` from
    the evidence lower bound to the evidence. Without the squares, as for a path gradient in ``RenyiELBO``, the gradient
    belongs to no bound.

    Weights are those of whole traces, so with many local latents one of ``K`` soon dominates. With a subsampled plate
    :math:`L_K`, of the scaled minibatch, is no lower bound of the whole data's evidence. A particle without a finite
    weight has weight 0, which keeps the bound valid.

    Options, attributes, errors and cost are those of :class:`PathELBO`; ``num_particles`` is ``K``.

    Example:
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.tensor(3.0), 1.0))
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> elbo = pf.infer.DReGELBO(num_particles=16, vectorize_particles=True)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        >>> losses = [svi.step() for _ in range(10)]
        >>> len(losses)
        10

    References:
        Burda, Grosse, Salakhutdinov. Importance Weighted Autoencoders. arXiv:1509.00519.
        Tucker, Lawson, Gu, Maddison. Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives.
        arXiv:1810.04152.
    """

    alpha = 0.0


class AlphaDivergence(_PathObjective):
    r"""Rényi's bound of order ``alpha``, estimated from ``K`` draws, with a gradient through the draws alone.

    .. math:: L_{\alpha, K} = \mathbb{E}\, \frac{1}{1 - \alpha} \log \frac{1}{K} \sum_k w_k^{1 - \alpha}, \qquad
        \nabla_\phi L_{\alpha, K} = \mathbb{E} \sum_k \bigl(\alpha v_k + (1 - \alpha) v_k^2\bigr)
        \frac{\partial \log w_k}{\partial z_k} \frac{d z_k}{d \phi}, \qquad
        v_k = \frac{w_k^{1 - \alpha}}{\sum_j w_j^{1 - \alpha}}.

    Both estimates are unbiased for any ``K``, in the guide's and the model's parameters. For large ``K`` the limit is
    Rényi's bound :math:`L_\alpha = \log p(x) - D_\alpha(q \,\|\, p(\cdot \mid x))`, approached from below
    (``alpha < 1``) or above (``alpha > 1``), at order ``1 / K`` if :math:`w^{1 - \alpha}` has a variance. ``K = 1``
    gives the evidence lower bound for any ``alpha``.

    ``alpha = 1`` is :class:`PathELBO`, ``alpha = 0`` is :class:`DReGELBO`. A smaller ``alpha`` makes the guide cover
    more of the posterior, a larger one keeps it where the posterior is high; for ``alpha < 0`` the limit is an upper
    bound of the evidence. Every draw's gradient is 0 once the guide is the posterior.

    Weights are those of whole traces. A particle without a finite weight has weight 0 for ``alpha < 1``, and is left
    out of the mean otherwise.

    Options, attributes, errors and cost are those of :class:`PathELBO`; ``num_particles`` is ``K``.

    Args:
        alpha: the order, any real number, which the attribute ``alpha`` keeps.

    Raises:
        ValueError: if ``alpha`` is not finite.

    Example:
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.tensor(3.0), 1.0))
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> elbo = pf.infer.AlphaDivergence(alpha=0.5, num_particles=16)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        >>> losses = [svi.step() for _ in range(10)]
        >>> len(losses)
        10

    References:
        Li, Turner. Rényi Divergence Variational Inference. arXiv:1602.02311.
        Tucker, Lawson, Gu, Maddison. Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives.
        arXiv:1810.04152.
        Geffner, Domke. On the Difficulty of Unbiased Alpha Divergence Minimization. arXiv:2010.09541.
    """

    def __init__(
        self,
        alpha: float,
        num_particles: int = 8,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        strict_enumeration_warning: bool = True,
        retain_graph: bool | None = None,
    ) -> None:
        if not math.isfinite(alpha):
            raise ValueError(f"AlphaDivergence: expected a finite alpha, got {alpha}")
        super().__init__(
            num_particles, max_plate_nesting, vectorize_particles, strict_enumeration_warning, retain_graph
        )
        self.alpha = float(alpha)
