"""Every kind of layer, both directions, through torch.compile and torch.func, against plain autograd one at a time."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import Sinh, shake
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import pyro_flows as pf
from pyro_flows.univariate.base import number

F64, CONTEXT_DIM = torch.float64, 2

UNIVARIATES = {
    "shift": pf.univariate.Shift(),
    "affine": pf.univariate.Affine(),
    "spline": pf.Spline(3),
    "spline identity": pf.Spline(3, 2.0, "identity"),
    "own": Sinh(),
}


def sweeping(univariate: pf.univariate.Univariate, fast: str, **options: object) -> pf.FlowTransform:
    options = {"hidden_dims": (5, 4), "context_dim": CONTEXT_DIM, **options}
    return pf.Autoregressive(3, univariate, fast=fast, **options)


def causal(univariate: pf.univariate.Univariate, fast: str) -> pf.FlowTransform:
    options = {"hidden_channels": 3, "num_convolutions": 2, "context_dim": CONTEXT_DIM}
    return pf.transforms.CausalAutoregressive((2, 2), univariate, fast=fast, **options)


def coupling(univariate: pf.univariate.Univariate) -> pf.FlowTransform:
    return pf.Coupling(3, univariate, hidden_dims=(5,), context_dim=CONTEXT_DIM)


def conv_coupling(univariate: pf.univariate.Univariate) -> pf.FlowTransform:
    options = {"hidden_channels": 3, "num_blocks": 1, "activation": "elu", "context_dim": CONTEXT_DIM}
    return pf.ConvCoupling((2, 2, 2), univariate, **options)


def mint(shape: tuple[int, ...], **options: object) -> pf.FlowTransform:
    options = {"num_groups": 2, "hidden_dims": (4,), "tolerance": 1e-14, "context_dim": CONTEXT_DIM, **options}
    return pf.Mint(shape, **options)


LAYERS: dict[str, Callable[[], pf.FlowTransform]] = {}
for _name, _univariate in UNIVARIATES.items():
    for _fast in ("density", "sampling"):
        LAYERS[f"autoregressive {_fast}, {_name}"] = partial(sweeping, _univariate, _fast)
        LAYERS[f"causal {_fast}, {_name}"] = partial(causal, _univariate, _fast)
    LAYERS[f"coupling, {_name}"] = partial(coupling, _univariate)
    LAYERS[f"convolutional coupling, {_name}"] = partial(conv_coupling, _univariate)
LAYERS["coupling, circular"] = partial(coupling, pf.Spline(3, boundary="circular"))
LAYERS["autoregressive, residual"] = partial(
    sweeping, pf.univariate.Affine(), "density", residual=True, hidden_dims=(4, 4), activation="tanh"
)
LAYERS["autoregressive, no hidden layer"] = partial(sweeping, pf.Spline(3), "sampling", hidden_dims=())
LAYERS["mint"] = partial(mint, (2, 2, 2))
LAYERS["mint, attention"] = partial(mint, (1, 4), attention=1, head_dim=3)
DIRECTIONS = ["forward_and_ladj", "inverse_and_ladj"]


class Score(nn.Module):
    """A number for each event, from all that a direction of a layer gives."""

    def __init__(self, layer: pf.FlowTransform, direction: str) -> None:
        super().__init__()
        self.layer, self.direction = layer, direction

    def forward(self, value: Tensor, context: Tensor) -> Tensor:
        moved, ladj = getattr(self.layer, self.direction)(value, context)
        flat = moved.flatten(ladj.dim())
        weight = torch.linspace(1, 2, flat.shape[-1], dtype=flat.dtype)
        return (flat * weight + 0.5 * flat * flat).sum(-1) + 1.5 * ladj

    def states(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def at(self, parameters: dict[str, Tensor], value: Tensor, context: Tensor) -> Tensor:
        return functional_call(self, parameters, (value, context))


def make(layer: str, direction: str) -> tuple[Score, Tensor, Tensor]:
    """A layer far from where it starts, three events and their contexts."""
    score = Score(shake(LAYERS[layer]().double(), 0.4), direction)
    return score, torch.randn(3, *score.layer.event_shape, dtype=F64), torch.randn(3, CONTEXT_DIM, dtype=F64)


def one_by_one(score: Score, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Gradients of each event's score in the event, its context and the parameters, by plain autograd."""
    found = []
    for k in range(len(x)):
        inputs = (x[k : k + 1].clone().requires_grad_(), c[k : k + 1].clone().requires_grad_(), *score.parameters())
        total = score(*inputs[:2]).sum()
        by_x, by_c, *rest = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
        found.append((by_x[0], by_c[0], *rest))
    by_x, by_c, *rest = (torch.stack(each) for each in zip(*found, strict=True))
    return by_x, by_c, dict(zip(score.states(), rest, strict=True))


