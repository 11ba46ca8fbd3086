"""Fair timing: each library in a worker process of its own, all in turns, medians of per-round ratios.

Times are CPU seconds of the worker with one thread, so that a neighbor on the machine counts little; argument
validation is off for all.
"""

import contextlib
import gc
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from _peers import LIBRARIES, Calls
from _runs import between

__all__ = ["Bench", "grown", "kept", "ratio", "shown", "spent"]


def _serve(builder: Callable[[object], Calls], seed: int, threads: int, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    torch.distributions.Distribution.set_default_validate_args(False)
    calls = {}
    clock = time.process_time if threads == 1 else time.perf_counter
    while True:
        order = pipe.recv()
        if order is None:
            return
        kind, argument = order
        if kind == "build":
            torch.manual_seed(seed)
            calls = {}
            gc.collect()
            calls = builder(argument)
            torch.distributions.Distribution.set_default_validate_args(False)  # Pyro's import turns it on
            pipe.send(sorted(calls))
            continue
        if kind == "value":
            pipe.send(calls[argument]())
            continue
        call, target, repeats = argument
        gc.collect()
        gc.disable()
        if repeats == 0:  # warm up and find out how often fits the target
            calls[call]()
            start = clock()
            calls[call]()
            repeats = max(1, min(2000, int(target / max(clock() - start, 1e-7))))
        start = clock()
        for _ in range(repeats):
            calls[call]()
        spent = (clock() - start) / repeats
        gc.enable()
        pipe.send((repeats, spent))


class Bench:
    """Worker processes for the named libraries, timed in turns.

    Args:
        names: of the libraries; those that are not installed are left out with a word.
        seed: of every worker.
        threads: of every worker.
        libraries: builders by name: each makes named calls of a case.
    """

    def __init__(
        self,
        names: Iterable[str],
        seed: int = 0,
        threads: int = 1,
        libraries: Mapping[str, Callable[..., Calls]] = LIBRARIES,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: dict[str, Connection] = {}
        self.workers = []
        for name in names:
            here, there = context.Pipe()
            worker = context.Process(target=_serve, args=(libraries[name], seed, threads, there), daemon=True)
            worker.start()
            self.pipes[name] = here
            self.workers.append(worker)

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in self.pipes.values():
            with contextlib.suppress(OSError):
                pipe.send(None)
        for worker in self.workers:
            worker.join(10)

    def build(self, case: object, names: Iterable[str]) -> None:
        """Builds one case in the named workers."""
        names = list(names)
        for name in names:
            self.pipes[name].send(("build", case))
        for name in names:
            self.pipes[name].recv()

    def value(self, name: str, call: str) -> object:
        """What one call of a library returns."""
        self.pipes[name].send(("value", call))
        return self.pipes[name].recv()

    def time(
        self, jobs: list[tuple[str, str]], rounds: int, target: float = 0.05
    ) -> dict[tuple[str, str], list[float]]:
        """Seconds per call of each ``(library, call)``, one figure a round, in turns."""
        repeats = dict.fromkeys(jobs, 0)
        figures: dict[tuple[str, str], list[float]] = {job: [] for job in jobs}
        for k in range(rounds + 1):  # the first round only warms up
            for job in jobs:
                name, call = job
                self.pipes[name].send(("time", (call, target, repeats[job])))
                repeats[job], spent = self.pipes[name].recv()
                if k:
                    figures[job].append(spent)
        return figures


def ratio(figures: dict, over: tuple[str, str], under: tuple[str, str], digits: int | None = None) -> str:
    """Median, least and greatest of the per-round ratios; by default with one digit from 10 on, else two."""
    each = [a / b for a, b in zip(figures[over], figures[under], strict=True)]
    return between(each, (1 if statistics.median(each) >= 10 else 2) if digits is None else digits)


def spent(call: Callable[[], object], repeats: int = 1) -> float:
    """CPU seconds of one call."""
    begin = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - begin) / repeats


def shown(seconds: float) -> str:
    """A time with a unit."""
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.1e} s"


def kept(call: Callable[[], object], besides: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of distinct storages that autograd keeps for the gradient of a call, besides those of some tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in besides}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return sum(seen.values()) + 0 * (result is None)


def _held() -> float:
    """The most that this process has held since the mark was set down, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def grown(call: Callable[[], object]) -> float:
    """By how many bytes the peak memory of this process grows in a call, on Linux."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the mark down to what is held now
    before = _held()
    kept = call()
    return _held() - before + 0 * (kept is None)
