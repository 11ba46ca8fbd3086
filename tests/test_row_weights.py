"""``fit_density(..., weights=)``: rows that count more, as if they came more often."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from asserts import refuses
from cases import full_but, seeded
from torch.utils.data import DataLoader

import pyro_flows as pf
from pyro_flows.infer.density import fit as fitting
from pyro_flows.infer.density.data import Rows, admit_rows, expected_by
from pyro_flows.infer.density.gaussian import _moments, better, coloring, fit_gaussian, shrinkage
from pyro_flows.infer.density.loop import DensityTraining
from pyro_flows.infer.density.objective import mean_score
from pyro_flows.infer.density.prepare import Survey

SMALL = {"num_layers": 1, "hidden_dims": (8,)}
COUNTS = torch.randint(0, 4, (240,), generator=seeded(7))


def rows(count=240):
    z = torch.randn(count, 2, generator=seeded(5), dtype=torch.float64)
    return torch.stack((3 + z[:, 0], -7 + 4 * (z[:, 0] + 0.3 * z[:, 0] ** 2 + z[:, 1])), 1)


def fit(data, flow=None, **options):
    torch.manual_seed(0)
    flow = pf.maf(2, **SMALL).double() if flow is None else flow
    known = {"progress": False, "folds": 1, "steps": 1, "validation_fraction": 0, "compile": False}
    return pf.fit_density(flow, data, **{**known, **options})


def repeated(data=None, counts=COUNTS):
    return (rows() if data is None else data).repeat_interleave(counts, 0)


def first_step(data, **options):
    """The score and the gradient of a first step on all rows, in units given."""
    seen = []
    taken = DensityTraining._take_step

    def watched(self, value, context, index, weight):
        if not seen:
            seen.append(self._loss_and_grads(value, context, self._shares(value, weight)))
        return taken(self, value, context, index, weight)

    DensityTraining._take_step = watched
    try:
        fit(data, batch_size=len(data) if options.get("weights") is None else int((COUNTS > 0).sum()), **options)
    finally:
        DensityTraining._take_step = taken
    return seen[0]


def test_a_step_is_that_of_repeated_rows():
    flow = pf.maf(2, **SMALL).double()
    state = {name: value.clone() for name, value in flow.state_dict().items()}
    one = first_step(rows(), weights=COUNTS, flow=flow, standardize=False)
    flow.load_state_dict(state)
    other = first_step(repeated(), flow=flow, standardize=False)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_scores_units_and_gaussian_are_those_of_repeated_rows():
    expected = expected_by(pf.Flow(pf.maf(2, **SMALL).double()))
    given, many = admit_rows(rows(), None, expected, "data", "context"), repeated()
    own = given.weighted(COUNTS, expected)
    assert len(own) == int((COUNTS > 0).sum()) and own.weight.mean().item() == pytest.approx(1)
    assert torch.equal(own.index, (COUNTS > 0).nonzero()[:, 0])
    flow = pf.maf(2, **SMALL).double()

    def score(value, context):
        return pf.Flow(flow).score(value)

    whole = admit_rows(many, None, expected, "data", "context")
    assert mean_score(score, own, 7) == pytest.approx(mean_score(score, whole), rel=1e-12)
    one, other = Survey(), Survey()
    one.add(own.value, None, own.weight)
    other.add(many)
    for a, b in zip(one.loc_and_scale(), other.loc_and_scale(), strict=True):
        # Variances differ by the number of rows less 1 alone.
        torch.testing.assert_close(a, b, rtol=1.0 / len(own), atol=0)
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(one.squares / len(own), other.squares / len(many), rtol=1e-12, atol=0)
    loc, scale, correlations = _moments(own.value, own.weight[:, None])
    exact = _moments(many, torch.ones(len(many), 1, dtype=torch.float64))
    torch.testing.assert_close((loc, correlations.tril(-1)), (exact[0], exact[2].tril(-1)), rtol=0.01, atol=1e-12)
    torch.testing.assert_close(loc, exact[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(scale, exact[1], rtol=1.0 / len(own), atol=0)
    # Folds choose the shrinkages, in which repeated rows see themselves.
    assert shrinkage(own.value, 0, own.weight) < 0.1 and shrinkage(many) < 0.1
    near = rows()[:, :1] + torch.randn(240, 1, generator=seeded(3), dtype=torch.float64)
    weighted, plain = fit_gaussian(own.value, near[own.index], own.weight), fit_gaussian(many, repeated(near))
    points = rows()[:20], near[:20]
    torch.testing.assert_close(weighted.log_prob(*points), plain.log_prob(*points), rtol=0, atol=0.2)


@pytest.mark.full
def test_equal_weights_change_nothing():
    data = rows()
    for given in (torch.full((240,), 7.0), np.full((240, 1), 0.5), pd.Series([3] * 240)):
        one, other = (fit(data, steps=20, weights=each, validation_fraction=0.2) for each in (given, None))
        assert one.history["validation"] == pytest.approx(other.history["validation"], rel=1e-12)
        torch.testing.assert_close(one.log_prob(data), other.log_prob(data), rtol=1e-9, atol=1e-9)
    gaussian = coloring(data, torch.Size((2,)))
    torch.testing.assert_close(coloring(data, torch.Size((2,)), weight=torch.ones(240)).factor, gaussian.factor)
    gains = torch.randn(400, generator=seeded(2)) + 0.3
    assert better(gains, torch.ones(400)) == better(gains)


def mixture(count):
    """Draws of a wide density, weighted to one that is known: normal about 2."""
    x = 1.5 + 1.5 * torch.randn(count, 1, generator=seeded(11), dtype=torch.float64)
    log_weight = torch.distributions.Normal(2.0, 1.0).log_prob(x) - torch.distributions.Normal(1.5, 1.5).log_prob(x)
    return x, log_weight[:, 0].exp()


@pytest.mark.parametrize("kind", full_but(["whole", "folds", "float32"], "float32"))
def test_the_density_is_that_of_the_weights(kind):
    x, weights = mixture(4000 if kind == "whole" else 900)
    flow = pf.nsf(1, **SMALL)
    flow = flow if kind == "float32" else flow.double()
    options = {"folds": 2, "validation_fraction": 0.1} if kind == "folds" else {"validation_fraction": 0.1}
    found = fit(x, flow, weights=100 * weights, steps=60, lr=1e-2, **options)
    draws = found.sample((4000,)).double()
    assert abs(draws.mean().item() - 2) < 0.2 and abs(draws.std().item() - 1) < 0.15
    # The held-out score is that of the weighted rows, minus the entropy of the known density.
    assert found.validation == pytest.approx(-0.5 * math.log(2 * math.pi * math.e), abs=0.25)
    table = found.summary(num_samples=2000)  # of rows kept in proportion to their weights
    assert abs(table["data mean"].iloc[0] - 2) < 0.25 and abs(table["data sd"].iloc[0] - 1) < 0.25
    kept = found.kept[0].trained
    assert kept.weight is None and len(kept.index.unique()) == len(kept)


def test_default_folds_take_weights(monkeypatch):
    seen = []
    monkeypatch.setattr(fitting, "_fit", lambda options, level: seen.append(options) or _stop())
    with pytest.raises(StopIteration):
        fit(rows(), weights=COUNTS, folds=None, steps=None, validation_fraction=0.1)
    data, held = seen[0]["data"], seen[0]["validation"]
    assert isinstance(data, Rows) and seen[0]["weights"] is None
    assert [each.weight.mean().item() for each in (data, held)] == pytest.approx([1, 1])
    assert not set(data.index.tolist()) & set(held.index.tolist())


def _stop():
    raise StopIteration


def test_few_effective_rows_are_told():
    weights = torch.ones(240)
    weights[:3] = 1000
    with pytest.warns(UserWarning, match="weights: the 240 rows count like 3 of equal weight"):
        fit(rows(), weights=weights)
    found = Rows(rows(), None, torch.arange(240), weight=torch.tensor([1.0, 3.0]).repeat(120))
    assert found.effective == pytest.approx(240 * 4 / 5) and found.told() == ""


WRONG = {
    "shape": (torch.ones(3), r"a weight for each of the 240 rows, got weights of shape \(3,\)"),
    "negative": (-torch.ones(240), r"got 240 that are not \(rows 0, 1, 2, 3, 4, …\)"),
    "nan": (torch.tensor([math.nan] + [1.0] * 239), r"got 1 that are not \(row 0\)"),
    "zero": (torch.zeros(240), "got only zeros"),
    "text": (np.array(["a"] * 240), "expected weights to be real numbers"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("folds", [1, 2])
def test_wrong_weights(kind, folds):
    given, message = WRONG[kind]
    refuses((TypeError, ValueError), message, fit, rows(), weights=given, folds=folds)


def test_loaders_have_samplers_instead():
    loader = DataLoader(rows(), batch_size=40)
    refuses(ValueError, "weights= needs rows in memory.*WeightedRandomSampler", fit, loader, weights=torch.ones(240))


@pytest.mark.full
def test_resumes_with_the_same_weights(tmp_path):
    path, options = tmp_path / "fit.pt", {"steps": None, "validation_fraction": 0.2, "weights": COUNTS}
    whole = fit(rows(), max_epochs=4, **options)
    fit(rows(), max_epochs=2, checkpoint=path, **options)
    again = fit(rows(), max_epochs=4, checkpoint=path, **options)
    torch.testing.assert_close(again.log_prob(rows()), whole.log_prob(rows()), rtol=0, atol=0)
    other = {**options, "weights": COUNTS + 1.0}
    refuses(ValueError, "belongs to a fit of another data", fit, rows(), max_epochs=4, checkpoint=path, **other)


def test_other_modules_take_weights():
    made = pf.MADE(2, "normal", hidden_dims=(8,), seed=0)
    x = rows() / 5
    found = fit(x.float(), made, weights=COUNTS, steps=30, standardize=True, validation_fraction=0.2)
    assert math.isfinite(found.validation)


def test_shares_of_compiled_steps():
    """A recorded step takes each row's share, so compiled ones weigh as plain ones do."""
    weight = torch.tensor([0.5, 1.5, 1.0, 1.0])
    found = Rows(torch.zeros(4, 2), None, torch.arange(4), weight=weight)
    pieces = torch.tensor([3, 1]), torch.tensor([0, 2])
    order, shares = found.listed(pieces, 2, 2)
    assert order.tolist() == [[3, 1], [0, 2]] and shares.tolist() == [[0.5, 0.75], [0.25, 0.5]]


@pytest.mark.full
def test_flow_matching_takes_weights():
    x, weights = mixture(2000)
    found = fit(x.float(), pf.cnf(1, hidden_dims=(16,)), weights=weights, steps=300, lr=1e-2, objective="flow_matching")
    draws = found.sample((2000,))
    assert abs(draws.mean().item() - 2) < 0.3 and abs(draws.std().item() - 1) < 0.3
