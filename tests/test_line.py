"""Distribution functions, quantiles and means of densities of one number, against quadrature and autograd."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import full_but, shake
from torch.distributions import AffineTransform, ExpTransform, SigmoidTransform

import pyro_flows as pf

SMALL = {"num_layers": 2, "hidden_dims": (5,)}

BASES = {
    "normal": lambda: pf.DiagonalNormal(1, learnable=True),
    "student": lambda: pf.StudentT(1, df=3.5, learn_affine=True),
    "mixture": lambda: pf.GaussianMixture(1, 3),
    "full": lambda: dist.MultivariateNormal(torch.ones(1), 2 * torch.eye(1)),
    "laplace": lambda: dist.Laplace(torch.zeros(1), 1.5).to_event(1),
    "uniform": lambda: dist.Uniform(torch.zeros(1) - 4, 4.0).to_event(1),
}
CHAINS = {
    "spline": lambda c: [pf.nsf(1, bins=4, context_dim=c, **SMALL)],
    "affine": lambda c: [pf.maf(1, context_dim=c, **SMALL), pf.LULinear(1)],
    "falling": lambda c: [pf.nsf(1, bins=4, context_dim=c, **SMALL), AffineTransform(1.0, -2.0)],
    "positive": lambda c: [pf.nsf(1, bins=4, context_dim=c, **SMALL), ExpTransform()],
    "inverse": lambda c: [pf.Chain([pf.nsf(1, bins=4, context_dim=c, **SMALL)]).inv, SigmoidTransform()],
}


def made(base, chain, context_dim=0):
    torch.manual_seed(0)
    return shake(pf.Flow(pf.Chain(CHAINS[chain](context_dim)), BASES[base]()), 0.3)


PAIRS = [(base, chain) for base in BASES for chain in CHAINS]
SHORT = [*((base, "spline") for base in BASES if base != "full"), *(("normal", chain) for chain in CHAINS)]


@pytest.mark.parametrize("pair", full_but(PAIRS, *SHORT), ids=str)
def test_cdf_is_the_integral_of_the_density(pair, double):
    d = made(*pair)()
    x = d.sample((7,)).requires_grad_()
    p = d.cdf(x)
    assert p.shape == (7,) and ((p > 0) & (p < 1)).all()
    (slope,) = torch.autograd.grad(p.sum(), x, create_graph=True)
    assert torch.allclose(slope[:, 0], d.log_prob(x).exp(), rtol=1e-9, atol=1e-300)
    assert torch.allclose(d.icdf(p), x, rtol=1e-8, atol=1e-8)
    # From the least value on, which the slope does not tell.
    with torch.no_grad():
        low, high = (d.icdf(torch.tensor(each)) for each in (1e-9, 1 - 1e-9))
        assert low < high and d.cdf(low).item() == pytest.approx(1e-9, rel=1e-5)
        assert 1 - d.cdf(high).item() == pytest.approx(1e-9, rel=1e-5)


@pytest.mark.parametrize("base", full_but(["normal", "student", "mixture"], "normal"))
def test_quantiles_are_differentiable(base, double):
    flow = made(base, "falling", 2)
    context = torch.randn(3, 2)
    p = torch.tensor([[0.1], [0.9]], requires_grad=True)
    parameters = list(flow.parameters())
    found = flow(context).icdf(p)
    assert found.shape == (2, 3, 1)
    grads = torch.autograd.grad(found.square().sum(), parameters)
    (own,) = torch.autograd.grad(flow(context).icdf(p).sum(), p)
    slopes = (-flow.log_prob(found, context)).exp().sum(-1, keepdim=True)
    assert torch.allclose(own, slopes, rtol=1e-7)
    for parameter, grad in zip(parameters, grads, strict=True):
        moved, index = parameter.detach(), torch.randint(parameter.numel(), ())
        ends = []
        for step in (1e-5, -1e-5):
            moved.view(-1)[index] += step
            flow.chain.clear_cache()
            with torch.no_grad():
                ends.append(flow(context).icdf(p).square().sum())
            moved.view(-1)[index] -= step
        assert grad.reshape(-1)[index].item() == pytest.approx(((ends[0] - ends[1]) / 2e-5).item(), rel=1e-4, abs=1e-6)


def test_student_against_scipy(double):
    stats = pytest.importorskip("scipy.stats")
    base = dist.StudentT(torch.tensor([1.5]), torch.tensor([0.3]), torch.tensor([2.0])).to_event(1)
    d = pf.Flow(pf.LULinear(1), base)()
    x = np.concatenate([-np.logspace(-3, 6, 30), [0.0, 0.3], np.logspace(-3, 6, 30)])
    found = d.cdf(torch.as_tensor(x).unsqueeze(-1)).detach()
    assert np.allclose(found, stats.t.cdf(x, 1.5, 0.3, 2.0), rtol=1e-11, atol=0)
    for df in (1.0, 2.0, 30.0, 1000.0):
        law = pf.Flow(pf.LULinear(1), dist.StudentT(torch.full((1,), df), torch.zeros(1), 1.0).to_event(1))()
        assert np.allclose(
            law.cdf(torch.as_tensor(x).unsqueeze(-1)).detach(), stats.t.cdf(x, df), rtol=1e-9, atol=1e-300
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shapes_dtypes_and_ends(dtype):
    flow = made("mixture", "positive", 2).to(dtype)
    context = torch.randn(4, 1, 2, dtype=dtype)
    d = flow(context)
    x = d.sample((5,))
    assert x.shape == (5, 4, 1, 1)
    p = d.cdf(x)
    assert p.shape == (5, 4, 1) and p.dtype == dtype
    assert torch.allclose(d.icdf(p), x, rtol=2e-3 if dtype == torch.float32 else 1e-8)
    assert d.icdf(0.5).shape == (4, 1, 1) and d.icdf([0.1, 0.2]).shape == (4, 2, 1)
    ends = made("normal", "spline")().icdf(torch.tensor([0.0, 1.0]))
    assert ends.tolist() == [[-math.inf], [math.inf]]
    refuses(ValueError, "probabilities from 0 to 1", d.icdf, 1.5)
    refuses(ValueError, "probabilities from 0 to 1", d.icdf, torch.tensor(math.nan))
    refuses(TypeError, "expected a tensor", d.cdf, 0.5)
    refuses(ValueError, "support", d.cdf, torch.full((4, 1, 1), -1.0, dtype=dtype))


def test_ensembles(double):
    parts = [made("normal", "spline"), made("student", "falling")]
    d = pf.distributions.Ensemble(parts)()
    x = d.sample((6,)).requires_grad_()
    p = d.cdf(x)
    assert torch.allclose(p, (parts[0]().cdf(x) + parts[1]().cdf(x)) / 2)
    (slope,) = torch.autograd.grad(p.sum(), x)
    assert torch.allclose(slope[:, 0], d.log_prob(x).exp())
    assert torch.allclose(d.icdf(p), x, rtol=1e-8, atol=1e-8)
    assert torch.allclose(d.mean, (parts[0]().mean + parts[1]().mean) / 2)


@pytest.mark.parametrize("base, chain", [("normal", "spline"), ("mixture", "positive"), ("student", "falling")])
def test_means_against_quadrature_of_quantiles(base, chain, double):
    d = made(base, chain)()
    edges = torch.logspace(-14, math.log10(0.5), 120)
    edges = torch.cat([edges, 1 - edges.flip(0)[1:]])
    nodes, weights = (torch.as_tensor(each) for each in np.polynomial.legendre.leggauss(12))
    width = edges.diff() / 2
    p = edges[:-1, None] + width[:, None] * (nodes + 1)
    expected = (d.icdf(p)[..., 0] * width[:, None] * weights).sum()
    assert d.mean.shape == (1,) and d.mean.item() == pytest.approx(expected.item(), rel=1e-4)


def test_means_of_affine_flows(double):
    torch.manual_seed(0)
    base = pf.GaussianMixture(3, 2)
    units = pf.Standardization(torch.ones(3), torch.ones(3))
    flow = shake(pf.Flow(pf.Chain([pf.LULinear(3), pf.Permutation(3), units]), base))
    matrix = torch.func.jacrev(flow.chain)(torch.zeros(3))
    mean = base().mean
    assert torch.allclose(flow().mean, matrix @ mean + flow.chain(torch.zeros(3)))
    assert made("normal", "affine", 2)(torch.randn(4, 2)).mean.shape == (4, 1)


def test_what_has_none():
    d = pf.Flow(pf.maf(2, **SMALL))()
    for call in (lambda: d.cdf(torch.zeros(2)), lambda: d.icdf(0.5), lambda: d.mean):
        refuses(NotImplementedError, r"densities of one number.*fit\.quantile", call)
    refuses(NotImplementedError, "variance has no closed form", lambda: d.variance)
    made_ = pf.MADE(1, "normal", hidden_dims=(4,))()
    refuses(NotImplementedError, r"AutoregressiveDistribution: cdf, icdf.*fit\.quantile", made_.icdf, 0.5)
    refuses(NotImplementedError, "angles, which have no least", pf.Flow(pf.ncsf(1, bins=4, **SMALL))().icdf, 0.5)
    heavy = pf.Flow(pf.nsf(1, bins=4, **SMALL), pf.StudentT(1, df=1.02))
    refuses(NotImplementedError, "tails are so heavy.*median", lambda: heavy().mean)
    von_mises = pf.Flow(pf.LULinear(1), dist.VonMises(torch.zeros(1), 1.0).to_event(1))()
    refuses(NotImplementedError, "VonMises, has no icdf", von_mises.icdf, 0.5)
