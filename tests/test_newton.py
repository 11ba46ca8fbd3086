"""The safeguarded triangular solver: against a strict wavefront, dense Jacobians and unrolled sweeps."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from asserts import refuses
from cases import seeded
from oracles import kept
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

from pyro_flows.inverse import newton_adjoint
from pyro_flows.inverse.newton import solve_triangular
from pyro_flows.inverse.newton_sweeps import FLOOR, TRUST, SolverSettings, TriangularMap, _Sweeps, sweep

DOUBLE = torch.float64


class Net(TriangularMap):
    """t x + W3 elu(W2 elu(W1 x + b1 + c) + b2): masked by the coordinate that each of the K groups of units carries.

    Coordinate i depends on the ``band`` before it; products of centre weights have one sign.
    """

    def __init__(self, *event, groups=4, band=None):
        size = math.prod(event)
        order = torch.arange(size)
        gap = order[:, None] - order[None]
        self.event, self.groups, self.name = event, groups, f"Net {event}"
        self.below = (gap > 0) & (gap <= (band or size))
        self.wave = order.view(event)
        self.calls = 0

    def parameters(self, gain=1.0, dtype=DOUBLE, seed=0, least=0.3):
        gen = seeded(seed)
        n, k = self.wave.numel(), self.groups
        wide = gain / math.sqrt(max(int(self.below.sum(1).max()), 1))

        def normal(*shape):
            return torch.randn(*shape, generator=gen, dtype=DOUBLE)

        s1, s3 = normal(k, n).sign(), normal(k, n).sign()
        made = [
            normal(k, n, n) * wide,
            s1 * normal(k, n).abs() * gain,
            0.5 * normal(k, n),
            normal(k, k, n, n) * wide / math.sqrt(k),
            s3[:, None] * s1[None] * normal(k, k, n).abs() * gain / k,
            0.5 * normal(k, n),
            normal(k, n, n) * wide / math.sqrt(k),
            s3 * normal(k, n).abs() * gain / k,
            least + torch.rand(n, generator=gen, dtype=DOUBLE),
        ]
        return [p.to(dtype) for p in made]

    def value_and_slope(self, x, shared, rowwise):
        self.calls += 1
        w1, a1, b1, w2, a2, b2, w3, a3, t = shared
        below = self.below.to(x.dtype)
        w1, w2, w3 = w1 * below, w2 * below, w3 * below
        flat = x.reshape(-1, self.wave.numel())
        u1 = torch.einsum("kij,nj->nki", w1, flat) + a1 * flat[:, None] + b1
        if rowwise:
            u1 = u1 + rowwise[0]
            t = t + F.softplus(rowwise[1])
        h1 = F.elu(u1)
        u2 = torch.einsum("kjab,njb->nka", w2, h1) + torch.einsum("kja,nja->nka", a2, h1) + b2
        f = t * flat + torch.einsum("kij,nkj->ni", w3, F.elu(u2)) + (a3 * F.elu(u2)).sum(1)
        g1, g2 = (torch.where(u > 0, 1.0, u.clamp(max=0).exp()) for u in (u1, u2))
        d = t + (a3 * g2 * torch.einsum("kja,nja->nka", a2, g1 * a1)).sum(1)
        return f.view(x.shape), d.view(x.shape)

    def slope_bounds(self, shared, rowwise):
        a1, a2, a3, t = shared[1], shared[4], shared[7], shared[8]
        if rowwise:
            t = t + F.softplus(rowwise[1])
        most = t + torch.einsum("ka,kja,ja->a", a3.abs(), a2.abs(), a1.abs())
        return t.reshape(-1, *self.event), most.reshape(-1, *self.event)


class Scalar(TriangularMap):
    """0.05 x - elu(-40 elu(x)): the slope is 0.05 far away and 40.05 at 0, where plain Newton steps go in circles."""

    name = "Scalar"
    wave = torch.zeros(1, dtype=torch.long)

    def value_and_slope(self, x, shared, rowwise):
        h = F.elu(x)
        f = 0.05 * x - F.elu(-40 * h)
        d = 0.05 + 40 * torch.where(h < 0, 1.0, (-40 * h).clamp(max=0).exp()) * torch.where(
            x > 0, 1.0, x.clamp(max=0).exp()
        )
        return f, d

    def slope_bounds(self, shared, rowwise):
        return torch.tensor([0.05], dtype=DOUBLE), torch.tensor([40.05], dtype=DOUBLE)


class Linear(TriangularMap):
    """A x for a matrix A of which ``bounds`` and ``wave`` may tell lies."""

    name = "Linear"

    def __init__(self, size, least=None, most=None):
        self.wave = torch.arange(size)
        self.least, self.most = least, most

    def value_and_slope(self, x, shared, rowwise):
        return x @ shared[0].T, shared[0].diagonal().expand_as(x)

    def slope_bounds(self, shared, rowwise):
        d = shared[0].diagonal()
        least = d if self.least is None else torch.full_like(d, self.least)
        return least, d if self.most is None else torch.full_like(d, self.most)


class Cubic(TriangularMap):
    """x_i + arctan(x_i) + sum_j<i A_ij x_j^3: what is not solved yet overflows, and 0 * inf goes back to what is."""

    name = "Cubic"

    def __init__(self, size):
        self.wave = torch.arange(size)

    def value_and_slope(self, x, shared, rowwise):
        return x + x.atan() + x**3 @ shared[0].tril(-1).T, 1 + 1 / (1 + x * x)

    def slope_bounds(self, shared, rowwise):
        return shared[0].new_tensor(1.0), shared[0].new_tensor(2.0)


class Root(TriangularMap):
    """Nearly the square root, of the sign of x: a Newton step goes to -0.9 x, so that it stays in any bracket."""

    name = "Root"
    wave = torch.zeros(1, dtype=torch.long)

    def value_and_slope(self, x, shared, rowwise):
        near = x * x + 1e-12
        root = near**-0.24
        return x * (1e-4 + root), 1e-4 + root * (1 - 0.48 * x * x / near)

    def slope_bounds(self, shared, rowwise):
        return torch.tensor([1e-4], dtype=DOUBLE), torch.tensor([1e-4 + 1e-12**-0.24], dtype=DOUBLE)


def plain(net, z, shared, rowwise=(), sweeps=200, x=None):
    """Newton-Jacobi without any safeguard."""
    m, most = net.slope_bounds(shared, rowwise)
    x = z / (m * most).sqrt() if x is None else x
    for _ in range(sweeps):
        f, d = net.value_and_slope(x, shared, rowwise)
        x = x + (z - f) / d
    return x


def strict(net, z, shared, rowwise=()):
    """Wave by wave, each coordinate by bisection alone: slow, and nothing to go wrong."""
    m, most = (b.expand_as(z) for b in net.slope_bounds(shared, rowwise))
    x = torch.zeros_like(z)
    for w in range(int(net.wave.max()) + 1):
        mine = (net.wave == w).expand_as(z)
        r = z - net.value_and_slope(x, shared, rowwise)[0]
        lo, hi = x + torch.minimum(r / m, r / most), x + torch.maximum(r / m, r / most)
        for _ in range(70 if z.dtype == DOUBLE else 40):
            x = torch.where(mine, 0.5 * (lo + hi), x)
            up = net.value_and_slope(x, shared, rowwise)[0] < z
            lo, hi = torch.where(mine & up, x, lo), torch.where(mine & ~up, x, hi)
    return x


def badness(net, x, z, shared, rowwise=()):
    """|f(x) - z| of each row in units of the last place of the row's terms."""
    f, d = net.value_and_slope(x, shared, rowwise)
    row = z.abs() + (1 + x.abs()).flatten(1).amax(1).view(-1, *[1] * (x.dim() - 1)) * d
    return ((f - z).abs() / (row * torch.finfo(z.dtype).eps)).flatten(1).amax(1)


