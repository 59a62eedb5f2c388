"""torch.autograd.Function under transforms.

A Function replaces the derivative of its forward pass. PyTorch's `apply` does that for one level: the tensors that it
sees. A level below, which the forward pass runs through, would differentiate the forward pass itself and get another
derivative, silently. So an autodiff level runs the forward pass as the same Function one level down, where it also
meets plain tensors in the end.

A vmap level calls the Function's `vmap` staticmethod, if it has one. Otherwise the forward pass runs on batched
tensors; if a level below differentiates, as a Function that maps the forward and the backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function

from functorch_lite import _C, _checks, _rules, _tree

_plain_apply: Callable[..., Any] = Function.apply.__func__  # type: ignore[attr-defined]


def _apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    level = _C.current_level()
    # What a backward pass saved are wrappers of a level that is closed by now.
    args = tuple(_C.strip_closed_levels(arg) if isinstance(arg, Tensor) and _C.is_wrapper(arg) else arg for arg in args)
    if level is None or _belongs_to_an_operator(cls):
        return _plain_apply(cls, *args, **kwargs)
    if _has_setup_context(cls) and (kwargs or getattr(cls.forward, "__defaults__", None)):
        bound = inspect.signature(cls.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        args, kwargs = bound.args, bound.kwargs
    if kwargs:
        return _plain_apply(cls, *args, **kwargs)
    if isinstance(level, _C.VmapLevel):
        return _apply_at_vmap(cls, level, args)
    if _has_setup_context(cls):
        return _plain_apply(_one_level_down(cls), *args)
    if _is_differentiated_below(args):
        _checks.refuse_single_level_function(cls.__name__)
    return _explained(level, cls, lambda: _plain_apply(cls, *args))


def _explained(level: _C.Level, cls: type[Function], forward: Callable[[], Any]) -> Any:
    """Run the forward pass on wrappers, and say what the Function needs if that cannot be."""
    try:
        return forward()
    except RuntimeError as error:
        if not _checks.needs_memory(error):
            raise
        _checks.refuse_forward(level.kind, cls.__name__, error)


def _has_setup_context(cls: type[Function]) -> bool:
    return cls.setup_context is not Function.setup_context


def _has_vmap(cls: type[Function]) -> bool:
    return cls.vmap is not Function.vmap


def _is_differentiated_below(args: tuple[Any, ...]) -> bool:
    return any(_C.is_differentiated_below(arg) for arg in args if isinstance(arg, Tensor))


def _belongs_to_an_operator(cls: type[Function]) -> bool:
    # torch.library implements register_autograd with a Function inside the operator: each level calls the operator.
    return cls.forward.__module__.startswith("torch._library")


def _one_level_down(cls: type[Function]) -> type[Function]:
    """The Function whose forward pass is ``cls`` applied one level down, and whose derivative is that of ``cls``."""
    made: type[Function] | None = cls.__dict__.get("_functorch_lite_one_level_down")
    if made is not None:
        return made

    class Lifted(cls):  # type: ignore[misc, valid-type]
        @staticmethod
        def forward(*args: Any) -> Any:
            level = _C.current_level()
            assert isinstance(level, _C.AutodiffLevel)
            values = _tree.map_tensors(level.value_of, args)
            with _C.Below():
                outputs = _apply(cls, *values)
            # An argument that is returned stays the argument: it may have been written into.
            known = {id(value): arg for value, arg in zip(values, args, strict=True)}
            return _tree.map_tensors(
                lambda output: known[id(output)] if id(output) in known else level.lift_constant(output), outputs
            )

    Lifted.__name__ = cls.__name__
    cls._functorch_lite_one_level_down = Lifted  # type: ignore[attr-defined]
    return Lifted


def _apply_at_vmap(cls: type[Function], level: _C.VmapLevel, args: tuple[Any, ...]) -> Any:
    is_batched = any(dim is not None for _, dim in _tree.unwrap(level, _tree.flatten(args)[0]))
    if not is_batched and (_has_vmap(cls) or _is_differentiated_below(args)):
        values = _tree.map_tensors(lambda arg: level.unwrap(arg)[0], args)
        with _C.Below():
            return _apply(cls, *values)
    if _has_vmap(cls):
        _checks.check_one_vmap_rule(cls)
        return _rules.run(cls.vmap, f"the vmap staticmethod of {cls.__name__}", args, {})
    if not _is_differentiated_below(args):
        return _explained(level, cls, lambda: _plain_apply(cls, *args))
    if not _has_setup_context(cls):
        _checks.refuse_single_level_function(cls.__name__)
    return _apply_mapped(cls, level, args)


def _apply_mapped(cls: type[Function], level: _C.VmapLevel, args: tuple[Any, ...]) -> Any:
    """Apply, below a vmap, the Function that maps ``cls`` over the batch, forward and backward."""
    unwrapped = _tree.unwrap(level, args)
    dims = tuple(dim for _, dim in unwrapped)
    with _C.Below():
        mapped = _mapped(cls, dims, level)
        outputs = _explained(level, cls, lambda: _apply(mapped, *(value for value, _ in unwrapped)))
        leaves, spec = _tree.flatten(outputs)
    lifted = [level.lift(leaf, 0) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return _tree.unflatten(lifted, spec)


class _Context:
    """What a mapped Function gets as ``ctx``, for one example."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Any, ...] = ()
        self.saved_for_forward: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        self.saved_for_forward = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def _mapped(cls: type[Function], in_dims: tuple[int | None, ...], level: _C.VmapLevel) -> type[Function]:
    from functorch_lite._vmap import map_as, vmap

    forward_of_all = map_as(level, cls.forward, in_dims)
    randomness = level.randomness.name

    def differentiate(ctx: Any, method: Callable[..., Any], vectors: tuple[Any, ...], dims: list[int | None]) -> Any:
        """Call ``method(ctx, *vectors)`` for each example; the result is a tuple with the batch in front."""
        saved = iter(ctx.saved_tensors)
        inputs = [ctx.constants[i] if i in ctx.constants else next(saved) for i in range(len(in_dims))]
        outputs = list(saved)

        def one_example(inputs: Any, outputs: Any, vectors: Any) -> Any:
            context = _Context(ctx.needs_input_grad)
            cls.setup_context(context, tuple(inputs), outputs[0] if ctx.single else tuple(outputs))
            if method is cls.jvp and context.saved_for_forward:
                context.saved_tensors = context.saved_for_forward
            results = method(context, *vectors)
            return results if isinstance(results, tuple) else (results,)

        vector_dims = [None if vector is None else dim for vector, dim in zip(vectors, dims, strict=True)]
        return vmap(one_example, in_dims=(list(in_dims), 0, vector_dims), randomness=randomness)(
            inputs, outputs, list(vectors)
        )

    class Mapped(Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            versions = [_version(arg) for arg in args]
            outputs = forward_of_all(*args)
            if versions != [_version(arg) for arg in args]:
                _checks.refuse_mark_dirty(cls.__name__)
            # An argument that is returned as it is could not be saved.
            known = {id(arg) for arg in args}
            return _tree.map_tensors(lambda output: output.view_as(output) if id(output) in known else output, outputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.constants = {i: arg for i, arg in enumerate(inputs) if not isinstance(arg, Tensor)}
            ctx.single = isinstance(output, Tensor)
            tensors = [*(arg for arg in inputs if isinstance(arg, Tensor)), *((output,) if ctx.single else output)]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            results = differentiate(ctx, cls.backward, grads, [0] * len(grads))
            # What all examples share gets the sum of their gradients.
            return tuple(
                result.sum(0) if isinstance(result, Tensor) and dim is None else _at(result, dim)
                for result, dim in zip(results, in_dims, strict=True)
            )

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            results = differentiate(ctx, cls.jvp, tangents, list(in_dims))
            return results[0] if ctx.single else results

    Mapped.__name__ = cls.__name__
    return Mapped


def _version(arg: Any) -> int | None:
    return arg._version if isinstance(arg, Tensor) and not arg.is_inference() else None


def _at(result: Any, dim: int | None) -> Any:
    return result.movedim(0, dim) if isinstance(result, Tensor) and dim else result


def install() -> None:
    """Make `Function.apply` know levels. Outside of them it is PyTorch's own."""
    Function.apply = classmethod(_apply)  # type: ignore[assignment, method-assign]
