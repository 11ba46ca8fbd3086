"""Every flow against the base contract, and the checker against transforms that break it."""

import inspect

import pytest
import torch
from asserts import refuses
from cases import (
    BUILDERS,
    CASES,
    CONTEXT_DIM,
    FIRST,
    IMAGE_BUILDERS,
    INTEGER_BUILDERS,
    INTEGERS,
    full_but,
    shake,
    train,
)
from torch import nn

import pyro_flows as pf
from pyro_flows.testing import CHECKS, check_transform, locate_nonfinite


def variants(repeats):
    """Each case without a context and with one, where it takes one; what ``repeats`` says is left to the full suite.

    It is asked of each case, and whether this is the other one of both. Continuous flows, whose solves are as fine as
    float64 allows, take seconds: one of them is not left.
    """
    for k, case in enumerate([*CASES, *INTEGERS]):
        for context_dim in (0, CONTEXT_DIM) if case.takes_context else (0,):
            other = case.takes_context and bool(context_dim) == k // 2 % 2
            long = case.rtol is not None and (other or case.name != "cnf")
            marks = pytest.mark.full if long or repeats(case, other) else ()
            yield pytest.param(case, context_dim, id=case.name + ("-context" if context_dim else ""), marks=marks)


# The first case of each flow both ways, the others in pairs with and without a context.
ONCE = [*FIRST, *INTEGER_BUILDERS]
VARIANTS = list(variants(lambda case, other: case not in ONCE and (other or case.whole)))
# The first case of each flow, in pairs with and without a context.
FIRST_VARIANTS = list(variants(lambda case, other: other or case not in ONCE))
OTHER = {torch.float32: torch.float64, torch.float64: torch.float32}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in OTHER]
# What another batch shape can change; the rest is seen with one.
BY_SHAPE = ("shapes", "structure", "batch", "round_trip", "inv", "context")


def make(case, context_dim, dtype, device):
    """The flow, built in the default dtype and converted, with shaken parameters."""
    return shake(case.build(context_dim).to(device=device, dtype=dtype), case.scale)


def hold(case, flow, x, context, checks):
    rtol = None if case.rtol is None else case.rtol * torch.finfo(x.dtype).eps
    check_transform(flow, x, context, rtol=rtol, checks=checks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case, context_dim", VARIANTS)
def test_contract(case, context_dim, dtype, device, default_dtype):
    default_dtype(OTHER[dtype])
    flow = make(case, context_dim, dtype, device)
    context = torch.randn(7, context_dim, dtype=dtype, device=device) if context_dim else None
    hold(case, flow, case.draw((7,), dtype, device), context, case.checks)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case, context_dim", FIRST_VARIANTS)
def test_contract_in_other_batch_shapes(case, context_dim, dtype, device, default_dtype):
    default_dtype(OTHER[dtype])
    flow = make(case, context_dim, dtype, device)
    # The context's batch is none, a part of the value's, and more than that.
    for batch, of_context in (((), ()), ((2, 3), (3,)), ((0,), (0,)), ((3,), (2, 1))):
        context = torch.randn(*of_context, context_dim, dtype=dtype, device=device) if context_dim else None
        hold(case, flow, case.draw(batch, dtype, device), context, BY_SHAPE)


EVERY_BUILDER = [*BUILDERS, *IMAGE_BUILDERS]
TRAINED = [case for case in EVERY_BUILDER if case.name in ("nsf", "multiscale_realnvp")]


@pytest.mark.full
@pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM])
@pytest.mark.parametrize("case", full_but(EVERY_BUILDER, *TRAINED), ids=lambda case: case.name)
def test_contract_after_training(case, context_dim, device):
    flow = pf.Flow(case.build(context_dim)).double().to(device)
    data = torch.randn(100, *case.event_shape, dtype=torch.float64, device=device).cumsum(-1) + 1
    data = 3 * torch.tanh(data) if case.angles else data
    context = data.flatten(1)[:, :1].expand(-1, context_dim).tanh() if context_dim else None
    losses = train(flow, data, 25, 0.01, context)
    assert losses[-1] < losses[0]
    x = case.draw((5,), torch.float64, device)
    hold(case, flow.chain, x, None if context is None else context[:5], case.checks)


@pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM])
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name.startswith(tuple(b.name for b in BUILDERS))],
    ids=lambda case: case.name,
)
def test_fresh_builders_are_exactly_the_identity(case, context_dim, device):
    flow = case.build(context_dim).to(device)
    x = case.draw((6,), torch.float32, device)
    context = torch.randn(6, context_dim, device=device) if context_dim else None
    zero = torch.zeros(6, device=device)
    for moved, ladj in (flow.forward_and_ladj(x, context), flow.inverse_and_ladj(x, context)):
        if "own-univariate" in case.name or "csf" in case.name or "nsf" in case.name:  # not without rounding
            torch.testing.assert_close(moved, x)
            torch.testing.assert_close(ladj, zero, rtol=0, atol=1e-5)
        else:
            assert torch.equal(moved, x)
            assert torch.equal(ladj, zero)


