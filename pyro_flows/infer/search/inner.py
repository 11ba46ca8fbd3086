"""The density of a model's globals, from which Newton's method integrates the members of plates out."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.core.recurrence import recurrence
from pyro_flows.infer.models.structure import Group, Structure
from pyro_flows.infer.search.climb import SafeDensity
from pyro_flows.infer.search.curvature import symmetric_eigen
from pyro_flows.infer.search.lines import PLACES, Shapes, shapes_along
from pyro_flows.infer.search.tridiagonal import chain_conditionals

__all__ = ["InnerDensity", "MemberBlocks"]

ROUNDS = 12  # of Newton's method
FAR = 3.0  # longest step of a member, in standard deviations
NOISE = 64.0  # units of rounding of a log-density
SHORTEST = 0.05  # part of a step
FARTHER = 4.0  # times after each step that gained
SETTLED = 1e-6  # nats that all members may be short of their modes
LEAST = 1e-8  # curvature
TURNS = tuple(4.0**k for k in range(-7, 2))  # standard deviations from a mode at which walls are looked for
STEEP = 4.0  # slopes on both sides, in parts of a normal density's, that make a wall
NEAR = 64  # points whose members' modes are kept
ONE_SIDED = 1e-12  # rounding at which differences may be one-sided
COLORS = 3  # steps of a chain that do not react to each other are moved together


class MemberBlocks(NamedTuple):
    """A factorized block matrix: for each group what remains after its descendants are integrated out."""

    inverse: list[Tensor]
    """Covariances given ancestors and the step before, ``(S, J, d, d)``."""
    slope: list[Tensor]
    """Derivatives of the members' modes with respect to ancestors, ``(S, J, d, a)``."""
    carry: list[Tensor]
    """The same for the step before, ``(S, chains, length - 1, d, d)``; without entries outside of chains."""
    log_size: Tensor
    """Half of the logarithm of the matrix's determinant, ``(S,)``."""

    def repeated(self, count: int) -> MemberBlocks:
        """Repeats each point's entries."""
        parts = [[each.repeat_interleave(count, 0) for each in part] for part in self[:3]]
        return MemberBlocks(parts[0], parts[1], parts[2], self.log_size.repeat_interleave(count, 0))

    def chosen(self, better: Tensor, old: MemberBlocks) -> MemberBlocks:
        """Returns this where it is ``better``, ``(S,)``, and the old one elsewhere."""

        def pick(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(better.view(-1, *(1,) * (new.dim() - 1)), new, old)

        parts = [[pick(*pair) for pair in zip(*both, strict=True)] for both in zip(self[:3], old[:3], strict=True)]
        return MemberBlocks(parts[0], parts[1], parts[2], pick(self.log_size, old.log_size))

    @property
    def factors(self) -> list[Tensor]:
        """Lower triangular factors of the covariances."""
        return [torch.linalg.cholesky(0.5 * (each + each.mT)) for each in self.inverse]


class _Column(NamedTuple):
    """One variable of all members of a group, or of each third step of its chains, which are moved at once."""

    group: int
    variable: int
    moved: Tensor  # members
    places: Tensor


class InnerDensity:
    r"""The density of the globals with the members integrated out by Laplace's approximation.

    :math:`\log p(g) \approx \log p(g, l^*) - \tfrac12 \log\det H(g, l^*) + \tfrac12 \dim(l) \log 2\pi` at the members'
    mode :math:`l^*(g)`. Members are independent given globals and ancestors, so differences of gradients along one
    variable of all members at once give the blocks of :math:`H`: all Newton steps of all members cost :math:`2 d`
    gradients, for any number of them; those of chains :math:`6 d`.

    The gradient of :math:`\log\det H` costs as many, for any number of globals: with columns :math:`a` of a factor of
    :math:`H^{-1}`, of all members at once, it is :math:`\sum_a \nabla (a^\top H a)`, by second differences of
    gradients. Where there are chains, whose factor has too many columns, it is by differences in the globals.
    """

    def __init__(self, safe: SafeDensity, structure: Structure, initial: Tensor) -> None:
        self.safe, self.structure = safe, structure
        self.at, self.groups = structure.globals, structure.groups
        self.above = structure.ancestors
        self.point = initial.detach().double().cpu()
        self.size = torch.full_like(self.point, 0.1)  # lengths for differences
        self.local = torch.cat([group.places.flatten() for group in self.groups])
        self.short = 8.2 * safe.eps**0.25
        self.known: list[tuple[Tensor, Tensor]] = []
        self.widest = torch.full_like(self.point, LEAST**-0.5)
        """The largest standard deviations of members, ``(D,)``."""
        self.lean: Tensor | None = None
        """Derivatives of the members' modes with respect to the globals, ``(D, G)``, near the last center."""
        self.begin = time.monotonic()
        self.chained = any(group.length > 1 for group in self.groups)
        # One-sided differences are consistent with gradients by differences, and precise in float64.
        self.sides = (1.0,) if self.chained and safe.eps < ONE_SIDED else (1.0, -1.0)
        self.columns = [
            _Column(k, c, moved, group.places[moved, c])
            for k, group in enumerate(self.groups)
            for c in range(group.places.shape[1])
            for moved in _together(group)
        ]

    @property
    def price(self) -> float:
        """Seconds of a gradient so far."""
        return (time.monotonic() - self.begin) / max(1, self.safe.evaluations)

    def __call__(self, g: Tensor) -> Tensor:
        """Returns log-densities ``(S,)`` at globals ``(S, G)``."""
        return self.settled(g)[1]

    def value_and_slope(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log-densities and gradients ``(S, G)``."""
        z, value, blocks, slope = self.settled(g)
        return value, slope[:, self.at] + (self._by_globals if self.chained else self._by_members)(z, slope, blocks)

    def _by_members(self, z: Tensor, slope: Tensor, blocks: MemberBlocks) -> Tensor:
        """Returns the gradient of minus half of the log-determinant, and of what members are short of their modes."""
        columns = self._factor(blocks)
        steps = self.short * torch.cat([columns, -columns])
        push = self.safe.gradients((z + steps).flatten(0, 1))[1].view(steps.shape)
        bent = (push - slope).sum(0) / self.short**2
        # As globals move, members' modes follow.
        follow = self.solved(bent + 2 * slope, blocks)
        length = self.short / (follow / self.size).abs().amax(-1, keepdim=True).clamp(min=1e-12)
        ahead, behind = self.safe.gradients(torch.cat([z + length * follow, z - length * follow]))[1].split(len(z))
        return 0.5 * (bent + (ahead - behind) / (2 * length))[:, self.at]

    def _by_globals(self, z: Tensor, slope: Tensor, blocks: MemberBlocks) -> Tensor:
        """Returns the same by differences in the globals."""
        count, length = len(self.at), 0.1 * self.short**0.5 * self.size[self.at]
        rows = z.repeat_interleave(count * len(self.sides), 0)
        rows[:, self.at] += torch.cat([torch.diag(side * length) for side in self.sides]).repeat(len(z), 1)
        # One step follows the modes, up to the square of the difference.
        push = self.safe.gradients(rows)[1]
        ahead, _, found = self.expanded(rows + self.solved(push, blocks.repeated(count * len(self.sides))))
        sizes = found.log_size.masked_fill(~ahead.isfinite(), math.nan).view(len(z), -1, count)
        behind = sizes[:, 1] if len(self.sides) == 2 else blocks.log_size[:, None]
        return -(sizes[:, 0] - behind) / (len(self.sides) * length)

    def settled(self, g: Tensor) -> tuple[Tensor, Tensor, MemberBlocks, Tensor]:
        """Returns points ``(S, D)`` with members at their modes, marginal log-densities, factors and gradients."""
        z = self.point.repeat(len(g), 1)
        if self.known:
            seen, ends = map(torch.stack, zip(*self.known, strict=True))
            away = (g[:, None] - seen) / self.size[self.at]
            near = away.square().sum(-1).argmin(1)
            z = ends[near]
            if self.lean is not None:
                z = z + (g - seen[near]) @ self.lean.mT
        z[:, self.at] = g
        value, slope, blocks = self.expanded(z)
        part = torch.ones_like(value)
        far = torch.full_like(value, FAR)[:, None, None]
        for turn in range(ROUNDS + 1):
            step = self.solved(slope, blocks, far)
            gain = (step * slope).sum(-1)
            # Steps that rounding refuses again and again lead no further.
            going = (gain > SETTLED + NOISE * self.safe.eps * value.abs()) & (part > SHORTEST)
            if turn == ROUNDS or self.safe.expired or not going.any():
                break
            trial = z + part[:, None] * step
            ahead, incline, found = self.expanded(trial)
            better = ahead >= value - 1e-9 - NOISE * self.safe.eps * value.abs()
            part = torch.where(better, torch.ones_like(part), 0.25 * part)
            far = torch.where(better[:, None, None], FARTHER * far, FAR)
            z = torch.where(better[:, None], trial, z)
            value, slope = torch.where(better, ahead, value), torch.where(better[:, None], incline, slope)
            blocks = found.chosen(better, blocks)
        fine = value.isfinite()
        self.known = [*self.known, *zip(g[fine], z[fine], strict=True)][-NEAR:]
        marginal = (
            value + 0.5 * gain.clamp(max=SETTLED) - blocks.log_size + 0.5 * len(self.local) * math.log(2 * math.pi)
        )
        return z, marginal, blocks, slope

    def expanded(self, z: Tensor) -> tuple[Tensor, Tensor, MemberBlocks]:
        """Returns log-densities ``(S,)``, gradients ``(S, D)``, and the factorized Hessian of the members."""
        length = self.short * self.size
        rows = z.repeat(1 + len(self.sides) * len(self.columns), 1, 1)
        for n, column in enumerate(self.columns):
            for m, side in enumerate(self.sides):
                rows[1 + len(self.sides) * n + m, :, column.places] += side * length[column.places]
        rows = self.safe.round(rows)
        value, slope = self.safe.gradients(rows.flatten(0, 1))
        value, slope = value.view(rows.shape[:2]), slope.view(rows.shape)
        fine = value.isfinite().all(0)
        own = [z.new_zeros(len(z), *g.places.shape, g.places.shape[1]) for g in self.groups]
        over = [z.new_zeros(len(z), *g.places.shape, a.shape[1]) for g, a in zip(self.groups, self.above, strict=True)]
        below = [torch.zeros_like(each) for each in own]  # to the next step of the chain
        for n, (k, c, moving, _) in enumerate(self.columns):
            ahead = 1 + len(self.sides) * n
            behind = ahead + 1 if len(self.sides) == 2 else 0
            # Points may have been rounded.
            moved = (rows[ahead] - rows[behind])[:, self.groups[k].places[:, c]]
            change = slope[behind] - slope[ahead]
            own[k][..., c][:, moving] = (change[:, self.groups[k].places] / moved[..., None])[:, moving]
            before = moving[(moving + 1) % self.groups[k].length != 0]
            below[k][..., c][:, before] = change[:, self.groups[k].places[before + 1]] / moved[:, before, None]
            for i, group in enumerate(self.groups):
                at = 0
                for parent, of in group.above:
                    if parent == k:
                        over[i][..., at + c] = change[:, group.places] / moved[:, of, None]
                    at += self.groups[parent].places.shape[1]
        return torch.where(fine, value[0], -math.inf), slope[0], self._factorized(own, over, below)

    def _factorized(self, own: list[Tensor], over: list[Tensor], below: list[Tensor]) -> MemberBlocks:
        """Integrates out descendants before their ancestors."""
        own, over = list(own), list(over)
        inverse, slope, carry = list(own), list(over), list(own)
        log_size = own[0].new_zeros(len(own[0]))
        for k in range(len(own) - 1, -1, -1):
            symmetric = 0.5 * (own[k] + own[k].mT)
            chains = (-1, self.groups[k].length)
            carry[k] = own[k].unflatten(1, chains)[:, :, 1:]
            if chains[1] > 1:
                links = below[k].unflatten(1, chains)[:, :, :-1]
                given, carry[k] = chain_conditionals(symmetric.unflatten(1, chains), links, _inverted)
                strength, axes = _strengths(given.flatten(1, 2), 1e-30)
                inverse[k] = (axes * strength[..., None, :]) @ axes.mT
                log_size = log_size - 0.5 * strength.log().sum((-2, -1))
            else:
                widest = self.widest[self.groups[k].places]
                strength, axes = _strengths(symmetric * widest[..., None] * widest[..., None, :], 1.0)
                inverse[k] = (axes / strength[..., None, :]) @ axes.mT * widest[..., None] * widest[..., None, :]
                log_size = log_size + (0.5 * strength.log() - widest.log()).sum((-2, -1))
            slope[k] = -inverse[k] @ over[k]
            filled = over[k].mT @ slope[k]  # (S, J, a, a), to be added to the ancestors' blocks
            at = 0
            for parent, of in self.groups[k].above:
                size = self.groups[parent].places.shape[1]
                part = slice(at, at + size)
                own[parent] = own[parent].index_add(1, of, filled[..., part, part])
                over[parent] = over[parent].index_add(1, of, filled[..., part, :at])
                at += size
        return MemberBlocks(inverse, slope, carry, log_size)

    def solved(self, slope: Tensor, blocks: MemberBlocks, far: Tensor | None = None) -> Tensor:
        """Solves for Newton's step of the members, none longer than ``far`` standard deviations, ``(S, 1, 1)``."""
        push = [slope[:, group.places] for group in self.groups]
        for k in range(len(push) - 1, -1, -1):
            if self.groups[k].length > 1:
                chains = push[k].unflatten(1, (-1, self.groups[k].length))
                push[k] = recurrence(blocks.carry[k].mT.flip(2), chains.flip(2)).flip(2).flatten(1, 2)
            passed, at = (blocks.slope[k].mT @ push[k][..., None])[..., 0], 0
            for parent, of in self.groups[k].above:
                size = self.groups[parent].places.shape[1]
                push[parent] = push[parent].index_add(1, of, passed[..., at : at + size])
                at += size
        step = torch.zeros_like(slope)
        for k, (group, above) in enumerate(zip(self.groups, self.above, strict=True)):
            own = (blocks.inverse[k] @ push[k][..., None])[..., 0]
            if far is not None:
                length = (own * push[k]).sum(-1, keepdim=True).clamp(min=0).sqrt()
                own = own * (far / length.maximum(far))
            own = own + (blocks.slope[k] @ step[:, above][..., None])[..., 0]
            if group.length > 1:
                own = recurrence(blocks.carry[k], own.unflatten(1, (-1, group.length))).flatten(1, 2)
            step[:, group.places] = own
        return step

    def _factor(self, blocks: MemberBlocks) -> Tensor:
        """Returns columns ``(K, S, D)`` of a factor of the members' covariance, those of all members at once.

        Their products add up to the covariance within members, and between members and ancestors.
        """
        factors, found = blocks.factors, []
        for k, group in enumerate(self.groups):
            for c in range(group.places.shape[1]):
                column = factors[0].new_zeros(len(factors[0]), len(self.point))
                column[:, group.places] = factors[k][..., c]
                for i in range(k + 1, len(self.groups)):
                    if any(parent == k for parent, _ in self.groups[i].above):
                        follow = blocks.slope[i] @ column[:, self.above[i]][..., None]
                        column[:, self.groups[i].places] = follow[..., 0]
                found.append(column)
        return torch.stack(found)

    def joint(self, z: Tensor, blocks: MemberBlocks) -> Tensor:
        """Returns the globals' precision ``(G, G)`` at a point ``(D,)``, members integrated out, as if all were normal.

        Learns how members' modes follow the globals, in ``lean``. The cost is two gradients for each global.
        """
        length = self.short * self.size[self.at]
        sides = z.new_zeros(2, len(self.at), len(z))
        sides[0, :, self.at], sides[1, :, self.at] = torch.diag(length), -torch.diag(length)
        push = self.safe.gradients((z + sides).flatten(0, 1))[1].view(sides.shape)
        change = (push[0] - push[1]) / (2 * length[:, None])  # (G, D)
        lean = self.solved(change, blocks.repeated(len(self.at)))
        self.lean = lean.mT
        found = -change[:, self.at] - change[:, self.local] @ self.lean[self.local]
        return 0.5 * (found + found.mT)

    def measure(self, blocks: MemberBlocks) -> None:
        """Takes the members' standard deviations as lengths."""
        for group, inverse in zip(self.groups, blocks.inverse, strict=True):
            self.size[group.places] = inverse[0].diagonal(dim1=-2, dim2=-1).sqrt()

    @property
    def walled(self) -> bool:
        """Whether a member has walls."""
        return bool((self.widest < LEAST**-0.5).any())

    def bound(self, z: Tensor, blocks: MemberBlocks) -> bool:
        """Finds the walls of members that are nearly flat at their modes, for ``widest``; returns whether there are.

        A scale with one observation :math:`r` is flat between :math:`r` and its prior's scale, so the curvature at its
        mode, of order :math:`r`, says nothing of its width, and Laplace's approximation is infinite at :math:`r = 0`.
        Slopes on both sides say how wide it is. The cost is 18 gradients for each variable of a member and point ``z``
        of ``(S, D)``.
        """
        free = [column for column in self.columns if self.groups[column.group].length == 1]
        still = self.safe.gradients(z)[1] if free else z
        sides = z.new_tensor([1.0, -1.0])[:, None, None]
        before = self.widest.clone()
        for turn in TURNS:
            for k, c, _, places in free:
                unit = blocks.inverse[k][..., c, c].sqrt()
                length = turn * unit * (turn * unit < self.widest[places])
                rows = z.repeat(2, 1, 1)
                rows[..., places] += sides * length
                value, slope = self.safe.gradients(rows.flatten(0, 1))
                fine = value.view(2, -1).isfinite().all(0)[:, None]
                # One side alone may be skew.
                pull = (sides * (still - slope.view(rows.shape))[..., places]).amin(0)
                wall = fine & (length > 0) & (pull * unit > STEEP * turn)
                self.widest[places] = self.widest[places].minimum(torch.where(wall, length, math.inf).amin(0))
        return bool((self.widest < before).any())

    @property
    def shapely(self) -> list[int]:
        """Groups whose members are no kin of others, and no steps of chains."""
        kin = {k for i, group in enumerate(self.groups) for parent, _ in group.above for k in (i, parent)}
        return [k for k, group in enumerate(self.groups) if k not in kin and group.length == 1]

    def shapes(self, z: Tensor, blocks: MemberBlocks) -> dict[int, Shapes]:
        """Returns the shapes of members along their covariances' factors, ``(S, J, d)`` each, by group.

        The cost is ten gradients for each variable of a member.
        """
        which = self.shapely
        factors = {k: torch.linalg.cholesky(0.5 * (blocks.inverse[k] + blocks.inverse[k].mT)) for k in which}
        dims = [self.groups[k].places.shape[1] for k in which]
        rows = z.repeat(max(dims, default=0), len(PLACES), 1, 1)
        for k, dim in zip(which, dims, strict=True):
            for c in range(dim):
                rows[c, :, :, self.groups[k].places] += PLACES[:, None, None, None] * factors[k][..., c]
        slope = self.safe.gradients(rows.flatten(0, 2))[1].view(rows.shape) if which else rows
        found = {}
        for k, dim in zip(which, dims, strict=True):
            along = torch.stack(
                [(slope[c][..., self.groups[k].places] * factors[k][..., c]).sum(-1) for c in range(dim)], -1
            )
            each = [shapes_along(part.movedim(0, -1)) for part in along.unbind(1)]  # one point after another
            found[k] = Shapes(*map(torch.stack, zip(*each, strict=True)))
        return found


def _together(group: Group) -> list[Tensor]:
    """Returns members that do not react to each other: all, or each third step of chains."""
    members = torch.arange(len(group.places), device="cpu")
    if group.length == 1:
        return [members]
    color = members % group.length % COLORS
    return [members[color == k] for k in range(COLORS)]


def _strengths(matrix: Tensor, least: float = LEAST) -> tuple[Tensor, Tensor]:
    """Returns eigenvalues, in absolute value and away from zero, and eigenvectors of symmetric blocks."""
    if matrix.shape[-1] == 1:
        strength, axes = matrix[..., 0], torch.ones_like(matrix)
    else:
        strength, axes = symmetric_eigen(matrix)
    scale = strength.abs().amax(-1, keepdim=True)
    return strength.abs().clamp(min=least).maximum(LEAST * scale), axes


def _inverted(matrix: Tensor) -> Tensor:
    """Inverts symmetric blocks, without regard to signs of their eigenvalues."""
    strength, axes = _strengths(matrix)
    return (axes / strength[..., None, :]) @ axes.mT
