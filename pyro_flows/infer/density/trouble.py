"""What to say of a score or a gradient that is not finite: which rows, which layer, which parameter, what to do."""

from __future__ import annotations

import contextlib

from torch import Tensor, nn

from pyro_flows.infer.density.arrays import name_rows
from pyro_flows.infer.density.data import Batch
from pyro_flows.infer.density.units import StandardizedFlow, is_plain_flow
from pyro_flows.nonfinite import locate_nonfinite, nonfinite_output, nonfinite_state

__all__ = ["bad_gradient", "bad_score", "first_nonfinite"]

_REMEDY = "try a smaller lr or clip_norm, a flow in float64 (flow.double()), and look at the data for outliers"


def first_nonfinite(flow: nn.Module, model: nn.Module, batch: Batch) -> str | None:
    """Where NaN or infinity first appears as rows are scored; ``None`` if nowhere before the score itself.

    Args:
        flow: what was given to be trained; parts go by their names in it.
        model: the same in the units of the data.
        batch: rows and contexts.
    """
    value, context, _ = batch
    if is_plain_flow(model):
        inner = model.scaled(context) if isinstance(model, StandardizedFlow) and context is not None else context
        return locate_nonfinite(model.chain.inv, value, inner, within=flow) or nonfinite_state(flow)

    def call() -> None:
        # Distributions that validate refuse NaN, by when the layer that made it has been seen.
        with contextlib.suppress(ValueError):
            model.log_prob(value) if context is None else model.log_prob(value, context)

    return nonfinite_output(flow, call) or nonfinite_state(flow)


def bad_score(what: str, scores: Tensor, index: Tensor | None, found: str) -> str:
    """A message about scores that are not finite: the quantity, the rows, and where it begins."""
    rows = (~scores.isfinite()).nonzero()[:, 0].cpu()
    which = f"{len(rows)} of {len(scores)} rows"
    if index is not None and len(rows):
        which += f" ({name_rows(index[rows])} as given)"
    return f"fit_density: the {what}, from {which}; {found}; {_REMEDY}"


def bad_gradient(flow: nn.Module, norm: float) -> str:
    """A message that names the parameters whose gradients are not finite."""
    names = [name for name, p in flow.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    which = f"that of {', '.join(names[:5])}{', …' if len(names) > 5 else ''} is not finite"
    if not names:
        which = "each gradient is finite, but their squares overflow"
    return f"fit_density: the norm of the gradient is {norm}: {which}; {_REMEDY}"
