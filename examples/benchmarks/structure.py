"""Hierarchies by guides with the model's structure and by dense ones, against exact moments.

    python examples/benchmarks/structure.py                              # both, three seeds; half an hour
    python examples/benchmarks/structure.py --names normals-1000-centered --seeds 0
    python examples/benchmarks/structure.py --smoke

Each run is ``fit_guide`` with nothing but ``AutoFlow(dependencies=)``, float64, one thread, in a process of its own,
and a budget of CPU seconds.  *normals*: members with normal data of known error, whose mean and spread are global.
*logistic*: groups of twelve yes-or-no data with a covariate.  *radon*: 85 groups of 1 to 60 data.  *nested*: classes
with pupils, both normal.  *rows*: groups with 100,000 normal rows and a covariate, whose density takes milliseconds.
*level*: a random walk seen with normal noise, a chain.  Centered forms have each member's value as latent, the others
its standardized deviation, or the increments of the walk.

Globals' moments come from importance sampling of their exact marginal density, members' from their exact conditional
moments there, by quadrature for the logistic ones.  Errors are the largest of any mean in standard deviations, and of
any standard deviation in parts, of 4,000 draws, whose noise at a thousand members is 0.05.  *Picked*: the effective
sample size when each member is picked by its own weights, as ``fit.sample(resampled=True)`` does.
"""

import importlib
import math
import statistics
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from _runs import Row, command, complete, machine, markdown
from torch import Tensor
from torch.nn.functional import softplus

DRAWS, REFERENCE = 4000, 4096
FEWER = 256  # points of the reference for ten thousand members
ROWS = 100_000
WIDER = 1.4
Exact = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


class Hierarchy(NamedTuple):
    """A model, its global sites, its local sites, and its exact parts.

    ``exact`` maps unconstrained globals ``(n, G)`` to log-densities ``(n,)`` and conditional means and variances of all
    members' latents ``(n, J)``.
    """

    model: Callable[[], None]
    shared: tuple[str, ...]
    local: tuple[str, ...]
    exact: Exact


def log_normal(x: Tensor, mean: Tensor | float, variance: Tensor | float) -> Tensor:
    variance = torch.as_tensor(variance)
    return -0.5 * (x - mean) ** 2 / variance - 0.5 * (2 * math.pi * variance).log()


