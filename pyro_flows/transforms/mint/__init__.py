"""MintNet's masked invertible layer, its slopes, its orders and its attention."""

from pyro_flows.transforms.mint.layer import Mint

__all__ = ["Mint"]
