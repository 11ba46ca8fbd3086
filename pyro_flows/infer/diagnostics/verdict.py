"""A judgment of a guide in words."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pyro_flows.core.checks import first_few, integer
from pyro_flows.infer.diagnostics.moments import Moments
from pyro_flows.infer.diagnostics.walk import Walk
from pyro_flows.infer.diagnostics.weights import Importance

__all__ = ["LABELS", "Probe", "Verdict", "in_words", "judge", "several", "widening"]

GOOD, TAILS, RESAMPLE = "good", "good, tails uncertain", "use importance resampling"
MODES, BAD, UNJUDGED = "modes missing", "bad", "not judged"
UNSEARCHED = "good, modes not searched"
FEW = "good, few draws judged"
UNSETTLED = "chains not settled"
LABELS = (GOOD, TAILS, UNSEARCHED, FEW, RESAMPLE, MODES, BAD, UNJUDGED, UNSETTLED)

GOOD_ESS = 0.9  # usable unweighted
FEWEST = 100  # draws for any judgment
ENOUGH = 1000  # draws for a full judgment, if more were wanted
SETTLED = 4000  # draws for a dimension's tail index
SHIFT = 0.1  # harmless, of a mean in standard deviations or of a log standard deviation
TAIL = 0.005  # least weight of a meaningful tail
SHARE = 0.01  # missing posterior mass that matters
WASTE = 0.02  # draws without weight that matter
STRAY, FEW_STRAY = 0.003, 2  # share and number of walkers that matter, with weights that were never drawn
WALKED, CONFIRMED = 2, 8  # moves that make a walk, and one that confirms weighted draws

MEANING = {
    GOOD: "the draws can be used as they are",
    TAILS: "means and central intervals can be used as they are; standard deviations and extreme quantiles may be off",
    UNSEARCHED: "the draws fit the model where they lie; time ran out before it was known whether they miss a mode",
    FEW: "the few draws that were judged in time fit the model; faults of one draw in hundreds are not known",
    RESAMPLE: "the draws mislead as they are; resampled by their weights they can be used",
    MODES: "the guide leaves out a part of the posterior, and resampling cannot bring it back",
    BAD: "neither the draws nor their weights can be relied on",
    UNJUDGED: "there is no basis for a judgment",
    UNSETTLED: "the chains do not show that their draws follow the posterior",
}
NEXT = {
    GOOD: "Nothing. If the posterior may have a mode much narrower than those found, or farther away, which no search "
    "reaches, fit it from there, with init_loc_fn.",
    TAILS: "For tail quantities compare with the resampled draws, report quantiles in place of standard deviations, "
    "and try a reparameterized model (a non-centered one for hierarchies), a base with heavier tails, or NUTS.",
    UNSEARCHED: "Give the fit more seconds, so that the search can end; or write the model so that it runs for many "
    "draws at once; or compare with fits from other starts.",
    FEW: "Give the fit more seconds, or write the model so that it runs for many draws at once.",
    MODES: "Fit with tempering, which lets the guide spread before the likelihood is at full weight; start several "
    "guides and compare their evidence; or a flow with more layers. If two modes differ only in labels, break the "
    "symmetry in the model.",
}
FARTHER = (
    "Let chains go on from these draws, by fit.refine(seconds=...), or NUTS in the guide's space; resampling cannot "
    "bring back what was never drawn. Training longer, with more layers, or a reparameterized model may be enough."
)
UNSAMPLED = (
    "Build the model without subsampling (subsample_size=None), on all data or on a part that fits into memory, and "
    "judge the same guide by that model; or use simulation-based calibration."
)


class Probe(Protocol):
    """The results of a mode search that the verdict reads.

    Attributes:
        missing_share: the posterior's mass in missed modes.
        missed: which modes the guide misses, shape ``(modes,)``, Boolean.
        locations: the modes, shape ``(modes, D)``, unconstrained.
        share: the posterior's mass in each, shape ``(modes,)``.
        complete: whether the search ended by itself; true if missing.
        num_starts: the points from which it climbed, if known.
        reach: the largest distance of these from the initial point, if known.
    """

    @property
    def missing_share(self) -> float: ...

    @property
    def missed(self) -> Tensor: ...

    @property
    def locations(self) -> Tensor: ...

    @property
    def share(self) -> Tensor: ...


@dataclass(frozen=True)
class Verdict:
    """The result of :func:`judge`, to be printed.

    Attributes:
        label: one of the labels of :func:`judge`.
        ok: whether the draws can be used unweighted, at least for means and central intervals: if ``"good"`` or
            ``"good, tails uncertain"``.
        text: the numbers, their meaning, and the next step.
        numbers: the numbers by name.

    Example:
        >>> weights = pf.infer.diagnostics.importance(0.01 * torch.randn(5000))
        >>> verdict = pf.infer.diagnostics.judge(weights)
        >>> verdict.label, verdict.ok
        ('good', True)
    """

    label: str
    ok: bool
    text: str
    numbers: dict[str, float]

    def __str__(self) -> str:
        return in_words(self.label, MEANING[self.label], self.text)


def in_words(label: str, meaning: str, text: str) -> str:
    """Joins a label, its meaning and the paragraphs of a text, in lines that fit the code blocks of the pages."""
    wrapper = textwrap.TextWrapper(84, subsequent_indent="    ", break_on_hyphens=False)
    lines = wrapper.wrap(f"{label}: {meaning}")
    wrapper.initial_indent = "  "
    for paragraph in text.splitlines():
        lines += wrapper.wrap(paragraph)
    return "\n".join(lines)


def several(count: int, noun: str) -> str:
    """The count with its noun, as 1 mode and 2,000 modes."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def widening(input_dim: int) -> float:
    r"""The factor :math:`1 + 0.7 / \sqrt D` that widens a guide's base for :func:`judge` to check tails.

    For an exact guide, about half of the wider draws are effective in any dimension.

    Example:
        >>> [round(pf.infer.diagnostics.widening(n), 2) for n in (1, 100)]
        [1.7, 1.07]
    """
    return 1 + 0.7 / math.sqrt(integer("widening", "input_dim", input_dim))


