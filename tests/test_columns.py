"""``fit_density`` column by column: units, bounds of the support, shared values, precision, and arrays of all kinds."""

import math
import re
import warnings

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import seeded, shake
from pyro.distributions import constraints as pyro_constraints
from torch import nn
from torch.distributions import (
    AffineTransform,
    CatTransform,
    ComposeTransform,
    ExpTransform,
    SigmoidTransform,
    SoftplusTransform,
    biject_to,
    constraints,
    identity_transform,
)
from torch.utils.data import DataLoader, TensorDataset

import pyro_flows as pf
from pyro_flows import plots
from pyro_flows.distributions import CategoricalHead, DistributionHead, MixedHead, MixtureHead
from pyro_flows.infer import AnomalyDetector, ForwardKL
from pyro_flows.infer.density.columns import at_bounds, is_free, spikes
from pyro_flows.infer.density.data import to_tensor
from pyro_flows.infer.density.prepare import reals_of
from pyro_flows.infer.density.units import pull_back

SMALL = {"num_layers": 1, "hidden_dims": (8,)}
REAL, POSITIVE, UNIT = constraints.real, constraints.positive, constraints.unit_interval


def fit(flow, data, *args, **options):
    return pf.fit_density(flow, data, *args, **{"progress": False, "steps": 2, **options})


def flow(input_dim=2, context_dim=0):
    return pf.Flow(pf.maf(input_dim, context_dim=context_dim, **SMALL))


def ending(*back, input_dim=3):
    return pf.Chain([*pf.maf(input_dim, **SMALL), *back])


def people(rows=600, dtype=torch.float32):
    """Age, income, and a share, far from unit scale and independent."""
    made = seeded(3)
    z = torch.randn(rows, 3, generator=made, dtype=torch.float64)
    return torch.stack((40 + 12 * z[:, 0], (10 + 0.5 * z[:, 1]).exp(), torch.sigmoid(z[:, 2] - 1)), -1).to(dtype)


def by_hand(data):
    """The columns as real numbers, and the log-derivative of that, a row."""
    age, income, share = data.double().unbind(-1)
    real = torch.stack((age, income.log(), torch.logit(share)), -1)
    return real, -income.log() - share.log() - torch.log1p(-share)


EXP = ExpTransform()
ENDS = {
    "cat": lambda: ending(biject_to(constraints.cat([REAL, POSITIVE, UNIT], dim=-1))),
    "cat-of-cats": lambda: ending(
        biject_to(constraints.cat([constraints.cat([REAL, POSITIVE], dim=-1), UNIT], dim=-1, lengths=[2, 1]))
    ),
    "by-column": lambda: ending(CatTransform([identity_transform, EXP, SigmoidTransform()], dim=-1)),
    "composed": lambda: ending(
        CatTransform([identity_transform, ComposeTransform([EXP]), biject_to(constraints.interval(0.0, 1.0))], dim=-1)
    ),
    "nested": lambda: pf.Chain([pf.maf(3, **SMALL), pf.Chain([pf.Chain([ENDS["cat"]()[-1]])])]),
    "inverse": lambda: pf.Chain([*pf.maf(3, **SMALL), pf.Chain([ENDS["cat"]()[-1].inv]).inv]),
    "inverted-chain": lambda: pf.Chain([ENDS["cat"]()[-1].inv, pf.maf(3, **SMALL).inv]).inv,
}


# Units of each column


