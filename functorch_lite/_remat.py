"""remat: a function that saves only its inputs for the backward pass, and is computed again there.

The derivative of such a function is one again, so each level treats it as a unit: it turns the function into the one
that computes what the level needs, and hands that one level down. So only inputs are saved at any order of
differentiation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from functorch_lite import _C

#: Takes leaves, tensors or other things, and returns a list of them.
FlatFunction = Callable[..., list[Any]]


def remat(func: FlatFunction) -> FlatFunction:
    """``func``, computed again in the backward pass in place of saving what it needs there.

    ``func`` must depend on its arguments only. Computed again it draws the same random numbers, with the same autocast.
    """
    repeatable = _Repeatable(func)
    return lambda *args: _run(repeatable, args)


class _Repeatable:
    """A function that sees the random number generators and the autocast mode of its first call in all others."""

    def __init__(self, func: FlatFunction) -> None:
        self._func = func
        self._autocast: list[tuple[str, bool, torch.dtype]] | None = None

    def __call__(self, *args: Any) -> list[Any]:
        cuda = torch.cuda.is_initialized()
        if self._autocast is None:
            self._autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
            self._cpu_state = torch.get_rng_state()
            self._cuda_states = torch.cuda.get_rng_state_all() if cuda else []
            return self._func(*args)
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(range(len(self._cuda_states)), device_type="cuda"))
            for device, enabled, dtype in self._autocast:
                if device == "cpu" or cuda:
                    stack.enter_context(torch.autocast(device, dtype, enabled))
            torch.set_rng_state(self._cpu_state)
            if self._cuda_states:
                torch.cuda.set_rng_state_all(self._cuda_states)
            return self._func(*args)


def _run(func: FlatFunction, args: Sequence[Any]) -> list[Any]:
    args = [_C.strip_closed_levels(arg) if _is_wrapper(arg) else arg for arg in args]
    level = _C.current_level()
    if isinstance(level, _C.VmapLevel):
        return _run_mapped(level, func, args)
    if isinstance(level, _C.AutodiffLevel):
        return _run_forward(level, func, args) if level.kind == "jvp" else _run_reverse(level, func, args)
    if torch.is_grad_enabled() and any(_requires_grad(arg) for arg in args):
        return _Remat.record(func, None, args)
    return func(*args)


def _is_wrapper(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and _C.is_wrapper(leaf)


def _requires_grad(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _map_leaves(function: Callable[[Tensor], Any], leaves: Sequence[Any]) -> list[Any]:
    return [function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _unwrap(level: _C.VmapLevel, leaves: Sequence[Any]) -> tuple[list[Any], list[int | None]]:
    """Values and batch dimensions."""
    pairs = [level.unwrap(leaf) if isinstance(leaf, Tensor) else (leaf, None) for leaf in leaves]
    return [value for value, _ in pairs], [dim for _, dim in pairs]


def _lift(level: _C.VmapLevel, values: Sequence[Any], dims: Sequence[int | None]) -> list[Any]:
    return [value if dim is None else level.lift(value, dim) for value, dim in zip(values, dims, strict=True)]


def _run_mapped(level: _C.VmapLevel, func: FlatFunction, args: Sequence[Any]) -> list[Any]:
    values, dims = _unwrap(level, args)
    out_dims: list[int | None] = []

    def mapped(*values: Any) -> list[Any]:
        with _C.VmapLevel(level.batch_size, level.randomness, level.chunks) as same:
            outputs, out_dims[:] = _unwrap(same, func(*_lift(same, values, dims)))
        return outputs

    with _C.Below():
        outputs = _run(mapped, values)
    return _lift(level, outputs, out_dims)


def _run_forward(level: _C.AutodiffLevel, func: FlatFunction, args: Sequence[Any]) -> list[Any]:
    values = _map_leaves(level.value_of, args)
    tangents = [level.tangent_of(arg) if isinstance(arg, Tensor) else None for arg in args]

    def pushed(*leaves: Any) -> list[Any]:
        with _C.AutodiffLevel(True) as same:
            duals = [
                value if tangent is None else same.lift_dual(value, tangent)
                for value, tangent in zip(leaves[: len(args)], leaves[len(args) :], strict=True)
            ]
            outputs = func(*duals)
            tangents = [same.tangent_of(output) if isinstance(output, Tensor) else None for output in outputs]
            return _map_leaves(same.value_of, outputs) + tangents

    with _C.Below():
        results = _run(pushed, values + tangents)
    half = len(results) // 2
    return [
        _lifted(level, value) if tangent is None else level.lift_dual(value, tangent)
        for value, tangent in zip(results[:half], results[half:], strict=True)
    ]


def _lifted(level: _C.AutodiffLevel, leaf: Any) -> Any:
    return level.lift_constant(leaf) if isinstance(leaf, Tensor) else leaf


def _run_reverse(level: _C.AutodiffLevel, func: FlatFunction, args: Sequence[Any]) -> list[Any]:
    # What is not of this level may have a derivative of another one, which the Function must not see.
    here = [arg if isinstance(arg, Tensor) and level.value_of(arg) is not arg else _lifted(level, arg) for arg in args]
    return _Remat.record(func, level, here)


class _Remat(Function):
    """The level that records: the function runs one level down (level None: as it is)."""

    @classmethod
    def record(cls, func: FlatFunction, level: _C.AutodiffLevel | None, args: Sequence[Any]) -> list[Any]:
        # The apply below Function's own, which treats each level as we do here.
        return list(super(Function, cls).apply(func, level, *args))  # type: ignore[misc]

    @staticmethod
    def forward(ctx: Any, func: FlatFunction, level: _C.AutodiffLevel | None, *args: Any) -> tuple[Any, ...]:
        ctx.func = func
        ctx.set_materialize_grads(False)
        ctx.is_tensor = [isinstance(arg, Tensor) for arg in args]
        ctx.constants = [None if isinstance(arg, Tensor) else arg for arg in args]
        ctx.save_for_backward(*(arg for arg in args if isinstance(arg, Tensor)))
        if level is None:
            outputs = func(*args)
        else:
            values = _map_leaves(level.value_of, args)
            with _C.Below():
                outputs = _run(func, values)
            outputs = [_lifted(level, output) for output in outputs]
        ctx.mark_non_differentiable(*(o for o in outputs if isinstance(o, Tensor) and not _is_float(o)))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        args = [
            next(saved) if is_tensor else constant
            for is_tensor, constant in zip(ctx.is_tensor, ctx.constants, strict=True)
        ]
        func, wanted = ctx.func, [i for i in range(len(args)) if ctx.needs_input_grad[i + 2]]
        given = [i for i, grad in enumerate(grads) if grad is not None]

        def pulled(*leaves: Any) -> list[Any]:
            level, outputs, inputs = _record(func, leaves[: len(args)], wanted)
            return level.backward([outputs[i] for i in given], leaves[len(args) :], inputs, False)

        results = iter(_run(pulled, [*args, *(grads[i] for i in given)]))
        return (None, None, *(next(results) if i in wanted else None for i in range(len(args))))


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _record(
    func: FlatFunction, args: Sequence[Any], wanted: list[int]
) -> tuple[_C.AutodiffLevel, list[Any], list[Tensor]]:
    """Run the function at a level of its own. Returns the level, the outputs and the inputs that are wanted there."""
    outer = _C.current_level()
    if isinstance(outer, _C.VmapLevel):
        values, dims = _unwrap(outer, args)
        if all(
            dim is None for dim in dims
        ):  # a map over cotangents: once for all of them, with the same random numbers
            with _C.Below():
                return _record(func, values, wanted)
    with _C.AutodiffLevel(False) as level:
        lifted = [level.lift_variable(arg) if i in wanted else arg for i, arg in enumerate(args)]
        return level, func(*lifted), [lifted[i] for i in wanted]
