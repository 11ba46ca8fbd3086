"""``fit_density``: what it recovers, in which units, in place, reproducibly, and what it says when numbers blow up."""

import copy
import math
import pickle
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import full_but, seeded
from torch import nn
from torch.distributions import AffineTransform, ExpTransform, biject_to, constraints
from torch.utils.data import DataLoader, TensorDataset

import pyro_flows as pf
from pyro_flows.infer import DensityFit, StandardizedFlow, standardized
from pyro_flows.infer.density.settings import CUTS, LEAST, Schedule

SMALL = {"num_layers": 1, "hidden_dims": (8,)}
GAUSSIAN = dist.MultivariateNormal(torch.tensor([10.0, -100.0]), scale_tril=torch.tensor([[2.0, 0.0], [30.0, 15.0]]))


def fit(flow, data, *args, **options):
    return pf.fit_density(flow, data, *args, **{"progress": False, "max_epochs": 2, **options})


def cloud(rows, seed=1):
    """Points around a parabola, far from standardised."""
    noise = torch.randn(2, rows, generator=seeded(seed))
    return torch.stack([100 + 5 * noise[0] ** 2 + noise[1], 3 * noise[0]], -1)


class Bernoulli(nn.Module):
    """Two dependent bits; a density that is no flow."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(()))
        self.second = nn.Linear(1, 1)
        self.seen = []

    def log_prob(self, value):
        self.seen.append(value.dtype)
        value = value.to(self.first.dtype)
        logits = torch.stack([self.first.expand(len(value)), self.second(value[:, :1])[:, 0]], -1)
        return torch.distributions.Bernoulli(logits=logits).log_prob(value).sum(-1)


class Linear(nn.Module):
    """A regression: density of a value at a context, with dropout that draws from the global generator."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1))

    def log_prob(self, value, context):
        return dist.Normal(self.net(context), 1.0).log_prob(value).sum(-1)


# What is recovered


def test_gaussian_is_recovered():
    with pyro.validation_enabled(False):
        data, test = (GAUSSIAN.sample((rows,)) for rows in (2000, 4000))
    flow = pf.Flow(pf.maf(2, **SMALL))
    found = fit(flow, data, max_epochs=15, lr=1e-2)
    exact = GAUSSIAN.log_prob(test)
    got = found.distribution.log_prob(test)
    assert -0.02 < (exact - got).mean() < 0.03
    assert isinstance(found, DensityFit) and found.flow is flow
    assert isinstance(found.distribution(), pf.distributions.FlowDistribution)
    draws = found.distribution.sample((4000,))
    torch.testing.assert_close(draws.mean(0), GAUSSIAN.mean, atol=1.5, rtol=0)
    torch.testing.assert_close(draws.std(0), GAUSSIAN.stddev, atol=0, rtol=0.08)


def test_conditional_density_in_its_own_units():
    context = 1000 + 50 * torch.randn(3000, 1)
    data = torch.cat([0.1 * context, -0.2 * context], -1) + torch.randn(3000, 2) * torch.tensor([2.0, 3.0])
    flow = pf.Flow(pf.maf(2, context_dim=1, **SMALL))
    found = fit(flow, data[:2500], context=context[:2500], max_epochs=20, lr=1e-2)
    assert isinstance(found.distribution, StandardizedFlow)
    exact = dist.Normal(torch.cat([0.1 * context, -0.2 * context], -1), torch.tensor([2.0, 3.0])).to_event(1)
    gap = (exact.log_prob(data) - found.distribution(context).log_prob(data))[2500:].mean()
    assert -0.05 < gap < 0.08
    for made in (found.distribution.condition(context[:5]), found.distribution(context[:5])):
        assert made.batch_shape == (5,) and made.sample((4,)).shape == (4, 5, 2)
    torch.testing.assert_close(found.log_prob(data, context), found.distribution.log_prob(data, context).detach().cpu())


