"""Products with an identity matrix, which are what Jacobians begin with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from functorch_lite.compile import _nodes

_aten = torch.ops.aten

# Operators that take no more than sizes from the tensor.
_LIKE = {
    getattr(_aten, name).default
    for name in ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
}

# Constants are computed when a graph is compiled, and larger ones not at all.
_MAX_NUMEL = 1 << 24

# Results share no memory with factors. Inductor leaves out copies that nobody could tell from the original.
_Product = Callable[[Tensor, Tensor], Tensor]


def products_with_identities(graph: fx.Graph) -> dict[fx.Node, _Product]:
    """What computes the products of which one factor is known to be an identity matrix, or a column of many.

    The zeros of the identity make nothing of whatever they meet: where the other factor has an infinity or a NaN, the
    product has it in its place only, and no NaN around it.
    """
    candidates = [node for node in graph.nodes if node.target in (_aten.mm.default, _aten.bmm.default)]
    constants = _constants(graph) if candidates else {}
    products: dict[fx.Node, _Product] = {}
    for node in candidates:
        left, right = (constants.get(factor) for factor in node.args)
        if left is not None and _is_column_of_identities(left):
            products[node] = _repeat_right
        elif right is not None and right.shape[-2] == right.shape[-1] and _is_column_of_identities(right):
            products[node] = _keep_left
    return products


def _repeat_right(left: Tensor, right: Tensor) -> Tensor:
    *batch, rows, columns = left.shape
    copies = right.unsqueeze(-3).expand(*batch, rows // columns, *right.shape[-2:])
    return copies.clone(memory_format=torch.contiguous_format).reshape(*batch, rows, right.shape[-1])


def _keep_left(left: Tensor, right: Tensor) -> Tensor:
    return left.clone()


def _is_column_of_identities(matrix: Tensor) -> bool:
    *batch, rows, columns = matrix.shape
    if matrix.numel() == 0 or rows % columns:
        return False
    blocks = matrix.reshape(*batch, rows // columns, columns, columns)
    return bool((blocks == torch.eye(columns, dtype=matrix.dtype)).all())


def _constants(graph: fx.Graph) -> dict[fx.Node, Tensor]:
    """The tensors on the CPU that depend on no input."""
    found: dict[fx.Node, Tensor] = {}
    for node in graph.nodes:
        value = _nodes.value_of(node)
        if node.op != "call_function" or not isinstance(node.target, OpOverload) or not _is_small(value):
            continue
        like = node.target in _LIKE
        if _nodes.is_ordered(node) or node.target._schema.is_mutable:
            continue
        if like or all(source in found for source in node.all_input_nodes):
            of = _stand_in if like else found.__getitem__
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), of)
            found[node] = node.target(*args, **kwargs)
    return found


def _is_small(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu"
        and all(isinstance(size, int) for size in value.shape)
        and value.numel() <= _MAX_NUMEL
    )


def _stand_in(node: fx.Node) -> Any:
    """A tensor of the same sizes, of which nobody reads the elements."""
    value = _nodes.value_of(node)
    return torch.empty((), dtype=value.dtype).expand(value.shape) if isinstance(value, Tensor) else value
