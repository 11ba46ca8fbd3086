"""Searches for a guide's start and for the modes that it misses."""

from pyro_flows.infer.search.probe import ModeProbe, probe_modes
from pyro_flows.infer.search.start import Start, find_start

__all__ = ["ModeProbe", "Start", "find_start", "probe_modes"]
