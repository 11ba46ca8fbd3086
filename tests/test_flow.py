"""``Flow``: a base and a chain as one module, and the densities that come out of it."""

import copy
import math
import pickle

import pyro.distributions as dist
import pytest
import torch
from asserts import refuses, scores_like
from cases import BUILDERS, diamond, full_but, reload, shake, train
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import nn

import pyro_flows as pf

EACH = [getattr(pf, case.name) for case in BUILDERS]
EACH_BUILDER = pytest.mark.parametrize("builder", EACH, ids=lambda builder: builder.__name__)
SOME_BUILDERS = pytest.mark.parametrize("builder", full_but(EACH, pf.maf, pf.nsf), ids=lambda builder: builder.__name__)


class Students(nn.Module):
    """A base with a parameter of its own: independent Student's t."""

    def __init__(self, size):
        super().__init__()
        self.log_df = nn.Parameter(torch.tensor(1.5))
        self.size = size

    def forward(self):
        df = 1.0 + self.log_df.exp()
        return dist.StudentT(df.expand(self.size)).to_event(1)


def bases(size, builder=None):
    """Bases by name; those of the line give way to angles where a builder wants these."""
    if builder is pf.ncsf:
        return dict.fromkeys(bases(size), pf.distributions.UniformCircle(size))
    return {
        "none": None,
        "distribution": dist.Normal(torch.full((size,), 0.5), torch.ones(size) * 2).to_event(1),
        "mixture": dist.MultivariateNormal(torch.zeros(size), torch.eye(size) * 0.5),
        "module": Students(size),
        "learnable": pf.DiagonalNormal(size, learnable=True),
    }


@pytest.mark.parametrize("base", list(bases(1)))
@EACH_BUILDER
def test_density_is_base_minus_ladj(builder, base, device):
    flow = pf.Flow(shake(builder(3, hidden_dims=(8,)), 0.1), bases(3, builder)[base]).to(device)
    x = torch.randn(7, 3, device=device)
    y, ladj = flow.chain.forward_and_ladj(x)
    torch.testing.assert_close(flow.log_prob(y.clone()), flow.base().log_prob(x) - ladj, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("base", list(bases(1)))
def test_conversion_moves_the_base(base, device, default_dtype):
    flow = pf.Flow(shake(pf.maf(3, hidden_dims=(8,), num_layers=2)), bases(3)[base]).to(device)
    y = flow.sample((5,))
    want = flow.log_prob(y)
    flow.double()
    sample = flow.sample((5,))
    assert sample.dtype == torch.float64 and sample.device.type == device.type
    got = flow.log_prob(y.double())
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), want, rtol=1e-4, atol=1e-4)
    assert flow.rsample_and_log_prob((5,))[1].dtype == torch.float64


@pytest.mark.parametrize("base", ["none", "distribution", "learnable"])
def test_meta_device_takes_the_base_along(base):
    flow = pf.Flow(pf.realnvp(3, hidden_dims=(8,), num_layers=2), bases(3)[base]).to("meta")
    made = flow.base()
    x = torch.empty(5, 3, device="meta")
    assert flow.chain(x).device.type == "meta"
    assert made.mean.device.type == "meta"


def test_default_base_takes_the_chains_dtype(default_dtype):
    chain = pf.maf(3, hidden_dims=(8,)).double()
    assert pf.Flow(chain).sample((4,)).dtype == torch.float64


@pytest.mark.parametrize("base", list(bases(1)))
def test_states_copies_and_pickles(base):
    flow, other = (pf.Flow(shake(pf.iaf(3, hidden_dims=(8,), order="random")), bases(3)[base]) for _ in range(2))
    shake(flow.base, 0.3)
    y = torch.randn(6, 3)
    assert not torch.equal(flow.log_prob(y), other.log_prob(y))
    reload(flow, other)
    assert torch.equal(flow.log_prob(y), other.log_prob(y))
    flow = pf.Flow(shake(pf.maf(3, hidden_dims=(8,)), 0.2), bases(3)[base]).double()
    y = flow.rsample((6,))
    want = flow.log_prob(y)
    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        torch.testing.assert_close(twin.log_prob(y.detach()), want, rtol=1e-8, atol=1e-8)


def test_freezing_reaches_chain_and_base():
    flow = pf.Flow(pf.maf(3, hidden_dims=(8,)), pf.DiagonalNormal(3, learnable=True)).requires_grad_(False)
    assert not flow.log_prob(torch.randn(4, 3)).requires_grad
    assert not flow.rsample((4,)).requires_grad
    flow.requires_grad_(True)
    loss = flow.log_prob(torch.randn(4, 3)).sum()
    grads = torch.autograd.grad(loss, list(flow.base.parameters()))
    assert all((g != 0).all() for g in grads)


