"""Transforms without interaction between dimensions: rescaling and permutation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pyro_flows.activations import Activation
from pyro_flows.core import FlowTransform
from pyro_flows.nets import MLP
from pyro_flows.univariate import soft_clip

__all__ = ["Permutation", "Rescaling"]


class Rescaling(FlowTransform):
    r"""Diagonal scaling, :math:`y = e^{-s} x` and :math:`x = e^{s} y`, with one :math:`s_i` per dimension.

    As in NICE the scale multiplies on the way from data to base, so large :math:`e^{s_i}` mark directions of small
    variation.  With a context, :math:`s(c) = s_0 + \kappa \tanh(g(c) / \kappa)`.  All is zero at first.  Each direction
    is elementwise.

    Args:
        event_shape: an ``input_dim`` or the shape of one event.
        context_dim: size of the context, 0 for none.
        hidden_dims, residual, activation: of :math:`g`, an :class:`~pyro_flows.nets.MLP`.
        max_log_scale: the bound :math:`\kappa` on what the context adds.

    References:
        NICE: Non-linear Independent Components Estimation (Dinh et al., 2014), section 3.3, arXiv:1410.8516.
    """

    sampling_cost = density_cost = "1 product"

    def __init__(
        self,
        event_shape: int | Iterable[int],
        *,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64,),
        residual: bool = False,
        activation: Activation = "silu",
        max_log_scale: float = 5.0,
    ) -> None:
        super().__init__(event_shape, context_dim)
        if not max_log_scale > 0:
            raise ValueError(f"Rescaling: expected max_log_scale > 0, got {max_log_scale}")
        self.max_log_scale = float(max_log_scale)
        self.log_scale = nn.Parameter(torch.zeros(self.event_shape))
        if context_dim:
            self.net = MLP(
                0,
                self.event_shape.numel(),
                hidden_dims=hidden_dims,
                context_dim=context_dim,
                residual=residual,
                activation=activation,
            )

    def _log_scale(self, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The log-scale and its sum, for the batch shape of the value."""
        dims = len(self.event_shape)
        batch = value.shape[: value.dim() - dims]
        log_scale = self.log_scale
        if context is not None:
            shift = self.net(context[..., :0], context).squeeze(-1).unflatten(-1, self.event_shape)
            log_scale = log_scale + soft_clip(shift, self.max_log_scale)
        return log_scale, log_scale.sum(tuple(range(-dims, 0))).expand(batch)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, total = self._log_scale(x, context)
        return x * torch.exp(-log_scale), -total

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, total = self._log_scale(y, context)
        return y * torch.exp(log_scale), total


class Permutation(FlowTransform):
    r"""Reorders the dimensions: :math:`y_i = x_{\pi(i)}`, with zero log-determinant.

    Flows here alternate their orders and masks by themselves; this is for whoever wants more mixing.

    Args:
        event_shape: an ``input_dim`` or the shape of one event, flattened in row-major order.
        permutation: ``"random"`` (drawn once), ``"reverse"``, or the indices :math:`\pi`.  It is saved in the
            ``state_dict`` if drawn.

    Raises:
        ValueError: if the indices are no permutation.

    References:
        Density estimation using Real NVP (Dinh et al., 2016), section 3.5, arXiv:1605.08803.
    """

    sampling_cost = density_cost = "1 gather"

    def __init__(self, event_shape: int | Iterable[int], permutation: str | Sequence[int] | Tensor = "random") -> None:
        super().__init__(event_shape)
        size = self.event_shape.numel()
        drawn = isinstance(permutation, str)
        if drawn:
            if permutation not in ("random", "reverse"):
                raise ValueError(f"expected permutation to be 'random', 'reverse' or indices, got {permutation!r}")
            indices = torch.randperm(size) if permutation == "random" else torch.arange(size).flip(0)
        else:
            indices = torch.as_tensor(permutation).cpu()
            if indices.is_floating_point() or not torch.equal(indices.flatten().sort().values, torch.arange(size)):
                raise ValueError(f"expected a permutation of 0..{size - 1}, got {indices.tolist()}")
        self.register_buffer("permutation", indices.flatten().long(), persistent=drawn and permutation == "random")
        self.register_buffer("undo", torch.argsort(self.permutation), persistent=False)

    def _gather(self, value: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        dims = len(self.event_shape)
        batch = value.shape[: value.dim() - dims]
        moved = value.flatten(-dims).index_select(-1, indices).unflatten(-1, self.event_shape)
        return moved, value.new_zeros(()).expand(batch)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._gather(x, self.permutation)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._gather(y, self.undo)

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        with torch.no_grad():
            self.undo.copy_(torch.argsort(self.permutation))