@pytest.mark.parametrize("standardize", [None, False])
def test_constrained_data_have_the_right_support_and_mass(standardize):
    data = torch.randn(1500, 1).mul(0.6).add(1.0).exp()
    chain = pf.Chain([*pf.maf(1, **SMALL), ExpTransform()])
    found = fit(chain, data, max_epochs=10, lr=1e-2, standardize=standardize)
    assert found.distribution().support.base_constraint is constraints.positive
    grid = torch.linspace(1e-4, 60.0, 200_001, dtype=torch.float64)
    density = found.distribution.double().log_prob(grid.unsqueeze(-1)).exp().detach()
    assert abs(torch.trapezoid(density, grid) - 1) < 1e-3
    exact = dist.LogNormal(1.0, 0.6).log_prob(grid[1:]).exp()
    assert torch.trapezoid((density[1:] - exact).abs(), grid[1:]) < 0.15
    assert (found.distribution.sample((100,)) > 0).all()
    if standardize is None:
        kinds = [type(part).__name__ for part in found.distribution.chain]
        assert kinds == ["Autoregressive", "Standardization", "Wrap"]  # one number has no correlation
        torch.testing.assert_close(found.distribution.chain[1].loc.item(), 1.0, atol=0.1, rtol=0)
    else:
        assert found.distribution is found.flow


def test_simplex():
    data = dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])).sample((1500,))
    chain = pf.Chain([pf.Chain([*pf.maf(2, **SMALL)]), biject_to(constraints.simplex)])
    found = fit(chain, data, max_epochs=15, lr=1e-2)
    assert found.distribution().support is constraints.simplex
    test = dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])).sample((2000,))
    gap = (dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])).log_prob(test) - found.distribution.log_prob(test)).mean()
    # The transform's volume is that of the first two coordinates, as Dirichlet's density is.
    assert abs(gap) < 0.1


def test_data_end_in_units_of_its_own_is_pulled_back():
    data = cloud(400)
    own = AffineTransform(data.mean(0), data.std(0), event_dim=1)
    found = fit(pf.Chain([*pf.maf(2, **SMALL), own]), data)
    standardization = found.distribution.chain[-2]
    assert isinstance(standardization, pf.Standardization)
    torch.testing.assert_close(standardization.loc, torch.zeros(2), atol=0.2, rtol=0)
    torch.testing.assert_close(standardization.scale, torch.ones(2), atol=0.2, rtol=0)


class Turn(pf.FlowTransform):
    """A rotation by learnt angles where dimensions are angles, a shift elsewhere."""

    def __init__(self, angles, constraint=constraints.real):
        super().__init__(len(angles))
        self.shift = nn.Parameter(torch.zeros(len(angles)))
        self.periodic, self.constraint = torch.tensor(angles) if any(angles) else None, constraint

    periodic = None

    @constraints.dependent_property(is_discrete=False)
    def domain(self):
        return constraints.independent(self.constraint, 1)

    codomain = domain

    def forward_and_ladj(self, x, context=None):
        y = x + self.shift
        turned = torch.remainder(y + math.pi, 2 * math.pi) - math.pi
        return y if self.periodic is None else torch.where(self.periodic, turned, y), x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y, context=None):
        x = y - self.shift
        turned = torch.remainder(x + math.pi, 2 * math.pi) - math.pi
        return x if self.periodic is None else torch.where(self.periodic, turned, x), y.new_zeros(y.shape[:-1])


def test_mixed_angles_are_left_alone():
    chain = [Turn([False, False, True])]
    data = 10 + 5 * torch.randn(300, 3)
    found = fit(pf.Chain([*chain, pf.Permutation(3, [2, 0, 1])]), data)
    standardization = found.distribution.chain[-2]
    # Behind the permutation the third dimension is the data's first one.
    want = data.mean(0)[[1, 2, 0]]
    assert standardization.loc[2] == 0 and standardization.scale[2] == 1
    torch.testing.assert_close(standardization.loc[:2], want[:2], atol=1.0, rtol=0)
    found = fit(chain[0], data)
    assert found.distribution.chain[1].loc[2] == 0 and (found.distribution.chain[1].loc[:2] > 5).all()
    last = pf.Coupling(3, mask=[True, False, False], periodic=[True, False, False])
    found = fit(pf.Chain([*chain, pf.Permutation(3, [2, 0, 1]), last]), data)
    assert found.distribution.chain[3].loc[0] == 0 and (found.distribution.chain[3].loc[1:] > 5).all()
    # So they are where the part that takes them for angles says that its values are bounded.
    found = fit(Turn([False, False, True], constraints.interval(-100.0, 100.0)), data)
    assert found.distribution.chain[1].loc[2] == 0 and (found.distribution.chain[1].loc[:2] > 5).all()
    chain = Turn([True] * 3)
    found = fit(chain, data)
    assert found.distribution is found.flow
    refuses(ValueError, "standardize=True, but", fit, chain, data, standardize=True)


