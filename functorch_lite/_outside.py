"""Where PyTorch's own code is to run although levels may be open."""

from __future__ import annotations

import torch

from functorch_lite import _C


def is_outside() -> bool:
    """Whether the calling code is outside of all levels, or inside a `torch.func` transform further in."""
    return _C.current_level() is None or torch._C._are_functorch_transforms_active()
