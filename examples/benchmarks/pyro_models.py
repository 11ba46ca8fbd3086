"""The models of Pyro's examples, by the guide of each example, by ``AutoFlow`` in its place, and by ``fit_guide``.

    python examples/benchmarks/pyro_models.py                        # all, three seeds
    python examples/benchmarks/pyro_models.py --tables models --names gmm cjs --seeds 0
    python examples/benchmarks/pyro_models.py --smoke

*models*: mixture, batting averages, capture and recapture (``_pyro_models.py``).  Both guides are trained by stock
``SVI`` with Adam for as many steps, at a step size of 0.01; for the mixture the example's 0.1 is tried as well, and the
better of both counts.  Discrete latents are summed out by ``TraceEnum_ELBO``; what is shown is the ELBO of many draws.
A point estimate (``AutoDelta``) has none, so ``AutoNormal`` takes its place.  ``fit_guide`` has the model and a seed.
Where the log evidence is known, by closed form or over a grid, no ELBO can exceed it, and ``fit_guide``
estimates it.

*sir*: ``fit_svi`` of ``pyro.contrib.epidemiology``, with its own ``AutoNormal`` and with ``AutoFlow`` in its place, and
``fit_guide`` on the same relaxed model.

*hmm*: a hidden Markov model with tables of probabilities for 88 keys, trained on minibatches of 8 sequences: the point
estimate of the example, ``AutoNormal`` and ``AutoFlow``.  The score is the log probability of sequences held out, for
each time step, at the mean of the predictive over draws of the guide.

*dmm*: a deep Markov model, whose guide is amortized, so that no autoguide has a place in it: a recurrent net with
normals, with Pyro's autoregressive flow and with ``iaf``.  Then ``fit_guide`` on the latents of three padded
sequences under a model that is held, beside the evidence of the same sequences cut to their lengths and fitted one at a
time.

The data of all but the mixture and the batting averages are simulated, in the shapes of those that the examples use.
Numbers are medians over seeds, with the range behind; one thread, float32, as the examples.
"""

import logging
import math
import statistics
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
from _pyro_models import Case, Deep, cases, chorales, deep_model, hmm, without_discrete
from _runs import command, machine, markdown
from pyro import poutine
from pyro.contrib.epidemiology import compartmental
from pyro.contrib.epidemiology.models import SimpleSIRModel
from pyro.distributions.transforms import affine_autoregressive
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuide, AutoNormal
from pyro.optim import Adam, ClippedAdam
from torch import Tensor, nn

import pyro_flows as pf
from pyro_flows.infer import AutoFlow, fit_guide

Guide = Callable[[Callable[..., object]], AutoGuide]


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Median, and the range where there are several; what failed is not a number."""
    values = list(values)
    shown = [f"{v:.{digits}f}" for v in (statistics.median(values), min(values), max(values))]
    return shown[0] if len(values) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


def trained(case: Case, make: Guide, rate: float, steps: int, draws: int, seed: int) -> float:
    """ELBO of a guide after stock SVI; NaN if training failed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = make(case.visible())
    elbo = TraceEnum_ELBO if case.discrete else Trace_ELBO
    many = {"max_plate_nesting": 1, "vectorize_particles": True}
    svi = SVI(case.model, guide, Adam({"lr": rate}), elbo(num_particles=20, **many))
    try:
        for _ in range(steps):
            svi.step(*case.args)
        with torch.no_grad():
            return -elbo(num_particles=draws, **many).loss(case.model, guide, *case.args)
    except ValueError as error:
        print(f"  {case.name}, {type(guide).__name__}, step size {rate}, seed {seed}: {str(error).splitlines()[0]}")
        return math.nan


def best(case: Case, make: Guide, steps: int, draws: int, seed: int) -> float:
    """Of all step sizes."""
    found = [trained(case, make, rate, steps, draws, seed) for rate in case.rates]
    return max((v for v in found if math.isfinite(v)), default=math.nan)


