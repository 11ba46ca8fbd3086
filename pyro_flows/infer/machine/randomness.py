"""Random numbers of a fit, apart from the caller's, and restored by a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Generator, Tensor

from pyro_flows.infer.machine.processes import rank

__all__ = ["own_randomness", "random_state", "seeded", "set_random"]


@contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Seeds torch's global generators, of the CPU and this device, inside, and restores them.

    Each process of a fit gets random numbers of its own.
    """
    seed += rank() << 40
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def random_state(device: torch.device, **generators: Generator | None) -> dict[str, Tensor]:
    """Returns the states of torch's global generators and of those given."""
    states = {name: generator.get_state() for name, generator in generators.items() if generator is not None}
    states["cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random(states: Mapping[str, Tensor], device: torch.device, **generators: Generator | None) -> None:
    """Restores the :func:`random_state`."""
    for name, generator in generators.items():
        if generator is not None and name in states:
            generator.set_state(states[name])
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seeds the code inside, if there is a seed."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
