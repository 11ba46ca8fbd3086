"""Torch's and Pyro's transforms, distributions, modules and activations, by their public names and arguments."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Distribution, Transform

__all__ = ["arguments_of", "known_by", "name_of"]

# Functions that a file may name; each maps a tensor to a tensor.
_FUNCTIONAL = (
    "celu elu gelu hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 selu sigmoid silu softplus "
    "softsign tanh tanhshrink"
).split()
_TORCH = "arctan asinh atan cos erf relu selu sigmoid sin sinh tanh".split()
# Of each group, one argument says all.
_EITHER = (("logits", "probs"), ("scale_tril", "covariance_matrix", "precision_matrix"))
_ATTRIBUTES = {"base_distribution": "base_dist", "tseq": "transforms"}
_SETTINGS = ("cache_size", "validate_args", "device", "dtype")


@functools.cache
def _known() -> dict[str, Any]:
    """Classes and functions by a word for their place, and their name."""
    found: dict[str, Any] = {}
    places: list[tuple[str, Any, type]] = [
        ("pyro", dist, Distribution),
        ("pyro", pyro_transforms, Transform),
        ("torch", torch.distributions, Distribution),
        ("torch", torch.distributions.transforms, Transform),
        ("nn", nn, nn.Module),
    ]
    for word, place, kind in places:
        for name, each in vars(place).items():
            fits = isinstance(each, type) and issubclass(each, kind) and not name.startswith("_")
            if fits and (kind is nn.Module or not issubclass(each, nn.Module)):
                found[f"{word} {name}"] = each
    found |= {f"torch {name}": getattr(torch, name) for name in _TORCH}
    return found | {f"functional {name}": getattr(F, name) for name in _FUNCTIONAL}


def known_by(name: str) -> Any:
    """Returns the class or function of a name, ``None`` if there is none."""
    return _known().get(name)


def name_of(value: object) -> str | None:
    """Returns the name of a class or function of torch or Pyro that a file can hold; ``None`` for all else."""
    if not callable(value):
        return None
    return next((name for name, each in _known().items() if each is value), None)


def arguments_of(value: object) -> dict[str, Any]:
    """Reads the arguments of a transform, distribution or module of torch or Pyro from its attributes.

    Raises:
        TypeError: if an argument is not an attribute.
    """
    if type(value).__init__ is nn.Module.__init__:
        return {}
    found = {}
    for name, parameter in inspect.signature(type(value)).parameters.items():
        rivals = next((group for group in _EITHER if name in group), (name,))
        told = [each for each in rivals if each in vars(value)]
        if name in _SETTINGS or (len(rivals) > 1 and name != (told or rivals)[0]):
            continue
        attribute = _ATTRIBUTES.get(name, name)
        variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if variable or not hasattr(value, attribute):
            raise TypeError(f"it is not known how this {type(value).__name__} was made")
        given = getattr(value, attribute)
        # The bias of a layer is an option and then a parameter.
        found[name] = given is not None if name == "bias" and not isinstance(given, bool) else given
    return found
