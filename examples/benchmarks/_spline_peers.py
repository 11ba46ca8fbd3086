"""Rational-quadratic splines in every library, behind one interface: the spline alone, and flows made of it.

All have eight bins on [-5, 5] and the identity beyond.  Networks have hidden layers [H, H] and ReLU.  A builder returns
named calls; each library is imported only in the worker process that times it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from _peers import Calls, Case, chain_calls, frozen, nflows_calls, normflows_calls, pyro_calls, zuko_calls
from torch import Tensor, nn

BINS, BOUND = 8, 5.0
SIZES = [BINS, BINS, BINS - 1]

Move = Callable[[Tensor, Tensor], object]


class Task(NamedTuple):
    """What to build: the ``op``, or flows of ``coupling`` or ``autoregressive`` layers."""

    kind: str
    case: Case


def _op_calls(forward: Move, inverse: Move, case: Case, rows: bool = False) -> Calls:
    """Calls of a spline whose parameters lie last in memory, or with ``rows`` before the dimensions."""
    x = 2 * torch.randn(case.batch, case.dim)
    params = torch.randn(case.batch, case.dim, sum(SIZES))
    if rows:
        params = params.transpose(-1, -2).contiguous()
    upper = (torch.randn_like(x), torch.randn_like(x))

    def seen(raw: Tensor) -> Tensor:
        return raw.transpose(-1, -2) if rows else raw

    def both() -> object:
        leaves = x.detach().requires_grad_(), params.detach().requires_grad_()
        return torch.autograd.grad(forward(leaves[0], seen(leaves[1])), leaves, upper)

    return {
        "forward and backward": both,
        "forward": frozen(lambda value: forward(value, seen(params)), x),
        "inverse": frozen(lambda value: inverse(value, seen(params)), x),
    }


def _ours_op(case: Case) -> Calls:
    import pyro_flows as pf

    spline = pf.Spline(BINS, BOUND, "identity")
    calls = _op_calls(spline.forward, spline.inverse, case, rows=True)  # as the conditioners here give them
    others = _op_calls(spline.forward, spline.inverse, case)
    return calls | {f"{name}, parameters last": call for name, call in others.items()}


def _pyro_op(case: Case) -> Calls:
    from pyro.distributions.transforms.spline import _monotonic_rational_spline

    def move(inverse: bool, x: Tensor, params: Tensor) -> object:  # as in its ConditionalSpline of quadratic order
        w, h, d = params.split(SIZES, -1)
        w, h, d = F.softmax(w, -1), F.softmax(h, -1), F.softplus(d)
        return _monotonic_rational_spline(x, w, h, d, inverse=inverse, bound=BOUND)

    return _op_calls(functools.partial(move, False), functools.partial(move, True), case)


def _zuko_op(case: Case) -> Calls:
    from zuko.transforms import MonotonicRQSTransform

    def transform(params: Tensor) -> MonotonicRQSTransform:
        return MonotonicRQSTransform(*params.split(SIZES, -1), bound=BOUND)

    return _op_calls(
        lambda x, params: transform(params).call_and_ladj(x),
        lambda y, params: transform(params).inv.call_and_ladj(y),
        case,
    )


def _durkan_op(spline: Callable[..., object], case: Case) -> Calls:
    """For the two libraries that have the code of the paper's authors."""

    def move(inverse: bool, x: Tensor, params: Tensor) -> object:
        return spline(x, *params.split(SIZES, -1), inverse=inverse, tails="linear", tail_bound=BOUND)

    return _op_calls(functools.partial(move, False), functools.partial(move, True), case)


def _nflows_op(case: Case) -> Calls:
    from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline

    return _durkan_op(unconstrained_rational_quadratic_spline, case)


def _normflows_op(case: Case) -> Calls:
    from normflows.utils.splines import unconstrained_rational_quadratic_spline

    return _durkan_op(unconstrained_rational_quadratic_spline, case)


def _with_count(calls: Calls, model: nn.Module) -> Calls:
    return calls | {"parameters": lambda: sum(p.numel() for p in model.parameters())}


