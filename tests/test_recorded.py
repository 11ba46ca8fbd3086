"""A density by its recording: against plain runs, what is not recorded and why, and what is noticed later."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_flows.infer import AutoFlow
from pyro_flows.infer.models import recorded
from pyro_flows.infer.models.held import own_density
from pyro_flows.infer.models.recorded import value_and_slope

pytestmark = [pytest.mark.usefixtures("double"), pytest.mark.filterwarnings("ignore:this model does not broadcast")]

Y = torch.linspace(-1, 2, 7, dtype=torch.float64)
TIMES = torch.linspace(0, 2, 5, dtype=torch.float64)


def density_of(model, *args, **options):
    guide = AutoFlow(model, start="prior", seed=0, **options).hide_discrete(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return guide.setup(*args).density(*args)


def plain(density, z):
    return value_and_slope(lambda z: torch.stack([density._alone(row) for row in z]), z)


def school(y):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)), pyro.poutine.mask(mask=y > -0.6):
        pyro.sample("y", dist.Normal(pyro.sample("theta", dist.Normal(mu, tau)), 1.0), obs=y)


def chain_of_states(y):
    p = pyro.sample("p", dist.Beta(torch.tensor([9.0, 9.0]), 1.0).to_event(1))
    mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    moves = torch.stack([torch.stack([p[0], 1 - p[0]]), torch.stack([1 - p[1], p[1]])])
    start = torch.tensor([0.5, 0.5]).log()
    pyro.sample("y", dist.DiscreteHMM(start, moves.log(), dist.Normal(mu, 1.0), duration=len(y)), obs=y)


def mixture(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    mu = pyro.sample("mu", dist.Normal(torch.tensor([-3.0, 0.0, 3.0]), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(mu[k], 1.0), obs=y)


def equation(y):
    """torchdiffeq, which fills a tensor in place and asks for times."""
    from torchdiffeq import odeint

    rate = pyro.sample("rate", dist.LogNormal(torch.zeros(2), 0.3).to_event(1))
    path = odeint(lambda t, u: rate * (1 - u), torch.zeros(2), TIMES, method="rk4", options={"step_size": 0.4})
    pyro.sample("y", dist.Normal(path, 1.0).to_event(2), obs=torch.ones(5, 2))


def fills(y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    mean = torch.zeros(len(y))
    for k in range(len(y)):
        mean[k] = slope * k
    pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)


def process(y):
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    x = torch.arange(float(len(y)))
    kernel = torch.exp(-((x[:, None] - x) ** 2) / length**2) + 0.2 * torch.eye(len(y))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(y)), kernel), obs=y)


def missing(y):
    y = torch.where(y > 1, torch.nan, y)
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    y = y[~y.isnan()]
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.StudentT(3.0, mu, 1.0), obs=y)


class Net(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](1, 2)
        self.linear.weight = PyroSample(lambda self: dist.Normal(0.0, 1.0).expand([2, 1]).to_event(2))
        self.fixed = nn.Linear(2, 1).requires_grad_(False).eval()

    def forward(self, y):
        mean = self.fixed(self.linear(y[:, None]).tanh())[:, 0]
        pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)


def products(y):
    """A constant matrix before one that differs between points: a column, three columns, and one of a batch of one."""
    x = torch.stack([y, y.cos()], 1)
    b = pyro.sample("b", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    mean = (x @ b[:, :1]).squeeze(-1) + (x @ b).tanh().sum(-1) + torch.einsum("nd,dk->nk", x, b.exp())[:, 1]
    pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)


MODELS = [school, chain_of_states, mixture, equation, fills, process, missing, products, Net()]


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: getattr(m, "__name__", "net"))
def test_values_and_gradients(model, dtype, default_dtype, monkeypatch):
    """Equal to single plain runs, for several numbers of points, before and after these are recorded."""
    monkeypatch.setattr(recorded, "OFTEN", 2)
    default_dtype(dtype)
    if isinstance(model, nn.Module):
        model.to(dtype)
    monkeypatch.setitem(globals(), "TIMES", TIMES.to(dtype))
    density = density_of(model, Y.to(dtype))
    for count in (1, 3, 70, 3, 3, 70, 70):
        z = torch.randn(count, density.latents.dim)
        expected = plain(density, z)
        found = density.value_and_slope(z)
        assert density.recorded.why_not is None and density.recorded.batches and density.many_at_once
        near = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-8}
        torch.testing.assert_close(found, expected, **near)
        torch.testing.assert_close(density(z), expected[0], **near)
        assert not found[0].requires_grad and found[0].dtype == dtype
    assert density.recorded._shapes


def test_products_with_a_constant_matrix_are_one_for_all_points():
    called = set()

    class Kernels(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    density = density_of(products, Y)
    z = torch.randn(9, 6)
    torch.testing.assert_close(density.value_and_slope(z), plain(density, z))
    with Kernels():
        density.value_and_slope(z)
    assert torch.ops.aten.mm in called and torch.ops.aten.bmm not in called


def test_second_derivatives():
    density = density_of(mixture, Y)
    z = torch.randn(2, density.latents.dim, requires_grad=True)
    assert density(z).requires_grad and not density.vectorized
    (slope,) = torch.autograd.grad(density(z).sum(), z, create_graph=True)
    (found,) = torch.autograd.grad(slope[:, 0].sum(), z)
    (slope,) = torch.autograd.grad(sum(map(density._alone, z)), z, create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(slope[:, 0].sum(), z)[0])


def test_points_that_are_refused():
    """NaN, as for a matrix that is not positive definite or a value outside; the plain error if nothing is left."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        root = torch.linalg.cholesky(torch.diag(x + 2))
        pyro.sample("y", dist.Bernoulli(probs=root[0, 0] / 3), obs=torch.tensor(1.0))

    density = density_of(model)
    z = torch.tensor([[0.0, 0.0], [-3.0, 0.0], [20.0, 0.0], [0.5, -0.5]])
    value, slope = density.value_and_slope(z)
    assert value.isfinite().tolist() == [True, False, False, True] and density.recorded.why_not is None
    torch.testing.assert_close((value[::3], slope[::3]), plain(density, z[::3]))
    for rows, error in ((z[1:2], RuntimeError), (z[2:3], ValueError)):
        with pytest.raises(error):
            density.value_and_slope(rows)


