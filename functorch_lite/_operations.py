"""One call of a function with a derivative rule of its own, and how each level treats it.

A level that differentiates an argument runs the rule: as plain code of the levels further down, which differentiate
what the rule does. Other levels hand the function and its rule down. What they hand down runs at the level itself
again, so that functions and rules may use tensors of the levels that they were written at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from functorch_lite import _C, _checks, _functionalize, _tree, _units

Level = _C.VmapLevel | _C.AutodiffLevel | _C.FunctionalizeLevel
Leaves = list[Any]
# (residuals, gradients of the outputs) -> gradients of the leaves, None for zeros
Pull = Callable[[Sequence[Tensor], Sequence[Any]], Leaves]


class Operation:
    """One call of such a function, on the leaves of its arguments."""

    name: str

    def value(self, leaves: Leaves) -> Leaves:
        """The leaves of the output."""
        raise NotImplementedError

    def vjp(self, leaves: Leaves) -> tuple[Leaves, list[Tensor], Pull]:
        """The outputs, what the backward pass needs, and the backward pass, which runs at any level."""
        raise NotImplementedError

    def jvp(self, leaves: Leaves, tangents: list[Tensor | None]) -> tuple[Leaves, Leaves]:
        """The outputs and their tangents."""
        raise NotImplementedError

    def detached(self) -> Operation:
        """The same for when the levels that handed it down are closed."""
        return self


def call(op: Operation, leaves: Leaves) -> Leaves:
    """Call an operation at the innermost level."""
    level = _C.current_level()
    if isinstance(level, _C.TapeLevel):
        return _call_on_tape(op, level, leaves)
    if any(_is_variable(level, leaf) for leaf in leaves):
        assert not isinstance(level, (_C.VmapLevel, _C.FunctionalizeLevel))
        if level is not None and level.kind == "jvp":
            return _call_with_tangents(op, level, leaves)
        return _record(op, level, leaves)
    if level is None or not _units.is_differentiated_below(leaves):
        return op.value(leaves)
    unwrapped = _unwrapped(level, leaves)
    with _C.Below() as below:
        handed = _HandedDown(op, level, below, [dim for _, dim in unwrapped])
        outputs = call(handed, [value for value, _ in unwrapped])
    return [_lifted(level, output, 0) for output in outputs]


def _call_on_tape(op: Operation, level: _C.TapeLevel, leaves: Leaves) -> Leaves:
    """An operation is one step of a tape: it is called again, and its derivative is its own at every level."""
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def filled(tensors: Sequence[Tensor]) -> Leaves:
        result = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            result[i] = tensor
        return result

    # A tape of its own tells whether the function reads anything beside its arguments.
    with _C.TapeLevel(True) as inner:
        outputs = op.value(filled([inner.lift(leaves[i]) for i in places]))
        found = [i for i, output in enumerate(outputs) if isinstance(output, Tensor)]
        tape, _ = inner.finish([outputs[i] for i in found])
    if len(tape.inputs) > len(places):
        _checks.refuse_capture(level.kind, op.name)

    def again(tensors: list[Tensor]) -> list[Tensor]:
        results = call(op, filled(tensors))
        return [results[i] for i in found]

    with _C.Below():
        values = again([level.value_of(leaves[i]) for i in places])
    lifted = level.record(again, [leaves[i] for i in places], values)
    for i, output in zip(found, lifted, strict=True):
        outputs[i] = output
    return outputs


def _is_variable(level: Level | None, leaf: Any) -> bool:
    """Whether a level differentiates with respect to this."""
    if not isinstance(leaf, Tensor) or isinstance(level, (_C.VmapLevel, _C.FunctionalizeLevel)):
        return False
    if level is None:
        _checks.check_no_dual(forward_ad._current_level >= 0 and forward_ad.unpack_dual(leaf).tangent is not None)
        return leaf.requires_grad and torch.is_grad_enabled()
    if level.value_of(leaf) is leaf:
        return False
    if level.kind == "jvp":
        return level.tangent_of(leaf) is not None
    return leaf.requires_grad and torch.is_grad_enabled()


def _unwrapped(level: Level, leaves: Sequence[Any]) -> list[tuple[Any, int | None]]:
    if isinstance(level, _C.VmapLevel):
        return _tree.unwrap(level, leaves)
    return [(level.value_of(leaf) if isinstance(leaf, Tensor) else leaf, None) for leaf in leaves]


def _lifted(level: Level, value: Any, dim: int | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    if isinstance(level, _C.VmapLevel):
        return value if dim is None else level.lift(value, dim)
    return level.lift_new(value) if isinstance(level, _C.FunctionalizeLevel) else level.lift_constant(value)


def _constant(level: _C.AutodiffLevel | None, leaf: Any) -> Any:
    """The value of a leaf, as a tensor of the level that it does not differentiate."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach() if level is None else level.lift_constant(level.value_of(leaf))


