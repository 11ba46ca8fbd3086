"""What a fitted density is used for: surprise per coordinate, anomalies, and series one step after another."""

__all__: list[str] = []
