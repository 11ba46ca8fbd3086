"""A posterior with two modes: the default finds both, a start at one of them loses the other, and the verdict says so.

    python examples/modes.py              # prints a table, leaves guides_modes.png in out/
    python examples/modes.py --smoke      # the same in seconds, with budgets too small to mean anything

Forty measurements come from two machines, 55 % of them from the first, and nobody noted which came from which.  The two
means and the two spreads are unknown: four dimensions.  Because the shares differ, labels cannot be swapped for free,
yet these few data leave room for both ways to put them.  A sum over a grid gives the exact answer.  A fit takes half a
minute.

Weights of a guide's own draws cannot see a mode in which it never draws: where one is lost, ESS and k-hat look perfect.
The search for modes that goes into the verdict sees it.
"""

from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from _script import FLOW, OTHER, TRUTH, begin, levels, save
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from pyro_flows.infer import AutoFlow, GuideFit, fit_guide

SHARES = torch.tensor([0.55, 0.45])
# Two ways to read the data: their name and color, and where the name stands among data and among means.
READINGS = (("A", FLOW, -1.8, (-2.6, 2.6)), ("B", OTHER, 1.8, (2.6, -2.6)))


def parts() -> dist.MixtureSameFamily:
    """From which the data are drawn: of 40, about 22 and 18."""
    return dist.MixtureSameFamily(dist.Categorical(SHARES), dist.Normal(torch.tensor([-1.5, 1.5]), 0.8))


def machines(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    spread = pyro.sample("spread", dist.LogNormal(torch.zeros(2), 0.5).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(SHARES), dist.Normal(mean, spread)), obs=x)


def exact(x: Tensor, n: int) -> tuple[Tensor, Tensor, float, float]:
    """Axis and density of the two means on a grid, the share of the mode in which the first is lower, the evidence."""
    mean, log_spread = torch.linspace(-3.5, 3.5, n), torch.linspace(-1.8, 1.8, n // 2)
    one = dist.Normal(mean[:, None, None], log_spread.exp()[:, None]).log_prob(x)  # (mean, spread, data)
    prior = dist.Normal(0.0, 3.0).log_prob(mean)[:, None] + dist.Normal(0.0, 0.5).log_prob(log_spread)
    first, second = ((one + log_share).flatten(0, 1) for log_share in SHARES.log())
    rows = [torch.logaddexp(each, second).sum(-1) for each in first]  # data are summed here, row by row
    joint = (torch.stack(rows) + prior.flatten()[:, None] + prior.flatten()).reshape(n, n // 2, n, n // 2)
    cell = 2 * torch.log((mean[1] - mean[0]) * (log_spread[1] - log_spread[0]))
    means = joint.logsumexp((1, 3))
    share = means.flatten().softmax(0).reshape(n, n).triu(1).sum()  # the second mean above the first
    return mean, means.exp(), float(share), float(joint.flatten().logsumexp(0) + cell)


def row(name: str, draws: Tensor, fit: GuideFit | None = None) -> None:
    lower = (draws[:, 0] < draws[:, 1]).float().mean()
    rest = "" if fit is None else f"{fit.log_evidence:10.2f}{fit.ess:8.2f}{fit.khat:8.2f}   {fit.verdict.label}"
    print(f"  {name:<22}{lower:10.3f}{rest}")


def data_panel(ax: Axes, x: Tensor, fit: GuideFit) -> None:
    """The measurements, and where the guide's draws put the first machine: at the lower hump (A) or the upper (B)."""
    ax.hist(x.numpy(), 18, color=TRUTH, alpha=0.25, density=True)
    points = torch.linspace(-4, 4, 300)
    draws = fit.sample(400)
    top = 1.3 * ax.get_ylim()[1]
    for swapped, (name, color, place, _) in zip((False, True), READINGS, strict=True):
        rows = (draws["mean"][:, 0] > draws["mean"][:, 1]) == swapped
        first = dist.Normal(draws["mean"][rows, 0, None], draws["spread"][rows, 0, None])
        density = SHARES[0] * first.log_prob(points).exp()
        ax.plot(points, density[:15].T, color=color, linewidth=0.7, alpha=0.6)
        ax.text(place, 0.98 * top, f"{name}: first\nmachine?", color=color, ha="center", va="top", fontsize=11)
    ax.set(xlabel="measurement", title="40 measurements", yticks=[], ylim=(0, top), xlim=(-4, 4))


def draw(fits: dict[str, GuideFit], x: Tensor, mean: Tensor, table: Tensor, path: Path) -> None:
    default, prior = fits.values()
    fig, grid = plt.subplots(2, 2, figsize=(7.6, 7.6), layout="constrained")
    axes = grid.flatten()
    data_panel(axes[0], x, default)
    panels = (
        (f"default: “{default.verdict.label}”", default.sample(2000), FLOW),
        ("default, resampled", default.sample(2000, resampled=True), FLOW),
        (f'start="prior": “{prior.verdict.label}”', prior.sample(2000), OTHER),
    )
    for ax, (title, draws, color) in zip(axes[1:], panels, strict=True):
        ax.scatter(*draws["mean"].T, s=3, color=color, alpha=0.4, linewidths=0)
        ax.contour(mean, mean, table.T, levels=levels(table.numpy()), colors=TRUTH, linewidths=(0.8, 1.1, 1.4))
        ax.set(xlim=(-3, 3), ylim=(-3, 3), xlabel="mean of the first machine", aspect="equal")
        ax.set_title(title, color=color)
        ax.set_ylabel("mean of the second machine")
        for name, shade, _, (across, up) in READINGS:
            ax.text(across, up, name, color=shade, ha="center", va="center", fontsize=14)
    fig.suptitle("Draws of guides, and 50, 90, 99 % of the exact posterior")
    save(fig, path)


def main() -> None:
    args = begin(__doc__)
    x = parts().sample((40,))
    mean, table, share, evidence = exact(x, 24 if args.smoke else 90)
    steps = 20 if args.smoke else 2500
    print(f"{'':<24}{'P(1 < 2)':>10}{'evidence':>10}{'ESS':>8}{'k-hat':>8}   verdict")
    print(f"  {'exact':<22}{share:10.3f}{evidence:10.2f}")
    fits = {}
    for name, options in (("default", {}), ('start="prior"', {"start": "prior"})):
        fit = fits[name] = fit_guide(AutoFlow(machines, seed=args.seed, **options), x, steps=steps)
        row(name, fit.sample(20_000)["mean"], fit)
        row("  resampled", fit.sample(1000 if args.smoke else 10_000, resampled=True)["mean"])
    for name, fit in fits.items():
        print(f"\n{name}: {fit.verdict}")
        for note in fit.notes:
            print(f"  Note: {note}.")
    draw(fits, x, mean, table, args.out / "guides_modes.png")


if __name__ == "__main__":
    main()
