"""Gradient through the slow direction of a masked autoregressive flow, with respect to inputs and parameters.

    python examples/benchmarks/gradient.py
    python examples/benchmarks/gradient.py --smoke

The other libraries differentiate the loop of their inverse; here one reverse sweep does it.  Beside the ratio to each
of them stand the ratio of our gradient to one forward and backward pass of Pyro's own density, and the bytes that each
keeps for its backward pass.  Needs the ``bench`` extra.
"""

import statistics

import torch
from _peers import LIBRARIES, Case, sizes
from _runs import Table, command, machine
from _timing import Bench, kept, ratio, shown


def saved_bytes(name: str, case: Case) -> int:
    """Bytes of distinct storages that autograd keeps for the gradient through the inverse."""
    torch.manual_seed(0)
    return kept(LIBRARIES[name](case)["sample_gradient"])


def main() -> None:
    args = command(
        __doc__,
        "small sizes, one round",
        dims={"type": int, "nargs": "+", "default": [8, 32, 64, 128]},
        batches={"type": int, "nargs": "+", "default": [1, 100, 1000]},
        rounds={"type": int, "default": 5},
        peers={"nargs": "+", "default": ["pyro", "zuko", "nflows"]},
    )
    cases = [Case(dim, min(8 * dim, 1024), 1, batch) for dim in args.dims for batch in args.batches]
    cases = [case for case in cases if case.dim * case.batch <= 64_000]
    if args.smoke:
        args.rounds, args.peers, cases = 1, ["pyro"], [Case(4, 32, 1, 10)]
    print(f"{machine()}; one thread, seed 0, float32, hidden layers [H, H], {args.rounds} rounds in turns\n")
    header = ["D, H, layers, batch", "ours", "ours / pyro density fwd+bwd", "kept here", "kept by pyro"]
    table = Table(*header, *(f"{peer} / ours" for peer in args.peers))
    with Bench(["pyro_flows", *args.peers]) as bench:
        for case in cases:
            bench.build(case, ["pyro_flows", *args.peers])
            jobs = [("pyro_flows", "sample_gradient"), ("pyro", "density_gradient")]
            jobs += [(peer, "sample_gradient") for peer in args.peers]
            rounds = min(args.rounds, 3) if case.dim * case.batch >= 64_000 else args.rounds
            figures = bench.time(jobs, rounds)
            row = [shown(statistics.median(figures[jobs[0]])), ratio(figures, jobs[0], jobs[1], 2)]
            row += [f"{saved_bytes(name, case) / 2**20:.2f} MB" for name in ("pyro_flows", "pyro")]
            table.add(sizes(case), *row, *(ratio(figures, job, jobs[0], 1) for job in jobs[2:]))
    print(f"\n{table}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
