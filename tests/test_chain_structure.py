"""Guides of chains: found from gradients in loops and vectors, compared with Kalman's filter and dense algebra."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from torch import Tensor

from pyro_flows.core.recurrence import recurrence
from pyro_flows.infer import AutoFlow, fit_guide, load_guide
from pyro_flows.infer.guides.loop import GuideTraining
from pyro_flows.infer.machine.budget import Budget
from pyro_flows.infer.models.structure import Group, Structure, SummedDensity, summed_up
from pyro_flows.infer.search.climb import SafeDensity
from pyro_flows.infer.search.inner import InnerDensity
from pyro_flows.infer.search.inner_start import find_inner_start
from pyro_flows.infer.search.lines import PLACES, shapes_along
from pyro_flows.infer.search.tridiagonal import chain_conditionals

F64 = torch.float64


def series(steps, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    level = (0.3 * torch.randn(steps, generator=generator, dtype=F64)).cumsum(0)
    return (level + 0.7 * torch.randn(steps, generator=generator, dtype=F64)).to(dtype)


def spreads():
    walk = pyro.sample("walk", dist.LogNormal(-1.0, 0.5))
    noise = pyro.sample("noise", dist.LogNormal(-0.5, 0.5))
    return walk, noise


def looped(y):
    walk, noise = spreads()
    x = torch.zeros(())
    for t in pyro.markov(range(len(y))):
        x = pyro.sample(f"x_{t}", dist.Normal(x, walk if t else 1.0))
        pyro.sample(f"y_{t}", dist.Normal(x, noise), obs=y[t])


def vectorized(y):
    walk, noise = (each.unsqueeze(-1) for each in spreads())
    x = pyro.sample("x", dist.Normal(torch.zeros(len(y)).to(y), 30.0).to_event(1))
    steps = dist.Normal(0.0, walk).log_prob(x[..., 1:] - x[..., :-1]).sum(-1)
    pyro.factor("steps", steps + dist.Normal(0.0, 1.0).log_prob(x[..., 0]))
    pyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)


def summed(y):
    walk, noise = (each.unsqueeze(-1) for each in spreads())
    moves = pyro.sample("moves", dist.Normal(torch.zeros(len(y)).to(y), 1.0).to_event(1))
    size = torch.cat([torch.ones_like(walk), walk.expand(*walk.shape[:-1], len(y) - 1)], -1)
    pyro.sample("y", dist.Normal((size * moves).cumsum(-1), noise).to_event(1), obs=y)


def summed_alike(y):
    walk, noise = (each.unsqueeze(-1) for each in spreads())
    moves = pyro.sample("moves", dist.Normal(torch.zeros(len(y)).to(y), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(walk * moves.cumsum(-1), noise).to_event(1), obs=y)


def panel(y):
    walk, noise = spreads()
    x = 0.0
    with pyro.plate("series", 5):
        for t in pyro.markov(range(6)):
            x = pyro.sample(f"x_{t}", dist.Normal(x, walk))
            pyro.sample(f"y_{t}", dist.Normal(x, noise), obs=y[t])


def trend(y):
    walk, noise = spreads()
    x, slope = 0.0, 0.0
    for t in pyro.markov(range(8)):
        x, slope = (
            pyro.sample(f"x{t}", dist.Normal(x + slope, walk)),
            pyro.sample(f"slope{t}", dist.Normal(slope, 0.2)),
        )
        pyro.sample(f"y{t}", dist.Normal(x, noise), obs=y[t])


def remembering(y):
    """Each step depends on the two before."""
    x = [0.0, 0.0]
    for t in range(8):
        x.append(pyro.sample(f"x_{t}", dist.Normal(0.5 * x[-1] + 0.3 * x[-2], 1.0)))
        pyro.sample(f"y_{t}", dist.Normal(x[-1], 1.0), obs=y[t])


def separate(y):
    for t in range(6):
        x = pyro.sample(f"x_{t}", dist.Normal(0.0, 1.0))
        pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=y[t])


FOUND = {
    "loop": (looped, "1 chain of 12 steps of 'steps 0 to 11' with 1 latent each"),
    "vector": (vectorized, "1 chain of 12 steps of 'vectors of 12' with 1 latent each"),
    "sums": (summed_alike, "1 chain of 12 sums of 'vectors of 12' with 1 latent each"),
    "loop in a plate": (panel, "5 chains of 6 steps of 'series x steps 0 to 5' with 1 latent each"),
    "several latents": (trend, "1 chain of 8 steps of 'steps 0 to 7' with 2 latents each"),
    "independent": (separate, "6 members of 'steps 0 to 5' with 1 latent each"),
}


@pytest.mark.parametrize(
    "name", [name if name == "independent" else pytest.param(name, marks=pytest.mark.full) for name in FOUND]
)
def test_chains_are_found(name):
    model, words = FOUND[name]
    guide = AutoFlow(model, dependencies="model", start="prior").setup(series(12))
    assert words in repr(guide)
    (group,) = guide.structure.groups
    names = guide.latents.names()
    if name == "loop in a plate":  # the steps of one series after another
        assert [names[k] for k in group.places[:7, 0]] == [*(f"x_{t}[0]" for t in range(6)), "x_0[1]"]
    if name == "several latents":
        assert sorted(names[k] for k in group.places[3]) == ["slope3", "x3"]


@pytest.mark.full
@pytest.mark.parametrize("model", [remembering, summed])
def test_members_that_are_coupled_otherwise_are_refused(model):
    name = "steps 0 to 7" if model is remembering else "vectors of 12"
    guide = AutoFlow(model, dependencies="model", start="prior")
    refuses(ValueError, f"'{name}': its members depend on each other", guide.setup, series(12))


def dense(diagonal, below):
    steps, dim = diagonal.shape[0], diagonal.shape[-1]
    whole = torch.block_diag(*diagonal)
    for t in range(steps - 1):
        here, after = slice(t * dim, (t + 1) * dim), slice((t + 1) * dim, (t + 2) * dim)
        whole[after, here], whole[here, after] = below[t], below[t].mT
    return whole


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 16, 21])
@pytest.mark.parametrize("dim", [1, 3])
def test_conditionals_of_a_normal_chain(steps, dim):
    generator = torch.Generator().manual_seed(steps)
    below = torch.randn(steps - 1, dim, dim, generator=generator, dtype=F64)
    diagonal = torch.randn(steps, dim, dim, generator=generator, dtype=F64)
    diagonal = diagonal @ diagonal.mT + 5 * dim * torch.eye(dim, dtype=F64)
    given, carry = chain_conditionals(diagonal, below, torch.linalg.inv)
    noise = torch.linalg.cholesky(given) @ torch.eye(steps * dim, dtype=F64).view(steps, dim, steps * dim)
    factor = recurrence(carry, noise.movedim(-1, 0)).flatten(1)  # a column for each number of noise
    covariance = torch.linalg.inv(dense(diagonal, below))
    assert torch.allclose(factor.mT @ factor, covariance, atol=1e-12)


def test_recurrence_is_a_loop():
    generator = torch.Generator().manual_seed(0)
    carry, values = (torch.randn(shape, generator=generator, dtype=F64) for shape in ((4, 8, 2, 2), (4, 9, 2)))
    x = [values[:, 0]]
    for t in range(8):
        x.append((carry[:, t] @ x[-1][..., None])[..., 0] + values[:, t + 1])
    assert torch.allclose(recurrence(carry, values), torch.stack(x, 1))


def curved(z: Tensor) -> Tensor:
    """Two globals, four members of two variables with three each below them, and two chains of five steps."""
    g, a, b, c = z[:, :2], z[:, 2:10].view(-1, 4, 2), z[:, 10:22].view(-1, 12), z[:, 22:32].view(-1, 2, 5)
    value = -g.square().sum(-1) - ((a - g[:, None]).square() * g[:, :1, None].exp()).sum((-1, -2)) - a.exp().sum((1, 2))
    parent = a.repeat_interleave(3, 1)
    value = value - (b - parent[..., 0] - 0.3 * parent[..., 1]).cosh().sum(-1) - (0.1 * b * g[:, :1]).exp().sum(-1)
    moves = c.diff(dim=-1) * g[:, 1:, None].exp()
    return value - moves.square().sum((1, 2)) - (c - g[:, :1, None]).exp().sum((1, 2)) - c.square().sum((1, 2))


def groups(chained):
    owners = torch.arange(12) // 3
    tree = Group("a", torch.arange(2, 10).view(4, 2)), Group("b", torch.arange(10, 22)[:, None], ((0, owners),))
    chains = Group("c", torch.arange(22, 32)[:, None], (), 5)
    return (*tree, chains) if chained else tree


@pytest.mark.parametrize("chained", [False, pytest.param(True, marks=pytest.mark.full)])
def test_marginal_density_and_its_gradient(chained, monkeypatch):
    monkeypatch.setattr("pyro_flows.infer.search.inner.SETTLED", 1e-13)
    start, size = torch.zeros(32, dtype=F64), 32 if chained else 22

    def density(z: Tensor) -> Tensor:
        return curved(z if chained else torch.cat([z, z.new_zeros(len(z), 10)], 1))

    inner = InnerDensity(SafeDensity(density, start[:size]), Structure(torch.arange(2), groups(chained)), start[:size])
    inner.measure(inner.expanded(start[None, :size])[2])
    g = torch.tensor([[0.3, -0.2], [0.5, 0.4]], dtype=F64)
    value, slope = inner.value_and_slope(g)
    z = inner.settled(g)[0]
    for k in range(2):
        hessian = torch.autograd.functional.hessian(lambda x: density(x[None])[0], z[k])[2:, 2:]
        laplace = density(z)[k] - 0.5 * torch.linalg.slogdet(-hessian)[1] + 0.5 * (size - 2) * math.log(2 * math.pi)
        assert abs(float(value[k] - laplace)) < (1e-2 if chained else 1e-5)  # one-sided differences
    steps = 1e-3 * torch.eye(2, dtype=F64)
    known = torch.stack([(inner(g + step) - inner(g - step)) / 2e-3 for step in steps], -1)
    assert (slope - known).abs().max() < (1e-3 if chained else 1e-5)


@pytest.mark.full
@pytest.mark.parametrize("count", [0, 3, 11])
def test_shapes_along_lines(count):
    """Of log-odds with a normal prior after some of twelve trials."""

    def depth(x: Tensor) -> Tensor:
        return count * x - 12 * torch.nn.functional.softplus(x) - 0.5 * x.square()

    grid = torch.linspace(-9, 9, 200_001, dtype=F64)
    mode = grid[depth(grid).argmax()]
    slope, bend = (torch.func.grad(depth), torch.func.grad(torch.func.grad(depth)))
    sd = (-bend(mode)).rsqrt()
    found = shapes_along(sd * torch.func.vmap(slope)(mode + sd * PLACES))
    density = (depth(mode + sd * grid) - depth(mode)).exp()
    mass = density.sum() * (grid[1] - grid[0]) / math.sqrt(2 * math.pi)
    assert abs(float(found.log_mass - mass.log())) < 3e-4
    x = torch.linspace(-5, 5, 2001, dtype=F64)
    inside = found.tail.exp() * x.asinh() + found.shift
    y = mode + sd * (found.mean + found.scale * inside.sinh())
    log_slope = found.scale.log() + inside.cosh().log() + found.tail - 0.5 * (x * x).log1p()
    weights = depth(y) - depth(mode) + log_slope + 0.5 * x.square() - mass.log()
    normal = (-0.5 * x.square()).softmax(0)
    plain = depth(mode + sd * x) - depth(mode) + 0.5 * x.square() - mass.log()
    spread, before = ((normal * (w - (normal * w).sum()).square()).sum() for w in (weights, plain))
    assert spread < 1e-3
    assert spread < 0.06 * before


def kalman(y: Tensor, walk: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log-densities of series, and means and variances of all states, for spreads ``(n,)``."""
    mean, variance, total = torch.zeros_like(walk), torch.ones_like(walk), torch.zeros_like(walk)
    means, variances, ahead = [], [], []
    for t, value in enumerate(y):
        if t:
            variance = variance + walk**2
        ahead.append((mean, variance))
        whole = variance + noise**2
        total = total - 0.5 * ((value - mean) ** 2 / whole + (2 * math.pi * whole).log())
        mean, variance = mean + variance / whole * (value - mean), variance * noise**2 / whole
        means.append(mean)
        variances.append(variance)
    smooth = [(means[-1], variances[-1])]
    for t in range(len(y) - 2, -1, -1):
        gain = variances[t] / ahead[t + 1][1]
        smooth.append(
            (
                means[t] + gain * (smooth[-1][0] - ahead[t + 1][0]),
                variances[t] + gain**2 * (smooth[-1][1] - ahead[t + 1][1]),
            )
        )
    return total, *(torch.stack(part, -1) for part in zip(*smooth[::-1], strict=True))


