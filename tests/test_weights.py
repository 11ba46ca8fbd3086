"""Importance weights: smoothing against ArviZ, tail indices that are known, sums against closed forms."""

import math
import sys
import warnings

import numpy as np
import pytest
import torch
from asserts import refuses
from cases import seeded

from pyro_flows.infer.diagnostics.weights import importance, pareto_smoothed, resample, tail_index

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
    try:
        import arviz
    except ModuleNotFoundError:
        arviz = None


def pareto(k, n, seed=0):
    """Log weights whose excess over 1 has a generalised Pareto distribution with index k."""
    u = torch.rand(n, generator=seeded(seed), dtype=torch.float64)
    return torch.log1p(torch.expm1(-k * u.log()) / k)


def normal(spread, n, seed=0):
    """Log weights of mean weight 1, as of a guide that is slightly off."""
    noise = torch.randn(n, generator=seeded(seed), dtype=torch.float64)
    return spread * noise - spread**2 / 2


# Smoothing


# Of 21 and 5000 weights the tail would hold 4.2 and 212.1: up as in the paper, which ArviZ 1.x rounds down.
ROUNDED = pytest.mark.skipif(not hasattr(arviz, "psislw"), reason="ArviZ 1.x takes a tail of another size")


@pytest.mark.parametrize("n", [pytest.param(21, marks=ROUNDED), 30, 200, 4900, pytest.param(5000, marks=ROUNDED)])
@pytest.mark.parametrize("k", [0.2, 0.5, 0.8, 1.2])
def test_arviz_smooths_the_same_way(k, n):
    pytest.importorskip("arviz")
    log_weights = pareto(k, n) - 700.0
    found = pareto_smoothed(log_weights)
    if hasattr(arviz, "psislw"):
        expected, khat = arviz.psislw(log_weights.cpu().numpy().copy())
    else:  # 1.x, which takes the negative
        expected, khat = sys.modules["arviz_stats.base"].array_stats.psislw(-log_weights.cpu().numpy())
    assert found.khat == pytest.approx(float(khat), abs=1e-10)
    np.testing.assert_allclose(found.log_weights.cpu().numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.8, 1.2])
def test_index_of_a_known_tail(k):
    found = [pareto_smoothed(pareto(k, 10_000, seed)).khat for seed in range(20)]
    # The prior draws the estimate to one half by ten draws' worth.
    expected = (300 * k + 10 * 0.5) / 310
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / math.sqrt(20) + 0.02)


def test_bounded_weights_have_a_negative_index():
    x = torch.rand(10_000, dtype=torch.float64)
    assert -1.3 < pareto_smoothed(x.log()).khat < -0.7  # uniform weights: -1


def test_smoothing_keeps_order_body_and_bound():
    log_weights = pareto(0.8, 1000)[torch.randperm(1000)]
    found = pareto_smoothed(log_weights).log_weights
    assert float(found.logsumexp(0)) == pytest.approx(0, abs=1e-12)
    assert torch.equal(found.argsort(), log_weights.argsort())
    body = log_weights.argsort()[: -(95 + 1)]
    shift = (found - log_weights)[body]
    torch.testing.assert_close(shift, shift[0].expand_as(shift), rtol=0, atol=1e-12)
    assert float((found - shift[0]).max()) <= float(log_weights.max()) + 1e-12


