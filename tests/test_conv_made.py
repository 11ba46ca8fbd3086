"""The convolutional MADE: what each conditional sees, that it adds up to 1, and that draws follow it."""

import copy
import itertools
import math
import pickle

import pyro
import pytest
import torch
from asserts import refuses
from cases import full_but, reload, shake

from pyro_flows.distributions.made import CategoricalHead, ConvMADE, NormalHead
from pyro_flows.inverse.raster import RasterSweep

F64 = torch.float64

# Event, head, options: sizes odd and 1, one channel and several, more channels than fit evenly, all kinds of kernels.
CASES = {
    "binary": ((1, 5, 6), "bernoulli", {}),
    "colours": ((3, 4, 5), "normal", {"context_dim": 2}),
    "colour classes": ((3, 3, 2), CategoricalHead(4), {}),
    "mixed classes": ((2, 2, 3), CategoricalHead([2, 3, 4] * 4), {"context_dim": 2}),
    "levels": ((2, 3, 3), "logistic", {}),
    "one layer": ((2, 3, 4), "bernoulli", {"num_layers": 1, "kernel_size": 5}),
    "wide": ((1, 3, 9), "normal", {"dilations": [3, 5], "kernel_size": [5, 3, 1, 3]}),
    "one row": ((2, 1, 6), "bernoulli", {"context_dim": 2}),
    "one column": ((2, 6, 1), "normal", {}),
    "one pixel": ((1, 1, 1), "bernoulli", {"context_dim": 2}),
    "no positions": ((1, 4, 4), "bernoulli", {"positions": False, "activation": "relu"}),
    "sequence": ((1, 17), "bernoulli", {"num_layers": None}),
    "sequence of vectors": ((3, 8), "normal", {"context_dim": 2}),
    "short sequence": ((2, 1), "normal", {}),
    "dilated": ((2, 9), CategoricalHead(3), {"dilations": 2, "kernel_size": [2, 3]}),
}


def shaken(event, head="bernoulli", scale=0.3, dtype=F64, **options):
    """A small model with parameters far from the initial ones."""
    options = {"hidden_channels": 7, "num_layers": 4} | options
    return shake(ConvMADE(event, head, **options).to(dtype), scale)


EACH_KIND = ("binary", "colours", "mixed classes", "one pixel", "sequence of vectors", "dilated")


@pytest.fixture(params=full_but(CASES, *EACH_KIND))
def case(request):
    event, head, options = CASES[request.param]
    made = shaken(event, head, **options)
    context = torch.randn(4, 2, dtype=F64) if made.context_dim else None
    return made, context


def before(made):
    """True at ``[i, j]`` where dimension ``j`` comes before ``i``, from the definition of the order."""
    places = list(itertools.product(*(range(n) for n in made.event_shape)))  # (channel, row, column)
    keys = [(*place[1:], place[0]) for place in places]
    return torch.tensor([[b < a for b in keys] for a in keys])


def states(made, values):
    """All events, shape ``(values ** D, *event)``."""
    rows = list(itertools.product(range(values), repeat=made.input_dim))
    return torch.tensor(rows, dtype=F64).view(-1, *made.event_shape)


# What is seen.

SEEING = [
    ((1, 7, 9), {"num_layers": 5}),
    ((3, 3, 4), {}),
    ((2, 5, 3), {"hidden_channels": 2, "kernel_size": 3, "num_layers": 7, "dilations": 1}),
    ((1, 9, 9), {"kernel_size": (3, 3), "num_layers": 8, "dilations": 1}),  # the corner at the upper right included
    ((3, 6), {}),
    ((1, 40), {"num_layers": None}),
    ((2, 9), {"kernel_size": 2, "num_layers": 5}),
    ((2, 5, 1), {}),
]


@pytest.mark.parametrize(("event", "options"), SEEING)
def test_each_conditional_sees_what_is_before_all_of_it_and_nothing_else(event, options):
    made = shaken(event, "normal", **options)
    assert made.reach >= max(event[1:]) - 1
    x = torch.randn(event, dtype=F64)
    jacobian = torch.func.jacrev(lambda x: made.params(x))(x).flatten(2)  # (D, num_params, D)
    for k in range(2):
        assert torch.equal(jacobian[:, k] != 0, before(made))


