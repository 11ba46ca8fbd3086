"""Attention in Mint layers: against loops over tokens, the Jacobian that stays triangular, and both directions."""

import copy
import math

import pytest
import torch
from asserts import comes_back, leads_back, refuses
from cases import scaled, shake
from oracles import jacobians, kept
from test_mint import check_layer, in_order, layer, trained

import pyro_flows as pf
from pyro_flows.infer import pixel_scores
from pyro_flows.transforms.mint.attention import Attention, AttentionNet
from pyro_flows.transforms.mint.orders import as_image, ranks

DOUBLE = torch.float64
SMALL = {"attention": 2, "head_dim": 5}
SHAPES = [(1, 4, 4), (2, 3, 2), (3, 2, 3), (1, 7), (2, 5)]


def net(channels, rule, scale=2.0):
    made = AttentionNet(channels, rule).double()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_().mul_(scale / math.sqrt(p.shape[-1]))
    return made


@torch.no_grad()
def one_by_one(x, rule, w):
    """What tokens get, by loops over events, tokens, heads and keys, with complex numbers for the rotations."""
    _, height, width = x.shape[1:]
    (down, right), heads, size = (n // 2 for n in rule.kernel), rule.heads, rule.head_dim
    axes = 1 if rule.kernel[0] == 1 else 2
    pairs = (size - 1) // (2 * axes)
    half = pairs * axes
    speeds = 100.0 ** (-torch.arange(pairs, dtype=DOUBLE) / pairs)
    out = torch.zeros_like(x)
    sign = 1 if rule.lower else -1
    cells = [(r, c) for r in range(height) for c in range(width)][::sign]

    def at(event, r, c):
        return event[:, r, c] if 0 <= r < height and 0 <= c < width else torch.zeros_like(event[:, 0, 0])

    def turned(v, cell):
        angle = torch.cat([(sign * cell[-axes:][k]) * speeds for k in range(axes)])
        return torch.cat((torch.complex(v[:half], v[half : 2 * half]) * torch.exp(1j * angle), v[2 * half :]))

    for n, event in enumerate(x):
        kept = []
        for i, (r, c) in enumerate(cells):
            near = [(a, b) for a in range(-down, 1) for b in range(-right, right + 1) if a < 0 or b <= 0]
            seen = torch.cat([at(event, r + sign * a, c + sign * b) for a, b in near])
            q = w.query_mix @ torch.tanh(w.query_taps @ seen[: -len(event)] + w.query_bias)
            k, v = (w.key_mix @ torch.tanh(w.key_taps @ seen + w.key_bias)).chunk(2)
            got = []
            for h in range(heads):
                part = slice(h * size, (h + 1) * size)
                back = kept if rule.window is None else kept[max(i - rule.window, 0) :]
                scores = [q[part][2 * half :] @ w.null_key[h]]
                scores += [
                    (turned(q[part], (r, c)).conj() * turned(each[part], where)).real.sum() for each, _, where in back
                ]
                share = torch.softmax(torch.stack(scores) / math.sqrt(size), 0)
                values = torch.stack([w.null_value[h], *(each[part] for _, each, _ in back)])
                got.append(share @ values)
            out[n, :, r, c] = w.out @ torch.cat(got)
            kept.append((k, v, (r, c)))
    return out


@pytest.mark.parametrize("lower", [True, False], ids=["lower", "upper"])
@pytest.mark.parametrize("kernel, shape", [((3, 3), (2, 3, 4)), ((1, 3), (2, 1, 7)), ((5, 5), (1, 3, 3))])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_against_loops(kernel, shape, window, lower):
    rule = Attention(kernel, 2, 10, window, lower)
    weights = net(shape[0], rule).weights()
    x = torch.randn(2, *shape, dtype=DOUBLE)
    want = one_by_one(x, rule, weights)
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            torch.testing.assert_close(rule(x, weights), want, rtol=1e-12, atol=1e-12)


def test_one_token_after_the_other():
    """With keys and values that are kept, as many as the window has, and not before the first token."""
    for window in (None, 3):
        rule = Attention((1, 3), 2, 5, window)
        w = net(2, rule).weights()
        x = torch.randn(3, 2, 1, 9, dtype=DOUBLE)
        places, patches = rule.places(x), rule.patches(x)
        keys, values = rule.keys_values(patches[:, :0], places[:0], w)
        for i in range(9):
            now, where = patches[:, i : i + 1], places[i : i + 1]
            before = rule.queries(now[..., :-2], where, w)
            got = rule.attend(before, keys, values, w)
            with torch.no_grad():
                torch.testing.assert_close(rule.attend(before, keys, values, w), got, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(got[:, 0], rule(x, w)[:, :, 0, i], rtol=1e-12, atol=1e-12)
            more = rule.keys_values(now, where, w)
            keys, values = (torch.cat(each, -2) for each in zip((keys, values), more, strict=True))
            if window is not None:
                keys, values = keys[:, :, -window:], values[:, :, -window:]


@torch.no_grad()
def test_later_tokens_change_no_bit():
    """What a codec relies on, whose reader has not seen them yet; also where a kernel goes by blocks of keys."""
    rule = Attention((1, 3), 2, 8)
    w = net(1, rule).weights()
    x = torch.randn(2, 1, 1, 700, dtype=DOUBLE)
    for known in (1, 300, 699):
        later = torch.cat((x[..., :known], 100 * torch.randn_like(x[..., known:])), -1)
        assert torch.equal(rule(later, w)[..., : known + 1], rule(x, w)[..., : known + 1])


def test_series_are_seen_by_distance():
    """What a token gets does not change when all that it sees moves on in time."""
    rule = Attention((1, 3), 2, 6, window=3)
    w = net(2, rule).weights()
    x = torch.randn(2, 2, 1, 12, dtype=DOUBLE)
    later = torch.cat((torch.randn(2, 2, 1, 5, dtype=DOUBLE), x), -1)
    torch.testing.assert_close(rule(later, w)[..., 9:], rule(x, w)[..., 4:], rtol=1e-12, atol=1e-12)
    assert ((rule(later, w)[..., 5:9] - rule(x, w)[..., :4]).abs() > 1e-6).any()


def test_values_far_out_are_bounded():
    """Nothing beyond what values and the last matrix allow, however large x is; also for the first token."""
    rule = Attention((3, 3), 2, 5)
    w = net(2, rule).weights()
    most = w.out.abs() @ torch.maximum(w.key_mix[10:].abs().sum(1), w.null_value.abs().flatten())
    for size in (1.0, 1e3, 1e150):
        got = rule(size * torch.randn(4, 2, 3, 3, dtype=DOUBLE), w)
        assert (got.abs() <= most[:, None, None]).all()
        first = (w.out @ w.null_value.flatten()).expand(4, -1)
        torch.testing.assert_close(got[:, :, 0, 0], first)


def test_softmaxes_are_kept_once():
    """For the gradient: one number for each event, head and pair of tokens."""
    rule = Attention((3, 3), 2, 5)
    made, x = net(1, rule), torch.randn(8, 1, 8, 8, dtype=DOUBLE)
    pairs = 8 * 8 * 2 * 64 * 64  # bytes
    assert [n for n in kept(lambda: rule(x, made.weights())).values() if n >= pairs] == [pairs]


# In a layer


@pytest.mark.full
@pytest.mark.parametrize("lower", [True, False], ids=["lower", "upper"])
@pytest.mark.parametrize("shape", SHAPES)
def test_jacobian(shape, lower):
    """T1: with parameters three times as large as at first, and after training with these."""
    for options in ({}, {"num_groups": 1, "kernel_size": 1}, {"context_dim": 2, "window": 2}):
        check_layer(layer(shape, lower=lower, **SMALL, **options))
    made = trained(shape, lower=lower, **SMALL)
    check_layer(made)
    check_layer(scaled(made, 3))


@pytest.mark.parametrize("shape", [(2, 6, 6), (1, 16)])
@pytest.mark.parametrize("lower", [True, False], ids=["lower", "upper"])
def test_pixels_see_all_before_them(shape, lower):
    """Near or far; without attention the first pixel does not reach the last."""
    made = layer(shape, scale=1.0, lower=lower, **SMALL)
    y = torch.randn(1, *shape, dtype=DOUBLE, requires_grad=True)
    for reach in (True, False):
        full = in_order(jacobians(made.inverse_and_ladj(y)[0], y), made)[0]
        assert (full.triu(1) == 0).all()
        assert (full.tril(-1) != 0).sum() == len(full) * (len(full) - 1) // 2 or not reach
        assert (full[-1, 0] != 0) == reach
        with torch.no_grad():
            made.attention.out.zero_()
    # So the longest chains have all coordinates, in their order.
    places = ranks(as_image("test", shape), "position", lower).flatten().argsort()
    assert torch.equal(made.waves.flatten()[places], torch.arange(len(full)))


def test_log_determinants_are_those_without_attention():
    """Slopes at the same place do not know of it."""
    made = layer((2, 3, 3), **SMALL)
    y = torch.randn(3, 2, 3, 3, dtype=DOUBLE)
    x, logs = made.inverse_and_ladj(y)[0], made.log_slopes(y)
    with torch.no_grad():
        made.attention.out.zero_()
    assert torch.equal(made.log_slopes(y), logs)
    assert ((made.inverse_and_ladj(y)[0] - x).abs() > 1e-3).any()


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("shape, lower", [((2, 4, 4), True), ((1, 4, 4), False), ((2, 8), True)])
def test_trained_layers_are_inverted(shape, lower, times):
    """T4, T6: also with all weights three times as large, and for values from far out."""
    made = scaled(trained(shape, lower=lower, **SMALL), times)
    for far in (1.0, 4.0):
        x = far * torch.randn(20, *shape, dtype=DOUBLE)
        comes_back(made, x)
        report = made.last_solve
        assert report.converged and report.waves == math.prod(shape) and report.sweeps <= report.waves + 10
        leads_back(made, x)
    single = copy.deepcopy(made).float()
    x = torch.randn(20, *shape)
    y = single(x).detach()
    point = y.double().requires_grad_()
    # What the solver's tolerance in y makes of x; with weights three times as large that is more than 1e-4.
    moved = jacobians(made.inverse_and_ladj(point)[0], point).abs() @ (1 + y.double().abs()).flatten(1).unsqueeze(-1)
    bound = 1e-4 * (1 + x.abs()) if times == 1 else 1e-5 * (1 + moved.view(x.shape))
    assert ((single.inverse_and_ladj(y)[0] - x).abs() <= bound).all()
    if times == 1:
        assert ((single(single.inverse_and_ladj(x)[0]) - x).abs() <= bound).all()


def test_sweeps_are_about_as_many_as_waves():
    """T6: with random weights of up to three times Xavier's, attention's too."""
    for shape, gain in (((1, 8, 8), 1.0), ((1, 8, 8), 3.0), ((2, 4, 4), 3.0), ((2, 20), 3.0)):
        made = pf.Mint(shape, num_groups=8, **SMALL).double()
        with torch.no_grad():
            for p in (made.taps_0, made.taps_1, made.taps_2, made.centres):
                p.mul_(gain / 0.005)  # which is their gain at first
            for p in made.attention.parameters():
                p.normal_().mul_(gain / math.sqrt(p.shape[-1]))
        made(torch.randn(16, *shape, dtype=DOUBLE))
        assert made.last_solve.sweeps <= made.last_solve.waves + 10


@pytest.mark.full
@pytest.mark.parametrize("direction", ["forward_and_ladj", "inverse_and_ladj"])
def test_compiles_in_one_piece(direction):
    """Values, log-determinants and gradients are those of the eager call."""
    made = layer((1, 2, 3), scale=1.0, **SMALL)
    x = torch.randn(2, 1, 2, 3, dtype=DOUBLE, requires_grad=True)
    pair = []
    for run in (getattr(made, direction), torch.compile(getattr(made, direction), fullgraph=True, backend="aot_eager")):
        moved, ladj = run(x)
        pair.append((moved, ladj, *torch.autograd.grad(moved.sin().sum() + ladj.sum(), [x, *made.parameters()])))
    torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)


def test_samples_do_not_depend_on_their_batch():
    """T2: nor on values of mates that are far out."""
    made = layer((2, 3, 3), context_dim=2, **SMALL)
    y, context = torch.randn(4, 2, 3, 3, dtype=DOUBLE), torch.randn(4, 2, dtype=DOUBLE)
    x, ladj = made.inverse_and_ladj(y, context)
    mates = made.inverse_and_ladj(torch.cat((y[2:3], 1e3 * y[:2])), torch.cat((context[2:3], -context[:2])))
    torch.testing.assert_close(mates[0][0], x[2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mates[1][0], ladj[2], rtol=1e-12, atol=1e-12)


def test_contexts_shift_queries():
    """And nothing else of the attention; at first not at all."""
    made = pf.Mint((1, 3, 3), num_groups=2, context_dim=2, **SMALL).double()
    with torch.no_grad():
        for p in made.attention.parameters():
            p.normal_()
    y, contexts = torch.randn(1, 3, 3, dtype=DOUBLE), torch.randn(5, 2, dtype=DOUBLE)
    x, ladj = made.inverse_and_ladj(y.expand(5, 1, 3, 3), contexts)
    assert torch.equal(x[0], x[1])
    with torch.no_grad():
        made.net.layers[-1].weight[-10:].normal_()  # the last of its outputs
    moved, same = made.inverse_and_ladj(y.expand(5, 1, 3, 3), contexts)
    assert torch.equal(same, ladj)
    assert torch.equal(moved[:, 0, 0, 0], x[:, 0, 0, 0])  # there is one value to attend to, whatever the query
    assert ((moved[0] - moved[1]).flatten()[1:].abs() > 1e-6).all()


def test_states_load_for_another_size():
    """With a shared scale nothing depends on the size, and a longer series begins as the shorter one does."""
    short, long = (pf.Mint((2, n), num_groups=2, shared_scale=True, **SMALL).double() for n in (5, 9))
    shake(short)
    long.load_state_dict(short.state_dict())
    y = torch.randn(3, 2, 9, dtype=DOUBLE)
    got, want = long.inverse_and_ladj(y)[0], short.inverse_and_ladj(y[..., :5])[0]
    torch.testing.assert_close(got[..., :5], want, rtol=1e-12, atol=1e-12)
    small, large = (pf.Mint((1, n, n), num_groups=2, shared_scale=True, **SMALL) for n in (3, 5))
    large.load_state_dict(small.state_dict())


def test_conditionals_are_exact():
    """Maps of surprise of a one-sided flow add up, and a pixel's changes with what is before it alone."""
    shape = (2, 3, 3)
    chain = shake(pf.mintnet(shape, num_layers=1, num_groups=2, one_sided=True, **SMALL), 0.3)
    flow = pf.Flow(chain).double()
    y = torch.randn(4, *shape, dtype=DOUBLE)
    maps = pixel_scores(flow, y)
    torch.testing.assert_close(maps.flatten(1).sum(1), -flow.log_prob(y).detach())
    moved = y.clone()
    moved[:, :, 1, 1] += 1
    change = (pixel_scores(flow, moved) - maps).abs().amax(0) > 1e-9
    assert not change[:, 0].any() and not change[:, 1, 0].any()
    assert change[:, 1, 1:].all() and change[:, 2].all()


def test_builder():
    """By position where there is attention, in every layer, at every size; a fresh flow is near the identity."""
    flow = pf.mintnet((1, 4, 4), num_layers=2, num_groups=4, squeeze=1, context_dim=1, **SMALL)
    layers = [part for part in flow if isinstance(part, pf.Mint)]
    assert {part.order for part in layers} == {"position"} and all(part.attention is not None for part in layers)
    assert {part.order for part in pf.mintnet((1, 4, 4))} == {"channel"}
    x, context = torch.randn(3, 1, 4, 4), torch.randn(3, 1)
    torch.testing.assert_close(flow.forward_and_ladj(x, context)[0], x, rtol=0, atol=0.02)
    assert "window=None" in repr(flow)
    shake(flow.double(), 0.1)
    y = torch.randn(2, 1, 4, 4, dtype=DOUBLE, requires_grad=True)
    x, ladj = flow.inverse_and_ladj(y, torch.randn(2, 1, dtype=DOUBLE))
    torch.testing.assert_close(ladj, torch.linalg.slogdet(jacobians(x, y))[1], rtol=1e-10, atol=1e-10)


@pytest.mark.full
def test_what_is_far_away_is_learnt():
    """A series whose second half repeats the first: out of reach of a layer's convolutions."""
    reached = []
    for heads in (0, 2):
        made = pf.Mint((1, 16), num_groups=4, order="position", attention=heads)
        optimiser = torch.optim.Adam(made.parameters(), lr=0.01)
        for _ in range(200):
            first = torch.randn(128, 1, 8)
            x, ladj = made.inverse_and_ladj(torch.cat((first, first + 0.1 * torch.randn(128, 1, 8)), -1))
            loss = (0.5 * x.square().sum((1, 2)) - ladj).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        reached.append(loss.item())
    assert reached[0] > 6.5 and reached[1] < 5  # 8 without any dependence, -10.4 with all of it


@pytest.mark.parametrize(
    "options, message",
    [
        ({"attention": -1}, r"attention to be an integer >= 0, got -1"),
        ({"attention": True}, r"attention to be an integer >= 0, got True"),
        ({"attention": 1, "head_dim": 0}, r"head_dim to be an integer >= 1, got 0"),
        ({"attention": 1, "head_dim": 4}, r"head_dim >= 5, .* got 4"),
        ({"attention": 1, "window": 0}, r"window to be an integer >= 1, got 0"),
        ({"window": 3}, r"window=3 needs attention, got attention=0; set it to a number of heads, or leave window out"),
        ({"attention": 1, "order": "channel"}, r"needs order='position', got order='channel'; leave order out"),
        ({"attention": 1, "order": "rows"}, r"order to be .* got 'rows'"),
    ],
)
def test_refuses(options, message):
    for build in (pf.Mint, pf.mintnet):
        refuses(ValueError, message, build, (1, 4, 4), **options)
    refuses(ValueError, r"head_dim >= 3, .* got 2", pf.Mint, (1, 4), attention=1, head_dim=2)
