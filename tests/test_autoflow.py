"""``AutoFlow`` as an autoguide: every ELBO of Pyro's, supports, plates, dtypes, copies, and what NeuTra needs."""

import copy
import pickle
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from asserts import output_of
from cases import seeded
from pyro import poutine
from pyro.contrib.forecast import Forecaster, ForecastingModel
from pyro.infer import (
    HMC,
    MCMC,
    SVI,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from pyro.infer.reparam import NeuTraReparam
from pyro.ops.indexing import Vindex
from pyro.optim import Adam

import pyro_flows as pf
from pyro_flows.infer import AlphaDivergence, AutoFlow, DReGELBO, ForwardKL, PathELBO, fit_guide
from pyro_flows.infer.guides.loop import speeds_of
from pyro_flows.infer.guides.posterior import Steady
from pyro_flows.infer.machine.optimizers import AdamW as FitAdam
from pyro_flows.univariate import Affine
from tests.asserts import refuses
from tests.cases import full_but, shake
from tests.test_latents import SUPPORTS, improper

Y = torch.tensor([1.0, 2.0, 4.0, 3.0])
SMALL = partial(pf.realnvp, num_layers=2, hidden_dims=(8,))
Quick = partial(AutoFlow, builder=SMALL, start="prior", seed=0)


def groups(y=Y, size=4):
    """Global and local latents, a plate, a deterministic site."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 3.0))
    tau = pyro.sample("tau", dist.HalfNormal(y.new_tensor(1.0)))
    with pyro.plate("groups", size):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.deterministic("twice", 2 * theta)
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def mixture(y=Y):
    """A discrete latent for each datum."""
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
    m = pyro.sample("m", dist.Normal(torch.tensor([-1.0, 1.0]), 5.0).to_event(1))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(w))
        pyro.sample("y", dist.Normal(Vindex(m)[..., k], 1.0), obs=y)


def steps(model, guide, elbo, count=3, *args):
    svi = SVI(model, guide, Adam({"lr": 1e-2}), elbo)
    return [svi.step(*args) for _ in range(count)]


def change(guide, before):
    return [name for name, value in guide.named_parameters() if not torch.equal(value, before[name])]


def snapshot(guide):
    return {name: value.detach().clone() for name, value in guide.named_parameters()}


ELBOS = {
    "Trace": Trace_ELBO,
    "Trace, particles": partial(Trace_ELBO, num_particles=3),
    "Trace, vectorized": partial(Trace_ELBO, num_particles=3, vectorize_particles=True),
    "Trace, vectorized, nesting given": partial(
        Trace_ELBO, num_particles=3, vectorize_particles=True, max_plate_nesting=1
    ),
    "TraceMeanField": TraceMeanField_ELBO,
    "TraceMeanField, vectorized": partial(TraceMeanField_ELBO, num_particles=3, vectorize_particles=True),
    "Renyi": partial(RenyiELBO, num_particles=3),
    "Renyi, vectorized": partial(RenyiELBO, num_particles=3, vectorize_particles=True),
    "TraceGraph": TraceGraph_ELBO,
    "TraceGraph, vectorized": partial(TraceGraph_ELBO, num_particles=3, vectorize_particles=True),
    "JitTrace": partial(JitTrace_ELBO, ignore_jit_warnings=True),
    "JitTrace, vectorized": partial(JitTrace_ELBO, num_particles=3, vectorize_particles=True, ignore_jit_warnings=True),
    "JitTraceMeanField": partial(JitTraceMeanField_ELBO, ignore_jit_warnings=True),
    "JitTraceGraph": partial(JitTraceGraph_ELBO, ignore_jit_warnings=True),
    "ReweightedWakeSleep": partial(ReweightedWakeSleep, num_particles=2, insomnia=1.0),
    "Path": PathELBO,
    "Path, vectorized": partial(PathELBO, num_particles=3, vectorize_particles=True),
    "DReG": partial(DReGELBO, num_particles=3),
    "Alpha": partial(AlphaDivergence, 0.5, num_particles=3),
}


@pytest.mark.parametrize("built", [False, True], ids=["at the first step", "before"])
@pytest.mark.parametrize(
    "name",
    full_but(
        ELBOS,
        "Trace",
        "Trace, vectorized",
        "TraceMeanField",
        "Renyi, vectorized",
        "TraceGraph",
        "JitTrace",
        "ReweightedWakeSleep",
        "Path",
    ),
)
def test_stock_svi(name, built):
    """Built inside the ELBO or before, the guide's own parameters are what the step moves."""
    guide = Quick(groups)
    if built:
        guide.setup(Y)
        before = snapshot(guide)
    losses = steps(groups, guide, ELBOS[name](), 3, Y)
    assert torch.tensor(losses).isfinite().all()
    if built:
        moved = change(guide, before)
        assert {n.rsplit(".", 1)[-1] for n in moved} >= {"shift", "log_diagonal", "lower"}


@pytest.mark.full
def test_svi_trains(default_dtype):
    """A conjugate model is found by stock SVI: mean and standard deviation of the exact posterior."""
    default_dtype(torch.float64)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = Y.double()
    guide = AutoFlow(model, partial(pf.nsf, num_layers=1), start="prior", seed=0)
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)
    svi = SVI(model, guide, Adam({"lr": 3e-2}), elbo)
    for _ in range(250):
        svi.step(y)
    precision = 1 / 4 + len(y)
    draws = guide.sample_posterior(20_000)["mu"]
    assert abs(draws.mean() - y.sum() / precision) < 0.15 * precision**-0.5
    assert abs(draws.std() * precision**0.5 - 1) < 0.1


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_module_local_params(elbo):
    """Parameters of its own: ``elbo(model, guide)`` and an optimiser of torch's, as Pyro has it for this setting."""
    with pyro.settings.context(module_local_params=True):
        guide = Quick(groups).setup(Y)
        before = snapshot(guide)
        loss = elbo()(groups, guide)
        loss(Y)
        optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss(Y).backward()
            optimizer.step()
        assert len(change(guide, before)) >= 3
        assert not list(pyro.get_param_store().keys())


