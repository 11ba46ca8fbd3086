"""``fit_guide``: exact answers recovered, budgets kept, what a fit gives, and what it survives."""

import copy
import math
import pickle
import time
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import output_of
from cases import full_but, seeded
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule

import pyro_flows as pf
from pyro_flows.infer import AutoFlow, fit_guide, load_guide
from pyro_flows.infer.diagnostics.verdict import LABELS, Verdict
from pyro_flows.infer.guides import loop
from pyro_flows.infer.guides.loop import emphasis
from pyro_flows.infer.machine.budget import Budget
from pyro_flows.infer.machine.optimizers import AdamW

pytestmark = pytest.mark.usefixtures("double")

X = torch.linspace(-1, 1, 8, dtype=torch.float64)
Y = torch.tensor([-1.3, -0.4, -0.9, 0.2, 0.6, 0.3, 1.6, 1.1], dtype=torch.float64)
SMALL = partial(pf.realnvp, num_layers=2, hidden_dims=(8,), mask="random")
fit = partial(fit_guide, progress=False)


def regression(x, y=None):
    """Conjugate: the posterior is Gaussian."""
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    mean = pyro.deterministic("mean", a + b * x)
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def exact():
    """Mean, covariance and log evidence of the regression."""
    design = torch.stack([torch.ones(8, dtype=torch.float64), X.double()], 1)
    precision = design.mT @ design / 0.25 + torch.eye(2, dtype=torch.float64) / 4
    covariance = torch.linalg.inv(precision)
    marginal = 4 * design @ design.mT + 0.25 * torch.eye(8, dtype=torch.float64)
    zero = torch.zeros(8, dtype=torch.float64)
    evidence = torch.distributions.MultivariateNormal(zero, marginal).log_prob(Y.double())
    return covariance @ design.mT @ Y.double() / 0.25, covariance, evidence


def once(make):
    """A fixture for many tests, made in float64."""

    def fixture():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        pyro.set_rng_seed(0)
        try:
            yield make()
        finally:
            torch.set_default_dtype(before)

    return pytest.fixture(scope="module")(fixture)


fitted = once(lambda: fit(AutoFlow(regression, SMALL, seed=0), X, y=Y, steps=150))


def groups(y, size=4):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("groups", size):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.deterministic("twice", 2 * theta)
        pyro.deterministic("total", mu + weights.sum(-1))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
    pyro.sample("z", dist.MultivariateNormal(weights, torch.eye(3)), obs=torch.ones(3))


hierarchical = once(
    lambda: fit(AutoFlow(groups, SMALL, seed=0, num_starts=1), torch.tensor([1.0, 2.0, 4.0, 3.0]), steps=60)
)


# What it finds


def test_conjugate_model(fitted):
    mean, covariance, evidence = exact()
    draws = fitted.sample(20_000)
    found = torch.stack([draws["a"], draws["b"]], 1)
    sd = covariance.diagonal().sqrt()
    assert ((found.mean(0) - mean).abs() < 5 * sd / 20_000**0.5).all()
    torch.testing.assert_close(
        torch.cov(found.mT), covariance, rtol=0.05, atol=0.05 * covariance.diagonal().min().item()
    )
    assert abs(fitted.log_evidence - evidence) < 1e-3
    assert fitted.ess > 0.999 and fitted.importance.elbo <= evidence + 1e-3
    # Draws of the guide have its own density, and log_prob that of named values.
    values = fitted.sample(5)
    q = torch.distributions.MultivariateNormal(mean, covariance)
    torch.testing.assert_close(
        fitted.log_prob(values), q.log_prob(torch.stack([values["a"], values["b"]], 1)), rtol=0, atol=0.05
    )


def test_verdict(fitted):
    verdict = fitted.verdict
    assert isinstance(verdict, Verdict) and verdict.label == "good" and verdict.ok and verdict.label in LABELS
    assert "good" in str(verdict) and "good" in repr(fitted) and "2 latent sites" in repr(fitted)
    assert isinstance(fitted.ess, float) and isinstance(fitted.khat, float) and isinstance(fitted.log_evidence, float)
    assert fitted.failures == 0 and fitted.notes == ()
    weights = fitted.log_weights
    assert weights.shape == (10_000,) and weights.isfinite().all()
    torch.testing.assert_close(weights, fitted.assessment.log_p - fitted.assessment.log_q)
    density = fitted.guide.density(X, y=Y)
    with torch.no_grad():
        torch.testing.assert_close(density(fitted.assessment.draws[:10]), fitted.assessment.log_p[:10])
        torch.testing.assert_close(fitted.flow.log_prob(fitted.assessment.draws[:10]), fitted.assessment.log_q[:10])


