"""The checks of the base contract, one function each."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable, Sequence

import torch
from torch import Size, Tensor, nn

from pyro_flows.core.checks import joint_shape
from pyro_flows.testing.subject import DERIVATIVE, DIFFERENCE, NAMES, Subject

__all__ = ["ALL", "OF_ROWS"]


def _shapes(s: Subject) -> None:
    t = s.transform
    joint = s.x.shape[: s.x.dim() - len(t.event_shape)]
    joint = joint if s.context is None else joint_shape(joint, s.context.shape[:-1])
    s.equal("y of shape", tuple(s.y.shape), tuple(joint + t.data_shape), "y is (*batch, *data_shape)")
    s.equal("ladj of shape", tuple(s.ladj.shape), tuple(joint), "sum ladj over the whole event")
    s.equal("x of shape", tuple(s.back.shape), tuple(joint + t.event_shape), "x is (*batch, *event_shape)")
    s.equal("inverse ladj of shape", tuple(s.back_ladj.shape), tuple(joint), "sum ladj over the whole event")
    for what, result in (("y", s.y), ("ladj", s.ladj), ("x = f^-1(y)", s.back), ("inverse ladj", s.back_ladj)):
        s.equal(f"all of {what} finite:", bool(result.isfinite().all()), True, "locate_nonfinite says where it begins")
    hint = "allocate with new_zeros, zeros_like and their kin, not in torch's default dtype or device"
    for dtype in (torch.float32, torch.float64):
        twin = t if dtype == s.x.dtype else copy.deepcopy(t).to(dtype)
        context = None if s.context is None else s.context.to(dtype)
        for name, value in zip(NAMES, (s.x, s.y), strict=True):
            with torch.no_grad():
                results = getattr(twin, name)(value.to(dtype), context)
            for what, result in zip(("value", "ladj"), results, strict=True):
                s.equal(f"{what} of {name} in", result.dtype, dtype, hint)
                s.equal(f"{what} of {name} on", result.device, s.x.device, hint)


def _structure(s: Subject) -> None:
    t = s.transform
    s.equal("domain.event_dim", t.domain.event_dim, len(t.event_shape), "wrap it in constraints.independent")
    s.equal("codomain.event_dim", t.codomain.event_dim, len(t.data_shape), "wrap it in constraints.independent")
    if s.y.numel():  # torch cannot check an empty batch
        s.equal("all of y in codomain:", bool(t.codomain.check(s.y).all()), True, f"codomain is {t.codomain}")
    view = s.bound(t)
    hint = "do not override forward_shape and inverse_shape; data_shape says what differs"
    s.equal("forward_shape", tuple(view.forward_shape(s.x.shape)), tuple(s.y.shape), hint)
    s.equal("inverse_shape", tuple(view.inverse_shape(s.y.shape)), tuple(s.back.shape), hint)


def _batch(s: Subject) -> None:
    t, results = s.transform, ((s.y, s.ladj), (s.back, s.back_ladj))
    for side, (name, value) in enumerate(zip(NAMES, (s.x, s.y), strict=True)):
        run: Callable[..., tuple[Tensor, Tensor]] = torch.no_grad()(getattr(t, name))
        event, want = (t.event_shape, t.data_shape)[side], results[side]
        value = value.expand(s.batch + event)
        hint = "use dimensions counted from the end, reshape instead of view, and never the size of the batch"
        s.same("with a leading dimension of 1", run(value[None], s.context), (want[0][None], want[1][None]), side, hint)
        strided = torch.stack((value, value), -1)[..., 0]
        s.same("for a non-contiguous value", run(strided, s.context), want, side, hint)
        one = None if s.context is None else s.context.new_zeros(s.context.shape[-1])
        for empty in ((0,), (2, 0)):
            got = run(value.new_zeros(*empty, *event), one)
            s.equal("ladj of an empty batch of shape", tuple(got[1].shape), empty, hint)
            s.equal("value of an empty batch in batch shape", tuple(got[0].shape[: len(empty)]), empty, hint)
        if s.batch.numel() == 0:
            continue
        # Batch mates, halved values, must not change a value's result.
        rows, contexts = s.rows(value, event), s.given_contexts
        halves = rows / 2
        mates = torch.cat((rows[:1], halves[(t.domain, t.codomain)[side].check(halves)]))
        shared = None if contexts is None else contexts[0]
        hint = "statistics of a batch must be buffers in both directions, not taken from the value"
        single = run(rows[0], shared)
        for what, out in (("a value among batch mates", run(mates, shared)), ("a batch", run(rows, contexts))):
            s.same(f"of the first row of {what}", (out[0][0], out[1][0]), single, side, hint)


def _round_trip(s: Subject) -> None:
    context = s.given_contexts
    with torch.no_grad():
        y = s.transform.forward_and_ladj(s.rows(s.x, s.transform.event_shape), context)[0]
        again = s.transform.forward_and_ladj(s.transform.inverse_and_ladj(y, context)[0], context)[0]
    way = s.ways[0]
    hint = "inverse_and_ladj does not undo forward_and_ladj; judged by |f(f^-1(y)) - y| against |y| + |f'| |x|"
    s.close("f(f^-1(y))", again.flatten(1), y.flatten(1), hint, way.scale())
    s.close("y in float64", y.flatten(1), way.out.flatten(1), "the given dtype loses more than rounding", way.scale())


def _ladj(s: Subject) -> None:
    for side, way in enumerate(s.ways):
        if way.jacobian.shape[1] == way.jacobian.shape[2]:  # maps onto manifolds have no determinant
            truth = torch.linalg.slogdet(way.jacobian)[1]
            hint = "ladj is log|det| of the autograd Jacobian, in nats; see which dimensions or factors it leaves out"
            if torch.allclose(way.ladj, -truth, rtol=DERIVATIVE, atol=DERIVATIVE):
                hint = "the sign is wrong: forward gives log|det dy/dx|, inverse log|det dx/dy|"
            s.close(f"ladj of {NAMES[side]}", way.ladj, truth, hint, way.ladj_scale(), DERIVATIVE)
        got = s.rows((s.ladj, s.back_ladj)[side], Size())
        s.close(f"ladj of {NAMES[side]} in float64", got, way.ladj, "the given dtype loses too much", s.scales[2])
    hint = "inverse_and_ladj returns log|det dx/dy|: the negative of the forward one at the same point"
    s.close("inverse ladj", s.back_ladj, -s.ladj, hint, s.scales[2])


def _random_like(value: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(value.shape, generator=generator, dtype=value.dtype, device="cpu").to(value.device)


def _gradients(loss: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, zero for what the loss does not depend on."""
    if not loss.requires_grad:
        return [torch.zeros_like(value) for value in wanted]
    return list(torch.autograd.grad(loss, wanted, materialize_grads=True))


