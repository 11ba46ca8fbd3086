"""Continuous flows: what tolerances are worth, what gradients cost, and what is learned, here and by others.

    python examples/benchmarks/continuous.py                                # all sections; about an hour
    python examples/benchmarks/continuous.py --sections tolerance speed
    python examples/benchmarks/continuous.py --smoke                        # seconds, too small to mean anything

Sections.  *tolerance*: errors of the log-density in nats (root mean square and worst of 500 points) against a solve at
1e-12, for a flow trained on two moons and one of random weights; with ``per_row``, by ``check_solve``, and in float32.
*rows*: how far a row's log-density alone is from that among 500.  *hutchinson*: estimates of the divergence by equally
many products.  *gradient*: errors, time and memory of the gradient by the adjoint and through the solver's steps.
*memory*: of a training step, by the number of evaluations.  *speed*: training steps, densities and samples of one field
in other libraries; above 1 this package is faster.  *quality*: flows fitted at equal CPU time.  *matching*: flow
matching against maximum likelihood.  Needs the ``bench`` extra for zuko.
"""

import copy
import functools
import importlib.util
import math
import statistics
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from _continuous_fits import SETS, matching, quality
from _continuous_peers import LIBRARIES, Case
from _runs import Table, command, machine, markdown, shaken
from _timing import Bench, grown, kept, ratio, shown, spent
from torch import Tensor

import pyro_flows as pf


def toleranced(flow: pf.Flow, tolerance: float, **options: object) -> pf.Flow:
    """The same flow with other settings of its solver."""
    solver = flow.chain[0]
    solver.rtol = solver.atol = (tolerance, tolerance)
    for name, value in options.items():
        setattr(solver, name, value)
    return flow


def random(dims: int, scale: float, **options: object) -> pf.Flow:
    """A flow of random weights: the fresh ones and normal noise."""
    torch.manual_seed(0)
    return shaken(pf.Flow(pf.cnf(dims, **options)), scale)


@functools.cache
@torch.enable_grad()
def moons(steps: int) -> tuple[pf.Flow, Tensor]:
    """A flow trained on two moons, and 500 points of them."""
    import gallery

    torch.manual_seed(0)
    flow = toleranced(pf.Flow(pf.cnf(2)), 1e-3)
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (-flow.log_prob(gallery.moons(512)).mean()).backward()
        optimizer.step()
        schedule.step()
    return flow.requires_grad_(False), gallery.moons(500)


def flows(args: Namespace) -> list[tuple[str, pf.Flow, Tensor]]:
    """Trained and random ones, with points, in double precision."""
    flow, x = moons(args.steps)
    found = [("two moons", copy.deepcopy(flow).double(), x.double())]
    for dims in (2, 8):
        torch.manual_seed(1)
        found.append((f"random, D = {dims}", random(dims, 0.3).double(), torch.randn(500, dims).double()))
    return [(name, flow, x[: args.points]) for name, flow, x in found]


def off(values: Tensor, truth: Tensor, unit: float = 1.0) -> str:
    """Root mean square and largest difference."""
    error = (values.double() - truth).abs() / unit
    return (
        f"{error.square().mean().sqrt():.1e}, {error.max():.1e}"
        if unit == 1.0
        else (f"{error.square().mean().sqrt():.2g}, {error.max():.2g}")
    )


@torch.no_grad()
def tolerance(args: Namespace) -> None:
    head = ["", "tolerance", "evaluations", "error: rms, worst", "ladj by check_solve", "per row: evaluations", "error"]
    rows = []
    for name, flow, x in flows(args):
        x = x.float().double()  # the same points in both precisions
        truth = toleranced(flow, 1e-12, per_row=True).log_prob(x)
        for tolerance in args.tolerances:
            row = [name, f"{tolerance:.0e}"]
            for per_row in (False, True):
                values = toleranced(flow, tolerance, per_row=per_row).log_prob(x)
                row += [str(flow.chain[0].last_solve.evaluations), off(values, truth)]
                if not per_row:
                    row.append(f"{flow.chain[0].check_solve(x, density=True).ladj:.1e}")
            row.append(off(toleranced(flow, tolerance, per_row=False).float().log_prob(x.float()), truth))
            flow.double()
            rows.append(row)
    print(markdown([*head, "error in float32"], rows))


