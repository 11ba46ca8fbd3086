"""Questions to a fitted density: a power plant's output on a day of a given temperature and humidity.

    python examples/queries.py                # prints the answers, leaves queries.png in out/
    python examples/queries.py --smoke        # the same in seconds, with a budget too small to mean anything

One fit of the joint density of five measurements answers every question about them, without another fit: the density
of two of them, the output given the temperature outside, with draws, and given temperature and humidity; the most
likely hour; and how much is lost by a density that knows no dependence.  It takes about a minute on one CPU core.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from _script import FLOW, OTHER, SHADES, THIRD, TRUTH, begin, levels, power_plant, save
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

import pyro_flows as pf
from pyro_flows.distributions import Conditional, FlowDistribution, estimate_kl

NAMES = ["AT (°C)", "V (cm Hg)", "AP (mbar)", "RH (%)", "PE (MW)"]
TEMPERATURE, HUMIDITY, OUTPUT = 0, 3, 4
DAYS = [(8.0, THIRD), (18.0, FLOW), (28.0, OTHER)]  # temperatures


def told(name: str, score: Tensor, error: Tensor, effective: Tensor) -> None:
    """Prints estimates of log-densities with their errors."""
    print(f"  {name:<34}{score.mean():8.3f} nats, error {error.mean():.3f}, {effective.min():.0f} effective draws")


def output_at(density: FlowDistribution, temperature: float) -> Conditional:
    """The output at a temperature, the other three measurements integrated out."""
    return density.conditional(TEMPERATURE, [temperature], of=OUTPUT, num_samples=2000)


def report(density: FlowDistribution, data: Tensor, rows: Tensor) -> None:
    """Answers in numbers, each with what it is worth."""
    print("Held-out rows, in nats per row: mean log-density of some of the columns")
    some = density.marginal((TEMPERATURE, OUTPUT))
    told("temperature and output", *some.estimate(rows[:, [TEMPERATURE, OUTPUT]]))
    told("output alone", *density.marginal(OUTPUT).estimate(rows[:, [OUTPUT]]))
    print("Output at a temperature, MW: mean and standard deviation of 2000 draws")
    for temperature, _ in DAYS:
        given = output_at(density, temperature)
        drawn = given.sample((2000,))
        near = data[(data[:, TEMPERATURE] - temperature).abs() < 1, OUTPUT]
        print(
            f"  {temperature:4.0f} °C  {drawn.mean():6.1f} ± {drawn.std():4.1f}"
            f"   rows within a degree: {near.mean():6.1f} ± {near.std():4.1f} ({len(near)} rows)"
            f"   effective draws {float(given.evidence.effective):.0f}"
        )
    dry, damp = (
        density.conditional((TEMPERATURE, HUMIDITY), [28.0, part]).sample((2000,))[:, -1] for part in (40.0, 80.0)
    )
    print(f"  28 °C in dry air {dry.mean():.1f}, in damp air {damp.mean():.1f}")
    found = density.modes(steps=200)
    print(f"The most likely hour, of {len(found.points)} modes found:")
    print("  " + ", ".join(f"{name} {value:.1f}" for name, value in zip(NAMES, found.points[0].tolist(), strict=True)))


def picture(density: FlowDistribution, data: Tensor, path: Path, points: int) -> None:
    """The marginal of two columns, and the output at three temperatures, over the rows."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.9))
    low, high = (data[:, [TEMPERATURE, OUTPUT]].quantile(q, 0) for q in (0.001, 0.999))
    axes = [
        torch.linspace(float(a - 0.06 * (b - a)), float(b + 0.06 * (b - a)), points)
        for a, b in zip(low, high, strict=True)
    ]
    grid = torch.cartesian_prod(*axes)
    some = density.marginal((TEMPERATURE, OUTPUT), num_samples=500)
    heights = torch.cat([some.estimate(part).value for part in grid.split(4096)]).exp().reshape(points, points).numpy()
    left.scatter(*data[:2000, [TEMPERATURE, OUTPUT]].T.numpy(), s=2, color=TRUTH, alpha=0.35, linewidths=0)
    left.contour(*(axis.numpy() for axis in axes), heights.T, levels=levels(heights), cmap=SHADES, vmin=-heights.max())
    left.set(xlabel=NAMES[TEMPERATURE], ylabel=NAMES[OUTPUT], title="two of five columns: 50, 90, 99 %")
    bins = np.linspace(float(low[1]), float(high[1]), 60)
    for temperature, color in DAYS:
        near = data[(data[:, TEMPERATURE] - temperature).abs() < 0.5, OUTPUT]
        height = output_at(density, temperature).estimate(axes[1].unsqueeze(-1)).value.exp()
        right.hist(near.numpy(), bins, density=True, color=color, alpha=0.3)
        right.plot(axes[1].numpy(), height.numpy(), color=color)
        peak = int(height.argmax())
        place = (float(axes[1][peak]), float(height[peak]))
        right.annotate(f"{temperature:.0f} °C", place, (0, 24), textcoords="offset points", color=color, ha="center")
    right.set(xlabel=NAMES[OUTPUT], yticks=[], title="output on days of three temperatures")
    right.set_ylim(top=1.25 * right.get_ylim()[1])
    handles = [Line2D([], [], color=TRUTH), Patch(color=TRUTH, alpha=0.3)]
    right.legend(handles, ["density", "rows"], loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    fig.tight_layout()
    save(fig, path)


def main() -> None:
    args = begin(__doc__)
    train, valid, test = power_plant()
    budget = {"steps": 30} if args.smoke else {"seconds": 30.0}
    warnings.filterwarnings("ignore", "fit_density: values that many rows share")  # a humidity, of 24 rows in 7750
    fit = pf.fit_density(pf.nsf(5), train, valid, progress=False, seed=args.seed, **budget)
    print(fit)
    density = fit.distribution()
    with torch.no_grad():
        report(density, train, test[: 20 if args.smoke else 200])
        chain = pf.transforms.Standardization(train.mean(0), train.std(0))
        apart = estimate_kl(density, pf.Flow([chain])(), num_samples=5000)
        print(f"KL to independent normals of the same mean and width: {apart.value:.2f} ± {apart.error:.2f} nats")
        picture(density, train, args.out / "queries.png", 8 if args.smoke else 60)


if __name__ == "__main__":
    main()