@pytest.mark.full
@pytest.mark.parametrize("elbo", [TraceEnum_ELBO, partial(JitTraceEnum_ELBO, ignore_jit_warnings=True)])
@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("start", ["prior", "pathfinder"])
def test_enumeration(elbo, vectorized, start):
    """Discrete latents hidden from the guide and summed out by the ELBO."""
    guide = AutoFlow(poutine.block(config_enumerate(mixture), hide=["k"]), SMALL, start=start, seed=0)
    objective = elbo(max_plate_nesting=1, num_particles=2, vectorize_particles=vectorized)
    losses = steps(config_enumerate(mixture), guide, objective, 3, Y)
    assert torch.tensor(losses).isfinite().all()
    assert set(guide.sample_posterior(2)) == {"w", "m"}


def test_enumeration_agrees_with_a_sum_by_hand():
    """The loss equals that of the model with its discrete latent summed out."""

    def summed(y=Y):
        w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
        m = pyro.sample("m", dist.Normal(torch.tensor([-1.0, 1.0]), 5.0).to_event(1))
        with pyro.plate("data", len(y)):
            parts = dist.Normal(m.unsqueeze(-2), 1.0)
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(w.unsqueeze(-2)), parts), obs=y)

    guide = Quick(poutine.block(config_enumerate(mixture), hide=["k"])).setup()
    losses = []
    for model, elbo in ((config_enumerate(mixture), TraceEnum_ELBO(max_plate_nesting=1)), (summed, Trace_ELBO())):
        pyro.set_rng_seed(3)
        losses.append(elbo.loss(model, guide))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("other_first", [False, True])
def test_guide_list(other_first):
    """Beside another guide, for a part of the latents, plates of the other part hidden."""
    parts = [
        AutoFlow(poutine.block(groups, expose=["mu", "tau"]), SMALL, seed=0),
        AutoNormal(poutine.block(groups, expose=["theta"])),
    ]
    guide = AutoGuideList(groups)
    for part in reversed(parts) if other_first else parts:
        guide.append(part)
    assert torch.tensor(steps(groups, guide, Trace_ELBO(), 2, Y)).isfinite().all()
    before = snapshot(guide)
    steps(groups, guide, Trace_ELBO(num_particles=2, vectorize_particles=True), 2, Y)
    assert any("flow" in name for name in change(guide, before))
    assert set(guide.median(Y)) == set(guide.quantiles([0.5], Y)) == {"mu", "tau", "theta"}


def test_list_of_two_flows():
    guide = AutoGuideList(groups)
    guide.append(Quick(poutine.block(groups, expose=["mu", "tau"])))
    guide.append(Quick(poutine.block(groups, expose=["theta"])))
    assert torch.tensor(steps(groups, guide, Trace_ELBO(), 2, Y)).isfinite().all()
    before = snapshot(guide)
    steps(groups, guide, Trace_ELBO(), 2, Y)
    moved = change(guide, before)
    assert any(n.startswith("0.") for n in moved) and any(n.startswith("1.") for n in moved)


def test_forward_kl():
    """Trains towards given draws; raises the guide's density there."""
    draws = {"mu": torch.randn(64) + 3, "tau": torch.rand(64) + 0.5, "theta": torch.randn(64, 4)}
    guide = Quick(groups).setup(Y)
    losses = steps(groups, guide, ForwardKL(draws), 20, Y)
    assert losses[-1] < losses[0] - 1


