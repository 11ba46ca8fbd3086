"""Pixels: the logit with a margin, uniform and variational dequantisation, bits per dimension."""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import shake
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn
from torch.distributions import constraints

import pyro_flows as pf
from pyro_flows.distributions import NormalHead
from pyro_flows.distributions.noise import counted_uniform, grid_bits

OTHER = {torch.float32: torch.float64, torch.float64: torch.float32}


def normal_cdf(x):
    return 0.5 * torch.erfc(-x / math.sqrt(2))


def pixel_flow(shape, levels=16, margin=0.05, dtype=torch.float64, **options):
    """A flow of intensities, shaken."""
    options = {"num_layers": 2, "hidden_dims": (8,), **options}
    flow = pf.Flow(pf.Chain([pf.realnvp(shape, **options), pf.LogitPixels(shape, levels, margin)])).to(dtype)
    return shake(flow, 0.2)


def single(levels=8, margin=0.05):
    """Independent pixels with a standard normal base, and the exact mass of each of their values, in float64."""
    logit = pf.LogitPixels(1, levels, margin)
    edges = logit.inverse_and_ladj(torch.arange(levels + 1.0, dtype=torch.float64)[:, None])[0][:, 0]
    return pf.Flow(logit).double(), normal_cdf(edges).diff()


# The logit.


@pytest.mark.parametrize("levels, margin", [(2, 0.05), (17, 1e-6), (256, 0.05), (256, 1e-6)])
def test_logit_is_that_of_the_papers(levels, margin):
    v = torch.rand(50, 3, dtype=torch.float64) * levels
    x, ladj = pf.LogitPixels(3, levels, margin).inverse_and_ladj(v)
    s = margin + (1 - 2 * margin) * v / levels
    torch.testing.assert_close(x, torch.log(s) - torch.log1p(-s))
    # With the density of v / levels, the papers add log2(levels) in the end.
    scaled = torch.nn.functional.softplus(x) + torch.nn.functional.softplus(-x) + math.log(1 - 2 * margin)
    torch.testing.assert_close(ladj, scaled.sum(-1) - 3 * math.log(levels))
    torch.testing.assert_close(pf.LogitPixels(3, levels, margin).log_slopes(v).sum(-1), ladj)


@pytest.mark.parametrize("margin", [0.05, 1e-6])
def test_logit_is_exact_far_out(margin):
    logit = pf.LogitPixels(1, 256, margin)
    x = torch.linspace(-90, 90, 361)[:, None]
    y, ladj = logit.forward_and_ladj(x)
    sure, exact = logit.forward_and_ladj(x.double())
    torch.testing.assert_close(ladj.double(), exact, rtol=1e-6, atol=1e-6)
    assert ((y - sure).abs() <= 1e-7 * (sure.abs() + (256 - sure).abs())).all()
    # From data, where an intensity near an end is exact in float32, its logit is as well.
    v = torch.tensor([-(2.0**-13), 0.0, 1e-20, 2.0**-15, 0.5, 255.5, 256 - 2.0**-15, 256.0, 256 + 2.0**-14])[:, None]
    got, want = logit.inverse_and_ladj(v), logit.inverse_and_ladj(v.double())
    for single_precision, double_precision in zip(got, want, strict=True):
        torch.testing.assert_close(single_precision.double(), double_precision, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", OTHER)
@pytest.mark.parametrize("levels, margin", [(2, 0.3), (17, 1e-6), (256, 0.05)])
def test_logit_never_leaves_its_support(levels, margin, dtype):
    logit = pf.LogitPixels(1, levels, margin)
    x = torch.linspace(-500, 500, 1001, dtype=dtype)[:, None].requires_grad_()
    y, ladj = logit.forward_and_ladj(x)
    assert logit.codomain.check(y).all()
    assert (y.diff(dim=0) >= 0).all()
    back, back_ladj = logit.inverse_and_ladj(y.detach())
    assert back.isfinite().all() and back_ladj.isfinite().all()
    near = x.detach().abs() < 10
    torch.testing.assert_close(back[near], x.detach()[near], rtol=0, atol=1e-1 if dtype == torch.float32 else 1e-9)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope[:, 0], ladj.exp())


