"""Heads: densities against torch's and Pyro's, totals of 1, gradients, draws, dimensions apart, and hostile input."""

import copy
import math
import pickle

import mpmath
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from torch.distributions import biject_to, constraints

from pyro_flows.distributions.made.composed import DistributionHead, MixedHead, as_head
from pyro_flows.distributions.made.head import Head
from pyro_flows.distributions.made.heads import (
    BernoulliHead,
    CategoricalHead,
    LogisticMixtureHead,
    MixtureHead,
    NormalHead,
    RelaxedBernoulliHead,
)

DIM, LEVELS, CLASSES = 4, 9, [3, 1, 5, 2]


def mixed():
    return MixedHead([(NormalHead(), [2]), (CategoricalHead([3, 4]), [3, 0]), (DistributionHead(dist.Poisson), [1])])


def mixed_discrete():
    return MixedHead({"bernoulli": [1, 3], CategoricalHead(4): [0], LogisticMixtureHead(LEVELS, 2): [2]})


BUILDS = {
    "bernoulli": BernoulliHead,
    "categorical": lambda: CategoricalHead(5),
    "categorical, two": lambda: CategoricalHead(2),
    "categorical, uneven": lambda: CategoricalHead(CLASSES),
    "logistic": lambda: LogisticMixtureHead(LEVELS, 3),
    "logistic, two levels": lambda: LogisticMixtureHead(2, 1),
    "poisson": lambda: DistributionHead(dist.Poisson),
    "geometric": lambda: DistributionHead(dist.Geometric),
    "negative binomial": lambda: DistributionHead(dist.NegativeBinomial),
    "binomial": lambda: DistributionHead(dist.Binomial, fixed={"total_count": torch.tensor([3, 1, 7, 4])}),
    "zero-inflated": lambda: DistributionHead(dist.ZeroInflatedPoisson),
    "mixed, discrete": mixed_discrete,
    "normal": NormalHead,
    "mixture": lambda: MixtureHead(3),
    "relaxed": lambda: RelaxedBernoulliHead(0.7),
    "gamma": lambda: DistributionHead(dist.Gamma),
    "student": lambda: DistributionHead(dist.StudentT, ["loc", "scale"], fixed={"df": 4.0}),
    "beta": lambda: DistributionHead(dist.Beta),
    "function": lambda: DistributionHead(
        lambda rate: dist.Exponential(2 * rate, validate_args=False), {"rate": constraints.positive}
    ),
    "mixed": mixed,
}
DISCRETE = list(BUILDS)[: list(BUILDS).index("normal")]
ALIKE = [name for name in BUILDS if name not in ("categorical, uneven", "binomial", "mixed", "mixed, discrete")]
ENDS = {  # of the line between which a continuous one has all its mass, or nearly
    "normal": (-60, 60),
    "mixture": (-60, 60),
    "relaxed": (0, 1),
    "gamma": (0, 80),
    "student": (-300, 300),
    "beta": (0, 1),
    "function": (0, 200),
}


@pytest.fixture(params=BUILDS)
def name(request):
    return request.param


def build(name, dtype=torch.double):
    return BUILDS[name]().bind(DIM).to(dtype)


def numbers(head, *batch, scale=1.0, dtype=torch.double):
    return scale * torch.randn(*batch, DIM, head.num_params, dtype=dtype)


def mixture(logits, parts):
    return dist.MixtureSameFamily(dist.Categorical(logits=logits), parts)


def truth(name, params, dim=0):
    """A distribution of torch's or Pyro's for one dimension, from parameters of shape ``(*, num_params)``."""
    if name == "mixed":
        own = {0: ("categorical", 4), 1: ("poisson", 1), 2: ("normal", 2), 3: ("categorical", 3)}[dim]
        return truth(own[0], params[..., : own[1]])
    if name == "mixed, discrete":
        own = {0: ("categorical", 4), 1: ("bernoulli", 1), 2: ("logistic", 6), 3: ("bernoulli", 1)}[dim]
        return truth(own[0], params[..., : own[1]])
    if name == "logistic, two levels":
        middle, raw = (params[..., 1] + 1) / 2, params[..., 2]
        return dist.Bernoulli(logits=(middle - 0.5) / (0.5 * torch.exp(7 * torch.tanh(raw / 7))))
    p = params.unbind(-1)
    if name == "mixture":
        logits, loc, raw = params.chunk(3, -1)
        return mixture(logits, dist.Normal(loc, torch.exp(5 * torch.tanh(raw / 5))))
    return {
        "bernoulli": lambda: dist.Bernoulli(logits=p[0]),
        "categorical": lambda: dist.Categorical(logits=params),
        "categorical, two": lambda: dist.Categorical(logits=params),
        "categorical, uneven": lambda: dist.Categorical(logits=params[..., : CLASSES[dim]]),
        "logistic": lambda: Cut(params),
        "poisson": lambda: dist.Poisson(p[0].exp()),
        "geometric": lambda: dist.Geometric(probs=p[0].sigmoid()),
        "negative binomial": lambda: dist.NegativeBinomial(p[0].exp(), probs=p[1].sigmoid()),
        "binomial": lambda: dist.Binomial([3, 1, 7, 4][dim], probs=p[0].sigmoid()),
        "zero-inflated": lambda: dist.ZeroInflatedPoisson(p[0].exp(), gate=p[1].sigmoid()),
        "normal": lambda: dist.Normal(p[0], torch.exp(5 * torch.tanh(p[1] / 5))),
        "relaxed": lambda: dist.RelaxedBernoulli(params.new_tensor(0.7), logits=p[0]),
        "gamma": lambda: dist.Gamma(p[0].exp(), p[1].exp()),
        "student": lambda: dist.StudentT(4.0, p[0], p[1].exp()),
        "beta": lambda: dist.Beta(p[0].exp(), p[1].exp()),
        "function": lambda: dist.Exponential(2 * p[0].exp()),
    }[name]()


