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

from pyro_flows.core.checks import choice, first_few, integer, positive_seconds
from pyro_flows.infer.diagnostics.verdict import MODES
from pyro_flows.infer.guides import choices
from pyro_flows.infer.guides.assessment import DRAWS, FEWEST, Assessment, assess
from pyro_flows.infer.guides.auto import AutoFlow
from pyro_flows.infer.guides.cover import add_modes, cover_modes
from pyro_flows.infer.guides.loop import CHECKPOINT, GuideTraining, History, mean_of_finite
from pyro_flows.infer.guides.modes import with_base_of
from pyro_flows.infer.guides.posterior import spline_of, with_spline
from pyro_flows.infer.guides.refusals import guide_of, refuse_random, refuse_unobserved
from pyro_flows.infer.guides.result import GuideFit
from pyro_flows.infer.machine import processes
from pyro_flows.infer.machine.budget import Budget
from pyro_flows.infer.machine.callback import Callback, check_callback
from pyro_flows.infer.machine.checkpoint import Keeper, architecture_of, checksums
from pyro_flows.infer.machine.compiled import Compile
from pyro_flows.infer.machine.interrupts import SoFar, carrying, pyro_as_it_was
from pyro_flows.infer.machine.progress import ProgressBar
from pyro_flows.infer.machine.randomness import random_state, seeded, set_random
from pyro_flows.infer.models.broadcasting import warn_once
from pyro_flows.infer.models.enumeration import unblocked
from pyro_flows.infer.models.held import own_density
from pyro_flows.infer.models.joint import JointDensity
from pyro_flows.infer.models.sites import Model
from pyro_flows.infer.search.probe import ModeProbe
from pyro_flows.transforms import FixedSpline

__all__ = ["fit_guide"]