def test_logit_support_and_density():
    flow = pf.Flow(pf.LogitPixels(1, 16, 0.05))
    beyond = 0.05 / 0.9 * 16
    v = torch.linspace(-beyond, 16 + beyond, 20001, dtype=torch.float64)[1:-1, None]
    density = flow.double().log_prob(v).exp()
    assert abs(float(torch.trapezoid(density, v[:, 0])) - 1) < 1e-6
    assert flow().support.check(torch.tensor([[0.0], [16.0]])).all()
    for outside in (-beyond - 0.01, 16 + beyond + 0.01, math.nan):
        refuses(ValueError, "within the support", flow.log_prob, torch.tensor([outside], dtype=torch.float64))


def test_logit_refuses():
    for levels in (1, 0, -3, 256.0, True):
        refuses(ValueError, "LogitPixels: expected levels to be an integer >= 2", pf.LogitPixels, 2, levels)
    for margin in (-0.1, 0.0, 0.5, 0.7, math.nan):
        refuses(ValueError, "expected margin to be a number between 0 and 1/2, got", pf.LogitPixels, 2, 256, margin)


def test_logit_compiles_without_graph_breaks():
    logit = pf.LogitPixels((1, 2, 2))
    x = torch.randn(3, 1, 2, 2)
    run = torch.compile(logit.forward_and_ladj, fullgraph=True, backend="eager")
    back = torch.compile(logit.inverse_and_ladj, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(x), logit.forward_and_ladj(x))
    torch.testing.assert_close(back(run(x)[0])[0], x)


# Bits.


def test_bits_per_dim_in_both_conventions():
    flow = pixel_flow((1, 2, 2), levels=256)
    v = torch.rand(5, 1, 2, 2, dtype=torch.float64) * 256
    in_levels = flow.log_prob(v)
    scaled = in_levels + 4 * math.log(256)  # the density of v / 256
    bits = pf.bits_per_dim(in_levels, (1, 2, 2))
    torch.testing.assert_close(bits, -in_levels / (4 * math.log(2)))
    torch.testing.assert_close(pf.bits_per_dim(scaled, (1, 2, 2), levels=256), bits)
    assert pf.bits_per_dim(-3 * math.log(17), 3) == pytest.approx(math.log2(17))  # uniform over 17 levels
    assert pf.bits_per_dim(0.0, 3, levels=17) == pytest.approx(math.log2(17))
    assert pf.bits_per_dim(torch.zeros(2, 0), 7).shape == (2, 0)
    for levels in (1, 0, 2.5):
        refuses(ValueError, "bits_per_dim: expected levels to be an integer >= 2", pf.bits_per_dim, 0.0, 3, levels)
    refuses(ValueError, "event_shape", pf.bits_per_dim, 0.0, (0, 2))


# Noise.


def splitmix(row, seed, draw, bits):
    """Noise for one row, in Python integers."""
    word, step = 2**64, 0x9E3779B97F4A7C15

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % word
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % word
        return z ^ (z >> 31)

    content = sum(mix((n + (d + 1) * step) % word) for d, n in enumerate(row)) % word
    start = mix((content + mix((mix(seed % word) + draw * step) % word)) % word)
    return [((mix((start + (d + 1) * step) % word) >> (64 - bits)) + 0.5) / 2**bits for d in range(len(row))]


def test_counted_noise_is_splitmix():
    rows = torch.randint(0, 256, (3, 2, 3))
    for seed in (0, -5, 2**70):
        noise = counted_uniform(rows, 2, seed, range(2, 5), 43, torch.float64)
        for draw, each in zip(range(2, 5), noise, strict=True):
            for row, got in zip(rows, each, strict=True):
                assert got.flatten().tolist() == splitmix(row.flatten().tolist(), seed, draw, 43)