def exact(y: Tensor) -> tuple[float, Tensor, Tensor]:
    """The log-evidence, means and standard deviations of the states, by a grid over both spreads."""
    grid = torch.linspace(-4.0, 4.0, 121, dtype=F64)
    walk, noise = (each.flatten() for each in torch.meshgrid(-1.0 + 0.5 * grid, -0.5 + 0.5 * grid, indexing="ij"))
    prior = -0.5 * ((walk + 1) ** 2 + (noise + 0.5) ** 2) / 0.25
    log_p, means, variances = kalman(y, walk.exp(), noise.exp())
    weight = (prior + log_p).softmax(0)[:, None]
    mean = (weight * means).sum(0)
    evidence = (prior + log_p).logsumexp(0) - prior.logsumexp(0)
    return float(evidence), mean, ((weight * (variances + (means - mean) ** 2)).sum(0)).sqrt()


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "dtype"), [(looped, F64), (vectorized, F64), (vectorized, torch.float32), (summed_alike, F64)]
)
def test_local_level_against_kalman(model, dtype):
    y = series(12 if model is looped else 100, dtype=dtype)
    fit = fit_guide(AutoFlow(model, dependencies="model", seed=0), y, steps=200, progress=False)
    assert fit.ess > 0.95
    if model is summed_alike:
        return
    evidence, mean, width = exact(y.double())
    drawn = fit.sample(4000)
    x = drawn["x"] if model is vectorized else torch.stack([drawn[f"x_{t}"] for t in range(len(y))], -1)
    assert ((x.double().mean(0) - mean) / width).abs().max() < 0.08
    assert (x.double().std(0) / width - 1).abs().max() < 0.07
    if model is looped:
        assert abs(fit.log_evidence - evidence) < 0.02


