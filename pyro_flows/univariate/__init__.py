"""Monotone scalar maps, applied to each dimension by couplings and autoregressive transforms."""

from pyro_flows.univariate.base import Affine, Shift, Univariate
from pyro_flows.univariate.clamped import ClampedAffine
from pyro_flows.univariate.spline import Spline

__all__ = ["Affine", "ClampedAffine", "Shift", "Spline", "Univariate"]
