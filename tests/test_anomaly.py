"""Anomaly scores by bits per dimension, their conformal p-values, and maps of surprise."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import seeded, shake
from torch import nn

import pyro_flows as pf
from pyro_flows.infer import AnomalyDetector, pixel_scores, standardized
from pyro_flows.transforms.mint.layer import Mint

OTHER = {torch.float32: torch.float64, torch.float64: torch.float32}


def normal_flow(dim=4):
    return pf.Flow(pf.Standardization([0.0] * dim, [1.0] * dim)).double()


def pixels(shape=(1, 2, 3), levels=16, **options):
    chain = pf.Chain([pf.realnvp(shape, num_layers=2, hidden_dims=(8,), **options), pf.LogitPixels(shape, levels)])
    return pf.Dequantized(shake(pf.Flow(chain), 0.1), levels)


# Scores.


def test_bits_are_the_mean_over_fixed_draws():
    deq = pixels()
    rows = torch.randint(0, 16, (40, 1, 2, 3))
    deq.train()
    deq.flow.chain.eval()
    modes = [module.training for module in deq.modules()]
    detector = AnomalyDetector(deq, rows)
    assert [module.training for module in deq.modules()] == modes
    with torch.no_grad():
        terms = torch.stack([deq.flow.log_prob(v) for v in deq.intensities(rows, 8, fresh=False)])
    want = -terms.mean(0).double() / (6 * math.log(2))
    got = detector.bits(rows)
    assert got.dtype == torch.float64 and got.device.type == "cpu" and not got.requires_grad
    torch.testing.assert_close(got, want.cpu(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(detector.reference, got.sort().values)
    assert detector.mean == pytest.approx(float(got.mean()))
    # The same in any batch, order and kind of array.
    for same in (rows.cpu().numpy(), rows.to(torch.uint8), rows.double().cpu().numpy(), rows.tolist()):
        torch.testing.assert_close(detector.bits(same), got)
    torch.testing.assert_close(torch.cat([detector.bits(row[None]) for row in rows]), got, rtol=1e-5, atol=1e-6)
    assert torch.equal(detector.scores(rows), got)
    two = AnomalyDetector(deq, rows, two_sided=True)
    torch.testing.assert_close(two.scores(rows), (got - got.mean()).abs())
    more = AnomalyDetector(deq, rows, num_noise_samples=64).bits(rows)
    assert not torch.allclose(more, got) and abs(float((more - got).mean())) < 0.05


def test_many_rows_go_in_pieces(monkeypatch):
    detector = AnomalyDetector(pixels(context_dim=2), *given(50))
    rows, context = given(50)
    whole = detector.bits(rows, context)
    monkeypatch.setattr("pyro_flows.infer.density.data._CHUNK", 20)
    torch.testing.assert_close(detector.bits(rows, context), whole, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(detector.bits(rows, context.flip(0)), whole)


def given(count):
    generator = seeded(1)
    return torch.randint(0, 16, (count, 1, 2, 3), generator=generator), torch.randn(count, 2, generator=generator)


def test_other_densities_have_bits_too():
    flow = normal_flow()
    rows = torch.randn(30, 4, dtype=torch.float64)
    detector = AnomalyDetector(flow, rows.cpu().numpy())
    torch.testing.assert_close(detector.bits(rows), -flow.log_prob(rows).cpu() / (4 * math.log(2)))

    class Ring(nn.Module):
        def log_prob(self, value):
            return -((value.norm(dim=-1) - 1) ** 2)

    torch.testing.assert_close(
        AnomalyDetector(Ring(), rows.float()).bits(rows.float()), Ring().log_prob(rows).cpu() / (-4 * math.log(2))
    )


# p-values and thresholds.


def brute_force(reference, bits, two_sided):
    values = []
    for b in bits:
        everyone = np.append(reference, b)
        scores = np.abs(everyone - everyone.mean()) if two_sided else everyone
        values.append((scores >= scores[-1] - 1e-13).mean())
    return torch.tensor(values, device="cpu")


@pytest.mark.parametrize("two_sided", [False, True])
def test_p_values_count_the_row_itself_in(two_sided):
    reference = torch.randn(57, 4, dtype=torch.float64)
    rows = torch.cat((3 * torch.randn(60, 4, dtype=torch.float64), reference[:5], torch.zeros(1, 4)))
    detector = AnomalyDetector(normal_flow(), reference, two_sided=two_sided)
    got = detector.p_values(rows)
    want = brute_force(detector.bits(reference).cpu().numpy(), detector.bits(rows).cpu().numpy(), two_sided)
    torch.testing.assert_close(got, want)
    assert got.min() == 1 / 58 and got.max() <= 1
    # Infinitely unlikely rows are as anomalous as can be.
    flow = pf.Flow([pf.Standardization([0.0], [1.0]), torch.distributions.ExpTransform()])
    positive = AnomalyDetector(flow, torch.rand(9, 1) + 0.5, two_sided=two_sided)
    assert positive.p_values(torch.tensor([[1e38]])) == pytest.approx(0.1)


@pytest.mark.parametrize("two_sided", [False, True])
def test_p_values_are_calibrated(two_sided):
    """Over reference rows as well: rows of the usual kind have uniform ranks, though the model is a wrong one."""
    generator = seeded(0)
    flow = pf.Flow(pf.Standardization([0.3, -0.2], [0.5, 2.0])).double()
    values, flagged = [], []
    for _ in range(150):
        rows = torch.randn(39, 2, generator=generator).double() ** 3
        detector = AnomalyDetector(flow, rows[:19], two_sided=two_sided)
        values.append(detector.p_values(rows[19:]))
        flagged.append(detector.flag(rows[19:], level=0.1))
    values = torch.stack(values)
    for level in (0.05, 0.1, 0.25, 0.5, 0.8):
        share = (values <= level + 1e-9).double()
        # Rows of one round share their reference; rounds are independent.
        error = float(share.mean(1).std()) / math.sqrt(len(share))
        assert abs(float(share.mean()) - level) < 4 * error + 1e-9
    if not two_sided:
        assert torch.equal(torch.stack(flagged), values <= 0.1 + 1e-9)


def test_threshold_bears_out_its_level():
    reference = torch.randn(99, 4, dtype=torch.float64)
    detector = AnomalyDetector(normal_flow(), reference)
    for level, at_most in ((0.01, 0), (0.05, 4), (0.5, 49), (0.995, 98)):
        assert int(detector.flag(reference, level=level).sum()) == at_most
    with pytest.raises(ValueError, match=r"99 reference rows are too few for a level of 0\.005; give 199 or more"):
        detector.threshold(0.005)
    for level in (0.0, 1.0, -0.1, math.nan):
        refuses(ValueError, "level to be between 0 and 1", detector.threshold, level)


def test_two_sides_find_what_is_too_likely():
    generator = seeded(0)
    rows = torch.randn(400, 100, generator=generator, dtype=torch.float64)
    bland, loud = 0.1 * rows[:50], 3 * rows[:50]
    one, two = (AnomalyDetector(normal_flow(100), rows[100:], two_sided=side) for side in (False, True))
    assert (one.p_values(loud) < 0.01).all() and (two.p_values(loud) < 0.01).all()
    assert (one.p_values(bland) > 0.99).all() and (two.p_values(bland) < 0.01).all()


def test_anomalous_images_are_found():
    generator = seeded(0)
    shape = (1, 4, 4)
    level = torch.randint(0, 11, (800, 1, 1, 1), generator=generator)
    rows = level + torch.randint(0, 6, (800, *shape), generator=generator)  # flat but for noise
    chain = pf.Chain([pf.realnvp(shape, num_layers=4, hidden_dims=(32,)), pf.LogitPixels(shape, 16)])
    deq = pf.Dequantized(chain, 16)
    pf.fit_density(deq, rows[:500], rows[500:600], progress=False, steps=250, lr=1e-2, batch_size=100)
    detector = AnomalyDetector(deq, rows[600:700])
    usual, odd = detector.p_values(rows[700:]), torch.randint(0, 16, (50, *shape), generator=generator)
    assert (detector.p_values(odd) <= 0.05).double().mean() > 0.9
    assert (usual <= 0.05).double().mean() < 0.2


def test_hostile_rows():
    deq = pixels()
    rows = torch.randint(0, 16, (20, 1, 2, 3))
    detector = AnomalyDetector(deq, rows)
    assert detector.bits(rows[:0]).shape == detector.p_values(rows[:0]).shape == (0,)
    assert detector.flag(rows[:0], level=0.1).shape == (0,)
    with pytest.raises(ValueError, match=r"expected rows of shape \(rows, 1, 2, 3\), got shape \(1, 2, 3\)"):
        detector.bits(rows[0])
    with pytest.raises(ValueError, match="whole numbers from 0 to 15"):
        detector.bits(rows + 10)
    with pytest.raises(ValueError, match=r"rows has NaN \(missing values\) in 1 of 2 rows \(row 1\)"):
        detector.bits(torch.stack((rows[0].float(), rows[0] * math.nan)))
    with pytest.raises(ValueError, match="context_dim=0"):
        detector.bits(rows, torch.zeros(20, 2))
    with pytest.raises(TypeError, match="expected rows to be a tensor or an array of numbers"):
        detector.bits("digits")
    with pytest.raises(ValueError, match="2 or more reference rows, got 1"):
        AnomalyDetector(deq, rows[:1])
    with pytest.raises(ValueError, match="expected num_noise_samples"):
        AnomalyDetector(deq, rows, num_noise_samples=0)
    with pytest.raises(TypeError, match="a Dequantized, a Flow or a module with log_prob"):
        AnomalyDetector(dist.Normal(0.0, 1.0), rows)
    conditional = pixels(context_dim=2)
    with pytest.raises(ValueError, match="a context for each of the 20 rows"):
        AnomalyDetector(conditional, rows, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="context_dim=2: give a context for each row"):
        AnomalyDetector(conditional, rows)
    with torch.no_grad():
        next(deq.parameters()).fill_(math.nan)
    refuses((FloatingPointError, ValueError), r"NaN|nan", detector.bits, rows)

    class Sums(nn.Module):
        def log_prob(self, value):
            return value.sum()

    with pytest.raises(ValueError, match=r"one number a row, shape \(20,\)"):
        AnomalyDetector(Sums(), rows.float())


# Maps of surprise.


class Triangular(pf.FlowTransform):
    """x = L y + sinh-like bends in each coordinate: triangular in a given order, with slopes."""

    def __init__(self, event_shape, order="channel", lower=True, context_dim=0):
        super().__init__(event_shape, context_dim)
        self.order, self.lower = order, lower
        dims = self.event_shape.numel()
        places = torch.arange(dims).view(self.event_shape)
        places = (places if order == "channel" else places.movedim(0, -1)).flatten()
        rank = torch.argsort(places if lower else places.flip(0))
        self.register_buffer("earlier", (rank[:, None] > rank[None, :]), persistent=False)
        self.weight = nn.Parameter(0.5 * torch.randn(dims, dims))
        self.log_scale = nn.Parameter(0.3 * torch.randn(dims))

    def _shift(self, flat, context):
        shift = torch.tanh(flat) @ (self.weight * self.earlier).T
        return shift if context is None else shift + context.sum(-1, keepdim=True)

    def inverse_and_ladj(self, y, context=None):
        flat = y.flatten(-len(self.event_shape))
        x = self.log_scale.exp() * (flat + flat**3 / 3) + self._shift(flat, context)
        return x.view(y.shape), self.log_slopes(y, context).flatten(-len(self.event_shape)).sum(-1)

    def log_slopes(self, y, context=None):
        return self.log_scale.view(self.event_shape) + torch.log1p(y**2)


SHAPE = (2, 2, 2)


def elementwise(context_dim):
    act = pf.ActNorm(SHAPE)
    with torch.no_grad():
        act.loc.normal_(), act.log_scale.normal_(0, 0.3), act.initialized.fill_(True)
    return [
        shake(pf.Rescaling(SHAPE, context_dim=context_dim, hidden_dims=(4,)), 0.3),
        act,
        pf.Standardization(torch.randn(SHAPE), torch.rand(SHAPE) + 0.5),
        torch.distributions.AffineTransform(0.5, -2.0),
    ]


def triangular_flow(order="channel", lower=True, context_dim=0):
    parts = elementwise(context_dim)
    chain = pf.Chain(
        [
            Triangular(SHAPE, order, lower),
            *parts[:2],
            pf.Chain([Triangular(SHAPE, order, lower, context_dim), parts[2]]),
            pf.Chain([parts[3], pf.Rescaling(SHAPE)]).inv,
            pf.LogitPixels(SHAPE, 16),
        ]
    )
    return pf.Flow(chain).double()


def position(index, order, lower):
    places = torch.arange(8).view(SHAPE)
    places = (places if order == "channel" else places.movedim(0, -1)).flatten()
    return (places if lower else places.flip(0)).tolist().index(index)


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize(
    "order, lower", [("channel", True), ("channel", False), ("position", True), ("position", False)]
)
def test_maps_are_exact_conditionals(order, lower, context_dim):
    flow = triangular_flow(order, lower, context_dim)
    context = torch.randn(5, 2, dtype=torch.float64) if context_dim else None
    v = torch.rand(5, *SHAPE, dtype=torch.float64) * 16
    maps = pixel_scores(flow, v, context)
    assert maps.shape == v.shape and not maps.requires_grad
    torch.testing.assert_close(maps.flatten(1).sum(1), -flow.log_prob(v, context).detach())
    for index in (0, 3, 6):
        # What comes later changes nothing before it, and each conditional integrates to 1.
        grid = torch.linspace(-0.8888, 16.8888, 4001, dtype=torch.float64)
        moved = v[0].flatten().repeat(len(grid), 1)
        moved[:, index] = grid
        own = None if context is None else context[0].expand(len(grid), 2)
        each = pixel_scores(flow, moved.view(-1, *SHAPE), own).flatten(1)
        assert abs(float(torch.trapezoid((-each[:, index]).exp(), grid)) - 1) < 1e-4
        earlier = [k for k in range(8) if position(k, order, lower) < position(index, order, lower)]
        torch.testing.assert_close(each[:, earlier], maps[0].flatten()[earlier].expand(len(grid), -1))
    if context_dim:
        bound = pf.Flow(flow.chain.condition(context), flow.base)
        torch.testing.assert_close(pixel_scores(bound, v), maps)


@pytest.mark.parametrize("dtype", OTHER)
@pytest.mark.parametrize("univariate", [pf.univariate.Affine(), pf.Spline(3)], ids=["affine", "spline"])
def test_maps_of_autoregressive_flows(univariate, dtype, default_dtype):
    default_dtype(OTHER[dtype])
    options = {"hidden_dims": (6,), "order": [2, 0, 3, 1], "context_dim": 2}
    fast = pf.Autoregressive(4, univariate, fast="density", **options)
    slow = pf.Autoregressive(4, univariate, fast="sampling", **options)
    flow = shake(pf.Flow([fast, slow, fast.inv]), 0.2).to(dtype)
    y, context = torch.randn(7, 4, dtype=dtype), torch.randn(7, 2, dtype=dtype)
    maps = pixel_scores(flow, y, context)
    assert maps.dtype == dtype
    torch.testing.assert_close(maps.sum(-1), -flow.log_prob(y, context).detach(), rtol=1e-4, atol=1e-4)
    later = y.clone()
    later[:, 1] += 1
    assert torch.equal((pixel_scores(flow, later, context) - maps).abs().amax(0) > 1e-3, torch.arange(4) == 1)


def test_maps_of_mint_layers():
    parts = [Mint(SHAPE, num_groups=3), pf.ActNorm(SHAPE), Mint(SHAPE, num_groups=2), pf.LogitPixels(SHAPE, 16)]
    flow = shake(pf.Flow(parts), 0.3).double()
    v = torch.rand(4, *SHAPE, dtype=torch.float64) * 16
    flow.eval()
    torch.testing.assert_close(pixel_scores(flow, v).flatten(1).sum(1), -flow.log_prob(v).detach())
    with pytest.raises(ValueError, match=r"Mint \(part 0 of 3\) takes .* in another order than Mint \(part 2 of 3\)"):
        pixel_scores(pf.Flow([Mint(SHAPE, lower=False), pf.ActNorm(SHAPE).eval(), Mint(SHAPE)]), v.float())


def test_maps_of_a_dequantized_flow():
    flow = triangular_flow()
    deq = pf.Dequantized(flow, 16)
    n = torch.randint(0, 16, (3, *SHAPE))
    maps = pixel_scores(deq, n)
    bound = deq.scores(n, num_noise_samples=8, fresh=False).mean(0).detach()
    torch.testing.assert_close(maps.flatten(1).sum(1), -bound)
    assert torch.equal(pixel_scores(deq, n), maps)
    # Of the last pixel's values, one at least is no likelier than chance, one at most no less likely.
    every = n[:1].repeat(16, 1, 1, 1)
    every[:, 1, 1, 1] = torch.arange(16)
    mass = (-pixel_scores(deq, every, num_noise_samples=200)[:, 1, 1, 1]).exp()
    assert mass.max() > 1 / 16 > mass.min() and mass.sum() < 1.02
    assert torch.equal(pixel_scores(deq, n[:0]), maps[:0])
    noisy = pf.Dequantized(flow, 16, dequantizer=pf.Dequantizer(SHAPE, context_dim=2).double())
    refuses(ValueError, "no density pixel by pixel", pixel_scores, noisy, n)


def test_maps_of_fitted_units():
    flow = shake(pf.Flow(pf.Autoregressive(2, hidden_dims=(4,), context_dim=1)), 0.3)
    y, context = torch.randn(6, 2) * 3 + 5, torch.randn(6, 1) * 2
    fitted = standardized(flow, torch.full((2,), 5.0), torch.full((2,), 3.0), torch.ones(1), torch.full((1,), 2.0))
    torch.testing.assert_close(pixel_scores(fitted, y, context).sum(-1), -fitted.log_prob(y, context).detach())


def test_maps_refuse():
    v = torch.rand(3, *SHAPE, dtype=torch.float64)
    mixed = pf.Flow([Triangular(SHAPE), Triangular(SHAPE, lower=False)]).double()
    with pytest.raises(ValueError, match=r"Triangular \(part 0 of 2\) takes the dimensions in another order than"):
        pixel_scores(mixed, v)
    for part in (pf.Permutation(SHAPE, "reverse"), pf.LULinear(SHAPE), pf.Coupling(SHAPE)):
        name = type(part).__name__
        with pytest.raises(ValueError, match=rf"{name} \(part 1 of 2\) mixes the dimensions in no order"):
            pixel_scores(pf.Flow([Triangular(SHAPE), part]).double(), v)
    with pytest.raises(ValueError, match=r"Wrap \(part 1 of 2\) mixes the dimensions"):
        pixel_scores(pf.Flow([pf.Rescaling(3), torch.distributions.StickBreakingTransform()]), torch.full((4,), 0.25))
    dependent = dist.MultivariateNormal(torch.zeros(4), torch.eye(4))
    with pytest.raises(ValueError, match=r"base of independent dimensions, .* got MultivariateNormal"):
        pixel_scores(pf.Flow(pf.Rescaling(4), dependent), torch.zeros(4))
    with pytest.raises(ValueError, match="values in the support"):
        pixel_scores(pf.Flow(pf.LogitPixels(2, 16)), torch.tensor([3.0, 40.0]))
    with pytest.raises(TypeError, match="expected a Flow, or a Dequantized of one, got Rescaling"):
        pixel_scores(pf.Rescaling(4), torch.zeros(4))
    refuses(ValueError, r"call \.condition", pixel_scores, triangular_flow(context_dim=2), v)
    refuses(ValueError, "trailing shape", pixel_scores, triangular_flow(), v[..., :1])