def draw(net, n, dtype=DOUBLE, scale=1.0, seed=1):
    gen = seeded(seed)
    return scale * torch.randn(n, *net.wave.shape, generator=gen, dtype=DOUBLE).to(dtype)


def context(net, n, dtype=DOUBLE):
    gen = seeded(2)
    size = net.wave.numel()
    return [torch.randn(n, *s, generator=gen, dtype=DOUBLE).to(dtype) for s in ((net.groups, size), (size,))]


NETS = [Net(1), Net(7), Net(2, 2, 3), Net(16, band=3)]


# The solution


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
@pytest.mark.parametrize("gain", [0.05, 1.0, 2.0, 3.0])
def test_solves_as_the_strict_wavefront_does(net, gain, dtype, default_dtype):
    default_dtype(DOUBLE if dtype == torch.float32 else torch.float32)
    shared, z = net.parameters(gain, dtype), draw(net, 16, dtype)
    for rowwise in ([], context(net, 16, dtype)):
        net.calls = 0
        x, report = solve_triangular(net, z, shared, rowwise, SolverSettings())
        assert report.evaluations == net.calls
        assert x.dtype == dtype and x.shape == z.shape
        assert report.converged and report.waves == net.wave.numel()
        assert report.sweeps <= (report.waves if gain < 3 else 2 * report.waves) + 10
        slack = 1e-12 / torch.finfo(dtype).eps if dtype == DOUBLE else 8
        ours, least = (badness(net, v, z, shared, rowwise) for v in (x, strict(net, z, shared, rowwise)))
        assert (ours <= 4 * slack + 4 * FLOOR + 8 * least).all(), (ours.max(), least.max())


def test_sweeps_are_few_for_nets_of_moderate_gain():
    net = Net(30, band=5)
    for seed in range(10):
        for gain in (0.5, 1.5, 2.0):
            shared = net.parameters(gain, seed=seed, least=1.0)
            _, report = solve_triangular(net, draw(net, 8, seed=seed), shared, (), SolverSettings())
            assert report.sweeps <= 40, (seed, gain, report)
    # Far from the front some coordinates only go to and fro, unless they are calmed before it comes.
    net = Net(24)
    _, report = solve_triangular(net, draw(net, 8, seed=0), net.parameters(2.0), (), SolverSettings())
    assert report.sweeps <= 28


