"""Forecasts of a real series: causal flows and ``ConvMADE`` against autoregressions, on years that none has seen.

    python examples/series.py                  # sunspots: prints a table, leaves series.png in out/
    python examples/series.py --data elnino    # monthly sea surface temperatures
    python examples/series.py --smoke          # the same in seconds, with a budget too small to mean anything

Sunspots go by square roots, whose spread depends less on the level, and temperatures by their difference from the mean
of their month in the years of training.  Flows, and a ``ConvMADE`` by convolutions, a GRU and attention, learn windows
of the first part of the series and are stopped early by the next part; autoregressions are fitted to both.  Then every
model goes through the rest step by step: the density of what came next, and draws of the steps to come from every
origin.  Where ``statsmodels`` is installed (the ``bench`` extra) its ARMA model of the best BIC takes part.  About five
minutes on one CPU core.
"""

import math
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _script import FLOW, FOLDER, TRUTH, begin, save
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.distributions import Normal

import pyro_flows as pf
from pyro_flows.distributions import NormalHead
from pyro_flows.infer import Stream

MOST_LAGS = 24
WINDOW = 60


class Series(NamedTuple):
    """Numbers as models see them; training ends at ``train``, what early stopping judges by at ``known``."""

    z: Tensor
    train: int
    known: int
    start: int
    unit: str
    ahead: int


class Scores(NamedTuple):
    """Means over the steps after ``known``: log-density, CRPS, coverage of 80 % intervals."""

    log_prob: float
    crps: float
    coverage: float


def load(name: str) -> Series:
    numbers = torch.from_numpy(np.load(FOLDER / "series.npz")[name])
    if name == "sunspots":
        return Series(numbers.sqrt(), 200, 230, 1700, "square root of the sunspot number", 8)
    months = numbers.view(-1, 12)
    return Series((months - months[:44].mean(0)).flatten(), 44 * 12, 49 * 12, 0, "degrees Celsius above usual", 12)


def crps(draws: Tensor, truth: Tensor) -> Tensor:
    """From draws along the first dimension, without bias: E|X - y| - E|X - X'| / 2."""
    n = len(draws)
    ordered = draws.sort(0).values
    rank = 2 * torch.arange(1, n + 1).view(-1, *[1] * truth.dim()) - n - 1
    return (draws - truth).abs().mean(0) - (rank * ordered).sum(0) / (n * (n - 1))


def judge(series: Series, log_prob: Tensor, draws: Callable[[int], Tensor]) -> Scores:
    """``log_prob``: of each step given those before; ``draws``: from an origin to ``(n, ahead)`` of what follows."""
    losses, hits = [], []
    for origin in range(series.known, len(series.z) - series.ahead + 1):
        ahead, truth = draws(origin), series.z[origin : origin + series.ahead]
        low, high = torch.quantile(ahead, torch.tensor([0.1, 0.9]), 0)
        losses.append(crps(ahead, truth))
        hits.append(((truth >= low) & (truth <= high)).float())
    after = log_prob[series.known :].mean()
    return Scores(float(after), float(torch.stack(losses).mean()), float(torch.stack(hits).mean()))


def autoregression(series: Series, n: int, criterion: str) -> Scores:
    """Gaussian AR(p) by least squares on all that is known, p by BIC or AIC."""
    z, first = series.z.double(), MOST_LAGS

    def lags(p: int, end: int) -> Tensor:
        return torch.stack([torch.ones(end - first).double(), *(z[first - k : end - k] for k in range(1, p + 1))], 1)

    def fit(p: int) -> tuple[float, Tensor, Tensor]:
        x, y = lags(p, series.known), z[first : series.known]
        weights = torch.linalg.lstsq(x, y).solution
        scale = (y - x @ weights).square().mean().sqrt()
        price = math.log(len(y)) if criterion == "BIC" else 2
        return float(2 * len(y) * scale.log() + (p + 2) * price), weights, scale

    _, weights, scale = min((fit(p) for p in range(1, MOST_LAGS + 1)), key=lambda each: each[0])
    log_prob = torch.full_like(z, torch.nan)
    log_prob[first:] = Normal(lags(len(weights) - 1, len(z)) @ weights, scale).log_prob(z[first:])

    def draws(origin: int) -> Tensor:
        past = z[origin - len(weights) + 1 : origin].repeat(n, 1)
        for _ in range(series.ahead):
            mean = weights[0] + past[:, -len(weights) + 1 :].flip(1) @ weights[1:]
            past = torch.cat((past, (mean + scale * torch.randn(n).double())[:, None]), 1)
        return past[:, -series.ahead :].float()

    print(f"AR: {len(weights) - 1} lags by {criterion}")
    return judge(series, log_prob, draws)


