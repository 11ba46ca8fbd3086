"""A model's density and its gradient, by one recorded run."""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial, reduce
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from pyro_flows.infer.machine.graph import Graph, RecordError, record

__all__ = ["FAILURES", "Recorded", "seeded_alike", "value_and_slope"]

FAILURES = (ValueError, RuntimeError, ArithmeticError)  # of a model where its density is undefined
RECORDINGS = 8  # at most, because tensors of the model and the dtype may change
RUNS = 40  # plain ones that take as long as a recording
SHAPES = 12  # numbers of points that are recorded
OFTEN = 30  # calls that make up for a recording
SIZES = (8, 64)  # numbers of points that smaller ones are filled up to
SMALL = 2**14  # bytes of a tensor
FAR = 3.0
DIGITS, FEW_DIGITS = 100.0, 1e4  # units of rounding by which equal runs differ, one by one and many at once

T = TypeVar("T")
Density = Callable[[Tensor], Tensor]
Pair = tuple[Tensor, Tensor]


class Recorded:
    """The density at many points and its gradient, by a recording of ``alone``, the density of one point.

    One run of ``alone`` and its gradient are recorded, compared with plain runs near and far, and replayed for many
    points under ``torch.vmap``; a number of points that occurs often is recorded again. If ``torch.vmap`` refuses, the
    recording runs point by point. Where plain runs raise, values are NaN. The recording is renewed when a tensor that
    the model reads has changed, and compared with a plain run at calls 1, 2, 4, 8, ... ``why_not`` says why there is
    none, as where it would take more than ``seconds``.
    """

    def __init__(self, alone: Density, seconds: float = math.inf) -> None:
        self.alone, self.seconds = alone, seconds
        self.why_not: str | None = None
        self.batches: bool | None = None  # whether one run serves many points, once it is known
        self._recordings = self._calls = 0
        self._sources: list[Graph] = []  # the last has value and gradient
        self._first: Graph | None = None
        self._shapes: dict[tuple[int, bool], Graph] = {}
        self._often: Counter[tuple[int, bool]] = Counter()

    def __call__(self, z: Tensor, slope: bool = True) -> Pair | None:
        """Returns values ``(S,)`` at ``(S, dim)`` and, if wanted, gradients.

        ``None`` without a recording, and where no value is finite, because a plain run may say why.
        """
        z = z.detach()
        if self.why_not is not None or not (self._holds(z) or self._record(z)):
            return None
        if torch._C._len_torch_dispatch_stack():  # another recorder must see no plain runs
            return self._many(z, slope)
        self._calls += 1
        if self._calls.bit_count() == 1:
            row = z[self._calls % len(z)]
            self._compare([row], [self._plain(row)])
        found = None if self.why_not else self._many(z, slope)
        return found if found and found[0].isfinite().any() else None

    def _holds(self, z: Tensor) -> bool:
        known = bool(self._sources) and self._like == (z.dtype, z.device)
        return known and all(graph.holds for graph in self._sources)

    def _many(self, z: Tensor, slope: bool) -> Any:
        found: Any
        one, count = self._sources[-1] if slope else self._value(z), len(z)
        if not self.batches:
            return tuple(map(torch.stack, zip(*map(one, z), strict=True)))
        if self._fills:
            size = next((size for size in SIZES if count <= size), count)
            z = torch.cat((z, z[-1:].expand(size - count, -1))) if count < size else z
        key = len(z), slope
        if key in self._shapes:
            found = self._shapes[key](z)
        else:
            self._often[key] += 1
            nested = torch._C._len_torch_dispatch_stack()
            if nested or self._often[key] < OFTEN or len(self._shapes) == SHAPES:
                found = _mapped(one, z)
            else:
                found, self._shapes[key] = record(lambda: _mapped(one, z), [z])
        return found if len(z) == count else [each[:count] for each in found]

    @property
    def _fills(self) -> bool:
        """Whether tensors are so small that calls cost as much for more points."""
        graph = self._sources[-1]
        return graph.bytes * SIZES[-1] <= SMALL * len(graph)

    def _value(self, z: Tensor) -> Graph:
        """Returns the recording without the gradient."""
        if self._first is None:
            self._first = seeded_alike(lambda row: record(lambda: self._sources[-1](row)[:1], [row])[1], z[0])
        return self._first

    def _record(self, z: Tensor) -> bool:
        """Records a run and compares it with plain ones; false without success, or where nothing is finite."""
        far = FAR * torch.arange(1, z.shape[1] + 1).to(z).cos()
        rows = torch.stack((z[0], z[-1] + 0.1, z[0] + far, z[0] - far))
        self._like, self._first, self._shapes, self._often = (z.dtype, z.device), None, {}, Counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            begin = time.monotonic()
            plain = [self._plain(rows[0])]
            if RUNS * (time.monotonic() - begin) > self.seconds:
                self.why_not = "a recording of its run would take too long"
                return False
            try:
                self._sources = seeded_alike(self._graphs, rows[0])
                plain += [self._plain(row) for row in rows[1:]]
                if not any(value.isfinite() for value, _ in plain):
                    self._sources = []
                    return False
                self._compare(rows, plain)
            except Exception as error:  # models and recorders raise anything
                if isinstance(error, RecordError) or plain[0][0].isfinite():
                    self.why_not = str(error).partition("\n")[0]  # Pyro adds a table
                return False
        self._recordings += 1
        if self._recordings == RECORDINGS:
            self.why_not = "the tensors that the model reads change all the time"
        if self.why_not is None:
            try:
                many = zip(*seeded_alike(self._mapped, rows), strict=True)
                alone = (seeded_alike(self._sources[-1], row) for row in rows)
                self.batches = all(_agree(*pair, FEW_DIGITS) for pair in zip(many, alone, strict=True))
            except Exception:  # kernels without a rule raise anything
                self.batches = False
        return self.why_not is None

    def _mapped(self, rows: Tensor) -> tuple[Tensor, ...]:
        return _mapped(self._sources[-1], rows)

    def _graphs(self, row: Tensor) -> list[Graph]:
        """Records value and gradient; returns the graph after those that it was made from."""
        failures: list[Tensor] = []
        run = partial(self._checked, failures=failures)
        row = row.clone().requires_grad_()
        graph = record(lambda: _sloped(run, row), [row], failures)[1]
        if not graph.mutates:
            return [_turned(graph)]
        # Changes of tensors, and the gradients of changes, have no rules for many points.
        failures.clear()
        with torch.no_grad():
            value = record(lambda: run(row), [row], failures)[1]
        pure = value.functional(row)
        return [value, _turned(record(lambda: _sloped(pure.differentiable, row), [row])[1])]

    def _checked(self, row: Tensor, failures: list[Tensor]) -> Pair:
        """Returns the density at a point, and whether everything is defined there."""
        with _Validity() as validity:
            total = self.alone(row)
        fine = [*validity.found, *((code == 0).all() for code in failures)]
        return total, reduce(torch.logical_and, fine, torch.ones((), dtype=torch.bool, device=row.device))

    def _compare(self, rows: Iterable[Tensor], plain: Iterable[Pair]) -> None:
        found = (seeded_alike(self._sources[-1], row) for row in rows)
        if not all(_agree(*pair, DIGITS) for pair in zip(found, plain, strict=True)):
            self.why_not = "a recorded run gives other numbers than a plain one"

    def _plain(self, row: Tensor) -> Pair:
        try:
            return seeded_alike(lambda row: value_and_slope(self.alone, row), row)
        except FAILURES:
            return row.new_full((), math.nan), row