# The parameter store


def test_guides_do_not_share_parameters():
    """A second guide of one session trains its own parameters, and leaves the first alone."""
    first, second = Quick(groups).setup(Y), Quick(groups).setup(Y)
    steps(groups, first, Trace_ELBO(), 2, Y)
    held, fresh = snapshot(first), snapshot(second)
    steps(groups, second, Trace_ELBO(), 2, Y)
    assert not change(first, held) and len(change(second, fresh)) >= 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))], ids=["deepcopy", "pickle"])
def test_copies_train_on_their_own(copied):
    guide = Quick(groups).setup(Y)
    steps(groups, guide, Trace_ELBO(), 2, Y)
    held = snapshot(guide)
    twin = copied(guide)
    assert guide.model is not None and not change(twin, held)
    z = torch.randn(3, guide.latent_dim)
    torch.testing.assert_close(twin.flow.log_prob(z), guide.flow.log_prob(z), rtol=0, atol=0)
    steps(groups, twin, Trace_ELBO(), 2, Y)
    assert not change(guide, held) and len(change(twin, held)) >= 3
    if copied is copy.deepcopy:
        assert twin.plain_model is groups and twin.density(Y)(z).isfinite().all()
    assert set(twin.sample_posterior(2)) == {"mu", "tau", "theta"}


def test_copy_before_setup():
    guide = copy.deepcopy(Quick(groups))
    assert guide.setup(Y).latent_dim == 6


def test_foreign_parameters_are_refused():
    """Two lists have the same name; Pyro would train the first one's parameters in place of the second one's."""
    lists = []
    for _ in range(2):
        lists.append(AutoGuideList(groups))
        lists[-1].append(Quick(groups))
    steps(groups, lists[0], Trace_ELBO(), 1, Y)
    refuses(ValueError, "parameter store holds other parameters", steps, groups, lists[1], Trace_ELBO(), 1, Y)
    pyro.clear_param_store()
    steps(groups, lists[1], Trace_ELBO(), 1, Y)


# Building


def test_parameters_are_there_before_training():
    guide = Quick(groups)
    assert not list(guide.parameters())
    assert guide.setup(Y) is guide and guide.setup(Y) is guide
    assert guide.latent_dim == 6 and len(list(guide.parameters())) > 3
    optimizer = torch.optim.Adam(guide.parameters())
    Trace_ELBO().differentiable_loss(groups, guide, Y).backward()
    before = snapshot(guide)
    optimizer.step()
    assert change(guide, before)


def test_setup_leaves_no_trace():
    """It hides from handlers around it, and with a seed leaves the random numbers of others alone."""
    with poutine.trace() as seen:
        before = torch.get_rng_state()
        guide = AutoFlow(groups, SMALL, seed=1).setup(Y)
        assert torch.equal(before, torch.get_rng_state())
    assert not [n for n in seen.trace.nodes if not n.startswith("_")]
    assert not list(pyro.get_param_store().keys())
    trace = poutine.trace(guide).get_trace(Y)
    assert {n for n, s in trace.nodes.items() if s["type"] == "sample"} == {
        f"_{guide._pyro_name}_latent",
        "mu",
        "tau",
        "theta",
        "groups",
    }


