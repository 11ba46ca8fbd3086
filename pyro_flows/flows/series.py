"""The builder of causal flows of series."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pyro_flows.core.chain import Chain
from pyro_flows.core.checks import event_size, integer
from pyro_flows.nets.activations import Activation
from pyro_flows.transforms import ActNorm, CausalAutoregressive
from pyro_flows.univariate.base import Affine, Univariate

__all__ = ["causal_maf"]


def causal_maf(
    event_shape: Iterable[int],
    *,
    context_dim: int = 0,
    num_layers: int = 2,
    hidden_channels: int = 32,
    num_convolutions: int = 4,
    kernel_size: int = 3,
    dilations: int | Sequence[int] | None = None,
    act_norm: bool = False,
    activation: Activation = ("isru", "silu"),
    max_log_scale: float = 2.0,
    univariate: Univariate | None = None,
) -> Chain:
    r"""Causal masked autoregressive flow of series: :math:`x_{c,t} = y_{c,t} e^{s} + m` in each layer, data to base.

    By dilated convolutions, shift and log-scale depend on earlier steps and, within a step, on earlier channels;
    :math:`\log|\det|` is the sum of all :math:`s`.  All layers (:class:`~pyro_flows.transforms.CausalAutoregressive`)
    follow time, so the flow is causal and looks ``reach`` steps back.  Density costs one pass per layer; sampling takes
    ``T`` steps with the arithmetic of a pass.  No parameter depends on ``T``, so
    :class:`~pyro_flows.infer.Stream` continues without end.  A fresh flow is the identity.

    Args:
        event_shape: ``(C, T)``.
        context_dim: size of the context, 0 for none; every layer sees it.
        num_layers: number of autoregressive layers (MAF: 5 and 10, with alternating orders).
        hidden_channels: channels of the convolutions, at least ``C``.
        num_convolutions: number of convolutions per layer.
        kernel_size: steps that a convolution sees, the present one included (WaveNet: 2).
        dilations: dilations of each layer's convolutions; by default 1, 2, 4, ... (WaveNet: up to 512, repeated).
        act_norm: whether each layer has an :class:`~pyro_flows.transforms.ActNorm` on its data side, set by the first
            training batch.
        activation: activation of the networks (WaveNet: gated tanh); a bounded first one contains outlying inputs.
        max_log_scale: bound of the smooth clip on log-scales.
        univariate: scalar maps in place of affine ones, such as ``Spline()``.

    Raises:
        ValueError: for an event that is no series, or options out of range.

    Example:
        >>> flow = pf.Flow(pf.causal_maf((1, 20)))
        >>> flow.sample((2,)).shape
        torch.Size([2, 1, 20])
        >>> flow.chain.reach  # steps back that a step depends on
        60

    References:
        Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017), arXiv:1705.07057.
        WaveNet: A Generative Model for Raw Audio (van den Oord et al., 2016), arXiv:1609.03499.
    """
    integer("causal_maf", "num_layers", num_layers)
    event, parts = event_size(event_shape), []
    for _ in range(num_layers):
        layer = CausalAutoregressive(
            event,
            Affine(max_log_scale) if univariate is None else univariate,
            context_dim=context_dim,
            hidden_channels=hidden_channels,
            num_convolutions=num_convolutions,
            kernel_size=kernel_size,
            dilations=dilations,
            activation=activation,
        )
        parts += [layer, *([ActNorm(event)] if act_norm else [])]
    return Chain(parts)