def _gradient(s: Subject) -> None:
    generator = torch.Generator().manual_seed(0)
    t, context = s.precise, s.few_contexts
    extra = [] if context is None else [context.clone().requires_grad_()]
    learned = [(name, p) for name, p in t.named_parameters() if p.requires_grad]
    names = ["value", *["context"] * len(extra), *(name for name, _ in learned)]
    for side, way in enumerate(s.ways):
        run, other = (getattr(t, name) for name in (NAMES[side], NAMES[1 - side]))
        inputs = [way.value.clone().requires_grad_(), *extra, *(p for _, p in learned)]
        by_out, by_ladj = _random_like(way.out, generator), _random_like(way.ladj, generator)

        def total() -> Tensor:
            out, ladj = run(inputs[0], *extra)  # noqa: B023 (called within this turn of the loop)
            return (by_out * out).sum() + (by_ladj * ladj).sum()  # noqa: B023

        with torch.enable_grad():
            loss = total()
            grads = _gradients(loss, inputs)
        back = s.ways[1 - side]
        if back.jacobian.shape[1] == back.jacobian.shape[2]:
            # With g the other direction: out = g^-1(value), d out = -(g')^-1 dg, ladj = -ladj_g(out).
            pulled = by_out.flatten(1) - by_ladj[:, None] * back.slope
            pulled = torch.linalg.solve(back.jacobian.mT, pulled.unsqueeze(-1)).squeeze(-1)
            with torch.enable_grad():
                out, ladj = other(way.out, *extra)
                implicit = _gradients(-(pulled * out.flatten(1)).sum() - (by_ladj * ladj).sum(), inputs[1:])
            for name, got, want in zip(names, grads, [pulled.reshape(way.value.shape), *implicit], strict=True):
                hint = f"the gradients of {NAMES[0]} and {NAMES[1]} do not belong to the same map"
                size = want.abs().max() if want.numel() else 0.0
                s.close(f"gradient of {NAMES[side]} for {name}", got, want, hint, size, DERIVATIVE)
        if s.transform.discrete:
            continue  # gradients pass roundings as if these were the identity, so no differences confirm them
        steps = [_random_like(value, generator) for value in inputs]
        slopes = [(g * d).flatten() for g, d in zip(grads, steps, strict=True)]
        ends = []
        with torch.no_grad():
            for move in (1e-6, -2e-6, 1e-6):
                for value, step in zip(inputs, steps, strict=True):
                    value.add_(step, alpha=move)
                ends.append(total())
        hint = "compare each gradient with finite differences in float64; clamps and detach() break it"
        size = float(torch.cat(slopes).abs().sum() + loss.detach().abs())
        what = f"directional derivative of {NAMES[side]} by finite differences"
        s.close(what, torch.cat(slopes).sum(), (ends[0] - ends[1]) / 2e-6, hint, size, DIFFERENCE)


