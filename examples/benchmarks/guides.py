"""Gradients of a guide along a run, and posteriors on which a guide fails: does its verdict say so?

    python examples/benchmarks/guides.py                    # both; a few minutes
    python examples/benchmarks/guides.py --tables variance
    python examples/benchmarks/guides.py --tables verdict --seconds 10 30
    python examples/benchmarks/guides.py --smoke

*variance*: a guide is trained from a poor start with the steps of ``fit_guide``, Adam and the path gradient of 128
particles, a fifth of them for its affine end alone. Now and then the gradient is taken many times over, each time with
few particles, in four ways: ``Trace_ELBO`` with the total derivative and with the path gradient, ``RenyiELBO`` (alpha
0), which has the total derivative of the importance-weighted bound, and ``DReGELBO``. What is shown is the variance of
the gradient, summed over all parameters, and before it what the guide lacks, as the standard deviation of
log p - log q. One posterior is normal, so that the guide becomes exact; the other is centered eight schools. Below it
the largest gradient at a guide that is the posterior.

*verdict*: the funnel and two separated modes, both with exact draws, by ``fit_guide`` with several options: errors in
units of the exact standard deviations, cost in CPU seconds, and what the verdict says. The line "exact draws" holds
10,000 draws against 10,000 others: what a perfect guide would be given.
"""

import textwrap
import time
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from _posteriors import SYNTHETIC, errors, named, schools
from _runs import command, machine, markdown
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO
from torch import Tensor

from pyro_flows.infer import AutoFlow, DReGELBO, fit_guide

FEW = 16
REPEATS = 64
Model = Callable[[], None]


def conjugate() -> tuple[Model, Tensor, Tensor]:
    """A regression with known noise, and mean and Cholesky factor of its posterior."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64) @ torch.randn(
        4, 4, generator=generator, dtype=torch.float64
    )
    y = x.sum(1) + 0.5 * torch.randn(30, generator=generator, dtype=torch.float64)

    def model() -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(torch.einsum("...d,nd->...n", beta, x), 0.5).to_event(1), obs=y)

    precision = x.mT @ x / 0.25 + torch.eye(4)
    return model, torch.linalg.solve(precision, x.mT @ y / 0.25), torch.linalg.cholesky(torch.linalg.inv(precision))


def eight_schools() -> None:
    """Centered."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    error = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    schools(dist.ImproperUniform, y, error, centered=True)


def estimators(nesting: int) -> dict[str, tuple[ELBO, bool]]:
    """Objectives, and whether the guide's entropy follows the path."""
    options = {"num_particles": FEW, "vectorize_particles": True, "max_plate_nesting": nesting}
    return {
        "total": (Trace_ELBO(**options), False),
        "path": (Trace_ELBO(**options), True),
        "IW total": (RenyiELBO(alpha=0, **options), False),
        "IW DReG": (DReGELBO(**options), False),
    }


def gradients(guide: AutoFlow, model: Model, objective: ELBO, path: bool, repeats: int) -> Tensor:
    """Shape ``(repeats, parameters)``."""
    parameters = list(guide.parameters())
    kept, guide.path_gradient = guide.path_gradient, path
    rows = []
    for _ in range(repeats):
        guide.zero_grad()
        objective.loss_and_grads(model, guide)
        rows.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]))
    guide.path_gradient = kept
    guide.zero_grad()
    return torch.stack(rows)


def along(model: Model, steps: int, checkpoints: list[int], repeats: int) -> list[list[str]]:
    """One row for each checkpoint."""
    pyro.set_rng_seed(0)
    guide = AutoFlow(model, start="prior").setup()  # so that there is a way to go
    nesting = guide.latents.max_plate_nesting
    density = guide.density()
    objective = Trace_ELBO(num_particles=128, vectorize_particles=True, max_plate_nesting=nesting)
    warm = steps // 5
    rows = []
    for step in range(steps + 1):
        if step in (0, warm):  # first the affine end alone, then all, as fit_guide does
            if step:
                guide.preconditioner.fold()
            trained = list(guide.parameters() if step else guide.preconditioner.parameters())
            optimizer = torch.optim.Adam(trained, lr=1e-2 if step else 0.1)
            length, last = (steps - warm, 1e-5) if step else (warm, 5e-3)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length, last)
        if step in checkpoints:
            with torch.no_grad():
                draws = guide.flow.sample((2000,))
                spread = (density(draws) - guide.flow.log_prob(draws)).std()
            found = {
                name: gradients(guide, model, elbo, path, repeats).var(0).sum().item()
                for name, (elbo, path) in estimators(nesting).items()
            }
            total, path, weighted, doubly = found.values()
            numbers = [spread.item(), total, path, total / path, weighted, doubly, weighted / doubly]
            rows.append([str(step), *(f"{number:.2g}" for number in numbers)])
        optimizer.zero_grad()
        objective.loss_and_grads(model, guide)
        torch.nn.utils.clip_grad_norm_(trained, 10.0)
        optimizer.step()
        schedule.step()
    return rows


