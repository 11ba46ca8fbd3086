"""Squeezes, which trade places for channels, and splits, which factor out half of the channels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_flows.core.chain import total_cost
from pyro_flows.core.transform import FlowTransform
from pyro_flows.nets.activations import Activation
from pyro_flows.nets.convolutional import ConvNet, image_shape
from pyro_flows.univariate.base import Affine

__all__ = ["Split", "Squeeze"]


class Squeeze(FlowTransform):
    r"""Trades places for channels: data ``(C, H, W)`` is base ``(4 C, H / 2, W / 2)``, ``(C, T)`` is ``(2 C, T / 2)``.

    Channel :math:`c` of place :math:`(d_y, d_x)` in each square of 2 x 2 becomes channel :math:`(2 d_y + d_x) C + c`.
    :math:`\log|\det| = 0`; each direction is one copy.

    Args:
        event_shape: ``(C, H, W)`` or ``(C, T)`` of the *data* side, which becomes ``data_shape``; the transform's
            ``event_shape`` is that of the squeezed base side.

    Raises:
        ValueError: if the event is no image or series, or a side is odd.

    Example:
        >>> layer = pf.transforms.Squeeze((1, 4, 4))
        >>> layer.inv(torch.randn(5, 1, 4, 4)).shape
        torch.Size([5, 4, 2, 2])

    References:
        Density estimation using Real NVP (Dinh et al., 2016), section 3.6, arXiv:1605.08803.
    """

    sampling_cost = density_cost = "1 gather"
    discrete = None

    def __init__(self, event_shape: Iterable[int]) -> None:
        image = image_shape("Squeeze", event_shape)
        channels, *sides = image
        if any(n % 2 for n in sides):
            raise ValueError(
                f"Squeeze: expected sides of even size, got event shape {tuple(image)}; pad the data to even sizes, "
                "or crop it"
            )
        super().__init__((channels << len(sides), *(n // 2 for n in sides)))
        self._image = image

    @property
    def data_shape(self) -> Size:
        """Shape of the image."""
        return self._image

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        sides = self.event_shape[1:]
        dims = len(sides)
        # (*batch, 2, .., 2, C, h, ..) to (*batch, C, h, 2, ..)
        parts = torch.unflatten(x, -1 - dims, (*(2 for _ in sides), self._image[0]))
        order = [dims, *(k for side in range(dims) for k in (dims + 1 + side, side))]
        y = _permuted(parts, order).reshape(*x.shape[: -1 - dims], *self._image)
        return y, x.new_zeros(x.shape[: -1 - dims])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        sides = self.event_shape[1:]
        dims = len(sides)
        batch = y.shape[: -1 - dims]
        # (*batch, C, h, 2, ..) to (*batch, 2, .., 2, C, h, ..)
        parts = y.reshape(*batch, self._image[0], *(n for side in sides for n in (side, 2)))
        order = [*range(2, 2 * dims + 1, 2), 0, *range(1, 2 * dims, 2)]
        return _permuted(parts, order).reshape(*batch, *self.event_shape), y.new_zeros(batch)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, data: {tuple(self._image)}"


def _permuted(value: Tensor, order: list[int]) -> Tensor:
    """Permutes the last dimensions."""
    first = value.dim() - len(order)
    return value.permute(*range(first), *(first + k for k in order))


def _is_real(constraint: constraints.Constraint) -> bool:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return isinstance(constraint, type(constraints.real))


class Split(FlowTransform):
    r"""Factors out half of the channels: the first half goes on, the other is Gaussian given the first.

    By channels, :math:`y_a = f(x_a)` by ``inner`` and :math:`y_b = \mu(y_a, c) + e^{s(y_a, c)} x_b`, with a
    convolutional network for :math:`\mu` and a bounded, smooth log-scale :math:`s`, both zero at first;
    :math:`\log|\det|` is that of ``inner`` plus :math:`\sum s`.  The base keeps all numbers of an image, in the same
    shape.  Each direction costs one pass and that of ``inner``.

    ``inner`` may hold another split, and may squeeze if it undoes that on its base side: ``Chain([Squeeze(half).inv,
    ..., Squeeze(half)])``, from base to data.

    Args:
        inner: the flow of the first half, ``(C / 2, H, W)`` on both sides; ``None`` for the identity.
        event_shape: ``(C, H, W)`` or ``(C, T)``, with an even number of channels.
        context_dim: size of the context, 0 for none; ``inner`` takes the same or none.
        max_log_scale: bound of the smooth clip on log-scales.
        hidden_channels, num_blocks, kernel_size, activation: as in :class:`~pyro_flows.nets.ConvNet`.

    Raises:
        ValueError: for an odd number of channels, or an inner flow of other events or another context.

    Example:
        >>> half = pf.ConvCoupling((2, 4, 4))
        >>> layer = pf.transforms.Split(half, (4, 4, 4))
        >>> layer(torch.randn(5, 4, 4, 4)).shape
        torch.Size([5, 4, 4, 4])

    References:
        Density estimation using Real NVP (Dinh et al., 2016), section 3.6, arXiv:1605.08803.
        Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018), arXiv:1807.03039.
    """

    def __init__(
        self,
        inner: FlowTransform | None,
        event_shape: Iterable[int],
        *,
        context_dim: int = 0,
        max_log_scale: float = 3.0,
        hidden_channels: int = 32,
        num_blocks: int = 0,
        kernel_size: int | Sequence[int] = 3,
        activation: Activation = "relu",
    ) -> None:
        event = image_shape("Split", event_shape)
        if event[0] % 2:
            raise ValueError(
                f"Split: expected an even number of channels, got event shape {tuple(event)}; put a Squeeze before"
            )
        super().__init__(event, context_dim)
        half = Size((event[0] // 2, *event[1:]))
        if inner is not None:
            self._check(inner, half)
            self.sampling_cost = total_cost(("1 pass", inner.sampling_cost))
            self.density_cost = total_cost(("1 pass", inner.density_cost))
        self.inner = inner
        self.univariate = Affine(max_log_scale)
        self.net = ConvNet(
            half[0],
            half[0],
            num_params=self.univariate.num_params,
            space_dims=len(event) - 1,
            hidden_channels=hidden_channels,
            num_blocks=num_blocks,
            kernel_size=kernel_size,
            context_dim=context_dim,
            activation=activation,
        )

    def _check(self, inner: FlowTransform, half: Size) -> None:
        if not isinstance(inner, FlowTransform):
            raise TypeError(f"Split: expected inner to be a flow transform or None, got {type(inner).__name__}")
        if inner.event_shape != half or inner.data_shape != half:
            raise ValueError(
                f"Split: expected an inner flow of events of shape {tuple(half)} on both sides, got "
                f"{tuple(inner.event_shape)} on the base side and {tuple(inner.data_shape)} on the data side; one that "
                "squeezes undoes it on the base side by Squeeze(...).inv"
            )
        if inner.context_dim not in (0, self.context_dim):
            raise ValueError(
                f"Split: the inner flow takes a context of size {inner.context_dim}, got "
                f"context_dim={self.context_dim}; give both the same"
            )
        if inner.periodic is not None or not (_is_real(inner.domain) and _is_real(inner.codomain)):
            raise ValueError(
                "Split: expected an inner flow of unconstrained numbers, got one of angles or of constrained ones; "
                "put such parts outside"
            )

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        dims = len(self.event_shape)
        first, second = x.chunk(2, -dims)
        inner_ladj: Tensor | float = 0.0
        if self.inner is not None:
            first, inner_ladj = self.inner._forward_and_ladj(first, context if self.inner.context_dim else None)
        second, slope = self.univariate.forward(second.expand_as(first), self.net(first, context))
        return torch.cat((first, second), -dims), slope.flatten(-dims).sum(-1) + inner_ladj

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        dims = len(self.event_shape)
        first, second = y.chunk(2, -dims)
        second, slope = self.univariate.inverse(second, self.net(first, context))
        ladj = slope.flatten(-dims).sum(-1)
        if self.inner is not None:
            first, inner_ladj = self.inner._inverse_and_ladj(first, context if self.inner.context_dim else None)
            ladj = ladj + inner_ladj
        return torch.cat((first, second.expand_as(first)), -dims), ladj

    @property
    def batch_shape(self) -> Size:
        return Size() if self.inner is None else self.inner.batch_shape
