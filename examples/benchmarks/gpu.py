"""Flows on a GPU: time, waits of the host, memory and digits, beside the same flow on the CPU and in Pyro.

    python examples/benchmarks/gpu.py                        # on cuda; minutes; writes gpu.md
    python examples/benchmarks/gpu.py --device cuda:1 --out there.md
    python examples/benchmarks/gpu.py --smoke                # small; on the CPU if there is no GPU

Needs torch, Pyro and NumPy only, and runs from a source tree.  A call is timed by the clock of the wall between two
synchronizations, in turns with what it is compared with; ratios are medians over rounds, least and greatest in
brackets.

*Flows*: scores, draws and training steps.  *Waits* counts the times that a call makes the host wait for the device, as
``torch.cuda.set_sync_debug_mode`` finds them: 0 but for solvers that look at their values (Mint's inverse).  *Memory*
is the most that the device holds during a call, beyond what it held before.

*Draws*: the slow direction here and in Pyro, both on the device.  *Captured* replays the kernels of one call as a CUDA
graph, which leaves the host's part out.

*Fits*: a step of stock SVI, with 128 draws here and one draw in Pyro, and a step of ``fit_density`` and ``fit_guide``
by the difference of two runs.

*Digits*: the largest error of a value that goes through a flow and back, in float32, with TF32 refused and allowed.
"""

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from _runs import Table, between, command, machine
from _timing import shown
from pyro.distributions.transforms import AffineAutoregressive, SplineAutoregressive
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoIAFNormal
from pyro.nn import AutoRegressiveNN
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2]))

import pyro_flows as pf

Call = Callable[[], object]
Model = Callable[[], None]

WANTED = 40  # times Pyro's speed, for draws of a MAF layer at D = 64, batch 1000
BINS = 8

FLOWS = {
    "maf, 64": (lambda: pf.maf(64, num_layers=5, hidden_dims=(512, 512)), 1000),
    "iaf, 64": (lambda: pf.iaf(64, num_layers=5, hidden_dims=(512, 512)), 1000),
    "realnvp, 64": (lambda: pf.realnvp(64, num_layers=8, hidden_dims=(512, 512)), 1000),
    "nsf, 64": (lambda: pf.nsf(64, num_layers=5, hidden_dims=(256, 256)), 1000),
    "glow, 3 x 32 x 32": (lambda: pf.glow((3, 32, 32)), 64),
    "mintnet, 1 x 28 x 28": (lambda: pf.mintnet((1, 28, 28)), 64),
}
SMALL = {
    "maf, 4": (lambda: pf.maf(4, hidden_dims=(8,)), 8),
    "glow, 3 x 4 x 4": (lambda: pf.glow((3, 4, 4), num_layers=1, hidden_channels=4), 2),
}


def seconds(call: Call, device: torch.device, repeats: int = 1) -> float:
    """Wall time of one call, with the device idle before and after."""
    done = torch.cuda.synchronize if device.type == "cuda" else int
    done()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    done()
    return (time.perf_counter() - begin) / repeats


def in_turns(calls: Sequence[tuple[Call, torch.device, int]], rounds: int) -> list[list[float]]:
    """Seconds of each call in each round, after one to warm up."""
    return [[seconds(*each) for each in calls] for _ in range(rounds + 1)][1:]


def over(rounds: list[list[float]], place: int, digits: int = 1) -> str:
    """How often the first call fits into another one."""
    return between([each[place] / each[0] for each in rounds], digits)


def median(rounds: list[list[float]], place: int = 0) -> str:
    return shown(statistics.median(each[place] for each in rounds))


def waits(call: Call, device: torch.device) -> str:
    """How often a call makes the host wait."""
    if device.type != "cuda":
        return "-"
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return str(sum("synchroniz" in str(each.message) for each in caught))


def memory(call: Call, device: torch.device) -> str:
    """The most that a call holds on the device, in megabytes."""
    if device.type != "cuda":
        return "-"
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return f"{(torch.cuda.max_memory_allocated(device) - before) / 1e6:.1f} MB"


