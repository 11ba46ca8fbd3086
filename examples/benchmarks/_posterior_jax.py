"""NumPyro's NUTS on the programs of ``_posteriors.py``: draws, and CPU seconds of a first and a second run, as JSON.

The interpreter needs jax and NumPyro; posteriors.py starts it.  Models have the names and the arguments of their twins.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS

numpyro.enable_x64()


def flat(support: constraints.Constraint, *event_shape: int) -> dist.ImproperUniform:
    return dist.ImproperUniform(support, (), event_shape)


def regression(x: jax.Array, y: jax.Array, beta_scale: float | None = None, sigma: list | None = None) -> None:
    count = x.shape[1]
    prior = flat(constraints.real_vector, count)
    if beta_scale is not None:
        prior = dist.Normal(jnp.zeros(count), beta_scale).to_event(1)
    beta = numpyro.sample("beta", prior)
    noise = numpyro.sample("sigma", getattr(dist, sigma[0])(sigma[1]) if sigma else flat(constraints.positive))
    numpyro.sample("y", dist.Normal(x @ beta, noise).to_event(1), obs=y)


def autoregression(lags: jax.Array, y: jax.Array) -> None:
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(lags.shape[1]), 10.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma).to_event(1), obs=y)


def trend(x: jax.Array, y: jax.Array, alpha_prior: list, beta_prior: list) -> None:
    alpha = numpyro.sample("alpha", dist.Normal(*alpha_prior))
    beta = numpyro.sample("beta", dist.Normal(*beta_prior))
    sigma = numpyro.sample("sigma", flat(constraints.positive))
    numpyro.sample("y", dist.Normal(alpha + beta * x, sigma).to_event(1), obs=y)


def schools(y: jax.Array, error: jax.Array, centered: bool) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        if centered:
            effect = numpyro.sample("theta", dist.Normal(mu, tau))
        else:
            effect = mu + tau * numpyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(effect, error), obs=y)


def gaussian_process(x: jax.Array, y: jax.Array) -> None:
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    apart = (x[:, None] - x) / rho
    covariance = alpha**2 * jnp.exp(-0.5 * apart**2) + sigma * jnp.eye(len(x))
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(len(x)), covariance), obs=y)


def mixture(y: jax.Array) -> None:
    mu = numpyro.sample("mu", flat(constraints.ordered_vector, 2))
    numpyro.factor("prior of mu", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(jnp.full(2, 2.0)).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    first, second = (dist.Normal(mu[k], sigma[k]).log_prob(y) for k in (0, 1))
    numpyro.factor("y", jnp.logaddexp(jnp.log(theta) + first, jnp.log1p(-theta) + second).sum())


def hidden_markov(y: jax.Array) -> None:
    rows = [numpyro.sample(f"theta{k}", dist.Dirichlet(jnp.ones(2))) for k in (1, 2)]
    mu = numpyro.sample("mu", flat(constraints.positive_ordered_vector, 2))
    numpyro.factor("prior of mu", dist.Normal(jnp.array([3.0, 10.0]), 1.0).log_prob(mu).sum())
    move, seen = jnp.log(jnp.stack(rows)), dist.Normal(mu, 1.0).log_prob(y[:, None])

    def step(alpha: jax.Array, emission: jax.Array) -> tuple[jax.Array, None]:
        return jax.nn.logsumexp(alpha[:, None] + move, 0) + emission, None

    alpha, _ = jax.lax.scan(step, seen[0], seen[1:])
    numpyro.factor("y", jax.nn.logsumexp(alpha))


def chain(model: Callable[..., None], given: dict, seed: int, warmup: int, count: int) -> dict[str, object]:
    """Draws of one chain, and the CPU seconds of a first run, which compiles, and of a second one."""
    rows = {k: jnp.array(v) for k, v in given.items() if isinstance(v, list) and k in ("x", "y", "lags", "error")}
    kernel = NUTS(functools.partial(model, **{k: v for k, v in given.items() if k not in rows}))
    sampler = MCMC(kernel, num_warmup=warmup, num_samples=count, progress_bar=False, jit_model_args=True)
    seconds = []
    for key in (seed + 1, seed):
        begin = time.process_time()
        sampler.run(jax.random.key(key), extra_fields=("diverging", "num_steps"), **rows)
        draws = jax.block_until_ready(sampler.get_samples())
        seconds.append(time.process_time() - begin)
    extra = sampler.get_extra_fields()
    return {
        "draws": {name: values.tolist() for name, values in draws.items()},
        "seconds": seconds,
        "divergences": int(extra["diverging"].sum()),
        "gradients": int(extra["num_steps"].sum()),
    }


if __name__ == "__main__":
    name, *arguments = json.loads(sys.stdin.read())
    print(json.dumps(chain(globals()[name], *arguments)))
