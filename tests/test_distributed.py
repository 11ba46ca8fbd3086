"""Two processes fit what one does: the same numbers, the same decisions, and the same errors."""

import multiprocessing
import os
import re
import resource
import signal
import time
import traceback
import warnings
from functools import partial
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import pyro_flows as pf
from pyro_flows.infer import AutoFlow, fit_guide
from pyro_flows.infer.chains.walkers import Walkers
from pyro_flows.infer.guides.loop import GuideTraining
from pyro_flows.infer.machine import processes
from pyro_flows.infer.machine.checkpoint import Keeper
from pyro_flows.infer.machine.optimizers import AdamW

TIMEOUT = 300  # seconds, after which two processes are taken to wait for each other


# Two processes that wait for orders.


def serve(rank, meeting, pipe):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    warnings.simplefilter("ignore")
    while (order := pipe.recv()) is not None:
        try:
            pipe.send((True, order()))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    distributed.destroy_process_group()


class Pair:
    """Calls functions in two processes of one group at once."""

    lost = False

    def __init__(self, meeting):
        context = multiprocessing.get_context("spawn")
        ends = [context.Pipe() for _ in range(2)]
        self.pipes = [here for here, _ in ends]
        self.workers = [context.Process(target=serve, args=(k, meeting, ends[k][1])) for k in range(2)]
        for worker in self.workers:
            worker.start()

    def __call__(self, function, *args, **kwargs):
        """What the function returns in each."""
        for pipe in self.pipes:
            pipe.send(partial(function, *args, **kwargs))
        self.lost = True
        replies = [pipe.recv() if pipe.poll(TIMEOUT) else (False, "no answer") for pipe in self.pipes]
        self.lost = (False, "no answer") in replies
        assert all(done for done, _ in replies), "\n".join(str(what) for done, what in replies if not done)
        return [what for _, what in replies]

    def close(self):
        for pipe, worker in zip(self.pipes, self.workers, strict=True):
            if worker.is_alive() and not self.lost:
                pipe.send(None)
                worker.join(10)
            worker.kill()


@pytest.fixture(scope="module")
def pairs():
    made = []
    yield made
    for pair in made:
        pair.close()


@pytest.fixture
def both(pairs, tmp_path):
    """The pair of the test before, unless it is lost."""
    if not pairs or pairs[-1].lost:
        pairs.append(Pair(tmp_path / "meeting"))
    return pairs[-1]


pytestmark = pytest.mark.full


def rank():
    return distributed.get_rank() if distributed.is_initialized() else 0


# What is fitted.


def rows(count=303):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    x[:, 1] += x[:, 0] ** 2
    return 5 + 2 * x


def flow_of(kind, seed=1):
    torch.manual_seed(seed)
    small = {"num_layers": 2, "hidden_dims": (8,)}
    made = {
        "maf": lambda: pf.Flow(pf.maf(3, **small), pf.DiagonalNormal(3, learnable=True)),
        "context": lambda: pf.Flow(pf.maf(2, context_dim=1, **small)),
        "actnorm": lambda: pf.Flow([pf.ActNorm(3), pf.Coupling(3, hidden_dims=(8,)), pf.ActNorm(3)]),
        "penalties": lambda: pf.Flow(pf.cnf(3, hidden_dims=(8,), kinetic=0.1, solver="rk4", solver_steps=4)),
        "orders": lambda: pf.MADE(3, "normal", hidden_dims=(8,), order="any", num_masks=3, seed=0),
    }
    return made[kind]().double()


def grads_of(fit):
    """The gradient with which a fit takes its first step, and its result."""
    seen, take = [], AdamW.take

    def watched(self, grads):
        if not seen:
            seen.extend(None if grad is None else grad.clone() for grad in grads)
        return take(self, grads)

    AdamW.take = watched
    try:
        return seen, fit()
    finally:
        AdamW.take = take


def told(fit):
    """What all processes must have alike."""
    history = fit.history if isinstance(fit.history, dict) else vars(fit.history)
    fine = not fit.flow.training and all(p.grad is None for p in fit.flow.parameters())
    assert fine, "the flow is left in training, or with gradients"
    state = {name: value.clone() for name, value in fit.flow.state_dict().items() if isinstance(value, Tensor)}
    return state, {name: list(column) for name, column in history.items()}


