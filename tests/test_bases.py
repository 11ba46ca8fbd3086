"""Bases to learn: closed forms, draws, and their life inside a ``Flow`` and a Pyro model."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import guide_of, reload, shake, train
from pyro.infer import SVI, Trace_ELBO

import pyro_flows as pf

DIM = 3
BASES = {
    "normal": lambda: pf.DiagonalNormal(DIM, learnable=True),
    "student": lambda: pf.StudentT(DIM),
    "student, fixed": lambda: pf.StudentT(DIM, df=3.0, learnable=False),
    "student, affine": lambda: pf.StudentT(DIM, df=2.0, learn_affine=True, min_df=0.5),
    "mixture": lambda: pf.GaussianMixture(DIM),
    "mixture, full": lambda: pf.GaussianMixture(DIM, num_components=2, full_covariance=True),
    "circle": lambda: pf.distributions.UniformCircle(DIM),
}
REPARAMETERISED = [name for name in BASES if not name.startswith("mixture")]
LEARNT = [name for name in BASES if name not in ("student, fixed", "circle")]


@pytest.fixture(params=BASES)
def name(request):
    return request.param


def made(name, dtype=torch.double):
    return shake(BASES[name]().to(dtype), 0.7)


def truth(base, value):
    """The log-density, written out."""
    if isinstance(base, pf.DiagonalNormal):
        z = (value - base.loc) * (-base.log_scale).exp()
        return (-0.5 * (z.square() + math.log(2 * math.pi)) - base.log_scale).sum(-1)
    if isinstance(base, pf.StudentT):
        scale = base.log_scale.exp()
        z = (value - base.loc) / scale
        density = torch.lgamma((base.df + 1) / 2) - torch.lgamma(base.df / 2) - 0.5 * torch.log(math.pi * base.df)
        density = density - scale.log() - (base.df + 1) / 2 * torch.log(1 + z**2 / base.df)
        return density.sum(-1)
    if isinstance(base, pf.GaussianMixture):
        total = torch.zeros(value.shape[:-1], dtype=value.dtype)
        weights = base.logits.exp() / base.logits.exp().sum()
        for k, weight in enumerate(weights):
            scale = base.log_scale[k].exp().diag()
            if base.lower is not None:
                scale = scale + base.lower[k].tril(-1)
            z = torch.linalg.solve(scale, (value - base.loc[k]).unsqueeze(-1)).squeeze(-1)
            norm = (2 * math.pi) ** (value.shape[-1] / 2) * torch.linalg.det(scale)
            total = total + weight * torch.exp(-0.5 * z.square().sum(-1)) / norm
        return total.log()
    return torch.full(value.shape[:-1], -value.shape[-1] * math.log(2 * math.pi), dtype=value.dtype)


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_density_is_the_closed_form(name, dtype, device, default_dtype):
    default_dtype(torch.double if dtype == torch.float else torch.float)
    base = made(name, dtype).to(device)
    exact = copy.deepcopy(base).double()
    for batch in ((), (7,), (2, 3)):
        value = 2 * torch.randn(*batch, DIM, dtype=dtype)
        got = base().log_prob(value)
        assert got.shape == batch and got.dtype == dtype and got.device.type == device.type
        rtol = 1e-10 if dtype == torch.double else 1e-4
        torch.testing.assert_close(got.double(), truth(exact, value.double()), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", LEARNT)
def test_gradients_are_those_of_the_closed_form(name):
    base, value = made(name), torch.randn(7, DIM, dtype=torch.double)
    parameters = list(base.parameters())
    got = torch.autograd.grad(base().log_prob(value).sum(), parameters)
    want = torch.autograd.grad(truth(base, value).sum(), parameters)
    for ours, theirs, (key, _) in zip(got, want, base.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=key)
        assert ours.abs().max() > 0


@pytest.mark.parametrize(
    "build",
    [
        lambda: pf.StudentT(2, 4.0, learn_affine=True),
        lambda: pf.GaussianMixture(2, 3),
        lambda: pf.GaussianMixture(2, 3, full_covariance=True),
    ],
    ids=["student", "mixture", "mixture, full"],
)
def test_draws_have_the_density(build):
    """The mass of unit squares, by draws and by the density on a grid."""
    base = shake(build().double(), 0.5)
    with torch.no_grad():
        draws = base().sample((100_000,))
        axis = (torch.arange(400).double() + 0.5) / 100 - 2
        density = base().log_prob(torch.cartesian_prod(axis, axis)).exp()
    mass = density.reshape(4, 100, 4, 100).sum((1, 3)) * 1e-4
    places = (draws[draws.abs().amax(-1) < 2] + 2).floor().long()
    counts = torch.bincount(4 * places[:, 0] + places[:, 1], minlength=16).reshape(4, 4)
    torch.testing.assert_close(counts / len(draws), mass.float(), rtol=0, atol=0.006)  # over four standard errors
    assert 0.3 < float(mass.sum()) < 1


def test_student_starts_where_it_is_told():
    for df, least in ((5.0, 1.0), (1.001, 1.0), (2.0, 0.0), (1e-3, 0.0), (300.0, 2.0)):
        for learnable in (False, True):
            base = pf.StudentT((2, 3), df, learnable, min_df=least).double()
            torch.testing.assert_close(base.df.detach(), torch.full((2, 3), df).double(), rtol=1e-4, atol=1e-6)
            assert (base.df > least).all()
            assert len(list(base.parameters())) == learnable
    with torch.no_grad():
        base.raw_df.fill_(-1e3)
        assert torch.equal(base.df, torch.full((2, 3), 2.0).double())
        base.raw_df.fill_(1e3)
        assert torch.equal(base.df, torch.full((2, 3), 1002.0).double())
    assert {key for key, _ in pf.StudentT(2, learn_affine=True).named_parameters()} == {"raw_df", "loc", "log_scale"}
    assert pf.StudentT((2, 3))().event_shape == (2, 3)


def test_student_draws_are_reparameterised_also_in_the_degrees_of_freedom():
    """Against the derivative of a moment: var = df / (df - 2) in each dimension."""
    base = pf.StudentT(1, df=12.0).double()
    draws = base().rsample((200_000,))
    (got,) = torch.autograd.grad(draws.square().mean(), base.raw_df)
    df = base.df
    (want,) = torch.autograd.grad((df / (df - 2)).sum(), base.raw_df)
    assert float(got) == pytest.approx(float(want), rel=0.2)


def test_student_fits_heavy_tails():
    data = dist.StudentT(torch.tensor([2.5, 30.0])).sample((4000,))
    flow = pf.Flow(pf.Permutation(2, [0, 1]), pf.StudentT(2, learn_affine=True))
    train(flow, data, 300, 0.05)
    df = flow.base.df.detach()
    assert 2.0 < df[0] < 3.2 and df[1] > 10


def test_mixture_starts_spread_and_by_the_seed():
    torch.manual_seed(5)
    first = pf.GaussianMixture(2, 1000)
    torch.manual_seed(5)
    second = pf.GaussianMixture(2, 1000, full_covariance=True)
    assert torch.equal(first.loc, second.loc)
    value = torch.randn(5, 2)
    torch.testing.assert_close(first().log_prob(value), second().log_prob(value))
    torch.testing.assert_close(first().mean.detach(), torch.zeros(2), rtol=0, atol=0.1)
    torch.testing.assert_close(first().variance.detach(), torch.ones(2), rtol=0.1, atol=0)
    assert torch.equal(first().mixture_distribution.probs, torch.full((1000,), 1e-3))


def test_mixture_finds_two_modes():
    data = torch.cat((torch.randn(500, 2) * 0.3 + 4, torch.randn(1500, 2) * 0.3 - 4))
    flow = pf.Flow(pf.Standardization(data.mean(0), data.std(0)), pf.GaussianMixture(2, 6, full_covariance=True))
    losses = train(flow, data, 300, 0.05)
    best = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.25, 0.75])),
        dist.Normal(torch.tensor([[4.0, 4.0], [-4.0, -4.0]]), 0.3).to_event(1),
    )
    assert losses[-1] < -float(best.log_prob(data).mean()) + 0.1
    draws = flow.sample((4000,))
    assert float((draws[:, 0] > 0).float().mean()) == pytest.approx(0.25, abs=0.05)


def test_mixture_never_reads_above_the_diagonal():
    base, value = made("mixture, full"), torch.randn(5, DIM).double()
    want = base().log_prob(value)
    with torch.no_grad():
        base.lower[:, torch.ones(DIM, DIM).triu() == 1] = math.nan
    torch.testing.assert_close(base().log_prob(value), want, rtol=0, atol=0)
    grad = torch.autograd.grad(base().log_prob(value).sum(), base.lower)[0]
    assert grad.isfinite().all() and (grad.triu() == 0).all()


def test_mixture_says_that_it_has_no_reparameterised_draws():
    flow = pf.Flow(pf.maf(DIM, hidden_dims=(8,)), base=pf.GaussianMixture(DIM))
    assert not flow().has_rsample and flow.sample((5,)).shape == (5, DIM)
    for call in (flow.rsample, flow.rsample_and_log_prob, flow.base().rsample, flow.base().expand((2,)).rsample):
        refuses(NotImplementedError, r"GaussianMixture: .*no reparameterized draws.*use .sample\(\)", call, (5,))


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_circle_is_uniform_over_one_turn(dtype):
    made = pf.distributions.UniformCircle(2).to(dtype)()
    draws = made.rsample((100_000,))
    assert draws.dtype == dtype and not draws.requires_grad
    assert (draws >= -torch.pi - 1e-6).all() and (draws <= torch.pi).all()
    counts = torch.stack([torch.histc(column, 10, -math.pi, math.pi) for column in draws.unbind(-1)])
    assert (counts / 1e4 - 1).abs().max() < 0.05
    # A density on the circle: everywhere the same, and 1 in all over one turn, wherever that begins.
    assert made.support.event_dim == 1 and made.support.check(torch.tensor([-50.0, 1e4]))
    for start in (-math.pi, 0.0, 17.0):
        turn = start + 2 * math.pi * torch.rand(5, 2, dtype=dtype)
        torch.testing.assert_close(made.log_prob(turn).exp() * (2 * math.pi) ** 2, torch.ones(5, dtype=dtype))
    value = torch.randn(3, 2, dtype=dtype).requires_grad_()
    assert torch.equal(torch.autograd.grad(made.log_prob(value).sum(), value)[0], torch.zeros(3, 2, dtype=dtype))
    assert made.log_prob(torch.tensor([math.nan, 0.0], dtype=dtype)).isnan()
    von_mises = dist.VonMises(torch.zeros(2).double(), 1e-12).to_event(1)
    torch.testing.assert_close(made.log_prob(turn).double(), von_mises.log_prob(turn.double()))


# Inside a flow


def flow_over(name, dtype=torch.double):
    return pf.Flow(shake(pf.maf(DIM, hidden_dims=(8,), num_layers=2), 0.2), base=made(name, torch.float)).to(dtype)


def test_flow_density_is_base_minus_ladj(name):
    flow = flow_over(name)
    x = torch.randn(7, DIM).double()
    y, ladj = flow.chain.forward_and_ladj(x)
    torch.testing.assert_close(flow.log_prob(y.detach()), truth(flow.base, x) - ladj)
    draws = flow.sample((2, 5))
    assert draws.shape == (2, 5, DIM) and draws.dtype == torch.double
    assert flow.log_prob(draws).shape == (2, 5) and flow.log_prob(draws[:0]).shape == (0, 5)
    loss = -flow.log_prob(draws).sum()
    assert all(g is not None for g in torch.autograd.grad(loss, list(flow.parameters())))


@pytest.mark.parametrize("name", REPARAMETERISED)
def test_flow_samples_and_scores(name):
    flow = flow_over(name)
    y, score = flow.rsample_and_log_prob((6,))
    torch.testing.assert_close(score, flow.log_prob(y.detach().clone()))
    assert flow().has_rsample and y.requires_grad
    torch.testing.assert_close(flow().log_prob(y), score)


def test_flow_expands(name):
    flow = flow_over(name)
    base = flow.base()
    assert base.batch_shape == () and base.event_shape == (DIM,) and base.support.event_dim == 1
    for wide in (base.expand((4,)), flow().expand((4,))):
        assert wide.batch_shape == (4,) and wide.event_shape == (DIM,)
        draws = wide.sample((2,))
        assert draws.shape == (2, 4, DIM) and len(draws.flatten(0, 1).unique(dim=0)) == 8
        assert wide.log_prob(draws).shape == (2, 4)
        torch.testing.assert_close(wide.log_prob(draws[0, 0]), wide.log_prob(draws[0, :1].expand(4, DIM)))


def test_state_comes_back(name):
    flow, other = flow_over(name), pf.Flow(pf.maf(DIM, hidden_dims=(8,), num_layers=2), base=BASES[name]()).double()
    reload(flow, other)
    y = torch.randn(6, DIM).double()
    assert torch.equal(other.log_prob(y), flow.log_prob(y))
    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(twin.log_prob(y), flow.log_prob(y))


def test_base_moves_with_the_flow(name):
    flow = pf.Flow(pf.maf(DIM, hidden_dims=(8,)), base=BASES[name]()).to("meta")
    assert flow.sample((5,)).is_meta and flow.base().log_prob(torch.empty(5, DIM, device="meta")).is_meta
    made = flow()
    made._validate_args = False  # it would ask for values
    assert made.log_prob(torch.empty(5, DIM, device="meta")).shape == (5,)


def test_pyro_model_scores_and_sees_the_parameters(name):
    flow, data = flow_over(name, torch.float), torch.randn(5, DIM)

    def model(data):
        pyro.module("flow", flow)
        with pyro.plate("data", 5):
            return pyro.sample("x", flow(), obs=data)

    trace = pyro.poutine.trace(model).get_trace(data)
    torch.testing.assert_close(trace.log_prob_sum(), flow.log_prob(data).sum())
    found = {node for node, site in trace.nodes.items() if site["type"] == "param"}
    assert found == {f"flow$$${key}" for key, _ in flow.named_parameters()}
    pyro.clear_param_store()
    assert model(None).shape == (5, DIM)


@pytest.mark.parametrize("name", ["student, affine", "mixture, full"])
def test_trains_as_a_guide(name):
    """A mixture by score-function gradients, which the ELBO chooses by itself."""

    def model():
        pyro.sample("z", dist.Normal(torch.tensor([1.0, -1.0, 0.0]), 0.7).to_event(1))

    flow = pf.Flow(pf.Standardization(torch.zeros(DIM), torch.ones(DIM)), base=BASES[name]())
    guide = guide_of(flow)
    elbo = Trace_ELBO(num_particles=64, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), elbo)
    losses = [svi.step() for _ in range(150)]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


@pytest.mark.full
def test_compile_log_prob(name):
    torch._dynamo.reset()
    base, value = made(name), torch.randn(5, DIM).double()
    score = torch.compile(lambda v: base().log_prob(v), backend="aot_eager")
    torch.testing.assert_close(score(value), base().log_prob(value))
    torch.testing.assert_close(torch.func.vmap(lambda v: base().log_prob(v))(value), base().log_prob(value))
    torch._dynamo.reset()


BAD = [
    (lambda: pf.StudentT(2, 1.0), "df > min_df >= 0, got df=1.0 and min_df=1.0"),
    (lambda: pf.StudentT(2, -3.0), "df > min_df >= 0, got df=-3.0"),
    (lambda: pf.StudentT(2, 3.0, min_df=-1.0), "min_df=-1.0"),
    (lambda: pf.StudentT(2, math.inf), "got df=inf"),
    (lambda: pf.StudentT(2, math.nan), "got df=nan"),
    (lambda: pf.StudentT(0), "positive integers"),
    (lambda: pf.GaussianMixture((2, 3)), r"input_dim to be an integer >= 1, got \(2, 3\)"),
    (lambda: pf.GaussianMixture(0), "GaussianMixture: expected input_dim"),
    (lambda: pf.GaussianMixture(2, 0), "num_components to be an integer >= 1, got 0"),
    (lambda: pf.GaussianMixture(2, 2.0), "num_components"),
    (lambda: pf.distributions.UniformCircle(-1), "expected input_dim or event_shape to be positive integers, got -1"),
    (lambda: pf.Flow(pf.maf(3), base=pf.distributions.UniformCircle(2)), r"event shape \(3,\).*event shape \(2,\)"),
]


@pytest.mark.parametrize("make, message", BAD, ids=[f"{k}-{m[:20]}" for k, (_, m) in enumerate(BAD)])
def test_refuses(make, message):
    refuses(ValueError, message, make)
