"""Causal flows of series: triangular in time, step by step as in one piece, forecasts, and units by channel."""

import copy
import math
import pickle

import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from asserts import comes_back, leads_back, refuses, rises
from cases import Calls, full_but, scaled, shake, train
from oracles import jacobians
from test_mint import check_layer, layer, longest_chains
from torch.distributions import AffineTransform, ExpTransform

import pyro_flows as pf
from pyro_flows.infer import Codec, Stream, pixel_scores, standardized, step_log_prob
from pyro_flows.inverse import raster
from pyro_flows.transforms import CausalAutoregressive
from pyro_flows.transforms.mint import attention
from pyro_flows.transforms.mint import map as mint_map
from pyro_flows.transforms.mint.attention import Attention, AttentionNet, AttentionSteps
from pyro_flows.transforms.mint.orders import as_image
from pyro_flows.transforms.mint.slopes import Weights
from pyro_flows.univariate import Shift

DOUBLE = torch.float64


def mint(shape, **options):
    return pf.mintnet(shape, causal=True, **{"num_layers": 2, "num_groups": 3, "hidden_dims": (4,), **options})


def maf(shape, **options):
    return pf.causal_maf(shape, **{"hidden_channels": 6, "num_convolutions": 2, **options})


def iaf(shape, context_dim=0):
    options = {"hidden_channels": 4, "num_convolutions": 2, "context_dim": context_dim}
    return pf.Chain([CausalAutoregressive(shape, pf.Spline(3), fast="sampling", **options), pf.ActNorm(shape)])


def attending(shape, **options):
    return mint(shape, **{"attention": 2, "head_dim": 4, "num_layers": 1, **options})


BUILDERS = {
    "mint": mint,
    "attention": attending,
    "window": lambda shape, **o: attending(shape, **{"window": 4, "dilations": 1, **o}),
    "maf": maf,
    "spline": lambda shape, **o: maf(shape, univariate=pf.Spline(3), **o),
    "iaf": iaf,
}


def far(chain, by=0.2):
    """With parameters away from where they start."""
    chain = shake(chain, by).double().eval()
    for part in chain.modules():
        if isinstance(part, pf.ActNorm):
            part.initialized.fill_(True)
    return chain


def three_times(chain):
    """With all parameters, moved a little, three times as large."""
    return scaled(far(chain, 0.1), 3)


def trained(chain):
    """After some steps on series that wander."""
    data = torch.randn(64, *chain.event_shape, dtype=DOUBLE).cumsum(-1).tanh() * 2 + 1
    train(pf.Flow(chain).double(), data, 30, 0.02)
    return chain.eval()


def by_time(matrix, channels, times):
    places = torch.arange(channels * times).view(channels, times).T.flatten()
    return matrix[:, places][:, :, places]


def check_triangular(chain, slack=1.0):
    """T1: data to base, by time and channel; judged in units of the largest slope where parameters are large."""
    channels, times = chain.event_shape
    y = torch.randn(2, channels, times, dtype=DOUBLE, requires_grad=True)
    context = torch.randn(2, chain.context_dim, dtype=DOUBLE) if chain.context_dim else None
    x, ladj = chain.inverse_and_ladj(y, context)
    full = by_time(jacobians(x, y), channels, times)
    rises(full, ladj)
    if not isinstance(chain, pf.Chain):
        own = chain.log_slopes(y, context).exp().transpose(1, 2).flatten(1)
        torch.testing.assert_close(own, full.diagonal(dim1=1, dim2=2), rtol=1e-12, atol=1e-12)
    if chain.reach is not None:
        lag = (torch.arange(times)[:, None] - torch.arange(times)).repeat_interleave(channels, 0)
        lag = lag.repeat_interleave(channels, 1)
        assert (full[:, lag > chain.reach] == 0).all()
        if times > chain.reach:
            assert (full[:, lag == chain.reach] != 0).any()


# The maps


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_dilated_mint_layers_are_triangular(channels, dilation):
    options = {"order": "position", "shared_scale": True, "dilation": dilation}
    for context_dim in (0, 2):
        made = layer((channels, 14 if dilation > 2 else 9), context_dim=context_dim, hidden_dims=(4,), **options)
        check_layer(made)
        check_triangular(made)
        assert made.reach == 3 * dilation
        assert torch.equal(
            made.waves,
            longest_chains(as_image("test", made.event_shape), made.kernel, "position", True, dilation)[:, 0],
        )


@pytest.mark.full
@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_causal_flows_are_triangular(name, channels):
    for context_dim in (0, 2):
        chain = BUILDERS[name]((channels, 6), context_dim=context_dim)
        check_triangular(far(copy.deepcopy(chain), 0.3))
        check_triangular(three_times(copy.deepcopy(chain)))
    check_triangular(trained(BUILDERS[name]((channels, 6))))
    check_triangular(far(CausalAutoregressive((channels, 9), hidden_channels=5, num_convolutions=2), 0.5))


@pytest.mark.parametrize(
    "window, kernel_size, dilation, reach", [(2, 3, 1, 3), (4, 3, 1, 5), (5, 5, 1, 7), (4, 1, 3, 5)]
)
def test_reach_of_windows(window, kernel_size, dilation, reach):
    """The last key's own neighbours are seen, too, by a kernel of three at least."""
    made = layer(
        (2, 10),
        order="position",
        shared_scale=True,
        attention=2,
        head_dim=4,
        window=window,
        kernel_size=kernel_size,
        dilation=dilation,
    )
    assert made.reach == reach
    check_triangular(made)


