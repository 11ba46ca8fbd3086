"""Checkpoints of ``fit_density``: a resumed run equals one that never stopped, and other runs' files are refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_flows as pf
from pyro_flows.infer.density import checkpoint

SMALL = {"num_layers": 2, "hidden_dims": (8,)}


def data(rows=300, columns=2):
    generator = torch.Generator().manual_seed(7)
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
    return pf.fit_density(flow, rows, *args, **{"progress": False, "batch_size": 50, "checkpoint_every": 1, **options})


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
    """Dies at its tenth step, as a machine might."""

    left = 10

    def step(self, closure=None):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().step(closure)


def equal(first, second):
    for column in ("epoch", "step", "train", "validation", "lr"):
        a, b = (torch.tensor(found.history[column], dtype=torch.float64) for found in (first, second))
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text, c=column: f"{c}: {text}")
    assert (first.best_epoch, first.stopped) == (second.best_epoch, second.stopped)
    states = first.model.state_dict(), second.model.state_dict()
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


class Named(Stops):
    pass


Named.__name__ = "Adam"  # goes for Adam when it is resumed


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


def test_resumed_in_another_process(tmp_path):
    path, start = tmp_path / "fit.pt", make()
    whole = fit(copy.deepcopy(start), max_epochs=4)
    fit(copy.deepcopy(start), max_epochs=2, checkpoint=path)
    code = (
        f"import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r}); torch.manual_seed(99); "
        f"from test_checkpoint import fit, make; torch.set_num_threads({torch.get_num_threads()}); "
        f"found = fit(make(), max_epochs=4, checkpoint={str(path)!r}); "
        f"torch.save([found.model.state_dict(), found.history['train']], {str(tmp_path / 'done.pt')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    state, history = torch.load(tmp_path / "done.pt", weights_only=True)
    assert history == whole.history["train"]
    assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())


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
    assert not any(module.training for module in again.model.modules())
    assert again.history["seconds"] == first.history["seconds"]


def test_file_is_plain(tmp_path):
    path = tmp_path / "fit.pt"
    fit(make(), max_epochs=2, checkpoint=str(path))
    content = torch.load(path, weights_only=True)
    assert {"format", "architecture", "data", "settings", "units", "training", "random"} == set(content)


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
    with pytest.raises(ValueError, match=f"(?s){message}.*delete the file or give another path"):
        call(path)
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
    with pytest.raises(ValueError, match="is no checkpoint of this function"):
        fit(make(), checkpoint=path)
    torch.save(make(), path)  # a pickled module, which would run code
    with pytest.raises(ValueError, match="cannot be read"):
        fit(make(), checkpoint=path)
    for place in (tmp_path, tmp_path / "nowhere" / "fit.pt"):
        with pytest.raises(ValueError, match="a file in a folder that exists"):
            fit(make(), checkpoint=place)


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "fit.pt"
    checkpoint.write(path, {"a": torch.ones(2)})

    def fails(content, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="no space"):
        checkpoint.write(path, {"a": torch.zeros(2)})
    monkeypatch.undo()
    assert torch.equal(checkpoint.read(path)["a"], torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["fit.pt"]
