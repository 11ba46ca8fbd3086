"""The function that looks on while a fit trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pyro_flows.infer.machine.processes import devices, from_first

__all__ = ["Callback", "asks_to_stop", "check_callback"]

Callback = Callable[[dict[str, Any]], Any]


def check_callback(who: str, callback: object) -> None:
    """Refuses anything but ``None`` and functions."""
    if callback is not None and not callable(callback):
        raise TypeError(
            f"{who}: expected callback to be a function of a dictionary, called while the fit trains, got a "
            f"{type(callback).__name__}"
        )


def asks_to_stop(callback: Callback, record: dict[str, Any]) -> bool:
    """Calls the function in the first process, with random numbers of its own; all get its answer, if it is true."""

    def ask() -> bool:
        with torch.random.fork_rng(devices()):
            answer = callback(record)
        return isinstance(answer, (bool, np.bool_)) and bool(answer)

    return from_first(ask)
