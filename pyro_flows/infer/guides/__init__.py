"""Guides made of flows, how they begin, and the search for modes that they miss."""

from pyro_flows.infer.guides.auto import AutoFlow, default_builder
from pyro_flows.infer.guides.posterior import PathPosterior
from pyro_flows.infer.guides.probe import ModeProbe, probe_modes
from pyro_flows.infer.guides.start import Start, find_start

__all__ = [
    "AutoFlow",
    "ModeProbe",
    "PathPosterior",
    "Start",
    "default_builder",
    "find_start",
    "probe_modes",
]
