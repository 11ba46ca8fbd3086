"""Distributions on the unit sphere: uniform, and von Mises-Fisher."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache

import pyro.distributions as dist
import pyro.distributions.constraints as pyro_constraints
import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_flows.core.checks import integer, sample_size
from pyro_flows.core.recipes import remembered

__all__ = ["UniformSphere", "VonMisesFisher"]

_ORDER = 40.0  # from which the expansion for large orders is exact to rounding
_TERMS = 9


@cache
def _expansion(order: float) -> list[float]:
    r"""Coefficients of :math:`\sum_k u_k(t) / N^k` in powers of t, by the recurrence of Debye's polynomials."""
    term = [1.0]
    total = [0.0] * (3 * _TERMS + 1)
    for k in range(_TERMS + 1):
        for power, coefficient in enumerate(term):
            total[power] += coefficient / order**k
        following = [0.0] * (len(term) + 3)
        for j, c in enumerate(term):
            following[j + 1] += c * (j / 2 + 1 / (8 * (j + 1)))
            following[j + 3] -= c * (j / 2 + 5 / (8 * (j + 3)))
        term = following
    return total


def _large(order: float, kappa: Tensor) -> Tensor:
    r""":math:`\log(e^{-\kappa} I_N(\kappa) / \kappa^N)` for a large order :math:`N`."""
    s = kappa / order
    root = torch.sqrt(1 + s * s)
    t, series = 1 / root, torch.zeros_like(s)
    for coefficient in reversed(_expansion(order)):
        series = series * t + coefficient
    power = order * (1 / (root + s) - math.log(order) - torch.log1p(root))
    return power - 0.5 * math.log(2 * math.pi * order) - 0.5 * root.log() + series.log()


