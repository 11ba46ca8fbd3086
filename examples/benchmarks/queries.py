"""What one asks of a fitted density: closed forms, the errors of estimates, and five seeds as one density.

    python examples/benchmarks/queries.py                      # closed forms and errors; some ten CPU minutes
    python examples/benchmarks/queries.py --parts errors       # one part
    python examples/benchmarks/queries.py FOLDER --parts seeds # five seeds against one; FOLDER as for uci.py
    python examples/benchmarks/queries.py --smoke              # tiny flows, seconds

``closed``: marginals and conditionals against the closed forms of a normal, against quadrature for the leading
dimensions of flows of one order, and against the sum over all values of a discrete MADE; float64.

``errors``: flows are fitted to rows of curved clusters in 2 to 8 dimensions, and to those of a power plant.  No
marginal of theirs has a closed form.  Each is asked for the density of 10 of its draws by 10 seeds, 100 cases in all.
The truth is quadrature over one or two dimensions, else a run of twenty times as many draws.  The table says in how
many cases the reported 95 % interval holds it, the effective draws of 1000, and how many estimates are trusted, that
is, rest on a hundred effective draws and more.  The same for the probabilities of a discrete MADE.

``seeds``: the held-out score of five flows of different seeds, and of their ``Ensemble``, in nats per row.
"""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import torch
from _runs import EXAMPLES, Table, command, machine, shaken
from torch import Tensor
from uci import load

import pyro_flows as pf
from pyro_flows.distributions import MADE, CategoricalHead, Ensemble

KINDS: dict[str, Callable[[int], pf.Chain]] = {
    "maf": pf.maf,
    "nsf": pf.nsf,
}


def curved(dim: int, count: int) -> Tensor:
    """Rows of two clusters, whose later columns follow the one before along a wave, with noise that grows outwards."""
    columns = [torch.where(torch.rand(count) < 0.4, -1.5, 1.5) + 0.5 * torch.randn(count)]
    for _ in range(1, dim):
        last = columns[-1]
        columns.append(1.2 * torch.sin(1.5 * last) + 0.3 * torch.randn(count) * (1 + 0.5 * last.abs()))
    return torch.stack(columns, -1)


def power_plant() -> Tensor:
    """Rows of the power plant, in double precision."""
    return torch.from_numpy(np.load(EXAMPLES / "data" / "power_plant.npz")["x"]).float()


# Closed forms


def gap(found: Tensor, true: Tensor) -> str:
    """The largest difference."""
    return f"{float((found - true).abs().max()):.1e}"


def normals(dim: int) -> list[tuple[str, str]]:
    """A normal by four affine layers."""
    layers = [pf.transforms.LULinear(dim, permutation="random"), pf.transforms.Rescaling(dim)]
    layers += [pf.transforms.Householder(dim), pf.transforms.ActNorm(dim)]
    flow = pf.Flow(shaken(pf.Chain(layers), 0.5 / dim**0.5)).eval()
    loc = flow.chain(torch.zeros(dim))
    matrix = (flow.chain(torch.eye(dim)) - loc).T
    cov, asked = matrix @ matrix.T, list(range(dim - 1, 0, -2))
    rest = [k for k in range(dim) if k not in asked]
    y = flow.sample((100,))
    some = dist.MultivariateNormal(loc[asked], cov[asked][:, asked])
    gain = cov[rest][:, asked] @ torch.linalg.inv(cov[asked][:, asked])
    mean = loc[rest] + (y[:, asked] - loc[asked]) @ gain.T
    others = dist.MultivariateNormal(mean, cov[rest][:, rest] - gain @ cov[asked][:, rest])
    return [
        (
            f"normal, {dim} dimensions: marginal",
            gap(flow().marginal(asked).log_prob(y[:, asked]), some.log_prob(y[:, asked])),
        ),
        (
            f"normal, {dim} dimensions: conditional",
            gap(flow().conditional(asked, y[:, asked]).log_prob(y[:, rest]), others.log_prob(y[:, rest])),
        ),
    ]


def ordered(name: str) -> tuple[str, str]:
    """The first two of three dimensions of a flow of one order, against quadrature over the third."""
    build = {
        "maf": lambda: pf.maf(3, order="identity", hidden_dims=(16,)),
        "iaf": lambda: pf.iaf(3, order="identity", hidden_dims=(16,)),
        "nsf, autoregressive": lambda: pf.nsf(3, autoregressive=True, order="identity", hidden_dims=(16,)),
    }[name]
    flow = pf.Flow(shaken(build(), 0.1))
    y = flow.sample((20,))
    grid = torch.sinh(torch.linspace(-8, 8, 100_001))
    true = []
    for row in y:
        whole = torch.cat((row[:2].expand(len(grid), -1), grid[:, None]), -1)
        true.append(torch.trapezoid(flow.log_prob(whole).exp(), grid).log())
    return f"{name}, one order: two leading of three", gap(
        flow().marginal((0, 1)).log_prob(y[:, :2]), torch.stack(true)
    )


