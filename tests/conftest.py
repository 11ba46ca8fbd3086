"""Options and fixtures of the whole suite."""

from __future__ import annotations

import signal

import pyro
import pytest
import torch

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as shells leave it for what they start in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the tests put flows and data, e.g. cuda or cpu")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def seed():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    pyro.enable_validation(True)  # torch.compile of a distribution switches it off for the whole process


@pytest.fixture
def default_dtype():
    """Sets torch's default dtype for one test."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.fixture
def double(default_dtype):
    default_dtype(torch.float64)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leaves to the full suite what a product of parameters only repeats.

    Of a test with several parameters, the diagonal of the product is unmarked: every value of each occurs, and not
    every pair. A test whose pairs are what it is about has the mark ``pairs``.
    """
    products = {}
    for item in items:
        if hasattr(item, "callspec") and not any(map(item.get_closest_marker, ("full", "slow", "pairs"))):
            products.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for product in products.values():
        ids = [item.callspec._idlist for item in product]  # one for each parameter
        orders = [list(dict.fromkeys(column)) for column in zip(*ids, strict=True)]
        diagonal = [[order[k % len(order)] for order in orders] for k in range(max(map(len, orders)))]
        seen = set()
        # Values that the diagonal lacks, as where one of its places is marked, come from the first item that has them.
        for item in sorted(product, key=lambda item: item.callspec._idlist not in diagonal):
            values = set(enumerate(item.callspec._idlist))
            if values <= seen:
                item.add_marker("full")
            seen |= values
