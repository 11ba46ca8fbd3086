"""Simulation-based calibration of inference for a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_flows.core.checks import integer
from pyro_flows.infer.diagnostics.moments import scalar_names
from pyro_flows.infer.diagnostics.prior import argument_names, simulate
from pyro_flows.infer.diagnostics.uniformity import band, manner, pvalues_of
from pyro_flows.infer.diagnostics.verdict import several

__all__ = ["Calibration", "simulation_based_calibration"]


@dataclass(frozen=True, repr=False)
class Calibration:
    """The result of :func:`simulation_based_calibration`.

    Attributes:
        ranks: each site's number of draws below the simulated value, shape ``(simulations, *shape)``, int64, on the
            CPU; uniform from 0 to ``num_samples`` if the inference is right.
        num_samples: the number of draws that a value is ranked among.
        level: the largest probability that right inference is not ``ok``.

    Example:
        >>> ranks = {"loc": torch.arange(200) % 100}  # uniform
        >>> found = pf.infer.diagnostics.Calibration(ranks, num_samples=99)
        >>> found.ok
        True
    """

    ranks: dict[str, Tensor]
    num_samples: int
    level: float = 0.05

    @property
    def simulations(self) -> int:
        """The number of simulated data sets."""
        return len(next(iter(self.ranks.values())))

    @property
    def names(self) -> list[str]:
        """Names of the scalars in :meth:`flat`."""
        return [name for site, ranks in self.ranks.items() for name in scalar_names(site, ranks.shape[1:])]

    def flat(self) -> Tensor:
        """Joins the ranks of all scalars, shape ``(simulations, scalars)``."""
        return torch.cat([ranks.reshape(len(ranks), -1) for ranks in self.ranks.values()], 1)

    @property
    def pvalues(self) -> dict[str, Tensor]:
        """Twice the smaller of two p-values for each site, shape ``(*shape)``, not corrected for their number.

        The chi-square test of equal counts detects unevenness; the largest distance of the empirical distribution
        function from the diagonal, in units of its spread, detects small trends.
        """
        parts = self._flat_pvalues().split([ranks[0].numel() for ranks in self.ranks.values()])
        pairs = zip(self.ranks.items(), parts, strict=True)
        return {site: part.reshape(ranks.shape[1:]) for (site, ranks), part in pairs}

    def _flat_pvalues(self) -> Tensor:
        return pvalues_of(self.flat(), self.num_samples)

    @property
    def worst(self) -> float:
        """The smallest p-value, times the number of scalars (Bonferroni)."""
        every = self._flat_pvalues()
        return min(1.0, float(every.min()) * len(every))

    @property
    def ok(self) -> bool:
        """Whether chance explains the unevenness of all ranks."""
        return self.worst >= self.level

    def bands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns positions from 0 to 1, and lower and upper limits of the empirical distribution functions there.

        All scalars are within the limits with probability ``1 - level``.

        References:
            Graphical Test for Discrete Uniformity and its Applications in Goodness of Fit Evaluation and Multiple
            Sample Comparison (Säilynoja et al., 2021), arXiv:2103.10522.
        """
        return band(self.simulations, self.num_samples, self.level / len(self.names))

    def __repr__(self) -> str:
        return f"Calibration({self.simulations} simulations, {len(self.names)} scalars, ok={self.ok})"

    def __str__(self) -> str:
        scalars = len(self.names)
        lines = [
            f"{several(self.simulations, 'simulation')}, {several(self.num_samples, 'draw')} each, "
            f"{several(scalars, 'scalar latent')}: "
            + ("the ranks are as even as chance allows" if self.ok else "the ranks are not uniform")
            + f" (smallest p-value, corrected for their number: {self.worst:.2g})"
        ]
        every = self._flat_pvalues()
        for k in every.argsort().tolist()[:8]:
            if every[k] * scalars < self.level:
                how = manner(self.flat()[:, k], self.num_samples)
                lines.append(f"  {self.names[k]}: p = {float(every[k]):.2g}, {how}")
        return "\n".join(lines)


