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
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from pyro_flows.nets.activations import in_place, known_activations
from pyro_flows.nets.structure import Structure, keep
from pyro_flows.univariate import Affine, ClampedAffine, Shift, Spline
from pyro_flows.univariate.base import Univariate

__all__ = ["ForwardSweep", "ReverseSweep", "Solver", "columns_at_once", "named"]

# These have the same mathematics in every process; a user's class may change behind its name.
_OURS = {Affine, ClampedAffine, Shift, Spline}

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


class _Link(NamedTuple):
    """What a stage adds to its rows: ``weight`` times those rows of ``source`` that are known."""

    weight: Tensor
    source: Tensor
    edges: Sequence[int]
    earlier: bool  # whether rows of the same moment are not known yet


class _Stage(NamedTuple):
    """A layer, solved moment by moment: ``edges[t]`` is where the rows of moment ``t`` begin, up or down.

    Rows start from ``bias`` or zero; ``finish`` returns the calls after all products with rows ``[start, stop)``.
    """

    target: Tensor
    bias: Tensor | None
    edges: Sequence[int]
    links: Sequence[_Link]
    finish: Callable[[int, int], Calls]


def _span(edges: Sequence[int], begin: int, end: int) -> slice:
    """The rows of moments ``[begin, end)``."""
    return slice(*sorted((edges[begin], edges[end])))


