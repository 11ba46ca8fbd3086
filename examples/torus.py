"""A density on the torus: two angles whose joint distribution a circular spline flow learns from draws.

    python examples/torus.py                # prints a table, leaves torus.png in out/
    python examples/torus.py --smoke        # the same in seconds, with a budget too small to mean anything

The truth is known: two modes of Pyro's ``SineBivariateVonMises``, one of them across both edges, and a wave around the
whole torus.  So the score of the flow can be held against that of the truth on the same held-out rows, and what makes
a density on a torus one is checked: that it integrates to 1 over one turn, and is the same a turn further on.  It takes
about a minute on one CPU core.
"""

import copy
import math
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import torch
from _script import SHADES, TRUTH, begin, mean_of, save
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from torch import Tensor

import pyro_flows as pf

TURN = 2 * math.pi


class Truth:
    """Three parts: a mode across both edges, a mode of the opposite lean, and a wave all around."""

    weights = (0.35, 0.25, 0.4)

    def __init__(self) -> None:
        numbers = ((2.9, -2.8, 6.0, 6.0, 4.5), (-1.1, 2.1, 12.0, 8.0, -7.0))  # locations, concentrations, correlation
        self.modes = [dist.SineBivariateVonMises(*map(torch.tensor, row)) for row in numbers]
        self.around = dist.VonMises(torch.tensor(0.5), torch.tensor(0.4))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats."""
        phi, psi = x.unbind(-1)
        across = dist.VonMises(0.7 + phi.sin(), torch.tensor(14.0))
        wave = self.around.log_prob(phi) + across.log_prob(psi)
        each = torch.stack([*(mode.log_prob(x) for mode in self.modes), wave])
        return (each + torch.tensor(self.weights).log()[:, None]).logsumexp(0)

    def sample(self, n: int) -> Tensor:
        """Draws, shape ``(n, 2)``, by rejection: Pyro's sampler of these modes does not follow their density."""
        peak = self.log_prob(midpoints(400)).max() + 0.01  # the grid is fine enough for that
        accepted: list[Tensor] = []
        while sum(map(len, accepted)) < n:
            proposed = TURN * torch.rand(100_000, 2) - math.pi
            accepted.append(proposed[self.log_prob(proposed) > peak + torch.rand(len(proposed)).log()])
        return torch.cat(accepted)[:n]


