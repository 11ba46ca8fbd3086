"""Whether Markov chains have settled, in numbers and in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.infer.diagnostics.verdict import GOOD, NEXT, UNSETTLED, Verdict, several

__all__ = ["Apart", "ChainDraws", "Settling", "compare_walks", "judge_chains", "nested_rhat", "settling"]

GROUPS = 16  # of chains that began alike
RHAT = 1.01
MOVED = 0.05  # standard deviations by which the chains' memory of where they began may move a mean
FEWEST = 1000  # effective draws
HARMLESS = 0.02  # change between halves, in standard deviations
APART = 0.05  # the same, between chains that began apart
CERTAIN = 4.0  # standard errors
# A gap that passes as chance moves the mean of all by at most half of it, to be a tenth of a standard deviation.
KNOWN = 2 * 0.1 / CERTAIN
BEYOND = 0.01  # part of the chains begun elsewhere that lies beyond all weights of the others
TOSSES = 10  # chains there that are no chance: as many of the highest are on one side with probability 2^-10


@dataclass(frozen=True)
class ChainDraws:
    """Draws of the posterior by Markov chains, in place of those of a guide.

    Example:
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> fit = pf.fit_guide(model, torch.tensor(2.0), steps=20)
        >>> chains = fit.nuts(num_samples=20, warmup_steps=10, num_chains=2).chains
        >>> chains.draws.shape  # unconstrained
        torch.Size([2, 20, 1])
    """

    draws: Tensor
    """Unconstrained, ``(chains, kept, D)``."""
    log_p: Tensor
    """The model's log joint density, ``(chains, kept)``."""
    log_q: Tensor
    """The guide's log-density, ``(chains, kept)``."""
    effective: float
    """The smallest number of effective draws of a dimension, of its spread, and of ``log_p``."""
    rhat: float
    """The largest R-hat of these."""
    divergences: int
    """The moves on which the density failed or the energy rose by more than 1000 nats."""
    method: str
    """``"refine"`` or ``"nuts"``."""


@dataclass(frozen=True)
class Settling:
    """What chains show of whether they have settled; all maxima over scalars.

    Example:
        >>> from pyro_flows.infer.diagnostics.settling import settling
        >>> found = settling(torch.randn(256, 32, 2), torch.randn(256, 2))
        >>> found.rhat < 1.01, found.effective > 1000
        (True, True)
    """

    rhat: float
    """R-hat, nested if there are many chains."""
    moved: float
    """The most that the memory of where chains began moves a mean, in standard deviations; infinite if unknown."""
    effective: float
    """The least number of effective draws."""
    change: float
    """The mean's change between the halves of the chains, in standard deviations."""
    drifts: bool
    """Whether a scalar's change is both certain and not harmless."""

    @property
    def ok(self) -> bool:
        """Whether all tests pass."""
        return not self.remembers and self.effective >= FEWEST and not self.drifts

    @property
    def remembers(self) -> bool:
        """Whether chains remember where they began, and that matters."""
        return not (self.rhat < RHAT or self.moved < MOVED)


@dataclass(frozen=True)
class Apart:
    """How far chains that began elsewhere end from the others.

    Example:
        >>> from pyro_flows.infer.diagnostics.settling import compare_walks
        >>> states, weights = torch.randn(2, 128, 32, 2), torch.zeros(128, 32)
        >>> compare_walks(states[0], weights, states[1], weights).differs
        False
    """

    gap: float
    """The largest difference of a mean, in standard deviations."""
    error: float
    """The largest standard error of these."""
    beyond: float
    """The part of the draws of chains begun elsewhere whose weights are above all of the others."""
    chains: int
    """The number of chains that have such draws."""
    differs: bool
    """Whether a scalar's difference is certain and not harmless."""

    @property
    def why_not(self) -> str:
        """What speaks against it that all end in the same place; empty if nothing does."""
        if self.differs or (self.beyond > BEYOND and self.chains >= TOSSES):
            return "chains that began elsewhere did not end in the same place"
        return "" if self.error <= KNOWN else "the chains are too short to compare with those that began elsewhere"


def _scores(states: Tensor, like: Tensor | None = None) -> Tensor:
    """Normal scores by rank of columns of ``(chains, kept, K)`` and of their distances from the median.

    With ``like``, the ranks are those among its rows.
    """
    own = (states if like is None else like).flatten(0, 1).double()
    rows = states.flatten(0, 1).double()
    median = own.median(0).values
    found = []
    for base, x in ((own, rows), ((own - median).abs(), (rows - median).abs())):
        base, x = base.T.contiguous(), x.T.contiguous()
        ordered = base.sort(-1).values
        below, above = (torch.searchsorted(ordered, x, right=side) for side in (False, True))
        place = (0.5 * (below + above)).clamp(0.5, base.shape[1] - 0.5) / base.shape[1]
        found.append(torch.special.ndtri(place).T)
    return torch.cat(found, -1).unflatten(0, states.shape[:2])


