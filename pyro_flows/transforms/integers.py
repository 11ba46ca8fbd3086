"""Layers of integer discrete flows: couplings of whole numbers, and splits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Size, Tensor

from pyro_flows.core.chain import total_cost
from pyro_flows.core.checks import boolean_mask, event_size, integer
from pyro_flows.core.transform import WHOLE_BOUND, FlowTransform
from pyro_flows.nets.convolutional import image_shape
from pyro_flows.nets.fixed_point import FixedPointNet, rounded

__all__ = ["IntegerCoupling", "IntegerSplit", "levels_of"]


class IntegerCoupling(FlowTransform):
    r"""Shifts some channels of whole numbers by rounded functions of the others.

    By channels, :math:`y_k = x_k` for the kept and :math:`y_m = x_m + \lfloor s\, t(x_k, c) \rceil` for the moved ones,
    with the inverse :math:`x_m = y_m - \lfloor s\, t(y_k, c) \rceil`, a power of two :math:`s`, and no
    log-determinant.  The network :math:`t`, a :class:`~pyro_flows.nets.FixedPointNet`, has the same outputs in every
    batch and on every machine, so the inverse is exact.  Each direction costs one pass in float64.

    Values are whole numbers from :math:`-2^{52}` to :math:`2^{52} - 1`, in any dtype, and the arithmetic is modulo
    :math:`2^{53}`.  Results have the dtype of floating values, and are float64 for integers.

    The gradient takes rounding for the identity (straight through), so it is biased.

    Args:
        event_shape: an ``input_dim``, ``(C, T)`` or ``(C, H, W)``; the numbers of a vector are its channels.
        mask: boolean, shape ``(C,)``, true for kept channels; saved in the ``state_dict``.
        levels: the number of values that the data mostly have, from 0: the scale of the network.
        context_dim: size of the context, 0 for none.
        hidden_dims, kernel_size: as in :class:`~pyro_flows.nets.FixedPointNet`.

    Raises:
        ValueError: for a mask of another shape, or one that keeps all or, of several channels, none; for values that
            are not whole or too large.

    Example:
        >>> layer = pf.transforms.IntegerCoupling(4, [True, True, False, False], levels=10)
        >>> x = torch.randint(10, (5, 4))
        >>> torch.equal(layer.inv(layer(x)), x.double())
        True

    References:
        Integer Discrete Flows and Lossless Compression (Hoogeboom et al., 2019), arXiv:1905.07376.
    """

    discrete = True
    order: Tensor  # kept channels first

    def __init__(
        self,
        event_shape: int | Iterable[int],
        mask: Tensor | Sequence[bool],
        *,
        levels: int = 256,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64, 64),
        kernel_size: int = 3,
    ) -> None:
        event = event_size(event_shape)
        super().__init__(event if len(event) == 1 else image_shape("IntegerCoupling", event), context_dim)
        self.levels = integer("IntegerCoupling", "levels", levels, 2)
        kept = boolean_mask("IntegerCoupling", event[:1], mask)
        self.num_kept = int(kept.sum())
        self.register_buffer("order", torch.argsort(~kept, stable=True))
        self.net = FixedPointNet(
            self.num_kept,
            len(kept) - self.num_kept,
            space_dims=len(event) - 1,
            levels=levels,
            hidden_dims=hidden_dims,
            kernel_size=kernel_size,
            context_dim=context_dim,
        )

    def _move(self, value: Tensor, context: Tensor | None, sign: int) -> tuple[Tensor, Tensor]:
        dims = len(self.event_shape)
        kept, moved = (value.index_select(-dims, at) for at in self.order.tensor_split((self.num_kept,)))
        shift = rounded(self.net(kept, context).squeeze(-1) * 2.0**self.net.exponent)
        joined = torch.cat((kept, _wrapped(moved + sign * shift)), -dims)
        out = joined.index_select(-dims, torch.argsort(self.order))
        return out, value.new_zeros(()).expand(value.shape[: value.dim() - dims])

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._move(x, context, 1)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._move(y, context, -1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, keeps {self.num_kept} of {self.event_shape[0]} channels"


def _wrapped(value: Tensor) -> Tensor:
    """Whole numbers modulo ``2 * WHOLE_BOUND``."""
    turns = torch.floor((value.detach() + WHOLE_BOUND) / (2 * WHOLE_BOUND))
    return value - turns * (2 * WHOLE_BOUND)


def levels_of(flow: FlowTransform) -> int:
    """The number of levels from 0 for which the couplings of an integer flow are scaled."""
    return max(part.levels for part in flow.modules() if isinstance(part, IntegerCoupling))


class IntegerSplit(FlowTransform):
    """Factors out half of the channels: the first half goes through ``inner``, the others are left to the base.

    There is no log-determinant.  Each direction costs that of ``inner``.  In
    :class:`~pyro_flows.distributions.IntegerLogistics`, the half that leaves has a distribution given the other.

    Args:
        inner: the integer flow of the first half, ``(C / 2, H, W)`` on both sides.
        event_shape: ``(C, H, W)`` or ``(C, T)``, with an even number of channels.

    Raises:
        ValueError: for an odd number of channels, or an inner flow of other events or of real numbers.

    Example:
        >>> mask = [True, False]
        >>> inner = pf.transforms.IntegerCoupling((2, 4, 4), mask)
        >>> layer = pf.transforms.IntegerSplit(inner, (4, 4, 4))
        >>> layer(torch.randint(256, (5, 4, 4, 4))).shape
        torch.Size([5, 4, 4, 4])

    References:
        Integer Discrete Flows and Lossless Compression (Hoogeboom et al., 2019), section 3.3, arXiv:1905.07376.
    """

    discrete = True

    def __init__(self, inner: FlowTransform, event_shape: Iterable[int]) -> None:
        event = image_shape("IntegerSplit", event_shape)
        half = Size((event[0] // 2, *event[1:]))
        if event[0] % 2 or (inner.event_shape, inner.data_shape) != (half, half) or not inner.discrete:
            raise ValueError(
                f"IntegerSplit: expected an even number of channels and an integer flow of half of them on both sides, "
                f"got event shape {tuple(event)} and a {type(inner).__name__} of {tuple(inner.event_shape)}; squeeze "
                "before, and undo a squeeze within on its base side"
            )
        super().__init__(event, inner.context_dim)
        self.inner = inner
        self.sampling_cost, self.density_cost = total_cost([inner.sampling_cost]), total_cost([inner.density_cost])

    def _move(self, value: Tensor, context: Tensor | None, method: str) -> tuple[Tensor, Tensor]:
        first, second = value.chunk(2, -len(self.event_shape))
        first, ladj = getattr(self.inner, method)(first, context)
        return torch.cat((first, second.expand_as(first)), -len(self.event_shape)), ladj

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._move(x, context, "_forward_and_ladj")

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._move(y, context, "_inverse_and_ladj")

    @property
    def batch_shape(self) -> Size:
        return self.inner.batch_shape
