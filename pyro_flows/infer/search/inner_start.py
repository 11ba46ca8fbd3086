"""Finds the start of a guide with the model's structure."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flows.infer.models.structure import Structure
from pyro_flows.infer.search.climb import LogDensity, SafeDensity, climb
from pyro_flows.infer.search.curvature import Peaks, laplace, symmetric_eigen
from pyro_flows.infer.search.inner import InnerDensity, MemberBlocks
from pyro_flows.infer.search.lines import PLACES, Shapes

__all__ = ["InnerStart", "find_inner_start"]

OTHERS = 8  # starts, of which all but the first need so many times its seconds
CLIMBING, PEAK = 0.5, 0.7  # shares of the time left for the globals' climb, and for the curvature at its end
WIDE = 1.2  # widths of the globals over which members are expanded
ROUGH = 1e-9  # precision of a marginal density by differences
TOGETHER = 16  # points that are expanded at once
FEWEST = 2  # points, for each that a linear map needs, which tell more than the members' first derivatives
CLOSE = 1e-4  # nats from the end of a climb
CALLS = 2.5  # of Newton's method for a point, from where its neighbors lead
SAME = 0.1  # distance of two ends of climbs, in standard deviations
NEAR = 0.5  # shift of the center, in standard deviations, after which points need not move
CENTERS = 3
WALLS = 3  # climbs anew, each with the walls of members where the last one ended
FLATTER = 1e3  # times the standard deviations without the members' volume, at which a curvature is noise
FLAT = 1e-16  # precision of a global
BENT = 0.8  # most part of the curvature that a correction takes away
FARTHEST = 3.0  # shift of the center at once, in standard deviations


class InnerStart(NamedTuple):
    """A start: globals and members in a vector of ``D`` latents."""

    loc: Tensor
    """The globals' mode, and the members' modes given these, ``(D,)``."""
    scale: Tensor
    """Standard deviations: the globals' own, the members' given the globals, ``(D,)``."""
    factor: Tensor
    """Lower triangular factor of the globals' covariance, ``(G, G)``."""
    globals: Tensor
    """Values of the globals, ``(n, G)``, at each of which follow, for each group:"""
    members: list[Members]


class Members(NamedTuple):
    """Members of a group at some values of the globals."""

    means: Tensor
    """Where ancestors and steps before are 0, ``(n, J, d)``."""
    factors: Tensor
    """Lower triangular factors of covariances given these, ``(n, J, d, d)``."""
    slopes: Tensor
    """Derivatives of means with respect to ancestors, ``(n, J, d, a)``."""
    carries: Tensor
    """The same with respect to the step before, ``(n, chains, length - 1, d, d)``."""
    shift: Tensor
    """Skews along the factors' columns, ``(n, J, d)``."""
    tail: Tensor
    """Tails along these, ``(n, J, d)``."""


def find_inner_start(
    density: LogDensity,
    structure: Structure,
    initial: Tensor,
    *,
    num_points: int = 0,
    seconds: float | None = None,
) -> InnerStart | None:
    r"""Finds a start for globals, and for members given these.

    Members are at their modes by Newton's method. Globals climb the density in which members are integrated out by
    Laplace's approximation, whose mode is, unlike that of all latents, inside of the posterior of a hierarchy. Around
    it, members' modes and covariances at ``num_points`` values of the globals show how they depend on these. There,
    ten gradients along the axes of each member give its mass, skew and tails, and the masses correct the globals' mode
    and covariance.

    The number of gradients of the density depends on the globals and the variables of a member, not on the number of
    members: some 1000 for four globals and members of one variable each, half of them at values of the globals. If
    time is short, there are fewer of these, or only the first derivatives of the members' modes at the globals' mode.

    Args:
        density: the unnormalized log-density, ``(S, D)`` to ``(S,)``.
        structure: globals and members among the ``D`` variables.
        initial: a point with finite density, shape ``(D,)``.
        num_points: values of the globals, at least 16.
        seconds: the wall-clock limit, checked between calls.

    Returns:
        The start in float64 on the CPU, or ``None`` if time or precision did not suffice.

    References:
        Approximate Bayesian inference for latent Gaussian models by using integrated nested Laplace approximations (Rue
        et al., 2009); Embedded Laplace approximation (Margossian et al., 2020), arXiv:2004.12550.
    """
    try:
        found = _found(SafeDensity(density, initial, seconds=seconds), structure, initial, num_points)
    except torch.linalg.LinAlgError:  # curvatures of members that hardly have a mode
        return None
    if found is None:
        return None
    # As the guide will hold them, perhaps with fewer digits.
    parts = [part.to(initial.dtype) for part in (*found[:4], *(x for members in found.members for x in members))]
    sizes = parts[1], parts[2].diagonal()
    fine = all(bool(part.isfinite().all()) for part in parts) and all(bool((size > 0).all()) for size in sizes)
    return found if fine else None


