"""Verdicts on guides whose errors are known: none that is wrong may pass."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from asserts import refuses
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, StudentT, Uniform

from pyro_flows.infer.diagnostics.moments import Moments, compare_moments, scalar_names
from pyro_flows.infer.diagnostics.verdict import LABELS, judge, widening
from pyro_flows.infer.diagnostics.weights import importance, resample

N = 10_000


def real(*values):
    return torch.tensor(values, dtype=torch.float64)


def normal(loc=0.0, scale=1.0):
    return Normal(real(loc)[0], real(scale)[0])


def weigh(posterior, guide, n=N):
    draws = guide.sample((n,))
    return draws[:, None], posterior.log_prob(draws) - guide.log_prob(draws)


def verdict(posterior, guide, n=N, **others):
    draws, log_weights = weigh(posterior, guide, n)
    return judge(importance(log_weights), moments=compare_moments(draws, log_weights), **others)


def mode_probe(*shares, missed):
    return SimpleNamespace(
        missing_share=sum(share for share, out in zip(shares, missed, strict=True) if out),
        missed=torch.tensor(missed),
        locations=torch.arange(2.0 * len(shares)).reshape(-1, 2),
        share=torch.tensor(shares),
    )


# The rule


@pytest.mark.parametrize(
    ("posterior", "guide", "label"),
    [
        (normal(), normal(), "good"),
        (normal(), normal(0.02, 0.98), "good"),
        (normal(), normal(0.3, 1.0), "use importance resampling"),  # ESS 0.91: the mean is off all the same
        (normal(), normal(0.0, 1.2), "use importance resampling"),  # ESS 0.95
        (normal(), normal(0.0, 0.75), "use importance resampling"),
        (normal(), normal(0.0, 0.3), "bad"),
        (normal(), normal(4.0, 1.0), "bad"),
        (normal(), Uniform(real(50.0)[0], real(60.0)[0]), "bad"),
    ],
)
def test_label(posterior, guide, label):
    for _ in range(5):
        found = verdict(posterior, guide)
        assert found.label == label in LABELS
        assert found.ok == (label == "good")


def test_resampling_is_advised_where_it_helps():
    for posterior, guide in ((normal(), normal(0.3, 1.0)), (normal(), normal(0.0, 0.75))):
        draws, log_weights = weigh(posterior, guide)
        mended = resample(draws, log_weights, 3000)[:, 0]
        assert abs(float(mended.mean())) < 0.08 and abs(float(mended.std()) - 1) < 0.06


def test_nothing_wrong_passes():
    """Guides over a range of errors: whatever passes is right in mean and standard deviation, nearly."""
    shifted = [(normal(), normal(0.05 * k, 1.0)) for k in range(8)]
    scaled = [(normal(), normal(0.0, s)) for s in (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.1, 1.2, 1.5, 2.0)]
    mixed = [
        (MixtureSameFamily(Categorical(real(1 - a, a)), Normal(real(0.0, m), real(1.0, 1.0))), normal())
        for a, m in ((0.05, 3.0), (0.1, 3.0), (0.05, 4.0), (0.3, 3.0))
    ]
    passed = 0
    for posterior, guide in shifted + scaled + mixed:
        for _ in range(3):
            if not verdict(posterior, guide).ok:
                continue
            passed += 1
            spread = float(posterior.variance.sqrt())
            assert abs(float(posterior.mean - guide.mean)) / spread < 0.13
            assert abs(math.log(float(guide.variance.sqrt()) / spread)) < 0.13
    assert passed >= 15


def test_nearly_constant_weights_are_good_whatever_their_index():
    noise = StudentT(real(1.0)[0]).sample((N,)).clamp(-1e3, 1e3)
    found = judge(importance(1e-6 * noise))
    assert found.label == "good" and found.numbers["khat"] > 0.5
    assert "meaningless" in found.text
    assert judge(importance(torch.zeros(N))).label == "good"


def test_heavy_weights_at_a_high_ess_leave_tails_uncertain():
    """A guide that is exact but for a tail that is too light, by a power."""
    places = ((torch.arange(N) + 0.5) / N).double()
    log_weights = torch.log1p(0.008 * places.pow(-0.8))
    found = importance(log_weights)
    assert found.ess > 0.9 and found.khat > 0.7 and found.tail > 0.005
    said = judge(found)
    assert said.label == "good, tails uncertain" and said.ok
    assert "not to be trusted" in said.text


def test_a_standard_deviation_that_hangs_on_few_draws_is_named():
    x = StudentT(real(2.1)[0]).sample((N,))
    z = {"a": torch.randn(N, 2, dtype=torch.float64), "b": x}
    log_weights = torch.zeros(N)
    found = judge(importance(log_weights), moments=compare_moments(z, log_weights))
    assert found.label == "good, tails uncertain"
    assert re.search(r"standard deviation of b depends on a few draws", found.text)


def test_failures_weigh():
    log_weights = torch.zeros(N)
    for share, label in ((0.001, "good"), (0.05, "use importance resampling"), (0.95, "bad"), (1.0, "bad")):
        for value in (math.nan, -math.inf, math.inf):
            given = log_weights.clone()
            given[: int(share * N)] = value
            found = judge(importance(given))
            assert found.label == label
            assert ("failed" in found.text) and ("density zero" in found.text)
    assert judge(importance(log_weights), failures=1000).label == "use importance resampling"
    assert "No draw has a positive weight" in judge(importance(torch.full((N,), -math.inf))).text


def test_few_draws_are_not_judged():
    assert judge(importance(torch.zeros(99))).label == "not judged"
    assert judge(importance(torch.zeros(100))).label == "good"
    assert not judge(importance(torch.zeros(99))).ok


def test_of_fewer_draws_fewer_must_count():
    noise = torch.randn(2000, dtype=torch.float64)
    assert judge(importance(noise[:1000] * 0.8)).label == "use importance resampling"
    assert judge(importance(noise[:150] * 0.8)).label == "bad"


def test_minibatches_are_not_judged():
    found = judge(importance(torch.zeros(N)), mode_probe(0.5, 0.5, missed=[False, True]), minibatch=True)
    assert found.label == "not judged" and not found.ok
    assert "subsample" in found.text and "ESS" not in found.text


# What weights do not see


def test_missed_modes_come_first():
    for log_weights in (torch.zeros(N), 3 * torch.randn(N)):
        found = judge(importance(log_weights), mode_probe(0.6, 0.3, 0.1, missed=[False, True, True]))
        assert found.label == "modes missing" and not found.ok
        assert found.numbers["missing_share"] == pytest.approx(0.4)
        assert "2 modes" in found.text and "40.0%" in found.text and "(2, 3)" in found.text


def test_modes_that_are_covered_or_negligible_change_nothing():
    assert "the guide misses none" in judge(importance(torch.zeros(N)), mode_probe(1.0, missed=[False])).text
    found = judge(importance(torch.zeros(N)), mode_probe(0.998, 0.002, missed=[False, True]))
    assert found.label == "good" and "0.2%" in found.text
    assert "not searched for" in judge(importance(torch.zeros(N))).text
    nothing = SimpleNamespace(missing_share=0.0, missed=torch.zeros(0, dtype=torch.bool), locations=None, share=None)
    assert "says nothing" in judge(importance(torch.zeros(N)), nothing).text


def test_a_guide_that_ends_too_early_is_found_by_a_wider_one():
    """A normal cut at 1.5: its own weights are all equal."""
    wide = widening(1)
    for cut, label in ((1.5, "bad"), (2.2, "good, tails uncertain"), (6.0, "good")):
        x = torch.randn(20 * N, dtype=torch.float64)
        x = x[x.abs() < cut][:N]
        inside = math.erf(cut / math.sqrt(2))
        own = torch.full((N,), math.log(inside))
        outer = -0.5 * (wide * x) ** 2 + 0.5 * x**2 + math.log(inside) + math.log(wide)
        assert judge(importance(own)).label == "good"
        found = judge(importance(own), wide=importance(outer))
        assert found.label == label, cut
        # The widened one reaches to cut * wide.
        reached = 1 - inside / math.erf(min(cut * wide, 8) / math.sqrt(2))
        assert found.numbers["outside"] <= reached + 1e-3


@pytest.mark.parametrize("dim", [1, 2, 10, 100])
def test_widening_leaves_half_of_the_draws_effective(dim):
    z = torch.randn(N, dim, dtype=torch.float64) * widening(dim)
    target = Independent(Normal(torch.zeros(dim, dtype=torch.float64), 1.0), 1)
    wide = Independent(Normal(torch.zeros(dim, dtype=torch.float64), widening(dim)), 1)
    found = importance(target.log_prob(z) - wide.log_prob(z))
    assert 0.4 < found.ess < 0.85 and found.khat < 0.5
    assert judge(importance(torch.zeros(N)), wide=found).label == "good"


# Moments


def test_moments_against_direct_sums():
    z = torch.randn(5000, 3, dtype=torch.float64) * real(1.0, 10.0, 0.1) + real(0.0, 100.0, -3.0)
    log_weights = 0.2 * (z[:, 1] - 100) / 10 - 0.1 * (z[:, 0]) ** 2
    found = compare_moments(z, log_weights)
    weights = log_weights.softmax(0)  # so light a tail that smoothing hardly changes it
    mean, spread = z.mean(0), z.std(0)
    weighted = weights @ z
    torch.testing.assert_close(found.mean, (weighted - mean) / spread, rtol=0.01, atol=0.003)
    expected = (weights @ (z - weighted) ** 2).sqrt() / spread
    torch.testing.assert_close(found.scale, expected.log(), rtol=0.01, atol=0.003)
    assert found.names == ("z[0]", "z[1]", "z[2]")


def test_errors_of_moments_are_as_large_as_they_say():
    scores = []
    for _ in range(200):
        draws, log_weights = weigh(normal(), normal(0.1, 1.05), 2000)
        found = compare_moments(draws, log_weights)
        mean, spread = -0.1 / 1.05, -math.log(1.05)
        scores.append(
            [float(found.mean - mean) / float(found.mean_error), float(found.scale - spread) / float(found.scale_error)]
        )
    spread = torch.tensor(scores).std(0)
    assert ((spread > 0.7) & (spread < 1.4)).all()


def test_moments_take_sites_of_any_shape():
    z = {"s": torch.randn(500), "v": torch.randn(500, 2), "m": torch.randn(500, 2, 2), "fixed": torch.ones(500)}
    found = compare_moments(z, torch.zeros(500))
    assert found.names == ("s", "v[0]", "v[1]", "m[0, 0]", "m[0, 1]", "m[1, 0]", "m[1, 1]", "fixed")
    assert found.names[3:7] == tuple(scalar_names("m", (2, 2)))
    for values in (found.mean, found.scale):
        torch.testing.assert_close(values, torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-12)
    assert judge(importance(torch.zeros(500)), moments=found).label == "good"


def test_draws_that_failed_do_not_spoil_moments():
    z, log_weights = torch.randn(1000, 2), torch.zeros(1000)
    z[:5], log_weights[:5] = math.nan, math.nan
    found = compare_moments(z, log_weights)
    assert found.mean.isfinite().all() and found.scale.isfinite().all()


def test_moments_say_what_does_not_fit():
    refuses(ValueError, r"each of 10 draws, got \(9,\)", compare_moments, torch.zeros(10, 2), torch.zeros(9))
    with pytest.raises(ValueError, match="as many draws of every site"):
        compare_moments({"a": torch.zeros(3), "b": torch.zeros(4)}, torch.zeros(3))
    refuses(ValueError, "dim to be an integer", widening, 0)


# Words


def test_verdicts_are_readable():
    draws, log_weights = weigh(normal(), normal(0.3, 1.0))
    found = importance(log_weights)
    said = judge(found, moments=compare_moments(draws, log_weights), wide=found, probe=mode_probe(1.0, missed=[False]))
    lines = str(said).splitlines()
    assert lines[0].startswith("use importance resampling: ")
    assert all(line.startswith("  ") for line in lines[1:]) and max(map(len, lines)) <= 84
    assert f"ESS {found.ess:.3f}" in str(said) and f"{found.log_evidence:.3f}" in said.text
    assert re.search(r"Next: Resample at most [\d,]+ draws", said.text)
    assert said.numbers["ess"] == found.ess
    with pytest.raises(AttributeError):
        said.ok = True


def test_zeros_beside_nearly_constant_weights_are_for_resampling():
    noise = StudentT(real(1.0)[0]).sample((N,)).clamp(-1e3, 1e3) * 1e-6
    noise[:500] = -math.inf
    found = importance(noise)
    assert found.khat > 0.7 and judge(found).label == "use importance resampling"


def test_moments_that_are_no_numbers_do_not_pass():
    z = torch.randn(N, 2)
    z[3, 1] = math.inf
    assert not judge(importance(torch.zeros(N)), moments=compare_moments(z, torch.zeros(N))).ok


def test_a_standard_deviation_that_may_be_off_by_a_tenth_is_open():
    """Weights that move it by six percent, with an error of a half or of four percent."""

    def moments(error):
        scale = torch.tensor([0.0, 0.06])
        parts = {"mean": 0 * scale, "mean_error": 0 * scale, "scale": scale, "heavy": scale - math.inf}
        return Moments(names=("a", "b"), scale_error=torch.tensor([0.0, error]), **parts)

    found = importance(torch.zeros(N))
    assert judge(found, moments=moments(0.005)).label == "good"
    said = judge(found, moments=moments(0.04))
    assert said.label == "good, tails uncertain" and said.ok and "standard deviation of b is off" in said.text
    draws, log_weights = weigh(normal(), normal(0.0, 1.03))  # surely within
    assert judge(importance(log_weights), moments=compare_moments(draws, log_weights)).label == "good"


def test_what_a_heavy_tail_hides():
    places = ((torch.arange(N) + 0.5) / N).double()
    guide, posterior = normal(0.0, 0.4), normal()
    draws = guide.icdf(places)
    found = importance(posterior.log_prob(draws) - guide.log_prob(draws))
    outside = 2 * float(posterior.cdf(guide.icdf(real(1 / N))))  # of the posterior, where no draw is expected
    assert found.khat > 0.7 and 0.5 < found.unseen / outside < 2 and judge(found).label == "bad"
    # A tail as heavy that holds little: weights of the index 0.8, with a known part beyond the first of N places.
    log_weights = torch.log1p(0.004 * places.pow(-0.8))
    log_weights[7::8] = -math.inf
    found = importance(log_weights)
    outside = 0.004 / 0.2 * (1 / N) ** 0.2
    assert found.khat > 0.7 and found.tail > 0.005 and found.ess < 0.9 and 0.5 < found.unseen / outside < 3
    assert judge(found).label == "use importance resampling"


def test_few_draws_do_not_make_tails_heavy():
    z = torch.distributions.Exponential(1.0).sample((500, 20))
    found = judge(importance(torch.zeros(500)), moments=compare_moments(z, torch.zeros(500)))
    assert found.label == "good" and "depends on" not in found.text
