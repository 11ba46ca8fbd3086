"""How 30 young rats grow (Gelfand et al., 1990): a hierarchical regression with two plates, checked and compared.

    python examples/rats.py              # prints the tables, leaves guides_rats.png in out/
    python examples/rats.py --smoke      # the same in seconds, with budgets too small to mean anything

Each rat was weighed at five ages.  In the first model all rats grow at the same rate from weights of their own, in the
second each has its own rate.  ``fit_guide`` gets 15 seconds for each posterior, of 34 and 65 dimensions.  What follows
is the usual work after a fit: the verdict, ArviZ's summary of the population, predictive checks (do data drawn from the
model spread with age as the real ones do?) and leave-one-out cross-validation, which compares the models.
"""

import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from _script import FLOW, FOLDER, OTHER, TRUTH, begin, save
from matplotlib import pyplot as plt
from torch import Tensor

from pyro_flows.infer import AutoFlow, GuideFit, fit_guide

AGES = torch.tensor([8.0, 15.0, 22.0, 29.0, 36.0])  # days
DIMS = {"weight": ["rat", "age"], "level": ["rat", "one"], "rate": ["rat", "one"]}


def load() -> Tensor:
    """Weights in grams, shape (30, 5)."""
    return torch.from_numpy(np.loadtxt(FOLDER / "rats.csv", np.float32, delimiter=",", skiprows=1))


def growth(weight: Tensor, own_rates: bool) -> None:
    """Weights around a line for each rat; ages count from the middle one, where levels and rates are independent."""
    mean_level = pyro.sample("mean_level", dist.Normal(250.0, 50.0))  # grams at 22 days
    mean_rate = pyro.sample("mean_rate", dist.Normal(5.0, 5.0))  # grams a day
    sd_level = pyro.sample("sd_level", dist.HalfNormal(50.0))
    noise = pyro.sample("noise", dist.HalfNormal(20.0))
    sd_rate = pyro.sample("sd_rate", dist.HalfNormal(2.0)) if own_rates else None
    rats, ages = pyro.plate("rats", len(weight), dim=-2), pyro.plate("ages", len(AGES), dim=-1)
    with rats:
        level = pyro.sample("level", dist.Normal(mean_level, sd_level))  # shape (30, 1)
        rate = pyro.sample("rate", dist.Normal(mean_rate, sd_rate)) if own_rates else mean_rate
        with ages:
            pyro.sample("weight", dist.Normal(level + rate * (AGES - 22), noise), obs=weight)


def check(name: str, fit: GuideFit, weight: Tensor, draws: int) -> Tensor:
    """Data drawn anew, shape (draws, 30, 5), and two lines about how the real data look among them."""
    again = fit.predictive(draws)["weight"]
    low, high = again.quantile(torch.tensor([0.05, 0.95]), 0)
    inside = ((weight > low) & (weight < high)).float().mean()
    gain = (again.std(1)[:, -1] / again.std(1)[:, 0] > weight.std(0)[-1] / weight.std(0)[0]).float().mean()
    print(f"  {name:<12} weights within their 90 % interval: {inside:.0%}")
    print(f"  {'':<12} replicated data whose spread grows more from day 8 to day 36 than the real one: {gain:.1%}")
    return again