class Cut:
    """Logistics rounded to levels, as the formula says."""

    def __init__(self, params):
        self.logits, self.loc, raw = params.chunk(3, -1)
        self.scale = torch.exp(7 * torch.tanh(raw / 7))

    def log_prob(self, value):
        half = (LEVELS - 1) / 2
        value = value.unsqueeze(-1)
        above = torch.sigmoid(((value + 0.5) / half - 1 - self.loc) / self.scale)
        below = torch.sigmoid(((value - 0.5) / half - 1 - self.loc) / self.scale)
        above, below = torch.where(value == LEVELS - 1, 1.0, above), torch.where(value == 0, 0.0, below)
        return (torch.softmax(self.logits, -1) * (above - below)).sum(-1).log()

    def sample(self):
        half = (LEVELS - 1) / 2
        which = dist.Categorical(logits=self.logits).sample().unsqueeze(-1)
        loc, scale = self.loc.gather(-1, which).squeeze(-1), self.scale.gather(-1, which).squeeze(-1)
        return ((loc + scale * torch.rand_like(loc).logit() + 1) * half).round().clamp(0, LEVELS - 1)


def values(name, params):
    """From the true distributions, dimension by dimension."""
    drawn = torch.stack([truth(name, params[..., d, :], d).sample().to(params.dtype) for d in range(DIM)], -1)
    return drawn.clamp(1e-4, 1 - 1e-4) if name == "relaxed" else drawn


def states(name, dim=0):
    """All values of a discrete dimension, or as many as matter."""
    inner = {
        "mixed, discrete": {0: "four", 1: "bernoulli", 2: "logistic", 3: "bernoulli"}.get(dim),
        "mixed": {0: "four", 1: "poisson", 3: "three"}.get(dim),
    }.get(name, name)
    counts = {"bernoulli": 2, "categorical": 5, "categorical, two": 2, "logistic": LEVELS, "logistic, two levels": 2}
    counts |= {"four": 4, "three": 3, "categorical, uneven": CLASSES[dim], "binomial": [4, 2, 8, 5][dim]}
    return torch.arange(counts.get(inner, 3000)).double()


# Densities.


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_density_is_that_of_the_distribution(name, dtype, device, default_dtype):
    default_dtype(torch.double if dtype == torch.float else torch.float)
    head = build(name, dtype).to(device)
    for batch in ((), (50,), (2, 3)):
        params = numbers(head, *batch, dtype=dtype)
        value = values(name, params.double()).to(dtype)
        got = head.log_prob(value.to(device), params.to(device))
        assert got.shape == (*batch, DIM) and got.dtype == dtype and got.device.type == device.type
        exact = value.double()
        want = [truth(name, params[..., d, :].double(), d).log_prob(exact[..., d]) for d in range(DIM)]
        rtol = 1e-9 if dtype == torch.double else 2e-4
        torch.testing.assert_close(got.double(), torch.stack(want, -1), rtol=rtol, atol=rtol)
        coded = head.features(value.to(device))
        assert coded.shape == (*batch, DIM, head.num_features) and coded.dtype == dtype
        assert head.sample(params.to(device)).dtype == dtype
        if name != "relaxed":
            assert head.mean(params.to(device)).dtype == dtype


@pytest.mark.parametrize("scale", [0.5, 3.0, 40.0])
@pytest.mark.parametrize("name", DISCRETE)
def test_masses_add_up_to_one(name, scale):
    head = build(name)
    open_ended = name in ("poisson", "geometric", "negative binomial", "zero-inflated")
    if open_ended and scale > 1:
        pytest.skip("too many states")
    params = numbers(head, 40, scale=scale)
    for dim in range(DIM):
        every = states(name, dim)
        logp = head.log_prob(every[:, None, None], params[:, dim : dim + 1], torch.tensor([dim]))
        total = logp.exp().sum(0)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


@pytest.mark.parametrize("levels", [2, 3, 256, 65536])
def test_levels_add_up_to_one_at_the_bounds(levels):
    head = LogisticMixtureHead(levels, 2).bind(1).double()
    every = torch.arange(levels).double()[:, None]
    for raw in (-1e3, -20.0, -3.0, 0.0, 5.0, 1e3):
        for loc in (-1e3, -1.0, -0.99, 1 / 3, 1.0, 1.001, 30.0):
            params = torch.tensor([[1e3, -1e3, loc, loc, raw, raw]]).double()
            assert float(head.log_prob(every, params).exp().sum()) == pytest.approx(1, abs=1e-12), (raw, loc)


