"""Base distributions as modules."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_flows.core.checks import event_size, integer
from pyro_flows.core.recipes import remembered
from pyro_flows.core.wrap import map_tensors

__all__ = ["DiagonalNormal", "FixedBase", "GaussianMixture", "StudentT", "UniformCircle"]


def _hold(module: nn.Module, name: str, value: Tensor, learnable: bool) -> None:
    """Sets a parameter, or a buffer outside the ``state_dict``."""
    if learnable:
        setattr(module, name, nn.Parameter(value))
    else:
        module.register_buffer(name, value, persistent=False)


def _told(event_shape: Size) -> str:
    return str(event_shape[0] if len(event_shape) == 1 else tuple(event_shape))


@remembered
class DiagonalNormal(nn.Module):
    r"""Independent normals, :math:`x_i \sim N(\mu_i, e^{2 r_i})`; standard normal at first.

    Args:
        event_shape: an ``input_dim`` or the shape of one event.
        learnable: whether locations and log-scales are parameters (else constant buffers).

    Example:
        >>> flow = pf.Flow(pf.realnvp(3), pf.DiagonalNormal(3, learnable=True))
        >>> flow.sample((5,)).shape
        torch.Size([5, 3])
    """

    loc: Tensor
    log_scale: Tensor

    def __init__(self, event_shape: int | Iterable[int], learnable: bool = False) -> None:
        super().__init__()
        self.event_shape = event_size(event_shape)
        for name in ("loc", "log_scale"):
            _hold(self, name, torch.zeros(self.event_shape), learnable)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, without making the distribution."""
        standard = (value - self.loc) * torch.exp(-self.log_scale)
        each = -0.5 * standard * standard - (self.log_scale + 0.5 * math.log(2 * math.pi))
        return each.sum(tuple(range(-len(self.event_shape), 0)))

    def rsample(self, sample_shape: Size) -> Tensor:
        """Draws, without making the distribution."""
        drawn = self.loc.new_empty(sample_shape + self.event_shape).normal_()
        return self.loc + drawn * self.log_scale.exp()

    def extra_repr(self) -> str:
        return f"{_told(self.event_shape)}, learnable={isinstance(self.loc, nn.Parameter)}"

    def forward(self) -> dist.Distribution:
        """The distribution, event shape ``event_shape``."""
        normal = dist.Normal(self.loc, self.log_scale.exp(), validate_args=False)
        return normal.to_event(len(self.event_shape))


@remembered
class StudentT(nn.Module):
    r"""Independent Student's t, :math:`(x_i - \mu_i) e^{-r_i} \sim t_{\nu_i}`, with power-law tails.

    The degrees of freedom :math:`\nu_i = \nu_{\min} + \log(1 + e^{a_i})` exceed :math:`\nu_{\min}`; the mean needs
    :math:`\nu > 1`, the variance :math:`\nu > 2`.  Draws are reparameterized, also with respect to :math:`\nu`.

    Args:
        event_shape: an ``input_dim`` or the shape of one event.
        df: the initial :math:`\nu`.
        learnable: whether the degrees of freedom are parameters.
        learn_affine: whether :math:`\mu` and :math:`r`, initially 0, are parameters.
        min_df: :math:`\nu_{\min} \ge 0`.

    Raises:
        ValueError: unless ``df > min_df >= 0``.

    Example:
        >>> flow = pf.Flow(pf.nsf(3), pf.StudentT(3, df=4.0))
        >>> [round(df, 3) for df in flow.base.df.tolist()]
        [4.0, 4.0, 4.0]

    References:
        Tails of Lipschitz Triangular Flows (Jaini et al., 2019), arXiv:1907.04481.
    """

    raw_df: Tensor
    loc: Tensor
    log_scale: Tensor

    def __init__(
        self,
        event_shape: int | Iterable[int],
        df: float = 5.0,
        learnable: bool = True,
        *,
        learn_affine: bool = False,
        min_df: float = 1.0,
    ) -> None:
        super().__init__()
        self.event_shape = event_size(event_shape)
        if not 0 <= min_df < df < math.inf:
            raise ValueError(f"StudentT: expected df > min_df >= 0, got df={df} and min_df={min_df}")
        self.min_df = float(min_df)
        above = df - min_df
        raw = above + math.log(-math.expm1(-above))  # the inverse of log(1 + exp(a))
        _hold(self, "raw_df", torch.full(self.event_shape, raw), learnable)
        for name in ("loc", "log_scale"):
            _hold(self, name, torch.zeros(self.event_shape), learn_affine)

    def extra_repr(self) -> str:
        low, high = (float(end) for end in self.df.detach().aminmax()) if not self.raw_df.is_meta else (math.nan,) * 2
        df = f"{low:.3g}" if low == high or low != low else f"{low:.3g} to {high:.3g}"
        learnable = isinstance(self.raw_df, nn.Parameter)
        return f"{_told(self.event_shape)}, df={df}, learnable={learnable}, min_df={self.min_df:g}"

    @property
    def df(self) -> Tensor:
        """Degrees of freedom, shape ``event_shape``."""
        return self.min_df + torch.logaddexp(self.raw_df, torch.zeros_like(self.raw_df))

    def forward(self) -> dist.Distribution:
        """The distribution, event shape ``event_shape``."""
        # The constructor reads df, which waits for the device.
        made = dist.StudentT.__new__(dist.StudentT)
        made.df, made.loc, made.scale = self.df, self.loc, self.log_scale.exp()
        made._chi2 = dist.Chi2(made.df, validate_args=False)
        Distribution.__init__(made, self.event_shape, validate_args=False)
        return made.to_event(len(self.event_shape))


