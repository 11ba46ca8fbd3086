"""Normalizing flows for Pyro: every flow a ``TransformModule``, exact and fast in both directions."""

from pyro_flows.chain import Chain, Wrap
from pyro_flows.core import Conditioned, FlowTransform, Inverse
from pyro_flows.distributions import DiagonalNormal, Flow, FlowDistribution
from pyro_flows.flows import iaf, maf, nice, realnvp
from pyro_flows.nets import MLP, MaskedMLP
from pyro_flows.transforms import Autoregressive, Coupling, Permutation, Rescaling
from pyro_flows.univariate import Affine, Shift, Univariate

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "Affine",
    "Autoregressive",
    "Chain",
    "Conditioned",
    "Coupling",
    "DiagonalNormal",
    "Flow",
    "FlowDistribution",
    "FlowTransform",
    "Inverse",
    "MaskedMLP",
    "Permutation",
    "Rescaling",
    "Shift",
    "Univariate",
    "Wrap",
    "iaf",
    "maf",
    "nice",
    "realnvp",
]
