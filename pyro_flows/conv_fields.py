"""Vector fields of images and series, by convolutions gated by time and context."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flows.convolutions import image_shape
from pyro_flows.fields import Field, Modulation, smooth, widths
from pyro_flows.recipes import remembered

__all__ = ["ConvField"]

_CONVOLUTIONS = {1: (nn.Conv1d, F.conv1d), 2: (nn.Conv2d, F.conv2d)}


@remembered
class ConvField(Field):
    r"""Convolutions :math:`(W * h + b) \odot \sigma(g(t, c)) + u(t, c)`, gates and shifts by channel (FFJORD).

    Maps keep the size of the image, with zeros beyond the edges.  Products with the Jacobian are convolutions of the
    probes; the exact divergence takes one for each number of the event, so it is for small events.

    Args:
        event_shape: ``(C, H, W)`` or ``(C, T)``.
        hidden_dims: channels of the hidden layers, any number.
        kernel_size: of all convolutions, odd.
        context_dim: size of the context, 0 for none.
        time_dependent: whether the field depends on ``t``.
        activation: ``"tanh"``, ``"softplus"``, ``"silu"`` or a smooth elementwise function.

    References:
        FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models (Grathwohl et al., 2019),
        arXiv:1810.01367.
    """

    rowwise_times = True

    def __init__(
        self,
        event_shape: Iterable[int],
        *,
        hidden_dims: Sequence[int] = (32, 32),
        kernel_size: int = 3,
        context_dim: int = 0,
        time_dependent: bool = True,
        activation: str | Callable[[Tensor], Tensor] = "softplus",
    ) -> None:
        super().__init__(image_shape("conv field", event_shape), context_dim, time_dependent)
        if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"expected kernel_size to be an odd integer >= 1, got {kernel_size!r}")
        channels, self.space_dims = self.event_shape[0], len(self.event_shape) - 1
        make = _CONVOLUTIONS[self.space_dims][0]
        sizes = (channels, *widths("hidden_dims", hidden_dims), channels)
        self.padding = kernel_size // 2
        self.activation = smooth(activation)
        self.layers = nn.ModuleList(make(i, o, kernel_size, padding=self.padding) for i, o in itertools.pairwise(sizes))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)
        outputs = sizes[1:]
        self.shifts = self.gates = None
        if context_dim or time_dependent:
            self.shifts = Modulation(outputs, context_dim, time_dependent, zero_last=True)
            self.gates = Modulation(outputs, context_dim, time_dependent, bias=True)

    def _blocks(self, made: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Per layer ``(rows or 1, channels, 1, ..)``."""
        made = made.unsqueeze(0) if made.dim() == 1 else made
        return [block.reshape(*block.shape, *(1,) * self.space_dims) for block in made.split(sizes, -1)]

    def products(self, t: Tensor, x: Tensor, probes: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(t, x, context, probes)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self._run(t, x, context, None)[0]

    def _run(
        self, t: Tensor, x: Tensor, context: Tensor | None, tangents: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        convolve = _CONVOLUTIONS[self.space_dims][1]
        gates = shifts = [None] * len(self.layers)
        if self.shifts is not None:
            gates = self._blocks(torch.sigmoid(self.gates(t, context)), self.gates.sizes)
            shifts = self._blocks(self.shifts(t, context), self.shifts.sizes)
        h = x
        for k, layer in enumerate(self.layers):
            pre = layer(h)
            if gates[k] is not None:
                pre = torch.addcmul(shifts[k], pre, gates[k])
            if tangents is not None:
                moved = convolve(tangents.flatten(0, 1), layer.weight, padding=self.padding)
                tangents = moved.unflatten(0, tangents.shape[:2])
                tangents = tangents if gates[k] is None else tangents * gates[k]
            if k == len(self.layers) - 1:
                return pre, tangents
            if tangents is None:
                h = self.activation(pre)
            else:
                h, slope = self.activation.with_slope(pre)
                tangents = tangents * slope
        return h, tangents
