"""Flows inside Pyro: as distributions, priors, guides and reparameterisations, by Pyro's own machinery."""

import inspect
import math
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoNormal, AutoNormalizingFlow
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam
from pyro.optim import Adam, ClippedAdam
from torch.distributions import constraints

import pyro_flows as pf
from pyro_flows.distributions import made as heads
from pyro_flows.infer import AutoFlow
from tests.cases import CONTEXT_DIM, EACH_FLOW, full_but, guide_of, shake


def cnf(size, num_layers=None, **options):
    return pf.cnf(size, rtol=1e-5, atol=1e-5, **options)


BUILDERS = {"nice": pf.nice, "realnvp": pf.realnvp, "maf": pf.maf, "iaf": pf.iaf, "cnf": cnf}


@pytest.fixture(params=full_but(BUILDERS, "realnvp", "maf"))
def builder(request):
    return partial(BUILDERS[request.param], num_layers=2, hidden_dims=(16,))


def shaken(module, scale=0.15):
    return shake(module, scale)


def normal(dim):
    return dist.Normal(torch.zeros(dim), 1.0).to_event(1)


# Distributions.


def test_transformed_distribution(builder):
    chain = shaken(builder(3))
    whole = dist.TransformedDistribution(normal(3), [chain])
    assert (whole.batch_shape, whole.event_shape) == ((), (3,))
    sample = whole.rsample((4, 5))
    x = chain.inv(sample.clone())
    expected = normal(3).log_prob(x) - chain.forward_and_ladj(x)[1]
    torch.testing.assert_close(whole.log_prob(sample), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(pf.Flow(chain)().log_prob(sample.clone()), whole.log_prob(sample.clone()))
    assert whole.expand((2, 5)).sample((4,)).shape == (4, 2, 5, 3)
    assert whole.support.event_dim == 1


@pytest.mark.parametrize("batch", [(), (7,), (2, 7)])
def test_conditional_transformed_distribution(builder, batch):
    chain = shaken(builder(3, context_dim=2), 0.1)
    context = torch.randn(*batch, 2)
    ours = pf.Flow(chain)(context)
    theirs = dist.ConditionalTransformedDistribution(normal(3), [chain]).condition(context)
    for whole in (ours, theirs):
        assert (whole.batch_shape, whole.event_shape) == (batch, (3,))
        assert whole.sample().shape == (*batch, 3)
        assert whole.sample((5,)).shape == (5, *batch, 3)
        assert whole.log_prob(torch.randn(3)).shape == batch
    sample = theirs.rsample((5,))
    x = chain.inverse_and_ladj(sample.clone(), context)[0]
    expected = normal(3).log_prob(x) - chain.forward_and_ladj(x, context)[1]
    torch.testing.assert_close(theirs.log_prob(sample), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.log_prob(sample), expected, rtol=1e-4, atol=1e-4)


def test_each_context_has_a_density_of_its_own(builder):
    flow = pf.Flow(shaken(builder(2, context_dim=1), 0.6))
    context = torch.randn(4, 1)
    point = torch.randn(2)
    each = torch.stack([flow(c).log_prob(point) for c in context])
    torch.testing.assert_close(flow(context).log_prob(point), each, rtol=1e-4, atol=1e-5)
    assert each.std() > 1e-3


def test_empty_batches(builder):
    flow = pf.Flow(shaken(builder(3)))
    assert flow.sample((0,)).shape == (0, 3)
    assert flow.log_prob(torch.ones(0, 3)).shape == (0,)
    assert flow.rsample_and_log_prob((2, 0))[1].shape == (2, 0)
    conditional = pf.Flow(shaken(builder(3, context_dim=2)))
    assert conditional(torch.ones(0, 2)).sample((4,)).shape == (4, 0, 3)
    assert conditional(torch.ones(0, 2)).log_prob(torch.ones(3)).shape == (0,)


def test_constant_parts_beside_conditional_ones():
    chain = shaken(pf.iaf(2, context_dim=3, hidden_dims=(8,), num_layers=1))
    scale = torch.distributions.AffineTransform(torch.ones(2), 2 * torch.ones(2))
    context = torch.randn(5, 3)
    theirs = dist.ConditionalTransformedDistribution(normal(2), [chain, scale]).condition(context)
    ours = pf.Flow([chain, scale])(context)
    y = torch.randn(5, 2)
    torch.testing.assert_close(theirs.log_prob(y), ours.log_prob(y))
    assert ours.sample().shape == (5, 2)


# Priors.


def test_prior_in_plates(builder):
    flow = pf.Flow(shaken(builder(3)))

    def model():
        with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 5, dim=-1):
            return pyro.sample("x", flow())

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["x"]
    assert site["value"].shape == (4, 5, 3)
    assert site["log_prob"].shape == (4, 5)
    torch.testing.assert_close(site["log_prob"], flow.log_prob(site["value"].clone()), rtol=1e-4, atol=1e-4)


