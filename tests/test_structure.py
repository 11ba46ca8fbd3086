"""Guides with the model's dependencies: found from its plates, confirmed by gradients, compared with exact moments."""

import copy
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import Sinh
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO

import pyro_flows as pf
from pyro_flows.infer import AutoFlow, fit_guide, load_guide
from pyro_flows.infer.diagnostics import importance, resample
from pyro_flows.infer.guides.members import pick_members
from pyro_flows.infer.models.whole import WholePlates
from pyro_flows.transforms import Plated

GROUP = torch.arange(120) % 20
ROWS = torch.linspace(-2.0, 2.0, 120)


def data(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sd = 0.5 + torch.rand(count, generator=generator)
    return 1.5 + 1.5 * torch.randn(count, generator=generator) + sd * torch.randn(count, generator=generator), sd


def normals(y, sd, centered=True):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("members", len(y)):
        if centered:
            theta = pyro.sample("theta", dist.Normal(mu, tau))
        else:
            theta = mu + tau * pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, sd), obs=y)


def exact(y, sd):
    """Means and standard deviations of mu, log tau and thetas of the centered model, by a grid over tau."""
    y, sd = y.double(), sd.double()
    t = torch.linspace(-4.0, 3.0, 2001, dtype=torch.float64)[:, None]
    spread = (2 * t).exp() + sd**2
    precision = (1 / spread).sum(1) + 1 / 25
    mean = (y / spread).sum(1) / precision
    log_p = -0.5 * t[:, 0] ** 2 - 0.5 * spread.log().sum(1) - 0.5 * precision.log()
    log_p = log_p - 0.5 * (y**2 / spread).sum(1) + 0.5 * precision * mean**2
    weight = log_p.softmax(0)
    shrunk = (2 * t).exp() / spread
    # theta given tau: over mu, too.
    each = shrunk * y + (1 - shrunk) * mean[:, None]
    variance = shrunk * sd**2 + (1 - shrunk) ** 2 / precision[:, None]

    def moments(means, variances):
        total = (weight[:, None] * means).sum(0)
        return total, ((weight[:, None] * (variances + means**2)).sum(0) - total**2).sqrt()

    parts = [(mean[:, None], 1 / precision[:, None]), (t, torch.zeros_like(t)), (each, variance)]
    return tuple(torch.cat(each) for each in zip(*(moments(*part) for part in parts), strict=True))


def indexed(x, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", 20):
        level = pyro.sample("level", dist.Normal(mu, tau))
        rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(level[..., GROUP] + rate[..., GROUP] * x, 1.0), obs=y)


