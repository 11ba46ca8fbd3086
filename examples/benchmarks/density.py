"""Density and training step of masked autoregressive flows, here and in the other libraries.

    python examples/benchmarks/density.py                       # log_prob and training step, one-layer grid
    python examples/benchmarks/density.py --flows               # five-layer flows of the MAF paper's sizes
    python examples/benchmarks/density.py --smoke

Same architecture, plain Adam, one thread.  Ratios above 1 mean that we are faster.  Needs the ``bench`` extra.
"""

import statistics

import torch
from _peers import LIBRARIES, Case, sizes
from _runs import Table, command, machine, markdown
from _timing import Bench, ratio, shown

GRID = [(8, 64, b) for b in (1, 100, 1000, 10000)]
GRID += [(32, 256, b) for b in (1, 100, 1000, 10000)]
GRID += [(d, min(8 * d, 1024), b) for d in (64, 128, 512) for b in (1, 100, 1000)]


def main() -> None:
    args = command(
        __doc__,
        "small sizes, one round",
        flows={"action": "store_true", "help": "five-layer flows instead of one layer"},
        calls={"nargs": "+", "default": ["log_prob", "train"]},
        rounds={"type": int, "default": 7},
        peers={"nargs": "+", "default": [n for n in LIBRARIES if n != "pyro_flows"]},
    )
    cases = [Case(d, h, 1, b) for d, h, b in GRID]
    if args.flows:
        cases = [Case(d, h, 5, 100) for d in (6, 8, 21, 43, 63) for h in (100, 512)]
        cases += [Case(6, 100, 5, 1000), Case(63, 512, 5, 1000)]
    if args.smoke:
        args.rounds, args.peers, cases = 1, ["pyro"], [Case(4, 32, 1, 10)]
    print(f"{machine()}; one thread, seed 0, float32, hidden layers [H, H], {args.rounds} rounds in turns\n")
    with Bench(["pyro_flows", *args.peers]) as bench:
        table = Table("D, H, layers, batch", "call", "ours", *(f"{peer} / ours" for peer in args.peers))
        for case in cases:
            bench.build(case, ["pyro_flows", *args.peers])
            for call in args.calls:
                jobs = [(name, call) for name in ("pyro_flows", *args.peers)]
                figures = bench.time(jobs, args.rounds)
                ours = shown(statistics.median(figures[jobs[0]]))
                table.add(sizes(case), call, ours, *(ratio(figures, job, jobs[0], 2) for job in jobs[1:]))
    print("\n" + markdown(table.header, sorted(table.rows, key=lambda row: row[1])))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