def judge(
    found: Importance,
    probe: Probe | None = None,
    *,
    moments: Moments | None = None,
    wide: Importance | None = None,
    walk: Walk | None = None,
    minibatch: bool = False,
    failures: int = 0,
    asked: int | None = None,
) -> Verdict:
    r"""Judges whether a guide can be used, from its importance weights and checks of their blind spots.

    With :math:`n` draws, ESS as a fraction :math:`e` and tail index :math:`\hat k`, the first label that applies:

    1. ``"not judged"``: the model subsamples its data, or :math:`n < 100`.
    2. ``"modes missing"``: the guide misses modes of the probe with at least a hundredth of the posterior.
    3. ``"bad"``: neither good nor fit for resampling; or the wider guide finds more than a tenth of the posterior
       outside; or at least two, and three in a thousand, of the walkers from the weighted draws find weights above the
       largest one that was drawn; or a mean of theirs is 0.1 standard deviations from that of the weighted draws.
    4. ``"use importance resampling"``: :math:`\hat k < \min(0.7, 1 - 1 / \log_{10} n)`, or the fitted tail has less
       than a hundredth of all weight beyond the largest; and :math:`n e \ge 1000` (a tenth of fewer than 10,000 draws,
       and 100 at least); and :math:`e < 0.9`, or a fiftieth of the draws has no weight, or the weights move a mean or
       log standard deviation by more than 0.1.
    5. ``"good, few draws judged"``: fewer than 1000 draws, of more that were asked for.
    6. ``"good, modes not searched"``: the probe ran out of time.
    7. ``"good, tails uncertain"``: :math:`\hat k` is above that limit; or a standard deviation depends on a few of at
       least 4000 draws, or its logarithm may be off by more than 0.1 within two standard errors; or the wider guide
       finds a hundredth of the posterior outside, or weights with an index of 0.5 or more (an exact guide has at most
       0.3).
    8. ``"good"``.

    :math:`\hat k` counts only if the tail's excess has half a percent of all weight; nearly constant weights give
    noise.

    Args:
        found: the weights of the guide's draws.
        probe: a search for modes; without it, modes that the guide never visits go unnoticed.
        moments: the moments of the same draws.
        wide: the weights of the guide with its base widened by :func:`widening`.  An exact guide gives the same
            evidence; one with short tails gives less, which its own weights hardly show.
        walk: a walk of the weighted draws, which shows parts of the posterior that hang together with the guide's draws
            but hold none, such as the ends of a curve.
        minibatch: whether subsampled data make the weights noisy.
        failures: draws without a log density, beyond those in ``found``.
        asked: the number of draws wanted, if time may have run out.

    Example:
        >>> weights = pf.infer.diagnostics.importance(3 * torch.randn(5000))
        >>> verdict = pf.infer.diagnostics.judge(weights)
        >>> verdict.ok
        False

    References:
        Yes, but Did It Work?: Evaluating Variational Inference (Yao et al., 2018), arXiv:1802.02538; Pareto Smoothed
        Importance Sampling (Vehtari et al., 2015), arXiv:1507.02646.
    """
    facts, numbers = _facts(found, probe, moments, wide, walk, failures)

    def verdict(label: str, step: str = "") -> Verdict:
        evidence = _about_evidence(found, label in (GOOD, FEW, UNSEARCHED))
        text = "\n".join([*(fact or evidence for fact in facts), f"Next: {step or NEXT[label]}"])
        return Verdict(label, label in (GOOD, TAILS), text, numbers)

    if minibatch:
        facts = ["The model subsamples its data, so each log weight is a noisy estimate, and no number holds."]
        return verdict(UNJUDGED, UNSAMPLED)
    cut = asked is not None and found.num_samples < min(asked, ENOUGH)
    if cut:
        facts.insert(0, f"Time was up after {found.num_samples:,} of {asked:,} draws.")
    if found.num_samples < FEWEST:
        return verdict(UNJUDGED, NEXT[FEW] if cut else f"Take at least {FEWEST} draws, better 10,000.")
    outside = numbers.get("outside", 0.0)
    limit = min(0.7, 1 - 1 / math.log10(found.num_samples))
    heavy = found.khat >= limit and found.tail >= TAIL
    effective = found.num_samples * found.ess
    usable = (not heavy or found.unseen < SHARE) and effective >= max(100, min(1000, found.num_samples / 10))
    wasted = (found.failures + found.zeros + failures) / (found.num_samples + failures)
    # A shift of NaN counts as a shift.
    moved = not (numbers.get("mean_shift", 0.0) <= SHIFT and numbers.get("scale_shift", 0.0) <= SHIFT)
    flawed = found.ess < GOOD_ESS or wasted > WASTE or moved
    stray = wide is not None and wide.khat >= 0.5 and wide.tail >= TAIL
    if numbers.get("missing_share", 0.0) >= SHARE:
        return verdict(MODES)
    gone = numbers.get("strayed", 0.0) > STRAY or numbers.get("walk_shift", 0.0) > SHIFT
    if gone and (usable or not flawed):
        return verdict(BAD, FARTHER)
    if outside > 0.1 or (flawed and not usable):
        return verdict(BAD, _remedy(found, wasted, outside))
    if flawed:
        resample = f"Resample at most {int(effective):,} draws by their smoothed weights."
        if walk is not None and walk.num_moves < CONFIRMED:
            resample += " Time was too short to let them walk on: fit.refine(seconds=...) shows whether they hold."
        return verdict(RESAMPLE, f"{resample} More training time, then more layers, would make that unnecessary.")
    if cut:
        return verdict(FEW)
    if probe is not None and not getattr(probe, "complete", True):
        return verdict(UNSEARCHED)
    uncertain = numbers.get("scale_reach", 0.0) > SHIFT
    if heavy or stray or uncertain or outside > SHARE or numbers.get("heavy", -math.inf) >= 0.7:
        return verdict(TAILS)
    return verdict(GOOD)


