"""What a wrapper shows when it is printed: its level, what the level hides, and the value inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_lite import _C

_plain_str: Callable[..., str] = torch._tensor_str._str
_plain_format: Callable[[Tensor, str], str] = Tensor.__format__


_NAMES = {
    "vmap": "BatchedTensor",
    "grad": "GradTensor",
    "jvp": "DualTensor",
    "checkpoint": "TapeTensor",
    "functionalize": "FunctionalTensor",
}


def describe(tensor: Tensor) -> str | None:
    """The nesting of a wrapper, outermost level last to be opened first; None for a plain tensor."""
    description = _C.describe(tensor)
    if description is None:
        return None
    kind, level, is_open, batch_dim, value = description
    if kind == "vmap" and batch_dim is None:  # the same for all examples
        return describe(value)
    name = _NAMES[kind]
    parts = [f"level={level}" if is_open else "level closed"]
    if batch_dim is not None:
        parts += [f"batch_dim={batch_dim}", f"batch_size={value.shape[batch_dim]}", f"shape={tuple(tensor.shape)}"]
    if kind == "grad" and tensor.requires_grad:
        parts.append("requires_grad=True" if tensor.grad_fn is None else f"grad_fn=<{tensor.grad_fn.name()}>")
    inner = describe(value)
    if inner is None:
        inner = repr(value)
    indented = inner.replace("\n", "\n    ")
    return f"{name}({', '.join(parts)}, value=\n    {indented})"


def _str(tensor: Tensor, *args: Any, **kwargs: Any) -> str:
    description = describe(tensor)
    if description is None:
        tensor = _C.innermost_value(tensor)
        with _C.Outside():  # printing computes, and a plain tensor prints as outside any transform
            description = _plain_str(tensor, *args, **kwargs)
    return description


def _format(tensor: Tensor, spec: str) -> str:
    # f"{x}" of a scalar asks for x.item(), which a batch does not have.
    return describe(tensor) or _plain_format(_C.innermost_value(tensor), spec)


def install() -> None:
    """Make PyTorch's printing know wrappers. Plain tensors print as before."""
    torch._tensor_str._str = _str  # type: ignore[assignment]
    Tensor.__format__ = _format  # type: ignore[method-assign]
