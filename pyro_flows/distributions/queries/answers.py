"""``marginal`` and ``conditional`` of a density, as Pyro distributions."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from numbers import Integral
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.ops.provenance import extract_provenance, track_provenance
from torch import Size, Tensor
from torch.distributions import Categorical, constraints
from torch.distributions.constraints import Constraint

from pyro_flows.core.checks import check_tensor, integer, joint_shape, sample_size
from pyro_flows.distributions.queries.estimates import estimate_entropy
from pyro_flows.distributions.queries.line import Line, root
from pyro_flows.distributions.queries.modes import Modes, climb_modes
from pyro_flows.distributions.queries.piece import Piece
from pyro_flows.distributions.queries.rough import FEWEST, Estimate, own_draws, pool, score_of

__all__ = ["Answering", "Conditional", "Marginal"]

Weighted = list[tuple[float, Piece]]
_Dims = int | Sequence[Any] | Tensor


class Answering:
    """What one asks of a density; a mixin of this package's distributions.

    A distribution defines ``_pieces``.

    Example:
        >>> density = pf.Flow(pf.maf(3, order="identity"))()
        >>> density.marginal(0).log_prob(torch.zeros(5, 1)).shape
        torch.Size([5])
        >>> density.conditional(0, [0.5]).sample((10,)).shape
        torch.Size([10, 2])
    """

    def _pieces(self, dims: Sequence[int]) -> Weighted:
        """The densities whose weighted mean this is, with log weights; they may depend on the dimensions asked for."""
        raise NotImplementedError(f"{type(self).__name__}: there are no marginals, conditionals and modes of this kind")

    def _beginning_with(self, dims: Sequence[int]) -> Any:
        """The distribution that answers for these dimensions: this one, unless it knows other orders."""
        return self

    def marginal(self, dims: int | Sequence[Any] | Tensor, *, num_samples: int = 1000, seed: int = 0) -> Marginal:
        """The distribution of some dimensions.

        Args:
            dims: the dimensions, in the order of the result's: an integer, integers, or tuples of indices for events
                of several axes.
            num_samples: draws for each log-density, where there is no closed form.
            seed: the seed of these draws.

        Raises:
            ValueError: for dimensions out of range or twice.
            NotImplementedError: for a density without marginals.

        Example:
            >>> density = pf.Flow(pf.maf(3, order="identity"))()
            >>> pair = density.marginal((0, 1))
            >>> pair.log_prob(torch.zeros(5, 2)).shape
            torch.Size([5])
        """
        return Marginal(self, dims, num_samples=num_samples, seed=seed)

    def conditional(
        self,
        dims: int | Sequence[Any] | Tensor,
        values: Any,
        *,
        of: int | Sequence[Any] | Tensor | None = None,
        num_samples: int = 1000,
        seed: int = 0,
    ) -> Conditional:
        """The distribution of other dimensions at values of these.

        Args:
            dims: as for :meth:`marginal`.
            values: shape ``(*batch, number of dims)``; its batch broadcasts with the distribution's.
            of: the dimensions asked for, by default all others in ascending order.
            num_samples: draws for the log-density of the values, and candidates for draws, without a closed form.
            seed: the seed of the draws for the log-density.

        Raises:
            ValueError: for dimensions out of range, twice or all, and values of another shape.
            NotImplementedError: for a density without conditionals.

        Example:
            >>> density = pf.Flow(pf.maf(3, order="identity"))()
            >>> rest = density.conditional(0, [0.5])
            >>> rest.sample((10,)).shape
            torch.Size([10, 2])
        """
        return Conditional(self, dims, values, of=of, num_samples=num_samples, seed=seed)

    def modes(self, *, num_starts: int = 32, steps: int = 300, seed: int = 0) -> Modes:
        """Searches for the modes by climbing from draws.

        Half of the starts are the best of 1024 draws, the others any.  Adam climbs from all of them at once with a
        falling step, in standardized coordinates on the whole line, and L-BFGS ends it.  What is maximized is the
        density of the data, also behind a constrained end.  A discrete density is searched through if it has at most
        4096 values.  A step costs a density of ``num_starts`` events and its gradient.  There may be higher modes where
        no draw came near.

        Args:
            num_starts: the number of climbs.
            steps: the steps of each.
            seed: the seed of the draws.

        Raises:
            NotImplementedError: for discrete events of more values, and events that are discrete in part.

        Example:
            >>> density = pf.Flow(pf.maf(2))()
            >>> density.modes(num_starts=4, steps=50).points.shape
            torch.Size([1, 2])
        """
        return climb_modes(self, self._pieces(()), num_starts=num_starts, steps=steps, seed=seed)

    @property
    def mode(self) -> Tensor:
        """The highest mode that :meth:`modes` finds, shape ``(*batch, *event)``."""
        return self.modes().points[0]

    def _lines(self) -> list[Line]:
        """The densities on the line, in equal parts, whose mean this is."""
        raise NotImplementedError(
            f"{type(self).__name__}: cdf, icdf and mean are known of flows of one number and ensembles of such; count "
            "among draws, e.g. torch.quantile(d.sample((100_000,)), 0.9, 0) (the result of fit_density has "
            "fit.quantile(q) and fit.interval())"
        )

    def cdf(self: Any, value: Tensor) -> Tensor:
        """The probability of at most a value, of a flow with events of one number, shape ``(*sample, *batch)``.

        The base has a closed form (normals, mixtures of them, Student's t and others with a ``cdf``), and the chain is
        monotone, so the result is exact, at the cost of a density.

        Args:
            value: shape ``(*sample, *batch, *event_shape)``.

        Raises:
            NotImplementedError: for events of several numbers, whole numbers, angles, and other bases.
        """
        given: Any
        given, marks = extract_provenance(value)
        lines = self._lines()
        check_tensor(type(self).__name__, "a tensor", given)
        if self._validate_args and given.numel():
            self._validate_sample(given)
        each = [line.cdf(given) for line in lines]
        return track_provenance(each[0] if len(each) == 1 else torch.stack(each).mean(0), marks)

    def icdf(self: Any, value: Tensor) -> Tensor:
        """The inverse of :meth:`cdf`: the quantile of a probability, shape ``(*sample, *batch, *event_shape)``.

        Args:
            value: probabilities, shape ``(*sample, *batch)``.

        Raises:
            ValueError: for numbers outside of 0 to 1.
            NotImplementedError: as :meth:`cdf`.
        """
        lines = self._lines()
        like = lines[0].law.like
        q = torch.as_tensor(value, dtype=like.dtype, device=like.device) if not isinstance(value, Tensor) else value
        if not ((q >= 0) & (q <= 1)).all():
            raise ValueError(f"icdf: expected probabilities from 0 to 1, got {value}")
        q = q.expand(joint_shape(q.shape, self.batch_shape))
        if len(lines) == 1:
            found = lines[0].icdf(q)
        else:
            with torch.no_grad():  # the members' quantiles enclose that of their mean
                each = torch.stack([line.icdf(q) for line in lines])
            between = each.amin(0), each.amax(0)
            found = root(partial(self._sides, lines), self._score_of, q, between=between).to(like.dtype)
        return found.reshape(found.shape + self.event_shape)

    def _as_event(self: Any, x: Tensor) -> Tensor:
        return x.to(self._lines()[0].law.like.dtype).reshape(x.shape + self.event_shape)

    def _sides(self, lines: list[Line], x: Tensor) -> tuple[Tensor, Tensor]:
        """The probabilities below and above single numbers, of the mean of several densities."""
        below = torch.stack([line.cdf(self._as_event(x)) for line in lines]).double().mean(0)
        return below, 1 - below

    def _score_of(self: Any, x: Tensor) -> Tensor:
        return self.log_prob(self._as_event(x))

    @property
    def mean(self: Any) -> Tensor:
        """The mean, shape ``(*batch, *event_shape)``: of affine flows in closed form, else of events of one number.

        The mean of a nonlinear flow is an integral over the base, by a quadrature of 2049 nodes, to some six digits.

        Raises:
            NotImplementedError: for other densities, and tails so heavy that the integral does not settle.
        """
        means = [line.mean() for line in self._lines()]
        found = torch.stack(means).mean(0)
        return found.expand(self.batch_shape).reshape(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Not known in closed form.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: the variance has no closed form; take that of draws, d.sample((100_000,)).var(0)"
        )

    def entropy(self) -> Tensor:
        """The entropy in nats, by :func:`~pyro_flows.distributions.queries.estimates.estimate_entropy`."""
        return estimate_entropy(self).value


def _numbers(who: str, dims: int | Sequence[Any] | Tensor, event: Size) -> list[int]:
    """Flat indices of dimensions."""
    given: Any = dims.tolist() if isinstance(dims, Tensor) else dims
    given = [given] if isinstance(given, Integral) else list(given)
    found = []
    for each in given:
        index = each if isinstance(each, (tuple, list)) else (each,)
        fits = len(index) == len(event) and all(isinstance(k, Integral) and not isinstance(k, bool) for k in index)
        if not fits or not all(-n <= k < n for k, n in zip(index, event, strict=True)):
            kind = f"integers from 0 to {event[0] - 1}" if len(event) == 1 else f"tuples of indices into {tuple(event)}"
            raise ValueError(f"{who}: expected dims to be {kind}, got {each!r}")
        flat = 0
        for k, n in zip(index, event, strict=True):
            flat = flat * n + int(k) % n
        found.append(flat)
    if not found or len(set(found)) < len(found):
        raise ValueError(f"{who}: expected at least one dimension and none twice, got {given}")
    return found


def _mask(dims: Sequence[int], size: int) -> Tensor:
    some = torch.zeros(size, dtype=torch.bool, device="cpu")
    some[list(dims)] = True
    return some


class _Part(Constraint):
    """What some dimensions may be, the others at values of a draw."""

    event_dim = 1

    def __init__(self, support: Constraint, whole: Tensor, dims: Tensor, event: Size) -> None:
        self.inner, self.whole, self.dims, self.event = support, whole, dims, event
        self.is_discrete = support.is_discrete
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        batch = joint_shape(value.shape[:-1], self.whole.shape[:-1])
        y = self.whole.expand(batch + self.whole.shape[-1:])
        y = y.index_copy(-1, self.dims, value.to(y.dtype).expand(batch + value.shape[-1:]))
        return self.inner.check(y.reshape(batch + self.event))

    def __repr__(self) -> str:
        return f"Part({self.inner})"


class _Answer(TorchDistribution):
    """What marginals and conditionals share.

    Attributes:
        exact: whether log-densities are exact.
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}
    has_rsample = False

    def __init__(
        self, parent: Any, dims: _Dims, num_samples: int, seed: int, values: Any = None, of: _Dims | None = None
    ) -> None:
        who = type(self).__name__.lower()
        self.num_samples, self.seed = integer(who, "num_samples", num_samples, 2), seed
        self.dims = _numbers(who, dims, parent.event_shape)
        with own_draws(seed):
            parent = parent._beginning_with(self.dims)
            self.parent, self.pieces = parent, parent._pieces(self.dims)
            self.some = _mask(self.dims, parent.event_shape.numel())
        self.size = parent.event_shape.numel()
        batch, own = parent.batch_shape, list(self.dims)
        self.values: Tensor | None = None
        values, self._marks = extract_provenance(values)
        if values is not None:
            if len(self.dims) == self.size:
                raise ValueError("conditional: expected dims to leave some dimensions, got all of them")
            like = self.pieces[0][1].reference
            given = values if isinstance(values, Tensor) else torch.as_tensor(values)
            given = given if given.dim() or len(self.dims) > 1 else given.unsqueeze(0)
            if given.dim() == 0 or given.shape[-1] != len(self.dims):
                raise ValueError(
                    f"conditional: expected values of shape (*batch, {len(self.dims)}), one for each of dims, got "
                    f"{tuple(given.shape)}"
                )
            self.values = given.to(like.device, like.dtype)
            batch = joint_shape(batch, given.shape[:-1])
            own = [k for k in range(self.size) if k not in self.dims]
            if of is not None:
                own = _numbers(f"{who}: of", of, parent.event_shape)
                if set(own) & set(self.dims):
                    raise ValueError(
                        f"conditional: expected of to be other dimensions than dims, got {own} and {self.dims}"
                    )
        asked = [self.some, self.some | _mask(own, self.size)]
        self.exact = all([self._is_exact(piece, some) for _, piece in self.pieces for some in asked])
        self.own = torch.tensor(own, device=self.pieces[0][1].reference.device)
        super().__init__(batch, Size((len(own),)), validate_args=False)
        self._validate_args = bool(torch.distributions.Distribution._validate_args)

    @staticmethod
    def _is_exact(piece: Piece, some: Tensor) -> bool:
        closed = piece.closed(some)
        return torch.equal(closed, some) or piece.states(closed & ~some) is not None

    @constraints.dependent_property(event_dim=1)
    def support(self) -> Constraint:
        """The support of one draw."""
        return self._part(self.own, self.values)

    def _part(self, places: Tensor, values: Tensor | None) -> Constraint:
        """What the numbers at these places may be, where ``values`` are those of ``dims``."""
        inner = self.parent.support
        while isinstance(inner, constraints.independent):
            inner = inner.base_constraint
        if inner is constraints.real or inner is constraints.real_vector:
            return constraints.real_vector
        first = self.pieces[0][1]
        with torch.no_grad():
            whole = first.to_outer(first.reference)
        if values is not None:
            batch = joint_shape(whole.shape[:-1], values.shape[:-1])
            whole = first.filled(values, torch.tensor(self.dims), batch)
        return _Part(self.parent.support, whole, places, self.parent.event_shape)

    def expand(self, batch_shape: Size | Iterable[int], _instance: _Answer | None = None) -> _Answer:
        made = copy.copy(self)
        made._batch_shape = Size(batch_shape)
        return made

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density or log-mass in nats, shape ``(*sample, *batch)``; warns where too few draws count."""
        given: Any
        given, marks = extract_provenance(value)
        found = self.estimate(given)
        self._warn(found.effective, "log-densities")
        return track_provenance(found.value, marks | self._marks)

    def _warn(self, effective: Tensor, what: str) -> None:
        """Says where too few draws count."""
        few = int((~(effective >= FEWEST)).sum())  # also where no weight is positive
        if few:
            warnings.warn(
                f"{type(self).__name__.lower()} of dimensions {self.dims}: {few} of {effective.numel()} {what} rest on "
                f"fewer than {FEWEST:.0f} effective draws of {self.num_samples} (least {float(effective.min()):.1f}), "
                "so that they and their errors are rough; raise num_samples, or train a flow in which these dimensions "
                "come first in every layer, e.g. maf(..., order=...)",
                RuntimeWarning,
                stacklevel=3,
            )

    def estimate(self, value: Tensor) -> Estimate:
        """Log-densities with their standard errors and effective numbers of draws, each of shape ``(*sample, *batch)``.

        An error is 0 and an effective number infinite where the density is exact.
        """
        raise NotImplementedError

    def sample(self, sample_shape: int | Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws without gradient, shape ``(*sample, *batch, number of dimensions)``."""
        raise NotImplementedError

    def _admit(self, value: Tensor) -> tuple[Tensor, Size]:
        check_tensor(type(self).__name__.lower(), "a tensor", value)
        if value.dim() == 0 or value.shape[-1] != len(self.own):
            raise ValueError(
                f"{type(self).__name__.lower()}: expected a value with last dimension {len(self.own)}, got shape "
                f"{tuple(value.shape)}"
            )
        if self._validate_args and value.numel():
            self._validate_sample(value)
        return value, joint_shape(value.shape[:-1], self.batch_shape)

    def _given(self, dims: list[int], values: Tensor, batch: Size, seed: int) -> tuple[list[Estimate], Estimate]:
        """Log-densities of values of some dimensions, weighted, of each piece and in all."""
        each, some = [], _mask(dims, self.size)
        for log_weight, piece in self.pieces:
            y = piece.filled(values, torch.tensor(dims), batch)
            if not self.exact:
                with own_draws(self.seed):
                    piece.prepare()
            with own_draws(seed):
                z, slopes = piece.to_inner(y, some)
                found = score_of(piece, z, some, self.num_samples)
            each.append(found._replace(value=found.value + slopes + log_weight))
        if len(each) == 1:
            return each, each[0]
        values_, errors, effective = (torch.stack([*part]) for part in zip(*each, strict=True))
        share = values_.detach().softmax(0)
        error = (share * errors).square().sum(0).sqrt()
        # The least of those that count.
        return each, Estimate(values_.logsumexp(0), error, effective.masked_fill(share < 1e-3, math.inf).amin(0))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(dims={self.dims}, exact={self.exact}, of {type(self.parent).__name__}, "
            f"batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)})"
        )