class _Validity(TorchFunctionMode):
    """Collects what torch's validation finds, which cannot raise in a recording."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._is_all_true:
            self.found.append(args[0].all())
            return True
        if func is torch.isclose and kwargs == {"atol": 1e-6}:  # torch branches on whether matrices are symmetric
            return torch.ones(args[0].shape, dtype=torch.bool, device=args[0].device)
        return func(*args, **(kwargs or {}))


def value_and_slope(density: Density, z: Tensor) -> Pair:
    """Returns log-densities and their gradients at ``z``, in the density's own way if it has one."""
    own: Callable[[Tensor], Pair] | None = getattr(density, "value_and_slope", None)
    if own is not None:
        return own(z)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = density(z)
        return value.detach(), torch.autograd.grad(value.sum(), z)[0]


def seeded_alike(fn: Callable[[Tensor], T], z: Tensor) -> T:
    """Calls a function with the same random numbers, hence minibatches, each time."""
    with torch.random.fork_rng(devices=[z.device] if z.is_cuda else []):
        torch.manual_seed(0)
        return fn(z)


def _sloped(run: Callable[[Tensor], Any], row: Tensor) -> Pair:
    with torch.enable_grad():
        value, fine = run(row)
        (slope,) = torch.autograd.grad(value, row)
    return torch.where(fine, value.detach(), math.nan), slope


def _turned(graph: Graph) -> Graph:
    """Turns products of a constant matrix and one that differs between points.

    ``torch.vmap`` makes one product for all points only if the second matrix is the constant one, up to 25 times as
    fast.
    """
    for node in graph.program.graph.nodes:
        first = node.args[0] if node.target in _PRODUCTS else None
        if isinstance(first, fx.Node) and first.op == "placeholder" and first.name.startswith("c"):
            node.target = _PRODUCTS[node.target]
    graph.program.recompile()
    return Graph(graph.program, graph.constants, graph.read, graph.bytes, graph.mutates)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if b.shape[1] == 1:
        return torch.mv(a, b[:, 0])[:, None]
    return torch.matmul(b.mT.contiguous(), a.mT).mT.contiguous()


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return _mm(a[0], b[0])[None] if len(a) == 1 else torch.bmm(a, b)


_PRODUCTS = {torch._C._VariableFunctions.mm: _mm, torch._C._VariableFunctions.bmm: _bmm}


def _mapped(graph: Graph, rows: Tensor) -> tuple[Tensor, ...]:
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]
    return torch.vmap(graph, randomness="same")(rows)


def _agree(found: Iterable[Tensor], plain: Iterable[Tensor], digits: float) -> bool:
    """Whether values and gradients are equal but for rounding, or both undefined."""
    (value, slope), (known, expected) = found, plain
    if not known.isfinite():
        return not value.isfinite()
    near = digits * torch.finfo(known.dtype).eps

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, 0.0, near * (1 + b[b.isfinite()].abs().sum().item()), equal_nan=True)

    return same(value, known) and same(slope, expected)
