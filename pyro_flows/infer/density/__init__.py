"""Densities by maximum likelihood or flow matching."""

from pyro_flows.infer.density.adjacency import sparse_adjacency
from pyro_flows.infer.density.fit import fit_density
from pyro_flows.infer.density.matching import FlowMatching
from pyro_flows.infer.density.result import DensityFit, load_density
from pyro_flows.infer.density.units import StandardizedFlow, standardized

__all__ = [
    "DensityFit",
    "FlowMatching",
    "StandardizedFlow",
    "fit_density",
    "load_density",
    "sparse_adjacency",
    "standardized",
]
