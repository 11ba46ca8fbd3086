"""Importance weights of a guide's draws: smoothing, tail index, effective sample size, evidence, resampling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Generator, Tensor

from pyro_flows.core.checks import integer

__all__ = ["Importance", "Smoothed", "importance", "pareto_smoothed", "resample", "tail_index"]

SMALLEST = math.log(torch.finfo(torch.float64).tiny)  # log weights this far below the largest count as zero
FEWEST = 5  # draws to fit a tail to
RELIABLE = 0.7  # largest tail index of useful weights

_Draws = TypeVar("_Draws", Tensor, Mapping[str, Tensor])


@dataclass(frozen=True)
class Smoothed:
    """Smoothed log weights and their tail.

    Attributes:
        log_weights: shape ``(n,)``, float64; their exponentials sum to 1.
        khat: tail index; infinite for a tail below five draws, minus infinity if the largest weights are equal.
        tail: share of all weight in the tail's excess over its threshold.

    Example:
        >>> smoothed = pf.infer.diagnostics.pareto_smoothed(torch.randn(1000))
        >>> round(smoothed.log_weights.exp().sum().item(), 6)
        1.0
    """

    log_weights: Tensor
    khat: float
    tail: float


@dataclass(frozen=True)
class Importance:
    """Statistics of the importance weights of a guide's draws, in nats where logarithmic.

    A weight of NaN or plus infinity is a failure: zero, but left out of ``elbo``, ``iw_elbo`` and ``spread``.  A log
    weight of minus infinity is a weight of zero, not a failure.

    Attributes:
        khat: tail index; the weights have ``1 / khat`` moments, and below 0.7 smoothed ones are useful.  It measures
            the tail's shape, not its size, and means nothing for nearly constant weights.
        ess: effective sample size of the unsmoothed weights, as a fraction of the draws.
        log_evidence: log mean weight.
        log_evidence_error: its standard error, to first order, with the share that so many draws may not show; see
            ``trusted``.
        elbo: mean log weight, a lower bound of the log evidence; minus infinity if a weight is zero.
        elbo_error: its standard error.
        iw_elbo: expected log mean of ``iw_samples`` weights, between the two.
        iw_elbo_error: its standard error; NaN for a single mean.
        iw_samples: weights in each mean.
        spread: standard deviation of the finite log weights.
        tail: share of all weight in the tail's excess.
        largest: share of the largest weight.
        num_samples: draws, failures included.
        failures: weights of NaN or plus infinity.
        zeros: weights of zero.

    Example:
        >>> found = pf.infer.diagnostics.importance(0.1 * torch.randn(5000))
        >>> found.ess > 0.9, found.failures
        (True, 0)
    """

    khat: float
    ess: float
    log_evidence: float
    log_evidence_error: float
    elbo: float
    elbo_error: float
    iw_elbo: float
    iw_elbo_error: float
    iw_samples: int
    spread: float
    tail: float
    largest: float
    num_samples: int
    failures: int
    zeros: int

    @property
    def trusted(self) -> bool:
        """Whether the standard error of the evidence is reliable.

        This takes finite variance (a negligible tail counts as light), a hundred effective draws and no failures: an
        unsampled heavy tail makes both estimate and error too small.
        """
        light = self.khat < RELIABLE or self.tail < 0.005
        return light and self.num_samples * self.ess >= 100 and not self.failures

    @property
    def unseen(self) -> float:
        r"""The share of all weight beyond the largest, by the fitted tail, about :math:`w_{\max} / (1 - \hat k)`.

        Of :math:`n` draws, none is expected beyond the weight that one reaches, and weights beyond :math:`w` have the
        mean :math:`w / (1 - k)` in a tail of index :math:`k`, to the leading order.
        """
        return 0.0 if self.khat == -math.inf else min(1.0, self.largest / max(1 - self.khat, 1e-12))

    @property
    def log_evidence_bound(self) -> float:
        """A number, in nats, that the log evidence exceeds with probability 0.95, however uneven the weights.

        Their mean is unbiased, so by Markov's inequality it is above 20 times the evidence in one of 20 cases at most.
        """
        return self.log_evidence - math.log(20)


def pareto_smoothed(log_weights: Tensor) -> Smoothed:
    r"""Replaces the largest weights by quantiles of a fitted generalized Pareto distribution.

    Of :math:`n` weights the :math:`M = \lceil\min(n / 5, 3 \sqrt n)\rceil` largest are the tail.  Zhang and Stephens'
    fit, with a weak prior towards one half, gives index :math:`\hat k` and scale :math:`\sigma` of their excesses over
    the next smaller weight :math:`t`.  The :math:`i`-th smallest becomes :math:`t + \sigma ((1 - (i - 1/2) / M)^{-\hat
    k} - 1) / \hat k`, at most the largest given one.

    Args:
        log_weights: shape ``(n,)``, in nats, not normalized; NaN and plus infinity count as weights of zero.

    Returns:
        Log weights in float64, in the same order, on the same device.

    Raises:
        ValueError: if the shape does not fit, or no weight is positive.

    Example:
        >>> log_weights = 2 * torch.randn(1000)
        >>> smoothed = pf.infer.diagnostics.pareto_smoothed(log_weights)
        >>> smoothed.log_weights.shape
        torch.Size([1000])

    References:
        Pareto Smoothed Importance Sampling (Vehtari et al., 2015), arXiv:1507.02646.
    """
    return _smooth(_shifted(log_weights, "pareto_smoothed"))


def tail_index(log_values: Tensor) -> float:
    """Computes the index of :func:`pareto_smoothed` for logarithms of numbers; infinite if none is positive.

    Example:
        >>> from pyro_flows.infer.diagnostics.weights import tail_index
        >>> exponential = torch.rand(4000).log().neg()
        >>> light, heavy = tail_index(exponential.log()), tail_index(exponential)
        >>> light < 0.5 < heavy  # 0 and 1, up to noise
        True
    """
    values, _ = _usable(log_values, "tail_index")
    top = values.max()
    return _smooth(values - top).khat if top > -math.inf else math.inf


def _shifted(log_weights: Tensor, name: str) -> Tensor:
    """Returns log weights whose largest is 0."""
    values, _ = _usable(log_weights, name)
    top = values.max()
    if top == -math.inf:
        raise ValueError(
            f"{name}: none of {len(values)} weights is positive (each is zero or NaN): the density is zero or fails "
            "wherever the guide draws; look at its values at some draws"
        )
    return values - top


def _usable(log_weights: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Returns log weights with failures as minus infinity, and which have failed."""
    if not isinstance(log_weights, Tensor) or log_weights.dim() != 1 or not log_weights.is_floating_point():
        found = (
            f"shape {tuple(log_weights.shape)} of {log_weights.dtype}"
            if isinstance(log_weights, Tensor)
            else type(log_weights).__name__
        )
        raise ValueError(f"{name}: expected log weights as a floating-point tensor of shape (draws,), got {found}")
    if not len(log_weights):
        raise ValueError(f"{name}: expected at least one log weight, got none")
    values = log_weights.detach().double()
    failed = values.isnan() | (values == math.inf)
    return values.masked_fill(failed, -math.inf), failed


