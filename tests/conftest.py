"""Options and fixtures of the whole suite."""

import os
import signal
from contextlib import nullcontext
from importlib.util import find_spec

import pyro
import pytest
import torch

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as shells leave it for what they start in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the tests make their tensors, e.g. cuda or cpu")
    parser.addoption("--refresh-outputs", action="store_true", help="write what a page prints and draws into docs/")


def pytest_configure(config):
    """Makes another device than the CPU torch's default, for the modules' own tensors, too."""
    name = config.getoption("--device")
    if name == "cpu":
        return
    try:
        torch.set_default_device(name)
        torch.empty(1)
    except (AssertionError, RuntimeError) as error:
        raise pytest.UsageError(f"--device {name}: this torch finds no such device ({error})") from None


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Compiled steps of tests stay out of the user's folder."""
    os.environ["PYRO_FLOWS_CACHE"] = str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


# What stays on the CPU under --device, and why; single tests are marked ``cpu``.
ON_CPU = {
    "test_architecture": "imports and sources",
    "test_columns": "numbers as they are given: data frames and arrays",
    "test_compression": "a Codec works on a copy of its model on the CPU",
    "test_devices": "names its devices",
    "test_docs": "pages and their own processes",
    "test_doctests": "printed values",
    "test_examples": "processes of their own",
    "test_files": "bytes of files",
    "test_guide_files": "files hold tensors of the CPU; test_fit_guide saves and loads on the device",
    "test_plots": "pictures of arrays",
    "test_probe": "the search for modes is float64 arithmetic on the CPU; test_fit_guide has densities of the device",
    "test_start": "as test_probe",
    "test_vocabulary": "sources",
}


def _place(config, module: str, marked: bool = False):
    """The default device of a module or a test, as a context."""
    elsewhere = config.getoption("--device") != "cpu" and (marked or module in ON_CPU)
    return torch.device("cpu") if elsewhere else nullcontext()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    with _place(collector.config, collector.path.stem if isinstance(collector, pytest.Module) else ""):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    with _place(item.config, item.path.stem, item.get_closest_marker("cpu") is not None):
        return (yield)


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


# Packages that a test may lack: torch, Pyro, NumPy and pytest are enough for the others.
EXTRAS = ("arviz", "arviz_base", "constriction", "h5netcdf", "matplotlib", "pandas", "PIL", "scipy", "torchdiffeq")


def _lacking(error: BaseException | None) -> str:
    """The package behind an import that failed, if it is one of the extras and not installed."""
    while error is not None:
        name = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ImportError) and name in EXTRAS and find_spec(name) is None:
            return name
        error = error.__cause__ or error.__context__
    return ""


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makemodule(module_path, parent):
    module = yield
    collect = module._getobj

    def skipping():
        try:
            return collect()
        except module.CollectError as error:
            if name := _lacking(error):
                pytest.skip(f"needs {name}", allow_module_level=True)
            raise

    module._getobj = skipping
    return module


def _skipping():
    try:
        return (yield)
    except Exception as error:
        if name := _lacking(error):
            pytest.skip(f"needs {name}")
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from _skipping())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from _skipping())


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
