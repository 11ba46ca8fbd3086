"""Latents on circles and spheres, as directions of points of the plane or space around them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor
from torch.distributions import Distribution, Transform, constraints

from pyro_flows.distributions import FlowDistribution
from pyro_flows.infer.models.sites import Message

__all__ = ["Angles", "Circles", "LiftedAngles", "LiftedSphere", "circle"]

POWER = 2.0  # of the radius in its density: keeps it from 0, where the direction is undefined


class Angles(constraints.Constraint):
    """Real numbers, of which those that ``mask`` marks are angles in radians, modulo 2 pi.

    Args:
        mask: boolean, of the shape of an event.

    Example:
        >>> from pyro_flows.infer.models.lifted import Angles
        >>> Angles(torch.tensor([True, False])).check(torch.tensor([7.0, -1.0]))
        tensor(True)
    """

    is_discrete = False

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    @property
    def event_dim(self) -> int:  # type: ignore[override]  # the mask says it
        """The number of dimensions of an event."""
        return self.mask.dim()

    def check(self, value: Tensor) -> Tensor:
        """Whether all numbers of each event are finite."""
        return value.isfinite().flatten(value.dim() - self.event_dim).all(-1) if self.event_dim else value.isfinite()

    def __repr__(self) -> str:
        return "Angles()" if self.mask.all() else f"Angles({self.mask.tolist()})"


circle = Angles(torch.tensor(True))


def _log_radius(square: Tensor, size: int) -> Tensor:
    r"""Log-density of a point by its squared radius, with respect to :math:`r^{n-1} dr`: its integral is 1."""
    half = 0.5 * (POWER + size)
    log_integral = math.lgamma(half) + half * math.log(2 / POWER) - math.log(2)
    return 0.5 * POWER * (square.log() - square) - log_integral


class _Lifted(Transform):
    r"""A map from free numbers onto directions; the radius is free, and has a density of its own.

    A point :math:`z = r u` of :math:`R^n` stands for its direction :math:`u`.  With :math:`u \sim p` on the sphere and
    an independent radius, :math:`z` has the density :math:`p(u)\, g(r)`, :math:`g(r) \propto r^a e^{-a r^2 / 2}` and
    :math:`\int_0^\infty g(r)\, r^{n-1} dr = 1`.  So "log_abs_det_jacobian" is :math:`\log g(r)`: with it a density on
    the sphere becomes one of space, with the same integral and directions, smooth but at the origin.  The inverse
    gives :math:`r = 1`, where :math:`g` is largest.
    """

    bijective = True  # onto the sphere, with a right inverse

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other).keys() == vars(self).keys()

    def __hash__(self) -> int:
        return hash(type(self))


class LiftedSphere(_Lifted):
    """Maps points of space to the unit sphere around the origin, which itself goes to the first unit vector.

    Example:
        >>> lifted = pf.infer.models.lifted.LiftedSphere()
        >>> lifted(torch.tensor([3.0, 0.0, 4.0]))
        tensor([0.6000, 0.0000, 0.8000])
    """

    domain = constraints.real_vector
    codomain = dist.constraints.sphere

    def _call(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        first = torch.zeros_like(x)
        first[..., 0] = 1
        zero = norm == 0
        return torch.where(zero, first, x / torch.where(zero, 1.0, norm))

    def _inverse(self, y: Tensor) -> Tensor:
        return y

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the log-density of the radius, shape ``(*batch,)``."""
        return _log_radius(x.square().sum(-1), x.shape[-1])


class LiftedAngles(_Lifted):
    """Maps points of planes to their angles; other numbers stay.

    Free numbers are the event's, flattened, with the cosine of each angle in its place, and then the sines.

    Args:
        mask: boolean, of the shape of an event, true for angles.

    Example:
        >>> lifted = pf.infer.models.lifted.LiftedAngles(torch.tensor([True]))
        >>> angle = lifted(torch.tensor([0.0, 2.0]))  # of the point (0, 2)
        >>> round(angle.item(), 4)
        1.5708
    """

    domain = constraints.real_vector

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask
        self.places = mask.flatten().nonzero()[:, 0]

    @property
    def codomain(self) -> Angles:  # type: ignore[override]  # the mask says it
        """The angles."""
        return Angles(self.mask)

    def _planes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        plain, sin = x.split([self.mask.numel(), len(self.places)], -1)
        places = self.places.to(x.device)
        return plain, plain.index_select(-1, places), sin, places

    def _call(self, x: Tensor) -> Tensor:
        plain, cos, sin, places = self._planes(x)
        return plain.index_copy(-1, places, torch.atan2(sin, cos)).reshape(x.shape[:-1] + self.mask.shape)

    def _inverse(self, y: Tensor) -> Tensor:
        flat = y.reshape((*y.shape[: y.dim() - self.mask.dim()], self.mask.numel()))
        angles = flat.index_select(-1, places := self.places.to(y.device))
        return torch.cat((flat.index_copy(-1, places, angles.cos()), angles.sin()), -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the sum of the radii's log-densities, shape ``(*batch,)``."""
        _, cos, sin, _ = self._planes(x)
        return _log_radius(cos * cos + sin * sin, 2).sum(-1)

    def forward_shape(self, shape: Size) -> Size:
        """The shape of the angles."""
        return Size(shape[:-1]) + self.mask.shape

    def inverse_shape(self, shape: Size) -> Size:
        """The shape of the free numbers."""
        return Size((*shape[: len(shape) - self.mask.dim()], self.mask.numel() + len(self.places)))


class _OnAngles(FlowDistribution):
    """A flow of angles that says so."""

    @property
    def support(self) -> Angles:
        transform: Any = self.transforms[0]
        return Angles(transform.turned(transform.periodic).cpu())


def on_circles(fn: Any) -> Any:
    """The same distribution with :class:`Angles` as support, if it is one of angles."""
    if isinstance(fn, FlowDistribution):
        angular: Any = fn.transforms[0]
        if angular.periodic is None:
            return fn
        fn = copy.copy(fn)
        fn.__class__ = _OnAngles
        return fn
    if isinstance(fn, dist.VonMises | dist.SineBivariateVonMises | dist.SineSkewed):
        fn = copy.copy(fn)
        fn.support = constraints.independent(circle, 1) if fn.event_dim else circle
        return fn
    name = "_component_distribution" if isinstance(fn, dist.MixtureSameFamily) else "base_dist"
    base = getattr(fn, name, None)
    inner = on_circles(base) if isinstance(base, Distribution) else base
    if inner is base or isinstance(fn, dist.TransformedDistribution):
        return fn
    fn = copy.copy(fn)
    setattr(fn, name, inner)
    return fn


class Circles(Messenger):
    """A handler that puts the latent angles of a model on circles.

    Pyro's ``VonMises``, ``SineBivariateVonMises`` and ``SineSkewed``, and flows of angles, have all real numbers as
    support, over which their densities repeat.  Under this handler their support is :class:`Angles`, whose
    ``biject_to`` is :class:`LiftedAngles`.  :class:`~pyro_flows.infer.AutoFlow` applies it by itself; NUTS, NeuTra and
    Pyro's autoguides need ``Circles()(model)``.

    Example:
        >>> def model():
        ...     pyro.sample("angle", dist.VonMises(torch.tensor(3.0), 10.0))
        >>> handled = pf.infer.Circles()(model)
        >>> pyro.poutine.trace(handled).get_trace().nodes["angle"]["fn"].support
        Angles()
    """

    def _pyro_sample(self, msg: Message) -> None:
        if not msg["is_observed"]:
            msg["fn"] = on_circles(msg["fn"])
