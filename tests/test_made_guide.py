"""MADE inside Pyro programs with discrete latents: score-function gradients, relaxed draws, priors, plates."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import seeded, shake
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.optim import Adam
from torch import nn

import pyro_flows as pf

CAUSES, FINDINGS, ROWS, PARTICLES = 3, 4, 3, 100
STATES = torch.tensor(list(itertools.product((0.0, 1.0), repeat=CAUSES)), dtype=torch.float64)
generator = seeded(5)
WEIGHT = 2 * torch.randn(CAUSES, FINDINGS, generator=generator, dtype=torch.float64)
SEEN = torch.randint(2, (ROWS, FINDINGS), generator=generator).double()
LOGIT = torch.tensor([-0.5, 0.3, -1.0], dtype=torch.float64)


def shaken(module, scale=0.7):
    return shake(module, scale, seed=1)


def likelihood(causes):
    return dist.Bernoulli(logits=causes @ WEIGHT - 0.5).to_event(1)


def model(seen, temperature=None):
    prior = dist.Bernoulli(logits=LOGIT)
    if temperature is not None:
        prior = dist.RelaxedBernoulli(LOGIT.new_tensor(temperature), logits=LOGIT)
    with pyro.plate("rows", len(seen)):
        causes = pyro.sample("causes", prior.to_event(1))
        pyro.sample("seen", likelihood(causes), obs=seen)


def log_joint(seen):
    """Of all states and each row, shape (8, rows)."""
    prior = dist.Bernoulli(logits=LOGIT).to_event(1).log_prob(STATES)
    return prior.unsqueeze(-1) + likelihood(STATES.unsqueeze(-2)).log_prob(seen)


class Guide(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(FINDINGS, 2)
        self.made = pf.MADE(CAUSES, hidden_dims=(6,), context_dim=2, order=[2, 0, 1])
        shaken(self.double())

    def all_states(self, seen):
        return self.made(self.encoder(seen)).log_prob(STATES.unsqueeze(-2))

    def kl(self, seen):
        """Exact, one number for each row."""
        log_q = self.all_states(seen)
        return (log_q.exp() * (log_q - log_joint(seen).log_softmax(0))).sum(0)

    def elbo(self, seen):
        log_q = self.all_states(seen)
        return (log_q.exp() * (log_joint(seen) - log_q)).sum(0)


class Baseline(nn.Module):
    """One number for each row, of the shape of the cost."""

    def __init__(self, particles=PARTICLES):
        super().__init__()
        self.level, self.particles = nn.Parameter(torch.zeros(ROWS, dtype=torch.float64)), particles

    def forward(self, seen):
        return self.level.expand(self.particles, len(seen))


def program(guide, **baseline):
    """The guide as a Pyro program."""

    def run(seen, temperature=None):
        pyro.module("guide", guide)
        if isinstance(baseline.get("nn_baseline"), nn.Module):
            pyro.module("baseline", baseline["nn_baseline"])
        made = guide.made if temperature is None else guide.made.relaxed(temperature)
        infer = {"baseline": baseline} if baseline and temperature is None else {}
        with pyro.plate("rows", len(seen)):
            pyro.sample("causes", made(guide.encoder(seen)), infer=infer)

    return run


def elbo_of(form, particles=PARTICLES):
    return form(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)


def gradients(guide, run, loss, times):
    """Many estimates of the ELBO's gradient, shape (times, parameters)."""
    found = []
    for _ in range(times):
        for parameter in guide.parameters():
            parameter.grad = None
        loss.loss_and_grads(model, run, SEEN)
        found.append(torch.cat([-parameter.grad.flatten() for parameter in guide.parameters()]))
    return torch.stack(found)


def exact_gradient(guide):
    exact = torch.autograd.grad(guide.elbo(SEEN).sum(), list(guide.parameters()))
    return torch.cat([part.flatten() for part in exact])


def agree(estimates, exact):
    error = estimates.std(0) / len(estimates) ** 0.5
    assert (exact.abs() > 1e-3).sum() > 20
    wrong = (estimates.mean(0) - exact).abs() > 5 * error + 1e-12
    assert not wrong.any(), (estimates.mean(0)[wrong], exact[wrong], error[wrong])


