"""Flows on spheres: densities with respect to the surface measure, poles, bases, and latents on circles and spheres."""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import shake, train
from pyro.infer import SVI
from torch import Tensor

import pyro_flows as pf
from pyro_flows import plots
from pyro_flows.distributions import UniformSphere, VonMisesFisher
from pyro_flows.distributions.sphere import log_bessel
from pyro_flows.transforms import RecursiveSphere

SMALL = {"hidden_dims": (8,), "bins": 5, "num_layers": 2}


def unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Unit vectors in float64."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return unit(torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu"))


def grid(size: int, count: int) -> tuple[Tensor, Tensor]:
    """Unit vectors of ``size`` coordinates and their areas: midpoints in the angle and in an angle of each height."""
    turn = (torch.arange(2 * count, dtype=torch.float64, device="cpu") + 0.5) * (math.pi / count)
    x, area = torch.stack((turn.cos(), turn.sin()), -1), torch.full((2 * count,), math.pi / count).double()
    slope = turn[:count]
    for level in range(3, size + 1):
        each = torch.cat((slope.sin()[:, None, None] * x, slope.cos()[:, None, None].expand(-1, len(x), 1)), -1)
        x = each.reshape(-1, level)
        area = (slope.sin()[:, None] ** (level - 2) * (math.pi / count) * area).reshape(-1)
    return x, area


def made(size: int = 3, scale: float = 0.2, **options: object) -> pf.Flow:
    torch.manual_seed(0)
    return shake(pf.Flow(pf.sphere(size, **{**SMALL, **options})), scale, seed=1).double()


def mass(density: object, size: int, count: int) -> float:
    x, area = grid(size, count)
    with torch.no_grad():
        return float((density.log_prob(x).exp() * area).sum())


# The density


def test_grid_has_the_area_of_the_sphere():
    for size in (2, 3, 4):
        assert grid(size, 40)[1].sum() == pytest.approx(2 * math.pi ** (size / 2) / math.gamma(size / 2), rel=1e-3)


@pytest.mark.parametrize(("size", "count"), [(2, 2000), (3, 200), pytest.param(4, 90, marks=pytest.mark.full)])
def test_density_integrates_to_one(size, count):
    assert mass(made(size), size, count) == pytest.approx(1, abs=2e-3)


@pytest.mark.full
@pytest.mark.parametrize(("size", "count", "tolerance"), [(3, 700, 1e-4), (4, 80, 1e-3)])
def test_density_integrates_to_one_after_training(size, count, tolerance):
    torch.manual_seed(0)
    flow = pf.Flow(pf.sphere(size, **SMALL))
    places = unit(torch.randn(3, size))
    data = VonMisesFisher(places[torch.randint(3, (2000,))], torch.tensor(20.0)).sample()
    losses = train(flow, data, 150, 1e-2)
    assert losses[-1] < losses[0] - 0.5
    assert mass(flow.double(), size, count) == pytest.approx(1, abs=tolerance)


def chart(x: Tensor) -> Tensor:
    """Angles of unit vectors, from the last coordinate on."""
    angles = [torch.atan2(torch.linalg.vector_norm(x[:k]), x[k]) for k in range(len(x) - 1, 1, -1)]
    return torch.stack([*angles, torch.atan2(x[1], x[0])])


def place(angles: Tensor) -> Tensor:
    """Inverts :func:`chart`."""
    x = torch.stack((angles[-1].cos(), angles[-1].sin()))
    for angle in angles[:-1].flip(0):
        x = torch.cat((angle.sin() * x, angle.cos()[None]))
    return x


def log_area(angles: Tensor) -> Tensor:
    """The logarithm of the surface measure in the chart."""
    return sum(((len(angles) - 1 - k) * a.sin().log() for k, a in enumerate(angles[:-1])), torch.zeros(()).double())


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_ladj_is_that_of_autograd_in_a_chart(size):
    flow = made(size, 0.3, context_dim=2).chain
    context = torch.tensor([0.3, -1.2]).double()
    for x in drawn(2, size, seed=size):
        for move in (flow.forward_and_ladj, flow.inverse_and_ladj):
            y, ladj = move(x, context)
            jacobian = torch.autograd.functional.jacobian(
                lambda a, move=move: chart(move(place(a), context)[0]), chart(x)
            )
            want = torch.linalg.slogdet(jacobian)[1] + log_area(chart(y)) - log_area(chart(x))
            torch.testing.assert_close(ladj, want, rtol=1e-8, atol=1e-8)


