"""One graph of a function, compiled, and what is done around it at each call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.autograd import Function

from functorch_lite import _C, _units
from functorch_lite.compile import _nodes, _passes, _random
from functorch_lite.compile._annotations import SourceKeeper
from functorch_lite.compile._backends import Compiler, make_boxed_func
from functorch_lite.compile._effects import Constant, SameAsInput, Value, View
from functorch_lite.compile._replay import Replay
from functorch_lite.compile._subclasses import Packing, is_subclass, plain_tensors
from functorch_lite.compile._trace import Decompositions, Trace

if TYPE_CHECKING:
    from functorch_lite.compile._function import CompiledLeaves


@dataclass(frozen=True)
class Options:
    """How graphs are made and compiled."""

    forward_compiler: Compiler
    backward_compiler: Compiler
    inference_compiler: Compiler
    partition: Callable[..., tuple[fx.GraphModule, fx.GraphModule]]
    decompositions: Decompositions
    dynamic: bool


class GraphFunction:
    """A graph and what the compiler has made of it, which runs on plain tensors. Inside vmap, the graph is mapped."""

    def __init__(self, compiler: Compiler, module: fx.GraphModule, example_inputs: list[Any], options: Options) -> None:
        self._compiler, self._module, self._example_inputs, self._options = compiler, module, example_inputs, options
        self._inputs = module.graph.find_nodes(op="placeholder")
        self._compiled: Callable[[list[Any]], Any] | None = None

    def __call__(self, inputs: list[Any]) -> list[Any]:
        """The outputs of the graph, at a level that does not differentiate."""
        if _C.current_level() is None:
            compiled = self.compile()
            with _Plainly():
                return list(compiled(inputs))
        return self._leaves.call(inputs, None, lambda: [node.name for node in self._inputs])[0]

    def compile(self) -> Callable[[list[Any]], Any]:
        """What the compiler has made of it, which is asked once."""
        if self._compiled is None:
            self._compiled = make_boxed_func(self._compiler(self._module, self._example_inputs))
        return self._compiled

    @functools.cached_property
    def _leaves(self) -> CompiledLeaves:
        from functorch_lite.compile._function import CompiledLeaves

        graph = SourceKeeper(self._module)
        return CompiledLeaves(lambda leaves, _: (list(graph.run(*leaves)), None), self._options)


@dataclass(frozen=True)
class Shortcut:
    """What is left of a call of a graph where nothing is differentiated and no output is a view of another tensor."""

    compute: Callable[[list[Any]], Any] | _C.Program
    captured: list[Tensor]
    #: Numbers of an input and of the result that is its new contents.
    writes: list[tuple[int, int]]
    #: The number of a result, or of an input, or a constant; the others are None.
    outputs: list[tuple[int | None, int | None, Any]]


class Specialization:
    """A trace, and the graphs that are made of it."""

    def __init__(self, trace: Trace, options: Options) -> None:
        self.trace, self.options = trace, options
        trace.graph_module.graph = _passes.simplify(trace.graph_module.graph)
        self.is_differentiated = bool(trace.differentiated)
        self._needed = self._inputs_of_gradients()
        if self.is_differentiated:
            self._split()
        else:
            self._keep_forward()
        self.draws_random_numbers = any(_nodes.is_random(node) for node in trace.graph_module.graph.nodes)

    def compile(self) -> None:
        """Have the graphs compiled. Inside vmap other ones run."""
        self._forward.compile()
        if self.is_differentiated:
            self._backward.compile()

    def _inputs_of_gradients(self) -> list[bool]:
        """Which inputs the gradients depend on."""
        reached = set(self.trace.output_nodes()[self.trace.packed_results.count :])
        for node in reversed(self.trace.graph_module.graph.nodes):
            if node in reached:
                reached.update(node.all_input_nodes)
        placeholders = self.trace.graph_module.graph.find_nodes(op="placeholder")
        packing = self.trace.packed_inputs
        return [any(placeholders[k] in reached for k in packing.places(i)) for i in range(len(self.trace.inputs))]

    def _keep_forward(self) -> None:
        module = self.trace.graph_module
        output = module.graph.output_node()
        output.args = (self.trace.output_nodes()[: self.trace.packed_results.count],)
        module.graph = _passes.eliminate_dead_code(module.graph)
        inputs = self.trace.packed_inputs.flatten(self.trace.fakes)
        self._saved_tensors = 0
        self._forward = GraphFunction(self.options.inference_compiler, module, inputs, self.options)

    def _split(self) -> None:
        trace = self.trace
        inputs = trace.packed_inputs.flatten(trace.fakes)
        tangents = Packing(trace.tangents).flatten(trace.tangents)
        count = trace.packed_results.count
        forward, backward = self.options.partition(trace.graph_module, (inputs, tangents), num_fwd_outputs=count)
        self._keep_from_writes(forward)
        saved = [_nodes.value_of(node) for node in _nodes.returned(forward.graph)[count:]]
        self._saved_tensors = sum(isinstance(value, Tensor) for value in saved)
        self._forward = GraphFunction(self.options.forward_compiler, forward, inputs, self.options)
        inputs = [_nodes.value_of(node) for node in backward.graph.find_nodes(op="placeholder")]
        self._backward = GraphFunction(self.options.backward_compiler, backward, inputs, self.options)

    def _keep_from_writes(self, forward: fx.GraphModule) -> None:
        """Save copies of inputs that will be written once the forward pass is over."""
        graph = forward.graph
        placeholders = graph.find_nodes(op="placeholder")
        packing = self.trace.packed_inputs
        written = {placeholders[k] for write in self.trace.writes for k in packing.places(write.input)}
        if not written:
            return
        output = graph.output_node()
        nodes = _nodes.returned(graph)
        with graph.inserting_before(output):
            for i in range(self.trace.packed_results.count, len(nodes)):
                if _nodes.base_of(nodes[i]) in written:
                    copy = graph.call_function(torch.ops.aten.clone.default, (nodes[i],))
                    copy.meta.update(nodes[i].meta)
                    nodes[i] = copy
        output.args = (nodes,)
        forward.recompile()

    def run(self, tensors: list[Tensor], level: _C.AutodiffLevel | None = None) -> list[Any]:
        """The leaves of the output, for tensors of ``level``, the innermost one, or plain ones."""
        inputs = [*tensors, *self.trace.captured]
        if self.is_differentiated:
            with torch.enable_grad():  # the function may have enabled it itself
                results = _units.plain_apply(_Node, self, level, *inputs)
        else:
            results, _, _ = self.forward(level, inputs)
        reshaped = [write.input for write in self.trace.writes if write.shape is not None]
        shapes = {i: (inputs[i].shape, inputs[i].stride(), inputs[i].storage_offset()) for i in reshaped}
        for write in self.trace.writes:
            write.apply(inputs[write.input], results)
        return [self._output(output, inputs, results, shapes) for output in self.trace.outputs]

    def _output(
        self, output: Any, inputs: list[Any], results: Sequence[Any], shapes: Mapping[int, tuple[Any, ...]]
    ) -> Any:
        """``shapes``: those of inputs before the function changed them."""
        if isinstance(output, Value):
            return results[output.result]
        if isinstance(output, SameAsInput):
            return inputs[output.input]
        if isinstance(output, Constant):
            return output.value
        assert isinstance(output, View)
        base = (inputs if output.of_input else results)[output.base]
        with torch.set_grad_enabled(output.differentiated):
            if output.of_input and output.base in shapes:
                base = base.as_strided(*shapes[output.base])
        return output.views(base, results, output.differentiated)

    def shortcut(self, tensors: Sequence[Tensor]) -> Shortcut | None:
        """How to call the graph for inputs like these, outside of all levels. None if there is more to do."""
        trace = self.trace
        if self.is_differentiated:
            return None
        if any(is_subclass(x) for x in [*trace.fakes, *trace.results] if isinstance(x, Tensor)):
            return None
        if any(write.shape is not None or write.differentiated for write in trace.writes):
            return None
        compute: Any = self._forward.compile()
        places: Any = range(len(trace.results))
        others: Any = [None] * len(trace.results)
        if isinstance(compute, Replay):
            recording = compute.recording([*tensors, *trace.captured])
            if recording is None:
                return None
            compute, places, others = recording.program, recording.places, recording.others
        outputs: list[tuple[int | None, int | None, Any]] = []
        for output in trace.outputs:
            if isinstance(output, Value):
                place = places[output.result]
                outputs.append((place, None, others[output.result]))
            elif isinstance(output, SameAsInput):
                outputs.append((None, output.input, None))
            elif isinstance(output, Constant):
                outputs.append((None, None, output.value))
            else:
                return None
        writes = [(write.input, places[write.result]) for write in trace.writes if write.result is not None]
        return Shortcut(compute, trace.captured, writes, outputs)

    def forward(self, level: _C.AutodiffLevel | None, inputs: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Forward results as constants of the level, and saved tensors and integers, one level down."""
        packing = self.trace.packed_results
        if level is None:
            values = self._forward(self.trace.packed_inputs.flatten(inputs))
        else:
            below = [level.value_of(x) for x in inputs]
            with _C.Below():
                values = self._forward(self.trace.packed_inputs.flatten(below))
        results = packing.unflatten(values[: packing.count])
        if level is not None:
            results = [level.lift_constant(x) if isinstance(x, Tensor) else x for x in results]
        tensors = packing.count + self._saved_tensors
        return [_own(result) for result in results], values[packing.count : tensors], values[tensors:]

    def backward(self, saved: list[Tensor], integers: Sequence[Any], tangents: Sequence[Tensor]) -> list[Any]:
        """The gradients of all inputs. Lets go of ``saved``."""
        tangents = [_in_order(tangent, order) for tangent, order in zip(tangents, self.trace.orders, strict=True)]
        inputs = [*integers, *saved, *(part for tangent in tangents for part in plain_tensors(tangent))]
        saved.clear()
        return self.trace.gradients.unflatten(self._backward(inputs))

    def kept(self, inputs: Sequence[Any]) -> list[Tensor | None]:
        """What to save of the inputs for second derivatives: None where these do not depend on an input."""
        written = {write.input for write in self.trace.writes}
        return [
            None if not needed else x.clone() if i in written else x
            for i, (x, needed) in enumerate(zip(inputs, self._needed, strict=True))
        ]

    def stand_ins(self, inputs: Sequence[Any]) -> list[Any]:
        """What the function may be called with again, for inputs that are not kept: their shapes, or integers."""
        return [
            None if needed else (x.shape, x.stride()) if x.is_floating_point() or x.is_complex() else x
            for x, needed in zip(inputs, self._needed, strict=True)
        ]

    def gradients(
        self, kept: Sequence[Tensor | None], stand_ins: Sequence[Any], tangents: Sequence[Tensor]
    ) -> list[Any]:
        """The same as a function that can be differentiated, of what was kept of the inputs."""

        def stood_for(stand_in: Any, fake: Tensor) -> Tensor:
            if isinstance(stand_in, Tensor):
                return stand_in
            return torch.empty_strided(*stand_in, dtype=fake.dtype, device=fake.device).zero_()

        inputs = [
            stood_for(stand_in, fake) if x is None else x
            for x, stand_in, fake in zip(kept, stand_ins, self.trace.fakes, strict=True)
        ]
        names = [one.name for one in self.trace.inputs] + [f"tangent_{i}" for i in range(len(tangents))]
        return self._derivative.call([*inputs, *tangents], None, lambda: names)[0]

    @functools.cached_property
    def _derivative(self) -> CompiledLeaves:
        from functorch_lite.compile._function import CompiledLeaves

        return CompiledLeaves(lambda leaves, _: (self.trace.pull_back(leaves), None), self.options)


