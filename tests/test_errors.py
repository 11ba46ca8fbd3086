"""What goes wrong says what was expected, what came, and what to do; and a call that fails leaves no trace."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import AffineTransform, ExpTransform

import pyro_flows as pf

FLOWS = {
    "maf": pf.maf(3, num_layers=2, hidden_dims=(8,)),
    "iaf": pf.iaf(3, num_layers=2, hidden_dims=(8,)),
    "realnvp": pf.realnvp(3, num_layers=2, hidden_dims=(8,)),
    "nice": pf.nice(3, num_layers=2, hidden_dims=(8,)),
}
CONDITIONAL = {
    "maf": pf.maf(3, context_dim=2, num_layers=2, hidden_dims=(8,)),
    "iaf": pf.iaf(3, context_dim=2, num_layers=2, hidden_dims=(8,)),
    "realnvp": pf.realnvp(3, context_dim=2, num_layers=2, hidden_dims=(8,)),
    "nice": pf.nice(3, context_dim=2, num_layers=2, hidden_dims=(8,)),
}
IMAGE = pf.realnvp((2, 3), num_layers=2, hidden_dims=(8,))
LEAF = pf.Coupling(3)
ONE = torch.ones(3)
TWO = torch.ones(2)


def adjacency(*rows):
    return torch.tensor(rows, dtype=torch.bool)


# Calls on a flow: (call, exception, what its message says).
VALUES = {
    "event size": (
        lambda f: f.inv(torch.ones(5, 4)),
        ValueError,
        r"expected .*last dimension 3 \(input_dim\).*\(5, 4\)",
    ),
    "event size, forward": (lambda f: f(torch.ones(4)), ValueError, r"last dimension 3 \(input_dim\).*\(4,\)"),
    "no dimension": (lambda f: f(torch.tensor(1.0)), ValueError, r"last dimension 3.*got shape \(\)"),
    "size one": (lambda f: f.inv(torch.ones(5, 1)), ValueError, r"last dimension 3.*\(5, 1\)"),
    "context that is not taken": (lambda f: f.forward_and_ladj(ONE, TWO), ValueError, "context_dim=0.*leave it out"),
    "float64 value": (
        lambda f: f(ONE.double()),
        TypeError,
        r"float64.*parameters are torch.float32.*\.to\(torch.float32\)",
    ),
    "half value": (lambda f: f.inv(ONE.half()), TypeError, "float16.*parameters are torch.float32"),
    "integers": (lambda f: f(torch.ones(3, dtype=torch.long)), TypeError, r"floating-point.*int64.*\.float\(\)"),
    "booleans": (lambda f: f.inv(torch.ones(3, dtype=torch.bool)), TypeError, "floating-point.*bool"),
    "complex": (lambda f: f.inv(torch.ones(3, dtype=torch.cfloat)), TypeError, "floating-point.*complex"),
    "no tensor": (lambda f: f([1.0, 2.0, 3.0]), TypeError, "expected a tensor, got list"),
    "another device": (
        lambda f: f(torch.ones(3, device="meta")),
        ValueError,
        "value is on meta.*parameters are on cpu",
    ),
    "condition": (lambda f: f.condition(TWO), ValueError, r"context_dim=0.*Chain\(\[\.\.\.\]\)"),
    "event size of the distribution": (
        lambda f: pf.Flow(f)().log_prob(torch.ones(5, 4)),
        ValueError,
        r"\(5, 4\)|value argument|last dimension|event",
    ),
    "shape too small": (lambda f: f.forward_shape(()), ValueError, r"at least 1 dimensions, got shape \(\)"),
    "shape": (lambda f: f.inverse_shape((2, 4)), ValueError, r"last dimension 3.*\(2, 4\)"),
}
CONTEXTS = {
    "missing": (lambda f: f(ONE), ValueError, r"built with context_dim=2: .*call \.condition\(context\) first"),
    "missing, inverse": (lambda f: f.inv(ONE), ValueError, r"context_dim=2: .*call \.condition\(context\) first"),
    "size": (lambda f: f.condition(ONE), ValueError, r"context with last dimension 2 \(context_dim\).*\(3,\)"),
    "size, as an argument": (lambda f: f.forward_and_ladj(ONE, ONE), ValueError, r"last dimension 2.*\(3,\)"),
    "no dimension": (lambda f: f.condition(torch.tensor(1.0)), ValueError, r"last dimension 2.*\(\)"),
    "no tensor": (lambda f: f.condition([1.0, 2.0]), TypeError, "expected a tensor as context, got list"),
    "float64": (lambda f: f.condition(TWO.double()), TypeError, "the context is torch.float64"),
    "another device": (lambda f: f.condition(torch.ones(2, device="meta")), ValueError, "the context is on meta"),
    "batches": (
        lambda f: f.condition(torch.ones(4, 2)).inv(torch.ones(5, 3)),
        ValueError,
        r"\(5,\) of the value and \(4,\) of the context do not broadcast",
    ),
    "twice": (lambda f: f.condition(TWO).condition(TWO), ValueError, r"bound to a context already.*\.transform"),
    "flow without": (lambda f: pf.Flow(f)(), ValueError, r"context_dim=2: call it with a context"),
    "log_prob without": (lambda f: pf.Flow(f).log_prob(ONE), ValueError, r"context_dim=2: call it with a context"),
    "distribution without": (
        lambda f: dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [f]).sample(),
        ValueError,
        r"context_dim=2: .*call \.condition\(context\) first",
    ),
}
CYCLE = adjacency([0, 0, 1], [1, 0, 0], [0, 1, 0])
DIAGONAL = adjacency([0, 0, 0], [1, 1, 0], [1, 1, 0])
BUILDS = {
    "order, repeated": (lambda: pf.maf(3, order=[0, 1, 1]), ValueError, r"permutation of 0\.\.2, got \[0, 1, 1\]"),
    "order, short": (lambda: pf.iaf(3, order=[0, 1]), ValueError, r"permutation of 0\.\.2, got \[0, 1\]"),
    "order, floats": (lambda: pf.maf(3, order=torch.tensor([0.0, 1.0, 2.0])), ValueError, "permutation of"),
    "order, name": (lambda: pf.maf(3, order="sorted"), ValueError, "'identity', 'reverse', 'random'.*'sorted'"),
    "adjacency, cycle": (lambda: pf.maf(3, adjacency=CYCLE), ValueError, r"without cycles.*\[0, 1, 2\]"),
    "adjacency, diagonal": (lambda: pf.iaf(3, adjacency=DIAGONAL), ValueError, "diagonal.*its own condition"),
    "adjacency, shape": (lambda: pf.maf(3, adjacency=torch.zeros(2, 3)), ValueError, r"shape \(3, 3\), got \(2, 3\)"),
    "order and adjacency": (
        lambda: pf.maf(3, order="reverse", adjacency=torch.zeros(3, 3)),
        ValueError,
        "either an order or an adjacency",
    ),
    "mask, all": (lambda: pf.realnvp(3, mask=[True] * 3), ValueError, "keep some dimensions and move others.*3 of 3"),
    "mask, none": (lambda: pf.nice(3, mask=[False] * 3), ValueError, "keep some dimensions and move others.*0 of 3"),
    "mask, shape": (lambda: pf.realnvp(3, mask=[True, False]), ValueError, r"boolean.* of shape \(3,\).*\(2,\)"),
    "mask, image": (lambda: pf.realnvp((2, 3), mask=[True] * 6), ValueError, r"boolean.* of shape \(2, 3\).*\(6,\)"),
    "mask, dtype": (lambda: pf.realnvp(3, mask=torch.tensor([1, 0, 1])), ValueError, "boolean.*int64"),
    "mask, name": (lambda: pf.nice(3, mask="checkers"), ValueError, "'half', 'alternating', 'random'.*'checkers'"),
    "num_layers, 0": (lambda: pf.maf(3, num_layers=0), ValueError, "num_layers to be an integer >= 1, got 0"),
    "num_layers, float": (lambda: pf.realnvp(3, num_layers=2.0), ValueError, "num_layers.*got 2.0"),
    "num_layers, bool": (lambda: pf.nice(3, num_layers=True), ValueError, "num_layers.*got True"),
    "input_dim, 0": (lambda: pf.maf(0), ValueError, "positive integers, got 0"),
    "input_dim, negative": (lambda: pf.realnvp(-1), ValueError, "positive integers, got -1"),
    "input_dim, float": (lambda: pf.iaf(3.0), (TypeError, ValueError), "3.0|float"),
    "event shape, empty": (lambda: pf.nice(()), ValueError, r"positive integers, got \(\)"),
    "event shape, zero": (lambda: pf.nice((2, 0)), ValueError, r"positive integers, got \(2, 0\)"),
    "context_dim, negative": (lambda: pf.maf(3, context_dim=-1), ValueError, "context_dim.*>= 0, got -1"),
    "context_dim, float": (lambda: pf.maf(3, context_dim=1.5), ValueError, "context_dim.*got 1.5"),
    "hidden_dims, zero": (lambda: pf.maf(3, hidden_dims=(8, 0)), ValueError, r"hidden_dims.*positive.*\(8, 0\)"),
    "hidden_dims, float": (lambda: pf.realnvp(3, hidden_dims=(8.0,)), ValueError, r"hidden_dims.*\(8.0,\)"),
    "hidden_dims, residual": (
        lambda: pf.maf(3, hidden_dims=(8, 16), residual=True),
        ValueError,
        r"residual.*all equal, got \(8, 16\)",
    ),
    "activation, name": (lambda: pf.iaf(3, activation="swish"), ValueError, "'silu'.*'swish'"),
    "activation, number": (lambda: pf.iaf(3, activation=3), TypeError, "name or a function.*got int"),
    "activation, none": (lambda: pf.iaf(3, activation=[]), ValueError, "at least one activation, got an empty"),
    "activation, one of two": (lambda: pf.realnvp(3, activation=("relu", "swish")), ValueError, "'silu'.*'swish'"),
    "activation, learns": (lambda: pf.iaf(3, activation=torch.nn.PReLU()), ValueError, "without parameters"),
    "fast": (lambda: pf.Autoregressive(3, fast="both"), ValueError, "'density' or 'sampling', got 'both'"),
    "max_log_scale": (lambda: pf.realnvp(3, max_log_scale=0.0), ValueError, "max_log_scale > 0, got 0.0"),
    "max_log_scale, rescaling": (lambda: pf.Rescaling(3, max_log_scale=-1.0), ValueError, "max_log_scale > 0"),
    "permutation": (lambda: pf.Permutation(3, [0, 0, 2]), ValueError, r"permutation of 0\.\.2, got \[0, 0, 2\]"),
    "permutation, name": (lambda: pf.Permutation(3, "shuffle"), ValueError, "'random', 'reverse'.*'shuffle'"),
    "chain, empty": (lambda: pf.Chain([]), ValueError, "at least one flow transform"),
    "chain, no flow": (lambda: pf.Chain([ExpTransform()]), ValueError, "at least one flow transform"),
    "chain, sizes": (
        lambda: pf.Chain([pf.maf(3), pf.maf(4)]),
        ValueError,
        r"part 1 \(Chain\) expects event shape \(4,\).*gives \(3,\)",
    ),
    "chain, contexts": (
        lambda: pf.Chain([pf.maf(3, context_dim=1), pf.maf(3, context_dim=2)]),
        ValueError,
        r"agree on context_dim, got \[1, 2\]",
    ),
    "wrap, flow": (lambda: pf.Wrap(LEAF, 3), TypeError, "transform that is no flow, got Coupling"),
    "wrap, not bijective": (
        lambda: pf.Wrap(torch.distributions.AbsTransform(), 3),
        ValueError,
        "AbsTransform is not bijective",
    ),
    "base, event shape": (
        lambda: pf.Flow(pf.maf(3), dist.Normal(torch.zeros(4), 1.0).to_event(1)),
        ValueError,
        r"event shape \(3,\), got batch shape \(\) and event shape \(4,\)",
    ),
    "base, batch": (
        lambda: pf.Flow(pf.maf(3), dist.Normal(torch.zeros(3), 1.0)),
        ValueError,
        r"event shape \(3,\).*batch shape \(3,\).*\.to_event\(\)",
    ),
    "base, learns": (
        lambda: pf.Flow(pf.maf(3), dist.Normal(torch.zeros(3, requires_grad=True), 1.0).to_event(1)),
        ValueError,
        "must be a module.*DiagonalNormal",
    ),
    "base, number": (lambda: pf.Flow(pf.maf(3), 1.0), TypeError, "distribution or a module, got float"),
}


def check(call, exception, message):
    # The whole message counts, whatever number of lines it takes.
    with pytest.raises(exception, match=f"(?s){message}") as caught:
        call()
    assert not isinstance(caught.value, AssertionError)
    assert len(str(caught.value)) < 400, "too long to be read"


def outputs(flow, *context):
    with torch.no_grad():
        value = torch.linspace(-1, 1, 6).reshape(2, 3)
        return (*flow.forward_and_ladj(value, *context), *flow.inverse_and_ladj(value, *context))


@pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS)
@pytest.mark.parametrize("case", VALUES.values(), ids=VALUES)
def test_values(flow, case):
    before = outputs(flow)
    call, exception, message = case
    check(lambda: call(flow), exception, message)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(flow), strict=True))


@pytest.mark.parametrize("flow", CONDITIONAL.values(), ids=CONDITIONAL)
@pytest.mark.parametrize("case", CONTEXTS.values(), ids=CONTEXTS)
def test_contexts(flow, case):
    before = outputs(flow, TWO)
    call, exception, message = case
    check(lambda: call(flow), exception, message)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(flow, TWO), strict=True))


@pytest.mark.parametrize("case", BUILDS.values(), ids=BUILDS)
def test_builders(case):
    check(*case)


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (6,), (3,)])
def test_images(shape):
    check(lambda: IMAGE.inv(torch.ones(shape)), ValueError, rf"trailing shape \(2, 3\).*{shape[-1]}")


def test_errors_name_the_flow_that_raised_them():
    for flow in (*FLOWS.values(), LEAF, pf.Permutation(3)):
        check(lambda flow=flow: flow(torch.ones(4)), ValueError, f"^{type(flow).__name__}: ")


def test_a_failed_call_does_not_spoil_what_was_remembered():
    for flow in FLOWS.values():
        y = flow(torch.randn(4, 3))
        expected = flow.inv(y.detach().clone())
        for call, exception, _ in VALUES.values():
            with pytest.raises(exception):
                call(flow)
        torch.testing.assert_close(flow.inv(y), expected, rtol=1e-4, atol=1e-4)


def test_a_failed_build_draws_nothing_into_a_chain():
    parts = [pf.maf(3, num_layers=1), AffineTransform(0.0, 2.0)]
    check(lambda: pf.Chain([*parts, pf.maf(4)]), ValueError, "event shape")
    chain = pf.Chain(parts)
    assert len(chain) == 2 and chain.inv(torch.ones(3)).shape == (3,)


def test_subclasses_that_forget_a_direction():
    class Half(pf.FlowTransform):
        def forward_and_ladj(self, x, context=None):
            return x, x.sum(-1) * 0

    half = Half(3)
    assert torch.equal(half(ONE), ONE)
    check(lambda: half.inv(ONE), TypeError, r"Half must define inverse_and_ladj\(y, context=None\)")

    class Map(pf.univariate.Univariate):
        num_params = 1

    check(lambda: pf.Coupling(3, Map())(ONE), TypeError, r"Map must define forward\(x, params\)")
