"""Objectives for guides: their expected gradients against integrals, zero gradients at the optimum, and fits."""

import copy
import gc
import itertools
import math
import weakref
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import full_but, guide_of, shake
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.testing.rejection_gamma import RejectionStandardGamma
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoNormalMessenger,
    init_to_value,
)
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam, ClippedAdam, PyroLRScheduler

import pyro_flows as pf
from pyro_flows.infer.objectives import AlphaDivergence, DReGELBO, ForwardKL, PathELBO
from pyro_flows.infer.objectives.bounds import _bound

pytestmark = pytest.mark.usefixtures("double")

PATHWISE = {
    "path": PathELBO,
    "dreg": DReGELBO,
    "alpha 0.5": partial(AlphaDivergence, 0.5),
    "alpha 2": partial(AlphaDivergence, 2.0),
    "alpha -0.5": partial(AlphaDivergence, -0.5),
}
ALPHAS = {"path": 1.0, "dreg": 0.0, "alpha 0.5": 0.5, "alpha 2": 2.0, "alpha -0.5": -0.5}


@pytest.fixture(params=PATHWISE)
def pathwise(request):
    return PATHWISE[request.param]


@pytest.fixture(params=[False, True], ids=["one by one", "vectorized"])
def vectorized(request):
    return request.param


def gradients(objective, model, guide, *args):
    """``(loss, {name: gradient})`` of one step, as SVI would see them."""
    with poutine.trace(param_only=True) as captured:
        loss = objective.loss_and_grads(model, guide, *args)
    values = {name: site["value"] for name, site in captured.trace.nodes.items()}
    leaves = {
        name: value.unconstrained() if hasattr(value, "unconstrained") else value for name, value in values.items()
    }
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in leaves.items()}
    pyro.infer.util.zero_grads(set(leaves.values()))
    return loss, found


# Expected gradients by quadrature.  The guide draws its noise from given nodes.


