"""The memo of a transform: what it has just computed, for as long as that is certainly still true.

Nothing is keyed on a tensor that a user made.  Remembered are ``y -> (x, ladj)`` for a ``y`` that the forward map
produced, so that scoring one's own sample costs nothing, and the ``ladj`` of an ``x`` that the inverse has returned, so
that scoring data costs one pass.  A result holds only while grad mode, every parameter and buffer (identity, storage,
layout, version, ``requires_grad``), and the number of optimizer steps taken in this process are what they were.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import TensorWeakRef

from pyro_flows.core.modes import plain_eager

__all__ = ["Kept", "Memo"]

_steps = 0


def _count_step(*args: Any) -> None:
    # Fused optimizers and those that write to .data do not bump a parameter's version, but each calls this hook.
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


_held = operator.itemgetter("_parameters", "_buffers", "_modules")


def _tensors(module: nn.Module) -> list[Tensor]:
    """Every parameter and buffer, in an order that does not change; asked for twice in each use of the memo."""
    found: list[Tensor | None] = []
    modules: list[nn.Module | None] = [module]
    for each in modules:  # grows meanwhile
        if each is not None:
            parameters, buffers, children = _held(each.__dict__)
            found += parameters.values()
            found += buffers.values()
            modules += children.values()
    return [tensor for tensor in found if tensor is not None]


class _Stamp:
    """What a result depends on: optimizer steps, grad mode, and each parameter and buffer with its state."""

    __slots__ = ("counts", "storages", "tensors")

    def __init__(self, module: nn.Module) -> None:
        # The tensors themselves, because the identity of one that is gone may be that of another by now.
        self.tensors = _tensors(module)
        self.counts: list[Any] = [tensor._version for tensor in self.tensors]
        self.counts += [tensor.requires_grad for tensor in self.tensors]
        # Assigning to .data counts no version, but gives another address or other strides.
        self.counts += map(Tensor.data_ptr, self.tensors)
        self.counts += map(Tensor.stride, self.tensors)
        self.counts += (_steps, torch.is_grad_enabled())
        self.storages: list[torch.UntypedStorage] = []

    def keep(self) -> _Stamp:
        """Holds the storages, so that no other tensor gets their addresses."""
        self.storages += map(Tensor.untyped_storage, self.tensors)
        return self

    def still_holds(self, module: nn.Module) -> bool:
        """Whether nothing was written in place, replaced, moved, frozen or thawed since."""
        try:
            now = _Stamp(module)
        except RuntimeError:  # inference tensors count no versions
            return False
        # Equal counts are as many, so the tensors can be compared in pairs.
        return now.counts == self.counts and all(map(operator.is_, now.tensors, self.tensors))


def _state(value: Tensor) -> tuple[Any, ...]:
    return value._version, value.data_ptr(), value.shape, value.stride()


class _Entry(NamedTuple):
    x: TensorWeakRef | Tensor
    y: TensorWeakRef
    ladj: Tensor
    states: tuple[Any, ...]
    storages: tuple[StorageWeakRef, StorageWeakRef]
    stamp: _Stamp

    def still_holds(self, module: nn.Module, x: Tensor, y: Tensor) -> bool:
        """Whether nothing changed, neither in the module nor in ``x`` and ``y``."""
        return (
            self.states == _state(x) + _state(y)
            and all(
                ref.cdata == value.untyped_storage()._cdata for ref, value in zip(self.storages, (x, y), strict=True)
            )
            and self.stamp.still_holds(module)
        )


class Memo:
    """At most one result for each direction of one transform."""

    __slots__ = ("_forward", "_inverse", "cleared")

    def __init__(self) -> None:
        self.cleared = 0  # how often
        self.clear()

    def clear(self) -> None:
        """Forgets both results."""
        self.cleared += 1
        self._forward: _Entry | None = None
        self._inverse: _Entry | None = None

    def remember(self, module: nn.Module, x: Tensor, y: Tensor, ladj: Tensor, made_y: bool) -> None:
        """Stores what one call computed; ``made_y`` says which side of the pair is ours."""
        if not plain_eager() or x.is_inference() or y.is_inference() or x is y:
            return
        try:
            stamp, states = _Stamp(module).keep(), _state(x) + _state(y)
            # Weakly: the memo shall not keep a batch.  Its address alone may be another's when it is gone.
            storages = StorageWeakRef(x.untyped_storage()), StorageWeakRef(y.untyped_storage())
        except RuntimeError:  # inference tensors count no versions, and some kinds of tensors have no storage
            return
        # Only the side that we made is watched weakly, so that the memo dies with what it belongs to.
        if made_y:
            self._forward = _Entry(x, TensorWeakRef(y), ladj, states, storages, stamp)
        else:
            self._inverse = _Entry(TensorWeakRef(x), TensorWeakRef(y), ladj, states, storages, stamp)

    def preimage(self, module: nn.Module, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """``(x, ladj)`` if ``y`` is the very tensor that the forward map has produced and nothing changed since."""
        entry = self._forward
        if entry is None or not plain_eager():
            return None
        made = entry.y()
        if made is None:
            self._forward = None
            return None
        x = entry.x
        # A leaf that asks for its gradient asks for the inverse as a function of y, which a memory is not.
        if made is not y or (y.requires_grad and y.is_leaf) or not isinstance(x, Tensor):
            return None
        return (x, entry.ladj) if entry.still_holds(module, x, y) else None

    def ladj(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
        """The forward map's ladj if ``(x, y)`` is one of the pairs just computed and nothing changed since."""
        if not plain_eager():
            return None
        for entry in (self._inverse, self._forward):
            if entry is None:
                continue
            known_x = entry.x if isinstance(entry.x, Tensor) else entry.x()
            if entry is self._inverse and x.requires_grad and x.is_leaf:
                continue  # a leaf that asks for its gradient, as in preimage
            if known_x is x and entry.y() is y and entry.still_holds(module, x, y):
                return entry.ladj
        return None


class Kept:
    """One value made of a module's tensors, for as long as nothing that it depends on changes."""

    __slots__ = ("_cleared", "_stamp", "_value")
    _value: Tensor
    _cleared: int

    def __init__(self) -> None:
        self._stamp: _Stamp | None = None

    def get(self, module: nn.Module, memo: Memo, make: Callable[[], Tensor]) -> Tensor:
        """The value that was kept, or a new one.

        Args:
            module: what the value is made of.
            memo: of a transform in it; to clear that forgets the value as well.
            make: makes the value.
        """
        if self._stamp is None or self._cleared != memo.cleared or not self._stamp.still_holds(module):
            self._value, self._cleared = make(), memo.cleared
            try:
                self._stamp = _Stamp(module).keep()
            except RuntimeError:  # inference tensors count no versions
                self._stamp = None
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()
