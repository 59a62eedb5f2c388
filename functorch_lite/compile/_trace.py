"""Tracing a function into one graph of its forward and backward pass, the joint graph.

The function runs once, on fake tensors, at an autodiff level on top of a functionalize level. What it did beside
computing is found out on the way: which inputs it wrote, which outputs share memory with what, and which tensors it
used that are no arguments. Those become inputs, too.
"""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
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
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from functorch_lite import _C
from functorch_lite._boundary import name_of_tensor
from functorch_lite.compile import _checks, _nodes
from functorch_lite.compile._annotations import Annotations, ModuleStack
from functorch_lite.compile._arguments import identifier
from functorch_lite.compile._effects import Constant, Output, SameAsInput, Value, View, ViewGraph, Write, view_graph
from functorch_lite.compile._run import Input, Run, Source, TensorsFunction
from functorch_lite.compile._subclasses import Packing, plain_tensors
from functorch_lite.compile._untraceable import explained

Decompositions = Mapping[Any, Callable[..., Any]]


@dataclass
class Trace:
    """The joint graph of a function, and what is to be done around it."""

    #: Placeholders: inputs, tangents. Outputs: forward results, gradients of all inputs (or None). All of them plain
    #: tensors: the packings tell of subclasses.
    graph_module: fx.GraphModule
    function: TensorsFunction
    grad_mode: bool
    #: See `Run`.
    copies: bool
    inputs: list[Input]
    fakes: list[Any]
    #: The forward results, as fakes, and where they come from; None for a memory that has no derivative.
    results: list[Any]
    sources: list[Source | None]
    #: The numbers of the forward results that have a tangent.
    differentiated: list[int]
    tangents: list[Any]
    #: For each tangent: its dimensions in the order in which they lie in memory.
    orders: list[list[int]]
    gradients: Packing
    outputs: list[Output]
    writes: list[Write]
    #: The modules that the function has called.
    modules: ModuleStack
    shape_env: ShapeEnv
    #: Arguments that the function also found elsewhere, by their numbers.
    found_elsewhere: dict[int, Tensor]
    level: _C.AutodiffLevel

    def check_that_nothing_is_kept(self) -> None:
        """Require that no tensor of the run is left, now that the graph has been simplified."""
        # One belongs to the level itself. Cycles may hold others that nobody can reach. They are young, and to look
        # among all objects takes half a second in a large program.
        for generation in range(3):
            if self.level.tensors_alive > 1:
                gc.collect(generation)
        if self.level.tensors_alive > 1:
            _checks.refuse_kept_tensors(self.level.tensors_alive - 1)

    @functools.cached_property
    def packed_inputs(self) -> Packing:
        """The inputs as placeholders."""
        return Packing(self.fakes)

    @functools.cached_property
    def packed_results(self) -> Packing:
        """The forward results as outputs."""
        return Packing(self.results)

    @functools.cached_property
    def captured(self) -> list[Tensor]:
        """The inputs that are no arguments."""
        return [one.tensor for one in self.inputs if one.tensor is not None]

    def output_nodes(self) -> list[fx.Node | None]:
        """What the graph returns."""
        return _nodes.returned(self.graph_module.graph)

    def generators(self) -> list[torch.Generator]:
        """The random generators that the graph draws from, beside PyTorch's own."""
        return [value for value in vars(self.graph_module).values() if isinstance(value, torch.Generator)]

    def guards(self) -> Callable[[Sequence[Tensor]], bool]:
        """Whether the graph is right for the sizes of the dynamic inputs."""
        arguments = [fake for one, fake in zip(self.inputs, self.fakes, strict=True) if one.dynamic]
        expression = self.shape_env.produce_guards_expression(arguments, ignore_static=False)
        if expression is None:
            return lambda tensors: True
        return lambda tensors: bool(self.shape_env.evaluate_guards_expression(expression, tensors))

    def pull_back(self, leaves: Sequence[Any]) -> list[Tensor | None]:
        """The gradients of all inputs, computed by the function itself from inputs and tangents."""
        count = len(self.inputs)
        written = {write.input for write in self.writes}
        run = Run(self.function, list(self.inputs), self.grad_mode, self.copies)
        run.forward([x.clone() if i in written else x for i, x in enumerate(leaves[:count])])
        sources = [self.sources[i] for i in self.differentiated]
        return run.backward([source for source in sources if source is not None], leaves[count:])