class _Mixture(dist.MixtureSameFamily):
    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        raise NotImplementedError(
            "GaussianMixture: there are no reparameterized draws, because which component a draw comes from is "
            "discrete; use .sample(), fit by log_prob, or take a base such as DiagonalNormal"
        )


@remembered
class GaussianMixture(nn.Module):
    r"""A learned mixture of normals, :math:`\sum_k w_k \, N(\mu_k, S_k S_k^\top)`, for separate modes.

    :math:`w = \mathrm{softmax}(` ``logits`` :math:`)`, and :math:`S_k` is diagonal or lower triangular with the
    diagonal ``exp(log_scale)``.  At first weights are equal, :math:`\mu_k \sim N(0, I/2)` and :math:`S_k S_k^\top =
    I/2`: mean 0 and covariance :math:`I` on average.

    A density costs one evaluation of each component, a draw one draw of each.  Draws are not reparameterized
    (``rsample`` raises an error), so use it to fit densities to data.

    Args:
        input_dim: the number of dimensions.
        num_components: the number of normals.
        full_covariance: whether each has a full covariance.

    Raises:
        ValueError: for sizes that are no positive integers.

    Example:
        >>> base = pf.GaussianMixture(2, num_components=4)
        >>> flow = pf.Flow(pf.maf(2), base)
        >>> flow.log_prob(flow.sample((5,))).shape
        torch.Size([5])

    References:
        Semi-Supervised Learning with Normalizing Flows (Izmailov et al., 2019), arXiv:1912.13025.
    """

    logits: Tensor
    loc: Tensor
    log_scale: Tensor
    lower: Tensor | None

    def __init__(self, input_dim: int, num_components: int = 5, *, full_covariance: bool = False) -> None:
        super().__init__()
        self.event_shape = Size((integer("GaussianMixture", "input_dim", input_dim),))
        integer("GaussianMixture", "num_components", num_components)
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(torch.randn(num_components, input_dim) * math.sqrt(0.5))
        self.log_scale = nn.Parameter(torch.full((num_components, input_dim), math.log(0.5) / 2))
        # Read strictly below the diagonal.
        lower = nn.Parameter(torch.zeros(num_components, input_dim, input_dim)) if full_covariance else None
        self.register_parameter("lower", lower)

    def extra_repr(self) -> str:
        return f"{self.event_shape[0]}, num_components={len(self.logits)}, full_covariance={self.lower is not None}"

    def forward(self) -> dist.Distribution:
        """The distribution, event shape ``(input_dim,)``."""
        scale = self.log_scale.exp()
        if self.lower is None:
            parts = dist.Normal(self.loc, scale, validate_args=False).to_event(1)
        else:
            tril = self.lower.tril(-1) + torch.diag_embed(scale)
            parts = dist.MultivariateNormal(self.loc, scale_tril=tril, validate_args=False)
        weights = dist.Categorical(logits=self.logits, validate_args=False)
        return _Mixture(weights, parts, validate_args=False)


