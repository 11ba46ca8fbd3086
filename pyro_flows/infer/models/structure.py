"""Finds which latents of a model are independent given others, or coupled with their neighbors only."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from torch import Generator, Tensor
from torch.distributions import constraints

from pyro_flows.infer.machine.pace import Pace, pace_of, rows_at_once
from pyro_flows.infer.models.latents import Latent, Latents
from pyro_flows.infer.models.recorded import FAILURES, value_and_slope
from pyro_flows.infer.models.sites import Message, latent_messages

__all__ = ["Group", "Structure", "SummedDensity", "structure_of", "summed_up"]

FEWEST = 4  # members of a group
WIDEST = 16  # variables of a member
WIDEST_STEP = 4  # variables of a step of a chain
NUMBERED = re.compile(r"(.*\D|)(\d+)(\D*)", re.DOTALL)  # a name and its last number
MODULI = (8, 9, 7, 11, 13, 5, 17, 19, 23, 29, 31, 37)  # distances between steps that are moved together
ROWS = 64  # of one call
MOVES = (0.1, 0.03, 0.01, 0.001)  # sizes of moves, the next if the density is not finite after one


@dataclass(frozen=True)
class Group:
    """The latents of a plate's members.

    Attributes:
        name: the plate, ``"classes"``; several as ``"classes x pupils"``.
        places: the members' places in the vector of latents, shape ``(J, d)``.
        above: the groups of the members' ancestors, outermost first, each after the ancestor's number ``(J,)`` there.
        length: the number of members in a row that form a chain, each coupled with the one before; 1 for no chains.
        summed: whether the steps of chains are not the latents but their sums up to each, as of a random walk's
            increments.

    Example:
        >>> from pyro_flows.infer.models.structure import Group
        >>> schools = Group("schools", torch.tensor([[2], [3], [4]]))
        >>> schools.places.shape  # three members of one latent
        torch.Size([3, 1])
    """

    name: str
    places: Tensor
    above: tuple[tuple[int, Tensor], ...] = ()
    length: int = 1
    summed: bool = False


@dataclass(frozen=True)
class Structure:
    """Global latents, and groups whose members are independent given globals and their ancestors, or form chains.

    Attributes:
        globals: their places in the vector, ascending.
        groups: ancestors before descendants.
        coupled: in words, the plates whose members are not independent.

    Example:
        >>> from pyro_flows.infer.models.structure import Group, Structure
        >>> schools = Group("schools", torch.tensor([[2], [3], [4]]))
        >>> structure = Structure(torch.tensor([0, 1]), (schools,))
        >>> len(structure.groups)
        1
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
            (count, dim), length = group.places.shape, group.length
            what = f"{count} members"
            if length > 1:
                chains = count // length
                what = f"{chains} chain{'s' * (chains > 1)} of {length} {'sums' if group.summed else 'steps'}"
            words.append(f"{what} of {group.name!r} with {dim} latent{'s' if dim > 1 else ''} each")
        return ", ".join(words)


def summed_up(z: Tensor, groups: Iterable[Group], sign: int = 1) -> Tensor:
    """Puts sums of latents ``(..., D)`` up to each step in their place, in groups where these are the steps.

    With ``sign`` -1, puts the latents in the place of the sums.
    """
    for group in groups:
        if group.summed:
            places = group.places.unflatten(0, (-1, group.length)).to(z.device)
            chains = z[..., places]
            chains = (
                chains.cumsum(-2) if sign > 0 else chains.diff(dim=-2, prepend=torch.zeros_like(chains[..., :1, :]))
            )
            z = z.index_copy(-1, places.flatten(), chains.flatten(-3))
    return z


