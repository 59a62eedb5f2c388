"""For authors of operators: teach `vmap` an operator of yours, or another way to run one of PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket

from functorch_lite import _C, _checks, _rules
from functorch_lite._rules import VmapInfo

__all__ = ["VmapInfo", "register_batching_rule", "register_decomposition", "remove_rule"]

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def register_batching_rule(op: Any) -> Callable[[FunctionT], FunctionT]:
    """Decorate a function that says how `vmap` runs an operator on a batch.

    The signature is that of `torch.library.register_vmap`: ``rule(info, in_dims, *args, **kwargs)`` returns
    ``(outputs, out_dims)``. The rule gets plain tensors with the batch dimension and runs outside this `vmap`, so
    other transforms around it take care of themselves. A second rule for an operator replaces the first.

    Args:
        op: The operator: its name as in PyTorch's schemas (``"mylib::cube"``, ``"aten::sum.dim_IntList"``), the
            operator itself (``torch.ops.mylib.cube.default``), or what `torch.library.custom_op` returned.

    Returns:
        A decorator, which returns the rule itself. The rule's arguments are

        - ``info``: a `VmapInfo` with the ``batch_size`` and the ``randomness``;
        - ``in_dims``: for each positional argument the dimension that is the batch, or None for one that is not
          batched or no tensor. It is a list for a list. Not all are None, unless the operator is a random one;
        - the operator's arguments as given. As elsewhere in `torch.library`, those that have their default values may
          be left out.

        and in what it returns ``out_dims`` is an int for each output, None for one that is the same for all
        examples, or a prefix of that structure. An operator without outputs returns ``(None, None)``.

    Raises:
        ValueError: There is no such operator.
        TypeError: ``op`` is something else.

    Example:
        >>> import torch
        >>> from functorch_lite import vmap
        >>> from functorch_lite.extend import register_batching_rule
        >>> @torch.library.custom_op("extend_example::outer", mutates_args=())
        ... def outer(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ...     return torch.from_numpy(x.numpy()[:, None] * y.numpy())
        >>> @register_batching_rule(outer)
        ... def _(info, in_dims, x, y):
        ...     x, y = (
        ...         z.expand(info.batch_size, *z.shape) if dim is None else z.movedim(dim, 0)
        ...         for z, dim in zip((x, y), in_dims)
        ...     )
        ...     return x[:, :, None] * y[:, None, :], 0
        >>> vmap(outer, in_dims=(0, None))(torch.ones(4, 2), torch.ones(3)).shape
        torch.Size([4, 2, 3])
    """
    return _decorator("register_batching_rule", op, lambda operator, rule: _rules.OperatorRule(operator, lambda: rule))


def register_decomposition(op: Any) -> Callable[[FunctionT], FunctionT]:
    """Decorate a function of one example that `vmap` runs in place of an operator.

    It takes and returns what the operator does, and sees no batch: it is written as the function that is mapped is.
    It must not call the operator itself.
    Use it where other operators compute the same, and `register_batching_rule` where that is not so, or too slow.

    Args:
        op: As in `register_batching_rule`.

    Returns:
        A decorator, which returns the function itself.

    Raises:
        ValueError: There is no such operator.
        TypeError: ``op`` is something else.

    Example:
        >>> import torch
        >>> from functorch_lite import vmap
        >>> from functorch_lite.extend import register_decomposition
        >>> @torch.library.custom_op("extend_example::cube", mutates_args=())
        ... def cube(x: torch.Tensor) -> torch.Tensor:
        ...     return torch.from_numpy(x.numpy() ** 3)
        >>> @register_decomposition(cube)
        ... def _(x):
        ...     return x * x * x
        >>> vmap(cube)(torch.arange(4.0))
        tensor([ 0.,  1.,  8., 27.])
    """
    return _decorator("register_decomposition", op, lambda _, decomposition: decomposition)


def remove_rule(op: Any) -> None:
    """Take back what the two decorators registered for an operator: the built-in rule, if any, is used again.

    Args:
        op: As in `register_batching_rule`.

    Raises:
        ValueError: There is no such operator, or no rule was registered for it.
        TypeError: ``op`` is something else.

    Example:
        >>> import torch
        >>> from functorch_lite.extend import register_decomposition, remove_rule
        >>> negate = register_decomposition("aten::neg")(lambda x: 0 - x)
        >>> remove_rule("aten::neg")
    """
    name = _resolve("remove_rule", op).name()
    if name not in _rules.overrides:
        raise ValueError(f"remove_rule: no rule was registered for {name} with functorch_lite.extend.")
    del _rules.overrides[name]
    _rules.uninstall(name)
    _update_fast_paths()


def _decorator(
    caller: str, op: Any, kernel_for: Callable[[OpOverload, Callable[..., Any]], Callable[..., Any]]
) -> Callable[[FunctionT], FunctionT]:
    operator = _resolve(caller, op)

    def register(function: FunctionT) -> FunctionT:
        _checks.check_callable(caller, function)
        _rules.overrides[operator.name()] = kernel_for(operator, function)
        _rules.install(operator.name(), _rules.kernel_of(operator))
        _update_fast_paths()
        return function

    return register


def _update_fast_paths() -> None:
    # kFront in csrc/keys.h: the shortcuts of csrc/fast_paths.cpp are registered there, and ask no rule.
    has_shortcut = torch._C._dispatch_has_kernel_for_dispatch_key
    _C.set_fast_paths(not any(has_shortcut(name, "DeferredInit") for name in _rules.overrides))


def _resolve(caller: str, op: Any) -> OpOverload:
    if isinstance(op, OpOverload):
        return op
    if isinstance(op, CustomOpDef):
        return op._opoverload
    if isinstance(op, OpOverloadPacket):
        overloads = _rules.overloads_of(op._qualified_op_name)
        if len(overloads) == 1:
            return overloads[0]
        raise ValueError(f"{caller}: {op} has several overloads, each with a rule of its own: {_names(overloads)}.")
    if not isinstance(op, str):
        _checks.refuse_type(
            f"{caller}: expected an operator, as 'mylib::cube', torch.ops.mylib.cube.default or what "
            f"torch.library.custom_op returned, got {type(op).__name__}."
        )
    found = _rules.find_operator(op)
    if found is None:
        others = _rules.overloads_of(op)
        advice = f"There are {_names(others)}." if others else "Import the library that defines it first."
        raise ValueError(
            f"{caller}: there is no operator {op!r}. {advice} Names are as in PyTorch's schemas, for example "
            f"'mylib::cube' or 'aten::sum.dim_IntList'."
        )
    return found


def _names(ops: list[OpOverload]) -> str:
    return ", ".join(op.name() for op in ops)
