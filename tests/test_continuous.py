"""Continuous flows: fields, divergences, solves and gradients, against closed forms, autograd and finer solves."""

import inspect
import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from asserts import refuses
from cases import Field, full_but, shake
from oracles import kept
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_flows as pf
from pyro_flows.transforms.continuous.divergence import Estimator, columns, draw, probes_of
from pyro_flows.transforms.continuous.field_nets import ChainField, ConvField
from pyro_flows.transforms.continuous.fields import GivenField
from pyro_flows.transforms.continuous.layer import collect_penalties
from pyro_flows.transforms.continuous.ode_solver import ADAPTIVE, FIXED

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
FIELDS = {
    "concatsquash-1": lambda c: ChainField(3, hidden_dims=(5,), context_dim=c),
    "concatsquash-2": lambda c: ChainField(3, hidden_dims=(5, 4), context_dim=c, activation="softplus"),
    "concatsquash-4": lambda c: ChainField((3, 1), hidden_dims=(5, 4, 3, 4), context_dim=c, activation="silu"),
    "concatsquash-none": lambda c: ChainField(3, hidden_dims=(), context_dim=c),
    "mlp-2": lambda c: ChainField(3, hidden_dims=(4, 5), context_dim=c, squash=False),
    "mlp-autonomous": lambda c: ChainField((1, 3), hidden_dims=(4,), context_dim=c, squash=False, time_dependent=False),
    "squash-autonomous": lambda c: ChainField(3, hidden_dims=(4, 4), context_dim=c, time_dependent=False),
    "own-activation": lambda c: ChainField(3, hidden_dims=(4, 4), context_dim=c, activation=torch.sin),
    "conv": lambda c: ConvField((1, 3, 1), hidden_channels=(2, 2), context_dim=c),
    "conv-series": lambda c: ConvField((1, 3), hidden_channels=(2,), context_dim=c, time_dependent=False),
    "given": lambda c: GivenField(Wave(3, c), 3, c),
}


class Wave(nn.Module):
    def __init__(self, size, context_dim=0):
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.context = nn.Linear(context_dim, size) if context_dim else None

    def forward(self, t, x, context=None):
        pre = self.linear(torch.tanh(x)) * torch.cos(t) + torch.sin(x)
        return pre if context is None else pre + self.context(context)


def linear(matrix):
    return Field(lambda t, x, matrix: x @ matrix.T, matrix)


def shrinking():
    """Rows whose first number is large are stiff."""
    return Field(lambda t, x: torch.sin(x[:, :1] ** 2 * t * 3) * torch.ones_like(x))


def small(**options):
    settings = {"hidden_dims": (6, 6), "gradient": "adjoint", **TIGHT, **options}
    context_dim = settings.pop("context_dim", 0)
    return shake(pf.cnf(settings.pop("size", 2), context_dim=context_dim, **settings).double(), 0.4)


def jacobian(function, rows):
    return torch.stack([torch.autograd.functional.jacobian(lambda v: function(v[None])[0], row) for row in rows])


# Fields


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("name", FIELDS)
def test_divergence_and_products_are_those_of_autograd(name, context_dim):
    field = shake(FIELDS[name](context_dim).double(), 0.5)
    x = torch.randn(4, *field.event_shape, dtype=torch.double)
    t = torch.tensor(0.3, dtype=torch.double)
    probes = torch.randn(2, *x.shape, dtype=torch.double)
    for rows in (1, 4):
        context = torch.randn(rows, context_dim, dtype=torch.double) if context_dim else None
        want = field(t, x, context)
        each = [None if context is None else context[k % rows][None] for k in range(4)]
        full = torch.stack(
            [jacobian(lambda v: field(t, v, each[k]), x[k : k + 1])[0] for k in range(4)]  # noqa: B023
        ).view(4, 3, 3)
        v, divergence = field.with_divergence(t, x, context)
        torch.testing.assert_close(v, want)
        torch.testing.assert_close(divergence, full.diagonal(dim1=1, dim2=2).sum(-1))
        v, pushed = field.products(t, x, probes, context)
        torch.testing.assert_close(v, want)
        flat, turned = probes.flatten(2), full.mT if name == "given" else full
        torch.testing.assert_close(pushed.flatten(2), torch.einsum("nij,knj->kni", turned, flat))
    if context_dim == 0:
        alone = torch.func.vmap(lambda row: field.with_divergence(t, row[None])[1][0])(x)
        torch.testing.assert_close(alone, divergence)


def test_many_products_at_once():
    field, t = GivenField(Wave(7).double(), 7), torch.tensor(0.3, dtype=torch.double)
    x = torch.randn(3, 7, dtype=torch.double)
    full = jacobian(lambda v: field(t, v), x)
    torch.testing.assert_close(field.with_divergence(t, x)[1], full.diagonal(dim1=1, dim2=2).sum(-1))
    probes = torch.randn(5, 3, 7, dtype=torch.double)
    torch.testing.assert_close(field.products(t, x, probes)[1], torch.einsum("nji,knj->kni", full, probes))


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("name", FIELDS)
def test_a_time_for_each_row(name, context_dim):
    """The velocity, and in the package's own fields divergence and products too, are those of one call a row."""
    field = shake(FIELDS[name](context_dim).double(), 0.5)
    x = torch.randn(4, *field.event_shape, dtype=torch.double)
    t = torch.rand(4, dtype=torch.double)
    probes = torch.randn(2, *x.shape, dtype=torch.double)
    for rows in (1, 4):
        context = torch.randn(rows, context_dim, dtype=torch.double) if context_dim else None
        each = [(t[k], x[k : k + 1], None if context is None else context[k % rows][None]) for k in range(4)]
        want = torch.cat([field(*one) for one in each])
        got = field.at_times(t, x, context)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(v.square().sum(), [*field.parameters()]) for v in (got, want)]
        torch.testing.assert_close(*grads)
        if field.rowwise_times:
            v, divergence = field.with_divergence(t, x, context)
            torch.testing.assert_close(v, want)
            torch.testing.assert_close(divergence, torch.cat([field.with_divergence(*one)[1] for one in each]))
            pushed = [field.products(*one[:2], probes[:, k : k + 1], one[2])[1] for k, one in enumerate(each)]
            torch.testing.assert_close(field.products(t, x, probes, context)[1], torch.cat(pushed, 1))


