"""From a guide to draws of the posterior: thin curves, whose ends a guide cuts off and weights cannot bring back.

    python examples/refine.py              # prints a table, leaves guides_refine.png in out/
    python examples/refine.py --smoke      # the same in seconds, with budgets too small to mean anything

A boat is 4 km from a lighthouse, give or take 200 m, in no known direction: a ring.  A ball flew 20 m, give or take 20
cm, thrown at no known speed and angle: slow and at 45 degrees, or fast and flat, or fast and steep, a thin bend.
``fit_guide`` has three seconds for each, ``refine`` ten more at most.  A sum over a grid gives the exact answer.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from _script import FLOW, OTHER, TRUTH, begin, save
from matplotlib import pyplot as plt
from torch import Tensor

from pyro_flows.infer import AutoFlow, GuideFit, fit_guide

Model = Callable[[], None]


def boat() -> None:
    """East and north of a lighthouse, in kilometers."""
    east = pyro.sample("east", dist.Normal(0.0, 4.0))
    north = pyro.sample("north", dist.Normal(0.0, 4.0))
    pyro.sample("distance", dist.Normal((east.square() + north.square()).sqrt(), 0.2), obs=torch.tensor(4.0))


def throw() -> None:
    """Speed in meters a second and angle in degrees of a throw."""
    speed = pyro.sample("speed", dist.Normal(22.0, 6.0))
    angle = pyro.sample("angle", dist.Normal(45.0, 18.0))
    flight = speed.square() * (angle * math.pi / 90).sin() / 9.81
    pyro.sample("flight", dist.Normal(flight, 0.2), obs=torch.tensor(20.0))


GRIDS = {boat: ((-5.2, 5.2), (-5.2, 5.2)), throw: ((10.0, 45.0), (0.0, 90.0))}


def exact(model: Model, n: int) -> tuple[tuple[str, str], list[Tensor], Tensor]:
    """Names, axes and probabilities of the two latents on a grid."""
    axes = [torch.linspace(*ends, n) for ends in GRIDS[model]]
    trace = pyro.poutine.trace(model).get_trace()
    first, second = (name for name, site in trace.nodes.items() if site["type"] == "sample" and not site["is_observed"])
    given = pyro.condition(model, {first: axes[0].unsqueeze(-1).expand(n, n), second: axes[1].expand(n, n)})
    found = pyro.poutine.trace(given).get_trace()
    found.compute_log_prob()
    log_p = sum(site["log_prob"] for site in found.nodes.values() if site["type"] == "sample")
    return (first, second), axes, log_p.flatten().softmax(0).reshape(n, n)


def wrong(draws: dict[str, Tensor], names: tuple[str, str], axes: list[Tensor], table: Tensor) -> tuple[float, float]:
    """Largest error of a mean in exact standard deviations, and of a standard deviation in parts."""
    errors = []
    for k, name in enumerate(names):
        share = table.sum(1 - k)
        mean = (share * axes[k]).sum()
        width = (share * (axes[k] - mean).square()).sum().sqrt()
        errors.append((float((draws[name].mean() - mean).abs() / width), abs(float(draws[name].std() / width) - 1)))
    return max(e for e, _ in errors), max(e for _, e in errors)


def panels(row: list, model: Model, fits: dict[str, dict[str, Tensor]], labels: list[str]) -> None:
    names, axes, _ = exact(model, 10)
    for ax, (name, draws), label in zip(row, fits.items(), labels, strict=True):
        color = {"refined": FLOW, "exact": TRUTH}.get(name, OTHER)
        ax.scatter(*(draws[each] for each in names), s=2, color=color, alpha=0.4, linewidths=0)
        ax.set(xlim=(axes[0][0], axes[0][-1]), ylim=(axes[1][0], axes[1][-1]), xlabel=names[0], ylabel=names[1])
        ax.set_title(label, color=color)


def refine(fit: GuideFit, smoke: bool) -> GuideFit:
    return fit.refine(moves=4, progress=False) if smoke else fit.refine(seconds=10.0)


def main() -> None:
    args = begin(__doc__)
    torch.set_default_dtype(torch.float64)
    n = 200 if args.smoke else 3000
    fig, rows = plt.subplots(2, 4, figsize=(12.4, 6.2), layout="constrained")
    print(f"{'errors of':<26}{'means':>8}{'sds':>8}   verdict")
    for row, model in zip(rows, (boat, throw), strict=True):
        names, axes, table = exact(model, 300 if args.smoke else 1500)
        guide = AutoFlow(model, seed=args.seed)
        fit = fit_guide(guide, steps=20, progress=False) if args.smoke else fit_guide(guide, seconds=3.0)
        better = refine(fit, args.smoke)
        cells = torch.multinomial(table.flatten(), n, replacement=True)
        truth = dict(zip(names, (axes[0][cells // len(axes[1])], axes[1][cells % len(axes[1])]), strict=True))
        several = {
            "guide": fit.sample(n),
            "resampled": fit.sample(n, resampled=True),
            "refined": better.sample(n),
            "exact": truth,
        }
        verdicts = {"guide": fit.verdict.label, "refined": better.verdict.label}
        for name, draws in list(several.items())[:3]:
            mean, width = wrong(draws, names, axes, table)
            print(f"  {f'{model.__name__}, {name}':<24}{mean:8.3f}{width:8.3f}   {verdicts.get(name, '')}")
        print(better.verdict)
        labels = [f"{name}: “{verdicts[name]}”" if name in verdicts else name for name in several]
        panels(list(row), model, several, labels)
    fig.suptitle("Draws of a guide, the same resampled by their weights, those after refining, and exact ones")
    path: Path = args.out / "guides_refine.png"
    save(fig, path)


if __name__ == "__main__":
    main()
