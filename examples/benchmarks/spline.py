"""Rational-quadratic splines and neural spline flows, here and in the other libraries.

    python examples/benchmarks/spline.py                       # all tables; minutes
    python examples/benchmarks/spline.py --tables op           # the spline alone, forwards and backwards
    python examples/benchmarks/spline.py --tables sample       # samples of an autoregressive layer
    python examples/benchmarks/spline.py --tables train        # training steps
    python examples/benchmarks/spline.py --smoke

Eight bins on [-5, 5], the identity beyond; same networks, plain Adam, one thread.  Ratios above 1 mean that we are
faster: medians over rounds, least and greatest in brackets.  Needs the ``bench`` extra.
"""

import statistics

import torch
from _peers import Case, sizes
from _runs import Table, command, machine, markdown
from _spline_peers import BUILDERS, SPLINES, Task
from _timing import Bench, ratio, shown

OP = [Case(32, 0, 0, 100), Case(32, 0, 0, 1000), Case(128, 0, 0, 1000)]
SAMPLE = [Case(d, h, 1, b) for d, h in ((8, 64), (32, 256), (64, 512)) for b in (1, 100, 1000)]
TRAIN = [Case(8, 64, 3, b) for b in (100, 1000)] + [Case(21, 100, 5, b) for b in (100, 1000)]
TRAIN += [Case(32, 256, 3, 1000), Case(64, 512, 1, 1000)]
US = "pyro_flows"


class Tables:
    """Measures one table after another with the same workers."""

    def __init__(self, bench: Bench, peers: list[str], rounds: int, slow_rounds: int) -> None:
        self.bench = bench
        self.peers = peers
        self.rounds = rounds
        self.slow_rounds = slow_rounds

    def taking_part(self, *kinds: str) -> list[str]:
        return [peer for peer in self.peers if any(peer in BUILDERS[kind] for kind in kinds)]

    def build(self, kind: str, case: Case) -> None:
        self.bench.build(Task(kind, case), [US, *self.taking_part(kind)])

    def ratios(self, call: str, jobs: list[tuple[str, str] | None], rounds: int) -> list[str]:
        """Our time for a call, and the other times in units of it; "-" where there is nothing to compare."""
        figures = self.bench.time([(US, call), *filter(None, jobs)], rounds)
        row = [shown(statistics.median(figures[US, call]))]
        return row + ["-" if job is None else ratio(figures, job, (US, call)) for job in jobs]

    def op(self, cases: list[Case]) -> str:
        peers, calls = self.taking_part("op"), ("forward and backward", "forward", "inverse")
        table = Table("elements", "call", "ours", *(f"{peer} / ours" for peer in peers), "parameters last / ours")
        for case in cases:
            self.build("op", case)
            for call in calls:
                jobs = [*((peer, call) for peer in peers), (US, f"{call}, parameters last")]
                table.add(f"{case.batch * case.dim:,}", call, *self.ratios(call, jobs, self.rounds))
        return markdown(table.header, sorted(table.rows, key=lambda row: calls.index(row[1])))

    def sample(self, cases: list[Case]) -> str:
        peers = self.taking_part("autoregressive")
        table = Table("D, H, layers, batch", "ours", *(f"{peer} / ours" for peer in peers))
        for case in cases:
            self.build("autoregressive", case)
            rounds = self.slow_rounds if case.dim * case.batch >= 32_000 else self.rounds
            table.add(sizes(case), *self.ratios("sample", [(peer, "sample") for peer in peers], rounds))
        return str(table)

    def train(self, cases: list[Case]) -> str:
        kinds = ("coupling", "autoregressive")
        peers, counts = self.taking_part(*kinds), {}
        table = Table("kind", "D, H, layers, batch", "ours", *(f"{peer} / ours" for peer in peers))
        for kind in kinds:
            able = self.taking_part(kind)
            for case in cases:
                self.build(kind, case)
                jobs = [(peer, "train") if peer in able else None for peer in peers]
                table.add(kind, sizes(case), *self.ratios("train", jobs, self.rounds))
                names = [name if name in (US, *able) else None for name in (US, *peers)]
                counts[kind, f"{case.dim}, {case.width}, {case.layers}"] = [
                    f"{self.bench.value(name, 'parameters'):,}" if name else "-" for name in names
                ]
        widths = markdown(["kind", "D, H, layers", "ours", *peers], [[*key, *each] for key, each in counts.items()])
        return f"{table}\n\nparameters\n\n{widths}"


def main() -> None:
    args = command(
        __doc__,
        "small sizes, one round",
        tables={"nargs": "+", "choices": ["op", "sample", "train"], "default": ["op", "sample", "train"]},
        rounds={"type": int, "default": 5},
        slow_rounds={"type": int, "default": 2, "help": "rounds where a naive call takes seconds"},
        peers={"nargs": "+", "default": [n for n in SPLINES if n != US]},
    )
    cases = {"op": OP, "sample": SAMPLE, "train": TRAIN}
    if args.smoke:
        args.rounds, args.peers = 1, ["pyro"]
        cases = {"op": [Case(4, 0, 0, 10)], "sample": [Case(4, 32, 1, 10)], "train": [Case(4, 32, 2, 10)]}
    print(f"{machine()}; one thread, seed 0, float32, hidden layers [H, H], {args.rounds} rounds in turns\n")
    done = []
    with Bench([US, *args.peers], libraries=SPLINES) as bench:
        tables = Tables(bench, args.peers, args.rounds, min(args.rounds, args.slow_rounds))
        for name in args.tables:
            print(name)
            done.append(f"{name}\n\n{getattr(tables, name)(cases[name])}")
    print("\n" + "\n\n".join(done))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
