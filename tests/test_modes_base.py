"""The mixture base of a guide that covers several modes."""

import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pyro_flows import fit_guide, load_guide
from pyro_flows.infer import AutoFlow
from pyro_flows.infer.guides.assessment import weigh
from pyro_flows.infer.guides.cover import add_modes
from pyro_flows.infer.guides.modes import ModesBase


def placed(dim=2, dtype=torch.float64):
    loc = torch.tensor([[-3.0, 0.0], [2.0, 1.0]], dtype=dtype)
    scale = torch.tensor([[[0.5, 0.0], [0.2, 1.0]], [[1.0, 0.0], [-0.3, 0.4]]], dtype=dtype)
    return ModesBase(dim, 2).to(dtype).place(loc, scale, torch.tensor([0.3, 0.7], dtype=dtype))


def modes(x):
    """Six tenths of a normal at 0, and four of a narrower one, far away."""
    wide = dist.Normal(torch.zeros(3), 1.0).to_event(1).log_prob(x) + math.log(0.6)
    loc = torch.tensor([9.0, 3.0, 0.0])
    return torch.logaddexp(wide, dist.Normal(loc, 0.3).to_event(1).log_prob(x) + math.log(0.4))


def model():
    x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (3,)))
    pyro.factor("density", modes(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_density_and_draws_are_those_of_the_mixture(dtype):
    base = placed(dtype=dtype)
    draws = base().rsample((40_000,))
    assert draws.dtype == dtype and draws.shape == (40_000, 2) and base().rsample().shape == (2,)
    parts = dist.MultivariateNormal(base.loc, scale_tril=base.scale)
    by_hand = (parts.log_prob(draws[:50, None]) + torch.tensor([0.3, 0.7], dtype=dtype).log()).logsumexp(-1)
    torch.testing.assert_close(base().log_prob(draws[:50]), by_hand)
    covariance = base.scale @ base.scale.mT
    mean = 0.3 * base.loc[0] + 0.7 * base.loc[1]
    away = base.loc - mean
    known = 0.3 * (covariance[0] + torch.outer(away[0], away[0])) + 0.7 * (
        covariance[1] + torch.outer(away[1], away[1])
    )
    torch.testing.assert_close(draws.mean(0), mean.detach(), atol=0.05, rtol=0)
    torch.testing.assert_close(draws.mT.cov(), known.detach(), atol=0.1, rtol=0)
    assert not draws.requires_grad  # weights learn through densities alone
    (slope,) = torch.autograd.grad(base().log_prob(draws[:50]).sum(), base.logits)
    assert slope.abs().max() > 0 and slope.sum().abs() < 1e-3


def test_a_wider_base_is_wider_around_each_mode():
    flow = SimpleNamespace(base=placed(), chain=SimpleNamespace(forward_and_ladj=lambda x: (x, x.new_zeros(len(x)))))
    _, draws, log_p, log_q = weigh(flow, lambda z: z.new_zeros(len(z)), 4000, scale=3.0)
    narrow = dist.MultivariateNormal(placed().loc, scale_tril=3 * placed().scale)
    known = (narrow.log_prob(draws[:, None]) + torch.tensor([0.3, 0.7]).log()).logsumexp(-1)
    torch.testing.assert_close(log_q, known)
    assert not log_p.any()


@pytest.mark.full
def test_a_fit_of_far_modes_is_right_saved_and_continued(tmp_path):
    fit = fit_guide(AutoFlow(model, seed=0), steps=150, progress=False)
    base = fit.guide.flow.base
    assert isinstance(base, ModesBase) and len(base.logits) == 2 and "covers 2 modes" in fit.notes[0]
    assert fit.verdict.ok and fit.ess > 0.95 and fit.log_evidence == pytest.approx(0.0, abs=0.02)
    far = float((fit.sample(20_000)["x"][:, 0] > 5).double().mean())
    assert far == pytest.approx(0.4, abs=0.03)
    fit.save(tmp_path / "fit")
    again = load_guide(tmp_path / "fit")
    points = fit.sample(5)["x"]
    torch.testing.assert_close(again.flow.log_prob(points), fit.guide.flow.log_prob(points))
    state = fit.guide.state_dict()
    other = AutoFlow(model, seed=1, start="prior").setup()
    other.load_state_dict(state)
    torch.testing.assert_close(other.flow.log_prob(points), fit.guide.flow.log_prob(points))
    plain = AutoFlow(model, seed=1, start="prior").setup()
    fit.guide.load_state_dict(plain.state_dict())  # and back to one normal
    assert not isinstance(fit.guide.flow.base, ModesBase)
    pyro.clear_param_store()
    svi = SVI(model, other, Adam({"lr": 1e-4}), Trace_ELBO())
    losses = torch.tensor([svi.step() for _ in range(20)])
    assert losses.mean().abs() < 0.3


def test_modes_are_added_to_a_bent_guide():
    """The old part stays, and the new one is near its Gaussian, however the flow bends space there."""
    guide = AutoFlow(model, seed=0, start="prior").setup()
    guide.preconditioner.place(torch.zeros(3), 3 * torch.eye(3))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in guide.flow.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter))
    old = guide.flow.log_prob(points := guide.flow.sample((200,)))
    place, scale = torch.tensor([[9.0, 3.0, 0.0]]).to(points), 0.3 * torch.eye(3).to(points)[None]
    share = torch.tensor([0.4]).to(points)
    probe = SimpleNamespace(locations=place, scale=scale, share=share, missed=torch.tensor([True]))
    assert add_modes(guide, probe) == 1
    torch.testing.assert_close(guide.flow.log_prob(points), old + math.log(0.6), atol=1e-3, rtol=1e-3)
    near = place + 0.3 * torch.randn(500, 3, generator=torch.Generator().manual_seed(1)).to(points)
    wanted = dist.MultivariateNormal(place[0], scale_tril=scale[0]).log_prob(near) + math.log(0.4)
    assert (guide.flow.log_prob(near) - wanted).abs().mean() < 0.1
    probe.missed = torch.tensor([False])
    assert add_modes(guide, probe) == 0