class NodeNormal(dist.Normal):
    """A normal whose standardised draws are given, one for each call or each entry of a batch."""

    nodes = None
    frozen = False

    def log_prob(self, value):
        loc, scale = (self.loc.detach(), self.scale.detach()) if self.frozen else (self.loc, self.scale)
        return dist.Normal(loc, scale).log_prob(value)

    def rsample(self, sample_shape=()):
        if self.batch_shape:
            noise = torch.stack([next(self.nodes) for _ in range(self.batch_shape[0])]).reshape(self.batch_shape)
        else:
            noise = next(self.nodes)
        return self.loc + self.scale * noise

    def expand(self, batch_shape, _instance=None):
        return NodeNormal(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


def normal_model():
    theta = pyro.param("theta", torch.tensor(0.3))
    z = pyro.sample("z", dist.Normal(theta, 1.0))
    pyro.sample("x", dist.Normal(z, 0.8), obs=torch.tensor(1.1))


def node_guide():
    loc, log_scale = pyro.param("loc", torch.tensor(-0.2)), pyro.param("log_scale", torch.tensor(-0.4))
    pyro.sample("z", NodeNormal(loc, log_scale.exp()))


START = {"theta": 0.3, "loc": -0.2, "log_scale": -0.4}


def hermite(count):
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


def integrated(alpha, particles, count):
    """The objective at ``START``, an integral over all particles' noise, with its gradient by autograd."""
    nodes, weights = hermite(count)
    p = {name: torch.tensor(value, requires_grad=True) for name, value in START.items()}
    z = p["loc"] + p["log_scale"].exp() * nodes
    log_w = dist.Normal(p["theta"], 1.0).log_prob(z) + dist.Normal(z, 0.8).log_prob(torch.tensor(1.1))
    log_w = log_w - dist.Normal(p["loc"], p["log_scale"].exp()).log_prob(z)
    grid = torch.cartesian_prod(*[log_w] * particles).reshape(-1, particles)
    mass = torch.cartesian_prod(*[weights] * particles).reshape(-1, particles).prod(-1)
    if alpha == 1:
        bound = grid.mean(-1)
    else:
        bound = ((grid * (1 - alpha)).logsumexp(-1) - math.log(particles)) / (1 - alpha)
    value = (mass * bound).sum()
    found = torch.autograd.grad(value, list(p.values()))
    return value.item(), dict(zip(p, found, strict=True))


def expected(objective, particles, count):
    """Expected loss and gradients of an objective, over the same nodes."""
    nodes, weights = hermite(count)
    loss, total = 0.0, {}
    for index in itertools.product(range(count), repeat=particles):
        mass = weights[list(index)].prod()
        NodeNormal.nodes = iter(nodes[list(index)])
        part, found = gradients(objective, normal_model, node_guide)
        loss += mass.item() * part
        total = {name: total.get(name, 0.0) + mass * g for name, g in found.items()}
    return loss, total


@pytest.mark.full
@pytest.mark.parametrize("name", full_but(PATHWISE, "path", "alpha 0.5"))
def test_expected_gradients_are_those_of_the_bound(name, vectorized):
    count, particles = 24, 2
    objective = PATHWISE[name](num_particles=particles, vectorize_particles=vectorized, max_plate_nesting=0)
    loss, found = expected(objective, particles, count)
    value, exact = integrated(ALPHAS[name], particles, 60)
    assert loss == pytest.approx(-value, rel=1e-5)
    for parameter, gradient in exact.items():
        assert abs(gradient) > 0.02
        torch.testing.assert_close(found[parameter], -gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_path_gradient_in_renyi_weights_is_biased(alpha, monkeypatch):
    """Freezing the guide inside RenyiELBO: exact for the model's parameter, far off for the guide's."""
    _, exact = integrated(alpha, 2, 60)
    _, total = expected(RenyiELBO(alpha=alpha, num_particles=2), 2, 24)
    monkeypatch.setattr(NodeNormal, "frozen", True)
    _, frozen = expected(RenyiELBO(alpha=alpha, num_particles=2), 2, 24)
    for name, gradient in exact.items():
        torch.testing.assert_close(total[name], -gradient, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(frozen["theta"], -exact["theta"], rtol=1e-3, atol=1e-6)
    assert abs(frozen["loc"] + exact["loc"]) > 0.2 * abs(exact["loc"])


# A regression with two coefficients, whose posterior is known.

X = torch.tensor([[1.0, -1.2], [1.0, 0.4], [1.0, 1.1], [1.0, 2.0], [1.0, -0.3]], dtype=torch.float64)
Y = torch.tensor([-0.4, 0.9, 1.2, 2.3, 0.1], dtype=torch.float64)
NOISE = 0.7
PRECISION = torch.eye(2, dtype=torch.float64) + X.T @ X / NOISE**2
COVARIANCE = PRECISION.inverse()
MEAN = COVARIANCE @ X.T @ Y / NOISE**2
EVIDENCE = dist.MultivariateNormal(torch.zeros(5).double(), X @ X.T + NOISE**2 * torch.eye(5).double()).log_prob(Y)


def regression():
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", 5):
        pyro.sample("y", dist.Normal((X * w).sum(-1), NOISE), obs=Y)


def exact_guide():
    guide = AutoMultivariateNormal(regression)
    guide()
    tril = torch.linalg.cholesky(COVARIANCE)
    guide.loc = torch.nn.Parameter(MEAN.clone())
    guide.scale = PyroParam(tril.diagonal().clone(), constraints.softplus_positive)
    guide.scale_tril = PyroParam(tril / tril.diagonal()[:, None], constraints.unit_lower_cholesky)
    return guide


@pytest.mark.parametrize("particles", [1, 4])
def test_no_gradient_at_the_posterior(pathwise, vectorized, particles):
    guide = exact_guide()
    objective = pathwise(num_particles=particles, vectorize_particles=vectorized)
    loss, found = gradients(objective, regression, guide)
    assert loss == pytest.approx(-EVIDENCE.item(), abs=1e-12)
    assert len(found) == 3
    assert max(g.abs().max() for g in found.values()) < 1e-12
    assert objective.loss(regression, guide) == pytest.approx(-EVIDENCE.item(), abs=1e-12)
    noisy = gradients(Trace_ELBO(num_particles=particles), regression, guide)[1]
    assert max(g.abs().max() for g in noisy.values()) > 0.1


@pytest.mark.parametrize("builder", [pf.realnvp, pf.maf, pf.iaf, pf.nsf], ids=lambda b: b.__name__)
@pytest.mark.parametrize("particles", [1, 5])
def test_no_gradient_where_a_flow_guide_is_the_model(builder, vectorized, particles):
    flow = pf.Flow(builder(3, num_layers=2, hidden_dims=(8,)))
    shake(flow, 0.3)
    prior = copy.deepcopy(flow)

    def model():
        pyro.sample("z", pyro.module("prior", prior)())

    guide = guide_of(flow)
    for objective in (PathELBO(particles, vectorize_particles=vectorized), DReGELBO(particles, math.inf, vectorized)):
        loss, found = gradients(objective, model, guide)
        mine = [g.abs().max() for name, g in found.items() if name.startswith("flow")]
        theirs = [g.abs().max() for name, g in found.items() if name.startswith("prior")]
        assert len(mine) == len(theirs) == len(list(flow.parameters()))
        assert abs(loss) < 1e-10 and max(mine) < 1e-10
        assert max(theirs) > 0.1


def z_scores(samples, reference, reference_error):
    samples = torch.stack(samples)
    error = (samples.var(0) / len(samples) + reference_error**2).sqrt()
    return (samples.mean(0) - reference) / error


@pytest.mark.full
@pytest.mark.parametrize("name", PATHWISE)
def test_expected_gradients_on_a_regression(name):
    """Three vectorised particles; the reference is the total derivative of the same bound, from 300,000 of them."""
    particles, alpha = 3, ALPHAS[name]
    guide = AutoMultivariateNormal(regression, init_scale=0.6)
    guide()
    with torch.no_grad():
        guide.loc += torch.tensor([0.5, -0.3])
        guide.scale_tril_unconstrained += 0.2
    leaves = dict(guide.named_parameters())

    def block():
        q = guide.get_posterior()
        z = q.rsample((1000, particles))
        log_w = -EVIDENCE.new_zeros(1000, particles) - q.log_prob(z)
        log_w = log_w + dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(z)
        log_w = log_w + dist.Normal(z @ X.T, NOISE).to_event(1).log_prob(Y)
        if alpha == 1:
            value = log_w.mean()
        else:
            value = (((1 - alpha) * log_w).logsumexp(-1) - math.log(particles)).mean() / (1 - alpha)
        return torch.cat([g.flatten() for g in torch.autograd.grad(-value, list(leaves.values()))])

    blocks = torch.stack([block() for _ in range(100)])
    objective = PATHWISE[name](num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    samples = []
    for _ in range(600):
        for leaf in leaves.values():
            leaf.grad = None
        objective.loss_and_grads(regression, guide)
        samples.append(torch.cat([leaf.grad.flatten() for leaf in leaves.values()]))
    moving = blocks.std(0) > 0  # the part of a triangle that is not used has no gradient
    assert moving.sum() == 5
    scores = z_scores(samples, blocks.mean(0), blocks.std(0) / 10)[moving]
    assert scores.abs().max() < 4
    error = (torch.stack(samples).mean(0) - blocks.mean(0)).abs().max()
    assert error < 0.1 * blocks.mean(0).abs().max()  # so that a wrong gradient would have been seen


def test_path_gradients_of_a_mean_field_guide_have_the_closed_form():
    """KL of normals, gradient in every parameter, by quadrature of the noise of one coefficient at a time."""
    guide = AutoDiagonalNormal(regression, init_scale=0.4)
    guide()
    leaves = dict(guide.named_parameters())
    q = guide.get_posterior()
    covariance = torch.diag_embed(q.base_dist.scale**2)
    exact = torch.distributions.kl_divergence(
        dist.MultivariateNormal(q.base_dist.loc, covariance), dist.MultivariateNormal(MEAN, COVARIANCE)
    )
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(exact, list(leaves.values()))])
    objective = PathELBO(64, vectorize_particles=True)
    samples = []
    for _ in range(300):
        for leaf in leaves.values():
            leaf.grad = None
        objective.loss_and_grads(regression, guide)
        samples.append(torch.cat([leaf.grad.flatten() for leaf in leaves.values()]))
    assert z_scores(samples, exact, torch.zeros(())).abs().max() < 4


def test_alpha_is_continuous():
    log_w = torch.tensor([0.3, -1.2, 2.0, -40.0])
    keep = torch.ones(4, dtype=torch.bool)
    for alpha in (0.0, 1.0, 0.5, 2.0):
        value, v, factor = _bound(log_w, keep, alpha)
        for close in (alpha - 1e-9, alpha + 1e-9):
            near = _bound(log_w, keep, close)
            torch.testing.assert_close(near[0], value, rtol=0, atol=1e-6)
            torch.testing.assert_close(near[1] * near[2], v * factor, rtol=0, atol=1e-6)
    for alpha in (0.999, 1.001, 0.9, -3.0, 5.0):
        direct = (((1 - alpha) * log_w).logsumexp(0) - math.log(4)) / (1 - alpha)
        torch.testing.assert_close(_bound(log_w, keep, alpha)[0], direct, rtol=1e-10, atol=1e-10)
    assert float(_bound(log_w.float(), keep, 1 - 1e-6)[0]) == pytest.approx(log_w.mean().item(), abs=1e-3)


def test_weights_that_are_left_out():
    log_w = torch.tensor([0.3, -math.inf, 1.0, math.nan])
    keep = log_w.isfinite()
    kept = log_w[keep]
    torch.testing.assert_close(_bound(log_w, keep, 0.0)[0], kept.logsumexp(0) - math.log(4))
    torch.testing.assert_close(_bound(log_w, keep, 1.0)[0], kept.mean())
    torch.testing.assert_close(_bound(log_w, keep, 2.0)[0], math.log(2) - (-kept).logsumexp(0))
    for alpha in (0.0, 0.9999, 1.0, 2.0):
        _, v, factor = _bound(log_w, keep, alpha)
        assert (v[~keep] == 0).all() and factor.isfinite().all()
        torch.testing.assert_close(v.sum(), torch.tensor(1.0))


# Guides of every kind.


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.tensor([0.4, -0.6]))
        self.log_scale = torch.nn.Parameter(torch.tensor([-0.5, 0.1]))

    def forward(self):
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


class Sampler(PyroModule):
    """Uses its parts more than once in a call, and each use is a param statement."""

    def __init__(self):
        super().__init__()
        self.loc = PyroParam(torch.tensor([0.4, -0.6]))
        self.scale = PyroParam(torch.tensor([-0.5, 0.1]).exp(), constraints.positive)

    def forward(self):
        return pyro.sample("w", dist.Normal(0.5 * self.loc + 0.5 * self.loc, self.scale).to_event(1))


class Holder(PyroModule):
    def __init__(self):
        super().__init__()
        self.plain = Plain()

    def forward(self):
        assert self.plain.loc is self.plain.loc
        return pyro.sample("w", self.plain())


def by_param():
    loc = pyro.param("loc", torch.tensor([0.4, -0.6]))
    scale = pyro.param("scale", torch.tensor([-0.5, 0.1]).exp(), constraint=constraints.positive)
    pyro.sample("w", dist.Normal(loc, scale).to_event(1))


def by_module():
    plain = Plain()

    def guide():
        pyro.module("plain", plain)
        pyro.sample("w", pyro.module("plain", plain)())

    return guide


GUIDES = {"param": lambda: by_param, "module": by_module, "pyro module": Sampler, "part": Holder}


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("local", [False, True], ids=["store", "local"])
def test_each_kind_of_guide_has_the_same_path_gradient(kind, local, pathwise, vectorized):
    """Against the estimator written out for this model, from the same draws."""
    particles = 3
    objective = pathwise(num_particles=particles, vectorize_particles=vectorized, max_plate_nesting=1)
    with pyro.settings.context(module_local_params=local):
        guide = GUIDES[kind]()
        pyro.set_rng_seed(4)
        _, found = gradients(objective, regression, guide)
    pyro.set_rng_seed(4)
    noise = torch.randn(particles, 2) if vectorized else torch.stack([torch.randn(2) for _ in range(particles)])
    loc, log_scale = torch.tensor([0.4, -0.6], requires_grad=True), torch.tensor([-0.5, 0.1], requires_grad=True)
    z = loc + log_scale.exp() * noise
    z.retain_grad()
    log_w = dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(z)
    log_w = log_w + dist.Normal(z @ X.T, NOISE).to_event(1).log_prob(Y)
    log_w = log_w - dist.Normal(loc.detach(), log_scale.detach().exp()).to_event(1).log_prob(z)
    alpha = getattr(objective, "alpha", {"PathELBO": 1.0, "DReGELBO": 0.0}.get(type(objective).__name__))
    v = ((1 - alpha) * log_w.detach()).softmax(0)
    ((alpha * v + (1 - alpha) * v**2) * -log_w).sum().backward()
    # Unconstrained scales are logs in every guide.
    assert len(found) == 2
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, loc.grad if name.endswith("loc") else log_scale.grad)


