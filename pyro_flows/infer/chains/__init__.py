"""Moves of many Markov chains at once."""

from pyro_flows.infer.chains.base_density import BaseDensity
from pyro_flows.infer.chains.hmc import Chains, Move, adapt, hmc, start_chains

__all__ = ["BaseDensity", "Chains", "Move", "adapt", "hmc", "start_chains"]
