"""Passes over a graph of operators: each returns one that computes the same, bit for bit, and leaves its own alone.

A pass replaces nodes by others that are equal to them (`_Replacements`), or leaves nodes out. Metadata stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from functorch_lite.compile import _nodes

_aten = torch.ops.aten

_COPIES = {_aten.clone.default, _aten._to_copy.default, _aten.lift_fresh_copy.default}

# x + 0 is no identity: it makes 0 of -0. Neither is x * 1 of a complex number: inf * 0 is NaN.
_NEUTRAL: dict[Any, int] = {
    _aten.sub.Tensor: 0,
    _aten.sub.Scalar: 0,
    _aten.mul.Tensor: 1,
    _aten.mul.Scalar: 1,
    _aten.div.Tensor: 1,
    _aten.div.Scalar: 1,
}
_NEUTRAL_OF_INTEGERS: dict[Any, int] = {_aten.add.Tensor: 0, _aten.add.Scalar: 0}


def simplify(graph: fx.Graph) -> fx.Graph:
    """All passes, in the order in which each one prepares the next."""
    return eliminate_dead_code(eliminate_common_subexpressions(eliminate_no_ops(graph)))


def eliminate_dead_code(graph: fx.Graph) -> fx.Graph:
    """Without the nodes that nobody reads. Random operators stay, as the generator moves on in eager mode, too."""
    live = set()
    for node in reversed(graph.nodes):
        if node in live or node.op in ("placeholder", "output") or _nodes.is_ordered(node):
            live.update([node, *node.all_input_nodes])
    return _copy(graph, lambda node: node, live)


def eliminate_common_subexpressions(graph: fx.Graph) -> fx.Graph:
    """Each expression once in each pass.

    What the backward pass computes for a second time the forward pass would have to save.
    """
    replacements = _Replacements(graph)
    first: dict[Hashable, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function" or _nodes.is_ordered(node) or not _is_operator(node):
            continue
        key = (
            node.target,
            _structure(node.args, replacements.of),
            _structure(node.kwargs, replacements.of),
            node.meta.get("partitioner_tag"),
            _nodes.layout(_nodes.value_of(node)),
        )
        if first.setdefault(key, node) is not node:
            replacements.replace(node, first[key])
    return _copy(graph, replacements.of)


def eliminate_no_ops(graph: fx.Graph) -> fx.Graph:
    """Without the nodes whose result is their argument, in all that can be seen of a tensor."""
    replacements = _Replacements(graph)
    for node in graph.nodes:
        if _is_copy(node):
            replacements.replace(node, node.args[0])
        elif (same := _viewed_twice(node)) is not None:
            replacements.replace(node, same)
    return _copy(graph, replacements.of)


class _Replacements:
    """Which node stands for which. No output comes to share memory with an input or with another output."""

    def __init__(self, graph: fx.Graph) -> None:
        self._by: dict[fx.Node, fx.Node] = {}
        self._returned = {node for node in _nodes.returned(graph) if isinstance(node, fx.Node)}
        self._seen_outside = {_nodes.base_of(node) for node in self._returned}
        self._written = _nodes.written_bases(graph)

    def of(self, node: fx.Node) -> fx.Node:
        """The node that stands for this one."""
        return self._by.get(node, node)

    def replace(self, node: fx.Node, other: fx.Node) -> None:
        """Let ``other``, or what stands for it, stand for ``node``, if that can be seen by nobody."""
        other = self.of(other)
        if _nodes.touches(node, self._written) or _nodes.touches(other, self._written):
            return
        old, new = self._base_of(node), self._base_of(other)
        if node in self._returned:
            if other in self._returned or other.op in _nodes.INPUTS:
                return
            self._returned.add(other)
        if old is not new and old in self._seen_outside:
            if new in self._seen_outside or new.op in _nodes.INPUTS:
                return
            self._seen_outside.add(new)
        self._by[node] = other

    def _base_of(self, node: fx.Node) -> fx.Node:
        base = _nodes.base_of(node)
        while base in self._by:
            base = _nodes.base_of(self._by[base])
        return base


def _copy(
    graph: fx.Graph, replacement: Callable[[fx.Node], fx.Node], live: Collection[fx.Node] | None = None
) -> fx.Graph:
    """A copy in which others stand for some nodes, and with no others than those that are ``live``."""
    if all(replacement(node) is node and (live is None or node in live) for node in graph.nodes):
        return graph
    copy = fx.Graph(owning_module=graph.owning_module)
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if replacement(node) is node and (live is None or node in live):
            copies[node] = copy.node_copy(node, lambda argument: copies[replacement(argument)])
    return copy


def _is_operator(node: fx.Node) -> bool:
    """Whether the node is a pure operator, or arithmetic of sizes: not one of higher order."""
    return isinstance(node.target, OpOverload) or _nodes.is_getitem(node) or _nodes.is_number(node)


def _structure(argument: Any, of: Callable[[fx.Node], fx.Node]) -> Hashable:
    """Equal for equal arguments, and unlike == not for 0, False, 0.0 and -0.0."""
    if isinstance(argument, fx.Node):
        return of(argument)
    if isinstance(argument, (tuple, list)):
        return tuple(_structure(item, of) for item in argument)
    if isinstance(argument, dict):
        return tuple((key, _structure(item, of)) for key, item in sorted(argument.items()))
    if isinstance(argument, slice):
        return slice, _structure((argument.start, argument.stop, argument.step), of)
    return type(argument), repr(argument)


def _viewed_twice(node: fx.Node) -> fx.Node | None:
    """The tensor that a view shows as it is, itself perhaps a view further up, as the second ``t`` of ``t(t(x))``."""
    layout = _nodes.layout(_nodes.value_of(node))
    source = node
    while layout is not None and _nodes.is_view(source):
        source = source.all_input_nodes[0]
        if _nodes.layout(_nodes.value_of(source)) == layout:
            return source
    return None


def _is_copy(node: fx.Node) -> bool:
    """Whether the node is its argument, in another memory."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node) or _nodes.is_view(node):
        return False
    value, source = _nodes.value_of(node), _nodes.value_of(node.args[0])
    layout = _nodes.layout(value)
    if layout is None or layout != _nodes.layout(source):
        return False
    # Where the memory is larger, somebody could see the rest of it, and it would live longer.
    if _nodes.symbol(value.untyped_storage().nbytes()) != _nodes.symbol(source.untyped_storage().nbytes()):
        return False
    return node.target in _COPIES or _is_neutral(node, value.dtype)


def _is_neutral(node: fx.Node, dtype: torch.dtype) -> bool:
    neutral = _NEUTRAL.get(node.target)
    if neutral is None and not dtype.is_floating_point:
        neutral = _NEUTRAL_OF_INTEGERS.get(node.target)
    if neutral is None or dtype.is_complex or len(node.args) != 2 or node.kwargs:
        return False
    number = node.args[1]
    return isinstance(number, (int, float)) and number == neutral and math.copysign(1, number) > 0
