"""Lossless compression of whole numbers by autoregressive models."""

from pyro_flows.infer.compression.codec import Codec

__all__ = ["Codec"]
