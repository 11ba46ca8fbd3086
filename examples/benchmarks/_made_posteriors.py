"""Made posteriors with known answers, by what makes them hard: modes, curves, scales, structure, kinks and tails.

Each has exact draws, or those of a long Gibbs run (the horseshoe).  What is compared are ``derive``'s scalars: where
tails have no moments, or ones that hang on a few draws, an ``asinh`` or a logarithm stands for the latent; Boolean
scalars tell the mode of a draw, and only their means, the modes' shares, count.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from _posteriors import Draws, Flat, Posterior, funnel, named
from pyro.distributions import constraints
from torch import Generator, Tensor

__all__ = ["MADE"]

COUNT = 20_000


def _generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed), dtype=torch.float64)


def _uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=_generator(seed), dtype=torch.float64)


def _picked(log_weights: Tensor, seed: int = 0, count: int = COUNT) -> Tensor:
    """Rows by their weights."""
    return torch.multinomial(log_weights.softmax(0), count, True, generator=_generator(seed))


def _log_normal(x: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    scale = torch.as_tensor(scale, dtype=torch.float64)
    return -0.5 * ((x - loc) / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)


Density = Callable[[Tensor], Tensor]


def vector(flat: Flat, dim: int, log_density: Density) -> None:
    """A density of one vector."""
    x = pyro.sample("x", flat(constraints.real_vector, (), (dim,)))
    pyro.factor("density", log_density(x))


def _of_vector(
    name: str, kind: str, dim: int, log_density: Density, draw: Callable[[], Tensor], derive: Callable = dict
) -> Posterior:
    def reference() -> Draws:
        return derive({"x": draw()})

    return Posterior(name, lambda flat: partial(vector, flat, dim, log_density), reference, derive, kind=kind)


# Modes.


def _mixture(name: str, kind: str, dim: int, parts: Sequence[tuple[float, Sequence[float], float]]) -> Posterior:
    """Round normals: share, first coordinates of the center (the rest are 0) and standard deviation of each."""
    share, scale = (torch.tensor([part[k] for part in parts], dtype=torch.float64) for k in (0, 2))
    loc = torch.zeros(len(parts), dim, dtype=torch.float64)
    for row, (_, center, _) in zip(loc, parts, strict=True):
        row[: len(center)] = torch.tensor(center)

    def each(x: Tensor) -> Tensor:
        far = ((x.unsqueeze(-2) - loc) / scale.unsqueeze(-1)).square().sum(-1)
        return share.log() - dim * scale.log() - 0.5 * far

    def draw() -> Tensor:
        which = _picked(share.log(), 1)
        return loc[which] + scale[which].unsqueeze(-1) * _noise(COUNT, dim)

    def derive(draws: Draws) -> Draws:
        nearest = each(draws["x"].double()).argmax(-1, keepdim=True)
        return draws | {"mode": nearest == torch.arange(len(parts))}

    return _of_vector(name, kind, dim, lambda x: each(x).logsumexp(-1), draw, derive)


def labels(flat: Flat, y: Tensor, count: int, noise: float) -> None:
    """Centers of a mixture of equal parts, whose labels can be exchanged."""
    with pyro.plate("centers", count):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    each = dist.Normal(mu.unsqueeze(-2), noise).log_prob(y.unsqueeze(-1))
    pyro.factor("y", each.logsumexp(-1).sum(-1))


def _labels(count: int, rows: int, noise: float) -> Posterior:
    centers = 4.0 * noise * (torch.arange(count, dtype=torch.float64) - (count - 1) / 2 + 0.1)
    y = (centers.unsqueeze(-1) + noise * _noise(count, rows, seed=count)).flatten()

    def reference() -> Draws:
        # The centers in order, by importance sampling, then in any order.
        start = y.unflatten(0, (count, rows)).mean(-1)
        wide = 1.5 * noise * rows**-0.5
        mu = start + wide * _noise(20 * COUNT, count)
        log_p = _log_normal(mu, 0.0, 5.0).sum(-1)
        for datum in y:
            log_p += _log_normal(datum, mu, noise).logsumexp(-1)
        log_weights = log_p - _log_normal(mu, start, wide).sum(-1)
        mu = mu[_picked(log_weights.masked_fill((mu.diff() <= 0).any(-1), -math.inf))]
        return derive({"mu": mu.gather(1, _uniform(COUNT, count, seed=2).argsort(-1))})

    def derive(draws: Draws) -> Draws:
        # Which center has which rank; mean and spread of the ordered ones.
        rank = draws["mu"].argsort(-1)
        return {
            "mu": draws["mu"],
            "ordered": draws["mu"].sort(-1).values,
            "mode": rank.unsqueeze(-1) == torch.arange(count),
        }

    data = {"y": y, "count": count, "noise": noise}
    return Posterior(
        f"labels{count}", lambda flat: partial(labels, flat, **data), reference, derive, kind="missed modes"
    )


# Curves.


def _steps(dim: int, noise: float) -> Posterior:
    """A chain of Rosenbrock steps: each value follows the square of the one before."""

    def log_density(x: Tensor) -> Tensor:
        return _log_normal(x[..., 0], 0.8, 0.6) + _log_normal(x[..., 1:], x[..., :-1].square(), noise).sum(-1)

    def draw() -> Tensor:
        normal = _noise(dim, COUNT)
        values = [0.8 + 0.6 * normal[0]]
        for k in range(1, dim):
            values.append(values[-1].square() + noise * normal[k])
        return torch.stack(values, -1)

    return _of_vector(f"steps{dim}", "curved", dim, log_density, draw, asinh)


def asinh(draws: Draws) -> Draws:
    return {name: value.asinh() for name, value in draws.items()}


def _banana(dim: int, bend: float, noise: float) -> Posterior:
    """A sharp parabola in the first two dimensions."""

    def log_density(x: Tensor) -> Tensor:
        middle = bend * (x[..., 0].square() - 1)
        rest = _log_normal(x[..., 2:], 0.0, 1.0).sum(-1)
        return _log_normal(x[..., 0], 0.0, 1.0) + _log_normal(x[..., 1], middle, noise) + rest

    def draw() -> Tensor:
        x = _noise(COUNT, dim)
        x[:, 1] = bend * (x[:, 0].square() - 1) + noise * x[:, 1]
        return x

    return _of_vector(f"banana{dim}_{noise:g}", "curved" if noise < 0.5 else "plain", dim, log_density, draw)


def _ring(dim: int, radius: float, noise: float) -> Posterior:
    """A circle, or a sphere, with a normal radius."""

    def log_density(x: Tensor) -> Tensor:
        r = (x.square().sum(-1) + 1e-12).sqrt()
        return _log_normal(r, radius, noise) - (dim - 1) * r.log()

    def draw() -> Tensor:
        along = _noise(COUNT, dim)
        return (radius + noise * _noise(COUNT, 1, seed=1)) * along / along.norm(dim=-1, keepdim=True)

    def derive(draws: Draws) -> Draws:
        return draws | {"radius": draws["x"].norm(dim=-1), "side": draws["x"] > 0}

    return _of_vector(f"ring{dim}_{radius:g}", "curved", dim, log_density, draw, derive)


def _funnel(dim: int, width: float) -> Posterior:
    def reference() -> Draws:
        v = width * _noise(COUNT, seed=1)
        return derive({"v": v, "x": (0.5 * v).exp().unsqueeze(-1) * _noise(COUNT, dim - 1)})

    def derive(draws: Draws) -> Draws:
        return {"v": draws["v"], "x": draws["x"].asinh()}

    name = f"funnel{dim}_{width:g}"
    return Posterior(name, lambda flat: partial(funnel, dim, width), reference, derive, is_prior=True, kind="curved")


# Structure.


def hierarchy(flat: Flat, y: Tensor, error: Tensor, centered: bool) -> None:
    """Normal effects around a common mean."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(3.0))
    with pyro.plate("members", len(y)):
        if centered:
            theta = pyro.sample("theta", dist.Normal(mu, tau))
        else:
            theta = mu + tau * pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, error), obs=y)


