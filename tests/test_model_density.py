"""What counts as the model: masks, scales, parts of the data, discrete and hidden sites; against other ways."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import seeded
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import init_to_value
from pyro.infer.reparam import LocScaleReparam
from pyro.ops.indexing import Vindex

import pyro_flows as pf
from pyro_flows.infer import AutoFlow, fit_guide
from pyro_flows.infer.models.enumeration import unblocked
from pyro_flows.infer.models.sites import run

pytestmark = pytest.mark.usefixtures("double")

SMALL = partial(pf.realnvp, num_layers=2, hidden_dims=(8,))
fit = partial(fit_guide, progress=False)
Y = torch.tensor([-2.3, -1.4, 2.9, 2.2, -1.7, 3.1], dtype=torch.float64)


def guide(model, **options):
    return AutoFlow(model, SMALL, seed=0, **{"start": "prior", **options})


def densities(model, *args, count=5):
    """Draws of the latents by site, the log-density there, and that of the supports' Jacobians."""
    made = guide(model).hide_discrete(*args).setup(*args)
    density = made.density(*args)
    z = torch.randn(count, made.latents.dim)
    values, ladj = made.latents.unpack(z)
    return values, density(z), ladj, density


# Nothing observed


def pair(y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", 6):
        return pyro.sample("y", dist.Normal(a, s), obs=y)


@pytest.mark.parametrize(
    "hide",
    [
        lambda m: poutine.block(m, expose=["a", "s"]),
        lambda m: poutine.block(m, hide_types=["observe"], hide_fn=lambda site: site["name"] == "y"),
        lambda m: poutine.block(poutine.scale(m, scale=2.0), hide=["y"]),
        lambda m: poutine.condition(poutine.block(m, expose=["a", "s"]), data={"s": torch.tensor(1.0)}),
    ],
)
def test_hidden_observations_are_refused(hide):
    with pytest.raises(ValueError, match=r"nothing is observed.*hides the observations \['y'\].*hide=\[...\]"):
        fit(guide(hide(pair)), Y, steps=1)


def test_data_that_hang_on_no_latent_are_none():
    """A covariate says nothing of the latents; what a discrete latent hangs on does."""

    def model(x, y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Beta(2.0, 2.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        z = pyro.sample("z", dist.Bernoulli(w))
        pyro.sample("y", dist.Normal(4 * z - 2, 1.0), obs=y)
        return a

    with pytest.raises(ValueError, match=r"nothing is observed.*hides the observations \['y'\]"):
        fit(guide(poutine.block(model, hide=["y", "z"])), Y[0], Y[1], steps=1)
    assert fit(AutoFlow(model, seed=0), Y[0], Y[1], steps=20).verdict.ok


def test_a_prior_is_fitted_on_purpose_alone():
    refuses(ValueError, r"nothing is observed.*no pyro\.factor.*fit_prior=True", fit, guide(pair), steps=1)
    refuses(ValueError, r"fit_prior=True.*this one has data", fit, guide(pair), Y, steps=1, fit_prior=True)
    found = fit(AutoFlow(poutine.block(pair, expose=["a", "s"]), seed=0), Y, steps=60, fit_prior=True)
    assert abs(found.log_evidence) < 1e-3 and abs(found.sample(20_000)["a"].mean()) < 0.05


@pytest.mark.full
def test_factors_and_conditioned_sites_are_data():
    def by_factor():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.factor("data", dist.Normal(a, 1.0).log_prob(torch.tensor(1.0)))

    expected = dist.Normal(0.0, math.sqrt(2.0)).log_prob(torch.tensor(1.0))
    assert abs(fit(AutoFlow(by_factor, seed=0), steps=20).log_evidence - expected) < 1e-3
    conditioned = poutine.condition(pair, data={"y": Y, "s": torch.tensor(1.0)})
    marginal = dist.MultivariateNormal(torch.zeros(6), torch.eye(6) + 1.0).log_prob(Y)
    fixed = dist.LogNormal(0.0, 1.0).log_prob(torch.tensor(1.0))  # a constant of the density
    assert abs(fit(AutoFlow(conditioned, seed=0), steps=20).log_evidence - marginal - fixed) < 1e-3


def test_data_under_a_mask_that_leaves_none():
    for mask in (False, torch.zeros(6).bool()):
        refuses(ValueError, "nothing is observed", fit, guide(poutine.mask(pair, mask=mask)), Y, steps=1)


@pytest.mark.full
@pytest.mark.parametrize("block", [{"expose": ["stay"]}, {"hide_fn": lambda site: site["name"] != "stay"}])
def test_where_all_data_of_a_chain_are_hidden(block):
    """Pyro's enumeration keeps track of all sites of a markov chain, hidden ones as well."""

    def model(y):
        stay = pyro.sample("stay", dist.Beta(2.0, 2.0))
        x = torch.tensor(1.0)
        for t in pyro.markov(range(4)):
            x = pyro.sample(f"x{t}", dist.Bernoulli(stay * x + 0.1 * (1 - x)), infer={"enumerate": "parallel"})
            pyro.sample(f"y{t}", dist.Bernoulli(0.1 + 0.8 * x), obs=y[t])

    for y, low, high in ((torch.ones(4), 0.6, 0.9), (torch.zeros(4), 0.1, 0.5)):
        assert low < AutoFlow(poutine.block(model, **block), seed=0).setup(y).median()["stay"] < high


def test_where_all_data_are_hidden_the_start_is_the_one_given():
    """A guide of some sites, for an ELBO that sees the whole model."""
    chosen = {"a": torch.tensor(2.5), "s": torch.tensor(0.3)}
    hidden = poutine.block(pair, expose=["a", "s"])
    median = AutoFlow(hidden, seed=0, init_loc_fn=init_to_value(values=chosen)).setup(Y).median()
    assert all((median[name] - value).abs() < 0.02 for name, value in chosen.items())
    # Without a choice, at the posterior of the whole model.
    assert (AutoFlow(hidden, seed=0).setup(Y).median()["s"] - 2.3).abs() < 1.0


# A part of the data


@pytest.mark.parametrize("index", [torch.arange(3), torch.tensor([0, 2, 4, 5, 5])])
def test_a_part_by_index_is_not_judged(index):
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", len(y), subsample=index) as i:
            pyro.sample("y", dist.Normal(a, 1.0), obs=y[i])

    found = fit(guide(model), Y, steps=2)
    assert found.verdict.label == "not judged" and not found.verdict.ok
    with pytest.warns(UserWarning, match="sees a part of its data"):
        data = found.to_arviz()
    assert not {"log_likelihood", "posterior_predictive", "observed_data"} & set(dir(data))


def test_all_data_by_index_are_judged():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", len(y), subsample=torch.randperm(6, generator=seeded(0))) as i:
            pyro.sample("y", dist.Normal(a, 1.0), obs=y[i])

    assert fit(guide(model), Y, steps=2).verdict.label != "not judged"


# Masks


def partly(y, seen, event):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        noise = dist.Normal(mu.unsqueeze(-1) + torch.zeros(2), 1.0).to_event(1) if event else dist.Normal(mu, 1.0)
        pyro.sample("y", noise, obs=torch.stack([y, y], -1) if event else y, obs_mask=seen)


@pytest.mark.full
@pytest.mark.parametrize("event", [False, True])
@pytest.mark.parametrize("seen", [[1, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 1], [1] * 6])
def test_missing_data_under_a_mask(event, seen):
    seen = torch.tensor(seen).bool()
    found = fit(AutoFlow(partly, seed=0), Y, seen, event, steps=80)
    data = Y[seen].repeat_interleave(2) if event else Y[seen]
    precision = 0.25 + len(data)
    marginal = dist.MultivariateNormal(torch.zeros(len(data)), 4.0 + torch.eye(len(data)))
    assert abs(found.log_evidence - marginal.log_prob(data)) < 0.02
    draws = found.sample(20_000)["mu"]
    assert abs(draws.mean() - data.sum() / precision) < 0.02 and abs(draws.std() - precision**-0.5) < 0.02


def padded(y, inside, where):
    """Local latents of series of different lengths, the mask by a handler or in the distributions."""
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("series", 2, dim=-2), pyro.plate("time", 3, dim=-1):
        if where == "handler":
            with poutine.mask(mask=inside):
                z = pyro.sample("z", dist.Normal(0.0, s))
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        else:
            z = pyro.sample("z", dist.Normal(0.0, s).mask(inside))
            pyro.sample("y", dist.Normal(z, 1.0).mask(inside), obs=y)


@pytest.mark.parametrize("where", ["handler", "distribution"])
def test_padded_series(where):
    """Padding keeps its own density, so that the joint density is that of the rest times it."""
    inside = torch.tensor([[True, False, False], [True, True, True]])
    y = Y.reshape(2, 3)
    values, log_p, ladj, density = densities(padded, y, inside, where)
    assert density.vectorized
    s, z = values["s"], values["z"]
    expected = dist.HalfNormal(1.0).log_prob(s) + dist.Normal(0.0, s[:, None, None]).log_prob(z).sum((-1, -2))
    expected = expected + (dist.Normal(z, 1.0).log_prob(y) * inside).sum((-1, -2)) + ladj
    assert torch.allclose(log_p, expected)


@pytest.mark.full
def test_a_chain_under_a_mask():
    """The state after the end hangs on the state before it; nothing that counts hangs on it."""

    def model(y, lengths):
        s = pyro.sample("s", dist.HalfNormal(1.0))
        z = torch.zeros(2)
        with pyro.plate("series", 2):
            for t in range(3):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z{t}", dist.Normal(z, s))
                    pyro.sample(f"y{t}", dist.Normal(z, 1.0), obs=y[:, t])

    found = fit(AutoFlow(model, seed=0), Y.reshape(2, 3), torch.tensor([1, 3]), steps=250)
    grid = torch.linspace(1e-3, 6.0, 4000)
    walk = torch.tensor([[1.0, 1, 1], [1, 2, 2], [1, 2, 3]])
    first = dist.Normal(0.0, (grid**2 + 1).sqrt()).log_prob(Y[0])
    second = dist.MultivariateNormal(torch.zeros(3), grid[:, None, None] ** 2 * walk + torch.eye(3)).log_prob(Y[3:])
    whole = dist.HalfNormal(1.0).log_prob(grid) + first + second
    assert abs(found.log_evidence - torch.logsumexp(whole, 0) - (grid[1] - grid[0]).log()) < 0.02


def test_flat_priors_by_mask_stay_flat():
    """What ``mask(False)`` makes improper and the data need is no padding."""

    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0).mask(False))
        b = pyro.sample("b", dist.Normal(0.0, 0.1).expand([2]).mask(torch.tensor([True, False])).to_event(1))
        with pyro.plate("rows", 6):
            pyro.sample("y", dist.Normal(a + b.sum(-1, keepdim=True).squeeze(-1), 1.0), obs=y)

    values, log_p, _, _ = densities(model, Y)
    a, b = values["a"], values["b"]
    expected = dist.Normal(0.0, 0.1).log_prob(b[:, 0]) + dist.Normal((a + b.sum(-1))[:, None], 1.0).log_prob(Y).sum(-1)
    assert torch.allclose(log_p, expected)


def test_masked_data_are_no_data_in_arviz():
    def model(y, known):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("cols", 2, dim=-1), pyro.plate("rows", 3, dim=-2), poutine.mask(mask=known):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y, known = Y.reshape(3, 2), torch.tensor([[True, True], [False, True], [True, False]])
    found = fit(AutoFlow(model, seed=0), torch.where(known, y, -100.0), known, steps=20)
    data = found.to_arviz()
    mu = torch.as_tensor(data.posterior["mu"].values)[0]
    expected = dist.Normal(mu[:, None], 1.0).log_prob(y[known])
    assert torch.allclose(torch.as_tensor(data.log_likelihood["y"].values)[0], expected)
    assert torch.equal(torch.as_tensor(data.observed_data["y"].values), y[known])
    assert data.posterior_predictive["y"].shape == (1, 2000, 4)
    assert found.predictive(5)["y"].shape == (5, 3, 2)


def test_log_likelihoods_are_those_of_the_density():
    """Prior and log-likelihoods add up to the log-density, whatever the scale."""

    def model(y, weight):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", 6), poutine.scale(scale=weight):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    for weight in (0.5, torch.tensor([1.0, 2, 3, 1, 1, 4])):
        data = fit(AutoFlow(model, seed=0), Y, weight, steps=20).to_arviz()
        mu, lp = (torch.as_tensor(group.values)[0] for group in (data.posterior["mu"], data.sample_stats["lp"]))
        likelihood = torch.as_tensor(data.log_likelihood["y"].values)[0].sum(-1)
        assert torch.allclose(likelihood + dist.Normal(0.0, 2.0).log_prob(mu), lp)


# What is drawn anew


@pytest.mark.full
def test_what_is_fixed_stays_fixed():
    def model(x):
        sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", 6):
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            at = pyro.sample("x", dist.Normal(slope, 1.0), obs=x)
            return pyro.sample("y", dist.Normal(slope * at + 100 * kind, sigma))

    x, kind = torch.arange(6.0), torch.tensor([0.0, 1, 0, 1, 0, 1])
    given = {"sigma": torch.tensor(0.1), "kind": kind, "y": 2 * x + 100 * kind}
    found = fit(AutoFlow(poutine.condition(model, data=given), seed=0), x, steps=40)
    drawn = found.predictive(200)
    assert (drawn["sigma"] == 0.1).all() and (drawn["kind"] == kind).all() and (drawn["x"] == x).all()
    assert (drawn["y"].mean(0) - given["y"]).abs().max() < 0.2 and (drawn["y"] != given["y"]).all()
    data = found.to_arviz()
    assert list(data.posterior_predictive) == ["y"] and set(data.log_likelihood) == {"x", "y"}
    anew = found.predictive(200, redraw=["x", "kind"])
    assert (anew["y"] == given["y"]).all() and (anew["x"] != x).any() and set(anew["kind"].unique().tolist()) == {0, 1}
    assert set(found.to_arviz(redraw="all").posterior_predictive) == {"sigma", "kind", "x", "y"}
    # New covariates: what is not observed is drawn, what is given stays.
    new = fit(AutoFlow(pair_on, seed=0), x, 2 * x, steps=20).predictive(200, x + 10.0, None)
    assert (new["x"] == x + 10.0).all() and (new["y"].mean(0) - 2 * (x + 10)).abs().max() < 1.0
    refuses(ValueError, r"redraw.*\['z'\]", found.predictive, 2, redraw="z")


def test_what_a_reparametrization_makes_is_computed():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 6):
            theta = pyro.sample("theta", dist.Normal(mu, 2.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    found = fit(AutoFlow(poutine.reparam(model, {"theta": LocScaleReparam(0.0)}), seed=0), Y, steps=20)
    exact = dist.MultivariateNormal(torch.zeros(6), 5 * torch.eye(6) + 1.0).log_prob(Y)
    assert abs(found.log_evidence - exact) < 0.01
    draws, data = found.predictive(5), found.to_arviz(num_samples=100)
    assert draws["theta"].shape == (5, 6) and (draws["theta"] != draws["y"]).all()
    posterior = {name: torch.as_tensor(data.posterior[name].values)[0] for name in ("mu", "theta", "theta_decentered")}
    assert torch.allclose(posterior["theta"], posterior["mu"][:, None] + 2 * posterior["theta_decentered"])
    assert list(data.posterior_predictive) == list(data.log_likelihood) == ["y"]


def pair_on(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(x)):
        at = pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        pyro.sample("y", dist.Normal(slope * at, 0.1), obs=y)


def test_what_hangs_on_no_latent_is_drawn_for_each():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("u", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3))
        with pyro.plate("rows", 6):
            pyro.sample("kind", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    drawn = fit(guide(model), Y, steps=1).predictive(400)
    assert len(drawn["u"].unique()) == 400 and abs(drawn["u"].std() - 1.0) < 0.2
    assert (drawn["kind"].mean(0) - 0.5).abs().max() < 0.15


def test_what_is_fixed_stays_fixed_where_pyro_sees_no_dependence():
    """In NumPy and in place, too."""

    def model(x, y, way):
        slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
        at = pyro.sample("x", dist.Normal(torch.zeros(6), 1.0).to_event(1), obs=x)
        if way == "numpy":
            mean = torch.as_tensor(at.detach().cpu().numpy().copy())
        else:
            mean = torch.zeros(6)
            mean[:] = at
        pyro.sample("y", dist.Normal(slope.unsqueeze(-1) * mean, 0.1).to_event(1), obs=y)

    x = torch.arange(6.0)
    for way in ("numpy", "in place"):
        found = fit(guide(model), x, 2 * x, way, steps=60)
        drawn = found.predictive(100)
        assert (drawn["x"] == x).all() and (drawn["y"] != 2 * x).any()
        assert list(found.to_arviz(num_samples=50).log_likelihood) == ["y"]


# Discrete latents


def mixture(y):
    w = pyro.sample("w", dist.Beta(2.0, 2.0))
    with pyro.plate("components", 2):
        mu = pyro.sample("mu", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Bernoulli(w))
        pyro.sample("y", dist.Normal(torch.where(z > 0, mu[..., 1:], mu[..., :1]), 1.0), obs=y)


def of_mixture(values, y):
    w, mu = values["w"][:, None], values["mu"]
    parts = [w.log() + dist.Normal(mu[:, 1:], 1.0).log_prob(y), (1 - w).log() + dist.Normal(mu[:, :1], 1.0).log_prob(y)]
    prior = dist.Beta(2.0, 2.0).log_prob(values["w"]) + dist.Normal(torch.tensor([-2.0, 2.0]), 1.0).log_prob(mu).sum(-1)
    return prior, torch.logsumexp(torch.stack(parts), 0)


@pytest.mark.parametrize(
    "form",
    [
        lambda m: m,
        config_enumerate,
        lambda m: poutine.block(m, hide=["z"]),
        lambda m: poutine.block(config_enumerate(m), hide=["z"]),
        lambda m: poutine.scale(poutine.block(poutine.scale(m, scale=0.5), hide=["z"]), scale=2.0),
    ],
)
def test_discrete_latents_are_summed_out(form):
    values, log_p, ladj, density = densities(form(mixture), Y)
    prior, each = of_mixture(values, Y)
    assert torch.allclose(log_p, prior + each.sum(-1) + ladj) and density.vectorized


@pytest.mark.full
def test_a_fit_of_a_mixture():
    found = fit(AutoFlow(mixture, seed=0), Y, steps=150)
    grid = torch.linspace(-6, 6, 121)
    w = torch.linspace(0.005, 0.995, 100)
    values = torch.cartesian_prod(w, grid, grid)
    prior, each = of_mixture({"w": values[:, 0], "mu": values[:, 1:]}, Y)
    exact = torch.logsumexp(prior + each.sum(-1), 0) + math.log(0.01 * 0.1 * 0.1)
    assert abs(found.log_evidence - exact) < 0.05 and found.verdict.ok
    data = found.to_arviz()
    draws = {name: torch.as_tensor(data.posterior[name].values)[0] for name in ("w", "mu")}
    assert torch.allclose(torch.as_tensor(data.log_likelihood["y"].values)[0], of_mixture(draws, Y)[1])
    assert 0 < pytest.importorskip("arviz").loo(data).p_loo < 6
    drawn = found.predictive(300)
    assert drawn["z"].shape == drawn["y"].shape == (300, 6) and set(drawn["z"].unique().tolist()) == {0.0, 1.0}


def test_a_global_label():
    """One label for all data: they have no log-likelihoods of their own."""

    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 2.0))
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.7, 0.3])))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(m * (1 - 2 * z), 1.0), obs=y)

    values, log_p, _, _ = densities(model, Y)
    m = values["m"][:, None]
    parts = [math.log(p) + dist.Normal(s * m, 1.0).log_prob(Y).sum(-1) for p, s in ((0.7, 1), (0.3, -1))]
    assert torch.allclose(log_p, dist.Normal(0.0, 2.0).log_prob(m[:, 0]) + torch.logsumexp(torch.stack(parts), 0))
    found = fit(guide(model), Y, steps=1)
    with pytest.warns(UserWarning, match="no log-likelihood of 'y'.*outside of its plates"):
        assert "log_likelihood" not in dir(found.to_arviz(posterior_predictive=False))