def _found(safe: SafeDensity, structure: Structure, initial: Tensor, num_points: int) -> InnerStart | None:
    """Finds the start, which may be without finite numbers."""
    inner = InnerDensity(safe, structure, initial)
    at, best = structure.globals, inner.point[structure.globals]
    inner.measure(inner.expanded(inner.point[None])[2])
    factor = best.new_zeros(len(at), len(at))
    late: tuple[Tensor, MemberBlocks] | None = None
    if len(at):
        peak = _globals_peak(inner)
        if peak is None:
            return None
        best, factor, late = peak
    count = max(TOGETHER, num_points) if len(at) else 1
    noise = WIDE * torch.randn(count, len(at), dtype=torch.float64, device="cpu")
    noise[0] = 0.0
    for _ in range(CENTERS):
        z, value, blocks, _ = inner.settled(best[None])
        if not safe.expired and value.isfinite().all():
            inner.measure(blocks)
            if len(at):
                inner.joint(z[0], blocks)
        elif late is not None:
            z, blocks = late
        else:
            return None
        g = best + noise @ factor.mT
        there, value, found, _ = inner.settled(g[: TOGETHER if inner.walled else 1])
        if not safe.expired and value.isfinite().all() and inner.bound(there, found):
            z, _, blocks, _ = inner.settled(best[None])
            inner.measure(blocks)
        g, members, log_mass = _expanded(inner, g) or _extended(inner, z, blocks, g)
        near = (g - best) if not len(at) else torch.linalg.solve_triangular(factor, (g - best).mT, upper=False).mT
        shift, turn = _correction(near, log_mass)
        best, factor = best + factor @ shift, factor @ turn
        if len(at):
            inner.size[at] = factor.square().sum(1).sqrt()
        if shift.norm() < NEAR or safe.expired:
            break
    loc = z[0].clone()
    if inner.lean is not None:
        loc += inner.lean @ (best - loc[at])
    loc[at] = best
    return InnerStart(loc, inner.size, factor, g, members)


