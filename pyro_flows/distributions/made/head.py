"""The contract of heads: a network's outputs as parameters of univariate distributions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_flows.core.checks import integer
from pyro_flows.core.recipes import remembered

__all__ = ["Head"]

Calls = list[Callable[[], object]]


class _Inside(Constraint):
    """An event all of whose numbers a head allows."""

    def __init__(self, head: Head, event_dim: int, is_discrete: bool) -> None:
        self.head, self.event_dim, self.is_discrete = head, event_dim, is_discrete
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        flat = value.reshape(*value.shape[: value.dim() - self.event_dim], self.head.input_dim)
        return self.head.inside(flat).all(-1)

    def __repr__(self) -> str:
        return f"{type(self).__name__[1:]}({self.head})"


class Head(nn.Module):
    r"""Abstract base: a family of univariate distributions :math:`p(x_i \mid \theta_i)`, one for each dimension.

    ``head.bind(input_dim)`` fixes the number of dimensions.  A network computes the ``num_params`` real numbers
    :math:`\theta_i` for dimension :math:`i`; a dimension that needs fewer ignores the last.  Values are floating, even
    categories and levels.  In all methods ``dims`` are the dimensions of a value's ``n`` columns, by default all.  Only
    ``check`` checks values.

    A subclass defines ``log_prob``; one of ``sample``, ``rsample`` (then ``has_rsample = True``) and ``draws``; and a
    ``constraint``, or ``inside`` and ``allowed`` where dimensions differ.

    Attributes:
        num_params: the network's outputs per dimension.
        num_features: the network's inputs per dimension.
        location: the parameters that move by as much as the values do; by default none.
        discrete: whether all dimensions are discrete, so that ``log_prob`` is a log-mass.
        has_rsample: whether differentiable draws exist.
        constraint: the constraint of each number, ``None`` where dimensions differ.

    Example:
        >>> class LaplaceHead(pf.distributions.made.Head):
        ...     discrete, has_rsample, constraint = False, True, dist.constraints.real
        ...     def log_prob(self, value, params, dims=None):
        ...         return dist.Laplace(params[..., 0], 1.0).log_prob(value)
        ...     def rsample(self, params, dims=None):
        ...         return dist.Laplace(params[..., 0], 1.0).rsample()
        >>> pf.MADE(3, LaplaceHead()).sample((5,)).shape
        torch.Size([5, 3])
    """

    num_params: int = 1
    num_features: int = 1
    location: slice = slice(0)
    discrete: bool = True
    has_rsample: bool = False
    constraint: Constraint | None = None
    like: Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        remembered(cls)

    def __init__(self) -> None:
        super().__init__()
        self._input_dim: int | None = None
        self.register_buffer("like", torch.zeros(()), persistent=False)  # has the current dtype and device

    def extra_repr(self) -> str:
        return "" if self._input_dim is None else f"input_dim={self._input_dim}"

    @property
    def input_dim(self) -> int:
        """The number of bound dimensions."""
        if self._input_dim is None:
            raise RuntimeError(
                f"{type(self).__name__} is not bound to a number of dimensions: use head.bind(input_dim)"
            )
        return self._input_dim

    def bind(self, input_dim: int) -> Head:
        """A copy for this number of dimensions, or the bound head itself."""
        integer(type(self).__name__, "input_dim", input_dim)
        if self._input_dim == input_dim:
            return self
        bound = copy.deepcopy(self)
        bound._settle(input_dim)
        bound._input_dim = input_dim
        return bound

    def _settle(self, input_dim: int) -> None:
        """Checks the number of dimensions, and prepares for it."""

    def tiled(self, places: int) -> Head:
        """The bound head of channels as one of events ``(channels, places)``, with each channel's at all places.

        A subclass that treats dimensions differently defines it.
        """
        return self.bind(self.input_dim * places)

    # For subclasses.

    def log_prob(self, value: Tensor, params: Tensor, dims: Tensor | None = None) -> Tensor:
        """Log-density in nats, shape ``(*, n)``; ``params`` has shape ``(*, n, num_params)``."""
        raise TypeError(f"{type(self).__name__} must define log_prob(value, params, dims)")

    def sample(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        """Draws without gradient, shape ``(*, n)``."""
        with torch.no_grad():
            if self.has_rsample:
                return self.rsample(params, dims)
            if type(self).draws is Head.draws:
                raise TypeError(f"{type(self).__name__} must define sample(params, dims)")
            n = params.shape[-2]
            columns = params.reshape(-1, n, self.num_params).permute(1, 2, 0).contiguous()
            x = torch.empty_like(columns[:, 0])
            shared = self.num_features == 1 and type(self).code is Head.code
            features = x if shared else x.new_empty(n * self.num_features, x.shape[1])
            dims = torch.arange(n, device=x.device) if dims is None else dims
            for call in self.draws(dims, torch.rand_like(x), columns, x, features):
                call()
            return x.T.reshape(params.shape[:-1])

    def rsample(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        """Differentiable draws, shape ``(*, n)``."""
        raise NotImplementedError(
            f"{type(self).__name__}: there are no reparameterized draws; use sample() with a score-function estimator, "
            "or relaxed(temperature) where there is such a form"
        )

    def mean(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        """Expectations, shape ``(*, n)``."""
        raise NotImplementedError(f"{type(self).__name__} has no mean in closed form: average draws")

    def relaxed(self, temperature: float) -> Head:
        """A continuous head with differentiable draws that approaches this one as the temperature falls.

        Raises:
            NotImplementedError: if there is none.
        """
        hint = "its draws are reparameterized already" if self.has_rsample else "use a score-function estimator"
        raise NotImplementedError(f"{type(self).__name__} has no relaxed form: {hint}")

    def inside(self, value: Tensor, dims: Tensor | None = None) -> Tensor:
        """Whether the support holds each number, shape ``(*, n)``."""
        if self.constraint is None:
            raise TypeError(f"{type(self).__name__} must define a constraint, or inside(value, dims) and allowed(dim)")
        return self.constraint.check(self.floating(value))

    def allowed(self, dim: int) -> str:
        """A dimension's support in words."""
        return "a number" if self.constraint is constraints.real else f"a value in {self.constraint}"

    def code(self, value: Tensor, dims: Tensor | None = None) -> Tensor:
        """Like :meth:`features`, for floating values."""
        return value.unsqueeze(-1)

    def start(self, data: Tensor | None) -> Tensor:
        """Like :meth:`bias`, for checked floating data; may return any dtype."""
        return self.like.new_zeros(self.input_dim, self.num_params)

    def locations(self) -> Tensor:
        """Marks the parameters that move by as much as the values do, shape ``(input_dim, num_params)``."""
        found = torch.zeros(self.input_dim, self.num_params, dtype=torch.bool, device=self.like.device)
        found[:, self.location] = True
        return found

    def normal(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Parameters of normals, nearly, in dimensions that have locations; shape ``(input_dim, num_params)``."""
        return self.start(None)

    def draws(self, dims: Tensor, z: Tensor, params: Tensor, x: Tensor, features: Tensor) -> Calls:
        """Calls that draw ``x`` and its features in place, for sampling dimension by dimension; samples are columns.

        Args:
            dims: the ``n`` dimensions.
            z: uniform in [0, 1), shape ``(n, columns)``; may be overwritten.
            params: shape ``(n, num_params, columns)``; must not be overwritten.
            x: output, shape ``(n, columns)``.
            features: output, shape ``(n * num_features, columns)``; the memory of ``x`` if they are the values.
        """
        rows = params.permute(2, 0, 1)
        return self.fills(lambda: self.sample(rows, dims), dims, x, features)

    # Derived.

    def num_values(self) -> list[int | None]:
        """The number of values of each dimension, which are 0, 1, ...; ``None`` where they are endless or unknown."""
        least, most = (getattr(self.constraint, end, None) for end in ("lower_bound", "upper_bound"))
        if self.constraint is constraints.boolean:
            least, most = 0, 1
        count = int(most) + 1 if self.discrete and least == 0 and most is not None else None
        return [count] * self.input_dim

    def fills(self, make: Callable[[], Tensor], dims: Tensor, x: Tensor, coded: Tensor) -> Calls:
        """Calls that fill ``x`` with values, made in shape ``(columns, n)``, and their features; see :meth:`draws`."""
        value, shared = x.T, coded.data_ptr() == x.data_ptr()
        columns = torch.unflatten(coded, 0, (len(dims), self.num_features)).permute(2, 0, 1)

        def run() -> None:
            value.copy_(make())
            if not shared:
                columns.copy_(self.code(value, dims))

        return [run]

    def floating(self, value: Tensor) -> Tensor:
        """Casts integers and booleans to the head's dtype."""
        return value if value.is_floating_point() else value.to(self.like.dtype)

    def features(self, value: Tensor, dims: Tensor | None = None) -> Tensor:
        """The network's floating inputs, shape ``(*, n, num_features)``."""
        return self.code(self.floating(value), dims)

    def bias(self, data: Tensor | None = None, *, as_normals: bool = False) -> Tensor:
        """Initial output biases, shape ``(input_dim, num_params)``, in the head's dtype.

        Args:
            data: rows, shape ``(N, input_dim)``, whose marginals the biases fit where cheap.
            as_normals: whether mixtures fit a normal of the data's mean and variance, in place of quantiles.
        """
        if data is None:
            return self.start(None).to(self.like.dtype)
        if data.dim() != 2 or data.shape[1] != self.input_dim or not len(data):
            raise ValueError(
                f"{type(self).__name__}: expected data of shape (N, {self.input_dim}) with N >= 1, got "
                f"shape {tuple(data.shape)}"
            )
        data = self.floating(data.detach())
        made = self.start(data)
        if as_normals:
            std, mean = torch.std_mean(data.double(), 0, correction=0)
            normal = self.normal(mean, std.clamp(min=torch.finfo(data.dtype).tiny))
            made = torch.where(self.locations().any(1, keepdim=True), normal, made)
        return made.to(self.like.dtype)

    def support(self, event_shape: Size | tuple[int, ...]) -> Constraint:
        """The support of one event."""
        if self.constraint is None:
            return _Inside(self, len(event_shape), any(self.discrete_dims()))
        return constraints.independent(self.constraint, len(event_shape))

    def discrete_dims(self) -> list[bool]:
        """Whether each dimension is discrete."""
        return [self.discrete] * self.input_dim

    def fixed_points(self) -> list[float]:
        """The point about which a standardization may stretch each dimension.

        NaN stands for any point (families on the whole line), a number for the fixed end of a half-line, infinity for
        none: counts, categories, intervals, and families that a change of units would leave.
        """
        support = self.constraint
        known = support is not None and not (self.discrete or support.is_discrete)
        if known and (support is constraints.real or isinstance(support, type(constraints.real))):
            return [math.nan] * self.input_dim
        ends = [getattr(support, name) for name in ("lower_bound", "upper_bound") if known and hasattr(support, name)]
        return [float(ends[0]) if len(ends) == 1 else math.inf] * self.input_dim

    def check(self, value: Tensor) -> None:
        """Refuses a value, shape ``(*, input_dim)``, outside the support.

        Raises:
            ValueError: names a dimension and its value.
        """
        if value.dim() == 0 or value.shape[-1] != self.input_dim:
            raise ValueError(
                f"{type(self).__name__}: expected a value with last dimension {self.input_dim}, got shape "
                f"{tuple(value.shape)}"
            )
        rows = value.detach().reshape(-1, self.input_dim)
        wrong = ~self.inside(rows)
        if wrong.any():
            row, dim = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{type(self).__name__}: expected {self.allowed(dim)} in dimension {dim}, got {rows[row, dim].item():g}"
                f" ({int(wrong.sum())} such in {wrong.numel()})"
            )