def test_hidden_markov_models_of_different_lengths():
    """Against the forward recursion of each series; a masked state adds no log K."""
    lengths, y = torch.tensor([2, 3]), Y.reshape(2, 3)

    def model(y, lengths):
        stay = pyro.sample("stay", dist.Beta(2.0, 2.0).expand([2]).to_event(1))
        with pyro.plate("series", 2):
            x = torch.tensor(0)
            for t in pyro.markov(range(3)):
                with poutine.mask(mask=t < lengths):
                    x = pyro.sample(f"x{t}", dist.Categorical(_row(stay, x)))
                    pyro.sample(f"y{t}", dist.Normal(4.0 * x - 2.0, 1.0), obs=y[:, t])

    def _row(stay, x):
        p = torch.where(x == 0, stay[..., 0], stay[..., 1])
        return torch.stack([p, 1 - p], -1)

    values, log_p, ladj, density = densities(model, y, lengths)
    expected = dist.Beta(2.0, 2.0).log_prob(values["stay"]).sum(-1) + ladj
    for row, stay in enumerate(values["stay"]):
        moves = torch.stack([torch.stack([p, 1 - p]) for p in stay]).log()
        for series in range(2):
            alpha = moves[0]
            for t in range(int(lengths[series])):
                if t:
                    alpha = torch.logsumexp(alpha[:, None] + moves, 0)
                alpha = alpha + dist.Normal(torch.tensor([-2.0, 2.0]), 1.0).log_prob(y[series, t])
            expected[row] += torch.logsumexp(alpha, 0)
    assert torch.allclose(log_p, expected) and density.vectorized


