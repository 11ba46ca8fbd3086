"""Distributions made of flows: a flow with its base, and bases."""

from pyro_flows.distributions.bases import DiagonalNormal, FixedBase, GaussianMixture, StudentT, UniformCircle
from pyro_flows.distributions.flow import Flow, FlowDistribution

__all__ = ["DiagonalNormal", "FixedBase", "Flow", "FlowDistribution", "GaussianMixture", "StudentT", "UniformCircle"]
