"""Sampling from a masked autoregressive flow: the exact inverse here and in the other libraries.

    python examples/benchmarks/inverse.py                 # one layer, all sizes; minutes
    python examples/benchmarks/inverse.py --flows         # five-layer flows of the MAF paper's sizes
    python examples/benchmarks/inverse.py --smoke         # seconds, on small sizes

Needs the ``bench`` extra.  Prints a table; ratios are medians over rounds, least and greatest in brackets.
"""

import statistics

import torch
from _peers import LIBRARIES, Case, sizes
from _runs import Table, command, machine
from _timing import Bench, ratio, shown


def main() -> None:
    args = command(
        __doc__,
        "small sizes, one round",
        flows={"action": "store_true", "help": "five-layer flows instead of one layer"},
        dims={"type": int, "nargs": "+", "default": [8, 32, 64, 128, 512]},
        batches={"type": int, "nargs": "+", "default": [1, 100, 1000]},
        rounds={"type": int, "default": 5},
        peers={"nargs": "+", "default": [n for n in LIBRARIES if n != "pyro_flows"]},
        slow_rounds={"type": int, "default": 2, "help": "rounds where a naive call takes seconds"},
    )
    cases = [Case(dim, min(8 * dim, 1024), 1, batch) for dim in args.dims for batch in args.batches]
    if args.flows:
        cases = [Case(d, h, 5, b) for h in (100, 512) for d in (6, 8, 21, 43, 63) for b in args.batches]
    if args.smoke:
        args.rounds, args.peers = 1, ["pyro"]
        cases = [Case(4, 32, 1, 10), Case(4, 32, 5, 10)]
    print(f"{machine()}; one thread, seed 0, float32, hidden layers [H, H], {args.rounds} rounds in turns\n")
    header = ["D, H, layers, batch", "ours", "ours / dense pass", "ours / our log_prob"]
    table = Table(*header, *(f"{peer} / ours" for peer in args.peers))
    with Bench(["pyro_flows", *args.peers]) as bench:
        for case in cases:
            heavy = case.dim * case.batch >= 128_000
            # Where one naive call takes half a minute, one library stands for all of them.
            peers = args.peers[:1] if case.dim >= 512 and case.batch >= 1000 else args.peers
            bench.build(case, ["pyro_flows", *peers])
            jobs = [("pyro_flows", call) for call in ("sample", "dense_pass", "log_prob")]
            jobs += [(peer, "sample") for peer in peers]
            figures = bench.time(jobs, args.slow_rounds if heavy else args.rounds)
            row = [shown(statistics.median(figures[jobs[0]]))]
            row += [ratio(figures, jobs[0], job, 2) for job in jobs[1:3]]
            row += [ratio(figures, job, jobs[0], 1) for job in jobs[3:]]
            table.add(sizes(case), *row, *["-"] * (len(args.peers) - len(peers)))
    print(f"\n{table}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
