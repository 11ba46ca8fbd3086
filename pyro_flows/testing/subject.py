"""A transform under test."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from pyro_flows.core.transform import FlowTransform

__all__ = ["DERIVATIVE", "DIFFERENCE", "NAMES", "Subject"]

# Rounding allowed, in eps times the scale.  Ten layers with scales of e^-3 to e^3 lose a few dozen, a wrong
# formula 1000 times more.
ULPS = 512
# For derivatives in float64, and for finite differences.
DERIVATIVE, DIFFERENCE = 1e-7, 1e-5
ROWS = 4  # of the batch that get a Jacobian


class Way(NamedTuple):
    """One direction at a few rows, in float64."""

    value: Tensor  # (n, *source)
    out: Tensor  # (n, *target)
    ladj: Tensor  # (n,)
    jacobian: Tensor  # (n, target numbers, source numbers)
    slope: Tensor  # gradient of ladj, (n, source numbers)

    def scale(self) -> Tensor:
        """The scale of rounding errors, |out| + |f'| |value|, shape (n, target numbers)."""
        moved = (self.jacobian.abs() @ self.value.flatten(1).abs().unsqueeze(-1)).squeeze(-1)
        return self.out.flatten(1).abs() + moved

    def ladj_scale(self) -> Tensor:
        """The same for ladj, shape (n,), with terms of order one even where they cancel."""
        return self.ladj.abs() + (self.slope.abs() * self.value.flatten(1).abs()).sum(1) + self.value[0].numel()


NAMES = ("forward_and_ladj", "inverse_and_ladj")


class Subject:
    """A transform under test, its results, and float64 truths for the checks."""

    def __init__(
        self, transform: FlowTransform, x: Tensor, context: Tensor | None, atol: float | None, rtol: float | None
    ) -> None:
        self.transform, self.x, self.context = transform, x, context
        self.check = ""
        self.rtol = ULPS * torch.finfo(x.dtype).eps if rtol is None else rtol
        self.atol = self.rtol if atol is None else atol
        with torch.no_grad():
            self.y, self.ladj = transform.forward_and_ladj(x, context)
            if self.y.shape[self.y.dim() - len(transform.data_shape) :] == transform.data_shape:
                self.back, self.back_ladj = transform.inverse_and_ladj(self.y, context)

    def fail(self, expected: str, got: str, hint: str) -> None:
        """Raises the one error of this module."""
        raise AssertionError(
            f"[{self.check}] {type(self.transform).__name__}: expected {expected}, got {got}. Hint: {hint}"
        )

    def equal(self, what: str, got: Any, want: Any, hint: str) -> None:
        """Fails unless ``got == want``."""
        if got != want:
            self.fail(f"{what} {want}", str(got), hint)

    def close(
        self, what: str, got: Tensor, want: Tensor, hint: str, scale: Tensor | float = 0.0, rtol: float | None = None
    ) -> None:
        """Fails unless ``|got - want| <= atol + rtol * (|want| + scale)`` everywhere."""
        self.equal(f"shape of {what}", tuple(got.shape), tuple(want.shape), hint)
        if want.numel() == 0:
            return
        atol, rtol = (self.atol, self.rtol) if rtol is None else (rtol, rtol)
        got, want = got.detach().double(), want.detach().double()
        error, allowed = (got - want).abs(), atol + rtol * (want.abs() + scale)
        excess = (error / allowed).nan_to_num(math.inf, math.inf)
        if excess.max() > 1:
            worst = int(excess.argmax())
            off, may = float(error.flatten()[worst]), float(allowed.flatten()[worst])
            self.fail(
                f"{what} = {float(want.flatten()[worst]):.6g} (entry {worst}, error at most {may:.2g})",
                f"{float(got.flatten()[worst]):.6g} (error {off:.2g})",
                hint,
            )

    def refuses(self, what: str, kind: type[Exception], call: Callable[[], object]) -> None:
        """Fails unless ``call`` raises ``kind``."""
        hint = "FlowTransform checks its arguments in the public methods; do not override those checks"
        try:
            call()
        except kind:
            return
        except Exception as error:
            self.fail(f"{kind.__name__} for {what}", f"{type(error).__name__}: {error}", hint)
        self.fail(f"{kind.__name__} for {what}", "no error", hint)

    def bound(self, transform: FlowTransform, context: Tensor | None = None) -> FlowTransform:
        """The transform as Pyro sees it: bound to the context if it takes one."""
        context = self.context if context is None else context
        return transform if context is None else transform.condition(context)

    @cached_property
    def batch(self) -> Size:
        return self.ladj.shape

    @cached_property
    def precise(self) -> FlowTransform:
        return copy.deepcopy(self.transform).double()

    def rows(self, value: Tensor, event: Size) -> Tensor:
        return value.expand(self.batch + event).reshape(-1, *event)[:ROWS]

    @cached_property
    def few_contexts(self) -> Tensor | None:
        return None if self.context is None else self.rows(self.context, self.context.shape[-1:]).double()

    @cached_property
    def given_contexts(self) -> Tensor | None:
        """``few_contexts`` in the dtype given."""
        return None if self.few_contexts is None else self.few_contexts.to(self.x.dtype)

    @property
    def sides(self) -> list[tuple[Callable[..., tuple[Tensor, Tensor]], Tensor]]:
        """Both directions, each with its value."""
        return [(self.transform.forward_and_ladj, self.x), (self.transform.inverse_and_ladj, self.y)]

    @cached_property
    def ways(self) -> tuple[Way, Way]:
        forward = self._way(0, self.rows(self.x, self.transform.event_shape).double())
        return forward, self._way(1, forward.out)

    def _way(self, side: int, value: Tensor) -> Way:
        value = value.detach().clone().requires_grad_()
        with torch.enable_grad():
            out, ladj = getattr(self.precise, NAMES[side])(value, self.few_contexts)
        if not out.requires_grad:
            self.fail(f"{NAMES[side]} to be differentiable", "an output without a graph", "look for a detach()")
        rows = [torch.autograd.grad(column.sum(), value, retain_graph=True)[0] for column in out.flatten(1).unbind(1)]
        slope = torch.autograd.grad(ladj.sum(), value, allow_unused=True)[0] if ladj.requires_grad else None
        slope = torch.zeros_like(value) if slope is None else slope
        jacobian = torch.stack([row.flatten(1) for row in rows], 1)
        return Way(value.detach(), out.detach(), ladj.detach(), jacobian, slope.flatten(1))

    @cached_property
    def scales(self) -> tuple[float, float, float]:
        """The scales of y, x and ladj over the few rows."""
        if self.batch.numel() == 0:
            return 0.0, 0.0, 0.0
        forward, inverse = self.ways
        ladj = max(float(forward.ladj_scale().max()), float(inverse.ladj_scale().max()))
        return float(forward.scale().max()), float(inverse.scale().max()), ladj

    def same(self, what: str, got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], side: int, hint: str) -> None:
        """Compares ``(value, ladj)`` of one direction."""
        name = ("y", "x")[side]
        self.close(f"{name} {what}", got[0], want[0], hint, self.scales[side])
        self.close(f"ladj of {NAMES[side]} {what}", got[1], want[1], hint, self.scales[2])

    def alike(self, what: str, other: FlowTransform, context: Tensor | None, hint: str) -> None:
        """Compares both directions of another transform with this one's."""
        with torch.no_grad():
            self.same(what, other.forward_and_ladj(self.x, context), (self.y, self.ladj), 0, hint)
            self.same(what, other.inverse_and_ladj(self.y, context), (self.back, self.back_ladj), 1, hint)
