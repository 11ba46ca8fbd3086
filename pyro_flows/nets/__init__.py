"""Networks that compute the parameters of a flow."""

from pyro_flows.nets.convolutional import ConvNet
from pyro_flows.nets.dense import MLP
from pyro_flows.nets.fixed_point import FixedPointNet
from pyro_flows.nets.masked import MaskedMLP

__all__ = ["MLP", "ConvNet", "FixedPointNet", "MaskedMLP"]