@pytest.mark.parametrize("end", ENDS)
def test_each_column_is_standardized_where_it_is_real(end):
    data = people()
    torch.manual_seed(0)
    found = fit(ENDS[end](), data, validation_fraction=0)
    (units,) = (part for part in found.distribution.chain if isinstance(part, pf.Standardization))
    real, _ = by_hand(data)
    torch.testing.assert_close(units.loc.double(), real.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(units.scale.double(), real.std(0), rtol=1e-4, atol=1e-4)
    draws = found.distribution.sample((500,))
    assert (draws[:, 1] > 0).all() and ((draws[:, 2] > 0) & (draws[:, 2] < 1)).all()
    assert (draws[:, 0] < 20).any()


def test_columns_are_pulled_back_through_transforms_of_transforms():
    data = people(dtype=torch.float64)
    data[7, 1], data[9, 2] = 0.0, 1.0
    pair = constraints.cat([REAL, constraints.interval(0.0, 1e6)], dim=-1)
    capped = constraints.cat([pair, UNIT], dim=-1, lengths=[2, 1])
    for constraint in (
        constraints.stack([REAL, POSITIVE, UNIT], dim=-1),
        constraints.independent(constraints.cat([REAL, POSITIVE, UNIT], dim=-1), 1),
        constraints.cat([constraints.cat([REAL, POSITIVE], dim=-1), UNIT], dim=-1, lengths=[2, 1]),
        capped,
    ):
        real, edge = pull_back([pf.Wrap(biject_to(constraint), 3)], data)
        assert edge.nonzero().tolist() == [[7, 1], [9, 2]]
        want = by_hand(data)[0]
        if constraint is capped:
            want[:, 1] = torch.logit(data[:, 1] / 1e6)
        torch.testing.assert_close(real[~edge.any(-1)], want[~edge.any(-1)])


def test_scores_are_those_of_columns_transformed_by_hand():
    data = people(400, torch.float64)
    torch.manual_seed(0)
    options = {"steps": 30, "validation_fraction": 0, "average": 0}
    got = fit(pf.Flow(ENDS["cat"]()).double(), data, **options)
    torch.manual_seed(0)
    real, ladj = by_hand(data)
    want = fit(flow(3).double(), real, **options)
    units = want.distribution.chain[-1]
    torch.testing.assert_close(units.loc, real.mean(0))
    torch.testing.assert_close(units.scale, real.std(0))
    scores = want.log_prob(real) + ladj
    torch.testing.assert_close(got.log_prob(data), scores, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("back", "data", "grid"),
    [
        (biject_to(constraints.interval(1000.0, 1500.0)), lambda u: 1000 + 500 * u, (1000.0, 1500.0)),
        (biject_to(constraints.greater_than(-3.0)), lambda u: 50 * u - 3, (-3.0, 400.0)),
        (biject_to(constraints.less_than(7.0)), lambda u: 7 - 50 * u, (-400.0, 7.0)),
        (ComposeTransform([SoftplusTransform(), AffineTransform(0.0, 100.0)]), lambda u: 1e3 * u, (0.0, 1e4)),
        (biject_to(constraints.cat([constraints.interval(-9.0, 9.0)], dim=-1)), lambda u: 18 * u - 9, (-9.0, 9.0)),
    ],
    ids=["interval", "greater", "less", "softplus", "cat"],
)
def test_densities_in_the_units_of_the_data_integrate_to_one(back, data, grid):
    rows = data(dist.Beta(2.0, 3.0).sample((300, 1)))
    found = fit(ending(back, input_dim=1), rows, steps=20)
    places = torch.linspace(*grid, 200_002, dtype=torch.float64)[1:-1]
    density = found.distribution.double().log_prob(places.unsqueeze(-1)).exp().detach()
    assert abs(torch.trapezoid(density, places) - 1) < 5e-3


def test_columns_of_series_are_standardized_by_channel():
    data = torch.stack((40 + 12 * torch.randn(300, 4), (5 + torch.randn(300, 4)).exp()), 1)
    back = biject_to(constraints.cat([REAL, POSITIVE], dim=-2))
    found = fit(pf.Chain([*pf.causal_maf((2, 4), num_layers=1), back]), data, validation_fraction=0)
    (units,) = (part for part in found.distribution.chain if isinstance(part, pf.Standardization))
    torch.testing.assert_close(units.loc.flatten(), torch.stack((data[:, 0].mean(), data[:, 1].log().mean())))


def test_where_numbers_are_real_is_found_in_any_constraint():
    shape = torch.Size([3])
    inner = constraints.cat([REAL, POSITIVE], dim=-1)
    for constraint, want in (
        (constraints.independent(constraints.stack([REAL, POSITIVE, REAL], dim=-1), 0), [1, 0, 1]),
        (constraints.cat([constraints.real_vector, UNIT], dim=-1, lengths=[2, 1]), [1, 1, 0]),
        (constraints.independent(constraints.cat([UNIT, inner], dim=-1, lengths=[1, 2]), 1), [0, 1, 0]),
        (constraints.stack([POSITIVE, REAL, REAL], dim=1), [0, 1, 1]),
        (constraints.cat([REAL, REAL, REAL], dim=0), [0, 0, 0]),  # over rows
        (constraints.cat([REAL, REAL], dim=-1), [0, 0, 0]),  # of other events
    ):
        assert is_free(constraint, shape).tolist() == [bool(free) for free in want]


class Positive(nn.Module):
    """A base on the positive numbers that learns."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))

    def forward(self):
        return dist.LogNormal(self.loc, 1.0).to_event(1)


def test_numbers_that_are_real_only_at_the_end_are_standardized_there():
    data = 300 + 20 * torch.randn(200, 2)
    found = fit(pf.Flow([pf.Wrap(EXP.inv, 2)], Positive()), data, validation_fraction=0)
    assert [type(part).__name__ for part in found.distribution.chain] == ["Wrap", "Standardization"]
    torch.testing.assert_close(found.distribution.chain[1].loc, data.mean(0))


# Heads of autoregressive models


def mixed():
    return MixedHead([("normal", [0, 1]), ("bernoulli", [2]), (CategoricalHead(3), [3])])


def survey(rows=800):
    made = seeded(1)
    age = 40 + 12 * torch.randn(rows, 1, generator=made)
    income = (10 + 0.02 * age + 0.5 * torch.randn(rows, 1, generator=made)).exp()
    sex = (torch.rand(rows, 1, generator=made) < 0.4).float()
    return torch.cat((age, income, sex, torch.randint(3, (rows, 1), generator=made).float()), -1)


@pytest.mark.parametrize("order", ["identity", "any"])
def test_discrete_columns_stay_as_they_are(order):
    data = survey()
    torch.manual_seed(0)
    made = pf.MADE(4, mixed(), hidden_dims=(16,), order=order)
    found = fit(made, data, standardize=True, steps=200, lr=0.02)
    assert found.distribution.loc[2:].tolist() == [0, 0] and found.distribution.scale[2:].tolist() == [1, 1]
    truth = dist.Normal(40.0, 12.0).log_prob(data[:, 0])
    truth = truth + dist.LogNormal(10 + 0.02 * data[:, 0], 0.5).log_prob(data[:, 1])
    truth = truth.mean() - 0.673 - math.log(3)
    assert truth - 1.5 < found.validation < truth + 1
    draws = found.distribution.sample((300,))
    assert set(draws[:, 2].tolist()) == {0.0, 1.0} and set(draws[:, 3].tolist()) == {0.0, 1.0, 2.0}
    assert 1e4 < draws[:, 1].median() < 1e5


def test_scores_of_a_model_are_those_of_columns_scaled_by_hand():
    data = survey(300).double()
    loc, scale = data.mean(0), data.std(0)
    loc[2:], scale[2:] = 0, 1
    options = {"steps": 20, "validation_fraction": 0, "average": 0}
    torch.manual_seed(0)
    made = pf.MADE(4, mixed(), hidden_dims=(8,)).double()
    got = fit(made, data, standardize=True, **options)
    torch.manual_seed(0)
    want = fit(pf.MADE(4, mixed(), hidden_dims=(8,)).double(), (data - loc) / scale, standardize=False, **options)
    scores = want.log_prob((data - loc) / scale) - scale.log().sum()
    torch.testing.assert_close(got.log_prob(data), scores, rtol=1e-8, atol=1e-8)


FIXED_POINTS = {
    "normal": ("normal", math.nan),
    "mixture": (MixtureHead(2), math.nan),
    "bernoulli": ("bernoulli", math.inf),
    "categorical": (CategoricalHead(3), math.inf),
    "logistic": ("logistic", math.inf),
    "laplace": (DistributionHead(dist.Laplace), math.nan),
    "student": (DistributionHead(dist.StudentT, fixed={"df": 4.0}), math.nan),
    "known-scale": (DistributionHead(dist.Normal, fixed={"scale": 1.0}), math.inf),
    "angle": (DistributionHead(dist.VonMises), math.inf),
    "gamma": (DistributionHead(dist.Gamma), 0.0),
    "lognormal": (DistributionHead(dist.LogNormal), 0.0),
    "known-rate": (DistributionHead(dist.Gamma, fixed={"rate": 1.0}), math.inf),
    "chi2": (DistributionHead(dist.Chi2), math.inf),
    "beta": (DistributionHead(dist.Beta), math.inf),
    "poisson": (DistributionHead(dist.Poisson), math.inf),
}


@pytest.mark.parametrize("name", FIXED_POINTS)
def test_what_a_head_says_of_its_units(name):
    head, point = FIXED_POINTS[name]
    made = pf.MADE(2, head)
    assert np.array_equal(made.head.fixed_points(), [point] * 2, equal_nan=True)
    both = MixedHead([(head, [1]), ("bernoulli", [0])])
    assert np.array_equal(both.bind(2).fixed_points(), [math.inf, point], equal_nan=True)
    assert both.bind(2).discrete_dims() == [True, made.head.discrete]


@pytest.mark.parametrize("family", [dist.Gamma, dist.LogNormal])
def test_positive_families_are_stretched_about_zero(family):
    data = dist.Gamma(3.0, 1e-3).sample((400, 1))
    made = pf.MADE(1, DistributionHead(family), hidden_dims=(8,))
    found = fit(made, data, standardize=True, validation_fraction=0, steps=100)
    assert found.distribution.loc.item() == 0
    torch.testing.assert_close(found.distribution.scale.item(), data.square().mean().sqrt().item(), rtol=1e-2, atol=0)
    places = torch.linspace(0, 60_000, 20_001, dtype=torch.float64)[1:]
    density = found.distribution.double().log_prob(places.unsqueeze(-1)).exp().detach()
    assert abs(torch.trapezoid(density, places) - 1) < 1e-2
    assert found.history["train"][-1] > dist.Gamma(3.0, 1e-3).log_prob(data).mean() - 1


def test_contexts_of_a_discrete_model_are_standardized():
    context = 500 + 100 * torch.randn(400, 1)
    data = (torch.rand(400, 1) < torch.sigmoid((context - 500) / 50)).float()
    made = pf.MADE(1, "bernoulli", context_dim=1, hidden_dims=(8,))
    found = fit(made, data, context=context, standardize=True, steps=150, lr=0.03)
    assert abs(found.distribution.context_loc.item() - 500) < 30 and found.distribution.scale.item() == 1
    assert found.log_prob(data, context).mean() > -0.58  # a coin has -0.69
    with pytest.raises(ValueError, match=r"nothing to standardize: .* discrete"):
        fit(pf.MADE(2, "bernoulli"), torch.randint(2, (50, 2)), standardize=True)
    bits = fit(pf.MADE(2, "bernoulli"), torch.randint(2, (50, 2)).bool())
    assert bits.distribution is bits.flow


def uniform(low, high):
    return dist.Uniform(torch.full((2,), low), torch.full((2,), high)).to_event(1)


def degrees(rows=300):
    return dist.VonMises(0.0, 1.0).sample((rows, 1)) * 180 / math.pi


FAR = {
    "made": (
        lambda: fit(pf.MADE(4, mixed()), survey(300)),
        r"data: columns 0, 1 are not .*40\..* ± 1.*standardize=True",
    ),
    "bounded-base": (
        lambda: fit(pf.Flow(pf.maf(2, **SMALL), uniform(-1.0, 1.0)), 2e-3 * torch.rand(300, 2)),
        "columns 0, 1 are not standardized",
    ),
    "degrees": (lambda: fit(pf.MADE(1, DistributionHead(dist.VonMises)), degrees()), "column 0 .*angles in radians"),
    "one-kind": (
        lambda: fit(pf.MADE(2, MixedHead([("normal", [0]), (DistributionHead(dist.Chi2), [1])])), people()[:, :2]),
        "column 1 is not standardized",
    ),
    "context": (
        lambda: fit(pf.MADE(1, "bernoulli", context_dim=1), torch.randint(2, (300, 1)), context=degrees() + 500),
        "context: column 0 is not",
    ),
}
NEAR = {
    "explicit": lambda: fit(pf.MADE(4, mixed()), survey(300), standardize=False),
    "standardized": lambda: fit(pf.MADE(4, mixed()), survey(300), standardize=True),
    "its-own-units": lambda: fit(pf.Flow(pf.maf(2, **SMALL), uniform(0.0, 1e3)), 200 * torch.rand(300, 2) + 400),
    "counts": lambda: fit(pf.MADE(1, DistributionHead(dist.Poisson)), torch.poisson(torch.full((300, 1), 90.0))),
    "circle": lambda: fit(pf.ncsf(1, num_layers=1, hidden_dims=(8,)), degrees() * math.pi / 180),
    "flow": lambda: fit(flow(), 1e6 * torch.randn(300, 2)),
}


@pytest.mark.parametrize("name", FAR)
def test_numbers_far_from_the_units_of_the_model_are_warned_of(name):
    call, message = FAR[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert any(re.search(message, str(each.message)) for each in caught), [str(each.message) for each in caught]
    assert {each.filename for each in caught} == {__file__}


@pytest.mark.parametrize("name", NEAR)
def test_no_warning_of_units_without_need(name):
    NEAR[name]()


# Bounds of the support


def spoilt(data, rows, value):
    data[rows, 0] = value
    return data


SIMPLEX = biject_to(constraints.simplex)
CAT = biject_to(constraints.cat([constraints.interval(0.0, 50.0), REAL], dim=-1))
BOUNDS = {
    "unit": (ending(SigmoidTransform(), input_dim=2), torch.rand(90, 2), 1.0),
    "unit-lower": (ending(biject_to(UNIT), input_dim=2), torch.rand(90, 2), 0.0),
    "beyond": (ending(biject_to(UNIT), input_dim=2), torch.rand(90, 2), 1.5),
    "interval": (ending(biject_to(constraints.interval(0.1, 0.7)), input_dim=2), 0.15 + 0.5 * torch.rand(90, 2), 0.7),
    "negative": (ending(biject_to(constraints.interval(-9.0, -1.0)), input_dim=2), -8 * torch.rand(90, 2) - 1, -9.0),
    "half-open": (ending(biject_to(constraints.half_open_interval(0.0, 3.0)), input_dim=2), torch.rand(90, 2), 0.0),
    "greater": (ending(biject_to(constraints.greater_than(5.0)), input_dim=2), 6 + torch.rand(90, 2), 5.0),
    "nonnegative": (ending(biject_to(constraints.nonnegative), input_dim=2), 6 + torch.rand(90, 2), 0.0),
    "less": (ending(biject_to(constraints.less_than(5.0)), input_dim=2), torch.rand(90, 2), 5.0),
    "softplus": (ending(SoftplusTransform(), input_dim=2), torch.rand(90, 2), 0.0),
    "cat": (ending(CAT, input_dim=2), 50 * torch.rand(90, 2), 50.0),
    "cat-beyond": (ending(CAT, input_dim=2), 50 * torch.rand(90, 2), -3.0),
    "behind": (ending(SigmoidTransform(), AffineTransform(2.0, 10.0), input_dim=2), 2 + 10 * torch.rand(90, 2), 12.0),
    "falling": (ending(SigmoidTransform(), AffineTransform(1.0, -1.0), input_dim=2), torch.rand(90, 2), 1e-9),
    "ordered": (
        ending(biject_to(pyro_constraints.ordered_vector), input_dim=2),
        torch.rand(90, 2).sort(-1).values,
        torch.tensor([0.5, 0.5]),
    ),
    "simplex": (ending(SIMPLEX, input_dim=1), dist.Dirichlet(torch.ones(2)).sample((90,)), torch.tensor([1.0, 0.0])),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BOUNDS)
def test_rows_at_a_bound_are_refused(name, dtype):
    chain, data, value = BOUNDS[name]
    good, bad = data.to(dtype), data.to(dtype).clone()
    if isinstance(value, torch.Tensor):
        bad[[3, 5]] = value.to(dtype)
    else:
        bad[[3, 5], 0] = value
    flow = pf.Flow(chain).to(dtype)
    if not (name == "falling" and dtype == torch.float64):  # where float64 has room enough
        for call in (
            lambda: fit(flow, bad),
            lambda: fit(flow, good, bad),
            lambda: fit(flow, DataLoader(bad, batch_size=90)),
        ):
            refuses(ValueError, r"2 of 90 rows of .*\(rows 3, 5\) lie outside of .*, or on its edge", call)
    assert math.isfinite(fit(flow, good).validation)


def test_the_column_at_a_bound_and_the_remedy_are_named():
    data = torch.stack((torch.rand(50), 50 * torch.rand(50)), -1)
    data[[2, 7, 9], 1] = 50.0
    chain = ending(biject_to(constraints.cat([UNIT, constraints.interval(0.0, 50.0)], dim=-1)), input_dim=2)
    refuses(ValueError, r"3 of 50 rows .* in column 1, as torch.float32 .*two-part", fit, chain, data)


def test_rows_near_a_bound_are_kept():
    data = torch.rand(50, 1)
    data[:4, 0] = torch.tensor([1e-30, 1e-9, 1 - 3e-7, 1 - 1e-6])
    assert not at_bounds(UNIT, data).any()
    assert math.isfinite(fit(ending(SigmoidTransform(), input_dim=1), data).validation)


def test_ends_that_belong_to_the_support_are_kept():
    closed, rows = pf.Flow(pf.maf(2, **SMALL), uniform(-1.0, 1.0)), 2 * torch.rand(90, 2) - 1
    assert torch.equal(reals_of(closed, spoilt(rows, [4], 1.0), "data"), rows)
    turn = dist.VonMises(0.0, 1.0).sample((90, 1))
    fit(pf.ncsf(1, num_layers=1, hidden_dims=(8,)), spoilt(turn, [4], float(np.float32(math.pi) - 1e-6)))
    data = torch.rand(90, 1)
    data[4] = 0.0
    assert math.isfinite(fit(pf.MADE(1, DistributionHead(dist.Exponential)), data).validation)
    for family in (dist.Gamma, dist.Beta):
        both = MixedHead([("normal", [0]), (DistributionHead(family), [1])])
        with pytest.raises(ValueError, match=r"1 of 90 rows of data \(row 4\) .* in column 1"):
            fit(pf.MADE(2, both), torch.cat((torch.randn(90, 1), 0.9 * data), 1))
    with pytest.raises(ValueError, match=r"outside of the model's support .*0 or 1.* in columns 0, 1, .*from 0"):
        fit(pf.MADE(2, "bernoulli"), torch.arange(100).reshape(50, 2))


# Values that many rows share


def normal(rows, seed=0):
    return np.random.default_rng(seed).normal(size=rows)


def shared(rows, share, value=0.0):
    x = normal(rows)
    x[: int(share * rows)] = value
    return x


GRIDS = {
    "numbers": lambda n: normal(n),
    "tenths": lambda n: normal(n).round(1),
    "thousandths": lambda n: normal(n).round(3),
    "float16": lambda n: (300 * normal(n)).astype(np.float16),
    "bfloat16": lambda n: torch.as_tensor(normal(n)).bfloat16().double().cpu().numpy(),
    "digits": lambda n: np.array([float(f"{v:.2e}") for v in np.exp(2 * normal(n))]),
    "integers": lambda n: np.floor(100 * np.abs(normal(n))),
    "money": lambda n: np.exp(normal(n) + 5).round(),
    "tails": lambda n: np.random.default_rng(0).standard_cauchy(n).round(2),
    "twice": lambda n: np.repeat(normal(n // 2), 2),
    "drawn-again": lambda n: np.random.default_rng(0).choice(normal(n), n),
}


@pytest.mark.parametrize("rows", [20, 200, 3000])
@pytest.mark.parametrize("name", GRIDS)
def test_rounding_makes_no_spike(name, rows):
    assert spikes(torch.as_tensor(GRIDS[name](rows).astype(np.float64))[:, None], [0]) == {}


@pytest.mark.parametrize(
    ("rows", "share", "rounded"),
    [(20, 0.5, 9), (60, 0.2, 9), (300, 0.05, 9), (3000, 0.01, 9), (3000, 0.09, 2), (200_000, 0.0005, 9)],
)
def test_a_value_that_many_rows_share_is_a_spike(rows, share, rounded):
    x = np.append(shared(rows, share).round(rounded), [])
    order = np.random.default_rng(1).permutation(rows)
    found = spikes(torch.as_tensor(np.stack((normal(rows, 5), x[order]), 1)), [0, 1])
    assert list(found) == [1] and found[1][0][0] == 0 and found[1][1] >= share * rows


def test_spikes_are_told_with_what_fits_them():
    limit, both = normal(2000).clip(max=1.6), shared(2000, 0.1)
    both[200:400] = 3.5
    data = torch.as_tensor(np.stack((limit, normal(2000, 2), both), 1))
    spiked = re.escape("1.6 in ") + r"\d+ of 1800 rows of column 0, .*of column 2 \(and 1 more values there\).*hurdle"
    for given in (data, DataLoader(data, batch_size=100)):
        with pytest.warns(UserWarning, match=spiked if given is data else "of column 0, .*of column 2") as caught:
            fit(flow(3), given)
        assert "dequantize" not in str(caught[0].message) and len(caught) == 1
    made = pf.MADE(2, MixedHead([("normal", [0]), ("bernoulli", [1])]))
    with pytest.warns(UserWarning, match="0 in .* rows of column 0;"):
        fit(made, torch.as_tensor(np.stack((shared(500, 0.2), normal(500) > 1), 1)).float())
    fit(flow(2, 1), torch.randn(500, 2), context=torch.as_tensor(shared(500, 0.3))[:, None])  # no matter there


# Precision


def offset(loc, scale, rows=500):
    return np.stack((loc + scale * normal(rows), normal(rows, 1)), 1)


@pytest.mark.parametrize(("loc", "scale"), [(1.1262594624e9, 0.1), (2.46e6, 0.5), (1e5, 1.0), (0.0, 1e-60)])
@pytest.mark.parametrize("kind", ["array", "frame", "loader", "tensor"])
def test_numbers_that_float32_cannot_tell_apart_are_told(loc, scale, kind):
    data = offset(loc, scale)
    given = {
        "array": data,
        "frame": pd.DataFrame(data, columns=["time", "x"]),
        "tensor": torch.as_tensor(data),
        "loader": DataLoader(torch.as_tensor(data), batch_size=30),
    }[kind]
    column = "'time'" if kind == "frame" else "0"
    words = rf"column.* {column} of data: 500 distinct values in torch.float64 become \d+ .*flow\.double\(\)"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit(flow(), given)
            told = [str(each.message) for each in caught]
        except ValueError as error:
            told = [str(error)]
    assert len(told) == 1 and re.search(words, told[0]), told
    fit(flow().double(), data)


def test_precision_of_contexts_and_integers():
    with pytest.warns(UserWarning, match=r"column 0 of context: .*double\(\)"):
        fit(flow(2, 2), normal(600).reshape(-1, 2), context=offset(2.46e6, 0.5, 300))
    stamps = 1_700_000_000 + np.arange(600).reshape(-1, 2) ** 2 % 1009
    with pytest.warns(UserWarning, match=r"in torch.int64 become \d+ .*double\(\)"):
        fit(flow(), stamps)
    for harmless in (offset(1e3, 1.0), np.float32(offset(1e6, 1.0)), offset(0.0, 1e-30), offset(1e4, 1.0).round()):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fit_density: column")  # coarse as given, which is another matter
            fit(flow(), harmless)


# Arrays


def masked(rows=50, columns=2):
    data = np.ma.masked_array(normal(rows * columns).reshape(rows, columns), mask=np.zeros((rows, columns), bool))
    data.mask[[4, 9], 1] = True
    return data


def test_masks_mean_missing_wherever_arrays_come_in():
    full, bad = masked().data, masked()
    known = fit(flow(), full)
    calls = {
        "data": lambda: fit(flow(), bad),
        "validation": lambda: fit(flow(), full, bad),
        "context": lambda: fit(flow(2, 2), full, context=bad),
        "validation_context": lambda: fit(flow(2, 2), full, full, full, validation_context=bad),
        "DataLoader": lambda: fit(flow(), DataLoader(full, batch_size=50, collate_fn=lambda rows: bad)),
        "list": lambda: fit(flow(), list(bad)),
        "log_prob": lambda: known.log_prob(bad),
        "detector": lambda: AnomalyDetector(known.distribution, bad),
        "draws": lambda: ForwardKL({"x": bad}),
        "bits": lambda: AnomalyDetector(known.distribution, full).bits(bad),
        "plot": lambda: plots.corner(bad),
    }
    for name, call in calls.items():
        refuses(ValueError, r"is masked in 2 of 50 rows \(rows 4, 9\).*missing", call)
        assert name
    bad.mask[:] = False
    fit(flow(), bad)
    for module in (flow(), pf.MADE(2, "normal")):
        refuses(TypeError, r"expected a tensor, got MaskedArray.*filled", module.log_prob, bad)
        refuses(TypeError, "expected a tensor, got DataFrame", module.log_prob, pd.DataFrame(full))


FRAME = pd.DataFrame(normal(120).reshape(60, 2), columns=["a", "b"])
KINDS = {
    "frame": (FRAME, None),
    "nullable": (FRAME.assign(b=pd.array(range(60), dtype="Int64")), None),
    "boolean": (FRAME.assign(b=pd.array([True, False, False] * 20, dtype="boolean")), "discrete|^$"),
    "missing": (FRAME.assign(b=pd.array([1, None] * 30, dtype="Int64")), "ValueError: .*NaN.* in 30 of 60 rows"),
    "dates": (FRAME.assign(b=pd.date_range("2020", periods=60)), r"TypeError: .*'b' \(datetime64.*days since"),
    "words": (FRAME.assign(b=["x"] * 60), r"TypeError: .*DataFrame with 'b' .*code categories"),
    "categories": (FRAME.assign(b=pd.Categorical(["x", "y"] * 30)), r"TypeError: .*'b' \(category\)"),
    "objects": (FRAME.astype(object), r"TypeError: .*'a' \(object\), 'b' \(object\).*astype\(float\)"),
    "complex": (FRAME.to_numpy() + 1j, "TypeError: .*complex128; give real and imaginary parts"),
    "fields": (np.zeros(60, dtype=[("a", "f4"), ("b", "f4")]), "TypeError: .*fields of a structured array"),
    "ragged": ([[1.0, 2.0], [3.0]], "TypeError: .*got list"),
    "long": (FRAME.to_numpy().astype(np.longdouble), None),
    "half": (FRAME.to_numpy().astype(np.float16), None),
    "reversed": (FRAME.to_numpy()[::-1, ::-1], None),
    "unsigned": ((2.0**63 * (1 + FRAME.to_numpy() % 1 / 2)).astype(np.uint64), None),
    "subclass": (torch.tensor(FRAME.to_numpy()).as_subclass(type("Own", (torch.Tensor,), {})), None),
    "sparse": (torch.tensor(FRAME.to_numpy()).to_sparse(), None),
    "tensors": ([torch.tensor(row) for row in FRAME.to_numpy()], None),
}


@pytest.mark.parametrize("name", KINDS)
def test_arrays_of_many_kinds(name):
    given, message = KINDS[name]
    if message is None or "Error" not in message:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fit_density: column .* discrete")
            assert math.isfinite(fit(flow(), given).validation)
        want = np.asarray(given.to_dense() if name == "sparse" else given, dtype=np.float64)
        np.testing.assert_array_equal(to_tensor(given, "x", "rows").double().cpu().numpy(), want)
        return
    with pytest.raises((ValueError, TypeError)) as error:
        fit(flow(), given)
    assert re.search(message, f"{error.typename}: {error.value}")


# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["nice", "realnvp", "maf", "iaf", "nsf", "ncsf", "glow", "lu", "householder"])
def test_half_precision_is_right_or_refused(name, dtype):
    torch.manual_seed(0)
    chain = {
        "glow": lambda: pf.glow((2, 4, 4)),
        "lu": lambda: pf.LULinear(4),
        "householder": lambda: pf.transforms.Householder(4),
    }.get(name, lambda: getattr(pf, name)(4, num_layers=2))()
    flow = pf.Flow(chain).eval()
    shake(flow, 0.03)
    value = torch.randn(32, *flow.event_shape)
    half = flow.to(dtype)
    if name in ("nsf", "ncsf", "glow", "lu", "householder"):
        for call in (lambda: half.log_prob(value.to(dtype)), lambda: half.sample((3,))):
            refuses(TypeError, r"needs float32 or float64, .*flow\.float\(\).*autocast", call)
        flow.float()
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            assert flow.log_prob(value).isfinite().all()
        return
    got = half.log_prob(value.to(dtype)).double()
    want = flow.double().log_prob(value.to(dtype).double())
    assert ((got - want).abs() <= 8 * torch.finfo(dtype).eps * (4 + want.abs())).all()


def test_fits_in_half_precision_are_refused():
    refuses(ValueError, r"parameters are torch.bfloat16.*flow\.float\(\)", fit, flow().bfloat16(), torch.randn(50, 2))


def test_loader_of_pairs_for_a_mixed_model():
    loader = DataLoader(TensorDataset(survey(300), 500 + 100 * torch.randn(300, 1)), batch_size=100)
    found = fit(pf.MADE(4, mixed(), context_dim=1), loader, standardize=True)
    assert found.distribution.scale[2:].tolist() == [1, 1] and found.distribution.context_scale.item() > 50
