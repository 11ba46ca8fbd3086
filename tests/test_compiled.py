"""Training steps compiled in a second process: the same numbers, kept on disk, and never in the way."""

import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses

import pyro_flows as pf
from pyro_flows.infer.density.loop import DensityTraining
from pyro_flows.infer.guides.loop import GuideTraining
from pyro_flows.infer.machine import compiled

pytestmark = pytest.mark.filterwarnings("ignore:fit_density")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_FLOWS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "_told", set())
    return tmp_path / "cache"


def fit(build=lambda: pf.maf(3, num_layers=2, hidden_dims=(8,)), context=None, rows=300, **options):
    torch.manual_seed(0)
    flow = build().double()
    data = torch.randn(rows, 3, dtype=torch.float64).cumsum(1).sinh()
    options = {"steps": 200, "batch_size": 50, "patience": 1000, "seed": 0, "progress": False, **options}
    return pf.fit_density(flow, data, context=context, **options)


def parameters(found):
    return torch.cat([p.detach().reshape(-1) for p in found.flow.parameters()])


@pytest.fixture
def trained(monkeypatch):
    """The compiled steps of each fit."""
    seen = []
    train = DensityTraining.train

    def watch(self):
        seen.append(self.compiled)
        train(self)

    monkeypatch.setattr(DensityTraining, "train", watch)
    return seen


