"""torch.autograd.Function at several levels at once.

A Function replaces the derivative of its forward pass. PyTorch's `apply` does that for one level: the tensors that it
sees. A level below, which the forward pass runs through, would differentiate the forward pass itself and get another
derivative, silently. So when a call is differentiated further down, it is made again one level down, as a Function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function

from functorch_lite import _C, _checks, _tree

_plain_apply: Callable[..., Any] = Function.apply.__func__  # type: ignore[attr-defined]


def _apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    level = _C.current_level()
    if level is None or _belongs_to_an_operator(cls):
        return _plain_apply(cls, *args, **kwargs)
    if not any(_C.is_differentiated_below(arg) for arg in args if isinstance(arg, Tensor)):
        return _plain_apply(cls, *args, **kwargs)
    if isinstance(level, _C.VmapLevel) and not any(_is_batched(level, arg) for arg in args):
        with _C.Below():
            return _apply(cls, *args)
    if cls.setup_context is Function.setup_context:
        _checks.refuse_single_level_function(cls.__name__)
    if isinstance(level, _C.VmapLevel):
        return _apply_batched(cls, level, args)
    return _plain_apply(_one_level_down(cls, level), *args)


def _is_batched(level: _C.VmapLevel, arg: Any) -> bool:
    return isinstance(arg, Tensor) and level.unwrap(arg)[1] is not None


def _belongs_to_an_operator(cls: type[Function]) -> bool:
    # torch.library implements register_autograd with a Function inside the operator: each level calls the operator.
    return cls.forward.__module__.startswith("torch._library")


def _one_level_down(cls: type[Function], level: Any) -> type[Function]:
    """The Function whose forward pass is ``cls`` applied below ``level``, and whose derivative is that of ``cls``."""

    class Lifted(cls):  # type: ignore[misc, valid-type]
        @staticmethod
        def forward(*args: Any) -> Any:
            values = [level.value_of(arg) if isinstance(arg, Tensor) else arg for arg in args]
            with _C.Below():
                outputs = _apply(cls, *values)
            return _tree.map_tensors(level.lift_constant, outputs)

    Lifted.__name__ = cls.__name__
    return Lifted


def _apply_batched(cls: type[Function], level: Any, args: tuple[Any, ...]) -> Any:
    """Apply, below a vmap, the Function that maps ``cls`` over the batch, forward and backward."""
    unwrapped = [level.unwrap(arg) if isinstance(arg, Tensor) else (arg, None) for arg in args]
    dims = tuple(dim for _, dim in unwrapped)
    with _C.Below():
        outputs = _apply(_batched(cls, dims), *(value for value, _ in unwrapped))
        leaves, spec = _tree.flatten(outputs)
    lifted = [level.lift(leaf, 0) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return _tree.unflatten(lifted, spec)


class _Context:
    """What setup_context and backward of a mapped Function get as ``ctx``, for one example."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        self.saved_for_forward = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def _batched(cls: type[Function], in_dims: tuple[int | None, ...]) -> type[Function]:
    from functorch_lite._vmap import vmap

    class Batched(Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return vmap(cls.forward, in_dims=in_dims)(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.constants = {i: arg for i, arg in enumerate(inputs) if not isinstance(arg, Tensor)}
            ctx.single = isinstance(output, Tensor)
            outputs = (output,) if ctx.single else output
            ctx.save_for_backward(*(arg for arg in inputs if isinstance(arg, Tensor)), *outputs)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            saved = iter(ctx.saved_tensors)
            inputs = [ctx.constants[i] if i in ctx.constants else next(saved) for i in range(len(in_dims))]
            outputs = list(saved)

            def one_example(inputs: Any, outputs: Any, grads: Any) -> Any:
                context = _Context(ctx.needs_input_grad)
                cls.setup_context(context, tuple(inputs), outputs[0] if ctx.single else tuple(outputs))
                results = cls.backward(context, *grads)
                return results if isinstance(results, tuple) else (results,)

            mapped = vmap(one_example, in_dims=(list(in_dims), 0, 0))
            results = mapped(inputs, outputs, list(grads))
            # What all examples share gets the sum of their gradients.
            return tuple(
                result.sum(0) if isinstance(result, Tensor) and dim is None else _at(result, dim)
                for result, dim in zip(results, in_dims, strict=True)
            )

    Batched.__name__ = cls.__name__
    return Batched


def _at(result: Any, dim: int | None) -> Any:
    return result.movedim(0, dim) if isinstance(result, Tensor) and dim else result


def install() -> None:
    """Make `Function.apply` know levels. Outside of them it is PyTorch's own."""
    Function.apply = classmethod(_apply)  # type: ignore[assignment, method-assign]
