"""MNIST by MintNet and other flows of images: bits per pixel on the test set, with draws as a picture.

    python examples/benchmarks/mnist.py FOLDER                                     # a small model, half an hour of CPU
    python examples/benchmarks/mnist.py FOLDER --models mintnet --device cuda --seconds 36000 --batch 32 --lr 1e-3
    python examples/benchmarks/mnist.py --smoke                                    # random images, seconds

FOLDER holds ``mnist.npz`` with ``x_train`` and ``x_test``, whole numbers from 0 to 255.  ``mintnet`` is the paper's
network, 20 pairs of layers; ``mintnet-small`` has 6 pairs of 12 groups; ``glow-small`` has 2 scales of 6 steps with 32
channels.  The last 5000 training images are held out to choose the state by.  Pixels are dequantized by uniform noise
and put on the real line by a logit with margin 1e-6, as in the paper.  The score is the bound of one noise, averaged
over ``--noises``.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _runs import Table, command, machine, trained
from _script import save_rows
from torch import Tensor

import pyro_flows as pf
from pyro_flows.flows import MINTNET_CONFIGURATIONS

SHAPE = (1, 28, 28)
MODELS: dict[str, Callable[[], pf.FlowTransform]] = {
    "mintnet-small": lambda: pf.mintnet(SHAPE, num_layers=6, num_groups=(12, 8, 4), squeeze=2),
    "glow-small": lambda: pf.glow(SHAPE, num_scales=2, num_layers=6, hidden_channels=32),
    "mintnet": lambda: pf.mintnet(SHAPE, **MINTNET_CONFIGURATIONS["mnist"]),
}
PAPER = {"MintNet (paper)": 0.98, "Glow (paper of MintNet)": 1.05}


def load(folder: Path | None) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test images, whole numbers of shape ``(rows, 1, 28, 28)``."""
    if folder is None:
        x = (torch.rand(120, *SHAPE) * 256).byte()
        return x[:80], x[80:100], x[100:]
    held = np.load(folder / "mnist.npz")
    train, test = (torch.from_numpy(held[f"x_{part}"]).reshape(-1, *SHAPE) for part in ("train", "test"))
    return train[:-5000], train[-5000:], test


def fit(name: str, parts: tuple[Tensor, Tensor, Tensor], args: Namespace) -> tuple[pf.Dequantized, float, int]:
    """A trained model, CPU seconds, and steps."""
    torch.manual_seed(args.seed)
    model = pf.Dequantized(pf.Flow([*MODELS[name](), pf.LogitPixels(SHAPE, margin=1e-6)])).to(args.device)
    return trained(model, parts[0], parts[1][:300], args, 2, args.batch)


@torch.no_grad()
def score(model: pf.Dequantized, x: Tensor, noises: int) -> tuple[float, float]:
    """Mean bits per pixel and two standard errors."""
    bits = torch.cat([model.scores(part, num_noise_samples=noises, fresh=False).mean(0) for part in x.split(100)])
    bits = pf.bits_per_dim(bits.double(), SHAPE)
    return bits.mean().item(), 2 * bits.std().item() / math.sqrt(len(bits))


def draw(models: dict[str, pf.Dequantized], test: Tensor, path: Path) -> None:
    """Test images, and draws of each model."""
    rows = [("test images", test[:14])]
    for name, model in models.items():
        torch.manual_seed(0)
        rows.append((name, model.sample((len(rows[0][1]),))))
    save_rows(rows, 255, path)


def main() -> None:
    args = command(
        __doc__,
        "random images, a few steps",
        folder="where mnist.npz is",
        picture=True,
        models={"nargs": "+", "choices": MODELS, "default": ["mintnet-small"]},
        seconds={"type": float, "default": 1800, "help": "of training, each"},
        batch={"type": int, "default": 32},
        lr={"type": float, "default": 0.003},
        noises={"type": int, "default": 1},
        rows={"type": int, "help": "test images to score, all by default"},
        seed={"type": int, "default": 0},
        device={"default": "cpu"},
    )
    torch.set_num_threads(1)
    parts = load(None if args.smoke else args.folder)
    test = parts[2][: args.rows]
    print(f"{machine()}; {args.device}, float32, one thread, seed {args.seed}\n")
    models = {}
    table = Table("", "bits per pixel", "parameters", f"steps of {args.batch} images", "CPU s")
    for name in args.models:
        model, seconds, steps = fit(name, parts, args)
        models[name] = model
        mean, error = score(model, test.to(args.device), args.noises)
        size = sum(p.numel() for p in model.parameters())
        table.add(name, f"{mean:.3f} ± {error:.3f}", f"{size / 1000:.0f} k", f"{steps}", f"{seconds:.0f}")
    table.rows += [[name, f"{value:.2f}", "", "", ""] for name, value in PAPER.items()]
    print(f"\n{table}\n")
    draw(models, test, args.out / "mnist.png")


if __name__ == "__main__":
    main()
