"""Rational-quadratic splines against an independent computation, at every knot and bound, and far out of range."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from asserts import refuses

import pyro_flows as pf
from pyro_flows.univariate import spline
from pyro_flows.univariate.base import Univariate

BOUNDARIES = ["linear", "identity", "circular"]
EACH = pytest.mark.parametrize("boundary", BOUNDARIES)
EVERY = pytest.mark.parametrize("boundary", [*BOUNDARIES, pytest.param("interval", marks=pytest.mark.full)])
BOTH = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def knots(family, params):
    """Knots and slopes ``(xs, ys, slopes)`` of one spline, in extended precision, from the formulas of the paper."""
    params, count = np.asarray(params, dtype=np.longdouble), family.bins
    reach = np.log(np.longdouble(1000))

    def clipped(a, bound):
        return np.exp(a / (1 + np.abs(a) / bound))

    def positions(raw):
        sizes = clipped(raw, reach / 2)
        at = np.concatenate(([np.longdouble(0)], np.cumsum(sizes))) / sizes.sum()
        return family.bound * (2 * at - 1)

    slopes = clipped(params[2 * count :], reach)
    one = np.ones(1, dtype=np.longdouble)
    if family.boundary == "identity":
        slopes = np.concatenate((one, slopes, one))
    elif family.boundary == "circular":
        slopes = np.concatenate((slopes[:count], slopes[:1]))
    return positions(params[:count]), positions(params[count : 2 * count]), slopes


def oracle(family, x, params):
    """``(y, log slope)`` of one number by the textbook formula, bin found by a search."""
    xs, ys, slopes = knots(family, params)
    x = np.longdouble(x)
    if x <= xs[0]:
        return ys[0] + slopes[0] * (x - xs[0]), np.log(slopes[0])
    if x >= xs[-1]:
        return ys[-1] + slopes[-1] * (x - xs[-1]), np.log(slopes[-1])
    k = int(np.searchsorted(xs, x)) - 1
    width, height = xs[k + 1] - xs[k], ys[k + 1] - ys[k]
    s, t = height / width, (x - xs[k]) / width
    den = s + (slopes[k] + slopes[k + 1] - 2 * s) * t * (1 - t)
    y = ys[k] + height * (s * t**2 + slopes[k] * t * (1 - t)) / den
    slope = s**2 * (slopes[k + 1] * t**2 + 2 * s * t * (1 - t) + slopes[k] * (1 - t) ** 2) / den**2
    return y, np.log(slope)


def hostile(family, spread, dtype, splines=400):
    """Splines of wild parameters with inputs at every knot, at both bounds, next to them, inside and far outside."""
    params = spread * torch.randn(splines, family.num_params, dtype=torch.float64)
    points = []
    for each in params:
        xs, ys, _ = knots(family, each.cpu().numpy())
        exact = torch.tensor(np.concatenate((xs, ys)).astype(np.float64))
        edges = torch.tensor([-1.0, 1.0]) * family.bound
        near = torch.nextafter(edges.to(dtype), torch.zeros((), dtype=dtype)).double()
        rest = torch.cat((torch.randn(50 - exact.numel() - 8) * family.bound, torch.tensor([0.0, 1e-30, 1e4, -1e4])))
        points.append(torch.cat((exact, edges, near, rest)))
    x = torch.stack(points)
    params = params[:, None].expand(*x.shape, family.num_params)
    if family.boundary == "circular":
        x = x.clamp(-math.pi, math.pi)
    return x.to(dtype), params.to(dtype).contiguous()


@pytest.mark.parametrize("spread", [5.0, 20.0, 100.0])
@EVERY
@BOTH
def test_nothing_ever_is_nan_or_infinite(boundary, spread, inverse):
    family = pf.Spline(8, boundary=boundary)
    x, params = hostile(family, spread, torch.float32)
    assert x.numel() == 20_000
    x.requires_grad_()
    params.requires_grad_()
    y, ladj = (family.inverse if inverse else family.forward)(x, params)
    assert y.isfinite().all() and ladj.isfinite().all()
    for scalar in (y.sum(), ladj.sum()):
        for grad in torch.autograd.grad(scalar, (x, params), retain_graph=True):
            assert grad.isfinite().all()
    # The same by automatic differentiation, which is what compilers and torch.func see.
    y, ladj, _ = family.run(inverse, x, params.movedim(-1, 0))
    for grad in torch.autograd.grad(y.sum() + ladj.sum(), (x, params)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("spread", [1.0, 5.0, 20.0, 100.0])
@EACH
def test_single_precision_is_exact_for_an_input_a_few_roundings_away(boundary, spread):
    """So is the round trip; steep and flat places, where no tolerance on the outcome would fit, are no exception."""
    family = pf.Spline(8, boundary=boundary)
    x, params = hostile(family, spread, torch.float32)
    if boundary == "circular":
        params[..., -1] = 0.0  # the rotation has a test of its own, and so have the ends
        x = x.clamp(-3.14, 3.14)
    for move, back in ((family.forward, family.inverse), (family.inverse, family.forward)):
        y, ladj = move(x, params)
        again = back(y, params)[0]
        slack = 16 * torch.finfo(torch.float32).eps
        wide = slack * (x.abs() + family.bound).double()
        low, high = (move(x.double() + sign * wide, params.double())[0] for sign in (-1, 1))
        for found in (y, move(again, params)[0]):
            slip = slack * (found.abs() + family.bound).double()
            turns = (0, -1, 1) if boundary == "circular" else (0,)  # pi and -pi are one
            at = [found.double() + 2 * math.pi * turn for turn in turns]
            assert torch.stack([(low - slip <= each) & (each <= high + slip) for each in at]).any(0).all()
        if spread == 1.0:
            size = x.abs() + family.bound + (-ladj).exp() * (y.abs() + family.bound)
            error = (again - x).abs()
            error = torch.minimum(error, 2 * math.pi - error) if boundary == "circular" else error
            assert (error <= slack * size).all()


@pytest.mark.parametrize("spread", [1.0, 5.0, 20.0])
@EVERY
def test_round_trip_in_double_precision(boundary, spread):
    family = pf.Spline(8, boundary=boundary)
    x, params = hostile(family, spread, torch.float64)
    for move, back in ((family.forward, family.inverse), (family.inverse, family.forward)):
        y, ladj = move(x, params)
        again, minus = back(y, params)
        error = (again - x).abs()
        error = torch.minimum(error, 2 * math.pi - error) if boundary == "circular" else error
        turn = params[..., -1].abs() if boundary == "circular" else 0.0
        size = x.abs() + family.bound + torch.maximum(-ladj, minus).exp() * (y.abs() + family.bound + turn)
        assert (error <= 64 * torch.finfo(torch.float64).eps * size).all()
        if spread == 1.0:
            assert (ladj + minus).abs().max() <= 1e-10


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0, 20.0, 100.0])
@pytest.mark.parametrize("boundary, bins, bound", [("linear", 8, None), ("identity", 2, 3.0), ("circular", 5, None)])
def test_against_an_independent_computation(boundary, bins, bound, spread):
    family = pf.Spline(bins, bound, boundary)
    x = torch.rand(300, dtype=torch.float64) * 2 * family.bound - family.bound
    if boundary != "circular":
        x[::10] *= 3
    params = spread * torch.randn(300, family.num_params, dtype=torch.float64)
    if boundary == "circular":
        params[:, -1] = 0.0  # the rotation has a test of its own
    y, ladj = family.forward(x, params)
    back = family.inverse(y, params)[0]
    for k in range(300):
        want_y, want_log = oracle(family, x[k].item(), params[k].cpu().numpy())
        near = [oracle(family, x[k].item() * (1 + sign * 1e-9), params[k].cpu().numpy())[1] for sign in (-1, 1)]
        steep = max(abs(float(each - want_log)) for each in near) / 1e-9  # of the log slope, per relative change of x
        slope = math.exp(float(want_log))
        assert abs(float(want_y - y[k].item())) <= 1e-12 * (1 + abs(float(want_y)) + slope * abs(x[k].item()))
        assert abs(float(want_log - ladj[k].item())) <= 1e-12 * (1 + steep)
    assert ((back - x).abs() <= 1e-13 * (x.abs() + family.bound) * (1 + (-ladj).exp())).all()


@EVERY
@BOTH
def test_gradients_by_finite_differences(boundary, inverse):
    family = pf.Spline(4, boundary=boundary)
    x = torch.randn(12, dtype=torch.float64) * (1 if boundary == "circular" else 4)
    params = torch.randn(12, family.num_params, dtype=torch.float64)
    move = family.inverse if inverse else family.forward
    inputs = (x.requires_grad_(), params.requires_grad_())
    assert torch.autograd.gradcheck(move, inputs)
    assert torch.autograd.gradgradcheck(move, (x[:3].detach().requires_grad_(), params[:3].detach().requires_grad_()))


@EVERY
@BOTH
@pytest.mark.parametrize("spread", [1.0, 10.0])
def test_closed_form_gradients_equal_automatic_ones(boundary, inverse, spread):
    family = pf.Spline(6, boundary=boundary)
    z = torch.randn(5, 7, dtype=torch.float64) * 4
    if boundary == "interval":  # the same places in its smaller square
        z = 0.5 + z / 10
    params = spread * torch.randn(family.num_params, 5, 7, dtype=torch.float64)
    grad, grad_ladj = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    x, ladj, kept = family.run(inverse, z, params)
    got = family.pull(inverse, z, x, ladj, kept, grad, grad_ladj)
    want = Univariate.pull(family, inverse, z, x, ladj, (params,), grad, grad_ladj)
    for have, true in zip(got, want, strict=True):
        assert ((have - true).abs() <= 1e-11 * (1 + true.abs() + true.abs().max() * (spread > 1))).all()
    weight = torch.randn(7, dtype=torch.float64)
    got = family.partials(inverse, z, params, x, ladj, weight)
    pull = torch.func.vjp(lambda *inputs: family.plain(inverse, *inputs), z, params)[1]
    want = (*pull((torch.ones_like(x), torch.zeros_like(x))), *pull((torch.zeros_like(x), weight.expand_as(x))))
    for have, true in zip(got, want, strict=True):
        assert have.shape == true.shape
        assert ((have - true).abs() <= 1e-11 * (1 + true.abs() + true.abs().max() * (spread > 1))).all()


@EVERY
def test_zero_parameters_are_the_identity(boundary):
    family = pf.Spline(8, boundary=boundary)
    x = torch.randn(200, dtype=torch.float64) * (0.9 if boundary == "circular" else 5)
    for move in (family.forward, family.inverse):
        y, ladj = move(x, torch.zeros(200, family.num_params, dtype=torch.float64))
        assert (y - x).abs().max() <= 1e-14 * 20
        assert ladj.abs().max() <= 1e-14


@EACH
def test_slope_is_continuous_at_all_knots_and_bounds(boundary):
    family = pf.Spline(8, boundary=boundary)
    params = torch.randn(family.num_params, dtype=torch.float64)
    xs = torch.tensor(knots(family, params.cpu().numpy())[0].astype(np.float64))
    step = 1e-9
    sides = [family.forward(xs + sign * step, params.expand(len(xs), -1)) for sign in (-1, 1)]
    if boundary == "circular":  # the ends meet
        assert abs(sides[0][1][0] - sides[1][1][-1]) <= 1e-6
    jump = (sides[1][0] - sides[0][0] + math.pi).remainder(2 * math.pi) - math.pi
    assert jump.abs().max() <= 1e-6
    assert (sides[1][1] - sides[0][1]).abs().max() <= 1e-6


def test_linear_tails_go_on_with_a_learnt_slope_and_identity_tails_do_not():
    x = torch.tensor([-50.0, -6.0, 6.0, 50.0], dtype=torch.float64)
    for boundary in ("linear", "identity"):
        family = pf.Spline(4, boundary=boundary)
        params = torch.randn(family.num_params, dtype=torch.float64)
        y, ladj = family.forward(x, params.expand(4, -1))
        slopes = knots(family, params.cpu().numpy())[2][[0, -1]].astype(np.float64)
        low, high = slopes
        want = torch.tensor([-5 - 45 * low, -5 - low, 5 + high, 5 + 45 * high])
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(ladj, torch.tensor([low, low, high, high]).log())
        if boundary == "identity":
            torch.testing.assert_close(y, x)


def test_circular_spline_is_periodic_and_rotates():
    family = pf.Spline(5, boundary="circular")
    params = torch.randn(40, family.num_params, dtype=torch.float64)
    x = torch.rand(40, dtype=torch.float64) * 2 * math.pi - math.pi
    y, ladj = family.forward(x, params)
    assert (y >= -math.pi).all() and (y <= math.pi).all()
    for turns in (-3, 1, 10):
        again, same = family.forward(x + 2 * math.pi * turns, params)
        assert (torch.polar(torch.ones_like(y), y) - torch.polar(torch.ones_like(y), again)).abs().max() <= 1e-10
        assert (ladj - same).abs().max() <= 1e-10
    still = params.clone()
    still[:, -1] = 0.0
    unturned = family.forward(x, still)[0] + params[:, -1]
    assert (torch.sin(unturned) - torch.sin(y)).abs().max() <= 1e-12
    assert (torch.cos(unturned) - torch.cos(y)).abs().max() <= 1e-12


@EACH
@BOTH
def test_large_inputs_go_in_pieces(boundary, inverse, monkeypatch):
    family = pf.Spline(3, boundary=boundary)
    z, params = torch.randn(2, 20, 5, dtype=torch.float64), torch.randn(2, 20, 5, family.num_params).double()
    z.requires_grad_()
    params.requires_grad_()
    move = family.inverse if inverse else family.forward

    def all_of_it():
        out = move(z, params)
        return (*out, *torch.autograd.grad((out[0] * out[1]).sum(), (z, params)))

    whole = all_of_it()
    monkeypatch.setattr(spline, "_PIECE", 16)  # three rows of five at a time, the last piece shorter
    torch.testing.assert_close(all_of_it(), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("order", ["identity", "random"])
@pytest.mark.parametrize("residual", [False, True])
def test_outputs_made_in_bands(order, residual, context_dim):
    """Values and gradients of a pass by bands are those of the plain way."""
    options = {"hidden_dims": (256, 256), "order": order, "residual": residual, "context_dim": context_dim}
    flow = pf.Autoregressive(11, pf.Spline(8), **options).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    y = torch.randn(250, 11, dtype=torch.float64, requires_grad=True)
    context = torch.randn(250, context_dim, dtype=torch.float64) if context_dim else None
    inputs = [y, *flow.parameters()]
    assert len(y) >= flow.net.layers.cuts[-1].worth_from
    got = flow.inverse_and_ladj(y, context)
    grads = torch.autograd.grad((got[0] * got[0].detach().cos()).sum() + got[1].sum(), inputs)
    with torch.no_grad():
        torch.testing.assert_close(flow.inverse_and_ladj(y, context), got, rtol=0, atol=0)
    with _Tracing():
        want = flow.inverse_and_ladj(y, context)
        truth = torch.autograd.grad((want[0] * want[0].detach().cos()).sum() + want[1].sum(), inputs)
    for have, true in zip((*got, *grads), (*want, *truth), strict=True):
        torch.testing.assert_close(have, true, rtol=1e-9, atol=1e-9)


class _Tracing(torch.utils._python_dispatch.TorchDispatchMode):
    """Any dispatch mode turns hand-made kernels off."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("inverse", [False, True])
