"""Every flow on tensors without data, of a device that is not the CPU.

A tensor that is left on the CPU, or a value that Python asks for, raises on the ``meta`` device. Both are faults on a
GPU too: the second makes it wait for the host.
"""

from __future__ import annotations

import pyro
import pyro.distributions.transforms as T
import pytest
import torch
from cases import EACH_FLOW, shake
from torch._subclasses import FakeTensorMode

import pyro_flows as pf
from pyro_flows.core.modes import exact_products, full_precision
from pyro_flows.core.recipes import recipe
from pyro_flows.core.wrap import Wrap
from pyro_flows.distributions import CategoricalHead, LogisticMixtureHead
from pyro_flows.infer import AnomalyDetector
from pyro_flows.infer.density.columns import spikes
from pyro_flows.infer.density.data import Rows
from pyro_flows.infer.diagnostics.uniformity import chi_square, ecdf_pvalues

META = torch.device("meta")


def test_the_device_finds_both_faults():
    x = torch.zeros(3, device=META)
    with pytest.raises(RuntimeError):
        x + torch.zeros(3)
    with pytest.raises(RuntimeError):
        x.sum().item()
    with pytest.raises(NotImplementedError):
        x.to("cpu")


@pytest.mark.parametrize("case", EACH_FLOW, ids=lambda case: case.name)
def test_maps_stay_on_the_device(case):
    """Both directions, with and without gradients, in training and in evaluation, and with a context."""
    for context_dim in (0, 2) if case.takes_context else (0,):
        flow = shake(case.build(context_dim)).to(META)
        context = torch.zeros(5, context_dim, device=META) if context_dim else None
        for training in (False, True):
            flow.train(training)
            for leaf, shape in (
                (flow.forward_and_ladj, flow.event_shape),
                (flow.inverse_and_ladj, flow.data_shape),
            ):
                value = torch.zeros(5, *shape, device=META, requires_grad=True)
                found, ladj = leaf(value, context)
                assert found.device == ladj.device == META
                if found.requires_grad:  # solvers that look at their values end at once here
                    (found.sum() + ladj.sum()).backward()
                grads = [tensor.grad for tensor in (value, *flow.parameters()) if tensor.grad is not None]
                assert all(grad.device == META for grad in grads)
                with torch.no_grad():
                    assert [part.device for part in leaf(value, context)] == [META, META]


@pytest.mark.full
@pytest.mark.parametrize("case", EACH_FLOW, ids=lambda case: case.name)
def test_scores_and_draws_stay_on_the_device(case):
    flow = pf.Flow(case.build(0)).to(META)
    draws, scores = flow.rsample_and_log_prob((5,))
    assert draws.device == scores.device == META
    assert flow.score(torch.zeros(5, *flow.event_shape, device=META)).device == META
    assert flow.sample((5,)).device == META


@pytest.mark.parametrize(
    "made",
    [
        lambda: pf.MADE(4, hidden_dims=(8,)),
        lambda: pf.MADE(4, hidden_dims=(8,), context_dim=2, order="any", num_masks=1),
        lambda: pf.MADE(4, CategoricalHead(3), hidden_dims=(8,)),
        lambda: pf.MADE(4, "normal", hidden_dims=(8,), order="random", direct=False),
        lambda: pf.MADE(4, LogisticMixtureHead(num_components=2), hidden_dims=(8,)),
        lambda: pf.ConvMADE((1, 4, 4), hidden_channels=4, num_layers=2),
    ],
    ids=["bernoulli", "context", "categorical", "normal", "mixture", "convolutional"],
)
def test_made_stays_on_the_device(made):
    model = made()
    model.order_of(None)  # masks are made on the CPU, once
    model.to(META)
    context = torch.zeros(5, model.context_dim, device=META) if model.context_dim else None
    distribution = model(context)
    value = torch.zeros(5, *model.event_shape, device=META)
    with pyro.validation_enabled(False):
        scores = distribution.log_prob(value)
    scores.sum().backward()
    assert scores.device == META and all(p.grad is None or p.grad.device == META for p in model.parameters())
    assert distribution.sample().device == META


def test_what_holds_whole_numbers_only_says_where_it_is():
    assert Wrap(T.Permute(torch.arange(3, device=META)), 3).data_shape == (3,)


def test_rows_are_numbered_on_their_device():
    """An order is copied once an epoch: each copy makes the host wait."""
    rows = Rows(torch.zeros(20, 3, device=META), None, torch.arange(20, device=META))
    assert {piece.device for piece in rows.order(8, torch.Generator())} == {META}
    for value, _, index, _ in rows.batches(8, torch.Generator()):
        assert value.device == index.device == META


def test_recipes_are_made_for_the_cpu():
    with FakeTensorMode():
        there = torch.empty(2, device="cuda:0")
        assert recipe([there])[0].device.type == "cpu"


def one_member():
    model = pf.MADE(3, hidden_dims=(8,), order="any", seed=0)

    def run():
        pyro.set_rng_seed(0)
        return model.one(2).sample((4,))

    return run


def calibrated():
    ranks = torch.randint(20, (50, 2))
    return lambda: torch.stack((chi_square(ranks, 19), ecdf_pvalues(ranks, 19)))


def anomalies():
    flow, rows = pf.Flow(pf.Standardization([0.0, 1.0], [1.0, 2.0])), torch.randn(9, 2)
    return lambda: AnomalyDetector(flow, rows).p_values(rows)


def repeated():
    rows = torch.cat((torch.zeros(30, 1), torch.randn(60, 1)))
    return lambda: torch.tensor([*spikes(rows, [0])[0][0]], device="cpu")


@pytest.mark.parametrize("made", [one_member, calibrated, anomalies, repeated])
def test_the_default_device_plays_no_part(made):
    """What computes on the CPU does so where another device is the default."""
    run = made()
    want = run()
    with META:
        assert torch.equal(run(), want)


@pytest.mark.parametrize("decorate", [exact_products, full_precision])
def test_exact_parts_go_without_tf32(decorate, monkeypatch):
    """Products and convolutions of float32 keep their digits inside, and the user's settings hold outside."""

    def settings():
        return [torch._C._get_fp32_precision_getter("cuda", kind) for kind in ("matmul", "conv")]

    monkeypatch.setattr(torch.cuda, "_initialized", True)
    with FakeTensorMode():
        there = torch.empty(2, device="cuda:0")
    inside = decorate(lambda x: settings())
    before = settings()
    try:
        torch.set_float32_matmul_precision("high")
        allowed = settings()
        assert allowed[0] == "tf32" and inside(torch.empty(2)) == allowed
        assert inside(there) == ["ieee", "ieee"] and settings() == allowed
    finally:
        torch.set_float32_matmul_precision("highest")
        for kind, value in zip(("matmul", "conv"), before, strict=True):
            torch._C._set_fp32_precision_setter("cuda", kind, value)
