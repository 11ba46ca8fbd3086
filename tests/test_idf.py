"""Integer discrete flows: exact bijections of whole numbers, masses that add up to 1, and their files."""

import copy
import itertools

import numpy as np
import pyro
import pytest
import torch
from asserts import output_of, refuses
from cases import full_but, reload, shake, train
from torch import nn
from torch.distributions import constraints

import pyro_flows as pf
from pyro_flows.distributions import IntegerLogistics
from pyro_flows.infer import Codec
from pyro_flows.infer.compression import container
from pyro_flows.infer.compression import integers as coding
from pyro_flows.nets import FixedPointNet
from pyro_flows.transforms import IntegerCoupling, IntegerSplit, Squeeze

SMALL = {"hidden_dims": (16,), "num_layers": 2}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SHAPES = ((5,), (2, 8), (1, 8, 8))
TOP = 2**52


def made(shape, scale=0.5, **options):
    """A flow with parameters moved far away."""
    torch.manual_seed(0)
    return shake(pf.Flow(pf.idf(shape, **{**SMALL, **options})), scale)


def whole(*shape, size=300):
    return torch.randint(-size, size, shape)


def in_pieces(call, value, size):
    with torch.no_grad():
        return torch.cat([call(part)[0] for part in value.split(size)])


def step(n):
    """Rows of two dependent counts: a number, and its double with a remainder."""
    first = torch.distributions.Poisson(4.0).sample((n,))
    return torch.stack((first, 2 * first + torch.randint(3, (n,))), -1).long()


# The network.


def by_integers(net, x, context=None):
    """The network by loops of 64-bit integers: what float64 must equal."""
    values = [(x.double() - net.center) * 2.0 ** (12 - net.exponent)]
    if context is not None:
        values.append((context.double() * 2**12)[(..., *[None] * net.space_dims)].expand(-1, -1, *x.shape[2:]))
    h = torch.cat([each.round().clamp(-(2**20), 2**20).long() for each in values], 1)
    h = h[(..., None, None)] if net.space_dims == 0 else h.unsqueeze(-2) if net.space_dims == 1 else h
    bits = 0
    for k, layer in enumerate(net.layers):
        h = (h.double() * 2.0**-bits).round().clamp(0, 2**20).long() if k else h
        bits, bound = layer.bits, layer.bound
        weight, bias = ((p.double().clamp(-bound, bound) * 2**bits).round().long() for p in (layer.weight, layer.bias))
        (down, right), (height, width) = layer.kernel, h.shape[-2:]
        out = (bias * 2**12)[:, None, None].repeat(len(h), 1, height, width)
        places = list(itertools.product(range(down), range(right)))
        for (k, (dy, dx)), y, z in itertools.product(enumerate(places), range(height), range(width)):
            above, left = y + dy - down // 2, z + dx - right // 2
            if 0 <= above < height and 0 <= left < width:
                out[..., y, z] += h[..., above, left] @ weight[k].T
        h = out
    return h.double() * 2.0 ** -(12 + bits)


@pytest.mark.parametrize("dtype", full_but(DTYPES, torch.float32))
@pytest.mark.parametrize(
    "space, context_dim, kernel_size",
    [((), 0, 3), ((), 2, 3), ((4,), 0, 3), ((3, 4), 2, 3), ((1, 1), 0, 3), ((2, 3), 0, 7)],
)
def test_network_is_that_of_integers(space, context_dim, kernel_size, dtype):
    torch.manual_seed(0)
    options = {"space_dims": len(space), "context_dim": context_dim, "kernel_size": kernel_size}
    net = FixedPointNet(3, 2, num_params=2, levels=17, hidden_dims=(6, 5), **options)
    shake(net, 1.0).to(dtype)
    x = whole(8, 3, *space).double()
    x[0], x[1] = TOP - 1, -TOP
    context = 3 * torch.randn(8, context_dim) if context_dim else None
    with torch.no_grad():
        out = net(x, context)
    want = by_integers(net, x, context).reshape(8, 2, 2, *space).movedim(2, -1)
    assert out.dtype == torch.float64 and torch.equal(out, want)
    assert torch.equal(net(x, context).detach(), out)  # the way with a graph
    assert (out != out[0]).any()


