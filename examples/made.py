"""MADE as a distribution: handwritten digits drawn, and completed from any part of them.

    python examples/made.py                 # prints a table, leaves made_digits.png in out/; about two minutes
    python examples/made.py --smoke         # the same in seconds, with budgets too small to mean anything

An order-agnostic MADE and a convolutional one learn 8 x 8 digits of 17 grey levels (Optical Recognition of Handwritten
Digits, Alpaydin and Kaynak, 1998), with a discretised logistic mixture for each pixel.  The table has bits per pixel on
digits not seen before, for one order and for ensembles.  In the picture, the MADE completes digits of which only a part
is known: the upper half, the left half, or every second pixel, with the same weights.
"""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from _guides import begin, save
from matplotlib import pyplot as plt
from torch import Tensor

import pyro_flows as pf
from pyro_flows.distributions import AutoregressiveDistribution, LogisticMixtureHead

LEVELS, SIDE = 17, 8
BITS = SIDE * SIDE * math.log(2)


def load(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Digits to train on, to hold out, and to test on, shape ``(rows, 64)``, levels 0 to 16."""
    x = np.load(Path(__file__).parent / "data" / "digits.npz")["x"].reshape(-1, SIDE * SIDE)
    x = torch.tensor(x[np.random.default_rng(seed).permutation(len(x))], dtype=torch.float32)
    return x[:1297], x[1297:1497], x[1497:]


def bits(distribution: AutoregressiveDistribution, rows: Tensor) -> str:
    """Bits per pixel with two standard errors."""
    with torch.no_grad():
        scores = -torch.cat([distribution.log_prob(part) for part in rows.split(100)]) / BITS
    return f"{scores.mean():.3f} ± {2 * scores.std() / len(scores) ** 0.5:.3f}"


def marginals(train: Tensor, test: Tensor) -> str:
    """The same for independent pixels, by their smoothed frequencies."""
    counts = torch.stack([(train == level).sum(0) for level in range(LEVELS)], -1) + 0.1
    logs = (counts / counts.sum(-1, keepdim=True)).log()
    scores = -logs.gather(-1, test.long().T).sum(0) / BITS
    return f"{scores.mean():.3f} ± {2 * scores.std() / len(scores) ** 0.5:.3f}"


def fit(args: Namespace, train: Tensor, held_out: Tensor) -> tuple[pf.MADE, pf.ConvMADE]:
    """Both models, trained."""
    steps = 20 if args.smoke else 3000
    width = 32 if args.smoke else 512
    made = pf.MADE(SIDE * SIDE, LogisticMixtureHead(LEVELS, 5), hidden_dims=(width, width), order="any", seed=args.seed)
    pf.fit_density(made, train, validation=held_out, steps=steps, seed=args.seed, progress=False)
    channels = 8 if args.smoke else 48
    conv = pf.ConvMADE((1, SIDE, SIDE), LogisticMixtureHead(LEVELS, 5), hidden_channels=channels)
    images = [part.unflatten(-1, (1, SIDE, SIDE)) for part in (train, held_out)]
    pf.fit_density(conv, images[0], validation=images[1], steps=steps // 3, seed=args.seed, progress=False)
    return made.eval(), conv.eval()


def table(made: pf.MADE, conv: pf.ConvMADE, train: Tensor, test: Tensor) -> None:
    """Prints bits per pixel."""
    print(f"Bits per pixel of {len(test)} digits not seen before (of {LEVELS} levels; two standard errors)")
    rows = {
        "independent pixels": marginals(train, test),
        "MADE, one order": bits(made.one(), test),
        "MADE, mean of 4 orders": bits(made.ensemble(4), test),
        "MADE, mean of 16 orders": bits(made.ensemble(16), test),
        "convolutional MADE": bits(conv(), test.unflatten(-1, (1, SIDE, SIDE))),
    }
    for name, score in rows.items():
        print(f"  {name:<26}{score}")


def draw(made: pf.MADE, conv: pf.ConvMADE, test: Tensor, path: Path) -> None:
    """Draws of both models above, completions below."""
    columns = 16
    place = torch.arange(SIDE * SIDE)
    masks = {
        "upper half": place < SIDE * SIDE // 2,
        "left half": place % SIDE < SIDE // 2,
        "every second": (place % SIDE + place // SIDE) % 2 == 0,
    }
    rows = [
        ("data", test[:columns]),
        ("MADE", made.sample((columns,))),
        ("convolutional", conv.sample((columns,)).flatten(1)),
    ]
    for name, observed in masks.items():
        given = test[: columns // 4]
        completed = made.impute(given, observed, 3)  # (3, 4, 64)
        shown = torch.where(observed, given, math.nan)
        rows.append((f"{name} known", torch.stack((shown, *completed), 1).flatten(0, 1)))
    fig, axes = plt.subplots(len(rows), columns, figsize=(9, 3.7))
    for line, (name, images) in zip(axes, rows, strict=True):
        for ax, image in zip(line, images, strict=True):
            ax.imshow(image.view(SIDE, SIDE).numpy(), cmap=CMAP, vmin=0, vmax=LEVELS - 1)
            ax.set(xticks=[], yticks=[])
            for side in ax.spines.values():
                side.set(visible=True, color="#dddddd", linewidth=0.5)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    fig.subplots_adjust(left=0.15, right=0.995, top=0.99, bottom=0.01, wspace=0.06, hspace=0.06)
    save(fig, path)
    print(f"Picture: {path}")


CMAP = plt.get_cmap("Greys").with_extremes(bad="#f3d9cf")


def main() -> None:
    args = begin(__doc__)
    train, held_out, test = load()
    made, conv = fit(args, train, held_out)
    table(made, conv, train, test)
    draw(made, conv, test, args.out / "made_digits.png")


if __name__ == "__main__":
    main()