@pytest.mark.parametrize("name", FIELDS)
def test_fresh_fields_are_zero_and_move_nothing(name):
    if name == "given":
        return
    field = FIELDS[name](2)
    x, context = torch.randn(5, *field.event_shape), torch.randn(5, 2)
    flow = pf.Continuous(field.event_shape, field, context_dim=2)
    for moved, ladj in (flow.forward_and_ladj(x, context), flow.inverse_and_ladj(x, context)):
        assert torch.equal(moved, x)
        assert torch.equal(ladj, torch.zeros(5))


@pytest.mark.parametrize("name", FIELDS)
def test_autonomous_fields_ignore_time(name):
    field = shake(FIELDS[name](0).double(), 0.5)
    x = torch.randn(4, *field.event_shape, dtype=torch.double)
    early, late = (field(torch.tensor(t, dtype=torch.double), x) for t in (0.1, 0.9))
    assert torch.equal(early, late) == ("autonomous" in name or name == "conv-series")


@torch.no_grad()
@pytest.mark.parametrize(
    "name, part", [("concatsquash-2", p) for p in ("shifts", "gates", "last_gate")] + [("conv", "gates")]
)
def test_time_has_a_say_in_shifts_and_in_gates(name, part):
    field = shake(FIELDS[name](0).double(), 0.5)
    for other in ("shifts", "gates", "last_gate"):
        if other != part and getattr(field, other, None) is not None:
            getattr(field, other).time.zero_()
    x = torch.randn(4, *field.event_shape, dtype=torch.double)
    early, late = (field(torch.tensor(t, dtype=torch.double), x) for t in (0.1, 0.9))
    assert (early - late).abs().max() > 1e-3


# Solves


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("name", full_but(FIELDS, "concatsquash-2", "mlp-autonomous", "conv", "given"))
def test_ladj_is_that_of_the_solved_map(name, context_dim):
    field = shake(FIELDS[name](context_dim).double(), 0.3)
    flow = pf.Continuous(field.event_shape, field, context_dim=context_dim, gradient="backprop", **TIGHT)
    x = torch.randn(2, *field.event_shape, dtype=torch.double)
    context = torch.randn(context_dim, dtype=torch.double) if context_dim else None
    y, ladj = flow.forward_and_ladj(x, context)
    back, minus = flow.inverse_and_ladj(y, context)
    truth = jacobian(lambda v: flow.forward_and_ladj(v, context)[0], x).view(2, 3, 3)
    assert (torch.linalg.slogdet(truth)[1] - ladj).abs().max() <= 1e-6
    torch.testing.assert_close(back, x, rtol=0, atol=1e-7)
    torch.testing.assert_close(minus, -ladj, rtol=0, atol=1e-7)


@pytest.mark.full
@pytest.mark.parametrize("solver", full_but([*ADAPTIVE, *FIXED], "dopri5", "dopri8", "rk4", "euler"))
def test_linear_field_is_a_matrix_exponential(solver):
    matrix = 0.5 * torch.randn(3, 3, dtype=torch.double)
    tolerance = 1e-5 if ADAPTIVE.get(solver) == 2 else 1e-9
    steps = {1: 2000, 2: 300}.get(FIXED[solver], 60) if solver in FIXED else None
    flow = pf.Continuous(3, linear(matrix), solver=solver, rtol=tolerance, atol=tolerance, solver_steps=steps)
    x = torch.randn(4, 3, dtype=torch.double)
    with torch.no_grad():
        y, ladj = flow.forward_and_ladj(x)
        back, minus = flow.inverse_and_ladj(x)
    order = {"euler": 1}.get(solver, 2 if tolerance > 1e-9 else 4 if solver in FIXED else 5)
    close = {"rtol": 0, "atol": {1: 1e-2, 2: 5e-3, 4: 2e-4, 5: 1e-7}[order]}
    torch.testing.assert_close(y, x @ torch.linalg.matrix_exp(matrix).T, **close)
    torch.testing.assert_close(back, x @ torch.linalg.matrix_exp(-matrix).T, **close)
    torch.testing.assert_close(ladj, matrix.trace().expand(4), rtol=0, atol=1e-10)
    torch.testing.assert_close(minus, -ladj, rtol=0, atol=1e-10)


def test_density_integrates_to_one():
    flow = pf.Flow(small(rtol=1e-6, atol=1e-6))
    line = torch.linspace(-12, 12, 161, dtype=torch.double)
    with torch.no_grad():
        mass = flow.log_prob(torch.cartesian_prod(line, line)).exp().sum() * (line[1] - line[0]) ** 2
    assert abs(float(mass) - 1) < 1e-3


