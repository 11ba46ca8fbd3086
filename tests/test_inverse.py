"""The incremental inverse and its gradient against the plain one that takes a pass per dimension."""

import threading

import pytest
import torch
from cases import Sinh, diamond, full_but, seeded, shake
from oracles import d_pass, fast_direction, kept, plain_network, relative_error, slow_direction

import pyro_flows as pf

SIDES = ("density", "sampling")


def ladder(size: int) -> torch.Tensor:
    """An adjacency in which every third dimension is free and the others look at some of those before them."""
    torch.manual_seed(3)
    adjacency = torch.rand(size, size).tril(-1) > 0.6
    adjacency[::3] = False
    shuffled = torch.randperm(size)
    return adjacency[shuffled][:, shuffled]


# input_dim, options
LAYOUTS = {
    "one": (1, {"hidden_dims": (4,)}),
    "two": (2, {"hidden_dims": (16, 16)}),
    "five": (5, {"hidden_dims": (32, 32)}),
    "no-hidden": (6, {"hidden_dims": ()}),
    "deep": (7, {"hidden_dims": (12, 20, 12, 20)}),
    "narrow": (9, {"hidden_dims": (3, 5)}),
    "one-unit": (4, {"hidden_dims": (1,)}),
    "funnel": (12, {"hidden_dims": (24, 6, 24)}),
    "reverse": (6, {"order": "reverse"}),
    "random-order": (17, {"order": "random"}),
    "given-order": (4, {"order": [2, 0, 3, 1]}),
    "residual": (8, {"residual": True, "hidden_dims": (24, 24)}),
    "residual-narrow": (8, {"residual": True, "hidden_dims": (5,)}),
    "diamond": (4, {"adjacency": diamond()}),
    "ladder": (33, {"adjacency": ladder(33), "hidden_dims": (48, 40)}),
    "ladder-residual": (12, {"adjacency": ladder(12), "hidden_dims": (16,), "residual": True}),
    "no-edges": (5, {"adjacency": torch.zeros(5, 5, dtype=torch.bool)}),
    "image": ((2, 3), {"order": "random"}),
    "relu": (6, {"activation": "relu"}),
    "tanh": (6, {"activation": "tanh"}),
    "elu": (6, {"activation": "elu"}),
    "sigmoid": (6, {"activation": "sigmoid", "residual": True, "hidden_dims": (12,)}),
    "gelu": (6, {"activation": "gelu"}),
    "isru": (6, {"activation": "isru"}),
    "isru-silu-tanh": (6, {"activation": ("isru", "silu", "tanh"), "hidden_dims": (12, 14, 10, 12)}),
    "isru-residual": (6, {"activation": ("isru", "silu"), "residual": True, "hidden_dims": (12,)}),
    "leaky-relu": (6, {"activation": "leaky_relu"}),
    "softplus": (6, {"activation": "softplus"}),
    "lambda": (6, {"activation": lambda x: x + torch.sin(x)}),
    "shift": (6, {"univariate": pf.univariate.Shift()}),
    "own-univariate": (6, {"univariate": Sinh()}),
    "own-univariate-adjacency": (12, {"univariate": Sinh(), "adjacency": ladder(12), "hidden_dims": (16,)}),
    "blocks": (40, {"hidden_dims": (64, 64)}),
    "large": (64, {"hidden_dims": (96, 80)}),
}
# One structure a branch: sizes, orders, residual networks, univariates and activations without closed forms, blocks.
KEPT = ("one", "no-hidden", "narrow", "random-order", "ladder-residual", "image", "isru-silu-tanh", "lambda")
KEPT += ("own-univariate-adjacency", "blocks")
EACH_LAYOUT = pytest.mark.parametrize("layout", full_but(LAYOUTS, *KEPT))
EACH_SIDE = pytest.mark.parametrize("fast", SIDES)


