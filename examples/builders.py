"""What each builder of vectors does to the plane, and the path from the base through a chain to data.

    python examples/builders.py             # leaves chain.png and flow_*.png in out/; a minute on one CPU core
    python examples/builders.py --smoke     # the same in seconds, with budgets too small to mean anything

Each flow learns the same two densities from 20,000 draws.  Its picture has, for both, a grid of the base as the flow
moves it, and the density that it learned.  In chain.png draws keep the color of the part of the base that they come
from, after some of the layers of one flow and after all.
"""

from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyro
import torch
from _script import FLOW, OTHER, SHADES, THIRD, TRUTH, begin, save
from gallery import FLOWS, WINDOW, checkerboard, moons, stirred
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyArrowPatch
from torch import Tensor

import pyro_flows as pf
from pyro_flows import plots
from pyro_flows.infer import DensityFit

DATA: dict[str, Callable[[int], Tensor]] = {"moons": moons, "checkerboard": checkerboard}
BUILDERS: dict[str, Callable[[int], pf.Chain]] = {name: build for name, build in FLOWS.items() if "," not in name}


def learn(name: str, sampler: Callable[[int], Tensor], args: Namespace) -> DensityFit:
    """A fit as in the gallery, with fewer steps."""
    pyro.set_rng_seed(args.seed)
    rows = 500 if args.smoke else 20_000
    return pf.fit_density(
        pf.Flow(stirred(BUILDERS[name](2))),
        sampler(rows),
        sampler(rows // 10),
        progress=False,
        batch_size=min(512, rows),
        steps=2 if args.smoke else args.steps,
        lr=5e-3,
        schedule="cosine",
        seed=args.seed,
    )


def quiet(ax: Axes, title: str = "") -> None:
    """A square panel without numbers."""
    ax.set(xlim=WINDOW[0], ylim=WINDOW[1], xticks=[], yticks=[], aspect="equal")
    ax.set_title(title, fontsize=13)
    ax.spines[:].set_visible(True)
    ax.spines[:].set_color("#d8dde5")


@torch.no_grad()
def lines(flow: pf.Flow, count: int = 17, points: int = 400) -> np.ndarray:
    """Lines of a square grid over the base as the flow moves them, shape ``(2 * count, points, 2)``."""
    fixed, along = torch.linspace(-2.4, 2.4, count), torch.linspace(-2.4, 2.4, points)
    upright = torch.stack(torch.meshgrid(fixed, along, indexing="ij"), -1)
    grid = torch.cat([upright, upright.flip(-1)])
    return flow.chain.forward_and_ladj(grid)[0].numpy()


def draw_flow(fits: dict[str, DensityFit], path: Path, points: int) -> None:
    fig, axes = plt.subplots(1, 2 * len(fits), figsize=(8.4, 2.45), layout="constrained")
    for (left, right), (name, fit) in zip(axes.reshape(-1, 2), fits.items(), strict=True):
        left.add_collection(LineCollection(lines(fit.distribution), colors=FLOW, linewidths=0.5))
        plots.density(fit, bounds=WINDOW, points=points, ax=right, cmap=SHADES)
        quiet(left, "grid of the base")
        quiet(right, name)
    save(fig, path, 128)


@torch.no_grad()
def draw_chain(flow: pf.Flow, path: Path, num_samples: int) -> None:
    """Draws of the base on their way to data, with the two directions as arrows."""
    x = flow.base().sample((num_samples,))
    quarter = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    layers = list(flow.chain)
    states = [x]
    for part in (layers[: len(layers) // 2], layers[len(layers) // 2 :]):
        states.append(pf.Chain(part).forward_and_ladj(states[-1])[0])
    fig, axes = plt.subplots(1, 3, figsize=(8.4, 3.9), gridspec_kw={"wspace": 0.35})
    fig.subplots_adjust(left=0.02, right=0.98, top=0.8, bottom=0.2)
    colors = ListedColormap([TRUTH, FLOW, OTHER, THIRD])
    for ax, state, title in zip(axes, states, ("base", "half of the layers", "data"), strict=True):
        ax.scatter(*state.T.numpy(), s=3, c=quarter, cmap=colors, linewidths=0)
        quiet(ax, title)
    boxes = [ax.get_position() for ax in axes]
    for before, after in pairwise(boxes):
        for height, ends, color in (
            (0.58, (before.x1 + 0.012, after.x0 - 0.012), FLOW),
            (0.42, (after.x0 - 0.012, before.x1 + 0.012), OTHER),
        ):
            tips = [(end, height) for end in ends]
            fig.add_artist(FancyArrowPatch(*tips, arrowstyle="-|>", mutation_scale=18, linewidth=2, color=color))
    fig.text(
        0.5, 0.93, "sample: draw from the base, go forward through the chain", color=FLOW, ha="center", fontsize=13
    )
    below = "log_prob: go back to the base; log p(y) = log base(x) - sum of log |det| of the layers"
    fig.text(0.5, 0.06, below, color=OTHER, ha="center", fontsize=13)
    save(fig, path, 64)


def main() -> None:
    args = begin(
        __doc__,
        steps={"type": int, "default": 600, "help": "optimizer steps of each fit"},
        flows={"nargs": "+", "choices": list(BUILDERS), "default": list(BUILDERS), "metavar": "FLOW"},
    )
    rows = 500 if args.smoke else 10_000
    for name in args.flows:
        fits = {data: learn(name, sampler, args) for data, sampler in DATA.items()}
        scores = []
        for data, sampler in DATA.items():
            pyro.set_rng_seed(args.seed + 1)
            with torch.no_grad():
                scores.append(f"{data} {fits[data].log_prob(sampler(rows)).mean():.3f}")
        print(f"{name}: {', '.join(scores)} nats a held-out draw", flush=True)
        draw_flow(fits, args.out / f"flow_{name}.png", 20 if args.smoke else 200)
        if name == "realnvp":
            draw_chain(fits["moons"].distribution, args.out / "chain.png", 200 if args.smoke else 4000)


if __name__ == "__main__":
    main()