def log_bessel(order: float, kappa: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns :math:`\log(e^{-\kappa} I_\nu(\kappa) / \kappa^\nu)` and :math:`I_{\nu+1}(\kappa) / I_\nu(\kappa)`.

    For :math:`\nu \ge 0` and :math:`\kappa \ge 0`, in float64: Debye's expansion at a large order, and the recurrence
    of the ratios :math:`I_{j+1} / (\kappa I_j)` down from it, whose terms are positive.
    """
    kappa = kappa.double()
    steps = max(0, math.ceil(_ORDER - order))
    top = order + steps
    value = _large(top, kappa)
    ratio = (_large(top + 1, kappa) - value).exp()
    for k in range(steps, 0, -1):
        ratio = 1 / (kappa * kappa * ratio + 2 * (order + k))
        value = value - ratio.log()
    return value, kappa * ratio


class VonMisesFisher(dist.TorchDistribution):
    r"""Von Mises-Fisher on the unit sphere :math:`S^{n-1}`, :math:`p(x) \propto e^{\kappa \mu^\top x}`.

    The density is with respect to the surface measure, as of Pyro's ``VonMises3D`` and ``ProjectedNormal``, with the
    normalizer :math:`\kappa^{\nu} (2 \pi)^{-n/2} / I_\nu(\kappa)`, :math:`\nu = n / 2 - 1`, computed in float64 for any
    :math:`n \ge 2` and :math:`\kappa \ge 0` (0 is uniform).  Draws are exact: for :math:`n = 3` by inversion,
    reparameterized in both parameters, otherwise by rejection (some 1.5 proposals a draw), reparameterized in
    :math:`\mu` alone.

    Args:
        loc: the mean direction :math:`\mu`, shape ``(*batch, n)``, of length 1.
        concentration: :math:`\kappa`, shape ``batch``; the two batches broadcast.

    Raises:
        ValueError: for fewer than two coordinates, a direction of another length or a negative concentration.

    Example:
        >>> north = torch.tensor([0.0, 0.0, 1.0])
        >>> cap = pf.distributions.VonMisesFisher(north, 50.0)
        >>> flow = pf.Flow(pf.sphere(3), cap)
        >>> flow.sample((5,)).shape
        torch.Size([5, 3])

    References:
        Simulation of the von Mises Fisher distribution (Wood, 1994), doi:10.1080/03610919408813161.
    """

    arg_constraints = {"loc": pyro_constraints.sphere, "concentration": constraints.nonnegative}  # noqa: RUF012
    support = pyro_constraints.sphere
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor | float, validate_args: bool | None = None) -> None:
        if loc.dim() < 1 or loc.shape[-1] < 2:
            raise ValueError(
                f"VonMisesFisher: expected loc of shape (*batch, n) with n of 2 or more, got {tuple(loc.shape)}"
            )
        concentration = torch.as_tensor(concentration, dtype=loc.dtype, device=loc.device)
        batch = torch.broadcast_shapes(loc.shape[:-1], concentration.shape)
        self.loc, self.concentration = loc.expand(*batch, -1), concentration.expand(batch)
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Iterable[int], _instance: Distribution | None = None) -> VonMisesFisher:
        new = self._get_checked_instance(VonMisesFisher, _instance)
        shape = Size(batch_shape)
        new.loc, new.concentration = self.loc.expand(*shape, -1), self.concentration.expand(shape)
        super(VonMisesFisher, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def _order(self) -> float:
        return self.event_shape[0] / 2 - 1

    @property
    def mean(self) -> Tensor:
        r"""The mean vector :math:`\mu I_{\nu+1}(\kappa) / I_\nu(\kappa)`, inside the sphere."""
        length = log_bessel(self._order, self.concentration)[1]
        return self.loc * length.to(self.loc.dtype).unsqueeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        size = self.event_shape[0]
        normalizer = log_bessel(self._order, self.concentration)[0] + 0.5 * size * math.log(2 * math.pi)
        # Free of the cancellation in 1 - cos near the mean direction.
        apart = 0.5 * (value - self.loc).square().sum(-1)
        return -self.concentration * apart - normalizer.to(self.loc.dtype)

    def rsample(self, sample_shape: int | Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        shape = self._extended_shape(sample_size(sample_shape))
        if self.event_shape[0] != 3 and self.concentration.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                "VonMisesFisher: draws have a gradient with respect to the concentration on the 2-sphere (n = 3) "
                f"alone, got n = {self.event_shape[0]}; use .sample(), or a concentration without a gradient"
            )
        loc, kappa = self.loc.expand(shape), self.concentration.expand(shape[:-1])
        gap = _gap_by_inversion(kappa) if self.event_shape[0] == 3 else _gap_by_rejection(kappa, self.event_shape[0])
        noise = torch.randn(shape, dtype=loc.dtype, device=loc.device)
        side = noise - (noise * loc).sum(-1, keepdim=True) * loc
        side = side / torch.linalg.vector_norm(side, dim=-1, keepdim=True)
        gap = gap.unsqueeze(-1)
        x = (1 - gap) * loc + (gap * (2 - gap)).sqrt() * side
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)

    def sample(self, sample_shape: int | Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)


def _gap_by_inversion(kappa: Tensor) -> Tensor:
    """Draws of 1 - cos of the angle to the mean direction, on the 2-sphere."""
    kappa = kappa.clamp(min=1e-6)  # uniform to rounding
    drawn = torch.rand_like(kappa).clamp(min=torch.finfo(kappa.dtype).tiny)
    return -torch.log1p(drawn * torch.expm1(-2 * kappa)) / kappa


@torch.no_grad()
def _gap_by_rejection(kappa: Tensor, size: int) -> Tensor:
    """The same on any sphere, by Wood's envelope, written in 1 - cos so that nothing cancels."""
    flat = kappa.detach().reshape(-1).double()
    if not torch.isfinite(flat).all():
        return torch.full_like(kappa, math.nan)
    free = size - 1
    b = free / (2 * flat + torch.sqrt(4 * flat * flat + free * free))
    out, left = torch.empty_like(flat), torch.arange(len(flat), device=flat.device)
    beta = torch.distributions.Beta(flat.new_tensor(free / 2), flat.new_tensor(free / 2), validate_args=False)
    while len(left):
        here, at = b[left], flat[left]
        z = beta.sample((len(left),))
        gap = 2 * here * z / (1 - (1 - here) * z)
        start = 2 * here / (1 + here)  # of the envelope's mode
        score = at * (start - gap) + free * torch.log((start + (1 - start) * gap) * (1 + here) / 2 / start)
        taken = score >= torch.log(torch.rand_like(score))
        out[left[taken]] = gap[taken]
        left = left[~taken]
    return out.reshape(kappa.shape).to(kappa.dtype).clamp(0.0, 2.0)


class _Uniform(dist.TorchDistribution):
    """Uniform on the sphere with as many coordinates as ``center``."""

    arg_constraints = {}  # noqa: RUF012
    support = pyro_constraints.sphere
    has_rsample = True

    def __init__(self, center: Tensor) -> None:
        self.center = center
        super().__init__(center.shape[:-1], center.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Iterable[int], _instance: Distribution | None = None) -> _Uniform:
        return _Uniform(self.center.expand(*Size(batch_shape), -1))

    def rsample(self, sample_shape: int | Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        noise = self.center.new_empty(self._extended_shape(sample_size(sample_shape))).normal_()
        return noise / torch.linalg.vector_norm(noise, dim=-1, keepdim=True)

    def log_prob(self, value: Tensor) -> Tensor:
        half = self.event_shape[0] / 2
        # Zeros keep the shape, the graph, and NaN.
        return (value * 0 + self.center * 0).sum(-1) + (math.lgamma(half) - math.log(2) - half * math.log(math.pi))


@remembered
class UniformSphere(nn.Module):
    r"""Uniform on the unit sphere, :math:`\log p(x) = \log \Gamma(n/2) - \log 2 - (n/2) \log \pi`.

    Args:
        input_dim: the number :math:`n \ge 2` of coordinates.

    Raises:
        ValueError: if ``input_dim`` is no integer of at least 2.

    Example:
        >>> base = pf.distributions.UniformSphere(3)
        >>> round(base().log_prob(base().sample()).exp().item() * 4 * torch.pi, 3)
        1.0

    References:
        Normalizing Flows on Tori and Spheres (Rezende et al., 2020), arXiv:2002.02428.
    """

    center: Tensor

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        self.event_shape = Size((integer("UniformSphere", "input_dim", input_dim, 2),))
        self.register_buffer("center", torch.zeros(self.event_shape), persistent=False)

    def extra_repr(self) -> str:
        return str(self.event_shape[0])

    def forward(self) -> dist.Distribution:
        """The distribution, event shape ``(input_dim,)``."""
        return _Uniform(self.center)
