"""A start for posteriors of several modes: a flow fitted to a mixture of Gaussians, one on each."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor
from torch.optim.adam import adam

from pyro_flows.distributions import Flow
from pyro_flows.infer.guides.budget import Budget, cosine
from pyro_flows.infer.guides.checkpoint import Keeper
from pyro_flows.infer.guides.posterior import frozen
from pyro_flows.infer.machine.interrupts import interrupts_held_back
from pyro_flows.infer.machine.pace import rows_at_once
from pyro_flows.infer.models.joint import FAILURES
from pyro_flows.infer.search.probe import ModeProbe
from pyro_flows.transforms import Preconditioner

__all__ = ["Adam", "History", "Training", "cover_modes", "mixture_draws", "speeds_of"]


class Adam:
    """The fused step of Adam on parameters of one dtype and device.

    A ``torch.optim.Optimizer`` imports torch's compiler when it is made, which takes as long as a tenth of a short fit.
    In turn nothing tells flows of the step: whoever uses this clears their caches at the end.

    Args:
        parameters: what to move.
        speeds: for some of them the factor of the step size, by identity; 1 for the others.

    References:
        Adam: A Method for Stochastic Optimization (Kingma & Ba, 2014), arXiv:1412.6980.
    """

    def __init__(self, parameters: Sequence[Tensor], speeds: Mapping[int, float] | None = None) -> None:
        self.parameters = list(parameters)
        self._speeds = [(speeds or {}).get(id(p), 1.0) for p in self.parameters]
        self._first = [torch.zeros_like(p) for p in self.parameters]
        self._second = [torch.zeros_like(p) for p in self.parameters]
        self._steps = [torch.zeros((), dtype=torch.float32, device=p.device) for p in self.parameters]

    def state(self) -> list[list[Tensor]]:
        """Copies of the moments and of the numbers of steps."""
        return [[each.clone() for each in kind] for kind in (self._first, self._second, self._steps)]

    @torch.no_grad()
    def load(self, state: list[list[Tensor]]) -> None:
        """Puts back what :meth:`state` gave."""
        for kind, known in zip((self._first, self._second, self._steps), state, strict=True):
            for each, value in zip(kind, known, strict=True):
                each.copy_(value)

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def clip(self, most: float) -> Tensor:
        """Scales the gradients so that their norm, each times the speed of its parameter, is ``most`` at most.

        Returns:
            the norm before.
        """
        pairs = zip(self.parameters, self._speeds, strict=True)
        grads = [p.grad if speed == 1.0 else speed * p.grad for p, speed in pairs if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, most, norm, foreach=True)
        return norm

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Moves the parameters that have a gradient."""
        state = (self.parameters, self._first, self._second, self._steps, self._speeds)
        moving = [each for each in zip(*state, strict=True) if each[0].grad is not None]
        for speed in {each[-1] for each in moving}:
            self._move([each[:-1] for each in moving if each[-1] == speed], speed * rate)

    def _move(self, moving: list[tuple[Tensor, ...]], rate: float) -> None:
        parameters, first, second, steps = (list(column) for column in zip(*moving, strict=True))
        adam(
            parameters,
            [p.grad for p in parameters],
            first,
            second,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )


WARM = 0.2  # of the budget, for the affine part alone


WARM_RATES = (0.05, 0.005)


RATES = (1e-2, 1e-5)


CAREFUL_RATES = (1e-3, 1e-5)


TEMPERED = 0.6  # of the flow's phase, until the posterior has its whole weight


COVER = 4.0


EVEN = 1.5  # a spread of the log-weights at which the forward divergence begins to count as well


HEAVIEST = 10.0  # times the mean: what a draw's weight counts at most


CLIP = 10.0


EXACT = 0.02  # a spread of the log-weights at which nothing is left to learn


PATIENCE = 25  # steps in a row


LOOK = 50  # steps whose mean is compared with that of others