class SummedDensity:
    """A density of sums of latents up to each step of a chain, in place of the latents."""

    def __init__(self, density: Callable[[Tensor], Tensor], groups: Sequence[Group]) -> None:
        self.density, self.groups = density, groups
        self.pace = pace_of(density)

    def __call__(self, x: Tensor) -> Tensor:
        """Returns log-densities ``(S,)`` of points ``(S, D)``."""
        return self.density(summed_up(x, self.groups, -1))

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log-densities ``(S,)`` and gradients ``(S, D)``."""
        value, slope = value_and_slope(self.density, summed_up(x, self.groups, -1))
        slope = slope.clone()
        for group in self.groups:
            if group.summed:
                places = group.places.unflatten(0, (-1, group.length)).to(x.device)
                before, after = (part.flatten() for part in (places[:, :-1], places[:, 1:]))
                slope[:, before] -= slope[:, after]
        return value, slope


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


class _Move(NamedTuple):
    """Members of a part that are moved together, by a bit of their number in a plate."""

    part: int
    plate: int
    places: Tensor


def structure_of(
    trace: Trace, latents: Latents, density: Callable[[Tensor], Tensor], initial: Tensor
) -> Structure | None:
    r"""Finds global latents, independent members and chains by the model's plates and loops, by gradients.

    Candidates are latents in plates, vectors without one whose entries have supports of their own, and sites of a loop,
    whose names differ in a number. Two members whose indices differ do so in some bit, so moving all members with this
    bit must leave the gradients of those without it as they were. Latents that fail become global: of two groups that
    depend on each other, as those of crossed plates, the smaller. The cost in gradients of the density is about twice
    the binary logarithm of the number of members.

    If members depend on each other along one plate or loop only, they form chains if each depends on the one before and
    the one after alone: all members whose number has one remainder are moved, by several moduli, so that any two that
    are no neighbors are told apart, which takes some 80 gradients. If not, the same is tried with their sums up to each
    step.

    ``None`` if the density is not finite at any of the points.
    """
    parts = _candidates(trace, latents)
    moves = [move for k, part in enumerate(parts) for move in _moved(k, part)]
    if not parts:
        return Structure(torch.arange(latents.dim), ())
    changed = _changed(density, initial, [move.places for move in moves])
    if changed is None:
        return None
    coupled: list[str] = []
    wide = [k for k, part in enumerate(parts) if part.members.shape[1] > WIDEST]
    coupled += [f"{parts[k].name!r}: members have more than {WIDEST} latents each" for k in wide]
    local = [k for k in range(len(parts)) if k not in wide]
    chains: dict[int, Group] = {}
    while True:
        found = _clash(parts, local, chains, moves, changed)
        if found is None:
            break
        one, other = found
        if one == other:
            own = [(move, changed[n]) for n, move in enumerate(moves) if move.part == one]
            chain = _chained(parts[one], own, density, initial)
            if chain is not None:
                chains[one] = chain
                continue
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
        groups.append(chains.get(k, Group(part.name, part.members, tuple(above))))
    mask = torch.ones(latents.dim, dtype=torch.bool)
    for group in groups:
        mask[group.places] = False
    return Structure(mask.nonzero().squeeze(-1), tuple(groups), tuple(coupled))


def _candidates(trace: Trace, latents: Latents) -> list[_Part]:
    """Returns latents by the plates and loops that they are in, without those in none."""
    messages: dict[str, Message] = latent_messages(trace)
    loops = _loops(latents, messages)
    looped = {site.name for loop in loops for site in loop}
    alone = [[site] for site in latents if site.name not in looped]
    parts: dict[tuple[tuple[str, int], ...], _Part] = {}
    for several in [*alone, *loops]:
        site = several[0]
        shape = site.batch_shape + site.free_shape
        frames = {
            f.dim + len(site.batch_shape): f.name for f in messages[site.name]["cond_indep_stack"] if f.vectorized
        }
        if not frames and _separate(site.support) and len(several) == 1:
            # Vectors of one length that are in no plate may belong to the same members.
            frames = {dim: f"vectors of {size}" for dim, size in enumerate(shape)}
        index = torch.stack([torch.arange(each.start, each.start + each.size).reshape(shape) for each in several])
        if len(several) == 1:
            index = index[0]
        else:
            frames = {0: _loop_name(several)} | {dim + 1: name for dim, name in frames.items() if dim >= 0}
        axes = {
            dim: (name, index.shape[dim])
            for dim, name in sorted(frames.items())
            if dim >= 0 and index.shape[dim] >= FEWEST
        }
        if not axes or len(set(axes.values())) < len(axes):
            continue
        key = tuple(sorted(axes.values()))
        dims = sorted(axes, key=lambda dim: axes[dim])
        index = index.movedim(dims, tuple(range(len(dims)))).reshape(math.prod(s for _, s in key), -1)
        parts.setdefault(key, _Part(key)).places.append(index)
    return list(parts.values())


def _loops(latents: Latents, messages: dict[str, Message]) -> list[list[Latent]]:
    """Returns sites of the same shape in the same plates whose names differ in their last number, by this number."""
    found: dict[Any, dict[int, Latent]] = {}
    for site in latents:
        match = NUMBERED.fullmatch(site.name)
        if match is not None:
            before, number, after = match.groups()
            plates = frozenset(frame for frame in messages[site.name]["cond_indep_stack"] if frame.vectorized)
            found.setdefault((before, after, site.batch_shape, site.free_shape, plates), {})[int(number)] = site
    numbered = [sorted(each.items()) for each in found.values() if len(each) >= FEWEST]
    # Of a plate that runs step by step, or a loop over all numbers.
    return [[site for _, site in each] for each in numbered if each[-1][0] - each[0][0] == len(each) - 1]


def _loop_name(several: list[Latent]) -> str:
    """Names a loop by its first and last number, so that its sites belong to the same steps."""
    first, last = (NUMBERED.fullmatch(several[k].name) for k in (0, -1))
    return "steps " + " to ".join(match[2] for match in (first, last) if match)


def _separate(support: constraints.Constraint) -> bool:
    """Whether the entries of a value have supports of their own."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support.event_dim == 0


