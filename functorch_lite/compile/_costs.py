"""Estimates of what a node takes: bytes to save it, work to compute it again. Symbolic sizes count by their hints."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

from functorch_lite.compile import _nodes

_aten = torch.ops.aten

#: How many floating-point operations take as long as moving a byte does.
FLOPS_PER_BYTE = 16

#: The hint of a size that only the data tell.
_UNKNOWN_SIZE = 4096

# Operators that read and write each element about once, beside those with the tag of pointwise ones or reductions.
_CHEAP = {
    *(_aten._softmax, _aten._log_softmax, _aten.native_layer_norm, _aten.native_group_norm),
    *(_aten._native_batch_norm_legit, _aten._native_batch_norm_legit_functional, _aten.native_batch_norm),
    *(_aten.sum, _aten.mean, _aten.var_mean, _aten.var, _aten.amax, _aten.amin, _aten.argmax, _aten.any, _aten.all),
    *(_aten._to_copy, _aten.fill, _aten.copy, _aten.full_like, _aten.zeros_like, _aten.ones_like, _aten.empty_like),
    *(_aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.new_empty, _aten.lift_fresh_copy, _aten.eye),
    *(_aten.cat, _aten.stack, _aten.repeat, _aten.flip, _aten.roll, _aten.constant_pad_nd, _aten.tril, _aten.triu),
    *(_aten.index, _aten._unsafe_index, _aten.index_select, _aten.gather, _aten.embedding, _aten.select_scatter),
    *(_aten.slice_scatter, _aten.diagonal_scatter, _aten.as_strided_copy),
}


def is_among(node: fx.Node, targets: Collection[Callable[..., Any]]) -> bool:
    """Whether the operator is one of these, which are overloads or packets."""
    packet = node.target.overloadpacket if isinstance(node.target, OpOverload) else None
    return node.target in targets or packet in targets


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element is computed of those at its place, or of none."""
    tagged = isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
    return tagged or not any(map(_nodes.is_tensor, node.all_input_nodes))


def is_cheap(node: fx.Node) -> bool:
    """Whether the operator does little more than to read and to write."""
    if isinstance(node.target, OpOverload) and torch.Tag.reduction in node.target.tags:
        return True
    return is_pointwise(node) or is_among(node, _CHEAP)


def size_of(size: Any) -> int:
    """The hint of a size."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else _UNKNOWN_SIZE
    return int(size)


def nbytes(node: fx.Node) -> int:
    """Bytes of the tensors that a node stands for, as if none were a view."""
    tensors = [leaf for leaf in pytree.tree_leaves(_nodes.value_of(node)) if isinstance(leaf, Tensor)]
    return sum(size_of(tensor.numel()) * tensor.itemsize for tensor in tensors)


def flops(node: fx.Node) -> int:
    """Floating-point operations: by PyTorch's formula where there is one, otherwise one for each element."""
    if _nodes.is_view(node) or _nodes.is_getitem(node) or node.op != "call_function":
        return 0
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is not None:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), _nodes.value_of)
        return size_of(formula(*args, **kwargs, out_val=_nodes.value_of(node)))
    elements = [size_of(leaf.numel()) for leaf in _tensors_at(node)]
    return max(elements, default=0)


def work(node: fx.Node) -> int:
    """The time to compute a node again, in units of the time that it takes to move a byte."""
    if _nodes.is_view(node) or _nodes.is_getitem(node) or node.op == "get_attr":
        return 0
    if is_pointwise(node):  # a part of a fused kernel, which keeps the others in registers
        return nbytes(node)
    moved = nbytes(node) + sum(map(nbytes, node.all_input_nodes))
    return moved + flops(node) // FLOPS_PER_BYTE


def _tensors_at(node: fx.Node) -> list[Tensor]:
    values = [_nodes.value_of(one) for one in (node, *node.all_input_nodes)]
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
