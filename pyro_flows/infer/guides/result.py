"""The result of ``fit_guide``: draws, a verdict, predictions and files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pyro_flows.core.checks import integer
from pyro_flows.distributions import Flow, FlowDistribution
from pyro_flows.infer.bridge import to_arviz
from pyro_flows.infer.diagnostics import Importance, Verdict, resample
from pyro_flows.infer.guides import predictions, stored
from pyro_flows.infer.guides.assessment import Assessment, weigh
from pyro_flows.infer.guides.auto import AutoFlow
from pyro_flows.infer.guides.builders import Builder
from pyro_flows.infer.guides.loop import History
from pyro_flows.infer.guides.members import pick_members
from pyro_flows.infer.machine.files import check_path, read_state, refuse_others, write_state
from pyro_flows.infer.models.joint import JointDensity
from pyro_flows.infer.models.latents import Latents

__all__ = ["GuideFit", "load_guide"]

EVEN = 0.95  # effective sample size of weights that need no more
KIND, VERSION = "saved fit of a guide", 2


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
    ) -> None:
        self.flow, self.latents, self.history, self._assessment = flow, latents, history, assessment
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
        z, log_p, log_q = weigh(self.flow, self._density, 4 * num_samples)
        return resample(z, log_p - log_q, num_samples)

    def _picked(self, num_samples: int) -> Tensor | None:
        """Returns draws whose members were picked by their own weights, if that pays."""
        guide = self.guide
        if guide is None or guide.structure is None or self._density is None or guide.subsampled or self.ess > EVEN:
            return None
        found = pick_members(self.flow, self._density, guide.structure, 2 * num_samples)
        return None if found is None else resample(*found, num_samples)

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Returns the log-density, in nats, at values by site of shapes ``(*sample, *site.shape)``.

        The density is of the unconstrained latents, without the supports' Jacobians.
        """
        return self.flow.log_prob(self.latents.pack(values))

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
            num_samples: the number of draws.
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
        if resampled:
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
            data = predictions.observed(self._density, z)
            if self.guide is not None and self.guide.subsampled:
                if posterior_predictive or log_likelihood:
                    warnings.warn(
                        "to_arviz: this model sees a part of its data in each run, so there are no log-likelihoods and "
                        "predictions of all; fit a model that sees all of them for these",
                        stacklevel=2,
                    )
            else:
                groups["observed_data"] = {n: predictions.seen(site.value, site) for n, site in data.items()}
                if posterior_predictive:
                    names = predictions.to_redraw(self._density, z, redraw)
                    found = predictions.redrawn(self._density, z, names)
                    held = {*extra, *data} - set(names)
                    groups["posterior_predictive"] = {
                        name: predictions.seen(value, data[name]) if name in data else value
                        for name, value in found.items()
                        if name not in held
                    }
                if log_likelihood:
                    groups["log_likelihood"] = predictions.log_likelihoods(self._density, z)
        attrs = {"khat": self.khat, "ess": self.ess, "verdict": self.verdict.label}
        return to_arviz(
            posterior,
            **weights,
            **{name: group for name, group in groups.items() if group},
            constant_data=constant_data,
            coords=coords,
            dims=dims,
            attrs=attrs,
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
        numbers = stored.Numbers(self.history, self.assessment, self.failures, self.evaluations, tuple(self.notes))
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
    """
    known: dict[str, Any] = {"kind": KIND, "remedy": "give the path of a file that GuideFit.save of this release wrote"}
    state = read_state(path, version=VERSION, **known)
    with refuse_others(path, **known):
        record: stored.FlowRecord = stored.read(stored.FlowRecord, state.pop("flow"), "flow")
    device = stored.device_of(map_location, record.device)
    with refuse_others(path, **known):
        flow = stored.flow_of(record, builder).to(device)
        state = tree_map_only(Tensor, lambda value: value.to(device), state)
        latents = stored.read_latents(state.pop("latents"))
        if (latents.dim,) != flow.event_shape:
            raise ValueError(f"a flow of {tuple(flow.event_shape)} dimensions for {latents.dim} latents")
        numbers: stored.Numbers = stored.read(stored.Numbers, state)
        numbers.check(latents.dim)
        return GuideFit(flow, latents, **vars(numbers))