def test_counted_noise_is_uniform_and_uncorrelated():
    near = torch.zeros(2000, 20, dtype=torch.long)
    near[torch.arange(2000), torch.arange(2000) % 20] = torch.arange(2000) // 20  # rows that differ in one pixel
    draws = [*counted_uniform(near, 1, 0, range(2), 15, torch.float64)]
    draws += counted_uniform(near, 1, 1, range(1), 15, torch.float64)
    first = draws[0][20:]  # a zero in any pixel is one and the same row
    counts = torch.histc(first, 50, 0, 1)
    expected = first.numel() / 50
    assert float(((counts - expected) ** 2 / expected).sum()) < 100  # 49 degrees of freedom
    pairs = torch.corrcoef(torch.stack([d[20:].flatten() for d in draws])) - torch.eye(3)
    assert pairs.abs().max() < 0.03
    assert (torch.corrcoef(first.T) - torch.eye(20)).abs().max() < 0.12
    assert (torch.corrcoef(first[:300]) - torch.eye(300)).abs().max() < 0.95
    assert torch.equal(draws[0][0], draws[0][1])  # equal rows, equal noise


@pytest.mark.parametrize("levels", [2, 17, 256, 4096])
@pytest.mark.parametrize("dtype", OTHER)
def test_noise_stays_exactly_inside_its_pixel(levels, dtype):
    deq = pf.Dequantized(pf.Flow(pf.LogitPixels(1, levels)).to(dtype), levels)
    n = torch.arange(levels)[:, None]
    for fresh in (True, False):
        v = deq.intensities(n, 50, fresh)
        u = v - n
        assert v.dtype == dtype
        assert torch.equal(v.floor().long(), n.expand(v.shape)) and (u > 0).all() and (u < 1).all()
        assert torch.equal(n + u, v)
        assert abs(float(u.double().mean()) - 0.5) < 5 * math.sqrt(1 / 12 / u.numel())


@pytest.mark.parametrize("levels", [17, 256, 4096])
@pytest.mark.parametrize("dtype", OTHER)
def test_noise_of_a_flow_stays_in_its_pixel_at_the_ends(levels, dtype):
    """A dequantizer's noise can round to 0 or 1, which would be the edge of the next pixel."""
    deq = pf.Dequantized(pf.Flow(pf.LogitPixels(1, levels)).to(dtype), levels)
    n = torch.arange(levels, dtype=dtype)[:, None]
    near = torch.finfo(dtype).eps / 2
    for u in (0.0, near, 1 - near, 1.0):
        v = deq._within(n, torch.full_like(n, u))
        assert v.dtype == dtype and (v > n).all() and (v < n + 1).all()


def test_coarse_dtypes_are_refused():
    refuses(ValueError, "bfloat16 is too coarse for noise within 256 levels", grid_bits, 256, torch.bfloat16)
    refuses(ValueError, "too coarse", pf.Dequantized, pf.Flow(pf.LogitPixels(2)).bfloat16())


# Uniform dequantisation.


def test_bound_is_exact_with_many_draws_and_grows():
    flow, mass = single()
    deq = pf.Dequantized(flow, 8).eval()
    n = torch.arange(8)[:, None]
    scores = deq.scores(n, num_noise_samples=20000)[..., None]
    exact = mass.log()[:, None]
    for draws, tolerance in ((20000, 2e-2), (50, 3e-2)):
        groups = scores.view(-1, draws, 8, 1)
        bound = (torch.logsumexp(groups, 1) - math.log(draws)).mean(0)
        torch.testing.assert_close(bound, exact, rtol=0, atol=tolerance)
    one, several = scores.mean(0), (torch.logsumexp(scores.view(-1, 5, 8, 1), 1) - math.log(5)).mean(0)
    assert (one < several).all() and (several < exact + 1e-3).all()
    deq.num_noise_samples = 20000
    torch.testing.assert_close(deq.log_prob(n), exact[:, 0], rtol=0, atol=2e-2)
    assert float(mass.sum()) == pytest.approx(float(normal_cdf(torch.tensor(2.890)) * 2 - 1), abs=2e-3)


def test_several_pixels_have_the_product_of_masses():
    _, mass = single(4, 1e-3)
    deq = pf.Dequantized(pf.Flow(pf.LogitPixels((1, 1, 3), 4, 1e-3)).double(), 4, num_noise_samples=20000).eval()
    n = torch.tensor([[0, 1, 3], [2, 2, 1]])
    torch.testing.assert_close(deq.log_prob(n.view(2, 1, 1, 3)), mass.log()[n].sum(-1), rtol=0, atol=6e-2)


