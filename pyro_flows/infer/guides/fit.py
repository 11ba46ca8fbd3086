"""``fit_guide``: a posterior in one call."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Generator, Tensor
from tqdm.auto import tqdm

from pyro_flows.core.checks import integer
from pyro_flows.infer.guides.assessment import DRAWS, FEWEST, Assessment, assess
from pyro_flows.infer.guides.auto import AutoFlow, seeded
from pyro_flows.infer.guides.choices import (
    SEARCHING,
    SEVERAL,
    SLOW_SECONDS,
    choose_particles,
    seconds_for_verdict,
    several_modes,
    start_within,
    starts_exact,
)
from pyro_flows.infer.guides.cover import cover_modes
from pyro_flows.infer.guides.loop import CHECKPOINT, GuideTraining, History
from pyro_flows.infer.guides.refusals import guide_of, refuse_random, refuse_unobserved
from pyro_flows.infer.guides.result import GuideFit
from pyro_flows.infer.machine import processes
from pyro_flows.infer.machine.budget import Budget
from pyro_flows.infer.machine.checkpoint import Keeper, architecture_of, checksums
from pyro_flows.infer.machine.interrupts import carrying, pyro_as_it_was
from pyro_flows.infer.machine.randomness import random_state, set_random
from pyro_flows.infer.models.broadcasting import warn_once
from pyro_flows.infer.models.enumeration import unblocked
from pyro_flows.infer.models.held import own_density
from pyro_flows.infer.models.joint import JointDensity
from pyro_flows.infer.models.sites import Model
from pyro_flows.infer.search.probe import ModeProbe

__all__ = ["fit_guide"]


_ALIKE = "the processes fit one posterior together, and each takes its part of the draws"
SETTINGS = ("dependencies", "num_particles", "path_gradient", "tempering", "start", "num_starts", "seed", "of_prior")
STARTING = 0.15  # share of the seconds for the start
DEFAULT_STEPS = 4000
SECONDS_BETWEEN_FILES = 30.0  # the most between checkpoints


def fit_guide(
    model_or_guide: Model | AutoFlow,
    /,
    *args: object,
    seconds: float | None = None,
    steps: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    resume: bool = True,
    fit_prior: bool = False,
    **kwargs: object,
) -> GuideFit:
    r"""Fits a flow to the posterior of a model, and says whether to trust it.

    The fit searches for a start (quasi-Newton paths and Laplace's approximation, ranked by their ELBO) and for modes,
    to whose Gaussian mixture it first fits the flow if there are several. It trains an affine map, then a flow on top
    that begins as the identity, by the path gradient of the ELBO and, once weights are fairly even, of the forward
    divergence, with many draws and a decaying step size. Importance weights of fresh draws give the verdict. Options
    are those of :class:`~pyro_flows.infer.AutoFlow`; none needs tuning. Discrete latents that Pyro can enumerate are
    summed out; predictions draw them again.

    A built guide is rebuilt. The guide stays as fitted; the result has its own copy.

    Ctrl-C raises ``KeyboardInterrupt`` and leaves the guide in its best state, in ``eval()``, without gradients. Any
    exception that ends training has the result so far as its attribute ``fit``, ``None`` before training, with a
    verdict computed at first use::

        try:
            fit = fit_guide(model, data, checkpoint="fit.pt")
        except KeyboardInterrupt as stop:
            fit = stop.fit

    If a process group of ``torch.distributed`` is initialized, its processes fit together. Each calls this function
    with the same arguments, and takes its part of the draws.

    The model's own parameters (``pyro.param``, modules) are held at their present or first values, with a warning. The
    result keeps those of ``pyro.param``.

    Args:
        model_or_guide: a Pyro model, or an :class:`~pyro_flows.infer.AutoFlow` of one.
        *args: the model's positional arguments.
        **kwargs: the model's keyword arguments.
        seconds: the wall time, the verdict included.
        steps: the number of optimizer steps. The first limit reached counts; without any, there are 4000 steps.
            Training stops early once the log-weights are constant.
        progress: whether to show a bar.
        checkpoint: a file to save to, and to resume from if it exists; a resumed fit by steps equals an uninterrupted
            one. The file is replaced atomically, has a checksum, and holds no code. An interruption saves the last
            whole step. Each step costs a copy of the state.
        checkpoint_every: the steps between files, which are also written every 30 seconds and when training begins and
            ends.
        resume: whether to continue from an existing checkpoint or replace it.
        fit_prior: whether to fit the prior of a model without observed sites and factors, which is otherwise refused.

    Returns:
        The :class:`~pyro_flows.infer.GuideFit`, with ``verdict``, ``sample``, ``predictive`` and ``to_arviz``.

    Raises:
        ValueError: for a model that no such guide can represent or in which nothing is observed, for a model argument
            named like one of this function's, if the density fails at most draws, or for a checkpoint that is damaged
            or of another fit.
        OSError: if the checkpoint cannot be written, e.g. because the disk is full; the old one is unchanged.

    References:
        Advances in Black-Box VI (Agrawal, Sheldon & Domke, 2020), arXiv:2006.10343; Sticking the Landing (Roeder et
        al., 2017), arXiv:1703.09194; Pathfinder (Zhang et al., 2022), arXiv:2108.03782; Yes, but Did It Work? (Yao et
        al., 2018), arXiv:1802.02538.
    """
    so_far: list[Callable[[], object]] = []
    with carrying(so_far), processes.joined("fit_guide"), ExitStack() as stack:
        if steps is not None:
            integer("fit_guide", "steps", steps)
        if seconds is not None and not 0 < seconds < math.inf:
            raise ValueError(f"fit_guide: expected seconds to be a positive number, got {seconds!r}")
        integer("fit_guide", "checkpoint_every", checkpoint_every)
        budget = Budget(DEFAULT_STEPS if steps is None and seconds is None else steps, seconds, processes.clock())
        guide = guide_of(model_or_guide, kwargs)
        guide.of_prior = fit_prior
        checkpoint = processes.from_first(lambda: checkpoint)
        known = processes.from_first(lambda: CHECKPOINT.read(checkpoint) if resume else None)
        settings = {"steps": budget.steps, "seconds": seconds, **{name: getattr(guide, name) for name in SETTINGS}}
        if processes.count() > 1:
            settings["processes"] = processes.count()
        identity = {"data": checksums(args, kwargs), "settings": settings}
        processes.refuse_different("fit_guide", identity, _ALIKE)
        if known is not None:
            CHECKPOINT.refuse_other(checkpoint, known, identity)
        bar = _Bar(budget, progress and not processes.rank())
        for each in (pyro_as_it_was(), seeded(guide.seed), poutine.block(), torch.enable_grad(), bar):
            stack.enter_context(each)
        with _warned_once() as notes:
            bar.say("looking for a start")
            if guide.is_built:
                guide.restart()
            guide.hide_discrete(*args, **kwargs)
            if known is None:
                begun = _begin(guide, args, kwargs, budget)
            else:
                begun = _begin_again(guide, args, kwargs, budget, known["start"])
        processes.made_alike(guide.flow)
        identity |= {
            "latents": {site.name: f"{tuple(site.shape)} {site.dtype} on {site.support!r}" for site in guide.latents},
            "parameters": checksums((), guide.model_parameters),
            "architecture": architecture_of(guide.flow),
        }
        if known is not None:
            CHECKPOINT.refuse_other(checkpoint, known, identity)
        if begun.density.why_not is not None:
            notes.append(begun.density.why_not)
            warn_once(unblocked(guide.plain_model), begun.density.why_not, stacklevel=2)
        if guide.model_parameters:
            notes.append(_held(guide.model_parameters))
            warnings.warn(notes[-1], stacklevel=2)
        begun.notes = processes.from_first(lambda: list(dict.fromkeys([*notes, *begun.notes])))
        device = begun.initial.device

        def content() -> dict[str, object]:
            return {
                **identity,
                "start": begun.state(guide),
                "training": training.state_dict(),
                "random": random_state(device, search=begun.generator),
            }

        training = GuideTraining(
            guide.flow,
            begun.density,
            budget,
            num_particles=begun.num_particles,
            path_gradient=guide.path_gradient,
            tempering=guide.tempering if begun.covered is None else None,
            covering=begun.covered is not None,
            fresh=begun.covered is None and guide.structure is None,
            report=bar.report,
        )
        if known is not None and checkpoint is not None:
            with CHECKPOINT.refusing(checkpoint):
                training.load_state_dict(known["training"])
                set_random(known["random"], device, search=begun.generator)
        if begun.exact:
            training.phase = "done"
        so_far.append(lambda: _result(guide, begun, training, None))
        path = None if processes.rank() else checkpoint  # one file is enough, as all are alike
        training.run(Keeper(CHECKPOINT, path, content, checkpoint_every, SECONDS_BETWEEN_FILES))
        bar.say("judging")
        assessment = _assess(guide, begun, budget)
        if begun.covered is not None and assessment.verdict.label == "modes missing":
            before = copy.deepcopy(guide)
            before.flow.load_state_dict(begun.covered)
            other = _assess(before, begun, budget)
            if other.verdict.label != "modes missing" and other.importance.ess >= 0.1:
                guide.flow.load_state_dict(begun.covered)
                assessment = other
                begun.notes.append("training lost a mode, so the guide is the fit to the mixture of Gaussians")
        begun.evaluations = int(processes.total(guide.start_evaluations + begun.density.evaluations)[0])
    return _result(guide, begun, training, assessment)


@dataclass
class _Begun:
    density: JointDensity
    initial: Tensor  # a point with finite density
    num_particles: int
    generator: Generator
    covered: dict[str, Tensor] | None = None  # the state of a flow fitted to several modes
    notes: list[str] = field(default_factory=list)
    exact: bool = False  # whether there is nothing to train
    keep: float = 0.0  # seconds for the verdict
    modes: ModeProbe | None = None  # of the search before training
    evaluations: int = 0  # of all processes, at the end

    def state(self, guide: AutoFlow) -> dict[str, object]:
        """Returns the start's part of a checkpoint."""
        return {
            "initial": self.initial,
            "particles": self.num_particles,
            "covered": self.covered,
            "notes": self.notes,
            "vectorized": self.density.vectorized,
            "nesting": guide.latents.max_plate_nesting,
            "bytes_per_draw": self.density.pace.bytes_per_draw,
            "why_not": self.density.why_not,
            "keep": self.keep,
            "modes": None if self.modes is None else vars(self.modes),
            "evaluations": guide.start_evaluations + self.density.evaluations,
        }


def _begin(guide: AutoFlow, args: tuple[object, ...], kwargs: dict[str, object], budget: Budget) -> _Begun:
    """Finds a start, draws per step and the verdict's time."""
    with start_within(guide, None if budget.seconds is None else STARTING * budget.seconds):
        guide.hide_discrete(*args, **kwargs)
        guide.setup(*args, **kwargs)
    refuse_unobserved(guide)
    density = guide.density(*args, **kwargs)
    initial = guide.initial
    refuse_random(guide, density, initial)

    def plan(density: JointDensity) -> dict[str, Any]:
        particles = choose_particles(guide, density, initial, budget.seconds)
        generator = Generator().manual_seed(int(torch.randint(2**62, ())))
        budget.keep = keep = seconds_for_verdict(density, budget.seconds)
        covered, notes = None, []
        several = several_modes(guide, density, initial, budget, generator)
        # A start with the model's structure is better than a Gaussian on one mode.
        enough = several is not None and (guide.structure is None or int((several.share > SEVERAL).sum()) > 1)
        if several is not None and enough and several.missing_share > SEVERAL:
            limit = None if budget.seconds is None else SEARCHING * budget.seconds
            found = cover_modes(guide.flow, several, generator, limit)
            notes.append(f"the start covers {found} modes, by a mixture of Gaussians")
            covered = copy.deepcopy(guide.flow.state_dict())
        budget.step_seconds = max(density.pace.shortest, particles * density.pace.seconds_per_draw)
        exact = covered is None and starts_exact(guide, density)
        known = {"num_particles": particles, "covered": covered, "notes": notes, "keep": keep, "modes": several}
        known["exact"] = exact
        return {"begun": known, "random": generator.get_state(), "step_seconds": budget.step_seconds}

    found = processes.led(density, initial, plan)
    generator = Generator()
    generator.set_state(found["random"])
    begun = _Begun(density, initial, generator=generator, **found["begun"])
    budget.keep, budget.step_seconds = begun.keep, found["step_seconds"]
    budget.begin()
    return begun


def _begin_again(
    guide: AutoFlow, args: tuple[object, ...], kwargs: dict[str, object], budget: Budget, state: dict[str, Any]
) -> _Begun:
    """Reads the start from a checkpoint, and builds a matching guide."""
    start = guide.start
    try:
        guide.start = "prior"
        guide.hide_discrete(*args, **kwargs)
        guide.setup(*args, **kwargs)
        guide.__dict__.pop("_first_density", None)
        guide.vectorized = state["vectorized"]
        density = guide.density(*args, **kwargs)
    finally:
        guide.start = start
    guide.vectorized = None if density.vectorized else False
    guide.latents.max_plate_nesting = state["nesting"]
    guide.initial = state["initial"].to(guide.initial)
    guide.start_evaluations = state["evaluations"]
    density.why_not, density.pace.bytes_per_draw = state["why_not"], state["bytes_per_draw"]
    budget.keep = state["keep"]
    begun = _Begun(density, guide.initial, state["particles"], Generator(), state["covered"], state["notes"])
    begun.keep, begun.modes = state["keep"], state["modes"] and ModeProbe(**state["modes"])
    return begun


def _result(guide: AutoFlow, begun: _Begun, training: GuideTraining, assessment: Assessment | None) -> GuideFit:
    own = copy.deepcopy(guide)
    density = own_density(begun.density, own.latents, guide.model_parameters)
    return GuideFit(
        own.flow,
        own.latents,
        training.history,
        assessment or partial(_assess, own, replace(begun, density=density)),
        guide=own,
        density=density,
        failures=training.dropped,
        evaluations=begun.evaluations or guide.start_evaluations + begun.density.evaluations,
        notes=tuple(begun.notes),
    )


@contextmanager
def _warned_once() -> Iterator[list[str]]:
    """Gives each warning once, at the end, and lists their texts."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield notes
    for each in {str(each.message): each for each in caught}.values():
        notes.append(str(each.message))
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def _held(parameters: dict[str, Tensor]) -> str:
    names = ", ".join(map(repr, list(parameters)[:6])) + (", …" if len(parameters) > 6 else "")
    return (
        f"the parameters of the model ({names}) are held at their present values, and not trained: the posterior is "
        "that at these values. Train them first, by SVI(model, AutoFlow(model), optimizer, Trace_ELBO()); if they "
        "are meant to be held, freeze them (requires_grad_(False)) or give poutine.block(model, hide_types=['param'])"
    )


def _assess(guide: AutoFlow, begun: _Begun, budget: Budget | None = None) -> Assessment:
    left = math.inf
    if budget is not None and budget.seconds is not None:
        left = max(budget.left(), 0.02 * budget.seconds)

    def run(density: JointDensity) -> Assessment:
        return assess(
            guide.flow,
            density,
            guide.latents,
            begun.initial,
            minibatch=guide.subsampled,
            num_samples=DRAWS if density.many_at_once else FEWEST,
            seconds=left,
            search_seconds=left if density.many_at_once else SLOW_SECONDS / 3,
            known=begun.modes,
            generator=begun.generator,
        )

    return processes.led(begun.density, begun.initial, run)


class _Bar:
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

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()


_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} {postfix}"
