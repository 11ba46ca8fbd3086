"""Checkpoints of ``fit_density``: a resumed run equals one that never stopped, and other runs' files are refused."""

import copy
import math
import os
import random
import signal
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from asserts import output_of, refuses
from cases import altered, seeded
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_flows as pf
from pyro_flows.infer.density.loop import CHECKPOINT
from pyro_flows.infer.machine.files import read_state, write_state

SMALL = {"num_layers": 2, "hidden_dims": (8,)}


def data(rows=300, columns=2):
    generator = seeded(7)
    return (
        10 + 3 * torch.randn(rows, columns, generator=generator) ** 2 + torch.randn(rows, columns, generator=generator)
    )


def make(kind="maf", **options):
    """The same architecture each time, with other numbers in it."""
    if kind == "dropout":
        return Dropout()
    return pf.Flow(getattr(pf, kind)(2, **{**SMALL, **options}), pf.DiagonalNormal(2, learnable=True))


def fit(flow, rows=None, *args, **options):
    rows = data() if rows is None else rows
    return pf.fit_density(
        flow, rows, *args, **{"progress": False, "batch_size": 50, "checkpoint_every": 1, "compile": False, **options}
    )


class Dropout(nn.Module):
    """A density whose training draws from the global generator, and which counts in a buffer."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.norm = nn.BatchNorm1d(1)

    def log_prob(self, value):
        rest = value[:, 1] - self.net(self.norm(value[:, :1]))[:, 0]
        return -0.5 * (rest**2 + (value[:, 0] - 10) ** 2)


class Stops(torch.optim.Adam):
    """Stops after some steps, as somebody or a machine might."""

    error = KeyboardInterrupt

    def __init__(self, parameters, lr=0.01, left=10):
        super().__init__(parameters, lr=lr)
        self.left = left

    def step(self, closure=None):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().step(closure)


def equal(first, second):
    for column in ("epoch", "step", "train", "validation", "lr"):
        a, b = (torch.tensor(found.history[column], dtype=torch.float64) for found in (first, second))
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text, c=column: f"{c}: {text}")
    assert (first.best_epoch, first.stopped) == (second.best_epoch, second.stopped)
    states = first.distribution.state_dict(), second.distribution.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


VARIANTS = {
    "plain": {},
    "plateau-cuts": {"lr": 0.1, "patience": 1},
    "average": {"average": 0.9, "lr": 0.05, "patience": 1},
    "constant-with-decay": {"schedule": "constant", "weight_decay": 0.1},
    "own-optimizer": {"optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9)},
    "no-validation": {"validation_fraction": 0},
    "not-standardised": {"standardize": False},
    "drawn-seed": {"seed": None},
    "every-other-epoch": {"checkpoint_every": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_equals_uninterrupted(variant, tmp_path):
    options, start = VARIANTS[variant], make()
    path = tmp_path / "fit.pt"
    torch.manual_seed(3)
    whole = fit(copy.deepcopy(start), max_epochs=6, **options)
    torch.manual_seed(3)
    half = fit(copy.deepcopy(start), max_epochs=3, checkpoint=path, **options)
    assert half.stopped == "max_epochs" and len(half.history["epoch"]) == 3
    torch.manual_seed(4)
    # Fresh numbers in the flow do not matter: all comes from the file.
    equal(fit(make(), max_epochs=6, checkpoint=path, **options), whole)


def test_a_fit_that_begins_anew_replaces_the_checkpoint(tmp_path):
    path, start = tmp_path / "fit.pt", make()
    fit(copy.deepcopy(start), max_epochs=2, seed=0, checkpoint=path)
    anew = fit(copy.deepcopy(start), data() + 1, max_epochs=3, seed=0, checkpoint=path, resume=False)
    equal(anew, fit(copy.deepcopy(start), data() + 1, max_epochs=3, seed=0))
    equal(fit(make(), data() + 1, max_epochs=3, seed=0, checkpoint=path), anew)


@pytest.mark.parametrize("kind", ["dropout", "realnvp"])
@pytest.mark.parametrize("schedule", ["plateau", "cosine"])
def test_resumed_after_a_crash(kind, schedule, tmp_path):
    start, path = make(kind), tmp_path / "fit.pt"
    options = {"schedule": schedule, "max_epochs": 5, "optimizer": partial(torch.optim.Adam, lr=0.01)}
    whole = fit(copy.deepcopy(start), **options)
    with pytest.raises(KeyboardInterrupt):
        fit(copy.deepcopy(start), checkpoint=path, **{**options, "optimizer": partial(Named, lr=0.01)})
    assert [file.name for file in tmp_path.iterdir()] == ["fit.pt"]
    equal(fit(make(kind), checkpoint=path, **options), whole)


@pytest.mark.parametrize("steps", [3, 10, 23])
def test_interruption_writes_the_last_whole_epoch(steps, tmp_path):
    """Six steps an epoch; a checkpoint is due long after."""
    start, path = make(), tmp_path / "fit.pt"
    options = {"max_epochs": 5, "optimizer": partial(torch.optim.Adam, lr=0.01)}
    whole = fit(copy.deepcopy(start), **options)
    flow = copy.deepcopy(start)
    stops = {**options, "optimizer": partial(Named, lr=0.01, left=steps), "checkpoint_every": 100}
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(flow, checkpoint=path, **stops)
    epochs = steps // 6
    so_far = caught.value.fit
    if epochs:
        assert so_far.flow is flow and so_far.stopped == "interrupted" and "interrupted" in repr(so_far)
        assert so_far.history["train"] == whole.history["train"][:epochs]
        reached = whole.history["validation"][:epochs]
        assert so_far.validation == max(reached) if so_far.best_epoch else so_far.validation > max(reached)
        score = so_far.log_prob(data()).mean().item()
        assert math.isfinite(score) and score != whole.log_prob(data()).mean().item()
    else:
        assert so_far is None
    assert not flow.training
    assert all(p.grad is None for p in flow.parameters())
    equal(fit(make(), checkpoint=path, **options), whole)


def test_errors_carry_the_fit_and_write_nothing(tmp_path):
    class Breaks(Stops):
        error = RuntimeError("the machine is on fire")

    flow, path = make(), tmp_path / "fit.pt"
    with pytest.raises(RuntimeError, match="on fire") as caught:
        fit(flow, optimizer=partial(Breaks, left=20), checkpoint=path, checkpoint_every=100)
    assert len(caught.value.fit.history["train"]) == 3 and not path.exists()
    assert not flow.training and all(p.grad is None for p in flow.parameters())


def interrupts_the_fit(*_):
    """Python's own handler, but for the time when the test itself runs."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is pf.fit_density.__code__:
            raise KeyboardInterrupt
        frame = frame.f_back


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_at_any_time(tmp_path):
    """By the signal itself, one, two at once, or a stream of them, in any line of the fit."""
    start, rand = make(), random.Random(0)
    options = {"schedule": "constant", "patience": 10**6}
    whole = fit(copy.deepcopy(start), max_epochs=12, **options)
    for k in range(9):
        path, flow, wait = tmp_path / f"{k}.pt", copy.deepcopy(start), rand.uniform(0.02, 0.2)
        over, pauses = threading.Event(), [(), (0.001,), (0.002,) * 200][k % 3]

        def press(over=over, pauses=pauses, wait=wait):
            # Python drops what is raised in a finalizer, so that somebody presses again.
            for pause in (wait, *pauses, *[1.0] * 100):
                if over.wait(pause):
                    return
                os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=press)
        before = signal.signal(signal.SIGINT, interrupts_the_fit)
        try:
            thread.start()
            with pytest.raises(KeyboardInterrupt) as caught:
                fit(flow, max_epochs=10**6, checkpoint=path, checkpoint_every=[1, 1000][k % 2], **options)
        finally:
            over.set()
            thread.join()
            signal.signal(signal.SIGINT, before)
        assert set(os.listdir(tmp_path)) <= {f"{j}.pt" for j in range(k + 1)}  # no leftover
        assert not flow.training and all(p.grad is None for p in flow.parameters())
        if path.exists():
            known = CHECKPOINT.read(path)["training"]
            assert known["history"]["train"][:12] == whole.history["train"][: known["epoch"]]
            so_far = getattr(caught.value, "fit", None)
            if so_far is not None:
                reached = max(so_far.history["validation"])
                assert so_far.validation == reached if so_far.best_epoch else so_far.validation >= reached
                assert len(so_far.history["train"]) - known["epoch"] in (0, 1)
            if known["epoch"] < 12:
                equal(fit(make(), max_epochs=12, checkpoint=path, **options), whole)