@pytest.mark.parametrize("variational", [False, True])
def test_noise_is_fresh_in_training_and_fixed_in_evaluation(variational):
    shape = (1, 2, 2)
    q = shake(pf.Dequantizer(shape, context_dim=3, hidden_dims=(6,)), 0.2) if variational else None
    deq = pf.Dequantized(pixel_flow(shape, dtype=torch.float32), 16, num_noise_samples=2, dequantizer=q)
    n = torch.randint(0, 16, (9, *shape))
    assert deq.training and not torch.allclose(deq.log_prob(n), deq.log_prob(n), rtol=0, atol=1e-4)
    deq.eval()
    state = torch.get_rng_state()
    scores = deq.log_prob(n)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(deq.log_prob(n), scores)
    assert torch.equal(copy.deepcopy(deq).log_prob(n), scores)
    # In whatever batch and of whatever dtype: up to the rounding of matrix products.
    for same in (n.to(torch.uint8), n.float(), n.double()):
        assert torch.equal(deq.log_prob(same), scores)
    order = torch.randperm(9)
    torch.testing.assert_close(deq.log_prob(n[order]), scores[order])
    torch.testing.assert_close(torch.stack([deq.log_prob(row) for row in n]), scores)
    torch.testing.assert_close(deq.log_prob(n.view(3, 3, *shape)), scores.view(3, 3))
    assert torch.equal(deq.intensities(n[2:3])[:, 0], deq.intensities(n)[:, 2]) or variational
    deq.seed = 1
    assert not torch.allclose(deq.log_prob(n), scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variational", [False, True])
@pytest.mark.parametrize("dtype", OTHER)
def test_dtype_that_is_not_the_default(dtype, variational, default_dtype):
    default_dtype(OTHER[dtype])
    shape = (1, 2, 2)
    q = pf.Dequantizer(shape, context_dim=3, hidden_dims=(6,)).to(dtype) if variational else None
    deq = pf.Dequantized(pixel_flow(shape, dtype=dtype), 16, num_noise_samples=2, dequantizer=q)
    n = torch.randint(0, 16, (4, *shape))
    for mode in (True, False):
        deq.train(mode)
        loss = deq.log_prob(n)
        assert loss.dtype == dtype and loss.isfinite().all()
        loss.sum().backward()
        assert all(p.grad is None or p.grad.dtype == dtype for p in deq.parameters())
    assert deq.intensities(n).dtype == dtype
    assert deq.sample((2,)).dtype == torch.long


def test_samples_are_floored_and_clamped():
    flow, mass = single(4)
    deq = pf.Dequantized(flow, 4)
    drawn = deq.sample((40000,))
    assert drawn.dtype == torch.long and drawn.shape == (40000, 1)
    counts = torch.bincount(drawn[:, 0], minlength=4) / 40000
    beyond = (1 - mass.sum()) / 2  # what lies outside of the levels goes to the ends
    want = mass + beyond * torch.tensor([1, 0, 0, 1])
    torch.testing.assert_close(counts.double(), want, rtol=0, atol=0.012)
    wide = pf.Dequantized(pf.Flow(pf.Standardization([2.0, 2.0], [50.0, 50.0])), 4)
    assert set(wide.sample((200,)).flatten().tolist()) == {0, 1, 2, 3}
    assert deq().support.check(drawn).all()
    with torch.no_grad():
        broken = pf.Dequantized(pf.Flow([pf.Rescaling(2), pf.LogitPixels(2)]))
        broken.flow.chain[0].log_scale.fill_(math.nan)
    refuses(FloatingPointError, "4 of 4 numbers that the flow drew are not finite", broken.sample, (2,))


def test_as_a_pyro_distribution():
    deq = pf.Dequantized(pixel_flow((1, 2, 2)), 16).eval()
    n = torch.randint(0, 16, (5, 1, 2, 2))

    def model(obs=None):
        pyro.module("deq", deq)
        with pyro.plate("rows", 5):
            return pyro.sample("x", deq(), obs=obs)

    trace = poutine.trace(model).get_trace(n)
    torch.testing.assert_close(trace.log_prob_sum(), deq.log_prob(n).sum())
    assert model().shape == n.shape and model().dtype == torch.long
    made = deq()
    assert made.event_shape == (1, 2, 2) and made.batch_shape == ()
    assert not made.has_rsample and made.support.is_discrete and made.support.event_dim == 3
    wide = made.expand((3, 5))
    assert wide.sample().shape == (3, 5, 1, 2, 2) and wide.log_prob(n).shape == (3, 5)
    with pytest.raises(ValueError, match="whole numbers from 0 to 15"):
        poutine.trace(model).get_trace(n + 1).log_prob_sum() if (n == 15).any() else made.log_prob(n + 16)


def test_contexts():
    deq = pf.Dequantized(pixel_flow((1, 2, 2), context_dim=3), 16, num_noise_samples=3).eval()
    n, context = torch.randint(0, 16, (5, 1, 2, 2)), torch.randn(5, 3, dtype=torch.float64)
    assert deq.context_dim == 3
    scores = deq.log_prob(n, context)
    torch.testing.assert_close(scores, torch.stack([deq.log_prob(a, c) for a, c in zip(n, context, strict=True)]))
    assert not torch.allclose(scores, deq.log_prob(n, context.flip(0)))
    assert deq.log_prob(n[0], context).shape == (5,)
    assert deq(context).sample((2,)).shape == (2, 5, 1, 2, 2)
    assert deq(context[:1]).sample((2,)).shape == (2, 1, 1, 2, 2)
    assert deq(context).expand((4, 5)).sample().shape == (4, 5, 1, 2, 2)
    assert deq(context).batch_shape == (5,)
    refuses(ValueError, "context_dim=3: call it with a context", deq.log_prob, n)
    refuses(ValueError, "last dimension 3", deq.log_prob, n, context[:, :2])
    refuses(ValueError, "context_dim=0", pf.Dequantized(pixel_flow((1, 2, 2)), 16).log_prob, n, context)


def test_other_modules_than_flows():
    made = pf.MADE(3, NormalHead(), hidden_dims=(8,)).double()
    deq = pf.Dequantized(made, 4, num_noise_samples=500).eval()
    n = torch.tensor([[0, 1, 2], [3, 3, 0]])
    got, want = deq.log_prob(n), torch.logsumexp(made.log_prob(deq.intensities(n)), 0) - math.log(500)
    torch.testing.assert_close(got, want)
    assert deq.sample((6,)).shape == (6, 3)
    assert isinstance(pf.Dequantized(pf.LogitPixels(3)).flow, pf.Flow)


def test_state_is_saved():
    deq, twin = (
        pf.Dequantized(pixel_flow((1, 2, 2)), 16, dequantizer=pf.Dequantizer((1, 2, 2), context_dim=3).double()).eval()
        for _ in range(2)
    )
    shake(deq, 0.1)
    twin.load_state_dict(deq.state_dict())
    n = torch.randint(0, 16, (5, 1, 2, 2))
    torch.testing.assert_close(twin.log_prob(n), deq.log_prob(n))


@pytest.mark.parametrize("kind", ["uint8 array", "int64", "float"])
def test_fit_density_takes_integer_images(kind):
    rows = torch.poisson(torch.full((300, 1, 2, 2), 3.0)).clamp(max=15)
    data = {"uint8 array": rows.to(torch.uint8).cpu().numpy(), "int64": rows.long(), "float": rows.double()}[kind]
    deq = pf.Dequantized(pixel_flow((1, 2, 2), dtype=torch.float32), 16, num_noise_samples=2)
    with torch.no_grad():
        before = float(deq.eval().log_prob(rows).mean())
    fit = pf.fit_density(deq, data, progress=False, steps=120, max_epochs=12, batch_size=64, lr=1e-2)
    assert not deq.training
    assert fit.validation > before + 0.3
    assert fit.log_prob(data).shape == (300,)
    held_out = np.asarray(data.cpu() if isinstance(data, torch.Tensor) else data)[:50]
    # Noise of the validation rows is the same in each epoch, and the same now.
    again = pf.fit_density(copy.deepcopy(deq), data, held_out, progress=False, max_epochs=1, lr=1e-12, average=0.0)
    assert again.validation == pytest.approx(float(fit.log_prob(held_out).mean()), abs=1e-4)


def test_fit_density_names_pixels_beyond_the_levels():
    data = torch.full((60, 2), 3)
    data[7, 1] = 16
    with pytest.raises(ValueError, match=r"whole numbers from 0 to 15 \(levels=16\), got 16"):
        pf.fit_density(pf.Dequantized(pixel_flow(2, dtype=torch.float32), 16), data, progress=False, max_epochs=1)


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.full((2, 3), 16), r"got 16 at \(0, 0\) \(6 such in 6\)"),
        (torch.tensor([1, 2, -1]), r"got -1 at \(2,\)"),
        (torch.tensor([1.0, 2.5, 3.0]), r"got 2.5 at \(1,\) .* by the flow itself"),
        (torch.tensor([0.0, 0.25, 1.0]), r"\(value \* 15\).round\(\) first"),
        (torch.tensor([0.0, math.nan, 1.0]), "got nan"),
        (torch.tensor([0.0, math.inf, 1.0]), "got inf"),
        (torch.zeros(2, 4, dtype=torch.long), "last dimension 3"),
        (torch.tensor(1), "last dimension 3"),
    ],
)
def test_hostile_pixels(value, message):
    deq = pf.Dequantized(pixel_flow(3), 16)
    for call in (deq.log_prob, deq.scores, deq.intensities):
        refuses(ValueError, message, call, value)


