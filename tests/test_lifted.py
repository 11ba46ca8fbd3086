"""Latents on circles, spheres and tori, as directions of points of the plane or the space around them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor
from torch.distributions import biject_to

import pyro_flows as pf
from pyro_flows.distributions import VonMisesFisher
from pyro_flows.infer import AutoFlow, Circles
from pyro_flows.infer.models.latents import same_support
from pyro_flows.infer.models.lifted import Angles, circle, on_circles
from pyro_flows.infer.models.supports import plain_support, support_of

DIRECTIONS = torch.nn.functional.normalize(
    torch.tensor([[0.2, 0.9, 0.5], [0.4, 0.8, 0.7], [-0.2, 0.7, 0.8], [0.3, 1.0, 0.1]]), dim=-1
)


def directions(kappa: float = 4.0):
    """A mean direction with a uniform prior, whose posterior is von Mises-Fisher."""
    mu = pyro.sample("mu", dist.ProjectedNormal(torch.zeros(3)))
    with pyro.plate("rows", len(DIRECTIONS)):
        pyro.sample("x", VonMisesFisher(mu, kappa), obs=DIRECTIONS)


def exact_directions(kappa: float = 4.0) -> tuple[VonMisesFisher, float]:
    """The posterior and the log-evidence, by Bayes' rule at one point."""
    rows = torch.nn.functional.normalize(DIRECTIONS.double(), dim=-1)
    total = kappa * rows.sum(0)
    posterior = VonMisesFisher(total / total.norm(), total.norm())
    at = torch.eye(3).double()[0]
    joint = VonMisesFisher(at, kappa).log_prob(rows).sum() - math.log(4 * math.pi)
    return posterior, float(joint - posterior.log_prob(at))


def around():
    """An angle beside a number on the line: the data say where both are, the angle across the edge at pi."""
    speed = pyro.sample("speed", dist.Normal(0.0, 2.0))
    turn = pyro.sample("turn", dist.VonMises(3.0, 1.0))
    seen = dist.VonMises(turn + 0.5 * speed, 3.0)
    pyro.sample("angle", seen, obs=torch.tensor(-2.5))
    pyro.sample("flow", dist.Normal(speed + turn.sin(), 0.5), obs=torch.tensor(0.3))


def turns(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) * (2 * math.pi / count) - math.pi


def exact_around() -> tuple[float, Tensor, Tensor]:
    """Log-evidence, and means of the speed and of the turn's cosine and sine, on a grid."""
    speed, turn = (
        axis.reshape(-1) for axis in torch.meshgrid(torch.linspace(-6, 6, 601).double(), turns(600), indexing="ij")
    )
    trace = poutine.trace(poutine.condition(around, {"speed": speed, "turn": turn})).get_trace()
    trace.compute_log_prob()
    joint = sum(site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample")
    evidence = joint.logsumexp(0) + math.log(0.02 * 2 * math.pi / 600)
    weight = joint.softmax(0)
    return float(evidence), weight @ speed, torch.stack((weight @ turn.cos(), weight @ turn.sin()))


MIXED = {"periodic": [True, False, True], "num_layers": 1, "hidden_dims": (4,)}
ANGULAR = {
    "plain": (lambda: dist.VonMises(0.0, torch.ones(3)), (3, 2)),
    "event": (lambda: dist.VonMises(torch.zeros(2, 3), 1.0).to_event(1), (2, 3, 2)),
    "expanded": (lambda: dist.VonMises(0.0, 1.0).expand([4]).mask(torch.tensor(True)), (4, 2)),
    "torus": (lambda: dist.SineBivariateVonMises(0.0, 0.0, 2.0, 2.0, torch.tensor(0.5)), (2, 2)),
    "mixture": (
        lambda: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.VonMises(torch.zeros(2), 1.0)),
        (2,),
    ),
    "flow": (lambda: pf.Flow(pf.ncsf(3, **MIXED))(), (5,)),
}