@pytest.mark.full
def test_files_keep_chains(tmp_path):
    fit = fit_guide(AutoFlow(summed_alike, dependencies="model", seed=0), series(20), steps=3, progress=False)
    fit.save(tmp_path / "fit.pt")
    again = load_guide(tmp_path / "fit.pt")
    z = fit.assessment.draws[:20]
    with torch.no_grad():
        assert torch.equal(fit.flow.log_prob(z), again.flow.log_prob(z))


def test_sums_of_latents():
    group = Group("c", torch.tensor([[3], [0], [2], [4]]), (), 2, True)
    z = torch.arange(10.0, dtype=F64).view(2, 5)
    x = summed_up(z, [group])
    assert x[0].tolist() == [3.0, 1.0, 2.0, 3.0, 6.0]
    assert torch.equal(summed_up(x, [group], -1), z)

    def density(z: Tensor) -> Tensor:
        return (z**3).sum(-1)

    x.requires_grad_()
    known = torch.autograd.grad(density(summed_up(x, [group], -1)).sum(), x)[0]
    assert torch.allclose(SummedDensity(density, [group]).value_and_slope(x.detach())[1], known)


@pytest.mark.full
@pytest.mark.parametrize("members", [40, 400])
def test_the_start_costs_as_many_gradients_for_any_number_of_members(members):
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(members, generator=generator, dtype=F64)
    calls = []

    def density(z: Tensor) -> Tensor:
        calls.append(len(z))
        mean, spread, theta = z[:, :1], z[:, 1:2], z[:, 2:]
        value = -0.5 * (theta - mean).square() * (-2 * spread).exp() - spread - 0.5 * (theta - y).square() / 0.09
        return value.sum(-1) - 0.5 * z[:, :2].square().sum(-1)

    structure = Structure(torch.arange(2), (Group("members", torch.arange(2, members + 2)[:, None]),))
    found = find_inner_start(density, structure, torch.zeros(members + 2, dtype=F64), seconds=1e9)
    assert found is not None
    assert sum(calls) < 2500
    assert abs(float(found.loc[0] - y.mean())) < 3 / members**0.5


