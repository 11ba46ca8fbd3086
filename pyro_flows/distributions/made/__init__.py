"""Autoregressive distributions: MADE for vectors, its convolutional form for images and sequences, and their heads."""

from pyro_flows.distributions.made.autoregressive import AutoregressiveDistribution, AutoregressiveModel
from pyro_flows.distributions.made.composed import DistributionHead, MixedHead
from pyro_flows.distributions.made.contract import Head
from pyro_flows.distributions.made.convolutional import ConvMADE
from pyro_flows.distributions.made.heads import BernoulliHead, CategoricalHead, NormalHead, RelaxedBernoulliHead
from pyro_flows.distributions.made.mixtures import LogisticMixtureHead, MixtureHead
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