@pytest.mark.parametrize("name", ANGULAR)
def test_angles_get_a_plane(name):
    make, free = ANGULAR[name]
    fn = make()
    if name == "torus":
        fn = dist.SineBivariateVonMises(*map(torch.tensor, (0.0, 0.0, 2.0, 2.0)), correlation=torch.tensor(0.5))
    before = fn.support
    found = on_circles(fn)
    assert same_support(fn.support, before)  # the user's own stays
    value = fn.sample()
    lift = biject_to(found.support)
    z = lift.inv(value)
    assert z.shape == free == lift.inverse_shape(value.shape) and lift.forward_shape(z.shape) == value.shape
    torch.testing.assert_close(lift(z), value, atol=1e-5, rtol=1e-5)
    if name != "flow":  # of any radius
        torch.testing.assert_close(lift(3 * z), lift(z), atol=1e-5, rtol=1e-5)
    assert lift.log_abs_det_jacobian(z, value).shape == fn.batch_shape
    torch.testing.assert_close(found.log_prob(value), fn.log_prob(value))
    assert found.support.check(value).all() and not found.support.check(value * math.nan).any()
    if name != "mixture":
        assert same_support(support_of(plain_support(found.support)), found.support)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_lifted_density_has_the_same_integral(size):
    lift = biject_to(dist.constraints.sphere)
    r = torch.linspace(1e-4, 8, 80_001, dtype=torch.float64, device="cpu")
    z = r[:, None] * torch.nn.functional.normalize(torch.ones(size).double(), dim=0)
    torch.testing.assert_close(lift(z), z[-1].expand_as(z) / 8)
    each = lift.log_abs_det_jacobian(z, lift(z)).exp() * r ** (size - 1)
    assert torch.trapezoid(each, r) == pytest.approx(1, abs=1e-6)
    assert lift(torch.zeros(2, size)).norm(dim=-1).eq(1).all()
    z = torch.randn(4, size, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: (lift(z), lift.log_abs_det_jacobian(z, lift(z))), z)


