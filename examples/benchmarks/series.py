"""A step of a stream against the same by whole series: how much of a window's work the past's caches save.

    python examples/benchmarks/series.py
    python examples/benchmarks/series.py --smoke

For causal flows of series of ``T`` steps: the density of one more step given all before, by ``Stream.observe`` and by
one pass over the window; and one more draw, by ``Stream.step`` and by drawing the window once more.  All calls take
turns, in CPU seconds of one thread; what is shown are medians, and of ratios median, least and greatest over rounds.
"""

import statistics
from collections.abc import Callable

import torch
from _runs import Table, command, machine, shaken
from _timing import ratio, shown, spent

import pyro_flows as pf
from pyro_flows.infer import Stream

CHANNELS = 2
FLOWS: dict[str, Callable[[int], pf.Chain]] = {
    "mintnet": lambda times: pf.mintnet((CHANNELS, times), causal=True, num_layers=2, num_groups=8),
    "causal_maf": lambda times: pf.causal_maf((CHANNELS, times), num_layers=2, hidden_channels=32),
}


def calls_of(name: str, times: int, batch: int, seed: int) -> dict[str, Callable[[], object]]:
    """What is timed."""
    torch.manual_seed(seed)
    flow = shaken(pf.Flow(FLOWS[name](times)).eval(), 0.03)
    stream = Stream(flow, (batch,))
    window = flow.sample((batch,)).clone()  # its scores would be known else
    stream.observe(window)
    base = torch.randn(batch, CHANNELS, times)
    return {
        "observe": lambda: stream.observe(window[..., -1]),
        "whole density": torch.no_grad()(lambda: flow.log_prob(window)),
        "step": lambda: stream.step(base[..., -1]),
        "whole draw": torch.no_grad()(lambda: flow.chain.forward_and_ladj(base)),
    }


def measure(calls: dict[str, Callable[[], object]], rounds: int, target: float) -> dict[str, list[float]]:
    """Seconds of each call, one figure a round, in turns, after one round to warm up."""
    repeats = {name: max(1, min(200, int(target / max(spent(call, 2), 1e-6)))) for name, call in calls.items()}
    figures: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            figures[name].append(spent(call, repeats[name]))
    return figures


def main() -> None:
    args = command(
        __doc__,
        "small sizes, one round",
        times={"type": int, "nargs": "+", "default": [16, 64, 256, 1024]},
        batches={"type": int, "nargs": "+", "default": [1, 64]},
        rounds={"type": int, "default": 7},
        seed={"type": int, "default": 0},
    )
    target = 0.05
    if args.smoke:
        args.times, args.batches, args.rounds, target = [8], [1], 1, 0.0
    print(f"{machine()}; one thread, seed {args.seed}, float32, {CHANNELS} channels, {args.rounds} rounds in turns\n")
    header = ["flow", "batch", "T", "observe", "whole pass / observe", "step", "whole draw / step"]
    table = Table(*header)
    for name in FLOWS:
        for batch in args.batches:
            for times in args.times:
                figures = measure(calls_of(name, times, batch, args.seed), args.rounds, target)
                middle = [shown(statistics.median(figures[call])) for call in ("observe", "step")]
                ratios = ratio(figures, "whole density", "observe", 1), ratio(figures, "whole draw", "step", 1)
                table.add(name, str(batch), str(times), middle[0], ratios[0], middle[1], ratios[1])
    print(f"\n{table}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
