"""Adam's step by torch's own function, without the class around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

__all__ = ["Adam"]


class Adam:
    """The fused step of Adam on parameters of one dtype and device.

    A ``torch.optim.Optimizer`` imports torch's compiler when it is made, which takes as long as a tenth of a short fit.
    In turn nothing tells flows of the step: whoever uses this clears their caches at the end.

    Args:
        parameters: what to move.
        speeds: for some of them the factor of the step size, by identity; 1 for the others.

    References:
        Adam: A Method for Stochastic Optimization (Kingma & Ba, 2014), arXiv:1412.6980.
    """

    def __init__(self, parameters: Sequence[Tensor], speeds: Mapping[int, float] | None = None) -> None:
        self.parameters = list(parameters)
        self._speeds = [(speeds or {}).get(id(p), 1.0) for p in self.parameters]
        self._first = [torch.zeros_like(p) for p in self.parameters]
        self._second = [torch.zeros_like(p) for p in self.parameters]
        self._steps = [torch.zeros((), dtype=torch.float32, device=p.device) for p in self.parameters]

    def state(self) -> list[list[Tensor]]:
        """Copies of the moments and of the numbers of steps."""
        return [[each.clone() for each in kind] for kind in (self._first, self._second, self._steps)]

    @torch.no_grad()
    def load(self, state: list[list[Tensor]]) -> None:
        """Puts back what :meth:`state` gave."""
        for kind, known in zip((self._first, self._second, self._steps), state, strict=True):
            for each, value in zip(kind, known, strict=True):
                each.copy_(value)

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def clip(self, most: float) -> Tensor:
        """Scales the gradients so that their norm, each times the speed of its parameter, is ``most`` at most.

        Returns:
            the norm before.
        """
        pairs = zip(self.parameters, self._speeds, strict=True)
        grads = [p.grad if speed == 1.0 else speed * p.grad for p, speed in pairs if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, most, norm, foreach=True)
        return norm

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Moves the parameters that have a gradient."""
        state = (self.parameters, self._first, self._second, self._steps, self._speeds)
        moving = [each for each in zip(*state, strict=True) if each[0].grad is not None]
        for speed in {each[-1] for each in moving}:
            self._move([each[:-1] for each in moving if each[-1] == speed], speed * rate)

    def _move(self, moving: list[tuple[Tensor, ...]], rate: float) -> None:
        parameters, first, second, steps = (list(column) for column in zip(*moving, strict=True))
        adam(
            parameters,
            [p.grad for p in parameters],
            first,
            second,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