def nested_rhat(states: Tensor, first: Tensor) -> Tensor:
    r"""Returns R-hat of groups of chains that began alike, ``(K,)``.

    Chains are put in 16 groups by their own first value of the scalar, and
    :math:`\hat R = \sqrt{1 + B / W}` with the variance :math:`B` of the groups' means, less what chains that had
    forgotten their start would show by chance, and the mean variance :math:`W` within groups.  Many short chains may
    pass where the usual R-hat needs long ones, because groups, and not chains, must have forgotten.

    Args:
        states: ``(chains, kept, K)``.
        first: the values at which the chains began, ``(chains, K)``.

    Example:
        >>> from pyro_flows.infer.diagnostics.settling import nested_rhat
        >>> nested_rhat(torch.randn(256, 32, 2), torch.randn(256, 2)).shape
        torch.Size([2])

    References:
        Nested R-hat: Assessing the convergence of MCMC when running many short chains (Margossian et al., 2021),
        arXiv:2110.13017.
    """
    means = states.mean(1)
    size = max(1, len(means) // GROUPS)
    grouped = means.gather(0, first.argsort(0))[: size * (len(means) // size)].unflatten(0, (-1, size))
    within = states.var(1).mean(0) if states.shape[1] > 1 else torch.zeros_like(means[0])
    chains = grouped.var(1).mean(0) if size > 1 else torch.zeros_like(within)
    excess = (grouped.mean(1).var(0) - chains / size).clamp(min=0)
    return (1 + excess / (within + chains).clamp(min=1e-300)).sqrt()


def settling(states: Tensor, first: Tensor | None = None) -> Settling:
    r"""Tests chains by ranks of each scalar, and of its distance from the median, so that tails need no moments.

    What many short chains remember does no harm if they began nearly as the posterior.  If :math:`m(x)` is the mean of
    chains that began at :math:`x`, and these follow :math:`f` in place of the posterior :math:`p`, then by Cauchy and
    Schwarz

    .. math::
        \left|\mathrm{E}_f m - \mathrm{E}_p m\right| \le \mathrm{sd}_p(m) \, \chi(f \| p),

    with the standard deviation of nested R-hat's groups, :math:`\sqrt{\hat R^2 - 1}` in those of a draw, and the
    distance :math:`\chi^2 = \sum_k (f_k - p_k)^2 / p_k` over 16 parts of the chains' own draws, at least what it is by
    chance.

    Args:
        states: ``(chains, kept, K)``, ``kept`` at least 4.
        first: where many short chains began, ``(chains, K)``.  Without it, R-hat is the usual one, of halves of chains.

    Example:
        >>> from pyro_flows.infer.diagnostics.settling import settling
        >>> started, states = torch.randn(256, 2), torch.randn(256, 32, 2)
        >>> fresh = settling(states, started)
        >>> remembering = settling(states + 0.5 * started.unsqueeze(1), started)
        >>> fresh.ok, remembering.ok
        (True, False)

    References:
        Rank-normalization, folding, and localization: An improved R-hat (Vehtari et al., 2019), arXiv:1903.08008.
    """
    scores = _scores(states)
    count, kept = states.shape[:2]
    early, late = scores[:, : kept // 2], scores[:, kept - kept // 2 :]
    change = (late.mean(1) - early.mean(1)).mean(0).abs()
    means = scores.mean(1)
    if first is None:
        rhat = nested_rhat(torch.cat([early, late]), torch.cat([early, late]).mean(1))
        moved = torch.full_like(rhat, math.inf)
        effective = count * kept / _steps_between(scores)
        error = (4 / effective).sqrt()
    else:
        began = _scores(first.unsqueeze(1), states).squeeze(1)
        rhat = nested_rhat(scores, began)
        moved = (rhat.square() - 1).clamp(min=0).sqrt() * _distance(began)
        effective = scores.flatten(0, 1).var(0) / (means.var(0) / count).clamp(min=1e-12)
        error = (late.mean(1) - early.mean(1)).std(0) / math.sqrt(count)
    # A scalar that never moves, as log_p of a flat density, says nothing.
    moving = states.flatten(0, 1).std(0).repeat(2) > 0
    change, error, rhat, effective, moved = (part[moving] for part in (change, error, rhat, effective, moved))
    drifts = (change > HARMLESS) & (change > CERTAIN * error)
    most = float(rhat.max()), float(moved.max()), float(effective.min())
    return Settling(*most, float(change.max()), bool(drifts.any()))


def _distance(scores: Tensor) -> Tensor:
    """Returns how far normal scores ``(S, K)`` are from normal, by the chi-square distance over 16 equal parts."""
    part = (GROUPS * torch.special.ndtr(scores)).long().clamp(max=GROUPS - 1)
    share = torch.nn.functional.one_hot(part, GROUPS).double().mean(0)
    return (GROUPS * (share - 1 / GROUPS).square().sum(-1)).clamp(min=(GROUPS - 1) / len(scores)).sqrt()


def _steps_between(scores: Tensor) -> Tensor:
    """Draws for each effective one, ``(K,)``, by Geyer's initial positive sequence."""
    centered = scores - scores.mean((0, 1))
    kept = scores.shape[1]
    spectrum = torch.fft.rfft(centered, 2 * kept, 1).abs().square().mean(0)
    autocovariance = torch.fft.irfft(spectrum, 2 * kept, 0)[:kept]
    autocorrelation = autocovariance / autocovariance[0].clamp(min=1e-300)
    pairs = autocorrelation[: kept - kept % 2].unflatten(0, (-1, 2)).sum(1)
    positive = (pairs > 0).cumprod(0)
    return (2 * (pairs * positive).sum(0) - 1).clamp(min=1e-3)


def compare_walks(states: Tensor, log_weights: Tensor, other: Tensor, other_weights: Tensor) -> Apart:
    """Compares chains with others that began elsewhere, ``(chains, kept, K)`` each, and their log-weights.

    Example:
        >>> from pyro_flows.infer.diagnostics.settling import compare_walks
        >>> states, weights = torch.randn(128, 32, 2), torch.zeros(128, 32)
        >>> compare_walks(states, weights, 1 + torch.randn(128, 32, 2), weights).differs
        True
    """
    own, others = _scores(states), _scores(other, states)
    gap = (others.mean((0, 1)) - own.mean((0, 1))).abs()
    error = (others.mean(1).var(0) / len(others) + own.mean(1).var(0) / len(own)).sqrt()
    above = (other_weights > log_weights.max()).reshape(len(other), -1)
    beyond, chains = float(above.double().mean()), int(above.any(-1).sum())
    differs = (gap > APART) & (gap > CERTAIN * error)
    return Apart(float(gap.max()), float(error.max()), beyond, chains, bool(differs.any()))


def judge_chains(
    found: Settling,
    chains: ChainDraws,
    apart: Apart | None = None,
    stopped: str = "",
    modes: int = 0,
    ended: bool = True,
) -> Verdict:
    """Judges whether draws of chains can be used.

    They can, as ``"good"``, if R-hat is below 1.01, or what chains remember of where they began moves no mean by more
    than 0.05 standard deviations; if at least 1000 draws are effective, the halves of the chains agree, and chains that
    began elsewhere end in the same place.  Otherwise the label is ``"chains not settled"``.

    Args:
        found: the tests of the chains.
        chains: the draws.
        apart: the comparison with chains that began elsewhere, which ``refine`` needs.
        stopped: why the chains ended early, if they did.
        modes: the number of modes known.
        ended: whether the ridges along which chains jump were followed to their ends.

    Example:
        >>> from pyro_flows.infer.diagnostics import settling
        >>> states, zeros = torch.randn(256, 32, 2), torch.zeros(256, 32)
        >>> found = settling.settling(states, torch.randn(256, 2))
        >>> chains = settling.ChainDraws(
        ...     states, zeros, zeros, found.effective, found.rhat, divergences=0, method="")
        >>> settling.judge_chains(found, chains).label
        'good'
    """
    many, kept = chains.draws.shape[:2]
    nested = "nested " if chains.method == "refine" else ""
    facts = [
        *([stopped] if stopped else []),
        f"{several(many, 'chain')} with {several(kept, 'draw')} each, of which {found.effective:,.0f} count; "
        f"{nested}R-hat {found.rhat:.3f}, {chains.divergences:,} divergent moves."
        + (f" Where they began moves means by up to {found.moved:.3f} standard deviations." if nested else ""),
        f"Between the halves of the chains, means change by up to {found.change:.3f} standard deviations"
        + (", which is more than chance." if found.drifts else ", as chance would have it."),
    ]
    numbers = {"rhat": found.rhat, "effective": found.effective, "change": found.change}
    numbers["divergences"] = float(chains.divergences)
    wrong = []
    if found.remembers:
        wrong.append("the chains remember where they began")
    if found.effective < FEWEST:
        wrong.append("too few draws are effective")
    if found.drifts:
        wrong.append("the chains drift")
    if not ended:
        wrong.append("the posterior goes on where its ridges could not be followed")
    if chains.method == "refine":
        where = f"on {modes} modes alike" if modes > 1 else "at a widened guide"
        if apart is None:
            wrong.append("none that began elsewhere confirmed them")
            facts.append("There were no chains from elsewhere to compare with.")
        else:
            numbers |= {"gap": apart.gap, "beyond": apart.beyond}
            facts.append(
                f"Half of the chains began elsewhere, {where}, and end with means up to {apart.gap:.3f} ± "
                f"{apart.error:.3f} standard deviations from the others'; "
                f"{apart.beyond:.1%} of them lie beyond the others' weights."
            )
            if apart.why_not:
                wrong.append(apart.why_not)
    elif chains.divergences > 0.001 * many * kept:
        wrong.append("trajectories diverged, so a narrow part may be left out")
    facts.append("Modes that neither a search nor a chain ever found would not show in these numbers.")
    if wrong or stopped:
        why = "; ".join(wrong) or "nothing else is wrong"
        step = f"Go on with fit.refine(seconds=...), since {why}; if that does not help, reparameterize the model."
        return Verdict(UNSETTLED, False, "\n".join([*facts, f"Next: {step}"]), numbers)
    return Verdict(GOOD, True, "\n".join([*facts, f"Next: {NEXT[GOOD]}"]), numbers)
