"""The function that looks on while a fit trains: what it sees, stops and raises, and that it changes nothing."""

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import seeded

import pyro_flows as pf
from pyro_flows.infer import AutoFlow

SMALL = {"num_layers": 1, "hidden_dims": (8,)}
ROWS = torch.randn(200, 2, generator=seeded(1)) @ torch.tensor([[1.0, 0.5], [0.0, 2.0]])


def fit(data=ROWS, flow=None, **options):
    known = {"progress": False, "folds": 1, "max_epochs": 5}
    torch.manual_seed(0)  # of the flow's parameters
    return pf.fit_density(flow or pf.nsf(2, **SMALL), data, **{**known, **options})


def after(epoch, kind=bool):
    """Stops after an epoch."""
    return lambda record: kind(record["epoch"] >= epoch)


def test_records_are_the_rows_of_the_history_and_change_nothing():
    records = []

    def look(record):
        torch.randn(7)  # leaves the fit's own numbers as they are
        records.append(record)

    with_it, without = fit(callback=look), fit()
    assert {name: [record[name] for record in records] for name in records[0]} == with_it.history
    assert with_it.history["validation"] == without.history["validation"]
    assert with_it.stopped == "max_epochs"


@pytest.mark.parametrize("kind", [bool, np.bool_])
def test_true_stops(kind):
    found = fit(callback=after(2, kind))
    assert found.stopped == "callback" and found.history["epoch"] == [1, 2]
    assert not found.flow.training and "stopped by callback" in repr(found)


@pytest.mark.full
def test_other_answers_do_not_stop():
    for answer in (None, 1, "yes", [1], 0.0):
        assert fit(callback=lambda record, answer=answer: answer, max_epochs=2).stopped == "max_epochs"
    assert fit(callback=after(5)).stopped == "max_epochs"  # which was reached at once


def test_exceptions_carry_the_fit():
    def broken(record):
        if record["epoch"] == 2:
            raise RuntimeError("no more ink")

    with pytest.raises(RuntimeError, match="no more ink") as caught:
        fit(callback=broken)
    assert caught.value.fit.history["epoch"] == [1, 2] and caught.value.fit.stopped == "interrupted"


@pytest.mark.full
@pytest.mark.parametrize("way", ["stop", "interrupt"])
def test_resumes(way, tmp_path):
    path, whole = tmp_path / "fit.pt", fit()

    def stop(record):
        if record["epoch"] == 2 and way == "interrupt":
            raise KeyboardInterrupt
        return record["epoch"] == 2

    try:
        fit(callback=stop, checkpoint=path)
    except KeyboardInterrupt as interrupt:
        assert interrupt.fit.history["epoch"] == [1, 2]
    again = fit(checkpoint=path, callback=lambda record: record["epoch"] <= 2)
    assert again.history["validation"] == whole.history["validation"] and again.stopped == "max_epochs"


@pytest.mark.full
def test_members_are_numbered_and_all_stop():
    seen = []
    found = fit(callback=lambda record: seen.append((record["member"], record["epoch"])), folds=2, max_epochs=2)
    assert seen == [(0, 1), (0, 2), (1, 1), (1, 2)] and len(found.members) == 2
    stopped = fit(callback=lambda record: record["member"] == 1, folds=3, max_epochs=2)
    assert len(stopped.members) == 2 and "callback" in stopped.stopped
    assert math.isfinite(stopped.validation) and stopped.sample((3,)).shape == (3, 2)
    few = fit(callback=after(1), folds=None, max_epochs=None)
    assert few.stopped == "callback" and few.members == () and few.history["epoch"] == [1]


def test_functions_only():
    refuses(TypeError, "fit_density: expected callback to be a function .* got a str", fit, callback="look")
    refuses(TypeError, "fit_guide: expected callback", pf.fit_guide, model, progress=False, callback=3)


def model():
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("groups", 3):
        theta = pyro.sample("theta", dist.StudentT(3.0, mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.tensor([1.0, 2.0, 4.0]))


def guide(**options):
    made = AutoFlow(model, partial(pf.realnvp, **SMALL), seed=0, num_starts=1, num_particles=8, dependencies="dense")
    return pf.fit_guide(made, progress=False, steps=200, **options)


@pytest.mark.full
def test_guides_too(tmp_path):
    records = []

    def look(record):
        torch.randn(7)
        records.append(record)

    whole, path = guide(callback=look), tmp_path / "fit.pt"
    assert [record["step"] for record in records] == [50, 100, 150, 200]
    assert records[0]["elbo"] == pytest.approx(sum(whole.history.elbo[:50]) / 50)
    assert {"step", "elbo", "spread", "rate", "phase", "seconds", "failures"} <= set(records[0])
    for end in (50, 100):  # in the affine phase, and after it
        stopped = guide(callback=lambda record, end=end: record["step"] >= end, checkpoint=path)
        assert len(stopped.history) == end and stopped.notes[-1] == f"the callback ended training after {end} steps"
        assert (
            stopped.sample(10)["theta"].shape == (10, 3)
            and stopped.history.phase[-1] == records[end // 50 - 1]["phase"]
        )
    again = guide(checkpoint=path)  # without anyone who looks
    assert again.history.elbo == whole.history.elbo
    assert torch.equal(again.log_weights, whole.log_weights)

    def broken(record):
        raise OSError("no more ink")

    with pytest.raises(OSError, match="no more ink") as caught:
        guide(callback=broken)
    assert len(caught.value.fit.history) == 50
