"""The joint density over packed latents: against Pyro's traces, all at once against one at a time, and fall-backs."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import seeded
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroSample
from torch.distributions import biject_to

from pyro_flows.infer.models.joint import JointDensity
from pyro_flows.infer.models.prototype import initializer, inspect

pytestmark = pytest.mark.usefixtures("double")


def joint(model, *args, vectorize=None, **kwargs):
    _, latents = inspect(model, initializer(None, args, kwargs), args, kwargs)
    return JointDensity(model, latents, args, kwargs, vectorize)


def by_trace(density, row):
    """Pyro's own log density at one point, with Jacobians from each site's bijection."""
    values = density.latents.draws(row)
    with poutine.block():
        trace = poutine.trace(poutine.condition(density.model, data=values)).get_trace(*density.args, **density.kwargs)
    total = trace.log_prob_sum()
    for site in density.latents:
        transform = biject_to(trace.nodes[site.name]["fn"].support)
        free = transform.inv(values[site.name])
        total = total + transform.log_abs_det_jacobian(free, values[site.name]).sum()
    return total


def scalar():
    pyro.sample("x", dist.Normal(0.3, 2.0))


def supports():
    concentration = pyro.sample("concentration", dist.Gamma(2.0, 1.0))
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    corr = pyro.sample("corr", dist.LKJCholesky(3, 2.0))
    cuts = pyro.sample("cuts", dist.ImproperUniform(constraints.ordered_vector, (), (3,)))
    level = pyro.sample("level", dist.ImproperUniform(constraints.interval(-1.0, 2.0), (), ()))
    scale = pyro.sample("scale", dist.ImproperUniform(constraints.lower_cholesky, (), (2, 2)))
    precision = pyro.sample("precision", dist.ImproperUniform(constraints.positive_definite, (), (2, 2)))
    pyro.factor("well behaved", -scale.square().sum((-1, -2)) - precision.diagonal(dim1=-2, dim2=-1).sum(-1))
    data = torch.randn(6, 3, generator=seeded(1), dtype=torch.float64)
    spread = concentration.unsqueeze(-1).unsqueeze(-1) * corr
    with pyro.plate("rows", 6):
        pyro.sample("y", dist.MultivariateNormal((p + cuts) * level.unsqueeze(-1), scale_tril=spread), obs=data)


def plates(x, y):
    a = pyro.sample("a", dist.Normal(0, 1))
    with pyro.plate("outer", 3, dim=-2):
        b = pyro.sample("b", dist.Normal(a, 1.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        with pyro.plate("inner", 4, dim=-1):
            w = pyro.sample("w", dist.Normal(b.unsqueeze(-1), 1.0).expand((*b.shape[:-1], 4, 2)).to_event(1))
            pyro.sample("y", dist.Normal((w * x).sum(-1), s), obs=y)


def weighted(mask, y):
    a = pyro.sample("a", dist.Exponential(1.0))
    with pyro.plate("rows", 5), poutine.scale(scale=2.5):
        b = pyro.sample("b", dist.Normal(0, a))
        with poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(b, 1.0), obs=y)
    pyro.deterministic("twice", 2 * b)


def undeclared(y):
    """Batch dimensions without a plate."""
    a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0))
    pyro.sample("y", dist.Normal(a.sum(-1, keepdim=True), 1.0), obs=y)


MODELS = {
    "scalar": (scalar, ()),
    "supports": (supports, ()),
    "plates": (plates, (torch.linspace(-1, 1, 24).reshape(3, 4, 2), torch.linspace(0, 2, 12).reshape(3, 4))),
    "weighted": (weighted, (torch.tensor([True, False, True, True, False]), torch.arange(5.0))),
    "undeclared": (undeclared, (torch.arange(7.0),)),
    "observed plate only": (weighted, (torch.tensor(True), torch.arange(5.0))),
}


@pytest.mark.parametrize("name", MODELS)
def test_density(name):
    """Equal to Pyro's trace, one at a time and all at once, with its gradient."""
    model, args = MODELS[name]
    density = joint(model, *args)
    z = torch.randn(4, density.latents.dim)
    expected = torch.stack([by_trace(density, row) for row in z])
    assert expected.isfinite().all()
    torch.testing.assert_close(density(z), expected, rtol=1e-10, atol=1e-10)
    assert density.vectorized and density.why_not is None and density.evaluations == 4
    alone = joint(model, *args, vectorize=False)
    torch.testing.assert_close(alone(z), expected, rtol=1e-10, atol=1e-10)
    for rows in (z[:1], z[:3], torch.randn(17, density.latents.dim)):
        torch.testing.assert_close(density(rows), alone(rows), rtol=1e-10, atol=1e-10)
    assert density(z[:0]).shape == (0,) and alone(z[:0]).shape == (0,)
    z.requires_grad_()
    (together,) = torch.autograd.grad(density(z).sum(), z)
    (one_by_one,) = torch.autograd.grad(alone(z).sum(), z)
    torch.testing.assert_close(together, one_by_one, rtol=1e-9, atol=1e-9)