def made(order: str) -> list[tuple[str, str]]:
    """Categories: marginals and conditionals against the sum over all values."""
    sizes = (2, 3, 4, 2, 3)
    model = shaken(
        MADE(5, CategoricalHead(sizes), hidden_dims=(32,), order=order, num_masks=4 if order == "any" else None), 0.7
    )
    model.eval()
    axes = [torch.arange(float(size)) for size in sizes]
    states = torch.cartesian_prod(*axes)
    asked = (1, 4)
    density = model()
    if order == "any":
        first = torch.tensor([k in asked for k in range(5)])
        density = model.at_members(tuple(model.member_for(first, k) for k in range(4)), None)
    whole = density.log_prob(states).exp().reshape(sizes)
    values = torch.cartesian_prod(axes[1], axes[4])
    marginal = model().marginal(asked)
    given = model().conditional(asked, values[4])
    some = whole[:, 1, :, :, 1] / whole[:, 1, :, :, 1].sum()
    others = torch.cartesian_prod(axes[0], axes[2], axes[3])
    return [
        (f"MADE, {order} order: marginal", gap(marginal.log_prob(values).exp(), whole.sum((0, 2, 3)).flatten())),
        (f"MADE, {order} order: conditional", gap(given.log_prob(others).exp(), some.flatten())),
    ]


