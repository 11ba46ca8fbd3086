"""Objectives for guides, each a Pyro ELBO: path gradients of the evidence, of tighter bounds, and the forward KL."""

from pyro_flows.infer.objectives.bounds import AlphaDivergence, DReGELBO, PathELBO
from pyro_flows.infer.objectives.forward import ForwardKL

__all__ = ["AlphaDivergence", "DReGELBO", "ForwardKL", "PathELBO"]