def test_sites_add_up():
    density = joint(weighted, *MODELS["weighted"][1])
    row = torch.randn(density.latents.dim)
    parts = density.sites(row)
    assert {"a", "b", "y"} <= set(parts)
    torch.testing.assert_close(sum(parts.values()) + density.latents.unpack(row)[1], density(row[None])[0])


@pytest.mark.full
def test_subsampled_likelihood_is_scaled():
    """One minibatch for all draws, scaled as in an ELBO, and unbiased."""
    y = torch.randn(6)

    def model():
        a = pyro.sample("a", dist.Normal(0, 1))
        with pyro.plate("rows", 6, subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(a, 1), obs=y[rows])

    density = joint(model)
    z = torch.linspace(-1, 1, 3)[:, None]
    mean = torch.stack([density(z) for _ in range(3000)])
    whole = dist.Normal(0, 1).log_prob(z[:, 0]) + dist.Normal(z, 1).log_prob(y).sum(-1)
    assert ((mean.mean(0) - whole).abs() < 4 * mean.std(0) / 3000**0.5).all() and (mean.std(0) > 0.1).all()
    assert density.random_at(z[0])
    still = density.still()
    torch.testing.assert_close(still(z), still(z), rtol=0, atol=0)
    before = torch.get_rng_state()
    still(z)
    assert torch.equal(before, torch.get_rng_state())


def quiet(density, z):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return density(z)


def raises_for_many(y):
    a = pyro.sample("a", dist.Normal(0, 1))
    if a > 10:
        raise RuntimeError
    pyro.sample("y", dist.Normal(a.item(), 1.0), obs=y)


def mixes_draws(y):
    """Silent: the mean over what it takes to be the only dimension."""
    a = pyro.sample("a", dist.Normal(0, 1).expand([3]).to_event(1))
    pyro.sample("y", dist.Normal(a.mean(), 1.0), obs=y)


def pairs_draws_with_columns():
    """Silent where there are as many draws as columns."""
    a = pyro.sample("a", dist.Normal(0, 1))
    x = torch.tensor([1.0, -3.0])
    pyro.sample("y", dist.Normal(a * x, 1.0).to_event(1), obs=torch.zeros(2))


def sums_the_batch(y):
    a = pyro.sample("a", dist.Normal(0, 1))
    pyro.factor("prior", -(a**4).sum())


@pytest.mark.parametrize("model", [raises_for_many, mixes_draws, pairs_draws_with_columns, sums_the_batch])
def test_falls_back_once(model):
    args = () if model is pairs_draws_with_columns else (torch.tensor(0.5),)
    density = joint(model, *args)
    z = torch.randn(5, density.latents.dim)
    with pytest.warns(UserWarning, match="does not broadcast") as caught:
        found = density(z)
    assert len(caught) == 1 and not density.vectorized and density.why_not
    torch.testing.assert_close(found, torch.stack([by_trace(density, row) for row in z]))
    torch.testing.assert_close(quiet(density, z), found)


def regression(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ b), obs=y)


def process(x, y):
    length, size = (pyro.sample(name, dist.LogNormal(0.0, 1.0)) for name in ("length", "size"))
    kernel = size**2 * torch.exp(-((x[:, None] - x) ** 2) / length**2) + 0.1 * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), kernel), obs=y)


