"""torch.autograd.Function under transforms: a unit of its own derivative at every level. `_units.py` says how."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.modules._functions import BackwardHookFunction

from functorch_lite import _C, _checks, _rules, _tree, _units
from functorch_lite._outside import is_outside
from functorch_lite._transpose import transpose
from functorch_lite._units import Call, Context, Unit, as_tuple

_NUMBERS = "wants the numbers of a tensor, as numpy and .item() do"
_VMAP_ADVICE = (
    "Give it a staticmethod vmap(info, in_dims, *args) that returns (outputs, out_dims): it gets plain tensors."
)
_SPLIT_ADVICE = (
    "To have its vmap staticmethod called where it is differentiated inside the vmap, split forward(ctx, ...) into "
    "forward(...) and setup_context(ctx, inputs, output)."
)


def _apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    args = _tree.captured(args)
    # What a backward pass saved are wrappers of a level that is closed by now.
    args = tuple(_C.strip_closed_levels(arg) if isinstance(arg, Tensor) and _C.is_wrapper(arg) else arg for arg in args)
    if is_outside() or _belongs_to_an_operator(cls):
        return _units.plain_apply(cls, *args, **kwargs)
    if _has_setup_context(cls) and (kwargs or getattr(cls.forward, "__defaults__", None)):
        bound = inspect.signature(cls.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        args, kwargs = bound.args, bound.kwargs
    if kwargs:
        return _units.plain_apply(cls, *args, **kwargs)  # says that there can be none
    return _units.apply(_unit_of(cls), *args)


def _has_setup_context(cls: type[Function]) -> bool:
    return cls.setup_context is not Function.setup_context


def _belongs_to_an_operator(cls: type[Function]) -> bool:
    # torch.library implements register_autograd with a Function inside the operator: each level calls the operator.
    return (cls.forward.__module__ or "").startswith("torch._library")


def _unit_of(cls: type[Function]) -> Unit:
    unit = cls.__dict__.get("_functorch_lite_unit")
    if unit is None:
        kind = _BackwardHookUnit if cls is BackwardHookFunction else _FunctionUnit
        unit = cls._functorch_lite_unit = kind(cls)  # type: ignore[attr-defined]
    return unit


class _FunctionUnit(Unit):
    """A Function, in either style."""

    def __init__(self, cls: type[Function]) -> None:
        self.cls = cls
        self.name = f"torch.autograd.Function {cls.__name__}"
        self.node = _units.node_named(cls.__name__)
        self.advice = _SPLIT_ADVICE if cls.vmap is not Function.vmap else _VMAP_ADVICE
        self._has_setup_context = _has_setup_context(cls)
        self._backward, self._once = _backward_of(cls), _once_differentiable(cls)

    def forward(self, context: Context, *args: Any) -> Any:
        """In both styles, the forward pass fills the context."""
        if not self._has_setup_context:
            return self.cls.forward(context, *args)
        outputs = self.cls.forward(*args)
        self.cls.setup_context(context, args, outputs)
        return outputs

    def backward(self, context: Context, *grads: Any) -> Any:
        """The Function's own, which cannot be differentiated if it is marked so, or leaves PyTorch."""
        if self._once is not None:
            return _without_derivative(self.name, "is marked once_differentiable", self._once, context, grads)
        try:
            return self._backward(context, *grads)
        except RuntimeError as error:
            if not _checks.needs_memory(error):
                raise
        if context.is_seen_below:  # perhaps through arrays, of which no derivative is known
            _checks.refuse_second_derivative(self.name, _NUMBERS)
        return _without_derivative(self.name, _NUMBERS, self._backward, context, grads)

    def jvp(self, context: Context, *tangents: Any) -> Any:
        """The Function's own, or the transpose of its backward pass."""
        if self.cls.jvp is not Function.jvp:
            return self.cls.jvp(context, *tangents)
        once = self._once
        if once is not None:

            def push(context: Context, *tangents: Any) -> Any:
                return transposed(self.name, once, context, tangents)

            return _without_derivative(self.name, "is marked once_differentiable", push, context, tangents)
        return transposed(self.name, self._backward, context, tangents)

    def rule(self, needs_context: bool) -> Callable[[Call, Sequence[Any]], Any] | None:
        """The vmap staticmethod. It fills no context: a level above needs `setup_context` for that."""
        if self.cls.vmap is Function.vmap:
            return None
        _checks.check_one_vmap_rule(self.cls)
        return None if needs_context and not self._has_setup_context else self._run_rule

    def _run_rule(self, call: Call, args: Sequence[Any]) -> Any:
        outputs = _rules.run(self.cls.vmap, f"the vmap staticmethod of {self.cls.__name__}", tuple(args), {})
        call.context = Context(call.needs)
        if call.keeps_context:
            with torch.no_grad():
                self.cls.setup_context(call.context, tuple(args), outputs)
        call.context.outputs = as_tuple(outputs)
        return outputs


