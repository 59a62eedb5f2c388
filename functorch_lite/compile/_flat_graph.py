"""A function as one graph that is called as the function is, without derivatives and without anything around it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from functorch_lite.compile import _arguments, _checks, _nodes, _passes, _trace
from functorch_lite.compile._arguments import Arguments
from functorch_lite.compile._effects import SameAsInput, Value, View
from functorch_lite.compile._run import Input
from functorch_lite.compile._subclasses import is_subclass


def flat_graph(
    caller: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool
) -> fx.GraphModule:
    """The graph. Captured tensors are its attributes, and what the function writes is written at its end."""
    leaves, in_structure = pytree.tree_flatten((args, kwargs))
    arguments = Arguments(leaves)
    names = _arguments.names(function, args, kwargs)
    arguments.check(names)
    structures: list[pytree.TreeSpec] = []

    def of_tensors(tensors: list[Any]) -> list[Any]:
        args, kwargs = pytree.tree_unflatten(arguments.filled(tensors), in_structure)
        outputs, structure = pytree.tree_flatten(function(*args, **kwargs))
        structures.append(structure)
        return outputs

    by_tensor = {place: name for place, name in zip(arguments.places, names, strict=True) if place is not None}
    inputs = [
        Input(by_tensor[i], tensor, False, True, dynamic, i in arguments.sharing)
        for i, tensor in enumerate(arguments.tensors)
    ]
    trace = _trace.trace(of_tensors, inputs, {}, dynamic)
    if any(is_subclass(x) for x in [*trace.fakes, *trace.results] if isinstance(x, Tensor)):
        _checks.refuse_subclass(caller)
    if any(write.shape is not None for write in trace.writes) or (trace.writes and arguments.shared):
        _checks.refuse_written_view(caller)
    parts = _Parts(trace)
    if not dynamic:
        trace.check_that_nothing_is_kept()
    parts.finish()
    parts.take_all_leaves(arguments, names)
    graph = parts.graph
    positional = _arguments.positional_names(function, len(args))
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo([*positional, *kwargs], in_structure, structures[-1])))
    return fx.GraphModule(parts.module, graph, getattr(function, "__name__", type(function).__name__))


class _Parts:
    """The graph of a trace, while it is completed."""

    def __init__(self, trace: _trace.Trace) -> None:
        self._trace = trace
        self.module = trace.graph_module
        self._keep_results()
        self.graph = _passes.simplify(self.module.graph)
        self._inputs = self.graph.find_nodes(op="placeholder")[: len(trace.inputs)]

    def _keep_results(self) -> None:
        """Without the gradients, and the tangents that they need."""
        graph = self.module.graph
        graph.output_node().args = (_nodes.returned(graph)[: self._trace.packed_results.count],)
        self.module.graph = _passes.eliminate_dead_code(graph)

    def finish(self) -> None:
        """Return the outputs, write, and take captured tensors from the module."""
        end = self.graph.output_node()
        results = _nodes.returned(self.graph)
        with self.graph.inserting_before(end):
            outputs = [self._output(output, results) for output in self._trace.outputs]
            for write in self._trace.writes:
                if write.result is not None:
                    target = self._inputs[write.input]
                    copied = self.graph.call_function(torch.ops.aten.copy_.default, (target, results[write.result]))
                    copied.meta["val"] = target.meta.get("val")
        end.args = (outputs,)
        for node in self.graph.find_nodes(op="placeholder")[len(self._trace.inputs) :]:
            self.graph.erase_node(node)
        for one, node in zip(self._trace.inputs, self._inputs, strict=True):
            if one.tensor is not None:
                self._take_from_module(node, one.tensor)

    def _output(self, output: Any, results: Sequence[Any]) -> Any:
        if isinstance(output, Value):
            return results[output.result]
        if isinstance(output, SameAsInput):
            return self._inputs[output.input]
        if not isinstance(output, View):
            return output.value
        base = self._inputs[output.base] if output.of_input else results[output.base]
        views = output.views
        values = [base, *(results[i] for i in views.integers)]
        nodes = dict(zip(views.graph.graph.find_nodes(op="placeholder"), values, strict=True))
        return self.graph.graph_copy(views.graph.graph, nodes)

    def _take_from_module(self, node: fx.Node, tensor: Tensor) -> None:
        name = node.name
        if isinstance(tensor, torch.nn.Parameter):
            self.module.register_parameter(name, tensor)
        else:
            self.module.register_buffer(name, tensor)
        with self.graph.inserting_before(node):
            attribute = self.graph.get_attr(name)
        attribute.meta = copy.copy(node.meta)
        node.replace_all_uses_with(attribute)
        self.graph.erase_node(node)

    def take_all_leaves(self, arguments: Arguments, names: Sequence[str]) -> None:
        """A placeholder for each leaf of the arguments, also those that are constants here."""
        given = iter(self._inputs)
        last: fx.Node | None = None
        seen: set[int] = set()
        for name, place in zip(names, arguments.places, strict=True):
            if place is not None and place not in seen:
                seen.add(place)
                last = next(given)
                continue
            with self.graph.inserting_before(None) if last is None else self.graph.inserting_after(last):
                last = self.graph.placeholder(name)
