"""Rotations by place: a product of two rotated vectors depends on the distance of their places alone."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["places_along", "turned"]

_BASE = 100.0  # the wavelengths go from 2 pi to nearly 100 times that


def places_along(first: int, count: int, device: torch.device) -> Tensor:
    """Places along an axis; single precision would blur the angles of distant ones."""
    kind = torch.float32 if device.type == "mps" else torch.float64
    return torch.arange(first, first + count, device=device, dtype=kind)


def turned(x: Tensor, places: Tensor, rotated: int) -> Tensor:
    """Turns the first ``rotated`` numbers of vectors, in pairs, by angles proportional to their places.

    Args:
        x: shape ``(*, tokens, m)``.
        places: shape ``(tokens, axes)``.
        rotated: a multiple of ``2 * axes``.

    References:
        RoFormer (Su et al., 2021), arXiv:2104.09864.
    """
    half = rotated // 2
    pairs = half // places.shape[-1]
    speeds = _BASE ** (-torch.arange(pairs, device=x.device, dtype=places.dtype) / pairs)
    angles = (places.unsqueeze(-1) * speeds).flatten(-2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b, rest = x.split((half, half, x.shape[-1] - rotated), -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), -1)
