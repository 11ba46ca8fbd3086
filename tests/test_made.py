"""MADE as a distribution: masses sum to one, who sees whom, ensembles, exact draws, imputation, state, bad input."""

import copy
import itertools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import reload, seeded, shake
from torch.distributions import constraints

import pyro_flows as pf
from pyro_flows.distributions.made import CategoricalHead, MixtureHead, NormalHead

D = 5


def shaken(made, scale=1.0):
    """The same model far from where it starts."""
    return shake(made, scale, seed=1)


def binary(dims=D):
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=dims)), dtype=torch.float64)


OPTIONS = {
    "one layer": {"hidden_dims": (7,)},
    "two layers": {"hidden_dims": (8, 6)},
    "no hidden layer": {"hidden_dims": ()},
    "narrow": {"hidden_dims": (2, 3)},
    "not direct": {"hidden_dims": (8, 6), "direct": False},
    "reverse": {"hidden_dims": (7,), "order": "reverse"},
    "a permutation": {"hidden_dims": (7, 7), "order": [3, 0, 4, 1, 2]},
    "random order": {"hidden_dims": (7,), "order": "random"},
    "random connections": {"hidden_dims": (9, 9, 4), "connectivity": "random"},
    "any order": {"hidden_dims": (9, 9), "order": "any"},
    "any order and connections": {"hidden_dims": (9, 9), "order": "any", "connectivity": "random", "direct": False},
    "told of the masks": {"hidden_dims": (9, 5), "order": "any", "connectivity": "random", "mask_inputs": True},
    "told, no hidden layer": {"hidden_dims": (), "order": "any", "mask_inputs": True},
    "a list of masks": {"hidden_dims": (9,), "order": "any", "num_masks": 3, "activation": "silu"},
}


def make(name, head="bernoulli", dims=D, **more):
    torch.manual_seed(0)
    return shaken(pf.MADE(dims, head, seed=7, **{**OPTIONS[name], **more}).double())


@pytest.mark.parametrize("name", OPTIONS)
def test_masses_sum_to_one(name):
    made = make(name)
    for number in range(3):
        distribution = made.one(number)
        assert torch.logsumexp(distribution.log_prob(binary()), 0).abs() < 1e-12
    assert torch.logsumexp(made.eval().log_prob(binary()), 0).abs() < 1e-12


def test_categorical_masses_sum_to_one():
    classes = [2, 4, 3]
    made = make("any order", CategoricalHead(classes), dims=3)
    states = torch.tensor(list(itertools.product(*(range(k) for k in classes))), dtype=torch.float64)
    for number in range(3):
        assert torch.logsumexp(made.one(number).log_prob(states), 0).abs() < 1e-12


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("head", ["bernoulli", CategoricalHead([2, 3, 4, 2, 3])], ids=["bernoulli", "categorical"])
def test_outputs_see_only_what_comes_before(name, head):
    made = make(name, head)
    for number in range(3):
        member = made.member(number)
        features = torch.randn(D, made.head.num_features, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda f, m=member: made.net(f, None, m), features)
        depends = jacobian.abs().amax((1, 3))  # (output, input)
        before = member.rank[None, :] < member.rank[:, None]
        assert (depends[~before] == 0).all()
        if made.net.is_direct or name.endswith("no hidden layer"):
            assert (depends[before] > 0).all()


def test_masked_weights_do_not_count():
    made = make("any order")
    member, states = made.member(0), binary()
    before = made.one(0).log_prob(states)
    weights, _ = made.net._weights()
    with torch.no_grad():
        for weight, bits in zip([*weights, made.net.direct], made.net.bits(member), strict=True):
            weight[bits == 0] = math.nan
    assert torch.equal(made.one(0).log_prob(states), before)
    assert made.one(0).sample((50,)).isfinite().all()


def test_ensemble_is_the_mean_of_its_members():
    made = make("any order and connections")
    each = torch.stack([made.one(k).log_prob(binary()).exp() for k in range(4)])
    assert (each[0] - each[1]).abs().max() > 1e-3
    torch.testing.assert_close(made.ensemble(4).log_prob(binary()).exp(), each.mean(0), rtol=1e-12, atol=0)
    made.ensemble_size = 4
    assert torch.equal(made.eval().log_prob(binary()), made.ensemble(4).log_prob(binary()))


def test_masks_change_by_an_explicit_call_only():
    made, states = make("any order", num_masks=3).train(), binary()
    first = made.log_prob(states)
    assert torch.equal(made.log_prob(states), first)
    seen = [first]
    for _ in range(2):
        made.resample_masks()
        seen.append(made.log_prob(states))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    made.resample_masks()  # from the end of the list to its beginning
    assert torch.equal(made.log_prob(states), first)
    endless = make("any order").train()
    orders = set()
    for _ in range(20):
        orders.add(tuple(endless.members()[0].order.tolist()))
        endless.resample_masks()
    assert len(orders) > 15


