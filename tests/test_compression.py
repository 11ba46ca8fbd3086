"""Lossless compression: what comes back, how small it is, and what is refused.

The range coder is the package constriction, or, so that all else is tested without it, one of big integers.
"""

import copy
import re
import resource
import struct
import sys
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import shake

import pyro_flows as pf
from pyro_flows.distributions import CategoricalHead, DistributionHead, LogisticMixtureHead, MixedHead
from pyro_flows.infer import Codec
from pyro_flows.infer.compression import conditionals, container, decisions
from pyro_flows.infer.compression.conditionals import cumulative, level_counts

WHOLE = 2**24


class Encoder:
    """A range coder of two outcomes by integers without end: slow, and plainly right."""

    def encode(self, symbols, family, pairs):
        low, width, words = 0, 1 << 64, 2
        for symbol, (left, _) in zip(symbols.tolist(), pairs.tolist(), strict=True):
            part = (width >> 24) * (int(left) + 1)
            low, width = (low + part, width - part) if symbol else (low, part)
            if width < 1 << 32:
                low, width, words = low << 32, width << 32, words + 1
        self.words = np.array([low >> 32 * k & 0xFFFFFFFF for k in reversed(range(words))], np.uint32)

    def get_compressed(self):
        return self.words


class Decoder:
    def __init__(self, words):
        self.words = [*words.tolist(), 0, 0]
        self.value, self.width, self.at = (self.words[0] << 32) | self.words[1], 1 << 64, 2

    def decode(self, family, pairs):
        found = []
        for left, _ in pairs.tolist():
            part = (self.width >> 24) * (int(left) + 1)
            symbol = int(self.value >= part)
            self.value, self.width = (self.value - part, self.width - part) if symbol else (self.value, part)
            if self.width < 1 << 32:
                following = self.words[self.at] if self.at < len(self.words) else 0
                self.value, self.width, self.at = (self.value << 32) | following, self.width << 32, self.at + 1
            found.append(symbol)
        return np.array(found, np.int32)


@pytest.fixture(params=["integers", "constriction"])
def coder(request, monkeypatch):
    """Both range coders; the second is skipped where it is not installed."""
    if request.param == "constriction":
        pytest.importorskip("constriction")
    else:
        plain(monkeypatch)
    return request.param


def plain(monkeypatch):
    stand_in = SimpleNamespace(RangeEncoder=Encoder, RangeDecoder=Decoder)
    monkeypatch.setattr(decisions, "_queue", lambda: (stand_in, None))


@pytest.fixture
def integers(monkeypatch):
    plain(monkeypatch)


def shaken(model, size=0.3):
    return shake(model, size).eval()


def mint(event, levels=17, size=0.05, **options):
    chain = pf.Chain([pf.mintnet(event, num_layers=2, num_groups=3, one_sided=True, **options)])
    return shaken(pf.Flow(pf.Chain([chain, pf.LogitPixels(event, levels)])), size)


def attending(event, **options):
    model = mint(event, attention=1, head_dim=5, **options)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if name.endswith("attention.out"):
                each.mul_(10)  # so that what is far away counts
    return model


MIXED = [("bernoulli", [0, 3]), (CategoricalHead(4), [1]), (LogisticMixtureHead(9, 2), [4, 2])]
MODELS = {
    "bernoulli": lambda: shaken(pf.MADE(12, hidden_dims=(16,), order="random", seed=1)),
    "categories": lambda: shaken(pf.MADE(5, CategoricalHead([3, 1, 5, 2, 17]), hidden_dims=(16,), context_dim=2)),
    "one number of categories": lambda: shaken(pf.MADE(6, CategoricalHead(4), hidden_dims=(16,))),
    "logistics": lambda: shaken(pf.MADE(6, LogisticMixtureHead(256, 3), hidden_dims=(16,), order="any", seed=0)),
    "mixed": lambda: shaken(pf.MADE(5, MixedHead(MIXED), hidden_dims=(16,), connectivity="random", seed=2)),
    "of Pyro": lambda: shaken(pf.MADE(4, DistributionHead(dist.Bernoulli), hidden_dims=(8,))),
    "image": lambda: shaken(
        pf.ConvMADE((2, 4, 3), LogisticMixtureHead(17, 3), hidden_channels=6, num_layers=3, context_dim=2), 0.1
    ),
    "sequence": lambda: shaken(pf.ConvMADE((2, 7), CategoricalHead(3), hidden_channels=6), 0.1),
    "flow of images": lambda: mint((2, 4, 3), context_dim=2, act_norm=True),
    "flow of sequences": lambda: pf.Dequantized(mint((2, 6), 5, order="position"), 5),
    "flow with attention": lambda: attending((2, 3, 2), context_dim=1),
}


