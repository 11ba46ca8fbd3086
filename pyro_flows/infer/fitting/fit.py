"""``fit_guide``: a posterior in one call."""

from __future__ import annotations

import copy
import inspect
import math
import time
import warnings
from collections.abc import Callable

import torch
from pyro import poutine
from torch import Generator, Tensor
from tqdm.auto import tqdm

from pyro_flows.distributions import Flow
from pyro_flows.infer.diagnostics import importance
from pyro_flows.infer.fitting.assessment import DRAWS, FEWEST, Assessment, assess, search_modes, weigh
from pyro_flows.infer.fitting.budget import Budget
from pyro_flows.infer.fitting.modes import cover_modes
from pyro_flows.infer.fitting.result import GuideFit
from pyro_flows.infer.fitting.training import History, Training
from pyro_flows.infer.guides.auto import AutoFlow, seeded
from pyro_flows.infer.guides.probe import ModeProbe
from pyro_flows.infer.joint import JointDensity

__all__ = ["fit_guide"]

RESERVED = ("seconds", "steps", "progress", "fit_prior")
PARTICLES = 128
SLOW_SECONDS = 40.0  # for the verdict, where a model runs for one draw at a time
ASSESSING = 0.12  # of the seconds, for the verdict
SLOW_ASSESSING = 0.4  # likewise, where a model runs for one draw at a time
SEVERAL = 0.01  # share of the posterior in modes that the start leaves out, for which it is worth to begin anew


def fit_guide(
    model_or_guide: Callable[..., object] | AutoFlow,
    /,
    *args: object,
    seconds: float | None = None,
    steps: int | None = None,
    progress: bool = True,
    fit_prior: bool = False,
    **kwargs: object,
) -> GuideFit:
    r"""Fits a flow to the posterior of a model, and says whether to trust it.

    An informed start (quasi-Newton paths and Laplace's approximation, ranked by their ELBO); a search for several
    modes, and where there are some a flow fitted to a mixture of Gaussians on them; an affine map trained first, then a
    flow on top that begins as the identity, both by the path gradient of the ELBO, and of the forward divergence once
    weights are fairly even, with many draws at once and a step size that decays; then importance weights of fresh
    draws, and a verdict.  Nothing has to be tuned; what can be is an option of
    :class:`~pyro_flows.infer.AutoFlow`.  Discrete latents that Pyro can enumerate are summed out, whether or not the
    model marks them; predictions draw them anew.  Parameters of the model itself are held as they are.

    Args:
        model_or_guide: a Pyro model, or an :class:`~pyro_flows.infer.AutoFlow` of one, whose options are then used.
        *args: the model's arguments.
        **kwargs: likewise.
        seconds: wall time for everything, the verdict included.
        steps: of the optimiser.  With both, whichever ends first; with neither, 4000 steps.  Training stops before if
            the log-weights are constant, for then nothing is left to learn.
        progress: whether to show a bar.
        fit_prior: whether to fit the prior of a model without data; otherwise a model without an observed site or a
            factor is refused.

    Returns:
        a :class:`~pyro_flows.infer.GuideFit`: ``fit.verdict``, ``fit.sample(n)``, ``fit.predictive(n)``,
        ``fit.to_arviz()``.

    Raises:
        ValueError: for models that no such guide can represent (see :class:`~pyro_flows.infer.AutoFlow`), for a model
            in which nothing is observed, if the model has an argument named as one of this function's, or if the
            density fails at most draws.

    References:
        Advances in Black-Box VI (Agrawal, Sheldon & Domke, 2020), arXiv:2006.10343; Sticking the Landing (Roeder et
        al., 2017), arXiv:1703.09194; Pathfinder (Zhang et al., 2022), arXiv:2108.03782; Yes, but Did It Work? (Yao
        et al., 2018), arXiv:1802.02538.
    """
    begin = time.monotonic()
    guide = _guide(model_or_guide, kwargs)
    guide.of_prior = fit_prior
    budget = Budget(steps, seconds, begin)
    notes: list[str] = []
    with seeded(guide.seed), poutine.block(), torch.enable_grad():
        bar = _Bar(budget, progress)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                bar.say("looking for a start")
                guide.start_seconds = None if seconds is None else 0.25 * seconds
                guide.hide_discrete(*args, **kwargs)
                guide.setup(*args, **kwargs)
                _refuse_unobserved(guide)
                density = guide.density(*args, **kwargs)
                initial = guide.initial
                _refuse_random(guide, density, initial)
                particles = _particles(guide, density, initial)
            for each in {str(each.message): each for each in caught}.values():
                notes.append(str(each.message))
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
            generator = Generator().manual_seed(int(torch.randint(2**62, ())))
            part = ASSESSING if density.vectorized else SLOW_ASSESSING
            budget.keep = 0.0 if seconds is None else part * seconds
            several = _several_modes(guide, density, initial, budget, generator)
            if several is not None:
                found = cover_modes(guide.flow, several, generator, _limit(budget, 0.15))
                notes.append(f"the start covers {found} modes, by a mixture of Gaussians")
                covered = copy.deepcopy(guide.flow.state_dict())
            training = Training(
                guide.flow,
                density,
                budget,
                particles=particles,
                path_gradient=guide.path_gradient,
                tempering=guide.tempering if several is None else None,
                covering=several is not None,
                report=bar.report,
            )
            budget.begin()
            training.run(fresh=several is None)
            bar.say("judging")
            assessment = _assess(guide, density, initial, budget, generator)
            if several is not None and assessment.verdict.label == "modes missing":
                trained = copy.deepcopy(guide.flow.state_dict())
                guide.flow.load_state_dict(covered)
                before = _assess(guide, density, initial, budget, generator)
                if before.verdict.label == "modes missing" or before.importance.ess < 0.1:
                    guide.flow.load_state_dict(trained)
                else:
                    assessment = before
                    notes.append("training lost a mode, so the guide is the fit to the mixture of Gaussians")
        finally:
            bar.close()
    return GuideFit(
        guide.flow,
        guide.latents,
        training.history,
        assessment,
        guide=guide,
        density=density,
        failures=training.dropped,
        evaluations=guide.start_evaluations + density.evaluations,
        notes=tuple(notes),
    )