@pytest.mark.full
@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_numbers_are_those_of_plain_steps(kind, folder, trained):
    options = {}
    if kind == "everything":
        context = torch.randn(300, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        options = {
            "build": lambda: pf.nsf(3, num_layers=2, hidden_dims=(8,), context_dim=2),
            "context": context,
            "clip_norm": 0.5,
            "average": 0.9,
            "weight_decay": 0.1,
            "schedule": "cosine",
            "max_epochs": 34,
        }
    plain = fit(compile=False, **options)
    for _ in range(2):  # the second finds the file
        found = fit(compile=True, **options)
        assert trained[-1].trusted and trained[-1].why_not is None
        torch.testing.assert_close(parameters(found), parameters(plain), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.history["train"], plain.history["train"], rtol=1e-6, atol=1e-8)
        assert found.history["step"] == plain.history["step"] and found.history["lr"] == plain.history["lr"]
        assert [each.suffix for each in folder.iterdir()] == [".pt2"]


@pytest.mark.full
def test_a_short_fit_does_not_wait(monkeypatch, trained):
    monkeypatch.setattr(compiled, "COST", (0.0, 0.0))
    plain = fit(compile=False)
    begin = time.monotonic()
    found = fit(compile="auto")
    spent = time.monotonic() - begin
    assert trained[-1]._process is None and trained[-1]._path is not None  # begun, and stopped
    assert torch.equal(parameters(found), parameters(plain))
    assert spent < 20
    assert not any("compile_worker" in each for each in _children())


def _children():
    told = subprocess.run(["ps", "-o", "ppid=,args="], capture_output=True, text=True, check=False).stdout
    return [line for line in told.splitlines() if line.split()[:1] == [str(os.getpid())]]


def test_what_would_not_pay_is_not_begun(folder, trained):
    fit(compile="auto")
    assert trained[-1]._process is None and trained[-1]._path is None and not folder.exists()


@pytest.mark.full
@pytest.mark.parametrize("fault", ["no compiler", "worker", "file", "folder"])
def test_faults_are_told_once(fault, folder, monkeypatch, tmp_path, trained):
    told = {"no compiler": "no C.. compiler", "worker": "exit status 3", "file": "cannot be loaded", "folder": "cache"}
    if fault == "no compiler":
        monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    elif fault == "folder":
        folder.write_text("a file")
    else:
        worker = tmp_path / "worker.py"
        make = "open(sys.argv[2], 'w').write('no archive')" if fault == "file" else "sys.exit(3)"
        worker.write_text(f"import sys; {make}")
        monkeypatch.setattr(compiled, "WORKER", worker)
    plain = fit(compile=False, steps=30)
    with pytest.warns(RuntimeWarning, match=told[fault]) as warned:
        found = fit(compile=True, steps=30)
        fit(compile=True, steps=30)
    assert len([each for each in warned if "without compiled steps" in str(each.message)]) == 1
    assert torch.equal(parameters(found), parameters(plain))


@pytest.mark.parametrize("score", [0.0, math.nan])
def test_steps_that_differ_are_refused(score, trained, monkeypatch):
    monkeypatch.setattr(compiled.CompiledSteps, "ready", lambda self: self.why_not is None and self._path is not None)
    monkeypatch.setattr(compiled.CompiledSteps, "_start", lambda self, request, path: None)

    def wrong(self, optimizer, most, factors, *others):
        moved = [each + 0.1 for each in optimizer.buffers]
        return moved, torch.full((len(factors),), score), torch.zeros(len(factors))

    monkeypatch.setattr(compiled.CompiledSteps, "run", wrong)
    plain = fit(compile=False)
    with pytest.warns(RuntimeWarning, match="other numbers"):
        found = fit(compile=True)
    assert trained[-1].why_not == "compiled steps give other numbers than plain ones"
    assert torch.equal(parameters(found), parameters(plain))


@pytest.mark.parametrize("slow", [0.5, 2.0])
@pytest.mark.parametrize("compile", ["auto", True])
def test_the_faster_steps_go_on(slow, compile, monkeypatch):
    """Each is timed in turns, so that what slows the machine for a while slows both."""
    steps, now, taken = compiled.CompiledSteps(compile), 0.0, []
    steps._run = steps.trusted = True
    monkeypatch.setattr(compiled.time, "monotonic", lambda: now)
    for k in range(12):
        with steps.turn(10):
            taken.append(steps.has_turn())
            now += (1 + 9 * (k in (2, 3))) * (slow if taken[-1] else 1.0)
    faster = slow < 1 or compile is True
    assert taken == ([True] * 12 if compile is True else [True, False] * 3 + [faster] * 6)
    assert steps.why_not == (None if faster else "compiled steps take longer than plain ones")


@pytest.mark.full
def test_slower_compiled_steps_end(monkeypatch, trained):
    fit(compile=True)
    run, calls = compiled.CompiledSteps.run, []

    def slowly(self, *args):
        calls.append(time.sleep(0.1))
        return run(self, *args)

    monkeypatch.setattr(compiled, "LEAST", 0.0)
    monkeypatch.setattr(compiled, "LOOKING", 0.0)
    monkeypatch.setattr(compiled.CompiledSteps, "run", slowly)
    found, plain = fit(compile="auto"), fit(compile=False)
    assert trained[1].trusted and trained[1].why_not == "compiled steps take longer than plain ones"
    assert len(calls) == 1 + compiled.TURNS  # one is checked
    assert (parameters(found) - parameters(plain)).abs().max() < 1e-5


class Own(torch.nn.Module):
    """A user's density, which may count its calls."""

    event_shape, context_dim = torch.Size([3]), 0

    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(3))
        self.calls = 0

    def log_prob(self, value):
        self.calls += 1
        return -(value - self.loc).square().sum(-1) * (1.0 + 0.01 * self.calls)


def test_foreign_code_is_called_each_time(trained):
    torch.manual_seed(0)
    density = Own()
    with pytest.warns(RuntimeWarning, match="Own is foreign code"):
        pf.fit_density(density, torch.randn(200, 3), steps=30, batch_size=20, progress=False, compile=True, seed=0)
    assert trained[-1].why_not is not None and "Own is foreign code" in trained[-1].why_not
    assert density.calls >= 30


def test_wrong_choice():
    refuses(ValueError, "expected compile to be 'auto'", fit, compile="always")
    refuses(ValueError, "expected compile to be 'auto'", fit_guide, compile="always")


Y = torch.tensor([28.0, 8.0, -3.0], dtype=torch.float64)


def groups(y=Y):
    one = torch.ones((), dtype=y.dtype)
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0 * one)), pyro.sample("tau", dist.HalfCauchy(5.0 * one))
    with pyro.plate("groups", 3):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 10.0 * one), obs=y)