def test_error_falls_with_the_tolerance():
    flow = small(size=2)
    y = 2 * torch.randn(20, 2, dtype=torch.double)
    state = flow.state_dict()
    table = []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9, 1e-12):
        coarse = pf.cnf(2, hidden_dims=(6, 6), rtol=tolerance, atol=tolerance).double()
        coarse.load_state_dict(state)
        with torch.no_grad():
            x, ladj = coarse.inverse_and_ladj(y)
        table.append((-0.5 * x.square().sum(-1) + ladj, coarse[0].last_solve.evaluations))
    errors = [float((score - table[-1][0]).abs().max()) for score, _ in table[:-1]]
    assert errors == sorted(errors, reverse=True)
    assert all(error <= 300 * tolerance for error, tolerance in zip(errors, (1e-3, 1e-5, 1e-7, 1e-9), strict=True))
    assert [n for _, n in table] == sorted(n for _, n in table)


def test_tolerances_are_a_pair_of_directions_and_no_finer_than_the_dtype():
    flow = small(rtol=(1e-10, 1e-3), atol=(1e-10, 1e-3))[0]
    x = torch.randn(10, 2, dtype=torch.double)
    flow.forward_and_ladj(x)
    fine = flow.last_solve
    flow.inverse_and_ladj(x)
    assert (fine.direction, flow.last_solve.direction) == ("sampling", "density")
    assert fine.evaluations > 2 * flow.last_solve.evaluations
    single = small(rtol=1e-14, atol=1e-14).float()
    y, ladj = single.forward_and_ladj(x.float())
    want = small_copy(single).forward_and_ladj(x)
    torch.testing.assert_close(y.double(), want[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(ladj.double(), want[1], rtol=0, atol=2e-5)


def small_copy(flow):
    twin = small()
    twin.load_state_dict({name: value.double() for name, value in flow.state_dict().items()})
    return twin


@pytest.mark.full
@torch.no_grad()
def test_rows_and_their_mates():
    x = torch.cat([0.1 * torch.randn(99, 2), torch.tensor([[3.0, 0.0]])]).double()
    errors = {}
    truth = pf.Continuous(2, shrinking(), rtol=1e-11, atol=1e-11).forward_and_ladj(x)
    for per_row in (False, True):
        flow = pf.Continuous(2, shrinking(), rtol=1e-4, atol=1e-4, per_row=per_row)
        alone, among = flow.forward_and_ladj(x[-1:]), flow.forward_and_ladj(x)
        errors[per_row] = [float((a[-1] - b[-1]).abs().max()) for a, b in zip(among, truth, strict=True)]
        errors[per_row, "alone"] = [float((a[-1] - b[-1]).abs().max()) for a, b in zip(alone, truth, strict=True)]
        errors[per_row, "count"] = flow.last_solve.evaluations
    # The hard row is no worse among easy mates than by itself, which costs evaluations.
    assert max(errors[True]) <= 2 * max(errors[True, "alone"])
    assert max(errors[True]) < max(errors[False])
    assert errors[True, "count"] > errors[False, "count"]


@pytest.mark.full
def test_gradients_of_rows_and_their_mates():
    x = torch.cat([0.1 * torch.randn(99, 2), torch.tensor([[3.0, 0.0]])]).double()

    def gradient(rows, tolerance, per_row):
        flow = pf.Continuous(2, shrinking(), rtol=tolerance, atol=tolerance, per_row=per_row)
        rows = rows.clone().requires_grad_()
        return torch.autograd.grad(sum(v.sum() for v in flow.forward_and_ladj(rows)), rows)[0][-1]

    truth = gradient(x, 1e-11, False)
    together, each, alone = gradient(x, 1e-4, False), gradient(x, 1e-4, True), gradient(x[-1:], 1e-4, True)
    torch.testing.assert_close(each, alone, rtol=0, atol=1e-3)  # steps are those that the hard row wants
    assert (each - truth).abs().max() < 0.5 * (together - truth).abs().max()


@torch.no_grad()
def test_fixed_steps_do_not_depend_on_mates():
    fixed = small(solver="rk4", solver_steps=5)
    rows = torch.randn(7, 2, dtype=torch.double)
    torch.testing.assert_close(fixed(rows)[2], fixed(rows[2]), rtol=0, atol=1e-14)


def test_report_counts_what_was_done():
    calls = []

    class Counting(Wave):
        def forward(self, t, x):
            calls.append(float(t))
            return super().forward(t, x)

    flow = pf.Continuous(2, Counting(2).double(), rtol=1e-6, atol=1e-6, gradient="adjoint")
    x = torch.randn(5, 2, dtype=torch.double)
    calls.clear()
    y, ladj = flow.forward_and_ladj(x)
    report = flow.last_solve
    assert report.evaluations == len(calls) and report.steps > 0 and report.backward_evaluations == 0
    assert 0 < report.local_error <= report.steps
    assert report.rejected == 0  # the first step is not too long
    assert min(calls) == 0 and max(calls) <= 1  # the field is not asked beyond its time
    calls.clear()
    (y.sum() + ladj.sum()).backward()
    assert report.backward_evaluations == len(calls) > 0
    hard = pf.Continuous(2, shrinking())
    hard.forward_and_ladj(3 * x)
    assert hard.last_solve.rejected > 0
    for each in (report, hard.last_solve):  # dopri5 keeps the last slope of a step
        assert each.evaluations == 1 + 6 * (each.steps + each.rejected)
    flow = small(solver="rk4", solver_steps=7)[0]
    flow.forward_and_ladj(x)
    assert flow.last_solve.evaluations == 28 and flow.last_solve.local_error is None
    flow.path(x, [0.0, 0.5, 1.0])
    assert flow.last_solve.evaluations == 16  # a step is no longer than a whole solve's


@pytest.mark.parametrize("options", [{"rtol": 1e-4, "atol": 1e-4}, {"solver": "rk4", "solver_steps": 4}])
def test_check_solve_measures_the_error(options):
    flow = small(**options)[0]
    x = 2 * torch.randn(20, 2, dtype=torch.double)
    truth = small_copy(pf.Chain([flow]))
    for density in (False, True):
        run = "inverse_and_ladj" if density else "forward_and_ladj"
        with torch.no_grad():
            got, want = getattr(flow, run)(x), getattr(truth, run)(x)
        errors = [float((a - b).abs().max()) for a, b in zip(got, want, strict=True)]
        check = flow.check_solve(x, density=density)
        for measured, error in zip(check[:2], errors, strict=True):
            assert 0.7 * error <= measured <= 1.5 * error
        assert check.finer.evaluations > check.report.evaluations == flow.last_solve.evaluations


def test_check_solve_does_not_compare_a_solve_with_itself():
    x = torch.randn(5, 2)
    for density in (False, True):
        check = small(rtol=(1e-3, 1e-7), atol=(1e-3, 1e-7))[0].float().check_solve(x, density=density)
        assert math.isnan(check.value) == math.isnan(check.ladj) == density


def test_check_solve_compares_estimates_by_the_same_noise():
    flow = small(size=3, divergence="hutchinson", rtol=1e-6, atol=1e-6)[0]
    x = torch.randn(20, 3, dtype=torch.double)
    assert flow.training and flow.check_solve(x).ladj < 1e-4
    with torch.no_grad():
        assert (flow.forward_and_ladj(x)[1] - flow.forward_and_ladj(x)[1]).abs().max() > 1e-2


def test_path_goes_from_base_to_data():
    flow = small()[0]
    x = torch.randn(3, 4, 2, dtype=torch.double)
    with torch.no_grad():
        y, ladj = flow.forward_and_ladj(x)
    times = [0.0, 0.3, 1.0]
    states, ladjs = flow.path(x, times)
    back, minus = flow.path(y, times, density=True)
    for got, want in ((states[0], x), (states[2], y), (ladjs[2], ladj), (back, states), (minus, ladjs - ladj)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-7)
    refuses(ValueError, "increasing times between 0 and 1", flow.path, x, [0.5, 0.5])


def test_shapes_contexts_and_the_memo():
    flow = small(context_dim=2, size=(2, 1))
    x, context = torch.randn(3, 4, 2, 1, dtype=torch.double), torch.randn(2, dtype=torch.double)
    whole = flow.forward_and_ladj(x, context.expand(3, 4, 2))
    torch.testing.assert_close(flow.forward_and_ladj(x, context), whole, rtol=0, atol=1e-8)
    view = flow.condition(context)
    y = view(x)
    before = flow[0].last_solve
    view.log_abs_det_jacobian(x, y)
    view.inv(y)
    assert flow[0].last_solve is before  # no solve for what is known


# Gradients


def gradients(flow, x, context, direction):
    inputs = [x.clone().requires_grad_(), context.clone().requires_grad_()]
    out, ladj = getattr(flow, direction)(*inputs)
    loss = (out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum() / 50 + (ladj * ladj).sum() / 10
    return torch.autograd.grad(loss, [*inputs, *flow.parameters()]), loss


@pytest.mark.parametrize("shared", [False, True], ids=["contexts", "one context"])
@pytest.mark.parametrize("direction", ["forward_and_ladj", "inverse_and_ladj"])
@pytest.mark.parametrize("solver, hidden", [("dopri5", (6, 6)), ("dopri8", (4, 4, 4)), ("rk4", (4,))])
def test_gradients_agree(direction, solver, hidden, shared):
    x = torch.randn(3, 2, dtype=torch.double)
    context = torch.randn(*([] if shared else [3]), 2, dtype=torch.double)
    by = {}
    flow = small(context_dim=2, hidden_dims=hidden, solver=solver, solver_steps=40 if solver in FIXED else None)
    for gradient in ("adjoint", "backprop"):
        flow[0].gradient = gradient
        by[gradient], _ = gradients(flow, x, context, direction)
    torch.testing.assert_close(by["adjoint"], by["backprop"], rtol=1e-5, atol=1e-7)
    steps = [torch.randn_like(p) for p in flow.parameters()]
    ends = []
    with torch.no_grad():
        for size in (1e-5, -2e-5):
            for p, step in zip(flow.parameters(), steps, strict=True):
                p.add_(step, alpha=size)
            with torch.enable_grad():
                ends.append(gradients(flow, x, context, direction)[1].detach())
    slope = sum((g * s).sum() for g, s in zip(by["adjoint"][2:], steps, strict=True))
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-7)


def test_a_gradient_of_zero():
    flow = small()
    (0 * flow(torch.randn(3, 2, dtype=torch.double))).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in flow.parameters())


def test_adjoint_does_not_mind_the_scale_of_the_loss():
    flow = small(rtol=1e-5, atol=1e-5)
    x = torch.randn(5, 2, dtype=torch.double)
    grads = []
    for scale in (1.0, 1e-9):
        y, ladj = flow.forward_and_ladj(x)
        loss = scale * (y.square().sum() + ladj.sum())
        grads.append([g / scale for g in torch.autograd.grad(loss, list(flow.parameters()))])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_frozen_parameters_and_values_alone():
    flow = small()
    x = torch.randn(5, 2, dtype=torch.double, requires_grad=True)
    want = torch.autograd.grad(sum(v.sum() for v in flow.forward_and_ladj(x)), x)[0]
    some = next(flow.parameters())
    for frozen in (list(flow.parameters())[1:], list(flow.parameters())):
        for p in frozen:
            p.requires_grad_(False)
        loss = sum(v.sum() for v in flow.forward_and_ladj(x))
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], want, rtol=1e-8, atol=1e-9)
    assert some.grad is None


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_second_derivatives_through_the_solver(solver):
    flow = small(gradient="backprop", solver=solver, solver_steps=5 if solver in FIXED else None, rtol=1e-9, atol=1e-9)
    x = torch.randn(2, dtype=torch.double)

    def score(x):
        y, ladj = flow.forward_and_ladj(x)
        return y.square().sum() + ladj

    hessian = torch.autograd.functional.hessian(score, x)
    slopes = [torch.autograd.functional.jacobian(score, x + 1e-4 * step) for step in (*torch.eye(2), *-torch.eye(2))]
    differences = torch.stack([(slopes[k] - slopes[k + 2]) / 2e-4 for k in range(2)])
    torch.testing.assert_close(hessian, differences, rtol=1e-5, atol=1e-6)