def test_fresh_flow_is_uniform():
    for size in (2, 3, 5):
        x = drawn(7, size).float()
        y, ladj = pf.sphere(size, **SMALL).forward_and_ladj(x)
        torch.testing.assert_close(y, x)
        torch.testing.assert_close(ladj, torch.zeros(7), atol=1e-5, rtol=0)
        area = 2 * math.pi ** (size / 2) / math.gamma(size / 2)
        torch.testing.assert_close(pf.Flow(pf.sphere(size)).log_prob(x).exp(), torch.full((7,), 1 / area))


def test_draws_follow_the_density():
    """The share of draws in a cap is the density's integral over it, which an error of sign would spoil."""
    flow = made(3, 0.3)
    x, area = grid(3, 200)
    center = unit(torch.tensor([1.0, 1.0, 0.5]).double())
    with torch.no_grad():
        share = (flow.log_prob(x).exp() * area)[x @ center > 0.7].sum()
        torch.manual_seed(0)
        y = flow.sample((20_000,))
    assert ((y @ center > 0.7).double().mean() - share).abs() < 4 * math.sqrt(float(share) / 20_000) + 2e-3


# Poles


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_pole_has_a_derivative_and_one_density(size, axis):
    layer = shake(RecursiveSphere(size, axis=axis, hidden_dims=(8,), bins=5), 0.5, seed=axis).double()
    pole = torch.eye(size).double()[axis]
    for at in (pole, -pole):
        y, ladj = layer.forward_and_ladj(at)
        jacobian = torch.autograd.functional.jacobian(layer, at)
        assert jacobian.isfinite().all()
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], ladj)
        sides = unit(drawn(30, size) - drawn(30, size) @ at[:, None] * at)
        for step in (1e-3, 1e-6):
            near, near_ladj = layer.forward_and_ladj(unit(at + step * sides))
            torch.testing.assert_close((near - y) / step, sides @ jacobian.T, atol=20 * step + 1e-8, rtol=0)
            torch.testing.assert_close(near_ladj, ladj.expand(30), atol=20 * step, rtol=0)


@pytest.mark.parametrize("step", [0.0, 1e-30, 1e-20, 1e-10, 1e-7, 1e-5, 1e-3])
def test_float32_near_poles(step):
    exact = made(3, 0.15)
    flow = copy.deepcopy(exact).float().chain
    x = torch.cat([torch.eye(3), -torch.eye(3)]) + step * drawn(6, 3).float()
    x = torch.where(x.abs() > 0.5, x.sign(), x).requires_grad_()  # of length 1 to rounding for small steps
    x = unit(x) if step > 1e-6 else x
    y, ladj = flow.forward_and_ladj(x)
    truth, true_ladj = exact.chain.forward_and_ladj(unit(x.double()))
    torch.testing.assert_close(y.double(), truth, atol=3e-6, rtol=0)
    torch.testing.assert_close(ladj.double(), true_ladj, atol=1e-4, rtol=0)
    back, back_ladj = flow.inverse_and_ladj(y)
    torch.testing.assert_close(back, x, atol=5e-6, rtol=0)
    torch.testing.assert_close(back_ladj, -ladj, atol=1e-4, rtol=0)
    for total in (y.sum() + ladj.sum(), back.sum() + back_ladj.sum()):
        assert torch.autograd.grad(total, x, retain_graph=True)[0].isfinite().all()


def test_far_parameters_stay_on_the_sphere():
    flow = shake(pf.Flow(pf.sphere(4, **SMALL)), 3.0, seed=0)
    y = flow.sample((2000,))
    assert dist.constraints.sphere.check(y).all()
    assert flow.log_prob(y).isfinite().all()


# Gradients


