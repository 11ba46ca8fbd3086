"""Several processes fit one density to a file larger than memory, and one posterior of much data.

    torchrun --nproc-per-node 2 examples/distributed.py            # prints two tables
    torchrun --nproc-per-node 2 examples/distributed.py --smoke    # the same in seconds
    python examples/distributed.py                                 # one process: the same numbers

1. ``maf`` learns rows of a file, of which each process reads its part of every batch.  Gradients are averaged, so that
   any number of processes takes the same steps.
2. ``fit_guide`` finds the posterior of a logistic regression.  Each process evaluates its part of the draws.
3. Scores and draws need no help: each process makes a part, and ``all_gather_object`` collects them.

Every process runs the whole script; the first one speaks.  On machines with GPUs, each process takes one of them.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from _script import command, mean_of
from torch import Tensor, distributed
from torch.utils.data import DataLoader, IterableDataset

import pyro_flows as pf
from pyro_flows.infer import AutoFlow, fit_guide

BATCH = 512  # rows in a step, of all processes together


def join() -> tuple[int, int, torch.device]:
    """Joins the processes that torchrun started; returns this one's number, their number, and the device."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return 0, 1, torch.device("cuda" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(timeout=timedelta(minutes=10))
    return distributed.get_rank(), distributed.get_world_size(), torch.device("cuda" if cuda else "cpu")


def from_first(thing: object) -> object:
    """What the first process has."""
    box = [thing]
    if distributed.is_initialized():
        distributed.broadcast_object_list(box)
    return box[0]


def gathered(part: Tensor) -> Tensor:
    """The parts of all processes."""
    parts = [part.cpu()]
    if distributed.is_initialized():
        parts = [part] * distributed.get_world_size()
        distributed.all_gather_object(parts, part.cpu())
    return torch.cat(parts)


# 1. A density.


def crescents(rows: int) -> np.ndarray:
    """Three columns of noise along curves, and their sum."""
    x = torch.randn(rows, 3)
    x[:, 1] += x[:, 0] ** 2
    x[:, 2] = x[:, 1].sin() + 0.3 * x[:, 2]
    return torch.cat((x, x.sum(-1, keepdim=True) + 0.1 * torch.randn(rows, 1)), -1).numpy()


class Table(IterableDataset):
    """Batches of a file of float32 rows, or this process's part of each; nothing else is in memory."""

    def __init__(self, path: str, rank: int, size: int) -> None:
        self.path, self.rank, self.size = path, rank, size

    def __iter__(self) -> Iterator[Tensor]:
        table = np.memmap(self.path, np.float32, "r").reshape(-1, 4)
        for begin in range(0, len(table), BATCH):
            part = np.array_split(table[begin : begin + BATCH], self.size)[self.rank]
            yield torch.from_numpy(np.array(part))


def learn_density(args: object, folder: Path, rank: int, size: int, device: torch.device) -> None:
    flow = pf.Flow(pf.maf(4)).to(device)
    validation, test = (torch.from_numpy(crescents(2000)) for _ in range(2))
    path = folder / "rows.bin"
    if rank == 0:
        with path.open("wb") as file:
            for _ in range(2 if args.smoke else 100):
                file.write(crescents(2 * BATCH if args.smoke else 10_000).tobytes())
    path = from_first(str(path))  # not before it is written
    loader = DataLoader(Table(path, rank, size), batch_size=None)
    begun = time.perf_counter()
    fit = pf.fit_density(
        flow, loader, validation, max_epochs=1 if args.smoke else 3, schedule="cosine", seed=args.seed, progress=False
    )
    seconds = time.perf_counter() - begun
    scores = gathered(fit.log_prob(test.tensor_split(size)[rank]))
    torch.manual_seed(args.seed + rank)  # other draws in each process
    draws = gathered(fit.sample((4000 // size,)))
    if rank == 0:
        print(f"Density: {fit.history['step'][-1]} steps of {BATCH} rows in {seconds:.1f} s, {size} processes")
        print(f"  log-likelihood of {len(scores)} rows not seen: {mean_of(scores)} nats")
        print(f"  last column minus the sum of the others, of {len(draws)} draws: ", end="")
        print(f"{(draws[:, 3] - draws[:, :3].sum(-1)).std():.2f}, in the data 0.10")


# 2. A posterior.


def regression(x: Tensor, y: Tensor) -> None:
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(weight * x).sum(-1)), obs=y)


def learn_posterior(args: object, rank: int, size: int, device: torch.device) -> None:
    x = torch.randn(500 if args.smoke else 10_000, 10, device=device)
    y = (torch.rand(len(x), device=device) < (x[:, 0] - x[:, 1]).sigmoid()).float()
    guide = AutoFlow(regression, seed=args.seed)
    begun = time.perf_counter()
    fit = fit_guide(guide, x, y, steps=3 if args.smoke else 300, progress=False)
    seconds = time.perf_counter() - begun
    if rank == 0:
        weight = fit.sample(4000)["weight"]
        mean, spread = weight.mean(0), weight.std(0)
        print(f"Posterior: {len(fit.history)} steps in {seconds:.1f} s, {size} processes; verdict: {fit.verdict.label}")
        print(f"  first weights: {mean[0]:.3f} ± {spread[0]:.3f} and {mean[1]:.3f} ± {spread[1]:.3f}, truth 1 and -1")


def main() -> None:
    args = command(__doc__, "tiny budgets", seed={"type": int, "default": 0})
    torch.set_num_threads(1)
    rank, size, device = join()
    torch.manual_seed(args.seed)  # the same flow, model and data in each
    with tempfile.TemporaryDirectory() as folder:
        learn_density(args, Path(folder), rank, size, device)
    torch.manual_seed(args.seed)
    learn_posterior(args, rank, size, device)
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
