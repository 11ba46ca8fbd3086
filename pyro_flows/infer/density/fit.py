"""``fit_density``: a flow, or any module with ``log_prob``, fitted to data in one call."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Transform
from torch.optim import AdamW, Optimizer

from pyro_flows.core.transform import FlowTransform
from pyro_flows.distributions import Flow
from pyro_flows.infer.density.data import Rows, admit_rows, expected_by, to_tensor
from pyro_flows.infer.density.loop import CHECKPOINT, DensityTraining
from pyro_flows.infer.density.matching import FlowMatching, Matching, as_objective, matched_parts
from pyro_flows.infer.density.objective import Likelihood, Objective, evaluate, log_prob_of, mean_score
from pyro_flows.infer.density.prepare import Prepared, prepare
from pyro_flows.infer.density.settings import Settings
from pyro_flows.infer.density.survey import reals_of
from pyro_flows.infer.density.units import Density, in_units, is_density, is_plain_flow
from pyro_flows.infer.machine.checkpoint import Keeper, architecture_of, layout_of
from pyro_flows.infer.machine.interrupts import carrying, interrupts_held_back
from pyro_flows.infer.machine.randomness import own_randomness, random_state, set_random

__all__ = ["DensityFit", "fit_density"]


@dataclass(repr=False)
class DensityFit:
    """The result of :func:`fit_density`.

    Attributes:
        flow: the module that was trained: the flow or module that was given, or the ``Flow`` around the chain that was
            given.
        distribution: the density in the units of the data, a module that shares the parameters: a ``Flow`` if ``flow``
            is one, and ``flow`` itself if nothing was standardized.  It has ``log_prob`` and ``sample``;
            ``distribution()``, or ``distribution(context)`` for a flow that takes contexts, makes a Pyro distribution.
        history: lists of one entry an epoch: ``epoch``; ``step``, steps taken so far; ``train`` and ``validation``,
            mean log-likelihood in nats per row, in the units of the data (``train`` is taken along the way,
            ``validation`` at the end of the epoch; NaN without validation rows); ``lr``; ``seconds`` so far.
        best_epoch: the epoch whose state the flow is left in.
        validation: mean log-likelihood of the validation rows in that state, in nats per row and in the units of the
            data; NaN without validation rows.
        stopped: why training ended: ``"patience"``, ``"max_epochs"``, ``"steps"`` or ``"seconds"``; ``"interrupted"``
            for a result that an exception carries.
        objective: ``"likelihood"`` or ``"flow_matching"``.

    With flow matching, ``train`` and ``validation`` in the history are the negative matching loss: minus the mean
    squared error of a velocity, per dimension, in units of the field's end at the data (where standardized data have
    variance 1).  Validation uses fixed pairs and times, and decides about the best epoch.  The attribute ``validation``
    is a log-likelihood in any case, computed once in the final state.
    """

    flow: Flow | Density
    distribution: Flow | Density
    history: dict[str, list[float]]
    best_epoch: int
    validation: float
    stopped: str
    objective: str = "likelihood"

    def log_prob(self, data: Any, context: Any = None) -> Tensor:
        """Log-densities in nats of rows as they are, shape ``(rows,)``, without a graph; in pieces, on the CPU."""
        rows = admit_rows(data, context, expected_by(self.distribution), "data", "context")
        if is_plain_flow(self.distribution):
            reals_of(self.distribution, rows.value, "data")
        return torch.cat([scores.cpu() for scores in evaluate(log_prob_of(self.distribution), rows)])

    @torch.no_grad()
    def sample(self, sample_shape: Size | tuple[int, ...] = (), context: Any = None) -> Tensor:
        """Draws in the units of the data, shape ``(*sample_shape, *context_batch, *event_shape)``."""
        if context is None:
            return self.distribution.sample(sample_shape)
        expected = expected_by(self.distribution)
        context = to_tensor(context, "DensityFit.sample", "context").to(expected.device, expected.dtype)
        return self.distribution.sample(sample_shape, context)

    def __repr__(self) -> str:
        held_out = not math.isnan(self.validation)
        score = self.validation if held_out else self.history["train"][self.best_epoch - 1]
        unit = "nats per row" if held_out or self.objective == "likelihood" else "(negative matching loss)"
        return (
            f"DensityFit({'validation' if held_out else 'train'} {score:.4f} {unit} at epoch {self.best_epoch} "
            f"of {self.history['epoch'][-1]}, stopped by {self.stopped}, {self.history['step'][-1]} steps in "
            f"{self.history['seconds'][-1]:.1f} s)"
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
    weight_decay: float = 0.0,
    clip_norm: float | None = 5.0,
    average: float = 0.998,
    optimizer: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
    resume: bool = True,
    seed: int | None = 0,
    objective: str | FlowMatching = "likelihood",
) -> DensityFit:
    """Fits a density to data by maximum likelihood or flow matching, stopped early by held-out rows.

    The flow is trained in place: it stays the same object with the same parameters, frozen ones stay frozen, and it is
    left in evaluation mode, without gradients, in the state that scored best, even after an error or interruption.
    Data are standardized on the way: the density in their own units is ``DensityFit.distribution``, whose chain ends in
    a :class:`~pyro_flows.transforms.elementwise.Standardization`.

    Ctrl-C raises ``KeyboardInterrupt`` as anywhere else.  The exception, as any other that ends the training, carries
    the :class:`DensityFit` so far as its attribute ``fit``, which is ``None`` before the end of the first epoch::

        try:
            fit = fit_density(flow, data, checkpoint="fit.pt")
        except KeyboardInterrupt as stop:
            fit = stop.fit

    A step costs one pass in the density direction and its gradient; an epoch, one such pass over all validation rows.
    With flow matching a step costs one evaluation of the field and its gradient, without a solve, and one pass over the
    validation rows follows at the very end.  Where a continuous part has ``kinetic`` or ``jacobian`` weights, the mean
    of these penalties over a batch, in the part's own units (those of standardized data), is added to the negative
    log-likelihood that a step lowers, and to no score; flow matching leaves them out.

    Args:
        flow: a chain or other flow transform (which gets a standard normal base), a
            :class:`~pyro_flows.distributions.Flow`, or any module with ``log_prob(value)`` or ``log_prob(value,
            context)``, e.g. of discrete data.
        data: shape ``(rows, *event_shape)``, a tensor, NumPy array or data frame, converted to the flow's dtype and
            device (a module that is no flow gets integers as they are; masks and ``NA`` count as missing); or a
            ``DataLoader`` that yields ``x``, ``(x,)`` or ``(x, context)``, of which one pass is an epoch, after a first
            pass for checks and standardization.
        validation: rows to judge by, in the same forms.  By default a random part of ``data``; with a ``DataLoader`` as
            data, the training score is the judge.
        context: shape ``(rows, context_dim)``, for flows that take one.
        progress: whether to show a progress bar.
        validation_context: contexts of ``validation``.
        validation_fraction: the part of ``data`` that is held out, at most 20,000 rows; 0 to judge by the training
            score.
        standardize: whether to standardize data, column by column (of series, for flows whose parts all times share,
            channel by channel over all times), and contexts.  The default standardizes for flows over real numbers,
            except dimensions that are angles (named by a part's ``periodic``), and leaves the part of the chain that
            maps onto a constrained support behind it; it does not for other modules.  Discrete columns of a
            :class:`~pyro_flows.distributions.made.MADE` stay as they are in any case.
        batch_size: rows in a step, by default about a thirty-second of the rows, from 64 to 1024; a ``DataLoader`` has
            its own.
        max_epochs: passes over the data at most, by default as many as make 20,000 steps, from 20 to 1000.
        steps: optimizer steps at most.
        seconds: time at most.
        lr: the first learning rate.
        schedule: ``"plateau"`` (after ``patience`` epochs without improvement back to the best state, with 0.3 times
            the learning rate; the end after two such cuts in vain), ``"cosine"`` (from ``lr`` to a hundredth of it over
            the whole run) or ``"constant"``; the latter two end after ``patience`` epochs without improvement.
        patience: in epochs, by default as many as make 600 steps, at least 5.  An improvement is one of 0.001 nats per
            row since the last one.
        weight_decay: of AdamW.
        clip_norm: largest norm of the gradient, ``None`` for any.
        average: decay of an exponential moving average of the parameters, which is what validation and the final state
            use; less at first, :math:`t / (t + 10)` at step :math:`t`; 0 for no average.
        optimizer: in place of AdamW: a torch optimizer over the flow's parameters, or a function that makes one from
            parameters; its own learning rates are the first ones.
        checkpoint: a file to save to, and to resume from if it exists; a resumed run equals one that never stopped.
            The file is replaced as a whole, its checksum is verified, and nothing in it is run.  An interruption
            saves the state at the end of the last whole epoch.  Each epoch costs a copy of the state.
        checkpoint_every: epochs between two files; one is also written at the end.
        resume: whether to continue from a checkpoint that exists; if not, the fit begins anew and replaces it.
        seed: seeds the random split, the order of rows, and inside the fit torch's global generators, which are
            restored after; ``None`` to draw it from the global one.
        objective: ``"likelihood"``; or ``"flow_matching"``, or a
            :class:`~pyro_flows.infer.density.matching.FlowMatching` with settings, for flows with exactly one
            :class:`~pyro_flows.transforms.Continuous` part, whose field it trains.  The other parts and the base must
            be free of trainable parameters.

    Returns:
        The flow, the density in the data's units, the history of scores, and why training ended.

    Raises:
        ValueError: for data that do not fit or whose likelihood has no bound (constant or dependent columns), rows
            outside of the support, settings out of range, a checkpoint that is damaged or of another fit, or a flow
            that flow matching cannot train.
        TypeError: for objects of other kinds.
        FloatingPointError: if a score or gradient is not finite; says in which rows and which layer it began.
        OSError: if the checkpoint cannot be written, e.g. because the disk is full; the old one is unchanged.

    References:
        Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017), section 4, arXiv:1705.07057.
        Decoupled Weight Decay Regularization (Loshchilov & Hutter, 2019), arXiv:1711.05101.
    """
    trained, matching = _as_density(flow), as_objective(objective)
    if matching is not None:
        matched_parts(trained, matching)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            "fit_density: expected a flow with trainable parameters, got one without; if it was frozen, call "
            "flow.requires_grad_(True)"
        )
    known = CHECKPOINT.read(checkpoint) if resume else None
    if seed is None:
        seed = int(torch.randint(2**31, ())) if known is None else known["settings"]["seed"]
    settings = Settings(
        validation_fraction=validation_fraction,
        standardize=standardize,
        batch_size=batch_size,
        max_epochs=max_epochs,
        steps=steps,
        seconds=seconds,
        lr=lr,
        schedule=schedule,
        patience=patience,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        average=average,
        checkpoint_every=checkpoint_every,
        seed=seed,
        objective="likelihood" if matching is None else str(matching),
    )
    optimizer = _as_optimizer(optimizer, parameters, settings)
    given = (data, context, validation, validation_context)
    device = expected_by(trained).device
    so_far: list[Callable[[], object]] = []
    with carrying(so_far), own_randomness(device, seed):
        generator = torch.Generator().manual_seed(seed)
        start = prepare(trained, given, settings, generator, stacklevel=2)
        size = settings.batch_size_for(len(start.train)) if isinstance(start.train, Rows) else 0
        sizes = settings.sizes(size, start.train.steps(size))
        identity = {
            "architecture": architecture_of(trained),
            "data": start.identity,
            "settings": settings.identity(sizes, type(optimizer).__name__),
        }
        units = start.units
        if known is not None:
            then, now = ({"units": layout_of(each)} for each in (known["units"], units))
            CHECKPOINT.refuse_other(checkpoint, {**known, **then}, {**identity, **now})
            units = start.known_units(known["units"], checkpoint)
        density = in_units(trained, units, standardize)
        held_out = 0 if start.validation is None else len(start.validation)
        aim: Objective = Likelihood(trained, density)
        if matching is not None and is_plain_flow(density):
            aim = Matching(matching, density, seed, held_out)
        training = DensityTraining(
            trained, density, aim, start.train, start.validation, optimizer, settings, sizes, generator, progress
        )
        if known is not None:
            _resume(training, known, checkpoint, device, shuffle=generator, **start.generators)

        def content() -> dict[str, Any]:
            random = random_state(device, shuffle=generator, **start.generators)
            return {**identity, "units": units, "training": training.state_dict(), "random": random}

        def result() -> DensityFit:
            return DensityFit(
                trained,
                density,
                training.history,
                training.best_epoch,
                math.nan if matching is not None else training.history["validation"][training.best_epoch - 1],
                training.stopped or "interrupted",
                "likelihood" if matching is None else "flow_matching",
            )

        so_far.append(lambda: result() if training.best_epoch else None)
        training.run(Keeper(CHECKPOINT, checkpoint, content, checkpoint_every))
        fit = result()
        if matching is not None:
            fit.validation = _likelihood(density, start)
    return fit


def _resume(
    training: DensityTraining,
    known: dict[str, Any],
    path: str | os.PathLike[str] | None,
    device: torch.device,
    **generators: torch.Generator | None,
) -> None:
    """Continues from a checkpoint; one that does not fit leaves the flow as it was."""
    with interrupts_held_back():
        before = training.best_state
        try:
            with CHECKPOINT.refusing(path):
                training.load_state_dict(known["training"])
                set_random(known["random"], device, **generators)
        except ValueError:
            training.flow.load_state_dict(before)
            raise


def _likelihood(density: Flow | Density, start: Prepared) -> float:
    """The held-out log-likelihood of a finished fit, which an error of the solver must not undo."""
    if start.validation is None:
        return math.nan
    try:
        return mean_score(log_prob_of(density), start.validation)
    except RuntimeError as error:
        warnings.warn(
            f"fit_density: the flow is trained, but its held-out log-likelihood could not be computed: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return math.nan


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


def _as_optimizer(
    given: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None,
    parameters: list[nn.Parameter],
    settings: Settings,
) -> Optimizer:
    if given is None:
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
        return AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused)
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