_ALIKE = "the processes fit one posterior together, and each takes its part of the draws"
SETTINGS = ("dependencies", "num_particles", "path_gradient", "tempering", "start", "num_starts", "seed", "of_prior")
STARTING = 0.2  # share of the seconds for the start
WALKING = 0.08  # most share of the seconds for a walk of the weighted draws
WALK_EVALUATIONS = 0.3  # the same of evaluations, which take less than those of training
SEARCHING_ON = 0.25  # most share of the seconds for the last search, if training used its own
RESTARTS = 3  # from modes that were found after training
ANEW, COVERING = 0.2, 0.2  # least share of the seconds left for another training; the part of it for its start
ADDING, REJUDGING = 0.05, 0.5  # the same for modes that are only added; the part of it for another verdict
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
    compile: Compile = "auto",
    callback: Callback | None = None,
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
        seconds: the wall time, the verdict included. Without ``steps``, the search for modes has what training leaves.
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
        compile: whether a second process compiles the steps, on a CPU, for a model whose density is recorded for all
            draws at once. ``"auto"``: where the fit will take much longer than compiling, which takes 15 to 60 CPU
            seconds, or where the compiled steps are on disk, as after an earlier fit with data of the same shape.
            ``True`` waits for it. The numbers are those of plain steps, but for rounding.
        callback: a function that is called every 50 steps, with a dictionary of the ``step``, the mean ``elbo`` and
            ``spread`` of these steps, ``rate``, ``phase``, ``seconds``, ``weight`` and ``failures``, as in the history.
            If it returns ``True``, training stops, and may be resumed from a checkpoint. Of several processes, the
            first calls it. It has random numbers of its own, and its exceptions carry the fit.

    Returns:
        The :class:`~pyro_flows.infer.GuideFit`, with ``verdict``, ``sample``, ``predictive`` and ``to_arviz``.

    Raises:
        ValueError: for a model that no such guide can represent or in which nothing is observed, for a model argument
            named like one of this function's, if the density fails at most draws, or for a checkpoint that is damaged
            or of another fit.
        OSError: if the checkpoint cannot be written, e.g. because the disk is full; the old one is unchanged.

    Example:
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> fit = pf.fit_guide(model, torch.tensor([1.0, 2.0, 3.0]), steps=20)
        >>> fit.verdict.label
        'good'
        >>> fit.sample(100)["loc"].shape
        torch.Size([100])

    References:
        Advances in Black-Box VI (Agrawal, Sheldon & Domke, 2020), arXiv:2006.10343; Sticking the Landing (Roeder et
        al., 2017), arXiv:1703.09194; Pathfinder (Zhang et al., 2022), arXiv:2108.03782; Yes, but Did It Work? (Yao et
        al., 2018), arXiv:1802.02538.
    """
    so_far: SoFar = []
    with carrying(so_far), processes.joined("fit_guide"), ExitStack() as stack:
        if steps is not None:
            integer("fit_guide", "steps", steps)
        positive_seconds("fit_guide", "seconds", seconds)
        integer("fit_guide", "checkpoint_every", checkpoint_every)
        check_callback("fit_guide", callback)
        if not isinstance(compile, bool):
            choice("fit_guide", "compile", compile, ("auto",))
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
        bar = ProgressBar("fit_guide", progress and not processes.rank())
        stack.callback(bar.close)
        for each in (pyro_as_it_was(), seeded(guide.seed), poutine.block(), torch.enable_grad()):
            stack.enter_context(each)
        with _warned_once() as notes:
            bar.show(None, "looking for a start")
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
            "architecture": architecture_of(guide.flow.chain),  # modes may be added to the base
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

        def trainer() -> GuideTraining:
            return GuideTraining(
                guide.flow,
                begun.density,
                budget,
                num_particles=begun.num_particles,
                path_gradient=guide.path_gradient,
                tempering=guide.tempering if begun.covered is None else None,
                covering=begun.covered is not None,
                fresh=begun.covered is None and not begun.informed,
                level=begun.level if begun.covered is None and begun.informed else -math.inf,
                compile=compile,
                report=_reporting(bar, budget),
                callback=callback,
            )

        training = trainer()
        if known is not None and checkpoint is not None:
            with CHECKPOINT.refusing(checkpoint):
                training.load_state_dict(known["training"])
                set_random(known["random"], device, search=begun.generator)
        if begun.exact:
            training.phase = "done"
        so_far.append(lambda: _result(guide, begun, training, None))
        path = None if processes.rank() else checkpoint  # one file is enough, as all are alike
        for times in range(RESTARTS + 1):
            training.run(Keeper(CHECKPOINT, path, content, checkpoint_every, SECONDS_BETWEEN_FILES))
            if training.halted:
                begun.notes.append(f"the callback ended training after {len(training.history)} steps")
            bar.show(None, "judging")
            assessment = _assess(guide, begun, budget)
            if begun.covered is not None and assessment.verdict.label == MODES:
                assessment = _fit_to_mixture(guide, begun, budget, begun.covered) or assessment
            probe = assessment.probe
            least = ANEW if guide.structure is not None else ADDING
            late = budget.seconds is not None and budget.left() < least * budget.seconds
            stay = training.halted or late or guide.start == "prior" or assessment.verdict.label != MODES
            if times == RESTARTS or probe is None or stay:
                break
            bar.show(None, "adding modes")
            _cover(guide, begun, budget, probe)
            training = trainer().after(training)
        begun.evaluations = int(processes.total(guide.start_evaluations + begun.density.evaluations)[0])
    return _result(guide, begun, training, assessment)


def _load(guide: AutoFlow, state: dict[str, Tensor]) -> None:
    """Loads a state of the flow, of before or after it covered several modes."""
    guide.flow = with_base_of(state, "base.", guide.flow)
    guide.flow.load_state_dict(state)


def _cover(guide: AutoFlow, begun: _Begun, budget: Budget, probe: ModeProbe) -> None:
    """Adds the modes that a guide misses; or begins it anew, from a mixture of Gaussians on all modes known."""

    def covered() -> tuple[str, dict[str, Tensor], Tensor]:
        added = add_modes(guide, probe)
        note = f"a later search found other modes: {added} of them were added to the guide"
        if not added:
            _load(guide, begun.blank)
            limit = None if budget.seconds is None else COVERING * budget.left()
            found = cover_modes(guide, begun.density, probe, begun.generator, limit)
            note = f"a later search found other modes: training began anew, from {found} modes"
        return note, copy.deepcopy(guide.flow.state_dict()), begun.generator.get_state()

    note, begun.covered, random = processes.from_first(covered)
    _load(guide, begun.covered)
    begun.generator.set_state(random)
    begun.modes = probe
    begun.notes.append(note)
    budget.keep = min(budget.keep, REJUDGING * budget.left())
    budget.begin()


def _fit_to_mixture(guide: AutoFlow, begun: _Begun, budget: Budget, covered: dict[str, Tensor]) -> Assessment | None:
    """Returns to the fit to the mixture if that has the modes which training lost."""
    before = copy.deepcopy(guide)
    _load(before, covered)
    other = _assess(before, begun, budget)
    if other.verdict.label == MODES or other.importance.ess < 0.1:
        return None
    _load(guide, covered)
    begun.notes.append("training lost a mode, so the guide is the fit to the mixture of Gaussians")
    return other


@dataclass
class _Begun:
    density: JointDensity
    initial: Tensor  # a point with finite density
    num_particles: int
    generator: Generator
    blank: dict[str, Tensor]  # the state of the flow before any training
    covered: dict[str, Tensor] | None = None  # the state of a flow fitted to several modes
    notes: list[str] = field(default_factory=list)
    exact: bool = False  # whether there is nothing to train
    level: float = -math.inf  # at least the ELBO of the start, if that may be better than what follows
    keep: float = 0.0  # seconds for the verdict
    modes: ModeProbe | None = None  # of the search before training
    evaluations: int = 0  # of all processes, at the end

    @property
    def informed(self) -> bool:
        """Whether the flow began with members' conditional means and scales."""
        return any(bool(value.any()) for name, value in self.blank.items() if ".coefficients_" in name)

    def state(self, guide: AutoFlow) -> dict[str, object]:
        """Returns the start's part of a checkpoint."""
        spline = spline_of(guide.flow)
        return {
            "initial": self.initial,
            "particles": self.num_particles,
            "blank": self.blank,
            "covered": self.covered,
            "notes": self.notes,
            "vectorized": self.density.vectorized,
            "nesting": guide.latents.max_plate_nesting,
            "bytes_per_draw": self.density.pace.bytes_per_draw,
            "why_not": self.density.why_not,
            "keep": self.keep,
            "modes": None if self.modes is None else vars(self.modes),
            "knots": None if spline is None else {"dims": spline.dims, "knots": spline.knots},
            "evaluations": guide.start_evaluations + self.density.evaluations,
            "dense": guide.structure is None,
        }