@pytest.mark.parametrize("case, context_dim", FIRST_VARIANTS)
def test_nothing_stays_behind_on_the_host(case, context_dim):
    flow = case.build(context_dim).to("meta")
    context = torch.empty(7, context_dim, device="meta") if context_dim else None
    y, ladj = flow.forward_and_ladj(torch.empty(7, *case.event_shape, device="meta"), context)
    x, _ = flow.inverse_and_ladj(y, context)
    assert y.device.type == x.device.type == ladj.device.type == "meta"
    assert (x.shape, y.shape, ladj.shape) == ((7, *flow.event_shape), (7, *flow.data_shape), (7,))


def test_every_public_flow_has_a_case():
    covered = {name for case in (*CASES, *INTEGERS) for name in case.covers}
    public = {name: getattr(place, name) for place in (pf, pf.transforms, pf.flows) for name in place.__all__}
    transforms = {n for n, v in public.items() if inspect.isclass(v) and issubclass(v, pf.FlowTransform)}
    builders = {n for n, v in public.items() if inspect.isfunction(v) and v.__annotations__.get("return") == "Chain"}
    assert {"nice", "Coupling"} <= transforms | builders  # that is, both are found
    assert transforms | builders <= covered | {"FlowTransform"}
    assert len({case.name for case in (*CASES, *INTEGERS)}) == len(CASES) + len(INTEGERS)
    # The values of sphere have length 1, so that tests of all builders do not apply.
    assert {case.name for case in (*BUILDERS, *IMAGE_BUILDERS, *INTEGER_BUILDERS)} | {"sphere"} == builders


# The checker itself.  Each of these breaks one rule; the first is what they are made of.


class Scale(pf.FlowTransform):
    def __init__(self, size=3):
        super().__init__(size)
        self.log_scale = nn.Parameter(torch.linspace(-0.5, 0.7, size))

    def forward_and_ladj(self, x, context=None):
        return x * self.log_scale.exp(), self.log_scale.sum().expand(x.shape[:-1])

    def inverse_and_ladj(self, y, context=None):
        return y * (-self.log_scale).exp(), -self.log_scale.sum().expand(y.shape[:-1])


def faulty(name, forward=None, inverse=None):
    """A scaling whose results are changed: functions of the transform, its argument, the value and the ladj."""

    def forward_and_ladj(self, x, context=None):
        return forward(self, x, *Scale._forward_and_ladj(self, x))

    def inverse_and_ladj(self, y, context=None):
        return inverse(self, y, *Scale._inverse_and_ladj(self, y))

    methods = {} if forward is None else {"forward_and_ladj": forward_and_ladj}
    return type(name, (Scale,), methods | ({} if inverse is None else {"inverse_and_ladj": inverse_and_ladj}))


def negated(self, x, y, ladj):
    return y, -ladj


def with_one_batch_dimension(self, x, y, ladj):
    return y, ladj if x.dim() < 3 else ladj.sum(0)


def in_the_default_dtype(self, x, y, ladj):
    return y, torch.zeros(ladj.shape).add_(ladj)


def by_branches(self, x, y, ladj):
    return (y, ladj) if x.numel() == 0 or float(x.detach().sum()) < 1e9 else (-y, ladj)


class Remembers(Scale):
    def log_abs_det_jacobian(self, x, y):
        if self.__dict__.get("known", (None,))[0] is not x:
            self.__dict__["known"] = x, super().log_abs_det_jacobian(x, y)
        return self.__dict__["known"][1]


class RemembersWithoutGrad(Scale):
    def log_abs_det_jacobian(self, x, y):
        if torch.is_grad_enabled():
            return super().log_abs_det_jacobian(x, y)
        if self.__dict__.get("known", (None,))[0] is not x:
            self.__dict__["known"] = x, super().log_abs_det_jacobian(x, y)
        return self.__dict__["known"][1]


class Derived(Scale):
    def __init__(self, size=3):
        super().__init__(size)
        self.register_buffer("scale", self.log_scale.detach().exp())

    def forward_and_ladj(self, x, context=None):
        return x * self.scale, self.scale.log().sum().expand(x.shape[:-1])


class NotContiguous(Scale):
    def __init__(self, size=3):
        super().__init__(size)
        self.matrix = nn.Parameter(torch.zeros(2, size).T)