def test_minibatches_of_a_mixture_are_scaled():
    def model(y):
        w = pyro.sample("w", dist.Beta(2.0, 2.0))
        with pyro.plate("rows", len(y), subsample=torch.arange(3)) as i:
            z = pyro.sample("z", dist.Bernoulli(w))
            pyro.sample("y", dist.Normal(4 * z - 2, 1.0), obs=y[i])

    values, log_p, ladj, _ = densities(model, Y)
    w = values["w"][:, None]
    parts = [w.log() + dist.Normal(2.0, 1.0).log_prob(Y[:3]), (1 - w).log() + dist.Normal(-2.0, 1.0).log_prob(Y[:3])]
    likelihood = 2 * torch.logsumexp(torch.stack(parts), 0).sum(-1)
    assert torch.allclose(log_p, dist.Beta(2.0, 2.0).log_prob(w[:, 0]) + likelihood + ladj)


def test_what_cannot_be_summed_out_is_refused_in_words():
    def event(y):
        z = pyro.sample("z", dist.Bernoulli(0.4).expand([3]).to_event(1))
        pyro.sample("y", dist.Normal(pyro.sample("a", dist.Normal(0.0, 1.0)) + z.sum(-1), 1.0), obs=y)

    def branch(y):
        a, z = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("z", dist.Bernoulli(0.4))
        pyro.sample("y", dist.Normal(a if z > 0.5 else -a, 1.0), obs=y)

    def delta(y):
        b = pyro.sample("b", dist.Delta(2 * pyro.sample("a", dist.Normal(0.0, 1.0))))
        pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    for model, match in (
        (event, r"'z' .*pyro\.plate, not by to_event"),
        (branch, r"(?s)\['z'\] are summed out.*torch\.where, not by `if`"),
        (delta, r"'b' is a Delta.*pyro\.deterministic\('b', value\)"),
    ):
        refuses(ValueError, match, fit, guide(model), Y[0], steps=1)


