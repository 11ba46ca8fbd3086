"""Discrete latents: MADE as a guide that is trained once and answers for all data.

    python examples/discrete.py              # prints a table, leaves made_guide.png in out/
    python examples/discrete.py --smoke      # the same in seconds, with a budget too small to mean anything

A patient has some of eight diseases and shows some of six symptoms, each of which may come from any of four diseases.
Where a symptom is seen, one disease explains the others away, so under the posterior they are far from independent:
"this one or that one, rarely both, never neither".  There are 256 states, so everything is known exactly.

Four guides learn q(diseases | symptoms) by stock ``SVI`` and are compared with the exact posteriors:

- MADE by score-function gradients (``TraceGraph_ELBO``) with a learned baseline,
- MADE by a relaxation: differentiable draws of ``made.relaxed(temperature)``, which are scored by the masses of the
  discrete model and prior, carried on linearly between 0 and 1; the temperature falls,
- MADE by a relaxation with densities: the bound of a model whose latents are continuous.  It is a proper bound, but on
  another model's evidence, and at no temperature is its best guide the best discrete one,
- independent Bernoullis by score-function gradients.
"""

import itertools
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from _script import FLOW, OTHER, THIRD, TRUTH, begin, save
from matplotlib import pyplot as plt
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor, nn
from tqdm import trange

import pyro_flows as pf

DISEASES, SYMPTOMS, PRIOR, LEAK = 8, 6, 0.2, 0.02
STATES = torch.tensor(list(itertools.product((0.0, 1.0), repeat=DISEASES)))
# Name, form, steps, patients in a batch, particles, step size, color.
GUIDES = (
    ("MADE, score function", "score", 600, 128, 8, 0.03, FLOW),
    ("MADE, relaxed, masses", "masses", 500, 128, 1, 0.03, THIRD),
    ("MADE, relaxed, densities", "densities", 500, 128, 1, 0.03, "#b8a1c9"),
    ("independent, score function", "independent", 600, 128, 8, 0.01, OTHER),
)
KEPT_AT, FALLS = 0.5, (0.5, 0.1)  # temperatures


def effects() -> Tensor:
    """How likely a disease (row) makes a symptom (column) appear: four diseases for each symptom."""
    generator = torch.Generator().manual_seed(0)
    table = torch.zeros(DISEASES, SYMPTOMS)
    for k in range(SYMPTOMS):
        table[torch.randperm(DISEASES, generator=generator)[:4], k] = 0.8 + 0.19 * torch.rand(4, generator=generator)
    return table


EFFECTS = effects()


def symptoms(diseases: Tensor) -> dist.Distribution:
    """Noisy or: a symptom is missing if every cause fails, each by itself; for values between 0 and 1 too."""
    missing = (1 - LEAK) * (1 - diseases.unsqueeze(-1) * EFFECTS).prod(-2)
    return dist.Bernoulli(probs=1 - missing).to_event(1)


def patients(seen: Tensor, form: str = "score", temperature: float = 1.0) -> None:
    if form == "densities":
        prior = dist.RelaxedBernoulli(torch.tensor(temperature), probs=torch.tensor(PRIOR))
    else:  # of values between 0 and 1 its log_prob is linear
        prior = dist.Bernoulli(PRIOR, validate_args=False)
    with pyro.plate("patients", len(seen)):
        z = pyro.sample("diseases", prior.expand([DISEASES]).to_event(1))
        pyro.sample("seen", symptoms(z), obs=seen)


