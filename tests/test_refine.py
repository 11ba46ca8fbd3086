"""Many short chains and NUTS: laws that moves keep, tests of settling, and posteriors that a guide alone gets wrong."""

import math
import signal
import time
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import generator
from pyro import poutine
from pyro.distributions import constraints
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import pyro_flows as pf
from pyro_flows.infer import AutoFlow, fit_guide, load_guide
from pyro_flows.infer.chains.walkers import Gaussians, Walkers
from pyro_flows.infer.diagnostics import importance
from pyro_flows.infer.diagnostics.bridging import bridged
from pyro_flows.infer.diagnostics.settling import (
    ChainDraws,
    compare_walks,
    judge_chains,
    nested_rhat,
    settling,
)
from pyro_flows.infer.guides import refine as refining
from pyro_flows.infer.guides.nuts import BaseChains
from pyro_flows.infer.search.climb import SafeDensity
from pyro_flows.infer.search.ridges import follow_ridges

Y = torch.tensor([0.4, 1.9, 1.1, 0.2, 2.3, 1.4])


def location(y):
    """Conjugate."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


PRECISION = 0.25 + len(Y)
MEAN, SD = float(Y.sum() / PRECISION), PRECISION**-0.5


def fitted(model, *args, steps=60, seed=0, **options):
    return fit_guide(AutoFlow(model, seed=seed, **options), *args, steps=steps, progress=False)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# Whether chains have settled.


def test_nested_rhat_is_that_of_groups_that_remember():
    first = noise(256, 1, seed=1)
    fresh = noise(256, 20, 1)
    assert abs(float(nested_rhat(fresh, first)) - 1) < 0.005
    # A part c of the start stays in each mean: B is nearly c^2 by W of 1, as in the formula.
    remembering = fresh + 0.5 * first.unsqueeze(1)
    ordered = first.sort(0).values.reshape(16, 16).mean(1)
    expected = math.sqrt(1 + float(0.25 * ordered.var()))
    assert abs(float(nested_rhat(remembering, first)) - expected) < 0.02


@pytest.mark.parametrize("kind", ["right", "drifting", "remembering", "few", "stuck"])
def test_settling_tells_what_is_wrong(kind):
    states, first = noise(256, 32, 2), noise(256, 2, seed=1)
    if kind == "drifting":
        states[..., 1] += torch.linspace(0, 0.3, 32, dtype=torch.float64)
    if kind == "remembering":
        states += 0.5 * first.unsqueeze(1)
    if kind == "few":
        states, first = states[:16, :8], first[:16]
    if kind == "stuck":  # a part of the chains never moves
        states[:100] = states[:100, :1]
        first = states[:, 0]
    found = settling(states, first)
    assert found.ok == (kind == "right")
    assert found.drifts == (kind == "drifting")
    assert (found.rhat < 1.01) == (kind in ("right", "drifting"))
    if kind == "right":
        assert 0.5 < found.effective / (256 * 32) < 1.1
    if kind == "few":
        assert found.effective < 1000


@pytest.mark.parametrize(("memory", "away", "fine"), [(0.2, 0.0, True), (0.2, 0.6, False), (0.5, 0.0, False)])
def test_memory_matters_where_chains_began_elsewhere(memory, away, fine):
    first = noise(512, 1, seed=1) + away
    states = math.sqrt(1 - memory**2) * noise(512, 32, 1) + memory * first.unsqueeze(1)
    found = settling(states, first)
    assert found.rhat > 1.01 and found.ok == fine and found.remembers == (not fine)
    assert memory * away - 0.02 < found.moved < memory * (away + 0.25)


def test_heavy_tails_settle_and_few_long_chains_have_the_usual_rhat():
    cauchy = torch.tan(math.pi * (torch.rand(256, 32, 1, generator=generator(), dtype=torch.float64) - 0.5))
    assert settling(cauchy, cauchy[:, 0]).ok
    walk = torch.zeros(4, 2000, 1, dtype=torch.float64)
    steps = noise(4, 2000, 1)
    for k in range(1, 2000):
        walk[:, k] = 0.8 * walk[:, k - 1] + 0.6 * steps[:, k]
    found = settling(walk)
    assert found.rhat < 1.02 and abs(found.effective / (8000 / 9) - 1) < 0.35  # autocorrelation time (1 + r) / (1 - r)
    apart = settling(walk + torch.tensor([0.0, 0.0, 1.0, 1.0]).reshape(4, 1, 1))
    assert apart.rhat > 1.1 and not apart.ok


def test_another_walk_is_compared():
    own, weights = noise(256, 32, 2), noise(256 * 32)
    same = compare_walks(own, weights, noise(256, 16, 2, seed=1), noise(256 * 16, seed=2).clamp(max=3))
    assert same.why_not == "" and same.error < 0.03
    short = compare_walks(own[:, :4], weights[:1024], noise(256, 4, 2, seed=1), noise(1024, seed=2).clamp(max=3))
    assert short.why_not == "" and 0.04 < short.error < 0.05  # twice 1024 draws
    moved = compare_walks(own, weights, noise(256, 16, 2, seed=1) + 0.3, noise(4096, seed=2).clamp(max=3))
    assert "did not end" in moved.why_not
    wider = compare_walks(own, weights, 1.5 * noise(256, 16, 2, seed=1), noise(4096, seed=2).clamp(max=3))
    assert "did not end" in wider.why_not
    beyond = compare_walks(own, weights, noise(256, 16, 2, seed=1), noise(4096, seed=2) + 3)
    assert "did not end" in beyond.why_not
    high = noise(256, 16, seed=2).clamp(max=3)
    for chains, words in (
        (9, ""),
        (10, "did not end"),
    ):  # the highest of 512 by chance, with a probability of 2^-chains
        high[:chains] = 9.0
        found = compare_walks(own, weights, noise(256, 16, 2, seed=1), high)
        assert found.chains == chains and found.beyond > 0.03 and found.why_not.startswith(("chains",) if words else "")
        assert bool(found.why_not) == bool(words)
    assert "too short" in compare_walks(own, weights, noise(16, 16, 2, seed=1), noise(256, seed=2).clamp(max=3)).why_not


def test_the_verdict_names_what_is_wrong():
    states, first = noise(256, 32, 2), noise(256, 2, seed=1)
    draws = ChainDraws(states, noise(256, 32), noise(256, 32), 8000.0, 1.0, 0, "refine")
    apart = compare_walks(states, noise(8192), noise(256, 16, 2, seed=1), noise(4096, seed=2).clamp(max=3))
    good = judge_chains(settling(states, first), draws, apart)
    assert good.ok and good.label == "good" and "256 chains with 32 draws" in str(good)
    for words, verdict in {
        "none that began elsewhere": judge_chains(settling(states, first), draws),
        "interrupted": judge_chains(settling(states, first), draws, apart, "The chains were interrupted."),
        "ridges could not": judge_chains(settling(states, first), draws, apart, ended=False),
        "remember": judge_chains(settling(states + first.unsqueeze(1), first), draws, apart),
    }.items():
        assert verdict.label == "chains not settled" and not verdict.ok and words in verdict.text, words
    nuts = ChainDraws(states, noise(256, 32), noise(256, 32), 8000.0, 1.0, 100, "nuts")
    assert "trajectories diverged" in judge_chains(settling(states), nuts).text


def test_the_bridged_evidence_is_right_where_weights_alone_are_not():
    # A guide half as wide as the posterior: weights without variance in four dimensions.
    z = 0.5 * noise(4000, 4)
    p = noise(4000, 4, seed=1)

    def log_weights(z):
        return 7.0 + (-0.5 * z.square() + 0.5 * (2 * z).square() - math.log(2)).sum(-1)

    found = importance(log_weights(z))
    better = bridged(found, log_weights(z), log_weights(p), 4000.0)
    assert abs(better.log_evidence - 7) < 4 * better.log_evidence_error < 0.3
    assert better.ess == found.ess


# Moves and proposals.


def test_gaussians_have_the_density_of_a_mixture():
    loc, factor = noise(3, 2), torch.tril(noise(3, 2, 2, seed=1)) + 2 * torch.eye(2)
    mixture = Gaussians(loc, factor, torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64))
    same = MixtureSameFamily(Categorical(mixture.share), MultivariateNormal(loc, scale_tril=factor))
    z = noise(5, 2, seed=2)
    torch.testing.assert_close(mixture.log_prob(z), same.log_prob(z))
    torch.manual_seed(0)
    draws = mixture.sample(20_000)
    torch.testing.assert_close(draws.mean(0), same.mean, atol=0.06, rtol=0)
    torch.testing.assert_close(draws.var(0), same.variance, atol=0.0, rtol=0.05)


def test_shares_of_gaussians_follow_the_heights():
    loc = torch.linspace(-3, 3, 25, dtype=torch.float64).unsqueeze(-1)
    scale = torch.full((25, 1, 1), 0.3, dtype=torch.float64)
    mixture = Gaussians.of_heights(loc, scale, -0.5 * loc.squeeze(-1).square())
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(-1)
    gap = mixture.log_prob(z) + 0.5 * z.squeeze(-1).square()
    assert float(gap.max() - gap.min()) < 0.25


def bent(z, width=0.1):
    return -0.5 * z[..., 0] ** 2 - 0.5 * ((z[..., 1] - 3 * (z[..., 0] ** 2 - 1)) / width) ** 2


def on_bend(count, width=0.1, seed=0):
    x = noise(count, 2, seed=seed)
    return torch.stack([x[:, 0], 3 * (x[:, 0] ** 2 - 1) + width * x[:, 1]], 1)


def test_ridges_are_followed_to_their_ends():
    z = on_bend(100)
    ridges = follow_ridges(SafeDensity(bent, z), z[:3], z.std(0))
    assert ridges.complete and len(ridges.points) < 400
    assert float(ridges.points[:, 0].min()) < -2.6 and float(ridges.points[:, 0].max()) > 2.6
    # Their mixture has the mass of the density: log(2 pi 0.1) of the whole.
    mixture = Gaussians.of_heights(ridges.points, ridges.scale, ridges.values)
    torch.manual_seed(0)
    draws = mixture.sample(2000)
    found = importance(bent(draws) - mixture.log_prob(draws))
    assert found.ess > 0.4 and abs(found.log_evidence - math.log(2 * math.pi * 0.1)) < 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ridge_that_closes_is_followed_once(dtype):
    def ring(z):
        r = (z.square().sum(-1) + 1e-9).sqrt()
        return -0.5 * ((r - 4) / 0.3) ** 2 - r.log()

    z = torch.tensor([[4.0, 0.1], [-0.5, -4.1]], dtype=dtype)
    ridges = follow_ridges(SafeDensity(ring, z), z, torch.tensor([2.8, 2.8]))
    assert ridges.complete
    angles = torch.atan2(ridges.points[:, 1], ridges.points[:, 0]).sort().values
    assert float(angles.diff().max()) < 0.7 and float((ridges.points.norm(dim=-1) - 4).abs().max()) < 0.5


def test_a_ridge_without_an_end_is_said_to_go_on():
    def line(z):
        return -0.5 * (z[..., 1] / 0.1) ** 2 + 0.0 * z[..., 0]

    z = torch.zeros(1, 2, dtype=torch.float64)
    assert not follow_ridges(SafeDensity(line, z), z, torch.ones(2), steps=50).complete


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sweeps_keep_the_posterior_with_any_flow_and_any_jumps(dtype):
    """All kinds of moves at sizes that are often refused, with a flow and Gaussians that are wrong."""
    torch.manual_seed(1)
    flow = pf.Flow(pf.iaf(2, hidden_dims=(8,))).to(dtype).eval()
    for parameter in flow.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    jumps = Gaussians(
        torch.tensor([[1.0, 1.0]], dtype=dtype), 1.5 * torch.eye(2, dtype=dtype)[None], torch.ones(1).to(dtype)
    )

    def skewed(z):
        return -z[..., 0] - (-z[..., 0]).exp() - 0.5 * (z[..., 1] - z[..., 0]) ** 2

    gumbel = -(-torch.rand(2000, generator=generator(1), dtype=torch.float64).log()).log()
    start = torch.stack([gumbel, gumbel + noise(2000)], 1).to(dtype)
    walkers = Walkers(flow, SafeDensity(skewed, start), start, [jumps])
    for _ in range(6):
        walkers.sweep(adapting=False)
    assert 0 < walkers.renewed < 1 and 0 < walkers.jumped < 1 and walkers.latents.dtype == dtype
    moved = (walkers.latents != start).any(-1).double().mean()
    assert moved > 0.95
    x, y = walkers.latents.double().unbind(-1)
    assert abs(float(x.mean()) - 0.5772) < 0.12 and abs(float(x.std()) / 1.2825 - 1) < 0.08
    assert abs(float((y - x).mean())) < 0.09 and abs(float((y - x).std()) - 1) < 0.06
    torch.testing.assert_close(walkers.log_p.to(x), skewed(torch.stack([x, y], -1)), atol=1e-4, rtol=1e-4)


def test_walkers_without_a_density_give_way():
    flow = pf.Flow(pf.iaf(1, hidden_dims=(4,))).double().eval()

    def half(z):
        return torch.where(z[..., 0] > 0, -z[..., 0], math.nan)

    z = torch.tensor([[-1.0], [2.0], [-3.0]], dtype=torch.float64)
    assert (Walkers(flow, SafeDensity(half, z), z).latents == 2).all()
    with pytest.raises(ValueError, match="finite at none of the starting points"):
        Walkers(flow, SafeDensity(half, z[:1]), z[:1])


# Fits.


@pytest.fixture(scope="module")
def simple():
    return fitted(location, Y)


@pytest.fixture(scope="module")
def refined(simple):
    return simple.refine(moves=90, progress=False)


@pytest.mark.full
def test_a_refined_fit_is_a_fit(simple, refined, tmp_path):
    draws = refined.sample(20_000)["mu"].double()
    assert abs(float(draws.mean()) - MEAN) < 0.06 * SD and abs(float(draws.std()) / SD - 1) < 0.05
    assert refined.verdict.ok and refined.verdict.label == "good" and "nested R-hat" in refined.verdict.text
    covariance = torch.eye(6, dtype=torch.float64) + 4.0
    evidence = float(MultivariateNormal(torch.zeros(6).double(), covariance).log_prob(Y.double()))
    assert abs(refined.log_evidence - evidence) < max(0.02, 4 * refined.importance.log_evidence_error)
    assert set(refined.predictive(5)) == {"y", "twice"} and refined.sample(3)["mu"].shape == (3,)
    data = refined.to_arviz(num_samples=500)
    assert data.posterior["mu"].shape[1] == refined.chains.draws.shape[1] and data.posterior["mu"].shape[0] > 5
    assert data.log_likelihood["y"].shape[:2] == data.posterior_predictive["y"].shape[:2] == data.posterior["mu"].shape
    assert data.attrs["draws"] == "draws of Markov chains" and "log_weight" not in data.sample_stats
    refined.save(tmp_path / "fit.pt")
    again = load_guide(tmp_path / "fit.pt")
    assert torch.equal(again.chains.draws, refined.chains.draws) and again.verdict == refined.verdict
    assert set(again.sample(40_000)["mu"].unique().tolist()) <= set(refined.chains.draws.flatten().tolist())
    assert simple.chains is None and simple.verdict.label != "chains not settled"
    assert torch.equal(simple.refine(moves=90, progress=False).chains.draws, refined.chains.draws)
    assert not torch.equal(
        simple.refine(moves=40, seed=5, progress=False).chains.draws[0, 0], refined.chains.draws[0, 0]
    )


@pytest.mark.full
def test_refining_goes_on_from_chains(refined):
    assert refined.refine(moves=60, progress=False).chains.draws.shape[0] == len(refined.chains.draws)


@pytest.mark.full
def test_nuts_in_the_base(simple):
    found = simple.nuts(num_samples=150, warmup_steps=50, num_chains=2, progress=False)
    draws = found.sample(300)["mu"].double()
    assert abs(float(draws.mean()) - MEAN) < 0.35 * SD and abs(float(draws.std()) / SD - 1) < 0.25
    assert found.chains.draws.shape == (2, 150, 1) and found.to_arviz().posterior["mu"].shape == (2, 150)
    assert "R-hat" in found.verdict.text and "too few draws" in found.verdict.text and found.chains.method == "nuts"
    same = simple.nuts(num_samples=150, warmup_steps=50, num_chains=2, progress=False)
    assert torch.equal(same.chains.draws, found.chains.draws)


def mixture(y):
    """A label that is summed out, a covariate that is conditioned, a masked row, and a simplex."""
    share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)), poutine.mask(mask=y > -50):
        label = pyro.sample("label", dist.Categorical(share))
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        loc = torch.where(label > 0, 2.0 + slope * x, -2.0)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def alone(y):
    """Runs for one draw at a time."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    scale = 1.0 if mu.item() > -100 else 2.0
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