class _HandedDown(Operation):
    """An operation of a level, as the level below calls it: mapped if the level is a vmap."""

    def __init__(self, op: Operation, level: Level, below: _C.Below | None, dims: Sequence[int | None]) -> None:
        self.op, self.name = op, op.name
        self.level, self.below, self.dims = level, below, dims

    def detached(self) -> Operation:
        return _HandedDown(self.op.detached(), self.level, None, self.dims)

    def value(self, leaves: Leaves) -> Leaves:
        with self._at_level() as level:
            return self._outputs(level, self.op.value(self._lift(level, leaves)))

    def vjp(self, leaves: Leaves) -> tuple[Leaves, list[Tensor], Pull]:
        with self._at_level() as level:
            outputs, residuals, pull = self.op.vjp(self._lift(level, leaves))
            self._check_captures(level, residuals)
            unwrapped = _unwrapped(level, residuals) if level is not None else [(x, None) for x in residuals]
            lowered = self._outputs(level, outputs)
        dims = [dim for _, dim in unwrapped]
        if isinstance(self.level, _C.VmapLevel):
            pull = functools.partial(self._pull_mapped, self.level, pull, dims)
        if isinstance(self.level, _C.FunctionalizeLevel):
            pull = functools.partial(_pull_functionalized, self.level.keep_views, pull)
        return lowered, [value for value, _ in unwrapped], pull

    def jvp(self, leaves: Leaves, tangents: list[Tensor | None]) -> tuple[Leaves, Leaves]:
        with self._at_level() as level:
            outputs, pushed = self.op.jvp(self._lift(level, leaves), self._lift(level, tangents))
            return self._outputs(level, outputs), self._outputs(level, pushed)

    def _at_level(self) -> AbstractContextManager[Level | None]:
        """Code inside runs at the level again; at a new one like it, or none, if it is closed."""
        if self.below is not None:
            return _Resumed(self.level, self.below)
        if isinstance(self.level, _C.VmapLevel):
            return _C.VmapLevel(self.level.batch_size, self.level.randomness)
        if isinstance(self.level, _C.FunctionalizeLevel):
            return _C.FunctionalizeLevel(self.level.keep_views)
        return nullcontext()

    def _lift(self, level: Level | None, leaves: Sequence[Any]) -> Leaves:
        if level is None:
            return list(leaves)
        return [_lifted(level, leaf, dim) for leaf, dim in zip(leaves, self.dims, strict=True)]

    def _outputs(self, level: Level | None, outputs: Leaves) -> Leaves:
        """Outputs one level down, each with the batch in front."""
        if level is None:
            return outputs
        self._check_captures(level, outputs)
        unwrapped = _unwrapped(level, outputs)
        if not isinstance(level, _C.VmapLevel):
            return [value for value, _ in unwrapped]
        return [_with_batch(level, value, dim, 0) if isinstance(value, Tensor) else value for value, dim in unwrapped]

    def _check_captures(self, level: Level | None, results: Sequence[Any]) -> None:
        if level is not None and any(_is_variable(level, result) for result in results):
            _checks.refuse_capture(level.kind, self.name)

    def _pull_mapped(
        self,
        mapped: _C.VmapLevel,
        pull: Pull,
        dims: Sequence[int | None],
        residuals: Sequence[Tensor],
        grads: Sequence[Tensor],
    ) -> Leaves:
        """Gradients with the batch dimension of their leaf, summed where all examples share the leaf."""
        with _C.VmapLevel(mapped.batch_size, mapped.randomness) as level:
            each = [_lifted(level, residual, dim) for residual, dim in zip(residuals, dims, strict=True)]
            results = _tree.unwrap(level, pull(each, [_lifted(level, grad, 0) for grad in grads]))
        return [
            result
            if result is None
            else _with_batch(mapped, result, found, dim or 0)
            if dim is not None
            else _with_batch(mapped, result, found, 0).sum(0)
            for (result, found), dim in zip(results, self.dims, strict=True)
        ]


