"""Uses of a fitted density."""

__all__: list[str] = []
