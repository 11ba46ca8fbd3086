"""Binarized MNIST: MADE and its convolutional form, by held-out nats, with draws and completions as a picture.

    python examples/benchmarks/binarized_mnist.py FOLDER                     # all models, ten CPU minutes each
    python examples/benchmarks/binarized_mnist.py FOLDER --models conv-32    # one of them
    python examples/benchmarks/binarized_mnist.py --smoke                    # random images, seconds

FOLDER holds ``binarized_mnist.npz``, Larochelle's split: 50,000, 10,000 and 10,000 images of 28 x 28 bits.  Models are
named by what they are: ``made-500`` has one hidden layer of 500 units and the natural order, ``made-500-500`` two;
``made-500-any`` is trained over all orders and scored by ensembles of them; ``conv-32`` is convolutional with 32
channels in each stack.  Training keeps the state of the best validation score, ``--seconds`` of wall time each, one
seed, on ``--device``.

The picture has test images, draws of each model, lower halves drawn given upper ones, and by the model of all orders
also left halves given right ones.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _runs import command, machine, markdown, trained
from _script import save_rows
from torch import Tensor

import pyro_flows as pf
from pyro_flows.distributions import AutoregressiveDistribution

SIDE = 28
PIXELS = SIDE * SIDE
PAPER = {"MADE, one hidden layer, one mask (paper)": 88.40, "MADE, two hidden layers, 32 masks (paper)": 86.64}
Model = pf.MADE | pf.ConvMADE
MODELS: dict[str, Callable[[int], Model]] = {
    "made-500": lambda scale: pf.MADE(PIXELS, hidden_dims=(500 // scale,), seed=0),
    "made-500-500": lambda scale: pf.MADE(PIXELS, hidden_dims=(500 // scale,) * 2, seed=0),
    "made-500-any": lambda scale: pf.MADE(
        PIXELS, hidden_dims=(500 // scale,), order="any", mask_inputs=True, ensemble_size=1, seed=0
    ),
    "conv-32": lambda scale: pf.ConvMADE((1, SIDE, SIDE), hidden_channels=32 // scale),
}


def load(folder: Path | None) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test images, shape ``(rows, 784)``."""
    if folder is None:
        x = (torch.rand(120, PIXELS) < torch.linspace(0.1, 0.9, PIXELS)).float()
        return x[:80], x[80:100], x[100:]
    held = np.load(folder / "binarized_mnist.npz")
    return tuple(
        torch.from_numpy(np.unpackbits(held[f"x_{part}"], axis=1)).float() for part in ("train", "valid", "test")
    )


def shaped(model: Model, x: Tensor) -> Tensor:
    """Images as the model takes them."""
    return x.unflatten(-1, model.event_shape)


def nats(distribution: AutoregressiveDistribution, x: Tensor) -> tuple[float, float]:
    """Mean negative log-likelihood and two standard errors."""
    with torch.no_grad():
        scores = -torch.cat([distribution.log_prob(shaped(distribution.model, part)) for part in x.split(250)]).double()
    return scores.mean().item(), 2 * scores.std().item() / math.sqrt(len(scores))


def independent(train: Tensor, test: Tensor) -> float:
    """Of independent pixels, by their smoothed frequencies."""
    logits = torch.logit((train.sum(0) + 0.5) / (len(train) + 1))
    return -torch.distributions.Bernoulli(logits=logits).log_prob(test).sum(-1).mean().item()


def fit(name: str, parts: tuple[Tensor, Tensor, Tensor], args: Namespace) -> tuple[Model, float, int]:
    """A trained model, CPU seconds, and steps."""
    torch.manual_seed(args.seed)
    model = MODELS[name](8 if args.smoke else 1).to(args.device)
    return trained(model, shaped(model, parts[0]), shaped(model, parts[1][:1000]), args, 4, 100)


def report(models: dict[str, tuple[Model, float, int]], parts: tuple[Tensor, Tensor, Tensor]) -> str:
    """Nats of each model on the test images, beside the paper's."""
    train, _, test = parts
    rows = [["independent pixels", f"{independent(train, test):.2f}", "", "", ""]]
    for name, (model, seconds, steps) in models.items():
        several = isinstance(model, pf.MADE) and model.varied
        for count in (1, 4, 16) if several else (1,):
            at = model.ensemble(count) if several else model()
            mean, error = nats(at, test.to(model.device))
            label = f"{name}, mean of {count} order(s)" if several else name
            size = sum(p.numel() for p in model.parameters())
            rows.append([label, f"{mean:.2f} ± {error:.2f}", f"{size / 1000:.0f} k", f"{steps}", f"{seconds:.0f}"])
    rows += [[name, f"{value:.2f}", "", "", ""] for name, value in PAPER.items()]
    return markdown(["", "nats per image", "parameters", "steps of 100 images", "CPU s"], rows)


def draw(models: dict[str, tuple[Model, float, int]], test: Tensor, path: Path) -> None:
    """The picture."""
    columns = 14
    test = test[:: max(len(test) // columns, 1)][:columns]  # sorted by digit
    rows = [("test images", test)]
    for name, (model, _, _) in models.items():
        torch.manual_seed(0)
        x = model.one().sample((columns,)) if isinstance(model, pf.MADE) else model.sample((columns,))
        rows.append((name, x.flatten(1).cpu()))
    place = torch.arange(PIXELS)
    for what, known in (("upper halves", place < PIXELS // 2), ("right halves", place % SIDE >= SIDE // 2)):
        able = {n: m for n, (m, _, _) in models.items() if isinstance(m, pf.MADE)}
        able = {n: m for n, m in able.items() if m.any_order or what == "upper halves"}
        if able:
            rows.append((what, torch.where(known, test, 0.5)))
        for name, model in able.items():
            rows.append((f"by {name}", model.impute(test.to(model.device), known.to(model.device)).squeeze(0).cpu()))
    save_rows(rows, 1, path)


def main() -> None:
    args = command(
        __doc__,
        "random images, a few steps",
        folder="where binarized_mnist.npz is",
        picture=True,
        models={"nargs": "+", "choices": MODELS, "default": list(MODELS)},
        seconds={"type": float, "default": 600, "help": "of training, each"},
        lr={"type": float, "default": 0.002},
        seed={"type": int, "default": 0},
        device={"default": "cpu"},
    )
    torch.set_num_threads(1)
    parts = load(None if args.smoke else args.folder)
    print(f"{machine()}; {args.device}, float32, one thread, seed {args.seed}\n")
    models = {}
    for name in args.models:
        models[name] = fit(name, parts, args)
        print(f"{name}: {models[name][1]:.0f} s", flush=True)
    print("\n" + report(models, parts) + "\n")
    draw(models, parts[2], args.out / "binarized_mnist.png")


if __name__ == "__main__":
    main()
