"""Where NaN or infinity first appears."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_flows.core.chain import leaves
from pyro_flows.core.transform import Conditioned, FlowTransform, Inverse

__all__ = ["locate_nonfinite", "nonfinite_output", "nonfinite_state"]


@torch.no_grad()
def locate_nonfinite(
    transform: FlowTransform, x: Tensor, context: Tensor | None = None, *, within: nn.Module | None = None
) -> str | None:
    """Says where on the way from base to data NaN or infinity first appears; ``None`` if nowhere.

    Enters chains, inverses and conditioned views.  For the other way give ``transform.inv`` and a data-side value.

    Args:
        transform: the flow to walk.
        x: a base-side value of shape ``(*batch, *event_shape)``.
        context: shape ``(*context_batch, context_dim)`` if the transform takes one.
        within: a module whose names of the parts replace paths from ``transform``.

    Returns:
        The path of the part, and its parameter or output that is not finite.

    Example:
        >>> chain = pf.Chain([pf.LULinear(2), torch.distributions.ExpTransform()])
        >>> pf.testing.locate_nonfinite(chain, torch.tensor([[1000.0, 0.0]]))
        'parts.1 (Wrap): output y has 1 non-finite of 2 entries'
    """
    for what, value in (("x", x), ("context", context)):
        if value is not None and not value.isfinite().all():
            return f"input {what} {_count(value)}"
    names: dict[nn.Module, list[str]] = {}
    for root in (transform,) if within is None else (transform, within):
        found: dict[nn.Module, list[str]] = {}
        for name, module in root.named_modules(remove_duplicate=False):
            found.setdefault(module, []).append(name or "the transform")
        names |= found
    for part in leaves(transform):
        x, ladj = part.forward_and_ladj(x, context if part.context_dim else None)
        inverse = False
        while isinstance(part, (Inverse, Conditioned)):
            inverse ^= isinstance(part, Inverse)
            part = part.transform
        places = names.get(part, ["the transform"])
        place = places.pop(0) if len(places) > 1 else places[0]  # a part may occur more than once
        for what, result in (("x" if inverse else "y", x), ("ladj", ladj)):
            if not result.isfinite().all():
                where = f"{place} ({type(part).__name__})"
                return f"{where}: {nonfinite_state(part) or f'output {what} {_count(result)}'}"
    return None


def nonfinite_state(module: nn.Module) -> str | None:
    """The first parameter or buffer with entries that are not finite, and their number."""
    for kind, held in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
        for name, tensor in held:
            if not tensor.isfinite().all():
                return f"{kind} {name} {_count(tensor)}"
    return None


def nonfinite_output(module: nn.Module, call: Callable[[], object]) -> str | None:
    """The first submodule whose output is not finite while ``call``, e.g. ``lambda: module.log_prob(x)``, runs."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(inner: nn.Module, given: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(f"{name} ({type(inner).__name__}): {nonfinite_state(inner) or 'output ' + _count(output)}")

        return hook

    handles = [inner.register_forward_hook(watch(name)) for name, inner in module.named_modules() if name]
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _count(value: Tensor) -> str:
    return f"has {int((~value.isfinite()).sum())} non-finite of {value.numel()} entries"
