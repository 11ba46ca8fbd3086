"""Mint layers and MintNet: the triangular Jacobian, the slopes, both directions, and what they refuse."""

import copy
import itertools
import math
import pickle
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from asserts import comes_back, refuses, rises
from cases import Calls, reload, scaled, seeded, shake, train
from oracles import jacobians, kept

import pyro_flows as pf
from pyro_flows.flows import MINTNET_CONFIGURATIONS
from pyro_flows.infer import fit_density
from pyro_flows.transforms.mint.orders import ORDERS, as_image, earlier_taps, ranks, waves
from pyro_flows.transforms.mint.slopes import MONOTONE, Weights, convolved, value_and_slope

DIGITS = Path(__file__).parent.parent / "examples" / "data" / "digits.npz"
SHAPES = [(1, 4, 4), (3, 3, 2), (4, 2, 2), (2, 5)]
KINDS = list(itertools.product(SHAPES, ORDERS, (True, False)))


def layer(shape, scale=3.0, double=True, **options):
    """A layer far from where it starts: weights of order ``scale / sqrt(fan)``, centres of order 1."""
    made = pf.Mint(shape, **{"num_groups": 3, **options})
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.startswith("net"):
                p.add_(0.5 * torch.randn_like(p))
            elif name.startswith("attention"):
                p.normal_().mul_(scale / math.sqrt(3 * p.shape[-1]))  # so many times the spread that it starts with
            elif name.startswith("taps"):
                p.normal_().mul_(scale / math.sqrt(9 * made.event_shape[0]))
            else:
                p.normal_().mul_(scale / 3)
    return made.double() if double else made


def context_of(made, rows):
    return torch.randn(rows, made.context_dim, dtype=made.scale.dtype) if made.context_dim else None


def in_order(matrix, made):
    places = ranks(as_image("test", made.event_shape), made.order, made.lower).flatten().argsort()
    return matrix[:, places][:, :, places]


def check_layer(made, rows=3):
    """T1: a triangular Jacobian with the diagonal and the log-determinant that the layer says it has."""
    y = torch.randn(rows, *made.event_shape, dtype=torch.float64, requires_grad=True)
    context = context_of(made, rows)
    x, ladj = made.inverse_and_ladj(y, context)
    full = jacobians(x, y)
    rises(in_order(full, made), ladj)
    own = made.log_slopes(y, context).exp()
    torch.testing.assert_close(own.flatten(1), full.diagonal(dim1=1, dim2=2), rtol=1e-12, atol=1e-12)
    least, most = made.map.slope_bounds(*made._weights(context, y.shape[:1]))
    assert (own >= least).all() and (own <= most).all()


# Orders, taps, waves


def longest_chains(shape, kernel, order, lower, dilation=1, convolutions=3):
    """By brute force: the longest chain of the true sparsity of stacked masked convolutions."""
    taps = earlier_taps(shape[0], kernel, order, lower).double()
    middle = kernel[0] // 2, kernel[1] // 2
    for c in range(shape[0]):
        taps[c, c, middle[0], middle[1]] = 1
    size = math.prod(shape)
    seen = torch.eye(size, dtype=torch.float64).view(size, *shape)
    for _ in range(convolutions):
        padding = [side * dilation for side in middle]
        seen = (F.conv2d(seen, taps, padding=padding, dilation=dilation) > 0).double()
    depends = seen.reshape(size, size).T > 0
    places = ranks(shape, order, lower).flatten().argsort()
    assert not depends[places][:, places].triu(1).any() and depends.diagonal().all()
    depends.fill_diagonal_(False)
    longest = torch.zeros(size, dtype=torch.long)
    for place in places.tolist():
        if depends[place].any():
            longest[place] = longest[depends[place]].max() + 1
    return longest.view(shape)


@pytest.mark.parametrize("lower", [True, False], ids=["lower", "upper"])
@pytest.mark.parametrize("order", ORDERS)
def test_waves_are_the_longest_chains(order, lower):
    shapes = [(1, 4, 4), (2, 3, 5), (3, 2, 2), (2, 1, 6), (3, 6, 1), (4, 4, 4), (5, 1, 1), (2, 2, 1), (3, 3, 2)]
    for shape, kernel in itertools.product(shapes, [(3, 3), (1, 3), (5, 5), (1, 5), (1, 1)]):
        want = longest_chains(shape, kernel, order, lower)
        assert torch.equal(waves(shape, kernel, order, lower), want), (shape, kernel)
    for shape, dilation in itertools.product([(2, 1, 9), (1, 1, 7), (3, 1, 4), (2, 3, 5)], [2, 3, 4]):
        for kernel in [(1, 3), (1, 5), (3, 3)]:
            want = longest_chains(shape, kernel, order, lower, dilation)
            assert torch.equal(waves(shape, kernel, order, lower, dilation), want), (shape, kernel, dilation)