def make(layout, fast, device, context_dim=0, dtype=torch.float64):
    size, options = LAYOUTS[layout]
    flow = pf.Autoregressive(size, fast=fast, context_dim=context_dim, **{"hidden_dims": (16, 16), **options})
    # The solution is a nested function of as many levels as there are steps: the noise must not let it explode.
    return shake(flow.to(device=device, dtype=dtype), 0.3 / max(1, flow.net.input_dim / 8))


def draw(flow, *batch, dtype=torch.float64):
    device = next(flow.parameters()).device
    return torch.randn(*batch, *flow.event_shape, dtype=dtype, device=device)


@EACH_LAYOUT
def test_oracle_network_is_the_network(layout, device):
    flow = make(layout, "density", device, context_dim=2)
    x, context = draw(flow, 5).flatten(1), draw(flow, 5).flatten(1)[:, :1].expand(-1, 2)
    assert relative_error(flow.net(x, context), plain_network(flow.net, x, context)) <= 1e-13


@EACH_SIDE
@EACH_LAYOUT
def test_equals_one_pass_per_dimension(layout, fast, device):
    flow = make(layout, fast, device)
    value = draw(flow, 11)
    want = d_pass(flow, value, network=lambda net, x, context: net(x, context))
    for got, true in zip(slow_direction(flow)(value), want, strict=True):
        assert relative_error(got, true) <= 1e-13


@EACH_SIDE
@EACH_LAYOUT
def test_undoes_the_fast_direction(layout, fast, device):
    flow = make(layout, fast, device)
    value = draw(flow, 11)
    solved, ladj = slow_direction(flow)(value)
    back, minus = fast_direction(flow)(solved)
    assert relative_error(back, value) <= 1e-12
    assert relative_error(-minus, ladj) <= 1e-12


@EACH_SIDE
@pytest.mark.parametrize("of_context", [(), (6,), (1,), (4, 1), (4, 6)], ids=str)
@pytest.mark.parametrize("layout", ["five", "narrow", "ladder", "residual", "lambda", "no-hidden", "one"])
def test_contexts(layout, of_context, fast, device):
    flow = make(layout, fast, device, context_dim=3)
    value, context = draw(flow, 6), torch.randn(*of_context, 3, dtype=torch.float64, device=device)
    for got, true in zip(slow_direction(flow)(value, context), d_pass(flow, value, context), strict=True):
        assert got.shape == true.shape
        assert relative_error(got, true) <= 1e-13


def gradients(call, flow, value, context):
    value = value.clone().requires_grad_()
    context = None if context is None else context.clone().requires_grad_()
    out, ladj = call(value, context)
    generator = seeded(1)
    by_out = torch.randn(out.shape, generator=generator, dtype=out.dtype).to(out.device)
    by_ladj = torch.randn(ladj.shape, generator=generator, dtype=out.dtype).to(out.device)
    wanted = {"value": value, **({} if context is None else {"context": context}), **dict(flow.named_parameters())}
    grads = torch.autograd.grad((by_out * out).sum() + (by_ladj * ladj).sum(), wanted.values(), allow_unused=True)
    return {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(wanted.items(), grads, strict=True)}


def assert_same_gradients(got, want, tolerance=1e-12):
    size = max(float(w.abs().max()) for w in want.values() if w.numel())
    for name, true in want.items():
        assert relative_error(got[name], true) <= tolerance or (got[name] - true).abs().max() <= 1e-15 * size, name


@EACH_SIDE
@EACH_LAYOUT
def test_gradient_equals_autograd_through_the_passes(layout, fast, device):
    flow = make(layout, fast, device, context_dim=2)
    value, context = draw(flow, 5), torch.randn(5, 2, dtype=torch.float64, device=device)
    want = gradients(lambda v, c: d_pass(flow, v, c), flow, value, context)
    assert_same_gradients(gradients(slow_direction(flow), flow, value, context), want)


@EACH_SIDE
@pytest.mark.parametrize("of_context", [None, (), (1,), (4, 1)], ids=str)
@pytest.mark.parametrize("layout", ["five", "narrow", "ladder", "residual", "own-univariate", "one"])
def test_gradient_with_shared_and_broadcast_contexts(layout, of_context, fast, device):
    flow = make(layout, fast, device, context_dim=0 if of_context is None else 2)
    value = draw(flow, 6)
    context = None if of_context is None else torch.randn(*of_context, 2, dtype=torch.float64, device=device)
    want = gradients(lambda v, c: d_pass(flow, v, c), flow, value, context)
    assert_same_gradients(gradients(slow_direction(flow), flow, value, context), want)