def rows_of(model, count=200):
    """Rows that the model thinks likely, and contexts."""
    context = torch.randn(count, model.context_dim) if model.context_dim else None
    shape = (count,) if context is None else ()
    if isinstance(model, pf.MADE):
        x = model.one(0, context).sample(shape)
    elif isinstance(model, pf.Flow):
        x = model(context).sample(shape).floor().clamp(0, 16) if model.context_dim else model().sample(shape)
    else:
        x = model(context).sample(shape)
    return x.long(), context


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def made(**options):
    return shaken(pf.MADE(6, CategoricalHead(5), hidden_dims=(16,), **options))


# What comes back.


def test_round_trip(model, coder):
    x, context = rows_of(model)
    codec = Codec(model)
    data = codec.encode(x, context)
    restored = codec.decode(data, context)
    assert restored.dtype == x.dtype and torch.equal(restored, x)
    bound = float(codec.bits(x, context).sum()) / 8
    assert len(data) <= 1.01 * bound + 64
    assert not any(plain for _, plain in container.unpack(data)[1])


def test_unlikely_rows(model, coder):
    codec = Codec(model)
    dims, levels = codec.levels.numel(), codec.levels
    rows = (torch.rand(40, dims) * levels).long()
    rows = torch.cat((rows, rows[:1].expand(20, -1), torch.zeros(5, dims).long(), (levels - 1).expand(5, -1)))
    x = rows.view(len(rows), *codec._model.event_shape)
    context = torch.randn(len(x), model.context_dim) if model.context_dim else None
    data = codec.encode(x, context)
    assert torch.equal(codec.decode(data, context), x)
    assert len(data) <= len(x) * float(levels.log2().sum()) / 8 + 72  # never much more than the levels take


@pytest.mark.parametrize("size", [1.0, 30.0, 1e6])
@pytest.mark.parametrize("name", MODELS)
def test_extreme_weights(name, size, integers):
    model = shaken(MODELS[name](), size)
    codec = Codec(model)
    x = (torch.rand(20, codec.levels.numel()) * codec.levels).long().view(20, *codec._model.event_shape)
    context = torch.randn(20, model.context_dim) if model.context_dim else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            data = codec.encode(x, context)
        except FloatingPointError:
            assert size == 1e6 and "flow" in name  # a product of too many large numbers
            return
    assert torch.equal(codec.decode(data, context), x)


@pytest.mark.parametrize("name", ["bernoulli", "logistics", "image", "flow of images"])
@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 3), (0, 4)])
def test_batches(name, batch, coder):
    model = MODELS[name]()
    codec = Codec(model)
    shape = (*batch, *codec._model.event_shape)
    x = torch.randint(int(codec.levels.min()), shape)
    context = torch.randn(*batch[1:], model.context_dim) if model.context_dim else None
    restored = codec.decode(codec.encode(x, context), context)
    assert restored.shape == shape and torch.equal(restored, x)
    assert codec.bits(x, context).shape == batch


@pytest.mark.parametrize("dtype", container.DTYPES)
def test_dtypes(dtype, integers):
    codec = Codec(MODELS["bernoulli"]())
    x = torch.randint(2, (3, 12)).to(dtype)
    restored = codec.decode(codec.encode(x))
    assert restored.dtype == dtype and torch.equal(restored, x)


def test_several_pieces(coder, monkeypatch):
    model = MODELS["image"]()
    x, context = rows_of(model, 23)
    whole = Codec(model).encode(x, context)
    monkeypatch.setattr("pyro_flows.infer.compression.codec.MOST_ROWS", 5)
    codec = Codec(model)
    pieces = codec.encode(x, context)
    assert len(container.unpack(pieces)[1]) == 5
    for data in (whole, pieces):  # the file says how many rows there are in a piece
        assert torch.equal(codec.decode(data, context), x)


