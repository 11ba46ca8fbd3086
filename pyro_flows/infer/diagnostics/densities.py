"""A judgment of a fitted density in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from pyro_flows.core.checks import first_few
from pyro_flows.core.modes import on_cpu
from pyro_flows.infer.diagnostics.neighborhoods import local_pvalues, neighborhoods
from pyro_flows.infer.diagnostics.two_sample import TwoSample
from pyro_flows.infer.diagnostics.uniformity import manner, pvalues_of
from pyro_flows.infer.diagnostics.verdict import GOOD, UNJUDGED, in_words

__all__ = ["DensityChecks", "DensityVerdict", "judge_density", "tail_chance"]

CLOSE, OVERFITTED = "good, small differences", "good, overfitted"
FEW, SEEN = "good, few rows judged", "good, by training rows"
REPEATED, MISFIT = "repeated values", "misfit"
WORSE, WORSE_DISCRETE = "worse than a Gaussian", "worse than independent columns"
GAUSSIANS = ("the Gaussian", "a Gaussian autoregression", "a von Mises-Fisher distribution")
LABELS = (GOOD, CLOSE, OVERFITTED, FEW, SEEN, REPEATED, WORSE, WORSE_DISCRETE, MISFIT, UNJUDGED)

LEVEL = 0.05  # chance of a difference found where there is none
CERTAIN = 0.025  # of a score that is worse, or of training rows that score more
FEWEST = 20  # rows for any judgment
ENOUGH = 100  # rows for a full judgment
HARMLESS = 0.05  # of a distribution function, and of the classifier's probability beyond a half
SHARE = 0.01  # unexplained rows that matter
WASTE = 0.02  # failed draws that matter
GAP, LOSS = 0.1, 0.01  # nats a row by which training rows, and a Gaussian, may score more
NAMED = 8  # rows and columns that a text names

MEANING = {
    GOOD: "no test finds a difference between rows and draws",
    CLOSE: "rows and draws differ, but little",
    OVERFITTED: "fresh rows fit the draws, but training rows score more",
    FEW: "no test finds a difference, but so few rows show gross faults only",
    SEEN: "no test finds a difference, but training rows do not show overfitting",
    REPEATED: "many rows share a value, where a density has no bound, so scores mean nothing",
    WORSE: "a Gaussian describes the rows better",
    WORSE_DISCRETE: "columns that do not depend on each other describe the rows better",
    MISFIT: "draws differ from rows",
    UNJUDGED: "there is no basis for a judgment",
}
FOLDS = "fit with folds=5, so that each row is judged by a member that did not see it"
REGULARIZE = ("take a smaller flow", "weight_decay=1e-2", "or more rows")
TRANSFORM = "transform columns that are skewed or end somewhere, as by a logarithm"
LONGER = "train longer (the fit was ended by {}), then with more layers or wider networks"
MORE = "nothing, or train longer and with more layers where small differences matter"
LARGER = "take more layers, wider networks, or splines (nsf) in place of affine maps"


@dataclass(frozen=True)
class DensityChecks:
    """Numbers behind a :class:`DensityVerdict`, in nats and in the units of the data; all tensors on the CPU.

    Attributes:
        scores: log-densities of the judged rows, shape ``(rows,)``.
        index: the numbers of these rows in the data given.
        names: a name for each column.
        rival_scores: the log-densities of the same rows by a rival fitted to training rows, or ``None``.
        rival: that rival, in words.
        training: log-densities of training rows, shape ``(training rows,)``, and ``training_index``, their numbers.
        draws: log-densities of the density's own draws, shape ``(copies, rows)``: ``copies`` for each row, at its
            context.
        ranks: each value's number of draws below it, in its row's copies, shape ``(rows, columns + 1)``, int64; uniform
            from 0 to ``copies`` if the density is right.  The last column ranks the log-density.
        failures: the share of draws that are not finite.
        two_sample: the classifier's test.
        context: the contexts of the rows, if any.
        notes: what was left out, and why.
        repeated: values that many rows share, in words.
        seed: the seed of what is random, which the rows determine.

    Example:
        >>> fit = pf.fit_density(pf.realnvp(2), torch.randn(300, 2), max_epochs=2)
        >>> checks = fit.verdict.checks
        >>> checks.scores.shape, checks.ranks.shape  # 30 rows, 2 columns and the density
        (torch.Size([30]), torch.Size([30, 3]))
    """

    scores: Tensor
    index: Tensor
    names: list[str]
    rival_scores: Tensor | None = None
    rival: str = "the Gaussian"
    training: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))
    training_index: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long, device="cpu"))
    draws: Tensor | None = None
    ranks: Tensor | None = None
    failures: float = 0.0
    two_sample: TwoSample | None = None
    context: Tensor | None = None
    notes: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    seed: int = 0

    @property
    def copies(self) -> int:
        """The number of draws for each row."""
        return 0 if self.draws is None else len(self.draws)

    def unexplained(self, scores: Tensor) -> Tensor:
        """Marks rows that score so little that the draws would leave one of as many with probability 0.05."""
        if self.draws is None:
            return scores == -math.inf
        return tail_chance(scores, self.draws) * len(scores) < LEVEL

    def places(self) -> Tensor:
        """Spreads ranks evenly over the unit interval, by noise; shape as ``ranks``."""
        if self.ranks is None:
            return torch.zeros(0, len(self.names) + 1, dtype=torch.float64, device="cpu")
        noise = torch.rand(
            self.ranks.shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64, device="cpu"
        )
        return (self.ranks + noise) / (self.copies + 1)


@dataclass(frozen=True)
class DensityVerdict:
    """The result of :func:`judge_density`, to be printed.

    Attributes:
        label: one of the labels of :func:`judge_density`.
        ok: whether the density can be used: if ``"good"``, ``"good, small differences"`` or ``"good, overfitted"``.
        text: the numbers, their meaning, and the next step.
        numbers: the numbers by name; ``pvalue`` is that of all tests together.
        pvalues: the p-value of each test, corrected for the number of columns, but not for that of tests.
        unexplained: the numbers, in the data given, of judged rows that score too little for draws.
        unexplained_training: the same of training rows.
        checks: the numbers by row.

    Example:
        >>> fit = pf.fit_density(pf.realnvp(2), torch.randn(300, 2), max_epochs=2)
        >>> fit.verdict.unexplained  # rows that score too little
        []
    """

    label: str
    ok: bool
    text: str
    numbers: dict[str, float]
    pvalues: dict[str, float]
    unexplained: list[int]
    unexplained_training: list[int]
    checks: DensityChecks = field(repr=False)

    def __str__(self) -> str:
        return in_words(self.label, MEANING[self.label], self.text)


@on_cpu
def judge_density(
    checks: DensityChecks, judged: str = "rows", *, seen: bool = False, stopped: str = "", remedy: str = ""
) -> DensityVerdict:
    r"""Judges a fitted density from rows that it was not trained on, beside its own draws.

    Four tests compare rows and draws: a classifier (:func:`~pyro_flows.infer.diagnostics.two_sample.classify`); the
    ranks of each column, and of the log-density, among draws (as in simulation-based calibration); these ranks by
    neighborhoods of the context; and rows that score too little (:func:`tail_chance`, and how many score less than all
    draws).  Each p-value is multiplied by the number of columns or rows behind it, and the smallest by the number of
    tests.  If the product is below 0.05, a difference is found; for an exact density that has a chance of at most 5 %.

    The first label that applies:

    1. ``"not judged"``: fewer than 20 rows, or no draws.
    2. ``"repeated values"``: many rows share a value of a continuous column.
    3. ``"worse than a Gaussian"`` (an autoregression and a von Mises-Fisher distribution among them), or ``"worse than
       independent columns"``: that model's scores of the same rows are higher, by more than 0.01 nats, and surely (by a
       paired test at level 0.025).
    4. ``"misfit"``: a difference is found, or a fiftieth of the draws is not finite, and it is not small.
    5. ``"good, few rows judged"``: fewer than 100 rows.
    6. ``"good, by training rows"``: no rows were held out.
    7. ``"good, overfitted"``: training rows score 0.1 nats more, and surely more (at level 0.025).
    8. ``"good, small differences"``: a difference is found, and it is small: the classifier tells rows from draws with
       a probability of at most 0.55, where ranks are uneven their distribution function is within 0.05 of a uniform one
       up to noise (1.36 / √rows), and at most 1 % of the rows score too little.
    9. ``"good"``.

    Args:
        checks: the numbers.
        judged: the rows, in words.
        seen: whether these are training rows.
        stopped: what ended the training.
        remedy: how more rows can be judged; by default by folds.

    Example:
        >>> fit = pf.fit_density(pf.realnvp(2), torch.randn(300, 2), max_epochs=2)
        >>> verdict = pf.infer.diagnostics.densities.judge_density(fit.verdict.checks)
        >>> verdict.numbers["rows"]
        30.0

    References:
        Simulation-Based Calibration Checking for Bayesian Computation: The Choice of Test Quantities Shapes Sensitivity
        (Modrák et al., 2022), on ranks of the log-density, arXiv:2211.02383.
        Revisiting Classifier Two-Sample Tests (Lopez-Paz & Oquab, 2016), arXiv:1610.06545.
    """
    found = _Findings(checks, seen)
    n, numbers, pvalues = len(checks.scores), found.numbers, found.pvalues
    facts = [judged, *checks.notes]

    def verdict(label: str, *steps: str) -> DensityVerdict:
        step = "; ".join(dict.fromkeys(filter(None, steps))) or "nothing"
        text = "\n".join([*facts, *found.facts, f"Next: {step[0].upper()}{step[1:]}."])
        rows = found.missed.tolist(), found.lost.tolist()
        return DensityVerdict(label, label in (GOOD, CLOSE, OVERFITTED), text, numbers, pvalues, *rows, checks)

    folds = "" if remedy else "fit with folds=5"
    if n:
        found.scores()
    if n < FEWEST:
        return verdict(UNJUDGED, remedy or FOLDS)
    if checks.ranks is None:
        return verdict(UNJUDGED, "give the module a method sample(sample_shape)")
    found.classifier()
    found.columns(checks.ranks)
    found.context()
    found.rows()
    numbers["pvalue"] = min(1.0, len(pvalues) * min(pvalues.values()))
    differs = numbers["pvalue"] < LEVEL
    if checks.repeated:
        found.facts += [f"{each[0].upper()}{each[1:]}." for each in checks.repeated]
        return verdict(REPEATED, "model such values apart, as the lines above say")
    if numbers.get("worse", 1.0) < CERTAIN and numbers["gain"] < -LOSS:
        label = WORSE if checks.rival in GAUSSIANS else WORSE_DISCRETE
        return verdict(label, folds, *REGULARIZE, f"else use {checks.rival}")
    if checks.failures > WASTE or (differs and not (found.size <= HARMLESS and numbers["unexplained"] <= SHARE * n)):
        ended = stopped in ("steps", "seconds", "max_epochs")
        return verdict(MISFIT, LONGER.format(stopped) if ended else LARGER, *found.steps, *found.look)
    if n < ENOUGH:
        return verdict(FEW, remedy or FOLDS, *found.look)
    if seen:
        return verdict(SEEN, "hold rows out, or judge fresh rows by fit.judge(rows)", *found.look)
    if numbers.get("overfitting", 1.0) < CERTAIN and numbers["gap"] >= GAP:
        return verdict(OVERFITTED, folds, *REGULARIZE, *found.look)
    return verdict(CLOSE, MORE, *found.look) if differs else verdict(GOOD, *found.look)


class _Findings:
    """What the numbers show: facts, numbers, p-values, the size of differences, and what to do."""

    def __init__(self, checks: DensityChecks, seen: bool) -> None:
        self.checks, self.seen = checks, seen
        self.facts: list[str] = []
        self.steps: list[str] = []  # against differences
        self.look: list[str] = []
        self.numbers = {"rows": float(len(checks.scores)), "copies": float(checks.copies)}
        self.pvalues: dict[str, float] = {}
        self.size = 0.0
        self.missed = checks.index[checks.unexplained(checks.scores)]
        lost = torch.zeros(0, dtype=torch.long) if seen else checks.training_index[checks.unexplained(checks.training)]
        self.lost = lost.unique()

    def scores(self) -> None:
        """States scores, and their differences from a Gaussian's and from those of training rows."""
        checks, numbers = self.checks, self.numbers
        mean, error = _mean(checks.scores)
        numbers |= {"score": mean, "score_error": error}
        said = f"Score {mean:.3f} ± {error:.3f} nats a row"
        if checks.rival_scores is not None:
            gain, error = _mean(checks.scores.double() - checks.rival_scores.double())
            numbers |= {"gain": gain, "gain_error": error, "worse": _tail(-gain, error)}
            said += f", {abs(gain):.3f} ± {error:.3f} {'above' if gain >= 0 else 'below'} that of {checks.rival}"
        self.facts.append(f"{said}.")
        empty = int((checks.scores == -math.inf).sum())
        if empty:
            self.facts.append(f"{empty} rows have density zero.")
        if len(checks.training) and not self.seen:
            trained, trained_error = _mean(checks.training)
            gap, error = trained - mean, math.hypot(trained_error, numbers["score_error"])
            numbers |= {"gap": gap, "gap_error": error, "overfitting": _tail(gap, error)}
            self.facts.append(f"Training rows score {abs(gap):.3f} ± {error:.3f} {'more' if gap >= 0 else 'less'}.")

    def classifier(self) -> None:
        """States how well a classifier tells rows from draws."""
        test = self.checks.two_sample
        if test is None:
            return
        self.numbers["auc"], self.pvalues["classifier"] = test.auc, test.pvalue
        self.size = max(self.size, test.auc - 0.5)
        self.facts.append(
            f"A classifier picks the row out of a row and a draw in {test.auc:.1%} of cases (p = {test.pvalue:.2g})."
        )

    def columns(self, ranks: Tensor) -> None:
        """Tests the ranks of each column, and of the log-density."""
        checks, count = self.checks, len(self.checks.names)
        every = torch.cat([pvalues_of(part, checks.copies) for part in ranks.split(64, 1)])  # little memory
        columns, density = every[:-1], float(every[-1])
        least = min(1.0, float(columns.min()) * count)
        self.pvalues |= {"columns": least, "log-density": density}
        said = f"Ranks among {checks.copies} draws: smallest p = {least:.2g} of {count} columns, corrected"
        uneven = [k for k in columns.argsort().tolist() if float(columns[k]) * count < LEVEL]
        named = [f"{checks.names[k]} ({manner(ranks[:, k], checks.copies)})" for k in uneven[: NAMED + 1]]
        tail = f"; {first_few(named, NAMED)}" if named else ""
        more = "more" if float(ranks[:, -1].double().mean()) > 0.5 * checks.copies else "less"
        shape = f" (rows score {more} than draws)" if density < LEVEL else ""
        self.facts.append(f"{said}{tail}; p = {density:.2g} of the log-density{shape}.")
        found = [*uneven, *([count] if density < LEVEL else [])]
        self._note_size(checks.places()[:, found])
        if uneven:
            self.steps.append(TRANSFORM)

    def context(self) -> None:
        """Tests ranks by neighborhoods of the context."""
        checks = self.checks
        if checks.context is None:
            return
        cells = neighborhoods(checks.context)
        count = int(cells.max()) + 1
        if count == 1:
            self.facts.append("The context has too few rows, or one value, so it was not looked at by neighborhoods.")
            return
        places, scalars = checks.places(), [*checks.names, "the log-density"]
        every, normals = local_pvalues(places, cells)
        k = int(every.argmin())
        least = self.pvalues["context"] = min(1.0, float(every[k]) * len(scalars))
        said = f"In {count} neighborhoods of the context: smallest p = {least:.2g} of {len(scalars)} scalars, corrected"
        if least < LEVEL:
            cell, kind = divmod(int(normals[:, k].abs().argmax()), 2)
            self._note_size(places[cells == cell, k : k + 1])
            how = (("high", "low"), ("wide", "narrow"))[kind][int(normals[cell, k, kind] > 0)]
            place = checks.context[cells == cell].double().mean(0).tolist()
            where = first_few((f"{x:.3g}" for x in place), 4)
            how = f"lie too {how}" if not kind else f"are too {how}"
            said += f"; {scalars[k]} worst near ({where}), where draws {how}"
            self.steps.append("wider networks for the context, or features of it as further contexts")
        self.facts.append(f"{said}.")

    def _note_size(self, places: Tensor) -> None:
        """Notes the largest distance of a column's distribution function from uniform, less usual noise."""
        n = len(places)
        ordered, steps = places.sort(0).values, torch.arange(n, dtype=places.dtype, device="cpu").unsqueeze(-1)
        distances = torch.maximum((steps + 1) / n - ordered, ordered - steps / n).flatten()
        noise = math.sqrt(math.log(2 / LEVEL) / (2 * n))  # Dvoretzky, Kiefer and Wolfowitz
        self.size = max([self.size, *(distances - noise).tolist()])

    def rows(self) -> None:
        """Tests the lowest scores, and names rows with scores that draws do not have."""
        checks, n = self.checks, len(self.checks.scores)
        draws = torch.zeros(0) if checks.draws is None else checks.draws
        steps = torch.arange(int((checks.scores < draws.min()).sum()), dtype=torch.float64, device="cpu")
        # All of the lowest ones of rows and draws together are rows.
        lowest = float(((n - steps) / (n + draws.numel() - steps)).prod())
        least = float(tail_chance(checks.scores, draws).min()) * n
        self.pvalues["rows"] = min(1.0, 2 * lowest, 2 * least)
        self.numbers["unexplained"] = float(len(self.missed))
        if checks.failures:
            self.facts.append(f"{checks.failures:.2%} of the draws are not finite.")
        for kind, rows in (("judged", self.missed), ("training", self.lost)):
            if len(rows):
                named = first_few(rows.tolist(), NAMED)
                self.facts.append(f"Scores below those of draws: {len(rows)} of the {kind} rows ({named}).")
                self.look.append("look at the rows named: errors, or tails that a StudentT base would have")