def by_branch(x):
    return x if x > 0 else -x


def by_number(x):
    return float(x)


def by_array(x):
    return torch.from_numpy(x.detach().numpy().copy()) * 1


def by_a_rare_branch(x):
    return 3 * x if x.detach().__array__() > 1.5 else x


GENERATOR = torch.Generator()


def by_random_numbers(x):
    return x + 0 * torch.randn((), generator=GENERATOR)


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (by_branch, "gives Python a value"),
        (by_number, "gives Python a value"),
        (by_array, "gives Python a value"),
        (by_a_rare_branch, "gives Python a value"),
        (by_random_numbers, "takes a Generator"),
    ],
)
def test_not_recorded(form, why):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(form(x), 1.0), obs=torch.tensor(0.3))

    density = density_of(model)
    z = torch.tensor([[0.5], [-1.0], [2.0]])
    torch.testing.assert_close(density.value_and_slope(z), plain(density, z))
    assert why in density.recorded.why_not


def test_other_numbers_elsewhere():
    """What leaves torch unseen, here by a private function, differs at other points, in value or in gradient alone."""

    def unseen(x):
        return torch.utils.dlpack.from_dlpack(x.detach())

    for form in (lambda x: unseen(x), lambda x: x.detach() + 0 * unseen(x)):

        def model(form=form):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.factor("f", form(x) * 0.5)

        density = density_of(model)
        z = torch.tensor([[0.5], [-1.0], [2.0]])
        torch.testing.assert_close(density.value_and_slope(z), plain(density, z))


def test_state_of_python_is_noticed():
    scale = [1.0]

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, scale[0]), obs=torch.tensor(0.3))

    density = density_of(model)
    z = torch.randn(4, 1)
    for call in range(16):
        scale[0] = 1.0 if call < 5 else 2.0
        found = density.value_and_slope(z)
    torch.testing.assert_close(found, plain(density, z))
    assert "other numbers" in density.recorded.why_not


def test_tensors_that_change_are_read_again():
    """Data, parameters of modules and of Pyro, changed in place; a copy of the density keeps its own."""
    data = Y.clone()

    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        s = pyro.param("s", torch.tensor(1.0), constraint=dist.constraints.positive)
        pyro.sample("y", dist.Normal(x.sum(-1, keepdim=True), s).expand([*x.shape[:-1], 7]).to_event(1), obs=y)

    pyro.clear_param_store()
    density = density_of(model, data)
    z = torch.randn(4, 2)
    first = density.value_and_slope(z)
    own = own_density(density, density.latents, {"s": torch.tensor(1.0)})
    data.add_(1.0)
    second = density.value_and_slope(z)
    with torch.no_grad():
        pyro.get_param_store()["s"].unconstrained().add_(1.0)
    third = density.value_and_slope(z)
    torch.testing.assert_close(third, plain(density, z))
    assert density.recorded.why_not is None and not torch.equal(first[0], second[0]) != torch.equal(second[0], third[0])
    torch.testing.assert_close(own.value_and_slope(z), first)
    for _ in range(recorded.RECORDINGS):
        data.add_(1.0)
        torch.testing.assert_close(density.value_and_slope(z), plain(density, z))
    assert "change" in density.recorded.why_not
    pyro.clear_param_store()


def test_minibatches():
    """Drawn anew at each call, the same ones as by a plain run, without a trace in the generator's state."""

    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 100, subsample_size=5) as rows:
            pyro.sample("y", dist.Normal(x, 1.0), obs=y[rows])

    density = density_of(model, torch.randn(100))
    z = torch.randn(3, 1)
    values = torch.stack([density.value_and_slope(z)[0] for _ in range(20)])
    assert density.recorded.why_not is None and (values.std(0) > 0.1).all()
    still = density.still()
    torch.testing.assert_close(still(z), still.value_and_slope(z)[0])
    torch.testing.assert_close(still(z)[:1], recorded.seeded_alike(density._alone, z[0])[None])
    states = []
    for _ in range(2):  # checks of the recording draw numbers of their own
        torch.manual_seed(3)
        density.recorded._calls = len(states)
        density.value_and_slope(z)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_kernels_without_a_rule_for_many_points(monkeypatch):
    def refuse(*args):
        raise RuntimeError("no rule")

    monkeypatch.setattr(recorded, "_mapped", refuse)
    density = density_of(chain_of_states, Y)
    z = torch.randn(3, density.latents.dim)
    torch.testing.assert_close(density.value_and_slope(z), plain(density, z))
    assert density.recorded.why_not is None and not density.recorded.batches and not density.many_at_once


def test_too_slow_to_record():
    density = density_of(school, Y, start_seconds=1e-9)
    z = torch.randn(3, density.latents.dim)
    torch.testing.assert_close(density.value_and_slope(z), plain(density, z))
    assert "too long" in density.recorded.why_not
