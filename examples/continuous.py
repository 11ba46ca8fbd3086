"""Continuous flows at work: a density on its way through time, a real data set, and one posterior for all data.

    python examples/continuous.py              # prints tables, leaves three continuous_*.png in out/
    python examples/continuous.py --animate    # continuous_path.gif as well
    python examples/continuous.py --smoke      # the same in seconds, with budgets too small to mean anything

1. ``cnf`` learns two densities in the plane.  A grid of base points that follows the field shows the density at any
   time: it is that of the base divided by how much the grid has been stretched.  What the solver's tolerance leaves is
   measured against a finer solve, for rows among others and for rows alone.
2. The same flow learns measurements at a power plant, two columns for a picture, and all five.
3. A simulator makes ``y = theta_2 + theta_1^2`` with noise, and ``cnf`` with the context ``y`` learns the posterior of
   ``theta`` from draws of pairs, without a likelihood.  A sum over a grid is exact, and says how near it came.

It takes about three minutes on one CPU core.
"""

import math
import time
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import torch
from _script import FLOW, FOLDER, OTHER, SHADES, TRUTH, begin, levels, mean_of, save
from gallery import moons, pinwheel
from matplotlib import pyplot as plt
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import PowerNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

import pyro_flows as pf
from pyro_flows.infer import DensityFit

COLUMNS = ("exhaust vacuum, cm Hg", "power, MW")
# Training goes through the solver's steps at a coarse tolerance, which is quick; scores want a finer one.
COARSE = {"gradient": "backprop", "rtol": 1e-3, "atol": 1e-3}
FINE = 1e-5


def refined(flow: pf.Flow, tolerance: float = FINE, per_row: bool = False) -> pf.Flow:
    """The flow with another tolerance from now on."""
    for layer in flow.modules():
        if isinstance(layer, pf.Continuous):
            layer.rtol = layer.atol = (tolerance, tolerance)
            layer.per_row = per_row
    return flow


def continuous(flow: pf.Flow) -> pf.Continuous:
    return next(layer for layer in flow.modules() if isinstance(layer, pf.Continuous))


