"""Linear transforms and standardisation against matrices written out, and under compilers and function transforms."""

import copy
import io
import math

import pyro.distributions as dist
import pytest
import torch
from asserts import refuses, scores_like
from cases import reload, seeded, shake, train
from oracles import jacobian
from torch.func import functional_call, hessian, jacfwd, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_flows as pf

DIM = 3
BUILDS = {
    "lu": lambda: pf.LULinear(DIM),
    "lu, random": lambda: pf.LULinear(DIM, permutation=[2, 0, 1], bias=False),
    "householder": lambda: pf.transforms.Householder(DIM),
    "householder, odd": lambda: pf.transforms.Householder(DIM, 5),
    "standardization": lambda: pf.Standardization(torch.tensor([1.0, -20.0, 0.3]), torch.tensor([0.1, 3.0, 10.0])),
}
DIRECTIONS = ["forward_and_ladj", "inverse_and_ladj"]


@pytest.fixture(params=BUILDS)
def name(request):
    return request.param


@pytest.fixture(params=DIRECTIONS)
def direction(request):
    return request.param


def made(name, dtype=torch.double):
    return shake(BUILDS[name]().to(dtype))


def points(*batch, dtype=torch.double):
    return torch.randn(*batch, DIM, generator=seeded(1), dtype=torch.double).to(dtype)


def matrix(flow):
    """The matrix of a linear map with an offset, by what it does to the unit vectors."""
    size = flow.event_shape.numel()
    eye = torch.eye(size, dtype=next(flow.parameters()).dtype).reshape(size, *flow.event_shape)
    with torch.no_grad():
        return (flow._call(eye) - flow._call(torch.zeros_like(eye))).flatten(1).T


def reflections(vectors):
    """The product of the reflections, one after the other."""
    product = torch.eye(vectors.shape[-1], dtype=vectors.dtype)
    for v in vectors:
        product = product @ (torch.eye(len(v), dtype=v.dtype) - 2 * torch.outer(v, v) / v.dot(v))
    return product


# LU


@pytest.mark.parametrize("permutation", ["identity", "reverse", "random", [3, 1, 0, 2]], ids=str)
def test_lu_is_the_product_of_its_factors(permutation):
    flow = shake(pf.LULinear(4, permutation=permutation).double(), 1.0)
    with torch.no_grad():
        lower = flow.factors.tril(-1) + torch.eye(4).double()
        upper = flow.factors.triu(1) + flow.factors.diagonal().exp().diag()
        want = lower @ upper
        if permutation != "identity":
            want = want[flow.permutation]
        x = torch.randn(6, 4).double()
        y, ladj = flow.forward_and_ladj(x)
        torch.testing.assert_close(y, x @ want.T + flow.bias)
        torch.testing.assert_close(ladj, torch.linalg.slogdet(want)[1].expand(6))
        torch.testing.assert_close(flow.inverse_and_ladj(y)[0], torch.linalg.solve(want, (y - flow.bias).T).T)
        torch.testing.assert_close(flow.log_diagonal, upper.diagonal().log())


def test_lu_permutes_like_a_permutation():
    x = torch.randn(5, 4)
    for permutation in ([2, 0, 3, 1], "reverse"):
        assert torch.equal(pf.LULinear(4, permutation=permutation)(x), pf.Permutation(4, permutation)(x))


@pytest.mark.parametrize("shape", [1, 4, (2, 3)], ids=str)
def test_lu_is_the_identity_at_first(shape):
    flow = pf.LULinear(shape)
    x = torch.randn(5, *flow.event_shape)
    for moved, ladj in (flow.forward_and_ladj(x), flow.inverse_and_ladj(x)):
        assert torch.equal(moved, x) and torch.equal(ladj, torch.zeros(5))
    y = flow.forward_and_ladj(x)[0]
    grads = torch.autograd.grad(y.square().sum(), list(flow.parameters()))
    assert all((grad != 0).all() for grad in grads)


