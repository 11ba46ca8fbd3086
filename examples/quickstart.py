"""Three things to do with a flow, each on real data, in about a minute on one CPU core.

    python examples/quickstart.py                # prints three small tables, leaves three pictures in out/
    python examples/quickstart.py --smoke        # the same in seconds, with budgets too small to mean anything

1. Density: the joint distribution of five measurements at a power plant, by ``realnvp`` and by ``maf``.
2. Conditional density: exhaust vacuum and output of that plant, given the temperature outside.
3. Posterior: eight schools (Rubin, 1981), where Pyro's own guide takes a flow as written.
"""

import copy
import math
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from _script import FLOW, OTHER, SHADES, TRUTH, begin, levels, mean_of, power_plant, save
from matplotlib import pyplot as plt
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoNormal, AutoNormalizingFlow
from pyro.optim import ClippedAdam
from torch import Tensor
from torch.distributions import AffineTransform
from tqdm import trange

import pyro_flows as pf

LABELS = ["temperature AT (°C)", "vacuum V (cm Hg)", "pressure AP (mbar)", "humidity RH (%)", "output PE (MW)"]


def flow_in_units_of(train: Tensor, chain: pf.Chain) -> pf.Flow:
    """A flow that ends in the location and scale of the training data, so that densities are in the data's units."""
    return pf.Flow([*chain, AffineTransform(train.mean(0), train.std(0))])