def test_network_stays_exact_with_weights_and_inputs_of_any_size():
    net = FixedPointNet(40, 3, hidden_dims=(50, 50), levels=256)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * 1e30)
    x = whole(30, 40, size=10**9).double()
    assert torch.equal(net(x), net(x.flip(0)).flip(0))
    exact = by_integers(net, x)[..., 0, 0]
    assert torch.equal(net(x).squeeze(-1), exact) and exact.abs().max() * 2**28 < 2**52


def test_gradient_takes_rounding_for_the_identity():
    torch.manual_seed(0)
    net = shake(FixedPointNet(3, 2, levels=4, hidden_dims=(8,)), 0.3).double()
    x = whole(6, 3, size=4).double().requires_grad_()

    def plain(x):
        first, last = net.layers
        h = torch.relu(((x - 1.5) / 2) @ first.weight[0].T + first.bias)
        return h @ last.weight[0].T + last.bias

    by_out = torch.randn(6, 2, dtype=torch.float64)
    inputs = [x, *net.parameters()]
    found = torch.autograd.grad((net(x).squeeze(-1) * by_out).sum(), inputs)
    for got, want in zip(found, torch.autograd.grad((plain(x) * by_out).sum(), inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)  # weights are rounded to 2 ** -16


# The bijection.


@pytest.mark.parametrize("dtype", full_but(DTYPES, torch.float32))
@pytest.mark.parametrize("num_parts", full_but((2, 4), 4))
@pytest.mark.parametrize("shape", full_but(SHAPES, (5,), (1, 8, 8)))
def test_inverse_is_exact_in_other_batches(shape, num_parts, dtype):
    flow = made(shape, num_parts=num_parts).to(dtype)
    x = whole(100, *shape)
    x[0], x[1] = TOP - 1, -TOP
    y = in_pieces(flow.chain.forward_and_ladj, x, 100)
    assert y.dtype == torch.float64 and (y != x).float().mean() > 0.5
    for size in (7, 1):
        assert torch.equal(in_pieces(flow.chain.inverse_and_ladj, y[:30], size).long(), x[:30])
    assert torch.equal(in_pieces(flow.chain.inverse_and_ladj, y, 99).long(), x)
    assert torch.equal(
        in_pieces(flow.chain.forward_and_ladj, in_pieces(flow.chain.inverse_and_ladj, x, 19), 300), x.double()
    )


INVERT = """
import sys, torch, pyro_flows as pf
torch.set_num_threads(int(sys.argv[1]))
shape, options, dtype, state, x, y = torch.load(sys.argv[2])
flow = pf.Flow(pf.idf(shape, **options)).to(dtype)
flow.load_state_dict(state)
rows = int(sys.argv[3])
with torch.no_grad():
    found = torch.cat([flow.chain.inverse_and_ladj(part)[0] for part in y[: 50 * rows].split(rows)])
assert torch.equal(found.long(), x[: len(found)])
print("equal", len(found))
"""


def elsewhere(path, threads, rows):
    assert output_of("-c", INVERT, threads, path, rows).startswith("equal")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2,), (1, 4, 4)])
def test_a_million_events_after_training_in_batches_threads_and_processes(shape, dtype, tmp_path):
    torch.manual_seed(0)
    options = {"num_layers": 3, "levels": 64, "hidden_dims": (32, 32)}
    flow = pf.Flow(pf.idf(shape, **options))
    shake(flow, 0.2)
    train(flow, torch.randint(64, (500, *shape)).cumsum(-1), 50, 1e-2)
    flow.to(dtype)
    x = torch.randint(-200, 300, (1_000_000, *shape))
    begun = torch.get_num_threads()
    for threads in (1, 2):  # of the way there, and others of the way back
        torch.set_num_threads(threads)
        y = in_pieces(flow.chain.forward_and_ladj, x, 1000)
        assert torch.equal(in_pieces(flow.chain.inverse_and_ladj, y, 10_000).long(), x)
        torch.set_num_threads(3 - threads)
        assert torch.equal(in_pieces(flow.chain.inverse_and_ladj, y[:21_000], 7).long(), x[:21_000])
        assert torch.equal(in_pieces(flow.chain.inverse_and_ladj, y[-3000:], 1).long(), x[-3000:])
    torch.set_num_threads(begun)
    torch.save((shape, options, dtype, flow.state_dict(), x, y), tmp_path / "flow.pt")
    elsewhere(tmp_path / "flow.pt", 2, 7)