@pytest.mark.full
def test_same_seed_same_guide():
    one, two, other = (AutoFlow(groups, num_starts=1, seed=s).setup(Y) for s in (5, 5, 6))
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert any(
        not torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


LOAD = """
import sys, torch, pyro
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from tests.test_autoflow import AutoFlow, groups, Y
pyro.set_rng_seed(99)
guide = AutoFlow(groups, start="prior", seed=99).setup(Y)
guide.load_state_dict(torch.load({state!r}))
z, expected = torch.load({points!r})
found = guide.flow.log_prob(z)
assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), (found, expected)
"""


@pytest.mark.full
def test_state_in_another_process(tmp_path, request):
    """The default flow, masks at random: loaded into a guide of another seed in another process."""
    guide = shake(AutoFlow(groups, start="prior", seed=0).setup(Y), 0.1)
    z = guide.flow.sample((10,))
    z = z + 0.02 * torch.randn_like(z)
    torch.save(guide.state_dict(), tmp_path / "state.pt")
    torch.save((z, guide.flow.log_prob(z).detach()), tmp_path / "points.pt")
    code = LOAD.format(
        root=str(request.config.rootpath), state=str(tmp_path / "state.pt"), points=str(tmp_path / "points.pt")
    )
    output_of("-c", code)


BUILDERS = {
    "default": None,
    "maf": partial(pf.maf, num_layers=1, hidden_dims=(8,)),
    "iaf": partial(pf.iaf, num_layers=1, hidden_dims=(8,)),
    "nsf": partial(pf.nsf, num_layers=1, hidden_dims=(8,)),
    "nice": partial(pf.nice, num_layers=2, hidden_dims=(8,)),
    "list": lambda dim: [pf.LULinear(dim), pf.Permutation(dim, "reverse")],
    "Pyro's": lambda dim: T.spline_coupling(dim, hidden_dims=[8], count_bins=4),
    "list of Pyro's": lambda dim: [T.affine_coupling(dim, hidden_dims=[8]), T.Permute(torch.arange(dim).flip(0))],
}


@pytest.mark.parametrize("name", BUILDERS)
def test_builders(name):
    guide = AutoFlow(groups, BUILDERS[name], start="prior", seed=0).setup(Y)
    before = snapshot(guide)
    assert torch.tensor(steps(groups, guide, Trace_ELBO(), 2, Y)).isfinite().all()
    assert change(guide, before)
    z = guide.flow.sample((4,))
    assert guide.flow.log_prob(z).isfinite().all()
    assert set(guide.sample_posterior(3)) == {"mu", "tau", "theta"}


def test_starts_as_the_preconditioner():
    """Before training the default flow adds nothing to the informed start."""
    guide = AutoFlow(groups, seed=0).setup(Y)
    x = torch.randn(5, 6)
    affine = guide.preconditioner
    torch.testing.assert_close(guide.get_transform()(x), affine.loc + x @ affine.scale.mT)
    assert guide.get_base_dist().event_shape == (6,)


def test_init_loc_fn():
    """The start goes from where the user says."""
    values = {"mu": torch.tensor(7.0), "tau": torch.tensor(0.5), "theta": torch.arange(4.0)}
    guide = AutoFlow(groups, SMALL, start="prior", init_loc_fn=init_to_value(values=values)).setup(Y)
    expected = guide.latents.pack(values)
    torch.testing.assert_close(guide.preconditioner.loc, expected)


# dtypes


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("data", [torch.float32, torch.float64])
def test_dtype_of_the_model(default_dtype, default, data):
    """The guide has the model's dtype, whatever torch's default is."""
    y = Y.to(data)
    default_dtype(default)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 3.0))
        theta = pyro.sample("theta", dist.ImproperUniform(dist.constraints.positive, (), ()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1 + theta), obs=y)

    guide = AutoFlow(model, SMALL, seed=0).setup(y)
    assert {p.dtype for p in guide.parameters()} == {data}
    assert {v.dtype for v in guide(y).values()} == {data}
    assert {v.dtype for v in guide.sample_posterior(2).values()} == {data}
    assert {v.dtype for v in guide.median().values()} == {data}
    steps(model, guide, Trace_ELBO(), 2, y)


@pytest.mark.parametrize("data", [torch.float32, torch.float64])
@pytest.mark.parametrize("flow", [torch.float32, torch.float64])
def test_dtype_option(data, flow):
    """The flow in one dtype, the model's values in its own."""
    y = Y.to(data)
    guide = Quick(groups, dtype=flow).setup(y)
    assert {p.dtype for p in guide.parameters()} == {flow}
    assert {v.dtype for v in guide.sample_posterior(2).values()} == {data}
    assert {v.dtype for v in guide(y).values()} == {data}
    assert torch.tensor(steps(groups, guide, Trace_ELBO(), 2, y)).isfinite().all()


def test_moving_by_to():
    guide = Quick(groups).setup(Y)
    steps(groups, guide, Trace_ELBO(), 1, Y)
    assert guide.double() is guide and {p.dtype for p in guide.parameters()} == {torch.float64}
    assert guide.get_base_dist().sample().dtype == torch.float64
    before = snapshot(guide)
    steps(groups, guide, Trace_ELBO(), 1, Y)
    assert change(guide, before)
    guide.to(torch.float32)
    assert guide.flow.sample((2,)).dtype == torch.float32


# Summaries


@pytest.mark.parametrize("name", SUPPORTS)
def test_supports(name):
    """Each support, with a flat prior: draws, medians and quantiles lie in it; quantiles rise where they can."""
    support, shape = SUPPORTS[name]

    def model():
        x = pyro.sample("x", improper(support, shape))
        pyro.factor("f", -(x**2).reshape((*x.shape[: x.dim() - len(shape)], -1)).sum(-1))

    guide = AutoFlow(model, SMALL, start="prior", seed=0).setup()
    shake(guide, 0.1)
    steps(model, guide, Trace_ELBO(num_particles=2, vectorize_particles=True), 2)
    (site,) = guide.latents
    assert site.support.check(guide()["x"]).all()
    draws = guide.sample_posterior(500)["x"]
    assert draws.shape == (500, *shape) and site.support.check(draws).all()
    median = guide.median()["x"]
    assert median.shape == torch.Size(shape) and site.support.check(median).all()
    quantiles = guide.quantiles([0.1, 0.5, 0.9])["x"]
    assert quantiles.shape == (3, *shape) and site.support.check(quantiles).all()
    torch.testing.assert_close(quantiles[1], median)
    torch.testing.assert_close(guide.quantiles(torch.tensor([0.1, 0.5, 0.9]))["x"], quantiles, rtol=0, atol=0)
    if "ordered" not in name and (support.event_dim == 0 or "independent" in name or name == "real_vector"):
        assert (quantiles.diff(dim=0) > 0).all()
        inside = ((draws > quantiles[0]) & (draws < quantiles[2])).double().mean(0)
        assert ((inside - 0.8).abs() < 0.1).all()