@pytest.mark.full
@pytest.mark.parametrize("form", [Trace_ELBO, TraceGraph_ELBO])
def test_score_function_gradients_are_unbiased(form):
    guide = Guide()
    estimates = gradients(guide, program(guide), elbo_of(form), 150)
    agree(estimates, exact_gradient(guide))


@pytest.mark.full
def test_one_particle_after_another_gives_the_same_gradient():
    guide = Guide()
    agree(gradients(guide, program(guide), TraceGraph_ELBO(num_particles=2), 120), exact_gradient(guide))


@pytest.mark.full
def test_a_learnt_baseline_reduces_the_variance_and_not_the_mean():
    guide, baseline = Guide(), Baseline()
    run = program(guide, nn_baseline=baseline, nn_baseline_input=SEEN)
    svi = SVI(
        model, run, Adam(lambda name: {"lr": 0.3 if name.startswith("baseline") else 0.0}), elbo_of(TraceGraph_ELBO)
    )
    before = exact_gradient(guide)
    for _ in range(80):
        svi.step(SEEN)
    assert torch.equal(exact_gradient(guide), before)
    torch.testing.assert_close(baseline.level.detach(), guide.elbo(SEEN).detach(), rtol=0.1, atol=0.3)
    with_it = gradients(guide, run, elbo_of(TraceGraph_ELBO), 150)
    without = gradients(guide, program(guide), elbo_of(TraceGraph_ELBO), 150)
    agree(with_it, before)
    assert with_it.var(0).sum() < 0.5 * without.var(0).sum()


@pytest.mark.full
def test_both_kinds_of_baseline_together():
    guide, baseline = Guide(), Baseline()
    run = program(guide, nn_baseline=baseline, nn_baseline_input=SEEN, use_decaying_avg_baseline=True)
    agree(gradients(guide, run, elbo_of(TraceGraph_ELBO), 150), exact_gradient(guide))
    assert baseline.level.grad is not None and (baseline.level.grad != 0).all()


@pytest.mark.parametrize("relaxed", [False, True], ids=["score function", "relaxed"])
def test_svi_lowers_the_exact_divergence(relaxed):
    guide = Guide()
    before = guide.kl(SEEN).sum().item()
    loss = elbo_of(Trace_ELBO if relaxed else TraceGraph_ELBO)
    baseline = {} if relaxed else {"nn_baseline": Baseline(), "nn_baseline_input": SEEN}
    svi = SVI(model, program(guide, **baseline), Adam({"lr": 0.03}), loss)
    for _ in range(80):
        svi.step(SEEN, 0.3 if relaxed else None)
    assert guide.kl(SEEN).sum().item() < 0.25 * before


@pytest.mark.full
def test_a_context_that_depends_on_a_discrete_draw_keeps_its_gradient():
    first = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    made = shaken(pf.MADE(2, hidden_dims=(8,), context_dim=1, activation="silu").double())
    target = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def joint():
        flag = pyro.sample("flag", dist.Bernoulli(logits=torch.zeros((), dtype=torch.float64)))
        pyro.sample("x", made(flag.reshape(1)), obs=target)

    def guide():
        pyro.sample("flag", dist.Bernoulli(logits=pyro.param("first", first)))

    flags = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    probs = torch.stack((torch.sigmoid(-first), torch.sigmoid(first)))
    bound = (probs * (made.log_prob(target, flags) - probs.log() - torch.log(probs.new_tensor(2.0)))).sum()
    exact = torch.autograd.grad(bound, [first, *made.parameters()])
    found = []
    pyro.param("first", first)
    raw = pyro.get_param_store()["first"].unconstrained()
    for _ in range(800):
        for parameter in (raw, *made.parameters()):
            parameter.grad = None
        TraceGraph_ELBO().loss_and_grads(joint, guide)
        found.append(torch.cat([-parameter.grad.flatten() for parameter in (raw, *made.parameters())]))
    estimates, exact = torch.stack(found), torch.cat([part.flatten() for part in exact])
    error = estimates.std(0) / len(estimates) ** 0.5
    assert ((estimates.mean(0) - exact).abs() <= 5 * error + 1e-12).all()
    assert exact[0].abs() > 4 * error[0] and (exact[1:].abs() > 0.01).sum() > 8


