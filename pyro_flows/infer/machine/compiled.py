"""Many training steps in one call of machine code, which a second process compiles and the disk keeps."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_flows.core.modes import on_cpu
from pyro_flows.infer.machine.budget import Budget
from pyro_flows.infer.machine.graph import Graph, alike
from pyro_flows.infer.machine.optimizers import BETAS, EPS, AdamW

__all__ = ["Compile", "CompiledSteps", "cache_folder"]

Compile = Literal["auto"] | bool
STEPS = 64  # at most in a call
COST = 30.0, 0.05  # seconds of compiling, in all and for each call in the graph
GAIN = 2.0  # least time left, in units of that cost
LEAST = 1.0  # seconds left that a file on disk is worth
LOOKING = 10.0  # seconds left in which a graph made for the purpose is worth it
FILES = 100  # kept on disk
LONGEST = 5000  # calls in a graph
CHECKED = 3  # steps that are compared with plain ones
TURNS = 3  # of compiled and of plain steps, after which the faster ones go on
CALL = 0.25  # seconds of a call, after which a fit can be interrupted

WORKER = Path(__file__).with_name("compile_worker.py")

_told: set[str] = set()


def cache_folder() -> Path:
    """The folder of compiled steps: ``PYRO_FLOWS_CACHE``, or ``pyro_flows`` in the user's folder of caches."""
    own = os.environ.get("PYRO_FLOWS_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyro_flows"


class CompiledSteps:
    """Training steps that a second process compiles while plain ones go on.

    ``compile`` says whether: ``"auto"`` where the fit will take much longer than compiling, or the file is there, and
    then only while they are faster than plain ones; ``True`` waits for it, and keeps them.  Files are named by a
    checksum of graph, shapes, torch and processor.

    Attributes:
        why_not: why steps are not compiled, if so.
        trusted: whether the first compiled steps were found equal to plain ones.
    """

    def __init__(self, compile: bool | str, why_not: str | None = None) -> None:
        self.compile, self.why_not = compile, None if compile else "compile=False"
        self._run: Any = None
        self._process: subprocess.Popen[bytes] | None = None
        self._work: tempfile.TemporaryDirectory[str] | None = None
        self._path: Path | None = None
        self._constants: list[Tensor] = []
        self.steps = STEPS
        self.trusted = False
        self._times: dict[bool, list[float]] = {True: [], False: []}  # of a step, compiled or plain
        if compile and why_not is not None:
            self.refuse(why_not)

    def worth_a_look(self, seconds: float) -> bool:
        """Whether steps may be compiled, or be on disk, in a fit with ``seconds`` left, so that a graph is needed."""
        if self.why_not is not None or self.compile is True:
            return self.why_not is None
        return seconds > GAIN * COST[0] or (seconds > LOOKING and any(cache_folder().glob("*.pt2")))

    def consider(
        self,
        graph: Graph | None,
        optimizer: AdamW,
        each: Sequence[Tensor],
        tables: Sequence[Tensor],
        seconds: float,
        scores: int = 1,
    ) -> None:
        """Starts compiling ``graph`` if that pays in a fit with ``seconds`` left, or takes it from disk.

        ``graph`` is of the parameters and of a step's part of ``each``; of rows of ``tables``, if there are any, in
        place of the first, which has their numbers.  It returns a tensor of ``scores`` and the gradients.
        """
        if self.why_not is not None or self._path is not None or graph is None:
            return
        if not graph.portable:
            self.refuse("a kernel of this flow is no plain operation of torch")
            return
        if len(graph) > LONGEST:
            self.refuse(f"{len(graph)} operations, more than {LONGEST}, take too long to compile")
            return
        self._constants = [each.detach().clone(memory_format=torch.contiguous_format) for each in graph.constants]
        self.steps = len(each[0])
        inputs = [*self._inputs(optimizer, 1.0, [0.0], [0.0], each, tables), self._constants]
        pairs = zip(optimizer.offsets, optimizer.parameters, strict=True)
        request = {
            "code": graph.program.code,
            "places": [(at, p.numel(), tuple(p.shape)) for at, p in pairs],
            "scores": scores,
            "parts": [(speed, part.start, part.stop) for speed, part in optimizer.parts.items()],
            "betas": BETAS,
            "eps": EPS,
            "threads": torch.get_num_threads(),
        }
        self._path = cache_folder() / f"{_checksum(request, inputs)}.pt2"
        if self._path.exists():
            if self.compile is True or seconds > LEAST:
                self._load()
            else:
                self.why_not = "the fit is too short"
            return
        cost = COST[0] + COST[1] * len(graph)
        if self.compile is not True and seconds < GAIN * cost:
            self._path = None  # steps may turn out slower
            return
        if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
            self._give_up("no C++ compiler was found (g++, clang++, or CXX)")
            return
        try:
            self._start({**request, "inputs": inputs}, self._path)
        except OSError as error:
            self._give_up(f"the cache of compiled steps cannot be written ({error}); set PYRO_FLOWS_CACHE")
        if self.compile is True and self._process is not None:
            self._process.wait()

    def ready(self) -> bool:
        """Whether compiled steps are there."""
        if self._process is not None and self._process.poll() is not None:
            code = self._process.returncode
            self.close()
            if code == 0 and self._path is not None and self._path.exists():
                self._load()
            else:
                self._give_up(f"the compiler failed (exit status {code})")
        return self._run is not None

    def at_once(self, most: int, budget: Budget, last: int | None) -> int:
        """Returns the steps of the next call, which takes a part of a second."""
        if not self.trusted:
            most = min(most, CHECKED)
        if last is not None:
            most = min(most, last - budget.done)
        seconds = min(CALL, budget.left())
        return max(1, min(most, self.steps, int(seconds / max(budget.step_seconds, 1e-9))))

    def has_turn(self) -> bool:
        """Whether the next steps are compiled ones; until it is known which are faster, plain ones take turns."""
        return self.ready() and not (self._undecided() and len(self._times[True]) > len(self._times[False]))

    def _undecided(self) -> bool:
        return self.compile == "auto" and self.trusted and len(self._times[False]) < TURNS

    @contextmanager
    def turn(self, steps: int) -> Iterator[None]:
        """Times the next steps, which are taken inside; ends compiled ones that turn out to be slower."""
        compiled, timed = self.has_turn(), self._undecided()
        begin = time.monotonic()
        yield
        if timed and self._run is not None:
            self._times[compiled].append((time.monotonic() - begin) / steps)
            if not self._undecided() and min(self._times[True]) > min(self._times[False]):
                self.refuse("compiled steps take longer than plain ones")

    def agrees(self, optimizer: AdamW, state: Sequence[Tensor]) -> bool:
        """Whether plain steps gave the same buffers; compiled steps are trusted from then on."""
        self.trusted = all(map(alike, state[:3], optimizer.buffers[:3]))
        return self.trusted

    def run(
        self,
        optimizer: AdamW,
        most: float | None,
        factors: Sequence[float],
        weights: Sequence[float],
        each: Sequence[Tensor],
        tables: Sequence[Tensor],
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Takes a step for each of ``factors``; returns the new buffers, and each step's scores and norm."""
        rates = [optimizer.lr * factor for factor in factors]
        flat = [*tree_leaves(self._inputs(optimizer, most, rates, weights, each, tables)), *self._constants]
        scores, norms, *buffers = self._run(flat)
        return buffers, scores[: len(factors)], norms[: len(factors)]

    def close(self) -> None:
        """Stops the second process."""
        if self._process is not None:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._process = None
        if self._work is not None:
            self._work.cleanup()
            self._work = None

    def refuse(self, why_not: str) -> None:
        """Goes on without compiled steps; says so if they were asked for."""
        self._run, self.why_not = None, why_not
        if self.compile is True:
            self._tell()

    @on_cpu
    def _inputs(
        self,
        optimizer: AdamW,
        most: float | None,
        rates: Sequence[float],
        weights: Sequence[float],
        each: Sequence[Tensor],
        tables: Sequence[Tensor],
    ) -> list[Any]:
        like = optimizer.values
        settings = torch.tensor([float("inf") if most is None else most, optimizer.weight_decay], dtype=like.dtype)
        padded = torch.zeros(2, self.steps, dtype=like.dtype)
        padded[0, : len(rates)], padded[1, : len(weights)] = torch.tensor(rates), torch.tensor(weights)
        count = torch.tensor(len(rates))
        return [optimizer.buffers, settings, count, padded[0].clone(), padded[1].clone(), list(each), list(tables)]

    def _start(self, request: dict[str, Any], path: Path) -> None:
        folder = path.parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for old in sorted(folder.iterdir(), key=lambda each: each.stat().st_mtime)[:-FILES]:
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        self._work = tempfile.TemporaryDirectory(dir=folder)
        given = os.path.join(self._work.name, "request.pt")
        torch.save(request, given)
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), given, str(path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # to stop the compiler's own processes, too
        )

    def _load(self) -> None:
        # What torch._inductor.aoti_load_package does, without loading the compiler.
        try:
            self._run = torch._C._aoti.AOTIModelPackageLoader(str(self._path), "model", True, 1, -1).run
        except RuntimeError as error:
            self._give_up(f"the compiled steps in {str(self._path)!r} cannot be loaded ({error}); delete the file")

    def _give_up(self, why_not: str) -> None:
        self.refuse(why_not)
        self._tell()

    def _tell(self) -> None:
        if self.why_not is not None and self.why_not not in _told:
            _told.add(self.why_not)
            warnings.warn(f"training goes on without compiled steps: {self.why_not}", RuntimeWarning, stacklevel=3)


def _checksum(request: dict[str, Any], inputs: list[Any]) -> str:
    leaves = tree_leaves(inputs)
    layout = [(tuple(each.shape), each.stride(), str(each.dtype)) for each in leaves]
    machine = platform.machine(), sys.platform, torch.backends.cpu.get_cpu_capability(), torch.__version__
    worker = WORKER.read_bytes()
    return hashlib.sha256(repr((sorted(request.items()), layout, machine)).encode() + worker).hexdigest()[:32]
