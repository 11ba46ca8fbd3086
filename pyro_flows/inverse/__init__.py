"""Engines that invert triangular maps: one sweep through a masked network, a raster scan, and Newton's method."""

__all__: list[str] = []