@pytest.mark.full
def test_scales_that_differ_are_refused():
    def model(y):
        w = pyro.sample("w", dist.Beta(2.0, 2.0))
        z = pyro.sample("z", dist.Bernoulli(w))
        with pyro.plate("rows", len(y), subsample=torch.arange(3)) as i:
            pyro.sample("y", dist.Normal(4 * z - 2, 1.0), obs=y[i])

    refuses(ValueError, r"cannot sum out.*one scale", fit, guide(model), Y, steps=1)
    # Stock SVI has ways of its own; the guide starts at the initial point.
    made = AutoFlow(
        poutine.block(model, hide=["z"]), seed=0, init_loc_fn=init_to_value(values={"w": torch.tensor(0.3)})
    )
    assert abs(made.setup(Y).median()["w"] - 0.3) < 0.1


def test_what_blocks_hide_is_let_through_by_name():
    model = poutine.block(poutine.scale(poutine.block(mixture, hide=["y"]), scale=2.0), hide=["z"])
    assert set(run(unblocked(model), (Y,), {}, {}).nodes) >= {"w", "mu", "z", "y"}
    assert "y" not in run(unblocked(model, ["z"]), (Y,), {}, {}).nodes
    assert run(unblocked(model, ["y"]), (Y,), {}, {}).nodes["y"]["scale"] == 2.0
    assert unblocked(mixture) is mixture
    # A part of the data that is hidden on purpose stays hidden; a discrete latent does not.
    made = guide(poutine.block(mixture_of_two, hide=["z", "other"])).setup(Y)
    values, _ = made.latents.unpack(torch.zeros(1, 3))
    prior, each = of_mixture(values, Y)
    assert torch.allclose(
        made.density(Y)(torch.zeros(1, 3)), prior + each.sum(-1) + made.latents.unpack(torch.zeros(1, 3))[1]
    )


def mixture_of_two(y):
    mixture(y)
    pyro.sample("other", dist.Normal(0.0, 1.0), obs=torch.tensor(5.0))


def test_stock_svi_starts_near_the_posterior_of_an_enumerated_model():
    made = AutoFlow(poutine.block(config_enumerate(mixture), hide=["z"]), seed=0).setup(Y)
    median = made.median()
    assert (median["mu"] - torch.tensor([-1.85, 2.45])).abs().max() < 0.5


@pytest.mark.full
def test_models_that_do_not_broadcast_are_summed_one_at_a_time():
    def model(y):
        with pyro.plate("components", 2):
            mu = pyro.sample("mu", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("y", dist.Normal(Vindex(mu)[..., z], 1.0), obs=y)

    values, log_p, _, density = densities(model, Y)
    assert not density.vectorized
    assert "does not broadcast" in density.why_not and "Vindex(mu.unsqueeze(-2))[..., z]" in density.why_not
    parts = [math.log(p) + dist.Normal(values["mu"][:, k, None], 1.0).log_prob(Y) for k, p in enumerate((0.4, 0.6))]
    prior = dist.Normal(torch.tensor([-2.0, 2.0]), 1.0).log_prob(values["mu"]).sum(-1)
    assert torch.allclose(log_p, prior + torch.logsumexp(torch.stack(parts), 0).sum(-1))
