"""The distribution of a guide's latent vector, with the path gradient."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Size, Tensor, nn

from pyro_flows.core.chain import Chain
from pyro_flows.distributions import Flow, FlowDistribution
from pyro_flows.transforms import FixedSpline, Preconditioner

__all__ = [
    "PathPosterior",
    "Steady",
    "affine_of",
    "frozen",
    "preconditioner_of",
    "slope_of",
    "spline_of",
    "with_spline",
    "with_spline_of",
]

PATIENCE = 20  # calls without a finite gradient before a warning


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Holds the module's parameters constant."""
    modules: list[Any] = list(module.modules())
    held = [(m._parameters, name, p) for m in modules for name, p in m._parameters.items() if p is not None]
    for parameters, name, parameter in held:
        parameters[name] = parameter.detach()
    try:
        yield
    finally:
        for parameters, name, parameter in held:
            parameters[name] = parameter


def slope_of(flow: Flow, z: Tensor) -> Tensor:
    """Returns the gradient of log q at points ``(S, D)``, with fixed parameters."""
    with torch.enable_grad(), frozen(flow.chain):
        z = z.detach().requires_grad_()
        value = flow.score(z)
    # Sums, because gradients given to grad() make torch import its compiler.
    return torch.autograd.grad(value.sum(), z)[0]


def preconditioner_of(flow: Flow) -> Preconditioner:
    """Returns the affine part of a guide's flow."""
    chain: Any = flow.chain
    return chain[-1] if spline_of(flow) is None else chain[-2]


def spline_of(flow: Flow) -> FixedSpline | None:
    """Returns the spline at the data end of a guide's flow, if there is one."""
    chain: Any = flow.chain
    return chain[-1] if isinstance(chain[-1], FixedSpline) else None


def with_spline(flow: Flow, spline: FixedSpline | None) -> Flow:
    """Returns a guide's flow with this spline in place of its own, or with none."""
    chain: Any = flow.chain
    parts = list(chain) if spline_of(flow) is None else list(chain)[:-1]
    return Flow(Chain(parts if spline is None else [*parts, spline]), flow.base).train(flow.training)


def with_spline_of(state: Mapping[str, Tensor], place: str, flow: Flow) -> Flow:
    """Returns a guide's flow with the spline, or without one, of another in whose state the chain's parts begin so."""
    bare: Any = with_spline(flow, None)
    known = [state.get(f"{place}{len(list(bare.chain))}.{name}") for name in ("dims", "knots")]
    if not isinstance(known[0], Tensor) or not isinstance(known[1], Tensor):
        return with_spline(flow, None)
    device = preconditioner_of(flow).loc.device
    return with_spline(flow, FixedSpline(flow.event_shape[0], known[0], known[1]).to(device))


def affine_of(flow: Flow) -> Flow:
    """Returns a guide's flow without its learned bends, with which it shares its affine part."""
    spline, affine = spline_of(flow), preconditioner_of(flow)
    return Flow(affine if spline is None else Chain([affine, spline]), flow.base)