def test_hostile_arguments():
    flow = pixel_flow(3)
    for levels in (1, 0, 2.0, True):
        refuses(ValueError, "Dequantized: expected levels", pf.Dequantized, flow, levels)
    for draws in (0, -1, 1.5):
        refuses(ValueError, "Dequantized: expected num_noise_samples", pf.Dequantized, flow, 16, draws)
    refuses(ValueError, "expected seed", pf.Dequantized, flow, 16, seed=0.5)
    refuses(ValueError, "with 256 levels, got LogitPixels with levels=16", pf.Dequantized, flow)
    unit = pf.Flow([pf.maf(3), torch.distributions.SigmoidTransform()])
    refuses(ValueError, r"onto intensities from 0 to 16.*LogitPixels\(\(3,\), levels=16\)", pf.Dequantized, unit, 16)
    for other in (nn.Linear(2, 2), dist.Normal(0.0, 1.0), None):
        refuses(TypeError, "expected a Flow, or another module", pf.Dequantized, other, 16)
    with pytest.raises(TypeError, match="expected dequantizer to be a module"):
        pf.Dequantized(flow, 16, dequantizer=lambda pixels: pixels)
    refuses(ValueError, "dequantizer of event shape", pf.Dequantized, flow, 16, dequantizer=pf.Dequantizer(4))
    refuses(TypeError, "tensor of whole numbers", pf.Dequantized(flow, 16).log_prob, np.zeros(3))
    with pytest.raises(TypeError, match="tensor of whole numbers"):
        pf.Dequantized(flow, 16).log_prob(torch.zeros(3, dtype=torch.complex64))