@pytest.mark.full
def test_path_gradient_is_the_total_one_without_the_score():
    """The path gradient goes through the inverse, near poles too, and the total one through the forward map."""
    flow = made(3, 0.3)
    poles = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    u = torch.cat([drawn(4, 3), *(unit(poles + step * drawn(6, 3, seed=1)) for step in (1e-2, 1e-5))])
    parameters = list(flow.parameters())
    x, ladj = flow.chain.forward_and_ladj(u)
    place = x.detach().requires_grad_()
    log_q = flow.log_prob(place)
    (slope,) = torch.autograd.grad(log_q.sum(), place, retain_graph=True)
    torch.testing.assert_close((slope * place).sum(-1), torch.zeros(len(u)).double(), atol=1e-9, rtol=0)  # tangent
    for k in range(len(u)):
        score = torch.autograd.grad(log_q[k], parameters, retain_graph=True, allow_unused=True)
        path = torch.autograd.grad((slope[k] * x[k]).sum(), parameters, retain_graph=True, allow_unused=True)
        total = torch.autograd.grad(-ladj[k], parameters, retain_graph=True, allow_unused=True)
        for a, b, want in zip(path, score, total, strict=True):
            if want is not None:
                torch.testing.assert_close(a + b, want, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_slope_of_the_density_is_that_in_a_chart(size):
    flow = made(size, 0.3)
    angles = chart(drawn(size, seed=7)).requires_grad_()
    x = place(angles)
    (slope,) = torch.autograd.grad(flow.log_prob(x), x, retain_graph=True)
    found = slope @ torch.autograd.functional.jacobian(place, angles.detach())
    step = 1e-6 * torch.eye(len(angles)).double()
    with torch.no_grad():
        want = torch.stack([(flow.log_prob(place(angles + d)) - flow.log_prob(place(angles - d))) / 2e-6 for d in step])
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-6)


