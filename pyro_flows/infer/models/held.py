"""Holds the data and parameters of a model's density at their present values."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pyro_flows.infer.models.joint import JointDensity
from pyro_flows.infer.models.latents import Latents
from pyro_flows.infer.models.recorded import Recorded

__all__ = ["own_density"]


class _HeldParameters(Messenger):
    """Gives a model's ``pyro.param`` statements stored values.

    A handler cannot hold a module's parameters; a warning says if they have changed.
    """

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_param(self, msg: Any) -> None:
        held = self.values.get(msg["name"])
        if held is None:
            return
        init = msg["args"][1] if len(msg["args"]) > 1 else None
        if not isinstance(init, nn.Parameter):
            msg["value"], msg["done"] = held, True
        elif not torch.equal(init.detach(), held):
            warnings.warn(
                f"the parameter {msg['name']!r} of the model has changed since this fit, whose draws belong to its "
                "earlier value: fit the guide again",
                stacklevel=2,
            )


def own_density(density: JointDensity, latents: Latents, parameters: dict[str, Tensor]) -> JointDensity:
    """Copies a density with its present data and parameters, safe from later changes of the tensors."""
    own = copy.copy(density)
    own.latents = latents
    own.args, own.kwargs = tree_map(_detached_copy, (density.args, density.kwargs))
    if parameters:
        own.model = _HeldParameters(parameters)(density.model)
    own.recorded = Recorded(own._alone, density.recorded.seconds)
    return own


def _detached_copy(leaf: object) -> object:
    if type(leaf) is Tensor:
        return leaf.detach().clone()
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf
