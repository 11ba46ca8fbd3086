"""``fit_density`` fits a flow, or any module with ``log_prob``, to data."""

from __future__ import annotations

import copy
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from pyro_flows.core.checks import integer
from pyro_flows.core.transform import FlowTransform
from pyro_flows.distributions import Ensemble, Flow
from pyro_flows.infer.density.bounded import bounded, bounds_in
from pyro_flows.infer.density.data import Rows, admit_rows, expected_by
from pyro_flows.infer.density.gaussian import better, can_start, start_as_gaussian, started
from pyro_flows.infer.density.judging import keep
from pyro_flows.infer.density.loop import CHECKPOINT, DensityTraining
from pyro_flows.infer.density.matching import FlowMatching, Matching, as_objective, matched_parts
from pyro_flows.infer.density.names import column_names
from pyro_flows.infer.density.objective import Likelihood, Objective, log_prob_of, mean_score
from pyro_flows.infer.density.prepare import prepare, refuse_support
from pyro_flows.infer.density.result import DensityFit
from pyro_flows.infer.density.settings import FEW_ROWS, FOLDS, Settings
from pyro_flows.infer.density.units import Density, coloring_of, head_of, in_units, is_density, is_plain_flow
from pyro_flows.infer.machine import processes
from pyro_flows.infer.machine.callback import Callback, check_callback
from pyro_flows.infer.machine.checkpoint import Keeper, architecture_of, layout_of
from pyro_flows.infer.machine.compiled import Compile
from pyro_flows.infer.machine.interrupts import SoFar, carrying, interrupts_held_back
from pyro_flows.infer.machine.optimizers import AdamW, Given
from pyro_flows.infer.machine.randomness import own_randomness, random_state, set_random

__all__ = ["fit_density"]

_ALIKE = (
    "each process takes its part of every batch of the same rows; to give each its own rows, give each a DataLoader "
    "(torch's DistributedSampler, or a stream of its own)"
)


