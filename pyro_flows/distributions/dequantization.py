"""Discrete pixels by continuous densities, and bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_flows.core.checks import check_context, event_size, integer, refuse_as_site, sample_size, wrong_event
from pyro_flows.core.modes import plain_eager
from pyro_flows.core.recipes import remembered
from pyro_flows.core.transform import FlowTransform
from pyro_flows.distributions.flow import Flow
from pyro_flows.distributions.noise import counted_uniform, fresh_uniform, from_uniform, grid_bits
from pyro_flows.distributions.queries.answers import Weighted
from pyro_flows.distributions.shared import SharedDistribution
from pyro_flows.transforms.pixels import LogitPixels

__all__ = ["Dequantized", "DequantizedDistribution", "bits_per_dim"]

_AT_ONCE = 2**16  # numbers scored at once


def bits_per_dim(
    log_prob: Tensor | float, event_shape: int | Iterable[int], levels: int | None = None
) -> Tensor | float:
    r"""Bits per dimension, :math:`-\log p / (D \log 2)`, of log-densities or log-masses in nats; keeps their shape.

    Papers report it in units of levels, where a density of 1 per level costs no bits.

    Args:
        log_prob: in nats, any shape.
        event_shape: shape of one image, with :math:`D` entries; channels count as dimensions.
        levels: :math:`L` for densities of intensities scaled to :math:`[0, 1]`, which adds :math:`\log_2 L` (8 for 256
            levels, 4.09 for 17); ``None`` for densities of intensities in units of levels, :math:`v \in [0, L)`, or
            masses of whole levels, as from :class:`~pyro_flows.transforms.pixels.LogitPixels` and :class:`Dequantized`.

    Raises:
        ValueError: for ``levels`` below 2, or sizes that are no positive integers.

    Example:
        >>> uniform = torch.log(torch.tensor(1 / 256)) * 64  # each of 64 pixels
        >>> round(pf.bits_per_dim(uniform, (1, 8, 8)).item(), 3)
        8.0
    """
    offset = 0.0 if levels is None else math.log2(integer("bits_per_dim", "levels", levels, 2))
    return log_prob * (-1 / (event_size(event_shape).numel() * math.log(2))) + offset


class DequantizedDistribution(SharedDistribution):
    """Integer images for ``pyro.sample``: made by :class:`Dequantized`, whose parameters it shares.

    Example:
        >>> model = pf.Dequantized(pf.Chain([pf.LogitPixels(4, levels=16)]), levels=16)
        >>> with pyro.plate("rows", 5):
        ...     pixels = pyro.sample("pixels", model())
        >>> pixels.shape
        torch.Size([5, 4])
    """

    def _admit(self, value: Tensor) -> Tensor:
        return self.model.whole(value, self._validate_args)

    def _scores(self, value: Tensor) -> Tensor:
        return self.model._terms(value, self.context)

    def _pieces(self, dims: Sequence[int]) -> Weighted:
        raise NotImplementedError(
            "Dequantized: the log-mass of pixels is a bound, which has no marginals, conditionals and modes; ask "
            "the density of their intensities, dequantized.flow()"
        )

    def _draw(self, sample_shape: Size) -> Tensor:
        """Draws, of 64-bit integers."""
        shape = sample_shape + self.batch_shape
        given = (shape,) if self.context is None else (sample_shape, self.context)
        drawn = self.model.flow.sample(*given).reshape(shape + self.event_shape)
        if plain_eager() and not drawn.isfinite().all():
            raise FloatingPointError(
                f"Dequantized: {int((~drawn.isfinite()).sum())} of {drawn.numel()} numbers that the flow drew are not "
                "finite; locate_nonfinite says where that begins"
            )
        return drawn.floor().clamp(0, self.model.levels - 1).long()


@remembered
class Dequantized(nn.Module):
    r"""A distribution of integer pixels by a density of intensities: :math:`P(n) = \int_{[n, n + 1)^D} p(v)\,dv`.

    Scores are a lower bound, estimated by noise :math:`u` within the pixels:

    .. math:: \log P(n) \ge E\left[\log \frac{1}{K} \sum_{k=1}^{K} \frac{p(n + u_k)}{q(u_k \mid n)}\right],

    with :math:`u_k` uniform (:math:`q = 1`) or drawn from a ``dequantizer``.  The bound holds in expectation and
    tightens with :math:`K`; if :math:`q` is the posterior of the noise, one draw is exact.

    In training mode each call draws fresh noise.  In evaluation mode noise depends only on the seed, the number of the
    draw and the row's pixels: a row always has the same score, on any device and in any batch, and no generator's state
    changes.

    A call returns a Pyro distribution over whole numbers that shares the parameters: ``pyro.sample("x", deq())``, or
    ``deq(context)`` if the flow takes one.  A score costs ``num_noise_samples`` scores of the flow (and draws of the
    dequantizer), a draw one draw of the flow, which is rounded down.

    Args:
        flow: a :class:`~pyro_flows.distributions.flow.Flow` of intensities in units of levels, e.g. ``Flow(Chain([...,
            LogitPixels(event_shape, levels)]))``; a flow transform, which gets a standard normal base; or any module
            with ``event_shape``, ``log_prob`` (and ``sample``).
        levels: the number of values of a pixel: 0, 1, ..., ``levels - 1``.
        num_noise_samples: :math:`K`.
        dequantizer: :math:`q`, a :class:`~pyro_flows.distributions.noise.Dequantizer` or another module that maps
            pixels scaled to (-1, 1) to a distribution; ``None`` for uniform noise.
        seed: the seed of the noise in evaluation mode.
        name: the name in Pyro's param store, for :meth:`model` and :meth:`guide`.

    Raises:
        ValueError: for a flow whose data are not pixels of these levels, or settings out of range.
        TypeError: for a module without ``event_shape`` or ``log_prob``.

    Example:
        >>> chain = pf.Chain([*pf.realnvp(4), pf.LogitPixels(4, levels=16)])
        >>> model = pf.Dequantized(pf.Flow(chain), levels=16).eval()
        >>> pixels = model.sample((5,))
        >>> model.log_prob(pixels).shape  # a lower bound of log-masses
        torch.Size([5])

    References:
        A note on the evaluation of generative models (Theis et al., 2015), arXiv:1511.01844.
        Flow++ (Ho et al., 2019), section 3.1, arXiv:1902.00275.
    """

    flow: Any  # a Flow, or another module with log_prob and, for draws, sample

    def __init__(
        self,
        flow: FlowTransform | nn.Module,
        levels: int = 256,
        num_noise_samples: int = 1,
        dequantizer: nn.Module | None = None,
        seed: int = 0,
        *,
        name: str = "dequantized",
    ) -> None:
        super().__init__()
        self.levels = integer("Dequantized", "levels", levels, 2)
        self.num_noise_samples = integer("Dequantized", "num_noise_samples", num_noise_samples)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"Dequantized: expected seed to be an integer, got {seed!r}")
        self.seed, self.name = seed, name
        flow = Flow(flow).train(flow.training) if isinstance(flow, FlowTransform) else flow
        event = getattr(flow, "event_shape", None)
        known = isinstance(flow, nn.Module) and callable(getattr(flow, "log_prob", None))
        if not known or not isinstance(event, (tuple, list)):
            raise TypeError(
                "Dequantized: expected a Flow, or another module with log_prob and event_shape, got "
                f"{type(flow).__name__}"
            )
        self.flow, self.event_shape = flow, Size(event)
        self._fit()
        if not isinstance(dequantizer, (nn.Module, type(None))):
            raise TypeError(f"Dequantized: expected dequantizer to be a module, got {type(dequantizer).__name__}")
        own = getattr(dequantizer, "event_shape", self.event_shape)
        if own != self.event_shape:
            raise ValueError(
                f"Dequantized: expected a dequantizer of event shape {tuple(self.event_shape)}, got {tuple(own)}"
            )
        self.dequantizer = dequantizer

    def arguments(self) -> tuple[tuple[object, ...], dict[str, object]]:
        """The constructor's arguments."""
        own = self.flow, self.levels, self.num_noise_samples, self.dequantizer, self.seed
        return own, {"name": self.name}

    def _fit(self) -> None:
        """Refuses a flow whose data cannot be pixels of these levels."""
        for part in self.flow.modules():
            if isinstance(part, LogitPixels) and part.levels != self.levels:
                raise ValueError(
                    f"Dequantized: expected a flow of pixels with {self.levels} levels, got LogitPixels with "
                    f"levels={part.levels}; give both the same"
                )
        reached = self.flow.chain.codomain if isinstance(self.flow, Flow) else constraints.dependent
        if constraints.is_dependent(reached) or self._like().is_meta:
            return
        # The least and the greatest noise.
        step = 2.0 ** -(grid_bits(self.levels, self._like().dtype) + 1)
        corners = (step, self.levels - step)
        if not all(bool(reached.check(self._like().new_full(self.event_shape, end)).all()) for end in corners):
            raise ValueError(
                f"Dequantized: expected a flow onto intensities from 0 to {self.levels}, got one onto {reached}; end "
                f"the chain in LogitPixels({tuple(self.event_shape)}, levels={self.levels})"
            )

    def _like(self) -> Tensor:
        """A tensor of the flow's dtype and device."""
        held = (t for t in (*self.flow.parameters(), *self.flow.buffers()) if t.is_floating_point())
        return next(held, torch.zeros((), device="cpu"))

    @property
    def context_dim(self) -> int:
        """Size of the context, 0 for none."""
        return getattr(self.flow, "context_dim", 0)

    @property
    def support(self) -> Constraint:
        """Support of one image."""
        return constraints.independent(constraints.integer_interval(0, self.levels - 1), len(self.event_shape))

    def forward(self, context: Tensor | None = None) -> DequantizedDistribution:
        """The distribution, at a context of shape ``(*batch, context_dim)`` if the flow takes one."""
        refuse_as_site(self)
        return DequantizedDistribution(self, self._admit(context))

    condition = forward

    def log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Lower bound in nats of the log-mass, of the shape to which value and context broadcast.

        Example:
            >>> model = pf.Dequantized(pf.Chain([pf.LogitPixels(4, levels=16)]), levels=16)
            >>> bound = model.eval().log_prob(torch.randint(16, (5, 4)))
            >>> pf.bits_per_dim(bound, 4).shape
            torch.Size([5])
        """
        return self(context).log_prob(value)

    def sample(self, sample_shape: int | Size | tuple[int, ...] = (), context: Tensor | None = None) -> Tensor:
        """Draws, of 64-bit integers, shape ``(*sample_shape, *context_batch, *event_shape)``."""
        return self(context).sample(sample_size(sample_shape))

    def scores(
        self,
        value: Tensor,
        context: Tensor | None = None,
        num_noise_samples: int | None = None,
        fresh: bool | None = None,
    ) -> Tensor:
        r"""Scores :math:`\log p(n + u_k) - \log q(u_k \mid n)` in nats, shape ``(num_noise_samples, *batch)``.

        Args:
            value: whole numbers, shape ``(*batch, *event_shape)``.
            context: shape ``(*batch, context_dim)``, if the flow takes one.
            num_noise_samples: the number of draws of the noise, by default the module's.
            fresh: whether noise is fresh, by default in training mode.
        """
        return self._terms(self.whole(value), self._admit(context), num_noise_samples, fresh)

    def whole(self, value: Tensor, validate: bool = True) -> Tensor:
        """Checks pixels and returns them as 64-bit integers.

        Raises:
            TypeError: for values that are no tensor of real numbers.
            ValueError: for another shape, fractions, NaN, or numbers outside the levels.
        """
        if not isinstance(value, Tensor) or value.is_complex():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"Dequantized: expected a tensor of whole numbers, got {kind}")
        cut = value.dim() - len(self.event_shape)
        if cut < 0 or value.shape[cut:] != self.event_shape:
            raise ValueError(wrong_event(self, value.shape, self.event_shape))
        if validate and value.numel() and plain_eager() and not value.is_meta:
            self._refuse_other(value)
        return value.long()

    def _refuse_other(self, value: Tensor) -> None:
        wrong = (value < 0) | (value > self.levels - 1)
        if value.is_floating_point():
            wrong |= value != value.floor()  # NaN as well
        if not wrong.any():
            return
        where = tuple(wrong.nonzero()[0].tolist())
        hint = "give the model the levels that the data have, or leave such rows out"
        if value.is_floating_point() and value.isfinite().all():
            if value.min() >= 0 and value.max() <= 1:
                hint = f"pixels scaled to [0, 1] want (value * {self.levels - 1}).round() first"
            elif (value != value.floor()).any():
                hint = "round them, or score intensities that are dequantized already by the flow itself"
        raise ValueError(
            f"Dequantized: expected whole numbers from 0 to {self.levels - 1} (levels={self.levels}), got "
            f"{value[where].item():g} at {where} ({int(wrong.sum())} such in {wrong.numel()}); {hint}"
        )

    def _admit(self, context: Tensor | None) -> Tensor | None:
        check_context(self, context)
        return context

    def intensities(self, value: Tensor, num_noise_samples: int | None = None, fresh: bool | None = None) -> Tensor:
        """Pixels with noise, the flow's data, shape ``(num_noise_samples, *batch, *event)``."""
        return torch.cat([v for v, _ in self._noisy(self.whole(value), num_noise_samples, fresh)])

    def _terms(
        self, value: Tensor, context: Tensor | None, number: int | None = None, fresh: bool | None = None
    ) -> Tensor:
        scores = []
        for v, log_q in self._noisy(value, number, fresh):
            # A module may take rows only.
            one = len(v) == 1
            score = self._density(v[0], context)[None] if one else self._density(v, context)
            scores.append(score if log_q is None else score - log_q)
        return torch.cat(scores)

    def _noisy(self, value: Tensor, number: int | None, fresh: bool | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Intensities and the log-density of their noise, ``None`` for zero."""
        number = self.num_noise_samples if number is None else integer("Dequantized", "num_noise_samples", number)
        fresh = self.training if fresh is None else fresh
        numbers = value.to(self._like().dtype)
        q = None if self.dequantizer is None else self.dequantizer(self._centered(numbers))
        bits = grid_bits(1 if q is not None else self.levels, numbers.dtype)
        size = max(_AT_ONCE // max(numbers.numel(), 1), 1) if isinstance(self.flow, Flow) else 1
        for first in range(0, number, size):
            some = range(first, min(first + size, number))
            if not fresh:
                u = counted_uniform(value, len(self.event_shape), self.seed, some, bits, numbers.dtype)
                u, log_q = (u, None) if q is None else from_uniform(q, u)
            elif q is None:
                u, log_q = fresh_uniform(Size((len(some), *numbers.shape)), bits, numbers), None
            else:
                u, log_q = q.rsample_and_log_prob(Size((len(some),)))
            yield self._within(numbers, u), log_q

    def _density(self, intensities: Tensor, context: Tensor | None) -> Tensor:
        return self.flow.log_prob(intensities) if context is None else self.flow.log_prob(intensities, context)

    def _within(self, numbers: Tensor, u: Tensor) -> Tensor:
        """Intensities that stay inside their pixels when rounded."""
        edge = 2.0 ** -(grid_bits(self.levels, numbers.dtype) + 1)
        return numbers + u.clamp(edge, 1 - edge)

    def _centered(self, numbers: Tensor) -> Tensor:
        return (numbers + 0.5) * (2 / self.levels) - 1

    def model(self, value: Tensor, context: Tensor | None = None) -> None:
        """The model of rows of pixels whose latent site ``"noise"`` is uniform within them.

        With :meth:`guide`, ``SVI(deq.model, deq.guide, optim, Trace_ELBO())`` trains flow and dequantizer; the ELBO is
        distributed as the sum of :meth:`log_prob` with one fresh draw.  Shapes are ``(rows, *event_shape)`` and
        ``(rows, context_dim)``.
        """
        numbers, context = self._rows(value).to(self._like().dtype), self._admit(context)
        with pyro.plate("rows", len(numbers)):
            u = pyro.sample("noise", self._uniform(numbers))
            pyro.factor("pixels", self._density(self._within(numbers, u), context))

    def guide(self, value: Tensor, context: Tensor | None = None) -> None:
        """The guide of :meth:`model`: noise from the dequantizer, uniform without one."""
        numbers = self._rows(value).to(self._like().dtype)
        q = self._uniform(numbers) if self.dequantizer is None else self.dequantizer(self._centered(numbers))
        with pyro.plate("rows", len(numbers)):
            pyro.sample("noise", q)

    def _rows(self, value: Tensor) -> Tensor:
        pyro.module(self.name, self)
        value = self.whole(value)
        if value.dim() != 1 + len(self.event_shape):
            want = ", ".join(map(str, ("rows", *self.event_shape)))
            raise ValueError(f"Dequantized: expected pixels of shape ({want}), got shape {tuple(value.shape)}")
        return value

    def _uniform(self, numbers: Tensor) -> TorchDistribution:
        low = numbers.new_zeros(self.event_shape)
        return dist.Uniform(low, low + 1, validate_args=False).to_event(len(self.event_shape))

    def extra_repr(self) -> str:
        return f"levels={self.levels}, num_noise_samples={self.num_noise_samples}, seed={self.seed}"