class Guide(nn.Module):
    """q(diseases | symptoms): a MADE whose context is the symptoms, or independent Bernoullis from a network."""

    def __init__(self, independent: bool, width: int = 256) -> None:
        super().__init__()
        self.made = None if independent else pf.MADE(DISEASES, hidden_dims=(width,), context_dim=SYMPTOMS)
        self.net = nn.Sequential(nn.Linear(SYMPTOMS, width), nn.SiLU(), nn.Linear(width, DISEASES))
        self.baseline = nn.Sequential(nn.Linear(SYMPTOMS, 64), nn.SiLU(), nn.Linear(64, 1), nn.Flatten(0))

    def posterior(self, seen: Tensor) -> dist.Distribution:
        """Batch shape ``seen.shape[:-1]``."""
        return dist.Bernoulli(logits=self.net(seen)).to_event(1) if self.made is None else self.made(seen)

    def relaxed(self, seen: Tensor, form: str, temperature: float) -> dist.Distribution:
        """With differentiable draws."""
        relaxed = self.made.relaxed(temperature)(seen)
        if form == "densities":
            return relaxed
        z = relaxed.rsample()
        logits = self.made.params(z, seen).squeeze(-1)
        masses = dist.Bernoulli(logits=logits, validate_args=False).to_event(1).log_prob(z)
        return dist.Delta(z, masses, event_dim=1)

    def forward(self, seen: Tensor, form: str = "score", temperature: float = 1.0) -> None:
        pyro.module("guide", self)
        with pyro.plate("patients", len(seen)):
            if form in ("masses", "densities"):
                pyro.sample("diseases", self.relaxed(seen, form, temperature))
                return
            # The average has the shape of particles and patients, to which the network's output broadcasts.
            baseline = {"nn_baseline": self.baseline, "nn_baseline_input": seen, "use_decaying_avg_baseline": True}
            pyro.sample("diseases", self.posterior(seen), infer={"baseline": baseline})


class Exact:
    """What enumeration says of some patients.

    Args:
        seen: shape ``(N, SYMPTOMS)``.
    """

    def __init__(self, seen: Tensor) -> None:
        self.seen = seen
        prior = dist.Bernoulli(PRIOR).expand([DISEASES]).to_event(1)
        joint = prior.log_prob(STATES) + symptoms(STATES).log_prob(seen.unsqueeze(1))  # (N, states)
        self.evidence = joint.logsumexp(-1)
        self.log_posterior = joint - self.evidence.unsqueeze(-1)
        self.marginals, self.covariances = moments(self.log_posterior.exp())

    @torch.no_grad()
    def log_guide(self, guide: Guide) -> Tensor:
        """Log-probabilities of all states, shape ``(N, states)``."""
        return guide.posterior(self.seen).log_prob(STATES.unsqueeze(1)).T

    def gaps(self, guide: Guide) -> Tensor:
        """Nats from the ELBO to the log evidence, that is KL(q || p), for each patient."""
        log_q = self.log_guide(guide)
        return (log_q.exp() * (log_q - self.log_posterior)).sum(-1)


