"""Finds the start of a guide with global latents and members of plates, which Newton's method integrates out."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from pyro_flows.infer.models.structure import Structure
from pyro_flows.infer.search.climb import LogDensity, SafeDensity, climb
from pyro_flows.infer.search.curvature import Peaks, laplace, symmetric_eigen

__all__ = ["InnerStart", "find_inner_start"]

ROUNDS = 12  # of Newton's method
FAR = 3.0  # longest step of a member, in standard deviations
SETTLED = 1e-3  # the same, at the end
LEAST = 1e-8  # curvature
NEAR = 64  # points whose members' modes are kept
OTHERS = 4  # starts, of which all but the first need so many times its seconds
CLIMBING = 0.6  # share of the time for the globals' mode
WIDE = 1.2  # widths of the globals over which members are expanded
ROUGH = 1e-9  # precision of a marginal density by differences


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
    means: list[Tensor]
    """Members' modes, ``(n, J, d)``, where their ancestors are 0."""
    factors: list[Tensor]
    """Lower triangular factors of members' covariances given their ancestors, ``(n, J, d, d)``."""
    slopes: list[Tensor]
    """Derivatives of members' modes with respect to ancestors, ``(n, J, d, a)``."""


class _Blocks(NamedTuple):
    """A factorized block matrix: for each group what remains after its descendants are integrated out."""

    inverse: list[Tensor]
    """Covariances given ancestors, ``(S, J, d, d)``."""
    slope: list[Tensor]
    """Derivatives of the members' modes with respect to ancestors, ``(S, J, d, a)``."""
    log_size: Tensor
    """Half of the logarithm of the matrix's determinant, ``(S,)``."""