def fit_density(
    flow: FlowTransform | nn.Module,
    data: Any,
    validation: Any = None,
    context: Any = None,
    progress: bool = True,
    *,
    validation_context: Any = None,
    validation_fraction: float = 0.1,
    standardize: bool | None = None,
    batch_size: int | None = None,
    max_epochs: int | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    lr: float = 3e-3,
    schedule: str = "plateau",
    patience: int | None = None,
    weight_decay: float | None = None,
    clip_norm: float | None = 5.0,
    average: float = 0.998,
    optimizer: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
    compile: Compile = "auto",
    resume: bool = True,
    seed: int | None = 0,
    objective: str | FlowMatching = "likelihood",
    folds: int | None = None,
    bounds: Any = None,
    callback: Callback | None = None,
    weights: Any = None,
) -> DensityFit:
    """Fits a density to data by maximum likelihood or flow matching, stopped early by held-out rows.

    Training is in place; frozen parameters stay frozen.  The flow is left in evaluation mode, without gradients, in the
    state that scored best, even after an error or interruption.  Data are standardized on the way:
    ``DensityFit.distribution``, the density in their own units, ends in a
    :class:`~pyro_flows.transforms.elementwise.Standardization`.  For vectors, it begins with a
    :class:`~pyro_flows.transforms.linear.Coloring`, so that a flow that starts as the identity starts as the Gaussian
    of the training rows (:func:`~pyro_flows.infer.density.gaussian.fit_gaussian`), linear in the context.  That state
    counts as any other, so on held-out rows the fit ends no worse than the Gaussian.  A fresh
    :class:`~pyro_flows.distributions.made.MADE` starts so, too, beside the frequencies of discrete columns.

    Any exception that ends the training carries the :class:`~pyro_flows.infer.density.result.DensityFit` so far, or
    ``None`` before the end of the first epoch, as its attribute ``fit``::

        try:
            fit = fit_density(flow, data, checkpoint="fit.pt")
        except KeyboardInterrupt as stop:
            fit = stop.fit

    If a process group of ``torch.distributed`` is initialized, its processes fit together.  Each calls this function,
    with the same rows, of which it takes its part of each batch, or with a ``DataLoader`` of its own.

    A step costs one density pass and its gradient; an epoch adds one density pass over all validation rows.  With flow
    matching a step costs one evaluation of the field and its gradient, without a solve, and one density pass over the
    validation rows ends the fit.  The ``kinetic`` and ``jacobian`` penalties of continuous parts, in their own
    (standardized) units, add their batch means to a step's loss, but not to scores or flow matching.

    Args:
        flow: a flow transform (with a standard normal base), a :class:`~pyro_flows.distributions.Flow`, or any module
            with ``log_prob(value)`` or ``log_prob(value, context)``, e.g. of discrete data.
        data: a tensor, NumPy array or data frame of shape ``(rows, *event_shape)``, converted to the flow's dtype and
            device (other modules get integers unconverted; masks and ``NA`` count as missing); or a ``DataLoader`` of
            ``x``, ``(x,)`` or ``(x, context)``, where an epoch is one pass, after a first pass for checks and
            standardization.
        validation: rows to judge by, in the same forms; by default a random part of ``data``, or the training score for
            a loader.
        context: contexts of shape ``(rows, context_dim)``.
        progress: whether to show a progress bar.
        validation_context: contexts of ``validation``.
        validation_fraction: the part of ``data`` held out, at most 20,000 rows; 0 to judge by the training score.
        standardize: whether to standardize contexts and data, by column (series by channel, if all times share the
            flow's parts).  The default standardizes for flows over real numbers, except angles (a part's ``periodic``),
            and keeps parts that map onto a constrained support behind it; it does not for other modules.  Discrete
            columns of a :class:`~pyro_flows.distributions.made.MADE` always stay.
        batch_size: rows in a step, by default about a thirty-second of the rows, from 64 to 1024; a ``DataLoader`` has
            its own.
        max_epochs: the most passes over the data, by default as many as make 20,000 steps, from 20 to 1000.
        steps: the most optimizer steps.
        seconds: the longest time.
        lr: the first learning rate.
        schedule: ``"cosine"`` (from ``lr`` to a hundredth of it over the whole run) or ``"constant"``, both ended by
            ``patience`` epochs without improvement; or ``"plateau"``, where these lead back to the best state with 0.3
            times the learning rate, and two such cuts in vain end training.
        patience: epochs, by default as many as make a step for each row, from 100 to 600 steps, at least 5.  An
            improvement is 0.001 nats per row since the last one.
        weight_decay: the weight decay of AdamW. The default is 0; where a flow starts as the Gaussian of fewer than
            1000 rows, to which the decay draws it back, it is 100 divided by the rows, at most 1.
        clip_norm: the largest norm of the gradient, or ``None``.
        average: the decay of an exponential moving average of the parameters for validation and the final state, at
            most :math:`t / (t + 10)` at step :math:`t`; 0 for none.
        optimizer: a torch optimizer over the flow's parameters in place of AdamW, or a function from parameters to one,
            with its own first learning rates.
        checkpoint: a file to save to, and to resume from if it exists; a resumed run equals one that never stopped.
            The file is replaced as a whole, verified by a checksum, and nothing in it is run.  An interruption saves
            the last whole epoch.  Each epoch costs a copy of the state.
        checkpoint_every: epochs between saves; the end is saved, too.
        compile: whether a second process compiles the steps, on a CPU, with rows held in memory and the default
            optimizer. ``"auto"`` does so where the fit will take much longer than that, and plain steps go on
            meanwhile; ``True`` waits for it. Numbers differ by rounding.
        resume: whether to continue from an existing checkpoint; otherwise it is replaced.
        seed: the seed of the split, the order of rows, and inside the fit torch's global generators, which are
            restored; ``None`` draws one.
        objective: ``"likelihood"``; or ``"flow_matching"`` or a
            :class:`~pyro_flows.infer.density.matching.FlowMatching`, which trains the field of a flow's only
            :class:`~pyro_flows.transforms.Continuous` part; other parts and the base must have no trainable parameters.
        folds: the number of parts of the rows, each held out once: as many members are fitted, the given flow and
            copies of it, and the result's distribution is their :class:`~pyro_flows.distributions.Ensemble`. Worth
            several nats a row where rows are few; costs as many fits, which share ``seconds``, and a checkpoint for
            each, ``{checkpoint}.0`` and so on. 1 makes one fit. The default is 5 for a flow or a MADE of fewer than
            1000 vectors, unless ``validation``, ``validation_fraction``, ``steps``, ``max_epochs``, ``checkpoint``, an
            optimizer made before, several processes, an integer flow or flow matching say otherwise, or the first
            member takes more than a fifth of the ``seconds``; else 1. Models that start as the Gaussian return to it
            unless their scores of the rows that they did not see exceed it by two standard errors.
        bounds: the bounds of columns of vectors, which draws never reach: a dictionary from names or numbers of columns
            to ``(low, high)``, or a pair or ``None`` for each column; ``None`` for an open side. The flow then learns
            numbers on the line, behind a :class:`~pyro_flows.transforms.bounds.Bounds` at its data end.
        callback: a function that is called after each epoch, with a dictionary of the history's last row and, in an
            ensemble, the number of the ``member``. If it returns ``True``, training stops, and may be resumed from a
            checkpoint. Of several processes, the first calls it. It has random numbers of its own, and its exceptions
            carry the fit.
        weights: how much each row of ``data`` counts, shape ``(rows,)``, at least 0; they are scaled to a mean of 1. A
            weight of 2 is as good as the row twice, but for the number of rows, which sets batches and folds. Scores,
            units and the Gaussian are weighted; rows for the verdict are kept with chances in proportion.
            ``validation`` rows that are given count alike.

    Raises:
        ValueError: for data that do not fit or have unbounded likelihood (constant or dependent columns), rows outside
            the support, settings out of range, a checkpoint that is damaged or of another fit, or a flow that flow
            matching cannot train.
        TypeError: for objects of other kinds.
        FloatingPointError: if a score or gradient is not finite; names the rows and the layer where this began.
        OSError: if the checkpoint cannot be written, e.g. because the disk is full; the old one is unchanged.

    Example:
        >>> data = torch.randn(500, 2)
        >>> fit = pf.fit_density(pf.nsf(2), data, steps=20)
        >>> fit.log_prob(data).shape
        torch.Size([500])
        >>> fit.sample((3,)).shape
        torch.Size([3, 2])

    References:
        Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017), section 4, arXiv:1705.07057.
        Decoupled Weight Decay Regularization (Loshchilov & Hutter, 2019), arXiv:1711.05101.
    """
    chosen = dict(locals())
    del chosen["folds"]
    check_callback("fit_density", callback)
    if bounds is not None:
        chosen["flow"] = bounded(_as_density(flow), bounds, column_names(data))
    if folds is None and _is_small(chosen):
        return _fit_folds(chosen, FOLDS, by_default=True)
    if folds is None or folds == 1:
        return _fit(chosen, 4)
    with processes.joined("fit_density"):  # for one clock and one order of rows
        return _fit_folds(chosen, folds)


