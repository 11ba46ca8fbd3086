"""The memo: what was just computed is reused while it holds, and nothing is ever stale."""

import copy
import gc
import weakref

import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import full_but, seeded, shake
from pyro.optim.clipped_adam import ClippedAdam
from torch.multiprocessing.reductions import StorageWeakRef

import pyro_flows as pf
from pyro_flows.nets import masked as nets
from pyro_flows.transforms import autoregressive

DIM = 3
BUILDERS = {
    "nice": lambda **options: pf.nice(DIM, num_layers=2, hidden_dims=(8,), **options),
    "realnvp": lambda **options: pf.realnvp(DIM, num_layers=2, hidden_dims=(8,), **options),
    "maf": lambda **options: pf.maf(DIM, num_layers=2, hidden_dims=(8,), **options),
    "iaf": lambda **options: pf.iaf(DIM, num_layers=2, hidden_dims=(8,), **options),
    "iaf.inv": lambda **options: pf.iaf(DIM, num_layers=2, hidden_dims=(8,), **options).inv,
}
OPTIMIZERS = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05),
    "Adam foreach": lambda parameters: torch.optim.Adam(parameters, lr=0.05, foreach=True),
    "Adam fused": lambda parameters: torch.optim.Adam(parameters, lr=0.05, fused=True),
    "SGD fused": lambda parameters: torch.optim.SGD(parameters, lr=0.01, fused=True),
    "ClippedAdam": lambda parameters: ClippedAdam(parameters, lr=0.05),  # writes to .data
}


def shaken(chain, seed=0):
    return shake(chain, 0.3, seed)


def points(*batch, seed=1):
    return torch.randn(*batch, DIM, generator=seeded(seed))


def torch_view(chain):
    base = dist.MultivariateNormal(torch.zeros(DIM), torch.eye(DIM))
    return dist.TransformedDistribution(base, [chain])


def flow_view(chain):
    return pf.Flow(chain)()


@pytest.fixture(params=full_but(BUILDERS, "realnvp", "iaf.inv"))
def chain(request):
    return shaken(BUILDERS[request.param]())


@pytest.fixture(params=[torch_view, flow_view], ids=["TransformedDistribution", "Flow"])
def view(request):
    return request.param


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_data_scored_before_and_after_a_step(chain, view, name):
    optimizer = OPTIMIZERS[name](chain.parameters())
    data = points(5)
    before = view(chain).log_prob(data)
    (-before.mean()).backward()
    optimizer.step()
    after = view(chain).log_prob(data)
    assert torch.equal(after, view(copy.deepcopy(chain)).log_prob(data.clone()))
    assert (after - before).abs().max() > 1e-3
    (-after.mean()).backward()  # not through the first graph again


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_own_sample_scored_before_and_after_a_step(chain, view, name):
    optimizer = OPTIMIZERS[name](chain.parameters())
    distribution = view(chain)
    sample = distribution.rsample((5,))
    before = distribution.log_prob(sample)
    before.mean().backward(retain_graph=True)
    optimizer.step()
    after = distribution.log_prob(sample)
    assert torch.equal(after, view(copy.deepcopy(chain)).log_prob(sample.clone()))
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_on_one_tensor_equals_training_on_clones(chain, view, name):
    twin = copy.deepcopy(chain)
    data = points(5)
    for flow, batch in ((chain, lambda: data), (twin, data.clone)):
        optimizer = OPTIMIZERS[name](flow.parameters())
        distribution = view(flow)
        for _ in range(20):
            optimizer.zero_grad()
            (-distribution.log_prob(batch()).mean()).backward()
            optimizer.step()
    for (key, ours), theirs in zip(chain.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("first", ["sample", "data"])
def test_no_grad_and_grad_do_not_mix(chain, view, first):
    distribution = view(chain)
    with torch.no_grad():
        value = distribution.sample((5,)) if first == "sample" else points(5)
        silent = distribution.log_prob(value)
    assert not silent.requires_grad
    scored = distribution.log_prob(value)
    scored.sum().backward()
    assert all(parameter.grad is not None for parameter in chain.parameters())
    with torch.no_grad():
        assert not distribution.log_prob(value).requires_grad
    torch.testing.assert_close(scored, silent, rtol=1e-4, atol=1e-5)


def test_backward_twice_on_the_same_data(chain, view):
    data = points(5)
    gradients = []
    for _ in range(2):
        chain.zero_grad()
        view(chain).log_prob(data).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in chain.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_gradient_after_own_sample_as_a_leaf(chain):
    with torch.no_grad():
        y = chain(points(5))
    y.requires_grad_()
    (gradient,) = torch.autograd.grad(chain.inv(y).sum(), y)
    clone = y.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(chain.inv(clone).sum(), clone)
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().max() > 0


def test_gradient_after_own_inverse_as_a_leaf(chain):
    with torch.no_grad():
        y = points(5)
        x = chain.inv(y)
    x.requires_grad_()
    ladj = chain.log_abs_det_jacobian(x, y)
    clone = x.detach().clone().requires_grad_()
    expected = chain.forward_and_ladj(clone)[1]
    torch.testing.assert_close(ladj, expected, rtol=1e-4, atol=1e-5)
    if isinstance(chain, pf.Inverse) or any(isinstance(part, pf.Rescaling) for part in chain):
        return  # here the log-determinant is a function of y, or (NICE) of neither
    (gradient,) = torch.autograd.grad(ladj.sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), clone)[0], rtol=1e-3, atol=1e-4)