def trace(
    function: TensorsFunction,
    inputs: Sequence[Input],
    decompositions: Decompositions,
    symbolic: bool,
) -> Trace:
    """Trace ``function``, which takes tensors and returns the leaves of its output, in the caller's grad mode."""
    try:
        return _traced(function, [replace(one) for one in inputs], decompositions, symbolic, copies=False)
    except (RuntimeError, ValueError) as error:
        # The variables of the run are leaves, also where the arguments are none.
        may_be_written = any(one.differentiated and not one.is_leaf for one in inputs)
        if not (may_be_written and any(text in str(error) for text in _LEAF_WRITTEN)):
            raise
    return _traced(function, list(inputs), decompositions, symbolic, copies=True)


_LEAF_WRITTEN = (
    "leaf Variable that requires grad is being used in an in-place operation",
    "writes into the input that is differentiated",
)


def _traced(
    function: TensorsFunction,
    inputs: list[Input],
    decompositions: Decompositions,
    symbolic: bool,
    copies: bool,
) -> Trace:
    # Sizes that happen to be equal in this call need not be equal in the next. And without allow_non_fake_inputs: a
    # real tensor that slips through would become a constant.
    fake_mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))
    no_values = torch.autograd.set_detect_anomaly(False)
    with _C.Outside(), fake_mode, no_values, enable_python_dispatcher() if symbolic else nullcontext():
        run = _TracedRun(function, inputs, fake_mode, copies)
        plain = Packing(run.fakes).flatten(run.fakes)
        with explained():
            module = make_fx(run, dict(decompositions), "real", _error_on_data_dependent_ops=False)(*plain)
    trace = run.finished(module)
    run.let_go()
    return trace


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


def _order_in_memory(tensor: Tensor) -> list[int]:
    def hint(stride: Any) -> int:
        found: int = stride if isinstance(stride, int) else stride.node.hint
        return found

    return sorted(range(tensor.dim()), key=lambda d: -hint(tensor.stride(d)))


def _metadata(tensor: Tensor) -> tuple[Any, ...]:
    return (*tensor.shape, *tensor.stride(), tensor.storage_offset())


