"""Causal autoregressive transforms of series: MAF whose parameters come from dilated convolutions over the past."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Size, Tensor, nn

from pyro_flows.core.checks import admit, choice, integer, positive_integers
from pyro_flows.core.modes import full_precision, plain_eager
from pyro_flows.core.steps import Stepper
from pyro_flows.core.transform import FlowTransform
from pyro_flows.inverse.raster import RasterSweep, rows_at_once
from pyro_flows.nets.activations import Activation, activation_functions
from pyro_flows.nets.masked_convolutional import Stacks, StackSteps
from pyro_flows.univariate.base import Affine, Univariate

__all__ = ["CausalAutoregressive"]


class CausalAutoregressive(FlowTransform):
    r"""Each number of a series moved by a univariate map whose parameters depend on what came before it.

    Series ``(C, T)`` go step by step, and at a step channel by channel.  With ``fast="density"`` (MAF) :math:`x_{c,t} =
    u(y_{c,t};\, p_c(y_{\cdot,<t}, y_{<c,t}, z))` at a context :math:`z`, with ``fast="sampling"`` (IAF) :math:`y` and
    :math:`x` change places.  :math:`\log|\det| = \pm \sum_{c,t} \log u'`.  The parameters :math:`p` come from
    convolutions over time with residual connections, dilated and masked at the step itself, which all times share: no
    parameter depends on ``T``.  What lies before the first step is zeros.  They see ``reach`` steps back.

    The fast direction takes one pass over the whole series.  The other one goes through ``T`` steps of ``C`` channels,
    in which each hidden value is computed once: the arithmetic of one pass, in ``C * T`` times as many pieces as there
    are convolutions.  Its gradient is that of these operations, backwards through the steps: about twice as much again,
    and memory that grows in proportion to ``T`` and to the reach.

    Args:
        event_shape: ``(channels, time)``.
        univariate: the family of scalar maps, affine by default.
        fast: the direction that takes one pass, ``"density"`` or ``"sampling"``.
        context_dim: size of the context, 0 for none; it goes into the bias of every convolution.
        hidden_channels: of the convolutions, at least ``C``: they are shared out among the channels.
        num_convolutions: how many, one after another.
        kernel_size: steps that a convolution sees, that at hand included; at least 2.
        dilations: distances of these, for one convolution after another, from the beginning again where there are
            more; by default 1, 2, 4, ...
        activation: of the network, a name or an elementwise function, or one for each convolution.

    Raises:
        ValueError: for an event that is no series, too few hidden channels, or options out of range.

    References:
        Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017), arXiv:1705.07057.
        WaveNet: A Generative Model for Raw Audio (van den Oord et al., 2016), arXiv:1609.03499.
    """

    shared_over_time = True
    # Of all coordinates, as of a Mint layer.
    order = "position"
    lower = True

    def __init__(
        self,
        event_shape: Iterable[int],
        univariate: Univariate | None = None,
        *,
        fast: str = "density",
        context_dim: int = 0,
        hidden_channels: int = 32,
        num_convolutions: int = 4,
        kernel_size: int = 3,
        dilations: int | Sequence[int] | None = None,
        activation: Activation = ("isru", "silu"),
    ) -> None:
        super().__init__(event_shape, context_dim)
        name = "CausalAutoregressive"
        if len(self.event_shape) != 2:
            raise ValueError(
                f"{name}: expected a series (C, T), got event shape {tuple(self.event_shape)}; a single channel has a "
                "dimension of its own too, e.g. (1, 100)"
            )
        choice(name, "fast", fast, ("density", "sampling"))
        channels, times = self.event_shape
        integer(name, "hidden_channels", hidden_channels, channels)
        integer(name, "num_convolutions", num_convolutions)
        integer(name, "kernel_size", kernel_size, 2)
        self.univariate = Affine() if univariate is None else univariate
        if self.univariate.periodic:
            raise ValueError(
                f"{name}: its network would tear a circle open at pi; angles are moved by couplings: see ncsf"
            )
        self.fast = fast
        apart = [2**k for k in range(num_convolutions)]
        if dilations is not None:
            apart = list(itertools.islice(itertools.cycle(positive_integers(name, "dilations", dilations)), len(apart)))
        self.dilations, self.kernel_size = tuple(apart), kernel_size
        self.net = Stacks(
            (channels, 1, times),
            1,
            self.univariate.num_params,
            hidden_channels,
            [kernel_size - 1] * num_convolutions,
            apart,
            context_dim,
            False,
            activation_functions(activation, num_convolutions),
        )
        self.bias = nn.Parameter(torch.zeros(channels, self.univariate.num_params))
        slow = f"1 sweep of {channels * times} steps"
        self.sampling_cost, self.density_cost = (slow, "1 pass") if fast == "density" else ("1 pass", slow)

    @property
    def reach(self) -> int | None:
        return (self.kernel_size - 1) * sum(self.dilations) if self.fast == "density" else None

    def _rows(self, value: Tensor, context: Tensor | None) -> tuple[Size, Tensor, Tensor | None]:
        batch = value.shape[:-2]
        rows = batch.numel()
        if context is not None:
            context = context.expand(*batch, -1).reshape(rows, self.context_dim)
        return batch, value.reshape(rows, *self.event_shape), context

    @full_precision  # half precision in one direction would be no inverse of the other
    def _move(self, value: Tensor, context: Tensor | None, one_pass: bool) -> tuple[Tensor, Tensor]:
        """What comes out, and the logarithms of all slopes."""
        value, context = value.to(self.bias.dtype), None if context is None else context.to(self.bias.dtype)
        batch, rows, context = self._rows(value, context)
        if one_pass:
            moved, slopes = self._apply_to(rows, self._outputs(rows, context))
        elif plain_eager() and not rows.is_meta and not self._wants_gradient(rows, context):
            moved = self._sweep(rows.detach(), context)
            slopes = -self._apply_to(moved, self._outputs(moved, context))[1]
        else:
            moved, slopes = _Steps(self, len(rows), context).unknown(rows)
        return moved.view(*batch, *self.event_shape), slopes.view(*batch, *self.event_shape)

    def _outputs(self, rows: Tensor, context: Tensor | None) -> Tensor:
        """Of the network, shape ``(rows, C, num_params, T)``."""
        return self.net(rows.unsqueeze(-2), context).squeeze(-2).unflatten(1, self.bias.shape)

    def _wants_gradient(self, rows: Tensor, context: Tensor | None) -> bool:
        if not torch.is_grad_enabled():
            return False
        tensors = (rows, *(() if context is None else (context,)), *self.parameters())
        return any(tensor.requires_grad for tensor in tensors)

    @torch.no_grad()
    def _sweep(self, rows: Tensor, context: Tensor | None) -> Tensor:
        """The direction that goes step by step, without a graph."""
        bias = self.bias.unsqueeze(1).expand(-1, self.event_shape[1], -1).flatten(0, 1)
        solve, out = _Solve(self.univariate), torch.empty_like(rows)
        chunk = rows_at_once(self.net, rows.device)
        for start in range(0, len(rows), chunk):
            some = slice(start, start + chunk)
            own, given = (None if context is None else context[some]), rows[some]
            out[some] = RasterSweep(self.net, solve, bias, len(given), own).run(given.unsqueeze(-2)).squeeze(-2)
        return out

    def _apply_to(self, value: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """``value``: shape ``(rows, C, n)``; ``out``: outputs of the network, ``(rows, C, num_params, n)``."""
        return self.univariate.forward(value, out.transpose(-1, -2) + self.bias.unsqueeze(-2))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, slopes = self._move(x, context, self.fast == "sampling")
        return y, slopes.sum((-1, -2))

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, slopes = self.inverse_and_log_slopes(y, context)
        return x, slopes.sum((-1, -2))

    def inverse_and_log_slopes(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to base, and what :meth:`log_slopes` gives, for a value and a context that fit."""
        return self._move(y, context, self.fast == "density")

    def log_slopes(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        r""":math:`\log \partial x_{c,t} / \partial y_{c,t}`, shape of ``y``; its sum is the log-determinant.

        Args:
            y: data-side value, shape ``(*batch, *event_shape)``.
            context: shape ``(*context_batch, context_dim)``, broadcast against the batch.
        """
        return self.inverse_and_log_slopes(admit(self, y, context, data_side=True), context)[1]

    def stepper(self, rows: int, context: Tensor | None = None) -> Stepper:
        """One step of a series after another; see :mod:`pyro_flows.core.steps`."""
        return _Steps(self, rows, context)

    def extra_repr(self) -> str:
        net = f"hidden_channels={self.net.hidden}, kernel_size={self.kernel_size}, dilations={self.dilations}"
        return f"{super().extra_repr()}, {self.univariate}, {net}"


class _Solve:
    """The scalar map as what a sweep draws values by: the noise is what the map gives, and its argument is found."""

    num_features = 1

    def __init__(self, univariate: Univariate) -> None:
        self.univariate = univariate

    def draws(
        self, index: Tensor, noise: Tensor, params: Tensor, x: Tensor, coded: Tensor
    ) -> list[Callable[[], object]]:
        calls = self.univariate.solver(True, noise, params.transpose(0, 1), x, torch.empty_like(x))
        return [*calls, partial(coded.copy_, x)]


class _Steps(Stepper):
    def __init__(self, layer: CausalAutoregressive, rows: int, context: Tensor | None) -> None:
        self.layer, self.net = layer, StackSteps(layer.net, rows, context)

    def known(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The direction of one pass, with the logarithm of each slope."""
        return self.layer._apply_to(value, self.net.known(value))

    def unknown(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The direction that goes step by step, likewise."""
        univariate, bias = self.layer.univariate, self.layer.bias
        moved, slopes = [], []
        for step in value.unbind(-1):

            def find(c: int, out: Tensor, step: Tensor = step) -> Tensor:
                found, slope = univariate.inverse(step[:, c], out + bias[c])
                slopes.append(slope)
                return found.unsqueeze(-1)

            moved.append(self.net.next(find))
        shape = value.shape[0], value.shape[2], value.shape[1]
        return torch.stack(moved, -1), torch.stack(slopes, -1).view(shape).transpose(-1, -2)

    def _step(self, value: Tensor, one_pass: bool) -> tuple[Tensor, Tensor]:
        moved, slopes = self.known(value) if one_pass else self.unknown(value)
        return moved, slopes.sum(-2)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._step(y, self.layer.fast == "density")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._step(x, self.layer.fast == "sampling")

    def repeated(self, times: int) -> Stepper:
        made = copy.copy(self)
        made.net = self.net.repeated(times)
        return made
