"""Distributions made of flows: a flow with its base, and bases; and autoregressive ones, which are no flows."""

from pyro_flows.distributions.bases import DiagonalNormal, FixedBase, GaussianMixture, StudentT, UniformCircle
from pyro_flows.distributions.dequantization import Dequantized, DequantizedDistribution, bits_per_dim
from pyro_flows.distributions.ensemble import Ensemble, EnsembleDistribution
from pyro_flows.distributions.flow import Flow, FlowDistribution
from pyro_flows.distributions.integers import IntegerLogistics, IntegerLogisticsDistribution
from pyro_flows.distributions.made import (
    MADE,
    AutoregressiveDistribution,
    BernoulliHead,
    CategoricalHead,
    ConvMADE,
    DistributionHead,
    LogisticMixtureHead,
    MixedHead,
    MixtureHead,
    NormalHead,
    RelaxedBernoulliHead,
)
from pyro_flows.distributions.noise import Dequantizer
from pyro_flows.distributions.queries import (
    Conditional,
    Estimate,
    Marginal,
    Modes,
    estimate_entropy,
    estimate_kl,
)
from pyro_flows.distributions.sphere import UniformSphere, VonMisesFisher

__all__ = [
    "MADE",
    "AutoregressiveDistribution",
    "BernoulliHead",
    "CategoricalHead",
    "Conditional",
    "ConvMADE",
    "Dequantized",
    "DequantizedDistribution",
    "Dequantizer",
    "DiagonalNormal",
    "DistributionHead",
    "Ensemble",
    "EnsembleDistribution",
    "Estimate",
    "FixedBase",
    "Flow",
    "FlowDistribution",
    "GaussianMixture",
    "IntegerLogistics",
    "IntegerLogisticsDistribution",
    "LogisticMixtureHead",
    "Marginal",
    "MixedHead",
    "MixtureHead",
    "Modes",
    "NormalHead",
    "RelaxedBernoulliHead",
    "StudentT",
    "UniformCircle",
    "UniformSphere",
    "VonMisesFisher",
    "bits_per_dim",
    "estimate_entropy",
    "estimate_kl",
]
