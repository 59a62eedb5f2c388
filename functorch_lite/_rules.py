"""Batching rules written in Python: how they are called, and the kernels that stand for them in the dispatcher."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from functorch_lite import _C, _tree

Rule = Callable[..., Any]

# kBatchingRules in csrc/keys.h: what is registered on this key for an operator is its batching rule.
RULES_KEY = "TESTING_ONLY_GenericWrapper"


class VmapInfo(NamedTuple):
    """What a batching rule is told about the `vmap` that calls it."""

    batch_size: int
    #: As given to `vmap`: ``"error"``, ``"same"`` or ``"different"``.
    randomness: str


def run(rule: Rule, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``rule(info, in_dims, *args, **kwargs)`` one level down and wrap what it returns.

    The innermost level is a vmap. ``name`` is what messages call the rule.
    """
    level = _C.current_level()
    assert isinstance(level, _C.VmapLevel)
    leaves, spec = _tree.flatten(args)
    unwrapped = _tree.unwrap(level, leaves)
    values = [value for value, _ in unwrapped]
    in_dims = _tree.unflatten([dim for _, dim in unwrapped], spec)
    named = {key: _unbatched(level, name, key, value) for key, value in kwargs.items()}
    with _C.Below():
        result = rule(
            VmapInfo(level.batch_size, level.randomness.name), in_dims, *_tree.unflatten(values, spec), **named
        )
    described = _described(name, rule)
    if not isinstance(result, tuple) or len(result) != 2:
        got = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise TypeError(f"vmap: {described} must return (outputs, out_dims), got {got}.")
    outputs, out_dims = result
    out_leaves, out_spec = _tree.flatten(outputs)
    # A rule that returns an argument means the argument itself, which it may have written into.
    known = {(id(value), dim): arg for arg, (value, dim) in zip(leaves, unwrapped, strict=True)}
    wrapped = []
    for i, (leaf, dim) in enumerate(zip(out_leaves, _flat_out_dims(described, outputs, out_dims), strict=True)):
        wrong = _wrong_dim(leaf, dim, level.batch_size)
        if wrong:
            path = _tree.paths(outputs)[i]
            raise ValueError(f"vmap: {described} returned out_dim {dim} for output{path}, {wrong}.")
        place = None if dim is None else dim % leaf.dim()
        lifted = leaf if place is None else level.lift(leaf, place)
        wrapped.append(known.get((id(leaf), place), lifted))
    return _tree.unflatten(wrapped, out_spec)


def _unbatched(level: _C.VmapLevel, name: str, key: str, value: Any) -> Any:
    leaves, spec = _tree.flatten(value)
    unwrapped = _tree.unwrap(level, leaves)
    if any(dim is not None for _, dim in unwrapped):
        raise NotImplementedError(
            f"vmap: {name} was called with a batched keyword-only argument {key!r}, for which in_dims has no place. "
            f"Write a rule for one example with functorch_lite.extend.register_decomposition."
        )
    return _tree.unflatten([leaf for leaf, _ in unwrapped], spec)


def _described(name: str, rule: Rule) -> str:
    code = getattr(rule, "__code__", None)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code is not None else name


def _types(outputs: Any) -> str:
    if isinstance(outputs, tuple):
        return f"({', '.join(type(output).__name__ for output in outputs)})"
    return type(outputs).__name__


def _flat_out_dims(described: str, outputs: Any, out_dims: Any) -> list[int | None]:
    flat = _tree.flat_out_dims(out_dims, outputs)
    if flat is None:
        raise ValueError(
            f"vmap: {described} returned out_dims={out_dims!r}, which does not fit its outputs, a "
            f"{type(outputs).__name__}. Give one int or None for all, or a structure like that of the outputs."
        )
    return flat


def _wrong_dim(leaf: Any, dim: int | None, batch_size: int) -> str:
    """Why ``dim`` cannot be the batch dimension of an output; empty if it can."""
    if dim is None:
        return ""
    if not isinstance(leaf, Tensor):
        return f"a {type(leaf).__name__}. Give None for what is no tensor"
    shape = tuple(leaf.shape)
    if not -len(shape) <= dim < len(shape):
        return f"whose shape is {shape}"
    # Comparing symbolic sizes would fix them.
    if isinstance(shape[dim], int) and isinstance(batch_size, int) and shape[dim] != batch_size:
        return f"whose shape is {shape}, but the batch size is {batch_size}"
    return ""


