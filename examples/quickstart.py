"""Three things to do with a flow, each on real data, in about a minute on two CPU cores.

    python examples/quickstart.py                # prints what it finds, leaves three pictures in out/
    python examples/quickstart.py --smoke        # the same in seconds, with budgets too small to mean anything

1. Density: temperature, exhaust vacuum and output of a power plant.
2. Conditional density: vacuum and output given the temperature, with 90 % intervals.
3. Posterior: eight schools (Rubin, 1981), a verdict on the guide, and ArviZ's summary.
"""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from _script import FLOW, TRUTH, begin, power_plant, save
from matplotlib import pyplot as plt
from torch import Tensor

import pyro_flows as pf

COLUMNS = {0: "temperature (°C)", 1: "vacuum (cm Hg)", 4: "output (MW)"}


def plant() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Hours to fit to, and hours to test by."""
    train, valid, test = (
        pd.DataFrame(rows[:, list(COLUMNS)].numpy(), columns=COLUMNS.values()) for rows in power_plant()
    )
    return pd.concat([train, valid], ignore_index=True), test


def density(out: Path, epochs: int) -> None:
    rows, test = plant()
    print("1. The density of temperature, vacuum and output")
    fit = pf.fit_density(pf.nsf(3), rows, max_epochs=epochs)
    print(fit.summary().round(1))
    print(f"Score of hours not seen: {fit.score(test):.3f} nats each")
    print(fit.verdict)
    save(pf.plots.corner(fit, test), out / "quickstart_density.png")


def conditional(out: Path, epochs: int) -> None:
    rows, test = plant()
    given, asked = rows.columns[:1], rows.columns[1:]
    print("2. The density of vacuum and output given the temperature")
    fit = pf.fit_density(pf.nsf(2, context_dim=1), rows[asked], context=rows[given], max_epochs=epochs)
    print(f"Score of hours not seen: {fit.score(test[asked], test[given]):.3f} nats each")
    lower, upper = (ends.numpy() for ends in fit.interval(0.9, test[given]))
    for name, share in zip(asked, ((lower <= test[asked]) & (test[asked] <= upper)).mean(), strict=True):
        print(f"Of them within the intervals of 90 %, {name}: {share:.1%}")

    grid = np.linspace(2, 36, 60)
    levels = fit.quantile([0.05, 0.25, 0.5, 0.75, 0.95], grid[:, None].astype("float32")).numpy()
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for k, (ax, name) in enumerate(zip(axes, asked, strict=True)):
        ax.scatter(test[given], test[name], s=4, color=TRUTH, alpha=0.5, linewidths=0, label="hours not seen")
        ax.fill_between(grid, levels[0, :, k], levels[4, :, k], color=FLOW, alpha=0.2, linewidth=0, label="90 %")
        ax.fill_between(grid, levels[1, :, k], levels[3, :, k], color=FLOW, alpha=0.3, linewidth=0, label="50 %")
        ax.plot(grid, levels[2, :, k], color=FLOW, label="median")
        ax.set(xlabel=given[0], ylabel=name)
    axes[1].legend()
    save(fig, out / "quickstart_conditional.png")


def schools(y: Tensor, sigma: Tensor) -> None:
    """Effects of coaching in eight schools, each measured with the error sigma."""
    mu = pyro.sample("mu", dist.Normal(0, 5))
    tau = pyro.sample("tau", dist.HalfCauchy(5))
    with pyro.plate("schools", len(y)):
        effect = pyro.sample("effect", dist.Normal(0, 1))
        pyro.sample("y", dist.Normal(mu + tau * effect, sigma), obs=y)


def posterior(out: Path, steps: int) -> None:
    print("3. The posterior of eight schools")
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    fit = pf.fit_guide(schools, y, sigma, steps=steps)
    print(fit.verdict)
    data = fit.to_arviz()
    import arviz as az  # after to_arviz, which keeps ArviZ's announcements to itself

    print(az.summary(data, kind="stats"))
    draws = fit.sample(10_000)
    columns = draws["mu"], draws["tau"].log(), draws["mu"] + draws["tau"] * draws["effect"][:, 0]
    names = ["mean effect µ", "log spread, log τ", "effect, first school"]
    save(pf.plots.corner(torch.stack(columns, 1), names=names), out / "quickstart_posterior.png")


def main() -> None:
    args = begin(__doc__)
    for part, budget in ((density, 40), (conditional, 40), (posterior, 1000)):
        pyro.set_rng_seed(args.seed)
        begun = time.process_time()
        part(args.out, max(1, budget // 40) if args.smoke else budget)
        print(f"CPU time: {time.process_time() - begun:.0f} s\n")


if __name__ == "__main__":
    main()