def _with_theta(draws: Draws) -> Draws:
    """Logarithms of scales; effects in the model's units."""
    mu, tau = draws["mu"], draws["tau"]
    theta = draws.get("theta")
    if theta is None:
        theta = mu.unsqueeze(-1) + tau.unsqueeze(-1) * draws["effect"]
    extra = {name: draws[name] for name in ("slope",) if name in draws}
    logs = {f"log {name}": draws[name].log() for name in ("tau", "sigma") if name in draws}
    return {"mu": mu, **logs, "theta": theta, **extra}


def _grid(low: float, high: float, count: int) -> Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64)


def _jittered(grid: Tensor, rows: Tensor, seed: int) -> Tensor:
    """Points of a grid, spread evenly over its cells."""
    return grid[rows] + (grid[1] - grid[0]) * (_uniform(len(rows), seed=seed) - 0.5)


def _hierarchy(count: int, centered: bool) -> Posterior:
    error = 0.5 + 1.5 * _uniform(count, seed=3)
    y = 1.0 + 1.5 * _noise(count, seed=4) + error * _noise(count, seed=5)

    def reference() -> Draws:
        log_tau = _grid(-9.0, 3.0, 6000)
        spread = (2 * log_tau).exp().unsqueeze(-1) + error.square()  # of y around mu
        precision = 1 / 25 + (1 / spread).sum(-1)
        middle = (y / spread).sum(-1) / precision
        log_p = _log_normal(y, 0.0, spread.sqrt()).sum(-1) + 0.5 * precision * middle.square() - 0.5 * precision.log()
        log_p += log_tau + _log_normal(log_tau.exp(), 0.0, 3.0)
        rows = _picked(log_p)
        tau = _jittered(log_tau, rows, 1).exp()
        mu = middle[rows] + precision[rows].rsqrt() * _noise(COUNT, seed=2)
        own = 1 / (1 / error.square() + tau.unsqueeze(-1) ** -2)
        center = own * (y / error.square() + (mu / tau.square()).unsqueeze(-1))
        return _with_theta({"mu": mu, "tau": tau, "theta": center + own.sqrt() * _noise(COUNT, count)})

    name = f"hierarchy{count}{'' if centered else '_free'}"
    data = {"y": y, "error": error, "centered": centered}
    return Posterior(name, lambda flat: partial(hierarchy, flat, **data), reference, _with_theta, kind="structure")


