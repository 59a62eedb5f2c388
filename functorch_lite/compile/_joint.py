"""A joint graph, and how it is split into a forward and a backward module."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from functorch_lite.compile import _checks, _nodes

Modules = tuple[fx.GraphModule, fx.GraphModule]


@dataclass
class Joint:
    """A joint graph, and which of its nodes are forward nodes."""

    module: fx.GraphModule
    primals: list[fx.Node]
    tangents: list[fx.Node]
    outputs: list[Any]
    gradients: list[Any]
    forward: set[fx.Node]
    live: set[fx.Node]

    @classmethod
    def read(cls, module: fx.GraphModule, joint_inputs: Sequence[Any], num_fwd_outputs: int) -> Joint:
        """Read a graph, and check that it fits what is said about it."""
        primals, tangents = joint_inputs
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        _checks.check_placeholders(len(placeholders), len(primals) + len(tangents))
        returned = _nodes.returned(module.graph)
        _checks.check_num_fwd_outputs(num_fwd_outputs, len(returned))
        for node in module.graph.nodes:
            if node.op == "call_function" and node.users and "val" not in node.meta:
                _checks.refuse_missing_value(node)
        outputs, gradients = returned[:num_fwd_outputs], returned[num_fwd_outputs:]
        ordered = [node for node in module.graph.nodes if _nodes.is_ordered(node)]
        return cls(
            module,
            placeholders[: len(primals)],
            placeholders[len(primals) :],
            outputs,
            gradients,
            _forward_nodes(module.graph, placeholders[len(primals) :], outputs),
            _ancestors([*returned, *ordered]),
        )

    def backward(self) -> list[fx.Node]:
        """The nodes of the backward pass, in their order."""
        return [node for node in self.module.graph.nodes if node in self.live and node not in self.forward]

    def read_by_backward(self) -> list[fx.Node]:
        """The forward nodes that the backward pass reads, or returns as gradients, each once."""
        read = [node for reader in self.backward() for node in reader.all_input_nodes]
        read += [gradient for gradient in self.gradients if isinstance(gradient, fx.Node)]
        return [node for node in dict.fromkeys(read) if node in self.forward]

    def split(self, chosen: Iterable[fx.Node]) -> Modules:
        """Make the two modules. The nodes ``chosen`` are saved, or their bases, if the backward pass needs them."""
        tensors, numbers = self.saved(chosen)
        saved = [*tensors, *dict.fromkeys(numbers.values())]
        kept = _ancestors([*self.outputs, *saved])
        kept.update(node for node in self.live & self.forward if _nodes.is_ordered(node))
        kept |= _ancestors(kept)
        forward = _Extraction(self.primals)
        backward = _Extraction([*saved[len(tensors) :], *tensors, *self.tangents])
        backward.same(numbers)
        return (
            forward.module(
                self.module, [node for node in self.module.graph.nodes if node in kept], self.outputs + saved
            ),
            backward.module(self.module, self.backward(), self.gradients),
        )

    def saved(self, chosen: Iterable[fx.Node]) -> tuple[list[fx.Node], dict[fx.Node, fx.Node]]:
        """The tensors that `split` saves, and for each number that is needed the one that is saved in its place."""
        bases = {_nodes.base_of(node) for node in chosen}
        tensors: dict[fx.Node, None] = {}
        numbers: dict[fx.Node, fx.Node] = {}
        first: dict[Hashable, fx.Node] = {}
        needed = self.read_by_backward()
        seen = set(needed)
        while needed:
            node = needed.pop()
            if _nodes.is_number(node):
                numbers[node] = first.setdefault(_nodes.expression(node), node)
            elif node.op == "placeholder":
                tensors[node] = None
            elif node in bases and node.op != "get_attr":
                if not _nodes.is_tensor(node):
                    _checks.refuse_unsavable(node)
                tensors[node] = None
            else:
                inputs = [node for node in node.all_input_nodes if node not in seen]
                needed += inputs
                seen.update(inputs)
        order = {node: place for place, node in enumerate(self.module.graph.nodes)}
        return sorted(tensors, key=order.__getitem__), dict(sorted(numbers.items(), key=lambda pair: order[pair[0]]))


def _ancestors(nodes: Iterable[Any]) -> set[fx.Node]:
    """The nodes and all that they are computed of."""
    todo = [node for node in nodes if isinstance(node, fx.Node)]
    found = set(todo)
    while todo:
        inputs = [node for node in todo.pop().all_input_nodes if node not in found]
        todo += inputs
        found.update(inputs)
    return found


def _forward_nodes(graph: fx.Graph, tangents: Sequence[fx.Node], outputs: Sequence[Any]) -> set[fx.Node]:
    dependent = set(tangents)
    backward = set(tangents)
    is_tagged = any(_is_tagged(node) for node in graph.nodes)
    has_begun = False  # in a graph without tags: whether something ordered has been seen in the backward pass
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if any(one in dependent for one in inputs):
            dependent.add(node)
        ordered = not is_tagged and _nodes.is_ordered(node)
        # A size, or one of several results, is where its tensor is, so that nobody has to save that one for it.
        is_placed = _is_tagged(node) and not _nodes.is_number(node) and not _nodes.is_getitem(node)
        if is_placed or (ordered and has_begun) or any(one in backward for one in inputs):
            backward.add(node)
            has_begun = has_begun or ordered
    needed = _ancestors(outputs)
    for node in outputs:
        if node in dependent:
            _checks.refuse_dependent_output(node)
    return {node for node in graph.nodes if node.op != "output" and (node in needed or node not in backward)}


def _is_tagged(node: fx.Node) -> bool:
    return node.meta.get("partitioner_tag") == "is_backward"


class _Extraction:
    """A part of a graph on its way to become one, with the given nodes as placeholders."""

    def __init__(self, inputs: Iterable[fx.Node]) -> None:
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        for node in inputs:
            if node.op == "placeholder":
                copy = self._graph.node_copy(node)
            else:
                copy = self._graph.placeholder(node.name)
                copy.meta = dict(node.meta)
            self._copies[node] = copy

    def same(self, numbers: dict[fx.Node, fx.Node]) -> None:
        """Let the placeholder of one number stand for another one, too."""
        self._copies.update({node: self._copies[saved] for node, saved in numbers.items()})

    def module(self, root: fx.GraphModule, nodes: Iterable[fx.Node], outputs: Sequence[Any]) -> fx.GraphModule:
        """Copy the nodes, each with what it needs right before it, and return the outputs."""
        for node in nodes:
            self._copy(node)
        for node in outputs:
            if isinstance(node, fx.Node):
                self._copy(node)
        self._graph.output(fx.node.map_arg(list(outputs), self._copies.__getitem__))
        return fx.GraphModule(root, self._graph)

    def _copy(self, node: fx.Node) -> None:
        todo = [node]
        while todo:
            missing = [one for one in todo[-1].all_input_nodes if one not in self._copies]
            if todo[-1] in self._copies:
                todo.pop()
            elif missing:
                todo += reversed(missing)
            else:
                node = todo.pop()
                self._copies[node] = self._graph.node_copy(node, self._copies.__getitem__)
