"""The contract of a flow: two methods, their checks, the cache of the last result, and flows made of flows."""

__all__: list[str] = []