def test_flows_on_a_circle_and_bounded_bases_are_not_standardised():
    base = dist.VonMises(torch.zeros(2), torch.ones(2)).to_event(1)
    data = dist.VonMises(torch.tensor([0.5, -0.5]), torch.ones(2)).sample((400,))
    flow = pf.Flow(Turn([False, False], constraints.interval(-4, 4)), base)
    found = fit(flow, data, max_epochs=10, lr=0.05)
    assert found.distribution is flow
    torch.testing.assert_close(flow.chain.shift, torch.tensor([0.5, -0.5]), atol=0.25, rtol=0)
    refuses(ValueError, "standardize=True, but", fit, flow, data, standardize=True)
    bounded = pf.Flow(pf.maf(2, **SMALL), dist.Uniform(-torch.ones(2), torch.ones(2)).to_event(1))
    assert fit(bounded, data.clamp(-3, 3) / 4).distribution is bounded


def test_module_with_log_prob():
    data = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 1], [1, 0]]).repeat(100, 1)
    module = Bernoulli()
    found = fit(module, data, max_epochs=30, lr=0.1, validation_fraction=0)
    assert found.flow is found.distribution is module
    assert set(module.seen) == {torch.int64}
    want = [0.2, 0.2, 0.2, 0.4]
    got = found.log_prob([[0, 0], [0, 1], [1, 0], [1, 1]]).exp()
    torch.testing.assert_close(got, torch.tensor(want, device="cpu"), atol=0.03, rtol=0)


def test_module_standardised_if_asked():
    torch.manual_seed(3)
    context = 100 + 10 * torch.randn(500, 1)
    data = 5 * context + torch.randn(500, 1)
    module = Linear()
    assert fit(module, data, context=context).distribution is module
    found = fit(module, data, context=context, standardize=True, max_epochs=3)
    assert found.distribution.module is module
    inner = (
        (data - found.distribution.loc) / found.distribution.scale,
        (context - found.distribution.context_loc) / found.distribution.context_scale,
    )
    want = module.log_prob(*inner) - found.distribution.scale.log().sum()
    torch.testing.assert_close(found.distribution.log_prob(data, context), want)
    torch.testing.assert_close(found.validation, found.history["validation"][found.best_epoch - 1])


# Units, scores, history


def test_scores_are_those_of_the_data():
    data, held_out = cloud(600), cloud(300, seed=2)
    found = fit(pf.maf(2, **SMALL), data, held_out, max_epochs=4)
    scores = found.distribution.log_prob(held_out)
    assert abs(found.validation - scores.mean().item()) < 1e-5
    torch.testing.assert_close(found.log_prob(held_out), scores.detach().cpu())
    assert max(found.history["validation"]) == found.validation
    assert found.history["validation"][found.best_epoch - 1] == found.validation
    standardization = found.distribution.chain[-1]
    z = (held_out - standardization.loc) / standardization.scale
    torch.testing.assert_close(found.flow.log_prob(z) - standardization.scale.log().sum(), scores)
    torch.testing.assert_close(standardization.loc, data.mean(0))
    torch.testing.assert_close(standardization.scale, data.std(0))


def test_history_has_one_entry_an_epoch():
    found = fit(pf.maf(2, **SMALL), cloud(300), max_epochs=3, batch_size=100)
    assert {name: len(column) for name, column in found.history.items()} == dict.fromkeys(
        ("epoch", "step", "train", "validation", "lr", "seconds"), 3
    )
    assert found.history["epoch"] == [1, 2, 3] and found.history["step"] == [3, 6, 9]
    assert found.history["seconds"] == sorted(found.history["seconds"])
    assert found.stopped == "max_epochs" and "stopped by max_epochs, 9 steps" in repr(found)
    without = fit(pf.maf(2, **SMALL), cloud(300), validation_fraction=0)
    assert all(map(math.isnan, [*without.history["validation"], without.validation])) and "train" in repr(without)
    assert without.history["train"][without.best_epoch - 1] == max(without.history["train"])


