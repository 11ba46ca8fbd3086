"""Pyro's guides and NUTS, and NumPyro's, on a posterior of ``_posteriors.py``, scored as ``posteriors.py`` scores."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from _posteriors import Drawable, Posterior, errors, named
from pyro import infer, poutine
from pyro.distributions.torch_transform import ComposeTransformModule
from pyro.distributions.transforms import affine_coupling, permute
from pyro.infer import MCMC, Trace_ELBO, autoguide
from pyro.infer.autoguide import AutoGuide
from pyro.infer.importance import vectorized_importance_weights
from pyro.ops.stats import effective_sample_size
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_flows.infer.diagnostics import importance, resample

__all__ = ["NUMPYRO", "NUTS", "PEERS", "numpyro_nuts", "nuts", "nuts_within", "peer"]

PEERS = ("AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal x3", "AutoNormalizingFlow")
NUTS = "NUTS"
NUMPYRO = "NumPyro's NUTS"
PARTICLES = 16
Row = dict[str, object]


def _couplings(dim: int) -> ComposeTransformModule:
    """As many as ``fit_guide`` has, and as wide; without permutations half of the dimensions would stay as they are."""
    parts = []
    for _ in range(8):
        parts += [affine_coupling(dim, hidden_dims=[32, 32]), permute(dim)]
    return ComposeTransformModule(parts[:-1])


def _peer(method: str, model: Callable[[], None]) -> AutoGuide:
    if method == "AutoIAFNormal x3":
        return autoguide.AutoIAFNormal(model, num_transforms=3)
    if method == "AutoNormalizingFlow":
        return autoguide.AutoNormalizingFlow(model, _couplings)
    return getattr(autoguide, method)(model)


def peer(method: str, posterior: Posterior, seed: int, seconds: float, count: int) -> Row:
    """A guide of Pyro's, trained as ``ClippedAdam`` in its tutorials: a tenth of the step size is left at the end."""
    model = posterior.model(Drawable)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    start = time.process_time()
    guide = _peer(method, model)
    guide()  # makes its parameters
    nesting = _nesting(poutine.trace(model).get_trace())
    loss = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=nesting)
    optimizer = torch.optim.Adam(guide.parameters(), lr=1e-2)
    steps = failed = 0
    while (done := (time.process_time() - start) / seconds) < 1 and failed < 1000:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * 0.1**done
        steps += 1
        optimizer.zero_grad()
        try:
            value = loss.differentiable_loss(model, guide)
            value.backward()
        except (ValueError, RuntimeError):  # a draw for which the model has no density
            failed += 1
            continue
        gradients = [p.grad for p in guide.parameters() if p.grad is not None]
        if not all(gradient.isfinite().all() for gradient in gradients):
            failed += 1
            continue
        torch.nn.utils.clip_grad_value_(guide.parameters(), 10.0)
        optimizer.step()
    found = {"gradients": steps * PARTICLES, "evaluations": 0, "cpu": time.process_time() - start, "steps": steps}
    found["notes"] = [f"{failed} of {steps} steps failed"] if failed else []
    return found | _weighted(posterior, model, guide, count)


def _nesting(trace: poutine.Trace) -> int:
    plates = [frame for site in trace.nodes.values() for frame in site.get("cond_indep_stack", ())]
    return max((-frame.dim for frame in plates if frame.vectorized), default=0)


