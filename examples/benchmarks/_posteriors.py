"""Posteriors with known answers: models of posteriordb's Stan programs in Pyro, and synthetic ones with exact draws.

A folder laid out as posteriordb's ``posterior_database`` gives data and reference draws; a model here is known by the
name of its Stan program, so that every posterior of the folder that uses one of these programs can be run.  Sites have
the names of the program's parameters.  All models run for many draws at once: what they do to a latent leaves the
dimensions to the left alone.
"""

import json
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Size, Tensor
from torch.distributions import biject_to

__all__ = [
    "SYNTHETIC",
    "Drawable",
    "Draws",
    "Flat",
    "Posterior",
    "errors",
    "find",
    "funnel",
    "named",
    "right",
    "stored",
]

Draws = dict[str, Tensor]
Data = dict[str, Any]


class Drawable(dist.ImproperUniform):
    """A flat prior that can be asked for a draw: some point of its support.

    Pyro's initialization strategies call ``sample`` to learn a site's shape, so its autoguides and NUTS refuse a plain
    ``ImproperUniform``.
    """

    def sample(self, sample_shape: Size | tuple[int, ...] = ()) -> Tensor:
        onto = biject_to(self.support)
        return onto(torch.zeros(onto.inverse_shape(Size(sample_shape) + self.batch_shape + self.event_shape)))


Flat = type[dist.ImproperUniform]


# Models. Each takes the class of its flat priors, and the data that its ``read`` makes of the program's.


def regression(
    flat: Flat, x: Tensor, y: Tensor, beta_scale: float | None = None, sigma: dist.Distribution | None = None
) -> None:
    """A linear regression with normal noise; flat priors where none is given."""
    count = x.shape[1]
    prior = flat(constraints.real_vector, (), (count,))
    if beta_scale is not None:
        prior = dist.Normal(torch.zeros(count), beta_scale).to_event(1)
    beta = pyro.sample("beta", prior)
    noise = pyro.sample("sigma", flat(constraints.positive, (), ()) if sigma is None else sigma)
    mean = torch.einsum("...d,nd->...n", beta, x)
    pyro.sample("y", dist.Normal(mean, noise.unsqueeze(-1)).to_event(1), obs=y)


def autoregression(flat: Flat, lags: Tensor, y: Tensor) -> None:
    """An autoregressive series, given its first values."""
    order = lags.shape[1]
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(order), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = alpha.unsqueeze(-1) + torch.einsum("...k,tk->...t", beta, lags)
    pyro.sample("y", dist.Normal(mean, sigma.unsqueeze(-1)).to_event(1), obs=y)


def trend(flat: Flat, x: Tensor, y: Tensor, alpha_prior: tuple[float, float], beta_prior: tuple[float, float]) -> None:
    """A straight line, whose intercept lies far outside the data."""
    alpha = pyro.sample("alpha", dist.Normal(*alpha_prior))
    beta = pyro.sample("beta", dist.Normal(*beta_prior))
    sigma = pyro.sample("sigma", flat(constraints.positive, (), ()))
    with pyro.plate("years", len(x)):
        pyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)


def schools(flat: Flat, y: Tensor, error: Tensor, centered: bool) -> None:
    """Eight schools: effects around a common mean, known errors."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        if centered:
            effect = pyro.sample("theta", dist.Normal(mu, tau))
        else:
            effect = mu + tau * pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(effect, error), obs=y)


def gaussian_process(flat: Flat, x: Tensor, y: Tensor) -> None:
    """A Gaussian process with a squared exponential kernel; ``sigma`` is added to the diagonal as it is."""
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    length, height, noise = (value[..., None, None] for value in (rho, alpha, sigma))
    apart = (x.unsqueeze(-1) - x) / length
    covariance = height.square() * (-0.5 * apart.square()).exp() + noise * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance), obs=y)


def mixture(flat: Flat, y: Tensor) -> None:
    """Two normal parts in order."""
    mu = pyro.sample("mu", flat(constraints.ordered_vector, (), (2,)))
    pyro.factor("prior of mu", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
    sigma = pyro.sample("sigma", dist.HalfNormal(torch.full((2,), 2.0)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    with pyro.plate("rows", len(y)):
        first, second = (dist.Normal(mu[..., k], sigma[..., k]).log_prob(y) for k in (0, 1))
        pyro.factor("y", torch.logaddexp(theta.log() + first, (-theta).log1p() + second))


def hidden_markov(flat: Flat, y: Tensor) -> None:
    """Two states, summed out; the first has no prior."""
    rows = [pyro.sample(f"theta{k}", dist.Dirichlet(torch.ones(2))) for k in (1, 2)]
    mu = pyro.sample("mu", flat(constraints.positive_ordered_vector, (), (2,)))
    pyro.factor("prior of mu", dist.Normal(torch.tensor([3.0, 10.0]), 1.0).log_prob(mu).sum(-1))
    seen = dist.Normal(mu, 1.0).log_prob(y[0])  # Pyro's chain steps before it sees, so the first datum is its start
    pyro.factor("first", seen.logsumexp(-1))
    steps = torch.stack(rows, -2).log().unsqueeze(-3)
    chain = dist.DiscreteHMM(seen, steps, dist.Normal(mu.unsqueeze(-2), 1.0))
    pyro.sample("y", chain, obs=y[1:])


def funnel(dim: int, width: float = 3.0) -> None:
    """Neal's: a scale over e^9 and its reciprocal, and what it scales."""
    v = pyro.sample("v", dist.Normal(0.0, width))
    width = (0.5 * v).exp().unsqueeze(-1).expand(*v.shape, dim - 1)
    pyro.sample("x", dist.Normal(torch.zeros(dim - 1), width).to_event(1))


