"""Pyro ELBOs for guides: path gradients of bounds on the evidence, and the forward KL."""

from pyro_flows.infer.objectives.bounds import AlphaDivergence, DReGELBO, PathELBO
from pyro_flows.infer.objectives.forward import ForwardKL

__all__ = ["AlphaDivergence", "DReGELBO", "ForwardKL", "PathELBO"]