# As a prior.


def prior_program(made):
    def run(seen):
        pyro.module("prior", made)
        with pyro.plate("rows", len(seen)):
            causes = pyro.sample("causes", made())
            pyro.sample("seen", likelihood(causes), obs=seen)

    return run


def test_prior_scores_with_observations():
    made = shaken(pf.MADE(CAUSES, hidden_dims=(5,)).double())
    causes = STATES[[1, 6, 3]]
    run = poutine.condition(prior_program(made), {"causes": causes})
    trace = poutine.trace(run).get_trace(SEEN)
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["causes"]["log_prob"], made.log_prob(causes))
    want = (made.log_prob(causes) + likelihood(causes).log_prob(SEEN)).sum()
    torch.testing.assert_close(trace.log_prob_sum(), want)


@pytest.mark.full
@pytest.mark.parametrize("form", [Trace_ELBO, TraceGraph_ELBO])
def test_prior_and_guide_learn_together(form):
    prior, guide = shaken(pf.MADE(CAUSES, hidden_dims=(5,)).double()), Guide()
    seen = likelihood(STATES[[0, 7]].repeat(20, 1)).sample()  # all causes or none

    def evidence():
        joint = prior.log_prob(STATES).unsqueeze(-1) + likelihood(STATES.unsqueeze(-2)).log_prob(seen)
        return joint.logsumexp(0).mean().item()

    before = evidence()
    svi = SVI(prior_program(prior), program(guide), Adam({"lr": 0.03}), elbo_of(form, 10))
    for _ in range(150):
        svi.step(seen)
    best = likelihood(STATES[[0, 7]].unsqueeze(-2)).log_prob(seen).logsumexp(0).mean().item() - torch.tensor(2.0).log()
    assert evidence() - before > 0.7 * (best - before) > 0.1


# Plates.


def test_subsampled_plate():
    guide = Guide()
    seen = likelihood(STATES.repeat(2, 1)[:12]).sample()

    def run(size):
        with pyro.plate("rows", 12, subsample_size=size) as rows:
            return rows, pyro.sample("causes", guide.made(guide.encoder(seen[rows])))

    trace = poutine.trace(run).get_trace(4)
    trace.compute_log_prob()
    site = trace.nodes["causes"]
    rows, causes = trace.nodes["_RETURN"]["value"]
    assert causes.shape == (4, CAUSES) and site["scale"] == 3
    want = guide.made.log_prob(causes, guide.encoder(seen[rows]))
    torch.testing.assert_close(site["unscaled_log_prob"], want)
    torch.testing.assert_close(trace.log_prob_sum(), 3 * want.sum())


def test_nested_plates_and_a_context_for_all():
    guide = Guide()
    context = guide.encoder(SEEN)

    def run(context):
        with pyro.plate("outer", 5, dim=-2), pyro.plate("inner", ROWS, dim=-1):
            return pyro.sample("causes", guide.made(context))

    for given in (context, context[0], context.expand(5, ROWS, -1)):
        trace = poutine.trace(run).get_trace(given)
        trace.compute_log_prob()
        site = trace.nodes["causes"]
        assert site["value"].shape == (5, ROWS, CAUSES)
        torch.testing.assert_close(site["log_prob"], guide.made.log_prob(site["value"], given))


# Relaxed.


def relaxed_made(dims=CAUSES, context_dim=0):
    return shaken(pf.MADE(dims, hidden_dims=(6,), context_dim=context_dim, order="reverse").double())


