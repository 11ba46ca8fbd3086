"""The units of data: standardized flows, and the place of the standardization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Size, Tensor, nn
from torch.distributions import AffineTransform, ComposeTransform, Distribution, Transform, constraints
from torch.distributions.constraints import Constraint

from pyro_flows.core.chain import Chain, leaves
from pyro_flows.core.checks import check_context, first_floating, refuse_as_site
from pyro_flows.core.recipes import remembered
from pyro_flows.core.transform import FlowTransform
from pyro_flows.core.wrap import Wrap, _bare, _joined, image
from pyro_flows.distributions import DiagonalNormal, Ensemble, Flow, GaussianMixture, StudentT
from pyro_flows.distributions.made import AutoregressiveModel, Head
from pyro_flows.distributions.scaled import ScaledDistribution
from pyro_flows.infer.density.columns import at_bounds, is_free
from pyro_flows.transforms import Bounds, Coloring, Standardization

__all__ = [
    "Density",
    "StandardizedFlow",
    "Units",
    "coloring_of",
    "ends_of",
    "head_of",
    "in_units",
    "is_density",
    "is_plain_flow",
    "over_time",
    "pull_back",
    "pulled_back",
    "split_chain",
    "standardized",
]

Units = dict[str, Tensor | None]
"""``loc``, ``scale``, ``context_loc`` and ``context_scale`` in float64, ``None`` for what is not standardized."""

_LARGEST = 1024  # numbers of an event with a full covariance


class Density(nn.Module):
    """A module with a density, such as a MADE, for annotations; no module needs to inherit from it."""

    event_shape: Size
    context_dim: int
    log_prob: Callable[..., Tensor]
    sample: Callable[..., Tensor]


def is_density(module: object) -> TypeGuard[Density]:
    """Tells whether this is a module with ``log_prob``."""
    return isinstance(module, nn.Module) and callable(getattr(module, "log_prob", None))


@remembered
class StandardizedFlow(Flow):
    """A conditional flow that standardizes contexts inside, made by :func:`standardized`.

    Contexts, less ``context_loc``, are divided by ``context_scale``; both have shape ``(context_dim,)`` and are in the
    ``state_dict``.

    Example:
        >>> data, context = torch.randn(100, 2), 5 + torch.randn(100, 1)
        >>> fit = pf.fit_density(pf.maf(2, context_dim=1), data, context=context, steps=2)
        >>> type(fit.distribution).__name__
        'StandardizedFlow'
        >>> fit.distribution.context_loc.shape
        torch.Size([1])
    """

    context_loc: Tensor
    context_scale: Tensor

    def __init__(
        self,
        chain: FlowTransform,
        base: Distribution | nn.Module | None,
        context_loc: Tensor,
        context_scale: Tensor,
    ) -> None:
        super().__init__(chain, base)
        self.register_buffer("context_loc", context_loc.detach().clone())
        self.register_buffer("context_scale", context_scale.detach().clone())

    def arguments(self) -> tuple[tuple[object, ...], dict[str, object]]:
        """The constructor's arguments."""
        return (self.chain, self.base, self.context_loc, self.context_scale), {}

    def inner_context(self, context: Tensor | None) -> Tensor | None:
        """Standardizes the context."""
        return None if context is None else (context - self.context_loc) / self.context_scale


