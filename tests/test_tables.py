"""Tables: names of columns, quantiles, intervals, scores and summaries of a fit."""

import math

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import seeded
from torch import nn

import pyro_flows as pf
from pyro_flows import plots
from pyro_flows.infer.density.data import to_tensor
from pyro_flows.infer.density.names import by_name, column_names
from pyro_flows.infer.diagnostics.summary import quantiles_of

SMALL = {"num_layers": 1, "hidden_dims": (8,)}


def fit(flow, data, *args, **options):
    return pf.fit_density(flow, data, *args, **{"progress": False, "steps": 2, **options})


def people(rows=400, dtype="float64"):
    """Height and weight, linear in the age up to normal noise."""
    z = torch.randn(rows, 3, generator=seeded(3), dtype=torch.float64).numpy()
    age = 40 + 10 * z[:, 0]
    made = {"age": age, "height": 170 + 0.2 * age + 5 * z[:, 1], "weight": 60 + 0.5 * age + 8 * z[:, 2]}
    return pd.DataFrame(made).astype(dtype)


class Polars:
    """A frame with names as strings, columns by ``[]``, and NumPy's protocol, like those that are not pandas'."""

    def __init__(self, frame):
        self.frame, self.columns, self.dtypes = frame, list(frame.columns), list(frame.dtypes)

    def __getitem__(self, names):
        return Polars(self.frame[names]) if isinstance(names, list) else self.frame[names].to_numpy()

    def to_numpy(self):
        return self.frame.to_numpy()

    def __array__(self, dtype=None, copy=None):
        return self.frame.to_numpy(dtype)

    def __len__(self):
        return len(self.frame)


@pytest.fixture(scope="module")
def table():
    return people()


@pytest.fixture(scope="module")
def conditional(table):
    return fit(pf.maf(2, context_dim=1, **SMALL), table[["height", "weight"]], context=table[["age"]], steps=1)


# Names


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_columns_are_kept_and_later_ones_put_in_order(table, conditional, kind):
    own = table if kind == "pandas" else Polars(table)
    found = conditional
    if kind == "polars":
        found = fit(pf.maf(2, context_dim=1, **SMALL), own[["height", "weight"]], context=own[["age"]], steps=1)
    assert found.columns == ("height", "weight") and found.context_columns == ("age",)
    plain = found.log_prob(table[["height", "weight"]].to_numpy(), table["age"].to_numpy())
    for data, context in (
        (own[["height", "weight"]], table["age"]),
        (own[["weight", "height"]], own[["age"]]),
        (own, own),
    ):
        torch.testing.assert_close(found.log_prob(data, context), plain, rtol=0, atol=0)
    assert isinstance(found.sample((3,), own), torch.Tensor) and found.sample((3,), own).shape == (3, 400, 2)
    refuses(
        ValueError,
        r"columns 'height', 'weight' once.*got 'height'.*'weight' is missing",
        found.log_prob,
        own[["height"]],
        own,
    )
    refuses(ValueError, r"context with each of the columns 'age'", found.sample, (2,), own[["height"]])


def test_names_of_all_kinds(table):
    assert column_names(table.to_numpy()) is None and column_names(torch.zeros(3, 2)) is None
    assert column_names(pd.DataFrame(np.zeros((3, 2)))) is None  # 0 and 1, as of an array
    assert column_names(pd.DataFrame(np.zeros((3, 2)), columns=[1990, 2000])) == ("1990", "2000")
    assert column_names(table["age"]) == ("age",) and column_names(pd.Series([1.0])) is None
    twice = pd.DataFrame(np.arange(6.0).reshape(2, 3), columns=["a", "a", "b"])
    assert by_name(twice, ("a", "a", "b"), "f", "x") is twice  # the same names in the same order
    refuses(ValueError, r"f: expected x .* 'a' is missing or repeated", by_name, twice, ("b", "a"), "f", "x")
    deep = pd.DataFrame(np.arange(4.0).reshape(2, 2), columns=pd.MultiIndex.from_tuples([("a", 1), ("a", 2)]))
    swapped = by_name(deep, column_names(deep)[::-1], "f", "x")
    assert np.array_equal(swapped.to_numpy(), deep.to_numpy()[:, ::-1])
    # A row of a frame is one context; a series is a column of its own under any name.
    row = by_name(table.iloc[0], ("weight", "age"), "f", "x")
    assert row.tolist() == [table["weight"][0], table["age"][0]]
    other = table["age"].rename("years")
    assert by_name(other, ("age",), "f", "x") is other


