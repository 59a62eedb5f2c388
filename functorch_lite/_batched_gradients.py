"""`torch.autograd.grad(is_grads_batched=True)` and `torch.autograd.functional` with ``vectorize=True``, inside a transform.

PyTorch maps there with a vmap of its own, older than `torch.func`, that takes our wrappers for its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.autograd.functional
import torch.autograd.gradcheck
from torch import _vmap_internals

from functorch_lite import _C
from functorch_lite._vmap import vmap

_plain: Callable[..., Any] = _vmap_internals._vmap


def _vmap(func: Callable[..., Any], in_dims: Any = 0, out_dims: Any = 0, allow_none_pass_through: bool = False) -> Any:
    if _C.level_depth() == 0:
        return _plain(func, in_dims, out_dims, allow_none_pass_through)
    return vmap(func, in_dims, out_dims)


def install() -> None:
    """Have them map with ours inside our transforms. Elsewhere they use PyTorch's own."""
    for module in (_vmap_internals, torch.autograd.functional, torch.autograd.gradcheck):
        module._vmap = _vmap  # type: ignore[attr-defined]
