"""Checks of models and rows for pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution

from pyro_flows.core.checks import first_floating, integer
from pyro_flows.core.modes import evaluating
from pyro_flows.core.transform import FlowTransform
from pyro_flows.infer.density.data import to_tensor
from pyro_flows.infer.density.names import by_name, column_names

__all__ = ["columns_of", "distribution_of", "draw", "drawn_rows", "draws_of", "numbers", "rows_of", "score", "single"]

CHUNK = 1 << 14  # rows scored at a time


def numbers(value: Any, name: str, what: str) -> np.ndarray:
    """Finite numbers of any kind as a float64 array."""
    array = to_tensor(value, name, what).cpu().double().numpy()
    if array.size == 0:
        raise ValueError(f"{name}: {what} is empty, shape {array.shape}")
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise ValueError(
            f"{name}: {bad} of {array.size} numbers in {what} are NaN or infinite; leave those rows out first"
        )
    return array


def rows_of(value: Any, event_shape: Size, name: str, what: str) -> np.ndarray:
    """Flattened events, shape ``(rows, event size)``."""
    array = numbers(value, name, what)
    size = event_shape.numel()
    fits = array.ndim > len(event_shape) and array.shape[array.ndim - len(event_shape) :] == tuple(event_shape)
    if array.ndim == 1 and size == 1:  # one dimension may lack its own axis
        return array[:, None]
    if not fits or array.ndim == 0:
        shape = str(("rows", *event_shape)).replace("'", "")
        raise ValueError(f"{name}: expected {what} of shape {shape}, got shape {tuple(array.shape)}")
    return array.reshape(-1, size)


def columns_of(model: Any, data: Any = None) -> tuple[str, ...] | None:
    """The names of columns: those of a fit, of samples in a data frame, or else of the data."""
    found = getattr(model, "columns", None)
    return found if isinstance(found, tuple) else column_names(model) or column_names(data)


def distribution_of(model: Any, context: Any, name: str) -> Distribution:
    """A model's distribution, at a context if given."""
    if not isinstance(model, (Distribution, nn.Module)):
        context = by_name(context, getattr(model, "context_columns", None), name, "context")
        model = getattr(model, "distribution", model)  # the result of a fit
    if isinstance(model, FlowTransform):
        raise TypeError(
            f"{name}: {type(model).__name__} is a transform and has no density; give it a base: pf.Flow(transform)"
        )
    if isinstance(model, Distribution):
        if context is not None:
            raise ValueError(f"{name}: {type(model).__name__} takes no context: leave it out")
        return model
    context_dim = getattr(model, "context_dim", None)
    if context is None and context_dim:
        raise ValueError(f"{name}: this flow was built with context_dim={context_dim}: give context=")
    made = None
    if context is not None and hasattr(model, "condition"):
        made = model.condition(_context(model, context, name))
    elif context is None and isinstance(model, nn.Module):
        try:
            made = model()
        except (NotImplementedError, TypeError):  # a module with another call, or none
            pass
    if not isinstance(made, Distribution):
        hint = "" if context is None else ", at a context"
        raise TypeError(
            f"{name}: expected a distribution, a Flow or the result of fitting a flow{hint}, got {type(model).__name__}"
        )
    return made


def _context(model: Any, context: Any, name: str) -> Tensor:
    """The context in the dtype and on the device of the parameters."""
    given = torch.from_numpy(numbers(context, name, "context"))
    kin = first_floating(model) if isinstance(model, nn.Module) else None
    if kin is not None:
        return given.to(kin.device, kin.dtype)
    if isinstance(context, Tensor) and context.is_floating_point():
        return context.detach()
    return given.to(torch.get_default_dtype())


def single(made: Distribution, name: str, sizes: Sequence[int] | None = None) -> Distribution:
    """Admits the distribution of one event of these sizes."""
    if made.batch_shape:
        raise ValueError(
            f"{name}: expected an empty batch shape, got {tuple(made.batch_shape)}; give one context of shape "
            "(context_dim,), or call .to_event() on a distribution of independent dimensions"
        )
    if sizes is not None and made.event_shape.numel() not in sizes:
        raise ValueError(
            f"{name}: expected {' or '.join(map(str, sizes))} dimensions, got event shape {tuple(made.event_shape)}; "
            "plots.corner draws more of them"
        )
    return made


@contextmanager
def _resting(made: Distribution | None) -> Iterator[None]:
    """Turns off gradients and training, so that a picture never initializes layers."""
    parts = nn.ModuleList()
    while made is not None:
        parts.extend(part for part in getattr(made, "transforms", ()) if isinstance(part, nn.Module))
        made = getattr(made, "base_dist", None)
    with torch.no_grad(), evaluating(parts):
        yield


def draw(made: Distribution, shape: tuple[int, ...] = ()) -> Tensor:
    """Samples that leave no trace in the model."""
    with _resting(made):
        return made.sample(shape)


def drawn_rows(made: Distribution, num_samples: int, name: str) -> np.ndarray:
    """Draws as flattened rows: ``num_samples`` for each batch entry."""
    drawn = draw(made, (num_samples,))
    if not drawn.isfinite().all():
        raise ValueError(
            f"{name}: some of the model's draws are NaN or infinite; pyro_flows.testing.locate_nonfinite finds where"
        )
    return rows_of(drawn, made.event_shape, name, "the model's draws")


def draws_of(model: Any, num_samples: int, context: Any, name: str) -> tuple[np.ndarray, Size]:
    """Rows and their event shape: given samples, or at least ``num_samples`` draws."""
    integer(name, "num_samples", num_samples)
    if isinstance(model, (Tensor, np.ndarray, list, tuple)) or hasattr(model, "to_numpy"):
        array = numbers(model, name, "samples")
        if array.ndim == 0:
            raise ValueError(f"{name}: expected samples of shape (rows, *event), got a single number")
        event = Size(array.shape[1:])
        return array.reshape(len(array), -1), event
    made = distribution_of(model, context, name)
    if context is None:
        single(made, name)
    return drawn_rows(made, -(-num_samples // max(1, made.batch_shape.numel())), name), made.event_shape


def score(made: Distribution, points: np.ndarray, name: str) -> np.ndarray:
    """Log-densities in nats of points ``(n, event size)``; minus infinity outside the support."""
    event = made.event_shape
    found = []
    with _resting(made):
        try:
            kin = made.sample()
        except NotImplementedError:  # as of Pyro's VonMises3D
            kin = torch.zeros(event)
        for part in torch.from_numpy(points).split(CHUNK):
            values = part.to(kin.device, kin.dtype).reshape(len(part), *event)
            try:
                support: Any = made.support
                inside = support.check(values)
            except (NotImplementedError, ValueError):  # an unknown or dependent support
                inside = values.new_ones(len(values), dtype=torch.bool)
            # A draw replaces values outside, which validation would refuse.
            safe = torch.where(inside.reshape(-1, *(1,) * len(event)), values, kin)
            found.append(made.log_prob(safe).masked_fill(~inside, -torch.inf).double().cpu())
    log_prob = torch.cat(found)
    bad = int(log_prob.isnan().sum())
    if bad:
        raise ValueError(
            f"{name}: the log-density is NaN at {bad} of {len(log_prob)} points; "
            "pyro_flows.testing.locate_nonfinite finds the layer"
        )
    return log_prob.numpy()