def captured(call: Call, device: torch.device) -> Call | None:
    """The kernels of a call as a CUDA graph; ``None`` without a GPU, or if the call cannot be captured."""
    if device.type != "cuda":
        return None
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize(device)
    try:
        with torch.cuda.graph(graph, stream=stream):
            call()
    except RuntimeError as error:
        print(f"not captured: {error}")
        return None
    return graph.replay


def calls_of(flow: pf.Flow, batch: int) -> dict[str, Call]:
    """Scores, draws and training steps of a flow, where it is."""
    like = next(flow.parameters())
    x = torch.randn(batch, *flow.event_shape, device=like.device)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-5, fused=True)

    def without_gradient(call: Callable[[], Tensor]) -> Call:
        return torch.no_grad()(call)

    def step() -> None:
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()

    return {
        "log_prob": without_gradient(lambda: flow.log_prob(x)),
        "sample": without_gradient(lambda: flow.sample((batch,))),
        "training step": step,
    }


def flows(device: torch.device, smoke: bool, rounds: int) -> Table:
    table = Table("flow", "batch", "call", f"on {device.type}", f"cpu / {device.type}", "waits", "memory")
    for name, (build, batch) in (SMALL if smoke else FLOWS).items():
        there, here = calls_of(pf.Flow(build()).to(device), batch), calls_of(pf.Flow(build()), batch)
        for what, call in there.items():
            found = in_turns([(call, device, 1 if smoke else 5), (here[what], torch.device("cpu"), 1)], rounds)
            table.add(name, str(batch), what, median(found), over(found, 1), waits(call, device), memory(call, device))
    return table


def layers(dim: int, kind: str, device: torch.device) -> tuple[pf.Flow, Call]:
    """A flow of one layer, and the same direction of Pyro's; ``batch`` rows of noise are its argument."""
    width = 512 if dim > 8 else 8
    widths = [width, width]
    if kind == "nsf":
        ours = pf.nsf(dim, autoregressive=True, num_layers=1, hidden_dims=widths, bins=BINS)
        net = AutoRegressiveNN(dim, widths, param_dims=[BINS, BINS, BINS - 1])
        theirs = SplineAutoregressive(dim, net, count_bins=BINS, bound=5.0, order="quadratic")
    else:
        ours = getattr(pf, kind)(dim, num_layers=1, hidden_dims=widths)
        theirs = AffineAutoregressive(AutoRegressiveNN(dim, widths))
    theirs = theirs.to(device)
    return pf.Flow(ours).to(device), theirs._call if kind == "iaf" else theirs._inverse


def draws(device: torch.device, smoke: bool, rounds: int) -> Table:
    table = Table("layer, D, batch", "our draws", "pyro / ours", "captured", "pyro / captured", "pyro's memory / ours")
    sizes = [("maf", 8), ("maf", 64), ("maf", 256), ("iaf", 64), ("nsf", 64)]
    for kind, dim in [("maf", 4), ("iaf", 4), ("nsf", 4)] if smoke else sizes:
        batch = 8 if smoke else 1000
        flow, theirs = layers(dim, kind, device)
        noise = torch.randn(batch, dim, device=device)
        ours, pyros = calls_of(flow, batch)["sample"], torch.no_grad()(lambda call=theirs, noise=noise: call(noise))
        graph = captured(ours, device)
        found = in_turns([(each, device, 1) for each in (ours, pyros, graph) if each], rounds)
        held = f"{memory(pyros, device)} / {memory(ours, device)}"
        replayed = ["-", "-"] if graph is None else [median(found, 2), between([b / c for _, b, c in found], 1)]
        table.add(f"{kind}, {dim}, {batch}", median(found), over(found, 1), *replayed, held)
        if (kind, dim) == ("maf", 64):
            best = statistics.median(each[1] / min(each[0], *each[2:]) for each in found)
            print(f"D = 64, batch 1000: {best:.0f} times Pyro's speed; wanted: {WANTED}")
    return table


