"""Couplings: the same numbers and gradients as from a formula written out, at no needless cost."""

import gc
import weakref

import pytest
import torch
from cases import Sinh, shake
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_flows as pf

FAMILIES = {
    "affine": pf.univariate.Affine(),
    "shift": pf.univariate.Shift(),
    "linear": pf.Spline(4),
    "identity": pf.Spline(3, 2.0, "identity"),
    "circular": pf.Spline(3, boundary="circular"),
    "own": Sinh(),
}
MASKS = {
    "first": [True, True, False, False, False],
    "last": [False, False, True, True, True],
    "scattered": [False, True, True, False, True],
}
EVEN = {"even": [True, False, True, False, True, False], "odd": [False, True, False, True, False, True]}
CONTEXTS = {
    "none": ((7,), None),
    "one": ((7,), ()),
    "one-row": ((7,), (1,)),
    "each": ((7,), (7,)),
    "fewer": ((2, 7), (7,)),
    "rows": ((2, 7), (2, 1)),
    "columns": ((2, 7), (1, 7)),
    "both": ((2, 7), (2, 7)),
    "many-for-one": ((), (7,)),
    "nothing": ((), None),
}
BOTH = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def formula(layer, x, context, inverse):
    """A coupling written out, row by row, with the layers of its network as modules."""
    batch = x.shape[: x.dim() - len(layer.event_shape)]
    if context is not None:
        batch = torch.broadcast_shapes(batch, context.shape[:-1])
        x = x.expand(*batch, *layer.event_shape)
    flat = x.reshape(*batch, layer.event_shape.numel())
    kept = layer.mask.flatten()
    seen = flat[..., kept]
    if layer.periodic is not None and layer.periodic.flatten()[kept].any():
        angle = layer.periodic.flatten()[kept]
        seen = torch.cat((torch.where(angle, seen.cos(), seen), seen[..., angle].sin()), -1)
    if context is not None:
        seen = torch.cat((seen, context.expand(*batch, context.shape[-1])), -1)
    net = layer.net
    if seen.shape[-1] == 0:
        out = net.constant.expand(*batch, len(net.constant))
    else:
        out = stream = net.layers[0](seen)
        for k, (act, linear) in enumerate(zip(net.activations, net.layers[1:], strict=True), 1):
            out = linear(act(out))
            if k in net.joins:
                out = stream = out + stream
    params = out.view(*batch, net.num_params, net.output_dim).transpose(-1, -2)
    moved, slope = (layer.univariate.inverse if inverse else layer.univariate.forward)(flat[..., ~kept], params)
    y = flat.clone()
    y[..., ~kept] = moved
    return y.view(x.shape), slope.sum(-1)


def make(dims=5, *args, dtype=torch.float64, **options):
    layer = pf.Coupling(dims, *args, **{"hidden_dims": (8, 6), "activation": ("tanh", "silu"), **options})
    return shake(layer, 0.3).to(dtype)


def point(*shape, dtype=torch.float64):
    return 2 * torch.tanh(torch.randn(*shape, dtype=dtype))


def outcome(move, layer, x, context, inverse):
    """``(y, ladj)`` and all gradients of a number that depends on both."""
    inputs = [each.clone().requires_grad_() for each in (x, context) if each is not None]
    y, ladj = move(layer, *inputs, *([None] if context is None else []), inverse)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    loss = (weights * y).sum() + (ladj * ladj).sum()
    wanted = [*inputs, *(p for p in layer.parameters() if p.requires_grad)]
    return [y, ladj, *torch.autograd.grad(loss, wanted)]


def call(layer, x, context, inverse):
    return (layer.inverse_and_ladj if inverse else layer.forward_and_ladj)(x, context)


def agree(layer, x, context=None, inverse=False, tolerance=1e-12):
    found, wanted = (outcome(move, layer, x, context, inverse) for move in (call, formula))
    for got, want in zip(found, wanted, strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        if want.numel():
            assert (got - want).abs().max() <= tolerance * (1 + want.abs().max())


@BOTH
@pytest.mark.parametrize("mask", [*MASKS, *EVEN])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients(family, mask, inverse):
    mask = (MASKS | EVEN)[mask]
    layer, dims = make(len(mask), FAMILIES[family], mask=mask), len(mask)
    agree(layer, point(7, dims), None, inverse)
    with torch.no_grad():
        y, ladj = layer.forward_and_ladj(point(7, dims))
    assert y.is_contiguous() and ladj.shape == (7,)


@pytest.mark.parametrize("where", CONTEXTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_contexts_of_every_shape(family, where):
    batch, given = CONTEXTS[where]
    layer = make(5, FAMILIES[family], context_dim=0 if given is None else 3)
    context = None if given is None else torch.randn(*given, 3, dtype=torch.float64)
    agree(layer, point(*batch, 5), context, inverse=True)
    with torch.no_grad():
        arguments = (point(*batch, 5),) if context is None else (point(*batch, 5), context)
        found = layer.forward_and_ladj(*arguments)
        wanted = formula(layer, arguments[0], context, False)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_dims": ()},
        {"hidden_dims": (), "context_dim": 3},
        {"residual": True, "hidden_dims": (6, 6, 6), "activation": "silu"},
        {"residual": True, "hidden_dims": (6, 6), "activation": "tanh", "context_dim": 3},
        {"activation": "relu"},
        {"activation": ("isru", "elu")},
        {"activation": "gelu"},
        {"activation": lambda x: x * torch.cos(x)},
    ],
    ids=["linear", "linear-context", "residual", "residual-context", "relu", "isru-elu", "gelu", "lambda"],
)
@pytest.mark.parametrize("family", ["affine", "linear"])
def test_networks_of_every_kind(family, options):
    layer = make(5, FAMILIES[family], **options)
    context = torch.randn(7, 3, dtype=torch.float64) if "context_dim" in options else None
    agree(layer, point(7, 5), context, inverse=False)
    agree(layer, point(7, 5), context, inverse=True)


