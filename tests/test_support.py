"""Flows that end in a bijection onto a constrained set: where their densities lie, and that they integrate to 1."""

import pyro
import pytest
import torch
from asserts import refuses
from cases import shake
from torch.distributions import AffineTransform, ExpTransform, biject_to, constraints

import pyro_flows as pf

POINTS = 400
GRID = (torch.arange(POINTS).double() + 0.5) / POINTS  # midpoints of the unit interval


def positive():
    """A grid of the positive quadrant, denser near its edges, with the area of each cell."""
    edges = torch.linspace(-14.0, 14.0, POINTS + 1).double().exp()
    points, sizes = (edges[1:] * edges[:-1]).sqrt(), edges.diff()
    return torch.cartesian_prod(points, points), torch.outer(sizes, sizes).flatten()


def box():
    points = 4 * GRID - 1
    return torch.cartesian_prod(points, points), torch.full((POINTS**2,), (4 / POINTS) ** 2).double()


def interval():
    points = (torch.arange(40_000).double() + 0.5) / 10_000 - 1
    return points[:, None], torch.full((40_000,), 1e-4).double()


def triangle():
    """Of the simplex, by its first two shares: a density over it is one over these."""
    shares = torch.cartesian_prod(GRID, GRID)
    shares = shares[shares.sum(-1) < 1 - 1e-9]
    return torch.cat([shares, 1 - shares.sum(-1, keepdim=True)], -1), torch.full((len(shares),), POINTS**-2.0).double()


# End of the chain, dimensions before it, its support, a grid of that, a point inside it and points outside.
INTERVAL = constraints.interval(-1.0, 3.0)
ENDS = {
    "positive": ([ExpTransform()], 2, constraints.positive, positive, [1.0, 2.0], [[-1.0, 2.0], [1.0, -1e-3]]),
    "simplex": (
        [biject_to(constraints.simplex)],
        2,
        constraints.simplex,
        triangle,
        [0.2, 0.3, 0.5],
        [[0.2, 0.3, 0.6], [-0.1, 0.6, 0.5]],
    ),
    "interval": ([biject_to(INTERVAL)], 1, INTERVAL, interval, [0.5], [[-1.5], [3.5]]),
    "box": ([biject_to(INTERVAL)], 2, INTERVAL, box, [0.5, 2.5], [[0.0, 3.5], [-1.5, 0.0]]),
    "greater": (
        [ExpTransform(), AffineTransform(3.0, 1.0)],
        2,
        constraints.greater_than(3.0),
        lambda: (positive()[0] + 3, positive()[1]),
        [4.0, 3.5],
        [[2.9, 4.0]],
    ),
}
EACH = pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)


def made(end, context_dim=0):
    """A small spline flow onto the support, its parameters moved."""
    front = shake(pf.nsf(end[1], num_layers=2, hidden_dims=(8,), context_dim=context_dim), 0.1)
    return pf.Flow(pf.Chain([*front, *end[0]])).double()


@EACH
def test_mass_is_one_on_the_support(end):
    flow = made(end)
    points, cells = end[3]()
    with torch.no_grad():
        density = flow.log_prob(points).exp()
    # What the midpoint rule misses: peaks at the edges of the triangle, cells of the widening grid.
    assert abs(float((density * cells).sum()) - 1) < 4e-3
    assert density.std() > 1e-3


@EACH
def test_mass_is_one_with_a_context(end):
    flow, context = made(end, context_dim=1), torch.tensor([0.7]).double()
    points, cells = end[3]()
    with torch.no_grad():
        assert abs(float((flow.log_prob(points, context).exp() * cells).sum()) - 1) < 4e-3


@EACH
def test_draws_lie_in_the_support(end):
    flow = made(end)
    draws = flow.sample((1000,))
    assert flow().support.event_dim == 1 and flow().support.check(draws).all()
    assert end[2].check(draws).all()
    assert draws.shape[-1:] == flow.event_shape == (len(end[4]),)
    assert flow.log_prob(draws).isfinite().all()


@EACH
def test_outside_is_refused(end):
    flow = made(end)
    with pyro.validation_enabled(True):
        inside = torch.tensor(end[4]).double()
        assert flow.log_prob(inside).isfinite()
        for point in end[5]:
            outside = torch.tensor(point).double()
            assert not flow().support.check(outside)
            for value in (outside, torch.stack([inside, outside])):  # alone, and among others
                refuses(ValueError, "within the support", flow.log_prob, value)
