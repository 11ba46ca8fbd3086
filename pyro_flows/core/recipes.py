"""Flows as plain data: public names of this package's classes, and their arguments."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_flows.core.foreign import arguments_of, known_by, name_of

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


def recipe(value: Any, given: Mapping[int, Any] | None = None) -> Any:
    """Describes an object's class and options, without parameters and buffers, as plain data for :func:`made_from`.

    A module that occurs several times is described once.

    Args:
        value: a scalar, a tensor, an object of this package (which becomes ``{"make": name, "args": [...], "kwargs":
            {...}}``), a transform, distribution, module or activation of torch or Pyro, or a list, tuple or dictionary
            of such.
        given: plain data by the ``id`` of modules, which stand for these.

    Raises:
        TypeError: for anything else, such as the user's own class or function.
    """
    return _Describer(given or {})(value)


class _Describer:
    """Describes objects; ``known`` has the modules in order, by which later places refer to them."""

    def __init__(self, given: Mapping[int, Any]) -> None:
        self.given, self.known = given, dict[nn.Module, int]()

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, nn.Module):
            return self._plain(value)
        if value in self.known:
            return {"same": self.known[value]}
        plain = {"given": self.given[id(value)]} if id(value) in self.given else self._plain(value)
        self.known[value] = len(self.known)
        return plain

    def _plain(self, value: Any) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, _Foreign):
            raise TypeError(f"{str(value)!r} is not of this package")
        if isinstance(value, _SCALARS):
            return value
        if isinstance(value, (Tensor, np.ndarray)):
            return torch.as_tensor(value, device="cpu").detach()
        if isinstance(value, (list, tuple)):
            return type(value)(map(self, value)) if type(value) in (list, tuple) else tuple(map(self, value))
        if isinstance(value, dict):
            return {"items": [[self(key), self(each)] for key, each in value.items()]}
        if _is_ours(value):
            own = callable(getattr(type(value), "arguments", None))
            args, kwargs = value.arguments() if own else value.__dict__["_arguments"]
            return self._call(type(value).__name__, args, kwargs)
        name = name_of(value)
        if name is not None:
            return {"name": name}
        if isinstance(value, Transform) and type(value).__name__ == "_InverseTransform":
            return {"inverse": self(value.inv)}
        if type(value) is nn.Sequential:
            return {"sequence": [[key, self(each)] for key, each in value.named_children()]}
        name = name_of(type(value))
        return self(_foreign(value)) if name is None else self._call(name, (), arguments_of(value))

    def _call(self, name: str, args: Iterable[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "make": name,
            "args": [self(each) for each in args],
            "kwargs": {key: self(each) for key, each in kwargs.items()},
        }


def made_from(plain: Any, given: Callable[[Any], nn.Module] | None = None) -> Any:
    """Makes the object that :func:`recipe` described; ``given`` returns the modules that were given there.

    Raises:
        ValueError: for a name that this release does not know.
    """
    return _Maker(given)(plain)


class _Maker:
    def __init__(self, given: Callable[[Any], nn.Module] | None) -> None:
        self.given, self.known = given, list[nn.Module]()

    def __call__(self, plain: Any) -> Any:
        if isinstance(plain, (list, tuple)):
            return type(plain)(map(self, plain))
        if not isinstance(plain, dict):
            return plain
        if "items" in plain:
            return {self(key): self(each) for key, each in plain["items"]}
        if "same" in plain:
            return self.known[plain["same"]]
        if "inverse" in plain:
            return self(plain["inverse"]).inv
        made = self._made(plain)
        if isinstance(made, nn.Module):
            self.known.append(made)
        return made

    def _made(self, plain: dict[str, Any]) -> Any:
        if "given" in plain:
            if self.given is None:
                raise ValueError("its modules were left out")
            return self.given(plain["given"])
        if "sequence" in plain:
            return nn.Sequential(OrderedDict((key, self(each)) for key, each in plain["sequence"]))
        name = plain["make"] if "make" in plain else plain["name"]
        found = _KNOWN.get(name, known_by(name))
        if found is None:
            raise ValueError(f"there is no {name!r} in this release")
        if "make" not in plain:
            return found
        args = [self(each) for each in plain["args"]]
        return found(*args, **{key: self(each) for key, each in plain["kwargs"].items()})


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
    if isinstance(value, (*_SCALARS, np.generic)) or _is_ours(value) or name_of(value) or name_of(type(value)):
        return value
    return _foreign(value)