@pytest.mark.parametrize("name", ENDS)
def test_densities_integrate_to_one(name):
    head, (low, high) = build(name), ENDS[name]
    params = numbers(head, 5, scale=0.5)
    # By a substitution with all derivatives zero at the ends, where densities may be infinite.
    t = torch.linspace(-4.2, 4.2, 50_001, dtype=torch.double)
    s = torch.sigmoid(math.pi * torch.sinh(t))
    x = low + (high - low) * s
    weight = (high - low) * s * torch.sigmoid(-math.pi * torch.sinh(t)) * math.pi * torch.cosh(t) * (t[1] - t[0])
    keep = (x > low) & (x < high)
    x, weight = torch.where(keep, x, 0.5 * (low + high)), torch.where(keep, weight, 0.0)
    logp = head.log_prob(x[:, None, None].expand(-1, 5, DIM), params)
    total = (logp.exp() * weight[:, None, None]).sum(0)
    # Student's t with 4 degrees of freedom has up to 1e-7 of its mass further out than 300.
    rough = {"relaxed": 1e-5, "beta": 1e-4, "student": 1e-7}.get(name, 1e-9)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=rough)


def test_gradients(name):
    head = build(name)
    params = numbers(head, 3)
    value = values(name, params)
    params.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: head.log_prob(value, p), params)
    if name != "relaxed":
        assert torch.autograd.gradcheck(lambda p: head.mean(p), params)
    if name in ("normal", "mixture", "relaxed", "gamma", "student"):
        value = value.clamp(min=0.1) if name == "gamma" else value
        assert torch.autograd.gradcheck(lambda x: head.log_prob(x, params.detach()), value.requires_grad_())


def test_parameters_in_excess_are_ignored():
    for name, dim, used in (("categorical, uneven", 3, 2), ("mixed", 1, 1), ("mixed", 2, 2), ("mixed", 3, 3)):
        head = build(name)
        params = numbers(head, 6)
        value = values(name, params)
        other = params.clone()
        other[:, dim, used:] = torch.tensor([math.nan, math.inf, -1e9, 1e9]).double()[: head.num_params - used]
        torch.testing.assert_close(head.log_prob(value, other), head.log_prob(value, params), rtol=0, atol=0)
        params.requires_grad_()
        (grad,) = torch.autograd.grad(head.log_prob(value, params).sum(), params)
        assert (grad[:, dim, used:] == 0).all() and (grad[:, dim, :used] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_bernoulli_tails(dtype):
    logits = torch.tensor([-100.0, -40, -17, -5, -1e-3, 0, 1e-3, 5, 17, 40, 100], dtype=dtype)
    for x in (0.0, 1.0):
        got = BernoulliHead().bind(1).log_prob(torch.full((11, 1), x, dtype=dtype), logits[:, None, None]).squeeze()
        want = [-float(mpmath.log1p(mpmath.exp((1 - 2 * x) * float(v)))) for v in logits]
        rtol = 1e-14 if dtype == torch.double else 1e-6
        torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.double), rtol=rtol, atol=5e-45)


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_level_tails_are_right_to_most_digits(dtype):
    """Against many digits, from the middle of the mass to thousands of scales away."""
    head = LogisticMixtureHead(256, 1).bind(1).to(dtype)
    for raw in (-30.0, -6.0, -1.0, 2.0, 30.0):
        for loc in (-4.0, -1.0, 0.125, 1.5):
            params = torch.tensor([[0.0, loc, raw]], dtype=dtype, requires_grad=True)
            levels = torch.tensor([0.0, 1, 60, 143, 144, 254, 255], dtype=dtype)
            got = head.log_prob(levels[:, None], params)
            (grad,) = torch.autograd.grad(got.sum(), params)
            assert grad.isfinite().all() and got.isfinite().all()
            bound = head.max_log_scale
            scale = 127.5 * math.exp(bound * math.tanh(raw / bound))
            want = [_log_level(int(k), 127.5 * (loc + 1), scale) for k in levels]
            rtol = 1e-11 if dtype == torch.double else 2e-5
            torch.testing.assert_close(
                got.detach().squeeze(-1).double(), torch.tensor(want, dtype=torch.double), rtol=rtol, atol=rtol
            )


def _log_level(k, loc, scale):
    """With as many digits as the difference takes."""
    with mpmath.workdps(30 + int(0.44 * (abs(k - loc) + 1) / scale)):
        low, high = (mpmath.mpf(k) - 0.5 - loc) / scale, (mpmath.mpf(k) + 0.5 - loc) / scale
        above = mpmath.mpf(1) if k == 255 else 1 / (1 + mpmath.exp(-high))
        below = mpmath.mpf(0) if k == 0 else 1 / (1 + mpmath.exp(-low))
        return float(mpmath.log(above - below))


def test_mean_is_the_expectation():
    for name in ("bernoulli", "categorical", "categorical, uneven", "logistic", "binomial", "mixed, discrete"):
        head = build(name)
        params = numbers(head, 7)
        got = head.mean(params)
        for dim in range(DIM):
            every = states(name, dim)
            mass = head.log_prob(every[:, None, None], params[:, dim : dim + 1], torch.tensor([dim])).exp()
            torch.testing.assert_close(got[:, dim], (mass.squeeze(-1) * every[:, None]).sum(0))
    params = numbers(build("mixture"), 7)
    torch.testing.assert_close(build("mixture").mean(params), truth("mixture", params).mean)
    torch.testing.assert_close(build("normal").mean(params[..., :2]), params[..., 0])


# Draws.


def by_sample(head, params, dim, count):
    """Of one dimension."""
    return head.sample(params[dim].expand(count, 1, -1), torch.tensor([dim])).squeeze(-1)


def by_engine(head, params, dim, count):
    """Of the last but one of three dimensions that are drawn at once, in buffers."""
    dims = torch.tensor([(dim + 1) % DIM, dim, (dim + 3) % DIM])
    z, x = torch.rand(2, 3, count, dtype=params.dtype)
    coded = torch.full((3 * head.num_features, count), math.nan, dtype=params.dtype)
    buffer = torch.full((3, head.num_params, count), math.nan, dtype=params.dtype)
    calls = head.draws(dims, z, buffer, x.fill_(math.nan), coded)
    buffer.copy_(params[dims].unsqueeze(-1))
    for _ in range(2):  # a second time by fresh noise, on the same buffers
        z.copy_(torch.rand_like(z))
        for call in calls:
            call()
    want = head.features(x.T, dims).flatten(-2).T
    torch.testing.assert_close(coded, want)
    assert torch.equal(buffer, params[dims].unsqueeze(-1).expand_as(buffer))
    assert head.inside(x.T, dims).all() or not head.discrete
    return x[1]


@pytest.mark.parametrize("draw", [by_sample, by_engine])
def test_draws_have_the_density(name, draw):
    """Chi-squared of the counts, by state or by interval between quantiles of the truth's own draws."""
    count = 20_000
    head = build(name, torch.float)
    params = numbers(head, dtype=torch.float, scale=0.8)
    for dim in range(DIM):
        drawn = draw(head, params, dim, count)
        own = truth(name, params[dim].double(), dim)
        discrete = name in DISCRETE or (name == "mixed" and dim != 2)
        if discrete:
            every = states(name, dim)
            mass = own.log_prob(every).exp()
            seen = torch.bincount(drawn.long(), minlength=len(every)).double()
        else:
            whole = own.expand((400_000,)).sample().sort().values
            bounds = whole[20_000::20_000][:19].contiguous()
            mass = torch.full((20,), 0.05).double()
            place = torch.searchsorted(bounds, drawn.double())
            seen = torch.bincount(place, minlength=20).double()
        expected = mass * count
        some = expected > 5
        rest = (expected[~some].sum(), seen[~some].sum())
        statistic = ((seen - expected)[some] ** 2 / expected[some]).sum()
        freedom = int(some.sum()) - 1
        assert abs(rest[1] - rest[0]) < 8 * (float(rest[0]) + 1) ** 0.5
        assert statistic < freedom + 6 * (2 * freedom) ** 0.5 + 6, (dim, float(statistic), freedom)


@pytest.mark.parametrize("name", ["bernoulli", "normal", "mixture", "gamma", "relaxed"])
def test_features_that_are_the_value_may_share_its_memory(name):
    head = build(name)
    params = numbers(head).unsqueeze(-1).expand(-1, -1, 2000).contiguous()
    z, x = torch.rand(2, DIM, 2000).double()
    for call in head.draws(torch.arange(DIM), z, params, x, x):
        call()
    assert head.inside(x.T).all()
    if name != "relaxed":
        torch.testing.assert_close(x.mean(-1), head.mean(params.permute(2, 0, 1))[0], rtol=0.2, atol=0.3)


def test_certain_draws():
    """At probabilities that round to 0 and 1, never the impossible one."""
    head = BernoulliHead().bind(2)
    drawn = head.sample(torch.tensor([-math.inf, math.inf]).unsqueeze(-1).expand(10_000, 2, 1))
    assert (drawn == torch.tensor([0.0, 1.0])).all() and not drawn[:, 0].signbit().any()
    head = CategoricalHead(4).bind(1)
    for sure in range(4):
        logits = torch.full((10_000, 1, 4), -math.inf).index_fill(-1, torch.tensor(sure), 0.0)
        assert (head.sample(logits) == sure).all()
        x, coded = torch.empty(1, 10_000), torch.empty(4, 10_000)
        for edge in (0.0, 1 - 2**-24):
            for call in head.draws(torch.tensor([0]), torch.full((1, 10_000), edge), logits.permute(1, 2, 0), x, coded):
                call()
            assert (x == sure).all() and (coded.argmax(0) == sure).all() and (coded.sum(0) == 1).all()


@pytest.mark.parametrize("name", [n for n in BUILDS if BUILDS[n]().bind(DIM).has_rsample])
def test_reparameterised_draws_are_differentiable(name):
    """The gradient of an average against that of the mean."""
    head = build(name)
    params = numbers(head, scale=0.3).requires_grad_()
    drawn = head.rsample(params.expand(40_000, -1, -1))
    assert drawn.requires_grad
    if name == "relaxed":
        return
    (got,) = torch.autograd.grad(drawn.mean(0).sum(), params)
    (want,) = torch.autograd.grad(head.mean(params).sum(), params)
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)
    assert not head.sample(params).requires_grad


def test_draws_without_a_gradient_say_so(name):
    head = build(name)
    params = numbers(head).requires_grad_()
    assert not head.sample(params).requires_grad
    if not head.has_rsample:
        refuses(NotImplementedError, "no reparameterized draws", head.rsample, params)


# Dimensions apart.


