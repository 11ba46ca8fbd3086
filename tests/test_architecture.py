"""The layers, and what every public name owes: imports go one way, files stay short, classes are abstract or final."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

import pyro_flows as pf

ROOT = Path(pf.__file__).parent
# Folders, each of which imports only from those before it.
LAYERS = [
    "core",
    "univariate",
    "nets",
    "inverse",
    "transforms",
    "flows",
    "distributions",
    "infer.machine",
    "infer.models",
    "infer.search",
    "infer.density",
    "infer.diagnostics",
    "infer.objectives",
    "infer.bridge",
    "infer.guides",
    "infer.uses",
    "infer.compression",
    "infer",
    "plots",
]
FILES = sorted(ROOT.rglob("*.py"))
HEAVY = ["matplotlib", "arviz", "torchdiffeq", "zuko", "nflows", "normflows", "constriction", "sklearn", "scipy"]


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder_of(module):
    """The folder of ``LAYERS`` to which a module belongs."""
    parts = module.split(".")[1:]
    return ".".join(parts[: 2 if parts[:1] == ["infer"] else 1])


def imports(path):
    """``(module, line, at the top)`` for each import in a file, those for annotations among them."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in members]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            yield name, node.lineno, id(node) in top


MODULES = {module_name(path) for path in FILES}


def ours(path):
    return [(name, line) for name, line, _ in imports(path) if name.split(".")[0] == "pyro_flows"]


def test_every_module_has_a_layer():
    assert {folder_of(module) for module in MODULES} == {*LAYERS, "testing", ""}


def test_the_root_is_short():
    assert len([entry for entry in ROOT.iterdir() if entry.name != "__pycache__"]) <= 14
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]


def test_imports_go_one_way():
    for path in FILES:
        module = module_name(path)
        if module == "pyro_flows":
            continue
        folder = folder_of(module)
        allowed = ["core", "testing"] if folder == "testing" else LAYERS[: LAYERS.index(folder) + 1]
        for name, line in ours(path):
            assert name != "pyro_flows", f"{path.name}:{line}: import from the module that defines the name"
            assert folder_of(name) in allowed, f"{path.name}:{line}: {module} may not import {name}"


def test_families_do_not_import_each_other():
    def family(module):
        return module.split(".")[2:3]

    for path in (ROOT / "transforms").rglob("*.py"):
        if path.parent.name == "transforms" and path.stem == "__init__":
            continue
        for name, line in ours(path):
            same = family(name) == family(module_name(path))
            assert folder_of(name) != "transforms" or same, f"{path.name}:{line}: {name}"


def test_modules_have_no_circle():
    graph = {module_name(path): {name for name, _ in ours(path)} for path in FILES}
    done = set()
    while graph:
        free = {name for name, below in graph.items() if below <= done}
        assert free, f"a circle among {sorted(graph)}"
        done |= free
        graph = {name: below for name, below in graph.items() if name not in free}


def test_only_plots_draws():
    for path in FILES:
        for name, line, top in imports(path):
            if name.split(".")[0] in ("matplotlib", "arviz"):
                assert not top, f"{path.name}:{line}: {name} is imported inside functions only"
                assert module_name(path).split(".")[1] in ("plots", "infer"), f"{path.name}:{line}"
            assert name.split(".")[0] not in ("zuko", "nflows", "normflows", "sklearn"), f"{path.name}:{line}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 600
    assert path.stem not in ("utils", "helpers", "common", "misc")


