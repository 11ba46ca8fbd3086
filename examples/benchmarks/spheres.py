"""Flows on spheres: a target of four modes, and posteriors of directions against exact ones.

    python examples/benchmarks/spheres.py                      # both; some minutes on one core
    python examples/benchmarks/spheres.py --tables target --layers 1 3 --seeds 0 1 2
    python examples/benchmarks/spheres.py --tables target --drawn 0 1 2 3 4 --seeds 0
    python examples/benchmarks/spheres.py --tables target --gradient path
    python examples/benchmarks/spheres.py --smoke

*target*: four von Mises-Fisher modes of concentration 20 on the sphere S^2 and four on S^3, of means and weights of our
own; with ``--drawn``, four of means, weights and a concentration from 5 to 40 drawn at random by each number.
``pf.sphere`` learns them from the density alone, by the reverse divergence, whose gradient is the total derivative or
that of ``PathELBO``.  What is shown is the Kullback-Leibler divergence from the flow to the target in nats and the
effective sample size of 20,000 of the flow's draws as a share, and the integral of the flow's density by quadrature in
float64.

*posterior*: the mean direction of von Mises-Fisher data of known concentration, whose posterior is of this kind, too.
``fit_guide`` sees the model only.  What is shown is the share of effective draws, the error of the log-evidence in
nats, and the largest error of the posterior's mean vector, in units of the exact standard deviation of its coordinates.
"""

import argparse
import itertools
import math
import time

import pyro
import pyro.distributions as dist
import torch
from _runs import Table, command, machine, spread
from torch import Tensor

import pyro_flows as pf
from pyro_flows.distributions import VonMisesFisher

MEANS = {
    3: [[0.9, 0.3, 0.3], [-0.5, 0.8, 0.35], [0.1, -0.6, 0.8], [-0.4, -0.5, -0.77]],
    4: [[0.9, 0.3, 0.3, 0.1], [-0.5, 0.8, 0.3, -0.2], [0.1, -0.6, 0.8, 0.0], [-0.4, -0.4, -0.5, 0.65]],
}
WEIGHTS = [0.4, 0.3, 0.2, 0.1]
CONCENTRATION = 20.0


def target(size: int, number: int | None = None) -> tuple[str, dist.TorchDistribution]:
    """Four modes on the sphere of so many coordinates, our own or drawn at random, and their concentration."""
    means, weights, concentration = torch.tensor(MEANS[size]), torch.tensor(WEIGHTS), CONCENTRATION
    if number is not None:
        generator = torch.Generator().manual_seed(number)
        means, weights = torch.randn(4, size, generator=generator), 0.2 + torch.rand(4, generator=generator)
        concentration = float(5 * 8 ** torch.rand((), generator=generator))
    modes = VonMisesFisher(torch.nn.functional.normalize(means, dim=-1), concentration)
    name = "own" if number is None else f"drawn, {number}"
    return f"{name}, {concentration:.1f}", dist.MixtureSameFamily(dist.Categorical(weights / weights.sum()), modes)


def grid(size: int, count: int) -> tuple[Tensor, Tensor]:
    """Unit vectors and their areas: midpoints in the angle of the circle and in those of the heights."""
    turn = (torch.arange(2 * count, dtype=torch.float64) + 0.5) * (math.pi / count)
    x, area = torch.stack((turn.cos(), turn.sin()), -1), torch.full((2 * count,), math.pi / count).double()
    slope = turn[:count]
    for level in range(3, size + 1):
        each = torch.cat((slope.sin()[:, None, None] * x, slope.cos()[:, None, None].expand(-1, len(x), 1)), -1)
        x, area = each.reshape(-1, level), (slope.sin()[:, None] ** (level - 2) * (math.pi / count) * area).reshape(-1)
    return x, area


def learn(modes: dist.TorchDistribution, layers: int, seed: int, args: argparse.Namespace) -> pf.Flow:
    """A flow that learns the target from its density, which is flattened in the first third of the steps."""
    torch.manual_seed(seed)
    flow = pf.Flow(pf.sphere(modes.event_shape[0], num_layers=layers))
    # Gradients of flows with narrow bins have heavy tails: a short memory of their size forgets outliers soon.
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3, betas=(0.9, args.beta))
    steps = 3 if args.smoke else args.steps
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        power = min(1.0, 0.1 + 2.7 * step / steps)
        x, log_q = flow.rsample_and_log_prob((args.draws,))
        if args.gradient == "path":
            place = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(flow.log_prob(place).sum(), place)
            log_q = (slope * x).sum(-1)
        (log_q - power * modes.log_prob(x)).mean().backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 2.0)
        optimizer.step()
        schedule.step()
    return flow