def _fit(chosen: dict[str, Any], stacklevel: int | None) -> DensityFit:
    """Fits one density; ``chosen`` are the options, and the level is that of warnings about the data, if any."""
    flow, data, validation, context = (chosen[name] for name in ("flow", "data", "validation", "context"))
    optimizer, objective, standardize = (chosen[name] for name in ("optimizer", "objective", "standardize"))
    checkpoint, resume, seed = (chosen[name] for name in ("checkpoint", "resume", "seed"))
    so_far: SoFar = []
    with carrying(so_far), processes.joined("fit_density"), ExitStack() as stack:
        trained, matching = _as_density(flow), as_objective(objective)
        if matching is not None:
            matched_parts(trained, matching)
        parameters = [p for p in trained.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(
                "fit_density: expected a flow with trainable parameters, got one without; if it was frozen, call "
                "flow.requires_grad_(True)"
            )
        checkpoint = processes.from_first(lambda: checkpoint)
        known = processes.from_first(lambda: CHECKPOINT.read(checkpoint) if resume else None)
        if seed is None:
            seed = int(torch.randint(2**31, ())) if known is None else known["settings"]["seed"]
        chosen.update(seed=seed, objective="likelihood" if matching is None else str(matching))
        settings = Settings(**{each.name: chosen[each.name] for each in fields(Settings)})
        torchs = _as_optimizer(optimizer, parameters, settings)
        given = (data, context, validation, chosen["validation_context"])
        device = expected_by(trained).device
        stack.enter_context(own_randomness(device, seed))
        start = prepare(trained, given, settings, stacklevel, chosen["weights"])
        identity = {
            "architecture": architecture_of(trained),
            "data": {**start.identity, **bounds_in(trained)},
            "settings": settings.identity(start.sizes, "AdamW" if torchs is None else type(torchs).__name__),
        }
        processes.refuse_different("fit_density", {**identity, "limits": vars(settings)}, _ALIKE)
        processes.made_alike(trained)
        units = start.units = processes.from_first(lambda: start.units)
        if known is not None:
            then, now = ({"units": layout_of(each)} for each in (known["units"], units))
            CHECKPOINT.refuse_other(checkpoint, {**known, **then}, {**identity, **now})
            units = start.known_units(known["units"], checkpoint)
        density = in_units(trained, units, standardize)
        part = coloring_of(density)
        if known is None:
            start_as_gaussian(density, start.sample.value, start.sample.context, start.sample.weight)
            processes.made_alike(density)
        elif part is not None:
            with CHECKPOINT.refusing(checkpoint):
                part.place(**known["coloring"])
        held_out = 0 if start.validation is None else len(start.validation)
        aim: Objective = Likelihood(trained, density)
        if matching is not None and is_plain_flow(density):
            aim = Matching(matching, density, seed, held_out)
        average = bool(settings.average)
        rows = start.train.effective if isinstance(start.train, Rows) else len(start.train)
        decay = settings.weight_decay_for(rows, part is not None)
        made: AdamW | Given = (
            AdamW(parameters, None, settings.lr, decay, average) if torchs is None else Given(torchs, average)
        )
        training = DensityTraining(trained, aim, start, made, chosen["progress"], chosen["callback"])
        if known is not None:
            with interrupts_held_back():
                before = training.best_state
                try:
                    with CHECKPOINT.refusing(checkpoint):
                        training.load_state_dict(known["training"])
                        states = known["random"], *known["random"].get("others", ())
                        set_random(states[processes.rank()], device, **start.generators)
                except ValueError:
                    trained.load_state_dict(before)  # the flow stays as it was
                    made.release()
                    raise

        def content() -> dict[str, Any]:
            own: dict[str, Any] = random_state(device, **start.generators)
            random, *others = processes.everyone(own)
            if others:
                random["others"] = others
            buffers = {} if part is None else dict(part.named_buffers())
            coloring = {name: buffers[name].cpu() if name in buffers else None for name in ("loc", "factor", "slope")}
            return {
                **identity,
                "units": units,
                "coloring": coloring,
                "training": training.state_dict(),
                "random": random,
            }

        judged: list[Any] = [density]

        def result() -> DensityFit:
            return DensityFit(
                trained,
                density,
                training.history,
                training.best_epoch,
                math.nan if matching is not None or start.validation is None else training.best,
                training.stopped or "interrupted",
                "likelihood" if matching is None else "flow_matching",
                kept=(keep(judged[-1], start.held_out_sample, start.sample, seed),),
                columns=start.sample.columns,
                context_columns=start.sample.context_columns,
            )

        so_far.append(lambda: result() if training.epoch else None)
        training.run(Keeper(CHECKPOINT, checkpoint, content, chosen["checkpoint_every"]))
        sample = start.sample
        gaussian = not training.best_epoch and can_start(density, sample.value, sample.context)
        if gaussian and isinstance(start.validation, Rows):
            with interrupts_held_back():  # nothing is learned from some rows alone, so all may tell the Gaussian
                judged.append(started(trained, density, sample.value, sample.context, sample.weight))
                whole = sample.joined(start.validation)
                start_as_gaussian(density, whole.value, whole.context, whole.weight)
        fit = result()
        if matching is not None:
            try:
                fit.validation = mean_score(log_prob_of(density), start.validation)
            except RuntimeError as error:  # a solver's, which must not undo the fit
                warnings.warn(
                    f"fit_density: the flow is trained, but its held-out log-likelihood could not be computed: {error}",
                    RuntimeWarning,
                    stacklevel=3,
                )
    return fit


def _is_small(options: dict[str, Any]) -> bool:
    """Tells whether folds are worth their time by default: few rows, and no say on what they change."""
    flow, data = options["flow"], options["data"]
    said = ("validation", "validation_context", "max_epochs", "steps", "checkpoint")
    if any(options[name] is not None for name in said) or options["validation_fraction"] != 0.1:
        return False
    if isinstance(data, DataLoader) or options["objective"] != "likelihood":
        return False
    try:
        rows = len(data)
    except TypeError:  # of no rows, which is refused later
        return False
    vectors = len(getattr(flow, "data_shape", getattr(flow, "event_shape", ()))) == 1
    whole = bool(getattr(getattr(flow, "chain", flow), "discrete", False))
    ours = (isinstance(flow, FlowTransform | Flow) and not whole) or (is_density(flow) and head_of(flow) is not None)
    alone = not processes.several() and not isinstance(options["optimizer"], Optimizer)
    return ours and vectors and alone and 2 * FOLDS <= rows < FEW_ROWS


def _fit_folds(options: dict[str, Any], count: int, by_default: bool = False) -> DensityFit:
    """Fits a member to the rows outside of each fold; ``options`` are those of :func:`fit_density`.

    By default, the others follow only if there is time for them after the first.
    """
    seconds, checkpoint, callback = (options[name] for name in ("seconds", "checkpoint", "callback"))
    flow, data, context = (options[name] for name in ("flow", "data", "context"))
    integer("fit_density", "folds", count)
    if options["validation"] is not None or isinstance(data, DataLoader):
        raise ValueError("fit_density: folds hold out rows of data in turn, so data must be rows, without validation=")
    first = _as_density(flow)
    Ensemble([first])  # refuses what cannot be a member, before the work
    fresh, *members = [copy.deepcopy(first), first, *(copy.deepcopy(first) for _ in range(count - 1))]
    expected = expected_by(first)
    rows = admit_rows(data, context, expected, "data", "context").weighted(options["weights"], expected)
    refuse_support(first, rows.value, names=rows.columns)
    for told in (*expected.told(rows.columns, rows.context_columns), rows.told()):
        if told:
            warnings.warn(f"fit_density: {told}", stacklevel=3)
    if not 2 <= count <= len(rows):
        raise ValueError(f"fit_density: expected from 2 folds to one for each of the {len(rows)} rows, got {count}")
    seed = int(torch.randint(2**31, ())) if options["seed"] is None else options["seed"]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed), device="cpu")
    parts, begin = order.tensor_split(count), processes.clock()
    sizes = [float(rows.counts[part].sum()) for part in parts]
    fits: list[DensityFit] = []

    def so_far() -> object:
        return _ensemble(fits, sizes, by_default) if fits else getattr(sys.exc_info()[1], "fit", None)

    with carrying([so_far]):
        for k, member in enumerate(members):
            others = torch.cat([*parts[:k], *parts[k + 1 :]])
            kept, held_out = (rows.take(part).scaled() for part in (others, parts[k]))
            own = {"flow": member, "data": kept, "context": None, "validation": held_out, "seed": seed + k}
            own["weights"] = None
            spent = processes.clock() - begin
            if seconds is not None and by_default:
                if k == 1 and spent * count > seconds:
                    return fits[0]
                own["seconds"] = max(seconds - spent, 1e-3)
            elif seconds is not None:
                own["seconds"] = max((seconds - spent) / (count - k), 1e-3)
            if checkpoint is not None:
                own["checkpoint"] = f"{os.fspath(checkpoint)}.{k}"
            if callback is not None:
                own["callback"] = partial(_of_member, callback, k)
            fits.append(_fit({**options, **own}, None if k else 5))
            if fits[-1].stopped == "callback" and len(fits) < count:
                return fits[0] if by_default and not k else _ensemble(fits, sizes, by_default)
        gaussian = _floor(fits, fresh, rows, parts)
    return _ensemble(fits, sizes, by_default, gaussian if by_default else [])