@pytest.mark.full
def test_another_process_inverts_after_training(tmp_path):
    torch.manual_seed(0)
    flow = pf.Flow(pf.idf(2, **SMALL, levels=16))
    losses = train(flow, step(500), 40, 2e-2)
    assert losses[-1] < losses[0]
    x = whole(1000, 2)
    y = in_pieces(flow.chain.forward_and_ladj, x, 1000)
    torch.save(((2,), {**SMALL, "levels": 16}, torch.float32, flow.state_dict(), x, y), tmp_path / "flow.pt")
    elsewhere(tmp_path / "flow.pt", 2, 7)


def test_training_and_evaluation_are_one_map():
    flow = made((4,))
    x = whole(50, 4)
    with_graph = flow.chain.inverse_and_ladj(x)[0].detach()
    assert torch.equal(with_graph, in_pieces(flow.chain.eval().inverse_and_ladj, x, 50))


def test_floating_values_keep_their_dtype_and_integers_become_float64():
    flow = made((3,)).chain
    run = torch.no_grad()(flow.forward_and_ladj)
    x = whole(20, 3, size=30)
    for dtype in (torch.uint8, torch.int32, torch.bool):
        small = (x % 2).to(dtype)
        assert torch.equal(run(small)[0], run(small.double())[0])
    for dtype in (torch.float32, torch.float64):
        y, ladj = run(x.to(dtype))
        assert y.dtype == ladj.dtype == dtype and torch.equal(y.double(), run(x)[0]) and not ladj.any()
    large = torch.full((8, 3), 2.0**24) + torch.arange(-8.0, 0.0)[:, None]
    assert (run(large.double())[0] >= 2**24).any()  # a shift leads where float32 holds even numbers only
    refuses(ValueError, "torch.float32 cannot hold exactly; give values as integers or in float64", run, large)


def test_fresh_flows_are_the_identity():
    for shape in SHAPES:
        x = whole(9, *shape)
        chain = pf.idf(shape)
        assert torch.equal(chain(x), x.double()) and torch.equal(chain.inv(x), x.double())


def test_orders_of_channels_are_saved():
    torch.manual_seed(0)
    flow = made((1, 8, 8))
    torch.manual_seed(1)
    other = pf.Flow(pf.idf((1, 8, 8), **SMALL))
    reload(flow, other)
    x = whole(5, 1, 8, 8)
    assert torch.equal(flow.chain(x), other.chain(x))
    torch.testing.assert_close(flow.log_prob(x), other.log_prob(x), rtol=0, atol=0)


def test_couplings_move_each_part_given_all_others():
    for parts in (2, 4):
        chain = pf.idf(8, num_layers=1, num_parts=parts)
        moved = [part.order[part.num_kept :].tolist() for part in chain]
        assert len(chain) == parts and sorted(itertools.chain(*moved)) == list(range(8))


# The distribution.


def grid(low, high):
    side = torch.arange(low, high)
    return torch.cartesian_prod(side, side)


@pytest.mark.parametrize("context_dim", [0, 2])
def test_masses_add_up_to_one(context_dim):
    torch.manual_seed(0)
    flow = shake(pf.Flow(pf.idf(2, levels=16, hidden_dims=(8,), context_dim=context_dim, num_layers=2)).double(), 0.2)
    with torch.no_grad():
        flow.base.bias[..., 6:] = -2.0  # scales of about a number
    context = torch.randn(2, dtype=torch.float64) if context_dim else None
    # A box of the base, of known tails, and its image: all that the flow sends there.
    base = grid(-150, 170)
    law = next(iter(flow.base.laws(base[:1].double(), None if context is None else context[None])))[1]
    ends = torch.tensor([-150.0, 170.0], dtype=torch.float64)
    outside = law.below(ends[:1].expand(1, 2)) + law._replace(loc=-law.loc).below(1 - ends[1:].expand(1, 2))
    assert outside.sum() < 1e-12
    with torch.no_grad():
        images = flow.chain(base.double(), context)
        masses = flow.log_prob(images, context).exp()
    assert len(images.unique(dim=0)) == len(base)
    assert abs(masses.sum() - 1) < 1e-10