def test_a_guide_whose_sites_depend_on_each_other(pathwise, vectorized):
    """Each path from a weight to a parameter is weighed once, however many sites it goes through."""
    start = {"a": 0.3, "b": -0.4, "c": 0.6, "r": -0.7, "s": -0.2}

    def model():
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        v = pyro.sample("v", dist.Normal(u, 1.0))
        pyro.sample("x", dist.Normal(u * v, 1.0), obs=torch.tensor(0.7))

    def guide():
        a, b, c, r, s = (pyro.param(name, torch.tensor(value)) for name, value in start.items())
        u = pyro.sample("u", dist.Normal(a, r.exp()))
        pyro.sample("v", dist.Normal(b + c * u, s.exp()))

    particles = 4
    objective = pathwise(num_particles=particles, vectorize_particles=vectorized, max_plate_nesting=0)
    pyro.set_rng_seed(6)
    _, found = gradients(objective, model, guide)
    pyro.set_rng_seed(6)
    if vectorized:
        e, f = torch.randn(particles), torch.randn(particles)
    else:
        e, f = torch.stack([torch.stack([torch.randn(()), torch.randn(())]) for _ in range(particles)]).T
    p = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    q = {name: torch.tensor(value) for name, value in start.items()}
    u = p["a"] + p["r"].exp() * e
    v = p["b"] + p["c"] * u + p["s"].exp() * f
    log_w = dist.Normal(0.0, 1.0).log_prob(u) + dist.Normal(u, 1.0).log_prob(v)
    log_w = log_w + dist.Normal(u * v, 1.0).log_prob(torch.tensor(0.7))
    log_w = log_w - dist.Normal(q["a"], q["r"].exp()).log_prob(u)
    log_w = log_w - dist.Normal(q["b"] + q["c"] * u, q["s"].exp()).log_prob(v)
    alpha = getattr(objective, "alpha", {"PathELBO": 1.0, "DReGELBO": 0.0}.get(type(objective).__name__))
    weight = ((1 - alpha) * log_w.detach()).softmax(0)
    ((alpha * weight + (1 - alpha) * weight**2) * -log_w).sum().backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, p[name].grad)