def test_waves_of_published_sizes():
    """W + 2 (H - 1) + 4 (C - 1) by channel, C (W + 2 (H - 1)) by position."""
    for c, h, w in [(1, 28, 28), (4, 14, 14), (16, 7, 7), (3, 32, 32), (12, 16, 16), (48, 8, 8)]:
        counts = [int(waves((c, h, w), (3, 3), order).max()) + 1 for order in ORDERS]
        assert counts == [w + 2 * (h - 1) + 4 * (c - 1), c * (w + 2 * (h - 1))]


def test_ranks_are_lexicographic():
    by_channel, by_position = (ranks((2, 2, 3), order) for order in ORDERS)
    assert by_channel[1, 0, 0] == 6 and by_channel[0, 1, 2] == 5
    assert by_position[1, 0, 0] == 1 and by_position[0, 1, 2] == 10
    assert torch.equal(ranks((2, 2, 3), "position", False), 11 - by_position)


# The map from data to base


@pytest.mark.parametrize("shape, order, lower", KINDS)
def test_jacobian(shape, order, lower):
    check_layer(layer(shape, order=order, lower=lower))
    check_layer(layer(shape, order=order, lower=lower, context_dim=2, hidden_dims=(4,)))


@pytest.mark.parametrize("activation", sorted(MONOTONE))
def test_jacobian_with_each_activation(activation):
    check_layer(layer((3, 2, 3), activation=activation, kernel_size=5, shared_scale=True))
    check_layer(layer((2, 4), activation=activation, context_dim=1, shared_scale=True, order="position"))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "context"])
