"""What a head owes: the contract between an autoregressive network and the distributions of single dimensions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

__all__ = ["Head"]


class _Inside(Constraint):
    """An event all of whose numbers are what a head's dimensions allow."""

    def __init__(self, head: Head, event_dim: int, is_discrete: bool) -> None:
        self.head, self._event_dim, self._discrete = head, event_dim, is_discrete
        super().__init__()

    @property
    def event_dim(self) -> int:
        return self._event_dim

    @property
    def is_discrete(self) -> bool:
        return self._discrete

    def check(self, value: Tensor) -> Tensor:
        flat = value.reshape(*value.shape[: value.dim() - self._event_dim], self.head.input_dim)
        return self.head.inside(flat).all(-1)

    def __repr__(self) -> str:
        return f"{type(self).__name__[1:]}({self.head})"


class Head(nn.Module):
    r"""Abstract base: a family of univariate distributions :math:`p(x_i \mid \theta_i)`, one for each dimension.

    A head is made without a number of dimensions and then bound to one: ``head.bind(input_dim)``.  It has no
    parameters of its own; :math:`\theta_i` are the ``num_params`` numbers that a network computes for dimension
    :math:`i`, any real ones.  Where dimensions need different numbers of them, the last are ignored.

    Values are floating, categories and levels too.  The argument ``dims`` of the methods says which dimensions the
    ``n`` columns of a value stand for; by default all, in order.  Nothing here checks values but ``check``.

    A subclass defines ``log_prob`` and one of ``sample`` and ``rsample``; and a ``constraint``, or ``inside`` and
    ``allowed`` where dimensions differ.

    Attributes:
        num_params: numbers per dimension that the network makes.
        num_features: numbers per dimension that go into it.
        discrete: whether all dimensions are, so that ``log_prob`` is the log of a mass.
        has_rsample: whether draws can be differentiable after the parameters.
        constraint: of each number, ``None`` where dimensions differ.
    """

    num_params: int = 1
    num_features: int = 1
    discrete: bool = True
    has_rsample: bool = False
    constraint: Constraint | None = None

    def __init__(self) -> None:
        super().__init__()
        self._input_dim: int | None = None
        self.register_buffer("like", torch.zeros(()), persistent=False)  # of the dtype and device in use

    @property
    def input_dim(self) -> int:
        """The number of dimensions that the head is bound to."""
        if self._input_dim is None:
            raise RuntimeError(
                f"{type(self).__name__} is not bound to a number of dimensions: use head.bind(input_dim)"
            )
        return self._input_dim

    def bind(self, input_dim: int) -> Head:
        """A copy for this number of dimensions; the head itself if it is bound to it already."""
        if isinstance(input_dim, bool) or not isinstance(input_dim, int) or input_dim < 1:
            raise ValueError(f"{type(self).__name__}: expected input_dim to be a positive integer, got {input_dim!r}")
        if self._input_dim == input_dim:
            return self
        bound = copy.deepcopy(self)
        bound._settle(input_dim)
        bound._input_dim = input_dim
        return bound

    def _settle(self, input_dim: int) -> None:
        """Checks whether the head fits a number of dimensions, and makes what depends on it."""

    # What a subclass defines.

    def log_prob(self, value: Tensor, params: Tensor, dims: Tensor | None = None) -> Tensor:
        """In nats: ``value`` of shape ``(*, n)``, ``params`` of shape ``(*, n, num_params)``; gives ``(*, n)``."""
        raise TypeError(f"{type(self).__name__} must define log_prob(value, params, dims)")

    def sample(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        """Draws without gradient, shape ``(*, n)``."""
        if not self.has_rsample:
            raise TypeError(f"{type(self).__name__} must define sample(params, dims)")
        with torch.no_grad():
            return self.rsample(params, dims)

    def rsample(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        """Draws that are differentiable after the parameters, shape ``(*, n)``."""
        raise NotImplementedError(
            f"{type(self).__name__}: there are no reparameterised draws; use sample() with a score-function estimator, "
            "or relaxed(temperature) where there is such a form"
        )

    def mean(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        """Expectations, shape ``(*, n)``."""
        raise NotImplementedError(f"{type(self).__name__} has no mean in closed form: average draws")

    def relaxed(self, temperature: float) -> Head:
        """The head of a continuous variable with differentiable draws that tends to this one as the temperature falls.

        Raises:
            NotImplementedError: if there is none.
        """
        hint = "its draws are reparameterised already" if self.has_rsample else "use a score-function estimator"
        raise NotImplementedError(f"{type(self).__name__} has no relaxed form: {hint}")

    def inside(self, value: Tensor, dims: Tensor | None = None) -> Tensor:
        """Whether numbers are in the support, shape ``(*, n)``."""
        if self.constraint is None:
            raise TypeError(f"{type(self).__name__} must define a constraint, or inside(value, dims) and allowed(dim)")
        return self.constraint.check(self.floating(value))

    def allowed(self, dim: int) -> str:
        """Words for the support of a dimension."""
        return f"a value in {self.constraint}"

    def code(self, value: Tensor, dims: Tensor | None = None) -> Tensor:
        """As :meth:`features`, for floating values."""
        return value.unsqueeze(-1)

    def start(self, data: Tensor | None) -> Tensor:
        """As :meth:`bias`, for data of a checked shape and a floating dtype; may be of any dtype."""
        return self.like.new_zeros(self.input_dim, self.num_params)

    # What follows from that.

    def floating(self, value: Tensor) -> Tensor:
        """The value, if of integers or booleans in the head's own dtype."""
        return value if value.is_floating_point() else value.to(self.like.dtype)

    def features(self, value: Tensor, dims: Tensor | None = None) -> Tensor:
        """What the network is given for a value: from ``(*, n)`` to ``(*, n, num_features)``, floating."""
        return self.code(self.floating(value), dims)

    def bias(self, data: Tensor | None = None) -> Tensor:
        """Biases for the network's outputs to start from, shape ``(input_dim, num_params)``, in the head's dtype.

        Args:
            data: rows of shape ``(N, input_dim)`` to whose marginals the biases are fitted, where that is cheap.
        """
        if data is None:
            return self.start(None).to(self.like.dtype)
        if data.dim() != 2 or data.shape[1] != self.input_dim or not len(data):
            raise ValueError(
                f"{type(self).__name__}: expected data of shape (N, {self.input_dim}) with N >= 1, got "
                f"shape {tuple(data.shape)}"
            )
        return self.start(self.floating(data.detach())).to(self.like.dtype)

    def support(self, event_shape: Size | tuple[int, ...]) -> Constraint:
        """Of one event, whose shape holds ``input_dim`` numbers."""
        if self.constraint is None:
            return _Inside(self, len(event_shape), any(self.discrete_dims()))
        return constraints.independent(self.constraint, len(event_shape))

    def discrete_dims(self) -> list[bool]:
        """Which dimensions have values of their own, with a mass each."""
        return [self.discrete] * self.input_dim

    def fixed_points(self) -> list[float]:
        """About which point the values of each dimension may be stretched, as a standardisation does.

        NaN stands for any point: a family on the whole line may be moved, too.  A number is the end of a half-line,
        which must stay where it is.  Infinity stands for none: counts, categories, intervals, and families that are
        not the same any more after a change of units.
        """
        support = self.constraint
        known = support is not None and not (self.discrete or support.is_discrete)
        if known and (support is constraints.real or isinstance(support, type(constraints.real))):
            return [math.nan] * self.input_dim
        ends = [getattr(support, name) for name in ("lower_bound", "upper_bound") if known and hasattr(support, name)]
        return [float(ends[0]) if len(ends) == 1 else math.inf] * self.input_dim

    def check(self, value: Tensor) -> None:
        """Raises a worded error for a value, shape ``(*, input_dim)``, that is not in the support.

        Raises:
            ValueError: naming a dimension and what stands there.
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

    def draws(self, dims: Tensor, z: Tensor, params: Tensor, x: Tensor, features: Tensor) -> list[Callable[[], object]]:
        """Calls that draw ``x`` and code it, in place, each time by what the buffers then hold.

        For the engine that samples dimension by dimension.  Everything is feature-major, with samples in columns.
        Override only where fewer or cheaper calls can do it.

        Args:
            dims: the ``n`` dimensions in question.
            z: uniform in [0, 1), shape ``(n, columns)``; may be overwritten.
            params: shape ``(n, num_params, columns)``; may not.
            x: shape ``(n, columns)``, to be filled.
            features: shape ``(n * num_features, columns)``, to be filled; the memory of ``x`` itself if a feature is
                the value.
        """
        rows, value = params.permute(2, 0, 1), x.T
        coded = features.unflatten(0, (len(dims), self.num_features)).permute(2, 0, 1)
        shared = features.data_ptr() == x.data_ptr()

        def run() -> None:
            value.copy_(self.sample(rows, dims))
            if not shared:
                coded.copy_(self.code(value, dims))

        return [run]
