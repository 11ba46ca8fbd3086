"""What each transform does beyond the contract, and the arguments that it refuses."""

import copy
import pickle

import pytest
import torch
from asserts import refuses
from cases import Sinh, diamond, shake
from oracles import jacobian
from torch.distributions import transforms as torch_transforms

import pyro_flows as pf
from pyro_flows.core.chain import leaves
from pyro_flows.transforms.coupling import coupling_mask


@pytest.mark.parametrize(
    "mask, kept",
    [
        ("half", [True, True, False, False, False]),
        ("alternating", [False, True, False, True, False]),
        ([True, False, False, True, True], [True, False, False, True, True]),
        (torch.tensor([True, False, False, True, True]), [True, False, False, True, True]),
    ],
    ids=str,
)
def test_masks(mask, kept):
    assert pf.Coupling(5, mask=mask).mask.tolist() == kept
    assert pf.Coupling(5, mask=mask, flip=True).mask.tolist() == [not k for k in kept]


def test_random_mask_keeps_half_and_is_saved():
    masks = [pf.Coupling(8, mask="random").mask for _ in range(8)]
    assert all(int(mask.sum()) == 4 for mask in masks)
    assert len({tuple(mask.tolist()) for mask in masks}) > 1
    assert "order" in pf.Coupling(8, mask="random").state_dict()
    assert "order" not in pf.Coupling(8, mask="half").state_dict()


def test_masks_of_images_follow_their_shape():
    assert pf.Coupling((2, 3), mask="half").mask.tolist() == [[True, True, True], [False, False, False]]
    given = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.equal(pf.Coupling((2, 3), mask=given).mask, given)


@pytest.mark.parametrize("univariate", [pf.univariate.Affine(), pf.univariate.Shift(), Sinh()], ids=repr)
@pytest.mark.parametrize("mask", ["half", "alternating", "random", [True, False, False, True, True]], ids=str)
@pytest.mark.parametrize("flip", [False, True])
def test_coupling_leaves_kept_dimensions_as_they_are(mask, flip, univariate):
    flow = shake(pf.Coupling(5, univariate, mask=mask, flip=flip, hidden_dims=(8,)))
    x = torch.randn(20, 5)
    for moved, _ in (flow.forward_and_ladj(x), flow.inverse_and_ladj(x)):
        assert torch.equal(moved[:, flow.mask], x[:, flow.mask])
        assert (moved[:, ~flow.mask] != x[:, ~flow.mask]).all()


@pytest.mark.parametrize("mask", ["half", "alternating", "random", [True, False, False, True, True]], ids=str)
def test_coupling_parameters_depend_on_kept_dimensions_only(mask):
    flow = shake(pf.Coupling(5, mask=mask, hidden_dims=(8,)).double())
    x = torch.randn(5).double()
    seen = jacobian(flow, x) != 0
    assert torch.equal(seen, torch.eye(5, dtype=torch.bool) | (~flow.mask[:, None] & flow.mask[None, :]))


def test_coupling_of_one_dimension_is_elementwise_and_sees_its_context():
    flow = shake(pf.Coupling(1, context_dim=2).double())
    context = torch.randn(2).double()
    x = torch.randn(6, 1).double()
    y = flow.forward_and_ladj(x, context)[0]
    slopes = (y[1:] - y[:-1]) / (x[1:] - x[:-1])
    assert (slopes - slopes[0]).abs().max() <= 1e-12  # affine in x
    assert (flow.forward_and_ladj(x, context + 1)[0] != y).all()


@pytest.mark.parametrize("fast", ["density", "sampling"])
@pytest.mark.parametrize("options", [{}, {"order": "random"}, {"adjacency": diamond()}, {"order": "reverse"}], ids=str)
def test_autoregressive_jacobians_are_triangular_in_the_order(options, fast):
    flow = shake(pf.Autoregressive(4, fast=fast, hidden_dims=(16,), **options).double())
    rank = torch.argsort(flow.net.order)
    before = rank[:, None] > rank[None, :]
    x = torch.randn(4).double()
    for call in (flow, flow.inv):
        seen = jacobian(call, x)
        assert not (seen[~(before | torch.eye(4, dtype=torch.bool))] != 0).any()
        assert (seen.diagonal() > 0).all()
    if "adjacency" in options:  # the one-pass direction looks at the neighbours and at nothing else
        fastest = flow if fast == "sampling" else flow.inv
        assert torch.equal(jacobian(fastest, x) != 0, diamond() | torch.eye(4, dtype=torch.bool))


