"""A density on the sphere: directions that ``pf.sphere`` learns from draws, and the posterior of a mean direction.

    python examples/sphere.py                # prints a table, leaves sphere.png in out/
    python examples/sphere.py --smoke        # the same in seconds, with a budget too small to mean anything

The truth is known: a belt around a tilted axis, as of poles of orbits, with two clusters, one of them over the pole of
the coordinates.  So the score of the flow can be held against that of the truth on the same held-out rows, and its
integral over the sphere is checked.  It takes a minute on one CPU core.
"""

import math

import pyro
import pyro.distributions as dist
import torch
from _script import begin, mean_of, save
from matplotlib import pyplot as plt
from torch import Tensor
from torch.nn.functional import normalize

import pyro_flows as pf
from pyro_flows import plots
from pyro_flows.distributions import VonMisesFisher


class Truth(dist.TorchDistribution):
    """A belt at a fixed angle to an axis, and two clusters."""

    support = dist.constraints.sphere
    arg_constraints = {}  # noqa: RUF012
    shares = (0.6, 0.25, 0.15)

    def __init__(self) -> None:
        self.axis = normalize(torch.tensor([0.5, -0.4, 0.8]), dim=0)
        self.clusters = [
            VonMisesFisher(torch.tensor([0.0, 0.0, 1.0]), 30.0),
            VonMisesFisher(normalize(torch.tensor([-0.7, 0.6, 0.1]), dim=0), 60.0),
        ]
        # The belt's height above its axis is normal, cut off at the poles.
        self.height = dist.Normal(-0.1, 0.08)
        super().__init__(event_shape=torch.Size((3,)), validate_args=False)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats, with respect to the surface measure."""
        belt = self.height.log_prob(x @ self.axis) - math.log(2 * math.pi)
        each = torch.stack([belt, *(cluster.log_prob(x) for cluster in self.clusters)])
        return (each + torch.tensor(self.shares).log()[:, None]).logsumexp(0)

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """Draws, shape ``(*sample_shape, 3)``."""
        count = torch.Size(sample_shape).numel()
        h = self.height.sample((count,)).clamp(-1, 1)[:, None]
        side = torch.randn(count, 3)
        side = normalize(side - (side @ self.axis)[:, None] * self.axis, dim=-1)
        each = torch.stack([h * self.axis + (1 - h * h).sqrt() * side, *(c.sample((count,)) for c in self.clusters)])
        chosen = torch.multinomial(torch.tensor(self.shares), count, replacement=True)
        return normalize(each[chosen, torch.arange(count)], dim=-1).reshape(*sample_shape, 3)


def mass(flow: pf.Flow, count: int) -> float:
    """The integral over the sphere, by midpoints in height and angle: cells of one area."""
    h = (torch.arange(count, dtype=torch.float64) + 0.5) * (2 / count) - 1
    turn = (torch.arange(2 * count, dtype=torch.float64) + 0.5) * (math.pi / count)
    flat = (1 - h * h).sqrt()[:, None]
    x = torch.stack((flat * turn.cos(), flat * turn.sin(), h[:, None].expand(-1, 2 * count)), -1).reshape(-1, 3)
    with torch.no_grad():
        return float(flow.double().log_prob(normalize(x, dim=-1)).exp().mean() * 4 * math.pi)


def posterior(seconds: float, seed: int) -> pf.infer.GuideFit:
    """The direction of a source from five measurements of known precision, and its log-distance, in one guide."""
    seen = normalize(
        torch.tensor([[0.1, 0.9, 0.6], [0.4, 0.8, 0.7], [-0.1, 0.7, 0.9], [0.3, 1.0, 0.3], [0.0, 0.6, 1.0]]), dim=-1
    )
    flux = torch.tensor([1.3, 0.9, 1.1, 1.6, 0.8])

    def model() -> None:
        direction = pyro.sample("direction", dist.ProjectedNormal(torch.zeros(3)))
        log_distance = pyro.sample("log_distance", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(seen)):
            spread = VonMisesFisher(direction, 8.0)
            pyro.sample("seen", spread, obs=seen)
            pyro.sample("flux", dist.LogNormal(-2 * log_distance + direction[..., 2], 0.3), obs=flux)

    return pf.fit_guide(pf.AutoFlow(model, seed=seed), seconds=seconds, progress=False)


def main() -> None:
    args = begin(__doc__)
    truth = Truth()
    rows, held_out, steps = (500, 500, 5) if args.smoke else (10_000, 10_000, 800)
    data, test = truth.sample((rows,)), truth.sample((held_out,))
    fit = pf.fit_density(
        pf.sphere(3), data, seed=args.seed, steps=steps, batch_size=min(500, rows // 2), progress=False
    )
    print(fit)
    flow = fit.distribution
    with torch.no_grad():
        scores, best = flow.log_prob(test), truth.log_prob(test)
    print(f"Held-out log-likelihood, nats per row, {len(test)} rows, ± 2 standard errors")
    for name, each in (("truth", best), ("sphere", scores), ("truth - sphere", best - scores)):
        print(f"  {name:<16}{mean_of(each, 4):>17}")
    guide = posterior(2.0 if args.smoke else 5.0, args.seed)
    print(guide)
    draws = guide.sample(1000, resampled=True)["direction"]

    fig, axes = plt.subplots(2, 2, figsize=(11.4, 6.0), layout="constrained")
    plots.globe(truth, ax=axes[0, 0], points=60 if args.smoke else 200)
    axes[0, 0].set_title("the truth")
    plots.globe(flow, ax=axes[0, 1], points=60 if args.smoke else 200)
    axes[0, 1].set_title("what pf.sphere learned from draws")
    plots.globe(
        dist.ProjectedNormal(torch.zeros(3)), data=test, ax=axes[1, 0], points=50, cmap="Greys", vmin=1.0, vmax=2.0
    )
    axes[1, 0].set_title("1000 held-out rows")
    plots.globe(VonMisesFisher(normalize(draws.mean(0), dim=0), 40.0), data=draws, ax=axes[1, 1], points=100, alpha=0.5)
    axes[1, 1].set_title("a posterior of a direction: draws")
    save(fig, args.out / "sphere.png")
    print(f"Integral of the learned density over the sphere: {mass(flow, 100 if args.smoke else 400):.6f}")


if __name__ == "__main__":
    main()