def test_lu_uses_each_entry_once_whatever_it_holds():
    flow = shake(pf.LULinear(4).double(), 1.0)
    other = copy.deepcopy(flow)
    with torch.no_grad():
        other.factors.copy_(torch.randn(4, 4))
    torch.testing.assert_close(torch.linalg.slogdet(matrix(other))[1], other.log_diagonal.detach().sum())
    seen = jacobian(lambda factors: functional_call(flow, {"factors": factors}, (points_of(flow),)), flow.factors)
    assert (seen != 0).flatten(0, 1).any(0).all()


def points_of(flow):
    return torch.randn(5, *flow.event_shape, generator=seeded(3), dtype=torch.double)


def test_lu_images_are_flattened_row_by_row():
    image = shake(pf.LULinear((2, 3), permutation="reverse").double())
    flat = pf.LULinear(6, permutation="reverse").double()
    flat.load_state_dict(image.state_dict())
    x = torch.randn(4, 5, 2, 3).double()
    torch.testing.assert_close(image(x).flatten(2), flat(x.flatten(2)), rtol=1e-13, atol=1e-13)


def test_lu_drawn_permutation_comes_back_with_the_state():
    saved, loaded = (shake(pf.LULinear(9, permutation="random")) for _ in range(2))
    assert not torch.equal(saved.permutation, loaded.permutation)
    assert set(saved.state_dict()) == {"factors", "bias", "permutation"}
    assert set(pf.LULinear(9, permutation="reverse", bias=False).state_dict()) == {"factors"}
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    x = torch.randn(5, 9)
    for assign in (False, True):
        file.seek(0)
        twin = copy.deepcopy(loaded)
        twin.load_state_dict(torch.load(file, weights_only=True), assign=assign)
        for call in DIRECTIONS:
            torch.testing.assert_close(getattr(twin, call)(x), getattr(saved, call)(x), rtol=0, atol=0)


def test_lu_of_a_normal_is_a_multivariate_normal():
    flow = pf.Flow(shake(pf.LULinear(3, permutation=[1, 2, 0]).double(), 0.7))
    with torch.no_grad():
        scale, loc = matrix(flow.chain), flow.chain.bias
        scores_like(flow, dist.MultivariateNormal(loc, scale @ scale.T))


def test_lu_fits_a_covariance():
    data = torch.randn(2000, 3) @ torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.5, -1.0], [0.0, 0.0, 2.0]]) + 3
    flow = pf.Flow(pf.LULinear(3, permutation="reverse"))
    losses = train(flow, data, 400, 0.05)
    truth = dist.MultivariateNormal(data.mean(0), data.T.cov(correction=0))  # the best there is
    assert losses[-1] == pytest.approx(-float(truth.log_prob(data).mean()), rel=1e-3, abs=1e-3)


# Householder