def test_dimensions_apart_are_slices_of_the_whole(name):
    head = build(name)
    params = numbers(head, 6)
    value = values(name, params)
    for dims in ([0], [3], [2, 0], [3, 2, 1, 0], [1, 3, 3]):
        at = torch.tensor(dims)
        some, own = value[:, dims], params[:, dims]
        torch.testing.assert_close(head.log_prob(some, own, at), head.log_prob(value, params)[:, dims])
        assert torch.equal(head.features(some, at), head.features(value)[:, dims])
        assert torch.equal(head.inside(some, at), head.inside(value)[:, dims])
        if name != "relaxed":
            torch.testing.assert_close(head.mean(own, at), head.mean(params)[:, dims])
        drawn = head.sample(own, at)
        assert drawn.shape == some.shape
        if head.has_rsample:
            assert head.rsample(own, at).shape == some.shape


def test_values_may_be_integers_or_booleans(default_dtype):
    default_dtype(torch.double)
    for name in DISCRETE:
        head = build(name, torch.float)
        params = numbers(head, 6, dtype=torch.float)
        value = values(name, params.double()).float()
        assert torch.equal(head.log_prob(value.long(), params), head.log_prob(value, params))
        assert torch.equal(head.features(value.long()), head.features(value))
        assert head.features(value.long()).dtype == torch.float
        head.check(value.long())
    head = build("bernoulli", torch.float)
    value = torch.rand(5, DIM) < 0.5
    params = numbers(head, 5, dtype=torch.float)
    assert torch.equal(head.log_prob(value, params), head.log_prob(value.float(), params))
    head.check(value)


def test_what_goes_into_the_network():
    head = CategoricalHead([3, 1, 4]).bind(3)
    got = head.features(torch.tensor([2.0, 0.0, 3.0]))
    assert got.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    head = LogisticMixtureHead(256).bind(3)
    assert head.features(torch.tensor([0.0, 127.5, 255.0])).flatten().tolist() == [-1, 0, 1]
    head = DistributionHead(dist.Poisson).bind(2)
    torch.testing.assert_close(head.features(torch.tensor([0.0, 7.0])), torch.tensor([[0.0], [math.log(8)]]))
    assert DistributionHead(dist.Bernoulli).bind(2).features(torch.tensor([0.0, 1.0])).flatten().tolist() == [0, 1]
    assert DistributionHead(dist.Gamma).bind(1).features(torch.tensor([7.0])).tolist() == [[7]]
    got = build("mixed", torch.float).features(torch.tensor([3.0, 7.0, -2.0, 1.0]))
    want = torch.tensor([[0, 0, 0, 1.0], [math.log(8), 0, 0, 0], [-2, 0, 0, 0], [0, 1, 0, 0]])
    torch.testing.assert_close(got, want)


# NaN, and what is outside.


def test_nan_goes_through(name):
    head = build(name)
    params = numbers(head, 3)
    value = values(name, params)
    assert head.log_prob(value, params).isfinite().all()
    wrong = value.clone()
    wrong[1, 2] = math.nan
    got = head.log_prob(wrong, params)
    assert got[1, 2].isnan() and got.isfinite().sum() == 3 * DIM - 1
    assert head.features(wrong)[1, 2].isnan().any() and not head.features(value).isnan().any()
    refuses(ValueError, "in dimension 2, got nan", head.check, wrong)
    broken = params.clone()
    broken[1, 2] = math.nan
    got = head.log_prob(value, broken)
    assert got[1, 2].isnan() and got.isfinite().sum() == 3 * DIM - 1


@pytest.mark.parametrize("name", ["bernoulli", "categorical", "categorical, uneven", "logistic", "normal", "mixture"])
def test_draws_under_nan_are_nan(name):
    head = build(name)
    params = numbers(head, 5)
    params[:, 2] = math.nan
    assert torch.equal(head.sample(params).isnan()[0], torch.arange(DIM) == 2)
    x, coded = torch.empty(DIM, 5).double(), torch.empty(DIM * head.num_features, 5).double()
    z = torch.rand(DIM, 5).double()
    for call in head.draws(torch.arange(DIM), z, params.permute(1, 2, 0).contiguous(), x, coded):
        call()
    assert torch.equal(x.isnan()[:, 0], torch.arange(DIM) == 2)


