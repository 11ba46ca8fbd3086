"""Eight densities in the plane, learned by every flow over real numbers in the package, in one picture.

    python examples/gallery.py                # prints a table, leaves gallery.png in out/
    python examples/gallery.py --smoke        # the same in seconds, with budgets too small to mean anything

Each row is one density: a histogram of many draws of it, and what each flow learned from 20,000 of them, in the same
colors.  The table holds the mean log-likelihood of 10,000 other draws.  It takes about five minutes on one CPU core.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import numpy as np
import pyro
import torch
from _script import SHADES, begin, save
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import pyro_flows as pf
from pyro_flows import plots


def moons(n: int) -> Tensor:
    """Two half circles, one inside the other's opening."""
    angle = math.pi * torch.rand(n)
    side = torch.randint(2, (n,)) * 2.0 - 1
    xy = torch.stack([angle.cos() - 0.5 * side, angle.sin() - 0.25], -1) * torch.stack([torch.ones(n), side], -1)
    return 2 * (xy + 0.08 * torch.randn(n, 2))


def rings(n: int) -> Tensor:
    """Two circles around one center."""
    radius = torch.tensor([1.3, 3.1])[torch.randint(2, (n,))] + 0.15 * torch.randn(n)
    return polar(radius, 2 * math.pi * torch.rand(n))


def checkerboard(n: int) -> Tensor:
    """Eight squares of constant density."""
    column, row = torch.randint(4, (n,)), torch.randint(2, (n,))
    corner = torch.stack([column, 2 * row + column % 2], -1)
    return 2 * (corner + torch.rand(n, 2)) - 4


def spirals(n: int) -> Tensor:
    """Two arms that wind around each other."""
    turn = 2.25 * math.pi * torch.rand(n).sqrt()
    arm = math.pi * torch.randint(2, (n,))
    return polar(turn / 2, arm - turn) + 0.12 * torch.randn(n, 2)


def gaussians(n: int) -> Tensor:
    """Eight normals on a circle."""
    return polar(torch.full((n,), 2.8), math.pi / 4 * torch.randint(8, (n,))) + 0.3 * torch.randn(n, 2)


def pinwheel(n: int) -> Tensor:
    """Five blades, each a long normal bent by a turn that grows with the radius."""
    radius = 2 + 0.6 * torch.randn(n)
    across = 0.12 * torch.randn(n)
    blade = 2 * math.pi / 5 * torch.randint(5, (n,))
    return polar(radius, blade + across + 0.5 * radius)


def funnel(n: int) -> Tensor:
    """A normal whose scale is the exponential of another normal (Neal, 2003), on its side."""
    v = 1.3 * torch.randn(n)
    return torch.stack([v, 0.7 * torch.exp(v / 1.5) * torch.randn(n)], -1)


def roll(n: int) -> Tensor:
    """A Swiss roll seen from its end."""
    turn = 1.5 * math.pi * (1 + 2 * torch.rand(n))
    return polar(turn / 3.9, turn) + 0.1 * torch.randn(n, 2)


def polar(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


DENSITIES: dict[str, Callable[[int], Tensor]] = {
    "moons": moons,
    "rings": rings,
    "checkerboard": checkerboard,
    "spirals": spirals,
    "eight normals": gaussians,
    "pinwheel": pinwheel,
    "funnel": funnel,
    "roll": roll,
}
# Layers that shift and scale need depth and sharp bends here; a smaller bound on their scales keeps deep ones steady.
AFFINE = {"activation": "relu", "max_log_scale": 2.0}
SPLINE = {"bins": 12, "bound": 3.0}
FLOWS: dict[str, Callable[[int], pf.Chain]] = {
    "nice": partial(pf.nice, num_layers=12, activation="relu"),
    "realnvp": partial(pf.realnvp, num_layers=12, **AFFINE),
    "maf": partial(pf.maf, num_layers=10, **AFFINE),
    "iaf": partial(pf.iaf, num_layers=10, **AFFINE),
    "nsf": partial(pf.nsf, **SPLINE),
    "nsf, autoregressive": partial(pf.nsf, autoregressive=True, **SPLINE),
}
WINDOW = ((-4.4, 4.4), (-4.4, 4.4))


def stirred(chain: pf.Chain) -> pf.Chain:
    """The chain a little off the identity, which is a saddle of the likelihood of densities as symmetric as these."""
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return chain


def histogram(ax: Axes, draws: Tensor) -> PowerNorm:
    """Shows where many draws are; returns the scale of colors, which the flows beside it share."""
    height, x, y = np.histogram2d(*draws.numpy().T, bins=160, range=WINDOW, density=True)
    norm = PowerNorm(0.5, 0.0, np.quantile(height[height > 0], 0.98))
    ax.pcolormesh(x, y, height.T, cmap=SHADES, norm=norm)
    return norm


def learn(sampler: Callable[[int], Tensor], axes: np.ndarray, args: Namespace, progress: tqdm) -> list[Tensor]:
    """Fits every flow to one density and draws its row; returns the log-likelihoods of held-out draws."""
    pyro.set_rng_seed(args.seed)
    rows = 500 if args.smoke else 20_000
    train, validation, test = sampler(rows), sampler(rows // 10), sampler(rows // 2)
    norm = histogram(axes[0], sampler(100 * rows))
    scores = []
    for ax, build in zip(axes[1:], FLOWS.values(), strict=True):
        pyro.set_rng_seed(args.seed)
        fit = pf.fit_density(
            pf.Flow(stirred(build(2))),
            train,
            validation,
            progress=False,
            batch_size=min(512, rows),
            steps=args.steps,
            lr=5e-3,
            schedule="cosine",
            seed=args.seed,
        )
        scores.append(fit.log_prob(test))
        plots.density(fit, bounds=WINDOW, points=20 if args.smoke else 200, norm=norm, ax=ax)
        progress.update()
    return scores


def empty_grid() -> tuple[Figure, np.ndarray]:
    """A row for each density, with a column for the data and one for each flow."""
    shape = len(DENSITIES), 1 + len(FLOWS)
    fig, axes = plt.subplots(*shape, figsize=(1.3 * shape[1], 1.3 * shape[0] + 0.25), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_color("#d8dde5")
    for ax, title in zip(axes[0], ("data", *FLOWS), strict=True):
        ax.set_title(title.replace(", ", ",\n"), fontsize=10)
    for ax, label in zip(axes[:, 0], DENSITIES, strict=True):
        ax.set_ylabel(label, fontsize=10)
    return fig, axes


def main() -> None:
    args = begin(__doc__, steps={"type": int, "default": 1000, "help": "optimizer steps of each fit"})
    if args.smoke:
        args.steps = 2
    fig, axes = empty_grid()
    errors = []
    with tqdm(total=len(DENSITIES) * len(FLOWS), unit="fit") as progress:
        progress.write("| density | " + " | ".join(FLOWS) + " |\n|---" + "|---" * len(FLOWS) + "|")
        for row, (name, sampler) in zip(axes, DENSITIES.items(), strict=True):
            scores = learn(sampler, row, args, progress)
            errors += [2 * part.std() / len(part) ** 0.5 for part in scores]
            progress.write(f"| {name} | " + " | ".join(f"{part.mean():.3f}" for part in scores) + " |")
    print(f"Held-out log-likelihood, nats per draw, seed {args.seed}, {args.steps} steps.")
    print(f"Two standard errors are at most {max(errors):.3f}; all flows of a row are scored on the same draws.")
    save(fig, args.out / "gallery.png", 48)


if __name__ == "__main__":
    main()
