"""Models of the form and the shapes of those in Pyro's examples, with exact log evidences where they can be had.

Data are simulated at fixed seeds, but for the five points of the mixture and the batting of 18 players in 1970, as
printed by Efron and Morris (1975), "Data analysis using Stein's estimator and its generalizations".
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

__all__ = ["Case", "Deep", "cases", "chorales", "deep_model", "hmm", "without_discrete"]

AT_BATS = 45
HITS = [18, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7]
POINTS = [0.0, 1.0, 10.0, 11.0, 12.0]


@dataclass(frozen=True)
class Case:
    """A model with its data, and how Pyro's example fits it.

    Attributes:
        discrete: whether some latents are, which are summed out.
        guide: the example's own guide, or else one of Pyro's.
        rates: step sizes of Adam that are tried.
        truth: log evidence in nats, if it is known.
        simulated: whether the data are.
    """

    name: str
    model: Callable[..., object]
    args: tuple[object, ...]
    guide: Callable[..., pyro.infer.autoguide.AutoGuide] = AutoNormal
    discrete: bool = False
    rates: tuple[float, ...] = (0.01,)
    truth: float | None = None
    simulated: bool = False

    def visible(self) -> Callable[..., object]:
        """What a guide sees: the model without its discrete latents."""
        return without_discrete(self.model) if self.discrete else self.model


def without_discrete(model: Callable[..., object]) -> Callable[..., object]:
    """Hides discrete latents; the observations stay, by which ``AutoFlow`` finds its start."""

    def hidden(site: dict) -> bool:
        return site["type"] == "sample" and not site["is_observed"] and site["fn"].has_enumerate_support

    return poutine.block(model, hide_fn=hidden)


def _trapezoid(values: Tensor, *grids: Tensor) -> float:
    """Logarithm of an integral over a grid of log values, one dimension a grid."""
    for grid in reversed(grids):
        top = values.amax(-1, keepdim=True)
        values = torch.trapezoid((values - top).exp(), grid).log() + top.squeeze(-1)
    return float(values)


# A mixture of two normals.


@config_enumerate
def gmm(data: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((2,), 0.5)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(data)):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(Vindex(locs.unsqueeze(-2))[..., k], scale), obs=data)


def gmm_evidence(data: Tensor) -> float:
    """Sums over all assignments; means and weights are conjugate, the scale is a sum over a grid."""
    data = data.double()
    log_scale = torch.linspace(-12.0, 10.0, 4001, dtype=torch.float64)
    prior = torch.distributions.Normal(0.0, 2.0).log_prob(log_scale)
    terms = []
    for labels in itertools.product((0, 1), repeat=len(data)):
        chosen = torch.tensor(labels)
        counts = torch.stack([(chosen == 0).sum(), (chosen == 1).sum()]).double()
        value = prior + (torch.lgamma(counts + 0.5) - math.lgamma(0.5)).sum() - math.lgamma(1.0 + len(data))
        for k in range(2):
            points = data[chosen == k]
            n, variance = len(points), (2 * log_scale).exp()
            # N(0, s^2 I + 100 11'), by the eigenvalues of its covariance.
            mean = points.mean() if n else torch.tensor(0.0, dtype=torch.float64)
            along, across = n * mean.square(), (points - mean).square().sum()
            value = value - 0.5 * (n * math.log(2 * math.pi) + max(n - 1, 0) * variance.log() + across / variance)
            if n:
                value = value - 0.5 * ((variance + 100.0 * n).log() + along / (variance + 100.0 * n))
        terms.append(value)
    return _trapezoid(torch.stack(terms).logsumexp(0), log_scale)


# Batting averages of 18 players.


def pooled(hits: Tensor) -> None:
    phi = pyro.sample("phi", dist.Uniform(torch.zeros(()), 1.0))
    with pyro.plate("players", len(hits)):
        pyro.sample("obs", dist.Binomial(AT_BATS, phi), obs=hits)


def not_pooled(hits: Tensor) -> None:
    with pyro.plate("players", len(hits)):
        phi = pyro.sample("phi", dist.Uniform(torch.zeros(()), 1.0))
        pyro.sample("obs", dist.Binomial(AT_BATS, phi), obs=hits)


def partially_pooled(hits: Tensor) -> None:
    m = pyro.sample("m", dist.Uniform(torch.zeros(()), 1.0))
    kappa = pyro.sample("kappa", dist.Pareto(torch.ones(()), 1.5))
    with pyro.plate("players", len(hits)):
        phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
        pyro.sample("obs", dist.Binomial(AT_BATS, phi), obs=hits)


def logit_pooled(hits: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(-torch.ones(()), 1.0))
    scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(())))
    with pyro.plate("players", len(hits)):
        alpha = pyro.sample("alpha", dist.Normal(loc, scale))
        pyro.sample("obs", dist.Binomial(AT_BATS, logits=alpha), obs=hits)


def _choose(hits: Tensor) -> Tensor:
    n = torch.tensor(float(AT_BATS), dtype=torch.float64)
    return torch.lgamma(n + 1) - torch.lgamma(hits + 1) - torch.lgamma(n - hits + 1)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def baseball_evidence(name: str, hits: Tensor) -> float:
    """In closed form, or over a grid of the population's two parameters."""
    hits = hits.double()
    misses, choose = AT_BATS - hits, _choose(hits).sum()
    if name == "pooled":
        return float(choose + _log_beta(hits.sum() + 1, misses.sum() + 1))
    if name == "not_pooled":
        return -len(hits) * math.log(AT_BATS + 1)
    if name == "partially_pooled":
        logit = torch.linspace(-12.0, 12.0, 801, dtype=torch.float64)[:, None]
        log_kappa = torch.linspace(0.0, 25.0, 801, dtype=torch.float64)
        m, kappa = logit.sigmoid(), log_kappa.exp()
        a, b = m * kappa, (1 - m) * kappa
        value = math.log(1.5) - 1.5 * log_kappa + m.log() + (-m).log1p() + choose  # densities of log kappa and logit
        for each in hits.unique():
            count = (hits == each).sum()
            value = value + count * (_log_beta(a + each, b + AT_BATS - each) - _log_beta(a, b))
        return _trapezoid(value, logit.squeeze(1), log_kappa)
    loc = torch.linspace(-5.0, 3.0, 161, dtype=torch.float64)[:, None, None]
    log_scale = torch.linspace(-14.0, 8.0, 221, dtype=torch.float64)[:, None]
    noise = torch.linspace(-8.0, 8.0, 161, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0)
    alpha = loc + log_scale.exp() * noise
    value = normal.log_prob(loc + 1) + torch.distributions.HalfCauchy(1.0).log_prob(log_scale.exp()) + log_scale
    value = value.squeeze(-1) + choose
    for each in hits.unique():
        inner = normal.log_prob(noise) + each * alpha - AT_BATS * nn.functional.softplus(alpha)
        top = inner.amax(-1, keepdim=True)
        integral = torch.trapezoid((inner - top).exp(), noise).log() + top.squeeze(-1)
        value = value + (hits == each).sum() * integral
    return _trapezoid(value, loc.flatten(), log_scale.flatten())


