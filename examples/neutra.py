"""NeuTra: NUTS in the space of a fitted guide, where the posterior is nearly a standard normal.

    python examples/neutra.py              # prints a table, leaves guides_neutra.png in out/
    python examples/neutra.py --smoke      # the same in seconds, with chains too short to mean anything

Eight schools in the centered form is a funnel, in whose neck NUTS gets stuck.  A guide that ``fit_guide`` has trained
for ten seconds is handed to Pyro's ``NeuTraReparam`` (Hoffman et al., 2019, arXiv:1903.03704), and NUTS moves in the
guide's base; where the guide is not exact, NUTS corrects it.  What is counted is gradients of the model: a chain's
effective draws, by ArviZ, for each 1000 of them.  The third row is what an expert would do, the non-centered form.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import torch
from _schools import EFFECTS, exact_schools
from _script import FLOW, OTHER, THIRD, TRUTH, begin, levels, save
from eight_schools import centered, non_centered, with_theta
from matplotlib import pyplot as plt
from pyro.infer import MCMC, NUTS
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor

from pyro_flows.infer import AutoFlow, fit_guide, to_arviz

Draws = dict[str, Tensor]


class Counted:
    """A model that counts its runs: NUTS takes one gradient in each."""

    def __init__(self, model: Callable[[Tensor], object]) -> None:
        self.model, self.runs = model, 0

    def __call__(self, y: Tensor) -> None:
        self.runs += 1
        self.model(y)


def chain(model: Callable[[Tensor], object], n: int, seed: int) -> tuple[Draws, int, int, float]:
    """Draws, how many trajectories diverged, gradients (warm-up included) and seconds."""
    pyro.set_rng_seed(seed)
    counted = Counted(model)
    mcmc = MCMC(NUTS(counted), num_samples=n, warmup_steps=n // 2, disable_progbar=True)
    start = time.monotonic()
    mcmc.run(EFFECTS)
    diverged = len(mcmc.diagnostics()["divergences"]["chain 0"])
    return mcmc.get_samples(), diverged, counted.runs, time.monotonic() - start


def effective(draws: Draws) -> tuple[float, float]:
    """The smallest bulk and tail ESS over mu, log tau and all thetas."""
    data = to_arviz({"mu": draws["mu"], "log_tau": draws["tau"].log(), "theta": draws["theta"]})
    import arviz as az  # after to_arviz, which keeps ArviZ's announcements to itself

    found = (az.ess(data, method=method).data_vars.values() for method in ("bulk", "tail"))
    return tuple(min(float(each.min()) for each in values) for values in found)


def row(name: str, draws: Draws, diverged: int, gradients: int, seconds: float) -> None:
    bulk, tail = effective(draws)
    neck = (draws["tau"] < 0.5).float().mean()
    rates = (1000 * bulk / gradients, 1000 * tail / gradients)
    print(
        f"  {name:<20}{diverged:10d}{gradients:11d}{bulk:8.0f}{tail:8.0f}{rates[0]:12.1f}{rates[1]:12.1f}{neck:10.3f}"
        f"{seconds:9.1f}"
    )


def draw(results: dict[str, Draws], path: Path) -> None:
    _, tables = exact_schools()
    across, log_tau, table = (part.numpy() for part in tables["theta"])
    fig = plt.figure(figsize=(11.2, 5.4), layout="constrained")
    grid = fig.add_gridspec(2, 3, height_ratios=(2, 1))
    for k, ((name, draws), color) in enumerate(zip(results.items(), (OTHER, FLOW, THIRD), strict=True)):
        ax = fig.add_subplot(grid[0, k])
        value = draws["tau"].log()
        ax.scatter(draws["theta"][:, 0], value, s=3, color=color, alpha=0.5, linewidths=0)
        ax.contour(across, log_tau, table, levels=levels(table), colors=TRUTH, linewidths=(0.8, 1.1, 1.4))
        ax.set(xlim=(-20, 45), ylim=(-5, 4), xlabel="effect in the first school θ₁")
        ax.set_title(name, color=color)
        below = fig.add_subplot(grid[1, k])
        below.plot(np.arange(len(value)), value, color=color, linewidth=0.5)
        below.set(xlabel="draw", ylim=(-7, 4), xlim=(0, len(value)))
        if k == 0:
            ax.set_ylabel("log spread between schools, log τ")
            below.set_ylabel("log τ")
    fig.suptitle("NUTS on eight schools: draws, the exact 50, 90, 99 %, and the chains")
    save(fig, path)


def main() -> None:
    args = begin(__doc__)
    n = 20 if args.smoke else 1500
    seconds = 2.0 if args.smoke else 10.0
    fit = fit_guide(AutoFlow(centered, seed=args.seed), EFFECTS, seconds=seconds)
    print(f"{fit}\n  {fit.evaluations} gradients of the model, many at a time")
    heads = (("diverged", 10), ("gradients", 11), ("bulk", 8), ("tail", 8), ("bulk/1000", 12), ("tail/1000", 12))
    heads = "".join(f"{head:>{width}}" for head, width in (*heads, ("tau<0.5", 10), ("seconds", 9)))
    print(f"NUTS, {n} draws after {n // 2} of warm-up: smallest ESS, also by 1000 gradients (exact tau<0.5: 0.104)")
    print(" " * 22 + heads)
    results: dict[str, Draws] = {}

    found, *costs = chain(centered, n, args.seed)
    results["NUTS, centered"] = found
    row("centered", found, *costs)

    neutra = NeuTraReparam(fit.guide.requires_grad_(False))
    found, *costs = chain(neutra.reparam(centered), n, args.seed)
    (latent,) = found.values()
    with torch.no_grad():
        results["NUTS in the guide's space"] = found = fit.latents.draws(fit.flow.chain(latent))
    row("in the guide's space", found, *costs)

    found, *costs = chain(non_centered, n, args.seed)
    results["NUTS, non-centered"] = found = with_theta(found)
    row("non-centered", found, *costs)
    draw(results, args.out / "guides_neutra.png")


if __name__ == "__main__":
    main()