def fit(flow: torch.nn.Module, data: Tensor, steps: int, seed: int, **options: object) -> tuple[DensityFit, float]:
    """A fit by maximum likelihood, and the seconds of CPU time that it took."""
    begun = time.process_time()
    options = {"batch_size": min(512, len(data) // 2), "lr": 1e-2, **options}
    with torch.enable_grad():
        found = pf.fit_density(flow, data, steps=steps, schedule="cosine", progress=False, seed=seed, **options)
    return found, time.process_time() - begun


def report(name: str, scores: Tensor) -> None:
    print(f"  {name:<26}{mean_of(scores):>17}")


# 1. A density on its way.


def net(layer: pf.Continuous, times: Tensor, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Corners of a grid of base points at all times, shape (T, n, n, 2), and the density there, shape (T, n, n)."""
    # Cells are even in the base's mass but for the tails, so that they stay small where the density is.
    axis = 4.5 * torch.linspace(-1, 1, n).sinh() / math.sinh(1)
    x = torch.cartesian_prod(axis, axis)
    states, ladj = layer.path(x, times)
    density = (dist.Normal(0.0, 1.0).log_prob(x).sum(-1) - ladj).exp()
    return states.view(-1, n, n, 2).numpy(), density.view(-1, n, n).numpy()


def shade(ax: Axes, corners: np.ndarray, density: np.ndarray, trails: np.ndarray) -> None:
    norm = PowerNorm(0.5, 0, density.max(), clip=True)  # each time has colors of its own
    ax.pcolormesh(*np.moveaxis(corners, -1, 0), density, cmap=SHADES, norm=norm, shading="gouraud", rasterized=True)
    ax.add_collection(LineCollection(trails, colors=OTHER, linewidths=0.7, alpha=0.75))
    ax.scatter(*trails[:, -1].T, s=5, color=OTHER, linewidths=0, zorder=3)
    ax.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set_visible(True)
    ax.spines[:].set_color("#d8dde5")


@torch.no_grad()
def draw_path(flows: dict[str, pf.Flow], out: Path, n: int, animate: bool) -> None:
    frames = 41
    times = torch.linspace(0, 1, frames)
    shown = (0, 10, 20, 30, 40)
    fig, axes = plt.subplots(len(flows), len(shown), figsize=(9.6, 1.95 * len(flows) + 0.8), layout="constrained")
    films = []
    for row, (name, flow) in zip(axes, flows.items(), strict=True):
        layer = continuous(flow)
        corners, density = net(layer, times[list(shown)], n)
        walks = layer.path(torch.randn(60, 2), times)[0].transpose(0, 1).numpy()
        for k, (ax, frame) in enumerate(zip(row, shown, strict=True)):
            shade(ax, corners[k], density[k], walks[:, max(0, frame - 10) : frame + 1])
        row[0].set_ylabel(name, fontsize=12)
        films.append((layer, walks))
    for ax, frame in zip(axes[0], shown, strict=True):
        ax.set_title(f"t = {float(times[frame]):g}" + {0: ", base", frames - 1: ", data"}.get(frame, ""))
    handles = [
        Patch(color=FLOW, label="density at that time"),
        Line2D([], [], color=OTHER, marker="o", markersize=4, label="sixty draws, and the last quarter of their ways"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=12)
    save(fig, out / "continuous_path.png")
    if animate:
        film(films, times, out / "continuous_path.gif", n // 2)


def film(films: list[tuple[pf.Continuous, np.ndarray]], times: Tensor, path: Path, n: int) -> None:
    nets = [net(layer, times, n) for layer, _ in films]
    fig, axes = plt.subplots(1, len(films), figsize=(2.8 * len(films), 3.0), layout="constrained")

    def frame(k: int) -> None:
        for ax, (_, walks), (corners, density) in zip(axes, films, nets, strict=True):
            ax.clear()
            shade(ax, corners[k], density[k], walks[:, max(0, k - 5) : k + 1])
        fig.suptitle(f"t = {float(times[k]):.2f}")

    FuncAnimation(fig, frame, len(times)).save(path, PillowWriter(15), dpi=70)
    plt.close(fig)
    print(f"Animation: {path}")


@torch.no_grad()
def accuracy(flow: pf.Flow, rows: Tensor, alone: int) -> None:
    """What the tolerance leaves of error in the log-density, by a solve in float64 of a far smaller one."""
    state = {name: value.double() for name, value in flow.state_dict().items()}
    rows = rows.double()
    exact = pf.Flow(pf.cnf(2)).double()
    exact.load_state_dict(state)
    truth = refined(exact, 1e-11).log_prob(rows)
    print(f"\nErrors of the log-density of {len(rows)} rows at rtol = atol = {FINE:g}, in units of that")
    print(f"  {'':<12}{'evaluations':>14}{'among others':>24}{'alone':>20}{'alone - among':>20}")
    for per_row in (False, True):
        refined(exact, FINE, per_row)
        among = exact.log_prob(rows)
        evaluations = continuous(exact).last_solve.evaluations
        single = torch.cat([exact.log_prob(row[None]) for row in rows[:alone]])
        errors = (among - truth, single - truth[:alone], single - among[:alone])
        each = (
            f"{float(e.square().mean().sqrt()) / FINE:.1f}, worst {float(e.abs().max()) / FINE:.0f}" for e in errors
        )
        cells = "".join(f"{cell:>{width}}" for cell, width in zip(each, (24, 20, 20), strict=True))
        print(f"  {'per_row' if per_row else 'all together':<12}{evaluations:>14}{cells}")


def learn_plane(args: object) -> None:
    rows, steps, n = (500, 2, 21) if args.smoke else (20_000, 700, 221)
    flows = {}
    print(f"Two densities, {rows} draws each: log-likelihood of draws not seen, nats each, ± 2 standard errors")
    for name, sampler in (("moons", moons), ("pinwheel", pinwheel)):
        # Half as large, so that the base begins as wide as the data.
        data, test = sampler(rows) / 2, sampler(rows // 4) / 2
        flow = pf.Flow(pf.cnf(2, **COARSE))
        _, seconds = fit(flow, data, steps, args.seed, standardize=False)
        with torch.no_grad():
            report(name, refined(flow).log_prob(test) - 2 * math.log(2))
        solve = continuous(flow).last_solve
        print(
            f"    {seconds:.0f} s of CPU time; a solve at {FINE:g} takes {solve.evaluations} evaluations of the field"
        )
        check = continuous(flow).check_solve(test[:200], density=True)
        print(f"    check_solve: off by {check.value:.1e} in value and {check.ladj:.1e} nats, at worst")
        flows[name] = flow
    accuracy(flows["moons"], moons(50 if args.smoke else 500) / 2, 5 if args.smoke else 100)
    draw_path(flows, args.out, n, args.animate)


# 2. Real data.


def learn_plant(args: object) -> None:
    stored = np.load(FOLDER / "power_plant.npz")
    test_rows = np.isin(np.arange(len(stored["x"])), stored["test_rows"])
    train, test = (torch.from_numpy(stored["x"][rows]) for rows in (~test_rows, test_rows))
    if args.smoke:
        train, test = train[:300], test[:100]
    steps = 2 if args.smoke else 600
    print(f"\nPower plant, {len(test)} rows not seen: log-likelihood, nats a row, ± 2 standard errors")
    scores = {}
    for name, columns in (("two columns", [1, 4]), ("all five columns", list(range(5)))):
        own, held_out = train[:, columns], test[:, columns]
        gauss = dist.MultivariateNormal(own.mean(0), own.T.cov())
        report(f"{name}, normal", gauss.log_prob(held_out))
        fitted, seconds = fit(pf.cnf(len(columns), **COARSE), own, steps, args.seed, batch_size=256, lr=5e-3)
        model = refined(fitted.distribution)
        with torch.no_grad():
            report(f"{name}, cnf", model.log_prob(held_out))
        print(f"    {seconds:.0f} s of CPU time, {continuous(model).last_solve.evaluations} evaluations a solve")
        scores[name] = model
    draw_plant(scores["two columns"], test[:, [1, 4]], args.out / "continuous_plant.png", 30 if args.smoke else 240)


@torch.no_grad()
def draw_plant(model: pf.Flow, test: Tensor, path: Path, n: int) -> None:
    low, high = test.min(0).values, test.max(0).values
    margin = 0.06 * (high - low)
    axes_of = [
        np.linspace(a, b, n, dtype=np.float32) for a, b in torch.stack([low - margin, high + margin], 1).tolist()
    ]
    height = model.log_prob(torch.cartesian_prod(*map(torch.from_numpy, axes_of))).exp().view(n, n).T.numpy()
    draws = model.sample((len(test),))
    fig, axes = plt.subplots(1, 3, figsize=(11.2, 3.9), layout="constrained", sharex=True, sharey=True)
    axes[0].scatter(*test.T, s=4, color=TRUTH, alpha=0.5, linewidths=0)
    axes[0].set_title(f"{len(test)} hours not seen in training")
    axes[1].pcolormesh(*axes_of, height, cmap=SHADES, norm=PowerNorm(0.5), shading="gouraud", rasterized=True)
    axes[1].contour(*axes_of, height, levels=levels(height), colors=TRUTH, linewidths=(0.6, 0.9, 1.2))
    axes[1].set_title("density learned, with 50, 90 and 99 % of it")
    axes[2].scatter(*draws.T, s=4, color=FLOW, alpha=0.5, linewidths=0)
    axes[2].set_title("as many draws of the flow")
    for ax in axes:
        ax.set(xlabel=COLUMNS[0], xlim=(axes_of[0][0], axes_of[0][-1]), ylim=(axes_of[1][0], axes_of[1][-1]))
    axes[0].set_ylabel(COLUMNS[1])
    save(fig, path)


# 3. One posterior for all data.

NOISE = 0.3


def simulate(n: int) -> tuple[Tensor, Tensor]:
    """Parameters from a standard normal prior, shape (n, 2), and what is seen of them, shape (n, 1)."""
    theta = torch.randn(n, 2)
    return theta, seen_of(theta) + NOISE * torch.randn(n, 1)


def seen_of(theta: Tensor) -> Tensor:
    return theta[..., 1:] + theta[..., :1] ** 2


def exact_posterior(y: Tensor, points: Tensor) -> Tensor:
    """Log of the share of each grid point."""
    joint = dist.Normal(0.0, 1.0).log_prob(points).sum(-1) + dist.Normal(seen_of(points)[:, 0], NOISE).log_prob(y)
    return joint - joint.logsumexp(0)


@torch.no_grad()
def learn_posterior(args: object) -> None:
    pairs, steps, n = (500, 2, 40) if args.smoke else (20_000, 600, 240)
    theta, y = simulate(pairs)
    fitted, seconds = fit(pf.cnf(2, context_dim=1, **COARSE), theta, steps, args.seed, context=y)
    model = refined(fitted.distribution)
    axis = (torch.arange(n) + 0.5) * (9 / n) - 4.5
    points, cell = torch.cartesian_prod(axis, axis), (9 / n) ** 2
    print(f"\nPosteriors by one conditional flow, learned from {pairs} pairs in {seconds:.0f} s of CPU time")
    print("  " + "".join(f"{head:>14}" for head in ("y", "KL, nats", "mean theta_2", "exact", "sd theta_1", "exact")))
    shown = (-1.5, 0.5, 2.0, 4.0)
    fig, axes = plt.subplots(1, len(shown), figsize=(11.2, 3.2), layout="constrained", sharex=True, sharey=True)
    for ax, value in zip(axes, shown, strict=True):
        seen = torch.tensor([value])
        exact = exact_posterior(seen, points)
        learned = model.log_prob(points, seen)
        share = exact.exp()
        divergence = (share * (exact - math.log(cell) - learned)).sum()
        draws = model.sample((4000,), seen)
        mean, spread = share @ points[:, 1], (share @ points[:, 0].square() - (share @ points[:, 0]) ** 2).sqrt()
        numbers = (value, divergence, draws[:, 1].mean(), mean, draws[:, 0].std(), spread)
        print("  " + "".join(f"{float(each):14.3f}" for each in numbers))
        table = share.view(n, n).T.numpy()
        ax.scatter(*draws[:1500].T, s=3, color=FLOW, alpha=0.4, linewidths=0)
        ax.contour(axis, axis, table, levels=levels(table, (0.99, 0.5)), colors=TRUTH, linewidths=(0.8, 1.2))
        ax.set(xlim=(-3.2, 3.2), ylim=(-4.2, 4.2), title=f"y = {value:g}", xlabel=r"$\theta_1$")
    axes[0].set_ylabel(r"$\theta_2$", rotation=0)
    fig.suptitle("1500 draws of one conditional flow for all data, and 50 and 99 % of each exact posterior")
    save(fig, args.out / "continuous_posterior.png")


def main() -> None:
    args = begin(__doc__, animate={"action": "store_true", "help": "write an animation of the first picture, too"})
    learn_plane(args)
    learn_plant(args)
    learn_posterior(args)


if __name__ == "__main__":
    main()