@pytest.mark.parametrize("name", ["logistics", "image", "flow of images"])
def test_precision_of_the_reader(name, integers, default_dtype):
    model = MODELS[name]()
    x, context = rows_of(model, 50)
    data = Codec(model).encode(x, context)
    default_dtype(torch.float64)
    assert torch.equal(Codec(copy.deepcopy(model).double()).decode(data, context), x)


def test_members(integers):
    model = MODELS["logistics"]()
    x, _ = rows_of(model, 20)
    first, third = Codec(model), Codec(model.train(), number=2)
    assert torch.equal(third.decode(third.encode(x)), x)
    torch.testing.assert_close(third.bits(x), -model.one(2).log_prob(x).double() / np.log(2), rtol=1e-4, atol=1e-4)
    refuses(ValueError, "those of another", first.decode, third.encode(x))


def test_nothing_else_changes(model, integers):
    x, context = rows_of(model, 5)
    model.train()
    before, dtype = torch.get_rng_state(), next(model.parameters()).dtype
    codec = Codec(model)
    data = codec.encode(x, context)
    codec.decode(data, context)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and next(model.parameters()).dtype == dtype
    shaken(model)  # the codec is of the model as it was
    assert torch.equal(codec.decode(data, context), x)


# Probabilities.


@pytest.mark.parametrize("name", [n for n in MODELS if "flow" not in n])
def test_cumulative_probabilities_are_those_of_the_head(name):
    model = MODELS[name]().double()
    head, dims = model.head, model.input_dim
    params = torch.randn(7, dims, head.num_params, dtype=torch.float64)
    levels = torch.tensor(level_counts(head))
    below = torch.zeros(7, dims, dtype=torch.float64)
    for level in range(int(levels.max())):
        inside = level < levels
        mass = head.log_prob(torch.full((7, dims), float(level)).double(), params).exp()
        own = cumulative(head, params)(torch.minimum(levels - 1, torch.tensor(level + 1)).clamp(min=1).expand(7, -1))
        above = torch.where(level + 1 < levels, own, 1.0)
        torch.testing.assert_close((above - below)[:, inside], mass[:, inside], rtol=1e-9, atol=1e-12)
        below = above
    some = torch.tensor([dims - 1, 0])
    middle = (levels - 1).clamp(min=1).expand(7, -1)
    torch.testing.assert_close(
        cumulative(head, params[:, some], some)(middle[:, some]), cumulative(head, params)(middle)[:, some]
    )


@pytest.mark.parametrize("name", [n for n in MODELS if "flow" not in n])
def test_bits_are_those_of_the_model(name):
    model = MODELS[name]()
    x, context = rows_of(model, 20)
    view = model.one(0, context) if isinstance(model, pf.MADE) else model(context)
    expected = -view.log_prob(x).double() / np.log(2)
    torch.testing.assert_close(Codec(model).bits(x, context), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["flow of images", "flow of sequences", "flow with attention"])
def test_discrete_model_of_a_flow(name):
    """One coordinate at a time at its borders, all others at their centres, through the flow itself."""
    model = MODELS[name]()
    x, context = rows_of(model, 4)
    flow = (model.flow if isinstance(model, pf.Dequantized) else model).double()
    context = None if context is None else context.double()
    found = Codec(model)._model
    dims, levels = x[0].numel(), int(found.levels[0])
    flat = x.flatten(1)
    total = torch.zeros(4, dtype=torch.float64)
    edges = found.edges(flat, context)
    own = torch.stack([edges(torch.full_like(flat, k)) for k in range(1, levels)], -1)
    for i in range(dims):
        v = (flat + 0.5).double().repeat(levels - 1, 1, 1)  # (levels - 1, rows, D)
        v[:, :, i] = torch.arange(1, levels)[:, None]
        z = flow.chain.inverse_and_ladj(v.view(levels - 1, *x.shape), *([] if context is None else [context]))[0]
        inner = torch.special.ndtr(z.flatten(2)[:, :, i]).T
        torch.testing.assert_close(own[:, i], inner, rtol=0, atol=1e-12)
        cdf = torch.cat((torch.zeros(4, 1).double(), inner, torch.ones(4, 1).double()), 1)
        total += cdf.diff(dim=-1).gather(1, flat[:, i : i + 1])[:, 0].log2()
    torch.testing.assert_close(Codec(model).bits(x, context), -total, rtol=1e-6, atol=1e-6)


