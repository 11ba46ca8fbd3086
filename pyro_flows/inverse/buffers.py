"""The buffers of one sweep through a triangular network, and the solver that owns them.

Buffers are feature-major, ``(features, columns)``, with units sorted by time.  Views cost a small problem more than its
arithmetic, so a sweep makes them once, as a list of calls.
"""

from __future__ import annotations

import hashlib
import uuid
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from pyro_flows.nets.activations import in_place, known_activations
from pyro_flows.nets.structure import Structure, keep
from pyro_flows.univariate import Affine, Shift, Spline
from pyro_flows.univariate.base import Univariate

__all__ = ["ForwardSweep", "ReverseSweep", "Solver", "columns_at_once", "named"]

# These have the same mathematics in every process; a user's class may change behind its name.
_OURS = {Affine, Shift, Spline}

Calls = list[Callable[[], object]]


def columns_at_once(n: int, rows: int, device: torch.device) -> int:
    """The samples of one sweep: as fit a processor's cache, or a part of a GPU's memory."""
    limit = 1024 if device.type == "cpu" else max(1024, 2**27 // rows)
    return max(1, n) if n <= limit + limit // 2 else limit


class Drawing(Protocol):
    """Makes the values of a step from its parameters, and the rows of layer 0 that code them."""

    shared: bool  # whether layer 0 is the values themselves

    def draws(self, start: int, stop: int, z: Tensor, params: Tensor, x: Tensor, coded: Tensor) -> Calls:
        """Calls that fill ``x`` and ``coded`` at ranks ``[start, stop)``, all feature-major."""


class _Sweep:
    key: object = None

    def __init__(
        self,
        solver: Solver[Univariate | Drawing],
        like: Tensor,
        columns: int,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] = (),
        own_bias: bool = False,
    ) -> None:
        self.structure = solver.structure
        self.like = like
        self.nbytes = 0
        self.calls: Calls = []
        *inner, head = weights[:-1] if self.structure.direct else weights
        # Views of the weights, or copies with zeros in masked places, refreshed at each run.
        self.inner = inner if self.structure.dense else [self.empty(*w.shape) for w in inner]
        # Outputs by dimension: one step's are neighbors.
        self.head = self.empty(*head.shape)
        if self.structure.dense:
            self.calls.append(partial(self.by_dimension(self.head).copy_, self.by_parameter(head)))
        if self.structure.direct:
            self.direct = self.empty(*weights[-1].shape)
            self.calls.append(partial(self.by_dimension(self.direct).copy_, self.by_parameter(weights[-1])))
        self._make(solver, columns, biases, own_bias)
        del self.like

    def _make(
        self, solver: Solver[Univariate | Drawing], columns: int, biases: Sequence[Tensor], own_bias: bool
    ) -> None:
        raise NotImplementedError

    def empty(self, *shape: int) -> Tensor:
        made = self.like.new_empty(shape)
        self.nbytes += made.nbytes
        return made

    def by_dimension(self, rows: Tensor) -> Tensor:
        """Outputs as stored here, shape ``(input_dim, num_params, ...)``."""
        return rows.view(self.structure.input_dim, self.structure.num_params, *rows.shape[1:])

    def by_parameter(self, rows: Tensor) -> Tensor:
        """Outputs as in the weights, in the same shape."""
        return rows.unflatten(0, (self.structure.num_params, self.structure.input_dim)).transpose(0, 1)

    def load_weights(self, weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
        if not self.structure.dense:
            *inner, head = (keep(weight, mask) for weight, mask in zip(weights, masks, strict=True))
            for held, given in zip(self.inner, inner, strict=True):
                held.copy_(given)
            self.by_dimension(self.head).copy_(self.by_parameter(head))


class ForwardSweep(_Sweep):
    """Solves for ``x``: fills ``x``, ``ladj`` and ``tape``, each ``(rows, columns)``."""

    def _make(
        self, solver: Solver[Univariate | Drawing], columns: int, biases: Sequence[Tensor], own_bias: bool
    ) -> None:
        s, family = self.structure, solver.univariate
        self.z, self.x = (self.empty(s.input_dim, columns) for _ in range(2))
        self.tape = self.empty(s.tape_rows, columns)
        params, self.ladj, hidden = self.tape.split((s.outputs, s.input_dim, sum(s.widths)))
        pre = s.rows(hidden, 0)
        overwriting = [in_place(act) if s.in_place(act) else None for act in solver.activations]
        post = [p if held else self.empty(*p.shape) for p, held in zip(pre, overwriting, strict=True)]
        # Biases as columns; with a context the first has one per sample.
        sizes = [*s.widths, s.outputs]
        self.first = self.empty(sizes[0], columns if own_bias else 1)
        self.biases = [self.first, *(bias[:, None] for bias in biases)]
        if biases:
            head_bias = self.empty(s.outputs, 1)
            self.calls.append(partial(self.by_dimension(head_bias).copy_, self.by_parameter(self.biases[-1])))
            self.biases[-1] = head_bias
        inputs = self.x
        if s.features is not None and not isinstance(family, Univariate) and not family.shared:
            inputs = self.empty(s.input_dim * s.features, columns)
        self._bind(solver, params, [inputs, *pre], [inputs, *post], overwriting)

    def _bind(
        self,
        solver: Solver[Univariate | Drawing],
        params: Tensor,
        pre: list[Tensor],
        post: list[Tensor],
        overwriting: list[Callable[[Tensor], Tensor] | None],
    ) -> None:
        s, calls, family = self.structure, self.calls, solver.univariate
        count, feeding, width, last = s.before, s.feeding, s.num_params, len(s.widths)
        by_dimension = params.view(s.input_dim, width, -1)

        def start(target: Tensor, bias: Tensor, weight: Tensor, source: Tensor, a: int, c: int, k: int) -> None:
            if c > a and k:
                calls.append(partial(torch.addmm, bias[a:c], weight[a:c, :k], source[:k], out=target[a:c]))
            elif c > a:
                calls.append(partial(target[a:c].copy_, bias[a:c]))

        def add(target: Tensor, weight: Tensor, source: Tensor, a: int, c: int, lo: int, hi: int) -> None:
            if c > a and hi > lo:
                calls.append(partial(target[a:c].addmm_, weight[a:c, lo:hi], source[lo:hi]))

        def finish(layer: int, a: int, c: int) -> None:
            if c == a:
                return
            into = pre[layer][a:c]
            if layer - 1 in s.joins:
                calls.append(partial(into.add_, pre[layer - 2][a:c]))
            overwrite = overwriting[layer - 1]
            if overwrite is not None:
                calls.append(partial(overwrite, into))
            else:
                calls.append(partial(_assign, post[layer][a:c], solver.activations[layer - 1], into))

        for layer in range(1, last + 1):
            ready = count[layer][0]
            start(
                pre[layer],
                self.biases[layer - 1],
                self.inner[layer - 1],
                post[layer - 1],
                0,
                ready,
                feeding[layer - 1][0],
            )
            finish(layer, 0, ready)
        for begin, end in s.blocks():
            for layer in range(1, last + 1):
                a, c = count[layer][begin], count[layer][end]
                start(
                    pre[layer],
                    self.biases[layer - 1],
                    self.inner[layer - 1],
                    post[layer - 1],
                    a,
                    c,
                    feeding[layer - 1][begin],
                )
            known = feeding[last][begin]
            start(
                params, self.biases[last], self.head, post[last], width * count[0][begin], width * count[0][end], known
            )
            seen = feeding[0][begin]
            if s.direct:
                add(params, self.direct, post[0], width * count[0][begin], width * count[0][end], 0, seen)
            for t in range(begin, end):
                d0, d1 = count[0][t], count[0][t + 1]
                add(params, self.head, post[last], width * d0, width * d1, known, feeding[last][t])
                if s.direct:
                    add(params, self.direct, post[0], width * d0, width * d1, seen, feeding[0][t])
                given, made, x = self.z[d0:d1], by_dimension[d0:d1], self.x[d0:d1]
                if isinstance(family, Univariate):
                    calls += family.solver(True, given, made.transpose(0, 1), x, self.ladj[d0:d1])
                else:
                    coded = post[0][feeding[0][t] : feeding[0][t + 1]]
                    calls += family.draws(d0, d1, given, made, x, coded)
                for layer in range(1, last + 1):
                    a, c = count[layer][t], count[layer][t + 1]
                    below = feeding[layer - 1]
                    add(pre[layer], self.inner[layer - 1], post[layer - 1], a, c, below[begin], below[t + 1])
                    finish(layer, a, c)

    def run(self, z: Tensor, first_bias: Tensor, weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
        """``z``: shape ``(columns, input_dim)``; ``first_bias``: ``(columns or 1, width)``."""
        self.z.copy_(z.T)
        self.load_weights(weights, masks)
        if len(self.biases) > 1:
            self.first.copy_(first_bias.T)
        else:
            self.by_dimension(self.first).copy_(self.by_parameter(first_bias.T))
        for call in self.calls:
            call()


class ReverseSweep(_Sweep):
    """Solves the transposed problem: fills ``adjoint``, the gradients of ``x``, outputs and layers."""

    def _make(
        self, solver: Solver[Univariate | Drawing], columns: int, biases: Sequence[Tensor], own_bias: bool
    ) -> None:
        s = self.structure
        self.adjoint = self.empty(s.adjoint_rows, columns)
        self.x = self.adjoint[: s.input_dim]
        self.params = self.adjoint[s.input_dim : s.input_dim + s.outputs]
        self.by_params = self.empty(s.input_dim, s.num_params, columns)
        self.slopes = [self.empty(width, columns) for width in s.widths]
        self._bind(s.rows(self.adjoint, s.input_dim + s.outputs))

    def _bind(self, pre: list[Tensor]) -> None:
        s, calls = self.structure, self.calls
        count, width, last = s.before, s.num_params, len(s.widths)
        by_dimension = self.params.view(s.input_dim, width, -1)
        # above[l]: gradients of what layer l feeds (layer 0 is x).
        above = [*pre, self.params]
        weights = [w.T for w in (*self.inner, self.head)]

        def from_step(layer: int, t: int) -> int:
            """The first row of ``above[layer]`` that an input of step t - 1 feeds."""
            return width * count[0][t] if layer == last else count[layer + 1][t - 1]

        def later(layer: int, end: int) -> int:
            """The first row of ``above[layer]`` that later blocks have done."""
            return width * count[0][end] if layer == last else count[layer + 1][end]

        def gather(layer: int, target: Tensor, a: int, c: int, lo: int, hi: int, fresh: bool) -> None:
            source = above[layer][lo:hi]
            if c > a and hi > lo:
                if fresh:
                    calls.append(partial(torch.mm, weights[layer][a:c, lo:hi], source, out=target[a:c]))
                else:
                    calls.append(partial(target[a:c].addmm_, weights[layer][a:c, lo:hi], source))
            elif c > a and fresh:
                calls.append(target[a:c].zero_)

        def finish(layer: int, a: int, c: int) -> None:
            if c == a:
                return
            calls.append(partial(pre[layer - 1][a:c].mul_, self.slopes[layer - 1][a:c]))
            if layer + 1 in s.joins:
                calls.append(partial(pre[layer - 1][a:c].add_, pre[layer + 1][a:c]))

        for begin, end in reversed(s.blocks()):
            gather(0, self.x, count[0][begin], count[0][end], later(0, end), len(above[0]), fresh=False)
            for layer in range(last, 0, -1):
                a, c = count[layer][begin], count[layer][end]
                gather(layer, pre[layer - 1], a, c, later(layer, end), len(above[layer]), fresh=True)
            for t in range(end - 1, begin - 1, -1):
                for layer in range(last, 0, -1):
                    a, c = count[layer][t], count[layer][t + 1]
                    gather(layer, pre[layer - 1], a, c, from_step(layer, t + 1), later(layer, end), fresh=False)
                    finish(layer, a, c)
                d0, d1 = count[0][t], count[0][t + 1]
                gather(0, self.x, d0, d1, from_step(0, t + 1), later(0, end), fresh=False)
                slope = self.by_params[d0:d1]
                calls.append(partial(by_dimension[d0:d1].addcmul_, slope, self.x[d0:d1].unsqueeze(1)))
        for layer in range(last, 0, -1):
            ready = count[layer][0]
            gather(layer, pre[layer - 1], 0, ready, 0, len(above[layer]), fresh=True)
            finish(layer, 0, ready)

    def run(
        self,
        grad_x: Tensor,
        by_params: Tensor,
        ladj_by_params: Tensor,
        slopes: Sequence[Tensor],
        weights: Sequence[Tensor],
        masks: Sequence[Tensor],
    ) -> None:
        """``grad_x``: shape ``(columns, input_dim)``; the others are feature-major, parameters first."""
        self.x.copy_(grad_x.T)
        self.by_params.copy_(by_params.transpose(0, 1))
        self.params.view(self.by_params.shape).copy_(ladj_by_params.transpose(0, 1))
        self.load_weights(weights, masks)
        for held, given in zip(self.slopes, slopes, strict=True):
            held.copy_(given)
        for call in self.calls:
            call()


def _assign(target: Tensor, fn: Callable[[Tensor], Tensor], source: Tensor) -> None:
    target.copy_(fn(source))


_numbers = count()

_Kind = TypeVar("_Kind", bound=_Sweep)
_Family = TypeVar("_Family", bound=Univariate | Drawing, covariant=True)

_solvers: weakref.WeakValueDictionary[str, Solver[Any]] = weakref.WeakValueDictionary()


class Solver(Generic[_Family]):
    """A network without its weights; custom operators name it by its ``handle``.

    The inverse of ``univariate`` at ``z`` is ``x``; or a :class:`Drawing` draws ``x``.
    """

    def __init__(
        self, structure: Structure, activations: Sequence[Callable[[Tensor], Tensor]], univariate: _Family
    ) -> None:
        self.structure, self.activations, self.univariate = structure, tuple(activations), univariate
        self.handle = f"{self._digest()}-{next(_numbers)}"
        _solvers[self.handle] = self
        self._idle: list[_Sweep] = []

    def _digest(self) -> str:
        """A digest of all that the gradient's formula depends on.

        Compiled graphs on disk name a solver by its handle: equal names must mean equal mathematics.
        """
        s = self.structure
        own = type(self.univariate) in _OURS and known_activations().issuperset(self.activations)
        names = [getattr(each, "__name__", each) for each in self.activations]
        text = repr((s.before, s.num_params, sorted(s.joins), s.dense)) + f"{names}{self.univariate!r}"
        return hashlib.sha256((text if own else text + uuid.uuid4().hex).encode()).hexdigest()[:16]

    def __reduce__(self) -> tuple[object, ...]:
        return Solver, (self.structure, self.activations, self.univariate)

    def __deepcopy__(self, memo: dict[int, object]) -> Solver[_Family]:
        return Solver(self.structure, self.activations, self.univariate)

    def borrow(
        self,
        kind: type[_Kind],
        like: Tensor,
        columns: int,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] = (),
        own_bias: bool = False,
    ) -> _Kind:
        """Takes out an idle sweep that fits, or makes one; no two calls share one."""
        stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
        # A sweep views biases, and weights unless it masks them.
        viewed = (*(weights if self.structure.dense else ()), *biases)
        key = (columns, own_bias, like.dtype, like.device, stream, *[v.data_ptr() for v in viewed])
        for k in range(len(self._idle) - 1, -1, -1):
            try:
                sweep = self._idle.pop(k)
            except IndexError:  # taken by another thread
                continue
            if type(sweep) is kind and sweep.key == key:
                return sweep
            self._idle.append(sweep)
        with torch.inference_mode(False):  # else unusable outside of it
            made = kind(self, like, columns, weights, biases, own_bias)
        made.key = key
        return made

    def give_back(self, sweep: _Sweep) -> None:
        """Keeps a small sweep for the next call."""
        if sweep.nbytes <= 2**25:
            self._idle.append(sweep)
            del self._idle[:-4]


def named(handle: str) -> Solver[Univariate]:
    """The living solver of this handle."""
    return _solvers[handle]
