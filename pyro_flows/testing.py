"""The base contract as code: hold your own transforms to it, and find the part of a flow that makes NaN.

:func:`check_transform` runs the checks named in ``CHECKS`` and fails with a message that says which one, what was
expected, what came, and what to look at.  :func:`locate_nonfinite` walks a flow part by part.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn

from pyro_flows.chain import Chain
from pyro_flows.core import Conditioned, FlowTransform, Inverse

__all__ = ["CHECKS", "check_transform", "locate_nonfinite"]

# Rounding allowed, in units of eps times the size of what enters a result.  A chain of some ten layers with scales of
# e^-3 to e^3 loses a few dozen; a wrong formula is off by a factor of 1000 more.
ULPS = 512
# What float64 is held to where two ways of getting the same derivative are compared, and for finite differences.
DERIVATIVE, DIFFERENCE = 1e-7, 1e-5
ROWS = 4  # of the batch, for everything that needs a Jacobian


class _Way(NamedTuple):
    """One direction at a few rows, in float64."""

    value: Tensor  # (n, *source)
    out: Tensor  # (n, *target)
    ladj: Tensor  # (n,)
    jacobian: Tensor  # (n, target numbers, source numbers)
    slope: Tensor  # gradient of ladj, (n, source numbers)

    def scale(self) -> Tensor:
        """|out| + |f'| |value|, shape (n, target numbers): what rounding of the input and of the output amounts to."""
        moved = (self.jacobian.abs() @ self.value.flatten(1).abs().unsqueeze(-1)).squeeze(-1)
        return self.out.flatten(1).abs() + moved

    def ladj_scale(self) -> Tensor:
        """The same for ladj, shape (n,); its terms are of order one even where they cancel."""
        return self.ladj.abs() + (self.slope.abs() * self.value.flatten(1).abs()).sum(1) + self.value[0].numel()


_NAMES = ("forward_and_ladj", "inverse_and_ladj")


class _Subject:
    """A transform under test, its results, and float64 truths that several checks share."""

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
    def ways(self) -> tuple[_Way, _Way]:
        forward = self._way(0, self.rows(self.x, self.transform.event_shape).double())
        return forward, self._way(1, forward.out)

    def _way(self, side: int, value: Tensor) -> _Way:
        value = value.detach().clone().requires_grad_()
        with torch.enable_grad():
            out, ladj = getattr(self.precise, _NAMES[side])(value, self.few_contexts)
        if not out.requires_grad:
            self.fail(f"{_NAMES[side]} to be differentiable", "an output without a graph", "look for a detach()")
        rows = [torch.autograd.grad(column.sum(), value, retain_graph=True)[0] for column in out.flatten(1).unbind(1)]
        slope = torch.autograd.grad(ladj.sum(), value, allow_unused=True)[0] if ladj.requires_grad else None
        slope = torch.zeros_like(value) if slope is None else slope
        jacobian = torch.stack([row.flatten(1) for row in rows], 1)
        return _Way(value.detach(), out.detach(), ladj.detach(), jacobian, slope.flatten(1))

    @cached_property
    def scales(self) -> tuple[float, float, float]:
        """Of y, of x and of ladj, over the few rows; for comparing two computations of the same thing."""
        if self.batch.numel() == 0:
            return 0.0, 0.0, 0.0
        forward, inverse = self.ways
        ladj = max(float(forward.ladj_scale().max()), float(inverse.ladj_scale().max()))
        return float(forward.scale().max()), float(inverse.scale().max()), ladj

    def same(self, what: str, got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], side: int, hint: str) -> None:
        """Compares ``(value, ladj)`` of one direction."""
        name = ("y", "x")[side]
        self.close(f"{name} {what}", got[0], want[0], hint, self.scales[side])
        self.close(f"ladj of {_NAMES[side]} {what}", got[1], want[1], hint, self.scales[2])