@torch.no_grad()
def mates(args: Namespace) -> None:
    head = ["", "tolerance", "per row", "evaluations among 500", "alone", "difference in tolerances: rms, worst"]
    rows = []
    for name, flow, x in flows(args):
        for tolerance in args.tolerances[:5:2]:
            for per_row in (False, True):
                toleranced(flow, tolerance, per_row=per_row)
                among = flow.log_prob(x)
                row = [name, f"{tolerance:.0e}", "yes" if per_row else "no"]
                row.append(str(flow.chain[0].last_solve.evaluations))
                counts, alone = [], []
                for each in x[: args.points // 10]:
                    alone.append(flow.log_prob(each))
                    counts.append(flow.chain[0].last_solve.evaluations)
                rows.append(
                    [*row, f"{statistics.mean(counts):.0f}", off(torch.stack(alone), among[: len(alone)], tolerance)]
                )
    print(markdown(head, rows))


@torch.no_grad()
def hutchinson(args: Namespace) -> None:
    head = ["D, products", "probes", "mean - exact, standard errors: rms, worst", "sd, nats", "variance / Rademacher's"]
    rows, points, rounds = [], 20, 1 if args.smoke else 8
    repeats = rounds * args.points
    for dims in (8,) if args.smoke else (8, 64):
        plain = {"solver": "rk4", "solver_steps": 10, "field": "mlp"}
        exact = random(dims, 0.1, divergence="exact", **plain)
        torch.manual_seed(1)
        x = torch.randn(points, dims)
        truth = exact.double().log_prob(x.double())
        for products in (1, 4):
            first = None
            for kind, noise in (("hutchinson", "rademacher"), ("hutchinson", "gaussian"), ("hutch++", "rademacher")):
                if kind == "hutch++" and products == 1:
                    continue
                flow = random(dims, 0.1, divergence=kind, noise=noise, num_probes=products, **plain).train()
                many = x.repeat(args.points, 1)
                values = torch.cat([flow.log_prob(many) for _ in range(rounds)]).view(repeats, points).double()
                variance, mean = values.var(0), values.mean(0)
                z = (mean - truth) / (variance / repeats).sqrt()
                first = variance if first is None else first
                label = f"Hutch++, {noise}" if kind == "hutch++" else noise
                row = [f"{dims}, {products}", label, f"{z.square().mean().sqrt():.2f}, {z.abs().max():.2f}"]
                rows.append([*row, f"{variance.mean().sqrt():.3g}", f"{(variance / first).mean():.2f}"])
    print(markdown(head, rows))


def loss_gradient(flow: pf.Flow, x: Tensor) -> Tensor:
    flow.zero_grad()
    (-flow.log_prob(x).mean()).backward()
    return torch.cat([p.grad.flatten() for p in flow.parameters()])


def saved(flow: pf.Flow, x: Tensor) -> int:
    """Bytes of distinct storages that autograd keeps for a step, besides the parameters."""
    return kept(lambda: flow.log_prob(x).mean(), flow.parameters())


def gradient(args: Namespace) -> None:
    head = ["", "tolerance", "adjoint: evaluations", "error", "time", "backprop: evaluations", "error", "time", "kept"]
    rows = []
    for name, flow, x in flows(args):
        flow.requires_grad_(True)
        truth = loss_gradient(toleranced(flow, 1e-10, per_row=True, gradient="backprop"), x)
        flow.float()
        for tolerance in args.tolerances[:4]:
            row = [name, f"{tolerance:.0e}"]
            for way in ("adjoint", "backprop"):
                toleranced(flow, tolerance, per_row=False, gradient=way)
                error = (loss_gradient(flow, x.float()).double() - truth).norm() / truth.norm()
                report = flow.chain[0].last_solve
                taken = [spent(lambda: loss_gradient(flow, x.float())) for _ in range(args.rounds)]  # noqa: B023
                behind = f" + {report.backward_evaluations}" if way == "adjoint" else ""
                row += [f"{report.evaluations}{behind}", f"{error:.1e}", shown(statistics.median(taken))]
            rows.append([*row, f"{saved(flow, x.float()) / 2**20:.1f} MiB"])
    print(markdown(head, rows))


def _peak(way: str, dims: int, batch: int, steps: int) -> tuple[float, float]:
    """Bytes kept for the gradient of a step, and by how much the step makes the peak memory of a fresh process grow."""
    torch.set_num_threads(1)
    flow = random(dims, 0.1, solver="rk4", solver_steps=steps, gradient=way)
    x = torch.randn(batch, dims)
    loss_gradient(flow, x[:1])
    peak = grown(lambda: loss_gradient(flow, x)) if Path("/proc/self/clear_refs").exists() else math.nan
    return saved(flow, x), peak  # in this order, for freed memory is not given back


def memory(args: Namespace) -> None:
    rows = []
    for steps in (10,) if args.smoke else (10, 20, 40, 80):
        row = [f"{4 * steps}"]
        for way in ("adjoint", "backprop"):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                kept, peak = pool.submit(_peak, way, 8, args.batches[-1], steps).result()
            row += [f"{kept / 2**20:.1f} MiB", f"{peak / 2**20:.0f} MiB"]
        rows.append(row)
    print(f"D = 8, {args.batches[-1]} rows, rk4")
    print(markdown(["evaluations", "adjoint: kept", "peak", "backprop: kept", "peak"], rows))


PAIRS = {  # columns: over which of our calls
    ("zuko", "adjoint"): ("default", "adjoint", "module"),
    ("torchdiffeq", "adjoint"): ("adjoint",),
    ("torchdiffeq", "backprop"): ("default",),
    ("zuko", "log_prob"): ("log_prob",),
    ("torchdiffeq", "log_prob"): ("log_prob",),
    ("zuko", "sample"): ("sample",),
    ("torchdiffeq", "sample"): ("sample",),
}


def speed(args: Namespace) -> None:
    peers = [name for name in ("zuko", "torchdiffeq") if importlib.util.find_spec(name) is not None]
    for name in {"zuko", "torchdiffeq"} - {*peers}:
        print(f"{name} is not installed, and left out")
    pairs = {job: ours for job, ours in PAIRS.items() if job[0] in peers}
    jobs = [("pyro_flows", call) for call in ("default", "adjoint", "module", "log_prob", "sample")]
    counted = [("pyro_flows", "default"), ("pyro_flows", "adjoint"), *(job for job in pairs if job[1] == "adjoint")]
    head = ["D, rows, tolerance", *(f"ours: {call}" for _, call in jobs)]
    head += [f"{name} {call} / {ours}" for (name, call), many in pairs.items() for ours in many]
    table, counts = Table(*head), []
    with Bench(["pyro_flows", *peers], libraries=LIBRARIES) as bench:
        for dims in args.dims:
            for batch in args.batches:
                for tolerance in args.speed_tolerances:
                    bench.build(Case(dims, 64, batch, tolerance), ["pyro_flows", *peers])
                    figures = bench.time([*jobs, *pairs], args.rounds)
                    row = [f"{dims}, {batch}, {tolerance:.0e}"]
                    row += [shown(statistics.median(figures[job])) for job in jobs]
                    row += [ratio(figures, job, ("pyro_flows", own), 2) for job, many in pairs.items() for own in many]
                    table.add(*row)
                    made = [bench.value(name, f"evaluations, {call}") for name, call in counted]
                    counts.append([row[0], *(f"{there} + {back}" for there, back in made)])
    print(f"\n{table}")
    print("\n" + markdown(["evaluations", *(" ".join(job) for job in counted)], counts))


SECTIONS: dict[str, Callable[[Namespace], None]] = {
    "tolerance": tolerance,
    "rows": mates,
    "hutchinson": hutchinson,
    "gradient": gradient,
    "memory": memory,
    "speed": speed,
    "quality": lambda args: quality(args.sets, args.seeds, args.seconds, args.rows, args.results),
    "matching": lambda args: matching(args.sets[:1], args.seeds[:1], args.budgets, args.rows, args.results),
}


def main() -> None:
    args = command(
        __doc__,
        "small sizes, one round",
        sections={"nargs": "+", "choices": SECTIONS, "default": list(SECTIONS)},
        rounds={"type": int, "default": 5, "help": "of timings"},
        dims={"type": int, "nargs": "+", "default": [2, 8, 32], "help": "of speed"},
        batches={"type": int, "nargs": "+", "default": [100, 1000], "help": "rows, of speed and memory"},
        speed_tolerances={"type": float, "nargs": "+", "default": [1e-05]},
        sets={"nargs": "+", "choices": SETS, "default": SETS, "help": "of quality and matching"},
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2]},
        seconds={"type": float, "default": 10.0, "help": "CPU seconds of a fit, of quality"},
        budgets={
            "type": float,
            "nargs": "+",
            "default": [2.5, 10.0, 30.0],
            "help": "of matching, in the first set with the first seed",
        },
        results={"type": Path, "help": "JSON lines of fits, read and added to"},
    )
    args.steps, args.points, args.rows = 500, 500, 20_000
    args.tolerances = [10.0**-k for k in range(3, 10)]
    if args.smoke:
        args.rounds, args.steps, args.points, args.rows, args.dims, args.batches = 1, 3, 20, 200, [2], [10]
        args.tolerances, args.sets, args.seeds, args.seconds, args.budgets = [1e-3], ["moons"], [0], 0.2, [0.2]
    print(f"{machine()}; one thread, float32 where nothing is said")
    for name in args.sections:
        print(f"\n{name}\n", flush=True)
        SECTIONS[name](args)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributions.Distribution.set_default_validate_args(False)
    main()
