"""Several processes in one fit, by ``torch.distributed``.

An initialized process group is the switch; without one, or with one process, every function here does nothing.

Processes keep pace by messages: every collective operation follows an exchange of a few numbers.  An error of one
process takes the place of its next message, so that it reaches the others wherever they are, and all raise.  An
interruption waits for the next message, so that all stop at the same step.  The clock of the first process counts, at
the last message, so that all decide alike about time.
"""

from __future__ import annotations

import io
import math
import signal
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from pyro_flows.infer.machine.interrupts import own_handler

__all__ = [
    "average_buffers",
    "averaged",
    "clock",
    "count",
    "devices",
    "everyone",
    "from_first",
    "gathered",
    "heed",
    "joined",
    "led",
    "made_alike",
    "own_draws",
    "part",
    "primed",
    "rank",
    "refuse_different",
    "several",
    "summed",
    "telling",
    "total",
]

Density = TypeVar("Density", bound=Callable[[Tensor], Tensor])
Result = TypeVar("Result")
NUMBERS = 4  # that a message holds at most
MESSAGES = 3.0  # as long as the operations that share a call
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
KINDS = (KeyboardInterrupt, ValueError, TypeError, FloatingPointError, OSError)  # that others raise, too


class _Meeting:
    """The messages of one fit; ``over`` if the others wait for none."""

    def __init__(self, who: str) -> None:
        self.who = who
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        on_cpu = "cpu" in distributed.get_backend_config()
        self.device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        self.time, self.fastest = time.monotonic(), math.inf  # of all messages, in seconds
        self.interrupted = self.over = self.leading = False

    def exchange(self, topic: str, *numbers: float, error: BaseException | None = None) -> Tensor:
        """Sends numbers to all; returns those of all, shape ``(processes, 4)``, float64 on the CPU."""
        told = [error is not None, self.interrupted, time.monotonic(), zlib.crc32(topic.encode()), *numbers]
        own = torch.tensor(told + [0] * (NUMBERS - len(numbers)), dtype=torch.float64, device=self.device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        self.over = True  # unless all answer, and agree
        distributed.all_gather(found, own)
        failed, interrupted, clocks, topics, *rest = torch.stack(found).cpu().unbind(1)
        self.time, self.fastest = float(clocks[0]), min(self.fastest, time.monotonic() - told[2])
        if failed.any():
            self._raise(error)
        elif interrupted.any():
            raise KeyboardInterrupt
        elif (topics != topics[0]).any():
            raise RuntimeError(
                f"{self.who}: the processes went apart; expected each to call it with the same arguments and an equal "
                "model on equal machines"
            )
        else:
            self.over = False
        return torch.stack(rest, 1)

    def _raise(self, error: BaseException | None) -> None:
        kind = next((k for k, each in enumerate(KINDS) if isinstance(error, each)), len(KINDS))
        texts: list[Any] = [None] * self.size
        distributed.all_gather_object(texts, None if error is None else (kind, f"{type(error).__name__}: {error}"))
        if error is None:
            first, (kind, text) = next((k, each) for k, each in enumerate(texts) if each is not None)
            raise (*KINDS, RuntimeError)[kind](f"{self.who}: process {first} raised {text}")

    def tell(self, error: BaseException) -> None:
        """Makes the others raise an error of this process, unless they know or are gone."""
        if not self.over:
            with suppress(RuntimeError):
                self.exchange("error", error=error)

    @contextmanager
    def holding_interrupts(self) -> Iterator[None]:
        """Keeps Ctrl-C for the next message; a second one counts at once."""
        handler = own_handler()
        if handler is None:
            yield
            return

        def note(number: int, frame: Any) -> None:
            if self.interrupted:
                handler(number, frame)
            self.interrupted = True

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)

    @torch.no_grad()
    def evaluated(self, density: Any, z: Tensor, gradient: bool) -> Tensor:
        """Evaluates points of the first process: value, whether a process failed, and the gradient if asked for."""
        distributed.broadcast(z, 0)
        table = z.new_zeros(len(z), 2 + gradient * z.shape[1], dtype=torch.float64)
        rows, own = part(table, self), part(z, self)
        if len(own):
            try:
                if gradient:
                    rows[:, 0], rows[:, 2:] = density.value_and_slope(own)
                else:
                    rows[:, 0] = density(own)
            except Exception:  # the first process repeats the call, and its caller decides
                rows[:, 1] = 1.0
        distributed.all_reduce(table)
        return table


_meeting: _Meeting | None = None


def _active() -> _Meeting | None:
    return None if _meeting is None or _meeting.leading else _meeting


@contextmanager
def joined(who: str) -> Iterator[None]:
    """Joins all processes of the default group in the call of ``who`` inside.

    An error of one process is raised in all, and warnings are those of the first.  Global generators of torch begin
    alike; those of the others are restored.
    """
    global _meeting
    if not several() or _meeting is not None:
        yield
        return
    meeting = _Meeting(who)
    with ExitStack() as stack:
        stack.enter_context(meeting.holding_interrupts())
        if meeting.rank:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(torch.random.fork_rng(devices()))
        _meeting = meeting
        try:
            meeting.exchange(who)
            _share_random()
            yield
            meeting.exchange("end")
        except BaseException as error:
            meeting.tell(error)
            raise
        finally:
            _meeting = None


