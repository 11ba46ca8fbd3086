"""Every flow against the base contract, and the checker against transforms that break it."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import BUILDERS, CASES, CONTEXT_DIM, shake

import pyro_flows as pf
from pyro_flows.testing import CHECKS, check_transform, locate_nonfinite

VARIANTS = [
    pytest.param(case, context_dim, id=case.name + ("-context" if context_dim else ""))
    for case in CASES
    for context_dim in ((0, CONTEXT_DIM) if case.takes_context else (0,))
]
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case, context_dim", VARIANTS)
def test_contract_in_other_batch_shapes(case, context_dim, dtype, device, default_dtype):
    default_dtype(OTHER[dtype])
    flow = make(case, context_dim, dtype, device)
    # The context's batch is none, a part, and more than the value's.
    for batch, of_context in (((), ()), ((2, 3), (3,)), ((0,), (0,)), ((3,), (2, 1))):
        context = torch.randn(*of_context, context_dim, dtype=dtype, device=device) if context_dim else None
        hold(case, flow, case.draw(batch, dtype, device), context, BY_SHAPE)