def test_reach_is_exact():
    made = shaken((1, 30), "normal", num_layers=3, kernel_size=3, dilations=(2,))
    assert made.reach == 2 + 4 + 4
    seen = torch.func.jacrev(lambda x: made.params(x))(torch.randn(1, 30, dtype=F64))[-1, 0, 0] != 0
    assert seen.nonzero().min() == 29 - 10
    made = shaken((1, 9, 15), "normal", num_layers=3, kernel_size=3, dilations=1)
    assert made.reach == 3
    seen = torch.func.jacrev(lambda x: made.params(x))(torch.randn(1, 9, 15, dtype=F64)).view(9, 15, 2, 9, 15)
    seen = seen[6, 7, 0] != 0
    want = torch.zeros(9, 15, dtype=torch.bool)
    want[3:6, 4:11] = True  # as far to the right as to the left
    want[6, 4:7] = True
    assert torch.equal(seen, want)


def test_a_changed_value_changes_later_parameters_only(case):
    made, context = case
    later = before(made)
    context = None if context is None else context[0]
    x = made.sample((), context=context)
    params = made.params(x, context)
    for dim in range(0, made.input_dim, 3):
        other = x.clone()
        flat = other.view(-1)
        flat[dim] = 1 - flat[dim] if made.head.discrete else flat[dim] + 1
        changed = (made.params(other, context) != params).any(-1)
        assert not (changed & ~later[:, dim]).any()


def test_the_sweep_computes_the_parameters_of_a_full_pass(case, monkeypatch):
    made, context = case
    seen = torch.full((4, made.input_dim, made.head.num_params), math.nan, dtype=F64)
    order = []
    draws = type(made.head).draws

    def recorded(head, dims, z, params, x, features):
        def note():
            order.append(int(dims))
            seen[:, int(dims)] = params[0].T

        return [note, *draws(head, dims, z, params, x, features)]

    monkeypatch.setattr(type(made.head), "draws", recorded)
    x = made.draw(torch.Size((4,)), context)
    assert order == made.order.tolist() and x.shape == (4, *made.event_shape)
    torch.testing.assert_close(seen, made.params(x, context), rtol=0, atol=1e-10)
    assert made.input_dim == 1 or seen.std(0).max() > 1e-3  # draws differ, and so do what follows from them


def test_masked_weights_never_count():
    made = shaken((3, 3, 2), CategoricalHead(3), hidden_channels=8)
    x = made.sample((5,))
    want = made.log_prob(x)
    with torch.no_grad():
        hidden = 0
        for module in made.net.modules():
            mask = getattr(module, "mask", None)
            if mask is not None:
                weight = module.out_weight if module is made.net else module.here_weight
                weight.masked_fill_(~mask, math.nan)
                hidden += int((~mask).sum())
    assert hidden > 50
    got = made.log_prob(x)
    assert torch.equal(got, want)
    got.sum().backward()
    for parameter in made.parameters():
        assert parameter.grad.isfinite().all()
    pyro.set_rng_seed(3)
    drawn = made.sample((50,))
    assert drawn.isfinite().all()
    assert made.log_prob(drawn).isfinite().all()


# It is a distribution.


def sums_to_one(made, values):
    """The probabilities of all events add up to 1, for each of two contexts, which matter."""
    context = torch.tensor([[0.7], [-1.3]], dtype=F64)
    logp = made.log_prob(states(made, values).unsqueeze(1), context)
    assert logp.shape == (values**made.input_dim, 2)
    torch.testing.assert_close(logp.exp().sum(0), torch.ones(2, dtype=F64), rtol=0, atol=1e-12)
    assert (logp[:, 0] - logp[:, 1]).abs().max() > 0.1


def keeps_dtype(made, dtype):
    """Draws, densities and gradients have this dtype, with little rounding; returns contexts, draws and densities."""
    context = torch.randn(5, 2, dtype=dtype)
    x = made.sample((), context)
    logp = made.log_prob(x, context)
    assert x.dtype == logp.dtype == dtype
    logp.sum().backward()
    assert {p.grad.dtype for p in made.parameters()} == {dtype}
    exact = copy.deepcopy(made).to(F64)
    torch.testing.assert_close(logp.double(), exact.log_prob(x.double(), context.double()), rtol=1e-4, atol=1e-4)
    return context, x, logp.detach()


