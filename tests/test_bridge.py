"""Draws in ArviZ's shapes, with whichever ArviZ is installed, 0.x or 1.x."""

import math
import sys
import types
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from asserts import refuses
from torch.distributions import Normal

from pyro_flows.infer.bridge import to_arviz
from pyro_flows.infer.diagnostics.weights import importance

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
    import arviz

ONE = not arviz.__version__.startswith("0.")
N = 400


@pytest.fixture
def parts():
    theta = torch.randn(N, 3, dtype=torch.float64)
    y = torch.tensor([0.1, -0.2, 0.3])
    return {
        "posterior": {"mu": torch.randn(N), "theta": theta},
        "log_p": torch.randn(N) - 3,
        "log_q": torch.full((N,), -3.0, requires_grad=True),
        "posterior_predictive": {"y": theta + torch.randn(N, 3)},
        "log_likelihood": {"y": Normal(theta, 4.0).log_prob(y)},
        "observed_data": {"y": y},
        "constant_data": {"sigma": np.ones(3), "rows": torch.tensor(3)},
        "dims": {"theta": ["school"], "y": ["school"], "sigma": ["school"]},
        "coords": {"school": ["a", "b", "c"]},
        "attrs": {"verdict": "good", "ok": True, "seconds": 1.5},
    }


def test_groups_shapes_and_attributes(parts):
    data = to_arviz(**parts)
    assert type(data).__name__ == ("DataTree" if ONE else "InferenceData")
    assert set(data) == {
        "posterior",
        "sample_stats",
        "posterior_predictive",
        "log_likelihood",
        "observed_data",
        "constant_data",
    }
    assert data.posterior.sizes == {"chain": 1, "draw": N, "school": 3}
    assert data.posterior.mu.dims == ("chain", "draw")
    np.testing.assert_array_equal(data.posterior.theta.sel(school="b").values[0], parts["posterior"]["theta"][:, 1])
    assert set(data.sample_stats.data_vars) == {"lp", "log_q", "log_weight"}
    log_weights = parts["log_p"] - parts["log_q"].detach()
    np.testing.assert_array_equal(data.sample_stats.log_weight.values[0], log_weights)
    np.testing.assert_array_equal(data.observed_data.y.values, parts["observed_data"]["y"])
    assert data.constant_data.rows.item() == 3 and data.constant_data.sigma.dims == ("school",)
    expected = importance(log_weights)
    for attrs in (data.attrs, data.posterior.attrs):
        assert attrs["khat"] == expected.khat and attrs["ess"] == expected.ess
        assert attrs["verdict"] == "good" and attrs["ok"] == 1 and attrs["seconds"] == 1.5
        assert attrs["inference_library"] == "pyro_flows" and "not MCMC" in attrs["draws"]


def test_arguments_stay_as_they_are(parts):
    before = {name: dict(value) if isinstance(value, dict) else value for name, value in parts.items()}
    to_arviz(**parts)
    for name, value in before.items():
        assert parts[name].keys() == value.keys() if isinstance(value, dict) else parts[name] is value
    assert parts["dims"]["theta"] == ["school"] and parts["attrs"] == before["attrs"]


@pytest.mark.full
def test_functions_of_arviz_work(parts, tmp_path, capfd):
    data = to_arviz(**parts)
    table = arviz.summary(data, round_to="none")
    if not ONE:
        assert "minimum_shape: (chains=2" in capfd.readouterr().err  # it logs that a single chain has no r_hat
    assert list(table.index) == ["mu", "theta[a]", "theta[b]", "theta[c]"]
    theta = parts["posterior"]["theta"]
    np.testing.assert_allclose(table["mean"].values[1:], theta.mean(0), atol=1e-9)
    np.testing.assert_allclose(table["sd"].values[1:], theta.std(0), atol=1e-9)
    assert (table["ess_bulk"] > N / 2).all() and table["r_hat"].isna().all()

    loo = arviz.loo(data)
    log_likelihood = parts["log_likelihood"]["y"]
    exact = -(torch.logsumexp(-log_likelihood, 0) - math.log(N)).sum()  # the tails are light: smoothing changes little
    assert float(loo.elpd if ONE else loo.elpd_loo) == pytest.approx(float(exact), abs=1e-3)

    matplotlib.use("Agg")
    made = arviz.plot_pair(data, var_names=["mu", "theta"])
    assert (made.viz["plot"].shape == (4, 4)) if ONE else (np.shape(made) == (3, 3))  # with or without the diagonal
    matplotlib.pyplot.close("all")

    path = str(tmp_path / "guide.nc")
    data.to_netcdf(path)
    loaded = arviz.from_netcdf(path)
    assert loaded.posterior.attrs["khat"] == data.attrs["khat"]
    np.testing.assert_array_equal(loaded.posterior.theta.values, data.posterior.theta.values)
    loaded.close()


def test_draws_alone_and_weights_alone():
    data = to_arviz({"z": np.zeros((5, 2))})
    assert list(data) == ["posterior"] and "khat" not in data.attrs
    log_weights = torch.linspace(0, 1, 50)
    data = to_arviz({"z": torch.zeros(50, dtype=torch.bfloat16)}, log_weights=log_weights)
    assert list(data.sample_stats.data_vars) == ["log_weight"] and data.attrs["ess"] == importance(log_weights).ess
    data = to_arviz({"z": torch.zeros(50)}, log_p=log_weights)
    assert list(data.sample_stats.data_vars) == ["lp"] and "ess" not in data.attrs


