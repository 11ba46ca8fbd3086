"""Climbs and the Gaussian that a guide begins with, against Gaussians, regressions and hostile densities."""

import math
import time

import pytest
import torch
from asserts import refuses
from cases import generator
from torch.distributions import MultivariateNormal, Normal

from pyro_flows.infer.search.climb import SafeDensity, climb
from pyro_flows.infer.search.curvature import bend, first_metric, laplace
from pyro_flows.infer.search.start import _Gaussian, _Ranking, find_start


def gaussian(dim, condition, dtype=torch.float64, offset=7.0):
    """A log-density with a covariance of this condition number: the function, its mean and its covariance's factor."""
    normal = torch.randn(dim + 1, dim, generator=generator(), dtype=torch.float64)
    axes = torch.linalg.qr(normal[:-1])[0]
    sds = torch.logspace(0, -0.5 * math.log10(condition), dim, dtype=torch.float64)
    root = ((axes / sds) @ axes.mT).to(dtype)
    mean = (3 * normal[-1]).to(dtype)

    def density(z):
        return offset - 0.5 * ((z - mean) @ root).square().sum(-1)

    evidence = offset + sds.log().sum().item() + 0.5 * dim * math.log(2 * math.pi)
    return density, mean.double(), axes * sds, evidence


def regression(rows, dim, dtype):
    """A linear model in raw units: predictors a thousand times too small up to too large, and far from centred."""
    g = generator(1)
    unit = torch.logspace(-3, 3, dim, dtype=torch.float64)
    x = (torch.randn(rows, dim, generator=g, dtype=torch.float64) + 10) * unit
    x[:, 0] = 1
    y = x @ (3 * torch.randn(dim, generator=g, dtype=torch.float64) / unit) + 1000
    y = y + 5 * torch.randn(rows, generator=g, dtype=torch.float64)
    exact = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    left = (y - x @ exact).square().sum().item()
    x, y = x.to(dtype), y.to(dtype)

    def density(z):
        log_sd = z[:, -1]
        return -0.5 * (y - z[:, :-1] @ x.mT).square().sum(-1) * (-2 * log_sd).exp() - rows * log_sd

    gram = torch.linalg.slogdet(x.double().mT @ x.double())[1].item()
    free = rows - dim
    # The coefficients integrate to a Gaussian, the scale to a gamma function.
    evidence = 0.5 * dim * math.log(2 * math.pi) - 0.5 * gram + math.lgamma(0.5 * free) - math.log(2)
    return density, evidence - 0.5 * free * math.log(0.5 * left), exact


def whitened(scale, factor):
    """The covariance ``scale scale'`` in units where the true one is the identity."""
    inner = torch.linalg.solve(factor, scale.double())
    return inner @ inner.mT


def counted(density):
    calls = []

    def function(z):
        calls.append(len(z))
        return density(z)

    return function, calls


# Climbs


@pytest.mark.parametrize("memory", [None, 10])
@pytest.mark.parametrize("dim", [1, 2, 10])
def test_climb_reaches_the_top_of_a_gaussian(dim, memory):
    density, mean, factor, _ = gaussian(dim, 1e4)
    density, calls = counted(density)
    starts = 3 * torch.randn(5, dim, generator=generator(), dtype=torch.float64)
    paths = climb(density, starts, memory=memory, steps=500)
    ends, values, _ = paths.ends()
    assert paths.converged.all()
    assert paths.evaluations == sum(calls)
    torch.testing.assert_close(values, torch.full_like(values, 7.0), atol=1e-4, rtol=0)
    assert torch.linalg.solve(factor, (ends - mean).mT).abs().max() < 0.02
    for start, points, gradients, along in zip(starts, paths.positions, paths.gradients, paths.values, strict=True):
        torch.testing.assert_close(points[0], start)
        torch.testing.assert_close(along, density(points))
        assert (along.diff() > -1e-6).all()
        expected = torch.autograd.functional.jacobian(lambda z: density(z).sum(), points)
        torch.testing.assert_close(gradients, expected)


def test_climb_freezes_rows_that_are_done():
    density, mean, _, _ = gaussian(6, 1e3)
    density, calls = counted(density)
    starts = torch.stack([mean, mean + 1e-9, mean + 5, mean - 50])
    paths = climb(density, starts, memory=None)
    assert paths.converged.all()
    assert len(paths.values[0]) == 1
    assert calls[0] == 4 and calls[-1] < 4
    assert sorted(calls, reverse=True) == calls