def fit_guide(model=groups, path_gradient=True, steps=100, **options):
    def build(dim):
        return pf.iaf(dim, num_layers=2, hidden_dims=(8,)).double()

    guide = pf.AutoFlow(
        model, build, start="prior", path_gradient=path_gradient, num_particles=16, seed=0, dtype=torch.float64
    )
    return pf.fit_guide(guide, steps=steps, progress=False, **options)


@pytest.fixture
def guided(monkeypatch):
    """The training of each guide."""
    seen = []
    train = GuideTraining.train

    def watch(self):
        seen.append(self)
        train(self)

    monkeypatch.setattr(GuideTraining, "train", watch)
    return seen


@pytest.mark.parametrize(
    "path", [pytest.param(True, marks=pytest.mark.full), pytest.param(False, marks=pytest.mark.slow)]
)
def test_steps_of_guides_are_those_of_plain_steps(path, folder, guided, tmp_path):
    plain = fit_guide(path_gradient=path, compile=False)
    for options in ({}, {"checkpoint": tmp_path / "fit.pt", "checkpoint_every": 7}):  # the second finds the files
        found = fit_guide(path_gradient=path, compile=True, **options)
        compiled = guided[-1].compiled
        assert set(compiled) == {("affine", False), ("flow", path)}
        assert all(each.trusted and each.why_not is None for each in compiled.values())
        torch.testing.assert_close(parameters(guided[-1]), parameters(guided[0]), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.history.elbo, plain.history.elbo, rtol=1e-6, atol=1e-8)
        assert found.history.rate == plain.history.rate and found.history.phase == plain.history.phase
        assert [each.suffix for each in folder.iterdir()] == [".pt2"] * 2


def branching():
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(mu.sum() if mu[0] > 0 else mu[1], 1.0), obs=torch.tensor(1.0))


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:this model does not broadcast")
def test_a_model_that_branches_is_not_compiled(folder, guided):
    with pytest.warns(RuntimeWarning, match="one recorded run"):
        fit_guide(branching, steps=30, compile=True)
    assert {each.why_not for each in guided[-1].compiled.values()} == {
        "the model's density is not one recorded run for all draws"
    }
    assert not folder.exists()


@pytest.mark.full
@pytest.mark.parametrize("scores", [[0.0, 1.0, 16.0], [math.nan, math.nan, 0.0]], ids=["others", "failed"])
def test_steps_of_guides_that_differ_are_refused(scores, guided, monkeypatch):
    monkeypatch.setattr(compiled.CompiledSteps, "ready", lambda self: self.why_not is None and self._path is not None)
    monkeypatch.setattr(compiled.CompiledSteps, "_start", lambda self, request, path: None)

    def wrong(self, optimizer, most, factors, *others):
        moved = [each + 0.1 for each in optimizer.buffers]
        return moved, torch.tensor([scores] * len(factors)), torch.zeros(len(factors))

    monkeypatch.setattr(compiled.CompiledSteps, "run", wrong)
    with pytest.warns(RuntimeWarning, match="other numbers") if scores[2] else nullcontext():
        found = fit_guide(steps=60, compile=True)
    plain = fit_guide(steps=60, compile=False)
    assert found.history.elbo == plain.history.elbo
    told = {each.why_not for each in guided[0].compiled.values()}
    assert told == ({None} if scores[2] == 0 else {"compiled steps give other numbers than plain ones"})


@pytest.mark.full
def test_an_interruption_leaves_compiled_guides_whole(guided, monkeypatch):
    """Between calls, and with the compiler at work."""
    noted = GuideTraining._note

    def interrupt(self, *row):
        noted(self, *row)
        if len(self.history) == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(GuideTraining, "_note", interrupt)
    monkeypatch.setattr(compiled, "COST", (0.0, 0.0))
    with pytest.raises(KeyboardInterrupt) as stop:
        fit_guide(steps=10**6, compile="auto")
    assert len(stop.value.fit.history) == 40
    assert all(each._process is None for each in guided[-1].compiled.values()) and guided[-1].compiled
    assert not any("compile_worker" in each for each in _children())


@pytest.mark.full
def test_the_package_loads_no_compiler_for_a_fit():
    code = (
        "import sys, torch, pyro_flows as pf\n"
        "pf.fit_density(pf.maf(2), torch.randn(200, 2), steps=20, progress=False)\n"
        "assert not {'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
