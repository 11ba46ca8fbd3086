"""The result of a fit to data."""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Size, Tensor, nn

from pyro_flows.core.checks import integer, sample_size
from pyro_flows.core.transform import FlowTransform
from pyro_flows.distributions import Ensemble, Flow
from pyro_flows.infer.density import stored
from pyro_flows.infer.density.data import Rows, expected_by, to_tensor
from pyro_flows.infer.density.judging import Kept, admitted, check_density
from pyro_flows.infer.density.names import by_name
from pyro_flows.infer.density.objective import evaluate, log_prob_of
from pyro_flows.infer.density.series import Stream
from pyro_flows.infer.density.units import Density
from pyro_flows.infer.diagnostics.densities import DensityVerdict, judge_density
from pyro_flows.infer.diagnostics.moments import scalar_names
from pyro_flows.infer.diagnostics.summary import equal_tails, levels_of, quantiles_of, tabulate
from pyro_flows.infer.machine.files import check_path, read_state, refuse_others, write_state
from pyro_flows.infer.machine.randomness import own_randomness
from pyro_flows.infer.machine.records import device_of, read

__all__ = ["DensityFit", "load_density"]

KIND, VERSION = "saved fit of a density", 1

_DRAWN = 2**22  # numbers drawn at once for quantiles