@EACH_SIDE
def test_gradient_of_what_is_asked_for_only(fast, device):
    flow = make("five", fast, device)
    value = draw(flow, 4)
    want = gradients(slow_direction(flow), flow, value, None)
    flow.requires_grad_(False)
    alone = value.clone().requires_grad_()
    out, ladj = slow_direction(flow)(alone)
    (by_ladj,) = torch.autograd.grad(ladj.sum(), alone, retain_graph=True)
    (by_out,) = torch.autograd.grad(out.sum(), alone)
    flow.requires_grad_(True)
    alone = value.clone().requires_grad_()
    out, ladj = d_pass(flow, alone)
    assert relative_error(by_ladj, torch.autograd.grad(ladj.sum(), alone, retain_graph=True)[0]) <= 1e-12
    assert relative_error(by_out, torch.autograd.grad(out.sum(), alone)[0]) <= 1e-12
    assert all(w.abs().sum() > 0 for n, w in want.items() if n.startswith("net.bias"))


@EACH_SIDE
@pytest.mark.parametrize(
    "size, options",
    [
        pytest.param(2, {}, marks=pytest.mark.full),
        pytest.param(3, {"hidden_dims": (2, 3), "order": "reverse"}, marks=pytest.mark.full),
        (3, {"residual": True}),
        pytest.param(4, {"adjacency": diamond()}, marks=pytest.mark.full),
        (3, {"univariate": Sinh()}),
    ],
    ids=str,
)
def test_second_derivatives(size, options, fast, device):
    settings = {"hidden_dims": (4,), "activation": "tanh", **options}
    flow = shake(pf.Autoregressive(size, fast=fast, context_dim=1, **settings).double().to(device))
    value = draw(flow, 2).requires_grad_()
    context = torch.randn(2, 1, dtype=torch.float64, device=device, requires_grad=True)
    names, params = zip(*flow.named_parameters(), strict=True)

    def call(value, context, *params):
        method = "inverse_and_ladj" if fast == "sampling" else "forward_and_ladj"
        for name, param in zip(names, params, strict=True):
            owner, leaf = flow.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            owner._parameters[leaf] = param
        return getattr(flow, method)(value, context)

    inputs = (value, context, *(p.detach().clone().requires_grad_() for p in params))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@EACH_SIDE
@pytest.mark.parametrize("of_context", [None, (), (8,)], ids=str)
@pytest.mark.parametrize("layout", ["five", "ladder", "residual", "own-univariate"])
def test_samples_taken_in_chunks(layout, of_context, fast, device, monkeypatch):
    flow = make(layout, fast, device, context_dim=0 if of_context is None else 2)
    value = draw(flow, 8)
    context = None if of_context is None else torch.randn(*of_context, 2, dtype=torch.float64, device=device)
    whole = slow_direction(flow)(value, context)
    want = gradients(slow_direction(flow), flow, value, context)
    calls = []

    def three(n, rows, device):
        calls.append(n)
        return 3

    monkeypatch.setattr("pyro_flows.inverse.sweep.columns_at_once", three)
    for got, true in zip(slow_direction(flow)(value, context), whole, strict=True):
        assert relative_error(got, true) <= 1e-14
    assert_same_gradients(gradients(slow_direction(flow), flow, value, context), want, 1e-13)
    assert calls == [8, 8, 8]  # values, values for the gradient, gradient


def longest_path(adjacency: torch.Tensor) -> int:
    """The number of dimensions on the longest chain of dependence: the power at which the adjacency vanishes."""
    power, length = torch.eye(len(adjacency)), 0
    while power.any():
        power, length = (adjacency.float() @ power > 0).float(), length + 1
    return length


