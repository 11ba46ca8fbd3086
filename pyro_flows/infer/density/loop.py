"""The training loop of densities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm

from pyro_flows.core.checks import first_few
from pyro_flows.infer.density.data import Rows, name_rows
from pyro_flows.infer.density.objective import Objective, mean_score
from pyro_flows.infer.density.prepare import Prepared
from pyro_flows.infer.density.settings import Schedule
from pyro_flows.infer.density.units import is_plain_flow
from pyro_flows.infer.machine import processes
from pyro_flows.infer.machine.budget import Budget
from pyro_flows.infer.machine.callback import Callback, asks_to_stop
from pyro_flows.infer.machine.checkpoint import CheckpointFormat
from pyro_flows.infer.machine.compiled import CompiledSteps
from pyro_flows.infer.machine.graph import Replay, replayable
from pyro_flows.infer.machine.interrupts import interrupts_held_back
from pyro_flows.infer.machine.loop import TrainingLoop
from pyro_flows.infer.machine.optimizers import AdamW, Given
from pyro_flows.transforms.continuous.layer import collect_penalties

__all__ = ["CHECKPOINT", "DensityTraining"]

_REMEDY = "try a smaller lr or clip_norm, a flow in float64 (flow.double()), and look at the data for outliers"
_COLUMNS = ("epoch", "step", "train", "validation", "lr", "seconds")  # of a history
_KEPT = ("epoch", "best", "best_epoch", "best_state", "history", "stopped")

CHECKPOINT = CheckpointFormat(
    "fit_density",
    4,
    {
        **dict.fromkeys(("architecture", "data"), dict),
        "settings": {"seed": int},
        "units": {name: (Tensor, type(None)) for name in ("loc", "scale", "context_loc", "context_scale")},
        "coloring": {name: (Tensor, type(None)) for name in ("loc", "factor", "slope")},
        "training": {
            **dict.fromkeys(("flow", "best_state", "optimizer"), dict),
            "schedule": {name: type(value) for name, value in asdict(Schedule("plateau", 1)).items()},
            "history": dict.fromkeys(_COLUMNS, list),
            "averages": list,
            **dict.fromkeys(("spent", "best"), float),
            **dict.fromkeys(("epoch", "step", "best_epoch"), int),
            "stopped": (str, type(None)),
        },
        "random": {"cpu": Tensor, "shuffle": Tensor},
    },
    counter="epoch",
)


class DensityTraining(TrainingLoop):
    """Trains a density by an objective.

    The objective's density is the ``flow`` in the units of the data.  The best state is the one with the best score of
    the validation rows, which may be the first; without these rows, the training score of an epoch decides.
    """

    def __init__(
        self,
        flow: nn.Module,
        objective: Objective,
        start: Prepared,
        optimizer: AdamW | Given,
        progress: bool,
        callback: Callback | None = None,
    ) -> None:
        settings, sizes = start.settings, start.sizes
        super().__init__(flow, Budget(sizes.total_steps, settings.seconds, processes.clock()))
        self.density, self.objective, self.optimizer = objective.density, objective, optimizer
        self.rows, self.validation, self.shuffle = start.train, start.validation, start.shuffle
        self.settings, self.sizes, self.progress, self.callback = settings, sizes, progress, callback
        self.schedule = Schedule(settings.schedule, sizes.patience, objective.notable)
        self.history: dict[str, list[float]] = {name: [] for name in _COLUMNS}
        self.epoch = self.best_epoch = 0
        self.best = -math.inf
        self.stopped: str | None = None
        self.parameters = optimizer.parameters
        self.averages = optimizer.averages
        several = [module for module in flow.modules() if getattr(module, "num_masks", None) != 1]
        self._resample = [f for module in several if callable(f := getattr(module, "resample_masks", None))]
        self._foreign = replayable(self.density)
        resampled = "masks change between steps" if self._resample else None
        self._replay = Replay(self._loss_and_grads, self.parameters, self._foreign or resampled)
        self.compiled = CompiledSteps(settings.compile, self._uncompilable())
        self.best_state = self.snapshot()  # to return to if not even the first epoch ends well

    def train(self) -> None:
        """Runs the remaining epochs."""
        if not self.epoch:
            self._judge_start()
            self.keep(0)
        steps = self.sizes.total_steps
        hidden = not self.progress or processes.rank() > 0
        with tqdm(total=steps, initial=self.budget.done, disable=hidden, unit="step") as bar:
            while self.stopped is None:
                self._train_epoch(bar)
                self._close_epoch(bar)
                self.keep(self.epoch, write=self.stopped is not None)
                if self.callback is not None and self._asked_to_stop(self.callback):
                    self.stopped = "callback"
                    self.keep(self.epoch, write=True)

    def _asked_to_stop(self, callback: Callback) -> bool:
        record = {name: column[-1] for name, column in self.history.items()}
        return asks_to_stop(callback, record) and self.stopped is None

    def settle(self) -> None:
        """Returns to the best state."""
        self.flow.load_state_dict(self.best_state)
        self.density.eval()
        self.optimizer.release()
        self.compiled.close()

    def _train_epoch(self, bar: tqdm) -> None:
        self.density.train()
        self.flow.train()
        total, rows, begin, before = 0.0, 0, processes.clock(), self.budget.done
        for score, count, steps in self._steps():
            total += score * count
            rows += count
            bar.update(steps)
            if self._limit() is not None:
                break
        if not rows:
            raise ValueError("fit_density: the DataLoader given as data was empty in this pass; it must start anew")
        self.epoch += 1
        self._trained = total / rows
        self.budget.step_seconds = (processes.clock() - begin) / (self.budget.done - before)
        if isinstance(self.optimizer, AdamW) and isinstance(self.rows, Rows):  # what can be compiled
            seconds = min(self.budget.left(), (self.sizes.total_steps - self.budget.done) * self.budget.step_seconds)
            pieces = self.rows.order(self.sizes.batch_size, torch.Generator())
            value, context, _, weight = self.rows.batch(pieces[0])
            graph = self._replay.graph_of(value, context, self._shares(value, weight))
            if self._replay.why_not is not None and self.compiled.why_not is None:
                self.compiled.refuse(self._replay.why_not)
            each = self.rows.listed(pieces, self.sizes.batch_size, self.compiled.steps)
            self.compiled.consider(graph, self.optimizer, each, self.rows.tables, seconds)

    def _steps(self) -> Iterator[tuple[float, int, int]]:
        """Takes the steps of an epoch; yields the mean score and number of the rows of one or more, and theirs."""
        rows, optimizer = self.rows, self.optimizer
        if not (isinstance(rows, Rows) and isinstance(optimizer, AdamW) and self.compiled.ready()):
            for batch in rows.batches(self.sizes.batch_size, self.shuffle):
                if len(batch[0]) or processes.count() > 1:
                    score, seen = self._step(*batch)
                    if not seen:  # no process has rows left
                        return
                    yield score, seen, 1
            return
        order = rows.order(self.sizes.batch_size, self.shuffle)
        while len(order):
            count = self.compiled.at_once(len(order), self.budget, self.settings.steps) if self.compiled.ready() else 1
            with self.compiled.turn(count):
                scores = self._compiled_steps(rows, optimizer, order[:count])
                if scores is None:
                    scores = self._plain_steps(rows, order[:count])
            sizes = torch.tensor([len(each) for each in order[:count]], dtype=torch.float64, device="cpu")
            yield float(scores.double() @ sizes / sizes.sum()), int(sizes.sum()), count
            order = order[count:]

    def _step(
        self, value: Tensor, context: Tensor | None, index: Tensor | None, weight: Tensor | None
    ) -> tuple[float, int]:
        for resample in self._resample:  # order-agnostic training: another order each step
            resample()
        return self._take_step(value, context, index, weight)

    def _plain_steps(self, rows: Rows, pieces: Sequence[Tensor]) -> Tensor:
        """Takes a step for each batch and returns their scores."""
        return torch.tensor([self._step(*rows.batch(each))[0] for each in pieces], dtype=torch.float64, device="cpu")

    def _compiled_steps(self, rows: Rows, optimizer: AdamW, pieces: Sequence[Tensor]) -> Tensor | None:
        """Takes a step for each batch and returns their scores; ``None`` if plain ones must do."""
        if not self.compiled.has_turn():
            return None
        factors = [self.schedule.factor(self.budget.fraction_after(k)) for k in range(len(pieces))]
        weights = [self._weight(self.budget.done + 1 + k) for k in range(len(pieces))]
        random = torch.get_rng_state()
        each = rows.listed(pieces, self.sizes.batch_size, self.compiled.steps)
        state, scores, norms = self.compiled.run(
            optimizer, self.settings.clip_norm, factors, weights, each, rows.tables
        )
        fine = bool((scores.isfinite() & norms.isfinite()).all())
        if fine and self.compiled.trusted:
            optimizer.assign(state)
            self.budget.done += len(pieces)
            self._factor = factors[-1]
            return scores.squeeze(-1)
        # Plain steps say what is wrong, or whether the first compiled ones are right.
        torch.set_rng_state(random)
        scores = self._plain_steps(rows, pieces)
        if not fine or not self.compiled.agrees(optimizer, state):
            self.compiled.refuse("compiled steps give other numbers than plain ones")
        return scores

    def _uncompilable(self) -> str | None:
        if not isinstance(self.optimizer, AdamW) or not isinstance(self.rows, Rows):
            return "compiled steps need the default optimizer, and rows held in memory"
        if processes.count() > 1:
            return "steps of several processes exchange gradients"
        if self.rows.value.device.type != "cpu":
            return "steps are compiled for the CPU only"
        if is_plain_flow(self.density) and self.density.chain.discrete:
            return "a compiler rounds integer flows otherwise"
        return self._replay.why_not

    def _score(self, value: Tensor, context: Tensor | None) -> Tensor:
        try:
            return self.objective.scores(value, context)
        except ValueError:
            # A validating distribution refuses NaN before it computes a score.
            if self.objective.first_nonfinite(value, context) is None:
                raise
            return value.new_full((len(value),), math.nan, dtype=self.parameters[0].dtype)

    def _loss_and_grads(self, value: Tensor, context: Tensor | None, share: Tensor) -> list[Tensor | None]:
        """Returns the mean score, with each row's share, and the gradient of the loss for each parameter."""
        with collect_penalties() as penalties:
            score = (self._score(value, context) * share).sum()
        loss = -score
        if penalties.parts:
            self.compiled.refuse("penalties count all rows alike")
            loss = loss + penalties.total()
        if not loss.requires_grad:
            if score.isfinite():
                noun = self.objective.noun
                raise ValueError(f"fit_density: the {noun} does not depend on any parameter that is to be trained")
            return [score, *(None for _ in self.parameters)]
        if self._foreign is None:
            return [score.detach(), *torch.autograd.grad(loss, self.parameters, allow_unused=True)]
        self.flow.zero_grad()
        loss.backward()  # calls hooks
        return [score.detach(), *(p.grad for p in self.parameters)]

    def _shares(self, rows: Tensor, weight: Tensor | None) -> Tensor:
        """Returns the shares of rows in the mean, equal or by their weights."""
        shares = self.parameters[0].new_full((len(rows),), 1 / max(len(rows), 1))
        return shares if weight is None else shares * weight

    def _take_step(
        self, value: Tensor, context: Tensor | None, index: Tensor | None, weight: Tensor | None
    ) -> tuple[float, int]:
        """Takes a step on the rows of all processes; returns their mean score and number."""
        if not self.budget.done:
            processes.primed(self.flow, lambda: self._score_all(value, context))
        mean: Tensor | None = None
        grads: Sequence[Tensor | None] = [None for _ in self.parameters]
        if len(value):
            # Modules with log_prob check values, which a recording leaves out, so each row must have been seen before.
            seen = is_plain_flow(self.density) or (self.epoch > 0 and isinstance(self.rows, Rows))
            run = self._replay if seen else self._loss_and_grads
            mean, *grads = run(value, context, self._shares(value, weight))
        score = 0.0 if mean is None else float(mean)
        if not math.isfinite(score):
            self._raise_bad_score(f"{self.objective.noun} of a batch is {score}", value, context, index)
        score, rows, grads = processes.averaged(self.parameters, grads, score, len(value))
        if not rows:
            return score, rows
        norm = self.optimizer.take(grads)
        if not math.isfinite(norm.item()):
            self._raise_bad_gradient(norm, grads)
        if self.settings.clip_norm is not None:
            self.optimizer.clip(norm, self.settings.clip_norm)
        self._factor = self.schedule.factor(self.budget.fraction)
        self.budget.done += 1
        self.optimizer.step(self._factor, self._weight(self.budget.done))
        return score, rows

    def _score_all(self, value: Tensor, context: Tensor | None) -> None:
        """Scores the rows of all processes in each."""
        values, contexts = zip(*(pair for pair in processes.everyone((value, context)) if len(pair[0])), strict=True)
        self._score(torch.cat(values), None if contexts[0] is None else torch.cat(contexts))

    def _weight(self, step: int) -> float:
        """The weight of a step in the averages, which must not remember the start early on."""
        return 1 - min(self.settings.average, (step - 1) / (step + 9))

    def _raise_bad_gradient(self, norm: Tensor, grads: Sequence[Tensor | None]) -> None:
        names = {id(p): name for name, p in self.flow.named_parameters()}
        pairs = zip(self.parameters, grads, strict=True)
        bad = [names[id(p)] for p, grad in pairs if grad is not None and not grad.isfinite().all()]
        which = f"that of {first_few(bad, 5)} is not finite"
        if not bad:
            which = "each gradient is finite, but their squares overflow"
        raise FloatingPointError(f"fit_density: the norm of the gradient is {norm.item()}: {which}; {_REMEDY}")

    def _held_out(self) -> float:
        with self.objective.fixed():
            return mean_score(self._score, self.validation, self.sizes.batch_size)

    def _judge_start(self) -> None:
        """Scores the first state, to which the fit returns if training makes it no better."""
        self.density.eval()
        self.flow.eval()
        score = self._held_out()
        if math.isfinite(score):
            self.best = self.schedule.reference = score

    def _close_epoch(self, bar: tqdm) -> None:
        self.density.eval()
        self.flow.eval()
        processes.average_buffers(self.flow)
        with self._averaged():
            held_out = self._held_out()
            score = self._trained if self.validation is None else held_out
            rate = self._factor * self.optimizer.lr
            row = (self.epoch, self.budget.done, self._trained, held_out, rate, self.budget.elapsed)
            with interrupts_held_back():  # the history and the best state must agree
                for column, entry in zip(_COLUMNS, row, strict=True):
                    self.history[column].append(entry)
                if math.isfinite(score) and score > self.best:
                    self.best, self.best_epoch, self.best_state = score, self.epoch, self.snapshot()
        bar.set_description(f"epoch {self.epoch}", refresh=False)
        shown = f"train {self._trained:.4f}" + ("" if self.validation is None else f", validation {held_out:.4f}")
        bar.set_postfix_str(f"{shown}, best {self.best:.4f}, lr {rate:.1e}", refresh=False)
        verdict = self.schedule.judge(score if math.isfinite(score) else math.nan)
        self.stopped = "patience" if verdict == "stop" else self._limit()
        scores = self.history["train" if self.validation is None else "validation"]
        if (verdict != "go" or self.stopped is not None) and not any(map(math.isfinite, scores)):
            self._raise_never_finite()
        if verdict == "back":
            self.flow.load_state_dict(self.best_state)
            _write(self.averages, self.parameters)

    def _limit(self) -> str | None:
        """Names the limit that is reached, if any."""
        if self.settings.steps is not None and self.budget.done >= self.settings.steps:
            return "steps"
        if self.epoch >= self.sizes.max_epochs:
            return "max_epochs"
        return "seconds" if self.budget.left() <= 0 else None

    @torch.no_grad()
    def _raise_never_finite(self) -> None:
        what = f"validation {self.objective.noun} was not finite in any of {self.epoch} epochs"
        for batch in () if self.validation is None else self.validation.chunks(self.sizes.batch_size):
            if not self._score(*batch[:2]).isfinite().all():
                self._raise_bad_score(what, *batch[:3])
        raise FloatingPointError(f"fit_density: the {what}; try a smaller lr")

    def _raise_bad_score(self, what: str, value: Tensor, context: Tensor | None, index: Tensor | None) -> None:
        """Says which scores are not finite, in which rows, and where that begins."""
        bad = ~self._score(value, context).isfinite().cpu()
        found = self.objective.first_nonfinite(value, context)
        found = self.objective.beyond if found is None else f"it begins in {found}"
        which = f" ({name_rows(index.cpu()[bad])} as given)" if index is not None and bad.any() else ""
        raise FloatingPointError(
            f"fit_density: the {what}, from {int(bad.sum())} of {len(bad)} rows{which}; {found}; {_REMEDY}"
        )

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Replaces the parameters by their averages inside."""
        latest = [p.detach().clone() for p in self.parameters[: len(self.averages)]]
        _write(self.parameters, self.averages)
        try:
            yield
        finally:
            _write(self.parameters, latest)

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Returns the state except generators: copies on the CPU, and the history itself."""
        changing = {
            "flow": dict(self.flow.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "averages": self.averages,
        }
        # Copies on the CPU take no memory of the device.
        copies = tree_map_only(Tensor, lambda each: each.detach().to("cpu", copy=True), changing)
        kept = {name: getattr(self, name) for name in _KEPT}
        clock = {"step": self.budget.done, "spent": self.budget.elapsed}
        return {**copies, **kept, **clock, "schedule": asdict(self.schedule)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the :meth:`state_dict`; limits may be higher now."""
        self.flow.load_state_dict(state["best_state"])  # finds a misfit now
        self.flow.load_state_dict(state["flow"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule = Schedule(**state["schedule"])
        for mean, known in zip(self.averages, state["averages"], strict=True):
            if mean.shape != known.shape:
                raise ValueError(f"an average of shape {tuple(known.shape)} in place of {tuple(mean.shape)}")
            mean.copy_(known)
        for name in _KEPT:
            setattr(self, name, state[name])
        self.budget.resume(state["step"], state["spent"], state["spent"])
        if self.stopped != "patience":
            self.stopped = self._limit()


@torch.no_grad()
def _write(targets: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Copies values, or none if there are no averages."""
    for target, value in zip(targets, values, strict=False):
        target.copy_(value)
