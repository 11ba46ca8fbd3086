"""Transforms of single dimensions: rescaling, standardization and permutation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pyro_flows.core.checks import event_size, joint_shape, permutation_of
from pyro_flows.core.steps import Stepper, affine, at_any_time
from pyro_flows.core.transform import FlowTransform
from pyro_flows.nets.activations import Activation
from pyro_flows.nets.dense import MLP
from pyro_flows.univariate.base import soft_clip

__all__ = ["Permutation", "Rescaling", "Standardization"]


class Rescaling(FlowTransform):
    r"""Diagonal scaling, :math:`y = e^{-s} x` and :math:`x = e^{s} y`, with one :math:`s_i` per dimension.

    As in NICE, a large :math:`e^{s_i}` marks a direction of small variation.  With a context, :math:`s(c) = s_0 +
    \kappa \tanh(g(c) / \kappa)`.  It starts at zero.  Each direction is elementwise.

    Args:
        event_shape: an ``input_dim`` or the shape of one event.
        context_dim: size of the context, 0 for none.
        hidden_dims, residual, activation: of :math:`g`, as in :class:`~pyro_flows.nets.MLP`.
        max_log_scale: the bound :math:`\kappa` on the context's part.

    Example:
        >>> layer = pf.transforms.Rescaling(3)
        >>> layer(torch.ones(3)).tolist()
        [1.0, 1.0, 1.0]

    References:
        NICE: Non-linear Independent Components Estimation (Dinh et al., 2014), section 3.3, arXiv:1410.8516.
    """

    sampling_cost = density_cost = "1 product"
    affine = True

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
        """The log-scale, and its sum expanded to the batch shape of the value."""
        dims = len(self.event_shape)
        batch = value.shape[: value.dim() - dims]
        log_scale: Tensor = self.log_scale
        if context is not None:
            shift = self.net(context[..., :0], context).squeeze(-1).unflatten(-1, self.event_shape)
            log_scale = log_scale + soft_clip(shift, self.max_log_scale)
        return log_scale, log_scale.sum(tuple(range(-dims, 0))).expand(batch)

    def stepper(self, rows: int, context: Tensor | None = None) -> Stepper:
        """Goes through a series step by step, if all times share one scale."""
        if context is not None:
            raise ValueError(
                "Rescaling: with a context each time has its own scale, and the time after the last has none; use "
                "a part whose parameters all times share"
            )
        return affine(0.0, -at_any_time("Rescaling", "log_scale", self.log_scale))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, total = self._log_scale(x, context)
        return x * torch.exp(-log_scale), -total

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, total = self._log_scale(y, context)
        return y * torch.exp(log_scale), total

    def log_slopes(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-slopes from data to base, of the shape of ``y``."""
        return self._log_scale(y, context)[0].expand(y.shape)