@pytest.mark.parametrize("size, count", [(1, 1), (1, 2), (2, 1), (3, 2), (4, 4), (5, 3), (3, 8)])
def test_householder_is_the_product_of_its_reflections(size, count):
    flow = shake(pf.transforms.Householder(size, count).double(), 1.0)
    want = reflections(flow.vectors.detach())
    torch.testing.assert_close(matrix(flow), want, rtol=1e-12, atol=1e-12)
    x = torch.randn(5, size).double()
    torch.testing.assert_close(flow.inverse_and_ladj(x)[0], x @ want, rtol=1e-12, atol=1e-12)
    assert torch.equal(flow.forward_and_ladj(x)[1], torch.zeros(5).double())
    assert float(torch.linalg.det(want)) == pytest.approx((-1) ** count)


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
@pytest.mark.parametrize("size, count", [(8, 8), (64, 64), (16, 100)])
@pytest.mark.parametrize("vectors", ["random", "nearly equal", "of all sizes"])
def test_householder_is_orthogonal(vectors, size, count, dtype):
    flow = pf.transforms.Householder(size, count).to(dtype)
    noise = torch.randn(count, size, dtype=dtype)
    with torch.no_grad():
        if vectors == "random":
            flow.vectors.copy_(noise)
        elif vectors == "nearly equal":
            flow.vectors.copy_(noise[:1] + 1e-4 * noise)
        else:
            flow.vectors.copy_(noise * 10.0 ** torch.linspace(-15, 15, count, dtype=dtype)[:, None])
    turn = matrix(flow)
    rounding = 2 * count * torch.finfo(dtype).eps
    assert (turn @ turn.T - torch.eye(size, dtype=dtype)).abs().max() <= rounding
    x = torch.randn(20, size, dtype=dtype)
    torch.testing.assert_close(flow._call(x).norm(dim=-1), x.norm(dim=-1), rtol=rounding, atol=0)
    torch.testing.assert_close(flow._inverse(flow._call(x)), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tiny", [0.0, 1e-30, -1e-20, 1e-17, 1e-10])
@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_householder_takes_vectors_without_length(tiny, dtype):
    flow = pf.transforms.Householder(4, 3).to(dtype)
    with torch.no_grad():
        flow.vectors[1] = tiny
    turn = matrix(flow)
    torch.testing.assert_close(turn @ turn.T, torch.eye(4, dtype=dtype))
    for x in torch.randn(2, 5, 4, dtype=dtype):
        x.requires_grad_()
        grads = torch.autograd.grad(flow(x).pow(3).sum() + flow.inv(x).pow(3).sum(), [x, flow.vectors])
        assert all(grad.isfinite().all() for grad in grads)
        assert (grads[1][[0, 2]] != 0).any() and bool((grads[1][1] == 0).all()) == (abs(tiny) < 1e-18)


def test_householder_starts_at_the_identity_and_leaves_it():
    for size in (2, 5, 64):
        flow = pf.transforms.Householder(size)
        assert len(flow.vectors) == size - size % 2
        x = torch.randn(6, size)
        torch.testing.assert_close(flow.forward_and_ladj(x)[0], x)
        torch.testing.assert_close(flow.inverse_and_ladj(x)[0], x)
        (grad,) = torch.autograd.grad(flow(x).pow(3).sum(), flow.vectors)
        assert (grad.abs() > 1e-6).any(-1).all()
        first, second = grad[::2], grad[1::2]
        torch.testing.assert_close(first, -second, rtol=1e-2, atol=1e-3 * float(grad.abs().max()))
        with torch.no_grad():
            flow.vectors -= 0.1 * grad / grad.norm(dim=-1, keepdim=True)
        assert (flow(x) - x).abs().max() > 0.05


@pytest.mark.parametrize("size", [2, 3, 4])
def test_householder_learns_a_rotation(size):
    """A density turned by a rotation that no pair of reflections is made for."""
    torch.manual_seed(2)
    target = reflections(torch.randn(size - size % 2, size))
    scales = torch.linspace(-2, 1, size)
    diagonal = pf.Rescaling(size).requires_grad_(False)
    with torch.no_grad():
        diagonal.log_scale.copy_(-scales)
    data = (torch.randn(2000, size) * scales.exp()) @ target.T
    flow = pf.Flow([diagonal, pf.transforms.Householder(size)])
    losses = train(flow, data, 400, 0.02)
    truth = dist.MultivariateNormal(torch.zeros(size), target @ scales.mul(2).exp().diag() @ target.T)
    assert losses[-1] == pytest.approx(-float(truth.log_prob(data).mean()), rel=0, abs=0.02)


# Standardization


def test_standardization_puts_a_flow_in_the_units_of_the_data():
    data = torch.tensor([100.0, -3.0]) + torch.tensor([20.0, 0.01]) * torch.randn(500, 2)
    inner = shake(pf.maf(2, hidden_dims=(8,)), 0.3)
    flow = pf.Flow([*inner, pf.Standardization(data.mean(0), data.std(0))])
    standard = (data - data.mean(0)) / data.std(0)
    want = pf.Flow(inner).log_prob(standard) - data.std(0).log().sum()
    torch.testing.assert_close(flow.log_prob(data), want, rtol=1e-5, atol=1e-4)
    assert not any("parts.5" in key for key, _ in flow.named_parameters())


def test_standardization_is_state():
    saved = pf.Flow(pf.Standardization(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])))
    assert saved.event_shape == (2, 2)
    loaded = pf.Flow(pf.Standardization(torch.zeros(2, 2), torch.ones(2, 2)))
    reload(saved, loaded)
    y = torch.randn(5, 2, 2)
    assert torch.equal(loaded.log_prob(y), saved.log_prob(y))
    torch.testing.assert_close(saved.chain(torch.ones(2, 2)), torch.tensor([[4.0, 5.0], [5.0, 6.0]]))
    assert pf.Standardization([0.0, 1.0], [1.0, 2.0]).to("meta").loc.is_meta
    assert pf.Standardization(torch.empty(3, device="meta"), torch.empty(3, device="meta")).event_shape == (3,)