def _guide(model_or_guide: Callable[..., object] | AutoFlow, kwargs: dict[str, object]) -> AutoFlow:
    guide = model_or_guide if isinstance(model_or_guide, AutoFlow) else AutoFlow(model_or_guide)
    names = _argument_names(guide.plain_model)
    taken = sorted(set(RESERVED) & set(names))
    if taken:
        raise ValueError(
            f"fit_guide: the model has an argument named {taken[0]!r}, as fit_guide itself has: bind it beforehand, "
            f"functools.partial(model, {taken[0]}=...), or rename it"
        )
    options = set(inspect.signature(AutoFlow.__init__).parameters) - {"self", "model"}
    for name in kwargs:
        if name in options and names and name not in names:
            raise TypeError(
                f"fit_guide: {name!r} is no argument of the model; it is an option of the guide: "
                f"fit_guide(AutoFlow(model, {name}=...), ...)"
            )
    return guide


def _argument_names(model: Callable[..., object]) -> list[str]:
    try:
        parameters = inspect.signature(model).parameters.values()
    except (TypeError, ValueError):  # nothing is known of some callables
        return []
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return []
    # What a partial has bound already cannot collide.
    bound = set(getattr(model, "keywords", None) or {})
    return [p.name for p in parameters if p.name not in bound]


def _refuse_unobserved(guide: AutoFlow) -> None:
    if guide.of_prior and not guide.unobserved:
        raise ValueError(
            "fit_guide: fit_prior=True is for a model in which nothing is observed, and this one has data: leave them "
            "out, or hide them, poutine.block(model, expose=[...])"
        )
    if not guide.unobserved or guide.of_prior:
        return
    if guide.hidden_data:
        raise ValueError(
            "fit_guide: nothing is observed in this model, so that its posterior is its prior: poutine.block hides "
            f"the observations {sorted(guide.hidden_data)} along with other sites. Name what to hide, "
            "poutine.block(model, hide=[...]), in place of expose=[...]; or fit the prior on purpose, "
            "fit_guide(..., fit_prior=True)"
        )
    raise ValueError(
        "fit_guide: nothing is observed in this model, so that its posterior is its prior: no site with obs=... or "
        "given by pyro.condition hangs on a latent, and no pyro.factor. Pass the data; or, if poutine.block hides them "
        "within the model, name what to hide by hide=[...] in place of expose=[...]; or fit the prior on purpose, "
        "fit_guide(..., fit_prior=True)"
    )