def test_evidence_of_an_angle_is_that_of_one_turn():
    """The density over the plane has the integral that the model has over the circle."""

    def model():
        turn = pyro.sample("turn", dist.VonMises(torch.tensor(3.0).double(), 2.0))
        pyro.sample("seen", dist.VonMises(2 * turn, 1.5), obs=torch.tensor(-2.0).double())

    density = AutoFlow(model, start="prior", seed=0).setup().density()
    axis = torch.linspace(-5, 5, 401, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        mass = density(z + 1e-9).exp().sum() * 0.025**2
    turn = turns(500)
    want = (
        (dist.VonMises(3.0, 2.0).log_prob(turn) + dist.VonMises(2 * turn, 1.5).log_prob(torch.tensor(-2.0)))
        .exp()
        .mean()
        * 2
        * math.pi
    )
    torch.testing.assert_close(mass, want, rtol=1e-4, atol=0)


def test_models_of_every_kind_are_taken():
    def plates():
        with pyro.plate("groups", 3):
            turn = pyro.sample("turn", dist.VonMises(0.0, 1.0))
            axis = pyro.sample("axis", dist.ProjectedNormal(torch.zeros(3)))
            with pyro.plate("rows", 2):
                pyro.sample("y", dist.Normal(turn.cos() + axis[..., 0], 1.0), obs=torch.ones(2, 3))
        pyro.sample(
            "pair", dist.SineBivariateVonMises(*torch.tensor([0.0, 0.0, 2.0, 2.0]), correlation=torch.tensor(0.5))
        )
        pyro.sample("other", dist.VonMises3D(torch.ones(3)))

    guide = AutoFlow(plates, start="prior", seed=0).setup()
    shapes = {site.name: (tuple(site.shape), site.size) for site in guide.latents}
    assert shapes == {"turn": ((3,), 6), "axis": ((3, 3), 9), "pair": ((2,), 4), "other": ((3,), 3)}
    draw = guide()
    assert {name: tuple(value.shape) for name, value in draw.items()} == {
        name: shape for name, (shape, _) in shapes.items()
    }
    assert (draw["axis"].norm(dim=-1) - 1).abs().max() < 1e-6 and draw["turn"].abs().max() <= math.pi
    density = guide.density()
    z = torch.randn(5, guide.latents.dim)
    torch.testing.assert_close(density(z), torch.stack([density._alone(row) for row in z]), atol=1e-4, rtol=1e-4)
    assert Trace_ELBO().loss(plates, guide) < math.inf
    both = guide.latents.unpack(z)[0]
    torch.testing.assert_close(guide.latents.unpack(guide.latents.pack(both))[0], both, atol=1e-5, rtol=1e-5)
    assert len(guide.latents.names()) == guide.latents.dim


@pytest.mark.full
def test_von_mises_fisher_posterior():
    fit = pf.fit_guide(AutoFlow(directions, seed=0), steps=1500, progress=False)
    exact, evidence = exact_directions()
    assert fit.ess > 0.85 and fit.log_evidence == pytest.approx(evidence, abs=0.03)
    mu = fit.sample(20_000, resampled=True)["mu"].double()
    spread = exact.sample((20_000,)).std(0)
    assert ((mu.mean(0) - exact.mean).abs() < 0.05 * spread).all()
    assert ((mu.std(0) - spread).abs() < 0.05 * spread).all()


@pytest.mark.full
def test_an_angle_beside_a_number():
    fit = pf.fit_guide(AutoFlow(around, seed=0), steps=1500, progress=False)
    evidence, speed, direction = exact_around()
    assert fit.log_evidence == pytest.approx(evidence, abs=0.03)
    draws = fit.sample(20_000, resampled=True)
    turn = draws["turn"].double()
    assert draws["speed"].double().mean() == pytest.approx(float(speed), abs=0.03)
    torch.testing.assert_close(torch.stack((turn.cos().mean(), turn.sin().mean())), direction, atol=0.02, rtol=0)


@pytest.mark.full
def test_guide_files(tmp_path):
    fit = pf.fit_guide(AutoFlow(around, seed=0), steps=5, progress=False)
    fit.save(tmp_path / "guide.pt")
    again = pf.load_guide(tmp_path / "guide.pt")
    turn = again.latents.sites[1].support
    assert isinstance(turn, Angles) and same_support(turn, circle)
    values = fit.sample(3)
    torch.testing.assert_close(again.log_prob(values), fit.log_prob(values))


@pytest.mark.full
def test_pyros_own_inference():
    """NUTS, NeuTra and AutoNormal see spheres by themselves, and angles under the handler."""
    exact, _ = exact_directions()
    mcmc = MCMC(NUTS(directions), num_samples=200, warmup_steps=100, disable_progbar=True)
    pyro.set_rng_seed(0)
    mcmc.run()
    mu = mcmc.get_samples()["mu"]
    assert ((mu.norm(dim=-1) - 1).abs() < 1e-5).all()
    assert ((mu.mean(0) - exact.mean).abs() < 0.06).all()

    _, speed, direction = exact_around()
    guide = AutoFlow(around, seed=0).setup()
    neutra = NeuTraReparam(guide.requires_grad_(False))
    for model in (Circles()(around), neutra.reparam(Circles()(around))):
        mcmc = MCMC(NUTS(model), num_samples=300, warmup_steps=100, disable_progbar=True)
        mcmc.run()
        draws = mcmc.get_samples()
        if "turn" not in draws:
            (latent,) = draws.values()
            draws = neutra.transform_sample(latent)
        turn = draws["turn"].double()
        assert draws["speed"].double().mean() == pytest.approx(float(speed), abs=0.15)
        torch.testing.assert_close(torch.stack((turn.cos().mean(), turn.sin().mean())), direction, atol=0.12, rtol=0)

    pyro.clear_param_store()
    guide = AutoNormal(directions)
    svi = SVI(directions, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(8, vectorize_particles=True))
    for _ in range(150):
        svi.step()
    median = guide.median()["mu"]
    assert median @ exact.loc.float() > 0.95


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:this model does not run for many draws")
def test_data_that_cannot_be_drawn_are_told():
    def model(x):
        mu = pyro.sample("mu", dist.ProjectedNormal(torch.ones(3)))
        pyro.sample(
            "x",
            dist.VonMises3D(concentration=5 * mu.unsqueeze(-2)).expand((*mu.shape[:-1], len(x))).to_event(1),
            obs=x,
        )

    x = torch.nn.functional.normalize(torch.randn(6, 3), dim=-1)
    fit = pf.fit_guide(model, x, steps=5, progress=False)
    for call in (fit.predictive, fit.to_arviz):
        refuses(NotImplementedError, r"\['x'\] cannot be drawn.*posterior_predictive=False", call)
    assert fit.to_arviz(posterior_predictive=False).posterior["mu"].shape[-1] == 3
