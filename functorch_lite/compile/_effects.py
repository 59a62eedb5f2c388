"""What a traced function does beside computing: the description by which it is done to real tensors at runtime.

The graph itself neither writes nor returns views of its inputs. Writes and views are done outside of it, with the
graph's results, by plain operators that autograd records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import py_sym_types


@dataclass
class ViewGraph:
    """The views between two tensors, as a graph from the base, and integers, to the view."""

    graph: fx.GraphModule = field(init=False)
    #: The numbers of the forward results that are those integers.
    integers: list[int] = field(default_factory=list)

    def __call__(self, base: Tensor, results: Sequence[Any], recorded: bool) -> Tensor:
        """The view of ``base``, recorded by autograd or not."""
        with torch.set_grad_enabled(recorded):
            view: Tensor = self.graph(base, *(results[i] for i in self.integers))
            return view


@dataclass
class Write:
    """A write into an input."""

    input: int
    #: The number of the forward result with the new contents, if these have changed.
    result: int | None
    #: From the input to what shows its memory in its new shape, if that has changed.
    shape: ViewGraph | None
    #: Whether the new contents have a derivative.
    differentiated: bool

    def apply(self, tensor: Tensor, results: Sequence[Any]) -> None:
        """Write into a real tensor."""
        with torch.set_grad_enabled(self.differentiated):
            if self.shape is not None:
                shown = self.shape(tensor, results, recorded=False)
                tensor.as_strided_(shown.size(), shown.stride(), shown.storage_offset())
            if self.result is not None:
                tensor.copy_(results[self.result])


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


@dataclass
class View:
    """An output that shows the memory of an input or of a forward result."""

    of_input: bool
    base: int
    differentiated: bool
    views: ViewGraph = field(default_factory=ViewGraph)


Output = View | Value | SameAsInput | Constant


def view_graph(base: fx.Node, view: fx.Node) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The nodes between two nodes, as a graph that takes the base and integers, and the nodes of these."""
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