def fit(name: str, flow: pf.Flow, train: tuple[Tensor, ...], valid: tuple[Tensor, ...], epochs: int) -> None:
    """Maximum likelihood of ``(value,)`` or ``(value, context)``, stopped where the validation rows say so."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=4)
    best, best_state, since = math.inf, flow.state_dict(), 0
    with trange(epochs, desc=f"  {name}", leave=False) as progress:
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
            progress.set_postfix_str(f"validation {-best:.3f}")
            if since > 12:
                break
    flow.load_state_dict(best_state)


def row(name: str, log_probs: Tensor) -> None:
    print(f"  {name:<20}{mean_of(log_probs):>17}")


def density(out: Path, epochs: int) -> None:
    train, valid, test = power_plant()
    print("1. p(AT, V, AP, RH, PE): held-out log-likelihood, nats per row, ± 2 standard errors")
    row("full Gaussian", dist.MultivariateNormal(train.mean(0), train.T.cov()).log_prob(test))
    for name, chain in (("realnvp", pf.realnvp(5, num_layers=8)), ("maf", pf.maf(5, num_layers=6))):
        flow = flow_in_units_of(train, chain)
        fit(name, flow, (train,), (valid,), epochs)
        with torch.no_grad():
            row(name, flow.log_prob(test))
    corner_plot(train.numpy(), flow.sample((len(train),)).numpy(), out / "quickstart_density.png")


def corner_plot(data: np.ndarray, draws: np.ndarray, path: Path) -> None:
    """All pairs of columns: the data below the diagonal, draws above it, both on it."""
    fig, axes = plt.subplots(5, 5, figsize=(8.8, 8.4), sharex="col")
    low, high = np.quantile(data, [0.001, 0.999], axis=0)
    for i, j in np.ndindex(5, 5):
        ax = axes[i, j]
        ax.set_xlim(low[j], high[j])
        if i == j:
            bins = np.linspace(low[i], high[i], 45)
            ax.hist(data[:, i], bins, density=True, color=TRUTH, alpha=0.3)
            ax.hist(draws[:, i], bins, density=True, color=FLOW, histtype="step", linewidth=1.5)
            ax.set_yticks([])
            ax.spines["left"].set_visible(False)
        else:
            points, color = (data, TRUTH) if i > j else (draws, FLOW)
            ax.scatter(points[:1200, j], points[:1200, i], s=2, color=color, alpha=0.5, linewidths=0)
            ax.set_ylim(low[i], high[i])
            ax.tick_params(labelleft=j == 0)
        if i > j and j == 0:
            ax.set_ylabel(LABELS[i])
        if i < j and j == 4:
            ax.spines[["left", "right"]].set_visible([False, True])
            ax.yaxis.tick_right()
            ax.tick_params(labelright=True)
            ax.yaxis.set_label_position("right")
            ax.set_ylabel(LABELS[i])
        if i == 4:
            ax.set_xlabel(LABELS[j])
    fig.suptitle("Power plant: 1200 hours as measured (gray, below) and as drawn from a fitted maf (teal, above)")
    fig.align_ylabels()
    fig.tight_layout()
    save(fig, path)


def conditional(out: Path, epochs: int) -> None:
    splits = power_plant()
    center, spread = splits[0][:, 0].mean(), splits[0][:, 0].std()
    pairs = [(rows[:, [1, 4]], (rows[:, :1] - center) / spread) for rows in splits]  # (V, PE) and AT, standardized
    train, valid, test = pairs
    print("2. p(V, PE | AT): held-out log-likelihood, nats per row, ± 2 standard errors")
    slope = (train[0] * train[1]).mean(0) / train[1].square().mean()
    mean = train[0].mean(0)
    covariance = (train[0] - mean - slope * train[1]).T.cov()
    row("linear Gaussian", dist.MultivariateNormal(mean + slope * test[1], covariance).log_prob(test[0]))
    flow = flow_in_units_of(train[0], pf.maf(2, context_dim=1, num_layers=6))
    fit("maf", flow, train, valid, epochs)
    with torch.no_grad():
        row("maf", flow.log_prob(*test))

    celsius = torch.linspace(2, 36, 90)
    context = (celsius[:, None] - center) / spread
    draws = flow(context).sample((10000,))  # (10000, 90, 2): the context's batch shape is the distribution's
    fig, axes = plt.subplots(1, 2, figsize=(10.4, 4.6))
    for k, (ax, label) in enumerate(zip(axes, (LABELS[1], LABELS[4]), strict=True)):
        values = draws[..., k]
        low, high = values.quantile(values.new_tensor([0.001, 0.999]), 0).numpy()
        edges = np.linspace(low.min(), high.max(), 70)
        heat = [np.histogram(column, edges, density=True)[0] for column in values.T.numpy()]
        ax.imshow(
            np.sqrt(heat).T,
            extent=(2, 36, edges[0], edges[-1]),
            origin="lower",
            aspect="auto",
            cmap=SHADES,
            interpolation="bicubic",
        )
        ax.scatter(splits[2][:, 0].numpy(), test[0][:, k].numpy(), s=4, color=TRUTH, alpha=0.55, linewidths=0)
        for q in (0.05, 0.5, 0.95):
            line = dist.Normal(mean[k] + slope[k] * context[:, 0], covariance[k, k].sqrt()).icdf(torch.tensor(q))
            ax.plot(celsius.numpy(), line.numpy(), color=OTHER, linestyle="--", linewidth=1.2)
            ax.plot(celsius.numpy(), values.quantile(q, 0).numpy(), color=FLOW, linewidth=1.6)
        ax.set(xlabel=LABELS[0], ylabel=label, xlim=(2, 36), ylim=(edges[0], edges[-1]))
    axes[0].set_title("p(V | AT)")
    axes[1].set_title("p(PE | AT)")
    axes[1].plot([], [], color=FLOW, linewidth=1.6, label="maf: density, and 5, 50, 95 %")
    axes[1].plot([], [], color=OTHER, linestyle="--", linewidth=1.2, label="linear Gaussian: 5, 50, 95 %")
    axes[1].scatter([], [], s=8, color=TRUTH, label="held-out hours")
    axes[1].legend(loc="upper right", fontsize=8)
    fig.tight_layout()
    save(fig, out / "quickstart_conditional.png")


EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(y: Tensor = EFFECTS) -> None:
    """Effects of coaching in eight schools; their spread tau makes a funnel, as wide in theta as tau is large."""
    mu = pyro.sample("mu", dist.Normal(0, 5))
    tau = pyro.sample("tau", dist.HalfCauchy(5))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=y)


def exact_schools() -> tuple[float, dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """The log evidence, and two marginals of the posterior on grids: given mu and tau, all else is Gaussian."""
    log_tau, mu, theta = torch.linspace(-6, 5, 400), torch.linspace(-25, 30, 401), torch.linspace(-30, 60, 401)
    tau = log_tau.exp()[:, None]
    joint = dist.Normal(0, 5).log_prob(mu) + dist.HalfCauchy(5).log_prob(tau) + log_tau[:, None]  # (log tau, mu)
    joint = joint + dist.Normal(mu[:, None], (ERRORS**2 + tau[..., None] ** 2).sqrt()).log_prob(EFFECTS).sum(-1)
    evidence = joint.logsumexp((0, 1)) + torch.log((log_tau[1] - log_tau[0]) * (mu[1] - mu[0]))
    weights = joint.softmax(1)
    mean = (weights * mu).sum(1, keepdim=True)
    variance = (weights * (mu - mean) ** 2).sum(1, keepdim=True)
    shrink = tau**2 / (tau**2 + ERRORS[0] ** 2)  # theta[0] given mu and tau: mean mu + shrink (y - mu)
    scale = (ERRORS[0] ** 2 * shrink + (1 - shrink) ** 2 * variance).sqrt()
    first = dist.Normal(mean + shrink * (EFFECTS[0] - mean), scale).log_prob(theta)
    marginals = {"mu": (mu, joint), "theta": (theta, joint.logsumexp(1, keepdim=True) + first)}
    return evidence.item(), {name: (grid, log_tau, table.exp()) for name, (grid, table) in marginals.items()}


def fit_guide(name: str, guide: AutoGuide, lr: float, steps: int) -> tuple[float, float]:
    """Maximizes the ELBO; returns a fresh estimate of it and its standard error."""
    optimizer = ClippedAdam({"lr": lr, "lrd": 0.02 ** (1 / steps), "clip_norm": 10.0})
    svi = SVI(schools, guide, optimizer, Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1))
    with trange(steps, desc=f"  {name}", leave=False) as progress:
        for step in progress:
            loss = svi.step()
            if step % 50 == 0:
                progress.set_postfix_str(f"ELBO {-loss:.2f}")
    fresh = Trace_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        elbos = -torch.tensor([fresh.loss(schools, guide) for _ in range(20)])
    return elbos.mean().item(), elbos.std().item() / len(elbos) ** 0.5


def posterior(out: Path, steps: int) -> None:
    evidence, exact = exact_schools()
    print(f"3. Eight schools: ELBO, nats, ± 2 standard errors (the log evidence is {evidence:.2f})")
    guides = {
        "AutoNormal": (AutoNormal(schools), 0.1, OTHER),
        "iaf": (AutoNormalizingFlow(schools, partial(pf.iaf, num_layers=3)), 0.01, FLOW),
    }
    fig, axes = plt.subplots(2, 2, figsize=(9, 7.6), sharey=True, sharex="row")
    for column, (name, (guide, lr, color)) in zip(axes.T, guides.items(), strict=True):
        pyro.clear_param_store()
        elbo, error = fit_guide(name, guide, lr, steps)
        print(f"  {name:<20}{elbo:9.3f} ± {2 * error:.3f}")
        with pyro.plate("draws", 3000, dim=-2), torch.no_grad():
            draws = {site: value.reshape(3000, -1)[:, 0].numpy() for site, value in guide().items()}
        for ax, (site, (across, log_tau, table)) in zip(column, exact.items(), strict=True):
            ax.scatter(draws[site], np.log(draws["tau"]), s=4, color=color, alpha=0.4, linewidths=0)
            lines = {"levels": levels(table.numpy()), "colors": TRUTH, "linewidths": (0.8, 1.1, 1.4)}
            ax.contour(across.numpy(), log_tau.numpy(), table.numpy(), **lines)
            ax.set_xlabel({"mu": "mean effect µ", "theta": "effect in the first school θ₁"}[site])
        column[0].set_title(f"{name}: {evidence - elbo:.2f} nats below the evidence", color=color)
    axes[0, 0].set(xlim=(-12, 20), ylim=(-4.5, 4), ylabel="log spread between schools, log τ")
    axes[1, 0].set(xlim=(-20, 45), ylabel="log spread between schools, log τ")
    fig.suptitle("Eight schools: draws of two guides, and where 50, 90, 99 % of the exact posterior lie")
    fig.tight_layout()
    save(fig, out / "quickstart_posterior.png")


def main() -> None:
    args = begin(__doc__)
    for part, budget in ((density, 60), (conditional, 60), (posterior, 2000)):
        pyro.set_rng_seed(args.seed)
        part(args.out, max(1, budget // 200) if args.smoke else budget)


if __name__ == "__main__":
    main()