def _pull_functionalized(keep_views: bool, pull: Pull, residuals: Sequence[Tensor], grads: Sequence[Any]) -> Leaves:
    results: Leaves = _functionalize.run(keep_views, pull, (list(residuals), list(grads)))
    return results


def _with_batch(level: _C.VmapLevel, value: Tensor, found: int | None, dim: int) -> Tensor:
    """Move the batch dimension from where it was found to ``dim``; make one if there is none."""
    if found is None:
        return value.unsqueeze(dim).expand(*value.shape[:dim], level.batch_size, *value.shape[dim:])
    return value.movedim(found, dim)


class _Resumed:
    """Runs the enclosed code at a level that has been left with `Below`."""

    def __init__(self, level: Level, below: _C.Below) -> None:
        self._level, self._again = level, below.undone()

    def __enter__(self) -> Level:
        self._again.__enter__()
        return self._level

    def __exit__(self, *exception: object) -> None:
        self._again.__exit__(*exception)


def _call_with_tangents(op: Operation, level: _C.AutodiffLevel, leaves: Leaves) -> Leaves:
    tangents = [level.tangent_of(leaf) if _is_variable(level, leaf) else None for leaf in leaves]
    constants = [_constant(level, leaf) for leaf in leaves]
    outputs, pushed = op.jvp(constants, [t if t is None else level.lift_constant(t) for t in tangents])
    if any(_is_variable(level, x) for x in (*outputs, *pushed)):
        _checks.refuse_capture(level.kind, op.name)
    return [
        _constant(level, output)
        if tangent is None
        else level.lift_dual(level.value_of(output), level.value_of(tangent))
        for output, tangent in zip(outputs, pushed, strict=True)
    ]


def _record(op: Operation, level: _C.AutodiffLevel | None, leaves: Leaves) -> Leaves:
    constants = [_constant(level, leaf) for leaf in leaves]
    outputs, residuals, pull = op.vjp(constants)
    if any(_is_variable(level, x) for x in (*outputs, *residuals)):
        _checks.refuse_capture("backward" if level is None else level.kind, op.name)
    arguments = [leaf if _is_variable(level, leaf) else c for leaf, c in zip(leaves, constants, strict=True)]
    recorded = _Recorded(op, level, pull, [None if isinstance(leaf, Tensor) else leaf for leaf in leaves])
    return list(_units.plain_apply(_Node, recorded, outputs, residuals, constants, *arguments))


class _Recorded:
    """What a node keeps, beside the tensors."""

    def __init__(self, op: Operation, level: _C.AutodiffLevel | None, pull: Pull, others: Leaves) -> None:
        self.op, self.level, self.pull = op, level, pull
        #: The leaves, None in place of the tensors.
        self.others = others

    def gradients(self, saved: Sequence[Tensor], grads: Sequence[Tensor]) -> Leaves:
        """Of all leaves. ``saved`` has the residuals and then the leaves that are tensors."""
        count = sum(leaf is None for leaf in self.others)
        tensors = saved[len(saved) - count :]
        is_open = self.level is None or self.level.depth > 0
        if not (is_open and torch.is_grad_enabled()):
            return self.pull(saved[: len(saved) - count], grads)
        # The pass is recorded at the level of the forward pass: the residuals have to depend on the arguments.
        each = iter(tensors)
        leaves = [next(each) if leaf is None else leaf for leaf in self.others]
        _, residuals, pull = self.op.detached().vjp(leaves)
        return pull(residuals, grads)


class _Node(Function):
    """What a level records. The arguments: what is recorded, the outputs, the residuals, constants, the leaves."""

    _BESIDE_LEAVES = 4

    @staticmethod
    def forward(
        ctx: Any, recorded: _Recorded, outputs: Leaves, residuals: list[Tensor], constants: Leaves, *leaves: Any
    ) -> Any:
        """New tensors for the outputs, for PyTorch marks them as its results."""
        ctx.recorded = recorded
        results = tuple(_constant(recorded.level, output) for output in outputs)
        here = {id(old): new for old, new in zip((*constants, *outputs), (*leaves, *results), strict=True)}
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        ctx.save_for_backward(*(here.get(id(residual), residual) for residual in residuals), *tensors)
        ctx.mark_non_differentiable(*(x for x in results if isinstance(x, Tensor) and not _tree.is_differentiable(x)))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradients of the leaves."""
        saved = [_C.strip_closed_levels(tensor) for tensor in ctx.saved_tensors]
        return (*[None] * _Node._BESIDE_LEAVES, *ctx.recorded.gradients(saved, grads))