def closed(smoke: bool) -> None:
    """Prints the largest errors of exact answers."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    table = Table("density and question", "largest error of log-densities (probabilities for MADE)")
    with torch.no_grad():
        for dim in (3, 6) if smoke else (3, 6, 40):
            for row in normals(dim):
                table.add(*row)
        for name in ("maf", "iaf", "nsf, autoregressive"):
            table.add(*ordered(name))
        for order in ("identity", "any"):
            for row in made(order):
                table.add(*row)
    torch.set_default_dtype(torch.float32)
    print(f"\n{table}\n")


# Errors


def truth(density: object, dims: Sequence[int], values: Tensor, num_samples: int) -> tuple[Tensor, str]:
    """The log-density of ``dims``, and how it was found."""
    size = density.event_shape[0]
    rest = [k for k in range(size) if k not in dims]
    if len(rest) > 2:
        return density.marginal(dims, num_samples=num_samples, seed=10**6).estimate(values).value, "long run"
    draws = density.sample((20_000,))[:, rest]
    low, high = draws.amin(0), draws.amax(0)
    axes = [
        torch.linspace(float(a - 0.5 * (b - a)), float(b + 0.5 * (b - a)), 4001 if len(rest) == 1 else 501)
        for a, b in zip(low, high, strict=True)
    ]
    plane = torch.cartesian_prod(*axes).reshape(-1, len(rest))
    cell = sum(math.log(float(axis[1] - axis[0])) for axis in axes)
    found = []
    for value in values:
        whole = torch.empty(len(plane), size)
        whole[:, rest], whole[:, list(dims)] = plane, value
        found.append(torch.cat([density.log_prob(part) for part in whole.split(2**16)]).logsumexp(0) + cell)
    return torch.stack(found), "quadrature"


def covered(density: object, dims: Sequence[int], args: dict[str, int]) -> list[str]:
    """Coverage, effective draws and times of one marginal."""
    values = density.sample((args["rows"],))[:, list(dims)]
    true, how = truth(density, dims, values, args["long"])
    inside, effective, errors, spent = [], [], [], 0.0
    for seed in range(args["seeds"]):
        begin = time.process_time()
        found = density.marginal(dims, seed=seed).estimate(values)
        spent += time.process_time() - begin
        inside.append((found.value - true).abs() <= 1.96 * found.error)
        effective.append(found.effective)
        errors.append(found.error)
    each, some = torch.cat(inside), torch.cat(effective)
    return [
        how,
        f"{int(each.sum())} of {len(each)}",
        f"{float(some.median()):.0f} ({float(some.min()):.0f})",
        f"{float(torch.cat(errors).median()):.3f}",
        f"{100 * float((some >= 100).double().mean()):.0f} %",
        f"{1000 * spent / len(inside):.0f}",
    ]


def discrete(args: dict[str, int]) -> list[list[str]]:
    """Probabilities of binary and categorical values that the order does not begin with, without summing over them."""
    from pyro_flows.distributions.made import pieces

    found, before = [], pieces.STATES
    for dim, dims in ((6, (3, 5)), (10, (9,))):
        model = shaken(MADE(dim, CategoricalHead([2 + k % 2 for k in range(dim)]), hidden_dims=(32,)), 0.7).eval()
        density = model()
        values = density.sample((args["rows"],))[:, list(dims)]
        pieces.STATES = 2**20  # the truth: a sum
        true = density.marginal(dims).log_prob(values)
        pieces.STATES = 0
        inside, effective, errors = [], [], []
        for seed in range(args["seeds"]):
            each = density.marginal(dims, seed=seed).estimate(values)
            inside.append((each.value - true).abs() <= 1.96 * each.error)
            effective.append(each.effective)
            errors.append(each.error)
        hits, some = torch.cat(inside), torch.cat(effective)
        found.append(
            [
                f"MADE of categories, {dim}",
                str(dims),
                "sum",
                f"{int(hits.sum())} of {len(hits)}",
                f"{float(some.median()):.0f} ({float(some.min()):.0f})",
                f"{float(torch.cat(errors).median()):.3f}",
                f"{100 * float((some >= 100).double().mean()):.0f} %",
                "",
            ]
        )
        pieces.STATES = before
    return found


def errors(smoke: bool, seconds: float, cells: Sequence[str] | None) -> None:
    """Prints how honest the errors of estimates are."""
    args = {"rows": 2, "seeds": 2, "long": 2000} if smoke else {"rows": 10, "seeds": 10, "long": 20_000}
    asked = {
        "curved, 2": [(1,)],
        "curved, 4": [(3,), (1, 3)],
        "curved, 8": [(7,), (0, 2, 4, 6)],
        "power plant, 5": [(4,), (0, 1, 2)],
    }
    asked = {name: questions for name, questions in asked.items() if not cells or name in cells}
    table = Table(
        "flow",
        "rows, columns",
        "asked for",
        "truth",
        "95 % interval holds it",
        "effective draws: median (least)",
        "median error, nats",
        "trusted",
        "ms for 10 values",
    )
    hits, cases = 0, 0
    for kind, build in list(KINDS.items())[: 1 if smoke else None]:
        for name, questions in list(asked.items())[: 1 if smoke else None]:
            torch.manual_seed(0)
            dim = int(name.split(", ")[1])
            rows = power_plant() if name.startswith("power") else curved(dim, 4000)
            budget = {"steps": 20} if smoke else {"seconds": seconds}
            fit = pf.fit_density(pf.Flow(build(dim)), rows, progress=False, **budget)
            density = fit.distribution.double()()
            torch.set_default_dtype(torch.float64)
            for dims in questions:
                with torch.no_grad():
                    row = covered(density, dims, args)
                table.add(kind, name, str(dims), *row)
                hits, cases = hits + int(row[1].split()[0]), cases + int(row[1].split()[-1])
            torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for row in discrete(args):
            table.add(*row[:1], "values", *row[1:])
    print(f"\n{table}\n\nFlows in all: {hits} of {cases} intervals of 95 % hold the truth.\n")


# Seeds


def seeds(folder: Path | None, sets: Sequence[str], seconds: float, smoke: bool) -> None:
    """Prints the scores of single flows and of their mean density on test rows."""
    table = Table("set", "rows", "one flow: mean (worst, best) of five", "five as one", "gain over their mean ± s.e.")
    for name in sets:
        train, validation, test = load(folder, name, 0)
        fits = []
        for seed in range(2 if smoke else 5):
            torch.manual_seed(seed)
            budget = {"steps": 20} if smoke else {"seconds": seconds}
            flow = pf.Flow(pf.nsf(train.shape[1]))
            fits.append(pf.fit_density(flow, train, validation, progress=False, seed=seed, **budget))
        with torch.no_grad():
            each = torch.stack([fit.log_prob(test) for fit in fits]).double()
            whole = Ensemble(fits).log_prob(test).double()
        gain = whole - each.mean(0)
        means = each.mean(1)
        table.add(
            name,
            str(len(train)),
            f"{means.mean():.3f} ({means.min():.3f}, {means.max():.3f})",
            f"{whole.mean():.3f}",
            f"{gain.mean():.3f} ± {gain.std() / len(gain) ** 0.5:.3f}",
        )
    print(f"\n{table}\n")


def main() -> None:
    args = command(
        __doc__,
        "tiny flows, seconds",
        folder="where the data are, for --parts seeds",
        instead="parts",
        parts={"nargs": "+", "default": ["closed", "errors"], "choices": ["closed", "errors", "seeds"]},
        sets={"nargs": "+", "default": ["concrete", "wine_white"]},
        cells={"nargs": "+", "help": "rows of the table of errors, such as 'curved, 8'"},
        seconds={"type": float, "default": 5.0, "help": "of training, each flow; CPU seconds"},
    )
    time.monotonic = time.process_time  # budgets are CPU seconds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{machine()}; one thread, {args.seconds:g} CPU seconds of training each\n")
    if args.smoke:
        args.parts, args.sets, args.folder = ["closed", "errors", "seeds"], ["synthetic"], None
    if "closed" in args.parts:
        closed(args.smoke)
    if "errors" in args.parts:
        errors(args.smoke, args.seconds, args.cells)
    if "seeds" in args.parts:
        seeds(args.folder, args.sets, args.seconds, args.smoke)


if __name__ == "__main__":
    main()