# Capture and recapture of 294 animals on 7 occasions.


def cjs_data(animals: int = 294, occasions: int = 7) -> tuple[Tensor, Tensor]:
    """Histories and sexes; survival is 0.56 to 0.62, recapture 0.9."""
    generator = torch.Generator().manual_seed(0)
    sex = (torch.rand(animals, generator=generator) < 0.5).float()
    first = torch.randint(0, occasions - 1, (animals,), generator=generator)
    alive, history = torch.ones(animals, dtype=torch.bool), torch.zeros(animals, occasions)
    for t in range(occasions):
        lives = torch.rand(animals, generator=generator) < 0.56 + 0.06 * sex
        seen = torch.rand(animals, generator=generator) < 0.9
        alive = torch.where(t <= first, True, alive & lives)
        history[:, t] = torch.where(t <= first, t == first, alive & seen).float()
    return history, sex


def _captures(history: Tensor, rho: Tensor, survival: Callable[[int], Tensor]) -> None:
    """Alive or not is summed out; nothing counts up to the first capture."""
    animals, occasions = history.shape
    plate = pyro.plate("animals", animals, dim=-1)
    z, known = torch.ones(animals), torch.zeros(animals, dtype=torch.bool)
    for t in pyro.markov(range(occasions)):
        phi = survival(t)
        with plate, poutine.mask(mask=known):
            alive = torch.where(known, phi * z, torch.ones(()))
            z = pyro.sample(f"z_{t}", dist.Bernoulli(alive), infer={"enumerate": "parallel"})
            pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=history[:, t])
        known = known | history[:, t].bool()


