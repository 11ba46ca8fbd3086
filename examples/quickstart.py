"""Three things to do with a flow, each on real data, in about a minute on one CPU core.

    python examples/quickstart.py                # prints three small tables, leaves three pictures in out/
    python examples/quickstart.py --smoke        # the same in seconds, with budgets too small to mean anything

1. Density: the joint distribution of five measurements at a power plant, by ``maf`` and by ``realnvp``.
2. Conditional density: exhaust vacuum and output of that plant, given the temperature outside.
3. Posterior: eight schools (Rubin, 1981), where Pyro's own guide takes a flow as written.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoNormal, AutoNormalizingFlow
from torch import Tensor
from torch.distributions import AffineTransform
from tqdm import tqdm, trange

import pyro_flows as pf

NAMES = ["AT", "V", "AP", "RH", "PE"]
LABELS = ["temperature AT (°C)", "vacuum V (cm Hg)", "pressure AP (mbar)", "humidity RH (%)", "output PE (MW)"]
TRUTH, FLOW, GAUSS = "#3d405b", "#1f7a8c", "#e07a5f"  # the same three colours for the same three things everywhere
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8d99ae",
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "savefig.dpi": 110,
}


def load() -> tuple[Tensor, Tensor, Tensor]:
    """Train, validation and test rows of the power plant data (columns NAMES)."""
    stored = np.load(Path(__file__).parent / "data" / "power_plant.npz")
    rows, held_out = torch.from_numpy(stored["x"]), torch.from_numpy(stored["test_rows"]).long()
    rest = torch.ones(len(rows), dtype=torch.bool)
    rest[held_out] = False
    others = rows[rest]
    others = others[torch.randperm(len(others))]
    return others[861:], others[:861], rows[held_out]


def in_units_of(chain: pf.Chain, train: Tensor) -> pf.Chain:
    """The chain followed by the shift and scale of the training data, so that densities are in the data's units."""
    return pf.Chain([*chain, AffineTransform(train.mean(0), train.std(0))])