def test_limits():
    data = cloud(1000)
    assert fit(pf.maf(2, **SMALL), data, max_epochs=None, steps=5, batch_size=300).history["step"] == [3, 5]
    found = fit(pf.maf(2, **SMALL), data, max_epochs=100, seconds=1e-9, batch_size=300)
    assert found.stopped == "seconds" and found.history["step"] == [1]
    assert fit(pf.maf(2, **SMALL), data, max_epochs=None, steps=5).stopped == "steps"


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_early_stopping_restores_the_best_state(average):
    data, held_out = cloud(60), cloud(200, seed=2)
    flow = pf.Flow(pf.maf(2, num_layers=2, hidden_dims=(32,)))
    options = {"max_epochs": 200, "patience": 4, "lr": 0.03, "average": average}
    found = fit(flow, data, held_out, schedule="constant", **options)
    assert found.stopped == "patience"
    assert found.best_epoch < found.history["epoch"][-1]
    assert abs(found.distribution.log_prob(held_out).mean().item() - max(found.history["validation"])) < 1e-4
    assert found.history["validation"][-1] < found.validation


def test_buffers_are_restored_too():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(()))
            self.register_buffer("passes", torch.zeros(()))

        def log_prob(self, value):
            if self.training:
                self.passes += 1
            return -((value[:, 0] - self.loc) ** 2)

    module = Counts()
    found = fit(module, torch.randn(50, 1), torch.zeros(20, 1), batch_size=50, lr=0.5, max_epochs=9)
    assert module.passes == found.best_epoch


def test_plateau_schedule():
    schedule = Schedule("plateau", patience=2)
    assert [schedule.judge(score) for score in (0.0, 1.0, 1.0, 0.5)] == ["go", "go", "go", "back"]
    assert schedule.factor(0.9) == pytest.approx(0.3)
    # Gains too small to count one by one add up.
    assert [schedule.judge(1 + 0.0006 * k) for k in (1, 2)] == ["go", "go"] and schedule.idle == 0
    verdicts = [schedule.judge(0.0) for _ in range(2 * (CUTS + 1))]
    assert verdicts == ["go", "back"] * CUTS + ["go", "stop"]
    # Nor does it go on for ever where each cut helps a little.
    schedule, score, verdict = Schedule("plateau", patience=1), 0.0, "go"
    for _ in range(100):
        score += 1.0
        schedule.judge(score)
        verdict = schedule.judge(score)
        if verdict == "stop":
            break
    assert verdict == "stop" and schedule.scale >= LEAST
    assert [Schedule("plateau", patience=1).judge(math.nan) for _ in range(2)] == ["back", "back"]


class Walks(nn.Module):
    """Its parameter goes up by the learning rate in each step; what it is worth is a list, or best at 2."""

    def __init__(self, worth=None):
        super().__init__()
        self.place = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.worth, self.been = worth, []

    def log_prob(self, value):
        if self.training:
            return self.place.expand(len(value))
        self.been.append(self.place.item())
        worth = -((self.place - 2) ** 2).detach() if self.worth is None else torch.tensor(self.worth.pop(0))
        return worth.expand(len(value))


def walk(module, **options):
    options = {"optimizer": partial(torch.optim.SGD, lr=1.0), "patience": 1, "batch_size": 9, "average": 0, **options}
    return fit(module, torch.zeros(9, 1), torch.zeros(1, 1), max_epochs=20, **options)


def test_plateau_goes_back_to_the_best_state():
    module = Walks()
    found = walk(module)
    assert module.been == pytest.approx([0.0, 1.0, 2.0, 3.0, 2.3, 2.09]) and module.place == 2
    assert found.history["lr"] == pytest.approx([1.0, 1.0, 1.0, 0.3, 0.09])
    assert (found.best_epoch, found.validation, found.stopped) == (2, 0.0, "patience")


