"""Draws that walk on: they find what the guide leaves out, and nothing where it leaves out nothing."""

import math
from types import SimpleNamespace

import pytest
import torch

import pyro_flows as pf
from pyro_flows.infer.chains import BaseDensity
from pyro_flows.infer.diagnostics import Walk, importance, judge, walk_draws

pytestmark = pytest.mark.usefixtures("double")
N = 4000


def normal(z):
    return -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)


def walked(density, width=1.0, dim=3, **options):
    """A walk of the draws of a normal guide of this width."""
    torch.manual_seed(0)
    guide = pf.Flow(pf.transforms.Preconditioner(torch.zeros(dim), torch.full((dim,), width).diag()))
    u = guide.base().sample((N,))
    with torch.no_grad():
        z, ladj = guide.chain.forward_and_ladj(u)
        log_weights = density(z) + ladj - guide.base().log_prob(u)
    options = {"num_walkers": 256, "num_moves": 15, "generator": torch.Generator().manual_seed(0)} | options
    return walk_draws(BaseDensity(guide, density), u, log_weights, **options), log_weights


@pytest.mark.parametrize("width", [1.0, 1.2])
def test_a_guide_that_leaves_nothing_out(width):
    found, _ = walked(normal, width)
    assert found.above <= 0.003 and found.shift == 0 and found.num_moves == 15 and 0.6 < found.accepted <= 1


def test_a_curve_whose_ends_are_cut_off():
    """Of a banana, a normal guide draws the middle; resampling cannot bring back its ends."""

    def banana(z):
        return normal(torch.stack([z[:, 0], (z[:, 1] - z[:, 0].square()) / 0.3], 1)) - math.log(0.3)

    found, log_weights = walked(banana, 0.6, dim=2, num_walkers=512, num_moves=30)
    assert found.above > 0.02
    assert (found.log_weights > log_weights.max() + 0.1).double().mean() == found.above


def test_a_part_that_is_left_out_at_equal_weights():
    """Draws above 1 of a normal are missing: no weight there is above the others', but means move."""
    torch.manual_seed(0)
    guide = pf.Flow(pf.transforms.Preconditioner(torch.zeros(2), torch.eye(2)))
    u = guide.base().sample((N,))
    u = u[u[:, 0] < 1]
    options = {"num_walkers": 256, "num_moves": 15, "generator": torch.Generator().manual_seed(0)}
    found = walk_draws(BaseDensity(guide, normal), u, torch.zeros(len(u)), **options)
    # Percentiles below 1 have the mean 0.42 and the standard deviation 0.24, where all have 0.5.
    assert found.above == 0 and abs(found.shift - 0.33) < 0.1
    verdict = judge(importance(torch.zeros(len(u))), walk=found)
    assert verdict.label == "bad" and "moved a mean by 0.3" in verdict.text and "left out" in verdict.text


def test_failures_and_time():
    def half(z):
        if (z[:, 0] < -2.5).any():
            raise ValueError("no density")
        return normal(z)

    torch.manual_seed(0)
    guide = pf.Flow(pf.transforms.Preconditioner(torch.zeros(2), torch.eye(2)))
    u = guide.base().sample((500,))
    u = u[u[:, 0] > -2.5]
    options = {"num_walkers": 100, "generator": torch.Generator().manual_seed(0)}
    found = walk_draws(BaseDensity(guide, half), u, torch.zeros(len(u)), num_moves=5, **options)
    assert found.num_moves == 5 and found.log_weights.isfinite().all() and found.above <= 0.01
    hurried = walk_draws(BaseDensity(guide, half), u, torch.zeros(len(u)), seconds=1e-9, **options)
    assert hurried.num_moves == 0 and len(hurried.log_weights) == 100


def strayed(above, moves=30):
    return Walk(torch.zeros(500), above, 0.0, 0.9, moves, 1000)


@pytest.mark.parametrize(
    ("spread", "above", "label"),
    [
        (0.0, 0.0, "good"),
        (0.0, 0.002, "good"),
        (0.0, 0.01, "bad"),
        (0.5, 0.0, "use importance resampling"),
        (0.5, 0.01, "bad"),
    ],
)
def test_what_the_verdict_makes_of_it(spread, above, label):
    torch.manual_seed(0)
    weights = importance(spread * torch.randn(10_000))
    found = judge(weights, walk=strayed(above))
    assert found.label == label
    assert ("left out" in found.text) == (above > 0.003)
    if label == "use importance resampling":
        short = judge(weights, walk=strayed(above, moves=7))
        assert short.label == label and "fit.refine(seconds=...) shows" in short.text
        assert "fit.refine" not in found.text
    if label == "bad":
        assert "fit.refine(seconds=...)" in found.text and "at least" in found.text  # the evidence is a bound
    assert judge(weights, walk=strayed(above, moves=1)).label == judge(weights).label


def test_evidences_are_bounds_where_weights_leave_something_out():
    heavy = importance(3 * torch.randn(10_000, generator=torch.Generator().manual_seed(0)))
    assert not heavy.trusted and f"at least {heavy.log_evidence_bound:.3f} nats" in judge(heavy).text
    even = importance(0.1 * torch.randn(10_000, generator=torch.Generator().manual_seed(0)))
    assert f"{even.log_evidence:.3f} ± {even.log_evidence_error:.3f} nats." in judge(even).text
    missing = SimpleNamespace(
        missing_share=0.4, missed=torch.tensor([True]), locations=torch.zeros(1, 2), share=torch.tensor([0.4])
    )
    assert "at least" in judge(even, missing).text


def test_the_bound_holds_however_uneven_the_weights():
    noise = 3 * torch.randn(400, 100, generator=torch.Generator().manual_seed(0)) - 4.5  # mean weight 1
    below = [importance(row).log_evidence_bound < 0 for row in noise]
    assert sum(below) >= 0.95 * len(below)