def test_history(fitted):
    history = fitted.history
    lengths = {len(getattr(history, name)) for name in vars(history)}
    assert lengths == {len(history)} and 1 <= len(history) < 150  # it stops when nothing is left to learn
    assert set(history.phase) <= {"affine", "flow"} and all(math.isfinite(v) for v in history.elbo)
    assert history.seconds == sorted(history.seconds) and set(history.weight) == {1.0} and set(history.failures) == {0}
    assert history.phase == sorted(history.phase)  # affine first


@pytest.mark.full
def test_model_is_bad_for_a_plain_flow():
    """A guide that cannot fit says so: a posterior bent far beyond what two steps learn."""

    def banana():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), torch.tensor([3.0, 0.05])).to_event(1))
        pyro.factor("bend", -0.5 * ((x[..., 1] - x[..., 0] ** 2) / 0.05) ** 2)

    found = fit(AutoFlow(banana, SMALL, seed=0), steps=2)
    assert found.verdict.label != "good" and not found.verdict.ok and found.ess < 0.9


@pytest.mark.full
def test_several_modes_by_default():
    """Two separated modes of unequal weight: both are covered, in about the right shares."""

    def modes():
        parts = dist.Normal(torch.tensor([[-2.0, -2.0], [2.0, 2.0]]), 0.5).to_event(1)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.7, 0.3])), parts))

    guide = AutoFlow(modes, partial(pf.realnvp, num_layers=4, hidden_dims=(16,)), seed=0)
    found = fit(guide, steps=300, fit_prior=True)
    assert any("2 modes" in note for note in found.notes)
    share = (found.sample(5000, resampled=True)["x"][:, 0] > 0).double().mean()
    assert abs(share - 0.3) < 0.05
    assert found.verdict.label != "modes missing" and abs(found.log_evidence) < 0.05


def test_missing_mode_is_seen():
    """Where a start of one place is asked for, the verdict names what is left out."""

    def modes():
        parts = dist.Normal(torch.tensor([[-6.0, -6.0], [6.0, 6.0]]), 0.5).to_event(1)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.6, 0.4])), parts))

    guide = AutoFlow(modes, SMALL, start="prior", init_loc_fn=lambda site: torch.full((2,), -6.0), seed=0)
    found = fit(guide, steps=60, fit_prior=True)
    assert found.verdict.label == "modes missing" and not found.verdict.ok


# Budgets and options


@pytest.mark.parametrize("budget", [{"steps": 1}, {"steps": 7}, {"steps": 3, "seconds": 8}])
def test_steps(budget):
    found = fit(AutoFlow(regression, SMALL, start="prior", seed=0), X, y=Y, **budget)
    assert len(found.history) == budget["steps"] and found.sample(3)["a"].shape == (3,)


@pytest.mark.full
def test_seconds():
    """Very generous: the machine may be busy; the point is that the budget ends it."""

    def slow(y):
        time.sleep(0.002)
        with pyro.plate("dims", 5):
            x = pyro.sample("x", dist.StudentT(3.0, 0.0, 1.0))
            pyro.sample("y", dist.StudentT(2.0, x, 0.1), obs=y)

    begin = time.monotonic()
    found = fit(AutoFlow(slow, SMALL, seed=0), torch.randn(5), seconds=3.0)
    assert time.monotonic() - begin < 30 and len(found.history) > 3
    assert found.log_weights.isfinite().all()


@pytest.mark.parametrize("shown", [False, True])
def test_progress(shown, capsys):
    fit_guide(AutoFlow(regression, SMALL, start="prior", seed=0), X, y=Y, steps=3, progress=shown)
    printed = capsys.readouterr()
    assert not printed.out and bool("fit_guide" in printed.err) is shown


@pytest.mark.full
def test_same_seed_same_fit():
    """By steps, whatever was drawn before; and random numbers of others are left alone."""
    found = []
    for outer in (1, 2):
        pyro.set_rng_seed(outer)
        before = torch.get_rng_state()
        found.append(fit(AutoFlow(groups, SMALL, seed=3, num_starts=1, num_particles=16), torch.arange(4.0), steps=25))
        assert torch.equal(before, torch.get_rng_state())
    one, two = found
    assert one.history.elbo == two.history.elbo
    torch.testing.assert_close(one.log_weights, two.log_weights, rtol=0, atol=0)
    assert one.khat == two.khat and one.verdict.label == two.verdict.label
    other = fit(AutoFlow(groups, SMALL, seed=4, num_starts=1, num_particles=16), torch.arange(4.0), steps=25)
    assert other.history.elbo != one.history.elbo


