"""The examples in the docstrings of public names print what they say."""

import doctest
import importlib
import inspect
import pkgutil
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf

#: What an example finds: docs/api/index.md names these, so that no example repeats their imports.
NAMESPACE = {"torch": torch, "pyro": pyro, "dist": dist, "pf": pf}

#: Packages whose names are no part of the reference.
ENGINES = ("pyro_flows.infer.chains", "pyro_flows.infer.search")


def public():
    """The classes and functions that a package lists, each once, under the shortest of its addresses."""
    found = {}
    packages = [name for _, name, package in pkgutil.walk_packages(pf.__path__, "pyro_flows.") if package]
    for address in ("pyro_flows", *packages):
        module = importlib.import_module(address)
        for name in () if address in ENGINES else module.__all__:
            value = getattr(module, name)
            if (inspect.isclass(value) or inspect.isfunction(value)) and value not in found.values():
                found[f"{address.replace('pyro_flows', 'pf', 1)}.{name}"] = value
    return found


PUBLIC = public()
FINDER = doctest.DocTestFinder(exclude_empty=False)
FOUND = [test for name, value in PUBLIC.items() for test in FINDER.find(value, name, globs=NAMESPACE)]
EXAMPLES = [test for test in FOUND if test.examples and "._" not in test.name]


def test_examples_are_short_and_print():
    sources = {test.name: [example.source + example.want for example in test.examples] for test in EXAMPLES}
    lines = {name: "".join(parts).splitlines() for name, parts in sources.items()}
    assert {name: line for name, found in lines.items() for line in found if len(line) > 80} == {}
    silent = {test.name for test in EXAMPLES if not any(example.want for example in test.examples)}
    assert silent == {"pf.plots.density", "pf.plots.globe", "pf.testing.check_transform"}  # files, or no error


@pytest.mark.full
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        doctest.DebugRunner(verbose=False).run(example, clear_globs=False)
    except doctest.DocTestFailure as failure:
        pytest.fail(f"{failure.example.source}printed\n{failure.got}in place of\n{failure.example.want}")
    except doctest.UnexpectedException as error:
        raise error.exc_info[1] from None
    finally:
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")
