"""The same masked autoregressive flow in every library, behind one interface.

Every layer is a MADE with hidden layers [H, H], ReLU and an affine head, with density as the direction of one pass.  A
builder returns named calls; each library is imported only in the worker process that times it.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

Calls = dict[str, Callable[[], object]]


class Case(NamedTuple):
    """Sizes of one comparison: dimensions, width, layers, batch."""

    dim: int
    width: int
    layers: int
    batch: int


def sizes(case: Case) -> str:
    return ", ".join(map(str, case))


def _trainer(model: nn.Module, log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        loss = -log_prob(x).mean()
        loss.backward()
        optimizer.step()

    return step


def _density_gradient(
    log_prob: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor
) -> Callable[[], object]:
    def run() -> object:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(log_prob(leaf).sum(), [leaf, *parameters])

    return run


def _sample_gradient(
    solve: Callable[[Tensor], tuple[Tensor, Tensor]], parameters: list[Tensor], z: Tensor
) -> Callable[[], object]:
    weight = torch.randn_like(z)

    def run() -> object:
        leaf = z.clone().requires_grad_()
        x, ladj = solve(leaf)
        return torch.autograd.grad((x * weight).sum() + ladj.sum(), [leaf, *parameters])

    return run


def frozen(fn: Callable[[Tensor], object], value: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return fn(value)

    return run


def flow_calls(
    model: nn.Module, log_prob: Callable[[Tensor], Tensor], solve: Callable[[Tensor], tuple[Tensor, Tensor]], case: Case
) -> Calls:
    x, z = torch.randn(case.batch, case.dim), torch.randn(case.batch, case.dim)
    parameters = list(model.parameters())
    return {
        "sample": frozen(solve, z),
        "log_prob": frozen(log_prob, x),
        "train": _trainer(model, log_prob, x),
        "density_gradient": _density_gradient(log_prob, parameters, x),
        "sample_gradient": _sample_gradient(solve, parameters, z),
    }


def chain_calls(chain: nn.Module, case: Case) -> Calls:
    """A chain of this package as a flow, by the distribution that Pyro makes of it."""
    import pyro.distributions as dist

    base = dist.Normal(torch.zeros(case.dim), torch.ones(case.dim)).to_event(1)
    flow = dist.TransformedDistribution(base, [chain])
    return flow_calls(chain, flow.log_prob, chain.forward_and_ladj, case)


def ours(case: Case) -> Calls:
    import pyro_flows as pf

    chain = pf.maf(case.dim, num_layers=case.layers, hidden_dims=(case.width,) * 2, activation="relu")
    with torch.no_grad():
        for layer in chain:  # as the others start: away from the identity
            layer.net.tensors()[0][-1].normal_(std=case.width**-0.5 / 3)
    calls = chain_calls(chain, case)
    parts: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise((case.dim, case.width, case.width, 2 * case.dim)):
        parts += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    dense = nn.Sequential(*parts[:-1])

    def passes(value: Tensor) -> None:
        for _ in range(case.layers):
            dense(value)

    return calls | {"dense_pass": frozen(passes, torch.randn(case.batch, case.dim))}


def pyro(case: Case) -> Calls:
    import pyro.distributions.transforms as transforms

    layers = nn.ModuleList(
        transforms.affine_autoregressive(case.dim, hidden_dims=[case.width] * 2) for _ in range(case.layers)
    )
    return pyro_calls(layers, "_cached_log_scale", case)


def pyro_calls(layers: nn.ModuleList, ladj: str, case: Case) -> Calls:
    """Pyro's autoregressive layers as a flow; ``ladj`` is where a layer leaves the log-slopes of its last call."""
    import pyro.distributions as dist

    base = dist.Normal(torch.zeros(case.dim), torch.ones(case.dim)).to_event(1)
    flow = dist.TransformedDistribution(base, [layer.inv for layer in reversed(layers)])

    def log_prob(x: Tensor) -> Tensor:
        flow.clear_cache()
        return flow.log_prob(x.view_as(x))  # a new object: the cache goes by identity and would return old values

    def solve(z: Tensor) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(z.shape[:-1])
        for layer in reversed(layers):
            z = layer._inverse(z)
            total = total - getattr(layer, ladj).sum(-1)
        return z, total

    return flow_calls(layers, log_prob, solve, case)


def zuko(case: Case) -> Calls:
    import zuko

    return zuko_calls(zuko.flows.MAF(case.dim, transforms=case.layers, hidden_features=(case.width,) * 2), case)


def zuko_calls(flow: nn.Module, case: Case) -> Calls:
    def solve(z: Tensor) -> tuple[Tensor, Tensor]:
        return flow.transform(None).inv.call_and_ladj(z)

    return flow_calls(flow, lambda x: flow().log_prob(x), solve, case)


def nflows_calls(parts: Sequence[nn.Module], case: Case) -> Calls:
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.transforms import CompositeTransform

    chain = CompositeTransform(parts)
    flow = Flow(chain, StandardNormal([case.dim]))
    return flow_calls(flow, flow.log_prob, chain.inverse, case)


def nflows(case: Case) -> Calls:
    from nflows import transforms

    parts: list[nn.Module] = []
    for k in range(case.layers):
        if k:
            parts.append(transforms.ReversePermutation(case.dim))
        parts.append(
            transforms.MaskedAffineAutoregressiveTransform(
                case.dim, case.width, num_blocks=1, use_residual_blocks=False
            )
        )
    return nflows_calls(parts, case)


def normflows(case: Case) -> Calls:
    import normflows

    parts: list[nn.Module] = []
    for k in range(case.layers):
        if k:
            parts.append(normflows.flows.Permute(case.dim, mode="swap"))
        made = normflows.flows.MaskedAffineAutoregressive(case.dim, case.width, num_blocks=1, use_residual_blocks=False)
        parts.append(normflows.flows.Reverse(made))
    return normflows_calls(parts, case)


def normflows_calls(parts: Sequence[nn.Module], case: Case) -> Calls:
    import normflows

    flow = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(case.dim, trainable=False), parts)
    return flow_calls(flow, flow.log_prob, flow.forward_and_log_det, case)


LIBRARIES: dict[str, Callable[[Case], Calls]] = {
    "pyro_flows": ours,
    "pyro": pyro,
    "zuko": zuko,
    "nflows": nflows,
    "normflows": normflows,
}