@pytest.mark.parametrize(
    ("name", "dim", "wrong", "words"),
    [
        ("bernoulli", 1, 0.5, "BernoulliHead: expected 0 or 1 in dimension 1, got 0.5"),
        ("bernoulli", 3, -1.0, "0 or 1 in dimension 3, got -1"),
        ("categorical", 0, 5.0, "categories 0 to 4 in dimension 0, got 5"),
        ("categorical", 0, -1.0, "got -1"),
        ("categorical, uneven", 1, 1.0, "categories 0 to 0 in dimension 1, got 1"),
        ("categorical, uneven", 3, 2.0, "categories 0 to 1 in dimension 3, got 2"),
        ("categorical, uneven", 2, 1.5, "categories 0 to 4 in dimension 2, got 1.5"),
        ("logistic", 2, 9.0, "level, 0 to 8, in dimension 2, got 9"),
        ("logistic", 2, 0.25, "got 0.25"),
        ("poisson", 0, -1.0, "support of Poisson in dimension 0, got -1"),
        ("gamma", 2, -3.0, "support of Gamma in dimension 2, got -3"),
        ("binomial", 1, 2.0, "support of Binomial in dimension 1, got 2"),
        ("relaxed", 1, 1.0, "strictly between 0 and 1 in dimension 1, got 1"),
        ("mixed", 3, 3.0, "MixedHead: expected one of the categories 0 to 2 in dimension 3, got 3"),
        ("mixed", 0, 4.0, "categories 0 to 3 in dimension 0, got 4"),
        ("mixed", 1, 0.5, "support of Poisson in dimension 1, got 0.5"),
        ("mixed", 2, math.nan, "a number in dimension 2, got nan"),
    ],
)
def test_values_outside_are_named(name, dim, wrong, words):
    head = build(name)
    value = values(name, numbers(head, 2, 3))
    if name == "binomial":
        value = value.clamp(max=1)
    head.check(value)
    head.check(value[:0])
    ok = head.support((DIM,)).check(value)
    assert ok.shape == (2, 3) and ok.all()
    value[1, 1, dim] = wrong
    refuses(ValueError, words, head.check, value)
    if name != "relaxed":  # whose support is closed, as Pyro's
        assert (~head.support((DIM,)).check(value)).nonzero().tolist() == [[1, 1]]
    refuses(ValueError, "last dimension 4, got shape", head.check, value[..., :2])
    if name == "mixed" and dim == 1:
        assert head.inside(value).sum() == 2 * 3 * DIM - 1


def test_nan_goes_through_where_the_distribution_has_a_number():
    assert dist.HalfNormal(1.0, validate_args=False).log_prob(torch.tensor(math.nan)) == -math.inf
    head = DistributionHead(dist.HalfNormal).bind(2)
    assert head.log_prob(torch.tensor([math.nan, 1.0]), torch.zeros(2, 1)).isnan().tolist() == [True, False]


def test_values_outside_have_no_mass():
    head = build("categorical, uneven")
    params = numbers(head)
    for wrong in (-1.0, 7.0, 0.5):
        assert (head.log_prob(torch.full((DIM,), wrong).double(), params) == -math.inf).all()
    assert head.log_prob(torch.ones(DIM).double(), params)[1] == -math.inf


def test_supports(name):
    head = build(name)
    value = values(name, numbers(head, 5))
    for event in ((DIM,), (1, 2, 2)):
        support = head.support(event)
        assert isinstance(support, constraints.Constraint) and support.event_dim == len(event)
        assert support.is_discrete == (head.discrete or name == "mixed")
        assert support.check(value.reshape(5, *event)).shape == (5,)
        assert support.check(value.reshape(5, *event)).all()
    assert repr(support)
    if head.constraint is not None and not head.discrete:
        assert biject_to(head.support((DIM,)))(torch.randn(5, DIM)).shape == (5, DIM)


# Where training starts.


def test_biases_start_at_the_marginals(name):
    head = build(name)
    plain = head.bias()
    assert plain.shape == (DIM, head.num_params) and plain.dtype == torch.double and plain.isfinite().all()
    data = values(name, numbers(head).expand(500, -1, -1))
    fitted = head.bias(data)
    assert fitted.shape == plain.shape and fitted.dtype == torch.double and fitted.isfinite().all()
    assert head.bias(data.float()).dtype == torch.double and build(name, torch.float).bias(data).dtype == torch.float
    gain = head.log_prob(data, fitted).mean() - head.log_prob(data, plain).mean()
    assert gain >= 0
    learns = ("bernoulli", "categorical", "logistic", "normal", "mixture", "mixed")
    assert (gain > 0.01) == name.startswith(learns)
    constant = data[:1].expand(3, -1)
    assert head.bias(constant).isfinite().all()
    for wrong in (data[0], data[:, :2], data[:0]):
        refuses(ValueError, r"expected data of shape \(N, 4\)", head.bias, wrong)


def test_biases_are_the_right_ones():
    data = torch.tensor([[0.0, 2], [1, 2], [1, 0]])
    got = BernoulliHead().bind(1).bias(data[:, :1])
    torch.testing.assert_close(got, torch.tensor([[math.log(2.5 / 1.5)]]))
    got = CategoricalHead([2, 3]).bind(2).bias(data)
    want = torch.tensor([[math.log(1.5 / 4), math.log(2.5 / 4), 0.0]])
    torch.testing.assert_close(got[:1], want)
    torch.testing.assert_close(got[1].exp() * 4.5, torch.tensor([1.5, 0.5, 2.5]))
    assert torch.equal(CategoricalHead([2, 3]).bind(2).bias(data.long()), got)
    data = 3 + 0.5 * torch.randn(20_000, 1).double()
    for head in (NormalHead().bind(1).double(), MixtureHead(6).bind(1).double()):
        drawn = head.sample(head.bias(data).expand(20_000, -1, -1))
        assert float(drawn.mean()) == pytest.approx(3, abs=0.02) and float(drawn.std()) == pytest.approx(0.5, abs=0.02)
        drawn = head.sample(head.bias().expand(20_000, -1, -1))
        assert float(drawn.mean()) == pytest.approx(0, abs=0.04) and float(drawn.std()) == pytest.approx(1, abs=0.04)


# Relaxed forms.