def curvatures(score: Score, x: Tensor, c: Tensor) -> Tensor:
    """The matrix of second derivatives in each event, by plain autograd, row by row."""
    found = []
    for k in range(len(x)):
        leaf = x[k : k + 1].clone().requires_grad_()
        slope = torch.autograd.grad(score(leaf, c[k : k + 1]).sum(), leaf, create_graph=True)[0].flatten()
        found.append(torch.stack([torch.autograd.grad(each, leaf, retain_graph=True)[0].flatten() for each in slope]))
    return torch.stack(found)


def same(found: object, wanted: object, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# torch.func


def per_sample_gradients(score: Score, x: Tensor, c: Tensor) -> None:
    found = vmap(grad(score.at), (None, 0, 0))(score.states(), x, c)
    same(found, one_by_one(score, x, c)[2])


def gradients_in_events_and_contexts(score: Score, x: Tensor, c: Tensor) -> None:
    same(vmap(grad(score.forward, (0, 1)))(x, c), one_by_one(score, x, c)[:2])
    same(vmap(grad(score.forward, (0, 1)), (None, 0))(x[0], c), one_by_one(score, x[:1].expand_as(x), c)[:2])


def ensemble(score: Score) -> tuple[list[Score], dict[str, Tensor], Callable[..., Tensor]]:
    members = [copy.deepcopy(score) for _ in range(2)]
    for member in members:
        shake(member, 0.1)
    weights, buffers = stack_module_state(members)
    return members, {name: weight.detach() for name, weight in weights.items()}, partial(_called, score, buffers)


def _called(score: Score, buffers: dict[str, Tensor], weights: dict[str, Tensor], *given: Tensor) -> Tensor:
    """Scores of one event or several by each member."""
    return vmap(lambda p, b: functional_call(score, (p, b), given))(weights, buffers)


def gradients_of_an_ensemble(score: Score, x: Tensor, c: Tensor) -> None:
    members, weights, call = ensemble(score)
    wanted = [one_by_one(member, x, c) for member in members]
    same(call(weights, x, c), torch.stack([member(x, c) for member in members]).detach())
    by_weights, by_x, by_c = grad(lambda *given: call(*given).sum(), (0, 1, 2))(weights, x, c)
    same(by_weights, {name: torch.stack([each[2][name].sum(0) for each in wanted]) for name in weights})
    same((by_x, by_c), tuple(sum(each[k] for each in wanted) for k in (0, 1)))


def gradients_of_an_ensemble_by_backward(score: Score, x: Tensor, c: Tensor) -> None:
    members, weights, call = ensemble(score)
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    total = call(leaves, x, c).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    wanted = [one_by_one(member, x, c)[2] for member in members]
    for name, each in zip(weights, found, strict=True):
        same(each, torch.stack([member[name].sum(0) for member in wanted]))


def per_sample_gradients_of_an_ensemble(score: Score, x: Tensor, c: Tensor) -> None:
    members, weights, _ = ensemble(score)
    found = vmap(vmap(grad(score.at), (None, 0, 0)), (0, None, None))(weights, x, c)
    wanted = [one_by_one(member, x, c)[2] for member in members]
    same(found, {name: torch.stack([each[name] for each in wanted]) for name in weights})


def curvatures_of_an_ensemble(score: Score, x: Tensor, c: Tensor) -> None:
    members, weights, _ = ensemble(score)
    found = vmap(hessian(score.at, 1), (0, None, None))(weights, x[0], c[0])
    wanted = torch.stack([curvatures(member, x[:1], c[:1])[0] for member in members])
    same(found.reshape(wanted.shape), wanted, 1e-7)


def hessians(score: Score, x: Tensor, c: Tensor) -> None:
    wanted = curvatures(score, x, c)
    same(vmap(hessian(score.forward))(x, c).reshape(wanted.shape), wanted, 1e-7)


def mixed_second_derivatives(score: Score, x: Tensor, c: Tensor) -> None:
    wanted = curvatures(score, x, c)
    for outer, inner in ((jacrev, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
        same(vmap(outer(inner(score.forward)))(x, c).reshape(wanted.shape), wanted, 1e-7)
    product = jvp(lambda v: grad(lambda v: score(v, c).sum())(v), (x,), (x,))[1]
    same(product.flatten(1), torch.einsum("nij,nj->ni", wanted, x.flatten(1)), 1e-7)


def jacobians_in_parameters(score: Score, x: Tensor, c: Tensor) -> None:
    wanted = one_by_one(score, x, c)[2]
    for transform in (jacrev, jacfwd):
        same(transform(score.at)(score.states(), x, c), wanted)


def forward_mode(score: Score, x: Tensor, c: Tensor) -> None:
    tangent = x.flip(0)
    wanted = (one_by_one(score, x, c)[0] * tangent).flatten(1).sum(1)
    value, found = jvp(lambda v: score(v, c), (x,), (tangent,))
    same(found, wanted)
    same(value, score(x, c).detach())
    same(vmap(lambda v, t, c: jvp(lambda v: score(v, c), (v,), (t,))[1])(x, tangent, c), wanted)
    with forward_ad.dual_level():
        same(forward_ad.unpack_dual(score(forward_ad.make_dual(x, tangent), c)).tangent, wanted)


def functionalized(score: Score, x: Tensor, c: Tensor) -> None:
    same(functionalize(score.forward)(x, c), score(x, c))


def few_events(score: Score, x: Tensor, c: Tensor) -> None:
    for n in (1, 0):
        found = grad(lambda *given: score.at(*given).sum(), (0, 1, 2))(score.states(), x[:n], c[:n])
        if n:
            by_x, by_c, by_weights = one_by_one(score, x[:1], c[:1])
            same(found, ({name: each[0] for name, each in by_weights.items()}, by_x, by_c))
        else:
            assert found[1].shape == x[:0].shape and found[2].shape == c[:0].shape
            assert all(not each.any() for each in found[0].values())


def single_precision(score: Score, x: Tensor, c: Tensor) -> None:
    wanted = one_by_one(score, x, c)
    score, x, c = score.float(), x.float(), c.float()
    found = (*vmap(grad(score.forward, (0, 1)))(x, c), vmap(grad(score.at), (None, 0, 0))(score.states(), x, c))
    for ours, theirs in zip(found[:2] + tuple(found[2].values()), wanted[:2] + tuple(wanted[2].values()), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() <= 1e-3 * (1 + theirs.abs().max())


# Autograd


def batched_gradients(score: Score, x: Tensor, c: Tensor) -> None:
    leaf, parameters = x.clone().requires_grad_(), score.states()
    by_x, *rest = torch.autograd.grad(
        score(leaf, c), [leaf, *score.parameters()], torch.eye(3, dtype=F64), is_grads_batched=True, allow_unused=True
    )
    wanted = one_by_one(score, x, c)
    same(by_x[range(3), range(3)], wanted[0])
    for name, found in zip(parameters, rest, strict=True):
        same(torch.zeros_like(wanted[2][name]) if found is None else found, wanted[2][name])
    rows = torch.autograd.functional.hessian(lambda v: score(v, c[:1]).sum(), x[:1], vectorize=True)
    same(rows.reshape(x[0].numel(), -1), curvatures(score, x[:1], c[:1])[0], 1e-7)


def second_derivatives(score: Score, x: Tensor, c: Tensor) -> None:
    """Of the slope in the event after the parameters, against a central difference."""
    directions = [torch.randn_like(each) for each in score.parameters()]

    def slopes(step: float = 0.0) -> Tensor:
        moved = {
            name: each + step * direction
            for (name, each), direction in zip(score.named_parameters(), directions, strict=True)
        }
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(score.at(moved, leaf, c).sum(), leaf, create_graph=True)[0].pow(2).sum()

    found = torch.autograd.grad(slopes(), list(score.parameters()), allow_unused=True, materialize_grads=True)
    total = sum((each * direction).sum() for each, direction in zip(found, directions, strict=True))
    numeric = (slopes(1e-5) - slopes(-1e-5)) / 2e-5
    assert (total - numeric).abs() <= 1e-5 * (1 + numeric.abs())


def checkpointed(score: Score, x: Tensor, c: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    total = checkpoint(score, leaf, c, use_reentrant=False).sum()
    found = torch.autograd.grad(total, [leaf, *score.parameters()], allow_unused=True, materialize_grads=True)
    wanted = one_by_one(score, x, c)
    same(found[0], wanted[0])
    same(list(found[1:]), [each.sum(0) for each in wanted[2].values()])


# torch.compile


def compiled(score: Score, x: Tensor, c: Tensor) -> None:
    torch._dynamo.reset()
    inputs = (x.clone().requires_grad_(), c.clone().requires_grad_(), *score.parameters())
    value = torch.compile(score, fullgraph=True, backend="aot_eager")(*inputs[:2])
    same(value, score(x, c))
    by_x, by_c, *rest = torch.autograd.grad(value.sum(), inputs, allow_unused=True, materialize_grads=True)
    wanted = one_by_one(score, x, c)
    same((by_x, by_c), wanted[:2])
    same(rest, [each.sum(0) for each in wanted[2].values()])


def compiled_parts(score: Score, x: Tensor, c: Tensor) -> None:
    """Where only the parameters, only the events, or nothing wants a gradient, and for other numbers of events."""
    torch._dynamo.reset()
    run = torch.compile(score, fullgraph=True, backend="aot_eager", dynamic=True)
    wanted = one_by_one(score, x, c)
    found = torch.autograd.grad(run(x, c).sum(), list(score.parameters()), allow_unused=True, materialize_grads=True)
    same(list(found), [each.sum(0) for each in wanted[2].values()])
    score.requires_grad_(False)
    for n in (3, 2, 1):
        leaf = x[:n].clone().requires_grad_()
        same(torch.autograd.grad(run(leaf, c[:n]).sum(), leaf)[0], wanted[0][:n])
    same(run(x, c), score(x, c))


def compiled_transforms(score: Score, x: Tensor, c: Tensor) -> None:
    torch._dynamo.reset()
    run = torch.compile(vmap(grad(score.at), (None, 0, 0)), fullgraph=True, backend="aot_eager")
    same(run(score.states(), x, c), one_by_one(score, x, c)[2])


TRANSFORMS = [
    per_sample_gradients,
    gradients_in_events_and_contexts,
    gradients_of_an_ensemble,
    gradients_of_an_ensemble_by_backward,
    per_sample_gradients_of_an_ensemble,
    curvatures_of_an_ensemble,
    hessians,
    mixed_second_derivatives,
    jacobians_in_parameters,
    forward_mode,
    functionalized,
    few_events,
    single_precision,
    batched_gradients,
    second_derivatives,
    checkpointed,
    compiled,
    compiled_parts,
    compiled_transforms,
]

# Without a mark: what sweeps with the kinds of gradient that a univariate can have; full: two compiled, two everywhere.
SWEEPS = [f"autoregressive density, {name}" for name in ("affine", "spline", "own")]
EVERYWHERE = [gradients_of_an_ensemble, hessians]
COMPILED = [(SWEEPS[1], compiled), (SWEEPS[0], compiled_transforms)]


def marks(layer: str, direction: str, transform: Callable[..., None]) -> list[object]:
    swept = layer in SWEEPS and direction == "forward_and_ladj"
    if transform in (compiled, compiled_parts, compiled_transforms):  # seconds each
        return [pytest.mark.full if swept and (layer, transform) in COMPILED else pytest.mark.slow]
    if swept:
        return []
    return [pytest.mark.full if transform in EVERYWHERE else pytest.mark.slow]


def cells() -> list[object]:
    return [
        pytest.param(
            layer,
            direction,
            transform,
            id=f"{layer}-{direction[:7]}-{transform.__name__}",
            marks=marks(layer, direction, transform),
        )
        for layer in LAYERS
        for direction in DIRECTIONS
        for transform in TRANSFORMS
    ]


@pytest.mark.parametrize(("layer", "direction", "transform"), cells())
def test_transform(layer, direction, transform):
    refused = (compiled_transforms, functionalized)
    if layer.startswith("mint") and direction == "forward_and_ladj" and transform in refused:
        with pytest.raises((Unsupported, NotImplementedError), match="iterative solve cannot go under functionalize"):
            transform(*make(layer, direction))
    else:
        transform(*make(layer, direction))


@pytest.mark.full
@pytest.mark.parametrize("mode", ["inference", "fake", "vmap", "compile"])
def test_constants_outlive_the_mode_they_were_made_in(mode):
    """Every later call would meet a tensor that belongs to a compiler, a transform or inference mode."""
    score, x, c = make("coupling, spline", "inverse_and_ladj")
    wanted = one_by_one(score, x, c)
    number.cache_clear()
    if mode == "inference":
        with torch.inference_mode():
            score(x, c)
    elif mode == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True):
            score(x, c)
    elif mode == "vmap":
        vmap(grad(score.forward))(x, c)
    else:
        compiled(score, x, c)
    same(vmap(grad(score.forward, (0, 1)))(x, c), wanted[:2])
    same(score(x.requires_grad_(), c), score(x, c))


@pytest.mark.full
@pytest.mark.parametrize("direction", ["inverse", "conditioned", "score"])
def test_views_compile_in_one_piece(direction):
    """Inverses and conditioned views, whose shapes and supports are those of another transform."""
    chain, context, x = pf.realnvp(4, num_layers=1, hidden_dims=(4,), context_dim=2), torch.ones(2), torch.randn(5, 4)
    flow = pf.Flow(chain)
    call = {
        "inverse": pf.Flow(pf.maf(4, num_layers=1, hidden_dims=(4,)).inv).score,
        "conditioned": lambda v: chain.condition(context).inverse_and_ladj(v)[0],
        "score": lambda v: flow(context).log_prob(v),
    }[direction]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x))
