"""``fit_guide``: a posterior in one call."""

from __future__ import annotations

import copy
import inspect
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm

from pyro_flows.core.checks import integer
from pyro_flows.infer.guides.assessment import DRAWS, FEWEST, Assessment, assess
from pyro_flows.infer.guides.auto import AutoFlow, seeded
from pyro_flows.infer.guides.choices import (
    SLOW_SECONDS,
    choose_particles,
    seconds_for_verdict,
    several_modes,
    start_within,
)
from pyro_flows.infer.guides.cover import cover_modes
from pyro_flows.infer.guides.loop import CHECKPOINT, GuideTraining, History
from pyro_flows.infer.guides.result import GuideFit
from pyro_flows.infer.machine.budget import Budget
from pyro_flows.infer.machine.checkpoint import Keeper, architecture_of, checksums
from pyro_flows.infer.machine.interrupts import carrying, pyro_as_it_was
from pyro_flows.infer.machine.randomness import random_state, set_random
from pyro_flows.infer.models.broadcasting import warn_once
from pyro_flows.infer.models.enumeration import unblocked
from pyro_flows.infer.models.joint import JointDensity
from pyro_flows.infer.models.latents import Latents

__all__ = ["HeldParameters", "fit_guide", "own_density"]


class HeldParameters(Messenger):
    """Gives a model's ``pyro.param`` statements the values that they had.

    Parameters that belong to a module are its own, whatever a handler says; where they have changed a warning says so.
    """

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_param(self, msg: dict[str, object]) -> None:
        held = self.values.get(msg["name"])
        if held is None:
            return
        init = msg["args"][1] if len(msg["args"]) > 1 else None
        if not isinstance(init, nn.Parameter):
            msg["value"], msg["done"] = held, True
        elif not torch.equal(init.detach(), held):
            warnings.warn(
                f"the parameter {msg['name']!r} of the model has changed since this fit, whose draws belong to its "
                "earlier value: fit the guide again",
                stacklevel=2,
            )


def own_density(density: JointDensity, latents: Latents, parameters: dict[str, Tensor]) -> JointDensity:
    """The same density with the data and parameters as they are now, whatever becomes of the tensors given."""
    own = copy.copy(density)
    own.latents = latents
    own.args, own.kwargs = tree_map(_detached_copy, (density.args, density.kwargs))
    if parameters:
        own.model = HeldParameters(parameters)(density.model)
    return own


def _detached_copy(leaf: object) -> object:
    if type(leaf) is Tensor:
        return leaf.detach().clone()
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


RESERVED = ("seconds", "steps", "progress", "checkpoint", "checkpoint_every", "resume", "fit_prior")


SETTINGS = ("particles", "path_gradient", "tempering", "start", "num_starts", "seed", "of_prior")


STARTING = 0.25  # of the seconds, for the start


DEFAULT_STEPS = 4000


SECONDS_BETWEEN_FILES = 30.0  # of checkpoints, at most