def test_a_module_that_pyro_does_not_know_is_held_fixed_too():
    plain = Plain()

    def guide():
        pyro.sample("w", plain())

    pyro.set_rng_seed(1)
    PathELBO(4, vectorize_particles=True).loss_and_grads(regression, guide)
    held = plain.loc.grad.clone()
    pyro.set_rng_seed(1)
    _, found = gradients(PathELBO(4, vectorize_particles=True), regression, by_module())
    torch.testing.assert_close(held, found["plain$$$loc"])


AUTO = {
    "normal": AutoNormal,
    "diagonal": AutoDiagonalNormal,
    "full": AutoMultivariateNormal,
    "low rank": AutoLowRankMultivariateNormal,
    "iaf of pyro": AutoIAFNormal,
    "realnvp": lambda model: AutoNormalizingFlow(model, partial(pf.realnvp, num_layers=2)),
    "maf": lambda model: AutoNormalizingFlow(model, partial(pf.maf, num_layers=1)),
    "iaf": lambda model: AutoNormalizingFlow(model, partial(pf.iaf, num_layers=1)),
}


def hierarchy():
    """Plates, supports of several kinds, an event that is shorter when unconstrained, and a parameter."""
    shift = pyro.param("shift", torch.tensor(0.5))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    share = pyro.sample("share", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    with pyro.plate("groups", 3, dim=-2):
        effect = pyro.sample("effect", dist.Normal(shift, scale))
        with pyro.plate("members", 4, dim=-1):
            inner = pyro.sample("inner", dist.Normal(effect, 1.0))
            pyro.sample("y", dist.Normal(inner, 1.0), obs=torch.arange(12.0).reshape(3, 4) / 6)
    pyro.sample("count", dist.Multinomial(6, share), obs=torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("kind", AUTO)
def test_autoguides_of_every_kind(kind, pathwise, vectorized):
    """Losses are those of the bound at the same draws, gradients are there and finite, for all parameters."""
    guide = AUTO[kind](hierarchy)
    guide()
    if kind == "maf" and not vectorized:
        pytest.skip("slow, and nothing new")
    objective = pathwise(num_particles=2, vectorize_particles=vectorized, max_plate_nesting=2)
    pyro.set_rng_seed(2)
    first = objective.loss(hierarchy, guide)
    pyro.set_rng_seed(2)
    loss, found = gradients(objective, hierarchy, guide)
    assert loss == pytest.approx(first, rel=1e-8)
    assert found.pop("shift") != 0
    assert all(g.isfinite().all() for g in found.values())
    assert sum(g.abs().sum() > 0 for g in found.values()) >= min(2, len(found))
    pyro.set_rng_seed(2)
    differentiable = objective.differentiable_loss(hierarchy, guide)
    assert differentiable.item() == pytest.approx(loss, rel=1e-8)
    leaves = dict(guide.named_parameters())
    again = torch.autograd.grad(differentiable, list(leaves.values()), allow_unused=True)
    for (name, _), gradient in zip(leaves.items(), again, strict=True):
        if gradient is not None and any(k.endswith(name) for k in found):
            torch.testing.assert_close(gradient, next(g for k, g in found.items() if k.endswith(name)))


def test_losses_agree_with_pyro(vectorized):
    guide = exact_guide()
    with torch.no_grad():
        guide.loc += 0.5
    pairs = [
        (PathELBO(4, vectorize_particles=vectorized), Trace_ELBO(4, vectorize_particles=vectorized)),
        (DReGELBO(4, vectorize_particles=vectorized), RenyiELBO(0, 4, vectorize_particles=vectorized)),
        (AlphaDivergence(0.3, 4, vectorize_particles=vectorized), RenyiELBO(0.3, 4, vectorize_particles=vectorized)),
    ]

    def flat():  # without plates, where Pyro's weights are those of whole traces as well
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal((X * w[..., None, :]).sum(-1), NOISE).to_event(1), obs=Y)

    for ours, theirs in pairs:
        pyro.set_rng_seed(3)
        loss = ours.loss(flat, guide)
        pyro.set_rng_seed(3)
        assert loss == pytest.approx(theirs.loss(flat, guide))


# Scales, masks, subsamples, model parameters.


def counts(rows=None, weight=None, mask=None):
    """Six observations of one latent."""
    data = torch.tensor([0.3, 1.4, -0.2, 0.8, 2.0, 0.5])
    z = pyro.sample("z", dist.Normal(pyro.param("theta", torch.tensor(0.1)), 1.0))
    with pyro.plate("rows", 6, subsample=rows) as index:
        with poutine.mask(mask=torch.ones(()).bool() if mask is None else mask[index]):
            with poutine.scale(scale=weight or 1.0):
                pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])


