"""Normalizing flows for Pyro: every flow a ``TransformModule``, exact and fast in both directions."""

from pyro_flows.chain import Chain, Wrap
from pyro_flows.core import Conditioned, FlowTransform, Inverse
from pyro_flows.distributions import (
    MADE,
    ConvMADE,
    Dequantized,
    Dequantizer,
    DiagonalNormal,
    Flow,
    FlowDistribution,
    GaussianMixture,
    StudentT,
    UniformCircle,
    bits_per_dim,
)
from pyro_flows.flows import glow, iaf, maf, mintnet, multiscale_realnvp, ncsf, nice, nsf, realnvp
from pyro_flows.infer import AutoFlow, fit_density, fit_guide
from pyro_flows.nets import MLP, MaskedMLP
from pyro_flows.spline import Spline
from pyro_flows.transforms import (
    ActNorm,
    Autoregressive,
    Conv1x1,
    ConvCoupling,
    Coupling,
    Householder,
    LogitPixels,
    LULinear,
    Mint,
    Permutation,
    Preconditioner,
    Rescaling,
    Split,
    Squeeze,
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
    "Conv1x1",
    "ConvCoupling",
    "ConvMADE",
    "Coupling",
    "Dequantized",
    "Dequantizer",
    "DiagonalNormal",
    "Flow",
    "FlowDistribution",
    "FlowTransform",
    "GaussianMixture",
    "Householder",
    "Inverse",
    "LULinear",
    "LogitPixels",
    "MaskedMLP",
    "Mint",
    "Permutation",
    "Preconditioner",
    "Rescaling",
    "Shift",
    "Spline",
    "Split",
    "Squeeze",
    "Standardization",
    "StudentT",
    "UniformCircle",
    "Univariate",
    "Wrap",
    "bits_per_dim",
    "fit_density",
    "fit_guide",
    "glow",
    "iaf",
    "maf",
    "mintnet",
    "multiscale_realnvp",
    "ncsf",
    "nice",
    "nsf",
    "realnvp",
]
