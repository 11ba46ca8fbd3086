"""Modes at all scales: where a search starts, what it finds, and a fit that starts anew from what was found late."""

import math
from functools import partial

import pyro
import pytest
import torch
from cases import generator
from pyro import distributions as dist
from pyro.distributions import constraints

import pyro_flows as pf
from pyro_flows.infer import AutoFlow, fit_guide
from pyro_flows.infer.guides import fit as fitting
from pyro_flows.infer.guides.choices import moved_to_mode
from pyro_flows.infer.search.climb import SafeDensity
from pyro_flows.infer.search.curvature import Peaks, shortened
from pyro_flows.infer.search.probe import probe_modes
from pyro_flows.infer.search.starting_points import starting_points

pytestmark = pytest.mark.usefixtures("double")
SMALL = partial(pf.realnvp, num_layers=4, hidden_dims=(16,))


def two(dim, distance, width, share, seed=0, unit=1.0):
    """Log-density of two normals, the second of another width, in a random direction."""
    way = torch.randn(dim, generator=generator(seed))
    locs = unit * torch.stack([torch.zeros(dim), distance * way / way.norm()])
    sds, shares = unit * torch.tensor([1.0, width]), torch.tensor([1 - share, share])

    def log_p(z):
        each = -0.5 * ((z[..., None, :] - locs) / sds[:, None]).square().sum(-1)
        return (shares.log() - dim * (sds.log() + 0.5 * math.log(2 * math.pi)) + each).logsumexp(-1)

    return log_p


def normal(z, unit=1.0):
    return -0.5 * (z / unit).square().sum(-1) - z.shape[-1] * (math.log(unit) + 0.5 * math.log(2 * math.pi))


@pytest.mark.parametrize(
    ("dim", "distance", "width", "share", "unit"),
    [
        (1, 16, 1.0, 0.5, 1.0),
        (2, 400, 0.4, 0.05, 1.0),
        (5, 30, 1.0, 0.9, 0.01),
        (10, 120, 2.0, 0.02, 50.0),
        (30, 500, 1.0, 0.3, 1.0),
        (3, 9, 2.0, 0.03, 1.0),
    ],
)
def test_a_far_mode_is_found_with_its_share(dim, distance, width, share, unit):
    draws = unit * torch.randn(256, dim, generator=generator(1))
    found = probe_modes(
        two(dim, distance, width, share, unit=unit),
        lambda z: normal(z, unit),
        draws,
        0.3 * unit * torch.ones(dim),
        log_evidence=math.log(1 - share),
        log_weights=torch.zeros(256),
        generator=generator(),
    )
    assert found.complete and found.missed.sum() == 1
    assert found.missing_share == pytest.approx(share, abs=0.05 * share + 0.002)
    assert found.num_starts > 80 and found.reach > 300


@pytest.mark.full
@pytest.mark.parametrize(("dim", "place", "width"), [(2, (2.5, -1.5), 0.01), (4, (-3.0, 2.0), 0.1)])
def test_a_thorough_search_finds_needles_in_few_dimensions(dim, place, width):
    center = torch.cat([torch.tensor(place), torch.zeros(dim - 2)])

    def needle(z):
        return torch.logaddexp(math.log(0.7) + normal(z), math.log(0.3) + normal(z - center, width))

    draws = torch.randn(2000, dim, generator=generator(1))
    options = {"log_evidence": math.log(0.7), "log_weights": torch.zeros(2000), "generator": generator()}
    found = probe_modes(needle, normal, draws, torch.zeros(dim), num_starts=128, num_rounds=128, **options)
    assert found.missed.tolist() == [True, False] and abs(found.missing_share - 0.3) < 0.02


def test_draws_of_weight_zero_hide_no_mode():
    """A guide on one of two modes that draws a bridge to the other."""
    log_p = two(2, 20.0, 1.0, 0.5, seed=3)
    far = torch.randn(2, generator=generator(3))
    far = 20 * far / far.norm()
    draws = torch.randn(1600, 2, generator=generator(1))
    bridge = slice(None, None, 100)  # every hundredth draw lies behind the pass, where it climbs to the other mode
    draws[bridge] = far * torch.linspace(0.6, 0.8, 16)[:, None]

    def log_q(z):
        return torch.logaddexp(math.log(0.99) + normal(z), math.log(0.01) + normal((z - 0.7 * far) / 1.5) - 0.81)

    options = {"log_evidence": math.log(0.5), "generator": generator()}
    weights = log_p(draws) - log_q(draws)
    assert weights[bridge].exp().sum() < 1e-3 * weights.exp().sum()
    found = probe_modes(log_p, log_q, draws, torch.zeros(2), log_weights=weights, **options)
    assert found.missing_share == pytest.approx(0.5, abs=0.05)
    blind = probe_modes(log_p, log_q, draws, torch.zeros(2), **options)
    assert blind.missing_share == 0  # without weights the bridge hides it


