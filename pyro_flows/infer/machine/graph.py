"""A computation recorded once, which runs again without Python's layers around it.

``make_fx`` of torch records as much, but loads the compiler, a third of a short fit.
"""

from __future__ import annotations

import gc
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tag, Tensor, fx, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_flows.core.modes import full_precision, recording
from pyro_flows.infer.machine.randomness import random_state, set_random
from pyro_flows.inverse.sweep import BY_BLOCKS, KERNELS

__all__ = ["Graph", "RecordError", "Replay", "alike", "record", "replayable", "unrecorded"]

aten = torch.ops.aten
ALIASES = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}
RESHAPES = {aten.view.default, aten.expand.default, aten._unsafe_view.default}
LIKE = {  # of a shape alone
    getattr(aten, f"{kind}{name}{like}").default
    for name in ("ones", "zeros", "full")
    for kind, like in (("new_", ""), ("", "_like"))
}
FACTORS = {"value", "alpha", "beta"}  # keywords that torch's functions share with the kernels
TURNS = {aten.t.default, aten.permute.default, aten.transpose.int}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
READS = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.data_ptr}  # without a call of a kernel
DETACHES = {Tensor.detach, torch.detach, Tensor.data.__get__}  # type: ignore[attr-defined]
# In place of a kernel whose rule for many points warns.
PLAIN_FORMS = {aten.log_sigmoid_backward.default: lambda grad, x, buffer: grad * torch.sigmoid(-x)}
PLAIN = (int, float, complex, bool, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))

TRIALS = 2  # the first step of a fit may set up buffers
SHAPES, RECORDINGS = 4, 12  # at most
CHECKED = {2, 16, 256, 4096, 65536}  # calls that are compared with plain ones
BYTES = 2**30  # of all tensors made, which are held while a call is recorded
Results = Sequence[Tensor | None]


class RecordError(RuntimeError):
    """A computation that depends on values in Python, or changes tensors that it did not make."""


class Graph:
    """The recorded computation of tensors ``inputs``, in terms of which the result was a tuple of tensors.

    ``program`` takes the inputs and then the ``constants``, all other tensors that were read.  A run makes tensors of
    ``bytes``, at most, and ``mutates`` if it changes some of them.
    """

    def __init__(
        self,
        program: fx.GraphModule,
        constants: list[Tensor],
        read: dict[Tensor, int],
        made: int = 0,
        mutates: bool = False,
    ) -> None:
        self.program, self.constants, self.bytes, self.mutates = program, constants, made, mutates
        self._run, self.read = program.forward, read
        self._length = sum(node.op in ("call_function", "call_method") for node in program.graph.nodes)

    @property
    def holds(self) -> bool:
        """Whether no tensor from outside changed since."""
        return all(tensor._version == version for tensor, version in self.read.items())

    def __len__(self) -> int:
        """The number of calls of torch."""
        return self._length

    @property
    def portable(self) -> bool:
        """Whether it consists of torch's own operations."""
        return not any(isinstance(node.target, FunctionType | _Call) for node in self.program.graph.nodes)

    @full_precision  # casts are recorded, and exact parts use no TF32
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Runs the computation anew, without gradients."""
        with torch.no_grad():
            return self._run(*inputs, *self.constants)

    def differentiable(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Runs the computation anew, so that gradients can be taken."""
        return self._run(*inputs, *self.constants)

    def functional(self, *inputs: Tensor) -> Graph:
        """Returns the same computation without changes of tensors."""

        def run() -> tuple[Tensor, ...]:
            torch._enable_functionalization(reapply_views=True)
            try:
                found = self._run(*map(torch._to_functional_tensor, inputs), *self.constants)
                for each in found:
                    torch._sync(each)
                return tuple(map(torch._from_functional_tensor, found))
            finally:
                torch._disable_functionalization()

        with torch.no_grad():
            graph = record(run, inputs)[1]
        for node in graph.program.graph.nodes:
            if node.target is aten.copy.default:
                node.target = _copied
        graph.program.recompile()
        return Graph(graph.program, graph.constants, graph.read)


