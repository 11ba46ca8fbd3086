"""Continuous flows pushed: rows and their mates, every field through the contract, empty batches, unfit fields."""

import math
import threading

import pytest
import torch
from asserts import refuses
from cases import Field, shake
from torch import nn

import pyro_flows as pf
from pyro_flows.testing import check_transform
from pyro_flows.transforms.continuous.layer import collect_penalties

FIELDS = {
    "concatsquash": (3, {"field": "concatsquash"}),
    "concatsquash-autonomous": (3, {"field": "concatsquash", "time_dependent": False}),
    "deep": (2, {"field": "concatsquash", "hidden_dims": (4, 4, 4)}),
    "mlp-autonomous": ((1, 2), {"field": "mlp", "time_dependent": False, "activation": "silu"}),
    "mlp": (2, {"field": "mlp", "activation": "softplus"}),
    "conv": ((1, 2, 2), {"field": "conv", "hidden_dims": (2,)}),
    "conv-autonomous": ((1, 3), {"field": "conv", "hidden_dims": (2,), "time_dependent": False}),
}


def build(name, context_dim=0, **options):
    shape, own = FIELDS[name]
    return shake(
        pf.cnf(shape, context_dim=context_dim, **{"hidden_dims": (4,), "gradient": "adjoint", **own, **options}), 0.3
    )


@pytest.mark.slow
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("name", FIELDS)
def test_contract_of_every_field(name, context_dim):
    flow = build(name, context_dim, solver="dopri8", rtol=1e-12, atol=1e-12).double()
    x = torch.randn(5, *flow.event_shape, dtype=torch.double)
    context = torch.randn(5, context_dim, dtype=torch.double) if context_dim else None
    check_transform(flow, x, context, rtol=2**16 * torch.finfo(torch.double).eps)


@pytest.mark.full
@torch.no_grad()
def test_rows_differ_with_their_mates_as_far_as_the_tolerance_lets_them():
    """What is off in the log-density, and how far a row alone is from itself among others."""

    def score(flow, y):
        x, ladj = flow.inverse_and_ladj(y)
        return ladj - 0.5 * x.square().sum(-1)

    def make(tolerance, per_row=False):
        flow = pf.cnf(2, hidden_dims=(16, 16), rtol=tolerance, atol=tolerance, per_row=per_row).double()
        flow.load_state_dict(state)
        return flow

    state = shake(pf.cnf(2, hidden_dims=(16, 16)), 0.8).state_dict()
    y = 2 * torch.randn(100, 2, dtype=torch.double)
    truth = score(make(1e-12), y)
    moved = []
    for tolerance in (1e-4, 1e-7):
        off = {}
        for per_row in (False, True):
            flow = make(tolerance, per_row)
            among = score(flow, y)
            alone = torch.cat([score(flow, row[None]) for row in y[:12]])
            off[per_row] = (among - truth).abs().max() / tolerance
            moved.append((alone - among[:12]).abs().max())
            # Apart by no more than each of them is off.
            error_alone = (alone - truth[:12]).abs()
            assert ((alone - among[:12]).abs() <= error_alone + (among - truth)[:12].abs() + 1e-12).all()
            assert error_alone.max() < 1000 * tolerance
        assert off[True] < 30
        assert off[True] < off[False] < 1000
    assert moved[0] > 30 * moved[2]  # it goes with the tolerance


@pytest.mark.parametrize("gradient", ["adjoint", "backprop"])
def test_an_empty_batch_has_gradients_of_zero(gradient):
    flow = pf.Flow(pf.cnf(2, hidden_dims=(4,), gradient=gradient, context_dim=1))
    with torch.no_grad():
        next(flow.parameters()).fill_(torch.nan)
    context = torch.zeros(2, 1, 1, requires_grad=True)
    flow.log_prob(torch.zeros(2, 0, 2), context).sum().backward()
    assert torch.equal(context.grad, torch.zeros_like(context))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in flow.parameters())


def test_forward_mode_is_refused_in_words():
    flow = build("mlp")
    x = torch.randn(2)
    for run in (lambda: torch.func.jacfwd(flow)(x), lambda: torch.func.jvp(flow, (x,), (x,))):
        refuses(NotImplementedError, r"no derivatives in forward mode .*use torch\.func\.jacrev", run)