def vector(x, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    level = pyro.sample("level", dist.Normal(torch.zeros(20), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(mu.unsqueeze(-1) + level[..., GROUP], 1.0), obs=y)


def unbroadcast(x, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 20):
        level = pyro.sample("level", dist.Normal(mu, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(level[GROUP], 1.0), obs=y)


def crossed(x, y):
    with pyro.plate("A", 20):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("B", 6):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(a[..., GROUP] + b[..., torch.arange(120) // 20], 1.0), obs=y)


def nested(x, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    spread = pyro.sample("spread", dist.LogNormal(0.0, 0.5))
    with pyro.plate("classes", 6, dim=-2):
        mean = pyro.sample("mean", dist.Normal(mu, spread))
        with pyro.plate("pupils", 20, dim=-1):
            pupil = pyro.sample("pupil", dist.Normal(mean, 0.7))
            pyro.sample("y", dist.Normal(pupil, 0.5), obs=y.reshape(6, 20))


def coupled(x, y):
    with pyro.plate("sites", 20):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.factor("smooth", -0.5 * (a[..., 2:] - a[..., :-2]).square().sum(-1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(a[..., GROUP], 1.0), obs=y)


def weakly_coupled(x, y):
    """Two members only."""
    with pyro.plate("sites", 20):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.factor("pair", -0.01 * a[..., 6] * a[..., 9])
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(a[..., GROUP], 1.0), obs=y)


def unmixed(x, y):
    with pyro.plate("groups", 20):
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(p[..., GROUP, 0], 1.0), obs=y)


def built(model, *args, **options):
    options = {"dependencies": "model", "start": "prior", "seed": 0} | options
    return AutoFlow(model, **options).setup(*(args or (ROWS, 0.5 * ROWS)))


FOUND = {
    "indexed": (indexed, 2, {"groups": (20, 2)}),
    "vector": (vector, 1, {"vectors of 20": (20, 1)}),
    "one draw at a time": (unbroadcast, 1, {"groups": (20, 1)}),
    "crossed": (crossed, 6, {"A": (20, 1)}),
    "nested": (nested, 2, {"classes": (6, 1), "classes x pupils": (120, 1)}),
    "several numbers each": (unmixed, 0, {"groups": (20, 2)}),
}


@pytest.mark.parametrize("name", FOUND)
def test_structure_is_found(name):
    model, count, groups = FOUND[name]
    guide = built(model)
    found = guide.structure
    assert len(found.globals) == count
    assert {group.name: tuple(group.places.shape) for group in found.groups} == groups
    labels = guide.latents.names()
    for group in found.groups:
        for place, row in enumerate(group.places.tolist()):
            # Members' entries of all sites, by their place in the plates.
            numbers = {labels[k].partition("[")[2].rstrip("]") for k in row}
            first = next(iter(numbers)).split(",")
            at = int(first[0]) * 20 + int(first[1]) if len(group.name.split(" x ")) == 2 else int(first[0])
            assert at == place
    if name == "nested":
        ((parent, of),) = found.groups[1].above
        assert parent == 0
        assert of.tolist() == [k // 20 for k in range(120)]
    assert f"{count} global latent" in repr(guide)
    assert f"of {next(iter(groups))!r}" in repr(guide)


@pytest.mark.parametrize("model", [coupled, pytest.param(weakly_coupled, marks=pytest.mark.full)])
def test_coupled_members_are_refused(model):
    refuses(ValueError, "'sites': its members depend on each other.*leave dependencies out", built, model)
    assert AutoFlow(model, start="prior").setup(ROWS, ROWS).structure is None


def test_refuses_models_without_plates_and_other_words():
    def plain(x, y):
        pyro.sample("y", dist.Normal(pyro.sample("a", dist.Normal(0.0, 1.0)), 1.0), obs=y.sum())

    refuses(ValueError, "no latents in plates", built, plain)
    refuses(ValueError, "dependencies.*'model'.*'dense'.*'both'", AutoFlow, plain, dependencies="both")


def test_default_goes_by_dimension():
    small, large = (AutoFlow(normals, start="prior").setup(*data(count)) for count in (8, 80))
    assert small.structure is None
    assert "dense" in repr(small)
    assert large.structure is not None
    assert AutoFlow(normals, start="prior", dependencies="dense").setup(*data(80)).structure is None
    assert AutoFlow(normals, partial(pf.realnvp, num_layers=2), start="prior").setup(*data(80)).structure is None
    assert "not built" in repr(AutoFlow(normals))


def test_parameters_are_linear_in_members():
    few, many = (
        sum(p.numel() for p in AutoFlow(normals, start="prior").setup(*data(count)).parameters())
        for count in (100, 200)
    )
    more = sum(p.numel() for p in AutoFlow(normals, start="prior").setup(*data(300)).parameters())
    assert more - many == many - few > 0


def effective(guide, *args, num_samples=1000):
    density = guide.density(*args)
    with torch.no_grad():
        z, log_q = guide.flow.rsample_and_log_prob((num_samples,))
        return importance(density(z) - log_q).ess


@pytest.mark.parametrize("centered", [True, pytest.param(False, marks=pytest.mark.full)])
def test_start_is_nearly_exact_for_normals(centered):
    y, sd = (part.double() for part in data(200))
    guide = AutoFlow(partial(normals, centered=centered), seed=0).setup(y, sd)
    assert effective(guide, y, sd) > 0.9


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_against_exact_ones(dtype):
    y, sd = (part.to(dtype) for part in data(100))
    fit = fit_guide(AutoFlow(normals, seed=1), y, sd, steps=500, progress=False)
    mean, width = exact(y, sd)
    z = fit.flow.sample((4000,)).double()
    assert fit.ess > 0.95
    # The largest of 102 errors of means, each of standard error 1 / 63.
    assert ((z.mean(0) - mean) / width).abs().max() < 0.07
    assert (z.std(0) / width - 1).abs().max() < 0.06


@pytest.mark.full
def test_members_are_picked_by_their_own_weights():
    """A poor guide of forty independent members: joint weights are useless, members' own are not."""
    shape = torch.linspace(1.0, 6.0, 40, dtype=torch.float64)

    def gammas():
        with pyro.plate("members", 40):
            x = pyro.sample("x", dist.Gamma(shape, 1.0))
        pyro.factor("none", 0.0 * x.sum(-1))

    guide = AutoFlow(gammas, dependencies="model", start="prior", seed=0).setup()
    with torch.no_grad():
        guide.preconditioner.place(torch.digamma(shape) - 0.1, 1.3 * torch.polygamma(1, shape).sqrt())
    torch.manual_seed(0)
    z, log_weights = pick_members(guide.flow, guide.density(), guide.structure, 2000)
    found = importance(log_weights)
    assert effective(guide, num_samples=2000) < 0.02
    assert found.ess > 0.1
    # The evidence of a normalized prior is 1.
    assert abs(found.log_evidence) < 4 * found.log_evidence_error
    drawn = guide.latents.draws(resample(z, log_weights, 2000))["x"]
    assert ((drawn.mean(0) - shape).abs() / shape.sqrt()).max() < 0.25


@pytest.mark.full
def test_nested_plates_fit():
    generator = torch.Generator().manual_seed(3)
    y = (torch.randn(6, 1, generator=generator) + torch.randn(6, 20, generator=generator)).double().flatten()
    fit = fit_guide(AutoFlow(nested, seed=0, dependencies="model"), ROWS, y, steps=200, progress=False)
    assert fit.ess > 0.9
    # The means of pupils given the mean of their class and their score.
    drawn = fit.sample(4000)
    left = drawn["pupil"] - (0.25 * drawn["mean"] + 0.49 * y.reshape(6, 20)) / 0.74
    assert (left.mean(0).abs() < 5 * (0.25 * 0.49 / 0.74 / 4000) ** 0.5).all()
    assert (left.std(0) / (0.25 * 0.49 / 0.74) ** 0.5 - 1).abs().max() < 0.07


@pytest.mark.full
def test_gradients_reach_all_parameters():
    guide = built(nested)
    svi = SVI(nested, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO(num_particles=4, vectorize_particles=True))
    before = copy.deepcopy(guide.flow.state_dict())
    losses = [svi.step(ROWS, 0.5 * ROWS) for _ in range(3)]
    assert all(map(math.isfinite, losses))
    after = guide.flow.state_dict()
    moved = [
        name for name, value in before.items() if value.is_floating_point() and not torch.equal(value, after[name])
    ]
    names = {name for name, _ in guide.flow.named_parameters()}
    assert names == set(moved)
    drawn = Predictive(nested, guide=guide, num_samples=5, parallel=True)(ROWS, 0.5 * ROWS)
    assert drawn["pupil"].shape == (5, 6, 20)


def small_builder(dim):
    """With a part from outside of the package."""
    return pf.realnvp(dim, univariate=Sinh(), num_layers=2, hidden_dims=(4,))


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:GuideFit.save")
@pytest.mark.parametrize("builder", [None, small_builder])
def test_files_keep_the_structure(builder, tmp_path):
    guide = AutoFlow(indexed, builder, dependencies="model", start="prior", seed=0)
    fit = fit_guide(guide, ROWS, 0.5 * ROWS, steps=3, progress=False)
    fit.save(tmp_path / "fit.pt")
    again = load_guide(tmp_path / "fit.pt", builder=builder)
    assert isinstance(again.flow.chain[0], Plated)
    z = fit.assessment.draws[:20]
    with torch.no_grad():
        assert torch.equal(fit.flow.log_prob(z), again.flow.log_prob(z))
    pickled = copy.deepcopy(fit.guide)
    assert str(pickled.structure) == str(fit.guide.structure)


@pytest.mark.full
def test_checkpoints_resume_to_the_same_fit(tmp_path):
    guide = partial(AutoFlow, indexed, dependencies="model", seed=0)
    whole = fit_guide(guide(), ROWS, 0.5 * ROWS, steps=20, progress=False)
    path = tmp_path / "part.pt"
    part = fit_guide(guide(), ROWS, 0.5 * ROWS, steps=20, progress=False, checkpoint=path, checkpoint_every=5)
    resumed = fit_guide(guide(), ROWS, 0.5 * ROWS, steps=20, progress=False, checkpoint=path)
    for other in (part, resumed):
        assert all(map(torch.equal, whole.flow.state_dict().values(), other.flow.state_dict().values()))


HANDLED = {
    "scale": lambda model: poutine.scale(model, 0.5),
    "mask": lambda model: poutine.mask(model, torch.tensor(True)),
    "condition": lambda model: pyro.condition(model, {"mu": torch.tensor(0.3)}),
    "block": lambda model: poutine.block(model, hide=["nothing"]),
}


@pytest.mark.parametrize("name", HANDLED)
def test_structure_under_handlers(name):
    guide = built(HANDLED[name](indexed))
    assert [group.name for group in guide.structure.groups] == ["groups"]
    assert len(guide.structure.globals) == (1 if name == "condition" else 2)


def parts(y, sd, seen):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("members", len(y), subsample_size=seen) as i:
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sd[i]), obs=y[i])


def test_fits_see_plates_as_a_whole():
    """The structure and the density are those of all members."""
    y, sd = (part.double() for part in data(60))
    guide = built(parts, y, sd, 10)
    whole = built(normals, y, sd)
    assert str(guide.structure) == str(whole.structure)
    z = guide.flow.sample((5,))
    torch.testing.assert_close(guide.density(y, sd, 10)(z), whole.density(y, sd)(z))


@pytest.mark.full
def test_svi_trains_on_parts():
    y, sd = data(60)
    guide = AutoFlow(parts, dependencies="model", start="prior", seed=0).setup(y, sd, 10)
    trace = poutine.trace(guide).get_trace(y, sd, 10)
    index = trace.nodes["members"]["value"]
    assert index.shape == trace.nodes["theta"]["value"].shape == (10,)
    assert trace.nodes["theta"]["scale"] == 6.0
    latent = next(node["value"] for name, node in trace.nodes.items() if name.endswith("_latent"))
    assert latent.shape == (62,)
    torch.testing.assert_close(trace.nodes["theta"]["value"], latent[2:][index])
    svi = SVI(parts, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO(num_particles=3, vectorize_particles=True))
    # An unbiased estimate: the mean over all parts is that of the whole.
    with torch.no_grad():
        losses = torch.tensor([svi.evaluate_loss(y, sd, 10) for _ in range(300)])
        whole = torch.tensor([Trace_ELBO().loss(normals, one_whole(guide), y, sd) for _ in range(300)])
    error = (losses.var() / 300 + whole.var() / 300).sqrt()
    assert abs(losses.mean() - whole.mean()) < 4 * error
    assert math.isfinite(svi.step(y, sd, 10))


def one_whole(guide):
    """The guide of all members, for the model without parts."""

    def draw(y, sd):
        latent = pyro.sample("latent", guide.flow(), infer={"is_auxiliary": True})
        values, ladj = guide.latents.unpack(latent)
        pyro.sample("mu", dist.Delta(values["mu"], log_density=-ladj))
        pyro.sample("tau", dist.Delta(values["tau"]))
        with pyro.plate("members", len(y)):
            pyro.sample("theta", dist.Delta(values["theta"]))

    return draw


def test_other_plates_keep_their_parts():
    """Handlers end with their models, also those that run within."""
    y, sd = data(60)
    AutoFlow(parts, dependencies="model", start="prior").setup(y, sd, 10)
    trace = poutine.trace(parts).get_trace(y, sd, 10)
    assert trace.nodes["theta"]["value"].shape == (10,)
    with WholePlates(frozenset(["members"])):
        assert poutine.trace(parts).get_trace(y, sd, 10).nodes["theta"]["value"].shape == (60,)
        with WholePlates(frozenset(["others"])):
            assert poutine.trace(parts).get_trace(y, sd, 10).nodes["theta"]["value"].shape == (60,)
    assert poutine.trace(parts).get_trace(y, sd, 10).nodes["theta"]["value"].shape == (10,)


def test_models_of_one_part_are_refused():
    y, sd = data(10)

    def given(y, sd):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("members", 60, subsample_size=10):
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta, sd), obs=y)

    refuses(ValueError, "'members', of which a run sees 10 of 60.*y\\[i\\]", AutoFlow(given).setup, y, sd)


@pytest.mark.full
def test_even_starts_are_not_trained():
    y, sd = (part.double() for part in data(2000))
    fit = fit_guide(AutoFlow(normals, seed=0), y, sd, steps=100, progress=False)
    assert len(fit.history) == 0
    assert fit.ess > 0.99


@pytest.mark.full
@pytest.mark.parametrize("start", ["pathfinder", "prior"])
def test_only_informed_starts_skip_the_affine_phase(start):
    guide = AutoFlow(indexed, dependencies="model", start=start, seed=0)
    fit = fit_guide(guide, ROWS, ROWS, steps=10, progress=False)
    assert fit.history.phase[0] == ("flow" if start == "pathfinder" else "affine")


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_members_that_are_flat_at_their_modes_keep_the_structure(dtype, default_dtype):
    """A scale of each row's own falls to zero where the row is at the location, and has no curvature there."""

    def rows(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc, pyro.sample("scale", dist.HalfNormal(1.0))), obs=y)

    default_dtype(dtype)
    torch.manual_seed(6)
    guide = AutoFlow(rows, dependencies="model", seed=0).setup(torch.randn(24))
    assert guide.structure is not None
    scale = guide.preconditioner.scale.norm(dim=-1) if guide.preconditioner.full else guide.preconditioner.scale
    # The exact standard deviation of the location is 0.1 to 0.3, and those of the scales' logarithms are 0.5 to 3.
    assert 0.01 < scale[0] < 0.5 and scale[1:].max() < 10
