"""The cache of a transform's last result.

It holds ``y -> (x, ladj)`` for a ``y`` that the forward map produced, so that scoring one's own sample is free, and the
``ladj`` of an ``x`` that the inverse returned, so that scoring data costs one pass.  A result is invalid once grad
mode, a parameter or buffer (identity, storage, layout, version, ``requires_grad``) or the process's number of optimizer
steps changes.

``TransformedDistribution.log_prob`` asks for a value and at once for its ladj.  Nothing can change in between, so
nothing is checked within one such call.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import TransformedDistribution
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import TensorWeakRef

from pyro_flows.core.modes import plain_eager

__all__ = ["Kept", "Memo", "asked_by_score"]

_steps = 0


def _count_step(*args: Any) -> None:
    # Fused optimizers, and those that write to .data, bump no version.
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


_held = operator.itemgetter("_parameters", "_buffers", "_modules")


def _tensors(module: nn.Module) -> list[Tensor]:
    """Every parameter and buffer, in a fixed order."""
    found: list[Tensor | None] = []
    modules: list[nn.Module | None] = [module]
    for each in modules:  # grows in the loop
        if each is not None:
            parameters, buffers, children = _held(each.__dict__)
            found += parameters.values()
            found += buffers.values()
            modules += children.values()
    return [tensor for tensor in found if tensor is not None]


class _Stamp:
    """A result's dependencies: optimizer steps, grad mode, and each parameter and buffer with its state."""

    __slots__ = ("counts", "storages", "tensors")

    def __init__(self, module: nn.Module) -> None:
        # The tensors themselves, because ids are reused.
        self.tensors = _tensors(module)
        self.counts: list[Any] = [tensor._version for tensor in self.tensors]
        self.counts += [tensor.requires_grad for tensor in self.tensors]
        # Assigning to .data bumps no version, but changes the address or the strides.
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
        # Equal counts have equal length.
        return now.counts == self.counts and all(map(operator.is_, now.tensors, self.tensors))


def _state(value: Tensor) -> tuple[Any, ...]:
    return value._version, value.data_ptr(), value.shape, value.stride(), value.untyped_storage()._cdata


class _Entry(NamedTuple):
    x: TensorWeakRef | Tensor
    y: TensorWeakRef
    ladj: Tensor
    states: tuple[Any, ...]
    storages: tuple[StorageWeakRef, StorageWeakRef]  # no other storage gets their addresses
    stamp: _Stamp

    def still_holds(self, module: nn.Module, x: Tensor, y: Tensor) -> bool:
        """Whether the module, ``x`` and ``y`` are unchanged."""
        return self.states == _state(x) + _state(y) and self.stamp.still_holds(module)


_SCORE = TransformedDistribution.log_prob.__code__


def asked_by_score() -> bool:
    """Whether ``TransformedDistribution.log_prob`` reads the property that asks."""
    return plain_eager() and sys._getframe(2).f_code is _SCORE


def _scoring() -> FrameType | None:
    """The call of ``TransformedDistribution.log_prob`` that asks the transform, or the inverse, for this memo."""
    try:
        frame: FrameType | None = sys._getframe(3)
    except ValueError:  # called by no Python code, as a hook of a backward pass
        return None
    if frame is not None and frame.f_code is not _SCORE:
        frame = frame.f_back
    return frame if frame is not None and frame.f_code is _SCORE else None


class Memo:
    """At most one result for each direction of a transform, and one within a score.

    Example:
        >>> chain, x = pf.maf(3), torch.randn(5, 3)
        >>> y = chain(x)
        >>> chain.inv(y) is x  # kept, not computed
        True
    """

    __slots__ = ("_forward", "_inverse", "_within", "cleared")

    def __init__(self) -> None:
        self.cleared = 0  # how often
        self.clear()

    def clear(self) -> None:
        """Forgets both results."""
        self.cleared += 1
        self._forward: _Entry | None = None
        self._inverse: _Entry | None = None
        self._within: tuple[FrameType, Tensor, Tensor, Tensor] | None = None  # the score, x, y and ladj

    def remember(self, module: nn.Module, x: Tensor, y: Tensor, ladj: Tensor, made_y: bool) -> None:
        """Caches a result; ``made_y`` says which side the transform made."""
        if not plain_eager():
            return
        score = _scoring()
        if score is not None:
            self._within = score, x, y, ladj
            return
        if x.is_inference() or y.is_inference() or x is y:
            return
        try:
            stamp, states = _Stamp(module).keep(), _state(x) + _state(y)
            # Weak, so as not to keep a batch.
            storages = StorageWeakRef(x.untyped_storage()), StorageWeakRef(y.untyped_storage())
        except RuntimeError:  # without version or storage
            return
        # The result is held weakly, so that the cache ends with it.
        if made_y:
            self._forward = _Entry(x, TensorWeakRef(y), ladj, states, storages, stamp)
        else:
            self._inverse = _Entry(TensorWeakRef(x), TensorWeakRef(y), ladj, states, storages, stamp)

    def preimage(self, module: nn.Module, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """``(x, ladj)`` if the forward map produced this tensor ``y`` and nothing changed since."""
        entry = self._forward
        if entry is None or not plain_eager():
            return None
        made = entry.y()
        if made is None:
            self._forward = None
            return None
        x = entry.x
        # A leaf that requires a gradient needs the inverse as a function of y.
        if made is not y or (y.requires_grad and y.is_leaf) or not isinstance(x, Tensor):
            return None
        return (x, entry.ladj) if entry.still_holds(module, x, y) else None

    def ladj(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
        """The forward map's ladj if it is cached for ``(x, y)`` and nothing changed since."""
        within, self._within = self._within, None
        if within is not None and within[1] is x and within[2] is y and within[0] is _scoring():
            return within[3]
        if not plain_eager():
            return None
        for entry in (self._inverse, self._forward):
            if entry is None:
                continue
            known_x = entry.x if isinstance(entry.x, Tensor) else entry.x()
            if entry is self._inverse and x.requires_grad and x.is_leaf:
                continue  # as in preimage
            if known_x is x and entry.y() is y and entry.still_holds(module, x, y):
                return entry.ladj
        return None


class Kept:
    """A value computed from a module's tensors, valid until one changes."""

    __slots__ = ("_cleared", "_stamp", "_value")
    _value: Tensor
    _cleared: int

    def __init__(self) -> None:
        self._stamp: _Stamp | None = None

    def get(self, module: nn.Module, memo: Memo, make: Callable[[], Tensor]) -> Tensor:
        """The cached value, or a new one if a tensor of ``module`` changed or ``memo`` was cleared."""
        if self._stamp is None or self._cleared != memo.cleared or not self._stamp.still_holds(module):
            self._value, self._cleared = make(), memo.cleared
            try:
                self._stamp = _Stamp(module).keep()
            except RuntimeError:  # inference tensors count no versions
                self._stamp = None
        return self._value

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()