def tables(fits: dict[str, GuideFit], smoke: bool) -> None:
    """ArviZ's summary of the population's parameters, and the comparison of the models."""
    data = {name: fit.to_arviz(dims=DIMS, num_samples=100 if smoke else 4000) for name, fit in fits.items()}
    import arviz as az  # after to_arviz, which keeps ArviZ's announcements to itself

    print(az.summary(data["own rates"], kind="stats", var_names=["mean", "sd", "noise"], filter_vars="like"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Estimated shape parameter of Pareto")  # it is in the table
        scores = {name: az.loo(each, pointwise=True) for name, each in data.items()}
    print("\nLeave-one-out cross-validation, sums over 150 weights in nats")
    for name, loo in scores.items():
        high = int((loo.pareto_k > 0.7).sum())
        elpd, size = (loo.elpd_loo, loo.p_loo) if hasattr(loo, "elpd_loo") else (loo.elpd, loo.p)  # ArviZ 0.x, 1.x
        score = f"elpd {elpd:.1f} ± {loo.se:.1f}, {size:.0f} parameters"
        print(f"  {name:<12} {score}, weights with k > 0.7: {high}")


def draw(fits: dict[str, GuideFit], replicated: dict[str, Tensor], weight: Tensor, path: Path) -> None:
    fig, axes = plt.subplots(1, 3, figsize=(11.4, 3.9), layout="constrained")
    ax = axes[0]
    fan = replicated["own rates"].flatten(0, 1).quantile(torch.tensor([0.05, 0.25, 0.75, 0.95]), 0)
    ax.fill_between(AGES, fan[0], fan[3], color=FLOW, alpha=0.2, linewidth=0, label="90 % and 50 % of new weights")
    ax.fill_between(AGES, fan[1], fan[2], color=FLOW, alpha=0.35, linewidth=0)
    ax.plot(AGES, weight.T, color=TRUTH, linewidth=0.6, marker="o", markersize=2, alpha=0.7)
    ax.set(xlabel="age (days)", ylabel="weight (g)", title="30 rats", xticks=AGES)
    ax.legend(loc="upper left")
    ax = axes[1]
    days = AGES - 22
    alone = (weight * days).sum(1) / days.square().sum()
    draws = fits["own rates"].sample(4000)
    rate = draws["rate"].squeeze(-1)
    low, high = rate.quantile(torch.tensor([0.05, 0.95]), 0)
    ax.vlines(alone, low, high, color=FLOW, linewidth=1.2)
    ax.plot(alone, rate.mean(0), "o", color=FLOW, markersize=4, label="posterior mean and 90 %")
    ends = torch.tensor([alone.min(), alone.max()])
    ax.plot(ends, ends, color=TRUTH, linewidth=0.8, linestyle=":", label="no pooling")
    ax.axhline(draws["mean_rate"].mean(), color=OTHER, linewidth=0.8, linestyle="--", label="the population's mean")
    ax.set(xlabel="rate by the rat's own least squares (g/day)", ylabel="rate in the model (g/day)")
    ax.set_title("Each rat borrows from the others")
    ax.legend(loc="upper left")
    ax = axes[2]
    for (name, again), color in zip(replicated.items(), (OTHER, FLOW), strict=True):
        spread = again.std(1)
        low, high = spread.quantile(torch.tensor([0.05, 0.95]), 0)
        ax.fill_between(AGES, low, high, color=color, alpha=0.25, linewidth=0)
        ax.plot(AGES, spread.mean(0), color=color, label=f"drawn anew, {name}")
    ax.plot(AGES, weight.std(0), color=TRUTH, marker="o", markersize=4, linestyle="none", label="as measured")
    ax.set(xlabel="age (days)", ylabel="standard deviation between rats (g)", xticks=AGES)
    ax.set_title("Predictive check, 90 % bands")
    ax.legend(loc="upper left")
    save(fig, path)


def main() -> None:
    args = begin(__doc__)
    weight = load()
    budget = {"steps": 20} if args.smoke else {"seconds": 15.0}
    fits = {}
    for name, own in (("same rate", False), ("own rates", True)):
        fits[name] = fit_guide(AutoFlow(growth, seed=args.seed), weight, own_rates=own, **budget)
        print(f"{name}: {fits[name]}")
    print(f"\nown rates: {fits['own rates'].verdict}\n")
    tables(fits, args.smoke)
    print("\nPredictive checks")
    count = 100 if args.smoke else 4000
    replicated = {name: check(name, fit, weight, count) for name, fit in fits.items()}
    draw(fits, replicated, weight, args.out / "guides_rats.png")


if __name__ == "__main__":
    main()
