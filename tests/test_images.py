"""Transforms and builders of images and series: patterns, what depends on what, densities, and the papers' layout."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from asserts import refuses
from cases import full_but, seeded, shake
from oracles import jacobian
from torch import nn

import pyro_flows as pf
from pyro_flows.nets.convolutional import ConvNet
from pyro_flows.transforms import Conv1x1, Split, Squeeze
from pyro_flows.univariate import Affine, Shift

SMALL = {"hidden_channels": 4, "num_blocks": 1, "activation": "elu"}
DIRECTIONS = ["forward_and_ladj", "inverse_and_ladj"]
FLOWS = {
    "realnvp": lambda **o: pf.multiscale_realnvp((1, 4, 4), num_scales=2, num_couplings=1, **SMALL, **o),
    "realnvp-3-scales": lambda **o: pf.multiscale_realnvp((1, 4, 4), num_scales=3, num_couplings=1, **SMALL, **o),
    "realnvp-series": lambda **o: pf.multiscale_realnvp((2, 4), num_scales=2, num_couplings=2, **SMALL, **o),
    "glow": lambda **o: pf.glow((1, 4, 4), num_scales=2, num_layers=2, **SMALL, **o).eval(),
    "glow-series": lambda **o: pf.glow((2, 4), num_scales=2, num_layers=2, **SMALL, **o).eval(),
}


@pytest.fixture(params=FLOWS)
def build(request):
    return FLOWS[request.param]


@pytest.fixture(params=DIRECTIONS)
def direction(request):
    return request.param


def slopes(flow, value, direction="forward_and_ladj", context=None):
    """The Jacobian of one event, as a matrix."""
    size = value.numel()
    return jacobian(lambda v: getattr(flow, direction)(v, context)[0], value).reshape(size, size)


# Squeeze


@pytest.mark.parametrize("shape", [(3, 4, 6), (1, 2, 2), (2, 6, 2)])
def test_squeeze_places_images(shape):
    image = torch.arange(math.prod(shape)).float().reshape(shape)
    squeezed, ladj = Squeeze(shape).inverse_and_ladj(image)
    channels, height, width = shape
    assert squeezed.shape == (4 * channels, height // 2, width // 2)
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                assert squeezed[(2 * (y % 2) + x % 2) * channels + c, y // 2, x // 2] == image[c, y, x]
    assert ladj == 0
    assert torch.equal(Squeeze(shape)(squeezed), image)


def test_squeeze_places_series():
    series = torch.tensor([[0.0, 1, 2, 3], [10, 11, 12, 13]])
    squeezed = Squeeze((2, 4)).inv(series)
    assert torch.equal(squeezed, torch.tensor([[0.0, 2], [10, 12], [1, 3], [11, 13]]))
    assert torch.equal(Squeeze((2, 4))(squeezed.clone()), series)


def test_squeeze_has_image_and_squeezed_shape():
    squeeze = Squeeze((3, 8, 6))
    assert (squeeze.event_shape, squeeze.data_shape) == ((12, 4, 3), (3, 8, 6))
    flow = pf.Flow([squeeze])
    assert flow().event_shape == (3, 8, 6) and flow.base().event_shape == (12, 4, 3)


# The network


def plain_net(net, x, bias=0.0):
    """One block written out, channels first throughout; ``bias`` is a list of what the context adds."""
    bias = [0.0, 0.0] if bias == 0.0 else bias
    conv = lambda layer, v: F.conv2d(v, layer.weight, layer.bias, padding="same")  # noqa: E731
    h = conv(net.first, x) + bias[0]
    inner = conv(net.blocks[0], F.elu(h)) + bias[1]
    h = h + conv(net.blocks[1], F.elu(inner))
    out = conv(net.last, F.elu(h))
    return out.unflatten(1, (net.num_params, net.out_channels)).movedim(1, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_network_against_written_out(dtype):
    net = ConvNet(2, 3, num_params=2, context_dim=2, zero_init=False, **SMALL).to(dtype)
    x, context = torch.randn(5, 2, 6, 4, dtype=dtype), torch.randn(5, 2, dtype=dtype)
    biases = (context @ net.context.weight.T).reshape(5, 2, 4, 1, 1).unbind(1)
    want = plain_net(net, x, list(biases))
    torch.testing.assert_close(net(x, context), want)
    one = net(x.reshape(5, 1, 2, 6, 4).expand(5, 3, 2, 6, 4), context[:, None])
    torch.testing.assert_close(one, want[:, None].expand_as(one))
    torch.testing.assert_close(net(x, context[0]), plain_net(net, x, [b[:1] for b in biases]))


def test_network_of_series_is_that_of_a_flat_image():
    flat = ConvNet(2, 3, num_params=2, zero_init=False, **SMALL)
    series = ConvNet(2, 3, num_params=2, space_dims=1, zero_init=False, **SMALL)
    weights = {name: v[:, :, 1] if v.dim() == 4 else v for name, v in flat.state_dict().items()}
    series.load_state_dict(weights)
    x = torch.randn(5, 2, 7)
    torch.testing.assert_close(series(x), flat(x.unsqueeze(-2)).squeeze(-3))


def test_network_starts_at_zero_and_keeps_the_size():
    for kernel_size in (1, 3, 5):
        out = ConvNet(1, 2, num_params=3, hidden_channels=2, num_blocks=0, kernel_size=kernel_size)(
            torch.randn(4, 1, 3, 2)
        )
        assert torch.equal(out, torch.zeros(4, 2, 3, 2, 3))


# Couplings


def test_mask_patterns():
    checkerboard = torch.tensor([[0, 1, 0], [1, 0, 1]]).bool()
    flow = pf.ConvCoupling((2, 2, 3))
    assert torch.equal(flow.mask, checkerboard.expand(2, 2, 3))
    assert torch.equal(pf.ConvCoupling((2, 2, 3), flip=True).mask, ~flow.mask)
    assert torch.equal(pf.ConvCoupling((1, 5)).mask, torch.tensor([[0, 1, 0, 1, 0]]).bool())
    halves = pf.ConvCoupling((5, 2, 2), mask="channels").mask
    assert torch.equal(halves, torch.tensor([1, 1, 0, 0, 0]).bool()[:, None, None].expand(5, 2, 2))
    given = torch.rand(3, 2, 2, generator=seeded(0)) < 0.5
    assert torch.equal(pf.ConvCoupling((3, 2, 2), mask=given).mask, given)
    for mask in ("checkerboard", "channels"):
        for flip in (False, True):
            assert not pf.ConvCoupling((1, 1, 1), mask=mask, flip=flip).mask.any()


def masks():
    corner = torch.zeros(3, 4, 4, dtype=torch.bool)
    corner[0, :2, 1:] = corner[2, 3] = True
    ends = torch.tensor([True, False, True])[:, None, None].expand(3, 4, 4)
    return {"checkerboard": "checkerboard", "channels": "channels", "boolean": corner, "outer-channels": ends}


@pytest.mark.parametrize("flip", [False, True], ids=["", "flip"])
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("univariate", [Affine(), Shift(), pf.Spline(4)], ids=lambda u: type(u).__name__)
def test_coupling_moves_what_it_should(univariate, mask, flip, direction):
    flow = shake(pf.ConvCoupling((3, 4, 4), univariate, mask=masks()[mask], flip=flip, **SMALL).double(), 0.4)
    x = torch.randn(5, 3, 4, 4).double()
    y, ladj = getattr(flow, direction)(x)
    kept = flow.mask
    assert torch.equal(y[:, kept], x[:, kept])
    assert (y[:, ~kept] != x[:, ~kept]).all()
    matrix = slopes(flow, x[0], direction)
    kept = kept.flatten()
    assert torch.equal(matrix[kept], torch.eye(48).double()[kept])
    moved = matrix[~kept][:, ~kept]
    assert torch.equal(moved, torch.diag(moved.diagonal())) and (moved.diagonal() > 0).all()
    assert (matrix[~kept][:, kept] != 0).float().mean() > 0.3  # the rest of it depends on what is near
    torch.testing.assert_close(ladj[0], torch.linalg.slogdet(matrix)[1])


@pytest.mark.parametrize("mask", masks())
def test_what_is_moved_is_not_seen(mask):
    flow = shake(pf.ConvCoupling((3, 4, 4), mask=masks()[mask], **SMALL), 0.4)
    x = torch.randn(3, 4, 4)
    y = flow(x.clone())
    place = tuple(torch.nonzero(~flow.mask)[2].tolist())
    x[place] = math.nan
    spoilt = flow(x)
    assert spoilt[place].isnan()
    spoilt[place] = y[place]
    torch.testing.assert_close(spoilt, y)


def test_checkerboard_knows_where_it_is_blind():
    # Kept zeros and blanked numbers differ by the mask's channel alone.
    flow = shake(pf.ConvCoupling((1, 6, 6), **SMALL), 0.4)
    with torch.no_grad():
        flow.net.first.weight[:, 0] = 0
    assert flow(torch.zeros(1, 6, 6))[0, 2, 2] != 0
    before = flow(torch.zeros(1, 6, 6))
    with torch.no_grad():
        flow.net.first.weight[:, 1] = 0
    assert not torch.equal(flow(torch.zeros(1, 6, 6)), before)


@pytest.mark.parametrize("mask, seen", [("channels", 2), ("checkerboard", 6)])
def test_network_sees_no_more_than_it_must(mask, seen):
    assert pf.ConvCoupling((5, 4, 4), mask=mask).net.in_channels == seen


def test_coupling_parameters_are_those_of_the_place():
    flow = shake(pf.ConvCoupling((2, 3, 4), mask="channels", **SMALL), 0.4)
    x = torch.randn(7, 2, 3, 4)
    shift, raw = flow.net(x[:, :1]).unbind(-1)
    log_scale = 5 * torch.tanh(raw / 5)
    y, ladj = flow.forward_and_ladj(x)
    torch.testing.assert_close(y[:, 1:], shift + x[:, 1:] * log_scale.exp())
    torch.testing.assert_close(ladj, log_scale.flatten(1).sum(1))


# 1x1 convolutions


def test_conv1x1_is_a_convolution():
    flow = shake(Conv1x1((3, 4, 5), bias=True).double(), 0.3)
    x = torch.randn(7, 3, 4, 5).double()
    y, ladj = flow.forward_and_ladj(x)
    torch.testing.assert_close(y, F.conv2d(x, flow.matrix[:, :, None, None], flow.bias))
    torch.testing.assert_close(ladj, torch.linalg.slogdet(flow.matrix)[1].mul(20).expand(7))
    torch.testing.assert_close(flow.inverse_matrix @ flow.matrix, torch.eye(3).double())
    # The matrix, by its parts as they are written in the docstring.
    lower = flow.factors.tril(-1) + torch.eye(3)
    upper = flow.factors.triu(1) + torch.diag(flow.factors.diagonal().exp())
    torch.testing.assert_close(flow.matrix, flow.signs[:, None] * (lower @ upper)[flow.permutation])


@pytest.mark.parametrize("channels", [1, 2, 5, 48])
def test_conv1x1_starts_as_a_rotation(channels):
    flow = Conv1x1((channels, 2)).double()
    matrix = flow.matrix.detach()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(channels).double(), rtol=0, atol=2e-6)
    assert float(torch.linalg.det(matrix)) == pytest.approx(1, abs=1e-5)
    assert channels == 1 or not torch.equal(matrix, torch.eye(channels).double())
    other = Conv1x1((channels, 2)).double().matrix
    assert channels == 1 or (other - matrix).abs().max() > 0.1


def test_conv1x1_other_starts():
    x = torch.randn(4, 5, 3)
    assert torch.equal(Conv1x1((5, 3), start="identity")(x.clone()), x)
    flow = Conv1x1((5, 3), start="permutation")
    y, ladj = flow.forward_and_ladj(x)
    assert torch.equal(y, x[:, flow.permutation]) and torch.equal(ladj, torch.zeros(4))
    assert set(Conv1x1((5, 3), start="identity").state_dict()) == {"factors"}


def test_conv1x1_of_a_vector_is_lu_linear():
    flow, whole = Conv1x1((4,), start="identity", bias=True).double(), pf.LULinear(4).double()
    whole.load_state_dict(shake(flow).state_dict())
    x = torch.randn(5, 4).double()
    for name in DIRECTIONS:
        torch.testing.assert_close(getattr(flow, name)(x), getattr(whole, name)(x))


# Splits


def test_split_is_gaussian_given_the_other_half():
    inner = shake(pf.ConvCoupling((2, 3, 3), **SMALL), 0.3)
    flow = pf.Flow(shake(Split(inner, (4, 3, 3), hidden_channels=4, max_log_scale=2.0), 0.3))
    y = torch.randn(6, 4, 3, 3)
    first, second = y[:, :2], y[:, 2:]
    loc, raw = flow.chain.net(first).unbind(-1)
    normal = dist.Normal(loc, torch.exp(2 * torch.tanh(raw / 2))).to_event(3)
    torch.testing.assert_close(flow.log_prob(y), pf.Flow(inner).log_prob(first) + normal.log_prob(second))


def test_fresh_split_is_its_inner_flow():
    inner = shake(pf.ConvCoupling((1, 4), **SMALL))
    x = torch.randn(3, 2, 4)
    y, ladj = Split(inner, (2, 4)).forward_and_ladj(x)
    want, want_ladj = inner.forward_and_ladj(x[:, :1])
    assert torch.equal(y, torch.cat((want, x[:, 1:]), 1)) and torch.equal(ladj, want_ladj)
    assert torch.equal(Split(None, (2, 4))(x.clone()), x)


def test_split_gives_context_to_both():
    inner = shake(pf.ConvCoupling((2, 2), context_dim=3, **SMALL))
    for inside in (inner, Conv1x1((2, 2)), None):
        flow = shake(Split(inside, (4, 2), context_dim=3, hidden_channels=4), 0.3).double()
        context = torch.randn(3).double().requires_grad_()
        y, _ = flow.forward_and_ladj(torch.randn(4, 2).double(), context)
        reached = [torch.autograd.grad(y[c, 0], context, retain_graph=True)[0].abs().max() for c in (0, 3)]
        assert (reached[0] > 0) == (inside is inner) and reached[1] > 0


def test_split_around_a_bound_view():
    inner = shake(pf.ConvCoupling((1, 4), context_dim=2, **SMALL))
    context = torch.randn(5, 2)
    flow = Split(inner.condition(context), (2, 4))
    assert flow.forward_shape((2, 4)) == (5, 2, 4)
    x = torch.randn(2, 4)
    y, ladj = flow.forward_and_ladj(x)
    assert y.shape == (5, 2, 4) and ladj.shape == (5,)
    torch.testing.assert_close(y[:, :1], inner.forward_and_ladj(x[:1], context)[0])
    back, back_ladj = flow.inverse_and_ladj(y[2])
    torch.testing.assert_close(back[2], x)
    torch.testing.assert_close(back_ladj[2], -ladj[2])


# Whole flows


@pytest.mark.parametrize("scale", [0.1, 0.25])
def test_jacobian_and_round_trip(build, direction, scale):
    flow = shake(build(context_dim=2).double(), scale)
    x, context = torch.randn(*flow.event_shape).double(), torch.randn(2).double()
    y, ladj = getattr(flow, direction)(x, context)
    matrix = slopes(flow, x, direction, context)
    torch.testing.assert_close(ladj, torch.linalg.slogdet(matrix)[1], rtol=1e-8, atol=1e-8)
    other = DIRECTIONS[1 - DIRECTIONS.index(direction)]
    again = getattr(flow, direction)(getattr(flow, other)(y, context)[0], context)[0]
    torch.testing.assert_close(again, y, rtol=1e-9, atol=1e-9 * float(1 + (matrix.abs() @ x.flatten().abs()).max()))


def test_events_are_images_on_both_sides(build):
    flow = build()
    assert flow.event_shape == flow.data_shape and len(flow.event_shape) in (2, 3)
    made = pf.Flow(flow)()
    assert made.event_shape == flow.event_shape and made.sample((3,)).shape == (3, *flow.event_shape)
    with pyro.plate("images", 4):
        assert pyro.sample("x", made).shape == (4, *flow.event_shape)


def test_batch_mates_and_modes_make_no_difference(build, direction):
    flow = build().train()
    flow.inverse_and_ladj(2 * torch.randn(64, *flow.event_shape) - 1)  # the first batch, which sets normalisations
    shake(flow, 0.1)
    x = torch.randn(9, *flow.event_shape)
    y, ladj = getattr(flow, direction)(x)
    alone = [getattr(flow, direction)(row) for row in x]
    for got, want in zip((y, ladj), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-4)
    y_eval, ladj_eval = getattr(flow.eval(), direction)(x)
    assert torch.equal(y, y_eval) and torch.equal(ladj, ladj_eval)


def test_context_reaches_everywhere(build):
    flow = pf.Flow(shake(build(context_dim=2), 0.2))
    y, context = torch.randn(3, *flow.event_shape), torch.randn(3, 2)
    context[2] = context[0]
    y[:] = y[0]
    scores = flow.log_prob(y, context)
    assert scores[0] != scores[1]
    torch.testing.assert_close(scores[0], scores[2])
    free = {name for name, p in flow.named_parameters() if p.grad is None}
    flow.log_prob(y, context).sum().backward()
    dead = [name for name, p in flow.named_parameters() if not (p.grad is not None and p.grad.abs().max() > 0)]
    assert free and not dead


def parts(flow):
    """Leaves from data to base, inside splits last."""
    for part in reversed(list(flow)):
        if isinstance(part, pf.Inverse):
            continue
        yield part
        if isinstance(part, Split) and part.inner is not None:
            yield from parts(part.inner)


def test_layout_of_the_paper_realnvp():
    flow = pf.multiscale_realnvp((3, 8, 8), num_scales=3, hidden_channels=4, num_blocks=1)
    kinds = [f"{type(p).__name__}{tuple(p.event_shape)}" for p in parts(flow)]
    step = ["ConvCoupling(3, 8, 8)"] * 3 + ["Squeeze(12, 4, 4)"] + ["ConvCoupling(12, 4, 4)"] * 3 + ["Split(12, 4, 4)"]
    step += ["ConvCoupling(6, 4, 4)"] * 3 + ["Squeeze(24, 2, 2)"] + ["ConvCoupling(24, 2, 2)"] * 3 + ["Split(24, 2, 2)"]
    assert kinds == step + ["ConvCoupling(12, 2, 2)"] * 4
    couplings = [p for p in parts(flow) if isinstance(p, pf.ConvCoupling)]
    by_place = [bool((c.mask[:1] == c.mask).all()) for c in couplings]
    assert by_place == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3 + [True] * 4
    for one, two in itertools.pairwise(couplings):
        if one.event_shape == two.event_shape:
            assert torch.equal(one.mask, ~two.mask)
    assert [c.net.hidden_channels for c in couplings] == [4] * 3 + [8] * 6 + [16] * 7


def test_layout_of_the_paper_glow():
    flow = pf.glow((3, 8, 8), num_scales=2, num_layers=2, hidden_channels=4)
    kinds = [f"{type(p).__name__}{tuple(p.event_shape)}" for p in parts(flow)]
    steps = lambda shape: [f"{name}{shape}" for name in ("ActNorm", "Conv1x1", "ConvCoupling")] * 2  # noqa: E731
    first, second = (12, 4, 4), (24, 2, 2)
    want = [f"Squeeze{first}", *steps(first), f"Split{first}", f"Squeeze{second}", *steps(second)]
    assert kinds == want


@pytest.mark.parametrize(
    "shape, realnvp, glow",
    [
        ((1, 8, 8), 1, 2),
        ((1, 28, 28), 2, 2),
        ((3, 32, 32), 3, 3),
        ((1, 6, 10), 0, 1),
        ((2, 64), 4, 4),
        ((1, 4, 8), 0, 2),
    ],
)
def test_default_scales(shape, realnvp, glow):
    def count(flow):
        return sum(isinstance(part, Squeeze) for part in parts(flow))

    assert count(pf.multiscale_realnvp(shape, num_couplings=1, hidden_channels=1, num_blocks=0)) == realnvp
    assert count(pf.glow(shape, num_layers=1, hidden_channels=1, num_blocks=0)) == glow


def test_fresh_starts():
    x = torch.randn(5, 1, 8, 8)
    y, ladj = pf.multiscale_realnvp((1, 8, 8), hidden_channels=4).forward_and_ladj(x)
    assert torch.equal(y, x) and torch.equal(ladj, torch.zeros(5))
    y, ladj = pf.glow((1, 8, 8), hidden_channels=4).eval().forward_and_ladj(x)
    torch.testing.assert_close(y.square().sum((1, 2, 3)), x.square().sum((1, 2, 3)), rtol=1e-4, atol=0)
    torch.testing.assert_close(ladj, torch.zeros(5), rtol=0, atol=1e-3)
    y, _ = pf.glow((1, 8, 8), hidden_channels=4, start="identity").eval().forward_and_ladj(x)
    assert torch.equal(y, x)


GRID = {
    "checkerboard": lambda: pf.multiscale_realnvp((1, 1, 2), num_couplings=3, max_log_scale=0.5, **SMALL),
    "two-scales": lambda: pf.multiscale_realnvp((1, 2), num_scales=2, num_couplings=1, max_log_scale=0.5, **SMALL),
    "glow": lambda: pf.glow((1, 2), num_layers=2, max_log_scale=0.5, **SMALL).eval(),
    "split": lambda: Split(None, (2, 1, 1), max_log_scale=0.5, hidden_channels=4),
}


@pytest.mark.parametrize("name", full_but(GRID, "two-scales", "split"))
def test_mass(name):
    """The density integrates to 1, and over a half plane to the share of draws that fall there."""
    flow = pf.Flow(shake(GRID[name](), 0.25).double())
    with torch.no_grad():
        draws = flow.sample((20000,)).flatten(1)
        middle, reach = draws.mean(0), 1.3 * (draws - draws.mean(0)).abs().max()
        ticks = torch.linspace(-1, 1, 241).double() * reach
        points = middle + torch.cartesian_prod(ticks, ticks)
        density = flow.log_prob(points.reshape(-1, *flow.event_shape)).exp() * (ticks[1] - ticks[0]) ** 2
        assert float(density.sum()) == pytest.approx(1, abs=1e-3)
        side = lambda p: (p - middle) @ torch.tensor([1.0, 0.7]).double() > 0.3  # noqa: E731
        assert float(density[side(points)].sum()) == pytest.approx(float(side(draws).double().mean()), abs=0.02)


@pytest.mark.full
def test_compile(direction):
    for flow in (
        FLOWS["realnvp"](context_dim=2),
        pf.Chain([pf.ConvCoupling((2, 4), Shift(), mask="channels", **SMALL), Conv1x1((2, 4), bias=True)]),
    ):
        flow = shake(flow.double(), 0.2)
        torch._dynamo.reset()
        run = torch.compile(getattr(flow, direction), fullgraph=True, backend="aot_eager")
        context = torch.randn(3, 2).double() if flow.context_dim else None
        values = [torch.ones(3, *flow.event_shape).double().requires_grad_() for _ in range(2)]
        results = [call(v, context) for call, v in zip((run, getattr(flow, direction)), values, strict=True)]
        grads = [
            torch.autograd.grad(out.sin().sum() + ladj.sum(), [value, *flow.parameters()])
            for (out, ladj), value in zip(results, values, strict=True)
        ]
        torch.testing.assert_close((*results[0], *grads[0]), (*results[1], *grads[1]))
    torch._dynamo.reset()


@pytest.mark.full
@pytest.mark.parametrize("name", ["multiscale_realnvp", "glow"])
def test_fit_beats_a_gaussian(name):
    """Blobs in one of four corners, which no Gaussian can tell from their mean."""
    generator = seeded(0)

    def images(rows):
        corner = torch.randint(4, (rows,), generator=generator)
        place = torch.eye(4)[corner].reshape(rows, 1, 2, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
        level = 1 + 0.3 * torch.randn(rows, 1, 1, 1, generator=generator)
        return level * place + 0.2 * torch.randn(rows, 1, 4, 4, generator=generator)

    data, test = images(2000), images(1000)
    flat = data.flatten(1)
    gaussian = dist.MultivariateNormal(flat.mean(0), flat.T.cov()).log_prob(test.flatten(1)).mean()
    steps = {"num_couplings": 1} if name == "multiscale_realnvp" else {"num_layers": 2}
    flow = getattr(pf, name)((1, 4, 4), num_scales=2, hidden_channels=16, num_blocks=1, **steps)
    fit = pf.fit_density(flow, data, progress=False, steps=300, lr=5e-3)
    assert fit.distribution.log_prob(test).mean() > gaussian + 1


BAD = [
    (lambda: Squeeze((1, 7, 8)), ValueError, "sides of even size, got event shape .1, 7, 8.; pad .* or crop"),
    (lambda: Squeeze((2, 3)), ValueError, "sides of even size"),
    (lambda: Squeeze(4), ValueError, r"of shape \(C, H, W\) or \(C, T\), got \(4,\)"),
    (lambda: Squeeze((1, 2, 2, 2)), ValueError, r"of shape \(C, H, W\)"),
    (lambda: Split(None, (3, 4, 4)), ValueError, "even number of channels, got event shape .3, 4, 4.; put a Squ"),
    (lambda: Split(nn.ReLU(), (2, 4)), TypeError, "inner to be a flow transform or None, got ReLU"),
    (lambda: Split(Conv1x1((2, 4)), (2, 4)), ValueError, r"events of shape \(1, 4\) on both sides, got \(2, 4\)"),
    (lambda: Split(Squeeze((1, 4)), (4, 2)), ValueError, r"data side; one that squeezes undoes it"),
    (lambda: Split(pf.ConvCoupling((1, 4), context_dim=2), (2, 4)), ValueError, "context of size 2, got context_dim=0"),
    (
        lambda: Split(pf.Wrap(dist.transforms.ExpTransform(), (1, 4)), (2, 4)),
        ValueError,
        "unconstrained numbers.*constrained ones",
    ),
    (lambda: pf.ConvCoupling(4), ValueError, r"ConvCoupling: expected an event of shape \(C, H, W\)"),
    (lambda: pf.ConvCoupling((1, 4), mask="half"), ValueError, "'checkerboard', 'channels' or boolean, got 'half'"),
    (lambda: pf.ConvCoupling((1, 4), mask="channels"), ValueError, "has one only; use mask='checkerboard'.*Squeeze"),
    (lambda: pf.ConvCoupling((3, 1, 1)), ValueError, "has one place only; use mask='channels'"),
    (lambda: pf.ConvCoupling((2, 2), mask=torch.ones(2, 2).bool()), ValueError, "keeps 4 of 4"),
    (lambda: pf.ConvCoupling((2, 2), mask=torch.zeros(2, 2).bool()), ValueError, "keeps 0 of 4"),
    (lambda: pf.ConvCoupling((2, 2), mask=torch.eye(2)), ValueError, "boolean mask of shape .2, 2., got torch.float32"),
    (lambda: pf.ConvCoupling((2, 2), mask=torch.eye(3).bool()), ValueError, r"boolean mask .* shape \(3, 3\)"),
    (lambda: pf.ConvCoupling((2, 2), pf.Spline(boundary="circular")), ValueError, "moves angles"),
    (lambda: pf.ConvCoupling((1, 4), kernel_size=2), ValueError, "kernel_size to be an odd integer >= 1"),
    (lambda: pf.ConvCoupling((1, 4), hidden_channels=0), ValueError, "hidden_channels to be an integer >= 1, got 0"),
    (lambda: pf.ConvCoupling((1, 4), num_blocks=-1), ValueError, "num_blocks to be an integer >= 0"),
    (lambda: ConvNet(1, 1, space_dims=3), ValueError, "space_dims to be 1 or 2, got 3"),
    (lambda: Conv1x1((2, 4), start="random"), ValueError, "'rotation', 'permutation' or 'identity', got 'random'"),
    (lambda: pf.glow((1, 7, 7)), ValueError, r"glow: .* halved 1 times, got event shape \(1, 7, 7\), which allows 0"),
    (lambda: pf.glow((1, 28, 28), num_scales=3), ValueError, "halved 3 times.*allows 2.*multiples of 8"),
    (lambda: pf.multiscale_realnvp((1, 28, 28), num_scales=4), ValueError, "multiscale_realnvp: .* halved 3 times"),
    (lambda: pf.multiscale_realnvp((1, 4, 4), num_scales=0), ValueError, "num_scales to be an integer >= 1, got 0"),
    (lambda: pf.multiscale_realnvp(16), ValueError, r"multiscale_realnvp: expected an event of shape \(C, H, W\)"),
    (
        lambda: pf.glow((1, 4, 4), num_layers=1.5),
        ValueError,
        "glow: expected num_layers to be an integer >= 1, got 1.5",
    ),
]


@pytest.mark.parametrize("make, kind, message", BAD, ids=[f"{k}-{m[:20]}" for k, (_, _, m) in enumerate(BAD)])
def test_refuses(make, kind, message):
    refuses(kind, message, make)


def test_seven_by_seven_needs_no_squeeze():
    flow = pf.multiscale_realnvp((1, 7, 7), hidden_channels=2, num_blocks=0)
    assert not any(isinstance(part, Squeeze) for part in flow)
    assert flow(torch.randn(2, 1, 7, 7)).shape == (2, 1, 7, 7)


def test_an_image_without_its_channel_is_told():
    for build in (pf.glow, pf.multiscale_realnvp):
        with pytest.warns(UserWarning, match=r"series of 8 channels and 8 steps; an image .* is \(1, 8, 8\)"):
            build((8, 8))
        build((2, 8)), build((1, 8, 8))  # no warning