class InnerDensity:
    r"""The density of the globals with the members integrated out by Laplace's approximation.

    :math:`\log p(g) \approx \log p(g, l^*) - \tfrac12 \log\det H(g, l^*) + \tfrac12 \dim(l) \log 2\pi` at the members'
    mode :math:`l^*(g)`. Members are independent given globals and ancestors, so differences of gradients along one
    variable of all members at once give the blocks of :math:`H`: all Newton steps of all members cost :math:`2 d`
    gradients, for any number of them. The globals' gradient is by differences, too.
    """

    def __init__(self, safe: SafeDensity, structure: Structure, initial: Tensor) -> None:
        self.safe, self.structure = safe, structure
        self.at, self.groups = structure.globals, structure.groups
        self.point = initial.detach().double().cpu()
        self.size = torch.full_like(self.point, 0.1)  # lengths for differences
        self.local = torch.cat([group.places.flatten() for group in self.groups])
        self.short = 8.2 * safe.eps**0.25
        self.known: list[tuple[Tensor, Tensor]] = []

    def __call__(self, g: Tensor) -> Tensor:
        """Returns log-densities ``(S,)`` at globals ``(S, G)``."""
        return self.settled(g)[1]

    def value_and_slope(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log-densities and gradients ``(S, G)``."""
        z, value, blocks, slope = self.settled(g)
        count, length = g.shape[1], 0.1 * self.short**0.5 * self.size[self.at]
        sides = torch.cat([torch.diag(length), -torch.diag(length)])
        rows = z.repeat_interleave(2 * count, 0)
        rows[:, self.at] += sides.repeat(len(g), 1)
        # One step follows the modes, up to the square of the difference.
        push = self.safe.gradients(rows)[1]
        repeated = _Blocks(
            [each.repeat_interleave(2 * count, 0) for each in blocks.inverse],
            [each.repeat_interleave(2 * count, 0) for each in blocks.slope],
            blocks.log_size,
        )
        ahead, _, found = self.expanded(rows + self._step(push, repeated))
        # At the members' modes, their own change leaves the log-density as it is.
        sizes = found.log_size.masked_fill(~ahead.isfinite(), math.nan).view(len(g), 2, count)
        return value, slope[:, self.at] - (sizes[:, 0] - sizes[:, 1]) / (2 * length)

    def settled(self, g: Tensor) -> tuple[Tensor, Tensor, _Blocks, Tensor]:
        """Returns points ``(S, D)`` with members at their modes, marginal log-densities, factors and gradients."""
        z = self.point.repeat(len(g), 1)
        if self.known:
            seen, ends = map(torch.stack, zip(*self.known, strict=True))
            away = (g[:, None] - seen) / self.size[self.at]
            z = ends[away.square().sum(-1).argmin(1)]
        z[:, self.at] = g
        value, slope, blocks = self.expanded(z)
        part = torch.ones_like(value)
        for _ in range(ROUNDS):
            step = self._step(slope, blocks)
            gain = (step * slope).sum(-1)
            if self.safe.expired or not (gain > SETTLED**2 * (1 + part)).any():
                break
            trial = z + part[:, None] * step
            ahead, incline, found = self.expanded(trial)
            better = ahead >= value - 1e-9 - 64 * self.safe.eps * value.abs()
            part = torch.where(better, torch.ones_like(part), 0.25 * part)
            z = torch.where(better[:, None], trial, z)
            value, slope = torch.where(better, ahead, value), torch.where(better[:, None], incline, slope)
            blocks = _chosen(better, found, blocks)
        fine = value.isfinite()
        self.known = [*self.known, *zip(g[fine], z[fine], strict=True)][-NEAR:]
        marginal = value - blocks.log_size + 0.5 * len(self.local) * math.log(2 * math.pi)
        return z, marginal, blocks, slope

    def expanded(self, z: Tensor) -> tuple[Tensor, Tensor, _Blocks]:
        """Returns log-densities ``(S,)``, gradients ``(S, D)``, and the factorized Hessian of the members."""
        columns = [(k, c) for k, group in enumerate(self.groups) for c in range(group.places.shape[1])]
        length = self.short * self.size
        rows = z.repeat(1 + 2 * len(columns), 1, 1)
        for n, (k, c) in enumerate(columns):
            places = self.groups[k].places[:, c]
            rows[1 + 2 * n, :, places] += length[places]
            rows[2 + 2 * n, :, places] -= length[places]
        rows = self.safe.round(rows)
        value, slope = self.safe.gradients(rows.flatten(0, 1))
        value, slope = value.view(rows.shape[:2]), slope.view(rows.shape)
        fine = value.isfinite().all(0)
        own = [z.new_zeros(len(z), *g.places.shape, g.places.shape[1]) for g in self.groups]
        over = [z.new_zeros(len(z), *g.places.shape, a.shape[1]) for g, a in zip(self.groups, self._above, strict=True)]
        for n, (k, c) in enumerate(columns):
            # Points may have been rounded.
            moved = (rows[1 + 2 * n] - rows[2 + 2 * n])[:, self.groups[k].places[:, c]]
            change = slope[2 + 2 * n] - slope[1 + 2 * n]
            own[k][..., c] = change[:, self.groups[k].places] / moved[..., None]
            for i, group in enumerate(self.groups):
                at = 0
                for parent, of in group.above:
                    if parent == k:
                        over[i][..., at + c] = change[:, group.places] / moved[:, of, None]
                    at += self.groups[parent].places.shape[1]
        return torch.where(fine, value[0], -math.inf), slope[0], self._factorized(own, over)

    @property
    def _above(self) -> list[Tensor]:
        return self.structure.ancestors

    def _factorized(self, own: list[Tensor], over: list[Tensor]) -> _Blocks:
        """Integrates out descendants before their ancestors."""
        own, over = list(own), list(over)
        inverse, slope = list(own), list(over)
        log_size = own[0].new_zeros(len(own[0]))
        for k in range(len(own) - 1, -1, -1):
            if own[k].shape[-1] == 1:
                strength, axes = own[k][..., 0], torch.ones_like(own[k])
            else:
                strength, axes = symmetric_eigen(0.5 * (own[k] + own[k].mT))
            scale = strength.abs().amax(-1, keepdim=True)
            strength = strength.abs().clamp(min=LEAST).maximum(LEAST * scale)
            log_size = log_size + 0.5 * strength.log().sum((-2, -1))
            inverse[k] = (axes / strength[..., None, :]) @ axes.mT
            slope[k] = -inverse[k] @ over[k]
            filled = over[k].mT @ slope[k]  # (S, J, a, a), to be added to the ancestors' blocks
            at = 0
            for parent, of in self.groups[k].above:
                size = self.groups[parent].places.shape[1]
                part = slice(at, at + size)
                own[parent] = own[parent].index_add(1, of, filled[..., part, part])
                over[parent] = over[parent].index_add(1, of, filled[..., part, :at])
                at += size
        return _Blocks(inverse, slope, log_size)

    def _step(self, slope: Tensor, blocks: _Blocks) -> Tensor:
        """Solves for Newton's step of the members, none longer than some standard deviations."""
        push = [slope[:, group.places] for group in self.groups]
        for k in range(len(push) - 1, -1, -1):
            passed, at = (blocks.slope[k].mT @ push[k][..., None])[..., 0], 0
            for parent, of in self.groups[k].above:
                size = self.groups[parent].places.shape[1]
                push[parent] = push[parent].index_add(1, of, passed[..., at : at + size])
                at += size
        step = torch.zeros_like(slope)
        for k, (group, above) in enumerate(zip(self.groups, self._above, strict=True)):
            own = (blocks.inverse[k] @ push[k][..., None])[..., 0]
            far = (own * push[k]).sum(-1, keepdim=True).clamp(min=0).sqrt()
            own = own * (FAR / far.clamp(min=FAR))
            step[:, group.places] = own + (blocks.slope[k] @ step[:, above][..., None])[..., 0]
        return step


def _chosen(better: Tensor, new: _Blocks, old: _Blocks) -> _Blocks:
    pick = better[:, None, None, None]
    return _Blocks(
        [torch.where(pick, a, b) for a, b in zip(new.inverse, old.inverse, strict=True)],
        [torch.where(pick, a, b) for a, b in zip(new.slope, old.slope, strict=True)],
        torch.where(better, new.log_size, old.log_size),
    )


def find_inner_start(
    density: LogDensity,
    structure: Structure,
    initial: Tensor,
    *,
    num_points: int = 0,
    seconds: float | None = None,
    generator: Generator | None = None,
) -> InnerStart | None:
    r"""Finds a start for globals, and for members given these.

    Members are at their modes by Newton's method. Globals climb the density in which members are integrated out by
    Laplace's approximation, whose mode is, unlike that of all latents, inside of the posterior of a hierarchy. Around
    it, members' modes and covariances at ``num_points`` values of the globals show how they depend on these.

    Args:
        density: the unnormalized log-density, ``(S, D)`` to ``(S,)``.
        structure: globals and members among the ``D`` variables.
        initial: a point with finite density, shape ``(D,)``.
        num_points: values of the globals, at least 16.
        seconds: the wall-clock limit, checked between calls.
        generator: the source of randomness, on the CPU.

    Returns:
        The start in float64 on the CPU, or ``None`` if time or precision did not suffice.

    References:
        Approximate Bayesian inference for latent Gaussian models by using integrated nested Laplace approximations (Rue
        et al., 2009); Embedded Laplace approximation (Margossian et al., 2020), arXiv:2004.12550.
    """
    begin = time.monotonic()
    safe = SafeDensity(density, initial, seconds=seconds)
    inner = InnerDensity(safe, structure, initial)
    at, point = structure.globals, inner.point
    factor = torch.zeros(len(at), len(at), dtype=torch.float64)
    best = point[at]
    _measure(inner, inner.expanded(point[None])[2])
    if len(at):
        inner.size[at] = _widths(safe, point, at)
        outer = SafeDensity(inner, best, seconds=None if seconds is None else seconds - (time.monotonic() - begin))
        outer.eps = max(ROUGH, safe.eps)
        metric = torch.diag(inner.size[at].square())
        began = time.monotonic()
        peak = _peak(outer, best[None], metric)
        spent = time.monotonic() - began
        if outer.deadline is None or OTHERS * spent < outer.deadline - time.monotonic():
            around = torch.rand(OTHERS - 1, len(at), generator=generator, dtype=torch.float64, device="cpu")
            points = best + 2 * (2 * around - 1)
            points = points[outer.values(points).isfinite()]
            other = _peak(outer, points, metric) if len(points) else peak
            peak = max(peak, other, key=lambda each: (bool(each.proper[0]), float(each.log_mass()[0])))
        best, factor = peak.points[0], peak.scale[0]
        if not (best.isfinite().all() and factor.isfinite().all() and peak.values.isfinite().all()):
            return None
        inner.size[at] = factor.square().sum(1).sqrt()
    z, value, blocks, _ = inner.settled(best[None])
    if safe.expired or not value.isfinite().all():
        return None
    _measure(inner, blocks)
    noise = torch.randn(
        max(16, num_points) if len(at) else 1, len(at), generator=generator, dtype=torch.float64, device="cpu"
    )
    noise[0] = 0.0
    g = best + WIDE * noise @ factor.mT
    parts = []
    for several in g.split(16):
        settled = inner.settled(several)
        if safe.expired:
            break  # members may not be at their modes
        parts.append(settled)
    if not parts:
        return None
    found = torch.cat([part[0] for part in parts])
    values = torch.cat([part[1] for part in parts])
    fine = values.isfinite()
    if 2 * int(fine.sum()) < len(g):
        return None
    means, factors, slopes = [], [], []
    for k, (group, above) in enumerate(zip(structure.groups, structure.ancestors, strict=True)):
        inverse, slope = (torch.cat([getattr(p[2], name)[k] for p in parts])[fine] for name in ("inverse", "slope"))
        modes = found[fine][:, group.places]
        means.append(modes - (slope @ found[fine][:, above][..., None])[..., 0])
        factors.append(torch.linalg.cholesky(0.5 * (inverse + inverse.mT)))
        slopes.append(slope)
    return InnerStart(z[0], inner.size, factor, found[fine][:, at], means, factors, slopes)


def _measure(inner: InnerDensity, blocks: _Blocks) -> None:
    """Takes the members' standard deviations as lengths."""
    for group, inverse in zip(inner.groups, blocks.inverse, strict=True):
        inner.size[group.places] = inverse[0].diagonal(dim1=-2, dim2=-1).sqrt()


def _peak(outer: SafeDensity, points: Tensor, metric: Tensor) -> Peaks:
    """Returns Laplace's Gaussian at the end of the highest climb."""
    with outer.share(CLIMBING):
        ends, values, _ = climb(outer, points, memory=None, metric=metric.expand(len(points), -1, -1), steps=60).ends()
    return laplace(outer, ends[values.argmax()][None], metric.sqrt()[None], rounds=4)


def _widths(safe: SafeDensity, point: Tensor, at: Tensor) -> Tensor:
    """Returns rough widths of the globals, from their curvature at fixed members."""
    length = safe.eps ** (1 / 3) * point[at].abs().clamp(min=1.0)
    sides = torch.zeros(2, len(at), len(point), dtype=torch.float64)
    sides[0, :, at], sides[1, :, at] = torch.diag(length), -torch.diag(length)
    slope = safe.gradients((point + sides).flatten(0, 1))[1].view(sides.shape)
    change = (slope[1] - slope[0])[:, at].diagonal().abs() / (2 * length)
    return (3 * change.clamp(min=1e-12).rsqrt()).clamp(max=1.0)