def test_expand_mask_to_event_and_support(builder):
    flow = pf.Flow(shaken(builder(3)))
    value = torch.randn(4, 3)
    expanded = flow().expand([4])
    assert expanded.batch_shape == (4,) and expanded.sample().shape == (4, 3)
    torch.testing.assert_close(expanded.log_prob(value), flow.log_prob(value))
    mask = torch.tensor([True, False, True, False])
    assert torch.equal(expanded.mask(mask).log_prob(value), flow.log_prob(value) * mask)
    joint = expanded.to_event(1)
    assert (joint.batch_shape, joint.event_shape) == ((), (4, 3))
    torch.testing.assert_close(joint.log_prob(value), flow.log_prob(value).sum())
    assert flow().support.check(value).all()
    assert not flow().support.check(value.index_fill(-1, torch.tensor([0]), math.nan)).any()
    assert isinstance(flow().has_rsample, bool) and flow().has_rsample


def test_prior_with_a_support(builder):
    chain = shaken(builder(2))
    flow = pf.Flow([*chain, torch.distributions.ExpTransform()])
    assert flow().support.event_dim == 1
    positive = flow.sample((50,))
    assert (positive > 0).all() and flow().support.check(positive).all()
    assert not flow().support.check(-positive).any()
    logs = dist.TransformedDistribution(normal(2), [chain]).log_prob(positive.log()) - positive.log().sum(-1)
    torch.testing.assert_close(flow.log_prob(positive.clone()), logs, rtol=1e-4, atol=1e-4)

    def model():
        pyro.sample("x", flow())

    guide = AutoNormal(model)
    SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step()
    assert (guide.median()["x"] > 0).all()


def flow_prior(flow):
    def model(observed=None):
        x = pyro.sample("x", flow())
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=observed)

    return model


@pytest.mark.parametrize("conditional", [False, True])
def test_potential_under_a_flow_prior(builder, conditional):
    """What HMC differentiates, against central differences."""
    flow = pf.Flow(shaken(builder(3, context_dim=2 * conditional)).double())
    context = (torch.ones(2, dtype=torch.double),) if conditional else ()

    def model():
        x = pyro.sample("x", flow(*context))
        pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=torch.tensor(1.0, dtype=torch.double))

    _, potential, _, _ = initialize_model(model)
    for scale in (0.5, 4.0):
        x = scale * torch.randn(3, dtype=torch.double)
        point = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(potential({"x": point}), point)
        steps = 1e-5 * torch.eye(3, dtype=torch.double)
        slopes = torch.stack([(potential({"x": x + h}) - potential({"x": x - h})) / 2e-5 for h in steps])
        torch.testing.assert_close(gradient, slopes.detach(), rtol=1e-5, atol=1e-5)


def test_nuts_under_a_flow_prior(builder):
    flow = pf.Flow(shaken(builder(2)))
    mcmc = MCMC(NUTS(flow_prior(flow), max_tree_depth=3), num_samples=5, warmup_steps=5, disable_progbar=True)
    mcmc.run(torch.ones(3))
    draws = mcmc.get_samples()["x"]
    assert draws.shape == (5, 2) and draws.isfinite().all()
    assert len(draws.unique(dim=0)) > 1


@pytest.mark.slow
def test_nuts_finds_the_posterior_of_a_flow_prior():
    """Its quartiles, against those of the posterior summed on a grid."""
    flow = pf.Flow(shaken(pf.maf(2, num_layers=2, hidden_dims=(16,))).double()).requires_grad_(False)
    observed = torch.ones(3, dtype=torch.double)
    mcmc = MCMC(NUTS(flow_prior(flow)), num_samples=1500, warmup_steps=200, disable_progbar=True)
    mcmc.run(observed)
    axis = torch.linspace(-5, 6, 500, dtype=torch.double)
    grid = torch.cartesian_prod(axis, axis)
    likelihood = dist.Normal(grid.sum(-1, keepdim=True), 0.5).log_prob(observed).sum(-1)
    posterior = (flow.log_prob(grid) + likelihood).softmax(0).reshape(500, 500)
    for d in range(2):
        mass = posterior.sum(1 - d).cumsum(0)
        for q in (0.25, 0.5, 0.75):
            found = mcmc.get_samples()["x"][:, d].quantile(q)
            assert abs(mass[torch.searchsorted(axis, found)] - q) < 0.06


