"""Finds which latents of a model are independent given others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from pyro.poutine import Trace
from torch import Generator, Tensor
from torch.distributions import constraints

from pyro_flows.infer.machine.pace import rows_at_once
from pyro_flows.infer.models.latents import Latents
from pyro_flows.infer.models.recorded import FAILURES, value_and_slope
from pyro_flows.infer.models.sites import Message, latent_messages

__all__ = ["Group", "Structure", "structure_of"]

FEWEST = 4  # members of a group
WIDEST = 16  # variables of a member
ROWS = 64  # of one call
MOVES = (0.1, 0.03, 0.01, 0.001)  # sizes of moves, the next if the density is not finite after one


@dataclass(frozen=True)
class Group:
    """The latents of a plate's members.

    Attributes:
        name: the plate, ``"classes"``; several as ``"classes x pupils"``.
        places: the members' places in the vector of latents, shape ``(J, d)``.
        above: the groups of the members' ancestors, outermost first, each after the ancestor's number ``(J,)`` there.
    """

    name: str
    places: Tensor
    above: tuple[tuple[int, Tensor], ...] = ()


@dataclass(frozen=True)
class Structure:
    """Global latents, and groups whose members are independent given globals and their ancestors.

    Attributes:
        globals: their places in the vector, ascending.
        groups: ancestors before descendants.
        coupled: in words, the plates whose members are not independent.
    """

    globals: Tensor
    groups: tuple[Group, ...]
    coupled: tuple[str, ...] = ()

    @property
    def ancestors(self) -> list[Tensor]:
        """Places of each group's ancestors, ``(J, a)``."""
        return [
            torch.cat([group.places[:, :0], *(self.groups[k].places[of] for k, of in group.above)], 1)
            for group in self.groups
        ]

    def __str__(self) -> str:
        words = [f"{len(self.globals)} global latent{'s' * (len(self.globals) != 1)}"]
        for group in self.groups:
            count, dim = group.places.shape
            words.append(f"{count} members of {group.name!r} with {dim} latent{'s' if dim > 1 else ''} each")
        return ", ".join(words)


@dataclass
class _Part:
    """Latents of the same plates, before any test; ``index`` has each member's number by plate."""

    frames: tuple[tuple[str, int], ...]  # names and sizes
    places: list[Tensor] = field(default_factory=list)

    @property
    def name(self) -> str:
        return " x ".join(name for name, _ in self.frames)

    @property
    def index(self) -> Tensor:
        """The members' numbers in each plate, ``(J, plates)``."""
        return torch.cartesian_prod(*(torch.arange(size) for _, size in self.frames)).reshape(-1, len(self.frames))

    @property
    def members(self) -> Tensor:
        """``(J, d)``."""
        return torch.cat(self.places, 1)

    def numbers(self, frames: Sequence[tuple[str, int]]) -> Tensor:
        """Returns each member's number among the members of some of its plates, ``(J,)``."""
        number = torch.zeros(len(self.index), dtype=torch.long)
        for frame in frames:
            number = number * frame[1] + self.index[:, self.frames.index(frame)]
        return number

    def within(self, other: _Part) -> bool:
        """Whether these are members of members of the other."""
        return set(other.frames) < set(self.frames)


def structure_of(
    trace: Trace, latents: Latents, density: Callable[[Tensor], Tensor], initial: Tensor
) -> Structure | None:
    r"""Finds global latents and independent members by the model's plates, and confirms them by gradients.

    Candidates are latents in plates, and vectors without one whose entries have supports of their own. Two members
    whose indices differ do so in some bit, so moving all members with this bit must leave the gradients of those
    without it as they were. Latents that fail become global: of two groups that depend on each other, as those of
    crossed plates, the smaller. The cost in gradients of the density is about twice the binary logarithm of the number
    of members.

    ``None`` if the density is not finite at any of the points.
    """
    parts = _candidates(trace, latents)
    moves = [(k, moved) for k, part in enumerate(parts) for moved in _moved(part)]
    if not parts:
        return Structure(torch.arange(latents.dim), ())
    changed = _changed(density, initial, [moved for _, moved in moves])
    if changed is None:
        return None
    coupled: list[str] = []
    wide = [k for k, part in enumerate(parts) if part.members.shape[1] > WIDEST]
    coupled += [f"{parts[k].name!r}: members have more than {WIDEST} latents each" for k in wide]
    local = [k for k in range(len(parts)) if k not in wide]
    while True:
        found = _clash(parts, local, moves, changed)
        if found is None:
            break
        one, other = found
        if one == other:
            local.remove(one)
            coupled.append(f"{parts[one].name!r}: its members depend on each other")
            continue
        less = min(one, other, key=lambda k: (parts[k].members.numel(), -k))
        local.remove(less)
    kept = sorted(local, key=lambda k: len(parts[k].frames))
    groups = []
    for k in kept:
        part, above = parts[k], []
        for number, upper in enumerate(parts[i] for i in kept):
            if part.within(upper):
                above.append((number, part.numbers(upper.frames)))
        groups.append(Group(part.name, part.members, tuple(above)))
    mask = torch.ones(latents.dim, dtype=torch.bool)
    for group in groups:
        mask[group.places] = False
    return Structure(mask.nonzero().squeeze(-1), tuple(groups), tuple(coupled))


