"""A step of a stream against the same by whole series: how much of a window's work the past's caches save.

    python examples/benchmarks/series.py
    python examples/benchmarks/series.py --smoke

For causal flows of series of ``T`` steps, and for ``ConvMADE`` by each of its networks: the density of one more step
given all before, by ``Stream.observe`` and by one pass over the window; and one more draw, by ``Stream.step`` (of a
``ConvMADE``, ``Stream.sample``) and by drawing the window once more.  All calls take turns, in CPU seconds of one
thread; what is shown are medians, and of ratios median, least and greatest over rounds.
"""

import statistics
from collections.abc import Callable

import torch
from _runs import Table, command, machine, shaken
from _timing import ratio, shown, spent

import pyro_flows as pf
from pyro_flows.infer import Stream

CHANNELS = 2


def made(times: int, **options: object) -> pf.ConvMADE:
    return pf.ConvMADE((CHANNELS, times), "normal", positions=False, hidden_channels=32, **options)


MODELS: dict[str, Callable[[int], pf.Flow | pf.ConvMADE]] = {
    "mintnet": lambda times: pf.Flow(pf.mintnet((CHANNELS, times), causal=True, num_layers=2, num_groups=8)),
    "causal_maf": lambda times: pf.Flow(pf.causal_maf((CHANNELS, times), num_layers=2, hidden_channels=32)),
    "ConvMADE, convolutions": lambda times: made(times, num_layers=4, dilations=(1, 2, 4)),
    "ConvMADE, GRU": lambda times: made(times, network="gru"),
    "ConvMADE, attention to 64": lambda times: made(times, network="attention", window=64),
}


def calls_of(name: str, times: int, batch: int, seed: int) -> dict[str, Callable[[], object]]:
    """What is timed."""
    torch.manual_seed(seed)
    model = shaken(MODELS[name](times).eval(), 0.03)
    stream = Stream(model, (batch,))
    window = model.sample((batch,)).clone()  # its scores would be known else
    stream.observe(window)
    base = torch.randn(batch, CHANNELS, times)
    calls: dict[str, Callable[[], object]] = {
        "observe": lambda: stream.observe(window[..., -1]),
        "whole density": torch.no_grad()(lambda: model.log_prob(window)),
    }
    if isinstance(model, pf.Flow):
        calls["step"] = lambda: stream.step(base[..., -1])
        calls["whole draw"] = torch.no_grad()(lambda: model.chain.forward_and_ladj(base))
    else:
        calls |= {"step": stream.sample, "whole draw": lambda: model.sample((batch,))}
    return calls


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
        models={"nargs": "+", "choices": list(MODELS), "default": list(MODELS)},
        times={"type": int, "nargs": "+", "default": [16, 64, 256, 1024]},
        batches={"type": int, "nargs": "+", "default": [1, 64]},
        rounds={"type": int, "default": 7},
        seed={"type": int, "default": 0},
    )
    target = 0.05
    if args.smoke:
        args.times, args.batches, args.rounds, target = [8], [1], 1, 0.0
    print(f"{machine()}; one thread, seed {args.seed}, float32, {CHANNELS} channels, {args.rounds} rounds in turns\n")
    header = ["model", "batch", "T", "observe", "whole pass / observe", "step", "whole draw / step"]
    table = Table(*header)
    for name in args.models:
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