@dataclass(repr=False)
class DensityFit:
    """The result of :func:`~pyro_flows.infer.density.fit.fit_density`.

    Attributes:
        flow: the trained module: the one given, or a ``Flow`` around the given chain; if bounds were given, a ``Flow``
            of the same parts that ends in them.
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
        stopped: the end of training: ``"patience"``, ``"max_epochs"``, ``"steps"``, ``"seconds"`` or ``"callback"``;
            ``"interrupted"`` if an exception carries the result.
        objective: ``"likelihood"`` or ``"flow_matching"``.
        members: the fits of an ensemble. ``distribution`` is then an
            :class:`~pyro_flows.distributions.Ensemble`, and ``validation`` is the mean score of rows by members that
            did not see them, which the ensemble itself exceeds. If ``folds`` was given, ``flow`` is an ensemble, too,
            and ``history`` has the members' one after the other. If it is a default, all else is that of the first
            member, which is the flow given, and the Gaussian of all rows is one more density of the ensemble, if the
            flow starts as one.
        kept: rows for the verdict, on the CPU: at most 2,000 that were held out and 10,000 of the others.
        columns: the names of the data's columns, if they came as a data frame; later frames are put in their order.
        context_columns: the names of the contexts' columns.

    With flow matching, scores in the history are minus the mean squared error of the velocity per dimension, in units
    of the field's end at the data (variance 1 if standardized).  Validation uses fixed pairs and times, and picks the
    best epoch.  The attribute ``validation`` is still a log-likelihood, computed once at the end.

    Example:
        >>> x = torch.linspace(-2.0, 2.0, 300).unsqueeze(1)
        >>> y = x.sin() + 0.1 * torch.randn(300, 1)
        >>> fit = pf.fit_density(pf.nsf(1, context_dim=1), y, context=x, steps=20)
        >>> lower, upper = fit.interval(0.9, context=torch.tensor([[0.5], [1.5]]))
        >>> lower.shape
        torch.Size([2, 1])
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
    columns: tuple[str, ...] | None = None
    context_columns: tuple[str, ...] | None = None
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

        Example:
            >>> fit = pf.fit_density(pf.realnvp(2), torch.randn(300, 2), steps=5)
            >>> fit.judge(3 + torch.randn(200, 2)).ok  # rows of another distribution
            False
        """
        rows = self._rows(data, context)
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
        """Computes log-densities of raw rows in nats, shape ``(rows,)``, in pieces, without a graph, on the CPU.

        The columns of a data frame are taken by name.

        Example:
            >>> fit = pf.fit_density(pf.nsf(2), torch.randn(200, 2), steps=5)
            >>> fit.log_prob([[0.0, 0.0], [9.0, 9.0]]).shape
            torch.Size([2])
        """
        rows = self._rows(data, context)
        return torch.cat([scores.cpu() for scores in evaluate(log_prob_of(self.distribution), rows)])

    def score(self, data: Any, context: Any = None) -> float:
        """The mean log-density of rows in nats, as of scikit-learn's mixture models.

        Example:
            >>> fit = pf.fit_density(pf.nsf(2), torch.randn(200, 2), steps=5)
            >>> fit.score(torch.randn(100, 2)) > fit.score(5 + torch.randn(100, 2))
            True
        """
        return self.log_prob(data, context).double().mean().item()

    @torch.no_grad()
    def sample(self, sample_shape: int | Size | tuple[int, ...] = (), context: Any = None) -> Tensor:
        """Draws in the units of the data, shape ``(*sample_shape, *context_batch, *event_shape)``.

        Example:
            >>> x, y = torch.randn(2, 200, 1)
            >>> fit = pf.fit_density(pf.nsf(1, context_dim=1), y, context=x, steps=5)
            >>> fit.sample((4,), [[0.5], [1.5]]).shape  # four draws for each context
            torch.Size([4, 2, 1])
        """
        sample_shape = sample_size(sample_shape)
        if context is None:
            return self.distribution.sample(sample_shape)
        return self.distribution.sample(sample_shape, self._context("DensityFit.sample", context))

    @torch.no_grad()
    def forecast(self, y: Any, horizon: int, num_samples: int = 1000, context: Any = None) -> Tensor:
        """Draws the next steps of series, shape ``(num_samples, *batch, C, horizon)``, in the units of the data.

        A :class:`~pyro_flows.infer.density.series.Stream` of the fitted model reads the past, and its copies go on,
        each with draws of its own. The past may be shorter or longer than the series of the fit. The cost is a density
        of the past, and ``horizon`` draws of one step with ``num_samples`` times the rows.

        Args:
            y: the past of one or several series, oldest step first, shape ``(*batch, C, n)`` with any ``n``; a vector
                ``(n,)`` of one channel; or a data frame with a row for each step and a column for each channel.
            horizon: the number of steps.
            num_samples: the number of paths.
            context: contexts, shape ``(*batch, context_dim)``, the same at all times.

        Raises:
            ValueError: for a fit that is not of series by a causal flow or a ``ConvMADE``, or a past that does not fit.

        Example:
            >>> series = torch.randn(100, 1, 20).cumsum(-1)
            >>> flow = pf.causal_maf((1, 20), num_layers=1)
            >>> fit = pf.fit_density(flow, series, steps=5)
            >>> fit.forecast(series[0], horizon=10, num_samples=50).shape
            torch.Size([50, 1, 10])
        """
        who = "DensityFit.forecast"
        event = self._event_shape
        if len(event) != 2 or isinstance(self.distribution, Ensemble):
            kind = "an ensemble; ask one of its members, fit.members[0].forecast(y, horizon)"
            kind = kind if len(event) == 2 else f"one of events of shape {tuple(event)}"
            raise ValueError(
                f"{who}: expected a fit of series (C, T) by a causal flow, such as causal_maf, or a ConvMADE, got "
                f"{kind}"
            )
        expected = expected_by(self.distribution)
        past = to_tensor(y, who, "y").to(expected.device, expected.dtype)
        if hasattr(y, "columns") or past.dim() == 1:  # a row for each step
            past = past.reshape(len(past), -1).T
        if past.dim() < 2 or past.shape[-2] != event[0] or not past.shape[-1]:
            raise ValueError(
                f"{who}: expected y to be the past of series, shape (*batch, {event[0]}, n), or a data frame with "
                f"{event[0]} columns, got {type(y).__name__} of shape {tuple(getattr(y, 'shape', past.shape))}"
            )
        integer(who, "horizon", horizon)
        given = None if context is None else self._context(who, context)
        model: Any = self.distribution  # the stream refuses others
        stream = Stream(model, past.shape[:-2], given)
        stream.observe(past.expand(*stream.batch_shape, *past.shape[-2:]))
        return stream.forecast(horizon, num_samples)

    @torch.no_grad()
    def quantile(self, q: Any, context: Any = None, *, num_samples: int | None = None, seed: int = 0) -> Tensor:
        r"""The quantiles of each column by itself, shape ``(*q.shape, *context_batch, *event_shape)``.

        They are exact where the distribution has an ``icdf``: in flows of one number, and ensembles of them.  Elsewhere
        they are those of draws, the same for the same seed: the smallest draw that at least a share :math:`q` of all
        does not exceed.  Of :math:`n` draws, the share of the density below it has the standard error
        :math:`\sqrt{q (1 - q) / n}`, which is 0.002 at 5 % of 10,000 draws.

        Args:
            q: levels from 0 to 1, a number or an array of any shape.
            context: contexts, shape ``(*context_batch, context_dim)``, or a data frame.
            num_samples: the number of draws at each context, by default 10,000, or of more than 100 contexts a million
                in all, at least 1000 each.
            seed: the seed of the draws; torch's global generators stay as they are.

        Raises:
            ValueError: for levels out of range.

        Example:
            >>> fit = pf.fit_density(pf.nsf(2), torch.randn(200, 2), steps=5)
            >>> fit.quantile([0.05, 0.5, 0.95]).shape
            torch.Size([3, 2])
        """
        who = "DensityFit.quantile"
        levels, device = levels_of(who, q), expected_by(self.distribution).device
        if context is not None:
            context = self._context(who, context)
        if num_samples is None:
            contexts = 1 if context is None else context.shape[:-1].numel()
            num_samples = min(10_000, max(1000, 10**6 // max(contexts, 1)))
        integer(who, "num_samples", num_samples)
        exact = self._inverted(levels, context)
        if exact is not None:
            return exact
        with own_randomness(device, seed):
            if context is None:
                return quantiles_of(self.sample((num_samples,)), levels)
            event, found = self._event_shape, []
            pieces = context.reshape(-1, context.shape[-1]).split(max(1, _DRAWN // (num_samples * event.numel())))
            for piece in pieces:  # a batch of one context has no dimension of its own in draws
                draws = self.sample((num_samples,), piece).reshape(num_samples, len(piece), *event)
                found.append(quantiles_of(draws, levels))
        return torch.cat(found, levels.dim()).reshape(levels.shape + context.shape[:-1] + event)

    def _inverted(self, levels: Tensor, context: Tensor | None) -> Tensor | None:
        """Quantiles of a single number by the inverse of its distribution function; ``None`` if that is not known."""
        if not isinstance(self.distribution, Flow | Ensemble) or self._event_shape.numel() != 1:
            return None
        made: Any = self.distribution() if context is None else self.distribution(context)
        levels = levels.to(expected_by(self.distribution).device)
        try:
            return made.icdf(levels.reshape(levels.shape + (1,) * len(made.batch_shape)))
        except NotImplementedError:
            return None

    def interval(
        self, level: float = 0.9, context: Any = None, *, num_samples: int | None = None, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The lower and upper ends of an interval for each column, with equal tails outside, by :meth:`quantile`.

        Each has the shape ``(*context_batch, *event_shape)``.  An interval at a context predicts one new value there
        with this probability, as far as the density is right.

        Example:
            >>> x, y = torch.randn(2, 200, 1)
            >>> fit = pf.fit_density(pf.nsf(1, context_dim=1), y, context=x, steps=5)
            >>> lower, upper = fit.interval(0.9, context=[[0.5], [1.5]])
            >>> lower.shape
            torch.Size([2, 1])
        """
        levels = equal_tails("DensityFit.interval", level)
        lower, upper = self.quantile(levels, context, num_samples=num_samples, seed=seed)
        return lower, upper

    @torch.no_grad()
    def summary(self, context: Any = None, *, num_samples: int = 10_000, seed: int = 0) -> Any:
        """A pandas ``DataFrame`` with a row for each column: mean, standard deviation, and 5, 50 and 95 % quantiles.

        They are those of draws.  Beside them stand mean and standard deviation of rows that the fit keeps.

        Args:
            context: one context, or several, to whose draws together the table belongs.  By default, a fit with
                contexts draws at those of the rows that it keeps.
            num_samples: the number of draws.
            seed: the seed of the draws; torch's global generators stay as they are.

        Raises:
            ValueError: without a context, if a fit with contexts keeps no rows.

        Example:
            >>> fit = pf.fit_density(pf.nsf(2), torch.randn(200, 2), steps=5)
            >>> list(fit.summary().columns)
            ['mean', 'sd', '5%', '50%', '95%', 'data mean', 'data sd']
        """
        who = "DensityFit.summary"
        integer(who, "num_samples", num_samples, 2)
        data = self._kept_rows()
        with own_randomness(expected_by(self.distribution).device, seed):
            if context is not None:
                given = self._context(who, context)
                data = None  # of other contexts
            elif not getattr(self.distribution, "context_dim", 0) and (data is None or data.context is None):
                given = None
            elif data is not None and data.context is not None:
                given = self._context(who, data.context)
            else:
                raise ValueError(f"{who}: expected a context, as this fit keeps no rows with contexts of their own")
            if given is None:
                draws = self.sample((num_samples,))
            else:
                given = given.reshape(-1, given.shape[-1])
                draws = self.sample((), given[torch.randint(len(given), (num_samples,), device="cpu").to(given.device)])
        table = tabulate(self.columns or scalar_names("x", draws.shape[1:]), draws.reshape(num_samples, -1))
        if data is not None:
            values = data.value.reshape(len(data), -1).double()
            table["data mean"], table["data sd"] = values.mean(0).numpy(), values.std(0).numpy()
        return table

    @property
    def _event_shape(self) -> Size:
        known = getattr(self.distribution, "event_shape", None)
        rows = self._kept_rows() if known is None else None
        return Size(known or ()) if rows is None else rows.value.shape[1:]

    def _kept_rows(self) -> Rows | None:
        """The rows that the first member, or the only one, keeps."""
        parts = [rows for kept in self.kept[:1] for rows in (kept.trained, kept.fresh) if rows is not None]
        return functools.reduce(Rows.joined, parts) if parts else None

    def _rows(self, data: Any, context: Any) -> Rows:
        """Admits rows, the columns of data frames by name."""
        data = by_name(data, self.columns, "fit_density", "data")
        context = by_name(context, self.context_columns, "fit_density", "context")
        rows = admitted(self.distribution, data, context)
        return replace(rows, columns=self.columns, context_columns=self.context_columns)

    def _context(self, who: str, given: Any) -> Tensor:
        """Converts contexts, shape ``(*batch, context_dim)``; of one number each, they may be a vector."""
        expected = expected_by(self.distribution)
        context = to_tensor(by_name(given, self.context_columns, who, "context"), who, "context")
        context = context.to(expected.device, expected.dtype)
        several = context.dim() == 1 and len(context) != 1 and expected.context_dim == 1
        return context.unsqueeze(-1) if several else context

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

        Example:
            >>> fit = pf.fit_density(pf.nsf(2), torch.randn(200, 2), steps=5)
            >>> fit.save("density.pt")
            >>> pf.load_density("density.pt").validation == fit.validation
            True
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

    Example:
        >>> fit = pf.fit_density(pf.nsf(2), torch.randn(200, 2), steps=5)
        >>> fit.save("density.pt")
        >>> pf.load_density("density.pt").sample((5,)).shape
        torch.Size([5, 2])
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