def test_an_adjoint_that_loses_its_way_says_so():
    """Behind a contraction by e^-20 there is nothing left to go back from, but through the solver's own steps."""
    x = torch.randn(3, 2, requires_grad=True)
    lost = pf.cnf(2, field=Field(lambda t, x, rate: rate * x, torch.tensor(-20.0)), gradient="adjoint")
    y = lost(x)
    with pytest.warns(RuntimeWarning, match=r"did not find back to where some rows began.*gradient=\"backprop\""):
        y.sum().backward()
    exact = pf.cnf(2, field=Field(lambda t, x, rate: rate * x, torch.tensor(-20.0)), gradient="backprop")
    (got,) = torch.autograd.grad(exact.forward_and_ladj(x)[1].sum(), list(exact.parameters()))
    torch.testing.assert_close(got, torch.tensor(6.0))  # ladj is twice the rate


class Noisy(nn.Module):
    def forward(self, x):
        return torch.randn_like(x)


def test_the_row_that_is_stiff_is_named():
    stiff = Field(lambda t, x: torch.cat([-1e5 * x[:, :1], x[:, 1:]], 1))
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    with pytest.raises(RuntimeError, match=r"at t=0\.00.*hardest rows are \[1\].*raise solver_steps \(100\)"):
        pf.cnf(2, field=stiff, solver_steps=100)(x)


@pytest.mark.parametrize("field", [nn.BatchNorm1d(2), nn.Dropout(), Noisy()])
def test_fields_that_are_no_function_of_a_row_are_refused(field):
    refuses(ValueError, "treats rows independently", pf.cnf, 2, field=Field(lambda t, x: field(x)))


