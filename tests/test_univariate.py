"""The scalar maps, and the hand-written forms that the engine uses in place of automatic differentiation."""

import copy

import pytest
import torch
from asserts import refuses
from cases import Sinh
from oracles import relative_error

from pyro_flows.univariate import Affine, ClampedAffine, Shift, Spline, Univariate
from pyro_flows.univariate.base import soft_clip

FAMILIES = [
    Shift(),
    Affine(),
    Affine(max_log_scale=0.7),
    Affine(3.0, gain=0.3),
    ClampedAffine(-1.0, 0.7),
    Spline(),
    Spline(3, 2.0, "identity"),
    Sinh(),
]
EACH = pytest.mark.parametrize("family", FAMILIES, ids=repr)
BOTH = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def draw(family, *shape, spread=1.5):
    x = torch.randn(*shape, dtype=torch.float64)
    return x, spread * torch.randn(*shape, family.num_params, dtype=torch.float64)


@EACH
def test_round_trip(family):
    x, params = draw(family, 100)
    y, ladj = family.forward(x, params)
    back, minus = family.inverse(y, params)
    assert relative_error(back, x) <= 1e-12
    assert (ladj + minus).abs().max() <= 1e-12


@BOTH
@EACH
def test_ladj_is_the_log_slope_and_the_slope_is_positive(family, inverse):
    x, params = draw(family, 100)
    x.requires_grad_()
    y, ladj = family.inverse(x, params) if inverse else family.forward(x, params)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert (slope > 0).all()
    assert relative_error(ladj, slope.log()) <= 1e-12 or (ladj - slope.log()).abs().max() <= 1e-13


@BOTH
@EACH
def test_zero_parameters_are_the_identity(family, inverse):
    x, params = draw(family, 100)
    y, ladj = (family.inverse if inverse else family.forward)(x, torch.zeros_like(params))
    tolerance = 1e-14 if isinstance(family, (Sinh, Spline)) else 0
    assert (y - x).abs().max() <= tolerance
    assert ladj.abs().max() <= tolerance


@BOTH
@EACH
def test_solver_calls_give_the_same_in_place(family, inverse):
    x, params = draw(family, 4, 6)
    want = (family.inverse if inverse else family.forward)(x, params)
    z, solved, ladj = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    held = torch.empty(family.num_params, 4, 6, dtype=torch.float64)
    calls = family.solver(inverse, z, held, solved, ladj)
    for _ in range(2):  # bound once, run on whatever the buffers hold
        z.copy_(x)
        held.copy_(params.movedim(-1, 0))
        for call in calls:
            call()
        assert relative_error(solved, want[0]) <= 1e-14
        assert (ladj - want[1]).abs().max() <= 1e-14
        assert torch.equal(held, params.movedim(-1, 0))
        x, params = draw(family, 4, 6)
        want = (family.inverse if inverse else family.forward)(x, params)


@BOTH
@EACH
def test_partials_equal_automatic_differentiation(family, inverse):
    z, params = draw(family, 4, 6)
    params = params.movedim(-1, 0).contiguous()
    x, ladj = (family.inverse if inverse else family.forward)(z, params.movedim(0, -1))
    weight = torch.randn(6, dtype=torch.float64)
    got = family.partials(inverse, z, params, x, ladj, weight)
    pull = torch.func.vjp(lambda *inputs: family.plain(inverse, *inputs), z, params)[1]
    want = (*pull((torch.ones_like(x), torch.zeros_like(x))), *pull((torch.zeros_like(x), weight.expand_as(x))))
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-13 * (1 + b.abs().max())


@BOTH
@EACH
def test_one_pass_forms_equal_automatic_differentiation(family, inverse):
    z, params = draw(family, 4, 6)
    params = params.movedim(-1, 0).contiguous()
    grad, grad_ladj = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
    want_x, want_ladj, want_kept = Univariate.run(family, inverse, z, params.clone())
    want = Univariate.pull(family, inverse, z, want_x, want_ladj, want_kept, grad, grad_ladj)
    x, ladj, kept = family.run(inverse, z, params.clone())
    assert (x - want_x).abs().max() <= 1e-14 * (1 + want_x.abs().max())
    assert (ladj - want_ladj).abs().max() <= 1e-14
    for a, b in zip(family.pull(inverse, z, x, ladj, kept, grad, grad_ladj), want, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-13 * (1 + b.abs().max())


@BOTH
@EACH
def test_default_partials_equal_gradients(family, inverse):
    z, params = draw(family, 4, 6)
    z.requires_grad_()
    params = params.movedim(-1, 0).contiguous().requires_grad_()
    x, ladj = (family.inverse if inverse else family.forward)(z, params.movedim(0, -1))
    weight = torch.randn(6, dtype=torch.float64)
    got = Univariate.partials(family, inverse, z.detach(), params.detach(), x.detach(), ladj.detach(), weight)
    for scalar, pair in ((x.sum(), got[:2]), ((weight * ladj).sum(), got[2:])):
        grads = torch.autograd.grad(scalar, (z, params), retain_graph=True, allow_unused=True) if scalar.grad_fn else ()
        for have, true in zip(pair, grads, strict=False):
            true = torch.zeros_like(have) if true is None else true
            assert (have - true).abs().max() <= 1e-13 * (1 + true.abs().max())
        assert grads or all((have == 0).all() for have in pair)


def test_soft_clip_is_smooth_bounded_and_the_identity_near_zero():
    value = torch.tensor([-1e30, -5.0, -1e-4, 0.0, 1e-4, 5.0, 1e30], dtype=torch.float64, requires_grad=True)
    clipped = soft_clip(value, 2.0)
    assert clipped.abs().max() <= 2.0
    assert (clipped[2:5] - value[2:5]).abs().max() <= 1e-12
    (slope,) = torch.autograd.grad(clipped.sum(), value)
    assert slope.isfinite().all() and (slope >= 0).all()
    assert slope[3] == 1
    assert torch.autograd.gradgradcheck(lambda v: soft_clip(v, 2.0), torch.linspace(-5, 5, 7).double().requires_grad_())


@BOTH
def test_affine_stays_finite_for_extreme_parameters(inverse):
    family = Affine(max_log_scale=3.0)
    raw = torch.tensor([-1e30, -1e3, 1e3, 1e30])
    params = torch.stack((torch.ones(4), raw), -1).requires_grad_()
    y, ladj = (family.inverse if inverse else family.forward)(torch.ones(4), params)
    assert y.isfinite().all() and ladj.abs().max() <= 3.0
    assert torch.autograd.grad(y.sum() + ladj.sum(), params)[0].isfinite().all()


@pytest.mark.parametrize("bound", [0, -1.0, float("nan")])
def test_affine_refuses_a_bound_that_is_not_positive(bound):
    refuses(ValueError, "max_log_scale > 0", Affine, max_log_scale=bound)


def test_families_are_values():
    assert Affine(2.0) == Affine(2) and hash(Affine(2.0)) == hash(Affine(2))
    assert Affine(2.0) != Affine(3.0) and Affine() != Shift()
    assert copy.deepcopy(Affine(2.0)) == Affine(2.0)
    assert repr(Affine(2.0)) == "Affine(max_log_scale=2.0)"


def test_incomplete_family_says_what_it_lacks():
    class Half(Univariate):
        num_params = 1

    x, params = torch.zeros(3), torch.zeros(3, 1)
    for name in ("forward", "inverse"):
        refuses(TypeError, f"Half must define {name}", getattr(Half(), name), x, params)