def _candidates(trace: Trace, latents: Latents) -> list[_Part]:
    """Returns latents by the plates that they are in, without those in none."""
    messages: dict[str, Message] = latent_messages(trace)
    parts: dict[tuple[tuple[str, int], ...], _Part] = {}
    for site in latents:
        shape = site.batch_shape + site.free_shape
        frames = {
            f.dim + len(site.batch_shape): f.name for f in messages[site.name]["cond_indep_stack"] if f.vectorized
        }
        if not frames and _separate(site.support):
            # Vectors of one length that are in no plate may belong to the same members.
            frames = {dim: f"vectors of {size}" for dim, size in enumerate(shape)}
        axes = {dim: (name, shape[dim]) for dim, name in sorted(frames.items()) if dim >= 0 and shape[dim] >= FEWEST}
        if not axes or len(set(axes.values())) < len(axes):
            continue
        index = torch.arange(site.start, site.start + site.size).reshape(shape)
        key = tuple(sorted(axes.values()))
        dims = sorted(axes, key=lambda dim: axes[dim])
        index = index.movedim(dims, tuple(range(len(dims)))).reshape(math.prod(s for _, s in key), -1)
        parts.setdefault(key, _Part(key)).places.append(index)
    return list(parts.values())


def _separate(support: constraints.Constraint) -> bool:
    """Whether the entries of a value have supports of their own."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support.event_dim == 0


def _moved(part: _Part) -> Iterator[Tensor]:
    """Gives the places of all members that have a bit in their index, for each plate and bit."""
    index, members = part.index, part.members
    for column, (_, size) in enumerate(part.frames):
        for bit in range(max(1, math.ceil(math.log2(size)))):
            yield members[(index[:, column] >> bit) % 2 == 1].flatten()


@torch.no_grad()
def _changed(density: Callable[[Tensor], Tensor], initial: Tensor, moves: list[Tensor]) -> Tensor | None:
    """Returns which gradients each move changes, ``(moves, dim)``, from two points; ``None`` if nothing is finite."""
    generator = Generator().manual_seed(0)
    found = torch.zeros(len(moves), len(initial), dtype=torch.bool)
    point = initial.detach().cpu()
    for turn in range(2):
        slope = None
        for size in MOVES:
            noise = torch.randn(2, len(point), generator=generator).to(point)
            base = point + turn * size * noise[0]
            rows = base.repeat(1 + len(moves), 1)
            for row, moved in zip(rows[1:], moves, strict=True):
                row[moved] += size * (1 + base[moved].abs()) * (0.5 + noise[1, moved].abs()) * noise[1, moved].sign()
            slope = _slopes(density, rows.to(initial.device))
            if slope is not None:
                break
        if slope is None:
            return None
        eps = torch.finfo(slope.dtype).eps
        near = 1e3 * eps * (1 + slope[0].abs()) + 10 * eps * slope.abs().max()
        found |= (slope[1:] - slope[0]).abs() > near
    return found


def _slopes(density: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor | None:
    """Returns the gradients at the rows; ``None`` if one is not finite."""
    try:
        pieces = rows.split(rows_at_once(density, ROWS))
        slope = torch.cat([value_and_slope(density, piece)[1] for piece in pieces]).cpu()
    except FAILURES:
        return None
    return slope if slope.isfinite().all() else None


def _clash(
    parts: list[_Part], local: list[int], moves: list[tuple[int, Tensor]], changed: Tensor
) -> tuple[int, int] | None:
    """Returns two groups, or one twice, of which members depend on each other that are not kin."""
    for k, part in ((k, parts[k]) for k in local):
        above = [i for i in local if part.within(parts[i])]
        for i, j in itertools.combinations(above, 2):
            if not (parts[i].within(parts[j]) or parts[j].within(parts[i])):
                return i, j  # kept apart only by their common descendants
        for moved, touched in ((m, changed[n]) for n, (of, m) in enumerate(moves) if of == k):
            kin = torch.zeros(len(touched), dtype=torch.bool)
            kin[moved] = True
            mine = kin[part.members].any(1)
            for i in local:
                other = parts[i]
                if i == k:
                    related = mine
                elif part.within(other):
                    related = _shared(other, part, mine)
                elif other.within(part):
                    related = _shared(other, part, mine)
                else:
                    related = torch.zeros(len(other.members), dtype=torch.bool)
                if touched[other.members[~related]].any():
                    return k, i
    return None


def _shared(other: _Part, part: _Part, mine: Tensor) -> Tensor:
    """Returns which members of the other have kin, by the plates of both, among those of a part."""
    both = [frame for frame in part.frames if frame in other.frames]
    return torch.isin(other.numbers(both), part.numbers(both)[mine])