def houses(flat: Flat, x: Tensor, y: Tensor, county: Tensor, count: int, centered: bool) -> None:
    """A level for each county, one slope and one noise, as in the radon study."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("counties", count):
        if centered:
            theta = pyro.sample("theta", dist.Normal(mu, tau))
        else:
            theta = mu + tau * pyro.sample("effect", dist.Normal(0.0, 1.0))
    with pyro.plate("houses", len(y)):
        pyro.sample("y", dist.Normal(theta[..., county] + slope.unsqueeze(-1) * x, sigma.unsqueeze(-1)), obs=y)


def _houses(count: int, rows: int, centered: bool) -> Posterior:
    # Sizes of counties are as uneven as real ones are.
    county = (count * _uniform(rows, seed=6).square()).long().sort().values
    x = (_uniform(rows, seed=7) < 0.2).double()
    y = 1.4 + 0.35 * _noise(count, seed=8)[county] - 0.6 * x + 0.75 * _noise(rows, seed=9)

    def reference() -> Draws:
        # Given both scales all is normal: a grid over them, then exact draws, the coefficients first.
        log_tau, log_sigma = _grid(-5.0, 0.5, 220), _grid(-0.6, 0.1, 120)
        tau2, sigma2 = (t.flatten() for t in torch.meshgrid((2 * log_tau).exp(), (2 * log_sigma).exp(), indexing="ij"))
        z = torch.stack([torch.ones_like(x), x, y], -1)
        sums = torch.zeros(count, 3, dtype=torch.float64).index_add(0, county, z)
        size = sums[:, 0]
        shrink = tau2 / (sigma2 + tau2 * size.unsqueeze(-1))  # (counties, cells)
        gram = (z.T @ z)[..., None] - torch.einsum("gi,gj,gc->ijc", sums, sums, shrink)
        gram = gram.movedim(-1, 0) / sigma2[:, None, None]
        precision, pull = gram[:, :2, :2] + torch.eye(2) / 9, gram[:, :2, 2:]
        mean = torch.linalg.solve(precision, pull)
        log_p = -0.5 * ((rows - count) * sigma2.log() + (sigma2 + tau2 * size.unsqueeze(-1)).log().sum(0))
        log_p += 0.5 * ((pull * mean).sum((-2, -1)) - gram[:, 2, 2] - torch.logdet(precision))
        log_p += 0.5 * (tau2.log() + sigma2.log() - tau2 - sigma2)
        cells = _picked(log_p)
        tau = _jittered(log_tau, cells // len(log_sigma), 1).exp()
        sigma = _jittered(log_sigma, cells % len(log_sigma), 2).exp()
        factor = torch.linalg.cholesky(precision[cells])
        own = torch.linalg.solve_triangular(factor.mT, _noise(COUNT, 2, 1, seed=3), upper=True)
        mu, slope = (mean[cells] + own).squeeze(-1).unbind(-1)
        precise = size / sigma.square().unsqueeze(-1) + tau.unsqueeze(-1) ** -2
        left = sums[:, 2] - slope.unsqueeze(-1) * sums[:, 1]
        center = (left / sigma.square().unsqueeze(-1) + (mu / tau.square()).unsqueeze(-1)) / precise
        theta = center + precise.rsqrt() * _noise(COUNT, count, seed=4)
        return _with_theta({"mu": mu, "tau": tau, "sigma": sigma, "slope": slope, "theta": theta})

    name = f"houses{count}{'' if centered else '_free'}"
    data = {"x": x, "y": y, "county": county, "count": count, "centered": centered}
    return Posterior(name, lambda flat: partial(houses, flat, **data), reference, _with_theta, kind="structure")


def successes(flat: Flat, trials: Tensor, y: Tensor, centered: bool) -> None:
    """Binomial counts with normal log odds."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", len(y)):
        if centered:
            theta = pyro.sample("theta", dist.Normal(mu, tau))
        else:
            theta = mu + tau * pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Binomial(total_count=trials, logits=theta), obs=y)


