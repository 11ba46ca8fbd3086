"""Autoregressive distributions and their heads."""

from pyro_flows.distributions.made.autoregressive import AutoregressiveDistribution, AutoregressiveModel
from pyro_flows.distributions.made.composed import DistributionHead, MixedHead
from pyro_flows.distributions.made.convolutional import ConvMADE
from pyro_flows.distributions.made.head import Head
from pyro_flows.distributions.made.heads import (
    BernoulliHead,
    CategoricalHead,
    LogisticMixtureHead,
    MixtureHead,
    NormalHead,
    RelaxedBernoulliHead,
)
from pyro_flows.distributions.made.model import MADE

__all__ = [
    "MADE",
    "AutoregressiveDistribution",
    "AutoregressiveModel",
    "BernoulliHead",
    "CategoricalHead",
    "ConvMADE",
    "DistributionHead",
    "Head",
    "LogisticMixtureHead",
    "MixedHead",
    "MixtureHead",
    "NormalHead",
    "RelaxedBernoulliHead",
]
