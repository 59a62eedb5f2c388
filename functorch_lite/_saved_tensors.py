"""torch.autograd.graph.saved_tensors_hooks inside and around transforms.

PyTorch takes what an unpack hook returns for data, and drops what autograd knows of it. A hook that computes runs when
the level that saved is closed, so what it returns may be differentiated further out: it is wrapped again, as what was
saved had been.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch._C import _autograd
from torch.autograd.graph import saved_tensors_hooks

from functorch_lite import _C


class _Packed(NamedTuple):
    level: _C.AutodiffLevel
    content: Any


def _at_levels(
    pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]
) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    def pack_at(tensor: Tensor) -> Any:
        level = _C.current_level()
        if isinstance(level, _C.AutodiffLevel) and level.value_of(tensor) is not tensor:
            return _Packed(level, pack(tensor))
        return pack(tensor)

    def unpack_at(packed: Any) -> Tensor:
        if not isinstance(packed, _Packed):
            return unpack(packed)
        level, content = packed
        tensor = unpack(content)
        return level.lift_constant(level.value_of(tensor))

    return pack_at, unpack_at


def _enter(hooks: saved_tensors_hooks) -> None:
    _autograd._push_saved_tensors_default_hooks(*_at_levels(hooks.pack_hook, hooks.unpack_hook))


def install() -> None:
    """Make the hooks know levels. Outside of them they are called as before."""
    saved_tensors_hooks.__enter__ = _enter  # type: ignore[method-assign]