@contextmanager
def telling() -> Iterator[None]:
    """Raises an error inside in all processes, even if the caller catches it."""
    try:
        yield
    except BaseException as error:
        meeting = _active()
        if meeting is not None:
            meeting.tell(error)
        raise


def several() -> bool:
    """Tells whether a fit that begins now is one of several processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def rank() -> int:
    """The number of this process in the fit, from 0."""
    meeting = _active()
    return 0 if meeting is None else meeting.rank


def count() -> int:
    """The number of processes in the fit."""
    meeting = _active()
    return 1 if meeting is None else meeting.size


def clock() -> float:
    """``time.monotonic()``, of the first process at the last message."""
    meeting = _active()
    return time.monotonic() if meeting is None else meeting.time


def part(rows: Tensor, meeting: _Meeting | None = None) -> Tensor:
    """The rows of this process: a view of consecutive ones, of nearly equal number."""
    meeting = meeting or _active()
    return rows if meeting is None else rows.tensor_split(meeting.size)[meeting.rank]


def total(*numbers: float) -> list[float]:
    """Adds up numbers, four at most, over all processes."""
    meeting = _active()
    if meeting is None:
        return list(numbers)
    return meeting.exchange("total", *numbers).sum(0)[: len(numbers)].tolist()


def averaged(
    parameters: Sequence[Tensor], grads: Sequence[Tensor | None], score: float, rows: int
) -> tuple[float, int, Sequence[Tensor | None]]:
    r"""Averages a score and the gradients of parameters over the rows of all processes.

    Each process gives means :math:`g_r` over its own :math:`n_r` rows, and gets :math:`\sum_r n_r g_r / \sum_r n_r`, by
    one sum over all processes in one flat tensor, as ``DistributedDataParallel`` makes of its buckets.

    Returns:
        The mean score, the number of rows of all processes, and the gradients.
    """
    meeting = _active()
    if meeting is None:
        return score, rows, grads
    scores, counts = meeting.exchange("gradients", score * rows, rows)[:, :2].unbind(1)
    whole = int(counts.sum())
    if not whole:
        return score, 0, grads
    return float(scores.sum()) / whole, whole, _added_up(parameters, grads, rows / whole)


def summed(parameters: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Adds up the gradients of parameters over all processes, like :func:`averaged`."""
    meeting = _active()
    if meeting is None:
        return grads
    meeting.exchange("gradients")
    return _added_up(parameters, grads, 1.0)


def _added_up(parameters: Sequence[Tensor], grads: Sequence[Tensor | None], share: float) -> Sequence[Tensor | None]:
    found: list[Tensor | None] = [None for _ in parameters]
    for dtype, device in dict.fromkeys((p.dtype, p.device) for p in parameters):
        own = [k for k, p in enumerate(parameters) if (p.dtype, p.device) == (dtype, device)]
        flags = torch.tensor([grads[k] is not None for k in own], dtype=dtype, device=device)
        parts = [torch.zeros_like(parameters[k]) if (grad := grads[k]) is None else share * grad for k in own]
        flat = torch.cat([*(part.flatten() for part in parts), flags])
        distributed.all_reduce(flat)
        *sums, known = flat.split([part.numel() for part in parts] + [len(own)])
        for k, each, given in zip(own, sums, known.tolist(), strict=True):
            found[k] = each.view_as(parameters[k]) if given else None
    return found


def gathered(rows: int, *own: Tensor) -> tuple[Tensor, ...]:
    """Joins the :func:`part` that each process has of vectors ``(rows,)``."""
    meeting = _active()
    if meeting is None:
        return own
    meeting.exchange("rows", rows)
    whole = torch.zeros(rows, len(own), dtype=torch.float64, device=own[0].device)
    part(whole).copy_(torch.stack([each.double() for each in own], 1))
    distributed.all_reduce(whole)
    return tuple(column.to(each.dtype) for column, each in zip(whole.unbind(1), own, strict=True))


def from_first(make: Callable[[], Result]) -> Result:
    """Makes something in the first process, and gives all a copy."""
    meeting = _active()
    if meeting is None:
        return make()
    made = make() if meeting.rank == 0 else None
    meeting.exchange("object")
    box = [_packed(made) if meeting.rank == 0 else None]
    distributed.broadcast_object_list(box, 0)
    found: Any = made if meeting.rank == 0 else _unpacked(box[0])
    return found


def everyone(own: Result) -> list[Result]:
    """Lists what each process gives, in the order of their ranks."""
    meeting = _active()
    if meeting is None:
        return [own]
    meeting.exchange("objects")
    found: list[Any] = [None] * meeting.size
    distributed.all_gather_object(found, _packed(own))
    return [_unpacked(each) for each in found]