def test_autoregressive_images_are_flattened_row_by_row():
    image = shake(pf.Autoregressive((2, 3), order=[4, 2, 0, 1, 3, 5]).double())
    flat = pf.Autoregressive(6, order=[4, 2, 0, 1, 3, 5]).double()
    flat.load_state_dict(image.state_dict())
    x = torch.randn(7, 2, 3).double()
    torch.testing.assert_close(image(x).flatten(1), flat(x.flatten(1)), rtol=1e-12, atol=1e-12)


def test_rescaling_scales_towards_the_base():
    flow = pf.Rescaling(2)
    with torch.no_grad():
        flow.log_scale.copy_(torch.tensor([1.0, -2.0]))
    x, ladj = flow.inverse_and_ladj(torch.ones(3, 2))
    torch.testing.assert_close(x, torch.tensor([1.0, -2.0]).exp().expand(3, 2))
    torch.testing.assert_close(ladj, torch.full((3,), -1.0))


def test_rescaling_by_context_is_bounded():
    flow = shake(pf.Rescaling(2, context_dim=1, max_log_scale=0.5).double(), 1.0)
    context = torch.linspace(-1e6, 1e6, 9).double()[:, None]
    moved = flow.inverse_and_ladj(torch.ones(9, 2).double(), context)[0].log() - flow.log_scale
    assert 0.1 < moved.abs().max() <= 0.5 + 1e-12


def test_permutation_gathers():
    flow = pf.Permutation(4, [2, 0, 3, 1])
    x = torch.arange(8.0).reshape(2, 4)
    assert torch.equal(flow(x), x[:, [2, 0, 3, 1]])
    assert torch.equal(flow.inv(flow(x).clone()), x)
    assert torch.equal(pf.Permutation((2, 2), "reverse")(x.reshape(2, 2, 2)), x.flip(-1).reshape(2, 2, 2))
    assert "permutation" in pf.Permutation(4).state_dict()
    assert not pf.Permutation(4, "reverse").state_dict()


def test_loaded_mask_is_the_one_that_is_used():
    # With two dimensions either one is kept, and the two are laid out differently.
    flows = [shake(pf.Coupling(2, mask="random", hidden_dims=(8,))) for _ in range(20)]
    first = flows[0]
    other = next(flow for flow in flows if not torch.equal(flow.mask, first.mask))
    other.load_state_dict(first.state_dict())
    x = torch.randn(5, 2)
    assert torch.equal(other(x), first(x))
    assert torch.equal(other.mask, first.mask)


def test_random_masks_alternate_in_pairs():
    masks = [layer.mask for layer in pf.realnvp(10, mask="random", num_layers=6, hidden_dims=(4,))]
    for first, second in zip(masks[::2], masks[1::2], strict=True):
        assert torch.equal(first, ~second)
    assert not all(torch.equal(masks[0], mask) for mask in masks[2::2])


def test_orders_alternate():
    for builder in (pf.maf, pf.iaf):
        orders = [layer.net.order.tolist() for layer in builder(3, num_layers=3, hidden_dims=(4,))]
        assert orders == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]


def test_every_dimension_of_a_coupling_builder_is_moved():
    for builder in (pf.realnvp, pf.nice):
        for mask in ("half", "alternating", "random", [True, False, True]):
            flow = shake(builder(3, mask=mask, num_layers=2, hidden_dims=(8,)))
            x = torch.randn(5, 3)
            assert (flow(x) != x).all()


def test_default_widths_grow_with_the_input():
    for size, width in ((2, 64), (30, 120), (1000, 512)):
        assert pf.maf(size, num_layers=1)[0].net.structure.widths == [width, width]


@pytest.mark.parametrize(
    "build, cost",
    [
        (lambda: pf.maf(5, num_layers=2, hidden_dims=(16,)), "sampling: 2 sweeps of 5 steps, density: 2 passes"),
        (lambda: pf.iaf(5, num_layers=1, hidden_dims=(16,)), "sampling: 1 pass, density: 1 sweep of 5 steps"),
        (lambda: pf.iaf(5, num_layers=1, hidden_dims=(16,)).inv, "sampling: 1 sweep of 5 steps, density: 1 pass"),
        (lambda: pf.realnvp(5), "sampling: 8 passes, density: 8 passes"),
        (lambda: pf.nice(5), "sampling: 1 product + 4 passes, density: 1 product + 4 passes"),
    ],
)
def test_repr_says_what_each_direction_costs(build, cost):
    assert cost in repr(build())


