"""Flows as plain data: public names of this package's classes, and their arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["made_from", "options_of", "recipe", "remembered"]

_T = TypeVar("_T")

_PACKAGE = __name__.partition(".")[0]


_KNOWN: dict[str, type] = {}


_SCALARS = (type(None), bool, int, float, str)


def remembered(cls: type[_T]) -> type[_T]:
    """Class decorator: instances keep their arguments, or have a method ``arguments() -> (args, kwargs)``."""
    if cls.__module__.partition(".")[0] == _PACKAGE:
        _KNOWN[cls.__name__] = cls
    if not hasattr(cls, "arguments"):
        held: Any = cls
        init = held.__init__

        @functools.wraps(init)
        def method(self: Any, *args: Any, **kwargs: Any) -> None:
            # A base's own method runs later and must not replace them.
            self.__dict__.setdefault("_arguments", (_kept(args), _kept(kwargs)))
            init(self, *args, **kwargs)

        held.__init__ = method
    return cls


def recipe(value: Any) -> Any:
    """Describes an object's class and options, without parameters and buffers, as plain data for :func:`made_from`.

    Args:
        value: a scalar, a tensor, an object of this package (which becomes ``{"make": name, "args": [...], "kwargs":
            {...}}``), or a list, tuple or dictionary of such.

    Raises:
        TypeError: for anything else, such as the user's own class or function.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _Foreign):
        raise TypeError(f"{str(value)!r} is not of this package")
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        return torch.as_tensor(value, device="cpu").detach()
    if isinstance(value, (list, tuple)):
        return type(value)(map(recipe, value)) if type(value) in (list, tuple) else tuple(map(recipe, value))
    if isinstance(value, dict):
        return {"items": [[recipe(key), recipe(each)] for key, each in value.items()]}
    if not _is_ours(value):
        return recipe(_foreign(value))
    args, kwargs = value.arguments() if hasattr(value, "arguments") else value.__dict__["_arguments"]
    return {
        "make": type(value).__name__,
        "args": [recipe(each) for each in args],
        "kwargs": {name: recipe(each) for name, each in kwargs.items()},
    }


def made_from(plain: Any) -> Any:
    """Makes the object that :func:`recipe` described.

    Raises:
        ValueError: for a name that this release does not know.
    """
    if isinstance(plain, (list, tuple)):
        return type(plain)(map(made_from, plain))
    if not isinstance(plain, dict):
        return plain
    if "items" in plain:
        return {made_from(key): made_from(each) for key, each in plain["items"]}
    if plain["make"] not in _KNOWN:
        raise ValueError(f"there is no {plain['make']!r} in this release")
    kwargs = {name: made_from(each) for name, each in plain["kwargs"].items()}
    return _KNOWN[plain["make"]](*map(made_from, plain["args"]), **kwargs)


def options_of(instance: object) -> dict[str, Any]:
    """The arguments of a class that holds each as an attribute."""
    return {name: getattr(instance, name) for name in inspect.signature(type(instance)).parameters}


class _Foreign(str):
    """The name of an argument from outside of this package, in its place."""


def _foreign(value: object) -> _Foreign:
    return _Foreign(getattr(value, "__name__", type(value).__name__))


def _is_ours(value: object) -> bool:
    return _KNOWN.get(type(value).__name__) is type(value)


def _kept(value: Any) -> Any:
    """A copy of a value that the caller may change later."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, (list, tuple)):
        return [_kept(each) for each in value] if isinstance(value, list) else tuple(map(_kept, value))
    if isinstance(value, Mapping):
        return {name: _kept(each) for name, each in value.items()}
    if isinstance(value, range):
        return list(value)
    return value if isinstance(value, (*_SCALARS, np.generic)) or _is_ours(value) else _foreign(value)
