"""What a guide cannot do it refuses in words, with the site's name and what to do instead."""

import pickle
import random
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import init_to_feasible, init_to_mean, init_to_median, init_to_sample, init_to_value
from pyro.infer.autoguide.initialization import init_to_generated, init_to_uniform
from pyro.infer.reparam import ProjectedNormalReparam
from pyro.optim import Adam
from torch.distributions import constraints

import pyro_flows as pf
from pyro_flows.infer import AutoFlow, fit_guide, load_guide

SMALL = partial(pf.realnvp, num_layers=2, hidden_dims=(8,))
Quick = partial(AutoFlow, builder=SMALL, start="prior", seed=0)
fit = partial(fit_guide, progress=False)
Y = torch.tensor([1.0, 2.0, 4.0])


def plain(y=None, size=3):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", size):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def in_every_way(model, *args, match, kind=ValueError):
    """By setup, by the first step of SVI, by fit_guide; and again at a second attempt."""
    guide = Quick(model)
    for _ in range(2):
        refuses(kind, match, guide.setup, *args)
    refuses(kind, match, SVI(model, Quick(model), Adam({"lr": 1e-3}), Trace_ELBO()).step, *args)
    refuses(kind, match, fit, model, *args, steps=1)


# Models


def test_no_or_empty_latents():
    def model():
        pyro.sample("y", dist.Normal(0, 1), obs=torch.tensor(0.0))

    in_every_way(model, match="no latent variables")
    in_every_way(poutine.block(plain, hide=["mu", "theta"]), Y, match="no latent variables")
    in_every_way(lambda: None, match="no latent variables")
    in_every_way(lambda: pyro.sample("x", dist.Normal(torch.zeros(0), 1).to_event(1)), match=r"\['x'\] are all empty")


@pytest.mark.parametrize("vector", [False, True])
def test_support_of_another_latent(vector):
    def model():
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        wide = dist.Uniform(0.0, top.unsqueeze(-1).expand((*top.shape, 2))).to_event(1)
        pyro.sample("x", wide if vector else dist.Uniform(0.0, top))

    in_every_way(model, match="support of site 'x' depends on another latent.*x = b \\* u")


def test_support_of_another_latent_given_as_a_number():
    def model():
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        inside = dist.constraints.independent(dist.constraints.interval(0.0, float(top)), 1)
        pyro.sample("x", dist.ImproperUniform(inside, (), (2,)))

    in_every_way(model, match="support of site 'x' depends on another latent")


def test_support_given_by_data_is_fine():
    def model(top):
        pyro.sample("x", dist.Uniform(0.0, top))

    guide = Quick(model).setup(torch.tensor(3.0))
    assert (guide.sample_posterior(50)["x"] <= 3).all()


def test_sites_that_come_and_go():
    def gone():
        x = pyro.sample("x", dist.Normal(0, 1))
        if x <= 0:
            pyro.sample("below", dist.Normal(0, 1))

    def added():
        x = pyro.sample("x", dist.Normal(0, 1))
        if x > 0:
            pyro.sample("above", dist.Normal(0, 1))

    def shaped():
        x = pyro.sample("x", dist.Normal(0, 1))
        pyro.sample("z", dist.Normal(torch.zeros(2 if x > 0 else 3), 1).to_event(1))

    for seed in range(4):  # whatever the direction in which it looks
        pyro.set_rng_seed(seed)
        for model, word in (
            (gone, "'below'.*is missing"),
            (added, "'above'.*only at some"),
            (shaped, "'z'.*has shape"),
        ):
            with pytest.raises(ValueError, match=f"(?s){word}.*same sites in every run"):
                AutoFlow(model, SMALL, start="prior", seed=seed).setup()


