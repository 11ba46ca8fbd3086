"""Flow matching: the field of a continuous flow by regression."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.core.chain import leaves
from pyro_flows.core.checks import choice, first_few, integer
from pyro_flows.core.transform import FlowTransform
from pyro_flows.distributions import Flow
from pyro_flows.infer.density.objective import Objective
from pyro_flows.infer.density.units import Density, is_plain_flow
from pyro_flows.infer.machine.randomness import own_randomness
from pyro_flows.transforms import Continuous

__all__ = ["FlowMatching", "Matching", "as_objective", "assigned", "matched_parts"]

# Pairs are cheap where events are small, so each of few rows is paired several times.
_STEP = (512, 2**15)  # in a step: pairs, or numbers in them
_HELD_OUT = (4096, 2**18)  # in a validation
_MOST = 16  # pairs of one row
_GROUP = 256  # pairs assigned at once, in cubic time


@dataclass(frozen=True)
class FlowMatching:
    r"""Flow matching, an objective of :func:`~pyro_flows.infer.density.fit.fit_density` for continuous flows.

    A row :math:`x_1`, at the field's end at the data, is paired with a draw :math:`x_0` of the base at the other end.
    The field, which must depend on time, learns the velocity of the straight path between them,

    .. math:: L = \mathrm{E} \tfrac1D \left| v(t, z_t, c) - (x_1 - x_0) \right|^2, \quad z_t = (1 - t) x_0 + t x_1 .

    The minimizer, the mean velocity of all paths through a place, takes the base to the data.  Each pair of a step
    costs one evaluation of the field, and no solve.  The likelihood rises, though it is not the objective.

    Args:
        coupling: the pairing of rows and draws in a batch.  ``"independent"``: as they come.  ``"optimal_transport"``:
            with the least :math:`\sum |x_1 - x_0|^2` in groups of up to 256 pairs, each draw used once, which makes
            paths straighter and solves cheaper; a group costs some milliseconds on the CPU.  Contexts are refused:
            pairs that ignore them give each context its own part of the base, unknown to sampling.
        time: the distribution of :math:`t`: ``"uniform"``, or ``"logit_normal"``, :math:`\mathrm{logit}\, t \sim N(0,
            1)`, with more of the middle, where regression is hard.
        sigma: the standard deviation of normal noise added to :math:`x_1` in each step, in units of the field's end at
            the data.  The flow learns the density of noisy data, bounded even on a grid or surface.
        pairs: draws, each at its own time, for a row in a step; by default from 1 to 16, as many as make 512 pairs, or
            32,768 numbers if that is less.

    Raises:
        ValueError: for other values.

    Example:
        >>> data = torch.randn(200, 2)
        >>> objective = pf.infer.FlowMatching(time="logit_normal")
        >>> fit = pf.fit_density(pf.cnf(2), data, objective=objective, steps=20)
        >>> fit.objective
        'flow_matching'

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
    pairs: int | None = None

    def __post_init__(self) -> None:
        choice("FlowMatching", "coupling", self.coupling, ("independent", "optimal_transport"))
        choice("FlowMatching", "time", self.time, ("uniform", "logit_normal"))
        number = isinstance(self.sigma, (int, float)) and not isinstance(self.sigma, bool)
        if not number or not 0 <= self.sigma < math.inf:
            raise ValueError(f"FlowMatching: expected sigma to be a number >= 0, got {self.sigma!r}")
        if self.pairs is not None:
            integer("FlowMatching", "pairs", self.pairs)

    def times(self, like: Tensor) -> Tensor:
        """Draws a time for each row, from ``rows`` equally likely intervals in random order."""
        n = len(like)
        order = torch.randperm(n, device=like.device)
        t = (order + torch.rand(n, dtype=like.dtype, device=like.device)) / max(n, 1)
        return t if self.time == "uniform" else torch.sigmoid(torch.special.ndtri(t))


def as_objective(given: str | FlowMatching) -> FlowMatching | None:
    """Returns the settings of flow matching, or ``None`` for the likelihood."""
    if isinstance(given, FlowMatching):
        return given
    choice("fit_density", "objective", given, ("likelihood", "flow_matching"), "a FlowMatching(...)")
    return FlowMatching() if given == "flow_matching" else None