@on_cpu
def tail_chance(scores: Tensor, draws: Tensor) -> Tensor:
    r"""Estimates the probability that a draw scores no more than each score, shape ``(rows,)``.

    It is :math:`(r + 1) / (m + 1)` for a score above :math:`r \ge 1` of :math:`m` draws.  Below all of them, a
    generalized Pareto distribution of the :math:`3 \sqrt m` lowest continues the tail, with an index of 0, exponential,
    or more, unless half of these are ties.

    Args:
        scores: shape ``(rows,)``.
        draws: scores of draws, any shape.

    Example:
        >>> scores = torch.tensor([0.0, -100.0])
        >>> chance = pf.infer.diagnostics.densities.tail_chance(scores, torch.randn(1000))
        >>> bool(chance[0] > 0.4), bool(chance[1] < 1e-6)
        (True, True)

    References:
        Pareto Smoothed Importance Sampling (Vehtari et al., 2015), for the number of draws, arXiv:1507.02646.
    """
    ordered = draws.flatten().double().sort().values
    total = len(ordered)
    scores = scores.double().contiguous()
    chance = (torch.searchsorted(ordered, scores, right=True) + 1).double() / (total + 1)
    size = math.ceil(min(total / 5, 3 * math.sqrt(total)))
    excess = (ordered[size] - ordered[:size]).flip(0)
    if len(excess.unique()) >= max(size / 2, FEWEST) and excess.isfinite().all():
        index, scale = fit_generalized_pareto(excess)
        if not index > 0:
            index, scale = 0.0, float(excess.mean())
        beyond = (ordered[size] - scores) / scale
        rest = -beyond if index < 1e-6 else -torch.log1p(index * beyond) / index
        chance = torch.where(scores < ordered[0], torch.minimum(chance, rest.exp() * size / total), chance)
    return chance.masked_fill(scores == -math.inf, 0.0)


def _mean(values: Tensor) -> tuple[float, float]:
    """Returns a mean and its standard error."""
    values = values.double()
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return float(values.mean()), error


def _tail(value: float, error: float) -> float:
    """Returns the p-value of a value that is not above 0, up to a normal error."""
    if value == math.inf:
        return 0.0
    if not error > 0 or math.isnan(value):
        return 1.0
    return 0.5 * math.erfc(value / error / math.sqrt(2))
