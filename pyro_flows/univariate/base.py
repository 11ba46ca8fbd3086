"""Monotone maps of one number, the pieces that couplings and autoregressive flows apply to each dimension.

A univariate maps ``(x, params)`` to ``(y, ladj)`` and back, elementwise; ``params`` has the shape of ``x`` with a last
axis of ``num_params``.  All-zero parameters give the identity, so that a conditioner whose last layer is zero makes a
flow start there.  It holds no tensors: what it needs comes in, on the device and in the dtype of ``x``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_flows.core.modes import lasting
from pyro_flows.core.recipes import options_of, remembered

__all__ = ["Affine", "Shift", "Univariate", "number", "numbers", "soft_clip"]


def soft_clip(value: Tensor, bound: float) -> Tensor:
    r"""Smooth clip to ``(-bound, bound)``: :math:`c \tanh(a / c)`, the identity near zero."""
    return torch.tanh(value * (1.0 / bound)) * bound


@functools.cache
def number(value: float, dtype: torch.dtype) -> Tensor:
    """A tensor of no dimension: products with one cost half as much as with a Python number.

    For eager calls; what may be traced too takes :func:`numbers`.
    """
    with lasting():
        return torch.tensor(value, dtype=dtype, device="cpu")


def numbers(dtype: torch.dtype) -> Callable[[float], Tensor]:
    """:func:`number` of one dtype, and where tensors are traced in place of it one that is traced with them."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return partial(torch.tensor, dtype=dtype, device="cpu")
    return lambda value: number(value, dtype)


class Univariate:
    """Abstract base: a family of increasing bijections of the line with ``num_params`` parameters each."""

    num_params: int
    periodic = False  # whether it maps angles to angles, modulo 2 pi
    half_precision = True  # whether float16 and bfloat16 are enough for it
    wide = False  # many parameters: a network's outputs then go to columns() and pull_columns()

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log dy/dx)``, both of the shape of ``x``; ``params``: shape ``(*x.shape, num_params)``."""
        raise TypeError(f"{type(self).__name__} must define forward(x, params) -> (y, ladj)")

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, log dx/dy)``, both of the shape of ``y``."""
        raise TypeError(f"{type(self).__name__} must define inverse(y, params) -> (x, ladj)")

    def solver(self, inverse: bool, z: Tensor, params: Tensor, x: Tensor, ladj: Tensor) -> list[Callable[[], object]]:
        """Calls that map ``z`` to ``x`` and ``ladj`` in place, each time on what the buffers then hold.

        For the incremental engine, which runs them once a dimension.  ``params`` has its parameter axis second;
        ``z`` may be overwritten, ``params`` may not.  Override only where fewer or cheaper calls can do it.
        """
        move = self.inverse if inverse else self.forward

        def run() -> None:
            moved, slope = move(z, params.movedim(1, -1))
            x.copy_(moved)
            ladj.copy_(slope)

        return [run]

    def partials(
        self, inverse: bool, z: Tensor, params: Tensor, x: Tensor, ladj: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Elementwise derivatives of ``(x, ladj)`` after ``(z, params)``, for the gradient through the engine.

        Returns ``(dx/dz, dx/dparams, weight dladj/dz, weight dladj/dparams)``; here too the parameter axis is second.
        Override only where a closed form is cheaper than automatic differentiation.
        """
        move = self.inverse if inverse else self.forward
        pull = torch.func.vjp(lambda v, p: move(v, p.movedim(1, -1)), z, params)[1]
        none = torch.zeros_like(x)
        slopes = pull((torch.ones_like(x), none))
        weighted = pull((none, weight.expand_as(x).contiguous()))
        return (*slopes, *weighted)

    def run(self, inverse: bool, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """``(x, ladj, kept)`` for the one-pass direction, where ``params`` has its parameter axis last but one.

        ``params`` may be overwritten; ``kept`` is what :meth:`pull` needs beside ``z``, ``x`` and ``ladj``.  Override
        the two together, and only where hand-made arithmetic is cheaper than the plain one.
        """
        x, ladj = (self.inverse if inverse else self.forward)(z, params.transpose(-1, -2))
        return x, ladj, (params,)

    def pull(
        self, inverse: bool, z: Tensor, x: Tensor, ladj: Tensor, kept: Sequence[Tensor], grad: Tensor, grad_ladj: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients after ``(z, params)``, given those after ``(x, ladj)``; everything as in :meth:`run`."""
        move = self.inverse if inverse else self.forward
        pull = torch.func.vjp(lambda v, p: move(v, p.transpose(-1, -2)), z, *kept)[1]
        return pull((grad, grad_ladj.expand_as(ladj)))

    def columns(self, inverse: bool, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """As :meth:`run`, for ``z`` of shape ``(columns,)`` and parameters one row each; only if ``wide``."""
        raise TypeError(f"{type(self).__name__} is wide, so it must define columns(inverse, z, params)")

    def pull_columns(
        self, inverse: bool, kept: Sequence[Tensor], grad: Tensor, grad_ladj: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`pull`, for what :meth:`columns` gave; only if ``wide``."""
        raise TypeError(f"{type(self).__name__} is wide, so it must define pull_columns(inverse, kept, ...)")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        remembered(cls)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What it is made of; see ``pyro_flows.core.recipes``."""
        return (), options_of(self)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *self.__dict__.values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self.__dict__.items())})"