class TwoNames(Scale):
    def __init__(self, size=3):
        super().__init__(size)
        self.again = self.log_scale


class ClampedGradient(Scale):
    def forward_and_ladj(self, x, context=None):
        scale = self.log_scale + (self.log_scale.sin() - self.log_scale).detach()
        return x * scale.exp(), scale.sum().expand(x.shape[:-1])

    def inverse_and_ladj(self, y, context=None):
        scale = self.log_scale + (self.log_scale.sin() - self.log_scale).detach()
        return y * (-scale).exp(), -scale.sum().expand(y.shape[:-1])


class KeepsTheBatch(Scale):
    def forward_and_ladj(self, x, context=None):
        self.last = x.detach()
        return Scale._forward_and_ladj(self, x)


class KeepsTheGraph(Scale):
    def forward_and_ladj(self, x, context=None):
        self.last = Scale._forward_and_ladj(self, x)
        return self.last


class LosesState(Scale):
    def state_dict(self, *args, **kwargs):
        return {}

    def load_state_dict(self, state, *args, **kwargs):
        return None


class OtherInverse(Scale):
    @property
    def inv(self):
        return Scale()


class WrongShape(Scale):
    def forward_shape(self, shape):
        return torch.Size((*shape, 1))


class WrongCodomain(Scale):
    codomain = torch.distributions.constraints.real


class Positive(Scale):
    codomain = torch.distributions.constraints.independent(torch.distributions.constraints.positive, 1)


class TakesAnything(Scale):
    pass


# Past the wrapper that every class body gets, which is what checks arguments.
TakesAnything.forward_and_ladj = lambda self, x, context=None: self._forward_and_ladj(
    x.to(self.log_scale.dtype)[..., :3]
)


FAULTS = [
    (faulty("WrongSign", negated, negated), "ladj", "the sign is wrong"),
    (
        faulty("MissingFactor", lambda self, x, y, ladj: (y, ladj - self.log_scale[0])),
        "ladj",
        "which dimensions or factors it leaves out",
    ),
    (faulty("InverseNotNegated", None, negated), "ladj", "the sign is wrong"),
    (faulty("WrongInverse", None, lambda self, y, x, ladj: (1.01 * x, ladj)), "round_trip", "does not undo"),
    (faulty("BatchDependent", lambda self, x, y, ladj: (y + x.mean() * 0.1, ladj)), "batch", "batch mates"),
    (
        faulty("ViewsTheBatch", lambda self, x, y, ladj: (y.reshape(-1, 3), ladj.reshape(-1))),
        "batch",
        "leading dimension of 1",
    ),
    (faulty("OneBatchDimension", with_one_batch_dimension), "batch", "leading dimension of 1"),
    (
        faulty("PerDimensionLadj", lambda self, x, y, ladj: (y, self.log_scale.expand(x.shape))),
        "shapes",
        "sum ladj over the whole event",
    ),
    (faulty("DividesByZero", lambda self, x, y, ladj: (y, ladj / 0)), "shapes", "all of ladj finite.*locate_nonfinite"),
    (faulty("DefaultDtype", in_the_default_dtype), "shapes", "new_zeros"),
    (faulty("Random", lambda self, x, y, ladj: (y + 1e-2 * torch.rand_like(y), ladj)), "batch", ""),
    (Remembers, "memo", "deepcopy"),
    (RemembersWithoutGrad, "memo", "a stale result was returned"),
    (Derived, "gradient", "do not belong to the same map"),
    (NotContiguous, "parameters", "parameter matrix to be contiguous"),
    (TwoNames, "parameters", "parameter again registered once"),
    (ClampedGradient, "gradient", "finite differences"),
    (faulty("Detached", lambda self, x, y, ladj: (y.detach(), ladj)), "batch|ladj", "detach"),
    (faulty("Branches", by_branches), "functions", ""),
    (KeepsTheBatch, "copies", "after a batch of 1000"),
    (KeepsTheGraph, "copies|memo", ""),
    (LosesState, "state", "after load_state_dict"),
    (OtherInverse, "inv", "inv"),
    (WrongShape, "structure", "forward_shape"),
    (WrongCodomain, "structure", "codomain.event_dim"),
    (Positive, "structure", "all of y in codomain"),
    (TakesAnything, "context|errors", "no error"),
]


def test_checker_accepts_what_the_faulty_ones_are_made_of():
    for dtype in OTHER:
        check_transform(Scale().to(dtype), torch.randn(7, 3, dtype=dtype))


@pytest.mark.parametrize("fault, check, message", FAULTS, ids=lambda v: v.__name__ if inspect.isclass(v) else "")
def test_checker_names_the_fault(fault, check, message):
    with pytest.raises(AssertionError, match=rf"^\[({check})\] {fault.__name__}: expected .*{message}"):
        check_transform(fault(), torch.randn(7, 3))