def exact(repeats: int) -> list[list[str]]:
    """Gradients where the guide is the posterior: its affine end is placed there, its flow is the identity."""
    model, loc, scale = conjugate()
    pyro.set_rng_seed(0)
    guide = AutoFlow(model, start="prior").setup()
    guide.preconditioner.place(loc, scale)
    rows = []
    for name, (elbo, path) in estimators(0).items():
        found = gradients(guide, model, elbo, path, repeats)
        rows.append([name, f"{found.abs().max():.1e}", f"{found.var(0).sum():.1e}"])
    return rows


def variance(smoke: bool) -> None:
    steps, checkpoints, repeats = 3000, [0, 30, 100, 300, 600, 1000, 2000, 3000], REPEATS
    if smoke:
        steps, checkpoints, repeats = 5, [0, 5], 4
    columns = "step|sd of log p - log q|total|path|total / path|IW total|IW DReG|IW total / DReG".split("|")
    cases = (("Conjugate regression, 4-D", conjugate()[0]), ("Eight schools, centered, 10-D", eight_schools))
    for title, model in cases:
        print(f"\nVariance of the gradient of {FEW} particles: {title}\n")
        print(markdown(columns, along(model, steps, checkpoints, repeats)))
    print("\nGuide = posterior (conjugate regression)\n")
    print(markdown(["", "largest |gradient|", "variance"], exact(repeats)))


def judged(name: str, seconds: float, seed: int, options: dict[str, object]) -> tuple[list[str], str]:
    """One fit: its row, and its verdict in words."""
    posterior = SYNTHETIC[name]
    guide = AutoFlow(posterior.model(dist.ImproperUniform), seed=seed, **options)
    start = time.process_time()
    fit = fit_guide(guide, seconds=seconds, progress=False, fit_prior=posterior.is_prior)
    spent = time.process_time() - start
    torch.manual_seed(seed)
    truth = posterior.reference()
    wrong = [errors(named(fit.sample(10_000, resampled=again)), truth) for again in (False, True)]
    shown = " ".join(f"{key}={value}" for key, value in options.items()) or "default"
    pairs = [f"{mean:.3f} / {width:.3f}" for mean, width in wrong]
    if name == "funnel10":
        v = fit.sample(10_000)["v"]
        pairs.append(f"{v.mean() / 3:+.3f} / {v.std() / 3 - 1:+.3f}")
    else:
        right = (fit.sample(10_000)["x"].sum(-1) > 0).double().mean()
        pairs.append(f"share {right:.3f} of 0.7")
    row = [name, shown, f"{seconds:g}", str(seed), f"{fit.ess:.3f}", f"{fit.khat:.2f}", *pairs, f"{spent:.1f}"]
    words = textwrap.indent(str(fit.verdict), "    ")
    return [*row, fit.verdict.label], f"{name}, {shown}, {seconds:g} s, seed {seed}:\n{words}"


def verdicts(seconds: list[float], seeds: list[int]) -> None:
    cases: list[tuple[str, dict[str, object]]] = [
        ("funnel10", {}),
        ("two_modes4", {}),
        ("two_modes4", {"start": "prior"}),
        ("two_modes4", {"tempering": 0.05}),
    ]
    rows, words = [], []
    for name in ("funnel10", "two_modes4"):
        truth = SYNTHETIC[name].reference()
        order = torch.randperm(10_000, generator=torch.Generator().manual_seed(1))
        halves = [{k: v[part] for k, v in truth.items()} for part in order.chunk(2)]
        mean, width = errors(*halves)
        rows.append([name, "exact draws, 5,000 to 5,000", "", "", "", "", f"{mean:.3f} / {width:.3f}", *[""] * 4])
    for name, options in cases:
        for budget in seconds:
            for seed in seeds:
                row, said = judged(name, budget, seed, options)
                rows.append(row)
                words.append(said)
                print(f"{' '.join(row)}", flush=True)
    columns = "|options|s|seed|ESS|k-hat|mean / sd error|resampled|v: mean, sd; or the larger mode|CPU s|verdict"
    print("\n" + markdown(columns.split("|"), rows) + "\n")
    print("\n\n".join(words))


def main() -> None:
    args = command(
        __doc__,
        "budgets too small to mean anything",
        tables={"nargs": "+", "choices": ("variance", "verdict"), "default": ["variance", "verdict"]},
        seconds={"type": float, "nargs": "+", "default": [10], "help": "CPU seconds of each fit"},
        seeds={"type": int, "nargs": "+", "default": [0]},
    )
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    time.monotonic = time.process_time  # the clock of fit_guide; wall time would measure the machine's other users
    print(f"{machine()}; float64, one thread")
    if "variance" in args.tables:
        variance(args.smoke)
    if "verdict" in args.tables:
        verdicts([0.5] if args.smoke else args.seconds, args.seeds)


if __name__ == "__main__":
    main()
