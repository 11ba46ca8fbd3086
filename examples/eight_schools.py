"""Eight schools (Rubin, 1981), written both ways: one call each, a verdict, and the exact posterior beside it.

    python examples/eight_schools.py              # prints a table, leaves guides_schools.png in out/
    python examples/eight_schools.py --smoke      # the same in seconds, without NUTS, too short to mean anything

Written *centered*, the schools' effects are theta ~ Normal(mu, tau), and small tau squeezes them: a funnel, hard for
Gaussian guides and NUTS.  Written *non-centered*, theta = mu + tau * effect with effect ~ Normal(0, 1), the posterior
is mild.  ``fit_guide`` gets 10 seconds for each.  Beside it are Pyro's AutoNormal on the centered form, and NUTS on the
non-centered one.  All else is Gaussian given mu and tau, so the truth is known.
"""

import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from _schools import EFFECTS, ERRORS, exact_schools
from _schools import schools as centered
from _script import FLOW, OTHER, THIRD, TRUTH, begin, levels, save
from matplotlib import pyplot as plt
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam
from torch import Tensor

from pyro_flows.infer import AutoFlow, GuideFit, fit_guide

Draws = dict[str, Tensor]


def non_centered(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * effect, ERRORS), obs=y)


def with_theta(draws: Draws) -> Draws:
    """Draws of either form, with theta."""
    if "theta" in draws:
        return draws
    return draws | {"theta": draws["mu"][:, None] + draws["tau"][:, None] * draws["effect"]}


def auto_normal(n: int, steps: int) -> Draws:
    pyro.clear_param_store()
    guide = AutoNormal(centered)
    optimizer = ClippedAdam({"lr": 0.05, "lrd": 0.02 ** (1 / steps), "clip_norm": 10.0})
    svi = SVI(centered, guide, optimizer, Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1))
    for _ in range(steps):
        svi.step(EFFECTS)
    with pyro.plate("draws", n, dim=-2), torch.no_grad():
        return {name: value.reshape(n, -1).squeeze(-1) for name, value in guide(EFFECTS).items()}


def nuts(n: int) -> Draws:
    mcmc = MCMC(NUTS(non_centered), num_samples=n, warmup_steps=n // 2, disable_progbar=True)
    mcmc.run(EFFECTS)
    return with_theta(mcmc.get_samples())


def row(name: str, draws: Draws, seconds: float) -> None:
    numbers = [each for site in ("mu", "tau") for each in (draws[site].mean(), draws[site].std())]
    first = draws["theta"][:, 0]
    numbers += [first.mean(), first.std(), (draws["tau"] < 0.5).float().mean()]
    print(f"  {name:<26}" + "".join(f"{float(each):9.2f}" for each in numbers) + f"{seconds:9.1f}")


def exact_row() -> None:
    _, tables = exact_schools()
    numbers = []
    for site, axis in (("mu", 1), ("tau", 0), ("theta", 1)):
        across, log_tau, table = tables["theta" if site == "theta" else "mu"]
        weights = table.sum(1 - axis) / table.sum()
        values = log_tau.exp() if site == "tau" else across
        mean = (weights * values).sum()
        numbers += [mean, (weights * (values - mean) ** 2).sum().sqrt()]
    _, log_tau, table = tables["mu"]
    numbers.append(table[log_tau.exp() < 0.5].sum() / table.sum())
    print(f"  {'exact':<26}" + "".join(f"{float(each):9.2f}" for each in numbers))


def draw(columns: dict[str, tuple[Draws, str]], path: Path) -> None:
    _, tables = exact_schools()
    across, log_tau, table = (part.numpy() for part in tables["theta"])
    fig, axes = plt.subplots(1, len(columns), figsize=(2.9 * len(columns), 3.6), sharey=True, layout="constrained")
    for ax, (title, (draws, color)) in zip(axes, columns.items(), strict=True):
        ax.scatter(draws["theta"][:3000, 0], draws["tau"][:3000].log(), s=3, color=color, alpha=0.4, linewidths=0)
        ax.contour(across, log_tau, table, levels=levels(table), colors=TRUTH, linewidths=(0.8, 1.1, 1.4))
        ax.set(xlim=(-20, 45), ylim=(-4.5, 4), xlabel="effect in the first school θ₁")
        ax.set_title(title, color=color)
    axes[0].set_ylabel("log spread between schools, log τ")
    fig.suptitle("Eight schools: 3000 draws, and where 50, 90, 99 % of the exact posterior lie")
    save(fig, path)


def main() -> None:
    args = begin(__doc__)
    seconds = 2.0 if args.smoke else 10.0
    fits: dict[str, tuple[GuideFit, float]] = {}
    for name, model in (("centered", centered), ("non-centered", non_centered)):
        start = time.monotonic()
        fit = fit_guide(AutoFlow(model, seed=args.seed), EFFECTS, seconds=seconds)
        fits[name] = fit, time.monotonic() - start
    heads = ("mu", "sd", "tau", "sd", "theta_1", "sd", "tau<0.5", "seconds")
    print("Posterior means and standard deviations, and the probability of a tau below 0.5")
    print(" " * 28 + "".join(f"{head:>9}" for head in heads))
    exact_row()
    columns: dict[str, tuple[Draws, str]] = {}
    start = time.monotonic()
    draws = auto_normal(20_000, 10 if args.smoke else 2000)
    row("AutoNormal, centered", draws, time.monotonic() - start)
    columns["AutoNormal, centered"] = draws, OTHER
    for name, (fit, seconds) in fits.items():
        draws = with_theta(fit.sample(20_000))
        row(f"fit_guide, {name}", draws, seconds)
        columns[f"fit_guide, {name}:\n“{fit.verdict.label}”"] = draws, FLOW
    if not args.smoke:
        start = time.monotonic()
        draws = nuts(2000)
        row("NUTS, non-centered", draws, time.monotonic() - start)
        columns["2000 of NUTS, non-centered"] = draws, THIRD
    for name, (fit, _) in fits.items():
        print(f"\n{name}: {fit.verdict}")
    draw(columns, args.out / "guides_schools.png")


if __name__ == "__main__":
    main()