def cjs_1(history: Tensor, sex: Tensor) -> None:
    """One chance of survival."""
    phi = pyro.sample("phi", dist.Uniform(torch.zeros(()), 1.0))
    _captures(history, pyro.sample("rho", dist.Uniform(torch.zeros(()), 1.0)), lambda t: phi)


def cjs_2(history: Tensor, sex: Tensor) -> None:
    """One for each interval."""
    rho = pyro.sample("rho", dist.Uniform(torch.zeros(()), 1.0))
    _captures(
        history, rho, lambda t: pyro.sample(f"phi_{t}", dist.Uniform(torch.zeros(()), 1.0)) if t else torch.ones(())
    )


def cjs_3(history: Tensor, sex: Tensor) -> None:
    """One for each interval, drawn from a population of such."""
    mean = pyro.sample("phi_mean", dist.Uniform(torch.zeros(()), 1.0)).logit()
    sigma = pyro.sample("phi_sigma", dist.Uniform(torch.zeros(()), 10.0))
    rho = pyro.sample("rho", dist.Uniform(torch.zeros(()), 1.0))
    _captures(
        history,
        rho,
        lambda t: pyro.sample(f"phi_logit_{t}", dist.Normal(mean, sigma)).sigmoid() if t else torch.ones(()),
    )


def cjs_4(history: Tensor, sex: Tensor) -> None:
    """One for each sex."""
    male = pyro.sample("phi_male", dist.Uniform(torch.zeros(()), 1.0))
    female = pyro.sample("phi_female", dist.Uniform(torch.zeros(()), 1.0))
    rho = pyro.sample("rho", dist.Uniform(torch.zeros(()), 1.0))
    _captures(history, rho, lambda t: sex * male + (1 - sex) * female)


def cjs_5(history: Tensor, sex: Tensor) -> None:
    """By sex and interval, without interaction."""
    beta = pyro.sample("phi_beta", dist.Normal(torch.zeros(()), 10.0))
    rho = pyro.sample("rho", dist.Uniform(torch.zeros(()), 1.0))

    def survival(t: int) -> Tensor:
        if not t:
            return torch.ones(())
        return (sex * beta + pyro.sample(f"phi_gamma_{t}", dist.Normal(torch.zeros(()), 10.0))).sigmoid()

    _captures(history, rho, survival)


def _cjs_grid(history: Tensor, size: int = 401) -> tuple[Tensor, Tensor]:
    """Log likelihood at survival x recapture, by going through each history, and the grid of either."""
    grid = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    phi, rho = grid[:, None], grid
    total = torch.zeros(size, size, dtype=torch.float64)
    rows, counts = history.unique(dim=0, return_counts=True)
    for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
        alive, dead = torch.ones_like(total), torch.zeros_like(total)
        for seen in row[row.index(1.0) + 1 :]:
            dead = dead + alive * (1 - phi)
            alive = alive * phi * (rho if seen else 1 - rho)
            dead = dead * (1 - seen)
        total = total + count * (alive + dead).log()
    return total, grid


def cjs_evidence(history: Tensor, sex: Tensor, by_sex: bool) -> float:
    """Over a grid, as the mean under uniform priors."""
    if not by_sex:
        total, grid = _cjs_grid(history)
        return float(total.logsumexp((0, 1)) - 2 * math.log(len(grid)))
    parts = [_cjs_grid(history[sex == k]) for k in (0, 1)]
    size = len(parts[0][1])
    # Given the chance of recapture the sexes are independent.
    each = [total.logsumexp(0) - math.log(size) for total, _ in parts]
    return float(sum(each).logsumexp(0) - math.log(size))


# Chorales: sets of 88 keys over time.


