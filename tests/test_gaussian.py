"""The Gaussian of data: its closed form, its shrinkage, contexts, and rows that come in pieces."""

import pytest
import torch
from asserts import refuses
from torch.distributions import MultivariateNormal

from pyro_flows.infer.density.gaussian import fit_gaussian, shrinkage
from pyro_flows.transforms import Coloring


def correlated(rows, dim=4, strength=1.0):
    torch.manual_seed(0)
    mixing = torch.eye(dim).double() + strength * torch.randn(dim, dim).double()
    return 1000 + torch.randn(rows, dim, dtype=torch.double) @ mixing.T * torch.tensor([1e-3, 1.0, 1e3, 5.0])[:dim]


def test_many_rows_give_the_sample_covariance():
    x = correlated(5000)
    expected = MultivariateNormal(x.mean(0), x.T.cov()).log_prob(x)
    torch.testing.assert_close(fit_gaussian(x).log_prob(x), expected, atol=0.05, rtol=1e-3)
    assert shrinkage(x) < 1e-3


def test_few_rows_are_shrunk_as_far_as_held_out_rows_say():
    torch.manual_seed(1)
    free, tied = torch.randn(60, 20).double(), correlated(60, 3, 4.0)
    assert shrinkage(free) > 0.5 and shrinkage(tied) < 0.05
    fresh = torch.randn(500, 20).double()
    plain = MultivariateNormal(free.mean(0), free.T.cov())
    assert fit_gaussian(free).log_prob(fresh).mean() > plain.log_prob(fresh).mean() + 2
    assert shrinkage(free[:4]) == 1.0


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_more_columns_than_rows(dtype):
    torch.manual_seed(0)
    made = fit_gaussian(torch.randn(12, 5, 8).to(dtype))
    assert made.sample((3,)).shape == (3, 5, 8) and made.sample().dtype == dtype
    assert made.log_prob(torch.randn(9, 5, 8).to(dtype)).isfinite().all()


def test_context_is_a_linear_regression():
    """The joint density is that of the context times that of the values given it."""
    x = correlated(400)
    x = (x - x.mean(0)) / x.std(0)
    context, value = x[:, :2], x[:, 2:]
    found = fit_gaussian(value, context)
    wide = torch.cat([context, torch.ones(len(x), 1).double()], 1)
    slope = torch.linalg.lstsq(wide, value).solution
    torch.testing.assert_close(found.chain.slope, slope[:2].T, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.chain.loc, slope[2], atol=1e-3, rtol=1e-3)
    joint = fit_gaussian(x).log_prob(x) - fit_gaussian(context).log_prob(context)
    torch.testing.assert_close(found.log_prob(value, context).mean(), joint.mean(), atol=1e-3, rtol=1e-3)


def test_contexts_that_determine_each_other():
    torch.manual_seed(0)
    hot = torch.nn.functional.one_hot(torch.randint(3, (200,)), 3).double()
    constant = torch.ones(200, 1).double()
    value = hot[:, :2] * 5 + 0.1 * torch.randn(200, 2).double()
    found = fit_gaussian(value, torch.cat([hot, constant], 1))
    at = torch.cat([torch.eye(3).double(), torch.ones(3, 1).double()], 1)
    mean = found.sample((2000,), at).mean(0)
    assert (mean - torch.tensor([[5.0, 0.0], [0.0, 5.0], [0.0, 0.0]])).abs().max() < 0.3


def test_coloring_refuses_what_is_no_map():
    loc, factor = torch.zeros(2), torch.eye(2)
    refuses(ValueError, r"Coloring: expected factor of shape \(2, 2\)", Coloring, loc, torch.eye(3))
    refuses(ValueError, r"got \(2, 2\) and \(3, 1\)", Coloring, loc, factor, torch.zeros(3, 1))
    refuses(ValueError, "a factor with a positive diagonal", Coloring, loc, -factor)
    refuses(ValueError, "expected finite numbers", Coloring, loc * torch.nan, factor)