def test_chain_applies_its_parts_in_order():
    first, second = (shake(pf.Coupling(3, hidden_dims=(8,)).double()) for _ in range(2))
    chain = pf.Chain([first, torch_transforms.ExpTransform(), torch_transforms.ExpTransform().inv, second])
    x = torch.randn(5, 3).double()
    torch.testing.assert_close(chain(x), second(first(x)), rtol=1e-12, atol=1e-12)
    assert len(chain) == 4 and chain[0] is first and list(chain)[-1] is second
    assert isinstance(chain[1], pf.Wrap)
    torch.testing.assert_close(chain[:3](x), first(x), rtol=1e-12, atol=1e-12)


def test_chain_gives_the_context_to_those_that_take_one():
    takes, plain = shake(pf.Coupling(3, context_dim=2).double()), shake(pf.Coupling(3).double())
    x, context = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    chain = pf.Chain([plain, takes, pf.Permutation(3)])
    assert chain.context_dim == 2
    want = chain[2](takes.forward_and_ladj(plain(x), context)[0])
    assert torch.equal(chain.forward_and_ladj(x, context)[0], want)


def test_chain_changes_the_event_shape():
    chain = pf.Chain([torch_transforms.ReshapeTransform((4,), (2, 2)), pf.Coupling((2, 2))])
    assert chain.event_shape == (4,) and chain.data_shape == (2, 2)
    chain = pf.Chain([pf.Coupling(3), torch_transforms.StickBreakingTransform()])
    assert chain.data_shape == (4,)
    assert chain.forward_shape((7, 3)) == (7, 4) and chain.inverse_shape((7, 4)) == (7, 3)
    assert chain.codomain.check(chain(torch.randn(7, 3))).all()


def test_wrapped_module_is_trained_with_the_chain():
    import pyro.distributions.transforms as pyro_transforms

    inner = pyro_transforms.Spline(3, count_bins=4)
    chain = pf.Chain([pf.Coupling(3), inner])
    assert {id(p) for p in inner.parameters()} <= {id(p) for p in chain.parameters()}
    x = torch.randn(5, 3)
    truth = torch.linalg.slogdet(torch.stack([jacobian(chain, row) for row in x]))[1]
    torch.testing.assert_close(chain.forward_and_ladj(x)[1], truth, rtol=1e-4, atol=1e-4)


BAD = [
    (lambda: pf.Coupling(0), "input_dim or event_shape to be positive integers, got 0"),
    (lambda: pf.Coupling(-2), "positive integers, got -2"),
    (lambda: pf.Coupling(()), "positive integers"),
    (lambda: pf.Coupling((2, 0)), "positive integers"),
    (lambda: pf.Coupling(True), "positive integers"),
    (lambda: pf.Coupling(3, context_dim=-1), "context_dim"),
    (lambda: pf.Coupling(3, context_dim=True), "context_dim"),
    (lambda: pf.Coupling(3, mask="checkerboard"), "mask to be 'half'.*got 'checkerboard'"),
    (lambda: pf.Coupling(3, mask=[True, False]), r"boolean.*shape \(3,\), got torch.bool of shape \(2,\)"),
    (lambda: pf.Coupling(3, mask=[1, 0, 1]), "boolean.*got torch.int64"),
    (lambda: pf.Coupling(3, mask=[True] * 3), "keeps 3 of 3"),
    (lambda: pf.Coupling(3, mask=[False] * 3), "keeps 0 of 3"),
    (lambda: pf.Coupling(1, mask=[True]), "keeps 1 of 1"),
    (lambda: pf.Coupling(3, hidden_dims=(0,)), "hidden_dims"),
    (lambda: pf.Autoregressive(3, fast="both"), "fast to be 'density' or 'sampling', got 'both'"),
    (lambda: pf.Autoregressive(0), "positive integers, got 0"),
    (lambda: pf.Autoregressive(3, order=[0, 0, 1]), "permutation of 0..2"),
    (lambda: pf.Autoregressive(3, adjacency=torch.eye(3).roll(1, 0)), "cycle"),
    (lambda: pf.Rescaling(3, max_log_scale=0.0), "max_log_scale > 0"),
    (lambda: pf.Rescaling(-3), "positive integers"),
    (lambda: pf.Permutation(3, [0, 1]), r"permutation of 0..2, got \[0, 1\]"),
    (lambda: pf.Permutation(3, [0, 2, 2]), "permutation of 0..2"),
    (lambda: pf.Permutation(3, [0.0, 1.0, 2.0]), "permutation of 0..2"),
    (lambda: pf.Permutation(3, "sorted"), "'random', 'reverse' or indices, got 'sorted'"),
    (lambda: pf.Wrap(torch_transforms.AbsTransform(), 3), "AbsTransform is not bijective"),
    (lambda: pf.Wrap(torch_transforms.CatTransform([torch_transforms.ExpTransform()] * 2, -1), ()), "positive"),
    (lambda: pf.Wrap(torch_transforms.CorrCholeskyTransform().inv, 3), "2 event dimensions"),
    (lambda: pf.Chain([]), "at least one flow"),
    (lambda: pf.Chain([torch_transforms.ExpTransform()]), "at least one flow"),
    (lambda: pf.Chain([pf.Coupling(3), pf.Coupling(4)]), r"part 1 \(Coupling\) expects.*\(4,\).*gives \(3,\)"),
    (lambda: pf.Chain([pf.Coupling(3, context_dim=1), pf.Coupling(3, context_dim=2)]), r"context_dim.*\[1, 2\]"),
    (lambda: pf.Coupling(3).condition(torch.zeros(2)), "context_dim=0.*Chain"),
    (lambda: pf.Coupling(3, context_dim=2).condition(torch.zeros(3)), "last dimension 2"),
    (lambda: pf.Coupling(3, context_dim=2).condition(torch.zeros(2)).condition(torch.zeros(2)), "bound to a context"),
    *[
        (lambda builder=builder, n=n: builder(3, num_layers=n), f"num_layers to be an integer >= 1, got {n}")
        for builder in (pf.nice, pf.realnvp, pf.maf, pf.iaf)
        for n in (0, -1, 2.0, True)
    ],
    *[
        (lambda builder=builder: builder(-2), "positive integers, got -2")
        for builder in (pf.nice, pf.realnvp, pf.maf, pf.iaf)
    ],
    (lambda: pf.maf(3, order="sideways"), "order"),
    (lambda: pf.iaf(4, adjacency=torch.eye(4).roll(1, 0)), "cycle"),
    (lambda: pf.realnvp(3, max_log_scale=-1.0), "max_log_scale > 0"),
]