def _shapes(s: _Subject) -> None:
    t = s.transform
    joint = s.x.shape[: s.x.dim() - len(t.event_shape)]
    joint = joint if s.context is None else torch.broadcast_shapes(joint, s.context.shape[:-1])
    s.equal("y of shape", tuple(s.y.shape), tuple(joint + t.data_shape), "y is (*batch, *data_shape)")
    s.equal("ladj of shape", tuple(s.ladj.shape), tuple(joint), "sum ladj over the whole event")
    s.equal("x of shape", tuple(s.back.shape), tuple(joint + t.event_shape), "x is (*batch, *event_shape)")
    s.equal("inverse ladj of shape", tuple(s.back_ladj.shape), tuple(joint), "sum ladj over the whole event")
    for dtype in (torch.float32, torch.float64):
        twin = t if dtype == s.x.dtype else copy.deepcopy(t).to(dtype)
        context = None if s.context is None else s.context.to(dtype)
        for name, value in zip(_NAMES, (s.x, s.y), strict=True):
            with torch.no_grad():
                results = getattr(twin, name)(value.to(dtype), context)
            for what, result in zip(("value", "ladj"), results, strict=True):
                hint = "allocate with new_zeros, zeros_like and their kin, not in torch's default dtype or device"
                s.equal(f"{what} of {name} in", result.dtype, dtype, hint)
                s.equal(f"{what} of {name} on", result.device, s.x.device, hint)


def _structure(s: _Subject) -> None:
    t = s.transform
    s.equal("domain.event_dim", t.domain.event_dim, len(t.event_shape), "wrap it in constraints.independent")
    s.equal("codomain.event_dim", t.codomain.event_dim, len(t.data_shape), "wrap it in constraints.independent")
    if s.y.numel():  # torch's constraints cannot check an empty batch
        s.equal("all of y in codomain:", bool(t.codomain.check(s.y).all()), True, f"codomain is {t.codomain}")
    view = s.bound(t)
    hint = "do not override forward_shape and inverse_shape; data_shape says what differs"
    s.equal("forward_shape", tuple(view.forward_shape(s.x.shape)), tuple(s.y.shape), hint)
    s.equal("inverse_shape", tuple(view.inverse_shape(s.y.shape)), tuple(s.back.shape), hint)


def _batch(s: _Subject) -> None:
    t, results = s.transform, ((s.y, s.ladj), (s.back, s.back_ladj))
    for side, (name, value) in enumerate(zip(_NAMES, (s.x, s.y), strict=True)):
        run: Callable[..., tuple[Tensor, Tensor]] = torch.no_grad()(getattr(t, name))
        event, want = (t.event_shape, t.data_shape)[side], results[side]
        value = value.expand(s.batch + event)
        hint = "use dimensions counted from the end, reshape instead of view, and never the size of the batch"
        s.same("with a leading dimension of 1", run(value[None], s.context), (want[0][None], want[1][None]), side, hint)
        strided = torch.stack((value, value), -1)[..., 0]
        s.same("for a non-contiguous value", run(strided, s.context), want, side, hint)
        one = None if s.context is None else s.few_contexts.new_zeros(s.context.shape[-1]).to(s.x.dtype)
        for empty in ((0,), (2, 0)):
            got = run(value.new_zeros(*empty, *event), one)
            s.equal("ladj of an empty batch of shape", tuple(got[1].shape), empty, hint)
            s.equal("value of an empty batch in batch shape", tuple(got[0].shape[: len(empty)]), empty, hint)
        if s.batch.numel() == 0:
            continue
        # Mates are halved values where the domain admits those; a value alone must come out as it does among them.
        rows, contexts = s.rows(value, event), s.few_contexts
        alone = rows[:1]
        halves = rows / 2
        admitted = (t.domain, t.codomain)[side].check(halves)
        mates = torch.cat((alone, halves[admitted]))
        contexts = None if contexts is None else contexts.to(s.x.dtype)
        shared = None if contexts is None else contexts[0]
        hint = "statistics of a batch must be buffers in both directions, not taken from the value"
        single, among = run(alone[0], shared), run(mates, shared)
        s.same("of a value among batch mates", (among[0][0], among[1][0]), single, side, hint)
        rest = run(rows, contexts)
        s.same("of the first row of a batch", (rest[0][0], rest[1][0]), single, side, hint)


