"""The result of a fit to data."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Size, Tensor, nn

from pyro_flows.core.transform import FlowTransform
from pyro_flows.distributions import Ensemble, Flow
from pyro_flows.infer.density import stored
from pyro_flows.infer.density.data import expected_by, to_tensor
from pyro_flows.infer.density.judging import Kept, admitted, check_density
from pyro_flows.infer.density.objective import evaluate, log_prob_of
from pyro_flows.infer.density.units import Density
from pyro_flows.infer.diagnostics.densities import DensityVerdict, judge_density
from pyro_flows.infer.machine.files import check_path, read_state, refuse_others, write_state
from pyro_flows.infer.machine.records import device_of, read

__all__ = ["DensityFit", "load_density"]

KIND, VERSION = "saved fit of a density", 1


@dataclass(repr=False)
class DensityFit:
    """The result of :func:`~pyro_flows.infer.density.fit.fit_density`.

    Attributes:
        flow: the trained module: the one given, or a ``Flow`` around the given chain.
        distribution: the density in the units of the data, with shared parameters, ``log_prob`` and ``sample``: a
            ``Flow`` if ``flow`` is, an ensemble of several fits, ``flow`` itself if nothing was standardized.
            ``distribution()`` or
            ``distribution(context)`` makes a Pyro distribution.
        history: lists with one entry an epoch: ``epoch``; ``step``, steps so far; ``train`` (during the epoch) and
            ``validation`` (at its end; NaN without rows), mean log-likelihood in nats per row, in the units of the
            data; ``lr``; ``seconds`` so far.
        best_epoch: the epoch whose state the flow is left in; 0 for the state that it started with, the fitted
            Gaussian.
        validation: the validation rows' mean log-likelihood in that state, in the same units.
        stopped: the end of training: ``"patience"``, ``"max_epochs"``, ``"steps"`` or ``"seconds"``; ``"interrupted"``
            if an exception carries the result.
        objective: ``"likelihood"`` or ``"flow_matching"``.
        members: the fits of an ensemble. ``distribution`` is then an
            :class:`~pyro_flows.distributions.Ensemble`, and ``validation`` is the mean score of rows by members that
            did not see them, which the ensemble itself exceeds. If ``folds`` was given, ``flow`` is an ensemble, too,
            and ``history`` has the members' one after the other. If it is a default, all else is that of the first
            member, which is the flow given, and the Gaussian of all rows is one more density of the ensemble, if the
            flow starts as one.
        kept: rows for the verdict, on the CPU: at most 2,000 that were held out and 10,000 of the others.

    With flow matching, scores in the history are minus the mean squared error of the velocity per dimension, in units
    of the field's end at the data (variance 1 if standardized).  Validation uses fixed pairs and times, and picks the
    best epoch.  The attribute ``validation`` is still a log-likelihood, computed once at the end.
    """

    flow: Flow | Density | Ensemble
    distribution: Flow | Density | Ensemble
    history: dict[str, list[float]]
    best_epoch: int
    validation: float
    stopped: str
    objective: str = "likelihood"
    members: tuple[DensityFit, ...] = ()
    kept: tuple[Kept, ...] = ()
    _verdict: DensityVerdict | None = field(default=None, init=False)

    @property
    def verdict(self) -> DensityVerdict:
        """The worth of the density, in words and numbers, as ``print(fit.verdict)`` shows.

        It is computed when first asked for, from rows that the fit keeps, in about two seconds or a tenth of the fit's
        own time: held-out rows, those that each member of an ensemble has not seen, or training rows if there are no
        others.  See :func:`~pyro_flows.infer.diagnostics.densities.judge_density`.
        """
        if self._verdict is None:
            parts, remedy = self.kept, ""
            if self.members:
                judged, remedy = "{} rows, each by a member that did not see it; together they score more", "more rows"
            elif parts and parts[0].fresh is not None:
                judged = "{} held-out rows, which also chose the best epoch, so that scores are a little too good"
                if parts[0].density is not self.distribution:
                    judged = "{} held-out rows, by the Gaussian of the others; the result is the Gaussian of all"
            else:
                judged = "{} training rows, as none were held out"
                parts = tuple(Kept(part.density, part.trained, part.trained) for part in parts)
            self._verdict = self._judged(parts, judged, remedy, None)
        return self._verdict

    def judge(self, data: Any, context: Any = None, *, seconds: float | None = None) -> DensityVerdict:
        """Judges the density by rows that no part of the fit has seen, in the manner of :attr:`verdict`.

        Args:
            data: rows, at least 100 for a full judgment; of more than 2,000, as many are chosen at random.
            context: their contexts.
            seconds: the time for draws, by default two seconds or a tenth of the fit's time, if that is longer.
        """
        rows = admitted(self.distribution, data, context)
        trained = self.kept[0].trained if self.kept else None
        return self._judged(
            (Kept(self.distribution, rows, trained),), "{} of the rows given", "give more rows", seconds
        )

    def _judged(self, parts: Sequence[Kept], judged: str, remedy: str, seconds: float | None) -> DensityVerdict:
        if seconds is None:
            seconds = max(2.0, 0.1 * sum(fit.history["seconds"][-1] for fit in self.members or (self,)))
        checks = check_density(parts, seconds)
        seen = all(part.fresh is part.trained for part in parts)
        judged = f"Judged on {judged.format(f'{len(checks.scores):,}')}."
        return judge_density(checks, judged, seen=seen, stopped=self.stopped, remedy=remedy)

    def log_prob(self, data: Any, context: Any = None) -> Tensor:
        """Computes log-densities of raw rows in nats, shape ``(rows,)``, in pieces, without a graph, on the CPU."""
        rows = admitted(self.distribution, data, context)
        return torch.cat([scores.cpu() for scores in evaluate(log_prob_of(self.distribution), rows)])

    @torch.no_grad()
    def sample(self, sample_shape: Size | tuple[int, ...] = (), context: Any = None) -> Tensor:
        """Draws in the units of the data, shape ``(*sample_shape, *context_batch, *event_shape)``."""
        if context is None:
            return self.distribution.sample(sample_shape)
        expected = expected_by(self.distribution)
        context = to_tensor(context, "DensityFit.sample", "context").to(expected.device, expected.dtype)
        return self.distribution.sample(sample_shape, context)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the fit to a file that :func:`load_density` reads, in another process, without the code of the flow.

        The file is written atomically, has a checksum, and holds no code: numbers, the names of classes of this package
        and of torch's and Pyro's with their options, the record of the training, and the rows ``kept`` for the
        verdict.  If the flow used classes or functions of your own, a warning says so, and loading needs the flow
        again.

        Args:
            path: a file in a folder that exists.

        Raises:
            ValueError: if the folder does not exist, or the flow cannot be made again.
            OSError: if the file cannot be written, e.g. because the disk is full; the old one is unchanged.
        """
        check_path(path)
        modules, fit = stored.plain_fit(self)
        if modules.unnamed is not None:
            warnings.warn(
                f"DensityFit.save: the file cannot hold the architecture of the flow ({modules.unnamed}); to load it, "
                "give the flow again: load_density(path, flow=...)",
                stacklevel=2,
            )
        write_state(path, {"modules": vars(modules), "fit": vars(fit)}, kind=KIND, version=VERSION)

    def __str__(self) -> str:
        return f"{self!r}\n{self.verdict}"

    def __repr__(self) -> str:
        held_out = not math.isnan(self.validation)
        score = self.validation if held_out else self.history["train"][max(self.best_epoch, 1) - 1]
        judged = "" if self._verdict is None else f", verdict: {self._verdict.label}"
        unit = "nats per row" if held_out or self.objective == "likelihood" else "(negative matching loss)"
        if self.members:
            steps, seconds = (sum(fit.history[name][-1] for fit in self.members) for name in ("step", "seconds"))
            return (
                f"DensityFit({len(self.members)} members, validation {score:.4f} {unit}, stopped by {self.stopped}, "
                f"{steps} steps in {seconds:.1f} s{judged})"
            )
        return (
            f"DensityFit({'validation' if held_out else 'train'} {score:.4f} {unit} at epoch {self.best_epoch} "
            f"of {self.history['epoch'][-1]}, stopped by {self.stopped}, {self.history['step'][-1]} steps in "
            f"{self.history['seconds'][-1]:.1f} s{judged})"
        )


