"""The loop of a fit: epochs, the best state, the schedule, and what a checkpoint holds of them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_flows.infer.density.checkpoint import COLUMNS, Keeper
from pyro_flows.infer.density.data import Batch, Source
from pyro_flows.infer.density.objective import Objective, bad_gradient, bad_score, mean_score
from pyro_flows.infer.density.plan import Plan, Schedule, Settings
from pyro_flows.infer.machine.interrupts import interrupts_held_back
from pyro_flows.transforms.continuous.layer import collect_penalties

__all__ = ["Training"]

_COUNTERS = ("epoch", "step", "best", "best_epoch", "stopped")


@dataclass
class Training:
    """One fit: all that changes on the way.

    Attributes:
        flow: what is trained; its state is kept and put back.
        model: the same in the units of the data; shares the parameters.
        objective: what is maximised.
        train: rows to fit to.
        validation: rows to judge by, ``None`` to judge by the training score.
        optimizer: holds the parameters.
        schedule: of the learning rate.
        plan: sizes and limits.
        settings: for the limit in time, clipping and averaging.
        generator: shuffles.
    """

    flow: nn.Module
    model: nn.Module
    objective: Objective
    train: Source
    validation: Source | None
    optimizer: Optimizer
    schedule: Schedule
    plan: Plan
    settings: Settings
    generator: torch.Generator
    history: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    epoch: int = 0
    step: int = 0
    best: float = -math.inf
    best_epoch: int = 0
    stopped: str | None = None

    def __post_init__(self) -> None:
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.averages = [p.detach().clone() for p in self.parameters] if self.settings.average else []
        self._masked = [module for module in self.flow.modules() if hasattr(module, "resample_masks")]
        self._spent, self._since = 0.0, time.monotonic()
        self.best_state = self._snapshot()  # what to fall back on where not even the first epoch ends well

    def run(self, bar: Any, keeper: Keeper) -> None:
        """Trains until something says stop; leaves the flow in evaluation mode, in the best state known.

        An interruption (``KeyboardInterrupt``, ``SystemExit``) writes the checkpoint on the way out: the state at the
        end of the last whole epoch, from which a resumed run goes on as if it had never stopped.

        Args:
            bar: shows the progress.
            keeper: writes checkpoints.
        """
        interrupted = True
        try:
            if not self.epoch:
                keeper.keep()
            while self.stopped is None:
                self._train_epoch(bar)
                self._close_epoch(bar)
                keeper.keep()
                if self.stopped is not None or self.epoch % self.settings.checkpoint_every == 0:
                    keeper.write()
            interrupted = False
        except Exception:
            interrupted = False
            raise
        finally:
            with interrupts_held_back():
                self._settle()
                if interrupted:
                    keeper.leave()

    def _settle(self) -> None:
        self.flow.load_state_dict(self.best_state)
        self.model.eval()
        self.flow.eval()
        self.optimizer.zero_grad(set_to_none=True)
        self.flow.zero_grad(set_to_none=True)

    @property
    def elapsed(self) -> float:
        """Seconds spent, those before a resumption included."""
        return self._spent + time.monotonic() - self._since

    def _progress(self) -> float:
        steps = self.step / self.plan.total_steps
        return steps if self.settings.seconds is None else max(steps, self.elapsed / self.settings.seconds)

    def _train_epoch(self, bar: Any) -> None:
        self.model.train()
        self.flow.train()
        total, rows = 0.0, 0
        for value, context, index in self.train.batches(self.plan.batch_size, self.generator):
            if not len(value):
                continue
            factor = self.schedule.factor(self._progress())
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            for module in self._masked:  # order-agnostic training: another order each step
                module.resample_masks()
            total += len(value) * self._take_step(value, context, index)
            rows += len(value)
            bar.update(1)
            if self._out_of_steps() or self._out_of_time():
                break
        if not rows:
            raise ValueError("fit_density: the DataLoader given as data was empty in this pass; it must start anew")
        self.epoch += 1
        self._trained = total / rows

    def _score(self, value: Tensor, context: Tensor | None) -> Tensor:
        try:
            return self.objective.scores(value, context)
        except ValueError:
            # A distribution that validates refuses NaN before it comes to a score.
            if self.objective.first_nonfinite((value, context, None)) is None:
                raise
            return value.new_full((len(value),), math.nan, dtype=self.parameters[0].dtype)

    def _take_step(self, value: Tensor, context: Tensor | None, index: Tensor | None) -> float:
        with collect_penalties() as penalties:
            loss = -self._score(value, context).mean()
        score = -loss.item()
        noun = self.objective.noun
        if not math.isfinite(score):
            self._raise_bad_score(f"{noun} of a batch is {score}", (value, context, index))
        if penalties.parts:
            loss = loss + penalties.total()
        if not loss.requires_grad:
            raise ValueError(f"fit_density: the {noun} does not depend on any parameter that is to be trained")
        self.optimizer.zero_grad()
        loss.backward()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if not math.isfinite(norm.item()):
            raise FloatingPointError(bad_gradient(self.flow, norm.item()))
        if self.settings.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip_norm, norm)
        self.optimizer.step()
        self.step += 1
        if self.averages:
            # Early on, the average must not remember where training began.
            weight = 1 - min(self.settings.average, (self.step - 1) / (self.step + 9))
            with torch.no_grad():
                for mean, parameter in zip(self.averages, self.parameters, strict=True):
                    mean.lerp_(parameter, weight)
        return score

    def _close_epoch(self, bar: Any) -> None:
        self.model.eval()
        self.flow.eval()
        with self._averaged():
            held_out = math.nan if self.validation is None else self._validate()
            score = self._trained if self.validation is None else held_out
            rate = self.optimizer.param_groups[0]["lr"]
            row = (self.epoch, self.step, self._trained, held_out, float(rate), self.elapsed)
            with interrupts_held_back():  # so that the history, the best epoch and its state belong together
                for column, entry in zip(COLUMNS, row, strict=True):
                    self.history[column].append(entry)
                if math.isfinite(score) and score > self.best:
                    self.best, self.best_epoch, self.best_state = score, self.epoch, self._snapshot()
        bar.set_description(f"epoch {self.epoch}", refresh=False)
        shown = f"train {self._trained:.4f}" + ("" if self.validation is None else f", validation {held_out:.4f}")
        bar.set_postfix_str(f"{shown}, best {self.best:.4f}, lr {rate:.1e}", refresh=False)
        self._decide(score)

    def _decide(self, score: float) -> None:
        verdict = self.schedule.judge(score if math.isfinite(score) else math.nan)
        self.stopped = "patience" if verdict == "stop" else self._limit()
        if not self.best_epoch and (verdict != "go" or self.stopped is not None):
            self._raise_never_finite()
        if verdict == "back":
            self.flow.load_state_dict(self.best_state)
            for mean, parameter in zip(self.averages, self.parameters, strict=bool(self.averages)):
                mean.copy_(parameter.detach())

    def _limit(self) -> str | None:
        if self._out_of_steps():
            return "max_steps"
        if self.epoch >= self.plan.max_epochs:
            return "max_epochs"
        return "seconds" if self._out_of_time() else None

    def _out_of_steps(self) -> bool:
        return self.settings.max_steps is not None and self.step >= self.settings.max_steps

    def _out_of_time(self) -> bool:
        return self.settings.seconds is not None and self.elapsed >= self.settings.seconds

    def _validate(self) -> float:
        with self.objective.fixed():
            return mean_score(self._score, self.validation, self.plan.batch_size)

    def _raise_never_finite(self) -> None:
        what = f"validation {self.objective.noun} was not finite in any of {self.epoch} epochs"
        for value, context, index in self.validation.chunks(self.plan.batch_size):
            with torch.no_grad():
                bad = not self._score(value, context).isfinite().all()
            if bad:
                self._raise_bad_score(what, (value, context, index))
        raise FloatingPointError(f"fit_density: the {what}; try a smaller lr")

    def _raise_bad_score(self, what: str, batch: Batch) -> None:
        scores = self._score(*batch[:2]).detach()
        found = self.objective.first_nonfinite(batch)
        found = self.objective.beyond if found is None else f"it begins in {found}"
        raise FloatingPointError(bad_score(what, scores, batch[2], found))

    def _snapshot(self) -> dict[str, Any]:
        return {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in self.flow.state_dict().items()}

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averages in place of the parameters."""
        if not self.averages:
            yield
            return
        latest = [p.detach().clone() for p in self.parameters]
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(latest)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    # Resumption.

    def state_dict(self) -> dict[str, Any]:
        """A copy on the CPU of all that a resumed run needs to go on as if nothing had happened, but for generators."""
        changing = {
            "flow": dict(self.flow.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "averages": self.averages,
            "history": self.history,
        }
        rest = {name: getattr(self, name) for name in _COUNTERS}
        return {**_copied(changing), "best_state": self.best_state, "spent": self.elapsed, **rest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave; a limit that was reached then may be a higher one now."""
        self.flow.load_state_dict(state["best_state"])  # so that one that does not fit is found now
        self.flow.load_state_dict(state["flow"])
        self.best_state, self.history = state["best_state"], state["history"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for mean, known in zip(self.averages, state["averages"], strict=True):
            if mean.shape != known.shape:
                raise ValueError(f"an average of shape {tuple(known.shape)} in place of {tuple(mean.shape)}")
            mean.copy_(known)
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self._spent, self._since = state["spent"], time.monotonic()
        if self.stopped != "patience":
            self.stopped = self._limit()


def _copied(value: Any) -> Any:
    """With tensors of its own on the CPU, so that no memory of the device is taken."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(each) for each in value] if isinstance(value, list) else tuple(map(_copied, value))
    return value
