"""``Flow``: the module that owns a base and a chain."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions.constraints as pyro_constraints
import torch
from pyro.distributions import TransformedDistribution
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Independent, Transform

from pyro_flows.core.chain import Chain, leaves
from pyro_flows.core.checks import (
    check_context,
    check_tensor,
    first_floating,
    joint_shape,
    refuse_as_site,
    sample_size,
    without_leading_ones,
)
from pyro_flows.core.modes import plain_eager
from pyro_flows.core.recipes import remembered
from pyro_flows.core.transform import REAL, FlowTransform
from pyro_flows.distributions.bases import DiagonalNormal, FixedBase, UniformCircle
from pyro_flows.distributions.integers import IntegerLogistics
from pyro_flows.distributions.queries.answers import Answering, Weighted
from pyro_flows.distributions.queries.chain import ChainPiece
from pyro_flows.distributions.queries.line import Line, mean_of_affine
from pyro_flows.distributions.sphere import UniformSphere
from pyro_flows.transforms.integers import IntegerCoupling, IntegerSplit, levels_of

__all__ = ["Flow", "FlowDistribution"]


class FlowDistribution(Answering, TransformedDistribution):
    """A ``TransformedDistribution`` that :class:`Flow` makes and that shares its parameters; it scores in one pass.

    Example:
        >>> density = pf.Flow(pf.maf(3, context_dim=2))(torch.randn(5, 2))
        >>> density.batch_shape, density.event_shape
        (torch.Size([5]), torch.Size([3]))
        >>> density.log_prob(density.sample()).shape
        torch.Size([5])
    """

    def _pieces(self, dims: Sequence[int]) -> Weighted:
        if dims and self.transforms[0].discrete:
            raise NotImplementedError(
                "marginal and conditional: the couplings of an integer flow mix its numbers, so that neither is known; "
                "count among draws, flow.sample((100_000,))"
            )
        if dims and self.transforms[0].codomain is pyro_constraints.sphere:
            raise NotImplementedError(
                "marginal and conditional: on a sphere a number follows from the others up to its sign, so that they "
                "have no joint density; count among draws, flow.sample((100_000,))"
            )
        return [(0.0, ChainPiece(self.base_dist, self.transforms[0]))]

    def _lines(self) -> list[Line]:
        return [Line(self.base_dist, self.transforms[0])]

    @property
    def mean(self) -> Tensor:
        """The mean, shape ``(*batch, *event_shape)``: of affine flows in closed form, else of events of one number."""
        known = mean_of_affine(self.base_dist, self.transforms[0])
        return Answering.mean.fget(self) if known is None else known  # type: ignore[attr-defined]  # a property

    def sample(self, sample_shape: int | Size | tuple[int, ...] = ()) -> Tensor:
        """Draws without gradient, shape ``(*sample_shape, *batch, *event)``."""
        return super().sample(sample_size(sample_shape))

    def rsample(self, sample_shape: int | Size | tuple[int, ...] = ()) -> Tensor:
        """Reparameterized draws, of the same shape."""
        return super().rsample(sample_size(sample_shape))

    def __repr__(self) -> str:
        names = [type(leaf).__name__ for leaf in leaves(self.transforms[0])]
        told = ", ".join(f"{len(list(same))} {name}" for name, same in itertools.groupby(names))
        base = self.base_dist
        while isinstance(base, Independent):
            base = base.base_dist
        return (
            f"{type(self).__name__}({type(base).__name__.strip('_')} through {told}, "
            f"batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)})"
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, shape ``(*sample, *batch)``; one pass."""
        check_tensor("Flow", "a tensor", value)
        (transform,) = self.transforms
        if self._validate_args and _can_check(value) and not transform.discrete:  # which checks its own
            self._validate_sample(value)
        return self.score(value)

    def score(self, value: Tensor) -> Tensor:
        """``log_prob`` of a value in the support."""
        (transform,) = self.transforms
        x, ladj = transform.inverse_and_memo(value)
        return _density(self.base_dist, x, ladj, transform)

    def rsample_and_log_prob(self, sample_shape: int | Size | tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Reparameterized samples and their log-densities; one pass."""
        return self.from_base(self.base_dist.rsample(sample_size(sample_shape)))

    def from_base(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps base-side values to data, with log-densities; one pass."""
        (transform,) = self.transforms
        y, ladj = transform.forward_and_ladj(x)
        return y, _density(self.base_dist, x, -ladj, transform)


def _can_check(value: Tensor) -> bool:
    # Torch's constraints cannot check an empty batch.
    return value.numel() > 0 and plain_eager()


def _density(base: Distribution | DiagonalNormal, x: Tensor, ladj: Tensor, transform: FlowTransform) -> Tensor:
    if x.numel():
        return base.log_prob(x) + ladj
    # A function of all parameters, for DistributedDataParallel without rows.
    return ladj + x.sum(tuple(range(-len(transform.event_shape), 0)))


@remembered
class Flow(nn.Module):
    r"""A normalizing flow as a module: a base and a chain.

    The density is :math:`\log p(y) = \log b(x) - \log|\det \partial y / \partial x|` at :math:`x = f^{-1}(y)`.  A call
    returns a Pyro distribution that shares the parameters of both: ``pyro.sample("x", flow())``, or ``flow(context)``
    if the chain takes a context, whose batch shape is then the distribution's.

    Args:
        chain: a flow transform; several are put in a :class:`~pyro_flows.core.chain.Chain`.
        base: ``None`` for a standard normal, uniform for angles (see :func:`~pyro_flows.flows.ncsf`) and on the sphere
            (see :func:`~pyro_flows.flows.sphere`); a fixed distribution, whose tensors move with the module; or an
            ``nn.Module`` that returns a distribution when called, and whose parameters become the flow's.

    Raises:
        ValueError: if the base's event shape is not the chain's, a fixed base requires a gradient, a chain of angles
            has a base that is no density of angles, or a chain on the sphere one that is not on the sphere.

    Example:
        >>> flow = pf.Flow(pf.nsf(3))
        >>> x = flow.sample((5,))
        >>> flow.log_prob(x).shape
        torch.Size([5])
        >>> with pyro.plate("rows", 5):
        ...     x = pyro.sample("x", flow())
    """

    def __init__(self, chain: FlowTransform | list[Transform], base: Distribution | nn.Module | None = None) -> None:
        super().__init__()
        self.chain = chain if isinstance(chain, FlowTransform) else Chain(chain)
        event, periodic = self.chain.event_shape, self.chain.periodic
        if base is None:
            if self.chain.discrete:
                base = _integers_for(self.chain)
            elif self.chain.domain is pyro_constraints.sphere:
                base = UniformSphere(event[0])
            else:
                base = DiagonalNormal(event) if periodic is None else UniformCircle(event, periodic)
            kin = first_floating(self.chain)
            if kin is not None:
                base.to(kin.device, kin.dtype)
        elif isinstance(base, Distribution):
            base = FixedBase(base)
        elif not isinstance(base, nn.Module):
            raise TypeError(f"Flow: expected base to be a distribution or a module, got {type(base).__name__}")
        self.base = base
        self._base_context = getattr(base, "context_dim", 0) if self.chain.discrete else 0
        if self._base_context not in (0, self.chain.context_dim):
            raise ValueError(
                f"Flow: expected a base with the chain's context_dim={self.chain.context_dim} or none, got "
                f"{self._base_context}"
            )
        kin = first_floating(self.base)
        made = self._held(kin.new_zeros(self._base_context) if self._base_context and kin is not None else None)
        shape = made.batch_shape + made.event_shape
        if made.event_shape != event:
            hint = ": call .to_event() on it" if shape == event else ""
            raise ValueError(
                f"Flow: expected a base with event shape {tuple(event)}, got batch shape {tuple(made.batch_shape)} and "
                f"event shape {tuple(made.event_shape)}{hint}"
            )

        if periodic is not None:
            _refuse_line(made, periodic)
        if self.chain.discrete and not (made.support is not None and made.support.is_discrete):
            raise ValueError(
                f"Flow: this chain maps whole numbers, but the base has the support {made.support}; leave base out, or "
                "take IntegerLogistics or another distribution over whole numbers"
            )
        if self.chain.domain is pyro_constraints.sphere:
            _refuse_space(made)

    def arguments(self) -> tuple[tuple[object, ...], dict[str, object]]:
        """The constructor's arguments."""
        return (self.chain, self.base), {}

    @property
    def event_shape(self) -> Size:
        """Shape of one draw."""
        return self.chain.data_shape

    @property
    def context_dim(self) -> int:
        """Size of the context, 0 for none."""
        return self.chain.context_dim

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "forward" in vars(cls):
            raise TypeError(
                f"{cls.__name__} defines forward, which scores and draws do not call: define inner_context to change "
                "the context, or write a module of its own that holds a Flow"
            )

    def inner_context(self, context: Tensor | None) -> Tensor | None:
        """The chain's context; every score and draw asks."""
        return context

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """The distribution, at a context of shape ``(*batch, context_dim)`` if the chain takes one."""
        refuse_as_site(self)
        check_context(self, context)
        context = self.inner_context(context)
        return FlowDistribution(self._held(context), [self.chain if context is None else self.chain.condition(context)])

    condition = forward

    def log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats, of the shape to which value and context broadcast.

        Example:
            >>> flow = pf.Flow(pf.realnvp(2))
            >>> flow.log_prob(torch.randn(4, 5, 2)).shape
            torch.Size([4, 5])
        """
        check_tensor("Flow", "a tensor", value)
        if Distribution._validate_args and _can_check(value):
            _refuse_outside(self.chain, value)
        return self.score(value, context)

    def score(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """``log_prob`` without checking the support."""
        context = self._admitted(context)
        x, ladj = self.chain.inverse_and_memo(value, context)
        return _density(self._scorer(context), x, ladj, self.chain)

    def sample(self, sample_shape: int | Size | tuple[int, ...] = (), context: Tensor | None = None) -> Tensor:
        """Draws without gradient, shape ``(*sample_shape, *context_batch, *event_shape)``.

        Example:
            >>> flow = pf.Flow(pf.realnvp(2, context_dim=3))
            >>> flow.sample((4,), torch.randn(5, 3)).shape  # four draws for each context
            torch.Size([4, 5, 2])
        """
        context = self._admitted(context)
        with torch.no_grad():
            return self.chain(self._draw(self._scorer(context), sample_size(sample_shape), context, "sample"), context)

    def rsample(self, sample_shape: int | Size | tuple[int, ...] = (), context: Tensor | None = None) -> Tensor:
        """Reparameterized draws.

        Example:
            >>> flow = pf.Flow(pf.iaf(2))
            >>> flow.rsample((100,)).square().mean().backward()
            >>> any(weight.grad is not None for weight in flow.parameters())
            True
        """
        context = self._admitted(context)
        return self.chain(self._draw(self._scorer(context), sample_size(sample_shape), context), context)

    def rsample_and_log_prob(
        self, sample_shape: int | Size | tuple[int, ...] = (), context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Reparameterized draws and their log-densities; one pass.

        Example:
            >>> flow = pf.Flow(pf.iaf(2))
            >>> z, log_q = flow.rsample_and_log_prob((100,))
            >>> torch.allclose(log_q, flow.log_prob(z), atol=1e-4)
            True
        """
        context = self._admitted(context)
        base = self._scorer(context)
        x = self._draw(base, sample_size(sample_shape), context)
        y, ladj = self.chain.forward_and_ladj(x, context)
        return y, _density(base, x, -ladj, self.chain)

    def _admitted(self, context: Tensor | None) -> Tensor | None:
        check_context(self, context)
        context = self.inner_context(context)
        return None if context is None else without_leading_ones(context)

    def _held(self, context: Tensor | None) -> Distribution:
        """The base's distribution, at the context if it takes one."""
        return self.base(context) if self._base_context else self.base()

    def _scorer(self, context: Tensor | None) -> Distribution | DiagonalNormal:
        """The base's distribution, or ``DiagonalNormal`` itself, which is faster."""
        return self.base if type(self.base) is DiagonalNormal else self._held(context)

    def _draw(
        self, base: Distribution | DiagonalNormal, sample_shape: Size, context: Tensor | None, kind: str = "rsample"
    ) -> Tensor:
        batch = self.chain.batch_shape
        if context is not None:
            batch = joint_shape(batch, context.shape[:-1])
        if isinstance(base, DiagonalNormal):
            return base.rsample(sample_shape + batch)
        batch = joint_shape(base.batch_shape, batch)
        return getattr(base if batch == base.batch_shape else base.expand(batch), kind)(sample_shape)


def _refuse_outside(chain: FlowTransform, value: Tensor) -> None:
    """Refuses values outside the support, including NaN."""
    if chain.discrete:
        return  # the chain checks whole numbers itself
    support, shape = chain.codomain, chain.data_shape
    if support is REAL[len(shape)]:  # the usual case: a sum shows NaN, or infinities of both signs
        total = value.sum().item()
        if total == total or (value == value).all():
            return
    elif value.shape[value.dim() - len(shape) :] != shape or support.check(value).all():
        return  # the chain refuses a wrong shape
    raise ValueError(
        f"Flow: expected a value within the support ({support}), got NaN or numbers beyond it in\n{value}\nCheck the "
        "data, or end the chain in a transform onto the set that they lie in"
    )


def _integers_for(chain: FlowTransform) -> IntegerLogistics:
    """The default base of an integer flow: its levels, context and splits, and networks as large as its couplings'."""
    nets = [part.net for part in chain.modules() if isinstance(part, IntegerCoupling)]
    return IntegerLogistics(
        chain.event_shape,
        levels=levels_of(chain),
        context_dim=chain.context_dim,
        num_splits=sum(isinstance(part, IntegerSplit) for part in chain.modules()),
        hidden_dims=nets[0].hidden_dims,
        kernel_size=nets[0].kernel_size,
    )


@torch.no_grad()
def _refuse_line(base: Distribution, angles: Tensor) -> None:
    """Refuses a base whose density differs after a turn."""
    if angles.is_meta:
        return
    here = torch.full(angles.shape, 0.5, device=angles.device)
    try:
        change = base.log_prob(here + 2 * math.pi * angles) - base.log_prob(here)
    except ValueError:  # outside its support
        return
    if (change.isfinite() & (change.abs() > 1e-3)).any():
        raise ValueError(
            "Flow: this chain takes angles modulo 2 pi, but the base gives another density at x + 2 pi than at x, so "
            "it would not integrate to 1 over a turn; leave base out, or take UniformCircle or Pyro's VonMises"
        )


def _refuse_space(base: Distribution) -> None:
    """Refuses a base whose support is not the sphere."""
    first = torch.eye(base.event_shape[0])[0]
    try:
        support: Any = base.support
        fits = support.check(first).all() and not support.check(2 * first).any()
    except (NotImplementedError, ValueError):  # an unknown or dependent support
        return
    if not fits:
        raise ValueError(
            f"Flow: this chain moves unit vectors, but the base has the support {support}; leave base out, or take a "
            "distribution on the sphere such as VonMisesFisher or Pyro's ProjectedNormal"
        )