def test_reach_of_chains():
    assert mint((2, 50)).reach == 3 * (1 + 2 + 4 + 8)
    assert mint((2, 50), dilations=3, kernel_size=5, act_norm=True).reach == 4 * 6 * 3
    assert maf((1, 9), num_convolutions=3, act_norm=True).reach == 2 * 2 * (1 + 2 + 4)
    assert maf((1, 9), kernel_size=2, dilations=(1, 3)).reach == 2 * (1 + 3)
    assert pf.Chain([maf((1, 9)), ExpTransform()]).reach == 12
    for other in (iaf((1, 9)), pf.mintnet((1, 9)), pf.glow((2, 4), num_scales=1), maf((1, 9)).inv, pf.maf((1, 9))):
        assert other.reach is None
    assert pf.ActNorm((2, 3)).inv.reach == 0 and pf.ActNorm((2, 3, 4)).reach is None


def rounding(move, at):
    """What roundings of ``at`` may move its image by, through the slopes there."""
    at = at.detach().requires_grad_()
    moved = jacobians(move(at)[0], at).abs() @ at.detach().abs().flatten(1).unsqueeze(-1)
    return 100 * torch.finfo(DOUBLE).eps * moved.view(at.shape)


@pytest.mark.parametrize("name", full_but(BUILDERS, "mint", "maf"))
def test_round_trips_of_large_parameters(name):
    """T4, three times as large; autoregressive layers amplify from step to step, so they are judged by their slopes."""
    chain = three_times(BUILDERS[name]((2, 12)))
    for scale in (1.0, 4.0):
        x = scale * torch.randn(20, 2, 12, dtype=DOUBLE)
        for move, back in (
            (chain.forward_and_ladj, chain.inverse_and_ladj),
            (chain.inverse_and_ladj, chain.forward_and_ladj),
        ):
            y, ladj = move(x)
            again, minus = back(y)
            slack = 0.0 if name in ("mint", "attention", "window") else rounding(back, y)
            assert ((again - x).abs() <= 1e-8 * (1 + x.abs()) + slack).all()
            if name in ("mint", "attention", "window"):
                torch.testing.assert_close(minus, -ladj, rtol=1e-8, atol=1e-8)


@pytest.mark.full
@pytest.mark.parametrize("name", full_but(BUILDERS, "attention"))
def test_round_trips(name):
    """T4: trained, from the base's values and from four times as far; float64 and float32."""
    chain = trained(BUILDERS[name]((2, 12)))
    single = copy.deepcopy(chain).float()
    for scale in (1.0, 4.0):
        x = scale * torch.randn(20, 2, 12, dtype=DOUBLE)
        comes_back(chain, x)
        leads_back(chain, x)
        y = single(x.float())
        back = single.inverse_and_ladj(y)[0]
        # Far out, a rounding of y alone moves x by more.
        given = y.double().detach().requires_grad_()
        slopes = jacobians(chain.inverse_and_ladj(given)[0], given).abs()
        moved = (slopes @ given.detach().abs().flatten(1).unsqueeze(-1)).view(x.shape)
        eps = torch.finfo(torch.float32).eps
        assert ((back - x).abs() <= 1e-4 * (1 + x.abs()) + 100 * eps * moved).all()


@pytest.mark.full
@pytest.mark.parametrize("name", full_but(BUILDERS, "attention", "maf", "iaf"))
@pytest.mark.parametrize("context_dim", [0, 1])
def test_gradients_of_sampling(name, context_dim):
    """T8: of draws and their log-determinant, after base values, context and every parameter, three times as large."""
    options = {"num_layers": 1} if name != "iaf" else {}
    options |= {"tolerance": 1e-15, "num_groups": 2} if name in ("mint", "attention", "window") else {}
    chain = three_times(BUILDERS[name]((2, 3), context_dim=context_dim, **options))
    x = torch.randn(2, 2, 3, dtype=DOUBLE, requires_grad=True)
    more = (torch.randn(2, 1, dtype=DOUBLE, requires_grad=True),) if context_dim else ()
    names, params = zip(*chain.named_parameters(), strict=True)

    both = Calls(chain, "forward_and_ladj")

    def run(x, *rest):
        given, params = rest[: len(more)], rest[len(more) :]
        return torch.func.functional_call(
            both, {f"inner.{n}": p for n, p in zip(names, params, strict=True)}, (x, *given)
        )

    assert torch.autograd.gradcheck(run, (x, *more, *params), fast_mode=True)


@pytest.mark.parametrize("name", ["maf", "spline", "iaf"])
def test_draws_with_and_without_a_graph_are_the_same(name, monkeypatch):
    """One by a sweep in pieces of 16 rows, the other by differentiable steps."""
    monkeypatch.setattr(raster, "ROOM", 1)
    chain = far(BUILDERS[name]((2, 7), context_dim=1), 0.3)
    x, context = torch.randn(5, 7, 2, 7, dtype=DOUBLE), torch.randn(7, 1, dtype=DOUBLE)
    move = chain.inverse_and_ladj if name == "iaf" else chain.forward_and_ladj
    graph = move(x, context)
    with torch.no_grad():
        plain = move(x, context)
    assert graph[0].requires_grad and not plain[0].requires_grad
    torch.testing.assert_close(plain, graph, rtol=1e-10, atol=1e-10)