def _round_trip(s: _Subject) -> None:
    if s.batch.numel() == 0:
        return
    context = None if s.context is None else s.few_contexts.to(s.x.dtype)
    with torch.no_grad():
        y = s.transform.forward_and_ladj(s.rows(s.x, s.transform.event_shape), context)[0]
        again = s.transform.forward_and_ladj(s.transform.inverse_and_ladj(y, context)[0], context)[0]
    way = s.ways[0]
    hint = "inverse_and_ladj does not undo forward_and_ladj; judged by |f(f^-1(y)) - y| against |y| + |f'| |x|"
    s.close("f(f^-1(y))", again.flatten(1), y.flatten(1), hint, way.scale())
    s.close("y in float64", y.flatten(1), way.out.flatten(1), "the given dtype loses more than rounding", way.scale())


def _ladj(s: _Subject) -> None:
    if s.batch.numel() == 0:
        return
    for side, way in enumerate(s.ways):
        if way.jacobian.shape[1] == way.jacobian.shape[2]:  # a map onto a manifold has no determinant to compare with
            truth = torch.linalg.slogdet(way.jacobian)[1]
            hint = "ladj is log|det| of the autograd Jacobian, in nats; see which dimensions or factors it leaves out"
            if torch.allclose(way.ladj, -truth, rtol=DERIVATIVE, atol=DERIVATIVE):
                hint = "the sign is wrong: forward gives log|det dy/dx|, inverse log|det dx/dy|"
            s.close(f"ladj of {_NAMES[side]}", way.ladj, truth, hint, way.ladj_scale(), DERIVATIVE)
        got = s.rows((s.ladj, s.back_ladj)[side], Size())
        s.close(f"ladj of {_NAMES[side]} in float64", got, way.ladj, "the given dtype loses too much", s.scales[2])
    hint = "inverse_and_ladj returns log|det dx/dy|: the negative of the forward one at the same point"
    s.close("inverse ladj", s.back_ladj, -s.ladj, hint, s.scales[2])


def _random_like(value: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device)


def _gradient(s: _Subject) -> None:
    if s.batch.numel() == 0:
        return
    generator = torch.Generator().manual_seed(0)
    t, context = s.precise, s.few_contexts
    extra = [] if context is None else [context.clone().requires_grad_()]
    learnt = [(name, p) for name, p in t.named_parameters() if p.requires_grad]
    names = ["value", *["context"] * len(extra), *(name for name, _ in learnt)]
    for side, way in enumerate(s.ways):
        run, other = (getattr(t, name) for name in (_NAMES[side], _NAMES[1 - side]))
        inputs = [way.value.clone().requires_grad_(), *extra, *(p for _, p in learnt)]
        by_out, by_ladj = _random_like(way.out, generator), _random_like(way.ladj, generator)

        def total() -> Tensor:
            out, ladj = run(inputs[0], *extra)  # noqa: B023 (called within this turn of the loop)
            return (by_out * out).sum() + (by_ladj * ladj).sum()  # noqa: B023

        def gradients(loss: Tensor, wanted: list[Tensor]) -> list[Tensor]:
            got = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else [None] * len(wanted)
            return [torch.zeros_like(v) if g is None else g for g, v in zip(got, wanted, strict=True)]

        with torch.enable_grad():
            loss = total()
            grads = gradients(loss, inputs)
        back = s.ways[1 - side]
        if back.jacobian.shape[1] == back.jacobian.shape[2]:
            # With g the other direction: out = g^-1(value), so d out = -(g')^-1 dg, and ladj(value) = -ladj_g(out).
            pulled = by_out.flatten(1) - by_ladj[:, None] * back.slope
            pulled = torch.linalg.solve(back.jacobian.mT, pulled.unsqueeze(-1)).squeeze(-1)
            with torch.enable_grad():
                out, ladj = other(way.out, *extra)
                implicit = gradients(-(pulled * out.flatten(1)).sum() - (by_ladj * ladj).sum(), inputs[1:])
            pulled = pulled.reshape(way.value.shape)
            for name, got, want in zip(names, grads, [pulled, *implicit], strict=True):
                hint = f"the gradients of {_NAMES[0]} and {_NAMES[1]} do not belong to the same map"
                size = float(want.abs().max()) if want.numel() else 0.0
                s.close(f"gradient of {_NAMES[side]} for {name}", got, want, hint, size, DERIVATIVE)
        steps = [_random_like(value, generator) for value in inputs]
        slope = sum((g * d).sum() for g, d in zip(grads, steps, strict=True))
        ends = []
        for sign in (1e-6, -2e-6):
            with torch.no_grad():
                for value, step in zip(inputs, steps, strict=True):
                    value.add_(step, alpha=sign)
                ends.append(total())
        with torch.no_grad():
            for value, step in zip(inputs, steps, strict=True):
                value.add_(step, alpha=1e-6)
        hint = "compare each gradient with finite differences in float64; clamps and detach() break it"
        size = sum(float((g * d).abs().sum()) for g, d in zip(grads, steps, strict=True)) + float(loss.detach().abs())
        what = f"directional derivative of {_NAMES[side]} by finite differences"
        s.close(what, slope, (ends[0] - ends[1]) / 2e-6, hint, size, DIFFERENCE)


