"""Hessians by differences of gradients, and Laplace's Gaussians from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.infer.search.climb import SafeDensity, identity

__all__ = ["Peaks", "bend", "difference", "first_metric", "laplace", "shortened", "symmetric_eigen", "triangular"]

_REACH = 10.0
_DROP, _HALVINGS = 4.0, 12  # nats at one standard deviation; a Gaussian has a half


class Peaks(NamedTuple):
    """Laplace's Gaussians, float64 on the CPU."""

    points: Tensor
    """Their means, ``(S, D)``."""
    values: Tensor
    """Log-density there in nats, ``(S,)``."""
    scale: Tensor
    """Lower triangular with positive diagonal, ``(S, D, D)``: the Cholesky factor of the covariance."""
    proper: Tensor
    """Whether the point is a maximum with curvature in all directions, ``(S,)``."""

    def chosen(self, rows: Tensor | slice) -> Peaks:
        """Selects some of them."""
        return Peaks(*(part[rows] for part in self))


def bend(safe: SafeDensity, points: Tensor, slope: Tensor, frame: Tensor) -> Tensor:
    r"""Returns :math:`F^\top (-\nabla^2 \log p) F`, ``(S, K, K)``, by differences along the columns of :math:`F`.

    Points and gradients have shape ``(S, D)``, :math:`F` has ``(S, D, K)``. The cost is one density call of ``2 S K``
    rows with gradients. One refused point makes the difference one-sided, two make it 0.
    """
    steps = frame.mT
    ahead, behind = (safe.round(points[:, None] + sign * steps) for sign in (1, -1))
    value, gradient = safe.gradients(torch.cat([ahead, behind]).flatten(0, 1))
    shape = (2, *steps.shape)
    known = (value > -torch.inf).reshape(shape[:-1])[..., None]
    gradient = torch.where(known, gradient.reshape(shape), slope[:, None])
    # The density rounds points, which matters in float32.
    sides = torch.where(known, torch.stack([ahead, behind]), points[:, None])
    asked = (steps * steps).sum(-1)
    got = ((sides[0] - sides[1]) * steps).sum(-1) / asked.clamp(min=1e-300)
    change = (gradient[1] - gradient[0]) / got.clamp(min=1e-3)[..., None]
    curvature = change @ frame
    return 0.5 * (curvature + curvature.mT)


def first_metric(safe: SafeDensity, points: Tensor, slope: Tensor) -> Tensor:
    """Returns positive definite inverse Hessians to begin a climb with, ``(S, D, D)``.

    Curvature counts in absolute value, with a floor that keeps a step within ``10 max(1, |z|)``.
    """
    size = points.abs().clamp(min=1.0)
    short = size * safe.eps ** (1 / 3)
    hessian = bend(safe, points, slope, torch.diag_embed(short)) / short[:, None, :] / short[:, :, None]
    least = slope.abs() / (_REACH * size)
    unit = hessian.diagonal(dim1=-2, dim2=-1).abs().maximum(least).clamp(min=1e-12).rsqrt()
    strength, axes = symmetric_eigen(hessian * unit[:, :, None] * unit[:, None, :])
    strength = strength.abs()
    strength = strength.maximum(strength.amax(-1, keepdim=True) * safe.eps**0.375)
    axes = axes * unit[..., None]
    # Along an axis of length l the step is l (l . g) / strength.
    length = (axes / size[..., None]).norm(dim=-2)
    push = (axes * slope[..., None]).sum(-2).abs()
    strength = strength.maximum(push * length / _REACH)
    return (axes / strength[:, None, :]) @ axes.mT


def difference(safe: SafeDensity) -> float:
    """Returns the difference's length in standard deviations: 0.001 in float64, 0.15 in noisy float32."""
    return 8.2 * safe.eps**0.25


