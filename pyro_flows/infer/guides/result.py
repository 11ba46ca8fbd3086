"""The result of ``fit_guide``: draws, a verdict, predictions and files."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pyro_flows.core.checks import integer, positive_seconds
from pyro_flows.distributions import Flow, FlowDistribution
from pyro_flows.infer.bridge import to_arviz
from pyro_flows.infer.diagnostics import Importance, Verdict, resample
from pyro_flows.infer.diagnostics.moments import scalar_names
from pyro_flows.infer.diagnostics.settling import ChainDraws
from pyro_flows.infer.diagnostics.summary import levels_of, quantiles_of, tabulate
from pyro_flows.infer.guides import predictions, refusals, stored
from pyro_flows.infer.guides.assessment import Assessment, weigh
from pyro_flows.infer.guides.auto import AutoFlow
from pyro_flows.infer.guides.builders import Builder
from pyro_flows.infer.guides.loop import History
from pyro_flows.infer.guides.members import pick_members
from pyro_flows.infer.guides.nuts import BaseChains
from pyro_flows.infer.guides.refine import DEFAULT_MOVES, Refining, choose_chains, reassessed
from pyro_flows.infer.machine import processes
from pyro_flows.infer.machine.budget import Budget
from pyro_flows.infer.machine.files import check_path, read_state, refuse_others, write_state
from pyro_flows.infer.machine.interrupts import SoFar, carrying, interrupts_held_back, pyro_as_it_was
from pyro_flows.infer.machine.progress import ProgressBar
from pyro_flows.infer.machine.randomness import seeded
from pyro_flows.infer.machine.records import device_of, read
from pyro_flows.infer.models.joint import JointDensity
from pyro_flows.infer.models.latents import Latents
from pyro_flows.infer.search.climb import SafeDensity

__all__ = ["GuideFit", "load_guide"]

EVEN = 0.95  # effective sample size of weights that need no more
Walked = tuple[ChainDraws, Assessment]

KIND, VERSION = "saved fit of a guide", 4


class GuideFit:
    """A fitted guide, with its verdict and the numbers behind it.

    ``flow`` and ``distribution`` are over the unconstrained latents; :meth:`sample` and :meth:`log_prob` forward to
    them, with values by site in the model's units.

    Attributes:
        flow: the trained :class:`~pyro_flows.distributions.Flow`.
        latents: the latents' names, shapes and supports.
        history: the record of each step (ELBO in nats, spread of the log-weights, and so on).
        guide: the fit's own copy of the :class:`~pyro_flows.infer.AutoFlow` with ``flow``; ``None`` for a loaded fit.
        evaluations: the number of points at which the model's density was evaluated, from start to verdict.
        failures: the number of training draws whose density was not finite or could not be computed.
        notes: departures from the request, in words.
        chains: draws of Markov chains, which :meth:`refine` and :meth:`nuts` make; then :meth:`sample` and all that
            follow from it give these, the verdict is on them, and other numbers are the guide's.

    Example:
        >>> def model(y):
        ...     pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0, 1)), 1), obs=y)
        >>> fit = pf.fit_guide(model, torch.tensor(2.0), steps=20)
        >>> fit.verdict.ok, fit.sample(100)["z"].shape
        (True, torch.Size([100]))
    """

    def __init__(
        self,
        flow: Flow,
        latents: Latents,
        history: History,
        assessment: Assessment | Callable[[], Assessment],
        *,
        guide: AutoFlow | None = None,
        density: JointDensity | None = None,
        failures: int = 0,
        evaluations: int = 0,
        notes: tuple[str, ...] = (),
        chains: ChainDraws | None = None,
    ) -> None:
        self.flow, self.latents, self.history, self._assessment = flow, latents, history, assessment
        self.chains = chains
        self.guide, self._density = guide, density
        self.failures, self.evaluations, self.notes = failures, evaluations, notes

    @property
    def distribution(self) -> FlowDistribution:
        """The posterior of the unconstrained latents as a Pyro distribution that shares the flow's parameters."""
        return self.flow()

    @property
    def assessment(self) -> Assessment:
        """Weighted draws and the verdict; after an interruption, computed at first use."""
        if callable(self._assessment):
            self._assessment = self._assessment()
        return self._assessment

    @property
    def verdict(self) -> Verdict:
        """Whether the guide can be trusted; ``print(fit.verdict)`` says it in words."""
        return self.assessment.verdict

    @property
    def importance(self) -> Importance:
        """Numbers about the importance weights, with errors."""
        return self.assessment.importance

    @property
    def log_weights(self) -> Tensor:
        """The log-weights ``log p - log q`` of the judged draws, in nats, shape ``(n,)``."""
        return self.assessment.log_weights

    @property
    def khat(self) -> float:
        """The tail index of the weights, to be read with the verdict."""
        return self.importance.khat

    @property
    def ess(self) -> float:
        """The effective sample size as a fraction of the draws."""
        return self.importance.ess

    @property
    def log_evidence(self) -> float:
        """An estimate of the data's log marginal likelihood, in nats."""
        return self.importance.log_evidence

    def __repr__(self) -> str:
        return (
            f"GuideFit({len(self.latents)} latent sites, {self.latents.dim} dimensions, "
            f"ELBO {self.importance.elbo:.3f}, ess {self.ess:.3f}, khat {self.khat:.2f}, verdict: {self.verdict.label})"
        )

    # Draws.

    @torch.no_grad()
    def sample(self, num_samples: int = 1000, *, resampled: bool = False) -> dict[str, Tensor]:
        """Draws the latents by site, constrained, shape ``(num_samples, *site.shape)``.

        Args:
            num_samples: the number of draws.
            resampled: whether to correct them by smoothed importance resampling, as the verdict may advise; costs four
                model evaluations per draw unless the verdict's draws suffice. If the guide has the model's structure
                and uneven weights, each member is picked by its own weights, which costs 24 gradients per draw.
        """
        return self.latents.draws(self._unconstrained("sample", num_samples, resampled))

    def _unconstrained(self, name: str, num_samples: int, resampled: bool) -> Tensor:
        integer(name, "num_samples", num_samples, 0)
        if self.chains is not None:
            z = self.chains.draws.flatten(0, 1)
            repeats = -(-num_samples // len(z))
            order = torch.cat([torch.randperm(len(z)) for _ in range(repeats)] or [torch.arange(0)])[:num_samples]
            return z[order.to(z.device)]
        if not resampled or num_samples == 0:
            return self.flow.sample((num_samples,))
        picked = self._picked(num_samples)
        if picked is not None:
            return picked
        known = self.assessment
        if 4 * num_samples <= len(known.draws) or self._density is None:
            if self._density is None and num_samples > len(known.draws):
                raise ValueError(
                    f"{name}: this fit was loaded without its model, so only its {len(known.draws)} weighted draws can "
                    f"be resampled; got num_samples={num_samples}"
                )
            return resample(known.draws, known.log_weights, num_samples)
        drawn = weigh(self.flow, self._density, 4 * num_samples)
        return resample(drawn.draws, drawn.log_weights, num_samples)

    def _picked(self, num_samples: int) -> Tensor | None:
        """Returns draws whose members were picked by their own weights, if that pays."""
        guide = self.guide
        if guide is None or guide.structure is None or self._density is None or guide.subsampled or self.ess > EVEN:
            return None
        found = pick_members(self.flow, self._density, guide.structure, 2 * num_samples)
        return None if found is None else resample(*found, num_samples)

    @torch.no_grad()
    def quantiles(
        self, q: Any, *, num_samples: int = 10_000, resampled: bool = False, seed: int = 0
    ) -> dict[str, Tensor]:
        """Quantiles of each latent and each ``pyro.deterministic``, by site, shape ``(*q.shape, *site.shape)``.

        Args:
            q: levels from 0 to 1, a number or an array of any shape.
            num_samples: the number of draws.
            resampled: as in :meth:`sample`.
            seed: the seed of the draws; torch's global generators stay as they are.

        Raises:
            ValueError: for levels out of range.
        """
        levels = levels_of("GuideFit.quantiles", q)
        return {
            name: quantiles_of(draws, levels)
            for name, draws in self._of_sites("quantiles", num_samples, resampled, seed).items()
        }

    def summary(self, *, num_samples: int = 10_000, resampled: bool = False, seed: int = 0) -> Any:
        """A pandas ``DataFrame`` with a row for each number of a site: mean, standard deviation, and quantiles.

        Sites are the latents and each ``pyro.deterministic``; a loaded fit without its model has the latents only.
        ``arviz.summary(fit.to_arviz())`` adds highest-density intervals.

        Args:
            num_samples: the number of draws.
            resampled: as in :meth:`sample`; whether that is needed, and helps, the verdict says.
            seed: the seed of the draws; torch's global generators stay as they are.
        """
        sites = self._of_sites("summary", num_samples, resampled, seed)
        names = [each for name, draws in sites.items() for each in scalar_names(name, draws.shape[1:])]
        return tabulate(names, torch.cat([draws.reshape(len(draws), -1).double() for draws in sites.values()], 1))

    def _of_sites(self, name: str, num_samples: int, resampled: bool, seed: int) -> dict[str, Tensor]:
        integer(name, "num_samples", num_samples, 2)
        with seeded(seed):
            z = self._unconstrained(name, num_samples, resampled)
            computed = {} if self._density is None else predictions.computed(self._density, z)
        return {**self.latents.draws(z), **computed}

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Returns the log-density, in nats, at values by site of shapes ``(*sample, *site.shape)``.

        The density is of the unconstrained latents, without the supports' Jacobians.
        """
        return self.flow.log_prob(self.latents.pack(values))

    # Ways on.

    def refine(
        self, *, seconds: float | None = None, moves: int | None = None, seed: int | None = None, progress: bool = True
    ) -> GuideFit:
        r"""Walks from the guide to draws of the posterior, by many short Markov chains.

        Half of the chains begin at the guide's draws, resampled by their weights, and on modes that it misses; half
        elsewhere: at a widened guide, at the ends of ridges and on all modes alike. They move by Hamiltonian steps in
        the flow's base, each with a step size of its own, and among the latents; by proposals of the flow; and by jumps
        to Gaussians on modes and along ridges. All leave the posterior invariant. Between rounds of walking, the flow
        learns by path gradients at the chains' states. A round is the result if nested R-hat and the change in time
        show that chains have settled, and those that began elsewhere agree with the others. Otherwise a longer round
        follows.

        Ctrl-C raises ``KeyboardInterrupt``, whose attribute ``fit`` is the result so far.

        Args:
            seconds: the wall time at most.
            moves: the rounds of moves of each chain at most; with a seed, a limit by moves gives the same draws each
                time. By default 400 if there is no limit of seconds.
            seed: of all random choices; by default the guide's.
            progress: whether to show a bar.

        Returns:
            A fit with ``chains``, from which it samples, predicts and converts, and a verdict on them: ``"good"`` or
            ``"chains not settled"``.

        Raises:
            ValueError: for a fit without its model, or of a model that subsamples its data.

        References:
            Nested R-hat (Margossian et al., 2021), arXiv:2110.13017; Adaptive Monte Carlo Augmented with Normalizing
            Flows (Gabrié et al., 2021), arXiv:2105.12603; On Sampling with Approximate Transport Maps (Grenioux et al.,
            2023), arXiv:2302.04763.
        """
        positive_seconds("refine", "seconds", seconds)
        if moves is not None:
            integer("refine", "moves", moves)
        begin = processes.clock()

        def run(
            guide: AutoFlow,
            own: JointDensity,
            density: JointDensity,
            bar: ProgressBar,
            so_far: SoFar,
        ) -> Walked:
            budget = Budget(DEFAULT_MOVES if seconds is None and moves is None else moves, seconds, begin)
            count = choose_chains(density, self.assessment.draws, seconds)
            starts = None if self.chains is None else self.chains.draws[:, -1]
            refining = Refining(guide.flow, density, self.assessment, guide.initial, budget, count, starts, bar)
            # An interruption ends the lead of the first process, and with it the shared density.
            so_far.append(lambda: self._walked(guide, *refining.result(own)))
            try:
                refining.run()
            finally:
                with interrupts_held_back():
                    refining.settle()
            return refining.result(density)

        return self._walk("refine", run, seed, progress)

    def nuts(
        self,
        *,
        num_samples: int = 1000,
        warmup_steps: int = 500,
        num_chains: int = 4,
        seed: int | None = None,
        progress: bool = True,
    ) -> GuideFit:
        r"""Samples the posterior by Pyro's NUTS in the base of the flow (NeuTra), chains one after another.

        Where the guide is exact, NUTS moves on a standard normal; elsewhere it corrects the guide. Chains begin at the
        guide's draws, resampled by their weights. Each leap costs a gradient of the model and a pass of the flow with
        its gradient. NUTS does not jump between modes: if there are several, :meth:`refine` is the better choice.

        Ctrl-C raises ``KeyboardInterrupt``, whose attribute ``fit`` is the result of whole chains so far, or ``None``.

        Args:
            num_samples: the draws of each chain.
            warmup_steps: the steps before these, which adapt step size and metric.
            num_chains: the number of chains.
            seed: of all random choices; by default the guide's.
            progress: whether to show a bar.

        Returns:
            A fit with ``chains``, as of :meth:`refine`; divergences and R-hat are in the verdict.

        Raises:
            ValueError: for a fit without its model, or of a model that subsamples its data.

        References:
            NeuTra-lizing Bad Geometry in HMC Using Neural Transport (Hoffman et al., 2019), arXiv:1903.03704; The
            No-U-Turn Sampler (Hoffman & Gelman, 2011), arXiv:1111.4246.
        """
        for name, value in {"num_samples": num_samples, "warmup_steps": warmup_steps, "num_chains": num_chains}.items():
            integer("nuts", name, value, 0 if name == "warmup_steps" else 4 if name == "num_samples" else 1)

        def run(
            guide: AutoFlow,
            own: JointDensity,
            density: JointDensity,
            bar: ProgressBar,
            so_far: SoFar,
        ) -> Walked:
            known = self.assessment
            z = resample(known.draws, known.log_weights, num_chains)
            with torch.no_grad():
                starts = guide.flow.chain.inverse_and_ladj(z)[0]
            sampled = BaseChains(guide.flow, SafeDensity(density, z), starts)

            def result(density: JointDensity, stopped: str = "") -> Walked:
                draws, verdict = sampled.result(density, stopped)
                return draws, reassessed(known, guide.flow, density, draws, verdict)

            def interrupted() -> GuideFit | None:
                if not sampled.ready:
                    return None
                return self._walked(guide, *result(own, "The chains were interrupted."))

            so_far.append(interrupted)
            sampled.run(num_samples, warmup_steps, bar.show)
            return result(density)

        return self._walk("nuts", run, seed, progress)

    def _walk(self, name: str, run: Callable[..., Walked], seed: int | None, progress: bool) -> GuideFit:
        """Runs chains on a copy of the guide, led by the first of several processes."""
        so_far: SoFar = []
        with carrying(so_far), processes.joined(name), ExitStack() as stack:
            known, density = refusals.walkable(name, self.guide, self._density)
            guide = copy.deepcopy(known)
            bar = ProgressBar(name, progress and not processes.rank())
            seed = guide.seed if seed is None else seed
            stack.callback(bar.close)
            for each in (pyro_as_it_was(), seeded(seed), poutine.block(), torch.enable_grad()):
                stack.enter_context(each)
            self.assessment  # noqa: B018  # judged by all processes, before the first leads

            def led(shared: JointDensity) -> tuple[dict[str, Tensor], Walked]:
                found = run(guide, density, shared, bar, so_far)
                return guide.flow.state_dict(), found

            state, found = processes.led(density, guide.initial, led)
            guide.flow.load_state_dict(state)
        return self._walked(guide, *found)

    def _walked(self, guide: AutoFlow, chains: ChainDraws, assessment: Assessment) -> GuideFit:
        fit = copy.copy(self)
        fit.guide, fit.flow, fit.latents = guide, guide.flow, guide.latents
        fit.chains, fit._assessment = chains, assessment
        return fit

    # Predictions.

    def predictive(
        self,
        num_samples: int = 1000,
        *args: object,
        resampled: bool = False,
        redraw: str | Sequence[str] | None = None,
        **kwargs: object,
    ) -> dict[str, Tensor]:
        """Redraws data and the model's other sites at draws of the latents: shape ``(num_samples, *site.shape)``.

        By default, data on which other sites depend keep their values: those fixed by ``pyro.condition``, and
        covariates. Discrete latents are redrawn with the data.

        Args:
            num_samples: the number of draws.
            *args: the model's arguments, e.g. new covariates and ``y=None``; by default those of the fit.
            resampled: as in :meth:`sample`.
            redraw: the names of data sites to redraw, or ``"all"``, for a series of dependent sites.
            **kwargs: the model's keyword arguments.

        Raises:
            ValueError: if the model does not run with these arguments, or ``redraw`` names a site without data.
        """
        density = self._density
        if density is None:
            raise ValueError(
                "predictive: this fit was loaded without its model; build the guide again, AutoFlow(model).setup(data),"
                " and load the flow's state into it, or draw with .sample(num_samples) and use pyro.infer.Predictive"
            )
        if args or kwargs:
            density = JointDensity(
                density.model, self.latents, args, kwargs, density.vectorized, density.discrete, density.ignored
            )
        with torch.no_grad():
            z = self._unconstrained("predictive", num_samples, resampled)
            try:
                return predictions.redrawn(density, z, predictions.to_redraw(density, z, redraw))
            except (ValueError, RuntimeError, IndexError) as error:
                if "redraw" in str(error):
                    raise
                shapes = {site.name: tuple(site.shape) for site in self.latents}
                raise ValueError(
                    f"predictive: the model does not run with these arguments at latents of shapes {shapes}, for which "
                    f"this fit was made; latents in a plate belong to data of one size. {type(error).__name__}: {error}"
                ) from error

    # Elsewhere.

    def to_arviz(
        self,
        *,
        num_samples: int = 2000,
        posterior_predictive: bool = True,
        log_likelihood: bool = True,
        resampled: bool = False,
        redraw: str | Sequence[str] | None = None,
        constant_data: Mapping[str, object] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
    ) -> Any:
        """Makes an ArviZ ``InferenceData`` (0.x) or ``DataTree`` (1.x) of the draws that judged the guide.

        The posterior includes ``pyro.deterministic`` sites. Log-likelihoods include ``poutine.scale``, with discrete
        latents summed out. Groups of a masked site have only the entries that count, in one dimension. A model that
        sees part of its data per run has no log-likelihoods or predictions here.

        Args:
            num_samples: the number of draws; of a fit with ``chains``, that of whole chains with about as many.
            posterior_predictive: whether to run the model for this group; needs the model.
            log_likelihood: whether to run the model for this group.
            resampled: whether to resample the draws by their weights, which are then left out.
            redraw: as in :meth:`predictive`; other data are not among the predictions.
            constant_data: as in ArviZ.
            coords: as in ArviZ.
            dims: as in ArviZ.
        """
        known = self.assessment
        weights: dict[str, Any] = {}
        num_chains = None
        if self.chains is not None:
            many, kept = self.chains.draws.shape[:2]
            # ArviZ takes more chains than draws for a mistake.
            num_chains = min(many, kept, max(1, -(-num_samples // kept)))
            rows = torch.arange(num_chains) * many // num_chains
            z, weights["log_p"] = self.chains.draws[rows].flatten(0, 1), self.chains.log_p[rows].flatten()
        elif resampled:
            picked = self._picked(num_samples)
            z = resample(known.draws, known.log_weights, num_samples) if picked is None else picked
        else:
            z = known.draws[:num_samples]
            weights = {name: getattr(known, name)[:num_samples] for name in ("log_weights", "log_p", "log_q")}
        groups: dict[str, Any] = {}
        posterior = self.latents.draws(z)
        if self._density is not None:
            extra = predictions.computed(self._density, z)
            posterior |= extra
            if self.guide is not None and self.guide.subsampled:
                if posterior_predictive or log_likelihood:
                    warnings.warn(
                        "to_arviz: this model sees a part of its data in each run, so there are no log-likelihoods and "
                        "predictions of all; fit a model that sees all of them for these",
                        stacklevel=2,
                    )
            else:
                wanted = {"predictive": posterior_predictive, "likelihood": log_likelihood}
                groups = predictions.groups(self._density, z, set(extra), redraw, **wanted)
        attrs: dict[str, Any] = {"verdict": self.verdict.label}
        if self.chains is None:
            attrs |= {"khat": self.khat, "ess": self.ess}
        return to_arviz(
            posterior,
            **weights,
            **{name: group for name, group in groups.items() if group},
            constant_data=constant_data,
            coords=coords,
            dims=dims,
            attrs=attrs,
            num_chains=num_chains,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the fit to a file that :func:`load_guide` reads without model or data.

        The file is written atomically, has a checksum, and holds no code: numbers, and names of this package's classes
        with their options. If a builder used other classes, a warning says so, and loading needs the builder again.

        Args:
            path: a file in a folder that exists.

        Raises:
            ValueError: if the folder does not exist, or the flow or a support cannot be described.
            OSError: if the file cannot be written, e.g. because the disk is full; the old one is unchanged.
        """
        check_path(path)
        flow = stored.plain_flow(self.flow)
        if flow.unnamed is not None:
            warnings.warn(
                f"GuideFit.save: the file cannot hold all of what the builder made ({flow.unnamed}); to load it, "
                "give the builder again: load_guide(path, builder=...)",
                stacklevel=2,
            )
        numbers = stored.Numbers(
            self.history, self.assessment, self.failures, self.evaluations, tuple(self.notes), self.chains
        )
        state = {"flow": vars(flow), "latents": stored.plain_latents(self.latents), **asdict(numbers)}
        write_state(path, state, kind=KIND, version=VERSION)


def load_guide(
    path: str | os.PathLike[str],
    map_location: str | torch.device | dict[str, str] | Callable[..., Any] | None = None,
    *,
    builder: Builder | None = None,
) -> GuideFit:
    """Reads a file of :meth:`GuideFit.save`: draws, densities, history and verdict, without model or data.

    No code in the file runs. Loading verifies the checksum, and compares the rebuilt flow with the saved one at a few
    points.

    Args:
        path: the file.
        map_location: the device, as in ``torch.load``; by default the fit's.
        builder: the guide's builder, if it used more than this package's classes.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if the file is no saved fit, is damaged, comes from another release, or needs the builder.

    Example:
        >>> def model(y):
        ...     pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0, 1)), 1), obs=y)
        >>> pf.fit_guide(model, torch.tensor(2.0), steps=20).save("fit.pt")
        >>> pf.load_guide("fit.pt").sample(100)["z"].shape
        torch.Size([100])
    """
    known: dict[str, Any] = {"kind": KIND, "remedy": "give the path of a file that GuideFit.save of this release wrote"}
    state = read_state(path, version=VERSION, **known)
    with refuse_others(path, **known):
        record: stored.FlowRecord = read(stored.FlowRecord, state.pop("flow"), "flow")
    device = device_of(map_location, record.device, "load_guide")
    with refuse_others(path, **known):
        flow = stored.flow_of(record, builder).to(device)
        state = tree_map_only(Tensor, lambda value: value.to(device), state)
        latents = stored.read_latents(state.pop("latents"))
        if (latents.dim,) != flow.event_shape:
            raise ValueError(f"a flow of {tuple(flow.event_shape)} dimensions for {latents.dim} latents")
        numbers: stored.Numbers = read(stored.Numbers, state)
        numbers.check(latents.dim)
        return GuideFit(flow, latents, **vars(numbers))
