"""`Tensor.new_tensor`, and `Tensor.new`, its old spelling that torch.distributions uses, for wrappers.

PyTorch's own take the device from the tensor's dispatch keys, and those of a wrapper name none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_lite import _C
from functorch_lite._outside import is_outside

_plain_new: Callable[..., Tensor] = Tensor.new
_plain_new_tensor: Callable[..., Tensor] = Tensor.new_tensor


def _is_wrapped(tensor: Tensor) -> bool:
    # A wrapper of torch.func's around one of ours has no device either.
    return _C.is_wrapper(tensor) or (_C.current_level() is not None and is_outside())


def _new(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not _is_wrapped(tensor):
        return _plain_new(tensor, *args, **kwargs)
    if len(args) == 1 and isinstance(args[0], Tensor):
        return args[0].detach()
    if len(args) == 1 and not isinstance(args[0], (int, torch.SymInt, torch.Size)):
        return tensor.new_tensor(args[0], **kwargs)
    size = args[0] if args and isinstance(args[0], torch.Size) else args or (0,)
    return tensor.new_empty(size, **kwargs)


def _new_tensor(tensor: Tensor, data: Any, *args: Any, **kwargs: Any) -> Tensor:
    if not _is_wrapped(tensor):
        return _plain_new_tensor(tensor, data, *args, **kwargs)
    options: dict[str, Any] = {"dtype": tensor.dtype, "device": tensor.device}
    options.update((name, value) for name, value in kwargs.items() if value is not None)
    if not isinstance(data, Tensor):
        return torch.tensor(data, **options)
    requires_grad = options.pop("requires_grad", False)
    return data.detach().to(**options, copy=True).requires_grad_(requires_grad)


def install() -> None:
    """Make both know wrappers. Plain tensors use PyTorch's own."""
    Tensor.new = _new  # type: ignore[assignment, method-assign]
    Tensor.new_tensor = _new_tensor  # type: ignore[assignment, method-assign]