def _functions(s: _Subject) -> None:
    if s.batch.numel() == 0:
        return
    hint = "torch.func needs leaf maths without .item(), boolean-mask indexing, or writes in place"
    for side, way in enumerate(s.ways):
        run = getattr(s.precise, _NAMES[side])
        inputs = (way.value,) if s.context is None else (way.value, s.few_contexts)
        s.close(f"vmap of {_NAMES[side]}", torch.func.vmap(run)(*inputs)[0], way.out, hint, s.scales[side], DERIVATIVE)
        jacobian = torch.func.jacrev(lambda *v: run(*v)[0])(*(v[0] for v in inputs))  # noqa: B023
        want = way.jacobian[0].reshape(jacobian.shape)
        s.close(f"jacrev of {_NAMES[side]}", jacobian, want, hint, float(want.abs().max()), DERIVATIVE)


def _inv(s: _Subject) -> None:
    t = s.transform
    hint = "FlowTransform.inv does all of this; do not override it"
    inverse = t.inv
    s.equal(".inv to be a module:", isinstance(inverse, nn.Module), True, hint)
    s.equal("parameters of .inv", [id(p) for p in inverse.parameters()], [id(p) for p in t.parameters()], hint)
    s.equal(".inv.inv to be the transform:", inverse.inv is t, True, hint)
    with torch.no_grad():
        s.same("of .inv", inverse.forward_and_ladj(s.y, s.context), (s.back, s.back_ladj), 1, hint)
        s.same("of .inv's inverse", inverse.inverse_and_ladj(s.x, s.context), (s.y, s.ladj), 0, hint)
        s.close("x of .inv(y)", s.bound(inverse)(s.y), s.back, hint, s.scales[1])