def _globals_peak(inner: InnerDensity) -> tuple[Tensor, Tensor, tuple[Tensor, MemberBlocks]] | None:
    """Returns the globals' mode ``(G,)`` and a factor of their covariance ``(G, G)``, members integrated out.

    And a point ``(1, D)`` near by, and the members' factorized Hessian there.
    """
    safe, at = inner.safe, inner.at
    best = inner.point[at]
    z, value, blocks, _ = inner.settled(best[None])
    if safe.expired or not value.isfinite().all():
        return None
    if inner.bound(z, blocks):
        z, value, blocks, _ = inner.settled(best[None])
    inner.measure(blocks)
    metric = _covariance(inner.joint(z[0], blocks), least=1.0)
    inner.size[at] = metric.diagonal().sqrt()
    outer = SafeDensity(inner, best)
    outer.deadline, outer.eps = safe.deadline, max(ROUGH, safe.eps)
    began = time.monotonic()
    first = _end(outer, best[None], metric)
    for _ in range(WALLS):
        z, value, blocks, _ = inner.settled(first[0][None])
        if safe.expired or not value.isfinite().all() or not inner.bound(z, blocks):
            break
        first = _end(outer, best[None], metric)
    spent = time.monotonic() - began
    ends, levels = [first[0]], [first[1]]
    # Others from around, if there is time.
    if safe.deadline is None or OTHERS * spent < safe.deadline - time.monotonic():
        around = torch.rand(OTHERS - 1, len(at), dtype=torch.float64, device="cpu")
        points = best + 2 * (2 * around - 1)
        points = points[outer.values(points).isfinite()]
        if len(points):
            other = _end(outer, points, metric)
            ends.append(other[0])
            levels.append(other[1])
    found: list[tuple[bool, float, Tensor, Tensor, tuple[Tensor, MemberBlocks]]] = []
    for end, level in zip(ends, levels, strict=True):
        same = found and ((end - found[0][2]) / inner.size[at]).abs().max() < SAME
        if not level > -math.inf or (found and safe.expired) or same:
            continue
        z, value, blocks, _ = inner.settled(end[None])
        if safe.expired or not value.isfinite().all():
            continue
        inner.measure(blocks)
        covariance = _covariance(inner.joint(z[0], blocks))
        if not covariance.isfinite().all():
            continue
        factor = torch.linalg.cholesky(covariance)
        inner.size[at] = covariance.diagonal().sqrt()
        there = z, blocks
        rough = (False, level + float(factor.diagonal().log().sum()), end, factor, there)
        with outer.share(PEAK):
            peak = laplace(outer, end[None], factor[None], rounds=1)
            if not peak.proper[0] and not outer.expired:
                peak = laplace(outer, peak.points, peak.scale, rounds=3)
            late = outer.expired
        sizes = peak.scale[0].norm(dim=-1) / factor.norm(dim=-1)
        if not late and all(part[0].isfinite().all() for part in peak[:3]) and sizes.amax() < FLATTER:
            rough = (bool(peak.proper[0]), _mass(peak), peak.points[0], peak.scale[0], there)
        found.append(rough)
    if not found:
        return None
    _, _, best, factor, there = max(found, key=lambda each: each[:2])
    inner.size[at] = factor.square().sum(1).sqrt()
    return best, factor, there


def _mass(peak: Peaks) -> float:
    return float(peak.values[0] + peak.scale[0].diagonal().log().sum())


def _end(outer: SafeDensity, points: Tensor, metric: Tensor) -> tuple[Tensor, float]:
    """Returns the end of the highest climb, and the log-density there."""
    with outer.share(CLIMBING):
        metrics = metric.expand(len(points), -1, -1)
        ends, values, _ = climb(outer, points, memory=None, metric=metrics, steps=60, tolerance=CLOSE).ends()
    return ends[values.argmax()], float(values.max())


def _covariance(precision: Tensor, least: float = 0.0) -> Tensor:
    """Inverts a precision, by its eigenvalues in absolute value, at least ``least``."""
    strength, axes = symmetric_eigen(precision)
    strength = strength.abs()
    strength = strength.clamp(min=max(least, FLAT)).maximum(1e-12 * strength.amax())
    return (axes / strength) @ axes.mT