def test_quantiles_take_arguments_before_setup():
    guide = Quick(groups)
    assert guide.median(Y)["theta"].shape == (4,)
    state = torch.get_rng_state()
    guide.quantiles([0.25])
    assert torch.equal(state, torch.get_rng_state())
    assert guide.quantiles([])["theta"].shape == (0, 4)
    assert guide.sample_posterior(0)["theta"].shape == (0, 4)


@pytest.mark.full
def test_quantiles_of_many_dimensions():
    def model():
        pyro.sample("x", dist.Normal(0, 1).expand([2000]).to_event(1))

    guide = AutoFlow(model, lambda dim: pf.Permutation(dim, "reverse"), start="prior").setup()
    assert not guide.preconditioner.full and guide.median()["x"].shape == (2000,)


def test_predictive():
    """Pyro's ``Predictive`` over the guide, one at a time and all at once."""
    guide = Quick(groups).setup(Y)
    for parallel in (False, True):
        draws = Predictive(groups, guide=guide, num_samples=5, parallel=parallel)(torch.zeros(4))
        assert draws["theta"].reshape(5, -1).shape == (5, 4)


def test_quantiles_are_those_of_the_draws():
    """Also below an upper bound alone, where the order is the other way round."""

    def model():
        pyro.sample("x", improper(dist.constraints.less_than(2.0), ()))
        pyro.sample("y", improper(dist.constraints.real_vector, (2,)))

    guide = shake(AutoFlow(model, SMALL, start="prior", seed=0).setup(), 0.2)
    levels = [0.0, 0.1, 0.5, 0.9, 1.0]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        z = guide.flow.sample((10_000,))
    free = torch.stack(
        [-torch.quantile(-z[:, 0], torch.tensor(levels), 0), *torch.quantile(z[:, 1:], torch.tensor(levels), 0).T]
    )
    expected = guide.latents.draws(free.T)
    found = guide.quantiles(levels)
    for name in ("x", "y"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    assert (found["x"].diff() > 0).all()


CHANGES = {
    "optimizer": lambda guide: steps(groups, guide, Trace_ELBO(), 1, Y),
    "in place": lambda guide: torch.nn.init.constant_(guide.preconditioner.shift, 3.0),
    "state": lambda guide: guide.load_state_dict({k: 1.5 * v for k, v in guide.state_dict().items()}),
    "dtype": lambda guide: guide.double(),
    "cleared": lambda guide: (guide.preconditioner.shift.data.add_(1.0), guide.get_transform().clear_cache()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_draws_of_quantiles_are_reused_while_nothing_changes(monkeypatch, name):
    guide = Quick(groups).setup(Y)
    drawn = []
    sample = pf.Flow.sample
    monkeypatch.setattr(pf.Flow, "sample", lambda *args: drawn.append(1) or sample(*args))
    first = guide.median()
    assert len(drawn) == 1
    for _ in range(3):
        again = guide.quantiles([0.5, 0.1])
        assert all(torch.equal(again[key][0], first[key]) for key in first)
    assert len(drawn) == 1
    CHANGES[name](guide)
    drawn.clear()
    later = guide.median()
    assert len(drawn) == 1
    fresh = copy.deepcopy(guide).median()
    assert all(torch.equal(later[key], fresh[key]) for key in first)
    assert any(not torch.equal(later[key], first[key]) for key in first)


DATA_LEFT_OUT = {
    "Bernoulli": lambda eta: dist.Bernoulli(logits=eta),
    "Poisson": lambda eta: dist.Poisson(eta.exp()),
    "Binomial": lambda eta: dist.Binomial(7, logits=eta),
    "Categorical": lambda eta: dist.Categorical(logits=torch.stack((eta, -eta, 0 * eta), -1)),
    "DirichletMultinomial": lambda eta: dist.DirichletMultinomial(torch.stack((eta, -eta), -1).exp(), 5),
    "Normal": lambda eta: dist.Normal(eta, 1.0),
}


@pytest.mark.parametrize("kind", DATA_LEFT_OUT)
@pytest.mark.parametrize("parallel", [False, True])
def test_predictions_of_data_left_out(kind, parallel):
    """As Pyro predicts with its own guides: counts, labels, and any number of rows; the model runs for Pyro alone."""
    runs = []

    def model(x, y=None):
        runs.append(1)
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", DATA_LEFT_OUT[kind](w * x), obs=y)

    x = torch.randn(6)
    y = DATA_LEFT_OUT[kind](x).sample()
    guide = Quick(model).setup(x, y)
    for rows in (6, 1, 9):
        runs.clear()
        guide(torch.randn(rows), None)
        assert not runs
        drawn = Predictive(model, guide=guide, num_samples=3, parallel=parallel)(torch.randn(rows), None)
        assert drawn["y"].shape == (3, rows, *y.shape[1:])
        support = DATA_LEFT_OUT[kind](torch.zeros(rows)).support
        assert support.check(drawn["y"]).all()


@pytest.mark.full
def test_predictions_agree_with_the_posterior():
    """A conjugate model: the predictive mean and spread from draws of the guide in ``Predictive``."""

    def model(n, y=None):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("rows", n):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    y = torch.tensor([1.0, 1, 1, 0, 1, 1])
    fit = fit_guide(AutoFlow(model, seed=0), len(y), y, steps=100, progress=False)
    drawn = Predictive(model, guide=fit.guide, num_samples=4000, parallel=True)(20, None)["y"].sum(-1)
    a, b = 2 + y.sum(), 2 + len(y) - y.sum()
    exact = dist.BetaBinomial(a, b, 20)
    assert abs(drawn.mean() - exact.mean) < 5 * (exact.variance / 4000) ** 0.5
    assert abs(drawn.var() / exact.variance - 1) < 0.15


class Walk(ForecastingModel):
    """A slope for all times, and a local drift for each."""

    def model(self, zero_data, covariates):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with self.time_plate:
            drift = pyro.sample("drift", dist.Normal(0.0, 0.1))
        level = slope * covariates.squeeze(-1) + drift.cumsum(-1)
        self.predict(dist.Normal(0.0, 0.5), level.unsqueeze(-1))


def test_forecaster():
    """Pyro's own: trained on ten times, it forecasts five more, local latents included."""
    times = torch.arange(15.0).unsqueeze(-1) / 10
    data = 2 * times[:10] + 0.1 * torch.randn(10, 1)
    model = Walk()
    guide = AutoFlow(model, SMALL, num_starts=1, seed=0)
    forecaster = Forecaster(model, data, times[:10], guide=guide, learning_rate=0.01, num_steps=20, log_every=0)
    drawn = forecaster(data, times, num_samples=40)
    assert drawn.shape == (40, 5, 1) and drawn.isfinite().all()
    assert abs(drawn.mean(0).squeeze(-1) - 2 * times[10:].squeeze(-1)).max() < 1.0


def test_jit_trace_module(tmp_path):
    """As Pyro's regression tutorial does: the traced guide draws what the guide draws."""
    guide = Quick(groups).setup(Y)
    pyro.set_rng_seed(1)
    expected = guide.call(Y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace_module(guide, {"call": (Y,)}, check_trace=False)
        torch.jit.save(traced, tmp_path / "guide.pt")
        pyro.set_rng_seed(1)
        found = torch.jit.load(tmp_path / "guide.pt").call(Y)
    torch.testing.assert_close(found, expected)


# Far draws in training


def test_a_draw_without_a_gradient_moves_nothing():
    """Where the model's density has no gradient at some particles, the others train the guide, and nothing is NaN."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("edge", x[..., 0].clamp(min=0.0).sqrt())  # whose gradient below zero is NaN

    guide = Quick(model).setup()
    svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO(num_particles=20, vectorize_particles=True))
    before = snapshot(guide)
    for _ in range(5):
        svi.step()
    assert change(guide, before)
    assert all(p.isfinite().all() for p in guide.parameters())


def test_one_far_draw_does_not_freeze_the_optimizer():
    """A gradient of 1e12 once counts ten times the usual; else Adam's step would be zero for hundreds of steps."""
    huge = [False]

    def model():
        x = pyro.sample("x", dist.Normal(3.0, 1.0))
        pyro.factor("spike", 1e12 * x if huge[0] else 0 * x)

    guide = Quick(model).setup()
    svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
    for step in range(60):
        huge[0] = step == 20
        svi.step()
        if step == 20:
            before = guide.preconditioner.shift.detach().clone()
    assert (guide.preconditioner.shift - before).abs().max() > 0.05


def test_steady_leaves_usual_gradients_alone():
    steady = Steady()
    gradients = torch.randn(50, 4, 3, dtype=torch.float64)
    for each in gradients:
        torch.testing.assert_close(steady(each), each, rtol=0, atol=0)
    # In a weighted objective one draw may have nearly all of the gradient, with the others' sum as usual.
    weighted = gradients[0] * torch.tensor([[2.0], [1e-9], [1e-9], [1e-9]])
    torch.testing.assert_close(steady(weighted), weighted, rtol=0, atol=0)
    far = torch.cat((gradients[0], 1e9 * gradients[1, :1], torch.full((1, 3), torch.nan)))
    found = steady(far)
    assert (found[5] == 0).all() and 3 < found.norm() < 60
    torch.testing.assert_close(found[:5] / found.norm(), far[:5] / far[:5].norm())
    # Gradients that are all larger from now on are usual soon.
    for _ in range(60):
        found = steady(1e9 * gradients[1])
    torch.testing.assert_close(found, 1e9 * gradients[1], rtol=0, atol=0)


def test_training_that_stands_still_says_so():
    steady, nothing = Steady(), torch.full((4, 3), torch.nan)
    for _ in range(19):
        assert (steady(nothing) == 0).all()
    with pytest.warns(RuntimeWarning, match="none of the last 20 draws has a finite gradient"):
        steady(nothing)
    steady(nothing)  # once


@pytest.mark.parametrize("builder", [pf.iaf, pf.realnvp])
def test_gains_do_not_slow_fits(builder):
    """Under the speeds that ``fit_guide`` uses, flows with and without a gain go the same way."""
    target = torch.randn(64, 3, dtype=torch.float64)
    ends = []
    for gain in (1.0, 0.1):
        torch.manual_seed(0)
        flow = pf.Flow(builder(3, num_layers=2, hidden_dims=(8,), univariate=Affine(4.0, gain=gain))).double()
        optimizer = FitAdam(list(flow.parameters()), speeds_of(flow))
        for _ in range(5):
            loss = (flow.chain(target) ** 3).mean()
            optimizer.take(torch.autograd.grad(loss, optimizer.parameters))
            optimizer.step(1e-2)
            flow.chain.clear_cache()
        ends.append(flow.chain(target).detach())
    assert (ends[0] - target).abs().max() > 0.05
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4)


def regression():
    """The model of Pyro's regression tutorial, on simulated data."""
    generator = seeded(1)
    africa = (torch.rand(170, generator=generator) < 0.3).float()
    rugged = 6 * torch.rand(170, generator=generator)
    x = torch.stack([africa, rugged, africa * rugged], 1)
    y = 9.2 + x @ torch.tensor([-1.85, -0.19, 0.35]) + 0.95 * torch.randn(170, generator=generator)

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 10.0))
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((x * w).sum(-1) + b, sigma), obs=y)

    return model


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_the_step_size_of_the_tutorial(seed):
    """One particle and steps of 0.03: the guide ends where a good fit does, and no draw is lost."""
    model = regression()
    pyro.set_rng_seed(seed)
    guide = AutoFlow(model, seed=0, num_starts=1)
    svi = SVI(model, guide, Adam({"lr": 0.03}), Trace_ELBO())
    losses = [svi.step() for _ in range(150)]
    assert torch.tensor(losses).isfinite().all()
    assert sorted(losses[-50:])[25] < 264  # 260.8 is the best there is