def simulation_based_calibration(
    model: Callable[..., Any],
    fit: Callable[[dict, int], Mapping],
    *args: Any,
    observed: Mapping[str, str] | None = None,
    simulations: int = 100,
    num_samples: int = 99,
    seed: int = 0,
    progress: bool = True,
    **kwargs: Any,
) -> Calibration:
    """Simulates latents and data from the model, fits the data, and ranks the latents among the fit's draws.

    Exact posterior draws make ranks uniform from 0 to ``num_samples``.  Narrow draws give ranks at both ends, wide
    draws in the middle, biased draws at one end.  The test judges the average fit over the prior's data, one latent at
    a time.  Each simulation costs a fit.  With 100 simulations the test detects, nine times in ten, draws off by 0.4
    posterior standard deviations, a third too narrow or half too wide; with 1000, a third of that.

    Args:
        model: the model, with proper priors and data sites that can draw.
        fit: a function of the data, by argument, and a seed, to nearly independent draws by site (discrete ones may be
            missing), shape ``(num_samples or more, *shape)``, in the model's own space; of more draws, evenly spaced
            ones are used.  Each call starts from the present param store, which is restored afterwards.
        *args: arguments of the model; only the shapes of data may matter.
        observed: the argument of each data site, by default of the same name; names the data sites of a model called
            without data.
        simulations: the number of data sets.
        num_samples: the number of draws to rank a latent among.
        seed: the seed of simulations and fits; torch's generators are restored afterwards.
        progress: whether to show a progress bar.
        **kwargs: keyword arguments of the model.

    Raises:
        ValueError: if the model has no data, an improper prior, a ``pyro.factor``, a scaled or subsampled site, or a
            data site without an argument; or if the fit does not return draws of the latents.
        RuntimeError: if a fit fails; names the simulation and its seed.

    Example:
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> def fit(data, seed):  # draws of the exact posterior
        ...     return {"z": data["y"] / 2 + 0.5**0.5 * torch.randn(99)}
        >>> pf.infer.simulation_based_calibration(model, fit, torch.tensor(0.0)).ok
        True

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018),
        arXiv:1804.06788.
    """
    integer("simulation_based_calibration", "simulations", simulations, 2)
    integer("simulation_based_calibration", "num_samples", num_samples, 2)
    ranks: dict[str, list[Tensor]] = {}
    seeds = torch.randint(2**31, (simulations,), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    store = pyro.get_param_store()
    bar = tqdm(seeds, desc="calibration", disable=not progress)
    for index, own in enumerate(bar):
        # Apart from the caller's random numbers and learned parameters.
        with torch.random.fork_rng(range(torch.cuda.device_count())), store.scope(copy.deepcopy(store.get_state())):
            torch.manual_seed(own)
            made = simulate(model, args, kwargs, observed)
            names = argument_names(model)
            for site, argument in made.arguments.items():
                if names is not None and argument not in names:
                    raise ValueError(
                        f"simulation_based_calibration: the model has no argument {argument!r} for the data site "
                        f"{site!r}, only {names}; say which one takes its value, e.g. "
                        f"observed={{{site!r}: {(names or ['y'])[-1]!r}}}"
                    )
            data = {made.arguments[site]: value for site, value in made.data.items()}
            try:
                found = fit(data, own)
            except Exception as error:
                raise RuntimeError(
                    f"simulation_based_calibration: the fit of simulation {index} (seed {own}) failed: {error}"
                ) from error
            for site, rank in _ranks(found, made.latents, num_samples).items():
                ranks.setdefault(site, []).append(rank)
    lengths = {site: len(parts) for site, parts in ranks.items()}
    if min(lengths.values()) < simulations:
        raise ValueError(
            f"simulation_based_calibration: expected the fit to return the same sites each time, got {lengths} sets of "
            f"draws in {simulations} simulations"
        )
    return Calibration({site: torch.stack(parts) for site, parts in ranks.items()}, num_samples)


def _ranks(found: Any, latents: Mapping[str, Tensor], num_samples: int) -> dict[str, Tensor]:
    """Counts the draws below each simulated value, with ties broken at random."""
    if not isinstance(found, Mapping):
        raise ValueError(
            "simulation_based_calibration: expected the fit to return a dictionary from site to draws, got "
            f"{type(found).__name__}"
        )
    missing = [site for site, value in latents.items() if site not in found and value.is_floating_point()]
    if missing:
        raise ValueError(
            f"simulation_based_calibration: the fit returned no draws of {', '.join(missing)}; it returned "
            f"{', '.join(map(str, found)) or 'nothing'}"
        )
    ranks = {}
    for site, truth in latents.items():
        if site not in found:
            continue
        values = torch.as_tensor(found[site]).detach()
        if values.dim() == 0 or len(values) < num_samples or values.shape[1:] != truth.shape:
            raise ValueError(
                f"simulation_based_calibration: expected draws of {site} of shape ({num_samples} or more, "
                f"{', '.join(map(str, truth.shape))}), got {tuple(values.shape)}"
            )
        places = torch.linspace(0, len(values) - 1, num_samples, dtype=torch.float64, device=values.device)
        chosen = values[places.round().long()].cpu().double()
        if chosen.isnan().any():
            raise ValueError(f"simulation_based_calibration: some of the draws of {site} are NaN")
        truth = truth.cpu().double()
        below, equal = (chosen < truth).sum(0), (chosen == truth).sum(0)
        ranks[site] = below + (torch.rand(truth.shape, dtype=torch.float64, device="cpu") * (equal + 1)).long()
    return ranks