def _memo(s: _Subject) -> None:
    hint = "remember nothing by hand: FlowTransform does, and knows when a result no longer holds"
    twin = copy.deepcopy(s.transform)
    view, x = s.bound(twin), s.x.clone()
    with torch.no_grad():
        y = view(x)
        s.close("x of scoring one's own sample", view.inv(y), s.back, hint, s.scales[1])
        s.close("ladj of scoring one's own sample", view.log_abs_det_jacobian(x, y), s.ladj, hint, s.scales[2])
        data = s.y.clone()
        s.close("ladj after x = inv(y)", view.log_abs_det_jacobian(view.inv(data), data), s.ladj, hint, s.scales[2])
    with torch.enable_grad():
        params = [p for p in twin.parameters() if p.requires_grad]
        for turn in range(4):  # each side twice: a remembered graph could be gone through only once
            if turn % 2 == 0:
                y = view(x)
                loss, fresh = y.sum() + view.log_abs_det_jacobian(x, y).sum(), view.forward_and_ladj(x)
            else:
                back = view.inv(data)
                loss, fresh = back.sum() - view.log_abs_det_jacobian(back, data).sum(), view.inverse_and_ladj(data)
            want = fresh[0].sum() + fresh[1].sum()
            s.equal(
                "a result in grad mode after a no_grad call to have a graph:",
                loss.requires_grad,
                want.requires_grad,
                hint,
            )
            if want.requires_grad:
                pairs = zip(*(torch.autograd.grad(v, params, allow_unused=True) for v in (loss, want)), strict=True)
                for got, true in pairs:
                    if true is not None:
                        size = float(true.abs().max())
                        s.close(
                            "gradient after a no_grad call",
                            torch.zeros_like(true) if got is None else got,
                            true,
                            hint,
                            size,
                        )
        y = view(x)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in params:
                p.add_(_random_like(p, generator), alpha=0.1)
            hint = "a stale result was returned: something remembered outlives a change of the parameters"
            fresh = s.bound(copy.deepcopy(twin))
            want_x, want = fresh.inverse_and_ladj(y)[0], fresh.forward_and_ladj(x)[1]
        for value, what in ((y, "own sample"), (y.detach(), "data")):
            s.close(f"x of the {what} after a change of parameters", view.inv(value), want_x, hint, s.scales[1])
        got = view.log_abs_det_jacobian(x, y)
        s.close("ladj of the same tensors after a change of parameters", got, want, hint, s.scales[2])
        y = view(x)
        want_x = fresh.inverse_and_ladj(y)[0]
        x.detach().mul_(0.5)
        s.close("x of y, after the x that made it was overwritten", view.inv(y), want_x, hint, s.scales[1])


def _copies(s: _Subject) -> None:
    twin = copy.deepcopy(s.transform)
    before = len(pickle.dumps(twin))
    many = s.x.new_zeros(1000, *twin.event_shape) + s.x.reshape(-1, *twin.event_shape)[:1].sum(0)
    context = None if s.context is None else s.context.new_zeros(s.context.shape[-1])
    view = s.bound(twin, context)
    y = view(many)
    view.inv(y.detach())
    hint = "keep results out of the module's state; __getstate__ decides what travels"
    for module in twin, view:
        data = pickle.dumps(module)
        if len(data) > before + 1000 * y.element_size():
            s.fail(f"a pickle of about {before} bytes", f"{len(data)} after a batch of 1000", hint)
    for what, other in (("deepcopy", copy.deepcopy(twin)), ("unpickled copy", pickle.loads(pickle.dumps(twin)))):
        with torch.no_grad():
            s.same(f"of a {what}", other.forward_and_ladj(s.x, s.context), (s.y, s.ladj), 0, hint)
            s.same(f"of a {what}", other.inverse_and_ladj(s.y, s.context), (s.back, s.back_ladj), 1, hint)
        held = [m for m in other.modules() if isinstance(m, FlowTransform) and (m._memo._forward or m._memo._inverse)]
        s.equal(f"parts of a {what} that carry a batch:", len(held), 0, hint)
        shared = {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in twin.parameters()} - {0}
        s.equal(f"parameters that a {what} shares:", len(shared), 0, hint)


