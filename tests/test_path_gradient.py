"""The path gradient: exactly zero where guide and posterior agree, unbiased elsewhere, and less noisy on the way."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import seeded
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam

import pyro_flows as pf
from pyro_flows.distributions import Flow
from pyro_flows.infer import AutoFlow, PathELBO
from pyro_flows.infer.guides.posterior import PathPosterior, frozen
from tests.cases import BUILDERS, full_but, shake

pytestmark = pytest.mark.usefixtures("double")

DIM = 3
SMALL = partial(pf.realnvp, num_layers=2, hidden_dims=(8,))


def posterior():
    """Mean and Cholesky factor of a Gaussian far from standard."""
    return torch.tensor([5.0, -3.0, 100.0]), torch.tensor([[0.1, 0.0, 0.0], [-0.7, 1.0, 0.0], [3.0, -2.0, 20.0]])


def gaussian():
    loc, factor = posterior()
    pyro.sample("x", dist.MultivariateNormal(loc, scale_tril=factor))


def exact_guide(path_gradient=True, builder=SMALL):
    """The default's flow is the identity, and the preconditioner is set to the posterior."""
    guide = AutoFlow(gaussian, builder, start="prior", path_gradient=path_gradient, seed=0).setup()
    guide.preconditioner.place(*posterior())
    return guide


def gradients(guide, elbo, model=gaussian):
    guide.zero_grad(set_to_none=True)
    elbo.loss_and_grads(model, guide)
    return {name: p.grad.clone() for name, p in guide.named_parameters() if p.grad is not None}


def largest(grads):
    return max(g.abs().max().item() for g in grads.values())


many = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 0}
ELBOS = {
    "Trace": Trace_ELBO,
    "Trace, vectorized": partial(Trace_ELBO, **many),
    "TraceMeanField": TraceMeanField_ELBO,
    "TraceMeanField, vectorized": partial(TraceMeanField_ELBO, **many),
    "TraceGraph": TraceGraph_ELBO,
    "TraceEnum": partial(TraceEnum_ELBO, max_plate_nesting=0, strict_enumeration_warning=False),
    "TraceEnum, vectorized": partial(TraceEnum_ELBO, **many, strict_enumeration_warning=False),
    "JitTrace": partial(JitTrace_ELBO, ignore_jit_warnings=True),
    "Path": PathELBO,
}


@pytest.mark.parametrize("name", ELBOS)
def test_zero_where_guide_is_posterior(name):
    """For every draw, not in the mean; by the whole derivative it is of the order of 1."""
    grads = gradients(exact_guide(), ELBOS[name]())
    assert {n.rsplit(".", 1)[-1] for n in grads} >= {"shift", "log_diagonal", "lower", "weight"}
    assert largest(grads) < 1e-10
    if name != "Path":
        assert largest(gradients(exact_guide(path_gradient=False), ELBOS[name]())) > 0.05


@pytest.mark.parametrize("name", ["maf", "iaf", "nsf"])
def test_zero_for_other_flows(name):
    """A flow far from the identity, against its own density as the model."""
    builder = {c.name: c for c in BUILDERS}[name].build
    target = shake(builder(0), 0.1).requires_grad_(False)
    dim = target.event_shape[0]

    def model():
        pyro.sample("x", Flow(target)())

    guide = AutoFlow(model, lambda _: builder(0), start="prior", seed=0).setup()
    guide.flow.chain[0].load_state_dict(target.state_dict())
    guide.preconditioner.place(torch.zeros(dim), torch.eye(dim))
    grads = gradients(guide, Trace_ELBO(**many), model)
    assert len(grads) > 5 and largest(grads) < 1e-8


@pytest.mark.parametrize("elbo", [RenyiELBO(num_particles=3), RenyiELBO(num_particles=3, alpha=0.5)])
def test_renyi_keeps_the_whole_derivative(elbo):
    """The path gradient would be biased there: the option makes no difference."""
    found = []
    for path in (True, False):
        pyro.set_rng_seed(0)
        guide = shake(exact_guide(path), 0.1)
        found.append(gradients(guide, elbo))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-8, atol=1e-8)
    assert largest(found[0]) > 1e-3