def test_autonormal_and_predictive_over_a_flow_prior(builder):
    flow = pf.Flow(shaken(builder(2)))
    model = flow_prior(flow)
    guide = AutoNormal(model)
    svi = SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO(num_particles=4, vectorize_particles=True))
    losses = [svi.step(torch.ones(3)) for _ in range(50)]
    assert sum(losses[-10:]) < sum(losses[:10])
    drawn = Predictive(model, guide=guide, num_samples=6, parallel=False)()
    assert drawn["y"].shape == (6, 3) and drawn["y"].isfinite().all()
    prior = Predictive(model, num_samples=6)()
    assert prior["x"].reshape(-1, 2).shape == (6, 2) and prior["y"].shape == (6, 3)


# Guides.


def target():
    x = pyro.sample("x", dist.Normal(1.0, 2.0))
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.Normal(x, 0.5))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([0.5, 2.0]))


def single():
    pyro.sample("x", dist.LogNormal(1.0, 0.2))


ELBOS = {
    "Trace": Trace_ELBO(),
    "Trace, vectorised": Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1),
    "TraceMeanField": TraceMeanField_ELBO(),
    "TraceGraph": TraceGraph_ELBO(),
    "Renyi": RenyiELBO(alpha=0.5, num_particles=4),
    "Renyi, vectorised": RenyiELBO(alpha=0.5, num_particles=8, vectorize_particles=True, max_plate_nesting=1),
}


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("model", [target, single])
def test_autonormalizingflow(builder, model, elbo):
    guide = AutoNormalizingFlow(model, builder)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.01}), ELBOS[elbo])
    svi.step()
    before = {name: value.detach().clone() for name, value in guide.named_parameters()}
    for _ in range(10):
        assert math.isfinite(svi.step())
    unmoved = [name for name, value in guide.named_parameters() if torch.equal(value, before[name])]
    # A single dimension sees nothing, so its first weights rest; _prototype_tensor is Pyro's second name for one.
    resting = {"weight_0", "_prototype_tensor"} if model is single else set()
    assert {name.split(".")[-1] for name in unmoved} <= resting
    drawn = guide()
    assert all(value.isfinite().all() for value in drawn.values())


def test_discrete_sites_are_enumerated_beside_a_flow_guide(builder):
    @config_enumerate
    def model():
        centres = pyro.sample("centres", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Bernoulli(0.5)).long()
            pyro.sample("y", dist.Normal(centres[..., k], 0.5), obs=torch.tensor([-1.0, -1.2, 0.8, 1.1]))

    guide = AutoNormalizingFlow(poutine.block(model, hide=["k"]), builder)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.02}), TraceEnum_ELBO(max_plate_nesting=1))
    losses = [svi.step() for _ in range(100)]
    assert sum(losses[-20:]) < sum(losses[:20])


@pytest.mark.full
@pytest.mark.parametrize("name", full_but(["realnvp", "maf", "iaf"], "realnvp"))
def test_elbo_reaches_the_evidence(name):
    """Conjugate model whose posterior the flow can represent: the ELBO is the evidence, without variance."""
    loadings = torch.tensor([[1.0, 0.5], [-0.5, 2.0]], dtype=torch.double)
    observed = torch.tensor([0.7, -1.3], dtype=torch.double)
    zero, eye = torch.zeros(2, dtype=torch.double), torch.eye(2, dtype=torch.double)

    def model():
        z = pyro.sample("z", dist.MultivariateNormal(zero, eye))
        pyro.sample("y", dist.MultivariateNormal((loadings @ z[..., None])[..., 0], 0.5 * eye), obs=observed)

    evidence = dist.MultivariateNormal(zero, loadings @ loadings.T + 0.5 * eye).log_prob(observed)
    chain = BUILDERS[name](2, num_layers=4, hidden_dims=()).double()
    flow = pf.Flow(chain, dist.MultivariateNormal(zero, eye))
    guide = guide_of(flow)
    steps = 600
    optimizer = ClippedAdam({"lr": 0.05, "lrd": 0.001 ** (1 / steps)})
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=0))
    for _ in range(steps):
        svi.step()
    elbo = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=0)
    each = -torch.tensor([elbo.loss(model, guide) for _ in range(10)])
    assert (each - evidence).abs().max() < 0.02
    posterior = torch.linalg.inv(eye + loadings.T @ loadings / 0.5)
    draws = flow.sample((20_000,))
    torch.testing.assert_close(draws.mean(0), posterior @ loadings.T @ observed / 0.5, rtol=0, atol=0.03)
    torch.testing.assert_close(draws.T.cov(), posterior, rtol=0.1, atol=0.02)