@BOTH
def test_angles_among_other_numbers(inverse):
    angles = [False, True, True, False, True]
    mask = [True, True, True, False, True]
    layer = make(5, pf.univariate.Affine(), periodic=angles, mask=mask)
    agree(layer, point(7, 5), None, inverse)
    x = point(7, 5)
    turned = x + 2 * torch.pi * torch.tensor(angles)
    (y, ladj), (again, same) = layer.forward_and_ladj(x), layer.forward_and_ladj(turned)
    torch.testing.assert_close(again[:, 3], y[:, 3])
    torch.testing.assert_close(same, ladj)


@BOTH
@pytest.mark.parametrize("family", ["affine", "linear"])
def test_events_of_more_dimensions_and_one(family, inverse):
    agree(make((2, 3), FAMILIES[family], mask="random"), point(4, 2, 3), None, inverse)
    agree(make((2, 3), FAMILIES[family], context_dim=2), point(4, 5, 2, 3), torch.randn(5, 2).double(), inverse)
    agree(make(1, FAMILIES[family]), point(4, 1), None, inverse)
    agree(make(1, FAMILIES[family], context_dim=2), point(4, 1), torch.randn(4, 2).double(), inverse)


@pytest.mark.parametrize("batch", [(0,), (2, 0)])
@pytest.mark.parametrize("given", [None, (), (0,), (1,)])
@pytest.mark.parametrize("family", FAMILIES)
def test_empty_batches(family, batch, given):
    layer = make(5, FAMILIES[family], context_dim=0 if given is None else 3)
    context = None if given is None else torch.randn(*given, 3, dtype=torch.float64)
    agree(layer, point(*batch, 5), context)


@pytest.mark.parametrize("strides", ["transposed", "expanded", "sliced"])
def test_values_in_any_memory_layout(strides):
    x = {"transposed": point(5, 7).T, "expanded": point(5).expand(7, 5), "sliced": point(14, 10)[::2, ::2]}[strides]
    layer = make(5, mask=MASKS["scattered"])
    agree(layer, x)
    assert layer.forward_and_ladj(x)[0].is_contiguous()


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["affine", "linear"])
def test_single_precision(family, default, default_dtype):
    default_dtype(default)
    agree(make(5, FAMILIES[family], dtype=torch.float32), point(7, 5, dtype=torch.float32), tolerance=2e-5)
    agree(make(5, FAMILIES[family], dtype=torch.float64), point(7, 5, dtype=torch.float64))


# Gradients that nobody wants, and memory


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["affine", "linear"])
@pytest.mark.parametrize("how", ["frozen", "not asked for", "asked for", "leaves asked for", "data"])
def test_only_products_that_are_wanted(family, how):
    layer = make(5, FAMILIES[family]).requires_grad_(how != "frozen")
    x = point(7, 5).requires_grad_(how != "data")
    total = sum(out.sum() for out in layer.inverse_and_ladj(x))
    parameters = list(layer.parameters())
    with Products() as products:
        if how in ("frozen", "not asked for"):
            torch.autograd.grad(total, x)
        elif how == "leaves asked for":
            assert all(g.abs().max() > 0 for g in torch.autograd.grad(total, parameters[:2]))
        else:
            total.backward()
            assert all(p.grad.abs().max() > 0 for p in parameters)
    wanted = {"frozen": 3, "not asked for": 3, "asked for": 6, "leaves asked for": 3, "data": 5}
    assert products.count == wanted[how]


@pytest.mark.parametrize("family", ["affine", "linear"])
@pytest.mark.parametrize("frozen", ["first", "last", "weights", "biases", "all", "all but one"])
def test_frozen_parameters(family, frozen):
    layer = make(5, FAMILIES[family], context_dim=3)
    for k, (name, parameter) in enumerate(layer.named_parameters()):
        chosen = {
            "first": k < 2,
            "last": k >= 4,
            "weights": name.endswith("weight"),
            "biases": name.endswith("bias"),
            "all": True,
            "all but one": k != 3,
        }
        parameter.requires_grad_(not chosen[frozen])
    context = torch.randn(7, 3, dtype=torch.float64)
    agree(layer, point(7, 5), context, inverse=True)
    outcomes = []
    for move in (call, formula):  # and where only parameters want one
        total = sum(out.square().sum() for out in move(layer, point(7, 5) * 0 + 0.3, context, False))
        wanted = [p for p in layer.parameters() if p.requires_grad]
        outcomes.append(torch.autograd.grad(total, wanted) if wanted else ())
    torch.testing.assert_close(*outcomes, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["no_grad", "nothing wants one"])
