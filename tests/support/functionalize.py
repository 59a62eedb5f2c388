"""What functionalize must do: the results and writes of eager PyTorch, by a program without writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils import _pytree

from tests.support.ops import tensors_of

Function = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def as_eager(functional: Callable[..., Any], eager: Callable[..., Any], *args: Any) -> None:
    """Assert that both return the same and leave the same in copies of the arguments."""
    expected_args, got_args = copied(args), copied(args)
    expected, got = eager(*expected_args), functional(*got_args)
    as_comparable(got, got_args, expected, expected_args)
    for left, right in zip(tensors_of(got_args), tensors_of(expected_args), strict=True):
        if right.layout == torch.strided:
            assert left.stride() == right.stride()


def as_comparable(got: Any, got_args: Any, expected: Any, expected_args: Any) -> None:
    """Assert that results and written arguments are the same."""
    torch.testing.assert_close(_comparable((got, got_args)), _comparable((expected, expected_args)), equal_nan=True)


def copied(tree: Any) -> Any:
    """The same with copies of the tensors; one copy for each tensor."""
    copies: dict[int, Tensor] = {}
    return _pytree.tree_map_only(Tensor, lambda x: copies.setdefault(id(x), x.detach().clone()), tree)


def _comparable(tree: Any) -> list[Tensor]:
    return [x.to_dense() if x.layout != torch.strided else x.resolve_conj() for x in tensors_of(tree)]


def _calls(traced: GraphModule) -> Iterator[tuple[Node, torch.FunctionSchema]]:
    for node in traced.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            yield node, node.target._schema


# What changes the shape of an argument as the function did. Its last statement, as is the copy into an argument.
_OF_ARGUMENTS = ("copy_", "t_", "unsqueeze_", "squeeze_", "as_strided_", "resize_", "set_", "detach_")


def writing_nodes(traced: GraphModule) -> list[str]:
    """The calls that write into anything but an argument, or do so before the end."""
    nodes = [(node, schema) for node, schema in _calls(traced) if schema.is_mutable]
    inputs = ("placeholder", "get_attr")

    def is_last(node: Node) -> bool:
        target = node.args[0]
        while target.op == "call_function" and target.target._schema.is_mutable:  # of a chain of such
            target = target.args[0]
        return target.op in inputs and node.target._schema.name.removeprefix("aten::") in _OF_ARGUMENTS

    return [node.format_node() for node, _ in nodes if not is_last(node)]


def aliasing_nodes(traced: GraphModule) -> list[str]:
    """The calls that make views."""
    return [
        node.format_node()
        for node, schema in _calls(traced)
        if not schema.is_mutable and any(a.alias_info for a in schema.arguments) and "lift_fresh" not in schema.name
    ]


def writing_forms(op: OpInfo, sample: SampleInput) -> Iterator[tuple[str, Function]]:
    """The operator as functions that write: in place, into a view, into what it returns, and into ``out``."""
    in_place = op.inplace_variant
    if in_place is not None and isinstance(sample.input, Tensor):
        yield "in place", lambda x, args, kwargs: in_place(x, *args, **kwargs)

        def into_view(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            whole = x.new_zeros((2, *x.shape))
            view = whole[1]
            view.copy_(x)
            in_place(view, *args, **kwargs)
            return whole, view

        yield "in a view", into_view

    def into_result(x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        results = op(x, *args, **kwargs)
        for i, result in enumerate(tensors_of(results)):
            result.fill_(i % 2)
        return results

    yield "in the result", into_result
    if not op.supports_out:
        return

    def into_out(x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = _pytree.tree_map_only(Tensor, torch.zeros_like, op(x, *args, **kwargs))
        op(x, *args, **kwargs, out=out)
        return out

    yield "in out", into_out
