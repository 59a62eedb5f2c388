"""Pytrees: flattening, paths for messages, in_dims prefixes, and the selection of arguments."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from functorch_lite import _C, _checks

Spec = pytree.TreeSpec
LEAF: Spec = _C.flatten(None)[1]

#: While a function is traced by functorch_lite.compile, in its thread: what takes the place of a tensor from outside.
_capture: dict[int, Callable[[Any], Any]] = {}


@contextmanager
def capturing(capture: Callable[[Any], Any]) -> Iterator[None]:
    """In the enclosed code `captured` applies ``capture``."""
    thread = threading.get_ident()
    before = _capture.get(thread)
    _capture[thread] = capture
    try:
        yield
    finally:
        if before is None:
            del _capture[thread]
        else:
            _capture[thread] = before


def captured(tree: Any) -> Any:
    """What a traced function is to use in the place of ``tree``; outside of a trace that itself."""
    capture = _capture.get(threading.get_ident()) if _capture else None
    return tree if capture is None else capture(tree)


def flatten(tree: Any) -> tuple[list[Any], Spec]:
    """Leaves and structure."""
    return _C.flatten(captured(tree) if _capture else tree)


def unflatten(leaves: Sequence[Any], spec: Spec) -> Any:
    """The inverse of `flatten`."""
    return leaves[0] if spec is LEAF else _C.unflatten(leaves, spec)


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply ``function`` to the tensors of a tree; other leaves stay."""
    if isinstance(tree, Tensor):
        return function(tree)
    return pytree.tree_map_only(Tensor, function, tree)


def paths(tree: Any) -> list[str]:
    """The path of each leaf as one would write it behind the tree's name: ``['a'][0].b``."""
    return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]


def broadcast_dims(dims: Any, tree: Any) -> list[int | None] | None:
    """Repeat each dimension in ``dims`` for the leaves of ``tree`` below it; None if it is no prefix of ``tree``."""
    flat = _C.broadcast_dims(dims, tree)
    return _broadcast_prefix(dims, tree) if flat is None else flat


def _broadcast_prefix(prefix: Any, tree: Any) -> list[Any] | None:
    if is_dim(prefix):
        return [prefix] * pytree.tree_structure(tree).num_leaves
    prefix_spec = pytree.tree_structure(prefix, is_leaf=is_dim)
    spec = pytree.tree_structure(tree)
    fields = _fields_like(prefix, tree)
    if fields is not None:
        return _broadcast_children(fields, _children(tree))
    if spec.is_leaf() or prefix_spec.type != spec.type or prefix_spec.num_children != spec.num_children:
        return None
    if prefix_spec.context != spec.context:
        return None
    return _broadcast_children(_children(prefix), _children(tree))


def is_dim(value: object) -> bool:
    """Whether this is an entry of in_dims or out_dims, and not a structure of such."""
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def flat_out_dims(out_dims: Any, outputs: Any) -> list[int | None] | None:
    """A dimension for each leaf of the outputs; None if the structures do not fit."""
    flat = broadcast_dims(out_dims, outputs)
    # A tuple stands for a list and the other way round, as it does for in_dims.
    if flat is None and isinstance(out_dims, (tuple, list)) and isinstance(outputs, (tuple, list)):
        flat = broadcast_dims(tuple(out_dims), tuple(outputs))
    return flat


def unwrap(level: _C.VmapLevel, leaves: Sequence[Any]) -> list[tuple[Any, int | None]]:
    """The value of each leaf one level down and its batch dimension; None for leaves that are not batched."""
    return [level.unwrap(leaf) if isinstance(leaf, Tensor) else (leaf, None) for leaf in leaves]


def _broadcast_children(parts: Sequence[Any], subtrees: Sequence[Any]) -> list[Any] | None:
    result: list[Any] = []
    for part, subtree in zip(parts, subtrees, strict=True):
        below = _broadcast_prefix(part, subtree)
        if below is None:
            return None
        result.extend(below)
    return result


def _children(tree: Any) -> list[Any]:
    return list(pytree.SUPPORTED_NODES[pytree._get_node_type(tree)].flatten_fn(tree)[0])


def _fields_like(prefix: Any, tree: Any) -> list[Any] | None:
    """The fields of ``prefix`` that are children of ``tree``, if both are the same registered dataclass."""
    # A dataclass is flattened without the fields that are None; in a prefix, None says something.
    if type(prefix) is not type(tree) or not is_dataclass(tree) or type(tree) not in pytree.SUPPORTED_NODES:
        return None
    flatten_with_keys = pytree.SUPPORTED_NODES[type(tree)].flatten_with_keys_fn
    keys = [key for key, _ in flatten_with_keys(tree)[0]] if flatten_with_keys is not None else []
    names = [key.name for key in keys if isinstance(key, pytree.GetAttrKey)]
    return [getattr(prefix, name) for name in names] if names and len(names) == len(keys) else None


class Arguments:
    """The positional arguments of a call, seen as those that ``argnums`` selects and the rest."""

    def __init__(self, transform: str, args: tuple[Any, ...], argnums: int | tuple[int, ...]) -> None:
        self.args = args
        self.argnums = argnums
        self.positions = _checks.argument_positions(transform, argnums, len(args))
        self.selected: tuple[Any, ...] = (
            args if len(args) == 1 else tuple([args[position] for position in self.positions])
        )

    def replaced(self, selected: Sequence[Any]) -> Sequence[Any]:
        """The arguments with others in the selected places."""
        if len(self.args) == 1:
            return selected
        args = list(self.args)
        for position, value in zip(self.positions, selected, strict=True):
            args[position] = value
        return args

    def shaped(self, results: Sequence[Any]) -> Any:
        """One result for an int, a tuple for a tuple of argnums."""
        return results[0] if isinstance(self.argnums, int) else tuple(results)

    def names(self) -> list[str]:
        """``argument 0['w']``, for each leaf of the selected arguments."""
        return [f"argument {i}{path}" for i in self.positions for path in paths(self.args[i])]


def is_differentiable(leaf: object) -> bool:
    """Whether derivatives with respect to this leaf exist."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def is_like(leaf: object, expected: Tensor) -> bool:
    """Whether this is a tensor of the other's shape and dtype."""
    return isinstance(leaf, Tensor) and leaf.shape == expected.shape and leaf.dtype == expected.dtype


def leaves_like(called: str, what: str, tree: Any, of: str, expected: Sequence[Tensor], spec: Spec) -> list[Tensor]:
    """The leaves of a tree that must have the structure, shapes and dtypes of another."""
    leaves, got = flatten(tree)
    _checks.check_same_structure(called, f"the {what}", got, spec, f"the {of}")
    for i, (leaf, other) in enumerate(zip(leaves, expected, strict=True)):
        if not is_like(leaf, other):
            path = paths(tree)[i]
            _checks.check_like(called, f"{what}{path}", leaf, other, f"{of}{path}")
    return leaves