def density(kind="maf", given=None, seed=1, **options):
    """Fits a density, to some rows in each process if ``given`` makes them; returns gradients and result."""
    given = rows() if given is None else given() if callable(given) else given
    if kind == "context":
        given, options["context"] = given[:, :2], given[:, 2:]
    options = {"progress": False, "batch_size": 51, "steps": 200, **options}
    return grads_of(lambda: told(pf.fit_density(flow_of(kind, seed), given, **options)))


def near(one, two, atol):
    (grads, (state, history)), (other_grads, (other_state, other_history)) = one, two
    torch.testing.assert_close(grads, other_grads, rtol=0, atol=1e-10)
    assert state.keys() == other_state.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, other_state[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")
    for name in history.keys() - {"seconds"}:
        assert history[name] == pytest.approx(other_history[name], rel=1e-9, abs=1e-6, nan_ok=True), name


def same(one, two):
    """Whether two processes have the same numbers, bit by bit, the clock's among them."""
    assert one[1].keys() == two[1].keys()
    assert str(one[1]) == str(two[1])
    assert all(torch.equal(value, two[0][name]) for name, value in one[0].items())


# Densities.


KINDS = {
    "maf": {},
    "context": {"steps": 50},
    "actnorm": {"steps": 50},
    "penalties": {"steps": 20},
    "orders": {"steps": 50},
    "no-validation": {"kind": "maf", "steps": 50, "validation_fraction": 0, "standardize": False},
    "one-row": {"kind": "maf", "steps": 50, "batch_size": 1, "average": 0.0},
    "weights": {"kind": "maf", "steps": 50, "weights": torch.linspace(0, 3, 303)},
    "bounds": {"kind": "maf", "steps": 20, "bounds": [(-5, 15), (0, None), None]},
    "plateau": {"kind": "maf", "steps": 100, "lr": 0.1, "patience": 1},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_density_in_two_processes_is_that_of_one(both, name):
    options = {"kind": name, **KINDS[name]}
    first, second = both(density, **options)
    same(first[1], second[1])
    near(first, density(**options), 1e-6)


def judged():
    fit = pf.fit_density(flow_of("maf"), rows(), progress=False, steps=20)
    return str(fit.verdict)


def test_each_process_has_the_same_verdict(both):
    """It needs no other process, so one alone may ask."""
    first, second = both(judged)
    assert first == second and "held-out rows" in first
    assert both(asked_in_the_first)[1] is None


def asked_in_the_first():
    fit = pf.fit_density(flow_of("maf"), rows(), progress=False, steps=5)
    return None if rank() else fit.verdict.label


def parallel():
    """The gradient of torch's own ``DistributedDataParallel`` on halves of a batch, and ours."""
    value = rows(40)
    options = {"steps": 1, "batch_size": 40, "validation_fraction": 0, "standardize": False, "clip_norm": None}
    ours, _ = density("maf", value, **options)
    flow = flow_of("maf")
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    wrapped = DistributedDataParallel(Loss(flow))
    wrapped(value[order].tensor_split(2)[rank()]).backward()
    return ours, [p.grad for p in flow.parameters()]


class Loss(nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, value):
        return -self.flow.log_prob(value).mean()


def test_gradients_are_those_of_torch(both):
    for ours, theirs in both(parallel):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


SIZES = [(8, 5), (3, 9), (0, 4), (7, 0)]


def shards(count=2):
    """Batches of uneven sizes for each process; one alone gets the whole ones."""
    batches = rows(sum(map(sum, SIZES))).split([sum(pair) for pair in SIZES])
    if not distributed.is_initialized():
        return DataLoader(list(batches), batch_size=None)
    own = [batch.split(list(pair))[rank()] for batch, pair in zip(batches, SIZES, strict=True)]
    if rank():
        own.pop()  # so that this process is done before the other
    return DataLoader(own, batch_size=None)


def test_loaders_of_uneven_batches(both):
    options = {"given": shards, "steps": 60, "batch_size": None, "validation": rows(50), "schedule": "cosine"}
    first, second = both(density, **options)
    same(first[1], second[1])
    near(first, density(**options), 1e-6)
    assert first[1][1]["step"][:2] == [4, 8]


def sampled():
    dataset = TensorDataset(rows(90).float())
    loader = DataLoader(dataset, 10, sampler=DistributedSampler(dataset))
    flow = pf.Flow(pf.maf(3, num_layers=1, hidden_dims=(8,)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = pf.fit_density(flow, loader, max_epochs=3, progress=False)
    own = torch.cat([batch for (batch,) in loader])
    return told(fit), [str(each.message) for each in caught], loader.sampler.epoch, own


def test_a_distributed_sampler_is_shuffled_anew(both):
    (first, one, epoch, rows_0), (second, two, other, rows_1) = both(sampled)
    same(first, second)
    assert one == two == []
    assert epoch == other > 2  # a number drawn for each epoch
    assert len(torch.cat((rows_0, rows_1)).unique(dim=0)) == 90


def forgotten():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = DataLoader(TensorDataset(rows(90).float()), 10, shuffle=True)
        pf.fit_density(pf.maf(3, num_layers=1, hidden_dims=(8,)), loader, max_epochs=1, progress=False)
    return [str(each.message) for each in caught]


def test_warns_once_if_all_read_the_same_rows(both):
    first, second = both(forgotten)
    assert len(first) == 1 and "all processes read the same rows" in first[0] and second == []


class Stream(IterableDataset):
    """Rows made as they are read, of which each process reads its share."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        generator = torch.Generator().manual_seed(rank())
        for _ in range(self.count // distributed.get_world_size() // 1000):
            yield torch.randn(1000, 4, generator=generator) * torch.tensor([1.0, 2.0, 3.0, 4.0]) + 5


def streamed(count):
    loader = DataLoader(Stream(count), batch_size=None)
    fit = pf.fit_density(
        pf.maf(4, num_layers=1, hidden_dims=(16,)), loader, max_epochs=1, progress=False, schedule="cosine"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # megabytes
    return told(fit), fit.distribution.chain.parts[-1].scale.tolist(), peak


def test_streams(both):
    (first, scale, _), (second, *_) = both(streamed, 20_000)
    same(first, second)
    assert first[1]["step"] == [10]
    assert scale == pytest.approx([1, 2, 3, 4], rel=0.05)


@pytest.mark.slow
def test_memory_of_streams(both):
    few = [peak for *_, peak in both(streamed, 10**5)]
    many = [peak for *_, peak in both(streamed, 10**7)]
    assert max(b - a for a, b in zip(few, many, strict=True)) < 200


def test_the_first_process_gives_its_flow(both):
    first, second = both(differing)
    same(first[1], second[1])
    near(first, density(steps=20), 1e-6)


def differing():
    return density(steps=20, seed=1 + rank())


def test_a_seed_drawn_in_the_first_process(both):
    drawn = both(undetermined)
    same(drawn[0][:2], drawn[1][:2])
    assert drawn[0][2] != drawn[1][2]  # afterward, each goes on with its own random numbers


def undetermined():
    torch.manual_seed(10 + rank())
    fit = pf.fit_density(flow_of("maf"), rows(), seed=None, steps=20, progress=False)
    return *told(fit), float(torch.rand(()))


def timed(**options):
    class Slow(torch.optim.SGD):
        def step(self, closure=None):
            time.sleep(0.02 * rank())
            return super().step(closure)

    return density(optimizer=partial(Slow, lr=1e-3), seconds=1.0, steps=None, schedule="cosine", **options)[1]


def looked_at(stop_at):
    """Epochs that were shown to this process, and at which its fit ended."""
    seen = []

    def look(record):
        seen.append(record["epoch"])
        if stop_at is None:
            raise OSError("no more ink")
        return record["epoch"] == stop_at

    try:
        fit = pf.fit_density(flow_of("maf"), rows(), max_epochs=4, callback=look, progress=False)
    except OSError as error:
        return seen, str(error), error.fit.history["epoch"]
    return seen, fit.stopped, fit.history["epoch"]


@pytest.mark.full
def test_the_first_process_is_called_and_its_answer_counts(both):
    assert both(looked_at, 2) == [([1, 2], "callback", [1, 2]), ([], "callback", [1, 2])]
    first, second = both(looked_at, None)
    assert first == ([1], "no more ink", [1])
    assert second == ([], "fit_density: process 0 raised OSError: no more ink", [1])


def folded():
    fit = pf.fit_density(flow_of("maf"), rows(), folds=2, seconds=1.0, seed=None, progress=False)
    return [member.state_dict() for member in fit.distribution.members], fit.history["validation"]


def test_the_first_clock_ends_a_fit(both):
    first, second = both(timed)
    same(first, second)


@pytest.mark.full
def test_processes_agree_on_folds(both):
    (states, scores), (others, other_scores) = both(folded)
    torch.testing.assert_close(states, others, rtol=0, atol=0)
    assert scores == other_scores


# Guides.


def schools(y, kind=None):
    zero = torch.tensor(0.0, dtype=y.dtype)
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=y.dtype)
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(zero + 5.0))
    if kind == "alone":
        float(mu)  # neither broadcasts nor goes through vmap
    if kind == "parts":
        with pyro.plate("schools", 8, subsample_size=4) as at:
            pyro.sample("y", dist.Normal(mu, (sigma[at] ** 2 + tau[..., None] ** 2).sqrt()), obs=y[at])
        return
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def two_modes(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(2, dtype=y.dtype), 3.0).to_event(1))
    pyro.sample("y", dist.Normal(x[..., 0] ** 2 + x[..., 1], 0.5), obs=y[0])
    pyro.factor("far", -((x[..., 0].abs() - 3) ** 2) / 0.3)


SCHOOLS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)


def guide(model=schools, steps=200, kind=None, checkpoint=None, seconds=None, **options):
    model = partial(model, kind=kind) if kind else model

    def fit():
        found = fit_guide(
            AutoFlow(model, **{"seed": 0, "num_particles": 128, **options}),
            SCHOOLS,
            steps=steps,
            seconds=seconds,
            progress=False,
            checkpoint=checkpoint,
            checkpoint_every=10,
        )
        state, history = told(found)
        history |= {"judged": found.importance.ess, "label": found.verdict.label, "notes": found.notes}
        return state | {"draws": found.assessment.draws[:100], "log_p": found.assessment.log_p[:100]}, history

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return grads_of(fit)


class Costly:
    """A density whose draws seem to take a second each; ``rows`` are those that this process evaluated."""

    pace = SimpleNamespace(seconds_per_draw=1.0)

    def __init__(self):
        self.rows = []

    def __call__(self, z):
        self.rows.append(len(z))
        return -z.square().sum(-1)

    def value_and_slope(self, z):
        return self(z), -2 * z


def led():
    density, z = Costly(), torch.arange(14.0, dtype=torch.float64).view(7, 2)
    with processes.joined("led"):
        found = processes.led(density, z, lambda shared: (shared(z), *shared.value_and_slope(z)))
    return found, density.rows


def test_values_and_gradients_of_a_search_are_shared(both):
    z = torch.arange(14.0, dtype=torch.float64).view(7, 2)
    for found, rows in both(led):
        assert sum(rows) in (6, 8)  # of seven points, twice
        for each, expected in zip(found, (-z.square().sum(-1), -z.square().sum(-1), -2 * z), strict=True):
            torch.testing.assert_close(each, expected)


GUIDES = {
    "schools": {"start": "prior"},
    "search": {"steps": 5},
    "score": {"path_gradient": False, "steps": 30, "start": "prior"},
    "tempered": {"tempering": 0.1, "steps": 30, "start": "prior"},
    "three-draws": {"num_particles": 3, "steps": 30, "start": "prior"},
    "one-draw": {"num_particles": 1, "steps": 10, "start": "prior"},
    "covering": {"model": two_modes, "steps": 30},
    "alone": {"kind": "alone", "num_particles": 8, "steps": 10, "start": "prior"},
}


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_in_two_processes_is_that_of_one(both, name):
    first, second = both(guide, **GUIDES[name])
    same(first[1], second[1])
    one = guide(**GUIDES[name])
    if name == "covering":
        assert "the start covers 2 modes" in str(one[1][1]["notes"])
    for _, history in (first[1], one[1]):
        for text in ("phase", "label", "notes"):
            history.pop(text)
    near(first, one, 1e-6)


def walked(way, stop=None, **options):
    """The chains of a guide and its flow; an interruption in the first process at a sweep."""
    found = fit_guide(AutoFlow(schools, seed=0, start="prior"), SCHOOLS, steps=20, progress=False)
    sweep, sweeps = Walkers.sweep, []

    def stopping(self, adapting):
        sweeps.append(adapting)
        if len(sweeps) == stop and not rank():
            signal.raise_signal(signal.SIGINT)
        return sweep(self, adapting)

    Walkers.sweep = stopping
    try:
        result = getattr(found, way)(progress=False, **options)
    except KeyboardInterrupt as error:
        return None if error.fit is None else error.fit.verdict.text
    finally:
        Walkers.sweep = sweep
    return result.chains.draws, [p.detach() for p in result.flow.parameters()]


@pytest.mark.parametrize("way", ["refine", "nuts"])
def test_chains_in_two_processes_are_those_of_one(both, way):
    options = {"moves": 14} if way == "refine" else {"num_samples": 6, "warmup_steps": 4, "num_chains": 1}
    (first, flow), (second, other) = both(walked, way, **options)
    assert torch.equal(first, second) and all(map(torch.equal, flow, other))
    assert first.isfinite().all() and first.shape[-1] == 10


def test_an_interruption_ends_the_chains_of_all(both):
    first, second = both(walked, "refine", stop=5)
    assert "interrupted" in first and second is None


def test_processes_draw_parts_of_the_data_of_their_own(both):
    first, second = both(guide, kind="parts", steps=60, start="prior")
    same(first[1], second[1])


def broken(error, every, steps):
    """A guide whose model fails in the second process, at each of some steps."""
    pull, done = GuideTraining._pull, [0]

    def breaking(self, z):
        done[0] += 1
        if rank() and done[0] % every == 0:
            raise error
        return pull(self, z)

    GuideTraining._pull = breaking
    try:
        return guide(steps=steps, start="prior")
    finally:
        GuideTraining._pull = pull


def test_a_step_goes_on_without_draws_that_fail(both):
    first, second = both(broken, ValueError("undefined"), 3, 10)
    same(first[1], second[1])
    assert first[1][1]["failures"] == [0, 0, 64, 0, 0, 64, 0, 0, 64, 0]


def hurried():
    if rank():
        run = pf.infer.models.joint.JointDensity.__call__

        def slow(self, z):
            time.sleep(0.01)
            return run(self, z)

        pf.infer.models.joint.JointDensity.__call__ = slow
    try:
        return guide(steps=None, seconds=4.0)[1]
    finally:
        if rank():
            pf.infer.models.joint.JointDensity.__call__ = run


def test_the_first_clock_ends_a_guide(both):
    first, second = both(hurried)
    same(first, second)
    assert first[1]["seconds"][-1] < 4.5


# Errors and interruptions.


class Fails(torch.optim.SGD):
    """An optimizer that raises an error, or interrupts or kills its process, at some step of the second process."""

    def __init__(self, parameters, error=None, at=0):
        super().__init__(parameters, lr=1e-2)
        self.error, self.at, self.done = error, at, 0

    def step(self, closure=None):
        self.done += 1
        if rank() and self.done == self.at:
            if self.error in (signal.SIGINT, signal.SIGKILL):
                os.kill(os.getpid(), self.error)
            else:
                raise self.error
        return super().step(closure)


def caught(run, *args, **kwargs):
    """The kind and text of an error, and the fit that it carries."""
    try:
        run(*args, **kwargs)
    except BaseException as error:
        return type(error).__name__, str(error), None if error.fit is None else told(error.fit)
    raise AssertionError("no error")


def fails(kind):
    error = {"disk": OSError("full"), "key": KeyError("x")}[kind]
    return caught(density, optimizer=partial(Fails, error=error, at=12), steps=50)


@pytest.mark.parametrize(("kind", "other"), [("disk", "OSError"), ("key", "RuntimeError")])
def test_an_error_of_one_is_raised_in_both(both, kind, other):
    (name, text, fit), (own, _, own_fit) = both(fails, kind)
    assert (name, own) == (other, "OSError" if kind == "disk" else "KeyError")
    assert text.startswith(f"fit_density: process 1 raised {own}: ")
    same(fit, own_fit)
    assert both(rank) == [0, 1]  # and both go on


def wrong(what):
    given = rows() + (rank() if what == "data" else 0.0)
    options = {"steps": 50 + (rank() if what == "settings" else 0)}
    if what == "shape" and rank():
        given = given[:, :2]
    if what == "nan":
        given = DataLoader(TensorDataset(given / (0.0 if rank() else 1.0)), 50)
        options["batch_size"] = None
    if what == "argument" and rank():
        options["schedule"] = "slow"
    return caught(density, "maf", given, **options)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("data", "the same data in all processes.*DataLoader"),
        ("settings", "the same limits in all processes, got steps as 50 in process 0 and 51 in process 1"),
        ("shape", "expected data of shape"),
        ("nan", "NaN"),
        ("argument", "schedule"),
    ],
)
def test_refuses_in_both(both, what, text):
    for name, found, _ in both(wrong, what):
        assert name == "ValueError" and re.search(text, found), found


def test_an_error_in_a_model_is_raised_in_both(both):
    (name, text, fit), (own, _, own_fit) = both(caught, broken, KeyError("model"), 20, 50)
    assert (name, own) == ("RuntimeError", "KeyError") and "process 1 raised KeyError" in text
    same(fit, own_fit)


def resumed(both, run, *args, **options):
    """Whether a fit that goes on from a file equals one that never stopped."""
    going_on = both(run, *args, **options)
    options["checkpoint"] = None
    whole = both(run, *args, **options)
    for a, b in zip(going_on, whole, strict=True):
        a[1][1].pop("seconds"), b[1][1].pop("seconds")
        same(a[1], b[1])


def interrupted(path):
    return caught(density, optimizer=partial(Fails, error=signal.SIGINT, at=17), steps=40, checkpoint=path)


def test_an_interruption_of_one_stops_both_at_the_same_step(both, tmp_path):
    path = tmp_path / "fit.pt"
    (name, _, fit), (own, _, own_fit) = both(interrupted, path)
    assert name == own == "KeyboardInterrupt"
    same(fit, own_fit)
    resumed(both, density, optimizer=Fails, steps=40, checkpoint=path)


def killed(target, path):
    """A fit whose processes, or the second alone, are killed after some saves."""
    deaths, write = 0, Keeper.write

    def counted(self):
        nonlocal deaths
        deaths += 1
        if deaths > 3 and (rank() or target == "both"):
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self)

    Keeper.write = counted
    return caught(noisy, checkpoint=path)


class Noisy(nn.Module):
    """A density whose training draws random numbers and keeps statistics, other ones in each process."""

    def __init__(self):
        super().__init__()
        layers = nn.BatchNorm1d(1), nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1)
        self.net = nn.Sequential(*layers).double()

    def log_prob(self, value):
        return -0.5 * ((value[:, 1] - self.net(value[:, :1])[:, 0]) ** 2 + value[:, 0] ** 2)


def noisy(checkpoint=None):
    torch.manual_seed(1)
    own = torch.Generator().manual_seed(rank())
    loader = DataLoader(rows(80)[rank() :: 2], 9, shuffle=True, generator=own)
    options = {"max_epochs": 12, "progress": False, "checkpoint": checkpoint, "checkpoint_every": 2}
    return None, told(pf.fit_density(Noisy(), loader, **options))


@pytest.mark.parametrize("target", ["both", "second"])
def test_killed_and_resumed(both, target, tmp_path):
    pair = Pair(tmp_path / "other")
    for pipe in pair.pipes:
        pipe.send(partial(killed, target, tmp_path / "fit.pt"))
    for worker in pair.workers if target == "both" else pair.workers[1:]:
        worker.join(TIMEOUT)
    if target == "second":
        assert pair.pipes[0].poll(TIMEOUT), "the first process waits for a dead one"
        done, (name, _, fit) = pair.pipes[0].recv()
        assert done and name in ("RuntimeError", "DistNetworkError", "DistBackendError") and fit is not None
    pair.close()
    assert [worker.exitcode for worker in pair.workers][target == "second" :] == [-signal.SIGKILL] * (
        2 - (target == "second")
    )
    resumed(both, noisy, checkpoint=tmp_path / "fit.pt")


def killed_guide(path):
    Keeper.write, write = (
        lambda self: os.kill(os.getpid(), signal.SIGKILL) if self._kept[1] > 25 else write(self),
        Keeper.write,
    )
    return guide(checkpoint=path, steps=40, start="prior")


def test_a_guide_killed_and_resumed(both, tmp_path):
    pair = Pair(tmp_path / "other")
    for pipe in pair.pipes:
        pipe.send(partial(killed_guide, tmp_path / "fit.pt"))
    pair.workers[0].join(TIMEOUT)
    pair.close()
    assert pair.workers[0].exitcode == -signal.SIGKILL and (tmp_path / "fit.pt").exists()
    resumed(both, guide, checkpoint=tmp_path / "fit.pt", steps=40, start="prior")
