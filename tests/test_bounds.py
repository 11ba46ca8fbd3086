"""``fit_density(..., bounds=)``: densities between bounds, exact, whole and never beyond them."""

import itertools
import math

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from asserts import refuses
from cases import seeded
from torch.distributions import biject_to
from torch.utils.data import DataLoader

import pyro_flows as pf
from pyro_flows import plots
from pyro_flows.infer.density.bounded import bounds_of
from pyro_flows.transforms import Bounds

SMALL = {"num_layers": 1, "hidden_dims": (8,)}
INF = math.inf
BOUNDS = {"share": (0, 1), "price": (0, None), "loss": (None, 5.0)}


def fit(flow, data, *args, **options):
    return pf.fit_density(flow, data, *args, **{"progress": False, "steps": 2, **options})


def table(rows=300, dtype=torch.float64):
    """A share, a price, a loss below 5, and a free number, all by normals on the line."""
    z = torch.randn(rows, 4, generator=seeded(5), dtype=torch.float64)
    z[:, 1] += 0.6 * z[:, 0]
    share, price, loss = torch.sigmoid(z[:, 0] - 1), (2 + 0.5 * z[:, 1]).exp(), 5 - (0.3 * z[:, 2]).exp()
    made = torch.stack((share, price, loss, 100 + 20 * z[:, 3]), 1).to(dtype)
    return pd.DataFrame(made.numpy(), columns=["share", "price", "loss", "free"])


def inside(values):
    return bool(((values[..., 0] > 0) & (values[..., 0] < 1) & (values[..., 1] > 0) & (values[..., 2] < 5)).all())


@pytest.mark.parametrize("double", [False, True])
def test_a_fit_between_bounds(double):
    flow = pf.maf(4, **SMALL)
    flow = flow.double() if double else flow
    found = fit(flow, table(), bounds=BOUNDS, folds=1, steps=1, lr=1e-9)
    support = found.distribution().support
    assert repr(support) == "Within((0, 1), (0, inf), (-inf, 5), (-inf, inf))"
    draws = found.sample((5000,))
    assert draws.dtype == (torch.float64 if double else torch.float32)
    assert inside(draws) and support.check(draws).all()
    assert all(inside(ends) for ends in found.interval(0.999))
    assert found.distribution().log_prob(draws).isfinite().all()
    beyond = draws[:3].clone()
    beyond[1, 2] = 5.5
    refuses(ValueError, "support", found.distribution().log_prob, beyond)
    # In the state of the start, the density is that of a Gaussian on the line, with the Jacobian in closed form.
    coloring, *between, units, last = found.distribution.chain
    assert found.best_epoch == 0 and len(between) == 1  # which is the identity
    assert isinstance(last, Bounds) and isinstance(units, pf.Standardization)
    y = torch.tensor(table().to_numpy())
    line = torch.stack((y[:, 0].logit(), y[:, 1].log(), -(5 - y[:, 2]).log(), y[:, 3]), 1)
    jacobian = -(y[:, 0] * (1 - y[:, 0])).log() - y[:, 1].log() - (5 - y[:, 2]).log()
    loc, scale, place, factor = (each.double() for each in (units.loc, units.scale, coloring.loc, coloring.factor))
    gaussian = torch.distributions.MultivariateNormal(place, scale_tril=factor)
    exact = gaussian.log_prob((line - loc) / scale) - scale.log().sum() + jacobian
    torch.testing.assert_close(found.log_prob(y).double(), exact, rtol=0, atol=1e-9 if double else 1e-3)


def test_mass_is_one():
    """The density of one bounded column integrates to 1 up to its bounds."""
    data = torch.distributions.Beta(0.7, 2.0).sample((400, 1))
    found = fit(pf.nsf(1, **SMALL).double(), data, bounds=[(0, 1)], steps=40, folds=1)
    edges = torch.linspace(-30, 30, 20_001, dtype=torch.float64)
    grid = torch.sigmoid(edges)  # fine near the ends
    density = found.distribution.log_prob(grid[:, None]).detach().exp()
    assert abs(torch.trapezoid(density, grid).item() - 1) < 1e-4


