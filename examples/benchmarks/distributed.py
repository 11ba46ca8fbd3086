"""Two processes against one: the same numbers, memory of streams, and time.

    python examples/benchmarks/distributed.py             # all of it, some minutes
    python examples/benchmarks/distributed.py --smoke

1. Gradients of the first step and parameters after 200 steps of two gloo processes, against one process on the same
   global batch, in float64, for a density and a guide.
2. A fit killed by SIGKILL in both processes and resumed, against one that never stopped.
3. Peak memory of each process for a stream of 10^5 and one of 10^7 rows.
4. Seconds of a message, of a gradient averaged here and in ``DistributedDataParallel``, and of steps.
"""

import os
import resource
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from _runs import Table, command, machine
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

import pyro_flows as pf
from pyro_flows.infer import AutoFlow, fit_guide
from pyro_flows.infer.machine import processes
from pyro_flows.infer.machine.optimizers import AdamW


def work(rank: int, size: int, folder: str, call: Callable[[], object]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    torch.save(call(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def together(call: Callable[[], object], size: int = 2, killed: bool = False) -> list[object]:
    """What a function returns in each of several new processes, or in this one; ``[]`` if they are to be killed."""
    if size == 1:
        return [call()]
    with tempfile.TemporaryDirectory() as folder:
        workers = [get_context("spawn").Process(target=work, args=(k, size, folder, call)) for k in range(size)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        codes = [worker.exitcode for worker in workers]
        if codes != size * [-signal.SIGKILL if killed else 0]:
            raise RuntimeError(f"the processes ended with {codes}")
        return [] if killed else [torch.load(f"{folder}/{k}.pt", weights_only=False) for k in range(size)]


# What is fitted.


def rows(count: int, dim: int = 8) -> Tensor:
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 1] += x[:, 0] ** 2
    return x


def schools(y: Tensor) -> None:
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=y.dtype)
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_full((), 5.0)))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def watched(fit: Callable[[], object]) -> tuple[list[Tensor], object]:
    """The gradients of the first step of a fit, and its result."""
    seen: list[Tensor] = []
    take = AdamW.take

    def keeping(self: AdamW, grads: list[Tensor]) -> Tensor:
        if not seen:
            seen.extend(grad.clone() for grad in grads)
        return take(self, grads)

    AdamW.take = keeping
    try:
        return seen, fit()
    finally:
        AdamW.take = take


def density(steps: int, checkpoint: str | None = None, kill: int = 0) -> tuple[list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(1)
    flow = pf.Flow(pf.maf(8, num_layers=3, hidden_dims=(32, 32))).double()
    options = {"steps": steps, "batch_size": 101, "average": 0.0, "checkpoint": checkpoint, "checkpoint_every": 1}

    def fit() -> pf.infer.DensityFit:
        return pf.fit_density(flow, rows(2003), progress=False, compile=False, **options)

    if kill:
        done, write = [], processes.averaged

        def counting(*arguments: object) -> object:
            done.append(1)
            if len(done) == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*arguments)

        processes.averaged = counting
    seen, _ = watched(fit)
    return seen, dict(flow.state_dict())


def guide(steps: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
    seen, fit = watched(lambda: fit_guide(AutoFlow(schools, seed=0, num_particles=128), y, steps=steps, progress=False))
    return seen, dict(fit.flow.state_dict())


def furthest(one: list[Tensor], two: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True))


def equality(steps: int) -> None:
    table = Table("two processes against one, float64", "gradient of a step", f"parameters after {steps} steps")
    for name, fit in {"maf, batches of 101 rows": density, "guide of eight schools": guide}.items():
        (first, state), (_, other) = together(partial(fit, steps))
        (alone, alone_state), *_ = together(partial(fit, steps), 1)
        assert all(torch.equal(value, other[key]) for key, value in state.items()), "processes differ"
        after = furthest(list(state.values()), list(alone_state.values()))
        table.add(name, f"{furthest(first, alone):.1e}", f"{after:.1e}")
    print(f"{table}\n")


