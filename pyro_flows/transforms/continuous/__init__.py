"""Continuous flows and their fields."""

from pyro_flows.transforms.continuous.fields import Field
from pyro_flows.transforms.continuous.layer import Continuous

__all__ = ["Continuous", "Field"]
