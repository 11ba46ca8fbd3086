"""Simple densities beside a fitted one: each against its closed form, and where there is none, why."""

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, VonMises

import pyro_flows as pf
from pyro_flows.distributions import MADE, LogisticMixtureHead, VonMisesFisher
from pyro_flows.infer.density.data import Rows
from pyro_flows.infer.density.judging import judge_rows
from pyro_flows.infer.density.references import reference_scores


def rows_of(value, context=None):
    return Rows(value, context, torch.arange(len(value)))


def scored(model, known, own):
    return reference_scores(model, rows_of(known), rows_of(own))


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_angles_have_von_mises_and_others_a_gaussian(dtype):
    torch.manual_seed(0)
    law = VonMises(torch.tensor(2.0).double(), torch.tensor(4.0).double())
    x = torch.stack((law.sample((4000,)) + 6 * torch.pi, 3 + 2 * torch.randn(4000).double()), 1)
    flow = pf.ncsf(2, periodic=torch.tensor([True, False]))
    name, found = scored(pf.Flow(flow).to(dtype), x[:3000].to(dtype), x[3000:].to(dtype))
    want = law.log_prob(x[3000:, 0]) + Normal(3.0, 2.0).log_prob(x[3000:, 1])
    assert name == "a Gaussian beside von Mises distributions"
    assert (found - want).abs().mean() < 0.05
    name, found = scored(pf.Flow(pf.ncsf(1)).to(dtype), x[:3000, :1].to(dtype), x[3000:, :1].to(dtype))
    assert name == "independent von Mises distributions"
    torch.testing.assert_close(found, law.log_prob(x[3000:, 0]), atol=0.2, rtol=0)


def test_points_on_a_sphere_have_a_von_mises_fisher():
    torch.manual_seed(0)
    law = VonMisesFisher(torch.tensor([0.0, 0.6, 0.8]), 20.0)
    x = law.sample((4000,))
    name, found = scored(pf.Flow(pf.sphere(3)), x[:3000], x[3000:])
    assert name == "a von Mises-Fisher distribution"
    assert (found - law.log_prob(x[3000:]).double()).abs().mean() < 0.05


def test_long_series_have_an_autoregression_and_large_images_independent_normals():
    torch.manual_seed(0)
    x = torch.zeros(200, 1, 300)
    x[..., 0] = torch.randn(200, 1)
    for t in range(1, 300):
        x[..., t] = 0.8 * x[..., t - 1] + 0.6 * torch.randn(200, 1)
    name, found = scored(pf.Flow(pf.causal_maf((1, 300))), x[:100], x[100:])
    exact = Normal(0.0, 1.0).log_prob(x[100:, 0, 0])
    exact = exact + Normal(0.8 * x[100:, 0, :-1], 0.6).log_prob(x[100:, 0, 1:]).sum(-1)
    assert name == "a Gaussian autoregression" and (found - exact).mean().abs() < 1.0
    images = 2 + 3 * torch.randn(200, 1, 18, 18)
    flow = pf.Flow(pf.multiscale_realnvp((1, 18, 18), num_scales=1, hidden_channels=4))
    name, found = scored(flow, images[:100], images[100:])
    want = Normal(images[:100].mean(0), images[:100].std(0)).log_prob(images[100:]).sum((1, 2, 3))
    assert name == "independent normals"
    torch.testing.assert_close(found, want.double(), rtol=1e-5, atol=1e-4)


def test_frequencies_are_probabilities():
    """Over all values they add up to one, however few the rows are."""
    torch.manual_seed(0)
    known = torch.randint(40, 200, (60, 1)).float()
    every = torch.arange(256.0).unsqueeze(1)
    made = MADE(1, LogisticMixtureHead(256), hidden_dims=())
    pixels = pf.Dequantized(pf.Chain([pf.LogitPixels(1, levels=256)]), levels=256)
    for model in (made, pixels):
        name, found = scored(model, known, every)
        assert name == "independent columns" and float(found.exp().sum()) == pytest.approx(1.0)
    name, found = scored(pf.Flow(pf.idf(2)), known.long().expand(-1, 2), known.long().expand(-1, 2))
    assert name == "independent columns" and (found < 0).all()


class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))

    def log_prob(self, value):
        return Normal(self.loc, 1.0).log_prob(value).sum(-1)


def test_modules_of_real_columns_have_a_gaussian_and_of_repeated_values_none():
    torch.manual_seed(0)
    x = torch.randn(600, 2) @ torch.tensor([[1.0, 0.0], [2.0, 0.5]])
    name, found = scored(Scores(), x[:500], x[500:])
    want = MultivariateNormal(x[:500].mean(0).double(), x[:500].double().T.cov()).log_prob(x[500:].double())
    assert name == "the Gaussian"
    torch.testing.assert_close(found, want, atol=0.1, rtol=0)
    why, found = scored(Scores(), x[:500].round(), x[500:].round())
    assert found is None and "values repeat" in why


@pytest.mark.full
def test_a_fit_that_is_worse_is_told():
    torch.manual_seed(0)
    law = VonMises(torch.tensor(0.5), torch.tensor(8.0))
    angles = law.sample((700, 2))
    fresh = pf.Flow(pf.ncsf(2)).eval()  # uniform
    found = judge_rows(fresh, angles[:200], training=angles[200:])
    assert found.label == "worse than independent columns" and "independent von Mises" in found.text
    north = VonMisesFisher(torch.tensor([0.0, 0.0, 1.0]), 20.0).sample((700,))
    found = judge_rows(pf.Flow(pf.sphere(3)).eval(), north[:200], training=north[200:])
    assert found.label == "worse than a Gaussian" and "von Mises-Fisher" in found.text