@pytest.mark.parametrize("index", [0.2, 0.8])
def test_index_is_ours_and_not_that_of_arviz(index, monkeypatch):
    """The sign of what ArviZ's psislw takes differs between versions, so it is not to be called."""
    place = sys.modules["arviz_stats.base"].array_stats if ONE else arviz
    monkeypatch.setattr(place, "psislw", lambda *_: pytest.fail("psislw was called"))
    u = torch.rand(5000, dtype=torch.float64)
    data = to_arviz({"z": u}, log_weights=torch.log1p(torch.expm1(-index * u.log()) / index))
    assert data.attrs["khat"] == pytest.approx(index, abs=0.25)


def test_what_does_not_fit_is_named():
    for given, message in (
        ({"posterior": {}}, "at least one site"),
        ({"posterior": {"a": torch.zeros(3), "b": torch.zeros(4)}}, r"b in posterior of shape \(3, ...\).*\(4,\)"),
        ({"posterior": {"a": torch.tensor(0.0)}}, r"a in posterior.*got \(\)"),
        ({"log_weights": torch.zeros(4)}, r"log_weight in sample_stats of shape \(3, \).*\(4,\)"),
        ({"log_p": torch.zeros(3, 1)}, r"lp in sample_stats of shape \(3, \).*\(3, 1\)"),
        ({"log_likelihood": {"y": torch.zeros(2, 3)}}, r"y in log_likelihood of shape \(3, ...\)"),
    ):
        refuses(ValueError, message, to_arviz, **{"posterior": {"a": torch.zeros(3)}, **given})


def test_nothing_is_lost_or_filled_up():
    """ArviZ itself drops a variable with the name of a dimension, and pads the shorter of two with NaN."""
    draws = {"theta": torch.randn(5, 3), "school": torch.randn(5)}
    assert set(to_arviz(draws, dims={"theta": ["place"]}).posterior.data_vars) == set(draws)
    for given, message in (
        ({"posterior": draws, "dims": {"theta": ["school"]}}, "school in posterior has the name of a dimension"),
        ({"posterior": {"school": torch.zeros(5, 3)}, "dims": {"school": ["school"]}}, "school in posterior has the"),
        ({"posterior": {"draw": torch.zeros(5)}}, "draw in posterior has the name of a dimension"),
        (
            {"posterior": {"a": torch.zeros(5, 2), "b": torch.zeros(5, 3)}, "dims": {"a": ["k"], "b": ["k"]}},
            r"a in posterior has shape \(1, 5, 2\), but another.*'k'",
        ),
        (
            {
                "observed_data": {"y": torch.zeros(4)},
                "constant_data": {"x": torch.zeros(4), "w": torch.zeros(2)},
                "dims": {"y": ["row"], "x": ["row"], "w": ["row"]},
            },
            r"w in constant_data has shape \(2,\), but another.*'row'",
        ),
        ({"dims": {"a": ["k", "l"]}}, r"dims of a to name at most 1 .* \(2,\) in posterior, got \['k', 'l'\]"),
        ({"dims": {"a": ["k"]}, "coords": {"k": "xyz"}}, "conflicting sizes for dimension 'k'"),
    ):
        refuses(ValueError, message, to_arviz, **{"posterior": {"a": torch.zeros(5, 2)}, **given})


def test_names_of_scopes(tmp_path):
    """Pyro's scopes put slashes into names, which ArviZ 1.x and NetCDF files refuse."""
    z = torch.randn(5, 2)
    data = to_arviz({"net/weight": z, "net.bias": z}, dims={"net/weight": "unit"}, observed_data={"net/y": z[0]})
    assert set(data.posterior.data_vars) == {"net.weight", "net.bias"}
    assert set(data.observed_data.data_vars) == {"net.y"}
    assert data.posterior["net.weight"].dims == ("chain", "draw", "unit")
    data.to_netcdf(str(tmp_path / "scopes.nc"))
    refuses(ValueError, r"two of the names \['a/b', 'a.b'\] in posterior", to_arviz, {"a/b": z, "a.b": z})


def test_stand_in_for_version_one(parts, monkeypatch):
    """What is handed to arviz_base 1.x, where 0.x is installed."""
    calls = []

    def from_dict(
        data,
        *,
        name=None,
        sample_dims=None,
        save_warmup=None,
        index_origin=None,
        coords=None,
        dims=None,
        pred_dims=None,
        pred_coords=None,
        check_conventions=True,
        attrs=None,
    ):
        assert all(isinstance(group, dict) for group in data.values())
        assert set(attrs) <= {*data, "/"}  # 1.x warns of attributes without a group
        calls.append((data, coords, dims, attrs))
        return old

    old = to_arviz(**parts)
    module = types.ModuleType("arviz")
    module.from_dict = from_dict
    monkeypatch.setitem(sys.modules, "arviz", module)
    assert to_arviz(**parts) is old
    ((data, coords, dims, attrs),) = calls
    assert set(data) == set(old)
    for group, values in data.items():
        for name, value in values.items():
            np.testing.assert_array_equal(value, old[group][name].values)
    assert coords == parts["coords"] and dims == parts["dims"]
    assert attrs["/"] == attrs["posterior"] == old.attrs


def test_masked_entries_are_missing():
    data = np.ma.masked_array([1, 2, 3], mask=[False, True, False])
    found = to_arviz({"a": torch.zeros(4)}, observed_data={"y": data}).observed_data["y"].values
    assert np.isnan(found[1]) and found[[0, 2]].tolist() == [1.0, 3.0]
