"""Where on the way through a flow NaN or infinity first appears."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flows.chain import Chain
from pyro_flows.core import Conditioned, FlowTransform, Inverse

__all__ = ["locate_nonfinite"]


@torch.no_grad()
def locate_nonfinite(transform: FlowTransform, x: Tensor, context: Tensor | None = None) -> str | None:
    """Says where on the way from base to data NaN or infinity first appears; ``None`` if nowhere.

    Chains, inverses and conditioned views are entered, at any depth.  For the way from data to base give
    ``transform.inv`` and a data-side value.

    Args:
        transform: the flow to walk.
        x: a base-side value of shape ``(*batch, *event_shape)``.
        context: shape ``(*context_batch, context_dim)`` if the transform takes one.

    Returns:
        The path of the part, and which parameter or output of it is not finite.
    """
    for what, value in (("x", x), ("context", context)):
        if value is not None and not value.isfinite().all():
            return f"input {what} {_count(value)}"
    return _walk("", transform, x, context, False)[0]


def _count(value: Tensor) -> str:
    return f"has {int((~value.isfinite()).sum())} non-finite of {value.numel()} entries"


def _walk(
    path: str, part: FlowTransform, value: Tensor, context: Tensor | None, inverse: bool
) -> tuple[str | None, Tensor]:
    if isinstance(part, (Inverse, Conditioned)):
        bound = part.context if isinstance(part, Conditioned) else context
        return _walk(f"{path}transform.", part.transform, value, bound, inverse ^ isinstance(part, Inverse))
    if isinstance(part, Chain):
        numbered = list(enumerate(part))
        for k, inner in reversed(numbered) if inverse else numbered:
            found, value = _walk(f"{path}parts.{k}.", inner, value, context, inverse)
            if found is not None:
                return found, value
        return None, value
    value, ladj = getattr(part, "inverse_and_ladj" if inverse else "forward_and_ladj")(
        value, context if part.context_dim else None
    )
    if value.isfinite().all() and ladj.isfinite().all():
        return None, value
    where = f"{path[:-1] or 'the transform'} ({type(part).__name__})"
    for kind, held in (("parameter", part.named_parameters()), ("buffer", part.named_buffers())):
        for name, tensor in held:
            if not tensor.isfinite().all():
                return f"{where}: {kind} {name} {_count(tensor)}", value
    what = ("ladj", ladj) if value.isfinite().all() else ("x" if inverse else "y", value)
    return f"{where}: output {what[0]} {_count(what[1])}", value
