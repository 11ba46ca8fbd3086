"""Sequences of any length by convolutions, a GRU and attention: what is seen, step by step as in one piece, lengths."""

import copy
import itertools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import full_but, reload, shake
from test_compression import plain
from test_conv_made import before, draws_differentiably, keeps_dtype, states, sums_to_one

import pyro_flows as pf
from pyro_flows.distributions import CategoricalHead, ConvMADE, DistributionHead, LogisticMixtureHead, MixedHead
from pyro_flows.infer import Codec, Stream, step_log_prob
from pyro_flows.nets import tokens

F64 = torch.float64
NETWORKS = {
    "conv": {"network": "conv", "num_layers": 3, "kernel_size": 3, "dilations": (1, 2)},
    "gru": {"network": "gru"},
    "two grus": {"network": "gru", "num_layers": 2, "activation": "tanh"},
    "attention": {"network": "attention"},
    "window": {"network": "attention", "window": 3, "num_heads": 3},
}
MIXED = MixedHead([("normal", [0]), (CategoricalHead(3), [1])])
HEADS = {
    "normal": (1, "normal"),
    "mixture": (2, "mixture"),
    "bernoulli": (1, "bernoulli"),
    "classes": (2, CategoricalHead([2, 4])),
    "mixed": (2, MIXED),
    "of Pyro": (2, DistributionHead(dist.Binomial, ["logits"], fixed={"total_count": torch.tensor([3.0, 5.0])})),
}


def shaken(name, event, head="normal", scale=0.3, dtype=F64, **options):
    """A small model with parameters far from the initial ones."""
    options = {"hidden_channels": 6, "positions": False} | NETWORKS[name] | options
    return shake(ConvMADE(event, head, **options).to(dtype), scale)


def context_of(model, *batch):
    return torch.randn(*batch, model.context_dim, dtype=F64) if model.context_dim else None


# What is seen.


@pytest.mark.parametrize("positions", full_but([False, True], False))
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("event", full_but([(1, 6), (3, 4), (2, 1)], (3, 4)))
def test_parameters_see_earlier_numbers_and_the_context_and_nothing_else(name, event, positions):
    """T1: exactly zero at and after a number in the order, and not zero before it, as far as the network looks back."""
    made = shaken(name, event, "normal", positions=positions, context_dim=2)
    x, context = torch.randn(event, dtype=F64), torch.randn(2, dtype=F64)
    by_value, by_context = torch.autograd.functional.jacobian(made.params, (x, context))
    times = torch.arange(event[1]).repeat(event[0])
    near = times[:, None] - times <= (event[1] if made.reach is None else made.reach)
    for k in range(2):
        assert torch.equal(by_value.flatten(2)[:, k] != 0, before(made) & near)
        assert (by_context[:, k] != 0).all()


@pytest.mark.parametrize("window, num_layers, reach", [(1, 2, 1), (2, 1, 2), (3, 2, 5), (4, 3, 10)])
def test_reach_of_windows(window, num_layers, reach):
    made = shaken("attention", (1, 14), window=window, num_layers=num_layers)
    assert made.reach == reach
    seen = torch.autograd.functional.jacobian(made.params, torch.randn(1, 14, dtype=F64))[-1, 0, 0] != 0
    assert seen.nonzero().flatten().tolist() == list(range(13 - reach, 13))


@pytest.mark.parametrize("name", ["gru", "attention", "window"])
@pytest.mark.parametrize("event", [(1, 3, 4), (2, 2, 2)])
def test_images_in_raster_order(name, event):
    made = shaken(name, event, "normal", positions=None, hidden_channels=12)
    assert made.positions and not made.shared_over_time
    by_value = torch.autograd.functional.jacobian(made.params, torch.randn(event, dtype=F64)).flatten(2)
    places = torch.arange(math.prod(event[1:])).repeat(event[0])
    near = places[:, None] - places <= (99 if made.reach is None else made.reach)
    for k in range(2):
        assert torch.equal(by_value[:, k] != 0, before(made) & near)


