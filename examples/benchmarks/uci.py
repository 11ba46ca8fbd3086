"""Densities of real data: every flow of the package, and zuko's, at equal budget, by held-out log-likelihood.

    python examples/benchmarks/uci.py FOLDER                       # all sets, all models, three seeds; about an hour
    python examples/benchmarks/uci.py FOLDER --sets wine_white     # one set; minutes
    python examples/benchmarks/uci.py FOLDER --rows 100 200 400 0  # fit_density as it is; 0 for all rows
    python examples/benchmarks/uci.py --smoke                      # synthetic data, seconds

FOLDER holds ``uci_small/*.npz`` (``x``, and ``split_test_rows`` where a split is published) and
``miniboone/miniboone.npz`` (``x_val``, ``x_test``).  Test rows are fixed: the first published split, or a tenth drawn
with seed 0; miniboone is trained on its validation part.  A tenth of the other rows is held out for early stopping, by
the seed, which also starts the model and orders the rows.  Columns are standardized by the training rows.  Columns of
few distinct values, which would let any density grow without bound, are dequantized: each value is spread evenly
towards its neighbors, by at most half the median gap.

All models go through ``fit_density`` with the same steps, batches and schedule, and are left in the state of their best
held-out score.  Scores are nats per row in standardized units, mean and standard deviation over seeds; times are CPU
seconds of training on one thread.  Runs are kept in ``--results``, so that a second call only fills in what is missing.
Needs the ``bench`` extra for zuko.

``--rows`` compares the defaults of ``fit_density`` instead: it is given that many of the rows that are not for testing,
and a flow, and nothing else but ``--seconds`` of CPU time.  Columns give the mean difference to the Gaussian of the
same rows (of full covariance, shrunk where rows are few), over the test rows, with its standard error.  Where rows are
few, the default is ``folds=5``.  ``from N(0, I)`` starts as independent normals, without folds.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _runs import alone, command, complete, machine, markdown, spread
from torch import Tensor, nn

import pyro_flows as pf
from pyro_flows.distributions import MixtureHead
from pyro_flows.infer.density.gaussian import fit_gaussian

SETS = ["power_plant", "kin8nm", "wine_white", "houses", "protein_tertiary_structure", "miniboone"]
Split = tuple[Tensor, Tensor, Tensor]


class Gaussian(nn.Module):
    """A full-covariance normal; its maximum likelihood needs no training."""

    def __init__(self, train: Tensor) -> None:
        super().__init__()
        covariance = torch.cov(train.double().T).reshape(train.shape[1], -1)
        self.normal = torch.distributions.MultivariateNormal(train.double().mean(0), covariance)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.normal.log_prob(value.double())


def made(dims: int, components: int = 0) -> pf.MADE:
    """A MADE of normals, or of mixtures, with networks as wide as those of ``maf``."""
    head = MixtureHead(components) if components else "normal"
    width = min(max(64, 4 * dims), 512)
    return pf.MADE(dims, head, hidden_dims=(width, width))


class Zuko(nn.Module):
    """A flow of zuko's as a module with ``log_prob``, with the sizes of ours."""

    def __init__(self, kind: str, dims: int, layers: int) -> None:
        super().__init__()
        import zuko

        width = min(max(64, 4 * dims), 512)
        self.flow = getattr(zuko.flows, kind)(dims, transforms=layers, hidden_features=(width, width))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.flow().log_prob(value)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "nice, not rescaled": lambda dims: pf.Flow(pf.nice(dims, rescale=False)),
    "nice": lambda dims: pf.Flow(pf.nice(dims)),
    "realnvp": lambda dims: pf.Flow(pf.realnvp(dims)),
    "maf": lambda dims: pf.Flow(pf.maf(dims)),
    "zuko MAF": lambda dims: Zuko("MAF", dims, 5),
    "maf, mixture base": lambda dims: pf.Flow(pf.maf(dims), base=pf.GaussianMixture(dims, 10)),
    "MADE": made,
    "MADE-MoG": lambda dims: made(dims, 10),
    "MAF-MoG": lambda dims: pf.Flow(pf.maf(dims), base=made(dims, 10)),
    "nsf, couplings": lambda dims: pf.Flow(pf.nsf(dims)),
    "nsf, autoregressive": lambda dims: pf.Flow(pf.nsf(dims, autoregressive=True)),
    "zuko NSF": lambda dims: Zuko("NSF", dims, 3),
}