def counts_guide(*args, **kwargs):
    loc, scale = pyro.param("loc", torch.tensor(0.2)), pyro.param("scale", torch.tensor(0.6))
    return pyro.sample("z", dist.Normal(loc, scale))


def at_seed(objective, *args):
    pyro.set_rng_seed(5)
    return gradients(objective, counts, counts_guide, *args)


def test_subsamples_are_scaled(vectorized):
    """The mean over disjoint minibatches is the gradient of all data, at the same noise."""
    objective = PathELBO(3, vectorize_particles=vectorized, max_plate_nesting=1)
    _, whole = at_seed(objective)
    parts = [at_seed(objective, torch.arange(k, k + 2)) for k in (0, 2, 4)]
    for name, gradient in whole.items():
        torch.testing.assert_close(sum(found[name] for _, found in parts) / 3, gradient)


def test_scales_and_masks(pathwise, vectorized):
    weight = 2.5
    objective = pathwise(num_particles=3, vectorize_particles=vectorized)
    mask = torch.tensor([True, False, True, True, False, True])
    loss, found = at_seed(objective, None, weight, mask)

    def reduced():
        z = pyro.sample("z", dist.Normal(pyro.param("theta", torch.tensor(0.1)), 1.0))
        log_prob = dist.Normal(z[..., None], 1.0).log_prob(torch.tensor([0.3, -0.2, 0.8, 0.5])).sum(-1)
        pyro.factor("x", weight * log_prob)

    pyro.set_rng_seed(5)
    other, by_hand = gradients(pathwise(num_particles=3, vectorize_particles=vectorized), reduced, counts_guide)
    assert loss == pytest.approx(other)
    for name in found:
        torch.testing.assert_close(found[name], by_hand[name])


def test_random_subsamples_are_shared_by_guide_and_model(vectorized):
    """A guide with local latents sees the rows that the model sees, in its second run too."""
    data = torch.arange(8.0)

    def model():
        with pyro.plate("rows", 8, subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])

    def guide():
        scale = pyro.param("scale", torch.tensor(math.sqrt(0.5)))
        with pyro.plate("rows", 8, subsample_size=3) as index:
            pyro.sample("z", dist.Normal(data[index] / 2 + pyro.param("bias", torch.tensor(0.0)), scale))

    for _ in range(3):
        _, found = gradients(PathELBO(2, vectorize_particles=vectorized), model, guide)
        assert max(g.abs() for g in found.values()) < 1e-12


def cosine(optimizer, lr, steps):
    return PyroLRScheduler(
        torch.optim.lr_scheduler.CosineAnnealingLR, {"optimizer": optimizer, "optim_args": {"lr": lr}, "T_max": steps}
    )


def fit(objective, model, guide, lr=0.05, steps=1000):
    scheduler = cosine(torch.optim.Adam, lr, steps)
    svi = SVI(model, guide, scheduler, objective)
    for _ in range(steps):
        svi.step()
        scheduler.step()
    return svi


@pytest.mark.full
@pytest.mark.parametrize("name", ["path", "dreg", "alpha 0.5", "alpha 2"])
def test_svi_reaches_the_posterior(name):
    guide = AutoMultivariateNormal(regression)
    fit(PATHWISE[name](num_particles=4, vectorize_particles=True), regression, guide)
    q = guide.get_posterior()
    torch.testing.assert_close(q.loc.detach(), MEAN, rtol=0, atol=1e-4)
    torch.testing.assert_close(q.covariance_matrix.detach(), COVARIANCE, rtol=0, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("name", ["path", "dreg", "alpha 0.5"])
def test_model_parameters_learn(name):
    """Empirical Bayes: x ~ N(m, t^2 + 1), whose likelihood has its maximum at the mean and the variance less 1."""
    data = torch.tensor([0.5, 3.0, -2.0, 4.5, 1.5])

    def model():
        m, t = pyro.param("m", torch.tensor(0.0)), pyro.param("t", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", 5):
            z = pyro.sample("z", dist.Normal(m, t))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    guide = AutoNormal(model, init_scale=0.9)
    fit(PATHWISE[name](num_particles=32, vectorize_particles=True), model, guide, steps=1000)
    assert pyro.param("m").item() == pytest.approx(data.mean().item(), abs=0.02)
    assert pyro.param("t").item() == pytest.approx((data.var(correction=0) - 1).sqrt().item(), abs=0.02)


def test_map_by_a_delta_guide():
    guide = AutoDelta(regression)
    fit(PathELBO(), regression, guide, steps=400)
    torch.testing.assert_close(guide.median()["w"], MEAN, rtol=0, atol=1e-4)


def test_a_guide_without_latents_trains_the_model(vectorized):
    def model():
        pyro.sample("x", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 1.0), obs=torch.tensor(2.0))

    loss, found = gradients(PathELBO(3, vectorize_particles=vectorized, max_plate_nesting=0), model, lambda: None)
    assert found["mean"].item() == pytest.approx(-2.0)
    assert loss == pytest.approx(2 + 0.5 * math.log(2 * math.pi))


def test_a_step_leaves_nothing_behind(pathwise, vectorized):
    """Neither hooks nor draws make a cycle that would keep the graph until the collector comes."""
    kept = []

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        kept.append(weakref.ref(w))

    guide = AutoMultivariateNormal(model)
    objective = pathwise(num_particles=2, vectorize_particles=vectorized, max_plate_nesting=0)
    gradients(objective, model, guide)
    kept.clear()
    gc.collect()
    gc.disable()
    try:
        objective.loss_and_grads(model, guide)
        assert kept and all(reference() is None for reference in kept)
    finally:
        gc.enable()


def test_a_module_interface():
    guide = exact_guide()
    objective = PathELBO(4, vectorize_particles=True)(regression, guide)
    loss = objective()
    loss.backward()
    assert loss.item() == pytest.approx(-EVIDENCE.item())
    assert all(p.grad.abs().max() < 1e-12 for p in objective.parameters())


@pytest.mark.parametrize("given", [torch.float32, torch.float64], ids=str)
def test_the_other_dtype(given, default_dtype, pathwise, vectorized):
    default_dtype(torch.float64 if given is torch.float32 else torch.float32)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=given), torch.ones((), dtype=given)).to_event(1))
        pyro.sample("x", dist.Normal(z, z.new_tensor(0.5)).to_event(1), obs=torch.ones(2, dtype=given))

    guide = AutoMultivariateNormal(model)
    guide()
    assert guide.loc.dtype is given
    objective = pathwise(num_particles=3, vectorize_particles=vectorized)
    assert objective.differentiable_loss(model, guide).dtype is given
    _, found = gradients(objective, model, guide)
    assert all(g.dtype is given and g.isfinite().all() for g in found.values())