def moments(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Of states with these probabilities, shape ``(N, states)``: marginals and covariances of pairs."""
    marginals = probs @ STATES
    pairs = torch.einsum("ns,si,sj->nij", probs, STATES, STATES)
    return marginals, pairs - marginals.unsqueeze(-1) * marginals.unsqueeze(-2)


def train(
    name: str, form: str, steps: int, batch: int, particles: int, lr: float, seen: Tensor, exact: Exact
) -> tuple[Guide, list[tuple[int, float]]]:
    """A guide, and its gap along the training."""
    pyro.clear_param_store()
    guide = Guide(form == "independent")
    reparameterized = form in ("masses", "densities")
    elbo = Trace_ELBO if reparameterized else TraceGraph_ELBO
    objective = elbo(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    svi = SVI(patients, guide, ClippedAdam({"lr": lr, "lrd": 0.03 ** (1 / steps), "clip_norm": 100.0}), objective)
    curve = []
    high, low = FALLS if form == "masses" else (KEPT_AT, KEPT_AT)
    with trange(steps, desc=f"  {name}", leave=False) as progress:
        for step in progress:
            temperature = high * (low / high) ** (step / steps)
            rows = torch.randint(len(seen), (batch,))
            svi.step(seen[rows], form, temperature)
            if (step + 1) % max(1, steps // 25) == 0:
                curve.append((step + 1, float(exact.gaps(guide).mean())))
                progress.set_postfix_str(f"gap {curve[-1][1]:.3f} nats")
    return guide, curve


def judge(name: str, guide: Guide, exact: Exact, seconds: float) -> None:
    gaps = exact.gaps(guide)
    marginals, covariances = moments(exact.log_guide(guide).exp())
    pairs = ~torch.eye(DISEASES, dtype=torch.bool)
    errors = ((marginals - exact.marginals).abs().mean(), (covariances - exact.covariances)[:, pairs].abs().mean())
    numbers = (gaps.mean(), gaps.quantile(0.95), *errors)
    print(f"  {name:<28}" + "".join(f"{float(each):12.4f}" for each in numbers) + f"{seconds:10.1f}")


def shown(exact: Exact, count: int) -> list[int]:
    """Patients of different symptoms whose diseases depend on each other most."""
    covariance = (exact.covariances - torch.diag_embed(exact.covariances.diagonal(dim1=-2, dim2=-1))).abs()
    chosen: list[int] = []
    for row in covariance.sum((-1, -2)).argsort(descending=True).tolist():
        if all(not torch.equal(exact.seen[row], exact.seen[other]) for other in chosen):
            chosen.append(row)
        if len(chosen) == count:
            break
    return chosen


def draw(guides: dict[str, tuple[Guide, list[tuple[int, float]], str]], exact: Exact, path: Path) -> None:
    """For two patients the likeliest sets of diseases, with bars of their probabilities; the gaps along training."""
    fig = plt.figure(figsize=(9.6, 5.8), layout="constrained")
    grid = fig.add_gridspec(2, 3, height_ratios=(3, 2), width_ratios=(1, 1, 0.9))
    first, *_, last = guides
    bars = None
    for column, row in enumerate(shown(exact, 2)):
        probs = {"exact": (exact.log_posterior[row].exp(), TRUTH)}
        probs |= {name: (exact.log_guide(guides[name][0])[row].exp(), guides[name][2]) for name in (first, last)}
        top = probs["exact"][0].argsort(descending=True)[:6]
        bars = ax = fig.add_subplot(grid[0, column], sharey=bars)
        for k, (name, (values, color)) in enumerate(probs.items()):
            places = [j + 0.27 * (k - 1) for j in range(len(top))]
            ax.bar(places, values[top].tolist(), 0.27, color=color, label=name.split(",")[0])
        listed = ", ".join(str(k + 1) for k in exact.seen[row].nonzero().squeeze(-1).tolist())
        ax.set(xticks=[], title=f"a patient with\nsymptoms {listed}")
        states = fig.add_subplot(grid[1, column], sharex=ax)
        for disease in range(DISEASES):
            there = STATES[top, disease].nonzero().squeeze(-1).tolist()
            states.scatter(range(len(top)), [disease + 1] * len(top), s=24, color="#e3e6ec")
            states.scatter(there, [disease + 1] * len(there), s=34, color=TRUTH)
        states.set(ylim=(DISEASES + 0.6, 0.4), yticks=(1, DISEASES), xticks=[], xlabel="likeliest sets of diseases")
        states.spines[:].set_visible(False)
        if column == 0:
            ax.set_ylabel("posterior probability")
            ax.legend()
            states.set_ylabel("disease")
    curves = fig.add_subplot(grid[:, 2])
    for name, (_, curve, color) in guides.items():
        curves.plot(*zip(*curve, strict=True), color=color, linewidth=1.8)
        label = name.replace(", ", ",\n", 1)
        curves.annotate(label, curve[-1], (-4, 5), textcoords="offset points", color=color, ha="right")
    curves.set(yscale="log", xlabel="step", title="nats from the ELBO\nto the log evidence")
    save(fig, path)


def main() -> None:
    args = begin(__doc__)
    torch.set_num_threads(1)
    rows, held_out = (500, 20) if args.smoke else (20_000, 500)
    diseases = torch.bernoulli(torch.full((rows + held_out, DISEASES), PRIOR))
    seen = symptoms(diseases).sample()
    exact = Exact(seen[rows:])
    entropy = -(exact.log_posterior.exp() * exact.log_posterior).sum(-1).mean()
    print(f"{held_out} patients not seen before: log evidence {exact.evidence.mean():.3f} nats on average,")
    print(
        f"entropy of the posterior {entropy:.3f}.  Nats from the ELBO to the exact log evidence (mean, 95 % quantile),"
    )
    print("mean absolute errors of marginals and of covariances of pairs, seconds of training")
    print(" " * 30 + "".join(f"{head:>12}" for head in ("gap", "95 %", "marginals", "pairs")) + f"{'seconds':>10}")
    guides = {}
    for name, form, steps, batch, particles, lr, color in GUIDES:
        start = time.perf_counter()
        budget = 5 if args.smoke else steps
        guide, curve = train(name, form, budget, batch, particles, lr, seen[:rows], exact)
        judge(name, guide, exact, time.perf_counter() - start)
        guides[name] = (guide, curve, color)
    draw(guides, exact, args.out / "made_guide.png")


if __name__ == "__main__":
    main()