def _state(s: _Subject) -> None:
    file, twin = io.BytesIO(), copy.deepcopy(s.transform)
    torch.save(s.transform.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for p in twin.parameters():
            p.copy_(torch.rand_like(p))
        twin(s.x) if s.context is None else twin.condition(s.context)(s.x)
    twin.load_state_dict(torch.load(file, weights_only=True, map_location=s.x.device))
    hint = "everything that defines the map is a parameter or a persistent buffer"
    with torch.no_grad():
        s.same("after load_state_dict", twin.forward_and_ladj(s.x, s.context), (s.y, s.ladj), 0, hint)
        s.same("after load_state_dict", twin.inverse_and_ladj(s.y, s.context), (s.back, s.back_ladj), 1, hint)


def _parameters(s: _Subject) -> None:
    names: dict[int, str] = {}
    for name, p in s.transform.named_parameters(remove_duplicate=False):
        if not p.is_contiguous():
            hint = "Pyro's param store copies what is not contiguous, and the copy never trains: call .contiguous()"
            s.fail(f"parameter {name} to be contiguous", f"strides {p.stride()} for shape {tuple(p.shape)}", hint)
        first = names.setdefault(id(p), name)
        s.equal(f"parameter {name} registered once; its other name:", first, name, "register each tensor in one place")


def _context(s: _Subject) -> None:
    t, x, size = s.transform, s.x, s.transform.context_dim
    if size == 0:
        extra = x.new_zeros(2)
        s.refuses("a context that is not taken", ValueError, lambda: t.forward_and_ladj(x, extra))
        s.refuses("a context that is not taken", ValueError, lambda: t.inverse_and_ladj(s.y, extra))
        s.refuses("condition() with context_dim=0", ValueError, lambda: t.condition(extra))
        return
    for call, value in ((t.forward_and_ladj, x), (t.inverse_and_ladj, s.y)):
        s.refuses("a missing context", ValueError, lambda: call(value))  # noqa: B023
        s.refuses("a context that is too long", ValueError, lambda: call(value, x.new_zeros(size + 1)))  # noqa: B023
    s.refuses("a context that is too long", ValueError, lambda: t.condition(x.new_zeros(size + 1)))
    hint = "the context's batch broadcasts against the value's"
    with torch.no_grad():
        view = t.condition(s.context)
        s.same("of .condition(context)", view.forward_and_ladj(x), (s.y, s.ladj), 0, hint)
        s.same("of .condition(context)", view.inverse_and_ladj(s.y), (s.back, s.back_ladj), 1, hint)
        if s.batch.numel():
            contexts, one = s.few_contexts.to(x.dtype).repeat(2, 1), s.rows(x, t.event_shape)[0]
            whole = t.forward_and_ladj(one.expand(len(contexts), *t.event_shape), contexts)
            s.same("of one value at several contexts", t.forward_and_ladj(one, contexts), whole, 0, hint)
            shape = tuple(t.condition(contexts).forward_shape(t.event_shape))
            s.equal("forward_shape with a batch of contexts", shape, tuple(whole[0].shape), hint)


def _errors(s: _Subject) -> None:
    t = s.transform
    sides = ((t.forward_and_ladj, s.x), (t.inverse_and_ladj, s.y))
    for call, value in sides:
        wide = torch.cat((value, value[..., :1]), -1)
        s.refuses("a wrong event size", ValueError, lambda: call(wide, s.context))  # noqa: B023
        s.refuses("too few dimensions", ValueError, lambda: call(value.new_zeros(()), s.context))  # noqa: B023
        s.refuses("integers", TypeError, lambda: call(value.long(), s.context))  # noqa: B023
        if any(p.is_floating_point() for p in (*t.parameters(), *t.buffers())):
            other = value.double() if value.dtype == torch.float32 else value.float()
            s.refuses("another dtype than the parameters'", TypeError, lambda: call(other, s.context))  # noqa: B023


_CHECKS: dict[str, Callable[[_Subject], None]] = {
    "shapes": _shapes,
    "structure": _structure,
    "parameters": _parameters,
    "batch": _batch,
    "round_trip": _round_trip,
    "ladj": _ladj,
    "gradient": _gradient,
    "functions": _functions,
    "inv": _inv,
    "memo": _memo,
    "copies": _copies,
    "state": _state,
    "context": _context,
    "errors": _errors,
}
CHECKS = tuple(_CHECKS)
"""Names of all checks, in the order in which they run."""


def check_transform(
    transform: FlowTransform,
    x: Tensor,
    context: Tensor | None = None,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    checks: Iterable[str] = CHECKS,
) -> None:
    r"""Holds a transform to the base contract of :class:`~pyro_flows.FlowTransform`.

    Rounding is judged by what enters a result: :math:`|f(f^{-1}(y)) - y| \le a + r (|y| + |f'|\,|x|)`, and likewise for
    everything else that is computed twice.  Derivatives are compared in float64, on a deep copy and at most four rows.
    The transform itself is left as it is, apart from gradients: nothing is accumulated in ``.grad``.

    Args:
        transform: any transform; parameters are best moved away from their initial values before.
        x: a base-side value of shape ``(*batch, *event_shape)``, of the transform's dtype and device.
        context: shape ``(*context_batch, context_dim)`` if the transform takes one.
        atol: the absolute error :math:`a` allowed, by default equal to ``rtol``.
        rtol: the relative error :math:`r` allowed, by default 512 times the machine epsilon of ``x``.
        checks: which ones to run, of ``CHECKS``; e.g. all but ``"copies"`` for a transform that holds a lambda.

    Raises:
        AssertionError: naming the check that failed, what was expected, what came, and what to look at.
    """
    wanted = set(checks)
    if wanted - set(_CHECKS):
        raise ValueError(f"expected checks among {CHECKS}, got {sorted(wanted - set(_CHECKS))}")
    subject = _Subject(transform, x, context, atol, rtol)
    for name, check in _CHECKS.items():
        if name in wanted:
            subject.check = name
            check(subject)


@torch.no_grad()
def locate_nonfinite(transform: FlowTransform, x: Tensor, context: Tensor | None = None) -> str | None:
    """Says where on the way from base to data NaN or infinity first appears; ``None`` if nowhere.

    Chains, inverses and conditioned views are entered, at any depth.  For the way from data to base give
    ``transform.inv`` and a data-side value.

    Args:
        transform: the flow to walk.
        x: a base-side value of shape ``(*batch, *event_shape)``.
        context: shape ``(*context_batch, context_dim)`` if the transform takes one.

    Returns:
        The path of the part, and which parameter or output it is, e.g. ``"parts.1 (Coupling): parameter
        net.layers.0.weight has 1 non-finite of 12 entries"``.
    """
    for what, value in (("x", x), ("context", context)):
        if value is not None and not value.isfinite().all():
            return f"input {what} {_count(value)}"
    return _walk("", transform, x, context, False)[0]


def _count(value: Tensor) -> str:
    return f"has {int((~value.isfinite()).sum())} non-finite of {value.numel()} entries"


def _walk(
    path: str, part: FlowTransform, value: Tensor, context: Tensor | None, inverse: bool
) -> tuple[str | None, Tensor]:
    if isinstance(part, (Inverse, Conditioned)):
        bound = part.context if isinstance(part, Conditioned) else context
        return _walk(f"{path}transform.", part.transform, value, bound, inverse ^ isinstance(part, Inverse))
    if isinstance(part, Chain):
        numbered = list(enumerate(part))
        for k, inner in reversed(numbered) if inverse else numbered:
            found, value = _walk(f"{path}parts.{k}.", inner, value, context, inverse)
            if found is not None:
                return found, value
        return None, value
    value, ladj = getattr(part, _NAMES[inverse])(value, context if part.context_dim else None)
    if value.isfinite().all() and ladj.isfinite().all():
        return None, value
    where = f"{path[:-1] or 'the transform'} ({type(part).__name__})"
    for kind, held in (("parameter", part.named_parameters()), ("buffer", part.named_buffers())):
        for name, tensor in held:
            if not tensor.isfinite().all():
                return f"{where}: {kind} {name} {_count(tensor)}", value
    what = ("ladj", ladj) if value.isfinite().all() else ("x" if inverse else "y", value)
    return f"{where}: output {what[0]} {_count(what[1])}", value
