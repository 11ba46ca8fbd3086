"""What a hand does first: numbers in place of shapes, arrays, modules in place of distributions; and what prints."""

import re
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from pyro import poutine

import pyro_flows as pf
from pyro_flows.infer import AlphaDivergence, AnomalyDetector, AutoFlow, Codec, DReGELBO, ForwardKL, PathELBO, Stream

SMALL = {"num_layers": 1, "hidden_dims": (4,)}
FLOW = pf.Flow(pf.maf(3, **SMALL))
CONDITIONAL = pf.Flow(pf.maf(2, context_dim=1, **SMALL))
MADE = pf.MADE(3, "normal", hidden_dims=(4,))
PIXELS = pf.Dequantized(pf.Chain([pf.realnvp((1, 2, 2), **SMALL), pf.LogitPixels((1, 2, 2), 4)]), 4)
ENSEMBLE = pf.distributions.Ensemble([FLOW, MADE])

DRAWS = {
    "flow": FLOW.sample,
    "flow-rsample": FLOW.rsample,
    "flow-both": lambda shape: FLOW.rsample_and_log_prob(shape)[0],
    "distribution": FLOW().sample,
    "distribution-rsample": FLOW().rsample,
    "distribution-both": lambda shape: FLOW().rsample_and_log_prob(shape)[0],
    "made": MADE.sample,
    "made-rsample": MADE.rsample,
    "made-distribution": MADE().sample,
    "made-distribution-rsample": MADE().rsample,
    "ensemble": ENSEMBLE.sample,
    "ensemble-distribution": ENSEMBLE().sample,
    "pixels": PIXELS.sample,
    "marginal": FLOW().marginal(0).sample,
    "marginal-rsample": FLOW().marginal(0).rsample,
    "conditional": FLOW().conditional(0, [0.0]).sample,
    "sphere": pf.Flow(pf.sphere(3, num_layers=1)).sample,
    "integers": pf.Flow(pf.idf(4, num_layers=1, hidden_dims=(4,))).sample,
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_number_of_draws_is_a_shape(name):
    draw = DRAWS[name]
    shapes = [tuple(draw(given).shape) for given in (7, np.int64(7), (7,), [7], torch.Size([7]))]
    assert shapes[0][0] == 7 and len(set(shapes)) == 1
    assert draw(()).shape == shapes[0][1:] and draw(0).shape == (0, *shapes[0][1:])
    refuses(
        TypeError, r"expected sample_shape to be a shape, such as \(10,\) or \(\), or a number .* got 2.5", draw, 2.5
    )
    refuses(ValueError, "no negative numbers, got -1", draw, -1)


@pytest.mark.parametrize("module", [FLOW, MADE, ENSEMBLE, PIXELS], ids=lambda module: type(module).__name__)
def test_a_module_is_no_site(module):
    """Pyro would take the distribution for a value, without a word."""
    refuses(TypeError, rf"expected a distribution, got a {type(module).__name__}, .*call it", pyro.sample, "x", module)
    refuses(TypeError, "which is a module that makes one", poutine.trace(lambda: pyro.sample("x", module)).get_trace)
    trace = poutine.trace(lambda: pyro.sample("x", module())).get_trace()
    assert trace.nodes["x"]["value"].shape == module().event_shape
    with pytest.raises(TypeError, match="call it"):
        pyro.sample("x", CONDITIONAL, torch.zeros(1))


WRONG = {
    "array": (
        lambda: FLOW.log_prob(np.zeros((2, 3), "float32")),
        TypeError,
        r"got ndarray; .*torch.as_tensor\(x",
    ),
    "list": (lambda: FLOW().log_prob([0.0, 0.0, 0.0]), TypeError, "expected a tensor, got list; convert it"),
    "array-in-made": (lambda: MADE.log_prob(np.zeros(3)), TypeError, "MADE: expected a tensor, got ndarray"),
    "context-array": (
        lambda: CONDITIONAL.log_prob(torch.zeros(2), np.zeros(1)),
        TypeError,
        "as context, got nd",
    ),
    "no-context": (lambda: CONDITIONAL.log_prob(torch.zeros(2)), ValueError, "built with context_dim=1: call it with"),
    "no-context-draw": (lambda: CONDITIONAL.sample(3), ValueError, "built with context_dim=1: call it with a context"),
    "context": (lambda: FLOW.log_prob(torch.zeros(3), torch.zeros(1)), ValueError, "context_dim=0, but a context was"),
    "value-for-context": (lambda: FLOW(torch.zeros(3)), ValueError, "context_dim=0, but a context was given"),
    "integers": (lambda: FLOW.log_prob(torch.zeros(3).long()), TypeError, r"floating-point value.*use value.float\(\)"),
    "double": (
        lambda: FLOW.log_prob(torch.zeros(3).double()),
        TypeError,
        "float64 but the parameters are",
    ),
    "last-dim": (lambda: FLOW.log_prob(torch.zeros(5, 4)), ValueError, r"last dimension 3 \(input_dim\), got shape"),
    "scalar": (lambda: FLOW.log_prob(torch.tensor(0.0)), ValueError, "last dimension 3"),
    "width": (lambda: pf.maf(3, hidden_dims=64), TypeError, "got 64; two layers of 64 units are"),
    "order": (lambda: pf.maf(3, order="forward"), ValueError, "'identity', 'reverse', 'random' or a permutation"),
    "order-short": (lambda: pf.maf(3, order=[0, 1]), ValueError, "a permutation of 0..2"),
    "size": (lambda: pf.Flow(3), TypeError, r"a flow transform, such as pf.maf\(3\), .*got int"),
    "builder": (lambda: pf.Flow(pf.maf), TypeError, "got maf; call a builder"),
    "bare-transform": (lambda: pf.Flow(torch.distributions.ExpTransform()), TypeError, "got ExpTransform.* in a list"),
    "base": (lambda: pf.Flow(pf.maf(3), dist.Normal(0.0, 1.0)), ValueError, r"a base with event shape \(3,\)"),
    "vector": (lambda: pf.ConvMADE((28,)), ValueError, "for vectors see MADE"),
    "distribution": (lambda: pf.fit_density(FLOW(), torch.zeros(9, 3)), TypeError, "give the module that made it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_in_words(name):
    call, error, message = WRONG[name]
    refuses(error, message, call)


def test_options_of_the_flow_belong_to_its_builder():
    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))

    for options in ({"num_layers": 3}, {"hidden_dims": 64}):
        refuses(TypeError, "Options of the flow belong to its builder", pf.fit_guide, model, steps=1, **options)


def test_images_without_channels_are_noticed():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pf.glow((28, 28), num_layers=1, num_scales=1, hidden_channels=4)
    assert re.match(r"glow: an event of shape \(28, 28\) is a series .* image .* \(1, 28, 28\)", str(told[0].message))


def test_empty_batches_and_gradients():
    for made in (FLOW, FLOW(), MADE, MADE(), ENSEMBLE):
        assert made.log_prob(torch.zeros(0, 3)).shape == (0,)
    x = torch.zeros(2, 3, requires_grad=True)
    FLOW.log_prob(x).sum().backward()
    assert x.grad is not None and not FLOW.sample(2).requires_grad


def pictures():
    """What prints, with words that it must have."""
    rows = torch.randint(4, (20, 1, 2, 2)).float()
    draws = {"a": torch.randn(10)}
    series = pf.Flow(pf.causal_maf((2, 5), num_layers=1, hidden_channels=4))

    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))

    guide = AutoFlow(model)
    guide.setup()
    d = dist.Laplace(torch.zeros(3), 1.0).to_event(1)
    yield FLOW(), "Normal through 1 Autoregressive", "event_shape=(3,)"
    yield pf.Flow(pf.Chain([pf.nsf(3, **SMALL), pf.LULinear(3)]), d)(), "Laplace through 1 Coupling, 1 LULinear"
    yield CONDITIONAL(torch.zeros(4, 1)), "batch_shape=(4,)"
    yield MADE(), "MADE", "event_shape=(3,)"
    yield ENSEMBLE(), "Ensemble, 2 members"
    yield PIXELS(), "Dequantized"
    yield PIXELS, "levels=4"
    yield FLOW().marginal([0, 2]), "dims=[0, 2]", "event_shape=(2,)"
    yield FLOW().conditional(0, [0.0]), "event_shape=(2,)"
    yield pf.StudentT(2, df=4.0), "2, df=4, learnable=True, min_df=1"
    yield pf.DiagonalNormal((2, 3)), "(2, 3), learnable=False"
    yield pf.GaussianMixture(2, 3), "2, num_components=3"
    yield pf.distributions.UniformCircle(2, [True, False]), "2, angles=1"
    yield pf.distributions.UniformSphere(3), "3"
    yield pf.distributions.VonMisesFisher(torch.tensor([0.0, 1.0]), torch.tensor(2.0)), "concentration"
    yield pf.distributions.IntegerLogistics(3), "(3,)"
    yield pf.distributions.IntegerLogistics(3)(), "IntegerLogistics"
    yield MADE.head, "input_dim=3"
    yield pf.Wrap(torch.distributions.ExpTransform(), 2), "ExpTransform"
    yield pf.Spline(4), "bins=4"
    yield pf.maf(3).inv, "Inverse"
    yield AnomalyDetector(PIXELS, rows), "Dequantized", "20 reference rows"
    yield Stream(series), "C=2"
    yield Codec(pf.MADE(3, "bernoulli", hidden_dims=(4,)).eval()), "levels=2"
    yield PathELBO(4), "num_particles=4"
    yield DReGELBO(4), "num_particles=4"
    yield AlphaDivergence(0.5, 4), "alpha=0.5"
    yield ForwardKL(draws), "num_samples=10"
    yield guide, "AutoFlow"
    yield guide.latents, "a ()"


def test_what_prints():
    for value, *words in pictures():
        told = repr(value)
        assert " at 0x" not in told and not told.endswith("()") and "_center" not in told, told
        for word in words:
            assert word in told, told
    assert not re.search(r"\(\)$", repr(pf.Flow(pf.maf(2))), re.M)
