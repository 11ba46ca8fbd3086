"""Scale: sampling with very many dimensions, and with very many samples.

    python examples/benchmarks/scale.py
    python examples/benchmarks/scale.py --smoke

First the cost per sample and the peak memory for up to a million samples in one call; then the exact inverse of one
layer with 1024 hidden units against one dense pass of the same network, up to 10,000 dimensions.
"""

import itertools
import resource
import statistics

import torch
from _runs import Table, between, command, machine
from _timing import shown, spent
from torch import nn

import pyro_flows as pf


def dimensions(dims: list[int], width: int, batch: int, rounds: int) -> None:
    table = Table("D", "steps", "inverse", "inverse / dense pass", "round trip, relative")
    for dim in dims:
        torch.manual_seed(0)
        layer = pf.Autoregressive(dim, hidden_dims=(width, width), activation="relu")
        with torch.no_grad():
            layer.net.tensors()[0][-1].normal_(std=width**-0.5 / 3)
        sizes = (dim, width, width, 2 * dim)
        linear = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        dense = nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2])
        z = torch.randn(batch, dim)
        with torch.no_grad():
            x, _ = layer.forward_and_ladj(z)
            back, _ = layer.inverse_and_ladj(x)
            error = ((back - z).abs() / (1 + z.abs())).max().item()
            layer.forward_and_ladj(z), dense(z)
            pairs = [(spent(lambda: layer.forward_and_ladj(z)), spent(lambda: dense(z))) for _ in range(rounds)]  # noqa: B023
        times = shown(statistics.median(a for a, _ in pairs)), between([a / b for a, b in pairs])
        table.add(str(dim), str(layer.net.structure.num_steps), *times, f"{error:.1e}")
    print(table)


def samples(counts: list[int], dim: int, width: int) -> None:
    torch.manual_seed(0)
    layer = pf.Autoregressive(dim, hidden_dims=(width, width), activation="relu")
    table = Table("samples", "per sample", "peak memory grew by", "input and output alone")
    for count in counts:
        z = torch.randn(count, dim)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with torch.no_grad():
            taken = min(spent(lambda: layer.forward_and_ladj(z)) for _ in range(3))  # noqa: B023
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        held = 2 * z.nbytes / 2**20
        table.add(f"{count:,}", f"{taken / count * 1e9:.0f} ns", f"{grown:.0f} MB", f"{held:.0f} MB")
    print(f"{table}\n")


def main() -> None:
    args = command(__doc__, "small sizes, one round")
    print(f"{machine()}; one thread, seed 0, float32\n")
    if args.smoke:
        samples([100, 2000], 4, 16)
        dimensions([20], 16, 10, 1)
    else:
        samples([1000, 10_000, 100_000, 1_000_000], 32, 256)
        dimensions([100, 1000, 3000, 10_000], 1024, 1000, 3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