@pytest.mark.full
@pytest.mark.parametrize("way", ["refine", "nuts"])
def test_discrete_conditioned_and_masked_sites(way):
    y = torch.tensor([2.2, -1.9, 3.0, -2.4, -99.0])
    given = poutine.condition(mixture, data={"x": torch.tensor([0.1, 0.2, 0.9, -0.3, 0.0])})
    options = {"moves": 24} if way == "refine" else {"num_samples": 10, "warmup_steps": 5, "num_chains": 1}
    found = getattr(fitted(given, y), way)(progress=False, **options)
    draws = found.sample(50)
    assert set(draws) == {"share", "slope"} and torch.allclose(draws["share"].sum(-1), torch.ones(50))
    assert found.to_arviz().log_likelihood["y"].shape[-1] == 4


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*does not broadcast")
def test_a_model_that_goes_one_draw_at_a_time():
    found = fitted(alone, Y, steps=15).refine(moves=2, progress=False)
    assert found.chains.draws.shape[0] == refining.FEW_CHAINS and not found.verdict.ok
    assert abs(float(found.sample(200)["mu"].mean()) - MEAN) < 0.5 * SD


@pytest.mark.full
@pytest.mark.usefixtures("double")
def test_two_far_modes_and_a_sharp_bend_in_float64():
    def modes():
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        away = torch.stack([x.square().sum(-1), (x - torch.tensor([7.0, 7.0])).square().sum(-1) / 0.25], -1)
        pyro.factor("density", (math.log(0.6) * torch.tensor([1.0, 0.0]) - 0.5 * away).logsumexp(-1))

    share = 0.25 / 0.85  # of the narrow one: its height times its width
    found = fitted(modes, steps=150).refine(moves=200, progress=False)
    assert abs(float((found.sample(10_000)["x"][:, 0] > 4).double().mean()) - share) < 0.05

    def bend():
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        pyro.factor("density", bent(x))

    found = fitted(bend, steps=150).refine(moves=150, progress=False)
    x = found.sample(10_000)["x"]
    assert abs(float(x[:, 0].std()) - 1) < 0.1 and abs(float(x[:, 1].std()) / math.sqrt(18.01) - 1) < 0.2