def fit_guide(
    model_or_guide: Callable[..., object] | AutoFlow,
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

    An informed start (quasi-Newton paths and Laplace's approximation, ranked by their ELBO); a search for several
    modes, and where there are some a flow fitted to a mixture of Gaussians on them; an affine map trained first, then a
    flow on top that begins as the identity, both by the path gradient of the ELBO, and of the forward divergence once
    weights are fairly even, with many draws at once and a step size that decays; then importance weights of fresh
    draws, and a verdict.  Nothing has to be tuned; what can be is an option of
    :class:`~pyro_flows.infer.AutoFlow`.  Discrete latents that Pyro can enumerate are summed out, whether or not the
    model marks them; predictions draw them anew.

    A guide that was set up or trained before is built anew, at the start that these data give.  It is left as it was
    fitted, and the result has a copy of its own, which no later training of the guide changes.

    Ctrl-C raises ``KeyboardInterrupt`` as anywhere else, and leaves the guide in its best state, in ``eval()``, without
    gradients.  The exception, as any other that ends the training, carries the result so far as its attribute ``fit``,
    which is ``None`` before training begins; its verdict is formed when it is first asked for::

        try:
            fit = fit_guide(model, data, checkpoint="fit.pt")
        except KeyboardInterrupt as stop:
            fit = stop.fit

    Parameters of the model itself (``pyro.param``, modules) are held at their present values, or at their first ones
    where the model runs for the first time, and a warning says so.  The result keeps those of ``pyro.param``.

    Args:
        model_or_guide: a Pyro model, or an :class:`~pyro_flows.infer.AutoFlow` of one, whose options are then used.
        *args: the model's arguments.
        **kwargs: likewise.
        seconds: wall time for everything, the verdict included.
        steps: of the optimiser.  With both, whichever ends first; with neither, 4000 steps.  Training stops before if
            the log-weights are constant, for then nothing is left to learn.
        progress: whether to show a bar.
        checkpoint: a file to save to, and to resume from if it is there; a resumed fit by steps equals one that never
            stopped.  The file is replaced as a whole, its check sum is verified, and nothing in it is run.  An
            interruption saves the state after the last whole step.  It costs a copy of the state at each step.
        checkpoint_every: in steps; it is saved every 30 seconds and when training begins and ends as well.
        resume: whether to go on from a checkpoint that is there; if not, the fit begins anew and replaces it.
        fit_prior: whether to fit the prior of a model without data; otherwise a model without an observed site or a
            factor is refused.

    Returns:
        a :class:`~pyro_flows.infer.GuideFit`: ``fit.verdict``, ``fit.sample(n)``, ``fit.predictive(n)``,
        ``fit.to_arviz()``.

    Raises:
        ValueError: for models that no such guide can represent (see :class:`~pyro_flows.infer.AutoFlow`), for a model
            in which nothing is observed, if the model has an argument named as one of this function's, if the density
            fails at most draws, or for a checkpoint that is damaged or of another fit.
        OSError: if the checkpoint cannot be written, e.g. because the disk is full; the old one is unchanged.

    References:
        Advances in Black-Box VI (Agrawal, Sheldon & Domke, 2020), arXiv:2006.10343; Sticking the Landing (Roeder et
        al., 2017), arXiv:1703.09194; Pathfinder (Zhang et al., 2022), arXiv:2108.03782; Yes, but Did It Work? (Yao
        et al., 2018), arXiv:1802.02538.
    """
    if steps is not None:
        integer("fit_guide", "steps", steps)
    if seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"fit_guide: expected seconds to be a positive number, got {seconds!r}")
    integer("fit_guide", "checkpoint_every", checkpoint_every)
    budget = Budget(DEFAULT_STEPS if steps is None and seconds is None else steps, seconds, time.monotonic())
    guide = _guide(model_or_guide, kwargs)
    guide.of_prior = fit_prior
    known = CHECKPOINT.read(checkpoint) if resume else None
    identity = {
        "data": checksums(args, kwargs),
        "settings": {"steps": budget.steps, "seconds": seconds, **{name: getattr(guide, name) for name in SETTINGS}},
    }
    if known is not None:
        CHECKPOINT.refuse_other(checkpoint, known, identity)
    so_far: list[Callable[[], GuideFit]] = []
    bar = _Bar(budget, progress)
    with carrying(so_far), pyro_as_it_was(), seeded(guide.seed), poutine.block(), torch.enable_grad(), bar:
        with _warned_once() as notes:
            bar.say("looking for a start")
            if guide.latents is not None:
                guide.restart()
            guide.hide_discrete(*args, **kwargs)
            begun = (_begin if known is None else _begin_again)(guide, args, kwargs, budget, known)
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
        begun.notes = list(dict.fromkeys([*notes, *begun.notes]))
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
            particles=begun.particles,
            path_gradient=guide.path_gradient,
            tempering=guide.tempering if begun.covered is None else None,
            covering=begun.covered is not None,
            fresh=begun.covered is None,
            report=bar.report,
        )
        if known is not None:
            with CHECKPOINT.refusing(checkpoint):
                training.load_state_dict(known["training"])
                set_random(known["random"], device, search=begun.generator)
        so_far.append(lambda: _result(guide, begun, training, None))
        training.run(Keeper(CHECKPOINT, checkpoint, content, checkpoint_every, SECONDS_BETWEEN_FILES))
        bar.say("judging")
        assessment = _assess(guide, begun.density, begun.initial, begun.generator, budget)
        if begun.covered is not None and assessment.verdict.label == "modes missing":
            before = copy.deepcopy(guide)
            before.flow.load_state_dict(begun.covered)
            other = _assess(before, begun.density, begun.initial, begun.generator, budget)
            if other.verdict.label != "modes missing" and other.importance.ess >= 0.1:
                guide.flow.load_state_dict(begun.covered)
                assessment = other
                begun.notes.append("training lost a mode, so the guide is the fit to the mixture of Gaussians")
    return _result(guide, begun, training, assessment)


@dataclass
class _Begun:
    """What training begins with.

    Attributes:
        density: of the model.
        initial: a point where it is finite.
        particles: draws per step.
        generator: for searches of modes.
        covered: the state of a flow that was fitted to several modes, ``None`` where there is one.
        notes: for the result.
    """

    density: JointDensity
    initial: Tensor
    particles: int
    generator: Generator
    covered: dict[str, Tensor] | None = None
    notes: list[str] = field(default_factory=list)

    def state(self, guide: AutoFlow) -> dict[str, object]:
        """For a checkpoint."""
        return {
            "initial": self.initial,
            "particles": self.particles,
            "covered": self.covered,
            "notes": self.notes,
            "vectorized": self.density.vectorized,
            "nesting": guide.latents.max_plate_nesting,
            "bytes_per_draw": self.density.pace.bytes_per_draw,
            "why_not": self.density.why_not,
            "keep": self.keep,
            "evaluations": guide.start_evaluations + self.density.evaluations,
        }

    keep: float = 0.0
    """Seconds for the verdict."""


def _begin(guide: AutoFlow, args: tuple[object, ...], kwargs: dict[str, object], budget: Budget, known: None) -> _Begun:
    """A start, and what the model's speed and its modes ask for."""
    with start_within(guide, None if budget.seconds is None else STARTING * budget.seconds):
        guide.hide_discrete(*args, **kwargs)
        guide.setup(*args, **kwargs)
    _refuse_unobserved(guide)
    density = guide.density(*args, **kwargs)
    initial = guide.initial
    _refuse_random(guide, density, initial)
    particles = choose_particles(guide, density, initial, budget.seconds)
    generator = Generator().manual_seed(int(torch.randint(2**62, ())))
    begun = _Begun(density, initial, particles, generator, keep=seconds_for_verdict(density, budget.seconds))
    budget.keep = begun.keep
    several = several_modes(guide, density, initial, budget, generator)
    if several is not None:
        limit = None if budget.seconds is None else 0.15 * budget.seconds
        found = cover_modes(guide.flow, several, generator, limit)
        begun.notes.append(f"the start covers {found} modes, by a mixture of Gaussians")
        begun.covered = copy.deepcopy(guide.flow.state_dict())
    budget.begin()
    budget.step_seconds = max(density.pace.shortest, particles * density.pace.seconds_per_draw)
    return begun


def _begin_again(
    guide: AutoFlow,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    budget: Budget,
    known: dict[str, dict[str, object]],
) -> _Begun:
    """What a checkpoint says of the start, and a guide to be filled with its state."""
    state, start = known["start"], guide.start
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
    return _Begun(
        density, guide.initial, state["particles"], Generator(), state["covered"], state["notes"], state["keep"]
    )


def _result(guide: AutoFlow, begun: _Begun, training: GuideTraining, assessment: Assessment | None) -> GuideFit:
    """The result, which owns its guide, and the density of the data as they are now."""
    own = copy.deepcopy(guide)
    density = own_density(begun.density, own.latents, guide.model_parameters)
    return GuideFit(
        own.flow,
        own.latents,
        training.history,
        assessment or partial(_assess, own, density, begun.initial, begun.generator),
        guide=own,
        density=density,
        failures=training.dropped,
        evaluations=guide.start_evaluations + begun.density.evaluations,
        notes=tuple(begun.notes),
    )


@contextmanager
def _warned_once() -> Iterator[list[str]]:
    """Gives each warning from inside once, at the end, and a list of what they say."""
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
        f"the parameters of the model ({names}) are held at the values that they have, and not trained: the posterior "
        "is that at these values. Train them first, by SVI(model, AutoFlow(model), optimizer, Trace_ELBO()); if they "
        "are meant to be held, freeze them (requires_grad_(False)) or give poutine.block(model, hide_types=['param'])"
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


def _assess(
    guide: AutoFlow, density: JointDensity, initial: Tensor, generator: Generator, budget: Budget | None = None
) -> Assessment:
    """The verdict, in what is left of the budget; without one, for a fit that was interrupted, as by steps."""
    seconds = None if budget is None else budget.seconds
    left = math.inf if seconds is None else max(budget.left(), 0.02 * seconds)
    return assess(
        guide.flow,
        density,
        guide.latents,
        initial,
        minibatch=guide.subsampled,
        draws=DRAWS if density.vectorized else FEWEST,
        seconds=left,
        search_seconds=left if density.vectorized else SLOW_SECONDS / 3,
        generator=generator,
    )


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

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()


_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} {postfix}"