@pytest.mark.parametrize("variational", [False, True])
def test_empty_batches(variational):
    q = pf.Dequantizer(3, context_dim=2).double() if variational else None
    deq = pf.Dequantized(pixel_flow(3), 16, dequantizer=q)
    for mode in (True, False):
        deq.train(mode)
        assert deq.log_prob(torch.zeros(0, 3, dtype=torch.long)).shape == (0,)
        assert deq.log_prob(torch.zeros(2, 0, 3)).shape == (2, 0)
    assert deq.sample((0,)).shape == (0, 3)


# Variational dequantisation.


class Posterior(pf.FlowTransform):
    """Logistic numbers to noise within the pixel that the context names, by that noise's posterior."""

    def __init__(self, flow):
        super().__init__(1, context_dim=1)
        self.logit = flow.chain

    codomain = constraints.independent(constraints.unit_interval, 1)

    def _ends(self, context):
        n = context.round()
        return n, *(normal_cdf(self.logit.inverse_and_ladj(n + k)[0]) for k in (0, 1))

    def forward_and_ladj(self, x, context=None):
        n, low, high = self._ends(context)
        z = torch.special.ndtri(low + (high - low) * torch.sigmoid(x))
        v, ladj = self.logit.forward_and_ladj(z)
        density = dist.Normal(0.0, 1.0).log_prob(z)[..., 0] - ladj
        slope = torch.nn.functional.logsigmoid(x) + torch.nn.functional.logsigmoid(-x)
        return v - n, (slope + (high - low).log())[..., 0] - density

    def inverse_and_ladj(self, y, context=None):
        n, low, high = self._ends(context)
        z, _ = self.logit.inverse_and_ladj(y + n)
        x = torch.logit((normal_cdf(z) - low) / (high - low))
        return x, -self.forward_and_ladj(x, context)[1]