class Replay:
    """Calls a function of tensors by its recording, for each shape of its inputs.

    The function also reads ``parameters``.  The first call of a shape is recorded, so that all results have the same
    rounding; the second, and ever fewer after it, are compared with the function itself.  Where a recording fails or
    differs, the function is called as it is, and ``why_not`` says why.
    """

    def __init__(self, run: Callable[..., Results], parameters: Sequence[Tensor], why_not: str | None = None) -> None:
        self.run, self.parameters, self.why_not = run, list(parameters), why_not
        self._graphs: dict[Any, Graph] = {}
        self._calls: dict[Any, int] = {}
        self.recordings = 0

    def graph_of(self, *inputs: Tensor | None, whole: bool = False) -> Graph | None:
        """Returns the recording that was found right for inputs like these; ``whole`` makes a new one."""
        if self.why_not is not None or self._calls.get(key := _shapes(inputs), 0) <= TRIALS:
            return None
        if not whole:
            return self._graphs.get(key)
        given = [*self.parameters, *(each for each in inputs if each is not None)]
        with torch.random.fork_rng([]):  # whole ones are for the CPU
            return record(lambda: self.run(*inputs), given, whole=True)[1]

    def __call__(self, *inputs: Tensor | None) -> Results:
        """Returns the function's results, without gradients."""
        if self.why_not is not None:
            return self.run(*inputs)
        key = _shapes(inputs)
        given = [*self.parameters, *(each for each in inputs if each is not None)]
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        graph = self._graphs.get(key)
        if graph is None or not graph.holds:
            self.recordings += 1
            if self.recordings > RECORDINGS:
                self.why_not = "what it reads keeps changing"
            return self._record(key, given, inputs)
        if calls not in CHECKED:
            return graph(*given)
        device = given[0].device
        state = random_state(device)
        with _Call.shared():
            plain = self.run(*inputs)
            try:
                with torch.random.fork_rng([device] if device.type == "cuda" else []):
                    set_random(state, device)
                    found = graph(*given)
            except (TypeError, RuntimeError) as error:
                self.why_not = f"a recording of its step fails: {error}"
                return plain
        if all(map(alike, found, plain)):
            return found
        self.why_not = "a recording of its step gives other numbers"
        return plain

    def _record(self, key: Any, given: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> Results:
        if len(self._calls) > SHAPES:
            return self.run(*inputs)
        state = random_state(device := given[0].device)
        try:
            found, self._graphs[key] = record(lambda: self.run(*inputs), given)
        except RecordError as error:
            if self._calls[key] == TRIALS:
                self.why_not = str(error)
        else:
            return found
        set_random(state, device)
        return self.run(*inputs)


def _copied(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(to).expand_as(to)


def _shapes(inputs: Sequence[Tensor | None]) -> Any:
    return tuple(None if each is None else (each.shape, each.dtype) for each in inputs)


def alike(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two results differ by rounding only."""
    if a is None or b is None:
        return a is b
    rtol = 1e-3 if a.dtype.itemsize < 8 else 1e-6
    return bool(torch.allclose(a, b, 0.0, rtol * float(b.abs().nan_to_num().max()) + 1e-12, equal_nan=True))


def replayable(module: nn.Module) -> str | None:
    """Returns why a module's computation may change between calls, or ``None``: foreign code, or hooks."""
    for each in module.modules():
        kind = type(each)
        if kind.__module__.partition(".")[0] not in ("pyro_flows", "pyro", "torch"):
            return f"{kind.__name__} is foreign code, which may change between steps"
        if any(getattr(each, name) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")):
            return f"{kind.__name__} has hooks"
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in module.parameters()):
        return "a parameter has hooks"
    return None


def unrecorded(call: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Calls a function of tensors, without gradients; a recording keeps the call as one step of its own."""
    recorder = _Recorder.active
    if recorder is None or recorder.whole:
        found = call(*inputs)
        if _Call.results is not None:
            _Call.results.append(found)
        return found
    with torch.utils._python_dispatch._pop_mode_temporarily(), recording(-1):
        _Recorder.active = None
        try:
            found = call(*inputs)
        finally:
            _Recorder.active = recorder
    recorder.add(_Call(call), recorder.node_of((inputs, {})), found)
    return found


class _Call:
    """A call that a graph makes as it is."""

    results: list[Any] | None = None
    __name__ = "call"

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    @classmethod
    @contextmanager
    def shared(cls) -> Iterator[None]:
        """Within it, a graph takes over the results of a plain run before it."""
        cls.results = []
        try:
            yield
        finally:
            cls.results = None

    def __call__(self, *inputs: Tensor) -> Any:
        return _Call.results.pop(0) if _Call.results else self.call(*inputs)


def record(
    run: Callable[[], Results], inputs: Sequence[Tensor], failures: list[Tensor] | None = None, whole: bool = False
) -> tuple[Results, Graph]:
    """Runs a computation of ``inputs`` and records it; returns its results and the graph.

    Backward passes inside are recorded as well, random numbers are drawn anew in each run, and constants are used as
    they are then.  What Python computes of numbers, shapes, constants and branches stays as it was.  With ``failures``,
    decompositions of matrices do not raise, but append their codes, 0 for success.  A ``whole`` recording has no calls
    but of torch, for a compiler.

    Raises:
        RecordError: if Python asks for a value that depends on the inputs or on random numbers, or a tensor from
            outside is changed.
    """
    recorder = _Recorder.active = _Recorder(inputs, failures, whole)
    collects = gc.isenabled()
    gc.disable()  # a third of the time, since all that is made is kept
    try:
        with recording(), recorder, _Reads(recorder):
            results = tuple(run())
        _Recorder.active = None
        return results, recorder.finish(results)
    finally:
        _Recorder.active = None
        if collects:
            gc.enable()


class _Reads(TorchFunctionMode):
    """Refuses values that leave torch without a kernel, unless they depend on constants alone."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _Recorder.active is not self.recorder:
            return func(*args, **(kwargs or {}))
        if func in READS and not self.recorder.is_fixed(args[0]):
            raise RecordError(f"{func.__name__}() gives Python a value that depends on tensors")
        found = func(*args, **(kwargs or {}))
        if func in DETACHES and not torch.is_grad_enabled():
            if id(found) in self.recorder.nodes:
                self.recorder.detached.add(self.recorder.nodes[id(found)])
            elif torch._is_functional_tensor(found):  # whose inner tensor has another identity
                self.recorder.detaches = True
        return found


class _Recorder(TorchDispatchMode):
    """Writes down each call of a kernel."""

    active: _Recorder | None = None

    def __init__(self, inputs: Sequence[Tensor], failures: list[Tensor] | None, whole: bool = False) -> None:
        super().__init__()
        self.failures, self.whole = failures, whole
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        self.kept: list[Tensor] = []  # so that no id and no storage occurs twice
        self.constants: dict[fx.Node, Tensor] = {}
        self.read: dict[Tensor, int] = {}  # with versions
        self.outer: set[int] = set()  # storages
        self.written: set[int] = set()  # by values that depend on constants alone
        self.varied: set[int] = set()  # by others
        self.fixed: set[fx.Node] = set()  # nodes that depend on constants alone
        self.detached: set[fx.Node] = set()  # by the caller, which matters where gradients are taken later
        self.detaches = False  # whether all calls of detach may be such
        self.bytes = 0
        for each in inputs:
            self._know(each, self.graph.placeholder(f"i{len(self.kept)}"))
            self.outer.add(_storage(each))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's way imports its compiler

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        plain = PLAIN_FORMS.get(func) or (BY_BLOCKS.get(func) if self.whole else None)
        if plain is not None:
            with self:
                return plain(*args, **kwargs)
        if func is aten._linalg_check_errors.default and self.failures is not None:
            self.failures.append(args[0])
            return None
        if func.overloadpacket in INDEXED:
            args = (args[0], list(self._places(args[1])), *args[2:])
        self._fixed = True
        nodes = self.node_of((args, kwargs))
        fixed = self._fixed and Tag.nondeterministic_seeded not in func.tags
        kernel: Any = KERNELS.get(func, func)
        found = kernel(*args, **kwargs)
        several = isinstance(found, tuple | list)
        made: list[Any] = list(found) if several else [found]
        sized = Tag.dynamic_output_shape in func.tags and func is not aten.index.Tensor
        if sized or not all(isinstance(each, Tensor) or (several and each is None) for each in made):
            if not fixed:
                raise RecordError(f"{func.name()} gives Python a value that depends on tensors")
            return found  # its tensors are constants
        if func._schema.is_mutable:
            given = zip(func._schema.arguments, args, strict=False)
            named = ((spec, kwargs.get(spec.name)) for spec in func._schema.arguments)
            for each in tree_leaves([value for spec, value in (*given, *named) if _writes(spec)]):
                if isinstance(each, Tensor):
                    if _storage(each) in self.outer:
                        raise RecordError(f"{func.name()} changes a tensor from outside")
                    (self.written if fixed else self.varied).add(_storage(each))
        self.add(func, nodes, found, fixed)
        return found

    def add(self, call: Callable[..., Any], nodes: tuple[Any, Any], found: Any, fixed: bool = False) -> None:
        """Notes a call and its results."""
        several = isinstance(found, tuple | list)
        made: list[Any] = list(found) if several else [found]
        node = self.graph.call_function(call, *nodes)
        self.bytes += sum(each.nbytes for each in made if each is not None and _storage(each) not in self.outer)
        if self.bytes > BYTES:
            raise RecordError("its tensors are so large that calls cost little")
        if fixed:
            self.fixed.add(node)
        for k, each in enumerate(made):
            if each is None:  # a gradient that nobody asked for
                continue
            part = self.graph.call_function(operator.getitem, (node, k)) if several else node
            if fixed:
                self.fixed.add(part)
            self._know(each, part)

    def _places(self, indices: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
        """Replaces masks by the places that they choose, whose number must not depend on inputs."""
        for each in indices:
            if each is None or each.dtype not in (torch.bool, torch.uint8):
                yield each
            elif self.is_fixed(each):
                yield from each.nonzero().unbind(-1)
            else:
                raise RecordError("the size of a choice by a mask depends on tensors")

    def is_fixed(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on constants alone."""
        self._fixed = True
        self.node_of(tensor)
        return self._fixed

    def _know(self, tensor: Tensor, node: fx.Node) -> None:
        self.nodes[id(tensor)] = node
        node.meta["value"] = tensor
        self.kept.append(tensor)

    def node_of(self, value: object) -> Any:
        """Puts nodes in place of tensors, and clears ``_fixed`` at one that may change between runs."""
        if isinstance(value, Tensor):
            node = self.nodes.get(id(value))
            if node is None:
                node = self.graph.placeholder(f"c{len(self.constants)}")
                self.constants[node], self.read[value] = value, value._version
                self.outer.add(_storage(value))
                self.fixed.add(node)
                self._know(value, node)
            elif node not in self.fixed or (self.varied and _storage(value) in self.varied):
                self._fixed = False
            return node
        if isinstance(value, list | tuple):
            return type(value)(map(self.node_of, value))
        if isinstance(value, dict):
            return {name: self.node_of(each) for name, each in value.items()}
        if not isinstance(value, PLAIN):
            raise RecordError(f"a kernel takes a {type(value).__name__}")
        return value

    def finish(self, results: Results) -> Graph:
        self.graph.output(tuple(self.node_of(each) for each in results))
        self._simplify()
        inputs = [node for node in self.graph.nodes if node.op == "placeholder" and node not in self.constants]
        used = [node for node in self.constants if node.users]
        for node in set(self.constants) - set(used):
            self.graph.erase_node(node)
        for node in reversed((*inputs, *used)):  # in this order, before all calls
            self.graph._root.append(node)
        constants = [self.constants[node] for node in used]
        for node in self.graph.nodes:
            node.meta.clear()
        return Graph(fx.GraphModule(torch.nn.Module(), self.graph), constants, self.read, self.bytes, self.mutates)

    def _simplify(self) -> None:
        """Leaves out calls that change nothing, repeat another, are not needed, or depend on nothing."""
        written = self.written | self.varied  # whose first values are lost
        self.shared = self._shared(written)
        seen: dict[Any, fx.Node] = {}
        for node in list(self.graph.nodes):
            fixed = node in self.fixed and "value" in node.meta
            if node.op != "call_function" or (node.target is operator.getitem and not fixed):
                continue
            same = self._same(node)
            fixed |= node.target in LIKE and self._is_pure(node)
            if same is None and fixed and not self._storages(node) & written:
                same = self.graph.placeholder(f"c{len(self.constants)}")
                self.constants[same] = same.meta["value"] = node.meta["value"]
            elif same is None and self._is_pure(node):
                same = seen.setdefault(_key(node), node)
            if same is not None and same is not node:
                if "value" not in node.meta:  # several results
                    for part in list(node.users):
                        twin = next((u for u in same.users if u.args[1] == part.args[1]), None)
                        if twin is None:
                            part.args = (same, part.args[1])
                        else:
                            part.replace_all_uses_with(twin)
                            self.graph.erase_node(part)
                else:
                    node.replace_all_uses_with(same)
                self.graph.erase_node(node)
        for node in reversed(list(self.graph.nodes)):
            if node.op == "call_function" and not node.users and self._can_go(node):
                self.graph.erase_node(node)
        kernels = [node for node in self.graph.nodes if isinstance(node.target, OpOverload)]
        self.mutates = any(node.target._schema.is_mutable for node in kernels)
        for node in kernels:
            self._quicken(node)

    def _shared(self, written: set[int]) -> set[int]:
        """Puts plain calls in place of those that change a tensor without views; returns the other storages."""
        for node in list(self.graph.nodes):  # new tensors come as aliases
            if self._is_alias(node) and len(node.args[0].users) == 1:
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
        members: dict[int, list[fx.Node]] = {storage: [] for storage in written}
        for node in self.graph.nodes:
            for storage in self._storages(node) & written if "value" in node.meta else ():
                members[storage].append(node)
        for storage, nodes in members.items():
            plain = [_functional(node.target) for node in nodes[1:]]
            if all(each is not None and n.args[0] is m for each, m, n in zip(plain, nodes, nodes[1:], strict=False)):
                for target, node in zip(plain, nodes[1:], strict=True):
                    node.target = target  # type: ignore[assignment]
                written = written - {storage}
        return written

    def _is_alias(self, node: fx.Node) -> bool:
        return node.target in ALIASES and node not in self.detached and not self.detaches

    def _storages(self, node: fx.Node) -> set[int]:
        made = [node] if "value" in node.meta else list(node.users)  # one result or several
        return {_storage(each.meta["value"]) for each in made if "value" in each.meta}

    def _is_pure(self, node: fx.Node) -> bool:
        """Whether the call may run once for several, at any time."""
        func: Any = node.target
        if not isinstance(func, OpOverload):
            return False
        touched = self._storages(node).union(*map(self._storages, node.all_input_nodes))
        return Tag.nondeterministic_seeded not in func.tags and not touched & self.shared

    def _can_go(self, node: fx.Node) -> bool:
        func: Any = node.target
        return func is operator.getitem or not (func._schema.is_mutable or Tag.nondeterministic_seeded in func.tags)

    def _same(self, node: fx.Node) -> fx.Node | None:
        """Returns an earlier node with the same value, if this call makes none."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return None
        old, new = source.meta.get("value"), node.meta.get("value")
        if old is None or new is None:
            return None
        alike = old.shape == new.shape and old.stride() == new.stride() and old.dtype == new.dtype
        if self._is_alias(node) or (alike and node.target in RESHAPES | TURNS):
            return source
        if alike and node.target in (aten.mul.Scalar, aten.mul.Tensor) and node.args[1] == 1 and self._is_pure(node):
            return source
        if node.target in TURNS and source.target in TURNS:
            order = [list(_order(source))[k] for k in _order(node)]
            node.args, node.kwargs, node.target = (source.args[0], order), {}, aten.permute.default
            return self._same(node) if order == sorted(order) else None
        return None

    def _quicken(self, node: fx.Node) -> None:
        """Takes the function of ``torch`` that does the same with half the overhead."""
        func: Any = node.target
        if func in KERNELS:
            node.target = cast(Callable[..., Any], KERNELS[func])
            return
        if any(isinstance(each, list) and None in each for each in node.args):
            return
        name = func._schema.name.removeprefix("aten::")
        if name.startswith("__"):  # an operator of Python
            return
        homes = (torch._C._nn,) if func._schema.is_mutable else (torch._C._VariableFunctions, torch._C._nn)
        quick = next((getattr(home, name) for home in homes if hasattr(home, name)), None)
        if quick is not None and node.kwargs.keys() <= FACTORS:
            node.target = quick
        elif not node.kwargs and hasattr(torch._C.TensorBase, name) and isinstance(node.args[0], fx.Node):
            node.op, node.target = "call_method", name


def _order(node: fx.Node) -> Sequence[int]:
    """Returns the order of dimensions of a permutation."""
    value: Any = node.meta["value"]
    dims = list(range(value.dim()))
    if node.target is aten.permute.default:
        return [int(k) % len(dims) for k in node.args[1]]  # type: ignore[union-attr, arg-type]
    if len(dims) < 2:
        return dims
    swapped: Any = (0, 1) if node.target is aten.t.default else node.args[1:]
    a, b = swapped
    dims[a], dims[b] = dims[b], dims[a]
    return dims


def _key(node: fx.Node) -> Any:
    def fixed(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(map(fixed, value))
        return (type(value), value) if isinstance(value, int | float | bool) else value

    return node.target, fixed(node.args), tuple((name, fixed(value)) for name, value in sorted(node.kwargs.items()))


def _functional(target: Any) -> OpOverload | None:
    """Returns the call that makes a new tensor in place of changing its first."""
    if not isinstance(target, OpOverload) or not target._schema.name.endswith("_"):
        return None
    return getattr(getattr(aten, target._schema.name[6:-1], None), target._overloadname, None)


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
