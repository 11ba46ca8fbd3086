"""The layers, and what every public name owes: imports go one way, files stay short, classes are abstract or final."""

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import typing
from pathlib import Path

import pytest
from asserts import output_of

import pyro_flows as pf
from pyro_flows.univariate import Univariate

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
    "infer.chains",
    "infer.diagnostics",
    "infer.density",
    "infer.objectives",
    "infer.bridge",
    "infer.guides",
    "infer.compression",
    "infer",
    "plots",
]
FILES = sorted(ROOT.rglob("*.py"))
HEAVY = [
    "matplotlib",
    "arviz",
    "torchdiffeq",
    "zuko",
    "nflows",
    "normflows",
    "constriction",
    "sklearn",
    "scipy",
    "sympy",
    "torch._dynamo",
]


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder_of(module):
    """The folder of ``LAYERS`` to which a module belongs."""
    parts = module.split(".")[1:]
    return ".".join(parts[: 2 if parts[:1] == ["infer"] else 1])


@functools.cache
def nodes(path):
    return list(ast.walk(ast.parse(path.read_text())))


@functools.cache
def imports(path):
    """``(module, line, inside of a function or class)`` for each import in a file, those for annotations among them."""
    found = []
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom):
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in members]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [(name, node.lineno, node.col_offset > 0) for name in names]
    return found


MODULES = {module_name(path) for path in FILES}


def ours(path):
    return [(name, line) for name, line, _ in imports(path) if name.split(".")[0] == "pyro_flows"]


def test_every_module_has_a_layer():
    assert {folder_of(module) for module in MODULES} == {*LAYERS, "testing", ""}


def test_the_root_is_short():
    assert len([entry for entry in ROOT.iterdir() if entry.name != "__pycache__"]) <= 14
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]


def test_imports_go_one_way():
    offenders = []
    for path in FILES:
        folder = folder_of(module_name(path))
        if folder == "":
            continue
        allowed = ["core", "testing"] if folder == "testing" else LAYERS[: LAYERS.index(folder) + 1]
        # The package itself is in no layer: a name is imported from the module that defines it.
        offenders += [f"{path}:{line}: {name}" for name, line in ours(path) if folder_of(name) not in allowed]
    assert offenders == []


def test_imports_are_absolute():
    found = [(path, node) for path in FILES for node in nodes(path) if isinstance(node, ast.ImportFrom)]
    assert [f"{path}:{node.lineno}" for path, node in found if node.level > 0] == []


def test_families_do_not_import_each_other():
    def family(module):
        return module.split(".")[2:3]

    offenders = [
        f"{path}:{line}: {name}"
        for path in FILES
        if folder_of(module_name(path)) == "transforms" and path != ROOT / "transforms" / "__init__.py"
        for name, line in ours(path)
        if folder_of(name) == "transforms" and family(name) != family(module_name(path))
    ]
    assert offenders == []


def test_modules_have_no_circle():
    graph = {module_name(path): {name for name, _ in ours(path)} for path in FILES}
    done = set()
    while graph:
        free = {name for name, below in graph.items() if below <= done}
        assert free, f"a circle among {sorted(graph)}"
        done |= free
        graph = {name: below for name, below in graph.items() if name not in free}


def test_only_plots_draws():
    """Of plots and inference, inside of functions."""
    offenders = [
        f"{path}:{line}: {name}"
        for path in FILES
        for name, line, inside in imports(path)
        if name.split(".")[0] in ("zuko", "nflows", "normflows", "sklearn")
        or (
            name.split(".")[0] in ("matplotlib", "arviz")
            and (not inside or module_name(path).split(".")[1] not in ("plots", "infer"))
        )
    ]
    assert offenders == []


def test_files_stay_short():
    assert [path.name for path in FILES if len(path.read_text().splitlines()) > 600] == []
    assert [path.name for path in FILES if path.stem in ("utils", "helpers", "common", "misc")] == []


def test_import_is_light_and_changes_no_global():
    """What this package loads and sets beyond what Pyro alone loads."""
    state = "torch.get_default_dtype(), torch.distributions.Distribution._validate_args, torch.is_grad_enabled()"
    code = f"""
import sys, torch, pyro, pyro.distributions, pyro.infer, pyro.poutine
torch.manual_seed(0)
generator, before, loaded = torch.get_rng_state(), ({state}), set(sys.modules)
import pyro_flows
assert ({state}) == before and torch.equal(torch.get_rng_state(), generator)
print(*sorted(set(sys.modules) - loaded))
"""
    loaded = set(output_of("-W", "error", "-c", code).split())
    assert "pyro_flows" in loaded and not loaded & {*HEAVY, "pyro_flows.infer", "pyro_flows.plots"}


USE = """
import sys, torch, pyro, pyro.distributions as dist
import pyro_flows as pf

def model(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc, pyro.sample("scale", dist.HalfNormal(1.0))), obs=y)

fit = pf.fit_guide(model, torch.randn(100), steps=2, progress=False)
fit.log_prob(fit.sample(2))
for flow in map(pf.Flow, (pf.nsf(2), pf.iaf(2, context_dim=1), pf.glow((3, 4, 4), hidden_channels=4))):
    context = torch.randn(3, 1) if flow.chain.context_dim else None
    flow.log_prob(flow(context).rsample((3,)).detach(), context).sum().backward()
print(*sorted(sys.modules))
"""


@pytest.mark.full
def test_guides_and_scores_load_no_compiler():
    """This takes a second and more, as long as a short fit."""
    assert not set(output_of("-c", USE).split()) & set(HEAVY)


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
#: All functions but the one that takes over a finished transform.
BUILDERS = [
    v
    for v in PUBLIC.values()
    if inspect.isfunction(v) and v.__module__.startswith("pyro_flows.flows") and v is not pf.flows.from_pyro
]