@pytest.mark.parametrize("memory", [None, 10])
def test_climb_does_not_depend_on_units_given_a_metric(memory):
    scale = torch.logspace(-6, 6, 8, dtype=torch.float64)
    start = torch.linspace(-1, 2, 8, dtype=torch.float64)

    def hill(z):
        return -torch.logaddexp(z, -z).sum(-1) - 0.1 * (z[:, 1:] - z[:, :-1].square()).square().sum(-1)

    metric = torch.eye(8, dtype=torch.float64)[None] if memory is None else torch.ones_like(scale)[None]
    plain = climb(hill, start[None], memory=memory, metric=metric)
    units = climb(lambda z: hill(z / scale), (start * scale)[None], memory=memory, metric=metric * scale * scale)
    assert plain.converged.all() and units.converged.all()
    torch.testing.assert_close(units.ends()[0] / scale, plain.ends()[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("memory", [None, 10])
def test_a_climb_that_promises_little_stays_in_a_narrow_mode(memory):
    """From the slope of a narrow mode, whose first step by the metric of a wide one would end in that one."""

    def two(z):
        narrow = 8.0 - 0.5 * ((z - torch.tensor([3.0, 1.0])) / 0.01).square().sum(-1)
        return torch.logaddexp(-0.5 * z.square().sum(-1), narrow)

    start = (1 + 0.045 / 10**0.5) * torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    metric = torch.full((1, 2), 0.1, dtype=torch.float64)
    metric = metric.diag_embed() if memory is None else metric
    ends = [climb(two, start, memory=memory, metric=metric, promise=most).ends()[0] for most in (math.inf, 4.0)]
    torch.testing.assert_close(ends[1], torch.tensor([[3.0, 1.0]], dtype=torch.float64), atol=1e-4, rtol=0)
    assert ends[0].norm() < 0.01


@pytest.mark.parametrize("scaled", [False, True])
def test_climb_in_a_frame_is_that_of_the_density_in_its_coordinates(scaled):
    factor = 10 * torch.randn(8, 8, generator=generator(), dtype=torch.float64).tril() + 5 * torch.eye(8)
    starts = torch.randn(3, 8, generator=generator(1), dtype=torch.float64)

    def hill(z):
        return -torch.logaddexp(z, -z).sum(-1) - 0.1 * (z[:, 1:] - z[:, :-1].square()).square().sum(-1)

    metric = torch.full_like(starts, 0.5) if scaled else None
    plain = climb(hill, starts, metric=metric)
    inverse = torch.linalg.inv(factor)
    framed = climb(lambda z: hill(z @ inverse.mT), starts @ factor.mT, metric=metric, frame=factor)
    assert plain.converged.all() and framed.converged.all()
    assert [len(path) for path in framed.values] == [len(path) for path in plain.values]
    torch.testing.assert_close(framed.ends()[0] @ inverse.mT, plain.ends()[0], atol=1e-6, rtol=0)


def test_climb_takes_a_sensible_first_step():
    """A start 1e6 standard deviations out, where the slope is 1e12."""
    density, _, _, _ = gaussian(3, 1.0)
    paths = climb(lambda z: density(z * 1e6), torch.ones(2, 3, dtype=torch.float64), memory=None)
    assert paths.converged.all()
    assert max(map(len, paths.values)) < 30


@pytest.mark.parametrize("refusal", ["nan", "inf", "raise", "gradient"])
def test_climb_works_around_refused_points(refusal):
    """A bound to the right of the start that full steps jump over; other rows are not harmed."""

    def density(z):
        value = 5 * z[:, 0] - z.square().sum(-1)
        out = z[:, 0] > 2.6
        if refusal == "raise" and out.any():
            raise ValueError("outside")
        if refusal == "gradient":
            return (
                value
                + 0 * torch.where(out, -torch.ones_like(value), torch.ones_like(value)).mul(z[:, 0] * 0 + 1).sqrt()
            )
        return value.masked_fill(out, math.nan if refusal == "nan" else -math.inf)

    starts = torch.tensor([[-5.0, 3.0], [2.0, 0.0], [2.9, 0.0]], dtype=torch.float64)
    paths = climb(density, starts, memory=None)
    ends, values, _ = paths.ends()
    torch.testing.assert_close(ends[:2], torch.tensor([[2.5, 0.0]] * 2, dtype=torch.float64), atol=1e-4, rtol=0)
    assert paths.converged[:2].all() and not paths.converged[2]
    assert values[2] == -math.inf and len(paths.values[2]) == 1


def test_climb_stops_where_there_is_no_top():
    paths = climb(lambda z: z.sum(-1), torch.zeros(2, 3, dtype=torch.float64), memory=None, steps=20)
    assert not paths.converged.any()
    assert max(map(len, paths.values)) <= 21
    refuses(ValueError, r"starts of shape \(S, D\)", climb, lambda z: z.sum(-1), torch.zeros(3))


@pytest.mark.parametrize("dim", [2, 10])
def test_climb_does_not_lose_itself_in_rounding(dim):
    """Near the top of this Gaussian the last digits of float32 decide which way is up."""
    density, calls = counted(gaussian(dim, 1e8, torch.float32)[0])
    climb(density, torch.randn(4, dim, generator=generator(), dtype=torch.float32), memory=None)
    assert len(calls) < 500


def test_safe_density_finds_the_guilty_rows():
    seen = []

    def density(z):
        seen.append(z.dtype)
        if (z == 3).any():
            raise torch.linalg.LinAlgError("not positive definite")
        return z.square().sum(-1)

    safe = SafeDensity(density, torch.zeros(1))
    z = torch.arange(8, dtype=torch.float64)[:, None]
    values, slopes = safe.gradients(z)
    expected = z[:, 0].square().index_fill(0, torch.tensor(3), -math.inf)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(slopes[:, 0], 2 * z[:, 0] * (z[:, 0] != 3))
    assert set(seen) == {torch.float32}
    assert isinstance(safe.error, torch.linalg.LinAlgError)
    assert safe.values(z[:0]).shape == (0,)
    refuses(TypeError, r"expected shape \(8,\)", SafeDensity(lambda z: z, torch.zeros(1)).values, z)
    with torch.no_grad():
        assert (safe.gradients(z)[1] != 0).any()


# Curvature


@pytest.mark.parametrize("condition", [1.0, 1e8])
def test_hessians_by_differences(condition):
    density, mean, factor, _ = gaussian(5, condition)
    precision = torch.linalg.inv(factor @ factor.mT)
    safe = SafeDensity(density, mean)
    points = torch.stack([mean, mean + 1])
    slope = safe.gradients(points)[1]
    frame = factor.expand(2, 5, 5) * 1e-2
    torch.testing.assert_close(bend(safe, points, slope, frame), frame.mT @ precision @ frame, atol=1e-9, rtol=1e-5)
    metric = first_metric(safe, points, slope)
    assert (torch.linalg.eigvalsh(metric) > 0).all()


def test_differences_know_what_rounding_makes_of_a_step():
    """Steps of one and a half units in the last place: 1000 is known to 6e-5 in float32."""
    sd, step = 1e-3, 1e-4
    safe = SafeDensity(lambda z: -0.5 * ((z - 1000) / sd).square().sum(-1), torch.zeros(1))
    point = torch.full((1, 1), 1000.0, dtype=torch.float64)
    found = bend(safe, point, safe.gradients(point)[1], torch.full((1, 1, 1), step, dtype=torch.float64))
    assert abs(found.item() / (step / sd) ** 2 - 1) < 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-3)])