def test_dropout_is_for_training_alone():
    made, states = make("one layer", dropout=0.5), binary()
    plain = make("one layer")
    assert not torch.equal(made.train().log_prob(states), made.log_prob(states))
    assert torch.equal(made.eval().log_prob(states), plain.log_prob(states))
    torch.manual_seed(0)
    drawn = made.train().sample((20,))
    torch.manual_seed(0)
    assert torch.equal(drawn, plain.sample((20,)))


def by_passes(made, noise, member, context=None):
    """Binary draws one dimension after the other, each by a whole pass, from uniform noise by rank."""
    x = torch.zeros(len(noise), made.input_dim, dtype=noise.dtype)
    for rank, dim in enumerate(member.order):
        logit = made.params(x, context, member)[:, dim, 0]
        x[:, dim] = (noise[:, rank] < torch.sigmoid(logit)).to(x)
    return x


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_sweep_draws_what_passes_draw(name, context_dim):
    made = make(name, dims=9, context_dim=context_dim, **({"order": "reverse"} if "perm" in name else {}))
    context = torch.randn(40, 2, dtype=torch.float64) if context_dim else None
    for number in (0, 2):
        member = made.member(number)
        torch.manual_seed(3)
        drawn = made.draw(torch.Size((40,)), context, member)
        torch.manual_seed(3)
        noise = torch.rand(40, 9, dtype=torch.float64)
        with torch.no_grad():
            assert torch.equal(drawn, by_passes(made, noise, member, context))


@pytest.mark.parametrize("rows", [0, 1, 3000])
def test_draws_follow_the_density(rows):
    made = make("any order", dims=4, ensemble_size=2).eval()
    torch.manual_seed(0)
    x = made.sample((rows,))
    assert x.shape == (rows, 4) and x.dtype == torch.float64
    if rows < 100:
        return
    index = (x * torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=x.dtype)).sum(-1).long()
    counts = torch.bincount(index, minlength=16).double()
    expected = rows * made.log_prob(binary(4)).exp().detach()
    many = expected > 5
    statistic = ((counts - expected) ** 2 / expected)[many].sum()
    assert statistic < dist.Chi2(torch.tensor(float(many.sum() - 1))).mean + 5 * math.sqrt(2 * int(many.sum()))


