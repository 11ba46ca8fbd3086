"""The rows that a fit keeps for its verdict, and the numbers behind it."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_flows.core.modes import evaluating
from pyro_flows.distributions import Ensemble
from pyro_flows.infer.density.data import Rows, admit_rows, expected_by
from pyro_flows.infer.density.objective import evaluate, log_prob_of
from pyro_flows.infer.density.prepare import Survey, reals_of
from pyro_flows.infer.density.references import reference_scores
from pyro_flows.infer.density.units import StandardizedDensity, head_of, is_plain_flow
from pyro_flows.infer.diagnostics.densities import FEWEST, DensityChecks, DensityVerdict, judge_density
from pyro_flows.infer.diagnostics.moments import scalar_names
from pyro_flows.infer.diagnostics.two_sample import classify
from pyro_flows.infer.machine.checkpoint import checksum
from pyro_flows.infer.machine.randomness import own_randomness

__all__ = ["Kept", "admitted", "check_density", "judge_rows", "keep"]

_KEPT = 10_000  # training rows kept, for the Gaussian and to find some that score too little
_JUDGED = 2000  # rows judged
_NUMBERS = 2**21  # in kept rows, and in the draws of a call
_COPIES, _MOST, _DRAWS = 20, 80, 20_000  # draws of a row, at least and at most, and draws in all
_CLASSIFIED = 4  # draws of a row that the classifier sees
_PROBES = (64, 512)  # draws that are timed first
_AT_ONCE = 4096  # draws of a call


@dataclass(frozen=True)
class Kept:
    """Rows on the CPU to judge a density by: fresh ones, and some that it was trained on; ``None`` for none.

    Example:
        >>> fit = pf.fit_density(pf.realnvp(2), torch.randn(200, 2), steps=2)
        >>> len(fit.kept[0].fresh), len(fit.kept[0].trained)  # of 200 rows
        (20, 180)
    """

    density: Any
    fresh: Rows | None
    trained: Rows | None


def keep(density: Any, held_out: Rows | None, train: Rows, seed: int) -> Kept:
    """Keeps random rows of those held out and of those for training."""
    return Kept(density, *(_some(source, most, seed) for source, most in ((held_out, _JUDGED), (train, _KEPT))))


def _some(rows: Rows | None, most: int, seed: int) -> Rows | None:
    if rows is None:
        return None
    if rows.weight is not None:  # as many rows of each kind as the weights say, and none twice
        chance = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed), device="cpu")
        rows = rows.take((chance < (rows.weight / rows.weight.max()).cpu()).nonzero()[:, 0])
        rows = replace(rows, weight=None)
    return _chosen(rows, most, seed).to("cpu")


def _chosen(rows: Rows, most: int, seed: int) -> Rows:
    """Chooses rows at random, fewer of large events, and keeps their order."""
    room = max(100, _NUMBERS // max(rows.value[0].numel(), 1))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed), device="cpu")
    return rows.take(order[: min(most, room)].sort().values)


def judge_rows(
    density: Any,
    data: Any,
    context: Any = None,
    *,
    training: Any = None,
    training_context: Any = None,
    seconds: float = 2.0,
) -> DensityVerdict:
    """Judges any density by rows that it was not trained on: a flow, a MADE, an ensemble, or a module alike.

    Args:
        density: a module with ``log_prob`` and ``sample``, in the units of the data.
        data: rows, at least 100 for a full judgment; of more than 2,000, as many are chosen at random.
        context: their contexts, shape ``(rows, context_dim)``, if the density takes them.
        training: rows that it was trained on, to fit the Gaussian to and to find overfitting by.
        training_context: their contexts.
        seconds: the time for draws.

    Raises:
        ValueError: for rows that do not fit, or lie outside the support.

    Example:
        >>> from pyro_flows.infer.density.judging import judge_rows
        >>> flow = pf.Flow(pf.realnvp(2))  # the standard normal
        >>> judge_rows(flow, torch.randn(200, 2), training=torch.randn(200, 2)).ok
        True
        >>> judge_rows(flow, 3 + torch.randn(200, 2), training=3 + torch.randn(200, 2)).ok
        False
    """
    fresh = admitted(density, data, context, who="judge_rows")
    trained = None
    if training is not None:
        trained = _some(
            admitted(density, training, training_context, "training", "training_context", "judge_rows"), _KEPT, 0
        )
    checks = check_density((Kept(density, fresh, trained),), seconds)
    return judge_density(checks, f"Judged on {len(checks.scores):,} of the rows given.", remedy="give more rows")


def admitted(
    density: Any, data: Any, context: Any, what: str = "data", what_context: str = "context", who: str = "fit_density"
) -> Rows:
    """Checks rows for a density, and refuses those outside the support of a flow."""
    rows = admit_rows(
        data, context, expected_by(density, who, "a tensor or a NumPy array of numbers"), what, what_context
    )
    if is_plain_flow(density):
        reals_of(density, rows.value, what)
    return rows


@torch.no_grad()
def check_density(parts: Sequence[Kept], seconds: float) -> DensityChecks:
    """Scores fresh rows, and compares them with draws, in about so many seconds.

    The parts are one density, or the members of an ensemble with rows that each has not seen.  Each row gets from 20 to
    80 draws at its own context, 20,000 in all, at the cost of as many draws and scores; time cuts the draws of a row
    first, and then the rows.
    """
    seed = _seed_of(parts)
    with own_randomness(expected_by(parts[0].density).device, seed), ExitStack() as stack:
        for part in parts:
            stack.enter_context(evaluating(part.density))
        judging = _Judging(parts, seconds, seed)
        try:
            judging.cut()
            failed = None
        except _DrawError as error:
            failed = error
        checks = judging.scores()
        checks = replace(checks, **judging.rival())
        if failed is None:
            try:
                checks = replace(checks, **judging.draws(checks.scores))
            except _DrawError as error:
                failed = error
    notes = judging.notes if failed is None else [*judging.notes, str(failed)]
    return replace(checks, notes=tuple(notes))


def _seed_of(parts: Sequence[Kept]) -> int:
    """A seed for these rows, so that a verdict can be repeated, and is independent of that on other rows."""
    return zlib.crc32("".join(checksum(part.fresh.value) for part in parts if part.fresh is not None).encode())


class _DrawError(Exception):
    """There are no draws, for the reason told."""


class _Judging:
    """Rows of each part, chosen at random and on the density's device, and notes on what is left out."""

    def __init__(self, parts: Sequence[Kept], seconds: float, seed: int) -> None:
        self.parts, self.seconds, self.seed, self.notes = parts, seconds, seed, list[str]()
        most = max(_JUDGED // len(parts), 1)
        whole = [part.fresh for part in parts if part.fresh is not None]
        self.rows = [_placed(_chosen(rows, most, seed), part) for rows, part in zip(whole, parts, strict=True)]
        known = [(part.trained, part) for part in parts if part.trained is not None]
        self.trained = [_placed(_chosen(rows, _KEPT // len(parts), seed), part) for rows, part in known]

    def cut(self) -> None:
        """Leaves as many rows as have time for one draw each."""
        each, first, count = 0.0, self.rows[0], sum(map(len, self.rows))
        for probe in _PROBES:
            begin = time.monotonic()
            _draw(self.parts[0].density, first.take(torch.arange(probe, device="cpu") % len(first)), 1)
            taken = time.monotonic() - begin
            each = taken * max(1.0, count / probe)
            if each <= self.seconds or taken > self.seconds / 4:
                break
        if each > self.seconds:
            share, least = self.seconds / each, max(1, FEWEST // len(self.rows))
            self.rows = [_chosen(rows, max(least, int(share * len(rows))), self.seed) for rows in self.rows]
            self.notes.append(f"Draws take long, so {sum(map(len, self.rows)):,} of {count:,} rows were judged.")

    def scores(self) -> DensityChecks:
        """Scores rows, and finds values that many of them share."""
        pairs = list(zip(self.parts, self.rows, strict=True)), list(zip(self.parts, self.trained, strict=False))
        fresh, training = ([_score(part.density, rows) for part, rows in each] for each in pairs)
        contexts = [_flat(rows.context) for rows in self.rows if rows.context is not None]
        empty = torch.zeros(0, dtype=torch.long, device="cpu")
        return DensityChecks(
            torch.cat(fresh),
            torch.cat([rows.index for rows in self.rows]).cpu(),
            list(self.rows[0].columns or scalar_names("x", self.rows[0].value.shape[1:])),
            training=torch.cat([empty.double(), *training]),
            training_index=torch.cat([empty, *(rows.index.cpu() for rows in self.trained)]),
            context=torch.cat(contexts) if contexts else None,
            repeated=self._repeated(),
            seed=self.seed,
        )

    def _repeated(self) -> tuple[str, ...]:
        """Tells of values that many rows share in continuous columns."""
        model = _bare(self.parts[0].density)
        head = head_of(model)
        if not is_plain_flow(model) and head is None:
            return ()
        # Rows of several members, and training rows that are judged, must not count twice.
        apart = len(self.parts) == 1 and self.parts[0].fresh is not self.parts[0].trained
        values = torch.cat([_flat(rows.value) for rows in (*self.rows, *(self.trained if apart else []))])
        discrete = [False] * values.shape[1] if head is None else head.discrete_dims()
        survey = Survey(self.rows[0].columns)
        survey.add(values)
        return tuple(survey.repeats(values, ~torch.tensor(discrete, device="cpu")))

    def rival(self) -> dict[str, Any]:
        """Scores the rows by a simple density of the training rows."""
        found: list[Tensor] = []
        name = ""
        for part, rows in zip(self.parts, self.rows, strict=True):
            if part.trained is None:
                return {}
            name, scores = reference_scores(_bare(part.density), _placed(part.trained, part), rows)
            if scores is None:
                self.notes.append(f"There is no simple density to compare with, {name}.")
                return {}
            found.append(scores)
        return {"rival": name, "rival_scores": torch.cat(found)}

    def draws(self, scores: Tensor) -> dict[str, Any]:
        """Ranks rows among draws, and classifies rows and draws."""
        begin, count = time.monotonic(), len(scores)
        values = torch.cat([_flat(rows.value) for rows in self.rows])
        asked = min(max(_DRAWS // count, _COPIES), _MOST)
        at_once = max(1, min(_AT_ONCE // count, _NUMBERS // max(values.numel(), 1)))
        own = torch.cat([values.double(), scores.unsqueeze(-1)], 1)
        below, equal = (torch.zeros(own.shape, dtype=torch.long, device="cpu") for _ in range(2))
        drawn_scores, shown, failed, copies = [], [], 0, 0
        more = 1
        while more > 0:
            pieces = [_draw(part.density, rows, more) for part, rows in zip(self.parts, self.rows, strict=True)]
            drawn = torch.cat(pieces, 1)
            failed += int((~drawn[..., :-1].isfinite()).any(-1).sum())
            drawn = drawn.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            below += (drawn < own).sum(0)
            equal += (drawn == own).sum(0)
            drawn_scores.append(drawn[..., -1])
            shown.append(drawn[: max(_CLASSIFIED - copies, 0)])
            copies += more
            spent = time.monotonic() - begin
            more = min(at_once, asked - copies, int((self.seconds - spent) * copies / max(spent, 1e-9)))
        if copies < asked:
            self.notes.append(f"Draws take long, so each row has {copies} of {asked}.")
        ties = (torch.rand(equal.shape, dtype=torch.float64, device="cpu") * (equal + 1)).long()
        contexts = [_flat(rows.context).double() for rows in self.rows if rows.context is not None]
        context = [torch.cat(contexts)] if contexts else []
        few = torch.cat(shown)
        return {
            "draws": torch.cat(drawn_scores),
            "ranks": below + ties,
            "failures": failed / (copies * count),
            "two_sample": classify(
                torch.cat([own, *context], 1),
                torch.cat([few, *(each.expand(len(few), -1, -1) for each in context)], -1),
                self.seed,
            ),
        }


def _placed(rows: Rows, part: Kept) -> Rows:
    expected = expected_by(part.density)
    return rows.to(expected.device, expected.dtype)


def _flat(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).cpu()


def _draw(density: Any, rows: Rows, copies: int) -> Tensor:
    """Draws for each row, with log-densities in the last column; shape ``(copies, rows, columns + 1)``, on the CPU."""
    count = copies * len(rows)
    shape = (count, *rows.value.shape[1:])
    try:
        if rows.context is None:
            context, drawn = None, density.sample((count,))
        else:
            context = rows.context.repeat(copies, *[1] * (rows.context.dim() - 1))
            drawn = density.sample((), context)
        # A density that caches its last draws scores this very tensor for free.
        drawn = drawn if drawn.shape == shape else drawn.reshape(shape)
        bad = ~drawn.isfinite().reshape(count, -1).all(1)
        safe = drawn
        if bad.any():  # a validating distribution refuses NaN
            safe = drawn.clone()
            safe[bad] = rows.value[0].to(drawn)
        scores = log_prob_of(density)(safe, context).masked_fill(bad, torch.nan)
    except (RuntimeError, ArithmeticError, AttributeError, TypeError, ValueError) as error:  # a module's own ways
        told = f"There are no draws to compare rows with ({type(error).__name__}: {error})."
        raise _DrawError(told) from error
    table = torch.cat([_flat(drawn).double(), scores.double().cpu().unsqueeze(-1)], 1)
    return table.unflatten(0, (copies, len(rows)))


def _score(density: Any, rows: Rows) -> Tensor:
    """Scores rows; NaN counts as density zero."""
    found = torch.cat([scores.double().cpu() for scores in evaluate(log_prob_of(density), rows)])
    return found.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _bare(density: Any) -> Any:
    """Returns the first member of an ensemble, and a module without its units."""
    while isinstance(density, Ensemble | StandardizedDensity):
        density = density.members[0] if isinstance(density, Ensemble) else density.module
    return density