class _Circles(dist.Normal):
    """Uniform where ``angle`` is true, normal elsewhere."""

    support = constraints.real

    def __init__(self, center: Tensor, angle: Tensor) -> None:
        super().__init__(center, torch.ones_like(center), validate_args=False)
        self.angle = angle

    def expand(self, batch_shape: Iterable[int], _instance: Distribution | None = None) -> _Circles:
        shape = Size(batch_shape)
        return _Circles(self.loc.expand(shape), self.angle.expand(shape))

    def entropy(self) -> Tensor:
        return torch.where(self.angle, math.log(2 * math.pi), super().entropy())

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        angles = (
            torch.rand(self._extended_shape(Size(sample_shape)), dtype=self.loc.dtype, device=self.loc.device) - 0.5
        )
        return torch.where(self.angle, angles * (2 * math.pi), super().rsample(sample_shape))

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        # Zeros keep the shape, the graph, and NaN.
        return torch.where(self.angle, value * 0 - math.log(2 * math.pi), super().log_prob(value))


@remembered
class UniformCircle(nn.Module):
    r"""Independent uniform angles in radians, :math:`\log p(x) = -D \log 2\pi`, for flows on circles and tori.

    Draws lie in :math:`[-\pi, \pi)`.  As with Pyro's ``VonMises``, the support is real and the density integrates to 1
    over one turn, so the flow must map circles to circles.  Other dimensions are standard normal.

    Args:
        event_shape: an ``input_dim`` or the shape of one event.
        periodic: boolean, shape ``event_shape``, true for angles; by default everywhere.

    Raises:
        ValueError: if ``periodic`` has another shape.

    Example:
        >>> base = pf.distributions.UniformCircle(2, periodic=[True, False])
        >>> flow = pf.Flow(pf.ncsf(2, periodic=[True, False]), base)
        >>> angles = flow.sample((5,))[:, 0]
        >>> bool((angles.abs() <= torch.pi).all())
        True

    References:
        Normalizing Flows on Tori and Spheres (Rezende et al., 2020), arXiv:2002.02428.
    """

    center: Tensor
    angle: Tensor

    def __init__(self, event_shape: int | Iterable[int], periodic: Tensor | Iterable[bool] | None = None) -> None:
        super().__init__()
        self.event_shape = event_size(event_shape)
        angle = torch.ones(self.event_shape, dtype=torch.bool) if periodic is None else torch.as_tensor(periodic).bool()
        if angle.shape != self.event_shape:
            raise ValueError(
                f"UniformCircle: expected periodic to have shape {tuple(self.event_shape)}, got {tuple(angle.shape)}"
            )
        self.register_buffer("center", torch.zeros(self.event_shape), persistent=False)
        self.register_buffer("angle", angle.clone(), persistent=False)

    def extra_repr(self) -> str:
        count = "" if self.angle.is_meta else f", angles={int(self.angle.sum())}"
        return f"{_told(self.event_shape)}{count}"

    def forward(self) -> dist.Distribution:
        """The distribution, event shape ``event_shape``."""
        return _Circles(self.center, self.angle).to_event(len(self.event_shape))


@remembered
class FixedBase(nn.Module):
    """A given distribution without parameters, which moves with the module.

    Args:
        distribution: any distribution; its tensors follow ``.to()``.

    Raises:
        ValueError: if one of its tensors requires a gradient, which no optimizer would find.

    Example:
        >>> base = pf.distributions.FixedBase(dist.Laplace(torch.zeros(3), 1.0).to_event(1))
        >>> flow = pf.Flow(pf.nsf(3), base)
        >>> flow.sample((5,)).shape
        torch.Size([5, 3])
    """

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        map_tensors(distribution, _refuse_gradient)
        self.distribution = copy.deepcopy(distribution)  # the caller's object stays

    def arguments(self) -> tuple[tuple[object, ...], dict[str, object]]:
        """The constructor's arguments."""
        return (self.distribution,), {}

    def forward(self) -> Distribution:
        """The distribution."""
        return self.distribution

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedBase:
        map_tensors(self.distribution, fn)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return repr(self.distribution)


def _refuse_gradient(tensor: Tensor) -> Tensor:
    if tensor.requires_grad:
        raise ValueError(
            "a base distribution whose tensors learn must be a module: give Flow an nn.Module that owns them as "
            "parameters and returns the distribution when called, e.g. DiagonalNormal(input_dim, learnable=True)"
        )
    return tensor