def banana(flat: Flat, dim: int) -> None:
    """Normal but for a parabola that its second dimension follows."""
    x = pyro.sample("x", flat(constraints.real_vector, (), (dim,)))
    straight = torch.cat([x[..., :1] / 5, x[..., 1:2] + 0.1 * (x[..., :1] ** 2 - 25), x[..., 2:]], -1)
    pyro.factor("density", -0.5 * straight.square().sum(-1))


def two_modes(flat: Flat, dim: int) -> None:
    """Seven tenths around 2 in all dimensions, three around -2."""
    x = pyro.sample("x", flat(constraints.real_vector, (), (dim,)))
    each = [math.log(share) - 0.5 * (x - at).square().sum(-1) for share, at in ((0.7, 2.0), (0.3, -2.0))]
    pyro.factor("density", torch.stack(each).logsumexp(0))


# What the models are given.


def _tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _columns(*columns: Tensor) -> Tensor:
    """With a column of ones before them."""
    return torch.stack([torch.ones_like(columns[0]), *columns], 1)


def _kidscore(d: Data) -> Data:
    school, iq = _tensor(d["mom_hs"]), _tensor(d["mom_iq"])
    return {"x": _columns(school, iq, school * iq), "y": _tensor(d["kid_score"]), "sigma": dist.HalfCauchy(2.5)}


def _logearn(d: Data) -> Data:
    height, male = _tensor(d["height"]), _tensor(d["male"])
    return {"x": _columns(height, male, height * male), "y": _tensor(d["earn"]).log()}


def _mesquite(d: Data) -> Data:
    first, second, canopy = (_tensor(d[k]) for k in ("diam1", "diam2", "canopy_height"))
    area, shape = (first * second).log(), (first / second).log()
    rest = [_tensor(d["total_height"]).log(), _tensor(d["density"]).log(), _tensor(d["group"])]
    return {"x": _columns(area + canopy.log(), area, shape, *rest), "y": _tensor(d["weight"]).log()}


def _blr(d: Data) -> Data:
    return {"x": _tensor(d["X"]), "y": _tensor(d["y"]), "beta_scale": 10.0, "sigma": dist.HalfNormal(10.0)}


def _series(d: Data) -> Data:
    y, order = _tensor(d["y"]), d["K"]
    return {"lags": y.unfold(0, order, 1)[:-1].flip(1), "y": y[order:]}


def _trend(d: Data) -> Data:
    priors = {f"{k}_prior": (float(d[f"pmu{k}"]), float(d[f"ps{k}"])) for k in ("alpha", "beta")}
    return {"x": _tensor(d["x"]), "y": _tensor(d["y"]), **priors}


def _schools(d: Data) -> Data:
    return {"y": _tensor(d["y"]), "error": _tensor(d["sigma"])}


def _effects(draws: Draws) -> Draws:
    """With the effects that the non-centered model scales."""
    return draws | {"theta": draws["mu"].unsqueeze(-1) + draws["tau"].unsqueeze(-1) * draws["theta_trans"]}


@dataclass(frozen=True)
class Program:
    """A Stan program in Pyro: the model, what it is given, and what is computed from its latents."""

    model: Callable[..., None]
    read: Callable[[Data], Data]
    derive: Callable[[Draws], Draws] = dict


