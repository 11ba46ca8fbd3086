"""From a fitted guide to draws of the posterior, by many short chains."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_flows.distributions import Flow
from pyro_flows.infer.chains.walkers import Gaussians, Walkers, round_trip
from pyro_flows.infer.diagnostics import Verdict, importance, resample
from pyro_flows.infer.diagnostics.bridging import bridged
from pyro_flows.infer.diagnostics.settling import (
    Apart,
    ChainDraws,
    Settling,
    compare_walks,
    judge_chains,
    settling,
)
from pyro_flows.infer.guides.assessment import Assessment, weigh
from pyro_flows.infer.guides.loop import CLIP, speeds_of
from pyro_flows.infer.guides.modes import base_draws
from pyro_flows.infer.guides.posterior import slope_of, spline_of
from pyro_flows.infer.machine.budget import Budget, cosine
from pyro_flows.infer.machine.graph import Replay, replayable, unrecorded
from pyro_flows.infer.machine.optimizers import AdamW
from pyro_flows.infer.machine.progress import ProgressBar
from pyro_flows.infer.models.joint import JointDensity
from pyro_flows.infer.search.climb import SafeDensity
from pyro_flows.infer.search.conditionals import probe_behind
from pyro_flows.infer.search.probe import ModeProbe, nothing_found
from pyro_flows.infer.search.ridges import follow_ridges
from pyro_flows.transforms import Autoregressive

__all__ = ["DEFAULT_MOVES", "Refining", "choose_chains", "reassessed"]

DEFAULT_MOVES = 400
CHAINS, FEW_CHAINS = 512, 32
FIRST = 16  # sweeps of the first round
KEPT = 64  # draws of a chain
SEARCH = 0.1  # part of the seconds for modes
STARTS = 64
LEAST_SHARE = 0.003  # of a mode to jump to
WIDER = 1.1  # Gaussians to jump to, by those of Laplace
RIDGES, RIDGE_DIM = 4, 50  # walkers to follow ridges from, both ways, in so many dimensions at most
FOLLOWING = 0.1  # part of the seconds that are left for it
TAKEN = 0.02  # least part of proposals along ridges that makes them worthwhile
ADAPT = 0.5  # sweeps that adapt, by those recorded
ROUND = 1.5  # sweeps of a round, those that adapt included, by those recorded
ADAPTED = 0.3  # part of the last round
FEWEST = 8  # sweeps recorded
BRIDGE = 2000  # draws of the flow for its weights and the evidence
LEARN_EVERY, LEARN_STEPS = 4, 20
LEARN_UNTIL = 0.6  # of the budget
LEARNED = 0.7  # acceptance of the flow's own proposals
BATCH, OWN = 96, 64  # rows of a step at walkers, and at draws of the flow
RATES = (2e-3, 1e-5)


def choose_chains(density: JointDensity, draws: Tensor, seconds: float | None) -> int:
    """Returns the number of chains: fewer where a move of all would take long, as some draws show."""
    SafeDensity(density, draws).gradients(draws[:2])  # finds out whether it takes many at once
    most = CHAINS if density.many_at_once else FEW_CHAINS
    each = density.pace.seconds_per_draw
    if seconds is None or not each:
        return most
    affordable = 0.01 * seconds / (8 * each)
    return max(16, min(most, int(affordable) // 16 * 16))


@dataclass
class _Walk:
    """What was recorded of walkers."""

    first: Tensor  # (S, K)
    latents: Tensor  # (S, N, D)
    log_p: Tensor
    log_q: Tensor

    @property
    def scalars(self) -> Tensor:
        """The latents with ``log_p``, ``(S, N, D + 1)``."""
        return torch.cat([self.latents.double(), self.log_p.unsqueeze(-1)], -1)


class Refining:
    """Refines a flow, in place, and draws of its posterior with it.

    A round lets walkers adapt, and the flow learn from where they are, and then records them.  Half of them began at
    draws of the guide, to which all adapt, and half elsewhere.  If the record passes all tests, and both halves agree,
    it is the result, with the draws of both.  Otherwise, a longer round follows.

    Args:
        flow: the flow, which changes.
        density: the posterior's density.
        known: weighted draws of the flow.
        initial: the point at which the guide's fit began.
        budget: moves or seconds.
        num_chains: a multiple of 16.
        starts: where earlier chains ended, ``(n, D)``, or ``None``.
        bar: shows the progress.
    """

    def __init__(
        self,
        flow: Flow,
        density: JointDensity,
        known: Assessment,
        initial: Tensor,
        budget: Budget,
        num_chains: int,
        starts: Tensor | None,
        bar: ProgressBar,
    ) -> None:
        self.flow, self.density, self.known, self.budget, self.bar = flow, density, known, budget, bar
        self.initial, self.num_chains, self.starts = initial, num_chains, starts
        self.safe = SafeDensity(density, known.draws)
        self.walkers: Walkers | None = None
        self.walk: _Walk | None = None
        self.settled: Settling | None = None
        self.apart: Apart | None = None
        self.stopped = "The chains were interrupted."
        self.modes: Gaussians | None = None
        self.ends: Tensor | None = None  # of ridges
        self.ended = True  # whether ridges were followed to their ends, as far as it matters
        self.diverged = 0
        self._learner: _Learner | None = None

    def run(self) -> None:
        """Walks until all tests pass, or the budget ends."""
        probe = self._search()
        lead = self._starts(probe)
        jumps = [] if self.modes is None else [self.modes]
        jumps += self._ridges(lead)
        z = torch.cat([lead, self._elsewhere()])
        self.walkers = walkers = Walkers(self.flow, self.safe, z, jumps, len(lead))
        length, last = FIRST, False
        while not last:
            if length > FIRST:
                self._follow(walkers)
            begin = self.budget.fraction
            last = self._is_last(length)
            self._adapt(walkers, ADAPT * length, begin + ADAPTED * (1 - begin) if last else 1.0)
            before = walkers.diverged
            walk = self._recorded(walkers, length, last)
            found, half = settling(walk.scalars, walk.first), len(lead)
            weights = walk.log_p - walk.log_q
            self.walk, self.settled = walk, found
            self.apart = compare_walks(walk.scalars[:half], weights[:half], walk.scalars[half:], weights[half:])
            self.diverged = walkers.diverged - before
            if (found.ok and self.ended and not self.apart.why_not) or self._sweeps_left() < ROUND * FEWEST:
                break
            length *= 2
        self.stopped = ""

    def settle(self) -> None:
        """Leaves the flow fit for use, also after an interruption."""
        if self._learner is not None:
            self._learner.release()
            self._learner = None
        self.flow.zero_grad(set_to_none=True)
        self.flow.eval()

    # The start.

    def _search(self) -> ModeProbe:
        """Searches for modes once more, and keeps those that matter as Gaussians."""
        found, draws = self.known.importance, self.known.draws
        seconds = None if self.budget.seconds is None else SEARCH * self.budget.seconds
        probe = self.known.probe or nothing_found(draws)
        if math.isfinite(found.log_evidence):
            probe = probe_behind(
                spline_of(self.flow),
                self.density,
                self.flow.log_prob,
                draws,
                self.initial,
                log_evidence=found.log_evidence,
                log_weights=self.known.log_weights,
                num_starts=STARTS if self.density.many_at_once else 8,
                known=self.known.probe,
                seconds=seconds,
            )
        share = torch.where(probe.share > LEAST_SHARE, probe.share, 0.0)
        if (share > 0).sum() > 1:
            rows = share > 0
            even = 0.5 * share[rows] / share.sum() + 0.5 / rows.sum()
            self.modes = Gaussians(probe.locations[rows], WIDER * probe.scale[rows], even)
        return probe

    def _starts(self, probe: ModeProbe) -> Tensor:
        """Returns draws of the guide, resampled by weight, with some on modes that it misses."""
        count = self.num_chains // 2
        if self.starts is not None:
            return self.starts[torch.randperm(count) % len(self.starts)]
        fine = self.known.log_weights.isfinite() & self.known.draws.isfinite().all(-1)
        z = resample(self.known.draws[fine], self.known.log_weights[fine], count)
        missed = probe.missed & (probe.share > LEAST_SHARE)
        if missed.any():
            outside = Gaussians(probe.locations[missed], probe.scale[missed], probe.share[missed])
            count = int(count * min(0.5, max(0.1, float(outside.share.sum()))))
            z[:count] = outside.sample(count)
        return z

    def _elsewhere(self) -> Tensor:
        """Returns other starts: a widened guide, ends of ridges, all modes alike."""
        count, dim = self.num_chains - self.num_chains // 2, self.known.draws.shape[-1]
        with torch.no_grad():
            z = self.flow.chain.forward_and_ladj(base_draws(self.flow, count, 1 + 3 / math.sqrt(dim))[0])[0]
        if self.modes is not None:
            which = torch.arange(count // 2) % len(self.modes.share)
            z[: count // 2] = self.modes.around(which)
        if self.ends is not None:
            z[-(count // 4) :] = self.ends[torch.arange(count // 4) % len(self.ends)]
        return z

    # Rounds.

    def _sweeps_left(self) -> float:
        fraction, done = self.budget.fraction, self.budget.done
        if not done:
            return math.inf if self.budget.steps is None else self.budget.steps
        return (1 - fraction) * done / max(1e-9, fraction)

    def _is_last(self, length: int) -> bool:
        """Whether no longer round would follow one of this length, so that this one takes all that is left."""
        return self._sweeps_left() < 3 * ROUND * length

    def _ridges(self, z: Tensor) -> list[Gaussians]:
        """Returns Gaussians along ridges from some points, if there are any and time suffices to follow them."""
        self.ended = True
        if z.shape[1] > RIDGE_DIM or not self.density.many_at_once:
            return []
        seconds = None if self.budget.seconds is None else FOLLOWING * self.budget.left()
        safe = SafeDensity(self.density, z, seconds=seconds)
        ridges = follow_ridges(safe, z[torch.randperm(len(z))[:RIDGES]], z.std(0))
        if safe.expired:
            return []
        self.ended = ridges.complete
        if not len(ridges.points):
            return []
        mixture = Gaussians.of_heights(ridges.points, ridges.scale, ridges.values)
        self.ends = ridges.ends.to(z)
        return [Gaussians(ridges.points.to(z), WIDER * ridges.scale.to(z), mixture.share.to(z))]

    def _follow(self, walkers: Walkers) -> None:
        """Lays Gaussians along ridges from where walkers are now, while jumps along them are taken."""
        count = 0 if self.modes is None else 1
        taken = len(walkers.jumps) > count and walkers.jumped > TAKEN
        self.ended = True
        walkers.jumps = walkers.jumps[:count] + (self._ridges(walkers.latents[: walkers.leading]) if taken else [])

    def _spend(self, what: str) -> None:
        self.budget.done += 1
        self.bar.show(self.budget.fraction, what)

    def _adapt(self, walkers: Walkers, length: float, end: float) -> None:
        """Lets walkers adapt for some sweeps; or up to a fraction of the budget, if that is less than 1."""
        pool: list[Tensor] = []
        while (self.budget.fraction < end) if end < 1 else len(pool) < length:
            walkers.sweep(adapting=True)
            pool.append(walkers.latents[: walkers.leading])
            self._spend("adapting")
            part = self.budget.fraction / LEARN_UNTIL
            if len(pool) % LEARN_EVERY == 0 and part < 1 and walkers.renewed < LEARNED:
                self._learn(walkers, torch.cat(pool[-LEARN_EVERY:]), cosine(part, *RATES))

    def _learn(self, walkers: Walkers, pool: Tensor, rate: float) -> None:
        """Trains the flow at the walkers' states, unless fewer of these then have an exact way back."""
        if self._learner is None:
            self._learner = _Learner(self.flow, self.safe)
        before = {name: value.detach().clone() for name, value in self.flow.state_dict().items()}
        exact = round_trip(self.flow, walkers.latents)[1].double().mean()
        for _ in range(LEARN_STEPS):
            self._learner.step(pool[torch.randint(len(pool), (BATCH,))], rate)
        self.flow.chain.clear_cache()
        if round_trip(self.flow, walkers.latents)[1].double().mean() < exact - 0.02:
            with torch.no_grad():
                self.flow.load_state_dict(before)
            self.flow.chain.clear_cache()

    def _recorded(self, walkers: Walkers, length: int, last: bool) -> _Walk:
        """Records sweeps, ``length`` of them; the last time as many as go up to the end of the budget."""
        first, every, done = _scalars(walkers), 1, 0
        kept: list[tuple[Tensor, ...]] = []
        while done < FEWEST or ((self.budget.fraction < 1) if last else done < length):
            walkers.sweep(adapting=False)
            self._spend("walking")
            done += 1
            if done % every == 0:
                kept.append((walkers.latents, walkers.log_p, walkers.log_q))
            if len(kept) == 2 * KEPT:
                kept, every = kept[1::2], 2 * every
        latents, log_p, log_q = (torch.stack(part, 1) for part in zip(*kept, strict=True))
        return _Walk(first, latents, log_p.double(), log_q.double())

    # The result.

    def result(self, density: JointDensity) -> tuple[ChainDraws, Assessment]:
        """Returns the draws of the chains, and the flow's weighted draws under the verdict on the chains."""
        if self.walk is None or self.settled is None:
            known = self.known
            z = resample(known.draws, known.log_weights, self.num_chains)
            if self.walkers is not None:
                z = self.walkers.latents
            log_p = SafeDensity(density, z).values(z).to(z.device)
            log_q = self.flow.log_prob(z).detach().double()
            walk = _Walk(z, z.unsqueeze(1), log_p.unsqueeze(1), log_q.unsqueeze(1))
            found = Settling(math.inf, math.inf, 0.0, math.nan, True)
        else:
            walk, found = self.walk, self.settled
        draws = ChainDraws(walk.latents, walk.log_p, walk.log_q, found.effective, found.rhat, self.diverged, "refine")
        modes = 0 if self.modes is None else len(self.modes.share)
        verdict = judge_chains(found, draws, self.apart, self.stopped, modes, self.ended)
        return draws, reassessed(self.known, self.flow, density, draws, verdict)


