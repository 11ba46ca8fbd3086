"""Is ``fit_guide`` calibrated? Simulation-based calibration of its default fit on two models.

    python examples/calibration.py           # two summaries, and calibration.png in out/; ten to twenty minutes
    python examples/calibration.py --smoke   # the same in seconds, with too few simulations to mean anything

Latents are drawn from the prior and data from the model, ``fit_guide`` fits the data, and each latent is ranked among
99 draws of the fit.  If draws were those of the posterior, ranks would be uniform: curves stay within the gray band
with probability 0.95, all of them over their whole length.

One model is a regression of counts, the other a hierarchy of ten groups with unknown mean, spread between and noise
within, written with centered effects, so that small spreads make a funnel of it.  All fits have the default options and
the same few seconds; none is left out, whatever its verdict.  The verdicts are counted below each summary.
"""

import time
import warnings
from collections import Counter
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from _script import begin, save
from matplotlib import pyplot as plt
from torch import Tensor

from pyro_flows import plots
from pyro_flows.infer import AutoFlow, fit_guide, simulation_based_calibration

DRAWS = 99
GROUPS, MEMBERS = 10, 5


def counts(x: Tensor, y: Tensor | None = None) -> None:
    """A Poisson regression, ``x`` of shape ``(rows, 3)``."""
    level = pyro.sample("level", dist.Normal(1.0, 1.0))
    slopes = pyro.sample("slopes", dist.Normal(torch.zeros(x.shape[1]), 0.5).to_event(1))
    rate = level.unsqueeze(-1) + torch.einsum("...d,nd->...n", slopes, x)
    pyro.sample("y", dist.Poisson(rate.exp()).to_event(1), obs=y)


def groups(y: Tensor | None = None) -> None:
    """Groups around a common mean, ``y`` of shape ``(members, groups)``."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    between = pyro.sample("between", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
    with pyro.plate("groups", GROUPS, dim=-1):
        effect = pyro.sample("effect", dist.Normal(mean, between))
        with pyro.plate("members", MEMBERS, dim=-2):
            pyro.sample("y", dist.Normal(effect, noise), obs=y)


def calibrate(
    name: str, model: Callable[..., None], arguments: tuple[Tensor, ...], simulations: int, seconds: float, seed: int
) -> object:
    """One model; prints what was found."""
    verdicts: Counter[str] = Counter()

    def fit(data: dict[str, Tensor], own: int) -> dict[str, Tensor]:
        found = fit_guide(AutoFlow(model, seed=own), *arguments, **data, seconds=seconds, progress=False)
        verdicts[found.verdict.label] += 1
        return found.sample(DRAWS)

    begin = time.process_time()
    observed = {"y": "y"}
    found = simulation_based_calibration(
        model, fit, *arguments, observed=observed, simulations=simulations, num_samples=DRAWS, seed=seed, progress=False
    )
    print(f"{name}: {found}")
    said = ", ".join(f"{count} {label}" for label, count in verdicts.most_common())
    print(f"  verdicts: {said}; {time.process_time() - begin:.0f} CPU seconds", flush=True)
    return found


def main() -> None:
    args = begin(
        __doc__,
        simulations={"type": int, "default": 100},
        seconds={"type": float, "default": 3.0, "help": "of each fit"},
        cpu={"action": "store_true", "help": "count CPU seconds, for a machine that others use as well"},
    )
    if args.smoke:
        args.simulations, args.seconds = 3, 0.3
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    if args.cpu:
        time.monotonic = time.process_time  # the clock of fit_guide
    x = torch.randn(40, 3)
    found = [
        calibrate("counts", counts, (x,), args.simulations, args.seconds, args.seed),
        calibrate("groups", groups, (), args.simulations, args.seconds, args.seed),
    ]
    fig, axes = plt.subplots(1, 2, figsize=(10.0, 3.8), constrained_layout=True)
    titles = ("a regression of counts", "ten groups, centered")
    for ax, calibration, title in zip(axes, found, titles, strict=True):
        plots.ranks(calibration, ax)
        ax.set_title(f"{title}: {calibration.simulations} simulations", fontsize=11)
    save(fig, args.out / "calibration.png")


if __name__ == "__main__":
    main()