def test_an_nsf_of_a_known_density(inverse):
    """One dimension, no conditioner: a spline that maps the uniform law of its square has a piecewise density."""
    flow = pf.Flow(pf.nsf(1, num_layers=1, bins=4)).double()
    with torch.no_grad():
        flow.chain[0].net.constant.copy_(torch.randn(flow.chain[0].net.constant.shape))
    grid = torch.linspace(-60, 60, 240_001, dtype=torch.float64)[:, None]
    mass = torch.trapezoid(flow.log_prob(grid).exp(), grid[:, 0])
    assert abs(mass - 1) <= 1e-6


ERRORS = {
    "one bin": ({"bins": 1}, "integer >= 2, got 1"),
    "bins, float": ({"bins": 8.0}, "integer >= 2, got 8.0"),
    "bound, zero": ({"bound": 0.0}, "positive and finite, got 0.0"),
    "bound, infinite": ({"bound": math.inf}, "positive and finite, got inf"),
    "boundary": ({"boundary": "reflecting"}, "'reflecting'"),
    "circle with a bound": ({"boundary": "circular", "bound": 1.0}, "leave bound out"),
}


@pytest.mark.parametrize("options, message", ERRORS.values(), ids=ERRORS)
def test_bad_options_are_refused(options, message):
    refuses(ValueError, message, pf.Spline, **options)


def test_splines_are_values():
    assert pf.Spline() == pf.Spline(8, 5.0, "linear") and hash(pf.Spline()) == hash(pf.Spline(8))
    assert pf.Spline() != pf.Spline(boundary="identity")
    assert "bins=8" in repr(pf.Spline()) and "boundary=linear" in repr(pf.Spline())
    assert [pf.Spline(4, boundary=b).num_params for b in BOUNDARIES] == [13, 11, 13]
