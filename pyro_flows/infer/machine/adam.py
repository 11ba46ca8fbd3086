"""Adam without loading torch's compiler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim.adam import adam

__all__ = ["Adam"]


class Adam:
    """The fused step of Adam on parameters of one dtype and device.

    A ``torch.optim.Optimizer`` imports torch's compiler, a tenth of a short fit.  No flow notices these steps, so users
    of this class clear the caches at the end.  ``speeds`` are factors of the step size by a parameter's identity.

    References:
        Adam: A Method for Stochastic Optimization (Kingma & Ba, 2014), arXiv:1412.6980.
    """

    def __init__(self, parameters: Iterable[Tensor], speeds: Mapping[int, float] | None = None) -> None:
        self.parameters = list(parameters)
        self._speeds = [(speeds or {}).get(id(p), 1.0) for p in self.parameters]
        self._moments = [
            [torch.zeros_like(p) for p in self.parameters],
            [torch.zeros_like(p) for p in self.parameters],
            [torch.zeros((), dtype=torch.float32, device=p.device) for p in self.parameters],  # steps
        ]

    def state(self) -> list[list[Tensor]]:
        """Copies the moments and the numbers of steps."""
        return [[each.clone() for each in kind] for kind in self._moments]

    @torch.no_grad()
    def load(self, state: list[list[Tensor]]) -> None:
        """Restores the :meth:`state`."""
        for kind, known in zip(self._moments, state, strict=True):
            for each, value in zip(kind, known, strict=True):
                each.copy_(value)

    def zero_grad(self) -> None:
        """Drops the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def clip(self, most: float) -> Tensor:
        """Scales gradients so that their norm, times speeds, is at most ``most``; returns the old norm."""
        pairs = zip(self.parameters, self._speeds, strict=True)
        grads = [p.grad if speed == 1.0 else speed * p.grad for p, speed in pairs if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, most, norm, foreach=True)
        return norm

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Moves the parameters that have a gradient."""
        moving = [k for k, parameter in enumerate(self.parameters) if parameter.grad is not None]
        for speed in {self._speeds[k] for k in moving}:
            chosen = [k for k in moving if self._speeds[k] == speed]
            first, second, steps = ([kind[k] for k in chosen] for kind in self._moments)
            adam(
                [self.parameters[k] for k in chosen],
                [grad for k in chosen if (grad := self.parameters[k].grad) is not None],
                first,
                second,
                [],
                steps,
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=speed * rate,
                weight_decay=0.0,
                eps=1e-8,
                maximize=False,
            )
