"""Masked autoregressive transforms: MAF (density in one pass) and IAF (sampling in one pass)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flows.core.checks import choice
from pyro_flows.core.transform import FlowTransform
from pyro_flows.inverse.buffers import Solver
from pyro_flows.inverse.sweep import solve
from pyro_flows.nets.activations import Activation
from pyro_flows.nets.masked import MaskedMLP
from pyro_flows.univariate.base import Affine, Univariate

__all__ = ["Autoregressive"]


class Autoregressive(FlowTransform):
    r"""Moves each dimension by a univariate map whose parameters depend on the dimensions before it.

    With ``fast="sampling"`` (IAF), :math:`y_i = u(x_i; p_i(x_{<i}, c))`: sampling takes one pass of the network.  With
    ``fast="density"`` (MAF), :math:`x_i = u(y_i; p_i(y_{<i}, c))`: the density of data takes one pass.  The Jacobian is
    triangular in the order and :math:`\log|\det| = \pm \sum_i \log u'`.  The other direction is exact too; it solves
    the order's steps in sequence with each weight used once, about the arithmetic of a dense pass.

    Args:
        event_shape: an ``input_dim`` or the shape of one event, flattened in row-major order.
        univariate: the family of scalar maps, affine by default.
        fast: the direction that takes one pass, ``"density"`` or ``"sampling"``.
        context_dim: size of the context, 0 for none.
        hidden_dims, order, adjacency, residual, activation: options of the :class:`~pyro_flows.nets.MaskedMLP`.

    Example:
        >>> layer = pf.Autoregressive(3, pf.Spline(bound=4.0), fast="sampling")
        >>> x = torch.randn(5, 3)
        >>> y, ladj = layer.forward_and_ladj(x)
        >>> y.shape, ladj.shape
        (torch.Size([5, 3]), torch.Size([5]))

    References:
        Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017), arXiv:1705.07057.
        Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016), arXiv:1606.04934.
    """

    _preimages: list[Tensor] | None = None

    def __init__(
        self,
        event_shape: int | Iterable[int],
        univariate: Univariate | None = None,
        *,
        fast: str = "density",
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64, 64),
        order: str | Sequence[int] | Tensor = "identity",
        adjacency: Tensor | None = None,
        residual: bool = False,
        activation: Activation = "silu",
    ) -> None:
        super().__init__(event_shape, context_dim)
        choice("Autoregressive", "fast", fast, ("density", "sampling"))
        self.univariate = Affine() if univariate is None else univariate
        if self.univariate.periodic:
            raise ValueError(
                "Autoregressive: its network would tear a circle open at pi; angles are moved by couplings, which see "
                "them by cosine and sine: see ncsf, or Coupling(..., Spline(boundary='circular'))"
            )
        self.fast = fast
        self.net = MaskedMLP(
            self.event_shape.numel(),
            num_params=self.univariate.num_params,
            hidden_dims=hidden_dims,
            context_dim=context_dim,
            order=order,
            adjacency=adjacency,
            residual=residual,
            activation=activation,
        )
        structure = self.net.structure
        self.solver = Solver(structure, self.net.activations, self.univariate)
        slow = f"1 sweep of {structure.num_steps} steps"
        self.sampling_cost, self.density_cost = (slow, "1 pass") if fast == "density" else ("1 pass", slow)

    @classmethod
    @contextmanager
    def remembering(cls, module: nn.Module) -> Iterator[None]:
        """Within it, a sweep of what a module's layers just made from one pass goes on from there.

        The caller promises that each value is inverted at most once, right after it was made.
        """
        layers = [each for each in module.modules() if isinstance(each, cls) and each.fast == "sampling"]
        for layer in layers:
            layer._preimages = []
        try:
            yield
        finally:
            for layer in layers:
                layer._preimages = None

    def _flat(self, value: Tensor) -> Tensor:
        return value if len(self.event_shape) == 1 else value.flatten(-len(self.event_shape))

    def _shaped(self, flat: Tensor) -> Tensor:
        return flat if len(self.event_shape) == 1 else torch.unflatten(flat, -1, self.event_shape)

    def _one_pass(self, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        net: Any = self._modules["net"]  # faster than an attribute
        ranked = net.to_ranks(self._flat(value))
        if self._preimages is not None:
            self._preimages.append(ranked.detach())
        moved, ladj = net.ranked(ranked, context, self.univariate)
        return self._shaped(net.from_ranks(moved)), ladj

    def _sweep(self, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        weights, biases, masks = self.net.tensors()
        ranked = self.net.to_ranks(self._flat(value))
        known = self._preimages.pop() if self._preimages else None
        solved, ladj = solve(self.solver, ranked, self.net.first_bias(context), weights, biases[1:], masks, known)
        return self._shaped(self.net.from_ranks(solved)), ladj

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._sweep(x, context) if self.fast == "density" else self._one_pass(x, context)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._one_pass(y, context) if self.fast == "density" else self._sweep(y, context)

    def inverse_and_log_slopes(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the base-side value and :meth:`log_slopes`."""
        x = self.inverse_and_ladj(y, context)[0]
        seen, sign = (y, 1) if self.fast == "density" else (x, -1)  # the network's input
        flat = self._flat(seen)
        slopes = self.univariate.forward(flat, self.net(flat, context))[1]
        return x, sign * torch.unflatten(slopes, -1, self.event_shape)

    def log_slopes(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """The logarithm of each slope from data to base, shaped like ``y``."""
        return self.inverse_and_log_slopes(y, context)[1]
