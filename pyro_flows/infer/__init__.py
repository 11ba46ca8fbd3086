"""Inference with flows: fits densities to data and guides to posteriors, and checks both."""

from pyro_flows.infer.bridge import to_arviz
from pyro_flows.infer.compression import Codec
from pyro_flows.infer.density import (
    DensityFit,
    FlowMatching,
    StandardizedFlow,
    fit_density,
    load_density,
    sparse_adjacency,
    standardized,
)
from pyro_flows.infer.density.anomaly import AnomalyDetector
from pyro_flows.infer.density.series import Stream, step_log_prob
from pyro_flows.infer.density.surprise import pixel_scores
from pyro_flows.infer.diagnostics import simulation_based_calibration
from pyro_flows.infer.guides.auto import AutoFlow
from pyro_flows.infer.guides.fit import fit_guide
from pyro_flows.infer.guides.result import GuideFit, load_guide
from pyro_flows.infer.models.lifted import Circles
from pyro_flows.infer.objectives import AlphaDivergence, DReGELBO, ForwardKL, PathELBO

__all__ = [
    "AlphaDivergence",
    "AnomalyDetector",
    "AutoFlow",
    "Circles",
    "Codec",
    "DReGELBO",
    "DensityFit",
    "FlowMatching",
    "ForwardKL",
    "GuideFit",
    "PathELBO",
    "StandardizedFlow",
    "Stream",
    "fit_density",
    "fit_guide",
    "load_density",
    "load_guide",
    "pixel_scores",
    "simulation_based_calibration",
    "sparse_adjacency",
    "standardized",
    "step_log_prob",
    "to_arviz",
]
