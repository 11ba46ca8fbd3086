"""Trust in a guide: importance weights, a verdict in words, simulation-based calibration."""

from pyro_flows.infer.diagnostics.calibration import Calibration, simulation_based_calibration
from pyro_flows.infer.diagnostics.moments import Moments, compare_moments
from pyro_flows.infer.diagnostics.verdict import Probe, Verdict, judge, widening
from pyro_flows.infer.diagnostics.walk import Walk, walk_draws
from pyro_flows.infer.diagnostics.weights import Importance, Smoothed, importance, pareto_smoothed, resample

__all__ = [
    "Calibration",
    "Importance",
    "Moments",
    "Probe",
    "Smoothed",
    "Verdict",
    "Walk",
    "compare_moments",
    "importance",
    "judge",
    "pareto_smoothed",
    "resample",
    "simulation_based_calibration",
    "walk_draws",
    "widening",
]