@pytest.mark.parametrize(
    "adjacency", [diamond(), ladder(12), ladder(33), torch.zeros(5, 5, dtype=torch.bool), torch.ones(6, 6).tril(-1) > 0]
)
def test_one_step_for_each_level_of_an_adjacency(adjacency):
    flow = pf.Autoregressive(len(adjacency), adjacency=adjacency, hidden_dims=(64,))
    assert flow.net.structure.num_steps == longest_path(adjacency)
    assert f"sweep of {longest_path(adjacency)} steps" in flow.sampling_cost


@pytest.mark.parametrize("hidden_dims, steps", [((64,), 8), ((3,), 4), ((3, 64), 4), ((64, 2), 3), ((1,), 2), ((), 8)])
def test_dimensions_that_few_hidden_units_cannot_tell_apart_share_a_step(hidden_dims, steps):
    # A layer of w units makes at most w prefixes of the inputs visible, so that there are at most w + 1 steps.
    flow = shake(pf.Autoregressive(8, hidden_dims=hidden_dims).double())
    assert flow.net.structure.num_steps == steps
    seen = torch.autograd.functional.jacobian(lambda x: flow.net(x).sum(-1), torch.randn(8).double()) != 0
    assert longest_path(seen) == steps


@EACH_SIDE
def test_memory_for_the_gradient_is_that_of_one_pass(fast, device):
    size, batch = 32, 200
    bipartite = torch.zeros(size, size, dtype=torch.bool)
    bipartite[size // 2 :, : size // 2] = True
    sizes = {}
    for name, options in {"chain": {}, "two steps": {"adjacency": bipartite}}.items():
        flow = shake(pf.Autoregressive(size, fast=fast, hidden_dims=(64, 64), **options).to(device), 0.05)
        value = torch.randn(batch, size, device=device)
        sizes[name] = sum(kept(slow_direction(flow), value).values())
        one = sum(kept(lambda: flow.univariate.forward(value, plain_network(flow.net, value))).values())  # noqa: B023
        assert sizes[name] <= one, name
        assert sum(kept(d_pass, flow, value).values()) > 10 * one  # so that the comparison can fail
    assert sizes["chain"] <= 1.01 * sizes["two steps"]


@EACH_SIDE
@pytest.mark.parametrize("options", [{}, {"order": "random"}, {"residual": True}, {"adjacency": ladder(64)}], ids=str)
def test_band_by_band_pass_equals_the_plain_one(options, fast, device, monkeypatch):
    flow = pf.Autoregressive(64, fast=fast, context_dim=2, **{"hidden_dims": (256, 256), **options})
    flow = shake(flow.double().to(device), 0.02)
    value, context = draw(flow, 320), torch.randn(320, 2, dtype=torch.float64, device=device)
    assert any(len(value) >= cut.worth_from for cut in flow.net.layers.cuts)
    got = fast_direction(flow)(value, context)
    got_grads = gradients(fast_direction(flow), flow, value, context)
    with torch.no_grad():
        quiet = fast_direction(flow)(value, context)
    network = flow.net(value, context)
    monkeypatch.setattr("pyro_flows.nets.masked_pass.by_hand", lambda: False)
    want = fast_direction(flow)(value, context)
    for a, b, c in zip(got, want, quiet, strict=True):
        assert relative_error(a, b) <= 1e-13
        assert relative_error(c, b) <= 1e-13
    assert relative_error(network, plain_network(flow.net, value, context)) <= 1e-13
    assert_same_gradients(got_grads, gradients(fast_direction(flow), flow, value, context))


@EACH_SIDE
def test_two_threads_on_one_transform(fast, device):
    flow = make("residual", fast, device, context_dim=2)
    values, contexts = draw(flow, 2, 6), torch.randn(2, 6, 2, dtype=torch.float64, device=device)
    want = [d_pass(flow, v, c) for v, c in zip(values, contexts, strict=True)]
    want_grads = [gradients(lambda v, c: d_pass(flow, v, c), flow, values[k], contexts[k]) for k in range(2)]
    errors, start = [], threading.Barrier(2)

    def work(k):
        try:
            start.wait()
            for _ in range(40):
                for got, true in zip(slow_direction(flow)(values[k], contexts[k]), want[k], strict=True):
                    assert relative_error(got.detach(), true.detach()) <= 1e-13
                got = gradients(slow_direction(flow), flow, values[k], contexts[k])
                assert_same_gradients(got, want_grads[k])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@EACH_SIDE
@pytest.mark.parametrize("fill", [float("nan"), float("inf"), 1e30, "noise"], ids=str)
@pytest.mark.parametrize("layout", ["five", "narrow", "ladder", "residual", "blocks", "no-hidden"])
def test_masked_places_never_matter(layout, fill, fast, device):
    flow = make(layout, fast, device, context_dim=2)
    value, context = draw(flow, 6), torch.randn(6, 2, dtype=torch.float64, device=device)

    def results():
        both = [call(flow)(value, context) for call in (slow_direction, fast_direction)]
        grads = [gradients(call(flow), flow, value, context) for call in (slow_direction, fast_direction)]
        with torch.no_grad():
            both += [call(flow)(value, context) for call in (slow_direction, fast_direction)]
        return [t for pair in both for t in pair] + [g for each in grads for g in each.values()], grads

    want, _ = results()
    weights, _, masks = flow.net.tensors()
    with torch.no_grad():
        for weight, mask in zip(weights, masks, strict=True):
            assert (mask == 0).any() or flow.net.input_dim == 1
            noise = torch.randn_like(weight) if fill == "noise" else torch.full_like(weight, fill)
            weight.copy_(torch.where(mask == 0, noise, weight))
    got, grads = results()
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for each in grads:
        for k, mask in enumerate(masks):
            assert (each[f"net.weight_{k}"][mask == 0] == 0).all()


def test_masked_places_of_large_layers_never_matter(device):
    flow = shake(pf.Autoregressive(64, hidden_dims=(256, 256)).to(device), 0.02)
    value = torch.randn(320, 64, device=device)
    assert any(len(value) >= cut.worth_from for cut in flow.net.layers.cuts)
    want = flow.inverse_and_ladj(value)
    want_grads = gradients(flow.inverse_and_ladj, flow, value, None)
    with torch.no_grad():
        for weight, mask in zip(flow.net.tensors()[0], flow.net.tensors()[2], strict=True):
            weight[mask == 0] = float("nan")
    torch.testing.assert_close(flow.inverse_and_ladj(value), want, rtol=0, atol=0)
    for name, got in gradients(flow.inverse_and_ladj, flow, value, None).items():
        assert torch.equal(got, want_grads[name]), name


@EACH_SIDE
def test_conversion_back_and_forth_keeps_the_map(fast, device):
    flow = make("residual", fast, device, dtype=torch.float32)
    value = draw(flow, 5, dtype=torch.float32)
    want = slow_direction(flow)(value)[0]
    for dtype in (torch.float64, torch.float32):
        flow.to(dtype)
        solved = slow_direction(flow)(value.to(dtype))[0]
        assert solved.dtype == dtype
        assert relative_error(solved.to(torch.float32), want) <= 1e-5


def test_results_of_one_solve_outlive_the_next(device):
    # Buffers are lent to each call and used again: nothing that was handed out may lie in them.
    flow = make("five", "density", device)
    first = flow.forward_and_ladj(draw(flow, 6))
    kept = [t.clone() for t in first]
    flow.forward_and_ladj(draw(flow, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_changed_weights_are_seen_by_the_next_solve(device):
    flow = make("five", "density", device)
    value = draw(flow, 6)
    flow.forward_and_ladj(value)
    shake(flow, 0.2)
    assert relative_error(flow.forward_and_ladj(value)[0], d_pass(flow, value)[0]) <= 1e-13
    with torch.no_grad():  # new storages too
        for parameter in flow.parameters():
            parameter.data = parameter.data.clone() * 0.5
    assert relative_error(flow.forward_and_ladj(value)[0], d_pass(flow, value)[0]) <= 1e-13