def test_without_gradients_nothing_is_kept(family, how):
    layer = make(5, FAMILIES[family], context_dim=2)
    context = torch.randn(2, dtype=torch.float64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda held: held):
        if how == "no_grad":
            with torch.no_grad():
                outputs = layer.inverse_and_ladj(point(7, 5), context)
        else:
            outputs = layer.requires_grad_(False).inverse_and_ladj(point(7, 5), context)
    assert not kept
    assert all(out.grad_fn is None and not out.requires_grad for out in outputs)


@pytest.mark.full
def test_the_graph_does_not_hold_what_the_caller_made():
    layer = make(5)
    for wants in (False, True):
        x = point(7, 5).requires_grad_(wants) * 1.0
        ladj = layer.forward_and_ladj(x)[1]
        seen = weakref.ref(x)
        del x
        gc.collect()
        assert ladj.requires_grad and seen() is None


@pytest.mark.cpu("pieces that fit into a processor's cache")
def test_large_batches_go_in_pieces_without_gradients(monkeypatch):
    monkeypatch.setattr("pyro_flows.transforms.coupling._ROWS", 4)
    layer, passes = make(5), []
    x = point(11, 5)
    layer.net.register_forward_hook(lambda *args: passes.append(1))
    with torch.no_grad():
        found = layer.forward_and_ladj(x)
    assert len(passes) == 3
    torch.testing.assert_close(found, layer.forward_and_ladj(x), rtol=1e-13, atol=1e-13)
    assert len(passes) == 4


# Further derivatives


@BOTH
@pytest.mark.parametrize("context", [None, (), (3,)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_second_derivatives(family, context, inverse):
    layer = make(3, FAMILIES[family], context_dim=0 if context is None else 2, hidden_dims=(4,))
    method = layer.inverse_and_ladj if inverse else layer.forward_and_ladj
    inputs = [point(3, 3).requires_grad_()]
    if context is not None:
        inputs.append(torch.randn(*context, 2, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(method, inputs)
    assert torch.autograd.gradgradcheck(method, inputs, atol=1e-4)


@pytest.mark.parametrize("family", ["affine", "linear"])
def test_gradient_of_a_gradient_after_the_parameters(family):
    layer = make(5, FAMILIES[family])
    x = point(7, 5).requires_grad_()
    outcomes = []
    for move in (call, formula):
        y, ladj = move(layer, x, None, True)
        slope = torch.autograd.grad((ladj - y.square().sum(-1)).sum(), x, create_graph=True)[0]
        outcomes.append(torch.autograd.grad(slope.square().sum(), list(layer.parameters())))
    torch.testing.assert_close(*outcomes, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_many_gradients_at_once(family):
    layer = make(5, FAMILIES[family])
    x = point(5).requires_grad_()
    rows = torch.autograd.grad(layer.forward_and_ladj(x)[0], x, torch.eye(5).double(), is_grads_batched=True)[0]
    whole = torch.func.jacrev(lambda v: layer.forward_and_ladj(v)[0])(x.detach())
    torch.testing.assert_close(rows, whole, rtol=1e-12, atol=1e-12)


# What has a say in a module's call


def test_hooks_are_called():
    layer = make(5)
    seen = []
    for module in (layer.net, layer.net.layers[1]):
        handle = module.register_forward_hook(lambda *args: seen.append(1))
        layer.forward_and_ladj(point(7, 5))
        handle.remove()
    assert len(seen) == 2
    layer.forward_and_ladj(point(7, 5))
    assert len(seen) == 2


def test_reparameterized_layers_learn():
    layer = make(5)
    x = point(7, 5)
    before = layer.forward_and_ladj(x)[0]
    torch.nn.utils.parametrizations.weight_norm(layer.net.layers[1])
    torch.testing.assert_close(layer.forward_and_ladj(x)[0], before)
    layer.forward_and_ladj(x)[0].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_order_from_a_state_dict():
    first, second = (make(6, mask="random") for _ in range(2))
    while torch.equal(first.order, second.order):
        second = make(6, mask="random")
    second.load_state_dict(first.state_dict())
    x = point(7, 6)
    torch.testing.assert_close(second.forward_and_ladj(x), first.forward_and_ladj(x), rtol=0, atol=0)
    agree(second, x)


@pytest.mark.parametrize("builder", [pf.maf, pf.realnvp, pf.nsf, pf.nice])
def test_many_gradients_at_once_are_those_of_one_after_another(builder):
    flow = builder(3, num_layers=2).double()
    shake(flow, 0.2)
    y = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x, _ = flow.inverse_and_ladj(y)
    directions = torch.eye(12, dtype=torch.float64).view(12, 4, 3)
    (together,) = torch.autograd.grad(x, y, directions, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(x, y, each, retain_graph=True)[0] for each in directions]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-10, atol=1e-10)