def shifted_guide(path):
    """A Gaussian guide beside the posterior, whose ELBO has a closed form."""
    guide = exact_guide(path)
    with torch.no_grad():
        guide.preconditioner.shift.copy_(torch.tensor([0.5, -0.3, 0.2]))
        guide.preconditioner.log_diagonal.copy_(torch.tensor([0.2, -0.4, 0.1]))
        guide.preconditioner.lower[2, 0] = 0.3
    return guide


def exact_gradients(guide):
    """Of KL(q | p) by the affine parameters, from the closed form."""
    part = guide.preconditioner
    matrix, loc, _ = part._learned()
    q = torch.distributions.MultivariateNormal(loc, scale_tril=matrix)
    p = torch.distributions.MultivariateNormal(posterior()[0], scale_tril=posterior()[1])
    kl = torch.distributions.kl_divergence(q, p)
    names = ("shift", "log_diagonal", "lower")
    return dict(zip(names, torch.autograd.grad(kl, [getattr(part, n) for n in names]), strict=True))


@pytest.mark.full
@pytest.mark.parametrize("path", full_but([True, False], True))
def test_expected_gradient(path):
    """Both estimators have the gradient of the divergence as their mean."""
    guide = shifted_guide(path)
    expected = exact_gradients(guide)
    runs = 300
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
    found = [gradients(guide, elbo) for _ in range(runs)]
    for name, value in expected.items():
        each = torch.stack([g[f"flow.chain.parts.1.{name}"] for g in found])
        error = each.std(0) / math.sqrt(runs)
        assert ((each.mean(0) - value).abs() <= 5 * error + 1e-12).all(), name
        assert value.abs().max() > 0.05


@pytest.mark.full
def test_renyi_is_unbiased():
    """The gradient of the importance-weighted bound of two draws, against central differences of the bound."""
    guide = shifted_guide(True)
    runs, count, step = 400, 200, 1e-4
    elbo = RenyiELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=0)
    grads = torch.stack([gradients(guide, elbo)["flow.chain.parts.1.shift"] for _ in range(runs)])

    def bound(delta):
        with torch.no_grad():
            guide.preconditioner.shift[0] += delta
            generator = seeded(5)
            x = torch.randn(2, runs * count, DIM, generator=generator)
            z, ladj = guide.flow.chain.forward_and_ladj(x)
            log_q = guide.flow.base().log_prob(x) - ladj
            p = torch.distributions.MultivariateNormal(posterior()[0], scale_tril=posterior()[1])
            guide.preconditioner.shift[0] -= delta
            return -((p.log_prob(z) - log_q).logsumexp(0) - math.log(2)).mean()

    expected = (bound(step) - bound(-step)) / (2 * step)
    error = grads[:, 0].std() / math.sqrt(runs)
    assert abs(grads[:, 0].mean() - expected) < 5 * error + 0.01


def logistic(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=(w * x).sum(-1)), obs=y)


@pytest.mark.full
def test_less_variance_along_a_run():
    """At points of one run of SVI the path gradient's variance is the smaller one, and more so later."""
    x = torch.randn(40, 3)
    y = torch.bernoulli(torch.sigmoid(x @ torch.tensor([2.0, -1.0, 0.5])))
    guide = AutoFlow(logistic, SMALL, seed=0).setup(x, y)
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(logistic, guide, Adam({"lr": 1e-2}), elbo)

    def variance():
        found = {}
        for path in (True, False):
            guide.path_gradient = path
            runs = []
            for k in range(30):
                pyro.set_rng_seed(k)
                guide.zero_grad(set_to_none=True)
                elbo.loss_and_grads(logistic, guide, x, y)
                runs.append(torch.cat([p.grad.flatten() for p in guide.parameters()]))
            found[path] = torch.stack(runs).var(0).sum().item()
        guide.path_gradient = True
        return found[True] / found[False]

    ratios = []
    for _ in range(3):
        for _ in range(40):
            svi.step(x, y)
        ratios.append(variance())
    assert max(ratios) < 0.5 and ratios[-1] < 0.2, ratios