def plated(x, y, weights):
    """Two plates, event dimensions, a mask and a scale."""
    rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1)
    bias = pyro.sample("bias", dist.Normal(0, 1))
    with columns:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with rows, columns:
        slope = pyro.sample("slope", dist.Normal(bias, scale))
        mixing = pyro.sample("mixing", dist.Dirichlet(torch.ones(2)))
        with poutine.scale(scale=2.0), poutine.mask(mask=weights):
            mean = slope + (mixing * x).sum(-1)
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@pytest.mark.full
@pytest.mark.parametrize("start", ["prior", "pathfinder"])
def test_plates_of_two_levels(start):
    x, y = torch.randn(3, 2, 2), torch.randn(3, 2)
    guide = AutoFlow(plated, SMALL, start=start, seed=0)
    args = (x, y, torch.tensor([[True, False], [True, True], [False, True]]))
    losses = steps(plated, guide, Trace_ELBO(), 2, *args)
    losses += steps(plated, guide, Trace_ELBO(num_particles=3, vectorize_particles=True), 2, *args)
    losses += steps(plated, guide, TraceGraph_ELBO(), 1, *args)
    assert torch.tensor(losses).isfinite().all()
    draws = guide.sample_posterior(5)
    assert {n: tuple(v.shape) for n, v in draws.items()} == {
        "bias": (5,),
        "scale": (5, 2),
        "slope": (5, 3, 2),
        "mixing": (5, 3, 2, 2),
    }
    # The loss is the mean over draws of what the density and the flow say.
    density = guide.density(*args)
    with torch.no_grad():
        z = guide.flow.sample((4000,))
        mean = (guide.flow.log_prob(z) - density(z)).mean()
        loss = Trace_ELBO(num_particles=4000, vectorize_particles=True).loss(plated, guide, *args)
        spread = (guide.flow.log_prob(z) - density(z)).std() / 4000**0.5
    assert density.vectorized and abs(loss - mean) < 6 * spread