def schools() -> None:
    """Eight schools, not centered."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    error = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta, error), obs=y)


def logistic(rows: int, dim: int) -> Model:
    x = torch.randn(rows, dim)
    y = (x.sum(-1) > 0).float()

    def model() -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
        logits = torch.einsum("...d,nd->...n", beta, x)
        with pyro.plate("rows", rows):
            pyro.sample("y", dist.Bernoulli(logits=logits.reshape(*beta.shape[:1] * (beta.dim() > 1), rows)), obs=y)

    return model


def svi_step(model: Model, guide: AutoGuide, num_draws: int) -> Call:
    elbo = Trace_ELBO(num_particles=num_draws, vectorize_particles=num_draws > 1, max_plate_nesting=1)
    return SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), elbo).step


def fits(device: torch.device, smoke: bool, rounds: int) -> Table:
    table = Table("step", f"on {device.type}", "pyro, one draw / ours", "waits")
    cases = {"eight schools": schools, "logistic regression": logistic(20, 3) if smoke else logistic(1000, 50)}
    few, many = (2, 4) if smoke else (200, 600)
    for name, model in cases.items():
        pyro.clear_param_store()
        ours = svi_step(model, pf.AutoFlow(model), 4 if smoke else 128)
        pyros = svi_step(model, AutoIAFNormal(model, hidden_dim=[32], num_transforms=3), 1)
        found = in_turns([(ours, device, 1 if smoke else 20), (pyros, device, 1 if smoke else 20)], rounds)
        table.add(f"SVI, AutoFlow, {name}", median(found), over(found, 1, 2), waits(ours, device))
    x = torch.randn(20 if smoke else 10_000, 4 if smoke else 64)

    def density(steps: int) -> None:
        options = {"batch_size": 8 if smoke else 1000, "progress": False, "max_epochs": 10_000}
        pf.fit_density(
            pf.Flow((SMALL if smoke else FLOWS)["maf, 4" if smoke else "maf, 64"][0]()), x, steps=steps, **options
        )

    def guide(steps: int) -> None:
        pyro.clear_param_store()
        pf.fit_guide(pf.AutoFlow(schools, seed=0), steps=steps)

    for name, run in (("fit_density, maf", density), ("fit_guide, eight schools", guide)):
        run(few)
        times = [seconds(lambda n=n, run=run: run(n), device) for n in (few, many)]
        table.add(name, shown(max(times[1] - times[0], 1e-9) / (many - few)), "-", "-")
    return table


@torch.no_grad()
def digits(device: torch.device, smoke: bool) -> Table:
    table = Table("flow", "TF32 refused", "TF32 allowed")
    for name, (build, batch) in (SMALL if smoke else FLOWS).items():
        flow = pf.Flow(build())
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        x, errors = flow.sample((batch,)), []
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = precision == "high"
            errors.append(f"{float((flow.chain(flow.chain.inv(x.clone())) - x).abs().max()):.1e}")
        torch.set_float32_matmul_precision("highest")
        table.add(name, *errors)
    return table


def main() -> None:
    args = command(
        __doc__,
        "two small flows, one round",
        device={"help": "cuda (the default, but for --smoke without a GPU), cuda:1, or cpu"},
        rounds={"type": int, "default": 7},
        out={"type": Path, "help": "file for the tables (default: gpu.md; none with --smoke)"},
    )
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() or not args.smoke else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("this torch sees no GPU: give --device cpu, or install a build of torch for CUDA")
    torch.distributions.Distribution.set_default_validate_args(False)  # which looks at values
    pyro.enable_validation(False)
    warnings.simplefilter("ignore", UserWarning)  # fits as short as these end early
    rounds = 1 if args.smoke else args.rounds
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    told = [f"{where}; {machine()}; seed 0, float32, {rounds} rounds in turns"]
    print(told[0])
    torch.manual_seed(0)
    told += [f"## Flows\n\n{flows(device, args.smoke, rounds)}", f"## Draws\n\n{draws(device, args.smoke, rounds)}"]
    torch.set_default_device(device)
    told += [f"## Fits\n\n{fits(device, args.smoke, rounds)}", f"## Digits\n\n{digits(device, args.smoke)}"]
    report = "\n\n".join(told) + "\n"
    print(f"\n{report}")
    out = args.out or (None if args.smoke else Path("gpu.md"))
    if out:
        out.write_text(report)


if __name__ == "__main__":
    main()
