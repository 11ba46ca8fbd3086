"""MintNet's layer: increasing maps of images and series by masked convolutions."""

from pyro_flows.transforms.mint.layer import Mint

__all__ = ["Mint"]
