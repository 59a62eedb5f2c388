"""PyTorch's own decompositions as batching rules, for operators that have none. Looked up on first use."""

from __future__ import annotations

import torch

_library: torch.library.Library | None = None


def install_decomposition(name: str, overload: str) -> bool:
    """Register PyTorch's decomposition of ``name.overload`` as its batching rule; False if there is none."""
    from torch._decomp import decomposition_table  # costs a second: only when an operator needs it

    namespace, operator = name.split("::")
    packet = getattr(getattr(torch.ops, namespace), operator)
    decomposition = decomposition_table.get(getattr(packet, overload or "default"))
    if decomposition is None:
        return False
    global _library
    if _library is None:
        _library = torch.library.Library("aten", "IMPL")
    _library.impl(f"{operator}.{overload}" if overload else operator, decomposition, "TESTING_ONLY_GenericWrapper")
    return True
