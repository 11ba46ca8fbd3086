"""Monotone maps of one number.

A univariate maps ``(x, params)`` to ``(y, ladj)`` and back, elementwise; ``params`` has the shape of ``x`` and a last
axis of ``num_params``.  All-zero parameters give the identity.  A univariate holds no tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_flows.core.modes import by_hand, lasting
from pyro_flows.core.recipes import options_of, remembered

__all__ = ["Affine", "Shift", "Univariate", "number", "numbers", "one_plus_square", "soft_clip"]


def soft_clip(value: Tensor, bound: float) -> Tensor:
    r"""Smooth clip to ``(-bound, bound)``: :math:`c \tanh(a / c)`, the identity near zero."""
    return torch.tanh(value * (1.0 / bound)) * bound


@functools.cache
def number(value: float, dtype: torch.dtype) -> Tensor:
    """A zero-dimensional tensor for eager calls: products with it cost half as much as with a Python number."""
    with lasting():
        return torch.tensor(value, dtype=dtype, device="cpu")


def one_plus_square(factor: float, x: Tensor) -> Tensor:
    """``1 + factor x^2``."""
    one = number(1.0, x.dtype) if x.device.type == "cpu" and by_hand() else x.new_ones(())
    return torch.addcmul(one, x, x, value=factor)


def numbers(dtype: torch.dtype) -> Callable[[float], Tensor]:
    """Returns :func:`number` of one dtype, or under tracing a function that makes a traced tensor."""
    if not by_hand() and (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()):
        return partial(torch.tensor, dtype=dtype, device="cpu")
    return lambda value: number(value, dtype)


class Univariate:
    """Abstract base of families of increasing bijections of the line, each with ``num_params`` parameters.

    Example:
        >>> class Scaling(pf.univariate.Univariate):
        ...     num_params = 1
        ...     def forward(self, x, params):
        ...         return x * params[..., 0].exp(), params[..., 0]
        ...     def inverse(self, y, params):
        ...         return y * (-params[..., 0]).exp(), -params[..., 0]
        >>> pf.maf(3, univariate=Scaling())(torch.ones(3)).tolist()
        [1.0, 1.0, 1.0]
    """

    num_params: int
    periodic = False  # whether it maps angles, modulo 2 pi
    half_precision = True  # whether float16 and bfloat16 are enough

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(y, log dy/dx)``, each shaped like ``x``; ``params``: shape ``(*x.shape, num_params)``."""
        raise TypeError(f"{type(self).__name__} must define forward(x, params) -> (y, ladj)")

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(x, log dx/dy)``, each shaped like ``y``."""
        raise TypeError(f"{type(self).__name__} must define inverse(y, params) -> (x, ladj)")

    # Below, z is mapped to x, and the parameter axis comes first, so that each parameter is contiguous.

    def solver(self, inverse: bool, z: Tensor, params: Tensor, x: Tensor, ladj: Tensor) -> list[Callable[[], object]]:
        """Calls of the sweep that map ``z`` to ``x`` and ``ladj`` in place, from the buffers' present values.

        They may overwrite ``z``, not ``params``.  Override this where fewer or cheaper calls suffice.
        """

        def solve() -> None:
            moved, slope = self.plain(inverse, z, params)
            x.copy_(moved)
            ladj.copy_(slope)

        return [solve]

    def run(self, inverse: bool, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Returns ``(x, ladj, kept)``; :meth:`pull` needs ``kept``.

        Override both, and only where this is cheaper than plain autograd.
        """
        return *self.plain(inverse, z, params), (params,)

    def pull(
        self, inverse: bool, z: Tensor, x: Tensor, ladj: Tensor, kept: Sequence[Tensor], grad: Tensor, grad_ladj: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns new tensors: the gradients with respect to ``(z, params)``, from those for ``(x, ladj)``."""
        return torch.func.vjp(partial(self.plain, inverse), z, *kept)[1]((grad, grad_ladj.expand_as(ladj)))

    def plain(self, inverse: bool, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(x, ladj)`` by differentiable, traceable operations."""
        return (self.inverse if inverse else self.forward)(z, params.movedim(0, -1))

    def partials(
        self, inverse: bool, z: Tensor, params: Tensor, x: Tensor, ladj: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns ``(dx/dz, dx/dparams, weight dladj/dz, weight dladj/dparams)``, elementwise."""
        one, none, weight = torch.ones_like(x), torch.zeros_like(x), weight.expand_as(x)
        if self._by_hand and by_hand():
            pull = partial(self.pull, inverse, z, x, ladj, self.run(inverse, z, params)[2])
            return *pull(one, none), *pull(none, weight)
        vjp = torch.func.vjp(partial(self.plain, inverse), z, params)[1]
        return *vjp((one, none)), *vjp((none, weight.contiguous()))

    @property
    def _by_hand(self) -> bool:
        return type(self).pull is not Univariate.pull

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        remembered(cls)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments that make an equal object."""
        return (), options_of(self)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *self.__dict__.values()))

    def __repr__(self) -> str:
        told = ", ".join(f"{name}={value}" for name, value in self.__dict__.items() if not name.startswith("_"))
        return f"{type(self).__name__}({told})"