# Particles without a weight.


def halved():
    """No density below 0.1, with the parameter inside what is not finite there."""
    rate = pyro.param("rate", torch.tensor(1.3))
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("f", rate * (z - 0.1).sqrt())


def halved_guide():
    loc, scale = pyro.param("loc", torch.tensor(0.4)), pyro.param("scale", torch.tensor(0.8))
    return pyro.sample("z", dist.Normal(loc, scale))


@pytest.mark.parametrize("name", PATHWISE)
@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_particles_without_a_weight_are_left_out_and_counted(name, vectorized):
    alpha, particles = ALPHAS[name], 6
    objective = PATHWISE[name](num_particles=particles, vectorize_particles=vectorized, max_plate_nesting=0)
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(False), pytest.warns(RuntimeWarning, match="particles have no finite weight"):
        loss, found = gradients(objective, halved, halved_guide)
    pyro.set_rng_seed(0)
    noise = torch.randn(particles) if vectorized else torch.stack([torch.randn(()) for _ in range(particles)])
    p = [torch.tensor(x, requires_grad=True) for x in (1.3, 0.4, 0.8)]
    z = p[1] + p[2] * noise
    z = z[z > 0.1]
    assert 1 < len(z) < particles and objective.num_dropped == particles - len(z) and objective.num_scored == particles
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + p[0] * (z - 0.1).sqrt()
    log_w = log_p - dist.Normal(p[1].detach(), p[2].detach()).log_prob(z)
    v = ((1 - alpha) * log_w.detach()).softmax(0)
    by_rate = torch.autograd.grad(-(v * log_w).sum(), p[0], retain_graph=True)
    by_guide = torch.autograd.grad(-((alpha * v + (1 - alpha) * v**2) * log_w).sum(), p[1:])
    for parameter, gradient in zip(("rate", "loc", "scale"), (*by_rate, *by_guide), strict=True):
        torch.testing.assert_close(found[parameter], gradient)
    if alpha == 1:
        expected_loss = -log_w.mean()
    else:
        count = particles if alpha < 1 else len(z)
        expected_loss = -(((1 - alpha) * log_w).logsumexp(0) - math.log(count)) / (1 - alpha)
    assert loss == pytest.approx(expected_loss.item())
    with pyro.validation_enabled(False):  # no second warning
        gradients(objective, halved, halved_guide)
    assert objective.num_scored == 2 * particles


@pytest.mark.filterwarnings("ignore:.*no finite weight")
@pytest.mark.parametrize("name", PATHWISE)
def test_draws_that_overflow_in_the_guide(name, vectorized):
    """exp(u) is infinite for some u, and so is its derivative; the rest of the gradient is that of the others."""

    def model():
        pyro.sample("z", dist.LogNormal(pyro.param("m", torch.tensor(0.3)), 400.0))

    guide = AutoDiagonalNormal(model, init_scale=900.0)
    with pyro.validation_enabled(False):
        guide()
        objective = PATHWISE[name](num_particles=6, vectorize_particles=vectorized, max_plate_nesting=0)
        pyro.set_rng_seed(0)
        _, found = gradients(objective, model, guide)
    assert 0 < objective.num_dropped < 6
    assert len(found) == 3 and all(g.isfinite().all() and g.abs().sum() > 0 for g in found.values())
    one_by_one = PATHWISE[name](num_particles=6, max_plate_nesting=0)
    with pyro.validation_enabled(False):
        pyro.set_rng_seed(0)
        _, others = gradients(one_by_one, model, guide)
    for parameter, gradient in others.items():
        torch.testing.assert_close(found[parameter], gradient)


@pytest.mark.filterwarnings("ignore:.*no finite weight")
def test_no_particle_with_a_weight(vectorized):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", z * math.nan)

    objective = PathELBO(3, vectorize_particles=vectorized, max_plate_nesting=0)
    with pyro.validation_enabled(False):
        svi = SVI(model, halved_guide, Adam({"lr": 0.1}), objective)
        assert math.isnan(svi.step())
    assert pyro.param("loc").item() == 0.4
    assert objective.num_dropped == 3


# Errors.