@pytest.mark.full
def test_path_elbo_trains_a_guide_on_the_sphere():
    truth = VonMisesFisher(torch.tensor([0.0, 0.6, -0.8]), 5.0)
    torch.manual_seed(0)
    flow = pf.Flow(pf.sphere(3, **SMALL))

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("x", flow())

    options = {"lr": 2e-2, "betas": (0.9, 0.99)}
    elbo = pf.infer.PathELBO(num_particles=256, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(lambda: pyro.sample("x", truth), guide, pyro.optim.Adam(options, {"clip_norm": 2.0}), elbo)
    losses = [svi.step() for _ in range(120)]
    assert all(math.isfinite(loss) for loss in losses)
    with torch.no_grad():
        x = flow.sample((4000,))
        assert (flow.log_prob(x) - truth.log_prob(x)).mean() < 0.05  # nats


# Hostile input


def test_rows_off_the_sphere():
    flow = pf.Flow(pf.sphere(3, **SMALL))
    for bad in ([1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [math.nan, 1.0, 0.0], [1.001, 0.0, 0.0], [math.inf, 0.0, 0.0]):
        x = torch.stack((torch.tensor([1.0, 0.0, 0.0]), torch.tensor(bad)))
        refuses(ValueError, "expected a value within the support", flow.log_prob, x)
        refuses(ValueError, "support", flow().log_prob, x)
    assert flow.chain.inverse_and_ladj(torch.zeros(3))[0].isnan().all()  # has no direction
    x = torch.tensor([0.6, -0.8, 0.0])
    y, ladj = flow.chain.forward_and_ladj(1e-3 * x)
    torch.testing.assert_close((y, ladj), (1e-3 * flow.chain(x), flow.chain.forward_and_ladj(x)[1]))
    assert flow.log_prob(torch.zeros(0, 3)).shape == (0,)


def test_arguments():
    for wrong in (1, 0, -3, True, 2.5, None):
        refuses((ValueError, TypeError), "input_dim", pf.sphere, wrong)
    refuses(ValueError, "expected axis from -3 to 2, got 3", RecursiveSphere, 3, axis=3)
    refuses(
        ValueError,
        "moves unit vectors, but the base has the support",
        pf.Flow,
        pf.sphere(3),
        dist.Normal(torch.zeros(3), 1).to_event(1),
    )
    refuses(ValueError, "event shape", pf.Flow, pf.sphere(3), VonMisesFisher(torch.eye(4)[0], 1.0))
    refuses(ValueError, "leave the sphere", pf.Chain, [pf.sphere(3), pf.LULinear(3)])
    refuses(ValueError, "the boundary 'interval' has the bound 1", pf.Spline, 8, 2.0, "interval")
    refuses((ValueError, TypeError), "input_dim", UniformSphere, 1)


def test_interval_spline_keeps_small_numbers():
    spline = pf.Spline(6, boundary="interval")
    params = 2 * torch.randn(50, spline.num_params, generator=torch.Generator().manual_seed(0))
    for x in (1e-30, 1e-12, 1e-6):
        x = torch.full((50,), x)
        y, ladj = spline.forward(x, params)
        torch.testing.assert_close(spline.inverse(y, params)[0], x, rtol=1e-5, atol=0)
        torch.testing.assert_close((y / x).log(), ladj, rtol=1e-3, atol=1e-3)
    edges = torch.tensor([0.0, 1.0]).expand(50, 2).T
    torch.testing.assert_close(spline.forward(edges, params.expand(2, 50, -1))[0], edges)


# Bases


@pytest.mark.parametrize("size", [2, 3, 4, 7, 60])
def test_von_mises_fisher_normalizer(size):
    """Against the Bessel functions of torch and a recurrence upwards, which is stable for large arguments only."""
    kappa = torch.tensor([1e3, 1e4, 1e6]).double()
    value, ratio = log_bessel(size / 2 - 1, kappa)
    below, here = torch.special.i0e(kappa), torch.special.i1e(kappa)  # orders 0 and 1
    if size % 2:
        below = torch.sqrt(2 / (math.pi * kappa)) * 0.5  # orders -1/2 and 1/2; the other exponential is 0
        here = below
    order = 1.0 if size % 2 == 0 else 0.5
    while order < size / 2 - 1e-9:
        below, here, order = here, below - 2 * order / kappa * here, order + 1
    torch.testing.assert_close(ratio, here / below, rtol=1e-9, atol=0)
    torch.testing.assert_close(value, below.log() - (size / 2 - 1) * kappa.log(), rtol=0, atol=1e-8)
    assert log_bessel(size / 2 - 1, torch.tensor([0.0, 1e-300, 1e-8, 1e12]))[0].isfinite().all()


def test_von_mises_fisher_is_a_density_of_every_dimension():
    for size, count in ((2, 400), (3, 200), (4, 60), (5, 24)):
        for kappa in (0.0, 0.7, 9.0):
            assert mass(VonMisesFisher(drawn(size), kappa), size, count) == pytest.approx(1, abs=5e-3)
    for kappa in (1e-8, 0.5, 3.0, 300.0, 1e5):
        x, at = drawn(9, 3), drawn(3, seed=3)
        want = kappa * (x @ at - 1) + math.log(kappa / (-2 * math.pi * math.expm1(-2 * kappa)))
        torch.testing.assert_close(VonMisesFisher(at, kappa).log_prob(x), want, atol=1e-7, rtol=1e-7)
    x, at = drawn(9, 3).float(), drawn(3).float()
    torch.testing.assert_close(
        VonMisesFisher(at, 5.0).log_prob(x), dist.VonMises3D(5 * at).log_prob(x), atol=1e-5, rtol=1e-5
    )
    plane = drawn(9, 2)
    angle = torch.atan2(plane[:, 1], plane[:, 0])
    flat = VonMisesFisher(torch.tensor([1.0, 0.0]).double(), 2.5)
    torch.testing.assert_close(
        flat.log_prob(plane), dist.VonMises(0.0, torch.tensor(2.5).double()).log_prob(angle), atol=1e-6, rtol=1e-6
    )
    far = VonMisesFisher(torch.eye(3)[0], 1e8)  # near the mean direction nothing cancels in float32
    assert far.log_prob(torch.tensor([1.0, 1e-4, 0.0])) == pytest.approx(math.log(1e8 / (2 * math.pi)) - 0.5, abs=1e-3)


@pytest.mark.parametrize("size", [2, 3, 4, 9])
def test_von_mises_fisher_draws(size):
    torch.manual_seed(size)
    for kappa in (0.0, 1.5, 40.0, 1e6):
        base = VonMisesFisher(drawn(size).float(), kappa)
        x = base.sample((20_000,))
        assert dist.constraints.sphere.check(x).all()
        spread = x.std(0).clamp(min=1e-6) / 20_000**0.5
        assert ((x.mean(0) - base.mean).abs() < 5 * spread + 1e-6).all()
        # The height's own second moment, by the recurrence of the ratios.
        if kappa:
            height = (x @ base.loc).double()
            ratio = float(log_bessel(size / 2 - 1, torch.tensor(kappa))[1])
            want = 1 - (size - 1) / kappa * ratio
            assert height.square().mean() == pytest.approx(
                want, abs=5 * float(height.square().std()) / 20_000**0.5 + 1e-6
            )


def test_von_mises_fisher_gradients():
    torch.manual_seed(0)
    kappa = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    loc = drawn(3).requires_grad_()
    x = VonMisesFisher(loc, kappa, validate_args=False).rsample((100_000,))
    slope = torch.autograd.grad((x @ drawn(3)).mean(), kappa)[0]
    want = torch.autograd.grad(1 / kappa.tanh() - 1 / kappa, kappa)[0]
    assert slope == pytest.approx(float(want), rel=0.05)
    refuses(NotImplementedError, "2-sphere", VonMisesFisher(drawn(4), kappa).rsample)
    assert VonMisesFisher(drawn(4), kappa).sample((2,)).shape == (2, 4)
    found = torch.autograd.grad(VonMisesFisher(drawn(5), kappa).log_prob(-drawn(5)), kappa)[0]
    mean = VonMisesFisher(drawn(5), kappa).mean @ drawn(5)
    torch.testing.assert_close(found, -1 - mean)
    refuses(ValueError, "n of 2 or more", VonMisesFisher, torch.ones(1), 1.0)
    refuses(ValueError, "loc", VonMisesFisher, torch.ones(3), 1.0)
    refuses(ValueError, "concentration", VonMisesFisher, torch.eye(3)[0], -1.0)


def test_measures_are_pyros():
    """The surface measure: neither Pyro's angles nor its projected normal differ by a constant."""
    at = torch.tensor([0.6, 1.0, -2.0]).double()
    assert mass(dist.ProjectedNormal(at), 3, 300) == pytest.approx(1, abs=1e-4)
    assert mass(dist.ProjectedNormal(at[:2]), 2, 300) == pytest.approx(1, abs=1e-4)
    assert mass(dist.VonMises3D(at), 3, 300) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "base",
    [
        lambda: VonMisesFisher(drawn(3), 5.0),
        lambda: dist.ProjectedNormal(torch.ones(3).double()),
        lambda: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), VonMisesFisher(drawn(2, 3), 5.0)),
        lambda: dist.VonMises3D(torch.ones(3).double()),
    ],
)
def test_other_bases(base):
    flow = pf.Flow(made(3).chain, base())
    assert mass(flow, 3, 200) == pytest.approx(1, abs=3e-3)
    with torch.no_grad():
        if not isinstance(base(), dist.VonMises3D):  # which Pyro cannot sample
            assert flow.log_prob(flow.sample((5,))).isfinite().all()
    assert flow.float().log_prob(drawn(4, 3).float()).dtype == torch.float32