def _remedy(found: Importance, wasted: float, outside: float) -> str:
    if not found.ess:
        return (
            "No draw has a positive weight: look at the model's log density at some draws (a site outside its support, "
            "a NaN), and start the fit elsewhere."
        )
    steps = "Train longer, then with more layers; then reparameterize the model (a non-centered one for hierarchies)"
    if wasted > WASTE:
        steps = f"Find out why {wasted:.0%} of the draws have no density (a support, a singular matrix). {steps}"
    if outside > 0.1:
        steps = f"Try a base with heavier tails or start from a wider guide. {steps}"
    return f"{steps}; several starts; tempering; else NUTS."


def _facts(
    found: Importance,
    probe: Probe | None,
    moments: Moments | None,
    wide: Importance | None,
    walk: Walk | None,
    failures: int,
) -> tuple[list[str], dict[str, float]]:
    """Collects a verdict's sentences and numbers."""
    names = ("ess", "khat", "tail", "log_evidence", "log_evidence_error", "elbo", "iw_elbo", "spread")
    numbers: dict[str, float] = {name: getattr(found, name) for name in names}
    facts = [
        f"Weights of {found.num_samples:,} draws: ESS {found.ess:.3f} of the draws, k-hat {found.khat:.2f}"
        f"{_about_khat(found)}, spread of the log weights {found.spread:.3f} nats.",
        "",  # the evidence, which depends on the verdict
    ]
    failed = found.failures + failures
    if failed or found.zeros:
        facts.append(f"{failed} draws failed (NaN or infinite), {found.zeros} have density zero.")
        numbers["failures"], numbers["zeros"] = float(failed), float(found.zeros)
    if moments is not None:
        facts += _about_moments(moments, found.num_samples, numbers)
    if wide is not None:
        facts.append(_about_tails(found, wide, numbers))
    if walk is not None and walk.num_moves >= WALKED:
        facts.append(_about_walk(walk, numbers))
    facts.append(_about_modes(probe, numbers))
    return facts, numbers