def _successes(count: int, centered: bool) -> Posterior:
    trials = (5 + 20 * _uniform(count, seed=10)).floor()
    odds = -0.5 + 0.8 * _noise(count, seed=11)
    y = torch.binomial(trials, odds.sigmoid(), generator=_generator(12))

    def reference() -> Draws:
        # Groups are alone given mu and tau: a grid over both, and one for each group's log odds.
        at, log_tau = _grid(-1.6, 0.6, 80), _grid(-4.0, 1.0, 120)
        standard = _grid(-7.0, 7.0, 141)
        log_p = torch.zeros(len(at), len(log_tau), dtype=torch.float64)
        theta = at[:, None, None] + log_tau.exp()[:, None] * standard
        plus, prior = torch.nn.functional.softplus(theta), -0.5 * standard.square()
        for n, k in zip(trials, y, strict=True):
            log_p += (k * theta - n * plus + prior).logsumexp(-1)
        log_p += _log_normal(at, 0.0, 2.0).unsqueeze(-1) + log_tau - 0.5 * (2 * log_tau).exp()
        cells = _picked(log_p.flatten())
        mu, tau = _jittered(at, cells // len(log_tau), 1), _jittered(log_tau, cells % len(log_tau), 2).exp()
        effects = []
        for j, (n, k) in enumerate(zip(trials, y, strict=True)):
            theta = mu.unsqueeze(-1) + tau.unsqueeze(-1) * standard
            weights = (k * theta - n * torch.nn.functional.softplus(theta) + prior).softmax(-1)
            rows = torch.multinomial(weights, 1, generator=_generator(20 + j)).squeeze(-1)
            effects.append(_jittered(standard, rows, 1000 + j))
        return _with_theta({"mu": mu, "tau": tau, "effect": torch.stack(effects, -1)})

    name = f"successes{count}{'' if centered else '_free'}"
    data = {"trials": trials, "y": y, "centered": centered}
    return Posterior(name, lambda flat: partial(successes, flat, **data), reference, _with_theta, kind="structure")


def horseshoe(flat: Flat, x: Tensor, y: Tensor, scale: float) -> None:
    """A sparse regression with noise of one."""
    tau = pyro.sample("tau", dist.HalfCauchy(scale))
    with pyro.plate("columns", x.shape[1]):
        width = pyro.sample("lambda", dist.HalfCauchy(1.0))
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
    beta = tau.unsqueeze(-1) * width * effect
    pyro.sample("y", dist.Normal(torch.einsum("...d,nd->...n", beta, x), 1.0).to_event(1), obs=y)


def _horseshoe(rows: int, count: int, scale: float = 0.3) -> Posterior:
    x = _noise(rows, count, seed=13)
    y = 1.5 * x[:, 0] - 0.8 * x[:, 1] + _noise(rows, seed=14)

    def reference() -> Draws:
        """Gibbs by inverse gammas (Makalic and Schmidt, 2015, arXiv:1508.03884), 300 chains of 700 steps."""
        chains, kept = 300, []
        local, common = torch.ones(chains, count, dtype=torch.float64), torch.full((chains, 1), 0.1).double()

        def inverse_gamma(shape: float, rate: Tensor) -> Tensor:
            return rate / torch._standard_gamma(torch.full_like(rate, shape))

        with torch.random.fork_rng():
            torch.manual_seed(0)
            for step in range(700):
                precision = x.T @ x + torch.diag_embed(1 / (local * common).clamp(min=1e-14))
                factor = torch.linalg.cholesky(precision)
                mean = torch.cholesky_solve((x.T @ y).expand(chains, -1).unsqueeze(-1), factor)
                noise = torch.randn(chains, count, 1, dtype=torch.float64)
                beta = (mean + torch.linalg.solve_triangular(factor.mT, noise, upper=True)).squeeze(-1)
                local = inverse_gamma(1.0, 1 / inverse_gamma(1.0, 1 + 1 / local) + beta.square() / (2 * common))
                share = (beta.square() / local).sum(-1, keepdim=True) / 2
                common = inverse_gamma(0.5 * (count + 1), 1 / inverse_gamma(1.0, scale**-2 + 1 / common) + share)
                if step >= 200 and step % 10 == 0:
                    kept.append((0.5 * common.log().squeeze(-1), 0.5 * local.log(), beta))
        log_tau, log_lambda, beta = map(torch.cat, zip(*kept, strict=True))
        return {"log tau": log_tau, "log lambda": log_lambda, "beta": beta}

    def derive(draws: Draws) -> Draws:
        tau, width = draws["tau"], draws["lambda"]
        beta = tau.unsqueeze(-1) * width * draws["effect"]
        return {"log tau": tau.log(), "log lambda": width.log(), "beta": beta}

    data = {"x": x, "y": y, "scale": scale}
    name = f"horseshoe{count}"
    return Posterior(name, lambda flat: partial(horseshoe, flat, **data), reference, derive, kind="structure")


# Kinks and tails.


def kinks(flat: Flat, y: Tensor, error: float) -> None:
    """Means with a prior that has a kink at zero."""
    with pyro.plate("rows", len(y)):
        x = pyro.sample("x", dist.Laplace(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, error), obs=y)


def _kinks(count: int, error: float) -> Posterior:
    y = 1.5 * _noise(count, seed=15)

    def reference() -> Draws:
        grid = _grid(-20.0, 20.0, 20_001)
        columns = []
        for k, datum in enumerate(y):
            rows = _picked(_log_normal(datum, grid, error) - grid.abs(), k)
            columns.append(_jittered(grid, rows, 100 + k))
        return {"x": torch.stack(columns, -1)}

    data = {"y": y, "error": error}
    return Posterior(f"kinks{count}", lambda flat: partial(kinks, flat, **data), reference, kind="kinks and tails")


def tails(count: int, freedom: float) -> None:
    """Student's t in each dimension."""
    with pyro.plate("dims", count):
        pyro.sample("x", dist.StudentT(freedom, 0.0, 1.0))


def _tails(count: int, freedom: float) -> Posterior:
    def reference() -> Draws:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            half = torch.full((COUNT, count), 0.5 * freedom, dtype=torch.float64)
            return {"x": (_noise(COUNT, count) * (half / torch._standard_gamma(half)).sqrt()).asinh()}

    name = f"tails{count}_{freedom:g}"
    model = partial(tails, count, freedom)
    return Posterior(name, lambda flat: model, reference, asinh, is_prior=True, kind="kinks and tails")


def parts(flat: Flat, concentration: Tensor, y: Tensor) -> None:
    """Shares of a whole, some of them never seen."""
    p = pyro.sample("p", dist.Dirichlet(concentration))
    pyro.factor("y", torch.xlogy(y, p).sum(-1))


def _parts(*concentration: float) -> Posterior:
    prior = torch.full((len(concentration),), min(concentration), dtype=torch.float64)
    posterior = torch.tensor(concentration, dtype=torch.float64)

    def reference() -> Draws:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            drawn = torch._standard_gamma(posterior.expand(COUNT, -1))
            return {"p": drawn / drawn.sum(-1, keepdim=True)}

    data = {"concentration": prior, "y": posterior - prior}
    name = f"parts{len(concentration)}"
    return Posterior(name, lambda flat: partial(parts, flat, **data), reference, kind="kinks and tails")


# Plain ones, for alarms without cause.


def _stretched(dim: int, condition: float) -> Posterior:
    turn, _ = torch.linalg.qr(_noise(dim, dim, seed=16))
    scale = torch.logspace(0, 0.5 * math.log10(condition), dim, dtype=torch.float64)

    def log_density(x: Tensor) -> Tensor:
        return -0.5 * (x @ turn / scale).square().sum(-1)

    def draw() -> Tensor:
        return _noise(COUNT, dim) * scale @ turn.T

    return _of_vector(f"stretched{dim}", "plain", dim, log_density, draw)


def rates(flat: Flat, exposure: Tensor, y: Tensor) -> None:
    """Rates of counts, each alone."""
    with pyro.plate("rows", len(y)):
        rate = pyro.sample("rate", dist.Gamma(1.5, 1.0))
        pyro.sample("y", dist.Poisson(rate * exposure), obs=y)


def _rates() -> Posterior:
    y = torch.tensor([0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 40.0], dtype=torch.float64)
    exposure = _grid(1.0, 4.0, len(y))

    def reference() -> Draws:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return {"rate": torch._standard_gamma((y + 1.5).expand(COUNT, -1)) / (1 + exposure)}

    return Posterior("rates8", lambda flat: partial(rates, flat, exposure, y), reference, kind="plain")


def _scalars(draw: Callable[[], Draws]) -> Draws:
    return named(draw())


_ALL = [
    _mixture("far2_16", "far modes", 2, [(0.7, (0.0,), 1.0), (0.3, (16.0,), 1.0)]),
    _mixture("far2_200", "far modes", 2, [(0.5, (0.0, 0.0), 1.0), (0.5, (120.0, 160.0), 1.0)]),
    _mixture("far10_40", "far modes", 10, [(0.6, (5.0, 5.0), 1.0), (0.4, (-20.0, 20.0, 18.0), 1.0)]),
    _mixture("needle2", "needles", 2, [(0.6, (0.0,), 1.0), (0.4, (3.0, 1.0), 0.01)]),
    _mixture("spike5", "needles", 5, [(0.5, (0.0,), 3.0), (0.5, (0.0,), 0.05)]),
    _mixture("bridge2", "missed modes", 2, [(0.65, (-4.0,), 1.0), (0.34, (5.0,), 0.7), (0.01, (0.5,), 1.5)]),
    _mixture("bridge6", "missed modes", 6, [(0.5, (-5.0,), 1.0), (0.49, (5.0, 2.0), 1.0), (0.01, (0.0, 1.0), 1.5)]),
    _mixture(
        "four3",
        "missed modes",
        3,
        [(0.35, (5.0,), 1.0), (0.3, (-6.0, 0.0, -1.0), 0.6), (0.2, (0.0, 6.0, 0.5), 0.8), (0.15, (0.0, -5.5), 0.5)],
    ),
    _labels(2, 10, 0.8),
    _labels(3, 8, 0.7),
    _labels(4, 8, 0.6),
    _steps(3, 0.5),
    _steps(5, 0.25),
    _banana(2, 3.0, 0.1),
    _banana(2, 3.0, 0.03),
    _banana(8, 2.0, 0.1),
    _ring(2, 4.0, 0.3),
    _ring(2, 10.0, 0.3),
    _ring(3, 5.0, 0.3),
    _funnel(5, 4.0),
    _funnel(10, 3.0),
    _funnel(10, 4.0),
    _mixture(
        "narrow10",
        "narrow mode",
        10,
        [(0.4, (5.0,), 1.0), (0.3, (-6.0, 0.0, -1.0), 0.7), (0.2, (0.0, 6.0, 0.5), 1.0), (0.1, (0.0, -5.5), 0.5)],
    ),
    _mixture("narrow4", "narrow mode", 4, [(0.6, (0.0,), 2.0), (0.25, (8.0,), 1.5), (0.15, (4.0, 7.0), 0.2)]),
    _hierarchy(8, True),
    _hierarchy(8, False),
    _hierarchy(100, True),
    _successes(30, True),
    _successes(30, False),
    _houses(30, 300, True),
    _houses(85, 900, True),
    _houses(85, 900, False),
    _horseshoe(40, 10),
    _horseshoe(60, 20),
    _kinks(5, 1.5),
    _kinks(20, 1.5),
    _tails(10, 2.0),
    _tails(4, 3.0),
    _parts(0.1, 0.3, 1.0, 3.0, 10.0),
    _parts(0.2, 0.2, 0.5, 0.5, 1.0, 2.0, 30.0, 60.0),
    _stretched(20, 1e4),
    _banana(2, 0.5, 0.7),
    _rates(),
]
MADE = {each.name: replace(each, reference=partial(_scalars, each.reference)) for each in _ALL}