def both(steps: int, path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A fit that goes on from a file, and one that never stopped."""
    return density(steps, path)[1], density(steps)[1]


def resumption(steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/fit.pt"
        together(partial(density, steps, path, kill=steps * 2 // 3), killed=True)
        assert Path(path).exists(), "no checkpoint was written"
        (resumed, whole), _ = together(partial(both, steps, path))
    gap = furthest(list(resumed.values()), list(whole.values()))
    print(f"Killed after {steps * 2 // 3} of {steps} steps and resumed, against uninterrupted: {gap:.1e} apart\n")


# Memory.


class Stream(IterableDataset):
    """Rows made as they are read, of which each process reads its part."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        rank, size = distributed.get_rank(), distributed.get_world_size()
        for k in range(rank, self.count // 1000, size):
            yield torch.randn(1000, 8, generator=torch.Generator().manual_seed(k))


def streamed(count: int) -> tuple[float, float]:
    begun = time.perf_counter()
    flow, loader = pf.maf(8, num_layers=1, hidden_dims=(32,)), DataLoader(Stream(count), batch_size=None)
    pf.fit_density(flow, loader, max_epochs=1, schedule="cosine", progress=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.perf_counter() - begun


def memory(counts: tuple[int, int]) -> None:
    table = Table("rows of a stream", "bytes of them", "peak memory of each process", "time")
    peaks = []
    for count in counts:
        found = together(partial(streamed, count))
        peaks.append([peak for peak, _ in found])
        held = f"{count * 32 / 2**20:.0f} MB"
        table.add(f"{count:,}", held, ", ".join(f"{peak:.0f} MB" for peak in peaks[-1]), f"{found[0][1]:.0f} s")
    grown = max(b - a for a, b in zip(*peaks, strict=True))
    print(f"{table}\nPeak memory grows by {grown:.0f} MB\n")


# Time.


class Loss(nn.Module):
    def __init__(self, flow: pf.Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, value: Tensor) -> Tensor:
        return -self.flow.log_prob(value).mean()


def seconds(call: Callable[[], object], repeats: int) -> float:
    found = []
    for _ in range(repeats + 3):
        begun = time.perf_counter()
        call()
        found.append(time.perf_counter() - begun)
    return statistics.median(found[3:])


def messages(width: int, repeats: int) -> tuple[float, float, float, float]:
    """Seconds of a message, and of a gradient alone, averaged here, and by torch's wrapper."""
    torch.manual_seed(0)
    flow, own = (pf.Flow(pf.maf(16, num_layers=3, hidden_dims=(width, width))) for _ in range(2))
    value, loss = torch.randn(256, 16), Loss(flow)
    wrapped = DistributedDataParallel(Loss(own))
    parameters = list(flow.parameters())

    def alone() -> list[Tensor]:
        return list(torch.autograd.grad(loss(value), parameters))

    with processes.joined("benchmark"):
        return (
            seconds(lambda: processes.total(1.0), repeats),
            seconds(alone, repeats),
            seconds(lambda: processes.averaged(parameters, alone(), 0.0, len(value)), repeats),
            seconds(lambda: wrapped(value).backward(), repeats),
        )


def many(batch: int, width: int) -> float:
    torch.manual_seed(0)
    flow = pf.Flow(pf.maf(32, num_layers=3, hidden_dims=(width, width)))
    fit = pf.fit_density(
        flow, rows(20 * batch, 32), batch_size=batch, max_epochs=2, validation_fraction=0, progress=False, compile=False
    )
    return (fit.history["seconds"][-1] - fit.history["seconds"][0]) / (fit.history["step"][0])


def logistic(x: Tensor, y: Tensor) -> None:
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(weight * x).sum(-1)), obs=y)


def draws(count: int, steps: int) -> tuple[float, float]:
    """Seconds of a step, and of a whole fit."""
    torch.manual_seed(0)
    x = torch.randn(count, 20)
    begun = time.perf_counter()
    fit = fit_guide(
        AutoFlow(logistic, seed=0, num_particles=128), x, (x[:, 0] > 0).float(), steps=steps, progress=False
    )
    at = fit.history.seconds
    return (at[-1] - at[steps // 2]) / (len(at) - 1 - steps // 2), time.perf_counter() - begun


def times(smoke: bool) -> None:
    table = Table("D = 16, 3 layers, 256 rows", "message", "gradient alone", "averaged", "by torch's wrapper")
    for width in (8,) if smoke else (64, 512):
        found = together(partial(messages, width, 3 if smoke else 100))
        table.add(f"width {width}", *(f"{1e3 * max(pair):.2f} ms" for pair in zip(*found, strict=True)))
    print(f"{table}\n")
    table, sizes = Table("", "one process", "two", "ratio"), (1, 1) if smoke else (1, 2)
    for batch, width in ((64, 8),) if smoke else ((512, 128), (8192, 128)):
        one, two = (max(together(partial(many, batch, width), size)) for size in sizes)
        table.add(f"density, step of {batch} rows", f"{1e3 * one:.1f} ms", f"{1e3 * two:.1f} ms", f"{one / two:.2f}")
    for count in (100,) if smoke else (1000, 20_000):
        one, two = (together(partial(draws, count, 4 if smoke else 60), size)[0] for size in sizes)
        name = f"guide, 128 draws of a model of {count} rows"
        for what, a, b in zip(("step", "whole fit"), one, two, strict=True):
            table.add(f"{name}, {what}", f"{1e3 * a:.1f} ms", f"{1e3 * b:.1f} ms", f"{a / b:.2f}")
    print(table)


def main() -> None:
    args = command(__doc__, "few steps, short streams")
    print(f"{machine()}; one thread in each process\n")
    equality(5 if args.smoke else 200)
    resumption(45 if args.smoke else 200)
    memory((2000, 4000) if args.smoke else (10**5, 10**7))
    times(args.smoke)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