def test_frozen_between_sample_and_score(chain, view):
    """Sticking the landing: the score's own gradient after parameters is gone, the sample's path stays."""
    parameters = list(chain.parameters())
    sample = view(chain).rsample((64,))
    chain.requires_grad_(False)
    path_only = view(chain).log_prob(sample)
    chain.requires_grad_(True)
    frozen = copy.deepcopy(chain).requires_grad_(False)
    expected = view(frozen).log_prob(sample)
    found, wanted, whole = (
        torch.autograd.grad(scored.sum(), parameters, retain_graph=True, materialize_grads=True, allow_unused=True)
        for scored in (path_only, expected, view(chain).log_prob(sample))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert max((a - b).abs().max() for a, b in zip(found, whole, strict=True)) > 1e-2


def test_frozen_after_a_detached_sample(chain, view):
    distribution = view(chain)
    sample = distribution.sample((5,))
    chain.requires_grad_(False)
    assert not distribution.log_prob(sample).requires_grad
    chain.requires_grad_(True)
    assert distribution.log_prob(sample).requires_grad


def test_one_frozen_parameter(chain):
    parameter = next(chain.parameters())
    data = points(5)
    x = chain.inv(data)
    parameter.requires_grad_(False)
    ladj = chain.log_abs_det_jacobian(x, data)
    if ladj.requires_grad:
        ladj.sum().backward()
    assert parameter.grad is None
    expected = copy.deepcopy(chain).log_abs_det_jacobian(x.detach().clone(), data)
    torch.testing.assert_close(ladj, expected, rtol=1e-4, atol=1e-5)


def change_in_place(chain):
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.add_(0.1)


def change_by_replacing(chain):
    for module in chain.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, torch.nn.Parameter(parameter.detach() + 0.1))


def change_by_state_dict(chain):
    chain.load_state_dict({name: value + 0.1 for name, value in chain.state_dict().items()})


def change_by_assigned_state_dict(chain):
    chain.load_state_dict({name: value + 0.1 for name, value in chain.state_dict().items()}, assign=True)


def change_by_data(chain):
    for parameter in chain.parameters():
        parameter.data.add_(0.1)
    chain.clear_cache()  # a write into .data leaves no trace


def change_by_replaced_data(chain):
    for parameter in chain.parameters():
        parameter.data = parameter.data + 0.1


def change_by_replaced_data_twice(chain):
    """The second storage may well be where the first one was."""
    for parameter in chain.parameters():
        shape, moved = parameter.shape, (parameter.detach() + 0.1).tolist()
        parameter.data = torch.zeros(shape)
        parameter.data = torch.tensor(moved).reshape(shape)


def change_by_vector(chain):
    vector = torch.nn.utils.parameters_to_vector(chain.parameters())
    torch.nn.utils.vector_to_parameters(vector + 0.1, chain.parameters())


def change_by_row_of_one_matrix(chain):
    """Two sets of weights in one storage, as an ensemble's or an evolution strategy's."""
    vector = torch.nn.utils.parameters_to_vector(chain.parameters())
    both = torch.stack([vector, vector + 0.1]).detach()
    torch.nn.utils.vector_to_parameters(both[0], chain.parameters())
    x = points(3)
    y = chain(x)
    torch.nn.utils.vector_to_parameters(both[1], chain.parameters())
    torch.testing.assert_close(chain.inv(y), copy.deepcopy(chain).inv(y.detach().clone()))


