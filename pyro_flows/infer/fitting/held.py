"""What a result keeps of a model: its parameters and its data, as they were when it was fitted."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pyro_flows.infer.joint import JointDensity
from pyro_flows.infer.latents import Latents

__all__ = ["HeldParameters", "own_density"]


class HeldParameters(Messenger):
    """Gives a model's ``pyro.param`` statements the values that they had.

    Parameters that belong to a module are its own, whatever a handler says; where they have changed a warning says so.
    """

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_param(self, msg: dict[str, object]) -> None:
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
    """The same density with the data and parameters as they are now, whatever becomes of the tensors given."""
    own = copy.copy(density)
    own.latents = latents
    own.args, own.kwargs = tree_map(_copied, (density.args, density.kwargs))
    if parameters:
        own.model = HeldParameters(parameters)(density.model)
    return own


def _copied(leaf: object) -> object:
    if type(leaf) is Tensor:
        return leaf.detach().clone()
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf
