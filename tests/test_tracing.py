"""Flows under compilers, function transforms, tracers, other devices and precisions."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import full_but, guide_of, seeded, shake
from pyro.infer import JitTrace_ELBO, Trace_ELBO
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_flows as pf

DIM = 3
SMALL = {"num_layers": 2, "hidden_dims": (8,)}
BUILDERS = {
    "nice": partial(pf.nice, DIM, **SMALL),
    "realnvp": partial(pf.realnvp, DIM, **SMALL),
    "maf": partial(pf.maf, DIM, **SMALL),
    "iaf": partial(pf.iaf, DIM, **SMALL),
    "maf, random order": partial(pf.maf, DIM, order=[2, 0, 1], activation="tanh", **SMALL),
    "iaf, residual": partial(pf.iaf, DIM, residual=True, num_layers=1, hidden_dims=(8,)),
}
DIRECTIONS = ["forward_and_ladj", "inverse_and_ladj"]


def shaken(module, dtype=torch.double):
    return shake(module, 0.3, seed=0).to(dtype)


@pytest.fixture(params=BUILDERS)
def name(request):
    return request.param


@pytest.fixture(params=DIRECTIONS)
def direction(request):
    return request.param


def points(*batch, dtype=torch.double):
    return torch.randn(*batch, DIM, generator=seeded(1), dtype=dtype)


def gradients(outputs, module, *inputs):
    weights = [torch.linspace(1, 2, out.numel(), dtype=out.dtype).reshape(out.shape).to(out.device) for out in outputs]
    total = sum((weight * out).sum() for weight, out in zip(weights, outputs, strict=True))
    wanted = [*inputs, *module.parameters()]
    return torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)


# torch.compile


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield partial(torch.compile, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("name", full_but(["realnvp", "maf", "iaf"], "maf"))
def test_compiled_log_prob_is_never_stale(name, compiled):
    flow = pf.Flow(shaken(BUILDERS[name]()))
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05, fused=True)
    score = compiled(flow.log_prob)
    data = points(5)
    seen = []
    for _ in range(3):
        found = score(data)
        torch.testing.assert_close(found, copy.deepcopy(flow).log_prob(data.clone()))
        optimizer.zero_grad()
        (-found.mean()).backward()
        optimizer.step()
        seen.append(found.detach())
    assert (seen[0] - seen[1]).abs().max() > 1e-3 and (seen[1] - seen[2]).abs().max() > 1e-3


@pytest.mark.slow
def test_compile_with_inductor(name, direction):
    torch._dynamo.reset()
    chain = shaken(BUILDERS[name](), torch.float)
    value = points(5, dtype=torch.float)
    found = torch.compile(getattr(chain, direction), fullgraph=True)(value)
    torch.testing.assert_close(found, getattr(chain, direction)(value), rtol=1e-4, atol=1e-5)


# torch.func


def test_jacobians(name, direction):
    """The Jacobian forwards, backwards and by rows, and its determinant."""
    chain = shaken(BUILDERS[name]())
    method = getattr(chain, direction)
    x = points()
    reverse = jacrev(lambda v: method(v)[0])(x)
    torch.testing.assert_close(jacfwd(lambda v: method(v)[0])(x), reverse)
    y = x.clone().requires_grad_()
    rows = torch.stack([torch.autograd.grad(method(y)[0][k], y)[0] for k in range(DIM)])
    torch.testing.assert_close(reverse, rows)
    torch.testing.assert_close(torch.linalg.slogdet(reverse)[1], method(x)[1])


def test_derivatives_of_the_log_density(name):
    flow = pf.Flow(shaken(BUILDERS[name]()))
    x = points()
    gradient = grad(flow.log_prob)(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(flow.log_prob(leaf), leaf)[0])
    steps = 1e-5 * torch.eye(DIM, dtype=torch.double)
    numeric = torch.stack([(flow.log_prob(x + h) - flow.log_prob(x - h)) / 2e-5 for h in steps])
    torch.testing.assert_close(gradient, numeric.detach(), rtol=1e-6, atol=1e-6)
    curvature = hessian(flow.log_prob)(x)
    torch.testing.assert_close(curvature, jacrev(jacrev(flow.log_prob))(x))
    rows = torch.stack([(grad(flow.log_prob)(x + h) - grad(flow.log_prob)(x - h)) / 2e-5 for h in steps])
    torch.testing.assert_close(curvature, rows.detach(), rtol=1e-5, atol=1e-5)


def test_second_derivatives_of_both_directions(name, direction):
    chain = shaken(BUILDERS[name]())
    method = getattr(chain, direction)
    assert torch.autograd.gradgradcheck(lambda x: method(x), points(2).requires_grad_(), atol=1e-4)


def test_vmap_over_points(name, direction):
    method = getattr(shaken(BUILDERS[name]()), direction)
    x = points(4, 5)
    torch.testing.assert_close(vmap(method)(x), method(x))
    torch.testing.assert_close(vmap(vmap(method))(x), method(x))
    torch.testing.assert_close(vmap(method, in_dims=1, out_dims=1)(x), method(x))


@pytest.mark.parametrize("name", ["nice", "realnvp", "maf", "iaf"])
def test_vmap_over_contexts(name, direction):
    chain = shaken(BUILDERS[name](context_dim=2))
    context = torch.randn(4, 2, dtype=torch.double)
    method = getattr(chain, direction)
    for x, dims in ((points(4), (0, 0)), (points(), (None, 0))):
        torch.testing.assert_close(vmap(method, dims)(x, context), method(x, context))


def test_transforms_leave_nothing_behind(name):
    """Nothing that lives inside a transform may stay in a flow: it could not be copied or used afterwards."""
    chain = shaken(BUILDERS[name]())
    x = points(4)
    expected = chain.inverse_and_ladj(x)[0]
    vmap(lambda v: chain.inv(chain(v)))(x)
    jacrev(lambda v: chain.log_abs_det_jacobian(chain.inv(v), v))(points())
    torch.testing.assert_close(copy.deepcopy(chain).inv(x), expected)
    torch.testing.assert_close(chain.inv(x), expected)


# Tracers


def test_make_fx(name, direction):
    method = getattr(shaken(BUILDERS[name]()), direction)
    graph = make_fx(lambda v: method(v))(points(5))
    other = points(5).flip(0)
    torch.testing.assert_close(graph(other), method(other))


@pytest.mark.parametrize("name", ["nice", "realnvp", "maf", "iaf"])
def test_jit_elbo(name):
    """A hand-written guide: Pyro's AutoNormalizingFlow registers one parameter twice, which its Jit ELBOs refuse."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    flow = pf.Flow(shaken(BUILDERS[name](), torch.float))
    guide = guide_of(flow)
    found = {}
    with warnings.catch_warnings():
        # torch.jit is deprecated and warns of each shape that becomes a constant; Pyro's Jit ELBOs are made of it.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", ".*torch.jit.*", DeprecationWarning)
        for elbo in (JitTrace_ELBO(ignore_jit_warnings=True), Trace_ELBO()):
            pyro.clear_param_store()
            elbo.loss_and_grads(model, guide)  # the trace is taken here, which uses up other random numbers
            for seed in (1, 2):
                flow.zero_grad()
                pyro.set_rng_seed(seed)
                loss = elbo.loss_and_grads(model, guide)
                gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in flow.parameters()]
                found[type(elbo), seed] = (torch.tensor(loss), *gradients)
                with torch.no_grad():  # the trace reads the parameters anew at each call
                    for parameter in flow.parameters():
                        parameter.add_(0.1 if seed == 1 else -0.1)
    for seed in (1, 2):
        torch.testing.assert_close(found[JitTrace_ELBO, seed], found[Trace_ELBO, seed], rtol=1e-4, atol=1e-4)
    assert found[Trace_ELBO, 1][0] != found[Trace_ELBO, 2][0]
    pyro.clear_param_store()


