"""Torch's and Pyro's own transforms at the end of a flow: every constraint of ``biject_to``, alone and put together."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import pytest
import torch
from asserts import refuses
from cases import shake
from pyro.distributions import TransformModule, constraints
from torch.autograd.functional import jacobian
from torch.distributions import (
    AffineTransform,
    CatTransform,
    ComposeTransform,
    CumulativeDistributionTransform,
    ExpTransform,
    IndependentTransform,
    PowerTransform,
    ReshapeTransform,
    SigmoidTransform,
    StackTransform,
    TanhTransform,
    TransformedDistribution,
    biject_to,
)

import pyro_flows as pf

LOW, HIGH = torch.tensor([0.0, -5.0, 1.0]), torch.tensor([1.0, 5.0, 1.5])
independent = constraints.independent
# Each with the event dimensions that it has itself.
KNOWN = {
    "real": constraints.real,
    "real_vector": constraints.real_vector,
    "positive": constraints.positive,
    "nonnegative": constraints.nonnegative,
    "softplus_positive": constraints.softplus_positive,
    "greater_than": constraints.greater_than(2.0),
    "greater_than of tensors": constraints.greater_than(LOW),
    "greater_than_eq": constraints.greater_than_eq(LOW),
    "less_than": constraints.less_than(-1),
    "less_than of tensors": constraints.less_than(HIGH),
    "interval": constraints.interval(-1.0, 3.0),
    "interval of tensors": constraints.interval(LOW, HIGH),
    "half_open_interval": constraints.half_open_interval(LOW, HIGH),
    "unit_interval": constraints.unit_interval,
    "simplex": constraints.simplex,
    "ordered_vector": constraints.ordered_vector,
    "positive_ordered_vector": constraints.positive_ordered_vector,
    "corr_cholesky": constraints.corr_cholesky,
    "corr_matrix": constraints.corr_matrix,
    "lower_cholesky": constraints.lower_cholesky,
    "positive_definite": constraints.positive_definite,
    "cat": constraints.cat([constraints.positive, constraints.real, constraints.unit_interval], -1),
    "cat of vectors": constraints.cat([constraints.ordered_vector, independent(constraints.positive, 1)], -1, [2, 1]),
    "stack": constraints.stack([constraints.positive, constraints.real, constraints.interval(1.0, 2.0)], -1),
    "stack of vectors": constraints.stack([constraints.ordered_vector, constraints.real_vector], -2),
    "stack of simplexes": constraints.stack([constraints.simplex, constraints.simplex], -2),
}
SQUARE = {
    "corr_cholesky",
    "corr_matrix",
    "lower_cholesky",
    "positive_definite",
}  # not of the shape of what they come from
RESIZED = SQUARE | {"simplex", "stack of simplexes"}
CASES = [(name, extra, event) for name in KNOWN for extra in (0, 1, 2) for event in ((3,), (2, 3))]


def made(end, event, dtype=torch.double):
    """A flow that ends so, its parameters moved, and the bounds in the default dtype."""
    torch.manual_seed(3)
    return pf.Flow(pf.Chain([shake(pf.Rescaling(event), 0.5).to(dtype), *end]))


@pytest.mark.parametrize("name, extra, event", CASES, ids=lambda value: str(value))
def test_every_constraint(name, extra, event):
    known = KNOWN[name]
    onto = biject_to(independent(known, extra) if extra else known)
    own = onto.domain.event_dim
    if own > len(event):
        refuses(ValueError, f"Wrap: .* acts on {own} event dimensions, got event shape", made, [onto], event)
        return
    flow = made([onto], event)
    with pyro.validation_enabled(True):
        distribution = flow()
        draws = distribution.sample((30,))
        scores = distribution.log_prob(draws.clone())
        wide = distribution.expand((4,))
        assert wide.log_prob(wide.sample((2,))).shape == (2, 4)
        twins = [pickle.loads(pickle.dumps(flow)), copy.deepcopy(flow)]
        assert all(torch.equal(twin.log_prob(draws.clone()), scores) for twin in twins)
        torch.testing.assert_close(flow.rsample_and_log_prob((30,))[1].shape, scores.shape)
    assert draws.dtype == torch.double and draws.shape == (30, *flow.event_shape) and scores.shape == (30,)
    support = distribution.support
    assert support.event_dim == len(flow.event_shape) and support.check(draws).shape == (30,)
    assert support.check(draws).all() and not support.check(draws * float("nan")).any()
    if "stack" not in name and "cat of" not in name:  # torch's own checks of these have other shapes
        assert known.check(draws).all()
    x, found = flow.chain.inverse_and_ladj(draws)
    found = -found
    if name not in RESIZED:
        truth = [torch.linalg.slogdet(jacobian(flow.chain, row).reshape(row.numel(), -1))[1] for row in x]
        torch.testing.assert_close(found, torch.stack(truth), rtol=1e-6, atol=1e-8)
    elif "stack" not in name:
        base = dist.Normal(torch.zeros(event).double(), 1.0).to_event(len(event))
        theirs = TransformedDistribution(base, [AffineTransform(0.0, flow.chain[0](torch.ones(event).double())), onto])
        torch.testing.assert_close(theirs.log_prob(draws), scores, rtol=1e-6, atol=1e-6)
    else:  # each row by itself
        rows = [
            pf.Wrap(biject_to(constraints.simplex), 3).forward_and_ladj(row)[1] for row in flow.chain[0](x).unbind(-2)
        ]
        torch.testing.assert_close(found, sum(rows) + flow.chain[0].forward_and_ladj(x)[1], rtol=1e-9, atol=1e-9)


def test_prior_box():
    """The support of a prior of several numbers, as simulation-based inference has it."""
    prior = dist.Uniform(torch.tensor([0.0, -5.0]), torch.tensor([1.0, 5.0])).to_event(1)
    flow = pf.Flow(pf.Chain([shake(pf.maf(2, hidden_dims=(8,), num_layers=1)), biject_to(prior.support)]))
    draws = flow.sample((100,))
    assert prior.support.check(draws).all() and flow.log_prob(draws.clone()).isfinite().all()
    assert repr(flow().support) == repr(prior.support)


BOX = biject_to(independent(constraints.interval(LOW, HIGH), 1))
TOGETHER = {
    "compose": ComposeTransform([TanhTransform(), AffineTransform(LOW, HIGH - LOW), ExpTransform()]),
    "independent twice": IndependentTransform(IndependentTransform(ExpTransform(), 1), 0),
    "inverse of a box": ComposeTransform([SigmoidTransform(), AffineTransform(LOW, HIGH - LOW), BOX.inv]),
    "affine of vectors": AffineTransform(torch.tensor(1.0), torch.tensor(-2.0), event_dim=1),
    "inverse of affine": AffineTransform(1.0, torch.tensor([2.0]), event_dim=1).inv,
    "cat in cat": CatTransform([CatTransform([ExpTransform()] * 2, -1), TanhTransform()], -1, [2, 1]),
    "inverse of a cat": CatTransform([ExpTransform().inv, AffineTransform(1.0, 2.0)], -1, [1, 2]).inv,
    "inverse of a stack": StackTransform([ExpTransform().inv, AffineTransform(1.0, 2.0), ExpTransform().inv], -1).inv,
    "inverse of independent": IndependentTransform(ComposeTransform([ExpTransform().inv]), 1).inv,
    "stack of boxes": StackTransform([biject_to(constraints.interval(k, k + 1.0)) for k in range(3)], -1),
    "cached": ComposeTransform([SigmoidTransform(cache_size=1), AffineTransform(0.0, 3.0, cache_size=1)]),
    "normal cdf": CumulativeDistributionTransform(dist.Normal(torch.zeros(3), torch.ones(3))),
    "nothing": ComposeTransform([]),
    "power": ComposeTransform([ExpTransform(), PowerTransform(torch.tensor([2.0, 0.5, -1.0]))]),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_transforms_put_together(name):
    flow = made([TOGETHER[name]], (3,))
    draws = flow.sample((20,))
    with pyro.validation_enabled(True):
        flow.log_prob(draws.clone())
    x, ladj = flow.chain.inverse_and_ladj(draws)
    truth = torch.stack([torch.linalg.slogdet(jacobian(flow.chain, row))[1] for row in x])
    torch.testing.assert_close(-ladj, truth, rtol=1e-6, atol=1e-8)
    y, forward = flow.chain.forward_and_ladj(x)
    torch.testing.assert_close(forward, truth, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(y, draws)
    assert flow().support.check(draws).all() and flow().support.event_dim == 1
    assert flow.chain[1].domain.event_dim == 1 and flow.chain[1].domain.check(flow.chain[0](x)).all()


def test_reshaped():
    flow = made([ReshapeTransform((4,), (2, 2)), biject_to(constraints.interval(LOW[:2], HIGH[:2])).inv.inv], (4,))
    assert flow.event_shape == (2, 2) and flow().support.check(flow.sample((5,))).all()
    both = made([ComposeTransform([ReshapeTransform((4,), (2, 2)), ExpTransform()])], (4,))
    y = both.sample((5,))
    assert y.shape == (5, 2, 2) and both.log_prob(y.clone()).shape == (5,) and both().support.event_dim == 2


# Sets that a later transform moves

MOVED = {
    "log of shares": ([SigmoidTransform(), ExpTransform().inv], [[-1.0, -2.0]], [[-1.0, 0.5]]),
    "exp twice": ([ExpTransform(), ExpTransform()], [[1.5, 2.0]], [[0.5, 2.0]]),
    "turned round": ([ExpTransform(), AffineTransform(1.0, -1.0)], [[0.5, -3.0]], [[1.5, 0.0]]),
    "by sides": ([ExpTransform(), AffineTransform(0.0, torch.tensor([1.0, -1.0]))], [[1.0, -1.0]], [[1.0, 1.0]]),
    "box by sides": (
        [SigmoidTransform(), AffineTransform(0.0, torch.tensor([2.0, -2.0]))],
        [[1.5, -1.5]],
        [[1.5, 1.5]],
    ),
    "ordered": ([biject_to(constraints.ordered_vector), ExpTransform()], [[0.1, 3.0]], [[3.0, 0.1], [-1.0, 2.0]]),
    "bent": ([ExpTransform(), TanhTransform()], [[0.5, 0.2]], [[-0.5, 0.2], [0.5, 1.5]]),
    "positive ordered": ([biject_to(constraints.positive_ordered_vector)], [[0.1, 3.0]], [[3.0, 0.1], [-1.0, 2.0]]),
}


@pytest.mark.parametrize("end, inside, outside", MOVED.values(), ids=MOVED)
def test_support_is_the_image(end, inside, outside):
    flow = made(end, (2,))
    draws = flow.sample((200,))
    assert flow().support.check(draws).all()
    assert flow().support.check(torch.tensor(inside).double()).all()
    for point in outside:
        assert not flow().support.check(torch.tensor(point).double())
        with pyro.validation_enabled(True), pytest.raises(ValueError, match="within the support"):
            flow.log_prob(torch.tensor(point).double())


def test_support_follows_its_device_and_dtype():
    flow = made([BOX], (3,))
    assert flow().support.base_constraint.lower_bound.dtype == torch.double
    assert flow.float()().support.base_constraint.lower_bound.dtype == torch.float
    assert flow().support is flow().support  # found once
    assert copy.deepcopy(flow)().support.base_constraint.lower_bound is not flow().support.base_constraint.lower_bound


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_bounds_take_the_dtype_of_the_flow(dtype, default_dtype):
    default_dtype(torch.double if dtype == torch.float else torch.float)
    low, high = (bound.to(torch.get_default_dtype()) for bound in (LOW, HIGH))
    flow = made([biject_to(constraints.interval(low, high))], (3,), dtype)
    draws = flow.sample((5,))
    assert draws.dtype == dtype and flow.log_prob(draws.clone()).dtype == dtype
    assert low.dtype == torch.get_default_dtype()  # of the caller


REFUSED = {
    "bounds of more": (lambda: biject_to(constraints.interval(LOW, HIGH)), (1,), "cannot take events.*bounds"),
    "bounds of others": (
        lambda: biject_to(constraints.interval(LOW, HIGH)),
        (2,),
        r"cannot take events of shape \(2,\)",
    ),
    "bounds of a batch": (lambda: biject_to(constraints.greater_than(torch.zeros(5, 3))), (3,), "cannot take events"),
    "dim from the front": (lambda: CatTransform([ExpTransform()] * 3), (3,), r"counts dim=0.*count it from the end"),
    "stack from the front": (
        lambda: StackTransform([ExpTransform()] * 3),
        (3,),
        r"counts dim=0.*count it from the end",
    ),
    "other lengths": (lambda: CatTransform([ExpTransform()] * 2, -1, [1, 1]), (3,), "cannot take events"),
    "stack of another size": (lambda: StackTransform([ExpTransform()] * 2, -1), (3,), "cannot take events"),
    "sizes in a cat": (
        lambda: biject_to(constraints.cat([constraints.simplex] * 2, -1, [1, 2])),
        (3,),
        "StickBreakingTransform makes .* does not know the sizes",
    ),
    "no triangle": (lambda: biject_to(constraints.corr_cholesky), (4,), "cannot take events"),
    "trained tensor": (lambda: AffineTransform(0.0, torch.ones(3, requires_grad=True)), (3,), "never trains.*detach"),
    "result of a graph": (
        lambda: IndependentTransform(AffineTransform(torch.ones(3, requires_grad=True) * 2, 1.0), 1),
        (3,),
        "never trains",
    ),
    "module inside": (
        lambda: ComposeTransform([pyro_transforms.Spline(3), ExpTransform()]),
        (3,),
        "holds parameters.*one by one",
    ),
    "flow inside": (lambda: ComposeTransform([pf.Rescaling(3), ExpTransform()]), (3,), "holds parameters.*one by one"),
}


@pytest.mark.parametrize("build, event, message", REFUSED.values(), ids=REFUSED)
def test_refused_when_it_is_built(build, event, message):
    refuses(ValueError, f"Wrap: .*{message}", pf.Chain, [pf.Rescaling(event), build()])


def test_caches_of_torch_are_not_kept():
    cached = SigmoidTransform(cache_size=1)
    cached(torch.zeros(3, requires_grad=True) * 1)  # what it holds now cannot be copied
    flow = pf.Chain([pf.Rescaling(3), cached])
    x = torch.zeros(3)
    with torch.no_grad():
        flow(x)
        x.add_(1)
        torch.testing.assert_close(flow(x), torch.full((3,), 1.0).sigmoid())
    assert cached._cache_size == 1


@pytest.mark.parametrize("name", ["interval of tensors", "simplex", "corr_cholesky", "cat", "stack of vectors"])
def test_fit_density_takes_each(name):
    onto = biject_to(independent(KNOWN[name], 1) if name == "interval of tensors" else KNOWN[name])
    event = (2, 3) if name == "stack of vectors" else (3,)
    data = made([onto], event, torch.float).sample((64,))
    target = pf.Flow(pf.Chain([pf.Rescaling(event), onto]))
    fit = pf.fit_density(target, data, max_epochs=2, batch_size=32)
    assert torch.isfinite(fit.distribution.log_prob(data)).all() and fit.distribution.sample((4,)).shape == (
        4,
        *data.shape[1:],
    )


def test_bounds_that_a_module_learns():
    class Above(TransformModule):
        bijective, domain = True, constraints.real

        def __init__(self):
            super().__init__()
            self.low = torch.nn.Parameter(torch.zeros(()))

        @constraints.dependent_property(is_discrete=False, event_dim=0)
        def codomain(self):
            return constraints.greater_than(self.low.detach())

        def _call(self, x):
            return self.low + x.exp()

        def _inverse(self, y):
            return (y - self.low).log()

        def log_abs_det_jacobian(self, x, y):
            return x

    flow = made([Above()], (3,), torch.float)
    for low in (0.0, 5.0):
        with torch.no_grad():
            flow.chain[1].transform.low.fill_(low)
        assert flow().support.check(torch.full((3,), 4.0)) == (low < 4)


def test_repr_names_what_is_wrapped():
    torchs = torch.distributions.transforms
    assert repr(pf.Wrap(torchs.ExpTransform(), 2)).startswith("Wrap(ExpTransform, 2, ")
    both = torchs.ComposeTransform([torchs.AffineTransform(0.0, torch.ones(9)), torchs.ExpTransform().inv])
    assert repr(pf.Wrap(both, 9)).startswith("Wrap(Compose(AffineTransform, ExpTransform.inv), 9, ")