class Unscale(nn.Module):
    def __init__(self, levels):
        super().__init__()
        self.levels = levels
        self.anchor = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, pixels):
        return (pixels + 1) * self.levels / 2 - 0.5 + 0 * self.anchor


def exact_dequantized(levels=8):
    flow, mass = single(levels)
    logistic = dist.Logistic(torch.zeros(1).double(), torch.ones(1).double()).to_event(1)
    q = pf.Dequantizer(1, flow=pf.Flow(Posterior(flow), logistic), encoder=Unscale(levels), context_dim=1)
    return pf.Dequantized(flow, levels, dequantizer=q), mass


def test_one_draw_of_the_posterior_is_exact():
    deq, mass = exact_dequantized()
    n = torch.arange(8)[:, None]
    for mode in (True, False):
        deq.train(mode)
        torch.testing.assert_close(deq.scores(n, num_noise_samples=20), mass.log().expand(20, 8), rtol=0, atol=1e-7)
    torch.testing.assert_close(deq.log_prob(n), mass.log(), rtol=0, atol=1e-7)


def test_elbo_with_the_posterior_is_the_log_mass():
    deq, mass = exact_dequantized()
    n = torch.tensor([[0], [3], [3], [7]])
    loss = Trace_ELBO().loss(deq.model, deq.guide, n)
    assert loss == pytest.approx(-float(mass.log()[n[:, 0]].sum()), abs=1e-6)


def test_fresh_dequantizer_is_uniform():
    q = pf.Dequantizer((1, 2, 2), context_dim=3).double()
    made = q(torch.rand(6, 1, 2, 2, dtype=torch.float64) * 2 - 1)
    u, log_q = made.rsample_and_log_prob()
    assert (u > 0).all() and (u < 1).all()
    torch.testing.assert_close(log_q, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-8)
    shake(q, 0.1)
    made = q(torch.rand(6, 1, 2, 2, dtype=torch.float64) * 2 - 1)
    u, log_q = made.rsample_and_log_prob()
    assert log_q.abs().min() > 1e-3
    torch.testing.assert_close(made.log_prob(u), log_q)


def test_bound_holds_whatever_the_dequantizer():
    flow, mass = single()
    q = shake(pf.Dequantizer(1, context_dim=2, hidden_dims=(8,)).double(), 0.15)
    deq = pf.Dequantized(flow, 8, dequantizer=q).eval()
    n = torch.arange(8)[:, None]
    with torch.no_grad():
        scores = deq.scores(n, num_noise_samples=4000)
    assert (scores.mean(0) < mass.log()).all()
    bound = torch.logsumexp(scores, 0) - math.log(4000)
    torch.testing.assert_close(bound, mass.log(), rtol=0, atol=0.1)
    # It sees the pixels: noise differs between them beyond what chance does.
    with torch.no_grad():
        means = deq.intensities(n, 2000).mean(0)[:, 0] - n[:, 0]
    assert means.max() - means.min() > 0.03


