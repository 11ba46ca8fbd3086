"""What ``fit_guide`` returns: draws, a verdict, predictions, and ways to keep them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from pyro_flows.distributions import Flow
from pyro_flows.infer.bridge import to_arviz
from pyro_flows.infer.diagnostics import Importance, Verdict, resample
from pyro_flows.infer.guides.assessment import Assessment, weigh
from pyro_flows.infer.guides.auto import AutoFlow
from pyro_flows.infer.guides.loop import History
from pyro_flows.infer.guides.predictions import (
    computed,
    log_likelihoods,
    observed,
    predictions,
    seen_entries,
    to_redraw,
)
from pyro_flows.infer.guides.stored import (
    device_of,
    flow_of,
    moved,
    plain_assessment,
    plain_flow,
    plain_latents,
    read_assessment,
    read_history,
    read_latents,
)
from pyro_flows.infer.machine.files import check_path, read_state, refuse_others, write_state
from pyro_flows.infer.models.joint import JointDensity
from pyro_flows.infer.models.latents import Latents
from pyro_flows.infer.models.sites import Site

__all__ = ["GuideFit", "load_guide"]

KIND, VERSION = "saved fit of a guide", 2


PARTS = {
    "flow": {
        **dict.fromkeys(("state", "points"), dict),
        **dict.fromkeys(("device", "unnamed"), (str, type(None))),
        "chain": (dict, list),
        "base": dict,
        "frozen": list,
        "training": bool,
        "dim": int,
    },
    "latents": {"sites": list, "max_plate_nesting": int},
    "history": dict,
    "assessment": {
        **dict.fromkeys(("draws", "log_p", "log_q"), Tensor),
        **dict.fromkeys(("importance", "verdict"), dict),
        "probe": (dict, type(None)),
    },
    **dict.fromkeys(("failures", "evaluations"), int),
    "notes": tuple,
}


class GuideFit:
    """A fitted guide, with what is known about its quality.

    Attributes:
        flow: of the unconstrained latents.
        latents: their names, shapes and supports.
        history: what each step came to (ELBO in nats, spread of the log-weights, and so on).
        guide: the :class:`~pyro_flows.infer.AutoFlow`, the fit's own copy, to which ``flow`` belongs; ``None`` for a
            loaded fit, which has no model.
        evaluations: of the model's density, each draw counted, those of the start and of the verdict included.
        failures: draws in training at which the model's density was not finite or could not be computed.
        notes: what the fit had to do differently than asked, in words.
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
    def assessment(self) -> Assessment:
        """Draws with their weights, and what was concluded from them; of an interrupted fit formed at the first use."""
        if callable(self._assessment):
            self._assessment = self._assessment()
        return self._assessment

    @property
    def verdict(self) -> Verdict:
        """Whether the guide can be trusted; ``print(fit.verdict)`` says it in words."""
        return self.assessment.verdict

    @property
    def importance(self) -> Importance:
        """All numbers about the importance weights, such as evidence, ELBO and IW-ELBO with their errors."""
        return self.assessment.importance

    @property
    def log_weights(self) -> Tensor:
        """``log p - log q`` of the draws by which the guide was judged, in nats, shape ``(n,)``."""
        return self.assessment.log_weights

    @property
    def khat(self) -> float:
        """Tail index of the weights, to be read with the verdict, not alone."""
        return self.importance.khat

    @property
    def ess(self) -> float:
        """Effective sample size of the weighted draws as a fraction of their number, in (0, 1]."""
        return self.importance.ess

    @property
    def log_evidence(self) -> float:
        """Estimate of the log marginal likelihood of the data, in nats."""
        return self.importance.log_evidence

    def __repr__(self) -> str:
        return (
            f"GuideFit({len(self.latents)} latent sites, {self.latents.dim} dimensions, "
            f"ELBO {self.importance.elbo:.3f}, ess {self.ess:.3f}, khat {self.khat:.2f}, verdict: {self.verdict.label})"
        )

    # Draws.

    @torch.no_grad()
    def sample(self, n: int = 1000, *, resampled: bool = False) -> dict[str, Tensor]:
        """Draws of the latents by site, constrained, shape ``(n, *site.shape)``.

        Args:
            n: how many.
            resampled: whether to correct them by smoothed importance resampling, which takes ``4 n`` evaluations of
                the model (at least those of the verdict); where the verdict is "use importance resampling", do.
        """
        return self.latents.draws(self._unconstrained(n, resampled))

    def _unconstrained(self, n: int, resampled: bool) -> Tensor:
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"expected a number of draws, an integer >= 0, got {n!r}")
        if not resampled or n == 0:
            return self.flow.sample((n,))
        known = self.assessment
        if 4 * n <= len(known.draws) or self._density is None:
            if self._density is None and n > len(known.draws):
                raise ValueError(
                    f"this fit was loaded without its model, so only its {len(known.draws)} weighted draws can be "
                    f"resampled; got n={n}"
                )
            z, weights = known.draws, known.log_weights
        else:
            z, log_p, log_q = weigh(self.flow, self._density, 4 * n)
            weights = log_p - log_q
        return resample(z, weights, n)

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log-density of the guide at unconstrained images of the values, shapes ``(*sample, *site.shape)``, in nats.

        It is the density of the unconstrained latents; that of the constrained ones lacks the supports' Jacobians.
        """
        return self.flow.log_prob(self.latents.pack(values))

    # Predictions.

    def predictive(
        self,
        n: int = 1000,
        *args: object,
        resampled: bool = False,
        redraw: str | Sequence[str] | None = None,
        **kwargs: object,
    ) -> dict[str, Tensor]:
        """Draws of the model's other sites, data drawn anew, at draws of the latents: shape ``(n, *site.shape)``.

        Data on which other sites depend keep their values by default: what ``pyro.condition`` fixes, and covariates
        that are observed above an outcome.  Discrete latents are drawn anew with the data.

        Args:
            n: how many.
            *args: of the model, e.g. new covariates and ``y=None``; those of the fit if there are none.
            resampled: as in :meth:`sample`.
            redraw: names of the sites with data to draw anew, or ``"all"``; a replicate of a series of sites that
                depend on each other wants all of them.
            **kwargs: as ``args``.

        Raises:
            ValueError: if the model does not run with these arguments, or ``redraw`` names a site without data.
        """
        density = self._with_model("predictive")
        if args or kwargs:
            density = JointDensity(
                density.model, self.latents, args, kwargs, density.vectorized, density.discrete, density.ignored
            )
        with torch.no_grad():
            z = self._unconstrained(n, resampled)
            try:
                return predictions(density, z, to_redraw(density, z, redraw))
            except (ValueError, RuntimeError, IndexError) as error:
                if "redraw" in str(error):
                    raise
                shapes = {site.name: tuple(site.shape) for site in self.latents}
                raise ValueError(
                    f"predictive: the model does not run with these arguments at latents of shapes {shapes}, for which "
                    f"this fit was made; latents in a plate belong to data of one size. {type(error).__name__}: {error}"
                ) from error

    def _with_model(self, what: str) -> JointDensity:
        if self._density is None:
            raise ValueError(
                f"{what}: this fit was loaded without its model; build the guide again, AutoFlow(model).setup(data), "
                "and load the flow's state into it, or draw with .sample(n) and use pyro.infer.Predictive"
            )
        return self._density

    # Elsewhere.

    def to_arviz(
        self,
        *,
        draws: int = 2000,
        posterior_predictive: bool = True,
        log_likelihood: bool = True,
        resampled: bool = False,
        redraw: str | Sequence[str] | None = None,
        constant_data: Mapping[str, object] | None = None,
        coords: Mapping[str, object] | None = None,
        dims: Mapping[str, object] | None = None,
    ) -> object:
        """An ArviZ ``InferenceData`` (0.x) or ``DataTree`` (1.x) of the draws by which the guide was judged.

        What the model computes by ``pyro.deterministic`` is in the posterior, too.  Log-likelihoods count as in the
        model's density: ``poutine.scale`` multiplies them, discrete latents are summed out, and of a site under a mask
        the log-likelihoods, the predictions and the data are those of the entries that count, in one dimension.  A
        model that sees a part of its data in each run has no log-likelihoods and predictions here.

        Args:
            draws: how many of them.
            posterior_predictive: whether to run the model for this group; without a model it is left out.
            log_likelihood: likewise.
            resampled: whether to resample the draws by their weights; their weights are then left out.
            redraw: as in :meth:`predictive`; what is not drawn anew is not among the predictions.
            constant_data: as in ArviZ.
            coords: as in ArviZ.
            dims: as in ArviZ.
        """
        known = self.assessment
        if resampled:
            z, weights = resample(known.draws, known.log_weights, draws), {}
        else:
            z = known.draws[:draws]
            weights = {
                "log_weights": known.log_weights[:draws],
                "log_p": known.log_p[:draws],
                "log_q": known.log_q[:draws],
            }
        groups: dict[str, object] = {}
        posterior = self.latents.draws(z)
        if self._density is not None:
            extra = computed(self._density, z)
            posterior |= extra
            data = observed(self._density, z)
            if self.guide is not None and self.guide.subsampled:
                if posterior_predictive or log_likelihood:
                    warnings.warn(
                        "to_arviz: this model sees a part of its data in each run, so there are no log-likelihoods and "
                        "predictions of all; fit a model that sees all of them for these",
                        stacklevel=2,
                    )
            else:
                groups["observed_data"] = {n: _entries(site.value, site) for n, site in data.items()}
                if posterior_predictive:
                    names = to_redraw(self._density, z, redraw)
                    found = predictions(self._density, z, names)
                    held = {*extra, *data} - set(names)
                    groups["posterior_predictive"] = {
                        name: _entries(value, data.get(name)) for name, value in found.items() if name not in held
                    }
                if log_likelihood:
                    groups["log_likelihood"] = log_likelihoods(self._density, z)
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

        The file is the old one or the new one at any time.  It holds numbers and names, under a check sum, and no code:
        of the flow, the names of this package's classes and their options.  Where a builder used anything else, such as
        a class of your own or a transform of torch's, a warning says so; such a file is loaded by giving the builder
        again.

        Args:
            path: of the file, in a folder that exists.

        Raises:
            ValueError: if the folder does not exist, or the flow or a support cannot be described.
            OSError: if the file cannot be written, e.g. because the disk is full; the old one is unchanged.
        """
        check_path(path)
        flow = plain_flow(self.flow)
        if flow["unnamed"] is not None:
            warnings.warn(
                f"GuideFit.save: the file cannot hold all of what the builder made ({flow['unnamed']}); to load it, "
                "give the builder again: load_guide(path, builder=...)",
                stacklevel=2,
            )
        state = {
            "flow": flow,
            "latents": plain_latents(self.latents),
            "history": asdict(self.history),
            "assessment": plain_assessment(self.assessment),
            "failures": self.failures,
            "evaluations": self.evaluations,
            "notes": tuple(self.notes),
        }
        write_state(path, state, kind=KIND, version=VERSION)


