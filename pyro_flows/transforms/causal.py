"""Causal autoregressive transforms of series."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

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
    r"""Moves each number of a series by a univariate map whose parameters depend on the numbers before it.

    Series ``(C, T)`` go step by step, and channel by channel within a step.  With ``fast="density"`` (MAF)
    :math:`x_{c,t} = u(y_{c,t};\, p_c(y_{\cdot,<t}, y_{<c,t}, z))` at a context :math:`z`; with ``fast="sampling"``
    (IAF) :math:`y` and :math:`x` change places.  :math:`\log|\det| = \pm \sum_{c,t} \log u'`.  Residual dilated
    convolutions over the past, padded with zeros and masked at the step itself, give the parameters :math:`p`; they see
    ``reach`` steps back.  All times share their weights: no parameter depends on ``T``.

    The fast direction takes one pass.  The other computes each hidden value once over ``T`` steps of ``C`` channels:
    the arithmetic of one pass in ``C * T`` pieces per convolution.  Its gradient costs about twice as much again, and
    memory in proportion to ``T`` and the reach.

    Args:
        event_shape: ``(channels, time)``.
        univariate: the family of scalar maps, affine by default.
        fast: the direction that takes one pass, ``"density"`` or ``"sampling"``.
        context_dim: size of the context, 0 for none; the context adds to every convolution's bias.
        hidden_channels: channels of the convolutions, at least ``C`` and divided among the channels.
        num_convolutions: number of convolutions in sequence.
        kernel_size: steps that a convolution sees, at least 2, the present one included.
        dilations: distances of these steps, one per convolution, repeated if too few; by default 1, 2, 4, ...
        activation: a name or an elementwise function, or one per convolution.

    Raises:
        ValueError: for an event that is no series, too few hidden channels, or options out of range.

    Example:
        >>> layer = pf.transforms.CausalAutoregressive((2, 10))
        >>> y, ladj = layer.forward_and_ladj(torch.randn(5, 2, 10))
        >>> y.shape, ladj.shape
        (torch.Size([5, 2, 10]), torch.Size([5]))

    References:
        Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017), arXiv:1705.07057.
        WaveNet: A Generative Model for Raw Audio (van den Oord et al., 2016), arXiv:1609.03499.
    """

    shared_over_time = True
    # The Jacobian is lower triangular in the coordinates' positions.
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

    @full_precision  # in half precision, the directions would not be inverse
    def _move(self, value: Tensor, context: Tensor | None, one_pass: bool) -> tuple[Tensor, Tensor]:
        """Returns the moved value and the logarithms of all slopes."""
        batch, kind = value.shape[:-2], self.bias.dtype
        rows = value.to(kind).reshape(batch.numel(), *self.event_shape)
        if context is not None:
            context = context.to(kind).expand(*batch, -1).reshape(len(rows), self.context_dim)
        if one_pass:
            moved, slopes = self._apply_to(rows, self._outputs(rows, context))
        elif plain_eager() and not rows.is_meta and not self._wants_gradient(rows, context):
            moved = self._sweep(rows.detach(), context)
            slopes = -self._apply_to(moved, self._outputs(moved, context))[1]
        else:
            moved, slopes = _Steps(self, len(rows), context).unknown(rows)
        return moved.view(*batch, *self.event_shape), slopes.view(*batch, *self.event_shape)

    def _outputs(self, rows: Tensor, context: Tensor | None) -> Tensor:
        """The network's outputs, shape ``(rows, C, num_params, T)``."""
        return self.net(rows.unsqueeze(-2), context).squeeze(-2).unflatten(1, self.bias.shape)

    def _wants_gradient(self, *tensors: Tensor | None) -> bool:
        given = (*tensors, *self.parameters())
        return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in given)

    @torch.no_grad()
    def _sweep(self, rows: Tensor, context: Tensor | None) -> Tensor:
        """The slow direction without a graph."""
        bias = self.bias.unsqueeze(1).expand(-1, self.event_shape[1], -1).flatten(0, 1)
        solve, out = _Solve(self.univariate), torch.empty_like(rows)
        chunk = rows_at_once(self.net, rows.device)
        for start in range(0, len(rows), chunk):
            some = slice(start, start + chunk)
            own, given = (None if context is None else context[some]), rows[some]
            out[some] = RasterSweep(self.net, solve, bias, len(given), own).run(given.unsqueeze(-2)).squeeze(-2)
        return out

    def _apply_to(self, value: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Moves ``value``, ``(rows, C, n)``, by the outputs ``out``, ``(rows, C, num_params, n)``."""
        return self.univariate.forward(value, out.transpose(-1, -2) + self.bias.unsqueeze(-2))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, slopes = self._move(x, context, self.fast == "sampling")
        return y, slopes.sum((-1, -2))

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, slopes = self.inverse_and_log_slopes(y, context)
        return x, slopes.sum((-1, -2))

    def inverse_and_log_slopes(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the base-side value and :meth:`log_slopes`, unchecked."""
        return self._move(y, context, self.fast == "density")

    def log_slopes(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Returns :math:`\log \partial x_{c,t} / \partial y_{c,t}`, whose sum is the log-determinant.

        Args:
            y: data-side value, shape ``(*batch, *event_shape)``.
            context: shape ``(*context_batch, context_dim)``, broadcast against the batch.
        """
        return self.inverse_and_log_slopes(admit(self, y, context, data_side=True), context)[1]

    def stepper(self, rows: int, context: Tensor | None = None) -> Stepper:
        """Computes a series step by step; see :mod:`pyro_flows.core.steps`."""
        return _Steps(self, rows, context)

    def extra_repr(self) -> str:
        net = f"hidden_channels={self.net.hidden}, kernel_size={self.kernel_size}, dilations={self.dilations}"
        return f"{super().extra_repr()}, {self.univariate}, {net}"


class _Solve:
    """Lets a sweep draw values by inverting the scalar map at its noise."""

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

    def unknown(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The slow direction, with the logarithm of each slope."""
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
        moved, slopes = self.layer._apply_to(value, self.net.known(value)) if one_pass else self.unknown(value)
        return moved, slopes.sum(-2)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._step(y, self.layer.fast == "density")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._step(x, self.layer.fast == "sampling")

    def repeated(self, times: int) -> Stepper:
        made = copy.copy(self)
        made.net = self.net.repeated(times)
        return made