class OperatorRule:
    """The rule of one operator as a kernel. An operator that writes returns the arguments it wrote into."""

    def __init__(self, op: OpOverload, find_rule: Callable[[], Rule]) -> None:
        self.name = op.name()
        self.find_rule = find_rule
        schema = op._schema
        self.arguments = [argument.name for argument in schema.arguments]
        self.types = [str(result.type) for result in schema.returns]
        writes = {a.name: a.alias_info.before_set for a in schema.arguments if a.alias_info and a.alias_info.is_write}
        self.targets = list(writes)
        memories = [result.alias_info.before_set if result.alias_info else None for result in schema.returns]
        self.returned = [next((name for name in writes if writes[name] == memory), None) for memory in memories]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on wrappers of the innermost level."""
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        for target in self.targets:
            _tree.map_tensors(self._make_batched, given.get(target))
        rule = self.find_rule()
        name = f"the batching rule of {self.name}"
        outputs = run(rule, name, args, kwargs)
        results = self._each(outputs)
        if results is None:
            raise TypeError(
                f"vmap: {_described(name, rule)} returned {_types(outputs)}, but the operator returns "
                f"{', '.join(self.types) or 'None'}."
            )
        results = [given[a] if a is not None else result for a, result in zip(self.returned, results, strict=True)]
        return results[0] if len(results) == 1 else tuple(results) or None

    def _each(self, outputs: Any) -> list[Any] | None:
        """The outputs as a list, if they are what the operator returns."""
        count = len(self.types)
        if count == 1:
            results = [outputs]
        elif outputs is None:
            results = []
        else:
            results = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        # Of several tensors, some may be undefined: those that a backward operator was not asked for.
        fits = [
            isinstance(result, Tensor) or (result is None and count > 1) or kind != "Tensor"
            for result, kind in zip(results, self.types, strict=False)
        ]
        return results if len(results) == count and all(fits) else None

    def _make_batched(self, target: Tensor) -> None:
        """Give what the rule will write into a batch, or say that it cannot have one."""
        level = _C.current_level()
        assert isinstance(level, _C.VmapLevel)
        value, dim = level.unwrap(target)
        if dim is not None:
            return
        try:
            target.copy_(level.lift(value.expand(level.batch_size, *value.shape), 0))
        except ValueError as error:
            raise ValueError(str(error).replace("aten::copy_", self.name)) from None


# By name of the operator: what functorch_lite.extend registered, and what torch.library did.
overrides: dict[str, Rule] = {}
library_rules: dict[str, Rule] = {}
# The registrations that can be taken back; dropping a library does that.
_libraries: dict[str, torch.library.Library] = {}


def kernel_of(op: OpOverload) -> Rule:
    """The kernel for an operator with a rule in these tables. It looks the rule up when it is called.

    For under a dispatch mode, PyTorch calls the last kernel that Python registered, even one that was taken back.
    """
    name = op.name()
    return lambda *args, **kwargs: (overrides.get(name) or library_rules[name])(*args, **kwargs)


def install(name: str, kernel: Rule) -> None:
    """Register ``kernel`` on the rules key, in place of what was installed for the operator before."""
    namespace, _, operator = name.partition("::")
    library = torch.library.Library(namespace, "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it replaces a built-in rule
        library.impl(operator, kernel, RULES_KEY)
    _libraries[name] = library


def uninstall(name: str) -> None:
    """Undo `install`: what the operator had before comes back."""
    _libraries.pop(name, None)


def forget(name: str) -> None:
    """Drop what Python registered for an operator that is gone."""
    overrides.pop(name, None)
    library_rules.pop(name, None)
    uninstall(name)


def _packet(name: str) -> Any:
    namespace, _, rest = name.partition("::")
    operator = rest.partition(".")[0]
    return getattr(getattr(torch.ops, namespace), operator, None) if namespace and operator else None


def find_operator(name: str) -> OpOverload | None:
    """The operator with this name, as in ``"aten::sum.dim_IntList"``; None if there is none."""
    found = getattr(_packet(name), name.partition(".")[2] or "default", None)
    return found if isinstance(found, OpOverload) and _is_dispatched(found) else None


def overloads_of(name: str) -> list[OpOverload]:
    """All overloads of the operator, given the name of one of them or the part before the dot."""
    packet = _packet(name)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    return [op for op in overloads if _is_dispatched(op)]


def _is_dispatched(op: OpOverload) -> bool:
    # Some overloads exist in TorchScript only.
    return torch._C._dispatch_has_kernel(op.name())
