"""Forecasts of a fit: the draws of a stream, in the units of the data, for every form of the past."""

import numpy as np
import pytest
import torch
from asserts import refuses

import pyro_flows as pf
from pyro_flows.infer import Stream

pytestmark = pytest.mark.full
CAUSAL = {"num_layers": 1, "hidden_channels": 4}


def walks(rows=60, channels=2, times=6):
    torch.manual_seed(0)
    return 50 + 5 * torch.randn(rows, channels, times).cumsum(-1)


def fitted(flow, data, **options):
    return pf.fit_density(flow, data, steps=5, progress=False, **options)


@pytest.fixture(scope="module")
def fit():
    return fitted(pf.causal_maf((2, 6), **CAUSAL), walks())


@pytest.mark.parametrize("length", [1, 4, 6, 9])
def test_draws_are_those_of_a_stream(length, fit):
    past = walks(3, times=length)
    torch.manual_seed(5)
    found = fit.forecast(past, 4, num_samples=7)
    assert found.shape == (7, 3, 2, 4)
    stream = Stream(fit.distribution, (3,))
    stream.observe(past)
    torch.manual_seed(5)
    assert torch.equal(found, stream.forecast(4, 7))


def test_draws_follow_the_conditional_density(fit):
    """One step ahead: its mean score given the past, against the ratio of two densities at the same draws."""
    past = walks(1, times=4)[0]
    drawn = fit.forecast(past, 1, num_samples=2000)
    assert drawn.shape == (2000, 2, 1)
    whole = torch.cat([past.expand(2000, 2, 4), drawn, torch.zeros(2000, 2, 1)], -1)
    scores = pf.infer.step_log_prob(fit.distribution, whole)[:, 4]
    copies = fit.distribution.sample((2000,))
    assert scores.isfinite().all() and copies.shape == (2000, 2, 6)
    again = Stream(fit.distribution, (2000,))
    again.observe(past.expand(2000, 2, 4))
    assert torch.allclose(again.observe(drawn[..., 0]), scores, atol=1e-4)
    # Ranks of draws among others of the same law are uniform.
    other = fit.forecast(past, 1, num_samples=2000)
    below = torch.searchsorted(other[:, 0, 0].sort().values, drawn[:, 0, 0].contiguous()).double() / 2000
    assert abs(below.mean() - 0.5) < 0.03


def test_forms_of_the_past(fit):
    past = walks(1, times=4)[0]
    forms = [past, past.numpy(), past.double(), past.tolist()]
    pandas = pytest.importorskip("pandas")
    forms.append(pandas.DataFrame(past.T.numpy(), columns=["a", "b"]))
    draws = []
    for form in forms:
        torch.manual_seed(1)
        draws.append(fit.forecast(form, 2, num_samples=5))
    assert draws[0].shape == (5, 2, 2) and all(torch.allclose(each, draws[0]) for each in draws)
    one = fitted(pf.causal_maf((1, 6), **CAUSAL), walks(channels=1))
    vector = walks(1, 1, 4)[0, 0]
    for form in (vector, vector.tolist(), vector.numpy(), pandas.Series(vector.numpy()), vector.unsqueeze(0)):
        torch.manual_seed(1)
        assert one.forecast(form, 3, num_samples=5).shape == (5, 1, 3)


@pytest.mark.parametrize("standardize", [None, True])
def test_conv_made(standardize, tmp_path):
    model = pf.ConvMADE((2, 6), "normal", network="gru", hidden_channels=4)
    fit = fitted(model, walks() if standardize else (walks() - 50) / 10, standardize=standardize)
    fit.save(tmp_path / "fit.pt")
    for each in (fit, pf.load_density(tmp_path / "fit.pt")):
        torch.manual_seed(1)
        found = each.forecast(walks(1, times=8)[0], 3, num_samples=5)
        assert found.shape == (5, 2, 3)
    torch.manual_seed(1)
    assert torch.equal(found, fit.forecast(walks(1, times=8)[0], 3, num_samples=5))


def test_contexts():
    fit = fitted(pf.causal_maf((2, 6), context_dim=1, **CAUSAL), walks(), context=torch.randn(60, 1))
    assert fit.forecast(walks(3, times=4), 2, 5, context=np.zeros((3, 1))).shape == (5, 3, 2, 2)
    assert fit.forecast(walks(1, times=4)[0], 2, 5, context=torch.zeros(4, 1)).shape == (5, 4, 2, 2)
    refuses(ValueError, "context", fit.forecast, walks(1, times=4), 2)


def test_what_is_refused(fit):
    refuses(ValueError, r"shape \(\*batch, 2, n\), .* got Tensor of shape \(3, 4\)", fit.forecast, torch.zeros(3, 4), 2)
    refuses(ValueError, "past of series", fit.forecast, torch.zeros(2, 0), 2)
    refuses(ValueError, "past of series", fit.forecast, torch.zeros(4), 2)
    refuses(ValueError, "finite values", fit.forecast, torch.full((2, 3), torch.nan), 2)
    refuses(ValueError, "horizon to be an integer", fit.forecast, torch.zeros(2, 3), 0)
    vectors = fitted(pf.maf(2, num_layers=1, hidden_dims=(4,)), walks()[..., 0])
    refuses(ValueError, r"a fit of series \(C, T\).*events of shape \(2,\)", vectors.forecast, torch.zeros(2, 3), 2)
    blind = fitted(pf.Chain([pf.realnvp((2, 6), num_layers=1, hidden_dims=(4,))]), walks())
    refuses(ValueError, "does not go step by step", blind.forecast, torch.zeros(2, 3), 2)
    several = fitted(pf.causal_maf((2, 6), **CAUSAL), walks(), folds=2)
    refuses(ValueError, r"an ensemble; ask one of its members", several.forecast, torch.zeros(2, 3), 2)
    assert several.members[0].forecast(torch.zeros(2, 3), 2, 5).shape == (5, 2, 2)