def test_starts_have_a_density_and_repeat():
    def half(z):
        return torch.where(z[:, 0] > -5, normal(z), math.nan)

    draws = torch.randn(100, 3, generator=generator())
    weights = torch.linspace(-9, 0, 100)
    one, two = (
        starting_points(
            SafeDensity(half, draws), draws, weights, torch.zeros(3), torch.eye(3), 40, generator=generator()
        )
        for _ in range(2)
    )
    assert torch.equal(one.points, two.points) and torch.equal(one.inside, two.inside)
    assert (one.points[:, 0] > -5).all() and one.inside.sum() == 16 and len(one.points) > 50
    radii = one.points.norm(dim=-1)
    assert radii.max() == one.reach > 300
    for low, high in ((3, 10), (10, 30), (30, 100), (100, 400)):
        assert ((radii > low) & (radii < high)).any()
    # Draws of more weight are more often among those inside.
    index = (one.points[one.inside][:, None] == draws).all(-1).double().argmax(1)
    assert index.double().mean() > 80


def test_known_modes_do_not_hide_others():
    """Two narrow modes in the same direction, the farther of which is known and higher."""
    locs = torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.3, 0.0], [3.0, 0.0, 0.0]])
    sds, shares = torch.tensor([1.0, 0.1, 0.15]), torch.tensor([0.5, 0.4, 0.1])

    def log_p(z):
        away = (z[:, None] - locs) / sds[:, None]
        return (shares.log() - 3 * sds.log() - 0.5 * away.square().sum(-1)).logsumexp(-1)

    scale = torch.diag_embed(sds[:, None].expand(-1, 3))
    known = locs[:2], scale[:2], shares[:2]
    draws = torch.randn(400, 3, generator=generator())
    parts = None, torch.zeros(3), torch.eye(3), 16, 8

    def found(known):
        starts = starting_points(SafeDensity(log_p, draws), draws, *parts, generator=generator(1), known=known)
        return int(((starts.points - locs[2]).norm(dim=-1) < 0.7).sum())

    assert found(known) > found(None) == 0


def test_a_ridge_that_bends_has_no_length_of_its_own():
    """A ring is level along its top."""

    def ring(z):
        return -0.5 * ((z.norm(dim=-1) - 5) / 0.3).square()

    like = torch.zeros(1, 2)
    scale = torch.diag(torch.tensor([0.3, 40.0]))[None]
    peak = Peaks(torch.tensor([[5.0, 0.0]]), torch.zeros(1), scale, torch.ones(1, dtype=torch.bool))
    scale = shortened(SafeDensity(ring, like), peak).scale[0]
    assert scale[0, 0] == pytest.approx(0.3) and 1 < scale[1, 1] < 4
    plain = peak._replace(scale=torch.diag(torch.tensor([0.3, 1.0]))[None])
    assert torch.equal(shortened(SafeDensity(ring, like), plain).scale, plain.scale)


def model(log_p, dim):
    def run():
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (dim,)))
        pyro.factor("density", log_p(x))

    return run


@pytest.mark.full
def test_a_mode_found_late_starts_training_anew(monkeypatch, tmp_path):
    """The search before training sees nothing; the one after it does, and steps are left."""
    monkeypatch.setattr(fitting, "several_modes", lambda *_: None)
    path, guide = tmp_path / "fit", AutoFlow(model(two(2, 12.0, 1.0, 0.4), 2), SMALL, seed=0)
    fit = fit_guide(guide, steps=200, progress=False, checkpoint=path)
    assert any("1 of them were added" in note for note in fit.notes)
    assert fit.verdict.label != "modes missing" and len(fit.history) <= 200
    assert fit.log_evidence == pytest.approx(0.0, abs=0.2)
    far = fit.sample(2000, resampled=True)["x"].norm(dim=-1) > 6
    assert float(far.double().mean()) == pytest.approx(0.4, abs=0.08)
    again = fit_guide(guide, steps=200, progress=False, checkpoint=path)  # goes on from the end
    assert torch.equal(again.log_weights, fit.log_weights)


@pytest.mark.full
@pytest.mark.parametrize("wrong", [True, False])
def test_a_start_cut_short_moves_to_the_mode(wrong):
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.tensor([1.0, -1.0, 4.0]))

    guide = AutoFlow(model, SMALL, seed=0).setup()
    density, affine = guide.density(), guide.preconditioner
    right = affine.loc.clone()
    if wrong:
        affine.place(right + torch.tensor([4.0, 1.0, 0.0]), 0.3 * torch.eye(3))
    before = affine.loc.clone(), affine.scale.clone()
    draws = affine.loc + torch.randn(256, 3, generator=generator()) @ affine.scale.mT
    probe = probe_modes(density, guide.flow.log_prob, draws, guide.initial, log_evidence=0.0, generator=generator())
    assert moved_to_mode(guide, density, probe) == wrong
    torch.testing.assert_close(affine.loc, right, atol=1e-2, rtol=0)
    if not wrong:
        assert torch.equal(affine.loc, before[0]) and torch.equal(affine.scale, before[1])


@pytest.mark.full
def test_words_say_how_far_was_looked():
    fit = fit_guide(AutoFlow(model(normal, 2), SMALL, seed=0), steps=60, progress=False)
    probe = fit.assessment.probe
    assert fit.verdict.label == "good"
    assert f"from {probe.num_starts} points, up to {probe.reach:,.0f} from the initial one" in fit.verdict.text
    assert "can escape such a search" in fit.verdict.text