def _ours_flow(case: Case, autoregressive: bool) -> Calls:
    import pyro_flows as pf

    hidden = (case.width, case.width)
    options = {"num_layers": case.layers, "hidden_dims": hidden, "activation": "relu"}
    chain = pf.nsf(case.dim, autoregressive=autoregressive, bins=BINS, bound=BOUND, boundary="identity", **options)
    with torch.no_grad():
        for layer in chain:  # as the others start: away from the identity
            last = layer.net.tensors()[0][-1] if autoregressive else layer.net.layers[-1].weight
            last.normal_(std=case.width**-0.5 / 3)
    return _with_count(chain_calls(chain, case), chain)


def _pyro_autoregressive(case: Case) -> Calls:
    from pyro.distributions.transforms import SplineAutoregressive
    from pyro.nn import AutoRegressiveNN

    # Put together by hand: Pyro's helper makes parameters for the linear order only.
    layers = nn.ModuleList()
    for _ in range(case.layers):
        net = AutoRegressiveNN(case.dim, [case.width] * 2, param_dims=SIZES)
        layers.append(SplineAutoregressive(case.dim, net, count_bins=BINS, bound=BOUND, order="quadratic"))
    return _with_count(pyro_calls(layers, "_cache_log_detJ", case), layers)


def _zuko_flow(case: Case, autoregressive: bool) -> Calls:
    import zuko

    passes = None if autoregressive else 2
    hidden = (case.width, case.width)
    flow = zuko.flows.NSF(case.dim, bins=BINS, transforms=case.layers, hidden_features=hidden, passes=passes)
    return _with_count(zuko_calls(flow, case), flow)


class _Conditioner(nn.Sequential):
    """A plain network, as the other libraries' couplings want it: they also take their scale from its width."""

    def __init__(self, case: Case, inputs: int, outputs: int) -> None:
        width = self.hidden_features = case.width
        super().__init__(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
        )

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return super().forward(x)


def _nflows_coupling(case: Case) -> Calls:
    from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform
    from nflows.utils.torchutils import create_alternating_binary_mask

    net = functools.partial(_Conditioner, case)
    options = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    masks = [create_alternating_binary_mask(case.dim, even=k % 2 == 0) for k in range(case.layers)]
    parts = nn.ModuleList(PiecewiseRationalQuadraticCouplingTransform(mask, net, **options) for mask in masks)
    return _with_count(nflows_calls(parts, case), parts)


def _nflows_autoregressive(case: Case) -> Calls:
    from nflows.transforms import MaskedPiecewiseRationalQuadraticAutoregressiveTransform, ReversePermutation

    options = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND, "num_blocks": 1, "use_residual_blocks": False}
    parts: list[nn.Module] = []
    for k in range(case.layers):
        if k:
            parts.append(ReversePermutation(case.dim))
        parts.append(MaskedPiecewiseRationalQuadraticAutoregressiveTransform(case.dim, case.width, **options))
    return _with_count(nflows_calls(parts, case), nn.ModuleList(parts))


def _normflows_coupling(case: Case) -> Calls:
    import normflows

    layers = nn.ModuleList()
    for k in range(case.layers):
        layer = normflows.flows.CoupledRationalQuadraticSpline(
            case.dim, 1, case.width, num_bins=BINS, tail_bound=BOUND, reverse_mask=k % 2 == 0
        )
        inner = layer.prqct  # its own network has residual blocks, with one more matrix
        outputs = inner.num_transform_features * sum(SIZES)
        inner.transform_net = _Conditioner(case, inner.num_identity_features, outputs)
        layers.append(layer)
    return _with_count(normflows_calls(layers, case), layers)


BUILDERS: dict[str, dict[str, Callable[[Case], Calls]]] = {
    "op": {
        "pyro_flows": _ours_op,
        "pyro": _pyro_op,
        "zuko": _zuko_op,
        "nflows": _nflows_op,
        "normflows": _normflows_op,
    },
    "coupling": {
        "pyro_flows": functools.partial(_ours_flow, autoregressive=False),
        "zuko": functools.partial(_zuko_flow, autoregressive=False),
        "nflows": _nflows_coupling,
        "normflows": _normflows_coupling,
    },
    "autoregressive": {
        "pyro_flows": functools.partial(_ours_flow, autoregressive=True),
        "pyro": _pyro_autoregressive,
        "zuko": functools.partial(_zuko_flow, autoregressive=True),
        "nflows": _nflows_autoregressive,
    },
}


def _build(name: str, task: Task) -> Calls:
    return BUILDERS[task.kind][name](task.case)


SPLINES = {name: functools.partial(_build, name) for name in BUILDERS["op"]}
