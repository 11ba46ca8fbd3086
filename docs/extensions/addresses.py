"""The address of each object of pyro_flows: the shortest under which it can be imported."""

import functools
import importlib
import inspect
import pkgutil

import pyro_flows

# The namespaces that users import from; pages and links know these names without a prefix.
NAMESPACES = tuple(
    f"pyro_flows{name}"
    for name in (
        "",
        ".distributions",
        ".flows",
        ".transforms",
        ".univariate",
        ".nets",
        ".infer",
        ".infer.objectives",
        ".infer.diagnostics",
        ".plots",
        ".testing",
    )
)


@functools.cache
def packages():
    """All packages, the shallow ones first; those at one depth in the order of ``NAMESPACES``."""
    found = [
        m.name
        for m in pkgutil.walk_packages(pyro_flows.__path__, "pyro_flows.")
        if m.ispkg
    ]
    rank = {name: number for number, name in enumerate(NAMESPACES)}
    return sorted(
        {"pyro_flows", *found},
        key=lambda name: (name.count("."), rank.get(name, len(rank)), name),
    )


@functools.cache
def exported():
    """``{address: object}`` of what packages export, each object once."""
    found, seen = {}, set()
    for package in packages():
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if id(value) not in seen:
                seen.add(id(value))
                found[f"{package}.{name}"] = value
    return found


@functools.cache
def _by_identity():
    return {id(value): address for address, value in exported().items()}


def find(path):
    """``(module, parts, objects)``: the module that the start of a dotted path names, and what the rest leads to."""
    names = path.split(".")
    # An attribute comes before a module: a function may share its name with the module that defines it.
    return _walk(names, 1) or next(
        filter(None, (_walk(names, cut) for cut in range(len(names), 1, -1))), None
    )


def _walk(names, cut):
    """Imports the first ``cut`` names, and follows the others."""
    module = ".".join(names[:cut])
    try:
        value = importlib.import_module(module)
    except ImportError:
        return None
    objects = []
    for name in names[cut:]:
        if not hasattr(value, name) and not _annotated(value, name):
            return None
        value = getattr(value, name, None)
        if inspect.ismodule(value):
            module, objects = value.__name__, []
        else:
            objects.append(value)
    return module, names[len(names) - len(objects) :], objects


def _annotated(value, name):
    """Whether a class declares an attribute that only its instances have."""
    return any(
        name in vars(kind).get("__annotations__", ())
        for kind in getattr(value, "__mro__", ())
    )


def address(path):
    """The address of what ``path`` leads to, from wherever it is imported there; None if it leads nowhere."""
    found = find(path) if path.startswith("pyro_flows") else None
    if found is None:
        return None
    module, parts, objects = found
    if not parts:
        return module
    first = objects[0]
    top = _by_identity().get(id(first))
    if top is None and str(getattr(first, "__module__", "")).startswith(
        "pyro_flows"
    ):
        top = f"{first.__module__}.{getattr(first, '__qualname__', parts[0])}"
    return ".".join([top or f"{module}.{parts[0]}", *parts[1:]])