def test_no_handler_sees_it():
    """It can be called inside a trace, a plate or without gradients."""
    with torch.no_grad(), poutine.trace() as seen, pyro.plate("outer", 3):
        found = fit(AutoFlow(regression, SMALL, start="prior", seed=0), X, y=Y, steps=3)
    assert not [n for n in seen.trace.nodes if n not in ("outer",)]
    assert found.sample(2)["a"].shape == (2,)


OPTIONS = [{"tempering": 0.1}, {"path_gradient": False}, {"num_particles": 4}, {"start": "prior"}]


@pytest.mark.full
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_guide(option):
    found = fit(AutoFlow(regression, SMALL, seed=0, **option), X, y=Y, steps=40)
    assert all(math.isfinite(v) for v in found.history.elbo) and found.log_weights.isfinite().all()
    weights = found.history.weight
    if "tempering" in option:
        assert weights[0] < 0.2 and weights[-1] == 1.0 and weights == sorted(weights)
    else:
        assert set(weights) == {1.0}


@pytest.mark.full
def test_tempering_of_one_dimension():
    def model():
        pyro.sample("x", dist.Gamma(3.0, 2.0))

    found = fit(AutoFlow(model, seed=0), steps=200, fit_prior=True)
    assert abs(found.sample(20_000)["x"].mean() - 1.5) < 0.05 and abs(found.log_evidence) < 0.01


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("data", [torch.float32, torch.float64])
def test_dtypes(default_dtype, default, data):
    default_dtype(default)

    def model(x, y):
        a = pyro.sample("a", dist.Normal(x.new_tensor(0.0), 2.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(a * x, x.new_tensor(0.5)), obs=y)

    found = fit(AutoFlow(model, seed=0), X.to(data), Y.to(data), steps=30)
    assert found.sample(2)["a"].dtype == data and found.log_weights.dtype == data
    precision = 4 * (X**2).sum() + 0.25
    assert abs(found.sample(10_000)["a"].double().mean() - 4 * (X * Y).sum() / precision) < 0.1
    assert found.predictive(4)["y"].dtype == data


def test_plain_model_takes_its_arguments_by_name():
    found = fit(lambda *, rows, y: regression(rows, y), rows=X, y=Y, steps=2)
    assert set(found.sample(2)) == {"a", "b"}


@pytest.mark.full
@pytest.mark.parametrize("before", full_but(["setup", "setup elsewhere", "SVI", "fit", "moved"], "SVI", "fit"))
def test_fits_the_guide_that_is_given(before):
    """A guide that was built, trained or moved before begins anew, and is left as it was fitted."""
    guide = AutoFlow(regression, SMALL, seed=0, num_particles=16)
    if before == "setup":
        guide.setup(X, y=Y)
    elif before == "setup elsewhere":
        guide.setup(X[:5], y=Y[:5])
    elif before == "SVI":
        svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(3):
            svi.step(X, Y + 5)
    elif before == "fit":
        fit(guide, X, y=Y + 5, steps=3)
    else:
        guide.setup(X, y=Y)
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter += 0.3
    found = fit(guide, X, y=Y, steps=5)
    fresh = fit(AutoFlow(regression, SMALL, seed=0, num_particles=16), X, y=Y, steps=5)
    assert found.history.elbo == fresh.history.elbo
    z = torch.randn(6, 2)
    torch.testing.assert_close(guide.flow.log_prob(z), found.flow.log_prob(z), rtol=0, atol=0)
    assert not guide.flow.training and all(p.grad is None for p in guide.parameters())


@pytest.mark.full
@pytest.mark.parametrize(
    "later", full_but(["refit", "SVI", "load", "move", "data", "restart"], "refit", "load", "data")
)
def test_a_result_owns_what_it_knows(later):
    """Nothing that is done to the guide or to the data afterwards changes draws, densities or predictions."""
    x, y = X.clone(), Y.clone()
    guide = AutoFlow(regression, SMALL, seed=0, num_particles=16)
    found = fit(guide, x, y, steps=5)
    z = torch.randn(6, 2)

    def known():
        pyro.set_rng_seed(1)
        log_p = found._density(z)
        return found.flow.log_prob(z), found.sample(3)["a"], found.predictive(3)["y"], log_p, found.log_weights

    before = [each.detach().clone() for each in known()]
    if later == "refit":
        fit(guide, X, Y + 5, steps=5)
    elif later == "SVI":
        svi = SVI(regression, guide, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO())
        svi.step(X, Y + 5)
    elif later == "load":
        guide.load_state_dict({name: value + 0.1 for name, value in guide.state_dict().items()})
    elif later == "move":
        guide.float()
    elif later == "data":
        x += 1
        y *= -3
    else:
        guide.restart()
    torch.testing.assert_close(before, known(), rtol=0, atol=0)


@pytest.mark.full
def test_the_guide_of_a_result_is_one():
    """It trains by SVI under a name of its own, predicts, and reparameterizes, and shares the flow of the result."""
    guide = AutoFlow(regression, SMALL, seed=0, num_particles=16)
    found = fit(guide, X, y=Y, steps=5)
    assert found.guide is not guide and found.guide.flow is found.flow and found.guide.latents is found.latents
    predicted = Predictive(regression, guide=found.guide, num_samples=4)(X)
    assert predicted["y"].shape == (4, 8)
    for each in (guide, found.guide):  # both in one parameter store
        svi = SVI(regression, each, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())
        before = [p.detach().clone() for p in each.parameters()]
        svi.step(X, y=Y)
        assert any(not torch.equal(p, q) for p, q in zip(before, each.parameters(), strict=True))
    neutra = NeuTraReparam(found.guide.requires_grad_(False))
    trace = poutine.trace(neutra.reparam(regression)).get_trace(X, y=Y)
    assert torch.equal(trace.nodes["y"]["value"], Y)


# Draws, predictions, ArviZ


def test_samples(hierarchical):
    shapes = {"mu": (), "weights": (3,), "theta": (4,)}
    for n in (0, 1, 7):
        for resampled in (False, True):
            draws = hierarchical.sample(n, resampled=resampled)
            assert {name: tuple(v.shape) for name, v in draws.items()} == {k: (n, *s) for k, s in shapes.items()}
            assert not any(v.requires_grad for v in draws.values())
    torch.testing.assert_close(hierarchical.sample(5)["weights"].sum(-1), torch.ones(5))
    many = hierarchical.sample(3000, resampled=True)  # more than a quarter of the weighted draws
    assert many["theta"].shape == (3000, 4)
    kept = hierarchical.assessment.draws
    few = hierarchical.latents.pack(hierarchical.sample(50, resampled=True))
    nearest = torch.cdist(few, kept).min(1).values
    assert nearest.max() < 1e-6  # from those that were judged


def test_quantiles_and_summary(fitted, hierarchical):
    mean, covariance, _ = exact()
    sd = covariance.diagonal().sqrt()
    q = torch.tensor([[0.05, 0.5], [0.95, 0.25]])
    z = dist.Normal(0.0, 1.0).icdf(q)
    before = torch.get_rng_state()
    for resampled in (False, True):
        found = fitted.quantiles(q, num_samples=2500, resampled=resampled)
        assert found["a"].shape == (2, 2) and found["mean"].shape == (2, 2, 8)
        for k, name in enumerate("ab"):
            torch.testing.assert_close(found[name], mean[k] + z * sd[k], rtol=0, atol=0.2 * sd[k].item())
        table = fitted.summary(num_samples=2500, resampled=resampled)
        assert list(table.index[:3]) == ["a", "b", "mean[0]"] and list(table) == ["mean", "sd", "5%", "50%", "95%"]
        assert ((table["mean"][:2] - mean.numpy()).abs() < 0.1 * sd.numpy()).all()
        assert (abs(table["sd"][:2] / sd.numpy() - 1) < 0.06).all()
        assert table["5%"]["b"] == found["b"][0, 0] and table["95%"]["mean[7]"] == found["mean"][1, 0, 7]
    assert torch.equal(torch.get_rng_state(), before)
    sites = hierarchical.summary(num_samples=50)
    assert len(sites) == 1 + 3 + 4 + 4 + 1 and "weights[2]" in sites.index and "total" in sites.index
    with pytest.raises(ValueError, match=r"GuideFit.quantiles: expected q from 0 to 1, got 5; give 5 % as 0.05"):
        fitted.quantiles(5)


@pytest.mark.full
def test_resampled_moments():
    """A guide that is off is put right by its weights."""
    found = fit(AutoFlow(regression, SMALL, start="prior", seed=0), X, y=Y, steps=20)
    mean, covariance, evidence = exact()
    draws = found.sample(2000, resampled=True)
    sd = covariance.diagonal().sqrt()
    off = torch.stack([draws["a"].mean(), draws["b"].mean()]) - mean
    if found.ess > 0.1:
        assert (off.abs() < 0.2 * sd).all() and abs(found.log_evidence - evidence) < 0.1
    else:
        assert found.verdict.label != "good"


def test_predictive(hierarchical):
    draws = hierarchical.predictive(6)
    shapes = {name: tuple(v.shape) for name, v in draws.items()}
    assert shapes == {"twice": (6, 4), "total": (6,), "y": (6, 4), "z": (6, 3)}
    assert not torch.equal(draws["y"][0], draws["y"][1]) and not (draws["z"] == 1).any()
    assert {n: tuple(v.shape) for n, v in hierarchical.predictive(0).items()} == {
        n: (0, *s[1:]) for n, s in shapes.items()
    }
    assert hierarchical.predictive(5, resampled=True)["y"].shape == (5, 4)


def test_predictive_moments(fitted):
    """Mean and variance of new data are those of the exact predictive, at new covariates, with ``y=None``."""
    x = torch.tensor([-2.0, 0.0, 3.0])
    mean, covariance, _ = exact()
    design = torch.stack([torch.ones(3), x], 1)
    for draws in (
        fitted.predictive(20_000, x),
        fitted.predictive(20_000, x, y=None),
        fitted.predictive(20_000, x, y=x),
    ):
        assert draws["y"].shape == draws["mean"].shape == (20_000, 3)
        variance = (design @ covariance @ design.mT).diagonal()
        for name, expected in (("y", variance + 0.25), ("mean", variance)):
            error = (expected / 20_000).sqrt()
            assert ((draws[name].mean(0) - design @ mean).abs() < 5 * error).all(), name
            torch.testing.assert_close(draws[name].var(0), expected, rtol=0.07, atol=0)


@pytest.mark.full
def test_predictive_one_at_a_time():
    """Models that do not broadcast predict too."""

    def model(y):
        a = pyro.sample("a", dist.Normal(0, 1))
        if a > 100:
            raise ValueError
        pyro.sample("y", dist.Normal(a.item() * torch.ones(2), 1.0).to_event(1), obs=y)

    with pytest.warns(UserWarning, match="does not broadcast") as caught:
        found = fit(AutoFlow(model, seed=0), torch.ones(2), steps=2)
    assert len(caught) == 1 and len(found.notes) == 1 and len(found.log_weights) >= 1000
    assert found.predictive(4)["y"].shape == (4, 2)


@pytest.mark.full
def test_arviz(fitted):
    az = pytest.importorskip("arviz")
    data = fitted.to_arviz(num_samples=500, constant_data={"x": X})
    assert data.posterior["a"].shape == (1, 500)
    torch.testing.assert_close(torch.as_tensor(data.observed_data["y"].values), Y)
    assert data.posterior_predictive["y"].shape == data.log_likelihood["y"].shape == (1, 500, 8)
    a, b = (torch.as_tensor(data.posterior[n].values[0]) for n in "ab")
    expected = dist.Normal(a[:, None] + b[:, None] * X, 0.5).log_prob(Y)
    torch.testing.assert_close(torch.as_tensor(data.log_likelihood["y"].values[0]), expected)
    weights = torch.as_tensor(data.sample_stats["log_weight"].values[0])
    torch.testing.assert_close(weights, fitted.log_weights[:500])
    loo = az.loo(data)
    # Leave-one-out by brute force: conjugate, one datum left out at a time.
    total = 0.0
    for i in range(8):
        keep = torch.arange(8) != i
        design = torch.stack([torch.ones(8), X], 1)
        cov = torch.linalg.inv(design[keep].mT @ design[keep] / 0.25 + torch.eye(2) / 4)
        mean = cov @ design[keep].mT @ Y[keep] / 0.25
        total += dist.Normal(design[i] @ mean, (design[i] @ cov @ design[i] + 0.25).sqrt()).log_prob(Y[i]).item()
    found = loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd  # ArviZ 0.x, 1.x
    assert float(found) == pytest.approx(total, abs=0.3)
    assert set(az.summary(data, var_names=["a", "b"]).index) == {"a", "b"}


@pytest.mark.full
def test_arviz_groups(hierarchical):
    plain = hierarchical.to_arviz(num_samples=20, posterior_predictive=False, log_likelihood=False, resampled=True)
    assert "posterior_predictive" not in plain and "log_likelihood" not in plain
    assert plain.posterior["theta"].shape == (1, 20, 4)
    full = hierarchical.to_arviz(num_samples=20)
    assert full.log_likelihood["z"].shape == (1, 20) and full.log_likelihood["y"].shape == (1, 20, 4)


# Saving


LOAD = """
import sys, torch
sys.path.insert(0, {root!r})
from pyro_flows.infer import load_guide
torch.manual_seed(99)
fit = load_guide({saved!r})
values, log_prob, label, khat = torch.load({points!r})
found = fit.log_prob(values)
assert (found - log_prob).abs().max() <= 1e-12 * log_prob.abs().max(), (found, log_prob)
assert fit.verdict.label == label and fit.khat == khat
assert fit.sample(5)["theta"].shape == (5, 4) and fit.sample(5, resampled=True)["weights"].shape == (5, 3)
assert fit.to_arviz().posterior["theta"].shape[-1] == 4
print(repr(fit))
"""


@pytest.mark.full
def test_saved_fit_in_another_process(hierarchical, tmp_path, request):
    path = tmp_path / "fit.pt"
    hierarchical.save(path)
    values = hierarchical.sample(20)
    points = (values, hierarchical.log_prob(values).detach(), hierarchical.verdict.label, hierarchical.khat)
    torch.save(points, tmp_path / "points.pt")
    code = LOAD.format(root=str(request.config.rootpath), saved=str(path), points=str(tmp_path / "points.pt"))
    assert output_of("-c", code).strip() == repr(hierarchical)


def test_saving_changes_nothing(hierarchical, tmp_path):
    hierarchical.save(tmp_path / "fit.pt")
    loaded = load_guide(tmp_path / "fit.pt")
    z = torch.randn(6, hierarchical.latents.dim)
    torch.testing.assert_close(loaded.flow.log_prob(z), hierarchical.flow.log_prob(z), rtol=0, atol=0)
    assert loaded.guide is None and hierarchical.guide is not None and loaded.notes == hierarchical.notes
    assert vars(loaded.history) == vars(hierarchical.history)
    loaded.save(tmp_path / "again.pt")
    again = load_guide(tmp_path / "again.pt")
    torch.testing.assert_close(again.log_weights, hierarchical.log_weights, rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))], ids=["deepcopy", "pickle"])
