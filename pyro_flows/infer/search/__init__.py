"""Searches that know a density only: where a guide starts, and which modes it misses."""

from pyro_flows.infer.search.probe import ModeProbe, probe_modes
from pyro_flows.infer.search.start import Start, find_start

__all__ = ["ModeProbe", "Start", "find_start", "probe_modes"]
