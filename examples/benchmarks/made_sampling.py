"""Draws of a MADE by one sweep, against the way of one pass for each dimension, in turns.

    python examples/benchmarks/made_sampling.py            # about five minutes
    python examples/benchmarks/made_sampling.py --smoke    # seconds, on sizes too small to mean anything

Binary dimensions, two weights sets each: with and without the direct linear layer.  CPU seconds of one thread; ratios
are medians over rounds, with the least and the greatest.  *Pass* is one evaluation of the density.  That the
two ways draw the same numbers from the same noise is a test.
"""

import statistics

import torch
from _runs import Table, alone, between, command, machine, shaken
from _timing import spent
from torch import Size, Tensor

import pyro_flows as pf


def by_passes(made: pf.MADE, rows: int) -> Tensor:
    """One dimension after the other, each by a pass of the whole network."""
    member = made.member(0)
    x = torch.zeros(rows, made.input_dim)
    for dim in member.order:
        x[:, dim] = torch.bernoulli(torch.sigmoid(made.params(x, None, member)[:, dim, 0]))
    return x


def main() -> None:
    args = command(
        __doc__,
        "sizes and budgets too small to mean anything",
        rounds={"type": int, "default": 3},
        seed={"type": int, "default": 0},
    )
    alone()
    sizes = [(16, (32,), 10)] if args.smoke else [(100, (500,), 100), (784, (500,), 1), (784, (500,), 100)]
    sizes += [] if args.smoke else [(784, (500, 500), 100), (784, (500,), 1000)]
    print(f"{machine()}; one thread, seed {args.seed}, float32, {args.rounds} rounds in turns\n")
    table = Table("D, hidden, direct, batch", "sweep", "sweep / pass", "D passes / sweep")
    for dims, hidden, batch in sizes:
        for direct in (False, True):
            torch.manual_seed(args.seed)
            made = shaken(pf.MADE(dims, hidden_dims=hidden, direct=direct, seed=args.seed).eval(), 0.05)
            with torch.no_grad():
                x = made.sample((batch,))
                taken = []
                for _ in range(args.rounds):
                    sweep = spent(lambda m=made, b=batch: m.draw(Size((b,)), None), 5)
                    one = spent(lambda m=made, v=x: m.score(v, None), 5)
                    naive = spent(lambda m=made, b=batch: by_passes(m, b), 1)
                    taken.append((sweep, sweep / one, naive / sweep))
            sweep, passes, ratio = (list(column) for column in zip(*taken, strict=True))
            case = f"{dims}, {list(hidden)}, {'yes' if direct else 'no'}, {batch}"
            times = f"{statistics.median(sweep) * 1e3:.1f} ms", f"{statistics.median(passes):.1f}", between(ratio, 0)
            table.add(case, *times)
    print(f"\n{table}")


if __name__ == "__main__":
    main()