@pytest.mark.full
def test_little_time_leaves_first_derivatives(monkeypatch):
    """A clock that counts gradients: too few for any expansion, enough for the first derivatives."""
    generator = torch.Generator().manual_seed(0)
    y = 2.0 + torch.randn(300, generator=generator, dtype=F64)
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def density(z: Tensor) -> Tensor:
        now[0] += len(z)
        mean, spread, theta = z[:, :1], z[:, 1:2], z[:, 2:]
        value = -0.5 * (theta - mean).square() * (-2 * spread).exp() - spread - 0.5 * (theta - y).square() / 0.01
        return value.sum(-1) - 0.5 * z[:, :2].square().sum(-1)

    structure = Structure(torch.arange(2), (Group("members", torch.arange(2, 302)[:, None]),))
    start = torch.zeros(302, dtype=F64)
    assert find_inner_start(density, structure, start, seconds=10.0) is None
    found = find_inner_start(density, structure, start, seconds=250.0)
    assert found is not None
    means = found.members[0].means[..., 0]
    known = (y / 0.01 + found.globals[:, :1] * (-2 * found.globals[:, 1:]).exp()) / (
        1 / 0.01 + (-2 * found.globals[:, 1:]).exp()
    )
    assert (means - known).abs().max() < 0.05


@pytest.mark.parametrize(("later", "kept"), [(-10.0, False), (-4.0, True)])
def test_training_that_harms_returns_to_the_start(later, kept):
    flow = AutoFlow(unstructured, dependencies="model", start="prior", seed=0).setup(series(8)).flow
    budget = Budget(60, None, 0.0)
    training = GuideTraining(flow, lambda z: -z.square().sum(-1), budget, num_particles=8, fresh=False, level=-5.0)
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1
    for _ in range(50):
        training._note("flow", later, 0.1, 1e-3, 1.0, 0)
    training._restore()
    same = [torch.equal(value, before[name]) for name, value in flow.state_dict().items()]
    assert all(same) is not kept


def unstructured(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("members", len(y)):
        theta = pyro.sample("theta", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(theta, 0.5), obs=y)


@pytest.mark.full
def test_without_a_start_the_guide_is_dense(monkeypatch, tmp_path):
    y = series(70)
    monkeypatch.setattr("pyro_flows.infer.guides.builders.find_inner_start", lambda *args, **kwargs: None)
    assert AutoFlow(unstructured, dependencies="model", seed=0).setup(y).structure is not None
    fits = [
        fit_guide(AutoFlow(unstructured, seed=0), y, steps=4, progress=False, checkpoint=tmp_path / "fit.pt")
        for _ in range(2)
    ]
    assert fits[0].guide.structure is None
    assert "dense (a start with those of the model was not found in time)" in repr(fits[0].guide)
    states = [fit.flow.state_dict().values() for fit in fits]
    assert all(map(torch.equal, *states))
    monkeypatch.undo()
    assert fits[0].guide.restart().setup(y).structure is not None
