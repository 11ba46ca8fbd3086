"""What a run asks of the machine: files, interrupts, time and memory."""

__all__: list[str] = []