def test_attention_over_images_knows_rows_and_columns():
    """Two images that are the same in raster order, but of other widths."""
    one, other = (shaken("attention", event, positions=False) for event in ((1, 2, 6), (1, 3, 4)))
    other.load_state_dict(one.state_dict())
    x = torch.randn(1, 12, dtype=F64)
    assert (one.params(x.view(1, 2, 6)) - other.params(x.view(1, 3, 4))).abs().max() > 1e-3


# It is a distribution.


@pytest.mark.parametrize("name", full_but(NETWORKS, "gru", "window"))
@pytest.mark.parametrize(("event", "head", "values"), [((1, 6), "bernoulli", 2), ((2, 2), CategoricalHead(3), 3)])
def test_sums_to_one(name, event, head, values):
    sums_to_one(shaken(name, event, head, 0.8, context_dim=1), values)


@pytest.mark.parametrize("name", full_but(["gru", "two grus", "attention", "window"], "gru", "attention"))
@pytest.mark.parametrize("head", HEADS)
def test_draws_go_by_the_parameters_of_a_full_pass(name, head):
    """The parameters that each draw came from, against one pass over all that was drawn."""
    channels, given = HEADS[head]
    made = shaken(name, (channels, 5), given, context_dim=2)
    context, seen = context_of(made, 4), {}

    def pick(params, dims):
        seen[int(dims)] = params[:, 0]
        return made.head.sample(params, dims)

    x = made._drawn(made.head, 4, context, pick)
    assert list(seen) == made.order.tolist()
    got = torch.stack([seen[k] for k in range(made.input_dim)], 1)
    torch.testing.assert_close(got, made.params(x.squeeze(-2), context), rtol=0, atol=1e-10)
    made.head.check(x.flatten(1))
    assert made.head.discrete or x.std(0).max() > 1e-2


@pytest.mark.parametrize("name", full_but(NETWORKS, "window"))
def test_draws_have_the_frequencies_of_the_density(name):
    made, n = shaken(name, (2, 3), "bernoulli", 0.6), 10_000
    every = states(made, 2)
    want = made.log_prob(every).exp() * n
    stream = Stream(made, (n,))
    pyro.set_rng_seed(2)
    for drawn in (made.sample((n,)), torch.stack([stream.sample() for _ in range(3)], -1)):
        counts = torch.bincount(drawn.flatten(1).long() @ (2 ** torch.arange(5, -1, -1)), minlength=64)
        common = want > 5
        freedom = int(common.sum())
        assert freedom > 15
        chi = ((counts - want)[common] ** 2 / want[common]).sum()
        assert chi < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("name", full_but(["gru", "attention"], "gru"))
def test_differentiable_draws(name):
    draws_differentiably(shaken(name, (2, 3), "normal", 0.2, context_dim=1))


# Step by step, and any length.


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("head", full_but(HEADS, "mixed"))
@pytest.mark.parametrize("batch", full_but([(), (3,), (2, 3)], (3,)))
def test_streams_equal_whole_series(name, head, batch, monkeypatch):
    """T2: over more steps than the model's own, and than windows, kernels and pieces."""
    context_dim = 2 if batch == (3,) else 0
    monkeypatch.setattr(tokens, "_AT_ONCE", 7)
    channels, given = HEADS[head]
    made = shaken(name, (channels, 1 if batch == () else 5), given, context_dim=context_dim)
    context = context_of(made, *batch)
    long = made.at_length(30)
    x = long.sample((), context) if context is not None else long.sample(batch)
    stream = Stream(made, batch, context)
    pieces = [stream.observe(x[..., :1]), stream.observe(x[..., 1]).unsqueeze(-1), stream.observe(x[..., 2:13])]
    pieces += [stream.observe(x[..., 13:13]), stream.observe(x[..., 13:])]
    got = torch.cat(pieces, -1)
    assert stream.steps == 30 and got.shape == (*batch, 30) and not got.requires_grad
    torch.testing.assert_close(got, step_log_prob(long, x, context), rtol=0, atol=1e-10)
    torch.testing.assert_close(got.sum(-1), long.log_prob(x, context), rtol=0, atol=1e-10)
    one_by_one = Stream(made, batch, context)
    torch.testing.assert_close(torch.stack([one_by_one.observe(step) for step in x.unbind(-1)], -1), got)
    torch.testing.assert_close(one_by_one.copy().observe(x[..., :4]), stream.observe(x[..., :4]))
    same, score = one_by_one.step(x[..., 0])  # base values are the values
    assert torch.equal(same, x[..., 0]) and score.shape == batch


