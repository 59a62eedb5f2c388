"""PyTorch's own decompositions as batching rules, for operators that have none. Looked up on first use."""

from __future__ import annotations

from functorch_lite import _rules


def install_decomposition(name: str, overload: str) -> bool:
    """Register PyTorch's decomposition of ``name.overload`` as its batching rule; False if there is none."""
    from torch._decomp import decomposition_table  # costs a second: only when an operator needs it

    full_name = f"{name}.{overload}" if overload else name
    op = _rules.find_operator(full_name)
    decomposition = decomposition_table.get(op) if op is not None else None
    if decomposition is None:
        return False
    _rules.install(full_name, decomposition)
    return True