def arma(series: Series, n: int) -> Scores:
    """ARMA(p, q) of statsmodels, by BIC among p <= 4 and q <= 3."""
    from statsmodels.tsa.arima.model import ARIMA

    z = series.z.double().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fits = [ARIMA(z[: series.known], order=(p, 0, q)).fit() for p in range(5) for q in range(4)]
        best = min(fits, key=lambda fit: fit.bic)
        whole = best.apply(z)
        frame = whole.get_prediction()
        log_prob = Normal(torch.tensor(frame.predicted_mean), torch.tensor(frame.se_mean)).log_prob(torch.tensor(z))

        def draws(origin: int) -> Tensor:
            ahead = best.apply(z[:origin]).get_forecast(series.ahead)
            mean, scale = (torch.tensor(each).float() for each in (ahead.predicted_mean, ahead.se_mean))
            return mean + scale * torch.randn(n, series.ahead)

        print(f"ARMA: order {best.model.order[0]}, {best.model.order[2]} by BIC")
        return judge(series, log_prob, draws)


class Learner(NamedTuple):
    build: Callable[[tuple[int, int]], pf.Chain | pf.ConvMADE]
    weight_decay: float


# The bound of scales, and the activation that contains outliers, of causal_maf.
CONDITIONALS = partial(pf.ConvMADE, head=NormalHead(1.0), positions=False, activation=("isru", "silu"))
LEARNERS = {
    "mintnet": Learner(partial(pf.mintnet, causal=True, num_layers=1, num_groups=4, kernel_size=7, dilations=1), 0.3),
    "causal_maf": Learner(
        partial(
            pf.causal_maf,
            num_layers=1,
            hidden_channels=6,
            num_convolutions=2,
            kernel_size=12,
            dilations=1,
            max_log_scale=1.0,
        ),
        1.0,
    ),
    "ConvMADE, convolutions": Learner(
        partial(CONDITIONALS, hidden_channels=6, num_layers=2, kernel_size=12, dilations=1), 0.3
    ),
    "ConvMADE, GRU": Learner(partial(CONDITIONALS, network="gru", hidden_channels=8), 0.3),
    "ConvMADE, attention": Learner(
        partial(CONDITIONALS, network="attention", hidden_channels=8, num_heads=2, window=12), 0.3
    ),
}


