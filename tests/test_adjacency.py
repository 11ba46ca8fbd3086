"""Dependence of columns, found by sparse regression."""

import math

import numpy as np
import pytest
import torch
from asserts import refuses

import pyro_flows as pf
from pyro_flows.infer.density.adjacency import _lasso
from pyro_flows.nets.degrees import _levels

find = pf.infer.sparse_adjacency


def chain(rows: int, size: int, seed: int = 0, correlation: float = 0.8) -> torch.Tensor:
    """Each column depends on the one before it."""
    noise = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    columns = [noise[:, 0]]
    for k in range(1, size):
        columns.append(correlation * columns[-1] + math.sqrt(1 - correlation**2) * noise[:, k])
    return torch.stack(columns, 1)


def depth(adjacency: torch.Tensor) -> int:
    return int(_levels(adjacency).max()) + 1


def test_independent_columns_have_no_edges_at_the_level():
    torch.manual_seed(0)
    found = sum(find(torch.randn(300, 8), level=0.2).any().item() for _ in range(200))
    assert 20 <= found <= 60  # 40 expected; 3.5 standard deviations


def test_chain_and_its_depth():
    rows = chain(1500, 40)
    first = torch.diag(torch.ones(39), -1).bool()
    natural = find(rows)
    assert (natural & first).sum() == 39 and (natural & ~first).sum() <= 10 and depth(natural) == 40
    shallow = find(rows, order="shallow")
    assert depth(shallow) <= 9
    # Neighbors depend on each other in any order, one way or the other.
    assert ((shallow | shallow.T) & first).sum() == 39


def test_a_known_graph_in_a_given_order():
    torch.manual_seed(1)
    a, b, e = torch.randn(3, 2000)
    rows = torch.stack([a + b + 0.5 * e, torch.randn(2000), a, b], 1)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[0, 2] = expected[0, 3] = True
    assert torch.equal(find(rows, order=[2, 3, 1, 0]), expected)
    assert torch.equal(find(rows, order=torch.tensor([2, 3, 1, 0])), expected)
    assert not find(rows, order="reverse").tril().any() and not find(rows).triu().any()


def test_what_is_missed_is_what_has_no_correlation():
    x = torch.linspace(-2, 2, 1000).unsqueeze(1)
    assert not find(torch.cat([x, x.square()], 1)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_and_forms_do_not_count(dtype):
    rows = chain(500, 6)
    scale = torch.tensor([1e-30, 1.0, 1e30, -5.0, 1e8, 3.0], dtype=torch.float64)
    expected = find(rows)
    assert expected.any()
    moved = (rows * scale).to(dtype)
    assert torch.equal(find(moved), expected)
    assert torch.equal(find(moved.numpy()), expected)
    assert torch.equal(find((rows * 1e5 + 1e6).round().long()), expected)


def test_more_columns_than_rows_and_copies_of_columns():
    assert find(torch.randn(20, 100, generator=torch.Generator().manual_seed(0))).sum() < 20
    one = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    twins = torch.cat([one, one, -one], 1)
    assert find(twins)[1, 0] and find(twins)[2].any()
    assert find(one).shape == (1, 1) and not find(one).any()


def test_regressions_meet_the_conditions_of_their_minimum():
    rows = chain(400, 12, 3)
    rows = (rows - rows.mean(0)) / rows.std(0, correction=0)
    correlation, allowed = rows.T @ rows / 400, torch.ones(12, 12).tril(-1).bool()
    penalty = torch.linspace(0.05, 0.4, 12, dtype=torch.float64).unsqueeze(1)
    slopes = _lasso(
        correlation, allowed, torch.zeros_like(correlation), penalty, 1 / torch.linalg.eigvalsh(correlation)[-1]
    )
    slack = correlation - slopes @ correlation
    on = slopes != 0
    torch.testing.assert_close(slack[on], (penalty * slopes.sign())[on], atol=2e-3, rtol=0)
    assert (slack.abs() <= penalty + 2e-3)[allowed].all() and not on[~allowed].any() and on.any()


def test_the_flow_of_an_adjacency():
    torch.manual_seed(0)
    adjacency = find(chain(2000, 16), order="shallow")
    flow = pf.maf(16, num_layers=1, adjacency=adjacency, hidden_dims=(64,)).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.normal_()
    x = torch.randn(16, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow.inverse_and_ladj(x)[0], x)
    assert not (jacobian.fill_diagonal_(0) != 0)[~adjacency].any()
    assert flow.sampling_cost == f"1 sweep of {depth(adjacency)} steps"


def test_refusals():
    rows = chain(50, 3)
    refuses(ValueError, "expected data of shape", find, torch.randn(5))
    refuses(ValueError, "expected data of shape", find, torch.randn(2, 3))
    refuses(ValueError, r"columns \[1\] are constant", find, torch.stack([rows[:, 0], torch.ones(50), rows[:, 2]], 1))
    broken = rows.clone()
    broken[7, 1] = math.nan
    refuses(ValueError, "row 7", find, broken)
    refuses(ValueError, "level between 0 and 1", find, rows, level=1.0)
    refuses(ValueError, "permutation", find, rows, order=[0, 0, 1])
    refuses(ValueError, "shallow", find, rows, order="depth")
    refuses(TypeError, "real numbers", find, np.array([["a", "b"]] * 5))