def dequantized(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Spreads the values of columns that have few distinct ones."""
    x = x.copy()
    for column in x.T:
        values, index = np.unique(column, return_inverse=True)
        if len(values) > len(column) / 5:
            continue
        gaps = np.diff(values)
        half = np.minimum(gaps, np.median(gaps)) / 2
        below, above = np.append(half[:1], half), np.append(half, half[-1:])
        column += rng.random(len(column)) * (below + above)[index] - below[index]
    return x


def load(folder: Path | None, name: str, seed: int) -> Split:
    """Training, validation and test rows, standardized by the training rows."""
    rng = np.random.default_rng(0)
    if folder is None:
        x = rng.standard_normal((600, 3)) @ rng.standard_normal((3, 3)) + rng.standard_normal((600, 1)) ** 2
        rows, test = x[:500], x[500:]
    elif name == "miniboone":
        held = np.load(folder / "miniboone" / "miniboone.npz")
        rows, test = held["x_val"].astype(np.float64), held["x_test"].astype(np.float64)
    else:
        held = np.load(folder / "uci_small" / f"{name}.npz")
        x = dequantized(held["x"], rng)
        chosen = held["split_test_rows"][0] if "split_test_rows" in held else rng.permutation(len(x))[: len(x) // 10]
        is_test = np.zeros(len(x), dtype=bool)
        is_test[chosen] = True
        rows, test = x[~is_test], x[is_test]
    order = np.random.default_rng(seed + 1).permutation(len(rows))
    validation, train = rows[order[: len(rows) // 10]], rows[order[len(rows) // 10 :]]
    loc, scale = train.mean(0), train.std(0)
    return tuple(torch.tensor((part - loc) / scale, dtype=torch.float32) for part in (train, validation, test))


def run(folder: Path | None, name: str, model: str, seed: int, steps: int) -> dict[str, object]:
    """Trains one model on one set, in a process of its own."""
    alone()
    train, validation, test = load(folder, name, seed)
    torch.manual_seed(seed)
    start = time.process_time()
    if model == "Gaussian":
        flow: nn.Module = Gaussian(train)
    else:
        flow = MODELS[model](train.shape[1])
        # The default grows with the data; half of its largest keeps the steps of all sets alike.
        size = min(2 ** round(np.log2(max(len(train) / 32, 64))), 512)
        options = {"schedule": "cosine", "steps": steps, "patience": steps, "batch_size": size}
        pf.fit_density(flow, train, validation, progress=False, seed=seed, standardize=False, **options)
    spent = time.process_time() - start
    with torch.no_grad():
        scores = torch.cat([flow.log_prob(part) for part in test.split(2048)])
    return {
        "set": name,
        "model": model,
        "seed": seed,
        "steps": steps,
        "score": scores.double().mean().item(),
        "seconds": spent,
        "parameters": sum(p.numel() for p in flow.parameters()),
        "rows": [len(train), len(test), train.shape[1]],
    }


KINDS: dict[str, tuple[Callable[[int], nn.Module], dict[str, object]]] = {
    **{
        f"{name}{said}": (build, options)
        for name, build in (("maf", pf.maf), ("nsf", pf.nsf))
        for said, options in {
            "": {},
            ", folds=1": {"folds": 1},
            ", folds=5": {"folds": 5},
            ", from N(0, I)": {"folds": 1, "standardize": False},
        }.items()
    },
    "zuko MAF": (lambda dims: Zuko("MAF", dims, 5), {}),
    "zuko NSF": (lambda dims: Zuko("NSF", dims, 3), {}),
}


def compare(
    folder: Path | None, name: str, rows: int, model: str, seed: int, seconds: float | None, steps: int | None
) -> dict[str, object]:
    """Fits one model to some rows of one set, and scores it against the Gaussian of the same rows."""
    alone()
    time.monotonic = time.process_time  # seconds of CPU time
    train, validation, test = load(folder, name, 0)
    train = torch.cat([train, validation])
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    train = train[chosen[: rows or None]]
    loc, scale = train.mean(0), train.std(0)
    train, test = (train - loc) / scale, (test - loc) / scale
    gaussian = fit_gaussian(train.double()).log_prob(test.double())
    torch.manual_seed(seed)
    build, options = KINDS[model]
    limits = {name: value for name, value in (("seconds", seconds), ("steps", steps)) if value is not None}
    start = time.process_time()
    fit = pf.fit_density(build(train.shape[1]), train, progress=False, seed=seed, **options, **limits)
    spent = time.process_time() - start
    difference = fit.log_prob(test).double() - gaussian
    return {
        "set": name,
        "rows": rows,
        "model": model,
        "seed": seed,
        "seconds": seconds,
        "steps": steps,
        "gaussian": gaussian.mean().item(),
        "difference": difference.mean().item(),
        "error": difference.std().item() / len(difference) ** 0.5,
        "spent": spent,
        "members": max(len(fit.members), 1),
    }


def differences(runs: list[dict[str, object]]) -> str:
    """The differences to the Gaussian, a row for each set and number of rows, and their sums below."""
    models = list(dict.fromkeys(str(r["model"]) for r in runs))
    cells = {(r["set"], r["rows"]): r for r in runs}
    lines = []
    for (name, rows), first in cells.items():
        line = [str(name), str(rows or "all"), f"{first['gaussian']:.2f}"]
        for model in models:
            these = [r for r in runs if (r["set"], r["rows"], r["model"]) == (name, rows, model)]
            line.append("; ".join(f"{r['difference']:+.2f} ± {r['error']:.2f}, {r['spent']:.0f} s" for r in these))
        lines.append(line)
    below, mean = ["cells below -2 errors", "", ""], ["mean", "", ""]
    for model in models:
        these = [r for r in runs if r["model"] == model]
        # Fits that end as the Gaussian differ by rounding alone.
        below.append(f"{sum(r['difference'] < min(-2 * r['error'], -1e-4) for r in these)} of {len(these)}")
        mean.append(f"{statistics.mean(float(r['difference']) for r in these):+.2f}")
    return markdown(["set", "rows", "Gaussian", *models], [*lines, below, mean])


def table(runs: list[dict[str, object]], sets: list[str], models: list[str]) -> str:
    """Scores with their spread, and what they cost."""
    rows = []
    for model in models:
        row = [model]
        for name in sets:
            these = [r for r in runs if (r["set"], r["model"]) == (name, model)]
            if not these:
                row.append("")
                continue
            spent = statistics.mean(float(r["seconds"]) for r in these)
            cost = f"; {spent:.0f} s, {these[0]['parameters'] / 1000:.0f} k" if these[0]["parameters"] else ""
            row.append(spread([float(r["score"]) for r in these]) + cost)
        rows.append(row)
    sizes = {r["set"]: r["rows"] for r in runs}
    header = [f"{name} ({sizes[name][2]} columns, {sizes[name][0]} rows)" if name in sizes else name for name in sets]
    return markdown(["", *header], rows)


def main() -> None:
    args = command(
        __doc__,
        "synthetic data, a few steps",
        folder="where the data are",
        sets={"nargs": "+", "default": SETS},
        models={"nargs": "+", "help": "of those in the tables"},
        rows={"type": int, "nargs": "+", "help": "compares defaults on so many rows, 0 for all"},
        seconds={"type": float, "help": "CPU seconds of a fit with --rows"},
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2]},
        steps={"type": int, "default": 2000},
        jobs={"type": int, "default": 1, "help": "runs at a time"},
        results={"type": Path, "help": "JSON lines of runs, read and added to"},
    )
    args.models = args.models or [*KINDS] if args.rows else args.models or ["Gaussian", *MODELS]
    if args.smoke:
        args.folder, args.sets, args.seeds, args.steps = None, ["synthetic"], [0], 5
        args.models = [name for name in args.models if not name.startswith("zuko")]
        args.results = Path(tempfile.mkdtemp()) / "runs.jsonl"
        smoke = [compare(None, "synthetic", 100, model, 0, None, 5) for model in ("maf", "nsf, folds=1")]
        print(differences(smoke))
    if args.rows:
        limits = args.seconds, 5 if args.smoke else None
        cells = [(name, rows) for name in args.sets for rows in args.rows]
        wanted = [(*cell, model, seed, *limits) for cell in cells for seed in args.seeds for model in args.models]
        print(f"{machine()}; seeds {args.seeds}, float32, one thread a run\n")
        found = complete(
            functools.partial(compare, args.folder),
            wanted,
            lambda r: tuple(r[name] for name in ("set", "rows", "model", "seed", "seconds", "steps")),
            lambda r: f"{r['set']:<28}{r['rows']:>5}  {r['model']:<20}{r['difference']:+8.3f} ± {r['error']:.3f}",
            results=args.results or Path("uci_rows.jsonl"),
            jobs=args.jobs,
        )
        print("\n" + differences(found))
        return
    wanted = [(name, model, seed, args.steps) for name in args.sets for seed in args.seeds for model in args.models]
    print(f"{machine()}; {args.steps} steps, seeds {args.seeds}, float32, one thread a run\n")
    found = complete(
        functools.partial(run, args.folder),
        wanted,
        lambda r: (r["set"], r["model"], r["seed"], r["steps"]),
        lambda r: f"{r['set']:<28}{r['model']:<22}seed {r['seed']}  {r['score']:9.3f}  {r['seconds']:6.1f} s",
        results=args.results or Path("uci.jsonl"),
        jobs=args.jobs,
        fresh=not args.smoke,
    )
    print("\n" + table(found, args.sets, args.models))


if __name__ == "__main__":
    main()