@pytest.mark.parametrize("of_context", [(), (1,), (4,), (3, 1), (3, 4)], ids=str)
@pytest.mark.parametrize("event_shape", [3, (2, 2)], ids=str)
@EACH_BUILDER
def test_shapes_with_contexts(builder, event_shape, of_context):
    flow = pf.Flow(shake(builder(event_shape, context_dim=2, hidden_dims=(8,)), 0.2))
    event = torch.Size((event_shape,)) if isinstance(event_shape, int) else torch.Size(event_shape)
    context = torch.randn(*of_context, 2)
    batch = torch.Size(of_context)
    while len(batch) and batch[0] == 1:
        batch = batch[1:]
    made = flow(context)
    assert made.batch_shape == batch and made.event_shape == event
    for sample_shape in ((), (5,), (2, 5)):
        y = flow.sample(sample_shape, context)
        assert y.shape == torch.Size(sample_shape) + batch + event and not y.requires_grad
        assert flow.log_prob(y, context).shape == torch.Size(sample_shape) + batch
        y, score = flow.rsample_and_log_prob(sample_shape, context)
        assert y.requires_grad and score.shape == torch.Size(sample_shape) + batch
        assert flow.rsample(sample_shape, context).shape == y.shape


def test_value_broadcasts_against_contexts():
    flow = pf.Flow(shake(pf.maf(3, context_dim=2, hidden_dims=(8,)).double()))
    value, contexts = torch.randn(3).double(), torch.randn(4, 2).double()
    want = torch.stack([flow.log_prob(value, context) for context in contexts])
    torch.testing.assert_close(flow.log_prob(value, contexts), want, rtol=1e-10, atol=1e-10)
    many = torch.randn(6, 1, 3).double()
    assert flow.log_prob(many, contexts).shape == (6, 4)


def test_each_context_has_its_own_samples():
    flow = pf.Flow(pf.realnvp(2, context_dim=1, hidden_dims=(8,)))
    y = flow.sample((), torch.zeros(1000, 1))
    assert len(torch.unique(y[:, 0])) > 990
    shake(flow, 0.3)
    contexts = torch.tensor([[-2.0], [2.0]])
    means = flow.sample((4000,), contexts).mean(0)
    assert (means[0] - means[1]).abs().max() > 0.1


WILD = {"nsf": 0.1, "ncsf": 0.2}  # how far a sum over a grid can follow them: splines have the sharpest corners


def mass(flow, context=None):
    """The integral of a 2-D density, on a grid that is fine near the origin and coarse in the tails."""
    with torch.no_grad():
        if flow.chain.periodic is not None:  # over one turn; the sum over a period is exact but for sharp peaks
            axis = (torch.arange(1000, dtype=torch.float64) / 500 - 1) * math.pi
            density = flow.log_prob(torch.cartesian_prod(axis, axis), context).exp()
            return float(density.mean()) * (2 * math.pi) ** 2
        reach = 4 * float(flow.sample((20_000,), context).abs().max())
        edge = math.asinh(reach)
        axis = torch.linspace(-edge, edge, 701, dtype=torch.float64)
        points, cells = torch.cartesian_prod(axis.sinh(), axis.sinh()), torch.cartesian_prod(axis.cosh(), axis.cosh())
        density = flow.log_prob(points, context).exp()
    return float((density * cells.prod(-1)).sum()) * float(axis[1] - axis[0]) ** 2


@pytest.mark.parametrize("inverse", [False, True], ids=["", "inverse"])
@SOME_BUILDERS
def test_density_integrates_to_one(builder, inverse):
    chain = shake(builder(2, hidden_dims=(8,), num_layers=2), WILD.get(builder.__name__, 0.4))
    assert mass(pf.Flow(chain.inv if inverse else chain).double()) == pytest.approx(1.0, abs=1e-3)