def test_plateau_sets_the_average_back_too():
    module = Walks()
    walk(module, average=0.5)
    want, schedule, place, mean, best, verdict = [0.0], Schedule("plateau", patience=1), 0.0, 0.0, 0.0, "go"
    schedule.judge(-4.0)  # the start
    while verdict != "stop":
        place += schedule.factor(0.0)
        decay = min(0.5, (len(want) - 1) / (len(want) + 9))
        mean = decay * mean + (1 - decay) * place
        want.append(mean)
        best = mean if -((mean - 2) ** 2) > -((best - 2) ** 2) else best
        verdict = schedule.judge(-((mean - 2) ** 2))
        if verdict == "back":
            place = mean = best
    assert module.been == pytest.approx(want) and module.place.item() == pytest.approx(best)


def test_scores_that_are_not_finite_are_not_the_best():
    found = walk(Walks([-2.0, -1.0, math.inf, -0.5, math.nan, -0.7, -0.8, -0.9]), schedule="constant", patience=3)
    assert (found.best_epoch, found.validation) == (3, -0.5) and found.flow.place == 3
    assert found.history["epoch"][-1] == 6


def test_gradient_is_clipped():
    module = Walks()
    walk(module, clip_norm=0.25)
    assert module.been[1] == pytest.approx(0.25, rel=1e-4)
    module = Walks()
    walk(module, clip_norm=None)
    assert module.been[1] == 1


def test_schedules_in_the_loop():
    data = cloud(400)
    rates = fit(pf.maf(2, **SMALL), data, schedule="cosine", max_epochs=8, lr=0.01).history["lr"]
    assert rates == sorted(rates, reverse=True) and rates[0] < 0.01 and 1e-4 <= rates[-1] < 1e-3
    assert set(fit(pf.maf(2, **SMALL), data, schedule="constant", max_epochs=3).history["lr"]) == {3e-3}
    found = fit(pf.maf(2, **SMALL), data, cloud(50), schedule="plateau", patience=1, lr=0.3, max_epochs=60)
    rates = found.history["lr"]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.3 * 0.31 and found.stopped == "patience"


@pytest.mark.full
def test_average_smooths():
    torch.manual_seed(0)
    data = cloud(400)
    flow = pf.maf(2, **SMALL)
    noisy, smooth = (
        fit(copy.deepcopy(flow), data, lr=0.1, max_epochs=16, batch_size=10, schedule="constant", average=average)
        for average in (0.0, 0.98)
    )
    swing = [torch.tensor(f.history["validation"][4:]).diff().abs().mean() for f in (noisy, smooth)]
    assert swing[1] < 0.5 * swing[0]


# In place


def test_flow_is_trained_in_place():
    flow = pf.Flow(pf.realnvp(2, num_layers=2, hidden_dims=(8,)), pf.DiagonalNormal(2, learnable=True))
    before = dict(flow.named_parameters())
    names, values = list(flow.state_dict()), {name: p.detach().clone() for name, p in before.items()}
    text = repr(flow)
    found = fit(flow, cloud(300))
    assert found.flow is flow and repr(flow) == text and list(flow.state_dict()) == names
    assert all(p is before[name] for name, p in flow.named_parameters())
    assert any(not torch.equal(p, values[name]) for name, p in flow.named_parameters())
    assert all(p.grad is None for p in flow.parameters())
    assert {id(p) for p in found.distribution.parameters()} == {id(p) for p in flow.parameters()}
    assert not any(module.training for model in (flow, found.distribution) for module in model.modules())
    # A distribution at hand follows whatever is done to the flow.
    made, value = found.distribution, cloud(5)
    score = made.log_prob(value)
    with torch.no_grad():
        flow.base.loc.add_(1.0)
    assert not torch.allclose(found.distribution.log_prob(value), score)


def test_chain_gets_a_base_and_is_trained_itself():
    chain = pf.maf(2, **SMALL)
    found = fit(chain, cloud(300))
    assert isinstance(found.flow, pf.Flow) and found.flow.chain is chain


def test_frozen_parameters_stay_frozen():
    flow = pf.Flow(pf.maf(2, num_layers=2, hidden_dims=(8,)))
    flow.chain[0].requires_grad_(False)
    before = copy.deepcopy(flow.state_dict())
    fit(flow, cloud(300), weight_decay=0.1)
    for name, p in flow.named_parameters():
        assert p.requires_grad != name.startswith("chain.parts.0")
        assert torch.equal(p, before[name]) != p.requires_grad or not p.any()