def test_sites_without_a_path_are_named(pathwise):
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(k, 1.0), obs=torch.tensor(0.3))

    def guide():
        pyro.sample("k", dist.Bernoulli(pyro.param("p", torch.tensor(0.4))))

    refuses(ValueError, r"got Bernoulli at 'k'.*TraceEnum_ELBO", pathwise(num_particles=2).loss_and_grads, model, guide)

    def rejecting():
        pyro.sample("k", RejectionStandardGamma(pyro.param("c", torch.tensor(2.0))))

    with pytest.raises(ValueError, match=r"at 'k'.*distribution with has_rsample"):
        pathwise(num_particles=2).loss_and_grads(lambda: pyro.sample("k", dist.Gamma(2.0, 1.0)), rejecting)

    def factored():
        pyro.sample("k", dist.Normal(0.0, 1.0))
        pyro.factor("f", pyro.param("c", torch.tensor(2.0)), has_rsample=False)

    with pytest.raises(ValueError, match=r"Unit at 'f'.*has_rsample=True"):
        pathwise(num_particles=2).loss_and_grads(lambda: pyro.sample("k", dist.Normal(0.0, 1.0)), factored)


def test_a_factor_in_the_guide():
    """The change of variables by hand: a guide on exp(z) is the guide on z."""

    def model():
        pyro.sample("z", dist.LogNormal(0.3, 0.7))

    def guide():
        loc, scale = pyro.param("loc", torch.tensor(0.3)), pyro.param("scale", torch.tensor(0.7))
        u = pyro.sample("u", dist.Normal(loc, scale), infer={"is_auxiliary": True})
        pyro.factor("jacobian", -u, has_rsample=True)
        pyro.sample("z", dist.Delta(u.exp()))

    loss, found = gradients(PathELBO(3), model, guide)
    assert abs(loss) < 1e-12 and max(g.abs() for g in found.values()) < 1e-12


def test_guides_that_cannot_be_run_again():
    with pytest.raises(NotImplementedError, match="AutoNormalMessenger"):
        PathELBO().loss_and_grads(regression, AutoNormalMessenger(regression))

    planar = pyro.distributions.transforms.planar(2)

    def guide():
        pyro.module("planar", planar)
        pyro.sample("w", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [planar]))

    refuses(NotImplementedError, "have an inverse", PathELBO().loss_and_grads, regression, guide)


def test_models_that_do_not_broadcast_are_named():
    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", 5):
            pyro.sample("y", dist.Normal((X * w[..., None, :]).sum(-1), NOISE), obs=Y)

    with pytest.raises(ValueError, match=r"site 'y' with at most 2 batch dimensions.*vectorize_particles=False"):
        PathELBO(3, vectorize_particles=True).loss_and_grads(model, AutoNormal(model))


def test_arguments_are_checked():
    refuses(ValueError, "PathELBO: expected num_particles to be an integer >= 1, got 0", PathELBO, 0)
    refuses(ValueError, "expected a finite alpha, got inf", AlphaDivergence, math.inf)


# Given draws.


def positive_and_shares():
    pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    pyro.sample("share", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    with pyro.plate("groups", 3):
        pyro.sample("effect", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def some_draws(count):
    with pyro.plate("count", count, dim=-2):
        trace = poutine.trace(positive_and_shares).get_trace()
    shapes = {"scale": (), "share": (3,), "effect": (3, 2)}
    return {name: trace.nodes[name]["value"].reshape(count, *shape) for name, shape in shapes.items()}


def by_hand(guide, draws):
    """log q of one row after the other, by packing and the Jacobians of the bijections."""
    log_scale = draws["scale"].log()
    stick = torch.distributions.biject_to(constraints.simplex)
    share = stick.inv(draws["share"])
    u = torch.cat([log_scale[:, None], share, draws["effect"].flatten(1)], -1)
    jacobian = log_scale + stick.log_abs_det_jacobian(share, draws["share"])
    return guide.get_posterior().log_prob(u) - jacobian


@pytest.mark.parametrize("kind", [k for k in AUTO if k != "normal"])
def test_forward_kl_scores_draws_in_constrained_space(kind, vectorized):
    guide = AUTO[kind](positive_and_shares)
    guide()
    shake(guide, 0.1)
    draws = some_draws(7)
    exact = -by_hand(guide, draws).mean()
    for batch_size in (7, 3):
        objective = ForwardKL(draws, batch_size, vectorize_particles=vectorized)
        assert objective.loss(positive_and_shares, guide) == pytest.approx(exact.item())
    loss, found = gradients(ForwardKL(draws, vectorize_particles=vectorized), positive_and_shares, guide)
    assert loss == pytest.approx(exact.item())
    leaves = {name: p for name, p in guide.named_parameters() if any(k.endswith(name) for k in found)}
    for (name, _), g in zip(leaves.items(), torch.autograd.grad(exact, list(leaves.values())), strict=True):
        torch.testing.assert_close(next(v for k, v in found.items() if k.endswith(name)), g)


def test_forward_kl_of_other_guides(vectorized):
    """An AutoNormal, a list of guides, and functions that sample the latents: all the same density."""
    draws = some_draws(6)
    names = ["scale", "share", "effect"]
    middle = torch.distributions.biject_to(constraints.simplex)(torch.zeros(2))
    start = init_to_value(values={"scale": torch.tensor(1.0), "share": middle, "effect": torch.zeros(3, 2)})
    options = {"init_loc_fn": start, "init_scale": 0.7}
    parts = AutoGuideList(positive_and_shares)
    parts.append(AutoNormal(poutine.block(positive_and_shares, expose=names[:1]), **options))
    parts.append(AutoDiagonalNormal(poutine.block(positive_and_shares, expose=names[1:]), **options))
    mean_field = AutoNormal(positive_and_shares, **options)
    reference = AutoDiagonalNormal(positive_and_shares, **options)
    reference()
    exact = -by_hand(reference, draws).mean().item()

    def free():
        pyro.sample("scale", dist.LogNormal(0.0, 0.7))
        stick = torch.distributions.biject_to(constraints.simplex)
        base = dist.Normal(torch.zeros(2), 0.7).to_event(1)
        pyro.sample("share", dist.TransformedDistribution(base, [stick]))
        with pyro.plate("groups", 3):
            pyro.sample("effect", dist.Normal(torch.zeros(2), 0.7).to_event(1))

    for guide in (parts, mean_field, reference, free):
        objective = ForwardKL(draws, 4, vectorize_particles=vectorized)
        assert objective.loss(positive_and_shares, guide) == pytest.approx(exact)


@pytest.mark.full
def test_forward_kl_reaches_the_moments_of_the_draws():
    w = dist.MultivariateNormal(MEAN, COVARIANCE).sample((300,))
    guide = AutoMultivariateNormal(regression)
    fit(ForwardKL({"w": w}, 300), regression, guide, steps=1000)
    q = guide.get_posterior()
    torch.testing.assert_close(q.loc.detach(), w.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(q.covariance_matrix.detach(), w.T.cov(correction=0), rtol=0, atol=1e-5)


def test_forward_kl_fits_a_flow_by_hand_and_leaves_the_model_alone():
    flow = pf.Flow(pf.maf(2, num_layers=2, hidden_dims=(8,)))
    b = torch.randn(200)
    draws = {"w": torch.stack([b, b**2 + 0.3 * torch.randn(200)], -1).cpu().numpy()}

    def model():
        raise AssertionError("the model is not run")

    guide = guide_of(flow, "w")
    objective = ForwardKL(draws, 64)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.02}), objective)
    before = svi.evaluate_loss()
    assert before == pytest.approx(-flow.log_prob(torch.as_tensor(draws["w"])).mean().item())
    for _ in range(150):
        svi.step()
    assert svi.evaluate_loss() < before - 1
    assert objective.num_scored == 150 * 64 and objective.num_dropped == 0