class Shift(Univariate):
    r""":math:`y = x + m`; the additive map of NICE, with unit Jacobian.

    References:
        NICE: Non-linear Independent Components Estimation (Dinh et al., 2014), arXiv:1410.8516.
    """

    num_params = 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return x + params[..., 0], torch.zeros_like(x)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return y - params[..., 0], torch.zeros_like(y)

    def run(self, inverse: bool, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        shift = params.select(-2, 0)
        return (z - shift if inverse else z + shift), torch.zeros_like(z), ()

    def pull(
        self, inverse: bool, z: Tensor, x: Tensor, ladj: Tensor, kept: Sequence[Tensor], grad: Tensor, grad_ladj: Tensor
    ) -> tuple[Tensor, Tensor]:
        by_z = grad.clone()  # callers add to it in place
        return by_z, (by_z.neg() if inverse else by_z.clone()).unsqueeze(-2)


class Affine(Univariate):
    r""":math:`y = x\,e^{s} + g m` with parameters :math:`(m, a)` and :math:`s = c \tanh(g a / c)`.

    The log-scale is the identity in :math:`g a` near zero and stays in :math:`(-c, c)`; unlike a hard clamp it leaves
    gradients of the log-determinant right everywhere.

    Args:
        max_log_scale: the bound :math:`c` on the absolute log-scale.
        gain: the factor :math:`g` on both parameters.  A step of Adam moves every weight of a network by the step size,
            and so its outputs by that times the number of units: a gain below 1 makes the flow move less.

    References:
        Density estimation using Real NVP (Dinh et al., 2016), arXiv:1605.08803.
    """

    num_params = 2
    gain = 1.0

    def __init__(self, max_log_scale: float = 5.0, gain: float = 1.0) -> None:
        if not max_log_scale > 0:
            raise ValueError(f"Affine: expected max_log_scale > 0, got {max_log_scale}")
        if not 0 < gain < float("inf"):
            raise ValueError(f"Affine: expected gain > 0, got {gain}")
        self.max_log_scale = float(max_log_scale)
        if gain != 1:
            self.gain = float(gain)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = self._gained(params).unbind(-1)
        log_scale = soft_clip(raw, self.max_log_scale)
        return torch.addcmul(shift, x, log_scale.exp()), log_scale

    def _gained(self, params: Tensor) -> Tensor:
        return params if self.gain == 1 else params * number(self.gain, params.dtype)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = self._gained(params).unbind(-1)
        ladj = torch.tanh(raw * (1.0 / self.max_log_scale)) * -self.max_log_scale
        return (y - shift) * ladj.exp(), ladj

    def solver(self, inverse: bool, z: Tensor, params: Tensor, x: Tensor, ladj: Tensor) -> list[Callable[[], object]]:
        bound = self.max_log_scale
        shift, raw = params[:, 0], params[:, 1]
        calls: list[Callable[[], object]] = [
            partial(torch.mul, raw, number(self.gain / bound, z.dtype), out=ladj),
            ladj.tanh_,
            partial(ladj.mul_, number(-bound if inverse else bound, z.dtype)),
            partial(torch.exp, ladj, out=x),
        ]
        if inverse:
            return [*calls, partial(z.sub_, shift, alpha=self.gain), partial(x.mul_, z)]
        if self.gain == 1:
            return [*calls, partial(torch.addcmul, shift, z, x, out=x)]
        return [*calls, partial(x.mul_, z), partial(x.add_, shift, alpha=self.gain)]

    def partials(
        self, inverse: bool, z: Tensor, params: Tensor, x: Tensor, ladj: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale = ladj.exp()
        tanh = ladj * (1.0 / self.max_log_scale)
        bend = 1.0 - tanh * tanh  # d log-scale / d raw
        if inverse:
            by_params = torch.stack((-scale, -x * bend), 1)
            by_raw = -weight * bend
        else:
            by_params = torch.stack((torch.ones_like(x), z * scale * bend), 1)
            by_raw = weight * bend
        zero = torch.zeros_like(x)
        return scale, self._gained(by_params), zero, self._gained(torch.stack((zero, by_raw), 1))

    def run(self, inverse: bool, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        shift, raw = self._gained(params).unbind(-2)
        bound = self.max_log_scale
        # The first product leaves the strides of the parameters behind; in place from there on.
        ladj = (raw * number(1.0 / bound, raw.dtype)).tanh_().mul_(number(-bound if inverse else bound, raw.dtype))
        if inverse:
            return (z - shift).mul_(ladj.exp()), ladj, ()
        return torch.addcmul(shift, z, ladj.exp()), ladj, ()

    def pull(
        self, inverse: bool, z: Tensor, x: Tensor, ladj: Tensor, kept: Sequence[Tensor], grad: Tensor, grad_ladj: Tensor
    ) -> tuple[Tensor, Tensor]:
        by_z = ladj.exp().mul_(grad)
        tanh = ladj * number(1.0 / self.max_log_scale, ladj.dtype)
        bend = 1.0 - tanh.mul_(tanh)
        if inverse:
            by_raw = torch.addcmul(grad_ladj, grad, x).mul_(bend)
            return by_z, self._gained(torch.stack((by_z, by_raw), -2)).neg_()
        by_raw = torch.addcmul(grad_ladj, by_z, z).mul_(bend)
        return by_z, self._gained(torch.stack((grad, by_raw), -2))