@pytest.mark.parametrize("name", NETWORKS)
def test_lengths_leave_padding_out(name):
    made = shaken(name, (2, 6), MIXED, context_dim=1)
    context, lengths = context_of(made, 4), torch.tensor([6, 1, 3, 5])
    x = made.sample((), context)
    x[2, :, 3:], x[1, :, 1:], x[3, :, 5:] = math.nan, math.inf, 77.0
    with pyro.validation_enabled():
        got = made.log_prob(x, context, lengths=lengths)
    for k, length in enumerate(lengths.tolist()):
        want = made.at_length(length).log_prob(x[k, :, :length], context[k])
        torch.testing.assert_close(got[k], want, rtol=0, atol=1e-10)
    scores = step_log_prob(made, x, context, lengths=lengths)
    torch.testing.assert_close(scores.sum(-1), got)
    assert (scores[1, 1:] == 0).all() and scores.shape == (4, 6)
    got.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters())
    drawn = made(context, lengths=lengths).sample((3,))
    padding = (torch.arange(6) >= lengths[:, None]).unsqueeze(-2).expand_as(drawn)
    assert (drawn[padding] == 0).all() and drawn[~padding].abs().max() > 0


def test_lengths_in_programs():
    made, lengths = shaken("gru", (1, 5), "normal"), [5, 2, 1]
    law = made(lengths=lengths)
    assert law.batch_shape == (3,) and law.event_shape == (1, 5)
    assert law.expand((2, 3)).sample().shape == (2, 3, 1, 5)
    x = law.sample((4,))
    torch.testing.assert_close(law.expand((4, 3)).log_prob(x), law.log_prob(x))
    torch.testing.assert_close(made(lengths=2).log_prob(x[:, 1]), law.log_prob(x)[:, 1])

    def model(seen):
        with pyro.plate("series", 3):
            pyro.sample("x", made(lengths=lengths), obs=seen)

    trace = pyro.poutine.trace(model).get_trace(x[0])
    torch.testing.assert_close(trace.log_prob_sum(), law.log_prob(x[0]).sum())
    drawn = shaken("attention", (1, 5), "normal", 0.1)(lengths=lengths).rsample((2,))
    assert drawn.shape == (2, 3, 1, 5) and (drawn[:, 2, :, 1:] == 0).all() and drawn.requires_grad


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_depends_on_the_length(name):
    short, long = (shaken(name, (2, times), MIXED) for times in (4, 9))
    reload(short, long)
    x = long.sample((3,))
    torch.testing.assert_close(step_log_prob(long, x)[:, :4], step_log_prob(short, x[..., :4]))
    other = short.at_length(9)
    torch.testing.assert_close(other.log_prob(x), long.log_prob(x))
    assert other.order.tolist() == long.order.tolist() and other.support.check(x).all() and short.event_shape == (2, 4)
    with torch.no_grad():
        short.bias.add_(1.0)
    assert other.bias is short.bias


@pytest.mark.parametrize("channels, head", HEADS.values())
def test_heads_of_channels_hold_at_all_places(channels, head):
    """A head of the channels is that of all dimensions with each channel's repeated."""
    made = shaken("gru", (channels, 3), head)
    x = made.sample((5,))
    params = made.params(x).unflatten(1, (channels, 3))
    own = made._shared_head()
    want = torch.stack([own.log_prob(x[..., t], params[:, :, t]) for t in range(3)], -1)
    torch.testing.assert_close(made.head.log_prob(x.flatten(1), params.flatten(1, 2)).unflatten(1, (channels, 3)), want)
    assert made.head.fixed_points() == [point for point in own.fixed_points() for _ in range(3)]
    assert made.head.discrete_dims() == [kind for kind in own.discrete_dims() for _ in range(3)]


def test_marginals_of_channels():
    x = torch.randn(200, 2, 4, dtype=F64) * torch.tensor([[0.5], [2.0]], dtype=F64) + torch.tensor([[1.0], [3.0]])
    made = ConvMADE((2, 4), "normal", network="gru", hidden_channels=4).double().fit_marginals(x)
    want = dist.Normal(x.mean((0, 2)), x.transpose(0, 1).flatten(1).std(1, correction=0)).to_event(1)
    torch.testing.assert_close(made.step_scores(x), want.log_prob(x.mT))