def test_laplace_is_as_exact_as_the_dtype_allows(dtype, tolerance):
    density, mean, factor, _ = gaussian(8, 1e6, dtype)
    peaks = laplace(SafeDensity(density, mean.to(dtype)), mean[None], factor[None])
    error = whitened(peaks.scale[0], factor) - torch.eye(8, dtype=torch.float64)
    assert error.abs().max() < tolerance


def test_differences_beside_a_refused_point():
    safe = SafeDensity(lambda z: -z.square().sum(-1) - z.sum(-1).log(), torch.zeros(1, dtype=torch.float64))
    point = torch.tensor([[1e-4, 1e-4]], dtype=torch.float64)
    slope = safe.gradients(point)[1]
    frame = torch.eye(2, dtype=torch.float64)[None] * 3e-4
    assert bend(safe, point, slope, frame).isfinite().all()


def test_laplace_from_afar_and_at_a_saddle():
    density, mean, factor, evidence = gaussian(6, 1e6)
    safe = SafeDensity(density, mean)
    frame = 1e-2 * torch.eye(6, dtype=torch.float64)
    peaks = laplace(safe, torch.stack([mean, mean + 3]), frame.expand(2, 6, 6))
    assert peaks.proper.all()
    unit = torch.eye(6, dtype=torch.float64)
    for scale in peaks.scale:
        torch.testing.assert_close(scale, scale.tril())
        torch.testing.assert_close(whitened(scale, factor), unit, atol=1e-5, rtol=0)
    log_size = peaks.scale.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 3 * math.log(2 * math.pi)
    mass = peaks.values + log_size
    torch.testing.assert_close(mass, torch.full((2,), evidence, dtype=torch.float64), atol=1e-5, rtol=0)
    saddle = SafeDensity(lambda z: z[:, 0].square() - z[:, 1].square(), mean)
    at = laplace(saddle, torch.zeros(1, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)[None], rounds=1)
    assert not at.proper.any()
    torch.testing.assert_close(whitened(at.scale[0], math.sqrt(0.5) * torch.eye(2, dtype=torch.float64)), unit[:2, :2])