@pytest.mark.full
def test_masses_of_a_box_of_data_after_training():
    torch.manual_seed(0)
    flow = pf.Flow(pf.idf(2, levels=16, hidden_dims=(16,), num_layers=2)).double()
    flow.base.fit_marginals(step(500))
    train(flow, step(500), 60, 2e-2)
    with torch.no_grad():
        assert abs(flow.log_prob(grid(-400, 400)).exp().sum() - 1) < 1e-10
        assert -flow.log_prob(step(2000)).mean() < 3.75


def test_distribution_of_whole_numbers():
    flow = made((3,), 0.1, levels=8)
    distribution = flow()
    x = distribution.sample((500,))
    assert x.dtype == torch.float64 and torch.equal(x, x.round())
    assert distribution.support.is_discrete and bool(distribution.support.check(x).all())
    assert not bool(distribution.support.check(x + 0.5).any())
    assert not distribution.has_rsample and distribution.event_shape == (3,)
    base = flow.chain.inv(x)
    torch.testing.assert_close(flow.log_prob(x), flow.base().log_prob(base))
    torch.testing.assert_close(distribution.log_prob(x.long()), flow.log_prob(x))
    torch.testing.assert_close(distribution.expand((2, 500)).log_prob(x), flow.log_prob(x).expand(2, 500))
    refuses(NotImplementedError, "no reparameterized draws", flow.rsample, (2,))
    assert torch.isfinite(pf.bits_per_dim(flow.log_prob(x), (3,))).all()


def test_queries_of_parts_are_refused_in_words():
    flow = pf.Flow(pf.idf(2, **SMALL))
    refuses(NotImplementedError, "count among draws", flow().marginal, [0])
    refuses(NotImplementedError, "count among draws", flow().conditional, [0], torch.zeros(1, 1))
    assert flow().entropy() > 0


def test_draws_follow_the_masses():
    torch.manual_seed(0)
    flow = shake(pf.Flow(pf.idf(2, levels=4, hidden_dims=(8,), num_layers=1)), 0.3)
    x = flow.sample((20_000,))
    places, counts = x.unique(dim=0, return_counts=True)
    with torch.no_grad():
        expected = 20_000 * flow.log_prob(places).exp()
    often = expected > 50
    assert often.sum() > 10
    z = (counts - expected)[often] / expected[often].sqrt()
    assert z.abs().max() < 5 and z.square().mean() < 2


def test_half_that_leaves_is_drawn_given_the_other():
    torch.manual_seed(0)
    base = shake(IntegerLogistics((1, 4, 4), 2, levels=8, num_splits=1, hidden_dims=(8,)), 0.5)
    x = base().sample((6,))
    groups = [(at, law) for at, law in base.laws(x.flatten(1))]
    assert sorted(torch.cat([at for at, _ in groups]).tolist()) == list(range(16))
    kept, left = (at for at, _ in groups)
    squeezed = Squeeze((1, 4, 4)).inverse_and_ladj(torch.arange(16.0).view(1, 1, 4, 4))[0]
    assert torch.equal(squeezed[0, :2].flatten().long(), kept)
    other = x.flatten(1).clone()
    other[:, left] += 3
    torch.testing.assert_close([*base.laws(other)][1][1].loc, groups[1][1].loc, rtol=0, atol=0)
    other[:, kept] += 3
    assert not torch.equal([*base.laws(other)][1][1].loc, groups[1][1].loc)
    by_hand = sum(law.log_mass(x.flatten(1)[:, at]).sum(-1) for at, law in groups)
    torch.testing.assert_close(base().log_prob(x), by_hand)


def test_far_numbers_have_finite_masses_and_gradients():
    flow = made((2,), 0.2)
    score = flow.log_prob(torch.tensor([[TOP - 1, -TOP], [10**6, 0]]))
    score.sum().backward()
    assert score.isfinite().all() and all(p.grad.isfinite().all() for p in flow.parameters() if p.grad is not None)


