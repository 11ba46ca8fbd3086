"""``fit_guide`` in a given time and in bounded memory, checkpoints of it, and what Ctrl-C leaves."""

import math
import os
import signal
import time
import warnings
from dataclasses import replace
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from pyro.poutine.runtime import _PYRO_STACK

import pyro_flows as pf
from pyro_flows.infer import AutoFlow, fit_guide
from pyro_flows.infer.diagnostics import importance, judge
from pyro_flows.infer.guides import assessment
from pyro_flows.infer.guides.assessment import weigh
from pyro_flows.infer.guides.loop import GuideTraining
from pyro_flows.infer.machine.budget import Budget
from pyro_flows.infer.machine.pace import BYTES, Pace, in_pieces
from pyro_flows.infer.search.probe import nothing_found

pytestmark = pytest.mark.usefixtures("double")

SMALL = partial(pf.realnvp, num_layers=2, hidden_dims=(8,), mask="random")
fit = partial(fit_guide, progress=False)


# Time, by a clock that only the model and looking at the clock move.


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1e-4
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def together(a, b):
    return a, b


def by_number(a, b):
    return float(a), b


def by_first(a, b):
    return a.reshape(-1)[:1].sum() if a.dim() else a, b.reshape(-1)[0]


def not_recorded(value):
    """Asks for a value, so that each evaluation runs the model."""
    return value.isnan().any().item()


def costly(clock, cost, loc_scale=together):
    """A model whose runs take ``cost(number of draws)`` seconds."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        not_recorded(a)
        b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
        clock.now += cost(a.numel())
        pyro.sample("y", dist.Normal(*loc_scale(a, b)), obs=torch.tensor(0.5))

    return model


@pytest.mark.parametrize("seconds", [0.1])
@pytest.mark.parametrize("form", [together, by_number, by_first])
def test_far_too_little_time(clock, form, seconds):
    """Something comes back, and the verdict is no good one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fit(AutoFlow(costly(clock, lambda n: 0.05, form), SMALL, seed=0), seconds=seconds)
    assert found.sample(3)["a"].shape == (3,) and clock.now < seconds + 2
    assert found.verdict.label in ("not judged", "bad") and "Time was up after" in found.verdict.text