def chorales(rows: int, longest: int, keys: int = 88, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Chords held for a while; sequences are padded by zeros: shapes ``(rows, longest, keys)`` and ``(rows,)``."""
    generator = torch.Generator().manual_seed(0)
    chords = (torch.rand(16, keys, generator=generator) < 4 / keys).float()
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(longest // 3, longest + 1, (rows,), generator=generator)
    stay = torch.rand(rows, longest, generator=generator) < 0.7
    new = torch.randint(0, 16, (rows, longest), generator=generator)
    flips = torch.rand(rows, longest, keys, generator=generator) < 0.01
    now, series = new[:, 0], []
    for t in range(longest):
        now = torch.where(stay[:, t], now, new[:, t])
        series.append(chords[now])
    played = (torch.stack(series, 1) - flips.float()).abs()
    return played * (torch.arange(longest) < lengths[:, None])[..., None], lengths


def hmm(sequences: Tensor, lengths: Tensor, hidden: int, batch: int | None) -> None:
    """A hidden Markov model of padded series."""
    rows, _, keys = sequences.shape
    step = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(hidden) + 0.1).to_event(1))
    tone = pyro.sample("probs_y", dist.Beta(0.1, 0.9).expand([hidden, keys]).to_event(2))
    tones = pyro.plate("tones", keys, dim=-1)
    with pyro.plate("sequences", rows, batch, dim=-2) as index:
        x = 0
        for t in pyro.markov(range(int(lengths[index].max()))):
            with poutine.mask(mask=(t < lengths[index])[:, None]):
                x = pyro.sample(f"x_{t}", dist.Categorical(step[x]), infer={"enumerate": "parallel"})
                with tones:
                    pyro.sample(f"y_{t}", dist.Bernoulli(tone[x.squeeze(-1)]), obs=sequences[index, t])


class Deep(nn.Module):
    """Nets of a deep Markov model: the next latent given the last, and the keys given a latent."""

    def __init__(self, latent: int, hidden: int, keys: int = 88) -> None:
        super().__init__()
        self.latent = latent
        self.gate = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, latent), nn.Sigmoid())
        self.proposal = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, latent))
        self.spread = nn.Linear(latent, latent)
        self.keys = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, keys))
        self.first = nn.Parameter(torch.zeros(latent))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        proposal, gate = self.proposal(z), self.gate(z)
        return (1 - gate) * z + gate * proposal, nn.functional.softplus(self.spread(proposal.relu())) + 1e-3


def deep_model(nets: Deep, sequences: Tensor, lengths: Tensor, learn: bool = True) -> None:
    """Latents and keys beyond a sequence's length are masked."""
    if learn:
        pyro.module("nets", nets)
    z = nets.first.expand(len(sequences), nets.latent)
    with pyro.plate("rows", len(sequences), dim=-1):
        for t in range(sequences.shape[1]):
            there = (t < lengths)[:, None]
            loc, scale = nets(z)
            z = pyro.sample(f"z_{t}", dist.Normal(loc, scale).mask(there).to_event(1))
            logits = nets.keys(z)
            pyro.sample(f"x_{t}", dist.Bernoulli(logits=logits).mask(there).to_event(1), obs=sequences[:, t])


def cases() -> list[Case]:
    """All models that an autoguide can have, but for the hidden Markov model."""
    points, hits = torch.tensor(POINTS), torch.tensor(HITS, dtype=torch.float32)
    history, sex = cjs_data()
    found = [Case("gmm", gmm, (points,), AutoDelta, discrete=True, rates=(0.1, 0.01), truth=gmm_evidence(points))]
    for model in (pooled, not_pooled, partially_pooled, logit_pooled):
        truth = baseball_evidence(model.__name__, hits)
        found.append(Case(f"baseball, {model.__name__.replace('_', ' ')}", model, (hits,), truth=truth))
    for model in (cjs_1, cjs_2, cjs_3, cjs_4, cjs_5):
        known = model in (cjs_1, cjs_4)
        truth = cjs_evidence(history, sex, model is cjs_4) if known else None
        name = model.__name__.replace("_", " ")
        found.append(Case(name, model, (history, sex), AutoDiagonalNormal, discrete=True, truth=truth, simulated=True))
    return found