def draws_differentiably(made):
    """Draws of normal conditionals have right gradients, of parameters too, and the noise behind them is white."""
    context = torch.randn(2, 1, dtype=F64, requires_grad=True)

    def drawn(context):
        pyro.set_rng_seed(7)
        return made.rsample((2,), context)

    assert drawn(context).shape == (2, 2, *made.event_shape)
    assert torch.autograd.gradcheck(drawn, (context,))
    grads = torch.autograd.grad(drawn(context).square().sum(), list(made.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
    with torch.no_grad():  # the noise, by the conditionals' own location and scale
        x = made.rsample((1000,), context)
        loc, raw = made.params(x, context).unbind(-1)
        noise = (x.flatten(2) - loc) / (5 * torch.tanh(raw / 5)).exp()
    covariance = torch.cov(noise.flatten(0, 1).T)
    torch.testing.assert_close(covariance, torch.eye(made.input_dim, dtype=F64), rtol=0, atol=0.12)
    return grads, loc, raw, noise


@pytest.mark.parametrize(
    ("event", "head", "values"),
    [
        ((1, 3, 3), "bernoulli", 2),
        ((2, 2, 2), "bernoulli", 2),
        ((1, 2, 2), CategoricalHead(3), 3),
        ((2, 1, 2), CategoricalHead(3), 3),
        ((1, 9), "bernoulli", 2),
        ((3, 3), "bernoulli", 2),
    ],
)
def test_sums_to_one(event, head, values):
    sums_to_one(shaken(event, head, scale=0.8, context_dim=1), values)


@pytest.mark.parametrize(("event", "head", "values"), [((1, 2, 2), CategoricalHead(3), 3), ((2, 3), "bernoulli", 2)])
def test_draws_have_the_frequencies_of_the_density(event, head, values):
    made = shaken(event, head, scale=0.5)
    n, all_states = 20_000, states(made, values)
    drawn = made.sample((n,)).flatten(1)
    weights = values ** torch.arange(made.input_dim - 1, -1, -1)
    counts = torch.bincount((drawn.long() @ weights), minlength=len(all_states))
    want = made.log_prob(all_states).exp() * n
    common = want > 5
    rest = (counts[~common].sum() - want[~common].sum()) ** 2 / want[~common].sum().clamp(min=1.0)
    chi = ((counts - want)[common] ** 2 / want[common]).sum() + rest
    freedom = int(common.sum())
    assert freedom > 15
    assert chi < freedom + 4 * math.sqrt(2 * freedom)
    # Independent dimensions would not do.
    ones = torch.stack([(drawn == v).double().mean(0) for v in range(values)])
    alone = ones.log().gather(0, all_states.flatten(1).long()).sum(1).exp() * n
    assert ((counts - alone)[common] ** 2 / alone[common]).sum() > 3 * freedom


def test_density_by_hand():
    # One layer with a kernel of 3 over a row: x_t given x_{t-1} alone, through one elu.
    made = shaken((1, 4), "bernoulli", num_layers=1, kernel_size=2, hidden_channels=3, positions=False)
    layer = made.net.layers[0]
    x = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=F64)
    total = 0.0
    for t in range(4):
        past = x[t - 1] if t else 0.0
        hidden = torch.nn.functional.elu(layer.left_weight[:, 0, 0] * past + layer.left_bias)
        logit = made.net.out_weight[0, 0] @ hidden + made.bias[0, 0]
        total = total + torch.nn.functional.logsigmoid(logit if x[t] else -logit)
    torch.testing.assert_close(made.log_prob(x.view(1, 4)), total)


def test_starts_at_the_biases_of_the_head():
    for event, head in (((3, 4, 4), "mixture"), ((2, 5), CategoricalHead(3)), ((1, 3, 3), "bernoulli")):
        made = ConvMADE(event, head, context_dim=2)
        x = made.sample((3,), context=torch.randn(2))
        params = made.params(x, torch.randn(3, 2))
        torch.testing.assert_close(params, made.head.bias().expand_as(params), rtol=0, atol=0)


# Shapes, kinds, and Pyro.


def test_contexts_and_batches_broadcast(case):
    made, context = case
    event = made.event_shape
    shape = () if context is None else (4,)
    x = made.sample((3, 2), context)
    assert x.shape == (3, 2, *shape, *event)
    logp = made.log_prob(x, context)
    assert logp.shape == (3, 2, *shape)
    one = logp.new_empty(logp.shape)
    for index in itertools.product(*map(range, logp.shape)):
        one[index] = made.log_prob(x[index], None if context is None else context[index[-1]])
    torch.testing.assert_close(one, logp, rtol=1e-12, atol=1e-12)
    if context is not None:
        single = made.sample((), context[0])
        both = made.log_prob(single, context.unsqueeze(1).expand(4, 3, 2))
        assert both.shape == (4, 3)
        torch.testing.assert_close(both[:, 1], made.log_prob(single, context))
        assert both.std() > 1e-6
    empty = made.sample((0, 2), context)
    assert empty.shape == (0, 2, *shape, *event)
    assert made.log_prob(empty, context).shape == (0, 2, *shape)


def test_expand_and_plates(case):
    made, context = case
    distribution = made(context)
    wide = distribution.expand((3, 4))
    assert wide.batch_shape == (3, 4) and wide.event_shape == made.event_shape
    x = wide.sample()
    assert x.shape == (3, 4, *made.event_shape)
    torch.testing.assert_close(wide.log_prob(x), made.log_prob(x, context))

    def model():
        pyro.module("made", made)
        with pyro.plate("rows", 4, dim=-1):
            return pyro.sample("x", made(context))

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["x"]["value"].shape == (4, *made.event_shape)
    assert trace.nodes["x"]["log_prob"].shape == (4,)
    assert sum(name.startswith("made$$$") for name in trace.nodes) == len(list(made.parameters()))


@pytest.mark.parametrize(("dtype", "default"), [(torch.float32, F64), (F64, torch.float32)])
@pytest.mark.parametrize("event", [(2, 4, 3), (2, 6)])
def test_the_dtype_that_is_not_the_default(event, dtype, default, default_dtype):
    default_dtype(default)
    for head in ("bernoulli", CategoricalHead(3), "normal"):
        keeps_dtype(shaken(event, head, scale=0.1, dtype=dtype, context_dim=2), dtype)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_whole_numbers_of_any_dtype_are_values(dtype):
    made = shaken((1, 3, 3), "bernoulli")
    x = made.sample((4,))
    assert torch.equal(made.log_prob(x.to(dtype)), made.log_prob(x))


def test_chunks_of_draws_are_put_together(monkeypatch):
    from pyro_flows.inverse import raster

    made = shaken((1, 3, 3), "bernoulli", context_dim=1, scale=0.1)
    with torch.no_grad():
        made.net.out_context.fill_(300.0)  # the sign of the context decides
    monkeypatch.setattr(raster, "ROOM", 1)
    monkeypatch.setattr(raster, "MORE_ROOM", 1)
    sizes = []
    run = RasterSweep.run
    monkeypatch.setattr(RasterSweep, "run", lambda sweep: sizes.append(sweep.n) or run(sweep))
    context = torch.randn(3, 15, 1, dtype=F64).sign()
    x = made.sample((), context)
    assert sizes == [16, 16, 13]
    assert torch.equal(x, (context > 0).double()[..., None, None].expand_as(x))


@pytest.mark.parametrize("event", full_but([(2, 2, 3), (2, 3)], (2, 3)))
def test_differentiable_draws(event):
    made = shaken(event, "normal", context_dim=1, scale=0.2, dilations=1)
    grads, loc, raw, noise = draws_differentiably(made)
    assert all(grad.abs().sum() > 0 for grad in grads)
    assert loc.std() > 0.1 and raw.std() > 0.1
    assert noise.mean((0, 1)).abs().max() < 0.12


@pytest.mark.full
def test_func_and_compile():
    made = shaken((2, 3, 4), "normal", context_dim=2)
    x, context = torch.randn(5, 2, 3, 4, dtype=F64), torch.randn(5, 2, dtype=F64)
    want = made.log_prob(x, context)
    torch.testing.assert_close(torch.func.vmap(lambda x, c: made.score(x, c))(x, context), want)
    compiled = torch.compile(lambda x, c: made.score(x, c), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, context), want)