class _TracedRun(Run):
    """A run under the tracer, with a functionalize level below."""

    def __init__(self, function: TensorsFunction, inputs: list[Input], fake_mode: FakeTensorMode, copies: bool) -> None:
        super().__init__(function, inputs, torch.is_grad_enabled(), copies)
        self.fake_mode = fake_mode
        assert fake_mode.shape_env is not None
        self.shape_env = fake_mode.shape_env
        self.storage = _C.FunctionalizeLevel(True)
        self.fakes = [self._fake(one) for one in inputs]
        self.arguments_given = len(inputs)
        self.roots: list[Tensor] = []  # the memory of the arguments before the function has run
        self.metadata: list[tuple[Any, ...]] = []
        self.histories: list[Any] = []  # the nodes of the arguments, before
        self.captured: list[fx.Node] = []  # placeholders
        self.results: list[Any] = []
        self.sources: list[Source | None] = []
        self.outputs: list[Output] = []
        self.writes: list[Write] = []
        self.views: list[tuple[ViewGraph, Tensor, Tensor]] = []  # with the fakes of the base and the view

    def __call__(self, *fakes: Any) -> list[Any]:
        """What is traced: forward results, gradients, and the ends of all views."""
        mode = get_proxy_mode()
        assert mode is not None
        self.tracer = mode.tracer
        annotations = Annotations(self.tracer.graph, self.modules)
        with self.storage, annotations:
            self.forward(Packing(self.fakes).unflatten(fakes))
            self.values = [self._value(result) for result in self.results]
            annotations.in_backward = True
            self._make_tangents()
            sources = [source for i in self.differentiated if (source := self.sources[i]) is not None]
            gradients = self.backward(sources, [self.storage.lift(tangent) for tangent in self.tangents])
            self.gradients = [g if g is None else self.storage.value_of(g) for g in gradients]
            ends = [value for view in self.views for value in view[1:]]
            return [plain for x in (*self.values, *self.gradients, *ends) for plain in plain_tensors(x)]

    def after_forward(self) -> None:
        """Find out what the function did."""
        self._find_writes()
        self._find_outputs()
        self.differentiated = [i for i, result in enumerate(self.results) if self._has_derivative(result)]

    def lift(self, one: Input, value: Tensor) -> Tensor:
        """Add an input at both levels."""
        argument = super().lift(one, self.storage.lift(value))
        self.roots.append(self._memory_value(argument))
        self.metadata.append(_metadata(argument))
        self.histories.append(argument.grad_fn)
        return argument

    def new_input(self, tensor: Tensor) -> Tensor:
        """Add a captured tensor to the inputs."""
        if _C.is_wrapper(tensor):
            if getattr(_refusing, "on", False):
                raise CapturedWrapperError
            return self._capture(_C.strip_closed_levels(tensor))
        in_forward = self.level.depth > 0
        name = identifier(name_of_tensor(tensor), "captured")
        one = Input(name, tensor, tensor.requires_grad and in_forward, tensor.is_leaf)
        with _C.Outside(), disable_proxy_modes_tracing():
            fake = self._fake(one)
        self.captured += self._track(fake, "captured")
        self.inputs.append(one)
        self.fakes.append(fake)
        return self.lift(one, fake)

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

    def _track(self, fake: Tensor, name: str) -> list[fx.Node]:
        """Make placeholders for a tensor, while other nodes are there already."""
        nodes = []
        with _C.Outside():  # it calls operators for its own purposes
            for plain in plain_tensors(fake):
                target = f"{name}_{len(self.tracer.graph.nodes)}"  # another for each
                proxy = self.tracer.create_proxy("placeholder", target, (), {})
                track_tensor_tree(plain, proxy, constant=None, tracer=self.tracer)
                nodes.append(proxy.node)
        return nodes

    def _make_tangents(self) -> None:
        """As the results are, but dense."""
        values = [self.values[i] for i in self.differentiated]
        with _C.Outside(), disable_proxy_modes_tracing():
            self.tangents = [torch.empty_like(value) for value in values]
        self.tangent_nodes = [node for fake in self.tangents for node in self._track(fake, "tangent")]

    # What is below the levels.

    def _value(self, result: Any) -> Any:
        """Below both levels."""
        return self.storage.value_of(self.level.value_of(result)) if isinstance(result, Tensor) else result

    def _memory_value(self, tensor: Tensor) -> Tensor:
        return self.storage.memory_value(self.level.value_of(tensor))

    def _memory(self, tensor: Tensor) -> int | None:
        return self.storage.memory_of(self.level.value_of(tensor))

    def _has_derivative(self, result: Any) -> bool:
        return isinstance(result, Tensor) and self.level.value_of(result) is not result and result.requires_grad

    # What the function did.

    def _add(self, result: Any, source: Source | None) -> int:
        self.results.append(result)
        self.sources.append(source)
        return len(self.results) - 1

    def _find_writes(self) -> None:
        for i, argument in enumerate(self.arguments):
            contents = self._memory_value(argument) is not self.roots[i]
            shape = None
            if _metadata(argument) != self.metadata[i]:
                shape = ViewGraph()
                self._remember_views(shape, argument, self.roots[i])
                if self.views[-1][-1].shape != argument.shape:
                    _checks.refuse_set(self.inputs[i].name)
            if not contents and shape is None:
                continue
            recorded = argument.requires_grad and argument.grad_fn is not self.histories[i]
            result = None
            if contents:
                result = self._add(argument if recorded else self.level.value_of(argument), Source("argument", i))
            self.writes.append(Write(i, result, shape, recorded))

    def _remember_views(self, views: ViewGraph, tensor: Tensor, root: Tensor) -> None:
        self.views.append((views, root, self.storage.replay_views(self.level.value_of(tensor), root)))

    def _find_outputs(self) -> None:
        inputs = {self._memory(argument): i for i, argument in enumerate(self.arguments)}
        sharing: dict[int | None, list[int]] = {}
        numbers: dict[int, int] = {}
        for k, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor) and numbers.setdefault(id(leaf), k) == k:
                sharing.setdefault(self._memory(leaf), []).append(k)
        found: dict[int, Output] = {}
        for memory, group in sharing.items():
            if memory in inputs:
                found.update((k, self._of_input(k, inputs[memory])) for k in group)
            else:
                found.update(self._of_results(group))
        for k, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor):
                self.outputs.append(found[numbers[id(leaf)]])
            elif isinstance(leaf, py_sym_types):
                self.outputs.append(Value(self._add(leaf, Source("leaf", k))))
            else:
                self.outputs.append(Constant(leaf))

    def _of_input(self, k: int, i: int) -> Output:
        """An output that shares memory with an input."""
        leaf, argument = self.leaves[k], self.arguments[i]
        if leaf is argument or self.level.value_of(leaf) is self.level.value_of(argument):
            return SameAsInput(i)
        # A torch.autograd.Function that returns a view has a derivative of its own.
        is_view = leaf._is_view() and leaf._base is (argument._base if argument._is_view() else argument)
        if leaf.requires_grad and not is_view:
            return Value(self._add(leaf, Source("leaf", k)))
        return self._view(leaf, of_input=True, base=i, root=self.roots[i])

    def _of_results(self, group: list[int]) -> dict[int, Output]:
        """Outputs that share memory, but not with an input."""
        leaves = {k: self.leaves[k] for k in group}
        bases = {id(x._base if x._is_view() else x): k for k, x in leaves.items() if x.requires_grad}
        if len(group) == 1 or len(bases) > 1:  # in the latter case a torch.autograd.Function made one of the other
            return {k: Value(self._add(leaf, Source("leaf", k))) for k, leaf in leaves.items()}
        if bases:
            k = next(iter(bases.values()))
            source = Source("base" if leaves[k]._is_view() else "leaf", k)
            whole = self.at(source)
            result, root = self._add(whole, source), self._value(whole)
        else:
            whole, root = None, self._memory_value(leaves[group[0]])
            result = self._add(root, None)
        return {
            k: Value(result) if leaf is whole else self._view(leaf, of_input=False, base=result, root=root)
            for k, leaf in leaves.items()
        }

    def _view(self, leaf: Tensor, of_input: bool, base: int, root: Tensor) -> View:
        view = View(of_input, base, leaf.requires_grad)
        self._remember_views(view.views, leaf, root)
        return view

    def let_go(self) -> None:
        """Let go of the tensors of this run."""
        for tensors in (self.variables, self.arguments, self.leaves, self.results, self.histories, self.views):
            tensors.clear()
        del self.tracer  # which has some as constants

    def finished(self, module: fx.GraphModule) -> Trace:
        """Put placeholders in order and views into graphs of their own."""
        self._name_placeholders(module.graph)
        outputs = _nodes.returned(module.graph)
        count = Packing(self.values).count
        end_of_gradients = count + Packing(self.gradients).count
        results, gradients = outputs[:count], outputs[count:end_of_gradients]
        ends = iter(outputs[end_of_gradients:])
        for views, _, _ in self.views:
            views.graph, integers = view_graph(next(ends), next(ends))
            for node in integers:
                if node not in results:
                    results.append(node)
                    self.values.append(node.meta["val"])
                views.integers.append(results.index(node))
        module.graph.output_node().args = ([*results, *gradients],)
        for one in self.inputs[: self.arguments_given]:
            one.tensor = None  # the next call has others
        return Trace(
            module,
            self.function,
            self.grad_mode,
            self.copies,
            self.inputs,
            self.fakes,
            self.values,
            self.sources,
            self.differentiated,
            self.tangents,
            [_order_in_memory(tangent) for tangent in self.tangents],
            Packing(self.gradients),
            self.outputs,
            self.writes,
            self.modules,
            self.shape_env,
            {i: tensor for i, tensor in self.found_elsewhere.items() if i < self.arguments_given},
            self.level,
        )

    def _name_placeholders(self, graph: fx.Graph) -> None:
        late = [*self.captured, *self.tangent_nodes]
        placeholders = [node for node in graph.find_nodes(op="placeholder") if node not in late] + late
        for node in reversed(placeholders):
            graph._root.next.prepend(node)
        count = len(self.tangent_nodes)
        tangents = [f"tangent_{i}" for i in range(count)] if count > 1 else ["tangent"] * count
        names = [one.name for one, fake in zip(self.inputs, self.fakes, strict=True) for _ in plain_tensors(fake)]
        for node, name in zip(placeholders, [*names, *tangents], strict=True):
            node._rename(name)
            node.target = node.name