FORMS = {
    "dictionary": {"a": (0, 1), "c": (None, 2)},
    "numbers": {0: [0, 1], np.int64(2): (-INF, 2.0)},
    "both": {"a": (0, 1), 2: (None, 2)},
    "pairs": [(0, 1), None, (None, 2)],
    "array": np.array([[0, 1], [-INF, INF], [-INF, 2]]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    assert bounds_of(FORMS[form], 3, ("a", "b", "c")) == [(0.0, 1.0), (-INF, INF), (-INF, 2.0)]
    assert bounds_of((0, 1), 1, None) == bounds_of([(0, 1)], 1, None) == [(0.0, 1.0)]
    assert bounds_of({1990: (0, 1)}, 2, ("1990", "2000"))[0] == (0.0, 1.0)


WRONG = {
    "name": ({"d": (0, 1)}, "expected bounds of columns 'a', 'b', 'c', got bounds of 'd'"),
    "number": ({3: (0, 1)}, "got bounds of 3"),
    "one pair": ((0, 1), "a pair or None for each column.*, 3 here; got 2 of them"),
    "numbers": ((0, 1, 2), "got 0 for column 'a'"),
    "order": ({"a": (1, 0)}, "expected low < high in the bounds of column a, got 1.0 and 0.0"),
    "nan": ({"b": (math.nan, 0)}, "expected low < high in the bounds of column b, got nan"),
    "text": ({"a": ("0", 1)}, r"got \('0', 1\) for column a"),
    "name alone": ("a", "got a str"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_bounds(kind):
    given, message = WRONG[kind]
    refuses(ValueError, message, bounds_of, given, 3, ("a", "b", "c"))


REFUSED = {
    "made": (lambda: pf.MADE(2), r"needs a flow, .* got a MADE.*DistributionHead"),
    "angles": (lambda: pf.ncsf(2), "needs a flow of vectors over the real numbers"),
    "image": (lambda: pf.mintnet((1, 4, 4), num_layers=1), r"events of shape \(1, 4, 4\)"),
    "support": (
        lambda: pf.Chain([*pf.maf(2, **SMALL), torch.distributions.ExpTransform()]),
        "support .*leave bounds out",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_densities_without_bounds(kind):
    make, message = REFUSED[kind]
    refuses(ValueError, message, fit, make(), torch.rand(40, 2), bounds={0: (0, 1)})


def test_rows_on_and_beyond_bounds():
    data = table()
    data.loc[[3, 7], "share"] = 1.0
    data.loc[9, "loss"] = 6.0
    message = (
        r"3 of 300 rows of data \(rows 3, 7, 9\) lie outside of the bounds of columns 'share' \(0 to 1\), 'loss' "
        r"\(-inf to 5\), or on its edge, as torch.float32 has them; leave them out, .*wider bounds; where a bound is a"
    )
    refuses(ValueError, message, fit, pf.maf(4, **SMALL), data, bounds=BOUNDS)
    refuses(ValueError, message, fit, pf.maf(4, **SMALL), data, bounds=BOUNDS, folds=1)
    found = fit(pf.maf(4, **SMALL), table(), bounds=BOUNDS, folds=1)
    refuses(ValueError, "rows 3, 7, 9", found.score, data)
    # Just inside, but not in the flow's dtype.
    near = table()
    near.loc[5, "share"] = 1 - 1e-12
    refuses(ValueError, r"1 of 300 rows of data \(row 5\)", fit, pf.maf(4, **SMALL), near, bounds=BOUNDS)
    assert fit(pf.maf(4, **SMALL).double(), near, bounds=BOUNDS, folds=1).log_prob(near).isfinite().all()


@pytest.mark.full
def test_folds_contexts_and_verdict():
    data = table(120)
    found = fit(pf.maf(3, context_dim=1, **SMALL), data[list(BOUNDS)], context=data["free"], bounds=BOUNDS, folds=2)
    assert len(found.members) == 2 and repr(found.distribution.support).startswith("Within((0, 1)")
    draws = found.sample((50,), data["free"])
    assert draws.shape == (50, 120, 3) and inside(draws)
    assert math.isfinite(found.validation) and "the Gaussian" in found.verdict.text
    small = fit(pf.maf(4, **SMALL), data, bounds=BOUNDS, steps=None, max_epochs=None, seconds=0.01)
    assert inside(small.sample((500,)))


def test_checkpoint_knows_bounds(tmp_path):
    path, data, options = tmp_path / "fit.pt", table(), {"folds": 1, "validation_fraction": 0.2}
    whole = fit(pf.maf(4, **SMALL), data, bounds=BOUNDS, max_epochs=4, steps=None, **options)
    fit(pf.maf(4, **SMALL), data, bounds=BOUNDS, max_epochs=2, steps=None, checkpoint=path, **options)
    again = fit(pf.maf(4, **SMALL), data, bounds=BOUNDS, max_epochs=4, steps=None, checkpoint=path, **options)
    torch.testing.assert_close(again.log_prob(data), whole.log_prob(data), rtol=0, atol=0)
    assert again.history["epoch"] == [1, 2, 3, 4]
    other = {**BOUNDS, "share": (0, 2)}
    refuses(
        ValueError, "another data: bounds is", fit, pf.maf(4, **SMALL), data, bounds=other, checkpoint=path, **options
    )
    refuses(ValueError, "belongs to a fit of another", fit, pf.maf(4, **SMALL), data, checkpoint=path, **options)


def test_the_given_flow_learns_and_keeps_its_class():
    flow = pf.Flow(pf.maf(4, **SMALL))
    before = [p.detach().clone() for p in flow.parameters()]
    found = fit(flow, table(), bounds=BOUNDS, folds=1, steps=20)
    assert any(not torch.equal(p, q) for p, q in zip(before, flow.parameters(), strict=True))
    assert all(p is q for p, q in zip(flow.parameters(), found.flow.parameters(), strict=True))
    assert len(flow.chain) == 1 and isinstance(found.flow.chain[-1], Bounds)
    free = fit(flow, table(), bounds={"share": None}, folds=1)
    assert free.flow is flow  # no bound, no part


def test_loader_by_number():
    data = torch.tensor(table().to_numpy()).float()
    found = fit(pf.maf(4, **SMALL), DataLoader(data, batch_size=50), bounds={0: (0, 1), 1: (0, None), 2: (None, 5)})
    assert found.columns is None and inside(found.sample((100,)))
    loader = DataLoader(data, batch_size=50)
    refuses(ValueError, "outside of the bounds of column 0", fit, pf.maf(4, **SMALL), loader, bounds={0: (0.5, 1)})


@pytest.mark.full
def test_as_a_prior_and_in_pictures():
    found = fit(pf.maf(2, **SMALL), table()[["share", "price"]], bounds=[(0, 1), (0, None)], folds=1)
    made = found.distribution()
    line = biject_to(made.support)
    x = torch.randn(6, 2)
    assert made.support.check(line(x)).all()
    torch.testing.assert_close(line.inv(line(x)), x, rtol=1e-3, atol=1e-4)
    with pyro.plate("rows", 7):
        assert pyro.sample("x", made).shape == (7, 2)
    ax = plots.density(found, bounds=((-0.5, 1.5), (-1, 20)), points=30)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("share", "price")
    marginal = made.marginal([0])
    assert marginal.log_prob(torch.tensor([0.4])).isfinite()


# The transform itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_never_reach_a_bound(dtype):
    ends = [(0.0, 1.0), (-3.0, INF), (-INF, 7.0), (-1e6, -1e6 + 1), (1e-30, 1e-20), (-INF, INF)]
    layer = Bounds(*(torch.tensor(each, dtype=dtype) for each in zip(*ends, strict=True)))
    places = torch.tensor([-80.0, -40, -17, -1, 0, 1, 17, 40, 80], dtype=dtype)
    x = places[:, None].expand(-1, len(ends)).clone().requires_grad_()
    y, ladj = layer.forward_and_ladj(x)
    assert layer.codomain.check(y).all()
    assert (y[1:] >= y[:-1]).all()
    back, other = layer.inverse_and_ladj(y)
    assert back.isfinite().all() and other.isfinite().all() and ladj.isfinite().all()
    (grad,) = torch.autograd.grad(y.sum() + ladj.sum(), x)
    assert grad.isfinite().all()
    own = [0, 1, 2, 4, 5]  # where numbers next to the bounds are close to each other
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(back[3:6, own], x[3:6, own], rtol=tolerance, atol=10 * tolerance)


def test_a_vanishing_distance_is_exact():
    """Close to an end, the number on the line is that of the distance, to full precision."""
    layer = Bounds([0.0, -INF], [1.0, 1.0])
    for distance in (1e-3, 1e-6):
        y = torch.tensor([1 - distance, 1 - distance])
        true = -torch.log(1 - y[0].double())
        x, _ = layer.inverse_and_ladj(y)
        torch.testing.assert_close(x[1].double(), true, rtol=1e-6, atol=0)
        torch.testing.assert_close(x[0].double(), true + y[0].double().log(), rtol=1e-6, atol=1e-6)


def test_bounds_that_are_wrong():
    refuses(ValueError, "vectors of one length", Bounds, [0.0], [1.0, 2.0])
    refuses(ValueError, "vectors of one length", Bounds, 0.0, 1.0)
    for low, high in itertools.product((1.0, math.nan), (1.0, 0.5)):
        refuses(
            ValueError,
            r"expected low < high in every dimension, got .* in dimension 1",
            Bounds,
            [0.0, low],
            [1.0, high],
        )
