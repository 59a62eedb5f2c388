"""remat: a function that saves only its inputs for the backward pass, and is computed again there.

The derivative of such a function is one again, so each level treats it as a unit: it turns the function into the one
that computes what the level needs, and hands that one level down. So only inputs are saved at any order of
differentiation.

The function is first recorded on a tape (csrc/tape.h). The tape tells what it read beside its arguments, and is what is
computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from functorch_lite import _C, _functionalize, _tree

#: Takes tensors and returns a list of tensors. Arguments and results may also be None.
FlatFunction = Callable[..., list[Any]]


def remat(
    func: Callable[..., Any],
    repeats_random_numbers: bool = True,
    recomputing: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Callable[..., Any]:
    """``func``, computed again in the backward pass in place of saving what it needs there.

    ``func`` may take and return any pytree, and read tensors from outside, which may be differentiated. Computed again
    it draws the same random numbers, with the same autocast, in the context that ``recomputing`` makes.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        with _C.TapeLevel(repeats_random_numbers) as level:
            output = func(*_tree.map_tensors(level.lift, args), **_tree.map_tensors(level.lift, kwargs))
            leaves, spec = _tree.flatten(output)
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            tape, values = level.finish([leaves[i] for i in places])

        def again(*inputs: Tensor) -> list[Tensor]:
            with recomputing():
                return tape.replay(inputs)

        results = _run(again, tape.inputs, values)
        for i, result in zip(places, results, strict=True):
            leaves[i] = result
        return _tree.unflatten(leaves, spec)

    return call


def _run(func: FlatFunction, args: Sequence[Any], outputs: Sequence[Any] | None = None) -> list[Any]:
    """Run ``func`` as a unit at the innermost level.

    ``outputs`` are its results if somebody has computed them: with the batch dimensions and tangents of all levels, and
    recorded by none.
    """
    level = _C.current_level()
    args = [_C.strip_closed_levels(arg) if isinstance(arg, Tensor) and _C.is_wrapper(arg) else arg for arg in args]
    if isinstance(level, _C.VmapLevel):
        return _run_mapped(level, func, args, outputs)
    if isinstance(level, _C.TapeLevel):
        return _run_taped(level, func, args, outputs)
    if isinstance(level, _C.FunctionalizeLevel):
        return _run_functionalized(level, func, args, outputs)
    if isinstance(level, _C.AutodiffLevel):
        run_here = _run_forward if level.kind == "jvp" else _run_reverse
        return run_here(level, func, args, outputs)
    if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        return _Remat.record(None, func, args, outputs)
    return list(func(*args) if outputs is None else outputs)