def test_one_dimension():
    for shape in ((), (1,)):

        def model(shape=shape):
            x = pyro.sample("x", dist.Normal(torch.zeros(shape), 2.0).to_event(len(shape)))
            pyro.sample("y", dist.Normal(x, 1.0).to_event(len(shape)), obs=torch.ones(shape))

        guide = AutoFlow(model, seed=0).setup()
        assert guide.latent_dim == 1 and guide.sample_posterior(3)["x"].shape == (3, *shape)
        assert torch.tensor(steps(model, guide, Trace_ELBO(), 2)).isfinite().all()


def test_subsampled_likelihood():
    """Global latents and minibatches: the start and the steps see scaled minibatches."""
    y = torch.randn(50) + 2

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0, 5))
        with pyro.plate("data", len(y), subsample_size=10) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    guide = AutoFlow(model, seed=0).setup(y)
    assert guide.subsampled
    mean, sd = guide.preconditioner.loc, guide.preconditioner.scale.squeeze()
    assert abs(mean - 2) < 1 and 0.05 < sd < 0.5
    elbos = (
        Trace_ELBO(),
        Trace_ELBO(num_particles=4, vectorize_particles=True),
        JitTrace_ELBO(ignore_jit_warnings=True),
    )
    for elbo in elbos:
        assert torch.tensor(steps(model, guide, elbo, 2, y)).isfinite().all()