class Shift(Univariate):
    r"""The additive map :math:`y = x + m`, with unit Jacobian.

    Example:
        >>> layer = pf.Coupling(4, pf.univariate.Shift())
        >>> y, ladj = layer.forward_and_ladj(torch.randn(5, 4))
        >>> bool((ladj == 0).all())
        True

    References:
        NICE: Non-linear Independent Components Estimation (Dinh et al., 2014), arXiv:1410.8516.
    """

    num_params = 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return x + params[..., 0], torch.zeros_like(x)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return y - params[..., 0], torch.zeros_like(y)

    def pull(
        self, inverse: bool, z: Tensor, x: Tensor, ladj: Tensor, kept: Sequence[Tensor], grad: Tensor, grad_ladj: Tensor
    ) -> tuple[Tensor, Tensor]:
        return grad.clone(), (grad.neg() if inverse else grad.clone()).unsqueeze(0)


class Affine(Univariate):
    r"""The affine map :math:`y = x\,e^{s} + g m` with parameters :math:`(m, a)` and :math:`s = c \tanh(g a / c)`.

    Unlike a hard clamp, the smooth bound leaves gradients of the log-determinant right everywhere.

    Args:
        max_log_scale: the bound :math:`c` on the absolute log-scale.
        gain: the factor :math:`g` on both parameters; below 1, an optimizer's steps move the flow less.

    Example:
        >>> shift_and_log_scale = torch.tensor([3.0, 0.0])
        >>> pf.univariate.Affine().forward(torch.tensor(2.0), shift_and_log_scale)
        (tensor(5.), tensor(0.))

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
        return self._move(False, x, *params.movedim(-1, 0).unbind())

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._move(True, y, *params.movedim(-1, 0).unbind())

    def _move(self, inverse: bool, z: Tensor, shift: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        number, bound = numbers(raw.dtype), self.max_log_scale
        ladj = torch.tanh(raw * number(self.gain / bound)) * number(-bound if inverse else bound)
        if inverse:
            return torch.sub(z, shift, alpha=self.gain) * ladj.exp(), ladj
        if self.gain == 1:
            return torch.addcmul(shift, z, ladj.exp()), ladj
        return torch.add(z * ladj.exp(), shift, alpha=self.gain), ladj

    def solver(self, inverse: bool, z: Tensor, params: Tensor, x: Tensor, ladj: Tensor) -> list[Callable[[], object]]:
        bound = self.max_log_scale
        shift, raw = params
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
        if not by_hand():
            return super().partials(inverse, z, params, x, ladj, weight)
        scale, zero = ladj.exp(), torch.zeros_like(x)
        tanh = ladj * (math.sqrt(self.gain) / self.max_log_scale)
        bend = self.gain - tanh * tanh  # d log-scale / d parameter
        if inverse:
            by_params = torch.stack((scale * -self.gain, -x * bend))
            return scale, by_params, zero, torch.stack((zero, -weight * bend))
        by_params = torch.stack((torch.full_like(x, self.gain), z * scale * bend))
        return scale, by_params, zero, torch.stack((zero, weight * bend))

    def run(self, inverse: bool, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        shift, raw = params.unbind()
        bound, gain, dtype = self.max_log_scale, self.gain, raw.dtype
        ladj = (raw * number(gain / bound, dtype)).tanh_().mul_(number(-bound if inverse else bound, dtype))
        scale = ladj.exp()
        if inverse:
            return torch.sub(z, shift, alpha=gain).mul_(scale), ladj, (scale,)
        if gain == 1:
            return torch.addcmul(shift, z, scale), ladj, (scale,)
        return torch.add(z * scale, shift, alpha=gain), ladj, (scale,)

    def pull(
        self, inverse: bool, z: Tensor, x: Tensor, ladj: Tensor, kept: Sequence[Tensor], grad: Tensor, grad_ladj: Tensor
    ) -> tuple[Tensor, Tensor]:
        by_z = kept[0] * grad
        by_raw = torch.addcmul(grad_ladj, *((grad, x) if inverse else (by_z, z)))
        by_raw.addcmul_(by_raw, ladj * ladj, value=-(self.max_log_scale**-2))
        # In the memory layout of a network's outputs, to which they flatten without a copy.
        by_params = torch.stack((by_z if inverse else grad, by_raw), -2)
        factor = -self.gain if inverse else self.gain
        if factor != 1:
            by_params.mul_(number(factor, ladj.dtype))
        return by_z, by_params.movedim(-2, 0)
