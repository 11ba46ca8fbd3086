"""Posteriors with reference draws: ``fit_guide``, Pyro's guides and Pyro's NUTS, by what they get wrong and by cost.

    python examples/benchmarks/posteriors.py FOLDER                    # fit_guide on all, three seeds; ten minutes
    python examples/benchmarks/posteriors.py FOLDER --peers --nuts     # beside Pyro's guides and NUTS; about an hour
    python examples/benchmarks/posteriors.py FOLDER --nuts --jax PYTHON  # beside NumPyro's NUTS, by that interpreter
    python examples/benchmarks/posteriors.py FOLDER --names sblrc-blr  # one posterior
    python examples/benchmarks/posteriors.py --made --refine 30        # made ones, on which guides fail; an hour
    python examples/benchmarks/posteriors.py --made curved --refine 30 --nuts-seconds 40  # one kind, beside NUTS
    python examples/benchmarks/posteriors.py --smoke                   # synthetic ones, budgets too small to count

FOLDER is laid out as posteriordb's ``posterior_database``; all its posteriors are run whose Stan program is written in
Pyro in ``_posteriors.py`` and that have reference draws.  A funnel and a banana with exact draws come with the script.
Made posteriors are those of ``_made_posteriors.py``.

Each run has a process of its own, one thread, float64, and a budget of CPU seconds after import.  ``fit_guide`` has
nothing but the model, the seconds and a seed.  Pyro's guides are trained by Adam with 16 vectorized particles, a step
size that falls from 0.01 to 0.001, and nothing else; NUTS has 500 warm-up steps, 1000 draws and no limit, and so has
NumPyro's, whose effective draws a second are told of a first run, which compiles, and of a second one, and whose
gradients are those after warm-up.

Errors are the largest of any mean and of any standard deviation, in the reference's standard deviations, of 10,000
draws; the reference has 10,000 too, so an error of 0.02 or so is its noise, and for the wide part of the funnel, whose
standard deviation hangs on a few draws, far more.  *Resampled* are 10,000 draws of 40,000 by their smoothed importance
weights, drawn after the budget.  *Right* are runs whose means are all within 0.1 of a standard deviation and whose
standard deviations within a tenth, resampled where the verdict says so; *refined*, with ``--refine``, are the draws of
``fit.refine`` after so many seconds more.  ESS is the fraction of the draws that count under the importance weights;
for NUTS the smallest effective sample size of a scalar, by the draws.  Gradients are counted for each draw: one
evaluation of the model's log-density with its gradient; evaluations without a gradient, such as those of the verdict,
come on top, after the plus.  Runs are kept in ``--results``, so that a second call only fills in what is missing.
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

import pyro.distributions as dist
import torch
from _made_posteriors import MADE
from _posterior_peers import NUMPYRO, NUTS, PEERS, numpyro_nuts, nuts, nuts_within, peer
from _posteriors import Posterior, errors, find, named, right, stored
from _runs import Row, command, complete, machine, markdown
from torch import Tensor

OURS = "fit_guide"
KINDS = tuple(dict.fromkeys(posterior.kind for posterior in MADE.values()))
DRAWS, JUDGED = 40_000, 10_000
ESS, ERROR = 0.9, 0.05  # what fit_guide is held to


def product_rate() -> float:
    """Thousands of millions of floating-point operations per CPU second, in products of 512 x 512 float64 matrices."""
    a = torch.randn(512, 512, dtype=torch.float64)
    a @ a
    start = time.process_time()
    for _ in range(20):
        a @ a
    return 20 * 2 * 512**3 / (time.process_time() - start) / 1e9


def ours(posterior: Posterior, seed: int, seconds: float, draws: int, refine: float) -> Row:
    """``fit_guide`` as it is, and ``refine`` for some seconds more."""
    from pyro_flows.infer import AutoFlow, fit_guide
    from pyro_flows.infer.models.joint import JointDensity

    # Counts the evaluations of start, training and verdict, with and without a gradient.
    count = {True: 0, False: 0}
    value, both = JointDensity.__call__, JointDensity.value_and_slope

    def values(density: JointDensity, z: Tensor) -> Tensor:
        count[z.requires_grad and torch.is_grad_enabled()] += len(z)
        return value(density, z)

    def gradients(density: JointDensity, z: Tensor) -> tuple[Tensor, Tensor]:
        before = dict(count)
        found = both(density, z)
        count.update(before | {True: before[True] + len(z)})  # what it asks of itself is not counted
        return found

    JointDensity.__call__, JointDensity.value_and_slope = values, gradients
    start = time.process_time()
    guide = AutoFlow(posterior.model(dist.ImproperUniform), seed=seed)
    fit = fit_guide(guide, seconds=seconds, progress=False, fit_prior=posterior.is_prior)
    spent = time.process_time() - start
    found = {"gradients": count[True], "evaluations": count[False], "cpu": spent, "steps": len(fit.history)}
    reference = posterior.reference()

    def wrong(resampled: bool) -> tuple[float, float]:
        return errors(named(posterior.derive(fit.sample(draws, resampled=resampled))), reference)

    torch.manual_seed(seed)
    found |= {"errors": wrong(False), "resampled": wrong(True)}
    if refine:
        start = time.process_time()
        refined = fit.refine(seconds=refine, progress=False)
        found["refined_cpu"] = time.process_time() - start
        found["refined"] = errors(named(posterior.derive(refined.sample(draws))), reference)
        found |= {"refined_verdict": refined.verdict.label, "refined_ok": refined.verdict.ok}
        found["refined_ess"] = refined.chains.effective
    return found | {
        "dim": fit.latents.dim,
        "ess": fit.ess,
        "khat": fit.khat,
        "verdict": fit.verdict.label,
        "ok": fit.verdict.ok,
        "elbo": fit.importance.elbo,
        "log_evidence": fit.log_evidence,
        "notes": list(fit.notes),
    }


def run(
    name: str,
    method: str,
    seed: int,
    seconds: float,
    refine: float,
    *,
    folder: Path | None,
    draws: int,
    jax: Path | None = None,
) -> Row:
    """One run in a process of its own."""
    # fit_guide keeps its budget by time.monotonic(). On a machine that others use, wall time would measure them as
    # well; with one thread CPU time is the same thing without them.
    time.monotonic = time.process_time
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    importlib.import_module("pyro_flows.infer")
    if method != OURS:
        importlib.import_module("torch._dynamo")  # which else the first optimizer does
    rate = product_rate()
    about = {"name": name, "method": method, "seed": seed, "seconds": seconds, "refine": refine, "gflops": rate}
    try:
        posterior = MADE[name] if name in MADE else find(name, folder)
        about["kind"] = posterior.kind
        if method == OURS:
            return about | ours(posterior, seed, seconds, draws, refine)
        if method == NUTS and seconds:
            return about | nuts_within(posterior, seed, seconds)
        if method == NUTS:
            return about | nuts(posterior, seed, 1000 if draws == DRAWS else 10)
        if method == NUMPYRO:
            return about | numpyro_nuts(posterior, seed, 1000 if draws == DRAWS else 10, jax)
        return about | peer(method, posterior, seed, seconds, draws)
    except Exception as error:  # a peer that cannot run a posterior is a result, too
        if method == OURS:
            raise
        return about | {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}


def _cell(rows: list[Row], value: Callable[[Row], float], form: str) -> str:
    """Median, and the range if there are several."""
    numbers = [value(row) for row in rows]
    middle = statistics.median(numbers)
    text = format(middle, form)
    return text if len(numbers) == 1 else f"{text} ({format(min(numbers), form)} to {format(max(numbers), form)})"


def _pair(rows: list[Row], key: str) -> str:
    if key not in rows[0]:
        return "-"
    first, second = (statistics.median(row[key][k] for row in rows) for k in (0, 1))
    worst = [max(row[key][k] for row in rows) for k in (0, 1)]
    text = f"{first:.3f} / {second:.3f}"
    return text if len(rows) == 1 else f"{text} (worst {worst[0]:.3f} / {worst[1]:.3f})"


def passes(row: Row) -> bool:
    """Whether a run's draws are right, resampled where the verdict says so."""
    return right(row["resampled" if row["verdict"] == "use importance resampling" else "errors"])


