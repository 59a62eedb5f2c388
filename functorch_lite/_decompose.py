"""Decompositions as batching rules, for operators that have none. Looked up on first use."""

from __future__ import annotations

import torch

from functorch_lite import _linear_cross_entropy

#: What PyTorch has no decomposition for: custom operators of its own that are written in Python.
_OURS = {
    "torch_nn::_linear_cross_entropy_batch_chunked": _linear_cross_entropy.with_gradients,
    "torch_nn::_linear_cross_entropy_batch_chunked_no_reduction": _linear_cross_entropy.without_reduction,
}

# One for each namespace that had a decomposition installed; they keep the registrations alive.
_libraries: dict[str, torch.library.Library] = {}


def install_decomposition(name: str, overload: str) -> bool:
    """Register a decomposition of ``name.overload`` as its batching rule; False if there is none."""
    from torch._decomp import decomposition_table  # costs a second: only when an operator needs it

    namespace, operator = name.split("::")
    packet = getattr(getattr(torch.ops, namespace), operator)
    decomposition = _OURS.get(name) or decomposition_table.get(getattr(packet, overload or "default"))
    if decomposition is None:
        return False
    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "IMPL")
    full_name = f"{operator}.{overload}" if overload else operator
    _libraries[namespace].impl(full_name, decomposition, "TESTING_ONLY_GenericWrapper")
    return True
