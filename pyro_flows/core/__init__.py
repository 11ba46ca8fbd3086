"""The contract of a flow, the cache of the last result, and flows made of flows."""

__all__: list[str] = []
