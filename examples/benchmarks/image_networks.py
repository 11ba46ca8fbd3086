"""Flows of images at the papers' sizes: bits per dimension on test images, beside the paper's.

    python examples/benchmarks/image_networks.py FOLDER --networks mintnet-mnist-small   # half an hour of a CPU
    python examples/benchmarks/image_networks.py FOLDER --networks mintnet-mnist --device cuda --seconds 36000 --lr 1e-3
    python examples/benchmarks/image_networks.py FOLDER --networks glow-cifar10 --device cuda --seconds 86400 --lr 1e-3
    python examples/benchmarks/image_networks.py --smoke                                 # random images, seconds

FOLDER holds ``mnist.npz``, ``cifar10.npz`` or ``imagenet32.npz`` with ``x_train`` and ``x_test``, whole numbers from 0
to 255 of shape ``(rows, height, width)``, with channels last or first.  The last 5000 training images are held out to
choose the state by.  Pixels are dequantized by uniform noise and put on the real line by a logit, with the margin of
the MintNet paper: 1e-6 for MNIST, 0.05 for the others.  Each network keeps a checkpoint in ``--out``, from which a
second call goes on, and a gray picture of draws.  The score is the bound of one noise, averaged over ``--noises``.

The networks named after a paper have its sizes; what differs from it is on their pages.  The small ones have 6 pairs of
12 groups (MintNet), and 2 scales of 6 steps with 32 channels (Glow).
"""

import functools
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _runs import Table, command, machine, trained
from _script import save_rows
from torch import Tensor

import pyro_flows as pf
from pyro_flows.flows import MINTNET_CONFIGURATIONS, glow, mintnet, multiscale_realnvp

SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "imagenet32": (3, 32, 32)}
MARGINS = {"mnist": 1e-6, "cifar10": 0.05, "imagenet32": 0.05}


class Network(NamedTuple):
    """A builder with its options, the data it is for, and the paper's bits per dimension."""

    build: Callable[[tuple[int, int, int]], pf.FlowTransform]
    data: str
    paper: float | None


def _small(build: Callable[..., pf.FlowTransform], **options: object) -> Network:
    return Network(functools.partial(build, **options), "mnist", None)


NETWORKS = {
    "mintnet-mnist-small": _small(mintnet, num_layers=6, num_groups=(12, 8, 4), squeeze=2),
    "glow-mnist-small": _small(glow, num_scales=2, num_layers=6, hidden_channels=32),
    **{
        f"mintnet-{data}": Network(functools.partial(mintnet, **MINTNET_CONFIGURATIONS[data]), data, bits)
        for data, bits in (("mnist", 0.98), ("cifar10", 3.32), ("imagenet32", 4.06))
    },
    **{
        f"glow-{data}": Network(
            functools.partial(glow, num_scales=3, num_layers=layers, hidden_channels=512, kernel_size=(3, 1, 3)),
            data,
            bits,
        )
        for data, layers, bits in (("cifar10", 32, 3.35), ("imagenet32", 48, 4.09))
    },
    **{
        f"realnvp-{data}": Network(functools.partial(multiscale_realnvp, **options), data, bits)
        for data, options, bits in (
            ("cifar10", {"num_scales": 2, "hidden_channels": 64, "num_blocks": 8}, 3.49),
            ("imagenet32", {"num_scales": 4, "hidden_channels": 32, "num_blocks": 4}, 4.28),
        )
    },
}


def load(folder: Path | None, data: str) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test images, whole numbers of shape ``(rows, channels, height, width)``."""
    shape = SHAPES[data]
    if folder is None:
        x = (torch.rand(120, *shape) * 256).byte()
        return x[:80], x[80:100], x[100:]
    held = np.load(folder / f"{data}.npz")
    parts = []
    for part in ("train", "test"):
        x = torch.from_numpy(held[f"x_{part}"])
        last = x.dim() == 4 and tuple(x.shape[1:]) != shape  # channels
        parts.append((x.movedim(-1, 1) if last else x).reshape(-1, *shape))
    train, test = parts
    return train[:-5000], train[-5000:], test


def fit(name: str, parts: tuple[Tensor, Tensor, Tensor], args: Namespace) -> tuple[pf.Dequantized, float, int]:
    """A trained model, CPU seconds, and steps."""
    torch.manual_seed(args.seed)
    network = NETWORKS[name]
    shape = SHAPES[network.data]
    flow = pf.Flow([*network.build(shape), pf.LogitPixels(shape, margin=MARGINS[network.data])])
    model = pf.Dequantized(flow).to(args.device)
    return trained(model, parts[0], parts[1][:300], args, 2, args.batch, checkpoint=args.out / f"{name}.pt")


@torch.no_grad()
def score(model: pf.Dequantized, x: Tensor, noises: int) -> tuple[float, float]:
    """Mean bits per dimension and two standard errors."""
    bits = torch.cat([model.scores(part, num_noise_samples=noises, fresh=False).mean(0) for part in x.split(100)])
    bits = pf.bits_per_dim(bits.double(), x.shape[1:])
    return bits.mean().item(), 2 * bits.std().item() / math.sqrt(len(bits))


def main() -> None:
    args = command(
        __doc__,
        "random images, a few steps",
        folder="where the arrays are",
        picture=True,
        networks={"nargs": "+", "choices": NETWORKS, "default": ["mintnet-mnist-small"]},
        seconds={"type": float, "default": 1800, "help": "of training, each"},
        batch={"type": int, "default": 32},
        lr={"type": float, "default": 0.003},
        noises={"type": int, "default": 1},
        rows={"type": int, "help": "test images to score, all by default"},
        seed={"type": int, "default": 0},
        device={"default": "cpu"},
    )
    torch.set_num_threads(1)
    print(f"{machine()}; {args.device}, float32, one thread, seed {args.seed}\n")
    table = Table("", "bits per dimension", "paper", "parameters", f"steps of {args.batch} images", "CPU s")
    for name in args.networks:
        network = NETWORKS[name]
        parts = load(None if args.smoke else args.folder, network.data)
        test = parts[2][: args.rows]
        model, seconds, steps = fit(name, parts, args)
        mean, error = score(model, test.to(args.device), args.noises)
        size = sum(p.numel() for p in model.parameters())
        paper = "-" if network.paper is None else f"{network.paper:.2f}"
        table.add(name, f"{mean:.3f} ± {error:.3f}", paper, f"{size / 1000:.0f} k", f"{steps}", f"{seconds:.0f}")
        torch.manual_seed(0)
        rows = [("test images", test[:14]), (name, model.sample((len(test[:14]),)))]
        save_rows([(of, x.float().mean(1)) for of, x in rows], 255, args.out / f"{name}.png")
    print(f"\n{table}\n")


if __name__ == "__main__":
    main()