def _counted(words: list[str]) -> str:
    """Each label, with its number if there are several runs."""
    return "; ".join(f"{words.count(w)} {w}" if len(words) > 1 else w for w in dict.fromkeys(words))


def _per_second(row: Row) -> float:
    """Effective draws of a CPU second: of a chain, or of 10,000 draws of a guide."""
    return float(row["ess"]) * (row["steps"] if row["method"] in (NUTS, NUMPYRO) else JUDGED) / float(row["cpu"])


def _warm_per_second(row: Row) -> float:
    return _per_second(row) * float(row["cpu"]) / float(row["warm"])


def _refined(rows: list[Row]) -> list[str]:
    """What ``refine`` made of the runs."""
    return [
        _pair(rows, "refined"),
        f"{sum(right(row['refined']) for row in rows)} of {len(rows)}",
        _counted([str(row["refined_verdict"]) for row in rows]),
        _cell(rows, lambda row: float(row["refined_cpu"]), ".1f"),
        _cell(rows, lambda row: float(row["refined_ess"]) / float(row["refined_cpu"]), ".0f"),
    ]


def summary(rows: list[Row]) -> str:
    """By kind: right results, silent failures, false alarms, and the same of refined ones."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        if row["method"] == OURS and "error" not in row:
            kinds.setdefault(str(row["kind"]), []).append(row)
    lines = []
    for kind, these in [*kinds.items(), ("all", [row for each in kinds.values() for row in each])]:
        pairs = [[(passes(row), bool(row["ok"])) for row in these]]
        if these and these[0].get("refine"):
            pairs.append([(right(row["refined"]), bool(row["refined_ok"])) for row in these])
        cells = [kind, str(len(these))]
        for each in pairs:
            cells += [str(sum(fine for fine, _ in each)), *(str(each.count(p)) for p in ((False, True), (True, False)))]
        lines.append(cells)
    three = ["right", "wrong and ok", "right and not ok"]
    return markdown(["kind", "runs", *three, *[f"refined {w}" for w in three if len(lines[-1]) > 5]], lines)


def table(rows: list[Row]) -> str:
    """One line for each posterior, method and budget: medians over seeds, with their range."""
    columns = "D|method, s|right|ESS|k-hat|mean / sd error|resampled|verdict|gradients|CPU s|effective draws/s"
    refining = any(row.get("refine") for row in rows)
    if refining:
        columns += "|refined|right|verdict|CPU s|effective draws/s"
    dims = {row["name"]: str(row["dim"]) for row in rows if "dim" in row}
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["name"], row["method"], row["seconds"]), []).append(row)
    lines = []
    for (name, method, seconds), every in groups.items():
        label = f"{method}, {seconds:g}" if seconds else str(method)
        these = [row for row in every if "error" not in row]
        if not these:
            lines.append([str(name), "", label, f"failed: {every[0]['error']}", *[""] * (columns.count("|") - 2)])
            continue
        verdicts = [str(row["verdict"]) for row in these]
        gradients, others = (statistics.median(row[k] for row in these) for k in ("gradients", "evaluations"))
        lines.append(
            [
                str(name),
                dims.get(name, ""),
                label,
                f"{sum(map(passes, these))} of {len(these)}",
                _cell(these, lambda row: float(row["ess"]), ".3f"),
                _cell(these, lambda row: float(row["khat"]), ".2f") if "khat" in these[0] else "-",
                _pair(these, "errors"),
                _pair(these, "resampled"),
                _counted(verdicts),
                f"{gradients / 1000:.0f} k" + (f" + {others / 1000:.0f} k" if others else ""),
                _cell(these, lambda row: float(row["cpu"]), ".1f"),
                _cell(these, _per_second, ".0f")
                + ("" if "warm" not in these[0] else f"; {_cell(these, _warm_per_second, '.0f')} in a second run"),
            ]
        )
        if refining:
            lines[-1] += _refined(these) if these[0].get("refine") else ["-"] * 5
    return markdown(["", *columns.split("|")], lines)


def misses(rows: list[Row]) -> list[str]:
    """Runs of ``fit_guide`` that fall short, and what its verdict says of them."""
    found = []
    for row in rows:
        if row["method"] != OURS or "error" in row:
            continue
        (mean, width), ess = row["errors"], float(row["ess"])
        if ess < ESS or mean > ERROR or width > ERROR:
            wrong = f"ESS {ess:.3f}, mean error {mean:.3f}, sd error {width:.3f}"
            found.append(f"{row['name']}, seed {row['seed']}, {row['seconds']:g} s: {wrong}; verdict: {row['verdict']}")
    return found


def arguments() -> Namespace:
    args = command(
        __doc__,
        "synthetic posteriors, a second each",
        folder="posteriordb's posterior_database",
        instead="made",
        names={"nargs": "+", "help": "posteriors; by default all there are"},
        seeds={"type": int, "nargs": "*", "default": [0, 1, 2], "help": "of fit_guide"},
        seconds={"type": float, "default": 10, "help": "CPU seconds of fit_guide"},
        peers={"nargs": "*", "choices": PEERS, "metavar": "GUIDE", "help": f"Pyro's guides: {', '.join(PEERS)}"},
        peer_seconds={"type": float, "default": 30},
        peer_seeds={"type": int, "nargs": "+", "default": [0]},
        nuts={"action": "store_true", "help": "Pyro's NUTS as well, with the seeds of the peers"},
        jax={"type": Path, "help": "an interpreter with jax and NumPyro, whose NUTS runs as well, with the same seeds"},
        nuts_seconds={"type": float, "nargs": "*", "default": [], "help": "the same with limits of CPU seconds"},
        made={
            "nargs": "*",
            "choices": KINDS,
            "metavar": "KIND",
            "help": f"made posteriors, of all kinds or some: {', '.join(KINDS)}",
        },
        refine={"type": float, "default": 0.0, "help": "CPU seconds of refining each fit"},
        jobs={"type": int, "default": 1, "help": "runs at a time"},
        results={"type": Path, "help": "JSON lines of runs, read and added to"},
    )
    if args.smoke:
        args.folder, args.names, args.seeds, args.seconds, args.peer_seconds = None, None, [0], 1.0, 0.5
        args.peers, args.results = ["AutoNormal"], Path(tempfile.mkdtemp()) / "runs.jsonl"
    return args


def plan(args: Namespace) -> list[tuple[str, str, int, float, float]]:
    """All runs, ``(name, method, seed, seconds, seconds of refining)``, in the order of the table."""
    made = [name for name, each in MADE.items() if args.made == [] or each.kind in (args.made or ())]
    names = args.names or [*([] if args.folder is None else stored(args.folder)), *(made or ["funnel10", "banana4"])]
    peers = PEERS if args.peers == [] else args.peers or ()
    runs = []
    for name in names:
        runs += [(name, OURS, seed, args.seconds, args.refine) for seed in args.seeds]
        runs += [(name, method, seed, args.peer_seconds, 0.0) for method in peers for seed in args.peer_seeds]
        limits = [0.0] * args.nuts + args.nuts_seconds
        runs += [(name, NUTS, seed, seconds, 0.0) for seconds in limits for seed in args.peer_seeds]
        if args.jax is not None:
            runs += [(name, NUMPYRO, seed, 0.0, 0.0) for seed in args.peer_seeds]
    return runs


def said(row: Row) -> str:
    """The line of one run."""
    about = f"{row['name']:<42}{row['method']:<24}seed {row['seed']}  "
    if "error" in row:
        return about + str(row["error"])
    (mean, width), ess = row["errors"], float(row["ess"])
    text = about + f"ESS {ess:.3f}  errors {mean:.3f} {width:.3f}  {row['verdict']}  {row['cpu']:.1f} s"
    if row.get("refine"):
        mean, width = row["refined"]
        text += f"; refined {mean:.3f} {width:.3f}  {row['refined_verdict']}  {row['refined_cpu']:.1f} s"
    return text


def main() -> None:
    args = arguments()
    print(f"{machine()}; float64, one thread a run, CPU seconds\n")
    rows = complete(
        functools.partial(run, folder=args.folder, draws=2000 if args.smoke else DRAWS, jax=args.jax),
        plan(args),
        lambda row: (row["name"], row["method"], row["seed"], row["seconds"], row.get("refine", 0.0)),
        said,
        results=args.results or Path("posteriors.jsonl"),
        jobs=args.jobs,
        fresh=not args.smoke,
    )
    rates = [float(row["gflops"]) for row in rows]
    print("\n" + table(rows))
    print(
        f"\nProduct of two 512 x 512 float64 matrices on one thread: {statistics.median(rates):.1f} GFLOP/s "
        f"({min(rates):.1f} to {max(rates):.1f} over the runs)"
    )
    print("\n" + summary(rows))
    print(f"\nRuns of fit_guide with ESS below {ESS} or an error above {ERROR}:")
    print("\n".join(misses(rows)) or "none")


if __name__ == "__main__":
    main()