def _smooth(values: Tensor) -> Smoothed:
    """Smooths log weights whose largest is 0."""
    n = len(values)
    size = math.ceil(min(n / 5, 3 * math.sqrt(n)))
    if size >= n:
        return Smoothed(values - values.logsumexp(0), math.inf, 0.0)
    largest, places = values.topk(size + 1)
    threshold = largest[-1].clamp(min=SMALLEST)
    count = int((largest > threshold).sum())
    khat = -math.inf if count == 0 else math.inf
    if count >= FEWEST:
        # In ascending order; expm1 keeps digits of the difference of nearly equal weights.
        tail = largest[:count].flip(0)
        excess = tail.exp() * -torch.expm1(threshold - tail)
        with torch.device("cpu"):  # Pyro's fit makes tensors on the default device
            index, scale = fit_generalized_pareto(excess.cpu())
        if math.isfinite(index) and math.isfinite(scale) and scale > 0:
            khat = index
            rest = -torch.log1p(-(torch.arange(count, dtype=values.dtype, device=values.device) + 0.5) / count)
            quantiles = scale * (torch.expm1(index * rest) / index if abs(index) > 1e-12 else rest)
            smooth = (threshold.exp() + quantiles).log().clamp(max=0)
            values = values.index_copy(0, places[:count].flip(0), smooth)
    share = (values.exp() - threshold.exp()).clamp(min=0).sum() / values.exp().sum()
    return Smoothed(values - values.logsumexp(0), khat, float(share) if count else 0.0)


