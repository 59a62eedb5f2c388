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
from torch.utils import checkpoint

from functorch_lite import _C


class _Packed(NamedTuple):
    level: _C.AutodiffLevel
    content: Any


def _at_levels(
    pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]
) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    def pack_at(tensor: Tensor) -> Any:
        level = _level_that_saves(tensor)
        return pack(tensor) if level is None else _Packed(level, pack(tensor))

    def unpack_at(packed: Any) -> Tensor:
        if not isinstance(packed, _Packed):
            return unpack(packed)
        level, content = packed
        return level.lift_constant(level.value_of(unpack(content)))

    return pack_at, unpack_at


def _outside_of_levels(
    pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]
) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """For PyTorch's own checkpoint around a transform.

    It computes again without the derivatives of outer levels. What a level saves is kept: it is used before the
    checkpointed function returns, or depends on what the transform has returned.
    """
    return (
        lambda tensor: pack(tensor) if _level_that_saves(tensor) is None else tensor,
        lambda packed: packed if isinstance(packed, Tensor) and _C.is_wrapper(packed) else unpack(packed),
    )


def _level_that_saves(tensor: Tensor) -> _C.AutodiffLevel | None:
    level = _C.current_level()
    return level if isinstance(level, _C.AutodiffLevel) and level.value_of(tensor) is not tensor else None


def _enter(hooks: saved_tensors_hooks) -> None:
    recomputes = isinstance(hooks, (checkpoint._checkpoint_hook, checkpoint._recomputation_hook))
    adapt = _outside_of_levels if recomputes else _at_levels
    _autograd._push_saved_tensors_default_hooks(*adapt(hooks.pack_hook, hooks.unpack_hook))


def install() -> None:
    """Make the hooks know levels. Outside of them they are called as before."""
    saved_tensors_hooks.__enter__ = _enter  # type: ignore[method-assign]