def test_copies_and_state(case):
    made, context = case
    x = made.sample((3,), context)
    want = made.log_prob(x, context)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other.log_prob(x, context), want)
    fresh = shake(copy.deepcopy(made))
    reload(made, fresh)
    assert torch.equal(fresh.log_prob(x, context), want)
    pyro.set_rng_seed(5)
    drawn = made.sample((2,), context)
    pyro.set_rng_seed(5)
    assert torch.equal(fresh.sample((2,), context), drawn)


def test_no_parameter_is_idle():
    for event, options in (((1, 5, 5), {}), ((3, 4, 4), {}), ((1, 8), {}), ((2, 8), {}), ((2, 1, 3), {})):
        made = shaken(event, "normal", context_dim=2, **options)
        made.log_prob(torch.randn(6, *event, dtype=F64), torch.randn(6, 2, dtype=F64)).sum().backward()
        for name, parameter in made.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
            assert parameter.is_contiguous()


@pytest.mark.full
def test_learns_what_depends_on_far_pixels():
    # The last row repeats the first, which only a model that looks back over all rows can know.
    rows = torch.randint(2, (256, 1, 1, 4)).float()
    between = torch.randint(2, (256, 1, 3, 4)).float()
    x = torch.cat((rows, between, rows), 2)
    made = ConvMADE((1, 5, 4), hidden_channels=16, num_layers=4)
    optimiser = torch.optim.Adam(made.parameters(), lr=1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        loss = -made.score(x, None).mean()
        loss.backward()
        optimiser.step()
    assert loss < (16 + 0.5) * math.log(2)  # 20 bits without the repetition, 16 with it
    drawn = made.sample((200,))
    assert (drawn[:, 0, 0] == drawn[:, 0, -1]).float().mean() > 0.95


# Hostile input.


@pytest.mark.parametrize(
    ("event", "options", "words"),
    [
        ((5,), {}, r"expected event_shape to be \(C, H, W\) or \(C, T\)"),
        ((1, 2, 3, 4), {}, r"expected event_shape"),
        ((1, 0, 3), {}, "positive integers"),
        ((3, 4, 4), {"hidden_channels": 2}, "hidden_channels to be at least the number of channels 3"),
        ((1, 4, 4), {"hidden_channels": 6.0}, "hidden_channels to be an integer"),
        ((1, 4, 4), {"kernel_size": 4}, "odd kernel sizes"),
        ((1, 4, 4), {"kernel_size": (7, 2)}, "odd kernel sizes"),
        ((1, 4, 4), {"kernel_size": 1}, "kernel_size of at least 3 in the first layer"),
        ((1, 9), {"kernel_size": 1}, "kernel_size of at least 2 in the first layer"),
        ((1, 9), {"kernel_size": ()}, "kernel_size to be positive integers"),
        ((1, 9), {"dilations": 0}, "dilations to be positive integers"),
        ((1, 9), {"dilations": (1, 2.5)}, "dilations to be positive integers"),
        ((1, 9), {"num_layers": 0}, "num_layers to be an integer >= 1"),
        ((1, 9), {"context_dim": -1}, "context_dim to be an integer >= 0"),
        ((1, 9), {"activation": "step"}, "activation"),
        ((1, 9), {"head": "poisson?"}, "head"),
        ((1, 9), {"head": CategoricalHead([2, 3])}, "dimensions"),
    ],
)
def test_wrong_options(event, options, words):
    refuses((ValueError, TypeError), words, ConvMADE, event, **options)


@pyro.validation_enabled(True)
def test_wrong_values_and_contexts():
    made = shaken((1, 3, 4), "bernoulli", context_dim=2)
    context = torch.zeros(2, dtype=F64)
    with pytest.raises(ValueError, match=r"trailing shape \(1, 3, 4\), got shape \(1, 4, 3\)"):
        made.log_prob(torch.zeros(1, 4, 3, dtype=F64), context)
    refuses(ValueError, "0 or 1", made.log_prob, torch.full((1, 3, 4), 2.0, dtype=F64), context)
    x = torch.zeros(1, 3, 4, dtype=F64)
    refuses(ValueError, "last dimension 2", made.log_prob, x, torch.zeros(3, dtype=F64))
    refuses(TypeError, "float32", made.log_prob, x, torch.zeros(2))
    refuses(ValueError, "call it with a context", made.log_prob, x)
    refuses(ValueError, "leave it out", shaken((1, 3, 4)).sample, (), context)
    normal = shaken((1, 2, 2), NormalHead())
    assert normal.score(torch.full((1, 2, 2), math.nan, dtype=F64), None).isnan()
    refuses(NotImplementedError, "reparameterized", shaken((1, 2, 2), "bernoulli").rsample)
