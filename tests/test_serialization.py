"""What is saved is the map: another process, another seed, the same density."""

import copy
import io
import pickle
import runpy

import pytest
import torch
from asserts import output_of, refuses
from cases import seeded, shake

import pyro_flows as pf

SMALL = {"num_layers": 2, "hidden_dims": (8,)}
CONV = {"hidden_channels": 4, "num_blocks": 1, "activation": "elu"}
ADJACENCY = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]]).bool()
# Built anew in the process that loads, so whatever is drawn here is drawn again there, with another seed.
BUILDERS = {
    "nice": lambda: pf.Flow(pf.nice(4, **SMALL)),
    "nice, random mask": lambda: pf.Flow(pf.nice(4, mask="random", **SMALL)),
    "nice, context": lambda: pf.Flow(pf.nice(4, context_dim=2, **SMALL)),
    "realnvp": lambda: pf.Flow(pf.realnvp(4, **SMALL)),
    "realnvp, random masks": lambda: pf.Flow(pf.realnvp(6, mask="random", num_layers=6, hidden_dims=(8,))),
    "realnvp, given mask": lambda: pf.Flow(pf.realnvp(4, mask=[True, False, False, True], **SMALL)),
    "realnvp, images": lambda: pf.Flow(pf.realnvp((2, 3), mask="random", residual=True, **SMALL)),
    "realnvp, context": lambda: pf.Flow(pf.realnvp(4, mask="random", context_dim=2, **SMALL)),
    "maf": lambda: pf.Flow(pf.maf(4, **SMALL)),
    "maf, random orders": lambda: pf.Flow(pf.maf(6, order="random", **SMALL)),
    "maf, adjacency": lambda: pf.Flow(pf.maf(4, adjacency=ADJACENCY, **SMALL)),
    "maf, context": lambda: pf.Flow(pf.maf(4, order="random", context_dim=2, **SMALL)),
    "maf, residual": lambda: pf.Flow(pf.maf(4, residual=True, **SMALL)),
    "iaf": lambda: pf.Flow(pf.iaf(4, **SMALL)),
    "iaf, random orders": lambda: pf.Flow(pf.iaf(6, order="random", **SMALL)),
    "iaf, given order": lambda: pf.Flow(pf.iaf(4, order=[2, 0, 3, 1], **SMALL)),
    "iaf, context": lambda: pf.Flow(pf.iaf(4, context_dim=2, **SMALL)),
    "iaf.inv": lambda: pf.Flow(pf.iaf(4, order="random", **SMALL).inv),
    "permutations": lambda: pf.Flow([*pf.maf(6, **SMALL), pf.Permutation(6), *pf.iaf(6, **SMALL)]),
    "permutation, random": lambda: pf.Flow(pf.Permutation(9), pf.DiagonalNormal(9, learnable=True)),
    "coupling, random mask": lambda: pf.Flow(pf.Coupling(9, mask="random", hidden_dims=(8,))),
    "autoregressive, random order": lambda: pf.Flow(pf.Autoregressive(9, order="random", hidden_dims=(8,))),
    "ncsf, random masks": lambda: pf.Flow(pf.ncsf(8, mask="random", num_layers=4, hidden_dims=(8,))),
    "glow, random rotations": lambda: pf.Flow(pf.glow((1, 4, 4), num_scales=2, num_layers=2, **CONV).eval()),
    "glow of series, random rotations": lambda: pf.Flow(pf.glow((2, 4), num_scales=2, num_layers=2, **CONV).eval()),
    "learnable base": lambda: pf.Flow(pf.realnvp(4, **SMALL), pf.DiagonalNormal(4, learnable=True)),
}


def arguments(flow):
    """A batch of points, and of contexts where the flow takes one; the same in every process."""
    generator = seeded(5)
    value = torch.randn(7, *flow.event_shape, generator=generator)
    return (value, torch.randn(7, flow.context_dim, generator=generator)) if flow.context_dim else (value,)


def made(name, seed=0):
    torch.manual_seed(seed)
    flow = BUILDERS[name]()
    shake(flow, 0.3)
    return flow