class _BackwardHookUnit(_FunctionUnit):
    """PyTorch's Function for the backward hooks of modules, which returns its arguments."""

    def forward(self, context: Context, *args: Any) -> Any:
        """PyTorch's asks for `requires_grad`, which values do not have."""
        context.mark_non_differentiable(*(x for x, n in zip(args, context.needs_input_grad, strict=True) if not n))
        return args


def _backward_of(cls: type[Function]) -> Callable[..., Any]:
    if getattr(cls, "boxed_grads_call", False):
        return lambda context, *grads: cls.backward(context, list(grads))
    return cls.backward


def _once_differentiable(cls: type[Function]) -> Callable[..., Any] | None:
    """What the decorator of this name was put on, if it was."""
    wrapped: Callable[..., Any] | None = getattr(cls.backward, "__wrapped__", None)
    code = getattr(cls.backward, "__code__", None)
    return wrapped if code is not None and code.co_filename == inspect.getfile(Function) else None


class _WithoutDerivative(Unit):
    """A computation on plain tensors that must not be differentiated."""

    node = _units.node_named("WithoutDerivative")
    advice = _VMAP_ADVICE

    def __init__(self, function: str, reason: str, run: Callable[..., Any]) -> None:
        self.name = f"the backward pass of {function}"
        self._function, self._reason, self._run = function, reason, run

    def forward(self, context: Context, *args: Any) -> Any:
        return self._run(*args)

    def backward(self, context: Context, *grads: Any) -> Any:
        _checks.refuse_second_derivative(self._function, self._reason)

    def jvp(self, context: Context, *tangents: Any) -> Any:
        _checks.refuse_second_derivative(self._function, self._reason)


def _without_derivative(
    name: str, reason: str, method: Callable[..., Any], context: Context, vectors: Sequence[Any]
) -> Any:
    """``method(context, *vectors)``, run below all levels. What is differentiated raises."""
    tensors: list[Tensor] = []

    def note(tensor: Tensor, _: str) -> Tensor:
        tensors.append(tensor)
        return tensor

    context.moved(note)

    def run(*args: Any) -> Any:
        values = iter(args)
        plain = context.moved(lambda *_: next(values))
        return as_tuple(method(plain, *values))

    if _C.current_level() is None and not _units.is_differentiated_below([*tensors, *vectors]):
        return run(*tensors, *vectors)
    return _units.apply(_WithoutDerivative(name, reason, run), *tensors, *vectors)


def transposed(name: str, backward: Callable[..., Any], context: Context, tangents: Sequence[Any]) -> Any:
    """The tangents of the outputs, by transposing the backward pass."""
    not_differentiable = {id(output) for output in context.non_differentiable}
    outputs = {
        i: output
        for i, output in enumerate(context.outputs)
        if _tree.is_differentiable(output) and id(output) not in not_differentiable
    }

    def pull(grads_of_outputs: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        grads: list[Any] = [
            torch.zeros_like(output) if isinstance(output, Tensor) and context.materialize_grads else None
            for output in context.outputs
        ]
        for i, grad in zip(outputs, grads_of_outputs, strict=True):
            grads[i] = grad
        results = as_tuple(backward(context, *grads))
        _checks.check_gradient_count(name, results, len(tangents))
        for result, tangent, is_needed in zip(results, tangents, context.needs_input_grad, strict=False):
            if is_needed and isinstance(result, Tensor):
                yield result, tangent

    try:
        results = dict(zip(outputs, transpose(pull, list(outputs.values())), strict=True))
    except RuntimeError as error:
        if not _checks.needs_memory(error):
            raise
        _checks.refuse_jvp(name, error)
    return tuple(results.get(i) for i in range(len(context.outputs)))


def install() -> None:
    """Make `Function.apply` know levels. Outside of them it is PyTorch's own."""
    Function.apply = classmethod(_apply)  # type: ignore[assignment, method-assign]
