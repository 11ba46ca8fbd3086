"""MADE as a distribution: handwritten digits drawn, and completed from any part of them.

    python examples/made.py                 # prints a table, leaves made_digits.png in out/; about two minutes
    python examples/made.py --data FOLDER   # 28 x 28 digits of mnist.npz in that folder, black or white; five minutes
    python examples/made.py --smoke         # the same in seconds, with budgets too small to mean anything

An order-agnostic MADE and a convolutional one learn 8 x 8 digits of 17 gray levels (Optical Recognition of Handwritten
Digits, Alpaydin and Kaynak, 1998), with a discretized logistic mixture for each pixel, or binary digits of MNIST.  The
table has bits per pixel on digits not seen before, for one order and for ensembles.  In the picture, the MADE completes
digits of which only a part is known: the upper half, the left half, or every second pixel, with the same weights.
"""

import math
import time
from argparse import Namespace
from pathlib import Path

import torch
from _script import begin, digits, mean_of, mnist, save_rows
from torch import Tensor

import pyro_flows as pf
from pyro_flows.distributions import AutoregressiveDistribution, BernoulliHead, LogisticMixtureHead

Parts = tuple[Tensor, Tensor, Tensor]


def load(args: Namespace) -> tuple[Parts, int]:
    """Training, validation and test digits, shape ``(rows, pixels)``, and their number of levels."""
    if args.data is None:
        train, held_out, test = (part.flatten(1).float() for part in digits())
        return (train, held_out, test), 17
    train, held_out, test = ((part.flatten(1) > 8).float() for part in mnist(args.data))
    return (train, held_out, test[:1000]), 2


def bits(distribution: AutoregressiveDistribution, rows: Tensor) -> str:
    """Bits per pixel with two standard errors."""
    scale = rows[0].numel() * math.log(2)
    with torch.no_grad():
        scores = -torch.cat([distribution.log_prob(part) for part in rows.split(100)]) / scale
    return mean_of(scores)


def marginals(train: Tensor, test: Tensor, levels: int) -> str:
    """The same for independent pixels, by their smoothed frequencies."""
    counts = torch.stack([(train == level).sum(0) for level in range(levels)], -1) + 0.1
    logs = (counts / counts.sum(-1, keepdim=True)).log()
    scores = -logs.gather(-1, test.long().T).sum(0) / (test.shape[1] * math.log(2))
    return mean_of(scores)


def fit(args: Namespace, parts: Parts, levels: int) -> tuple[pf.MADE, pf.ConvMADE]:
    """Both models, trained."""
    train, held_out, _ = parts
    pixels = train.shape[1]
    side = math.isqrt(pixels)
    many = levels > 2
    width, channels, steps = (512, 48, (3000, 1000)) if many else (500, 32, (3000, 200))
    if args.smoke:
        width, channels, steps = 32, 8, (20, 6)
    head = LogisticMixtureHead(levels, 5) if many else BernoulliHead()
    options = {"seed": args.seed, "progress": False} | ({} if many else {"batch_size": 100, "lr": 2e-3})
    made = pf.MADE(pixels, head, hidden_dims=(width,) * (2 if many else 1), order="any", seed=args.seed)
    conv = pf.ConvMADE((1, side, side), head, hidden_channels=channels)
    images = [part.unflatten(-1, (1, side, side)) for part in (train, held_out)]
    for model, data, count in ((made, (train, held_out), steps[0]), (conv, images, steps[1])):
        begun = time.process_time()
        pf.fit_density(model, data[0], validation=data[1], steps=count, **options)
        print(f"{type(model).__name__}: {count} steps, {time.process_time() - begun:.0f} CPU seconds")
    return made.eval(), conv.eval()


def table(made: pf.MADE, conv: pf.ConvMADE, train: Tensor, test: Tensor, levels: int) -> None:
    """Prints bits per pixel."""
    print(f"Bits per pixel of {len(test)} digits not seen before (of {levels} levels; two standard errors)")
    rows = {
        "independent pixels": marginals(train, test, levels),
        "MADE, one order": bits(made.one(), test),
        "MADE, mean of 4 orders": bits(made.ensemble(4), test),
        "MADE, mean of 16 orders": bits(made.ensemble(16), test),
        "convolutional MADE": bits(conv(), test.unflatten(-1, conv.event_shape)),
    }
    for name, score in rows.items():
        print(f"  {name:<26}{score}")


def draw(made: pf.MADE, conv: pf.ConvMADE, test: Tensor, levels: int, path: Path) -> None:
    """Draws of both models above, completions below."""
    columns, pixels = 12, test.shape[1]
    side = math.isqrt(pixels)
    place = torch.arange(pixels)
    masks = {
        "upper half": place < pixels // 2,
        "left half": place % side < side // 2,
        "every second": (place % side + place // side) % 2 == 0,
    }
    rows = [
        ("data", test[:columns]),
        ("MADE", made.sample((columns,))),
        ("convolutional", conv.sample((columns,)).flatten(1)),
    ]
    for name, observed in masks.items():
        given = test[: columns // 4]
        completed = made.impute(given, observed, 3)  # (3, 3, pixels)
        shown = torch.where(observed, given, math.nan)
        rows.append((f"{name} known", torch.stack((shown, *completed), 1).flatten(0, 1)))
    save_rows(rows, levels - 1, path)


def main() -> None:
    args = begin(__doc__, data={"type": Path, "help": "folder of mnist.npz"})
    parts, levels = load(args)
    train, _, test = parts
    made, conv = fit(args, parts, levels)
    table(made, conv, train, test, levels)
    draw(made, conv, test, levels, args.out / "made_digits.png")


if __name__ == "__main__":
    main()