class Steady:
    """A hook on a guide's draws that limits the influence of single draws on an optimizer.

    Drops gradients that are not finite, and limits the others to ``at_most`` times their running mean norm. A far draw
    would otherwise fill Adam's second moment for a thousand steps.
    """

    def __init__(self, at_most: float = 10.0) -> None:
        self.at_most = at_most
        self.usual: float | None = None
        self.draws = 0
        self.failed = 0  # consecutive calls without a finite gradient

    def watch(self, flow: nn.Module, draw: Tensor) -> None:
        """Hooks itself on a draw of the flow.

        Raises:
            ValueError: if parameters of the flow are not finite, or its scales have exploded.
        """
        if not draw.isfinite().all():
            broken = [name for name, parameter in flow.named_parameters() if not parameter.isfinite().all()]
            if broken or draw.isnan().any():
                what = f"draw {self.draws + 1} of this guide in training is NaN: its scales have exploded"
                if broken:
                    what = (
                        f"{len(broken)} parameters of this guide are not finite, {broken[0]!r} first. They were at "
                        f"draw {self.draws} in training, so the optimizer step after it broke them"
                    )
                raise ValueError(
                    f"AutoFlow: {what}. Train a new guide with a smaller step size, with pyro.optim.ClippedAdam, or "
                    "with more particles, Trace_ELBO(num_particles=16, vectorize_particles=True); or call fit_guide, "
                    "which leaves out draws that fail"
                )
        self.draws += 1
        draw.register_hook(self)

    def __call__(self, grad: Tensor) -> Tensor:
        """Returns the gradient to use for draws of shape ``(*draws, dim)``."""
        # All draws together, because one may rightly dominate a weighted objective.
        norm = grad.norm().item()
        if math.isfinite(norm):
            self.failed = 0
        else:
            grad = self._finite(grad)
            norm = grad.norm().item()
        if not norm > 0:
            return grad
        usual = norm if self.usual is None else self.usual
        most = self.at_most * usual
        self.usual = usual + 0.1 * (min(norm, most) - usual)
        return grad if norm <= most else grad * (most / norm)

    def _finite(self, grad: Tensor) -> Tensor:
        """Zeros in place of the draws whose gradient is not finite."""
        fine = grad.isfinite().all(-1, keepdim=True)
        self.failed = 0 if fine.any() else self.failed + 1
        if self.failed == PATIENCE:
            warnings.warn(
                f"AutoFlow: none of the last {PATIENCE} draws has a finite gradient, so nothing is learned: the "
                "density of the model is not finite there. Look for log(0) and overflow in it, use float64, or train a "
                "new guide with a smaller step size",
                RuntimeWarning,
                stacklevel=3,
            )
        return torch.where(fine, grad, 0.0)


class PathPosterior(FlowDistribution):
    r"""A flow as the distribution of a guide's latent vector, with the path gradient ("sticking the landing").

    The gradient of :math:`E_q[\log q_\phi(z_\phi)]` with respect to :math:`\phi` goes only through the draw
    :math:`z_\phi`, because the score has mean zero. The last draw's log-density therefore holds the parameters fixed.
    Only ``score_parts(...).log_prob``, for importance-weighted bounds such as Pyro's ``RenyiELBO``, keeps the whole
    derivative; the path gradient would bias these.

    Args:
        base_distribution: the base of the flow.
        transforms: the flow's chain, alone in a list.
        linear: whether the bound is linear in this log-density, as ``TraceEnum_ELBO`` is, so that
            ``score_parts(...).log_prob`` can use the path gradient too.

    Example:
        >>> base, chain = dist.Normal(torch.zeros(2), 1.0).to_event(1), pf.iaf(2)
        >>> posterior = pf.infer.guides.PathPosterior(base, [chain])
        >>> z = posterior.rsample((5,))
        >>> posterior.log_prob(z).shape
        torch.Size([5])

    References:
        Sticking the Landing (Roeder et al., 2017), arXiv:1703.09194.
        Doubly Reparameterized Gradient Estimators (Tucker et al., 2019), arXiv:1810.04152.
    """

    _drawn: Tensor | None = None

    def __init__(self, *args: Any, linear: bool = False, **kwargs: Any) -> None:
        self.linear = linear
        super().__init__(*args, **kwargs)

    def rsample(self, sample_shape: int | Size | tuple[int, ...] = ()) -> Tensor:
        """Makes reparameterized draws, which this distribution recognizes."""
        self._drawn = super().rsample(sample_shape)
        return self._drawn

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log-density in nats, with the path gradient if ``value`` is the last draw."""
        if value is not self._drawn or not value.requires_grad:
            return super().log_prob(value)
        (transform,) = self.transforms
        with frozen(transform):
            x, ladj = transform.inverse_and_ladj(value)
        return self.base_dist.log_prob(x) + ladj

    def score_parts(self, value: Tensor) -> ScoreParts:
        """Returns the whole log-density, no score, and the entropy term with the path gradient."""
        none: Any = 0  # Pyro's sign for no score
        if self.linear:
            log_prob = self.log_prob(value)
            return ScoreParts(log_prob, none, log_prob)
        whole = FlowDistribution.log_prob(self, value)
        return ScoreParts(whole, none, self.log_prob(value) if value is self._drawn else whole)

    def expand(self, batch_shape: Size | tuple[int, ...], _instance: object = None) -> dist.Distribution:
        new = self._get_checked_instance(PathPosterior, _instance)
        new.linear = self.linear
        return super().expand(batch_shape, new)
