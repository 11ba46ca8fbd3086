"""A posterior in one call: ``fit_guide`` and what it returns."""

from pyro_flows.infer.fitting.fit import fit_guide
from pyro_flows.infer.fitting.result import GuideFit, load_guide
from pyro_flows.infer.fitting.training import History

__all__ = ["GuideFit", "History", "fit_guide", "load_guide"]
