"""One guide for thousands of local latents: a conditional flow whose context is what an encoder makes of each datum.

    python examples/amortized.py              # prints a table, leaves guides_amortized.png in out/
    python examples/amortized.py --smoke      # the same in seconds, with a budget too small to mean anything

Many walkers are somewhere in the plane, and of each we know noisy distances to two beacons.  The posterior of a
position has two parts, mirrored in the line through the beacons, as narrow as the distances are sharp.  One guide
learns to answer for all walkers, from minibatches of a subsampled plate, by stock ``SVI`` with the path gradient, then
answers for walkers that it has not seen.  A guide trained so may settle on one of two modes; it sees both if the data
count little at first and their weight grows over much of the training.  With two dimensions a walker, a grid gives the
exact answer to hold it against.

An ``AutoFlow`` has one vector for all latents, so it refuses such a plate; what it says is printed first.
"""

from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from _script import FLOW, OTHER, TRUTH, begin, levels, save
from matplotlib import pyplot as plt
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import ClippedAdam
from torch import Tensor, nn
from tqdm import trange

import pyro_flows as pf
from pyro_flows.infer import AutoFlow, PathELBO

BEACONS = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
NOISE = 0.15


def distances(position: Tensor) -> Tensor:
    """To both beacons, shape (..., 2)."""
    return (position.unsqueeze(-2) - BEACONS).norm(dim=-1)


def walkers(seen: Tensor, batch: int | None = None, weight: float = 1.0) -> None:
    with pyro.plate("walkers", len(seen), subsample_size=batch) as rows:
        position = pyro.sample("position", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with poutine.scale(scale=weight):
            pyro.sample("seen", dist.Normal(distances(position), NOISE).to_event(1), obs=seen[rows])


class Guide(nn.Module):
    """q(position | seen): an encoder gives the context of a flow, or mean and scale of a normal."""

    def __init__(self, flow: bool, width: int = 64) -> None:
        super().__init__()
        outputs = 16 if flow else 4
        self.encoder = nn.Sequential(
            nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs)
        )
        chain = pf.nsf(2, context_dim=outputs, num_layers=4, hidden_dims=(width, width))
        self.flow = pf.Flow(chain) if flow else None

    def posterior(self, seen: Tensor) -> dist.Distribution:
        """Batch shape ``seen.shape[:-1]``."""
        context = self.encoder(seen)
        if self.flow is not None:
            return self.flow(context)
        mean, scale = context.chunk(2, -1)
        return dist.Normal(mean, scale.exp()).to_event(1)

    def forward(self, seen: Tensor, batch: int | None = None, weight: float = 1.0) -> None:
        pyro.module("guide", self)
        with pyro.plate("walkers", len(seen), subsample_size=batch) as rows:
            pyro.sample("position", self.posterior(seen[rows]))


def train(name: str, guide: Guide, seen: Tensor, steps: int) -> None:
    warm = 0.6 * steps if guide.flow is not None else 1  # a normal that spreads over both modes does worse
    optimizer = ClippedAdam({"lr": 3e-3, "lrd": 0.01 ** (1 / steps), "clip_norm": 10.0})
    svi = SVI(walkers, guide, optimizer, PathELBO())
    with trange(steps, desc=f"  {name}", leave=False) as progress:
        for step in progress:
            weight = 0.02 ** max(0.0, 1 - step / warm)
            loss = svi.step(seen, 256, weight)
            if step % 50 == 0:
                progress.set_postfix_str(f"ELBO {-loss / len(seen):.3f} nats a walker")


def log_joint(position: Tensor, seen: Tensor) -> Tensor:
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(position)
    return prior + dist.Normal(distances(position), NOISE).to_event(1).log_prob(seen)


def grid(n: int) -> tuple[Tensor, Tensor]:
    """Midpoints of a square grid over [-4.5, 4.5]^2, shape (n * n, 2), and the axis."""
    axis = (torch.arange(n) + 0.5) * (9 / n) - 4.5
    return torch.cartesian_prod(axis, axis), axis