# Streams over other models.


@pytest.mark.parametrize("name", full_but(NETWORKS, "gru"))
def test_streams_over_flows_with_such_a_base(name):
    base = shaken(name, (2, 12), "mixture")
    flow = pf.Flow(pf.Chain([pf.causal_maf((2, 12), hidden_channels=4, num_convolutions=2), pf.ActNorm((2, 12))]), base)
    shake(flow.chain.double(), 0.1)
    flow.chain[1].initialized.fill_(True)
    y = torch.randn(3, 2, 12, dtype=F64)
    stream = Stream(flow.eval(), (3,))
    torch.testing.assert_close(stream.observe(y).sum(-1), flow.log_prob(y), rtol=0, atol=1e-10)
    again = Stream(flow, (3,))
    drawn = torch.stack([again.sample() for _ in range(12)], -1)
    got = Stream(flow, (3,)).observe(drawn)
    torch.testing.assert_close(got.sum(-1), flow.log_prob(drawn), rtol=0, atol=1e-10)
    bound = pf.causal_maf((2, 12), hidden_channels=4, context_dim=1).double().condition(torch.zeros(5, 1, dtype=F64))
    assert Stream(pf.Flow(pf.Chain([bound, pf.ActNorm((2, 12)).double()]), base).eval()).sample().shape == (5, 2)
    assert base.reach is None or stream._reach == base.reach + flow.chain.reach


