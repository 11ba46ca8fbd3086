"""Many Markov chains at once: the law that moves keep, failures, step sizes, the flow's base."""

import math

import pytest
import torch
from cases import generator

import pyro_flows as pf
from pyro_flows.infer.chains import BaseDensity, adapt, hmc, start_chains
from pyro_flows.infer.models.recorded import value_and_slope
from pyro_flows.infer.search.climb import SafeDensity


def skewed(z):
    """A Gumbel density by a wide normal, both in closed form."""
    return -z[..., 0] - (-z[..., 0]).exp() - 0.5 * (z[..., 1] / 3.0) ** 2


def pulled(z):
    return value_and_slope(skewed, z)


def exact(count):
    u = torch.rand(count, generator=generator(1), dtype=torch.float64)
    return torch.stack([-(-u.log()).log(), 3 * torch.randn(count, generator=generator(2), dtype=torch.float64)], 1)


@pytest.mark.parametrize("scale", [None, torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [0.4, 2.0]])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moves_keep_the_law(scale, dtype):
    chains = start_chains(pulled, exact(4000).to(dtype))
    sizes = torch.linspace(0.3, 1.2, 4000)  # one for each chain, large enough that many proposals are refused
    noise, refused = generator(), 0.0
    for _ in range(10):
        move = hmc(pulled, chains, sizes, 3, scale=None if scale is None else scale.to(dtype), generator=noise)
        chains, refused = move.chains, refused + float((~move.taken).double().mean()) / 10
    assert chains.points.dtype == dtype and refused > 0.02
    expected = torch.tensor([0.5772156649, 0.0]), torch.tensor([math.pi / math.sqrt(6), 3.0])
    torch.testing.assert_close(chains.points.mean(0).double(), expected[0].double(), atol=0.15, rtol=0)
    torch.testing.assert_close(chains.points.std(0).double(), expected[1].double(), atol=0.0, rtol=0.05)
    torch.testing.assert_close(chains.values, pulled(chains.points)[0])
    torch.testing.assert_close(chains.slopes, pulled(chains.points)[1])


def test_moves_repeat_with_their_generator_and_leave_the_global_one():
    chains, before = start_chains(pulled, exact(5)), torch.get_rng_state()
    one, two = (hmc(pulled, chains, 0.5, 2, generator=generator()).chains.points for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, chains.points)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_points_without_a_density_are_refused(bad):
    def half(z):
        value, slope = value_and_slope(lambda z: -0.5 * z.square().sum(-1), z)
        return torch.where(z[:, 0] > 0, value, bad), slope

    points = torch.randn(500, 2, generator=generator(), dtype=torch.float64).abs()
    chains, noise, failed = start_chains(half, points), generator(), 0
    for _ in range(20):
        move = hmc(half, chains, 0.7, 3, generator=noise)
        chains, failed = move.chains, failed + int(move.diverged.sum())
        assert not (move.taken & move.diverged).any() and (move.chance[move.diverged] == 0).all()
    assert failed and (chains.points[:, 0] > 0).all() and chains.values.isfinite().all()
    torch.testing.assert_close(
        chains.points[:, 0].mean(), torch.tensor(math.sqrt(2 / math.pi)).double(), atol=0.1, rtol=0
    )


def test_steps_that_are_far_too_long_diverge_and_adapt():
    chains, size, noise = start_chains(pulled, exact(200)), torch.tensor(50.0), generator()
    assert hmc(pulled, chains, size, 5, generator=noise).diverged.any()
    for _ in range(60):
        move = hmc(pulled, chains, size, 5, generator=noise)
        chains, size = move.chains, adapt(size, move.chance)
    assert 0.2 < float(size) < 2 and 0.6 < float(move.chance.mean()) < 0.95
    each = adapt(torch.ones(200), move.chance, together=False)
    assert each.shape == (200,) and torch.equal(each > 1, move.chance > 0.8)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_base_density_has_the_gradient_of_autograd(safe, dtype):
    torch.manual_seed(0)
    flow = pf.Flow(pf.iaf(2, hidden_dims=(8,))).to(dtype)
    for parameter in flow.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    u = torch.randn(6, 2, dtype=dtype)
    target = BaseDensity(flow, SafeDensity(skewed, u) if safe else skewed)
    value, slope = target(u)
    u.requires_grad_()
    z, ladj = flow.chain.forward_and_ladj(u)
    expected = skewed(z) + ladj
    torch.testing.assert_close(value, expected.to(value))
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), u)[0])
    weights = target.log_weights(u.detach(), value)
    torch.testing.assert_close(weights, (skewed(z) - flow.log_prob(z)).detach().to(weights), atol=1e-4, rtol=1e-4)