@pytest.mark.slow
@pytest.mark.usefixtures("double")
def test_a_chain_of_rosenbrock_steps_is_not_called_right():
    def steps():
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (6,)))
        rest = dist.Normal(x[..., :-1].square(), 0.3).log_prob(x[..., 1:]).sum(-1)
        pyro.factor("density", dist.Normal(0.8, 0.6).log_prob(x[..., 0]) + rest)

    found = fitted(steps, steps=300).refine(moves=250, progress=False)
    first = found.sample(10_000)["x"][:, 0]
    wrong = abs(float(first.mean()) - 0.8) > 0.06 or abs(float(first.std()) / 0.6 - 1) > 0.1
    assert not (wrong and found.verdict.ok)


# Limits and refusals.


@pytest.mark.full
def test_seconds_are_kept(simple):
    begin = time.monotonic()
    found = simple.refine(seconds=2.0, progress=False)
    assert time.monotonic() - begin < 6 and len(found.chains.draws) % 16 == 0


@pytest.mark.full
@pytest.mark.parametrize("way", ["refine", "nuts"])
def test_an_interruption_carries_the_result(simple, monkeypatch, way):
    count = 0
    whole = Walkers.sweep if way == "refine" else BaseChains._potential

    def stopping(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == (20 if way == "refine" else 400):
            signal.raise_signal(signal.SIGINT)
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(*((Walkers, "sweep") if way == "refine" else (BaseChains, "_potential")), stopping)
    options = {} if way == "refine" else {"warmup_steps": 20, "num_samples": 400}
    with pytest.raises(KeyboardInterrupt) as stopped:
        getattr(simple, way)(progress=False, **options)
    found = stopped.value.fit
    assert found.verdict.label == "chains not settled" and "interrupted" in found.verdict.text
    assert abs(float(found.sample(2000)["mu"].mean()) - MEAN) < SD
    assert not found.flow.training and all(p.grad is None for p in found.flow.parameters())


@pytest.mark.full
def test_an_interruption_at_once_has_the_guide_or_nothing(simple, monkeypatch):
    def stopping(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(refining, "probe_behind", stopping)
    with pytest.raises(KeyboardInterrupt) as stopped:
        simple.refine(progress=False)
    assert "interrupted" in stopped.value.fit.verdict.text and stopped.value.fit.sample(9)["mu"].shape == (9,)
    monkeypatch.setattr(BaseChains, "_potential", stopping)
    with pytest.raises(KeyboardInterrupt) as stopped:
        simple.nuts(progress=False)
    assert stopped.value.fit is None


@pytest.mark.full
def test_what_cannot_walk_is_refused(simple, refined, tmp_path):
    for way, options, words in [
        ("refine", {"seconds": 0}, "seconds to be a positive number"),
        ("refine", {"moves": 0}, "moves"),
        ("nuts", {"num_samples": 3}, "num_samples"),
        ("nuts", {"num_chains": 0}, "num_chains"),
    ]:
        with pytest.raises(ValueError, match=words):
            getattr(simple, way)(progress=False, **options)
    refined.save(tmp_path / "fit.pt")
    for way in ("refine", "nuts"):
        with pytest.raises(ValueError, match=f"{way}: this fit was loaded without its model"):
            getattr(load_guide(tmp_path / "fit.pt"), way)()

    def part(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(y), subsample_size=3) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    with pytest.raises(ValueError, match="sees a part of its data"):
        fitted(part, Y, steps=3).refine()


@pytest.mark.full
def test_draws_of_chains_need_a_whole_number_each():
    with pytest.raises(ValueError, match="as many draws of each of 3 chains, got 4"):
        pf.infer.to_arviz({"x": torch.zeros(4)}, num_chains=3)
    assert partial(pf.infer.to_arviz, {"x": torch.arange(4.0)})(num_chains=2).posterior["x"].values.tolist() == [
        [0.0, 1.0],
        [2.0, 3.0],
    ]
