"""How much memory a computation takes, and how many rows of a batch fit into a bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Footprint", "rows_at_once"]

BYTES = 2**28  # that the tensors of one call may take together


class Footprint(TorchDispatchMode):
    """Within it, the bytes of all tensors that are made are added up, in ``bytes``.

    The sum is an upper bound of the peak: without gradients most tensors are freed on the way, with gradients most are
    kept, and the backward pass makes about as many again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        made = func(*args, **(kwargs or {}))
        parts = made if isinstance(made, tuple | list) else (made,)
        for part, returned in zip(parts, func._schema.returns, strict=False):
            # A view, or a tensor changed in place, takes no memory of its own.
            if isinstance(part, Tensor) and returned.alias_info is None:
                self.bytes += part.numel() * part.element_size()
        return made


def rows_at_once(density: object, most: int) -> int:
    """How many draws to give a density in one call so that its tensors stay within 256 MiB, at least 1.

    Args:
        density: what has a ``bytes_per_draw``, such as a ``JointDensity``; where it is missing or not known yet, memory
            sets no bound.
        most: the bound where memory sets none.
    """
    each = getattr(density, "bytes_per_draw", None)
    return most if not each else max(1, min(most, int(BYTES // each)))