def _entries(value: Tensor, site: Site | None) -> Tensor:
    """The entries of a site's data, or of draws of them, that its mask lets count, in one dimension for the batch's."""
    entries = None if site is None else seen_entries(site)
    if entries is None:
        return value
    event = value.shape[value.dim() - site.fn.event_dim :]
    lead = value.shape[: max(value.dim() - len(event) - entries.dim(), 0)]
    flat = value.expand(lead + entries.shape + event).reshape(*lead, -1, *event)
    return flat.index_select(len(lead), entries.flatten().nonzero().squeeze(-1))


def load_guide(
    path: str | os.PathLike[str],
    map_location: str | torch.device | dict[str, str] | Callable | None = None,
    *,
    builder: Callable[[int], object] | None = None,
) -> GuideFit:
    """Reads what :meth:`GuideFit.save` wrote: draws, densities, history and verdict, without model or data.

    The file holds plain data, and nothing in it is run.  Its check sum is verified, and the flow is rebuilt and
    compared with the saved one at a few points.

    Args:
        path: of the file.
        map_location: device, as in ``torch.load``; by default the one that the fit was on.
        builder: that of the guide, ``AutoFlow(model, builder)``, where it used more than this package's own classes.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if the file is no saved fit, is damaged, comes from another release, or needs the builder.
    """
    known = {"kind": KIND, "remedy": "give the path of a file that GuideFit.save of this release wrote"}
    state = read_state(path, version=VERSION, parts=PARTS, **known)
    device = device_of(map_location, state["flow"]["device"])
    with refuse_others(path, **known):
        flow = flow_of(state["flow"], builder).to(device)
        rest = moved({name: state[name] for name in ("latents", "assessment")}, device)
        latents = read_latents(rest["latents"])
        if (latents.dim,) != flow.event_shape:
            raise ValueError(f"a flow of {tuple(flow.event_shape)} dimensions for {latents.dim} latents")
        return GuideFit(
            flow,
            latents,
            read_history(state["history"]),
            read_assessment(rest["assessment"], latents.dim),
            failures=state["failures"],
            evaluations=state["evaluations"],
            notes=state["notes"],
        )
