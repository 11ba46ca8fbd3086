"""Eight schools (Rubin, 1981): the data, the centered model, and the exact posterior."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(y: Tensor = EFFECTS) -> None:
    """Effects of coaching in eight schools; their spread tau makes a funnel, as wide in theta as tau is large."""
    mu = pyro.sample("mu", dist.Normal(0, 5))
    tau = pyro.sample("tau", dist.HalfCauchy(5))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=y)


def exact_schools() -> tuple[float, dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """The log evidence, and two marginals of the posterior on grids: given mu and tau, all else is Gaussian."""
    log_tau, mu, theta = torch.linspace(-6, 5, 400), torch.linspace(-25, 30, 401), torch.linspace(-30, 60, 401)
    tau = log_tau.exp()[:, None]
    joint = dist.Normal(0, 5).log_prob(mu) + dist.HalfCauchy(5).log_prob(tau) + log_tau[:, None]  # (log tau, mu)
    joint = joint + dist.Normal(mu[:, None], (ERRORS**2 + tau[..., None] ** 2).sqrt()).log_prob(EFFECTS).sum(-1)
    evidence = joint.logsumexp((0, 1)) + torch.log((log_tau[1] - log_tau[0]) * (mu[1] - mu[0]))
    weights = joint.softmax(1)
    mean = (weights * mu).sum(1, keepdim=True)
    variance = (weights * (mu - mean) ** 2).sum(1, keepdim=True)
    shrink = tau**2 / (tau**2 + ERRORS[0] ** 2)  # theta[0] given mu and tau: mean mu + shrink (y - mu)
    scale = (ERRORS[0] ** 2 * shrink + (1 - shrink) ** 2 * variance).sqrt()
    first = dist.Normal(mean + shrink * (EFFECTS[0] - mean), scale).log_prob(theta)
    marginals = {"mu": (mu, joint), "theta": (theta, joint.logsumexp(1, keepdim=True) + first)}
    return evidence.item(), {name: (grid, log_tau, table.exp()) for name, (grid, table) in marginals.items()}