def change_by_strides(chain):
    """Square weights transposed: the same storage, read in another order."""
    for parameter in chain.parameters():
        if parameter.dim() > 1 and parameter.shape[-1] == parameter.shape[-2]:
            parameter.data = parameter.data.mT
        elif parameter.dim() == 1:
            parameter.data = parameter.data.flip(0) + 0.1


def change_by_set(chain):
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.set_(parameter + 0.1)


def change_by_converting_parts(chain):
    """A net of a layer has no memo of its own that its methods could clear."""
    for module in chain.modules():
        if not isinstance(module, pf.FlowTransform):
            module._apply(lambda tensor: tensor + 0.1 if tensor.is_floating_point() else tensor.clone())
    for parameter in chain.parameters():
        parameter.data = parameter.data.clone()


def change_by_average(chain):
    averaged = torch.optim.swa_utils.AveragedModel(chain)
    moved = copy.deepcopy(chain)
    change_in_place(moved)
    averaged.update_parameters(moved)
    for mine, theirs in zip(chain.parameters(), averaged.module.parameters(), strict=True):
        mine.detach().copy_(theirs)


def change_by_parametrizing(chain):
    class Moved(torch.nn.Module):
        def forward(self, weight):
            return weight + 0.1

    for module in list(chain.modules()):
        for name in list(module._parameters):
            torch.nn.utils.parametrize.register_parametrization(module, name, Moved())


def change_by_init(chain):
    for parameter in chain.parameters():
        torch.nn.init.constant_(parameter, 0.1)


def change_by_swapping_layers(chain):
    """The same parameters, each elsewhere: no tensor is written, none comes or goes."""
    flow = chain.transform if isinstance(chain, pf.Inverse) else chain
    first, second = (part for part in flow if not isinstance(part, pf.Rescaling))
    mine, theirs = (dict(part.net.named_modules()) for part in (first, second))
    for path, module in mine.items():
        for name in module._parameters:
            other = theirs[path]._parameters
            if module._parameters[name].shape == other[name].shape:
                module._parameters[name], other[name] = other[name], module._parameters[name]


CHANGES = [change for name, change in globals().items() if name.startswith("change_")]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.removeprefix("change_"))
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_parameters_changed_in_between(chain, change, grad):
    with torch.set_grad_enabled(grad):
        x, data = points(5), points(5, seed=2)
        y = chain(x)
        pulled = chain.inv(data)
        change(chain)
        scored = chain.inv(y)
        ladj = chain.log_abs_det_jacobian(pulled, data)
        fresh = copy.deepcopy(chain)
        torch.testing.assert_close(scored, fresh.inv(y.detach().clone()))
        torch.testing.assert_close(ladj, fresh.log_abs_det_jacobian(pulled.detach().clone(), data))
        assert (scored - x).abs().max() > 1e-3


def test_what_a_score_found_is_not_reused_after_it(chain):
    """Within one score nothing can change, so nothing is checked there; after it, everything may have changed."""
    seen = []

    class Watched(dist.MultivariateNormal):
        def log_prob(self, value):
            seen.append(value)
            return super().log_prob(value)

    data = points(5)
    distribution = dist.TransformedDistribution(Watched(torch.zeros(DIM), torch.eye(DIM)), [chain])
    distribution.log_prob(data)
    assert chain._memo._within is None
    change_in_place(chain)
    ladj = chain.log_abs_det_jacobian(seen[0], data)
    expected = copy.deepcopy(chain).log_abs_det_jacobian(seen[0].detach().clone(), data.clone())
    torch.testing.assert_close(ladj, expected)


def test_values_changed_in_place(chain):
    with torch.no_grad():
        x = points(5)
        y = chain(x)
        y.mul_(2)
        torch.testing.assert_close(chain.inv(y), copy.deepcopy(chain).inv(y.clone()))
        y = chain(x)
        kept = x.clone()
        x.add_(1)
        torch.testing.assert_close(chain.inv(y), kept, rtol=1e-4, atol=1e-4)
        if isinstance(chain, pf.Inverse):
            return  # its log-determinant is a function of the data
        data = points(5)
        pulled = chain.inv(data)
        pulled.add_(1)
        expected = copy.deepcopy(chain).forward_and_ladj(pulled.clone())[1]
        torch.testing.assert_close(chain.log_abs_det_jacobian(pulled, data), expected)