def test_import_is_light():
    """What this package loads beyond what Pyro alone loads."""
    code = "import sys, json; import {}; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    loaded = []
    for name in ("pyro, pyro.distributions, pyro.infer, pyro.poutine", "pyro_flows"):
        command = [sys.executable, "-W", "error", "-c", code.format(name)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
        assert done.returncode == 0, done.stderr
        loaded.append(set(ast.literal_eval(done.stdout)))
    assert "pyro_flows" in loaded[1]
    assert not (loaded[1] - loaded[0]) & set(HEAVY)


def test_import_changes_no_global():
    before = "torch.get_default_dtype(), torch.distributions.Distribution._validate_args, torch.is_grad_enabled()"
    code = (
        f"import torch, pyro; torch.manual_seed(0); state = torch.get_rng_state(); before = ({before}); "
        f"import pyro_flows; assert ({before}) == before; assert torch.equal(torch.get_rng_state(), state)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr


# Public names


def modules():
    for found in pkgutil.walk_packages(pf.__path__, "pyro_flows."):
        yield importlib.import_module(found.name)


def public():
    names = {name: getattr(pf, name) for name in pf.__all__}
    for module in modules():
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__:
                names[f"{module.__name__.removeprefix('pyro_flows.')}.{name}"] = value
    return {name: value for name, value in names.items() if inspect.isclass(value) or inspect.isfunction(value)}


PUBLIC = public()
TRANSFORMS = sorted(
    {v for v in PUBLIC.values() if inspect.isclass(v) and issubclass(v, pf.FlowTransform)}, key=lambda v: v.__name__
)
PAPERS = [v for v in TRANSFORMS if v.__module__.startswith("pyro_flows.transforms")]
BUILDERS = [v for v in PUBLIC.values() if inspect.isfunction(v) and v.__module__.startswith("pyro_flows.flows")]


VECTORS = [v for v in BUILDERS if v.__module__ == "pyro_flows.flows.vectors"]
SERIES = [v for v in BUILDERS if v.__module__ == "pyro_flows.flows.series"]


def test_all_is_sorted_and_complete():
    for module in (pf, *modules()):
        listed = getattr(module, "__all__", None)
        assert listed is not None, f"{module.__name__} lacks __all__"
        assert len(set(listed)) == len(listed)
        assert all(hasattr(module, name) for name in listed), module.__name__
    assert {v.__name__ for v in BUILDERS} <= set(pf.__all__)
    assert {v.__name__ for v in TRANSFORMS} <= set(pf.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings(name):
    value = PUBLIC[name]
    text = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    assert text and len(text.split()) >= 3, f"{name} lacks a docstring"
    first = text.strip().split("\n\n")[0]
    assert first.rstrip().endswith((".", ":")), f"the first paragraph of {name} is no sentence"


@pytest.mark.parametrize(
    "value", [*PAPERS, *dict.fromkeys(BUILDERS), pf.FlowTransform, pf.MaskedMLP], ids=lambda v: v.__name__
)
def test_papers_are_cited(value):
    assert "References:" in value.__doc__
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", value.__doc__), f"{value.__name__} cites no arXiv number"
    parameters = [p for p in inspect.signature(value).parameters if p not in ("args", "kwargs")]
    missing = [p for p in parameters if not re.search(rf"\b{p}\b", value.__doc__)]
    assert not missing, f"the docstring of {value.__name__} does not speak of {missing}"


@pytest.mark.parametrize("value", TRANSFORMS, ids=lambda v: v.__name__)
def test_classes_are_abstract_or_final(value):
    if value is pf.FlowTransform:
        return
    assert value.__mro__[1] is pf.FlowTransform, f"{value.__name__} derives from a concrete transform: wrap it instead"


def test_univariates_are_abstract_or_final():
    concrete = {v for v in PUBLIC.values() if inspect.isclass(v) and issubclass(v, pf.Univariate)} - {pf.Univariate}
    assert concrete and all(value.__mro__[1] is pf.Univariate for value in concrete)


@pytest.mark.parametrize("builder", dict.fromkeys(BUILDERS), ids=lambda v: v.__name__)
def test_builders_share_one_vocabulary(builder):
    first, *rest = inspect.signature(builder).parameters.values()
    assert first.name in ("input_dim", "event_shape")
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in rest)
    names = {p.name for p in rest}
    assert "context_dim" in names
    assert next(p for p in rest if p.name == "context_dim").default == 0
    assert typing.get_type_hints(builder)["return"] is pf.Chain
    if builder in VECTORS:
        assert "num_layers" in names
    event = 3 if builder in VECTORS else (1, 4) if builder in SERIES else (1, 4, 4)
    assert isinstance(builder(event), pf.Chain)


def annotated(function):
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    missing = [a.arg for a in every if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
    return [*missing, *([] if function.returns is not None else ["return"])]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_annotations_are_complete(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            missing = annotated(node)
            assert not missing, f"{path.name}:{node.lineno}: {node.name} lacks annotations of {missing}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_assert_and_no_print(path):
    """What a user gave is checked by errors that say what to do, and vanishes not under python -O."""
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"{path.name}:{node.lineno}: assert"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{path.name}:{node.lineno}: print"


def test_typing_marker_is_shipped():
    assert (ROOT / "py.typed").exists()


def test_version_is_literal():
    source = (ROOT / "__init__.py").read_text()
    assert re.search(r'^__version__ = "\d+\.\d+\.\d+"$', source, re.MULTILINE)
    project = (ROOT.parent / "pyproject.toml").read_text()
    assert f'version = "{pf.__version__}"' in project or 'dynamic = ["version"]' in project


@pytest.mark.parametrize("builder", dict.fromkeys(VECTORS), ids=lambda v: v.__name__)
def test_fresh_flows_are_the_identity(builder):
    x = torch.randn(5, 4)
    y, ladj = builder(4).forward_and_ladj(x)
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(ladj, torch.zeros(5))