def test_smoothing_does_not_depend_on_a_constant():
    log_weights = pareto(0.6, 500)
    near, far = pareto_smoothed(log_weights), pareto_smoothed(log_weights + 1e4)
    assert far.khat == pytest.approx(near.khat, abs=1e-6)
    torch.testing.assert_close(far.log_weights, near.log_weights, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_dtypes_while_the_other_is_the_default(dtype, default_dtype):
    default_dtype(torch.float64 if dtype == torch.float32 else torch.float32)
    log_weights = pareto(0.5, 1000).to(dtype)
    found = pareto_smoothed(log_weights)
    assert found.log_weights.dtype == torch.float64
    assert found.khat == pytest.approx(pareto_smoothed(log_weights.double()).khat, abs=1e-12)
    assert importance(log_weights) == importance(log_weights.double())
    assert resample(torch.arange(1000.0, dtype=dtype), log_weights, 5).dtype == dtype


def test_default_device_and_gradients_play_no_part():
    log_weights = pareto(0.5, 500).requires_grad_()
    expected = importance(log_weights), pareto_smoothed(log_weights).khat
    with torch.device("meta"):
        found = importance(log_weights), pareto_smoothed(log_weights).khat
        assert resample(log_weights.detach(), log_weights, 3).device == log_weights.device
    assert found == expected
    assert not pareto_smoothed(log_weights).log_weights.requires_grad


def test_on_the_device(device):
    log_weights = pareto(0.5, 500).to(device)
    found = pareto_smoothed(log_weights)
    assert found.log_weights.device == log_weights.device
    assert found.khat == pytest.approx(pareto_smoothed(log_weights.cpu()).khat, abs=1e-9)
    assert resample({"z": log_weights}, log_weights, 3)["z"].device == log_weights.device
    assert importance(log_weights).num_samples == 500


# Weights at the edge


def test_equal_weights():
    for value in (0.0, -1e5, 300.0):
        found = importance(torch.full((1000,), value))
        assert found.khat == -math.inf and found.trusted
        assert (found.ess, found.spread, found.tail, found.log_evidence_error) == (1.0, 0.0, 0.0, 1e-3)
        assert found.log_evidence == found.elbo == found.iw_elbo == pytest.approx(value, abs=1e-9)


def test_nearly_equal_weights_have_an_index_but_no_tail():
    noise = torch.distributions.StudentT(torch.tensor(1.0, dtype=torch.float64)).sample((10_000,))
    found = importance(1e-6 * noise.clamp(-1e3, 1e3))
    assert found.khat > 0.5 and found.tail < 1e-3 and found.ess > 0.999 and found.trusted


def test_one_weight_dominates():
    log_weights = torch.full((1000,), -5.0, dtype=torch.float64)
    log_weights[17] = 800.0
    found = importance(log_weights)
    assert found.khat == math.inf and not found.trusted
    assert found.ess == pytest.approx(1e-3) and found.largest == pytest.approx(1)
    assert found.log_evidence == pytest.approx(800 - math.log(1000))
    assert pareto_smoothed(log_weights).log_weights[17] == 0
    assert resample(torch.arange(1000), log_weights, 50).tolist() == [17] * 50


def test_no_weight_at_all():
    found = importance(torch.full((50,), -math.inf))
    assert (found.ess, found.khat, found.log_evidence, found.elbo) == (0.0, math.inf, -math.inf, -math.inf)
    assert (found.zeros, found.failures) == (50, 0) and not found.trusted
    failed = importance(torch.full((50,), math.nan))
    assert (failed.ess, failed.zeros, failed.failures) == (0.0, 0, 50) and math.isnan(failed.elbo)
    for value in (-math.inf, math.nan, math.inf):
        refuses(ValueError, "none of 50 weights is positive", pareto_smoothed, torch.full((50,), value))
        for smoothed in (True, False):
            with pytest.raises(ValueError, match="none of 50 weights is positive"):
                resample(torch.zeros(50), torch.full((50,), value), 5, smoothed=smoothed)


def test_failures_are_weights_of_zero_and_counted():
    good = normal(0.3, 900)
    bad = torch.tensor([math.nan, math.inf] * 50, dtype=torch.float64)
    found, zeros = importance(torch.cat([good, bad])), importance(torch.cat([good, torch.full((100,), -math.inf)]))
    alone = importance(good)
    assert (found.failures, found.zeros, found.num_samples) == (100, 0, 1000)
    assert (zeros.failures, zeros.zeros) == (0, 100)
    assert found.ess == pytest.approx(0.9 * alone.ess) and zeros.ess == pytest.approx(found.ess)
    assert found.log_evidence == pytest.approx(alone.log_evidence + math.log(0.9))
    assert found.elbo == pytest.approx(alone.elbo) and zeros.elbo == -math.inf
    assert found.spread == pytest.approx(alone.spread) == zeros.spread
    assert alone.trusted and zeros.trusted and not found.trusted
    assert not set(resample(torch.arange(1000), torch.cat([good, bad]), 5000).tolist()) & set(range(900, 1000))


@pytest.mark.parametrize("n", [1, 2, 3, 10, 20])
def test_few_weights(n):
    log_weights = normal(1.0, n)
    found = importance(log_weights)
    assert found.khat == math.inf and not found.trusted
    assert found.log_evidence == pytest.approx(float(log_weights.logsumexp(0)) - math.log(n))
    assert found.iw_samples == min(n, 10)
    torch.testing.assert_close(pareto_smoothed(log_weights).log_weights, log_weights.log_softmax(0))
    assert math.isnan(found.elbo_error) == (n == 1)


def test_what_is_no_weight_is_named():
    for given, message in (
        (torch.zeros(3, 2), r"shape \(3, 2\)"),
        (torch.zeros(3, dtype=torch.long), "torch.int64"),
        ([0.0], "got list"),
        (torch.zeros(0), "at least one"),
    ):
        for function in (importance, pareto_smoothed, tail_index):
            refuses(ValueError, message, function, given)
    refuses(ValueError, "iw_samples", importance, torch.zeros(3), iw_samples=0)
    refuses(ValueError, "num_samples to be an integer", resample, torch.zeros(3), torch.zeros(3), 0)
    with pytest.raises(ValueError, match=r"expected b with 3 rows.*\(4,\)"):
        resample({"a": torch.zeros(3, 2), "b": torch.zeros(4)}, torch.zeros(3), 2)


# Sums


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0])
def test_importance_of_lognormal_weights(spread):
    found = importance(normal(spread, 200_000) + 3)
    assert found.ess == pytest.approx(math.exp(-(spread**2)), rel=0.05)
    assert found.log_evidence == pytest.approx(3, abs=5 * found.log_evidence_error)
    assert found.log_evidence_error == pytest.approx(math.sqrt(math.expm1(spread**2) / 200_000), rel=0.05)
    assert found.elbo == pytest.approx(3 - spread**2 / 2, abs=5 * found.elbo_error)
    assert found.elbo_error == pytest.approx(spread / math.sqrt(200_000), rel=0.02)
    assert found.spread == pytest.approx(spread, rel=0.02)
    assert found.elbo < found.iw_elbo < found.log_evidence