def judged(model: Callable[..., object] | AutoFlow, args: tuple[object, ...], steps: int, seed: int) -> list[object]:
    """Log evidence and ELBO by ``fit_guide``, ESS, tail index and verdict; why not, if it refuses."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = model if isinstance(model, AutoFlow) else AutoFlow(model, seed=seed)
    try:
        fit = fit_guide(guide, *args, steps=steps, progress=False)
    except ValueError as error:
        return [math.nan, math.nan, math.nan, math.nan, f"refused: {str(error).splitlines()[0][:60]}"]
    return [fit.log_evidence, fit.importance.elbo, fit.ess, fit.khat, fit.verdict.label]


def combined(rows: list[list[object]]) -> list[str]:
    """Results of several seeds in one row."""
    columns = list(zip(*rows, strict=True))
    return [*(spread(column) for column in columns[:4]), " / ".join(dict.fromkeys(map(str, columns[4])))]


FITTED = "fit_guide: log evidence|ELBO|ESS|k-hat|verdict"


def table(columns: str, rows: list[list[str]]) -> None:
    print(f"\n{markdown(columns.split('|'), rows)}\n", flush=True)


def models(names: list[str], seeds: list[int], steps: int, fit_steps: int, draws: int) -> None:
    rows = []
    for case in cases():
        if names and not any(case.name.startswith(name) for name in names):
            continue
        original = AutoNormal if case.guide is AutoDelta else case.guide
        theirs = [best(case, original, steps, draws, seed) for seed in seeds]
        ours = [best(case, partial(AutoFlow, seed=seed), steps, draws, seed) for seed in seeds]
        found = combined([judged(case.model, case.args, fit_steps, seed) for seed in seeds])
        truth = "" if case.truth is None else f"{case.truth:.2f}"
        title = case.name + (", simulated" if case.simulated else "")
        rows.append([title, truth, original.__name__, spread(theirs), spread(ours), *found])
        print(" ".join(rows[-1]), flush=True)
    table(f"model|log evidence, exact|guide of the example|its ELBO|ELBO of AutoFlow|{FITTED}", rows)


def sir(seeds: list[int], steps: int, fit_steps: int, draws: int, smoke: bool) -> None:
    days, people = 4 if smoke else 20, 1000
    pyro.set_rng_seed(0)
    simulator = SimpleSIRModel(people, 7.0, [None] * days)
    data = simulator.generate({"R0": 1.5, "rho": 0.5})["obs"]
    while not (1 if smoke else 20) <= data.sum() <= 900:
        data = simulator.generate({"R0": 1.5, "rho": 0.5})["obs"]
    guides = {
        "AutoNormal": AutoNormal,
        "AutoFlow": lambda model, init_loc_fn, init_scale: AutoFlow(model, init_loc_fn=init_loc_fn),
    }
    elbos: dict[str, list[float]] = {name: [] for name in guides}
    means: dict[str, list[float]] = {name: [] for name in guides}
    fits = []
    for seed in seeds:
        for name, guide_class in guides.items():
            kept: list[tuple[AutoGuide, dict[str, Callable]]] = []

            def make(
                model: Callable, guide_class: Callable = guide_class, kept: list = kept, **options: Callable
            ) -> AutoGuide:
                kept.append((guide_class(model, **options), {"model": model, **options}))
                return kept[0][0]

            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            epidemic = SimpleSIRModel(people, 7.0, data)
            with mock.patch.object(compartmental, "AutoNormal", make):
                epidemic.fit_svi(num_steps=steps, num_samples=1000, learning_rate=0.05, log_every=10**9)
            guide, given = kept[0]
            elbo = Trace_ELBO(
                num_particles=draws, vectorize_particles=True, max_plate_nesting=epidemic.max_plate_nesting
            )
            with torch.no_grad():
                elbos[name].append(-elbo.loss(given["model"], guide))
            means[name].append(float(epidemic.samples["R0"].mean()))
        fits.append(judged(AutoFlow(given["model"], init_loc_fn=given["init_loc_fn"], seed=seed), (), fit_steps, seed))
    row = [f"sir, {people} people, {days} days, simulated", *map(spread, elbos.values()), *combined(fits)]
    table(f"model|ELBO of AutoNormal|ELBO of AutoFlow|{FITTED}", [row])
    print("Mean of R0, which is 1.5: " + ", ".join(f"{name} {spread(found)}" for name, found in means.items()))


def heldout(guide: AutoGuide, test: tuple[Tensor, Tensor], hidden: int, draws: int) -> float:
    """Log probability of sequences held out, for each time step, at a mixture of draws of the guide."""
    elbo = TraceEnum_ELBO(max_plate_nesting=2, strict_enumeration_warning=False)
    found = []
    with torch.no_grad():
        for _ in range(draws):
            tables = guide(*test, hidden, None)
            model = poutine.condition(hmm, data={name: tables[name] for name in ("probs_x", "probs_y")})
            prior = poutine.trace(poutine.block(model, expose=["probs_x", "probs_y"])).get_trace(*test, hidden, None)
            found.append(-elbo.loss(model, lambda *_: None, *test, hidden, None) - float(prior.log_prob_sum()))
    return float(torch.tensor(found).logsumexp(0) - math.log(draws)) / float(test[1].sum())


def markov(seeds: list[int], steps: int, draws: int, smoke: bool) -> None:
    hidden, batch, longest, keys = (3, 2, 5, 6) if smoke else (16, 8, 30, 88)
    train = chorales(6 if smoke else 229, longest, keys)
    test = chorales(3 if smoke else 76, longest, keys, seed=1)
    guides: dict[str, Guide] = {"AutoDelta": AutoDelta, "AutoNormal": AutoNormal, "AutoFlow": AutoFlow}
    rows = []
    for name, guide_class in guides.items():
        found = []
        for seed in seeds:
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            guide = guide_class(without_discrete(hmm))
            svi = SVI(hmm, guide, Adam({"lr": 0.05}), TraceEnum_ELBO(max_plate_nesting=2))
            try:
                for _ in range(steps):
                    svi.step(*train, hidden, batch)
                found.append(heldout(guide, test, hidden, 1 if name == "AutoDelta" else draws))
            except ValueError as error:
                print(f"  hmm, {name}, seed {seed}: {str(error).splitlines()[0]}")
                found.append(math.nan)
        rows.append([name, spread(found, 3)])
        print(" ".join(rows[-1]), flush=True)
    table(f"hmm of {hidden} states, simulated|nats of a time step held out", rows)


class Amortized(nn.Module):
    """Guide of a deep Markov model: a net that reads a sequence backwards, and a flow behind each normal."""

    def __init__(self, nets: Deep, width: int, flows: list[nn.Module], keys: int = 88) -> None:
        super().__init__()
        self.reader = nn.RNN(keys, width, nonlinearity="relu", batch_first=True)
        self.from_latent = nn.Sequential(nn.Linear(nets.latent, width), nn.Tanh())
        self.loc, self.scale = nn.Linear(width, nets.latent), nn.Linear(width, nets.latent)
        self.flows, self.first = nn.ModuleList(flows), nn.Parameter(torch.zeros(nets.latent))

    def forward(self, nets: Deep, sequences: Tensor, lengths: Tensor) -> None:
        pyro.module("amortized", self)
        read = self.reader(sequences.flip(1))[0].flip(1)  # zeros beyond the end come first
        z = self.first.expand(len(sequences), -1)
        with pyro.plate("rows", len(sequences), dim=-1):
            for t in range(sequences.shape[1]):
                there = t < lengths
                h = 0.5 * (self.from_latent(z) + read[:, t])
                normal = dist.Normal(self.loc(h), nn.functional.softplus(self.scale(h)) + 1e-3)
                if self.flows:
                    law = dist.TransformedDistribution(normal, list(self.flows)).mask(there)
                else:
                    law = normal.mask(there[:, None]).to_event(1)
                z = pyro.sample(f"z_{t}", law)


def deep(seeds: list[int], steps: int, fit_steps: int, smoke: bool) -> None:
    latent, hidden, width, rows, longest = (4, 8, 8, 4, 4) if smoke else (100, 200, 600, 20, 30)
    flows: dict[str, Callable[[], list[nn.Module]]] = {
        "normal, as the example's": lambda: [],
        "and Pyro's affine_autoregressive": lambda: [affine_autoregressive(latent, hidden_dims=[hidden // 2])],
        "and iaf of one layer": lambda: [pf.iaf(latent, num_layers=1, hidden_dims=[hidden // 2])],
    }
    lines = []
    for name, make in flows.items():
        found = []
        for seed in seeds:
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            nets = Deep(latent, hidden)
            guide = Amortized(nets, width, make())
            svi = SVI(deep_model, guide, ClippedAdam({"lr": 1e-3, "clip_norm": 10.0}), Trace_ELBO())
            for step in range(steps):
                svi.step(nets, *chorales(rows, longest, seed=2 + step % 10))
            test = chorales(2 * rows, longest, seed=1)
            with torch.no_grad():
                found.append(-sum(svi.evaluate_loss(nets, *test) for _ in range(10)) / 10 / float(test[1].sum()))
        lines.append([name, spread(found)])
        print(" ".join(lines[-1]), flush=True)
    table(f"dmm of {latent} latents, simulated: guide|ELBO of a time step held out", lines)

    # A small model that is held: the posterior of three sequences of different lengths.
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    nets, lengths = Deep(2, 8, 16).requires_grad_(False), torch.tensor([2, 1] if smoke else [6, 4, 2])
    empty, times = torch.zeros(len(lengths), int(lengths.max()), 16), range(int(lengths.max()))
    trace = poutine.trace(poutine.uncondition(deep_model)).get_trace(nets, empty, lengths, False)
    sequences = torch.stack([trace.nodes[f"x_{t}"]["value"] for t in times], 1)
    sequences = sequences * (torch.tensor(times) < lengths[:, None])[..., None]
    fits, apart = [], []
    for seed in seeds:
        fits.append(judged(deep_model, (nets, sequences, lengths, False), fit_steps, seed))
        each = [
            judged(deep_model, (nets, sequences[k : k + 1, :n], lengths[k : k + 1], False), fit_steps, seed)[0]
            for k, n in enumerate(lengths.tolist())
        ]
        apart.append(sum(each))
    row = [f"dmm, {len(lengths)} padded sequences, simulated", spread(apart), *combined(fits)]
    table(f"model|log evidence of the sequences cut and apart|{FITTED}", [row])


TABLES = ("models", "sir", "hmm", "dmm")


def main() -> None:
    args = command(
        __doc__,
        "budgets too small to mean anything",
        tables={"nargs": "+", "choices": TABLES, "default": TABLES},
        names={"nargs": "+", "default": [], "help": "beginnings of names of models"},
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2]},
        steps={"type": int, "default": 400, "help": "of stock SVI"},
        fit_steps={"type": int, "default": 400, "help": "of fit_guide"},
    )
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)  # steps of fit_svi
    torch.set_num_threads(1)
    steps, fit_steps, draws, seeds, names = args.steps, args.fit_steps, 2000, args.seeds, args.names
    if args.smoke:
        steps, fit_steps, draws, seeds, names = 2, 2, 20, [0], names or ["baseball, pooled", "cjs 1"]
    print(f"{machine()}; float32, one thread, {steps} steps of SVI, {fit_steps} of fit_guide, seeds {seeds}")
    if "models" in args.tables:
        models(names, seeds, steps, fit_steps, draws)
    if "sir" in args.tables:
        sir(seeds, steps, fit_steps, draws, args.smoke)
    if "hmm" in args.tables:
        markov(seeds, 2 if args.smoke else 50, 2 if args.smoke else 20, args.smoke)
    if "dmm" in args.tables:
        deep(seeds, steps, fit_steps, args.smoke)


if __name__ == "__main__":
    main()
