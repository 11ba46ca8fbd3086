"""What the scripts share: colors, pictures, and the small data sets beside them."""

import bz2
import io
import lzma
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _command import command
from matplotlib import pyplot as plt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

TRUTH, FLOW, OTHER, THIRD = "#3d405b", "#1f7a8c", "#e07a5f", "#81b29a"  # data or exact, flow, what it is compared with
SHADES = LinearSegmentedColormap.from_list("flow", ["#ffffff", "#bfe3e6", "#5fb3bf", "#1f7a8c", "#0d3f4d"])
STYLE = {
    "axes.edgecolor": "#8d99ae",
    "axes.labelsize": 11,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 12,
    "figure.titlesize": 13,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "savefig.dpi": 90,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
}
FOLDER = Path(__file__).parent / "data"


def begin(doc: str, **options: Mapping[str, object]) -> Namespace:
    """Reads ``--smoke``, ``--out``, ``--seed`` and a script's own options, sets the look and seeds everything."""
    import pyro  # here, because workers that time other libraries import this module, too

    args = command(doc, "tiny budgets", picture=True, seed={"type": int, "default": 0}, **options)
    plt.rcParams.update(STYLE)
    pyro.set_rng_seed(args.seed)
    return args


def levels(density: np.ndarray, inside: tuple[float, ...] = (0.99, 0.9, 0.5)) -> list[float]:
    """Heights of the contours that hold these shares of a density on a grid."""
    ranked = np.sort(density.ravel())[::-1]
    mass = ranked.cumsum() / ranked.sum()
    return [float(ranked[mass < share][-1]) for share in inside]


def save(fig: Figure, path: Path, colors: int = 256) -> None:
    """Writes a picture with few colors, which makes a small file, and says where."""
    fig.savefig(path)
    plt.close(fig)
    with Image.open(path) as image:
        image.convert("RGB").quantize(colors, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"Picture: {path}")


def save_rows(rows: Sequence[tuple[str, Tensor]], most: float, path: Path) -> None:
    """Writes rows of equally many square images with their names at the left.

    Args:
        rows: names, and images that reshape to ``(columns, side, side)``; NaN has a color of its own.
        most: the level that is black; 0 is white.
        path: the file.
    """
    columns = len(rows[0][1])
    side = round((rows[0][1].numel() / columns) ** 0.5)
    gap = side // 4 if side < 16 else side // 14  # small images run into each other
    padded = [F.pad(x.reshape(columns, side, side).float().cpu(), (0, gap, 0, gap)) for _, x in rows]
    canvas = torch.cat([x.permute(1, 0, 2).flatten(1) for x in padded])
    left = 0.205
    fig, ax = plt.subplots(figsize=(8.5, 8.5 * (0.995 - left) / columns * len(rows) + 0.1))
    cmap = plt.get_cmap("Greys").with_extremes(bad="#f3d9cf")
    ax.imshow(canvas.numpy(), cmap=cmap, vmin=0, vmax=most, interpolation="none")
    ax.set(xticks=[], yticks=[(side + gap) * k + (side - 1) / 2 for k in range(len(rows))])
    ax.set_yticklabels([name for name, _ in rows], fontsize=11)
    ax.tick_params(length=0)
    fig.subplots_adjust(left=left, right=0.995, top=0.99, bottom=0.01)
    save(fig, path)


def digits(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Digits to train on, to stop by, and to test on: 8-bit levels 0 to 16, shape ``(rows, 1, 8, 8)``."""
    x = np.load(FOLDER / "digits.npz")["x"].reshape(-1, 1, 8, 8)
    x = torch.from_numpy(x[np.random.default_rng(seed).permutation(len(x))]).to(torch.uint8)
    return x[:1297], x[1297:1497], x[1497:]


def mnist(folder: Path, rows: int = 30_000, others: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    """The same of MNIST, from ``mnist.npz`` in the folder, rounded to the same levels, shape ``(rows, 1, 28, 28)``."""
    held = np.load(folder / "mnist.npz")
    parts = held["x_train"][:rows], held["x_train"][-others:], held["x_test"]
    return tuple((torch.from_numpy(part)[:, None] / 255 * 16).round().to(torch.uint8) for part in parts)


def mnist_bytes(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """The same of MNIST, in its 256 levels; the first 1,000 test images."""
    with np.load(folder / "mnist.npz") as data:
        train, test = (torch.from_numpy(data[name]).to(torch.uint8).unsqueeze(1) for name in ("x_train", "x_test"))
    return train[:-1000], train[-1000:], test[:1000]


def general(images: np.ndarray, width: int) -> dict[str, int]:
    """Bytes by general compressors, each at its best; ``width``: bits that hold a level."""
    bits = (images.reshape(-1, 1) >> np.arange(width)[::-1].astype(np.uint8)) & 1
    kinds = {"": images.tobytes()} | ({f", {width} bits packed": np.packbits(bits).tobytes()} if width < 8 else {})
    sheet = io.BytesIO()
    Image.fromarray(images.reshape(-1, images.shape[-1])).save(sheet, "png", optimize=True)
    sizes = {"uncompressed" + kind: len(data) for kind, data in kinds.items()} | {"png": len(sheet.getvalue())}
    for kind, data in kinds.items():
        sizes["bz2" + kind] = len(bz2.compress(data))
        sizes["lzma" + kind] = len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    return sizes


def power_plant() -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test rows of the power plant, split by torch's generator."""
    stored = np.load(FOLDER / "power_plant.npz")
    rows, test_rows = torch.from_numpy(stored["x"]), torch.from_numpy(stored["test_rows"]).long()
    rest = torch.ones(len(rows), dtype=torch.bool).index_fill(0, test_rows, False).nonzero()[:, 0]
    rest = rest[torch.randperm(len(rest))]
    return rows[rest[861:]], rows[rest[:861]], rows[test_rows]


def mean_of(scores: Tensor, digits: int = 3) -> str:
    """Mean and two standard errors."""
    return f"{scores.mean():.{digits}f} ± {2 * scores.std() / len(scores) ** 0.5:.{digits}f}"