@SOME_BUILDERS
def test_density_with_context_integrates_to_one(builder):
    scale = WILD.get(builder.__name__, 0.4)
    flow = pf.Flow(shake(builder(2, context_dim=2, hidden_dims=(8,), num_layers=2), scale)).double()
    assert mass(flow, torch.tensor([1.0, -0.5]).double()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("base", ["none", "learnable"])
@SOME_BUILDERS
def test_mass_of_a_ball_by_density_equals_that_by_sampling(builder, base):
    # A sign error in ladj passes a round trip and is seen here.
    flow = pf.Flow(shake(builder(2, hidden_dims=(8,), num_layers=2).double(), 0.3), bases(2, builder)[base]).double()
    shake(flow.base, 0.3)
    with torch.no_grad():
        samples = flow.sample((100_000,))
        centre = samples.mean(0)
        distance = (samples - centre).norm(dim=-1)
        radius = float(distance.median())
        sampled = float((distance < radius).double().mean())
        axis = torch.linspace(-radius, radius, 801, dtype=torch.float64)
        points, cell = torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2
        inside = points.norm(dim=-1) < radius
        by_density = float((flow.log_prob(points + centre).exp() * inside).sum()) * cell
    assert by_density == pytest.approx(sampled, abs=0.01)  # six standard errors


def linear_gaussian(fast, order):
    """Two autoregressive layers without hidden layers and without scales that depend on x: an affine map."""
    layers = []
    for k in range(2):
        layer = pf.Autoregressive(3, fast=fast, hidden_dims=(), order=("identity", order)[k])
        shake(layer, 0.7)
        with torch.no_grad():
            layer.net.weight_0[3:].zero_()  # rows of the log-scales: constants only
        layers.append(layer)
    return pf.Chain(layers).double()


@pytest.mark.parametrize("fast", ["density", "sampling"])
@pytest.mark.parametrize("order", ["identity", "reverse"])
def test_linear_flow_of_a_normal_is_a_multivariate_normal(fast, order):
    flow = pf.Flow(linear_gaussian(fast, order))
    zero = torch.zeros(3).double()
    with torch.no_grad():
        loc = flow.chain(zero)
        scale = torch.stack([flow.chain(row) - loc for row in torch.eye(3).double()], -1)
    assert scale.tril(-1).abs().sum() > 0.1 or scale.triu(1).abs().sum() > 0.1
    truth = dist.MultivariateNormal(loc, scale @ scale.T)
    scores_like(flow, truth)
    samples = flow.sample((40_000,))
    torch.testing.assert_close(samples.mean(0), loc, rtol=0, atol=0.05 * float(scale.norm()))
    torch.testing.assert_close(samples.T.cov(), scale @ scale.T, rtol=0, atol=0.05 * float(scale.norm()) ** 2)


@pytest.mark.parametrize("context_dim", [0, 2])
@EACH_BUILDER
def test_score_of_a_sample_is_its_density(builder, context_dim):
    flow = pf.Flow(shake(builder(3, context_dim=context_dim, hidden_dims=(8,)).double(), 0.2)).double()
    context = torch.randn(4, 2).double() if context_dim else None
    y, score = flow.rsample_and_log_prob((5,), context)
    torch.testing.assert_close(score, flow.log_prob(y.detach().clone(), context), rtol=1e-8, atol=1e-8)
    params = [p for p in flow.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y.sum() + score.sum(), params, allow_unused=True)
    assert any(g is not None and g.abs().sum() > 0 for g in grads)


def test_own_sample_is_scored_with_the_right_gradient():
    flow = pf.Flow(shake(pf.iaf(3, hidden_dims=(8,)).double(), 0.3))
    params = [p for p in flow.parameters() if p.requires_grad]
    torch.manual_seed(5)
    y, score = flow.rsample_and_log_prob((6,))
    want = torch.autograd.grad((score + y.sum(-1)).sum(), params, allow_unused=True)
    torch.manual_seed(5)
    made = flow()
    y = made.rsample((6,))
    got = torch.autograd.grad((made.log_prob(y) + y.sum(-1)).sum(), params, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        if b is None:
            assert a is None or (a == 0).all()
        else:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_learnable_base_trains_to_the_data():
    data = torch.randn(2000, 2) * torch.tensor([0.3, 2.0]) + torch.tensor([4.0, -1.0])
    flow = pf.Flow(pf.Permutation(2, "reverse"), pf.DiagonalNormal(2, learnable=True))
    train(flow, data, 150, 0.1)
    base = flow.base()
    torch.testing.assert_close(base.mean, data.mean(0).flip(0), rtol=0, atol=0.05)
    torch.testing.assert_close(base.stddev, data.std(0).flip(0), rtol=0.05, atol=0.02)


@SOME_BUILDERS
def test_training_approaches_the_entropy(builder):
    truth = dist.MultivariateNormal(torch.tensor([1.0, -2.0]), torch.tensor([[1.0, 0.9], [0.9, 1.2]]))
    flow = pf.Flow(builder(2, hidden_dims=(16,), num_layers=2))
    losses = train(flow, truth.sample((1000,)), 150, 0.02)
    assert losses[-1] < float(truth.entropy()) + 0.15
    standard = pf.Flow(pf.Permutation(2))
    assert losses[-1] < float(-standard.log_prob(truth.sample((1000,))).mean()) - 0.5


def test_distribution_expands_and_knows_its_support():
    flow = pf.Flow([pf.maf(3, hidden_dims=(8,)), torch.distributions.ExpTransform()])
    made = flow()
    assert made.support.event_dim == 1 and made.support.check(flow.sample((4,))).all()
    assert made.has_rsample
    wide = made.expand((5,))
    assert wide.batch_shape == (5,) and wide.sample((2,)).shape == (2, 5, 3)
    assert wide.log_prob(wide.sample()).shape == (5,)


def test_refuses_fixed_bases_that_want_gradients():
    loc = torch.zeros(3, requires_grad=True)
    for base in (dist.Normal(loc, torch.ones(3)).to_event(1), dist.MultivariateNormal(loc, torch.eye(3))):
        refuses(ValueError, r"must be a module.*learnable=True", pf.Flow, pf.maf(3), base)


BAD = [
    (lambda: pf.Flow(pf.maf(3), dist.Normal(torch.zeros(3), 1.0)), r"call .to_event\(\) on it"),
    (lambda: pf.Flow(pf.maf(3), dist.Normal(torch.zeros(4), 1.0).to_event(1)), r"shape \(3,\).*shape \(4,\)"),
    (lambda: pf.Flow(pf.maf(3), pf.DiagonalNormal((1, 3))), r"event shape \(3,\).*event shape \(1, 3\)"),
    (lambda: pf.Flow(pf.maf(3, context_dim=2))(), r"context_dim=2: call it with a context"),
    (lambda: pf.Flow(pf.maf(3, context_dim=2)).log_prob(torch.zeros(3)), "context_dim=2"),
    (lambda: pf.Flow(pf.maf(3))(torch.zeros(2)), "context_dim=0"),
    (lambda: pf.Flow(pf.maf(3)).log_prob(torch.zeros(4)), "last dimension 3|Value is not broadcastable|event"),
]


@pytest.mark.parametrize("make, message", BAD, ids=[message[:30] for _, message in BAD])
def test_refuses(make, message):
    refuses(ValueError, message, make)


def test_refuses_a_base_that_is_neither_distribution_nor_module():
    refuses(TypeError, "base to be a distribution or a module, got function", pf.Flow, pf.maf(3), lambda: None)


def test_fresh_flow_is_its_base():
    for case in BUILDERS:
        y = torch.randn(5, 3)
        want = -0.5 * y.square().sum(-1) - 1.5 * math.log(2 * math.pi)
        if case.angles:
            want = torch.full((5,), -3 * math.log(2 * math.pi))
        torch.testing.assert_close(pf.Flow(getattr(pf, case.name)(3)).log_prob(y), want)


def test_adjacency_makes_independent_dimensions_independent():
    # In diamond(), dimensions 0 and 3 are independent given 2: the mixed derivative of the log-density is zero.
    flow = pf.Flow(shake(pf.Autoregressive(4, adjacency=diamond(), hidden_dims=(16,), fast="density").double()))
    y = torch.randn(4).double()
    marginal = lambda v: flow.base().base_dist.log_prob(flow.chain.inv(v))[torch.tensor([0, 2, 3])].sum()  # noqa: E731
    hessian = torch.autograd.functional.hessian(marginal, y)
    assert hessian[0, 3] == 0 and hessian[0, 2] != 0 and hessian[3, 2] != 0


@pytest.mark.parametrize("name", ["maf", "iaf", "nsf", "realnvp", "nice"])
def test_marks_of_trace_graph_elbo_leave_gradients_alone(name):
    """Pyro marks what depends on a draw by a subclass of tensors; results are marked, gradients those of plain ones."""
    torch.manual_seed(0)
    flow = pf.Flow(getattr(pf, name)(3, context_dim=2, num_layers=2, hidden_dims=(8,))).double()
    shake(flow, 0.3)
    parameters = list(flow.parameters())
    context = torch.randn(4, 2, dtype=torch.float64)
    value = torch.randn(5, 4, 3, dtype=torch.float64)

    def gradients(result):
        total = detach_provenance(result).square().sum()
        return torch.autograd.grad(total, parameters, allow_unused=True)

    def draws(at):
        torch.manual_seed(1)
        return flow.rsample((2, 3), at)

    marked = track_provenance(context, frozenset({"z"}))
    for made, plain, marks in (
        (flow.log_prob(track_provenance(value, frozenset({"x"})), context), flow.log_prob(value, context), {"x"}),
        (flow.log_prob(value, marked), flow.log_prob(value, context), {"z"}),
        (draws(marked), draws(context), {"z"}),
    ):
        assert get_provenance(made) == marks
        assert torch.equal(detach_provenance(made), plain)
        found = gradients(made)
        for ours, theirs in zip(found, gradients(plain), strict=True):
            assert ours is None if theirs is None else torch.equal(ours, theirs)
        assert any(g is not None and g.abs().sum() > 0 for g in found)