@pytest.mark.parametrize("activation", sorted(MONOTONE))
def test_gradients_are_those_of_plain_operations(activation, gated):
    """First and second derivatives of the hand-made pass, against autograd in what the formula says."""
    act = MONOTONE[activation]
    made = layer((2, 3, 3), activation=activation, context_dim=2 if gated else 0)
    shared, rows = made._weights(context_of(made, 4), torch.Size([4]))
    inputs = [t.detach().requires_grad_() for t in (torch.randn(4, 2, 3, 3, dtype=torch.float64), *shared, *rows)]

    def plain(x, first, second, third, inner, outer, b1, b2, b3, t, gate=None):
        bias = [b.unflatten(-1, (2, 3))[..., None] for b in (b1, b2)]
        u1 = F.conv2d(x, first, padding=1).view(4, 2, 3, 9) + bias[0]
        u2 = F.conv2d(act.value(u1).view(4, 6, 3, 3), second, padding=1).view(4, 2, 3, 9) + bias[1]
        s1, s2 = (torch.autograd.grad(act.value(u).sum(), u, create_graph=True)[0] for u in (u1, u2))
        gates = 1.0 if gate is None else gate.view(4, 2, 3, 1)
        value = F.conv2d((act.value(u2) * gates).view(4, 6, 3, 3), third, padding=1) + b3 + t * x
        slopes = torch.einsum("ck,nckp,ckj,ncjp->ncp", outer, s2 * gates, inner, s1)
        return value, slopes.view(x.shape) + t

    ours = value_and_slope(made.convolutions, inputs[0], Weights(*inputs[1:]))
    truth = plain(*inputs)
    for ends in ((0,), (1,), (0, 1)):
        seeds = [torch.randn_like(truth[k]) for k in ends]
        pair = []
        for outs in (ours, truth):
            outs = [outs[k] for k in ends]
            grads = torch.autograd.grad(outs, inputs, seeds, retain_graph=True, create_graph=True, allow_unused=True)
            grads = [torch.zeros_like(v) if g is None else g for g, v in zip(grads, inputs, strict=True)]
            total = sum((g * g).sum() for g in grads)
            again = torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True)
            pair.append(
                [*grads, *(torch.zeros_like(v) if g is None else g for g, v in zip(again, inputs, strict=True))]
            )
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "context"])
@pytest.mark.parametrize(
    "shape, order, lower",
    [
        ((4, 3, 2), "channel", True),
        ((4, 2, 3), "channel", False),
        ((3, 2, 3), "position", False),
        ((4, 3), "channel", True),
    ],
)
@pytest.mark.parametrize("dilation", [1, 2])
def test_leaving_out_zeros_changes_nothing(shape, order, lower, gated, dilation):
    """Wide layers, whose convolutions go by tiles: against the whole ones, values and all gradients."""
    options = {"order": order, "lower": lower, "kernel_size": 5, "dilation": dilation}
    made = layer(shape, scale=1.0, num_groups=40, context_dim=int(gated), **options)
    first, second, third = made.convolutions.tiles
    assert len(second) == (2 if order == "channel" and shape[0] == 4 else 1) and len(first) == len(third) == 1
    shared, rows = made._weights(context_of(made, 3), torch.Size([3]))
    x = torch.randn(3, *as_image("test", shape), dtype=torch.float64)
    inputs = [t.detach().requires_grad_() for t in (x, *shared, *rows)]
    free = earlier_taps(shape[0], made.kernel, order, lower)
    pair = []

    def whole(x, weight, bias):
        padding = [n // 2 * dilation for n in weight.shape[2:]]
        out = F.conv2d(x, weight, padding=padding, dilation=dilation)
        return out if bias is None else out + bias[..., None, None]

    def untiled(plan, x, w):
        return convolved(plan.activation, x, w, [whole] * 3)

    for run in (value_and_slope, untiled):
        value, slope = run(made.convolutions, inputs[0], Weights(*inputs[1:]))
        grads = torch.autograd.grad((value.sin() + slope.log()).sum(), inputs)
        pair.append((value, slope, *grads))
    for k, (got, want) in enumerate(zip(*pair, strict=True)):
        if k in (3, 4, 5):  # weights: what stands in masked places has no gradient, for want of a parameter
            o, i = (n // shape[0] for n in want.shape[:2])
            middle = torch.zeros_like(free)
            middle[range(shape[0]), range(shape[0]), free.shape[2] // 2, free.shape[3] // 2] = True
            mask = (free | middle).repeat_interleave(o, 0).repeat_interleave(i, 1)
            got, want = got * mask, want * mask
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_gradients_of_some_inputs_only():
    """Each input alone, as when weights are frozen or only data are asked about."""
    made = layer((2, 2, 3), context_dim=1)
    shared, rows = made._weights(context_of(made, 3), torch.Size([3]))
    inputs = [t.detach() for t in (torch.randn(3, 2, 2, 3, dtype=torch.float64), *shared, *rows)]

    def total(values):
        value, slope = value_and_slope(made.convolutions, values[0], Weights(*values[1:]))
        return (value.sin() + slope.log()).sum()

    every = [t.clone().requires_grad_() for t in inputs]
    whole = torch.autograd.grad(total(every), every)
    for k in range(len(inputs)):
        one = [t.clone().requires_grad_(j == k) for j, t in enumerate(inputs)]
        torch.testing.assert_close(torch.autograd.grad(total(one), one[k])[0], whole[k])


def test_every_coordinate_increases_whatever_the_parameters():
    """T3: a scan of each coordinate, with weights ten times as large and negative ones among them."""
    made = layer((2, 2, 2), scale=10.0)
    grid = torch.linspace(-50, 50, 1001, dtype=torch.float64)
    start = torch.randn(8, dtype=torch.float64)
    for k in range(8):
        y = start.repeat(len(grid), 1)
        y[:, k] = grid
        x = made.inverse_and_ladj(y.view(-1, 2, 2, 2))[0].flatten(1)[:, k]
        assert (x.diff() > 0).all()


def test_a_centre_weight_may_cross_zero():
    """T15: the map is continuous where a magnitude is zero."""
    made = layer((2, 3, 3))
    y = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    for place in ((0, 1, 0), (1, 0, 3), (1, 2, 4)):  # of the second, the first and the third convolution
        ends = []
        for value in (5e-10, -5e-10):
            with torch.no_grad():
                made.centres[place] = value
            ends.append(made.inverse_and_ladj(y))
        torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


def test_samples_do_not_depend_on_their_batch():
    """T2: nor on train() and eval()."""
    flow = shake(pf.mintnet((2, 4, 4), num_layers=2, num_groups=2, squeeze=1), 0.1).double()
    y = torch.randn(6, 2, 4, 4, dtype=torch.float64)
    x, ladj = flow.inverse_and_ladj(y)
    for each in (flow.train(), flow.eval()):
        alone = each.inverse_and_ladj(y[2])
        mates = each.inverse_and_ladj(torch.cat((y[2:3], 10 * y[3:])))
        for got in (alone, (mates[0][0], mates[1][0])):
            torch.testing.assert_close(got[0], x[2], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(got[1], ladj[2], rtol=1e-12, atol=1e-12)


def test_a_stack_has_a_full_jacobian():
    """T1: pairs and a squeeze; both triangles are there, and the log-determinants add up."""
    for options in ({"squeeze": 1}, {"squeeze": 1, "split": True}, {"act_norm": True}, {"order": "position"}):
        flow = shake(pf.mintnet((1, 4, 4), num_layers=3, num_groups=4, **options), 0.15).double().eval()
        y = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
        x, ladj = flow.inverse_and_ladj(y)
        full = jacobians(x, y)
        torch.testing.assert_close(ladj, torch.linalg.slogdet(full)[1], rtol=1e-10, atol=1e-10)
        assert (full.triu(1) != 0).any() and (full.tril(-1) != 0).any()


def test_one_sided_flows_give_conditionals():
    """A triangular whole: the terms of the log-density are those of each coordinate given the ones before it."""
    flow = shake(pf.mintnet((1, 2, 3), num_layers=2, num_groups=2, one_sided=True), 0.3).double()
    assert all(part.lower for part in flow)
    y = torch.randn(3, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    x = flow.inverse_and_ladj(y)[0]
    full = jacobians(x, y)
    assert (full.triu(1) == 0).all()
    logs, value = 0, y
    for part in reversed(list(flow)):
        logs, value = logs + part.log_slopes(value), part.inv(value)
    torch.testing.assert_close(logs.flatten(1).exp(), full.diagonal(dim1=1, dim2=2), rtol=1e-10, atol=1e-12)


# The other direction


def trained(shape, **options):
    """A layer after some steps on correlated data."""
    made = pf.Mint(shape, num_groups=4, **options)
    data = torch.randn(64, *shape, dtype=torch.float64).cumsum(-1).tanh() * 2 + 1
    train(pf.Flow(made).double(), data, 40, 0.03)
    return made


@pytest.mark.parametrize("times", [1, 2])
def test_trained_layers_are_inverted(times):
    """T4, T6: also with all weights doubled, and for values from far out."""
    for options in ({}, {"order": "position", "lower": False}):
        made = scaled(trained((2, 4, 4), **options), times)
        check_layer(made)
        for far in (1.0, 4.0):
            x = far * torch.randn(20, 2, 4, 4, dtype=torch.float64)
            comes_back(made, x)
            report = made.last_solve
            assert report.converged and report.sweeps <= report.waves + 10
        single = copy.deepcopy(made).float()
        x = torch.randn(20, 2, 4, 4)
        back = single.inverse_and_ladj(single(x))[0]
        assert ((back - x).abs() <= 1e-4 * (1 + x.abs())).all()


@pytest.mark.parametrize("shape, order, lower", KINDS)
def test_shaken_layers_are_inverted(shape, order, lower):
    for options in ({}, {"context_dim": 2}):
        made = layer(shape, order=order, lower=lower, **options)
        x, context = torch.randn(6, *shape, dtype=torch.float64), context_of(made, 6)
        y, ladj = made.forward_and_ladj(x, context)
        y = y.detach().requires_grad_()
        back, minus = made.inverse_and_ladj(y, context)
        # Values far out lose digits: judged by what a rounding of y does.
        moved = (jacobians(back, y).abs() @ y.detach().abs().flatten(1).unsqueeze(-1)).view(x.shape)
        assert ((back - x).abs() <= 1e-11 + 5e3 * torch.finfo(x.dtype).eps * (x.abs() + moved)).all()
        torch.testing.assert_close(minus, -ladj, rtol=1e-8, atol=1e-8)
        assert made.last_solve.waves == int(made.waves.max()) + 1


def test_a_newton_cycle_is_left():
    """T5: one number, slope 0.05 far out and 40.05 at 0, where Newton's method alone goes in a cycle of two."""
    made = pf.Mint((1, 1, 1), num_groups=1).double()
    scaled(made, 0.0)
    with torch.no_grad():
        made.scale.fill_(math.sqrt(0.05**2 - 1e-6))
        made.centres[0, 0] = torch.tensor([40.0, 1.0, 1.0])
        made.signs.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1))
    values = torch.tensor([0.2, 1.0, 3.0, -1.0, -3.0, -0.2, 0.0, 20.0], dtype=torch.float64).view(-1, 1, 1, 1)
    y = made(values)
    torch.testing.assert_close(made.inverse_and_ladj(y)[0], values, rtol=1e-9, atol=1e-9)
    assert made.last_solve.sweeps < 60


def test_sweeps_are_counted(monkeypatch):
    """T6: the report's count is that of real evaluations, and few sweeps do at small weights."""
    made = layer((1, 6, 6), scale=1.0)
    calls = []
    plain = type(made.map).value_and_slope

    def counting(self, *args):
        calls.append(1)
        return plain(self, *args)

    monkeypatch.setattr(type(made.map), "value_and_slope", counting)
    with torch.no_grad():
        made.forward_and_ladj(torch.randn(5, 1, 6, 6, dtype=torch.float64))
    assert len(calls) == made.last_solve.evaluations + 1  # one more for the slopes at the solution
    assert made.last_solve.sweeps <= made.last_solve.waves + 10


@pytest.mark.parametrize("order", ORDERS)
def test_sweeps_are_about_as_many_as_waves(order):
    """T6: with random weights of up to three times Xavier's."""
    for gain in (0.3, 1.0, 3.0):
        made = pf.Mint((1, 8, 8) if order == "channel" else (2, 4, 4), num_groups=8, order=order).double()
        with torch.no_grad():
            for p in (made.taps_0, made.taps_1, made.taps_2, made.centres):
                p.mul_(gain / 0.005)  # which is their gain at first
        made(torch.randn(16, *made.event_shape, dtype=torch.float64))
        assert made.last_solve.sweeps <= made.last_solve.waves + 10


def test_too_few_sweeps_are_reported():
    """T7: on the plateau before the front has gone through, nothing comes back silently."""
    made = layer((1, 8, 8))
    made.settings = made.settings._replace(max_sweeps=(int(made.waves.max()) + 1) // 2)
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    refuses(RuntimeError, r"Mint layer \(1, 8, 8\).*residual.*max_sweeps=11", made, x)
    made.settings = made.settings._replace(on_fail="warn")
    with pytest.warns(RuntimeWarning, match="residual"):
        made(x)
    assert not made.last_solve.converged
    made.settings = made.settings._replace(max_sweeps=None, tolerance=1e-30)
    assert made(x).isfinite().all()  # what no float can reach ends all the same


@pytest.mark.parametrize(
    "shape, context_dim, options",
    [
        pytest.param((2, 2, 2), 0, {}, marks=pytest.mark.full),
        pytest.param((2, 2, 2), 2, {}, marks=pytest.mark.full),
        pytest.param((2, 3), 1, {}, marks=pytest.mark.full),
        pytest.param((1, 2, 2), 0, {"attention": 1, "head_dim": 5, "num_groups": 1}, marks=pytest.mark.full),
        pytest.param(
            (1, 3), 1, {"attention": 1, "head_dim": 3, "num_groups": 1, "lower": False}, marks=pytest.mark.full
        ),
    ],
)
def test_gradients_of_sampling(shape, context_dim, options):
    """T8, T14: of the solution and its log-determinant, after the base value, the context and every parameter."""
    made = layer(shape, scale=1.5, context_dim=context_dim, hidden_dims=(3,), tolerance=1e-15, **options)
    x = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    context = context_of(made, 2)
    names, params = zip(*made.named_parameters(), strict=True)
    more = [] if context is None else [context.requires_grad_()]

    both = Calls(made, "forward_and_ladj")
    names = [f"inner.{name}" for name in names]

    def run(x, *rest):
        given = rest[0] if more else None
        return torch.func.functional_call(both, dict(zip(names, rest[len(more) :], strict=True)), (x, given))

    assert torch.autograd.gradcheck(run, (x, *more, *params), atol=1e-6, rtol=1e-5)
    y = made.forward_and_ladj(x, context)[0]
    assert (in_order(jacobians(y, x), made).tril(-1) != 0).any()  # more than one over the diagonal


def test_memory_of_sampling_does_not_grow_with_sweeps():
    """T9: what is kept for the gradient, against one pass."""
    made = layer((1, 6, 6), num_groups=6)
    x = torch.randn(16, 1, 6, 6, dtype=torch.float64)

    kept_by_solving, kept_by_one_pass = (kept(run, x) for run in (made.forward_and_ladj, made.inverse_and_ladj))
    assert sum(kept_by_solving.values()) < 2 * sum(kept_by_one_pass.values())
    assert made.last_solve.sweeps > 3


def test_the_slopes_keep_at_most_two_hidden_maps():
    """S5: no tensor of pairs of groups is made, and beside the two hidden maps at most one of their size is kept."""
    made, rows = layer((1, 8, 8), num_groups=12), 32
    hidden = rows * 12 * 64
    sizes = {}

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(each, torch.Tensor):
                    sizes[func] = max(sizes.get(func, 0), each.numel())
            return out

    y = torch.randn(rows, 1, 8, 8, dtype=torch.float64)
    with Sizes():
        made.inverse_and_ladj(y)
    assert max(sizes.values()) == hidden * 9 / 8  # a convolution with the zeros of its mask left out makes one row more
    large = [size for size in kept(made.inverse_and_ladj, y).values() if size >= 8 * hidden]
    assert sum(large) <= 3 * 8 * hidden


# Parameters and state


def test_masked_taps_never_move():
    """T10: after steps with weight decay, what the masks forbid is exactly zero, and every parameter counts."""
    made = trained((2, 3, 3), order="position")
    optimiser = torch.optim.AdamW(made.parameters(), lr=0.05, weight_decay=0.1)
    y = torch.randn(8, 2, 3, 3, dtype=torch.float64)
    for _ in range(10):
        optimiser.zero_grad()
        x, ladj = made.inverse_and_ladj(y)
        (x.square().sum() - ladj.sum()).backward()
        assert all((p.grad != 0).all() for p in (made.taps_0, made.taps_1, made.taps_2, made.centres))
        optimiser.step()
    free = earlier_taps(2, (3, 3), "position")
    free[[0, 1], [0, 1], 1, 1] = True
    for weight in made._weights(None, torch.Size([1]))[0][:3]:
        out, into = (n // 2 for n in weight.shape[:2])
        mask = free.repeat_interleave(out, 0).repeat_interleave(into, 1)
        assert (weight[~mask] == 0).all() and (weight[mask] != 0).any()
    check_layer(made)


def test_state_survives():
    """T11: signs are drawn, so they are saved; everything else comes back as well."""
    made = layer((2, 3, 3), context_dim=1)
    y, context = torch.randn(4, 2, 3, 3, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
    want = made.inverse_and_ladj(y, context)
    made(want[0].detach(), context)
    torch.manual_seed(5)
    other = pf.Mint((2, 3, 3), num_groups=3, context_dim=1).double()
    assert not torch.equal(other.signs, made.signs)
    reload(made, other)
    for each in (other, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert each.last_solve is None
        torch.testing.assert_close(each.inverse_and_ladj(y, context), want, rtol=0, atol=0)
    assert not any(name in made.state_dict() for name in ("waves", "places", "center_signs", "min_slope"))


def test_parameters_do_not_depend_on_the_size():
    """R10: with a shared scale, a state loads into a layer for images of another size, and means the same there."""
    small, large = (pf.Mint((2, n, n), num_groups=2, shared_scale=True).double() for n in (4, 6))
    shake(small)
    large.load_state_dict(small.state_dict())
    y = torch.zeros(1, 2, 6, 6, dtype=torch.float64)
    y[..., :4, :4] = torch.randn(2, 4, 4, dtype=torch.float64)
    # By channel, later channels see all around them, the first only what comes before.
    got, want = large.inverse_and_ladj(y)[0], small.inverse_and_ladj(y[..., :4, :4])[0]
    torch.testing.assert_close(got[:, 0, :1, :1], want[:, 0, :1, :1])
    with pytest.raises(RuntimeError, match="size mismatch"):
        pf.Mint((2, 6, 6), num_groups=2).load_state_dict(pf.Mint((2, 4, 4), num_groups=2).state_dict())


def test_parameters_of_the_papers_networks():
    """Free taps alone: half of the published count of masked weights."""
    flow = pf.mintnet((1, 28, 28), **MINTNET_CONFIGURATIONS["mnist"])
    shapes = [(part.event_shape, part.num_groups) for part in flow if isinstance(part, pf.Mint)]
    assert [shapes.count(s) for s in (((1, 28, 28), 45), ((4, 14, 14), 11), ((16, 7, 7), 2))] == [12, 12, 16]
    assert 0.43e6 < sum(p.numel() for p in flow.parameters()) < 0.45e6
    assert set(MINTNET_CONFIGURATIONS) == {"mnist", "cifar10", "imagenet32"}


def test_fresh_flows_are_near_the_identity():
    for options in ({}, {"squeeze": 2, "split": True}, {"order": "position", "context_dim": 2}):
        flow = pf.mintnet((1, 8, 8), num_layers=4, **options)
        x = torch.randn(3, 1, 8, 8)
        context = torch.randn(3, 2) if flow.context_dim else None
        y, ladj = flow.forward_and_ladj(x, context)
        torch.testing.assert_close(y, x, rtol=0, atol=0.02)
        torch.testing.assert_close(ladj, torch.zeros(3), rtol=0, atol=0.01)


# Densities


@pytest.mark.full
def test_density_integrates_to_one():
    """T11: two pixels, on a grid."""
    flow = shake(pf.mintnet((1, 1, 2), num_layers=1, num_groups=2), 0.4).double()
    side = torch.linspace(-25, 25, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side).view(-1, 1, 1, 2)
    with torch.no_grad():
        mass = pf.Flow(flow).log_prob(grid).exp().sum() * (side[1] - side[0]) ** 2
    assert abs(float(mass) - 1) < 1e-3


def test_context_matters_and_is_batched():
    """Density and samples differ with the context; rows have their own."""
    made = layer((2, 3, 3), scale=1.0, context_dim=2)
    y = torch.randn(2, 3, 3, dtype=torch.float64)
    contexts = torch.randn(4, 1, 2, dtype=torch.float64)
    x, ladj = made.inverse_and_ladj(y.expand(3, 2, 3, 3), contexts)
    assert x.shape == (4, 3, 2, 3, 3) and ladj.shape == (4, 3)
    assert ladj[:, 0].unique().numel() == 4
    for k in range(4):
        alone = made.inverse_and_ladj(y, contexts[k, 0])
        torch.testing.assert_close(x[k, 1], alone[0])
        torch.testing.assert_close(ladj[k, 2], alone[1])
        torch.testing.assert_close(made.forward_and_ladj(x[k, 1], contexts[k, 0])[0], y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_context_that_is_not_finite_is_named(bad):
    made = layer((1, 2, 2), context_dim=2)
    with pytest.raises(ValueError, match=r"expected finite context's values.*the context is not finite, or"):
        made(torch.zeros(3, 1, 2, 2, dtype=torch.float64), torch.tensor([0.0, bad], dtype=torch.float64))


def test_log_slopes_check_their_arguments():
    made = layer((2, 3, 3))
    refuses(ValueError, "trailing shape", made.log_slopes, torch.randn(3, 3, dtype=torch.float64))
    refuses(TypeError, "float32", made.log_slopes, torch.randn(2, 3, 3))


def test_svi_trains_it():
    """T11: as a part of a Pyro model, parameters in the store; samples then have the data's moments (T13)."""
    data = torch.randn(256, 1, 2, 2) * 0.5 + torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    flow = pf.mintnet((1, 2, 2), num_layers=1, num_groups=4, act_norm=True)
    base = dist.Normal(torch.zeros(1, 2, 2), 1.0).to_event(3)

    def model(data):
        pyro.module("flow", flow)
        with pyro.plate("images", len(data)):
            pyro.sample("y", dist.TransformedDistribution(base, [flow]), obs=data)

    svi = pyro.infer.SVI(model, lambda data: None, pyro.optim.Adam({"lr": 0.02}), pyro.infer.Trace_ELBO())
    losses = [svi.step(data) for _ in range(60)]
    assert losses[-1] < losses[0] - 10
    assert any("taps" in name for name in pyro.get_param_store())
    with torch.no_grad():
        drawn = dist.TransformedDistribution(base, [flow]).sample((2000,))
    torch.testing.assert_close(drawn.mean(0), data.mean(0), rtol=0, atol=0.15)
    torch.testing.assert_close(drawn.std(0), data.std(0), rtol=0, atol=0.15)


@pytest.mark.slow
def test_digits_are_learnt():
    """T12: handwritten digits of 17 levels, in about a minute.  T13: draws have the moments of the data."""
    raw = torch.from_numpy(np.load(DIGITS)["x"])[:, None]
    raw = raw[torch.randperm(len(raw), generator=seeded(0))]
    train, validation, test = raw[:1297], raw[1297:1497], raw[1497:]
    flow = pf.mintnet((1, 8, 8), num_layers=8, num_groups=(16, 16), squeeze=1)
    model = pf.Dequantized(pf.Chain([*flow, pf.LogitPixels((1, 8, 8), 17, margin=1e-6)]), 17)
    options = {"lr": 6e-3, "batch_size": 64, "schedule": "cosine", "weight_decay": 0.3, "steps": 1000}
    fit_density(model, train.cpu().numpy(), validation.cpu().numpy(), progress=False, **options)
    with torch.no_grad():
        bits = float(pf.bits_per_dim(model.scores(test, num_noise_samples=4).mean(), (1, 8, 8)))
        drawn = model.sample((600,)).double()
        v = model.intensities(test, 1)[0]
        x = model.flow.chain.inv(v)
        back = model.flow.chain(x)
    # A Gaussian has 2.33; below 1.6 pixels would be leaking, or a log-determinant wrong.
    assert 1.6 < bits <= 1.95
    truth = raw.double()
    assert (drawn.mean(0) - truth.mean(0)).square().mean().sqrt() < 0.7
    assert (drawn.std(0) - truth.std(0)).square().mean().sqrt() < 0.7
    assert abs(float(drawn.mean() - truth.mean())) < 0.25
    assert (back - v).abs().max() < 1e-3


def test_autocast_keeps_the_density():
    made = layer((2, 3, 3), scale=1.0, double=False, context_dim=2)
    y, context = torch.randn(4, 2, 3, 3), torch.randn(4, 2)
    want = made.inverse_and_ladj(y, context)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        got = made.inverse_and_ladj(y, context)
        back = made.forward_and_ladj(got[0], context)[0]
    assert got[0].dtype == got[1].dtype == torch.float32
    # The context's network is a network like others; the map that it describes is inverted exactly.
    torch.testing.assert_close(got[1], want[1], rtol=0.1, atol=0.3)
    torch.testing.assert_close(back, y, rtol=1e-3, atol=1e-3)


def test_gradients_taken_under_autocast_are_the_same():
    made = layer((2, 3, 3), scale=1.0, double=False)
    y = torch.randn(4, 2, 3, 3)

    def grads():
        x, ladj = made.inverse_and_ladj(y)
        return torch.autograd.grad(x.square().sum() - ladj.sum(), list(made.parameters()))

    want = grads()
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        got = grads()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# Errors


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((4,), {}, r"Mint: expected an event of shape \(C, H, W\)"),
        ((1, 2, 3, 4), {}, r"or \(C, T\), got \(1, 2, 3, 4\)"),
        (4, {}, r"e\.g\. \(1, 28, 28\)"),
        ((1, 4, 4), {"kernel_size": 4}, "odd integer"),
        ((1, 4, 4), {"kernel_size": 0}, "odd integer"),
        ((1, 4, 4), {"num_groups": 0}, "num_groups"),
        ((1, 4, 4), {"order": "raster"}, "order"),
        ((1, 4, 4), {"min_slope": 0.0}, "min_slope"),
        ((1, 4, 4), {"on_fail": "ignore"}, "on_fail"),
        ((1, 4, 4), {"max_sweeps": 0}, "max_sweeps"),
        ((1, 4, 4), {"tolerance": -1.0}, "tolerance"),
        *(
            ((1, 4, 4), {"activation": a}, "never fall")
            for a in ("silu", "gelu", "mish", "relu", torch.nn.GELU(), F.elu)
        ),
        ((1, 4, 4), {"activation": torch.nn.Dropout()}, "dropout and batch normalization"),
    ],
)
def test_layers_refuse(shape, options, message):
    refuses(ValueError, message, pf.Mint, shape, **options)


@pytest.mark.parametrize(
    "shape, options, message",
    [
        (3, {}, r"mintnet: expected an event of shape \(C, H, W\)"),
        ((1, 6, 6), {"squeeze": 2}, "halved 2 times.*multiples of 4"),
        ((1, 8, 8), {"squeeze": 2, "num_layers": 2}, "num_layers > squeeze"),
        ((1, 8, 8), {"squeeze": -1}, "squeeze"),
        ((1, 8, 8), {"num_layers": 0}, "num_layers"),
        ((1, 8, 8), {"split": True}, "squeeze >= 1"),
        ((1, 8, 8), {"one_sided": True, "squeeze": 1}, "squeeze=0"),
        ((1, 8, 8), {"num_groups": (4, 2)}, "an integer or 1 of them"),
        ((1, 8, 8), {"num_groups": 0}, "num_groups"),
        ((1, 8, 8), {"num_groups": 2.5}, r"an integer or 1 of them.*got 2\.5"),
        ((1, 8, 8), {"num_groups": "8"}, "an integer or 1 of them.*got '8'"),
    ],
)
def test_builders_refuse(shape, options, message):
    refuses(ValueError, message, pf.mintnet, shape, **options)