@pytest.mark.parametrize("make, message", BAD, ids=[f"{k}-{message[:30]}" for k, (_, message) in enumerate(BAD)])
def test_refuses(make, message):
    refuses(ValueError, message, make)


def test_refuses_flows_to_wrap_and_things_that_are_no_transform():
    for bad in (pf.Coupling(3), torch.nn.Linear(3, 3)):
        refuses(TypeError, "Wrap: expected a torch or Pyro transform", pf.Wrap, bad, 3)


def test_incomplete_transform_says_what_it_lacks():
    class Half(pf.FlowTransform):
        pass

    for name in ("forward_and_ladj", "inverse_and_ladj"):
        refuses(TypeError, f"Half must define {name}", getattr(Half(3), name), torch.zeros(3))


def test_boundary_messages_name_the_remedy():
    flow = pf.Coupling(3, context_dim=2)
    with pytest.raises(ValueError, match=r"Coupling: expected.*last dimension 3 \(input_dim\), got.*\(5, 4\)"):
        flow.forward_and_ladj(torch.zeros(5, 4), torch.zeros(2))
    refuses(ValueError, r"context_dim=2: .*call .condition\(context\) first", flow, torch.zeros(5, 3))
    refuses(ValueError, "do not broadcast", flow.forward_and_ladj, torch.zeros(5, 3), torch.zeros(4, 2))
    with pytest.raises(TypeError, match=r"value is torch.float64 but the parameters are torch.float32"):
        flow.forward_and_ladj(torch.zeros(5, 3).double(), torch.zeros(2))
    refuses(TypeError, r"context is torch.float64", flow.forward_and_ladj, torch.zeros(5, 3), torch.zeros(2).double())
    refuses(TypeError, "expected a tensor", flow.forward_and_ladj, [0.0, 0.0, 0.0], torch.zeros(2))
    refuses(ValueError, "meta", flow.forward_and_ladj, torch.zeros(5, 3, device="meta"), torch.zeros(2))


def test_coupling_mask_is_never_the_callers_tensor():
    mask = torch.tensor([True, False, True])
    kept = coupling_mask(torch.Size([3]), mask)
    kept[1] = True
    assert mask.tolist() == [True, False, True]


# Chains within chains


def in_chains(levels):
    flow = pf.Coupling(2, hidden_dims=(4,))
    for _ in range(levels):
        flow = pf.Chain([flow])
    return flow


def grown(levels):
    """As a loop writes it that adds a layer at a time."""
    flow = pf.Chain([pf.Coupling(2, hidden_dims=(4,))])
    for _ in range(levels):
        flow = pf.Chain([flow, pf.Rescaling(2)])
    return flow


