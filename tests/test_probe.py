"""The mode probe: lost modes are found with their share, and nothing else raises an alarm."""

import math
import time

import pytest
import torch
from asserts import refuses
from cases import generator
from torch.distributions import Independent, MultivariateNormal, Normal

import pyro_flows.infer.search.probe
from pyro_flows.infer.machine.pace import Pace
from pyro_flows.infer.search.climb import SafeDensity
from pyro_flows.infer.search.probe import probe_modes


def normal(loc, sd, dtype=torch.float64):
    loc = torch.as_tensor(loc, dtype=dtype)
    return Independent(Normal(loc, torch.as_tensor(sd, dtype=dtype).expand_as(loc)), 1)


class Mixture:
    """A mixture of distributions of vectors."""

    def __init__(self, parts, weights):
        self.parts, self.weights = parts, torch.tensor(weights, dtype=torch.float64)

    def log_prob(self, z):
        each = torch.stack([part.log_prob(z) for part in self.parts], -1)
        return (each + self.weights.log().to(each)).logsumexp(-1)

    def sample(self, shape):
        each = torch.stack([part.sample(shape) for part in self.parts], 1)
        return each[torch.arange(shape[0]), torch.multinomial(self.weights, shape[0], replacement=True)]


def probe(target, guide, log_evidence=0.0, **options):
    draws = guide.sample((1000,))
    options = {"generator": generator(), **options}
    initial = options.pop("initial", torch.zeros_like(draws[0]))
    log_p = getattr(target, "log_prob", target)
    return probe_modes(log_p, guide.log_prob, draws, initial, log_evidence=log_evidence, **options)


def pair(shares, dim=4, dtype=torch.float64):
    parts = [normal(torch.full((dim,), loc), 0.3, dtype) for loc in (2.0, -2.0)]
    return Mixture(parts, shares)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.02, 0.98])
def test_a_lost_mode_is_found_with_its_share(share, dtype, default_dtype):
    default_dtype(torch.float32 if dtype is torch.float64 else torch.float64)
    target = pair((1 - share, share), dtype=dtype)
    guide = target.parts[0]
    # What the guide's own draws say of the evidence: all of it but the lost mode.
    found = probe(target, guide, log_evidence=math.log(1 - share))
    assert found.locations.dtype == found.share.dtype == dtype
    assert len(found.share) == 2 and found.missed.sum() == 1
    lost = int(found.missed.long().argmax())
    torch.testing.assert_close(found.locations[lost], torch.full((4,), -2.0, dtype=dtype), atol=1e-3, rtol=0)
    assert abs(found.missing_share - share) < 0.03 * share + 0.001
    assert abs(found.share[lost].item() - share) < 0.03 * share + 0.001
    assert found.guide_share[lost] < 1e-6
    expected = target.log_prob(found.locations) - math.log(1 - share) - guide.log_prob(found.locations)
    torch.testing.assert_close(found.excess, expected, atol=1e-3, rtol=1e-4)
    assert found.excess[lost] > 100 and abs(found.excess[1 - lost]) < 0.1


@pytest.mark.parametrize("shares", [(0.7, 0.3), (0.98, 0.02)])
def test_a_guide_on_both_modes_misses_nothing(shares):
    target = pair(shares)
    found = probe(target, target)
    assert len(found.share) == 2 and not found.missed.any() and found.missing_share == 0
    torch.testing.assert_close(found.share, torch.tensor(shares, dtype=torch.float64), atol=0.05, rtol=0)
    torch.testing.assert_close(found.guide_share, found.share, atol=0.05, rtol=0)
    assert found.excess.abs().max() < 1e-6


def test_a_mode_that_has_far_too_little_is_missed():
    target, guide = pair((0.7, 0.3)), pair((0.995, 0.005))
    found = probe(target, guide, log_evidence=math.log(0.7))
    assert abs(found.missing_share - 0.3) < 0.02
    assert not probe(target, pair((0.8, 0.2))).missed.any()