def test_adjoint_refuses_second_derivatives():
    flow = small()
    x = torch.randn(3, 2, dtype=torch.double, requires_grad=True)
    (first,) = torch.autograd.grad(flow(x).square().sum(), x, create_graph=True)
    refuses(RuntimeError, 'first derivatives only; build the flow with gradient="backprop"', first.sum().backward)


def test_memory_of_the_adjoint_does_not_grow_with_evaluations():
    x = torch.randn(10, 2, dtype=torch.double)
    state = small().state_dict()
    held = {}
    for gradient in ("adjoint", "backprop"):
        for tolerance in (1e-3, 1e-10):
            flow = small(gradient=gradient, rtol=tolerance, atol=tolerance)
            flow.load_state_dict(state)
            held[gradient, tolerance] = sum(kept(flow.forward_and_ladj, x).values())
        assert flow[0].last_solve.evaluations > 50
    assert held["adjoint", 1e-3] == held["adjoint", 1e-10]
    assert held["backprop", 1e-10] > 3 * held["backprop", 1e-3]


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
@pytest.mark.parametrize("limit, expected", [(4 * 2**20, "backprop"), (0, "adjoint")])
def test_auto_goes_by_what_an_evaluation_keeps(solver, limit, expected, monkeypatch):
    monkeypatch.setattr("pyro_flows.transforms.continuous.ode.KEPT", limit)
    auto, chosen = small(gradient="auto", solver=solver, rtol=1e-4), small(gradient=expected, solver=solver, rtol=1e-4)
    chosen.load_state_dict(auto.state_dict())
    x = torch.randn(5, 2, dtype=torch.double, requires_grad=True)
    by = []
    for flow in (auto, chosen):
        y, ladj = flow.forward_and_ladj(x)
        by.append(torch.autograd.grad(y.square().sum() + ladj.sum(), [x, *flow.parameters()]))
    torch.testing.assert_close(*by, rtol=0, atol=0)
    report = auto[0].last_solve
    assert report.gradient == chosen[0].last_solve.gradient == expected
    assert report.evaluations == chosen[0].last_solve.evaluations
    assert (report.backward_evaluations > 0) == (expected == "adjoint")
    with torch.no_grad():
        auto(x)
    assert auto[0].last_solve.gradient is None


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_auto_begins_again_where_a_solve_is_long(solver, monkeypatch):
    """With the adjoint, as if nothing had been tried."""
    auto, adjoint = small(gradient="auto", solver=solver), small(gradient="adjoint", solver=solver)
    adjoint.load_state_dict(auto.state_dict())
    x = torch.randn(5, 2, dtype=torch.double, requires_grad=True)
    auto(x)
    report = auto[0].last_solve
    assert report.gradient == "backprop"
    monkeypatch.setattr("pyro_flows.transforms.continuous.ode._kept", lambda *args: 1000)
    for allowed, gradient in ((report.evaluations, "backprop"), (report.evaluations - 1, "adjoint")):
        monkeypatch.setattr("pyro_flows.transforms.continuous.ode.KEPT_IN_ALL", 1000 * allowed + 1)
        found = auto(x)
        assert (auto[0].last_solve.gradient, auto[0].last_solve.evaluations) == (gradient, report.evaluations)
        torch.testing.assert_close(found, adjoint(x), rtol=0, atol=0)
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, adjoint(x))]
        assert torch.equal(*grads) == (gradient == "adjoint")