def test_far_tails_have_bits():
    model = mint((1, 3, 3), 17, 1.0)
    x = torch.randint(17, (50, 1, 3, 3))
    assert Codec(model).bits(x).isfinite().all()


# Rounding.


def noisy(size):
    """Cumulative probabilities as another machine may compute them."""

    def changed(head, params, dims=None):
        edges = cumulative(head, params, dims)
        return lambda middle: edges(middle) + size * (2 * torch.rand(middle.shape, dtype=torch.float64) - 1)

    return changed


def test_other_arithmetic_within_the_tolerance(integers, monkeypatch):
    model = MODELS["logistics"]()
    x, _ = rows_of(model, 100)
    monkeypatch.setattr(decisions, "SLACK", 2.0**-4)  # so that it matters often
    codec = Codec(model)
    data = codec.encode(x)
    _, ((piece, _),) = container.unpack(data)
    assert 200 < len(piece.places) < 800
    assert decisions.SLACK / decisions.COUNTS == 2.0**-22
    monkeypatch.setattr(conditionals, "cumulative", noisy(0.99 * decisions.SLACK / decisions.COUNTS))
    assert torch.equal(codec.decode(data), x)
    # It is the notes that do it.
    header, _ = container.unpack(data)
    bare = container.pack(header, [(decisions.Piece(piece.words, piece.places[:0], piece.odd[:0]), False)])
    refuses(ValueError, r"differ from those of the encoder|nothing that this model", codec.decode, bare)


def test_notes_are_rare(integers):
    model = MODELS["logistics"]()
    x, _ = rows_of(model, 500)
    _, pieces = container.unpack(Codec(model).encode(x))
    assert sum(len(piece.places) for piece, _ in pieces) < 5  # of some 20,000 decisions
    assert decisions.SLACK / decisions.COUNTS == 2.0**-36


def test_other_arithmetic_beyond_the_tolerance(integers, monkeypatch):
    model = MODELS["image"]()
    x, context = rows_of(model, 30)
    codec = Codec(model)
    data = codec.encode(x, context)
    monkeypatch.setattr(conditionals, "cumulative", noisy(1e-3))
    refuses(ValueError, "differ from those of the encoder", codec.decode, data, context)
    with pytest.warns(RuntimeWarning, match="1 of 1 pieces could not be decoded"):
        fallen_back = codec.encode(x, context)
    assert torch.equal(codec.decode(fallen_back, context), x)
    assert len(fallen_back) > len(data)
    with pytest.raises(ValueError, match="differ from those of the encoder"):
        codec.decode(codec.encode(x, context, verify=False), context)


def test_format_of_the_coder():
    """What the range coder writes must stay what it is, or old files could not be read."""
    pytest.importorskip("constriction")
    levels = torch.tensor([5, 2, 1, 300])
    x = torch.arange(40).view(10, 4) % levels
    piece = decisions.write(
        x, levels, [torch.tensor([1, 0]), torch.tensor([2]), torch.tensor([3])], decisions.even(levels)
    )
    assert piece.words.astype("<u4").tobytes().hex() == GOLDEN
    reader = decisions.Reader(piece, levels, 10)
    for dims in ([1, 0], [2], [3]):
        assert torch.equal(reader.read(torch.tensor(dims), decisions.even(levels[dims])), x[:, dims])


GOLDEN = "9adff3b1eb8bcf1a67ba86923657a453"


# What is refused.


@pytest.fixture
def written(integers):
    codec = Codec(made())
    x, _ = rows_of(made(), 6)
    return codec, codec.encode(x), x


def test_each_corrupt_byte_is_seen(written):
    codec, data, _ = written
    for at in range(len(data)):
        for change in (1, 128):
            bad = bytearray(data)
            bad[at] ^= change
            refuses(ValueError, "Codec: ", codec.decode, bytes(bad))


def test_truncated_or_longer(written):
    codec, data, _ = written
    for size in range(len(data)):
        refuses(ValueError, r"corrupt or truncated|which begin with PFZ", codec.decode, data[:size])
    refuses(ValueError, "corrupt or truncated", codec.decode, data + b"\0")