def drawn(flow, arguments):
    torch.manual_seed(3)
    return flow.sample((2,), *arguments[1:])


CHILD = """
import pathlib, runpy, sys, torch
sys.path.append(str(pathlib.Path(sys.argv[1]).parent))
torch.manual_seed(991)
here = runpy.run_path(sys.argv[1])
stored = torch.load(sys.argv[2], weights_only=True)
found = {}
for name, state in stored.items():
    flow = here["BUILDERS"][name]()
    flow.load_state_dict(state)
    values = here["arguments"](flow)
    found[name] = (flow.log_prob(*values).detach(), here["drawn"](flow, values))
torch.save(found, sys.argv[3])
"""


@pytest.mark.full
def test_state_dict_reloads_in_another_process(tmp_path):
    flows = {name: made(name) for name in BUILDERS}
    torch.save({name: flow.state_dict() for name, flow in flows.items()}, tmp_path / "states.pt")
    output_of("-W", "error", "-c", CHILD, __file__, tmp_path / "states.pt", tmp_path / "found.pt")
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert set(found) == set(BUILDERS)
    for name, flow in flows.items():
        values = arguments(flow)
        log_prob, sample = found[name]
        torch.testing.assert_close(log_prob, flow.log_prob(*values).detach(), rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(sample, drawn(flow, values), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", [name for name in BUILDERS if "random" in name or name == "permutations"])
def test_what_is_drawn_would_differ(name):
    """Otherwise reloading it would show nothing: without its buffers the state gives another map."""
    flow, other = made(name), made(name, seed=17)
    parameters = {key: value for key, value in flow.state_dict().items() if key in dict(flow.named_parameters())}
    other.load_state_dict(parameters, strict=False)
    values = arguments(flow)
    moved = flow.chain.inverse_and_ladj(*values)
    assert (moved[0] - other.chain.inverse_and_ladj(*values)[0]).abs().max() > 1e-3
    other.load_state_dict(flow.state_dict())
    torch.testing.assert_close(other.chain.inverse_and_ladj(*values), moved, rtol=0, atol=0)
    torch.testing.assert_close(drawn(other, values), drawn(flow, values), rtol=0, atol=0)
    assert torch.equal(flow.log_prob(*values), other.log_prob(*values))


@pytest.mark.parametrize("name", BUILDERS)
def test_pickle_and_deepcopy_after_use(name):
    flow = made(name)
    values = arguments(flow)
    sample, _ = flow.rsample_and_log_prob((3,), *values[1:])
    flow(*values[1:]).log_prob(sample)
    expected = flow.log_prob(*values)
    buffer = io.BytesIO()
    torch.save(flow, buffer)
    fresh = len(pickle.dumps(made(name)))
    assert len(pickle.dumps(flow)) < fresh + 200, "a pickle carries the last batch"
    buffer.seek(0)
    copies = [copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), torch.load(buffer, weights_only=False)]
    for twin in copies:
        assert torch.equal(twin.log_prob(*values), expected)
        assert {id(p) for p in twin.parameters()}.isdisjoint({id(p) for p in flow.parameters()})
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(0.1)
        twin.log_prob(*values).sum().backward()
    assert torch.equal(flow.log_prob(*values), expected)
    assert all(parameter.grad is None for parameter in flow.parameters())


@pytest.mark.parametrize("name", ["nice, context", "realnvp, context", "maf, context", "iaf, context"])
@pytest.mark.parametrize("inverted", [False, True], ids=["view", "view.inv"])
def test_conditioned_views_are_copied(name, inverted):
    flow = made(name)
    y, context = arguments(flow)
    context = context.requires_grad_() * 1.0  # a context in the middle of a graph cannot be copied as it is
    view = flow.chain.condition(context)
    view = view.inv if inverted else view
    x = view.inv(y)
    view.log_abs_det_jacobian(x, y)
    for twin in (copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        torch.testing.assert_close(twin.inv(y), x)
        torch.testing.assert_close(twin.log_abs_det_jacobian(twin.inv(y), y), view.log_abs_det_jacobian(x, y))
    assert set(view.state_dict()) == {f"{'transform.' * (1 + inverted)}{key}" for key in flow.chain.state_dict()}, (
        "the context is no part of the state"
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["deepcopy", "pickle"])
def test_the_inverse_of_a_copied_inverse_is_the_one_it_came_from(copied):
    chain = made("realnvp").chain
    assert chain.inv.inv is chain
    inverse = copied(chain.inv)
    assert inverse.inv.inv is inverse
    both = copied([chain, chain.inv])
    assert both[1].inv is both[0]


@pytest.mark.parametrize(
    "saved, loaded, match",
    [
        (lambda: pf.maf(4, **SMALL), lambda: pf.maf(5, **SMALL), "size mismatch"),
        (lambda: pf.maf(4, **SMALL), lambda: pf.maf(4, num_layers=3, hidden_dims=(8,)), "Missing key"),
        (lambda: pf.maf(4, num_layers=3, hidden_dims=(8,)), lambda: pf.maf(4, **SMALL), "Unexpected key"),
        (lambda: pf.maf(4, **SMALL), lambda: pf.realnvp(4, **SMALL), "Missing key"),
        (lambda: pf.maf(4, **SMALL), lambda: pf.maf(4, order="random", **SMALL), r"Missing key.*order"),
        (lambda: pf.maf(4, order="random", **SMALL), lambda: pf.maf(4, **SMALL), r"Unexpected key.*order"),
        (lambda: pf.iaf(4, **SMALL), lambda: pf.iaf(4, context_dim=2, **SMALL), "Missing key"),
        (lambda: pf.realnvp(4, mask="random", **SMALL), lambda: pf.realnvp(4, **SMALL), r"Unexpected key.*order"),
    ],
)
def test_another_architecture_is_refused(saved, loaded, match):
    target = loaded()
    before = copy.deepcopy(target)
    refuses(RuntimeError, f"(?s){match}", target.load_state_dict, saved().state_dict())
    if not target.context_dim:
        y = torch.randn(3, *target.event_shape)
        assert target.inverse_and_ladj(y)[0].shape == before.inverse_and_ladj(y)[0].shape


@pytest.mark.parametrize("name", BUILDERS)
def test_parameters_survive_a_vector(name):
    flow = made(name)
    values = arguments(flow)
    expected = flow.log_prob(*values).detach()
    vector = torch.nn.utils.parameters_to_vector(flow.parameters()).detach()
    other = copy.deepcopy(flow)
    torch.nn.utils.vector_to_parameters(torch.zeros_like(vector), other.parameters())
    other.chain.clear_cache()
    assert not torch.equal(other.log_prob(*values), expected)
    torch.nn.utils.vector_to_parameters(vector.clone(), other.parameters())
    other.chain.clear_cache()
    assert torch.equal(other.log_prob(*values), expected)


@pytest.mark.parametrize("name", [name for name in BUILDERS if name.startswith(("maf", "iaf"))])
def test_masked_weights_never_matter(name):
    """Noise on everything, masked places included, then only in those: the map is the same."""
    flow = made(name)
    values = arguments(flow)
    expected = flow.log_prob(*values).detach()
    sample = drawn(flow, values)
    with torch.no_grad():
        for module in flow.modules():
            if isinstance(module, pf.nets.MaskedMLP):
                for weight, mask in zip(module.tensors()[0], module.tensors()[2], strict=True):
                    weight.masked_fill_(mask == 0, 1e3)
    assert torch.equal(flow.log_prob(*values), expected)
    assert torch.equal(drawn(flow, values), sample)


def test_state_dict_holds_no_more_than_it_needs():
    """Given orders, masks and permutations follow from the arguments; drawn ones are saved."""
    plain = pf.maf(4, **SMALL)
    assert set(plain.state_dict()) == set(dict(plain.named_parameters()))
    random = pf.maf(4, order="random", **SMALL)
    extra = set(random.state_dict()) - set(dict(random.named_parameters()))
    assert extra == {"parts.0.net.order", "parts.1.net.order"}


def test_this_file_is_what_the_child_runs():
    assert set(runpy.run_path(__file__)["BUILDERS"]) == set(BUILDERS)
