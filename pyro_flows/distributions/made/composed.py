"""Heads made of Pyro's distributions or of other heads."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to, constraints
from torch.distributions.constraints import Constraint

from pyro_flows.core.checks import choice
from pyro_flows.distributions.made.head import Calls, Head
from pyro_flows.distributions.made.heads import BernoulliHead, LogisticMixtureHead, MixtureHead, NormalHead

__all__ = ["DistributionHead", "MixedHead", "as_head"]

_T = TypeVar("_T")

NAMED: dict[str, type[Head]] = {
    "bernoulli": BernoulliHead,
    "logistic": LogisticMixtureHead,
    "mixture": MixtureHead,
    "normal": NormalHead,
}


def as_head(head: str | Head, input_dim: int) -> Head:
    """Binds a head, or the head of a name, to a number of dimensions.

    Raises:
        ValueError: for an unknown name, or a head that does not fit.
        TypeError: for anything else.
    """
    if isinstance(head, str):
        if head == "categorical":
            raise ValueError(
                'the head "categorical" needs numbers of classes: give CategoricalHead(num_classes=...), with one '
                "number for all dimensions or a list"
            )
        head = NAMED[choice("", "head", head, NAMED, "a head")]()
    if not isinstance(head, Head):
        raise TypeError(f"expected a head such as BernoulliHead() or a name, got {head!r}")
    return head.bind(input_dim)


def _arguments(constrained: Mapping[str, object], fixed: Iterable[str]) -> list[str]:
    """The names to learn: ``logits`` in place of ``probs``."""
    names = [name for name in constrained if name not in fixed]
    for short, long in (("probs", "logits"), *((name, f"{name}_logits") for name in names)):
        if short in names and long in names:
            names.remove(short)
    return names


class DistributionHead(Head):
    r"""Any univariate distribution of Pyro: ``DistributionHead(dist.Gamma)``.

    ``biject_to`` maps one parameter to each learned argument, by the argument's constraint (a positive argument is
    :math:`e^\theta`); logits are learned in place of ``probs``.  The network sees counts as :math:`\log(1 + x)` (with
    the sign of x), other values unchanged.  NaN gives NaN.

    Args:
        distribution: the class, or a function of named arguments that makes a distribution.
        arguments: the names to learn, by default all but the fixed; for a function, a dictionary of names and
            constraints.
        fixed: values of the other arguments, numbers or tensors of shape ``(input_dim,)``, e.g.
            ``{"total_count": 10}``.

    Raises:
        TypeError: for neither a class of distributions nor a function with constraints.
        ValueError: for a distribution of vectors, arguments that are not real numbers, or a support that depends on
            learned arguments.

    Example:
        >>> counts = pf.distributions.DistributionHead(dist.Poisson)
        >>> made = pf.MADE(3, counts)
        >>> made.sample((5,)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        distribution: Callable[..., Distribution],
        arguments: Iterable[str] | Mapping[str, Constraint] | None = None,
        *,
        fixed: Mapping[str, float | Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.distribution, self.name = distribution, getattr(distribution, "__name__", repr(distribution))
        self._is_class = isinstance(distribution, type) and issubclass(distribution, Distribution)
        fixed = {} if fixed is None else dict(fixed)
        if not isinstance(arguments, Mapping):
            known: Any = getattr(distribution, "arg_constraints", None)
            if self._is_class and not isinstance(known, Mapping):
                raise ValueError(
                    f"DistributionHead: the constraints of {self.name}'s arguments depend on one another; give a "
                    "dictionary of those to learn and their constraints"
                )
            if not self._is_class:
                raise TypeError(
                    "DistributionHead: expected a class of distributions such as pyro.distributions.Gamma, or a "
                    f"function together with a dictionary of its arguments' constraints, got {distribution!r}"
                )
            names = _arguments(known, fixed) if arguments is None else list(arguments)
            unknown = [name for name in (*names, *fixed) if name not in known]
            if unknown:
                raise ValueError(f"DistributionHead: {self.name} has no arguments {unknown}, but {list(known)}")
            arguments = {name: known[name] for name in names}
        if not arguments:
            raise ValueError(f"DistributionHead: {self.name} is left without an argument to learn")
        self.arguments = tuple(arguments)
        self.maps = [self._map(name, constraint) for name, constraint in arguments.items()]
        self.num_params = len(self.maps)
        self.fixed = tuple(fixed)
        for name, value in fixed.items():
            self.register_buffer(f"fixed_{name}", self.floating(torch.as_tensor(value)), persistent=False)
        self._probe()

    def _map(self, name: str, constraint: Any) -> Callable[[Tensor], Tensor]:
        hint = f'fix it by fixed={{"{name}": ...}} or name the arguments to learn by arguments=[...]'
        if isinstance(constraint, Constraint) and constraint.event_dim > 0:
            raise ValueError(
                f"DistributionHead: the argument {name} of {self.name} is a vector; take CategoricalHead(num_classes="
                f"...) for categories, or {hint}"
            )
        try:
            return biject_to(constraint)
        except (NotImplementedError, AttributeError):
            raise ValueError(
                f"DistributionHead: the argument {name} of {self.name} has the constraint {constraint}, to which no "
                f"real number can be mapped; {hint}"
            ) from None

    def _probe(self) -> None:
        """Determines the shape, support and kind of draws."""
        size = max([1, *(getattr(self, f"fixed_{name}").numel() for name in self.fixed)])
        first, other = (self._made(self.like.new_full((size, self.num_params), at), None) for at in (0.0, 0.3))
        if first.event_shape or first.batch_shape != (size,):
            raise ValueError(
                f"DistributionHead: expected a distribution of single numbers, one for each of {size}, but "
                f"{self.name} has batch shape {tuple(first.batch_shape)} and event shape {tuple(first.event_shape)}"
            )
        support = first.support
        if not isinstance(support, Constraint) or str(support) != str(other.support):
            raise ValueError(
                f"DistributionHead: the support of {self.name} depends on learned arguments; fix those that it "
                'depends on by fixed={"name": ...}'
            )
        self.discrete, self.has_rsample = support.is_discrete, bool(first.has_rsample)
        self._counts = self.discrete and support is not constraints.boolean
        depends = any(isinstance(held, Tensor) for held in vars(support).values())
        self.constraint = None if depends else support

    def _settle(self, input_dim: int) -> None:
        for name in self.fixed:
            shape = getattr(self, f"fixed_{name}").shape
            if shape not in ((), (input_dim,)):
                raise ValueError(
                    f"DistributionHead: expected {name} to be a number or of shape ({input_dim},), got {tuple(shape)}"
                )

    def tiled(self, places: int) -> Head:
        made = copy.deepcopy(self)
        for name in self.fixed:
            value = getattr(self, f"fixed_{name}")
            setattr(made, f"fixed_{name}", value if value.dim() == 0 else value.repeat_interleave(places))
        made._input_dim = None
        return made.bind(self.input_dim * places)

    def _made(self, params: Tensor, dims: Tensor | None) -> Distribution:
        given = {name: move(raw) for name, move, raw in zip(self.arguments, self.maps, params.unbind(-1), strict=True)}
        for name in self.fixed:
            value = getattr(self, f"fixed_{name}").to(params.dtype)
            given[name] = value if dims is None or value.dim() == 0 else value[dims]
        return self.distribution(**given, validate_args=False) if self._is_class else self.distribution(**given)

    def log_prob(self, value: Tensor, params: Tensor, dims: Tensor | None = None) -> Tensor:
        value = value.to(params.dtype)
        logp = self._made(params, dims).log_prob(value)
        return torch.where(value.isnan() | params.isnan().any(-1), logp.new_full((), torch.nan), logp)

    def sample(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return self._made(params, dims).sample().to(params.dtype)

    def rsample(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        return self._made(params, dims).rsample() if self.has_rsample else super().rsample(params, dims)

    def mean(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        return self._made(params, dims).mean

    def inside(self, value: Tensor, dims: Tensor | None = None) -> Tensor:
        if self.constraint is not None:
            return super().inside(value, dims)
        value = self.floating(value)
        support: Any = self._made(value.new_zeros(*value.shape, self.num_params), dims).support
        return support.check(value)

    def allowed(self, dim: int) -> str:
        return f"a value in the support of {self.name}"

    def code(self, value: Tensor, dims: Tensor | None = None) -> Tensor:
        return (value.sign() * value.abs().log1p() if self._counts else value).unsqueeze(-1)

    def fixed_points(self) -> list[float]:
        """The fixed points; infinity unless the family learns the arguments that absorb a change of units."""
        points = super().fixed_points()
        learned = set(self.arguments)
        moves = {"loc", "scale"} <= learned if math.isnan(points[0]) else bool({"loc", "scale", "rate"} & learned)
        return points if moves else [math.inf] * self.input_dim

    def extra_repr(self) -> str:
        return f"{self.name}, {list(self.arguments)}"


class MixedHead(Head):
    """Different heads on different dimensions: ``MixedHead([("bernoulli", [0, 3]), (CategoricalHead(4), [1, 2])])``.

    The numbers of parameters and features are the largest of any head; excess ones are ignored or zero.

    Args:
        heads: pairs or a dictionary of heads, or their names, with their dimensions.

    Raises:
        ValueError: unless the dimensions are 0 to D - 1, each once.

    Example:
        >>> head = pf.distributions.MixedHead([("normal", [0, 1]), ("bernoulli", [2])])
        >>> x = pf.MADE(3, head).sample((5,))
        >>> bool(((x[:, 2] == 0) | (x[:, 2] == 1)).all())
        True
    """

    heads: Any  # an nn.ModuleList of heads
    owner: Tensor
    local: Tensor
    back: Tensor

    def __init__(self, heads: Mapping[str | Head, Sequence[int]] | Iterable[tuple[str | Head, Sequence[int]]]) -> None:
        super().__init__()
        pairs = list(heads.items() if isinstance(heads, Mapping) else heads)
        places = [[int(dim) for dim in dims] for _, dims in pairs]
        every = sorted(dim for dims in places for dim in dims)
        if not every or every != list(range(len(every))) or not all(places):
            raise ValueError(
                "MixedHead: expected each dimension from 0 on with exactly one head, and a dimension for each head, "
                f"got dimensions {places}"
            )
        self.heads = nn.ModuleList(as_head(head, len(dims)) for (head, _), dims in zip(pairs, places, strict=True))
        self.places = places
        # Each dimension's head, and its place there.
        owner, local = torch.empty(len(every), dtype=torch.long), torch.empty(len(every), dtype=torch.long)
        for j, dims in enumerate(places):
            owner[dims], local[dims] = j, torch.arange(len(dims))
            self.register_buffer(f"places_{j}", torch.tensor(dims), persistent=False)
        self.register_buffer("owner", owner, persistent=False)
        self.register_buffer("local", local, persistent=False)
        together = torch.tensor([dim for dims in places for dim in dims])
        self.register_buffer("back", torch.argsort(together), persistent=False)
        self.num_params = max(head.num_params for head in self.heads)
        self.num_features = max(head.num_features for head in self.heads)
        self.discrete = all(head.discrete for head in self.heads)
        self.has_rsample = all(head.has_rsample for head in self.heads)

    def _settle(self, input_dim: int) -> None:
        if input_dim != len(self.owner):
            raise ValueError(f"MixedHead: expected heads for {input_dim} dimensions, got them for {len(self.owner)}")

    def tiled(self, places: int) -> Head:
        spread = [[dim * places + k for dim in dims for k in range(places)] for dims in self.places]
        made = MixedHead([(head.tiled(places), dims) for head, dims in zip(self.heads, spread, strict=True)])
        return made.to(self.like).bind(self.input_dim * places)

    def _spread(self, each: Sequence[Sequence[_T]]) -> list[_T]:
        """Merges the heads' entries by dimension."""
        return [each[owner][own] for owner, own in zip(self.owner.tolist(), self.local.tolist(), strict=True)]

    def discrete_dims(self) -> list[bool]:
        return self._spread([head.discrete_dims() for head in self.heads])

    def num_values(self) -> list[int | None]:
        return self._spread([head.num_values() for head in self.heads])

    def fixed_points(self) -> list[float]:
        return self._spread([head.fixed_points() for head in self.heads])

    def _each(
        self, dims: Tensor | None, call: Callable[[Head, Tensor, Tensor | None], Tensor], axis: int = -1
    ) -> Tensor:
        """Joins ``call(head, columns, the head's dims)`` along an axis, in the order of ``dims``."""
        if dims is None:
            parts = [call(head, getattr(self, f"places_{j}"), None) for j, head in enumerate(self.heads)]
            return torch.cat(parts, axis).index_select(axis, self.back)
        owner, parts, places = self.owner[dims], [], []
        for j, head in enumerate(self.heads):
            columns = (owner == j).nonzero().squeeze(-1)
            if len(columns):
                parts.append(call(head, columns, self.local[dims[columns]]))
                places.append(columns)
        return torch.cat(parts, axis).index_select(axis, torch.argsort(torch.cat(places)))

    def log_prob(self, value: Tensor, params: Tensor, dims: Tensor | None = None) -> Tensor:
        return self._each(
            dims, lambda head, at, own: head.log_prob(value.index_select(-1, at), _own(head, params, at), own)
        )

    def sample(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        return self._each(dims, lambda head, at, own: head.sample(_own(head, params, at), own))

    def rsample(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        if not self.has_rsample:
            return super().rsample(params, dims)
        return self._each(dims, lambda head, at, own: head.rsample(_own(head, params, at), own))

    def mean(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        return self._each(dims, lambda head, at, own: head.mean(_own(head, params, at), own))

    def relaxed(self, temperature: float) -> Head:
        """A copy with the discrete heads relaxed."""
        heads = [head if head.has_rsample else head.relaxed(temperature) for head in self.heads]
        mixed = MixedHead(list(zip(heads, self.places, strict=True)))
        return mixed if self._input_dim is None else mixed.bind(self._input_dim)

    def inside(self, value: Tensor, dims: Tensor | None = None) -> Tensor:
        return self._each(dims, lambda head, at, own: head.inside(value.index_select(-1, at), own))

    def allowed(self, dim: int) -> str:
        return self.heads[int(self.owner[dim])].allowed(int(self.local[dim]))

    def code(self, value: Tensor, dims: Tensor | None = None) -> Tensor:
        def one(head: Head, at: Tensor, own: Tensor | None) -> Tensor:
            return F.pad(head.code(value.index_select(-1, at), own), (0, self.num_features - head.num_features))

        return self._each(dims, one, -2)

    def start(self, data: Tensor | None) -> Tensor:
        def one(head: Head, at: Tensor, own: Tensor | None) -> Tensor:
            made = head.start(None if data is None else data.index_select(-1, at))
            return F.pad(made, (0, self.num_params - head.num_params))

        return self._each(None, one, -2)

    def locations(self) -> Tensor:
        def one(head: Head, at: Tensor, own: Tensor | None) -> Tensor:
            return F.pad(head.locations(), (0, self.num_params - head.num_params))

        return self._each(None, one, -2)

    def normal(self, loc: Tensor, scale: Tensor) -> Tensor:
        def one(head: Head, at: Tensor, own: Tensor | None) -> Tensor:
            made = head.normal(loc.index_select(0, at), scale.index_select(0, at))
            return F.pad(made, (0, self.num_params - head.num_params))

        return self._each(None, one, -2)

    def draws(self, dims: Tensor, z: Tensor, params: Tensor, x: Tensor, features: Tensor) -> Calls:
        calls: Calls = []
        for k, dim in enumerate(dims.tolist()):
            head, own, one = self.heads[int(self.owner[dim])], self.local[dim : dim + 1], slice(k, k + 1)
            coded = features[k * self.num_features : (k + 1) * self.num_features]
            used = coded[: head.num_features]
            calls += head.draws(own, z[one], params[one, : head.num_params], x[one], used)
            if head.num_features < self.num_features:
                calls.append(partial(coded[head.num_features :].zero_))
        return calls


def _own(head: Head, params: Tensor, at: Tensor) -> Tensor:
    return params.index_select(-2, at)[..., : head.num_params]