def _begin(guide: AutoFlow, args: tuple[object, ...], kwargs: dict[str, object], budget: Budget) -> _Begun:
    """Finds a start, draws per step and the verdict's time."""
    with choices.start_within(guide, None if budget.seconds is None else STARTING * budget.seconds):
        guide.setup(*args, **kwargs)
    refuse_unobserved(guide)
    density = guide.density(*args, **kwargs)
    initial = guide.initial
    refuse_random(guide, density, initial)
    blank = copy.deepcopy(guide.flow.state_dict())

    def plan(density: JointDensity) -> dict[str, Any]:
        particles = choices.choose_particles(guide, density, initial, budget.seconds)
        generator = Generator().manual_seed(int(torch.randint(2**62, ())))
        covered, notes = None, []
        several = choices.several_modes(guide, density, initial, budget, generator)
        searched = guide.subsampled or (several is not None and several.complete)
        budget.keep = keep = choices.seconds_for_verdict(density, budget, searched)
        # A start with the model's structure is better than a Gaussian on one mode.
        enough = several is not None and (guide.structure is None or int((several.share > choices.SEVERAL).sum()) > 1)
        if several is not None and enough and several.missing_share > choices.SEVERAL:
            limit = None if budget.seconds is None else choices.SEARCHING * budget.seconds
            found = cover_modes(guide, density, several, generator, limit)
            notes.append(f"the start covers {found} modes, by a mixture of Gaussians")
            covered = copy.deepcopy(guide.flow.state_dict())
        elif several is not None and choices.moved_to_mode(guide, density, several):
            notes.append("the start is the Gaussian on a mode that the search found")
        budget.step_seconds = max(density.pace.shortest, particles * density.pace.seconds_per_draw)
        exact, level = (False, -math.inf) if covered is not None else choices.start_weights(guide, density)
        known = {"num_particles": particles, "covered": covered, "notes": notes, "keep": keep, "modes": several}
        known |= {"exact": exact, "level": level}
        return {"begun": known, "random": generator.get_state(), "step_seconds": budget.step_seconds}

    found = processes.led(density, initial, plan)
    generator = Generator()
    generator.set_state(found["random"])
    begun = _Begun(density, initial, generator=generator, blank=blank, **found["begun"])
    if begun.covered is not None:  # by the first of several processes
        _load(guide, begun.covered)
    budget.keep, budget.step_seconds = begun.keep, found["step_seconds"]
    budget.begin()
    return begun