@pytest.mark.parametrize("name", ["concatsquash", "mlp"])
def test_what_an_evaluation_keeps(name, monkeypatch):
    from pyro_flows.transforms.continuous import ode

    counted = []
    monkeypatch.setattr(ode, "_kept", lambda *args, kept=ode._kept: counted.append(kept(*args)) or counted[-1])
    flow = shake(pf.cnf(3, field=name, gradient="auto", solver="rk4", solver_steps=20), 0.4)
    before = torch.randn(200, 3, requires_grad=True)
    x = before.sin().cos().sin()  # what the rows come from is no concern of the solve
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, ladj = flow.forward_and_ladj(x)
    assert len(counted) == 1 and flow[0].last_solve.evaluations == 80
    assert 0.75 * sum(held.values()) < 80 * counted[0] < sum(held.values())
    (y.sum() + ladj.sum()).backward()
    assert before.grad.isfinite().all()


@pytest.mark.full
def test_functions_of_parameters():
    flow = small()[0]
    x = torch.randn(4, 2, dtype=torch.double)
    params = {name: p.detach() for name, p in flow.named_parameters()}

    def loss(params, x):
        y, ladj = torch.func.functional_call(flow, params, (x,)), 0.0
        return y.square().sum() + ladj

    got = torch.func.grad(loss)(params, x)
    want = torch.autograd.grad(flow(x).square().sum(), list(flow.parameters()))
    torch.testing.assert_close([*got.values()], want, rtol=1e-6, atol=1e-8)
    stacked = {name: torch.stack([p, 0.5 * p]) for name, p in params.items()}
    values = torch.func.vmap(loss, in_dims=(0, None))(stacked, x)
    torch.testing.assert_close(values[1], loss({n: 0.5 * p for n, p in params.items()}, x), rtol=1e-8, atol=1e-8)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    for a, b in zip(each.values(), want, strict=True):
        torch.testing.assert_close(a.sum(0), b, rtol=1e-6, atol=1e-8)


