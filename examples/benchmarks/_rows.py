"""Rows of images as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["save_rows"]


def save_rows(rows: Sequence[tuple[str, Tensor]], most: float, path: Path) -> None:
    """Writes rows of as many square images each, with their names at the left.

    Args:
        rows: names, and images that reshape to ``(columns, side, side)``.
        most: the level that is black; 0 is white.
        path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = len(rows[0][1])
    side = round((rows[0][1].numel() / columns) ** 0.5)
    gap = side // 4 if side < 16 else 0  # small images run into each other
    padded = [F.pad(x.reshape(columns, side, side).float().cpu(), (0, gap, 0, gap)) for _, x in rows]
    canvas = torch.cat([x.permute(1, 0, 2).flatten(1) for x in padded])
    fig, ax = plt.subplots(figsize=(8.5, 0.55 * len(rows) + 0.1))
    ax.imshow(canvas.numpy(), cmap="Greys", vmin=0, vmax=most, interpolation="none")
    ax.set(xticks=[], yticks=[(side + gap) * k + (side - 1) / 2 for k in range(len(rows))])
    ax.set_yticklabels([name for name, _ in rows], fontsize=8)
    ax.tick_params(length=0)
    fig.subplots_adjust(left=0.17, right=0.995, top=0.99, bottom=0.01)
    fig.savefig(path, dpi=100)
    plt.close(fig)
    print(f"Picture: {path}")