def test_tampering_that_mends_the_check_sum(written):
    """Never other numbers, and no error but the worded one."""
    codec, data, x = written
    generator = np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(data[:-4])
        for _ in range(generator.integers(1, 4)):
            bad[generator.integers(4, len(bad))] = generator.integers(256)
        bad += struct.pack("<I", zlib.crc32(bytes(bad)))
        try:
            restored = codec.decode(bytes(bad))
        except ValueError as error:
            assert "Codec: " in str(error)
        else:  # as by a byte that became what it was, another dtype, or the coder's last bits
            assert torch.equal(restored.reshape(x.shape).long(), x.to(restored.dtype).long())


def mended(body):
    return body + struct.pack("<I", zlib.crc32(body))


def numbers(*values):
    return b"".join(map(container._number, values))


SHAPES = [
    [2**50],
    [2**20],
    [513],
    [2**12] * 3,
    [0, 2**50, 2**50],
    [2**40, 2**40],
    [1] * 64,
    [2**62],
    [2**56, 2**8, 2**8],
]
PIECES = {
    "none": b"",
    "empty": numbers(0, 0),
    "empty and plain": numbers(1, 0),
    "one word": numbers(2, 0) + b"abcd",
    "a place beyond 64 bits": numbers(2, 1, 2**64) + b"abcd",
    "a place beyond 63 bits": numbers(2, 1, 2**63) + b"abcd",
    "places that add up to more": numbers(2, 3, 2**39, 2**39, 2**40) + b"abcd",
    "more words than there are": numbers(2**39, 0) + b"abcd",
    "more places than there are": numbers(2, 2**39) + b"abcd",
}


@pytest.mark.parametrize("pieces", PIECES)
def test_sizes_are_bounded_by_the_length(pieces, written, monkeypatch):
    """Files of some 40 bytes with sound check sums that speak of up to 2 ** 80 rows."""
    codec, data, _ = written
    reader, peak = decisions.Reader, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def bounded(piece, levels, rows):
        assert rows <= 512
        return reader(piece, levels, rows)

    monkeypatch.setattr("pyro_flows.infer.compression.codec.Reader", bounded)
    for shape in SHAPES:
        for rows in (0, 1, 511, 512, 513, 2**20, 2**39, 2**50, 2**63, 2**70):
            body = data[:17] + b"\0" + numbers(len(shape), *shape, rows) + PIECES[pieces]
            refuses(ValueError, "Codec: ", codec.decode, mended(body))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**16  # 64 MiB


