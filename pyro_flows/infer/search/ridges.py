"""Follows the softest direction of a density from given points to where the density ends."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.infer.search.climb import SafeDensity
from pyro_flows.infer.search.curvature import bend, difference, symmetric_eigen, triangular

__all__ = ["Ridges", "follow_ridges"]

LONGEST = 10.0  # first step, in typical lengths
LONGER, SHORTER = 1.5, 0.3  # factors of a step after success and failure
LEAST = 1e-6  # step at which a walk has ended, in standard deviations
DROP = 2.0  # nats that a step may lose before it is corrected
CORRECTIONS = 3
BACK = 0.5  # length of a correction, by that of the step
STIFF = 1e-8  # least curvature by the largest
FADED = 0.003  # part of the mass that may be left where a walk ends
SHORT = 20  # steps for which it goes on anyway
WIDTH = 0.7  # of a Gaussian along the ridge, by the step
MEETING = 5  # steps between looks for places where others were
MET = 2.0  # standard deviations of a Gaussian that is met
OWN = 4 * MEETING  # last steps of a walk, in whose Gaussians it still is


class Ridges(NamedTuple):
    """Points along ridges with Gaussians as long as the steps between them, float64 on the CPU."""

    points: Tensor
    """``(N, D)``."""
    values: Tensor
    """Log-densities there, ``(N,)``."""
    scale: Tensor
    """Cholesky factors of the covariances, ``(N, D, D)``."""
    ends: Tensor
    """The last point of each walk, ``(2 S, D)``."""
    complete: bool
    """Whether each walk ended where there was no more mass, or where another was, and not by the number of steps."""


def follow_ridges(safe: SafeDensity, points: Tensor, scale: Tensor, *, steps: int = 400) -> Ridges:
    r"""Walks along ridges of a log-density, both ways, while there is mass around.

    A step goes along the eigenvector of :math:`-\nabla^2 \log p` with the smallest absolute eigenvalue, at most one
    standard deviation of that direction, and is followed by Newton steps across.  It is shortened if it loses more than
    2 nats before these, and lengthened otherwise, so that a thin curve is followed round its bends: its far ends are
    reached in tens of steps, where a random walk takes thousands.  A walk ends where hardly any of the mass on ridges,
    by Laplace's approximation across, is ahead; or where it or another has been.  Each step costs ``4 D + 4`` gradients
    a walk.

    Args:
        safe: the log-density.
        points: the starting points, ``(S, D)``.
        scale: typical lengths of the dimensions, ``(D,)``, in whose units directions are compared.
        steps: the steps of a walk at most.
    """
    start = points.detach().double().cpu()
    scale = scale.detach().double().cpu()
    z = torch.cat([start, start])
    value, slope = safe.gradients(z)
    heading, stride = torch.zeros_like(z), torch.ones_like(value)
    traveled = torch.zeros_like(value)
    open_ = value.isfinite()
    found: list[_Step] = []
    for turn in range(steps):
        rows = open_.nonzero().squeeze(-1)
        if not len(rows) or safe.expired:
            break
        at = z[rows]
        strength, axes = _curvature(safe, at, slope[rows], scale)
        widths = strength.rsqrt().clamp(max=1.0)
        # The mass on a unit of length.  If it falls as a power of the length, as on a curve that stretches, the mass
        # ahead is this times the length.
        thick = value[rows] + widths[:, 1:].log().sum(-1)
        soft = axes[..., 0]
        if turn == 0:  # the two walks from a point go apart
            lead = soft[: len(rows) // 2]
            heading[rows] = torch.cat([lead, -lead])
        sign = torch.where((soft * heading[rows]).sum(-1) < 0, -1.0, 1.0).double()
        soft = soft * sign.unsqueeze(-1)
        length = stride[rows] * strength[:, 0].rsqrt().clamp(max=LONGEST)
        ahead = safe.round(at + length.unsqueeze(-1) * soft * scale)
        there, incline = safe.gradients(ahead)
        near = there >= value[rows] - DROP
        ahead, there, incline = _across(safe, ahead, there, incline, strength, axes, length, scale)
        fine = near & there.isfinite()
        if fine.any():
            widths[:, 0] = WIDTH * length
            frame = scale.unsqueeze(-1) * axes * widths.unsqueeze(-2)
            moved = rows[fine]
            mass = (thick + length.log())[fine]
            found.append(
                _Step(at[fine], value[moved], triangular(frame[fine]), moved, mass, torch.full_like(moved, turn))
            )
            traveled[moved] += length[fine]
            z[moved], value[moved], slope[moved], heading[moved] = ahead[fine], there[fine], incline[fine], soft[fine]
        stride[rows] = (stride[rows] * torch.where(fine, LONGER, SHORTER)).clamp(max=1.0)
        open_[rows] = stride[rows] > LEAST
        if turn >= SHORT and found:
            total = torch.cat([step.mass for step in found]).logsumexp(0)
            open_[rows] &= thick + traveled[rows].log() > total + math.log(FADED)
        if turn % MEETING == MEETING - 1 and found:
            rows = open_.nonzero().squeeze(-1)
            open_[rows] = ~_met(z[rows], rows, turn, _Step(*map(torch.cat, zip(*found, strict=True))), len(start))
    if not found:
        dim = z.shape[1]
        return Ridges(z[:0], value[:0], z.new_zeros(0, dim, dim), z, not open_.any())
    places = _Step(*map(torch.cat, zip(*found, strict=True)))
    return Ridges(places.points, places.values, places.scale, z, not open_.any())


class _Step(NamedTuple):
    points: Tensor
    values: Tensor
    scale: Tensor
    walk: Tensor
    mass: Tensor
    turn: Tensor


def _met(z: Tensor, walk: Tensor, turn: int, seen: _Step, half: int) -> Tensor:
    """Whether walks are where another, or they themselves long before, have been."""
    away = (z - seen.points.unsqueeze(1)).mT  # (N, D, walks)
    far = torch.linalg.solve_triangular(seen.scale, away, upper=False).square().sum(-2)
    theirs, when = seen.walk.unsqueeze(-1), seen.turn.unsqueeze(-1)
    # Of two walks that meet, the one with the higher number ends; but the two from one point begin side by side.
    apart = (theirs % half != walk % half) | (when >= OWN)
    other = ((theirs < walk) & apart) | ((theirs == walk) & (when < turn - OWN))
    return ((far < MET**2) & other).any(0)


def _across(
    safe: SafeDensity,
    points: Tensor,
    value: Tensor,
    slope: Tensor,
    strength: Tensor,
    axes: Tensor,
    length: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Climbs across a ridge by Newton steps with one Hessian."""
    for _ in range(CORRECTIONS):
        push = (axes.mT @ (slope * scale).unsqueeze(-1)).squeeze(-1) / strength
        push[:, 0] = 0.0
        move = (axes @ push.unsqueeze(-1)).squeeze(-1)
        part = (BACK * length / move.norm(dim=-1).clamp(min=1e-300)).clamp(max=1.0)
        trial = safe.round(points + part.unsqueeze(-1) * move * scale)
        reached, incline = safe.gradients(trial)
        better = reached > value
        points, slope = (torch.where(better.unsqueeze(-1), *pair) for pair in ((trial, points), (incline, slope)))
        value = torch.maximum(reached, value)
    return points, value, slope


def _curvature(safe: SafeDensity, z: Tensor, slope: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Returns absolute eigenvalues of the negative Hessian in units of the scale, smallest first, and their vectors."""
    short = difference(safe)
    reach = scale / (1 + (slope * scale).abs())
    for _ in range(2):  # differences as long as the ridge is wide along each axis
        step = short * reach
        hessian = bend(safe, z, slope, torch.diag_embed(step)) / step.unsqueeze(-2) / step.unsqueeze(-1)
        reach = torch.minimum(hessian.diagonal(dim1=-2, dim2=-1).abs().clamp(min=1e-300).rsqrt(), scale)
    strength, axes = symmetric_eigen(hessian * scale.unsqueeze(-1) * scale)
    order = strength.abs().argsort(-1)
    strength = strength.abs().gather(-1, order)
    axes = axes.gather(-1, order.unsqueeze(-2).expand_as(axes))
    return strength.maximum(STIFF * strength[:, -1:]).clamp(min=1e-300), axes
