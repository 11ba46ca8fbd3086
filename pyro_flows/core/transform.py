"""The base contract of every flow: a leaf writes ``forward_and_ladj`` and ``inverse_and_ladj``, the rest follows."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from pyro.distributions import constraints as pyro_constraints
from pyro.distributions.conditional import ConditionalTransform
from pyro.distributions.torch_transform import TransformModule
from pyro.ops.provenance import ProvenanceTensor, extract_provenance, track_provenance
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyro_flows.core.checks import (
    WHOLE_BOUND,
    admit,
    check_context,
    event_size,
    integer,
    joint_shape,
    like_given,
    without_leading_ones,
    wrong_event,
)
from pyro_flows.core.memo import Memo, asked_by_score
from pyro_flows.core.recipes import remembered

__all__ = ["REAL", "WHOLE", "WHOLE_BOUND", "Conditioned", "FlowTransform", "Inverse"]


REAL = [
    constraints.real,
    constraints.real_vector,
    *(constraints.independent(constraints.real, n) for n in range(2, 9)),
]
WHOLE = [
    pyro_constraints.integer,
    *(constraints.independent(pyro_constraints.integer, n) for n in range(1, 9)),
]


def _guarded(leaf: Callable[..., tuple[Tensor, Tensor]], data_side: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    @functools.wraps(leaf)
    def method(self: FlowTransform, value: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if type(value) is ProvenanceTensor or type(context) is ProvenanceTensor:
            # Hand-made gradients lose Pyro's marks of provenance.
            given: Any = extract_provenance((value, context))
            return track_provenance(method(self, *given[0]), given[1])
        admitted = admit(self, value, context, data_side)
        if not self.discrete or not value.is_floating_point():
            return leaf(self, admitted, context)
        out, ladj = leaf(self, admitted, context)
        return like_given(type(self).__name__, value, out), ladj.to(value.dtype)

    return method


class FlowTransform(TransformModule):
    r"""Abstract base of every flow: a Pyro ``TransformModule`` that maps base :math:`x` to data :math:`y = f(x)`.

    A leaf implements ``forward_and_ladj(x, context=None) -> (y, ladj)`` and ``inverse_and_ladj(y, context=None) -> (x,
    ladj)``:

    - ``x``, ``y``: shape ``(*batch, *event_shape)``;
    - ``ladj``: shape ``(*batch,)``, in nats: :math:`\log|\det \partial y/\partial x|`, or its negative for the inverse;
    - ``context``: shape ``(*context_batch, context_dim)``, broadcast against ``batch``, or ``None``.

    The class wraps both in a check of the arguments; inside, values have the whole batch shape.  Parts of a flow call
    each other's unchecked ``_forward_and_ladj`` and ``_inverse_and_ladj``.

    Args:
        event_shape: an ``input_dim`` or the shape of one event.
        context_dim: size of the context, 0 for none.

    Raises:
        ValueError: for a shape, dtype, device or context that does not fit.

    Example:
        >>> class Mirror(pf.FlowTransform):
        ...     def forward_and_ladj(self, x, context=None):
        ...         return -x, torch.zeros_like(x[..., 0])
        ...     inverse_and_ladj = forward_and_ladj
        >>> Mirror(2)(torch.tensor([1.0, -3.0])).tolist()
        [-1.0, 3.0]

    References:
        Normalizing Flows for Probabilistic Modeling and Inference (Papamakarios et al., 2019), arXiv:1912.02762.
    """

    bijective = True
    sampling_cost = "1 pass"  # base to data
    density_cost = "1 pass"  # data to base
    discrete: bool | None = False  # whether it maps whole numbers to whole numbers; None if it only rearranges
    affine = False  # whether the map is a matrix and a shift, at each context
    event_shape: Size
    context_dim: int
    _memo: Memo

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, data_side in (("forward_and_ladj", False), ("inverse_and_ladj", True)):
            if name in cls.__dict__:
                leaf = cls.__dict__[name]
                setattr(cls, "_" + name, leaf)
                setattr(cls, name, _guarded(leaf, data_side))
        remembered(cls)

    def __init__(self, event_shape: int | Iterable[int], context_dim: int = 0) -> None:
        super().__init__(cache_size=0)
        self.event_shape = event_size(event_shape)
        self.context_dim = integer("", "context_dim", context_dim, 0)
        self.__dict__["_memo"] = Memo()

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Base to data, with ``log|det dy/dx|``.

        Example:
            >>> y, ladj = pf.realnvp(3).forward_and_ladj(torch.randn(5, 3))
            >>> y.shape, ladj.shape
            (torch.Size([5, 3]), torch.Size([5]))
        """
        raise TypeError(f"{type(self).__name__} must define forward_and_ladj(x, context=None) -> (y, ladj)")

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to base, with ``log|det dx/dy|``.

        Example:
            >>> x, ladj = pf.realnvp(3).inverse_and_ladj(torch.randn(5, 3))
            >>> x.shape, ladj.shape
            (torch.Size([5, 3]), torch.Size([5]))
        """
        raise TypeError(f"{type(self).__name__} must define inverse_and_ladj(y, context=None) -> (x, ladj)")

    _forward_and_ladj = forward_and_ladj
    _inverse_and_ladj = inverse_and_ladj

    @property
    def data_shape(self) -> Size:
        """Event shape on the data side; differs from ``event_shape`` in some wrapped transforms."""
        return self.event_shape

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:
        """Constraint on ``x``."""
        return (WHOLE if self.discrete else REAL)[len(self.event_shape)]

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        """Constraint on ``y``: the ``support`` of a ``TransformedDistribution``."""
        return (WHOLE if self.discrete else REAL)[len(self.data_shape)]

    def __call__(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``y = f(x)``, at a context if given."""
        y, ladj = self.forward_and_ladj(x, context)
        if context is None:
            self._memo.remember(self, x, y, ladj, made_y=True)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        known = self._memo.preimage(self, y)
        if known is not None:
            return known[0]
        x, ladj = self.inverse_and_ladj(y)
        self._memo.remember(self, x, y, -ladj, made_y=False)
        return x

    # As in torch, names with an underscore bypass the cache.

    def _call(self, x: Tensor) -> Tensor:
        return self.forward_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_ladj(y)[0]

    def inverse_and_memo(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``inverse_and_ladj(y)``, from the cache if this transform just produced ``y``."""
        known = self._memo.preimage(self, y) if context is None else None
        return (known[0], -known[1]) if known is not None else self.inverse_and_ladj(y, context)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log|det dy/dx|`` at ``x``, shape ``(*batch,)``, in nats; free after ``self(x)`` or ``self.inv(y)``."""
        known = self._memo.ladj(self, x, y)
        return self.forward_and_ladj(x)[1] if known is None else known

    @property
    def inv(self) -> FlowTransform:
        """The inverse, which shares the parameters; ``t.inv.inv is t``."""
        ref = self.__dict__.get("_inverse_ref")
        inverse = ref() if ref is not None else None
        if inverse is None:
            if asked_by_score():  # which only calls it
                inverted: Any = self._inv_call
                return inverted
            inverse = self._make_inverse()
            self.__dict__["_inverse_ref"] = weakref.ref(inverse)
        return inverse

    def _make_inverse(self) -> FlowTransform:
        # Made at each call from fields that are made once.  A strong reference would be a cycle that keeps parameters
        # alive.
        fields = self.__dict__.get("_inverse_fields")
        if fields is None:
            fields = Inverse(self).__dict__.copy()
            del fields["_modules"]
            self.__dict__["_inverse_fields"] = fields
        inverse = object.__new__(Inverse)
        inverse.__dict__.update(fields, _modules={"transform": self}, training=self.training)
        return inverse

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """Returns ``self``: the cache is always on."""
        return self

    def forward_shape(self, shape: Iterable[int]) -> Size:
        """Shape of ``y`` for an ``x`` of this shape."""
        return self._map_shape(Size(shape), self.event_shape, self.data_shape)

    def inverse_shape(self, shape: Iterable[int]) -> Size:
        """Shape of ``x`` for a ``y`` of this shape."""
        return self._map_shape(Size(shape), self.data_shape, self.event_shape)

    @property
    def batch_shape(self) -> Size:
        """Batch shape of bound contexts."""
        return Size()

    def _batch_of(self, value: Tensor) -> Size:
        """The batch shape of a value on either side."""
        return value.shape[: value.dim() - len(self.event_shape)]

    def _map_shape(self, shape: Size, source: Size, target: Size) -> Size:
        cut = len(shape) - len(source)
        if cut < 0:
            raise ValueError(
                f"{type(self).__name__}: expected at least {len(source)} dimensions, got shape {tuple(shape)}"
            )
        # As in torch, a base of size 1 per dimension broadcasts.
        if any(given not in (1, size) for given, size in zip(shape[cut:], source, strict=True)):
            raise ValueError(wrong_event(self, shape, source))
        return joint_shape(shape[:cut], self.batch_shape) + target

    @property
    def reach(self) -> int | None:
        """For series (C, T), the number of earlier steps of y that a step of x depends on; ``None`` if unbounded."""
        return None

    @property
    def shared_over_time(self) -> bool:
        """For series (C, T), whether all times share the parameters."""
        return False

    @property
    def sign(self) -> NoReturn:
        """Raises AttributeError, so that ``hasattr`` and ``torch.jit`` pass it over: a map of events has no sign."""
        raise AttributeError(f"{type(self).__name__} moves whole events, so it has no sign: it neither rises nor falls")

    @property
    def periodic(self) -> Tensor | None:
        """Boolean, shape ``event_shape``: which dimensions are angles modulo 2 pi; ``None`` for none."""
        return None

    def turned(self, angles: Tensor, inverse: bool = False) -> Tensor:
        """The angles among the dimensions of ``y``, given those of ``x``; with ``inverse``, the other way.

        Raises:
            ValueError: if this transform moves an angle as a number on a line.
        """
        own = self.periodic
        if own is None or not (own.is_meta or torch.equal(own.to(angles.device), angles)):
            raise ValueError(
                f"{type(self).__name__} moves angles as numbers on a line, or takes other dimensions for angles than "
                "its neighbors do, so the result would be no density; use ncsf, or Coupling(..., periodic=...) for all"
            )
        return angles

    def condition(self, context: Tensor) -> Conditioned:
        """A view of this transform at one or more contexts; see :class:`Conditioned`.

        Example:
            >>> chain, context = pf.realnvp(3, context_dim=2), torch.randn(2)
            >>> chain.condition(context)(torch.randn(5, 3)).shape
            torch.Size([5, 3])
        """
        if self.context_dim == 0:
            raise ValueError(
                f"{type(self).__name__} was built with context_dim=0 and takes no context; to condition a list where "
                "only some transforms take one, put them in a Chain([...]): it gives the context to those that do"
            )
        return Conditioned(self, context)

    def clear_cache(self) -> None:
        """Clears cached results; needed only after a write into a parameter's ``.data``."""
        for module in self.modules():
            if isinstance(module, FlowTransform):
                module._memo.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FlowTransform:
        self._memo.clear()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> FlowTransform:
        self._memo.clear()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._memo.clear()  # extra state may count
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        left = ("_memo", "_inverse_ref", "_inverse_fields")
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_memo"] = Memo()

    __repr__ = nn.Module.__repr__

    def __hash__(self) -> int:
        return id(self)  # torch.compile cannot trace Pyro's

    def extra_repr(self) -> str:
        size = self.event_shape[0] if len(self.event_shape) == 1 else tuple(self.event_shape)
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"{size}{context}, sampling: {self.sampling_cost}, density: {self.density_cost}"


# Registered, because its metaclass clashes with PyroModule's.
ConditionalTransform.register(FlowTransform)


def _inner(name: str) -> Any:
    """A property that is the inner transform's of this name."""
    return property(lambda self: getattr(self.transform, name))


class Inverse(FlowTransform):
    """The inverse of a transform, :math:`y = f^{-1}(x)`, which shares its parameters.

    The costs of the directions swap.  ``log_abs_det_jacobian(x, y)`` is a function of ``y``.

    Args:
        transform: the transform to invert; for an inverse, its own ``transform`` is returned.

    Example:
        >>> fast_draws = pf.Inverse(pf.maf(3))
        >>> x = torch.randn(5, 3)
        >>> fast_draws(x).shape
        torch.Size([5, 3])
        >>> pf.Inverse(fast_draws) is fast_draws.transform
        True
    """

    transform: FlowTransform
    data_shape, batch_shape = _inner("event_shape"), _inner("batch_shape")
    domain, codomain = _inner("codomain"), _inner("domain")
    discrete = _inner("discrete")
    shared_over_time = _inner("shared_over_time")

    # The inverse of an inverse is the transform itself.
    def __new__(cls, transform: FlowTransform | None = None) -> FlowTransform:  # type: ignore[misc]
        return transform.transform if isinstance(transform, Inverse) else super().__new__(cls)

    def __init__(self, transform: FlowTransform) -> None:
        super().__init__(transform.data_shape, transform.context_dim)
        self.transform = transform
        self.sampling_cost, self.density_cost = transform.density_cost, transform.sampling_cost

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The constructor's arguments."""
        return (self.transform,), {}

    @property
    def reach(self) -> int | None:
        return 0 if self.transform.reach == 0 else None

    @property
    def periodic(self) -> Tensor | None:
        inner = self.transform.periodic
        return None if inner is None else self.transform.turned(inner)

    def turned(self, angles: Tensor, inverse: bool = False) -> Tensor:
        return self.transform.turned(angles, not inverse)

    @property
    def inv(self) -> FlowTransform:
        ref = self.transform.__dict__.get("_inverse_ref")
        if ref is None or ref() is None:  # a copy, unknown to its transform
            self.transform.__dict__["_inverse_ref"] = weakref.ref(self)
        return self.transform

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform._inverse_and_ladj(x, context)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform._forward_and_ladj(y, context)

    # The transform's cache serves both directions.

    def __call__(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        inner: Any = self._modules["transform"]  # faster than an attribute
        return inner._inv_call(x) if context is None else self.forward_and_ladj(x, context)[0]

    def _inv_call(self, y: Tensor) -> Tensor:
        return self.transform(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.transform.log_abs_det_jacobian(y, x)


class Conditioned(FlowTransform):
    """A transform bound to a context: a view that shares the parameters and holds the context.

    The context's batch shape, without leading ones, joins every shape, so ``TransformedDistribution(base,
    [t.condition(context)])`` has it as its batch shape.  ``.to()`` moves the shared parameters and this view's context.
    The context is not in the ``state_dict``; a copy or pickle holds it detached.

    Args:
        transform: a transform with ``context_dim > 0``.
        context: shape ``(*context_batch, context_dim)``.

    Example:
        >>> chain, context = pf.maf(3, context_dim=2), torch.randn(5, 2)
        >>> base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        >>> density = dist.TransformedDistribution(base, [chain.condition(context)])
        >>> density.batch_shape
        torch.Size([5])
    """

    transform: FlowTransform
    context: Tensor
    data_shape, domain, codomain = _inner("data_shape"), _inner("domain"), _inner("codomain")
    reach, shared_over_time, periodic = _inner("reach"), _inner("shared_over_time"), _inner("periodic")
    discrete = _inner("discrete")

    def __init__(self, transform: FlowTransform, context: Tensor) -> None:
        super().__init__(transform.event_shape)
        check_context(transform, context)
        self.transform = transform
        self.register_buffer("context", without_leading_ones(context), persistent=False)
        self.sampling_cost, self.density_cost = transform.sampling_cost, transform.density_cost

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The constructor's arguments."""
        return (self.transform, self.context), {}

    def turned(self, angles: Tensor, inverse: bool = False) -> Tensor:
        return self.transform.turned(angles, inverse)

    def condition(self, context: Tensor) -> Conditioned:
        raise ValueError(
            "this view is bound to a context already: call .condition on the transform itself (.transform)"
        )

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # The context's batch joins here.
        return self.transform.forward_and_ladj(x, self.context)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(y, self.context)

    @property
    def batch_shape(self) -> Size:
        return joint_shape(self.context.shape[:-1], self.transform.batch_shape)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return state | {"_buffers": state["_buffers"] | {"context": self.context.detach()}}