def test_standardization_keeps_copies_and_their_dtype():
    loc, scale = torch.zeros(2, dtype=torch.double), torch.ones(2, dtype=torch.double, requires_grad=True)
    flow = pf.Standardization(loc, scale)
    loc += 1
    assert torch.equal(flow(torch.zeros(2, dtype=torch.double)), torch.zeros(2, dtype=torch.double))
    assert flow.scale.dtype == torch.double and not list(flow.parameters()) and not flow.scale.requires_grad


BAD = [
    (lambda: pf.LULinear(3, permutation=[0, 1]), ValueError, r"permutation of 0..2, got \[0, 1\]"),
    (lambda: pf.LULinear(3, permutation=[0.0, 1.0, 2.0]), ValueError, "permutation of 0..2"),
    (lambda: pf.LULinear(3, permutation="sorted"), ValueError, "'identity', 'reverse', 'random'.*'sorted'"),
    (lambda: pf.LULinear(0), ValueError, "positive integers"),
    *[
        (lambda n=n: pf.transforms.Householder(3, n), ValueError, f"num_reflections to be an integer >= 1, got {n}")
        for n in (0, -2, 1.0, True)
    ],
    (lambda: pf.Standardization(torch.zeros(2), torch.tensor([1.0, 0.0])), ValueError, r"got 0.0 at \(1,\).*constant"),
    (lambda: pf.Standardization(torch.zeros(2), torch.tensor([1.0, -2.0])), ValueError, r"positive.*got -2.0"),
    (lambda: pf.Standardization(torch.zeros(2), torch.tensor([math.inf, 1.0])), ValueError, "finite.*got inf"),
    (lambda: pf.Standardization(torch.tensor([math.nan, 1.0]), torch.ones(2)), ValueError, "loc to be finite"),
    (lambda: pf.Standardization(torch.zeros(2), torch.ones(3)), ValueError, r"shapes \(2,\) and \(3,\)"),
    (lambda: pf.Standardization(torch.tensor(0.0), torch.tensor(1.0)), ValueError, "positive integers"),
    (lambda: pf.Standardization(torch.tensor([0, 1]), torch.ones(2)), TypeError, "floating-point.*int64"),
]


@pytest.mark.parametrize("make, kind, message", BAD, ids=[f"{k}-{m[:20]}" for k, (_, _, m) in enumerate(BAD)])
def test_refuses(make, kind, message):
    refuses(kind, message, make)


# Compilers, function transforms, precisions