VECTORS = [v for v in BUILDERS if v.__module__ in ("pyro_flows.flows.vectors", "pyro_flows.flows.sphere")]
SERIES = [v for v in BUILDERS if v.__module__ == "pyro_flows.flows.series"]


def test_all_is_sorted_and_complete():
    for module in (pf, *modules()):
        listed = getattr(module, "__all__", None)
        assert listed is not None, f"{module.__name__} lacks __all__"
        assert len(set(listed)) == len(listed)
        assert all(hasattr(module, name) for name in listed), module.__name__
    assert {v.__name__ for v in BUILDERS} <= set(pf.__all__)
    apart = {*pf.__all__, *pf.transforms.__all__, "Conditioned"}
    assert {v.__name__ for v in TRANSFORMS} <= apart


def test_top_level():
    """Few names; every other by its subpackage, without an import of its own."""
    places = {"distributions", "flows", "infer", "nets", "plots", "testing", "transforms", "univariate"}
    assert len(pf.__all__) <= 40
    assert set(dir(pf)) == {*pf.__all__, *places, "__version__"}
    for name in set(pf.__all__) - {"Chain", "FlowTransform", "Inverse", "Wrap"}:
        assert any(getattr(getattr(pf, place), name, None) is getattr(pf, name) for place in places), name
    assert pf.fit_guide is pf.infer.fit_guide
    code = "import pyro_flows as pf; pf.plots.density, pf.testing.check_transform"
    output_of("-c", code)
    assert not hasattr(pf, "MLP")


def test_docstrings():
    """Each public name has one, of three words and more, whose first paragraph is a sentence."""
    texts = {
        name: (vars(value) if inspect.isclass(value) else {"__doc__": value.__doc__}) for name, value in PUBLIC.items()
    }
    texts = {name: members.get("__doc__") or "" for name, members in texts.items()}
    assert [name for name, text in texts.items() if len(text.split()) < 3] == []
    first = {name: text.strip().split("\n\n")[0].rstrip() for name, text in texts.items()}
    assert [name for name, text in first.items() if not text.endswith((".", ":"))] == []


def test_papers_are_cited():
    """By arXiv number, in docstrings that speak of every parameter."""
    offenders = []
    for value in (*PAPERS, *dict.fromkeys(BUILDERS), pf.FlowTransform, pf.nets.MaskedMLP):
        text = value.__doc__
        if not ("References:" in text and re.search(r"arXiv:\d{4}\.\d{4,5}", text)):
            offenders.append(f"{value.__name__} cites no arXiv number")
        parameters = [p for p in inspect.signature(value).parameters if p not in ("args", "kwargs")]
        offenders += [f"{value.__name__}: {p}" for p in parameters if not re.search(rf"\b{p}\b", text)]
    assert offenders == []


def test_classes_are_abstract_or_final():
    """A transform that derives from a concrete one wraps it instead."""
    concrete = [value for value in TRANSFORMS if value is not pf.FlowTransform]
    assert [value.__name__ for value in concrete if value.__mro__[1] is not pf.FlowTransform] == []


def test_univariates_are_abstract_or_final():
    concrete = {v for v in PUBLIC.values() if inspect.isclass(v) and issubclass(v, Univariate)} - {Univariate}
    assert concrete and all(value.__mro__[1] is Univariate for value in concrete)


def test_builders_share_one_vocabulary():
    offenders = []
    for builder in dict.fromkeys(BUILDERS):
        first, *rest = inspect.signature(builder).parameters.values()
        defaults = {p.name: p.default for p in rest}
        vector = builder in VECTORS
        event = 3 if vector else (1, 4) if builder in SERIES else (1, 4, 4)
        held = {
            "first": first.name in ("input_dim", "event_shape"),
            "keyword only, with defaults": all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in rest),
            "context_dim=0": defaults.get("context_dim") == 0,
            "num_layers": not vector or "num_layers" in defaults,
            "returns": typing.get_type_hints(builder)["return"] is pf.Chain and isinstance(builder(event), pf.Chain),
        }
        offenders += [f"{builder.__name__}: {what}" for what, holds in held.items() if not holds]
    assert offenders == []


def unannotated(function):
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    missing = [a.arg for a in every if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
    return [*missing, *([] if function.returns is not None else ["return"])]


def test_annotations_are_complete():
    functions = [
        (path, node)
        for path in FILES
        for node in nodes(path)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    assert [f"{path}:{node.lineno}: {node.name}" for path, node in functions if unannotated(node)] == []


def test_no_assert_and_no_print():
    """What a user gave is checked by errors that say what to do, and that do not vanish under ``python -O``."""

    def barred(node):
        return isinstance(node, ast.Assert) or (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        )

    assert [f"{path}:{node.lineno}" for path in FILES for node in nodes(path) if barred(node)] == []


def test_typing_marker_is_shipped():
    assert (ROOT / "py.typed").exists()


def test_version_is_literal_and_one():
    source = (ROOT / "__init__.py").read_text()
    assert re.search(r'^__version__ = "\d+\.\d+\.\d+"$', source, re.MULTILINE)
    project, citation, changes = (
        (ROOT.parent / name).read_text().splitlines() for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")
    )
    assert f'version = "{pf.__version__}"' in project and f"version: {pf.__version__}" in citation
    assert next(line for line in changes if line.startswith("## ")).startswith(f"## {pf.__version__} - ")