def test_cold_draws_are_those_of_the_discrete_model():
    made, n = relaxed_made(), 20_000
    binary = (made.relaxed(0.01).sample((n,)) > 0.5).double()
    want = made.log_prob(STATES).exp()
    found = (binary.unsqueeze(1) == STATES).all(-1).double().mean(0)
    # Of a dimension's draws about one in a hundred is not yet near 0 or 1.
    assert ((found - want).abs() < 5 * (want * (1 - want) / n).sqrt() + 0.01).all()
    marginals = want @ STATES
    assert ((binary.mean(0) - marginals).abs() < 0.02).all()
    assert marginals.max() - marginals.min() > 0.2


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("dims", [1, 2])
def test_relaxed_density_integrates_to_one(dims, temperature):
    made = relaxed_made(dims).relaxed(temperature)
    logit = torch.linspace(-34, 34, 681, dtype=torch.float64)
    points = torch.cartesian_prod(*[logit] * dims).reshape(-1, dims)
    x = torch.sigmoid(points)
    slope = (torch.nn.functional.logsigmoid(points) + torch.nn.functional.logsigmoid(-points)).sum(-1)
    mass = torch.logsumexp(made.log_prob(x) + slope, 0).exp() * (logit[1] - logit[0]) ** dims
    assert abs(mass.item() - 1) < 1e-6


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_relaxed_draws_differentiate_as_finite_differences(temperature):
    made = relaxed_made(context_dim=2)
    relaxed = made.relaxed(temperature)
    context = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    inputs = [context, *made.parameters()]
    towards = [torch.randn_like(tensor) for tensor in inputs]
    weight = torch.randn(5, 4, CAUSES, dtype=torch.float64)

    def value(step):
        with torch.no_grad():
            for tensor, way in zip(inputs, towards, strict=True):
                tensor.add_(step * way)
        torch.manual_seed(3)
        result = (weight * relaxed.rsample((5,), context)).sum()
        slopes = torch.autograd.grad(result, inputs)
        with torch.no_grad():
            for tensor, way in zip(inputs, towards, strict=True):
                tensor.sub_(step * way)
        return result.detach(), slopes

    slopes = value(0.0)[1]
    got = sum((slope * way).sum() for slope, way in zip(slopes, towards, strict=True))
    want = (value(1e-5)[0] - value(-1e-5)[0]) / 2e-5
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert want.abs() > 0.1
    assert all(slope.abs().max() > 0 for slope in slopes)


def test_relaxed_shares_the_parameters():
    made = relaxed_made()
    relaxed = made.relaxed(0.5)
    assert [id(p) for p in relaxed.parameters()] == [id(p) for p in made.parameters()]
    assert relaxed.state_dict().keys() == made.state_dict().keys()
    x = torch.full((CAUSES,), 0.3, dtype=torch.float64)
    before = relaxed.log_prob(x)
    with torch.no_grad():
        next(made.parameters()).add_(1.0)
    assert relaxed.log_prob(x) != before
    assert not made.has_rsample and made().support.is_discrete  # as it was
    assert relaxed.has_rsample and not relaxed().support.is_discrete
    refuses(ValueError, "0 or 1", made.log_prob, x)
    logits = made.params(torch.zeros(CAUSES, dtype=torch.float64))
    assert torch.equal(relaxed.params(torch.zeros(CAUSES, dtype=torch.float64)), logits)


def test_relaxed_gradients_are_finite_in_single_precision():
    made = shaken(pf.MADE(CAUSES, hidden_dims=(6,)), 2.0)
    relaxed = made.relaxed(0.1)
    x = relaxed.rsample((500,))
    assert ((x > 0) & (x < 1)).all()
    score = relaxed.log_prob(x)
    assert score.isfinite().all()
    grads = torch.autograd.grad(score.sum() + x.sum(), list(made.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


def test_discrete_draws_and_ensembles_say_what_to_do_for_gradients():
    made = pf.MADE(CAUSES, hidden_dims=(6,), order="any")
    refuses(NotImplementedError, r"score-function estimator, or .relaxed\(temperature\)", made.rsample)
    refuses(NotImplementedError, "ensemble", made.eval().relaxed(0.5).rsample)
    assert made.relaxed(0.5).train().rsample((2,)).shape == (2, CAUSES)


def test_plain_draws_of_a_relaxed_model_are_relaxed():
    torch.manual_seed(0)
    made = pf.MADE(4, hidden_dims=(8,), seed=0)
    relaxed = made.relaxed(0.5)
    for _ in range(2):  # in turns, since both draw by the same weights
        assert set(made.sample((50,)).unique().tolist()) <= {0.0, 1.0}
        x = relaxed.sample((50,))
        assert ((x > 0) & (x < 1)).all() and len(x.unique()) > 100
        assert relaxed.log_prob(x).isfinite().all()
