"""Couplings of images and series, with parameters from a convolutional network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Size, Tensor

from pyro_flows.core.checks import boolean_mask, choice
from pyro_flows.core.transform import FlowTransform
from pyro_flows.nets.activations import Activation
from pyro_flows.nets.convolutional import ConvNet, image_shape
from pyro_flows.univariate.base import Affine, Univariate

__all__ = ["ConvCoupling"]


def _kept(event_shape: Size, mask: str | Tensor) -> Tensor:
    """A boolean mask of the event's shape, true where :class:`ConvCoupling` keeps a number."""
    channels, *sides = event_shape
    size = event_shape.numel()
    if isinstance(mask, str):
        choice("ConvCoupling", "mask", mask, ("checkerboard", "channels"), "boolean")
        if size == 1:
            return torch.zeros(event_shape, dtype=torch.bool)
        if mask == "checkerboard":
            if size == channels:
                raise ValueError(
                    f"ConvCoupling: a checkerboard keeps every other place, but event shape {tuple(event_shape)} has "
                    "one place only; use mask='channels'"
                )
            parity = torch.zeros((), dtype=torch.long)
            for n in sides:
                parity = parity.unsqueeze(-1) + torch.arange(n)
            return (parity % 2 == 1).expand(event_shape).clone()
        if channels == 1:
            raise ValueError(
                f"ConvCoupling: mask='channels' keeps half of the channels, but event shape {tuple(event_shape)} "
                "has one only; use mask='checkerboard', or put a Squeeze before"
            )
        first = torch.arange(channels) < channels // 2
        return first.reshape(-1, *(1 for _ in sides)).expand(event_shape).clone()
    return boolean_mask("ConvCoupling", event_shape, mask)


class ConvCoupling(FlowTransform):
    r"""Moves some places or channels of an image by univariate maps whose parameters depend on the others.

    Kept numbers stay, :math:`y_k = x_k`; moved ones become :math:`y_m = u(x_m; p(x_k, c))`, with the inverse :math:`x_m
    = u^{-1}(y_m; p(y_k, c))` and :math:`\log|\det| = \sum_m \log u'`.  Each direction costs one pass of a convolutional
    network.

    The network sees whole kept channels alone, and otherwise the image with zeros in moved places, and the mask as
    another channel (one per channel, if their masks differ).

    Args:
        event_shape: ``(C, H, W)`` or ``(C, T)``.
        univariate: the family of scalar maps, ``Affine()`` by default; angles are refused.
        mask: ``"checkerboard"`` keeps the places whose coordinates have an odd sum; ``"channels"`` keeps the first half
            of the channels, rounded down; a boolean mask of shape ``event_shape`` is true where numbers are kept, and
            is not in the ``state_dict``.
        flip: whether to move what ``mask`` keeps and keep the rest.
        context_dim: size of the context, 0 for none.
        hidden_channels, num_blocks, kernel_size, activation: as in :class:`~pyro_flows.nets.ConvNet`.

    Raises:
        ValueError: if the event is no image or series, or the mask has another shape, or keeps all or nothing.

    Example:
        >>> layer = pf.ConvCoupling((3, 8, 8), mask="checkerboard")
        >>> layer(torch.randn(5, 3, 8, 8)).shape
        torch.Size([5, 3, 8, 8])

    References:
        Density estimation using Real NVP (Dinh et al., 2016), section 3.4, arXiv:1605.08803.
    """

    mask: Tensor
    kept_at: Tensor
    moved_at: Tensor

    def __init__(
        self,
        event_shape: Iterable[int],
        univariate: Univariate | None = None,
        *,
        mask: str | Tensor = "checkerboard",
        flip: bool = False,
        context_dim: int = 0,
        hidden_channels: int = 32,
        num_blocks: int = 2,
        kernel_size: int | Sequence[int] = 3,
        activation: Activation = "relu",
    ) -> None:
        super().__init__(image_shape("ConvCoupling", event_shape), context_dim)
        self.univariate = Affine() if univariate is None else univariate
        if self.univariate.periodic:
            raise ValueError(
                f"ConvCoupling: {self.univariate} moves angles, but the network takes numbers on a line; use "
                "Coupling(..., periodic=...)"
            )
        kept = _kept(self.event_shape, mask)
        if flip and kept.numel() > 1:
            kept = ~kept
        self.register_buffer("mask", kept, persistent=False)
        planes = kept.flatten(1)
        self._whole_channels = bool((planes == planes[:, :1]).all() and kept.any())
        # Channels, or all numbers in row-major order.
        units = planes[:, 0] if self._whole_channels else kept.flatten()
        self.register_buffer("kept_at", torch.nonzero(units).flatten(), persistent=False)
        self.register_buffer("moved_at", torch.nonzero(~units).flatten(), persistent=False)
        if self._whole_channels:
            seen, made = len(self.kept_at), len(self.moved_at)
        else:
            shared = bool((planes == planes[:1]).all())
            self._planes = 1 if shared else self.event_shape[0]
            seen, made = self.event_shape[0] + self._planes, self.event_shape[0]
        self.net = ConvNet(
            seen,
            made,
            num_params=self.univariate.num_params,
            space_dims=len(self.event_shape) - 1,
            hidden_channels=hidden_channels,
            num_blocks=num_blocks,
            kernel_size=kernel_size,
            context_dim=context_dim,
            activation=activation,
        )

    def _move(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        dims = len(self.event_shape)
        move = self.univariate.inverse if inverse else self.univariate.forward
        batch = value.shape[: value.dim() - dims]
        if self._whole_channels:
            params = self.net(value.index_select(-dims, self.kept_at), context)
            moved, slope = move(value.index_select(-dims, self.moved_at), params)
            out = value.index_copy(-dims, self.moved_at, moved.to(value.dtype))
            return out, slope.flatten(-dims).sum(-1)
        seen = torch.where(self.mask, value, value.new_zeros(()))
        planes = self.mask[: self._planes].to(value.dtype)
        params = self.net(torch.cat((seen, planes.expand(*batch, *planes.shape)), -dims), context)
        # Only moved places need parameters; to pick these is cheaper than a spline.
        params = params.movedim(-1, -1 - dims).flatten(-dims).index_select(-1, self.moved_at).transpose(-1, -2)
        flat = value.flatten(-dims)
        moved, slope = move(flat.index_select(-1, self.moved_at), params)
        out = flat.index_copy(-1, self.moved_at, moved.to(value.dtype))
        return torch.unflatten(out, -1, self.event_shape), slope.sum(-1)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._move(x, context, inverse=False)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._move(y, context, inverse=True)

    def extra_repr(self) -> str:
        kept = int(self.mask.sum()) if not self.mask.is_meta else "?"
        return f"{super().extra_repr()}, {self.univariate}, keeps {kept} of {self.event_shape.numel()}"