def test_forward_kl_minibatches(vectorized):
    """Each row once before any twice, the same order for the same seed, and a mean that is that of all rows."""
    data = torch.arange(10.0)
    loc = torch.tensor(0.0)

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", loc), 1.0))

    def losses(seed, steps=4):
        objective = ForwardKL({"z": data}, 5, seed=seed, vectorize_particles=vectorized)
        return [objective.loss_and_grads(None, guide) for _ in range(steps)]

    first = losses(1)
    torch.rand(3)
    assert losses(1) == first and losses(2) != first
    whole = ForwardKL({"z": data}, 5).loss(None, guide)
    assert (first[0] + first[1]) / 2 == pytest.approx(whole) and (first[2] + first[3]) / 2 == pytest.approx(whole)
    assert first[0] != first[2]


@pytest.mark.parametrize("given", [torch.float32, torch.float64], ids=str)
def test_forward_kl_follows_the_guide(given, default_dtype, vectorized):
    default_dtype(torch.float64 if given is torch.float32 else torch.float32)

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(2, dtype=given)), 1.0).to_event(1))

    for draws in (
        torch.randn(5, 2, dtype=torch.float64),
        np.ones((5, 2), dtype=np.float32),
        np.ones((5, 2), dtype=int),
    ):
        objective = ForwardKL({"z": draws}, vectorize_particles=vectorized)
        assert objective.differentiable_loss(None, guide).dtype is given


@pytest.mark.filterwarnings("ignore:Encountered")
def test_forward_kl_leaves_out_rows_without_a_density(vectorized):
    def guide():
        loc = pyro.param("loc", torch.tensor(0.5))
        u = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.factor("f", (u + loc).sqrt(), has_rsample=True)

    objective = ForwardKL({"z": torch.tensor([0.3, -2.0, 1.0])}, vectorize_particles=vectorized)
    with pyro.validation_enabled(False):
        with pytest.warns(RuntimeWarning, match="1 of 3 rows have no finite density"):
            loss, found = gradients(objective, None, guide)
        kept = gradients(ForwardKL({"z": torch.tensor([0.3, 1.0])}), None, guide)
    assert loss == pytest.approx(kept[0])
    torch.testing.assert_close(found["loc"], kept[1]["loc"])
    assert objective.num_dropped == 1


def test_forward_kl_says_what_does_not_fit():
    draws = some_draws(4)
    guide = AutoMultivariateNormal(positive_and_shares)
    cases = [
        ({"scale": draws["scale"]}, r"add \['effect', 'share'\]"),
        (draws | {"tau": draws["scale"]}, r"leave \['tau'\] out"),
        (draws | {"effect": draws["effect"][:, 0]}, r"'effect' with shape \(n, \*\(3, 2\)\), got \(4, 2\)"),
        (draws | {"scale": -draws["scale"]}, r"4 of 4 draws of 'scale' are outside of the support.*rows 0, 1, 2, 3"),
        (draws | {"scale": draws["scale"] * torch.tensor([1.0, 0, 1, 1])}, r"1 of 4 draws of 'scale'.*rows 1"),
    ]
    for given, message in cases:
        refuses(ValueError, message, ForwardKL(given).loss, positive_and_shares, guide)
    refuses(ValueError, "as many rows of draws for each site", ForwardKL, draws | {"scale": draws["scale"][:2]})
    refuses(ValueError, "draws of 'scale' are not all finite", ForwardKL, draws | {"scale": draws["scale"] * math.nan})
    refuses(ValueError, "draws of at least one site", ForwardKL, {})
    refuses(ValueError, "expected batch_size to be an integer >= 1", ForwardKL, draws, 0)
    with pytest.raises(ValueError, match="no density at 'scale', where it is a Delta"):
        ForwardKL(draws).loss(positive_and_shares, AutoDelta(positive_and_shares))

    def auxiliary():
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(u, 1.0))

    with pytest.raises(ValueError, match=r"the guide samples 'u'.*AutoContinuous"):
        ForwardKL({"z": torch.zeros(3)}).loss(None, auxiliary)
    with pytest.raises(NotImplementedError, match="AutoNormalMessenger"):
        ForwardKL({"w": torch.zeros(3, 2)}).loss(regression, AutoNormalMessenger(regression))
