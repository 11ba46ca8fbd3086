"""Families of monotone scalar maps, which couplings and autoregressive transforms apply to each dimension."""

from pyro_flows.univariate.base import Affine, Shift, Univariate
from pyro_flows.univariate.spline import Spline

__all__ = ["Affine", "Shift", "Spline", "Univariate"]
