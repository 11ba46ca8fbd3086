"""MADE as a distribution: handwritten digits drawn, and completed from any part of them.

    python examples/made.py                 # prints a table, leaves made_digits.png in out/; about two minutes
    python examples/made.py --smoke         # the same in seconds, with budgets too small to mean anything

An order-agnostic MADE and a convolutional one learn 8 x 8 digits of 17 gray levels (Optical Recognition of Handwritten
Digits, Alpaydin and Kaynak, 1998), with a discretized logistic mixture for each pixel.  The table has bits per pixel on
digits not seen before, for one order and for ensembles.  In the picture, the MADE completes digits of which only a part
is known: the upper half, the left half, or every second pixel, with the same weights.
"""

import math
from argparse import Namespace
from pathlib import Path

import torch
from _script import begin, digits, mean_of, save_rows
from torch import Tensor

import pyro_flows as pf
from pyro_flows.distributions import AutoregressiveDistribution, LogisticMixtureHead

LEVELS, SIDE = 17, 8
BITS = SIDE * SIDE * math.log(2)


def bits(distribution: AutoregressiveDistribution, rows: Tensor) -> str:
    """Bits per pixel with two standard errors."""
    with torch.no_grad():
        scores = -torch.cat([distribution.log_prob(part) for part in rows.split(100)]) / BITS
    return mean_of(scores)


def marginals(train: Tensor, test: Tensor) -> str:
    """The same for independent pixels, by their smoothed frequencies."""
    counts = torch.stack([(train == level).sum(0) for level in range(LEVELS)], -1) + 0.1
    logs = (counts / counts.sum(-1, keepdim=True)).log()
    scores = -logs.gather(-1, test.long().T).sum(0) / BITS
    return mean_of(scores)


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
    save_rows(rows, LEVELS - 1, path)


def main() -> None:
    args = begin(__doc__)
    train, held_out, test = (part.flatten(1).float() for part in digits())
    made, conv = fit(args, train, held_out)
    table(made, conv, train, test)
    draw(made, conv, test, args.out / "made_digits.png")


if __name__ == "__main__":
    main()
