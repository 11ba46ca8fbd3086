"""How often the verdict on a density finds a difference: of exact densities, which have none, and of misfits.

    python examples/benchmarks/density_verdict.py             # 100 data sets of each exact density, 25 of each misfit
    python examples/benchmarks/density_verdict.py --smoke     # two data sets of each

Rows of an exact density are its own draws, so that any difference found is false: at most 5 % should be.  Misfits are
the same draws, changed: the density is too narrow, lacks a mode, and so on.  Cells are the share of data sets with a
corrected p-value below 0.05 of all tests together, by the number of rows.  The last line has flows trained on as many
rows until they overfit, and judged by 1000 fresh rows: the share with the label overfitted, worse than a Gaussian, or
misfit.
"""

import math
import time
from argparse import Namespace
from collections.abc import Callable

import torch
from _runs import Table, command, machine, shaken
from torch import Tensor, nn

import pyro_flows as pf
from pyro_flows.distributions import CategoricalHead, MixedHead
from pyro_flows.infer.density.judging import judge_rows

ROWS = (100, 400, 2000)
Change = Callable[[Tensor], Tensor]


def flow(columns: int = 3, context_dim: int = 0, base: nn.Module | None = None, scale: float = 0.3) -> nn.Module:
    """A flow with random parameters; kurtosis is about 10 at a scale of 0.3, and 3.4 at 0.05."""
    chain = pf.maf(columns, context_dim=context_dim, num_layers=2, hidden_dims=(16,))
    return pf.Flow(shaken(chain, scale), base).eval()


def mixed() -> nn.Module:
    """A MADE of a binary, a categorical and two real columns."""
    head = MixedHead([("bernoulli", [0]), (CategoricalHead(4), [1]), ("normal", [2, 3])])
    return shaken(pf.MADE(4, head, hidden_dims=(16,)), 0.3).eval()


EXACT: dict[str, Callable[[], nn.Module]] = {
    "flow, 3 columns": flow,
    "flow, 3 columns, context of 2": lambda: flow(context_dim=2),
    "flow, 12 columns": lambda: flow(12),
    "flow, Student-t base": lambda: flow(base=pf.StudentT(3, df=2.5)),
    "MADE, binary, 4 categories, 2 real": mixed,
}


def centered(change: Change) -> Change:
    """Applies a change to columns with mean 0 and standard deviation 1."""

    def run(x: Tensor) -> Tensor:
        loc, scale = x.median(0).values, x.std(0)
        return loc + scale * change((x - loc) / scale)

    return run


def other_mode(x: Tensor) -> Tensor:
    """Moves 5 % of the rows by 5 standard deviations."""
    return x + 5.0 * (torch.rand(len(x), 1) < 0.05)


def correlated(x: Tensor) -> Tensor:
    """Adds a part of the first column to the second, at the same spread."""
    return torch.cat([x[:, :1], 0.25 * x[:, :1] + math.sqrt(1 - 0.25**2) * x[:, 1:2], x[:, 2:]], 1)


def heavy(x: Tensor) -> Tensor:
    """Divides rows by the root of a mean chi-square, which makes Student-t tails of five degrees of freedom."""
    return x * math.sqrt(3 / 5) / (torch.distributions.Chi2(5.0).sample((len(x), 1)) / 5).sqrt()


def outliers(x: Tensor) -> Tensor:
    """Puts 1 % of the rows, and one at least, eight times as far out."""
    chosen = torch.rand(len(x), 1) < 0.01
    chosen[0] = True
    return torch.where(chosen, 8.0 * x.sign() * x.abs().clamp(min=0.5), x)


MISFITS: dict[str, Change] = {
    "too narrow: rows spread 15 % wider": lambda x: 1.15 * x,
    "a lost mode with 5 % of the rows": other_mode,
    "a correlation off by 0.25": correlated,
    "heavy tails: rows are Student-t(5)": heavy,
    "a column shifted by 0.2 standard deviations": lambda x: x + torch.tensor([0.2, 0.0, 0.0]),
    "1 % outliers": outliers,
}


def judged(model: nn.Module, count: int, change: Change | None = None, lean: float = 0.0) -> bool:
    """Whether the verdict on fresh rows finds a difference.

    ``lean`` shifts rows by the sign of their context, in standard deviations.
    """
    drawn = []
    for rows in (count, 1000):
        context = torch.randn(rows, model.context_dim) if model.context_dim else None
        x = model.sample((rows,)) if context is None else model.sample((), context)
        if lean:
            x = x + lean * x.std(0) * context[:, :1].sign()
        drawn += [x if change is None else centered(change)(x), context]
    found = judge_rows(model, *drawn[:2], training=drawn[2], training_context=drawn[3], seconds=60.0)
    return found.numbers["pvalue"] < 0.05


def overfitted(count: int) -> bool:
    """Judges a flow that was trained on so many correlated normals until it overfits."""
    x = torch.randn(count + 1000, 6) @ (torch.eye(6) + 0.5 * torch.ones(6, 6))
    options = {"steps": 800, "lr": 5e-3, "average": 0.0, "validation_fraction": 0, "patience": 800}
    fit = pf.fit_density(pf.maf(6, hidden_dims=(64, 64)), x[:count], progress=False, compile=False, **options)
    found = fit.judge(x[count:], seconds=60.0)
    return found.label in ("good, overfitted", "worse than a Gaussian", "misfit")


def shares(run: Callable[[int, int], bool], repeats: int) -> list[str]:
    """Percentages of data sets, for each number of rows."""
    return [f"{sum(run(rows, k) for k in range(repeats)) / repeats:.0%}" for rows in ROWS]


def main(args: Namespace) -> None:
    """Prints both tables."""
    torch.set_num_threads(1)
    begin = time.process_time()
    heads = ["", *(f"{rows} rows" for rows in ROWS)]

    def of(make: Callable[[], nn.Module], **options: object) -> Callable[[int, int], bool]:
        def run(rows: int, k: int) -> bool:
            torch.manual_seed(args.seed + 1000 * k)
            return judged(make(), rows, **options)

        return run

    def trained(rows: int, k: int) -> bool:
        torch.manual_seed(args.seed + 1000 * k)
        return overfitted(rows)

    exact = 2 if args.smoke else args.exact
    some = 2 if args.smoke else args.misfits
    print(f"{machine()}; {exact} data sets of each exact density, {some} of each misfit, seed {args.seed}\n")
    first, second = Table(*heads), Table(*heads)
    for name, make in EXACT.items():
        first.add(name, *shares(of(make), exact))
    for name, change in MISFITS.items():
        second.add(name, *shares(of(lambda: flow(scale=0.05), change=change), some))
    leaning = shares(of(lambda: flow(context_dim=1, scale=0.05), lean=0.25), some)
    second.add("a wrong dependence on the context: ± 0.25 standard deviations by its sign", *leaning)
    second.add("trained until it overfits", *shares(trained, max(some // 5, 1)))
    print(f"\n{first}\n\n{second}\n\n{time.process_time() - begin:.0f} CPU seconds")


if __name__ == "__main__":
    numbers = {"type": int}
    main(
        command(
            __doc__,
            "two data sets of each",
            seed={**numbers, "default": 0},
            exact={**numbers, "default": 100, "help": "data sets of each exact density"},
            misfits={**numbers, "default": 25, "help": "data sets of each misfit"},
        )
    )