def exact_evidence(seen: Tensor, n: int) -> Tensor:
    """The exact log evidence of each row, by a sum over a grid."""
    points, axis = grid(n)
    cell = 2 * torch.log(axis[1] - axis[0])
    return torch.stack([log_joint(points, row).logsumexp(0) + cell for row in seen])


@torch.no_grad()
def judge(name: str, guide: Guide, seen: Tensor, evidence: Tensor, draws: int) -> None:
    """How far the ELBO stays below the evidence (that is KL(q || p)), how many draws count, and where they are."""
    posterior = guide.posterior(seen)
    position = posterior.sample((draws,))
    log_weights = log_joint(position, seen) - posterior.log_prob(position)
    gap = evidence - log_weights.mean(0)
    ess = (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp() / draws
    above = (position[..., 1] > 0).float().mean(0)
    numbers = (gap.mean(), gap.quantile(0.95), ess.median(), above.quantile(0.05), above.quantile(0.95))
    print(f"  {name:<14}" + "".join(f"{float(each):12.3f}" for each in numbers))


@torch.no_grad()
def draw(guides: dict[str, Guide], seen: Tensor, path: Path) -> None:
    points, axis = grid(240)
    fig, axes = plt.subplots(2, len(seen), figsize=(11.2, 5.9), layout="constrained", sharex=True, sharey=True)
    for line, (name, guide), color in zip(axes, guides.items(), (FLOW, OTHER), strict=True):
        for ax, row in zip(line, seen, strict=True):
            table = log_joint(points, row).softmax(0).reshape(240, 240).T.numpy()
            ax.scatter(*guide.posterior(row).sample((1000,)).T, s=3, color=color, alpha=0.4, linewidths=0)
            ax.contour(axis, axis, table, levels=levels(table, (0.99, 0.5)), colors=TRUTH, linewidths=(0.8, 1.2))
            ax.plot(*BEACONS.T, "^", color=TRUTH, markersize=6)
            ax.set(xlim=(-3, 3), ylim=(-2.7, 2.7), aspect="equal")
        line[0].set_ylabel(name, color=color, fontsize=11)
    for ax, row in zip(axes[0], seen, strict=True):
        ax.set_title(f"distances {row[0]:.2f} and {row[1]:.2f}")
    fig.suptitle("Where is the walker? 1000 draws of one guide for all, and 50 and 99 % of each exact posterior")
    save(fig, path)


def refused(seen: Tensor) -> None:
    try:
        AutoFlow(walkers).setup(seen, 256)
    except ValueError as error:
        print(f"AutoFlow on a subsampled plate:\n  {error}\n")


def main() -> None:
    args = begin(__doc__)
    rows, held_out, steps, n = (500, 5, 5, 60) if args.smoke else (20_000, 200, 2000, 500)
    with torch.no_grad():
        positions = torch.randn(rows + held_out, 2)
        seen = distances(positions) + NOISE * torch.randn(rows + held_out, 2)
    seen, new = seen[:rows], seen[rows:]
    refused(seen)
    evidence = exact_evidence(new, n)
    guides = {}
    print(f"{held_out} walkers not seen before: nats from the ELBO to the exact log evidence (mean, 95 % quantile),")
    print("effective draws as a fraction (median), share of draws above the line (5 and 95 % quantile, exact: 0.5)")
    print(" " * 16 + "".join(f"{head:>12}" for head in ("gap", "95 %", "ESS", "above 5 %", "95 %")))
    for name, flow in (("flow", True), ("normal", False)):
        pyro.clear_param_store()
        guides[name] = Guide(flow)
        train(name, guides[name], seen, steps)
        judge(name, guides[name], new, evidence, 100 if args.smoke else 2000)
    shown = torch.tensor([[1.6, 1.6], [1.0, 1.35], [2.6, 1.2], [0.5, 1.6]])
    draw(guides, shown, args.out / "guides_amortized.png")


if __name__ == "__main__":
    main()