def normals(count: int, centered: bool) -> Hierarchy:
    random = torch.Generator().manual_seed(0)
    sd = 0.5 + torch.rand(count, generator=random)
    y = 1.5 + 0.8 * torch.randn(count, generator=random) + sd * torch.randn(count, generator=random)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with pyro.plate("members", count):
            if centered:
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = mu + tau * pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta, sd), obs=y)

    def exact(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, t = g[:, :1], g[:, 1:]
        variance = (2 * t).exp()
        log_p = (log_normal(mu, 0, 25) + log_normal(t, 0, 1))[:, 0] + log_normal(y, mu, variance + sd**2).sum(-1)
        v = 1 / (1 / variance + 1 / sd**2)
        m = v * (y / sd**2 + mu / variance)
        return (log_p, m, v) if centered else (log_p, (m - mu) / t.exp(), v / variance)

    return Hierarchy(model, ("mu", "tau"), ("theta",), exact)


def logistic(count: int, centered: bool) -> Hierarchy:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(count, 12, generator=random)
    level = -0.5 + 0.9 * torch.randn(count, generator=random)
    y = (torch.rand(count, 12, generator=random) < torch.sigmoid(level[:, None] + 0.7 * x)).to(x)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with pyro.plate("members", count):
            if centered:
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = mu + tau * pyro.sample("theta", dist.Normal(0.0, 1.0))
            logits = theta.unsqueeze(-1) + slope.unsqueeze(-1) * x
            pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)

    nodes = torch.linspace(-6.5, 6.5, 27)

    def exact(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for mu, slope, t in (part.T.unsqueeze(-1) for part in g.split(max(1, 25_000 // count))):
            log_p = (log_normal(mu, 0, 9) + log_normal(slope, 0, 4) + log_normal(t, 0, 1))[:, 0]
            theta = mu + t.exp() * nodes  # (n, K); the trapezoid rule is exact to many digits
            eta = theta[..., None, None] + slope[..., None, None] * x
            each = (y * eta - softplus(eta)).sum(-1) + log_normal(nodes, 0, 1)[:, None]
            total = each.logsumexp(1)
            weight = (each - total[:, None]).exp()
            value = (theta if centered else nodes.expand_as(theta))[..., None]
            mean = (weight * value).sum(1)
            parts.append((log_p + total.sum(-1), mean, (weight * value**2).sum(1) - mean**2))
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    return Hierarchy(model, ("mu", "slope", "tau"), ("theta",), exact)


def radon(count: int, centered: bool) -> Hierarchy:
    random = torch.Generator().manual_seed(0)
    n = (1 + 60 * torch.rand(count, generator=random) ** 4).long()
    seen = torch.arange(int(n.max())) < n[:, None]
    x = (torch.rand(seen.shape, generator=random) < 0.2).double()
    soil = 0.4 * torch.randn(count, generator=random)
    level = 1.4 + 0.7 * soil + 0.3 * torch.randn(count, generator=random)
    y = level[:, None] - 0.6 * x + 0.75 * torch.randn(seen.shape, generator=random)

    def model() -> None:
        mu, slope, floor = (pyro.sample(name, dist.Normal(0.0, 5.0)) for name in ("mu", "slope", "floor"))
        tau = pyro.sample("tau", dist.LogNormal(-1.0, 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("members", count):
            prior = mu + slope * soil
            if centered:
                theta = pyro.sample("theta", dist.Normal(prior, tau))
            else:
                theta = prior + tau * pyro.sample("theta", dist.Normal(0.0, 1.0))
            mean = theta.unsqueeze(-1) + floor.unsqueeze(-1) * x
            pyro.sample("y", dist.Normal(mean, sigma.unsqueeze(-1)).mask(seen).to_event(1), obs=y)

    def exact(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, slope, floor, t, s = g.T.unsqueeze(-1)
        log_p = sum(log_normal(each, 0, 25) for each in (mu, slope, floor)) + log_normal(t, -1, 1) + log_normal(s, 0, 1)
        between, within, prior = (2 * t).exp(), (2 * s).exp(), mu + slope * soil
        left = (y - floor[..., None] * x) * seen
        mean = left.sum(-1) / n
        rest = (left**2).sum(-1) - n * mean**2
        each = log_normal(mean, prior, between + within / n) - 0.5 * rest / within
        each = each - 0.5 * (n - 1) * (2 * math.pi * within).log() - 0.5 * n.double().log()
        v = 1 / (1 / between + n / within)
        m = v * (n * mean / within + prior / between)
        log_p = log_p[:, 0] + each.sum(-1)
        return (log_p, m, v) if centered else (log_p, (m - prior) / t.exp(), v / between)

    return Hierarchy(model, ("mu", "slope", "floor", "tau", "sigma"), ("theta",), exact)


def nested(count: int, centered: bool) -> Hierarchy:
    random = torch.Generator().manual_seed(0)
    mean = 1.0 + torch.randn(count, 1, generator=random)
    y = mean + 0.7 * torch.randn(count, 10, generator=random) + 0.5 * torch.randn(count, 10, generator=random)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        between, within = (pyro.sample(name, dist.LogNormal(0.0, 0.5)) for name in ("between", "within"))
        with pyro.plate("classes", count, dim=-2):
            level = pyro.sample("level", dist.Normal(mu, between))
            with pyro.plate("pupils", 10, dim=-1):
                if centered:
                    pupil = pyro.sample("pupil", dist.Normal(level, within))
                else:
                    pupil = level + within * pyro.sample("pupil", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(pupil, 0.5), obs=y)

    def exact(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, b, w = g.T.unsqueeze(-1)
        between, within = (2 * b).exp(), (2 * w).exp()
        error = (within + 0.25) / 10
        bar = y.mean(1)
        log_p = (log_normal(mu, 0, 25) + log_normal(b, 0, 0.25) + log_normal(w, 0, 0.25))[:, 0]
        rest = (y - bar[:, None]).square().sum()
        log_p = log_p + log_normal(bar, mu, between + error).sum(-1)
        log_p = log_p - 0.5 * rest / (within + 0.25)[:, 0] - 0.5 * 9 * count * (within + 0.25)[:, 0].log()
        v = 1 / (1 / between + 1 / error)
        m = v * (bar / error + mu / between)
        v = v.expand_as(m)
        part = 0.25 / (within + 0.25)  # of the class's level in a pupil's
        pupil = part[..., None] * m[..., None] + (1 - part[..., None]) * y
        spread = ((part**2 * v + within * part)[..., None]).expand(pupil.shape)
        if not centered:
            share = ((1 - part) / within.sqrt())[..., None]
            pupil, spread = share * (y - m[..., None]), (share**2 * v[..., None] + part[..., None]).expand(pupil.shape)
        return log_p, torch.cat([m, pupil.flatten(1)], 1), torch.cat([v, spread.flatten(1)], 1)

    return Hierarchy(model, ("mu", "between", "within"), ("level", "pupil"), exact)


def rows(count: int, centered: bool) -> Hierarchy:
    random = torch.Generator().manual_seed(0)
    group = torch.randint(count, (ROWS,), generator=random)
    x = torch.randn(ROWS, generator=random)
    level = 1.0 + 0.5 * torch.randn(count, generator=random)
    y = level[group] + 0.7 * x + torch.randn(ROWS, generator=random)

    def model() -> None:
        mu, slope = (pyro.sample(name, dist.Normal(0.0, 5.0)) for name in ("mu", "slope"))
        tau, sigma = (pyro.sample(name, dist.LogNormal(0.0, 1.0)) for name in ("tau", "sigma"))
        with pyro.plate("members", count):
            if centered:
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = mu + tau * pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", ROWS):
            pyro.sample("y", dist.Normal(theta[..., group] + slope * x, sigma), obs=y)

    def total(each: Tensor) -> Tensor:
        return torch.zeros(count).index_add(0, group, each)

    n, sum_x, sum_y = total(torch.ones(ROWS)), total(x), total(y)
    xx, xy, yy = (x * x).sum(), (x * y).sum(), (y * y).sum()

    def exact(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, slope, t, s = g.T.unsqueeze(-1)
        log_p = (log_normal(mu, 0, 25) + log_normal(slope, 0, 25) + log_normal(t, 0, 1) + log_normal(s, 0, 1))[:, 0]
        between, within = (2 * t).exp(), (2 * s).exp()
        mean = (sum_y - slope * sum_x) / n
        rest = (yy - 2 * slope * xy + slope**2 * xx)[:, 0] - (n * mean**2).sum(-1)
        log_p = log_p - 0.5 * rest / within[:, 0] - 0.5 * (ROWS - count) * within[:, 0].log()
        log_p = log_p + log_normal(mean, mu, between + within / n).sum(-1)
        v = 1 / (1 / between + n / within)
        m = v * (n * mean / within + mu / between)
        return (log_p, m, v) if centered else (log_p, (m - mu) / t.exp(), v / between)

    return Hierarchy(model, ("mu", "slope", "tau", "sigma"), ("theta",), exact)


def level(count: int, centered: bool) -> Hierarchy:
    random = torch.Generator().manual_seed(0)
    y = (0.3 * torch.randn(count, generator=random)).cumsum(0) + 0.7 * torch.randn(count, generator=random)

    def model() -> None:
        walk, noise = (pyro.sample(name, dist.LogNormal(-1.0, 1.0)) for name in ("walk", "noise"))
        if centered:
            theta = pyro.sample("theta", dist.Normal(torch.zeros(count), 100.0).to_event(1))
            before = torch.cat([torch.zeros_like(theta[..., :1]), theta[..., :-1]], -1)
            flat = dist.Normal(0.0, 100.0).log_prob(theta)
            pyro.factor("walks", (dist.Normal(before, walk.unsqueeze(-1)).log_prob(theta) - flat).sum(-1))
        else:
            moves = pyro.sample("theta", dist.Normal(torch.zeros(count), 1.0).to_event(1))
            theta = walk.unsqueeze(-1) * moves.cumsum(-1)
        pyro.sample("y", dist.Normal(theta, noise.unsqueeze(-1)).to_event(1), obs=y)

    def exact(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Kalman's filter, and Rauch, Tung and Striebel's smoother."""
        log_p = (log_normal(g, -1, 1)).sum(-1)
        move, error = (2 * g).exp().T
        mean, variance = torch.zeros_like(move), torch.zeros_like(move)
        seen = []
        for value in y:
            ahead = variance + move
            log_p = log_p + log_normal(value, mean, ahead + error)
            gain = ahead / (ahead + error)
            mean, variance = mean + gain * (value - mean), gain * error
            seen.append((mean, variance))
        means, variances, across = [mean], [variance], []
        for mean, variance in seen[-2::-1]:
            back = variance / (variance + move)
            across.append(back * variances[-1])
            variances.append(variance + back**2 * (variances[-1] - variance - move))
            means.append(mean + back * (means[-1] - mean))
        m, v = torch.stack(means[::-1], -1), torch.stack(variances[::-1], -1)
        if centered:
            return log_p, m, v
        between = v[:, 1:] + v[:, :-1] - 2 * torch.stack(across[::-1], -1)
        size = g[:, :1].exp()
        return (
            log_p,
            m.diff(dim=-1, prepend=torch.zeros(len(g), 1)) / size,
            torch.cat([v[:, :1], between], -1) / size**2,
        )

    return Hierarchy(model, ("walk", "noise"), ("theta",), exact)


KINDS = {"normals": normals, "logistic": logistic, "radon": radon, "nested": nested, "rows": rows, "level": level}
SIZES = {
    "normals": (8, 100, 1000),
    "logistic": (200, 1000, 10_000),
    "radon": (85,),
    "nested": (20,),
    "rows": (300,),
    "level": (200, 1000),
}
FORMS = {"centered": True, "noncentered": False}
NAMES = [f"{kind}-{count}-{form}" for kind, counts in SIZES.items() for count in counts for form in FORMS]


@torch.no_grad()
def reference(hierarchy: Hierarchy, count: int = REFERENCE) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of globals, then members."""
    from pyro_flows.infer.search.start import find_start

    random = torch.Generator().manual_seed(0)
    start = find_start(lambda g: hierarchy.exact(g)[0], torch.zeros(len(hierarchy.shared)), generator=random)
    dim = len(hierarchy.shared)
    # Points that fill the space evenly, of a normal that is wider than the marginal density of the globals.
    uniform = torch.quasirandom.SobolEngine(dim, scramble=True, seed=0).draw(count, dtype=torch.float64)
    noise = WIDER * torch.distributions.Normal(0.0, 1.0).icdf(uniform.clamp(1e-12, 1 - 1e-12))
    g = start.loc + noise @ start.scale.mT
    log_p, mean, variance = hierarchy.exact(g)
    weight = (log_p + 0.5 * (noise / WIDER).square().sum(-1)).softmax(0)[:, None]
    means, variances = torch.cat([g, mean], 1), torch.cat([torch.zeros(len(g), dim), variance], 1)
    center = (weight * means).sum(0)
    return center, (weight * (variances + (means - center) ** 2)).sum(0).sqrt()


def run(name: str, dependencies: str, seed: int, seconds: float) -> Row:
    """One fit."""
    # One thread's CPU time is wall time on a machine that others leave alone.
    time.monotonic = time.process_time
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    from pyro_flows.infer import AutoFlow, fit_guide
    from pyro_flows.infer.diagnostics import importance

    members = importlib.import_module("pyro_flows.infer.guides.members")
    kind, count, form = name.split("-")
    hierarchy = KINDS[kind](int(count), FORMS[form])
    center, width = reference(hierarchy, REFERENCE if int(count) < 10_000 else FEWER)
    begin = time.process_time()
    fit = fit_guide(AutoFlow(hierarchy.model, dependencies=dependencies, seed=seed), seconds=seconds, progress=False)
    spent = time.process_time() - begin
    torch.manual_seed(seed)
    places = {site.name: slice(site.start, site.start + site.size) for site in fit.latents}
    z = fit.flow.sample((DRAWS,))
    drawn = torch.cat([z[:, places[site]] for site in (*hierarchy.shared, *hierarchy.local)], 1)
    mean = (drawn.mean(0) - center).abs() / width
    sd = (drawn.std(0) / width - 1).abs()
    few = len(hierarchy.shared)
    picked = None
    if fit.guide.structure is not None:
        found = members.pick_members(fit.flow, fit._density, fit.guide.structure, 500)
        picked = None if found is None else importance(found[1]).ess
    return {
        **{"name": name, "dependencies": dependencies, "seed": seed, "seconds": seconds, "cpu": spent},
        **{"dim": fit.latents.dim, "ess": fit.ess, "picked": picked, "khat": fit.khat, "steps": len(fit.history)},
        **{"globals": [float(mean[:few].max()), float(sd[:few].max())], "verdict": fit.verdict.label},
        **{"members": [float(mean[few:].max()), float(sd[few:].max())]},
        "parameters": sum(p.numel() for p in fit.flow.parameters()),
    }


def table(rows: list[Row]) -> str:
    """One line for each hierarchy and kind of guide: medians over seeds, with the least and greatest ESS."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["name"], row["dependencies"], row["seconds"]), []).append(row)
    lines = []
    for (name, dependencies, seconds), each in groups.items():
        ess = [row["ess"] for row in each]
        picked = [row["picked"] for row in each if row["picked"] is not None]
        errors = (
            " / ".join(f"{statistics.median(row[part][k] for row in each):.2f}" for k in (0, 1))
            for part in ("globals", "members")
        )
        verdicts = [row["verdict"] for row in each]
        cells = [
            str(name),
            str(each[0]["dim"]),
            f"{dependencies}, {seconds:g} s",
            f"{each[0]['parameters']:,}",
            f"{statistics.median(row['steps'] for row in each):.0f}",
            f"{statistics.median(ess):.3f} ({min(ess):.3f} to {max(ess):.3f})",
            f"{statistics.median(picked):.3f}" if picked else "-",
            *errors,
            "; ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts)),
        ]
        lines.append(cells)
    header = "hierarchy|D|dependencies|parameters|steps|ESS|picked|globals, mean / sd|members, mean / sd|verdict"
    return markdown(header.split("|"), lines)


def said(row: Row) -> str:
    about = (
        f"{row['name']:<28}{row['dependencies']:<8}seed {row['seed']}  {row['steps']:>5} steps  ESS {row['ess']:.3f}"
    )
    return f"{about}  globals {row['globals']}  members {row['members']}  {row['verdict']}  {row['cpu']:.1f} s"


def arguments() -> Namespace:
    args = command(
        __doc__,
        "one small hierarchy, two seconds",
        names={"nargs": "+", "choices": NAMES, "default": NAMES, "metavar": "NAME", "help": ", ".join(NAMES)},
        dependencies={"nargs": "+", "choices": ("model", "dense"), "default": ["model", "dense"]},
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2]},
        seconds={"type": float, "default": 10, "help": "CPU seconds of each fit"},
        jobs={"type": int, "default": 1, "help": "runs at a time"},
        results={"type": Path, "help": "JSON lines of runs, read and added to"},
    )
    if args.smoke:
        args.names, args.seeds, args.seconds, args.results = ["normals-8-centered"], [0], 2.0, None
    return args


def main() -> None:
    args = arguments()
    print(f"{machine()}; float64, one thread a run, CPU seconds\n")
    wanted = [(n, d, seed, args.seconds) for n in args.names for d in args.dependencies for seed in args.seeds]
    rows = complete(
        run,
        wanted,
        lambda row: (row["name"], row["dependencies"], row["seed"], row["seconds"]),
        said,
        results=args.results,
        jobs=args.jobs,
        fresh=not args.smoke,
    )
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
