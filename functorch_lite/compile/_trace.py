"""Tracing a function into one graph of its forward and backward pass, the joint graph.

The function runs once, on fake tensors, at an autodiff level on top of a functionalize level. What it did beside
returning values is found out on the way: which inputs it wrote, which outputs share memory with what, and which tensors
it used that are no arguments. Those become inputs, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    py_sym_types,
    track_tensor_tree,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from functorch_lite import _C, _tree
from functorch_lite._boundary import name_of_tensor
from functorch_lite.compile import _nodes
from functorch_lite.compile._annotations import Annotations, ModuleStack
from functorch_lite.compile._arguments import identifier

_FAKE = torch._C._TorchDispatchModeKey.FAKE

Decompositions = Mapping[Any, Callable[..., Any]]


@dataclass
class Input:
    """A tensor that the graph takes."""

    name: str
    #: None, once the function has been traced, for arguments; captured tensors are kept.
    tensor: Tensor | None
    #: Whether its gradient is computed.
    differentiated: bool
    is_leaf: bool
    #: Whether its sizes may become symbols.
    dynamic: bool = False
    #: Whether to take it for a tensor that shares no memory with others.
    is_apart: bool = False


@dataclass
class Write:
    """What the function did to an input. Runtime does it to the real one."""

    input: int
    #: The number of the forward result with the new contents, if these have changed.
    result: int | None
    #: Sizes, strides and offset, if these have changed.
    metadata: tuple[Any, Any, Any] | None
    #: Whether the new contents have a derivative.
    differentiated: bool


@dataclass
class View:
    """An output that shows the memory of an input or of a forward result: the views are taken at runtime."""

    of_input: bool
    base: int
    differentiated: bool
    #: From the base, and integers, to the view.
    graph: fx.GraphModule = field(init=False)
    #: The numbers of the forward results that are those integers.
    integers: list[int] = field(default_factory=list)


@dataclass
class Value:
    """An output that is a forward result."""

    result: int


@dataclass
class SameAsInput:
    """An output that is an input."""

    input: int


@dataclass
class Constant:
    """An output that is no tensor."""

    value: Any


Output = View | Value | SameAsInput | Constant


@dataclass
class Trace:
    """The joint graph of a function, and what is to be done around it."""

    #: Placeholders: inputs, tangents. Outputs: forward results, gradients of all inputs (or None).
    graph_module: fx.GraphModule
    function: Callable[[list[Any]], list[Any]]
    inputs: list[Input]
    fakes: list[Any]
    #: The numbers of the forward results that have a tangent.
    differentiated: list[int]
    tangents: list[Any]
    #: The forward results, as fakes.
    results: list[Any]
    outputs: list[Output]
    writes: list[Write]
    modules: ModuleStack

    def output_nodes(self) -> list[fx.Node | None]:
        """What the graph returns."""
        return _nodes.returned(self.graph_module.graph)

    def guards(self, shape_env: Any) -> str | None:
        """What the sizes of the arguments have to fulfil, as a Python expression; None for anything."""
        arguments = [fake for one, fake in zip(self.inputs, self.fakes, strict=True) if one.tensor is None]
        expression: str | None = shape_env.produce_guards_expression(arguments)
        return expression


def call_traced(function: Callable[[list[Any]], list[Any]], arguments: list[Any]) -> list[Any]:
    """Call the user's function. Its name tells where the user's frames begin."""
    return function(arguments)


def trace(
    function: Callable[[list[Any]], list[Any]],
    inputs: Sequence[Input],
    decompositions: Decompositions,
    shape_env: Any,
    symbolic: bool,
) -> Trace:
    """Trace ``function``, which takes tensors and returns the leaves of its output, in the caller's grad mode."""
    # Without allow_non_fake_inputs: a real tensor that slips through would become a constant.
    fake_mode = FakeTensorMode(shape_env=shape_env)
    with _C.Outside(), fake_mode, enable_python_dispatcher() if symbolic else nullcontext():
        run = _TracedRun(function, list(inputs), fake_mode)
        module = make_fx(run, dict(decompositions), "real", _error_on_data_dependent_ops=False)(*run.fakes)
    return run.finished(module)


class CapturedWrapperError(Exception):
    """The function uses a tensor of a transform around, which is no argument."""


_refusing = threading.local()


