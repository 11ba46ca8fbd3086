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


def guide(model: str, width: int, draws: int, args: list) -> dict[str, float]:
    """The ELBO of an inverse autoregressive flow with three layers."""
    args = [jnp.array(each) for each in args]
    auto = AutoIAFNormal(globals()[model], hidden_dims=[width, width], num_flows=3)
    svi = SVI(globals()[model], auto, numpyro.optim.Adam(1e-3), Trace_ELBO(num_particles=draws))
    state = svi.init(jax.random.key(0), *args)
    run = jax.jit(lambda state, *args: jax.lax.scan(lambda s, _: svi.update(s, *args), state, None, length=STEPS))
    return timed(run, state, *args)


if __name__ == "__main__":
    kind, *arguments = json.loads(sys.stdin.read())
    print(json.dumps(globals()[kind](*arguments)))