def laplace(safe: SafeDensity, points: Tensor, frame: Tensor, *, rounds: int = 6) -> Peaks:
    r"""Climbs to maxima by Newton's method; returns Gaussians with precision :math:`|{-\nabla^2 \log p}|`.

    Points ``(S, D)`` must be near maxima; differences follow the columns of scales ``(S, D, D)`` of the right order of
    magnitude. Each round costs ``2 D`` rows with gradients, and a few without, per unsettled point.
    """
    points, frame = points.clone(), frame.clone()
    value, slope = safe.gradients(points)
    spectrum = torch.zeros_like(points)  # of the negative Hessian in units of the scale; near 1 when settled
    short = difference(safe)
    open_ = torch.ones_like(value, dtype=torch.bool)
    for turn in range(rounds):
        rows = open_.nonzero()[:, 0]
        if not len(rows) or (turn and safe.expired):
            break
        turned = bend(safe, points[rows], slope[rows], short * frame[rows]) / short**2
        strength, axes = symmetric_eigen(turned)
        spectrum[rows] = strength
        # Directions without curvature may grow fast once, then only slowly.
        floor = strength.abs().amax(-1, keepdim=True).clamp(max=1.0) * (1e-8 if turn == 0 else 0.05)
        size = strength.abs().maximum(floor)
        frame[rows] = (frame[rows] @ axes) / size.sqrt()[:, None, :]
        push = (slope[rows, None] @ frame[rows])[:, 0]
        promise = 0.5 * (push * push).sum(-1)
        noise = 1e-9 + 4 * safe.eps * value[rows].abs()
        step = (frame[rows] @ push[..., None])[..., 0]
        parts = step.new_tensor([1.0, 0.3, 0.03])
        trial = safe.round(points[rows] + parts[:, None, None] * step)
        reached = safe.values(trial.flatten(0, 1)).reshape(3, len(rows))
        pick = (reached >= value[rows] - noise).float().argmax(0)
        each = torch.arange(len(rows), device=rows.device)
        better = reached[pick, each] >= value[rows] - noise
        moved = torch.where(better[:, None], trial[pick, each], points[rows])
        fresh, incline = safe.gradients(moved)
        points[rows], value[rows], slope[rows] = moved, fresh, incline
        settled = ((strength > 0.5) & (strength < 2.0)).all(-1) & (promise < 1e-6 + noise)
        open_[rows[settled]] = False
    push = (slope[:, None] @ frame)[:, 0]
    flat = 0.5 * (push * push).sum(-1) < 1e-3 + 64 * safe.eps * value.abs()
    proper = flat & (spectrum > 0.05).all(-1) & value.isfinite() & frame.isfinite().all(-1).all(-1)
    frame = torch.where(proper[:, None, None], frame, frame.nan_to_num(nan=0.0, posinf=1e150, neginf=-1e150))
    return Peaks(points, value, triangular(frame), proper)


def shortened(safe: SafeDensity, peaks: Peaks) -> Peaks:
    """Halves the axes of the Gaussians until the density falls by less than 4 nats, on a side, at one of their lengths.

    A ridge that bends, as in a ring, is level at its top, where its curvature says nothing of its length.  The cost is
    ``2 D`` points without gradients for each peak, and more for axes that are halved.
    """
    axes, length, _ = torch.linalg.svd(peaks.scale)
    open_ = torch.ones_like(length, dtype=torch.bool)
    changed = torch.zeros_like(peaks.proper)
    for _ in range(_HALVINGS):
        if safe.expired:
            break
        rows, columns = open_.nonzero().unbind(1)
        step = axes[rows, :, columns] * length[rows, columns, None]
        there = safe.values(torch.cat([peaks.points[rows] + step, peaks.points[rows] - step])).reshape(2, -1)
        far = peaks.values[rows] - there.amax(0) > _DROP + 64 * safe.eps * peaks.values[rows].abs()
        open_[rows, columns] = far
        if not far.any():
            break
        length[rows[far], columns[far]] *= 0.5
        changed[rows[far]] = True
    scale = torch.where(changed[:, None, None], triangular(axes * length[:, None, :]), peaks.scale)
    return peaks._replace(scale=scale)


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns eigenvalues ``(..., D)`` and eigenvectors ``(..., D, D)``, or the diagonal if this fails."""
    matrix = matrix.nan_to_num(nan=0.0, posinf=1e150, neginf=-1e150).clamp(-1e150, 1e150)
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        return matrix.diagonal(dim1=-2, dim2=-1), identity(matrix).expand_as(matrix)


def triangular(frame: Tensor) -> Tensor:
    """Returns the lower triangular factor of ``frame @ frame.mT``, with positive diagonal."""
    upper = torch.linalg.qr(frame.mT, mode="r")[1]
    return upper.mT * upper.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
