"""Engines that invert triangular maps: a sweep through a masked network, a raster scan, and Newton's method."""

__all__: list[str] = []