def _schedule(stages: Sequence[_Stage], block: int) -> Calls:
    """The calls of a sweep: a block of moments shares the products with rows of earlier blocks."""
    calls: Calls = []
    moments = len(stages[0].edges) - 1
    for begin in range(0, moments, block):
        end = min(begin + block, moments)
        for target, bias, edges, links, _ in stages:
            rows = _span(edges, begin, end)
            if rows.stop == rows.start:
                continue
            place, known = target[rows], [(link, _span(link.edges, 0, begin)) for link in links]
            products = [(link.weight[rows, seen], link.source[seen]) for link, seen in known if seen.stop > seen.start]
            if not products:
                calls.append(place.zero_ if bias is None else partial(place.copy_, bias[rows]))
            elif bias is None:
                calls.append(partial(torch.mm, *products[0], out=place))
            else:
                calls.append(partial(torch.addmm, bias[rows], *products[0], out=place))
            calls += [partial(place.addmm_, *each) for each in products[1:]]
        for t in range(begin, end):
            for target, _, edges, links, finish in stages:
                rows = _span(edges, t, t + 1)
                if rows.stop == rows.start:
                    continue
                for link in links:
                    seen = _span(link.edges, begin, t + (not link.earlier))
                    if seen.stop > seen.start:
                        calls.append(partial(target[rows].addmm_, link.weight[rows, seen], link.source[seen]))
                calls += finish(rows.start, rows.stop)
    return calls


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
        self.structure = s = solver.structure
        self.like = like.new_empty(0)
        self.nbytes = 0
        self.calls: Calls = []
        *inner, head = weights[:-1] if s.direct else weights
        # Views of the weights, or copies with zeros in masked places, refreshed at each run.
        self.inner = inner if s.dense else [self.empty(*w.shape) for w in inner]
        # Outputs by dimension: one step's are neighbors.
        self.head = self.empty(*head.shape)
        if s.dense:
            self.calls.append(partial(self.by_dimension(self.head).copy_, self.by_parameter(head)))
        if s.direct:
            self.direct = self.empty(*weights[-1].shape)
            self.calls.append(partial(self.by_dimension(self.direct).copy_, self.by_parameter(weights[-1])))
        self.calls += _schedule(self._stages(solver, columns, biases, own_bias), s.block)

    def _stages(
        self, solver: Solver[Univariate | Drawing], columns: int, biases: Sequence[Tensor], own_bias: bool
    ) -> list[_Stage]:
        """Makes the buffers; adds to ``calls`` what comes before the first stage."""
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
        return torch.unflatten(rows, 0, (self.structure.num_params, self.structure.input_dim)).transpose(0, 1)

    def load_weights(self, weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
        if not self.structure.dense:
            *inner, head = (keep(weight, mask) for weight, mask in zip(weights, masks, strict=True))
            for held, given in zip(self.inner, inner, strict=True):
                held.copy_(given)
            self.by_dimension(self.head).copy_(self.by_parameter(head))


class ForwardSweep(_Sweep):
    """Solves for ``x``: fills ``x``, ``ladj`` and ``tape``, each ``(rows, columns)``."""

    def _stages(
        self, solver: Solver[Univariate | Drawing], columns: int, biases: Sequence[Tensor], own_bias: bool
    ) -> list[_Stage]:
        s, family, width = self.structure, solver.univariate, self.structure.num_params
        self.z, self.x = (self.empty(s.input_dim, columns) for _ in range(2))
        self.tape = self.empty(s.tape_rows, columns)
        params, self.ladj, hidden = self.tape.split((s.outputs, s.input_dim, sum(s.widths)))
        by_dimension = params.view(s.input_dim, width, -1)
        inputs, features = self.x, s.features or 1
        if s.features is not None and not isinstance(family, Univariate) and not family.shared:
            inputs = self.empty(s.input_dim * features, columns)
        overwriting = [None, *(in_place(act) if s.in_place(act) else None for act in solver.activations)]
        pre = [inputs, *s.rows(hidden, 0)]
        post = [p if k == 0 or overwriting[k] else self.empty(*p.shape) for k, p in enumerate(pre)]
        # Biases as columns; with a context the first has one per sample.
        sizes = [*s.widths, s.outputs]
        self.first = self.empty(sizes[0], columns if own_bias else 1)
        self.biases = [self.first, *(bias[:, None] for bias in biases)]
        if biases:
            self.biases[-1] = self.empty(s.outputs, 1)
            self.calls.append(partial(self.by_dimension(self.biases[-1]).copy_, self.by_parameter(biases[-1][:, None])))

        def activate(layer: int, a: int, c: int) -> Calls:
            into = pre[layer][a:c]
            calls: Calls = [partial(into.add_, pre[layer - 2][a:c])] if layer - 1 in s.joins else []
            overwrite = overwriting[layer]
            if overwrite is not None:
                return [*calls, partial(overwrite, into)]
            return [*calls, partial(_assign, post[layer][a:c], solver.activations[layer - 1], into)]

        def move(a: int, c: int) -> Calls:
            own = slice(a // width, c // width)
            given, made, x = self.z[own], by_dimension[own], self.x[own]
            if isinstance(family, Univariate):
                return family.solver(True, given, made.transpose(0, 1), x, self.ladj[own])
            return family.draws(own.start, own.stop, given, made, x, inputs[own.start * features : own.stop * features])

        dims = [*s.before[0], s.input_dim]
        edges = [[n * features for n in dims], *([0, *before] for before in s.before[1:]), [n * width for n in dims]]
        stages = []
        for k, weight in enumerate([*self.inner, self.head]):
            last = k == len(self.inner)
            links = [_Link(weight, post[k], edges[k], earlier=k == 0)]
            if last and s.direct:
                links.append(_Link(self.direct, inputs, edges[0], earlier=True))
            target, finish = (params, move) if last else (pre[k + 1], partial(activate, k + 1))
            stages.append(_Stage(target, self.biases[k], edges[k + 1], links, finish))
        return stages

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

    def _stages(
        self, solver: Solver[Univariate | Drawing], columns: int, biases: Sequence[Tensor], own_bias: bool
    ) -> list[_Stage]:
        s, width = self.structure, self.structure.num_params
        self.adjoint, self.grad_x = self.empty(s.adjoint_rows, columns), self.empty(s.input_dim, columns)
        x, self.params, hidden = self.adjoint.split((s.input_dim, s.outputs, sum(s.widths)))
        self.by_params = self.empty(s.input_dim, width, columns)
        by_dimension = self.params.view(self.by_params.shape)
        self.slopes = [self.empty(width, columns) for width in s.widths]
        layers = [x, *s.rows(hidden, 0), self.params]

        def bend(layer: int, a: int, c: int) -> Calls:
            place = layers[layer][a:c]
            calls: Calls = [partial(place.mul_, self.slopes[layer - 1][a:c])]
            return [*calls, partial(place.add_, layers[layer + 2][a:c])] if layer + 1 in s.joins else calls

        def move(a: int, c: int) -> Calls:
            return [partial(by_dimension[a:c].addcmul_, self.by_params[a:c], x[a:c].unsqueeze(1))]

        # From the last moment to the first.
        edges = [[0, *before][::-1] for before in s.before]
        edges.append([n * width for n in edges[0]])
        stages = []
        for k in reversed(range(len(s.widths) + 1)):
            weight = self.inner[k] if k < len(self.inner) else self.head
            link = _Link(weight.T, layers[k + 1], edges[k + 1], earlier=k == len(s.widths))
            bias, finish = (None, partial(bend, k)) if k else (self.grad_x, move)
            stages.append(_Stage(layers[k], bias, edges[k], [link], finish))
        return stages

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
        self.grad_x.copy_(grad_x.T)
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