def _expanded(inner: InnerDensity, g: Tensor) -> tuple[Tensor, list[Members], Tensor] | None:
    """Returns the globals of those that time allows, members there, and logarithms of masses beside Laplace's.

    ``None`` if these are too few to tell more than first derivatives.
    """
    safe = inner.safe
    each = CALLS * (1 + len(inner.sides) * len(inner.columns))
    shaped = len(PLACES) * max((inner.groups[k].places.shape[1] for k in inner.shapely), default=0)
    left = math.inf if safe.deadline is None else max(0.0, safe.deadline - time.monotonic()) / inner.price
    fewest = min(len(g), FEWEST * (1 + len(inner.at)))
    if left < fewest * (each + shaped):
        shaped = 0
    # One call must not take what is left.
    together = max(1, min(TOGETHER, int(min(left / (each + shaped), 1e6)) // 4))
    parts = []
    for several in g.split(together):
        z, value, blocks, _ = inner.settled(several)
        shapes = inner.shapes(z, blocks) if shaped else {}
        if safe.expired:
            break  # members may not be at their modes
        fine = value.isfinite()
        members, log_mass = _members(inner, z, blocks, shapes)
        parts.append((several[fine], [Members(*(x[fine] for x in each)) for each in members], log_mass[fine]))
    done = sum(len(part[0]) for part in parts)
    if done < fewest or 2 * done < len(parts) * together:
        return None
    points, groups, masses = zip(*parts, strict=True)
    joined = [Members(*map(torch.cat, zip(*each, strict=True))) for each in zip(*groups, strict=True)]
    return torch.cat(points), joined, torch.cat(masses)


def _extended(inner: InnerDensity, z: Tensor, blocks: MemberBlocks, g: Tensor) -> tuple[Tensor, list[Members], Tensor]:
    """Returns the same from one point ``(1, D)``, by the first derivatives of the members' modes."""
    rows = z.repeat(len(g), 1)
    if inner.lean is not None:
        rows += (g - z[:, inner.at]) @ inner.lean.mT
    return g, _members(inner, rows, blocks.repeated(len(g)), {})[0], g.new_zeros(len(g))


def _members(
    inner: InnerDensity, z: Tensor, blocks: MemberBlocks, shapes: dict[int, Shapes]
) -> tuple[list[Members], Tensor]:
    """Returns each group's members at points ``(S, D)``, and logarithms of their masses beside Laplace's, ``(S,)``."""
    found, log_mass = [], z.new_zeros(len(z))
    for k, (group, above, factor) in enumerate(zip(inner.groups, inner.above, blocks.factors, strict=True)):
        means, none = z[:, group.places], factor.new_zeros(factor.shape[:-1])
        shift = tail = none
        if k in shapes:
            mass, mean, scale, shift, tail = shapes[k]
            log_mass = log_mass + mass.sum((-2, -1))
            means = means + (factor @ mean[..., None])[..., 0]
            factor = factor * scale[..., None, :]
        means = means - (blocks.slope[k] @ z[:, above][..., None])[..., 0]
        before = z[:, group.places].unflatten(1, (-1, group.length))
        carried = (blocks.carry[k] @ before[:, :, :-1, :, None])[..., 0]
        means = (means.unflatten(1, (-1, group.length)) - F.pad(carried, (0, 0, 1, 0))).flatten(1, 2)
        found.append(Members(means, factor, blocks.slope[k], blocks.carry[k], shift, tail))
    return found, log_mass


def _correction(near: Tensor, log_mass: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how far and how wide masses move a standard normal: the mean ``(G,)`` and a factor ``(G, G)``.

    Their logarithms at points ``(n, G)`` are quadratic, or linear if points are few.
    """
    count, dim = near.shape
    one, none = torch.eye(dim, dtype=near.dtype, device="cpu"), near.new_zeros(dim)
    row, column = torch.tril_indices(dim, dim, device="cpu")
    size = 1 + dim + len(row)
    linear = torch.cat([torch.ones_like(near[:, :1]), near], 1)
    if count < 2 * (1 + dim) or not dim or not log_mass.any():
        return none, one
    whole = torch.cat([linear, near[:, row] * near[:, column]], 1) if count >= 1.5 * size else linear
    found = torch.linalg.lstsq(whole, log_mass[:, None]).solution[:, 0]
    bend = torch.zeros_like(one)
    if len(found) == size:
        bend[row, column] = found[1 + dim :]
    strength, axes = torch.linalg.eigh(one - bend - bend.mT)
    covariance = (axes / strength.clamp(1 - BENT, 1 / (1 - BENT))) @ axes.mT
    shift = covariance @ found[1 : 1 + dim]
    return shift * (FARTHEST / shift.norm().clamp(min=FARTHEST)), torch.linalg.cholesky(covariance)
