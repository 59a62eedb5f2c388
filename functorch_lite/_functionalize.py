"""functionalize: functions without writes, and, if asked for, without views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from functorch_lite import _C, _checks, _tree
from functorch_lite._boundary import boundary


def functionalize(
    func: Callable[..., Any], *, remove: Literal["mutations", "mutations_and_views"] = "mutations"
) -> Callable[..., Any]:
    """Return a function that computes what ``func`` does without writing in place.

    Each write becomes a new value, which everything that shares the memory sees from then on. What ``func`` has written
    into its arguments, and into tensors that it captures, is written there when it has returned: so the effect is the
    same. The purpose is a program without writes for those who look at it, as in ``make_fx(functionalize(f))``.

    Args:
        func: Takes and returns pytrees. Leaves that are not tensors are passed through.
        remove: ``"mutations"`` keeps views; ``"mutations_and_views"`` makes copies of them, as by ``view_copy`` for
            ``view``. Default ``"mutations"``.

    Returns:
        A function of the same arguments, which returns what ``func`` returns. An output that is an argument is that
        argument, and a view of one is a view of it, unless views are removed.

    Raises:
        ValueError: ``remove`` is neither; or, when the function is called, two tensors from outside share memory, one
            is written, and the other is used afterwards.

    Example:
        >>> import torch
        >>> from functorch_lite import functionalize, make_fx
        >>> def f(x):
        ...     y = torch.zeros(2)
        ...     y[0] = x
        ...     return y.mul_(2)
        >>> functionalize(f)(torch.tensor(3.0))
        tensor([6., 0.])
        >>> graph = make_fx(functionalize(f))(torch.tensor(3.0)).graph
        >>> [node.name for node in graph.nodes if node.op == "call_function" and node.users]
        ['zeros', 'select', 'copy', 'select_scatter', 'mul']

    Note:
        What the function writes is seen inside through PyTorch's operators; ``.numpy()`` and ``.tolist()`` of a
        captured tensor read its memory, which is not written yet. If the function raises, nothing is written.
    """
    _checks.check_callable("functionalize", func)
    _checks.check_remove(remove)

    def functional(*args: Any, **kwargs: Any) -> Any:
        return run(remove == "mutations", func, args, kwargs)

    return boundary("functionalize", functional, like=func, made_of=(functionalize, (func,), {"remove": remove}))


def run(keep_views: bool, func: Callable[..., Any], args: Any, kwargs: dict[str, Any] | None = None) -> Any:
    """Call ``func`` at a functionalize level, then write what it has written."""
    with _C.FunctionalizeLevel(keep_views) as level:
        output = func(*_tree.map_tensors(level.lift, args), **_tree.map_tensors(level.lift, kwargs or {}))
        leaves, spec = _tree.flatten(output)
        results = [_Result(level, leaf) for leaf in leaves]
        writes = [_Write(level, *found) for found in level.from_outside()]
    for write in writes:
        write.values()
    outputs = [result.get() for result in results]
    for write in writes:
        write.shape()
    return _tree.unflatten(outputs, spec)


class _Result:
    """An output of the function, and what it is outside."""

    def __init__(self, level: _C.FunctionalizeLevel, leaf: Any) -> None:
        self._level, self._leaf = level, leaf
        self._outside = level.outside_of(leaf) if isinstance(leaf, Tensor) else None
        self._is_argument = self._outside is not None and level.lift(self._outside) is leaf
        # Of a memory from outside, views are made when that has been written.
        self._value = leaf
        if isinstance(leaf, Tensor) and not (self._is_argument or (self._outside is not None and level.keep_views)):
            self._value = level.value_of(leaf) if _C.is_wrapper(leaf) else leaf

    def get(self) -> Any:
        if self._outside is None or not (self._is_argument or self._level.keep_views):
            return self._value
        return self._outside if self._is_argument else self._level.replay_views(self._leaf, self._outside)


class _Write:
    """What the function did to a tensor from outside."""

    def __init__(
        self,
        level: _C.FunctionalizeLevel,
        outside: Tensor,
        inside: Tensor,
        unrecorded: bool,
        is_replaced: bool,
        reshapes: list[Callable[[], None]],
    ) -> None:
        self._outside, self._unrecorded, self._reshapes = outside, unrecorded, reshapes
        with self._grad_mode():
            memory = level.memory_value(inside)
            self._new = memory if memory is not outside and not is_replaced else None
            # set_ and .data = ... give it the memory of another tensor.
            self._data = level.value_of(inside) if is_replaced else None

    def _grad_mode(self) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self._unrecorded)

    def values(self) -> None:
        """Write into the memory."""
        if self._new is None:
            return
        with self._grad_mode():
            if self._outside.shape != self._new.shape:
                self._outside.resize_(self._new.shape)
            self._outside.copy_(self._new)

    def shape(self) -> None:
        """Change the tensor itself, as transpose_ and set_ do."""
        if self._data is not None:
            self._outside.data = self._data
        for reshape in self._reshapes if self._data is None else ():
            reshape()


def call_auto_functionalized(
    name: str, overload: str, arguments: list[Any]
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Call an operator that writes as PyTorch's functional one, which tracing shows as one node.

    Returns the results, and the new value of each tensor that is written; None if PyTorch cannot.
    """
    from torch._higher_order_ops.auto_functionalize import auto_functionalized, can_auto_functionalize

    namespace, _, operator = name.partition("::")
    op = getattr(getattr(getattr(torch.ops, namespace), operator), overload or "default")
    if not can_auto_functionalize(op):
        return None
    named = {argument.name: value for argument, value in zip(op._schema.arguments, arguments, strict=True)}
    called: tuple[Any, ...] = auto_functionalized(op, **named)
    count = len(op._schema.returns)
    values = [new for new in called[max(count, 1) :] if new is not None]
    flat = [tensor for new in values for tensor in (new if isinstance(new, (list, tuple)) else [new])]
    return list(called[:count]), flat