def test_each_bit_and_each_cut_is_refused(integers):
    for name in ("categories", "mixed", "image", "flow of sequences"):
        model = MODELS[name]()
        x, context = rows_of(model, 2)
        codec = Codec(model)
        data = codec.encode(x, context)
        damaged = [data[:at] for at in range(len(data))]
        for at in range(len(data)):
            for bit in range(8):
                damaged.append(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        generator = np.random.default_rng(0)
        damaged += [generator.bytes(size) for size in range(60)]
        damaged += [mended(data[:at]) for at in range(18, len(data) - 4)]
        damaged += [mended(data[:17] + generator.bytes(size)) for size in range(60)]
        for bad in damaged:
            refuses(ValueError, "Codec: ", codec.decode, bad, context)


def test_numbers_that_the_dtype_cannot_hold(integers):
    """The check sum over the numbers knows nothing of the dtype in which they are given back."""
    codec = Codec(MODELS["logistics"]())
    x = torch.full((2, 6), 200)
    body = bytearray(codec.encode(x)[:-4])
    for code, dtype in enumerate(container.DTYPES):
        body[4] = code
        if dtype in (torch.bool, torch.int8):
            refuses(ValueError, f"numbers are {dtype}, which cannot hold them", codec.decode, mended(bytes(body)))
        else:
            assert torch.equal(codec.decode(mended(bytes(body))), x.to(dtype))


def test_something_else(written):
    codec, data, _ = written
    refuses(ValueError, "begin with PFZ", codec.decode, b"\x89PNG and so on")
    refuses(ValueError, "begin with PFZ", codec.decode, b"")
    refuses(ValueError, "version 1, got version 7", codec.decode, data[:3] + b"\7" + data[4:])
    refuses(TypeError, "bytes of encode, got str", codec.decode, "PFZ")


def test_another_model(written):
    _, data, _ = written
    other = made()
    with torch.no_grad():
        first = next(other.parameters()).view(-1)
        first[0] = torch.nextafter(first[0], torch.tensor(9.0))
    for model in (other, shaken(pf.MADE(6, CategoricalHead(6), hidden_dims=(16,)))):
        refuses(ValueError, "those of another", Codec(model).decode, data)


def test_another_context(integers):
    model = made(context_dim=2)
    x, context = rows_of(model, 8)
    codec = Codec(model)
    data = codec.encode(x, context)
    refuses(ValueError, "expected the context with which", codec.decode, data, context + 1e-6)
    refuses(ValueError, "context_dim=2: give a context", codec.decode, data)
    refuses(ValueError, r"broadcasts to shape \(8, 2\), got shape \(8, 3\)", codec.encode, x, torch.randn(8, 3))
    refuses(ValueError, "context_dim=0", Codec(made()).encode, x, context)


def test_bad_rows():
    codec = Codec(made())
    refuses(TypeError, r"integers or booleans.*got torch.float32", codec.encode, torch.zeros(3, 6))
    refuses(TypeError, "got list", codec.encode, [[0] * 6])
    refuses(ValueError, r"shape \(\*batch, 6\), got shape \(3, 5\)", codec.encode, torch.zeros(3, 5).long())
    x = torch.zeros(3, 6).long()
    x[1, 2] = 5
    for wrong in (5, -1):
        x[1, 2] = wrong
        refuses(ValueError, f"levels 0 to 4 in dimension 2, got {wrong} in row 1 \\(1 such in 18\\)", codec.encode, x)


@pytest.mark.parametrize("name", ["bernoulli", "logistics", "image", "flow of images"])
def test_parameters_that_are_no_numbers(name, integers):
    model = MODELS[name]()
    x, context = rows_of(model, 3)
    with torch.no_grad():
        for each in model.parameters():
            each.view(-1)[0] = torch.nan
    refuses(FloatingPointError, "probabilities that are NaN", Codec(model).encode, x, context)


def test_layers_with_and_without_attention(coder):
    """The finer way through the coordinates is that of both."""
    event, options = (1, 3, 3), {"num_groups": 2, "order": "position"}
    for parts in ([{}, {"attention": 1, "head_dim": 5}], [{"attention": 1, "head_dim": 5}, {}]):
        layers = [pf.Mint(event, **options, **each) for each in parts]
        model = shaken(pf.Flow(pf.Chain([*layers, pf.LogitPixels(event, 5)])))
        x = torch.randint(5, (20, *event))
        codec = Codec(model)
        assert len(codec._model.steps) == 9
        assert torch.equal(codec.decode(codec.encode(x)), x)


def test_models_that_have_no_such_conditionals():
    refuses(TypeError, "a MADE or ConvMADE", Codec, torch.nn.Linear(2, 2))
    for head in ("normal", DistributionHead(dist.Poisson)):
        refuses(ValueError, "head of levels", Codec, pf.MADE(3, head))
    event = (1, 4, 4)
    refuses(ValueError, "of one orientation", Codec, pf.Flow(pf.Chain([pf.mintnet(event), pf.LogitPixels(event, 17)])))
    refuses(ValueError, "ends in LogitPixels", Codec, pf.Flow(pf.mintnet(event, one_sided=True)))
    refuses(ValueError, "got Autoregressive", Codec, pf.Flow(pf.Chain([pf.maf(4), pf.LogitPixels(4, 17)])))
    flow = pf.Flow(pf.Chain([pf.mintnet(event, one_sided=True), pf.LogitPixels(event, 17)]))
    with pytest.raises(ValueError, match="got one with a dequantizer"):
        Codec(pf.Dequantized(flow, 17, dequantizer=pf.Dequantizer(event)))
    refuses(ValueError, "number to be an integer >= 0, got -1", Codec, pf.MADE(3), number=-1)


def test_without_the_coder(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    codec = Codec(made())
    assert codec.bits(torch.zeros(2, 6).long()).shape == (2,)
    refuses(ImportError, r"pip install 'pyro-flows\[compression\]'", codec.encode, torch.zeros(2, 6).long())


@pytest.mark.full
def test_page(tmp_path, monkeypatch):
    """The blocks of the page that need the coder."""
    pytest.importorskip("constriction")
    page = (Path(__file__).parent.parent / "docs" / "compression.md").read_text()
    blocks = re.findall(r"^```py(?:thon)?\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    monkeypatch.chdir(tmp_path)
    space = {}
    for block in blocks:
        exec(block, space)