@pytest.mark.full
def test_compiled_callers_are_right():
    flow = small()
    x = torch.randn(4, 2, dtype=torch.double)

    def score(x):
        y, ladj = flow.forward_and_ladj(2 * x)
        return y.sum(-1) + ladj

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(score, backend="eager")(x), score(x))


# Divergences


def estimates(settings, field, x, count=4000):
    t = torch.tensor(0.2, dtype=x.dtype)
    many = x.expand(count, -1)
    noise = draw(settings.noise, many, count, settings.num_probes, x.shape[-1])
    probes = probes_of(settings, field, t, many, None, noise)
    return columns(settings, field, t, many, None, probes.transpose(0, 1), (False, True))[1]


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("kind, count", [("hutchinson", 1), ("hutchinson", 4), ("hutch++", 4)])
def test_estimates_are_unbiased(kind, count, noise):
    field = shake(ChainField(5, hidden_dims=(6,)).double(), 0.5)
    x = torch.randn(1, 5, dtype=torch.double)
    made = estimates(Estimator(kind, noise, count), field, x)
    full = jacobian(lambda v: field(torch.tensor(0.2, dtype=torch.double), v), x)[0]
    for got, want in zip(made, (full.trace(), full.square().sum()), strict=True):
        assert abs(got.mean() - want) <= 4 * got.std() / math.sqrt(len(got)) + 1e-10


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutch_has_the_lower_variance(noise):
    low = torch.randn(8, 2, dtype=torch.double)
    field = GivenField(linear(low @ low.T + 0.05 * torch.randn(8, 8, dtype=torch.double)), 8)
    x = torch.randn(1, 8, dtype=torch.double)
    plain, better = (estimates(Estimator(kind, noise, 4), field, x)[0].var() for kind in ("hutchinson", "hutch++"))
    assert better < 0.05 * plain


