"""Transforms, one file a paper family; builders in :mod:`pyro_flows.flows` stack them."""

from pyro_flows.transforms.autoregressive import Autoregressive
from pyro_flows.transforms.bounds import Bounds
from pyro_flows.transforms.causal import CausalAutoregressive
from pyro_flows.transforms.continuous.layer import Continuous
from pyro_flows.transforms.conv_coupling import ConvCoupling
from pyro_flows.transforms.coupling import Coupling
from pyro_flows.transforms.elementwise import Permutation, Rescaling, Standardization
from pyro_flows.transforms.fixed_spline import FixedSpline
from pyro_flows.transforms.images import Split, Squeeze
from pyro_flows.transforms.integers import IntegerCoupling, IntegerSplit
from pyro_flows.transforms.linear import Coloring, Conv1x1, Householder, LULinear
from pyro_flows.transforms.mint.layer import Mint
from pyro_flows.transforms.normalization import ActNorm
from pyro_flows.transforms.pixels import LogitPixels
from pyro_flows.transforms.plated import Plated
from pyro_flows.transforms.preconditioner import Preconditioner
from pyro_flows.transforms.sphere import RecursiveSphere

__all__ = [
    "ActNorm",
    "Autoregressive",
    "Bounds",
    "CausalAutoregressive",
    "Coloring",
    "Continuous",
    "Conv1x1",
    "ConvCoupling",
    "Coupling",
    "FixedSpline",
    "Householder",
    "IntegerCoupling",
    "IntegerSplit",
    "LULinear",
    "LogitPixels",
    "Mint",
    "Permutation",
    "Plated",
    "Preconditioner",
    "RecursiveSphere",
    "Rescaling",
    "Split",
    "Squeeze",
    "Standardization",
]