@pytest.mark.full
@pytest.mark.parametrize(
    ("cost", "form"),
    [
        (lambda n: 0.02, together),
        (lambda n: 0.3, together),
        (lambda n: 0.02 * n, together),
        (lambda n: 0.3 * n, together),
        (lambda n: 0.02, by_number),
        (lambda n: 0.3, by_number),
        (lambda n: 0.02, by_first),
        (lambda n: 0.3, by_first),
        (lambda n: 0.01 + 1e-4 * n, together),
    ],
)
def test_seconds_are_kept_to(clock, cost, form):
    """To a tenth and two seconds, for models that do and that do not broadcast; slow ones are called few times."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fit(AutoFlow(costly(clock, cost, form), SMALL, seed=0), seconds=8)
    assert clock.now <= 1.1 * 8 + 2
    n = len(found.log_weights)
    if n < 1000:
        assert "Time was up after" in found.verdict.text and not found.verdict.label.startswith("good, t")
        assert found.verdict.label != "good" and not found.verdict.ok
    if cost(1) < 0.1:
        assert len(found.history) >= 10 and n >= 10


@pytest.mark.full
def test_the_last_search_goes_on_while_there_is_time(clock, monkeypatch):
    """Each search takes a tenth of a second, if it has as much, as the fifth has not."""
    found = fit(AutoFlow(costly(clock, lambda n: 0.0), SMALL, seed=0), steps=2)
    seen = []

    def search(spline, density, log_q, draws, initial, *, known, seconds, **options):
        seen.append((known, seconds))
        clock.now += min(0.1, seconds or 0.1)
        return replace(nothing_found(draws), complete=True)

    monkeypatch.setattr(assessment, "probe_behind", search)
    for seconds, limit, count in ((100.0, 0.45, 5), (100.0, 0.05, 1), (math.inf, 0.45, 1)):
        seen.clear()
        assessed = assessment.assess(
            found.flow,
            found.guide.density(),
            found.latents,
            found.guide.initial,
            num_samples=200,
            seconds=seconds,
            search_seconds=limit,
            walk_seconds=0.0,
        )
        assert len(seen) == count and assessed.probe.complete
        assert seen[0][0] is None and all(known is not None for known, _ in seen[1:])


def test_a_slow_first_run(clock):
    runs = []

    def cost(n):
        runs.append(n)
        return 3.0 if len(runs) == 1 else 0.01

    found = fit(AutoFlow(costly(clock, cost), SMALL, seed=0), seconds=6)
    assert clock.now <= 8.6 and len(found.history) > 50 and len(found.log_weights) >= 1000


def test_building_a_guide_keeps_to_its_time(clock):
    for form in (together, by_number):
        clock.now = 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            guide = AutoFlow(costly(clock, lambda n: 0.05 * n, form), SMALL, start_seconds=3.0, seed=0).setup()
        assert 1.0 < clock.now <= 3.5 and guide(), form


def test_time_of_the_guide_stays_its_own():
    guide = AutoFlow(lambda: costly(Clock(), lambda n: 0.0)(), SMALL, start_seconds=7.0, start="prior", seed=0)
    fit(guide, seconds=0.5)
    assert guide.start_seconds == 7.0
    for wrong in (0, -1.0, math.inf, math.nan):
        refuses(ValueError, "start_seconds to be a positive number", AutoFlow, lambda: None, start_seconds=wrong)


def test_pace(clock):
    """Rows per call grow while that costs nothing, and stop where a call gets long."""

    def after(cost, calls=12):
        pace = Pace()
        for _ in range(calls):
            rows = pace.at_once(1000, timed=True)
            with pace.call(rows):
                clock.now += cost(rows)
        return pace

    assert after(lambda n: 0.5).at_once(1000, timed=True) == 1000
    assert after(lambda n: 1e-5 * n).at_once(1000, timed=True) == 1000
    assert after(lambda n: 0.5 * n).at_once(1000, timed=True) <= 3
    assert 5 <= after(lambda n: 0.01 * n).at_once(1000, timed=True) <= 20
    found = after(lambda n: 0.01 * n)
    assert found.at_once(1000, timed=False) == 1000 and found.seconds_per_draw == pytest.approx(0.01, rel=0.1)
    found.bytes_per_draw = BYTES / 10.5
    assert found.at_once(1000, timed=False) == 10
    found.bytes_per_draw = 10 * BYTES
    assert found.at_once(1000, timed=False) == 1


@pytest.mark.parametrize(
    ("n", "asked", "label"),
    [
        (500, 10_000, "good, few draws judged"),
        (50, 10_000, "not judged"),
        (500, 500, "good"),
        (500, None, "good"),
        (1500, 10_000, "good"),
    ],
)
def test_verdict_on_few_draws(n, asked, label):
    """An exact guide: what is said hangs on how many draws there are of those that were asked for."""
    found = importance(torch.zeros(n) + 1e-6 * torch.randn(n))
    verdict = judge(found, asked=asked)
    assert verdict.label == label and verdict.ok is (label == "good")
    assert ("Time was up after" in verdict.text) is (n < 1000 and asked == 10_000)
    unsearched = judge(found, nothing_found(torch.zeros(2, 1)), asked=asked).label
    assert unsearched == (label if n < 1000 and asked == 10_000 else "good, modes not searched")


# Memory


@pytest.fixture
def large():
    """A guide of a model of many data, its density, and the draws in each run of the model."""
    y = torch.randn(100_000)
    rows = []

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        sd = pyro.sample("sd", dist.HalfNormal(10.0))
        not_recorded(mu)
        rows.append(mu.numel())
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, sd), obs=y)

    guide = AutoFlow(model, SMALL, start="prior", seed=0).setup()
    density = guide.density()
    density(torch.zeros(2, 2))
    rows.clear()
    return guide, density, rows


@pytest.mark.full
def test_memory_is_bounded(large):
    """Draws are judged, and trained by, a few at a time: the same numbers as all at once."""
    guide, density, rows = large
    most = BYTES // (8 * 100_000)  # a number for each datum and draw, at the very least
    _, z, log_p, log_q = weigh(guide.flow, density, 400)
    assert len(log_p) == len(log_q) == 400 and sum(rows) == 400 and max(rows) < most / 2
    torch.testing.assert_close(torch.cat([density(part) for part in z[::50].split(2)]), log_p[::50])
    training = GuideTraining(guide.flow, density, Budget(1, None, 0.0), num_particles=128)
    rows.clear()
    log_p, pull = training._pull(z[:128])
    assert sum(rows) == 128 and max(rows) < most / 2
    some = z[:4].requires_grad_()
    (expected,) = torch.autograd.grad(density(some).sum(), some)
    torch.testing.assert_close(pull[:4], expected)


def test_pieces_for_predictions():
    """Where nothing is known of the memory of a draw, the first two show it."""
    seen = []

    def run(part):
        seen.append(len(part))
        return torch.zeros(len(part), 1_000_000).sum(-1)

    pace = Pace()
    found = in_pieces(pace, torch.zeros(80, 1), run, 1000)
    assert seen[0] == 2 and sum(seen) == 80 and 20 < max(seen) < 40 and torch.cat(found).shape == (80,)
    assert len(in_pieces(pace, torch.zeros(5, 1), run, 1)) == 5  # a model that runs for one draw at a time
    assert len(in_pieces(Pace(), torch.zeros(5, 1), run, 1)) == 5


# Checkpoints and interruptions

Y = torch.tensor([1.0, 2.0, 4.0, 3.0])
runs = [0]
stop_at = [math.inf]


def hierarchy(y):
    runs[0] += 1
    if runs[0] == stop_at[0]:
        os.kill(os.getpid(), signal.SIGINT)
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    not_recorded(mu)
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def modes(y):
    runs[0] += 1
    if runs[0] == stop_at[0]:
        os.kill(os.getpid(), signal.SIGINT)
    parts = dist.Normal(torch.tensor([[-2.0, -2.0], [2.0, 2.0]]), 0.5).to_event(1)
    x = pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.7, 0.3])), parts))
    not_recorded(x)
    pyro.sample("y", dist.Normal(x[..., 0] ** 2, 3.0), obs=y[0])


def started(model, seed=0, **options):
    runs[0], stop_at[0] = 0, math.inf
    return AutoFlow(model, SMALL, seed=seed, num_starts=1, num_particles=16, **options)


def same(one, other):
    assert one.history.elbo == other.history.elbo and one.history.phase == other.history.phase
    torch.testing.assert_close(one.log_weights, other.log_weights, rtol=0, atol=0)
    torch.testing.assert_close(one.flow.state_dict(), other.flow.state_dict(), rtol=0, atol=0)
    assert str(one.verdict) == str(other.verdict) and one.failures == other.failures


@pytest.mark.parametrize(
    ("model", "options"),
    [
        pytest.param(hierarchy, {}, marks=pytest.mark.full),
        pytest.param(modes, {}, marks=pytest.mark.full),
        pytest.param(hierarchy, {"tempering": 0.2}, marks=pytest.mark.full),
    ],
)
def test_interrupted_fits_go_on(model, options, tmp_path):
    """As if nothing had happened: random numbers, moments, best states, phases and the verdict."""
    steps = 60
    whole = fit(started(model, **options), Y, steps=steps)
    total = runs[0]
    assert any("2 modes" in note for note in whole.notes) is (model is modes)
    path = tmp_path / "fit.pt"
    kept = fit(started(model, **options), Y, steps=steps, checkpoint=path, checkpoint_every=7)
    same(whole, kept)
    path.unlink()
    seen = []
    for part in (0.2, 0.5, 0.3, 0.9):
        guide = started(model, **options)
        stop_at[0] = int(part * total)
        try:
            found = fit(guide, Y, steps=steps, checkpoint=path, checkpoint_every=7)
            break
        except KeyboardInterrupt as stop:
            seen.append(None if stop.fit is None else len(stop.fit.history))
            if stop.fit is not None:
                assert not guide.flow.training and all(p.grad is None for p in guide.parameters())
                assert all(isinstance(p, torch.nn.Parameter) and p.requires_grad for p in guide.parameters())
                z = torch.randn(3, guide.latents.dim)
                torch.testing.assert_close(stop.fit.flow.log_prob(z), guide.flow.log_prob(z), rtol=0, atol=0)
                assert not _PYRO_STACK
    else:
        found = fit(started(model, **options), Y, steps=steps, checkpoint=path, checkpoint_every=7)
    assert any(seen)
    same(whole, found)
    again = fit(started(model, **options), Y, steps=steps, checkpoint=path)  # has nothing left to train
    same(whole, again)
    assert os.listdir(tmp_path) == ["fit.pt"]


@pytest.mark.full
@pytest.mark.parametrize("together", [True, False])
def test_interrupted_fits_of_recorded_models(together, tmp_path, monkeypatch):
    """The recording of a resumed fit gives the same numbers, also for a model that does not broadcast."""

    def model(y):
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        x = torch.stack([y, y.square()], -1).double()
        with pyro.plate("rows", len(y)):
            mean = (x * b.unsqueeze(-2)).sum(-1) if together else x @ b
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y.exp())

    def run(**options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fit(AutoFlow(model, SMALL, seed=0, num_starts=1, num_particles=16), Y, steps=60, **options)

    whole, path, note = run(), tmp_path / "fit.pt", GuideTraining._note

    def stop(training, *row):
        note(training, *row)
        if len(training.history) == 37:
            raise KeyboardInterrupt

    monkeypatch.setattr(GuideTraining, "_note", stop)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=path, checkpoint_every=7)
    monkeypatch.undo()
    found = run(checkpoint=path)
    assert whole.guide.density(Y).recorded.why_not is None
    same(whole, found)


def test_interrupted_without_a_checkpoint():
    """The guide is left in its best state, and the result so far is judged when that is asked for."""
    guide = started(hierarchy)
    with pytest.raises(KeyboardInterrupt) as caught:
        stop_at[0] = 1
        fit(guide, Y, steps=100)
    assert caught.value.fit is None and not guide.is_built
    guide = started(hierarchy, start="prior")
    fit(guide, Y, steps=1)
    before = runs[0]
    guide = started(hierarchy, start="prior")
    stop_at[0] = before  # in the verdict
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(guide, Y, steps=1)
    runs_then, found = runs[0], caught.value.fit
    assert found.sample(3)["theta"].shape == (3, 4) and len(found.history) == 1 and runs[0] == runs_then
    assert found.verdict.label and len(found.log_weights) == 10_000 and runs[0] > runs_then
    assert found.assessment is found.assessment


@pytest.mark.full
def test_a_fit_that_begins_anew_replaces_the_checkpoint(tmp_path):
    path = tmp_path / "fit.pt"
    fit(started(hierarchy), Y, steps=5, checkpoint=path)
    anew = fit(started(hierarchy), Y + 1, steps=5, checkpoint=path, resume=False)
    again = fit(started(hierarchy), Y + 1, steps=5, checkpoint=path)
    assert len(anew.history) == 5 and again.history.elbo == anew.history.elbo


def test_other_checkpoints_are_refused(tmp_path):
    path = tmp_path / "fit.pt"
    fit(started(hierarchy), Y, steps=5, checkpoint=path)
    written = path.read_bytes()
    for change, match in (
        (lambda: fit(started(hierarchy), Y + 1, steps=5, checkpoint=path), "another data: argument 0"),
        (lambda: fit(started(hierarchy), Y[:3], steps=5, checkpoint=path), "another data: argument 0"),
        (lambda: fit(started(hierarchy), Y, steps=6, checkpoint=path), "another settings: steps is 5 there and 6"),
        (lambda: fit(started(hierarchy, seed=1), Y, steps=5, checkpoint=path), "another settings: seed"),
        (lambda: fit(started(modes), Y, steps=5, checkpoint=path), "another latents: x is absent there"),
        (
            lambda: fit(AutoFlow(hierarchy, seed=0, num_starts=1, num_particles=16), Y, steps=5, checkpoint=path),
            "another architecture",
        ),
    ):
        refuses(ValueError, match, change)
        assert path.read_bytes() == written
    for at in (100, len(written) // 2, len(written) - 1):
        path.write_bytes(written[:at] + bytes([written[at] ^ 4]) + written[at + 1 :])
        with pytest.raises(ValueError, match=r"cannot be read.*delete it, or give another path as checkpoint"):
            fit(started(hierarchy), Y, steps=5, checkpoint=path)
    with pytest.raises(ValueError, match="folder that exists"):
        fit(started(hierarchy), Y, steps=5, checkpoint=tmp_path / "missing" / "fit.pt")
    for wrong in (0, True, 2.5):
        with pytest.raises(ValueError, match="checkpoint_every to be an integer"):
            fit(started(hierarchy), Y, steps=5, checkpoint_every=wrong)


def test_time_spent_before_counts(clock, tmp_path):
    """A fit by seconds that is resumed has what is left of them."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        not_recorded(a)
        clock.now += 0.05
        if clock.now > limit:
            raise KeyboardInterrupt
        pyro.sample("y", dist.StudentT(3.0, a**3, 1.0), obs=torch.tensor(0.5))

    limit, path = 5.0, tmp_path / "fit.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(AutoFlow(model, seed=0), seconds=8, checkpoint=path)
    limit, clock.now = math.inf, 1000.0
    found = fit(AutoFlow(model, seed=0), seconds=8, checkpoint=path)
    assert 1002 < clock.now < 1006 and found.history.seconds == sorted(found.history.seconds)
    assert found.history.seconds[-1] < 8
