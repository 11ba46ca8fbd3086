"""Queries on what a fit hands out in other units: against closed forms, and of every kind."""

import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import shake
from torch import nn

import pyro_flows as pf
from pyro_flows.distributions import MADE, MixedHead, estimate_entropy, estimate_kl
from pyro_flows.infer.density.gaussian import coloring, start_as_gaussian
from pyro_flows.infer.density.units import StandardizedDensity

UNITS = {"context_loc": None, "context_scale": None}


def in_units(made, loc, scale, **units):
    return StandardizedDensity(made, {"loc": loc, "scale": scale, **UNITS, **units}).eval()


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_answers_have_closed_forms(dtype):
    """A MADE that is a normal, in units that differ by column."""
    torch.manual_seed(0)
    x = (torch.randn(500, 3) @ torch.randn(3, 3)).to(dtype)
    loc, scale = torch.tensor([100.0, -3.0, 0.0]).to(dtype), torch.tensor([20.0, 0.1, 1.0]).to(dtype)
    made = MADE(3, "normal", hidden_dims=(8,)).to(dtype)
    model = in_units(made, loc, scale)
    y = x * scale + loc
    start_as_gaussian(model, y, None)
    density = model()
    known = coloring(y, torch.Size([3]))
    normal = dist.MultivariateNormal(known.loc, scale_tril=known.factor)
    close = {"atol": 1e-2, "rtol": 1e-3}
    torch.testing.assert_close(density.log_prob(y).double(), normal.log_prob(y.double()), **close)
    torch.testing.assert_close(density.log_prob(y), model.log_prob(y))
    pair = density.marginal((0, 1))
    some = dist.MultivariateNormal(normal.loc[:2], normal.covariance_matrix[:2, :2])
    assert pair.exact
    torch.testing.assert_close(pair.log_prob(y[:, :2]).double(), some.log_prob(y[:, :2].double()), **close)
    last = density.marginal(2)
    value, error, _ = last.estimate(y[:20, 2:])
    want = dist.Normal(normal.loc[2], normal.covariance_matrix[2, 2].sqrt()).log_prob(y[:20, 2].double())
    assert not last.exact and ((value.double() - want).abs() < 5 * error + 1e-2).all()
    rest = density.conditional(0, y[:4, :1])
    assert rest.exact and rest.sample((5,)).shape == (5, 4, 2)
    first = dist.Normal(normal.loc[0], normal.covariance_matrix[0, 0].sqrt())
    given = normal.log_prob(y[:4].double()) - first.log_prob(y[:4, 0].double())
    torch.testing.assert_close(rest.log_prob(y[:4, 1:]).double(), given, **close)
    torch.testing.assert_close(
        density.modes(num_starts=2, steps=150).points[0].double(), normal.loc, atol=0.2, rtol=1e-2
    )
    value, error, _ = estimate_entropy(model)  # a module does as well as what it hands out
    assert (value - normal.entropy()).abs() < 5 * error + 1e-2
    assert estimate_kl(model, density).value.abs() < 1e-4
    assert density.expand((2,)).sample((3,)).shape == (3, 2, 3) and density.sample().dtype == dtype


def test_draws_of_a_conditional_keep_units_and_values():
    torch.manual_seed(0)
    made = shake(MADE(3, "normal", hidden_dims=(8,), order="any"), 0.2).eval()
    model = in_units(made, torch.tensor([10.0, 20.0, 30.0]), torch.tensor([1.0, 2.0, 3.0]))
    rest = model().conditional(1, [21.0], of=[2, 0])
    inner = made().conditional(1, [0.5], of=[2, 0])
    torch.manual_seed(1)
    found = rest.sample((400,))
    torch.manual_seed(1)
    torch.testing.assert_close(found, inner.sample((400,)) * torch.tensor([3.0, 1.0]) + torch.tensor([30.0, 10.0]))
    assert rest.exact and inner.exact


def test_contexts_ensembles_and_mixed_columns():
    torch.manual_seed(0)
    head = MixedHead([("bernoulli", [0]), ("normal", [1, 2])])
    made = shake(MADE(3, head, hidden_dims=(8,), context_dim=2), 0.3).eval()
    units = {"context_loc": torch.tensor([5.0, 0.0]), "context_scale": torch.tensor([2.0, 1.0])}
    model = in_units(made, torch.tensor([0.0, 7.0, 0.0]), torch.tensor([1.0, 3.0, 0.5]), **units)
    context = torch.randn(4, 2) + 5
    density = model(context)
    assert density.batch_shape == (4,) and density.sample((2,)).shape == (2, 4, 3)
    y = density.sample()
    torch.testing.assert_close(density.log_prob(y), model.log_prob(y, context))
    chance = density.marginal(0).log_prob(torch.tensor([[0.0], [1.0]]).unsqueeze(1).expand(2, 4, 1)).exp()
    torch.testing.assert_close(chance.sum(0), torch.ones(4))
    both = pf.distributions.Ensemble([model, model])(context)
    torch.testing.assert_close(both.log_prob(y), density.log_prob(y))
    torch.testing.assert_close(both.marginal((0, 1)).log_prob(y[:, :2]), density.marginal((0, 1)).log_prob(y[:, :2]))
    refuses(ValueError, "context", model)
    refuses(NotImplementedError, "discrete", density.modes)


class Own(nn.Module):
    """Only scores and draws."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))

    def log_prob(self, value):
        return dist.Normal(self.loc, 1.0).log_prob(value).sum(-1)

    def sample(self, sample_shape=()):
        return dist.Normal(self.loc, 1.0).sample(torch.Size(sample_shape)).detach()


def test_modules_that_only_score_and_draw():
    torch.manual_seed(0)
    data = 50 + 3 * torch.randn(200, 2)
    found = pf.fit_density(Own(), data, standardize=True, steps=2, progress=False).distribution()
    assert found.event_shape == (2,) and found.sample((4,)).shape == (4, 2)
    assert (estimate_entropy(found, num_samples=500).value - 2 * (1.419 + 1.1)).abs() < 0.3
    refuses(NotImplementedError, "a Own only scores and draws", found.marginal, 0)
    refuses(NotImplementedError, "count among draws", found.modes)
    refuses(TypeError, "event_shape", pf.fit_density, Own(), data, folds=2, progress=False)


def test_entropy_of_uniform_bases():
    """The log-density of their bases is constant, and no control variate."""
    torch.manual_seed(0)
    angles = torch.tensor([True, False])
    flow = pf.Flow(pf.ncsf(2, periodic=angles)).eval()
    value, error, _ = estimate_entropy(flow)
    want = torch.tensor(2 * torch.pi).log() + dist.Normal(0.0, 1.0).entropy()
    assert (value - want).abs() < 5 * error + 1e-3
    torch.testing.assert_close(flow().base_dist.entropy(), want)
    bent = shake(pf.Flow(pf.ncsf(2, num_layers=1)), 0.1).double().eval()
    scores = bent.log_prob(bent.sample((5000,)))
    value, error, _ = estimate_entropy(bent, num_samples=5000)
    assert (value + scores.mean()).abs() < 5 * (error.square() + scores.var() / 5000).sqrt() < 0.2
