"""NUTS in the base of a guide's flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.mcmc import NUTS
from torch import Tensor

from pyro_flows.distributions import Flow
from pyro_flows.infer.chains.base_density import BaseDensity
from pyro_flows.infer.diagnostics.settling import ChainDraws, judge_chains, settling
from pyro_flows.infer.diagnostics.verdict import Verdict
from pyro_flows.infer.models.joint import JointDensity
from pyro_flows.infer.search.climb import SafeDensity

__all__ = ["BaseChains"]


class BaseChains:
    """Chains of Pyro's NUTS, one after another, on a posterior in the base of a flow.

    Args:
        flow: a flow near the posterior.
        density: the posterior's log-density of latents, never raising.
        starts: base-side points at which chains begin, ``(chains, D)``.
    """

    def __init__(self, flow: Flow, density: SafeDensity, starts: Tensor) -> None:
        self.flow, self.starts = flow, starts
        self.target = BaseDensity(flow, density)
        self.kept: list[list[Tensor]] = []
        self.divergences = 0

    def _potential(self, params: dict[str, Tensor]) -> Tensor:
        return -_Sloped.apply(params["u"], *(part[0] for part in self.target(params["u"].detach().unsqueeze(0))))

    def run(self, num_samples: int, warmup_steps: int, report: Callable[[float, str], None]) -> None:
        """Makes draws of each chain after its warm-up."""
        every = num_samples + warmup_steps
        for number, start in enumerate(self.starts):
            kernel: Any = NUTS(potential_fn=self._potential)
            kernel.initial_params = state = {"u": start.clone()}
            kernel.setup(warmup_steps)
            self.kept.append([])
            for k in range(every):
                state = kernel.sample(state)
                if k >= warmup_steps:
                    self.kept[-1].append(state["u"].detach())
                report((number + (k + 1) / every) / len(self.starts), f"chain {number + 1}")
            self.divergences += len(kernel.diagnostics()["divergences"])

    @property
    def ready(self) -> bool:
        """Whether there are draws to judge."""
        return max(map(len, self.kept), default=0) >= 4

    def result(self, density: JointDensity, stopped: str = "") -> tuple[ChainDraws, Verdict]:
        """Returns the draws of whole chains, or of the only one, and the verdict."""
        longest = max(map(len, self.kept))
        u = torch.stack([torch.stack(chain) for chain in self.kept if len(chain) == longest])
        flat, shape = u.flatten(0, 1), u.shape[:2]
        with torch.no_grad():
            z, ladj = self.flow.chain.forward_and_ladj(flat)
            log_q = (self.flow.base().log_prob(flat) - ladj).double().unflatten(0, shape)
        log_p = SafeDensity(density, z).values(z).to(z.device).unflatten(0, shape)
        latents = z.unflatten(0, shape)
        found = settling(torch.cat([latents.double(), log_p.unsqueeze(-1)], -1))
        draws = ChainDraws(latents, log_p, log_q, found.effective, found.rhat, self.divergences, "nuts")
        return draws, judge_chains(found, draws, stopped=stopped)


class _Sloped(torch.autograd.Function):
    """Gives a value its known gradient."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.to(u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None
