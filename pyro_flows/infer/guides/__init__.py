"""Guides made of flows: ``AutoFlow``, and ``fit_guide``, which fits and judges one."""

from pyro_flows.infer.guides.auto import AutoFlow
from pyro_flows.infer.guides.builders import default_builder
from pyro_flows.infer.guides.fit import fit_guide
from pyro_flows.infer.guides.loop import History
from pyro_flows.infer.guides.posterior import PathPosterior
from pyro_flows.infer.guides.result import GuideFit, load_guide

__all__ = ["AutoFlow", "GuideFit", "History", "PathPosterior", "default_builder", "fit_guide", "load_guide"]
