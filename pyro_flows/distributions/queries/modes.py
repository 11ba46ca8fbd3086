"""The modes of a density, by ascent from its draws."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from torch.distributions import biject_to

from pyro_flows.core.checks import integer
from pyro_flows.distributions.queries.piece import Piece
from pyro_flows.distributions.queries.rough import own_draws

__all__ = ["Modes", "climb_modes"]

DRAWS, NEAR, RISING = 1024, 0.05, 0.05
PROBES = (0.01, 0.1, 1.0)  # steps up the slope at the end of a climb


class Modes(NamedTuple):
    """Modes of a density, the highest first.

    Attributes:
        points: shape ``(modes, *batch, *event)``.
        log_prob: their log-densities in nats, or log-masses, shape ``(modes, *batch)``.
        num_starts: how many climbs ended at each, shape ``(modes,)``; ends nearer than a twentieth of a standard
            deviation count as one.  With a batch ends are not compared, and each is of one climb.
        settled: whether each climb had ended, shape ``(modes, *batch)``: where a step up the slope still rises by 0.05
            nats and more, the density may be unbounded.

    Example:
        >>> modes = pf.Flow(pf.maf(2))().modes(num_starts=4, steps=50)
        >>> modes.points.round(decimals=2).abs()  # a fresh flow is a standard normal
        tensor([[0., 0.]])
        >>> modes.settled
        tensor([True])
    """

    points: Tensor
    log_prob: Tensor
    num_starts: Tensor
    settled: Tensor


def climb_modes(
    density: Any, pieces: Sequence[tuple[float, Piece]], *, num_starts: int = 32, steps: int = 300, seed: int = 0
) -> Modes:
    """Climbs a density of these pieces; see :meth:`~pyro_flows.distributions.queries.answers.Answering.modes`."""
    integer("modes", "num_starts", num_starts)
    integer("modes", "steps", steps)
    piece = pieces[0][1]
    states = piece.states(torch.ones(piece.size, dtype=torch.bool, device="cpu"))
    if states is not None:
        return _best_state(density, states)
    if piece.discrete or getattr(density.support, "is_discrete", False):
        raise NotImplementedError(
            "modes: this density is discrete, at least in part, and has too many values to search through; take the "
            "best of many draws: y = density.sample((10_000,)); y[density.log_prob(y).argmax()]"
        )
    batch, event = density.batch_shape, density.event_shape
    with own_draws(seed), torch.no_grad():
        drawn = density.sample(Size((max(DRAWS, num_starts),)))
        score = density.log_prob(drawn)
    best = score.nan_to_num(-math.inf, neginf=-math.inf).topk((num_starts + 1) // 2, 0).indices
    # Lower modes have no draws among the best.
    others = torch.arange(num_starts // 2, device=best.device).view(-1, *(1 for _ in batch))
    best = torch.cat((best, others.expand(-1, *batch)))
    flat = drawn.flatten(-len(event)) if event else drawn.unsqueeze(-1)
    to_line, to_data = _on_the_line(density, piece)
    with torch.no_grad():
        line = to_line(flat)
        loc, scale = line.mean(0), line.std(0).clamp(min=1e-12)
        start = line.gather(0, best.unsqueeze(-1).expand(*best.shape, line.shape[-1]))
    v = ((start - loc) / scale).requires_grad_()

    whole = drawn[0]

    def height(v: Tensor) -> Tensor:
        y = to_data(loc + scale * v).reshape(v.shape[:-1] + event)
        fine = density.support.check(y) & y.isfinite().flatten(y.dim() - max(len(event), 1)).all(-1)
        # What has left the numbers' range does not count.
        inside = fine.reshape(fine.shape + (1,) * len(event))
        return torch.where(fine, density.log_prob(torch.where(inside, y, whole)), -math.inf)

    with torch.enable_grad():  # whatever the caller does
        found = _climb(height, v, steps)
        settled = _settled(height, found)
    with torch.no_grad():
        top = height(found)
        order = top.argsort(0, descending=True)
        found = found.gather(0, order.unsqueeze(-1).expand_as(found))
        top, settled = top.gather(0, order), settled.gather(0, order)
        counts = torch.ones(len(top), dtype=torch.long, device=top.device)
        if not batch:
            keep, counts = _apart(found)
            found, top, settled = found[keep], top[keep], settled[keep]
        points = to_data(loc + scale * found).reshape(top.shape + event)
    if not settled[0].all():
        warnings.warn(
            "modes: the highest climb still rises, so the density may have no highest point, as one fitted to repeated "
            "rows or constant columns; look at its points, or raise steps",
            RuntimeWarning,
            stacklevel=3,
        )
    return Modes(points, top, counts, settled)


def _on_the_line(density: Any, piece: Piece) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Maps from flat data to the whole line, and back."""
    if piece.on_line:
        everything = torch.ones(piece.size, dtype=torch.bool, device="cpu")
        return (lambda y: piece.to_inner(y, everything)[0]), piece.to_outer
    try:
        moved = biject_to(density.support)
    except NotImplementedError:
        raise NotImplementedError(
            f"modes: no way is known to climb within the support {density.support}; take the best of many draws"
        ) from None
    return moved.inv, moved


def _slope(height: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(height(v).sum(), v)
    return slope.nan_to_num(0.0, 0.0, 0.0)


def _settled(height: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """Whether no step up the slope rises much; unlike a slope of zero this holds at kinks, too."""
    up = _slope(height, v.detach().requires_grad_())
    up = up / up.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    with torch.no_grad():
        top = height(v)
        return torch.stack([height(v + step * up) - top < RISING for step in PROBES]).all(0)


def _climb(height: Callable[[Tensor], Tensor], v: Tensor, steps: int) -> Tensor:
    """The ends of climbs."""
    adam = torch.optim.Adam([v], lr=0.1)
    for step in range(steps):
        adam.param_groups[0]["lr"] = 0.1 * 0.01 ** (step / steps)
        v.grad = -_slope(height, v)
        adam.step()
    climbed = v.detach().clone()
    polish = torch.optim.LBFGS([v], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        value = -height(v).sum()
        (v.grad,) = torch.autograd.grad(value, v)
        return value.detach()

    polish.step(loss)
    with torch.no_grad():
        better = height(v) > height(climbed)  # false where it is NaN
    return torch.where(better.unsqueeze(-1), v.detach(), climbed)


def _apart(found: Tensor) -> tuple[Tensor, Tensor]:
    """The first of each group of near points, and the sizes of groups."""
    firsts: list[int] = []
    counts: list[int] = []
    for k, point in enumerate(found):
        gaps = [float((point - found[first]).abs().amax()) for first in firsts]
        near = next((place for place, gap in enumerate(gaps) if gap < NEAR), None)
        if near is None:
            firsts.append(k)
            counts.append(1)
        else:
            counts[near] += 1
    return torch.tensor(firsts, device=found.device), torch.tensor(counts, device=found.device)


@torch.no_grad()
def _best_state(density: Any, states: Tensor) -> Modes:
    batch, event = density.batch_shape, density.event_shape
    shaped = states.view(len(states), *(1 for _ in batch), *event)
    top, order = density.log_prob(shaped.expand(len(states), *batch, *event)).topk(1, 0)
    points = states[order].reshape(1, *batch, *event)
    return Modes(points, top, torch.ones(1, dtype=torch.long), torch.ones_like(top, dtype=torch.bool))