def refuse_different(who: str, own: Mapping[str, Mapping[str, object]], remedy: str) -> None:
    """Refuses a fit whose processes differ in these mappings by topic.

    Raises:
        ValueError: for the first difference, in all processes.
    """
    first, *others = everyone(own)
    for k, other in enumerate(others, 1):
        for topic, expected in first.items():
            for name in {**expected, **other[topic]}:
                one, two = expected.get(name), other[topic].get(name)
                if one != two:
                    raise ValueError(
                        f"{who}: expected the same {topic} in all processes, got {name} as {one} in process 0 and "
                        f"{two} in process {k}; {remedy}"
                    )


def made_alike(module: nn.Module) -> None:
    """Copies parameters and buffers of the first process to the others."""
    if _active() is not None:
        module.load_state_dict(from_first(module.state_dict))


@torch.no_grad()
def average_buffers(module: nn.Module) -> None:
    """Averages buffers of real numbers, such as running statistics, over all processes."""
    meeting = _active()
    buffers = [each for each in module.buffers() if each.is_floating_point() and each.numel()]
    if meeting is None or not buffers:
        return
    meeting.exchange("buffers")
    for buffer in buffers:
        first = buffer.clone()
        distributed.broadcast(first, 0)
        change = torch.where(buffer == first, 0.0, buffer - first)  # of infinities that are alike, 0, too
        distributed.all_reduce(change)
        buffer.copy_(first + change / meeting.size)


def primed(module: nn.Module, call: Callable[[], object]) -> None:
    """Calls the module on the first batch of all processes if a layer, e.g. ``ActNorm``, is set by its first batch."""
    if all(bool(getattr(each, "initialized", True)) for each in module.modules()):
        return
    with torch.no_grad(), torch.random.fork_rng(devices()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each process sees all rows, so that none is alone
        call()


@contextmanager
def own_draws(number: int) -> Iterator[None]:
    """Gives each process random numbers of its own inside, other ones for each ``number``."""
    meeting = _active()
    if meeting is None:
        yield
        return
    with torch.random.fork_rng(devices()):
        torch.manual_seed(hash((torch.initial_seed(), number, meeting.rank)))
        yield


def led(density: Density, like: Tensor, run: Callable[[Density], Result]) -> Result:
    """Runs a search in the first process, for which all evaluate their part of each call of its density.

    Only the first process decides, by its own clock; ``like`` has the device of the points.  All get the result, and
    the first one's random state.
    """
    meeting = _active()
    if meeting is None:
        return run(density)
    result: Any = None
    if meeting.rank == 0:
        shared: Any = _Shared(density, meeting)
        meeting.leading = True
        try:
            result = run(shared)
        finally:
            meeting.leading = False
        meeting.exchange("led")
    else:
        while (order := meeting.exchange("led")[0].int().tolist())[0]:
            z = torch.empty(order[:2], dtype=DTYPES[order[2]], device=like.device)
            meeting.evaluated(density, z, bool(order[3]))
    _share_random()
    return from_first(lambda: result)


def heed() -> None:
    """Raises an interruption in the process that leads, which may not send a message for long."""
    if _meeting is not None and _meeting.leading and _meeting.interrupted:
        raise KeyboardInterrupt


class _Shared:
    """A density of which each process evaluates its part, if that saves more time than the messages take."""

    def __init__(self, density: Any, meeting: _Meeting) -> None:
        self.density, self.meeting = density, meeting

    def __getattr__(self, name: str) -> Any:
        return getattr(self.density, name)

    def __call__(self, z: Tensor) -> Tensor:
        """Returns log-densities ``(S,)`` of points ``(S, dim)``, without gradient."""
        table = self._table(z, False)
        return self.density(z) if table is None else table[:, 0]

    def value_and_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log-densities and gradients ``(S, dim)``."""
        table = self._table(z, True)
        return self.density.value_and_slope(z) if table is None else (table[:, 0], table[:, 2:])

    def _table(self, z: Tensor, gradient: bool) -> Tensor | None:
        seconds = getattr(getattr(self.density, "pace", None), "seconds_per_draw", math.inf)
        if len(z) < 2 or seconds * len(z) * (1 - 1 / self.meeting.size) <= MESSAGES * self.meeting.fastest:
            return None
        self.meeting.exchange("led", *z.shape, DTYPES.index(z.dtype), gradient)
        table = self.meeting.evaluated(self.density, z.detach().contiguous(), gradient)
        return None if table[:, 1].any() else table.to(z.dtype)


def devices() -> list[int]:
    """The GPU whose random numbers this process draws, if any."""
    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []


def _share_random() -> None:
    """Gives all processes the random state of the first."""

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices())]

    on_cpu, *others = from_first(states)
    torch.set_rng_state(on_cpu)
    for device, state in zip(devices(), others, strict=False):
        torch.cuda.set_rng_state(state, device)


def _packed(thing: object) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


def _unpacked(packed: Any) -> Any:
    def here(storage: Any, place: str) -> Any:
        return storage if place == "cpu" else storage.cuda()  # the device of this process

    return torch.load(io.BytesIO(packed), map_location=here, weights_only=False)
