"""Autoregressive distributions: MADE for vectors, its convolutional form for images and sequences, and their heads."""

from pyro_flows.distributions.made.autoregressive import AutoregressiveModel
from pyro_flows.distributions.made.composed import DistributionHead, MixedHead
from pyro_flows.distributions.made.contract import Head
from pyro_flows.distributions.made.convolutional import ConvMADE
from pyro_flows.distributions.made.distribution import AutoregressiveDistribution
from pyro_flows.distributions.made.heads import BernoulliHead, CategoricalHead, NormalHead
from pyro_flows.distributions.made.mixtures import LogisticMixtureHead, MixtureHead
from pyro_flows.distributions.made.model import MADE
from pyro_flows.distributions.made.relaxed import RelaxedBernoulliHead

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