def matched_parts(
    flow: Flow | Density, settings: FlowMatching
) -> tuple[list[FlowTransform], Continuous, list[FlowTransform]]:
    """Splits a flow around its only continuous part, and refuses flows that cannot be matched."""
    if not is_plain_flow(flow):
        raise ValueError(
            "fit_density: flow matching needs a flow transform, or a Flow, with a Continuous part, e.g. pf.cnf(2); "
            f"got a {type(flow).__name__}, whose density is its own"
        )
    parts = leaves(flow.chain)
    found = [(k, part) for k, part in enumerate(parts) if isinstance(part, Continuous)]
    if len(found) != 1:
        inside = not found and any(isinstance(module, Continuous) for module in flow.chain.modules())
        got = "one inside another part or an inverse, which runs another way" if inside else f"{len(found)} of them"
        raise ValueError(
            "fit_density: flow matching needs a chain with exactly one Continuous part, e.g. pf.cnf(2), to train; got "
            f"{got} among {[type(part).__name__ for part in parts]}; take one, or objective='likelihood'"
        )
    ((place, continuous),) = found
    if not continuous.field.time_dependent:
        raise ValueError(
            "fit_density: flow matching needs a field that depends on time, since the mean velocity of straight "
            "paths through a place changes with time, and its mean over all times does not take the base to the data; "
            "build it with time_dependent=True, or take objective='likelihood'"
        )
    own = {id(p) for p in continuous.field.parameters() if p.requires_grad}
    others = [name for name, p in flow.named_parameters() if p.requires_grad and id(p) not in own]
    if others:
        raise ValueError(
            "fit_density: flow matching trains the field alone, but parameters of the base or of other parts also want "
            f"a gradient: {first_few(others, 5)}; training them makes the "
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
            "so that each context would be learned from another part of the base than it is sampled from; take "
            "coupling='independent' for a flow with a context"
        )
    return parts[:place], continuous, parts[place + 1 :]


def repeats(rows: int, size: int, most: tuple[int, int]) -> int:
    """Counts the pairs of each row, within the ``most`` pairs and numbers."""
    return min(max(min(most[0], most[1] // size) // max(rows, 1), 1), _MOST)


@torch.no_grad()
def assigned(x0: Tensor, x1: Tensor) -> Tensor:
    """Reorders draws in groups, for the least sum of squared distances to the rows."""
    from scipy.optimize import linear_sum_assignment

    made, count = [], max(-(-len(x1) // _GROUP), 1)
    for draws, rows in zip(x0.tensor_split(count), x1.tensor_split(count), strict=True):
        # Squared distances, without terms common to every assignment.
        cost = -rows.flatten(1).double() @ draws.flatten(1).double().T
        order = torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1])
        made.append(draws[order.to(draws.device)])
    return torch.cat(made)


class Matching(Objective):
    """The negative matching loss: of random pairs in training, of several fixed pairs a row in validation."""

    density: Flow
    noun = "negative matching loss"
    beyond = "every parameter is finite, the velocity or its square is not"
    notable = 1e-4

    def __init__(self, settings: FlowMatching, density: Flow, seed: int, held_out: int) -> None:
        self.settings, self.density, self.seed = settings, density, seed
        self.before, self.continuous, self.after = matched_parts(density, settings)
        self.held_out = repeats(held_out, self.continuous.event_shape.numel(), _HELD_OUT)
        self.device = next(self.continuous.parameters()).device

    def fixed(self) -> AbstractContextManager[None]:
        # With the fit's own seed, pairs would repeat those of the first steps.
        return own_randomness(self.device, self.seed ^ 1)

    def scores(self, value: Tensor, context: Tensor | None) -> Tensor:
        settings, context = self.settings, self.density.inner_context(context)
        rows, pairs, x1 = len(value), self.held_out, value
        if self.density.training:
            pairs = settings.pairs or repeats(rows, self.continuous.event_shape.numel(), _STEP)
        with torch.no_grad():
            for part in reversed(self.after):
                x1 = part.inverse_and_ladj(x1, context if part.context_dim else None)[0]
            x1 = x1.repeat(pairs, *(1,) * (x1.dim() - 1))
            context = None if context is None else context.repeat(pairs, 1)
            x0 = self.density.base().sample(x1.shape[:1])
            for part in self.before:
                x0 = part.forward_and_ladj(x0, context if part.context_dim else None)[0]
            if settings.sigma:
                x1 = x1 + settings.sigma * torch.randn_like(x1)
            if settings.coupling == "optimal_transport":
                x0 = assigned(x0, x1)
            t, target = settings.times(x1), x1 - x0
            z = x0 + t.view(-1, *(1,) * (x1.dim() - 1)) * target
        v = self.continuous.field.at_times(t, z, context if self.continuous.context_dim else None)
        return -(v - target).square().flatten(1).mean(1).view(pairs, rows).mean(0)