@pytest.mark.parametrize("dim", [1, 4, 10])
def test_a_guide_over_both_modes_is_not_blamed(dim):
    """Eight standard deviations apart, with a wide guide that covers both, badly; and one that covers one of them."""
    loc = torch.zeros(dim, dtype=torch.float64)
    loc[0] = 4.0
    target = Mixture([normal(loc, 1.0), normal(-loc, 1.0)], (0.5, 0.5))
    wide = normal(torch.zeros(dim), torch.cat([torch.tensor([5.0]), torch.ones(dim - 1)]))
    assert probe(target, wide).missing_share == 0
    assert abs(probe(target, target.parts[1], log_evidence=math.log(0.5)).missing_share - 0.5) < 0.03


@pytest.mark.full
def test_all_labels_of_a_mixture_are_found():
    """Six modes, as no mean has a name."""
    noise = torch.randn(3, 60, generator=generator(), dtype=torch.float64)
    data = (0.5 * noise + torch.tensor([[-3.0], [0.0], [4.0]])).flatten()

    def log_p(z):
        likelihood = (Normal(z[:, None], 0.5).log_prob(data[:, None]) - math.log(3)).logsumexp(-1).sum(-1)
        return likelihood + Normal(0.0, 5.0).log_prob(z).sum(-1)

    sd = 0.5 / math.sqrt(60)
    guide = normal(data.reshape(3, 60).mean(-1), sd)
    draws = guide.sample((1000,))
    evidence = (log_p(draws) - guide.log_prob(draws)).mean().item()
    found = probe(log_p, guide, log_evidence=evidence)
    assert (found.share > 1e-3).sum() == 6 and found.missed.sum() == 5
    assert found.complete
    assert abs(found.missing_share - 5 / 6) < 0.02


def test_modes_in_raw_units():
    scale = torch.tensor([0.2, 10.0, 0.002, 0.5], dtype=torch.float64)
    one, two = torch.tensor([10.0, 300.0, 0.01, 5.0]), torch.tensor([12.0, 200.0, 0.03, 1.0])
    target = Mixture([normal(one, scale), normal(two, 1.5 * scale)], (0.6, 0.4))
    found = probe(target, target.parts[0], log_evidence=math.log(0.6))
    assert abs(found.missing_share - 0.4) < 0.02


# What must raise no alarm


def correlated(dim, condition):
    g = generator(3)
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64))[0]
    covariance = (axes * torch.logspace(0, -math.log10(condition), dim, dtype=torch.float64)) @ axes.mT
    return MultivariateNormal(torch.randn(dim, generator=g, dtype=torch.float64), 0.5 * (covariance + covariance.mT))


@pytest.mark.parametrize(("dim", "condition"), [(1, 1.0), (4, 1e4), (30, 1e6)])
@pytest.mark.parametrize("width", [0.5, 1.0, 1.5, "independent"])
def test_one_gaussian_has_one_mode(dim, condition, width):
    target = correlated(dim, condition)
    if width == "independent":
        guide = normal(target.mean, target.precision_matrix.diagonal().rsqrt())
    else:
        guide = MultivariateNormal(target.mean, width * target.covariance_matrix)
    found = probe(target, guide, log_evidence=-1.0 if width != 1.0 else 0.0)
    assert len(found.share) == 1 and not found.missed.any()
    assert found.missing_share == 0
    away = torch.linalg.solve_triangular(target.scale_tril, (found.locations - target.mean).mT, upper=False)
    assert away.abs().max() < 1e-3
    if width == 1.0:
        assert 0.6 < found.share[0] <= 1


def banana(z):
    bent = z[:, 1] + 0.1 * (z[:, 0].square() - 25)
    return normal([0.0, 0.0], [5.0, 1.0]).log_prob(torch.stack([z[:, 0], bent], -1))


def funnel(z):
    scale = (0.5 * z[:, :1]).exp()
    return Normal(0.0, 3.0).log_prob(z[:, 0]) + (-0.5 * (z[:, 1:] / scale).square() - scale.log()).sum(-1)


def schools(z):
    """Centred: the density has a neck at which it grows without bound."""
    effect = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=z.dtype)
    sd = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=z.dtype)
    mean, log_tau, each = z[:, :1], z[:, 1:2], z[:, 2:]
    prior = -0.5 * (mean / 5).square() - torch.log1p((log_tau.exp() / 5).square()) + log_tau
    level = -0.5 * ((each - mean) / log_tau.exp()).square() - log_tau
    return prior[:, 0] + level.sum(-1) - 0.5 * ((effect - each) / sd).square().sum(-1)


def student(z):
    dim = z.shape[-1]
    const = math.lgamma(0.5 * (3 + dim)) - math.lgamma(1.5) - 0.5 * dim * math.log(3 * math.pi)
    return const - 0.5 * (3 + dim) * torch.log1p(z.square().sum(-1) / 3)


def ragged(z):
    """Ripples, each with a top of its own, on one hill that the guide covers."""
    return normal(torch.zeros(2), 2.0).log_prob(z) + 0.7 * (6 * z).cos().sum(-1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("log_p", "guide", "log_evidence"),
    [
        (banana, normal([0.0, 0.0], [5.0, 3.0]), -0.3),
        (student, normal(torch.zeros(3), 1.3), -0.2),
        (student, normal(torch.zeros(10), 1.3), -0.5),
        (student, normal(torch.zeros(30), 1.3), -1.0),
        (funnel, normal(torch.zeros(10), 1.0), -9.0),
        (schools, normal(torch.tensor([4.0, 1.0] + [5.0] * 8), torch.tensor([3.0, 0.7] + [5.0] * 8)), 0.0),
        (ragged, normal(torch.zeros(2), 2.0), 0.2),
    ],
    ids=["banana", "student3", "student10", "student30", "funnel", "schools", "ragged"],
)
@pytest.mark.full
def test_no_false_alarm(log_p, guide, log_evidence, seed):
    found = probe(log_p, guide, log_evidence=log_evidence, generator=generator(seed))
    assert found.missing_share == 0 and not found.missed.any()


@pytest.mark.full
def test_a_funnel_has_no_mode():
    """Its top is in the neck, where the density has no bound, or next to none of the mass."""
    found = probe(schools, normal(torch.tensor([4.0, 1.0] + [5.0] * 8), 3.0))
    assert len(found.share) == 0 and found.locations.shape == (0, 10)


# The rest of the contract


@pytest.mark.full
def test_refused_points_are_worked_around():
    target = pair((0.7, 0.3))

    def log_p(z):
        if (z[:, 0] > 4).any():
            raise ValueError("outside the support")
        return target.log_prob(z).masked_fill(z[:, 1] > 5, math.nan)

    found = probe(log_p, target.parts[0], log_evidence=math.log(0.7))
    assert abs(found.missing_share - 0.3) < 0.02


def test_plateaus_cost_little(monkeypatch):
    """Where the density is level, far below the mode, no curvatures and no infinite points are asked for."""
    asked = []

    def log_p(z):
        asked.append(bool(z.isfinite().all()))
        return torch.logaddexp(-0.5 * z.square().sum(-1), torch.tensor(-400.0, dtype=z.dtype))

    examined = []
    whole = pyro_flows.infer.search.probe.laplace
    monkeypatch.setattr(
        pyro_flows.infer.search.probe, "laplace", lambda *args, **more: examined.append(args[1]) or whole(*args, **more)
    )
    guide = normal(torch.zeros(3), 1.0)
    found = probe(log_p, guide, 1.5 * math.log(2 * math.pi))
    assert found.complete and len(found.locations) == 1 and all(asked)
    assert torch.cat(examined).norm(dim=-1).max() < 30

    log_q, calls = torch.tensor([[math.nan, 0.0], [1.0, 2.0], [math.inf, 0.0]], dtype=torch.float64), []
    safe = SafeDensity(lambda z: calls.append(len(z)) or -0.5 * z.square().sum(-1), log_q)
    value, slope = safe.gradients(log_q)
    assert value.tolist() == [-math.inf, -2.5, -math.inf] and slope.tolist() == [[0, 0], [-1, -2], [0, 0]]
    assert safe.values(log_q[:1]).tolist() == [-math.inf] and calls == [1]
    assert safe.gradients(log_q.float())[1].dtype == torch.float64


