"""How fits run: the training loop, checkpoints and files, interrupts, time and memory."""

__all__: list[str] = []
