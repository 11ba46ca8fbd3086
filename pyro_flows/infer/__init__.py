"""Inference with flows: fitting densities to data."""

from pyro_flows.infer.density import DensityFit, StandardizedFlow, fit_density, standardized

__all__ = ["DensityFit", "StandardizedFlow", "fit_density", "standardized"]
