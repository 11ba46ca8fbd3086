"""What the examples of guides share: their command line, their look, and how they save a picture."""

from __future__ import annotations

import argparse
import tempfile
from argparse import Namespace
from pathlib import Path

import matplotlib
import numpy as np
import pyro
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

TRUTH, FLOW, OTHER, THIRD = "#3d405b", "#1f7a8c", "#e07a5f", "#81b29a"  # exact or data, flow, what it is held against
STYLE = {
    "axes.edgecolor": "#8d99ae",
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.titlesize": 12,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.dpi": 90,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


def begin(doc: str, **flags: str) -> Namespace:
    """Reads ``--smoke``, ``--out``, ``--seed`` and a script's own flags, makes the folder and seeds everything."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny budgets; the picture goes to a temporary folder")
    parser.add_argument("--out", type=Path, help="folder for the picture (default: out)")
    parser.add_argument("--seed", type=int, default=0)
    for name, what in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=what)
    args = parser.parse_args()
    args.out = args.out or Path(tempfile.mkdtemp() if args.smoke else "out")
    args.out.mkdir(parents=True, exist_ok=True)
    matplotlib.use("Agg")
    plt.rcParams.update(STYLE)
    pyro.set_rng_seed(args.seed)
    return args


def levels(density: np.ndarray, inside: tuple[float, ...] = (0.99, 0.9, 0.5)) -> list[float]:
    """Heights of the contours that hold these shares of a density on a grid."""
    ranked = np.sort(density.ravel())[::-1]
    mass = ranked.cumsum() / ranked.sum()
    return [float(ranked[mass < share][-1]) for share in inside]


def save(fig: Figure, path: Path) -> None:
    """Writes the picture with 256 colours, and says where."""
    fig.savefig(path)
    plt.close(fig)
    with Image.open(path) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"Picture: {path}")