def test_site_of_a_program_and_context():
    flow = made((2,), 0.1, levels=8, context_dim=1)
    context = torch.linspace(-1, 1, 4)[:, None]

    def model(data=None):
        pyro.module("flow", flow)
        with pyro.plate("rows", 4):
            return pyro.sample("x", flow(context), obs=data)

    trace = pyro.poutine.trace(model).get_trace(whole(4, 2, size=5))
    torch.testing.assert_close(trace.log_prob_sum(), flow.log_prob(trace.nodes["x"]["value"], context).sum())
    assert model().shape == (4, 2) and flow.sample((3,), context).shape == (3, 4, 2)
    assert not torch.equal(
        flow.log_prob(torch.zeros(4, 2), context[:1].expand(4, 1)), flow.log_prob(torch.zeros(4, 2), context)
    )
    base = flow.base(context).expand((3, 4))
    assert base.sample().shape == (3, 4, 2) and base.log_prob(torch.zeros(2)).shape == (3, 4)


# Fits.


@pytest.mark.parametrize("kind", full_but(["tensor", "numpy", "frame"], "tensor"))
def test_fit_takes_whole_numbers_as_they_are(kind):
    rows = step(300)
    data = {"tensor": rows, "numpy": rows.numpy().astype(np.int32)}.get(kind)
    if kind == "frame":
        data = pytest.importorskip("pandas").DataFrame(rows.numpy())
    torch.manual_seed(0)
    flow = pf.Flow(pf.idf(2, **SMALL, levels=16))
    flow.base.fit_marginals(rows)
    before = flow.log_prob(rows).mean()
    fit = pf.fit_density(flow, data, steps=30, lr=1e-2, progress=False)
    assert fit.distribution is flow and fit.validation > before
    torch.testing.assert_close(fit.log_prob(data), flow.log_prob(rows).detach())
    assert fit.sample((3,)).shape == (3, 2)


def test_fit_tells_of_numbers_far_from_the_levels():
    far = step(100) + torch.tensor([0, 100_000])
    with pytest.warns(UserWarning, match="column 1 is not standardized, and far from .* subtract whole numbers"):
        pf.fit_density(pf.idf(2, **SMALL, levels=16), far, steps=1, progress=False)


def test_fit_standardizes_contexts_only():
    context = 500 + 100 * torch.randn(300, 1)
    rows = torch.distributions.Poisson(context / 50).sample()
    fit = pf.fit_density(pf.idf(1, **SMALL, context_dim=1, levels=32), rows, context=context, steps=20, progress=False)
    assert fit.distribution.context_scale > 50
    again = fit.distribution.log_prob(rows, context)
    torch.testing.assert_close(fit.log_prob(rows, context), again.detach())


@pytest.mark.full
def test_context_is_learned():
    torch.manual_seed(0)
    context = torch.rand(1500, 1)
    rows = torch.distributions.Poisson(1 + 40 * context).sample().long()
    flow = pf.Flow(pf.idf(1, levels=64, context_dim=1, hidden_dims=(32,), num_layers=2))
    flow.base.fit_marginals(rows)
    fit = pf.fit_density(flow, rows, context=context, steps=800, lr=1e-2, progress=False)
    exact = torch.distributions.Poisson(1 + 40 * context).log_prob(rows).mean()
    assert exact - fit.log_prob(rows, context).mean() < 0.1


def test_fit_refuses_fractions_and_what_is_real():
    flow = pf.Flow(pf.idf(2, **SMALL))
    refuses(ValueError, "rows of data", pf.fit_density, flow, torch.rand(50, 2), steps=1, progress=False)
    refuses(
        ValueError, "nothing to standardize", pf.fit_density, flow, step(50), standardize=True, steps=1, progress=False
    )


# Files.


@pytest.fixture
def constriction():
    pytest.importorskip("constriction")