def load_density(
    path: str | os.PathLike[str],
    map_location: str | torch.device | dict[str, str] | Callable[..., Any] | None = None,
    *,
    flow: FlowTransform | nn.Module | None = None,
) -> DensityFit:
    """Reads a file of :meth:`DensityFit.save`: the flow, its distribution, the record of the training and the verdict.

    No code in the file runs. Loading verifies the checksum, and compares the rebuilt density with the saved one at a
    few rows.

    Args:
        path: the file.
        map_location: the device, as in ``torch.load``; by default the fit's. Rows kept for the verdict stay on the CPU.
        flow: a flow made as the fitted one was, if it used classes or functions of your own; it is copied.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if the file is no saved fit, is damaged, comes from another release, or needs the flow.
    """
    remedy = "give the path of a file that DensityFit.save of this release wrote"
    known: dict[str, Any] = {"kind": KIND, "remedy": remedy}
    state = read_state(path, version=VERSION, parts={"modules": dict, "fit": dict}, **known)
    with refuse_others(path, **known):
        record: stored.ModulesRecord = read(stored.ModulesRecord, state["modules"], "modules")
    device = device_of(map_location, record.device, "load_density")
    with refuse_others(path, **known):
        modules = stored.modules_of(record, Flow(flow) if isinstance(flow, FlowTransform) else flow)
        return stored.fit_of(
            DensityFit, read(stored.FitRecord, state["fit"], "fit"), [module.to(device) for module in modules]
        )
