"""The training loop of guides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Generator, Tensor

from pyro_flows.distributions import Flow
from pyro_flows.infer.guides.modes import ModesBase
from pyro_flows.infer.guides.posterior import affine_of, frozen, preconditioner_of, slope_of
from pyro_flows.infer.machine import processes
from pyro_flows.infer.machine.budget import Budget, cosine
from pyro_flows.infer.machine.callback import Callback, asks_to_stop
from pyro_flows.infer.machine.checkpoint import CheckpointFormat
from pyro_flows.infer.machine.compiled import Compile, CompiledSteps
from pyro_flows.infer.machine.graph import RecordError, Replay, replayable, unrecorded
from pyro_flows.infer.machine.interrupts import interrupts_held_back
from pyro_flows.infer.machine.loop import TrainingLoop
from pyro_flows.infer.machine.optimizers import AdamW
from pyro_flows.infer.machine.pace import rows_at_once
from pyro_flows.infer.models.joint import JointDensity
from pyro_flows.infer.models.recorded import FAILURES, value_and_slope
from pyro_flows.transforms import Autoregressive

__all__ = ["CHECKPOINT", "GuideTraining", "History", "mean_of_finite", "speeds_of"]

CHECKPOINT = CheckpointFormat(
    "fit_guide",
    5,
    {
        **dict.fromkeys(("architecture", "latents", "data", "parameters", "settings", "start"), dict),
        "training": {
            "phase": str,
            **dict.fromkeys(("first", "caution", "spent", "trained"), float),
            **dict.fromkeys(("flow", "history"), dict),
            "moments": dict,
            "best": (dict, type(None)),
            **dict.fromkeys(("exact", "window", "failed_steps", "dropped", "done"), int),
        },
        "random": {"cpu": Tensor, "search": Tensor},
    },
    counter="done",
)

WARM = 0.2  # the affine phase's part of the budget
WARM_RATES = (0.05, 0.005)
RATES, CAREFUL_RATES = (1e-2, 1e-5), (1e-3, 1e-5)
TEMPERED = 0.6  # part of the flow phase until the posterior has full weight
COVER = 4.0  # weight of the forward divergence
EVEN = 1.5  # spread of log-weights below which this divergence counts
HEAVIEST = 10.0  # largest weight of a draw, in units of the mean
CLIP = 10.0  # largest norm of a gradient
EXACT = 0.02  # spread of log-weights at which training stops
NEARLY, EARLY = 0.2, 0.5  # spread of log-weights that needs little more training, if it comes before this part of it
LEFT = 0.3  # share of the time that is then left to search for modes
PATIENCE = 25  # consecutive steps
BROKEN, SMALLER = 5, 0.3  # steps in a row without a finite draw, after which training returns; what it does to rates
TRIED = 16  # draws that show whether a state is finite
TRUSTED = 1.0  # nats by which noise may hide that the last state is worse than the best
LOOK = 50  # steps per mean compared with others
WARMED = 10  # steps of a kind after which their time is known


@dataclass
class History:
    """The record of a fit, one entry per step.

    Attributes:
        elbo: the mean of log p - log q over the step's draws, in nats.
        spread: the standard deviation of log p - log q.
        rate: the optimizer's step size.
        phase: ``"affine"`` or ``"flow"``.
        seconds: the wall time since the fit began.
        weight: the posterior's weight under tempering, else 1.
        failures: the number of draws whose density was not finite or could not be computed.

    Example:
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> fit = pf.fit_guide(model, torch.tensor(2.0), steps=20)
        >>> len(fit.history.elbo), fit.history.phase[0]
        (20, 'affine')
    """

    elbo: list[float] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    phase: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.elbo)


def mean_of_finite(values: Sequence[float]) -> float:
    """Returns the mean of the finite values, NaN without any."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


class _ModelError(Exception):
    """A failure of the model at all draws of a step."""


