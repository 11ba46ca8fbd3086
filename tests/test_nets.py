"""The networks: who sees whom, exactly, and what they refuse."""

import pytest
import torch
from asserts import refuses
from cases import diamond, shake
from oracles import jacobian

import pyro_flows as pf
from pyro_flows.nets import MLP, MaskedMLP, activations

HIDDEN = {
    "none": (),
    "wide": (64, 64),
    "narrow": (2,),
    "one-unit": (1, 1),
    "narrow-in-between": (32, 2, 32),
    "uneven": (7, 13, 5),
}
ORDERS = {
    "identity": "identity",
    "reverse": "reverse",
    "random": "random",
    "list": [3, 1, 4, 0, 2],
    "tensor": torch.tensor([4, 0, 1, 3, 2]),
}


def fork() -> torch.Tensor:
    """0 -> 1 -> 2, and 3 alone looks at 0 and 4."""
    adjacency = torch.zeros(5, 5, dtype=torch.bool)
    adjacency[1, 0] = adjacency[2, 1] = adjacency[3, 0] = adjacency[3, 4] = True
    return adjacency


def dependence(net: MaskedMLP) -> torch.Tensor:
    """True at ``[i, j]`` where any parameter of output ``i`` changes with input ``j``, at some context."""
    context = torch.randn(net.context_dim, dtype=torch.float64) if net.context_dim else None
    x = torch.randn(4, net.input_dim, dtype=torch.float64)
    seen = [jacobian(lambda v: net(v, context), row) != 0 for row in x]
    return torch.stack(seen).any(0).any(1)