# The distribution itself


def test_log_density_off_the_draw():
    """Values that are not the last draw, or carry no gradient, have the whole derivative; values agree always."""
    flow = Flow([shake(pf.realnvp(DIM, num_layers=2, hidden_dims=(8,)), 0.3)])
    q = PathPosterior(flow.base(), [flow.chain])
    x = q.rsample((4,))
    expected = flow.log_prob(x)
    torch.testing.assert_close(q.log_prob(x), expected)
    for value, whole in ((x, False), (x.clone(), True), (x.detach(), True)):
        found = torch.autograd.grad(q.log_prob(value).sum(), list(flow.parameters()), retain_graph=True)
        if whole:
            reference = torch.autograd.grad(flow.log_prob(value).sum(), list(flow.parameters()), retain_graph=True)
        else:
            with frozen(flow.chain):
                through = flow.log_prob(value)
            reference = torch.autograd.grad(through.sum(), list(flow.parameters()), retain_graph=True)
        torch.testing.assert_close(found, reference)
    older, newer = q.rsample((4,)), q.rsample((4,))
    assert newer is not older
    reference = torch.autograd.grad(flow.log_prob(older).sum(), list(flow.parameters()), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(q.log_prob(older).sum(), list(flow.parameters())), reference)


def test_expands_and_keeps_its_kind():
    flow = Flow([pf.realnvp(DIM, num_layers=2, hidden_dims=(8,))])
    q = PathPosterior(flow.base(), [flow.chain]).expand((5, 2))
    assert isinstance(q, PathPosterior) and q.batch_shape == (5, 2)
    x = q.rsample()
    assert x.shape == (5, 2, DIM) and q.log_prob(x).shape == (5, 2)
    parts = q.score_parts(x)
    torch.testing.assert_close(parts.log_prob, parts.entropy_term)
    assert parts.score_function == 0

    def slope(value):
        return torch.autograd.grad(value.sum(), list(flow.parameters()), retain_graph=True, allow_unused=True)

    # Where the bound is the mean of log p - log q, both parts follow the path.
    linear = PathPosterior(flow.base(), [flow.chain], linear=True).expand((5,))
    x = linear.rsample()
    parts = linear.score_parts(x)
    torch.testing.assert_close(slope(parts.log_prob), slope(parts.entropy_term))


def test_frozen_gives_back():
    flow = pf.realnvp(DIM, num_layers=2, hidden_dims=(8,))
    before = {name: id(p) for name, p in flow.named_parameters()}
    with pytest.raises(RuntimeError, match="stop"), frozen(flow):
        assert not any(p.requires_grad for p in flow.state_dict(keep_vars=True).values())
        raise RuntimeError("stop")
    assert {name: id(p) for name, p in flow.named_parameters()} == before
    assert all(p.requires_grad for p in flow.parameters())


def test_flow_as_a_prior_keeps_its_gradient():
    """A learnt flow in the model, scored at the guide's draw, is trained by it: only the guide's own flow is held."""
    prior = shake(pf.realnvp(DIM, num_layers=2, hidden_dims=(8,)), 0.3)

    def model():
        pyro.module("prior", prior)
        x = pyro.sample("x", Flow(prior)())
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.ones(DIM))

    guide = AutoFlow(model, SMALL, start="prior", seed=0).setup()
    Trace_ELBO().loss_and_grads(model, guide)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in prior.named_parameters() if "1.bias" in n)


def test_scales_and_masks_apply():
    """Where an outer handler scales everything, the path gradient stays zero at the optimum."""
    guide = exact_guide()

    def scaled(fn):
        return poutine.scale(fn, scale=3.0)

    guide.zero_grad(set_to_none=True)
    Trace_ELBO().loss_and_grads(scaled(gaussian), scaled(guide))
    assert largest({n: p.grad for n, p in guide.named_parameters() if p.grad is not None}) < 1e-9