# The start


@pytest.mark.parametrize("dim", [1, 2, 10, 26])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_start_is_exact_for_gaussians(dim, dtype, default_dtype):
    default_dtype(torch.float32 if dtype is torch.float64 else torch.float64)
    condition = 1e8 if dtype is torch.float64 else 1e4
    density, mean, factor, evidence = gaussian(dim, condition if dim > 1 else 1.0, dtype)
    density, calls = counted(density)
    start = find_start(density, torch.zeros(dim, dtype=dtype), generator=generator())
    assert start.loc.dtype == start.scale.dtype == dtype
    assert sum(calls) == start.evaluations
    assert len(calls) < 300
    torch.testing.assert_close(start.scale, start.scale.tril())
    assert (start.scale.diagonal() > 0).all()
    tolerance = 1e-3 if dtype is torch.float64 else 1e-2
    error = whitened(start.scale, factor) - torch.eye(dim, dtype=torch.float64)
    assert error.abs().max() < tolerance
    assert torch.linalg.solve(factor, start.loc.double() - mean).abs().max() < tolerance
    assert abs(start.elbo - evidence) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [4, 25])
def test_start_of_regressions_in_raw_units(dim, dtype):
    """Against the evidence in closed form; the posterior is no Gaussian, but nearly."""
    density, evidence, exact = regression(300, dim, dtype)
    start = find_start(density, torch.zeros(dim + 1, dtype=dtype), generator=generator())
    assert -0.1 < start.elbo - evidence < 0.05
    sds = start.scale.double().norm(dim=-1)[:-1]
    assert ((start.loc[:-1].double() - exact) / sds).abs().max() < 0.1
    assert sds.max() / sds.min() > 1e4


