"""A Mint layer for the solver of triangular systems, as a whole and step by step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flows.core.steps import Past, Stepper
from pyro_flows.inverse.newton import solve_triangular
from pyro_flows.inverse.newton_sweeps import SolverSettings, TriangularMap
from pyro_flows.transforms.mint.attention import Attention, AttentionSteps, AttentionWeights
from pyro_flows.transforms.mint.slopes import Convolutions, Weights, convolutions, convolved, value_and_slope

__all__ = ["MintMap", "MintSteps"]

_ROUNDING = 1e-5  # relative


class MintMap(TriangularMap):
    """A layer as the solver takes it; its parameters are arguments in the order of :meth:`split`."""

    def __init__(self, name: str, wave: Tensor, by: Convolutions, attention: Attention | None = None) -> None:
        self.name, self.wave, self.convolutions, self.attention = name, wave, by, attention

    def split(self, shared: Sequence[Tensor], rowwise: Sequence[Tensor]) -> tuple[Weights, AttentionWeights | None]:
        """Tensors of the convolutions and of the attention, whose shared ones come first and rowwise one last."""
        if self.attention is None:
            return Weights(*shared, *rowwise), None
        count = len(AttentionWeights._fields)
        weights = AttentionWeights(*shared[:count])
        if rowwise:
            *rowwise, shift = rowwise
            weights = weights._replace(query_bias=weights.query_bias + shift)
        return Weights(*shared[count:], *rowwise), weights

    def value_and_slope(self, x: Tensor, shared: Sequence[Tensor], rowwise: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        image = x.unsqueeze(-2) if x.dim() == 3 else x
        weights, attending = self.split(shared, rowwise)
        value, slope = value_and_slope(self.convolutions, image, weights)
        if attending is not None and self.attention is not None:
            value = value + self.attention(image, attending)
        return value.view(x.shape), slope.view(x.shape)

    def slope_bounds(self, shared: Sequence[Tensor], rowwise: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        w = self.split(shared, rowwise)[0]
        # Each path passes two activations.
        most = w.inner.abs().sum(-1) * w.outer.abs() * (self.convolutions.activation.steepest or 1.0) ** 2
        if w.gate is not None:
            most = most * torch.unflatten(w.gate, -1, most.shape)
        most = w.scale + most.sum(-1)[..., None, None]
        least = w.scale
        if self.wave.dim() == 2:  # a series is an image of one row
            least, most = least.squeeze(-2), most.squeeze(-2)
        # Rounding must keep slopes within bounds.
        return least * (1 - _ROUNDING), most * (1 + _ROUNDING)


class MintSteps(Stepper):
    """A causal layer step by step: the past is a bias of the hidden maps, so each step solves for ``C`` numbers.

    ``side`` is the number of neighbors to one side that a convolution sees, ``dilation`` their distance, and ``rows``
    the number of series side by side.
    """

    def __init__(
        self,
        whole: MintMap,
        settings: SolverSettings,
        side: int,
        dilation: int,
        rows: int,
        shared: Sequence[Tensor],
        rowwise: Sequence[Tensor],
    ) -> None:
        self.side, self.act, self.settings = side, whole.convolutions.activation, settings
        w, attending = whole.split(shared, rowwise)
        # Taps on the future are zero.
        self.w = w._replace(**{name: getattr(w, name)[..., : side + 1] for name in ("first", "second", "third")})
        channels, groups = w.outer.shape
        hidden = channels * groups
        self.past = [Past(rows, n, side, dilation, w.first) for n in (channels, hidden, hidden)]
        self.attention: AttentionSteps | None = None
        if attending is not None and whole.attention is not None:
            self.attention = AttentionSteps(whole.attention, attending, rows, channels)
        here = torch.ones(channels, channels, device="cpu").tril().bool()[:, :, None, None]
        wave = torch.arange(channels, device=w.first.device)[:, None]
        self.map = MintMap(f"{whole.name}, one step", wave, convolutions(self.act, here, groups))

    def _convolve(self, k: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        joined = self.past[k].join(x.squeeze(-2)).unsqueeze(-2)
        out = F.conv2d(joined, weight, dilation=(1, self.past[k].dilation))
        return out if bias is None else out + bias[..., None, None]

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        convolve = [partial(self._convolve, k) for k in range(3)]
        x, slopes = convolved(self.act, y.unsqueeze(-2), self.w, convolve)
        x = x.squeeze(-2)
        if self.attention is not None:
            x = x + self.attention.take(y)
        return x, slopes.squeeze(-2).log().sum(-2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, w = len(x), self.w
        weights = (w.first, w.second, w.third)
        biases = [w.first_bias.expand(rows, -1), w.second_bias.expand(rows, -1), w.third_bias.expand(rows, -1, 1, 1)]
        if self.side:
            for k, (past, weight) in enumerate(zip(self.past, weights, strict=True)):
                known = F.conv1d(past.seen(), weight[:, :, 0, : self.side])
                biases[k] = biases[k] + known.view(biases[k].shape)
        if self.attention is not None:  # independent of the step itself
            biases[2] = biases[2] + self.attention.ahead()[:, :, None, None]
        shared = [*(weight[..., self.side :] for weight in weights), w.inner, w.outer]
        rowwise = [*biases, w.scale.expand(rows, -1, 1, 1), *(() if w.gate is None else (w.gate,))]
        y, _ = solve_triangular(self.map, x, shared, rowwise, self.settings)
        return y, -self.inverse(y)[1]

    def repeated(self, times: int) -> Stepper:
        made = copy.copy(self)
        made.past = [past.repeated(times) for past in self.past]
        if self.attention is not None:
            made.attention = self.attention.repeated(times)
        if self.w.gate is not None:  # a context gave each row its own
            names = ("first_bias", "second_bias", "third_bias", "scale", "gate")
            own = {name: getattr(self.w, name) for name in names}
            made.w = self.w._replace(**{name: t.repeat(times, *[1] * (t.dim() - 1)) for name, t in own.items()})
        return made
