"""Splines for latents with kinks and tails, against exact quantile functions and posteriors."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.reparam import NeuTraReparam

from pyro_flows.infer import AutoFlow, fit_guide, load_guide
from pyro_flows.infer.guides.posterior import spline_of
from pyro_flows.infer.models.recorded import value_and_slope
from pyro_flows.infer.search import conditionals
from pyro_flows.infer.search.climb import SafeDensity
from pyro_flows.infer.search.conditionals import _Straightened, conditional_knots, straight_start
from pyro_flows.infer.search.start import find_start
from pyro_flows.transforms import FixedSpline

NORMAL = dist.Normal(torch.zeros((), dtype=torch.float64), 1.0)


def scales(count):
    return torch.logspace(-2, 3, count, dtype=torch.float64)


LAWS = {
    "laplace": (dist.Laplace, lambda x: torch.sign(-x) * torch.log(2 * NORMAL.cdf(-x.abs()))),
    "cauchy": (dist.Cauchy, lambda x: (math.pi * (NORMAL.cdf(x) - 0.5)).tan()),
    "student": (
        lambda loc, scale: dist.StudentT(2.0, loc, scale),
        lambda x: (2 * NORMAL.cdf(x) - 1) / (2 * NORMAL.cdf(x) * NORMAL.cdf(-x)).sqrt(),
    ),
    "logistic": (
        lambda loc, scale: _Logistic(loc, scale),
        lambda x: NORMAL.cdf(x).log() - NORMAL.cdf(-x).log(),
    ),
    "gumbel": (dist.Gumbel, lambda x: -torch.log(-torch.log(NORMAL.cdf(x)))),
}


class _Logistic:
    def __init__(self, loc, scale):
        self.loc, self.scale = loc, scale

    def log_prob(self, z):
        u = (z - self.loc) / self.scale
        return -u.abs() - 2 * torch.log1p((-u.abs()).exp()) - self.scale.log()


def spline_for(density, center, scale, dtype=torch.float64):
    safe = SafeDensity(density, center.to(dtype))
    found = conditional_knots(safe, center, scale)
    return None if found is None else FixedSpline(len(center), found.dims, found.knots.to(dtype))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_splines_are_the_quantile_functions(law, dtype):
    """At any location and scale, from a center beside the peak and a width of another order."""
    make, quantile = LAWS[law]
    scale = scales(6).to(dtype)
    loc = 10 * scale
    target = make(loc, scale)
    center = (loc + 0.3 * scale).double()
    spline = spline_for(lambda z: target.log_prob(z).sum(-1), center, 3 * scale.double(), dtype)
    assert spline.dims.tolist() == list(range(6))
    x = torch.linspace(-4.5, 4.5, 181, dtype=torch.float64)
    exact = loc.double() + scale.double() * quantile(x)[:, None]
    # As steps of a standard normal: where do the exact quantiles come from?
    back = spline.double().inverse_and_ladj(exact)[0]
    torch.testing.assert_close(back, x[:, None].expand_as(back), rtol=0, atol=5e-3)
    # The log-density of one dimension: the spline's, against the law's.
    one = FixedSpline(1, torch.tensor([0]), spline.knots[:, :1])
    z, ladj = one.forward_and_ladj(x[:, None])
    law = make(loc[:1].double(), scale[:1].double())
    torch.testing.assert_close(NORMAL.log_prob(x) - ladj, law.log_prob(z)[:, 0], rtol=0, atol=0.03)


def test_a_kink_within_a_normal_density_is_found_where_it_is():
    """The kink lies anywhere; the straightened density has none."""

    def density(z):
        return (-3.0 * (z - kink).abs() - 0.5 * z.square()).sum(-1)

    kink = torch.tensor([-1.3, 0.1234, 0.7, 2.0], dtype=torch.float64)
    spline = spline_for(density, torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    straight = _Straightened(density, spline)
    x = torch.linspace(-4, 4, 801, dtype=torch.float64)[:, None].expand(-1, 4).clone()
    errors = []
    for k in range(4):
        points = spline.inverse_and_ladj(torch.zeros(4, dtype=torch.float64))[0].expand(801, -1).clone()
        points[:, k] = x[:, k]
        errors.append(straight(points) + 0.5 * x[:, k].square())
    errors = torch.stack(errors)
    assert (errors.amax(-1) - errors.amin(-1)).max() < 0.02


def test_normal_latents_are_left_alone_at_little_cost():
    root = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0] * scales(8)
    safe = SafeDensity(lambda z: -0.5 * torch.linalg.solve(root, z.mT).square().sum(0), torch.zeros(8).double())
    assert conditional_knots(safe, torch.zeros(8).double(), torch.linalg.cholesky(root @ root.mT)) is None
    assert safe.evaluations == 11 * 8
    # A scale of another order takes more rows, and nothing else.
    assert conditional_knots(safe, torch.ones(8).double(), 0.1 * torch.linalg.cholesky(root @ root.mT)) is None


def test_only_bent_dimensions_have_splines():
    def density(z):
        return -0.5 * z[:, 0].square() - z[:, 1].abs() - 0.5 * (z[:, 2] - z[:, 0]).square()

    found = conditional_knots(
        SafeDensity(density, torch.zeros(3)), torch.zeros(3).double(), torch.ones(3, dtype=torch.float64)
    )
    assert found.dims.tolist() == [1]


HOSTILE = {
    "flat": lambda z: 0 * z.sum(-1),
    "growing": lambda z: z.abs().sum(-1),
    "one side": lambda z: z.sum(-1),
    "improper tail": lambda z: -0.5 * torch.log1p(z.square()).sum(-1),
    "bounded": lambda z: torch.where((z.abs() < 1).all(-1), 0 * z.sum(-1), -math.inf),
    "NaN beyond": lambda z: torch.where((z > -2).all(-1), -z.abs().sum(-1), math.nan),
    "huge": lambda z: -1e30 * z.abs().sum(-1),
    "steep": lambda z: (0.05 * z - z.exp()).sum(-1),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_hostile_densities_give_usable_splines_or_none(kind, dtype):
    center = torch.full((2,), 0.1, dtype=torch.float64)
    spline = spline_for(HOSTILE[kind], center, torch.ones(2, dtype=torch.float64), dtype)
    assert (spline is not None) == (kind == "steep")
    if spline is not None:
        x = torch.linspace(-8, 8, 33, dtype=dtype)[:, None].expand(-1, 2)
        y, ladj = spline.forward_and_ladj(x)
        assert y.isfinite().all() and ladj.isfinite().all()
        torch.testing.assert_close(spline.inverse_and_ladj(y)[0], x, rtol=1e-3, atol=1e-3)


def test_splines_are_kept_if_a_gaussian_behind_them_is_better(monkeypatch):
    torch.manual_seed(0)
    laplace = lambda z: -z.abs().sum(-1) - len(z[0]) * math.log(2)  # noqa: E731
    start, knots = straight_start(laplace, torch.full((5,), 0.3))
    assert knots.dims.tolist() == [0, 1, 2, 3, 4] and abs(start.elbo) < 1e-3
    worse = lambda *args, **options: find_start(*args, **options)._replace(elbo=-1.0)  # noqa: E731
    monkeypatch.setattr(conditionals, "find_start", worse)
    start, knots = straight_start(laplace, torch.full((5,), 0.3))
    assert knots is None and start.loc.abs().max() < 0.5


def test_without_splines_the_start_is_the_plain_one():
    density = lambda z: -0.5 * (z - 2).square().sum(-1)  # noqa: E731
    torch.manual_seed(0)
    start, knots = straight_start(density, torch.zeros(3))
    torch.manual_seed(0)
    plain = find_start(density, torch.zeros(3))
    assert knots is None and torch.equal(start.loc, plain.loc) and torch.equal(start.scale, plain.scale)


def test_straightened_densities_have_the_gradient_of_their_value():
    spline = spline_for(lambda z: -z.abs().sum(-1), torch.zeros(3).double(), torch.ones(3).double())
    straight = _Straightened(lambda z: -(z - z.flip(-1).sin()).abs().sum(-1), spline)
    x = torch.randn(7, 3, dtype=torch.float64)
    value, slope = straight.value_and_slope(x)
    expected = value_and_slope(straight.__call__, x)
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(slope, expected[1])


def kinks():
    with pyro.plate("rows", 6):
        pyro.sample("x", dist.Laplace(torch.linspace(-3.0, 50.0, 6), torch.logspace(-2, 2, 6)))
    a = pyro.sample("a", dist.Gamma(0.2, 1.0))
    pyro.sample("y", dist.Normal(a.log(), 30.0), obs=torch.tensor(0.0))


def fitted(**options):
    return fit_guide(AutoFlow(kinks, seed=0), **{"steps": 60, "progress": False, **options})


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_guide_of_kinks_and_steep_sides_is_nearly_exact(dtype, default_dtype):
    default_dtype(dtype)
    fit = fitted()
    assert fit.ess > 0.98 and "bent: 7 of 7" in repr(fit.guide)
    draws = fit.sample(20_000)
    p = dist.Laplace(torch.linspace(-3.0, 50.0, 6), torch.logspace(-2, 2, 6)).cdf(draws["x"]).double()
    assert (p.mean(0) - 0.5).abs().max() < 0.01 and (p.std(0) - 12**-0.5).abs().max() < 0.01


@pytest.mark.full
def test_a_fit_with_splines_is_saved_and_resumed(tmp_path):
    path = tmp_path / "fit.pt"
    whole = fitted()
    fitted(steps=30, checkpoint=path)
    resumed = fitted(checkpoint=path, steps=30)
    assert torch.equal(resumed.flow.chain[-1].knots, whole.flow.chain[-1].knots)
    resumed.save(tmp_path / "saved.pt")
    again = load_guide(tmp_path / "saved.pt")
    z = again.flow.sample((5,))
    assert torch.equal(again.flow.log_prob(z), resumed.flow.log_prob(z))


@pytest.mark.full
def test_an_interrupted_fit_with_splines_resumes_as_if_it_had_not_been(tmp_path, monkeypatch):
    from pyro_flows.infer.guides.loop import GuideTraining

    whole = fitted()
    path, step = tmp_path / "fit.pt", GuideTraining._step

    def stopping(self, *args):
        if self.budget.done == 25:
            raise KeyboardInterrupt
        step(self, *args)

    monkeypatch.setattr(GuideTraining, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        fitted(checkpoint=path)
    monkeypatch.setattr(GuideTraining, "_step", step)
    resumed = fitted(checkpoint=path)
    for name, value in whole.flow.state_dict().items():
        assert torch.equal(value, resumed.flow.state_dict()[name]), name


@pytest.mark.full
def test_modes_behind_kinks_are_covered():
    """Six widths from peak to peak in every direction, and a kink in each other latent."""

    def model():
        pyro.sample("x", dist.Laplace(torch.zeros(4), 1.0).to_event(1))
        both = dist.Normal(torch.tensor([-3.0, 3.0]), 0.5)
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        along = m.sum(-1, keepdim=True) / math.sqrt(2)
        pyro.factor("two", both.log_prob(along).logsumexp(-1) + dist.Normal(0.0, 0.5).log_prob(m[..., 0] - m[..., 1]))

    fit = fit_guide(AutoFlow(model, seed=0), steps=600, progress=False)
    assert spline_of(fit.flow) is not None
    side = (fit.sample(10_000, resampled=True)["m"].sum(-1) > 0).double().mean()
    assert fit.ess > 0.5 and abs(side - 0.5) < 0.05


@pytest.mark.full
def test_stock_inference_uses_splines():
    guide = AutoFlow(kinks, seed=0)
    svi = SVI(kinks, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(num_particles=32, vectorize_particles=True))
    assert all(math.isfinite(svi.step()) for _ in range(5)) and spline_of(guide.flow) is not None
    assert guide.median()["x"].shape == (6,)
    reparametrized = NeuTraReparam(guide.requires_grad_(False)).reparam(kinks)
    trace = pyro.poutine.trace(reparametrized).get_trace()
    assert trace.log_prob_sum().isfinite()


@pytest.mark.parametrize(
    ("dims", "knots"),
    [
        (torch.tensor([0, 0]), torch.tensor([[0.0, 1.0]] * 2).repeat(3, 1, 1)),
        (torch.tensor([3]), torch.ones(3, 1, 2).cumsum(-1)),
        (torch.tensor([0]), torch.zeros(3, 1, 2)),
        (torch.tensor([0]), torch.ones(3, 1, 1)),
        (torch.tensor([0.0]), torch.ones(3, 1, 2).cumsum(-1)),
        (torch.tensor([0]), torch.tensor([[[0.0, 1.0]], [[0.0, math.inf]], [[1.0, 1.0]]])),
    ],
)
def test_knots_are_checked(dims, knots):
    with pytest.raises(ValueError, match="FixedSpline: expected"):
        FixedSpline(2, dims, knots)


@pytest.mark.full
def test_a_guide_of_another_dtype_than_its_model(default_dtype):
    default_dtype(torch.float64)
    fit = fit_guide(AutoFlow(kinks, seed=0, dtype=torch.float32), steps=40, progress=False)
    assert fit.flow.chain[-1].knots.dtype == torch.float32 and fit.ess > 0.95


def test_nothing_is_made_on_the_default_device():
    density = lambda z: -z.abs().sum(-1)  # noqa: E731
    with torch.device("meta"):
        start, knots = straight_start(density, torch.zeros(2, dtype=torch.float64, device="cpu"))
    assert knots.knots.device.type == knots.dims.device.type == start.loc.device.type == "cpu"


@pytest.mark.full
def test_a_state_brings_its_splines_along():
    """Into a guide without a spline, with others, and out of one that has none."""

    def model(scale):
        with pyro.plate("latents", 3):
            x = pyro.sample("x", dist.Laplace(0.0, scale))
        pyro.sample("y", dist.Normal(x.sum(), 5.0), obs=torch.tensor(1.0))

    guides = [
        AutoFlow(model, seed=0, start=start).setup(scale) for start, scale in (("pathfinder", 1.0), ("prior", 1.0))
    ]
    other = AutoFlow(model, seed=0).setup(0.1)
    states = [copy.deepcopy(each.state_dict()) for each in guides]
    assert [isinstance(each.flow.chain[-1], FixedSpline) for each in (*guides, other)] == [True, False, True]
    z = torch.randn(5, 3)
    for state, source in zip(states, guides, strict=True):
        expected = source.flow.log_prob(z)
        for target in (other, AutoFlow(model, start="prior").setup(1.0)):
            torch.nn.ModuleList([target]).load_state_dict({f"0.{name}": value for name, value in state.items()})
            torch.testing.assert_close(target.flow.log_prob(z), expected)
            assert target.sample_posterior(4)["x"].shape == (4, 3)