def test_missing_data_by_mask():
    y = torch.tensor([1.0, torch.nan, 2.0, 3.0])
    seen = y.isfinite()

    def model(y, seen):
        mu = pyro.sample("mu", dist.Normal(0, 5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y.nan_to_num(), obs_mask=seen)

    guide = AutoFlow(model, SMALL, seed=0).setup(y, seen)
    assert {site.name for site in guide.latents} == {"mu", "y_unobserved"}
    assert torch.tensor(steps(model, guide, Trace_ELBO(), 2, y, seen)).isfinite().all()


def test_model_is_a_module():
    """A ``PyroModule`` with parameters of its own keeps them; the guide has none of these."""

    class Model(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(1, 1)

        def forward(self, x, y):
            w = pyro.sample("w", dist.Normal(0, 1))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(w * self.net(x).squeeze(-1), 1.0), obs=y)

    model = Model()
    guide = Quick(model)
    held = snapshot(model)
    steps(model, guide, Trace_ELBO(), 3, torch.randn(4, 1), Y)
    assert change(model, held) and not [n for n, _ in guide.named_parameters() if "net.weight" in n and "flow" not in n]
    assert set(dict(guide.named_modules())) & {"flow"}


# NeuTra


def test_transform_has_the_gradient_of_its_log_determinant():
    """What Hamiltonian dynamics follows: the pulled-back density's gradient against finite differences."""
    guide = shake(AutoFlow(groups, SMALL, seed=0, dtype=torch.float64).setup(Y.double()), 0.2)
    density, chain = guide.density(Y.double()), guide.get_transform()
    for parameter in guide.parameters():
        parameter.requires_grad_(False)

    def pulled_back(x):
        z = chain(x)
        return (density(z[None]).squeeze(0) + chain.log_abs_det_jacobian(x, z)).sum()

    for scale in (1.0, 5.0):
        x = (scale * torch.randn(6, dtype=torch.float64)).requires_grad_()
        assert torch.autograd.gradcheck(pulled_back, (x,), eps=1e-6, atol=1e-4, rtol=1e-4)


def test_neutra():
    guide = Quick(groups).setup(Y)  # and never called
    guide.requires_grad_(False)
    neutra = NeuTraReparam(guide)
    model = poutine.reparam(groups, config=lambda _: neutra)
    sampler = MCMC(HMC(model, step_size=0.1, num_steps=3), num_samples=10, warmup_steps=5, disable_progbar=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        sampler.run(Y)
    latent = sampler.get_samples()[f"{next(iter(guide.latents)).name.rsplit('/', 1)[0]}_shared_latent"]
    draws = neutra.transform_sample(latent.unsqueeze(-2))
    assert draws["theta"].shape == (10, 4) and all(v.isfinite().all() for v in draws.values())
    torch.testing.assert_close(draws["mu"], guide.latents.draws(guide.get_transform()(latent))["mu"].unsqueeze(-1))