def test_one_context_may_be_a_row(table, conditional):
    one = conditional.quantile(0.5, table.iloc[3], num_samples=50)
    assert one.shape == (2,)
    torch.testing.assert_close(one, conditional.quantile(0.5, [table["age"][3]], num_samples=50), rtol=0, atol=0)
    assert conditional.sample((5,), table["age"]).shape == (5, 400, 2)


def test_columns_that_are_no_numbers_are_named(table):
    wrong = table.assign(city="Rome")
    refuses(TypeError, r"'city' \(.*code categories as integers", fit, pf.maf(4, **SMALL), wrong)
    refuses(TypeError, r"got a Polars with 'city' \(.*\); code categories", fit, pf.maf(4, **SMALL), Polars(wrong))


MESSAGES = {
    "constant": (lambda t: t.assign(height=1.0), "column 'height' is constant"),
    "dependent": (lambda t: t.assign(weight=2 * t["age"] + 1), "columns 'age' and 'weight' determine each other"),
    "missing": (
        lambda t: t.mask((t["age"] > 50) & (t.columns == "age")[0]),
        r"data has NaN \(missing values\) in \d+ of 400 rows \(rows .*\), in columns 'age' \(\d+\), 'height'.*dropna",
    ),
    "infinite": (
        lambda t: t.assign(age=t["age"].where(t["age"] < 60, np.inf)),
        r"has NaN, infinity .* column 'age' \(",
    ),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_errors_name_columns(table, message):
    change, expected = MESSAGES[message]
    refuses(ValueError, expected, fit, pf.maf(3, **SMALL), change(table), folds=1)


WARNINGS = {
    "spike": (lambda t: t.assign(weight=t["weight"].where(t.index % 4 > 0, 80.0)), "80 in .* of column 'weight'"),
    "discrete": (lambda t: t.assign(age=(t["age"] / 10).round()), "column 'age' is discrete"),
    "digits": (lambda t: t.assign(age=t["age"] + 2.0e9), "cannot tell apart the numbers in column 'age' of data"),
}


@pytest.mark.parametrize("warning", WARNINGS)
def test_warnings_name_columns(table, warning):
    change, expected = WARNINGS[warning]
    with pytest.warns(UserWarning, match=expected):
        fit(pf.maf(3, **SMALL), change(table), folds=1)


def test_outside_of_the_support_by_name(table):
    chain = pf.Chain([*pf.maf(3, **SMALL), torch.distributions.ExpTransform()])
    shifted = table.assign(height=table["height"] - 175)
    refuses(ValueError, r"lie outside of .*in column 'height', as torch.float32", fit, chain, shifted, folds=1)


def test_validation_by_name(table):
    data, held_out = table[:300], table[300:]
    pair = [
        fit(pf.maf(3, **SMALL), data, each).validation for each in (held_out, held_out[["weight", "age", "height"]])
    ]
    assert pair[0] == pair[1] and fit(pf.maf(3, **SMALL), data, held_out).columns == ("age", "height", "weight")


def test_folds_keep_names(table):
    found = fit(pf.maf(3, **SMALL), table, folds=2)
    assert found.columns == ("age", "height", "weight") and list(found.summary(num_samples=50).index) == list(table)
    assert found.score(table[["weight", "age", "height"]]) == found.score(table)


# Scores, quantiles, intervals


def test_quantiles_of_draws_are_draws():
    draws = torch.randn(101, 2, 3, generator=seeded(1), dtype=torch.float64)
    levels = torch.tensor([[0.0, 0.05], [0.5, 1.0]], dtype=torch.float64)
    exact = np.quantile(draws.numpy(), levels.numpy(), axis=0, method="inverted_cdf")
    assert np.array_equal(quantiles_of(draws, levels).numpy(), exact)
    whole = torch.tensor([[3], [1], [2], [2]])  # of integers, too
    assert quantiles_of(whole, torch.tensor(0.25, dtype=torch.float64)).tolist() == [1]
    for count in (10, 100, 999):  # levels as they round
        for k in range(1, 10):
            place = quantiles_of(torch.arange(count), torch.tensor(k / 10, dtype=torch.float64))
            assert int(place) == -(-k * count // 10) - 1


class Known(nn.Module):
    """A density that is known: independent normals, at a context as the mean."""

    event_shape, context_dim = torch.Size((2,)), 1

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.sd = nn.Parameter(torch.tensor([1.0, 10.0], dtype=dtype))

    def at(self, context):
        return dist.Normal(context * torch.ones_like(self.sd), self.sd).to_event(1)

    def log_prob(self, value, context):
        return self.at(context).log_prob(value)

    def sample(self, sample_shape=(), context=None):
        return self.at(context).sample(sample_shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantiles_and_intervals_of_a_known_density(dtype):
    known = Known(dtype)
    rows = torch.randn(40, 2, generator=seeded(2), dtype=torch.float64)
    found = fit(known, rows, context=torch.zeros(40, 1), steps=1, lr=1e-9)
    q = [0.05, 0.5, 0.95]
    context = np.array([[[0.0]], [[100.0]]])
    got = found.quantile(q, context)
    assert got.shape == (3, 2, 1, 2) and got.dtype == dtype
    z = torch.distributions.Normal(0, 1).icdf(torch.tensor(q, dtype=torch.float64))
    exact = torch.from_numpy(context)[None] + z[:, None, None, None] * torch.tensor([1.0, 10.0])
    # Four standard errors of a quantile of 10,000 draws, sqrt(q (1 - q) / n) / p, in standard deviations.
    error = (
        4 * torch.tensor([0.05 * 0.95, 0.25, 0.05 * 0.95]).div(1e4).sqrt() / (-0.5 * z**2).exp() * (2 * math.pi) ** 0.5
    )
    off = (got - exact).abs() / torch.tensor([1.0, 10.0])
    assert (off < error[:, None, None, None]).all()
    lower, upper = found.interval(0.9, context)
    assert torch.equal(lower, got[0]) and torch.equal(upper, got[2])
    assert torch.equal(found.quantile(q, context), got)  # seeded, and apart from the global generator
    assert not torch.equal(found.quantile(q, context, seed=1), got)
    assert found.quantile(0.5, torch.zeros(0, 1)).shape == (0, 2)
    truth = known.at(torch.zeros(1)).log_prob(rows.to(dtype)).mean().item()
    assert isinstance(found.score(rows, torch.zeros(40, 1)), float)
    assert found.score(rows, torch.zeros(40, 1)) == pytest.approx(truth, rel=1e-6)


def test_no_context_and_global_generator():
    found = fit(pf.maf(2, **SMALL), torch.randn(60, 2, generator=seeded(0)) * torch.tensor([1.0, 5.0]), folds=1)
    before = torch.get_rng_state()
    middle = found.quantile(torch.tensor(0.5))
    lower, upper = found.interval()
    assert middle.shape == lower.shape == (2,) and (lower < middle).all() and (middle < upper).all()
    assert torch.equal(torch.get_rng_state(), before)
    table = found.summary(num_samples=2000)
    assert list(table.index) == ["x[0]", "x[1]"]
    assert list(table) == ["mean", "sd", "5%", "50%", "95%", "data mean", "data sd"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.quantile(5), "expected q from 0 to 1, got 5; give 5 % as 0.05"),
        (lambda f: f.quantile(math.nan), "expected q from 0 to 1"),
        (lambda f: f.quantile([[0.1], [0.2, 0.3]]), "expected q to be numbers"),
        (lambda f: f.interval(90), "expected 0 < level < 1, got 90; give 90 % as 0.9"),
        (lambda f: f.interval(True), "expected 0 < level < 1"),
        (lambda f: f.quantile(0.5, num_samples=0), "num_samples to be an integer >= 1"),
        (lambda f: f.summary(num_samples=1), "num_samples to be an integer >= 2"),
    ],
)
def test_refusals(conditional, call, message):
    refuses((TypeError, ValueError), message, call, conditional)


def test_summary_at_contexts(table, conditional):
    both = conditional.summary(num_samples=4000)
    assert list(both.index) == ["height", "weight"]
    data = table[["height", "weight"]]
    np.testing.assert_allclose(both["data mean"], data.mean(), rtol=1e-3)
    np.testing.assert_allclose(both["data sd"], data.std(), rtol=0.02)
    # The fit is the Gaussian, so that draws at the contexts of the data have their moments.
    assert ((both["mean"] - data.mean()).abs() < 5 * data.std() / 400**0.5).all()
    np.testing.assert_allclose(both["sd"], data.std(), rtol=0.1)
    one = conditional.summary([70.0], num_samples=4000)
    assert list(one) == ["mean", "sd", "5%", "50%", "95%"]
    assert (one["sd"] < both["sd"]).all() and (one["mean"] - both["mean"] > [2, 8]).all()


def test_series_and_arrays_of_one_column(table):
    found = fit(pf.maf(1, **SMALL), table["age"], folds=1)
    assert found.columns == ("age",)
    assert found.score(table["age"]) == found.score(table[["age"]]) == found.score(table["age"].to_numpy()[:, None])
    assert to_tensor(table["age"], "f", "x").shape == (400,)


@pytest.mark.full
def test_pictures_and_verdicts_name_columns(table, conditional):
    assert conditional.verdict.checks.names == ["height", "weight"]
    fig = plots.corner(conditional, table, context=table, num_samples=400)
    assert [ax.get_xlabel() for ax in fig.axes] == ["", "height", "weight"]
    assert fig.axes[1].get_ylabel() == "weight"
    ax = plots.density(conditional, context=table.iloc[0], data=table[["weight", "height"]], points=10)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("height", "weight")
    ax = plots.samples(conditional, context=table, num_samples=400)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("height", "weight")
    assert plots.samples(table[["age", "height"]]).get_xlabel() == "age"
    judged = conditional.judge(table[["weight", "height"]].to_numpy()[:, ::-1].copy(), table["age"].to_numpy())
    assert judged.checks.names == ["height", "weight"]
    spiked = table.assign(weight=table["weight"].where(table.index % 4 > 0, 80.0))
    assert "column 'weight'" in conditional.judge(spiked, spiked).text


@pytest.mark.parametrize("folds", [1, 2])
@pytest.mark.parametrize("end", ["line", "bounds", "positive"])
def test_quantiles_of_one_number_are_exact(end, folds):
    x = torch.randn(150, 1, generator=seeded(4), dtype=torch.float64)
    y = x + 0.5 * torch.randn(150, 1, generator=seeded(5), dtype=torch.float64)
    y = {"line": y, "bounds": torch.sigmoid(y), "positive": y.exp()}[end]
    chain = pf.nsf(1, context_dim=1, **SMALL).double()
    chain = pf.Chain([*chain, torch.distributions.ExpTransform()]) if end == "positive" else chain
    bounds = {"bounds": {0: (0, 1)}}.get(end)
    found = fit(chain, y, context=x, bounds=bounds, folds=folds, steps=20)
    q = torch.tensor([[0.01, 0.5], [0.9, 0.999]], dtype=torch.float64)
    context = x[:3]
    got = found.quantile(q, context, num_samples=1)
    assert got.shape == (2, 2, 3, 1) and not got.requires_grad
    below = found.distribution(context).cdf(got)
    torch.testing.assert_close(below, q[..., None].expand(2, 2, 3), rtol=0, atol=1e-9)
    one = found.quantile(0.5, x[0])
    assert one.shape == (1,) and abs(one - got[0, 1, 0]) < 1e-9
    lower, upper = found.interval(0.5, x)
    assert 0.3 < ((y > lower) & (y < upper)).double().mean() < 0.7


def test_files_keep_names_and_bounds(tmp_path, table):
    bounds = {"height": (100, 250), "weight": (0, None)}
    for folds in (1, 2):
        found = fit(
            pf.maf(2, context_dim=1, **SMALL),
            table[["height", "weight"]],
            context=table[["age"]],
            bounds=bounds,
            folds=folds,
        )
        found.save(tmp_path / "fit.pt")
        again = pf.load_density(tmp_path / "fit.pt")
        assert again.columns == ("height", "weight") and again.context_columns == ("age",)
        assert repr(again.distribution(torch.zeros(1)).support) == "Within((100, 250), (0, inf))"
        torch.testing.assert_close(again.log_prob(table, table), found.log_prob(table, table))
        pd.testing.assert_frame_equal(again.summary(num_samples=100), found.summary(num_samples=100))
