"""Transforms, one file a paper family; builders in :mod:`pyro_flows.flows` stack them."""

from pyro_flows.transforms.autoregressive import Autoregressive
from pyro_flows.transforms.coupling import Coupling
from pyro_flows.transforms.elementwise import Permutation, Rescaling, Standardization
from pyro_flows.transforms.linear import Householder, LULinear
from pyro_flows.transforms.normalization import ActNorm
from pyro_flows.transforms.preconditioner import Preconditioner

__all__ = [
    "ActNorm",
    "Autoregressive",
    "Coupling",
    "Householder",
    "LULinear",
    "Permutation",
    "Preconditioner",
    "Rescaling",
    "Standardization",
]