def test_copies_of_a_fit(hierarchical, copied):
    twin = copied(hierarchical)
    z = torch.randn(6, hierarchical.latents.dim)
    torch.testing.assert_close(twin.flow.log_prob(z), hierarchical.flow.log_prob(z), rtol=0, atol=0)
    assert twin.predictive(2)["y"].shape == (2, 4)


# What it survives


@pytest.mark.full
def test_densities_that_are_not_finite_in_places():
    """Draws without a density are dropped and counted, and the rest is fitted."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("hole", torch.where((x > 1.0) & (x < 1.2), -torch.inf, 0.0))

    found = fit(AutoFlow(model, num_particles=64, seed=0), steps=30)
    assert found.failures > 0 and found.failures == sum(found.history.failures)
    assert all(p.isfinite().all() for p in found.flow.parameters())
    draws = found.sample(10_000)["x"]
    assert abs(draws.mean()) < 0.3 and 0.4 < draws.std() < 1.3
    inside = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor([1.0, 1.2])).diff().item()
    assert abs(found.log_evidence - math.log1p(-inside)) < 0.3


@pytest.mark.full
@pytest.mark.parametrize("kind", full_but([ValueError, RuntimeError], ValueError))
def test_densities_that_raise_in_places(kind):
    """A constraint that breaks, or a factorisation that fails, at some draws."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if kind is ValueError:
            pyro.sample("y", dist.Exponential(x + 1), obs=torch.tensor(0.0))
        else:
            root = torch.linalg.cholesky((x + 1).unsqueeze(-1).unsqueeze(-1)).squeeze(-1).squeeze(-1)
            pyro.factor("y", 2 * root.log())

    found = fit(AutoFlow(model, num_particles=16, seed=0), steps=300)
    assert found.failures > 0 and all(p.isfinite().all() for p in found.flow.parameters())
    draws = found.sample(5000, resampled=True)["x"]
    # By quadrature.
    x = torch.linspace(-1, 6, 20_000)
    weight = dist.Normal(0.0, 1.0).log_prob(x).exp() * (x + 1)
    assert (draws > -1).all() and abs(draws.mean() - (x * weight).sum() / weight.sum()) < 0.08
    assert found.log_evidence == pytest.approx(weight.mean().mul(7).log().item(), abs=0.1)


def test_hopeless_densities_end():
    """Where hardly any draw has a density the fit ends with a word on what to do."""
    calls = 0

    def model():
        nonlocal calls
        calls += 1
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        if x.isnan().any() or calls > 40:  # asks for a value, so that no run is replayed
            raise RuntimeError("no more")

    with pytest.raises((ValueError, RuntimeError)) as caught:
        fit(AutoFlow(model, SMALL, start="prior", num_particles=4, seed=0), steps=2000, fit_prior=True)
    assert "no more" in str(caught.value) or "failed" in str(caught.value)


def with_parameter(y):
    sd = pyro.param("sd", torch.tensor(2.0), constraint=dist.constraints.positive)
    a = pyro.sample("a", dist.Normal(0.0, sd))
    pyro.sample("y", dist.Normal(a, 1.0), obs=y)


def test_parameters_of_the_model_are_held():
    """``pyro.param`` in the model keeps its value; the posterior is that at this value, and a warning says so."""
    with pytest.warns(UserWarning, match=r"parameters of the model \('sd'\) are held") as caught:
        found = fit(AutoFlow(with_parameter, seed=0), torch.tensor(1.0), steps=60)
    assert len(caught) == 1 and any("'sd'" in note for note in found.notes)
    assert pyro.param("sd").item() == 2.0
    assert abs(found.sample(10_000)["a"].mean() - 0.8) < 0.05
    expected = dist.Normal(0.0, math.sqrt(5.0)).log_prob(torch.tensor(1.0))
    assert abs(found.log_evidence - expected) < 2e-3


def test_copies_where_the_model_has_parameters():
    """A trace of such a model holds tensors that cannot be copied, and data that need not be."""
    guide = AutoFlow(with_parameter, start="prior", seed=0).setup(torch.tensor(1.0))
    twin = copy.deepcopy(guide)
    assert twin.prototype_trace is guide.prototype_trace and twin.latents is not guide.latents
    assert all(p is not q for p, q in zip(twin.parameters(), guide.parameters(), strict=True))
    assert twin(torch.tensor(1.0))["a"].shape == ()


@pytest.mark.full
def test_parameters_that_are_meant_to_be_held():
    """Frozen or hidden ones are no matter; modules count as ``pyro.param`` does."""

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.sd = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, y):
            a = pyro.sample("a", dist.Normal(0.0, self.sd))
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    model = Model()
    with pytest.warns(UserWarning, match="'sd'"):
        fit(AutoFlow(model, start="prior"), torch.tensor(1.0), steps=2)
    fit(AutoFlow(poutine.block(model, hide_types=["param"]), start="prior"), torch.tensor(1.0), steps=2)
    model.requires_grad_(False)
    assert not fit(AutoFlow(model, start="prior"), torch.tensor(1.0), steps=2).notes


@pytest.mark.full
def test_a_result_keeps_the_parameters_of_the_model():
    """Training ``pyro.param`` afterwards leaves predictions as they are; where a module changes, a warning says so."""

    def model(y):
        loc = pyro.param("loc", lambda: torch.randn(()))
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a + loc, 0.01), obs=y)

    layer = torch.nn.Linear(1, 1)

    def with_module(y):
        pyro.module("layer", layer)
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(layer(a.unsqueeze(-1)).squeeze(-1), 0.01), obs=y)

    with pytest.warns(UserWarning, match="'loc'"):
        found = fit(AutoFlow(model, start="prior", seed=0), torch.tensor(3.0), steps=30)
    pyro.set_rng_seed(0)
    before = found.predictive(5)["y"]
    for change in (lambda: pyro.param("loc").data.add_(10.0), pyro.clear_param_store):
        change()
        pyro.set_rng_seed(0)
        torch.testing.assert_close(found.predictive(5)["y"], before, rtol=0, atol=0)
    with pytest.warns(UserWarning, match="held"):
        found = fit(AutoFlow(with_module, start="prior", seed=0), torch.tensor(3.0), steps=2)
    found.predictive(2)
    with torch.no_grad():
        layer.weight += 1
    with pytest.warns(UserWarning, match="has changed since this fit"):
        found.predictive(2)


