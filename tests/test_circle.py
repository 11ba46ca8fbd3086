"""Flows of angles: densities on circles and tori, alone and beside other numbers, and their life in Pyro."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import guide_of, shake
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from torch.distributions import constraints

import pyro_flows as pf

TURN = 2 * math.pi
OTHER = {torch.float: torch.double, torch.double: torch.float}


def circular(dims, *, context_dim=0, base=None, scale=0.15, dtype=torch.double, **options):
    """A small flow of angles, far from the uniform density."""
    options = {"num_layers": 2, "hidden_dims": (8,), **options}
    return shake(pf.Flow(pf.ncsf(dims, context_dim=context_dim, **options), base).to(dtype), scale)


def turn(n):
    """Midpoints of one turn."""
    return (torch.arange(n).double() + 0.5) * (TURN / n) - math.pi


def mass(flow, *axes, context=None):
    """The integral of a density over a grid of evenly spaced points."""
    grid = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    cell = math.prod(float(axis[1] - axis[0]) for axis in axes)
    with torch.no_grad():
        return float(flow.log_prob(grid, context).exp().sum() * cell)


def sine():
    numbers = (0.5, -1.0, 2.0, 3.0, 1.5)
    return dist.SineBivariateVonMises(*(torch.tensor(number).double() for number in numbers))


BASES = {
    "uniform": lambda: None,
    "von Mises": lambda: dist.VonMises(torch.tensor(1.0).double(), torch.tensor(2.0).double()).expand([2]).to_event(1),
    "bivariate von Mises": sine,
}


# Densities.


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_a_density_on_the_torus_integrates_to_one(base):
    flow = circular(2, base=base())
    assert abs(mass(flow, turn(300), turn(300)) - 1) < 1e-3
    scores = flow.log_prob(torch.cartesian_prod(turn(20), turn(20)))
    assert scores.std() > 0.3 and scores.isfinite().all()


def test_a_density_on_the_circle_integrates_to_one():
    flow = circular(1, context_dim=2, scale=0.25)
    # Fine enough for peaks far narrower than those that a fit makes.
    masses = [mass(flow, turn(64_000), context=context) for context in torch.randn(3, 2).double()]
    assert masses == pytest.approx([1.0] * 3, abs=1e-5)


@pytest.mark.parametrize("options", [{"residual": True, "bins": 3}, {"mask": "half"}, {"mask": "random"}], ids=str)
def test_a_density_on_three_angles_integrates_to_one(options):
    assert abs(mass(circular(3, **options), turn(50), turn(50), turn(50)) - 1) < 5e-3


@pytest.mark.parametrize("periodic", [[True, False], [False, True]], ids=str)
def test_angles_beside_numbers_integrate_to_one(periodic):
    flow = circular(2, periodic=periodic, scale=0.1)
    line = torch.linspace(-20, 20, 1600).double()
    axes = [turn(200) if angle else line for angle in periodic]
    assert abs(mass(flow, *axes) - 1) < 1e-3
    draws = flow.sample((1000,)).abs().amax(0)
    assert draws[periodic.index(True)] <= math.pi


def test_two_angles_beside_a_number_integrate_to_one():
    flow = circular(3, periodic=[True, False, True], mask="half")
    assert abs(mass(flow, turn(60), torch.linspace(-9, 9, 60).double(), turn(60)) - 1) < 5e-3


def test_each_context_has_a_density_of_its_own():
    flow, context = circular(2, context_dim=3, scale=0.2), torch.randn(4, 3).double()
    masses = [mass(flow, turn(250), turn(250), context=each) for each in context[:2]]
    assert masses == pytest.approx([1.0, 1.0], abs=3e-3)
    point = torch.tensor([3.0, -1.0]).double()
    each = torch.stack([flow(c).log_prob(point) for c in context])
    torch.testing.assert_close(flow(context).log_prob(point), each)
    assert each.std() > 1e-2 and flow(context).sample((5,)).shape == (5, 4, 2)


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
@pytest.mark.parametrize("periodic", [None, [True, False, True]], ids=["angles", "mixed"])
def test_periodic_in_each_angle(periodic, dtype, default_dtype):
    default_dtype(OTHER[dtype])
    flow = circular(3, periodic=periodic, mask="half", dtype=dtype)
    x = (TURN * torch.rand(200, 3) - math.pi).to(dtype)
    want = flow.log_prob(x)
    # What a turn more costs is the rounding of the angle itself, times the slope of the log-density.
    atol = 1e-11 if dtype == torch.double else 2e-3
    for d in range(3):
        for turns in (-1, 3):
            moved = x + TURN * turns * torch.eye(3, dtype=dtype)[d]
            gap = (flow.log_prob(moved) - want).abs().max()
            assert gap < atol if periodic is None or periodic[d] else gap > 0.1


def test_no_seam():
    """Neither the log-density nor its gradient jumps where an angle goes from pi to -pi."""
    flow = circular(3, num_layers=4)
    for d in range(3):
        x = torch.randn(50, 3).double()
        x[:, d] = math.pi
        step = 1e-9 * torch.eye(3).double()[d]
        sides = [x - step, x + step, x + step - TURN * torch.eye(3).double()[d]]
        values, slopes = [], []
        for side in sides:
            side.requires_grad_()
            values.append(flow.log_prob(side))
            slopes.append(torch.autograd.grad(values[-1].sum(), side)[0])
        for k in (1, 2):
            torch.testing.assert_close(values[k], values[0], rtol=0, atol=1e-6)
            torch.testing.assert_close(slopes[k], slopes[0], rtol=1e-5, atol=1e-5)
        assert slopes[0][:, d].abs().max() > 0.05


def test_no_jump_even_at_a_knot():
    """Without a rotation the ends of a spline meet at pi; the log-density bends there but does not jump."""
    flow = circular(1, num_layers=1, scale=0.6)
    with torch.no_grad():
        flow.chain[0].net.constant[..., -1] = 0.0
    ends = math.pi * torch.tensor([[1 - 1e-11], [1 + 1e-11], [1e-11 - 1], [0.0]], dtype=torch.float64)
    scores = flow.log_prob(ends)
    assert (scores[1:3] - scores[0]).abs().max() < 1e-6 < (scores[3] - scores[0]).abs()


@pytest.mark.parametrize("periodic", [None, [True, False]], ids=["angles", "mixed"])
def test_no_parameter_is_idle(periodic):
    flow = circular(2, context_dim=2, periodic=periodic, scale=0.3)
    scores = flow.log_prob(torch.randn(12, 2).double(), torch.randn(12, 2).double())
    gradients = torch.autograd.grad(scores.sum(), list(flow.parameters()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_samples_lie_within_a_turn_and_have_the_density(dtype, default_dtype):
    default_dtype(OTHER[dtype])
    flow = circular(2, num_layers=3, dtype=dtype)
    draws = flow.sample((40_000,))
    assert draws.dtype == dtype and (draws.abs() <= math.pi + 1e-6).all()
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(turn(200), turn(200)).to(dtype)).exp()
    want = density.reshape(4, 50, 4, 50).sum((1, 3)).double() * (TURN / 200) ** 2
    places = ((draws + math.pi) / (TURN / 4)).floor().long().clamp(0, 3)
    found = torch.bincount(4 * places[:, 0] + places[:, 1], minlength=16).reshape(4, 4) / len(draws)
    torch.testing.assert_close(found.double(), want, rtol=0, atol=0.012)  # over four standard errors
    assert want.max() > 1.5 * want.min()


def test_draws_are_scored_as_they_are_drawn():
    flow = circular(3, periodic=[True, True, False], num_layers=3)
    draws, scores = flow.rsample_and_log_prob((200,))
    torch.testing.assert_close(flow.log_prob(draws.detach().clone()), scores, rtol=1e-7, atol=1e-7)
    moved = draws.detach() + TURN * torch.tensor([1.0, -2.0, 0.0]).double()
    torch.testing.assert_close(flow.log_prob(moved), scores, rtol=1e-7, atol=1e-7)


# In Pyro.


def test_beside_von_mises_in_a_model():
    flow = circular(2)

    def model(observed):
        kappa = torch.tensor(3.0).double()
        start = pyro.sample("start", dist.VonMises(torch.zeros(()).double(), kappa))
        with pyro.plate("rows", 5):
            pair = pyro.sample("pair", flow())
            pyro.sample("seen", dist.VonMises(start + pair.sum(-1), kappa), obs=observed)

    observed = torch.randn(5).double()
    trace = poutine.trace(model).get_trace(observed)
    trace.compute_log_prob()
    total = trace.log_prob_sum()
    start, pair = trace.nodes["start"]["value"], trace.nodes["pair"]["value"]
    assert pair.shape == (5, 2) and trace.nodes["pair"]["log_prob"].shape == (5,)
    assert flow().support.event_dim == 1 and flow().support.base_constraint is constraints.real

    def cosine(value, loc):
        return 3 * torch.cos(value - loc) - math.log(TURN * float(torch.special.i0(torch.tensor(3.0).double())))

    want = cosine(start, 0.0) + flow.log_prob(pair.clone()).sum() + cosine(observed, start + pair.sum(-1)).sum()
    torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_nuts_over_an_angle_under_a_flow():
    flow = circular(2, scale=0.08, dtype=torch.float).requires_grad_(False)

    def model(observed):
        angles = pyro.sample("angles", flow())
        pyro.sample("y", dist.VonMises(angles, 5.0).to_event(1), obs=observed)

    observed = torch.tensor([3.1, -3.0])
    mcmc = MCMC(NUTS(model, max_tree_depth=4), num_samples=50, warmup_steps=30, disable_progbar=True)
    mcmc.run(observed)
    draws = mcmc.get_samples()["angles"]
    assert draws.shape == (50, 2) and draws.isfinite().all() and len(draws.unique(dim=0)) > 5
    # Against the posterior on a grid: they gather around the edge, whichever turn they count in.
    grid = torch.cartesian_prod(turn(100), turn(100)).float()
    weights = (flow.log_prob(grid) + dist.VonMises(grid, 5.0).log_prob(observed).sum(-1)).softmax(0)
    want = (weights[:, None] * torch.cos(grid - observed)).sum(0)
    assert (torch.cos(draws - observed).mean(0) - want).abs().max() < 0.3


def test_a_flow_guides_an_angle_to_its_posterior():
    """Two von Mises distributions multiply to one, here across the edge."""
    loc, kappa = torch.tensor([2.8, -2.9]), torch.tensor([2.0, 1.5])
    flow = pf.Flow(pf.ncsf(1, num_layers=2, hidden_dims=(8,)))

    def model():
        angle = pyro.sample("angle", dist.VonMises(loc[:1], kappa[0]).to_event(1))
        pyro.sample("seen", dist.VonMises(angle, kappa[1]).to_event(1), obs=loc[1:])

    guide = guide_of(flow, "angle")
    elbo = Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}), elbo)
    for _ in range(200):
        svi.step()
    whole = (kappa * torch.stack([loc.cos(), loc.sin()])).sum(-1)
    exact = dist.VonMises(torch.atan2(whole[1], whole[0]), whole.norm())
    grid = turn(500).float()
    with torch.no_grad():
        scores = flow.log_prob(grid[:, None])
    divergence = (scores.exp() * (scores - exact.log_prob(grid))).sum() * TURN / 500
    assert 0 <= divergence < 0.04


# Fitting.


def test_fit_density_leaves_angles_as_they_are():
    exact = dist.VonMises(torch.tensor(3.0), torch.tensor(2.0))
    data, test = exact.sample((2000, 1)), exact.sample((2000, 1))
    options = {"max_epochs": 12, "lr": 0.02, "progress": False}
    flow = pf.Flow(pf.ncsf(1, num_layers=1, hidden_dims=(8,)))
    fit = pf.fit_density(flow, data, **options)
    assert fit.distribution is flow
    assert abs(float((exact.log_prob(test[:, 0]) - fit.log_prob(test)).mean())) < 0.03
    # The same data counted in other turns are the same data.
    again = fit.log_prob(test + TURN * torch.randint(-2, 3, (len(test), 1)))
    torch.testing.assert_close(again, fit.log_prob(test), rtol=0, atol=1e-4)
    refuses(ValueError, "values are angles", pf.fit_density, flow, data, standardize=True, **options)


def test_fit_density_standardises_what_is_no_angle():
    angle = dist.VonMises(torch.tensor(3.0), torch.tensor(2.0)).sample((500,))
    data = torch.stack([angle, 100 + 20 * angle.cos() + torch.randn(500)], -1)
    chain = pf.ncsf(2, periodic=[True, False], num_layers=2, hidden_dims=(8,))
    fit = pf.fit_density(chain, data, max_epochs=2, progress=False)
    standardization = fit.distribution.chain[-1]
    assert standardization.loc[0] == 0 and standardization.scale[0] == 1
    torch.testing.assert_close(standardization.loc[1], data[:, 1].mean(), rtol=0.05, atol=0)
    torch.testing.assert_close(standardization.scale[1], data[:, 1].std(), rtol=0.2, atol=0)
    line = torch.linspace(-300, 500, 800).double()
    assert abs(mass(fit.distribution.double(), turn(200), line) - 1) < 2e-3


# Errors.


def round_spline():
    return pf.Spline(4, boundary="circular")


ERRORS = {
    "circular, no angle": (
        lambda: pf.Coupling(3, round_spline(), periodic=[False, True, True]),
        r"Spline\(.*circular.*moves angles, but the mask leaves it others to move; keep these",
    ),
    "affine, angle": (
        lambda: pf.Coupling(3, periodic=[False, True, True]),
        "Affine.* moves no angles, but the mask leaves it angles to move; keep these",
    ),
    "spline of the line, angle": (
        lambda: pf.Coupling(2, pf.Spline(), periodic=[True, False]),
        "Spline.*linear.* moves no angles",
    ),
    "shape, coupling": (
        lambda: pf.Coupling(3, round_spline(), periodic=[True, True]),
        r"Coupling: expected periodic to have shape \(3,\), got \(2,\)",
    ),
    "shape, ncsf": (
        lambda: pf.ncsf((2, 2), periodic=[True] * 4),
        r"ncsf: expected periodic to have shape \(2, 2\), got \(4,\)",
    ),
    "autoregressive": (
        lambda: pf.Autoregressive(3, round_spline()),
        "Autoregressive: its network would tear a circle open at pi.* see ncsf",
    ),
    "maf": (lambda: pf.maf(3, univariate=round_spline()), "angles are moved by couplings"),
    "iaf": (lambda: pf.iaf(3, univariate=round_spline()), "angles are moved by couplings"),
    "nsf": (lambda: pf.nsf(3, boundary="circular"), "'linear' or 'identity', got 'circular'"),
    "line before": (lambda: pf.Chain([*pf.maf(2), *pf.ncsf(2)]), "Autoregressive moves angles as numbers on a line"),
    "line behind": (lambda: pf.Chain([*pf.ncsf(2), pf.LULinear(2)]), "LULinear moves angles as numbers on a line"),
    "line inside": (
        lambda: pf.Chain([pf.Chain([pf.ncsf(2), pf.Permutation(2)]).inv, pf.realnvp(2)]),
        "Coupling moves angles as numbers on a line",
    ),
    "other angles": (
        lambda: pf.Chain([*pf.ncsf(2, periodic=[True, False]), *pf.ncsf(2, periodic=[False, True])]),
        "takes other dimensions for angles",
    ),
    "scaled angle": (
        lambda: pf.Chain([pf.ncsf(2), pf.Standardization(torch.zeros(2), torch.tensor([1.0, 2.0]))]),
        "Standardization moves angles",
    ),
    "base of the line": (
        lambda: pf.Flow(pf.ncsf(2), pf.DiagonalNormal(2)),
        "another density at x . 2 pi than at x.* UniformCircle",
    ),
    "distribution of the line": (
        lambda: pf.Flow(pf.ncsf(1), dist.Normal(torch.zeros(1), 1.0).to_event(1)),
        "would not integrate to 1 over a turn",
    ),
}


@pytest.mark.parametrize("make, message", ERRORS.values(), ids=ERRORS)
def test_refuses(make, message):
    refuses(ValueError, message, make)


@pytest.mark.full
@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0, 2]])
def test_angles_keep_their_places_through_permutations(order):
    """The default base knows where the angles are on its side, and the whole integrates to one."""
    inner = circular(3, periodic=[True, False, False], mask="half", scale=0.1).chain
    chain = pf.Chain([pf.Permutation(3, order), *inner, pf.Permutation(3, [1, 2, 0])]).double()
    # y_i = x_{order[i]}: the angle, first where it is moved, comes from place order[0] and goes to the last place.
    assert chain.periodic.tolist() == [k == order[0] for k in range(3)]
    assert chain.inv.periodic.tolist() == [False, False, True]
    flow = pf.Flow(chain)
    assert flow.base.angle.tolist() == chain.periodic.tolist()
    line = torch.linspace(-12, 12, 120).double()
    assert abs(mass(flow, line, line, turn(60)) - 1) < 5e-3


def test_standardised_numbers_beside_angles_are_allowed():
    unit = pf.Standardization(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 2.0]))
    chain = pf.Chain([*pf.ncsf(2, periodic=[True, False]), unit])
    assert chain.periodic.tolist() == [True, False]
    bounded = dist.Uniform(torch.tensor(-math.pi), torch.tensor(math.pi)).expand([2]).to_event(1)
    pf.Flow(pf.ncsf(2), bounded)  # nothing lies beyond its turn
