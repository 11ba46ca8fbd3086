"""Posteriors with kinks, heavy tails and steep sides: ``fit_guide`` with the splines of its start, and without them.

    python examples/benchmarks/tails.py                           # 14 kinds, three seeds, 10 CPU seconds; 14 minutes
    python examples/benchmarks/tails.py --names laplace20         # one of them
    python examples/benchmarks/tails.py --ordinary FOLDER         # those of posteriordb, which splines must not harm
    python examples/benchmarks/tails.py --smoke                   # one kind, a budget too small to count

Each run has a process of its own, one thread, and a budget of CPU seconds after import.  ESS is the fraction of the
draws that count under the importance weights.  Errors are the largest of any mean and of any standard deviation, in the
standard deviations of 20,000 draws of the posterior: exact ones, or for the regressions the ends of 4,000 Gibbs chains.
They are those of ``asinh`` of latents whose tails have no moments.
FOLDER is laid out as posteriordb's ``posterior_database``.
"""

import functools
import importlib
import statistics
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from _made_posteriors import MADE, asinh
from _posteriors import Draws, Flat, Posterior, find, named, stored
from _runs import Row, command, complete, machine, markdown
from posteriors import ours
from torch import Tensor

COUNT, CHAINS, SWEEPS = 20_000, 4_000, 100
DRAWS = 40_000
WITH, WITHOUT = "with", "without"


def _numbers(low: float, high: float, count: int) -> Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def independent(parts: dict[str, dist.Distribution]) -> None:
    """Latents without data."""
    for name, prior in parts.items():
        pyro.sample(name, prior.to_event(prior.batch_shape.__len__()))


def _independent(name: str, far: bool = False, **parts: dist.Distribution) -> Posterior:
    """Independent latents; ``far`` tails are compared by ``asinh``, in units of the density."""

    def derive(draws: Draws) -> Draws:
        if not far:
            return draws
        units = {key: (getattr(prior, "loc", 0.0), getattr(prior, "scale", 1.0)) for key, prior in parts.items()}
        return {key: ((draws[key] - loc) / scale).asinh() for key, (loc, scale) in units.items()}

    def reference() -> Draws:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return named(derive({key: prior.sample((COUNT,)) for key, prior in parts.items()}))

    return Posterior(name, lambda flat: functools.partial(independent, parts), reference, derive, is_prior=True)


def regression(flat: Flat, prior: dist.Distribution, x: Tensor, y: Tensor, noise: float) -> None:
    """A linear regression with a prior that has a kink or a heavy tail."""
    b = pyro.sample("b", prior.to_event(1))
    pyro.sample("y", dist.Normal((x * b.unsqueeze(-2)).sum(-1), noise).to_event(1), obs=y)


def _regression(name: str, prior: dist.Distribution, rows: int, noise: float) -> Posterior:
    """Fewer rows than coefficients, a quarter of which are not zero; predictors are correlated."""
    count = prior.batch_shape[0]
    x = _normal(rows, count, seed=0) + 0.5 * _normal(rows, 1, seed=1)
    b = 2.0 * (torch.arange(count) < count / 4)
    y = x @ b.double() + noise * _normal(rows, seed=2)
    derive = asinh if isinstance(prior, dist.StudentT) else dict

    def variance(b: Tensor) -> Tensor:
        """Draws the variances of which the prior is a mixture of normals."""
        if isinstance(prior, dist.StudentT):
            half = 0.5 * (prior.df * prior.scale.square() + b.square())
            return half / torch._standard_gamma((0.5 * (prior.df + 1)).expand_as(b))
        # Their reciprocals are inverse Gaussian, drawn as Michael, Schucany and Haas do.
        mean, shape = 1 / (prior.scale * b.abs()).clamp(min=1e-12), prior.scale.square().reciprocal()
        part = mean * torch.randn_like(b).square() / (2 * shape)
        least = mean * (1 + part - (part * (part + 2)).sqrt()).clamp(min=1e-15)
        return torch.where(torch.rand_like(b) * (mean + least) < mean, least, mean.square() / least).reciprocal()

    def reference() -> Draws:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            kept, chain = [], torch.randn(CHAINS, count, dtype=torch.float64)
            for sweep in range(SWEEPS):
                precision = x.mT @ x / noise**2 + torch.diag_embed(1 / variance(chain))
                root = torch.linalg.cholesky(precision)
                mean = torch.cholesky_solve((x.mT @ y / noise**2).expand(CHAINS, -1).unsqueeze(-1), root)
                turned = torch.linalg.solve_triangular(root.mT, torch.randn_like(mean), upper=True)
                chain = (mean + turned).squeeze(-1)
                if sweep >= SWEEPS // 2 and sweep % 10 == 9:
                    kept.append(chain)
            return named(derive({"b": torch.cat(kept)}))

    model = functools.partial(regression, prior=prior, x=x, y=y, noise=noise)
    return Posterior(name, lambda flat: functools.partial(model, flat), reference, derive)