class Marginal(_Answer):
    r"""The distribution of some dimensions of another one, for ``pyro.sample``.

    Draws are exact: those of the whole, less the other dimensions, at the cost of these.  A log-density is

    - exact, if every layer maps these dimensions from as many on its base side: leading dimensions of layers of one
      order, any dimensions of elementwise layers, and any of affine layers over normals or a mixture of them;
    - exact for a MADE, if its order begins with them (with ``order="any"``: that of other members of the same network),
      or the others before them take at most 4096 values together;
    - else an importance sampling estimate of :math:`\int p(y_S, y_R)\, dy_R` with ``num_samples`` evaluations of the
      density each.  The proposal is the conditional of a mixture of t that is fitted to draws, or for a MADE its own
      conditionals in order, with the given dimensions put in.  Only dimensions on which the given ones depend are
      drawn.  ``estimate`` returns standard errors and effective numbers, and ``log_prob`` warns below 100 of these.

    The same values in the same batch give the same estimate.  It is differentiable in the values and parameters.

    Args:
        parent: the distribution.
        dims, num_samples, seed: as in ``marginal``.

    Example:
        >>> density = pf.Flow(pf.maf(3, order="identity"))()
        >>> pair = density.marginal((0, 1))
        >>> pair.log_prob(pair.sample((5,))).shape
        torch.Size([5])
        >>> pair.exact
        True

    References:
        Monte Carlo theory, methods and examples (Owen, 2013), chapter 9.
    """

    def __init__(
        self, parent: Any, dims: int | Sequence[Any] | Tensor, *, num_samples: int = 1000, seed: int = 0
    ) -> None:
        super().__init__(parent, dims, num_samples, seed)
        self.has_rsample = bool(parent.has_rsample)

    def estimate(self, value: Tensor) -> Estimate:
        value, batch = self._admit(value)
        return self._given(self.dims, value, batch, self.seed)[1]

    def _cut(self, drawn: Tensor) -> Tensor:
        return drawn.flatten(-len(self.parent.event_shape)).index_select(-1, self.own)

    def _whole(self) -> Any:
        same = self.batch_shape == self.parent.batch_shape
        return self.parent if same else self.parent.expand(self.batch_shape)

    def sample(self, sample_shape: int | Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        return self._cut(self._whole().sample(sample_size(sample_shape)))

    def rsample(self, sample_shape: int | Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Reparameterized draws, where the whole has them."""
        return self._cut(self._whole().rsample(sample_size(sample_shape)))


class Conditional(_Answer):
    r"""The distribution of other dimensions at values of some, for ``pyro.sample``.

    :math:`\log p(y_R \mid y_S) = \log p(y_R, y_S) - \log p(y_S)`, where both are those of a :class:`Marginal`, exact or
    with an error; the first is that of the whole density unless ``of`` leaves dimensions out.  Where the marginal of
    ``dims`` is exact, so are draws: they fix the given dimensions and sample the rest of the base, or of the order.
    Else draws are ``num_samples`` candidates of the marginal's proposal, resampled by their weights; a batch of
    candidates gives at most a quarter of its number of draws, which repeat if few are effective.  Dimensions on which
    the given ones do not depend are drawn exactly after that.

    Args:
        parent: the distribution.
        dims, values, of, num_samples, seed: as in ``conditional``.

    Example:
        >>> density = pf.Flow(pf.maf(3, order="identity"))()
        >>> rest = density.conditional(0, [0.5])  # of the other two
        >>> rest.sample((10,)).shape
        torch.Size([10, 2])
        >>> rest.exact
        True

    References:
        Using the SIR algorithm to simulate posterior distributions (Rubin, 1988).
    """

    values: Tensor

    def __init__(
        self,
        parent: Any,
        dims: int | Sequence[Any] | Tensor,
        values: Any,
        *,
        of: int | Sequence[Any] | Tensor | None = None,
        num_samples: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__(parent, dims, num_samples, seed, values, of)
        allowed = self._part(torch.tensor(self.dims, device=self.own.device), None)
        if self._validate_args and not allowed.check(self.values).all():
            raise ValueError(
                f"conditional: expected values within the support ({allowed}), got some outside of it, or NaN"
            )

    @property
    def evidence(self) -> Estimate:
        """The log-density of the given values, shape of the batch."""
        batch = joint_shape(self.values.shape[:-1], self.parent.batch_shape)
        return self._given(self.dims, self.values, batch, self.seed)[1]

    def estimate(self, value: Tensor) -> Estimate:
        value, batch = self._admit(value)
        evidence = self.evidence
        parts = (self.values.expand(*batch, len(self.dims)), value.to(self.values.dtype).expand(*batch, len(self.own)))
        # Other draws than those of the evidence, so that errors add up.
        joint = self._given([*self.dims, *self.own.tolist()], torch.cat(parts, -1), batch, self.seed + 1)[1]
        error = (joint.error.square() + evidence.error.square()).sqrt()
        return Estimate(joint.value - evidence.value, error, torch.minimum(joint.effective, evidence.effective))

    @torch.no_grad()
    def sample(self, sample_shape: int | Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        shape = sample_size(sample_shape)
        count = shape.numel()
        batch = self.batch_shape
        drawn = [self._draws(piece, count, batch) for _, piece in self.pieces]
        found = drawn[0]
        if len(drawn) > 1:  # each draw is of a piece, by the densities of the values
            each = torch.stack([part.value for part in self._given(self.dims, self.values, batch, self.seed)[0]], -1)
            which = Categorical(logits=each, validate_args=False).sample(Size((count,)))
            index = which[None, ..., None].expand(1, *which.shape, self.size)
            found = torch.stack(drawn).gather(0, index)[0]
        drawn_rest = found.index_select(-1, self.own).reshape(shape + batch + self.event_shape)
        return track_provenance(drawn_rest, self._marks)

    def _draws(self, piece: Piece, count: int, batch: Size) -> Tensor:
        """Whole events with the given values, shape ``(count, *batch, n)``."""
        places = torch.tensor(self.dims)
        y = piece.filled(self.values, places, batch)
        z = piece.to_inner(y, self.some)[0]
        closed = piece.closed(self.some)
        if torch.equal(closed, self.some):
            z = z.expand(count, *z.shape)
        else:
            parts, left = [z.new_empty(0, *z.shape)], count
            states = piece.states(closed & ~self.some)
            while left:
                some = left if states is not None else min(left, -(-self.num_samples // 4))
                candidates, log_weights = pool(piece, z, self.some, closed, self.num_samples)
                if len(parts) == 1 and states is None:
                    self._warn((2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp(), "draws")
                log_weights = torch.where(log_weights.isneginf().all(0), 0.0, log_weights).movedim(0, -1)
                which = Categorical(logits=log_weights, validate_args=False).sample(Size((some,)))
                parts.append(candidates.gather(0, which.unsqueeze(-1).expand(*which.shape, self.size)))
                left -= some
            z = torch.cat(parts)
        y = piece.to_outer(piece.complete(z, closed))
        return y.index_copy(-1, places.to(y.device), self.values.expand(*y.shape[:-1], len(places)))
