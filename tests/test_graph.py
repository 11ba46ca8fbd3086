"""Recorded computations: what a replay repeats, what is drawn anew, what is refused, and what is noticed."""

import gc

import pytest
import torch
from asserts import refuses
from torch import nn
from torch.nn import functional

import pyro_flows as pf
from pyro_flows.infer.machine import graph as recordings
from pyro_flows.infer.machine.graph import RecordError, Replay, record, replayable

pytestmark = pytest.mark.usefixtures("double")

TABLE = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
PLACES = torch.tensor([2, 0, 0])
MASK = torch.tensor([True, False, True, True])


def sloped(fn):
    """A function's value and gradient."""

    def run(x):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            value = fn(x)
            return value.detach(), torch.autograd.grad(value, x)[0]

    return run


def recorded(fn, x, **options):
    x = x.clone()
    return record(lambda: fn(x), [x], **options)[1]


def changes(x):
    y = torch.zeros(3, 4, dtype=x.dtype)
    y[1] = x
    y[:, 0] += x[0]
    y.mul_(2.0)
    return (y * TABLE.to(x)).sum() + y[1].square().sum()


def changes_without_views(x):
    y = torch.zeros_like(x).add_(x.exp())
    return y.sum() + x.exp().clone().clamp_(min=0.5).mul_(x).sum()


def keeps_an_alias(x):
    y = x.clone()
    seen = y.detach()
    y.add_(1.0)
    return (seen * x).sum()


def steps_of_time(x):
    steps = torch.arange(5.0)
    steps[-1] = 4.5
    return sum(float(t) * (x * t).sin().sum() for t in steps if t > 1)


def several_results(x):
    values, places = x.sort()
    q, r = torch.linalg.qr(torch.outer(values, x) + 3 * torch.eye(4, dtype=x.dtype))
    return values[0] * r.diagonal().abs().log().sum() + q[0, 0] + x[places].square().sum() + x.unbind()[2]


def repeats(x):
    return (x.exp() + x.exp()).sum() * 1 + x.reshape(2, 2).t().t().reshape(4).sum()


def chooses_by_constants(x):
    table = TABLE.to(x)
    if table.sum() < 100 and table[0, 0].item() == -1.0:
        x = x * torch.tensor(2.0, dtype=x.dtype)
    seen = table.flatten()[~table.flatten().isnan()].numpy().min()
    return seen * x[MASK].sum() + (x * table)[PLACES][:, MASK].sum() + x[torch.tensor(table.tolist()[0]) < 0].prod()


def special(x):
    chosen = torch.where(x > 0, x.log1p(), x.expm1()) + torch.ones_like(x) + torch.full_like(x, 0.5)
    return (torch.lgamma(x.abs() + 1) + chosen).logsumexp(-1) + torch.cumsum(x, 0)[2] + x.softmax(-1)[1]


def networks(x):
    return functional.layer_norm(TABLE.to(x) @ x, (3,)).tanh().sum() + (TABLE.to(x) * x).permute(1, 0).mT.sum()