def reassessed(
    known: Assessment, flow: Flow, density: JointDensity, chains: ChainDraws, verdict: Verdict
) -> Assessment:
    """Returns weighted draws of the flow under a verdict on chains; the evidence is bridged if that is ok."""
    _, z, log_p, log_q = drawn = weigh(flow, density, BRIDGE)
    numbers = importance(drawn.log_weights)
    if verdict.ok:
        numbers = bridged(numbers, drawn.log_weights, (chains.log_p - chains.log_q).flatten(), chains.effective)
    found = verdict.numbers | {"log_evidence": numbers.log_evidence, "log_evidence_error": numbers.log_evidence_error}
    said = replace(verdict, numbers=found)
    return replace(known, draws=z, log_p=log_p, log_q=log_q, importance=numbers, verdict=said)


def _scalars(walkers: Walkers) -> Tensor:
    return torch.cat([walkers.latents.double(), walkers.log_p.double().unsqueeze(-1)], -1)


class _Learner:
    r"""Trains a flow by path gradients, at states of walkers and at its own draws.

    Both have the same form, :math:`\nabla \log p - \nabla \log q` times the movement of a draw whose base-side point is
    held.  At walkers' states, this is the gradient of :math:`KL(p \| q)`, without the noise of a likelihood where the
    two agree.

    References:
        Gradients should stay on Path (Vaitl et al., 2022), arXiv:2207.08219.
    """

    def __init__(self, flow: Flow, density: SafeDensity) -> None:
        self.flow, self.density = flow, density
        self.optimizer = AdamW((p for p in flow.parameters() if p.requires_grad), speeds_of(flow))
        self.replay = Replay(self._gradients, self.optimizer.parameters, replayable(flow))

    def step(self, at: Tensor, rate: float) -> None:
        """Takes a step at latents of walkers ``(n, D)``."""
        with torch.no_grad():
            x, known = round_trip(self.flow, at)
            own = self.flow.base().sample((len(x) + OWN,))
            x = torch.cat([torch.where(known.unsqueeze(-1), x, own[: len(x)]), own[len(x) :]])
        norm = self.optimizer.take(self.replay(x))
        if norm.isfinite():
            self.optimizer.clip(norm, CLIP)
            self.optimizer.step(rate)

    def _gradients(self, x: Tensor) -> Any:
        with torch.enable_grad():
            with Autoregressive.remembering(self.flow):
                draws = self.flow.chain(x)
                push = slope_of(self.flow, draws)
            log_p, pull = unrecorded(self.density.gradients, draws.detach())
            fine = log_p.to(push.device).isfinite().unsqueeze(-1) & push.isfinite()
            toward = torch.where(fine, pull.to(push) - push, 0.0) / len(x)
            return torch.autograd.grad(-(draws * toward).sum(), self.optimizer.parameters, allow_unused=True)

    def release(self) -> None:
        """Gives the parameters back."""
        self.optimizer.release()
        self.flow.chain.clear_cache()
