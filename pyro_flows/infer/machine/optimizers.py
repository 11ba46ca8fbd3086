"""The optimizers of fits: AdamW on flat buffers, or one of torch's, by the same calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["BETAS", "EPS", "AdamW", "Given"]

BETAS, EPS = (0.9, 0.999), 1e-8
ALIGNED = 16  # numbers, so that each parameter begins where vector instructions like it


class AdamW:
    """The fused step of AdamW on parameters of one dtype and device, which lie in one buffer meanwhile.

    One call updates them all; torch's own take a tenth of a small step, and load its compiler.  ``speeds`` are factors
    of the step size ``lr`` by a parameter's identity.  :meth:`release` ends the fit.

    Attributes:
        values, grads: the buffers of all parameters and of their gradients.
        buffers: what a step changes: values, first and second moments, averages if wanted, and the number of steps.
        averages: the averages of the parameters, if wanted.

    References:
        Decoupled Weight Decay Regularization (Loshchilov & Hutter, 2019), arXiv:1711.05101.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        speeds: Mapping[int, float] | None = None,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        average: bool = False,
    ) -> None:
        self.parameters, self.lr, self.weight_decay = list(parameters), lr, weight_decay
        speeds = speeds or {}
        places: dict[int, int] = {}
        parts: dict[float, tuple[int, int]] = {}
        end = 0
        for parameter in sorted(self.parameters, key=lambda p: speeds.get(id(p), 1.0)):
            speed = speeds.get(id(parameter), 1.0)
            begin, _ = parts.setdefault(speed, (end, end))
            places[id(parameter)] = end
            end += -(-parameter.numel() // ALIGNED) * ALIGNED
            parts[speed] = begin, end
        self.offsets = [places[id(p)] for p in self.parameters]
        self.parts = {speed: slice(*part) for speed, part in parts.items()}
        like = self.parameters[0].detach()
        self.values, self.grads, self._first, self._second = (like.new_zeros(end) for _ in range(4))
        self._steps = torch.zeros((), dtype=torch.float32, device=like.device)
        self._grads = self.views(self.grads)
        with torch.no_grad():
            for parameter, place in zip(self.parameters, self.views(self.values), strict=True):
                parameter.data = place.copy_(parameter)
        self.buffers = [self.values, self._first, self._second, self._steps]
        if average:
            self.buffers.append(self.values.clone())
        self.averages = self.views(self.buffers[-1]) if average else []

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Cuts a buffer into the shapes of the parameters."""
        pairs = zip(self.parameters, self.offsets, strict=True)
        return [buffer[at : at + p.numel()].view(p.shape) for p, at in pairs]

    def release(self) -> None:
        """Gives each parameter memory of its own."""
        for parameter in self.parameters:
            parameter.data = parameter.data.clone()

    @torch.no_grad()
    def take(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Reads the gradients of all parameters; returns their norm, each times its speed."""
        found = [(place, grad) for place, grad in zip(self._grads, grads, strict=True) if grad is not None]
        if len(found) < len(grads):
            self.grads.zero_()
        torch._foreach_copy_([place for place, _ in found], [grad for _, grad in found])
        parts = [speed * self.grads[part].norm() for speed, part in self.parts.items()]
        return parts[0] if len(parts) == 1 else torch.stack(parts).norm()

    @torch.no_grad()
    def clip(self, norm: Tensor, most: float) -> None:
        """Scales the gradients so that their norm, from :meth:`take`, becomes ``most`` at most."""
        self.grads.mul_((most / (norm + 1e-6)).clamp(max=1.0))

    @torch.no_grad()
    def step(self, factor: float, weight: float = 1.0) -> None:
        """Moves the parameters by ``factor`` times the step size, and their averages by ``weight`` of the distance."""
        self._steps += 1
        for speed, part in self.parts.items():
            torch._fused_adamw_(
                [self.values[part]],
                [self.grads[part]],
                [self._first[part]],
                [self._second[part]],
                [],
                [self._steps],
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=speed * self.lr * factor,
                weight_decay=self.weight_decay,
                eps=EPS,
                maximize=False,
            )
        if self.averages:
            self.buffers[-1].lerp_(self.values, weight)
        self.touch()

    @torch.no_grad()
    def assign(self, buffers: Sequence[Tensor]) -> None:
        """Takes over the buffers after steps made elsewhere."""
        torch._foreach_copy_(self.buffers, list(buffers))
        self.touch()

    def forget(self) -> None:
        """Returns to moments of 0, after the parameters were set anew."""
        for buffer in (self._first, self._second, self._steps):
            buffer.zero_()
        self.touch()

    def touch(self) -> None:
        """Tells caches that the parameters changed."""
        torch.autograd.graph.increment_version(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """Copies the moments and the number of steps."""
        moments = {"first": self.views(self._first), "second": self.views(self._second), "steps": [self._steps]}
        return {name: [each.clone() for each in moment] for name, moment in moments.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the :meth:`state_dict`."""
        own = self.views(self._first), self.views(self._second), [self._steps]
        for mine, name in zip(own, ("first", "second", "steps"), strict=True):
            for each, value in zip(mine, state[name], strict=True):
                each.copy_(value)


class Given:
    """A torch optimizer."""

    def __init__(self, optimizer: Optimizer, average: bool = False) -> None:
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self.averages = [p.detach().clone() for p in self.parameters] if average else []

    @property
    def lr(self) -> float:
        """The step size of the first group."""
        return float(self._rates[0])

    def take(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Gives the parameters their gradients; returns their norm."""
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad
        return nn.utils.get_total_norm([grad for grad in grads if grad is not None])

    def clip(self, norm: Tensor, most: float) -> None:
        """Scales the gradients to a norm of at most ``most``."""
        nn.utils.clip_grads_with_norm_(self.parameters, most, norm)

    def step(self, factor: float, weight: float = 1.0) -> None:
        """Takes a step of ``factor`` times the first step sizes, and moves the averages."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        if self.averages:
            with torch.no_grad():
                torch._foreach_lerp_(self.averages, self.parameters, weight)

    def release(self) -> None:
        """Drops the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Returns the optimizer's own."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the :meth:`state_dict`."""
        self.optimizer.load_state_dict(state)