def test_start_is_reproducible_and_leaves_the_global_generator():
    density = gaussian(3, 10.0)[0]
    state = torch.get_rng_state()
    one, two = (find_start(density, torch.zeros(3, dtype=torch.float64), generator=generator(5)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.loc, two.loc) and torch.equal(one.scale, two.scale) and one.elbo == two.elbo


def test_refinement_beats_laplace():
    """The top of a gamma density of a log is to the right of its mean and narrower than it."""
    shape, rate = 1.5, 2.0

    def density(z):
        return (shape * z - rate * z.exp()).sum(-1)

    start = find_start(density, torch.zeros(2, dtype=torch.float64), num_samples=256, generator=generator())
    assert start.kind.endswith("+refined")
    # E exp(z) is known for Gaussians, and so are the best mean and variance: rate E exp(z) = shape, variance 1 / shape.
    variance = 1 / shape
    mean = math.log(shape / rate) - variance / 2
    torch.testing.assert_close(start.loc, torch.full((2,), mean, dtype=torch.float64), atol=0.08, rtol=0)
    covariance = start.scale @ start.scale.mT
    torch.testing.assert_close(covariance, variance * torch.eye(2, dtype=torch.float64), atol=0.12, rtol=0)


@pytest.mark.full
@pytest.mark.parametrize("dim", [400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_start_is_diagonal_in_high_dimension(dim, dtype):
    scale = torch.logspace(-3, 3, dim, dtype=dtype)
    loc = torch.linspace(-5, 5, dim, dtype=dtype)
    start = find_start(
        lambda z: Normal(loc, scale).log_prob(z).sum(-1), torch.zeros(dim, dtype=dtype), generator=generator()
    )
    assert start.scale.shape == (dim,)
    assert abs(start.elbo) < 0.05
    torch.testing.assert_close(start.scale, scale, rtol=1e-2, atol=0)
    assert ((start.loc - loc) / scale).abs().max() < 1e-2


def test_full_rank_limit():
    density = gaussian(4, 10.0)[0]
    initial = torch.zeros(4, dtype=torch.float64)
    assert find_start(density, initial, full_rank_up_to=3, generator=generator()).scale.shape == (4,)
    assert find_start(density, initial, full_rank_up_to=4, generator=generator()).scale.shape == (4, 4)


# Hostile densities


def bounded(kind):
    """A Gaussian that is refused on the far side of a wall; the start is 1 standard deviation from it."""
    normal = MultivariateNormal(torch.full((3,), -1.0, dtype=torch.float64), 0.04 * torch.eye(3, dtype=torch.float64))

    def density(z):
        out = z[:, 0] > 0.5
        if kind == "raise" and out.any():
            raise RuntimeError("cholesky failed")
        return normal.log_prob(z).masked_fill(out, math.nan)

    return density


@pytest.mark.parametrize("kind", ["nan", "raise"])
def test_start_works_around_refused_points(kind):
    start = find_start(bounded(kind), torch.zeros(3, dtype=torch.float64), generator=generator())
    assert abs(start.elbo) < 1e-3
    torch.testing.assert_close(start.loc, torch.full_like(start.loc, -1.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["inf", "nan", "raise"])
def test_start_of_a_density_that_is_finite_nowhere(kind):
    def density(z):
        if kind == "raise":
            raise ValueError("The value argument must be within the support")
        return (0 * z).sum(-1) + (math.nan if kind == "nan" else -math.inf)

    with pytest.raises(ValueError, match="not finite on draws of any candidate") as caught:
        find_start(density, torch.zeros(2), generator=generator())
    if kind == "raise":
        assert "within the support" in str(caught.value)
        assert isinstance(caught.value.__cause__, ValueError)


def test_errors_of_a_model_that_is_wrong_pass_through():
    def density(z):
        raise TypeError("missing argument")

    refuses(TypeError, "missing argument", find_start, density, torch.zeros(2))


@pytest.mark.full
@pytest.mark.parametrize(
    "density",
    [
        lambda z: -z[:, 0].square(),  # flat in one direction
        lambda z: -z[:, 0].square() + z[:, 1],  # and rising
        lambda z: 0 * z.sum(-1),
        lambda z: z[:, 0].square(),
        lambda z: -z.abs().sum(-1),
        lambda z: -z[:, 0].square() / 18 - 0.5 * z[:, 1:].square().sum(-1) * (-z[:, 0]).exp() - 0.5 * z[:, 0],
    ],
    ids=["flat", "rising", "constant", "convex", "kink", "funnel"],
)
def test_start_of_improper_and_odd_densities_is_finite(density):
    start = find_start(density, torch.zeros(2, dtype=torch.float64), generator=generator())
    assert start.loc.isfinite().all() and start.scale.isfinite().all() and math.isfinite(start.elbo)
    assert (start.scale.diagonal() > 0).all()


def timed(monkeypatch, density, points):
    """Returns ``density``, and a limit of seconds at which it has seen this many points."""
    now = [0.0]

    def function(z):
        now[0] += len(z)
        return density(z)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return function, max(0.0, points - 0.5)


@pytest.mark.parametrize("full_rank_up_to", [300, 1])
def test_time_limit_gives_the_best_so_far(monkeypatch, full_rank_up_to):
    density, loc, *_ = gaussian(3, 10.0)
    spent = {}
    for points in (0, 1, 10, 40, 100, 200, 400, 4000):
        function, seconds = timed(monkeypatch, density, points)
        start = find_start(
            function,
            torch.zeros(3, dtype=torch.float64),
            seconds=seconds,
            generator=generator(),
            full_rank_up_to=full_rank_up_to,
        )
        assert start.loc.isfinite().all() and start.scale.isfinite().all()
        spent[points] = float(density(start.loc[None]) - density(loc[None]))
    assert spent[100] > -1.0 and spent[4000] > -1e-3, spent


@pytest.mark.parametrize("points", [60, 120, 200])
def test_a_short_time_goes_into_the_climb(monkeypatch, points):
    """A hundred thousand rows, seven hundred standard deviations from the initial point."""
    y = 100 + 2 * torch.randn(1000, dtype=torch.float64, generator=generator())

    def density(z):
        scale = z[:, 1:].exp()
        return 100 * (-0.5 * ((y - z[:, :1]) / scale) ** 2).sum(-1) - 100_000 * z[:, 1]

    function, seconds = timed(monkeypatch, density, points)
    start = find_start(function, torch.zeros(2, dtype=torch.float64), seconds=seconds, generator=generator())
    assert abs(start.loc[0] - y.mean()) < 0.02 and abs(start.loc[1] - y.std().log()) < 0.02
    sds = (start.scale @ start.scale.mT).diagonal().sqrt()
    torch.testing.assert_close(sds, torch.tensor([2 / 316, 1 / 447], dtype=torch.float64), rtol=0.3, atol=0.0)


@pytest.mark.parametrize("initial", [torch.zeros(2, 3), torch.zeros(0), torch.tensor([math.nan]), torch.tensor([1])])
def test_initial_point_is_checked(initial):
    with pytest.raises(ValueError, match=r"initial as a finite vector of shape \(D,\)"):
        find_start(lambda z: -z.square().sum(-1), initial)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="num_starts to be an integer >= 1, got 0"):
        find_start(lambda z: -z.square().sum(-1), torch.zeros(2), num_starts=0)


def test_time_that_is_up_leaves_points_out():
    density, calls = counted(lambda z: -z.square().sum(-1))
    safe = SafeDensity(density, torch.zeros(1, dtype=torch.float64), seconds=0.0, rows=2)
    values = safe.gradients(torch.ones(5, 1, dtype=torch.float64))[0]
    assert calls == [2] and safe.expired
    torch.testing.assert_close(values, torch.tensor([-1.0, -1.0] + 3 * [-math.inf], dtype=torch.float64))


def test_no_candidate_is_narrower_than_the_rounding():
    """Draws that rounding makes the same would seem to gain for ever on a density without bound."""
    loc, scale = torch.tensor([3.0, 0.0]).double(), torch.tensor([1e-8, 1e-8]).double()
    eps = torch.finfo(torch.float32).eps
    for narrow in (scale, torch.diag(scale)):
        assert not _Gaussian(loc, narrow, "path").usable(eps)
        assert _Gaussian(loc, narrow, "path").usable(torch.finfo(torch.float64).eps)
        assert _Gaussian(0 * loc, narrow, "path").usable(eps)
        assert not _Gaussian(loc, narrow * math.inf, "path").usable(0.0)


def test_ranking_does_not_fall_for_luck():
    """The posterior itself among a thousand Gaussians that are a little off."""
    noise = torch.randn(32, 6, generator=generator(), dtype=torch.float64)
    safe = SafeDensity(normal_log_prob, torch.zeros(1, dtype=torch.float64))
    ranking = _Ranking(safe, torch.stack([noise, -noise], 1).flatten(0, 1))
    off = 0.1 * torch.randn(1000, 6, 6, generator=generator(1), dtype=torch.float64).tril()
    unit = torch.eye(6, dtype=torch.float64)
    ranking.add([_Gaussian(torch.zeros(6, dtype=torch.float64), unit + part, "path") for part in (0 * unit, *off)])
    assert torch.equal(ranking.winner.scale, unit)
    assert abs(ranking.elbo) < 1e-9


def normal_log_prob(z):
    return Normal(0.0, 1.0).log_prob(z).sum(-1)


@pytest.mark.parametrize("dim", [3, 8])
def test_nothing_is_made_on_the_default_device(dim):
    density, _, _, evidence = gaussian(dim, 10.0)
    initial = torch.zeros(dim, dtype=torch.float64)
    source = generator()
    with torch.device("meta"):
        start = find_start(density, initial, generator=source, full_rank_up_to=6)
    assert start.loc.device.type == start.scale.device.type == "cpu"
    assert abs(start.elbo - evidence) < (1e-3 if dim == 3 else 5)