def test_the_estimate_is_a_function_in_eval_and_fresh_in_training():
    options = {"size": 3, "divergence": "hutchinson", "rtol": 1e-6, "atol": 1e-6}
    flow = small(scoring="frozen", **options)
    x = torch.randn(4, 3, dtype=torch.double)
    twice = x[[0, 1, 0]]
    with torch.no_grad():
        a, b = flow.inverse_and_ladj(x)[1], flow.inverse_and_ladj(x)[1]
        assert (a - b).abs().min() > 1e-6  # each row
        assert len(flow.inverse_and_ladj(x[[0, 0, 0]])[1].unique()) > 1  # and each for itself
        flow.eval()
        a, b = flow.inverse_and_ladj(x)[1], flow.inverse_and_ladj(x)[1]
        assert torch.equal(a, b)
        rows = flow.inverse_and_ladj(twice)[1]
        torch.testing.assert_close(rows[0], rows[2], rtol=0, atol=1e-12)
        other = small(scoring="frozen", **options).eval()
        other.load_state_dict(flow.state_dict())
        assert torch.equal(other.inverse_and_ladj(x)[1], a)  # the noise is state
        y, ladj = flow.forward_and_ladj(x)
        torch.testing.assert_close(flow.inverse_and_ladj(y)[1], -ladj, rtol=0, atol=1e-4)
        exact = small(size=3, rtol=1e-6, atol=1e-6)
        scored = small(scoring="auto", **options).eval()
        for each in (exact, scored):
            each.load_state_dict(flow.state_dict(), strict=False)
        torch.testing.assert_close(scored.inverse_and_ladj(x)[1], exact.inverse_and_ladj(x)[1], rtol=0, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("kind", full_but(["hutchinson", "hutch++"], "hutch++"))
def test_a_frozen_estimate_is_one_function_both_ways(kind):
    flow = small(size=4, divergence=kind, scoring="frozen", gradient="backprop", context_dim=1).eval()
    x, context = torch.randn(3, 4, dtype=torch.double), torch.randn(3, 1, dtype=torch.double)
    with torch.no_grad():
        y, ladj = flow.forward_and_ladj(x, context)
        torch.testing.assert_close(flow.inverse_and_ladj(y.clone(), context)[1], -ladj, rtol=0, atol=1e-7)
        torch.testing.assert_close(flow[0].path(x, [0.4, 1.0], context)[1][1], ladj, rtol=0, atol=1e-7)
    given = y.requires_grad_(), context.requires_grad_()
    torch.autograd.gradcheck(lambda *given: flow.inverse_and_ladj(*given)[1], given, atol=1e-6)
    exact = small(size=4, context_dim=1)
    exact.load_state_dict(flow.state_dict(), strict=False)
    assert (exact.forward_and_ladj(x, context)[1] - ladj).abs().max() > 1e-3  # an estimate it is


def test_estimates_train_by_both_gradients():
    x = torch.randn(3, 3, dtype=torch.double)
    grads = []
    for gradient in ("adjoint", "backprop"):
        torch.manual_seed(0)
        flow = small(size=3, divergence="hutch++", gradient=gradient, hidden_dims=(4, 4, 4))
        torch.manual_seed(1)
        y, ladj = flow.forward_and_ladj(x)
        grads.append(torch.autograd.grad(y.sum() + ladj.square().sum(), list(flow.parameters())))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_auto_is_exact_where_that_is_cheap():
    def kind(*args, **options):
        return pf.cnf(*args, **options)[0].estimator.kind

    assert kind(200, hidden_dims=(8, 8)) == kind(32, hidden_dims=(8, 8, 8)) == "exact"
    assert kind(33, hidden_dims=(8, 8, 8)) == kind((1, 6, 6), field="conv", hidden_dims=(2,)) == "hutchinson"
    assert pf.cnf(33, hidden_dims=(8, 8, 8))[0].frozen.shape == (1, 33)
    assert pf.cnf(33, hidden_dims=(8, 8, 8), scoring="exact")[0].frozen is None


def test_what_the_builder_is_given_arrives():
    options = {
        "scoring": "frozen",
        "solver": "rk4",
        "rtol": (1e-3, 1e-4),
        "atol": (1e-5, 1e-6),
        "solver_steps": 7,
        "gradient": "backprop",
        "per_row": True,
        "kinetic": 0.1,
        "jacobian": 0.2,
    }
    estimates = {"divergence": "hutch++", "noise": "gaussian", "num_probes": 6}
    layer = pf.cnf(3, **options, **estimates)[0]
    assert {name: getattr(layer, name) for name in options} == options
    assert layer.estimator == Estimator(*estimates.values())
    ours, its = (inspect.signature(made).parameters for made in (pf.cnf, pf.Continuous))
    shared = [name for name in its if name in ours and name != "field"]
    assert {*options, *estimates} < {*shared}
    assert all(ours[name].default == its[name].default for name in shared)
    for kind in ("concatsquash", "mlp", "conv"):
        event = (1, 3) if kind == "conv" else 3
        field = pf.cnf(event, field=kind, context_dim=2, time_dependent=False, activation="silu")[0].field
        assert (field.context_dim, field.time_dependent, field.activation) == (2, False, F.silu)


# Penalties


@pytest.mark.full
def test_penalties_are_integrals():
    matrix = 0.5 * torch.randn(2, 2, dtype=torch.double)
    x = torch.randn(6, 2, dtype=torch.double)
    field = linear(matrix)
    flow = pf.Continuous(2, field, kinetic=0.3, jacobian=0.2, **TIGHT)
    path, _ = flow.path(x, torch.linspace(0, 1, 401))
    kinetic = torch.trapezoid((path @ matrix.T).square().sum(-1), dx=1 / 400, dim=0)
    want = 0.3 * kinetic + 0.2 * matrix.square().sum()
    with collect_penalties() as penalties:
        y, ladj = flow.forward_and_ladj(x)
        flow.inverse_and_ladj(y.detach())
        pf.Continuous(2, field).forward_and_ladj(x)  # no weights
    assert len(penalties.parts) == 2
    for part in penalties.parts:
        torch.testing.assert_close(part, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(penalties.total(), 2 * want.mean(), rtol=0, atol=1e-5)
    torch.testing.assert_close(ladj, matrix.trace().expand(6))
    only = pf.Continuous(2, field, jacobian=0.2, divergence="hutchinson", num_probes=3, **TIGHT)
    with collect_penalties() as penalties:
        only.forward_and_ladj(x)
    assert torch.autograd.grad(penalties.total(), field.learnt[0])[0].abs().sum() > 0
    with collect_penalties() as penalties:
        pass
    assert penalties.total() == 0.0


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rtol": 0.0}, "rtol between 0 and 1"),
        ({"atol": -1e-3}, "atol between 0 and 1"),
        ({"rtol": (1e-3,)}, "pair of these for sampling and density"),
        ({"solver": "rk45"}, r"solver to be 'dopri5', .* or 'rk4', got 'rk45'"),
        ({"gradient": "forward"}, r"gradient to be 'auto', 'adjoint' or 'backprop', got 'forward'"),
        ({"divergence": "trace"}, "divergence to be 'auto'"),
        ({"noise": "uniform"}, "noise to be 'rademacher'"),
        ({"num_probes": 1, "divergence": "hutch++"}, "num_probes to be an integer >= 2"),
        ({"scoring": "never"}, "scoring to be 'auto'"),
        ({"solver_steps": 0}, "solver_steps to be an integer >= 1"),
        ({"solver_steps": 1.5}, "solver_steps to be an integer >= 1"),
        ({"kinetic": -1.0}, "kinetic to be a number >= 0"),
        ({"field": "transformer"}, "field to be 'concatsquash'"),
        ({"field": "conv"}, "event of shape"),
        ({"hidden_dims": (0,)}, "positive integers"),
        ({"activation": "relu"}, "smooth"),
    ],
)
def test_options_are_checked(options, message):
    refuses(ValueError, message, pf.cnf, 2, **options)