def _kinds() -> dict[str, Posterior]:
    one, zero = _numbers(1, 1, 10), _numbers(0, 0, 20)
    concentration = torch.tensor([0.05, 2.0, 0.4, 10.0, 0.1, 0.1, 0.8, 3.0, 0.3, 0.05, 1.0, 0.2], dtype=torch.float64)
    kinds = [
        _independent("laplace20", x=dist.Laplace(zero, 1.0)),
        _independent("laplace50", x=dist.Laplace(_numbers(-30, 50, 50), _numbers(-2, 2, 50).exp())),
        _independent("student10", True, x=dist.StudentT(2.0, 0.0 * one, one)),
        _independent("student30", True, x=dist.StudentT(2.0, _numbers(-5, 5, 30), _numbers(-2, 2, 30).exp())),
        _independent("cauchy20", True, x=dist.Cauchy(zero + 3.0, zero + 2.0)),
        _independent("half_cauchy10", True, x=dist.HalfCauchy(one)),
        _independent("dirichlet6", x=dist.Dirichlet(torch.tensor([0.1, 0.3, 1.0, 5.0, 0.2, 0.5]).double())),
        _independent("dirichlet12", x=dist.Dirichlet(concentration)),
        _independent("gamma10", x=dist.Gamma(_numbers(0.1, 1.0, 10), one)),
        _independent("beta10", x=dist.Beta(_numbers(0.1, 1.0, 10), 0.3 * one)),
        _independent(
            "mixed20",
            True,
            a=dist.Normal(zero[:6], 2.0),
            b=dist.Laplace(zero[:6] + 1.0, 0.5),
            c=dist.StudentT(2.0, zero[:4], 1.0),
            d=dist.Gamma(zero[:4] + 0.3, 1.0),
        ),
        _regression("laplace_regression20", dist.Laplace(zero, zero + 0.5), 8, 3.0),
        _regression("student_regression20", dist.StudentT(zero + 2.0, zero, zero + 0.5), 8, 3.0),
        _independent("normal20", x=dist.Normal(zero, 1.0)),
    ]
    return {each.name: each for each in kinds}


KINDS = _kinds()


def run(name: str, method: str, seed: int, seconds: float, *, folder: Path | None, draws: int) -> Row:
    """One run in a process of its own."""
    time.monotonic = time.process_time  # as in posteriors.py
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    conditionals = importlib.import_module("pyro_flows.infer.search.conditionals")
    if method == WITHOUT:
        conditionals.conditional_knots = lambda *args: None
    posterior = KINDS.get(name) or MADE.get(name) or find(name, folder)
    about = {"name": name, "method": method, "seed": seed, "seconds": seconds}
    return about | ours(posterior, seed, seconds, draws, 0.0)


def arguments() -> Namespace:
    args = command(
        __doc__,
        "one kind, a second each",
        names={"nargs": "+", "help": "kinds, or made posteriors; by default all of this script"},
        ordinary={"type": Path, "metavar": "FOLDER", "help": "posteriordb's posterior_database"},
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2]},
        seconds={"type": float, "default": 10, "help": "CPU seconds of fit_guide"},
        methods={"nargs": "+", "choices": (WITHOUT, WITH), "default": [WITHOUT, WITH]},
        jobs={"type": int, "default": 1, "help": "runs at a time"},
        results={"type": Path, "help": "JSON lines of runs, read and added to"},
    )
    if args.smoke:
        args.names, args.seeds, args.seconds = ["laplace20"], [0], 1.0
        args.results = Path(tempfile.mkdtemp()) / "runs.jsonl"
    return args


def _each(rows: list[Row], value: Callable[[Row], str]) -> str:
    """Without and with splines."""
    return " → ".join(
        value([row for row in rows if row["method"] == m]) for m in dict.fromkeys(r["method"] for r in rows)
    )


def _middle(value: Callable[[Row], float], form: str) -> Callable[[list[Row]], str]:
    """Median, and the least and the greatest of several."""

    def text(rows: list[Row]) -> str:
        numbers = [value(row) for row in rows]
        ends = f" ({min(numbers):{form}}-{max(numbers):{form}})" if len(numbers) > 1 else ""
        return f"{statistics.median(numbers):{form}}{ends}"

    return text


def table(rows: list[Row]) -> str:
    """One line for each posterior: medians over seeds, without splines and with them."""
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        these = [row for row in rows if row["name"] == name]
        lines.append(
            [
                str(name),
                str(these[0]["dim"]),
                _each(these, _middle(lambda row: row["ess"], ".3f")),
                _each(these, _middle(lambda row: row["errors"][0], ".3f")),
                _each(these, _middle(lambda row: row["errors"][1], ".3f")),
                _each(these, lambda several: "; ".join(dict.fromkeys(str(row["verdict"]) for row in several))),
                _each(these, _middle(lambda row: row["cpu"], ".1f")),
            ]
        )
    return markdown(["", "D", "ESS", "mean error", "sd error", "verdict", "CPU s"], lines)


def said(row: Row) -> str:
    """The line of one run."""
    (mean, width), ess = row["errors"], row["ess"]
    about = f"{row['name']:<42}{row['method']:<9}seed {row['seed']}  "
    return about + f"ESS {ess:.3f}  errors {mean:.3f} {width:.3f}  {row['verdict']}  {row['cpu']:.1f} s"


def main() -> None:
    args = arguments()
    print(f"{machine()}; float64, one thread a run, CPU seconds\n")
    names = args.names or (list(KINDS) if args.ordinary is None else stored(args.ordinary))
    rows = complete(
        functools.partial(run, folder=args.ordinary, draws=2000 if args.smoke else DRAWS),
        [(name, method, seed, args.seconds) for name in names for method in args.methods for seed in args.seeds],
        lambda row: (row["name"], row["method"], row["seed"], row["seconds"]),
        said,
        results=args.results,
        jobs=args.jobs,
        fresh=True,
    )
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