@pytest.mark.full
@pytest.mark.parametrize("name", full_but(NETWORKS, "gru"))
def test_fits_in_the_units_of_the_data(name):
    """Trained, with a context and far units, which are those of channels; then as a stream."""
    torch.manual_seed(0)
    context = torch.randn(300, 1)
    x = 40 + 9 * (torch.randn(300, 2, 8).cumsum(-1) + context.unsqueeze(-1))
    made = ConvMADE((2, 8), "normal", hidden_channels=6, positions=False, context_dim=1, **NETWORKS[name])
    fit = pf.fit_density(made, x, context=context, standardize=True, steps=60, progress=False)
    law = fit.distribution
    assert law.loc.shape == (2, 1)
    want = law.log_prob(x[:5], context[:5])
    assert fit.history["train"][-1] > fit.history["train"][0] + 5
    got = Stream(law, (5,), context[:5]).observe(x[:5]).sum(-1)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    steps = step_log_prob(law, x[:5], context[:5], lengths=[8, 3, 8, 8, 1])
    torch.testing.assert_close(steps.sum(-1)[[0, 2, 3]], want[[0, 2, 3]], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(steps[1, :3], step_log_prob(law, x[1], context[1])[:3], rtol=1e-3, atol=1e-3)
    assert (steps[1, 3:] == 0).all() and (steps[4, 1:] == 0).all()
    scale, double = law.scale.double(), copy.deepcopy(law).double()
    x, context = x[:5].double(), context[:5].double()
    inner = double.module.log_prob((x - double.loc) / scale, (context - double.context_loc) / double.context_scale)
    torch.testing.assert_close(double.log_prob(x, context), inner - 8 * scale.log().sum())


@pytest.mark.parametrize("name", full_but(NETWORKS, "attention"))
def test_streams_can_be_pickled_and_forecast(name):
    made = shaken(name, (2, 4), "normal", context_dim=1)
    context = context_of(made, 3)
    stream = Stream(made, (3,), context)
    x = torch.randn(3, 2, 9, dtype=F64)
    stream.observe(x)
    other = pickle.loads(pickle.dumps(stream))
    pyro.set_rng_seed(1)
    ahead = stream.forecast(3, 2)
    assert ahead.shape == (2, 3, 2, 3) and stream.steps == 9
    pyro.set_rng_seed(1)
    assert torch.equal(other.forecast(3, 2), ahead)
    # The forecast's first step, by hand: a normal with the parameters of the next step.
    long = made.at_length(10)
    drawn = stream.forecast(1, 4000)[..., 0]
    loc = long.params(torch.cat((x, x[..., :1]), -1), context).view(3, 2, 10, 2)[:, 0, -1, 0]
    assert ((drawn[:, :, 0].mean(0) - loc).abs() < 5 * drawn[:, :, 0].std(0) / 4000**0.5).all()


# Lossless compression.


@pytest.mark.parametrize(
    "name, event", [("gru", (2, 4)), ("window", (2, 5)), ("attention", (2, 2, 2)), ("conv", (2, 4))]
)
def test_codecs_restore_all(name, event, monkeypatch):
    plain(monkeypatch)
    head = MixedHead([(LogisticMixtureHead(9, 2), [0]), (CategoricalHead(4), [1])])
    made = shaken(name, event, head, dtype=torch.float32, context_dim=1)
    context = torch.randn(30, 1)
    x = made.sample((), context).long()
    codec = Codec(made)
    data = codec.encode(x, context)
    assert torch.equal(codec.decode(data, context), x)
    bound = float(codec.bits(x, context).sum())
    with torch.no_grad():
        want = made.double().log_prob(x, context.double()).sum() / -math.log(2)
    torch.testing.assert_close(bound, float(want))
    assert len(data) <= 1.01 * bound / 8 + 64


def test_a_codec_of_another_length(monkeypatch):
    plain(monkeypatch)
    made = shaken("gru", (1, 5), CategoricalHead(4)).at_length(23)
    x = made.sample((30,)).to(torch.uint8)
    data = Codec(made).encode(x)
    assert torch.equal(Codec(copy.deepcopy(made)).decode(data), x)


# Shapes, kinds, and torch.


@pytest.mark.parametrize(("dtype", "default"), [(torch.float32, F64), (F64, torch.float32)])
@pytest.mark.parametrize("name", full_but(["gru", "attention", "window"], "gru", "window"))
def test_the_dtype_that_is_not_the_default(name, dtype, default, default_dtype):
    default_dtype(default)
    for channels, head in (HEADS["classes"], HEADS["mixed"]):
        made = shaken(name, (channels, 6), head, 0.1, dtype, context_dim=2)
        context, x, logp = keeps_dtype(made, dtype)
        stream = Stream(made, (5,), context)
        torch.testing.assert_close(stream.observe(x).sum(-1), logp, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", full_but(["gru", "attention", "window"], "gru", "window"))
def test_batches_contexts_and_copies(name):
    made = shaken(name, (2, 4), "normal", context_dim=2)
    context = context_of(made, 4)
    x = made.sample((3, 2), context)
    logp = made.log_prob(x, context)
    assert x.shape == (3, 2, 4, 2, 4) and logp.shape == (3, 2, 4)
    for index in itertools.product(range(3), range(2), range(4)):
        torch.testing.assert_close(made.log_prob(x[index], context[index[-1]]), logp[index])
    assert made.sample((0, 2), context).shape == (0, 2, 4, 2, 4)
    assert made.log_prob(x[:0], context).shape == (0, 2, 4)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other.log_prob(x, context), logp)
    logp.sum().backward()
    for key, parameter in made.named_parameters():
        assert parameter.grad.abs().sum() > 0 and parameter.is_contiguous(), key


@pytest.mark.parametrize("name", full_but(["gru", "two grus", "attention", "window"], "gru", "window"))
def test_functions_of_torch(name):
    """Batches, second derivatives and forward mode agree with plain calls."""
    made = shaken(name, (2, 3), "normal")
    x = torch.randn(4, 2, 3, dtype=F64)
    torch.testing.assert_close(torch.func.vmap(lambda x: made.score(x, None))(x), made.log_prob(x))
    want = torch.autograd.functional.hessian(lambda x: made.score(x, None), x[0])
    torch.testing.assert_close(torch.func.hessian(lambda x: made.score(x, None))(x[0]), want)
    with torch.no_grad():  # another kernel of attention
        plainly = made.params(x)
    torch.testing.assert_close(plainly, made.params(x), rtol=0, atol=1e-10)


@pytest.mark.full
@pytest.mark.parametrize("name", ["gru", "attention"])
def test_learns_what_is_past(name):
    """Three random bits, and then their repetitions: three bits of entropy in place of twelve."""
    torch.manual_seed(0)
    x = torch.randint(2, (500, 1, 3)).float().repeat(1, 1, 4)
    made = ConvMADE((1, 12), network=name, hidden_channels=16)
    pf.fit_density(made, x, steps=400, lr=1e-2, progress=False)
    with torch.no_grad():
        assert -made.log_prob(x).mean() < 4 * math.log(2)
    drawn = made.sample((200,))
    assert (drawn[..., 3:] == drawn[..., :-3]).float().mean() > 0.95


# Hostile input.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"network": "lstm"}, "network to be 'conv', 'gru' or 'attention'"),
        ({"network": "gru", "kernel_size": 3}, 'kernel_size with network="conv" only'),
        ({"network": "attention", "dilations": 2}, 'dilations with network="conv" only'),
        ({"window": 4}, 'window with network="attention" only'),
        ({"network": "gru", "num_heads": 2}, 'num_heads with network="attention" only'),
        (
            {"network": "attention", "num_heads": 5},
            "num_heads to divide hidden_channels 64 into heads of at least 2 numbers, got 5",
        ),
        ({"network": "attention", "hidden_channels": 6, "num_heads": 6}, "heads of at least 2 numbers, got 6"),
        ({"network": "attention", "window": 0}, "window to be an integer >= 1"),
        ({"network": "gru", "num_layers": 0}, "num_layers to be an integer >= 1"),
        ({"network": "gru", "hidden_channels": 1}, "hidden_channels to be at least the number of channels 2"),
    ],
)
def test_wrong_options(options, words):
    refuses(ValueError, words, ConvMADE, (2, 9), **options)