class _Node(Function):
    """The node that autograd records for a compiled function, at a level or outside of all."""

    @staticmethod
    def forward(ctx: Any, specialization: Specialization, level: _C.AutodiffLevel | None, *inputs: Any) -> Any:
        """The forward results."""
        ctx.specialization = specialization
        ctx.generators = _random.states(inputs) if specialization.draws_random_numbers else None
        results, saved, ctx.integers = specialization.forward(level, inputs)
        ctx.hidden = _hidden(saved, (*inputs, *results)) if level is None else {}
        seen = [x for i, x in enumerate(saved) if i not in ctx.hidden]
        ctx.seen_count = len(seen)
        ctx.save_for_backward(*seen, *specialization.kept(inputs))
        ctx.stand_ins = specialization.stand_ins(inputs)
        differentiated = set(specialization.trace.differentiated)
        ctx.mark_non_differentiable(
            *(x for i, x in enumerate(results) if isinstance(x, Tensor) and i not in differentiated)
        )
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradients of the inputs."""
        specialization = ctx.specialization
        saved = [_C.strip_closed_levels(x) if x is not None and _C.is_wrapper(x) else x for x in ctx.saved_tensors]
        seen, kept = saved[: ctx.seen_count], saved[ctx.seen_count :]
        tangents = [grads[i] for i in specialization.trace.differentiated]
        if torch.is_grad_enabled():
            with _random.drawn_from(ctx.generators):
                return None, None, *specialization.gradients(kept, ctx.stand_ins, tangents)
        for i, x in sorted(ctx.hidden.items()):
            seen.insert(i, x)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.hidden = {}  # the graph frees each after its last use
        return None, None, *specialization.backward(seen, ctx.integers, tangents)


def _hidden(saved: Sequence[Tensor], seen: Sequence[Any]) -> dict[int, Tensor]:
    """The saved tensors whose memory nobody else sees, by number: these need not be watched, and can be freed early."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return {}
    memories = {x.untyped_storage()._cdata for x in seen if _has_memory(x)}
    return {i: x for i, x in enumerate(saved) if _has_memory(x) and x.untyped_storage()._cdata not in memories}


def _has_memory(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided and not is_subclass(x)


class _Plainly:
    """The enclosed graph records nothing and casts nothing: what was to be cast was when it was traced."""

    def __enter__(self) -> None:
        self._grad_mode = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        self._no_autocast = torch._C._DisableAutocast() if torch._C._is_any_autocast_enabled() else None
        if self._no_autocast is not None:
            self._no_autocast.__enter__()

    def __exit__(self, *exception: object) -> None:
        if self._no_autocast is not None:
            self._no_autocast.__exit__(*exception)
        torch._C._set_grad_enabled(self._grad_mode)


def _own(result: Any) -> Any:
    """A result that autograd does not take for a view of something."""
    return result.detach() if isinstance(result, Tensor) and result._is_view() else result


def _in_order(tangent: Tensor, order: list[int]) -> Tensor:
    """The tangent as the graph was traced with it: dense, its dimensions in a certain order in memory."""
    if order == sorted(order):
        return tangent.contiguous()
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return tangent.permute(order).contiguous().permute(inverse)