def _about_evidence(found: Importance, whole: bool) -> str:
    """Gives an error only where the guide seems to leave nothing out."""
    said = f"Log evidence {found.log_evidence:.3f} ± {found.log_evidence_error:.3f} nats"
    if not (found.trusted and whole):
        said = (
            f"Log evidence at least {found.log_evidence_bound:.3f} nats, with probability 0.95; the weights' own "
            f"estimate, {found.log_evidence:.3f} ± {found.log_evidence_error:.3f}, is not to be trusted"
        )
    return f"{said}. ELBO {found.elbo:.3f}, with {found.iw_samples} draws {found.iw_elbo:.3f}."


def _about_walk(walk: Walk, numbers: dict[str, float]) -> str:
    count = len(walk.log_weights)
    strayed = round(walk.above * count)
    numbers["strayed"] = walk.above if strayed >= FEW_STRAY else 0.0
    numbers["walk_shift"] = walk.shift
    said = f"{count} of the weighted draws walked on by {walk.num_moves} moves"
    if numbers["strayed"] > STRAY:
        said = f"{said}: {strayed} of them found weights above any that the guide drew"
    elif walk.shift > SHIFT:
        said = f"{said}, which moved a mean by {walk.shift:.2f} standard deviations"
    else:
        return f"{said}, and found no part of the posterior that the guide leaves out."
    return f"{said}, so a part of the posterior that hangs together with its draws is left out."


