"""A computation recorded once, which runs again without Python's layers around it.

``make_fx`` of torch records as much, but loads the compiler, a third of a short fit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tag, Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pyro_flows.core.modes import recording
from pyro_flows.inverse.sweep import KERNELS

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


TRIALS = 2  # the first step of a fit may set up buffers
SHAPES, RECORDINGS = 4, 12  # at most
CHECKED = {2, 16, 256, 4096, 65536}  # calls that are compared with plain ones
BYTES = 2**30  # of all tensors made, which are held while a call is recorded
Results = Sequence[Tensor | None]


class RecordError(RuntimeError):
    """A computation that depends on values in Python, or changes tensors that it did not make."""


class Graph:
    """The recorded computation of tensors ``inputs``, in terms of which the result was a tuple of tensors.

    ``program`` takes the inputs and then the ``constants``, all other tensors that were read.
    """

    def __init__(self, program: fx.GraphModule, constants: list[Tensor], read: dict[Tensor, int]) -> None:
        self.program, self.constants = program, constants
        self._run, self._read = program.forward, list(read.items())

    @property
    def holds(self) -> bool:
        """Whether no tensor from outside changed since."""
        return all(tensor._version == version for tensor, version in self._read)

    def __len__(self) -> int:
        """The number of calls of torch."""
        return sum(node.op in ("call_function", "call_method") for node in self.program.graph.nodes)

    @property
    def portable(self) -> bool:
        """Whether it consists of torch's own operations."""
        calls = [node.target for node in self.program.graph.nodes if node.op == "call_function"]
        return not any(isinstance(each, FunctionType | _Call) for each in calls)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Runs the computation anew, without gradients."""
        with torch.no_grad():
            return self._run(*inputs, *self.constants)


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

    def graph_of(self, *inputs: Tensor | None) -> Graph | None:
        """Returns the recording that was found right for inputs like these."""
        key = _shapes(inputs)
        return self._graphs.get(key) if self.why_not is None and self._calls.get(key, 0) > TRIALS else None

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
        state = _random_state(given)
        with _Call.shared():
            plain = self.run(*inputs)
            try:
                with torch.random.fork_rng(devices=_devices(given)):
                    _set_random_state(given, state)
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
        state = _random_state(given)
        try:
            found, self._graphs[key] = record(lambda: self.run(*inputs), given)
        except RecordError as error:
            if self._calls[key] == TRIALS:
                self.why_not = str(error)
        else:
            return found
        _set_random_state(given, state)
        return self.run(*inputs)


def _shapes(inputs: Sequence[Tensor | None]) -> Any:
    return tuple(None if each is None else (each.shape, each.dtype) for each in inputs)


def _devices(tensors: Sequence[Tensor]) -> list[torch.device]:
    return list({each.device for each in tensors if each.is_cuda})


def _random_state(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(each) for each in _devices(tensors))]


def _set_random_state(tensors: Sequence[Tensor], state: Sequence[Tensor]) -> None:
    torch.set_rng_state(state[0])
    for each, known in zip(_devices(tensors), state[1:], strict=True):
        torch.cuda.set_rng_state(known, each)


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
    if recorder is None:
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
    recorder.add(_Call(call), inputs, found)
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


def record(run: Callable[[], Results], inputs: Sequence[Tensor]) -> tuple[Results, Graph]:
    """Runs a computation of ``inputs`` and records it; returns its results and the graph.

    Backward passes inside are recorded as well, random numbers are drawn anew in each run, and constants are used as
    they are then.  What Python computes of numbers, shapes and branches stays as it was.

    Raises:
        RecordError: if Python asks for a tensor's value, or a tensor from outside is changed.
    """
    recorder = _Recorder.active = _Recorder(inputs)
    try:
        with recording(), recorder:
            results = tuple(run())
    finally:
        _Recorder.active = None
    return results, recorder.finish(results)


class _Recorder(TorchDispatchMode):
    """Writes down each call of a kernel."""

    active: _Recorder | None = None

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        self.kept: list[Tensor] = []  # so that no id and no storage occurs twice
        self.constants: dict[fx.Node, Tensor] = {}
        self.read: dict[Tensor, int] = {}  # with versions
        self.outer: set[int] = set()  # storages
        self.written: set[int] = set()
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
        kernel: Any = KERNELS.get(func, func)
        found = kernel(*args, **kwargs)
        several = isinstance(found, tuple | list)
        if not all(isinstance(each, Tensor) for each in (found if several else [found])) or (
            Tag.dynamic_output_shape in func.tags
        ):
            raise RecordError(f"{func.name()} gives Python a value that depends on tensors")
        given = zip(func._schema.arguments, args, strict=False)
        named = ((spec, kwargs.get(spec.name)) for spec in func._schema.arguments)
        for each in tree_leaves([value for spec, value in (*given, *named) if _writes(spec)]):
            if isinstance(each, Tensor):
                if _storage(each) in self.outer:
                    raise RecordError(f"{func.name()} changes a tensor from outside")
                self.written.add(_storage(each))
        self.add(func, args, found, kwargs)
        return found

    def add(
        self, call: Callable[..., Any], args: Sequence[Any], found: Any, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Notes a call and its results."""
        several = isinstance(found, tuple | list)
        made: list[Any] = list(found) if several else [found]
        node = self.graph.call_function(call, *tree_map(self._node_of, (tuple(args), dict(kwargs or {}))))
        self.bytes += sum(each.nbytes for each in made if _storage(each) not in self.outer)
        if self.bytes > BYTES:
            raise RecordError("its tensors are so large that calls cost little")
        for k, each in enumerate(made):
            self._know(each, self.graph.call_function(operator.getitem, (node, k)) if several else node)

    def _know(self, tensor: Tensor, node: fx.Node) -> None:
        self.nodes[id(tensor)] = node
        node.meta["value"] = tensor
        self.kept.append(tensor)

    def _node_of(self, value: object) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.nodes:
            node = self.graph.placeholder(f"c{len(self.constants)}")
            self.constants[node], self.read[value] = value, value._version
            self.outer.add(_storage(value))
            self._know(value, node)
        return self.nodes[id(value)]

    def finish(self, results: Results) -> Graph:
        self.graph.output(tuple(self._node_of(each) for each in results))
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
        return Graph(fx.GraphModule(torch.nn.Module(), self.graph), constants, self.read)

    def _simplify(self) -> None:
        """Leaves out calls that change nothing, repeat another, are not needed, or depend on nothing."""
        seen: dict[Any, fx.Node] = {}
        for node in list(self.graph.nodes):
            if node.op != "call_function" or node.target is operator.getitem:
                continue
            same = self._same(node)
            if same is None and self._is_pure(node):
                if "value" in node.meta and (
                    node.target in LIKE or all(each in self.constants for each in node.all_input_nodes)
                ):
                    same = self.graph.placeholder(f"c{len(self.constants)}")
                    self.constants[same] = same.meta["value"] = node.meta["value"]
                else:
                    key = _key(node)
                    same = seen.setdefault(key, node)
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
        for node in self.graph.nodes:
            if isinstance(node.target, OpOverload):
                self._quicken(node)

    def _storages(self, node: fx.Node) -> set[int]:
        made = [node] if "value" in node.meta else list(node.users)  # one result or several
        return {_storage(each.meta["value"]) for each in made if "value" in each.meta}

    def _is_pure(self, node: fx.Node) -> bool:
        """Whether the call may run once for several, at any time."""
        func: Any = node.target
        if not isinstance(func, OpOverload):
            return False
        touched = self._storages(node).union(*map(self._storages, node.all_input_nodes))
        return Tag.nondeterministic_seeded not in func.tags and not touched & self.written

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
        if node.target in ALIASES or (alike and node.target in RESHAPES | TURNS):
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
        name = func._schema.name.removeprefix("aten::")
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


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
