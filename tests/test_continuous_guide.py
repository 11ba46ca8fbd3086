"""Continuous flows inside Pyro: as guides of every kind, against closed forms, and what their solves see."""

import copy
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import Field, full_but, guide_of, shake
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, JitTrace_ELBO, Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam
from torch import nn

import pyro_flows as pf
from pyro_flows.infer import AutoFlow, PathELBO, fit_guide, load_guide

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
COARSE = {"hidden_dims": (16, 16), "rtol": 1e-3, "atol": 1e-3}
small = partial(pf.cnf, **COARSE)


def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(sigma)):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * effect, sigma), obs=y)


LOADINGS = torch.tensor([[1.0, 0.5], [-0.5, 2.0]], dtype=torch.double)
OBSERVED = torch.tensor([0.7, -1.3], dtype=torch.double)
EYE = torch.eye(2, dtype=torch.double)
EVIDENCE = float(
    dist.MultivariateNormal(torch.zeros_like(OBSERVED), LOADINGS @ LOADINGS.T + 0.5 * EYE).log_prob(OBSERVED)
)


def conjugate():
    z = pyro.sample("z", dist.MultivariateNormal(torch.zeros_like(OBSERVED), EYE))
    pyro.sample("y", dist.MultivariateNormal((LOADINGS @ z[..., None])[..., 0], 0.5 * EYE), obs=OBSERVED)


class Counting(nn.Module):
    """A field that knows how often it was called."""

    calls = 0

    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, t, x):
        self.calls += 1
        return torch.tanh(self.linear(x)) * torch.cos(t)


class Breaking(nn.Module):
    """A field that is not finite after some evaluations, or grows without bound."""

    def __init__(self, size, after):
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.after, self.calls = after, 0

    def forward(self, t, x):
        self.calls += 1
        if self.after is None:
            return x**2 + 0 * self.linear(x)
        return torch.tanh(self.linear(x)) * (math.nan if self.calls > self.after else 0.1)


# Evidence and gradients.


@pytest.mark.full
@pytest.mark.parametrize("field", full_but(["concatsquash", "mlp"], "concatsquash"))
def test_elbo_reaches_the_evidence_of_a_conjugate_model(field):
    flow = partial(pf.cnf, field=field, hidden_dims=(8,), gradient="backprop", rtol=1e-4, atol=1e-4)
    fit = fit_guide(AutoFlow(conjugate, flow, seed=0, num_particles=32), steps=150, progress=False)
    assert abs(fit.importance.elbo - EVIDENCE) < 2e-3
    assert abs(fit.log_evidence - EVIDENCE) < 2e-3
    assert fit.verdict.ok


def test_elbos_of_a_flow_that_is_no_fit_agree():
    """Each bound by its own mean over many particles, and the exact one of a linear field, which is a Gaussian."""
    matrix = torch.tensor([[0.2, 0.4], [-0.3, 0.1]], dtype=torch.double)

    flow = pf.Flow(pf.cnf(2, field=Field(lambda t, x, a: x @ a.T, matrix), rtol=1e-6, atol=1e-6).double())
    guide = guide_of(flow)
    root = torch.linalg.matrix_exp(matrix)
    q = dist.MultivariateNormal(torch.zeros_like(OBSERVED), root @ root.T)
    z = q.sample((200_000,))
    joint = dist.MultivariateNormal(torch.zeros_like(OBSERVED), EYE).log_prob(z)
    joint = joint + dist.MultivariateNormal(z @ LOADINGS.T, 0.5 * EYE).log_prob(OBSERVED)
    want = joint.mean() + q.entropy()
    options = {"num_particles": 4000, "vectorize_particles": True, "max_plate_nesting": 0}
    for elbo in (Trace_ELBO, TraceMeanField_ELBO, PathELBO):
        got = -elbo(**options).loss(conjugate, guide)
        assert abs(got - want) < 4 * joint.std() / 4000**0.5
    assert -RenyiELBO(alpha=0, **options).loss(conjugate, guide) == pytest.approx(EVIDENCE, abs=0.2)