def emphasis(log_weights: Tensor, fine: Tensor) -> Tensor:
    r"""Weights each draw by :math:`(1 + c\,w) / (1 + c)`, 1 on average, with its importance weight :math:`w`.

    The path gradient of :math:`KL(q \| p)` alone thins out tails that fit badly; that of :math:`KL(p \| q)`, with
    weights, is noise while these are uneven. Hence :math:`c` rises from 0 to 1 as their spread falls.

    References:
        Gradients should stay on Path (Vaitl et al., 2022), arXiv:2207.08219.
    """
    log_weights = torch.where(fine, log_weights, -math.inf)
    count = fine.sum()
    weights = torch.exp(log_weights - torch.logsumexp(log_weights, 0)) * count
    spread = moments(log_weights, fine)[1]
    spread = spread * ((count - 1) / len(fine)).sqrt()  # of all, where those that failed lie at the mean
    c = (EVEN - spread).clamp(0.0, 1.0)
    return (1.0 + c * weights.clamp(max=HEAVIEST)) / (1.0 + c)


def moments(values: Tensor, fine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean, standard deviation and number of the values that are ``fine``."""
    count = fine.sum().to(values)
    mean = torch.where(fine, values, 0.0).sum() / count
    return mean, (torch.where(fine, values - mean, 0.0).square().sum() / (count - 1).clamp(min=1)).sqrt(), count


def speeds_of(flow: Flow) -> dict[int, float]:
    """Returns speeds, by parameter identity, that undo the gains of affine layers.

    Gains keep stock optimizers' steps small; this loop clips and decays instead.
    """
    speeds: dict[int, float] = {}
    layers: list[Any] = list(flow.modules())
    for layer in layers:
        gain = getattr(getattr(layer, "univariate", None), "gain", 1.0)
        if gain != 1:
            speeds |= {id(parameter): 1 / gain for parameter in layer.net.output_parameters()}
    return speeds


class GuideTraining(TrainingLoop):
    """Trains a guide's flow against an unnormalized log-density.

    The flow's chain holds a flow and a :class:`Preconditioner`; the density maps unconstrained vectors ``(S, dim)`` to
    ``(S,)``. ``tempering`` is the posterior's first weight, or ``None``. ``covering`` adds the forward divergence, to
    keep the shares of modes found. Unless ``fresh``, the flow is not the identity: the affine phase is skipped and
    steps are smaller. The start's ELBO is at least ``level``: if no later one is better, the flow returns to the start.
    ``compile`` says whether steps are compiled. ``report`` takes the history after each step; ``callback`` gets a
    record every 50 steps, and ``halted`` tells that it has ended training.
    """

    flow: Flow

    def __init__(
        self,
        flow: Flow,
        density: Callable[[Tensor], Tensor],
        budget: Budget,
        *,
        num_particles: int,
        path_gradient: bool = True,
        tempering: float | None = None,
        covering: bool = False,
        fresh: bool = True,
        level: float = -math.inf,
        compile: Compile = False,
        report: Callable[[History], None] | None = None,
        callback: Callback | None = None,
    ) -> None:
        super().__init__(flow, budget)
        self.density, self.num_particles, self.path_gradient = density, num_particles, path_gradient
        self.tempering, self.covering, self.compile, self.report = tempering, covering, compile, report
        self.history = History()
        self.failed_steps = 0
        self.dropped = 0
        self.callback, self.halted = callback, False
        self.phase = "affine" if fresh and tempering is None else "flow"
        self._rates = RATES if fresh else CAREFUL_RATES
        self._first = 0.0  # progress at the start of the flow phase
        self._caution = 1.0  # part of the planned rates
        self._best: tuple[float, dict[str, Tensor]] | None = None
        if level > -math.inf:
            self._best = level, self.snapshot()
        self._exact = 0
        self._window = 0
        self._replays: dict[tuple[str, bool], Replay] = {}
        self.compiled: dict[tuple[str, bool], CompiledSteps] = {}  # by phase, and whether draws are emphasized
        self._optimizer: AdamW | None = None
        self._moments: dict[str, list[Tensor]] = {}
        self._places = [(m._parameters, n, p) for m in flow.modules() for n, p in m._parameters.items()]

    def train(self) -> None:
        """Trains through all remaining phases."""
        self.flow.train()
        if self.phase == "affine":
            self._phase(affine_of(self.flow), 0.0, WARM, WARM_RATES)
            if self.halted:
                return
            with interrupts_held_back():
                self._release()
                preconditioner_of(self.flow).fold()
                self._best, self._moments, self._exact, self._window = None, {}, 0, 0
                self._first, self.phase = min(WARM, self.budget.fraction), "flow"
        if self.phase == "flow":
            self._phase(self.flow, self._first, 1.0, self._rates)
            if self.halted:
                return
            with interrupts_held_back():
                self._restore()
                self._release()
                self.phase = "done"
                self.keep(self.budget.done, write=True)

    def settle(self) -> None:
        """Returns to the best state, or stays if the last one is as good."""
        for parameters, name, parameter in self._places:  # an interruption may have left constants there
            parameters[name] = parameter
        for compiled in self.compiled.values():
            compiled.close()
        self._release()
        self._restore()
        self.flow.chain.clear_cache()

    def after(self, earlier: GuideTraining) -> GuideTraining:
        """Continues the record of an earlier training in the same budget; returns itself."""
        self.history, self.failed_steps, self.dropped = earlier.history, earlier.failed_steps, earlier.dropped
        self._first = self.budget.fraction
        return self

    def _release(self) -> None:
        if self._optimizer is not None:
            self._optimizer.release()
            self._optimizer = None

    def _phase(self, flow: Flow, begin: float, end: float, rates: tuple[float, float]) -> None:
        name = self.phase
        optimizer = self._optimizer = AdamW((p for p in flow.parameters() if p.requires_grad), speeds_of(flow))
        if self._moments:
            optimizer.load_state_dict(self._moments)
            self._moments = {}
        if self._best is None:
            self._best = -math.inf, self.snapshot()
        self.keep(self.budget.done, write=True)
        processes.primed(flow, lambda: flow.rsample((self.num_particles,)))

        def plan(ahead: int) -> tuple[float, float]:
            """The step size of a later step, and the posterior's weight in it."""
            part = (self.budget.fraction_after(ahead) - begin) / max(end - begin, 1e-9)
            weight = 1.0 if self.tempering is None else self.tempering ** max(0.0, 1.0 - part / TEMPERED)
            return self._caution * cosine(part, *rates), weight

        while self.budget.fraction < end and self._exact < PATIENCE and not self._settled(name) and not self.halted:
            before, done = processes.clock(), self.budget.done
            plans = [plan(k) for k in range(self._at_once(name, optimizer, plan(0)[1], end))]
            compiled = self.compiled.get((name, self._emphatic(name, plans[0][1])))
            with nullcontext() if compiled is None else compiled.turn(len(plans)):
                if compiled is None or not self._compiled_steps(compiled, name, flow, optimizer, plans):
                    for rate, weight in plans:
                        self._step(name, flow, optimizer, rate, weight)
            self.budget.step_seconds = (processes.clock() - before) / (self.budget.done - done)
            if self._window >= LOOK and self.history.weight[-1] == 1.0:
                self._window = 0
                self._remember()
                self._leave_time(name)
            self.keep(self.budget.done)
            if self.report is not None:
                self.report(self.history)
            if self.callback is not None and len(self.history) % LOOK == 0:
                self.halted = asks_to_stop(self.callback, self._record())
        if self.halted:
            self.keep(self.budget.done, write=True)  # as it is, to go on from

    def _record(self) -> dict[str, Any]:
        """The last row of the history, with the means of what varies from step to step."""
        found = {name: column[-1] for name, column in vars(self.history).items()}
        found |= {name: mean_of_finite(getattr(self.history, name)[-LOOK:]) for name in ("elbo", "spread")}
        return {"step": len(self.history), **found}

    def _leave_time(self, name: str) -> None:
        """Leaves more of the time for the verdict's search if the weights are nearly even."""
        budget, recent = self.budget, self.history.spread[-LOOK:]
        if name == "flow" and budget.seconds is not None and budget.fraction < EARLY and sum(recent) < NEARLY * LOOK:
            budget.keep = max(budget.keep, LEFT * budget.seconds)

    def _emphatic(self, name: str, weight: float) -> bool:
        covering = self.covering and not isinstance(self.flow.base, ModesBase)
        return self.path_gradient and name == "flow" and weight == 1.0 and not covering

    def _at_once(self, name: str, optimizer: AdamW, weight: float, end: float) -> int:
        """Returns the number of the next steps: 1, or more if they are compiled, up to the next look at them."""
        key = name, self._emphatic(name, weight)
        if key not in self.compiled and key in self._replays and self._window >= WARMED:
            self.compiled[key] = self._considered(key, optimizer)
        if key not in self.compiled or not self.compiled[key].ready():
            return 1
        at = (LOOK, self._window), (LOOK, len(self.history)), (PATIENCE, self._exact)
        most = min(size - done % size for size, done in at)
        if self.keeper is not None:
            most = min(most, self.keeper.every - self.budget.done % self.keeper.every)
        count = self.compiled[key].at_once(most, self.budget, self.budget.steps)
        tempered = weight != 1.0  # whose end changes the step
        ends = (k for k in range(1, count) if tempered or self.budget.fraction_after(k) >= end)
        return next(ends, count)

    def _considered(self, key: tuple[str, bool], optimizer: AdamW) -> CompiledSteps:
        """Finds out whether steps can be compiled, and whether that pays."""
        replay, budget, weights = self._replays[key], self.budget, optimizer.values.new_ones(PATIENCE)
        compiled = CompiledSteps(self.compile, replay.why_not or self._uncompilable())
        left = math.inf if budget.steps is None else (budget.steps - budget.done) * budget.step_seconds
        left = min(left, budget.left())
        if compiled.worth_a_look(left):
            try:
                graph = replay.graph_of(weights[0], whole=True)
            except RecordError as error:
                compiled.refuse(str(error))
            else:
                compiled.consider(graph, optimizer, [weights], (), left, scores=3)
        return compiled

    def _uncompilable(self) -> str | None:
        if processes.count() > 1:
            return "steps of several processes exchange gradients"
        if not isinstance(self.density, JointDensity) or not self.density.recorded.batches:
            return "the model's density is not one recorded run for all draws"
        if next(self.flow.parameters()).device.type != "cpu":
            return "steps are compiled for the CPU only"
        return self.density.recorded.why_not

    def _compiled_steps(
        self, compiled: CompiledSteps, name: str, flow: Flow, optimizer: AdamW, plans: Sequence[tuple[float, float]]
    ) -> bool:
        """Takes steps of these sizes, with these weights of the posterior, if it is their turn."""
        if not compiled.has_turn():
            return False
        rates, weights = zip(*plans, strict=True)
        padded = optimizer.values.new_zeros(compiled.steps)
        padded[: len(weights)] = torch.tensor(weights)
        random = torch.get_rng_state()
        state, scores, norms = compiled.run(optimizer, CLIP, rates, [0.0], [padded], ())
        if not bool(((scores[:, 2] > 0) & norms.isfinite()).all()):
            torch.set_rng_state(random)  # plain steps say what is wrong
            return False
        if compiled.trusted:
            with interrupts_held_back():
                optimizer.assign(state)
                cast(JointDensity, self.density).evaluations += len(plans) * self.num_particles
                for (rate, weight), (mean, spread, count) in zip(plans, scores.tolist(), strict=True):
                    self._took(name, mean, spread, count, rate, weight)
            return True
        torch.set_rng_state(random)
        for rate, weight in plans:
            self._step(name, flow, optimizer, rate, weight)
        if not compiled.agrees(optimizer, state):
            compiled.refuse("compiled steps give other numbers than plain ones")
        return True

    def _step(self, name: str, flow: Flow, optimizer: AdamW, rate: float, weight: float) -> None:
        emphatic = self._emphatic(name, weight)
        replay = self._replays.get((name, emphatic))
        if replay is None:
            run = partial(self._gradients, flow, optimizer, emphatic)
            why_not = replayable(flow) if processes.count() == 1 else "its process waits for others"
            replay = self._replays[name, emphatic] = Replay(run, optimizer.parameters, why_not)
        try:
            stats, *grads = replay(optimizer.values.new_tensor(weight))
        except _ModelError:
            self._failed(name, rate, weight)
            return
        norm = optimizer.take(grads)
        mean, spread, count = stats.tolist()  # type: ignore[union-attr]  # the first is never None
        if not count or not bool(norm.isfinite()):
            self._failed(name, rate, weight)
            return
        optimizer.clip(norm, CLIP)
        optimizer.step(rate)
        self._took(name, mean, spread, count, rate, weight)

    def _took(self, name: str, mean: float, spread: float, count: float, rate: float, weight: float) -> None:
        """Notes a step."""
        bad = self.num_particles - int(count)
        self.dropped += bad
        spread = spread if count > 1 else math.inf
        self._exact = self._exact + 1 if spread < EXACT and weight == 1.0 else 0
        self._note(name, mean, spread, rate, weight, bad)

    def _gradients(self, flow: Flow, optimizer: AdamW, emphatic: bool, weight: Tensor) -> list[Tensor | None]:
        """Returns mean, spread and number of the finite log p - log q, and the gradient for each parameter."""
        with Autoregressive.remembering(flow):
            draws, log_q = self._drawn(flow)
            push = slope_of(flow, draws) if self.path_gradient else torch.zeros_like(draws)
        log_p, pull = unrecorded(self._pulled, draws.detach())
        fine = log_p.isfinite() & pull.isfinite().all(-1)
        toward = weight * pull - push
        with torch.no_grad():
            known = log_p - log_q, fine, fine & toward.isfinite().all(-1)
            # Weights of the draws of all processes, which add up their gradients.
            log_weights, before, fine = processes.gathered(self.num_particles, *known)
            share = fine.to(toward)
            if emphatic:
                share = share * emphasis(log_weights, fine)
            share, own = processes.part(-share / before.sum().clamp(min=1)), processes.part(fine)
            toward = torch.where(own.unsqueeze(-1), toward, 0.0) * share.unsqueeze(-1)
        surrogate = (draws * toward).sum()
        if not self.path_gradient:
            surrogate = surrogate + torch.where(own, log_q, 0.0).sum() / before.sum().clamp(min=1)
        if self.covering:
            surrogate = surrogate + self._cover(flow, draws, log_weights, fine)
        grads = torch.autograd.grad(surrogate, optimizer.parameters, allow_unused=True)
        return [torch.stack(moments(log_weights, fine)), *processes.summed(optimizer.parameters, grads)]

    def _drawn(self, flow: Flow) -> tuple[Tensor, Tensor]:
        """Draws, and their log-densities; each of several processes makes a part of the draws of one."""
        if processes.count() == 1:
            return flow.rsample_and_log_prob((self.num_particles,))
        posterior = flow()
        return posterior.from_base(processes.part(posterior.base_dist.rsample((self.num_particles,))))

    def _pulled(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Like :meth:`_pull`, with failures of the model apart from those of the flow.

        Of several processes, one whose model fails gives NaN, and the others go on.
        """
        try:
            with processes.own_draws(self.budget.done):
                return self._pull(z)
        except FAILURES as error:
            if processes.count() == 1:
                raise _ModelError from error
            return torch.full_like(z[:, 0], math.nan), torch.full_like(z, math.nan)

    @torch.enable_grad()
    def _pull(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the model's log-densities ``(S,)`` and gradients ``(S, dim)``, in parts that fit into memory."""
        parts = [value_and_slope(self.density, part) for part in z.split(rows_at_once(self.density, len(z)))]
        log_p, slope = map(torch.cat, zip(*parts, strict=True))
        return log_p, slope

    def _cover(self, flow: Flow, draws: Tensor, log_weights: Tensor, fine: Tensor) -> Tensor:
        """Returns the forward divergence, from weighted draws; where modes are in the base, for their weights alone."""
        with torch.no_grad():
            share = processes.part(torch.where(fine, log_weights, -math.inf).softmax(0))
            z = torch.where(processes.part(fine).unsqueeze(-1), draws, 0.0)
        with frozen(flow.chain) if isinstance(flow.base, ModesBase) else nullcontext():
            return -COVER * (share * flow.score(z)).sum()

    def _failed(self, name: str, rate: float, weight: float) -> None:
        self.failed_steps += 1
        self.dropped += self.num_particles
        self._note(name, math.nan, math.nan, rate, weight, self.num_particles)
        if self.failed_steps > 100 and self.failed_steps > 0.5 * len(self.history):
            self._restore()
            raise ValueError(
                f"fit_guide: {self.failed_steps} of {len(self.history)} steps failed: the model raised, or its density "
                "was not finite at any draw. Check the model with pyro.enable_validation(), or start from a better "
                "point: AutoFlow(model, init_loc_fn=...)"
            )
        broken = self.history.elbo[-BROKEN:]
        if len(broken) == BROKEN and not any(map(math.isfinite, broken)):
            self._retreat()

    def _retreat(self) -> None:
        """Goes on from the best state in smaller steps, after a step that left no draw with a density."""
        if self._best is None or self._optimizer is None:
            return
        with interrupts_held_back():
            self.flow.load_state_dict(self._best[1])
            self._optimizer.forget()
            self._caution *= SMALLER
            self._window = self._exact = 0

    @torch.no_grad()
    def _usable(self) -> bool:
        """Whether the state is finite, and draws are: the last step has no record of what it did."""
        parts = [v for v in self.flow.state_dict().values() if isinstance(v, Tensor) and v.is_floating_point()]
        if not all(v.isfinite().all() for v in parts):
            return False
        noise = torch.randn(TRIED, *self.flow.event_shape, generator=Generator().manual_seed(0), device="cpu")
        self.flow.chain.clear_cache()
        z, ladj = self.flow.chain.forward_and_ladj(noise.to(next(self.flow.parameters())))
        return bool(z.isfinite().all() and ladj.isfinite().all())

    def _note(self, phase: str, elbo: float, spread: float, rate: float, weight: float, bad: int) -> None:
        row = (elbo, spread, rate, phase, self.budget.elapsed, weight, bad)
        self.budget.done += 1
        self._window += 1
        for column, value in zip(vars(self.history).values(), row, strict=True):
            column.append(value)

    def _settled(self, phase: str) -> bool:
        """Whether the affine phase has stopped gaining."""
        done = self.history.elbo
        if phase != "affine" or len(done) < 2 * LOOK or len(done) % LOOK:
            return False
        now, before = torch.tensor(done[-LOOK:]).double(), torch.tensor(done[-2 * LOOK : -LOOK]).double()
        gain, noise = now.mean() - before.mean(), (now.var() + before.var()).sqrt() / math.sqrt(LOOK)
        return bool(gain < 2 * noise)

    def _remember(self) -> None:
        """Stores the state if the last steps were the best."""
        mean = mean_of_finite(self.history.elbo[-LOOK:])
        # Means over steps before parameters broke say nothing of the state.
        last = self.history.elbo[-1]
        if math.isfinite(last) and self._usable() and (self._best is None or mean > self._best[0]):
            self._best = (mean, self.snapshot())

    def _restore(self) -> None:
        """Returns to the best state if the last is clearly worse or not finite."""
        if self._best is None:
            return
        last = [v for v in self.history.elbo[-LOOK:] if math.isfinite(v)]
        if last and math.isfinite(self.history.elbo[-1]) and self._usable():
            noise = 3 * mean_of_finite(self.history.spread[-LOOK:]) / math.sqrt(self.num_particles * len(last))
            if sum(last) / len(last) >= self._best[0] - min(max(0.02, noise), TRUSTED):  # of NaN, 0.02
                return
        self.flow.load_state_dict(self._best[1])

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs besides generator states."""
        return {
            "phase": self.phase,
            "first": self._first,
            "caution": self._caution,
            "flow": self.snapshot(),
            "moments": {} if self._optimizer is None else self._optimizer.state_dict(),
            "best": None if self._best is None else {"elbo": self._best[0], "flow": self._best[1]},
            "exact": self._exact,
            "window": self._window,
            "failed_steps": self.failed_steps,
            "dropped": self.dropped,
            "done": self.budget.done,
            "spent": self.budget.elapsed,
            "trained": self.budget.trained,
            "history": vars(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.flow.load_state_dict(state["flow"])
        self.phase, self._first, self._moments = state["phase"], state["first"], state["moments"]
        self._caution = state["caution"]
        best = state["best"]
        self._best = None if best is None else (best["elbo"], best["flow"])
        self._exact, self._window = state["exact"], state["window"]
        self.failed_steps, self.dropped = state["failed_steps"], state["dropped"]
        self.history = History(**state["history"])
        self.budget.resume(state["done"], state["spent"], state["trained"])
