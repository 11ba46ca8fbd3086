"""Transforms, one file a paper family; builders in :mod:`pyro_flows.flows` stack them."""

from pyro_flows.transforms.autoregressive import Autoregressive
from pyro_flows.transforms.coupling import Coupling
from pyro_flows.transforms.elementwise import Permutation, Rescaling

__all__ = ["Autoregressive", "Coupling", "Permutation", "Rescaling"]
