"""Questions about a node of a graph of operators."""

from __future__ import annotations

import operator
from collections.abc import Collection, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload

#: Nodes that stand for tensors from outside.
INPUTS = ("placeholder", "get_attr")

# What makes a random operator an ordinary one.
_SWITCHES = {"dropout_p": 0.0, "train": False}


def value_of(node: fx.Node) -> Any:
    """The fake value: a tensor, a number, or a tuple of them. None if there is none."""
    return node.meta.get("val")


def is_tensor(node: fx.Node) -> bool:
    """Whether the node is one tensor."""
    return isinstance(value_of(node), Tensor)


def is_number(node: fx.Node) -> bool:
    """Whether the node is a size, or computed of sizes."""
    return isinstance(value_of(node), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float))


def is_getitem(node: fx.Node) -> bool:
    """Whether the node is one of the results of an operator that has several."""
    return node.op == "call_function" and node.target is operator.getitem


def is_random(node: fx.Node) -> bool:
    """Whether the node advances a generator."""
    target = node.target
    if isinstance(target, HigherOrderOperator):
        return any(is_random(inner) for inner in _inner_nodes(node))
    if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    given = _arguments(node)
    return not any(name in given and given[name] == off for name, off in _SWITCHES.items())


def is_ordered(node: fx.Node) -> bool:
    """Whether the node has to run exactly once, and in its place: it is random, or has effects."""
    return node.op == "call_function" and (is_random(node) or _has_effects(node))


def is_view(node: fx.Node) -> bool:
    """Whether the node is a view, or one of several views, of its first argument."""
    if is_getitem(node):
        return is_view(node.all_input_nodes[0])
    target = node.target
    # The view that PyTorch does not call one, as nobody sees what it is of.
    return isinstance(target, OpOverload) and (target.is_view or target is torch.ops.aten._unsafe_view.default)


def base_of(node: fx.Node) -> fx.Node:
    """The node whose memory this one shows: itself if it is no view."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def written_bases(graph: fx.Graph) -> set[fx.Node]:
    """The bases that an operator writes into."""
    found = set()
    for node in graph.nodes:
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            given = _arguments(node)
            for argument in node.target._schema.arguments:
                if argument.is_write:
                    fx.node.map_arg(given.get(argument.name), lambda written: found.add(base_of(written)))
    return found


def touches(node: fx.Node, bases: Collection[fx.Node]) -> bool:
    """Whether the node shows or reads memory of one of the bases."""
    return any(base_of(one) in bases for one in (node, *node.all_input_nodes))


def returned(graph: fx.Graph) -> list[Any]:
    """The outputs of a graph that returns one flat list."""
    return list(graph.output_node().args[0])  # type: ignore[arg-type]


def symbol(size: Any) -> Hashable:
    """A size as something to compare without a guard."""
    return size if isinstance(size, int) else str(size)


def expression(node: fx.Node) -> Hashable:
    """What two numbers have in common that are always equal."""
    value = value_of(node)
    return node if isinstance(value, (int, float)) else (type(value), str(value))


def layout(value: Any) -> Hashable:
    """What two tensors of the same elements agree in if one can stand for the other. None if that is not known."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    return (
        value.dtype,
        value.device,
        *map(symbol, (*value.shape, *value.stride(), value.storage_offset())),
        value.is_conj(),
        value.is_neg(),
    )


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments by name, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return {**defaults, **dict(zip([argument.name for argument in schema], node.args, strict=False)), **node.kwargs}


def _has_effects(node: fx.Node) -> bool:
    if isinstance(node.target, HigherOrderOperator) and any(_has_effects(inner) for inner in _inner_nodes(node)):
        return True
    returns_nothing = isinstance(node.target, OpOverload) and not node.target._schema.returns
    return node.op == "call_function" and (returns_nothing or node.is_impure(impure_random=False))


def _inner_nodes(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes of the graphs that a higher-order operator takes."""
    for argument in node.all_input_nodes:
        if argument.op == "get_attr" and node.graph.owning_module is not None:
            inner = fx.graph_module._get_attr(node.graph.owning_module, str(argument.target))
            if isinstance(inner, fx.GraphModule):
                yield from inner.graph.nodes
