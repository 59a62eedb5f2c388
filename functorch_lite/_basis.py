"""A linear map applied to the standard basis, some vectors at a time: what makes a matrix of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functorch_lite._memory_budget import rows_that_fit
from functorch_lite._vmap import generators_in_use, map_chunks, map_rows

ChunkSize = int | str | None


def _basis(leaves: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Rows ``start`` to ``stop`` of the standard basis of the space of all leaves, split and shaped like them."""
    if len(leaves) == 1 and stop - start == leaves[0].numel():
        leaf = leaves[0]
        rows = torch.eye(leaf.numel(), dtype=leaf.dtype, device=leaf.device)
        return [rows if leaf.dim() == 1 else rows.view(stop - start, *leaf.shape)]
    offset = 0
    parts = []
    for leaf in leaves:
        n = leaf.numel()
        rows = torch.zeros(stop - start, n, dtype=leaf.dtype, device=leaf.device)
        first, last = max(start, offset), min(stop, offset + n)
        if first < last:
            rows[first - start : last - start, first - offset : last - offset].fill_diagonal_(1)
        parts.append(rows.view(stop - start, *leaf.shape))
        offset += n
    return parts


def apply_to_basis(
    linear: Callable[..., Any],
    leaves: Sequence[Tensor],
    chunk_size: ChunkSize,
    *,
    has_aux: bool = False,
    randomness: str = "error",
) -> tuple[list[Tensor], Any]:
    """``linear`` of every basis vector: for each of its results a tensor r[n,*], n counting all elements of the leaves.

    With ``has_aux``, ``linear`` returns (results, aux), and aux must be the same for every vector.
    """
    out_dims = (0, None) if has_aux else 0
    total = sum([leaf.numel() for leaf in leaves])

    def rows_from(start: int, stop: int) -> Any:
        return map_rows(linear, _basis(leaves, start, stop), stop - start, out_dims, randomness)

    if chunk_size == "auto":
        chunk_size = _measured(lambda: rows_from(0, 1), leaves, total) if total > 1 else None
    if not isinstance(chunk_size, int) or total <= chunk_size:
        pieces = [rows_from(0, total)]
    else:
        pieces = map_chunks(linear, partial(_basis, leaves), total, chunk_size, out_dims, randomness)
    aux = pieces[0][1] if has_aux else None
    rows = [piece[0] for piece in pieces] if has_aux else pieces
    return rows[0] if len(rows) == 1 else [torch.cat(parts) for parts in zip(*rows, strict=True)], aux


def _measured(one_row: Callable[[], object], leaves: Sequence[Tensor], total: int) -> int:
    """The chunk size of ``"auto"``. Random numbers that measuring takes are put back."""
    device = next((leaf.device for leaf in leaves if leaf.device.type != "cpu"), leaves[0].device)
    generators = generators_in_use()
    states = [generator.get_state() for generator in generators]
    try:
        return rows_that_fit(one_row, total, device)
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