class Standardization(FlowTransform):
    r"""A fixed location and scale per dimension, :math:`y = t + \sigma x`: puts a flow in the units of the data.

    With the data's mean and standard deviation at the data end, the rest of a chain works on standardized numbers;
    :math:`\log|\det| = \sum_i \log \sigma_i`.  Each direction is elementwise.

    Args:
        loc: :math:`t`, of the event's shape, e.g. ``data.mean(0)``.
        scale: :math:`\sigma > 0`, of the same shape, e.g. ``data.std(0)``; each may broadcast to the other.
        event_shape: ``None`` for the shape of these numbers, or one to which they broadcast, such as ``(C, T)`` for
            numbers ``(C, 1)`` that all times share; the ``state_dict`` holds them unexpanded.

    Raises:
        ValueError: for shapes that do not fit, a location that is not finite, or a scale that is not positive.
        TypeError: for numbers that are not floating-point.

    Example:
        >>> data = torch.tensor([[10.0, 0.1], [30.0, 0.3]])
        >>> layer = pf.Standardization(data.mean(0), data.std(0))
        >>> layer(torch.zeros(2))
        tensor([20.0000,  0.2000])

    References:
        Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017), arXiv:1705.07057.
    """

    sampling_cost = density_cost = "1 product"
    affine = True
    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        loc: Tensor | Sequence[float],
        scale: Tensor | Sequence[float],
        *,
        event_shape: int | Iterable[int] | None = None,
    ) -> None:
        given = [(each if isinstance(each, Tensor) else torch.as_tensor(each)).detach() for each in (loc, scale)]
        if not all(tensor.is_floating_point() for tensor in given):
            raise TypeError(
                f"Standardization: expected floating-point loc and scale, got {given[0].dtype} and {given[1].dtype}"
            )
        event = None if event_shape is None else event_size(event_shape)
        try:
            shape = joint_shape(given[0].shape, given[1].shape)
            fits = event is None or joint_shape(shape, event) == event
        except ValueError:
            fits = False
        if not fits:
            wanted = "the event's shape" if event is None else f"event_shape {tuple(event)}"
            raise ValueError(
                f"Standardization: expected loc and scale that broadcast to {wanted}, got shapes "
                f"{tuple(given[0].shape)} and {tuple(given[1].shape)}"
            )
        event = shape if event is None else event
        super().__init__(event)
        for name, tensor in zip(("loc", "scale"), given, strict=True):
            self.register_buffer(name, tensor.to(given[0]).expand(shape).clone(memory_format=torch.contiguous_format))
        if self.loc.is_meta:
            return
        if not self.loc.isfinite().all():
            raise ValueError("Standardization: expected loc to be finite everywhere; leave such rows or dimensions out")
        wrong = ~((self.scale > 0) & self.scale.isfinite())
        if wrong.any():
            where = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"Standardization: expected scale to be positive and finite everywhere, got {float(self.scale[where])} "
                f"at {where}; leave constant dimensions out, or give them the scale 1"
            )

    @property
    def shared_over_time(self) -> bool:
        if len(self.event_shape) != 2 or self.loc.is_meta:
            return False
        whole = torch.stack((self.loc, self.scale)).expand(2, *self.event_shape)
        return torch.equal(whole[..., :1].expand_as(whole), whole)

    @property
    def reach(self) -> int | None:
        return 0 if self.shared_over_time else None

    def stepper(self, rows: int, context: Tensor | None = None) -> Stepper:
        """Goes through a series step by step, if all times share the numbers."""
        loc, scale = (
            at_any_time("Standardization", name, getattr(self, name).expand(self.event_shape))
            for name in ("loc", "scale")
        )
        return affine(loc, scale.log())

    def _ladj(self, value: Tensor) -> Tensor:
        total = self.scale.log().sum() * (self.event_shape.numel() // self.scale.numel())
        return total.expand(self._batch_of(value))

    def turned(self, angles: Tensor, inverse: bool = False) -> Tensor:
        moved = ((self.loc != 0) | (self.scale != 1)).to(angles.device)
        return angles if angles.is_meta or not (moved & angles).any() else super().turned(angles, inverse)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.loc + self.scale * x, self._ladj(x)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (y - self.loc) / self.scale, -self._ladj(y)

    def log_slopes(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-slopes from data to base, of the shape of ``y``."""
        return -self.scale.log().expand(y.shape)


class Permutation(FlowTransform):
    r"""Reorders the dimensions: :math:`y_i = x_{\pi(i)}`, with zero log-determinant.

    Args:
        event_shape: an ``input_dim`` or the shape of one event, flattened in row-major order.
        permutation: ``"random"`` (drawn once, saved in the ``state_dict``), ``"reverse"``, or the indices :math:`\pi`.

    Raises:
        ValueError: if the indices are no permutation.

    Example:
        >>> pf.Permutation(3, [2, 0, 1])(torch.tensor([10.0, 20.0, 30.0]))
        tensor([30., 10., 20.])

    References:
        Density estimation using Real NVP (Dinh et al., 2016), section 3.5, arXiv:1605.08803.
    """

    sampling_cost = density_cost = "1 gather"
    discrete = None
    affine = True
    permutation: Tensor
    undo: Tensor

    def __init__(self, event_shape: int | Iterable[int], permutation: str | Sequence[int] | Tensor = "random") -> None:
        super().__init__(event_shape)
        indices = permutation_of("Permutation", self.event_shape.numel(), permutation, ("random", "reverse"))
        drawn = isinstance(permutation, str) and permutation == "random"
        self.register_buffer("permutation", indices, persistent=drawn)
        self.register_buffer("undo", torch.argsort(indices), persistent=False)

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        with torch.no_grad():
            self.undo.copy_(torch.argsort(self.permutation))

    def turned(self, angles: Tensor, inverse: bool = False) -> Tensor:
        return self._reorder(angles, inverse)[0]

    def _reorder(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        flat, indices = value.flatten(-len(self.event_shape)), self.undo if inverse else self.permutation
        moved = flat.index_select(-1, indices.to(value.device))
        return torch.unflatten(moved, -1, self.event_shape), value.new_zeros(()).expand(flat.shape[:-1])

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._reorder(x, inverse=False)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._reorder(y, inverse=True)