@torch.no_grad()
def judged(flow: pf.Flow, modes: dist.TorchDistribution, count: int) -> tuple[float, float, float]:
    """Divergence in nats, share of effective draws, and integral."""
    x = flow.sample((20_000,))
    weight = modes.log_prob(x) - flow.log_prob(x)
    ess = float((2 * weight.logsumexp(0) - (2 * weight).logsumexp(0)).exp()) / len(x)
    divergence = float(-weight.mean())
    places, area = grid(modes.event_shape[0], count)
    exact = flow.double()
    mass = sum(
        float((exact.log_prob(x).exp() * a).sum())
        for x, a in zip(places.split(50_000), area.split(50_000), strict=True)
    )
    return divergence, ess, mass


def directions(size: int, kappa: float, rows: int) -> tuple[object, VonMisesFisher, float]:
    """A model of a mean direction with data, its exact posterior, and the exact log-evidence."""
    generator = torch.Generator().manual_seed(size)
    at = torch.nn.functional.normalize(torch.randn(size, generator=generator), dim=-1)
    with torch.random.fork_rng():
        torch.manual_seed(size + rows)
        data = VonMisesFisher(at, kappa).sample((rows,))

    def model() -> None:
        mu = pyro.sample("mu", dist.ProjectedNormal(torch.zeros(size)))
        with pyro.plate("rows", rows):
            pyro.sample("x", VonMisesFisher(mu, kappa), obs=data)

    rows64 = torch.nn.functional.normalize(data.double(), dim=-1)
    total, any_mu = kappa * rows64.sum(0), rows64[0]
    exact = VonMisesFisher(total / total.norm(), total.norm())
    prior = pf.distributions.UniformSphere(size).double()()
    joint = VonMisesFisher(any_mu, kappa).log_prob(rows64).sum() + prior.log_prob(any_mu)
    return model, exact, float(joint - exact.log_prob(any_mu))


def posterior(size: int, kappa: float, rows: int, seed: int, seconds: float) -> tuple[float, float, float]:
    """Effective share, error of the log-evidence, and error of the mean."""
    model, exact, evidence = directions(size, kappa, rows)
    fit = pf.fit_guide(pf.AutoFlow(model, seed=seed), seconds=seconds, progress=False)
    draws = fit.sample(10_000, resampled=True)["mu"].double()
    true = exact.sample((20_000,))
    error = ((draws.mean(0) - exact.mean).abs() / true.std(0)).max()
    return fit.ess, fit.log_evidence - evidence, float(error)


def main() -> None:
    args = command(
        __doc__,
        "few steps",
        tables={"nargs": "+", "default": ["target", "posterior"], "choices": ["target", "posterior"]},
        layers={"type": int, "nargs": "+", "default": [1, 3]},
        drawn={"type": int, "nargs": "+", "default": [None], "help": "numbers of targets drawn at random"},
        gradient={"default": "total", "choices": ["total", "path"]},
        draws={"type": int, "default": 512, "help": "of a step"},
        beta={"type": float, "default": 0.99, "help": "Adam's memory of the size of gradients"},
        sizes={"type": int, "nargs": "+", "default": [3, 4]},
        steps={"type": int, "default": 1000},
        seconds={"type": float, "default": 20.0},
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2]},
    )
    torch.set_num_threads(1)
    seeds = args.seeds[:1] if args.smoke else args.seeds
    tables = []
    if "target" in args.tables:
        table = Table("sphere", "target", "layers", "KL, nats", "ESS", "integral", "CPU s")
        sizes, layers = (args.sizes[:1], args.layers[:1]) if args.smoke else (args.sizes, args.layers)
        for size, number, count in itertools.product(sizes, args.drawn, layers):
            name, modes = target(size, number)
            cells = {3: 40, 4: 10}[size] if args.smoke else {3: 500, 4: 70}[size]
            begin = time.process_time()
            found = [judged(learn(modes, count, seed, args), modes, cells) for seed in seeds]
            spent = (time.process_time() - begin) / len(seeds)
            columns = [spread(each, digits) for each, digits in zip(zip(*found, strict=True), (4, 3, 5), strict=True)]
            table.add(f"S^{size - 1}", name, str(count), *columns, f"{spent:.0f}")
        tables.append(table)
    if "posterior" in args.tables:
        table = Table("sphere", "concentration", "rows", "ESS", "log-evidence - exact", "error of the mean")
        cases = [(3, 2.0, 1)] if args.smoke else [(2, 2.0, 3), (3, 2.0, 1), (3, 5.0, 10), (3, 50.0, 40)]
        for size, kappa, rows in cases:
            found = [posterior(size, kappa, rows, seed, 1.0 if args.smoke else args.seconds) for seed in seeds]
            columns = [spread(each) for each in zip(*found, strict=True)]
            table.add(f"S^{size - 1}", f"{kappa:g}", str(rows), *columns)
        tables.append(table)
    print(*(f"\n{table}" for table in tables), sep="\n")
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
