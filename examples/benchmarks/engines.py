"""A training step of a density and of a guide, plain and compiled, beside other libraries.

    python examples/benchmarks/engines.py
    python examples/benchmarks/engines.py --jax PYTHON     # an interpreter with jax, flowjax and numpyro beside it
    python examples/benchmarks/engines.py --smoke

CPU milliseconds of a step, one thread, all in turns in one process; the compiler's are counted in its column.  Ours are
the difference of a long and a short fit, so that starts and ends cancel.  Pyro's and zuko's loops have a fused Adam.
Needs the ``bench`` extra.
"""

import functools
import json
import os
import resource
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from _peers import Case, sizes
from _runs import Table, alone, command, machine
from pyro.distributions.transforms import affine_autoregressive
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_flows as pf
from pyro_flows.infer.guides.loop import GuideTraining
from pyro_flows.infer.models.joint import JointDensity
from pyro_flows.infer.models.latents import Latents

CASES = [Case(8, 64, 1, 100), Case(21, 100, 5, 100), Case(64, 512, 1, 1000)]
FLOWS = {
    "nsf 21, 100, 3, 100": (lambda: pf.nsf(21, num_layers=3, hidden_dims=(100, 100)), (21,), 100),
    "realnvp 21, 100, 5, 100": (lambda: pf.realnvp(21, num_layers=5, hidden_dims=(100, 100)), (21,), 100),
    "nice 21, 100, 4, 100": (lambda: pf.nice(21, num_layers=4, hidden_dims=(100, 100)), (21,), 100),
    "MADE 64, 512, 1, 100": (lambda: pf.MADE(64, "normal", hidden_dims=(512, 512)), (64,), 100),
    "mintnet 1x28x28, 20": (lambda: pf.mintnet((1, 28, 28)), (1, 28, 28), 20),
}
PARTS = ["densities", "flows", "guides"]
SCHOOLS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0), (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


def maf(case: Case) -> torch.nn.Module:
    """Ours as in _peers.py."""
    hidden = (case.width, case.width)
    return pf.maf(case.dim, num_layers=case.layers, hidden_dims=hidden, activation="relu")


def fit_step(make: Callable[[], torch.nn.Module], data: torch.Tensor, batch: int, steps: int, compiled: bool) -> float:
    """Milliseconds of a step of ``fit_density``."""
    spent = []
    for count in (steps, 3 * steps):
        torch.manual_seed(0)
        flow, begin = make(), time.process_time()
        options = {"validation_fraction": 0.0, "patience": 10**6, "compile": compiled, "seed": 0, "progress": False}
        pf.fit_density(flow, data, batch_size=batch, steps=count, lr=1e-5, **options)
        spent.append(time.process_time() - begin)
    return 1e3 * (spent[1] - spent[0]) / (2 * steps)


def loop(
    model: torch.nn.Module, log_prob: Callable[[torch.Tensor], torch.Tensor], data: torch.Tensor, batch: int, steps: int
) -> Callable[[], float]:
    """Milliseconds of a step in a loop of the user's own."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, fused=True)

    def run() -> float:
        begin = time.process_time()
        for _ in range(steps):
            rows = data[torch.randint(len(data), (batch,))]
            optimizer.zero_grad()
            (-log_prob(rows).mean()).backward()
            optimizer.step()
        return 1e3 * (time.process_time() - begin) / steps

    return run


def peer_step(library: str, case: Case, data: torch.Tensor, steps: int) -> Callable[[], float]:
    """The same model of Pyro or zuko."""
    hidden = [case.width, case.width]
    if library == "zuko":
        import zuko

        flow = zuko.flows.MAF(case.dim, transforms=case.layers, hidden_features=hidden)
        return loop(flow, lambda rows: flow().log_prob(rows), data, case.batch, steps)
    layers = [affine_autoregressive(case.dim, hidden_dims=hidden) for _ in range(case.layers)]
    base = dist.Normal(torch.zeros(case.dim), torch.ones(case.dim)).to_event(1)
    flow = dist.TransformedDistribution(base, [layer.inv for layer in layers])

    def log_prob(rows: torch.Tensor) -> torch.Tensor:
        flow.clear_cache()
        return flow.log_prob(rows)

    return loop(torch.nn.ModuleList(layers), log_prob, data, case.batch, steps)


def schools(y: torch.Tensor, sigma: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def regression(x: torch.Tensor, y: torch.Tensor) -> None:
    b = pyro.sample("b", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ b), obs=y)


def hmm(y: torch.Tensor) -> None:
    p = pyro.sample("p", dist.Beta(torch.tensor([9.0, 9.0]), 1.0).to_event(1))
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    move = torch.stack([torch.stack([p[..., 0], 1 - p[..., 0]], -1), torch.stack([1 - p[..., 1], p[..., 1]], -1)], -2)
    start = torch.log(torch.tensor([0.5, 0.5]))
    states = dist.DiscreteHMM(start, move.log(), dist.Normal(mu.unsqueeze(-2), 1.0), duration=len(y))
    pyro.sample("y", states, obs=y)


def lotka_volterra(y: torch.Tensor, count: torch.Tensor) -> None:
    from torchdiffeq import odeint

    a = pyro.sample("a", dist.LogNormal(torch.zeros(4), 0.3).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    times = torch.linspace(0.0, 2.0, len(y))

    def field(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.stack([a[0] * u[0] - a[1] * u[0] * u[1], a[2] * u[0] * u[1] - a[3] * u[1]])

    path = odeint(field, torch.ones(2), times, method="rk4", options={"step_size": 2.0 / int(count)})
    pyro.sample("y", dist.Normal(path, s).to_event(2), obs=y)


def guide_step(
    model: Callable[..., None], args: tuple, width: int, draws: int, steps: int, path: bool, compiled: bool = False
) -> float:
    """Milliseconds of a step of the training inside ``fit_guide``, three layers."""
    spent = []
    train = GuideTraining.run

    @functools.wraps(train)
    def run(self: GuideTraining, *given: object, **named: object) -> None:
        begin = time.process_time()
        train(self, *given, **named)
        spent.append(time.process_time() - begin)

    GuideTraining.run = run
    try:
        for count in (steps, 3 * steps):
            build = functools.partial(pf.iaf, num_layers=3, hidden_dims=(width, width))
            guide = pf.AutoFlow(model, build, start="prior", path_gradient=path, num_particles=draws, seed=0)
            pf.fit_guide(guide, *args, steps=count, progress=False, compile=compiled)
    finally:
        GuideTraining.run = train
    return 1e3 * (spent[1] - spent[0]) / (2 * steps)


def density_alone(model: Callable[..., None], args: tuple, draws: int, compiled: bool) -> float:
    """Milliseconds of a model's log-density with its gradient, the part of a guide's step that no guide saves."""
    latents = Latents.of(pyro.poutine.trace(model).get_trace(*args))
    density = JointDensity(model, latents, args)
    z = torch.randn(draws, latents.dim)
    value, _ = density.value_and_slope(z)
    run: Callable[..., tuple] = lambda z: density.value_and_slope(z)  # noqa: E731  # whose one argument is traced
    if compiled:
        run = torch.compile(make_fx(run)(z), dynamic=False)
        assert torch.allclose(run(z)[0], value, rtol=1e-4)
    each = []
    for _ in range(7):
        begin = time.process_time()
        for _ in range(30):
            run(z)
        each.append(1e3 * (time.process_time() - begin) / 30)
    return statistics.median(each)


def pyro_guide_step(model: Callable[..., None], args: tuple, width: int, steps: int) -> Callable[[], float]:
    """Milliseconds of a step of Pyro's own, with one draw."""
    pyro.clear_param_store()
    guide = AutoIAFNormal(model, hidden_dim=[width, width], num_transforms=3)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), Trace_ELBO())
    svi.step(*args)

    def run() -> float:
        begin = time.process_time()
        for _ in range(steps):
            svi.step(*args)
        return 1e3 * (time.process_time() - begin) / steps

    return run