@pytest.mark.full
@pytest.mark.parametrize("name", full_but(["realnvp", "iaf"], "iaf"))
def test_neutra(name):
    guide = AutoNormalizingFlow(target, partial(BUILDERS[name], num_layers=2, hidden_dims=(16,)))
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(target, guide, ClippedAdam({"lr": 0.02}), elbo)
    for _ in range(100):
        svi.step()
    guide.requires_grad_(False)
    neutra = NeuTraReparam(guide)
    model = neutra.reparam(target)
    start, potential, _, _ = initialize_model(model)
    (site,) = start
    u = torch.randn(3)
    # The potential is the target's, pulled back through the flow.
    ladj = guide.get_transform().forward_and_ladj(u)[1]
    values = neutra.transform_sample(u)
    log_joint = poutine.trace(poutine.condition(target, values)).get_trace().log_prob_sum()
    torch.testing.assert_close(potential({site: u}), -log_joint - ladj, rtol=1e-4, atol=1e-4)

    mcmc = MCMC(NUTS(model, max_tree_depth=4), num_samples=20, warmup_steps=60, disable_progbar=True)
    mcmc.run()
    latent = mcmc.get_samples()[site]
    back = [neutra.transform_sample(u) for u in latent]
    assert all(values["x"].isfinite() and values["z"].shape == (2,) for values in back)
    assert latent.std(0).min() > 0.05


# Registration.


@pytest.mark.parametrize("options", [{}, {"context_dim": 2}], ids=["plain", "conditional"])
def test_module_registers_every_parameter_once(builder, options):
    flow = pf.Flow(shaken(builder(3, **options)), pf.DiagonalNormal(3, learnable=True))
    pyro.module("flow", flow)
    store = pyro.get_param_store()
    named = dict(flow.named_parameters())
    assert set(store.keys()) == {f"flow$$${name}" for name in named}
    for name, parameter in named.items():
        assert store._params[f"flow$$${name}"] is parameter, f"{name} is a copy and would never train"
        assert parameter.is_contiguous()
    assert {"base.loc", "base.log_scale"} <= set(named)


@pytest.mark.parametrize("view", ["chain", "inverse", "conditioned"])
def test_views_register_the_same_parameters(builder, view):
    chain = builder(3, context_dim=2 if view == "conditioned" else 0)
    module = {
        "chain": lambda: chain,
        "inverse": lambda: chain.inv,
        "conditioned": lambda: chain.condition(torch.ones(2)),
    }
    pyro.module("flow", module[view]())
    held = {id(value) for value in pyro.get_param_store()._params.values()}
    assert held == {id(parameter) for parameter in chain.parameters()}
    assert len(pyro.get_param_store()) == len(held)


def test_svi_trains_what_was_registered(builder):
    data = 2 + 0.5 * torch.randn(200, 2)
    flow = pf.Flow(builder(2), pf.DiagonalNormal(2, learnable=True))

    def model():
        pyro.module("flow", flow)
        with pyro.plate("data", len(data)):
            pyro.sample("x", flow(), obs=data)

    svi = SVI(model, lambda: None, Adam({"lr": 0.02}), Trace_ELBO())
    before = {name: value.detach().clone() for name, value in flow.named_parameters()}
    losses = [svi.step() for _ in range(60)]
    assert losses[-1] < losses[0] - 100
    for name, value in flow.named_parameters():
        assert pyro.get_param_store()._params[f"flow$$${name}"] is value
        assert not torch.equal(value, before[name]), name
    torch.testing.assert_close(svi.evaluate_loss(), -flow.log_prob(data.clone()).sum().item(), rtol=1e-4, atol=1e-3)


