"""Every public name has an example in its docstring, and the examples print what they say."""

import doctest
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf

PAGES = sorted((Path(__file__).parent.parent / "docs" / "api").glob("*.md"))
ENTRIES = re.compile(r"^```\{entries\} (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

#: What an example finds: the reference names these, so that no example repeats their imports.
NAMESPACE = {"torch": torch, "pyro": pyro, "dist": dist, "pf": pf}

#: Packages that list their names for the layers above; the reference picks some.
ENGINES = ("pyro_flows.infer.chains", "pyro_flows.infer.search")

#: Public names without an example, each with its reason.
WITHOUT = {
    "pf.core.memo.Kept": "kept by modules for themselves",
    "pf.distributions.made.AutoregressiveModel": "abstract; its methods have examples, by a MADE",
    "pf.distributions.made.steps.ModelSteps": "steps of a Stream, which has examples",
    "pf.infer.density.units.Density": "a protocol, for annotations",
    "pf.infer.diagnostics.Probe": "a protocol, for annotations",
}


def addresses():
    """Of the names that the packages list, and then of those in the reference."""
    packages = [name for _, name, package in pkgutil.walk_packages(pf.__path__, "pyro_flows.") if package]
    for package in ("pyro_flows", *packages):
        yield from (f"{package}.{name}" for name in importlib.import_module(package).__all__ if package not in ENGINES)
    for package, lines in ENTRIES.findall("\n".join(page.read_text() for page in PAGES)):
        yield from (f"{package}.{name}" for name in re.findall(r"^[\w.]+", lines, re.MULTILINE))


def public():
    """The classes and functions at these addresses, each once."""
    found = {}
    for address in addresses():
        value = pkgutil.resolve_name(address)
        if (inspect.isclass(value) or inspect.isfunction(value)) and value not in found.values():
            found[address.replace("pyro_flows", "pf", 1)] = value
    return found


PUBLIC = public()
FINDER = doctest.DocTestFinder(exclude_empty=False)
FOUND = [test for name, value in PUBLIC.items() for test in FINDER.find(value, name, globs=NAMESPACE)]
EXAMPLES = [test for test in FOUND if test.examples and "._" not in test.name]


def test_every_public_name_has_an_example():
    assert "pf.core.transform.Conditioned" in PUBLIC, "the pages of the reference were not read"
    lacking = PUBLIC.keys() - {test.name for test in EXAMPLES}
    assert sorted(lacking - WITHOUT.keys()) == []
    assert sorted(WITHOUT.keys() - lacking) == []


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
