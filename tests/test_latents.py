"""The packed vector of a model's latents: every support, both directions, Jacobians, names and errors."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide.initialization import InitMessenger
from torch.distributions import biject_to

from pyro_flows.infer.models.latents import Latents, same_support
from pyro_flows.infer.models.prototype import feasible

pytestmark = pytest.mark.usefixtures("double")

TWO = torch.tensor([-1.0, 0.5])
# Support and event shape: each site once from a distribution, once from a flat prior.
SUPPORTS = {
    "real": (constraints.real, ()),
    "positive": (constraints.positive, ()),
    "nonnegative": (constraints.nonnegative, ()),
    "greater_than": (constraints.greater_than(-1.5), ()),
    "less_than": (constraints.less_than(2.0), ()),
    "unit_interval": (constraints.unit_interval, ()),
    "interval": (constraints.interval(-2.0, 3.0), ()),
    "interval_of_tensors": (constraints.interval(TWO, TWO + 3), (2,)),
    "real_vector": (constraints.real_vector, (3,)),
    "independent_positive": (constraints.independent(constraints.positive, 2), (2, 3)),
    "independent_interval": (constraints.independent(constraints.interval(TWO, TWO + 1), 1), (2,)),
    "simplex": (constraints.simplex, (4,)),
    "ordered": (constraints.ordered_vector, (3,)),
    "positive_ordered": (constraints.positive_ordered_vector, (3,)),
    "corr_cholesky": (constraints.corr_cholesky, (3, 3)),
    "lower_cholesky": (constraints.lower_cholesky, (3, 3)),
    "positive_definite": (constraints.positive_definite, (2, 2)),
}


def trace_of(model, *args):
    with poutine.block():
        return poutine.trace(InitMessenger(feasible)(model)).get_trace(*args)


def improper(support, event_shape, batch=()):
    """A flat prior; supports without event dimensions take theirs from the batch."""
    if support.event_dim == 0 and support is not constraints.positive_ordered_vector and event_shape:
        return dist.ImproperUniform(constraints.independent(support, len(event_shape)), batch, event_shape)
    return dist.ImproperUniform(support, batch, event_shape)


@pytest.mark.parametrize("plated", [False, True], ids=["alone", "in a plate"])
@pytest.mark.parametrize("name", SUPPORTS)
def test_supports(name, plated):
    """Draws lie in the support, come back by ``pack``, and the Jacobian is the one that autograd finds."""
    support, shape = SUPPORTS[name]

    def model():
        if plated:
            with pyro.plate("rows", 2):
                return pyro.sample("x", improper(support, shape))
        return pyro.sample("x", improper(support, shape))

    latents = Latents.of(trace_of(model))
    assert len(latents) == 1 and latents.max_plate_nesting == int(plated)
    (site,) = latents
    assert site.shape == ((2,) if plated else ()) + torch.Size(shape)
    z = 2 * torch.randn(5, 3, latents.dim)
    values, ladj = latents.unpack(z)
    x = values["x"]
    assert x.shape == (5, 3, *site.shape) and ladj.shape == (5, 3)
    assert site.support.check(x).all()
    torch.testing.assert_close(latents.pack(values), z, rtol=1e-6, atol=1e-6)
    # The Jacobian, in coordinates of the support's own: what pack gives back of a value, by its transform.
    transform = biject_to(support)
    free = z[0, 0].reshape(site.batch_shape + site.free_shape)
    expected = transform.log_abs_det_jacobian(free, transform(free)).sum()
    torch.testing.assert_close(ladj[0, 0], expected)
    padded, same = latents.unpack(z[:, 0], nesting=3)
    assert padded["x"].shape == (5,) + (1,) * (3 - len(site.batch_shape)) + site.shape
    torch.testing.assert_close(same, ladj[:, 0])


@pytest.mark.parametrize("name", ["positive", "interval", "simplex", "ordered", "corr_cholesky", "lower_cholesky"])
def test_jacobian_by_autograd(name):
    """``log|d value / d z|`` from the Jacobian of the free entries of the value."""
    support, shape = SUPPORTS[name]
    latents = Latents.of(trace_of(lambda: pyro.sample("x", improper(support, shape))))
    z = torch.randn(latents.dim)
    # Entries of the value that determine it.
    entries = {
        "simplex": lambda x: x[:-1],
        "corr_cholesky": lambda x: x[torch.ones_like(x, dtype=torch.bool).tril(-1)],
        "lower_cholesky": lambda x: x[torch.ones_like(x, dtype=torch.bool).tril()],
    }.get(name, lambda x: x.reshape(-1))
    jacobian = torch.autograd.functional.jacobian(lambda u: entries(latents.draws(u)["x"]), z)
    torch.testing.assert_close(latents.unpack(z)[1], torch.linalg.slogdet(jacobian)[1])


def nested():
    """Two plates of which one is inside, event dimensions, and latents in each corner."""
    outer, inner = pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 4, dim=-1)
    pyro.sample("scalar", dist.Normal(0, 1))
    pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with outer:
        pyro.sample("rows", dist.Gamma(2.0, 1.0))
    with inner:
        pyro.sample("columns", dist.Normal(0, 1).expand([2]).to_event(1))
    with outer, inner:
        pyro.sample("cells", dist.Beta(2.0, 2.0).expand([2, 2]).to_event(2))
    pyro.sample("count", dist.Poisson(3.0), obs=torch.tensor(2.0))


def test_layout():
    latents = Latents.of(trace_of(nested))
    assert [site.name for site in latents] == ["scalar", "weights", "rows", "columns", "cells"]
    shapes = {site.name: tuple(site.shape) for site in latents}
    assert shapes == {"scalar": (), "weights": (3,), "rows": (3, 1), "columns": (4, 2), "cells": (3, 4, 2, 2)}
    assert latents.dim == 1 + 2 + 3 + 8 + 48 and latents.max_plate_nesting == 2
    assert [site.start for site in latents] == [0, 1, 3, 6, 14]
    names = latents.names()
    assert len(names) == len(set(names)) == latents.dim
    assert names[:4] == ["scalar", "weights[0]", "weights[1]", "rows[0,0]"] and names[-1] == "cells[2,3,1,1]"
    z = torch.randn(7, latents.dim)
    values = latents.draws(z)
    torch.testing.assert_close(latents.pack(values), z)
    # Each number moves its own entry.
    moved = z.clone()
    moved[:, names.index("columns[2,1]")] += 1
    change = latents.draws(moved)["columns"] - values["columns"]
    assert change[:, 2, 1].ne(0).all() and change.ne(0).sum() == 7


def test_draws_of_no_points():
    latents = Latents.of(trace_of(nested))
    values, ladj = latents.unpack(torch.randn(0, latents.dim), 2)
    assert values["cells"].shape == (0, 3, 4, 2, 2) and ladj.shape == (0,)


def test_dtype_of_each_site(default_dtype):
    """Values have their site's dtype, the vector the widest of them, whatever the default is."""

    def model():
        pyro.sample("single", dist.Normal(torch.tensor(0.0, dtype=torch.float32), 1.0))
        pyro.sample("double", dist.LogNormal(torch.tensor(0.0, dtype=torch.float64), 1.0))

    latents = Latents.of(trace_of(model))
    for default in (torch.float32, torch.float64):
        default_dtype(default)
        values, ladj = latents.unpack(torch.randn(3, 2, dtype=torch.float64))
        assert values["single"].dtype == torch.float32 and values["double"].dtype == torch.float64
        assert ladj.dtype == torch.float64
        assert latents.pack(values).dtype == torch.float64