@dataclass
class History:
    """What each step of a fit came to.

    Attributes:
        elbo: mean of log p - log q over the step's draws, in nats.
        spread: standard deviation of log p - log q over the step's draws.
        rate: the optimiser's step size.
        phase: ``"affine"`` or ``"flow"``.
        seconds: wall time since the fit began.
        weight: the posterior's weight under tempering, else 1.
        failures: draws in the step whose density was not finite or could not be computed.
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


def emphasis(log_weights: Tensor, fine: Tensor) -> Tensor:
    r"""How much each draw counts, 1 on average: :math:`(1 + c\,w) / (1 + c)` with its importance weight :math:`w`.

    The path gradient of :math:`KL(q \| p)` counts all draws alike, that of :math:`KL(p \| q)` by their weights.  The
    first alone flees from tails that it fits badly, and so makes them thinner.  The second is noise as long as weights
    are uneven, hence :math:`c`, which rises from 0 to 1 as their spread falls.

    References:
        Gradients should stay on Path (Vaitl et al., 2022), arXiv:2207.08219.
    """
    log_weights = torch.where(fine, log_weights, -math.inf)
    count = fine.sum()
    weights = torch.exp(log_weights - torch.logsumexp(log_weights, 0)) * count
    spread = torch.where(fine, log_weights, log_weights[fine].mean()).std(correction=0)
    c = (EVEN - spread).clamp(0.0, 1.0)
    return (1.0 + c * weights.clamp(max=HEAVIEST)) / (1.0 + c)


def speeds_of(flow: Flow) -> dict[int, float]:
    """What makes up for the gains of affine layers, by the identity of the parameters that these multiply.

    Gains keep steps of stock optimizers small; here many draws, a clipped gradient and a decaying step size do that.
    """
    speeds = {}
    for layer in flow.modules():
        gain = getattr(getattr(layer, "univariate", None), "gain", 1.0)
        tensors = None if gain == 1 else layer.net.tensors()
        if tensors is not None:
            speeds.update({id(each[-1]): 1 / gain for each in tensors[:2]})
    return speeds


class Training:
    """Trains a guide's flow against an unnormalised log-density.

    Args:
        flow: base, a chain of a flow and a :class:`Preconditioner`.
        density: of unconstrained vectors, ``(S, dim)`` to ``(S,)``.
        budget: when to stop.
        particles: draws per step.
        path_gradient: whether the entropy's gradient follows the path alone.
        tempering: the first weight of the posterior, or ``None``.
        covering: whether to follow, beside the ELBO, the forward divergence as its own weighted draws estimate it,
            which holds the guide to the shares of all modes that it has found.
        fresh: whether the flow is still the identity; else the affine phase is left out, and steps are smaller, so
            that the flow stays where it is.
        report: called after each step with the history.
        keeper: writes checkpoints; ``None`` for none.
    """

    def __init__(
        self,
        flow: Flow,
        density: Callable[[Tensor], Tensor],
        budget: Budget,
        *,
        particles: int,
        path_gradient: bool = True,
        tempering: float | None = None,
        covering: bool = False,
        fresh: bool = True,
        report: Callable[[History], None] | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        self.flow, self.density, self.budget = flow, density, budget
        self.particles, self.path_gradient, self.tempering = particles, path_gradient, tempering
        self.covering, self.report, self.keeper = covering, report, keeper
        self.history = History()
        self.failed_steps = 0
        self.dropped = 0
        self.phase = "affine" if fresh and tempering is None else "flow"
        self._rates = RATES if fresh else CAREFUL_RATES
        self._first = 0.0  # progress when the flow's phase began
        self._best: tuple[float, dict[str, Tensor]] | None = None
        self._exact = 0
        self._window = 0  # steps since the last look at whether the state is the best
        self._moments: list[list[Tensor]] | None = None  # to go on with

    @property
    def preconditioner(self) -> Preconditioner:
        """The affine end."""
        return self.flow.chain[-1]

    def run(self) -> None:
        """All phases that are left; leaves the flow in its best state, and in ``eval()``, where it is a function.

        So it does after an error and an interruption, too.
        """
        places = [(m._parameters, n, p) for m in self.flow.modules() for n, p in m._parameters.items()]
        self.flow.train()
        interrupted = True
        try:
            if self.phase == "affine":
                self._phase(Flow(self.preconditioner, self.flow.base), 0.0, WARM, WARM_RATES)
                with interrupts_held_back():
                    self.preconditioner.fold()
                    self._best, self._moments, self._exact, self._window = None, None, 0, 0
                    self._first, self.phase = min(WARM, self.budget.fraction), "flow"
            if self.phase == "flow":
                self._phase(self.flow, self._first, 1.0, self._rates)
                with interrupts_held_back():
                    self._restore()
                    self.phase = "done"
                    self._keep()
                if self.keeper is not None:
                    self.keeper.write()
            interrupted = False
        except Exception:
            interrupted = False
            raise
        finally:
            with interrupts_held_back():
                for parameters, name, parameter in places:  # an interruption may have left constants there
                    parameters[name] = parameter
                self._restore()
                self.flow.zero_grad(set_to_none=True)
                self.flow.eval().chain.clear_cache()
                if interrupted and self.keeper is not None:
                    self.keeper.leave()

    def _phase(self, flow: Flow, begin: float, end: float, rates: tuple[float, float]) -> None:
        name = self.phase
        optimizer = Adam([p for p in flow.parameters() if p.requires_grad], speeds_of(flow))
        if self._moments is not None:
            optimizer.load(self._moments)
            self._moments = None
        self._keep(optimizer)
        while (fraction := self.budget.fraction) < end and not self._converged() and not self._settled(name):
            part = (fraction - begin) / max(end - begin, 1e-9)
            rate = cosine(part, *rates)
            weight = 1.0 if self.tempering is None else self.tempering ** max(0.0, 1.0 - part / TEMPERED)
            before = time.monotonic()
            self._step(name, flow, optimizer, rate, weight)
            self.budget.done += 1
            self.budget.step_seconds = time.monotonic() - before
            self._window += 1
            if self._window >= LOOK and weight == 1.0:
                self._window = 0
                self._remember()
            self._keep(optimizer)
            if self.report is not None:
                self.report(self.history)

    # Checkpoints.

    def _keep(self, optimizer: Adam | None = None) -> None:
        if self.keeper is not None:
            self.keeper.keep(self._state(optimizer), self.budget)

    def _state(self, optimizer: Adam | None) -> dict[str, object]:
        """All that training needs to go on from here, but for random states: copies, except for what never changes."""
        best = None if self._best is None else {"elbo": self._best[0], "flow": self._best[1]}
        return {
            "phase": self.phase,
            "first": self._first,
            "flow": {name: value.detach().clone() for name, value in self.flow.state_dict().items()},
            "moments": [] if optimizer is None else optimizer.state(),
            "best": best,
            "exact": self._exact,
            "window": self._window,
            "failed_steps": self.failed_steps,
            "dropped": self.dropped,
            "done": self.budget.done,
            "spent": self.budget.elapsed,
            "trained": self.budget.trained,
            "history": self.history,
        }

    def load(self, state: dict[str, object]) -> None:
        """Goes on from what a checkpoint holds."""
        self.flow.load_state_dict(state["flow"])
        self.phase, self._first, self._moments = state["phase"], state["first"], state["moments"] or None
        best = state["best"]
        self._best = None if best is None else (best["elbo"], best["flow"])
        self._exact, self._window = state["exact"], state["window"]
        self.failed_steps, self.dropped = state["failed_steps"], state["dropped"]
        self.history = History(**state["history"])
        self.budget.resume(state["done"], state["spent"], state["trained"])

    def _step(
        self,
        name: str,
        flow: Flow,
        optimizer: Adam,
        rate: float,
        weight: float,
    ) -> None:
        draws, log_q = flow.rsample_and_log_prob((self.particles,))
        z = draws.detach()
        try:
            log_p, pull = self._pull(z)
        except FAILURES:
            self._failed(name, rate, weight)
            return
        fine = log_p.isfinite() & pull.isfinite().all(-1)
        z.requires_grad_()
        if self.path_gradient:
            with frozen(flow.chain):
                value = flow.score(z)
            (push,) = torch.autograd.grad(value.sum(), z)
        else:
            push = None
        with torch.no_grad():
            count = fine.sum().clamp(min=1)
            toward = weight * pull if push is None else weight * pull - push
            fine = fine & (toward.isfinite().all(-1))
            share = fine.to(toward)
            if push is not None and name == "flow" and weight == 1.0 and not self.covering:
                share = share * emphasis(log_p - log_q, fine)
            toward = torch.where(fine.unsqueeze(-1), toward, 0.0) * (-share / count).unsqueeze(-1)
        optimizer.zero_grad()
        # Sums, since gradients given to backward() make torch import its compiler.
        surrogate = (draws * toward).sum()
        if push is None:
            surrogate = surrogate + torch.where(fine, log_q, 0.0).sum() / count
        surrogate.backward()
        if self.covering:
            self._cover(flow, draws, log_p - log_q, fine)
        norm = optimizer.clip(CLIP)
        difference = (log_p - log_q.detach())[fine]
        bad = self.particles - len(difference)
        if len(difference) == 0 or not bool(norm.isfinite()):
            self._failed(name, rate, weight)
            return
        optimizer.step(rate)
        self.dropped += bad
        spread = difference.std().item() if len(difference) > 1 else math.inf
        self._exact = self._exact + 1 if spread < EXACT and weight == 1.0 else 0
        self._note(name, difference.mean().item(), spread, rate, weight, bad)

    def _pull(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log-densities of the model ``(S,)`` and their gradients ``(S, dim)``, by as many draws as fit into memory."""
        values, slopes = [], []
        for part in z.split(rows_at_once(self.density, len(z))):
            part = part.detach().requires_grad_()
            log_p = self.density(part)
            slopes += torch.autograd.grad(log_p.sum(), part)
            values.append(log_p.detach())
        return torch.cat(values), torch.cat(slopes)

    def _cover(self, flow: Flow, draws: Tensor, log_weights: Tensor, fine: Tensor) -> None:
        """Adds the gradient of the forward divergence, by the step's own draws and their weights."""
        with torch.no_grad():
            share = torch.where(fine, log_weights, -math.inf).softmax(0)
            z = torch.where(fine.unsqueeze(-1), draws, 0.0)
        (-COVER * (share * flow.score(z)).sum()).backward()

    def _failed(self, name: str, rate: float, weight: float) -> None:
        self.failed_steps += 1
        self.dropped += self.particles
        self._note(name, math.nan, math.nan, rate, weight, self.particles)
        if self.failed_steps > 100 and self.failed_steps > 0.5 * len(self.history):
            self._restore()
            raise ValueError(
                f"fit_guide: {self.failed_steps} of {len(self.history)} steps failed: the model raised, or its density "
                "was not finite at any draw. Check the model with pyro.enable_validation(), or start from a better "
                "point: AutoFlow(model, init_loc_fn=...)"
            )

    def _note(self, phase: str, elbo: float, spread: float, rate: float, weight: float, bad: int) -> None:
        h = self.history
        for values, value in zip(
            (h.elbo, h.spread, h.rate, h.phase, h.seconds, h.weight, h.failures),
            (elbo, spread, rate, phase, self.budget.elapsed, weight, bad),
            strict=True,
        ):
            values.append(value)

    def _converged(self) -> bool:
        return self._exact >= PATIENCE

    def _settled(self, phase: str) -> bool:
        """Whether the affine phase, which begins near its best, gains no more."""
        done = self.history.elbo
        if phase != "affine" or len(done) < 2 * LOOK or len(done) % LOOK:
            return False
        now, before = torch.tensor(done[-LOOK:]).double(), torch.tensor(done[-2 * LOOK : -LOOK]).double()
        gain, noise = now.mean() - before.mean(), (now.var() + before.var()).sqrt() / math.sqrt(LOOK)
        return bool(gain < 2 * noise)

    def _remember(self) -> None:
        """Keeps the state if the last steps were the best so far."""
        last = [v for v in self.history.elbo[-LOOK:] if math.isfinite(v)]
        if not last:
            return
        mean = sum(last) / len(last)
        if self._best is None or mean > self._best[0]:
            self._best = (mean, copy.deepcopy(self.flow.state_dict()))

    def _restore(self) -> None:
        """Goes back to the best state if the last one is clearly worse, or not finite."""
        if self._best is None:
            return
        last = [v for v in self.history.elbo[-LOOK:] if math.isfinite(v)]
        spread = [v for v in self.history.spread[-LOOK:] if math.isfinite(v)]
        finite = all(p.isfinite().all() for p in self.flow.parameters())
        if last and finite:
            noise = 3 * (sum(spread) / max(len(spread), 1)) / math.sqrt(self.particles * len(last))
            if sum(last) / len(last) >= self._best[0] - max(noise, 0.02):
                return
        self.flow.load_state_dict(self._best[1])