def test_relaxed_heads():
    head = BernoulliHead().bind(3).relaxed(0.5)
    assert isinstance(head, RelaxedBernoulliHead) and head.input_dim == 3 and head.temperature == 0.5
    assert BernoulliHead().relaxed(0.5).bind(2).input_dim == 2
    for other in (LogisticMixtureHead(), MixtureHead(), DistributionHead(dist.Poisson), NormalHead()):
        refuses(NotImplementedError, f"{type(other).__name__} has no relaxed form", other.relaxed, 0.5)
    refuses(NotImplementedError, "relaxed_features", CategoricalHead(3).relaxed, 0.5)
    for wrong in (0, -1.0, math.nan, math.inf):
        refuses(ValueError, "temperature > 0", RelaxedBernoulliHead, wrong)
        refuses(ValueError, "temperature > 0", CategoricalHead(3).bind(1).relaxed_features, torch.zeros(1, 3), wrong)
    mixed = MixedHead({"bernoulli": [0, 2], "normal": [1]}).bind(3)
    soft = mixed.relaxed(0.3)
    assert soft.has_rsample and not mixed.has_rsample and soft.input_dim == 3 and not soft.discrete
    drawn = soft.rsample(torch.zeros(100, 3, 2))
    assert soft.inside(drawn).all() and (drawn[:, 1] < 0).any()


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_relaxed_draws_tend_to_the_binary_ones(dtype):
    logits = torch.tensor([-30.0, -1.0, 0.0, 2.0, 30.0], dtype=dtype)[:, None, None].expand(-1, 4000, 1)
    for temperature in (0.01, 0.5, 5.0):
        head = RelaxedBernoulliHead(temperature).bind(1).to(dtype)
        logits = logits.detach().requires_grad_()
        drawn = head.rsample(logits.unsqueeze(-2)).squeeze(-1)
        assert head.inside(drawn).all()
        above = (drawn > 0.5).to(dtype).mean(-1)
        torch.testing.assert_close(above, torch.sigmoid(logits[:, 0, 0]), rtol=0, atol=0.04)
        density = head.log_prob(drawn.unsqueeze(-1), logits.unsqueeze(-2))
        (grad,) = torch.autograd.grad(density.sum(), logits)
        assert density.isfinite().all() and grad.isfinite().all()


def test_relaxed_features_are_soft_one_hots():
    head = build("categorical, uneven")
    params = numbers(head).expand(20_000, -1, -1).clone().requires_grad_()
    soft = head.relaxed_features(params, 0.5)
    assert soft.shape == (20_000, DIM, 5)
    torch.testing.assert_close(soft.sum(-1), torch.ones(20_000, DIM).double())
    assert (soft[:, 1, 1:] == 0).all() and (soft[:, 3, 2:] == 0).all()
    (grad,) = torch.autograd.grad((soft * torch.arange(5)).sum(), params)
    assert grad.isfinite().all() and (grad[:, 0, :3] != 0).all() and (grad[:, 3, 2:] == 0).all()
    # The largest one is a draw of the category.
    for dim, count in enumerate(CLASSES):
        seen = torch.bincount(soft[:, dim].argmax(-1), minlength=5)[:count].double() / 20_000
        want = torch.softmax(params[0, dim, :count], -1).detach()
        torch.testing.assert_close(seen, want, rtol=0, atol=0.02)
    hard = head.relaxed_features(params[:10], 0.5, hard=True)
    assert ((hard.detach().round() - hard.detach()).abs() < 1e-12).all()
    (grad,) = torch.autograd.grad((hard * torch.arange(5)).sum(), params)
    assert (grad[:10, 0, :3] != 0).all()
    apart = head.relaxed_features(params[:, [3]], 1.0, torch.tensor([3]))
    assert apart.shape == (20_000, 1, 5) and (apart[..., 2:] == 0).all()


# Making them.


def test_binding(name):
    loose = BUILDS[name]()
    if not isinstance(loose, MixedHead):
        refuses(RuntimeError, r"head.bind\(input_dim\)", loose.bias)
    head = loose.bind(DIM)
    assert head is not loose and head.input_dim == DIM and head.bind(DIM) is head
    assert not list(head.parameters()) and not head.state_dict()
    for wrong in (0, -1, 2.0, True, "3", None):
        refuses(ValueError, "input_dim to be an integer >= 1", head.bind, wrong)
    if name in ALIKE:
        assert head.bind(7).bias().shape == (7, head.num_params)
    else:
        refuses(ValueError, r"5 dimensions|shape \(5,\)", head.bind, 5)


def test_names():
    for name, kind in (
        ("bernoulli", BernoulliHead),
        ("normal", NormalHead),
        ("mixture", MixtureHead),
        ("logistic", LogisticMixtureHead),
    ):
        head = as_head(name, 3)
        assert type(head) is kind and head.input_dim == 3
    loose = CategoricalHead([2, 3])
    assert as_head(loose, 2).input_dim == 2
    for wrong, words in (
        ("gauss", "'bernoulli', 'logistic', 'mixture', 'normal' or a head, got"),
        ("categorical", "num_classes"),
    ):
        refuses(ValueError, words, as_head, wrong, 3)
    refuses(TypeError, "expected a head", as_head, dist.Gamma, 3)
    refuses(ValueError, "one number for each of the 3 dimensions, got 2", as_head, loose, 3)


@pytest.mark.parametrize("wrong", [0, 1, -2, True, [], [1, 1], [3, 0], [3, 2.0], [True, 3]])
def test_numbers_of_classes_must_make_sense(wrong):
    refuses(ValueError, "expected num_classes", CategoricalHead, wrong)


def test_sizes_and_bounds_must_make_sense():
    for build in (MixtureHead, lambda n: LogisticMixtureHead(256, n)):
        for wrong in (0, 2.5, True):
            refuses(ValueError, "num_components to be an integer >= 1", build, wrong)
    for wrong in (1, 2.0, None):
        refuses(ValueError, "levels to be an integer >= 2", LogisticMixtureHead, wrong)
    for wrong in (0.0, -1.0, math.inf, math.nan):
        for build in (NormalHead, lambda c: MixtureHead(2, c), lambda c: LogisticMixtureHead(8, 2, c)):
            refuses(ValueError, "max_log_scale > 0", build, wrong)


def test_distributions_that_do_not_fit_say_why():
    for wrong in (3, "gamma", lambda rate: None):
        refuses(TypeError, "expected a class of distributions", DistributionHead, wrong)
    for kind in (dist.Categorical, dist.Dirichlet, dist.MultivariateNormal):
        refuses(ValueError, "vector; take CategoricalHead", DistributionHead, kind)
    refuses(ValueError, "constraints of Uniform's arguments depend on one another", DistributionHead, dist.Uniform)
    with pytest.raises(ValueError, match="no real number can be mapped; fix it by fixed="):
        DistributionHead(dist.Binomial, ["total_count"])
    refuses(ValueError, "support of Pareto depends on learned arguments", DistributionHead, dist.Pareto)
    refuses(ValueError, r"Gamma has no arguments \['shape'\]", DistributionHead, dist.Gamma, ["shape"])
    refuses(ValueError, "without an argument to learn", DistributionHead, dist.Poisson, fixed={"rate": 1.0})
    with pytest.raises(ValueError, match="distribution of single numbers"):
        DistributionHead(lambda loc: dist.Normal(loc, 1).to_event(1), {"loc": constraints.real})
    pareto = DistributionHead(dist.Pareto, fixed={"scale": 2.0}).bind(3)
    assert pareto.num_params == 1 and not pareto.inside(torch.tensor([1.0, 2.5, 3.0]))[0]
    assert DistributionHead(dist.Geometric).arguments == ("logits",)
    assert DistributionHead(dist.Geometric, ["probs"]).arguments == ("probs",)


@pytest.mark.parametrize(
    "heads",
    [
        [],
        [("bernoulli", [0, 1]), ("normal", [1])],
        [("bernoulli", [0, 1]), ("normal", [3])],
        [("bernoulli", [0, 1]), ("normal", [])],
        [("bernoulli", [-1, 0])],
    ],
)
def test_mixed_dimensions_must_be_a_partition(heads):
    refuses(ValueError, "each dimension from 0 on with exactly one head", MixedHead, heads)


def test_mixed_heads_check_their_parts():
    with pytest.raises(ValueError, match="one number for each of the 1 dimensions, got 2"):
        MixedHead([(CategoricalHead([2, 3]), [0]), ("normal", [1])])
    refuses(ValueError, "'bernoulli', 'logistic'", MixedHead, [("gauss", [0])])
    inner = MixedHead([("bernoulli", [1]), (CategoricalHead(3), [0])])
    head = MixedHead([(inner, [2, 0]), ("normal", [1])]).bind(3)
    assert head.num_params == 3 and not head.discrete and head.support((3,)).is_discrete
    head.check(torch.tensor([1.0, -0.3, 2.0]))
    refuses(ValueError, "0 or 1 in dimension 0, got 2", head.check, torch.tensor([2.0, -0.3, 2.0]))


def test_a_head_must_define_what_it_is():
    class Empty(Head):
        pass

    head = Empty().bind(2)
    for call in (lambda: head.log_prob(None, None), lambda: head.sample(torch.zeros(2, 1)), lambda: head.inside(None)):
        refuses(TypeError, "Empty must define", call)
    refuses(NotImplementedError, "Empty has no mean", head.mean, None)


# Life as a module.


def test_copies_and_pickles(name):
    head = build(name)
    params = numbers(head, 4)
    value = values(name, params)
    again = [copy.deepcopy(head)]
    if name != "function":
        again.append(pickle.loads(pickle.dumps(head)))
    for other in again:
        assert torch.equal(other.log_prob(value, params), head.log_prob(value, params))
        assert other.input_dim == DIM and repr(other) == repr(head)


@pytest.mark.parametrize("name", [*list(BUILDS)[:6], "mixed, discrete", "normal", "mixture", "relaxed"])
def test_compiled_batched_and_differentiated(name):
    head = build(name)
    params = numbers(head, 5)
    value = values(name, params)
    want = head.log_prob(value, params)
    compiled = torch.compile(head.log_prob, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(value, params), want)
    torch.testing.assert_close(torch.func.vmap(head.log_prob)(value, params), want)
    torch.testing.assert_close(torch.func.vmap(head.features)(value), head.features(value))
    jacobian = torch.func.jacrev(lambda p: head.log_prob(value[0], p).sum())(params[0])
    exact = params[0].clone().requires_grad_()
    (want,) = torch.autograd.grad(head.log_prob(value[0], exact).sum(), exact)
    torch.testing.assert_close(jacobian, want)