@pytest.mark.parametrize("shape, context_dim", [((5,), 0), ((5,), 2), ((2, 8), 0), ((1, 8, 8), 2)])
def test_files_restore_every_number(shape, context_dim, constriction):
    flow = made(shape, 0.05, context_dim=context_dim, levels=32)
    context = torch.randn(40, context_dim) if context_dim else None
    x = flow.sample(() if context_dim else (40,), context).long()
    codec = Codec(flow)
    data = codec.encode(x, context)
    assert torch.equal(codec.decode(data, context), x)
    bound = codec.bits(x, context).sum() / 8
    assert bound < len(data) < 1.01 * bound + 60
    torch.testing.assert_close(
        -codec.bits(x, context) * np.log(2), flow.log_prob(x, context).double().detach(), rtol=1e-4, atol=1e-3
    )
    small = (x % 50).to(torch.uint8).view(2, 20, *shape)
    several = None if context is None else context.view(2, 20, -1)
    again = codec.decode(codec.encode(small, several), several)
    assert again.dtype == torch.uint8 and torch.equal(again, small)


def test_files_of_far_numbers_and_of_none(constriction):
    flow = made((3,), 0.1)
    codec = Codec(flow)
    x = torch.tensor([[TOP - 1, -TOP, 0], [10**6, -(10**9), 7], [3, 2, 1]])
    assert torch.equal(codec.decode(codec.encode(x)), x)
    noise = torch.randint(-TOP, TOP, (50, 3))
    data = codec.encode(noise)
    assert torch.equal(codec.decode(data), noise) and len(data) <= 50 * 24 + 60
    assert codec.decode(codec.encode(x[:0])).shape == (0, 3)
    refuses(ValueError, r"whole numbers from -2 \*\* 52", codec.encode, torch.tensor([[TOP, 0, 0]]))
    refuses(ValueError, r"whole numbers from -2 \*\* 52", codec.encode, torch.tensor([[-TOP - 1, 0, 0]]))
    refuses(TypeError, "expected a tensor of integers", codec.encode, x.double())
    assert codec.levels is None and "all whole numbers" in repr(codec)


def test_files_in_pieces_and_by_another_codec(constriction, monkeypatch):
    flow = made((4,), 0.1)
    x = flow.sample((23,)).long()
    data = Codec(flow).encode(x)
    double = copy.deepcopy(flow).double()
    assert torch.equal(Codec(double).decode(data), x)
    monkeypatch.setattr("pyro_flows.infer.compression.codec.MOST_ROWS", 5)
    pieces = Codec(flow).encode(x)
    assert len(container.unpack(pieces)[1]) == 5 and torch.equal(Codec(flow).decode(pieces), x)


def test_other_arithmetic_within_the_tolerance(constriction, monkeypatch):
    flow = made((30,), 0.05)
    x = flow.sample((40,)).long()
    monkeypatch.setattr(coding, "SLACK", 2.0**-5)  # so that it matters often
    data = Codec(flow).encode(x, verify=False)
    ((piece, _),) = container.unpack(data)[1]
    assert len(piece.places) > 50
    plain = coding._below

    def noisy(parts, border):
        below = plain(parts, border)
        return below + 0.9 * 2.0**-5 * (2 * torch.rand_like(below) - 1)

    monkeypatch.setattr(coding, "_below", noisy)
    assert torch.equal(Codec(flow).decode(data), x)


def test_damaged_files_and_other_models_are_refused(constriction):
    flow = made((4,), 0.1)
    codec, x = Codec(flow), flow.sample((20,)).long()
    data = codec.encode(x)
    refuses(ValueError, "those of another", Codec(made((4,), 0.2)).decode, data)
    header, pieces = container.unpack(data)
    for at in range(0, len(data), 5):
        refuses(ValueError, "Codec", codec.decode, data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    torch.manual_seed(0)
    for words in ([], [2**32 - 1] * 40, torch.randint(2**32, (40,)).tolist()):
        forged = pieces[0][0]._replace(words=np.array(words, np.uint32))
        refuses(ValueError, "Codec", codec.decode, container.pack(header, [(forged, False)]))
        refuses(ValueError, "Codec", codec.decode, container.pack(header, [(forged, True)]))


def test_codec_refuses_other_bases_and_weights_that_are_not_finite(constriction):
    counts = torch.distributions.Independent(torch.distributions.Geometric(torch.full((2,), 0.5)), 1)
    refuses(ValueError, "IntegerLogistics", Codec, pf.Flow(pf.idf(2, **SMALL), counts))
    flow = made((2,), 0.1)
    with torch.no_grad():
        flow.base.bias[0, 0] = torch.nan
    refuses(FloatingPointError, "not finite", Codec(flow).encode, whole(3, 2))


# Hostile input.


@pytest.mark.parametrize(
    "value, told",
    [
        ([[0.5, 1.0]], "got 0.5 at \\(0, 0\\)"),
        ([[1.0, float("nan")]], "got nan"),
        ([[1.0, float("inf")]], "got inf"),
        ([[2.0**52, 0.0]], "subtract a constant"),
        ([[-(2.0**60), 0.0]], "1 such in 2"),
    ],
)
def test_values_that_are_not_whole_are_refused(value, told):
    flow = pf.Flow(pf.idf(2, **SMALL))
    x = torch.tensor(value, dtype=torch.float64)
    for call in (flow.chain, flow.chain.inv, flow.log_prob, flow().log_prob):
        refuses(ValueError, told, call, x)
    refuses(ValueError, "whole numbers from", flow.log_prob, torch.tensor([[2**62, 0]]))


def test_other_hostile_values():
    flow = pf.Flow(pf.idf(2, **SMALL))
    refuses(TypeError, "whole numbers, got torch.complex64", flow.chain, torch.zeros(1, 2, dtype=torch.complex64))
    refuses(ValueError, r"last dimension 2 \(input_dim\)", flow.log_prob, whole(3, 3))
    refuses(TypeError, "expected a tensor", flow.log_prob, [[1, 2]])
    assert flow.log_prob(torch.zeros(0, 2)).shape == (0,)
    assert flow.log_prob(torch.tensor([3, 4], dtype=torch.uint8)).shape == ()


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: pf.idf(3, num_parts=4), "at most the number of channels, 3, got 4"),
        (lambda: pf.idf(3, num_parts=1), "num_parts to be an integer >= 2"),
        (lambda: pf.idf(3, num_scales=2), "num_scales is for images and series"),
        (lambda: pf.idf((1, 6, 6), num_scales=2), "can be halved 2 times"),
        (lambda: pf.idf((1, 2, 2, 2)), r"shape \(C, H, W\) or \(C, T\)"),
        (lambda: pf.idf(3, levels=1), "levels to be an integer >= 2"),
        (lambda: pf.idf(3, hidden_dims=(0,)), "hidden_dims to be positive"),
        (lambda: IntegerCoupling(3, [True, True, True]), "keep some dimensions and move others"),
        (lambda: IntegerCoupling(3, [True, False]), r"boolean mask of shape \(3,\)"),
        (lambda: IntegerSplit(pf.idf((1, 2, 2), num_layers=1), (3, 2, 2)), "even number of channels"),
        (lambda: IntegerSplit(pf.glow((1, 4, 4)), (2, 4, 4)), "an integer flow of half"),
        (lambda: pf.Chain([pf.idf(3), pf.maf(3)]), "all map whole numbers, or all real ones"),
        (lambda: pf.Flow(pf.idf(3), pf.DiagonalNormal(3)), "maps whole numbers, but the base has the support"),
        (lambda: pf.Flow(pf.idf(3), IntegerLogistics(3, context_dim=2)), "chain's context_dim=0 or none, got 2"),
        (lambda: pf.Dequantized(pf.Flow(pf.idf((1, 4, 4)))), "a flow onto intensities"),
        (lambda: IntegerLogistics((1, 6, 6), num_splits=2), "sides of even size"),
    ],
)
def test_settings_that_do_not_fit_are_refused(call, told):
    refuses(ValueError, told, call)


def test_rearrangements_join_integer_chains():
    chain = pf.Chain([pf.Permutation(4), pf.Chain([pf.Permutation(4)]), pf.idf(4, **SMALL).inv])
    assert chain.discrete and isinstance(chain.codomain, constraints.independent)
    x = whole(6, 4)
    assert torch.equal(chain.inv(chain(x)), x.double())
    assert pf.Chain([pf.Permutation(4)]).codomain is pf.Permutation(4).codomain
    assert isinstance(pf.Flow(chain).base, IntegerLogistics) and isinstance(chain, nn.Module)