def test_kills_leave_a_checkpoint_to_go_on_from(tmp_path):
    start, path, rand = make(), tmp_path / "fit.pt", random.Random(0)
    options = {"schedule": "constant", "patience": 10**6, "checkpoint": path}
    whole = fit(copy.deepcopy(start), max_epochs=8, **{**options, "checkpoint": None})
    fit(copy.deepcopy(start), max_epochs=1, **options)
    for _ in range(10):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of other tests
            child = os.fork()
        if child == 0:
            try:
                fit(copy.deepcopy(start), max_epochs=10**6, **options)
            finally:
                os._exit(1)
        time.sleep(rand.uniform(0.02, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        known = CHECKPOINT.read(path)["training"]
        assert known["history"]["train"][:8] == whole.history["train"][: known["epoch"]]
    assert len(fit(make(), max_epochs=known["epoch"] + 1, **options).history["train"]) == known["epoch"] + 1
    assert os.listdir(tmp_path) == ["fit.pt"]


class Named(Stops):
    pass


Named.__name__ = "Adam"  # goes for Adam when it is resumed


@pytest.mark.cpu("torch's loaders shuffle by generators of the CPU")
@pytest.mark.parametrize("shuffle", ["global", "own", "none"])
def test_resumed_with_a_loader(shuffle, tmp_path):
    start, path = make(), tmp_path / "fit.pt"

    def loader():
        generator = torch.Generator().manual_seed(5) if shuffle == "own" else None
        return DataLoader(TensorDataset(data()), batch_size=60, shuffle=shuffle != "none", generator=generator)

    options = {"batch_size": None}
    whole = fit(copy.deepcopy(start), loader(), data(40), max_epochs=4, **options)
    fit(copy.deepcopy(start), loader(), data(40), max_epochs=2, checkpoint=path, **options)
    equal(fit(make(), loader(), data(40), max_epochs=4, checkpoint=path, **options), whole)
    with pytest.raises(ValueError, match=r"fit of another data: data is 300 rows in 5 batches there"):
        fit(make(), DataLoader(data(310), batch_size=60), data(40), checkpoint=path, **options)
    with pytest.raises(ValueError, match="fit of other data: their loc differ"):
        fit(make(), DataLoader(data() + 5, batch_size=60), data(40), checkpoint=path, **options)


@pytest.mark.full
def test_resumed_in_another_process(tmp_path):
    path, start = tmp_path / "fit.pt", make()
    whole = fit(copy.deepcopy(start), max_epochs=4)
    fit(copy.deepcopy(start), max_epochs=2, checkpoint=path)
    code = (
        f"import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r}); torch.manual_seed(99); "
        f"from test_checkpoint import fit, make; torch.set_num_threads({torch.get_num_threads()}); "
        f"found = fit(make(), max_epochs=4, checkpoint={str(path)!r}); "
        f"torch.save([found.distribution.state_dict(), found.history['train']], {str(tmp_path / 'done.pt')!r})"
    )
    output_of("-c", code)
    state, history = torch.load(tmp_path / "done.pt", weights_only=True)
    assert history == whole.history["train"]
    assert all(torch.equal(value, state[name]) for name, value in whole.distribution.state_dict().items())


def test_conditional_units_come_back(tmp_path):
    path, context = tmp_path / "fit.pt", 50 + 9 * data()[:, :1]
    start = make(context_dim=1)
    whole = fit(copy.deepcopy(start), context=context, max_epochs=4)
    fit(copy.deepcopy(start), context=context, max_epochs=2, checkpoint=path)
    equal(fit(make(context_dim=1), context=context, max_epochs=4, checkpoint=path), whole)
    with pytest.raises(ValueError, match="another data: contexts of data is"):
        fit(make(context_dim=1), context=context + 1, checkpoint=path)


def test_finished_run_is_read_back(tmp_path):
    path = tmp_path / "fit.pt"
    first = fit(make(), patience=1, max_epochs=40, lr=0.1, checkpoint=path)
    assert first.stopped == "patience"
    written = path.read_bytes()
    again = fit(make(), patience=1, max_epochs=80, lr=0.1, checkpoint=path)
    equal(again, first)
    assert path.read_bytes() == written
    assert not any(module.training for module in again.distribution.modules())
    assert again.history["seconds"] == first.history["seconds"]


def test_file_is_plain(tmp_path):
    path = tmp_path / "fit.pt"
    fit(make(), max_epochs=2, checkpoint=str(path))
    content = read_state(path, kind=CHECKPOINT.kind, version=CHECKPOINT.version, remedy="")
    assert {"architecture", "data", "settings", "units", "coloring", "training", "random"} == set(content)
    assert b"pyro_flows." not in path.read_bytes()  # no module is named


# What is refused

OTHERS = {
    "architecture": (
        lambda path: fit(make(hidden_dims=(9,)), checkpoint=path),
        r"another architecture: chain\.parts\.0\.net\.\S+ is \(.*\) torch.float32 there and \(.*\) torch.float32 here",
    ),
    "more-layers": (lambda path: fit(make(num_layers=3), checkpoint=path), r"chain\.parts\.2.* is absent there"),
    "fewer-layers": (lambda path: fit(make(num_layers=1), checkpoint=path), r"chain\.parts\.1.* absent here"),
    "dtype": (lambda path: fit(make().double(), checkpoint=path), "torch.float32 there and .* torch.float64 here"),
    "data": (lambda path: fit(make(), data() + 1e-3, checkpoint=path), r"another data: data is \(300, 2\).*checksum"),
    "fewer-rows": (lambda path: fit(make(), data()[:-1], checkpoint=path), r"\(300, 2\) .* there and \(299, 2\) "),
    "one-number": (
        lambda path: fit(make(), data().index_fill(0, torch.tensor([150]), 0.1), checkpoint=path),
        "another data: data",
    ),
    "validation": (
        lambda path: fit(make(), data(), data(20), checkpoint=path),
        "another data: validation is none there",
    ),
    "lr": (lambda path: fit(make(), lr=0.5, checkpoint=path), "another settings: lr is 0.003 there and 0.5 here"),
    "seed": (lambda path: fit(make(), seed=1, checkpoint=path), "another settings: seed is 0 there and 1 here"),
    "optimizer": (
        lambda path: fit(make(), optimizer=partial(torch.optim.SGD, lr=0.003), checkpoint=path),
        "optimizer is AdamW there and SGD here",
    ),
    "batch_size": (lambda path: fit(make(), batch_size=60, checkpoint=path), "batch_size is 50 there and 60 here"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "fit.pt"
    fit(make(), max_epochs=1, checkpoint=path)
    return path.read_bytes()


@pytest.mark.parametrize("name", OTHERS)
def test_other_fits_are_refused(name, written, tmp_path):
    call, message = OTHERS[name]
    path = tmp_path / "fit.pt"
    path.write_bytes(written)
    refuses(ValueError, f"(?s){message}.*delete the file or give another path", call, path)
    assert path.read_bytes() == written


def test_cosine_is_a_function_of_its_length(tmp_path):
    path = tmp_path / "fit.pt"
    fit(make(), max_epochs=2, schedule="cosine", checkpoint=path)
    with pytest.raises(ValueError, match="another settings: max_epochs is 2 there and 3 here"):
        fit(make(), max_epochs=3, schedule="cosine", checkpoint=path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: b"",
        lambda whole: b"no checkpoint",
        lambda whole: whole[:2000] + bytes(200) + whole[2200:],
    ],
    ids=["cut", "empty", "text", "overwritten"],
)
def test_damaged_files_are_refused(damage, written, tmp_path):
    path = tmp_path / "fit.pt"
    path.write_bytes(damage(written))
    with pytest.raises(
        ValueError, match=r"fit\.pt' (cannot be read|is no checkpoint).*delete it, or give another path"
    ):
        fit(make(), checkpoint=path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "fit.pt"
    torch.save(make().state_dict(), path)
    refuses(ValueError, r"fit\.pt' cannot be read: it is no such file", fit, make(), checkpoint=path)
    torch.save(make(), path)  # a pickled module, which would run code
    refuses(ValueError, "cannot be read: it is no such file", fit, make(), checkpoint=path)
    write_state(path, {}, kind="fit of a guide")
    refuses(ValueError, "cannot be read: it is a fit of a guide; delete it", fit, make(), checkpoint=path)
    write_state(path, {}, kind=CHECKPOINT.kind, version=1)
    refuses(ValueError, "it is of version 1, and this release reads version 4", fit, make(), checkpoint=path)
    refuses(ValueError, "expected the path of a file, got", fit, make(), checkpoint=tmp_path)
    refuses(ValueError, "a file in a folder that exists", fit, make(), checkpoint=tmp_path / "nowhere" / "fit.pt")


@pytest.mark.full
def test_checkpoints_with_missing_or_other_parts_are_refused(written, tmp_path):
    path, options = tmp_path / "fit.pt", {"kind": CHECKPOINT.kind, "version": CHECKPOINT.version}
    path.write_bytes(written)
    whole = read_state(path, **options, remedy="")
    tried = 0
    for where, known, other, content in altered(whole, (None, "text", torch.zeros(3, 5, 7))):
        if "optimizer" in where[:-1] or where[0] in ("architecture", "data", "settings"):
            continue
        if isinstance(other, str) and isinstance(known, str):
            continue
        write_state(path, content, **options)
        flow = make()
        before = copy.deepcopy(flow.state_dict())
        refuses(ValueError, r"(?s)fit\.pt'.*(delete it|delete the file)", fit, flow, max_epochs=2, checkpoint=path)
        assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())
        tried += 1
    assert tried > 50


def test_flipped_bits_are_refused(written, tmp_path):
    path, rand = tmp_path / "fit.pt", random.Random(0)
    for k in range(300):
        bad = bytearray(written)
        place = k if k < 100 else rand.randrange(len(bad))  # all of the header
        bad[place] ^= 1 << rand.randrange(8)
        path.write_bytes(bad)
        refuses(ValueError, r"cannot be read.*delete it, or give another path", CHECKPOINT.read, path)