def turned(levels):
    flow = pf.Coupling(2, hidden_dims=(4,))
    for _ in range(levels):
        flow = pf.Inverse(pf.Chain([flow, pf.Rescaling(2)]))
    return flow


def turned_by_property(levels):
    flow = pf.Coupling(2, hidden_dims=(4,))
    for _ in range(levels):
        flow = pf.Chain([flow, pf.Rescaling(2)]).inv
    return flow


def inverses(levels):
    flow = pf.Coupling(2, hidden_dims=(4,))
    for _ in range(levels):
        flow = pf.Inverse(flow)
    return flow


def conditioned(levels):
    flow = pf.Coupling(2, hidden_dims=(4,), context_dim=1)
    for _ in range(levels):
        flow = pf.Chain([flow.condition(torch.ones(1)), pf.Rescaling(2, context_dim=1)])
    return flow.condition(torch.ones(1))


@pytest.mark.parametrize("build, levels", [(in_chains, 200), (grown, 200), (turned, 100), (turned_by_property, 100)])
def test_chains_within_chains(build, levels):
    flow = pf.Flow(shake(build(levels), 0.1).double())
    x = torch.randn(4, 2).double()
    y, ladj = flow.chain.forward_and_ladj(x)
    layers = leaves(flow.chain)
    assert len(layers) == (1 if build is in_chains else levels + 1)
    by_hand, total = x, 0.0
    for layer in layers:
        by_hand, each = layer.forward_and_ladj(by_hand)
        total = total + each
    assert torch.equal(by_hand, y)
    torch.testing.assert_close(total, ladj, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flow.chain.inv(y.clone()), x, rtol=1e-8, atol=1e-8)
    truth = torch.stack([torch.linalg.slogdet(jacobian(flow.chain, row))[1] for row in x])
    torch.testing.assert_close(ladj, truth, rtol=1e-8, atol=1e-8)
    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        twin.load_state_dict(flow.state_dict())
        assert torch.equal(twin.chain(x), y)
    assert "Coupling" in repr(flow) and flow.chain.reach is None and flow().support.event_dim == 1
    assert "pass" in flow.chain.sampling_cost and flow.float().eval().chain.codomain.event_dim == 1


def test_views_within_chains():
    flow = conditioned(40)
    x = torch.randn(5, 2)
    y, ladj = flow.forward_and_ladj(x)
    back, other = copy.deepcopy(flow).inverse_and_ladj(y)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other, -ladj, rtol=1e-4, atol=1e-4)


def test_few_levels_stay_as_they_were_written():
    inner, last = pf.realnvp(2, num_layers=2, hidden_dims=(4,)), pf.Rescaling(2)
    chain = pf.Chain([pf.Chain([inner]), last])
    assert chain[0][0] is inner and chain[-1] is last and len(chain) == 2
    assert any(name.startswith("parts.0.parts.0.parts.1.net.") for name in chain.state_dict())
    twice = pf.Chain([inner, inner])
    assert twice[0] is twice[1] and len(list(twice.parameters())) == len(list(inner.parameters()))


def test_deep_chains_share_what_they_are_made_of():
    inner = pf.Rescaling(2)
    flow = pf.Chain([inner, pf.Rescaling(2)])
    for _ in range(30):
        flow = pf.Chain([flow, inner])
    assert sum(leaf is inner for leaf in leaves(flow)) == 31
    assert len(list(flow.parameters())) == 2 * len(list(inner.parameters()))


def test_inverse_of_an_inverse_is_the_transform():
    flow = pf.Coupling(2, hidden_dims=(4,))
    assert inverses(100) is not None and pf.Inverse(pf.Inverse(flow)) is flow
    assert isinstance(inverses(101), pf.Inverse) and inverses(101).inv.inv is not None
    assert pf.Inverse(flow.inv) is flow and flow.inv.inv is flow
    inverse = pf.Inverse(flow)
    assert inverse.inv is flow and flow.inv is inverse
    for twin in (copy.deepcopy(inverse), pickle.loads(pickle.dumps(inverse))):
        x = torch.randn(3, 2)
        assert isinstance(twin, pf.Inverse) and torch.equal(twin(x), inverse(x.clone()))


def test_flows_end_to_end():
    first, second = (pf.Flow(shake(build(2, num_layers=1, hidden_dims=(4,)))).double() for build in (pf.maf, pf.nsf))
    both = pf.Flow(pf.Chain([first.chain, second.chain]))
    data = torch.randn(6, 2).double()
    middle, ladj = second.chain.inverse_and_ladj(data)
    torch.testing.assert_close(both.log_prob(data), first.log_prob(middle) + ladj, rtol=1e-12, atol=1e-12)