def _map(function: Callable[[Tensor], Any], leaves: Sequence[Any]) -> list[Any]:
    return [function(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]


def _below(
    func: FlatFunction, values: Sequence[Any], outputs: Sequence[Any] | None, value_of: Callable[[Tensor], Any]
) -> list[Any]:
    """Run ``func`` one level down."""
    with _C.Below():
        return _run(func, values, None if outputs is None else _map(value_of, outputs))


def _run_mapped(
    level: _C.VmapLevel, func: FlatFunction, args: Sequence[Any], outputs: Sequence[Any] | None
) -> list[Any]:
    values, dims = _unwrap(level, args)
    out_dims = [] if outputs is None else _unwrap(level, outputs)[1]

    def mapped(*values: Any) -> list[Any]:
        with _C.VmapLevel(level.batch_size, level.randomness, level.chunks) as same:
            results, found = _unwrap(same, func(*_lift(same, values, dims)))
        if not out_dims:
            out_dims.extend(found)
        return [_move(level, *placed) for placed in zip(results, found, out_dims, strict=True)]

    return _lift(level, _below(mapped, values, outputs, lambda output: level.unwrap(output)[0]), out_dims)


def _unwrap(level: _C.VmapLevel, leaves: Sequence[Any]) -> tuple[list[Any], list[int | None]]:
    """Values and batch dimensions."""
    pairs = _tree.unwrap(level, leaves)
    return [value for value, _ in pairs], [dim for _, dim in pairs]


def _lift(level: _C.VmapLevel, values: Sequence[Any], dims: Sequence[int | None]) -> list[Any]:
    return [value if dim is None else level.lift(value, dim) for value, dim in zip(values, dims, strict=True)]


def _move(level: _C.VmapLevel, value: Any, found: int | None, wanted: int | None) -> Any:
    # Where an operator leaves the batch may depend on whether somebody differentiates.
    if value is None or found == wanted or wanted is None:
        return value
    if found is None:
        value, found = value.expand(level.batch_size, *value.shape), 0
    return value.movedim(found, wanted)


def _run_taped(
    level: _C.TapeLevel, func: FlatFunction, args: Sequence[Any], outputs: Sequence[Any] | None
) -> list[Any]:
    places = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
    results = _below(func, _map(level.value_of, args), outputs, level.value_of)
    found = [i for i, result in enumerate(results) if isinstance(result, Tensor)]

    def again(tensors: list[Tensor]) -> list[Tensor]:
        given: list[Any] = [None] * len(args)
        for i, tensor in zip(places, tensors, strict=True):
            given[i] = tensor
        again = _run(func, given)
        return [again[i] for i in found]

    lifted = iter(level.record(again, [args[i] for i in places], [results[i] for i in found]))
    return [None if result is None else next(lifted) for result in results]


def _run_functionalized(
    level: _C.FunctionalizeLevel, func: FlatFunction, args: Sequence[Any], outputs: Sequence[Any] | None
) -> list[Any]:
    def functionalized(*values: Any) -> list[Any]:
        results: list[Any] = _functionalize.run(level.keep_views, func, values)
        return results

    return _map(level.lift_new, _below(functionalized, _map(level.value_of, args), outputs, level.value_of))


def _run_forward(
    level: _C.AutodiffLevel, func: FlatFunction, args: Sequence[Any], outputs: Sequence[Any] | None
) -> list[Any]:
    count = len(args)

    def pushed(*leaves: Any) -> list[Any]:
        with _C.AutodiffLevel(True) as same:
            duals = [_dual(same, *leaf) for leaf in zip(leaves[:count], leaves[count:], strict=True)]
            return _parts(same, func(*duals))

    # Here, and not below, where somebody may have switched tangents off.
    parts = _parts(level, args)
    output_parts = None if outputs is None else _parts(level, outputs)
    with _C.Below():
        results = _run(pushed, parts, output_parts)
    half = len(results) // 2
    return [_dual(level, *parts) for parts in zip(results[:half], results[half:], strict=True)]


def _parts(level: _C.AutodiffLevel, duals: Sequence[Any]) -> list[Any]:
    """The values, and then the tangents."""
    return _map(level.value_of, duals) + _map(level.tangent_of, duals)


def _dual(level: _C.AutodiffLevel, value: Any, tangent: Any) -> Any:
    if value is None:
        return None
    return level.lift_constant(value) if tangent is None else level.lift_dual(value, tangent)


def _run_reverse(
    level: _C.AutodiffLevel, func: FlatFunction, args: Sequence[Any], outputs: Sequence[Any] | None
) -> list[Any]:
    # What is not of this level may have a derivative of another one, which the Function must not see.
    here = [level.lift_constant(arg) if isinstance(arg, Tensor) and level.value_of(arg) is arg else arg for arg in args]
    return _Remat.record(level, func, here, outputs)


class _Remat(Function):
    """The level that records: the function runs one level down, or as it is if there is no level."""

    @classmethod
    def record(
        cls, level: _C.AutodiffLevel | None, func: FlatFunction, args: Sequence[Any], outputs: Sequence[Any] | None
    ) -> list[Any]:
        # The apply below Function's own, which treats each level as we do here.
        return list(super(Function, cls).apply(level, func, outputs, *args))  # type: ignore[misc]

    @staticmethod
    def forward(
        ctx: Any, level: _C.AutodiffLevel | None, func: FlatFunction, outputs: Sequence[Any] | None, *args: Any
    ) -> tuple[Any, ...]:
        ctx.func = func
        ctx.is_tensor = [isinstance(arg, Tensor) for arg in args]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(arg for arg in args if isinstance(arg, Tensor)))
        if level is not None:
            outputs = _map(level.lift_constant, _below(func, _map(level.value_of, args), outputs, level.value_of))
        elif outputs is None:
            outputs = func(*args)
        ctx.mark_non_differentiable(*(o for o in outputs if o is not None and not _tree.is_differentiable(o)))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if is_tensor else None for is_tensor in ctx.is_tensor]
        func, needed = ctx.func, ctx.needs_input_grad[3:]

        def pulled(*leaves: Any) -> list[Any]:
            level, outputs, inputs = _record(func, leaves[: len(args)], needed)
            # An output without a cotangent, or that does not depend on what is needed.
            roots = [
                (o, c) for o, c in zip(outputs, leaves[len(args) :], strict=True) if o is not None and c is not None
            ]
            return level.backward([o for o, _ in roots], [c for _, c in roots], inputs, False)

        results = iter(_run(pulled, [*args, *cotangents]))
        return (None, None, None, *(next(results) if is_needed else None for is_needed in needed))


def _record(
    func: FlatFunction, args: Sequence[Any], needed: Sequence[bool]
) -> tuple[_C.AutodiffLevel, list[Any], list[Tensor]]:
    """Run the function at a level of its own. Returns the level, the outputs, and the inputs that are needed there."""
    outer = _C.current_level()
    if isinstance(outer, _C.VmapLevel):
        values, dims = _unwrap(outer, args)
        # A map over cotangents: once for all of them, with the same random numbers.
        if all(dim is None for dim in dims):
            with _C.Below():
                return _record(func, values, needed)
    with _C.AutodiffLevel(False) as level:
        lifted = [level.lift_variable(arg) if needs else arg for arg, needs in zip(args, needed, strict=True)]
        outputs = func(*lifted)
        return level, outputs, [arg for arg, needs in zip(lifted, needed, strict=True) if needs]