@pytest.mark.parametrize("optimizer", ["instance", "factory"])
def test_own_optimizer(optimizer):
    flow = pf.Flow(pf.maf(2, **SMALL))
    made = []

    def make(parameters):
        made.append(torch.optim.SGD(parameters, lr=0.125))
        return made[-1]

    given = make(flow.parameters()) if optimizer == "instance" else make
    found = fit(flow, cloud(300), optimizer=given)
    assert len(made) == 1 and found.history["lr"] == [0.125, 0.125]
    assert fit(flow, cloud(300), optimizer=partial(torch.optim.SGD, lr=0.5)).history["lr"] == [0.5, 0.5]


def test_fit_is_continued_from_its_model():
    data = cloud(600)
    first = fit(pf.maf(2, **SMALL), data, max_epochs=5)
    second = fit(first.distribution, data, max_epochs=5, lr=1e-4)
    assert abs(second.history["train"][0] - first.history["train"][-1]) < 0.1
    context = torch.randn(600, 1) * 5 + 30
    first = fit(pf.maf(2, context_dim=1, **SMALL), data, context=context, max_epochs=5)
    second = fit(first.distribution, data, context=context, max_epochs=5, lr=1e-4)
    assert abs(second.history["train"][0] - first.history["train"][-1]) < 0.1
    # Contexts keep the scale that the flow has learnt with, whatever comes later.
    third = fit(first.distribution, data, context=10 + 2 * context)
    assert torch.equal(third.distribution.context_loc, first.distribution.context_loc)


@pytest.mark.parametrize("context_dim", [0, 1])
def test_model_is_saved_and_loaded(context_dim, tmp_path):
    data, context = cloud(300), torch.randn(300, 1) * 5 + 30 if context_dim else None
    found = fit(pf.maf(2, context_dim=context_dim, **SMALL), data, context=context)
    torch.save(found.distribution.state_dict(), tmp_path / "model.pt")
    loaded = standardized(pf.Flow(pf.maf(2, context_dim=context_dim, **SMALL)))
    loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    want = found.log_prob(data, context)
    torch.testing.assert_close(loaded.log_prob(data, context).cpu(), want)
    for again in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        torch.testing.assert_close(again.log_prob(data, context), want)


# Kinds of data