@remembered
class StandardizedDensity(Density):
    r"""A module with ``log_prob`` in other units, :math:`\log p(y) = \log q((y - t) / \sigma) - \sum_i \log\sigma_i`.

    The ``module`` has the density :math:`q`; ``loc`` :math:`t` and ``scale`` :math:`\sigma` have the event's shape,
    or ``(C, 1)`` for series.  ``context_loc`` and ``context_scale`` are the units of contexts, if any.

    Example:
        >>> data = 100 + torch.randn(200, 2)
        >>> made = pf.MADE(2, "normal")
        >>> fit = pf.fit_density(made, data, standardize=True, steps=2)
        >>> type(fit.distribution).__name__
        'StandardizedDensity'
    """

    loc: Tensor
    scale: Tensor
    context_loc: Tensor
    context_scale: Tensor

    def __init__(self, module: Flow | Density, units: Units) -> None:
        super().__init__()
        self.module = module
        self.context_dim: Any = getattr(module, "context_dim", None)
        event = getattr(module, "event_shape", None)
        loc = units["loc"]
        self.event_shape = Size(() if loc is None else loc.shape) if event is None else event
        kin = next(p for p in module.parameters() if p.is_floating_point())
        for name, value in units.items():
            self.register_buffer(name, None if value is None else value.to(kin))

    def arguments(self) -> tuple[tuple[object, ...], dict[str, object]]:
        """The constructor's arguments."""
        return (self.module, dict(self._buffers)), {}

    def _contexts(self, context: Tensor | None) -> tuple[Tensor, ...]:
        return () if context is None else ((context - self.context_loc) / self.context_scale,)

    @property
    def support(self) -> Constraint:
        """The support of one event, that of the module: units move no end of it."""
        known = getattr(self.module, "support", None)
        return constraints.independent(constraints.real, len(self.event_shape)) if known is None else known

    def forward(self, context: Tensor | None = None) -> ScaledDistribution:
        """The distribution, at a context of shape ``(*batch, context_dim)`` if the module takes one."""
        refuse_as_site(self)
        if self.context_dim is not None:
            check_context(self, context)
        return ScaledDistribution(self, context)

    condition = forward

    def within(self, context: Tensor | None) -> Distribution | None:
        """The module's own distribution, if it has one."""
        module = self.module
        return module(*self._contexts(context)) if isinstance(module, Flow | AutoregressiveModel | Ensemble) else None

    def stretched(self) -> Tensor:
        """The logarithm of the factor by which the units stretch an event."""
        return self.scale.log().expand(self.event_shape).sum()  # units of series may be those of channels

    def log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats."""
        return self.module.log_prob((value - self.loc) / self.scale, *self._contexts(context)) - self.stretched()

    def sample(self, sample_shape: Size | tuple[int, ...] = (), context: Tensor | None = None) -> Tensor:
        """Draws, if the module can."""
        return self.module.sample(sample_shape, *self._contexts(context)) * self.scale + self.loc


def is_plain_flow(module: object) -> TypeGuard[Flow]:
    """Tells whether a module is a flow that can be taken apart into its chain and base."""
    return isinstance(module, Flow) and (type(module).log_prob, type(module).score) == (Flow.log_prob, Flow.score)


def standardized(
    flow: Flow,
    loc: Tensor | None = None,
    scale: Tensor | None = None,
    context_loc: Tensor | None = None,
    context_scale: Tensor | None = None,
) -> Flow:
    """Puts a flow in the units of data; the form in which a fitted flow is saved and loaded.

    A :class:`~pyro_flows.transforms.elementwise.Standardization` is put at the data end of the chain, but before parts
    there that learn nothing (e.g. ``ExpTransform()``), to keep the support.  A :class:`StandardizedFlow` standardizes
    contexts.  Vectors of up to 1024 free numbers over a base of normals, mixtures or Student's t get a
    :class:`~pyro_flows.transforms.linear.Coloring`, at first the identity, at the base end.  The default locations 0
    and scales 1 suffice to load the state of a fitted flow of the same architecture.

    Args:
        flow: the flow, which is not changed.
        loc: location of the data, after the inverse of the parts behind it.
        scale: their scale, positive.
        context_loc: location of contexts, shape ``(context_dim,)``.
        context_scale: their scale, positive.

    Returns:
        A flow that shares all parts; ``flow`` itself if there is nothing to standardize.

    Example:
        >>> loc, scale = torch.tensor([10.0, 0.0]), torch.tensor([3.0, 0.1])
        >>> flow = pf.infer.standardized(pf.Flow(pf.maf(2)), loc, scale)
        >>> flow.sample((5,)).shape
        torch.Size([5, 2])
    """
    if not is_plain_flow(flow):
        raise TypeError(f"standardized: expected a Flow as it is, got a {type(flow).__name__}")
    front, back = split_chain(flow.chain)
    kin = first_floating(flow)
    kin = torch.zeros(()) if kin is None else kin
    chain = flow.chain
    if movable(flow).any():
        shape = back[0].event_shape if back else front[-1].data_shape
        # Units that all times share do not depend on their number.
        own = Size((shape[0], 1)) if over_time(flow) else shape
        loc = kin.new_zeros(own) if loc is None else loc
        scale = kin.new_ones(own) if scale is None else scale
        units = Standardization(loc.to(kin), scale.to(kin), event_shape=shape)
        colored = [_colorless(flow, kin)] if _is_colorable(flow) else []
        chain = Chain([*colored, *front, units, *back]).train(flow.training)
    elif not flow.context_dim:
        return flow
    if not flow.context_dim:
        return Flow(chain, flow.base).train(flow.training)
    first = kin.new_zeros(flow.context_dim) if context_loc is None else context_loc
    then = torch.ones_like(first) if context_scale is None else context_scale
    if isinstance(flow, StandardizedFlow):  # contexts come in their own units, so keep the numbers
        first, then = flow.context_loc, flow.context_scale
    return StandardizedFlow(chain, flow.base, first.to(kin), then.to(kin)).train(flow.training)


def _is_colorable(flow: Flow) -> bool:
    """Tells whether a flow of free vectors over a base of this package may start as a Gaussian, or nearly."""
    event = flow.chain.event_shape
    vectors = len(event) == 1 and event[0] <= _LARGEST and (event[0] > 1 or flow.context_dim > 0)
    return vectors and type(flow.base) in (DiagonalNormal, GaussianMixture, StudentT) and bool(movable(flow).all())


def _colorless(flow: Flow, kin: Tensor) -> Coloring:
    size = flow.chain.event_shape[0]
    slope = kin.new_zeros(size, flow.context_dim) if flow.context_dim else None
    return Coloring(kin.new_zeros(size), torch.eye(size, dtype=kin.dtype, device=kin.device), slope)


def coloring_of(density: Flow | Density) -> Coloring | None:
    """Returns the part that makes a flow start as a Gaussian, if :func:`standardized` has put one there."""
    chain = density.chain if is_plain_flow(density) else None
    first = chain[0] if isinstance(chain, Chain) else None
    return first if isinstance(first, Coloring) else None


def in_units(density: Flow | Density, units: Units, standardize: bool | None) -> Flow | Density:
    """Puts a density in the units of data; returns it as it is if nothing is to be standardized."""
    if standardize is False or units["loc"] is None:
        return density
    ends = ends_of(density)
    if standardize and ends is not None and ends.isinf().all() and units["context_loc"] is None:
        if is_plain_flow(density):
            known = f"angles or constrained ({density.chain.codomain})"
        else:
            known = f"discrete, within bounds, or of families that learn no location and scale ({head_of(density)})"
        raise ValueError(
            f"fit_density: standardize=True, but there is nothing to standardize: this model's values are {known}; "
            "leave it out, or say standardize=False"
        )
    if is_plain_flow(density):
        return standardized(density, **units)
    return StandardizedDensity(density, units) if standardize else density


def split_chain(chain: FlowTransform) -> tuple[list[FlowTransform], list[FlowTransform]]:
    """Splits a chain into parts before the standardization and parts behind it, at the data end.

    Nothing stays behind if that part maps from bounded to free numbers, as ``ExpTransform().inv`` does.
    """
    parts = leaves(chain)
    cut = len(parts)
    while cut and _stays(parts[cut - 1]):
        cut -= 1
    if cut < len(parts):
        first = after = is_free(parts[cut].domain, parts[cut].event_shape)
        for part in parts[cut:]:  # affine transforms call anything they reach real
            affine = isinstance(part, Wrap) and isinstance(part.transform, AffineTransform)
            after = after if affine else is_free(*_end(part))
        if after.sum() > first.sum():
            cut = len(parts)
    return parts[:cut], parts[cut:]


def movable(flow: Flow) -> Tensor:
    """Marks the numbers that may be standardized, unlike angles, where the standardization goes; on the CPU."""
    if flow.chain.discrete:
        return torch.zeros(flow.chain.data_shape, dtype=torch.bool, device="cpu")
    front, back = split_chain(flow.chain)
    periodic = Chain(front).periodic if front else None
    if periodic is not None and periodic.any():
        return ~Chain(front).turned(periodic).cpu()
    free = is_free(*((back[0].domain, back[0].event_shape) if back else _end(front[-1])))
    # A base on part of the line, with a chain on all of it, is a density that ends somewhere.
    event = flow.chain.event_shape
    ends = is_free(flow.chain.domain, event).all() and not is_free(flow.base().support, event).all()
    return torch.zeros_like(free) if ends else free


def head_of(density: Flow | Density) -> Head | None:
    """Returns the head of an autoregressive model."""
    head = getattr(density, "head", None)
    return head if isinstance(head, Head) else None


def ends_of(density: Flow | Density) -> Tensor | None:
    """Returns each number's fixed point, as ``Head.fixed_points`` does; ``None`` if unknown."""
    if is_plain_flow(density):
        return torch.where(movable(density), torch.nan, torch.inf).double()
    head = head_of(density)
    if head is None:
        return None
    return torch.tensor(head.fixed_points(), dtype=torch.float64, device="cpu").reshape(density.event_shape)