def allowed(order: torch.Tensor) -> torch.Tensor:
    rank = torch.argsort(order)
    return rank[:, None] > rank[None, :]


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("num_params", [1, 3])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("order", ORDERS)
def test_no_output_sees_what_does_not_come_before_it(order, hidden, num_params, context_dim):
    net = MaskedMLP(5, num_params=num_params, hidden_dims=HIDDEN[hidden], context_dim=context_dim, order=ORDERS[order])
    seen = dependence(shake(net.double()))
    assert not (seen & ~allowed(net.order)).any()
    if hidden in ("none", "wide"):  # and with enough units it sees all that does
        assert torch.equal(seen, allowed(net.order))


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("hidden_dims", [(32,), (32, 32, 32), (3, 3), (1,)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_residual_networks_keep_the_order(order, hidden_dims, context_dim):
    net = MaskedMLP(5, hidden_dims=hidden_dims, context_dim=context_dim, order=ORDERS[order], residual=True)
    seen = dependence(shake(net.double()))
    assert not (seen & ~allowed(net.order)).any()
    if hidden_dims[0] == 32:
        assert torch.equal(seen, allowed(net.order))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("width", [1, 3, 64])
@pytest.mark.parametrize("adjacency", [diamond(), fork(), torch.zeros(4, 4, dtype=torch.bool)], ids=["a", "b", "none"])
def test_outputs_see_their_neighbours_only(adjacency, width, context_dim, residual):
    size = len(adjacency)
    net = MaskedMLP(
        size, num_params=2, hidden_dims=(width, width), context_dim=context_dim, adjacency=adjacency, residual=residual
    )
    seen = dependence(shake(net.double()))
    assert not (seen & ~adjacency).any()
    if width == 64:
        assert torch.equal(seen, adjacency)


def test_adjacency_of_integers():
    net = shake(MaskedMLP(4, hidden_dims=(32,), adjacency=diamond().long().tolist()).double())
    assert torch.equal(dependence(net), diamond())


@pytest.mark.parametrize("hidden_dims", [(), (1,), (3, 1, 3), (32,)], ids=str)
@pytest.mark.parametrize("options", [{}, {"order": "random"}, {"adjacency": fork()}], ids=str)
def test_context_reaches_every_output(options, hidden_dims):
    net = shake(MaskedMLP(5, num_params=2, hidden_dims=hidden_dims, context_dim=3, **options).double(), 1.0)
    x, context = torch.randn(5).double(), torch.randn(3).double()
    assert (jacobian(lambda c: net(x, c), context) != 0).any(-1).all()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("input_dim", [0, 3])
def test_context_reaches_every_output_of_a_dense_network(input_dim, residual):
    net = shake(MLP(input_dim, 2, num_params=2, hidden_dims=(8,), context_dim=3, residual=residual).double())
    x, context = torch.randn(5, input_dim).double(), torch.randn(5, 3).double()
    seen = jacobian(lambda c: net(x, c), context).abs().sum((0, 3))
    assert (seen != 0).all()


def test_one_input_sees_nothing_and_still_learns():
    net = shake(MaskedMLP(1, num_params=2, hidden_dims=(4,)).double())
    assert not dependence(net).any()
    assert (net(torch.randn(3, 1).double()) != 0).all()


@pytest.mark.parametrize("make", [lambda **o: MaskedMLP(4, **o), lambda **o: MLP(4, 4, **o)], ids=["masked", "dense"])
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("hidden_dims", [(), (8, 8)], ids=str)
def test_starts_at_zero_if_asked(make, context_dim, hidden_dims):
    x, context = torch.randn(7, 4), torch.randn(7, context_dim) if context_dim else None
    options = {"num_params": 3, "context_dim": context_dim, "hidden_dims": hidden_dims}
    out = make(**options)(x, context)
    assert out.shape == (7, 4, 3)
    assert (out == 0).all()
    assert (make(zero_init=False, **options)(x, context) != 0).any()


@pytest.mark.parametrize("context_shape", [(2,), (7, 2), (3, 1, 2), (3, 7, 2)], ids=str)
@pytest.mark.parametrize("make", [lambda: MaskedMLP(4, context_dim=2), lambda: MLP(4, 4, context_dim=2)])
def test_contexts_broadcast(make, context_shape):
    net = shake(make().double())
    x, context = torch.randn(3, 7, 4).double(), torch.randn(context_shape).double()
    whole = net(x, context.expand(3, 7, 2))
    torch.testing.assert_close(net(x, context), whole, rtol=1e-12, atol=1e-12)


def test_constant_network_has_the_batch_of_its_input():
    net = shake(MLP(0, 4, num_params=2).double())
    assert net(torch.zeros(3, 5, 0).double()).shape == (3, 5, 4, 2)


def test_random_order_is_saved_and_given_ones_are_not():
    assert "order" in MaskedMLP(5, order="random").state_dict()
    assert "order" not in MaskedMLP(5, order=[3, 1, 4, 0, 2]).state_dict()
    first, second = (shake(MaskedMLP(12, order="random").double()) for _ in range(2))
    assert not torch.equal(first.order, second.order)
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 12).double()
    assert torch.equal(first(x), second(x))
    assert not (dependence(second) & ~allowed(first.order)).any()


def test_given_order_is_copied():
    order = torch.tensor([2, 0, 1])
    net = MaskedMLP(3, order=order)
    order.zero_()
    assert net.order.tolist() == [2, 0, 1]


BAD = [
    (lambda: MaskedMLP(0), "input_dim"),
    (lambda: MaskedMLP(-3), "input_dim"),
    (lambda: MaskedMLP(2.0), "input_dim"),
    (lambda: MaskedMLP(True), "input_dim"),
    (lambda: MaskedMLP(3, num_params=0), "num_params"),
    (lambda: MaskedMLP(3, context_dim=-1), "context_dim"),
    (lambda: MaskedMLP(3, hidden_dims=(8, 0)), "hidden_dims"),
    (lambda: MaskedMLP(3, hidden_dims=(8, -1)), "hidden_dims"),
    (lambda: MaskedMLP(3, hidden_dims=(8.0,)), "hidden_dims"),
    (lambda: MaskedMLP(3, hidden_dims=(8, 9), residual=True), "all equal"),
    (lambda: MaskedMLP(3, hidden_dims=(), residual=True), "residual"),
    (lambda: MaskedMLP(3, order="sorted"), "order"),
    (lambda: MaskedMLP(3, order=[0, 1]), "permutation of 0..2"),
    (lambda: MaskedMLP(3, order=[0, 1, 1]), r"permutation of 0..2, got \[0, 1, 1\]"),
    (lambda: MaskedMLP(3, order=[1, 2, 3]), "permutation"),
    (lambda: MaskedMLP(3, order=torch.tensor([0.0, 1.0, 2.0])), "permutation"),
    (lambda: MaskedMLP(3, adjacency=torch.ones(3, 3).tril(-1), order="reverse"), "either an order or an adjacency"),
    (lambda: MaskedMLP(3, adjacency=torch.ones(2, 3)), r"adjacency of shape \(3, 3\), got \(2, 3\)"),
    (lambda: MaskedMLP(3, adjacency=torch.eye(3)), "diagonal"),
    (lambda: MaskedMLP(4, adjacency=torch.eye(4).roll(1, 0)), r"cycle.*\[0, 1, 2, 3\]"),
    (lambda: MaskedMLP(3, activation="swish"), "activation.*'silu'.*got 'swish'"),
    (lambda: MaskedMLP(3, activation=torch.nn.PReLU()), "without parameters"),
    (lambda: MLP(-1, 3), "input_dim"),
    (lambda: MLP(3, 0), "output_dim"),
    (lambda: MLP(3, 3, num_params=0), "num_params"),
    (lambda: MLP(3, 3, context_dim=-1), "context_dim"),
    (lambda: MLP(3, 3, hidden_dims=(0,)), "hidden_dims"),
    (lambda: MLP(3, 3, hidden_dims=(4, 5), residual=True), "all equal"),
]


@pytest.mark.parametrize("make, message", BAD, ids=[message for _, message in BAD])
def test_refuses(make, message):
    refuses(ValueError, message, make)


def test_refuses_an_activation_that_is_nothing_to_call():
    refuses(TypeError, "activation", MaskedMLP, 3, activation=3)


def test_activation_modules_without_parameters_work():
    by_name, by_module = MaskedMLP(3, activation="tanh"), MaskedMLP(3, activation=torch.nn.Tanh())
    shake(by_name)
    by_module.load_state_dict(by_name.state_dict())
    x = torch.randn(5, 3)
    torch.testing.assert_close(by_name(x), by_module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(n for n, known in activations.KNOWN.items() if known.in_place is not None))
def test_activations_in_place_agree_with_autograd_as_far_out_as_numbers_go(name, dtype):
    act = activations.KNOWN[name].value
    far = torch.logspace(-20, 9, 500, dtype=dtype)
    pre = torch.cat([-far.flip(0), torch.randn(500, dtype=dtype), far]).requires_grad_()
    plain = act(pre)
    (wanted,) = torch.autograd.grad(plain.sum(), pre)
    post = activations.in_place(act)(pre.detach().clone())
    rounding = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(post, plain.detach(), rtol=rounding, atol=0)
    # The slope comes from the value, in which that of a saturated unit is only known to rounding.
    for found in (
        activations.slope(act, pre.detach(), post),
        activations.pull(act, torch.ones_like(post), pre.detach(), post),
    ):
        torch.testing.assert_close(found, wanted, rtol=rounding, atol=rounding)


def test_one_activation_for_each_layer_and_the_last_for_all_that_follow():
    net = MLP(2, 3, hidden_dims=(5, 6, 7), activation=("isru", "tanh"), zero_init=False)
    x = torch.randn(4, 2)
    hidden = activations.isru(net.layers[0](x))
    hidden = torch.tanh(net.layers[1](hidden))
    hidden = torch.tanh(net.layers[2](hidden))
    torch.testing.assert_close(net(x)[..., 0], net.layers[3](hidden))


def test_mafs_parameters_stay_bounded_however_far_out_the_inputs_are():
    """Those of a network whose first activation grows do not."""
    far = torch.tensor([[0.3, -0.2, 0.1], [1e6, -1e6, 1e6]])
    for options, bounded in (({}, True), ({"activation": "silu"}, False)):
        (layer,) = pf.maf(3, num_layers=1, **options)
        shake(layer)
        with torch.no_grad():
            params = layer.net(far)
        assert (params[1].abs().max() < 1e3) == bounded


@pytest.mark.parametrize("own_context", [False, True])
def test_large_batches_go_in_pieces_without_a_trace(monkeypatch, own_context):
    monkeypatch.setattr("pyro_flows.nets.masked_pass.ROWS", 4)
    layer = pf.Autoregressive(3, context_dim=2, hidden_dims=(7,)).double()
    shake(layer, 0.3)
    x = torch.randn(19, 3, dtype=torch.float64)
    context = torch.randn(*((19,) if own_context else ()), 2, dtype=torch.float64)
    whole, whole_params = layer.inverse_and_ladj(x, context), layer.net(x, context)
    with torch.no_grad():
        pieces, params = layer.inverse_and_ladj(x, context), layer.net(x, context)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(params, whole_params)


def test_hidden_dims_that_are_no_sequence():
    for build in (pf.nice, pf.realnvp, pf.maf, pf.iaf, pf.nsf, pf.ncsf, pf.cnf, pf.nets.MLP):
        for wrong in (64, 64.0, "64"):
            with pytest.raises(TypeError, match=r"hidden_dims to be positive integers in a tuple.*\(64, 64\)"):
                build(3, hidden_dims=wrong) if build is not pf.nets.MLP else build(3, 1, hidden_dims=wrong)
    with pytest.raises(TypeError, match="MADE: expected hidden_dims"):
        pf.MADE(3, "normal", hidden_dims=64)