class Wrong(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.linear = nn.Linear(3 if how == "size" else 2, 2)

    def forward(self, t, x):
        if self.how == "in place":
            return x.mul_(0.5)
        if self.how == "detached":
            return self.linear(x.detach())
        if self.how == "no_grad":
            with torch.no_grad():
                return torch.sin(x)
        if self.how == "constant":
            return self.linear.bias.expand(x.shape)
        if self.how == "ones":
            return torch.ones_like(x)
        return self.linear(x)


@pytest.mark.parametrize(
    "field, context_dim, kind, message",
    [
        (nn.Linear(2, 2), 0, TypeError, r"field Linear: .* called as field\(t, x\), t a scalar, x of shape \(3, 2\)"),
        (Wrong("size"), 0, TypeError, r"field Wrong: .*ended in RuntimeError \(mat1 and mat2"),
        (Wrong(""), 1, TypeError, r"called as field\(t, x, context\), .* context of shape \(3, 1\)"),
        (Wrong("in place"), 0, ValueError, "field Wrong: it writes into x"),
        (Wrong("detached"), 0, ValueError, r"changes with x, but there is no gradient .*without detach\(\)"),
        (Wrong("no_grad"), 0, ValueError, "changes with x, but there is no gradient"),
    ],
)
def test_fields_are_tried_in_words(field, context_dim, kind, message):
    refuses(kind, message, pf.cnf, 2, field=field, context_dim=context_dim)


def test_a_constant_field_and_one_made_in_inference_mode_are_none_of_these():
    x = torch.randn(3, 2)
    for how in ("constant", "ones"):
        y, ladj = pf.cnf(2, field=Wrong(how)).forward_and_ladj(x)
        assert torch.equal(ladj, torch.zeros(3)) and not torch.equal(x, y)
    with torch.inference_mode():
        pf.cnf(2, field=Wrong(""))(x)


@pytest.mark.parametrize(
    "options, kind, message",
    [
        (
            {"hidden_dims": 64},
            TypeError,
            "expected hidden_dims to be positive integers in a tuple, which may be empty, got 64",
        ),
        ({"activation": nn.Tanh}, TypeError, r"a function, e\.g\. torch\.sin, got the class Tanh"),
        ({"solver": ["rk4"]}, ValueError, r"solver to be 'dopri5', .*, got \['rk4'\]"),
        ({"event_shape": 2.0}, ValueError, "input_dim or event_shape to be positive integers, got 2.0"),
    ],
)
def test_options_of_another_kind(options, kind, message):
    refuses(kind, message, pf.cnf, **{"event_shape": 2, **options})


@pytest.mark.parametrize("times", [[], [math.nan], [0.0, math.nan], [0.5, 0.2], [-0.1], [1.1], "ab", 0.5, torch.eye(2)])
def test_times_of_a_path(times):
    with pytest.raises(ValueError, match="expected increasing times between 0 and 1, got"):
        build("mlp")[0].path(torch.randn(3, 2), times)


def test_a_gradient_that_is_not_finite_is_not_blamed_on_the_field():
    y = build("mlp")(torch.randn(4, 2))
    weights = torch.ones(4, 2)
    weights[2, 1] = math.nan
    with pytest.raises(RuntimeError, match=r"expected a finite gradient .* in rows \[2\] \(1 of 4\); what the loss"):
        (y * weights).sum().backward()


@pytest.mark.parametrize("power", [-80, 80])
def test_the_adjoint_does_not_mind_scales_whose_squares_leave_float32(power):
    flow = build("mlp")
    x, grads, counts = torch.randn(5, 2), [], []
    for scale in (1.0, 2.0**power):
        y, ladj = flow.forward_and_ladj(x)
        loss = scale * (y.square().sum() + ladj.sum())
        grads.append([g / scale for g in torch.autograd.grad(loss, list(flow.parameters()))])
        counts.append(flow[0].last_solve.backward_evaluations)
    assert counts[0] == counts[1]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("power", [-80, 0, 80])
def test_the_tolerance_of_the_adjoint_goes_with_the_gradient(power):
    """At rest, where all that moves is the gradient, by a rotation."""

    turning = Field(lambda t, x: 6 * torch.stack([-x[:, 1], x[:, 0]], 1))
    x = torch.zeros(1, 2, requires_grad=True)
    y = pf.Continuous(2, turning, gradient="adjoint")(x)
    (got,) = torch.autograd.grad(y[0, 0] * 2.0**power, x)
    want = torch.tensor([[math.cos(6), -math.sin(6)]])
    torch.testing.assert_close(got / 2.0**power, want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("direction", ["forward_and_ladj", "inverse_and_ladj"])
def test_solves_and_adjoints_keep_full_precision_under_autocast(direction):
    flow = build("concatsquash", 2)
    x, context = torch.randn(4, 3), torch.randn(4, 2)

    def made():
        y, ladj = getattr(flow, direction)(x, context)
        grads = torch.autograd.grad(y.square().sum() + ladj.sum(), list(flow.parameters()))
        return [y, ladj, *grads]

    want = made()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got = made()
        half = getattr(flow, direction)(x.bfloat16(), context.bfloat16())[0]
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert half.dtype is torch.float32


def test_penalties_of_another_thread_are_its_own():
    pytest.importorskip("torchdiffeq")  # a thread would fail alone
    flow, x = build("mlp", kinetic=1.0), torch.randn(3, 2)
    inside = []

    def other():
        flow.forward_and_ladj(x)
        with collect_penalties() as own:
            flow.forward_and_ladj(2 * x)
        inside.append(len(own.parts))

    with collect_penalties() as penalties:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert not penalties.parts
        flow.forward_and_ladj(x)
    assert len(penalties.parts) == 1 and inside == [1]


def test_a_field_that_narrows_on_the_way():
    flow = pf.cnf(2, field=Field(lambda t, x: x if float(t) < 0.6 else x[:, :1]))
    message = r"Field: expected a velocity with the shape of x, \(5, 2\), got \(5, 1\)"
    refuses(ValueError, message, flow, torch.randn(5, 2))


@pytest.mark.parametrize("solver", ["dopri5", "rk4", "euler"])
def test_parameters_that_are_nan_are_named(solver):
    flow = pf.cnf(2, hidden_dims=(4,), solver=solver)
    with torch.no_grad():
        next(flow.parameters()).fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"not finite at t=0 in rows \[0, 1, 2\].*its parameters are not finite"):
        flow(torch.randn(3, 2))