def test_values_replaced(chain):
    with torch.no_grad():
        x = points(5)
        y = chain(x)
        y.data = y.data + 1
        y.data = y.data + 1  # may be where the first values were
        torch.testing.assert_close(chain.inv(y), copy.deepcopy(chain).inv(y.clone()))
        y = chain(x)
        y.data = y.data[:3]
        torch.testing.assert_close(chain.inv(y), x[:3], rtol=1e-4, atol=1e-4)
        y, kept = chain(x), x.clone()
        x.data = x.data + 1
        torch.testing.assert_close(chain.inv(y), kept, rtol=1e-4, atol=1e-4)
        data = points(5, seed=2)
        pulled = chain.inv(data)
        pulled.data = pulled.data + 1
        data.data = chain(pulled).data
        expected = copy.deepcopy(chain).forward_and_ladj(pulled.clone())[1]
        torch.testing.assert_close(chain.log_abs_det_jacobian(pulled, data), expected, rtol=1e-4, atol=1e-4)


def test_nothing_of_a_batch_is_kept():
    chain = shaken(BUILDERS["realnvp"]())
    with torch.no_grad():
        x = chain.inv(points(5))
    storage = StorageWeakRef(x.untyped_storage())
    assert not storage.expired()
    del x
    gc.collect()
    assert storage.expired()


def test_tensors_swapped():
    flow = shaken(pf.Rescaling(DIM))
    with torch.no_grad():
        y = flow(points(5))
        for parameter in flow.parameters():
            torch.utils.swap_tensors(parameter, torch.nn.Parameter(parameter.detach() + 0.1))
        assert torch.equal(flow.inv(y), copy.deepcopy(flow).inv(y.clone()))


def test_buffer_replaced():
    flow = pf.Permutation(DIM, [2, 0, 1])
    with torch.no_grad():
        y = flow(points(5))
        flow.permutation = torch.tensor([1, 2, 0])
        assert torch.equal(flow.inv(y), copy.deepcopy(flow).inv(y.clone()))
        y = flow(points(5))
        flow.permutation.data = torch.tensor([0, 2, 1])
        assert torch.equal(flow.inv(y), copy.deepcopy(flow).inv(y.clone()))


def test_precision_changed_in_between(chain):
    with torch.no_grad():
        x = points(5)
        y = chain(x)
        chain.double()
        refuses(TypeError, "float64", chain.inv, y)
        torch.testing.assert_close(chain.inv(y.double()), x.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [True, False])
def test_train_and_eval_forget(chain, mode):
    with torch.no_grad():
        y = chain(points(5))
        chain.train(mode)
        assert chain._memo.preimage(chain, y) is None


def test_deepcopy_after_use_shares_nothing(chain, view):
    sample = view(chain).rsample((5,))
    view(chain).log_prob(sample)
    twin = copy.deepcopy(chain)
    change_in_place(twin)
    scored = view(twin).log_prob(sample)
    assert torch.equal(scored, view(copy.deepcopy(twin)).log_prob(sample.clone()))
    assert (scored - view(chain).log_prob(sample)).abs().max() > 1e-3


def test_functional_call(chain):
    with torch.no_grad():
        x = points(5)
        other = {name: value + 0.1 for name, value in chain.named_parameters()}
        y = chain(x)
        moved = torch.func.functional_call(chain, other, (x,))
        assert (moved - y).abs().max() > 1e-3
        torch.testing.assert_close(chain.inv(y), x, rtol=1e-4, atol=1e-4)
        fresh = copy.deepcopy(chain)
        torch.testing.assert_close(chain.inv(moved), fresh.inv(moved.clone()))