@pytest.mark.full
def test_amortised_guide_in_a_subsampled_plate():
    """One conditional flow for all local latents, trained on minibatches; the exact posterior is within its family."""
    size, noise = 100, 0.5
    data = torch.randn(size, 2) + noise * torch.randn(size, 2)
    prior = normal(2)

    def model(index):
        with pyro.plate("rows", size, subsample=index):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, noise).to_event(1), obs=data[index])

    flow = pf.Flow(pf.iaf(2, context_dim=2, num_layers=1, hidden_dims=()))

    def guide(index):
        pyro.module("flow", flow)
        with pyro.plate("rows", size, subsample=index):
            pyro.sample("z", flow(data[index]))

    steps = 1000
    svi = SVI(model, guide, ClippedAdam({"lr": 0.05, "lrd": 0.0005 ** (1 / steps)}), Trace_ELBO())
    for _ in range(steps):
        svi.step(torch.randperm(size)[:20])
    evidence = dist.Normal(0.0, (1 + noise**2) ** 0.5).log_prob(data).sum().item()
    everything = torch.arange(size)
    assert abs(-svi.evaluate_loss(everything) - evidence) < 0.005 * abs(evidence)
    shrink = 1 / (1 + noise**2)
    draws = flow(data).sample((4000,))
    torch.testing.assert_close(draws.mean(0), shrink * data, rtol=0.08, atol=0.05)
    torch.testing.assert_close(draws.std(0), torch.full_like(data, noise * shrink**0.5), rtol=0.1, atol=0)


def test_amortised_guide_takes_transforms_conditioned_by_hand():
    chain = shaken(pf.iaf(2, context_dim=3, num_layers=2, hidden_dims=(8,)))
    features = torch.randn(10, 3)

    def guide(index):
        pyro.module("chain", chain)
        with pyro.plate("rows", 10, subsample=index):
            return pyro.sample("z", dist.TransformedDistribution(normal(2), [chain.condition(features[index])]))

    trace = poutine.trace(guide).get_trace(torch.tensor([1, 4, 7]))
    trace.compute_log_prob()
    assert trace.nodes["z"]["value"].shape == (3, 2)
    assert trace.nodes["z"]["log_prob"].shape == (3,)
    trace.log_prob_sum().backward()
    assert all(parameter.grad is not None for parameter in chain.parameters())


def test_constraints_of_a_flow_are_those_of_its_event():
    chain = pf.realnvp((2, 2, 3))
    assert chain.domain.event_dim == chain.codomain.event_dim == 3
    assert chain.codomain.check(torch.zeros(4, 2, 2, 3)).shape == (4,)
    assert pf.iaf(3).codomain is constraints.real_vector
    assert chain.bijective


# Properties: torch.jit, hasattr and inspection ask for each of them, and take no error but AttributeError for a no.


def properties(module):
    names = [name for name in dir(type(module)) if isinstance(inspect.getattr_static(type(module), name), property)]
    for name in names:
        try:
            getattr(module, name)
        except AttributeError:
            pass
    return names


def every_flow(case):
    for context_dim in (0, CONTEXT_DIM) if case.takes_context else (0,):
        flow = case.build(context_dim)
        yield from (flow, flow.inv, pf.Flow(flow))
        if context_dim:
            bound = flow.condition(torch.zeros(CONTEXT_DIM))
            yield from (bound, bound.inv)


@pytest.mark.parametrize("case", EACH_FLOW, ids=lambda case: case.name)
def test_properties_of_flows(case):
    for whole in every_flow(case):
        for module in whole.modules():
            properties(module)
            assert not hasattr(module, "sign")


def density_model():
    pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


OTHERS = {
    "MADE, Bernoulli": lambda: pf.MADE(3),
    "MADE, normal": lambda: pf.MADE(3, heads.NormalHead(), context_dim=2),
    "MADE, categorical": lambda: pf.MADE(3, heads.CategoricalHead(4)),
    "MADE, mixture": lambda: pf.MADE(3, heads.MixtureHead(2)),
    "MADE, mixed": lambda: pf.MADE(2, heads.MixedHead([(heads.NormalHead(), [0]), (heads.BernoulliHead(), [1])])),
    "ConvMADE": lambda: pf.ConvMADE((1, 4, 4)),
    "StudentT": lambda: pf.Flow(pf.maf(2), pf.StudentT(2)),
    "GaussianMixture": lambda: pf.Flow(pf.maf(2), pf.GaussianMixture(2, 3)),
    "Dequantized": lambda: pf.Dequantized(pf.Flow(pf.realnvp((1, 2, 2))), 256),
    "a guide without its model": lambda: AutoFlow(density_model),
    "a guide": lambda: AutoFlow(density_model, start="prior").setup(),
    "a guide from a pickle": lambda: pickle.loads(pickle.dumps(AutoFlow(density_model, start="prior").setup())),
}


@pytest.mark.parametrize("name", OTHERS)
def test_properties_of_other_modules(name):
    assert [found for module in OTHERS[name]().modules() for found in properties(module)]