PROGRAMS = {
    "arK": Program(autoregression, _series),
    "blr": Program(regression, _blr),
    "eight_schools_centered": Program(partial(schools, centered=True), _schools),
    "eight_schools_noncentered": Program(partial(schools, centered=False), _schools, _effects),
    "gp_regr": Program(gaussian_process, lambda d: {"x": _tensor(d["x"]), "y": _tensor(d["y"])}),
    "hmm_example": Program(hidden_markov, lambda d: {"y": _tensor(d["y"])}),
    "kidscore_interaction": Program(regression, _kidscore),
    "kilpisjarvi": Program(trend, _trend),
    "logearn_interaction": Program(regression, _logearn),
    "logmesquite_logvas": Program(regression, _mesquite),
    "low_dim_gauss_mix": Program(mixture, lambda d: {"y": _tensor(d["y"])}),
}


@dataclass(frozen=True)
class Posterior:
    """A model with its data bound, and draws of the true posterior by the names that :func:`named` gives."""

    name: str
    model: Callable[[Flat], Callable[[], None]]
    """Takes the class of the flat priors."""
    reference: Callable[[], Draws]
    derive: Callable[[Draws], Draws] = dict
    is_prior: bool = False
    """Whether the model is the density itself, without data."""
    kind: str = "real"
    """What makes it hard, for those that are made."""


def _unzip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(archive.namelist()[0]))


def stored(folder: Path) -> list[str]:
    """The folder's posteriors that have reference draws and a program known here."""
    names = []
    for path in sorted((folder / "posteriors").glob("*.json")):
        about = json.loads(path.read_text())
        if about["model_name"] in PROGRAMS and about.get("reference_posterior_name"):
            names.append(about["name"])
    return names


def find(name: str, folder: Path | None = None) -> Posterior:
    """A synthetic posterior, or one of the folder's."""
    if name in SYNTHETIC:
        return SYNTHETIC[name]
    about = json.loads((folder / "posteriors" / f"{name}.json").read_text())
    program = PROGRAMS[about["model_name"]]
    data = program.read(_unzip(folder / "data" / "data" / f"{about['data_name']}.json.zip"))

    def reference() -> Draws:
        where = folder / "reference_posteriors" / "draws" / "draws"
        chains = _unzip(where / f"{about['reference_posterior_name']}.json.zip")
        return {key: torch.cat([_tensor(chain[key]) for chain in chains]) for key in chains[0]}

    return Posterior(name, lambda flat: partial(program.model, flat, **data), reference, program.derive)


def _noise(dim: int) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(10_000, dim, generator=generator, dtype=torch.float64), generator


def _funnel_draws() -> Draws:
    noise, _ = _noise(10)
    v = 3 * noise[:, 0]
    return named({"v": v, "x": (0.5 * v).exp().unsqueeze(-1) * noise[:, 1:]})


def _banana_draws() -> Draws:
    x, _ = _noise(4)
    x[:, 0] *= 5
    x[:, 1] -= 0.1 * (x[:, 0] ** 2 - 25)
    return named({"x": x})


def _modes_draws() -> Draws:
    x, generator = _noise(4)
    first = torch.rand(len(x), 1, generator=generator, dtype=torch.float64) < 0.7
    return named({"x": x + torch.where(first, 2.0, -2.0)})


SYNTHETIC = {
    "funnel10": Posterior("funnel10", lambda flat: partial(funnel, 10), _funnel_draws, is_prior=True),
    "banana4": Posterior("banana4", lambda flat: partial(banana, flat, 4), _banana_draws),
    "two_modes4": Posterior("two_modes4", lambda flat: partial(two_modes, flat, 4), _modes_draws),
}


def named(draws: Mapping[str, Tensor]) -> Draws:
    """Scalars by Stan's names, ``beta[1]`` and so on, of draws with shapes ``(n, *shape)``."""
    found = {}
    for site, values in draws.items():
        for place in product(*(range(size) for size in values.shape[1:])):
            label = f"{site}[{','.join(str(k + 1) for k in place)}]" if place else site
            found[label] = values[(slice(None), *place)]
    return found


def errors(draws: Draws, reference: Draws) -> tuple[float, float]:
    """Largest error of a mean and of a standard deviation, over the reference's scalars, in its standard deviations.

    Boolean scalars are shares, and only their means count.
    """
    means, widths = [], []
    for key, true in reference.items():
        found, true = draws[key].double(), true.double()
        width = true.std()
        if width > 0:
            means.append(((found.mean() - true.mean()) / width).abs().item())
            if reference[key].dtype != torch.bool:
                widths.append((found.std() / width - 1).abs().item())
    return max(means), max(widths)


def right(pair: tuple[float, float]) -> bool:
    """Whether every mean is within a tenth of a standard deviation, and every standard deviation within a tenth."""
    return pair[0] <= 0.1 and pair[1] <= 0.1