@pytest.mark.parametrize("vectorize", [False, True])
def test_elbo_is_the_mean_of_log_prob(vectorize):
    shape = (1, 2, 2)
    deq = pf.Dequantized(pixel_flow(shape), 16, dequantizer=shake(pf.Dequantizer(shape, context_dim=3).double(), 0.1))
    n = torch.randint(0, 16, (5, *shape))
    with torch.no_grad():
        draws = deq.scores(n, num_noise_samples=2000).sum(1)
        elbo = Trace_ELBO(num_particles=2000 if vectorize else 1, vectorize_particles=vectorize)
        repeats = 1 if vectorize else 100
        losses = torch.tensor([elbo.loss(deq.model, deq.guide, n) for _ in range(repeats)])
    error = float(draws.std()) * math.sqrt(1 / 2000 + 1 / (2000 if vectorize else 100))
    assert abs(float(losses.mean()) + float(draws.mean())) < 4 * error


@pytest.mark.parametrize("variational", [False, True])
def test_svi_trains_flow_and_dequantizer(variational):
    shape = (1, 2, 2)
    q = pf.Dequantizer(shape, context_dim=3, hidden_dims=(8,), num_layers=2) if variational else None
    deq = pf.Dequantized(pixel_flow(shape, dtype=torch.float32), 16, dequantizer=q)
    n = torch.poisson(torch.full((64, *shape), 3.0)).clamp(max=15).to(torch.uint8)
    before = {name: p.detach().clone() for name, p in deq.named_parameters()}
    svi = SVI(deq.model, deq.guide, Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step(n) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10]) - 10 * 64 * 0.3
    # A last layer's input weights move from the second step on; all that trains has moved by now.
    still = [name for name, p in deq.named_parameters() if torch.equal(p.detach(), before[name])]
    assert not still
    assert all(pyro.param(f"dequantized$$${name}") is p for name, p in deq.named_parameters())
    refuses(ValueError, r"expected pixels of shape \(rows, 1, 2, 2\)", deq.model, n[0])


def test_variational_bound_beats_the_uniform_one():
    """Where the density is steep within a pixel, a dequantizer that is fitted knows it."""
    flow = pf.Flow(pf.Standardization([1.5, 1.5], [0.12, 0.12]))
    deq = pf.Dequantized(flow, 3, dequantizer=pf.Dequantizer(2, context_dim=4, hidden_dims=(16,), num_layers=2))
    n = torch.ones(64, 2, dtype=torch.long)
    uniform = float(pf.Dequantized(flow, 3).eval().scores(n[:1], num_noise_samples=4000).mean())
    exact = 2 * math.log(2 * float(normal_cdf(torch.tensor(0.5 / 0.12))) - 1)
    svi = SVI(deq.model, deq.guide, Adam({"lr": 2e-2}), Trace_ELBO())
    for _ in range(150):
        svi.step(n)
    with torch.no_grad():
        fitted = float(deq.eval().scores(n[:1], num_noise_samples=2000).mean())
    assert uniform < exact - 1 < fitted < exact
    assert fitted > exact - 0.1


def test_hostile_dequantizers():
    with pytest.raises(ValueError, match=r"event shape \(3,\) with context_dim=32, got .*context_dim=2"):
        pf.Dequantizer(3, flow=pixel_flow(3, context_dim=2))
    with pytest.raises(ValueError, match=r"numbers between 0 and 1.*end its chain in SigmoidTransform\(\)"):
        pf.Dequantizer(3, flow=pf.Flow(pf.realnvp(3, context_dim=2)), context_dim=2)
    base = pf.StudentT(3)
    chain = pf.Chain([pf.realnvp(3, context_dim=2, num_layers=2), torch.distributions.SigmoidTransform()])
    deq = pf.Dequantized(pf.LogitPixels(3), dequantizer=pf.Dequantizer(3, flow=pf.Flow(chain, base), context_dim=2))
    n = torch.zeros(2, 3, dtype=torch.long)
    assert deq.log_prob(n).isfinite().all()
    with pytest.raises(TypeError, match="independent dimensions with icdf, such as Normal or Logistic, got StudentT"):
        deq.eval().log_prob(n)