def _end(part: FlowTransform) -> tuple[Constraint, Size]:
    return part.codomain, part.data_shape


def over_time(flow: Flow | Density) -> bool:
    """Tells whether series have units by channel: no part before the standardization knows the time."""
    if not is_plain_flow(flow):
        return bool(getattr(flow, "shared_over_time", False))
    front = split_chain(flow.chain)[0]
    return bool(front) and all(part.shared_over_time for part in front)


def pulled_back(flow: Flow, value: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Pulls data back to the place of the standardization; marks rows at or beyond a bound, and lists its columns."""
    codomain, back = flow.chain.codomain, [] if flow.chain.discrete else split_chain(flow.chain)[1]
    # Some of torch's transforms do not know their codomain.
    inside = torch.tensor(True) if constraints.is_dependent(codomain) else codomain.check(value)
    inside = inside.to(value.device).reshape(*inside.shape[:1], -1).all(-1)
    real, edge = pull_back(back, value)
    if back and edge.shape == value.shape and is_free(back[0].domain, back[0].event_shape).all():
        edge = edge | at_bounds(codomain, value)
    infinite = ~real.isfinite()
    bad = ~inside | edge.reshape(len(value), -1).any(1) | infinite.flatten(1).any(1)
    columns: list[int] = []
    if edge.shape == value.shape and all(isinstance(part, (Wrap, Bounds)) for part in back):
        edge = edge | infinite if infinite.shape == edge.shape else edge
        columns = edge.flatten(1).any(0).nonzero()[:, 0].tolist()
    return real, bad, columns


def pull_back(back: Sequence[Transform], value: Tensor) -> tuple[Tensor, Tensor]:
    """Inverts the parts behind the standardization; marks numbers at or beyond a bound on the way.

    The marks have the shape of the data, or of the rows alone where parts change the event's shape.
    """
    edge = torch.zeros_like(value, dtype=torch.bool)
    for part in reversed(back):
        value, found = _pulled(part.transform if isinstance(part, Wrap) else part, value)
        if found.shape != edge.shape:
            found, edge = (bad.reshape(len(value), -1).any(1) for bad in (found, edge))
        edge = edge | found
    return value, edge


def _pulled(transform: Transform, y: Tensor) -> tuple[Tensor, Tensor]:
    """Inverts a transform; marks numbers at or beyond a bound that it does not reach from the line.

    Torch's transforms do not know each other's ends, so each elementary one is examined.
    """
    transform = transform if isinstance(transform, FlowTransform) else _bare(transform)
    if isinstance(transform, ComposeTransform):
        x, edge = pull_back(transform.parts, y)
        # Ends are rounded on the way, so the whole is examined, too.
        whole = image(transform, transform.domain)
        free = is_free(transform.domain, x.shape[1:]).all() and edge.shape == y.shape
        return x, edge | at_bounds(whole, y) if free else edge
    joined = _joined(transform)
    if joined is not None:
        parts, dim, lengths = joined
        pieces, join = (y.unbind(dim), torch.stack) if lengths is None else (y.split(lengths, dim), torch.cat)
        pulled, edges = zip(*map(_pulled, parts, pieces), strict=True)
        return join(pulled, dim), join(edges, dim)
    x = transform.inverse_and_ladj(y)[0] if isinstance(transform, FlowTransform) else transform.inv(y)
    known = not constraints.is_dependent(transform.codomain) and not constraints.is_dependent(transform.domain)
    open_ended = known and bool(is_free(transform.domain, x.shape[1:]).all())
    return x, at_bounds(transform.codomain, y) if open_ended else torch.zeros_like(y, dtype=torch.bool)


def _stays(part: FlowTransform) -> bool:
    """Tells whether a part belongs behind the standardization: it learns nothing, or maps to constrained values."""
    if part.context_dim:
        return False
    learns = next(part.parameters(), None) is not None
    return not learns or not (is_free(*_end(part)).all() or part.periodic is not None)