def test_reproducible_and_counted():
    target, seen = pair((0.7, 0.3)), []

    def log_p(z):
        seen.append(len(z))
        return target.log_prob(z)

    draws = target.parts[0].sample((200,))
    state = torch.get_rng_state()
    one, two = (
        probe_modes(log_p, target.parts[0].log_prob, draws, draws[0], log_evidence=0.0, generator=generator())
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(vars(one).values(), vars(two).values(), strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    assert one.evaluations + two.evaluations == sum(seen)


def test_time_limit():
    target = pair((0.7, 0.3))
    found = probe(target, target.parts[0], seconds=0.0)
    assert found.missing_share == 0 and len(found.share) == 0 and not found.complete


def test_a_search_short_in_time_climbs_from_fewer_points(monkeypatch):
    """Each point takes a millisecond, by a clock that nothing else moves."""
    now, target = [0.0], pair((0.7, 0.3))
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Slow:
        pace = Pace()

        def __call__(self, z):
            now[0] += 0.001 * len(z)
            return target.log_prob(z)

    found = {
        seconds: probe(Slow(), target.parts[0], seconds=seconds, log_evidence=math.log(0.7)) for seconds in (0.3, 8, 90)
    }
    assert [each.complete for each in found.values()] == [False, True, True]
    assert found[0.3].num_starts < 16 <= found[8].num_starts < 60 < found[90].num_starts
    assert found[8].missed.any() and abs(found[8].missing_share - 0.3) < 0.02


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"draws": torch.zeros(1, 4)}, "n >= 2"),
        ({"initial": torch.zeros(3)}, r"initial of shape \(D,\)"),
        ({"log_evidence": math.nan}, "finite log_evidence, got nan"),
        ({"log_p": lambda z: z.sum(-1) * math.nan}, "not finite at any start"),
    ],
)
def test_errors(options, match):
    target = pair((0.7, 0.3)).parts[0]
    options = {
        "log_p": target.log_prob,
        "log_q": target.log_prob,
        "draws": target.sample((10,)),
        "initial": torch.zeros(4, dtype=torch.float64),
        "log_evidence": 0.0,
        **options,
    }
    refuses(ValueError, match, probe_modes, **options)


def test_nothing_is_made_on_the_default_device():
    target, source = pair((0.7, 0.3)), generator()
    draws = target.parts[0].sample((100,))
    initial = torch.zeros(4, dtype=torch.float64)
    options = {"log_evidence": math.log(0.7), "generator": source}
    with torch.device("meta"):
        found = probe_modes(target.log_prob, target.parts[0].log_prob, draws, initial, **options)
    assert found.missed.device.type == found.share.device.type == "cpu"
    assert abs(found.missing_share - 0.3) < 0.02


def test_an_earlier_search_is_used_again():
    """Its modes are judged for the new guide, with fewer climbs, also where no new climb leads there."""
    target = pair((0.7, 0.3))
    first = probe(target, target.parts[0], log_evidence=math.log(0.7))
    again = probe(target, target, known=first)
    assert len(again.share) == 2 and not again.missed.any() and again.evaluations < probe(target, target).evaluations
    torch.testing.assert_close(again.share, torch.tensor([0.7, 0.3], dtype=torch.float64), atol=0.05, rtol=0)
    alone = probe(
        target, target.parts[1], log_evidence=math.log(0.3), known=first, num_starts=1, initial=-first.locations[1]
    )
    assert alone.missed.tolist() == [True, False] and abs(alone.missing_share - 0.7) < 0.02