def test_gradients_flow_through_unpack():
    latents = Latents.of(trace_of(nested))
    z = torch.randn(2, latents.dim, requires_grad=True)
    values, ladj = latents.unpack(z)
    (sum(v.square().sum() for v in values.values()) + ladj.sum()).backward()
    assert z.grad.isfinite().all() and z.grad.ne(0).all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    for support, shape in SUPPORTS.values():
        latents = Latents.of(trace_of(lambda support=support, shape=shape: pyro.sample("x", improper(support, shape))))
        z = torch.randn(3, latents.dim)
        torch.testing.assert_close(copied(latents).draws(z)["x"], latents.draws(z)["x"], rtol=0, atol=0)


def test_supports_compare():
    inside = constraints.independent
    same = [
        (constraints.real, constraints.real),
        (constraints.interval(0.0, 1.0), constraints.interval(0.0, 1.0)),
        (constraints.interval(TWO, TWO + 1), constraints.interval(TWO.clone(), TWO + 1)),
        (inside(constraints.greater_than(TWO), 1), inside(constraints.greater_than(TWO.clone()), 1)),
        (
            constraints.cat([constraints.greater_than(0.5), constraints.real], -1, [1, 1]),
            constraints.cat([constraints.greater_than(0.5), constraints.real], -1, [1, 1]),
        ),
    ]
    other = [
        (constraints.real, constraints.positive),
        (constraints.interval(0.0, 1.0), constraints.interval(0.0, 1.5)),
        (constraints.interval(TWO, TWO + 1), constraints.interval(TWO, TWO + 2)),
        (constraints.interval(TWO, TWO + 1), constraints.interval(TWO[:1], TWO[:1] + 1)),
        (constraints.greater_than(torch.tensor(1.0)), constraints.greater_than(1.0 + math.ulp(2.0))),
        (inside(constraints.greater_than(TWO), 1), inside(constraints.greater_than(TWO + 1), 1)),
        (inside(constraints.interval(0.0, 1.0), 1), inside(constraints.interval(0.0, 2.0), 1)),
        (inside(constraints.real, 1), inside(constraints.positive, 1)),
        (inside(constraints.real, 1), inside(constraints.real, 2)),
        (
            constraints.cat([constraints.greater_than(0.5), constraints.real], -1, [1, 1]),
            constraints.cat([constraints.greater_than(0.7), constraints.real], -1, [1, 1]),
        ),
    ]
    for one, two in same:
        assert same_support(one, two) and same_support(two, one), (one, two)
    for one, two in other:
        assert not same_support(one, two) and not same_support(two, one), (one, two)