def _functions(s: Subject) -> None:
    hint = "torch.func needs leaf maths without .item(), boolean-mask indexing, or writes in place"
    for side, way in enumerate(s.ways):
        run = getattr(s.precise, NAMES[side])
        inputs = (way.value,) if s.few_contexts is None else (way.value, s.few_contexts)
        s.close(f"vmap of {NAMES[side]}", torch.func.vmap(run)(*inputs)[0], way.out, hint, s.scales[side], DERIVATIVE)
        jacobian = torch.func.jacrev(lambda *v: run(*v)[0])(*(v[0] for v in inputs))  # noqa: B023
        want = way.jacobian[0].reshape(jacobian.shape)
        s.close(f"jacrev of {NAMES[side]}", jacobian, want, hint, float(want.abs().max()), DERIVATIVE)


def _inv(s: Subject) -> None:
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


def _memo(s: Subject) -> None:
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
        for turn in range(4):  # each side twice, for a graph allows one backward pass
            if turn % 2 == 0:
                y = view(x)
                loss, fresh = y.sum() + view.log_abs_det_jacobian(x, y).sum(), view.forward_and_ladj(x)
            else:
                back = view.inv(data)
                loss, fresh = back.sum() - view.log_abs_det_jacobian(back, data).sum(), view.inverse_and_ladj(data)
            want = fresh[0].sum() + fresh[1].sum()
            what = "a result in grad mode after a no_grad call to have a graph:"
            s.equal(what, loss.requires_grad, want.requires_grad, hint)
            for got, true in zip(_gradients(loss, params), _gradients(want, params), strict=True):
                s.close("gradient after a no_grad call", got, true, hint, true.abs().max() if true.numel() else 0.0)
        y = view(x)
    generator = torch.Generator().manual_seed(0)
    view.log_abs_det_jacobian(x, y), view.inv(y)
    with torch.no_grad():
        view.log_abs_det_jacobian(x, y), view.inv(y)
        for p in params:
            p.add_(_random_like(p, generator), alpha=0.1)
        changed = s.bound(copy.deepcopy(twin))
        want_x, minus = changed.inverse_and_ladj(y)
        at_x = changed.forward_and_ladj(x)[1]
    hint = "a stale result was returned: something remembered outlives a change of the parameters"
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            for value, what in ((y, "own sample"), (y.detach(), "data")):
                s.close(f"x of the {what} after a change of parameters", view.inv(value), want_x, hint, s.scales[1])
            got = view.log_abs_det_jacobian(x, y)
            # x and y no longer belong together: either ladj is right.
            want = min(at_x, -minus, key=lambda truth: (got - truth).abs().sum())
            s.close("ladj of the same tensors after a change of parameters", got, want, hint, s.scales[2])
    with torch.no_grad():
        y = view(x)
        want_x = changed.inverse_and_ladj(y)[0]
        x.mul_(0.5)
        s.close("x of y, after the x that made it was overwritten", view.inv(y), want_x, hint, s.scales[1])