def _refuse_random(guide: AutoFlow, density: JointDensity, initial: Tensor) -> None:
    if guide.why_not_summed:
        raise ValueError(f"fit_guide: Pyro cannot sum out this model's discrete latents: {guide.why_not_summed}")
    if not guide.subsampled and density.random_at(initial):
        raise ValueError(
            "fit_guide: at fixed values of its latents this model gives another density at each run, so it draws "
            "something that the guide does not know. A minibatch belongs into pyro.plate(..., subsample_size=...); "
            "discrete sites hidden by poutine.block around the model are summed out, those hidden within it are not: "
            "leave them to fit_guide"
        )


@torch.no_grad()
def _particles(guide: AutoFlow, density: JointDensity, initial: Tensor) -> int:
    """As asked, or as many as the model's speed allows: many are worth more than steps, up to a point."""
    if guide.particles is not None:
        return guide.particles
    z = initial + 0.01 * torch.randn(PARTICLES, len(initial), dtype=initial.dtype, device=initial.device)
    density(z[:2])  # finds out whether it runs for many at once
    if not density.vectorized:
        return 8
    times = []
    for count in (PARTICLES, 32, PARTICLES, 32):
        start = time.monotonic()
        density(z[:count])
        times.append(time.monotonic() - start)
    many, few = min(times[0], times[2]), min(times[1], times[3])
    # Where time grows with the draws and steps are dear, fewer draws give more steps.
    return 32 if many > 3e-2 and many > 2 * few else PARTICLES


def _several_modes(
    guide: AutoFlow, density: JointDensity, initial: Tensor, budget: Budget, generator: Generator
) -> ModeProbe | None:
    """Modes that the start leaves out, if they hold a part of the posterior that counts."""
    if guide.subsampled or guide.start == "prior" or guide.tempering is not None:
        return None
    affine = Flow(guide.preconditioner, guide.flow.base)
    z, log_p, log_q = weigh(affine, density, 256 if density.vectorized else 64)
    found = importance(log_p - log_q)
    if not math.isfinite(found.log_evidence):
        return None
    slow = math.inf if density.vectorized else SLOW_SECONDS / 2
    seconds = min(slow, math.inf if budget.seconds is None else 0.15 * budget.seconds)
    starts = 16 if density.vectorized else 6
    probe = search_modes(
        affine, density, z, initial, found.log_evidence, starts=starts, seconds=seconds, generator=generator
    )
    return probe if probe.missing_share > SEVERAL else None


def _assess(
    guide: AutoFlow, density: JointDensity, initial: Tensor, budget: Budget, generator: Generator
) -> Assessment:
    left = budget.left() if density.vectorized else min(budget.left(), SLOW_SECONDS)
    return assess(
        guide.flow,
        density,
        guide.latents,
        initial,
        minibatch=guide.subsampled,
        draws=DRAWS if density.vectorized else FEWEST,
        seconds=max(left, 0.02 * (budget.seconds or 0.0)),
        generator=generator,
    )


def _limit(budget: Budget, part: float) -> float:
    return math.inf if budget.seconds is None else time.monotonic() + part * budget.seconds


class _Bar:
    """A progress bar with the ELBO, or nothing."""

    def __init__(self, budget: Budget, show: bool) -> None:
        self.budget = budget
        self.bar = tqdm(total=100, desc="fit_guide", disable=not show, leave=False, unit="%", bar_format=_FORMAT)
        self._last = 0.0

    def say(self, what: str) -> None:
        self.bar.set_postfix_str(what)

    def report(self, history: History) -> None:
        if self.bar.disable or self.budget.elapsed - self._last < 0.1:
            return
        self._last = self.budget.elapsed
        self.bar.n = min(100, int(100 * self.budget.fraction))
        recent = [v for v in history.elbo[-20:] if math.isfinite(v)]
        elbo = f"ELBO {sum(recent) / len(recent):.3f}, " if recent else ""
        self.bar.set_postfix_str(f"{history.phase[-1]}, {elbo}spread {history.spread[-1]:.3f}, step {len(history)}")

    def close(self) -> None:
        self.bar.close()


_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} {postfix}"