# Devices and precisions


@pytest.mark.parametrize("batch", [(), (5,), (2, 5), (0,)])
def test_meta_device(name, direction, batch):
    """A tensor that was left on another device raises here."""
    for context_dim in (0, 2):
        chain = BUILDERS[name](context_dim=context_dim).to("meta")
        context = (torch.ones(*batch, context_dim, device="meta"),) if context_dim else ()
        value = torch.ones(*batch, DIM, device="meta")
        moved, ladj = getattr(chain, direction)(value, *context)
        assert (moved.device.type, ladj.device.type) == ("meta", "meta")
        assert (moved.shape, ladj.shape) == ((*batch, DIM), batch)
    flow = pf.Flow(BUILDERS[name]()).to("meta")
    with pyro.validation_enabled(False):  # which asks for values
        assert flow.log_prob(torch.ones(*batch, DIM, device="meta")).shape == batch
        sample = flow.sample(batch)
    assert (sample.shape, sample.device.type) == ((*batch, DIM), "meta")


@pytest.fixture
def elsewhere(request):
    device = request.config.getoption("--device", default=None)
    if device is None or torch.device(device).type == "cpu":
        pytest.skip("no --device other than the CPU")
    return torch.device(device)


def test_flow_built_on_a_device(name, elsewhere):
    with elsewhere:
        flow = pf.Flow(BUILDERS[name]())
    assert {tensor.device.type for tensor in (*flow.parameters(), *flow.buffers())} == {elsewhere.type}
    sample, score = flow.rsample_and_log_prob((5,))
    torch.testing.assert_close(flow.log_prob(sample.clone()), score)