def importance(log_weights: Tensor, *, iw_samples: int = 10) -> Importance:
    r"""Computes statistics of the importance weights of independent draws of a guide.

    .. math::
        \text{ess} = \frac{(\sum_i w_i)^2}{n \sum_i w_i^2}, \qquad
        \log \hat Z = \log \frac1n \sum_i w_i, \qquad
        \text{se}(\log \hat Z) \approx \sqrt{\frac{1 / \text{ess} - 1}{n - 1} + \frac1{n^2}}

    The standard error is by the delta method, with a part of :math:`1 / n` that so many draws may never meet.
    ``iw_elbo`` is an unbiased mean over disjoint random groups, the same at each call.  No statistic sees a region that
    the guide never draws from.

    Args:
        log_weights: :math:`\log p(z, y) - \log q(z)` at draws of :math:`q`, shape ``(n,)``, in nats.
        iw_samples: weights in each mean of ``iw_elbo``, at most the number of draws.

    Raises:
        ValueError: if a shape or number does not fit.

    Example:
        >>> guide, posterior = dist.Normal(0.0, 1.1), dist.Normal(0.0, 1.0)
        >>> draws = guide.sample((5000,))
        >>> log_weights = posterior.log_prob(draws) - guide.log_prob(draws)
        >>> pf.infer.diagnostics.importance(log_weights).ess > 0.9
        True

    References:
        Pareto Smoothed Importance Sampling (Vehtari et al., 2015), arXiv:1507.02646; Importance Weighted Autoencoders
        (Burda et al., 2015), arXiv:1509.00519.
    """
    values, failed = _usable(log_weights, "importance")
    n = len(values)
    integer("importance", "iw_samples", iw_samples)
    valid = values[~failed]
    finite = valid[valid.isfinite()]
    count = min(iw_samples, max(1, len(valid)))
    elbo, elbo_error = _mean(valid)
    # Rows of disjoint groups, in a random but fixed order.
    order = torch.randperm(len(valid), generator=Generator().manual_seed(0), device="cpu").to(valid.device)
    grouped = valid[order[: len(valid) // count * count]].reshape(-1, count)
    iw_elbo, iw_elbo_error = _mean(grouped.logsumexp(1) - math.log(count))
    if not len(finite):
        khat, ess, log_evidence, error, tail, largest = math.inf, 0.0, -math.inf, math.inf, 0.0, 0.0
    else:
        top = values.max()
        weights = (values - top).exp()
        total, squares = weights.sum(), weights.square().sum()
        ess = min(1.0, float(total.square() / squares / n))
        log_evidence = float(total.log() + top) - math.log(n)
        # Centered, because rounding loses 1 / ess - 1 of nearly constant weights.
        relative = weights * (n / total) - 1
        error = math.sqrt(float(relative.square().mean()) / (n - 1) + 1 / n**2) if n > 1 else math.inf
        smoothed = _smooth(values - top)
        khat, tail = smoothed.khat, smoothed.tail
        largest = float(1 / total)
    return Importance(
        khat=khat,
        ess=ess,
        log_evidence=log_evidence,
        log_evidence_error=error,
        elbo=elbo,
        elbo_error=elbo_error,
        iw_elbo=iw_elbo,
        iw_elbo_error=iw_elbo_error,
        iw_samples=count,
        spread=float(finite.std()) if len(finite) > 1 else math.nan,
        tail=tail,
        largest=largest,
        num_samples=n,
        failures=int(failed.sum()),
        zeros=len(valid) - len(finite),
    )


def _mean(values: Tensor) -> tuple[float, float]:
    """Returns mean and standard error; minus infinity if a value is, NaN for none."""
    mean = float(values.mean())
    if not math.isfinite(mean) or len(values) < 2:
        return mean, math.nan
    return mean, float(values.std()) / math.sqrt(len(values))


def resample(
    draws: _Draws, log_weights: Tensor, num_samples: int, generator: Generator | None = None, smoothed: bool = True
) -> _Draws:
    """Turns weighted draws into draws of equal weight, by systematic resampling.

    A draw of normalized weight ``w`` appears ``num_samples * w`` times, rounded up or down at random, in random order.
    Draws repeat beyond the number of effective ones.

    Args:
        draws: shape ``(draws, ...)``, or a dictionary of such tensors.
        log_weights: shape ``(draws,)``.
        num_samples: the number of draws to return.
        generator: the source of randomness, by default torch's global one.
        smoothed: whether to use :func:`pareto_smoothed`, for much less variance and a little bias.

    Returns:
        Draws of the same form, with ``num_samples`` rows.

    Raises:
        ValueError: if shapes or numbers do not fit, or no weight is positive.

    Example:
        >>> draws, log_weights = torch.randn(1000, 2), torch.randn(1000)
        >>> pf.infer.diagnostics.resample(draws, log_weights, 100).shape
        torch.Size([100, 2])
    """
    n = integer("resample", "num_samples", num_samples)
    values = _shifted(log_weights, "resample")
    parts: Mapping[str, Any] = draws if isinstance(draws, Mapping) else {"draws": draws}
    for name, part in parts.items():
        if part.dim() == 0 or len(part) != len(values):
            raise ValueError(
                f"resample: expected {name} with {len(values)} rows, one for each weight, got shape {tuple(part.shape)}"
            )
    normalized = _smooth(values).log_weights if smoothed else values.log_softmax(0)
    place = generator.device if generator is not None else torch.device("cpu")
    offset = torch.rand((), generator=generator, dtype=torch.float64, device=place).to(values.device)
    order = torch.randperm(n, generator=generator, device=place).to(values.device)
    reached = normalized.exp().cumsum(0)
    # Rounding may put the last position beyond the last weight.
    at = ((torch.arange(n, dtype=torch.float64, device=values.device) + offset) / n).clamp(max=1 - 2**-53)
    chosen = torch.searchsorted(reached / reached[-1], at, right=True)[order]
    found: Any = {name: part[chosen.to(part.device)] for name, part in parts.items()}
    return found if isinstance(draws, Mapping) else found["draws"]
