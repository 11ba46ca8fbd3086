"""The machinery of fits: loop, checkpoints, interrupts, time and memory."""

__all__: list[str] = []
