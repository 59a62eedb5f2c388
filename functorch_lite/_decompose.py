"""PyTorch's own decompositions as batching rules, for operators that have none. Looked up on first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from functorch_lite import _rules


def _decomposition(full_name: str) -> Callable[..., Any] | None:
    from torch._decomp import decomposition_table  # costs a second: only when an operator needs it

    op = _rules.find_operator(full_name)
    return decomposition_table.get(op) if op is not None else None


def has_decomposition(full_name: str) -> bool:
    """Whether PyTorch has a decomposition of ``full_name``, ``"aten::dist"`` or ``"aten::rot90.out"``."""
    return _decomposition(full_name) is not None


def install_decomposition(full_name: str) -> None:
    """Register PyTorch's decomposition of ``full_name``, which has one, as its batching rule."""
    decomposition = _decomposition(full_name)
    assert decomposition is not None
    _rules.install(full_name, decomposition)