def breaks(t, x):
    wrong = (t > 0.5) & (x[:, :1] > 1)
    return torch.where(wrong, torch.full_like(x, math.nan), torch.ones_like(x) * 0.1 * torch.sin(x))


@pytest.mark.parametrize(
    "function, kind, message",
    [
        (lambda t, x: x[..., :1], ValueError, r"shape of x, \(3, 2\), got \(3, 1\)"),
        (lambda t, x: x[:1], ValueError, r"shape of x, \(3, 2\), got \(1, 2\)"),
        (lambda t, x: x - x.mean(0), ValueError, "treats rows independently"),
        (lambda t, x: [x], TypeError, "expected a tensor, got list"),
    ],
)
def test_fields_are_tried(function, kind, message):
    refuses(kind, message, pf.cnf, 2, field=Field(function))
    refuses(TypeError, r"torch.nn.Module", pf.Continuous, 2, torch.sin)
    refuses(ValueError, "field of event shape", pf.Continuous, 3, ChainField(2))


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_what_is_not_finite_is_named(solver):
    flow = pf.cnf(2, field=Field(breaks), solver=solver)
    x = torch.zeros(9, 2)
    x[[4, 7]] = 1.5
    refuses(RuntimeError, r"not finite at t=0\.[5-9].* in rows \[4, 7\] \(2 of 9\)", flow, x)
    x = torch.randn(5, 2)
    x[3, 1] = math.inf
    with pytest.raises(ValueError, match=r"finite values to integrate, got others in rows \[3\] \(1 of 5\)"):
        small(solver=solver).float()(x)


def test_stiff_and_diverging_fields_are_worded():
    flow = pf.cnf(2, field=Field(lambda t, x: x**2), solver_steps=200)
    x = torch.tensor([[0.1, 0.0], [5.0, 0.0]])
    message = r"dopri5 makes no headway at t=0\.2.*hardest rows are \[1\].*loosen the tolerances.*fixed steps"
    with pytest.raises(RuntimeError, match=message) as found:
        flow(x)
    assert not re.search("Error|assert", str(found.value))
    stiff = pf.Continuous(1, linear(torch.tensor([[-1e5]])), solver_steps=50)
    refuses(RuntimeError, r"max_num_steps exceeded.*raise solver_steps", stiff, torch.ones(3, 1))


def test_failure_of_the_adjoint_names_itself():
    class Breaking(Wave):
        broken = False

        def forward(self, t, x):
            v = super().forward(t, x)
            return v * math.nan if self.broken else v

    flow = pf.Continuous(2, Breaking(2), gradient="adjoint")
    loss = flow(torch.randn(3, 2)).sum()
    flow.field.module.broken = True
    refuses(RuntimeError, "not finite in the adjoint solve at t=1", loss.backward)


# At work


def moons(n):
    angle, side = math.pi * torch.rand(n), torch.randint(0, 2, (n,)).float()
    x = torch.stack([torch.cos(angle) * (1 - 2 * side) + side, torch.sin(angle) * (1 - 2 * side) + 0.5 * side], -1)
    return (x - torch.tensor([0.5, 0.25])) / torch.tensor([0.87, 0.5]) + 0.1 * torch.randn(n, 2)


@pytest.mark.full
def test_two_moons_by_maximum_likelihood():
    data, held_out = moons(256), moons(512)
    flow = pf.Flow(pf.cnf(2, hidden_dims=(32, 32), rtol=1e-3, atol=1e-3, gradient="backprop", kinetic=1e-3))
    gaussian = dist.MultivariateNormal(data.mean(0), data.T.cov()).log_prob(held_out).mean()
    optimiser = torch.optim.Adam(flow.parameters(), lr=0.02)
    for _ in range(80):
        optimiser.zero_grad()
        with collect_penalties() as penalties:
            loss = -flow.log_prob(data).mean()
        (loss + penalties.total()).backward()
        optimiser.step()
    with torch.no_grad():
        assert flow.eval().log_prob(held_out).mean() > gaussian + 0.3


@pytest.mark.full
def test_as_a_guide():
    def model():
        pyro.sample("z", dist.MultivariateNormal(torch.ones(2), torch.eye(2)))

    guide = pf.AutoFlow(model, lambda size: pf.cnf(size, hidden_dims=(8,), rtol=1e-3, atol=1e-3), start="prior")
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(num_particles=20, vectorize_particles=True))
    losses = [svi.step() for _ in range(40)]
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])


def test_under_nuts():
    flow = pf.Flow(small(rtol=1e-4, atol=1e-4, hidden_dims=(4,)).float().requires_grad_(False).eval())

    def model():
        pyro.sample("z", flow())

    mcmc = pyro.infer.MCMC(pyro.infer.NUTS(model, max_tree_depth=2), 3, 3, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["z"].isfinite().all()
