"""``ActNorm``: what the first batch does, when it counts as one, and that nothing is stale afterwards."""

import copy
import io
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import guide_of, shake, train
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.parallel import DistributedDataParallel

import pyro_flows as pf

SHAPES = {(3,): (0,), (2, 5): (0, 2), (2, 3, 4): (0, 2, 3), (1,): (0,)}
DTYPES = [torch.float, torch.double]
METHODS = ["forward_and_ladj", "inverse_and_ladj"]


def batch(shape, count=40, dtype=torch.float):
    """Numbers with another mean and scale in each channel."""
    channels = (shape[0], *(1 for _ in shape[1:]))
    loc = torch.arange(shape[0], dtype=dtype).reshape(channels) * 10 - 7
    scale = 10.0 ** torch.linspace(-1, 2, shape[0], dtype=dtype).reshape(channels)
    return loc + scale * torch.randn(count, *shape, dtype=dtype)


def is_set(flow):
    return bool(flow.initialized)


def moved(flow):
    return bool((flow.loc != 0).any() or (flow.log_scale != 0).any())


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_first_batch_comes_out_normalised(method, shape, dtype, grad, default_dtype):
    default_dtype(torch.double if dtype == torch.float else torch.float)
    flow = shake(pf.ActNorm(shape).to(dtype))  # whatever was there before
    value = batch(shape, dtype=dtype)
    with torch.set_grad_enabled(grad):
        out, ladj = getattr(flow, method)(value)
    assert is_set(flow) and out.requires_grad is grad and flow.loc.requires_grad and flow.loc.grad_fn is None
    mean, variance = out.detach().mean(SHAPES[shape]), out.detach().var(SHAPES[shape], correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-4)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-4, atol=0)
    std = value.std(SHAPES[shape], correction=0)
    places = torch.Size(shape[1:]).numel()
    torch.testing.assert_close(ladj.detach(), -(std.log().sum() * places).expand(40), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        back = flow.forward_and_ladj(out)[0] if method == "inverse_and_ladj" else flow.inverse_and_ladj(out)[0]
    torch.testing.assert_close(back, value, rtol=1e-4, atol=1e-3)
    if method == "inverse_and_ladj":  # then the parameters are the data's own
        torch.testing.assert_close(flow.loc.detach().flatten(), value.mean(SHAPES[shape]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(flow.log_scale.detach().exp().flatten(), std, rtol=1e-4, atol=1e-6)


def test_any_batch_shape_counts_its_events():
    value = batch((3,), 24)
    flows = [pf.ActNorm(3) for _ in range(3)]
    flows[0].inverse_and_ladj(value)
    flows[1].inverse_and_ladj(value.reshape(2, 3, 4, 3))
    flows[2].inv.forward_and_ladj(value)
    for flow in flows[1:]:
        torch.testing.assert_close(flow.loc, flows[0].loc)
        torch.testing.assert_close(flow.log_scale, flows[0].log_scale)
        assert is_set(flow)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_first_batch_counts(method):
    flow = pf.ActNorm(3)
    getattr(flow, method)(batch((3,)))
    before = copy.deepcopy(flow.state_dict())
    for name in METHODS:
        getattr(flow, name)(batch((3,)) + 100)
    for key, value in flow.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("method", METHODS)
def test_not_in_evaluation_mode_and_not_with_one_event(method):
    flow = pf.ActNorm((2, 5))
    for value in (batch((2, 5), 1), batch((2, 5), 1)[0], batch((2, 5), 0), batch((2, 5), 1)[None]):
        out, ladj = getattr(flow, method)(value)
        assert torch.equal(out, value) and torch.equal(ladj, torch.zeros(value.shape[:-2]))
    flow.eval()
    value = batch((2, 5))
    assert torch.equal(getattr(flow, method)(value)[0], value)
    assert not is_set(flow) and not moved(flow)
    flow.train()
    getattr(flow, method)(value)
    assert is_set(flow) and moved(flow)


@pytest.mark.parametrize("method", METHODS)
def test_not_under_compilers_and_function_transforms(method):
    flow, value = pf.ActNorm(3), batch((3,))
    run = getattr(flow, method)
    calls = {
        "compile": torch.compile(run, fullgraph=True, backend="aot_eager"),
        "vmap": vmap(run),
        "vmap of batches": lambda v: [out.flatten(0, 1) for out in vmap(run)(v.reshape(4, 10, 3))],
        "jacrev": lambda v: (v, jacrev(lambda w: run(w)[1].sum())(v).sum(-1)),
    }
    torch._dynamo.reset()
    for name, call in calls.items():
        out, ladj = call(value)
        assert torch.equal(out, value) and torch.equal(ladj, torch.zeros(40)), name
        assert not is_set(flow) and not moved(flow), name
    run(value)
    assert is_set(flow)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")  # and then the parameters count
    torch.testing.assert_close(compiled(value), run(value))
    torch._dynamo.reset()


def test_functional_call_acts_on_the_state_it_is_given():
    """As with torch's batch normalisation: what is given is written, the module itself stays as it is."""
    flow, value = pf.ActNorm(3), batch((3,))
    given = {key: tensor.detach().clone() for key, tensor in flow.state_dict().items()}
    functional_call(flow, given, (value,))
    assert bool(given["initialized"]) and not is_set(flow) and not moved(flow)
    flow.inverse_and_ladj(value)
    assert is_set(flow)


@pytest.mark.parametrize("offset", [0.0, 0.1, -1e6])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_constant_dimensions_keep_the_scale_one(method, dtype, offset):
    value = torch.randn(1000, 3, dtype=dtype)
    value[:, 1] = offset
    value[::2, 1] *= 1 + torch.finfo(dtype).eps  # constant but for rounding
    flow = pf.ActNorm(3).to(dtype)
    out = getattr(flow, method)(value)[0].detach()
    assert flow.log_scale[1] == 0 and out.isfinite().all()
    assert out[:, 1].abs().max() <= 4 * torch.finfo(dtype).eps * max(abs(offset), 1)
    torch.testing.assert_close(out[:, [0, 2]].std(0, correction=0), torch.ones(2, dtype=dtype), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_a_first_batch_that_is_not_finite_is_refused(method, bad):
    flow, value = pf.ActNorm(3), batch((3,))
    value[5, 1] = bad
    refuses(ValueError, r"ActNorm: expected a finite first batch.*in 1 of 3.*\.eval\(\)", getattr(flow, method), value)
    assert not is_set(flow) and not moved(flow)
    getattr(flow.eval(), method)(value)


# State


def ready(shape=(3,)):
    flow = pf.ActNorm(shape)
    flow.inverse_and_ladj(batch(shape))
    return flow


def test_a_loaded_one_is_not_set_again():
    saved, value = ready(), batch((3,)) + 50
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    for assign in (False, True):
        for first in (False, True):  # whether the one that loads has read its flag before
            flow = pf.ActNorm(3)
            if first:
                flow(torch.randn(1, 3))
                assert not flow._is_set()
            file.seek(0)
            flow.load_state_dict(torch.load(file, weights_only=True), assign=assign)
            want = saved.inverse_and_ladj(value)
            torch.testing.assert_close(flow.inverse_and_ladj(value), want, rtol=0, atol=0)
    fresh = ready()
    fresh.load_state_dict(pf.ActNorm(3).state_dict())  # and one that loads an unset state is unset
    fresh.inverse_and_ladj(value)
    torch.testing.assert_close(fresh.loc.detach(), value.mean(0))


@pytest.mark.parametrize("make", [copy.deepcopy, lambda flow: pickle.loads(pickle.dumps(flow))], ids=["copy", "pickle"])
def test_copies_know_whether_they_are_set(make):
    value = batch((3,)) + 50
    for flow in (ready(), pf.ActNorm(3)):
        flow._is_set()
        twin = make(flow)
        assert flow._read is not None and twin._read is None
        twin.inverse_and_ladj(value)
        assert is_set(twin) and is_set(flow) is moved(flow)
        assert torch.equal(twin.loc, flow.loc) is is_set(flow)
    # Written after it was read, which the copy must not overlook.
    flow = pf.ActNorm(3)
    flow._is_set()
    flow.initialized.fill_(True)
    make(flow).inverse_and_ladj(value)
    twin = make(flow)
    twin.inverse_and_ladj(value)
    assert not moved(twin)


def test_flag_can_be_taken_back():
    flow, value = ready(), batch((3,)) + 50
    flow.initialized.fill_(False)
    flow.inverse_and_ladj(value)
    assert is_set(flow)
    torch.testing.assert_close(flow.loc.detach(), value.mean(0))
    flow = pf.ActNorm(3)
    assert not flow._is_set()
    flow.initialized = torch.tensor(True)  # another tensor, as young as the one before
    assert flow._is_set()


def test_conversions_keep_it_set():
    flow = ready().double()
    want = flow.loc.detach().clone()
    flow.inverse_and_ladj(batch((3,), dtype=torch.double) + 50)
    assert torch.equal(flow.loc.detach(), want)
    with torch.inference_mode():
        flow.inverse_and_ladj(batch((3,), dtype=torch.double) + 50)
    assert torch.equal(flow.loc.detach(), want)


def test_inference_mode():
    value = batch((3,))
    flow = pf.ActNorm(3)
    with torch.inference_mode():
        flow.inverse_and_ladj(value)
        built = pf.ActNorm(3)
        built.inverse_and_ladj(value)
        once = built.loc.clone()
        built.inverse_and_ladj(value + 50)
        assert is_set(built) and torch.equal(built.loc, once)
    assert is_set(flow)
    torch.testing.assert_close(flow.loc.detach(), value.mean(0))
    flow.inverse_and_ladj(value)[0].sum().backward()


def test_flag_is_read_once(monkeypatch):
    """Each reading waits for the device that holds it."""
    reads = []
    plain = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: reads.append(1) or plain(self))
    flow = ready()
    for _ in range(5):
        flow.inverse_and_ladj(batch((3,)))
    assert len(reads) < 5  # fewer than calls, even where torch reads each twice
    before = len(reads)
    for _ in range(5):
        flow.inverse_and_ladj(batch((3,)))
        flow.forward_and_ladj(batch((3,)))
    assert len(reads) == before


# The memo


def test_nothing_remembered_outlives_the_first_batch():
    flow = pf.Chain([pf.ActNorm(3), shake(pf.Coupling(3, hidden_dims=(8,)))])
    one = torch.randn(1, 3)
    y = flow(one)  # too few to start from, and remembered
    data = batch((3,))
    back = flow.inv(torch.randn(1, 3).requires_grad_())
    flow.inverse_and_ladj(data)
    fresh = copy.deepcopy(flow)
    assert (flow.inv(y) - one).abs().max() > 0.1
    torch.testing.assert_close(flow.inv(y), fresh.inv(y.detach().clone()))
    torch.testing.assert_close(flow.log_abs_det_jacobian(one, y), fresh.forward_and_ladj(one)[1])
    back.sum().backward()  # through a graph from before


@pytest.mark.parametrize("way", ["sample", "data"])
def test_first_call_is_remembered_as_it_is_afterwards(way):
    flow = pf.ActNorm(3)
    with torch.no_grad():
        if way == "sample":
            x = batch((3,))
            y = flow(x)
        else:
            y = batch((3,))
            x = flow.inv(y)
        fresh = copy.deepcopy(flow)
        torch.testing.assert_close(flow.inv(y), fresh.inv(y.clone()), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(flow.log_abs_det_jacobian(x, y), fresh.forward_and_ladj(x.clone())[1])
    assert is_set(flow)


# In use


def test_layers_of_a_chain_are_set_in_the_order_of_the_data():
    data = batch((3,), 200)
    layers = [pf.ActNorm(3), shake(pf.Coupling(3, hidden_dims=(8,))), pf.ActNorm(3)]
    flow = pf.Flow(layers)
    flow.log_prob(data)
    middle = layers[2].inverse_and_ladj(data)[0]
    torch.testing.assert_close(middle.mean(0), torch.zeros(3), rtol=0, atol=1e-4)
    base = flow.chain.inverse_and_ladj(data)[0].detach()
    torch.testing.assert_close(base.mean(0), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(base.std(0, correction=0), torch.ones(3), rtol=1e-3, atol=0)


def test_trains_with_the_rest():
    data = batch((2,), 500)
    flow = pf.Flow([*pf.maf(2, num_layers=1, hidden_dims=(8,)), pf.ActNorm(2)])
    losses = train(flow, data, 20, 0.01)
    truth = dist.Normal(data.mean(0), data.std(0)).to_event(1)
    assert losses[0] == pytest.approx(-float(truth.log_prob(data).mean()), abs=1e-3)  # the best of its kind at once
    assert losses[-1] <= losses[0] + 1e-3
    assert all(p.grad is not None for p in flow.parameters())


def test_in_a_guide():
    def model():
        pyro.sample("z", dist.Normal(torch.tensor([3.0, -2.0]), torch.tensor([0.5, 2.0])).to_event(1))

    flow = pf.Flow([*pf.iaf(2, num_layers=1, hidden_dims=(8,)), pf.ActNorm(2)])
    guide = guide_of(flow)
    elbo = Trace_ELBO(num_particles=32, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), elbo)
    svi.step()
    assert is_set(flow.chain[1])
    for _ in range(300):
        svi.step()
    draws = flow.sample((5000,))
    torch.testing.assert_close(draws.mean(0), torch.tensor([3.0, -2.0]), rtol=0, atol=0.3)
    torch.testing.assert_close(draws.std(0), torch.tensor([0.5, 2.0]), rtol=0.2, atol=0)


# Several processes


class Loss(nn.Module):
    """What ``DistributedDataParallel`` wraps."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, value):
        return -self.flow.log_prob(value).sum() / 100


def layered(shape):
    torch.manual_seed(0)
    flow = pf.Flow([pf.ActNorm(shape), shake(pf.Coupling(shape, hidden_dims=(8,))), pf.ActNorm(shape)])
    return flow.double()


def rows_of(rank, shape, sizes):
    """All rows, and those of one process."""
    torch.manual_seed(5)
    whole = batch(shape, sum(sizes), dtype=torch.double)
    return whole, whole.split(list(sizes))[rank]


def agree(rank, flow):
    """Whether both processes have the same parameters."""
    told = torch.nn.utils.parameters_to_vector(flow.parameters()).detach()
    both = [torch.empty_like(told) for _ in range(2)]
    torch.distributed.all_gather(both, told)
    return torch.equal(*both)


def share(rank):
    for shape, sizes in (((3,), (16, 5)), ((2, 4), (7, 1)), ((3,), (0, 6)), ((3,), (1, 1))):
        flow, alone = layered(shape), layered(shape)
        whole, own = rows_of(rank, shape, sizes)
        parallel = DistributedDataParallel(Loss(flow))
        parallel(own).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # alone it is
            alone.log_prob(whole)
        torch.testing.assert_close([*flow.parameters()], [*alone.parameters()], rtol=1e-9, atol=1e-9)
        optimizer = torch.optim.SGD(flow.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            parallel(own).backward()
            optimizer.step()
        assert agree(rank, flow) and is_set(flow.chain[0])
    flow = layered((3,))
    parallel = DistributedDataParallel(Loss(flow))
    parallel(rows_of(rank, (3,), (1, 0))[1])  # one row among all is none to start from
    assert not is_set(flow.chain[0])
    whole, own = rows_of(rank, (3,), (4, 4))
    with pytest.raises(ValueError, match="finite first batch"):  # in both, though one has the fault
        parallel(own / rank if rank == 0 else own)
    parallel.eval()(own)
    assert not is_set(flow.chain[0])
    if rank == 0:  # the other one is not there: nothing waits for it
        with pytest.warns(UserWarning, match="outside of DistributedDataParallel.*broadcast the state_dict"):
            layered((3,)).log_prob(whole)
    torch.distributed.barrier()


def work(rank, path):
    """What each of two processes does; its assertions reach the test."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        share(rank)  # what it wraps is gone before the group is
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.full
def test_processes_share_the_first_batch(tmp_path):
    """Batches of unequal sizes, or none, set what one process sets with all rows."""
    torch.multiprocessing.spawn(work, (tmp_path / "meeting",), nprocs=2)


def test_autocast():
    flow, value = pf.ActNorm(3), batch((3,))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out = flow.inverse_and_ladj(value.bfloat16())[0]
    assert flow.loc.dtype == torch.float and out.isfinite().all()
    torch.testing.assert_close(flow.loc.detach(), value.mean(0), rtol=0.02, atol=0.02)


def test_meta_device():
    flow = pf.ActNorm((2, 5)).to("meta")
    assert flow.inverse_and_ladj(torch.empty(4, 2, 5, device="meta"))[0].is_meta


def test_refuses_bad_shapes():
    refuses(ValueError, "positive integers", pf.ActNorm, (2, 0))