def test_categorical_and_real_draws_follow_the_density():
    torch.manual_seed(0)
    made = make("any order", CategoricalHead([2, 3]), dims=2, num_masks=1)
    x = made.sample((4000,))
    states = torch.tensor(list(itertools.product(range(2), range(3))), dtype=torch.float64)
    share = torch.stack([(x == state).all(-1).double().mean() for state in states])
    torch.testing.assert_close(share, made.log_prob(states).exp().detach(), atol=0.03, rtol=0)
    real = shaken(pf.MADE(2, "normal", hidden_dims=(6,), seed=0).double(), 0.3)
    x = real.sample((20000,))
    grid = torch.linspace(-12, 12, 241, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    density = real.log_prob(points).exp().detach() * 0.01
    assert (density.sum() - 1).abs() < 1e-3
    mean = (density[:, None] * points).sum(0)
    torch.testing.assert_close(x.mean(0), mean, atol=0.1, rtol=0)


def test_context():
    torch.manual_seed(0)
    made = make("two layers", context_dim=3)
    contexts = torch.randn(4, 3, dtype=torch.float64)
    at = made(contexts)
    assert at.batch_shape == (4,) and at.event_shape == (D,)
    assert at.sample((6,)).shape == (6, 4, D)
    value = binary()[:7, None].expand(7, 4, D)
    whole = at.log_prob(value)
    for k in range(4):
        torch.testing.assert_close(whole[:, k], made(contexts[k]).log_prob(binary()[:7]), rtol=1e-12, atol=1e-12)
    assert (whole[:, 0] - whole[:, 1]).abs().max() > 1e-3
    assert at.log_prob(binary()[0]).shape == (4,)
    refuses(ValueError, "call it with a context", made)
    refuses(ValueError, "last dimension 3", made, torch.zeros(2, dtype=torch.float64))
    refuses(ValueError, "leave it out", make("one layer"), contexts)


def test_in_a_model():
    made = make("one layer")
    pyro.clear_param_store()

    def model(n):
        pyro.module("made", made)
        with pyro.plate("rows", n):
            return pyro.sample("x", made())

    trace = pyro.poutine.trace(model).get_trace(6)
    assert trace.nodes["x"]["value"].shape == (6, D)
    torch.testing.assert_close(trace.log_prob_sum(), made.log_prob(trace.nodes["x"]["value"]).sum())
    assert any(name.startswith("made$$$") for name in pyro.get_param_store())
    expanded = made().expand((3, 2))
    assert expanded.sample().shape == (3, 2, D) and expanded.log_prob(binary()[0]).shape == (3, 2)
    pyro.clear_param_store()


def test_normal_draws_have_gradients():
    torch.manual_seed(0)
    made = shaken(pf.MADE(3, "normal", hidden_dims=(6,), seed=0).double(), 0.3)
    x = made().rsample((5,))
    assert made().has_rsample and x.requires_grad

    # Where noise is given, x is a function of it: its gradient against a finite difference of one bias.
    def total(shift):
        moved = copy.deepcopy(made)
        with torch.no_grad():
            moved.net.bias_0[0] += shift
        torch.manual_seed(2)
        return moved().rsample((5,)).square().sum()

    torch.manual_seed(2)
    made().rsample((5,)).square().sum().backward()
    numeric = (total(1e-5) - total(-1e-5)) / 2e-5
    torch.testing.assert_close(made.net.bias_0.grad[0], numeric.detach(), rtol=1e-6, atol=1e-8)
    refuses(NotImplementedError, "no reparameterized draws", make("one layer")().rsample)


# Imputation.


@pytest.mark.parametrize("number", [0, 1])
def test_imputation_against_enumeration(number):
    made = make("any order and connections", direct=True)
    states = binary()
    for known in itertools.product((False, True), repeat=D):
        observed = torch.tensor(known)
        if observed.all() or not observed.any():
            continue
        member = made.member_for(observed, number)
        assert observed[member.order][: int(observed.sum())].all()
        joint = made.score(states, None, member)
        hidden = torch.where(observed, states, math.nan)  # what is missing does not show
        seen = made.log_prob_observed(hidden, observed, number=number)
        alike = (states[:, None, observed] == states[None, :, observed]).all(-1)
        marginal = torch.logsumexp(torch.where(alike, joint, -math.inf), 1)
        torch.testing.assert_close(seen, marginal, rtol=0, atol=1e-12)
        missing = made.log_prob_missing(states, observed, number=number)
        torch.testing.assert_close(missing, joint - marginal, rtol=0, atol=1e-12)


def test_imputation_of_twelve_dimensions_against_enumeration():
    made, states = make("any order and connections", dims=12), binary(12)
    generator = seeded(3)
    for _ in range(6):
        observed = torch.rand(12, generator=generator) < torch.rand((), generator=generator)
        observed[0], observed[1] = True, False
        joint = made.score(states, None, made.member_for(observed))
        which = (states[:, observed] @ (2.0 ** torch.arange(int(observed.sum())).double())).long()
        shares = torch.zeros(2 ** int(observed.sum()), dtype=torch.float64).index_add(0, which, joint.exp())
        assert (shares.sum() - 1).abs() < 1e-12
        marginal = shares.log()[which]
        torch.testing.assert_close(made.log_prob_observed(states, observed), marginal, rtol=0, atol=1e-12)
        torch.testing.assert_close(made.log_prob_missing(states, observed), joint - marginal, rtol=0, atol=1e-12)


def test_imputed_draws_follow_the_conditional():
    made = make("any order")
    rows = torch.tensor([[1.0, 0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    observed = torch.tensor([[True, False, True, False, True], [False, True, True, True, True]])
    torch.manual_seed(0)
    drawn = made.impute(torch.where(observed, rows, math.nan), observed, 4000)
    assert drawn.shape == (4000, 2, D)
    assert (drawn == rows)[:, observed].all()
    states = binary()
    for k in range(2):
        alike = (states[:, observed[k]] == rows[k, observed[k]]).all(-1)
        exact = made.log_prob_missing(states[alike], observed[k]).exp().detach()
        assert (exact.sum() - 1).abs() < 1e-12
        share = torch.stack([(drawn[:, k] == state).all(-1).double().mean() for state in states[alike]])
        torch.testing.assert_close(share, exact, rtol=0, atol=0.035)


def test_imputation_with_context_and_real_values():
    torch.manual_seed(0)
    made = shaken(pf.MADE(4, "mixture", hidden_dims=(8,), context_dim=2, order="any", seed=1).double(), 0.3)
    value, context = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    observed = torch.tensor([True, False, True, False])
    both = made.log_prob_observed(value, observed, context) + made.log_prob_missing(value, observed, context)
    torch.testing.assert_close(both, made.score(value, context, made.member_for(observed)))
    drawn = made.impute(value, observed, 2, context)
    assert drawn.shape == (2, 3, 4) and torch.equal(drawn[..., observed], value[:, observed].expand(2, 3, 2))


def test_imputation_of_a_fixed_order():
    made = make("a permutation")  # 3, 0, 4, 1, 2
    first = torch.tensor([True, False, False, True, True])
    assert made.impute(binary()[:4], first).shape == (1, 4, D)
    refuses(ValueError, "knows one order only", made.impute, binary()[:4], ~first)


def test_masks_that_leave_nothing_to_do():
    made, states = make("any order"), binary()[:2]
    refuses(ValueError, "hides everything", made.impute, states, torch.zeros(D, dtype=torch.bool))
    with pytest.raises(ValueError, match="hides nothing"):
        made.log_prob_observed(states, torch.tensor([[True] * D, [True] + [False] * (D - 1)]))
    refuses(TypeError, "boolean", made.impute, states, torch.ones(D))
    refuses(ValueError, "broadcasts", made.impute, states, torch.ones(4, dtype=torch.bool))


# State.


@pytest.mark.parametrize("name", ["random order", "any order and connections", "random connections"])
def test_a_state_dict_brings_its_masks(name):
    made = make(name)
    made.resample_masks()
    other = pf.MADE(D, **{**OPTIONS[name]}, seed=99).double()
    reload(made, other)
    for mode in (True, False):
        assert torch.equal(made.train(mode).log_prob(binary()), other.train(mode).log_prob(binary()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    made = make("any order").eval()
    made.sample((3,))
    other = copied(made)
    assert torch.equal(other.log_prob(binary()), made.log_prob(binary()))
    with torch.no_grad():
        other.net.bias_0.add_(1.0)
    assert not torch.equal(other.log_prob(binary()), made.log_prob(binary()))
    assert other.sample((3,)).shape == (3, D)


def test_draws_know_of_changed_weights():
    made = make("one layer")
    made.sample((3,))
    with torch.no_grad():
        made.net.bias_1.fill_(100.0)
    assert made.sample((20,)).mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_the_parameters(dtype, default_dtype):
    default_dtype(torch.float64 if dtype == torch.float32 else torch.float32)
    made = pf.MADE(D, hidden_dims=(6,), context_dim=2, seed=0).to(dtype)
    context = torch.zeros(3, 2, dtype=dtype)
    assert made.sample((2,), context).dtype == dtype
    for given in (torch.long, torch.bool):
        assert made.log_prob(torch.ones(3, D, dtype=given), context).dtype == dtype


# With the rest of the package.


def test_fitting_goes_through_the_masks():
    generator = seeded(0)
    cause = torch.rand(600, 1, generator=generator) < 0.5
    rows = ((torch.rand(600, D, generator=generator) < 0.9) == cause).float()
    made = pf.MADE(D, hidden_dims=(32,), order="any", seed=0)
    alone = rows.mean(0)
    independent = torch.distributions.Bernoulli(alone).log_prob(rows).sum(-1).mean()
    fit = pf.fit_density(made, rows[:400], validation=rows[400:], steps=400, progress=False)
    assert made.position > 100 and not made.training
    assert fit.validation > independent + 0.5
    assert made.impute(rows[:4], torch.tensor([True] * 4 + [False])).shape == (1, 4, D)


def test_marginals_to_start_from():
    rows = (torch.rand(300, D, generator=seeded(0)) < torch.linspace(0.1, 0.9, D)).float()
    expected = dist.Bernoulli((rows.sum(0) + 0.5) / 301).log_prob(binary().float()).sum(-1)
    made = pf.MADE(D, hidden_dims=(6,), seed=0).fit_marginals(rows)
    torch.testing.assert_close(made.log_prob(binary().float()), expected)
    conv = pf.ConvMADE((1, 1, D), hidden_channels=4, num_layers=2).fit_marginals(rows.view(-1, 1, 1, D))
    torch.testing.assert_close(conv.log_prob(binary().float().view(-1, 1, 1, D)), expected)
    classes = pf.MADE(2, CategoricalHead([2, 3]), hidden_dims=(6,), seed=0)
    classes.fit_marginals(torch.tensor([[0, 0], [1, 2], [1, 2], [1, 1]]))
    assert classes.log_prob(torch.tensor([1, 2])) > classes.log_prob(torch.tensor([0, 1]))


def test_real_data_in_their_own_units():
    generator = seeded(0)
    rows = 1000 + 50 * torch.randn(600, 2, generator=generator) @ torch.tensor([[1.0, 0.9], [0.0, 0.4]])
    made = pf.MADE(2, "normal", hidden_dims=(16,), seed=0)
    fit = pf.fit_density(made, rows, standardize=True, steps=300, progress=False)
    exact = dist.MultivariateNormal(rows.mean(0), rows.T.cov()).log_prob(rows).mean()
    assert abs(fit.log_prob(rows).mean() - exact) < 0.1


def test_base_of_a_flow():
    torch.manual_seed(0)
    base = shaken(pf.MADE(3, MixtureHead(2), hidden_dims=(6,), seed=0), 0.3)
    flow = shaken(pf.Flow(pf.maf(3, num_layers=2, hidden_dims=(8,)), base), 0.1).double()
    y = torch.randn(6, 3, dtype=torch.float64)
    x, ladj = flow.chain.inverse_and_ladj(y)
    torch.testing.assert_close(flow.log_prob(y), base.log_prob(x) + ladj)
    assert flow.sample((5,)).shape == (5, 3)
    flow.log_prob(y).sum().backward()
    assert base.net.weight_0.grad.abs().sum() > 0
    assert any(name.startswith("base.") for name in flow.state_dict())


# Bad input.


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"input_dim": 0}, "positive integers"),
        ({"order": [0, 1, 1, 2, 3]}, "permutation"),
        ({"order": [0, 1, 2]}, "permutation"),
        ({"order": "sideways"}, "order"),
        ({"hidden_dims": (0,)}, "hidden_dims"),
        ({"context_dim": -1}, "context_dim"),
        ({"connectivity": "dense"}, "connectivity"),
        ({"dropout": 1.0}, "dropout"),
        ({"num_masks": 3}, "one member only"),
        ({"num_masks": 0, "order": "any"}, "num_masks to be an integer >= 1"),
        ({"ensemble_size": 3}, "one member only"),
        ({"ensemble_size": 5, "order": "any", "num_masks": 4}, "there are 4 members"),
        ({"head": "poisson"}, "head"),
        ({"input_dim": (2, 3)}, "ConvMADE"),
    ],
)
def test_bad_options(options, match):
    refuses(ValueError, match, pf.MADE, **{"input_dim": D, "hidden_dims": (6,), **options})


def test_values_outside_of_the_support():
    distribution = pf.MADE(D, hidden_dims=(6,), seed=0)()
    with pyro.validation_enabled(True), pytest.raises(ValueError, match="2"):
        pf.MADE(D, hidden_dims=(6,), seed=0)().log_prob(torch.full((D,), 2.0))
    for on, wrong in ((True, 4), (False, 4), (False, 1)):
        with pyro.validation_enabled(on), pytest.raises(ValueError, match="last dimension 5"):
            distribution.log_prob(torch.ones(wrong))
    with pyro.validation_enabled(True), pytest.raises(ValueError, match="last dimension 5"):
        pf.MADE(D, hidden_dims=(6,), seed=0)().log_prob(torch.ones(4))
    assert distribution.support.event_dim == 1
    assert isinstance(constraints.independent(constraints.boolean, 1), type(distribution.support))
    real = pf.MADE(2, NormalHead(), hidden_dims=(6,), seed=0)
    refuses(TypeError, r"torch\.float64", real.log_prob, torch.zeros(2, dtype=torch.float64))
    with pyro.validation_enabled(False):
        assert real.log_prob(torch.full((2,), math.nan)).isnan()


class Scored(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.log_prob(x).sum()


@pytest.mark.parametrize("order", ["identity", "any"])
def test_ensembles_of_stacked_weights(order):
    """Gradients through ``vmap`` over models are those of each, and leave nothing behind that breaks later calls."""
    members = [Scored(pf.MADE(4, "normal", hidden_dims=(8,), order=order, seed=0).eval()) for _ in range(3)]
    for parameter in (p for member in members for p in member.parameters()):
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    x, (shared, *members) = torch.randn(8, 4), members
    weights, buffers = torch.func.stack_module_state(members)

    def total(weights):
        each = torch.func.vmap(lambda p, b: torch.func.functional_call(shared, (p, b), (x,)))
        return each(weights, buffers).sum()

    if order == "identity":
        refuses(ValueError, "score once with the model before", torch.func.grad(total), weights)
        shared(x)
    found = torch.func.grad(total)(weights)
    expected = torch.autograd.grad(members[1](x), list(members[1].parameters()))
    for (name, _), each in zip(members[1].named_parameters(), expected, strict=True):
        torch.testing.assert_close(found[name][1], each)
    assert shared(x).isfinite() and shared.model.sample((2,)).shape == (2, 4)