@pytest.mark.parametrize("reverse", [False, True], ids=["same order", "reverse order"])
@pytest.mark.parametrize("build", [pf.Rescaling, BUILDERS["realnvp"]], ids=["one parameter", "many"])
def test_functional_call_with_short_lived_parameters(build, reverse):
    """New tensors live where old ones have lived; what was computed with the old ones is still not reused."""
    chain = shaken(build(DIM) if build is pf.Rescaling else build())
    inverse = pf.Inverse(chain)
    held = [(name, value.detach()) for name, value in chain.named_parameters()]

    def forward(x):
        return torch.func.functional_call(chain, {name: value + 0.3 for name, value in held}, (x,))

    def backward(y):
        others = held[::-1] if reverse else held
        return torch.func.functional_call(inverse, {f"transform.{name}": value + 0.1 for name, value in others}, (y,))

    x = points(5)
    with torch.no_grad():
        # Whether addresses come back is the allocator's affair, so more than one try.
        assert all((backward(forward(x)) - x).abs().max() > 1e-3 for _ in range(100))


@pytest.fixture
def passes(monkeypatch):
    counts = {"pass": 0, "sweep": 0}

    def counted(name, call):
        def wrapper(*args, **kwargs):
            counts[name] += 1
            return call(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(nets, "masked_network", counted("pass", nets.masked_network))
    monkeypatch.setattr(autoregressive, "solve", counted("sweep", autoregressive.solve))
    return counts


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name, sampling, density", [("maf", "sweep", "pass"), ("iaf", "pass", "sweep")])
def test_what_a_call_costs(passes, view, name, sampling, density, grad):
    """Each layer is asked once: for a sample and its score, and for the score of data."""
    chain = shaken(BUILDERS[name]())
    distribution = view(chain)
    with torch.set_grad_enabled(grad):
        sample = distribution.rsample((5,))
        distribution.log_prob(sample)
        distribution.log_prob(sample)
        assert passes == {sampling: 2, density: 0}
        distribution.log_prob(points(5))
        assert passes == {sampling: 2, density: 2}


@pytest.mark.parametrize("name, sampling, density", [("maf", "pass", "sweep"), ("iaf", "sweep", "pass")])
def test_what_a_call_of_the_inverse_costs(passes, name, sampling, density):
    distribution = torch_view(shaken(BUILDERS[name]()).inv)
    sample = distribution.rsample((5,))
    distribution.log_prob(points(5))
    assert passes == {sampling: 2, density: 2}
    distribution.log_prob(sample)
    assert passes[sampling] + passes[density] <= 6


@pytest.mark.parametrize("name, sampling, density", [("maf", "sweep", "pass"), ("iaf", "pass", "sweep")])
def test_what_a_conditioned_call_costs(passes, name, sampling, density):
    flow = pf.Flow(shaken(BUILDERS[name](context_dim=2)))
    distribution = flow(torch.randn(5, 2))
    distribution.log_prob(distribution.rsample())
    assert passes == {sampling: 2, density: 0}
    distribution.log_prob(points(5))
    assert passes == {sampling: 2, density: 2}


def test_data_is_never_answered_from_memory(passes):
    chain = shaken(BUILDERS["maf"]())
    data = points(5)
    for k in range(3):
        chain.inv(data)
        assert passes["pass"] == 2 * (k + 1)


@pytest.mark.full
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_the_graph_dies_with_its_output(direction):
    """No gradient graph, no batch: the memo holds what it belongs to and nothing more."""
    chain = shaken(BUILDERS["realnvp"]())
    source = points(5).requires_grad_()
    value = source * 1.0
    result = chain(value) if direction == "forward" else chain.inv(value)
    graph = weakref.ref(value)
    del value, result
    gc.collect()
    # A call that stores nothing may be what clears the entry.
    chain._memo.preimage(chain, source)
    chain._memo.ladj(chain, source, source)
    gc.collect()
    assert graph() is None


def test_a_flow_is_freed_after_use():
    chain = shaken(BUILDERS["iaf"]())
    distribution = flow_view(chain)
    distribution.log_prob(distribution.rsample((5,)))
    parameter = weakref.ref(next(chain.parameters()))
    gc.collect()
    gc.disable()
    try:
        del distribution, chain
        assert parameter() is None  # by reference counts alone: no cycle holds it
    finally:
        gc.enable()


@pytest.mark.parametrize("direction", ["forward_and_ladj", "inverse_and_ladj"])
@pytest.mark.parametrize("name", full_but(BUILDERS, "realnvp", "iaf.inv"))
def test_a_graph_outlives_its_flow(name, direction):
    def made():
        x = points(5).requires_grad_()
        return x, sum(out.sum() for out in getattr(shaken(BUILDERS[name]()), direction)(x))

    x, total = made()
    gc.collect()
    total.backward()
    assert x.grad.isfinite().all()