def correlated(x, y):
    root = pyro.sample("root", dist.LKJCholesky(3, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0).expand([3]).to_event(1))
    with pyro.plate("rows", len(y)), poutine.scale(scale=2.0), poutine.mask(mask=y > 0):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=torch.diag(scale) @ root), obs=x)


def in_turns(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    for i in pyro.plate("rows", 2):
        pyro.sample(f"y{i}", dist.Poisson(b[i].exp()), obs=y[i])


def part_of_rows(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(y), subsample=torch.tensor([1, 4, 5])) as rows:
        pyro.sample("y", dist.Bernoulli(logits=(x @ b)[rows]), obs=y[rows])


class Weighted(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](3, 2)
        self.linear.weight = PyroSample(lambda self: dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))

    def forward(self, x, y):
        mean = torch.tanh(self.linear(x)).sum(-1)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@pytest.mark.filterwarnings("ignore:this model does not broadcast")  # of a model, the first time only
@pytest.mark.parametrize(
    "model", [regression, process, correlated, in_turns, part_of_rows, Weighted()], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_draws_by_vmap(model, dtype, monkeypatch):
    """Values and gradients of models that do not broadcast, against single runs, without a run of the model."""
    if isinstance(model, torch.nn.Module):
        model.to(dtype)
    torch.set_default_dtype(dtype)  # which the fixture restores
    x = torch.randn(6, 3, generator=seeded(1))
    y = (x[:, 0] > 0).to(dtype)
    density = joint(model, x if model is not process else x[:, 0], y)
    z = torch.randn(7, density.latents.dim, requires_grad=True)
    found = density(z)
    assert density.recorded.batches and not density.vectorized and "torch.vmap runs them" in density.why_not
    expected = torch.stack([density._alone(row) for row in z])
    torch.testing.assert_close(found, expected)
    slopes = (torch.autograd.grad(total.sum(), z)[0] for total in (found, expected))
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)
    runs: list[object] = []
    monkeypatch.setattr(density, "sites_at", lambda values, run=density.sites_at: runs.append(values) or run(values))
    torch.testing.assert_close(quiet(density, z), expected)
    assert len(runs) == 0


