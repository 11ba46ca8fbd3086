"""Continuous flows: the layer, its fields, their divergence, and the solver of the differential equation."""

from pyro_flows.transforms.continuous.fields import Field
from pyro_flows.transforms.continuous.layer import Continuous

__all__ = ["Continuous", "Field"]
