"""Every flow on tensors without data, of a device that is not the CPU.

A tensor that is left on the CPU, or a value that Python asks for, raises on the ``meta`` device. Both are faults on a
GPU too: the second makes it wait for the host.
"""

from __future__ import annotations

import pyro
import pytest
import torch
from cases import EACH_FLOW, shake

import pyro_flows as pf
from pyro_flows.distributions import CategoricalHead, LogisticMixtureHead

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