def test_path_gradient_is_zero_where_guide_and_model_agree():
    flow = pf.Flow(shake(pf.cnf(2, hidden_dims=(8, 8), rtol=1e-8, atol=1e-8), 0.4).double())
    truth = copy.deepcopy(flow).requires_grad_(False)

    def model():
        pyro.sample("z", truth())

    def guide():
        pyro.sample("z", flow())

    def gradients(elbo):
        grads = torch.autograd.grad(elbo.differentiable_loss(model, guide), list(flow.parameters()))
        return torch.cat([g.flatten() for g in grads])

    options = {"num_particles": 8, "vectorize_particles": True, "max_plate_nesting": 0}
    assert gradients(PathELBO(**options)).abs().max() < 1e-6
    assert gradients(Trace_ELBO(**options)).abs().max() > 1e-2  # which holds on average alone


def test_path_gradient_of_an_autoguide_is_that_of_a_frozen_copy():
    guide = AutoFlow(conjugate, partial(pf.cnf, hidden_dims=(8,), rtol=1e-9, atol=1e-9), start="prior", seed=0).setup()
    shake(guide.flow, 0.3)
    torch.manual_seed(1)
    loss = -poutine.trace(guide).get_trace().log_prob_sum()
    got = torch.autograd.grad(loss, list(guide.flow.parameters()))
    torch.manual_seed(1)
    z = guide.flow.rsample()
    want = torch.autograd.grad(
        -copy.deepcopy(guide.flow).requires_grad_(False).log_prob(z), list(guide.flow.parameters())
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# What a step costs, and that nothing is stale.


def test_scoring_an_own_sample_solves_once():
    field = Counting(2)
    flow = pf.Flow(pf.cnf(2, field=field))
    layer = flow.chain[0]
    field.calls = 0
    trace = poutine.trace(lambda: pyro.sample("z", flow())).get_trace()
    trace.compute_log_prob()
    assert field.calls == layer.last_solve.evaluations > 0
    solve = layer.last_solve
    flow.rsample_and_log_prob((5,))
    assert field.calls == solve.evaluations + layer.last_solve.evaluations
    for path_gradient, solves in ((False, ["sampling"]), (True, ["sampling", "density"])):
        guide = AutoFlow(conjugate, partial(pf.cnf, field=Counting(2).double()), path_gradient=path_gradient)
        made, layer = [], guide.setup().flow.chain[0][0]
        plain = layer._solve
        layer._solve = lambda x, c, density, plain=plain, made=made: (
            made.append("density" if density else "sampling") or plain(x, c, density)
        )
        Trace_ELBO().loss(conjugate, guide)
        assert made == solves


@pytest.mark.parametrize("optimiser", [torch.optim.Adam, partial(torch.optim.Adam, fused=True)], ids=["adam", "fused"])
def test_nothing_is_stale_after_a_step(optimiser):
    flow = pf.Flow(shake(pf.cnf(2, hidden_dims=(8,)), 0.3))
    steps = optimiser(flow.parameters(), lr=0.1)
    distribution = flow()
    y = distribution.rsample((4,))
    before = distribution.log_prob(y)
    (-before.sum()).backward()
    steps.step()
    after = distribution.log_prob(y)
    assert torch.equal(after, distribution.log_prob(y.detach().clone()))
    assert (after - before).abs().min() > 1e-3


# Estimated divergences.


def estimating(size, **options):
    options = {"divergence": "hutchinson", "hidden_dims": (8,), "rtol": 1e-5, "atol": 1e-5, **options}
    return shake(pf.cnf(size, **options), 0.5)


def test_estimated_log_densities_are_unbiased_after_the_solve():
    for kind in ("hutchinson", "hutch++"):
        flow = estimating(3, divergence=kind, scoring="exact").double()
        y = torch.randn(3, dtype=torch.double)
        with torch.no_grad():
            many = flow.inverse_and_ladj(y.expand(2000, 3))[1]
            want = flow.eval().inverse_and_ladj(y)[1]
        assert many.std() > 1e-2
        assert abs(many.mean() - want) < 4 * many.std() / 2000**0.5


def test_what_an_elbo_sees_of_an_estimate():
    """Fresh noise in each pass of training; one's own sample has that of the pass which made it; eval is a function."""
    flow = pf.Flow(estimating(3))
    trace = poutine.trace(lambda: pyro.sample("z", flow())).get_trace()
    trace.compute_log_prob()
    z = trace.nodes["z"]["value"]
    own = trace.nodes["z"]["log_prob"]
    assert torch.equal(own, flow().log_prob(z))  # from memory
    assert (own - flow().log_prob(z.detach().clone())).abs() > 1e-4
    flow.eval()
    z = flow.rsample((5,))
    torch.testing.assert_close(flow().log_prob(z.detach().clone()), flow().log_prob(z), rtol=0, atol=1e-3)


@pytest.mark.full
def test_a_fit_is_judged_by_a_function():
    guide = AutoFlow(conjugate, partial(estimating, gradient="backprop"), seed=0, num_particles=16)
    for _ in range(2):  # it can be fitted again
        fit = fit_guide(guide, steps=20, progress=False)
        assert not guide.flow.training
    found = fit.assessment
    torch.testing.assert_close(found.log_q, fit.flow.log_prob(found.draws), rtol=0, atol=1e-3)


@pytest.mark.full
def test_the_estimate_of_an_objective_trains():
    flow = pf.Flow(pf.cnf(2, hidden_dims=(8,), divergence="hutchinson", rtol=1e-3, atol=1e-3))

    def model():
        pyro.sample("z", dist.Normal(torch.ones(2), 0.5).to_event(1))

    guide = guide_of(flow)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(num_particles=32, vectorize_particles=True))
    for _ in range(60):
        svi.step()
    with torch.no_grad():
        z, log_q = flow.eval().rsample_and_log_prob((1000,))
    gap = (log_q - dist.Normal(1.0, 0.5).log_prob(z).sum(-1)).mean()
    assert -0.01 < gap < 0.1  # KL(q || p), which begins at some nats