@pytest.mark.parametrize("target", [0.0, -2.0, 2.0, 30.0, -1e6, 1e6])
def test_where_plain_newton_goes_in_circles(target):
    net = Scalar()
    start = torch.tensor([-3.0, -2.0, -1.0, -0.2, 0.2, 0.7, 1.0, 2.0, 3.0], dtype=DOUBLE)[:, None]
    z = torch.full_like(start, target)
    if target == 0.0:
        assert (plain(net, z, (), x=start).abs() > 10).sum() >= 4
    x, stats = sweep(net, z, (), (), SolverSettings(), start)
    assert stats[0] < 60
    torch.testing.assert_close(net.value_and_slope(x, (), ())[0], z, rtol=1e-10, atol=1e-10)
    x, report = solve_triangular(net, z, (), (), SolverSettings())
    assert report.sweeps < 60


@pytest.mark.full
@pytest.mark.parametrize("factor", [2.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_weights_where_plain_newton_fails(factor, dtype):
    net = Net(40, band=4)
    shared = [factor * p for p in net.parameters(1.2, dtype)]
    shared[-1] = shared[-1] / factor
    z = draw(net, 32, dtype)
    wrong = 1e-3 / torch.finfo(dtype).eps
    assert (~(badness(net, plain(net, z, shared), z, shared) < wrong)).sum() >= 8
    x, report = solve_triangular(net, z, shared, (), SolverSettings())
    assert report.bisections > 0 and report.converged
    assert report.sweeps <= 100
    ours, least = badness(net, x, z, shared), badness(net, strict(net, z, shared), z, shared)
    assert (ours <= 2e4 + 8 * least).all()


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize(("scale", "least"), [(1e6, 0.3), (1.0, 1e-4), (1e6, 1e-4), (1e-6, 0.3)])
def test_large_values_and_steep_slopes(scale, least, dtype):
    net = Net(12, band=3)
    shared = net.parameters(2.0, dtype, least=least)
    shared[-1] = shared[-1].clamp(max=10 * least)
    m, most = net.slope_bounds(shared, ())
    assert least > 1e-3 or (most / m).max() > 1e4
    z = draw(net, 16, dtype, scale)
    x, report = solve_triangular(net, z, shared, (), SolverSettings())
    assert report.converged and report.sweeps < 40 * 12
    ours, least = badness(net, x, z, shared), badness(net, strict(net, z, shared), z, shared)
    assert (ours <= 2e4 + 8 * least).all(), (ours.max(), least.max())


def test_huge_rows_that_are_solved_stay_as_they_are():
    gen = seeded(0)
    a = torch.eye(9) + torch.randn(9, 9, generator=gen, dtype=torch.float32).tril(-1)
    z = torch.randn(10, 9, generator=gen, dtype=torch.float32)
    z[4] = 0.0
    z[4, -1] = 1e20  # nothing depends on it: solved at once, and in the batch until others are
    x, report = solve_triangular(Linear(9), z, [a.float()], (), SolverSettings())
    assert report.converged and report.sweeps > 6
    torch.testing.assert_close(x[4], z[4])


def test_overflow_beyond_the_front_does_not_reach_it():
    net = Cubic(12)
    gen = seeded(0)
    shared = [torch.randn(12, 12, generator=gen, dtype=DOUBLE)]
    want = torch.randn(8, 12, generator=gen, dtype=DOUBLE)
    z = net.value_and_slope(want, shared, ())[0]
    assert not torch.isfinite(plain(net, z, shared, sweeps=12)).all()
    far = torch.full_like(z, 1e200)  # and a start from which nothing is finite
    for start in (None, far):
        x, stats = sweep(net, z, shared, (), SolverSettings(), start)
        assert stats[4]
        torch.testing.assert_close(x, want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(net.value_and_slope(x, shared, ())[0], z, rtol=1e-11, atol=1e-11)


def test_affine_maps_take_as_many_sweeps_as_waves():
    gen = seeded(0)
    a = torch.randn(9, 9, generator=gen, dtype=DOUBLE).tril(-1) * 3 + torch.eye(9, dtype=DOUBLE)
    z = torch.randn(5, 9, generator=gen, dtype=DOUBLE)
    x, report = solve_triangular(Linear(9), z, [a], (), SolverSettings())
    assert report.sweeps <= 10
    torch.testing.assert_close(x, torch.linalg.solve_triangular(a, z.T, upper=False).T)


@pytest.mark.parametrize("gain", [1.0, 3.0, 4.0])
def test_rows_do_not_see_each_other(gain):
    net = Net(16, band=3)
    shared, rowwise, z = net.parameters(gain), context(net, 24), draw(net, 24)
    z[::5] *= 100  # so that rows end at different times
    x, _ = solve_triangular(net, z, shared, rowwise, SolverSettings())
    for k in range(0, 24, 3):
        alone, _ = solve_triangular(net, z[k : k + 1], shared, [c[k : k + 1] for c in rowwise], SolverSettings())
        close = 1e-12 if gain == 1.0 else 1e-10
        torch.testing.assert_close(alone[0], x[k], rtol=close, atol=close)


def test_solved_rows_leave():
    """Most rows are easy: evaluations go on with the few that are not."""

    class Counted(Net):
        rows = ()

        def value_and_slope(self, x, shared, rowwise):
            self.rows = (*self.rows, x.shape[0])
            return super().value_and_slope(x, shared, rowwise)

    net = Counted(16, band=3)
    shared = net.parameters(4.0)
    z = draw(net, 40)
    z[5:] = net.value_and_slope(torch.full((35, 16), 1e4, dtype=DOUBLE), shared, ())[0]
    net.rows = ()
    x, report = solve_triangular(net, z, shared, (), SolverSettings())
    assert net.rows[0] == 40 and net.rows[-1] <= 5 and sum(net.rows) < 0.8 * 40 * report.sweeps
    assert (badness(net, x, z, shared) < 1e5).all()


# The safeguards one by one


def test_stubborn_brackets_are_halved():
    """Newton's method stays inside the bracket and gains little: only bisection gets on."""
    net = Root()
    start = torch.tensor([[-7.0], [0.5], [5.0], [20.0]], dtype=DOUBLE)
    z = torch.zeros_like(start)
    assert (plain(net, z, (), x=start, sweeps=50).abs() > 1e-3 * start.abs()).all()
    x, stats = sweep(net, z, (), (), SolverSettings(), start)
    assert stats[0] < 40 and stats[3] > 0
    assert x.abs().max() < 1e-13


@torch.no_grad()
def test_guarded_steps_keep_to_their_rules():
    """Fronts stay in their brackets; what was accepted moves once, if alone, and never again."""
    seen = set()
    for seed in range(8):
        net = Net(12, band=3)
        z, shared = draw(net, 8, seed=seed), net.parameters(3.0, seed=seed)
        run = _Sweeps(net, z, shared, (), SolverSettings(tolerance=1e-2), 3 * torch.ones_like(z))
        run.evaluate()
        run.looking = False
        run.guard()
        for _ in range(400):
            x, first, done, newton = run.x, run.first, run.done, run.x + run.r / run.d
            passed = run.ratio < 1
            count = run.careful()[1]
            assert torch.equal(run.x[done], x[done])
            inside = (run.lo <= run.x) & (run.x <= run.hi)
            active = (run.wave == first) & (run.first == first) & ~passed & ~done
            assert inside[active].all()
            new = (run.wave >= first) & (run.wave < run.first)
            alone, several = ((new & passed & ~done & more) for more in (run.first == first + 1, run.first > first + 1))
            assert torch.equal(run.x[alone], newton[alone])
            assert torch.equal(run.x[several], x[several])
            seen |= {name for name, each in {"alone": alone, "several": several}.items() if each.any()}
            if count == 8:
                break
            run.evaluate()
        assert count == 8
    assert seen == {"alone", "several"}


@torch.no_grad()
def test_the_last_step_is_taken_where_it_gains():
    """What each kind of solved row does in a plain step, also when guarded steps begin."""
    net, shared = Cubic(3), [torch.zeros(3, 3, dtype=DOUBLE)]
    want = torch.tensor([0.5, -1.0, 2.0], dtype=DOUBLE).expand(5, 3)
    z = net.value_and_slope(want, shared, ())[0]
    start = want.clone()
    start[0, 0] += 5e-4  # within the tolerance, and much better than before
    start[1, 0] += 5e-4  # the same, and no better than before
    start[2, 0] += 0.1  # was accepted earlier
    start[3, 0] += 0.1  # not solved
    start[4] = torch.nextafter(want[4], torch.zeros_like(want[4]))  # rounding
    run = _Sweeps(net, z, shared, (), SolverSettings(tolerance=1e-3), start)
    run.evaluate()
    run.looking, run.live = False, torch.tensor([True, True, False, True, True])
    run.worst = torch.where(torch.arange(5) == 1, 2 * run.ratio.amax(1), math.inf)
    newton = start + run.r / run.d
    assert newton[4].ne(start[4]).any()
    solved, count = run.plain()
    assert solved.tolist() == [True, True, True, False, True] and count == 4
    moved = (run.x != start).nonzero().tolist()
    assert moved == [[0, 0], [3, 0]]
    assert torch.equal(run.x[[0, 3], 0], newton[[0, 3], 0])
    run.evaluate()
    run.guard()
    assert run.first[:, 0].tolist() == [3, 3, 3, 0, 3]
    assert run.done[2].all() and not run.done[3].any()


@torch.no_grad()
def test_rows_are_stuck_only_if_they_are_under_way():
    net, shared = Cubic(3), [torch.zeros(3, 3, dtype=DOUBLE)]
    z = torch.ones(2, 3, dtype=DOUBLE)
    start = sweep(net, z, shared, (), SolverSettings())[0]
    start[0] = 5
    run = _Sweeps(net, z, shared, (), SolverSettings(), start)
    run.evaluate()
    assert [run.stuck(), run.stuck()] == [False, True]
    run.live = torch.tensor([False, True])
    assert not run.stuck()


def test_maps_that_need_no_guard_get_none():
    gen = seeded(0)
    a = 3 * torch.randn(9, 9, generator=gen, dtype=DOUBLE).tril(-1) + torch.eye(9, dtype=DOUBLE)
    net = Net(12, band=3)
    for solved, shared in ((Linear(9), [a]), (net, net.parameters(0.5))):
        run = _Sweeps(solved, draw(solved, 8), shared, (), SolverSettings(), None)
        with torch.no_grad():
            run.run()
        assert not run.guarded and run.evaluations > 3


def test_solved_rows_rest_in_the_batch():
    """Accepted at a loose tolerance, a row takes one more step, and none while others are under way."""
    kept = []

    class Watched(Net):
        def value_and_slope(self, x, shared, rowwise):
            f, d = super().value_and_slope(x, shared, rowwise)
            kept.append((x.clone(), f, d))
            return f, d

    net, tolerance = Watched(16, band=3), 0.5
    shared, z = net.parameters(2.0), draw(net, 20)
    start = torch.zeros_like(z)
    start[:5] = sweep(net, z, shared, (), SolverSettings())[0][:5]
    start[:5, -1] += 0.1  # where each step would gain digits
    kept.clear()
    sweep(net, z, shared, (), SolverSettings(tolerance=tolerance), start)
    m = net.slope_bounds(shared, ())[0]
    whole = [each for each in kept if len(each[0]) == 20]
    rests, moves = 0, 0
    for row in range(20):
        accepted = None
        for k, (x, f, _) in enumerate(whole):
            if accepted is not None and k > accepted + 1:
                assert torch.equal(x[row], whole[accepted + 1][0][row])
                rests += 1
            elif accepted is None and bool(((z[row] - f[row]).abs() < m[0] * tolerance * (1 + x[row].abs())).all()):
                accepted = k
                moves += k + 1 < len(whole) and not torch.equal(whole[k + 1][0][row], x[row])
    assert rests >= 3 and moves >= 2


@torch.no_grad()
def test_rows_that_overflow_begin_anew_wave_by_wave():
    gen = seeded(0)
    net, shared = Cubic(4), [torch.randn(4, 4, generator=gen, dtype=DOUBLE)]
    z = torch.randn(3, 4, generator=gen, dtype=DOUBLE)
    start = torch.ones_like(z)
    start[0, 1] = start[2, 1] = 1e200
    run = _Sweeps(net, z, shared, (), SolverSettings(), start)
    run.looking = False
    run.evaluate()
    run.guard()
    run.careful()
    assert run.cold[:, 0].tolist() == [True, False, True] and not run.lost.any()
    assert not run.x[[0, 2]].any() and (run.x[1] != 1).all()
    for _ in range(3):
        before = run.x
        run.evaluate()
        run.careful()
        later = run.wave.expand(3, 4)[[0, 2]] > run.first[[0, 2]]
        assert later.any() and not run.x[[0, 2]][later].any()  # not before their turn
        assert (run.x[1] != before[1]).any()
    run.x[2, 3] = 1e200
    run.x[2, 2] = math.inf
    run.evaluate()
    solved, count = run.careful()
    assert run.lost[:, 0].tolist() == [False, False, True] and solved.tolist() == [False, False, True] and count == 1


@torch.no_grad()
def test_steps_beyond_the_front_have_a_limit():
    a = torch.eye(4, dtype=DOUBLE) + 1e8 * torch.ones(4, 4, dtype=DOUBLE).tril(-1)
    z = torch.zeros(1, 4, dtype=DOUBLE)
    run = _Sweeps(Linear(4), z, [a], (), SolverSettings(), torch.ones_like(z))
    run.looking = False
    run.evaluate()
    run.guard()
    run.careful()
    assert run.x.tolist() == [[0.0, *[1.0 - 2 * TRUST] * 3]]
    steep = torch.eye(4, dtype=DOUBLE) + 1e200 * torch.ones(4, 4, dtype=DOUBLE).tril(-1)
    run = _Sweeps(Linear(4), z, [steep], (), SolverSettings(), torch.ones_like(z))
    run.looking = True
    run.evaluate()
    run.plain()
    assert run.x.tolist() == [[0.0, *[-run.far] * 3]]


def test_empty_batch_and_meta():
    net = Net(2, 3)
    shared = [p.requires_grad_() for p in net.parameters()]
    x, report = solve_triangular(net, torch.zeros(0, 2, 3, dtype=DOUBLE), shared, (), SolverSettings())
    assert x.shape == (0, 2, 3) and report.converged and report.sweeps == 0
    (grad,) = torch.autograd.grad(x.sum(), shared[:1])
    assert not grad.any()
    shared = [p.to("meta") for p in shared]
    x, _ = solve_triangular(net, torch.zeros(4, 2, 3, device="meta"), shared, (), SolverSettings())
    assert x.shape == (4, 2, 3) and x.is_meta


def test_not_contiguous():
    net = Net(3, 4)
    shared, z = net.parameters(), draw(net, 6).transpose(1, 2).contiguous().transpose(1, 2)
    x, _ = solve_triangular(net, z, shared, (), SolverSettings())
    again, _ = solve_triangular(net, z.contiguous(), shared, (), SolverSettings())
    torch.testing.assert_close(x, again, rtol=0, atol=0)
    z = draw(net, 6).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    x, _ = solve_triangular(net, z, shared, (), SolverSettings())
    assert x.is_contiguous()
    one = z[:1].expand(6, 3, 4)
    x, _ = solve_triangular(net, one, shared, (), SolverSettings())
    torch.testing.assert_close(x, x[:1].expand_as(x))


# Failure


def test_too_few_sweeps_are_an_error():
    net = Net(22, band=3)
    shared, z = net.parameters(2.0), draw(net, 8)
    with pytest.raises(RuntimeError, match=r"Net \(22,\): 8 of 8 rows .* residual up to .* max_sweeps=11"):
        solve_triangular(net, z, shared, (), SolverSettings(max_sweeps=11))
    with pytest.warns(RuntimeWarning, match="max_sweeps=11"):
        x, report = solve_triangular(net, z, shared, (), SolverSettings(max_sweeps=11, on_fail="warn"))
    assert not report.converged and report.residual > 1e-12 and report.sweeps == 11
    assert (x - solve_triangular(net, z, shared, (), SolverSettings())[0]).abs().max() > 1e-6


@pytest.mark.parametrize("tolerance", [1e-30, 1e-14])
def test_a_tolerance_below_rounding_ends(tolerance):
    net = Net(12)
    for dtype in (torch.float32, DOUBLE):
        shared, z = net.parameters(3.0, dtype), draw(net, 8, dtype)
        x, report = solve_triangular(net, z, shared, (), SolverSettings(tolerance=tolerance))
        assert report.converged and report.sweeps < 40 * 12
        assert (badness(net, x, z, shared) < 1e3).all()


def test_a_loose_tolerance_takes_fewer_sweeps():
    net = Net(22, band=3)
    shared, z = net.parameters(2.0), draw(net, 8)
    x, report = solve_triangular(net, z, shared, (), SolverSettings())
    rough, quick = solve_triangular(net, z, shared, (), SolverSettings(tolerance=1e-3))
    assert quick.sweeps < report.sweeps and 1e-12 < quick.residual < 1e-3
    assert (rough - x).abs().max() > 1e-12


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_an_error(bad):
    net = Net(5)
    shared, rowwise, z = net.parameters(), context(net, 6), draw(net, 6)
    wrong = z.clone()
    wrong[1, 2] = wrong[4, 0] = bad
    with pytest.raises(ValueError, match=r"Net \(5,\): expected finite values to invert, got 2 of 6 rows"):
        solve_triangular(net, wrong, shared, rowwise, SolverSettings())
    with pytest.raises(ValueError, match="expected finite values to invert, got 2 of 6 rows"):
        solve_triangular(net, wrong, shared, rowwise, SolverSettings(max_sweeps=1))
    for k in range(len(shared)):
        if bad < 0 and k in (2, 5):
            continue  # a unit that saturates, and f stays finite
        wrong = [p.clone() for p in shared]
        wrong[k].flatten()[-1] = bad
        with pytest.raises(ValueError, match=r"Net \(5,\): expected finite parameters"):
            solve_triangular(net, z, wrong, rowwise, SolverSettings(on_fail="warn"))
    wrong = [c.clone() for c in rowwise]
    wrong[0][3, 1, 1] = abs(bad)
    with pytest.raises(ValueError, match="expected finite context's values, got 1"):
        solve_triangular(net, z, shared, wrong, SolverSettings())


@pytest.mark.parametrize("settings", [(0.0,), (2.0,), (None, 0), (None, None, "ignore")])
def test_settings_are_checked(settings):
    net = Net(2)
    with pytest.raises(ValueError, match="expected"):
        solve_triangular(net, draw(net, 1), net.parameters(), (), SolverSettings(*settings))


def test_maps_that_are_not_what_they_say_are_errors():
    gen = seeded(0)
    a = torch.randn(6, 6, generator=gen, dtype=DOUBLE).tril(-1) + torch.eye(6, dtype=DOUBLE)
    z = torch.randn(5, 6, generator=gen, dtype=DOUBLE)
    with pytest.raises(ValueError, match="Linear: expected bounds 0 < m <= M"):
        solve_triangular(Linear(6, 0.0, 1.0), z, [a], (), SolverSettings())
    with pytest.raises(ValueError, match="Linear: expected bounds 0 < m <= M"):
        solve_triangular(Linear(6, 1.0, 0.5), z, [a], (), SolverSettings())
    full = a + 3 * torch.randn(6, 6, generator=gen, dtype=DOUBLE).triu(1)
    refuses(RuntimeError, "5 of 5 rows", solve_triangular, Linear(6), z, [full], (), SolverSettings())


def test_what_cannot_be_represented_is_an_error():
    a = torch.eye(8, dtype=DOUBLE) + 1e60 * torch.ones(8, 8, dtype=DOUBLE).tril(-1)
    z = torch.ones(3, 8, dtype=DOUBLE)
    refuses(RuntimeError, "3 of 3 rows", solve_triangular, Linear(8), z, [a], (), SolverSettings())
    with pytest.warns(RuntimeWarning, match="overflows or loses all digits"):
        _, report = solve_triangular(Linear(8), z, [a], (), SolverSettings(on_fail="warn"))
    assert not report.converged and report.sweeps < 100  # given up, not gone on with to the limit


# Gradients


def grads_of(net, z, rowwise, shared):
    inputs = [t.requires_grad_() for t in (z, *rowwise, *shared)]

    def function(z, *tensors):
        k = len(rowwise)
        return solve_triangular(net, z, tensors[k:], tensors[:k], SolverSettings())[0]

    return function, inputs


@pytest.mark.full
def test_gradcheck():
    net = Net(4, groups=2)
    function, inputs = grads_of(net, draw(net, 2), context(net, 2), net.parameters(1.5))
    assert torch.autograd.gradcheck(function, inputs)
    net = Net(3, groups=1)
    function, inputs = grads_of(net, draw(net, 2), context(net, 2), net.parameters(1.5))
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_gradients_are_those_of_unrolled_sweeps(dtype, default_dtype):
    default_dtype(DOUBLE if dtype == torch.float32 else torch.float32)
    net = Net(3, 5, band=4)
    function, inputs = grads_of(net, draw(net, 6, dtype), context(net, 6, dtype), net.parameters(1.5, dtype))
    g = draw(net, 6, dtype, seed=3)
    x = function(*inputs)
    unrolled = plain(net, inputs[0], inputs[3:], inputs[1:3], sweeps=30)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == DOUBLE else {"rtol": 2e-3, "atol": 1e-3}
    torch.testing.assert_close(x, unrolled, **tolerance)
    ours, theirs = (torch.autograd.grad(v, inputs, g, retain_graph=True) for v in (x, unrolled))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, other, **tolerance)
    # And the solve with the whole Jacobian; one step put back into the graph would give its diagonal alone.
    flat = x.detach().flatten(1)
    rows = vmap(jacrev(lambda x, *c: net.value_and_slope(x[None], inputs[3:], [v[None] for v in c])[0].flatten()))
    jacobian = rows(x.detach(), *inputs[1:3]).reshape(6, 15, 15)
    v = torch.linalg.solve(jacobian.mT, g.flatten(1)[..., None])[..., 0].view_as(x)
    torch.testing.assert_close(ours[0], v.to(dtype), **tolerance)
    short = g / net.value_and_slope(x, inputs[3:], inputs[1:3])[1]
    assert flat.shape == (6, 15) and (ours[0] - short).abs().max() > 0.1


def test_only_what_needs_a_gradient_gets_one():
    net = Net(4)
    shared, z = net.parameters(), draw(net, 3)
    x, _ = solve_triangular(net, z, shared, (), SolverSettings())
    assert not x.requires_grad
    shared[2].requires_grad_()
    x, _ = solve_triangular(net, z, shared, (), SolverSettings())
    x.sum().backward()
    assert shared[2].grad is not None and all(p.grad is None for k, p in enumerate(shared) if k != 2)
    with torch.no_grad():
        x, _ = solve_triangular(net, z, shared, (), SolverSettings())
    assert not x.requires_grad


@pytest.mark.parametrize("transpose", [False, True])
def test_linear_systems_whose_series_overflows_go_turn_by_turn(transpose):
    gen = seeded(0)
    a = 1e3 * torch.randn(9, 9, generator=gen, dtype=DOUBLE).tril(-1) + torch.eye(9, dtype=DOUBLE)
    g = torch.randn(4, 9, generator=gen, dtype=DOUBLE)
    calls = []

    def product(v):
        calls.append(v)
        return torch.full_like(v, math.inf) if len(calls) == 3 else v @ (a if transpose else a.T)

    level, count = newton_adjoint._level(Linear(9), g, transpose)
    v = newton_adjoint._solve(product, torch.ones_like(g), g, level, count)
    assert len(calls) == 3 + 9
    want = torch.linalg.solve_triangular(a.T if transpose else a, g.T, upper=transpose).T
    torch.testing.assert_close(v, want, rtol=1e-10, atol=0)


def test_linear_systems_go_on_where_small_residuals_do_not_shrink():
    """A residual of a thousandth that stays as large for some turns is no rounding yet."""
    gen = seeded(0)
    size = 24
    a = torch.eye(size, dtype=DOUBLE)
    a[range(2, size), range(1, size - 1)] = 1.0
    a[range(2, size), range(size - 2)] = -1.0
    want = 1e3 + torch.randn(3, size, generator=gen, dtype=DOUBLE)
    g = want @ a.T
    residual = (g - g @ a.T).abs() / (g.abs() + (g @ a.T).abs() + g.abs())
    assert 1e-4 < residual.max() < 1e-2
    level, count = newton_adjoint._level(Linear(size), g, False)
    v = newton_adjoint._solve(lambda v: v @ a.T, torch.ones_like(g), g, level, count)
    torch.testing.assert_close(v, want, rtol=1e-9, atol=0)


def test_one_report_for_a_batch_of_problems():
    """Of solves with parameters of their own under vmap: the slowest, all evaluations, the worst."""
    net, reports = Net(12, band=3), []
    z, stacks = draw(net, 4), [torch.stack(p) for p in zip(*(net.parameters(g) for g in (0.05, 3.0)), strict=True)]

    def solve(*shared):
        x, report = solve_triangular(net, z, shared, (), SolverSettings())
        reports.append(report)
        return x

    vmap(solve)(*stacks)
    for k in (0, 1):
        solve(*(p[k] for p in stacks))
    both, easy, hard = reports
    assert easy.sweeps < hard.sweeps == both.sweeps and both.residual == max(easy.residual, hard.residual)
    assert both.evaluations == easy.evaluations + hard.evaluations
    assert both.bisections == hard.bisections > easy.bisections and both.converged


def test_saved_memory_does_not_grow_with_sweeps():
    net = Net(22, band=3)
    z = draw(net, 16).requires_grad_()
    rough, sweeps = [], []
    for gain in (0.05, 3.0):
        shared = [p.requires_grad_() for p in net.parameters(gain)]
        rough.append(
            sum(kept(lambda: sweeps.append(solve_triangular(net, z, shared, (), SolverSettings())[1].sweeps)).values())  # noqa: B023
        )
    assert sweeps[1] > 3 * sweeps[0]
    assert rough[0] == rough[1] <= sum(p.untyped_storage().nbytes() for p in (z, *shared))


# torch.func, compilers, autocast


def test_functions_of_torch_func():
    net = Net(2, 3, groups=2)
    function, (z, *others) = grads_of(net, draw(net, 4), context(net, 4), net.parameters(1.5))
    detached = [t.detach() for t in (z, *others)]
    z, *others = detached
    (c, e, *shared) = others

    def one(z, c, e):
        return function(z[None], c[None], e[None], *shared)[0]

    x = function(*detached)
    rows = jacrev(lambda x, c, e: net.value_and_slope(x[None], shared, [c[None], e[None]])[0][0])
    inverse = torch.linalg.inv(vmap(rows)(x, c, e).reshape(4, 6, 6)).reshape(4, 2, 3, 2, 3)
    torch.testing.assert_close(vmap(one)(z, c, e), x)
    torch.testing.assert_close(vmap(jacrev(one))(z, c, e), inverse)
    torch.testing.assert_close(vmap(jacfwd(one))(z, c, e), inverse)
    whole = jacrev(lambda z: function(z, *others))(z)
    torch.testing.assert_close(whole.movedim(3, 1).diagonal(dim1=0, dim2=1).movedim(-1, 0), inverse)
    # Batches of parameters, of contexts, and of both
    stacks = [torch.stack([p, 1.1 * p]) for p in shared]
    many = vmap(lambda *p: function(z, c, e, *p))(*stacks)
    torch.testing.assert_close(many[1], function(z, c, e, *[1.1 * p for p in shared]))
    many = vmap(lambda c: function(z, c, e, *shared), in_dims=1)(torch.stack([c, -c], 1))
    torch.testing.assert_close(many[1], function(z, -c, e, *shared))
    # Second derivatives, and those in some direction
    scale = [0.1 * t for t in detached]
    step = 1e-6
    there, back = (function(*[t + s * step * u for t, u in zip(detached, scale, strict=True)]) for s in (1, -1))
    torch.testing.assert_close(
        jvp(function, tuple(detached), tuple(scale))[1], (there - back) / (2 * step), rtol=1e-6, atol=1e-6
    )

    def total(v):
        return (one(v, c[0], e[0]) ** 2).sum()

    want = torch.autograd.functional.hessian(total, z[0])
    for made in (hessian(total)(z[0]), jacrev(jacrev(total))(z[0])):
        torch.testing.assert_close(made, want)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_break(backend):
    net = Net(5, groups=2)
    function, inputs = grads_of(net, draw(net, 3), context(net, 3), net.parameters())
    compiled = torch.compile(lambda *t: 2 * function(t[0] + 1, *t[1:]), fullgraph=True, backend=backend)
    want = 2 * function(inputs[0] + 1, *inputs[1:])
    got = compiled(*inputs)
    torch.testing.assert_close(got, want)
    ours, theirs = (torch.autograd.grad(v.square().sum(), inputs) for v in (got, want))
    torch.testing.assert_close(ours, theirs)
    kept = []

    def reported(z):
        x, report = solve_triangular(net, z, inputs[3:], inputs[1:3], SolverSettings())
        kept.append(report)
        return x

    torch.compile(reported, backend=backend)(inputs[0].detach())
    assert kept[-1].converged and kept[-1].sweeps > 1


def test_operators_keep_their_promises():
    net = Net(3, groups=2)
    z, shared = draw(net, 2), net.parameters()
    torch.library.opcheck(
        torch.ops.pyro_flows.solve_triangular.default, (z, shared, [], net.handle, None, None, "raise")
    )
    torch.library.opcheck(torch.ops.pyro_flows.solve_triangular_gradient.default, (z, z, shared, [], net.handle))


def test_autocast_is_off_inside():
    net = Net(6)
    shared, z = net.parameters(1.5, torch.float32), draw(net, 4, torch.float32).requires_grad_()
    want, _ = solve_triangular(net, z, shared, (), SolverSettings())
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        x, _ = solve_triangular(net, z, shared)
        (mine,) = torch.autograd.grad(x.sum(), z)
    torch.testing.assert_close(x, want)
    torch.testing.assert_close(mine, torch.autograd.grad(want.sum(), z)[0])


def test_maps_are_copied_with_names_of_their_own():
    net = Net(3)
    net.waves(torch.device("cpu"))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin.handle != net.handle
        assert torch.equal(twin.wave, net.wave)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            x, _ = solve_triangular(twin, draw(net, 2), net.parameters(), (), SolverSettings())
        assert torch.equal(x, solve_triangular(net, draw(net, 2), net.parameters(), (), SolverSettings())[0])