@contextmanager
def refusing_wrappers() -> Iterator[None]:
    """In the enclosed code a tensor that a traced function captures must not be one of a transform."""
    before = getattr(_refusing, "on", False)
    _refusing.on = True
    try:
        yield
    finally:
        _refusing.on = before


class _Captures(TorchFunctionMode):
    """Puts lifted tensors in the place of real ones, where the function uses such."""

    def __init__(self, lift: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._lift = lift

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = self.inside((args, kwargs or {}))
        return func(*args, **kwargs)

    def inside(self, tree: Any) -> Any:
        """The tree with lifted tensors."""
        return pytree.tree_map_only(Tensor, self._inside, tree)

    def _inside(self, tensor: Tensor) -> Tensor:
        below = _C.innermost_value(tensor) if _C.is_wrapper(tensor) else tensor
        # Fake tensors compute with real ones on their own account: meanwhile their mode is off.
        is_ours = isinstance(below, FakeTensor) or torch._C._get_dispatch_mode(_FAKE) is None
        return tensor if is_ours else self._lift(tensor)


def _metadata(tensor: Tensor) -> tuple[Any, ...]:
    return (*tensor.shape, *tensor.stride(), tensor.storage_offset())


class Run:
    """One run of the function, forward and backward, at two levels of its own."""

    def __init__(self, function: Callable[..., Any], inputs: list[Input], grad_mode: bool) -> None:
        self.function, self.inputs, self.grad_mode = function, inputs, grad_mode
        self.storage = _C.FunctionalizeLevel(True)
        self.level = _C.AutodiffLevel(False, "compile")
        self.captures = _Captures(self._capture)
        self.modules = ModuleStack()
        self.variables: list[Tensor] = []  # of the autodiff level
        self.arguments: list[Tensor] = []  # as the function sees them
        self.roots: list[Tensor] = []  # their memory before the function has run
        self.metadata: list[tuple[Any, ...]] = []
        self.results: list[Any] = []
        self.outputs: list[Output] = []
        self.writes: list[Write] = []
        self.views: list[tuple[View, Tensor, Tensor]] = []  # with the values of the base and the view
        self._kept: list[Tensor] = []  # as long as their id is used

    def forward(self, values: Sequence[Tensor]) -> None:
        """Call the function, and find out what it did."""
        with self.level, torch.set_grad_enabled(self.grad_mode), _tree.capturing(self.captures.inside), self.captures:
            for one, value in zip(list(self.inputs), values, strict=True):
                self._lift(one, value)
            with self.modules.watching():
                leaves = self.captures.inside(call_traced(self.function, list(self.arguments)))
            self._find_writes()
            self._find_outputs(leaves)
        self.differentiated = [i for i, result in enumerate(self.results) if self._has_derivative(result)]

    def backward(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of all inputs, for tangents of the differentiated results."""
        which = [i for i, one in enumerate(self.inputs) if one.differentiated]
        with _tree.capturing(self.captures.inside), self.captures:
            found = self.level.backward(
                [self.results[i] for i in self.differentiated],
                [self.storage.lift(tangent) for tangent in tangents],
                [self.variables[i] for i in which],
                False,
            )
        gradients: list[Tensor | None] = [None] * len(self.inputs)
        for i, gradient in zip(which, found, strict=True):
            gradients[i] = None if gradient is None else self.storage.value_of(gradient)
        return gradients

    def value(self, result: Any) -> Any:
        """Below both levels."""
        return self.storage.value_of(self.level.value_of(result)) if isinstance(result, Tensor) else result

    def _lift(self, one: Input, value: Tensor) -> Tensor:
        """Add an input at both levels."""
        lifted = self.storage.lift(value)
        variable = self.level.lift_variable(lifted) if one.differentiated else self.level.lift_constant(lifted)
        # Only leaves refuse in-place operators. The copy is taken out of the graph again.
        argument = variable if one.is_leaf or not one.differentiated else variable.clone()
        self.variables.append(variable)
        self.arguments.append(argument)
        self.roots.append(self._memory_value(argument))
        self.metadata.append(_metadata(argument))
        return argument

    def _capture(self, tensor: Tensor) -> Tensor:
        """What takes the place of a tensor from outside, which is an input."""
        for one, argument in zip(self.inputs, self.arguments, strict=False):
            if one.tensor is tensor:
                return argument
        return self._new_input(tensor)

    def _new_input(self, tensor: Tensor) -> Tensor:
        return tensor

    def _memory_value(self, tensor: Tensor) -> Tensor:
        return self.storage.memory_value(self.level.value_of(tensor))

    def _memory(self, tensor: Tensor) -> int | None:
        return self.storage.memory_of(self.level.value_of(tensor))

    def _has_derivative(self, result: Any) -> bool:
        return isinstance(result, Tensor) and self.level.value_of(result) is not result and result.requires_grad

    def _add(self, result: Any) -> int:
        self.results.append(result)
        return len(self.results) - 1

    def _find_writes(self) -> None:
        for i, argument in enumerate(self.arguments):
            contents = self._memory_value(argument) is not self.roots[i]
            metadata = _metadata(argument) != self.metadata[i]
            if not (contents or metadata):
                continue
            new = (tuple(argument.shape), argument.stride(), argument.storage_offset()) if metadata else None
            differentiated = argument.requires_grad and not argument.is_leaf
            self.writes.append(Write(i, self._add(argument) if contents else None, new, differentiated))

    def _find_outputs(self, leaves: list[Any]) -> None:
        inputs = {self._memory(argument): i for i, argument in enumerate(self.arguments)}
        tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
        sharing: dict[int | None, list[Tensor]] = {}
        for leaf in tensors.values():
            sharing.setdefault(self._memory(leaf), []).append(leaf)
        found: dict[int, Output] = {}
        for memory, group in sharing.items():
            for leaf in group:
                found[id(leaf)] = (
                    self._of_input(leaf, inputs[memory]) if memory in inputs else self._of_result(leaf, group, found)
                )
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                self.outputs.append(found[id(leaf)])
            elif isinstance(leaf, py_sym_types):
                self.outputs.append(Value(self._add(leaf)))
            else:
                self.outputs.append(Constant(leaf))

    def _of_input(self, leaf: Tensor, i: int) -> Output:
        argument = self.arguments[i]
        if leaf is argument:
            return SameAsInput(i)
        # A torch.autograd.Function that returns a view has a derivative of its own.
        is_view = leaf._is_view() and leaf._base is (argument._base if argument._is_view() else argument)
        if leaf.requires_grad and not is_view:
            return Value(self._add(leaf))
        return self._view(leaf, of_input=True, base=i, root=self.roots[i])

    def _of_result(self, leaf: Tensor, group: list[Tensor], found: dict[int, Output]) -> Output:
        """An output that shares no memory with an input, but maybe with other outputs."""
        if len(group) == 1:
            return Value(self._add(leaf))
        bases = {id(base): base for base in (x._base if x._is_view() else x for x in group if x.requires_grad)}
        if len(bases) > 1:  # a torch.autograd.Function made one of the other
            return Value(self._add(leaf))
        base = next(iter(bases.values()), None)
        root = self._memory_value(leaf) if base is None else self.value(base)
        whole = root if base is None else base
        if id(whole) not in found:
            found[id(whole)] = Value(self._add(whole))
            self._kept.append(whole)
        value = found[id(whole)]
        assert isinstance(value, Value)
        return value if leaf is base else self._view(leaf, of_input=False, base=value.result, root=root)

    def _view(self, leaf: Tensor, of_input: bool, base: int, root: Tensor) -> View:
        view = View(of_input, base, leaf.requires_grad)
        self.views.append((view, root, self.storage.replay_views(self.level.value_of(leaf), root)))
        return view


class _TracedRun(Run):
    """A run under the tracer."""

    def __init__(self, function: Callable[..., Any], inputs: list[Input], fake_mode: FakeTensorMode) -> None:
        super().__init__(function, inputs, torch.is_grad_enabled())
        self.fake_mode = fake_mode
        self.fakes = [self._fake(one) for one in inputs]
        self.captured: list[fx.Node] = []  # placeholders

    def __call__(self, *fakes: Any) -> list[Any]:
        mode = get_proxy_mode()
        assert mode is not None
        self.tracer = mode.tracer
        annotations = Annotations(self.tracer.graph, self.modules)
        with self.storage, annotations:
            self.forward(fakes)
            annotations.in_backward = True
            self._make_tangents()
            gradients = self.backward(self.tangents)
            self.values = [self.value(result) for result in self.results]
            return [*self.values, *gradients, *(value for view in self.views for value in view[1:])]

    def _fake(self, one: Input) -> Tensor:
        assert one.tensor is not None
        if isinstance(one.tensor, FakeTensor):
            return one.tensor
        source = None
        if one.dynamic:
            from torch._dynamo.source import ConstantSource  # imports a third of torch

            source = ConstantSource(one.name)
        if one.is_apart or _C.is_wrapper(one.tensor):
            x = one.tensor
            with self.fake_mode:
                return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        with torch.no_grad(), unset_fake_temporarily():
            return self.fake_mode.from_tensor(one.tensor.detach(), static_shapes=not one.dynamic, source=source)

    def _new_input(self, tensor: Tensor) -> Tensor:
        if _C.is_wrapper(tensor):
            if getattr(_refusing, "on", False):
                raise CapturedWrapperError
            return self._capture(_C.strip_closed_levels(tensor))
        in_forward = self.level.depth > 0
        name = identifier(name_of_tensor(tensor), "captured")
        one = Input(name, tensor, tensor.requires_grad and self.grad_mode and in_forward, tensor.is_leaf)
        with _C.Outside(), disable_proxy_modes_tracing():
            fake = self._fake(one)
        self.captured.append(self._track(fake, "captured"))
        self.inputs.append(one)
        self.fakes.append(fake)
        return self._lift(one, fake)

    def _track(self, fake: Tensor, name: str) -> fx.Node:
        """Make a placeholder for a tensor, while other nodes are there already."""
        with _C.Outside():  # it calls operators for its own purposes
            target = f"{name}_{len(self.tracer.graph.nodes)}"  # another for each
            proxy = self.tracer.create_proxy("placeholder", target, (), {})
            track_tensor_tree(fake, proxy, constant=None, tracer=self.tracer)
        return proxy.node

    def _make_tangents(self) -> None:
        """As the results are, but dense."""
        values = [self.value(self.results[i]) for i in self.differentiated]
        with _C.Outside(), disable_proxy_modes_tracing():
            self.tangents = [torch.empty_like(value) for value in values]
        self.tangent_nodes = [self._track(fake, "tangent") for fake in self.tangents]

    def finished(self, module: fx.GraphModule) -> Trace:
        """Put placeholders in order and views into graphs of their own."""
        graph = module.graph
        late = [*self.captured, *self.tangent_nodes]
        placeholders = [node for node in graph.find_nodes(op="placeholder") if node not in late] + late
        for node in reversed(placeholders):
            graph._root.next.prepend(node)
        count = len(self.tangent_nodes)
        tangents = [f"tangent_{i}" for i in range(count)] if count > 1 else ["tangent"] * count
        for node, name in zip(placeholders, [*(one.name for one in self.inputs), *tangents], strict=True):
            node._rename(name)
            node.target = node.name
        outputs = list(graph.output_node().args[0])  # type: ignore[arg-type]
        count = len(self.values)
        results, gradients = outputs[:count], outputs[count : count + len(self.inputs)]
        nodes = iter(outputs[count + len(self.inputs) :])
        for view, _, _ in self.views:
            base, shown = next(nodes), next(nodes)
            view.graph, integers = view_graph(base, shown)
            for node in integers:
                if node not in results:
                    results.append(node)
                    self.values.append(node.meta["val"])
                view.integers.append(results.index(node))
        graph.output_node().args = ([*results, *gradients],)
        for one in self.inputs[: len(self.inputs) - len(self.captured)]:
            one.tensor = None  # the next call has others
        return Trace(
            module,
            self.function,
            self.inputs,
            self.fakes,
            self.differentiated,
            self.tangents,
            self.values,
            self.outputs,
            self.writes,
            self.modules,
        )


def view_graph(base: fx.Node, view: fx.Node) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The views between two nodes, as a graph that takes the base and integers, and the nodes of these."""
    graph = fx.Graph()
    copies = {base: graph.placeholder("base")}
    integers: list[fx.Node] = []

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            if isinstance(node.meta.get("val"), py_sym_types):
                integers.append(node)
                copies[node] = graph.placeholder(f"size_{len(integers)}")
            else:
                copies[node] = graph.node_copy(node, copied)
        return copies[node]

    result = copied(view)
    # Placeholders come first.
    for node in reversed(graph.find_nodes(op="placeholder")):
        graph._root.next.prepend(node)
    graph.output(graph.call_function(torch.ops.aten.alias.default, (result,)) if view is base else result)
    return fx.GraphModule({}, graph), integers
