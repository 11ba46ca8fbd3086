"""Sampling by the depth of a graph found from data: a Markov chain of columns.

    python examples/benchmarks/adjacency.py
    python examples/benchmarks/adjacency.py --smoke

Rows of a Gaussian chain, each column correlated with the one before it, are fitted by one layer without an adjacency,
and with those that ``sparse_adjacency`` finds in the columns' order and in a shallow one.  *Missed* counts pairs of
neighbors without an edge.  Times are CPU time of one thread, in turns, medians; held-out scores are nats per row below
the true density's.
"""

import math
import statistics
import time

import torch
from _runs import Table, alone, between, command, machine
from _timing import shown, spent

import pyro_flows as pf


def chain(rows: int, size: int, correlation: float, seed: int) -> torch.Tensor:
    noise = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    for k in range(1, size):
        noise[:, k] = correlation * noise[:, k - 1] + math.sqrt(1 - correlation**2) * noise[:, k]
    return noise


def true_score(rows: torch.Tensor, correlation: float) -> float:
    ahead = (rows[:, 1:] - correlation * rows[:, :-1]) / math.sqrt(1 - correlation**2)
    values = torch.cat([rows[:, :1], ahead], 1)
    slope = (rows.shape[1] - 1) * 0.5 * math.log(1 - correlation**2)
    return float((-0.5 * values.square() - 0.5 * math.log(2 * math.pi)).sum(1).mean()) - slope


def main() -> None:
    args = command(
        __doc__,
        "16 columns",
        columns={"type": int, "default": 1000},
        rows={"type": int, "default": 4000},
        width={"type": int, "default": 2000},
        correlation={"type": float, "default": 0.8},
        steps={"type": int, "default": 300},
        rounds={"type": int, "default": 5},
    )
    if args.smoke:
        args.columns, args.rows, args.width, args.steps, args.rounds = 16, 500, 32, 20, 1
    alone()
    print(f"{machine()}; one thread, seed 0, float32, {args.columns} columns, {args.rows} rows\n")
    data = chain(args.rows, args.columns, args.correlation, 0)
    test = chain(1000, args.columns, args.correlation, 1)
    first = torch.diag(torch.ones(args.columns - 1), -1).bool()
    graphs, found = {"none": None}, {"none": ("-", "-", "-")}
    for order in ("identity", "shallow"):
        begin = time.process_time()
        graph = pf.infer.sparse_adjacency(data, order=order)
        took = time.process_time() - begin
        missed = int((first & ~(graph | graph.T)).sum())
        graphs[order], found[order] = graph, (str(int(graph.sum())), str(missed), f"{took:.1f} s")
    flows, scores = {}, {}
    for name, graph in graphs.items():
        torch.manual_seed(0)
        flow = pf.maf(args.columns, num_layers=1, hidden_dims=(args.width,), adjacency=graph)
        fit = pf.fit_density(flow, data, steps=args.steps, batch_size=256, progress=False, compile=False)
        flows[name], scores[name] = fit.distribution.eval(), true_score(test, args.correlation)
        scores[name] -= fit.log_prob(test).double().mean().item()
    times: dict[tuple[str, int], list[float]] = {(name, n): [] for name in flows for n in (1, 100)}
    for k in range(args.rounds + 1):
        for (name, count), each in times.items():
            taken = spent(lambda flow=flows[name], count=count: flow.sample((count,)))
            each += [taken] if k else []
    table = Table(
        "adjacency", "edges", "missed", "finding it", "sampling", "below the truth", "1 draw", "speed-up", "100 draws",
        "speed-up",
    )  # fmt: skip
    for name, flow in flows.items():
        cells = []
        for count in (1, 100):
            ratios = [a / b for a, b in zip(times["none", count], times[name, count], strict=True)]
            cells += [shown(statistics.median(times[name, count])), between(ratios)]
        table.add(name, *found[name], flow.chain[0].sampling_cost, f"{scores[name]:.2f}", *cells)
    print(table)


if __name__ == "__main__":
    main()