def _about_modes(probe: Probe | None, numbers: dict[str, float]) -> str:
    if probe is None:
        return "Modes were not searched for: a mode that the guide never visits would not show in these numbers."
    numbers["missing_share"] = float(probe.missing_share)
    missed = int(probe.missed.sum())
    search, count = "A search", getattr(probe, "num_starts", 0)
    if count:
        search += f" from {count} points, up to {getattr(probe, 'reach', 0.0):,.0f} from the initial one,"
    if not len(probe.missed):
        ended = "found no mode" if getattr(probe, "complete", True) else "ran out of time before it found a mode"
        return f"{search} {ended}, so it says nothing."
    if not missed:
        found = f"{search} found {several(len(probe.missed), 'mode')}, and the guide misses none."
        return f"{found} Modes much narrower than these, or farther away, can escape such a search."
    where = probe.locations[probe.missed][probe.share[probe.missed].argmax()].tolist()
    place = first_few((f"{x:.3g}" for x in where), 6)
    return (
        f"{search} found {several(missed, 'mode')} that the guide misses, with about "
        f"{float(probe.missing_share):.1%} of the posterior; the largest at ({place}) in unconstrained "
        "space. Weights do not show that."
    )


def _about_khat(found: Importance) -> str:
    if found.khat == -math.inf:
        return " (the largest weights are equal)"
    if math.isinf(found.khat):
        return " (too few positive weights to fit a tail)"
    if found.khat >= 0.5 and found.tail < TAIL:
        return " (meaningless, because the weights are nearly constant)"
    return f" (the tail holds {found.tail:.1%} of the weight)"


def _about_moments(moments: Moments, n: int, numbers: dict[str, float]) -> list[str]:
    """Describes the largest shifts, less two standard errors of noise."""
    heavy = (moments.heavy >= 0.7) & (n >= SETTLED)
    certain = (moments.mean.abs() - 2 * moments.mean_error).clamp(min=0)
    scaled = (moments.scale.abs() - 2 * moments.scale_error).clamp(min=0).masked_fill(heavy, 0.0)
    i, j = int(certain.argmax()), int(scaled.argmax())
    numbers["mean_shift"], numbers["scale_shift"] = float(certain[i]), float(scaled[j])
    reach = (moments.scale.abs() + 2 * moments.scale_error).masked_fill(heavy, 0.0)
    k = int(reach.argmax())
    numbers["scale_reach"] = float(reach[k])
    numbers["heavy"] = float(moments.heavy.max()) if n >= SETTLED else -math.inf
    facts = [
        f"The weights move means by up to {float(moments.mean[i]):+.3f} standard deviations ({moments.names[i]}) and "
        f"standard deviations by up to {math.expm1(float(moments.scale[j])):+.1%} ({moments.names[j]})."
    ]
    if heavy.any():
        names = [moments.names[k] for k in heavy.nonzero()[:, 0].tolist()]
        facts.append(
            f"The standard deviation of {first_few(names, 4)} depends on a few draws "
            f"(tail index up to {numbers['heavy']:.2f}): no sample of this size settles it."
        )
    if reach[k] > SHIFT >= scaled[j]:
        facts.append(
            f"The weights leave it open whether the standard deviation of {moments.names[k]} is off by a tenth "
            f"({float(moments.scale[k]):+.3f} ± {float(moments.scale_error[k]):.3f} in its logarithm)."
        )
    return facts


def _about_tails(found: Importance, wide: Importance, numbers: dict[str, float]) -> str:
    gap = wide.log_evidence - found.log_evidence
    error = math.hypot(wide.log_evidence_error, found.log_evidence_error)
    # Surely missing: the estimate less three standard errors.
    numbers["outside"] = max(0.0, -math.expm1(-max(0.0, gap - 3 * error))) if math.isfinite(gap) else 0.0
    numbers["wide_khat"] = wide.khat
    says = "hardly anything lies just outside the guide."
    if numbers["outside"] > SHARE:
        says = f"at least {numbers['outside']:.1%} of the posterior lies where the guide hardly draws."
    elif wide.khat >= 0.5 and wide.tail >= TAIL:
        says = f"k-hat {wide.khat:.2f}, so something may lie just outside the guide."
    return (
        f"The guide widened in all directions gives a log evidence of {wide.log_evidence:.3f} ± "
        f"{wide.log_evidence_error:.3f}: {says}"
    )