def test_not_finite_at_the_start():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0, 1))
        with pyro.plate("rows", len(y)):
            pyro.sample("good", dist.Normal(mu, 1.0), obs=torch.zeros(len(y)))
            pyro.sample("late", dist.Normal(mu, 1.0), obs=y)

    pyro.enable_validation(False)
    try:
        with pytest.raises(ValueError, match=r"comes from 'late' \(nan\)\. Check.*init_loc_fn"):
            Quick(model).setup(torch.tensor([0.0, torch.nan]))
    finally:
        pyro.enable_validation(True)
    # With validation on the distribution raises, and its words come through as well.
    in_every_way(
        model, torch.tensor([0.0, torch.nan]), match=r"(?s)comes from 'late' \(nan\) \(ValueError.*support.*Real"
    )

    def impossible():
        x = pyro.sample("x", dist.Normal(0, 1))
        pyro.factor("wall", torch.full_like(x, -torch.inf))

    in_every_way(impossible, match=r"comes from 'wall' \(-inf\)")


def test_raises_at_the_start():
    def model():
        x = pyro.sample("x", dist.Normal(0, 1))
        raise RuntimeError(f"the model's own words {x.shape}")

    refuses(RuntimeError, "the model's own words", Quick(model).setup)


def test_begins_nearby_if_the_middle_is_no_good():
    """The middle of the supports has no density; a point near it has."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1).to_event(1))
        pyro.factor("apart", (x[..., 0] - x[..., 1]).abs().log())

    guide = AutoFlow(model, SMALL, seed=0).setup()
    assert guide.flow.sample((3,)).isfinite().all()


def test_sequential_plate():
    in_every_way(one_by_one, match="'x_0' lies in the sequential plate 'years'.*with pyro.plate")


def test_sequential_plate_of_data_is_fine():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0, 1))
        for i in pyro.plate("rows", 3):
            pyro.sample(f"y_{i}", dist.Normal(mu, 1), obs=y[i])

    assert fit(Quick(model), Y, steps=1).sample(2)["mu"].shape == (2,)


def test_subsampled_local_latents():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0, 1))
        with pyro.plate("rows", len(y), subsample_size=2):
            theta = pyro.sample("theta", dist.Normal(mu, 1))
            pyro.sample("y", dist.Normal(theta, 1), obs=y[:2])

    in_every_way(model, Y, match="'theta' lies in the plate 'rows', of which a run sees 2 of 3.*amortize")


# How the first trace gets its values says nothing about what a guide can represent.
INITS = [
    None,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value(values={}),
    init_to_value(values={}, fallback=init_to_mean),
    init_to_generated(generate=lambda: init_to_sample),
]
init_ids = [str(number) for number in range(len(INITS))]


def discrete():
    k = pyro.sample("kind", dist.Categorical(torch.ones(2)))
    pyro.sample("x", dist.Normal(k.float(), 1))


def counts():
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("count", dist.Poisson(rate))


def sphere():
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1).to_event(1))
    y = pyro.sample("y", dist.ProjectedNormal(x))
    pyro.sample("seen", dist.Normal(y, 0.5).to_event(1), obs=torch.tensor([1.0, 0.0, 0.0]))


class Odd(dist.Normal):
    """A distribution on a support that nobody knows."""

    support = constraints.dependent


def odd():
    pyro.sample("odd", Odd(0.0, 1.0))


def one_by_one():
    for i in pyro.plate("years", 2):
        pyro.sample(f"x_{i}", dist.Normal(0, 1))


REFUSED = {
    discrete: "(?s)discrete sample site 'kind'.*enumerat",
    counts: "(?s)discrete sample site 'count'.*enumerat",
    odd: "no bijection from the line is known for the support of site 'odd'",
    one_by_one: "'x_0' lies in the sequential plate 'years'",
}


@pytest.mark.parametrize("init", INITS, ids=init_ids)
@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.__name__)
def test_refused_whatever_the_initial_values(model, init):
    guide = AutoFlow(model, SMALL, start="prior", init_loc_fn=init, seed=0)
    for _ in range(2):
        refuses(ValueError, REFUSED[model], guide)


@pytest.mark.parametrize("init", INITS, ids=init_ids)
def test_reparameterized_sites_are_no_latents(init):
    """The guide has the plain latents, and the model's values lie on the sphere."""
    model = poutine.reparam(sphere, {"y": ProjectedNormalReparam()})
    guide = AutoFlow(model, SMALL, start="prior", init_loc_fn=init, seed=0).setup()
    assert {site.name for site in guide.latents} == {"x", "y_normal"}
    trace = poutine.trace(poutine.replay(model, poutine.trace(guide).get_trace())).get_trace()
    torch.testing.assert_close(trace.nodes["y"]["value"].norm(), torch.tensor(1.0))
    assert trace.log_prob_sum().isfinite()