def _begin_again(
    guide: AutoFlow, args: tuple[object, ...], kwargs: dict[str, object], budget: Budget, state: dict[str, Any]
) -> _Begun:
    """Reads the start from a checkpoint, and builds a matching guide."""
    start, dependencies = guide.start, guide.dependencies
    try:
        guide.start = "prior"  # without a search, which may have found no structure
        guide.dependencies = "dense" if state["dense"] else dependencies
        guide.setup(*args, **kwargs)
        guide.__dict__.pop("_first_density", None)
        guide.vectorized = state["vectorized"]
        density = guide.density(*args, **kwargs)
    finally:
        guide.start, guide.dependencies = start, dependencies
    if state["knots"] is not None:
        spline = FixedSpline(guide.latents.dim, **state["knots"])
        guide.flow = with_spline(guide.flow, spline.to(guide.initial.device))
    if state["covered"] is not None:
        guide.flow = with_base_of(state["covered"], "base.", guide.flow)
    guide.vectorized = None if density.vectorized else False
    guide.latents.max_plate_nesting = state["nesting"]
    guide.initial = state["initial"].to(guide.initial)
    guide.start_evaluations = state["evaluations"]
    density.why_not, density.pace.bytes_per_draw = state["why_not"], state["bytes_per_draw"]
    budget.keep = state["keep"]
    several = {name: state[name] for name in ("blank", "covered", "notes")}
    begun = _Begun(density, guide.initial, state["particles"], Generator(), **several)
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
    names = first_few(map(repr, parameters), 6)
    return (
        f"the parameters of the model ({names}) are held at their present values, and not trained: the posterior is "
        "that at these values. Train them first, by SVI(model, AutoFlow(model), optimizer, Trace_ELBO()); if they "
        "are meant to be held, freeze them (requires_grad_(False)) or give poutine.block(model, hide_types=['param'])"
    )


def _assess(guide: AutoFlow, begun: _Begun, budget: Budget | None = None) -> Assessment:
    left = walking = math.inf
    searching = choices.SLOW_SECONDS  # cuts off searches of slow models alone
    evaluations = WALK_EVALUATIONS * (guide.start_evaluations + begun.density.evaluations)  # of resumed fits, too
    if budget is not None and budget.seconds is not None:
        left = max(budget.left(), 0.02 * budget.seconds)
        walking, searching = WALKING * budget.seconds, SEARCHING_ON * budget.seconds
    thorough = math.inf > left > searching  # training needed less than its time
    if thorough and begun.density.many_at_once and budget is not None and budget.steps is None:
        searching = left  # a limit of steps asks for an end, not for a search of all the seconds

    def run(density: JointDensity) -> Assessment:
        return assess(
            guide.flow,
            density,
            guide.latents,
            begun.initial,
            minibatch=guide.subsampled,
            num_samples=DRAWS if density.many_at_once else FEWEST,
            seconds=left,
            search_seconds=min(left, searching if density.many_at_once else choices.SLOW_SECONDS / 3),
            thorough=thorough,
            walk_seconds=walking,
            walk_evaluations=evaluations,
            known=begun.modes,
            generator=begun.generator,
        )

    return processes.led(begun.density, begun.initial, run)


def _reporting(bar: ProgressBar, budget: Budget) -> Callable[[History], None]:
    """Shows the last steps ten times a second."""
    last = 0.0

    def report(history: History) -> None:
        nonlocal last
        if bar.hidden or budget.elapsed - last < 0.1:
            return
        last = budget.elapsed
        elbo, spread = mean_of_finite(history.elbo[-20:]), history.spread[-1]
        told = f"{history.phase[-1]}, ELBO {elbo:.3f}, spread {spread:.3f}, step {len(history)}"
        bar.show(budget.fraction, told)

    return report