@pytest.mark.full
def test_compile(name, direction):
    torch._dynamo.reset()
    flow = made(name)
    run = torch.compile(getattr(flow, direction), fullgraph=True, backend="aot_eager")
    values = [points(5).requires_grad_() for _ in range(2)]
    results = [call(value) for call, value in zip((run, getattr(flow, direction)), values, strict=True)]
    grads = [
        torch.autograd.grad(out.pow(3).sum() + ladj.sum(), [value, *flow.parameters()])
        for (out, ladj), value in zip(results, values, strict=True)
    ]
    torch.testing.assert_close((*results[0], *grads[0]), (*results[1], *grads[1]))
    torch._dynamo.reset()


def test_function_transforms(name, direction):
    flow = made(name)
    method, x = getattr(flow, direction), points()
    reverse = jacrev(lambda v: method(v)[0])(x)
    torch.testing.assert_close(jacfwd(lambda v: method(v)[0])(x), reverse)
    torch.testing.assert_close(jacobian(lambda v: method(v)[0], x), reverse)
    torch.testing.assert_close(torch.linalg.slogdet(reverse)[1], method(x)[1])
    for dims in (0, 1):
        batch = points(4, 4)
        got, want = vmap(method, in_dims=dims, out_dims=dims)(batch), method(batch)
        torch.testing.assert_close(got, want)
    graph = make_fx(lambda v: method(v))(points(5))
    torch.testing.assert_close(graph(points(5).flip(0)), method(points(5).flip(0)))


@pytest.mark.parametrize("name", [name for name in BUILDS if name != "standardization"])
def test_derivatives_for_the_parameters(name, direction):
    """First and second ones by finite differences, and by rows against a batch of models."""
    flow = made(name)
    keys = [key for key, _ in flow.named_parameters()]

    class Called(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self, value):
            return getattr(self.flow, direction)(value)

    called, x = Called(), points(2)

    def run(*parameters):
        return functional_call(called, dict(zip((f"flow.{k}" for k in keys), parameters, strict=True)), (x,))

    parameters = [p.detach().clone().requires_grad_() for p in flow.parameters()]
    assert torch.autograd.gradcheck(run, parameters)
    assert torch.autograd.gradgradcheck(run, parameters, atol=1e-4)
    assert torch.autograd.gradcheck(run, parameters, check_forward_ad=True, check_backward_ad=False)
    stacked = [torch.stack((p, 0.5 * p)).detach() for p in parameters]
    for k, got in enumerate(zip(*vmap(run)(*stacked), strict=True)):
        torch.testing.assert_close(got, run(*(p[k] for p in stacked)))


def test_log_density_has_its_curvature(name):
    flow = pf.Flow(made(name))
    inverse = torch.linalg.inv(jacobian(lambda v: flow.chain.forward_and_ladj(v)[0], points()))
    torch.testing.assert_close(hessian(flow.log_prob)(points()), -inverse.T @ inverse)


def test_autocast(name, direction):
    flow = made(name, torch.float)
    value = points(5, dtype=torch.float)
    exact = getattr(flow, direction)(value)
    for kind in (torch.float, torch.bfloat16):
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            rough = getattr(flow, direction)(value.to(kind))
        for found, expected in zip(rough, exact, strict=True):
            assert found.shape == expected.shape
            torch.testing.assert_close(
                found.float(), expected, rtol=0.1, atol=0.1 * float(exact[0].detach().abs().max())
            )


def test_inference_mode(name, direction):
    flow = made(name)
    expected = getattr(flow, direction)(points(5))
    with torch.inference_mode():
        for found, wanted in zip(getattr(flow, direction)(points(5)), expected, strict=True):
            torch.testing.assert_close(found, wanted.detach())


def test_costs_are_said():
    assert "sampling: 1 product, density: 1 solve" in repr(pf.LULinear(3))
    assert "sampling: 1 product, density: 1 product, num_reflections=2" in repr(pf.transforms.Householder(3))
    chain = pf.Chain([*pf.maf(3, num_layers=2, hidden_dims=(8,)), pf.LULinear(3)])
    assert (chain.sampling_cost, chain.density_cost) == ("2 sweeps of 3 steps + 1 product", "2 passes + 1 solve")