def midpoints(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A grid of one turn in both angles, shape ``(n * n, 2)``; a sum over it is a periodic trapezoidal rule."""
    axis = (torch.arange(n, dtype=dtype) + 0.5) * (TURN / n) - math.pi
    return torch.cartesian_prod(axis, axis)


def report(truth: Truth, flow: pf.Flow, test: Tensor, n: int) -> None:
    """What the flow scores, and whether it is a density on the torus."""
    with torch.no_grad():
        scores, best = flow.log_prob(test), truth.log_prob(test)
        print(f"Held-out log-likelihood, nats per row, {len(test)} rows, ± 2 standard errors")
        for name, each in (("truth", best), ("ncsf", scores), ("truth - ncsf", best - scores)):
            print(f"  {name:<14}{mean_of(each, 4):>17}")
        exact = copy.deepcopy(flow).double()
        mass = exact.log_prob(midpoints(n, torch.double)).exp().mean() * TURN**2
        print(f"Integral of the learned density over one turn of both angles: {mass:.6f}")
        turns = torch.tensor([[1, 0], [0, -1], [3, 2]])
        for dtype, made in ((torch.float32, flow), (torch.float64, exact)):
            x = test.to(dtype)
            moved = x + TURN * turns.to(dtype)[:, None]
            gap = (made.log_prob(moved) - made.log_prob(x)).abs().max()
            print(f"Largest |log p(x + 2 pi k) - log p(x)|, k up to 3, {str(dtype)[6:]}: {gap:.1e}")
        draws = flow.sample((len(test),))
        print(f"Draws lie in [{draws.min():.4f}, {draws.max():.4f}]")


def square(ax: Axes, title: str) -> None:
    marks = [-math.pi, 0, math.pi]
    ax.set(xlim=(-math.pi, math.pi), ylim=(-math.pi, math.pi), xlabel="φ", title=title, aspect="equal")
    ax.set(xticks=marks, yticks=marks, xticklabels=["-π", "0", "π"], yticklabels=["-π", "0", "π"])


def surface(ax: Axes, density: np.ndarray, norm: PowerNorm, title: str) -> None:
    """The torus colored by a density on a grid of both angles, of which psi goes round the tube."""
    n = len(density)
    phi, psi = np.meshgrid(*[np.linspace(-np.pi, np.pi, n + 1)] * 2, indexing="ij")
    outwards = np.stack([np.cos(psi) * np.cos(phi), np.cos(psi) * np.sin(phi), np.sin(psi)])
    place = outwards + 1.9 * np.stack([np.cos(phi), np.sin(phi), np.zeros_like(phi)])
    colors = SHADES(0.08 + 0.92 * norm(density))  # where there is no density, the torus still stands off the paper
    # Light from above and the left, weaker than matplotlib's own, which would darken what has no density.
    light = np.tensordot([-0.35, -0.45, 0.82], outwards, 1)[:-1, :-1, None]
    colors[..., :3] *= 0.76 + 0.24 * light
    look = {"rcount": n, "ccount": n, "shade": False, "linewidth": 0, "antialiased": False, "clip_on": False}
    ax.plot_surface(*place, facecolors=colors, **look)
    ax.set(xlim=(-2.9, 2.9), ylim=(-2.9, 2.9), zlim=(-1, 1))
    ax.set_box_aspect((2.9, 2.9, 1), zoom=1.75)
    ax.view_init(elev=46, azim=-60)
    ax.set_axis_off()
    ax.text2D(0.5, -0.1, title, transform=ax.transAxes, ha="center", fontsize=12)


def draw(truth: Truth, flow: pf.Flow, test: Tensor, path: Path) -> None:
    n = 240
    with torch.no_grad():
        pair = [made.log_prob(midpoints(n)).exp().reshape(n, n).numpy() for made in (truth, flow)]
    norm = PowerNorm(0.5, 0, np.quantile(pair[0], 0.95), clip=True)  # the square root shows thin bridges, too
    titles = ("the truth", "what ncsf learned from draws")
    fig = plt.figure(figsize=(8.6, 6.2))
    grid = fig.add_gridspec(2, 6, left=0.06, right=0.99, top=0.95, bottom=0.06, hspace=0.24, wspace=0.5)
    axes = [fig.add_subplot(grid[0, 2 * k : 2 * k + 2]) for k in range(3)]
    axes[0].scatter(*test[:3000].T.numpy(), s=3, color=TRUTH, alpha=0.6, linewidths=0)
    square(axes[0], "3000 held-out rows")
    axes[0].set_ylabel("ψ", rotation=0)
    for ax, values, title in zip(axes[1:], pair, titles, strict=True):
        ax.imshow(values.T, extent=(-math.pi, math.pi) * 2, origin="lower", cmap=SHADES, norm=norm)
        square(ax, title)
    for k, (values, title) in enumerate(zip(pair, titles, strict=True)):
        surface(fig.add_subplot(grid[1, 3 * k : 3 * k + 3], projection="3d"), values, norm, title)
    save(fig, path)


def main() -> None:
    args = begin(__doc__)
    truth = Truth()
    rows, held_out, budget = (500, 500, {"max_epochs": 2}) if args.smoke else (20_000, 10_000, {})
    data, test = truth.sample(rows), truth.sample(held_out)
    fit = pf.fit_density(pf.ncsf(2), data, seed=args.seed, **budget)
    print(fit)
    report(truth, fit.distribution, test, 100 if args.smoke else 600)
    draw(truth, fit.distribution, test, args.out / "torus.png")


if __name__ == "__main__":
    main()
