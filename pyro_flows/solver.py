"""What the inverse engine knows of a network beside its weights, under a name that custom operators can carry."""

from __future__ import annotations

import hashlib
import uuid
import weakref
from collections.abc import Callable, Sequence
from itertools import count

import torch
from torch import Tensor

from pyro_flows.activations import known_activations
from pyro_flows.degrees import Structure
from pyro_flows.sweeps import ForwardSweep, ReverseSweep

__all__ = ["Solver", "named"]

_numbers = count()
_solvers: weakref.WeakValueDictionary[str, Solver] = weakref.WeakValueDictionary()


class Solver:
    """What the engine knows of a network beside its weights; custom operators name it by its ``handle``.

    Args:
        structure: the steps and times of its units.
        activations: the elementwise functions after each hidden layer.
        univariate: the family of scalar maps, with ``inverse``, ``solver`` and ``partials``; ``x`` is its inverse at
            ``z``.
    """

    def __init__(
        self, structure: Structure, activations: Sequence[Callable[[Tensor], Tensor]], univariate: object
    ) -> None:
        self.structure, self.activations, self.univariate = structure, tuple(activations), univariate
        self.handle = f"{self._digest()}-{next(_numbers)}"
        _solvers[self.handle] = self
        self._idle: list[ForwardSweep | ReverseSweep] = []

    def _digest(self) -> str:
        """Stands for all that the gradient's formula depends on.

        Compiled graphs name a solver by its handle, and compilers keep graphs on disk: equal names must mean equal
        mathematics, in whatever process.
        """
        s = self.structure
        own = type(self.univariate).__module__.startswith(__package__ + ".")
        own = own and known_activations().issuperset(self.activations)
        # What is not defined here may change behind an unchanged name.
        names = [getattr(each, "__name__", each) for each in self.activations]
        text = repr((s.before, s.num_params, sorted(s.joins), s.dense)) + f"{names}{self.univariate!r}"
        return hashlib.sha256((text if own else text + uuid.uuid4().hex).encode()).hexdigest()[:16]

    def __reduce__(self) -> tuple[object, ...]:
        return Solver, (self.structure, self.activations, self.univariate)

    def __deepcopy__(self, memo: dict[int, object]) -> Solver:
        return Solver(self.structure, self.activations, self.univariate)

    def borrow(
        self, kind: type, like: Tensor, columns: int, weights: Sequence[Tensor], *options: Sequence[Tensor] | bool
    ) -> ForwardSweep | ReverseSweep:
        """A sweep with its buffers and views, an idle one if it fits; taken out, so that no two calls share one."""
        stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
        # A sweep has views of biases, and unless it must mask them of weights: they are its own only where these are.
        viewed = (*(weights if self.structure.dense else ()), *(b for given in options[:1] for b in given))
        key = (kind, columns, options[1:], like.dtype, like.device, stream, *[v.data_ptr() for v in viewed])
        for k in range(len(self._idle) - 1, -1, -1):
            try:
                sweep = self._idle.pop(k)
            except IndexError:  # another thread was faster
                continue
            if sweep.key == key:
                return sweep
            self._idle.append(sweep)
        with torch.inference_mode(False):  # buffers made under inference mode could not be used outside of it
            sweep = kind(self, like, columns, weights, *options)
        sweep.key = key
        return sweep

    def give_back(self, sweep: ForwardSweep | ReverseSweep) -> None:
        """Keeps a small sweep for the next call: making its views costs as much as a small solve."""
        if sweep.nbytes <= 2**25:
            self._idle.append(sweep)
            del self._idle[:-4]


def named(handle: str) -> Solver:
    """The living solver of this handle."""
    return _solvers[handle]