def _copies(s: Subject) -> None:
    twin = copy.deepcopy(s.transform)
    pickles = False  # whether Python finds the transform's classes
    with contextlib.suppress(pickle.PicklingError, AttributeError):
        pickles = bool(pickle.dumps([type(module) for module in twin.modules()]))
    before = len(pickle.dumps(twin)) if pickles else 0
    rows = 1000
    many = s.x.reshape(-1, *twin.event_shape)[:1].repeat(rows, *(1 for _ in twin.event_shape))
    view = s.bound(twin, None if s.context is None else s.context.new_zeros(s.context.shape[-1]))
    y = view(many)
    view.inv(y.detach())
    hint = "keep results out of the module's state; __getstate__ decides what travels"
    copies = {"deepcopy": copy.deepcopy(twin)}
    for module in (twin, view) if pickles else ():
        size = len(pickle.dumps(module))
        if size > before + rows * y.element_size():
            s.fail(f"a pickle of about {before} bytes", f"{size} after a batch of {rows}", hint)
    if pickles:
        copies["unpickled copy"] = pickle.loads(pickle.dumps(twin))
    for what, other in copies.items():
        s.alike(f"of a {what}", other, s.context, hint)
        shared = {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in twin.parameters()}
        s.equal(f"parameters that a {what} shares:", len(shared), 0, hint)


def _state(s: Subject) -> None:
    file, twin = io.BytesIO(), copy.deepcopy(s.transform)
    torch.save(s.transform.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for p in twin.parameters():
            p.copy_(torch.rand_like(p))
        s.bound(twin)(s.x)
    twin.load_state_dict(torch.load(file, weights_only=True, map_location=s.x.device))
    hint = "everything that defines the map is a parameter or a persistent buffer"
    s.alike("after load_state_dict", twin, s.context, hint)


def _parameters(s: Subject) -> None:
    names: dict[int, str] = {}
    for name, p in s.transform.named_parameters(remove_duplicate=False):
        if not p.is_contiguous():
            hint = "Pyro's param store copies what is not contiguous, and the copy never trains: call .contiguous()"
            s.fail(f"parameter {name} to be contiguous", f"strides {p.stride()} for shape {tuple(p.shape)}", hint)
        first = names.setdefault(id(p), name)
        s.equal(f"parameter {name} registered once; its other name:", first, name, "register each tensor in one place")


def _context(s: Subject) -> None:
    t, x, size = s.transform, s.x, s.transform.context_dim
    if size == 0 or s.context is None or s.given_contexts is None:
        extra = x.new_zeros(2)
        for call, value in s.sides:
            s.refuses("a context that is not taken", ValueError, lambda: call(value, extra))  # noqa: B023
        s.refuses("condition() with context_dim=0", ValueError, lambda: t.condition(extra))
        return
    for call, value in s.sides:
        s.refuses("a missing context", ValueError, lambda: call(value))  # noqa: B023
        s.refuses("a context that is too long", ValueError, lambda: call(value, x.new_zeros(size + 1)))  # noqa: B023
    s.refuses("a context that is too long", ValueError, lambda: t.condition(x.new_zeros(size + 1)))
    hint = "the context's batch broadcasts against the value's"
    s.alike("of .condition(context)", t.condition(s.context), None, hint)
    if s.batch.numel():
        with torch.no_grad():
            contexts, one = s.given_contexts.repeat(2, 1), s.rows(x, t.event_shape)[0]
            whole = t.forward_and_ladj(one.expand(len(contexts), *t.event_shape), contexts)
            s.same("of one value at several contexts", t.forward_and_ladj(one, contexts), whole, 0, hint)
            shape = tuple(t.condition(contexts).forward_shape(t.event_shape))
            s.equal("forward_shape with a batch of contexts", shape, tuple(whole[0].shape), hint)


def _errors(s: Subject) -> None:
    t = s.transform
    for call, value in s.sides:
        wide = torch.cat((value, value[..., :1]), -1)
        s.refuses("a wrong event size", ValueError, lambda: call(wide, s.context))  # noqa: B023
        s.refuses("too few dimensions", ValueError, lambda: call(value.new_zeros(()), s.context))  # noqa: B023
        if t.discrete:
            s.refuses("fractions", ValueError, lambda: call(value + 0.5, s.context))  # noqa: B023
            continue
        s.refuses("integers", TypeError, lambda: call(value.long(), s.context))  # noqa: B023
        if any(p.is_floating_point() for p in (*t.parameters(), *t.buffers())):
            other = value.double() if value.dtype == torch.float32 else value.float()
            s.refuses("another dtype than the parameters'", TypeError, lambda: call(other, s.context))  # noqa: B023


_FIRST = (_shapes, _structure, _parameters, _batch, _round_trip, _ladj, _gradient, _functions)
_THEN = (_inv, _memo, _copies, _state, _context, _errors)
ALL: dict[str, Callable[[Subject], None]] = {check.__name__[1:]: check for check in (*_FIRST, *_THEN)}
OF_ROWS = ("round_trip", "ladj", "gradient", "functions")
"""Checks that an empty batch passes."""
