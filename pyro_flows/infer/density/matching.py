r"""Flow matching: the field of a continuous flow by regression, without a solve."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_flows.core import FlowTransform
from pyro_flows.distributions import Flow
from pyro_flows.infer.density.checkpoint import own_randomness
from pyro_flows.infer.density.data import Batch
from pyro_flows.infer.density.objective import Objective
from pyro_flows.infer.density.units import StandardizedFlow, flat_parts, is_plain_flow
from pyro_flows.nonfinite import nonfinite_state
from pyro_flows.transforms import Continuous

__all__ = ["FlowMatching", "Matching", "as_objective", "assigned", "matched_parts"]

_COUPLINGS = ("independent", "optimal_transport")
_TIMES = ("uniform", "logit_normal")
_HELD_OUT = 4096  # pairs of a validation: few held-out rows are each paired several times
_REPEATS = 16


@dataclass(frozen=True)
class FlowMatching:
    r"""Flow matching as the objective of :func:`~pyro_flows.infer.fit_density`, for flows with a continuous part.

    A row :math:`x_1`, as the field's end at the data sees it, is paired with a draw :math:`x_0` of the base, as its
    other end sees that.  The field is to have the velocity of the straight path between them,

    .. math:: L = \mathrm{E} \tfrac1D \left| v(t, z_t, c) - (x_1 - x_0) \right|^2, \quad z_t = (1 - t) x_0 + t x_1 ,

    whose minimiser, the mean velocity of all paths through a place, takes the base to the data.  A step costs one
    evaluation of the field for each row, and no solve.  The likelihood is not what is maximised, but follows.

    Args:
        coupling: how rows and draws are paired in a batch.  ``"independent"``: as they come.  ``"optimal_transport"``:
            so that :math:`\sum |x_1 - x_0|^2` is the least, each draw once, which makes paths straighter and solves
            cheaper, for :math:`O(n^3)` time at :math:`n` rows in a batch on the CPU (some 0.05 s at 1024).  Not with a
            context: pairs made without regard to it leave each context another part of the base, which sampling does
            not know of.
        time: the distribution of :math:`t`: ``"uniform"``, or ``"logit_normal"``, :math:`\mathrm{logit}\, t \sim
            N(0, 1)`, with more of the middle, where the regression is hard, and less of the ends.
        sigma: standard deviation of normal noise that is added to :math:`x_1` anew in each step: the density learnt is
            that of the data with it, which bounds the density of data on a grid or a surface.  In units of the field's
            end at the data, where standardised data have variance 1.

    Raises:
        ValueError: for other values.

    References:
        Flow Matching for Generative Modeling (Lipman et al., 2023), arXiv:2210.02747.
        Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow (Liu et al., 2023),
        arXiv:2209.03003.
        Building Normalizing Flows with Stochastic Interpolants (Albergo & Vanden-Eijnden, 2023), arXiv:2209.15571.
        Improving and generalizing flow-based generative models with minibatch optimal transport (Tong et al., 2024),
        arXiv:2302.00482.
        Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024), for
        ``"logit_normal"``, arXiv:2403.03206.
        The Curse of Conditions: Analyzing and Improving Optimal Transport for Conditional Flow-Based Generation (Cheng
        & Schwing, 2025), on optimal transport with contexts, arXiv:2503.10636.
    """

    coupling: str = "independent"
    time: str = "uniform"
    sigma: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("coupling", _COUPLINGS), ("time", _TIMES)):
            if getattr(self, name) not in known:
                raise ValueError(f"FlowMatching: expected {name} to be one of {known}, got {getattr(self, name)!r}")
        number = isinstance(self.sigma, (int, float)) and not isinstance(self.sigma, bool)
        if not number or not 0 <= self.sigma < math.inf:
            raise ValueError(f"FlowMatching: expected sigma to be a number >= 0, got {self.sigma!r}")

    def times(self, like: Tensor) -> Tensor:
        """One time for each row: one in each of so many equally likely parts, in random order."""
        n = len(like)
        order = torch.randperm(n, device=like.device)
        t = (order + torch.rand(n, dtype=like.dtype, device=like.device)) / max(n, 1)
        return t if self.time == "uniform" else torch.sigmoid(torch.special.ndtri(t))


def as_objective(given: object) -> FlowMatching | None:
    """The settings of flow matching, or ``None`` for the likelihood."""
    if isinstance(given, FlowMatching):
        return given
    if not isinstance(given, str) or given not in ("likelihood", "flow_matching"):
        raise ValueError(
            f"fit_density: expected objective to be 'likelihood', 'flow_matching' or a FlowMatching(...), got {given!r}"
        )
    return FlowMatching() if given == "flow_matching" else None


def matched_parts(
    flow: nn.Module, settings: FlowMatching
) -> tuple[list[FlowTransform], Continuous, list[FlowTransform]]:
    """The parts at the base end, the continuous one, and those at the data end; refuses what cannot be matched."""
    if not is_plain_flow(flow):
        raise ValueError(
            "fit_density: flow matching needs a flow transform, or a Flow, with a Continuous part, e.g. pf.cnf(2); "
            f"got a {type(flow).__name__}, whose density is its own"
        )
    parts = flat_parts(flow.chain)
    places = [k for k, part in enumerate(parts) if isinstance(part, Continuous)]
    if len(places) != 1:
        inside = not places and any(isinstance(module, Continuous) for module in flow.chain.modules())
        got = "one inside another part or an inverse, which runs another way" if inside else f"{len(places)} of them"
        raise ValueError(
            "fit_density: flow matching needs a chain with exactly one Continuous part, e.g. pf.cnf(2), to train; got "
            f"{got} among {[type(part).__name__ for part in parts]}; take one, or objective='likelihood'"
        )
    continuous = parts[places[0]]
    own = {id(p) for p in continuous.field.parameters() if p.requires_grad}
    others = [name for name, p in flow.named_parameters() if p.requires_grad and id(p) not in own]
    if others:
        raise ValueError(
            "fit_density: flow matching trains the field alone, but parameters of the base or of other parts want a "
            f"gradient, too: {', '.join(others[:5])}{', …' if len(others) > 5 else ''}; moved, these would make the "
            "regression easy and the density wrong: freeze them (part.requires_grad_(False)) or leave them out"
        )
    if not own:
        raise ValueError(
            "fit_density: flow matching trains the field alone, and it has no trainable parameters; if it was frozen, "
            "call its requires_grad_(True)"
        )
    if flow.context_dim and settings.coupling == "optimal_transport":
        raise ValueError(
            "fit_density: coupling='optimal_transport' pairs rows with draws of the base without regard to contexts, "
            "so that each context would be learnt from another part of the base than it is sampled from; take "
            "coupling='independent' for a flow with a context"
        )
    return parts[: places[0]], continuous, parts[places[0] + 1 :]


@torch.no_grad()
def assigned(x0: Tensor, x1: Tensor, size: int | None = None) -> Tensor:
    """Draws in the sequence in which they are nearest to the rows in all: the least sum of squared distances.

    Args:
        x0: draws, shape ``(n, *event_shape)``.
        x1: rows, of the same shape.
        size: rows that are paired among themselves at most; all by default.
    """
    from scipy.optimize import linear_sum_assignment

    count = 1 if size is None else -(-len(x1) // size)
    made = []
    for draws, rows in zip(x0.tensor_split(count), x1.tensor_split(count), strict=True):
        # Squared distances up to what each row and each draw adds to all sums alike.
        cost = -rows.flatten(1).double() @ draws.flatten(1).double().T
        order = torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1])
        made.append(draws[order.to(draws.device)])
    return torch.cat(made)


class Matching(Objective):
    """The negative of the matching loss; random in training, by several fixed pairs a row in validation.

    Args:
        settings: of the pairs.
        model: the flow in the units of the data.
        seed: of the fixed pairs.
        held_out: rows of a validation.
        size: rows that are paired in a step, and so in validation.
    """

    noun = "negative matching loss"
    beyond = "every parameter is finite, the velocity or its square is not"
    notable = 1e-4

    def __init__(self, settings: FlowMatching, model: Flow, seed: int, held_out: int, size: int) -> None:
        self.settings, self.model, self.seed, self.size = settings, model, seed, size
        self.before, self.continuous, self.after = matched_parts(model, settings)
        self.repeats = min(max(_HELD_OUT // max(held_out, 1), 1), _REPEATS)
        self.device = next(self.continuous.parameters()).device

    def fixed(self) -> AbstractContextManager[None]:
        # Not the seed of the fit, with whose first draws those of its steps begin.
        return own_randomness(self.device, self.seed ^ 1)

    def scores(self, value: Tensor, context: Tensor | None) -> Tensor:
        if isinstance(self.model, StandardizedFlow):
            context = self.model.scaled(context)
        with torch.no_grad():
            for part in reversed(self.after):
                value = part.inverse_and_ladj(value, context if part.context_dim else None)[0]
        if self.model.training:
            return self._once(value, context, None)
        return sum(self._once(value, context, self.size) for _ in range(self.repeats)) / self.repeats

    def _once(self, x1: Tensor, context: Tensor | None, size: int | None) -> Tensor:
        settings = self.settings
        with torch.no_grad():
            x0 = self.model.base().sample(x1.shape[:1])
            for part in self.before:
                x0 = part.forward_and_ladj(x0, context if part.context_dim else None)[0]
            if settings.sigma:
                x1 = x1 + settings.sigma * torch.randn_like(x1)
            if settings.coupling == "optimal_transport":
                x0 = assigned(x0, x1, size)
            t, target = settings.times(x1), x1 - x0
            z = x0 + t.view(-1, *(1,) * (x1.dim() - 1)) * target
        v = self.continuous.field.at_times(t, z, context if self.continuous.context_dim else None)
        return -(v - target).square().flatten(1).mean(1)

    def first_nonfinite(self, batch: Batch) -> str | None:
        return nonfinite_state(self.model)
