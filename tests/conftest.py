"""Options and fixtures of the whole suite."""

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

    Of a test with several parameters, as many items are unmarked as the longest of them has values: each value of each
    occurs, and not every pair. Where a pair is what a test is about, it is a row of one ``parametrize``.
    """
    products = {}
    for item in items:
        if hasattr(item, "callspec") and not any(map(item.get_closest_marker, ("full", "slow"))):
            products.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for product in products.values():
        ids = [item.callspec._idlist for item in product]  # one for each parameter
        orders = [list(dict.fromkeys(column)) for column in zip(*ids, strict=True)]
        longest, strides, stride = max(map(len, orders)), [], 1
        for order in orders:  # the short ones change at different rates, as far as the longest has room
            fits = len(order) < longest and stride * len(order) <= longest
            strides.append(stride if fits else 1)
            stride *= len(order) if fits else 1
        chosen = [
            [order[k // stride % len(order)] for order, stride in zip(orders, strides, strict=True)]
            for k in range(longest)
        ]
        seen = set()
        # Values that these lack, as where one of their places is marked, come from the first item that has them.
        for item in sorted(product, key=lambda item: item.callspec._idlist not in chosen):
            values = set(enumerate(item.callspec._idlist))
            if values <= seen:
                item.add_marker("full")
            seen |= values
