"""Fits of continuous and other flows at equal CPU time: what ``continuous.py`` tabulates as *quality* and *matching*.

Fits run one after the other in a worker, each with a budget of CPU seconds: ``fit_density`` is given the clock of the
process in place of the wall's.  Learning rate 5e-3 along a cosine to the end of the budget, batches of 512, the state
of the best held-out score; scores are log-likelihoods of test rows, nats per row, of the planes as they are and of the
power plant in standardized units.
"""

import functools
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from _runs import Row, alone, complete, markdown, spread
from _script import power_plant
from torch import Tensor

import pyro_flows as pf
from pyro_flows.infer import FlowMatching
from pyro_flows.infer.density import loop as training

PLANES = ("moons", "checkerboard", "spirals")
SETS = (*PLANES, "power_plant")
MODELS = ("cnf", "cnf, matched", "realnvp", "maf", "nsf")
CNF = {"rtol": 1e-3, "atol": 1e-3}  # enough to learn by; scores are solved to 1e-6
OBJECTIVES = {"cnf, matched": FlowMatching(), "cnf, matched by transport": FlowMatching(coupling="optimal_transport")}


def rows_of(name: str, seed: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test rows: ``rows`` to train on in a plane, or the power plant's, standardized."""
    torch.manual_seed(seed)
    if name in PLANES:
        from gallery import DENSITIES

        return tuple(DENSITIES[name](n) for n in (rows, rows // 10, rows // 2))
    train, validation, test = power_plant()
    train, validation = train[:rows], validation[:rows]
    return tuple((part - train.mean(0)) / train.std(0) for part in (train, validation, test))


def flow_of(name: str, model: str, dims: int) -> pf.Flow:
    """A model of a set; other flows of the plane have the options of the gallery, which suit it."""
    if model.startswith("cnf"):
        return pf.Flow(pf.cnf(dims, **CNF))
    if name in PLANES:
        from gallery import FLOWS, stirred

        return pf.Flow(stirred(FLOWS[model](dims)))
    return pf.Flow(getattr(pf, model)(dims))


def fitted(name: str, model: str, seed: int, seconds: float, rows: int) -> Row:
    """One fit, in the worker."""
    alone()
    training.time = SimpleNamespace(monotonic=time.process_time)
    train, validation, test = rows_of(name, seed, rows)
    torch.manual_seed(seed)
    flow = flow_of(name, model, train.shape[1])
    limits = {"max_epochs": 10**6, "steps": 10**7, "patience": 10**6, "seconds": seconds}
    options = {"lr": 5e-3, "schedule": "cosine", "batch_size": min(512, len(train)), "seed": seed, "progress": False}
    begin = time.process_time()
    fit = pf.fit_density(flow, train, validation, objective=OBJECTIVES.get(model, "likelihood"), **limits, **options)
    spent = time.process_time() - begin
    evaluations = 0
    if model.startswith("cnf"):
        solver = flow.chain[0]
        solver.rtol = solver.atol = (1e-6, 1e-6)
    begin = time.process_time()
    with torch.no_grad():
        scores = torch.cat([fit.distribution.log_prob(part) for part in test.split(2000)])
    scoring = time.process_time() - begin
    if model.startswith("cnf"):
        evaluations = flow.chain[0].last_solve.evaluations
    return {
        "set": name,
        "model": model,
        "seed": seed,
        "budget": seconds,
        "score": scores.double().mean().item(),
        "error": 2 * (scores.double().std() / len(scores) ** 0.5).item(),
        "seconds": spent,
        "steps": fit.history["step"][-1],
        "scoring": scoring / len(test) * 1000,
        "evaluations": evaluations,
    }


def runs(wanted: Iterable[tuple[str, str, int, float]], rows: int, results: Path | None) -> list[Row]:
    """Fits by ``(set, model, seed, seconds)``: those that the file has, and the others, one after the other."""
    return complete(
        functools.partial(fitted, rows=rows),
        wanted,
        lambda r: (r["set"], r["model"], r["seed"], r["budget"]),
        lambda r: (
            f"{r['set']}  {r['model']}  seed {r['seed']}  {r['score']:.3f}  "
            f"{r['seconds']:.1f} CPU s  {r['steps']} steps"
        ),
        results=results,
        fresh=False,
    )


def mean_of(found: Sequence[Row], key: str) -> float:
    return statistics.mean(r[key] for r in found)


def quality(sets: Sequence[str], seeds: Sequence[int], seconds: float, rows: int, results: Path | None) -> None:
    """Test log-likelihoods of all models at equal CPU time."""
    found = runs([(n, m, s, seconds) for n in sets for s in seeds for m in MODELS], rows, results)
    scores, costs = [[model] for model in MODELS], [[model] for model in MODELS]
    for name in sets:
        for model, score, cost in zip(MODELS, scores, costs, strict=True):
            these = [r for r in found if (r["set"], r["model"]) == (name, model)]
            score.append(spread([r["score"] for r in these]))
            spent, steps, scoring = (mean_of(these, key) for key in ("seconds", "steps", "scoring"))
            cost.append(f"{spent:.1f} s, {steps:.0f}, {scoring:.3f} ms")
    print("\n" + markdown(["", *sets], scores))
    print("\n" + markdown(["CPU s, steps, scoring of a row", *sets], costs))
    print(f"\nTwo standard errors over test rows are at most {max(r['error'] for r in found):.3f}.\n")


def matching(
    sets: Sequence[str], seeds: Sequence[int], budgets: Sequence[float], rows: int, results: Path | None
) -> None:
    """Flow matching against maximum likelihood: scores after budgets of CPU time, each a run of its own."""
    models = ("cnf", *OBJECTIVES)
    found = runs([(n, m, s, b) for n in sets for s in seeds for m in models for b in budgets], rows, results)
    table = []
    for name in sets:
        curves = {}
        for model in models:
            these = [[r for r in found if (r["set"], r["model"], r["budget"]) == (name, model, b)] for b in budgets]
            curves[model] = [mean_of(each, "score") for each in these]
            evaluations = mean_of(these[-1], "evaluations")
            row = [f"{name}: {model}", *(spread([r["score"] for r in each]) for each in these), f"{evaluations:.0f}"]
            table.append([*row, reached(budgets, curves[model], curves["cnf"][-1] - 0.05)])
    head = ["", *(f"{b:g} CPU s" for b in budgets), "evaluations at 1e-6", "CPU s to the last of cnf less 0.05"]
    print("\n" + markdown(head, table) + "\n")


def reached(budgets: Sequence[float], scores: Sequence[float], level: float) -> str:
    """Where the line through scores, over the logarithm of time, first comes to a level."""
    if scores[0] >= level:
        return f"<= {budgets[0]:g}"
    for k in range(1, len(budgets)):
        if scores[k] >= level:
            part = (level - scores[k - 1]) / (scores[k] - scores[k - 1])
            return f"{budgets[k - 1] * (budgets[k] / budgets[k - 1]) ** part:.1f}"
    return f"> {budgets[-1]:g}"
