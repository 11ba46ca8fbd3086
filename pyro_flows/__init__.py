"""Normalizing flows for Pyro: every flow a ``TransformModule``, exact and fast in both directions."""

from pyro_flows.chain import Chain, Wrap
from pyro_flows.core import Conditioned, FlowTransform, Inverse
from pyro_flows.distributions import DiagonalNormal, Flow, FlowDistribution, GaussianMixture, StudentT, UniformCircle
from pyro_flows.flows import iaf, maf, ncsf, nice, nsf, realnvp
from pyro_flows.infer import fit_density
from pyro_flows.nets import MLP, MaskedMLP
from pyro_flows.spline import Spline
from pyro_flows.transforms import (
    ActNorm,
    Autoregressive,
    Coupling,
    Householder,
    LULinear,
    Permutation,
    Rescaling,
    Standardization,
)
from pyro_flows.univariate import Affine, Shift, Univariate

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "ActNorm",
    "Affine",
    "Autoregressive",
    "Chain",
    "Conditioned",
    "Coupling",
    "DiagonalNormal",
    "Flow",
    "FlowDistribution",
    "FlowTransform",
    "GaussianMixture",
    "Householder",
    "Inverse",
    "LULinear",
    "MaskedMLP",
    "Permutation",
    "Rescaling",
    "Shift",
    "Spline",
    "Standardization",
    "StudentT",
    "UniformCircle",
    "Univariate",
    "Wrap",
    "fit_density",
    "iaf",
    "maf",
    "ncsf",
    "nice",
    "nsf",
    "realnvp",
]