def test_nothing_depends_on_the_length():
    for name, build in BUILDERS.items():
        short, long = far(build((2, 4))), build((2, 11)).double().eval()
        long.load_state_dict(short.state_dict())
        y = torch.randn(3, 2, 11, dtype=DOUBLE)
        torch.testing.assert_close(long.inverse_and_ladj(y)[0][..., :4], short.inverse_and_ladj(y[..., :4])[0])
        assert short.shared_over_time, name


# Step by step


def pair(name, channels, context_dim, times, short=5):
    """Two flows of the same weights, for series of different lengths."""
    flows = [pf.Flow(BUILDERS[name]((channels, n), context_dim=context_dim)).double().eval() for n in (short, times)]
    far(flows[0].chain, 0.1)
    flows[1].load_state_dict(flows[0].state_dict())
    return flows


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("batch, context_dim", [((), 0), ((3,), 2), ((2, 3), 0)])
def test_streams_equal_whole_series(name, batch, context_dim):
    """Both directions, over more steps than the flow's own, and than it looks back."""
    channels, times = (1, 60) if batch == () else (2, 30)
    short, long = pair(name, channels, context_dim, times, 1 if batch == (2, 3) else 5)
    context = torch.randn(*batch, context_dim, dtype=DOUBLE) if context_dim else None
    y = torch.randn(*batch, channels, times, dtype=DOUBLE)
    stream = Stream(short, batch, context)
    pieces = [stream.observe(y[..., :1]), stream.observe(y[..., 1]).unsqueeze(-1), stream.observe(y[..., 2:20])]
    pieces += [stream.observe(y[..., 20:20]), stream.observe(y[..., 20:])]
    got = torch.cat(pieces, -1)
    assert stream.steps == times and got.shape == (*batch, times) and not got.requires_grad
    torch.testing.assert_close(got, step_log_prob(long, y, context), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.sum(-1), long.log_prob(y, context), rtol=1e-10, atol=1e-10)
    x = torch.randn(*batch, channels, times, dtype=DOUBLE)
    stream = Stream(short, batch, context)
    moved, scores = zip(*(stream.step(x[..., t]) for t in range(times)), strict=True)
    chain = long.chain if context is None else long.chain.condition(context)
    want = chain(x)
    torch.testing.assert_close(torch.stack(moved, -1), want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.stack(scores, -1), step_log_prob(long, want, context), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", BUILDERS)
def test_streams_of_inverses(name):
    """Parts the other way round, which observe one step after another."""
    context = torch.randn(3, 1, dtype=DOUBLE)
    chain = far(BUILDERS[name]((2, 7), context_dim=1), 0.1)
    flow, y = pf.Flow(chain.inv), torch.randn(3, 2, 7, dtype=DOUBLE)
    stream = Stream(flow, (3,), context)
    scores = torch.cat([stream.observe(y[..., :2]), stream.observe(y[..., 2:])], -1)
    torch.testing.assert_close(scores.sum(-1), flow.log_prob(y, context), rtol=1e-9, atol=1e-9)
    x, stream = chain(y, context), Stream(flow, (3,), context)
    moved = [stream.step(x[..., t])[0] for t in range(7)]
    torch.testing.assert_close(torch.stack(moved, -1), y, rtol=1e-7, atol=1e-7)


def test_streams_know_all_that_a_chain_may_hold(default_dtype):
    """Standardisations, rescalings, elementwise parts, inverses, conditioned parts, another base, other dtypes."""
    context = torch.randn(3, dtype=DOUBLE)
    for single in (False, True):
        dtype, other = (torch.float32, DOUBLE) if single else (DOUBLE, torch.float32)
        default_dtype(other)
        event = (2, 8)
        rescaling = pf.Rescaling(event)
        with torch.no_grad():
            rescaling.log_scale.add_(torch.tensor([[0.3], [-0.2]]))
        parts = [
            far(iaf(event), 0.1).inv,
            rescaling,
            far(maf(event, context_dim=3), 0.1).condition(context),
            pf.Standardization(torch.tensor([[0.5], [1.0]]), torch.tensor([[2.0], [0.3]]), event_shape=event),
            far(mint(event, num_layers=1), 0.1),
            AffineTransform(0.5, 2.0),
            ExpTransform(),
        ]
        chain = pf.Chain(parts).to(dtype).eval()
        flow = pf.Flow(chain, dist.StudentT(torch.full(event, 5.0), 0.5, 2.0).to_event(2)).to(dtype)
        y = torch.rand(4, *event, dtype=dtype) + 0.5
        got = pickle.loads(pickle.dumps(Stream(flow, (4,)))).observe(y)
        assert got.dtype == dtype
        close = {"rtol": 1e-3, "atol": 1e-3} if single else {"rtol": 1e-10, "atol": 1e-10}
        torch.testing.assert_close(got.sum(-1), flow.log_prob(y), **close)
        torch.testing.assert_close(got, step_log_prob(flow, y), **close)


def autoregression(phi, start, sigma):
    """A flow that is y_t = start + phi_1 y_(t-1) + phi_2 y_(t-2) + sigma e_t."""
    chain = pf.Chain(
        [
            CausalAutoregressive((1, 30), Shift(), hidden_channels=1, num_convolutions=1, activation=lambda x: x),
            AffineTransform(0.0, sigma),
        ]
    ).double()
    net = chain[0].net
    with torch.no_grad():
        net.layers[0].left_weight.copy_(-torch.tensor(phi[::-1], dtype=DOUBLE).view(1, 1, -1))
        net.layers[0].left_bias.fill_(-start / sigma)
        net.out_weight.fill_(1.0)
    return pf.Flow(chain)


def test_forecasts_are_those_of_an_autoregression():
    """A linear Gaussian flow against the closed form: densities exactly, draws in mean and covariance."""
    phi, start, sigma = [0.6, -0.3], 0.4, 0.7
    flow = autoregression(phi, start, sigma)
    y = torch.randn(2, 1, 40, dtype=DOUBLE)
    stream = Stream(flow, (2,))
    got = stream.observe(y)
    before = F.pad(y[:, 0], (2, 0))
    mean = start + phi[0] * before[:, 1:-1] + phi[1] * before[:, :-2]
    torch.testing.assert_close(got, dist.Normal(mean, sigma).log_prob(y[:, 0]), rtol=1e-10, atol=1e-10)
    n, ahead = 20000, 5
    torch.manual_seed(3)
    draws = stream.forecast(ahead, n)
    assert draws.shape == (n, 2, 1, ahead) and stream.steps == 40
    companion = torch.eye(ahead, dtype=DOUBLE)  # (I - L) y = what the past adds + sigma e
    for lag, value in enumerate(phi, 1):
        companion -= value * torch.diag(torch.ones(ahead - lag, dtype=DOUBLE), -lag)
    known = torch.full((2, ahead), start, dtype=DOUBLE)
    known[:, 0] += phi[0] * y[:, 0, -1] + phi[1] * y[:, 0, -2]
    known[:, 1] += phi[1] * y[:, 0, -1]
    root = sigma * torch.linalg.inv(companion)
    mean, cov = known @ torch.linalg.inv(companion).T, root @ root.T
    for k in range(2):
        own = draws[:, k, 0]
        assert ((own.mean(0) - mean[k]).abs() < 5 * cov.diag().sqrt() / n**0.5).all()
        spread = (cov.diag()[:, None] * cov.diag() + cov**2).sqrt() / n**0.5
        assert ((own.T.cov() - cov).abs() < 5 * spread).all()


@pytest.mark.full
def test_draws_of_a_stream_have_the_flow_s_own_distribution():
    """Mean and covariance of many short series, drawn step by step and in one piece."""
    flow = pf.Flow(trained(mint((2, 3), num_layers=1)))
    torch.manual_seed(1)
    n = 5000
    stream = Stream(flow, (n,))
    one = torch.stack([stream.sample() for _ in range(3)], -1).flatten(1)
    other = flow.sample((n,)).flatten(1)
    scale = (one.var(0) + other.var(0)).sqrt() / n**0.5
    assert ((one.mean(0) - other.mean(0)).abs() < 5 * scale).all()
    assert ((one.std(0) / other.std(0)).log().abs() < 0.08).all()


@pytest.mark.parametrize("name", BUILDERS)
def test_autocast_changes_nothing(name):
    """Half precision in one direction would be no inverse of the other."""
    chain = far(BUILDERS[name]((2, 6)), 0.1).float()
    y = torch.randn(3, 2, 6)
    plain = Stream(pf.Flow(chain), (3,)).observe(y)
    half, context = y.bfloat16(), torch.randn(3, 1).bfloat16()
    told = pf.Flow(far(BUILDERS[name]((2, 6), context_dim=1), 0.1).float())
    expected = Stream(told, (3,), context.float()).observe(half.float())
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        stream = Stream(told, (3,), context)  # where half precision may come in, and networks of contexts have it
        torch.testing.assert_close(stream.copy().observe(half), expected, rtol=0.02, atol=0.02)
        assert stream.step(half[..., 0])[0].dtype == torch.float32
        torch.testing.assert_close(Stream(pf.Flow(chain), (3,)).observe(y), plain)
        x, ladj = chain.inverse_and_ladj(y)
        torch.testing.assert_close(chain.forward_and_ladj(x)[0], y, rtol=1e-3, atol=1e-3)
        stream = Stream(pf.Flow(chain), (3,))
        torch.testing.assert_close(stream.step(x[..., 0])[0], y[..., 0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ladj, chain.inverse_and_ladj(y)[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", BUILDERS)
def test_copies_go_their_own_way(name):
    flow, longer = pair(name, 2, 1, 6)
    context, y = torch.randn(3, 1, dtype=DOUBLE), torch.randn(3, 2, 6, dtype=DOUBLE)
    want = step_log_prob(longer, y, context).detach()
    stream = Stream(flow, (3,), context)
    stream.observe(y[..., :4])
    other = stream.copy()
    other.step(torch.randn(3, 2, dtype=DOUBLE))
    other.observe(torch.randn(3, 2, 2, dtype=DOUBLE))
    draws = stream.forecast(2, 4)
    assert draws.shape == (4, 3, 2, 2) and (stream.steps, other.steps) == (4, 7)
    loaded = pickle.loads(pickle.dumps(stream))
    with torch.no_grad():
        for p in flow.parameters():
            p.zero_()  # what is done to the flow is nothing to a stream
    for each in (stream, stream.copy(), loaded, copy.deepcopy(loaded)):
        got = [each.observe(y[..., t]) for t in range(each.steps, 6)]
        torch.testing.assert_close(torch.stack(got, -1), want[:, 6 - len(got) :], rtol=1e-10, atol=1e-10)
    assert "steps=6" in repr(stream) and (name != "mint" or "reach=45" in repr(stream))


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("context_dim", [0, 2])
def test_forecasts_go_on_from_each_row(name, context_dim):
    """With the row's own past and context: the whole flow takes draws back to the base values that made them."""
    flow, longer = pair(name, 2, context_dim, 9)
    context = torch.randn(3, context_dim, dtype=DOUBLE) if context_dim else None
    y = torch.randn(3, 2, 5, dtype=DOUBLE)
    stream = Stream(flow, (3,), context)
    stream.observe(y)
    torch.manual_seed(3)
    draws = stream.forecast(4, 2)
    torch.manual_seed(3)
    made = torch.stack([torch.randn(2, 3, 2, dtype=DOUBLE) for _ in range(4)], -1)
    chain = longer.chain if context is None else longer.chain.condition(context)
    back = chain.inv(torch.cat((y.expand(2, -1, -1, -1), draws), -1))
    torch.testing.assert_close(back[..., 5:], made, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["mint", "window", "maf"])
def test_work_does_not_grow(name, monkeypatch):
    """Numbers that convolutions and products read, and evaluations of the solver, at the third step and later."""
    flow = pair(name, 2, 0, 5)[0]
    read, solved = [], []
    for what in ("conv1d", "conv2d", "linear"):
        plain = getattr(F, what)

        def counting(x, *args, plain=plain, **options):
            read.append(x.numel())
            return plain(x, *args, **options)

        monkeypatch.setattr(F, what, counting)
    stream = Stream(flow, (3,))
    totals = []
    for _ in range(70):
        read.clear()
        stream.observe(torch.randn(3, 2, dtype=DOUBLE))
        totals.append(sum(read))
    assert min(totals) == max(totals) > 0
    if name != "maf":  # each solve is one of two coordinates
        plain_solve = mint_map.solve_triangular

        def counted(map, *args):
            made, report = plain_solve(map, *args)
            assert tuple(map.wave.shape) == (2, 1)
            solved.append(report.evaluations)
            return made, report

        monkeypatch.setattr(mint_map, "solve_triangular", counted)
        stream.step(torch.randn(3, 2, dtype=DOUBLE))
        assert len(solved) == len(flow.chain) and max(solved) <= 2 + 10
    else:
        totals.clear()
        for _ in range(20):
            read.clear()
            stream.step(torch.randn(3, 2, dtype=DOUBLE))
            totals.append(sum(read))
        assert min(totals) == max(totals) > 0


def test_what_attention_keeps():
    """As many keys as the window has, or all; and far out angles are as exact as at the beginning."""
    for name, kept in (("window", 4), ("attention", 30)):
        stream = Stream(pair(name, 2, 0, 5)[0], (3,))
        stream.observe(torch.randn(3, 2, 29, dtype=DOUBLE))
        stream.sample()
        steps = [part.attention for part, _ in stream._parts]
        assert {tuple(each.keys.shape[:3]) for each in steps} == {(3, 2, kept)}, name
    rule = Attention((1, 3), 2, 8, 4)
    net = AttentionNet(2, rule)
    shake(net, 0.5)
    y, found = torch.randn(3, 2, 9), []
    for start in (0, 10**7):
        steps = AttentionSteps(rule, net.weights(), 3, 2)
        steps.taken = start
        with torch.no_grad():
            found.append(torch.cat([steps.take(y[..., t : t + 1]) for t in range(9)], -1))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_attention_takes_many_steps_in_pieces(monkeypatch):
    """As few scores at once as that needs, and nothing else changes."""
    for name, most in (("window", 4 + 8), ("attention", 30)):
        short, long = pair(name, 2, 0, 30)
        y, seen = torch.randn(3, 2, 30, dtype=DOUBLE), []
        monkeypatch.setattr(attention, "_AT_ONCE", 8)
        plain = Attention.attend

        def attend(self, queries, keys, *args, plain=plain, seen=seen):
            seen.append((queries.shape[-2], keys.shape[-2]))
            return plain(self, queries, keys, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Attention, "attend", attend)
            got = Stream(short, (3,)).observe(y)
        assert max(n for n, _ in seen) == 8 and max(n for _, n in seen) == most
        torch.testing.assert_close(got, step_log_prob(long, y), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_groups", [3, 48])  # in one piece, and wide enough for convolutions in several
def test_steps_go_by_the_one_solver(num_groups):
    """A step's problem has the slopes of the whole layer: the same formula, with the past in the biases."""
    made = layer((3, 6), scale=9 / num_groups, order="position", shared_scale=True, dilation=2, num_groups=num_groups)
    steps, y = made.stepper(4), torch.randn(4, 3, 6, dtype=DOUBLE)
    x = made.inverse_and_ladj(y)[0]
    torch.testing.assert_close(
        torch.cat([steps.forward(x[..., t : t + 1])[0] for t in range(6)], -1), y, rtol=1e-7, atol=1e-7
    )
    assert isinstance(steps.w, Weights) and steps.w.first.shape[-1] == 2


def test_what_streams_refuse():
    event = (2, 4)
    rescaling = pf.Rescaling(event)
    with torch.no_grad():
        rescaling.log_scale.normal_()
    by_time = pf.Standardization(torch.randn(event), torch.ones(event))
    shifts = AffineTransform(torch.randn(event), 1.0)
    for chain, message in [
        (pf.mintnet(event, shared_scale=True, order="position"), r"Mint \(part 0 of 12\).*lower=False"),
        (pf.mintnet(event, one_sided=True, shared_scale=True), r"Mint .*order='channel'"),
        (pf.mintnet(event, one_sided=True, order="position"), r"Mint .*shared_scale=False"),
        (pf.glow(event, num_scales=1), r"part \d+ of \d+\) does not go step by step.*causal_maf"),
        (pf.maf(event, num_layers=1), r"Autoregressive \(part 0 of 1\)"),
        (pf.Chain([maf(event), rescaling]), r"Rescaling .*log_scale differs between times"),
        (pf.Chain([maf(event), by_time]), r"Standardization .*loc differs between times"),
        (pf.Chain([maf(event), shifts]), r"Wrap .*AffineTransform is no map of single numbers"),
    ]:
        refuses(ValueError, message, Stream, pf.Flow(chain))
    refuses(ValueError, "Rescaling: with a context", pf.Rescaling(event, context_dim=1).stepper, 2, torch.randn(2, 1))
    base = pf.DiagonalNormal(event, learnable=True)
    with torch.no_grad():
        base.loc.normal_()
    refuses(ValueError, r"base, Normal: its loc differs between times", Stream, pf.Flow(maf(event), base))
    with pytest.raises(ValueError, match="independent dimensions"):
        Stream(pf.Flow(maf((1, 2)), dist.MultivariateNormal(torch.zeros(2), torch.eye(2)).expand((1,)).to_event(1)))
    refuses(ValueError, r"series \(C, T\), got event shape \(3,\)", Stream, pf.Flow(pf.maf(3)))
    refuses(TypeError, r"expected a Flow.*got Chain", Stream, maf(event))


def test_what_streams_say_of_values():
    stream = Stream(pf.Flow(maf((2, 4))), (3,))
    with pytest.raises(ValueError, match=r"one step of shape \(3, 2\).*n steps, \(3, 2, 'n'\), got shape \(2,\)"):
        stream.observe(torch.randn(2))
    refuses(ValueError, "expected one step", stream.step, torch.randn(3, 2, 1))
    with pytest.raises(TypeError, match=r"y is torch\.float64 but the parameters are torch\.float32"):
        stream.observe(torch.randn(3, 2, dtype=DOUBLE))
    refuses(TypeError, "expected a tensor as y, got list", stream.observe, [[0.0]])
    for wrong in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match=r"expected finite values in the support.*missing"):
            stream.observe(torch.full((3, 2), wrong))
        with pytest.raises(ValueError, match=r"expected finite base values.*\.sample\(\) draws them"):
            stream.step(torch.full((3, 2), wrong))
    assert stream.steps == 0 and stream.observe(torch.zeros(3, 2)).isfinite().all()  # nothing was taken
    for shape in (3, (-1,), (1.5,), (True,), "3"):
        refuses(ValueError, r"batch_shape to be a shape such as \(\) or \(5,\), got", Stream, stream.flow, shape)
    for steps, num_samples in ((0, 1), (1, 0), (True, 1), (1.0, 1)):
        refuses(ValueError, "integer >= 1", stream.forecast, steps, num_samples)
    flow = pf.Flow(maf((2, 4), context_dim=1))
    with pytest.raises(ValueError, match="context_dim=1: call it with a context, give context="):
        Stream(flow)
    with pytest.raises(ValueError, match=r"last dimension 1 \(context_dim\)"):
        Stream(flow, (), torch.randn(2))
    with pytest.raises(ValueError, match="leave it out"):
        Stream(pf.Flow(maf((2, 4))), (), torch.randn(1))
    with pytest.raises(
        ValueError, match=r"same at all times.*broadcasts with batch_shape \(3,\), got shape \(3, 4, 1\)"
    ):
        Stream(flow, (3,), torch.randn(3, 4, 1))  # a context for each time
    bound = pf.Flow(flow.chain.condition(torch.randn(5, 1)))
    assert Stream(bound).observe(torch.randn(5, 2)).shape == (5,)
    with pytest.raises(
        ValueError, match=r"CausalAutoregressive that is bound .* batch_shape \(3,\), got shape \(5, 1\)"
    ):
        Stream(bound, (3,))
    assert Stream(flow, (), torch.randn(5, 1)).observe(torch.randn(5, 2)).shape == (5,)
    empty = Stream(flow, (0,), torch.randn(1))
    assert empty.observe(torch.randn(0, 2, 3)).shape == (0, 3) and empty.sample().shape == (0, 2)


def test_a_step_that_fails_halfway():
    """Layers that have taken it stand elsewhere than those that have not; a copy made before goes on."""
    flow = pf.Flow(far(pf.Chain([maf((1, 4)), mint((1, 4), num_layers=1, max_sweeps=1)]), 0.5))
    stream, y = Stream(flow, (2,)), torch.randn(2, 1, dtype=DOUBLE)
    want, before = stream.copy().observe(y), stream.copy()
    refuses(RuntimeError, "max_sweeps", stream.step, torch.full((2, 1), 3.0, dtype=DOUBLE))
    for act in (stream.sample, lambda: stream.observe(y), stream.copy().sample, lambda: stream.forecast(1, 2)):
        refuses(RuntimeError, r"stopped an earlier step halfway.*\.copy\(\) made before", act)
    torch.testing.assert_close(before.observe(y), want)


def test_builders_refuse():
    refuses(ValueError, r"series \(C, T\) for causal=True", pf.mintnet, (1, 4, 4), causal=True)
    refuses(ValueError, "needs squeeze=0", pf.mintnet, (1, 4), causal=True, squeeze=1)
    with pytest.raises(ValueError, match=r"needs order='position', got order='channel'; leave order out"):
        pf.mintnet((1, 4), causal=True, order="channel")
    for given in (0, (), (1, 0), (True,), 1.5 * torch.ones(1), 1.5):
        refuses(ValueError, "dilations to be positive integers", pf.mintnet, (1, 4), dilations=given)
    refuses(ValueError, "dilation to be an integer", pf.Mint, (1, 4), dilation=0)
    for options, message in [
        ({"hidden_channels": 1}, "hidden_channels to be an integer >= 2, got 1"),
        ({"kernel_size": 1}, "kernel_size to be an integer >= 2"),
        ({"num_convolutions": 0}, "num_convolutions to be an integer >= 1"),
        ({"fast": "both"}, "fast to be"),
        ({"dilations": (0,)}, "dilations to be positive"),
    ]:
        refuses(ValueError, message, CausalAutoregressive, (2, 4), **options)
    refuses(ValueError, "circle", CausalAutoregressive, (2, 4), pf.Spline(boundary="circular"))
    refuses(ValueError, r"series \(C, T\), got event shape \(4,\)", pf.causal_maf, (4,))
    refuses(ValueError, "num_layers", pf.causal_maf, (1, 4), num_layers=0)


# Scores of whole series


@pytest.mark.parametrize("name", BUILDERS)
def test_shorter_series_in_a_padded_batch(name):
    """Scores and gradients are those of each series alone, whatever stands behind its end."""
    short, long = pair(name, 2, 0, 7)
    lengths = torch.tensor([7, 5, 1])
    y = torch.randn(3, 2, 7, dtype=DOUBLE)
    padded = y.clone()
    for k, n in enumerate(lengths):
        padded[k, :, n:] = torch.nan if k % 2 else 1e30
    scores = step_log_prob(long, padded, lengths=lengths)
    grads = torch.autograd.grad(scores.sum(), list(long.parameters()))
    total = 0
    for k, n in enumerate(lengths):
        flow = pf.Flow(BUILDERS[name]((2, int(n)))).double().eval()
        flow.load_state_dict(short.state_dict())
        own = step_log_prob(flow, y[k, :, :n])
        torch.testing.assert_close(scores[k, :n], own, rtol=1e-10, atol=1e-10)
        assert (scores[k, n:] == 0).all()
        parts = torch.autograd.grad(flow.log_prob(y[k, :, :n]), list(flow.parameters()))
        total = [a + b for a, b in zip(total, parts, strict=True)] if k else list(parts)
    torch.testing.assert_close(grads, total, rtol=1e-8, atol=1e-8)


def test_what_step_log_prob_refuses():
    y = torch.randn(3, 2, 4)
    refuses(ValueError, "another order than time", step_log_prob, pf.Flow(pf.mintnet((2, 4), one_sided=True)), y)
    refuses(ValueError, "in no order that is known", step_log_prob, pf.Flow(pf.glow((2, 4), num_scales=1)), y)
    flow = pf.Flow(maf((2, 4)))
    for lengths in (torch.tensor([0, 1, 2]), torch.tensor([1, 2, 5]), torch.ones(3), torch.ones(3).bool()):
        refuses(ValueError, "integers from 1 to 4", step_log_prob, flow, y, lengths=lengths)
    with pytest.raises(ValueError, match=r"broadcast to the batch \(3,\), one for each series, got shape \(2,\)"):
        step_log_prob(flow, y, lengths=[1, 2])
    with pytest.raises(ValueError, match=r"trailing shape \(2, 4\), got shape \(3, 2, 5\)"):
        step_log_prob(flow, torch.randn(3, 2, 5), lengths=[1, 2, 3])
    refuses(TypeError, "expected a tensor, got list", step_log_prob, flow, [[0.0]], lengths=[1])
    with pytest.raises(ValueError, match="outside of it; pad series, and give their lengths"):
        step_log_prob(flow, y * torch.nan, lengths=[1, 2, 3])


def test_pixel_scores_of_causal_flows():
    for name in BUILDERS:
        flow = pair(name, 2, 0, 5)[0]
        y = torch.randn(3, 2, 5, dtype=DOUBLE)
        scores = pixel_scores(flow, y)
        torch.testing.assert_close(-scores.sum((1, 2)), flow.log_prob(y), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(-scores.sum(1), step_log_prob(flow, y), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "shape, options",
    [
        ((2, 6), {"causal": True}),
        ((2, 6), {"causal": True, "attention": 2, "head_dim": 4, "window": 3, "context_dim": 1}),
        ((2, 5, 6), {"one_sided": True, "dilations": (2, 3)}),  # what is next by one dilation depends by another
        ((1, 6, 9), {"one_sided": True, "order": "position", "dilations": (2, 3)}),
    ],
)
def test_codec_of_dilated_layers(shape, options):
    """Numbers of which the model has an idea, so that they are written by it."""
    chain = shake(pf.mintnet(shape, num_layers=1, num_groups=3, hidden_dims=(4,), **options), 0.2)
    flow = pf.Flow(pf.Chain([chain, pf.LogitPixels(shape, 7)]))
    context = [0.05 * torch.randn(20, flow.context_dim)] if flow.context_dim else []
    values = torch.randint(2, 5, (20, *shape))
    codec = Codec(flow)
    assert codec.bits(values, *context).sum() < values.numel() * math.log2(7) + 64
    assert torch.equal(codec.decode(codec.encode(values, *context), *context), values.cpu())


# Fitting


def waves_with_trend(rows=200, times=12):
    t = torch.arange(times)
    phase = 6.3 * torch.rand(rows, 1)
    noise = 0.1 * torch.randn(rows, 2, times)
    return torch.stack((20 + 3 * torch.sin(t / 2 + phase), -1 + 0.01 * t * torch.cos(t / 2 + phase)), 1) + noise


@pytest.mark.parametrize("name", ["mint", "maf"])
def test_series_are_standardised_by_channel(name):
    data = waves_with_trend()
    chain = BUILDERS[name]((2, 12))
    fit = pf.fit_density(chain, data, steps=8, validation_fraction=0, progress=False)
    units = fit.distribution.chain[len(fit.distribution.chain) - 1]
    assert isinstance(units, pf.Standardization) and units.loc.shape == (2, 1) and units.event_shape == (2, 12)
    pooled = data.movedim(1, 0).flatten(1)
    torch.testing.assert_close(units.loc[:, 0], pooled.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(units.scale[:, 0], pooled.std(1), rtol=1e-5, atol=1e-5)
    assert fit.distribution.chain.shared_over_time
    longer = standardized(pf.Flow(BUILDERS[name]((2, 30))))
    longer.load_state_dict(fit.distribution.state_dict())
    more = waves_with_trend(5, 30)
    got = Stream(fit.distribution, (5,)).observe(more)
    torch.testing.assert_close(got.sum(-1), longer.log_prob(more), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["attention", "maf"])
def test_contexts_come_in_their_own_units(name):
    loc, scale = torch.tensor([[2.0], [-1.0]]).double(), torch.tensor([[3.0], [0.5]]).double()
    chain = far(BUILDERS[name]((2, 5), context_dim=1), 0.3)
    flow = standardized(pf.Flow(chain), loc, scale, torch.tensor([40.0]).double(), torch.tensor([8.0]).double())
    context, x = 40 + 8 * torch.randn(3, 1, dtype=DOUBLE), torch.randn(3, 2, 5, dtype=DOUBLE)
    y = loc + scale * x
    truth = pf.Flow(chain).log_prob(x, (context - 40) / 8) - 5 * scale.log().sum()
    torch.testing.assert_close(flow.log_prob(y, context), truth, rtol=1e-10, atol=1e-10)
    whole, lengths = step_log_prob(flow, y, context), torch.tensor([5, 2, 4])
    torch.testing.assert_close(whole.sum(-1), truth, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(Stream(flow, (3,), context).observe(y), whole, rtol=1e-10, atol=1e-10)
    inside = torch.arange(5) < lengths[:, None]
    got = step_log_prob(flow, torch.where(inside[:, None], y, torch.nan), context, lengths=lengths)
    torch.testing.assert_close(got, torch.where(inside, whole, 0.0), rtol=1e-10, atol=1e-10)


def test_other_flows_are_standardised_by_column():
    data = waves_with_trend()
    two_sided = pf.mintnet((2, 12), num_layers=1, num_groups=2)
    for chain in (two_sided, pf.Chain([maf((2, 12)), pf.Rescaling((2, 12))])):
        fit = pf.fit_density(chain, data, steps=2, validation_fraction=0, progress=False)
        units = fit.distribution.chain[len(fit.distribution.chain) - 1]
        assert units.loc.shape == (2, 12)
        torch.testing.assert_close(units.loc, data.mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("event", [(3,), (2, 4), (1, 2, 2)])
def test_states_of_flows_that_learn_a_base_alone(event):
    """Nothing is before the standardisation, so that nothing says that times share their units."""
    parts = [pf.Standardization(torch.zeros(event), torch.ones(event)), ExpTransform()]
    flow = pf.Flow(pf.Chain(parts), pf.DiagonalNormal(event, learnable=True))
    fit = pf.fit_density(flow, torch.randn(50, *event).exp(), steps=2, validation_fraction=0, progress=False)
    loaded = standardized(pf.Flow(pf.Chain(parts), pf.DiagonalNormal(event, learnable=True)))
    loaded.load_state_dict(fit.distribution.state_dict())
    y = torch.randn(5, *event).exp()
    torch.testing.assert_close(loaded.log_prob(y), fit.distribution.log_prob(y))


def test_standardisations_of_many_places():
    loc, scale = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [3.0]])
    whole = pf.Standardization(loc.expand(2, 4), scale.expand(2, 4))
    few = pf.Standardization(loc, scale, event_shape=(2, 4))
    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(whole.forward_and_ladj(x), few.forward_and_ladj(x))
    torch.testing.assert_close(whole.inverse_and_ladj(x), few.inverse_and_ladj(x))
    assert few.shared_over_time and whole.shared_over_time
    assert not pf.Standardization(torch.randn(2, 4), torch.ones(2, 4)).shared_over_time
    with pytest.raises(ValueError, match=r"broadcast to event_shape \(2, 4\)"):
        pf.Standardization(torch.zeros(2, 3), torch.ones(2, 3), event_shape=(2, 4))