def _of_member(callback: Callback, member: int, record: dict[str, Any]) -> object:
    return callback({**record, "member": member})


@torch.no_grad()
def _floor(fits: list[DensityFit], fresh: Flow | Density, rows: Rows, parts: Sequence[Tensor]) -> list[Flow | Density]:
    """Returns members to the Gaussian unless they score better than it, by more than chance, on rows held out.

    Returns the Gaussian of all rows, if models of this kind start as one.
    """
    fitted: list[Any] = [each.distribution for each in fits]
    whole = fitted[0] if is_plain_flow(fresh) else fresh
    if not can_start(whole, rows.value, rows.context):
        return []
    gains, scores, starts = [], [], []
    for fit, member, held in zip(fits, fitted, parts, strict=True):
        others = rows.take(torch.cat([part for part in parts if part is not held]))
        own = rows.take(held)
        start = started(fresh, member, others.value, others.context, others.weight)
        starts.append(start)
        scores.append(log_prob_of(start)(own.value, own.context).double().cpu())
        reached = log_prob_of(member)(own.value, own.context).double().cpu() if fit.best_epoch else scores[-1]
        gains.append(reached - scores[-1])
    weights = [rows.counts[part] for part in parts]
    if not better(torch.cat(gains), torch.cat(weights)):
        with interrupts_held_back():
            for k, (fit, member, score) in enumerate(zip(fits, fitted, scores, strict=True)):
                fit.flow.load_state_dict(fresh.state_dict())
                start_as_gaussian(member, rows.value, rows.context, rows.weight)
                kept = (replace(fit.kept[0], density=starts[k]),)  # the member has seen all rows now
                mean = (weights[k] * score).sum() / weights[k].sum()
                fits[k] = replace(fit, best_epoch=0, validation=mean.item(), kept=kept)
    return [started(fresh, fitted[0], rows.value, rows.context, rows.weight)]