def fit(name: str, flow: pf.Flow, train: tuple[Tensor, ...], valid: tuple[Tensor, ...], epochs: int) -> None:
    """Maximum likelihood of ``(value,)`` or ``(value, context)``, stopped where the validation set says so."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=4)
    best, best_state, since = math.inf, copy.deepcopy(flow.state_dict()), 0
    with trange(epochs, desc=name, leave=False) as progress:
        for _ in progress:
            for rows in torch.randperm(len(train[0])).split(256):
                optimizer.zero_grad()
                loss = -flow.log_prob(*(part[rows] for part in train)).mean()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                score = -flow.log_prob(*valid).mean().item()
            schedule.step(score)
            since += 1
            if score < best:
                best, best_state, since = score, copy.deepcopy(flow.state_dict()), 0
            progress.set_postfix(validation=f"{-best:.3f}")
            if since > 12:
                break
    flow.load_state_dict(best_state)


def row(name: str, log_probs: Tensor) -> None:
    print(f"  {name:<22}{log_probs.mean():9.3f} ± {2 * log_probs.std() / len(log_probs) ** 0.5:.3f}")


def density(out: Path, epochs: int) -> None:
    train, valid, test = load()
    gauss = dist.MultivariateNormal(train.mean(0), train.T.cov())
    print("1. p(AT, V, AP, RH, PE): held-out log-likelihood in nats per row, ± 2 standard errors")
    row("full Gaussian", gauss.log_prob(test))
    flows = {"realnvp": pf.realnvp(5, num_layers=8), "maf": pf.maf(5, num_layers=6)}
    for name, chain in flows.items():
        flow = pf.Flow(in_units_of(chain, train))
        fit(name, flow, (train,), (valid,), epochs)
        with torch.no_grad():
            row(name, flow.log_prob(test))
    draws = flow.sample((len(train),))
    fig, axes = plt.subplots(5, 5, figsize=(9, 9), sharex="col")
    low, high = (torch.quantile(train, q, dim=0).tolist() for q in (0.001, 0.999))
    for i, j in np.ndindex(5, 5):
        ax = axes[i, j]
        ax.set_xlim(low[j], high[j])
        if i == j:
            bins = np.linspace(low[i], high[i], 50)
            ax.hist(train[:, i], bins, density=True, color=TRUTH, alpha=0.3)
            ax.hist(draws[:, i], bins, density=True, color=FLOW, histtype="step", linewidth=1.4)
            ax.set_yticks([])
            ax.spines["left"].set_visible(False)
        else:
            points, color = (train, TRUTH) if i > j else (draws, FLOW)
            ax.scatter(points[:2500, j], points[:2500, i], s=1.2, color=color, alpha=0.45, linewidths=0)
            ax.set_ylim(low[i], high[i])
        if i == 4:
            ax.set_xlabel(LABELS[j])
        if j == 0 and i:
            ax.set_ylabel(LABELS[i])
        elif i != j:
            ax.tick_params(labelleft=False)
    fig.suptitle("Power plant, 9568 hours: measured (grey, below) and drawn from a fitted maf (teal, above)", fontsize=12)
    fig.align_ylabels()
    fig.tight_layout()
    fig.savefig(out / "quickstart_density.png")


def conditional(out: Path, epochs: int) -> None:
    parts = load()
    data = [(rows[:, [1, 4]], rows[:, :1]) for rows in parts]
    y, at = data[0]
    center, spread = at.mean(0), at.std(0)
    data = [(y, (at - center) / spread) for y, at in data]
    train, valid, (test_y, test_at) = data
    print("2. p(V, PE | AT): held-out log-likelihood in nats per row, ± 2 standard errors")
    design = torch.cat([train[1], torch.ones_like(train[1])], 1)
    weights = torch.linalg.lstsq(design, y).solution
    residuals = (y - design @ weights).T.cov()
    linear = dist.MultivariateNormal(test_at * weights[0] + weights[1], residuals)
    row("linear Gaussian", linear.log_prob(test_y))
    flow = pf.Flow(in_units_of(pf.maf(2, context_dim=1, num_layers=6), y))
    fit("maf, given AT", flow, train, valid, epochs)
    with torch.no_grad():
        row("maf, given AT", flow.log_prob(test_y, test_at))

    grid = torch.linspace(2, 36, 120)
    context = ((grid - center) / spread)[:, None]
    draws = flow(context).sample((4000,))  # (4000, 120, 2): the batch shape is the context's
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.4))
    for k, (ax, label) in enumerate(zip(axes, (LABELS[1], LABELS[4]), strict=True)):
        low, high = draws[..., k].quantile(0.0005).item(), draws[..., k].quantile(0.9995).item()
        edges = np.linspace(low, high, 100)
        heat = np.stack([np.histogram(column, edges, density=True)[0] for column in draws[..., k].T.numpy()], 1)
        ax.pcolormesh(grid, (edges[1:] + edges[:-1]) / 2, heat**0.5, cmap="GnBu", shading="gouraud", rasterized=True)
        ax.scatter(parts[2][:, 0], test_y[:, k], s=3, color=TRUTH, alpha=0.6, linewidths=0, label="held-out hours")
        for q in (0.05, 0.5, 0.95):
            ax.plot(grid, draws[..., k].quantile(q, 0), color=FLOW, linewidth=1.3, label="maf: 5, 50, 95 %" if q == 0.5 else None)
            edge = context[:, 0] * weights[0, k] + weights[1, k] + 2**0.5 * torch.erfinv(torch.tensor(2 * q - 1)) * residuals[k, k] ** 0.5
            ax.plot(grid, edge, color=GAUSS, linewidth=1.0, linestyle="--", label="linear Gaussian" if q == 0.5 else None)
        ax.set(xlabel=LABELS[0], ylabel=label, xlim=(2, 36), ylim=(low, high))
    axes[0].legend()
    fig.tight_layout()
    fig.savefig(out / "quickstart_conditional.png")


EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools() -> None:
    """Effects of coaching in eight schools, centred: theta is narrow where tau is small."""
    mu = pyro.sample("mu", dist.Normal(0, 5))
    tau = pyro.sample("tau", dist.HalfCauchy(5))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=EFFECTS)


def exact_schools() -> tuple[float, dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """The log evidence, and two marginals of the posterior on grids: given mu and tau, all else is Gaussian."""
    log_tau, mu, theta = torch.linspace(-5, 5, 300), torch.linspace(-15, 25, 161), torch.linspace(-25, 55, 241)
    tau = log_tau.exp()[:, None]
    joint = dist.Normal(0, 5).log_prob(mu) + dist.HalfCauchy(5).log_prob(tau) + tau.log()  # (log tau, mu)
    joint = joint + dist.Normal(mu[:, None], (ERRORS**2 + tau[..., None] ** 2).sqrt()).log_prob(EFFECTS).sum(-1)
    evidence = joint.logsumexp((0, 1)) + torch.log((log_tau[1] - log_tau[0]) * (mu[1] - mu[0]))
    shrink = tau**2 / (tau**2 + ERRORS[0] ** 2)
    first = dist.Normal(mu + shrink * (EFFECTS[0] - mu), ERRORS[0] * shrink.sqrt())
    by_theta = torch.stack([(joint + first.log_prob(t)).exp().sum(1) for t in theta], 1)
    return evidence.item(), {"mu": (mu, log_tau, joint.exp()), "theta": (theta, log_tau, by_theta)}


def fit_guide(name: str, guide: AutoGuide, steps: int) -> tuple[float, float]:
    """Trains a guide by the ELBO; returns a fresh estimate of the ELBO and its standard error."""
    pyro.clear_param_store()
    optimizer = pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.02 ** (1 / steps), "clip_norm": 10.0})
    svi = SVI(schools, guide, optimizer, Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1))
    with trange(steps, desc=name, leave=False) as progress:
        for step in progress:
            loss = svi.step()
            if step % 100 == 0:
                progress.set_postfix(elbo=f"{-loss:.2f}")
    fresh = Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        elbos = -torch.tensor([fresh.loss(schools, guide) for _ in range(20)])
    return elbos.mean().item(), elbos.std().item() / len(elbos) ** 0.5


def posterior(out: Path, steps: int) -> None:
    evidence, exact = exact_schools()
    print(f"3. Eight schools: ELBO in nats, ± 2 standard errors (no guide can pass the log evidence, {evidence:.2f})")
    guides = {"AutoNormal": (AutoNormal(schools), GAUSS)}
    guides["AutoNormalizingFlow, iaf"] = (AutoNormalizingFlow(schools, partial(pf.iaf, num_layers=3)), FLOW)
    fig, axes = plt.subplots(2, 2, figsize=(8.4, 7.2), sharey=True, sharex="row")
    for (name, (guide, color)), column in zip(guides.items(), axes.T, strict=True):
        elbo, error = fit_guide(name, guide, steps)
        print(f"  {name:<26}{elbo:8.2f} ± {2 * error:.2f}")
        with pyro.plate("draws", 4000, dim=-2), torch.no_grad():
            draws = {site: value.reshape(4000, -1)[:, 0] for site, value in guide().items()}
        for ax, (site, (across, log_tau, density)) in zip(column, exact.items(), strict=True):
            ax.scatter(draws[site], draws["tau"].log(), s=3, color=color, alpha=0.4, linewidths=0, rasterized=True)
            ranked = density.flatten().sort(descending=True).values
            mass = ranked.cumsum(0) / ranked.sum()
            levels = [ranked[(mass < inside).sum()].item() for inside in (0.99, 0.9, 0.5)]
            ax.contour(across, log_tau, density, levels, colors=TRUTH, linewidths=(0.8, 1.0, 1.3))
            ax.set_xlabel({"mu": "mean effect µ", "theta": "effect of the first school θ₁"}[site])
        column[0].set_title(f"{name}: ELBO {elbo:.2f}", color=color)
    axes[0, 0].set(xlim=(-12, 20), ylim=(-5, 4.5))
    axes[1, 0].set(xlim=(-18, 45))
    axes[0, 0].set_ylabel("spread between schools, log τ")
    axes[1, 0].set_ylabel("spread between schools, log τ")
    fig.suptitle(f"Eight schools: draws of two guides; contours hold 50, 90, 99 % of the exact posterior", fontsize=11)
    fig.tight_layout()
    fig.savefig(out / "quickstart_posterior.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny budgets; pictures go to a temporary folder")
    parser.add_argument("--out", type=Path, help="folder for the pictures (default: out)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp() if args.smoke else "out")
    out.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update(STYLE)
    for part, budget in ((density, 60), (conditional, 60), (posterior, 2000)):
        pyro.set_rng_seed(args.seed)
        part(out, max(1, budget // 200) if args.smoke else budget)
    print(f"Pictures: {out}")


if __name__ == "__main__":
    main()