FUNCTIONS = [
    changes,
    changes_without_views,
    keeps_an_alias,
    steps_of_time,
    several_results,
    repeats,
    chooses_by_constants,
    special,
    networks,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fn", FUNCTIONS)
def test_other_inputs(fn, dtype, default_dtype):
    """Values and gradients against the function itself, also of many inputs at once and without changes of tensors."""
    default_dtype(dtype)
    run, x = sloped(fn), torch.tensor([0.3, -0.7, 1.2, 0.4])
    graph = recorded(run, x)
    others = (x, -x + 0.05, torch.randn(4, 3)[:, 1], 3 * torch.randn(4))
    for other in others:
        before = other.clone()
        torch.testing.assert_close(graph(other), run(other))
        assert torch.equal(other, before) and graph.holds
    assert gc.isenabled()
    with torch.no_grad():
        value = recorded(lambda x: [fn(x)], x)
    pure = value.functional(x) if fn is not several_results else value  # torch cannot make a sort functional
    assert not any("copy_" in str(node.target) and fn is changes for node in pure.program.graph.nodes)
    for other in others:
        torch.testing.assert_close(sloped(lambda x: pure.differentiable(x)[0])(other), run(other))
    if not graph.mutates:
        rows = torch.stack(others)
        for found, alone in zip(torch.vmap(graph)(rows), zip(*map(run, rows), strict=True), strict=True):
            torch.testing.assert_close(found, torch.stack(alone))


def test_fewer_calls():
    """What repeats, changes nothing, or follows from constants is left out."""
    x = torch.randn(4)
    targets = [str(node.target) for node in recorded(lambda x: [repeats(x)], x).program.graph.nodes]
    assert sum("exp" in each for each in targets) == 1 and not any("mul" in each for each in targets)
    assert not any(each.endswith("t.default") or "permute" in each for each in targets)
    assert len(recorded(lambda x: [(x * TABLE.exp().sum(0).log()).sum()], x)) == 2
    assert not recorded(lambda x: [changes_without_views(x)], x).mutates
    assert recorded(lambda x: [changes(x)], x).mutates


def test_random_numbers_are_drawn_anew():
    """The same ones as in a plain run, also where nothing else depends on them."""

    def run(x):
        torch.rand(2)
        places = torch.randperm(4)[:2]
        return (x[places] * torch.randn(2)).sum() + torch.empty(3).uniform_().sum() + functional.dropout(x).sum()

    x = torch.randn(4)
    graph = recorded(lambda x: [run(x)], x)
    torch.manual_seed(1)
    found = [graph(x)[0] for _ in range(3)]
    torch.manual_seed(1)
    torch.testing.assert_close(torch.stack(found), torch.stack([run(x) for _ in range(3)]), rtol=0, atol=0)
    assert len(set(map(float, found))) == 3


def outside(x):
    TABLE[0].add_(0.0)
    return x


REFUSED = {
    "item": lambda x: x * x[0].item(),
    "branch": lambda x: x if x.sum() > 0 else -x,
    "array": lambda x: x * torch.as_tensor(x.detach().numpy()),
    "list": lambda x: x * torch.tensor(x.tolist()),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "random": lambda x: x * torch.randn(()).item(),
    "changed constant": lambda x: x * torch.zeros(2).copy_(x[:2])[0].item(),
    "outside": outside,
    "generator": lambda x: x + torch.randn(4, generator=torch.Generator()),
    "decomposition": lambda x: torch.linalg.cholesky(torch.diag(x.exp())),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """What Python would see of the inputs or of random numbers, and changes of others' tensors."""
    refuses(RecordError, " ", recorded, lambda x: [REFUSED[name](x)], torch.randn(4))
    assert gc.isenabled()


def test_too_large(monkeypatch):
    monkeypatch.setattr(recordings, "BYTES", 1000)
    refuses(RecordError, "so large", recorded, lambda x: [x.expand(200, 4) + 1], torch.randn(4))


def test_failures_of_decompositions():
    codes = []

    def run(x):
        root = torch.linalg.cholesky(torch.diag(x))
        return root.sum(), codes[-1] == 0

    graph = recorded(run, torch.ones(4), failures=codes)
    assert graph(torch.full((4,), 4.0)) == (8.0, True)
    assert not graph(-torch.ones(4))[1]
    assert torch.vmap(graph)(torch.tensor([[1.0] * 4, [-1.0] * 4]))[1].tolist() == [
        1,
        0,
    ]


def test_replay_notices_changes(monkeypatch):
    """Of tensors at once, of Python's numbers at the calls that are compared; then it calls the function."""
    monkeypatch.setattr(recordings, "CHECKED", {2, 4, 8})
    weight, factor = torch.ones(4), [2.0]
    replay = Replay(lambda x: [(x * weight).sum() * factor[0]], [])
    x = torch.randn(4)
    for call in range(1, 10):
        if call == 3:
            weight.mul_(3.0)
        if call == 5:
            factor[0] = 5.0
        (found,) = replay(x)
        assert torch.equal(found, (x * weight).sum() * factor[0]) is (call not in (5, 6, 7)), call
    assert "other numbers" in replay.why_not
    assert "value" in _why(lambda x: [x * x.sum().item()]) and _why(lambda x: [x.exp()]) is None
    assert _why(lambda x: [torch.randn(4) * x]) is None


def _why(run):
    replay = Replay(run, [])
    for _ in range(4):
        replay(torch.randn(4))
    return replay.why_not


def test_replay_by_shape():
    calls = []
    replay = Replay(lambda x, y: [x.sum() if y is None else x.sum() + y], [])
    for rows in (2, 3, 2, 3):
        x = torch.randn(rows)
        torch.testing.assert_close(replay(x, None)[0], x.sum())
        torch.testing.assert_close(replay(x, torch.tensor(1.0))[0], x.sum() + 1)
    many = Replay(lambda x: calls.append(1) or [x.sum()], [])
    for rows in (*range(1, 9), *range(1, 9)):
        many(torch.randn(rows))
    assert len(calls) == 8 + 4 + recordings.SHAPES  # others always, and each recording once more to compare


def test_replayable():
    class Foreign(nn.Module):
        pass

    flow = pf.Flow(pf.realnvp(2))
    assert replayable(flow) is None
    flow.chain.register_forward_hook(lambda *args: None)
    assert "hooks" in replayable(flow)
    assert "foreign" in replayable(nn.Sequential(Foreign()))
    layer = nn.Linear(2, 2)
    layer.weight.register_hook(lambda grad: grad)
    assert "hooks" in replayable(layer)


def test_casts_are_those_of_the_recorded_run():
    """Under autocast, some products are in bfloat16 and some in full precision; a replay does not cast again."""
    a, b = torch.randn(5, 5), torch.randn(5, 5)

    def run():
        half = a @ b
        with torch.autocast("cpu", enabled=False):
            return [half.float(), a @ b]

    with torch.autocast("cpu", torch.bfloat16):
        found, graph = record(run, [a, b])
        again = graph(a, b)
    assert all(map(torch.equal, found, again)) and all(map(torch.equal, found, graph(a, b)))
    assert not torch.equal(found[0], found[1]) and torch.equal(found[1], a @ b)


@pytest.mark.parametrize("kind", ["affine", "spline", "residual", "long", "sparse"])
def test_a_whole_recording_sweeps_by_plain_operations(kind):
    """In blocks, with skips between layers, several parameters, and dimensions that the first do not touch."""
    options = {"num_layers": 1, "hidden_dims": (24, 24)}
    if kind == "residual":
        options = {"num_layers": 1, "hidden_dims": (24,) * 5, "residual": True}
    elif kind == "sparse":
        options["adjacency"] = torch.eye(6, dtype=torch.bool).roll(1, 0).tril()
    elif kind == "spline":
        options["univariate"] = pf.univariate.Spline()
    flow = pf.maf(40 if kind == "long" else 6, **options).double()
    torch.manual_seed(0)
    for parameter in flow.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    u = torch.randn(9, flow.event_shape[0])

    def run():
        z = u.clone().requires_grad_()
        with torch.enable_grad():
            x = flow(z)
            loss = x.sin().sum() + flow.log_abs_det_jacobian(z, x).square().sum()
            return torch.autograd.grad(loss, [z, *flow.parameters()], allow_unused=True)

    plain = run()
    found, graph = record(run, [u, *flow.parameters()], whole=True)
    for results in (found, graph(u, *flow.parameters())):
        torch.testing.assert_close(results, plain)
    names = [getattr(node.target, "__name__", node.target) for node in graph.program.graph.nodes]
    assert "_sweep_back" not in names and "_solve" in names
