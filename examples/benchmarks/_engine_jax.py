"""Steps of flowjax and NumPyro, many in one ``scan``: CPU milliseconds of a step, and of compiling, as JSON.

The interpreter needs jax, flowjax and NumPyro; engines.py starts it.
"""

import json
import os
import sys
import time
from collections.abc import Callable

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from flowjax.bijections import Affine
from flowjax.distributions import Normal
from flowjax.flows import masked_autoregressive_flow
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoIAFNormal

STEPS, ROUNDS = 100, 5


def timed(run: Callable[..., object], *args: object) -> dict[str, float]:
    """Milliseconds of a step, and of the first call."""
    begin = time.process_time()
    jax.block_until_ready(run(*args))
    first, each = 1e3 * (time.process_time() - begin), []
    for _ in range(ROUNDS):
        begin = time.process_time()
        jax.block_until_ready(run(*args))
        each.append(1e3 * (time.process_time() - begin) / STEPS)
    return {"step": sorted(each)[ROUNDS // 2], "first": first}


def density(dim: int, width: int, layers: int, batch: int) -> dict[str, float]:
    """A masked autoregressive flow by likelihood, as in _peers.py: an affine head, hidden layers [H, H], ReLU."""
    flow = masked_autoregressive_flow(
        jax.random.key(0),
        base_dist=Normal(jnp.zeros(dim)),
        transformer=Affine(),
        flow_layers=layers,
        nn_width=width,
        nn_depth=2,
        invert=True,
    )
    params, static = eqx.partition(flow, eqx.is_inexact_array)
    optimizer = optax.adam(1e-4)
    data = jax.random.normal(jax.random.key(1), (5000, dim))

    def loss(params: object, rows: jax.Array) -> jax.Array:
        return -eqx.combine(params, static).log_prob(rows).mean()

    def step(state: tuple, key: jax.Array) -> tuple:
        params, moments = state
        rows = data[jax.random.randint(key, (batch,), 0, len(data))]
        value, grads = jax.value_and_grad(loss)(params, rows)
        updates, moments = optimizer.update(grads, moments)
        return (optax.apply_updates(params, updates), moments), value

    run = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys))
    return timed(run, (params, optimizer.init(params)), jax.random.split(jax.random.key(2), STEPS))


def schools(y: jax.Array, sigma: jax.Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", 8):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def regression(x: jax.Array, y: jax.Array) -> None:
    b = numpyro.sample("b", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ b), obs=y)


def hmm(y: jax.Array) -> None:
    p = numpyro.sample("p", dist.Beta(jnp.array([9.0, 9.0]), 1.0).to_event(1))
    mu = numpyro.sample("mu", dist.Normal(jnp.zeros(2), 3.0).to_event(1))
    move = jnp.log(jnp.array([[p[0], 1 - p[0]], [1 - p[1], p[1]]]))

    def step(alpha: jax.Array, value: jax.Array) -> tuple[jax.Array, None]:
        alpha = jax.nn.logsumexp(alpha[:, None] + move, 0) + dist.Normal(mu, 1.0).log_prob(value)
        return alpha, None

    alpha, _ = jax.lax.scan(step, jnp.log(jnp.array([0.5, 0.5])), y)
    numpyro.factor("y", jax.nn.logsumexp(alpha))


def lotka_volterra(y: jax.Array, count: int) -> None:
    a = numpyro.sample("a", dist.LogNormal(jnp.zeros(4), 0.3).to_event(1))
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    size, between = 2.0 / count, count // (len(y) - 1)

    def field(u: jax.Array) -> jax.Array:
        return jnp.stack([a[0] * u[0] - a[1] * u[0] * u[1], a[2] * u[0] * u[1] - a[3] * u[1]])

    def step(u: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        k1 = field(u)
        k2 = field(u + size / 2 * k1)
        k3 = field(u + size / 2 * k2)
        u = u + size / 6 * (k1 + 2 * k2 + 2 * k3 + field(u + size * k3))
        return u, u

    path = jax.lax.scan(step, jnp.ones(2), None, length=count)[1]
    path = jnp.concatenate([jnp.ones((1, 2)), path[between - 1 :: between]])
    numpyro.sample("y", dist.Normal(path, s).to_event(2), obs=y)


def guide(model: str, width: int, draws: int, args: list) -> dict[str, float]:
    """The ELBO of an inverse autoregressive flow with three layers."""
    args = [each if isinstance(each, int) else jnp.array(each) for each in args]
    auto = AutoIAFNormal(globals()[model], hidden_dims=[width, width], num_flows=3)
    svi = SVI(globals()[model], auto, numpyro.optim.Adam(1e-3), Trace_ELBO(num_particles=draws))
    state = svi.init(jax.random.key(0), *args)
    run = jax.jit(lambda state: jax.lax.scan(lambda s, _: svi.update(s, *args), state, None, length=STEPS))
    return timed(run, state)


if __name__ == "__main__":
    kind, *arguments = json.loads(sys.stdin.read())
    print(json.dumps(globals()[kind](*arguments)))