def learn(series: Series, learner: Learner, seed: int, budget: dict[str, object]) -> pf.Flow | nn.Module:
    """Fits to all windows of the first part; what judges are windows of which at least a third lies in the next."""
    torch.manual_seed(seed)
    z = series.z[None]  # one channel
    model = learner.build((1, WINDOW))
    windows = z[:, : series.train].unfold(1, WINDOW, 1).movedim(1, 0)  # shape (windows, 1, WINDOW)
    held_out = z[:, series.train - 2 * WINDOW // 3 : series.known].unfold(1, WINDOW, 1).movedim(1, 0)
    options = {"batch_size": 64, "weight_decay": learner.weight_decay, "patience": 20, "seed": seed, "progress": False}
    return pf.fit_density(model, windows, held_out, standardize=True, **options, **budget).distribution


def forecasts(series: Series, flow: pf.Flow | nn.Module, n: int) -> Scores:
    stream = Stream(flow)
    log_prob = stream.observe(series.z[None])
    stream = Stream(flow)
    stream.observe(series.z[None, : series.known])

    def draws(origin: int) -> Tensor:
        ahead = stream.forecast(series.ahead, n)[:, 0]  # (n, steps)
        stream.observe(series.z[None, origin])
        return ahead

    return judge(series, log_prob, draws)


def draw(series: Series, flow: pf.Flow, path: Path, n: int) -> None:
    """What the flow thought would come, from three origins, and what came."""
    shown, steps = len(series.z) - 100, 11 if series.start else 24
    time = np.arange(len(series.z)) + series.start if series.start else 1950 + np.arange(len(series.z)) / 12
    fig, ax = plt.subplots(figsize=(8, 3.8), layout="constrained")
    ax.plot(time[shown:], series.z[shown:], color=TRUTH, lw=1.1, label="measured")
    first = max(series.known, shown + 10)
    for origin in np.linspace(first, len(series.z) - steps - 1, 3).astype(int):
        stream = Stream(flow)
        stream.observe(series.z[None, :origin])
        ahead = stream.forecast(steps, n)[:, 0]
        known = series.z[origin - 1].expand(n, 1)
        levels = torch.quantile(torch.cat((known, ahead), 1), torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]), 0)
        when, last = time[origin - 1 : origin + steps], origin == len(series.z) - steps - 1
        for (low, high), alpha, name in (((1, 3), 0.3, "50 % of draws"), ((0, 4), 0.18, "80 % of draws")):
            ax.fill_between(
                when, levels[low], levels[high], color=FLOW, alpha=alpha, lw=0, label=name if last else None
            )
        ax.plot(when, levels[2], color=FLOW, lw=1.4, label="forecast: median of draws" if last else None)
        ax.axvline(time[origin - 1], color=FLOW, lw=1, ls=":", label="forecast begins" if last else None)
    ax.set(xlabel="year", ylabel=series.unit)
    fig.legend(loc="outside upper center", ncols=3)
    save(fig, path, 128)


def row(name: str, scores: list[Scores]) -> str:
    """Mean over seeds, and half of the range where there are several."""
    cells = []
    for each in zip(*scores, strict=True):
        spread = f" ± {(max(each) - min(each)) / 2:.3f}" if len(each) > 1 else ""
        cells.append(f"{statistics.mean(each):.3f}{spread}")
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    args = begin(
        __doc__,
        data={"choices": ("sunspots", "elnino"), "default": "sunspots"},
        models={"nargs": "+", "choices": list(LEARNERS), "default": list(LEARNERS), "metavar": "MODEL"},
        seeds={"type": int, "default": 3},
    )
    series = load(args.data)
    if args.smoke:
        series = series._replace(known=len(series.z) - 2 * series.ahead)
    n, budget, seeds = (20, {"steps": 4}, 1) if args.smoke else (200, {"steps": 1500}, args.seeds)
    torch.manual_seed(0)
    table = [row(f"AR by {each}", [autoregression(series, n, each)]) for each in ("BIC", "AIC")]
    if not args.smoke and find_spec("statsmodels"):
        table.append(row("ARMA by BIC", [arma(series, n)]))
    for k, name in enumerate(args.models):
        scores = []
        for seed in range(seeds):
            flow = learn(series, LEARNERS[name], seed, budget)
            scores.append(forecasts(series, flow, n))
            if k == seed == 0:
                draw(series, flow, args.out / "series.png", 10 * n)
        count = sum(p.numel() for p in flow.parameters())
        reach = getattr(flow, "chain", getattr(flow, "module", None)).reach
        table.append(row(f"{name}, {count} numbers, reach {'all' if reach is None else reach}", scores))
        print(table[-1], flush=True)
    size = len(series.z) - series.known
    print(f"\n{args.data}: the last {size} steps, {series.ahead} ahead from each; {seeds} seeds (± half of the range)")
    print("| model | log-density, nats | CRPS | within the 80 % interval |\n|---|---|---|---|", *table, sep="\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