def _moved(number: int, part: _Part) -> Iterator[_Move]:
    """Gives the places of all members that have a bit in their index, for each plate and bit."""
    index, members = part.index, part.members
    for column, (_, size) in enumerate(part.frames):
        for bit in range(max(1, math.ceil(math.log2(size)))):
            yield _Move(number, column, members[(index[:, column] >> bit) % 2 == 1].flatten())


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
        slopes = []
        for piece in rows.split(rows_at_once(density, ROWS)):
            with (pace_of(density) or Pace()).call(len(piece)):
                slopes.append(value_and_slope(density, piece)[1])
        slope = torch.cat(slopes).cpu()
    except FAILURES:
        return None
    return slope if slope.isfinite().all() else None


def _clash(
    parts: list[_Part], local: list[int], chains: Collection[int], moves: list[_Move], changed: Tensor
) -> tuple[int, int] | None:
    """Returns two groups, or one twice, of which members depend on each other that are not kin."""
    for k, part in ((k, parts[k]) for k in local):
        above = [i for i in local if part.within(parts[i])]
        for i, j in itertools.combinations(above, 2):
            if not (parts[i].within(parts[j]) or parts[j].within(parts[i])):
                return i, j  # kept apart only by their common descendants
        for i in above:
            if k in chains or i in chains:
                return k, i  # a chain has no kin
        for moved, touched in ((m.places, changed[n]) for n, m in enumerate(moves) if m.part == k):
            kin = torch.zeros(len(touched), dtype=torch.bool)
            kin[moved] = True
            mine = kin[part.members].any(1)
            for i in local:
                other = parts[i]
                if i == k:
                    related = torch.ones_like(mine) if k in chains else mine
                elif part.within(other) or other.within(part):
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


def _chained(
    part: _Part, moves: list[tuple[_Move, Tensor]], density: Callable[[Tensor], Tensor], initial: Tensor
) -> Group | None:
    """Returns the part as chains if members, or sums of them, depend on neighbors along one plate alone."""
    # Moves by bits that reach others of the part tell along which plate they depend on each other.
    members = part.members
    reached = set()
    for move, touched in moves:
        still = ~torch.isin(members[:, 0], move.places)
        if touched[members[still]].any():
            reached.add(move.plate)
    if len(reached) != 1 or members.shape[1] > WIDEST_STEP:
        return None
    (plate,) = reached
    sizes = [size for _, size in part.frames]
    places = members.unflatten(0, sizes).movedim(plate, -2).flatten(0, -2)
    step = torch.arange(len(places)) % sizes[plate]
    sets = [(modulus, rest) for modulus in _moduli(sizes[plate]) for rest in range(modulus)]
    for summed in (False, True):
        group = Group(part.name, places, (), sizes[plate], summed)
        start = summed_up(initial.detach().cpu(), [group]).to(initial.device)
        sides = [places[step % modulus == rest].flatten() for modulus, rest in sets]
        found = _changed(SummedDensity(density, [group]), start, sides)
        if found is None:
            continue
        away = [places[(step - rest + 1) % modulus > 2] for modulus, rest in sets]
        if not any(touched[other].any() for touched, other in zip(found, away, strict=True)):
            return group
    return None


def _moduli(steps: int) -> list[int]:
    """Returns moduli so that by one of them at least, the remainders of any two steps that are no neighbors show it."""
    apart = torch.arange(2, max(3, steps))
    found = []
    for modulus in MODULI:
        shown = (apart + 1) % modulus > 2
        if shown.any():
            found.append(modulus)
            apart = apart[~shown]
    return found