def _weighted(posterior: Posterior, model: Callable[[], None], guide: AutoGuide, count: int) -> Row:
    """Draws of any guide, and their weights, by Pyro's own means."""
    trace = poutine.trace(model).get_trace()
    nesting = _nesting(trace)
    latents = [name for name in trace.stochastic_nodes if not site_is_subsample(trace.nodes[name])]
    shapes = {n: trace.nodes[n]["value"].shape for n in latents}

    @torch.no_grad()
    def draw(n: int) -> tuple[dict[str, Tensor], Tensor]:
        parts, weights = [], []
        for _ in range(max(1, n // 1000)):
            try:
                weight, seen, _ = vectorized_importance_weights(
                    model, guide, num_samples=min(n, 1000), max_plate_nesting=nesting
                )
            except (ValueError, RuntimeError):
                continue
            parts.append({k: seen.nodes[k]["value"].reshape(-1, *shapes[k]) for k in latents})
            weights.append(weight)
        return {k: torch.cat([part[k] for part in parts]) for k in latents}, torch.cat(weights)

    reference = posterior.reference()
    draws, log_weights = draw(count)
    found = importance(log_weights)
    many, their_weights = draw(4 * count)
    rows = torch.arange(len(their_weights), dtype=torch.float64).unsqueeze(-1)
    chosen = resample(rows, their_weights, count).squeeze(-1).long()
    better = {k: value[chosen] for k, value in many.items()}
    return {
        "ess": found.ess,
        "khat": found.khat,
        "errors": errors(named(posterior.derive(draws)), reference),
        "resampled": errors(named(posterior.derive(better)), reference),
        "verdict": "-",
        "elbo": found.elbo,
        "log_evidence": found.log_evidence,
    }


class _Counted:
    """A model that counts its runs."""

    def __init__(self, model: Callable[[], None]) -> None:
        self.model, self.runs = model, 0

    def __call__(self) -> None:
        self.runs += 1
        self.model()


def effective(draws: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The smallest effective sample size of a scalar of one chain; shares of modes have none."""
    moving = [key for key, values in reference.items() if values.dtype != torch.bool and values.std() > 0]
    return min(effective_sample_size(draws[key].unsqueeze(0), 0, 1).item() for key in moving)


def nuts(posterior: Posterior, seed: int, count: int) -> Row:
    """Pyro's NUTS, uncompiled."""
    model = _Counted(posterior.model(Drawable))
    pyro.set_rng_seed(seed)
    start = time.process_time()
    chain = MCMC(infer.NUTS(model), num_samples=count, warmup_steps=count // 2, disable_progbar=True)
    chain.run()
    spent = time.process_time() - start
    divergences = sum(map(len, chain.diagnostics()["divergences"].values()))
    return _chain(posterior, chain.get_samples(), divergences, spent, model.runs)


def nuts_within(posterior: Posterior, seed: int, seconds: float, warmup: int = 200) -> Row:
    """As many draws of Pyro's NUTS as CPU seconds allow; half of the time at most is warm-up."""
    model = _Counted(posterior.model(Drawable))
    pyro.set_rng_seed(seed)
    start = time.process_time()
    kernel = infer.NUTS(model)
    kernel.setup(warmup)
    state, kept, done = kernel.initial_params, [], 0
    while (spent := time.process_time() - start) < seconds or len(kept) < 4:
        state = kernel.sample(state)
        done += 1
        if done > warmup or spent > seconds / 2:
            kept.append(state)
    draws = {name: kernel.transforms[name].inv(torch.stack([each[name] for each in kept])) for name in state}
    return _chain(posterior, draws, len(kernel.diagnostics()["divergences"]), spent, model.runs)


def _plain(value: object) -> object:
    """What JSON can say of a model's argument: a list, a number, or a distribution's name and scale."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, torch.distributions.Distribution):
        return [type(value).__name__, value.scale.item()]
    return value


def numpyro_nuts(posterior: Posterior, seed: int, count: int, python: Path) -> Row:
    """NumPyro's NUTS in a worker; its CPU seconds, and as ``warm`` those of a second run."""
    model = posterior.model(Drawable)
    given = {name: _plain(value) for name, value in model.keywords.items()}
    order = json.dumps([model.func.__name__, given, seed, count // 2, count])
    worker = Path(__file__).with_name("_posterior_jax.py")
    ran = subprocess.run([python, worker], input=order, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(ran.stderr.strip().splitlines()[-1])
    found = json.loads(ran.stdout)
    draws = {name: torch.tensor(values, dtype=torch.float64) for name, values in found["draws"].items()}
    cold, warm = found["seconds"]
    return _chain(posterior, draws, found["divergences"], cold, found["gradients"]) | {"warm": warm}


def _chain(posterior: Posterior, draws: dict[str, Tensor], divergences: int, spent: float, runs: int) -> Row:
    found, reference = named(posterior.derive(draws)), posterior.reference()
    count = len(next(iter(found.values())))
    return {
        "ess": effective(found, reference) / count,
        "errors": errors(found, reference),
        "verdict": f"{divergences} divergences",
        "gradients": runs,
        "evaluations": 0,
        "cpu": spent,
        "steps": count,
        "notes": [],
    }