def test_discrete_latents():
    """``fit_guide`` sums them out; a guide alone says what to do."""
    refuses(ValueError, REFUSED[discrete], SVI(discrete, Quick(discrete), Adam({"lr": 1e-3}), Trace_ELBO()).step)
    assert fit(discrete, steps=1, fit_prior=True).sample(2)["x"].shape == (2,)


def test_discrete_latents_without_a_finite_support():
    def model(y):
        k = pyro.sample("count", dist.Poisson(3.0))
        x = pyro.sample("x", dist.Normal(k, 1))
        pyro.sample("y", dist.Normal(x, 1), obs=y)

    refuses(ValueError, r"'count' \(Poisson\) has no finite list of values to sum over", fit, model, Y[0], steps=1)


@pytest.mark.parametrize("draw", [torch.randperm, np.random.permutation, lambda n: random.sample(range(n), n)])
def test_minibatches_by_hand(draw):
    """Random numbers from any source are seen, and broadcasting is not blamed."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0, 10))
        rows = torch.as_tensor(draw(len(y)))[:5]
        with pyro.plate("rows", 5), poutine.scale(scale=len(y) / 5):
            pyro.sample("y", dist.Normal(mu, 1), obs=y[rows])

    with pytest.raises(ValueError, match=r"another density at each run.*subsample_size"):
        fit(Quick(model), torch.linspace(-2, 3, 20), steps=1)


def test_random_numbers_that_do_not_matter_are_fine():
    """A model that draws random numbers and throws them away is not random."""

    def model(y):
        torch.nn.Linear(2, 2)
        mu = pyro.sample("mu", dist.Normal(0, 1))
        pyro.sample("y", dist.Normal(mu, 1), obs=y)

    assert fit(Quick(model), Y[0], steps=1).notes == ()


# Data of another shape


def test_other_data():
    guide = Quick(plain).setup(Y)
    guide(Y + 1)
    guide(None)
    for args in ((torch.ones(5), 5), (torch.ones(1), 1), (None, 2)):
        refuses(ValueError, r"'theta' has shape \(\d,\).* built for \(3,\).*new guide", guide, *args)
        refuses(ValueError, r"'theta' has shape", guide.density, *args)
    guide(Y)
    assert fit(guide, torch.ones(5), 5, steps=1).sample(2)["theta"].shape == (2, 5)  # which builds it anew


def indexed(y=None, size=3):
    """Pyro would replay three rows in a plate of five, take these for a minibatch, and say nothing."""
    with pyro.plate("rows", size) as rows:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=None if y is None else y[rows])


@pytest.mark.parametrize("model", [plain, indexed])
@pytest.mark.parametrize("size", [1, 5])
def test_other_rows_in_svi_and_predictions(model, size):
    guide = Quick(model).setup(Y)
    match = rf"'theta' has shape \({size},\).*built for \(3,\)"
    refuses(ValueError, match, SVI(model, guide, Adam({"lr": 1e-3}), Trace_ELBO()).step, torch.ones(size), size)
    for parallel in (False, True):
        refuses(ValueError, match, Predictive(model, guide=guide, num_samples=2, parallel=parallel), None, size)


def test_other_sites():
    def model(extra):
        pyro.sample("x", dist.Normal(0, 1))
        if extra:
            pyro.sample("z", dist.Normal(0, 1))

    guide = Quick(model).setup(False)
    refuses(ValueError, r"'z' has shape \(\), but .* None", guide.density, True)
    # Predictions may draw more from the model than the guide knows.
    assert set(guide(True)) == {"x"}
    assert set(Predictive(model, guide=guide, num_samples=2)(True)) == {"x", "z"}


def test_other_data_with_the_same_latents_is_fine():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0, 1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1), obs=y)

    guide = Quick(model).setup(Y)
    assert guide(torch.ones(7))["mu"].shape == ()
    found = fit(guide, torch.ones(7), steps=1)
    assert found.predictive(2, torch.ones(9))["y"].shape == (2, 9)


def test_predictions_for_other_groups():
    found = fit(Quick(plain), Y, steps=1)
    assert found.predictive(2, None)["y"].shape == (2, 3)
    refuses(ValueError, r"predictive: .*'theta': \(3,\).*data of one size", found.predictive, 2, None, 5)


# Options


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"start": "laplace"}, "start to be 'pathfinder' or 'prior', got 'laplace'"),
        ({"tempering": 0.0}, r"tempering to be in \(0, 1\], got 0.0"),
        ({"tempering": 1.5}, r"tempering to be in \(0, 1\], got 1.5"),
        ({"num_particles": 0}, "num_particles to be an integer >= 1, got 0"),
    ],
)
def test_options(options, match):
    refuses(ValueError, match, AutoFlow, plain, **options)


def test_things_that_are_not_what_they_should_be():
    refuses(TypeError, "model to be a Pyro model, a callable, got Tensor", AutoFlow, Y)
    refuses(TypeError, "model to be a Pyro model, a callable, got Tensor", fit, Y, steps=1)
    refuses(TypeError, r"builder to be a function.*partial\(pf.realnvp", AutoFlow, plain, pf.realnvp(4))
    refuses(TypeError, "builder", AutoFlow, plain, 8)


@pytest.mark.parametrize(
    "builder",
    [
        lambda dim: pf.realnvp(dim + 1, hidden_dims=(8,)),
        lambda dim: pf.realnvp(dim, hidden_dims=(8,), context_dim=2),
        lambda dim: pf.realnvp((2, dim // 2), hidden_dims=(8,)),
        lambda dim: torch.nn.Linear(dim, dim),
        lambda dim: [],
        lambda dim: None,
    ],
    ids=["too large", "with context", "a matrix", "no flow", "empty", "none"],
)
def test_builders(builder):
    with pytest.raises(ValueError, match=r"expected builder\(4\) to give a flow of 4 dimensions without context"):
        AutoFlow(plain, builder, start="prior").setup(Y)


def test_before_setup():
    guide = Quick(plain)
    for call in (guide.get_transform, guide.get_posterior, guide.get_base_dist, guide.sample_posterior):
        refuses(ValueError, r"has not seen its model yet: call .setup\(\*args\)", call)


def test_properties_before_setup():
    guide = Quick(plain)
    for name in ("preconditioner", "flow", "initial", "latent_dim"):
        refuses(AttributeError, r"has not seen its model yet: call .setup\(\*args\)", getattr, guide, name)
        assert not hasattr(guide, name)
    loaded = pickle.loads(pickle.dumps(guide.setup(Y)))
    for name in ("model", "plain_model"):
        refuses(AttributeError, "comes from a pickle, which holds no model", getattr, loaded, name)
    with pytest.raises(AttributeError, match="'AutoFlow' object has no attribute 'elbow'"):
        guide.elbow  # noqa: B018


def test_parameters_that_are_not_finite():
    """The error says which, since when and what to do; not what a distribution makes of them."""
    guide = Quick(plain).setup(Y)
    svi = SVI(plain, guide, Adam({"lr": 1e-3}), Trace_ELBO())
    for _ in range(3):
        svi.step(Y)
    with torch.no_grad():
        guide.preconditioner.shift[1] = torch.nan
    refuses(ValueError, r"1 parameters .* not finite, '.*shift' first.* draw 3 .*ClippedAdam.*fit_guide", svi.step, Y)


def test_scales_that_have_exploded():
    guide = AutoFlow(plain, start="prior", seed=0).setup(Y)
    guide(Y)
    with torch.no_grad():
        guide.preconditioner.log_diagonal.fill_(200.0)
        guide.preconditioner.lower.fill_(1.0)
    refuses(ValueError, r"draw 2 of this guide in training is NaN: its scales have exploded.*Clipped", guide, Y)


@pytest.mark.parametrize("levels", [[-0.1], [0.5, 1.2], [float("nan")]])
def test_quantiles(levels):
    refuses(ValueError, "quantiles between 0 and 1", Quick(plain).setup(Y).quantiles, levels)


# fit_guide


@pytest.mark.parametrize("name", ["steps", "seconds", "progress", "checkpoint", "checkpoint_every"])
def test_arguments_of_the_model_that_collide(name):
    scope = {}
    exec(f"def model(y, {name}=None): plain(y)", {"plain": plain}, scope)
    refuses(ValueError, f"argument named '{name}'.*functools.partial", fit_guide, scope["model"], Y)
    refuses(ValueError, f"argument named '{name}'", fit_guide, Quick(scope["model"]), Y)
    bound = partial(scope["model"], **{name: None})
    assert len(fit(Quick(bound), Y, steps=1).history) == 1


@pytest.mark.parametrize("name", ["num_particles", "seed", "builder", "tempering", "dtype", "start"])
def test_options_of_the_guide_given_to_fit_guide(name):
    with pytest.raises(TypeError, match=rf"'{name}' is no argument of the model.*AutoFlow\(model, {name}="):
        fit(plain, Y, steps=1, **{name: 3})


@pytest.mark.parametrize("name", ["num_layers", "hidden_dims", "context"])
def test_unknown_arguments_of_the_model(name):
    message = rf"'{name}' is no argument of the model; the model takes y, size\..*AutoFlow\(model, partial\("
    refuses(TypeError, message, fit, plain, Y, steps=1, **{name: 3})


def test_budgets():
    for steps in (0, -1, 1.5, True, "3"):
        refuses(ValueError, "steps to be an integer >= 1", fit, Quick(plain), Y, steps=steps)
    for seconds in (0, -1.0, float("inf"), float("nan")):
        refuses(ValueError, "seconds to be a positive number", fit, Quick(plain), Y, seconds=seconds)


@pytest.fixture(scope="module")
def fitted():
    pyro.set_rng_seed(0)
    return fit(Quick(plain), Y, steps=1)


@pytest.mark.parametrize("n", [-1, 2.0, True, None])
def test_numbers_of_draws(fitted, n):
    for call in (fitted.sample, fitted.predictive, partial(fitted.sample, resampled=True)):
        refuses(ValueError, "expected num_samples to be an integer >= 0", call, n)


def test_loading(fitted, tmp_path):
    path = tmp_path / "fit.pt"
    with pytest.raises(FileNotFoundError):
        load_guide(path)
    for content in (b"", b"not a fit", b"PK\x03\x04 but cut off"):
        path.write_bytes(content)
        refuses(ValueError, r"(?s)fit\.pt.*GuideFit\.save", load_guide, path)
    fitted.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refuses(ValueError, "cannot be read", load_guide, path)
    for other in ({"format": 99}, {"weights": 1}, [1, 2], torch.zeros(2)):
        torch.save(other, path)
        refuses(ValueError, "it is no such file, is damaged, or comes from another release", load_guide, path)


def test_loaded_fits_lack_the_model(fitted, tmp_path):
    fitted.save(tmp_path / "fit.pt")
    loaded = load_guide(tmp_path / "fit.pt")
    refuses(ValueError, r"predictive: this fit was loaded without its model.*setup", loaded.predictive, 2)
    with pytest.raises(ValueError, match=r"loaded without its model, so only its .* weighted draws"):
        loaded.sample(100_000, resampled=True)


# The affine end


@pytest.mark.parametrize(
    ("loc", "scale"),
    [
        (torch.zeros(3), torch.ones(2)),
        (torch.zeros(3), torch.ones(3, 2)),
        (torch.zeros(2, 2), torch.ones(2)),
        (torch.zeros(3), torch.tensor([1.0, 0.0, 1.0])),
        (torch.zeros(3), -torch.eye(3)),
        (torch.tensor([0.0, torch.nan]), torch.ones(2)),
        (torch.zeros(2), torch.tensor([1.0, torch.inf])),
    ],
)
def test_preconditioner(loc, scale):
    refuses(ValueError, "Preconditioner: expected", pf.transforms.Preconditioner, loc, scale)