# Guides of Pyro's kinds.


@pytest.mark.full
def test_fitted_to_eight_schools(tmp_path):
    fit = fit_guide(AutoFlow(schools, small, seed=0), EFFECTS, ERRORS, steps=60, progress=False)
    assert fit.khat < 0.9 and fit.ess > 0.15
    assert abs(fit.log_evidence + 31.31) < 0.15  # by ten million draws of mu and tau from the prior
    values = fit.sample(5)
    path = tmp_path / "fit.pt"
    fit.save(path)
    again = load_guide(path)
    torch.testing.assert_close(again.log_prob(values), fit.log_prob(values))
    assert fit.predictive(3)["y"].shape == (3, 8)
    twin = copy.deepcopy(fit.guide)
    assert torch.equal(twin.flow.log_prob(again.assessment.draws[:5]), fit.flow.log_prob(again.assessment.draws[:5]))
    predictive = Predictive(schools, guide=fit.guide, num_samples=4)(None, ERRORS)
    assert predictive["y"].shape == (4, 8) and predictive["y"].isfinite().all()


@pytest.mark.parametrize("gradient", ["adjoint", "backprop"])
def test_nuts_in_the_space_of_the_guide(gradient):
    builder = partial(pf.cnf, hidden_dims=(8,), gradient=gradient, rtol=1e-6, atol=1e-6)
    guide = AutoFlow(conjugate, builder, start="prior", seed=0).setup()
    shake(guide.flow, 0.2)
    neutra = NeuTraReparam(guide.requires_grad_(False).eval())
    model = neutra.reparam(conjugate)
    start, potential, _, _ = initialize_model(model)
    (site,) = start
    u = torch.randn(2, dtype=torch.double)
    z, ladj = guide.flow.chain.forward_and_ladj(u)
    joint = poutine.trace(poutine.condition(conjugate, {"z": z})).get_trace().log_prob_sum()
    torch.testing.assert_close(potential({site: u}), -joint - ladj, rtol=0, atol=1e-8)
    point = u.clone().requires_grad_()
    (slope,) = torch.autograd.grad(potential({site: point}), point)
    steps = 1e-4 * EYE
    want = torch.stack([(potential({site: u + h}) - potential({site: u - h})) / 2e-4 for h in steps])
    torch.testing.assert_close(slope, want, rtol=1e-4, atol=1e-4)
    mcmc = MCMC(NUTS(model, max_tree_depth=3), num_samples=4, warmup_steps=4, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()[site].isfinite().all()


def test_one_of_a_list_of_guides():
    guide = AutoGuideList(schools)
    guide.append(AutoFlow(poutine.block(schools, hide=["mu", "tau"]), small, start="prior", seed=0))
    guide.append(AutoNormal(poutine.block(schools, expose=["mu", "tau"])))
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    assert all(math.isfinite(svi.step(EFFECTS, ERRORS)) for _ in range(3))
    assert set(guide(EFFECTS, ERRORS)) == {"mu", "tau", "effect"}


@pytest.mark.full
def test_amortised_in_a_plate():
    """q(z | x) for all rows at once, against the exact posterior N(x / 2, 1 / 2)."""
    data = torch.randn(64, 1) * 2**0.5
    flow = pf.Flow(pf.cnf(1, context_dim=1, hidden_dims=(16,), gradient="backprop", rtol=1e-4, atol=1e-4))

    def model(index):
        with pyro.plate("rows", 64, subsample=index):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=data[index])

    def guide(index):
        pyro.module("flow", flow)
        with pyro.plate("rows", 64, subsample=index):
            pyro.sample("z", flow(data[index]))

    steps = 100
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.02 ** (1 / steps)}), PathELBO())
    for _ in range(steps):
        svi.step(torch.randperm(64)[:32])
    evidence = dist.Normal(0.0, 2**0.5).log_prob(data).sum()
    assert abs(-svi.evaluate_loss(torch.arange(64)) - evidence) < 0.02 * abs(evidence)
    test = torch.tensor([[-1.5], [0.0], [1.5]])
    draws = flow(test).sample((4000,))
    torch.testing.assert_close(draws.mean(0), test / 2, rtol=0, atol=0.06)
    torch.testing.assert_close(draws.std(0), torch.full_like(test, 0.5**0.5), rtol=0.06, atol=0)


# Trouble.


@pytest.mark.parametrize(
    "after, message", [(None, "makes no headway"), pytest.param(700, "not finite", marks=pytest.mark.full)]
)
def test_a_field_that_breaks_ends_a_fit_in_words(after, message):
    builder = partial(pf.cnf, field=Breaking(10, after), solver_steps=100)
    with pytest.raises(RuntimeError, match=rf"Continuous \(10,\): .*{message}.*rows (are )?\["):
        fit_guide(AutoFlow(schools, builder, seed=0, num_particles=32), EFFECTS, ERRORS, steps=200, progress=False)


def test_tracing_by_jit_is_refused():
    guide = AutoFlow(schools, small, start="prior", seed=0)
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 1e-2}), JitTrace_ELBO(ignore_jit_warnings=True))
    refuses(RuntimeError, "use the plain function, and Trace_ELBO in place of JitTrace_ELBO", svi.step, EFFECTS, ERRORS)


def test_a_builder_with_a_context_is_refused():
    with pytest.raises(ValueError, match="flow of 10 dimensions without context"):
        AutoFlow(schools, partial(pf.cnf, context_dim=2)).setup(EFFECTS, ERRORS)