def by_jax(python: Path | None, *order: object) -> str:
    """What the worker of the JAX libraries says."""
    if python is None:
        return "not run"
    worker = Path(__file__).with_name("_engine_jax.py")
    ran = subprocess.run([python, worker], input=json.dumps(order), capture_output=True, text=True, check=False)
    if ran.returncode:
        return ran.stderr.strip().splitlines()[-1]
    found = json.loads(ran.stdout)
    return f"{found['step']:.3f} (compiling {found['first'] / 1e3:.1f} s)"


def in_turns(jobs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """One figure a round for each job; the first round only warms up."""
    figures: dict[str, list[float]] = {name: [] for name in jobs}
    for k in range(rounds + 1):
        for name, job in jobs.items():
            figures[name] += [job()] if k else [job()][:0]
    return figures


def cold(job: Callable[[], float]) -> float:
    """CPU seconds of the processes that compile at the first call."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    job()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def against(figures: dict[str, list[float]], ours: str, peers: list[str]) -> str:
    """The median over rounds of the faster peer's time over ours."""
    each = [min(figures[p][k] for p in peers) / t for k, t in enumerate(figures[ours])]
    return f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})"


def main() -> None:
    args = command(
        __doc__,
        "one small case, one round",
        rounds={"type": int, "default": 5},
        jax={"type": Path, "default": None, "help": "an interpreter with jax, flowjax and numpyro"},
        steps={"type": int, "default": 200},
        only={"choices": [*PARTS, "models"], "nargs": "+", "default": PARTS},
    )
    alone()
    warnings.simplefilter("ignore")
    cases, flows, peers, compile_too = CASES, FLOWS, ["pyro", "zuko"], True
    if args.smoke:
        args.rounds, args.steps, cases, flows, peers, compile_too = 1, 60, [Case(3, 8, 1, 50)], {}, ["pyro"], False
    print(f"{machine()}; one thread, seed 0, float32, {args.rounds} rounds in turns; CPU ms of a step\n")
    if "densities" in args.only:
        table = Table(
            "maf: D, H, layers, batch",
            "ours",
            "compiled",
            "compiling",
            *peers,
            "faster peer / ours",
            "/ compiled",
            "flowjax, scan",
        )
        for case in cases:
            data = torch.randn(5000, case.dim)
            steps = max(12, args.steps // (10 if case.width > 256 else 1))
            ours = functools.partial(fit_step, functools.partial(maf, case), data, case.batch, steps)
            jobs = {"ours": functools.partial(ours, False)}
            jobs |= {peer: peer_step(peer, case, data, steps) for peer in peers}
            compiling = cold(functools.partial(ours, True)) if compile_too else float("nan")
            if compile_too:
                jobs["compiled"] = functools.partial(ours, True)
            figures = in_turns(jobs, args.rounds)
            middle = {name: statistics.median(each) for name, each in figures.items()}
            table.add(
                sizes(case),
                f"{middle['ours']:.3f}",
                f"{middle.get('compiled', float('nan')):.3f}",
                f"{compiling:.0f} s",
                *(f"{middle[peer]:.3f}" for peer in peers),
                against(figures, "ours", peers),
                against(figures, "compiled", peers) if compile_too else "",
                by_jax(args.jax, "density", *case),
            )
        print(f"\n{table}\n")
    if "flows" in args.only and flows:
        table = Table("flow: D, H, layers, batch", "plain loop, ours", "fit_density", "compiled", "compiling")
        for name, (make, shape, batch) in flows.items():
            data = torch.randn(1000, *shape).sigmoid() if len(shape) == 3 else torch.randn(5000, *shape)
            steps = max(10, args.steps // (20 if len(shape) == 3 else 2))
            ours = functools.partial(fit_step, make, data, batch, steps)
            compiling = cold(functools.partial(ours, True))
            model = make()
            flow = model if isinstance(model, pf.MADE) else pf.Flow(model)
            jobs = {"loop": loop(flow, flow.log_prob, data, batch, steps), "ours": functools.partial(ours, False)}
            jobs["compiled"] = functools.partial(ours, True)
            middle = {job: statistics.median(each) for job, each in in_turns(jobs, args.rounds).items()}
            table.add(name, *(f"{middle[job]:.2f}" for job in jobs), f"{compiling:.0f} s")
        print(f"\n{table}\n")
    if "models" in args.only:
        table = Table("model, 128 draws", "density and gradient", "compiled by torch")
        chain = torch.randn(200) + 3.0 * (torch.arange(200) // 20 % 2)
        for name, model, given in (
            ("eight schools", schools, tuple(map(torch.tensor, SCHOOLS))),
            ("hidden Markov model of 200 steps", hmm, (chain,)),
        ):
            table.add(name, *(f"{density_alone(model, given, 128, compiled):.2f}" for compiled in (False, True)))
        print(f"\n{table}\n")
    if "guides" in args.only:
        table = Table(
            "guide, three layers, 128 draws",
            "path gradient",
            "compiled",
            "ELBO",
            "compiled",
            "compiling",
            "Pyro, 1 draw",
            "path / Pyro",
            "compiled ELBO / Pyro",
            "NumPyro",
        )
        x = torch.randn(1000, 50)
        y = torch.bernoulli((0.3 * x @ torch.randn(50)).sigmoid())
        models = {"eight schools, width 32": (schools, tuple(map(torch.tensor, SCHOOLS)), 32)}
        if not args.smoke:
            chain = torch.randn(200) + 3.0 * (torch.arange(200) // 20 % 2)
            prey = torch.rand(5, 2) + 0.5
            models |= {
                "logistic regression 1000 x 50 by X @ b, width 64": (regression, (x, y), 64),
                "hidden Markov model of 200 steps, width 32": (hmm, (chain,), 32),
                "Lotka-Volterra by 20 steps of RK4, width 32": (lotka_volterra, (prey, torch.tensor(20)), 32),
                "Lotka-Volterra by 160 steps of RK4, width 32": (lotka_volterra, (prey, torch.tensor(160)), 32),
            }
        for name, (model, given, width) in models.items():
            steps = args.steps // (2 if model in (schools, regression) else 5)
            ours = functools.partial(guide_step, model, given, width, 8 if args.smoke else 128, steps)
            jobs = {"path": functools.partial(ours, True), "elbo": functools.partial(ours, False)}
            compiling = float("nan")
            if not args.smoke:
                jobs |= {f"compiled {job}": functools.partial(run, True) for job, run in jobs.items()}
                compiling = sum(cold(run) for job, run in jobs.items() if job.startswith("compiled"))
            if model is not hmm:  # whose observations Pyro's guides cannot have
                jobs["pyro"] = pyro_guide_step(model, given, width, steps)
            figures = in_turns(jobs, args.rounds)
            told = by_jax(args.jax, "guide", model.__name__, width, 128, [part.tolist() for part in given])
            middle = {job: f"{statistics.median(each):.2f}" for job, each in figures.items()}

            def to_pyro(job: str, figures: dict[str, list[float]] = figures) -> str:
                pairs = zip(figures.get(job, ()), figures.get("pyro", ()), strict=False)
                each = [a / b for a, b in pairs]
                return f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})" if each else ""

            row = (middle.get(job, "") for job in ("path", "compiled path", "elbo", "compiled elbo"))
            ratios = to_pyro("path"), to_pyro("compiled elbo")
            table.add(name, *row, f"{compiling:.0f} s", middle.get("pyro", ""), *ratios, told)
        print(f"\n{table}\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:  # so that the first fit really compiles
        os.environ["PYRO_FLOWS_CACHE"] = folder
        main()
