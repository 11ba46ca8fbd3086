"""One vector field in every library that has continuous flows: the same weights, tolerance and exact divergence.

The field is a perceptron of ``t`` and ``x`` with two hidden layers [H, H] and tanh, with weights twice those of torch's
rule, so that there is something to integrate.  ``torchdiffeq`` is what one writes by hand with that library: a loop of
automatic differentiation for the trace, the adjoint with its seminorm, or gradients through the solver.  A builder
returns named calls; each library is imported only in the worker process that times it.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from _peers import Calls
from torch import Tensor, nn


class Case(NamedTuple):
    """Sizes of one comparison: dimensions, width, batch, tolerance."""

    dim: int
    width: int
    batch: int
    tolerance: float


class Plain(nn.Module):
    """The field as anyone would write it, counting its calls."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise((dim + 1, width, width, dim)))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(2.0)
        self.evaluations = 0

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        self.evaluations += 1
        h = torch.cat((x, t.expand(len(x), 1)), 1)
        for layer in self.layers[:-1]:
            h = torch.tanh(layer(h))
        return self.layers[-1](h)


def _stepping(field: nn.Module, log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], list[Tensor]]:
    """Value and gradient of the loss; returns the gradients, for comparison."""

    def step() -> list[Tensor]:
        field.zero_grad()
        (-log_prob(x).mean()).backward()
        return [parameter.grad for parameter in field.parameters()]

    return step


def _counting(field: Plain, log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], tuple[int, int]]:
    """Evaluations of the field in a step, forwards and backwards."""

    def count() -> tuple[int, int]:
        field.evaluations = 0
        loss = -log_prob(x).mean()
        forwards = field.evaluations
        loss.backward()
        return forwards, field.evaluations - forwards

    return count


def _start(case: Case) -> tuple[Plain, Tensor]:
    torch.manual_seed(0)
    return Plain(case.dim, case.width), torch.randn(case.batch, case.dim)


def _normal(z: Tensor) -> Tensor:
    return torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)


def ours(case: Case) -> Calls:
    import pyro_flows as pf

    plain, x = _start(case)
    tolerances = {"rtol": case.tolerance, "atol": case.tolerance}
    calls: Calls = {}
    for name, gradient, field in (("default", "auto", "mlp"), ("adjoint", "adjoint", "mlp"), ("module", "auto", plain)):
        flow = pf.Flow(pf.cnf(case.dim, field=field, hidden_dims=(case.width,) * 2, gradient=gradient, **tolerances))
        own = flow.chain[0].field
        if field == "mlp":
            with torch.no_grad():
                for mine, theirs in zip(own.layers, plain.layers, strict=True):
                    mine.weight.copy_(theirs.weight[:, : mine.weight.shape[1]])
                    mine.bias.copy_(theirs.bias)
                own.shifts.time.copy_(plain.layers[0].weight[:, -1])
        calls[name] = _stepping(flow, flow.log_prob, x)

        def count(flow: pf.Flow = flow) -> tuple[int, int]:
            (-flow.log_prob(x).mean()).backward()
            report = flow.chain[0].last_solve
            return report.evaluations, report.backward_evaluations

        calls[f"evaluations, {name}"] = count
        if name == "default":
            calls["log_prob"] = torch.no_grad()(lambda flow=flow: flow.log_prob(x))
            calls["sample"] = torch.no_grad()(lambda flow=flow: flow.sample((case.batch,)))
    return calls


def zuko(case: Case) -> Calls:
    from zuko.distributions import DiagNormal, NormalizingFlow
    from zuko.transforms import FreeFormJacobianTransform

    plain, x = _start(case)
    base = DiagNormal(torch.zeros(case.dim), torch.ones(case.dim))

    def flow() -> NormalizingFlow:
        options = {"phi": plain.parameters(), "atol": case.tolerance, "rtol": case.tolerance, "exact": True}
        return NormalizingFlow(FreeFormJacobianTransform(plain, 1.0, 0.0, **options), base)

    def log_prob(x: Tensor) -> Tensor:
        return flow().log_prob(x)

    return {
        "adjoint": _stepping(plain, log_prob, x),
        "evaluations, adjoint": _counting(plain, log_prob, x),
        "log_prob": torch.no_grad()(lambda: log_prob(x)),
        "sample": torch.no_grad()(lambda: flow().sample((case.batch,))),
    }


class _ByHand(nn.Module):
    """The field beside its trace, by one pass of automatic differentiation for each dimension."""

    def __init__(self, field: Plain) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        taped = torch.is_grad_enabled()
        with torch.enable_grad():
            x = state[0] if state[0].requires_grad else state[0].requires_grad_()
            v = self.field(t, x)
            parts = [
                torch.autograd.grad(v[:, i].sum(), x, create_graph=taped, retain_graph=True)[0][:, i]
                for i in range(x.shape[1])
            ]
        return v, sum(parts).unsqueeze(1)


def torchdiffeq(case: Case) -> Calls:
    from torchdiffeq import odeint, odeint_adjoint

    plain, x = _start(case)
    dynamics = _ByHand(plain)
    options = {"rtol": case.tolerance, "atol": case.tolerance, "method": "dopri5"}

    def solve(call: Callable[..., tuple[Tensor, Tensor]], x: Tensor, span: tuple[float, float], **more: object) -> list:
        start = (x.clone(), x.new_zeros(len(x), 1))
        return [each[-1] for each in call(dynamics, start, torch.tensor(span), **options, **more)]

    def adjoint(x: Tensor) -> Tensor:
        z, along = solve(odeint_adjoint, x, (1.0, 0.0), adjoint_options={"norm": "seminorm"})
        return _normal(z) + along[:, 0]

    def backprop(x: Tensor) -> Tensor:
        z, along = solve(odeint, x, (1.0, 0.0))
        return _normal(z) + along[:, 0]

    def sample() -> Tensor:  # without a trace, which nobody asked for
        z = torch.randn(case.batch, case.dim)
        return odeint(plain, z, torch.tensor((0.0, 1.0)), **options)[-1]

    return {
        "adjoint": _stepping(plain, adjoint, x),
        "backprop": _stepping(plain, backprop, x),
        "evaluations, adjoint": _counting(plain, adjoint, x),
        "evaluations, backprop": _counting(plain, backprop, x),
        "log_prob": torch.no_grad()(lambda: backprop(x)),
        "sample": torch.no_grad()(sample),
    }


LIBRARIES: dict[str, Callable[[Case], Calls]] = {"pyro_flows": ours, "zuko": zuko, "torchdiffeq": torchdiffeq}
