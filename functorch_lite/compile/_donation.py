"""Donated arguments: the caller gives their memory away, so that the call may free or overwrite it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from functorch_lite import _C, _boundary, _checks
from functorch_lite.compile._arguments import Arguments
from functorch_lite.compile._subclasses import is_subclass


def memory(tensor: Tensor) -> int:
    """Something that is equal for tensors of one storage, at whatever level."""
    tensor = _C.innermost_value(tensor)
    return tensor.untyped_storage()._cdata if _is_plain(tensor) else id(tensor)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not is_subclass(tensor)


def candidates(positions: int | tuple[int, ...], args: tuple[Any, ...], arguments: Arguments) -> list[int]:
    """The tensors in the positional arguments that are donated."""
    chosen = _checks.argument_positions("jit", positions, len(args), "donate_argnums")
    owners = [i for i, arg in enumerate(args) for _ in pytree.tree_leaves(arg)]
    places = zip(owners, arguments.places, strict=False)  # those of keyword arguments follow
    numbers = {place for owner, place in places if owner in chosen and place is not None}
    return sorted(i for i in numbers if _is_plain(arguments.tensors[i]))


def usable(candidates: Sequence[int], tensors: Sequence[Tensor], results: Sequence[Any]) -> list[int]:
    """Those whose memory is not that of a result. None if a result may be differentiated, which needs them."""
    if not candidates:
        return []
    outputs = [x for x in results if isinstance(x, Tensor)]
    if any(x.requires_grad for x in outputs):
        _boundary.warn(_checks.DONATION_WITH_GRADIENTS)
        return []
    kept = {memory(x) for x in outputs}
    return list({memory(tensors[i]): i for i in candidates if memory(tensors[i]) not in kept}.values())
