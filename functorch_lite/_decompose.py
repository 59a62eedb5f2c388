"""PyTorch's own decompositions as batching rules, for operators that have none. Looked up on first use."""

from __future__ import annotations

from collections.abc import Callable

import torch

# One for each namespace that had a decomposition installed; they keep the registrations alive.
_libraries: dict[str, torch.library.Library] = {}


def _decomposition(name: str, overload: str) -> Callable[..., object] | None:
    from torch._decomp import decomposition_table  # costs a second: only when an operator needs it

    namespace, operator = name.split("::")
    packet = getattr(getattr(torch.ops, namespace), operator)
    return decomposition_table.get(getattr(packet, overload or "default"))


def has_decomposition(name: str, overload: str) -> bool:
    """Whether PyTorch has a decomposition of ``name.overload``."""
    return _decomposition(name, overload) is not None


def install_decomposition(name: str, overload: str) -> None:
    """Register PyTorch's decomposition of ``name.overload`` as its batching rule."""
    decomposition = _decomposition(name, overload)
    assert decomposition is not None
    namespace, operator = name.split("::")
    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "IMPL")
    full_name = f"{operator}.{overload}" if overload else operator
    _libraries[namespace].impl(full_name, decomposition, "TESTING_ONLY_GenericWrapper")
