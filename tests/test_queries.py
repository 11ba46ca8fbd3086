"""What one asks of a density, against closed forms, quadrature and enumeration."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import full_but, scaled, shake
from torch.distributions import transforms as torchs

import pyro_flows as pf
from pyro_flows.distributions import (
    MADE,
    CategoricalHead,
    Ensemble,
    GaussianMixture,
    StudentT,
    estimate_entropy,
    estimate_kl,
)
from pyro_flows.distributions.queries.mixtures import Mixture, fit_mixture
from pyro_flows.transforms import (
    ActNorm,
    Autoregressive,
    Householder,
    LULinear,
    Permutation,
    Rescaling,
    Standardization,
)

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _double(monkeypatch):
    """Double precision, and a proposal that is fitted to few draws."""
    monkeypatch.setattr("pyro_flows.distributions.queries.chain.ROWS", 512)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def linear(dim, *parts):
    """A flow of affine parts over normals, with the normal that it is."""
    flow = pf.Flow(pf.Chain([shake(part, 0.4) for part in parts]))
    with torch.no_grad():
        loc = flow.chain(torch.zeros(dim))
        matrix = (flow.chain(torch.eye(dim)) - loc).T
    return flow, loc, matrix @ matrix.T


AFFINE = {
    "lu": lambda: [LULinear(4, permutation="random")],
    "many": lambda: [LULinear(4), ActNorm(4), Permutation(4), Householder(4), Rescaling(4)],
    "wrapped": lambda: [LULinear(4), torchs.AffineTransform(torch.arange(4.0), torch.arange(1.0, 5.0))],
    "standardized": lambda: [LULinear(4), Standardization(torch.ones(4), torch.arange(1.0, 5.0))],
}


@pytest.mark.parametrize("parts", AFFINE)
def test_normals_under_affine_maps_have_closed_forms(parts):
    made = [part for part in AFFINE[parts]()]
    flow = pf.Flow(pf.Chain([shake(p, 0.4) if isinstance(p, pf.FlowTransform) else p for p in made])).eval()
    with torch.no_grad():
        loc = flow.chain(torch.zeros(4))
        matrix = (flow.chain(torch.eye(4)) - loc).T
    cov = matrix @ matrix.T
    asked, rest = [3, 1], [0, 2]
    density = flow()
    found = density.marginal(asked)
    assert found.exact and found.event_shape == (2,)
    y = density.sample((6,))
    true = dist.MultivariateNormal(loc[asked], cov[asked][:, asked])
    torch.testing.assert_close(found.log_prob(y[:, asked]), true.log_prob(y[:, asked]))
    assert (found.estimate(y[:, asked]).error == 0).all()
    values = y[:3, asked]
    given = density.conditional(asked, values)
    gain = cov[rest][:, asked] @ cov[asked][:, asked].inverse()
    mean = loc[rest] + (values - loc[asked]) @ gain.T
    true = dist.MultivariateNormal(mean, cov[rest][:, rest] - gain @ cov[asked][:, rest])
    assert given.exact and given.batch_shape == (3,) and given.event_shape == (2,)
    torch.testing.assert_close(given.log_prob(y[:3, rest]), true.log_prob(y[:3, rest]))
    drawn = given.sample((4000,))
    error = (drawn.mean(0) - mean) / (true.covariance_matrix.diagonal(dim1=-2, dim2=-1) / 4000).sqrt()
    assert error.abs().max() < 4.5
    spread = torch.stack([drawn[:, k].T.cov() for k in range(3)])
    torch.testing.assert_close(spread, true.covariance_matrix, rtol=0.2, atol=0.05 * float(cov.diagonal().max()))


@pytest.mark.full
@pytest.mark.parametrize("full", [False, True])
def test_mixtures_of_normals_under_affine_maps(full):
    base = shake(GaussianMixture(3, 4, full_covariance=full), 0.2)
    flow = pf.Flow(shake(LULinear(3), 0.2), base)
    density = flow()
    found = density.marginal(1)
    grid = torch.linspace(-12, 12, 241)
    plane = torch.cartesian_prod(grid, grid)
    at = torch.tensor([0.3, -1.0])
    whole = torch.stack([torch.cat((plane[:, :1], v.expand(len(plane), 1), plane[:, 1:]), 1) for v in at])
    true = density.log_prob(whole).logsumexp(-1) + 2 * math.log(0.1)
    assert found.exact
    torch.testing.assert_close(found.log_prob(at[:, None]), true, atol=1e-6, rtol=1e-6)
    given = density.conditional(1, at[:, None])
    drawn = given.sample((3000,))
    weights = (density.log_prob(whole) - true[:, None] + 2 * math.log(0.1)).exp()
    mean = weights @ plane
    second = weights @ plane.square() - mean.square()
    assert ((drawn.mean(0) - mean) / (second / 3000).sqrt()).abs().max() < 4.5


ORDERED = {
    "maf": lambda: [pf.maf(3, order="identity", num_layers=2, hidden_dims=(8,))],
    "iaf": lambda: [pf.iaf(3, order="identity", num_layers=2, hidden_dims=(8,))],
    "nsf": lambda: [pf.nsf(3, autoregressive=True, order="identity", num_layers=2, hidden_dims=(8,))],
    "inverse": lambda: [pf.maf(3, order="identity", num_layers=1, hidden_dims=(8,)).inv],
    "triangular": lambda: [lower(LULinear(3)), pf.maf(3, order="identity", num_layers=1, hidden_dims=(8,))],
    "ends": lambda: [
        pf.maf(3, order="identity", num_layers=1, hidden_dims=(8,)),
        Standardization(torch.zeros(3), torch.full((3,), 2.0)),
        torchs.AffineTransform(1.0, 0.5),
    ],
    "turned": lambda: [
        Autoregressive(3, order="reverse", hidden_dims=(8,)),
        Permutation(3, "reverse"),
        Autoregressive(3, hidden_dims=(8,)),
    ],
}


def lower(layer):
    with torch.no_grad():
        layer.factors.copy_(torch.randn(3, 3).tril() * 0.3)
    return layer


@pytest.mark.parametrize("base", full_but([None, "t"], None))
@pytest.mark.parametrize("parts", full_but(ORDERED, "iaf", "turned"))
def test_leading_dimensions_are_exact(parts, base):
    """Against quadrature over the last dimension."""
    chain = pf.Chain(ORDERED[parts]())
    for part in chain:
        if not isinstance(part, LULinear):
            shake(part, 0.3)
    flow = pf.Flow(chain, StudentT(3, 8.0) if base else None)
    density = flow()
    found = density.marginal((1, 0))
    y = density.sample((4,))
    grid = torch.sinh(torch.linspace(-8, 8, 20001))
    whole = torch.cat((y[:, None, :2].expand(4, len(grid), 2), grid[None, :, None].expand(4, -1, 1)), -1)
    true = torch.trapezoid(density.log_prob(whole).exp(), grid).log()
    assert found.exact
    tolerance = {"atol": 3e-4 if parts == "nsf" else 2e-5, "rtol": 1e-5}  # quadrature meets kinks of splines
    torch.testing.assert_close(found.log_prob(y[:, [1, 0]]), true, **tolerance)
    given = density.conditional((0, 1), y[:, :2])
    assert given.exact
    torch.testing.assert_close(given.log_prob(y[:, 2:]), density.log_prob(y) - true, **tolerance)
    below = torch.cumulative_trapezoid((density.log_prob(whole) - true[:, None]).exp(), grid, dim=-1)
    drawn = given.sample((500,))[..., 0]
    places = torch.searchsorted(grid, drawn.T.contiguous()).clamp(1, len(grid) - 1)
    uniform = below.gather(1, places - 1).sort(1).values
    gap = (uniform - (torch.arange(500) + 0.5) / 500).abs().amax(1)
    assert gap.max() < 2.0 / 500**0.5  # Kolmogorov and Smirnov, p of 1 in 1500


EXACT = [
    ("one order", lambda: pf.maf(4, order=[2, 0, 3, 1], hidden_dims=(8,)), [(2,), (2, 0), (0, 3, 2), (0, 1, 2, 3)]),
    ("alternating", lambda: pf.maf(4, hidden_dims=(8,)), [(0, 1, 2, 3)]),
    ("couplings", lambda: pf.nsf(4, hidden_dims=(8,)), [(3, 2, 1, 0)]),
    (
        "chain of neighbors",
        lambda: pf.maf(4, adjacency=neighbors(), hidden_dims=(8,)),
        [(0,), (3,), (0, 1), (2, 3), (0, 3)],
    ),
    (
        "elementwise",
        lambda: pf.Chain([Rescaling(4), torchs.ExpTransform()]),
        [(0,), (1,), (2,), (3,), (0, 1), (1, 2), (2, 3), (0, 3), (0, 1, 2)],
    ),
]


def neighbors():
    """Dimension 1 sees 0, and 2 sees 3."""
    seen = torch.zeros(4, 4, dtype=torch.bool)
    seen[1, 0] = seen[2, 3] = True
    return seen


@pytest.mark.parametrize(("name", "build", "closed"), EXACT, ids=[each[0] for each in EXACT])
def test_what_is_exact(name, build, closed):
    density = pf.Flow(shake(build(), 0.3), StudentT(4))()
    sets = [dims for dims in ((0,), (1,), (2,), (3,), (0, 1), (1, 2), (2, 3), (0, 3), (0, 1, 2))]
    exact = {dims for dims in sets if density.marginal(dims).exact}
    expected = {tuple(sorted(dims)) for dims in closed} & set(sets)
    assert exact == expected
    for dims in closed:
        found = density.marginal(dims)
        assert found.exact, dims
        if len(dims) == 4:
            y = density.sample((5,))
            torch.testing.assert_close(found.log_prob(y[:, list(dims)]), density.log_prob(y))


def test_matrices_are_read_off():
    """Exact zeros of a matrix decide, wherever they stand."""
    layer = LULinear(4)
    with torch.no_grad():
        layer.factors[2, 0] = layer.factors[3, 2] = 0.7
    density = pf.Flow(pf.Chain([layer]), StudentT(4))()
    assert [density.marginal(dims).exact for dims in (0, 1, 2, (0, 2), (0, 1), (0, 2, 3))] == [1, 1, 0, 1, 1, 1]
    y = density.sample((3,))
    inner = StudentT(4)().base_dist
    x = density.transforms[0].inv(y)
    torch.testing.assert_close(density.marginal((2, 0)).log_prob(y[:, [2, 0]]), inner.log_prob(x)[:, [0, 2]].sum(-1))


def rough(seed=0, dim=3, context_dim=0):
    torch.manual_seed(seed)
    return pf.Flow(shake(pf.maf(dim, num_layers=2, hidden_dims=(8,), context_dim=context_dim), 0.2))


def integrated(density, values, grid):
    """Log-density of dimension 1 of three, by quadrature."""
    plane = torch.cartesian_prod(grid, grid)
    whole = torch.stack([torch.cat((plane[:, :1], v.expand(len(plane), 1), plane[:, 1:]), 1) for v in values])
    return density.log_prob(whole).logsumexp(-1) + 2 * (grid[1] - grid[0]).log()


def test_estimates_are_within_their_errors():
    density = rough()()
    values = density.sample((8,))[:, 1]
    true = integrated(density, values, torch.linspace(-14, 14, 281))
    found = density.marginal(1, num_samples=500)
    assert not found.exact
    value, error, effective = found.estimate(values[:, None])
    assert (error > 0).all() and (effective > 100).all() and (effective <= 500).all()
    assert ((value - true) / error).abs().max() < 4
    torch.testing.assert_close(found.log_prob(values[:, None]), value)  # the same draws
    more = density.marginal(1, num_samples=8000).estimate(values[:, None])
    assert ((more.value - true) / more.error).abs().max() < 4
    assert (error / more.error).log2().mean() == pytest.approx(2, abs=0.4)


@pytest.mark.full
def test_gradients_of_estimates():
    density = rough()()
    found = density.marginal(1, num_samples=20000)
    value = torch.tensor([0.4], requires_grad=True)
    (slope,) = torch.autograd.grad(found.log_prob(value), value)
    grid = torch.linspace(-12, 12, 241)
    at = torch.tensor([0.4 - 1e-4, 0.4 + 1e-4])
    low, high = integrated(density, at, grid).detach()
    assert float(slope) == pytest.approx(float(high - low) / 2e-4, abs=0.05)


@pytest.mark.full
def test_resampled_draws_follow_the_conditional():
    density = rough()()
    values = torch.tensor([[0.5], [-1.0]])
    given = density.conditional(1, values, num_samples=4000)
    drawn = given.sample((4000,))
    assert drawn.shape == (4000, 2, 2) and not given.exact
    grid = torch.linspace(-12, 12, 241)
    plane = torch.cartesian_prod(grid, grid)
    for k, value in enumerate(values[:, 0]):
        whole = torch.cat((plane[:, :1], value.expand(len(plane), 1), plane[:, 1:]), 1)
        weights = density.log_prob(whole).softmax(0)
        mean = weights @ plane
        deviation = (weights @ plane.square() - mean.square()).sqrt()
        assert ((drawn[:, k].mean(0) - mean) / deviation).abs().max() < 0.1
        assert (drawn[:, k].std(0) / deviation - 1).abs().max() < 0.1
    y = density.sample((2,))
    estimate = given.estimate(y[:, [0, 2]])
    joint = density.log_prob(torch.stack((y[:, 0], values[:, 0], y[:, 2]), -1))
    torch.testing.assert_close(estimate.value, joint - given.evidence.value)
    torch.testing.assert_close(estimate.error, given.evidence.error)


@pytest.mark.full
def test_conditionals_of_some():
    """Of one dimension given another, the third integrated out."""
    density = rough()()
    given = density.conditional(1, [0.5], of=2, num_samples=2000)
    grid = torch.linspace(-12, 12, 481)
    y = torch.stack([grid.new_tensor([0.0, 0.5, v]) for v in (-0.5, 0.2, 1.0)])
    whole = y[:, None].repeat(1, len(grid), 1)
    whole[..., 0] = grid
    joint = density.log_prob(whole).logsumexp(-1) + (grid[1] - grid[0]).log()
    true = joint - integrated(density, torch.tensor([0.5]), torch.linspace(-14, 14, 281))
    value, error, _ = given.estimate(y[:, 2:])
    assert ((value - true) / error).abs().max() < 4
    assert given.event_shape == (1,) and given.sample((7,)).shape == (7, 1)
    ordered = pf.Flow(shake(pf.maf(3, order="identity", hidden_dims=(8,)), 0.2))()
    assert ordered.conditional(0, [0.5], of=1).exact and not ordered.conditional(0, [0.5], of=2).exact
    turned = ordered.conditional(0, [0.5], of=(2, 1)).log_prob(torch.tensor([0.3, -0.2]))
    torch.testing.assert_close(turned, ordered.conditional(0, [0.5]).log_prob(torch.tensor([-0.2, 0.3])))
    refuses(ValueError, "other dimensions than dims", lambda: density.conditional(1, [0.5], of=(0, 1)))


@pytest.mark.full
def test_too_few_effective_draws_warn():
    density = pf.Flow(shake(pf.nsf(6, hidden_dims=(8,)), 0.5))()
    found = density.marginal(0, num_samples=50)
    with pytest.warns(RuntimeWarning, match=r"marginal of dimensions \[0\].*fewer than 100 effective draws of 50"):
        found.log_prob(torch.zeros(1))
    assert not found.estimate(torch.zeros(1)).trusted
    with pytest.warns(RuntimeWarning, match=r"conditional of dimensions \[0\].*draws rest on fewer"):
        density.conditional(0, 0.0, num_samples=50).sample()


@pytest.mark.full
def test_bounded_dimensions_keep_their_units():
    """A marginal of exp(z) is that of z with the slope; rough ones, too."""
    flow = rough()
    whole = pf.Flow(pf.Chain([*flow.chain, torchs.ExpTransform()]))
    z = torch.tensor([[0.3], [1.1]])
    plain, bounded = flow().marginal(1), whole().marginal(1)
    a, b = plain.estimate(z), bounded.estimate(z.exp())
    assert ((a.value - z[:, 0] - b.value) / (a.error + b.error)).abs().max() < 4
    assert (bounded.sample((10,)) > 0).all()
    refuses(ValueError, "within the support", lambda: whole().conditional(1, -z[0]))
    refuses(ValueError, "Part", lambda: bounded.log_prob(-z))
    assert bounded.support.check(z.exp()).all() and not bounded.support.check(-z).any()


@pytest.mark.parametrize("order", full_but(["alternating", "identity"], "identity"))
def test_contexts_and_shapes(order):
    torch.manual_seed(0)
    chain = shake(pf.maf(3, num_layers=2, hidden_dims=(8,), context_dim=2, order=order), 0.2)
    flow = pf.Flow(pf.Chain([chain, Standardization(torch.ones(3), torch.full((3,), 3.0))]))
    context = torch.randn(4, 2)
    whole = flow(context)
    found = whole.marginal((0, 1), num_samples=200)
    assert found.batch_shape == (4,) and found.event_shape == (2,) and found.exact == (order == "identity")
    value = whole.sample((5,))[..., :2]
    score = found.estimate(value)
    assert score.value.shape == (5, 4)
    for k in range(4):
        one = flow(context[k]).marginal((0, 1), num_samples=200).estimate(value[:, k])
        assert ((one.value - score.value[:, k]).abs() <= 5 * (one.error + score.error[:, k]) + 1e-9).all()
    given = whole.conditional((0, 1), value)
    assert given.batch_shape == (5, 4) and given.sample((2,)).shape == (2, 5, 4, 1)
    assert given.estimate(torch.zeros(1)).value.shape == (5, 4)
    wide = found.expand((7, 4))
    assert wide.sample((2,)).shape == (2, 7, 4, 2) and wide.estimate(value[0]).value.shape == (7, 4)
    assert found.rsample((2,)).requires_grad


@pytest.mark.full
def test_answers_follow_the_parameters():
    """A marginal may be made once and trained: closed forms are those of the current parameters."""
    flow = pf.Flow(LULinear(3), pf.distributions.DiagonalNormal(3))
    found = flow().marginal((0, 2))
    y = torch.randn(5, 2)
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.1)
    for _ in range(2):
        before = -found.log_prob(y).mean()
        before.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert -found.log_prob(y).mean() < before
    torch.testing.assert_close(found.log_prob(y), flow().marginal((0, 2)).log_prob(y))


def test_in_pyro_models():
    density = rough()()

    def model(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("y", density.marginal((0, 2)), obs=y)

    y = density.sample((6,))[:, [0, 2]]
    trace = pyro.poutine.trace(model).get_trace(y)
    trace.compute_log_prob()
    assert trace.nodes["y"]["log_prob"].shape == (6,)


def small(order="identity", head=None, dim=4, **options):
    torch.manual_seed(0)
    head = CategoricalHead([2, 3, 2, 3]) if head is None else head
    return scaled(shake(MADE(dim, head, hidden_dims=(12,), order=order, **options), 0.4), 1.5).eval()


def table(density, sizes):
    """Probabilities of all values."""
    states = torch.cartesian_prod(*(torch.arange(n, dtype=torch.get_default_dtype()) for n in sizes))
    return density.log_prob(states).exp().reshape(sizes).detach()


@pytest.mark.parametrize("order", full_but(["identity", [2, 0, 3, 1]], [2, 0, 3, 1]))
@pytest.mark.parametrize("summed", full_but([True, False], False))
def test_discrete_made_against_enumeration(order, summed, monkeypatch):
    if not summed:
        monkeypatch.setattr("pyro_flows.distributions.made.pieces.STATES", 0)
    sizes = (2, 3, 2, 3)
    density = small(order)()
    whole = table(density, sizes)
    assert float(whole.sum()) == pytest.approx(1)
    for dims in ((0,), (1, 3), (3, 1), (2, 0, 3)):
        found = density.marginal(dims, num_samples=4000)
        values = torch.cartesian_prod(*(torch.arange(float(sizes[k])) for k in dims)).reshape(-1, len(dims))
        true = whole.sum([k for k in range(4) if k not in dims])
        true = true.permute([sorted(dims).index(k) for k in dims]).reshape(-1)
        value, error, _ = found.estimate(values)
        assert found.exact >= summed
        if found.exact:
            torch.testing.assert_close(value.exp(), true)
        else:
            assert ((value - true.log()) / error).abs().max() < 4
        rest = [k for k in range(4) if k not in dims]
        given = density.conditional(dims, values[1], num_samples=8000)
        drawn = given.sample((4000,)).long()
        share = torch.zeros([sizes[k] for k in rest])
        share.index_put_(tuple(drawn.unbind(-1)), torch.ones(4000), accumulate=True)
        exact = whole.movedim(dims, tuple(range(len(dims))))[tuple(values[1].long())]
        exact = exact / exact.sum()
        assert (share / 4000 - exact).abs().max() < 0.04
        others = torch.cartesian_prod(*(torch.arange(float(sizes[k])) for k in rest)).reshape(-1, len(rest))
        torch.testing.assert_close(given.estimate(others).value.exp().sum(), torch.tensor(1.0), atol=0.1, rtol=0)


def test_any_order_answers_by_members_of_the_order():
    made = small("any", num_masks=3)
    density = made()
    dims, sizes = (1, 3), (2, 3, 2, 3)
    observed = torch.tensor([False, True, False, True])
    members = tuple(made.member_for(observed, k) for k in range(3))
    whole = table(made.at_members(members, None), sizes)
    found = density.marginal(dims)
    values = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0))
    assert found.exact
    torch.testing.assert_close(found.log_prob(values).exp(), whole.sum((0, 2)).reshape(-1))
    drawn = found.sample((4000,)).long()
    share = torch.zeros(3, 3).index_put_(tuple(drawn.unbind(-1)), torch.ones(4000), accumulate=True) / 4000
    assert (share - whole.sum((0, 2))).abs().max() < 0.04
    given = density.conditional(dims, torch.tensor([2.0, 0.0]))
    others = torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0))
    true = whole[:, 2, :, 0] / whole[:, 2, :, 0].sum()
    torch.testing.assert_close(given.log_prob(others).exp(), true.reshape(-1))
    drawn = given.sample((4000,)).long()
    share = torch.zeros(2, 2).index_put_(tuple(drawn.unbind(-1)), torch.ones(4000), accumulate=True) / 4000
    assert (share - true).abs().max() < 0.04


@pytest.mark.full
def test_real_made_weighs_its_own_conditionals():
    made = small(head="normal", dim=3)
    density = made()
    values = density.sample((5,))[:, 1]
    grid = torch.linspace(-30, 30, 601)
    true = integrated(density, values, grid)
    value, error, _ = density.marginal(1, num_samples=4000).estimate(values[:, None])
    assert ((value - true) / error).abs().max() < 4
    assert density.marginal((0, 1)).exact


@pytest.mark.full
def test_ensembles_average_marginals():
    members = [rough(k) for k in range(3)]
    for member in members[:2]:
        member.chain = shake(pf.maf(3, num_layers=2, hidden_dims=(8,), order="identity"), 0.3)
    ensemble = Ensemble(members)
    found = ensemble().marginal(0, num_samples=2000)
    y = ensemble.sample((4,))
    each = [member().marginal(0, num_samples=2000).estimate(y[:, :1]) for member in members]
    value, error, _ = found.estimate(y[:, :1])
    mean = torch.stack([part.value for part in each]).logsumexp(0) - math.log(3)
    assert not found.exact and ((value - mean).abs() < 5 * error + 1e-9).all()
    given = ensemble().conditional(0, y[:, :1], num_samples=2000)
    torch.testing.assert_close(given.estimate(y[:, 1:]).value, ensemble.log_prob(y) - value, atol=0.1, rtol=0)
    assert Ensemble(members[:2])().marginal(0).exact
    far = [pf.Flow(pf.Chain([Rescaling(2), torchs.AffineTransform(torch.tensor([a, a]), 1.0)])) for a in (-9.0, 9.0)]
    drawn = Ensemble(far)().conditional(0, torch.tensor([9.0])).sample((50,))
    assert (drawn > 3).all()


@pytest.mark.parametrize("df", [None, 5])
def test_mixtures_factor(df):
    loc, root = torch.randn(3, 4), torch.randn(3, 4, 4)
    made = Mixture(torch.randn(3).log_softmax(0), loc, root @ root.mT + torch.eye(4), df)
    x = torch.randn(6, 4)
    known, rest = torch.tensor([2, 0]), torch.tensor([1, 3])
    given = made.given(known, x[:, known], rest)
    torch.testing.assert_close(made.at(known).log_prob(x[:, known]) + given.log_prob(x[:, rest]), made.log_prob(x))
    if df is None:
        true = dist.MultivariateNormal(made.loc, made.cov).log_prob(x[:, None])
        torch.testing.assert_close(made.log_prob(x), (true + made.log_weights).logsumexp(-1))
    one = Mixture(torch.zeros(1), torch.zeros(1, 1), torch.ones(1, 1, 1), 5).log_prob(x[:, :1])
    torch.testing.assert_close(one, dist.StudentT(5.0).log_prob(x[:, 0]))
    drawn = given.sample((3000,))
    # Draws and log-densities are of one law: the mean of 1 / p within a box is its volume.
    near = ((drawn - drawn.median(0).values).abs() < 1).all(-1)
    volume = torch.where(near, (-given.log_prob(drawn)).exp(), 0.0)
    assert drawn.shape == (3000, 6, 2)
    assert ((volume.mean(0) - 4) / (volume.std(0) / 3000**0.5)).abs().max() < 4.5


@pytest.mark.full
def test_fitted_mixtures_find_clusters():
    rows = torch.cat([torch.randn(500, 2) * 0.1 + torch.tensor(c) for c in ((5.0, 0.0), (-5.0, 1.0), (0.0, 9.0))])
    made = fit_mixture(rows, 6, 5)
    near = torch.cdist(torch.tensor([(5.0, 0.0), (-5.0, 1.0), (0.0, 9.0)]), made.loc).amin(1)
    assert near.max() < 0.2 and made.log_weights.exp().sum() == pytest.approx(1)


@pytest.mark.full
def test_modes_of_a_mixture():
    base = GaussianMixture(2, 2)
    with torch.no_grad():
        base.loc.copy_(torch.tensor([[3.0, 0.0], [-3.0, 1.0]]))
        base.logits.copy_(torch.tensor([0.0, 1.0]))
    flow = pf.Flow(pf.Chain([Rescaling(2), torchs.AffineTransform(torch.tensor([0.0, 100.0]), 50.0)]), base)
    with torch.no_grad():
        found = flow().modes(steps=100)
    true = torch.tensor([[-150.0, 150.0], [150.0, 100.0]])
    torch.testing.assert_close(found.points, true, atol=0.1, rtol=0)
    torch.testing.assert_close(found.log_prob, flow.log_prob(found.points))
    assert found.settled.all() and int(found.num_starts.sum()) == 32
    torch.testing.assert_close(flow().mode, true[0], atol=0.1, rtol=0)


@pytest.mark.full
def test_modes_are_those_of_the_data():
    """That of a log-normal, exp(-1/4) for a scale of one half, not that of its logarithm."""
    flow = pf.Flow(pf.Chain([Standardization(torch.zeros(2), torch.full((2,), 0.5)), torchs.ExpTransform()]))
    torch.testing.assert_close(flow().mode, torch.full((2,), math.exp(-0.25)), atol=1e-3, rtol=0)
    made = MADE(2, "normal", hidden_dims=()).eval()
    torch.testing.assert_close(made().mode, torch.zeros(2), atol=1e-3, rtol=0)
    context = torch.randn(3, 2)
    flow = pf.Flow(shake(pf.maf(2, context_dim=2, hidden_dims=(8,)), 0.2))
    assert flow(context).mode.shape == (3, 2)


@pytest.mark.full
def test_unbounded_densities_are_said():
    class Spike(torch.nn.Module):
        def forward(self):
            return dist.Gamma(torch.full((1,), 0.3), 1.0).to_event(1)

    flow = pf.Flow(pf.Chain([Rescaling(1)]), Spike())
    flow.chain = pf.Chain([torchs.ExpTransform().inv, Rescaling(1), torchs.ExpTransform()])
    with pytest.warns(RuntimeWarning, match="still rises"):
        found = flow().modes(steps=60, num_starts=4)
    assert not found.settled[0]


def test_discrete_modes():
    density = small()()
    whole = table(density, (2, 3, 2, 3))
    found = density.modes()
    assert torch.equal(found.points[0].long(), torch.tensor(torch.unravel_index(whole.argmax(), whole.shape)))
    large = MADE(20, hidden_dims=(4,)).eval()
    refuses(NotImplementedError, "too many values", lambda: large().modes())


def test_entropy():
    flow, _, cov = linear(4, LULinear(4))
    found = estimate_entropy(flow(), num_samples=100)
    true = dist.MultivariateNormal(torch.zeros(4), cov).entropy()
    torch.testing.assert_close(found.value, true)
    assert found.error < 1e-8 and flow().entropy().requires_grad
    made = small()
    whole = table(made(), (2, 3, 2, 3))
    found = estimate_entropy(made())
    assert abs(found.value + (whole * whole.log()).sum()) < 4 * found.error
    plain = rough()()
    value, error, _ = estimate_entropy(plain)
    drawn = -plain.log_prob(plain.sample((20_000,)))
    assert abs(value - drawn.mean()) < 4 * (error.square() + drawn.var() / 20_000).sqrt()
    assert error < drawn.std() / 100  # of as many draws, without the control variate


def test_divergence():
    torch.manual_seed(0)
    (p, a, s), (q, b, t) = (linear(3, LULinear(3)) for _ in range(2))
    normals = [dist.MultivariateNormal(*each) for each in ((a, s), (b, t))]
    true = torch.distributions.kl_divergence(*normals)
    for left, right in ((p(), q()), (normals[0], q()), (p(), normals[1])):
        value, error, _ = estimate_kl(left, right)
        assert 0 < error < 0.2 and abs(value - true) < 4 * error
    assert estimate_kl(p(), p()).value.abs() < 1e-12
    refuses(ValueError, "same events", lambda: estimate_kl(p(), linear(2, LULinear(2))[0]()))


def test_images_take_tuples():
    flow = pf.Flow(shake(pf.Chain([Rescaling((2, 2, 2)), ActNorm((2, 2, 2))]), 0.3)).eval()
    density = flow()
    found = density.marginal([(0, 1, 1), (1, 0, 0)])
    y = density.sample((3,))
    assert found.exact
    each = pf.Flow(flow.chain)().base_dist.base_dist.log_prob(flow.chain.inv(y))
    slopes = flow.chain[0].log_slopes(y) + flow.chain[1].log_slopes(y)
    true = (each + slopes)[:, [0, 1], [1, 0], [1, 0]].sum(-1)
    torch.testing.assert_close(found.log_prob(torch.stack((y[:, 0, 1, 1], y[:, 1, 0, 0]), -1)), true)
    assert density.conditional([(0, 0, 0)], [1.0]).sample().shape == (7,)
    refuses(ValueError, "tuples of indices", lambda: density.marginal(3))


class Bare(torch.nn.Module):
    """A module that only scores and samples."""

    event_shape, context_dim = torch.Size((2,)), 0

    def log_prob(self, value):
        return value.sum(-1)

    def sample(self, sample_shape=()):
        return torch.zeros(*sample_shape, 2)


def test_refusals():
    density = rough()()
    refuses(ValueError, "integers from 0 to 2", lambda: density.marginal((0, 3)))
    refuses(ValueError, "none twice", lambda: density.marginal((0, 0)))
    refuses(ValueError, "at least one", lambda: density.marginal(()))
    refuses(ValueError, "integers from 0 to 2", lambda: density.marginal(True))
    refuses(ValueError, "leave some", lambda: density.conditional((0, 1, 2), torch.zeros(3)))
    refuses(ValueError, "within the support", lambda: density.conditional(0, math.nan))
    refuses(ValueError, r"values of shape \(\*batch, 2\)", lambda: density.conditional((0, 1), torch.zeros(3)))
    refuses(ValueError, "last dimension 1", lambda: density.marginal(0).log_prob(torch.zeros(2)))
    refuses(ValueError, "num_samples", lambda: density.marginal(0, num_samples=1))
    simplex = pf.Flow(pf.Chain([pf.maf(2), torchs.StickBreakingTransform()]))
    refuses(NotImplementedError, "no joint density", lambda: simplex().marginal(0))
    pixels = pf.distributions.Dequantized(pf.Flow(pf.Chain([pf.transforms.LogitPixels(2, levels=4).inv])), 4)
    refuses(NotImplementedError, "dequantized.flow", lambda: pixels().marginal(0))
    bare = Ensemble([Bare()])
    refuses(NotImplementedError, "Bare", lambda: bare().marginal(0))
    fresh = pf.Flow(pf.Chain([ActNorm(2)]))
    refuses(ValueError, "not set yet", lambda: fresh().marginal(0))
    assert not fresh.chain[0].initialized


@pytest.mark.full
def test_angles_count_over_one_turn():
    flow = pf.Flow(shake(pf.ncsf(3, hidden_dims=(8,), periodic=[True, True, False]), 0.15))
    density = flow()
    values = torch.tensor([[0.5], [-2.0], [0.5 + 2 * math.pi]])
    angle = (torch.arange(120) + 0.5) / 120 * 2 * math.pi - math.pi
    line = torch.linspace(-9, 9, 241)
    plane = torch.cartesian_prod(angle, line)
    cell = math.log(2 * math.pi / 120 * float(line[1] - line[0]))
    whole = torch.stack([torch.cat((v.expand(len(plane), 1), plane), 1) for v in values])
    true = density.log_prob(whole).logsumexp(-1) + cell
    value, error, _ = density.marginal(0, num_samples=10_000).estimate(values)
    assert ((value - true) / error).abs().max() < 4
    drawn = density.conditional(0, values[0], num_samples=10_000).sample((4000,))
    weights = density.log_prob(whole[0]).softmax(0)
    mean = weights @ torch.cat((plane[:, :1].cos(), plane[:, 1:]), 1)
    found = torch.cat((drawn[:, :1].cos(), drawn[:, 1:]), 1)
    assert ((found.mean(0) - mean) / found.std(0)).abs().max() < 0.1


@pytest.mark.full
def test_convolutional_made():
    made = scaled(shake(pf.ConvMADE((1, 3, 3), hidden_channels=4), 0.3), 1.0).eval()
    density = made()
    first, last = density.marginal([(0, 0, 0), (0, 0, 1)]), density.marginal([(0, 2, 2)])
    states = torch.cartesian_prod(*[torch.arange(2.0)] * 9)
    whole = density.log_prob(states.reshape(-1, 1, 3, 3)).exp().detach().reshape([2] * 9)
    pairs = torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0))
    torch.testing.assert_close(first.log_prob(pairs).exp(), whole.sum(tuple(range(2, 9))).flatten())
    assert first.exact and last.exact
    torch.testing.assert_close(last.log_prob(torch.tensor([[1.0]])).exp(), whole.sum(tuple(range(8)))[1:])
    drawn = density.conditional([(0, 0, 1)], [1.0]).sample((2000,))
    share = whole[:, 1].sum(tuple(range(1, 8)))[1] / whole[:, 1].sum()
    assert abs(drawn[:, 0].mean() - share) < 0.05


def test_provenance_passes():
    from pyro.ops.provenance import get_provenance, track_provenance

    density = pf.Flow(shake(pf.maf(3, order="identity", hidden_dims=(8,)), 0.2))()
    value = track_provenance(torch.zeros(2), frozenset({"y"}))
    assert get_provenance(density.marginal((0, 1)).log_prob(value)) == {"y"}
    given = density.conditional((0, 1), value)
    assert get_provenance(given.sample()) == {"y"} == get_provenance(given.log_prob(torch.zeros(1)))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_the_flow(dtype):
    torch.set_default_dtype(torch.float32 if dtype is torch.float64 else torch.float64)
    flow = pf.Flow(shake(pf.maf(3, hidden_dims=(8,)), 0.2)).to(dtype)
    y = flow.sample((4,))
    found = flow().marginal(1, num_samples=100)
    assert found.estimate(y[:, 1:2]).value.dtype == dtype == found.sample().dtype
    assert flow().conditional(1, [0.5]).sample((2,)).dtype == dtype == flow().mode.dtype


def test_random_numbers_go_on_as_before():
    density = rough()()
    found = density.marginal(1, num_samples=100)
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found.log_prob(torch.zeros(1))
    assert torch.equal(torch.rand(1), first)


@pytest.mark.full
def test_directions_have_no_marginals():
    density = pf.Flow(pf.sphere(3))()
    refuses(NotImplementedError, "on a sphere", density.marginal, 0)
    refuses(NotImplementedError, "on a sphere", density.conditional, 0, [0.5])
    torch.testing.assert_close(density.modes().points.norm(dim=-1), torch.ones(len(density.modes().points)))
    torch.testing.assert_close(density.entropy(), torch.tensor(4 * math.pi).log())