def test_every_check_is_failed_by_some_fault():
    assert set(CHECKS) == {name for _, names, _ in FAULTS for name in names.split("|")}


def test_checker_turns_what_a_check_raises_into_a_failure():
    class Raises(Scale):
        def forward_and_ladj(self, x, context=None):
            if x.numel() == 0:
                raise RuntimeError("nothing to do")
            return Scale._forward_and_ladj(self, x)

    with pytest.raises(AssertionError, match=r"\[batch\] Raises: expected no error, got RuntimeError: nothing to do"):
        check_transform(Raises(), torch.randn(7, 3))


def test_checker_leaves_the_transform_as_it_is(device):
    flow = shake(pf.maf(3, hidden_dims=(8,), context_dim=2).to(device), 0.2)
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    check_transform(flow, torch.randn(5, 3, device=device), torch.randn(5, 2, device=device))
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in flow.parameters())


def test_checker_tolerances_can_be_given():
    approximate = faulty("Approximate", None, lambda self, y, x, ladj: (x * 1.001, ladj))
    x = torch.randn(7, 3)
    check_transform(approximate(), x, rtol=1e-2, checks=["round_trip"])
    refuses(AssertionError, "round_trip", check_transform, approximate(), x, rtol=1e-5, atol=0.0, checks=["round_trip"])


def test_checker_refuses_unknown_checks():
    refuses(ValueError, r"\['rount_trip'\]", check_transform, Scale(), torch.randn(3), checks=["rount_trip"])


# Where NaN begins.


def nested(context_dim=0):
    inner = pf.Chain([pf.Permutation(3), pf.maf(3, num_layers=2, hidden_dims=(8,), context_dim=context_dim)])
    return shake(pf.Chain([pf.Coupling(3, hidden_dims=(8,)), inner, pf.Rescaling(3)]), 0.3)


def test_nan_is_located_where_a_part_comes_again():
    part = pf.Coupling(3, hidden_dims=(4,))
    with torch.no_grad():
        list(part.parameters())[-1].fill_(1e38)
    x = 1e10 * torch.randn(4, 3)
    assert locate_nonfinite(part, x) is None
    found = locate_nonfinite(pf.Chain([part, pf.Permutation(3), part]), x)
    assert found.startswith("parts.2 (Coupling): output y has ")


def test_locate_finds_nothing_in_a_sound_flow():
    assert locate_nonfinite(nested(), torch.randn(5, 3)) is None
    assert locate_nonfinite(nested(2), torch.randn(5, 3), torch.randn(5, 2)) is None


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_locate_names_part_and_parameter(value, context_dim):
    flow, x = nested(context_dim), torch.randn(5, 3)
    context = torch.randn(5, 2) if context_dim else None
    with torch.no_grad():
        flow[1][1][1].net.bias_1[0] = value
    assert locate_nonfinite(flow, x, context) == (
        "parts.1.parts.1.parts.1 (Autoregressive): parameter net.bias_1 has 1 non-finite of 6 entries"
    )
    # The other way the same part comes from the other side, so an earlier fault hides behind it.
    with torch.no_grad():
        flow[0].net.layers[0].bias[1] = value
    assert locate_nonfinite(flow, x, context).startswith("parts.0 (Coupling): parameter net.layers.0.bias has 1")
    back = locate_nonfinite(flow.inv, x, context)
    assert back.startswith("transform.parts.1.parts.1.parts.1 (Autoregressive): parameter net.bias_1")
    if context_dim:
        assert "transform.parts.0 (Coupling)" in locate_nonfinite(flow.condition(context), x)


def test_locate_names_outputs_and_inputs():
    flow, x = nested(), torch.randn(5, 3)
    with torch.no_grad():
        flow[2].log_scale.fill_(-200.0)
    assert locate_nonfinite(flow, x) == "parts.2 (Rescaling): output y has 15 non-finite of 15 entries"
    x[2, 1] = float("nan")
    assert locate_nonfinite(flow, x) == "input x has 1 non-finite of 15 entries"
    context = torch.tensor([0.0, float("inf")])
    assert locate_nonfinite(nested(2), torch.zeros(3), context) == "input context has 1 non-finite of 2 entries"


def test_locate_ignores_what_is_masked():
    flow = pf.maf(3, hidden_dims=(8,))
    with torch.no_grad():
        weight = flow[1].net.weight_0
        weight[flow[1].net.bits_0 == 0] = float("nan")
    assert not weight.isfinite().all()
    assert locate_nonfinite(flow, torch.randn(5, 3)) is None
