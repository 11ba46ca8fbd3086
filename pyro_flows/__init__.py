"""Normalizing flows for Pyro: every flow a ``TransformModule``, exact and fast in both directions."""

from pyro_flows.core.chain import Chain
from pyro_flows.core.transform import Conditioned, FlowTransform, Inverse
from pyro_flows.core.wrap import Wrap
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
from pyro_flows.flows import causal_maf, cnf, glow, iaf, maf, mintnet, multiscale_realnvp, ncsf, nice, nsf, realnvp
from pyro_flows.infer import AutoFlow, fit_density, fit_guide
from pyro_flows.nets.dense import MLP
from pyro_flows.nets.masked import MaskedMLP
from pyro_flows.transforms import (
    ActNorm,
    Autoregressive,
    CausalAutoregressive,
    Continuous,
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
from pyro_flows.univariate.base import Affine, Shift, Univariate
from pyro_flows.univariate.spline import Spline

__version__ = "0.1.0"

__all__ = [
    "MADE",
    "MLP",
    "ActNorm",
    "Affine",
    "AutoFlow",
    "Autoregressive",
    "CausalAutoregressive",
    "Chain",
    "Conditioned",
    "Continuous",
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
    "causal_maf",
    "cnf",
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