@pytest.mark.filterwarnings("ignore:this model does not broadcast")
@pytest.mark.parametrize("checked", [True, False])
def test_vmap_heeds_constraints(checked):
    """Where single runs raise, the density is NaN, and the other draws keep their gradients."""

    def model():
        p = pyro.sample("p", dist.Uniform(-1.0, 2.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Bernoulli(probs=p[0] * torch.ones(3)).to_event(1), obs=torch.ones(3))

    with pyro.validation_enabled(checked):
        density = joint(model)
        z = torch.tensor([[0.1, -0.2], [3.0, 0.0], [0.0, 0.5]], requires_grad=True)
        found = density(z)
        assert density.recorded.batches and found.isnan().tolist() == [False, checked, False]
        (slope,) = torch.autograd.grad(found.nansum(), z)
        assert slope.isfinite().all() and (slope[::2, 0] > 0).all()
        if checked:
            with pytest.raises(ValueError, match="probs"):
                density(z[1:2])


@pytest.mark.filterwarnings("ignore:this model does not broadcast")
def test_vmap_heeds_what_is_not_validated():
    """Sites that a mask leaves out, values that are computed, and distributions that do not validate."""

    def model():
        p = pyro.sample("p", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        x = torch.tensor([[1.0, 0.5], [0.0, 1.0]]) @ p
        pyro.deterministic("log", torch.log(x[0]))
        pyro.sample("masked", dist.LogNormal(x[0], 1.0).mask(False), obs=torch.tensor(-1.0))
        pyro.sample(
            "free", dist.Bernoulli(probs=1.01 * torch.sigmoid(x[1]), validate_args=False), obs=torch.tensor(1.0)
        )
        pyro.sample("matrix", dist.MultivariateNormal(x, torch.eye(2) * x[1].exp()), obs=torch.zeros(2))

    density = joint(model)
    z = torch.tensor([[0.5, 0.2], [-1.0, 9.0], [1.0, -0.5]])
    found = density(z)
    assert density.recorded.batches and found.isfinite().all()
    torch.testing.assert_close(found, torch.stack([density._alone(row) for row in z]))


@pytest.mark.filterwarnings("ignore:this model does not broadcast")
def test_vmap_leaves_no_tensors_behind_and_validation_as_it_was():
    class Keeps(PyroModule):
        def forward(self):
            p = pyro.sample("p", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            self.__dict__["last"] = torch.tensor([[1.0, 2.0], [0.0, 1.0]]) @ p
            pyro.sample("y", dist.Normal(self.last, 1.0).to_event(1), obs=torch.zeros(2))

    model = Keeps()
    density = joint(model)
    z = torch.randn(3, 2)
    found = density(z)
    assert density.recorded.batches and model.last.sum().isfinite().item()
    torch.testing.assert_close(found, torch.stack([by_trace(density, row) for row in z]))
    torch.distributions.Distribution.set_default_validate_args(False)
    joint(regression, torch.ones(2, 3), torch.ones(2))(torch.randn(3, 3))
    assert not torch.distributions.Distribution._validate_args


def by_float():
    a = pyro.sample("a", dist.Normal(0, 1))
    pyro.sample("y", dist.Normal(float(a), 1.0), obs=torch.tensor(0.3))


def by_if():
    a = pyro.sample("a", dist.Normal(0, 1))
    pyro.sample("y", dist.Normal(a if a > 0 else -a, 1.0), obs=torch.tensor(0.3))


@pytest.mark.parametrize("model", [by_float, by_if])
def test_numbers_and_branches_go_one_at_a_time(model):
    density = joint(model)
    z = torch.tensor([[0.5], [-1.0], [2.0]])
    with pytest.warns(UserWarning, match="does not broadcast"):
        found = density(z)
    assert not density.many_at_once and "one at a time" in density.why_not
    torch.testing.assert_close(found, torch.stack([by_trace(density, row) for row in z]))


def test_tries_again_where_nothing_is_finite():
    """At points where the density is not defined nothing is decided."""

    def model():
        a = pyro.sample("a", dist.Normal(0, 1))
        pyro.factor("domain", torch.where(a < 0, -torch.inf, a.mean()))

    density = joint(model)
    z = torch.tensor([[-1.0], [-2.0]])
    assert quiet(density, z).isinf().all() and density.vectorized
    with pytest.warns(UserWarning, match="does not broadcast"):
        density(-z)
    assert not density.vectorized


def test_errors_of_the_model_reach_the_caller():
    """A density that raises does so on every call; it neither hides nor falls back for ever."""

    def model():
        a = pyro.sample("a", dist.Normal(0, 1).expand([2]).to_event(1))
        torch.linalg.cholesky(torch.diag_embed(a))
        pyro.factor("f", -a.square().sum(-1))

    density = JointDensity(model, joint(scalar_pair).latents)
    refuses(RuntimeError, "positive", density, -torch.ones(3, 2))
    assert density(torch.ones(3, 2)).shape == (3,) and density.vectorized
    refuses(RuntimeError, "positive", density, -torch.ones(3, 2))


def scalar_pair():
    pyro.sample("a", dist.Normal(0, 1).expand([2]).to_event(1))


@pytest.mark.parametrize("shape", [(3,), (2, 3, 1), (4, 2)])
def test_wrong_shapes(shape):
    refuses(ValueError, r"expected unconstrained latents of shape \(S, 1\)", joint(scalar), torch.zeros(shape))


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_of_the_points(default_dtype, default, dtype):
    default_dtype(default)

    def model(y):
        a = pyro.sample("a", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(a.sum(-1), 1.0), obs=y)

    density = joint(model, torch.arange(4, dtype=dtype))
    z = torch.randn(3, 2, dtype=dtype)
    assert density(z).dtype == dtype and density.vectorized
    expected = torch.stack([by_trace(density, row) for row in z])
    torch.testing.assert_close(density(z), expected.to(dtype))