def test_wrong_lengths():
    made, x = shaken("gru", (2, 6), "normal"), torch.zeros(3, 2, 6, dtype=F64)
    for lengths in ([0, 1, 2], [1, 7, 2], [1.0, 2.0, 3.0], [True, True, False], [-1, 2, 3]):
        refuses(ValueError, "lengths to be integers from 1 to 6", made, lengths=lengths)
    refuses(ValueError, r"broadcast to the batch \(3,\), one for each series", made.log_prob, x, lengths=[1, 2])
    other = shaken("gru", (2, 6), "normal", context_dim=1)
    refuses(ValueError, r"broadcast to the batch \(4,\)", other, torch.zeros(4, 1, dtype=F64), lengths=[1, 2])
    refuses(NotImplementedError, "at_length", made(lengths=[3, 2])._pieces, [0])
    image = shaken("gru", (1, 2, 3), "normal")
    refuses(ValueError, r"lengths are of series \(C, T\)", image, lengths=[2])
    refuses(ValueError, r"a model of series \(C, T\)", image.at_length, 4)
    refuses(ValueError, "times to be an integer >= 1", made.at_length, 0)


@pyro.validation_enabled(True)
def test_wrong_streams():
    refuses(ValueError, "positions=False", Stream, shaken("conv", (1, 6), positions=True))
    listed = shaken("gru", (1, 3), CategoricalHead([2, 3, 4]))
    assert not listed.shared_over_time
    refuses(ValueError, "a head of the 1 channels", Stream, listed)
    refuses(ValueError, "a head of the 1 channels", listed.at_length, 4)
    refuses(ValueError, r"a model of series \(C, T\)", Stream, shaken("attention", (1, 2, 3)))
    refuses(TypeError, "or a ConvMADE, got MADE", Stream, pf.MADE(4))
    stream = Stream(shaken("gru", (2, 6), CategoricalHead([2, 4])))
    refuses(ValueError, "categories 0 to 1 in dimension 0, got 3", stream.observe, torch.tensor([3, 3]))
    refuses(ValueError, "finite", stream.observe, torch.tensor([math.nan, 0.0], dtype=F64))
    refuses(ValueError, "one step of shape", stream.observe, torch.zeros(3, dtype=F64))
    refuses(TypeError, "float32", Stream(shaken("gru", (1, 6))).observe, torch.zeros(1))
    assert stream.steps == 0 and stream.observe(torch.tensor([1, 3])).isfinite()
    refuses(ValueError, "call it with a context", Stream, shaken("gru", (1, 6), context_dim=2))
