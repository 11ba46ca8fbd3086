"""Flows on a GPU: time, host synchronizations, and the same flow on the CPU and in Pyro.

    python examples/benchmarks/gpu.py                        # on cuda; a minute or two
    python examples/benchmarks/gpu.py --smoke                # small; on the CPU if there is no GPU

Needs torch, Pyro and NumPy only, and runs from a source tree.  A call is timed by the clock of the wall between two
synchronizations, in turns with the others.  *Waits* counts the times that a call makes the host wait for the device,
as ``torch.cuda.set_sync_debug_mode`` finds them: 0 in scores, draws and training steps, but for solvers that look at
their values (Mint).
"""

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from _runs import Table, between, command, machine
from _timing import shown
from pyro.distributions.transforms import AffineAutoregressive
from pyro.nn import AutoRegressiveNN
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2]))

import pyro_flows as pf

Call = Callable[[], object]

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


def pyro_sample(dim: int, batch: int, device: torch.device) -> Call:
    """Draws of one MAF layer in Pyro: a pass for each dimension."""
    width = 512 if dim > 8 else 8
    layer = AffineAutoregressive(AutoRegressiveNN(dim, [width, width])).to(device)
    noise = torch.randn(batch, dim, device=device)
    return torch.no_grad()(lambda: layer._inverse(noise))


def seconds(call: Call, device: torch.device, repeats: int) -> float:
    """Wall time of one call, with the device idle before and after."""
    done = torch.cuda.synchronize if device.type == "cuda" else int
    done()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    done()
    return (time.perf_counter() - begin) / repeats


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


def main() -> None:
    args = command(
        __doc__,
        "two small flows, one round",
        device={"help": "cuda (the default, but for --smoke without a GPU), cuda:1, or cpu"},
        rounds={"type": int, "default": 7},
    )
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() or not args.smoke else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("this torch sees no GPU: give --device cpu, or install a build of torch for CUDA")
    torch.distributions.Distribution.set_default_validate_args(False)  # which looks at values
    rounds, flows = (1, SMALL) if args.smoke else (args.rounds, FLOWS)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    print(f"{where}; {machine()}; seed 0, float32, {rounds} rounds in turns\n")
    table = Table("flow", "batch", "call", f"on {device.type}", "cpu / " + device.type, "waits")
    for name, (build, batch) in flows.items():
        torch.manual_seed(0)
        flow = pf.Flow(build())
        there, here = calls_of(pf.Flow(build()).to(device), batch), calls_of(flow, batch)
        for what, call in there.items():
            pairs = []
            for k in range(rounds + 1):  # the first warms up
                pair = seconds(call, device, 1 if args.smoke else 5), seconds(here[what], torch.device("cpu"), 1)
                pairs += [pair] if k else []
            own = statistics.median(pair[0] for pair in pairs)
            table.add(name, str(batch), what, shown(own), between([b / a for a, b in pairs], 1), waits(call, device))
    print(f"\n{table}\n")

    table = Table("D, batch", "our draws of one maf layer", "pyro / ours")
    for dim, batch in [(4, 8)] if args.smoke else [(8, 1000), (64, 1000), (256, 1000)]:
        width = 512 if dim > 8 else 8
        layer = pf.Flow(pf.maf(dim, num_layers=1, hidden_dims=(width, width))).to(device)
        ours, pyros = calls_of(layer, batch)["sample"], pyro_sample(dim, batch, device)
        pairs = [(seconds(ours, device, 1), seconds(pyros, device, 1)) for _ in range(rounds + 1)][1:]
        own = statistics.median(pair[0] for pair in pairs)
        table.add(f"{dim}, {batch}", shown(own), between([b / a for a, b in pairs], 1))
    print(f"\n{table}")


if __name__ == "__main__":
    main()
