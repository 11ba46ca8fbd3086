"""Compiles training steps to a file, as a process of its own: ``python compile_worker.py REQUEST FILE``.

The loop below must agree with :class:`~pyro_flows.infer.machine.optimizers.AdamW`.  This file imports nothing of the
package, so that the process starts fast.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop

__all__ = ["Loop", "main"]


class Loop(torch.nn.Module):
    """``count`` steps as a loop that stays one in the graph.

    Each takes its part of ``each``; where there are ``tables``, the first part chooses rows of these.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        super().__init__()
        names: dict[str, Any] = {"torch": torch, "inf": float("inf"), "nan": float("nan"), "device": torch.device}
        exec(request["code"], names)  # a recorded graph's own
        self.program = names["forward"]
        self.request = request

    def step(
        self, state: Sequence[Tensor], rate: Tensor, weight: Tensor, settings: Tensor, inputs: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """One step: the new state, the scores and the gradient's norm."""
        request, (values, first, second, steps, *mean) = self.request, state
        (b1, b2), places = request["betas"], request["places"]
        parameters = [values[at : at + size].view(shape) for at, size, shape in places]
        score, *grads = self.program(None, *parameters, *inputs)
        pieces, end = [], 0
        for (at, size, _), grad in sorted(zip(places, grads, strict=True), key=lambda pair: pair[0][0]):
            grad = values.new_zeros(size) if grad is None else grad.reshape(-1)
            pieces += [values.new_zeros(at - end), grad] if at > end else [grad]
            end = at + size
        grad = torch.cat([*pieces, values.new_zeros(len(values) - end)])
        speeds = torch.cat([values.new_full((stop - start,), speed) for speed, start, stop in request["parts"]])
        norm = (speeds * grad).square().sum().sqrt()
        grad = grad * (settings[0] / (norm + 1e-6)).clamp(max=1.0)
        steps = steps + 1
        taken = steps.double()
        first = first + (1 - b1) * (grad - first)
        second = b2 * second + (1 - b2) * grad * grad
        rate = rate * speeds
        down = second.sqrt() / (1 - b2**taken).sqrt().to(values) + request["eps"]
        values = values * (1 - rate * settings[1]) - rate / (1 - b1**taken).to(values) * first / down
        mean = [each + weight * (values - each) for each in mean]
        return [values, first, second, steps, *mean], score, norm

    def forward(
        self,
        state: list[Tensor],
        settings: Tensor,
        count: Tensor,
        rates: Tensor,
        weights: Tensor,
        each: list[Tensor],
        tables: list[Tensor],
        constants: list[Tensor],
    ) -> Any:
        """Returns the new state, and the scores and norm of each step, 0 after the last."""
        every = torch.arange(len(rates))
        zeros = torch.zeros_like(rates)

        def goes_on(k: Tensor, *_: Tensor) -> Tensor:
            return k < count

        def body(k: Tensor, scores: Tensor, norms: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            at = k.reshape(1)
            rate, weight, *inputs = (given.index_select(0, at)[0] for given in (rates, weights, *each))
            if tables:
                inputs = [*(table.index_select(0, inputs[0]) for table in tables), *inputs[1:]]
            found, score, norm = self.step(state, rate, weight, settings, [*inputs, *constants])
            here = every == k
            scores = torch.where(here.unsqueeze(-1), score.reshape(-1), scores)
            return k + 1, scores, torch.where(here, norm, norms), *found

        zero = torch.zeros((), dtype=torch.int64)
        scores = zeros.unsqueeze(-1).repeat(1, self.request["scores"])
        return while_loop(goes_on, body, (zero, scores, zeros, *state))[1:]


def main() -> None:
    """Compiles, and moves the result to its place as a whole."""
    os.nice(10)
    request = torch.load(sys.argv[1])
    torch.set_num_threads(request["threads"])
    torch._inductor.config.fallback_random = True  # the numbers of plain steps
    inputs = request["inputs"]
    made = os.path.join(os.path.dirname(sys.argv[1]), "made.pt2")
    with torch.no_grad():
        exported = torch.export.export(Loop(request), tuple(inputs))
        torch._inductor.aoti_compile_and_package(exported, package_path=made)
    os.replace(made, sys.argv[2])  # on the same disk, so at once


if __name__ == "__main__":
    main()