def test_errors_are_as_large_as_they_say():
    runs = [importance(normal(0.7, 2000, seed)) for seed in range(300)]
    for value, error, truth in (("log_evidence", "log_evidence_error", 0.0), ("elbo", "elbo_error", -0.245)):
        scores = np.array([(getattr(run, value) - truth) / getattr(run, error) for run in runs])
        assert abs(scores.mean()) < 0.25 and 0.85 < scores.std() < 1.15
    spread = np.std([run.iw_elbo for run in runs])
    assert np.mean([run.iw_elbo_error for run in runs]) == pytest.approx(spread, rel=0.15)


def test_iw_elbo_is_the_expected_log_mean_whatever_the_order():
    many = normal(1.0, 2_000_000, 1).reshape(-1, 5)
    expected = float((many.logsumexp(1) - math.log(5)).mean())
    log_weights = normal(1.0, 100_000).sort().values
    found = importance(log_weights, iw_samples=5)
    assert found.iw_elbo == pytest.approx(expected, abs=5 * found.iw_elbo_error)
    assert importance(log_weights, iw_samples=1).iw_elbo == pytest.approx(found.elbo)


def test_ess_of_float32_weights_that_are_far_from_zero():
    log_weights = normal(0.01, 1000) - 5000
    assert importance(log_weights.float().double()).ess == importance(log_weights.float()).ess > 0.99


# Resampling


def test_systematic_resampling_returns_each_draw_its_share():
    log_weights = normal(1.0, 500)
    share = 2000 * log_weights.softmax(0)
    counts = resample(torch.arange(500), log_weights, 2000, smoothed=False).bincount(minlength=500)
    assert ((counts - share).abs() < 1 + 1e-9).all()
    smooth = 2000 * pareto_smoothed(log_weights).log_weights.exp()
    counts = resample(torch.arange(500), log_weights, 2000).bincount(minlength=500)
    assert ((counts - smooth).abs() < 1 + 1e-9).all()


def test_resampling_is_fair_and_in_random_order():
    log_weights = normal(1.0, 40)
    drawn = torch.stack([resample(torch.arange(40), log_weights, 7, smoothed=False) for _ in range(4000)])
    expected = log_weights.softmax(0).double()
    error = (expected * (1 - expected) / 4000).sqrt()
    for column in (drawn[:, 0], drawn[:, -1]):
        found = column.bincount(minlength=40) / 4000
        assert ((found - expected).abs() < 5 * error + 1e-3).all()


def test_resampling_corrects_the_guide():
    z = 1.5 * torch.randn(20_000, dtype=torch.float64)
    log_weights = -0.5 * (z - 0.5) ** 2 + 0.5 * (z / 1.5) ** 2
    found = resample({"z": z, "twice": torch.stack([z, 2 * z], -1)}, log_weights, 5000)
    assert float(found["z"].mean()) == pytest.approx(0.5, abs=0.05) and float(found["z"].std()) == pytest.approx(
        1, abs=0.04
    )
    torch.testing.assert_close(found["twice"], torch.stack([found["z"], 2 * found["z"]], -1), rtol=0, atol=0)


def test_resampling_by_a_generator():
    log_weights, state = normal(1.0, 100), torch.get_rng_state()
    a, b, c = (resample(torch.arange(100), log_weights, 30, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_of_zero_never_come_back():
    log_weights = torch.full((1000,), -math.inf)
    log_weights[500] = 0.0
    for seed in range(20):
        drawn = resample(torch.arange(1000), log_weights, 10_000, seeded(seed))
        assert (drawn == 500).all()
