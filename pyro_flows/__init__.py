"""Normalizing flows for Pyro: every flow a ``TransformModule``, exact and fast in both directions."""

from pyro_flows.chain import Chain, Wrap
from pyro_flows.core import Conditioned, FlowTransform, Inverse
from pyro_flows.distributions import (
    MADE,
    ConvMADE,
    DiagonalNormal,
    Flow,
    FlowDistribution,
    GaussianMixture,
    StudentT,
    UniformCircle,
)
from pyro_flows.flows import iaf, maf, ncsf, nice, nsf, realnvp
from pyro_flows.infer import AutoFlow, fit_density, fit_guide
from pyro_flows.nets import MLP, MaskedMLP
from pyro_flows.spline import Spline
from pyro_flows.transforms import (
    ActNorm,
    Autoregressive,
    Coupling,
    Householder,
    LULinear,
    Permutation,
    Preconditioner,
    Rescaling,
    Standardization,
)
from pyro_flows.univariate import Affine, Shift, Univariate

__version__ = "0.1.0"

__all__ = [
    "MADE",
    "MLP",
    "ActNorm",
    "Affine",
    "AutoFlow",
    "Autoregressive",
    "Chain",
    "Conditioned",
    "ConvMADE",
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
    "Preconditioner",
    "Rescaling",
    "Shift",
    "Spline",
    "Standardization",
    "StudentT",
    "UniformCircle",
    "Univariate",
    "Wrap",
    "fit_density",
    "fit_guide",
    "iaf",
    "maf",
    "ncsf",
    "nice",
    "nsf",
    "realnvp",
]