@pytest.mark.full
def test_subsampled_likelihood_is_not_judged():
    """Minibatches: the fit is near the whole posterior, and the verdict says that it cannot tell."""
    y = torch.randn(60) + 1

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(y), subsample_size=20) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    found = fit(AutoFlow(model, seed=0), y, steps=300)
    draws = found.sample(5000)["mu"]
    assert abs(draws.mean() - y.mean()) < 0.12 and 0.06 < draws.std() < 0.3
    assert found.verdict.label == "not judged"


# The loop's own parts.


def test_emphasis_follows_both_divergences():
    """Weighted by it, path gradients add up to those of KL(q | p) + KL(p | q), here of normals."""
    generator = seeded(0)
    u = torch.randn(400_000, generator=generator, dtype=torch.float64)
    loc, scale = 0.15, 0.9
    z = loc + scale * u
    log_weights = -0.5 * z**2 + 0.5 * u**2 + math.log(scale)
    pull = -z + u / scale  # d (log p - log q) / dz
    share = emphasis(log_weights + 3.0, torch.ones_like(z, dtype=torch.bool))
    assert abs(share.mean() - 1) < 1e-2
    found = torch.stack(((-2 * share * pull).mean(), (-2 * share * pull * u).mean()))
    # KL(q | p) = (s^2 + m^2 - 1) / 2 - log s and KL(p | q) = (1 + m^2) / (2 s^2) - 1/2 + log s, after m and s.
    by_loc = loc + loc / scale**2
    by_scale = (scale - 1 / scale) + (-(1 + loc**2) / scale**3 + 1 / scale)
    torch.testing.assert_close(found, torch.tensor([by_loc, by_scale], dtype=torch.float64), rtol=0.03, atol=0.01)


def test_emphasis_waits_for_even_weights():
    fine = torch.ones(4, dtype=torch.bool)
    assert torch.equal(emphasis(torch.tensor([0.0, 4.0, -4.0, 8.0]), fine), torch.ones(4))
    torch.testing.assert_close(emphasis(torch.full((4,), 7.0), fine), torch.ones(4))
    # What failed has no say, and the heaviest draw is held back.
    fine = torch.tensor([True] * 63 + [False])
    share = emphasis(torch.tensor([5.0] + [0.0] * 62 + [math.nan]), fine)
    assert share.isfinite().all() and share[0] <= 5.5


@pytest.mark.full
def test_adam_is_that_of_torch():
    generator = seeded(0)
    starts = [torch.randn(4, 3, generator=generator), torch.randn(5, generator=generator)]
    ours = [torch.nn.Parameter(s.clone()) for s in starts]
    theirs = [torch.nn.Parameter(s.clone()) for s in starts]
    adam, reference = AdamW(ours), torch.optim.Adam(theirs)
    for step in range(20):
        rate = 0.1 / (step + 1)
        reference.param_groups[0]["lr"] = rate
        adam.take(torch.autograd.grad(sum((p**4).sum() for p in ours), ours))
        adam.step(rate)
        reference.zero_grad()
        sum((p**4).sum() for p in theirs).backward()
        reference.step()
    adam.release()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.full
@pytest.mark.parametrize("dependencies", ["model", "dense"])
def test_steps_that_break_the_state_are_taken_back(dependencies, monkeypatch):
    """At these rates single steps leave no draw with a density."""
    monkeypatch.setattr(loop, "RATES", (3.0, 1e-4))
    monkeypatch.setattr(loop, "CAREFUL_RATES", (3.0, 1e-4))

    def members(y):
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with pyro.plate("members", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("theta", dist.Normal(mu, tau)), 0.5), obs=y)

    y = torch.linspace(-2.0, 3.0, 12)
    fit = fit_guide(AutoFlow(members, dependencies=dependencies, seed=0), y, steps=300, progress=False)
    assert any(map(math.isnan, fit.history.elbo)) and math.isfinite(fit.history.elbo[-1])
    assert all(v.isfinite().all() for v in fit.flow.state_dict().values()) and fit.ess > 0.1


@pytest.mark.parametrize("harm", [math.nan, 1e30])
def test_a_last_step_without_a_record_does_not_spoil_the_state(harm):
    flow = AutoFlow(regression, SMALL, seed=0).setup(X, Y).flow
    training = loop.GuideTraining(flow, lambda z: -z.square().sum(-1), Budget(60, None, 0.0), num_particles=8)
    training._best = -1.0, training.snapshot()
    before = copy.deepcopy(flow.state_dict())
    for _ in range(50):
        training._note("flow", -1.0, 0.1, 1e-3, 1.0, 0)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += harm
    training._remember()
    training._restore()
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())