@pytest.mark.cpu("compares two devices")
def test_both_directions_on_a_device(name, direction, elsewhere):
    chain = shaken(BUILDERS[name](context_dim=2))
    value, context = points(5), torch.ones(5, 2, dtype=torch.double)
    expected = getattr(chain, direction)(value, context)
    wanted = gradients(getattr(chain, direction)(value, context), chain)
    chain.to(elsewhere)
    found = getattr(chain, direction)(value.to(elsewhere), context.to(elsewhere))
    assert all(each.device.type == elsewhere.type for each in found)
    torch.testing.assert_close([each.cpu() for each in found], list(expected))
    torch.testing.assert_close([each.cpu() for each in gradients(found, chain)], list(wanted))


@pytest.mark.parametrize("built", [torch.float, torch.double])
@pytest.mark.parametrize("default", [torch.float, torch.double])
def test_dtype_follows_the_input(name, direction, built, default, default_dtype):
    chain = shaken(BUILDERS[name](), built)
    default_dtype(default)
    value = points(5, dtype=built).requires_grad_()
    outputs = getattr(chain, direction)(value)
    made = (*outputs, *gradients(outputs, chain, value), *pf.Flow(chain).rsample_and_log_prob((4,)))
    assert {each.dtype for each in made} == {built}


def test_autocast(name, direction):
    """In bfloat16 the two directions still undo each other, as well as that precision can tell, and train."""
    chain = shaken(BUILDERS[name](), torch.float)
    value = points(5, dtype=torch.float)
    exact = getattr(chain, direction)(value)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        rough = getattr(chain, direction)(value)
        loss = -pf.Flow(chain).log_prob(value).mean()
    loss.backward()
    for found, expected in zip(rough, exact, strict=True):
        assert found.shape == expected.shape and found.isfinite().all()
        torch.testing.assert_close(found.float(), expected, rtol=0.2, atol=0.2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in chain.parameters())


def test_inference_mode(name, direction):
    chain = shaken(BUILDERS[name]())
    value = points(5)
    expected = getattr(chain, direction)(value)
    flow = pf.Flow(chain)
    with torch.inference_mode():
        for found, wanted in zip(getattr(chain, direction)(points(5)), expected, strict=True):
            assert found.is_inference()
            torch.testing.assert_close(found, wanted.detach())
        sample = flow.sample((4,))
        score = flow().log_prob(sample)
    torch.testing.assert_close(flow.log_prob(sample.clone()), score.clone(), rtol=1e-8, atol=1e-8)
    flow.log_prob(value).sum().backward()


def test_flow_built_in_inference_mode(name):
    with torch.inference_mode():
        flow = pf.Flow(BUILDERS[name]())
        sample = flow().sample((4,))
        torch.testing.assert_close(flow().log_prob(sample), flow.log_prob(sample.clone()))


def test_both_directions_in_threads(name):
    """Buffers that the engine keeps between calls are not shared by calls that overlap."""
    chain = shaken(BUILDERS[name]())
    batches = [torch.randn(50, DIM, dtype=torch.double) for _ in range(16)]
    with torch.no_grad():
        expected = [chain.inv(chain.forward_and_ladj(batch)[0]) for batch in batches]

    def work(batch):
        with torch.no_grad():
            return chain.inverse_and_ladj(chain.forward_and_ladj(batch)[0])[0]

    with ThreadPoolExecutor(4) as pool:
        torch.testing.assert_close(list(pool.map(work, batches)), expected)