# Data


def test_fit_density():
    torch.manual_seed(0)
    truth = VonMisesFisher(torch.tensor([0.0, 0.6, -0.8]), torch.tensor(10.0))
    data = truth.sample((600,))
    fit = pf.fit_density(pf.sphere(3, **SMALL), data.double().numpy(), steps=60, lr=2e-2, progress=False)
    x = truth.sample((500,))
    with torch.no_grad():
        assert fit.log_prob(x).mean() > truth.log_prob(x).mean() - 0.3
    draws = fit.sample((200,))
    assert dist.constraints.sphere.check(draws).all() and (draws @ truth.loc).mean() > 0.8
    data[3] *= 1.5
    refuses(ValueError, "(?s)row|support", pf.fit_density, pf.sphere(3), data, steps=1, progress=False)


@pytest.mark.full
def test_globe():
    truth = VonMisesFisher(torch.tensor([0.0, 0.6, -0.8]), 10.0)
    ax = plots.globe(truth, points=60, data=truth.sample((50,)))
    (mesh,) = (each for each in ax.collections if type(each).__name__ == "QuadMesh")
    height = np.ma.filled(mesh.get_array(), np.nan)
    assert np.nansum(height) * (1 / 30) ** 2 * 2 == pytest.approx(1, abs=0.01)  # areas are true: 4 pi in 2 pi
    at = ax.collections[-1].get_offsets()
    assert len(at) == 50 and (0.25 * at[:, 0] ** 2 + at[:, 1] ** 2 <= 1 + 1e-6).all()
    flow = pf.Flow(pf.sphere(3, context_dim=1, **SMALL))
    plots.globe(flow, context=[0.3], points=10)
    plots.globe(dist.VonMises3D(torch.ones(3)), points=10)
    refuses(ValueError, "the density is 0 all over the sphere", plots.globe, dist.Dirichlet(torch.ones(3)), points=10)
    refuses(ValueError, "expected 3 dimensions", plots.globe, pf.Flow(pf.sphere(4, **SMALL)))
    refuses(TypeError, "transform", plots.globe, pf.sphere(3))
