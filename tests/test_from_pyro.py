"""Transforms of Pyro are taken over with their weights: the same map, density and draws, to rounding in float64."""

import re
from functools import partial

import pyro.distributions as dist
import pyro.distributions.transforms as pyros
import pytest
import torch
from asserts import refuses
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN, ConditionalDenseNN, DenseNN
from torch import nn

import pyro_flows as pf
from pyro_flows.testing import check_transform

full = partial(pytest.param, marks=pytest.mark.full)


def autoregressive(size, hidden, contexts=0, network=None, **options):
    network = network or {}
    if contexts:
        made = ConditionalAutoRegressiveNN(size, contexts, hidden, **network)
        return pyros.ConditionalAffineAutoregressive(made, **options)
    return pyros.AffineAutoregressive(AutoRegressiveNN(size, hidden, **network), **options)


def coupling(size, hidden, contexts=0, network=None, split=1, **options):
    outputs, network = [size - split] * 2, network or {}
    if contexts:
        made = ConditionalDenseNN(split, contexts, hidden, outputs, **network)
        return pyros.ConditionalAffineCoupling(split, made, **options)
    return pyros.AffineCoupling(split, DenseNN(split, hidden, outputs, **network), **options)


def shaken(transform, spread=0.7):
    """Far from the initial parameters, so that log-scales reach their bounds."""
    for parameter in transform.double().parameters():
        nn.init.normal_(parameter, std=spread)
    return transform


@pytest.mark.parametrize(
    "build, size, hidden, contexts, options",
    [
        (autoregressive, 5, [5, 17, 8], 0, {}),
        (autoregressive, 4, [9, 14], 3, {}),
        (autoregressive, 8, [40, 40], 0, {"log_scale_min_clip": -0.3, "log_scale_max_clip": 0.2}),
        (coupling, 7, [12, 5], 0, {"split": 3}),
        (coupling, 5, [8], 2, {"split": 4, "log_scale_min_clip": -1.0}),
        full(autoregressive, 2, [2], 0, {}),
        full(autoregressive, 3, [10], 0, {}),
        full(autoregressive, 16, [16], 0, {}),
        full(autoregressive, 30, [31, 100], 0, {}),
        full(autoregressive, 2, [2], 1, {"log_scale_max_clip": 1.0}),
        full(autoregressive, 6, [7, 6, 20], 4, {}),
        full(autoregressive, 5, [25], 0, {"network": {"permutation": torch.tensor([4, 0, 3, 1, 2])}}),
        full(coupling, 2, [6], 0, {}),
        full(coupling, 9, [4, 4, 4], 1, {"split": 8}),
        *(
            full(build, 5, [12, 9], 0, {"network": {"nonlinearity": module}})
            for build in (autoregressive, coupling)
            for module in (nn.Tanh(), nn.ELU(), nn.ELU(0.5), nn.LeakyReLU(0.2), nn.Softsign(), nn.ReLU(inplace=True))
        ),
    ],
)
def test_densities_and_draws_are_equal(build, size, hidden, contexts, options):
    # The inverse of a wild map of many dimensions loses digits.
    theirs = shaken(build(size, hidden, contexts, **options), 0.7 if size < 20 else 0.1)
    ours = pf.flows.from_pyro(theirs)
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
    context = torch.randn(30, contexts, dtype=torch.float64) if contexts else None
    known, batch = (theirs.condition(context), ()) if contexts else (theirs, (30,))
    base = dist.Normal(torch.zeros(size, dtype=torch.float64), 1.0).to_event(1)
    expected = dist.TransformedDistribution(base.expand([30] if contexts else []), [known])
    got = pf.Flow(ours, base)(*[context] * bool(contexts))

    torch.manual_seed(1)
    drawn = expected.sample(batch)
    torch.manual_seed(1)
    close(got.sample(batch), drawn)

    x = 0.3 * torch.randn(30, size, dtype=torch.float64)
    y = known(x).detach()
    close(got.log_prob(y), base.log_prob(x) - known.log_abs_det_jacobian(x, known(x)))
    scores = got.log_prob(x)
    torch.set_default_dtype(torch.float64)  # in which Pyro's inverse begins
    try:
        close(scores, expected.log_prob(x))
    finally:
        torch.set_default_dtype(torch.float32)
    assert (ours.univariate.low, ours.univariate.high) == (
        options.get("log_scale_min_clip", -5.0),
        options.get("log_scale_max_clip", 3.0),
    )


def test_the_bounds_are_reached():
    """Or the comparison above would not show them."""
    theirs = shaken(autoregressive(8, [40, 40]))
    log_scale = theirs.arn(torch.randn(30, 8, dtype=torch.float64))[1]
    assert (log_scale > 3).any() and (log_scale < -5).any()


@pytest.mark.parametrize("contexts", [0, 2])
def test_one_dimension(contexts):
    with pytest.warns(UserWarning, match="input_dim = 1"):
        theirs = shaken(autoregressive(1, [6, 4], contexts))
    ours = pf.flows.from_pyro(theirs)
    x, context = torch.randn(9, 1, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    known = theirs.condition(context) if contexts else theirs
    torch.testing.assert_close(ours(x, context) if contexts else ours(x), known(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("build", [autoregressive, coupling])
def test_the_result_is_a_transform_as_any(build):
    theirs = build(4, [11]).float()
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    ours = pf.flows.from_pyro(theirs)
    assert ours.context_dim == 0 and next(ours.parameters()).dtype == torch.float32
    inverse = pf.flows.from_pyro(theirs.inv)
    x = torch.randn(5, 4)
    torch.testing.assert_close(inverse.inv(x), theirs(x))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    check_transform(ours, torch.randn(7, 4))
    assert all(torch.equal(value, before[name]) for name, value in theirs.state_dict().items())  # a copy
    assert pf.Flow(pf.Chain([ours, pyros.Permute(torch.tensor([1, 0, 3, 2]))])).log_prob(x).isfinite().all()


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: pyros.planar(3), TypeError, "expected Pyro's AffineAutoregressive or AffineCoupling"),
        (lambda: autoregressive(3, [9], stable=True), ValueError, "stable=False"),
        (lambda: autoregressive(3, [9], 2, stable=True), ValueError, "stable=False"),
        (lambda: autoregressive(3, [9], network={"skip_connections": True}), ValueError, "skip connections"),
        (lambda: autoregressive(3, [9], network={"param_dims": [1, 1, 1]}), ValueError, r"param_dims=[1, 1], a shift"),
        (lambda: coupling(3, [9], dim=-2), ValueError, "dim=-1, got dim=-2"),
        (lambda: pyros.AffineCoupling(1, nn.Linear(1, 4)), ValueError, "class DenseNN, got Linear"),
        (lambda: pyros.AffineCoupling(1, DenseNN(1, [4], [2, 1])), ValueError, "param_dims=[2, 2]"),
    ],
)
def test_what_it_refuses(build, error, message):
    refuses(error, re.escape(message), lambda: pf.flows.from_pyro(build()))


def test_masks_of_ones_own_are_refused():
    theirs = autoregressive(3, [9])
    theirs.arn.layers[1].mask.fill_(1)
    refuses(ValueError, "expected the masks of Pyro's AutoRegressiveNN", pf.flows.from_pyro, theirs)