DRAWS = 4096


BATCH = 256


STEPS = 600


LEAST = 0.003  # share of a mode that is worth a place in the start


def mixture_draws(probe: ModeProbe, n: int, generator: Generator | None = None) -> tuple[Tensor, int]:
    """Draws of a mixture of the modes' Gaussians by their shares, shape ``(n, D)``, and how many modes it has."""
    share = torch.where(probe.share > LEAST, probe.share, 0.0).double().cpu()
    which = torch.multinomial(share / share.sum(), n, replacement=True, generator=generator).to(probe.locations.device)
    dim = probe.locations.shape[1]
    noise = torch.randn(n, dim, generator=generator, dtype=torch.float64).to(probe.locations)
    draws = probe.locations[which] + (probe.scale[which] @ noise.unsqueeze(-1)).squeeze(-1)
    return draws, int((share > 0).sum())


def cover_modes(flow: Flow, probe: ModeProbe, generator: Generator | None = None, deadline: float = math.inf) -> int:
    """Fits the flow to the mixture by maximum likelihood, without a call of the model; returns the number of modes."""
    draws, modes = mixture_draws(probe, DRAWS, generator)
    preconditioner: Preconditioner = flow.chain[-1]
    centred = draws - draws.mean(0)
    covariance = centred.mT @ centred / len(draws)
    if preconditioner.full:
        scale = torch.linalg.cholesky(covariance + 1e-10 * torch.diag(covariance.diagonal()))
    else:
        scale = covariance.diagonal().sqrt()
    preconditioner.place(draws.mean(0), scale)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    optimizer = Adam(parameters, speeds_of(flow))
    begin = time.monotonic()
    for step in range(STEPS):
        done = step / STEPS
        if math.isfinite(deadline):
            done = max(done, (time.monotonic() - begin) / max(deadline - begin, 1e-3))
        if done >= 1:
            break
        rows = torch.randint(len(draws), (BATCH,), generator=generator).to(draws.device)
        loss = -flow.log_prob(draws[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.clip(CLIP)
        optimizer.step(cosine(done, 1e-2, 1e-4))
    flow.chain.clear_cache()
    return modes