@pytest.mark.parametrize("other", [False, True], ids=["default", "not-default"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(dtype, other, default_dtype):
    flow = pf.Flow(pf.maf(2, context_dim=1, **SMALL)).to(dtype)
    data = {np.dtype(kind): np.random.default_rng(0).normal(size=(200, 2)).astype(kind) for kind in ("f4", "f8", ">f8")}
    context = torch.randn(200, 1, dtype=torch.float64)
    if other:
        default_dtype(torch.float64 if dtype == torch.float32 else torch.float32)
    for each in data.values():
        found = fit(flow, each, context=context, max_epochs=1)
        made = found.distribution(context[:3].to(dtype))
        assert made.sample().dtype == dtype and found.log_prob(each, context).dtype == dtype
        assert {
            p.dtype for p in (*found.distribution.parameters(), *found.distribution.buffers()) if p.is_floating_point()
        } == {dtype}


def test_far_from_zero_in_float64():
    data = 1e6 + 1e-3 * torch.randn(500, 2, dtype=torch.float64)
    flow = pf.Flow(pf.maf(2, **SMALL)).double()
    found = fit(flow, data, max_epochs=8)
    assert abs(found.validation - dist.Normal(0, 1e-3).entropy().mul(-2).item()) < 0.4


def test_numpy_lists_and_single_columns():
    data = cloud(300)
    flow = pf.maf(2, **SMALL)
    results = [fit(copy.deepcopy(flow), given).validation for given in (data, data.cpu().numpy(), data.tolist())]
    assert results[0] == results[1] == results[2]
    line, context = data[:, 0], data[:, 1]
    flow = pf.maf(1, context_dim=1, **SMALL)
    first = fit(copy.deepcopy(flow), line, context=context).validation
    assert first == fit(copy.deepcopy(flow), line.unsqueeze(-1), context=context.unsqueeze(-1)).validation


def test_images():
    data = torch.randn(200, 2, 3) * 3 + 5
    found = fit(pf.realnvp((2, 3), num_layers=2, hidden_dims=(8,)), data)
    assert found.distribution.event_shape == (2, 3) and found.log_prob(data).shape == (200,)


@pytest.mark.parametrize("with_context", full_but([False, True], True))
def test_loader_equals_tensor(with_context):
    data = cloud(512).double()
    context = torch.randn(512, 1).double() * 3 if with_context else None
    flow = pf.maf(2, context_dim=int(with_context), **SMALL).double()
    tensors = (data,) if context is None else (data, context)
    loader = DataLoader(TensorDataset(*tensors), batch_size=512)
    # Adam would make much of rounding where a gradient is nearly zero.
    options = {"max_epochs": 5, "schedule": "constant", "optimizer": partial(torch.optim.SGD, lr=0.05)}
    want = fit(copy.deepcopy(flow), data, context=context, validation_fraction=0, batch_size=512, **options)
    got = fit(copy.deepcopy(flow), loader, **options)
    assert got.history["step"] == want.history["step"]
    torch.testing.assert_close(got.history["train"], want.history["train"], atol=1e-9, rtol=0)
    torch.testing.assert_close(got.log_prob(data, context), want.log_prob(data, context), atol=1e-9, rtol=0)
    held_out = fit(copy.deepcopy(flow), loader, loader, **options)
    again = held_out.log_prob(data, context).mean().item()
    assert abs(held_out.validation - again) < 1e-4 and got.stopped == "max_epochs"


@pytest.mark.cpu("torch's loaders shuffle by generators of the CPU")
def test_loader_of_bare_tensors_and_another_dtype():
    loader = DataLoader(cloud(256).double(), batch_size=64, shuffle=True)
    found = fit(pf.maf(2, **SMALL), loader, cloud(50))
    assert found.history["step"] == [4, 8] and found.log_prob(cloud(5)).dtype == torch.float32


# Reproducibility


@pytest.mark.cpu("torch's loaders shuffle by generators of the CPU")
def test_seed_decides_and_the_global_generator_is_left_alone():
    data, context = cloud(300), torch.randn(300, 1)
    loader = DataLoader(TensorDataset(data[:, :1], context), batch_size=50, shuffle=True)
    state = torch.get_rng_state()
    for given, flow in (((data,), pf.maf(2, **SMALL)), ((loader,), Linear())):
        runs = []
        for seed, draws in ((0, 0), (0, 3), (1, 0)):
            torch.set_rng_state(state)
            torch.rand(draws)
            before = torch.get_rng_state()
            runs.append(fit(copy.deepcopy(flow), *given, seed=seed).history["train"])
            assert torch.equal(torch.get_rng_state(), before)
        assert runs[0] == runs[1] != runs[2]


def test_seed_from_the_global_generator():
    flow, runs = pf.maf(2, **SMALL), []
    for seed in (5, 5, 6):
        pyro.set_rng_seed(seed)
        runs.append(fit(copy.deepcopy(flow), cloud(300), seed=None).history["train"])
    assert runs[0] == runs[1] != runs[2]


def test_param_store_is_left_alone():
    pyro.param("mine", torch.tensor(1.0))
    fit(pf.maf(2, **SMALL), cloud(100))
    assert list(pyro.get_param_store()) == ["mine"]


def test_progress_bar(capsys):
    fit(pf.maf(2, **SMALL), cloud(100), progress=False)
    assert capsys.readouterr() == ("", "")
    fit(pf.maf(2, **SMALL), cloud(100), progress=True)
    assert "validation" in capsys.readouterr().err


# Trouble


class Explodes(pf.FlowTransform):
    """The identity, until it has been trained for some steps."""

    def __init__(self, after, gradient=False):
        super().__init__(2)
        self.bias = nn.Parameter(torch.zeros(2))
        self.after, self.gradient = after, gradient

    def forward_and_ladj(self, x, context=None):
        return x + self.bias, x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y, context=None):
        self.after -= self.training
        x = y - self.bias
        if self.after < 0 and self.gradient:
            x = x + torch.sqrt((self.bias - self.bias.detach()).abs())  # zero, with an infinite slope
        elif self.after < 0:
            x = x / 0.0
        return x, y.new_zeros(y.shape[:-1])


def exploding(**options):
    return pf.Flow([*pf.maf(2, **SMALL), Explodes(**options), *pf.maf(2, **SMALL)])


def test_nan_is_traced_to_the_layer_and_the_best_state_is_kept():
    data = cloud(400)
    flow = exploding(after=9)
    with pytest.raises(
        FloatingPointError, match=r"chain\.parts\.1 \(Explodes\): output x has \d+ .*smaller lr"
    ) as error:
        fit(flow, data, batch_size=90, max_epochs=5)
    assert "rows" in str(error.value) and "as given" in str(error.value)
    assert not flow.training
    # The state is that of the second epoch, as a run that ends in time shows.
    other = exploding(after=100)
    pyro.set_rng_seed(0)
    first = exploding(after=9)
    other.load_state_dict(first.state_dict())
    with pytest.raises(FloatingPointError):
        fit(first, data, batch_size=90, max_epochs=5)
    fit(other, data, batch_size=90, max_epochs=2)
    for (name, p), q in zip(first.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert any(p.any() for p in first.parameters())


def test_nan_in_the_first_epoch_leaves_the_flow_as_it_was():
    flow = exploding(after=2)
    before = copy.deepcopy(flow.state_dict())
    refuses(FloatingPointError, "Explodes", fit, flow, cloud(400), batch_size=90)
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())


def test_nan_gradient_is_traced_to_the_parameter():
    with pytest.raises(FloatingPointError, match=r"gradient is (nan|inf): that of chain\.parts\.1\.bias"):
        fit(exploding(after=2, gradient=True), cloud(400), batch_size=90)


def test_nan_parameter_is_named():
    flow = pf.Flow(pf.maf(2, num_layers=2, hidden_dims=(8,)))
    name = next(name for name, _ in flow.chain[1].named_parameters())
    with torch.no_grad():
        flow.chain[1].get_parameter(name).view(-1)[0] = math.nan
    refuses(FloatingPointError, rf"chain\.parts\.1 \(Autoregressive\): parameter {name} has 1", fit, flow, cloud(100))


def test_nan_under_a_base_that_validates():
    flow = pf.Flow(
        [*pf.maf(2, **SMALL), Explodes(after=3)], dist.Normal(torch.zeros(2), 1.0, validate_args=True).to_event(1)
    )
    refuses(FloatingPointError, r"chain\.parts\.1 \(Explodes\)", fit, flow, cloud(400), batch_size=90)


def test_nan_in_a_module():
    module = Linear()
    with torch.no_grad():
        module.net[0].bias.fill_(math.inf)
    with pytest.raises(FloatingPointError, match=r"net\.0 \(Linear\): parameter bias has 1"):
        fit(module, torch.randn(50, 1), context=torch.randn(50, 1))


def test_validation_that_is_never_finite():
    class Edge(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.zeros(()))

        def log_prob(self, value):
            return torch.where(value[:, 0] < 5, self.rate - value[:, 0] * self.rate.exp(), -math.inf)

    data = torch.rand(100, 1)
    with pytest.raises(
        FloatingPointError, match=r"not finite in any of 3 epochs, from 1 of 20 rows \(row 7 as given\)"
    ):
        fit(Edge(), data, torch.rand(20, 1).index_fill(0, torch.tensor(7), 9.0), max_epochs=3)


def test_interruption_keeps_the_best_state():
    class Interrupts(Bernoulli):
        calls = 0

        def log_prob(self, value):
            self.calls += 1
            if self.calls > 12:
                raise KeyboardInterrupt
            return super().log_prob(value)

    module = Interrupts()
    with pytest.raises(KeyboardInterrupt):
        fit(module, torch.randint(2, (100, 2)), batch_size=50, max_epochs=50, lr=0.1)
    assert module.first.item() != 0 and not module.training


def test_the_first_batch_sets_layers():
    value = 5 + 3 * torch.randn(60, 2)
    flow = pf.Flow([pf.ActNorm(2)])
    sgd = partial(torch.optim.SGD, lr=1e-9)
    pf.fit_density(flow, value, steps=1, optimizer=sgd, standardize=False, validation_fraction=0, progress=False)
    layer = flow.chain[0]
    torch.testing.assert_close(layer.loc.detach(), value.mean(0))
    torch.testing.assert_close(layer.log_scale.detach().exp(), value.std(0, correction=0))