def _ensemble(
    fits: Sequence[DensityFit], sizes: Sequence[float], by_default: bool, others: Sequence[Flow | Density] = ()
) -> DensityFit:
    """Returns the fit of several members; each row has a score by the one that did not see it."""
    sizes = sizes[: len(fits)]
    score = sum(size * fit.validation for size, fit in zip(sizes, fits, strict=True)) / sum(sizes)
    kept = tuple(part for fit in fits for part in fit.kept)
    if by_default:  # all else is that of the flow given
        density = Ensemble([*fits, *others])
        return replace(fits[0], distribution=density, validation=score, members=tuple(fits), kept=kept)
    history = {name: [entry for fit in fits for entry in fit.history[name]] for name in fits[0].history}
    ends = {fit.stopped for fit in fits}
    return DensityFit(
        Ensemble([fit.flow for fit in fits]),
        Ensemble(fits),
        history,
        max(fit.best_epoch for fit in fits),
        score,
        fits[0].stopped if len(ends) == 1 else ", ".join(sorted(ends)),
        fits[0].objective,
        tuple(fits),
        kept,
        columns=fits[0].columns,
        context_columns=fits[0].context_columns,
    )


def _as_density(flow: object) -> Flow | Density:
    if isinstance(flow, FlowTransform):
        return Flow(flow).train(flow.training)
    if isinstance(flow, Flow) or is_density(flow):
        return flow
    hint = "a module of another kind needs a method log_prob(value)"
    if isinstance(flow, Distribution):
        hint = "a distribution owns no parameters: give the module that made it"
    elif isinstance(flow, Transform):
        hint = "put torch's and Pyro's own transforms in a Chain([...])"
    raise TypeError(
        f"fit_density: expected a flow transform, a Flow, or a module with log_prob, got {type(flow).__name__}; {hint}"
    )


def _as_optimizer(given: Any, parameters: list[nn.Parameter], settings: Settings) -> Optimizer | None:
    """Returns a torch optimizer; ``None`` if AdamW on flat buffers will do."""
    if given is None:
        if len({(p.dtype, p.device) for p in parameters}) == 1 and parameters[0].is_floating_point():
            return None
        return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay or 0.0)
    made = given if isinstance(given, Optimizer) or not callable(given) else given(parameters)
    if not isinstance(made, Optimizer):
        raise TypeError(
            "fit_density: expected optimizer to be a torch optimizer, or a function that makes one from parameters, "
            f"e.g. partial(torch.optim.SGD, lr=0.1); got {type(made).__name__}"
        )
    held = {id(p) for group in made.param_groups for p in group["params"]}
    if not held & {id(p) for p in parameters}:
        raise ValueError(
            "fit_density: the optimizer holds none of the flow's trainable parameters; make it of flow.parameters()"
        )
    return made
